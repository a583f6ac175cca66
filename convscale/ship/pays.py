"""Whether 8 bits buy any speed here: of classifiers and of detectors, INT8 that is slower than float is not written."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from convscale.artifact.artifact import Artifact
from convscale.errors import UserError
from convscale.ship.tune import Settings, in_turns, settings_of
from convscale.words import exact

PAYS_BATCH = 8
"""Images per call where a single INT8 form is timed against float."""


class Slower(UserError):
    """INT8 is slower than float, so it is not written."""


def check_pays(artifact: Artifact, rival: Artifact, out_dir: str | os.PathLike[str]) -> None:
    """Time both in turns, under the INT8 form's settings.

    Raises:
        Slower: an INT8 artefact is slower than its float form.
    """
    how = replace(settings_of(artifact), batch_size=PAYS_BATCH, streams=1)
    ours, floats = in_turns([(artifact, how), (rival, how)])
    if ours.latency_s > floats.latency_s:
        raise slower(out_dir, how, ours.images_per_s, floats.images_per_s)


def slower(out_dir: str | os.PathLike[str], how: Settings, ours: float, floats: float) -> Slower:
    """The error for an INT8 form, by both speeds in images/s."""
    return Slower(
        f"artefact {Path(out_dir).name} is not written in INT8, which is slower than float here: {exact(ours)} against "
        f"{exact(floats)} images/s in {how.runtime} (batch {how.batch_size}, {how.threads} threads); leave int8 out or "
        "try another format"
    )
