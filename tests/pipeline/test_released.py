"""fit from released weights: files that stand in for them (random, named by tag), and pictures in class folders."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import typer
from PIL import Image

import convscale as cs
from convscale.cli.fit import _finish
from convscale.learn.probe import Probe
from convscale.machine import Environment
from convscale.pipeline.finish import Finish
from convscale.pipeline.record import RunRecord
from convscale.pipeline.run import fit
from convscale.runtimes.onnxruntime import BoundOnnxRunner, OnnxRuntime
from convscale.show.fit_parts import Candidate, Timed, Winner
from convscale.show.fit_sections import verdict
from convscale.speed.records import Record, append_record
from convscale.words import rate

TAGS = ("mobilenetv2_050.lamb_in1k", "resnet18.a1_in1k")
PROBED = Probe(top1=0.5, train=1, validation=1, seconds=0.0)
COLOURS = ((220, 60, 40), (40, 200, 60), (50, 60, 210))
pytestmark = pytest.mark.usefixtures("briefly")


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
def run(briefly, pictures, weights, tmp_path_factory):
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
        assert row["extra_data"] == ""
        trained = cs.create_model(tag.partition(".")[0], num_classes=3)
        assert row["params"] == sum(p.numel() for p in trained.parameters())


def test_the_data_rank_the_features_before_anything_is_trained(run):
    made, said = run
    for row in made.record["candidates"]:
        assert 0.5 <= row["probe"]["top1"] <= 1.0  # even random features tell these colours apart
        images = sum(made.record["data"][name] for name in ("train", "validation"))
        assert (row["probe"]["validation"], row["probe"]["folds"]) == (images, 5)  # few, so all in turns
        assert "brief" not in row  # an epoch would tell no more on so few
    starts = ("probing 1", "were not trained briefly", "chosen")
    order = [said.index(next(text for text in said if start in text)) for start in starts]
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
    assert (winner["licence"], winner["extra_data"]) == ("apache-2.0", "")
    card = (made.output / "artifact" / "README.md").read_text()
    assert f"- **Starting weights**: {winner['name']}" in card.replace("\\", "")
    assert "- **Licence of the starting weights**: apache-2.0" in card
    assert "- **Extra data**: none beside ImageNet-1k" in card
    speed = 2 / float(np.median(made.record["artifact"]["measurement"]["times_s"]))
    assert f"- **Speed**: {speed:,.1f} images/s, " in card  # the one that is promised, not the tuning's
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


@pytest.mark.slow
def test_an_impossible_speed_still_leaves_a_network_and_says_what_it_misses(
    pictures, weights, tmp_path, capsys, monkeypatch
):
    asked = {"min_throughput": 1e7, "candidates": TAGS[0], "weights_dir": weights, **OPTIONS}
    with pytest.raises(ValueError, match=r"nothing keeps at least 10,000,000 images/s: the fastest is mobilenetv2_050"):
        fit(pictures, output=tmp_path / "strict", strict=True, **asked)
    monkeypatch.setattr("convscale.pipeline.finish.SECOND_LOOK_S", 0.1)
    monkeypatch.setattr("convscale.pipeline.finish.busy_now", lambda: "")
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
    with pytest.raises(cs.UserError, match=r"asked for; --strict refuses it, the artefact stays in .*artifact$"):
        _finish(made, as_json=False, strict=True)


def test_a_device_that_is_not_here_is_chosen_for_by_prediction(pictures, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("convscale.pipeline.finding.ROWS", 0)  # what is trained has a row however many there are
    options = {**OPTIONS, "runtime": None, "threads": None, "batch_size": 64}
    said = []
    made = fit(
        pictures,
        device="l4",
        min_throughput=1000.0,
        output=tmp_path / "run",
        candidates=TAGS[1],
        weights_dir=weights,
        progress=lambda event: said.append(event.get("text", "")),
        **options,
    )
    assert said[0].startswith("speeds are predicted for l4 in runtime compiled, since none was named; --runtime tensor")
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
    assert (promise.device, promise.runtime, promise.precision, promise.batch_size) == ("l4", "compiled", "amp", 64)
    assert (promise.image_size, promise.min_throughput) == (64, 1000.0)
    assert promise.images_per_s == pytest.approx(told.images_per_s)
    assert promise.confidence > 0.999
    card = (made.output / "artifact" / "README.md").read_text()
    assert "Predicted for l4, not measured: " in card
    assert "compiled, amp, nchw, batch 64, 64 px, model only. Asked for were 1,000 images/s" in card
    _finish(made, as_json=False)
    speed = "images/s on l4 (compiled)"
    assert f"%); predicted {rate(told.images_per_s)} {speed}; artefact" in " ".join(capsys.readouterr().out.split())
    assert f"is predicted to run at {rate(told.images_per_s)} {speed} and is right" in verdict(made.result)
    _confirm_by_stand_ins(made.output / "artifact", monkeypatch)


def _confirm_by_stand_ins(artifact, monkeypatch):
    """What fit ships is confirmed: on the processor in the card's place."""

    class ProcessorAsCard(BoundOnnxRunner):
        place = "cpu"

    monkeypatch.setattr("convscale.ship.confirm.card_name", lambda device: "NVIDIA L4")
    monkeypatch.setattr(
        OnnxRuntime, "open", lambda self, source, how: ProcessorAsCard(source, replace(how, device="cpu"))
    )
    found = cs.confirm(artifact, min_seconds=0.02)
    asked = found.measurement.conditions
    assert (asked.device, asked.runtime, asked.batch_size) == ("cuda", "onnxruntime", 64)
    assert found.notes == (
        "promised in compiled, measured in onnxruntime",
        "promised in amp, the artefact is in fp32",
    )


