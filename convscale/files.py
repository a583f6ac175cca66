"""Files that are either wholly there or not at all.

What writes imports ``shutil`` and ``tempfile`` itself: opening an artefact needs neither, and they are slow to import.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from convscale.errors import UserError
from convscale.locks import OutputLock


def fsync_dir(path: Path) -> None:
    """Flush a folder's entries, so that a rename in it outlives a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder. On a clean exit its files are flushed and it takes the name ``target``, in the
    place of what stood there; on any other it is removed and ``target`` untouched.

    Raises:
        OSError: the parent can not be written, or its disk is full.
    """
    import shutil
    import tempfile

    target = _behind_link(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=_prefix(target), suffix=".tmp", dir=target.parent))
    lock = OutputLock()  # tells other runs that it is no litter
    try:
        lock.take(staging)
        staging.chmod(0o755)
        yield staging
        inside = sorted(staging.rglob("*"))
        for path in inside:
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        for path in inside:
            if path.is_dir():
                fsync_dir(path)
        fsync_dir(staging)
        _rename_folder(staging, target)
    finally:
        lock.release()
        shutil.rmtree(staging, ignore_errors=True)


def _rename_folder(staging: Path, target: Path) -> None:
    """Move ``staging`` to ``target``; what was there is put aside first and removed last, so that one of them is always
    whole.
    """
    import shutil
    import tempfile

    aside = None
    if target.is_dir() and any(target.iterdir()):
        aside = Path(tempfile.mkdtemp(prefix=_prefix(target), suffix=".old", dir=target.parent)) / target.name
        os.rename(target, aside)
    try:
        os.replace(staging, target)
    except OSError:
        if aside is not None:
            os.rename(aside, target)
        raise
    finally:
        if aside is not None:
            shutil.rmtree(aside.parent, ignore_errors=True)
    fsync_dir(target.parent)


def _behind_link(target: Path) -> Path:
    """What a link leads to, there or not: the link stays, and what it leads to is replaced."""
    return Path(os.path.realpath(target)) if target.is_symlink() else target


def _prefix(target: Path) -> str:
    """How the name of a temporary sibling begins: never so long that it alone is too long a name."""
    return f".{target.name.encode(errors='surrogateescape')[:100].decode(errors='ignore')}."


_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk, or a user's share of it, is full."""
    return getattr(error, "errno", None) in _FULL or "No space left" in str(error)


_USERS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR),
    *(errno.EISDIR, errno.EEXIST, errno.ENOENT, errno.ELOOP, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE),
    *(errno.ENOTEMPTY, errno.EBUSY, errno.ENXIO, errno.ENODEV, errno.ESTALE),
)
"""What a file system says that a user can put right."""


def told(error: OSError) -> UserError | None:
    """An error of the file system as one line that names the path; None for one that a user can not put right."""
    if error.errno not in _USERS:
        return None
    path = error.filename2 or error.filename
    shown = os.fsdecode(path) if isinstance(path, (str, bytes)) else ""
    shown = shown if shown.isprintable() else ascii(shown)[1:-1]
    shown = shown if len(shown) <= 120 else f"{shown[:60]}...{shown[-50:]}"
    if is_full(error):
        return UserError(f"no space left on the disk{f' of {shown}' if shown else ''}; free some and run again")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return UserError("too many files are open; raise the limit (ulimit -n), or use fewer --workers")
    why = os.strerror(error.errno or 0)
    return UserError(f"{shown} can not be used: {why}; name another" if shown else f"a file can not be used: {why}")


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on a clean exit it is flushed and renamed to ``path``, else
    removed.
    """
    import tempfile

    target = _behind_link(Path(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(prefix=_prefix(target), suffix=".tmp", dir=target.parent)
    os.close(fd)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, target)
        fsync_dir(target.parent)
    except OSError as error:
        if is_full(error):
            raise UserError(
                f"no space left on the disk of {target.parent} while writing {target.name}; free some and run again"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` atomically as UTF-8; what is no character (a byte of a file's name) is written out."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` atomically as indented JSON; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def json_numbers(value: Any) -> Any:
    """Nested values with NaN and infinity as None, which JSON can say; tuples become lists."""
    if isinstance(value, dict):
        return {key: json_numbers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_numbers(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


MARK = ".convscale"
"""A file that tells a run's folder from a user's own."""
_FIT = "fit.json"
"""The file that tells a fit's folder, which holds its training in ``train`` and what it ships in ``artifact``."""


def inside_fit(folder: Path, part: str) -> Path:
    """Of a fit's folder the part that is wanted, ``train`` or ``artifact``; any other folder is what it is."""
    return folder / part if (folder / _FIT).is_file() else folder


def _is_ours(folder: Path) -> bool:
    """Whether a folder was made by ``new_output_dir``, or is a run of an earlier version, which left no mark."""
    training = (folder / "recipe.yaml").is_file() and (
        (folder / "checkpoints").is_dir() or (folder / "log.jsonl").is_file()
    )
    return (folder / MARK).is_file() or (folder / _FIT).is_file() or training


