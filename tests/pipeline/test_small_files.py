"""Small pictures in files are small images to ``fit``: by some of their headers; nothing is decoded or trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from convscale.images import extent
from convscale.images.extent import largest_side
from convscale.images.splits import DataSplits, FileSplit
from convscale.pipeline.older import as_version_0_1
from convscale.pipeline.request import Start, Training
from convscale.pipeline.size import default_size
from convscale.pipeline.steps import Fit
from tests.pipeline.test_asked import _request
from tests.pipeline.test_order import BASIS, SPEC, SPLITS, _contender, _record


def _splits(folder: Path, sizes: list[tuple[int, int]]) -> DataSplits:
    """One file of each width and height."""
    for number, size in enumerate(sizes):
        Image.new("RGB", size).save(folder / f"{number}.png")
    paths = tuple(str(folder / f"{number}.png") for number in range(len(sizes)))
    labels = torch.arange(len(sizes)) % 2
    train = FileSplit(split="train", classes=("a", "b"), labels=labels, channels=3, paths=paths)
    return DataSplits(train=train, validation=train, test=train, classes=("a", "b"))


@pytest.mark.parametrize(
    ("sizes", "side"),
    [
        ([(32, 32)] * 4, 32),
        ([(30, 18), (20, 33)], 36),  # the longest side, up to a multiple of 4
        ([(9, 9), (12, 10)], 28),
        ([(64, 64), (20, 20)], 64),
        ([(65, 20), (20, 20)], 224),
    ],
)
def test_files_are_built_for_at_their_own_size_where_that_is_small(
    sizes: list[tuple[int, int]], side: int, tmp_path: Path
) -> None:
    splits = _splits(tmp_path, sizes)
    assert default_size(splits) == side
    asked, named = _request(data=splits), _request(data=splits, candidates=SPEC.name, image_size=64)
    small = side <= 64
    assert (asked.from_scratch(splits), named.from_scratch(splits)) == (small, small)
    assert asked.recipe_for(splits, pretrained=False) == ("small" if small else "pictures")
    assert not _request(data=splits, training=Training(init="pretrained")).from_scratch(splits)


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize(
    ("given", "scratch", "recipe"),
    [
        ({}, True, "small"),
        ({"image_size": 64}, True, "small"),
        ({"image_size": 65}, False, "pictures"),
        ({"start": Start(scratch=False)}, True, "small"),  # as where it is left out
        ({"candidates": [SPEC], "start": Start(scratch=False)}, True, "small"),
        ({"image_size": 224, "start": Start(scratch=True)}, True, "pictures"),
        ({"candidates": SPEC.name}, False, "small"),  # its weights' own size
        ({"candidates": SPEC.name, "image_size": 32}, True, "small"),
        ({"candidates": [SPEC.name, "poolnet"], "image_size": 224}, False, "pictures"),
        ({"candidates": "poolnet"}, True, "small"),  # nobody released weights of it
    ],
)
def test_small_images_that_are_enlarged_are_as_others(
    given: dict[str, Any], scratch: bool, recipe: str, in_memory: bool, tmp_path: Path
) -> None:
    splits = SPLITS if in_memory else _splits(tmp_path, [(32, 32)])
    asked = _request(data=splits, **given)
    assert asked.from_scratch(splits) is scratch
    assert asked.recipe_for(splits, pretrained=False) == recipe
    assert asked.recipe_for(splits, pretrained=True) == "finetune"


def test_a_network_is_trained_as_its_own_size_is(tmp_path: Path) -> None:
    """What a search or a user made for a larger size is no network for small images."""
    splits = _splits(tmp_path, [(32, 32)])
    asked = _request(data=splits, candidates=SPEC)
    assert asked.from_scratch(splits)
    run = Fit(asked=asked, record=_record(tmp_path, []), splits=splits, folder=tmp_path, basis=BASIS, files=None)
    own, weights = _contender("a", None, None), _contender(SPEC.name, None, "pretrained")
    recipes = [run.recipe(replace(own, image_size=size)) for size in (32, 64, 160)]
    assert recipes == ["small", "small", "pictures"]
    assert run.recipe(replace(weights, image_size=32)) == "finetune"


def test_64_headers_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = _splits(tmp_path, [(8, 8)] * 99 + [(24, 16)])
    Path(splits.train.name(0)).write_bytes(b"no picture")
    seen: list[str] = []

    def size(path: str, max_pixels: int) -> Any:
        seen.append(path)
        return extent_size(path, max_pixels)

    extent_size = extent.upright_size
    monkeypatch.setattr(extent, "upright_size", size)
    assert largest_side(splits.train) == 8  # the last is none of the 64
    assert largest_side(splits.train) == 8
    assert len(seen) == len(set(seen)) == 64
    assert splits.train.name(0) in seen


def test_what_can_not_be_read_is_not_small(tmp_path: Path) -> None:
    splits = _splits(tmp_path, [(8, 8)])
    Path(splits.train.name(0)).write_bytes(b"no picture")
    assert (largest_side(splits.train), default_size(splits)) == (None, 224)


def test_a_run_of_version_0_1_took_files_for_pictures(tmp_path: Path) -> None:
    splits = _splits(tmp_path, [(8, 8)])
    known = as_version_0_1(_request(data=splits, candidates=SPEC), splits)
    assert known is not None
    assert known["recipe"] == "pictures"
