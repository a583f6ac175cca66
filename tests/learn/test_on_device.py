"""Batches one ahead on CUDA, without a card: stand-ins for streams, events and pinned memory write down what happens
in which order.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from convscale.detect.loader import BoxBatch
from convscale.learn import loop, on_device
from convscale.learn.loader import Batch
from convscale.learn.on_device import Ahead, InTurn, chosen_algorithms, in_time
from convscale.learn.recipe import Recipe
from convscale.learn.schedule import image_size_at
from convscale.learn.train import train
from tests.learn.nets import halves_data, small_net

CPU = torch.device("cpu")


class Cuda:
    """Stands for ``torch.cuda``; ``log`` has what was asked of it."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.idle = False
        self.active = "computing"
        self.events = 0

    def Stream(self, _device: object) -> str:
        return "copying"

    def current_stream(self, _device: object) -> Any:
        return self if self.active == "computing" else None

    def wait_event(self, event: Any) -> None:
        self.log.append(f"computing waits for {event.name}")

    @contextmanager
    def stream(self, name: str) -> Iterator[None]:
        self.active = name
        yield
        self.active = "computing"

    def Event(self) -> Any:
        outer = self

        class Event:
            name = ""

            def record(self, stream: object) -> None:
                self.name = "copy" if stream == "copying" else "work"
                if self.name == "copy":
                    outer.events += 1
                    self.name += f" {outer.events}"
                outer.log.append(f"{self.name} recorded")

            def query(self) -> bool:
                return outer.idle

        return Event()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    cuda = Cuda()

    def pinned(tensor: torch.Tensor) -> torch.Tensor:
        cuda.log.append(f"{cuda.active}: pinned {tuple(tensor.shape)}")
        return tensor.clone()

    monkeypatch.setattr(on_device, "cuda", cuda)
    monkeypatch.setattr(on_device, "_pinned", pinned)
    monkeypatch.setattr(on_device, "_held_for", lambda tensor, _: cuda.log.append(f"held {tuple(tensor.shape)}"))
    return cuda


def batch(number: int) -> Batch:
    images = torch.full((2, 3, 3, 1), number, dtype=torch.uint8)
    return Batch(
        images=images, labels=torch.tensor([number] * 2), indices=torch.tensor([number, 9]), bad=(f"{number}",)
    )


def source(count: int, log: list[str], error: Exception | None = None) -> Iterator[Batch]:
    try:
        for number in range(count):
            log.append(f"fetched {number}")
            yield batch(number)
        if error is not None:
            raise error
    finally:
        log.append("source closed")


def test_order_of_events(cuda: Cuda) -> None:
    """While the device works the next batch is fetched, pinned and copied; only its stream waits for the copy."""
    batches = Ahead(source(3, cuda.log), CPU)
    assert cuda.log == [], "nothing before it is asked for"
    copies = ["copying: pinned (2, 3, 3, 1)", "copying: pinned (2,)"]
    held = ["held (2, 3, 3, 1)", "held (2,)"]
    first = next(batches)
    assert cuda.log == ["fetched 0", *copies, "copy 1 recorded", "computing waits for copy 1", *held]
    cuda.log.clear()
    batches.prepare()
    assert cuda.log == ["work recorded", "fetched 1", *copies, "copy 2 recorded"]
    batches.prepare()
    assert cuda.log[-1] == "copy 2 recorded", "never two ahead"
    cuda.log.clear()
    second = next(batches)
    assert cuda.log == ["computing waits for copy 2", *held]
    assert [first.labels.tolist(), second.labels.tolist()] == [[0, 0], [1, 1]]


@pytest.mark.parametrize("prepared", [True, False])
def test_all_batches_arrive(cuda: Cuda, prepared: bool) -> None:
    batches, found = Ahead(source(4, []), CPU), []
    for _ in range(4):
        found.append(next(batches))
        if prepared:
            batches.prepare()
    with pytest.raises(StopIteration):
        next(batches)
    for number, (mine, right) in enumerate(zip(found, map(batch, range(4)), strict=True)):
        assert torch.equal(mine.images, right.images)
        assert torch.equal(mine.labels, right.labels)
        assert mine.indices.tolist() == [number, 9]
        assert mine.bad == (str(number),)
    assert not any("(2, 9)" in line for line in cuda.log)


def test_boxes_go_along(cuda: Cuda) -> None:
    boxes = {"boxes": torch.ones(5, 4), "labels": torch.arange(5)}
    given = BoxBatch(**vars(batch(1)), targets=(boxes, {"boxes": torch.zeros(0, 4)}))
    got = next(Ahead(iter([given]), CPU))
    assert isinstance(got, BoxBatch)
    assert torch.equal(got.targets[0]["labels"], boxes["labels"])
    assert got.targets[0]["boxes"] is not boxes["boxes"]
    assert got.indices is given.indices
    assert "held (5, 4)" in cuda.log


