"""The report of a training run: its curves, how it was trained, what it cost."""

from __future__ import annotations

import math
import os
from pathlib import Path

from convscale import words
from convscale.conditions import size_text
from convscale.errors import UserError
from convscale.files import json_numbers, write_text
from convscale.learn.recipe import Recipe
from convscale.learn.record import Kept, TrainRecord, metric_of, read_train_run
from convscale.show import fit_sections, plots
from convscale.show.detection import detection_sections
from convscale.show.fit_parts import Epoch
from convscale.show.fit_record import FitRecord
from convscale.show.json_values import from_json
from convscale.show.page import Figures, Section, definitions, page, paragraph


def write_train_report(run_dir: str | os.PathLike[str], output: str | os.PathLike[str] | None = None) -> Path:
    """Write ``report.html`` into the folder of ``convscale train``, or another file.

    Returns:
        The path of the report.

    Raises:
        UserError: the folder holds no training run, or its log is damaged.
    """
    folder = Path(run_dir)
    for name in ("log.jsonl", "recipe.yaml"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has neither a fit.json nor a training run's {name}; there is nothing to report")
    record = read_train_run(folder)
    figures = Figures()
    boxes = detection_sections(folder, figures)
    sections = [_curves(record, figures), *boxes, _cost(record), _recipe(record.recipe), _trained(record)]
    best = record.best
    kept = record.kept or (Kept(metric_of(best), best["epoch"]) if best else None)
    if kept is None:
        result = "No epoch was finished."
    else:
        name = "mean average precision" if record.multilabel else "top-1"
        when = f"in epoch {kept.epoch}" if kept.epoch else "before the first epoch, with the head that was solved"
        result = f"Best on validation: {name} {words.percent(kept.metric, 2)} {when}."
    text = page(
        title=folder.resolve().name,
        kicker=f"convscale train · {record.recipe.name}",
        head=paragraph(result),
        sections=[section for section in sections if section is not None],
        figures=figures,
    )
    path = folder / "report.html" if output is None else Path(output)
    write_text(path, text)
    return path


def _curves(record: TrainRecord, figures: Figures) -> Section | None:
    """Loss and accuracy by epoch, and the learning rate."""
    plain = json_numbers(list(record.history))
    rows = tuple(from_json(Epoch, {**row, "val_top1": metric_of(row)}, "log.jsonl") for row in plain)
    section = fit_sections.training(FitRecord(history=rows, recipe=record.recipe.to_dict()), figures)
    if section is None:
        return None
    return Section(
        title="Curves",
        body=section.body + figures.add(plots.rates(rows), label="Learning rate by epoch"),
        anchor="curves",
    )


def _cost(record: TrainRecord) -> Section | None:
    """Where the time went."""
    if not record.history:
        return None
    last = record.history[-1]
    shares = [row["wait_share"] for row in record.history if math.isfinite(row["wait_share"])]
    facts = [
        ("Time", words.seconds(last["seconds"])),
        ("Waiting for images", words.percent(sum(shares) / len(record.history))),
        ("Steps left out", str(last["skipped_steps"] or "none")),
    ]
    return Section(title="Cost", body=definitions(facts), anchor="cost")


def _recipe(recipe: Recipe) -> Section:
    facts = [(str(key), str(value)) for key, value in recipe.to_dict().items()]
    return Section(title="Recipe", body=definitions(facts), anchor="recipe")


def _trained(record: TrainRecord) -> Section | None:
    """Classes, preprocessing and versions."""
    if record.preprocessing is None:
        return None
    facts = [
        ("Classes", ", ".join(record.classes)),
        ("Image size", f"{size_text(record.preprocessing.image_size)} px"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in record.versions.items())),
    ]
    return Section(title="What was trained", body=definitions(facts), anchor="trained")
