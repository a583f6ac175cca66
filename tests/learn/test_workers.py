"""Processes that make batches: a signal to all of a run, one that dies, one that hangs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convscale.errors import UserError
from convscale.learn.workers import by_processes


class Numbers(torch.utils.data.Dataset[int]):
    def __init__(self, count: int, hangs_at: int = -1) -> None:
        self.count, self.hangs_at = count, hangs_at

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, at: int) -> int:
        if at == self.hangs_at:
            time.sleep(40)
        return at


def test_a_worker_that_dies_while_the_run_computes_is_told_with_the_next_batch() -> None:
    items = by_processes(Numbers(30), 2, ahead=2)
    assert [next(items), next(items)] == [0, 1]
    os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
    time.sleep(1)  # stands for a step: nothing is raised in it
    with pytest.raises(
        UserError, match=r"^a data loader process ended \(DataLoader worker .*\); memory .* workers \(now 2\)"
    ):
        list(items)
    assert not multiprocessing.active_children()


def test_the_handler_of_ended_children_stays_as_it_was() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGCHLD, lambda number, _: heard.append(number))
    try:
        mine = signal.getsignal(signal.SIGCHLD)
        assert list(by_processes(Numbers(3), 1, ahead=2)) == [0, 1, 2]
        assert signal.getsignal(signal.SIGCHLD) is mine
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert heard


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_a_worker_is_left_to_the_run(number: signal.Signals) -> None:
    items = by_processes(Numbers(12), 1, ahead=2)
    assert next(items) == 0
    os.kill(multiprocessing.active_children()[0].pid or 0, number)
    time.sleep(0.5)
    assert list(items) == list(range(1, 12))
    assert not multiprocessing.active_children()


def test_a_worker_that_hangs_ends_with_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.5)
    items = by_processes(Numbers(12, hangs_at=1), 1, ahead=2)
    assert next(items) == 0
    items.close()  # pyright: ignore[reportAttributeAccessIssue]
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not multiprocessing.active_children()


LEFT = """
from convscale.learn.workers import by_processes
from tests.learn.test_workers import Numbers
items = by_processes(Numbers(30), 2, ahead=2)
print(next(items))
"""


def test_a_program_that_leaves_a_loader_open_ends() -> None:
    done = subprocess.run([sys.executable, "-c", LEFT], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "0\n")


RUN = """
import sys, time
from convscale.learn.recipe import Recipe
from convscale.learn.train import train
from tests.learn.nets import small_net

def told(event):
    if event["kind"] == "step" and (event["epoch"], event["step"]) == (2, 1):
        print("now", flush=True)
        time.sleep(3)

recipe = Recipe(name="x", epochs=4, batch_size=4, augment="resized-crop", image_size=16, precision="fp32",
                layout="nchw")
run = train(small_net(2, 3), sys.argv[1], recipe=recipe, workers=2, output=sys.argv[2], progress=told)
print("ended", run.finished, len(run.history))
"""


def test_sigterm_to_the_whole_group_saves_and_ends(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(20):
            pixels = random.integers(0, 255, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{number}.jpg")
    words = [sys.executable, "-c", RUN, str(tmp_path / "data"), str(tmp_path / "run")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "now\n"
        os.killpg(run.pid, signal.SIGTERM)  # as timeout does: not from the loader's parent, whom its processes obey
        said, _ = run.communicate(timeout=300)
    assert run.returncode == 0
    assert said.splitlines()[-1] == "ended False 1"
    states = sorted(place.name for place in (tmp_path / "run" / "checkpoints").glob("step-*"))
    steps = int(states[0].partition("-")[2])  # of an epoch
    assert states == [f"step-{steps:08d}", f"step-{steps + 1:08d}"]
