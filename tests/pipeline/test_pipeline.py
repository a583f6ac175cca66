"""The whole way on a few real images: Fashion-MNIST's first ones, two small networks, one epoch."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import convscale as cs
from convscale.arch.multipliers import scale_to
from convscale.arch.small import for_image_size
from convscale.arch.spec import NetSpec
from convscale.arch.zoo import get_spec
from convscale.choice.basis import Basis
from convscale.conditions import Conditions
from convscale.images.preprocess import Preprocessing
from convscale.images.sources import open_dataset
from convscale.images.splits import DataSplits
from convscale.learn.loader import into_memory
from convscale.pipeline import finish
from convscale.pipeline.contender import build
from convscale.pipeline.demo import DEMO_FOLDERS, fashion_mnist
from convscale.pipeline.run import fit
from convscale.pipeline.ship import Shipping, ship_fastest

DATA = next((folder for folder in DEMO_FOLDERS if folder.is_dir()), None)
pytestmark = [
    pytest.mark.usefixtures("briefly"),
    pytest.mark.skipif(DATA is None, reason="Fashion-MNIST is not installed (Debian: dataset-fashion-mnist)"),
]


@pytest.fixture(scope="module")
def splits() -> DataSplits:
    full = open_dataset(DATA)
    return DataSplits(
        train=full.train.subset(range(1000)),
        validation=full.validation.subset(range(300)),
        test=full.test.subset(range(500)),
        classes=full.classes,
        notes=full.notes,
    )


def member(name: str, size: int) -> NetSpec:
    """A quarter of a network's width and depth, for small images."""
    return scale_to(for_image_size(get_spec(name), size), width=0.25, depth=0.25, name=f"{name}-w0.25-d0.25")


def candidates():
    return [member(name, 28) for name in ("tresnet_m", "resnet50d")]


OPTIONS = {"epochs": 3, "brief_epochs": 1, "batch_size": 4, "threads": 1, "overrides": {"batch_size": 32}}


