"""Train images that can not be read, with a stand-in for other processes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from convscale.errors import UserError
from convscale.images.preprocess import Preprocessing
from convscale.images.sources import open_dataset
from convscale.learn.bad_images import BadImages
from convscale.learn.distributed import Processes
from convscale.learn.prepare import first_batch

PLAIN = Preprocessing(image_size=16, mean=(0, 0, 0), std=(1, 1, 1))


def _bad(*theirs: tuple[str, ...], images: int = 200, max_bad_rate: float = 0.01) -> BadImages:
    """Of the first of several processes; the others know of ``theirs``."""
    processes = SimpleNamespace(gather=lambda mine: [mine, *theirs]) if theirs else Processes()
    job = SimpleNamespace(processes=processes, loader=SimpleNamespace(split=range(images)), max_bad_rate=max_bad_rate)
    return BadImages(cast(Any, job))


def test_images_of_all_processes_count_together() -> None:
    bad = _bad(("b.png: broken",), ("c.png: broken",))
    bad.count(("a.png: broken",))
    with pytest.raises(
        UserError, match=r"^3 of 200 train images \(1.5%\) can not be decoded, at most 1.0% may be; fir"
    ):
        bad.joined()


def test_what_another_process_met_in_another_epoch_counts_once() -> None:
    bad = _bad(("b.png: broken", "a.png: broken"))
    bad.count(("a.png: broken",))
    bad.count(())
    assert bad.joined() == ("a.png: broken", "b.png: broken")
    assert list(bad.known) == ["a.png: broken", "b.png: broken"]
    assert bad.joined() == ("a.png: broken", "b.png: broken")


def test_one_alone_need_not_wait_for_the_epochs_end() -> None:
    bad = _bad()
    bad.count(("a.png: broken",))
    assert bad.joined() == ("a.png: broken",)
    bad.count(("b.png: broken",))
    with pytest.raises(UserError, match=r"^3 of 200 train images"):
        bad.count(("c.png: broken",))


@pytest.mark.parametrize("wrong", [1, 2])
def test_a_first_picture_that_can_not_be_read_is_passed_over(tmp_path: Path, wrong: int) -> None:
    """Batches of one, as of large networks: the first whose picture is there is what the settings are measured on."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(10):
            Image.fromarray(np.full((20, 20, 3), 9 * number, np.uint8)).save(tmp_path / name / f"{number}.png")
    split = open_dataset(tmp_path).train
    for number in range(wrong):
        Path(split.name(number)).write_bytes(b"no picture")
    if wrong == 1:
        batch = first_batch(split, PLAIN, 1, 0.01)
        assert batch.indices.tolist() == [1]
    else:
        with pytest.raises(
            UserError, match=r"^2 of \d+ train images \(\d+\.\d%\) can not be decoded, at most 1\.0% may be"
        ):
            first_batch(split, PLAIN, 1, 0.01)
