"""The head first, solved instead of trained: a linear probe on the features that a pretrained network already has.

Fine-tuning from a random head changes good features before the head can tell what they are for; starting from the
solved head keeps them (Kumar et al. 2022, arXiv 2202.10054).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import nn

from convscale.errors import UserError
from convscale.images.preprocess import Preprocessing
from convscale.images.splits import Split
from convscale.learn.loader import eval_batches
from convscale.learn.loss import known_targets
from convscale.nn.modes import evaluating
from convscale.stats import average_precisions, mean_of_known

MOST_IMAGES = 20_000
"""Of the train set, spread evenly: more hardly change a linear head."""
PROBE_IMAGES = 2_000
"""Of the train set, to compare networks by."""
FOLDS = 5
"""Parts of the images, where few of them are to judge a probe."""
DECAYS = (1e-3, 1e-2, 1e-1, 1.0)
"""L2 penalties that are tried."""


def solve_head(
    net: nn.Module,
    train: Split,
    validation: Split,
    preprocessing: Preprocessing,
    *,
    device: torch.device,
    workers: int | None = None,
) -> tuple[float, float]:
    """Put the best linear classifier on the network's present features into its head.

    Logistic regression (one for each class where an image can have several labels) on pooled features, standardised for
    the fit, by L-BFGS; of the L2 penalties the one with the lowest loss on validation is taken.

    Args:
        net: with timm's ``forward_features``, ``forward_head(x, pre_logits=True)`` and ``get_classifier``; its mode is
            kept.
        train: what to fit on, as validation sees images: without augmentation.
        validation: what chooses the penalty.
        preprocessing: how images become inputs.
        device: where ``net`` is.
        workers: decoding processes; None: one per core.

    Returns:
        The penalty and the validation loss.

    Raises:
        UserError: the network has no such head.
    """
    headed, head = headed_parts(net)
    x, labels = _features(headed, _spread(train, MOST_IMAGES), preprocessing, device, workers)
    seen, truth = _features(headed, validation, preprocessing, device, workers)
    solved = _solve(x, labels, seen, truth, head.out_features, DECAYS)
    weight = solved.weight / solved.std
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(solved.bias - weight @ solved.mean)
    return solved.decay, solved.loss


def headed_parts(net: nn.Module) -> tuple[_Headed, nn.Linear]:
    """The network by timm's names for its parts, and its linear classifier.

    Raises:
        UserError: it has none.
    """
    head = net.get_classifier() if hasattr(net, "get_classifier") else None  # pyright: ignore[reportCallIssue]
    if not isinstance(head, nn.Linear) or not hasattr(net, "forward_head"):
        raise UserError(
            "solve_head needs a network with forward_features, forward_head and a linear classifier (timm's "
            "convention); for others "
            "solve_head=false with freeze_epochs=1 trains the head first"
        )
    return cast(_Headed, net), head


class _Headed(Protocol):
    """A network with timm's names for its parts."""

    def forward_features(self, x: torch.Tensor, /) -> torch.Tensor:
        """The maps before pooling."""
        ...

    def forward_head(self, x: torch.Tensor, /, pre_logits: bool = False) -> torch.Tensor:
        """Logits, or what the classifier sees."""
        ...


