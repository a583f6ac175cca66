"""What is wrong with the input is found before an earlier run is replaced."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import convscale as cs
from convscale.errors import UserError
from convscale.images.splits import ArraySplit, DataSplits
from convscale.learn import train as train_module
from convscale.learn.loader import TrainLoader
from convscale.learn.prepare import fit_batch, take_folder
from convscale.learn.progress import Event
from convscale.learn.recipe import Recipe
from convscale.learn.recipes import get_recipe
from convscale.learn.request import TrainRequest
from convscale.learn.train import train
from convscale.locks import OutputLock
from convscale.networks.foreign import Foreign
from tests.learn.nets import CLASSES, halves, halves_data, small_net

PLAIN = Recipe(name="x", epochs=1, batch_size=32, augment="none", schedule="wsd", precision="fp32", layout="nchw")


def _net() -> nn.Module:
    torch.manual_seed(5)
    return small_net()


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def stable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stable") / "run"
    train(_net(), halves_data(), recipe=PLAIN.override({"decay_share": 0}), output=folder)
    return folder


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("earlier") / "run"
    train(_net(), halves_data(), recipe=PLAIN, output=folder)
    return folder


def test_overwrite_keeps_the_earlier_run_until_all_input_is_good(
    stable: Path, earlier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _contents(earlier)
    assert len(before) > 5

    def refused(said: str, change: dict[str, object] | None = None, data: Any = None, **options: Any) -> None:
        recipe = PLAIN.override(change or {})
        with pytest.raises(UserError, match=said):
            train(_net(), data or halves_data(), recipe=recipe, output=earlier, overwrite=True, **options)
        assert _contents(earlier) == before

    refused("accumulate 4 is more than the 3 batches of an epoch", {"accumulate": 4})
    refused("this network has no set_grad_checkpointing", {"grad_checkpointing": True})
    refused("solve_head needs a network with forward_features", {"solve_head": True})
    refused("teacher_cache is .*, but there is no teacher", teacher_cache=tmp_path / "cache")
    file = stable / "recipe.yaml"
    refused("teacher_cache .* can not be written: .*recipe.yaml is no folder", teacher=small_net(), teacher_cache=file)
    refused("distill_features needs a network with a linear", {"distill_features": 1.0}, teacher=nn.Flatten())
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused("--track wandb needs wandb, which is not installed", track="wandb")
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    refused("schedule-free", {"optimizer": "schedule-free", "schedule": "constant"})
    grown: dict[str, Any] = {"branch": stable, "epochs": 3}
    refused("was trained with seed 0, not 1", seed=1, **grown)
    refused("was trained with batch_size 32, not 16", {"batch_size": 16}, **grown)
    data = halves_data()
    named: dict[str, Any] = {
        name: dataclasses.replace(part, classes=("a", "b", "c"))
        for name in ("train", "validation", "test")
        if isinstance(part := getattr(data, name), ArraySplit)
    }
    refused("was trained on classes", data=dataclasses.replace(data, classes=("a", "b", "c"), **named), **grown)
    run = train(_net(), halves_data(), recipe=PLAIN, epochs=3, output=earlier, overwrite=True, branch=stable)
    assert [row["epoch"] for row in run.history] == [1, 2, 3]
    assert _contents(earlier) != before


@pytest.mark.parametrize("first", [True, False])
def test_the_first_process_alone_needs_the_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    """One without it, on another machine, ended before it had joined the others, and these waited for it."""
    asked: list[TrainRequest] = []

    def train_of(request: TrainRequest, _unnamed: object) -> None:
        asked.append(request)

    monkeypatch.setattr(train_module, "_train", train_of)
    monkeypatch.setitem(sys.modules, "wandb", None)
    train(_net(), halves_data(), recipe=PLAIN, output=tmp_path / "run", track="wandb")
    processes: Any = SimpleNamespace(first=first, world=1, from_first=lambda value: value)
    with OutputLock() as lock:
        if first:
            with pytest.raises(UserError, match="--track wandb needs wandb, which is not installed"):
                take_folder(asked[0], (), processes, lock)
        else:
            assert not take_folder(asked[0], (), processes, lock)
    with pytest.raises(UserError, match="tracker 'wandbb' is unknown"):
        train(_net(), halves_data(), recipe=PLAIN, output=tmp_path / "run", track="wandbb")


def test_a_branch_of_what_would_be_overwritten_is_refused(stable: Path) -> None:
    before = _contents(stable)
    for branch in (stable, stable / "checkpoints" / "step-00000003"):
        with pytest.raises(UserError, match=r"output .* holds branch .*, which --overwrite would delete"):
            train(_net(), halves_data(), recipe=PLAIN, epochs=3, output=stable, overwrite=True, branch=branch)
    assert _contents(stable) == before


def test_a_teachers_answers_may_lie_in_the_output_folder(tmp_path: Path) -> None:
    for _ in range(2):
        train(
            _net(),
            halves_data(),
            recipe=PLAIN,
            output=tmp_path / "run",
            overwrite=True,
            teacher=small_net(),
            teacher_cache=tmp_path / "run" / "answers",
        )
        assert len(list((tmp_path / "run" / "answers").glob("*/epoch-00001.npy"))) == 1


@pytest.mark.parametrize(
    ("world", "asked", "lowered"), [(1, 64, 64), (1, 97, 96), (2, 48, 48), (2, 64, 48), (5, 64, 19), (97, 64, 64)]
)
def test_a_batch_that_nobody_asked_for_is_no_larger_than_a_processs_share(world: int, asked: int, lowered: int) -> None:
    """Of 96 images; 97 processes can have none each, and the loader says so."""
    told: list[Event] = []
    recipe = fit_batch(PLAIN.override({"batch_size": asked}), 96, told.append, world)
    assert recipe.batch_size == lowered
    assert len(told) == (lowered < asked)
    if world < 97:
        assert TrainLoader(halves(96), recipe, image_size=12, world=world).steps_per_epoch >= 1


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The recipe of a training that would begin, and what it was told before."""

    def ask(net: Any, data: DataSplits, **given: Any) -> tuple[Recipe, list[str]]:
        seen, told = list[Recipe](), list[str]()

        def caught(request: TrainRequest, splits: DataSplits, **_: object) -> None:
            seen.append(request.recipe)
            raise UserError("far enough")

        monkeypatch.setattr(train_module, "prepare", caught)
        with pytest.raises(UserError, match="far enough"):
            train(net, data, progress=lambda event: told.append(event["text"]), **given)
        return seen[0], told

    return ask


