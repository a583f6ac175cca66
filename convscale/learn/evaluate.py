"""How good a network is on a split: accuracy with its interval, per class, confusion, calibration, and which images it
got wrong.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from convscale.errors import UserError, check_path, check_text, check_whole
from convscale.images.check import majority_share
from convscale.images.preprocess import Preprocessing
from convscale.images.sources import not_as_trained, open_dataset, open_evaluation
from convscale.images.splits import SPLITS, DataSplits, Split
from convscale.learn.checkpoint import load_checkpoint
from convscale.learn.loader import check_bad_rate, counted, eval_batches
from convscale.learn.loss import partial_bce
from convscale.learn.settings import autocast_type, usable_device
from convscale.networks.pictures import preprocessing_of, taught_of
from convscale.nn.modes import evaluating
from convscale.stats import average_precisions, mean_of_known, wilson

TOP5_CLASSES = 10
"""Up to so many classes, one of the five most probable being right says little."""


class Wrong(NamedTuple):
    """An image that was classified wrongly."""

    index: int  # pyright: ignore[reportIncompatibleMethodOverride] - hides tuple.index
    """In the split."""
    true: int
    """Its label."""
    predicted: int
    """The network's label."""
    confidence: float
    """The network's probability for its label."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """What a network does on a split."""

    n: int
    """Images that were evaluated."""
    loss: float
    """Mean cross-entropy; binary cross-entropy per class for several labels."""
    top1: float
    """Share of images whose most probable class is right, in [0, 1]; for several labels: whose most probable class is
    among theirs."""
    top1_low: float
    """Lower end of top1's 95 % Wilson interval."""
    top1_high: float
    """Upper end of top1's 95 % Wilson interval."""
    top5: float | None
    """Share of images whose class is among the five most probable; None where there are at most ten classes."""
    baseline: float
    """What is reached without looking at the images: the share of these that are of the most frequent class (of the
    train set, where its labels were given); for several labels the mean average precision of probabilities that are the
    same for all images."""
    per_class: tuple[float, ...]
    """Share of each class's images that are right (recall); average precision per class for several labels; NaN for a
    class without images."""
    confusion: torch.Tensor
    """int64 (classes, classes): rows are true, columns predicted; empty for several labels."""
    calibration_error: float
    """Expected calibration error over 15 bins (Guo et al. 2017)."""
    mean_average_precision: float
    """Mean of per_class over classes with images, for several labels; else NaN."""
    wrong: tuple[Wrong, ...]
    """Images that were classified wrongly, the most confident first; empty for several labels."""
    images_per_s: float
    """Of the whole evaluation, decoding included."""
    bad: tuple[str, ...]
    """What was wrong with images that could not be decoded."""
    classes: tuple[str, ...]
    """Class names."""
    notes: tuple[str, ...] = ()
    """What a user should know of the images, where they were opened here."""

    def describe(self) -> str:
        """One line: the result with its interval, and what it has to be compared with."""
        if self.mean_average_precision == self.mean_average_precision:
            return (
                f"mAP {self.mean_average_precision:.2%} on {self.n:,} images "
                f"(the same answer for all: {self.baseline:.2%})"
            )
        return (
            f"top-1 {self.top1:.2%} (95 % interval {self.top1_low:.2%} to {self.top1_high:.2%}) on {self.n:,} images "
            f"(always the most frequent class: {self.baseline:.2%})"
        )


