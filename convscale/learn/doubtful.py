"""Labels that are probably wrong, by a trained network's probabilities.

The idea of confident learning (Northcutt et al. 2021, arXiv 1911.00068, section 3): a class's threshold is how sure the
network is of it, on average, where it is the given label. An image is in doubt where another class reaches that class's
own threshold. The network has seen these labels in training: the longer it trained, the more wrong ones it has learnt
by heart, so what is found is the least of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from convscale.errors import UserError, check_whole
from convscale.images.duplicates import evenly
from convscale.images.preprocess import Preprocessing
from convscale.images.splits import Split
from convscale.learn.evaluate import predict_split

MOST_IMAGES = 5_000
"""Train images that are looked at; evenly taken."""


@dataclass(frozen=True, kw_only=True)
class DoubtfulLabel:
    """A label that is probably wrong."""

    index: int
    """Of the image."""
    name: str
    """Of the image: its path, or its number."""
    given: str | None
    """The label it has; None: it lacks the label that is suggested (several labels per image)."""
    suggested: str | None
    """The class it looks like; None: the label that is given should go (several labels per image)."""
    confidence: float
    """The network's probability for what is given."""
    suggested_confidence: float
    """Its probability for what is suggested."""

    def describe(self) -> str:
        """One line."""
        sure = f"{self.suggested_confidence:.0%} sure, {self.confidence:.0%} of the label"
        if self.given is None:
            return f"{self.name}: lacks the label {self.suggested} ({sure})"
        if self.suggested is None:
            return f"{self.name}: labelled {self.given}, looks like none ({sure})"
        return f"{self.name}: labelled {self.given}, looks like {self.suggested} ({sure})"


class Probabilities(NamedTuple):
    """What a network says of some images of a split."""

    values: NDArray[np.float32]
    """(N, classes)."""
    labels: NDArray[np.generic]
    """(N,) whole numbers, or (N, classes) zeros and ones; NaN: not known."""
    indices: NDArray[np.int64]
    """(N,): in the split."""
    names: tuple[str, ...]
    """Of the images."""
    bad: tuple[str, ...]
    """What was wrong with images that could not be decoded."""


class _Doubt(NamedTuple):
    """A doubt before it has names."""

    score: float
    """Confidence over what is usual for the label: the smaller, the more doubtful."""
    row: int
    given: int | None
    suggested: int | None
    confidence: float
    suggested_confidence: float


def sample_probabilities(
    net: nn.Module,
    split: Split,
    preprocessing: Preprocessing,
    *,
    most: int = MOST_IMAGES,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    workers: int | None = None,
) -> Probabilities:
    """Probabilities of at most ``most`` images of ``split``, evenly taken: softmax, or sigmoid for several labels.

    Raises:
        UserError: none of them can be decoded, or an option is wrong.
    """
    chosen = evenly(len(split), check_whole("most", most))
    sample = split.subset(chosen.tolist())
    logits, kept, bad, _ = predict_split(
        net, sample, preprocessing, batch_size=batch_size, device=device, workers=workers
    )
    values = logits.sigmoid() if split.multilabel else logits.softmax(1)
    return Probabilities(
        values=values.numpy(),
        labels=np.asarray(sample.labels)[kept.numpy()],
        indices=chosen[kept.numpy()],
        names=tuple(sample.name(index) for index in kept.tolist()),
        bad=tuple(bad),
    )


def find_doubtful(
    net: nn.Module,
    split: Split,
    preprocessing: Preprocessing,
    *,
    count: int = 20,
    most: int = MOST_IMAGES,
    device: str | torch.device = "cpu",
    workers: int | None = None,
) -> tuple[DoubtfulLabel, ...]:
    """The most doubtful labels among at most ``most`` images of ``split``; ``index`` counts in the split."""
    seen = sample_probabilities(net, split, preprocessing, most=most, device=device, workers=workers)
    return doubtful_labels(seen.values, seen.labels, split.classes, seen.names, count, indices=seen.indices)


