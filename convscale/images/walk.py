"""The pictures below a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator

from convscale.images.decode import EXTENSIONS


def pictures_below(folder: str) -> Iterator[str]:
    """Paths of images below a folder in the order of their names, one folder's names in memory at a time."""
    try:
        with os.scandir(folder) as found:
            entries = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in found)
    except OSError:
        return  # a folder that may not be listed, or went away meanwhile
    for name, is_dir in entries:
        path = os.path.join(folder, name)
        if is_dir:
            yield from pictures_below(path)
        elif name.lower().endswith(EXTENSIONS):
            yield path
