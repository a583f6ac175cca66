"""What is minimised: cross-entropy, a teacher's say, and for several labels per image binary cross-entropy, the
asymmetric (which has a form for one label, too), the focal, the two-way and the ZLPR loss.

Where several labels are only partly known, those that are not are NaN: they count for nothing in any of these losses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from convscale.learn.recipe import Recipe

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits (N, classes), labels int64 (N,) or float (N, classes)) -> scalar."""


def asymmetric_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    negative: float = 4.0,
    positive: float = 0.0,
    margin: float = 0.05,
    detach: bool = False,
) -> torch.Tensor:
    """Asymmetric loss for several labels per image (Ridnik et al. 2021, arXiv 2009.14119, equations 4 to 7).

    ``L+ = (1 - p)^positive log p`` where a class is present; ``L- = q^negative log(1 - q)`` with ``q = max(p - margin,
    0)`` where it is absent.

    Args:
        logits: (N, classes).
        targets: float (N, classes) in [0, 1]; NaN: not known.
        negative: focusing exponent of absent classes.
        positive: focusing exponent of present classes.
        margin: shift of an absent class's probability.
        detach: no gradient through the focusing weights, as in the authors' training script.

    Returns:
        Scalar: summed over classes, mean over images.
    """
    probability = logits.sigmoid()
    present = F.logsigmoid(logits)
    if positive:
        present = present * _weight((1 - probability) ** positive, detach)
    shifted = (probability - margin).clamp(min=0)
    # log(1 - q) is exact near p = 1 only through the logits when there is no margin
    absent = F.logsigmoid(-logits) if margin == 0 else torch.log1p(-shifted)
    if negative:
        absent = absent * _weight(shifted**negative, detach)
    targets, known = known_targets(targets)
    return -((targets * present + (1 - targets) * absent) * known).sum(1).mean()


def asymmetric_single_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    negative: float = 4.0,
    positive: float = 0.0,
    smoothing: float = 0.1,
    detach: bool = False,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """The authors' asymmetric loss for one label per image, by a softmax (Ridnik et al. 2021, arXiv 2009.14119, and
    their code): smoothed cross-entropy, whose terms are focused as those of :func:`asymmetric_loss`.

    ``- sum over classes of s * w * log p``, with the smoothed target ``s``, and ``w = (1 - p)^positive`` of the image's
    class, ``w = p^negative`` of all others: without smoothing these count for nothing.

    Args:
        logits: (N, classes).
        targets: float (N, classes), one-hot or mixed.
        negative: focusing exponent of the other classes.
        positive: focusing exponent of the image's class.
        smoothing: share of the target spread over all classes.
        detach: no gradient through the focusing weights.
        weight: (classes,), of each class; None: 1.

    Returns:
        Scalar: summed over classes, mean over images.
    """
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    focus = _weight(targets * (1 - p) ** positive + (1 - targets) * p**negative, detach)
    smooth = targets * (1 - smoothing) + smoothing / logits.shape[1]
    each = smooth * focus * log_p
    return -(each if weight is None else each * weight).sum(1).mean()


def _weight(value: torch.Tensor, detach: bool) -> torch.Tensor:
    return value.detach() if detach else value