def headed(num_classes: int, in_chans: int) -> nn.Module:
    """A user's own function that gives a network with timm's names for its parts; it draws random numbers."""
    torch.rand(1)
    return cs.create_model("mobilenetv2_050", num_classes=num_classes, in_chans=in_chans)


def _larger(side: int) -> DataSplits:
    def split(name: str) -> ArraySplit:
        pixels = torch.zeros(6, side, 60, 1, dtype=torch.uint8)
        return ArraySplit(split=name, classes=CLASSES, labels=torch.arange(6) % 3, channels=1, pixels=pixels)

    return DataSplits(train=split("train"), validation=split("validation"), test=split("test"), classes=CLASSES)


@pytest.mark.parametrize(
    ("net", "side", "given", "name"),
    [
        ("resnet18", 64, {}, "small"),
        ("resnet18", 65, {}, "pictures"),
        ("resnet18", 64, {"image_size": 64}, "small"),
        ("resnet18", 64, {"image_size": "64x96"}, "pictures"),
        ("resnet18", 65, {"init": "pretrained"}, "finetune"),
        ("resnet18", 32, {"init": "weights.pth"}, "finetune"),
        (cs.get_spec("resnet18"), 65, {"init": "weights.pth"}, "finetune"),
        (Foreign("convnext_atto", "timm"), 65, {"init": "pretrained"}, "finetune"),
        ("resnet18", 65, {"init": "pretrained", "head": "gap"}, "finetune"),
        ("convscale:create_model", 65, {"init": "weights.pth"}, "pictures"),  # it can not be built, which prepare says
        (f"{__name__}:headed", 65, {"init": "weights.pth"}, "finetune"),
        (f"{__name__}:small_net", 32, {"init": "weights.pth", "solve_head": False}, "finetune"),
        # Of these no head can be solved; those of timm classify by a convolution.
        ("torchvision.models:resnet18", 65, {"init": "weights.pth"}, "pictures"),
        (small_net(), 32, {"init": "weights.pth"}, "small"),
        ("resnet18", 65, {"init": "pretrained", "head": "ml_decoder"}, "pictures"),
        ("dpn68.mx_in1k", 65, {"init": "pretrained"}, "pictures"),
        (Foreign("dla34.in1k", "timm"), 32, {"init": "pretrained"}, "small"),
        (small_net(), 65, {}, "pictures"),
    ],
)
def test_the_recipe_that_nobody_names_goes_by_weights_and_images(
    asked: Any, net: Any, side: int, given: dict[str, Any], name: str
) -> None:
    """``train --init pretrained`` fine-tuned photographs by the recipe for small images from scratch."""
    drawn = torch.get_rng_state()
    made, told = asked(net, _larger(side), lr=0.125, epochs=7, **given)
    assert torch.equal(torch.get_rng_state(), drawn)
    keys = {key: value for key, value in given.items() if key != "init"}
    assert made == get_recipe(name).override({"lr": 0.125, "epochs": 7, **keys})
    why = {"small": "for small images", "pictures": "for pictures", "finetune": "for a start from weights"}[name]
    if name != "finetune" and "init" in given:
        why += ": no head to solve is known of this network, as finetune needs one"
    elif name != "finetune":
        why += " from scratch"
    if isinstance(net, nn.Module) and "init" not in given:
        why += "; finetune is for a network that brings weights"
    assert told == [f"no recipe is named: {name}, {why}"]


def test_a_recipe_that_is_named_or_was_written_is_taken(asked: Any, stable: Path) -> None:
    assert asked("resnet18", _larger(65), recipe="small", init="pretrained") == (get_recipe("small"), [])
    wrote = asked("resnet18", _larger(65), init="pretrained", output=stable, resume=True)
    assert wrote == (PLAIN.override({"decay_share": 0}), [])