def row_on_the_card(model: str, images_per_s: float) -> Record:
    """As the script of a kit writes it on an L4."""
    conditions = cs.Conditions(
        device="l4", precision="amp", batch_size=64, image_size=64, runtime="onnxruntime", layout="nchw"
    )
    card = Environment(device_name="NVIDIA L4", cores=1)
    measured = cs.Measurement(times_s=(64 / images_per_s,) * 5, conditions=conditions, environment=card, model=model)
    return Record(model=model, measurement=measured)


def test_what_was_measured_on_the_card_decides_and_sets_the_rest(pictures, weights, tmp_path, monkeypatch):
    """ResNet-18 is the more accurate and predicted to be fast enough; on the card it was not."""
    rows = tmp_path / "rows.jsonl"
    append_record(rows, row_on_the_card("resnet18", 500.0))
    monkeypatch.setattr("convscale.pipeline.steps.Fit.compare", stop)
    options = {**OPTIONS, "runtime": None, "threads": None, "batch_size": 64}
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        fit(
            pictures,
            device="l4",
            min_throughput=600.0,
            measured=rows,
            output=folder,
            candidates=list(TAGS),
            weights_dir=weights,
            **options,
        )
    record = json.loads((folder / "fit.json").read_text())
    found = {row["name"]: row for row in record["candidates"]}
    assert record["constraint"]["conditions"]["runtime"] == "onnxruntime"  # the rows' own, where none is named
    slow, fast = found[TAGS[1]], found[TAGS[0]]
    assert (slow["kept"], slow.get("predicted"), fast["kept"], fast.get("measurement")) == (False, None, True, None)
    assert slow["measurement"]["times_s"] == [64 / 500.0] * 5
    assert slow["measurement"]["environment"]["device_name"] == "NVIDIA L4"
    told = [
        cs.predict(name, device="l4", precision="amp", image_size=64, batch_size=64, runtime="onnxruntime").images_per_s
        for name in ("mobilenetv2_050", "resnet18")
    ]
    # One row moves the others half of its way in the logarithm.
    assert fast["predicted"]["images_per_s"] == pytest.approx(told[0] * (500.0 / told[1]) ** 0.5)


