"""Train images that can not be read, with a stand-in for other processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from convscale.errors import UserError
from convscale.learn.bad_images import BadImages
from convscale.learn.distributed import Processes


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