def evaluate(
    net: nn.Module | str | os.PathLike[str],
    split: Split | DataSplits | str | os.PathLike[str],
    preprocessing: Preprocessing | None = None,
    *,
    part: str | None = None,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    workers: int | None = None,
    train_labels: torch.Tensor | None = None,
    on_images: Callable[[int], object] | None = None,
) -> Evaluation:
    """Run ``net`` in eval mode over every image of ``split``.

    Args:
        net: gives logits (N, classes); every submodule's mode is as before afterwards. Or a checkpoint's or a training
            run's folder.
        split: what to evaluate on: one split, or an opened set (``open_dataset``) or the path of one, of which ``part``
            says which.
        preprocessing: how images become inputs; None: what the network was trained with, else as its
            ``pretrained_cfg`` says.
        part: ``train``, ``validation``, ``test`` or ``all``; None: ``test``, or the one split that there is.
        batch_size: images per call.
        device: where to run; the network is put back afterwards.
        precision: ``fp32``; ``bf16``, ``fp16`` (autocast); or ``amp``, the half precision that is native to the
            device.
        workers: decoding processes; None: one per core.
        train_labels: the train set's, for the baseline: its most frequent class is the one to say always; None: those
            of the opened set, else that of ``split``.
        on_images: called with the number of images so far, after each batch.

    Raises:
        UserError: no checkpoint, no image, a network of other classes, or more or fewer, a batch below 1, an unknown
            precision, a device that is not there, outputs that are not finite; of a path or an opened set too many
            images that can not be decoded.
    """
    net = net if isinstance(net, nn.Module) else load_checkpoint(check_path("net", net)).net
    if hasattr(net, "detector_spec"):
        raise UserError("the network is a detector; evaluate_detector judges its boxes")
    preprocessing = preprocessing_of(net) if preprocessing is None else preprocessing
    found = _opened(net, split, part, preprocessing.channels)
    split = found.split
    _check_classes(net, split.classes)
    if len(split) == 0:
        raise UserError(f"the {split.split} split is empty")
    logits, kept, bad, seconds = predict_split(
        net,
        split,
        preprocessing,
        batch_size=batch_size,
        device=device,
        precision=precision,
        workers=workers,
        on_images=on_images,
    )
    labels = split.labels[kept]
    if logits.shape[1] != len(split.classes):
        raise UserError(f"the network has {logits.shape[1]} classes, the data {len(split.classes)}")
    if not (finite := logits.isfinite().all(dim=1)).all():
        first = int(kept[int((~finite).nonzero()[0])])
        raise UserError(
            f"the network's outputs are not finite numbers for {int((~finite).sum())} of {len(kept)} images of the "
            f"{split.split} split (first: {split.name(first)}), so it can not be evaluated"
        )
    check_bad_rate(bad, len(split), found.max_bad_rate, split.split)
    make = _several_labels if split.multilabel else _one_label
    made = make(logits, labels, kept, tuple(bad), split.classes, len(kept) / seconds)
    made = dataclasses.replace(made, notes=found.notes)
    train_labels = found.train_labels if train_labels is None else train_labels
    return made if train_labels is None else dataclasses.replace(made, baseline=majority_share(labels, train_labels))


class _Opened(NamedTuple):
    """A split with what is known of the set that it is of."""

    split: Split
    train_labels: torch.Tensor | None = None
    notes: tuple[str, ...] = ()
    max_bad_rate: float = 1.0
    """Share of the images that may turn out to be unreadable: of a lone split whoever opened it judges."""


def _opened(
    net: nn.Module, given: Split | DataSplits | str | os.PathLike[str], part: str | None, channels: int
) -> _Opened:
    """What is to be evaluated on, read where a path is given."""
    if part is not None:
        check_text("part", part, (*SPLITS, "all"))
    if isinstance(given, Split):
        if part is not None:
            raise UserError(f"part is {part!r}, but one split is given already; leave it out")
        return _Opened(given)
    taught = taught_of(net)
    trained_on = None if taught is None else taught.splits
    if not isinstance(given, DataSplits):
        path = check_path("split", given)
        if taught is not None:
            found = open_evaluation(path, classes=taught.classes, split=part, channels=channels, trained_on=trained_on)
            return _Opened(found.split, found.train_labels, found.notes, 0.01)
        given = open_dataset(path, channels=channels, compare=False)
    chosen = given.whole() if part == "all" else getattr(given, part or "test")
    notes = (*given.notes, *not_as_trained(given, trained_on, part or "test"))
    return _Opened(chosen, given.train.labels, notes, given.max_bad_rate)


