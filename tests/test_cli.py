"""The command line: every command answers, bad input is one line and exit code 2."""

import json
import subprocess
import sys

import pytest

from convscale import cli

COMMANDS = (
    *("list", "show", "scale", "count", "measure", "calibrate", "predict", "choose"),
    *("train", "evaluate", "recipes", "export", "tune", "classify", "report", "fit", "demo"),
)


def run(capsys, monkeypatch, *args: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``convscale ARGS``."""
    monkeypatch.setattr(sys, "argv", ["convscale", *args])
    monkeypatch.setenv("COLUMNS", "60")
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture
def call(capsys, monkeypatch):
    return lambda *args: run(capsys, monkeypatch, *args)


def test_help_loads_nothing_heavy():
    code = (
        "import sys; sys.argv = ['convscale', '--help']\nfrom convscale.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'numpy', 'plotly', 'onnx', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in COMMANDS:
        assert f"  {command} " in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(call, command):
    code, out, _ = call(command, "--help")
    assert code == 0
    assert "--json" in out


def test_list(call):
    code, out, _ = call("list", "tresnet_?")
    assert (code, out.split()) == (0, ["tresnet_l", "tresnet_m"])
    code, out, _ = call("list", "tresnet_m", "--pretrained", "--json")
    rows = {row["name"]: row["results"] for row in json.loads(out)}
    assert rows["tresnet_m.miil_in1k"][0]["top1"] == pytest.approx(80.8, abs=0.1)
    code, out, _ = call("list", "tresnet_m", "--pretrained")
    assert "80.82 % @224" in out
    assert "Source:" in out


def test_show_and_scale_round_trip(call, tmp_path):
    code, out, _ = call("show", "tresnet_m")
    assert code == 0
    (tmp_path / "mine.yaml").write_text(out)
    code, out, _ = call("scale", str(tmp_path / "mine.yaml"), "--width", "0.5", "--output", str(tmp_path / "half.yaml"))
    assert code == 0
    code, out, _ = call("show", str(tmp_path / "half.yaml"), "--json")
    assert json.loads(out)["stem"]["widths"] == [32]


def test_count(call):
    _, out, _ = call("count", "tresnet_m", "--json")
    row = json.loads(out)[0]
    assert row["params"] == 31_389_032  # PAPERS.md
    assert row["macs"] / 1e9 == pytest.approx(5.737, abs=0.01)


def test_measure_states_its_conditions(call, tmp_path):
    record = tmp_path / "records.jsonl"
    args = ("mobilenetv2_050", "--img-size", "32", "-b", "2", "--threads", "1", "--runtime", "eager", "--seconds", "0.05")
    code, out, _ = call("measure", *args, "--record", str(record), "--json")
    assert code == 0
    found = json.loads(out)[0]
    conditions = {key: found["conditions"][key] for key in ("device", "runtime", "batch_size", "image_size", "threads", "precision")}
    assert conditions == {"device": "cpu", "runtime": "eager", "batch_size": 2, "image_size": 32, "threads": 1, "precision": "fp32"}
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
        (("list", "zzz*"), "no model matches 'zzz*'"),
        (("measure", "resnet18", "-b", "0"), "batch_size must be a whole number of at least 1, got 0"),
        (("measure", "tresnet_m", "--img-size", "30"), "30 px; tresnet_m takes a multiple of 4"),
        (("measure", "resnet18", "--runtime", "onnx"), "runtime 'onnx' is unknown (nearest: onnxruntime"),
        (("train", "--data-dir", "none", "--output", "x", "--model", "resnet18"), "data folder none does not exist"),
        (("train", "--data-dir", "none", "--output", "x", "--model", "resnet18", "--set", "lr"), "--set takes key=value, got 'lr'"),
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
