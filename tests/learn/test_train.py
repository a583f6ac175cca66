"""Training: it learns, it reproduces, it resumes exactly, it survives NaN."""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from convscale import words
from convscale.errors import Stopped, UserError
from convscale.learn.checkpoint import about_state, batches_of, list_checkpoints, load_checkpoint, load_state
from convscale.learn.evaluate import evaluate
from convscale.learn.loop import Trainer
from convscale.learn.prepare import prepare
from convscale.learn.progress import LiveProgress
from convscale.learn.recipe import Recipe
from convscale.learn.train import TrainRun, begin, train
from convscale.learn.validate import Validation
from tests.learn.nets import CLASSES, Poison, halves_data, small_net

QUICK = Recipe(
    name="quick",
    epochs=3,
    batch_size=16,
    lr=0.05,
    augment="shift-crop",
    cutout=0.2,
    ema_decay=0.9,
    ema_every=2,
    precision="fp32",
    layout="nchw",
)


def _net() -> nn.Module:
    torch.manual_seed(5)
    return small_net()


class Stop(Exception):
    """Stands for a kill in the middle of a run."""


def _steps(losses: list[float], kill_at: int | None = None) -> Any:
    def progress(event: dict[str, Any]) -> None:
        if event["kind"] == "step":
            losses.append(event["loss"])
            if kill_at is not None and len(losses) == kill_at:
                raise Stop

    return progress


def _same_weights(left: TrainRun, right: TrainRun) -> bool:
    pairs = zip(left.net.state_dict().items(), right.net.state_dict().items(), strict=True)
    return all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)


def test_it_learns(tmp_path: Path) -> None:
    data = halves_data()
    run = train(_net(), data, recipe=QUICK, epochs=6, output=tmp_path / "run")
    assert [row["epoch"] for row in run.history] == [1, 2, 3, 4, 5, 6]
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"]
    result = evaluate(run.net, data.test, run.preprocessing)
    assert result.top1 > 0.9
    assert run.best_metric == max(row["val_top1"] for row in run.history)
    assert run.classes == CLASSES
    assert run.preprocessing.image_size == 12
    assert run.preprocessing.mean[0] == pytest.approx(data.train.images.float().mean().item() / 255, abs=1e-4)
    loaded = load_checkpoint(tmp_path / "run", net=small_net())
    assert loaded.meta["recipe"]["lr"] == 0.05
    for name, value in loaded.net.state_dict().items():
        assert torch.equal(value, run.net.state_dict()[name])
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["val_top1"] for row in rows] == [row["val_top1"] for row in run.history]
    assert "6 epochs in" in run.describe()


def test_same_seed_same_bits_other_seed_other_bits() -> None:
    first, again, other = (train(_net(), halves_data(), recipe=QUICK, seed=seed, epochs=1) for seed in (1, 1, 2))
    assert _same_weights(first, again)
    assert not _same_weights(first, other)


@functools.cache
def _undisturbed(recipe: Recipe) -> tuple[TrainRun, list[float]]:
    """A run that nobody kills, and its losses: one for all the places at which others are killed."""
    losses: list[float] = []
    return train(_net(), halves_data(), recipe=recipe, seed=3, progress=_steps(losses)), losses


@pytest.mark.parametrize("kill_at", [3, 6, 8, 17])
@pytest.mark.parametrize(
    ("optimizer", "layout", "precision"),
    [
        ("sgd", "nchw", "fp32"),
        ("sgd", "nhwc", "fp32"),
        ("adamw", "nchw", "fp32"),
        ("adamw", "nhwc", "fp32"),
        ("adamw", "nhwc", "bf16"),
        ("muon", "nhwc", "bf16"),
        ("muon", "nchw", "fp32"),
        ("rmsprop", "nhwc", "fp32"),
        ("lamb", "nhwc", "bf16"),
    ],
)
def test_resume_is_exact(tmp_path: Path, kill_at: int, optimizer: str, layout: str, precision: str) -> None:
    recipe = QUICK.override(
        {"optimizer": optimizer, "lr": 0.02, "epsilon": 1e-3, "layout": layout, "precision": precision}
    )
    options: dict[str, Any] = {"recipe": recipe, "seed": 3}
    undisturbed, whole = _undisturbed(recipe)
    first, second = [], []
    folder = tmp_path / "run"
    with pytest.raises(Stop):
        train(_net(), halves_data(), output=folder, checkpoint_seconds=0, progress=_steps(first, kill_at), **options)
    resumed = train(_net(), halves_data(), output=folder, resume=True, progress=_steps(second), **options)
    assert first == whole[:kill_at]
    assert second == whole[-len(second) :]
    assert len(first) + len(second) in (len(whole), len(whole) + 1)  # the killed step had not been saved
    assert _same_weights(undisturbed, resumed)
    drop = ("seconds", "train_seconds", "images_per_s", "wait_share")
    assert [{k: v for k, v in row.items() if k not in drop} for row in resumed.history] == [
        {k: v for k, v in row.items() if k not in drop} for row in undisturbed.history
    ]


