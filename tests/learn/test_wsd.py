"""Warm-up, stable, decay: the rate by hand, and a branch of a stable phase against the run that nobody cut."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from convscale.errors import UserError
from convscale.learn.branch import branch_off, keep_best
from convscale.learn.checkpoint import list_checkpoints, load_checkpoint
from convscale.learn.distributed import Trouble
from convscale.learn.ema import Ema, build_ema, power_of
from convscale.learn.loop import Trainer
from convscale.learn.recipe import Recipe
from convscale.learn.resume import restore
from convscale.learn.schedule import lr_factor
from convscale.learn.train import TrainRun, train
from tests.learn.nets import halves_data, small_net

WSD = Recipe(
    name="x",
    epochs=5,
    batch_size=32,
    lr=0.05,
    schedule="wsd",
    warmup_epochs=1,
    decay_share=0.4,
    augment="shift-crop",
    ema_width=0.1,
    precision="fp32",
    layout="nchw",
)


def test_the_rate_rises_stays_and_falls_by_the_root() -> None:
    """Ten epochs, two of warm-up, the last four of decay: a quarter of it takes half of the rate."""
    recipe = Recipe(name="x", schedule="wsd", warmup_epochs=2, start_factor=0.2, decay_share=0.4, final_factor=0.1)
    assert [lr_factor(recipe, at / 10, 10) for at in (0, 1, 2, 4, 6)] == pytest.approx([0.2, 0.6, 1, 1, 1])
    assert [lr_factor(recipe, at / 10, 10) for at in (7, 8)] == pytest.approx([0.5, 1 - math.sqrt(0.5)])
    assert lr_factor(recipe, 0.99, 10) == pytest.approx(0.1)  # 1 - sqrt(0.975) is below it
    assert lr_factor(recipe.override({"final_factor": 0}), 1.0, 10) == pytest.approx(0.0)
    forever = recipe.override({"decay_share": 0})
    assert [lr_factor(forever, at, 10) for at in (0.5, 0.99, 1.0)] == [1.0, 1.0, 1.0]
    late = recipe.override({"decay_share": 1, "warmup_epochs": 5})  # the warm-up is not cut short
    assert [lr_factor(late, at, 10) for at in (0.5, 0.625)] == pytest.approx([1.0, 0.5])


def test_widths_are_those_of_the_paper() -> None:
    """Karras et al. 2024 train with 16.97 and 6.94 for 0.05 and 0.1."""
    assert [round(power_of(width), 2) for width in (0.05, 0.1)] == [16.97, 6.94]


def test_a_power_average_weighs_steps_by_their_number() -> None:
    """Power 1: step j of t counts (2 j - 1) / t squared, whatever the weights were before the first."""
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, 100.0)
    ema = Ema(net, 0.0, power=1.0)
    for value in (2.0, 5.0, -1.0):
        nn.init.constant_(net.weight, value)
        ema.update(net)
    assert ema.net.weight.item() == pytest.approx((1 * 2 + 3 * 5 + 5 * -1) / 9)
    rare = Ema(net, 0.0, power=1.0)
    for value in (3.0, 7.0):
        nn.init.constant_(net.weight, value)
        rare.update(net, 4)  # 8 steps, of which the first four count a quarter: 16 of 64
    assert rare.net.weight.item() == pytest.approx(0.25 * 3 + 0.75 * 7)


def test_the_recipe_chooses_the_average() -> None:
    net = nn.Linear(1, 1)
    assert build_ema(net, Recipe(name="x")) is None
    constant = build_ema(net, Recipe(name="x", ema_decay=0.9))
    assert constant is not None
    assert (constant.decay, constant.power) == (0.9, None)
    wide = build_ema(net, Recipe(name="x", ema_decay=0.9, ema_width=0.1))
    assert wide is not None
    assert wide.power == pytest.approx(6.94, abs=0.005)


def _net() -> nn.Module:
    torch.manual_seed(5)
    return small_net()


def _same(left: TrainRun, right: TrainRun) -> bool:
    return all(torch.equal(a, right.net.state_dict()[name]) for name, a in left.net.state_dict().items())


@pytest.fixture(scope="module")
def stable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs that never decay, every state kept."""
    folder = tmp_path_factory.mktemp("stable") / "run"
    recipe = WSD.override({"epochs": 3, "decay_share": 0})
    train(_net(), halves_data(), recipe=recipe, output=folder, keep=9, seed=3)
    return folder


def test_a_branch_is_the_run_that_nobody_cut(stable: Path, tmp_path: Path) -> None:
    """Five epochs of which the last two decay, at once or from the third epoch of a run that was not to end."""
    whole = train(_net(), halves_data(), recipe=WSD, seed=3)
    grown = train(_net(), halves_data(), recipe=WSD, seed=3, branch=stable, output=tmp_path / "run")
    assert _same(whole, grown)
    assert [row["lr"] for row in grown.history] == [row["lr"] for row in whole.history]
    assert [row["val_loss"] for row in grown.history] == [row["val_loss"] for row in whole.history]
    assert [round(row["lr"], 6) for row in grown.history][1:3] == [0.05, 0.05]
    assert grown.history[4]["lr"] < 0.25 * 0.05  # the last of six steps of decay: 1 - sqrt(5 / 6)
    best = load_checkpoint(tmp_path / "run", net=small_net()).net.state_dict()
    assert all(torch.equal(best[name], value) for name, value in whole.net.state_dict().items())