def test_what_was_measured_on_the_card_is_promised_as_measured(tmp_path):
    """Its quartiles are no 80 % interval: 490 to 510 around 500 would be said to keep 505 with some probability."""
    times = tuple(64 / speed for speed in (480.0, 490.0, 500.0, 510.0, 520.0))
    row = row_on_the_card("resnet18", 500.0).measurement
    record = RunRecord(tmp_path, {}, resume=False)
    timed = Timed.of(replace(row, times_s=times))
    chosen = Candidate(name="resnet18", family="resnet", image_size=64, params=1, macs=1, measurement=timed)
    record.put(candidates=(chosen,), winner=Winner(name="resnet18", image_size=64))
    finish = Finish(
        asked=SimpleNamespace(rows=object()),
        record=record,
        splits=None,
        folder=tmp_path,
        basis=SimpleNamespace(conditions=row.conditions),
        min_throughput=505.0,
        say=print,
    )
    artifact = SimpleNamespace(manifest=SimpleNamespace(get=lambda key: None, computes="fp16"), gate_elsewhere=())
    promise = finish._promise(SimpleNamespace(artifact=SimpleNamespace(**vars(artifact), precision="fp16")))
    assert (promise.images_per_s, promise.low, promise.high) == pytest.approx((500.0, 490.0, 510.0))
    assert (promise.measured, promise.confidence, promise.min_throughput) == (True, None, 505.0)


@pytest.mark.parametrize(
    ("device", "text", "words"),
    [
        ("cpu", "", "measured is of a device that is not here, got device 'cpu'"),
        ("l4", "", "has no rows"),
        ("a10", None, "was measured on 'NVIDIA L4', the choice is for"),
    ],
)
def test_rows_that_say_nothing_of_the_device_are_refused(pictures, tmp_path, device, text, words):
    rows = tmp_path / "rows.jsonl"
    if text is None:
        append_record(rows, row_on_the_card("resnet18", 500.0))
    else:
        rows.write_text(text)
    with pytest.raises(ValueError, match=words):
        fit(pictures, device=device, batch_size=64, measured=rows, output=tmp_path / "run", min_throughput=1.0)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
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


ON_A_CARD = {**OPTIONS, "runtime": None, "threads": None, "batch_size": 64, "image_size": None, "device": "l4"}


def found_by(pictures, folder, monkeypatch, **options):
    """What the first half of a fit wrote down: candidates by name and size, and the notes."""
    monkeypatch.setattr("convscale.pipeline.steps.Fit.compare", stop)
    monkeypatch.setattr("convscale.pipeline.finding.Finder.probed", lambda self, contenders, recipe: list(contenders))
    with pytest.raises(KeyboardInterrupt):
        fit(pictures, output=folder, **{**ON_A_CARD, **options})
    record = json.loads((folder / "fit.json").read_text())
    return {(row["name"], row["image_size"]): row for row in record["candidates"]}, record


def test_weights_that_are_too_slow_at_their_own_size_are_tried_on_smaller_images(
    pictures, weights, tmp_path, monkeypatch
):
    """By hand: resnet18's own size is 224 px (its figures are at 224 and 288); twice its speed there is asked for, so
    images of 224 / sqrt(2.1) = 154 px should do, and the next step of 32 below is 128."""
    own = cs.predict("resnet18", device="l4", precision="amp", image_size=224, batch_size=64, compiled=True)
    rows, record = found_by(
        pictures,
        tmp_path / "run",
        monkeypatch,
        min_throughput=2 * own.images_per_s,
        candidates=TAGS[1],
        weights_dir=weights,
    )
    row = rows[TAGS[1], 128]
    assert (row["kept"], row["finalist"], row.get("published_top1")) == (True, True, None)
    assert row["weights"] == str(weights / f"{TAGS[1]}.pth")
    assert not rows[TAGS[1], 224]["kept"]
    assert any("take smaller images, at which nobody published one" in note for note in record["choice_notes"])
    assert record.get("missed") is None


