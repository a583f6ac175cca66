"""One exchange a step, with a stand-in for the other process."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from convscale.errors import UserError
from convscale.learn.agreeing import Agreeing
from convscale.learn.distributed import Processes, Trouble
from convscale.learn.loader import Batch
from convscale.learn.on_device import Before, InTurn, in_time

CPU = torch.device("cpu")


class Pair:
    """Two processes, this one by its number; the other says ``theirs``."""

    world = 2

    def __init__(self, rank: int = 0) -> None:
        self.rank, self.first = rank, rank == 0
        self.theirs = [1.0, 1.0, 1.0, math.inf]
        """Its losses are finite, it goes on (below 0: it failed), has images in its next batch, its seconds (the first
        process's)."""
        self.asked: list[str] = []

    def all_true(self, value: bool) -> bool:
        self.asked.append("images")
        return value

    def least(self, values: torch.Tensor) -> torch.Tensor:
        self.asked.append("step")
        return torch.minimum(values, torch.tensor(self.theirs, dtype=torch.float64))


def _batch(images: int) -> Batch:
    return Batch(images=torch.zeros(images, 2, 2, 1), labels=torch.zeros(images), indices=torch.arange(images))


def _agreeing(processes: Any, *, stop: bool = False, max_seconds: float | None = None) -> Agreeing:
    job = SimpleNamespace(processes=processes, device=CPU, stop=lambda: stop, max_seconds=max_seconds)
    return Agreeing(cast(Any, job))


def _values(*losses: float) -> list[torch.Tensor]:
    return [torch.tensor(value) for value in (7.5, *losses)]


def test_losses_of_all_must_be_finite_and_come_back_as_they_are() -> None:
    pair, none = Pair(), InTurn(iter([]))
    agreeing = _agreeing(pair)
    value = torch.tensor(0.1).item()
    assert agreeing.ask(_values(value, 2.0), none, 1.0) == (True, [7.5, value, 2.0])
    right, numbers = agreeing.ask(_values(math.nan, 2.0), none, 1.0)
    assert (right, math.isnan(numbers[1])) == (False, True)
    assert agreeing.ask([torch.tensor(math.inf), torch.tensor(1.0)], none, 1.0) == (True, [math.inf, 1.0])
    pair.theirs[0] = 0.0
    assert agreeing.ask(_values(1.0), none, 1.0) == (False, [7.5, 1.0])
    assert agreeing.ask([], none, 1.0) == (False, [])
    assert pair.asked == ["step"] * 5


@pytest.mark.parametrize(("mine", "theirs"), [(True, 1.0), (False, 0.0)])
def test_all_end_when_one_is_told_to(mine: bool, theirs: float) -> None:
    pair = Pair()
    agreeing = _agreeing(pair, stop=mine)
    pair.theirs[1] = theirs
    assert agreeing.go_on(), "nothing was asked yet"
    agreeing.ask(_values(1.0), InTurn(iter([])), 1.0)
    assert not agreeing.go_on()


def test_what_one_process_fails_at_ends_all_with_the_exchange() -> None:
    """Up to there it goes along: of a batch that could not be had it has no image."""

    def source() -> Iterator[Batch]:
        yield _batch(2)
        raise ValueError("a broken picture")

    pair = Pair(1)
    agreeing, batches = _agreeing(pair), Before(source())
    assert agreeing.have_images(batches, agreeing.next_of(batches))
    batches.prepare()
    pair.theirs[2] = 0.0
    agreeing.ask(_values(1.0), batches, 1.0)
    empty = agreeing.next_of(batches)
    assert (len(empty.indices), empty.bad) == (0, ())
    assert not agreeing.have_images(batches, empty)
    assert len(agreeing.next_of(batches).indices) == 0, "the source has ended, which hides nothing"
    told: list[float] = []
    pair.least = lambda values: told.append(values[1].item()) or values  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="a broken picture"):
        agreeing.ask([], batches, 1.0)
    assert told == [-2.0]