def test_a_killed_run_joins_with_its_own_start(tmp_path: Path) -> None:
    recipe = QUICK.override({"join_start": True})
    folder, whole = tmp_path / "run", train(_net(), halves_data(), recipe=recipe)
    with pytest.raises(Stop):
        train(_net(), halves_data(), recipe=recipe, output=folder, checkpoint_seconds=0, progress=_steps([], 17))
    resumed = train(_net(), halves_data(), recipe=recipe, output=folder, resume=True)
    assert _same_weights(whole, resumed)
    assert whole.notes == tuple(note for note in resumed.notes if "resumed" not in note)
    # what is finished does nothing more
    again = train(_net(), halves_data(), recipe=recipe, output=folder, resume=True)
    assert _same_weights(whole, again)


@pytest.mark.parametrize(
    ("results", "best", "notes"),
    [
        ((0.1, 0.9, 0.2), 0.5, ["better at 50% of the way from the start: 90.00%"]),
        (
            (0.1, 0.5, 0.9),
            0.75,
            [
                "better at 50% of the way from the start: 50.00%",
                "better at 75% of the way from the start: 90.00%",
            ],
        ),
    ],
)
def test_the_best_between_start_and_end_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, results: tuple[float, ...], best: float, notes: list[str]
) -> None:
    recipe = QUICK.override({"ema_decay": 0.0})
    start = {name: value.clone() for name, value in _net().state_dict().items()}
    end = train(_net(), halves_data(), recipe=recipe, output=tmp_path / "plain")
    last = load_checkpoint(max((tmp_path / "plain" / "checkpoints").glob("step-*")), net=small_net()).net.state_dict()
    # one result for each epoch, then 25, 50 and 75 % of the way
    script = iter([*(0.1 for _ in end.history), *results])

    def scripted(trainer: Trainer) -> Validation:
        return dataclasses.replace(validated(trainer), top1=next(script))

    validated = Trainer._validate
    monkeypatch.setattr(Trainer, "_validate", scripted)
    run = train(_net(), halves_data(), recipe=recipe.override({"join_start": True}), output=tmp_path / "joined")
    assert run.best_metric == 0.9
    assert [note for note in run.notes if "way" in note] == notes
    kept = load_checkpoint(tmp_path / "joined", net=small_net()).net.state_dict()
    for name, value in run.net.state_dict().items():
        floats = value.is_floating_point()
        expected = (1 - best) * start[name] + best * last[name] if floats else last[name]
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(value, kept[name]), "what is kept on disk"


def test_resume_after_the_newest_state_was_damaged(tmp_path: Path) -> None:
    folder, whole = tmp_path / "run", train(_net(), halves_data(), recipe=QUICK)
    with pytest.raises(Stop):
        train(_net(), halves_data(), recipe=QUICK, output=folder, progress=_steps([], 15))
    newest = max((folder / "checkpoints").glob("step-*"))
    (newest / "state.safetensors").write_bytes(b"")
    resumed = train(_net(), halves_data(), recipe=QUICK, output=folder, resume=True)
    assert any("is damaged" in note for note in resumed.notes)
    assert _same_weights(whole, resumed)


