"""Files that are either wholly there or not at all.

What writes imports ``shutil`` and ``tempfile`` itself: opening an artefact needs neither, and they are slow to import.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from convscale.errors import UserError
from convscale.locks import MARK, OutputLock, is_abandoned


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
def whole_folder(target: Path, *, check: Callable[[], object] | None = None) -> Iterator[Path]:
    """Yield a temporary folder. On a clean exit its files are flushed and it takes the name ``target``, in the place of
    what stood there; on any other it is removed and ``target`` untouched. What is put beside it, into its parent, goes
    with it.

    Args:
        target: the folder to be.
        check: raises where what stands at ``target`` may not be replaced. It is asked at the start and once more at the
            end, since much can be put there in between; a second run of the same name is refused meanwhile. None: only
            this run writes there.

    Raises:
        OSError: the parent can not be written, or its disk is full.
        UserError: another run writes the same folder; or ``check`` raised it.
    """
    import shutil
    import tempfile

    target = _behind_link(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with OutputLock() as name, OutputLock() as lock:
        if check is not None:
            name.take_name(target)
            sweep(target.parent, target)
            check()
        room = Path(tempfile.mkdtemp(prefix=_prefix(target), suffix=".tmp", dir=target.parent))
        staging, aside = room / _NEW / target.name, room / _OLD / target.name
        try:
            mark_as_ours(room)
            lock.take(room)  # tells other runs that it is no litter
            for folder in (staging, aside.parent):
                folder.mkdir(parents=True)
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
            if check is not None:
                check()
            _rename_folder(staging, target, aside)
        finally:
            lock.release()
            if not (staging.exists() and aside.exists()):  # else the one put aside is the only one
                shutil.rmtree(room, ignore_errors=True)


_NEW, _OLD = "new", "old"
"""In a temporary folder: what is being written, and what is put aside for it, by their names."""
_ENDING = r"[a-z0-9_]{8}\.tmp"
_TEMPORARY = re.compile(r"\..*\." + _ENDING, re.DOTALL)
"""Names of temporary files and folders."""


def _rename_folder(staging: Path, target: Path, aside: Path) -> None:
    """Move ``staging`` to ``target``; what was there is put aside first, so that one of them is always whole."""
    if _holds_something(target):
        os.rename(target, aside)
    try:
        os.replace(staging, target)
    except OSError as error:
        if aside.exists():
            try:
                os.rename(aside, target)
            except OSError:
                raise UserError(
                    f"{target} was made by something else while it was being replaced; what stood there is {aside}, "
                    f"what was to take its place {staging}"
                ) from error
        raise
    fsync_dir(target.parent)


def sweep(folder: Path, target: Path | None = None) -> None:
    """Remove the temporary files and folders that killed runs left in a folder (those of one ``target``, or all); what
    is being written stays. What was put aside when its run was killed gets its name back.
    """
    import shutil

    named = _TEMPORARY if target is None else re.compile(re.escape(_prefix(target)) + _ENDING, re.DOTALL)
    with suppress(OSError):  # what can not be listed or removed stays
        for entry in list(folder.iterdir()):
            if not named.fullmatch(entry.name) or entry.is_symlink():
                continue
            if (target is not None and not (entry / MARK).is_file()) or not is_abandoned(entry):  # a user's, or in use
                continue
            if not entry.is_dir():
                entry.unlink(missing_ok=True)
            elif _put_back(entry, folder):
                shutil.rmtree(entry, ignore_errors=True)


def _put_back(room: Path, folder: Path) -> bool:
    """Give what was put aside in a temporary folder its name back, where its run was killed before anything else got
    it; False where something else has it now.
    """
    if _holds_something(room / _NEW) and _holds_something(room / _OLD):
        try:
            for old in (room / _OLD).iterdir():
                os.rename(old, folder / old.name)
        except OSError:
            return False
    return True


def around_temporary(path: Path) -> Path:
    """The folder that a user knows: the one that the outermost temporary folder of a path is in; else the path's."""
    inner = [each for each in (path, *path.parents) if _TEMPORARY.fullmatch(each.name)]
    return inner[-1].parent if inner else path.parent


