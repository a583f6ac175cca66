"""The folder of an artefact as it is written: whole or not at all, and sealed by checksums of all that it holds."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from convscale._version import __version__
from convscale.artifact.manifest import DETECTOR_SCHEMA, MANIFEST, SCHEMA, Manifest
from convscale.errors import UserError
from convscale.files import is_full, sha256, whole_folder, write_json

CARD = "README.md"
"""The model card."""


def seal(folder: Path, manifest: Mapping[str, object]) -> Manifest:
    """Write the manifest with the checksums of every file in the folder. Returns the manifest."""
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name != MANIFEST:
            files[path.name] = {"sha256": sha256(path), "bytes": path.stat().st_size}
    schema = SCHEMA if manifest.get("detection") is None else DETECTOR_SCHEMA
    full = {"schema": schema, "convscale": __version__, **manifest, "files": files}
    write_json(folder / MANIFEST, full)
    return Manifest.from_dict(full, folder)


@contextmanager
def staged_folder(target: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder for an artefact that takes the name ``target`` on a clean exit; on any other it is
    removed and ``target`` untouched.

    Raises:
        UserError: ``target`` is a file, holds something and ``overwrite`` is not asked for, or holds something other
            than an artefact; or its disk is full or not writable.
    """
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise UserError(f"output {target} is a file; name a folder")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise UserError(f"output folder {target} exists and is not empty; use --overwrite or another name")
        if not (target / MANIFEST).is_file():
            raise UserError(
                f"output folder {target} holds something other than an artefact; it is not overwritten, use another "
                "name"
            )
    began = False
    try:
        with whole_folder(target) as staging:
            began = True
            yield staging
    except OSError as error:
        if is_full(error):
            raise UserError(
                f"no space left on the disk of {target.parent} while writing {target.name}; free some and run again"
            ) from error
        if not began:
            raise UserError(f"output folder {target} can not be written: {error.strerror}; name another") from error
        raise


def identity(path: Path) -> tuple[int, ...]:
    """Changes whenever a file's content does, or another file takes its name."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
