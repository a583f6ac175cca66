"""Two gloo processes give the single-process result on the same global batch; one writes, and a run can be resumed
together.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from convscale.errors import UserError
from convscale.learn import validate
from convscale.learn.checkpoint import list_checkpoints
from convscale.learn.compiling import SEVERAL
from convscale.learn.distributed import Processes, join, spread_over
from convscale.learn.loader import Batch, TrainLoader
from convscale.learn.recipe import Recipe
from convscale.learn.run_folder import RunFolder
from convscale.learn.train import TrainRun, train
from convscale.locks import OutputLock
from tests.learn.nets import halves_data

RECIPE = Recipe(
    name="x",
    epochs=2,
    batch_size=8,
    optimizer="sgd",
    lr=0.05,
    augment="shift-crop",
    cutout=0.2,
    ema_decay=0.9,
    precision="fp32",
    layout="nchw",
)


def _net() -> nn.Module:
    torch.manual_seed(5)
    body = [
        nn.Conv2d(1, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
    ]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3))


def _summary(run: TrainRun, losses: list[float]) -> dict[str, Any]:
    weights = {name.replace("norm.", ""): value for name, value in run.net.state_dict().items()}
    return {
        "weights": weights,
        "losses": losses,
        "history": [(row["train_loss"], row["val_loss"], row["val_top1"]) for row in run.history],
    }


def _work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2"
    )
    losses: list[float] = []
    run = train(
        _net(),
        halves_data(),
        recipe=RECIPE,
        output=Path(folder) / "run",
        progress=lambda e: losses.append(e["loss"]) if e["kind"] == "step" else None,
    )
    again = train(_net(), halves_data(), recipe=RECIPE, epochs=2, output=Path(folder) / "run", resume=True)
    same = all(torch.equal(value, again.net.state_dict()[name]) for name, value in run.net.state_dict().items())
    found = {
        "accumulated": _accumulated(),
        "asked": {count: _asked(count) for count in (1, 2)},
        "lacking": _lacking(rank == 1),
        "unused": {choice: _with_unused(choice) for choice in (False, "auto")},
        "stopped": _stopped(rank == 1, Path(folder) / "stopped"),
    }
    found["failed"] = _failed(rank, Path(folder))  # the last: a process that others wait for has ended, and they too
    torch.save({**_summary(run, losses), "same": same, **found}, Path(folder) / f"{rank}.pt")


def _accumulated() -> dict[str, Any]:
    """Two batches a step: the weights, and how often gradients were exchanged."""
    exchanged = 0

    class Counted(nn.parallel.DistributedDataParallel):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.register_comm_hook(None, self.count)

        @staticmethod
        def count(_, bucket):  # type: ignore[no-untyped-def]  # annotations in quotes are refused
            nonlocal exchanged
            exchanged += bucket.index() == 0
            return allreduce_hook(None, bucket)  # type: ignore[arg-type]

    before, nn.parallel.DistributedDataParallel = nn.parallel.DistributedDataParallel, Counted  # type: ignore[misc]
    run = train(_net(), halves_data(), recipe=RECIPE, epochs=1, batch_size=4, accumulate=2)
    nn.parallel.DistributedDataParallel = before  # type: ignore[misc]
    return {"weights": dict(run.net.state_dict()), "exchanged": exchanged}


def _asked(accumulate: int) -> list[int]:
    """How often the processes asked each other, step by step of two epochs; as the first of them counts."""
    counts, asked = list[int](), 0
    names = ("sum", "least", "from_first", "gather")
    before = {name: getattr(Processes, name) for name in names}

    def counted(ask: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal asked
            asked += 1
            return ask(*args)

        return call

    def told(event: Any) -> None:
        nonlocal asked
        if event["kind"] == "step":
            counts.append(asked)
        asked = 0

    for name in names:
        setattr(Processes, name, counted(before[name]))
    train(_net(), halves_data(), recipe=RECIPE, accumulate=accumulate, max_seconds=1e6, progress=told)
    for name in names:
        setattr(Processes, name, before[name])
    return counts


@contextmanager
def _batches(change: Callable[[int, Batch], Batch]) -> Iterator[None]:
    """While open, loaders give what ``change`` makes of a batch and its number in the epoch."""
    before = TrainLoader.batches

    def batches(self: TrainLoader, epoch: int, start: int = 0, *args: Any) -> Iterator[Batch]:
        for number, batch in enumerate(before(self, epoch, start, *args), start):
            yield change(number, batch)

    TrainLoader.batches = batches  # type: ignore[method-assign]
    try:
        yield
    finally:
        TrainLoader.batches = before  # type: ignore[method-assign]


def _empty(number: int, batch: Batch) -> Batch:
    """Two batches of an epoch without an image, the first and one within it."""
    if number not in (0, 3):
        return batch
    return Batch(images=batch.images[:0], labels=batch.labels[:0], indices=batch.indices[:0])


def _lacking(here: bool) -> dict[str, Any]:
    """Weights where one process lacks all images of two batches of an epoch, and how many images that left."""
    out = {}
    for accumulate in (1, 2):
        with _batches(_empty) if here else nullcontext():
            run = train(_net(), halves_data(), recipe=RECIPE, accumulate=accumulate)
        out[accumulate] = {**_summary(run, []), "images": run.cost.images}
    return out


class _Unused(nn.Module):
    """A network with a parameter that its output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.unused = _net(), nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def _with_unused(choice: bool | str) -> dict[str, Any]:
    """Weights of a network with an unused parameter, and what was said of compiling."""
    run = train(_Unused(), halves_data(), recipe=RECIPE, epochs=1, compile=choice)
    return {**_summary(run, []), "said": [note for note in run.notes if note.startswith("compile=auto")]}


