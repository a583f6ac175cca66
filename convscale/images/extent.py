"""How large pictures are, by their headers, without decoding."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from convscale.images.decode import ImageError, check_image
from convscale.images.duplicates import evenly
from convscale.images.splits import FileSplit, Split
from convscale.images.threads import in_threads

LOOKED_AT = 64
"""Files whose headers tell how large those of a set are."""
LEAST_SIDE = 28
"""Files of smaller pictures are enlarged to this side."""
_known: WeakKeyDictionary[FileSplit, int | None] = WeakKeyDictionary()


def upright_size(path: str, max_pixels: int) -> tuple[int, int] | None:
    """Height and width as the picture is shown; None where it has none that can be read."""
    try:
        header = check_image(path, max_pixels=max_pixels)
    except ImageError:
        return None
    turned = header.orientation >= 5  # by a quarter, and mirrored or not
    return (header.width, header.height) if turned else (header.height, header.width)


def largest_side(split: Split) -> int | None:
    """The longest side of a set's pictures in pixels: of those in memory, else of ``LOOKED_AT`` files, evenly taken,
    whose headers are read once; None where none can be read.
    """
    if (images := split.images) is not None:
        return int(max(images.shape[1:3]))
    if not isinstance(split, FileSplit):
        return None
    if split not in _known:
        chosen = evenly(len(split), LOOKED_AT).tolist()
        sizes = in_threads(lambda index: upright_size(split.paths[index], split.max_pixels), chosen, chunk=8)
        _known[split] = max((max(size) for size in sizes if size is not None), default=None)
    return _known[split]


def small_side(split: Split, most: int) -> int | None:
    """The side in pixels that networks for small pictures, of up to ``most`` px, are built for: their own. Files are
    resized anyway, so theirs is a multiple of 4, which every family takes. None where pictures are larger, or none can
    be read.
    """
    side = largest_side(split)
    if side is None or side > most:
        return None
    return side if split.images is not None else max(LEAST_SIDE, -(-side // 4) * 4)
