"""A tiny data set and a tiny space that the tests of the search share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convscale.arch.parts import InputSpec, StemSpec
from convscale.images.splits import ArraySplit, DataSplits
from convscale.nas.choices import StageChoices
from convscale.nas.space import SearchSpace

SIDE, CLASSES = 12, ("red", "green", "blue")


def _pictures(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise whose strongest channel is the class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % len(CLASSES)
    pixels = rng.integers(0, 140, (count, SIDE, SIDE, 3))
    pixels[np.arange(count), :, :, labels] += 90
    return pixels.astype(np.uint8), labels


def _split(name: str, count: int, seed: int) -> ArraySplit:
    pixels, labels = _pictures(count, seed)
    return ArraySplit(
        split=name, classes=CLASSES, labels=torch.tensor(labels), channels=3, pixels=torch.from_numpy(pixels)
    )


@pytest.fixture(scope="session")
def colours() -> DataSplits:
    """72 train, 36 validation and 12 test images of three colours."""
    sets = [_split(name, n, seed) for seed, (name, n) in enumerate([("train", 72), ("validation", 36), ("test", 12)])]
    return DataSplits(train=sets[0], validation=sets[1], test=sets[2], classes=CLASSES)


@pytest.fixture(scope="session")
def colour_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as files."""
    folder = tmp_path_factory.mktemp("colours")
    for seed, (name, count) in enumerate([("train", 72), ("val", 36), ("test", 12)]):
        pixels, labels = _pictures(count, seed)
        for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            place = folder / name / CLASSES[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def tiny() -> SearchSpace:
    """144 networks of two stages at 12 px."""
    return SearchSpace(
        name="tiny",
        stages=(
            StageChoices(kinds=("basic", "depthwise_separable"), widths=(8, 16), depths=(1, 2)),
            StageChoices(
                kinds=("basic", "inverted_residual"),
                widths=(16, 24),
                depths=(1, 2, 3),
                expansions=(2.0, 3.0),
                stride=2,
            ),
        ),
        stems=(StemSpec(widths=(8,), stride=2),),
        image_sizes=(SIDE,),
        input=InputSpec(size=SIDE),
    )
