"""The command line: every command answers, bad input is one line and exit code 2."""

import csv
import json
import re
import subprocess
import sys

import pytest
import typer

from convscale.cli.app import app
from convscale.cli.options import WordyCommand
from convscale.conditions import BEST
from convscale.nn.detectors import HEADS
from convscale.predictor.fitted import PREDICTED_RUNTIMES
from convscale.runtimes.base import file_runtimes

COMMANDS = (
    *("list", "show", "scale", "count", "measure", "calibrate", "predict", "choose"),
    *("train", "evaluate", "recipes", "export", "tune", "classify", "report", "fit", "demo"),
)
COLUMNS = 60


def test_help_loads_nothing_heavy():
    code = (
        "import sys; sys.argv = ['convscale', '--help']\nfrom convscale.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'numpy', 'plotly', 'onnx', 'yaml', 'rich.table') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in COMMANDS:
        assert re.search(rf"\b{command}\b", done.stdout)
    assert len(done.stdout.splitlines()) - 1 <= 24  # it fits a screen
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(call, command):
    code, out, _ = call(command, "--help")
    assert code == 0
    assert "--json" in out


def test_the_help_on_runtimes_names_every_one():
    commands = typer.main.get_command(app).commands

    def named(command):
        text = next(one.help for one in commands[command].params if "--runtime" in one.opts)
        return set(re.findall(r"\w+", text))

    assert {*PREDICTED_RUNTIMES, *file_runtimes()} <= named("fit")
    assert {*PREDICTED_RUNTIMES, *file_runtimes(), BEST} <= named("choose")
    assert {*PREDICTED_RUNTIMES, *file_runtimes()} <= named("search")


def test_the_help_says_in_which_half_precision_amp_is():
    """Of speeds it is fp16, in training the half precision that the device has."""
    for name, command in typer.main.get_command(app).commands.items():
        for one in command.params:
            said = one.help or ""
            if "--precision" in one.opts and "amp" in said:
                assert re.search(r"\bamp \([^)]*fp16", said), name
            if "--amp" in one.opts:
                assert {"bf16", "fp16"} <= set(re.findall(r"\w+", said)), name


@pytest.mark.parametrize(
    ("command", "flag", "names"),
    [
        *((command, "--head", set(HEADS)) for command in ("train", "measure", "predict", "choose")),
        ("classify", "--format", {"csv", "jsonl", "parquet"}),
        *((command, "--data-dir", {"COCO", "YOLO", "VOC", "idx", "manifest"}) for command in ("train", "evaluate")),
    ],
)
def test_the_help_names_everything_that_is_taken(command, flag, names):
    (text,) = (one.help for one in typer.main.get_command(app).commands[command].params if flag in one.opts)
    assert names <= set(re.findall(r"\w+", text))


def test_the_help_of_fit_says_that_a_device_may_be_another_than_this_machine_s():
    commands = typer.main.get_command(app).commands
    said = {
        name: next(one.help for one in commands[name].params if "--device" in one.opts) for name in ("fit", "choose")
    }
    assert "named GPU or processor such as rtx-4090" in said["fit"]
    assert said["fit"] == said["choose"]


def test_words_that_may_follow_a_flag_are_taken_wherever_the_flag_is():
    """``classify --resume auto`` was refused, which its help promises."""
    commands = typer.main.get_command(app).commands
    flags = {flag for flag, _ in WordyCommand.SAME}
    have = {name: one for name, one in commands.items() if any(flags & {*each.opts} for each in one.params)}
    assert {"classify", "export", "fit", "search", "train"} <= {*have}
    assert [name for name, one in have.items() if not isinstance(one, WordyCommand)] == []


def test_list(call):
    code, out, _ = call("list", "tresnet_?")
    assert (code, out.split()) == (0, ["tresnet_l", "tresnet_m"])
    code, out, _ = call("list", "tresnet_m", "--pretrained", "--json")
    rows = {row["name"]: row["results"] for row in json.loads(out)}
    assert rows["tresnet_m.miil_in1k"][0]["top1"] == pytest.approx(80.8, abs=0.1)
    code, out, _ = call("list", "tresnet_m", "--pretrained")
    assert re.search(
        r"^tresnet_m\.miil_in1k +224  80\.82 %  own +apache-2\.0  –$", out, re.M
    )  # timm's table of results
    assert re.search(r"^tresnet_m\.miil_in21k +–  +–  own", out, re.M)  # 11,221 classes: no ImageNet-1k accuracy
    assert "Source: timm's results table" in " ".join(out.split())


def test_show_and_scale_round_trip(call, tmp_path):
    code, out, _ = call("show", "tresnet_m")
    assert code == 0
    (tmp_path / "mine.yaml").write_text(out)
    code, out, _ = call("scale", str(tmp_path / "mine.yaml"), "--width", "0.5", "--output", str(tmp_path / "half.yaml"))
    assert code == 0
    half = ("scale", "resnet18", "--width", "0.5", "--output", tmp_path / "half.yaml")
    code, _, err = call(*half)
    assert (code, " ".join(err.split())) == (
        2,
        f"convscale: output {tmp_path}/half.yaml exists; use --overwrite or another name",
    )
    code, out, _ = call("show", str(tmp_path / "half.yaml"), "--json")
    assert json.loads(out)["stem"]["widths"] == [32]
    assert call(*half, "--overwrite")[0] == 0
    assert "resnet18" in json.loads(call("show", tmp_path / "half.yaml", "--json")[1])["name"]


def test_count(call):
    _, out, _ = call("count", "tresnet_m", "--json")
    row = json.loads(out)[0]
    assert row["params"] == 31_389_032  # PAPERS.md
    assert row["macs"] / 1e9 == pytest.approx(5.737, abs=0.01)


def test_count_says_what_training_keeps_and_what_a_card_holds(call):
    """Paper: 512 images of TResNet-M in training on a V100 under AMP (PAPERS.md), within 10 %."""
    args = ("count", "tresnet_m", "--mode", "train", "--precision", "amp", "-b", "2", "--device", "v100")
    _, out, _ = call(*args, "--json")
    row = json.loads(out)[0]
    assert row["weight_bytes"] > 4 * 31_389_032
    assert row["optimizer_bytes"] == 4 * 31_389_032
    assert row["largest_batch"]["batch_size"] == pytest.approx(512, rel=0.1)
    code, out, _ = call(*args)
    text = " ".join(out.split())
    assert code == 0
    assert "training, eager, amp, nchw, batch 2;" in text
    assert "optimiser's state 126 MB" in text  # 31,389,032 numbers of 4 bytes
    assert "fit in NVIDIA Tesla V100 SXM2 16 GB (train, amp, nchw)" in text
    assert max(map(len, out.splitlines())) <= 60


def test_autocast_in_bfloat16_is_counted_as_autocast_in_float16(call):
    def row(precision: str) -> dict:
        return json.loads(call("count", "resnet18", "--precision", precision, "--device", "a10", "--json")[1])[0]

    half, other = row("amp"), row("amp_bf16")
    assert other["precision"] == "amp_bf16"
    assert other["peak_bytes"] == half["peak_bytes"] < row("fp32")["peak_bytes"]
    assert other["largest_batch"]["batch_size"] == half["largest_batch"]["batch_size"]


def test_measure_sweeps_batches_and_writes_timms_table(call, tmp_path):
    table = tmp_path / "infer.csv"
    args = (
        "measure",
        "mobilenetv2_050",
        "--img-size",
        "32",
        "--threads",
        "1",
        "--runtime",
        "eager",
        "--seconds",
        "0.02",
        "--layout",
        "auto",
    )
    code, out, _ = call(*args, "-b", "1", "-b", "2", "--record", str(table))
    assert code == 0
    assert out.count("layout chosen by") == 2
    assert "99th percentile" in " ".join(out.split())
    table_lines = out.splitlines()[-3:]
    assert table_lines[0].split() == ["network", "batch", "images/s", "±", "a", "call", "p99"]
    assert [line.split()[:2] for line in table_lines[1:]] == [["mobilenetv2_050", "1"], ["mobilenetv2_050", "2"]]
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["model"] for row in rows] == ["mobilenetv2_050"] * 2
    assert {row["infer_batch_size"] for row in rows} == {"1", "2"}
    assert {row["param_count"] for row in rows} == {"1.97"}  # M, as timm's table of results has it
    code, _, err = call(*args, "-b", "1", "--record", str(table))
    assert code == 2
    assert "exists and a table is not appended to" in err


