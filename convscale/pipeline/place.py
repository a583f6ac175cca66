"""Where ``fit`` writes: a folder that may be replaced, but not with what the run itself reads in it."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

from convscale.files import check_output_dir, file_or_none
from convscale.images.splits import DataSplits
from convscale.pipeline.request import FitRequest


def checked_output(asked: FitRequest, splits: DataSplits) -> Path:
    """The output folder, looked at before anything is emptied; ``splits`` are the data, opened.

    Raises:
        UserError: as ``check_output_dir``; data, weights, rows or the recipe lie in a folder that is to be replaced.
    """
    inputs = [
        ("weights_dir", asked.start.weights_dir),
        ("init", asked.start.file),
        ("measured", asked.measured),
        ("recipe", file_or_none(asked.training.recipe)),
    ]
    read = chain(inputs, splits.places())
    return check_output_dir(asked.output, overwrite=asked.overwrite, resume=asked.resume, inputs=read)
