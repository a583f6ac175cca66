"""The report of speeds: what is known how, fronts, layers, and that a browser draws it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from convscale.arch.zoo import get_spec, get_tag
from convscale.conditions import Conditions
from convscale.errors import UserError
from convscale.machine import Environment
from convscale.predictor.calibrate import Observation, calibrate
from convscale.predictor.calibration import save_calibration
from convscale.predictor.devices import get_device
from convscale.predictor.predict import predict
from convscale.predictor.profile import Layer, Profile, profile
from convscale.show import speed_plots
from convscale.show.speed_plots import colours, save_speed_png
from convscale.show.speed_points import (
    SpeedPoint,
    by_setting,
    family_of,
    from_prediction,
    from_record,
    front,
    published_accuracy,
    told_apart,
)
from convscale.show.speed_report import speed_page, write_speed_report
from convscale.show.speed_sections import Comparison, common_notes
from convscale.show.stated import Conditions as Stated
from convscale.show.stated import Machine
from convscale.speed.records import Record
from convscale.speed.timing import Measurement
from tests.show.browser import Elements, dump_dom

GPU = Stated(
    device="rtx-4090",
    mode="infer",
    precision="amp",
    layout="nchw",
    batch_size=256,
    image_size=224,
    runtime="eager",
)


def point(name: str, speed: float, top1: float | None, **more: Any) -> SpeedPoint:
    return SpeedPoint(
        **{
            "name": name,
            "images_per_s": speed,
            "top1": top1,
            "family": "f",
            "device": "rtx-4090",
            "conditions": GPU,
            **more,
        }
    )


def record(
    name: str = "tresnet_m", size: int = 224, device: str = "cpu", times: tuple[float, ...] = (0.1, 0.1, 0.1, 0.12)
) -> Record:
    conditions = Conditions(device=device, image_size=size, batch_size=8)
    return Record(
        model=name,
        measurement=Measurement(
            times_s=times, conditions=conditions, environment=Environment(device_name="a CPU", cores=2)
        ),
    )


def tiny() -> nn.Module:
    """A network counted by hand below."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10, bias=False),
    )


def test_front_holds_what_nothing_beats() -> None:
    points = [
        point("slow", 10, 80.0),
        point("beaten", 9, 79.0),
        point("fast", 20, 70.0),
        point("tie", 10, 75.0),
        point("unknown", 99, None),
    ]
    assert [p.name for p in front(points)] == ["fast", "slow"]


def test_points_of_different_settings_never_share_a_picture() -> None:
    train = replace(GPU, mode="train")
    points = [
        point("a", 1, 70.0),
        point("b", 2, 71.0),
        point("c", 3, 72.0, conditions=train),
        point("d", 4, 73.0, device="v100"),
    ]
    groups = {setting: [p.name for p in group] for setting, group in by_setting(points).items()}
    assert groups == {
        "rtx-4090, inference, eager, amp, nchw": ["a", "b"],
        "rtx-4090, training, eager, amp, nchw": ["c"],
        "v100, inference, eager, amp, nchw": ["d"],
    }


def test_accuracy_is_the_published_one_or_none() -> None:
    tag = get_tag("tresnet_m")
    found = published_accuracy("tresnet_m", tag.image_size)
    assert found.top1 == tag.results[0].top1
    assert found.weights == tag.name
    assert found.source
    assert published_accuracy("tresnet_m", 228).top1 is None, "a size without a published figure has none"
    assert published_accuracy("nobody_knows_it", 224) == (None, "", "")


def test_published_accuracy_of_the_papers_weights() -> None:
    assert (
        published_accuracy("tresnet_m.miil_in1k_448", 448).top1 == 81.71
    )  # what timm measures for the released weights


def test_conditions_in_words() -> None:
    value = Stated(
        device="cpu",
        mode="train",
        precision="bf16",
        layout="nhwc",
        batch_size=1,
        image_size=224,
        runtime="eager",
        threads=1,
    )
    assert str(value) == "eager, training, bf16, nhwc, batch 1, 224 px, 1 thread, cpu"
    assert str(Stated.of({"image_size": [192, 256], "threads": 2})) == "192x256 px, 2 threads"
    assert str(Stated()) == "conditions not recorded"


def test_machines_in_words() -> None:
    assert str(Machine(device_name="Xeon", cores=2)) == "Xeon (2 cores)"
    assert str(Machine(cores=1)) == "unnamed device (1 core)"
    assert str(Machine()) == "machine not recorded"


def test_a_report_shows_a_network_timed_at_a_size_that_is_not_square() -> None:
    made = record()
    wide = replace(made.measurement.conditions, image_size=(192, 256))
    html = speed_page([replace(made, measurement=replace(made.measurement, conditions=wide))])
    assert ">192x256<" in html