@torch.no_grad()
def _features(
    net: _Headed, split: Split, preprocessing: Preprocessing, device: torch.device, workers: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled features float32 (N, features) and labels, on the CPU."""
    rows, kept = [], []
    assert isinstance(net, nn.Module)
    with evaluating(net):
        for batch in eval_batches(split, preprocessing, batch_size=128, workers=workers):
            if len(batch.indices):
                inputs = preprocessing.normalize(batch.images.to(device))
                rows.append(net.forward_head(net.forward_features(inputs), pre_logits=True).float().cpu())
                kept.append(batch.indices)
    return torch.cat(rows), split.labels[torch.cat(kept)]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Solved:
    """A linear classifier on standardised features."""

    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    decay: float
    loss: float
    """On validation."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of features."""
        return ((x - self.mean) / self.std) @ self.weight.T + self.bias


def _solve(
    x: torch.Tensor,
    labels: torch.Tensor,
    seen: torch.Tensor,
    truth: torch.Tensor,
    classes: int,
    decays: Sequence[float],
) -> _Solved:
    """The classifier on features ``x`` with the penalty that has the lowest loss on features ``seen``."""
    mean, std = x.mean(0), x.std(0).clamp(min=1e-4)
    x, held = (x - mean) / std, (seen - mean) / std
    weight, bias = torch.zeros(classes, x.shape[1]), torch.zeros(classes)
    tried = []
    for decay in sorted(decays, reverse=True):  # each starts from the one before
        weight, bias = _fit(x, labels, weight, bias, decay)
        tried.append((float(_loss(held @ weight.T + bias, truth)), decay, weight, bias))
    loss, decay, weight, bias = min(tried, key=lambda entry: entry[0])
    return _Solved(weight=weight, bias=bias, mean=mean, std=std, decay=decay, loss=loss)


def _fit(
    x: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, decay: float
) -> tuple[torch.Tensor, torch.Tensor]:
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = _loss(x @ weight.T + bias, labels) + 0.5 * decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    return weight.detach(), bias.detach()


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels)
    targets, known = known_targets(labels)
    return (F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * known).sum(1).mean()


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a network's features are worth on a data set, before anything is trained."""

    top1: float
    """Share of the images that the solved head gets right; mean average precision for several labels."""
    train: int
    """Images that the head was solved on."""
    validation: int
    """Images that it was judged on: the validation set, or where that is small all in turns."""
    folds: int | None = None
    """Heads that were solved, each judged on the images that it has not seen; None: one, judged on validation."""
    seconds: float
    """What it took, decoding included."""


def probe(
    net: nn.Module,
    train: Split,
    validation: Split,
    preprocessing: Preprocessing,
    *,
    device: torch.device,
    workers: int | None = None,
    most: int = PROBE_IMAGES,
) -> Probe:
    """Solve a head for ``net`` on some of the data, and see how right it is: a quick ranking of pretrained networks.

    A validation set of few images tells little: below half of ``most`` it joins the train set, and five heads are
    solved, each judged on the fifth that it has not seen (one label per image).

    Args:
        net: as for ``solve_head``; it is left as it is.
        train: what to fit on; at most ``most`` images of it, spread evenly, are.
        validation: what to judge on, at most half as many; it chooses the penalty.
        preprocessing: how images become inputs.
        device: where ``net`` is.
        workers: decoding processes; None: one per core.
        most: images of the train set.

    Raises:
        UserError: the network has no such head, or no image can be read.
    """
    began = time.monotonic()
    headed, head = headed_parts(net)
    x, labels = _features(headed, _spread(train, most), preprocessing, device, workers)
    seen, truth = _features(headed, _spread(validation, max(1, most // 2)), preprocessing, device, workers)
    solved = _solve(x, labels, seen, truth, head.out_features, DECAYS)
    n, folds = len(x), None
    if train.multilabel:
        value = mean_of_known(average_precisions(solved(seen).numpy(), truth.numpy()))
        value = 0.0 if math.isnan(value) else value  # no image of it has a label
    elif len(seen) < most // 2 and len(x) + len(seen) >= FOLDS:
        x, truth, folds = torch.cat((x, seen)), torch.cat((labels, truth)), FOLDS
        value, n = _in_turns(x, truth, head.out_features, solved.decay), len(x) - math.ceil(len(x) / FOLDS)
    else:
        value = float((solved(seen).argmax(1) == truth).double().mean())
    return Probe(top1=value, train=n, validation=len(truth), folds=folds, seconds=time.monotonic() - began)


def _in_turns(x: torch.Tensor, labels: torch.Tensor, classes: int, decay: float) -> float:
    """Share of right images under heads that have not seen them, of each class a share in each fold."""
    fold = torch.empty(len(x), dtype=torch.long)
    fold[labels.argsort(stable=True)] = torch.arange(len(x)) % FOLDS
    right = 0
    for number in range(FOLDS):
        held = fold == number
        solved = _solve(x[~held], labels[~held], x[held], labels[held], classes, (decay,))
        right += int((solved(x[held]).argmax(1) == labels[held]).sum())
    return right / len(x)


def _spread(split: Split, most: int) -> Split:
    """At most ``most`` images, evenly taken from the whole."""
    return split if len(split) <= most else split.subset(torch.linspace(0, len(split) - 1, most).long())
