"""What is minimised: cross-entropy, binary cross-entropy, the asymmetric loss, and a teacher's say."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from convscale.learn.recipe import Recipe

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits (N, classes), labels int64 (N,) or float (N, classes)) -> scalar."""


def asymmetric_loss(
    logits: torch.Tensor, targets: torch.Tensor, *, negative: float = 4.0, positive: float = 0.0, margin: float = 0.05
) -> torch.Tensor:
    """Asymmetric loss for several labels per image (Ridnik et al. 2021, arXiv 2009.14119, equations 4 to 7).

    ``L+ = (1 - p)^positive log p`` where a class is present; ``L- = q^negative log(1 - q)`` with ``q = max(p - margin,
    0)`` where it is absent.

    Args:
        logits: (N, classes).
        targets: float (N, classes) in [0, 1].
        negative: focusing exponent of absent classes.
        positive: focusing exponent of present classes.
        margin: shift of an absent class's probability.

    Returns:
        Scalar: summed over classes, mean over images.
    """
    probability = logits.sigmoid()
    present = F.logsigmoid(logits)
    if positive:
        present = present * (1 - probability) ** positive
    shifted = (probability - margin).clamp(min=0)
    # log(1 - q) is exact near p = 1 only through the logits when there is no margin
    absent = F.logsigmoid(-logits) if margin == 0 else torch.log1p(-shifted)
    if negative:
        absent = absent * shifted**negative
    return -(targets * present + (1 - targets) * absent).sum(1).mean()


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
        if recipe.loss == "asymmetric":
            return asymmetric_loss(
                logits,
                targets,
                negative=recipe.asymmetric_negative,
                positive=recipe.asymmetric_positive,
                margin=recipe.asymmetric_margin,
            )
        if recipe.label_smoothing:
            spread = 0.5 if multilabel else 1 / classes
            targets = targets * (1 - recipe.label_smoothing) + recipe.label_smoothing * spread
        return F.binary_cross_entropy_with_logits(logits, targets, weight=own_weight)

    return loss


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
