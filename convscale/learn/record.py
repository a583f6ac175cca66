"""A training run as a typed value: what its folder says of it. No torch is imported.

A run's folder holds ``recipe.yaml``, ``log.jsonl`` (one row for each epoch) and checkpoints, each with a
``checkpoint.json``. Folders of every version can be read: what an older one did not write is None or empty.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast

from convscale.errors import UserError, first_line
from convscale.images.preprocess import Preprocessing
from convscale.learn.recipe import Recipe
from convscale.read import TRUSTED_NUMBERS, read_json, read_json_lines, read_yaml

PREDICTIONS = "test_predictions.json"
"""Beside a run: what its network says of each test image, see ``show.predictions``."""
SCHEMA_VERSION = 1
"""Raised when an older convscale could not read a run's folder; ``checkpoint.json`` holds it as ``record_version``."""


class Best(TypedDict):
    """The best validation result so far, as checkpoints keep it."""

    metric: float
    """-1 before the first."""
    loss: float
    """Of the validation."""
    epoch: int
    """After which it was reached; 0: before the first, with a solved head."""
    thresholds: list[float] | None
    """For several labels: per class the probability above which it is present."""
    temperatures: list[float] | None
    """For several labels: per class what its logit is divided by."""


class EpochRow(TypedDict):
    """One epoch of a run's history."""

    epoch: int
    """Counted from 1."""
    train_loss: float
    """Mean over the epoch's images; NaN where no step could be taken."""
    val_loss: float
    """Mean over the validation images."""
    val_top1: float
    """Share of validation images that are right, in [0, 1]."""
    val_map: float | None
    """Mean average precision on validation; None but for several labels."""
    lr: float
    """Learning rate of the last step."""
    images: int
    """Training images that were processed."""
    train_seconds: float
    """In training steps, waiting for images included."""
    images_per_s: float
    """While training."""
    wait_share: float
    """Share of ``train_seconds`` that was waiting for images."""
    seconds: float
    """Since the run's start, pauses left out."""
    skipped_steps: int
    """Since the run's start: without a finite loss and gradient."""


_WHOLE = ("epoch", "images", "skipped_steps")
_NUMBERS = ("train_loss", "val_loss", "val_top1", "lr", "train_seconds", "images_per_s", "wait_share", "seconds")


def metric_of(row: EpochRow) -> float:
    """What is to be highest: mean average precision for several labels, else top-1."""
    return row["val_top1"] if row["val_map"] is None else row["val_map"]


def complete_row(row: Mapping[str, object], images: int) -> EpochRow:
    """A row of the history; one of an older version, which did not count, is taken for a whole epoch of ``images``.

    Numbers that are missing, or null (as JSON has what is not finite), are NaN; counts are 0.

    Raises:
        ValueError: a value is no number.
    """
    values = {key: _number(key, row.get(key)) for key in _NUMBERS}
    counts = {key: _number(key, row.get(key, 0)) for key in _WHOLE}
    if "images" not in row:
        rate = values["images_per_s"]
        known = math.isfinite(rate) and rate > 0
        counts["images"], values["train_seconds"] = (images, images / rate) if known else (0, 0.0)
    average_precision = row.get("val_map")
    every: dict[str, object] = {**values, **{key: int(value) for key, value in counts.items()}}
    every["val_map"] = None if average_precision is None else _number("val_map", average_precision)
    return cast(EpochRow, {key: every[key] for key in EpochRow.__annotations__})


class Kept(NamedTuple):
    """The network of a run that was kept: of an epoch, of none yet, or between the run's start and an epoch's."""

    metric: float
    """On validation: top-1, or mean average precision for several labels."""
    epoch: int
    """After which it was reached; 0: before the first, with a solved head."""


@dataclass(frozen=True, kw_only=True)
class TrainRecord:
    """A training run as its folder tells of it."""

    schema_version: int
    """Of what was read; 0: written before there was one, or no checkpoint yet."""
    recipe: Recipe
    """With every override."""
    history: tuple[EpochRow, ...]
    """One row per epoch."""
    classes: tuple[str, ...] = ()
    """Class names; empty before the first checkpoint."""
    preprocessing: Preprocessing | None = None
    """How images become inputs; None before the first checkpoint."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of convscale, torch and Python, by name."""
    seed: int | None = None
    """Of everything random."""
    model: str = ""
    """The network's name; empty where it is not known."""
    data_digest: str | None = None
    """Of the images' names and labels, train and validation; the same for the same data."""
    val_digest: str | None = None
    """Of those of the validation images; None where it is not known."""
    val_images: int | None = None
    """Validation images; None where an older version did not say."""
    commit: str | None = None
    """What the repository that it was started in stood at."""
    kept: Kept | None = None
    """The network that was kept, as the newest checkpoint says; None where it says nothing."""
    compile: Mapping[str, Any] | None = None
    """What ``compile=auto`` came to, with gain, compile seconds and (but for older runs) mode; None where nothing was
    decided."""

    @property
    def best(self) -> EpochRow | None:
        """The epoch with the best validation result, the first of them; None before one is finished."""
        return max((row for row in self.history if math.isfinite(metric_of(row))), key=metric_of, default=None)

    @property
    def multilabel(self) -> bool:
        """Whether an image can have several labels."""
        return any(row["val_map"] is not None for row in self.history)


