"""Decaying from a state of another run's stable phase, as one long run would have."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

from convscale.errors import UserError, first_line
from convscale.learn.checkpoint import load_state
from convscale.learn.loop import Trainer
from convscale.learn.recipe import Recipe
from convscale.learn.resume import restore
from convscale.learn.schedule import lr_factor
from convscale.read import object_of

_STABLE = ("wsd", "constant")
_NEAR = 1e-6


def recipe_of_state(place: Path) -> Recipe:
    """The recipe of the run that a training state belongs to.

    Raises:
        UserError: it is no training state.
    """
    found, about, _, _ = load_state(place)
    return Recipe.from_dict(object_of(about.get("recipe"), f"the recipe of {found}"))


def check_branch(place: Path, recipe: Recipe) -> None:
    """Whether ``recipe`` can decay from a training state.

    Raises:
        UserError: it is no training state, stands in the warm-up or the decay of its own run, or would already lie in
            the decay of ``recipe``.
    """
    found, about, state, _ = load_state(place)
    try:
        group, numbers = state["optimizer"]["param_groups"][0], state["numbers"]
        rate = group["lr"] / (group["lr_scale"] * numbers["lr_scale"])
        done = numbers["epoch"] + numbers["step"] / about["steps_per_epoch"]
    except (KeyError, IndexError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"training state {found} is damaged, or of another version ({first_line(error)})") from error
    before = recipe_of_state(found)
    if before.schedule not in _STABLE:
        raise UserError(
            f"branch {found} is of a run with schedule {before.schedule}; it must be {' or '.join(_STABLE)}"
        )
    if not math.isclose(rate, before.lr, rel_tol=_NEAR):
        raise UserError(
            f"branch {found} stands at {rate / before.lr:.3g} of its run's peak rate, in the warm-up or the decay; "
            "take a state of the stable phase (--keep keeps more of them)"
        )
    if lr_factor(recipe, done / recipe.epochs, recipe.epochs) < 1 - _NEAR:
        start = (1 - recipe.decay_share) * recipe.epochs
        raise UserError(
            f"branch {found} stands after {done:g} epochs, and the decay of {recipe.epochs} epochs begins after "
            f"{start:g}; give more epochs, or a smaller decay_share"
        )


def branch_off(trainer: Trainer, place: Path) -> None:
    """Put ``trainer`` where a training state stands that ``check_branch`` let through; nothing is written."""
    found = restore(trainer, place)
    trainer.job.progress({"kind": "note", "text": f"goes on from {found}, and decays"})


def keep_best(trainer: Trainer) -> None:
    """Write the best network that the run knows into its folder."""
    if trainer.folder is None or trainer.best_weights is None:
        return
    best = copy.deepcopy(trainer.watched)
    best.load_state_dict(trainer.best_weights)
    metrics: dict[str, Any] = {"history": trainer.history, "best": trainer.best, "epoch": trainer.best["epoch"]}
    with trainer.trouble.held():
        trainer.folder.save_best(trainer.best["epoch"] * trainer.steps_per_epoch, best, metrics)