@pytest.mark.parametrize(("theirs", "number"), [(-1.0, 0), (-2.0, 1)])
def test_the_others_say_which_process_failed(theirs: float, number: int) -> None:
    pair = Pair(1 - number)
    pair.theirs[1] = theirs
    said = f"process {number} (counted from 0) of the 2 that train together failed, and ends this one; its own message "
    with pytest.raises(UserError) as ended:
        _agreeing(pair).ask(_values(1.0), InTurn(iter([])), 1.0)
    assert str(ended.value) == f"{said}says why"


def test_one_alone_fails_at_once_and_several_where_they_are_asked() -> None:
    with pytest.raises(ValueError, match="here"), Trouble(Processes()).held():
        raise ValueError("here")
    pair = cast(Any, SimpleNamespace(world=3, rank=2, gather=lambda value: [-1, 1, value]))
    trouble = Trouble(pair)
    for text in ("first", "second"):
        with trouble.held():
            raise ValueError(text)
    with pytest.raises(ValueError, match="first"):
        trouble.settle()
    with pytest.raises(UserError, match=r"^process 1 \(counted from 0\) of the 3 that train"):
        Trouble(pair).settle()
    pair.gather = lambda value: [-1, -1, value]
    Trouble(pair).settle()


@pytest.mark.parametrize(("images", "theirs", "full"), [(3, 1.0, True), (3, 0.0, False), (0, 1.0, False)])
def test_of_the_next_batch_the_step_before_has_told(images: int, theirs: float, full: bool) -> None:
    pair = Pair()
    agreeing, batches = _agreeing(pair), Before(iter([_batch(4), _batch(images), _batch(5)]))
    assert agreeing.have_images(batches, next(batches))
    batches.prepare()
    pair.theirs[2] = theirs
    agreeing.ask(_values(1.0), batches, 1.0)
    assert agreeing.have_images(batches, next(batches)) is full
    assert pair.asked == ["images", "step"]
    assert agreeing.have_images(batches, next(batches)), "accumulated onto another: it is asked about"
    assert pair.asked == ["images", "step", "images"]


def test_what_was_told_is_of_its_own_epoch() -> None:
    """After a rollback batches come from the epoch's start again."""
    pair = Pair()
    agreeing, before = _agreeing(pair), Before(iter([_batch(0)]))
    before.prepare()
    agreeing.ask(_values(1.0), before, 1.0)
    again = Before(iter([_batch(2)]))
    assert agreeing.have_images(again, next(again))
    assert pair.asked == ["step", "images"]


@pytest.mark.parametrize(("rank", "told"), [(0, [3.0, 1.0 + 4.0]), (1, [30.0, 50.0])])
def test_time_is_the_first_processs_and_none_of_it_is_lost(rank: int, told: list[float]) -> None:
    pair, none = Pair(rank), InTurn(iter([]))
    agreeing = _agreeing(pair, max_seconds=100.0)
    if rank:
        pair.theirs[3] = 30.0
    agreeing.ask(_values(1.0), none, 3.0)
    found = [agreeing.spent(4.0)]  # 1 s came behind the exchange
    if rank:
        pair.theirs[3] = 50.0
    agreeing.ask(_values(1.0), none, 4.0)
    assert [*found, agreeing.spent(6.0)] == told
    assert (agreeing.rest(), agreeing.rest()) == (2.0, 0.0)


def test_without_a_time_limit_each_counts_its_own() -> None:
    agreeing = _agreeing(Pair())
    agreeing.ask(_values(1.0), InTurn(iter([])), 3.0)
    assert (agreeing.spent(4.0), agreeing.rest()) == (4.0, 0.0)


def test_batches_that_are_known_before_come_in_order_with_what_is_raised() -> None:
    def source() -> Iterator[Batch]:
        yield _batch(1)
        yield _batch(0)
        raise ValueError("a broken picture")

    batches = in_time(source(), CPU, several=True)
    assert batches.filled is None
    assert len(next(batches).indices) == 1
    assert batches.prepare() >= 0
    assert batches.filled is False
    batches.prepare()
    assert len(next(batches).indices) == 0
    assert batches.filled is None
    batches.prepare()
    assert batches.filled is False, "it is raised in its turn, and all leave the batch out"
    with pytest.raises(ValueError, match="a broken picture"):
        next(batches)
    batches.close()
