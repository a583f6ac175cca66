"""What a run must not lose or do silently: statistics, outputs, classes, positions, interrupts."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import convscale as cs
from convscale.errors import UserError
from convscale.images.preprocess import Preprocessing
from convscale.images.sources import open_dataset
from convscale.learn.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint, verify_checkpoint
from convscale.learn.cost import RunCost
from convscale.learn.freeze import set_trainable, trainable
from convscale.learn.recipe import Recipe
from convscale.learn.schedule import lr_factor
from convscale.learn.teacher import open_teacher
from convscale.learn.train import train
from convscale.networks.foreign import Foreign
from tests.learn.nets import CLASSES, Poison, halves_data, small_net

QUICK = Recipe(
    name="quick", epochs=3, batch_size=16, lr=0.05, augment="shift-crop", ema_decay=0.9, precision="fp32", layout="nchw"
)


def _net() -> nn.Module:
    torch.manual_seed(5)
    return small_net()


def _poison(bad: range) -> nn.Module:
    torch.manual_seed(5)
    return Poison(bad)


class Stop(Exception):
    """Stands for a kill in the middle of a run."""


def _kill_at(step: int, losses: list[float] | None = None) -> Any:
    seen = 0

    def progress(event: dict[str, Any]) -> None:
        nonlocal seen
        seen += event["kind"] == "step"
        if losses is not None and event["kind"] == "step":
            losses.append(event["loss"])
        if seen == step:
            raise Stop

    return progress


def test_a_batch_that_is_not_finite_leaves_no_trace_in_the_statistics() -> None:
    class Poisoned(nn.Module):
        """NaN enters before the norms in the third step."""

        def __init__(self) -> None:
            super().__init__()
            self.body, self.calls = small_net(), 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += self.training
            return self.body(x * float("nan") if self.training and self.calls == 3 else x)

    run = train(Poisoned(), halves_data(), recipe=QUICK)
    assert run.history[-1]["skipped_steps"] == 1
    assert all(torch.isfinite(value).all() for value in run.net.state_dict().values())
    assert all(
        row["val_loss"] == pytest.approx(row["val_loss"]) and row["val_loss"] < 3 for row in run.history
    )  # NaN equals nothing


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"batch_size": 500}, "batch_size 500 is larger"),
        ({"lr": 0}, "lr must lie between"),
        ({"init": "nowhere.pth"}, "nowhere.pth"),
        ({"device": "tpu"}, "device 'tpu' is none of this machine's"),
        ({"recipe": "smal"}, "recipe 'smal' is unknown"),
        ({"teacher": "nowhere"}, "nowhere"),
        ({"distill_weight": 0.5}, "there is no teacher"),
        ({"policy": "randaugment"}, "goes with augment resized-crop only"),
        ({"keep": 0}, "keep is 0; it must be a whole number of at least 1"),
        ({"resume": "false"}, "resume is 'false'; it must be True or False"),
        ({"tensorboard": 1}, "tensorboard is 1; it must be True or False"),
        ({"keep": True}, "keep is True; it must be a whole number"),
        ({"keep": "2"}, "keep is '2'; it must be a whole number"),
        ({"seed": 1.5}, "seed is 1.5; it must be a whole number of at most 64 bits"),
        ({"seed": 2**64}, "seed is 18446744073709551616; it must be a whole number of at most 64 bits"),
        ({"workers": float("nan")}, "workers is nan; it must be a whole number of at least 0"),
        ({"checkpoint_seconds": "5"}, "checkpoint_seconds is '5'; it must be a number of seconds of at least 0"),
        ({"checkpoint_seconds": float("nan")}, "checkpoint_seconds is nan; it must be a number"),
        ({"checkpoint_seconds": -1}, "checkpoint_seconds is -1; it must be a number of seconds of at least 0"),
        ({"max_seconds": "60"}, "max_seconds is '60'; it must be a number of seconds above 0"),
        ({"max_seconds": True}, "max_seconds is True; it must be a number of seconds above 0"),
        ({"max_seconds": 0}, "max_seconds is 0; it must be a number of seconds above 0"),
        ({"epochs": True}, "recipe key epochs must be a whole number, got True"),
        ({"batch_size": 10**400}, "recipe key batch_size must be a whole number, got 1000"),
        ({"lr": float("nan")}, "recipe key lr must be a number, got nan"),
        ({"workers": -1}, "workers is -1; it must be"),
        ({"max_seconds": float("nan")}, "max_seconds is nan; it must be"),
    ],
)
def test_bad_input_overwrites_nothing(tmp_path: Path, bad: dict[str, Any], message: str) -> None:
    kept = tmp_path / "run" / "precious.txt"
    kept.parent.mkdir()
    kept.write_text("kept")
    (tmp_path / "run" / ".convscale").write_text("")  # a run of ours, which may be overwritten
    with pytest.raises(UserError, match=message):
        train(_net(), halves_data(), output=tmp_path / "run", overwrite=True, **{"recipe": QUICK, **bad})
    assert kept.read_text() == "kept"


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    folder, data = tmp_path / "run", halves_data()
    with pytest.raises(Stop):
        train(_net(), data, recipe=QUICK, output=folder, checkpoint_seconds=0, progress=_kill_at(9))
    again: dict[str, Any] = {"output": folder, "resume": True}
    with pytest.raises(UserError, match="was trained with batch_size 16, not 8; a resumed run keeps it"):
        train(_net(), data, recipe=QUICK, batch_size=8, **again)
    with pytest.raises(UserError, match="was trained with optimizer sgd, not adamw"):
        train(_net(), data, recipe=QUICK, optimizer="adamw", **again)
    for key, value, said in (
        ("weight_decay", 0.5, "weight_decay 0.0005, not 0.5"),
        ("precision", "bf16", "precision fp32, not bf16"),
        ("ema_decay", 0.0, "averaged weights"),
    ):
        with pytest.raises(UserError, match=said):  # the saved state would bring the old one back
            train(_net(), data, recipe=QUICK.override({key: value}), **again)
    (folder / "test_predictions.json").write_text("of the network so far")
    with pytest.raises(
        UserError, match="was trained with 6 steps per epoch, now there would be 5; have images come or gone"
    ):
        train(_net(), halves_data(80), recipe=QUICK, **again)
    renamed = {
        split: dataclasses.replace(getattr(data, split), classes=("left", "dark", "top"))
        for split in ("train", "validation", "test")
    }
    with pytest.raises(
        UserError, match=r"was trained on classes \['dark', 'left', 'top'\], the data's are \['left', 'dark', 'top'\]"
    ):
        train(_net(), dataclasses.replace(data, classes=("left", "dark", "top"), **renamed), recipe=QUICK, **again)
    run = train(_net(), data, lr=0.01, **again)  # the recipe it wrote, but for what is asked otherwise
    assert run.recipe == QUICK.override({"lr": 0.01})
    assert "resumed with another lr: 0.01 instead of 0.05" in run.notes
    assert run.history[-1]["epoch"] == 3
    assert not (folder / "test_predictions.json").exists()


def test_a_run_that_stopped_early_stays_stopped(tmp_path: Path) -> None:
    recipe = QUICK.override({"lr": 1e-9, "early_stop": 2, "epochs": 50, "ema_decay": 0})
    first = train(_net(), halves_data(), recipe=recipe, output=tmp_path / "run")
    (tmp_path / "run" / "test_predictions.json").write_text("of this network")
    again = train(_net(), halves_data(), recipe=recipe, output=tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "test_predictions.json").read_text() == "of this network"
    assert 2 < len(first.history) < 50
    assert [row["epoch"] for row in again.history] == [row["epoch"] for row in first.history]
    assert any("stopped early" in note for note in again.notes)


def test_a_damaged_state_is_written_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Stop):
        train(_net(), halves_data(), recipe=QUICK, output=folder, checkpoint_seconds=0, progress=_kill_at(9))
    newest = list_checkpoints(folder)[0]
    (newest / "model.safetensors").write_bytes(b"")
    with pytest.raises(Stop):  # one step further than the damaged one, which was made anew on the way
        train(
            _net(),
            halves_data(),
            recipe=QUICK,
            output=folder,
            resume=True,
            keep=9,
            checkpoint_seconds=0,
            progress=_kill_at(3),
        )
    assert newest in list_checkpoints(folder)
    assert all(verify_checkpoint(place) is None for place in list_checkpoints(folder))


@pytest.mark.parametrize("keep", [1, 2, 9])
def test_what_a_rollback_gave_up_is_not_resumed(tmp_path: Path, keep: int) -> None:
    folder, bad = tmp_path / "run", range(12, 20)  # of 10 steps an epoch: the last eight of the second
    undisturbed = train(_poison(bad), halves_data(160), recipe=QUICK)
    options: dict[str, Any] = {"output": folder, "checkpoint_seconds": 0, "keep": keep}
    with pytest.raises(Stop):  # in the second step after the rollback
        train(_poison(bad), halves_data(160), recipe=QUICK, progress=_kill_at(21), **options)
    states = list_checkpoints(folder)
    assert [place.name for place in states[:2]] == ["step-00000011", "step-00000010"][: min(keep, 2)]
    assert [_rollbacks(place) for place in states] == [(1, 0.5), (1, 0.5), *[(0, 1.0)] * 6][:keep]
    resumed = train(_poison(range(0)), halves_data(160), recipe=QUICK, resume=True, **options)
    assert [row["skipped_steps"] for row in resumed.history] == [0, 8, 8]
    for name, value in undisturbed.net.state_dict().items():
        assert torch.equal(value, resumed.net.state_dict()[name]), name


def _rollbacks(place: Path) -> tuple[int, float]:
    assert verify_checkpoint(place) is None
    numbers = json.loads((place / "state.json").read_text())["numbers"]
    return numbers["rollbacks"], numbers["lr_scale"]


def test_what_a_rollback_wrote_gets_its_number_when_the_run_goes_on(tmp_path: Path) -> None:
    train(_net(), halves_data(), recipe=QUICK, epochs=1, output=tmp_path / "run")
    (state,) = list_checkpoints(tmp_path / "run")
    shutil.copytree(state, state.with_name("step-00000008"))  # given up, and not yet removed
    state.rename(state.with_name("step-00000009"))
    with pytest.raises(Stop):
        train(_net(), halves_data(), recipe=QUICK, output=tmp_path / "run", resume=True, progress=_kill_at(1))
    assert [place.name for place in list_checkpoints(tmp_path / "run")] == ["step-00000006"]
    assert _rollbacks(tmp_path / "run" / "checkpoints" / "step-00000006") == (0, 1.0)


def test_a_best_network_that_was_given_up_goes_when_the_run_goes_on(tmp_path: Path) -> None:
    train(_net(), halves_data(), recipe=QUICK, epochs=1, output=tmp_path / "run")
    (best,) = list_checkpoints(tmp_path / "run", ("best",))
    known = load_checkpoint(tmp_path / "run", net=_net()).net.state_dict()
    best.rename(best.with_name("best-00000012"))  # a kill came before the rollback had put the earlier one back
    with pytest.raises(Stop):
        train(_net(), halves_data(), recipe=QUICK, output=tmp_path / "run", resume=True, progress=_kill_at(1))
    assert [place.name for place in list_checkpoints(tmp_path / "run", ("best",))] == ["best-00000006"]
    for name, value in load_checkpoint(tmp_path / "run", net=_net()).net.state_dict().items():
        assert torch.equal(value, known[name]), name


def test_a_rollback_behind_an_epoch_takes_its_best_network_back(tmp_path: Path) -> None:
    seen: list[tuple[str, ...]] = []

    def progress(event: dict[str, Any]) -> None:
        if event["kind"] == "epoch" or "back to the start" in event.get("text", ""):
            seen.append(tuple(place.name for place in list_checkpoints(tmp_path / "run", ("best",))))
        if event["kind"] == "step" and len(seen) == 3:
            raise Stop

    recipe = QUICK.override({"lr": 0.002, "ema_decay": 0})
    with pytest.raises(Stop):  # the eighth bad step is the first of the third epoch
        train(
            _poison(range(13, 21)),
            halves_data(160),
            recipe=recipe,
            output=tmp_path / "run",
            checkpoint_seconds=0,
            progress=progress,
        )
    assert seen == [("best-00000010",), ("best-00000020",), ("best-00000020",)]
    assert [place.name for place in list_checkpoints(tmp_path / "run", ("best",))] == ["best-00000010"]
    best = load_checkpoint(tmp_path / "run", net=_poison(range(0)))
    assert (best.epoch, best.meta["metrics"]["best"]["epoch"]) == (1, 1)
    assert [_rollbacks(place) for place in list_checkpoints(tmp_path / "run")] == [
        (1, 0.5)
    ]  # both before were given up
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 1


def test_a_scaler_resumes_exactly(tmp_path: Path) -> None:
    recipe = QUICK.override({"precision": "fp16", "lr": 0.02})
    whole: list[float] = []
    rest: list[float] = []
    undisturbed = train(_net(), halves_data(), recipe=recipe, progress=_kill_at(999, whole))
    with pytest.raises(Stop):
        train(_net(), halves_data(), recipe=recipe, output=tmp_path / "run", checkpoint_seconds=0, progress=_kill_at(8))
    resumed = train(
        _net(), halves_data(), recipe=recipe, output=tmp_path / "run", resume=True, progress=_kill_at(999, rest)
    )
    assert rest == whole[-len(rest) :]
    assert len(rest) in (11, 12)
    for name, value in undisturbed.net.state_dict().items():
        assert torch.equal(value, resumed.net.state_dict()[name]), name


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as a terminal has it, whatever started the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_first_interrupt_saves_and_a_second_ends(tmp_path: Path) -> None:
    def press(times: int) -> Any:
        steps = 0

        def progress(event: dict[str, Any]) -> None:
            nonlocal steps
            steps += event["kind"] == "step"
            for _ in range(times if steps == 8 and event["kind"] == "step" else 0):
                os.kill(os.getpid(), signal.SIGINT)

        return progress

    stopped = train(_net(), halves_data(), recipe=QUICK, output=tmp_path / "run", progress=press(1))
    assert not stopped.finished
    assert list_checkpoints(tmp_path / "run")[0].name == "step-00000008"
    with pytest.raises(KeyboardInterrupt):
        train(_net(), halves_data(), recipe=QUICK, output=tmp_path / "other", progress=press(2))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_frozen_norms_keep_their_statistics() -> None:
    net = small_net()
    net.train()
    given = trainable(net)
    set_trainable(net, frozen=True, given=given)
    before = net[1].running_mean.clone()
    net(torch.rand(4, 1, 12, 12)).sum().backward()
    assert torch.equal(net[1].running_mean, before)
    assert net[0].weight.grad is None
    assert net[9].weight.grad is not None
    assert net[8].training  # dropout
    net.train()
    set_trainable(net, frozen=False, given=given)
    net(torch.rand(4, 1, 12, 12))
    assert not torch.equal(net[1].running_mean, before)


def test_the_schedule_starts_when_all_layers_join() -> None:
    recipe = Recipe(name="x", schedule="cosine", freeze_epochs=2, warmup_epochs=2, start_factor=0.0, final_factor=0)
    # 10 epochs: 2 with the head alone, 2 of warm-up, 6 of cosine
    assert [lr_factor(recipe, epoch / 10, 10) for epoch in (0, 1.9, 2, 3, 4, 7, 10)] == pytest.approx(
        [1, 1, 0, 0.5, 1, 0.5, 0]
    )
    probe = recipe.override({"freeze_epochs": 10, "warmup_epochs": 0})
    assert lr_factor(probe, 0.5, 10) == pytest.approx(0.5)  # the head alone all the way


def test_a_teacher_sees_its_own_preprocessing(tmp_path: Path) -> None:
    class Mean(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3)).expand(-1, 3)

    student = Preprocessing(image_size=12, channels=1, mean=(0.5,), std=(0.25,), crop_pct=1.0)
    own = Preprocessing(image_size=24, channels=1, mean=(0.1,), std=(0.2,), crop_pct=1.0)
    from convscale.learn.teacher import Teacher

    pixels = torch.full((1, 12, 12, 1), 51, dtype=torch.uint8)  # 0.2
    assert Teacher(Mean(), own, student)(student.normalize(pixels))[0, 0].item() == pytest.approx(
        (0.2 - 0.1) / 0.2, abs=1e-5
    )
    save_checkpoint(tmp_path / "t", small_net(), classes=("a", "b", "c"), preprocessing=student)
    with pytest.raises(UserError, match="has no spec"):
        open_teacher(tmp_path / "t", ("a", "b", "c"), student)


NETS = """
import torch

