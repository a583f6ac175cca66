"""What an artefact says of pictures as people have them: files, bytes, PIL images, arrays, folders."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from convscale.artifact.boxes import Boxes
from convscale.errors import UserError, check_whole
from convscale.images.preprocess import Preprocessing

if TYPE_CHECKING:
    from PIL.Image import Image

    from convscale.images.walk import Tally

Picture: TypeAlias = "str | os.PathLike[str] | bytes | Image | np.ndarray"
"""A file, a file's bytes, a PIL image, or uint8 (H, W, C) pixels."""
NOT_FINITE = "the network's outputs are not finite numbers"
"""What is said of a picture for which they are not."""
TOP = 5
"""Labels of an answer, where nothing else is asked for."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is said of one picture."""

    labels: tuple[str, ...] = ()
    """The likeliest classes, best first; of a network for several labels per image those above their thresholds."""
    probabilities: tuple[float, ...] = ()
    """Theirs."""
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    """Of a detector: where each of the labels is, as x1, y1, x2, y2 in the upright picture's pixels; else empty."""
    error: str = ""
    """Why there is no answer; empty where there is one."""
    name: str = ""
    """The file's path as it was found; empty for a picture in memory."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """How a network's outputs become answers."""

    classes: tuple[str, ...]
    """Names of the outputs."""
    thresholds: Sequence[float] | None
    """For several labels per image: above which probability each counts."""
    top: int | None
    """Labels of an answer at most; None: all of them."""

    def answer(self, row: np.ndarray, name: str) -> Answer:
        """A row of probabilities as an answer."""
        order = np.argsort(-row, kind="stable")
        if self.thresholds is not None:
            order = [i for i in order if row[i] > self.thresholds[i]]
        chosen = [int(i) for i in order[: self.top]]
        return Answer(
            labels=tuple(self.classes[i] for i in chosen), probabilities=tuple(float(row[i]) for i in chosen), name=name
        )


def box_answer(found: Boxes, classes: Sequence[str], top: int | None, name: str) -> Answer:
    """What a detector says of a picture as an answer."""
    most = len(found.labels) if top is None else min(top, len(found.labels))
    return Answer(
        labels=tuple(classes[int(label) - 1] for label in found.labels[:most]),
        probabilities=tuple(float(score) for score in found.scores[:most]),
        boxes=tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in found.boxes[:most]),
        name=name,
    )


def pictures_of(given: Picture | Sequence[Picture]) -> Iterator[tuple[str, Picture]]:
    """(name, picture) of everything that is given: one picture, several, or a folder of files.

    Raises:
        UserError: something that is no picture, or a folder without any.
    """
    if isinstance(given, str | os.PathLike) and Path(given).is_dir():
        from convscale.images.walk import Tally, pictures_below

        tally = Tally()
        found = list(pictures_below(os.fspath(given), tally))
        if not found:
            raise UserError(f"folder {os.fspath(given)} holds no image{_because(tally)}")
        yield from ((path, path) for path in found)
    elif isinstance(given, str | os.PathLike):
        yield os.fspath(given), given
    elif isinstance(given, bytes | bytearray | memoryview) or _is_pil(given):
        yield "", given  # pyright: ignore[reportReturnType]
    elif isinstance(given, np.ndarray):
        yield from _arrays(given)
    elif isinstance(given, Sequence):
        for item in given:
            yield from pictures_of(item)
    else:
        raise UserError(
            f"a picture is {type(given).__name__}; it must be a path, bytes, a PIL image, a uint8 array (H, W, C), or "
            "a list of them"
        )


def _because(tally: Tally) -> str:
    """What was left out, for the message that nothing was left."""
    notes = tally.report().notes()
    return f"; {'; '.join(notes)}" if notes else ""


def _arrays(given: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    if given.dtype != np.uint8 or given.ndim not in (2, 3, 4):
        raise UserError(
            f"a picture is an array of {given.dtype} {given.shape}; it must be uint8 (H, W), (H, W, C) or (N, H, W, C)"
        )
    for one in given if given.ndim == 4 else [given]:
        yield "", one


def _is_pil(value: object) -> bool:
    return hasattr(value, "save") and hasattr(value, "getexif")


def prepared(name: str, picture: Picture, preprocessing: Preprocessing) -> np.ndarray:
    """uint8 (height, width, channels) as the network takes it, by the decoder that training used.

    Raises:
        ImageError: it can not be read.
    """
    return preprocessing.resize(decoded(name, picture, preprocessing.channels))


def decoded(name: str, picture: Picture, channels: int) -> np.ndarray:
    """A picture's pixels, upright, uint8 (H, W, channels).

    A PIL image goes through the same decoder as a lossless file, so that its orientation, palette and transparency are
    treated alike.

    Raises:
        ImageError: it can not be read.
    """
    from convscale.images.decode import decode_image, read_image

    if isinstance(picture, str | os.PathLike):
        return read_image(picture, channels=channels)
    if isinstance(picture, np.ndarray):
        return _with_channels(picture, channels)
    if isinstance(picture, bytes | bytearray | memoryview):
        data: bytes | bytearray = bytes(picture)
    else:
        data = _as_png(picture)
    return decode_image(bytearray(data), name=name or "image", channels=channels)


def _as_png(picture: Image) -> bytes:
    """A PIL image as a PNG file's bytes."""
    file = io.BytesIO()
    if picture.mode not in ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA"):  # what PNG can hold
        exif = picture.getexif()
        picture = picture.convert("RGB")
        picture.save(file, format="PNG", exif=exif)
    else:
        picture.save(file, format="PNG", exif=picture.getexif())
    return file.getvalue()


def _with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """uint8 (H, W, channels): gray is repeated, colour becomes luma as in the decoder."""
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    if pixels.shape[2] == channels:
        return np.ascontiguousarray(pixels)
    if pixels.shape[2] == 1:
        return np.repeat(pixels, channels, axis=2)
    if pixels.shape[2] in (3, 4):
        from PIL import Image as pil

        from convscale.images.decode import decode_image

        return decode_image(bytearray(_as_png(pil.fromarray(pixels))), channels=channels)
    from convscale.images.decode import ImageError

    raise ImageError(f"image: an array of {pixels.shape[2]} channels; it must have 1, 3 or 4")


def checked_top(top: int | None, classes: int) -> int | None:
    """The number of labels of an answer, at most as many as there are classes; None: all.

    Raises:
        UserError: it is no whole number of at least 1.
    """
    return None if top is None else min(check_whole("top", top), classes)


def pixels_or_error(name: str, picture: Picture, channels: int) -> np.ndarray | str:
    """A picture's pixels, or why there are none."""
    from convscale.images.decode import ImageError

    try:
        return decoded(name, picture, channels)
    except ImageError as error:
        return str(error).removeprefix(f"{name}: ")
