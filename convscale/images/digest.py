"""What a data set is, in a few letters: two runs with the same digest saw the same images under the same labels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
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


def data_digest(splits: Iterable[Labelled]) -> str:
    """Sixteen hex digits of the splits' classes, and of each image's name (with its folder's) and label, in order.

    The pixels are not read: a file that was changed under its name is not noticed.
    """
    found = hashlib.sha256()
    for split in splits:
        found.update(repr((split.split, len(split), split.classes)).encode("utf-8", "surrogateescape"))
        found.update(split.label_bytes())
        for index in range(len(split)):
            name = "/".join(PurePath(split.name(index)).parts[-2:])
            found.update(f"{name}\n".encode("utf-8", "surrogateescape"))
    return found.hexdigest()[:16]
