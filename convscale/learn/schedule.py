"""The learning rate, and the images' size, as functions of where the run stands; no state, so a resumed run can not get
them wrong.
"""

from __future__ import annotations

import math

from convscale.conditions import Size, as_size, sides
from convscale.learn.recipe import Recipe


def lr_factor(recipe: Recipe, position: float, epochs: float) -> float:
    """Learning rate over its peak.

    Args:
        recipe: names the schedule and its options.
        position: share of the run that is done, in [0, 1].
        epochs: length of the whole run.

    Returns:
        Linear from ``start_factor`` to 1 while warming up; then, with z the share of what follows: one-cycle and cosine
        ``max(final_factor, (1 + cos(pi z)) / 2)`` (Smith and Topin 2018; Loshchilov and Hutter 2017), exponential
        ``decay_rate ** (epoch / decay_epochs)``, step the same with a whole exponent, the epoch counted from the run's
        start (Tan and Le 2019, section 5.2), multistep ``decay_rate`` to the number of
        ``decay_at`` that have passed; wsd 1 (Hu et al. 2024, arXiv 2404.06395, section 4), and over the last
        ``decay_share`` of the run, z the share of these that is done, ``max(final_factor, 1 - sqrt(z))`` (Hägele et al.
        2024, arXiv 2405.18392, equation 1). Where the head is trained first, the schedule starts when all layers join
        it; until then the rate stands at its peak.
    """
    position = min(max(position, 0.0), 1.0)
    if recipe.schedule_epochs:
        position, epochs = position * epochs / recipe.schedule_epochs, float(recipe.schedule_epochs)
    if 0 < recipe.freeze_epochs < epochs:
        frozen = recipe.freeze_epochs / epochs
        if position < frozen:
            return 1.0
        position, epochs = (position - frozen) / (1 - frozen), epochs - recipe.freeze_epochs
    warmup = min(recipe.warmup_epochs / epochs, 0.9)
    if recipe.schedule == "onecycle" and recipe.warmup_epochs == 0:
        warmup = 0.25
    if position < warmup:
        return recipe.start_factor + (1 - recipe.start_factor) * position / warmup
    if recipe.schedule == "constant":
        return 1.0
    if recipe.schedule == "wsd":
        start = max(1 - recipe.decay_share, warmup)
        return 1.0 if position <= start else max(recipe.final_factor, 1 - math.sqrt((position - start) / (1 - start)))
    if recipe.schedule in ("onecycle", "cosine"):
        rest = (position - warmup) / (1 - warmup)
        return max(recipe.final_factor, 0.5 * (1 + math.cos(math.pi * rest)))
    if recipe.schedule == "multistep":
        return recipe.decay_rate ** sum(position * epochs + 1e-9 >= at for at in recipe.decay_epochs_at())
    exponent = position * epochs / recipe.decay_epochs
    return recipe.decay_rate ** (math.floor(exponent + 1e-9) if recipe.schedule == "step" else exponent)


def epoch_at(epoch: int, elapsed: float, max_seconds: float | None, recipe: Recipe) -> float:
    """The epoch (counted from 0) that a run of all the recipe's epochs would be in: one that time ends has fewer,
    and goes through them faster.
    """
    return epoch if max_seconds is None else max(epoch, min(1.0, elapsed / max_seconds) * recipe.epochs)


def image_size_at(epoch: float, whole: Size, recipe: Recipe) -> Size:
    """The images' size in pixels in an epoch (counted from 0), by progressive resizing: from the recipe's share of the
    ``whole`` size, linearly to all of it at three quarters of the run, in steps of 4 pixels.
    """
    share = recipe.progressive
    if share == 1:
        return whole
    grown = share + (1 - share) * min(1.0, epoch / max(1.0, 0.75 * recipe.epochs))
    return as_size(*(min(side, max(4, round(side * grown / 4) * 4)) for side in sides(whole)))