def doubtful_labels(
    net_probabilities: ArrayLike,
    labels: ArrayLike,
    classes: Sequence[str],
    names: Sequence[str],
    count: int = 20,
    *,
    indices: ArrayLike | None = None,
) -> tuple[DoubtfulLabel, ...]:
    """The images that are most probably labelled wrongly, the most doubtful first.

    An image is in doubt where the network prefers another class to its label, and that class's probability reaches the
    mean that it has over the images labelled with it. Doubts are ordered by the probability of the given label, over
    its mean for that class. For several labels each class is judged by itself, present against absent, by the images of
    which that is known.

    Args:
        net_probabilities: (N, classes), in [0, 1].
        labels: whole numbers (N,), or zeros and ones (N, classes); NaN: not known.
        classes: their names.
        names: of the images.
        count: doubts at most.
        indices: (N,): the images' numbers; None: their positions.

    Raises:
        UserError: the shapes do not fit, a label is of no class, or a probability lies outside [0, 1].
    """
    probabilities, truth = np.asarray(net_probabilities, dtype=np.float64), np.asarray(labels)
    numbers = np.arange(len(probabilities)) if indices is None else np.asarray(indices)
    count = check_whole("count", count)
    _check(probabilities, truth, len(classes), len(names), len(numbers))
    if truth.ndim == 2:
        doubts = _several_labels(probabilities, truth.astype(np.float64))
    else:
        doubts = _one_label(probabilities, truth.astype(np.int64))
    return tuple(
        DoubtfulLabel(
            index=int(numbers[doubt.row]),
            name=names[doubt.row],
            given=None if doubt.given is None else classes[doubt.given],
            suggested=None if doubt.suggested is None else classes[doubt.suggested],
            confidence=doubt.confidence,
            suggested_confidence=doubt.suggested_confidence,
        )
        for doubt in sorted(doubts, key=lambda doubt: doubt.score)[:count]
    )


def _check(probabilities: NDArray[np.float64], truth: NDArray[np.generic], classes: int, names: int, ids: int) -> None:
    if probabilities.ndim != 2 or probabilities.shape[1] != classes:
        raise UserError(f"probabilities have the shape {probabilities.shape}; (images, {classes}) would be right")
    count = len(probabilities)
    if truth.shape not in ((count,), (count, classes)) or names != count or ids != count:
        raise UserError(f"{count} images, but labels of shape {truth.shape}, {names} names and {ids} indices")
    if truth.ndim == 1 and count and not 0 <= truth.min() <= truth.max() < classes:
        raise UserError(f"labels reach from {truth.min()} to {truth.max()}; 0 to {classes - 1} would be right")
    if not ((probabilities >= 0) & (probabilities <= 1)).all():  # false for NaN as well
        raise UserError("probabilities must lie in [0, 1]; give softmax's or sigmoid's outputs, not logits")


def _one_label(probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> list[_Doubt]:
    """One class against all others."""
    rows = np.arange(len(labels))
    own = probabilities[rows, labels]
    members = np.bincount(labels, minlength=probabilities.shape[1])
    sums = np.bincount(labels, weights=own, minlength=probabilities.shape[1])
    # a class that is nobody's label has no threshold that could be reached
    thresholds = np.divide(sums, members, out=np.full(len(sums), np.inf), where=members > 0)
    reached = np.where((probabilities >= thresholds) & (probabilities > own[:, None]), probabilities, -1.0)
    rival = reached.argmax(1)
    doubtful = np.flatnonzero(reached[rows, rival] > 0)
    return [
        _Doubt(
            own[row] / thresholds[labels[row]] if thresholds[labels[row]] > 0 else 0.0,
            int(row),
            int(labels[row]),
            int(rival[row]),
            float(own[row]),
            float(probabilities[row, rival[row]]),
        )
        for row in doubtful
    ]


def _several_labels(probabilities: NDArray[np.float64], truth: NDArray[np.float64]) -> list[_Doubt]:
    """Each class by itself: it is there, or it is not; of an image whose label is not known nothing is said."""
    doubts: list[_Doubt] = []
    for label in range(probabilities.shape[1]):
        known = np.flatnonzero(~np.isnan(truth[:, label]))
        given = (truth[known, label] > 0).astype(np.int64)
        two = np.stack([1 - probabilities[known, label], probabilities[known, label]], axis=1)
        doubts += [
            doubt._replace(
                row=int(known[doubt.row]),
                given=label if doubt.given == 1 else None,
                suggested=label if doubt.suggested == 1 else None,
            )
            for doubt in _one_label(two, given)
        ]
    return doubts
