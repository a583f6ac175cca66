"""What every test shares: one compute thread per test process, no display, no telemetry, a fixed seed."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Set before torch is first imported. Two pytest-xdist workers that each start a thread per core get in each other's
# way.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """A test that draws random numbers draws the same ones alone and in the suite; torch is seeded only by tests that
    use it.
    """
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)


@pytest.fixture
def call(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Exit code, standard output and standard error of ``convscale ARGS``, in a terminal of the test module's
    ``COLUMNS``.
    """
    from convscale.cli import app as cli

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["convscale", *map(str, args)])
        monkeypatch.setenv("COLUMNS", str(request.module.COLUMNS))
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


@pytest.fixture(scope="session")
def chromium() -> Path:
    """A headless-capable browser; the test is skipped without one."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found:
            return Path(found)
    pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")


@pytest.fixture(scope="session")
def fashion_mnist_dir() -> Path:
    """The folder of Fashion-MNIST's four files; the test is skipped without it."""
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not (folder / "t10k-images-idx3-ubyte.gz").is_file():
        pytest.skip("no Fashion-MNIST on this machine (Debian: apt-get install dataset-fashion-mnist)")
    return folder
