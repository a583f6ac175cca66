"""``fit`` times, trains and ships networks with the head that its recipe puts on them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import convscale as cs
from convscale.arch.multipliers import scale_to
from convscale.arch.small import for_image_size
from convscale.choice.basis import Asked, basis_of
from convscale.choice.candidates import candidates_of
from convscale.conditions import Constraint
from convscale.errors import UserError
from convscale.images.preprocess import Preprocessing
from convscale.images.splits import ArraySplit
from convscale.learn.recipe import Recipe
from convscale.learn.recipes import get_recipe
from convscale.learn.schedule import lr_factor
from convscale.networks.foreign import Foreign
from convscale.pipeline.heads import candidates_with_head, named_with_head, with_head
from convscale.pipeline.request import Training
from convscale.pipeline.run import FitRun, fit
from convscale.pipeline.ship import Shipping, ship_elsewhere
from convscale.pipeline.steps import _whole_schedule
from tests.learn.nets import halves_data, small_net
from tests.pipeline.test_order import _finder, _record

NAMES = ("red", "green", "blue")


def test_the_recipe_says_the_head() -> None:
    assert Training(recipe="ml-decoder").head == "ml_decoder"
    assert Training(recipe="coco-asl").head == Training().head == "own"
    assert Training(overrides={"head": "ml_decoder"}).head == "ml_decoder"
    assert Training(recipe="ml-decoder", overrides={"head": "gap"}).head == "gap"
    assert Training(recipe="ml-decoder").checked_epochs("ml-decoder") is None


def test_specs_get_it_and_networks_of_other_code_can_not() -> None:
    spec, other = cs.get_spec("resnet18"), Foreign("resnet18.a1_in1k", "timm")
    assert with_head(spec, "own") == spec
    made = with_head(spec, "ml_decoder")
    assert (made.head.kind, made.name) == ("ml_decoder", "resnet18")
    assert dataclasses.replace(made, head=spec.head) == spec
    assert named_with_head(other, "own") is other
    with pytest.raises(UserError, match=r"head=ml_decoder as a recipe key .* resnet18\.a1_in1k is other code's"):
        named_with_head(other, "ml_decoder")


def test_of_candidates_own_ones_stay() -> None:
    found = candidates_of(["resnet18.a1_in1k", cs.get_spec("mobilenetv2_050")], (64,))
    assert candidates_with_head(found, "own") == found
    made = candidates_with_head(found, "ml_decoder")
    assert [(each.name, each.spec.head.kind) for each in made] == [  # pyright: ignore
        ("resnet18.a1_in1k", "ml_decoder"),
        ("mobilenetv2_050", "ml_decoder"),
    ]
    other = dataclasses.replace(found[0], name="x", spec=Foreign("x", "timm"))
    assert [each.name for each in candidates_with_head([other, *found], "gap")] == [each.name for each in found]
    with pytest.raises(UserError, match="x is other code's"):
        candidates_with_head([other], "ml_decoder")


def test_scaled_members_are_timed_with_it(tmp_path: Path) -> None:
    finder = _finder(_record(tmp_path, []), Constraint(max_params_m=12.0), training=Training(recipe="ml-decoder"))
    small, large = cs.get_spec("mobilenetv2_050"), cs.get_spec("resnet18")  # 0.7 and 11.2 million and a decoder of 6
    assert [(spec.name, spec.head.kind) for spec in finder._allowed([small, large])] == [
        ("mobilenetv2_050", "ml_decoder")
    ]


def test_a_comparison_goes_through_the_whole_schedule() -> None:
    """Of 80 epochs 16 rise: a fifth of the one epoch, whose end is the schedule's."""
    recipe = get_recipe("coco-asl")
    brief = recipe.override({"epochs": 1, **_whole_schedule(recipe, 1)})
    assert (brief.schedule_epochs, brief.warmup_epochs) == (0, 0.2)
    assert [lr_factor(brief, at, 1) for at in (0.2, 1.0)] == pytest.approx([1.0, 0.001])
    assert _whole_schedule(Recipe(name="x", epochs=9, warmup_epochs=2), 1) == {}


