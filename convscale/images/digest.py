"""What a data set is, in a few letters: two runs with the same digest saw the same images under the same labels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Protocol


class Labelled(Protocol):
    """Images with labels, or with boxes."""

    @property
    def split(self) -> str:
        """``train``, ``validation`` or ``test``."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What an image is called."""
        ...

    def label_bytes(self) -> bytes:
        """All labels."""
        ...


class Carved(Protocol):
    """Splits of which some may have been carved from the train set."""

    @property
    def train(self) -> Labelled:
        """To learn from."""
        ...

    @property
    def validation(self) -> Labelled:
        """Watched while training."""
        ...

    @property
    def carved(self) -> tuple[str, ...]:
        """``validation`` and ``test`` where they were carved."""
        ...

    def digests(self, *, older: bool = False) -> dict[str, object]:
        """Of each split by its name, and which were ``carved``."""
        ...


def data_digest(splits: Iterable[Labelled], *, older: bool = False) -> str:
    """Sixteen hex digits of the splits' classes, and of each image's name (with its folder's) and label, in order.

    The pixels are not read: a file that was changed under its name is not noticed.

    Args:
        splits: in order.
        older: as earlier versions had it of images that lie directly beside their manifest where that was named from
            within its folder: without the folder's name. Any other digest is the same.
    """
    splits = tuple(splits)
    beside = _common_folder(splits) if older else None
    found = hashlib.sha256()
    for split in splits:
        found.update(repr((split.split, len(split), split.classes)).encode("utf-8", "surrogateescape"))
        found.update(split.label_bytes())
        for index in range(len(split)):
            name = split.name(index)
            name = _short(name, beside) if _has_files(split) else "/".join(PurePath(name).parts[-2:])
            found.update(f"{name}\n".encode("utf-8", "surrogateescape"))
    return found.hexdigest()[:16]


def is_digest_of(digest: object, splits: Sequence[Labelled]) -> bool:
    """Whether a digest that was written down is that of these splits, as it is now or as earlier versions had it."""
    return digest == data_digest(splits) or digest == data_digest(splits, older=True)


def same_digests(kept: Mapping[str, object], splits: Carved, names: Sequence[str]) -> bool:
    """Whether the named ones of these splits are those of which ``digests`` were written down."""
    now = splits.digests()
    others = [name for name in names if now[name] != kept.get(name)]
    older = splits.digests(older=True) if others else {}
    return all(older[name] == kept.get(name) for name in others)


def _has_files(split: Labelled) -> bool:
    """Whether its names are paths, which depend on where they are seen from."""
    return hasattr(split, "paths")


def _short(path: str, beside: str | None) -> str:
    """A file's name with its folder's, wherever it is named from; without, where the folder is ``beside``."""
    parts = PurePath(path).parts[-2:]
    if beside is not None:
        whole = os.path.abspath(path)
        return os.path.basename(whole) if os.path.dirname(whole) == beside else "/".join(parts)
    return "/".join(parts if len(parts) > 1 else PurePath(os.path.abspath(path)).parts[-2:])


def _common_folder(splits: Sequence[Labelled]) -> str:
    """The folder that all files lie below: that of the manifest where some lie directly beside it."""
    files = (split for split in splits if _has_files(split))
    folders = {os.path.dirname(os.path.abspath(split.name(index))) for split in files for index in range(len(split))}
    return os.path.commonpath(folders) if folders else ""