def test_scaled_members_take_over_where_no_weights_keep_the_speed(pictures, weights, tmp_path, monkeypatch):
    tiny = cs.scale("tresnet_m", width=0.25, depth=0.3, image_size=96, name="tiny")
    monkeypatch.setattr("convscale.pipeline.finding.families_for", lambda size: ("tresnet_m",))
    monkeypatch.setattr("convscale.pipeline.finding.members", lambda base, size: [tiny])
    fast = cs.predict(tiny, device="l4", precision="amp", image_size=96, batch_size=64, compiled=True)
    slow = cs.predict("mobilenetv2_050", device="l4", precision="amp", image_size=96, batch_size=64, compiled=True)
    # what the scaled one has with a probability of 0.8: 0.84 of the 1.28 deviations down to the interval's end
    sure = fast.images_per_s * (fast.low / fast.images_per_s) ** (0.8416 / 1.2816)
    assert slow.images_per_s < sure
    asked = (slow.images_per_s * sure) ** 0.5  # the fastest released one is not as likely as not to keep it
    rows, record = found_by(pictures, tmp_path / "run", monkeypatch, min_throughput=asked, weights_dir=weights)
    assert rows["tiny", 96]["finalist"]
    assert rows["tiny", 96].get("weights") is None
    assert not any(row.get("finalist") for (name, _), row in rows.items() if name != "tiny")
    assert any("scaled networks do, which start from scratch" in note for note in record["choice_notes"])


def test_a_spec_beside_released_weights_starts_from_scratch_and_the_others_do_not(
    pictures, weights, tmp_path, monkeypatch
):
    spec = cs.scale("efficientnet_b0", width=0.5, image_size=64, name="half")
    rows, _ = found_by(
        pictures,
        tmp_path / "run",
        monkeypatch,
        min_throughput=10.0,
        candidates=[TAGS[1], spec],
        weights_dir=weights,
        init="pretrained",
        image_size=64,
    )
    assert rows["half", 64].get("weights") is None
    assert rows[TAGS[1], 64]["weights"] == str(weights / f"{TAGS[1]}.pth")
    assert rows["half", 64]["finalist"]
    assert rows[TAGS[1], 64]["finalist"]


def test_a_file_of_weights_of_a_spec_is_what_its_network_starts_from(pictures, tmp_path, monkeypatch):
    """As ``train --init FILE`` takes it: probed, trained and shipped is the spec, not what the zoo has by its name."""
    spec = replace(cs.scale("efficientnet_b0", width=0.5, image_size=64), name="resnet18")
    file = tmp_path / "w.pth"
    torch.save((net := cs.create_model(spec)).state_dict(), file)
    started = []
    monkeypatch.setattr("convscale.pipeline.probing.probe", lambda net, *_, **__: started.append(net) or PROBED)
    monkeypatch.setattr("convscale.pipeline.steps.Fit.compare", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(pictures, output=tmp_path / "run", **{**ON_A_CARD, "min_throughput": 1.0}, candidates=[spec], init=file)
    record = json.loads((tmp_path / "run" / "fit.json").read_text())
    assert [(row["name"], row["weights"], row["finalist"]) for row in record["candidates"]] == [
        ("resnet18", str(file), True)
    ]
    (built,) = started
    assert built.spec == spec
    own = net.state_dict()
    stem = next(name for name in own if own[name].ndim == 4)
    assert torch.equal(built.state_dict()[stem], own[stem])


def recipe(run):
    """The name of the recipe by which the first finalist would be trained."""
    return run.recipe(run.contenders()[0])


def test_a_lone_network_whose_head_is_not_to_be_solved_is_not_probed(pictures, tmp_path, monkeypatch):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    net.append(torch.nn.Linear(4, 3))
    file = tmp_path / "w.pth"
    torch.save(net.state_dict(), file)
    options = {**ON_A_CARD, "image_size": 64, "min_throughput": 1.0, "candidates": net, "init": file}
    recipes = []
    monkeypatch.setattr("convscale.pipeline.steps.Fit.compare", lambda self: recipes.append(recipe(self)) or stop())
    for name, keys in (("a", {}), ("b", {"solve_head": False})):  # whose head is one that can not be solved
        with pytest.raises(KeyboardInterrupt):
            fit(pictures, output=tmp_path / name, **options, overrides=keys)
        (row,) = json.loads((tmp_path / name / "fit.json").read_text())["candidates"]
        assert (row["name"], row["weights"], row["finalist"]) == ("Sequential", str(file), True)
    assert recipes == ["pictures", "finetune"]
    with pytest.raises(cs.UserError, match="solve_head needs a network with forward_features"):
        fit(pictures, output=tmp_path / "c", **options, recipe="finetune")
