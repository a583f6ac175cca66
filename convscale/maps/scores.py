"""How far maps can be believed: what happens to the class when the places they name go or come, whether they agree with
each other, and whether they depend on what the network has learned.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from convscale.artifact.artifact import Artifact
from convscale.errors import UserError, check_whole
from convscale.maps.explain import explain
from convscale.maps.result import Maps
from convscale.nn.modes import evaluating


@dataclass(frozen=True, kw_only=True, eq=False)
class Faithfulness:
    """Areas under the target's probability (Petsiuk et al. 2018, RISE, arXiv 1806.07421, section 3.3)."""

    deletion: np.ndarray
    """(N,): while pixels go, the most important first; lower is better."""
    insertion: np.ndarray
    """(N,): while they come into a blank image; higher is better."""


def faithfulness(
    net_or_artifact: nn.Module | Artifact, images: torch.Tensor | np.ndarray, maps: Maps, *, steps: int = 20
) -> Faithfulness:
    """Deletion and insertion of pixels in the order of the maps' values.

    Args:
        net_or_artifact: as for :func:`explain`; a classifier.
        images: what ``maps`` are of. What goes takes the mean colour: 0 of a module's normalised images.
        maps: of these images.
        steps: into which the pixels are parted.

    Raises:
        UserError: the maps are of other images.
    """
    steps = check_whole("steps", steps)
    if len(images) != len(maps) or maps.values.shape[1:] not in (tuple(images.shape[2:4]), tuple(images.shape[1:3])):
        raise UserError(f"{len(maps)} maps of {maps.values.shape[1:]} px do not go with images {tuple(images.shape)}")
    probabilities, pixels, blank = _subject(net_or_artifact, images)
    rows_first = isinstance(net_or_artifact, Artifact)
    deletion, insertion = np.empty(len(maps)), np.empty(len(maps))
    for row, (image, value, target) in enumerate(zip(pixels, maps.values, maps.targets, strict=True)):
        order = np.argsort(-value.ravel(), kind="stable")
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        gone = [rank.reshape(value.shape) < round(share * len(order)) for share in np.linspace(0, 1, steps + 1)]
        masks = np.stack([mask[..., None] if rows_first else mask[None] for mask in gone])
        deleted = probabilities(np.where(masks, blank, image[None]).astype(image.dtype))[:, target]
        inserted = probabilities(np.where(masks, image[None], blank).astype(image.dtype))[:, target]
        deletion[row], insertion[row] = (np.trapezoid(each) / steps for each in (deleted, inserted))
    return Faithfulness(deletion=deletion, insertion=insertion)


def _subject(
    net_or_artifact: nn.Module | Artifact, images: torch.Tensor | np.ndarray
) -> tuple[Callable[[np.ndarray], np.ndarray], np.ndarray, np.ndarray]:
    """Images -> probabilities, the images as an array, and what a pixel that is gone has."""
    pixels = images.detach().cpu().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
    if isinstance(net_or_artifact, Artifact):
        mean = np.round(255 * np.asarray(net_or_artifact.preprocessing.mean))
        return net_or_artifact, pixels, mean.astype(np.uint8)
    net = net_or_artifact
    parameter = next(net.parameters(), torch.empty(0))

    def probabilities(some: np.ndarray) -> np.ndarray:
        with evaluating(net), torch.no_grad():
            batch = torch.from_numpy(some).to(device=parameter.device, dtype=parameter.dtype)
            return net(batch).softmax(1).cpu().numpy()

    return probabilities, pixels, np.zeros((), pixels.dtype)


def rank_agreement(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of maps, image by image.

    Args:
        one: (N, h, w).
        other: the same shape.

    Returns:
        (N,) in [-1, 1]; NaN where a map is the same everywhere.

    Raises:
        UserError: of different shapes.
    """
    from scipy.stats import rankdata

    if one.shape != other.shape:
        raise UserError(f"maps of {one.shape} and of {other.shape} can not be compared; make them of one size")
    out = np.full(len(one), np.nan)
    for row, (a, b) in enumerate(zip(one, other, strict=True)):
        first, second = rankdata(a.ravel()), rankdata(b.ravel())
        if first.std() > 0 and second.std() > 0:
            out[row] = np.corrcoef(first, second)[0, 1]
    return out


def randomised(net: nn.Module, *, seed: int = 0) -> nn.Module:
    """A copy of a network with each of its weights shuffled within itself: as large, and nothing learned.

    Args:
        net: left as it is.
        seed: of the shuffling.
    """
    blank = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in blank.parameters():
            if weight.ndim >= 2:
                order = torch.randperm(weight.numel(), generator=generator)
                weight.copy_(weight.flatten()[order.to(weight.device)].view_as(weight))
    return blank


def sanity(net: nn.Module, images: torch.Tensor, method: str = "cam", *, seed: int = 0) -> np.ndarray:
    """How alike maps are to those of the same network without what it has learned (Adebayo et al. 2018, arXiv
    1810.03292): a method whose maps stay as they are shows the image, not the network.

    Args:
        net: a classifier.
        images: as for :func:`explain`.
        method: as for :func:`explain`.
        seed: of the shuffling.

    Returns:
        (N,): rank correlation of each image's maps; near 0 is right.
    """
    learned = explain(net, images, method)
    blank = explain(randomised(net, seed=seed), images, method, learned.targets)
    return rank_agreement(learned.values, blank.values)