@pytest.fixture(scope="module")
def run(briefly, splits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit") / "run"
    told = []
    made = fit(splits, min_throughput=1.0, output=folder, candidates=candidates(), progress=told.append, **OPTIONS)
    return made, told


def test_record_says_what_was_done(run):
    made, told = run
    record = json.loads((made.output / "fit.json").read_text())
    names = [row["name"] for row in record["candidates"]]
    assert names == ["tresnet_m-w0.25-d0.25", "resnet50d-w0.25-d0.25"]
    tops = {row["name"]: row["brief"]["top1"] for row in record["candidates"]}
    assert record["winner"]["name"] == max(tops, key=lambda name: tops[name])
    for row in record["candidates"]:
        with torch.device("meta"):
            net = cs.create_model(member(row["name"].split("-")[0], 28), num_classes=10, in_chans=1)
        assert row["params"] == sum(p.numel() for p in net.parameters())
        assert row["measurement"]["conditions"]["runtime"] == "onnxruntime"
    assert np.array(record["evaluation"]["confusion"]).sum() == record["evaluation"]["n"] == 500
    assert np.trace(record["evaluation"]["confusion"]) / 500 == pytest.approx(record["evaluation"]["top1"])
    assert record["evaluation"]["top1"] > 0.4  # ten classes; three epochs on 1,000 images
    assert record["verification"]["n"] == 500
    assert any("chosen: " in event.get("text", "") for event in told)


def test_artifact_says_what_the_network_says(run, splits):
    made, _ = run
    images = splits.test.images[:64]
    artifact = cs.load_artifact(made.output / "artifact")
    probabilities = artifact(images.numpy())
    with torch.no_grad():
        logits = made.net(artifact.preprocessing.normalize(images))
    assert np.abs(probabilities - logits.softmax(1).numpy()).max() < 1e-4
    assert artifact.classes == splits.classes
    assert made.record["verification"]["top1_agreement"] >= 0.998


def test_what_is_shipped_was_tuned(run):
    made, told = run
    kept = json.loads((made.output / "fit.json").read_text())["artifact"]
    forms = kept["search"]["forms"]
    assert kept["search"]["winner"] in forms
    assert all(form["batch_size"] == 4 and form["threads"] == 1 for form in forms.values())
    assert kept["search"]["usual"]["runtime"] == "onnxruntime"
    # The constraint is checked on what is shipped, under the settings that won.
    timed = kept["measurement"]["conditions"]
    assert (timed["runtime"], timed["batch_size"], timed["threads"]) == (kept["runtime"]["name"], 4, 1)
    assert timed["runtime"] == forms[kept["search"]["winner"]]["runtime"]
    assert any("times as fast as the float network in its usual settings" in event.get("text", "") for event in told)
    card = (made.output / "artifact" / "README.md").read_text()
    assert re.search(r"- \*\*Speed\*\*: [\d,.]+ images/s, .* batch 4, 28 px, 1 threads", card)


def test_int8_is_chosen_on_validation_and_reported_on_the_test_set(splits, tmp_path, monkeypatch):
    monkeypatch.setattr("convscale.ship.forms.TWIN_GAIN", 1e9)  # symmetric activations are faster by chance
    net = build(member("resnet50d", 28), splits).eval()
    pre = Preprocessing(image_size=28, channels=1, mean=(0.286,), std=(0.353,), crop_pct=1.0)
    held, _ = into_memory(splits.test, pre)
    said = []
    artifact, found, checked = ship_fastest(
        net, tmp_path / "artifact", splits, held, pre,
        Basis(conditions=Conditions(batch_size=4, threads=1, runtime="onnxruntime")),
        Shipping(runtime="onnxruntime", int8=True, max_drop=100.0), card={"data": "some"}, say=said.append,
    )  # fmt: skip
    assert list(found.forms) == ["onnx-fp32", "onnx-int8", "onnx-int8-ort"]
    assert artifact.verification["n"] == 300
    assert checked.n == 500
    assert checked.passed
    assert checked.reason.startswith("the gate was passed on validation; on the test set: ")
    assert checked.precision == artifact.precision
    assert artifact.runtime == "onnxruntime"
    assert [line.split(":")[0] for line in said] == ["onnx-fp32", "onnx-int8", "onnx-int8-ort"]


def test_as_many_of_test_and_validation_may_be_unreadable_as_is_said(tmp_path, monkeypatch):
    """Two of each are cut off behind their headers, which is more than 1 %."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6), ("test", 6)):
        for number in range(count):
            path = tmp_path / "data" / split / "ab"[number % 2] / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
            if number in (2, 3):
                path.write_bytes(path.read_bytes()[:800])
    data = open_dataset(tmp_path / "data", max_bad_rate=0.5)
    pre = Preprocessing(image_size=16, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3, crop_pct=1.0)
    given, said = {}, []

    class Enough(Exception):
        pass

    def judge(net, held, *others, **options):
        given["test"] = len(held)
        raise Enough

    def ship(*others, verify_images, calibration_images, **options):
        given["validation"], given["train"] = sum(map(len, verify_images)), len(calibration_images)
        raise Enough

    monkeypatch.setattr(finish, "evaluate", judge)
    monkeypatch.setattr("convscale.pipeline.ship.export_winner", ship)
    net = torch.nn.Identity()
    last = finish.Finish(
        asked=SimpleNamespace(training_device="cpu"), record=None, splits=data, folder=tmp_path, basis=None,
        min_throughput=0.0, say=said.append,
    )  # fmt: skip
    with pytest.raises(Enough):
        last._judge(finish.Trained(net=net, preprocessing=pre))
    with pytest.raises(Enough):
        ship_fastest(
            net, tmp_path / "artifact", data, data.test, pre, Basis(conditions=Conditions(runtime="onnxruntime")),
            Shipping(runtime="onnxruntime", int8=True, max_drop=1.0), card={}, say=said.append,
        )  # fmt: skip
    assert given == {"test": 4, "validation": 4, "train": 10}
    assert [line.split(": ")[0] for line in said] == ["left out of the test set"] * 2


def test_report_is_one_file_that_names_the_winner(run):
    made, _ = run
    page = made.report.read_text()
    assert made.record["winner"]["name"] in page
    assert not re.search(r"""<(script|link|img)[^>]*(src|href)=["']?https?:""", page)


def test_the_picture_of_a_run_alone(run, tmp_path):
    from convscale.cli.report import report_command

    report_command(run_dir=run[0].output, output=tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"must end in \.html or \.png"):
        report_command(run_dir=run[0].output, output=tmp_path / "run.pdf")


def test_a_run_resumes_where_it_stopped(run, splits, monkeypatch):
    made, _ = run
    folder = made.output
    before = json.loads((folder / "fit.json").read_text())
    (folder / "report.html").unlink()
    monkeypatch.setattr("convscale.pipeline.steps.train", None)  # nothing may be trained again
    again = fit(splits, min_throughput=1.0, output=folder, candidates=candidates(), resume=True, **OPTIONS)
    assert again.report.is_file()
    assert again.record["evaluation"]["top1"] == before["evaluation"]["top1"]
    asked = {"min_throughput": 1.0, "output": folder, "candidates": candidates(), **OPTIONS}
    for other in ({"min_throughput": 2.0}, {"max_drop": 2.0}):  # once taken without int8, it is no reason to refuse
        with pytest.raises(ValueError, match="was made by another request"):
            fit(splits, **{**asked, **other}, resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_throughput": 0}, "min_throughput is 0; it must be a finite number above 0"),
        ({"min_throughput": float("inf")}, "min_throughput is inf; it must be a finite number above 0"),
        ({"confidence": 0.3}, "confidence is 0.3; it must be a probability from 0.5 to 0.99"),
        ({"device": "l5"}, "device 'l5' is unknown .*nearest: .*l4"),
        ({"device": "l4", "runtime": "openvino"}, "runtime 'openvino' can not be predicted"),
        (
            {"device": "l4", "int8": True, "runtime": None},
            "int8 on l4 is predicted in runtime onnxruntime or tensorrt, not in compiled; name one of them",
        ),
        ({"weights_dir": "/nowhere"}, "weights folder /nowhere does not exist"),
        ({"scratch": True, "weights_dir": "."}, "scratch and weights exclude each other"),
        ({"scratch": True, "init": "pretrained"}, "scratch and init 'pretrained' exclude each other"),
        ({"max_drop": 2.0}, "max_drop 2 is what 8 bits may lose; give int8"),
        ({"strict": 1}, "strict is 1; it must be True or False"),
        ({"brief_epochs": "1"}, "brief_epochs is '1'; it must be a whole number of at least 1"),
        ({"max_minutes": "a"}, "max_minutes is 'a'; it must be a number of minutes above 0"),
        ({"seed": 1.5}, "seed is 1.5; it must be a whole number"),
        ({"recipe": 5}, "recipe is 5; it must be text"),
        ({"init": "nope"}, "init is 'nope'; it must be 'pretrained' or a file of weights"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not there: "),
        ({"max_drop": float("nan")}, "max_drop is nan; it must be a number of accuracy points from 0 to 100"),
        ({"int8": "yes"}, "int8 must be true, false or 'qat', got 'yes'"),
        ({"overrides": [1]}, r"overrides is \[1\]; it must map recipe keys to values"),
        ({"output": 5}, "output is 5; it must be a path"),
        ({"resume": "x"}, "resume is 'x'; it must be True or False"),
        ({"progress": 5}, "progress is 5; it must be a function"),
        (
            {"min_throughput": 1e12, "strict": True},
            r"nothing keeps at least 1,000,000,000,000 images/s: the fastest is .* images/s, 100% below",
        ),
        ({"candidates": []}, "candidates is empty"),
        ({"candidates": ["resnet19"]}, "unknown model 'resnet19' .*nearest: .*resnet18"),
        ({"recipe": "smal"}, "smal"),
        ({"image_size": 27, "candidates": ["tresnet_m"]}, "image size is 27"),
        ({"candidates": "resnet19"}, "unknown model 'resnet19' .*nearest: .*resnet18"),
        ({"image_size": 27, "candidates": "tresnet_m"}, "image size is 27"),
        ({"image_size": 27, "candidates": get_spec("tresnet_m")}, "image size is 27"),
        ({"candidates": 18}, "candidates is 18; it must be a network's name or spec, or a list of them"),
        ({"runtime": "eager"}, "fit ships for runtime onnxruntime, openvino or tensorrt, got 'eager'"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
    ],
)
def test_bad_requests(splits, tmp_path, options, message):
    request = {"min_throughput": 1.0, "candidates": candidates()[:1], "threads": 1, "batch_size": 4, **options}
    with pytest.raises(ValueError, match=message):
        fit(splits, **{"output": tmp_path / "run", **request})
    if "strict" not in options:  # that is known only once all were timed
        assert not (tmp_path / "run").exists()


def test_the_record_has_every_part_that_the_run_came_to(run):
    """As runs before FitRecord wrote them, parts that are empty included."""
    made, _ = run
    written = json.loads((made.output / "fit.json").read_text())
    old = json.loads((Path(__file__).parents[1] / "old_files/v0_1/fits/finished/fit.json").read_text())
    assert set(old) <= set(written)
    assert written["left_out"] == []


def test_existing_output_is_not_touched(splits, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="exists and is not empty; use --resume, --overwrite or another name"):
        fit(splits, min_throughput=1.0, output=tmp_path, candidates=candidates())
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_what_was_timed_is_what_is_trained_and_shipped(splits, tmp_path):
    options = OPTIONS | {"epochs": 1}
    few = dataclasses.replace(
        splits,
        train=splits.train.subset(range(256)),
        validation=splits.validation.subset(range(64)),
        test=splits.test.subset(range(64)),
    )
    made = fit(
        few,
        min_throughput=1.0,
        output=tmp_path / "run",
        candidates=[member("resnet50d", 64)],
        image_size=64,
        **options,
    )
    assert made.record["candidates"][0]["measurement"]["conditions"]["image_size"] == 64
    assert made.artifact.image_size == 64  # more than twice the data's own 28 px
    assert "uint8, (n, 64, 64, 1)" in made.report.read_text()


def test_full_disk_is_said_before_work_begins(splits, tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(ValueError, match="has 0 MB free, 500 MB are needed"):
        fit(splits, min_throughput=1.0, output=tmp_path / "run", candidates=candidates())


def test_fashion_mnist_is_found_where_the_package_puts_it():
    assert fashion_mnist(print) == DATA


def test_download_failure_is_one_line(monkeypatch, tmp_path):
    import torchvision

    def refuse(*_, **__):
        raise RuntimeError("no network")

    monkeypatch.setattr("convscale.pipeline.demo.DEMO_FOLDERS", (Path("/nowhere"),))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", refuse)
    with pytest.raises(
        ValueError, match=r"can not be downloaded \(no network\); on Debian `apt-get install dataset-fashion-mnist`"
    ):
        fashion_mnist(lambda text: None)


@pytest.mark.parametrize("value", ["", "relative"])
def test_the_download_goes_to_the_cache_folder(value, monkeypatch, tmp_path):
    """An empty or relative XDG_CACHE_HOME is none: it went to the folder at hand."""
    import torchvision

    roots = []
    monkeypatch.setattr("convscale.pipeline.demo.DEMO_FOLDERS", (Path("/nowhere"),))
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", lambda root, download: roots.append(root))
    monkeypatch.delenv("CONVSCALE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fashion_mnist(lambda text: None) == tmp_path / ".cache/convscale/FashionMNIST/raw"
    assert roots == [str(tmp_path / ".cache/convscale")]
