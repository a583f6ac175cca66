"""Networks of other code on the command line: timm's names, a user's own functions, filters."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import convscale as cs
from convscale.arch.zoo import ARCHITECTURES
from convscale.choice import speeds as choice_speeds
from convscale.choice.basis import Basis
from convscale.choice.facts import NetworkFacts, SizedSpec, Speed
from convscale.cost import counting
from convscale.errors import UserError
from convscale.predictor.calibrate import observations_of
from convscale.speed.records import read_records

COLUMNS = 120
pytestmark = pytest.mark.usefixtures("briefly")
FACTORY = """
from torch import nn

def make(num_classes=3, in_chans=3):
    net = nn.Sequential(
        nn.Conv2d(in_chans, 4, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)
    )
    net.num_classes = num_classes
    return net
"""


@pytest.fixture
def alike(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every network runs at 1,000 images/s, so that the most accurate wins."""
    monkeypatch.setenv("CONVSCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(choice_speeds, "MANY", 10**9)
    monkeypatch.setattr(choice_speeds, "traced_before", lambda networks, basis: {})

    def examine(network: SizedSpec, basis: Basis) -> NetworkFacts:
        speed = Speed(images_per_s=1000, low=900, high=1100, kind="predicted")
        return NetworkFacts(params=1_000_000, macs=1, memory_bytes=1, speed=speed, fused="repvgg" in network.spec.name)

    monkeypatch.setattr(choice_speeds, "examine", examine)


CHOOSE = ("choose", "--device", "rtx-4090", "--min-throughput", "500")


def chosen(call: Any, *options: str) -> dict[str, Any]:
    code, out, err = call(*CHOOSE, *options, "--json")
    assert code == 0, err
    return json.loads(out)


def everything(value: dict[str, Any]) -> list[dict[str, Any]]:
    return [value["best"], *(row for key in ("maybe", "alternatives", "rejected") for row in value[key])]


def test_the_most_accurate_of_all_that_was_released(call: Any, alike: None) -> None:
    """timm's table: the best ConvNet, and the best that saw ImageNet-1k alone."""
    best = chosen(call)["best"]
    assert (best["name"], best["top1"]) == ("convnextv2_huge.fcmae_ft_in22k_in1k_512", 88.86)
    assert (best["licence"], best["extra_data"]) == ("cc-by-nc-4.0", "ImageNet-22k")
    assert "results-imagenet.csv" in best["source"]
    sold = chosen(call, "--commercial")
    assert sold["best"]["name"] != best["name"]
    assert not {"cc-by-nc-4.0", "unknown"} & {row["licence"] for row in everything(sold)}
    assert {row["extra_data"] for row in everything(chosen(call, "--no-extra-data"))} == {""}
    assert {row["licence"] for row in everything(chosen(call, "--licence", "mit"))} == {"mit"}


def test_attention_is_left_out_unless_asked_for(call: Any, alike: None) -> None:
    code, _, err = call(*CHOOSE, "--model", "vit_tiny*")
    assert code == 2
    assert "--attention takes them" in err
    value = chosen(call, "--model", "vit_tiny*", "--attention")
    assert value["best"]["name"] == "vit_tiny_patch16_384.augreg_in21k_ft_in1k"
    assert any("attention" in note for note in value["notes"])


def test_the_table_says_licence_data_and_form(call: Any, alike: None) -> None:
    code, out, _ = call(*CHOOSE, "--model", "repvgg_b0", "--model", "vgg16*")
    assert code == 0
    text = " ".join(out.split())
    assert "licence mit, trained on ImageNet-1k alone" in text
    assert "in the re-parameterised form for inference" in text
    assert re.search(r"75\.16 % +1,000 +repvgg_b0\.rvgg_in1k @224 +mit", out)  # timm's table


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--licence", "gpl"), r"licence 'gpl' is unknown \(known: apache-2.0, bsd-3-clause"),
        (("--zoo", "hub"), r"zoo 'hub' is unknown \(known: own, timm, all\)"),
        (("--model", "vit_tinny_patch16_224"), r"no model matches 'vit_tinny_patch16_224' \(nearest: vit_tiny"),
        (("--model", "gone.nets:make"), "gone.nets can not be imported"),
    ],
)
def test_a_wrong_word_is_one_line(call: Any, alike: None, options: tuple[str, ...], message: str) -> None:
    code, _, err = call(*CHOOSE, *options)
    assert code == 2
    assert re.search(message, err)
    assert len(err.splitlines()) == 1