def test_a_record_becomes_a_measured_point() -> None:
    p = from_record(record())
    assert (p.kind, p.device, p.family) == ("measured", "a CPU", "tresnet")
    assert p.images_per_s == pytest.approx(80.0)
    assert p.low == pytest.approx(8 / 0.105)  # quartiles 0.1 and 0.105 by linear interpolation
    assert p.high == pytest.approx(80.0)
    assert from_record(record(device="rtx-4090")).device == get_device("rtx-4090").title
    single = from_record(record(times=(0.1,)))
    assert single.low is None
    assert "spread is not known" in single.notes[0]


def test_an_edited_network_has_no_published_accuracy() -> None:
    """Its record holds a spec, which is not the one that its name stands for."""
    zoo = get_spec("resnet18")
    assert from_record(record("resnet18")).top1 is not None
    same = from_record(replace(record("resnet18"), spec=zoo.to_dict()))
    assert (same.top1, same.weights) == (from_record(record("resnet18")).top1, from_record(record("resnet18")).weights)
    edited = replace(zoo, stem=replace(zoo.stem, kernel=5))
    for spec in (edited.to_dict(), {"name": "resnet18"}):
        point = from_record(replace(record("resnet18"), spec=spec))
        assert (point.name, point.top1, point.weights, point.accuracy_source) == ("resnet18", None, "", "")


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("tf_efficientnet_b0.ns_jft_in1k", "efficientnet"),
        ("densenet121", "densenet"),
        ("tf_mixnet_l", "mixnet"),
        ("123", "other"),
    ],
)
def test_family(name: str, family: str) -> None:
    assert family_of(name) == family


def test_told_apart_drops_what_is_shared() -> None:
    shared, names = told_apart(
        [
            ("V100, inference, amp", "published"),
            ("V100, inference, amp", "predicted"),
            ("V100, training, amp", "published"),
        ]
    )
    assert shared == "V100, amp"
    assert names == ["inference, published", "inference, predicted", "training, published"]
    assert told_apart([("V100, amp", "measured")]) == ("V100, amp, measured", ["measured"])


def test_common_notes_are_said_once() -> None:
    points = [
        point("a", 1, None, notes=("x", "y")),
        point("b", 2, None, notes=("x",)),
        point("c", 3, None, kind="predicted", notes=("z",)),
    ]
    assert common_notes(points) == {"x": ("measured", "x")}