def _stopped(here: bool, folder: Path) -> tuple[int, bool]:
    """A run of which one process is told to end while the third step goes on: epochs that it came to the end of, and
    whether it says that it is finished.
    """

    def told(number: int, batch: Batch) -> Batch:
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    with _batches(told) if here else nullcontext():
        run = train(_net(), halves_data(), recipe=RECIPE, output=folder)
        return len(run.history), run.finished


def _failed(rank: int, folder: Path) -> dict[str, str]:
    """What a process says when it, or the other one, fails at what it does alone."""

    def bad(number: int, batch: Batch) -> Batch:
        return replace(batch, bad=("a.png: broken", "b.png: broken")) if number == 3 else batch

    def one(number: int, batch: Batch) -> Batch:
        return replace(batch, bad=(f"{rank}.png: broken",)) if number == 3 else batch

    def gone(number: int, batch: Batch) -> Batch:
        if number in at:
            raise UserError("a data loader process ended")
        return batch

    def full(*_: object, **__: object) -> None:
        raise UserError("the disk is full")

    def ended(**options: Any) -> str:
        try:
            train(_net(), halves_data(), recipe=RECIPE, **options)
        except UserError as error:
            return str(error)
        return "nothing"

    out = dict[str, str]()
    with _batches(bad) if rank == 1 else nullcontext():
        out["pictures"] = ended()
    with _batches(one):
        out["together"] = ended()
    for at, accumulate in (({0}, 1), ({3}, 1), ({2}, 2), ({3}, 2)):
        with _batches(gone) if rank == 1 else nullcontext():
            out[f"loader at {min(at)} of {accumulate}"] = ended(accumulate=accumulate)
    for name in ("save_state", "write_log"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RunFolder, name, full)  # the first process writes
            out[name] = ended(output=folder / name, epochs=1 if name == "write_log" else 2)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(validate, "predict_split", full)
        out["validation"] = ended()
    with OutputLock() as lock:
        if rank == 0:
            (folder / "locked").mkdir()
            lock.take(folder / "locked")
        out["locked"] = ended(output=folder / "locked", overwrite=True)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    torch.multiprocessing.spawn(_work, (port, str(folder)), nprocs=2)
    return folder


def test_two_processes_equal_one_on_the_same_global_batch(folder: Path) -> None:
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    single = _summary(train(_net(), halves_data(), recipe=RECIPE, batch_size=16), [])
    assert first["weights"].keys() == single["weights"].keys()
    for name, value in single["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name]), name
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-4, atol=1e-5)
    for mine, reference in zip(first["history"], single["history"], strict=True):
        assert mine == pytest.approx(reference, rel=1e-4)
    assert len(first["losses"]) == 12
    assert second["losses"] == []  # only the first process reports


def test_gradients_are_exchanged_once_a_step(folder: Path) -> None:
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True)["accumulated"] for rank in (0, 1))
    assert first["exchanged"] == second["exchanged"] == 96 // (2 * 4 * 2)
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name


def test_processes_ask_each_other_once_a_step(folder: Path) -> None:
    """Whether losses are finite, to go on, the next batch has images, and the first one's time: one exchange. The first
    batch of an epoch, and each that is accumulated onto another, is asked about by itself.
    """
    asked = torch.load(folder / "0.pt", weights_only=True)["asked"]
    assert asked[1][1:] == [1, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1]  # the very first comes behind what a run begins with
    assert asked[2][1:] == [2, 2, 3, 2, 2]


