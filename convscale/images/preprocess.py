"""What stands between a decoded picture and the network's input: resize, centre crop, normalise.

One value describes it and travels with checkpoints and artefacts. Resizing is Pillow's arithmetic, for arrays and
tensors alike, in training and in what was shipped; only normalising tensors needs torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from convscale.conditions import Size, as_size, sides
from convscale.errors import UserError, check_number, nearest, short

if TYPE_CHECKING:
    import torch

MOST_SIDE = 16_384
"""Pixels of a side of what a network takes; a spec may say as many."""
LEAST_CROP = 0.01
"""Of the resized picture's side; what it is resized to grows with its inverse."""
INTERPOLATIONS = ("bilinear", "bicubic", "nearest")
CROP_MODES = ("center", "squash")
_ELONGATED = 32
"""Times that a resized picture's longer side may be its shorter one before the crop is cut out first."""
_CACHE_VALUES = 150_000
"""Values that are normalised at a time on a CPU: as many as stay in a core's cache."""

Image = TypeVar("Image", np.ndarray, "torch.Tensor")


def _factor_and_shift(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """float32 (channels,): ``pixels * factor + shift`` is ``(pixels / 255 - mean) / std``."""
    wide_mean, wide_std = np.array(mean, np.float64), np.array(std, np.float64)
    return (1 / (255 * wide_std)).astype(np.float32), (-wide_mean / wide_std).astype(np.float32)


def _nearest(step: float, first: int, count: int) -> np.ndarray:
    """Which of the source's rows (or columns) Pillow takes for ``count`` ones from ``first`` on; it adds up steps."""
    places = np.full(first + count, step)
    places[0] /= 2
    return np.cumsum(places, out=places)[first:].astype(np.int64)


@lru_cache(maxsize=16)
def _as_long_as_a_row(
    mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for a row of pixels, channels last: several times faster on a CPU than constants that are broadcast over
    the innermost dimension.
    """
    import torch

    factor, shift = _factor_and_shift(mean, std)
    return torch.from_numpy(factor).to(device).repeat(width), torch.from_numpy(shift).to(device).repeat(width)


@lru_cache(maxsize=16)
def _value_table(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """float32 (channels, 256): what each pixel value becomes, rounded once, as in torch's fused multiply-add."""
    factor, shift = (part.astype(np.float64) for part in _factor_and_shift(mean, std))
    return (np.arange(256.0) * factor[:, None] + shift[:, None]).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a decoded image becomes a network's input.

    Raises:
        UserError: a field has an impossible value; the message names the field and the value.
    """

    image_size: Size
    """What the network sees, in pixels: the side of a square, or (height, width)."""
    channels: int = 3
    """3 for RGB, 1 for gray."""
    mean: tuple[float, ...]
    """Per channel, subtracted from pixels scaled to [0, 1]."""
    std: tuple[float, ...]
    """Per channel, dividing what the mean was subtracted from."""
    crop_pct: float = 0.875
    """The crop's sides as a share of the resized image's."""
    interpolation: str = "bilinear"
    """``bilinear``, ``bicubic`` (both antialiased) or ``nearest``."""
    crop_mode: str = "center"
    """``center``: a picture keeps its shape, and what juts out is cut off; ``squash``: it takes the crop's shape, so
    that with a crop_pct of 1 all of it is seen (timm's crop modes)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", as_size(*sides(self.image_size)))
        if self.channels not in (1, 3):
            raise UserError(f"channels must be 1 (gray) or 3 (RGB), got {self.channels!r}")
        if max(sides(self.image_size)) > MOST_SIDE:
            raise UserError(f"image_size is {short(self.image_size)}; it must be at most {MOST_SIDE:,} pixels a side")
        for field in ("mean", "std"):
            try:
                values = tuple(float(value) for value in getattr(self, field))
            except (TypeError, ValueError, OverflowError):
                raise UserError(f"{field} is {short(getattr(self, field))}; it must be numbers") from None
            object.__setattr__(self, field, values)
            if len(values) != self.channels:
                raise UserError(f"{field} must have one value per channel ({self.channels}), got {values}")
            if not all(np.isfinite(values)):
                raise UserError(f"{field} must be finite, got {values}")
        if min(self.std) <= 0:
            raise UserError(f"std must be positive, got {self.std}")
        if not LEAST_CROP <= check_number("crop_pct", self.crop_pct, f"a share from {LEAST_CROP} to 1") <= 1:
            raise UserError(f"crop_pct must lie in [{LEAST_CROP}, 1], got {self.crop_pct!r}")
        if not isinstance(self.interpolation, str) or self.interpolation not in INTERPOLATIONS:
            raise UserError(
                f"interpolation {self.interpolation!r} is unknown{nearest(str(self.interpolation), INTERPOLATIONS)}"
            )
        if not isinstance(self.crop_mode, str) or self.crop_mode not in CROP_MODES:
            raise UserError(f"crop_mode {self.crop_mode!r} is unknown{nearest(str(self.crop_mode), CROP_MODES)}")

    @property
    def height(self) -> int:
        """Rows of what the network sees, in pixels."""
        return sides(self.image_size)[0]

    @property
    def width(self) -> int:
        """Columns of what the network sees, in pixels."""
        return sides(self.image_size)[1]

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) that an image of ``height`` x ``width`` is resized to before the crop.

        timm's rule (``transforms_imagenet_eval``), so that released weights see the pixels that their accuracy was
        published for. The crop's sides over ``crop_pct`` round down. In crop mode ``squash`` the image takes these. In
        ``center``, for a square crop, the image's shorter side becomes that and the longer one follows, cut to whole
        pixels (torchvision's ``Resize``); for another shape the image just covers it, sides rounded to nearest.
        """
        target = [math.floor(side / self.crop_pct) for side in (self.height, self.width)]
        if self.crop_mode == "squash":
            return target[0], target[1]
        if target[0] == target[1]:
            shorter, longer = min(height, width), int(target[0] * max(height, width) / min(height, width))
            if shorter == target[0]:
                return height, width
            return (target[0], longer) if height <= width else (longer, target[0])
        ratio = min(height / target[0], width / target[1])
        return round(height / ratio), round(width / ratio)

    def resize(self, image: Image) -> Image:
        """Resize the image to ``resized(height, width)``, then cut the crop out of its centre.

        Args:
            image: uint8, (height, width, channels) or (height, width); gray becomes RGB by repeating, RGB becomes gray
                by its luma (ITU-R 601).

        Returns:
            uint8, (height, width, channels) of the crop; a NumPy array for a NumPy array, else a tensor.
        """
        from PIL import Image as pil

        if not isinstance(image, np.ndarray):
            import torch

            return torch.from_numpy(self.resize(self._checked(image, torch.uint8).numpy()))
        pixels = self._to_channels(self._checked(image, np.dtype(np.uint8)))
        size = self.resized(*pixels.shape[:2])
        if max(size) > _ELONGATED * min(size):
            return self._crop_of_elongated(pixels, size)
        if size != pixels.shape[:2]:
            picture = pil.fromarray(pixels if self.channels == 3 else pixels[:, :, 0])
            pixels = np.asarray(picture.resize((size[1], size[0]), pil.Resampling[self.interpolation.upper()]))
        top, left = (round((had - kept) / 2) for had, kept in zip(size, (self.height, self.width), strict=True))
        crop = pixels[top : top + self.height, left : left + self.width]
        return np.array(crop).reshape(self.height, self.width, self.channels)

    def _crop_of_elongated(self, pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """The crop of a picture that is many times as long as it is wide, without the rest of what it is resized to: 1
        x 65,000 pixels would become 256 x 16.6 million. Only the strip below the crop is resized; the kernel still sees
        what lies beside it.
        """
        from PIL import Image as pil

        crop = (self.height, self.width)
        firsts = [round((had - kept) / 2) for had, kept in zip(size, crop, strict=True)]
        if any(had < kept for had, kept in zip(size, crop, strict=True)):
            raise UserError(f"an image of {pixels.shape[:2]} can not be cropped to {crop}")
        steps = [had / new for had, new in zip(pixels.shape[:2], size, strict=True)]
        if self.interpolation == "nearest":
            rows, columns = (_nearest(*each) for each in zip(steps, firsts, crop, strict=True))
            return np.ascontiguousarray(pixels[rows][:, columns])
        top, left = (first * step for first, step in zip(firsts, steps, strict=True))
        bottom, right = ((first + kept) * step for first, kept, step in zip(firsts, crop, steps, strict=True))
        # whole source rows and columns around the strip, as far as the widest kernel (bicubic) reaches
        spare = [math.ceil(2 * max(step, 1)) + 2 for step in steps]
        low = [max(0, math.floor(at) - more) for at, more in zip((top, left), spare, strict=True)]
        high = [
            min(side, math.ceil(at) + more)
            for at, more, side in zip((bottom, right), spare, pixels.shape[:2], strict=True)
        ]
        strip = np.ascontiguousarray(pixels[low[0] : high[0], low[1] : high[1]])
        picture = pil.fromarray(strip if self.channels == 3 else strip[:, :, 0])
        most = (high[0] - low[0], high[1] - low[1])
        box = (left - low[1], top - low[0], min(right - low[1], most[1]), min(bottom - low[0], most[0]))
        made = picture.resize((crop[1], crop[0]), pil.Resampling[self.interpolation.upper()], box=box)
        return np.array(made).reshape(self.height, self.width, self.channels)

    def normalize(self, batch: torch.Tensor) -> torch.Tensor:
        """``(pixels / 255 - mean) / std`` per channel, as one multiplication and addition.

        Args:
            batch: uint8, (N, H, W, channels) or (N, channels, H, W); where both readings are possible it is the former.

        Returns:
            float32, (N, channels, H, W), on the batch's device; channels-last in memory when the batch was (N, H, W,
            channels).
        """
        import torch

        if batch.dtype != torch.uint8 or batch.ndim != 4:
            raise UserError(
                f"a batch of images must be uint8 with 4 dimensions, got {batch.dtype} {tuple(batch.shape)}"
            )
        if batch.shape[3] == self.channels:
            count, height, width, channels = batch.shape
            rows = batch.reshape(count, height, width * channels)
            factor, shift = _as_long_as_a_row(self.mean, self.std, width, batch.device)
            out = torch.empty(rows.shape, device=batch.device)
            step = (
                max(1, _CACHE_VALUES // max(1, height * width * channels))
                if batch.device.type == "cpu"
                else max(1, count)
            )
            for source, target in zip(rows.split(step), out.split(step), strict=True):
                torch.addcmul(shift, target.copy_(source), factor, out=target)
            return out.view(count, height, width, channels).permute(0, 3, 1, 2)
        if batch.shape[1] != self.channels:
            raise UserError(
                f"a batch of images must have {self.channels} channels in its last or second dimension, got "
                f"{tuple(batch.shape)}"
            )
        factor, shift = (torch.from_numpy(part).to(batch.device) for part in _factor_and_shift(self.mean, self.std))
        return torch.addcmul(shift.view(1, -1, 1, 1), batch.float(), factor.view(1, -1, 1, 1))

    def normalize_array(self, images: np.ndarray) -> np.ndarray:
        """``normalize`` for NumPy arrays, without torch: the same values.

        Args:
            images: uint8, (N, H, W, channels).

        Returns:
            float32, (N, channels, H, W), contiguous.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != self.channels:
            raise UserError(
                f"a batch of images must be uint8 (N, height, width, {self.channels}), got {images.dtype} "
                f"{images.shape}"
            )
        table = _value_table(self.mean, self.std)
        out = np.empty((images.shape[0], images.shape[3], *images.shape[1:3]), np.float32)
        for index, row in enumerate(images):
            for channel in range(self.channels):
                np.take(table[channel], row[..., channel], out=out[index, channel], mode="clip")
        return out

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values; ``from_dict`` is the inverse. A crop mode other than ``center`` is said, so that
        versions that know no other refuse it.
        """
        values = dataclasses.asdict(self)
        if self.crop_mode == "center":
            del values["crop_mode"]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """From what ``to_dict`` gave.

        Raises:
            UserError: a key is unknown or missing, or a value impossible.
        """
        if not isinstance(values, Mapping):
            raise UserError(f"preprocessing is {short(values)}; it must be an object")
        fields = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - fields):
            raise UserError(f"preprocessing has an unknown key {unknown[0]!r}{nearest(unknown[0], fields)}")
        if missing := sorted({"image_size", "mean", "std"} - set(values)):
            raise UserError(f"preprocessing lacks {', '.join(missing)}")
        return cls(**values)

    @staticmethod
    def _checked(image: Image, kind: object) -> Image:
        """The image, if it is one."""
        if image.dtype != kind or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3))):
            raise UserError(f"an image must be uint8 (height, width, 1 or 3), got {image.dtype} {tuple(image.shape)}")
        return image

    def _to_channels(self, image: np.ndarray) -> np.ndarray:
        """(H, W) or (H, W, 1 | 3) -> (H, W, channels)."""
        image = image[:, :, None] if image.ndim == 2 else image
        if image.shape[2] == self.channels:
            return np.ascontiguousarray(image)
        if self.channels == 3:
            return np.repeat(image, 3, axis=2)
        from PIL import Image as pil

        return np.asarray(pil.fromarray(np.ascontiguousarray(image)).convert("L"))[:, :, None]
