"""Specs, recipes, checkpoints, weights, calibrations, records and artefacts that somebody forged or damaged."""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.accidents.pictures import bad, rows_of
from benchmarks.accidents.play import ROOT, Accident, Play, Seen, Word
from benchmarks.accidents.stage import checkpoint_of, reseal, resum

WRONG: tuple[Any, ...] = (None, True, -1, 10**30, 1e308, "", "x" * 5000, [], [[]], {}, {"a": {"b": [None]}})
"""What is written in the place of a right value."""
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
DEEP, DIGITS = "[" * 100_000, "9" * 100_000
TEXTS = {
    "brackets": DEEP,
    "digits": f'{{"a": {DIGITS}}}',
    "nan": '{"a": NaN}',
    "twice": '{"a": 1, "a": 2}',
    "half a character": '{"\\ud800": 1}',
    "latin-1": b'{"caf\xe9": 1}',
    "zeros": b"\0" * 1000,
    "cut": '{"a": [1, 2',
    "a list": "[1]",
    "a number": "1",
    "empty": "",
}
"""Texts that no JSON reader here may stumble over."""


def any_end(play: Play, seen: Seen, what: str) -> None:
    """A result, or one line and exit code 2."""
    play.expect(seen.code in (0, 2), f"{what}: exit code {seen.code}: {seen.line}")
    play.expect(seen.code == 0 or seen.one_line, f"{what}: not one line: {seen.err[-300:]!r}")
    play.expect(not seen.traceback, f"{what}: a traceback")