def test_a_network_with_an_unused_parameter_trains_though_compiling_is_asked_for(folder: Path) -> None:
    """Nothing is tried, so the run is the one that it would have been."""
    found = [torch.load(folder / f"{rank}.pt", weights_only=True)["unused"] for rank in (0, 1)]
    for each in found:
        assert each["auto"]["said"] == [f"compile=auto, not tried: {SEVERAL}"]
        assert each[False]["said"] == []
        for name, value in found[0][False]["weights"].items():
            assert torch.equal(each["auto"]["weights"][name], value), name


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_that_one_process_lacks_is_left_out_by_all(folder: Path, accumulate: int) -> None:
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True)["lacking"][accumulate] for rank in (0, 1))
    with _batches(_empty):
        run = train(_net(), halves_data(), recipe=RECIPE, batch_size=16, accumulate=accumulate)
    single = _summary(run, [])
    assert run.cost.images == first["images"] == second["images"] == 2 * (96 - 2 * 16)
    for name, value in single["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name]), name
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-4, atol=1e-5)


def test_all_processes_end_with_the_step_in_which_one_is_told_to(folder: Path) -> None:
    """And all of them say that the run is not finished."""
    assert [torch.load(folder / f"{rank}.pt", weights_only=True)["stopped"] for rank in (0, 1)] == [(0, False)] * 2
    assert [path.name for path in list_checkpoints(folder / "stopped")] == ["step-00000003"]


def test_what_one_process_fails_at_ends_both(folder: Path) -> None:
    """By the error that the command line ends with code 2 for, none waiting for the other."""
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True)["failed"] for rank in (0, 1))
    pictures = "2 of 96 train images (2.1%) can not be decoded, at most 1.0% may be; first: a.png: broken"
    loader = dict.fromkeys([name for name in second if name.startswith("loader")], "a data loader process ended")
    other = "process {} (counted from 0) of the 2 that train together failed, and ends this one; its own message "
    other += "says why"
    assert first.pop("together") == second.pop("together") == pictures.replace("a.png", "0.png")
    here = {**dict.fromkeys(["save_state", "write_log"], "the disk is full"), "locked": first["locked"]}
    there = {"pictures": pictures, **loader, "validation": "the disk is full"}
    assert len(loader) == 4
    assert "is being written by another run" in first["locked"]
    assert first == {**dict.fromkeys(there, other.format(1)), **here}
    assert second == {**dict.fromkeys(here, other.format(0)), **there}


@pytest.mark.parametrize(
    ("overrides", "steady", "static"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"accumulate": 2}, True, False),
        ({"freeze_epochs": 1}, True, False),
        ({"compile": True}, True, False),
        ({"compile": "graphs"}, True, False),
        ({"compile": "auto"}, True, True),  # nothing is compiled then
    ],
)
def test_the_graph_is_static_where_it_is(
    monkeypatch: pytest.MonkeyPatch, overrides: dict[str, Any], steady: bool, static: bool
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda net, **options: asked.update(options) or net)
    net = _net()
    assert spread_over(net, RECIPE.override(overrides), steady=steady) is net
    frozen = "freeze_epochs" in overrides
    assert asked == {"find_unused_parameters": frozen, "gradient_as_bucket_view": True, "static_graph": static}


def test_one_gpu_for_all_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="cuda:0 would put every process of torchrun on one GPU; give device cuda"):
        join(torch.device("cuda:0"))


def test_the_first_process_writes_and_both_resume(folder: Path) -> None:
    assert [path.name for path in list_checkpoints(folder / "run")] == ["step-00000012", "step-00000006"]
    assert all(torch.load(folder / f"{rank}.pt", weights_only=True)["same"] for rank in (0, 1))


KILLED = """
import os, signal, sys, threading, time
from pathlib import Path
import torch
from convscale.learn.train import train
from tests.learn.nets import halves_data
from tests.learn.test_distributed import RECIPE, _net

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
torch.set_num_threads(1)
state, marker = folder / "run" / "checkpoints" / "step-00000012", folder / "killed"

def die_once():
    while not state.exists():
        time.sleep(0.001)
    marker.touch()
    os.kill(os.getpid(), signal.SIGKILL)

if rank == 1 and not marker.exists():
    threading.Thread(target=die_once, daemon=True).start()
run = train(_net(), halves_data(), recipe=RECIPE, epochs=6, output=folder / "run", resume=True)
if rank == 0:
    torch.save({"weights": run.net.state_dict(), "notes": list(run.notes)}, folder / "end.pt")
"""


@pytest.mark.slow
def test_torchrun_goes_on_from_the_last_state_when_a_process_is_killed(tmp_path: Path) -> None:
    """One of two gloo processes is killed after its second epoch; the launcher starts both again, and the weights are
    those of a run that nobody disturbed.
    """
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "killed").exists()
    end = torch.load(tmp_path / "end.pt", weights_only=True)
    assert any(note.startswith("resumed from") for note in end["notes"])
    single = train(_net(), halves_data(), recipe=RECIPE, epochs=6, batch_size=16).net.state_dict()
    for name, value in single.items():
        torch.testing.assert_close(end["weights"][name.replace("norm.", "")], value, rtol=1e-3, atol=1e-4, msg=name)