@pytest.mark.parametrize("stop_at", [None, 18])  # with the very last step, before its validation
def test_the_last_state_knows_the_validation_of_its_epoch(tmp_path: Path, stop_at: int | None) -> None:
    """Where a state was saved with the epoch's last step, the one after validation has the same number."""
    folder, taken = tmp_path / "run", itertools.count(1)

    def stop(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and next(taken) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    options: dict[str, Any] = {"recipe": QUICK, "output": folder, "checkpoint_seconds": 0, "keep": 99}
    run = train(_net(), halves_data(), progress=stop, **options)
    if stop_at:
        assert (run.finished, len(run.history)) == (False, 2)
        run = train(_net(), halves_data(), resume=True, **options)
    states = list_checkpoints(folder)
    assert [batches_of(place) for place in states] == [*range(18, 0, -1)]
    for place, epochs in ((states[0], 3), (states[6], 2), (states[12], 1)):
        found, about, state, _ = load_state(place)
        assert found == place
        assert (state["numbers"]["epoch"], state["numbers"]["step"]) == (epochs, 0)
        assert [row["epoch"] for row in about["metrics"]["history"]] == [*range(1, epochs + 1)]
    assert about_state(folder)["metrics"]["best"]["metric"] == run.best_metric


def test_a_damaged_state_that_was_passed_over_counts_for_none_that_is_kept(tmp_path: Path) -> None:
    folder, whole = tmp_path / "run", train(_net(), halves_data(), recipe=QUICK)
    options: dict[str, Any] = {"recipe": QUICK, "output": folder, "checkpoint_seconds": 0}
    with pytest.raises(Stop):
        train(_net(), halves_data(), progress=_steps([], 15), **options)
    newest, before = list_checkpoints(folder)
    assert (batches_of(newest), batches_of(before)) == (14, 13)
    (newest / "state.safetensors").write_bytes(b"")
    (before / "state.json").rename(folder / "kept.json")
    with pytest.raises(UserError, match="is damaged"):
        train(_net(), halves_data(), resume=True, **options)
    assert list_checkpoints(folder) == [newest, before], "nothing is taken away where no state is whole"
    (folder / "kept.json").rename(before / "state.json")
    with pytest.raises(Stop):  # before it has come to the damaged one's number
        train(_net(), halves_data(), resume=True, keep=1, progress=_steps([], 1), **options)
    assert list_checkpoints(folder) == [before]
    assert _same_weights(whole, train(_net(), halves_data(), resume=True, keep=1, **options))


@pytest.mark.parametrize("stop_at", [8, 18])  # in the second epoch; with the very last step, before its validation
def test_sigterm_saves_and_ends_and_the_run_goes_on(tmp_path: Path, stop_at: int) -> None:
    steps = 0

    def terminate(event: dict[str, Any]) -> None:
        nonlocal steps
        steps += event["kind"] == "step"
        if steps == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    whole = train(_net(), halves_data(), recipe=QUICK)
    stopped = train(_net(), halves_data(), recipe=QUICK, output=tmp_path / "run", progress=terminate)
    assert not stopped.finished
    assert steps <= stop_at + 1
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    resumed = train(_net(), halves_data(), recipe=QUICK, output=tmp_path / "run", resume=True)
    assert resumed.finished
    assert _same_weights(whole, resumed)
    assert (resumed.best_metric, resumed.best_epoch) == (whole.best_metric, whole.best_epoch)
    assert [(row["epoch"], row["val_loss"], row["images"], row["train_loss"]) for row in resumed.history] == [
        (row["epoch"], row["val_loss"], row["images"], row["train_loss"]) for row in whole.history
    ]


def test_a_stop_while_a_run_prepares_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    train(_net(), halves_data(), recipe=QUICK, output=out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}

    def stopped(*given: Any, **more: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return prepare(*given, **more)

    monkeypatch.setattr("convscale.learn.train.prepare", stopped)
    for how in ("overwrite", "resume"):
        with pytest.raises(Stopped, match=r"^told to stop before training began; the output folder is as it was$"):
            train(_net(), halves_data(), recipe=QUICK, output=out, overwrite=how == "overwrite", resume=how == "resume")
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_stop_while_the_head_is_solved_saves_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved = list[int]()

    def solve(trainer: Trainer) -> None:
        solved.append(trainer.batches())
        if len(solved) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("convscale.learn.train.headed_parts", lambda _net: None)  # a small net lacks timm's names
    monkeypatch.setattr(Trainer, "start_from_solved_head", solve)
    options: dict[str, Any] = {"recipe": QUICK.override({"solve_head": True}), "output": tmp_path / "run"}
    whole = train(_net(), halves_data(), recipe=options["recipe"])
    stopped = train(_net(), halves_data(), **options)
    assert (stopped.finished, [batches_of(place) for place in list_checkpoints(tmp_path / "run")]) == (False, [1])
    resumed = train(_net(), halves_data(), resume=True, **options)
    assert (solved, resumed.finished) == ([0, 0], True)
    assert _same_weights(whole, resumed)


def test_a_stop_before_the_head_is_solved_says_how_to_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the run says to do is done: without --resume its folder would be refused."""
    folder, solved = tmp_path / "run", list[int]()

    def begun(trainer: Trainer, *, resumed: bool) -> None:
        begin(trainer, resumed=resumed)
        if not solved:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("convscale.learn.train.headed_parts", lambda _net: None)
    monkeypatch.setattr("convscale.learn.train.begin", begun)
    monkeypatch.setattr(Trainer, "start_from_solved_head", lambda _self: solved.append(1))
    options: dict[str, Any] = {"recipe": QUICK.override({"solve_head": True}), "output": folder}
    with pytest.raises(Stopped, match=r"training began; nothing was trained yet, run it again with --resume$"):
        train(_net(), halves_data(), **options)
    solved.append(0)
    assert train(_net(), halves_data(), resume=True, **options).finished
    assert solved == [0, 1]


def test_a_best_network_without_a_state_is_not_kept_by_another_start(tmp_path: Path) -> None:
    """It is of a run that was killed before its first state: the one that starts in its place may be of other data."""
    folder = tmp_path / "run"
    train(_net(), halves_data(), recipe=QUICK, output=folder)
    (best,) = list_checkpoints(folder, ("best",))
    best.rename(best.with_name("best-99999999"))
    for place in list_checkpoints(folder):
        shutil.rmtree(place)
    again = train(_net(), halves_data(48), recipe=QUICK, output=folder, resume=True)
    (best,) = list_checkpoints(folder, ("best",))
    assert batches_of(best) == 3 * again.best_epoch
    kept = load_checkpoint(best, net=_net()).net.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in again.net.state_dict().items())


def test_a_run_whose_time_was_up_when_it_was_killed_validates_what_it_did(tmp_path: Path) -> None:
    ask: dict[str, Any] = {"recipe": QUICK, "output": tmp_path / "run", "checkpoint_seconds": 0}
    with pytest.raises(Stop):
        train(_net(), halves_data(), progress=_steps([], 9), **ask)
    resumed = train(_net(), halves_data(), resume=True, max_seconds=1e-3, **ask)
    assert [(row["epoch"], row["images"]) for row in resumed.history] == [(1, 96), (2, 32)]
    assert resumed.finished


@pytest.mark.parametrize(("precision", "layout"), [("bf16", "nhwc"), ("amp", "nchw"), ("auto", "auto")])
def test_other_precisions_and_layouts_learn_too(precision: str, layout: str) -> None:
    run = train(_net(), halves_data(), recipe=QUICK.override({"precision": precision, "layout": layout}), epochs=6)
    assert run.settings.precision in ("bf16", "fp32")
    assert next(run.net.parameters()).is_contiguous()
    assert run.best_metric > 0.8


def test_accumulated_batches_are_one_large_batch() -> None:
    recipe = Recipe(
        name="x",
        epochs=1,
        batch_size=8,
        augment="none",
        optimizer="sgd",
        lr=0.1,
        momentum=0.0,
        precision="fp32",
        layout="nchw",
    )
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 3))
    state = {name: value.clone() for name, value in net.state_dict().items()}
    small = train(net, halves_data(16), recipe=recipe.override({"accumulate": 2}))
    other = nn.Sequential(nn.Flatten(), nn.Linear(144, 3))
    other.load_state_dict(state)
    large = train(other, halves_data(16), recipe=recipe.override({"batch_size": 16}))
    torch.testing.assert_close(small.net[1].weight, large.net[1].weight, rtol=1e-5, atol=1e-7)


def test_a_bad_step_is_skipped_and_counted() -> None:
    run = train(Poison(range(2, 4)), halves_data(), recipe=QUICK)
    assert run.history[-1]["skipped_steps"] == 2
    assert all(torch.isfinite(value).all() for value in run.net.state_dict().values())


def test_many_bad_steps_roll_back_and_then_stop() -> None:
    run = train(Poison(range(8, 16)), halves_data(160), recipe=QUICK)
    assert any("back to the start of epoch 1 at half the learning rate" in note for note in run.notes)
    assert run.history[-1]["epoch"] == 3
    with pytest.raises(
        UserError, match=r"training stopped: no finite loss or gradient for 8 steps in epoch 1 .* lower lr"
    ):
        train(Poison(range(10_000)), halves_data(160), recipe=QUICK)


def test_a_time_limit_ends_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of which each look takes a millisecond."""
    looks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(looks) / 1000)
    rates: list[float] = []
    run = train(
        _net(),
        halves_data(),
        recipe=QUICK,
        epochs=10_000,
        max_seconds=0.6,
        progress=lambda e: rates.append(e["lr"]) if e["kind"] == "step" else None,
    )
    assert run.history[-1]["epoch"] < 10_000
    assert max(rates) > 0.045  # it warmed up ...
    assert rates[-1] < 0.02  # ... and came down again


def test_early_stop_freezing_and_progressive_sizes() -> None:
    sizes: list[int] = []

    class Watch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small_net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                sizes.append(x.shape[-1])
            return self.body(x)

    net = Watch()
    before = net.body[0].weight.detach().clone()
    train(
        net,
        halves_data(),
        recipe=QUICK.override({"freeze_epochs": 10, "progressive": 0.6, "ema_decay": 0, "epochs": 4}),
    )
    assert torch.equal(net.body[0].weight, before)
    assert all(param.requires_grad for param in net.parameters())
    assert sizes[1] == 8
    assert sizes[-1] == 12
    run = train(
        _net(),
        halves_data(),
        recipe=QUICK.override({"lr": 1e-9, "early_stop": 2, "epochs": 50, "ema_decay": 0, "label_smoothing": 0}),
    )
    assert len(run.history) < 50


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = halves_data()
    with pytest.raises(UserError, match=r"batch_size 128 is larger than the train set \(96 images\)"):
        train(_net(), data, recipe=QUICK, batch_size=128)
    run = train(_net(), data, recipe=QUICK.override({"batch_size": 128, "epochs": 1}))
    assert "batch size 128 lowered to 96" in run.notes[0]
    with pytest.raises(UserError, match=r"outputs of shape .* the data has 3 classes"):
        train(small_net(classes=5), data, recipe=QUICK)
    with pytest.raises(UserError, match="device 'cuda:9'"):
        train(_net(), data, recipe=QUICK, device="cuda:9")
    with pytest.raises(UserError, match="it must be a number of seconds above 0"):
        train(_net(), data, recipe=QUICK, max_seconds=0)
    with pytest.raises(UserError, match="has no key 'learning_rate'"):
        train(_net(), data, recipe=QUICK, learning_rate=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UserError, match="exists and is not empty"):
        train(_net(), data, recipe=QUICK, output=tmp_path / "full")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(UserError, match=r"has 0 MB free, .* MB are needed"):
            train(_net(), data, recipe=QUICK, output=tmp_path / "small")
    train(_net(), data, recipe=QUICK, epochs=1, output=tmp_path / "seeded", seed=1)
    with pytest.raises(UserError, match="was trained with seed 1, not 2"):
        train(_net(), data, recipe=QUICK, output=tmp_path / "seeded", seed=2, resume=True)
    with pytest.raises(UserError, match="another architecture"):
        train(
            nn.Sequential(nn.Flatten(), nn.Linear(144, 3)),
            data,
            recipe=QUICK,
            output=tmp_path / "seeded",
            seed=1,
            resume=True,
        )


def test_progress_is_plain_where_there_is_no_terminal() -> None:
    from rich.console import Console

    out = io.StringIO()
    with LiveProgress("resnet", console=Console(file=out, soft_wrap=True)) as progress:
        train(_net(), halves_data(), recipe=QUICK, epochs=2, progress=progress)
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("resnet: epoch 2/2: train loss ")
    assert lines[1].endswith("0 s left")
    assert [words.duration(value) for value in (41.6, 250, 11_100)] == ["42 s", "4 min 10 s", "3 h 05 min"]