def known_targets(targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets with 0 where they are NaN, and 1 where they are known, 0 where not."""
    return targets.nan_to_num(), (~targets.isnan()).to(targets.dtype)


def focal_loss(logits: torch.Tensor, targets: torch.Tensor, *, gamma: float = 2.0, alpha: float = 0.25) -> torch.Tensor:
    """Focal loss (Lin et al. 2017, arXiv 1708.02002, equation 5), class by class.

    Args:
        logits: (N, classes).
        targets: float (N, classes) in [0, 1]; NaN: not known.
        gamma: focusing exponent.
        alpha: weight of present classes; absent ones have 1 - alpha.

    Returns:
        Scalar: summed over classes, mean over images.
    """
    targets, known = known_targets(targets)
    probability = logits.sigmoid()
    present = -alpha * (1 - probability) ** gamma * F.logsigmoid(logits)
    absent = -(1 - alpha) * probability**gamma * F.logsigmoid(-logits)
    return ((targets * present + (1 - targets) * absent) * known).sum(1).mean()


def two_way_loss(
    logits: torch.Tensor, targets: torch.Tensor, *, positive: float = 4.0, negative: float = 1.0
) -> torch.Tensor:
    """Two-way loss (Kobayashi, "Two-way multi-label loss", CVPR 2023): present logits above absent ones, within an
    image and within a class.

    Args:
        logits: (N, classes).
        targets: (N, classes), present above one half; NaN: not known.
        positive: temperature of present logits.
        negative: of absent ones.

    Returns:
        Scalar: mean over the images that have a class, plus mean over the classes that an image has.
    """
    present, absent = targets > 0.5, targets <= 0.5  # NaN is neither
    out = logits.sum() * 0
    for axis in (1, 0):
        least = _log_sum_exp(-logits / positive, present, axis) * positive
        most = _log_sum_exp(logits / negative, absent, axis) * negative
        counted = present.any(axis)
        if counted.any():
            out = out + F.softplus(least + most)[counted].mean()
    return out


def zlpr_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Zero-bounded log-sum-exp and pairwise rank loss (ZLPR: Su et al. 2022, arXiv 2208.02955): present logits
    above 0, absent ones below.

    Args:
        logits: (N, classes).
        targets: (N, classes), present above one half; NaN: not known.

    Returns:
        Scalar: mean over images.
    """
    present = _log_sum_exp(-logits, targets > 0.5, 1)
    absent = _log_sum_exp(logits, targets <= 0.5, 1)
    return (F.softplus(present) + F.softplus(absent)).mean()


def _log_sum_exp(values: torch.Tensor, counted: torch.Tensor, axis: int) -> torch.Tensor:
    """Over what is counted; a very low number, whose exponential is 0, where nothing is."""
    return values.masked_fill(~counted, torch.finfo(values.dtype).min / 8).logsumexp(axis)


def build_loss(recipe: Recipe, class_counts: torch.Tensor, *, multilabel: bool) -> Loss:
    """The recipe's loss.

    Args:
        recipe: loss, label smoothing, class weights.
        class_counts: int64 (classes,), images per class in train.
        multilabel: labels are float (N, classes) with several ones.

    Returns:
        A function of float logits and labels, also of mixed labels.
    """
    classes = len(class_counts)
    weight = None
    if recipe.class_weights:
        inverse = 1.0 / class_counts.clamp(min=1).float()
        weight = inverse * classes / inverse.sum()  # mean 1

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        own_weight = None if weight is None else weight.to(logits.device)
        if recipe.loss == "cross-entropy" and not multilabel:
            return F.cross_entropy(logits, labels, weight=own_weight, label_smoothing=recipe.label_smoothing)
        targets = labels if labels.ndim == 2 else F.one_hot(labels, classes).to(logits.dtype)
        if recipe.loss == "asymmetric" and not multilabel:
            return asymmetric_single_loss(
                logits,
                targets,
                negative=recipe.asymmetric_negative,
                positive=recipe.asymmetric_positive,
                smoothing=recipe.label_smoothing,
                detach=recipe.asymmetric_detach,
                weight=own_weight,
            )
        if recipe.partial == "negative":
            targets = targets.nan_to_num()
        if (special := _special(recipe, logits, targets)) is not None:
            return special
        if recipe.label_smoothing:
            spread = 0.5 if multilabel else 1 / classes
            targets = targets * (1 - recipe.label_smoothing) + recipe.label_smoothing * spread
        return partial_bce(logits, targets, own_weight)

    return loss


def _special(recipe: Recipe, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor | None:
    """The losses for several labels that know neither smoothing nor class weights; None: it is none of them."""
    if recipe.loss == "asymmetric":
        return asymmetric_loss(
            logits,
            targets,
            negative=recipe.asymmetric_negative,
            positive=recipe.asymmetric_positive,
            margin=recipe.asymmetric_margin,
            detach=recipe.asymmetric_detach,
        )
    if recipe.loss == "focal":
        return focal_loss(logits, targets, gamma=recipe.focal_gamma, alpha=recipe.focal_alpha)
    if recipe.loss == "two-way":
        return two_way_loss(logits, targets)
    return zlpr_loss(logits, targets) if recipe.loss == "zlpr" else None


def partial_bce(logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Binary cross-entropy, mean over what is known.

    Args:
        logits: (N, classes).
        targets: float (N, classes) in [0, 1]; NaN: not known.
        weight: (classes,), of each class; None: 1.
    """
    if not targets.isnan().any():
        return F.binary_cross_entropy_with_logits(logits, targets, weight=weight)
    targets, known = known_targets(targets)
    each = F.binary_cross_entropy_with_logits(logits, targets, weight=weight, reduction="none")
    return (each * known).sum() / known.sum().clamp(min=1)


def distillation_loss(
    logits: torch.Tensor, teacher: torch.Tensor, *, temperature: float, multilabel: bool = False
) -> torch.Tensor:
    """How far the student is from the teacher (Hinton et al. 2015): KL divergence of softened outputs, times the
    temperature squared.
    """
    if multilabel:
        soft = (teacher / temperature).sigmoid()
        return F.binary_cross_entropy_with_logits(logits / temperature, soft) * temperature**2
    student = F.log_softmax(logits / temperature, 1)
    return (
        F.kl_div(student, F.log_softmax(teacher / temperature, 1), reduction="batchmean", log_target=True)
        * temperature**2
    )


def similarity_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """How differently two networks see a batch's images resemble each other (Tung and Mori 2019, arXiv 1907.09682,
    equation 4): it needs no layer that maps the features of one to those of the other.

    Args:
        student: features (N, C).
        teacher: (N, C'), C' as it likes.

    Returns:
        Scalar: mean square difference of the similarities, each row of them of length 1.
    """
    ours, theirs = (F.normalize(each.flatten(1) @ each.flatten(1).T, dim=1) for each in (student, teacher))
    return (ours - theirs).square().mean()