def forged(value: dict[str, Any], most: int = 60, *, depth: int = 2) -> list[tuple[str, Any]]:
    """A value with one part of it wrong or missing, down to a level: so many of the ways, evenly taken."""
    ways = list(_all_forged(value, depth))
    return [ways[at * len(ways) // most] for at in range(most)] if len(ways) > most else ways


def _all_forged(value: dict[str, Any], depth: int) -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        places: list[tuple[str, ...]] = [(key,), *((key, below) for below in (item if isinstance(item, dict) else ()))]
        for place in places:
            if len(place) > depth:
                continue
            for wrong in (*WRONG, ...):
                made = copy.deepcopy(value)
                parent = made if len(place) == 1 else made[place[0]]
                if wrong is ...:
                    del parent[place[-1]]
                else:
                    parent[place[-1]] = wrong
                yield f"{'.'.join(place)} = {'nothing' if wrong is ... else str(wrong)[:20]}", made


def _write(path: Path, content: str | bytes) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


# ---------------------------------------------------------------- specs and recipes


def _specs(play: Play) -> None:
    from convscale.arch.zoo import get_spec

    path = play.here / "forged.json"
    for name in ("resnet18", "tresnet_m"):
        for what, made in forged(get_spec(name).to_dict()):
            path.write_text(json.dumps(made))
            any_end(play, play.forked("show", path), f"{name}: {what}")


def _repeats(play: Play) -> None:
    from convscale.arch.zoo import get_spec

    for times in (10**8, 10**5):
        value: Any = json.loads(json.dumps(get_spec("resnet18").to_dict()))
        for stage in value["stages"]:
            for run in stage["runs"]:
                run["repeat"] = times
        path = play.here / "many.json"
        path.write_text(json.dumps(value))
        for words in (("show", path), ("count", path), ("predict", path, "--device", "h100")):
            play.refused(play.fresh(*words), "repeat|blocks")


def _spec_texts(play: Play) -> None:
    texts: dict[str, str | bytes] = {**TEXTS, "bomb": BOMB, "python": "a: !!python/object/apply:os.system [ls]\n"}
    texts |= {
        "dates": "2024-01-01: 2024-01-01\n",
        "octal": "name: 0o17\nstages: 017\n",
        "keys": "1: a\non: b\n? [x]\n: y\n",
    }
    texts |= {"long": "name: " + "x" * 3_000_000, "two": "--- 1\n--- 2\n", "circle": "a: &a {b: *a}\n"}
    for what, text in texts.items():
        for ending in ("yaml", "json"):
            path = play.here / f"forged.{ending}"
            _write(path, text)
            for command in ("show", "recipes"):
                seen = play.forked(command, path)
                any_end(play, seen, f"{command}, {what} in {ending}")
                play.expect(seen.code == 2, f"{command}, {what} in {ending}: it is taken")


def _no_regular(play: Play) -> None:
    os.mkfifo(play.here / "pipe.yaml")
    os.symlink("/dev/zero", play.here / "zero.yaml")
    (play.here / "folder.yaml").mkdir()
    for name in ("pipe.yaml", "zero.yaml", "folder.yaml"):
        for command in ("show", "recipes"):
            play.refused(play.fresh(command, play.here / name), name)


def _own_size(play: Play) -> None:
    from convscale.arch.zoo import get_spec

    value: Any = json.loads(json.dumps(get_spec("tresnet_m").to_dict()))
    for size in (4, 18, 0, 10**6):
        value["input"]["size"] = size
        (play.here / "small.json").write_text(json.dumps(value))
        play.refused(play.forked("show", play.here / "small.json"), "size")


def _recipes(play: Play) -> None:
    from convscale.learn.recipes import get_recipe

    path = play.here / "forged.json"
    for what, made in forged(get_recipe("small").to_dict()):
        path.write_text(json.dumps(made))
        any_end(play, play.forked("recipes", path), what)


# ---------------------------------------------------------------- checkpoints and weights


UNREAD = ("verification.json", "reference.json")
"""Files of an artefact that no command here opens."""


def _forge_file(
    play: Play, path: Path, words: tuple[Word, ...], after: Callable[[], object], texts: bool = True
) -> None:
    """One JSON file of a folder, wrong in every way, before a command."""
    whole = path.read_text(encoding="utf-8")
    value = json.loads(whole)
    ways = forged(value, 40) if isinstance(value, dict) else [(str(wrong)[:20], wrong) for wrong in WRONG]
    for what, made in ways:
        path.write_text(json.dumps(made))
        after()
        any_end(play, play.forked(*words), f"{path.name}: {what}")
    for what, text in TEXTS.items() if texts else ():
        _write(path, text)
        after()
        seen = play.forked(*words)
        any_end(play, seen, f"{path.name}: {what}")
        play.expect(seen.code == 2 or path.name in UNREAD, f"{path.name}: {what} is taken")
    path.write_text(whole)
    after()


def _checkpoints(play: Play) -> None:
    run = play.stage.copy(play.stage.run, play)
    place = checkpoint_of(run)
    words = ("evaluate", place, "--data-dir", play.stage.data, "-j", "0")
    _forge_file(play, place / "checkpoint.json", words, lambda: resum(place))
    play.done(play.forked(*words))


def _cut_checkpoints(play: Play) -> None:
    run = play.stage.copy(play.stage.run, play)
    place = checkpoint_of(run)
    for file in sorted(place.iterdir()):
        whole = file.read_bytes()
        for content in (whole[: len(whole) // 2], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
            file.write_bytes(content)
            any_end(play, play.forked("evaluate", place, "--data-dir", play.stage.data, "-j", "0"), file.name)
        file.unlink()
        any_end(play, play.forked("evaluate", place, "--data-dir", play.stage.data, "-j", "0"), f"no {file.name}")
        file.write_bytes(whole)


def _states(play: Play) -> None:
    from convscale.learn.checkpoint import list_checkpoints

    whole = play.stage.copy(play.stage.run, play, "whole")
    state = json.loads((list_checkpoints(whole)[0] / "state.json").read_text(encoding="utf-8"))
    for what, made in forged(state, 20, depth=1):  # each resumes in earnest
        run = play.here / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(whole, run)
        place = list_checkpoints(run)[0]
        (place / "state.json").write_text(json.dumps(made))
        resum(place)
        seen = play.forked(*play.stage.training(run, "--resume"))
        play.expect(seen.code in (0, 2), f"{what}: exit code {seen.code}: {seen.line}")
        play.expect(seen.code == 0 or seen.line.startswith("convscale: "), f"{what}: {seen.line}")


def _weights(play: Play) -> None:
    good = (checkpoint_of(play.stage.run) / "model.safetensors").read_bytes()
    size = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + size])
    name = next(each for each in header if each != "__metadata__")
    files: dict[str, bytes] = {
        "length": struct.pack("<Q", 2**63) + good[8:],
        "cut": good[: len(good) // 2],
        "short": good[:4],
        "empty": b"",
        "text": b"hello, world",
        "brackets": struct.pack("<Q", 100_000) + DEEP.encode(),
        "list": struct.pack("<Q", 2) + b"[]",
    }
    for what, change in {
        "kind": {"dtype": "F1"},
        "shape": {"shape": [2**40, 2**40]},
        "negative": {"shape": [-1]},
        "offsets": {"data_offsets": [0, 2**60]},
        "backwards": {"data_offsets": [100, 0]},
        "float": {"shape": [1.5]},
    }.items():
        text = json.dumps({**header, name: {**header[name], **change}}).encode()
        files[what] = struct.pack("<Q", len(text)) + text + good[8 + size :]
    for what, content in files.items():
        for ending in ("safetensors", "pth"):
            path = play.here / f"forged.{ending}"
            path.write_bytes(content)
            seen = play.forked(*play.stage.training(play.here / "run", "--init", path))
            play.expect(seen.code == 2, f"{what} as {ending}: exit code {seen.code}: {seen.line}")
            play.expect(seen.line.startswith("convscale: "), f"{what} as {ending}: {seen.line}")


def _pickles(play: Play) -> None:
    import torch

    class Evil:
        """Leaves a file where it is loaded."""

        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {play.here}/executed",)

    for what in (Evil(), {"state_dict": {"a": Evil()}}, {"model": Evil()}):
        torch.save(what, play.here / "evil.pth")
        seen = play.forked(*play.stage.training(play.here / "run", "--init", play.here / "evil.pth"))
        play.expect(seen.code == 2 and seen.line.startswith("convscale: "), f"exit code {seen.code}: {seen.line}")
    seen = play.forked("evaluate", play.here / "evil.pth", "--data-dir", play.stage.data)
    play.refused(seen, "pickle")
    play.expect(not (play.here / "executed").exists(), "what the file says was executed")


def _trainers(play: Play) -> None:
    import torch
    from safetensors.torch import load_file

    weights = load_file(checkpoint_of(play.stage.run) / "model.safetensors")
    args = argparse.Namespace(lr=0.1, model="resnet18")
    prefixed = {f"_orig_mod.module.{name}": value for name, value in weights.items()}
    wrapped: dict[str, Any] = {
        "timm": {"epoch": 3, "arch": "resnet18", "state_dict": weights, "args": args, "version": 2},
        "torchvision": {"model": weights, "optimizer": {"state": {}, "param_groups": []}, "args": args, "epoch": 1},
        "averaged": {"n_averaged": torch.tensor(3), **{f"module.{name}": value for name, value in weights.items()}},
        "lightning": {"state_dict": {f"model.{name}": value for name, value in weights.items()}, "epoch": 1},
        "compiled": prefixed,
        "twice": {f"module.module.{name}": value for name, value in weights.items()},
        "extra": {**weights, "loss.weight": torch.ones(3)},
    }
    for what, value in wrapped.items():
        path = play.here / f"{what}.pth"
        torch.save(value, path)
        seen = play.forked(*play.stage.training(play.here / f"run-{what}", "--init", path))
        play.expect(seen.code == 0, f"{what}: exit code {seen.code}: {seen.line}")


def _not_finite(play: Play) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    run = play.stage.copy(play.stage.run, play)
    place = checkpoint_of(run)
    path = place / "model.safetensors"
    weights = load_file(path)
    save_file(
        {name: torch.full_like(v, float("nan")) if v.is_floating_point() else v for name, v in weights.items()}, path
    )
    resum(place)
    for words in (
        ("evaluate", place, "--data-dir", play.stage.data, "-j", "0"),
        ("export", place, "--output", play.here / "made"),
        ("export", place, "--output", play.here / "made", "--data-dir", play.stage.data),
    ):
        seen = play.forked(*words)
        play.expect(seen.code == 2 and "finite" in seen.line, f"{words[0]} ends with {seen.code}: {seen.line}")
        play.expect(not (play.here / "made").exists(), "what was refused is there")


# ---------------------------------------------------------------- artefacts


def _classify(play: Play, artifact: Path) -> tuple[Word, ...]:
    return ("classify", play.stage.data / "test", "--model", artifact, "--workers", "1")


def _artifacts(play: Play) -> None:
    made = play.stage.copy(play.stage.artifact, play)
    _forge_file(play, made / "artifact.json", _classify(play, made), lambda: None)
    for path in sorted(made.glob("*.json")):
        if path.name != "artifact.json":
            _forge_file(play, path, _classify(play, made), lambda: reseal(made))
    play.done(play.forked(*_classify(play, made)))


def _changed_artifacts(play: Play) -> None:
    for kind in ("byte", "cut", "gone", "link", "hard link", "foreign"):
        made = play.stage.copy(play.stage.artifact, play, kind)
        model, elsewhere = made / "model.onnx", play.here / f"{kind}.onnx"
        content = model.read_bytes()
        if kind == "byte":
            model.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        elif kind == "cut":
            model.write_bytes(content[: len(content) // 2])
        elif kind == "foreign":
            model.write_bytes(b"\x80\x04evil")
            reseal(made)
        else:
            os.rename(model, elsewhere)
            if kind != "gone":
                (os.symlink if kind == "link" else os.link)(elsewhere, model)
        play.refused(play.forked(*_classify(play, made)))


def _external(play: Play) -> None:
    import onnx
    from onnx.external_data_helper import set_external_data

    (play.here / "secret").write_bytes(b"\0" * 10**6)
    for number, location in enumerate(("../secret", str(play.here / "secret"), "beside.bin")):
        made = play.stage.copy(play.stage.artifact, play, f"made{number}")
        model = onnx.load(made / "model.onnx")
        (made / "beside.bin").write_bytes(b"\0" * 10**6)
        tensor = next(each for each in model.graph.initializer if each.HasField("raw_data"))
        set_external_data(tensor, location=location, offset=0, length=len(tensor.raw_data))
        tensor.ClearField("raw_data")
        (made / "model.onnx").write_bytes(model.SerializeToString())
        reseal(made)
        play.refused(play.forked(*_classify(play, made)), "outside its own folder|no checksum")


def _not_finite_artifact(play: Play) -> None:
    import numpy as np
    import onnx
    from onnx import numpy_helper

    made = play.stage.copy(play.stage.artifact, play)
    model = onnx.load(made / "model.onnx")
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            value = np.full_like(numpy_helper.to_array(tensor), np.nan)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    (made / "model.onnx").write_bytes(model.SerializeToString())
    reseal(made)
    seen = play.forked(*_classify(play, made))
    rows = rows_of(seen)
    play.expect(len(rows) == 6 and len(bad(rows)) == 6, f"{len(rows)} rows, {len(bad(rows))} with an error, of 6")


def _programs(play: Play) -> None:
    for number, text in enumerate(("9**9**9**9**9", "9" * 5000, "(" * 3000 + "1" + ")" * 3000, "__import__('os')")):
        made = play.stage.copy(play.stage.program, play, f"made{number}")
        whole, path = (made / "model.pt2").read_bytes(), made / "model.pt2"
        (play.here / "whole").write_bytes(whole)
        with zipfile.ZipFile(play.here / "whole") as source, zipfile.ZipFile(path, "w") as target:
            for entry in source.infolist():
                content = source.read(entry)
                if entry.filename.endswith("models/model.json"):
                    value = json.loads(content)
                    value["graph_module"]["expr_str"] = text
                    content = json.dumps(value).encode()
                target.writestr(entry.filename, content)
        reseal(made)
        play.refused(play.forked(*_classify(play, made)), "expression")


# ---------------------------------------------------------------- what speeds and runs leave


def _calibrations(play: Play) -> None:
    path = play.stage.copy(play.stage.calibration, play, "forged.json")
    words = ("predict", "resnet18", "--device", "h100", "--calibration", path)
    _forge_file(play, path, words, lambda: None)


def _records(play: Play) -> None:
    path = play.stage.copy(play.stage.records, play, "forged.jsonl")
    value = json.loads(path.read_text(encoding="utf-8"))
    for words in (
        ("calibrate", "--measurement", path, "--output", play.here / "made.json", "--overwrite"),
        ("report", "--records", path, "--output", play.here / "made.html"),
    ):
        for what, made in forged(value, 50):
            path.write_text(json.dumps(made) + "\n")
            any_end(play, play.forked(*words), f"{words[0]}: {what}")
        for what, text in TEXTS.items():
            _write(path, text)
            seen = play.forked(*words)
            any_end(play, seen, f"{words[0]}: {what}")


def _runs(play: Play) -> None:
    run = play.stage.copy(play.stage.run, play)
    log = run / "log.jsonl"
    row = json.loads(log.read_text(encoding="utf-8").splitlines()[0])
    whole = log.read_text(encoding="utf-8")
    for what, made in forged(row, 40):
        log.write_text(json.dumps(made) + "\n")
        any_end(play, play.forked("report", run), f"log.jsonl: {what}")
    for name, kept in (("log.jsonl", whole), ("recipe.yaml", (run / "recipe.yaml").read_text(encoding="utf-8"))):
        for what, text in {**TEXTS, "bomb": BOMB}.items():
            _write(run / name, text)
            any_end(play, play.forked("report", run), f"{name}: {what}")
        (run / name).write_text(kept, encoding="utf-8")
    play.done(play.forked("report", run))


def _fits(play: Play) -> None:
    run = play.here / "fit"
    run.mkdir()
    value = json.loads((ROOT / "results" / "demo.json").read_text(encoding="utf-8"))
    for what, made in forged(value, 40, depth=1):
        (run / "fit.json").write_text(json.dumps(made))
        any_end(play, play.forked("report", run), f"fit.json: {what}")
    for what, text in TEXTS.items():
        _write(run / "fit.json", text)
        seen = play.forked("report", run)
        any_end(play, seen, f"fit.json: {what}")
        play.expect(seen.code == 2, f"fit.json: {what} is taken")


def _huge(play: Play) -> None:
    """A file of 4 GiB, all of it a hole."""
    for name, words in (
        ("huge.json", ("show", play.here / "huge.json")),
        ("huge.yaml", ("recipes", play.here / "huge.yaml")),
        ("huge.json", ("predict", "resnet18", "--device", "h100", "--calibration", play.here / "huge.json")),
        ("huge.jsonl", ("calibrate", "--measurement", play.here / "huge.jsonl", "--output", play.here / "made.json")),
        ("huge.csv", ("check", play.here / "huge.csv")),
    ):
        with open(play.here / name, "wb") as file:
            file.truncate(4 * 2**30)
        seen = play.fresh(*words)
        play.refused(seen, "bytes")
        play.expect(seen.peak_mb < 1000, f"{words[0]} took {seen.peak_mb:.0f} MB")
        (play.here / name).unlink()


ACCIDENTS = [
    Accident(name="specs/forged", did="parts of two specs wrong in twelve ways", act=_specs),
    Accident(name="specs/repeats", did="a block repeated a hundred million times: show, count, predict", act=_repeats),
    Accident(name="specs/texts", did="bombs, brackets, dates, octals, tags, in specs and recipes", act=_spec_texts),
    Accident(name="specs/no file", did="a pipe, /dev/zero or a folder as spec and as recipe", act=_no_regular),
    Accident(name="specs/own size", did="a spec that can not run at its own size", act=_own_size),
    Accident(name="recipes/forged", did="parts of a recipe wrong in twelve ways", act=_recipes),
    Accident(name="checkpoints/forged", did="each part of checkpoint.json wrong, checksums right", act=_checkpoints),
    Accident(name="checkpoints/cut", did="each file of a checkpoint cut, changed or gone", act=_cut_checkpoints),
    Accident(name="checkpoints/state", did="parts of state.json wrong; train --resume", act=_states),
    Accident(name="checkpoints/nan", did="weights that are NaN: evaluate, export", act=_not_finite),
    Accident(name="weights/forged", did="--init with forged and cut safetensors and .pth files", act=_weights),
    Accident(name="weights/pickles", did="--init and evaluate with pickles that run a program", act=_pickles),
    Accident(name="weights/trainers", did="--init with timm's, torchvision's, Lightning's wrappings", act=_trainers),
    Accident(name="artefacts/forged", did="each part of an artefact's JSON files wrong", act=_artifacts),
    Accident(
        name="artefacts/changed", did="a model file changed, cut, gone, linked or foreign", act=_changed_artifacts
    ),
    Accident(name="artefacts/external", did="an ONNX file that wants data from elsewhere", act=_external),
    Accident(name="artefacts/nan", did="an ONNX file whose weights are NaN", act=_not_finite_artifact),
    Accident(name="artefacts/program", did=".pt2 with powers, digits, brackets, code as a shape", act=_programs),
    Accident(name="records/calibrations", did="each part of a calibration wrong", act=_calibrations),
    Accident(name="records/measurements", did="each part of a measurement wrong: calibrate, report", act=_records),
    Accident(name="records/trainings", did="a training's log and recipe wrong: report", act=_runs),
    Accident(name="records/fits", did="parts of fit.json wrong: report", act=_fits),
    Accident(name="records/huge", did="files of 4 GiB as spec, recipe, calibration, records, manifest", act=_huge),
]
