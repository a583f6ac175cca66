"""What stands between a decoded picture and the network's input: resize, centre crop, normalise.

One value describes it and travels with checkpoints and artefacts, and this is the only implementation: training,
evaluation and what is shipped can not drift apart.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch

from convscale.errors import UserError, nearest

INTERPOLATIONS = ("bilinear", "bicubic", "nearest")
_CACHE_VALUES = 150_000
"""Values that are normalised at a time on a CPU: as many as stay in a core's cache."""

Image = TypeVar("Image", np.ndarray, torch.Tensor)


def _factor_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 (channels,): ``pixels * factor + shift`` is ``(pixels / 255 - mean) / std``."""
    wide_mean, wide_std = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    return (1 / (255 * wide_std)).float().to(device), (-wide_mean / wide_std).float().to(device)


@lru_cache(maxsize=16)
def _as_long_as_a_row(
    mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for a row of pixels, channels last: several times faster on a CPU than constants that are broadcast over
    the innermost dimension.
    """
    factor, shift = _factor_and_shift(mean, std, device)
    return factor.repeat(width), shift.repeat(width)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a decoded image becomes a network's input.

    Raises:
        UserError: a field has an impossible value; the message names the field and the value.
    """

    image_size: int
    """Side of the square the network sees, in pixels."""
    channels: int = 3
    """3 for RGB, 1 for gray."""
    mean: tuple[float, ...]
    """Per channel, subtracted from pixels scaled to [0, 1]."""
    std: tuple[float, ...]
    """Per channel, dividing what the mean was subtracted from."""
    crop_pct: float = 0.875
    """The crop's side as a share of the resized image's shorter side."""
    interpolation: str = "bilinear"
    """``bilinear``, ``bicubic`` (both antialiased) or ``nearest``."""

    def __post_init__(self) -> None:
        if not isinstance(self.image_size, int) or isinstance(self.image_size, bool) or self.image_size < 1:
            raise UserError(f"image_size must be a whole number of at least 1, got {self.image_size!r}")
        if self.channels not in (1, 3):
            raise UserError(f"channels must be 1 (gray) or 3 (RGB), got {self.channels!r}")
        for field in ("mean", "std"):
            values = tuple(float(value) for value in getattr(self, field))
            object.__setattr__(self, field, values)
            if len(values) != self.channels:
                raise UserError(f"{field} must have one value per channel ({self.channels}), got {values}")
            if not all(np.isfinite(values)):
                raise UserError(f"{field} must be finite, got {values}")
        if min(self.std) <= 0:
            raise UserError(f"std must be positive, got {self.std}")
        if not 0 < self.crop_pct <= 1:
            raise UserError(f"crop_pct must lie in (0, 1], got {self.crop_pct!r}")
        if self.interpolation not in INTERPOLATIONS:
            raise UserError(
                f"interpolation {self.interpolation!r} is unknown{nearest(str(self.interpolation), INTERPOLATIONS)}"
            )

    def resize(self, image: Image) -> Image:
        """Resize the shorter side to ``round(image_size / crop_pct)``, then cut ``image_size`` squared out of the
        centre.

        Args:
            image: uint8, (height, width, channels) or (height, width); gray becomes RGB by repeating, RGB becomes gray
                by its luma (ITU-R 601).

        Returns:
            uint8, (image_size, image_size, channels); a NumPy array for a NumPy array, else a tensor.
        """
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2 import functional as tvf

        as_numpy = isinstance(image, np.ndarray)
        # a copy where NumPy's memory is read-only (Pillow's arrays), which tensors can not express
        pixels: torch.Tensor = (
            torch.from_numpy(np.require(image, requirements=["C", "W"])) if isinstance(image, np.ndarray) else image
        )
        pixels = (
            self._to_channels(pixels).contiguous()[None].permute(0, 3, 1, 2)
        )  # (1, C, H, W), channels-last: torch's fast uint8 path
        shorter = round(self.image_size / self.crop_pct)
        if min(pixels.shape[2:]) != shorter:
            mode = InterpolationMode(self.interpolation)
            pixels = tvf.resize(pixels, [shorter], interpolation=mode, antialias=self.interpolation != "nearest")
        pixels = tvf.center_crop(pixels, [self.image_size, self.image_size])
        pixels = pixels[0].permute(1, 2, 0).contiguous()
        return pixels.numpy() if as_numpy else pixels  # pyright: ignore[reportReturnType]

    def normalize(self, batch: torch.Tensor) -> torch.Tensor:
        """``(pixels / 255 - mean) / std`` per channel, as one multiplication and addition.

        Args:
            batch: uint8, (N, H, W, channels) or (N, channels, H, W); where both readings are possible it is the former.

        Returns:
            float32, (N, channels, H, W), on the batch's device; channels-last in memory when the batch was (N, H, W,
            channels).
        """
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
        factor, shift = _factor_and_shift(self.mean, self.std, batch.device)
        return torch.addcmul(shift.view(1, -1, 1, 1), batch.float(), factor.view(1, -1, 1, 1))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; ``from_dict`` is the inverse."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """From what ``to_dict`` gave.

        Raises:
            UserError: a key is unknown or missing, or a value impossible.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - fields):
            raise UserError(f"preprocessing has an unknown key {unknown[0]!r}{nearest(unknown[0], fields)}")
        if missing := sorted({"image_size", "mean", "std"} - set(values)):
            raise UserError(f"preprocessing lacks {', '.join(missing)}")
        return cls(**values)

    def _to_channels(self, image: torch.Tensor) -> torch.Tensor:
        """(H, W) or (H, W, 1 | 3) -> (H, W, channels)."""
        if image.ndim == 2:
            image = image[:, :, None]
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
            raise UserError(f"an image must be uint8 (height, width, 1 or 3), got {image.dtype} {tuple(image.shape)}")
        if image.shape[2] == self.channels:
            return image
        if self.channels == 3:
            return image.expand(-1, -1, 3).contiguous()
        luma = torch.tensor([0.299, 0.587, 0.114], device=image.device)
        return (image.float() @ luma).round_().to(torch.uint8)[:, :, None]
