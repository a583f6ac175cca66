"""Runs as their records tell of them, of every kind on one scale: a line each in a list, two beside each other."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from convscale import words
from convscale.artifact.manifest import MANIFEST, read_manifest, read_part
from convscale.errors import MOST_WHOLE, UserError
from convscale.learn.record import metric_of, read_train_run
from convscale.read import OWN, object_of, read_json
from convscale.show.fit_parts import Epoch, Form
from convscale.show.fit_record import FILE as FIT
from convscale.show.fit_record import FitRecord, read_fit
from convscale.show.json_values import from_json
from convscale.show.predictions import FILE as PREDICTIONS
from convscale.show.predictions import Predictions, read_predictions
from convscale.show.stated import Conditions
from convscale.stats import wilson

KINDS = ("fit", "train", "search", "scaling", "ship")
MOST = 100_000
"""Folders that are looked through."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is told of a run, whatever kind it is of; what its record lacks is None or empty."""

    path: Path
    """Its folder."""
    kind: str
    """One of ``KINDS``."""
    when: str = ""
    """When it began, or was last written, ISO 8601."""
    network: str = ""
    """Its name."""
    image_size: object = None
    """In pixels."""
    metric: str = ""
    """What ``accuracy`` is: ``top-1`` or ``mAP``, and of which images."""
    accuracy: float | None = None
    """In [0, 1]."""
    interval: tuple[float, float] | None = None
    """Its 95 % Wilson interval."""
    images: int | None = None
    """That it is of."""
    images_per_s: float | None = None
    """Of what is shipped; while training, of a training run."""
    conditions: str = ""
    """What that holds under, in words."""
    data: str = ""
    """The data set's name."""
    data_digest: str | None = None
    """Of its names and labels."""
    judged_digest: str | None = None
    """Of those images alone that its accuracy is of; None: not known."""
    seconds: float | None = None
    """What it took."""
    commit: str | None = None
    """What the repository stood at."""
    state: str = ""
    """``done``, how far it came (``7 of 12 epochs``, ``unfinished``), or why it can not be read."""

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        return {**vars(self), "path": str(self.path), "interval": list(self.interval) if self.interval else None}


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A run with all that is compared."""

    run: Run
    """Its line."""
    recipe: Mapping[str, object] = field(default_factory=dict)
    """Every key."""
    history: tuple[Epoch, ...] = ()
    """Its curves."""
    classes: tuple[str, ...] = ()
    """Names."""
    confusion: tuple[tuple[int, ...], ...] = ()
    """Rows are true, columns predicted."""
    per_class: tuple[float | None, ...] = ()
    """Share of each class's images that are right."""
    forms: Mapping[str, Form] = field(default_factory=dict)
    """Forms that were tried for shipping."""
    shipped: str = ""
    """The one that was shipped."""
    predictions: Predictions | None = None
    """What it says of each test image."""


def runs_below(top: str | os.PathLike[str]) -> list[Run]:
    """All runs in a folder and below, by their path; what a run holds inside is not told again.

    Raises:
        UserError: there is no such folder.
    """
    place = Path(top)
    if not place.is_dir():
        raise UserError(f"folder {place} does not exist; name one that holds runs")
    return [_told(folder, kind) for folder, kind in _found(place)]


def _found(top: Path) -> Iterator[tuple[Path, str]]:
    """Folders of runs, and of which kind each is."""
    for count, (folder, inside, files) in enumerate(os.walk(top)):
        if count >= MOST:
            raise UserError(f"{top} holds more than {MOST:,} folders; name one nearer to the runs")
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        kind = _kind(set(files))
        if kind:
            inside.clear()
            yield Path(folder), kind


def _kind(files: set[str]) -> str:
    if FIT in files:
        return "fit"
    if {"log.jsonl", "recipe.yaml"} <= files:
        return "train"
    if "study.json" in files:
        return "search"
    if "scaling.json" in files:
        return "scaling"
    return "ship" if MANIFEST in files else ""


def _told(folder: Path, kind: str) -> Run:
    read: dict[str, Callable[[Path], Run]] = {
        "fit": lambda place: _of_fit(place, read_fit(place)),
        "train": lambda place: _training(place).run,
        "search": _of_study,
        "scaling": _of_scaling,
        "ship": _of_artifact,
    }
    try:
        return read[kind](folder)
    except UserError as error:
        return Run(path=folder, kind=kind, state=str(error))


def whole_run(folder: str | os.PathLike[str]) -> Whole:
    """A run of ``fit`` or ``train`` with all that is compared.

    Raises:
        UserError: the folder holds none, or it is damaged.
    """
    place = Path(folder)
    if (place / FIT).is_file():
        record = read_fit(place)
        evaluation, found = record.evaluation, record.artifact.search
        return Whole(
            run=_of_fit(place, record),
            recipe=record.recipe,
            history=record.history,
            classes=tuple(record.class_names()),
            confusion=evaluation.confusion,
            per_class=evaluation.per_class,
            forms={} if found is None else found.forms,
            shipped="" if found is None else found.winner or "",
            predictions=_predictions(place),
        )
    if (place / "log.jsonl").is_file():
        return _training(place)
    raise UserError(f"{place} holds no run of convscale fit or train")


