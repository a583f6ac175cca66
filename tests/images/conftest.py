"""Small image trees for the tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MakeTree = Callable[..., Path]


@pytest.fixture
def make_tree(tmp_path: Path) -> MakeTree:
    """``make_tree({"train": {"cat": 5, "dog": 4}}, root="a")`` writes that many JPEGs per class; without split folders
    the classes stand on top.
    """

    def make(layout: dict, root: str = "data", size: tuple[int, int] = (12, 10), suffix: str = ".jpg") -> Path:
        folder = tmp_path / root
        trees = (
            {folder: layout}
            if all(isinstance(value, int) for value in layout.values())
            else {folder / key: value for key, value in layout.items()}
        )
        rng = np.random.default_rng(0)
        for place, classes in trees.items():
            for name, count in classes.items():
                (place / name).mkdir(parents=True, exist_ok=True)
                for number in range(count):
                    pixels = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(place / name / f"{number:03d}{suffix}")
        return folder

    return make
