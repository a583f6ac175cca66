"""The pictures below a folder: one walker for training, checking and classifying, and a count of what it leaves out.

Links are followed, and no folder is entered twice. Only regular files are pictures: a pipe, a socket or a device is
never opened. Hidden and system files are left out by one rule.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from convscale.errors import stop_if_system
from convscale.images.decode import EXTENSIONS
from convscale.images.formats import unread_format

HIDDEN = "hidden or system files"
NO_EXTENSION = "files without an image's extension"
NO_FILE = "pipes, sockets or devices"
BROKEN_LINK = "links that lead nowhere"
SEEN = "folders that a link reaches again"
CLOSED = "folders that may not be listed"
LOOSE = "images beside the class folders"
NO_SPLIT = "folders beside the splits that are none"
REPEATED = "rows that repeat another"
"""Why something is left out; the words of the report."""

_SYSTEM_NAMES = frozenset(
    ("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "$recycle.bin", "system volume information", "lost+found")
)

Folder = tuple[int, int]
"""A folder's device and inode."""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """What was left out for one reason."""

    reason: str
    """In the plural: ``hidden or system files``."""
    count: int
    """How many."""
    example: str
    """The first one's path."""
    detail: str = ""
    """The commonest extensions, where the reason is one."""

    def describe(self) -> str:
        """One line."""
        detail = f"{self.detail}; " if self.detail else ""
        return f"left out: {self.reason}: {self.count:,} ({detail}first: {self.example})"


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What was found and not used, by reason."""

    left_out: tuple[LeftOut, ...] = ()
    """In the order in which the reasons were met."""

    @property
    def total(self) -> int:
        """All that was left out."""
        return sum(each.count for each in self.left_out)

    def count(self, reason: str) -> int:
        """How many were left out for one reason."""
        return sum(each.count for each in self.left_out if each.reason == reason)

    def since(self, before: Preflight) -> Preflight:
        """What came to an earlier report."""
        more = (replace(each, count=each.count - before.count(each.reason)) for each in self.left_out)
        return Preflight(left_out=tuple(each for each in more if each.count))

    def notes(self) -> tuple[str, ...]:
        """A line for each reason."""
        return tuple(each.describe() for each in self.left_out)


NOTHING = Preflight()
"""Nothing was left out."""


class Tally:
    """Counts what is left out while folders are walked."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        self._suffixes: Counter[str] = Counter()

    def add(self, reason: str, path: str) -> None:
        """One more; the first path of each reason is kept."""
        self._counts[reason] += 1
        self._examples.setdefault(reason, path)
        if reason == NO_EXTENSION:
            self._suffixes[os.path.splitext(path)[1].lower() or "no extension"] += 1

    def report(self) -> Preflight:
        """What was counted so far."""
        suffixes = ", ".join(f"{count} {suffix}" for suffix, count in self._suffixes.most_common(3))
        return Preflight(
            left_out=tuple(
                LeftOut(
                    reason=reason,
                    count=count,
                    example=self._examples[reason],
                    detail=suffixes if reason == NO_EXTENSION else "",
                )
                for reason, count in self._counts.items()
            )
        )


@dataclass(frozen=True, kw_only=True)
class Listed:
    """What stands in one folder, in the order of names; what is neither picture nor folder is counted already."""

    folders: tuple[str, ...]
    """Names of folders and of links to folders."""
    pictures: tuple[str, ...]
    """Names of regular files with an image's extension."""


def is_hidden(name: str) -> bool:
    """Whether a file or folder is for the system or its owner's eyes: its name begins with a point, as ``.DS_Store``
    and ``._x.jpg`` do, or is one of a few, such as ``Thumbs.db`` and ``__MACOSX``.
    """
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def list_folder(folder: str, tally: Tally) -> Listed:
    """One folder's entries; nothing is opened.

    Raises:
        UserError: the system is at the end of its means, or the disk fails.
    """
    folders, pictures = list[str](), list[str]()
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:  # it may not be listed, or went away meanwhile
        stop_if_system(error, folder)
        tally.add(CLOSED, folder)
        return Listed(folders=(), pictures=())
    for entry in entries:
        if is_hidden(entry.name):
            tally.add(HIDDEN, entry.path)
        elif _is(entry, folder=True):
            folders.append(entry.name)
        elif (reason := _reason_against(entry)) is not None:
            tally.add(reason, entry.path)
        else:
            pictures.append(entry.name)
    return Listed(folders=tuple(folders), pictures=tuple(pictures))


def _is(entry: os.DirEntry[str], *, folder: bool) -> bool:
    """Whether an entry, or what it links to, is a folder, or else a regular file."""
    try:
        return entry.is_dir() if folder else entry.is_file()
    except OSError as error:  # links in a circle, among others
        stop_if_system(error, entry.path)
        return False


def _reason_against(entry: os.DirEntry[str]) -> str | None:
    """Why what is no folder is no picture; None where it is one."""
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix not in EXTENSIONS:
        return NO_EXTENSION
    if not _is(entry, folder=False):
        return BROKEN_LINK if entry.is_symlink() and not os.path.exists(entry.path) else NO_FILE
    lacking = unread_format(suffix)
    return None if lacking is None else f"{lacking} files, which no installed library reads"


def identity(folder: str) -> Folder | None:
    """What a folder is known by, whatever its path; None where it is gone."""
    try:
        state = os.stat(folder)
    except OSError as error:
        stop_if_system(error, folder)
        return None
    return state.st_dev, state.st_ino


def pictures_below(
    folder: str, tally: Tally | None = None, *, seen: Iterable[Folder] = (), files_first: bool = False
) -> Iterator[str]:
    """Paths of pictures below a folder, at any depth, in the order of their names; only the names of the folders on the
    way down are in memory.

    Args:
        folder: where to begin.
        tally: counts what is left out.
        seen: folders that are not entered, beside those that were: other classes', for example.
        files_first: a folder's own pictures before those of folders in it, as data sets are read; else in one order
            of names, as lists for ``classify`` are.

    Raises:
        UserError: the system is at the end of its means, or the disk fails.
    """
    tally = Tally() if tally is None else tally
    entered = set(seen)
    begin = identity(folder)
    if begin is not None:
        entered.add(begin)
    waiting = [_steps(folder, list_folder(folder, tally), files_first)]
    while waiting:
        step = next(waiting[-1], None)
        if step is None:
            waiting.pop()
            continue
        path, is_folder = step
        if not is_folder:
            yield path
            continue
        which = identity(path)
        if which is None:
            tally.add(CLOSED, path)
        elif which in entered:
            tally.add(SEEN, path)
        else:
            entered.add(which)
            waiting.append(_steps(path, list_folder(path, tally), files_first))


def _steps(folder: str, listed: Listed, files_first: bool) -> Iterator[tuple[str, bool]]:
    """(path, whether it is a folder) of a folder's entries in the order in which they are gone through."""
    entries = [(name, False) for name in listed.pictures] + [(name, True) for name in listed.folders]
    if not files_first:
        entries.sort()
    return ((os.path.join(folder, name), is_folder) for name, is_folder in entries)