def test_a_branch_keeps_the_best_that_it_found(stable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the stable phase found best is marked by zeros; no epoch of the branch is better."""

    def marked(trainer: Trainer, place: Path) -> Path:
        found = restore(trainer, place)
        assert trainer.best_weights is not None
        trainer.best_weights = {name: torch.zeros_like(value) for name, value in trainer.best_weights.items()}
        return found

    monkeypatch.setattr("convscale.learn.branch.restore", marked)
    monkeypatch.setattr(Trainer, "_keep_if_better", lambda self, result: False)
    run = train(_net(), halves_data(), recipe=WSD, seed=3, branch=stable, output=tmp_path / "run")
    kept = load_checkpoint(tmp_path / "run", net=small_net())
    assert kept.path.name.startswith("best-")
    for weights in (kept.net.state_dict(), run.net.state_dict()):
        assert all(not value.any() for value in weights.values())


def test_a_branch_whose_folder_is_full_tells_the_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise UserError("the disk is full")

    net = _net()
    trainer: Any = SimpleNamespace(
        trouble=Trouble(SimpleNamespace(world=2, rank=0)),  # pyright: ignore[reportArgumentType]
        folder=SimpleNamespace(save_best=full),
        job=SimpleNamespace(progress=lambda event: None),
        watched=net,
        best_weights=net.state_dict(),
        best={"epoch": 1},
        history=[],
        steps_per_epoch=3,
    )
    monkeypatch.setattr("convscale.learn.branch.restore", lambda trainer, place: place)
    branch_off(trainer, Path("state"))
    keep_best(trainer)
    assert trainer.trouble.rank == 0
    with pytest.raises(UserError, match="the disk is full"):
        trainer.trouble.end(-1)


def test_two_branches_of_one_run_keep_its_recipe(stable: Path, tmp_path: Path) -> None:
    """From an earlier state, a shorter run; what is not said is as in the run that it grows from."""
    early = next(place for place in list_checkpoints(stable) if place.name == "step-00000006")  # two epochs
    short = train(_net(), halves_data(), epochs=3, decay_share=0.3, seed=3, branch=early, output=tmp_path / "short")
    assert (short.recipe.lr, short.recipe.ema_width, short.recipe.epochs) == (0.05, 0.1, 3)
    assert [row["epoch"] for row in short.history] == [1, 2, 3]
    whole = train(_net(), halves_data(), recipe=WSD.override({"epochs": 3, "decay_share": 0.3}), seed=3)
    assert _same(short, whole)
    again = train(_net(), halves_data(), seed=3, output=tmp_path / "short", resume=True)
    assert _same(short, again)


def test_what_can_not_be_a_branch_is_told_before_anything_is_written(stable: Path, tmp_path: Path) -> None:
    def refused(said: str, place: Path = stable, **options: Any) -> None:
        given: dict[str, Any] = {"recipe": WSD, "seed": 3, "branch": place, "output": tmp_path / "out"} | options
        with pytest.raises(UserError, match=said):
            train(_net(), halves_data(), **given)
        assert not (tmp_path / "out").exists()

    refused(r"stands after 3 epochs, and the decay of 4 epochs begins after 2\.4; give more epochs", epochs=4)
    refused("the schedule cosine; it must be wsd", recipe=WSD.override({"schedule": "cosine"}))
    refused("which brings weights and position; leave init out", init="pretrained")
    refused("leave max_seconds out", max_seconds=9.0)
    refused("checkpoint .* does not exist", place=tmp_path / "nowhere")
    train(_net(), halves_data(), recipe=WSD.override({"epochs": 2}), seed=3, output=tmp_path / "ended", keep=9)
    refused(r"stands at 0\.\d+ of its run's peak rate, in the warm-up or the decay", place=tmp_path / "ended")
    place = tmp_path / "cycle"
    train(_net(), halves_data(), recipe=WSD.override({"epochs": 1, "schedule": "cosine"}), seed=3, output=place)
    refused("is of a run with schedule cosine; it must be wsd or constant", place=place)


def test_on_the_command_line(stable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from convscale.cli.app import app

    seen: dict[str, Any] = {}

    def kept(net: object, splits: object, **options: Any) -> None:
        seen.update(options)
        raise UserError("enough")

    monkeypatch.setattr("convscale.learn.train.train", kept)
    monkeypatch.setattr("convscale.images.sources.open_dataset", lambda *args, **options: halves_data())
    words = ["train", "--data-dir", "x", "--output", str(tmp_path / "out"), "--model", "resnet18"]
    words += ["--schedule", "wsd", "--decay-share", "0.1", "--branch", str(stable)]
    CliRunner().invoke(app, words)
    assert (seen["schedule"], seen["decay_share"], seen["branch"]) == ("wsd", 0.1, stable)
    assert json.dumps(seen["track"]) == "null"
