"""The report of a training run: its curves, how it was trained, what it cost."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from convscale import words
from convscale.errors import UserError, first_line
from convscale.files import write_text
from convscale.show import fit_sections, plots
from convscale.show.fit_record import Epoch, FitRecord
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
    rows, recipe, about = _read(folder)
    figures = Figures()
    sections = [_curves(rows, recipe, figures), _cost(rows), _recipe(recipe), _trained(about)]
    best = max((row for row in rows if _metric(row) is not None), key=lambda row: _metric(row) or 0.0, default=None)
    said = (
        "No epoch was finished."
        if best is None
        else f"Best on validation: {_name(best)} {words.percent(_metric(best), 2)} in epoch {best['epoch']}."
    )
    text = page(
        title=folder.resolve().name,
        kicker=" · ".join(("convscale train", str(recipe.get("name") or ""))).rstrip(" ·"),
        head=paragraph(said),
        sections=[section for section in sections if section is not None],
        figures=figures,
    )
    path = folder / "report.html" if output is None else Path(output)
    write_text(path, text)
    return path


def _read(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """The history, the recipe and what the newest checkpoint says of itself."""
    try:
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")) or {}
        places = sorted((folder / "checkpoints").glob("*/checkpoint.json"))
        about = json.loads(places[-1].read_text(encoding="utf-8")) if places else {}
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} has neither a fit.json nor a training run's {Path(error.filename).name}; there is nothing to "
            "report"
        ) from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{folder}: its log can not be read ({first_line(error)})") from error
    return rows, recipe, about


def _metric(row: Mapping[str, Any]) -> float | None:
    return row["val_map"] if row.get("val_map") is not None else row.get("val_top1")


def _name(row: Mapping[str, Any]) -> str:
    return "mean average precision" if row.get("val_map") is not None else "top-1"


def _curves(rows: list[dict[str, Any]], recipe: Mapping[str, Any], figures: Figures) -> Section | None:
    """Loss and accuracy by epoch, and the learning rate."""
    shown = tuple(from_json(Epoch, {**row, "val_top1": _metric(row)}, "log.jsonl") for row in rows)
    section = fit_sections.training(FitRecord(history=shown, recipe=recipe), figures)
    if section is None:
        return None
    return Section(
        title="Curves",
        body=section.body + figures.add(plots.rates(shown), label="Learning rate by epoch"),
        anchor="curves",
    )


def _cost(rows: list[dict[str, Any]]) -> Section | None:
    """Where the time went."""
    if not rows:
        return None
    waited = sum(row.get("wait_share") or 0.0 for row in rows) / len(rows)
    facts = [
        ("Time", words.seconds(rows[-1].get("seconds"))),
        ("Waiting for images", words.percent(waited)),
        ("Steps left out", str(rows[-1].get("skipped_steps") or "none")),
    ]
    return Section(title="Cost", body=definitions(facts), anchor="cost")


def _recipe(recipe: Mapping[str, Any]) -> Section:
    return Section(
        title="Recipe", body=definitions([(str(key), str(value)) for key, value in recipe.items()]), anchor="recipe"
    )


def _trained(about: Mapping[str, Any]) -> Section | None:
    """Classes, preprocessing and versions."""
    if not about:
        return None
    versions = ", ".join(f"{name} {version}" for name, version in (about.get("versions") or {}).items())
    size = (about.get("preprocessing") or {}).get("image_size")
    facts = [
        ("Classes", ", ".join(map(str, about.get("classes") or ()))),
        ("Image size", f"{size} px" if size else ""),
        ("Versions", versions),
    ]
    return Section(title="What was trained", body=definitions(facts), anchor="trained")