def test_an_error_comes_when_its_batch_is_asked_for(cuda: Cuda) -> None:
    batches = Ahead(source(1, cuda.log, ValueError("a broken picture")), CPU)
    assert next(batches).labels.tolist() == [0, 0]
    batches.prepare()  # the step that is under way is not disturbed
    with pytest.raises(ValueError, match="a broken picture"):
        next(batches)


def test_an_early_end_lets_go_of_everything(cuda: Cuda) -> None:
    batches = Ahead(source(5, cuda.log), CPU)
    next(batches)
    batches.prepare()
    assert isinstance(batches._waiting, tuple)
    waiting = weakref.ref(batches._waiting[0])
    batches.close()
    gc.collect()
    assert waiting() is None
    assert cuda.log[-1] == "source closed"


def test_only_time_that_the_device_stood_still_is_waiting(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 100, 3))
    monkeypatch.setattr(on_device.time, "perf_counter", lambda: float(next(clock)))
    batches = Ahead(source(3, []), CPU)
    next(batches)
    assert batches.prepare() == 0.0, "the device still computes"
    next(batches)
    cuda.idle = True
    assert batches.prepare() == 3.0
    assert batches.prepare() == 0.0, "nothing was left to do"


def test_on_a_cpu_batches_come_in_turn() -> None:
    log: list[str] = []
    batches = in_time(source(3, log), CPU)
    assert type(batches) is InTurn
    given = next(batches)
    assert batches.prepare() == 0.0
    assert log == ["fetched 0"]
    assert given.labels.tolist() == [0, 0]
    batches.close()
    assert log[-1] == "source closed"
    InTurn(iter([])).close()  # not every iterator can be closed


def test_cudnn_times_its_algorithms_on_cuda_alone() -> None:
    assert not torch.backends.cudnn.benchmark
    with chosen_algorithms(torch.device("cuda", 1)):
        assert torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.benchmark
    with chosen_algorithms(CPU):
        assert not torch.backends.cudnn.benchmark


def test_a_run_lets_cudnn_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def chosen(device: torch.device) -> Any:
        asked.append(device)
        return chosen_algorithms(torch.device("cuda"))

    seen: list[bool] = []

    def note(event: Any) -> None:
        if event["kind"] == "step":
            seen.append(torch.backends.cudnn.benchmark)

    monkeypatch.setattr(loop, "chosen_algorithms", chosen)
    train(small_net(), halves_data(), recipe=QUICK, progress=note)
    assert asked == [CPU] * 2
    assert len(seen) == 12
    assert all(seen)
    assert not torch.backends.cudnn.benchmark


QUICK = Recipe(
    name="x", epochs=2, batch_size=16, optimizer="sgd", lr=0.05, augment="shift-crop", precision="fp32", layout="nchw"
)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_is_the_same_with_batches_ahead(cuda: Cuda, monkeypatch: pytest.MonkeyPatch, accumulate: int) -> None:
    def run(ahead: bool) -> dict[str, torch.Tensor]:
        made: list[InTurn] = []

        def give(batches: Iterator[Batch], device: torch.device, *, several: bool) -> InTurn:
            assert not several
            made.append(Ahead(batches, device) if ahead else InTurn(batches))
            return made[-1]

        monkeypatch.setattr(loop, "in_time", give)
        torch.manual_seed(0)
        trained = train(small_net(), halves_data(), recipe=QUICK.override({"accumulate": accumulate}))
        assert len(made) == 2, "one for each epoch"
        return trained.net.state_dict()

    plain = run(False)
    assert cuda.log == []
    for name, value in run(True).items():
        assert torch.equal(value, plain[name]), name
    # of each epoch's 6 batches all but the first are copied while the device computes
    assert sum("work recorded" in line for line in cuda.log) == 2 * 5
    assert sum("recorded" in line and "copy" in line for line in cuda.log) == 2 * 6


def test_progressive_sizes_by_hand() -> None:
    """From half at the first epoch to the whole at three quarters of the run, in steps of 4 pixels."""
    recipe = QUICK.override({"epochs": 8, "progressive": 0.5})
    assert [image_size_at(epoch, 64, recipe) for epoch in range(8)] == [32, 36, 44, 48, 52, 60, 64, 64]
    assert image_size_at(0, (32, 64), recipe) == (16, 32)
    assert image_size_at(0, 64, QUICK) == 64