def test_8_bits_of_several_labels_are_judged_by_their_mean_average_precision(tmp_path: Path) -> None:
    def several(split: ArraySplit) -> ArraySplit:
        labels = torch.nn.functional.one_hot(split.labels, 3).float()
        labels[0] = torch.nan  # nobody knows
        return dataclasses.replace(split, labels=labels)

    data = halves_data()
    parts = {name: several(getattr(data, name)) for name in ("train", "validation", "test")}
    splits = dataclasses.replace(data, **parts)
    torch.manual_seed(0)
    made = ship_elsewhere(
        small_net().eval(),
        tmp_path / "artifact",
        splits,
        parts["test"],
        Preprocessing(image_size=12, channels=1, mean=(0.3,), std=(0.3,), crop_pct=1.0),
        basis_of(Asked(device="l4", runtime="onnxruntime", batch_size=64)),
        Shipping(runtime=None, int8=True, max_drop=100.0),
        card={},
        thresholds=(0.5,) * 3,
    )
    assert made.precision == "int8"
    for checked in (made.checked.to_dict(), made.artifact.verification or {}):
        assert "points of mean average precision on 30 images, 100 are allowed" in str(checked["reason"])
        assert 0 < checked["accuracy_after"] < 1


def _manifest(folder: Path, count: int = 72) -> Path:
    """Gray noise with up to three coloured squares, each in a corner of its own; every label half of the time."""
    random, lines = np.random.default_rng(0), ["path,labels,split"]
    folder.mkdir()
    for number in range(count):
        pixels = random.integers(90, 140, (40, 40, 3)).astype(np.uint8)
        there = [kind for kind in range(3) if number >> kind & 1]
        for kind in there:
            top, left = (kind // 2) * 20 + 3, (kind % 2) * 20 + 3
            pixels[top : top + 14, left : left + 14] = 30
            pixels[top : top + 14, left : left + 14, kind] = 230
        Image.fromarray(pixels).save(folder / f"{number}.png")
        split = ("train", "train", "val", "test")[number // 8 % 4]
        lines.append(f"{number}.png,{'|'.join(NAMES[kind] for kind in there)},{split}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder / "labels.csv"


SPEC = scale_to(for_image_size(cs.get_spec("resnet18"), 32), width=0.25, depth=0.5, name="small")


def _run(recipe: str, lr: float, folder: Path) -> FitRun:
    """Two networks compared, one trained in full, both by a recipe for several labels."""
    quick: dict[str, Any] = {
        "batch_size": 8,
        "lr": lr,
        "schedule_epochs": 0,
        "warmup_epochs": 1,
        "policy": "none",
        "cutout": 0,
    }
    quick |= {"ema_decay": 0.8, "precision": "fp32", "layout": "nchw", "scaled_decode": False}
    return fit(
        _manifest(folder / "set"),
        output=folder / "run",
        candidates=[SPEC, dataclasses.replace(scale_to(SPEC, width=0.5, depth=1.0), name="smaller")],
        min_throughput=1.0,
        image_size=32,
        recipe=recipe,
        epochs=5,
        batch_size=2,
        threads=1,
        runtime="onnxruntime",
        overrides=quick,
    )


@pytest.mark.usefixtures("briefly")
@pytest.mark.parametrize(
    ("recipe", "lr", "head"),
    [pytest.param("ml-decoder", 5e-4, "ml_decoder", marks=pytest.mark.slow), ("coco-asl", 4e-3, None)],
)
def test_several_labels_from_choosing_to_shipping(recipe: str, lr: float, head: Any, tmp_path: Path) -> None:
    run = _run(recipe, lr, tmp_path)
    record = run.result
    rows = {row.name: row for row in record.candidates}
    with torch.device("meta"):
        parameters = sum(p.numel() for p in cs.create_model(SPEC, num_classes=3, head=head).parameters())
    assert rows["small"].params == parameters  # it was timed with the head that it was trained with
    assert all(row.brief is not None for row in rows.values())
    (about,) = (run.output / "train" / "checkpoints").glob("best-*/checkpoint.json")
    kept = json.loads(about.read_text())
    assert kept["spec"].get("head", {}).get("kind") == head
    assert kept["recipe"]["loss"] == "asymmetric"
    artifact = cs.load_artifact(run.output / "artifact")
    assert artifact.classes == tuple(sorted(NAMES))
    assert artifact.thresholds is not None
    assert len(artifact.thresholds) == 3
    assert record.evaluation.mean_average_precision is not None
    assert record.evaluation.mean_average_precision > 0.8  # each label is half of the set
    checked = record.verification
    assert checked.accuracy_before == pytest.approx(record.evaluation.mean_average_precision)
    assert checked.accuracy_after == pytest.approx(checked.accuracy_before, abs=1e-3)
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    with torch.no_grad():
        logits = run.net(artifact.preprocessing.normalize(torch.from_numpy(images)))
    assert np.abs(artifact.logits(images) - logits.numpy()).max() < 1e-3
    answers = artifact.classify(sorted(str(path) for path in (tmp_path / "set").glob("1*.png")))
    right = sum(
        set(each.labels) == {n for k, n in enumerate(NAMES) if int(Path(each.name).stem) >> k & 1} for each in answers
    )
    assert right > 0.5 * len(answers)  # one of eight by chance
