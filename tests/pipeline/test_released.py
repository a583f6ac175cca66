"""fit from released weights: files that stand in for them (random, named by tag), and pictures in class folders."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image

import convscale as cs
from convscale.pipeline.run import fit

TAGS = ("mobilenetv2_050.lamb_in1k", "resnet18.a1_in1k")
COLOURS = ((220, 60, 40), (40, 200, 60), (50, 60, 210))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Three classes of noisy colour, 24 pictures of 72 px each."""
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for name, colour in zip("rgb", COLOURS, strict=True):
        (root / name).mkdir()
        for number in range(24):
            pixels = np.clip(np.array(colour) + random.normal(0, 40, (72, 72, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    for number, tag in enumerate(TAGS):
        torch.manual_seed(number)
        torch.save(cs.create_model(tag.partition(".")[0]).state_dict(), folder / f"{tag}.pth")
    return folder


OPTIONS = {"image_size": 64, "threads": 1, "batch_size": 2, "epochs": 1, "runtime": "onnxruntime"}


@pytest.fixture(scope="module")
def run(pictures, weights, tmp_path_factory):
    said = []
    folder = tmp_path_factory.mktemp("fit") / "run"
    made = fit(
        pictures,
        min_throughput=1.0,
        output=folder,
        candidates=list(TAGS),
        weights_dir=weights,
        progress=lambda event: said.append(event.get("text", "")),
        **OPTIONS,
    )
    return made, said


def test_candidates_are_released_weights_in_the_form_in_which_they_would_ship(run, weights):
    made, _ = run
    rows = {row["name"]: row for row in made.record["candidates"]}
    assert set(rows) == set(TAGS)
    for tag, row in rows.items():
        assert row["weights"] == str(weights / f"{tag}.pth")
        assert row["kept"]
        assert row["finalist"]
        assert row["licence"] == "apache-2.0"
        assert row["measurement"]["conditions"]["image_size"] == 64
        assert "in onnxruntime" in row["measurement"]["notes"][0]
        assert row["params"] == sum(p.numel() for p in cs.create_model(tag.partition(".")[0]).parameters())


def test_the_data_rank_the_features_before_anything_is_trained(run):
    made, said = run
    for row in made.record["candidates"]:
        assert 0.5 <= row["probe"]["top1"] <= 1.0  # even random features tell these colours apart
        assert row["probe"]["validation"] == len(made.net.classes) if hasattr(made.net, "classes") else True
        assert row["brief"]["epochs"] == 1
    order = [said.index(next(text for text in said if start in text)) for start in ("probing 1", "comparing", "chosen")]
    assert order == sorted(order)


def test_the_winner_starts_from_its_file_and_is_fine_tuned(run, weights):
    made, _ = run
    winner = made.record["winner"]
    assert winner["weights"] == str(weights / f"{winner['name']}.pth")
    assert made.record["recipe"]["name"] == "finetune"
    assert made.missed == ""
    assert made.artifact.image_size == 64
    stem = torch.load(winner["weights"])["stem.0.conv.weight"]
    trained = made.net.state_dict()["stem.0.conv.weight"]
    assert (trained - stem).abs().max() < 0.05  # one epoch at small steps: it came from there
    assert not torch.equal(trained, stem) or made.record["history"][0]["epoch"] == 1


def test_a_run_from_weights_is_resumed(run, pictures, weights, monkeypatch):
    made, _ = run
    monkeypatch.setattr("convscale.pipeline.steps.train", None)  # nothing may be trained again
    again = fit(
        pictures,
        min_throughput=1.0,
        output=made.output,
        candidates=list(TAGS),
        weights_dir=weights,
        resume=True,
        **OPTIONS,
    )
    assert again.record["winner"] == made.record["winner"]


def test_an_impossible_speed_still_leaves_a_network_and_says_what_it_misses(
    pictures, weights, tmp_path, capsys, monkeypatch
):
    from convscale.cli.fit import _finish

    asked = {"min_throughput": 1e7, "candidates": TAGS[0], "weights_dir": weights, **OPTIONS}
    with pytest.raises(ValueError, match=r"nothing keeps at least 10,000,000 images/s: the fastest is mobilenetv2_050"):
        fit(pictures, output=tmp_path / "strict", strict=True, **asked)
    monkeypatch.setattr("convscale.pipeline.finish.SECOND_LOOK_S", 0.1)
    made = fit(pictures, output=tmp_path / "run", **asked)
    speed = made.record["artifact"]["measurement"]["times_s"]
    shipped = 2 / float(np.median(speed))
    assert made.missed == (
        f"what is shipped runs at {shipped:,.0f} images/s, {1 - shipped / 1e7:.0%} below the 10,000,000 asked for"
    )
    assert made.record["artifact"]["keeps_constraint"] is False
    assert made.missed in made.report.read_text()
    with pytest.raises(typer.Exit) as end:
        _finish(made, as_json=False)
    assert end.value.exit_code == 3
    assert made.missed in " ".join(capsys.readouterr().err.split())


def test_a_device_that_is_not_here_is_chosen_for_by_prediction(pictures, weights, tmp_path, monkeypatch):
    monkeypatch.setattr("convscale.pipeline.finding.ROWS", 0)  # what is trained has a row however many there are
    options = {**OPTIONS, "runtime": None, "threads": None, "batch_size": 64}
    made = fit(
        pictures,
        device="l4",
        min_throughput=1000.0,
        output=tmp_path / "run",
        candidates=TAGS[1],
        weights_dir=weights,
        **options,
    )
    row = made.record["candidates"][0]
    told = cs.predict("resnet18", device="l4", precision="amp", image_size=64, batch_size=64, compiled=True)
    assert row["predicted"]["images_per_s"] == pytest.approx(told.images_per_s)
    assert row["predicted"]["low"] == pytest.approx(told.low)
    assert row["measurement"] is None
    assert made.record["constraint"]["conditions"]["runtime"] == "compiled"
    assert made.record["constraint"]["confidence"] == 0.8
    assert made.record["artifact"]["format"] == "onnx"
    assert made.record["artifact"]["measurement"] is None
    assert made.record["verification"]["passed"]
    promise = cs.load_artifact(made.output / "artifact").promise
    assert (promise.device, promise.runtime, promise.batch_size, promise.asked) == ("l4", "compiled", 64, 1000.0)
    assert promise.images_per_s == pytest.approx(told.images_per_s)
    card = (made.output / "artifact" / "README.md").read_text()
    assert "images/s predicted (80 %: " in card
    assert "NVIDIA L4, compiled, amp, batch 64, 64 px, asked for 1,000; not measured there" in card


def test_a_damaged_file_of_weights_costs_one_candidate_not_the_run(pictures, weights, tmp_path, monkeypatch):
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / f"{TAGS[0]}.pth").write_bytes((weights / f"{TAGS[0]}.pth").read_bytes())
    (folder / f"{TAGS[1]}.pth").write_bytes((weights / f"{TAGS[1]}.pth").read_bytes()[:5000])
    monkeypatch.setattr("convscale.pipeline.steps.Fit.compare", stop)  # what follows is as for any network
    asked = {"min_throughput": 1.0, "candidates": list(TAGS), "weights_dir": folder, **OPTIONS}
    with pytest.raises(KeyboardInterrupt):
        fit(pictures, output=tmp_path / "run", **asked)
    rows = {r["name"]: r for r in json.loads((tmp_path / "run" / "fit.json").read_text())["candidates"]}
    assert (rows[TAGS[0]]["finalist"], rows[TAGS[1]]["finalist"]) == (True, False)
    assert rows[TAGS[1]]["reason"].startswith("left out: ")
    assert "is no file of weights alone" in rows[TAGS[1]]["reason"]
    with pytest.raises(ValueError, match="is no file of weights alone"):
        fit(pictures, output=tmp_path / "one", **asked | {"candidates": TAGS[1]})
    bad = folder / f"{TAGS[1]}.pth"
    with pytest.raises(ValueError, match="is no file of weights alone"):  # a file that is named is read first of all
        fit(pictures, output=tmp_path / "file", **asked | {"candidates": TAGS[1], "weights_dir": None, "init": bad})
    assert not (tmp_path / "file").exists()


def test_where_no_weights_can_be_had_a_line_says_so_and_fit_goes_on(pictures, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("convscale.networks.weight_files.WeightFiles._cached", staticmethod(lambda tag: None))
    said = []
    monkeypatch.setattr("convscale.pipeline.steps.Fit.compare", stop)  # what follows is as for any network
    with pytest.raises(KeyboardInterrupt):
        fit(
            pictures,
            min_throughput=1.0,
            output=tmp_path / "run",
            candidates=TAGS[0],
            progress=lambda event: said.append(event.get("text", "")),
            **OPTIONS,
        )
    assert any(text.startswith("no released weights can be had") and "--weights-dir" in text for text in said)
    record = json.loads((tmp_path / "run" / "fit.json").read_text())
    assert [(row["name"], row["finalist"], row.get("weights")) for row in record["candidates"]] == [
        (TAGS[0], True, None)
    ]
    assert any("no released weights can be had" in note for note in record["choice_notes"])


def stop(*_):
    raise KeyboardInterrupt