def _check_classes(net: nn.Module, classes: tuple[str, ...]) -> None:
    """Where a network knows its classes, labels of others, or of these in another order, say nothing of its answers.

    A network with another number of classes than it was trained with was given another head since.
    """
    taught = taught_of(net)
    if taught is not None and len(classes) == len(taught.classes) and classes != taught.classes:
        raise UserError(
            f"the data's classes {list(classes)} are not the network's {list(taught.classes)}, in this order"
        )


def predict_split(
    net: nn.Module,
    split: Split,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    workers: int | None = None,
    some: bool = True,
    on_images: Callable[[int], object] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, list[str], float]:
    """Logits float32 (N, classes) on the CPU, the indices int64 (N,) they belong to, what was wrong with other images,
    and seconds.

    Args:
        net, split, preprocessing, batch_size, device, precision, workers, on_images: as for ``evaluate``.
        some: at least one image must be decoded; False: there may be none, N is 0 then.

    Raises:
        UserError: no image can be decoded, and some must be.
    """
    batch_size = check_whole("batch_size", batch_size)
    workers = None if workers is None else check_whole("workers", workers, 0)
    where = usable_device(device)
    dtype = autocast_type(precision, where)
    started, home = time.perf_counter(), next((p.device for p in net.parameters()), where)
    logits, kept, bad = [], [], []
    # moved outside of inference mode, which would leave weights behind that can not be trained again
    net.to(where)
    try:
        with evaluating(net), torch.inference_mode():
            every = eval_batches(split, preprocessing, batch_size=batch_size, workers=workers)
            for batch in counted(every, on_images):
                bad += batch.bad
                if not len(batch.indices):
                    continue
                inputs = preprocessing.normalize(batch.images.to(where))
                with torch.autocast(where.type, dtype or torch.bfloat16, enabled=dtype is not None):
                    logits.append(net(inputs).float().cpu())
                kept.append(batch.indices)
    finally:
        net.to(home)
    if not logits and some:
        raise UserError(f"no image of the {split.split} split can be decoded; first: {bad[0]}")
    if not logits:
        return torch.empty(0, len(split.classes)), torch.empty(0, dtype=torch.long), bad, time.perf_counter() - started
    return torch.cat(logits), torch.cat(kept), bad, time.perf_counter() - started


def _one_label(
    logits: torch.Tensor,
    labels: torch.Tensor,
    kept: torch.Tensor,
    bad: tuple[str, ...],
    classes: tuple[str, ...],
    images_per_s: float,
) -> Evaluation:
    from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_confusion_matrix

    count, probabilities = len(classes), logits.softmax(1)
    confidence, predicted = probabilities.max(1)
    right = predicted == labels
    in_top5 = (logits.topk(min(5, count), 1).indices == labels[:, None]).any(1)
    confusion = multiclass_confusion_matrix(predicted, labels, num_classes=count).long()
    misses = torch.nonzero(~right).flatten()
    misses = misses[confidence[misses].argsort(descending=True, stable=True)]
    low, high = wilson(int(right.sum()), len(labels))
    return Evaluation(
        n=len(labels),
        loss=F.cross_entropy(logits, labels).item(),
        top1=right.sum().item() / len(labels),
        top1_low=low,
        top1_high=high,
        top5=in_top5.float().mean().item() if count > TOP5_CLASSES else None,
        baseline=majority_share(labels),
        per_class=tuple((confusion.diagonal().double() / confusion.sum(1)).tolist()),
        confusion=confusion,
        calibration_error=float(multiclass_calibration_error(probabilities, labels, num_classes=count, n_bins=15)),
        mean_average_precision=float("nan"),
        wrong=tuple(
            Wrong(int(kept[at]), int(labels[at]), int(predicted[at]), float(confidence[at])) for at in misses.tolist()
        ),
        images_per_s=images_per_s,
        bad=bad,
        classes=classes,
    )


