"""A container around an artefact and convscale's own server: a Dockerfile, what it installs, and what it copies."""

from __future__ import annotations

import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import convscale._version
from convscale.artifact.artifact import Artifact
from convscale.errors import UserError
from convscale.files import write_text
from convscale.runtimes.base import runtime_of, runtimes_of
from convscale.ship.repository import label_of

PACKAGES = (
    *("numpy", "pillow", "lazy_loader", "simplejpeg", "onnxruntime", "typer", "rich", "pyyaml"),
    *("fastapi", "uvicorn", "python-multipart", "prometheus-client"),
)
"""What opens, runs and serves an artefact; nothing that trains."""
MAY_LACK = ("simplejpeg", "onnxruntime")
"""Where there is no wheel, Pillow decodes; an OpenVINO file needs no ONNX Runtime."""
BUILDS = {"onnxruntime": ("onnxruntime-gpu",)}
"""Other names under which a package is installed; the container serves on processors, and takes the plain one."""
_DOCKERFILE = """# docker build -t {label} . && docker run -p 8000:8000 -e CONVSCALE_TOKEN=... {label}
FROM python:{python}-slim

WORKDIR /srv
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY app/ app/
COPY models/ models/

# Nobody's own user; no file is written but into memory.
RUN useradd --uid 10001 --no-create-home serve
USER 10001
ENV PYTHONPATH=/srv/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp

EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=60s CMD ["python", "-c", "{health}"]
CMD ["python", "-m", "convscale", "serve", "{name}=models/{name}", "--host", "0.0.0.0", "--port", "8000"]
"""
_HEALTH = "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=5)"


def write_container(artifact: Artifact, name: str, folder: Path) -> None:
    """``Dockerfile``, ``requirements.txt``, ``app/convscale`` and ``models/NAME``.

    Raises:
        UserError: a library that it needs is not installed here, so its version is not known.
    """
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    values = {"name": name, "label": label_of(name), "python": python, "health": _HEALTH}
    write_text(folder / "Dockerfile", _DOCKERFILE.format(**values))
    write_text(folder / "requirements.txt", "".join(f"{line}\n" for line in requirements(artifact)))
    write_text(folder / ".dockerignore", "kserve.yaml\n**/__pycache__\n")
    source = Path(convscale._version.__file__).parent
    shutil.copytree(source, folder / "app" / "convscale", ignore=shutil.ignore_patterns("__pycache__", "*.npz"))
    shutil.copytree(artifact.folder, folder / "models" / name)


def requirements(artifact: Artifact) -> list[str]:
    """What is installed here, to the version.

    Raises:
        UserError: something is not installed.
    """
    own, usual = runtime_of(artifact.runtime), runtime_of(runtimes_of("onnx")[0])
    wanted = list(dict.fromkeys([*PACKAGES, own.library]))
    if own is not usual and artifact.format not in usual.formats:
        wanted.remove(usual.library)
    lines: list[str] = []
    for package in wanted:
        found = _version(package)
        if found is not None:
            lines.append(f"{package}=={found}")
        elif package not in MAY_LACK or package == own.library:
            raise UserError(
                f"--layout docker writes down what is installed here, and {package} is not; pip install "
                '"convscale[serve]"'
            )
    return lines


def _version(package: str) -> str | None:
    """Of a package, or of another build of the same."""
    for name in (package, *BUILDS.get(package, ())):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
