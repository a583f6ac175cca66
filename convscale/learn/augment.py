"""Random changes to training images, every one decided by (seed, epoch, sample) alone.

Small images in memory are changed a batch at a time, on uint8; pictures from files one at a time, where they are
decoded.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from convscale.conditions import Size, sides
from convscale.learn.recipe import Recipe

_MASK = (1 << 64) - 1


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers; near inputs give unrelated seeds (SplitMix64's finaliser, Steele et al.
    2014).
    """
    state = 0
    for part in parts:
        state = (state + (part & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def generator_for(*parts: int) -> torch.Generator:
    """A torch generator whose stream is fixed by ``parts``."""
    return torch.Generator().manual_seed(mix_seed(*parts))


def shift_crop(
    images: torch.Tensor, random: torch.Tensor, *, pad: int, flip: float, cutout: int, fill: int = 0
) -> torch.Tensor:
    """Shift, flip and blank a batch of small images.

    Args:
        images: uint8 (N, H, W, C); not written to.
        random: float (N, 5) in [0, 1): vertical and horizontal shift, flip, row and column of the blank square.
        pad: largest shift in pixels; what comes in from outside is 0.
        flip: chance of a horizontal flip.
        cutout: side of the blank square (DeVries and Taylor 2017); its centre lies anywhere, so it may be cut by the
            border; 0: none.
        fill: value of the blank square.

    Returns:
        uint8 (N, H, W, C).
    """
    count, height, width, _ = images.shape
    rows = torch.arange(height).expand(count, -1)  # (N, H): which source row each output row shows
    columns = torch.arange(width).expand(count, -1)
    if pad:
        images = F.pad(images, (0, 0, pad, pad, pad, pad))
        rows = rows + (random[:, 0:1] * (2 * pad + 1)).long()
    if flip:
        columns = torch.where(random[:, 2:3] < flip, columns.flip(1), columns)
    if pad:
        columns = columns + (random[:, 1:2] * (2 * pad + 1)).long()
    out = images[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    if cutout:
        top = (random[:, 3:4] * height).long() - cutout // 2
        left = (random[:, 4:5] * width).long() - cutout // 2
        in_rows = (torch.arange(height) >= top) & (torch.arange(height) < top + cutout)
        in_columns = (torch.arange(width) >= left) & (torch.arange(width) < left + cutout)
        out.masked_fill_((in_rows[:, :, None] & in_columns[:, None, :])[..., None], fill)
    return out


def crop_box(
    height: int, width: int, random: np.random.Generator, *, min_scale: float, aspect: float = 1.0
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop: area uniform in [min_scale, 1], aspect ratio log-uniform in [3/4,
    4/3] (Szegedy et al. 2014) times ``aspect``.

    With the aspect (width over height) of what the crop is resized to, pixels are stretched by at most a third, as for
    a square. Ten tries, then the largest centred box whose ratio is allowed, a pixel at least.
    """
    low, high = math.log(3 / 4), math.log(4 / 3)
    for _ in range(10):
        area = height * width * random.uniform(min_scale, 1.0)
        ratio = math.exp(random.uniform(low, high)) * aspect
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            return (
                int(random.integers(0, height - crop_height + 1)),
                int(random.integers(0, width - crop_width + 1)),
                crop_height,
                crop_width,
            )
    crop_width = min(width, max(1, round(height * 4 / 3 * aspect)))
    crop_height = min(height, max(1, round(width * 4 / 3 / aspect)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def resized_crop(
    image: torch.Tensor, size: Size, random: np.random.Generator, recipe: Recipe, out: torch.Tensor | None = None
) -> torch.Tensor:
    """A random crop resized to ``size``, perhaps flipped, then the recipe's policy and cutout (of mid-gray).

    Args:
        image: uint8 (H, W, C).
        size: of the result in pixels: the side of a square, or (height, width).
        random: this sample's own stream.
        recipe: crop_scale, flip, policy, cutout.
        out: uint8 (H', W', C) of that size, contiguous; takes the result.

    Returns:
        uint8 (H', W', C).
    """
    rows, columns = sides(size)
    box = crop_box(image.shape[0], image.shape[1], random, min_scale=recipe.crop_scale, aspect=columns / rows)
    return resize_box(image, box, size, random, recipe, out)


def resize_box(
    image: torch.Tensor,
    box: tuple[int, int, int, int],
    size: Size,
    random: np.random.Generator,
    recipe: Recipe,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """What ``resized_crop`` does once its box (top, left, height, width) is drawn."""
    top, left, height, width = box
    rows, columns = sides(size)
    # contiguous and channels-last: torch's uint8 resize takes its fast path only then
    pixels = image[top : top + height, left : left + width].contiguous()[None].permute(0, 3, 1, 2)
    if (height, width) != (rows, columns):
        pixels = F.interpolate(pixels, (rows, columns), mode="bilinear", antialias=True)
    if random.random() < recipe.flip:
        pixels = pixels.flip(3)
    if recipe.policy != "none":
        pixels = apply_policy(pixels[0], recipe, int(random.integers(1 << 62)))[None]
    out = torch.empty(rows, columns, image.shape[2], dtype=torch.uint8) if out is None else out
    out.copy_(pixels[0].permute(1, 2, 0))
    if side := round(recipe.cutout * min(rows, columns)):
        top, left = int(random.integers(rows)) - side // 2, int(random.integers(columns)) - side // 2
        out[max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)] = 128
    return out


def apply_policy(pixels: torch.Tensor, recipe: Recipe, seed: int) -> torch.Tensor:
    """RandAugment, AutoAugment or TrivialAugment (torchvision's) on uint8 (C, H, W); the same seed makes the same
    choice.
    """
    from torchvision.transforms import v2

    if recipe.policy == "randaugment":
        policy = v2.RandAugment(num_ops=recipe.policy_ops, magnitude=recipe.policy_magnitude)
    else:
        policy = v2.AutoAugment() if recipe.policy == "autoaugment" else v2.TrivialAugmentWide()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return policy(pixels)


def erase(images: torch.Tensor, seeds: list[int], *, chance: float) -> torch.Tensor:
    """Random erasing (Zhong et al. 2017): a rectangle of 2 to 33 % of the area, aspect 0.3 to 3.3, becomes normal
    noise.

    Args:
        images: float (N, C, H, W), normalised; written to.
        seeds: one per image.
        chance: per image.
    """
    _, channels, height, width = images.shape
    for image, seed in zip(images, seeds, strict=True):
        random = torch.Generator().manual_seed(seed)
        draw, area, ratio, y, x = torch.rand(5, generator=random).tolist()
        if draw >= chance:
            continue
        area = (0.02 + 0.31 * area) * height * width
        ratio = math.exp(math.log(0.3) + ratio * (math.log(3.3) - math.log(0.3)))
        rows, columns = (
            min(height, max(1, round(math.sqrt(area * ratio)))),
            min(width, max(1, round(math.sqrt(area / ratio)))),
        )
        top, left = int(y * (height - rows + 1)), int(x * (width - columns + 1))
        image[:, top : top + rows, left : left + columns] = torch.randn(channels, rows, columns, generator=random).to(
            images.device
        )
    return images


def mix(
    images: torch.Tensor, targets: torch.Tensor, random: np.random.Generator, *, mixup: float, cutmix: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixup (Zhang et al. 2017) or cutmix (Yun et al. 2019) of a batch with itself in reverse order; with both allowed,
    either half of the time.

    Args:
        images: float (N, C, H, W); not written to.
        targets: float (N, classes).
        random: the batch's stream.
        mixup: alpha of the Beta distribution; 0: none.
        cutmix: the same.
    """
    use_cutmix = cutmix > 0 and (mixup == 0 or random.random() < 0.5)
    alpha = cutmix if use_cutmix else mixup
    share = float(random.beta(alpha, alpha))  # of the image itself
    if use_cutmix:
        height, width = images.shape[2:]
        rows, columns = round(height * math.sqrt(1 - share)), round(width * math.sqrt(1 - share))
        y, x = int(random.integers(height)), int(random.integers(width))
        top, left = max(0, y - rows // 2), max(0, x - columns // 2)
        bottom, right = min(height, y + (rows + 1) // 2), min(width, x + (columns + 1) // 2)
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        mixed = images * share + images.flip(0) * (1 - share)
    return mixed, targets * share + targets.flip(0) * (1 - share)