def make():
    torch.manual_seed(5)
    net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 3))
    net.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.2, 0.2, 0.2), "input_size": (3, 24, 24)}
    return net
"""


def test_a_name_teaches_with_its_weights_and_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no such folder exists; what is built is asked for weights."""
    (tmp_path / "nets_that_teach.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    student = Preprocessing(image_size=12, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3, crop_pct=1.0)
    teacher = open_teacher("nets_that_teach:make", CLASSES, student)
    linear = next(module for module in teacher.modules() if isinstance(module, nn.Linear))
    pixels = torch.full((1, 12, 12, 3), 51, dtype=torch.uint8)  # 0.2
    expected = linear(torch.tensor([[0.5, 0.0, -0.5]]))  # (0.2 - mean) / std
    assert torch.allclose(teacher(student.normalize(pixels)), expected, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    asked: list[tuple[str, bool]] = []

    def create_model(name: str, pretrained: bool) -> nn.Module:
        asked.append((name, pretrained))
        return cs.create_model("mobilenetv2_050")

    def build_foreign(net: Foreign, *, pretrained: bool) -> nn.Module:
        asked.append((net.name, pretrained))
        return cs.create_model("mobilenetv2_050")

    monkeypatch.setattr("convscale.learn.teacher.create_model", create_model)
    monkeypatch.setattr("convscale.learn.teacher.build_foreign", build_foreign)
    for name in ("mobilenetv2_050.lamb_in1k", "resnet18", "timm/resnet18.a1_in1k"):
        open_teacher(name, CLASSES, student)
    assert asked == [("mobilenetv2_050.lamb_in1k", True), ("resnet18", True), ("resnet18.a1_in1k", True)]
    with pytest.raises(UserError, match="checkpoint resnet19 does not exist, and as a network: unknown model"):
        open_teacher("resnet19", CLASSES, student)
    grey = dataclasses.replace(student, channels=1, mean=(0.5,), std=(0.25,))
    with pytest.raises(UserError, match=r"teacher resnet18 takes 3 channel\(s\), the data has 1"):
        open_teacher("resnet18", CLASSES, grey)


def test_a_checkpoint_teaches(tmp_path: Path) -> None:
    from convscale.nn.net import create_model

    torch.manual_seed(0)
    recipe = QUICK.override({"epochs": 1, "ema_decay": 0})
    train(
        create_model("mobilenetv2_050", num_classes=3, in_chans=1),
        halves_data(),
        recipe=recipe,
        output=tmp_path / "teacher",
    )
    run = train(_net(), halves_data(), recipe=recipe, teacher=tmp_path / "teacher")
    assert run.recipe.distill_weight == 0.5
    data = halves_data()
    renamed = {
        split: dataclasses.replace(getattr(data, split), classes=("x", "y", "z"))
        for split in ("train", "validation", "test")
    }
    with pytest.raises(
        UserError, match=rf"has classes \['{CLASSES[0]}', .*the data \['x', 'y', 'z'\]; they must be the same"
    ):
        train(
            _net(),
            dataclasses.replace(data, classes=("x", "y", "z"), **renamed),
            recipe=recipe,
            teacher=tmp_path / "teacher",
        )


def _write_state(state: Path, text: dict[str, Any], name: str = "state.json") -> None:
    """A training state, or what its checkpoint says of itself, with its checksum."""
    (state / name).write_text(json.dumps(text))
    sums = state / "SHA256SUMS"
    digest = hashlib.sha256((state / name).read_bytes()).hexdigest()
    lines = [f"{digest}  {name}" if line.endswith(f"  {name}") else line for line in sums.read_text().splitlines()]
    sums.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("lacking", [(), ("splits",), ("splits", "data_digest")])
def test_a_run_does_not_go_on_with_other_data(tmp_path: Path, lacking: tuple[str, ...]) -> None:
    data = halves_data()
    recipe, folder = QUICK.override({"ema_decay": 0}), tmp_path / "run"
    train(_net(), data, recipe=recipe, epochs=1, output=folder)
    (state,) = list_checkpoints(folder)
    about = json.loads((state / "checkpoint.json").read_text())
    assert about["splits"] == data.digests()
    _write_state(state, {key: about[key] for key in about if key not in lacking}, "checkpoint.json")
    again: dict[str, Any] = {"recipe": recipe, "epochs": 2, "output": folder, "resume": True}
    for name, what in (("train", "another train set"), ("validation", "another validation set")):
        dealt = getattr(data, name).subset([*range(1, len(getattr(data, name))), 0])
        other = dataclasses.replace(data, **{name: dealt})
        what = "other train and validation sets" if lacking else what
        if len(lacking) < 2:
            with pytest.raises(UserError, match=f"run was trained on {what} than this data has: .* begin another run$"):
                train(_net(), other, **again)
    data = dataclasses.replace(data, test=data.test.subset([0, 1]))  # which is not trained on
    assert len(train(_net(), data if len(lacking) < 2 else other, **again).history) == 2


def test_a_run_of_an_older_version_goes_on_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which knew images beside their manifest without the folder's name, where it was named from within it."""
    place, folder = tmp_path / "set", tmp_path / "run"
    place.mkdir()
    lines = ["path,label,split"]
    for number in range(15):
        label, split = number % 3, "train" if number < 9 else "validation" if number < 12 else "test"
        Image.new("L", (12, 12), 70 * label + number).save(place / f"{number}.png")
        lines.append(f"{number}.png,{CLASSES[label]},{split}")
    (place / "labels.csv").write_text("\n".join(lines))
    again: dict[str, Any] = {"recipe": QUICK.override({"ema_decay": 0}), "output": folder, "resume": True}
    monkeypatch.chdir(place)
    train(_net(), open_dataset("labels.csv", channels=1), **again | {"epochs": 1})
    data = open_dataset("labels.csv", channels=1)
    (state,) = list_checkpoints(folder)
    about = json.loads((state / "checkpoint.json").read_text())
    assert about["splits"] == data.digests() != data.digests(older=True)
    _write_state(state, about | {"splits": data.digests(older=True)}, "checkpoint.json")
    monkeypatch.chdir(tmp_path)
    assert len(train(_net(), open_dataset("set/labels.csv", channels=1), **again | {"epochs": 2}).history) == 2


def test_a_state_that_can_not_be_used_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    train(_net(), halves_data(), recipe=QUICK, epochs=1, output=tmp_path / "run")
    state = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    text = json.loads((state / "state.json").read_text())
    numbers = text["numbers"]
    for change, said in (
        ({"best_weights": -1}, "best_weights are not those of the network"),
        ({"best_weights": {}}, "best_weights are not those of the network"),
        ({"numbers": numbers | {"epoch": "x"}}, r"numbers\.epoch is 'x'; it must be a whole number"),
        ({"numbers": numbers | {"lr_scale": None}}, r"numbers\.lr_scale is None; it must be a number"),
        ({"numbers": numbers | {"sums": {"loss": "x"}}}, r"numbers\.sums\.loss is 'x'; it must be a number"),
        ({"numbers": numbers | {"best": numbers["best"] | {"metric": []}}}, r"numbers\.best\.metric is \[\]"),
    ):
        _write_state(state, text | change)
        with pytest.raises(UserError, match=said):
            train(_net(), halves_data(), recipe=QUICK, epochs=2, output=tmp_path / "run", resume=True)


def test_a_run_of_an_older_version_goes_on(tmp_path: Path) -> None:
    train(_net(), halves_data(), recipe=QUICK, epochs=2, output=tmp_path / "run")
    state = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    text = json.loads((state / "state.json").read_text())
    for row in text["numbers"]["history"]:
        del row["images"], row["train_seconds"]
    _write_state(state, text)
    run = train(_net(), halves_data(), recipe=QUICK, epochs=3, output=tmp_path / "run", resume=True)
    assert run.cost.images == 3 * 96


def test_the_cost_of_a_run_that_time_cuts_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of which each look takes a millisecond."""
    looks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(looks) / 1000)
    steps = 0

    def count(event: dict[str, Any]) -> None:
        nonlocal steps
        steps += event["kind"] == "step"

    run = train(_net(), halves_data(960), recipe=QUICK, epochs=50, max_seconds=0.2, progress=count)
    assert run.cost.images == steps * QUICK.batch_size
    assert steps % 60 != 0  # its last epoch was not a whole one
    assert run.cost.waiting_s <= run.cost.training_s <= run.cost.seconds


def test_a_run_says_what_it_cost_and_what_would_have_been_faster() -> None:
    run = train(_net(), halves_data(), recipe=QUICK.override({"epochs": 2}))
    assert isinstance(run.cost, RunCost)
    assert run.cost.images == 2 * 96
    assert run.cost.seconds == pytest.approx(run.seconds)
    assert 0 <= run.cost.waiting_s <= run.cost.training_s <= run.cost.seconds
    assert any("layout=auto" in text for text in run.cost.advice)  # it was fixed
    lines = run.describe().splitlines()
    assert lines[1].startswith("cost: ")
    assert "192 images" in lines[1]
    assert all(line.startswith("faster: ") for line in lines[2:])


def test_compiled_training_learns_and_keeps_plain_names(tmp_path: Path) -> None:
    run = train(_net(), halves_data(), recipe=QUICK.override({"compile": True, "epochs": 4}), output=tmp_path / "run")
    assert set(run.net.state_dict()) == set(small_net().state_dict())
    assert run.best_metric > 0.6