def test_lists_hold_both_zoos(call: Any) -> None:
    code, out, _ = call("list", "vit_tiny_patch*")
    assert (code, out.split()) == (0, ["vit_tiny_patch16_224", "vit_tiny_patch16_384"])  # those with a figure
    assert call("list", "vit_tiny*", "--zoo", "own")[0] == 2
    assert set(call("list", "--zoo", "own")[1].split()) == set(ARCHITECTURES)
    _, out, _ = call("list", "vgg16*", "--pretrained", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert rows["vgg16.tv_in1k"]["licence"] == "bsd-3-clause"
    assert rows["vgg16.tv_in1k"]["results"][0]["top1"] == 71.594


def test_timms_networks_are_counted_and_predicted_by_name(call: Any) -> None:
    code, out, _ = call("count", "vit_tiny_patch16_224", "repvgg_a0", "--json")
    assert code == 0
    vit, repvgg = json.loads(out)
    assert vit["params"] / 1e6 == pytest.approx(5.72, abs=0.006)  # timm's table
    assert repvgg["params"] / 1e6 == pytest.approx(8.31, abs=0.006)  # merged (RepVGG, table 4: 8.30 M)
    code, out, _ = call("predict", "vit_tiny_patch16_224", "resnet18", "--device", "rtx-4090", "--json")
    first, second = json.loads(out)["predictions"]
    assert any("attention" in doubt for doubt in first["doubts"])
    assert not any("attention" in doubt for doubt in second["doubts"])


def test_only_own_networks_are_scaled(call: Any) -> None:
    code, _, err = call("scale", "vit_tiny_patch16_224", "--width", "0.5")
    assert code == 2
    assert "has no spec" in err


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A function of one's own, and pictures in two classes."""
    (tmp_path / "ournets.py").write_text(FACTORY)
    draw = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2), ("test", 2)):
        for number, name in enumerate(("dark", "light")):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(128 * number, 128 * number + 128, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "ournets", raising=False)
    return "ournets:make"


def train(call: Any, model: str, output: str) -> tuple[int, str, str]:
    options = ("--epochs", "1", "--img-size", "32", "-j", "0", "-b", "8")
    return call("train", "--model", model, "--data-dir", "photos", "--output", output, *options)


def test_a_function_of_ones_own_is_trained_evaluated_and_shipped(call: Any, mine: str) -> None:
    code, _, err = train(call, mine, "runs/own")
    assert code == 0, err
    code, _, err = call("evaluate", "runs/own", "--data-dir", "photos")
    assert code == 2
    assert "--model ournets:make" in err  # a file does not choose what code runs
    code, _, err = call("evaluate", "runs/own", "--data-dir", "photos", "--model", mine)
    assert code == 0, err
    code, _, err = call("export", "runs/own", "--output", "out/own", "--model", mine)
    assert code == 0, err
    assert json.loads(Path("out/own/classes.json").read_text()) == ["dark", "light"]


def test_a_network_of_timms_is_trained_and_shipped(call: Any, mine: str) -> None:
    code, _, err = train(call, "timm/mobilenetv3_small_050", "runs/timm")
    assert code == 0, err
    code, _, err = call("evaluate", "runs/timm", "--data-dir", "photos")
    assert code == 0, err
    code, _, err = call("export", "runs/timm", "--output", "out/timm")
    assert code == 0, err