def _predictions(folder: Path) -> Predictions | None:
    return read_predictions(folder / PREDICTIONS) if (folder / PREDICTIONS).is_file() else None


# ---------------------------------------------------------------- each kind


def _of_fit(folder: Path, record: FitRecord) -> Run:
    ev = record.evaluation
    several = ev.mean_average_precision is not None
    interval = ev.top1_interval
    chosen = record.chosen
    speed, under = _fit_speed(record)
    return Run(
        path=folder,
        kind="fit",
        when=record.created or "",
        network=record.winner.name or "",
        image_size=record.data.image_size if chosen is None else chosen.image_size,
        metric="mAP, test" if several else "top-1, test",
        accuracy=record.top1,
        interval=(interval[0], interval[1]) if interval and len(interval) == 2 and not several else None,
        images=ev.n,
        images_per_s=speed,
        conditions=under,
        data=record.data.name or "",
        data_digest=record.data.digest,
        judged_digest=record.data.test_digest,
        seconds=record.timings.get("total_s"),
        commit=record.commit,
        state="done" if record.artifact.path and "total_s" in record.timings else "unfinished",
    )


def _fit_speed(record: FitRecord) -> tuple[float | None, str]:
    """What is shipped measured, else predicted for the device that is not here; and what that holds under."""
    measured, told = record.artifact.measurement, record.artifact.predicted
    if measured is not None:
        return measured.speed, f"{measured.conditions}; {measured.environment or record.machine}"
    told = told or (record.chosen.predicted if record.chosen else None)
    if told is None or told.images_per_s is None:
        return None, ""
    under = record.constraint.conditions or Conditions()
    return told.images_per_s, f"{replace(under, precision=told.precision or under.precision)}; predicted"


def _training(folder: Path) -> Whole:
    record = read_train_run(folder)
    best, kept = record.best, _predictions(folder)
    last = record.history[-1] if record.history else None
    rates = [row["images_per_s"] for row in record.history if math.isfinite(row["images_per_s"])]
    several = record.multilabel
    metric, images = "mAP, validation" if several else "top-1, validation", record.val_images
    share = record.kept.metric if record.kept else best and metric_of(best)
    interval = None if several else _interval(share, images)
    if kept is not None and kept.labels:
        metric, images, good = "top-1, test", len(kept.labels), sum(kept.right)
        share, interval = good / images, wilson(good, images)
    rows = tuple(
        from_json(Epoch, {**_finite(row), "val_top1": _finite(row).get("val_map") or _finite(row)["val_top1"]}, "log")
        for row in record.history
    )
    run = Run(
        path=folder,
        kind="train",
        when=datetime.fromtimestamp((folder / "log.jsonl").stat().st_mtime, UTC).isoformat(timespec="seconds"),
        network=record.model,
        image_size=None if record.preprocessing is None else record.preprocessing.image_size,
        metric=metric,
        accuracy=share,
        interval=interval,
        images=images,
        images_per_s=sum(rates) / len(rates) if rates else None,
        conditions=f"training, batch {record.recipe.batch_size}" if rates else "",
        data_digest=record.data_digest,
        judged_digest=record.val_digest if kept is None else None,
        seconds=None if last is None else last["seconds"],
        commit=record.commit,
        state=_how_far(0 if last is None else last["epoch"], record.recipe.epochs),
    )
    return Whole(
        run=run,
        recipe=record.recipe.to_dict(),
        history=rows,
        classes=record.classes if kept is None else kept.classes,
        confusion=() if kept is None else _confusion(kept),
        per_class=() if kept is None else _per_class(kept),
        predictions=kept,
    )


def _how_far(epochs: int, wanted: int) -> str:
    """Nothing in the folder tells a training that ended early (its minutes were over, it no longer gained) from one
    that was cut off, so neither is said.
    """
    return "done" if epochs >= wanted else f"{epochs} of {words.plural(wanted, 'epoch')}"


