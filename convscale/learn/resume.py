"""Going on from a saved state, as the same run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convscale.errors import UserError, check_number, check_whole, first_line, short
from convscale.images.digest import is_digest_of
from convscale.learn.checkpoint import load_state, load_weights_into
from convscale.learn.loop import Trainer

_FIXED = (
    *("batch_size", "accumulate", "optimizer", "balanced", "precision", "layout"),
    *("weight_decay", "momentum", "beta2", "epsilon", "layer_decay", "others_lr"),
)
"""Keys of a recipe whose change would make a saved position or state mean something else, or that the saved state
brings back as they were.
"""


def restore(trainer: Trainer, output: Path) -> Path:
    """Put ``trainer`` where the newest undamaged training state of ``output`` stands; gives that state's folder."""
    place, about, state, notes = load_state(output)
    for note in notes:
        trainer.job.progress({"kind": "note", "text": note})
    _check_same(about, trainer, output)
    load_weights_into(trainer.watched, place)  # says clearly when the architecture differs
    try:
        for key in ("best_weights", "start_weights"):
            _check_weights(key, state["best_weights"] if key == "best_weights" else state.get(key), trainer)
        _check_position(state["numbers"])
        trainer.restore(state)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        said = f"it lacks {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"training state {place / 'state.json'} is damaged, or of another version ({said})") from error
    return place


def _check_weights(key: str, weights: object, trainer: Trainer) -> None:
    """Weights of the start, and the best so far, are loaded at the run's end: too late to find that they are none."""
    if weights is None:
        return
    own = {name: value.shape for name, value in trainer.watched.state_dict().items()}
    if not isinstance(weights, dict) or {name: getattr(value, "shape", None) for name, value in weights.items()} != own:
        raise ValueError(f"{key} are not those of the network")


def _check_position(numbers: Mapping[str, Any]) -> None:
    """Where a run stands, in numbers that can be counted on."""
    for key in ("epoch", "step", "updates", "skipped", "rollbacks", "bad_in_row"):
        check_whole(f"numbers.{key}", numbers[key], 0)
    for key in ("elapsed", "lr_scale"):
        check_number(f"numbers.{key}", numbers[key], "a number of at least 0", 0)
    check_whole("numbers.best.epoch", numbers["best"]["epoch"], 0)
    for part, keys in (("sums", ("loss", "images", "seconds", "wait")), ("best", ("metric", "loss"))):
        for key in keys:  # the best loss is infinite before the first epoch
            value = numbers[part][key]
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"numbers.{part}.{key} is {short(value)}; it must be a number")


def _other_data(about: Mapping[str, Any], trainer: Trainer, changed: Mapping[str, object]) -> str:
    """Which set a state was trained or validated on that is not the run's; empty: none, or that is not known."""
    job, written = trainer.job, about.get("splits")
    if written is not None and job.data is not None:  # as the data was opened: before it was shrunk or held in memory
        known = (job.data, job.data_older or {})
        for name in ("train", "validation"):
            if all(written.get(name) != digests.get(name) for digests in known):
                return f"another {name} set"
        return ""
    named = job.recipe.shrink or "shrink" in changed or "image_size" in changed  # images may have other names now
    if "data_digest" not in about or named:
        return ""
    same = is_digest_of(about["data_digest"], (job.loader.split, job.validation))
    return "" if same else "other train and validation sets"


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
    if (averages := _averages(about["recipe"])) != _averages(recipe):
        raise UserError(
            f"{output} was trained {'with' if averages else 'without'} averaged weights (ema_decay, ema_width); a "
            "resumed run keeps that"
        )
    steps = about.get("steps_per_epoch", trainer.steps_per_epoch)
    if steps != trainer.steps_per_epoch:
        raise UserError(
            f"{output} was trained with {steps} steps per epoch, now there would be {trainer.steps_per_epoch}; have "
            "images come or gone?"
        )
    if other := _other_data(about, trainer, changed):
        raise UserError(
            f"{output} was trained on {other} than this data has: images or labels have come, gone or changed; a "
            "resumed run keeps its data: give it as it was, or begin another run"
        )
    for key, value in changed.items():
        trainer.job.progress({"kind": "note", "text": f"resumed with another {key}: {recipe[key]} instead of {value}"})


def _averages(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe keeps averaged weights."""
    return bool(recipe.get("ema_decay") or recipe.get("ema_width"))