def check_outside(folder: str | os.PathLike[str], inputs: Iterable[tuple[str, object]]) -> None:
    """Refuse to replace a folder, or a file, that holds what the run itself reads.

    Args:
        folder: what ``--overwrite`` replaces.
        inputs: names of arguments with their values; what is no path of something that exists is passed over.

    Raises:
        UserError: one of them is the folder or lies in it, by its own path or behind links.
    """
    tops = {Path(os.path.abspath(folder)), Path(os.path.realpath(folder))}
    for name, value in inputs:
        if not isinstance(value, str | os.PathLike) or not os.path.lexists(value):
            continue
        places = (Path(os.path.abspath(value)), Path(os.path.realpath(value)))
        if any(place.is_relative_to(top) for place in places for top in tops):
            raise UserError(
                f"output {folder} holds {name} {os.fspath(value)}, which --overwrite would delete; use another name"
            )


def file_or_none(value: object) -> object:
    """``value`` where it is the path of a file, as what goes by a name of ours too must be: ``small`` is a recipe, and
    may be a folder of the user's.
    """
    return value if isinstance(value, str | os.PathLike) and os.path.isfile(value) else None


def check_output_dir(
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    resume: bool = False,
    inputs: Iterable[tuple[str, object]] = (),
    ways: Sequence[str] = ("--resume", "--overwrite"),
) -> Path:
    """Refuse what ``new_output_dir`` would refuse by the folder's name, and touch nothing: for before the rest of the
    input is looked at.

    Args:
        path: the folder.
        overwrite, resume: as for ``new_output_dir``.
        inputs: what the run reads, by the names of its arguments; it may not lie where everything is to be deleted.
        ways: options of the command by which it takes a folder that is there.
    """
    folder = Path(path)
    if overwrite and not resume:
        check_outside(folder, inputs)
    try:
        there = folder.exists()
    except OSError as error:  # a name that is too long, say
        raise told(error) or error from error
    if there and not folder.is_dir():
        raise UserError(f"output {folder} is a file; name a folder")
    if not there:
        _check_above(folder, "output folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not resume and not overwrite:
            use = " or ".join(part for part in (", ".join(ways), "another name") if part)
            raise UserError(f"output folder {folder} exists and is not empty; use {use}")
        if not _is_ours(folder):
            raise UserError(
                f"output folder {folder} holds something other than a run of convscale; nothing is done to it, use "
                "another name"
            )
    return folder


def check_output_file(path: str | os.PathLike[str]) -> None:
    """Refuse a file that could not be written, and touch nothing: for before minutes of work, not after.

    Raises:
        UserError: it is a folder, or it can not be made where it is to be.
    """
    file = Path(path)
    try:
        folder = file.is_dir()
    except OSError as error:  # a name that is too long, say
        raise told(error) or error from error
    if folder:
        raise UserError(f"output {file} is a folder; name a file")
    _check_above(_behind_link(file), "output")


def check_new_file(path: str | os.PathLike[str], *, overwrite: bool, what: str = "output") -> None:
    """Refuse to replace a file in silence.

    Raises:
        UserError: it is there, and ``overwrite`` was not asked for.
    """
    if not overwrite and Path(path).is_file():
        raise UserError(f"{what} {path} exists; use --overwrite or another name")


def _check_above(path: Path, what: str) -> None:
    """
    Raises:
        UserError: the folder that a path is in is none, or can not be written in; where it is to be made, the one above
            it that is there.
    """
    above = next((each for each in path.absolute().parents if os.path.lexists(each)), None)
    if above is not None and not above.is_dir():
        raise UserError(f"{what} {path} can not be written: {above} is no folder; name another")
    if above is not None and not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{what} {path} can not be written: {above} is read-only; name another")


def new_output_dir(
    path: str | os.PathLike[str], *, overwrite: bool = False, resume: bool = False, need_bytes: int = 0
) -> Path:
    """Make the output folder of a command.

    Raises:
        UserError: it exists with something in it and neither ``overwrite`` nor ``resume`` was asked for, or what is in
            it is no run of ours; its disk has less than ``need_bytes`` free; or it can not be written.
    """
    import shutil

    folder = check_output_dir(path, overwrite=overwrite, resume=resume)
    try:
        for entry in list(folder.iterdir()) if folder.is_dir() and not resume else ():
            # The folder itself stays: a lock stands on it, and it may be a link.
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARK).write_text("Made by convscale; --overwrite may replace this folder.\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"output folder {folder} can not be written: {error.strerror}; name another") from error
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        raise UserError(
            f"the disk of {folder} has {free / 1e6:.0f} MB free, {need_bytes / 1e6:.0f} MB are needed; free some or "
            "name another folder"
        )
    return folder