def _holds_something(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _behind_link(target: Path) -> Path:
    """What a link leads to, there or not: the link stays, and what it leads to is replaced."""
    return Path(os.path.realpath(target)) if target.is_symlink() else target


def _prefix(target: Path) -> str:
    """How the name of a temporary sibling begins: never so long that it alone is too long a name."""
    return f".{target.name.encode(errors='surrogateescape')[:100].decode(errors='ignore')}."


_FULL = (errno.ENOSPC, errno.EDQUOT)


_NO_ROOM = 1_000_000
"""Bytes with which a disk is full for a network's file."""


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk, or a user's share of it, is full."""
    return getattr(error, "errno", None) in _FULL or "No space left" in str(error)


@contextmanager
def refusing_full(target: Path) -> Iterator[None]:
    """What is raised in here because the disk of ``target`` is full becomes one line, whichever library raises it. Some
    do not say why they can not write: the disk does.

    Raises:
        UserError: the disk is full.
    """
    import shutil

    try:
        yield
    except Exception as error:
        mute = isinstance(error, RuntimeError) and shutil.disk_usage(target.parent).free < _NO_ROOM
        if isinstance(error, UserError) or not (is_full(error) or mute):
            raise
        raise UserError(
            f"no space left on the disk of {target.parent} while writing {target.name}; free some and run again"
        ) from error


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
    target = _behind_link(Path(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f"{_prefix(target)}{os.urandom(4).hex()}.tmp"
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # as the user's mask has it
    lock = OutputLock()  # tells other runs that it is no litter
    try:
        lock.take(temporary)
        with refusing_full(target):
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
            fsync_dir(target.parent)
    finally:
        lock.release()
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
    if not os.path.lexists(folder):
        return  # so nothing is deleted, and the inputs need not be gone through
    tops = {Path(os.path.abspath(folder)), Path(os.path.realpath(folder))}
    for name, value in inputs:
        if not isinstance(value, str | os.PathLike) or not os.path.lexists(value):
            continue
        places = (Path(os.path.abspath(value)), Path(os.path.realpath(value)))
        if any(place.is_relative_to(top) for place in places for top in tops):
            raise UserError(
                f"output {folder} holds {name} {os.fspath(value)}, which --overwrite would delete; use another name"
            )


def places_of(paths: Sequence[str]) -> Iterator[str]:
    """What to look at instead of all of many files, to see whether one lies in a folder: the folders that they are in,
    and those that links among them lead to, each once. Links are told by a folder's listing: a question for each file
    would take minutes on a disk that is far away.
    """
    links, known = dict[str, set[str]](), set[str]()
    waiting = list(paths)
    while waiting:
        linked: list[str] = []
        for path in waiting:
            folder, name = os.path.split(path)
            folder = folder or os.curdir
            if folder not in links:
                links[folder] = _links_in(folder)
                yield folder
            if name in links[folder] and path not in known:
                known.add(path)
                with suppress(OSError):  # gone meanwhile
                    linked.append(os.path.join(folder, os.readlink(path)))
        waiting = linked


def _links_in(folder: str) -> set[str]:
    """Names of the links in a folder; none where it can not be listed."""
    with suppress(OSError), os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_symlink()}
    return set()


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
        check_above(folder, "output folder")
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
    check_above(_behind_link(file), "output")


def check_new_file(path: str | os.PathLike[str], *, overwrite: bool, what: str = "output") -> None:
    """Refuse to replace a file in silence.

    Raises:
        UserError: it is there, and ``overwrite`` was not asked for.
    """
    if not overwrite and Path(path).is_file():
        raise UserError(f"{what} {path} exists; use --overwrite or another name")


def check_above(path: Path, what: str) -> None:
    """See that a path can be made, and touch nothing; ``what`` it is, for the message.

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
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    resume: bool = False,
    need_bytes: int = 0,
    inputs: Iterable[tuple[str, object]] = (),
) -> Path:
    """Make the output folder of a command, or empty it; ``inputs`` as for ``check_output_dir``.

    Raises:
        UserError: it exists with something in it and neither ``overwrite`` nor ``resume`` was asked for, or what is in
            it is no run of ours, or holds an input; its disk has less than ``need_bytes`` free; or it can not be
            written.
    """
    import shutil

    folder = check_output_dir(path, overwrite=overwrite, resume=resume, inputs=inputs)
    try:
        old = [] if resume or not folder.is_dir() else [each for each in folder.iterdir() if each.name != MARK]
        made = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            _need_space(folder, old, need_bytes)
        except UserError:
            for each in made:
                each.rmdir()
            raise
        with suppress(OSError):  # a full disk is told below
            mark_as_ours(folder)  # before, so that a folder that was emptied by half is still ours
        for entry in old:
            # The folder itself stays: a lock stands on it, and it may be a link.
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        mark_as_ours(folder)
        sweep(folder)
    except OSError as error:
        raise UserError(f"output folder {folder} can not be written: {error.strerror}; name another") from error
    return folder


def mark_as_ours(folder: Path) -> None:
    """Let a folder say that it may be replaced."""
    if not (folder / MARK).exists():
        (folder / MARK).write_text("Made by convscale; --overwrite may replace this folder.\n", encoding="utf-8")


def _need_space(folder: Path, old: Iterable[Path], need_bytes: int) -> None:
    """
    Raises:
        UserError: the folder's disk has less than ``need_bytes`` free, even without ``old``, which is to be deleted.
    """
    import shutil

    free = shutil.disk_usage(folder).free
    if free < need_bytes and free + sum(map(_taken, old)) < need_bytes:
        raise UserError(
            f"the disk of {folder} has {free / 1e6:.0f} MB free, {need_bytes / 1e6:.0f} MB are needed; free some or "
            "name another folder"
        )


def _taken(path: Path) -> int:
    """Bytes that go free with a file or folder."""
    if path.is_dir() and not path.is_symlink():
        return sum(map(_taken, path.iterdir()))
    about = path.lstat()
    return about.st_size if about.st_nlink == 1 else 0