def test_measure_states_its_conditions(call, tmp_path):
    record = tmp_path / "records.jsonl"
    args = (
        "mobilenetv2_050",
        "--img-size",
        "32",
        "-b",
        "2",
        "--threads",
        "1",
        "--runtime",
        "eager",
        "--seconds",
        "0.05",
    )
    code, out, _ = call("measure", *args, "--record", str(record), "--json")
    assert code == 0
    found = json.loads(out)[0]
    conditions = {
        key: found["conditions"][key]
        for key in ("device", "runtime", "batch_size", "image_size", "threads", "precision")
    }
    assert conditions == {
        "device": "cpu",
        "runtime": "eager",
        "batch_size": 2,
        "image_size": 32,
        "threads": 1,
        "precision": "fp32",
    }
    assert len(record.read_text().splitlines()) == 1
    code, out, _ = call("measure", *args)
    assert "images/s" in out
    assert "32 px" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("show", "tresnet_n"), "unknown model 'tresnet_n' (nearest: tresnet_m"),
        (("show", "none.yaml"), "spec file none.yaml can not be read: No such file or directory"),
        (("scale", "resnet18"), "scale needs phi"),
        (("list", "mypackage.nets:make"), "mypackage.nets can not be imported"),
        (("list", "mine.yaml"), "spec file mine.yaml can not be read: No such file or directory"),
        (("list", "mine.yaml", "--pretrained"), "'mine.yaml' is a network of your own, which has no released weights;"),
        (("list", "nothing*"), "no model matches 'nothing*'; `convscale list` shows all"),
        (("list", "zzz*"), "no model matches 'zzz*'"),
        (("count", "resnet18", "--img-size", "2147483647"), "more than any tensor holds; take smaller images or fewer"),
        (("measure", "resnet18", "-b", "0"), "batch_size must be a whole number of at least 1, got 0"),
        (("measure", "tresnet_m", "--img-size", "30"), "30 px; tresnet_m takes a multiple of 4"),
        (
            ("measure", "resnet18", "-b", "4", "-b", "-1", "--img-size", "32"),
            "batch_size must be a whole number of at least 1, got -1",
        ),
        (("measure", "resnet18", "--sweep", "-b", "4"), "--sweep chooses the batches itself"),
        (
            ("measure", "resnet18", "--protocol", "tresnet", "-b", "4"),
            "--protocol tresnet takes 90 % of the largest batch",
        ),
        (("measure", "resnet18", "--protocol", "timm"), "protocol 'timm' is unknown (known: tresnet)"),
        (("measure", "resnet18", "--layout", "nwhc"), "layout 'nwhc' is unknown (nearest: n"),
        (("measure", "resnet18", "--device", "cuda"), "device 'cuda' is not there: torch sees no CUDA GPU"),
        (
            ("measure", "resnet18", "--device", "rtx-4090"),
            "device 'rtx-4090' can not be measured here; use cpu or cuda",
        ),
        (("count", "resnet18", "--ema"), "--ema is for the largest batch; give it with --device"),
        (("count", "resnet18", "--device", "t4", "--ema"), "ema averages weights in training, but mode is 'infer'"),
        (("count", "resnet18", "--device", "v10"), "device 'v10' is unknown (nearest: "),
        (("count", "resnet18", "--precision", "amb"), "precision 'amb' is unknown (nearest: amp"),
        (("count", "tresnet_m", "--img-size", "30"), "30 px; tresnet_m takes a multiple of 4"),
        (("count", "efficientnet_b7", "--device", "t4", "--img-size", "6000"), "not even one image fits in NVIDIA T4"),
        (("measure", "resnet18", "--runtime", "onnx"), "runtime 'onnx' is unknown (nearest: onnxruntime"),
        (("train", "--data-dir", "none", "--output", "x", "--model", "resnet18"), "data folder none does not exist"),
        (
            ("train", "--data-dir", "none", "--output", "x", "--model", "resnet18", "--set", "lr"),
            "--set takes key=value, got 'lr'",
        ),
        (("fit", "--data-dir", "none", "--output", "x", "--min-throughput", "5"), "data folder none does not exist"),
        (("fit", "--data-dir", "none", "--output", "x", "--min-throughput", "-5"), "min_throughput is -5"),
        (("evaluate", "none", "--data-dir", "none"), "none"),
        (("export", "none", "--output", "x"), "none"),
        (("export", "none", "--output", "x", "--int8"), "--int8 needs --data-dir"),
        (("tune", "none"), "none"),
        (("classify", "none.jpg", "--model", "x"), "image none.jpg does not exist"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(call, args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*args)
    assert code == 2
    assert err.startswith("convscale: ")
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_usage_errors_exit_with_2(call):
    assert call("fit")[0] == 2
    assert call("nothing")[0] == 2


def test_version(call):
    from convscale import __version__

    assert call("--version")[1].strip() == f"convscale {__version__}"
