"""Smaller copies of large pictures, made once and kept: scaled decoding that is paid for in the first run only.

A decoder has to read all of a JPEG's entropy-coded bits whatever the size it decodes to; a smaller file has fewer of
them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from functools import partial
from pathlib import Path

from convscale.cache import cache_dir
from convscale.errors import UserError
from convscale.files import atomic_path
from convscale.images.decode import ImageError, check_image, preload, read_image
from convscale.images.splits import FileSplit
from convscale.images.threads import in_threads
from convscale.machine import available_cores

QUALITY = 90
"""Of the copies, as JPEG."""
_LONGEST = 65_500
"""Pixels that a side of a JPEG may have at most, as libjpeg writes it."""


def shrink_split(
    split: FileSplit, side: int, *, folder: Path | None = None, workers: int | None = None
) -> tuple[FileSplit, str]:
    """The split with copies in the place of files that are larger.

    Args:
        split: pictures as files.
        side: shorter side of the copies in pixels; what is not larger stays as it is, and what can not be decoded too
            (the loader tells of it).
        folder: where copies are kept; None: ``shrunk`` in the user's cache folder. A copy belongs to a file's path,
            size and time of change.
        workers: threads; None: one per core.

    Returns:
        The split, and a line that says how many copies there are and what they take.

    Raises:
        UserError: the folder can not be written, or its disk is full.
    """
    place = folder or cache_dir() / "shrunk"
    try:
        place.mkdir(parents=True, exist_ok=True)
        preload()
        copy = partial(_copy_of, split=split, side=side, place=place)
        paths = tuple(in_threads(copy, split.paths, workers=workers or available_cores(), chunk=16))
    except OSError as error:
        raise UserError(
            f"smaller copies can not be written to {place} ({error.strerror}); name another place by CONVSCALE_CACHE"
        ) from error
    copies = [(new, old) for new, old in zip(paths, split.paths, strict=True) if new != old]
    before, after = sum(os.path.getsize(old) for _, old in copies), sum(os.path.getsize(new) for new, _ in copies)
    text = f"{len(copies):,} of {len(paths):,} {split.split} images are read from copies of {side} px"
    return dataclasses.replace(
        split, paths=paths
    ), f"{text} in {place} ({after / 1e6:,.0f} MB for {before / 1e6:,.0f} MB)"


def _copy_of(path: str, split: FileSplit, side: int, place: Path) -> str:
    """The path of a file's copy, which is made when it is missing; the file itself where it is small or
    unreadable, or a copy would be too long for a JPEG.
    """
    from PIL import Image

    try:
        header = check_image(path, max_pixels=split.max_pixels)
        if min(header.width, header.height) <= side:
            return path
        state = os.stat(path)
        key = f"{os.path.abspath(path)}|{state.st_size}|{state.st_mtime_ns}|{side}|{split.channels}|{QUALITY}"
        copy = place / f"{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()[:40]}.jpg"
        if copy.exists():
            return str(copy)
        pixels = read_image(path, channels=split.channels, max_pixels=split.max_pixels, min_side=side)
    except ImageError:
        return path
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    size = (side * width // shorter, side * height // shorter)
    if max(size) > _LONGEST:
        return path
    image = Image.fromarray(pixels[:, :, 0] if split.channels == 1 else pixels)
    small = image.resize(size, Image.Resampling.BILINEAR)
    with atomic_path(copy) as temporary:
        small.save(temporary, "JPEG", quality=QUALITY)
    return str(copy)