def test_a_name_is_exported_untrained(call: Any, mine: str) -> None:
    code, out, err = call("export", "timm/mobilenetv3_small_050", "--output", "out/name", "--img-size", "64")
    assert code == 0, err
    assert "untrained" in out
    assert len(json.loads(Path("out/name/classes.json").read_text())) == 1000


def test_a_network_of_a_file_is_measured_and_calibrates(call: Any, tmp_path: Path) -> None:
    """Its record holds its spec: no name says what to build."""
    spec = cs.scale("resnet18", width=0.1, depth=0.1, image_size=32)
    cs.save_spec(spec, tmp_path / "mine.yaml")
    record = tmp_path / "mine.jsonl"
    options = ("--runtime", "eager", "-b", "1", "--seconds", "0.01", "--record", record)
    assert call("measure", tmp_path / "mine.yaml", "resnet18", "--img-size", "32", *options)[0] == 0
    mine, named = read_records(record)
    assert mine.spec is not None
    assert cs.NetSpec.from_dict(dict(mine.spec)) == spec
    assert named.spec is None
    code, out, err = call("calibrate", "--measurement", record, "--output", tmp_path / "cpu.json")
    assert (code, err) == (0, "")
    assert "by 2 measurements" in out
    args = ("--model", tmp_path / "mine.yaml", "-b", "1", "--seconds", "0.01", "--output", tmp_path / "cpu.json")
    code, out, err = call("calibrate", *args, "--overwrite", "--json")
    assert code == 0, err
    value = json.loads(out)
    assert (value["count"], value["unknown"]) == (1, [])


def test_networks_of_the_user_s_own_are_listed_and_drawn(
    call: Any, alike: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "listednets.py").write_text(FACTORY)
    path = tmp_path / "mine.yaml"
    cs.save_spec(cs.scale("resnet18", width=0.1, depth=0.1, image_size=32, name="my_net"), path)
    for name in (str(path), "listednets:make"):
        assert call("list", name) == (0, f"{name}\n", "")
        code, out, _ = call("list", name, "--json")
        assert (code, json.loads(out)) == (0, [name])
    page = tmp_path / "speed.html"
    models = ("--model", path, "--model", "listednets:make", "--img-size", "32")
    code, _, err = call("report", "--predict", *models, "--output", page)
    assert code == 0, err
    text = page.read_text()
    assert "my_net" in text
    assert "listednets:make" in text


def test_an_edited_network_that_kept_its_name_is_recorded_with_its_spec(call: Any, tmp_path: Path) -> None:
    """Or it would be drawn with, and calibrated as, the zoo's network of that name."""
    spec = replace(cs.scale("resnet18", width=0.1, depth=0.1, image_size=32), name="resnet18", lineage=None)
    cs.save_spec(spec, tmp_path / "edited.yaml")
    record = tmp_path / "edited.jsonl"
    options = ("--runtime", "eager", "-b", "1", "--seconds", "0.01", "--record", record)
    assert call("measure", tmp_path / "edited.yaml", *options)[0] == 0
    (edited,) = read_records(record)
    assert edited.model == "resnet18"
    assert edited.spec is not None
    assert cs.NetSpec.from_dict(dict(edited.spec)) == spec
    (seen,) = observations_of([edited], "cpu")[0]
    assert seen.net == spec


def test_a_network_that_can_not_be_counted_keeps_its_measurement(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count(*_: object) -> None:
        raise UserError("its forward can not be traced")

    monkeypatch.setattr(counting, "count", count)
    spec = cs.scale("resnet18", width=0.1, depth=0.1, image_size=32)
    cs.save_spec(spec, tmp_path / "mine.yaml")
    record = tmp_path / "mine.jsonl"
    code, out, err = call(
        *("measure", tmp_path / "mine.yaml", "--runtime", "eager", "-b", "1", "--seconds", "0.01", "--record", record)
    )
    assert code == 0, err
    assert "images/s" in out
    (kept,) = read_records(record)
    assert (kept.params, kept.macs, kept.activations) == (None, None, None)