def _several_labels(
    logits: torch.Tensor,
    labels: torch.Tensor,
    kept: torch.Tensor,
    bad: tuple[str, ...],
    classes: tuple[str, ...],
    images_per_s: float,
) -> Evaluation:
    del kept
    probabilities = logits.sigmoid()
    precision = average_precisions(logits.numpy(), labels.numpy())
    best = logits.argmax(1)
    there = labels.nan_to_num()  # what is not known is no hit
    right = int(there[torch.arange(len(labels)), best].sum())
    low, high = wilson(right, len(labels))
    in_top5 = there.gather(1, logits.topk(min(5, len(classes)), 1).indices).any(1)
    return Evaluation(
        n=len(labels),
        loss=partial_bce(logits, labels).item(),
        top1=right / len(labels),
        top1_low=low,
        top1_high=high,
        top5=in_top5.float().mean().item() if len(classes) > TOP5_CLASSES else None,
        baseline=majority_share(labels),
        per_class=tuple(precision.tolist()),
        confusion=torch.empty(0, 0, dtype=torch.long),
        calibration_error=binary_calibration_error(probabilities, labels),
        mean_average_precision=mean_of_known(precision),
        wrong=(),
        images_per_s=images_per_s,
        bad=bad,
        classes=classes,
    )


def binary_calibration_error(probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    """Expected calibration error over 15 bins of all classes' probabilities (N, classes) whose labels are known."""
    from torchmetrics.functional.classification import binary_calibration_error as error_of

    known = ~labels.isnan()
    return float(error_of(probabilities[known], labels[known].long(), n_bins=15))


def best_thresholds(logits: torch.Tensor, labels: torch.Tensor, beta: float = 1.0) -> tuple[float, ...]:
    """For each class the probability above which to call it present so that F-beta is highest on these (validation)
    images.

    Args:
        logits: (N, classes).
        labels: float (N, classes) of zeros and ones; NaN: not known.
        beta: how much more finding all counts than being right.

    Returns:
        One threshold per class, halfway between the two neighbouring probabilities; 0.5 for a class without images.
    """
    thresholds = []
    for scores, real in zip(logits.sigmoid().double().T, labels.T, strict=True):
        known = ~real.isnan()
        column, truth = scores[known], real[known]
        if truth.sum() == 0:
            thresholds.append(0.5)
            continue
        order = column.argsort(descending=True)
        values, hits = column[order], truth[order].double().cumsum(0)
        told = torch.arange(1, len(values) + 1)
        f = (1 + beta**2) * hits / (told + beta**2 * truth.sum())
        f[:-1][values[:-1] == values[1:]] = -1  # ties can not be parted
        at = int(f.argmax())
        following = values[at + 1] if at + 1 < len(values) else values[at] * 0
        thresholds.append(float((values[at] + following) / 2))
    return tuple(thresholds)


_COLDEST, _HOTTEST, _HALVINGS = 0.05, 20.0, 40


def best_temperatures(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, ...]:
    """For each class what to divide its logit by so that its probabilities are calibrated on these (validation) images
    (Guo et al. 2017, arXiv 1706.04599, section 4.2, class by class): where binary cross-entropy is least.

    Args:
        logits: (N, classes).
        labels: float (N, classes) of zeros and ones; NaN: not known.

    Returns:
        One temperature per class in [0.05, 20]; 1 for a class that all or none of the images have.
    """
    z, truth = logits.double(), labels.double()
    known = (~truth.isnan()).double()
    truth = truth.nan_to_num()
    low = torch.full((z.shape[1],), 1 / _HOTTEST, dtype=torch.float64)
    high = torch.full_like(low, 1 / _COLDEST)
    for _ in range(_HALVINGS):  # the loss is convex in 1 / temperature, so its slope changes sign once
        middle = (low + high) / 2
        slope = (z * (torch.sigmoid(z * middle) - truth) * known).sum(0)
        low, high = torch.where(slope < 0, middle, low), torch.where(slope < 0, high, middle)
    found = 2 / (low + high)
    present, count = (truth * known).sum(0), known.sum(0)
    found[(present == 0) | (present == count)] = 1.0
    return tuple(found.tolist())
