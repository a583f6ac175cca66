"""A few images that travel with an artefact, and what it said of them: so that it can be checked where it arrives."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from convscale.conditions import sides
from convscale.errors import UserError
from convscale.files import write_json
from convscale.read import NO_NPY, OWN, Limits, object_of, read_bytes, read_json

if TYPE_CHECKING:
    from convscale.artifact.artifact import Artifact

IMAGES, ANSWERS = "reference.npy", "reference.json"
COUNT = 4
"""Images that are kept at most."""
TOLERANCE = {"fp32": 1e-3, "fp16": 1e-2, "int8": 0.1}
"""Largest difference of a probability, by the precision of the stored weights: another processor computes in another
order, and a rounded activation may flip."""
_BYTES = Limits(size=1 << 30)


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """Images and answers."""

    images: np.ndarray
    """uint8 (N, H, W, C)."""
    probabilities: np.ndarray
    """float32 (N, classes)."""


def write_reference(folder: Path, artifact: Artifact, images: np.ndarray | Sequence[np.ndarray]) -> None:
    """Keep a few images, spread over the first batch of those it was checked on, and the artefact's own answers."""
    first = images if isinstance(images, np.ndarray) else images[0]
    some = np.unique(np.linspace(0, len(first) - 1, min(COUNT, len(first))).round().astype(int))
    chosen = np.ascontiguousarray(first[some])
    with open(folder / IMAGES, "wb") as file:
        np.lib.format.write_array(file, chosen, version=(1, 0), allow_pickle=False)
    rows = [[float(f"{value:.7g}") for value in row] for row in artifact(chosen)]
    if all(math.isfinite(value) for row in rows for value in row):
        write_json(folder / ANSWERS, {"probabilities": rows})
    else:
        (folder / IMAGES).unlink()


def read_reference(artifact: Artifact) -> Reference | None:
    """What travels with an artefact; None where nothing does (those of versions before 0.2 have none).

    Raises:
        UserError: it is damaged.
    """
    folder, files = artifact.folder, artifact.manifest.files
    if IMAGES not in files or ANSWERS not in files:
        return None
    images = _images(read_bytes(folder / IMAGES, "file", _BYTES), artifact)
    rows = object_of(read_json(folder / ANSWERS, "file", OWN), ANSWERS).get("probabilities")
    try:
        answers = np.asarray(rows, np.float32)
    except (TypeError, ValueError):
        answers = np.zeros(0)
    if images is None or answers.shape != (len(images), len(artifact.classes)):
        raise UserError(f"artefact {folder} has damaged reference images or answers; export it again")
    return Reference(images=images, probabilities=answers)


def _images(data: bytes, artifact: Artifact) -> np.ndarray | None:
    """The images in an .npy file; None where it is none, or of others than the artefact takes."""
    file = io.BytesIO(data)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            return None
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except NO_NPY:
        return None
    right = (*sides(artifact.image_size), artifact.preprocessing.channels)
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[1:] != right or shape[0] < 1:
        return None
    if math.prod(shape) != len(data) - file.tell():
        return None
    return np.frombuffer(data, np.uint8, offset=file.tell()).reshape(shape)


def check_reference(artifact: Artifact, *, at_once: int | None = None) -> str:
    """Run an artefact on its reference images, and compare.

    One without any is run on seeded noise: its answers must be probabilities.

    Args:
        at_once: images of a call; None: all.

    Returns:
        What was found, in words.

    Raises:
        UserError: it does not say here what it said where it was exported.
    """
    reference = read_reference(artifact)
    if reference is None:
        return _check_noise(artifact, at_once)
    found = _answers(artifact, reference.images, at_once)
    worst = float(np.abs(found - reference.probabilities).max())  # NaN stays NaN
    allowed = TOLERANCE.get(artifact.precision, max(TOLERANCE.values()))
    if not worst <= allowed:
        raise UserError(
            f"artefact {artifact.folder} says something else of its reference images here: probabilities differ by "
            f"{worst:.2g}, {allowed:g} is allowed; export it again"
        )
    return f"{len(found)} reference images, probabilities differ by at most {worst:.1e}"


def _answers(artifact: Artifact, images: np.ndarray, at_once: int | None) -> np.ndarray:
    step = at_once or len(images)
    return np.concatenate([artifact(images[start : start + step]) for start in range(0, len(images), step)])


def _check_noise(artifact: Artifact, at_once: int | None) -> str:
    height, width = sides(artifact.image_size)
    shape = (2, height, width, artifact.preprocessing.channels)
    found = _answers(artifact, np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), at_once)
    whole = artifact.thresholds is not None or bool(np.abs(found.sum(axis=1) - 1).max() <= 1e-3)
    if not (np.isfinite(found).all() and found.min() >= 0 and found.max() <= 1.001 and whole):
        raise UserError(f"artefact {artifact.folder} gives no probabilities here; export it again")
    return "no reference images; its answers to noise are probabilities"
