"""What is watched after every epoch: loss and accuracy on the validation set, over all processes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from convscale.images.preprocess import Preprocessing
from convscale.images.splits import Split
from convscale.learn.distributed import Processes, Trouble
from convscale.learn.evaluate import best_temperatures, best_thresholds, predict_split
from convscale.learn.loader import check_bad_rate
from convscale.learn.loss import partial_bce
from convscale.stats import average_precisions, mean_of_known


@dataclass(frozen=True, kw_only=True)
class Validation:
    """A network's result on the validation set."""

    loss: float
    """Mean cross-entropy; binary cross-entropy per class for several labels."""
    top1: float
    """Share of images that are right, in [0, 1]."""
    average_precision: float | None = None
    """Mean over the classes that are present; None but for several labels."""
    thresholds: tuple[float, ...] | None = None
    """Per class the probability above which it is present; None but for several labels."""
    temperatures: tuple[float, ...] | None = None
    """Per class what its logit is to be divided by; None but for several labels."""
    bad: tuple[str, ...] = ()
    """What was wrong with images that were left out."""

    @property
    def metric(self) -> float:
        """What is to be highest."""
        return self.top1 if self.average_precision is None else self.average_precision


def validate(
    net: nn.Module,
    split: Split,
    preprocessing: Preprocessing,
    *,
    processes: Processes,
    device: torch.device,
    precision: str,
    workers: int | None,
    beta: float = 1.0,
    max_bad_rate: float = 0.01,
) -> Validation:
    """Each process takes its share of the images, and all get the same result; ``beta`` is of the thresholds' F.

    Raises:
        UserError: more than ``max_bad_rate`` of the images (and more than one), or all, can not be decoded.
    """
    own = split if processes.world == 1 else split.subset(range(processes.rank, len(split), processes.world))
    logits, labels, own_bad = torch.empty(0, len(split.classes)), split.labels[:0], list[str]()
    trouble = Trouble(processes)
    if len(own):
        with trouble.held():
            logits, kept, own_bad, _ = predict_split(
                net, own, preprocessing, device=device, precision=precision, workers=workers, some=False
            )
            labels = own.labels[kept]
    trouble.settle()
    bad = tuple(problem for each in processes.gather(own_bad) for problem in each)
    check_bad_rate(bad, len(split), max_bad_rate, split.split)  # by all processes alike: none waits for another
    if not split.multilabel:
        sums = [
            F.cross_entropy(logits, labels, reduction="sum").item(),
            float((logits.argmax(1) == labels).sum()),
            float(len(labels)),
        ]
        loss, right, count = processes.sum(sums)
        return Validation(loss=loss / count, top1=right / count, bad=bad)
    logits, labels = (torch.cat(parts) for parts in zip(*processes.gather((logits, labels)), strict=True))
    loss = partial_bce(logits, labels).item()
    average = mean_of_known(average_precisions(logits.numpy(), labels.numpy()))
    average = 0.0 if math.isnan(average) else average
    top1 = labels.nan_to_num()[torch.arange(len(labels)), logits.argmax(1)].double().mean().item()
    return Validation(
        loss=loss,
        top1=top1,
        average_precision=average,
        thresholds=best_thresholds(logits, labels, beta),
        temperatures=best_temperatures(logits, labels),
        bad=bad,
    )
