"""A run's record becomes one HTML file that a person reads."""

from __future__ import annotations

import os
from pathlib import Path

from convscale.files import write_text
from convscale.show import fit_sections as sections
from convscale.show.fit_candidates import candidate_table, speeds
from convscale.show.fit_record import FitRecord, read_fit
from convscale.show.fit_shipping import shipping
from convscale.show.page import Figures, page


def write_fit_report(run_dir: str | os.PathLike[str], output: str | os.PathLike[str] | None = None) -> Path:
    """Write ``report.html`` beside the ``fit.json`` of a run, or another file: what was chosen and why, the pictures,
    the mistakes, the conditions.

    The file is self-contained (figures, pictures and the plotting library are inside) and asks nothing of the network.
    Parts that the record lacks are left out.

    Returns:
        The path of the report.

    Raises:
        UserError: the folder has no ``fit.json``, or it is damaged or of a newer schema.
    """
    path = Path(run_dir) / "report.html" if output is None else Path(output)
    write_text(path, fit_page(read_fit(run_dir), Path(run_dir)))
    return path


def fit_page(fit: FitRecord, folder: Path) -> str:
    """The report of the record of a fit in ``folder`` as one HTML document; any part of the record may be missing."""
    figures = Figures()
    found = [
        sections.picture(fit, figures),
        candidate_table(fit),
        sections.mistakes(fit, figures),
        sections.gallery(fit),
        sections.looked(fit),
        sections.training(fit, figures),
        shipping(fit),
        speeds(fit),
        sections.verification(fit),
        sections.use(fit, folder),
        sections.data(fit),
        sections.conditions(fit),
    ]
    winner = fit.winner.name or "No network was chosen"
    return page(
        title=winner,
        kicker=" · ".join(str(part) for part in ("convscale fit", fit.data.name, created(fit.created)) if part),
        head=sections.summary(fit),
        sections=[section for section in found if section is not None],
        figures=figures,
        meta={"convscale-winner": winner},
    )


def created(when: str | None) -> str:
    """When the run was made, to the minute."""
    text = when or ""
    return text[:16].replace("T", " ") + (" UTC" if text.endswith(("+00:00", "Z")) else "")
