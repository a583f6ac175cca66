"""Going on from a saved state, as the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from convscale.errors import UserError, first_line
from convscale.learn.checkpoint import load_state, load_weights_into
from convscale.learn.loop import Trainer

_FIXED = ("batch_size", "accumulate", "optimizer", "balanced")
"""Keys of a recipe whose change would make a saved position or state mean something else."""


def restore(trainer: Trainer, output: Path) -> Path:
    """Put ``trainer`` where the newest undamaged training state of ``output`` stands; gives that state's folder."""
    place, about, state, notes = load_state(output)
    for note in notes:
        trainer.job.progress({"kind": "note", "text": note})
    _check_same(about, trainer, output)
    load_weights_into(trainer.watched, place)  # says clearly when the architecture differs
    try:
        trainer.restore(state)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        said = f"it lacks {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"training state {place / 'state.json'} is damaged, or of another version ({said})") from error
    return place


def _check_same(about: dict[str, Any], trainer: Trainer, output: Path) -> None:
    """A resumed run has the seed, classes and steps it was started with; other changes are said."""
    job = trainer.job
    if missing := [key for key in ("seed", "recipe") if key not in about]:
        raise UserError(f"checkpoint in {output} lacks {', '.join(missing)}: no training can go on from it")
    if about["seed"] != job.seed:
        raise UserError(f"{output} was trained with seed {about['seed']}, not {job.seed}; a resumed run keeps its seed")
    if about["classes"] != list(job.loader.split.classes):
        raise UserError(
            f"{output} was trained on classes {about['classes']}, the data's are {list(job.loader.split.classes)}"
        )
    recipe = job.recipe.to_dict()
    changed = {
        key: value
        for key, value in about["recipe"].items()
        if key in recipe and value != recipe[key] and key not in ("name", "source")
    }
    for key in _FIXED:
        if key in changed:
            raise UserError(
                f"{output} was trained with {key} {changed[key]}, not {recipe[key]}; a resumed run keeps it"
            )
    steps = about.get("steps_per_epoch", trainer.steps_per_epoch)
    if steps != trainer.steps_per_epoch:
        raise UserError(
            f"{output} was trained with {steps} steps per epoch, now there would be {trainer.steps_per_epoch}; have "
            "images come or gone?"
        )
    for key, value in changed.items():
        trainer.job.progress({"kind": "note", "text": f"resumed with another {key}: {recipe[key]} instead of {value}"})
