"""What is watched after every epoch: loss and accuracy on the validation set, over all processes."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from convscale.images.preprocess import Preprocessing
from convscale.images.splits import Split
from convscale.learn.distributed import Processes
from convscale.learn.evaluate import best_thresholds, predict_split
from convscale.stats import average_precisions, mean_of_known


def validate(
    net: nn.Module,
    split: Split,
    preprocessing: Preprocessing,
    *,
    processes: Processes,
    device: torch.device,
    precision: str,
    workers: int | None,
) -> dict[str, Any]:
    """``loss``, ``top1``, ``map`` (mean average precision for several labels, else None), ``metric`` (what is to be
    highest) and, for several labels, ``thresholds``; each process takes its share of the images, and all get the same
    result."""
    own = split if processes.world == 1 else split.subset(range(processes.rank, len(split), processes.world))
    logits, labels = torch.empty(0, len(split.classes)), split.labels[:0]
    if len(own):
        logits, kept, _, _ = predict_split(net, own, preprocessing, device=device, precision=precision, workers=workers)
        labels = own.labels[kept]
    if not split.multilabel:
        sums = [
            F.cross_entropy(logits, labels, reduction="sum").item(),
            float((logits.argmax(1) == labels).sum()),
            float(len(labels)),
        ]
        loss, right, count = processes.sum(sums)
        return {"loss": loss / count, "top1": right / count, "map": None, "metric": right / count}
    logits, labels = (torch.cat(parts) for parts in zip(*processes.gather((logits, labels)), strict=True))
    loss = F.binary_cross_entropy_with_logits(logits, labels).item()
    average = mean_of_known(average_precisions(logits.numpy(), labels.numpy()))
    average = 0.0 if math.isnan(average) else average
    top1 = labels[torch.arange(len(labels)), logits.argmax(1)].double().mean().item()
    return {
        "loss": loss,
        "top1": top1,
        "map": average,
        "metric": average,
        "thresholds": list(best_thresholds(logits, labels)),
    }