def _finite(row: Mapping[str, object]) -> dict[str, object]:
    """NaN as None."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}


def _confusion(kept: Predictions) -> tuple[tuple[int, ...], ...]:
    counts = [[0] * len(kept.classes) for _ in kept.classes]
    for label, said in zip(kept.labels, kept.predicted, strict=True):
        counts[label][said] += 1
    return tuple(map(tuple, counts))


def _per_class(kept: Predictions) -> tuple[float | None, ...]:
    rows = _confusion(kept)
    return tuple(row[i] / sum(row) if sum(row) else None for i, row in enumerate(rows))


def _inside(source: Mapping[str, object], key: str) -> Mapping[str, object]:
    found = source.get(key)
    return found if isinstance(found, dict) else {}


def _items(source: Mapping[str, object], key: str) -> list[object]:
    found = source.get(key)
    return found if isinstance(found, list) else []


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _interval(share: float | None, images: int | None) -> tuple[float, float] | None:
    """Wilson's, of a share of so many images that is right."""
    if share is None or images is None or not (0 < images <= MOST_WHOLE and 0 <= share <= 1):
        return None
    return wilson(round(share * images), images)


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _of_study(folder: Path) -> Run:
    """A search, as far as its record says: what is missing, or of another kind, is passed over."""
    path = folder / "study.json"
    value = object_of(read_json(path, "study", OWN), "study.json")
    result = _inside(value, "result")
    asked = _inside(value, "asked")
    best = _inside(result, "best")
    speed = _inside(result, "shipped") or _inside(best, "speed")
    under = _inside(result, "conditions")
    judged, accuracy = _inside(value, "judged"), _number(best.get("accuracy"))
    metric, images = _text(judged.get("metric")) or "top-1", judged.get("images")
    images = images if type(images) is int else None
    how = [str(Conditions.of(under)) if under else "", *(str(speed.get(key) or "") for key in ("how", "kind"))]
    return Run(
        path=folder,
        kind="search",
        when=datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds"),
        network=str(best.get("name") or ""),
        image_size=_inside(_inside(best, "spec"), "input").get("size"),
        metric=f"{metric}, validation" if best else "",
        accuracy=accuracy,
        interval=_interval(accuracy, images) if metric == "top-1" else None,
        images=images if best else None,
        images_per_s=_number(speed.get("images_per_s")),
        conditions="; ".join(part for part in how if part),
        data=Path(_text(asked.get("data"))).name,
        data_digest=_text(asked.get("data_digest")) or None,
        seconds=_number(_inside(value, "times").get("all")),
        commit=_text(value.get("commit")) or None,
        state="done" if best else "unfinished",
    )


def _of_scaling(folder: Path) -> Run:
    """A search for coefficients, as far as its record says; the accuracy is the best point's of those trained."""
    path = folder / "scaling.json"
    value = object_of(read_json(path, "study of scaling", OWN), "scaling.json")
    asked, rule, under = (_inside(value, key) for key in ("asked", "rule", "conditions"))
    points = [point for point in _items(value, "points") if isinstance(point, dict)]
    means = []
    for point in (each for each in points if not each.get("failed")):
        known = [number for item in _items(point, "accuracies") if (number := _number(item)) is not None]
        means += [sum(known) / len(known)] if known else []
    return Run(
        path=folder,
        kind="scaling",
        when=datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds"),
        network=_text(_inside(asked, "base").get("name")),
        metric="top-1, validation" if means else "",
        accuracy=max(means, default=None),
        conditions="; ".join(filter(None, (_text(asked.get("cost")), str(Conditions.of(under)) if under else ""))),
        data_digest=_text(asked.get("data_digest")) or None,
        seconds=sum(_number(point.get("seconds")) or 0.0 for point in points) or None,
        commit=_text(value.get("commit")) or None,
        state="done" if rule else "unfinished",
    )


def _of_artifact(folder: Path) -> Run:
    manifest = read_manifest(folder)
    checked = read_part(folder, "verification.json") if (folder / "verification.json").is_file() else {}
    checked = checked if isinstance(checked, dict) else {}
    interval, tuning = checked.get("accuracy_after_interval"), manifest.get("tuning")
    best = tuning.get("best") if isinstance(tuning, dict) else None
    best = best if isinstance(best, dict) else {}
    environment = tuning.get("environment") if isinstance(tuning, dict) else None
    device = environment.get("device_name") if isinstance(environment, dict) else None
    precision = str(tuning.get("precision") or manifest.precision) if isinstance(tuning, dict) else ""
    preprocessing = read_part(folder, "preprocessing.json")
    speed, under = best.get("images_per_s"), _tuned(best, precision, device) if best else ""
    if not best and (told := manifest.promise) is not None:
        named = ("device", "precision", "layout", "batch_size", "image_size", "runtime", "threads")
        speed, under = told.images_per_s, f"{Conditions(**{name: getattr(told, name) for name in named})}; predicted"
    return Run(
        path=folder,
        kind="ship",
        when=str(manifest.get("created") or ""),
        network=manifest.model,
        image_size=preprocessing.get("image_size") if isinstance(preprocessing, dict) else None,
        metric="top-1, check" if interval else "mAP, check" if checked.get("accuracy_after") is not None else "",
        accuracy=checked.get("accuracy_after"),
        interval=(interval[0], interval[1]) if isinstance(interval, list) and len(interval) == 2 else None,
        images=checked.get("n"),
        images_per_s=speed if isinstance(speed, int | float) else None,
        conditions=under,
        data_digest=_text(manifest.get("data_digest")) or None,
        commit=_text(manifest.get("commit")) or None,
        state="done",
    )


def _tuned(best: Mapping[str, object], precision: str, device: object) -> str:
    parts: Sequence[object] = (
        best.get("runtime"),
        precision,
        f"batch {best.get('batch_size')}",
        f"{best.get('threads')} threads, {best.get('streams')} streams",
    )
    return f"{', '.join(map(str, parts))}; {device or 'machine not recorded'}"