def read_train_run(folder: str | os.PathLike[str]) -> TrainRecord:
    """The record of a run's folder, of this or an older version.

    Raises:
        UserError: no training run's folder, a damaged one, or one of a newer version.
    """
    place = Path(folder)
    for name in ("log.jsonl", "recipe.yaml"):
        if not (place / name).is_file():
            raise UserError(f"{place} is no training run's folder: it has no {name}")
    try:
        log = [row for _, row in read_json_lines(place / "log.jsonl", "the log")]
        recipe = Recipe.from_dict(read_yaml(place / "recipe.yaml", "recipe") or {})
        newest = max((place / "checkpoints").glob("*-*/checkpoint.json"), key=_step, default=None)
        about = {} if newest is None else read_json(newest, "checkpoint", TRUSTED_NUMBERS)
        if not isinstance(about, dict) or not all(isinstance(row, dict) for row in log):
            raise ValueError("an object was expected")
        version = int(about.get("record_version", 0))
        if version > SCHEMA_VERSION:
            raise UserError(
                f"it has record version {version}, this convscale reads up to {SCHEMA_VERSION}; update convscale"
            )
        images = recipe.batch_size * int(about.get("steps_per_epoch", 0))
        preprocessing = about.get("preprocessing")
        return TrainRecord(
            schema_version=version,
            recipe=recipe,
            history=tuple(complete_row(row, images) for row in log),
            classes=tuple(map(str, _list(about.get("classes", [])))),
            preprocessing=None if preprocessing is None else Preprocessing.from_dict(preprocessing),
            versions={str(name): str(value) for name, value in about.get("versions", {}).items()},
            seed=about.get("seed"),
            model=_model_of(about),
            data_digest=_text(about.get("data_digest")),
            val_digest=_text((about.get("splits") or {}).get("validation")),
            val_images=_count(about.get("val_images")),
            commit=_text(about.get("commit")),
            kept=_kept(about),
            compile=_compile(about),
        )
    except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{place}: its log can not be read ({first_line(error)})") from error


def _kept(about: Mapping[str, Any]) -> Kept | None:
    """What a checkpoint says of the best network so far."""
    metrics = about.get("metrics")
    best = metrics.get("best") if isinstance(metrics, Mapping) else None
    metric, epoch = (best.get("metric"), best.get("epoch")) if isinstance(best, Mapping) else (None, None)
    if not isinstance(metric, int | float) or isinstance(metric, bool) or not isinstance(epoch, int) or metric < 0:
        return None  # it is -1 before the first
    return Kept(float(metric), epoch)


def _compile(about: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a checkpoint says of ``compile=auto``."""
    metrics = about.get("metrics")
    found = metrics.get("compile") if isinstance(metrics, Mapping) else None
    return found if isinstance(found, Mapping) else None


def _step(about: Path) -> tuple[int, str]:
    """A checkpoint's step and kind, to order by."""
    kind, _, step = about.parent.name.partition("-")
    return (int(step) if step.isdecimal() else -1), kind


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _model_of(about: Mapping[str, object]) -> str:
    """The network's name as a checkpoint says it."""
    for key in ("model", "spec"):
        value = about.get(key)
        if isinstance(value, Mapping) and isinstance(value.get("name"), str):
            return value["name"]
        if isinstance(value, str):
            return value
    return ""


def _list(value: object) -> Sequence[object]:
    if not isinstance(value, list):
        raise ValueError(f"a list was expected, got {value!r}")
    return value


def _number(key: str, value: object) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} must be a number, got {value!r}")
    return float(value)


def reached(meta: Mapping[str, Any], folder: str) -> tuple[float, int | None] | None:
    """What a checkpoint's very weights reached on validation, and in which epoch; None where that is not known: a
    training state says what the best weights of its run reached, which need not be its own.

    Args:
        meta: what the checkpoint says of itself.
        folder: its name.
    """
    best = (meta.get("metrics") or {}).get("best") or {}
    metric = best.get("metric")
    if not folder.startswith("best-") or not isinstance(metric, int | float) or not metric >= 0:
        return None  # it is -1 before the first validation
    return float(metric), best.get("epoch")