@pytest.mark.parametrize(
    ("more", "message"),
    [({"kind": "guessed"}, "kind 'guessed' is unknown"), ({"images_per_s": 0.0}, "images_per_s must be above 0")],
)
def test_a_bad_point_is_one_clear_line(more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        point("a", 1.0, None, **more)


def test_nothing_to_report() -> None:
    with pytest.raises(UserError, match="nothing to report"):
        speed_page([])


def test_measured_and_predicted_are_told_apart() -> None:
    points = [point("a", 100, 80.0), point("b", 200, 75.0, kind="predicted", low=150.0, high=260.0)]
    traces = {
        t["marker"]["symbol"]: t
        for t in speed_plots.accuracy_speed(points, {"f": "#000000"}).to_dict()["data"]
        if t["mode"] == "markers"
    }
    assert set(traces) == {"circle", "diamond-open"}
    assert traces["circle"]["x"] == [100]
    interval = traces["diamond-open"]["error_x"]
    assert (interval["arrayminus"], interval["array"]) == ([50.0], [60.0])
    assert "error_x" not in traces["circle"]
    assert "80 % interval 150 to 260" in traces["diamond-open"]["hovertext"][0]
    assert "eager, amp, nchw, batch 256, 224 px, rtx-4090" in traces["circle"]["hovertext"][0]


def test_the_constraint_is_drawn() -> None:
    layout = speed_plots.accuracy_speed([point("a", 100, 80.0)], {}, min_throughput=1000.0).to_dict()["layout"]
    assert [(shape["x0"], shape["x1"]) for shape in layout["shapes"]] == [(1000.0, 1000.0)]
    # A logarithmic axis takes shapes in its own units and annotations in powers of ten.
    assert [(note["x"], note["text"]) for note in layout["annotations"] if note.get("name") != "front"] == [
        (3.0, "asked for: 1,000 or more")
    ]


def test_names_stand_at_the_front_where_there_is_room_and_go_at_phone_width() -> None:
    points = [
        point("slow.a1", 10, 80.0),
        point("beaten.a1", 9, 79.0),
        point("near.a1", 10.2, 79.9),
        point("fast.a1", 100, 70.0, chosen=True),
    ]
    layout = speed_plots.accuracy_speed(points, {}).to_dict()["layout"]
    assert [note["text"] for note in layout["annotations"]] == ["fast", "slow"]
    assert layout["meta"]["narrow_hides"] == ["front"]


def test_the_chosen_one_is_ringed_and_first_in_the_table() -> None:
    points = [point("fast", 100, 70.0), point("taken", 10, 80.0, chosen=True)]
    ring = [
        trace for trace in speed_plots.accuracy_speed(points, {}).to_dict()["data"] if trace.get("name") == "chosen"
    ]
    assert [(trace["x"], trace["y"]) for trace in ring] == [([10], [80.0])]
    html = speed_page(points, lead="taken: the most accurate.")
    rows = re.findall(r'<tr class="(\w*)"><td class="name"[^>]*><div>(\w+)', html)
    assert rows == [("winner", "taken"), ("", "fast")]
    assert '<p class="lead">taken: the most accurate.</p>' in html


def test_a_single_accuracy_is_no_picture() -> None:
    html = speed_page([point("one", 10, 80.0), point("two", 20, None)])
    assert "data-figure" not in html.partition("<script")[0]
    assert "Only one of these networks has a published accuracy at its size" in html


def test_bars_as_multiples_of_a_network() -> None:
    gpu = [point("base", 1000, None), point("other", 1500, None, low=1400.0, high=1800.0)]
    cpu = [point("base", 10, None, device="cpu"), point("other", 8, None, device="cpu")]
    alone = [point("other", 5, None, device="v100")]
    figure = speed_plots.side_by_side([*gpu, *cpu, *alone], relative_to="base").to_dict()
    assert [trace["x"] for trace in figure["data"]] == [[1.0, 1.5], [1.0, 0.8]], "v100 has no base to be a multiple of"
    assert figure["data"][0]["error_x"]["array"][1] == pytest.approx(0.3)
    assert "1,500 images/s" in figure["data"][0]["hovertext"][1]


def test_layers_agree_with_a_count_by_hand() -> None:
    found = profile(tiny(), Conditions(device="v100", batch_size=2), image_size=16, name="tiny")
    layers = {layer.name: layer for layer in found.layers}
    conv = layers["0"]
    assert conv.macs == 2 * 16 * 16 * 8 * 3 * 9
    assert conv.nbytes == 4 * (2 * 3 * 16 * 16 + 2 * 8 * 16 * 16 + 8 * 3 * 9)
    assert layers["4"].macs == 2 * 8 * 10
    assert layers["1"].macs == 0
    assert layers["1"].nbytes == 4 * 2 * (2 * 8 * 16 * 16)
    assert found.peak_tflops == get_device("v100").tf32_tflops
    assert found.bandwidth_bytes_s == 900e9
    assert found.conditions["image_size"] == 16
    assert all(layer.bound_by == "launch" for layer in found.layers), (
        "so small a network waits for its kernels to start"
    )


@pytest.mark.parametrize(
    ("mode", "runtime", "layout"),
    [("infer", "eager", "nchw"), ("infer", "compiled", "nchw"), ("train", "eager", "nhwc")],
)
def test_the_layers_add_up_to_the_prediction(mode: str, runtime: str, layout: str) -> None:
    """So a profile goes by the fitted coefficients, as ``predict`` does, not by the prior."""
    conditions = Conditions(
        device="rtx-3090", mode=mode, precision="amp", layout=layout, batch_size=64, runtime=runtime
    )
    whole = predict("resnet18", "rtx-3090", mode, "amp", None, 64, runtime == "compiled", layout)
    found = profile("resnet18", conditions)
    assert sum(layer.time_s for layer in found.layers) == pytest.approx(whole.latency_s)
    assert sum(layer.macs for layer in found.layers if layer.name.startswith("stages.0")) > 0


def test_a_calibration_moves_the_layers_as_it_moves_the_prediction(tmp_path: Path) -> None:
    conditions = Conditions(device="a10", precision="amp", batch_size=64)
    plain = predict("resnet18", "a10", batch_size=64)
    made = calibrate([Observation(net="resnet18", conditions=plain.conditions, images_per_s=plain.images_per_s / 2)])
    save_calibration(made, tmp_path / "a10.json")
    moved = predict("resnet18", "a10", batch_size=64, calibration=made).latency_s
    assert 1.5 * plain.latency_s < moved < 2 * plain.latency_s  # most of the way to what was measured, half the speed
    for calibration in (made, tmp_path / "a10.json"):
        found = profile("resnet18", conditions, calibration=calibration)
        assert sum(layer.time_s for layer in found.layers) == pytest.approx(moved)


def test_measured_and_predicted_points_of_a_card_share_a_picture() -> None:
    """A table's record names the card as we do, a measurement as its driver does, a prediction by our name for it."""
    title = get_device("rtx-4090").title
    guess = predict("resnet18", "rtx-4090", batch_size=64, image_size=64)
    table, own = (record("resnet18", 64, device) for device in ("rtx-4090", "cuda"))
    own = replace(own, measurement=replace(own.measurement, environment=Environment(device_name=title, cores=8)))
    amp = [
        replace(r, measurement=replace(r.measurement, conditions=replace(r.measurement.conditions, precision="amp")))
        for r in (table, own)
    ]
    assert (
        {from_record(r).setting for r in amp}
        == {from_prediction("resnet18", guess).setting}
        == {f"{title}, inference, eager, amp, nchw"}
    )


def test_parts_are_as_fine_as_legible() -> None:
    def layer(name: str) -> Layer:
        return Layer(name=name, kind="conv", time_s=1.0, macs=1, nbytes=1, launches=1, bound_by="memory")

    names = ["stem.conv", *(f"stages.{i}.{j}.conv" for i in range(4) for j in range(5)), "head"]
    found = Profile(
        name="n", device="d", conditions={}, layers=tuple(map(layer, names)), peak_tflops=1.0, bandwidth_bytes_s=1.0
    )
    assert {name: len(layers) for name, layers in found.parts().items()} == {
        "stem.conv": 1,
        "stages.0": 5,
        "stages.1": 5,
        "stages.2": 5,
        "stages.3": 5,
        "head": 1,
    }


def test_png_of_one_setting(tmp_path: Path) -> None:
    from PIL import Image

    path = save_speed_png([point("a", 100, 80.0), point("b", 200, 75.0, kind="predicted")], tmp_path / "speed.png")
    with Image.open(path) as image:
        assert image.format == "PNG"
    plain = path.read_bytes()
    with_line = save_speed_png(
        [point("a", 100, 80.0), point("b", 200, 75.0, kind="predicted")], path, min_throughput=150
    )
    assert with_line.read_bytes() != plain
    with pytest.raises(UserError, match="one setting"):
        save_speed_png([point("a", 100, 80.0), point("b", 200, 75.0, device="v100")], tmp_path / "speed.png")
    with pytest.raises(UserError, match="no point has a published accuracy"):
        save_speed_png([point("a", 100, None)], tmp_path / "speed.png")


def test_the_page_survives_anything_missing() -> None:
    bare = SpeedPoint(name="x", images_per_s=1.0)
    html = speed_page([bare], comparisons=[Comparison(title="t", points=[bare])], profiles=[])
    assert ">None<" not in html
    assert "conditions not recorded" in html


def test_a_browser_draws_every_point(tmp_path: Path, chromium: Path) -> None:
    hostile = "<img src=x onerror=\"document.documentElement.dataset.owned='yes'\"></script><b>"
    points: list[Record | SpeedPoint] = [
        point("first", 100, 80.0),
        point(hostile, 200, 75.0, kind="predicted", low=150.0, high=260.0, family=hostile, notes=(hostile,)),
        point("no accuracy", 300, None),
        record(),
        record("tresnet_l"),
    ]
    sides = [
        point("one", 10, None),
        point("two", 20, None),
        point("one", 12, None, kind="predicted"),
        point("two", 19, None, kind="published"),
    ]
    out = write_speed_report(
        points,
        tmp_path / "speed.html",
        comparisons=[Comparison(title="Side by side", points=sides, baseline="one", intro=hostile)],
        profiles=[
            profile(tiny(), Conditions(device="v100", precision="amp", batch_size=256), image_size=64, name="tiny net")
        ],
    )
    page = Elements(dump_dom(chromium, out, tmp_path / "profile"))
    assert "data-owned" not in page.root
    assert "img" not in page.tags
    assert page.root["data-drawn"] == "5"
    assert page.classes["setting-1", "point"] == 2
    assert "no accuracy" in page.said("setting-1")
    assert page.classes["setting-2", "point"] == 2
    assert page.classes["comparison-1", "point"] == 4
    assert "× 2.00" in page.said("comparison-1")
    assert "Predicted, not measured" in page.said("network-1")
    # The convolution and the linear layer on the roofline, and the parts as bars split by what binds them.
    assert page.classes["network-1", "point"] >= 2 + 4
    assert re.search(r"\btiny net, layer by layer\b", page.said("network-1"))


def test_tresnet_and_efficientnet_differ_among_however_many_families() -> None:
    made = colours([f"family {i}" for i in range(20)] + ["efficientnet", "tresnet"])
    assert len({made["tresnet"], made["efficientnet"], made["family 19"]}) == 3
    assert made["family 19"] == "#8a949e"
