"""Smaller copies: of what, where, and what stands in them."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from convscale.errors import UserError
from convscale.images.decode import read_image
from convscale.images.splits import FileSplit
from convscale.learn.recipe import Recipe
from convscale.learn.shrink import shrink_split
from convscale.learn.train import train
from tests.learn.nets import small_net


@pytest.fixture
def split(tmp_path: Path) -> FileSplit:
    """A large smooth picture, one turned by EXIF, a small one, a broken one."""
    y, x = np.mgrid[0:300, 0:400]
    smooth = Image.fromarray(np.stack([x * 255 // 400, y * 255 // 300, (x + y) * 255 // 700], axis=2).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth.save(tmp_path / "0.jpg", quality=95)
    smooth.save(tmp_path / "1.jpg", quality=95, exif=exif)
    smooth.resize((80, 60)).save(tmp_path / "2.png")
    (tmp_path / "3.jpg").write_bytes((tmp_path / "0.jpg").read_bytes()[:900])
    paths = tuple(str(tmp_path / name) for name in ("0.jpg", "1.jpg", "2.png", "3.jpg"))
    return FileSplit(split="train", classes=("a", "b"), labels=torch.tensor([0, 1, 0, 1]), channels=3, paths=paths)


def test_large_files_are_copied_once(split: FileSplit, tmp_path: Path) -> None:
    small, said = shrink_split(split, 75, folder=tmp_path / "copies")
    assert said.startswith("2 of 4 train images are read from copies of 75 px")
    assert small.paths[2:] == split.paths[2:]
    assert torch.equal(small.labels, split.labels)
    upright, turned = (read_image(path) for path in small.paths[:2])
    assert upright.shape == (75, 100, 3)
    assert turned.shape == (100, 75, 3)
    golden = np.asarray(Image.open(split.paths[0]).resize((100, 75), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(upright.astype(int) - golden).max() <= 8
    assert np.allclose(turned, np.rot90(upright, -1), atol=8)
    times = [os.stat(path).st_mtime_ns for path in small.paths[:2]]
    assert shrink_split(split, 75, folder=tmp_path / "copies")[0].paths == small.paths
    assert [os.stat(path).st_mtime_ns for path in small.paths[:2]] == times
    os.utime(split.paths[0], (1, 1))  # the file has changed: another copy
    assert shrink_split(split, 75, folder=tmp_path / "copies")[0].paths[0] != small.paths[0]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"smaller copies can not be written to .* CONVSCALE_CACHE"):
        shrink_split(split, 75, folder=tmp_path / "file")


def test_a_name_that_is_no_text_and_a_picture_that_is_too_long(split: FileSplit, tmp_path: Path) -> None:
    odd, long = str(tmp_path / "\udce9.jpg"), str(tmp_path / "long.png")
    Path(odd).write_bytes(Path(split.paths[0]).read_bytes())
    Image.new("L", (131_200, 2)).save(long)
    some = dataclasses.replace(split, paths=(odd, long, split.paths[0], split.paths[2]))
    copies = tmp_path / "copies"
    small, _ = shrink_split(some, 1, folder=copies)
    assert small.paths[1] == long
    assert read_image(small.paths[0]).shape == (1, 1, 3)
    assert {Path(small.paths[at]).parent for at in (0, 2, 3)} == {copies}
    assert len(list(copies.iterdir())) == 3


def test_a_run_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVSCALE_CACHE", str(tmp_path / "cache"))
    for name, base in (("dark", 0), ("light", 150)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(12):
            pixels = np.random.default_rng(number).integers(base, base + 100, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{number}.jpg")
    recipe = Recipe(name="x", epochs=1, batch_size=6, image_size=16, shrink=1.25, precision="fp32", layout="nchw")
    options: dict[str, Any] = {"recipe": recipe, "workers": 0, "output": tmp_path / "run"}
    run = train(small_net(2, channels=3), tmp_path / "data", **options)
    assert any("train images are read from copies of 20 px" in note for note in run.notes)
    assert len(list((tmp_path / "cache" / "shrunk").glob("*.jpg"))) == 20  # 24 less 2 for validation and 2 for test
    assert not list((tmp_path / "cache" / "shrunk").glob(".*"))
    for path in (tmp_path / "data").glob("*/*.jpg"):  # the copies get other names: the data is the same
        os.utime(path, (1, 1))
    assert len(train(small_net(2, channels=3), tmp_path / "data", **options, epochs=2, resume=True).history) == 2
