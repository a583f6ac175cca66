"""The commands about speed: what they print and write, and one clear line on bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import convscale as cs
from convscale.choice import largest as choice_largest
from convscale.choice import measured as choice_measured
from convscale.choice import speeds as choice_speeds
from convscale.choice.basis import Asked, Basis, basis_of
from convscale.choice.facts import NetworkFacts, SizedSpec, Speed
from convscale.cli import calibrate as cli_calibrate
from convscale.cli import report as cli_report
from convscale.cli import speed as cli_speed
from convscale.conditions import Conditions
from convscale.errors import UserError
from convscale.machine import Environment, available_cores
from convscale.predictor import calibrate as predictor_calibrate
from convscale.predictor.calibrate import Observation
from convscale.show import speed_plots
from convscale.speed.records import append_record
from convscale.speed.timing import Measurement

SPEEDS = {"mobilenetv1_100": 9000.0, "resnet18": 8000.0, "resnet50": 2500.0, "resnet50d": 2400.0, "tresnet_m": 3000.0}
"""Images/s on a made-up card at 224 px."""


@pytest.fixture
def app() -> typer.Typer:
    made = typer.Typer()
    cli_speed.register(made)
    cli_calibrate.register(made)
    cli_report.register(made)
    return made


@pytest.fixture
def run(app: typer.Typer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Run a command line on made-up speeds; returns standard output, or raises what the command raised."""
    monkeypatch.setenv("CONVSCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(choice_speeds, "MANY", 10**9)
    monkeypatch.setattr(choice_speeds, "traced_before", lambda networks, basis: {})

    def speed(spec: Any, size: int) -> float:
        return SPEEDS.get(spec.name, 1000.0) * (224 / size) ** 2

    def examine(network: SizedSpec, basis: Basis) -> NetworkFacts:
        value = speed(*network)
        made = Speed(images_per_s=value, low=value * 0.9, high=value * 1.1, kind="predicted", bound_by="memory")
        return NetworkFacts(
            params=25_600_000,
            macs=network.image_size**2 * sum(network.spec.widths),
            traffic=1,
            memory_bytes=2**30,
            speed=made if basis.predicted else None,
        )

    def predicted(network: SizedSpec, basis: Basis) -> Any:
        value = speed(*network)
        return SimpleNamespace(
            images_per_s=value, low=0.9 * value, high=1.1 * value, bound_by="memory", doubts=("it is made up",)
        )

    def time_network(network: SizedSpec, basis: Basis, seconds: float) -> Measurement:
        spec, size = network
        c = Conditions(**{**basis.conditions.to_dict(), "image_size": size, "threads": available_cores()})
        return Measurement(
            times_s=(c.batch_size / speed(spec, size),) * 5,
            conditions=c,
            environment=Environment.here(),
            model=spec.name,
        )

    monkeypatch.setattr(choice_speeds, "examine", examine)
    monkeypatch.setattr(choice_speeds, "predicted", predicted)
    monkeypatch.setattr(choice_measured, "time_network", time_network)

    def call(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.stdout

    return call


def test_predict_prints_speeds_and_ratios(run: Any) -> None:
    text = run("predict", "resnet50", "tresnet_m", "--device", "rtx-4090")
    assert re.search(r"^resnet50 @224 +2,500  2,250 to 2,750 +1\.00  memory$", text, re.M)
    assert re.search(r"^tresnet_m @224 +3,000  2,700 to 3,300 +1\.20  memory$", text, re.M)
    assert "doubt: it is made up" in text
    assert "batch 256" in text


def test_predict_gives_json(run: Any) -> None:
    value = json.loads(
        run("predict", "resnet50", "tresnet_m", "--device", "rtx-4090", "--compiled", "-b", "64", "--json")
    )
    assert value["conditions"]["runtime"] == "compiled"
    assert value["conditions"]["batch_size"] == 64
    assert value["predictions"][1]["ratio"] == pytest.approx(1.2)


def test_choose_names_the_best_with_its_accuracy_and_reason(run: Any) -> None:
    text = run(
        "choose",
        "--device",
        "rtx-4090",
        "--min-throughput",
        "2600",
        "--model",
        "tresnet_m",
        "--model",
        "resnet50d",
        "--all",
    )
    assert text.startswith("tresnet_m.miil_in21k_ft_in1k @224: the most accurate of")
    assert "83.09 % (miil_in21k_ft_in1k)" in " ".join(text.split())
    assert "3,000 images/s predicted (80 %: 2,700 to 3,300)" in " ".join(text.split())
    assert "*  83.09 %     3,000  tresnet_m.miil_in21k_ft_in1k @224" in text
    # 2,160 to 2,640 crosses the constraint, but the network would lose anyway
    assert "resnet50d.ra4_e3600_r224_in1k @224 (80.96 %): maybe fast enough, but 2.13 points less accurate" in " ".join(
        text.split()
    )


def test_a_workload_is_not_replaced_in_silence(run: Any, tmp_path: Path) -> None:
    mine = tmp_path / "a.workload.json"
    mine.write_text("mine")
    ask = ("predict", "resnet18", "--device", "v100", "--save-workload", str(mine))
    with pytest.raises(UserError, match=r"^--save-workload .*json exists; use --overwrite or another name$"):
        run(*ask)
    assert mine.read_text() == "mine"
    run(*ask, "--overwrite")
    assert json.loads(mine.read_text())["name"] == "resnet18"


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_choose_ends_with_3_where_nothing_is_sure_enough(run: Any, app: typer.Typer, form: tuple[str, ...]) -> None:
    """By hand, as below: ln(3000 / 2880) / 0.08221 is 0.4966 deviations, of which the table of the normal has 69 %."""
    name = "tresnet_m.miil_in21k_ft_in1k"
    ask = ["choose", "--device", "rtx-4090", "--min-throughput", "2880", "--model", name, "--img-size", "224", *form]
    missed = CliRunner().invoke(app, [*ask, "--confidence", "0.95"], env={"COLUMNS": "200"})
    told = f"nothing keeps at least 2,880 images/s with the confidence 0.95; {name} @224 is 69 % likely to"
    assert (missed.exit_code, missed.stderr.splitlines()[-1]) == (3, f"convscale: {told}")
    kept = CliRunner().invoke(app, [*ask, "--confidence", "0.65"])
    assert (kept.exit_code, "convscale: " in kept.stderr) == (0, False)
    if form:
        assert json.loads(missed.stdout)["missed"] == told
        assert json.loads(kept.stdout)["missed"] is None


def test_choose_fits_a_narrow_terminal(run: Any) -> None:
    text = run(
        "choose",
        "--device",
        "rtx-4090",
        "--min-throughput",
        "2600",
        "--model",
        "tresnet_m",
        "--model",
        "resnet50d",
        "--all",
    )
    assert max(map(len, text.splitlines())) <= 60


def test_a_picture_that_can_not_be_drawn_does_not_cost_the_choice(
    run: Any, app: typer.Typer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ask = ["choose", "--device", "v100", "--min-throughput", "2600", "--model", "tresnet_m"]
    ask += ["--output", str(tmp_path / "x.png")]
    looked: list[str] = []
    monkeypatch.setattr(shutil, "which", lambda name: looked.append(name) or "/usr/bin/true")

    def undrawn(*_: object, **__: object) -> None:
        raise UserError("the browser did not draw the picture")

    monkeypatch.setattr(speed_plots, "save_speed_png", undrawn)
    result = CliRunner().invoke(app, ask)
    assert str(result.exception) == "the browser did not draw the picture"
    assert result.stdout.startswith("tresnet_m.miil_in21k_ft_in1k @224: the most accurate of")
    assert looked

    def examine(*_: object) -> NetworkFacts:
        raise AssertionError("nothing is to be examined where there is no browser")

    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(choice_speeds, "examine", examine)
    result = CliRunner().invoke(app, ask)
    assert isinstance(result.exception, UserError)
    assert "a .png is drawn by a browser, and none is installed" in str(result.exception)


def test_choose_gives_json(run: Any) -> None:
    value = json.loads(run("choose", "--device", "v100", "--min-throughput", "2600", "--model", "tresnet_m", "--json"))
    assert value["kind"] == "predicted"
    assert value["best"]["name"] == "tresnet_m.miil_in21k_ft_in1k"
    assert value["best"]["top1"] == pytest.approx(83.1, abs=0.05)
    assert value["constraint"] == {"min_throughput": 2600.0, "confidence": 0.8}
    assert all(row["reason"] for row in value["rejected"])


def test_choose_measures_on_this_machine_and_keeps_records(run: Any, tmp_path: Path) -> None:
    records = tmp_path / "r.jsonl"
    arguments = (
        "choose",
        "--device",
        "cpu",
        "--runtime",
        "onnxruntime",
        "--min-throughput",
        "2600",
        "--model",
        "tresnet_m",
        "--model",
        "mobilenetv1_100",
        "--records",
        str(records),
    )
    text = run(*arguments)
    assert "measured" in text
    assert text.startswith("tresnet_m.miil_in21k_ft_in1k @224")
    lines = len(records.read_text().splitlines())
    assert lines >= 2
    run(*arguments)
    assert len(records.read_text().splitlines()) == lines


def test_choose_writes_a_page(run: Any, tmp_path: Path) -> None:
    page = tmp_path / "choice.html"
    run("choose", "--device", "v100", "--min-throughput", "2600", "--model", "tresnet_m", "--output", str(page))
    assert "tresnet_m.miil_in21k_ft_in1k" in page.read_text()
    assert "asked for: 2,600 or more" in page.read_text()
    with pytest.raises(UserError, match=r"choice\.html exists; use --overwrite or another name$"):
        run("choose", "--device", "v100", "--min-throughput", "1", "--model", "tresnet_m", "--output", str(page))


def test_choose_scale_finds_a_size_and_saves_it(run: Any, tmp_path: Path) -> None:
    spec = tmp_path / "found.yaml"
    arguments = ("--device", "v100", "--min-throughput", "9000", "--scale", "resnet18", "--along", "resolution")
    text = run("choose", *arguments, "--confidence", "0.5", "--output", str(spec))
    assert "211 px" in text  # 8000 * (224 / 211)^2 = 9016, and 8931 at 212
    assert "needed 9,000, 51 % likely" in text  # by the table of the normal: ln(9016 / 9000) / 0.08221 = 0.0211
    assert cs.load_spec(str(spec)).input.size == 211
    wrote = spec.read_bytes()
    with pytest.raises(UserError, match=r"^output .*found\.yaml exists; use --overwrite or another name$"):
        run("choose", *arguments, "--confidence", "0.8", "--output", str(spec))
    assert spec.read_bytes() == wrote
    run("choose", *arguments, "--confidence", "0.8", "--output", str(spec), "--overwrite")
    assert cs.load_spec(str(spec)).input.size == 204  # as below
    value = json.loads(run("choose", *arguments, "--confidence", "0.5", "--json"))
    assert value["found"]["value"] == 211
    assert value["sure"]["value"] == 200  # 0.9 * 8000 * (224 / 200)^2 = 9032
    assert value["following"]["value"] == 212


def test_choose_scale_ends_with_3_where_no_member_keeps_it_as_measured(
    run: Any, app: typer.Typer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It said ``does NOT keep it`` and ended well."""
    rates = iter([9500.0] + [100.0] * 20)

    def time_network(network: SizedSpec, basis: Basis, seconds: float) -> Measurement:
        c = dataclasses.replace(basis.conditions, image_size=network.image_size, threads=1)
        taken = c.batch_size / next(rates)
        return Measurement(times_s=(taken,) * 5, conditions=c, environment=Environment.here(), model=network.spec.name)

    monkeypatch.setattr(choice_largest, "own_device", lambda basis: "cpu")
    monkeypatch.setattr(choice_largest, "time_network", time_network)
    ask = ["choose", "--device", "v100", "--min-throughput", "9000", "--scale", "resnet18", "--along", "resolution"]
    kept = CliRunner().invoke(app, [*ask, "--json"])
    assert (kept.exit_code, json.loads(kept.stdout)["missed"]) == (0, None)
    spec = tmp_path / "found.yaml"
    missed = CliRunner().invoke(app, [*ask, "--output", str(spec)], env={"COLUMNS": "200"})
    said = " does not keep 9,000 images/s on this machine: 100 images/s measured (middle half: 100 to 100)"
    assert (missed.exit_code, missed.stderr.splitlines()[-1]) == (3, f"convscale: {cs.load_spec(str(spec)).name}{said}")
    assert "does NOT keep it" in missed.stdout


@pytest.mark.parametrize(
    ("confidence", "size", "sure"),
    [((), 204, 200), (("--confidence", "0.8"), 204, 200), (("--confidence", "0.95"), 197, 197)],
)
def test_choose_scale_goes_by_the_confidence(run: Any, confidence: tuple[str, ...], size: int, sure: int) -> None:
    """By hand: an 80 % interval that begins at 0.9 of the middle has a deviation of -ln 0.9 / 1.28155 = 0.08221 in the
    logarithm. Four in five, 0.84162 deviations: 9,000 * exp(0.06919) = 9,645, kept at 204 px (9,645.5) and not at 205
    (9,552). 95 %, 1.64485: 9,000 * exp(0.13523) = 10,303, kept at 197 px (10,343) and not at 198 (10,239).
    """
    arguments = ("--device", "v100", "--min-throughput", "9000", "--scale", "resnet18", "--along", "resolution")
    value = json.loads(run("choose", *arguments, *confidence, "--json"))
    assert (value["found"]["value"], value["sure"]["value"], value["following"]["value"]) == (size, sure, size + 1)
    assert value["chance"] == pytest.approx(float(confidence[1]) if confidence else 0.8, abs=0.01)
    with pytest.raises(
        UserError, match=r"keeps 1,000,000,000 images/s with the confidence 0.8; the smallest, resnet18"
    ):
        run("choose", "--device", "v100", "--min-throughput", "1e9", "--scale", "resnet18", "--along", "resolution")


@pytest.mark.parametrize(
    "option",
    [
        ("--zoo", "own"),
        ("--licence", "mit"),
        ("--commercial",),
        ("--no-extra-data",),
        ("--attention",),
        ("--accuracy", "none"),
        ("--budget", "3"),
        ("--all",),
    ],
)
def test_choose_scale_drops_no_option(run: Any, option: tuple[str, ...]) -> None:
    common = ("choose", "--device", "v100", "--min-throughput", "9000")
    with pytest.raises(
        UserError, match=rf"^{option[0]} is of a choice among candidates, and --scale scales one network"
    ):
        run(*common, "--scale", "resnet18", *option)


@pytest.mark.parametrize("option", [("--along", "width"), ("--rule", "fast")])
def test_choose_without_scale_drops_none_of_its_options(run: Any, option: tuple[str, ...]) -> None:
    common = ("choose", "--device", "v100", "--min-throughput", "9000")
    with pytest.raises(UserError, match=rf"^{option[0]} says how --scale scales a network; give --scale NAME with it"):
        run(*common, *option)
    with pytest.raises(UserError, match=rf"^{option[0]} says how --scale scales a network"):
        run(*common, "--task", "detection", *option)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "resnet50", "--device", "rtx-4900"], r"device 'rtx-4900' is unknown \(nearest: rtx-4090"),
        (["predict", "resnet5O", "--device", "v100"], "unknown model 'resnet5O'.*nearest: resnet50"),
        (["predict", "resnet50", "--device", "cpu"], "`convscale measure` times it"),
        (
            ["predict", "resnet50", "--device", "v100", "-b", "0"],
            "batch_size must be a whole number of at least 1, got 0",
        ),
        *(
            (["predict", "a.workload.json", "--device", "v100", *option], "holds for its own conditions: give --device")
            for option in (
                *(["--compiled"], ["--layout", "nhwc"], ["--mode", "train"], ["--task", "detection"]),
                *(["--head", "retinanet"], ["--detector", "neck_width=8"], ["-b", "8"]),
            )
        ),
        (
            ["predict", "resnet18", "--device", "v100", "--task", "detection", "--save-workload", "a.workload.json"],
            "--save-workload writes a classifier's workload",
        ),
        (["choose", "--device", "v100"], "give a constraint"),
        (
            ["choose", "--device", "v100", "--min-throughput", "0"],
            "min_throughput is 0.0; it must be a finite number above 0",
        ),
        (["choose", "--device", "v100", "--max-latency", "-3"], "max_latency_ms is -3.0"),
        (
            ["choose", "--device", "v100", "--min-throughput", "1e6", "--model", "resnet50"],
            "the fastest is resnet50.* images/s predicted",
        ),
        (["choose", "--device", "v100", "--scale", "resnet18", "--max-params", "3"], "--scale takes"),
        (
            ["choose", "--device", "v100", "--min-throughput", "1", "--model", "resnet18", "--output", "x.txt"],
            "must end in .html or .png",
        ),
        (
            ["choose", "--device", "v100", "--min-throughput", "1", "--scale", "resnet18", "--output", "x.html"],
            "must end in .yaml, .yml or .json",
        ),
        (["choose", "--device", "v100", "--min-throughput", "nan"], "min_throughput is nan"),
        (["choose", "--device", "v100", "--max-memory", "0"], "max_memory_gb is 0.0"),
        (["choose", "--device", "v100", "--max-params", "-1"], "max_params_m is -1.0"),
        (
            ["choose", "--device", "v100", "--min-throughput", "5", "--runtime", "best"],
            "runtime 'best' is found by measuring on this machine;",
        ),
        (
            ["choose", "--device", "v100", "--min-throughput", "5", "--model", "resnet5O"],
            "no model matches 'resnet5O'.*nearest: resnet50",
        ),
        (
            ["choose", "--device", "v100", "--min-throughput", "5", "--img-size", "0"],
            "image size is 0; it must be a whole number",
        ),
        (
            ["choose", "--device", "v100", "--min-throughput", "5", "--scale", "resnet18", "--along", "phy"],
            "along 'phy' is unknown .nearest: phi",
        ),
        (["report", "--predict", "--device", "cpu"], "this machine's own and is not predicted"),
        (["report", "--layers", "resnet18", "--device", "cpu"], "--layers shows what is predicted for a named device"),
        (["report", "--predict", "--device", "v10"], "device 'v10' is unknown .nearest:"),
        (["report", "--model", "resnet18", "--papers"], "give it with --predict"),
        (["report", "--papers", "--output", "x.png"], "a .png shows accuracy against throughput alone"),
        (["report", "--papers", "--output", "x.pdf"], "must end in .html or .png"),
        (["report", "--records", "missing.csv"], "missing.csv does not exist"),
        (
            ["report", "--records", "a.csv", "--device", "l4", "-b", "8"],
            "--batch-size goes with --predict and --layers",
        ),
        (
            ["report", "--records", "a.jsonl", "--device", "l4"],
            "--device is of --predict, .*JSON lines say it themselves",
        ),
        (["report", "--records", "a.jsonl", "--compiled"], "--compiled is of --predict, --layers and a .csv"),
        (["report", "--papers", "--img-size", "96"], "--img-size goes with --predict and --layers"),
        (["report", "--ablation", "--min-throughput", "9"], "--min-throughput is a line among the speeds"),
        (["report", "run", "--mode", "train"], "--mode goes with --records, --predict and --layers"),
        (["report", "run", "--model", "resnet18"], "--model goes with --records, --predict and --layers"),
        (["report", "old", "new", "--min-throughput", "9"], "--min-throughput goes with --records"),
        (["report", "--scaling", "resnet18", "--precision", "fp16"], "--precision goes with --records"),
        (["calibrate", "--device", "a10"], "--measurement FILE"),
        (["calibrate", "--csv", "a.csv", "--measurement", "b.jsonl"], "not both"),
        (["calibrate", "--csv", "missing.csv"], "missing.csv does not exist"),
        (["calibrate", "--csv", "a.csv", "-b", "8"], "--batch-size is not for --csv: its rows say their batch"),
        (["calibrate", "--csv", "a.csv", "--seconds", "8"], "--seconds is not for --csv"),
        *(
            (["calibrate", "--measurement", "a.jsonl", *given], f"{given[0]} is not for --measurement, whose records")
            for given in (
                ("--mode", "train"),
                ("--precision", "fp16"),
                ("--layout", "nhwc"),
                ("--compiled",),
                ("--batch-size", "8"),
                ("--threads", "2"),
                ("--seconds", "2"),
            )
        ),
        (["report"], "give a run's folder"),
        (["report", "nowhere"], "nowhere"),
        (["report", "run", "--papers"], "not both"),
        (["report", "--records", "missing.jsonl"], "missing.jsonl does not exist"),
    ],
)
def test_bad_input_is_one_clear_line(run: Any, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run(*arguments)
    assert "\n" not in str(caught.value)


def measured(name: str, images_per_s: float, **conditions: Any) -> Measurement:
    c = Conditions(device="cpu", batch_size=1, image_size=64, runtime="eager", threads=1, **conditions)
    return Measurement(times_s=(1 / images_per_s,) * 5, conditions=c, environment=Environment.here(), model=name)


def test_calibrate_by_measurements_moves_predictions_to_them(run: Any, tmp_path: Path) -> None:
    """Two networks measured at three times their predicted speed: predicted times fall to about a third."""
    predictions = {
        name: cs.predict(name, device="cpu", precision="fp32", image_size=64, batch_size=1)
        for name in ("resnet18", "mobilenetv2_050")
    }
    records, output = tmp_path / "m.jsonl", tmp_path / "c.json"
    for name, p in predictions.items():
        append_record(records, measured(name, 3 * p.images_per_s))
    value = json.loads(
        run("calibrate", "--device", "cpu", "--measurement", str(records), "--output", str(output), "--json")
    )
    with pytest.raises(UserError, match=r"m\.jsonl holds --measurement .*m\.jsonl, which --overwrite would delete"):
        run("calibrate", "--measurement", str(records), "--output", str(records), "--overwrite")
    assert 1 / 3 < value["scale"] < 0.43  # the data sheet keeps a little of its word
    assert value["count"] == 2
    text = run("predict", "resnet18", "--device", "cpu", "--calibration", str(output))
    assert "resnet18 @224" in text


I9 = "Intel(R) Core(TM) i9-10940X CPU @ 3.30GHz"


def test_calibrate_measures_a_named_processor_where_it_is(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is timed on ``cpu`` there is filed under its name, in what a prediction for it is of."""
    measured_on: list[Conditions] = []

    def measure_models(models: list[str], conditions: Conditions, seconds: float) -> list[Observation]:
        measured_on.append(conditions)
        under = dataclasses.replace(conditions, image_size=64, threads=conditions.threads or 28)
        return [Observation(net=cs.get_spec(name), conditions=under, images_per_s=100.0) for name in models]

    monkeypatch.setattr("convscale.predictor.devices.processor_name", lambda: I9)
    monkeypatch.setattr(cli_calibrate, "_measure_models", measure_models)
    output = tmp_path / "c.json"
    arguments = ("--device", "I9-10940X", "--model", "resnet18", "--compiled", "--output", str(output))
    run("calibrate", *arguments, "--threads", "4")
    assert measured_on == [Conditions(device="cpu", batch_size=1, precision="fp32", runtime="compiled", threads=4)]
    made = json.loads(output.read_text())
    assert (made["device"], made["threads"], made["count"]) == ("i9-10940x", 4, 1)
    assert basis_of(Asked(device="i9-10940x"), output).conditions.threads == 4
    again = ("--device", "cpu", "--model", "resnet18", "--output", str(output))
    with pytest.raises(UserError, match=r"c\.json exists; use --overwrite or another name"):
        run("calibrate", *again)
    assert (len(measured_on), json.loads(output.read_text())) == (1, made)  # told before anything is timed
    run("calibrate", *again, "--overwrite")
    assert json.loads(output.read_text())["device"] == "cpu"


def test_a_sweep_of_a_named_processor_is_filed_under_its_name(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure_sweep(conditions: Conditions, **_: Any) -> list[Observation]:
        under = dataclasses.replace(conditions, image_size=64, batch_size=2, threads=28)
        return [Observation(net=cs.get_spec("resnet18"), conditions=under, images_per_s=100.0)]

    monkeypatch.setattr("convscale.predictor.devices.processor_name", lambda: I9)
    monkeypatch.setattr("convscale.predictor.sweep.measure_sweep", measure_sweep)
    output = tmp_path / "c.json"
    run("calibrate", "--sweep", "--device", "i9-10940x", "--output", str(output))
    made = json.loads(output.read_text())
    assert (made["device"], made["precision"], made["threads"]) == ("i9-10940x", "fp32", 28)


@pytest.mark.parametrize(
    ("device", "sweep", "message"),
    [
        (
            "i9-10940X",
            False,
            "device 'i9-10940X' is not measured by calibrate here: record it with `convscale measure --device cpu "
            "--record FILE` there, then `convscale calibrate --device i9-10940x --measurement FILE`",
        ),
        (
            "l4",
            False,
            "device 'l4' is not measured by calibrate: record it with `convscale measure --device cuda --record FILE`, "
            "then `convscale calibrate --device NAME --measurement FILE`",
        ),
        (
            "i9-10940x",
            True,
            "device 'i9-10940x' is not the one here, which is Some Processor; leave --device at cpu to sweep that",
        ),
        ("l4", True, "device 'cuda' is not there: torch sees no CUDA GPU; sweep the cpu, or run it where it is"),
    ],
)
def test_calibrate_of_what_is_not_here(
    run: Any, monkeypatch: pytest.MonkeyPatch, device: str, sweep: bool, message: str
) -> None:
    for module in ("machine", "predictor.devices"):
        monkeypatch.setattr(f"convscale.{module}.processor_name", lambda: "Some Processor")
    with pytest.raises(UserError) as caught:
        run("calibrate", "--device", device, *(("--sweep",) if sweep else ()))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--model", "resnet18", "--model", "resnet5O"), r"unknown model 'resnet5O'.*nearest: resnet50"),
        (("--output", "."), r"^output \. is a folder; name a file$"),
        (("--output", "file/c.json"), r"^output file/c.json can not be written: .*/file is no folder; name another$"),
        (("--output", f"{300 * 'a'}.json"), r"^a+\.\.\.a+\.json can not be used: File name too long; name another$"),
        (("--sweep", "--output", "file/c.json"), "^output file/c.json can not be written: .*"),
    ],
)
def test_calibrate_times_nothing_in_vain(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...], message: str
) -> None:
    """A name that nothing builds and a file that can not be written are found out before minutes of measuring."""
    monkeypatch.setattr("convscale.speed.measuring.measure", lambda *_, **__: pytest.fail("something was timed"))
    monkeypatch.setattr(cli_calibrate, "_sweep", lambda *_, **__: pytest.fail("something was timed"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=message) as caught:
        run("calibrate", *given)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["file"]


def test_calibrate_by_a_table_says_what_it_lacks(run: Any, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("model,infer_samples_per_sec\nresnet50,3000\n")
    with pytest.raises(UserError, match="lacks the columns infer_batch_size, infer_img_size"):
        run("calibrate", "--device", "a10", "--csv", str(table))


def test_calibrate_by_a_table(run: Any, tmp_path: Path) -> None:
    table, output = tmp_path / "t.csv", tmp_path / "c.json"
    half = cs.predict("resnet18", device="a10", image_size=64, batch_size=256).images_per_s / 2
    table.write_text(
        f"model,infer_samples_per_sec,infer_batch_size,infer_img_size\nresnet18,{half},256,64\nnobody_knows_it,5,32,64\n"
    )
    text = run("calibrate", "--device", "a10", "--csv", str(table), "--output", str(output))
    factor = float(text.split("by a factor of ")[1].split(";")[0])
    assert 1.5 < factor < 2  # most of the way: one network may be odd by itself
    assert "left out, since nothing here builds them: nobody_knows_it" in text
    assert json.loads(output.read_text())["device"] == "a10"


def test_report_of_records(run: Any, tmp_path: Path) -> None:
    records, page = tmp_path / "m.jsonl", tmp_path / "speed.html"
    append_record(records, measured("resnet18", 50.0))
    assert str(page) in run("report", "--records", str(records), "--output", str(page)).replace("\n", "").replace(
        "  ", ""
    )
    assert "resnet18" in page.read_text()


def test_report_of_a_timm_table_beside_what_is_predicted(run: Any, tmp_path: Path) -> None:
    """Both stand in one picture, measured and predicted told apart; 76.2 to 81.2 % are ResNet-50's released weights."""
    table, page = tmp_path / "t.csv", tmp_path / "speed.html"
    table.write_text(
        "model,infer_samples_per_sec,infer_batch_size,infer_img_size\nresnet50,3000,256,224\ntresnet_m,3300,256,224\n"
    )
    arguments = ("report", "--records", str(table), "--predict", "--model", "resnet50", "--device", "rtx-4090")
    run(*arguments, "--output", str(page))
    text = page.read_text()
    assert text.count('class="card"') == 1
    assert "2 speeds measured" in text
    assert "resnet50.a1_in1k" in text
    assert 'tag good">measured' in text
    assert 'tag warn">predicted' in text
    run(*arguments, "--output", str(tmp_path / "speed.png"), "--min-throughput", "2800")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_report_of_a_table_says_what_it_lacks(run: Any, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("model,infer_samples_per_sec\nresnet50,3000\n")
    with pytest.raises(UserError, match="lacks the columns infer_batch_size, infer_img_size"):
        run("report", "--records", str(table), "--output", str(tmp_path / "x.html"))


def test_report_of_layers(run: Any, tmp_path: Path) -> None:
    page = tmp_path / "speed.html"
    arguments = (
        "report",
        "--layers",
        "resnet18",
        "--device",
        "v100",
        "-b",
        "32",
        "--img-size",
        "64",
        "--layout",
        "nhwc",
        "--compiled",
    )
    run(*arguments, "--output", str(page))
    assert "compiled, amp, nhwc, batch 32, 64 px" in page.read_text()


def test_a_record_of_a_newer_schema_is_refused(run: Any, tmp_path: Path) -> None:
    records = tmp_path / "m.jsonl"
    append_record(records, measured("resnet18", 50.0))
    records.write_text(records.read_text().replace('"schema": 1', '"schema": 99'))
    with pytest.raises(UserError, match="schema 99, this version of convscale reads up to 1"):
        run("report", "--records", str(records), "--output", str(tmp_path / "x.html"))


BOTH = (
    "model,infer_samples_per_sec,infer_batch_size,infer_img_size,train_samples_per_sec,train_batch_size,train_img_size"
)


def test_a_table_of_both_modes_is_read_in_the_one_asked_for(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "both.csv"
    table.write_text(f"{BOTH}\nresnet18,3000,256,224,900,64,192\n")
    seen: list[Any] = []

    def observations(records: Any, card: str) -> Any:
        seen.extend(record.measurement for record in records)
        return [], ["resnet18"]

    monkeypatch.setattr(predictor_calibrate, "observations_of", observations)
    for mode in ("infer", "train"):
        with pytest.raises(UserError, match="nothing to calibrate with"):
            run("calibrate", "--device", "a10", "--csv", str(table), "--mode", mode)
    asked = Asked(device="a10", mode="train")
    seen += [record.measurement for record in cli_report._read(table, asked)]
    (of_processor,) = cli_report._read(table, Asked(device="i9-10940x"))
    assert of_processor.measurement.conditions.precision == "fp32"
    assert {m.conditions.precision for m in seen} == {"amp"}
    told = [(m.conditions.mode, round(m.images_per_s), m.conditions.batch_size, m.conditions.image_size) for m in seen]
    assert told == [("infer", 3000, 256, 224), ("train", 900, 64, 192), ("train", 900, 64, 192)]
