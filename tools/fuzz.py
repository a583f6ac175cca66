"""Fuzz every reader: whatever the bytes are, there must be a result, or a UserError of one line.

    python tools/fuzz.py [--minutes 60] [--only 'json*'] [--output results/fuzz.jsonl]
    python tools/fuzz.py --merge NAME DIR        keep the shortest inputs of DIR that reach new code, in the corpus

The time is split evenly over the readers, each in a process of its own under atheris, which looks for inputs that reach
new lines of convscale. It begins with the files in `tests/fuzz_corpus/NAME/`, which the test suite replays too. An
input that ends in any other way (another exception, more than one line, 10 s, 4 GB) is kept in `--found`, and fails.

The record has a row for each reader: inputs tried, results, refusals, unlike outcomes, unlike messages. Without atheris
(it has wheels for Linux) nothing is run and the exit code is 0: the reason is printed.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import importlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CORPUS = ROOT / "tests" / "fuzz_corpus"
LIMIT_S, LIMIT_MB = 10, 4096
"""For one input: by the clock, and of memory."""
MOST_BYTES = 4096
"""Of an input that atheris makes."""
MOST_KEPT = 12
"""Inputs of a reader in the corpus."""

Read = Callable[[bytes, Path], object]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Something that bytes from outside come in through."""

    name: str
    """Of its folder in the corpus."""
    read: Read
    """Reads bytes; the folder is empty, and for files."""
    text: bool = False
    """What it reads is a JSON value, of which tests change parts."""

    @property
    def seeds(self) -> list[Path]:
        """The files in its corpus."""
        return sorted((CORPUS / self.name).iterdir())


def outcome(reader: Reader, data: bytes, place: Path) -> str:
    """Read bytes. Returns what the refusal says, or nothing where there is a result.

    Raises:
        AssertionError: the refusal is not one line.
        Exception: whatever else the reader raises, which is a fault of it.
    """
    from convscale.errors import UserError

    try:
        reader.read(data, place)
    except UserError as error:
        said = str(error)
        assert len(said.splitlines()) == 1, f"not one line: {said!r}"
        return said
    return ""


def _file(name: str, read: Callable[[Path], object]) -> Read:
    """Of a reader of files: the bytes stand in a file of this name."""

    def from_file(data: bytes, place: Path) -> object:
        path = place / name
        path.write_bytes(data)
        return read(path)

    return from_file


# ---------------------------------------------------------------- text


def _json(data: bytes, _place: Path) -> object:
    from convscale.read import json_of

    return json_of(data, "a text")


def _yaml(path: Path) -> object:
    from convscale.read import read_yaml

    return read_yaml(path, "a text")


def _lines(path: Path) -> object:
    from convscale.read import read_json_lines

    return list(read_json_lines(path, "lines"))


def _spec(path: Path) -> object:
    from convscale.arch.spec import load_spec

    return load_spec(path)


def _space(path: Path) -> object:
    from convscale.nas.space import load_space

    return load_space(path)


def _rule(path: Path) -> object:
    from convscale.arch.rules import load_rule

    return load_rule(path)


def _study(path: Path) -> object:
    from convscale.nas.result import read_study

    return read_study(path.parent)


def _recipe(path: Path) -> object:
    from convscale.learn.recipes import get_recipe

    return get_recipe(path)


def _workload(path: Path) -> object:
    from convscale.predictor.workload_file import read_workload

    return read_workload(path)


def _calibration(path: Path) -> object:
    from convscale.predictor.calibration import load_calibration

    return load_calibration(path)


def _records(path: Path) -> object:
    from convscale.speed.records import read_records

    return read_records(path)


def _table(path: Path) -> object:
    from convscale.conditions import Conditions
    from convscale.machine import Environment
    from convscale.speed.records import read_timm_csv

    return read_timm_csv(path, conditions=Conditions(), environment=Environment(device_name="x", cores=1))


def _fit(path: Path) -> object:
    from convscale.show.fit_record import read_fit

    return read_fit(path.parent)


def _log(path: Path) -> object:
    from convscale.learn.record import read_train_run

    (path.parent / "recipe.yaml").write_text("name: x\n")
    return read_train_run(path.parent)


def _manifest(path: Path) -> object:
    from convscale.images.manifest import open_manifest
    from convscale.images.walk import Tally

    for name in ("a.png", "b.png"):
        (path.parent / name).touch()
    return open_manifest(path, channels=3, max_pixels=10**6, tally=Tally(), notes=[])


def _rows(path: Path) -> object:
    from convscale.ship.rows import rows_in

    form = "csv" if path.suffix == ".csv" else "jsonl"
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(rows_in(file, form, "path,class,probability,error\n", path))


def _small_picture(path: Path) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 20)).save(path)


def _coco(path: Path) -> object:
    from convscale.detect.data import open_boxes

    _small_picture(path.parent / "a.png")
    return open_boxes(path)


def _yolo(data: bytes, place: Path) -> object:
    from convscale.detect.data import open_boxes

    _small_picture(place / "images" / "a.png")
    (place / "labels").mkdir()
    (place / "labels" / "a.txt").write_bytes(data)
    (place / "classes.txt").write_text("cat\ndog\n")
    return open_boxes(place)


def _yolo_yaml(path: Path) -> object:
    from convscale.detect.data import open_boxes

    _small_picture(path.parent / "images" / "a.png")
    return open_boxes(path)


def _voc(data: bytes, place: Path) -> object:
    from convscale.detect.data import open_boxes

    _small_picture(place / "JPEGImages" / "a.png")
    (place / "Annotations").mkdir()
    (place / "Annotations" / "a.xml").write_bytes(data)
    return open_boxes(place)


def _detector(data: bytes, _place: Path) -> object:
    from convscale.nn.detectors import DetectorSpec
    from convscale.read import json_of

    return DetectorSpec.from_dict(json_of(data, "a detector"))


def _box_rows(path: Path) -> object:
    from convscale.ship.box_outputs import write_coco_results

    return write_coco_results(path, path.parent / "results.json", ("cat", "dog"))


def _kept(data: bytes, _place: Path) -> object:
    from convscale import cache as kept

    with suppress(kept.zlib.error):
        return kept.json_of(kept._unpacked(data), "a kept result")  # pyright: ignore[reportPrivateUsage]
    return None


# ---------------------------------------------------------------- pictures


def _picture(data: bytes, place: Path) -> object:
    from convscale.images.decode import check_image, decode_image, parse_header

    parse_header(data)
    (place / "x").write_bytes(data)
    check_image(place / "x", max_pixels=1_000_000)
    for channels in (3, 1):
        decode_image(bytearray(data), channels=channels, max_pixels=1_000_000)
    return decode_image(bytearray(data), max_pixels=1_000_000, min_side=8, rows=9)


def _idx(path: Path) -> object:
    from convscale.images.idx import read_idx

    return read_idx(path)


# ---------------------------------------------------------------- weights, checkpoints, artefacts


def _tensors(path: Path) -> object:
    from safetensors.torch import load_file

    from convscale.read import check_tensors

    check_tensors(path, "weights")
    return load_file(path)  # what was checked, the library takes


def _weights(path: Path) -> object:
    from torch import nn

    from convscale.nn.weights import load_weights

    return load_weights(nn.Linear(2, 3), path)


@cache
def _whole() -> Path:
    """A run's folder with a checkpoint and its training state, of a network that anybody builds."""
    import torch

    from convscale.arch.scaling import scale
    from convscale.arch.zoo import get_spec
    from convscale.images.preprocess import Preprocessing
    from convscale.learn.checkpoint import save_checkpoint
    from convscale.nn.net import create_model

    place = Path(tempfile.mkdtemp(prefix="fuzz-whole-"))
    torch.manual_seed(0)
    net = create_model(scale(get_spec("resnet18"), depth=0.1, width=0.02, image_size=32), num_classes=2)
    preprocessing = Preprocessing(image_size=32, mean=(0.5,) * 3, std=(0.25,) * 3)
    state = {"step": 1, "optimizer": {"lr": 0.1, "momentum": [torch.zeros(2)]}, "history": [{"epoch": 1}]}
    target = place / "checkpoints" / "step-00000001"
    save_checkpoint(target, net, classes=("a", "b"), preprocessing=preprocessing, state=state)
    return place


def _forged_checkpoint(name: str, read: Callable[[Path], object]) -> Read:
    """A whole checkpoint in which one file is the bytes, its checksum right."""

    def from_bytes(data: bytes, place: Path) -> object:
        run = place / "run"
        shutil.copytree(_whole(), run)
        checkpoint = run / "checkpoints" / "step-00000001"
        (checkpoint / name).write_bytes(data)
        names = sorted(path.name for path in checkpoint.iterdir() if path.name != "SHA256SUMS")
        sums = [f"{hashlib.sha256((checkpoint / each).read_bytes()).hexdigest()}  {each}\n" for each in names]
        if name != "SHA256SUMS":
            (checkpoint / "SHA256SUMS").write_text("".join(sums))
        return read(run)

    return from_bytes


def _checkpoint(run: Path) -> object:
    from convscale.learn.checkpoint import load_checkpoint

    return load_checkpoint(run)


def _state(run: Path) -> object:
    from convscale.learn.checkpoint import load_state

    return load_state(run)


ARTIFACT = {
    "schema": 1,
    "format": "onnx",
    "precision": "fp32",
    "baked": False,
    "runtime": {"name": "onnxruntime"},
    "num_classes": 2,
    "model": "x",
}
"""An artefact's record but for its files."""
PREPROCESSING = {"image_size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


def _forged_artifact(name: str) -> Read:
    """An artefact without a network in which one file is the bytes, its checksum right; all but the network is read."""

    def from_bytes(data: bytes, place: Path) -> object:
        from convscale.artifact.artifact import load_artifact

        parts = {
            "classes.json": b'["a", "b"]',
            "preprocessing.json": json.dumps(PREPROCESSING).encode(),
            "model.onnx": b"\x3a\x00",
        }
        parts |= {name: data} if name != "artifact.json" else {}
        files = {}
        for each, content in parts.items():
            (place / each).write_bytes(content)
            files[each] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        record = data
        if name != "artifact.json":
            record = json.dumps({**ARTIFACT, "files": files}).encode()
        else:
            with suppress(ValueError, RecursionError):
                value = json.loads(data)
                if isinstance(value, dict) and value.get("files") == "right":
                    record = json.dumps({**value, "files": files}).encode()
        (place / "artifact.json").write_bytes(record)
        return load_artifact(place)

    return from_bytes


def _labelled(name: str, file: str, others: dict[str, bytes]) -> Read:
    """A public set with several labels, one of whose files holds these bytes."""

    def from_bytes(data: bytes, place: Path) -> object:
        from convscale.images.labelled import open_labelled

        for each, content in {**others, file: data}.items():
            (place / each).parent.mkdir(parents=True, exist_ok=True)
            (place / each).write_bytes(content)
        return open_labelled(name, place, channels=3, max_pixels=10**6, notes=[])

    return from_bytes


def _head(path: Path) -> object:
    from convscale.artifact.features import read_head

    return read_head(path.parent, 2)


def _onnx(path: Path) -> object:
    from convscale.artifact.checks import check_onnx

    return check_onnx(path, {"weights.bin"})


def _program(path: Path) -> object:
    from convscale.runtimes.pytorch.program import check_program

    return check_program(path)


def _graph(data: bytes, place: Path) -> object:
    """The graph of a program, packed as it is."""
    import zipfile

    with zipfile.ZipFile(place / "model.pt2", "w") as archive:
        archive.writestr("model/models/model.json", data)
    return _program(place / "model.pt2")


def _infer(data: bytes, place: Path) -> object:
    """A request for inference: the first byte says how long its JSON is, or that all of it is."""
    from convscale.serve.protocol import Takes, read_request

    del place
    takes = Takes(name="m", version="1", platform="onnx", image=(2, 2, 1), classes=("a", "b"), most_images=4)
    length = None if not data or data[0] == 0 else str(data[0] - 1)
    return read_request(data[1:], length, takes)


def _reference(data: bytes, place: Path) -> object:
    """Reference images beside an artefact."""
    from dataclasses import replace

    from convscale.artifact.artifact import load_artifact
    from convscale.artifact.reference import ANSWERS, IMAGES, read_reference

    old = ROOT / "tests" / "old_files" / "v0_1" / "artefacts" / "onnx_fp32"
    artifact = load_artifact(old)
    artifact.folder = place
    artifact.manifest = replace(artifact.manifest, files={IMAGES: {}, ANSWERS: {}})
    (place / IMAGES).write_bytes(data)
    (place / ANSWERS).write_text(json.dumps({"probabilities": [[0.1] * 10]}))
    return read_reference(artifact)


def _predictions(path: Path) -> object:
    from convscale.show.predictions import read_predictions

    return read_predictions(path)


_VOC = {f"JPEGImages/{name}.jpg": b"" for name in ("a", "b")}
_NUS = {f"Flickr/{name}.jpg": b"" for name in ("a", "b")} | {
    f"ImageList/{part}Imagelist.txt": b"a.jpg\nb.jpg\n" for part in ("Train", "Test")
}
_NUS |= {f"TrainTestLabels/Labels_sky_{part}.txt": b"0\n1\n" for part in ("Train", "Test")}
_OPEN = {"train/a.jpg": b"", "train/b.jpg": b""}

READERS = (
    Reader(name="json", read=_json, text=True),
    Reader(name="json-lines", read=_file("x.jsonl", _lines), text=True),
    Reader(name="yaml", read=_file("x.yaml", _yaml), text=True),
    Reader(name="spec-json", read=_file("x.json", _spec), text=True),
    Reader(name="spec-yaml", read=_file("x.yaml", _spec), text=True),
    Reader(name="space-json", read=_file("x.json", _space), text=True),
    Reader(name="rule-yaml", read=_file("x.yaml", _rule), text=True),
    Reader(name="study", read=_file("study.json", _study), text=True),
    Reader(name="recipe-json", read=_file("x.json", _recipe), text=True),
    Reader(name="recipe-yaml", read=_file("x.yaml", _recipe), text=True),
    Reader(name="calibration", read=_file("x.json", _calibration), text=True),
    Reader(name="workload", read=_file("x.workload.json", _workload), text=True),
    Reader(name="records", read=_file("x.jsonl", _records), text=True),
    Reader(name="timm-table", read=_file("x.csv", _table)),
    Reader(name="fit", read=_file("fit.json", _fit), text=True),
    Reader(name="log", read=_file("log.jsonl", _log), text=True),
    Reader(name="manifest-csv", read=_file("x.csv", _manifest)),
    Reader(name="manifest-json", read=_file("x.jsonl", _manifest), text=True),
    Reader(
        name="labelled-coco",
        read=_labelled(
            "coco", "annotations/instances_train2017.json", {"train2017/a.jpg": b"", "train2017/b.jpg": b""}
        ),
        text=True,
    ),
    Reader(name="labelled-voc", read=_labelled("voc", "ImageSets/Main/cat_train.txt", _VOC)),
    Reader(name="labelled-nus-wide", read=_labelled("nus-wide", "ImageList/TrainImagelist.txt", _NUS)),
    Reader(
        name="labelled-open-images", read=_labelled("open-images", "train-annotations-human-imagelabels.csv", _OPEN)
    ),
    Reader(name="artifact-head", read=_file("classifier.safetensors", _head)),
    Reader(name="rows-csv", read=_file("x.csv", _rows)),
    Reader(name="rows-json", read=_file("x.jsonl", _rows), text=True),
    Reader(name="coco", read=_file("x.json", _coco), text=True),
    Reader(name="yolo", read=_yolo),
    Reader(name="yolo-yaml", read=_file("data.yaml", _yolo_yaml)),
    Reader(name="voc", read=_voc),
    Reader(name="detector", read=_detector, text=True),
    Reader(name="box-rows", read=_file("x.jsonl", _box_rows), text=True),
    Reader(name="kept", read=_kept),
    Reader(name="picture", read=_picture),
    Reader(name="idx", read=_file("x", _idx)),
    Reader(name="idx-gz", read=_file("x.gz", _idx)),
    Reader(name="tensors", read=_file("x.safetensors", _tensors)),
    Reader(name="weights-safetensors", read=_file("x.safetensors", _weights)),
    Reader(name="weights-pth", read=_file("x.pth", _weights)),
    Reader(name="checkpoint", read=_forged_checkpoint("checkpoint.json", _checkpoint), text=True),
    Reader(name="checkpoint-sums", read=_forged_checkpoint("SHA256SUMS", _checkpoint)),
    Reader(name="state", read=_forged_checkpoint("state.json", _state), text=True),
    Reader(name="artifact", read=_forged_artifact("artifact.json"), text=True),
    Reader(name="artifact-classes", read=_forged_artifact("classes.json"), text=True),
    Reader(name="artifact-preprocessing", read=_forged_artifact("preprocessing.json"), text=True),
    Reader(name="artifact-reference", read=_reference),
    Reader(name="infer", read=_infer),
    Reader(name="predictions", read=_file("x.json", _predictions), text=True),
    Reader(name="onnx", read=_file("model.onnx", _onnx)),
    Reader(name="program", read=_file("model.pt2", _program)),
    Reader(name="program-graph", read=_graph, text=True),
)


# ---------------------------------------------------------------- atheris


@dataclass(kw_only=True)
class Counts:
    """Of one reader."""

    tried: int = 0
    results: int = 0
    refused: int = 0
    unlike: int = 0


def _fuzz(reader: Reader, options: argparse.Namespace) -> None:
    """Never returns: atheris ends the process. What is counted goes to ``--counts`` meanwhile."""
    atheris = importlib.import_module("atheris")  # not installed everywhere, and without types
    sys.path.insert(0, str(ROOT))
    with atheris.instrument_imports(include=["convscale"]):
        import convscale.read

        with tempfile.TemporaryDirectory() as warm, suppress(Exception):  # imports what it reads with
            for seed in reader.seeds:
                reader.read(seed.read_bytes(), Path(warm))
    assert convscale.read
    counts, messages, told = Counts(), set[str](), 0.0
    base = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))

    def tell() -> None:
        options.counts.write_text(json.dumps({**vars(counts), "messages": len(messages)}))

    def one(data: bytes) -> None:
        nonlocal told
        place = base / "x"
        place.mkdir()
        counts.tried += 1
        try:
            with redirect_stderr(io.StringIO()):
                said = outcome(reader, data, place)
            counts.refused += bool(said)
            counts.results += not said
            messages.add(re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "", said)[:80])
        except Exception as error:
            counts.unlike += 1
            options.found.mkdir(parents=True, exist_ok=True)
            name = f"{reader.name}-{type(error).__name__}-{hashlib.sha256(data).hexdigest()[:8]}"
            (options.found / name).write_bytes(data)
        finally:
            shutil.rmtree(place, ignore_errors=True)
        if time.monotonic() - told > 0.5:
            tell()
            told = time.monotonic()

    words = [sys.argv[0], f"-max_total_time={options.seconds:.0f}", f"-timeout={LIMIT_S}", f"-rss_limit_mb={LIMIT_MB}"]
    words += [f"-max_len={MOST_BYTES}", "-print_final_stats=0", "-verbosity=0", f"-seed={options.seed}"]
    words += [f"-artifact_prefix={options.found}/{reader.name}-", str(options.inputs), str(CORPUS / reader.name)]
    options.found.mkdir(parents=True, exist_ok=True)
    atheris.Setup(words, one)
    atheris.Fuzz()


def _run(reader: Reader, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """One reader in a process of its own. Returns its row."""
    with tempfile.TemporaryDirectory() as place:
        counts, inputs = Path(place) / "counts", Path(place) / "inputs"
        inputs.mkdir()
        words = [sys.executable, __file__, "--one", reader.name, "--seconds", str(seconds), "--counts", str(counts)]
        words += ["--inputs", str(inputs), "--found", str(options.found), "--seed", str(options.seed)]
        begun = time.perf_counter()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, check=False)
        spent = time.perf_counter() - begun
        found: dict[str, Any] = (
            json.loads(counts.read_text()) if counts.is_file() else {**vars(Counts()), "messages": 0}
        )
        reached = len(list(inputs.iterdir()))
        if options.keep_inputs is not None:
            shutil.copytree(inputs, options.keep_inputs / reader.name, dirs_exist_ok=True)
    if ended.returncode != 0:  # a hang, too much memory, a crash
        found["unlike"] += 1
        print(ended.stderr.decode(errors="replace")[-2000:], file=sys.stderr)
    return {
        "benchmark": "fuzz", "reader": reader.name, "seconds": round(spent, 1), **found, "new_inputs": reached,
        "corpus": len(reader.seeds), "seed": options.seed,
    }  # fmt: skip


def _merge(reader: Reader, folder: Path) -> None:
    """The shortest inputs of a folder that say something new, into the corpus: up to a number, and no long ones."""
    sys.path.insert(0, str(ROOT))
    said: dict[str, Path] = {}
    with tempfile.TemporaryDirectory() as name:
        for path in [*reader.seeds, *sorted(folder.iterdir(), key=lambda each: each.stat().st_size)]:
            place = Path(name) / "x"
            place.mkdir()
            answer = outcome(reader, path.read_bytes(), place)
            shutil.rmtree(place)
            said.setdefault(re.sub(r"'[^']*'|\"[^\"]*\"|\d+|[^ -~]", "", answer)[:60], path)
    for path in list(said.values())[: max(0, MOST_KEPT - len(reader.seeds))]:
        if path.parent == folder and path.stat().st_size <= 2048:
            shutil.copy(path, CORPUS / reader.name / hashlib.sha256(path.read_bytes()).hexdigest()[:10])


def _write_total(path: Path, about: dict[str, str]) -> None:
    """A row with the sums of all readers' rows, those of earlier calls too."""
    from benchmarks.records import replace_record

    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["reader"] != "all"]
    sums = {key: sum(row[key] for row in rows) for key in ("tried", "results", "refused", "unlike")}
    total = {"benchmark": "fuzz", "reader": "all", "readers": len(rows), **sums}
    total["minutes"] = round(sum(row["seconds"] for row in rows) / 60, 1)
    replace_record(path, {**total, **about}, ("benchmark", "reader"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="for all readers together")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="readers whose name matches")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--found", type=Path, default=Path("build/fuzz"), help="where inputs that fail are kept")
    parser.add_argument("--keep-inputs", type=Path, help="where inputs that reach new code are kept")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "fuzz.jsonl")
    parser.add_argument("--merge", nargs=2, metavar=("NAME", "DIR"), help="take inputs into the corpus")
    for hidden, kind in (("--one", str), ("--seconds", float), ("--counts", Path), ("--inputs", Path)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    by_name = {reader.name: reader for reader in READERS}
    options.found = options.found.resolve()
    if options.merge:
        _merge(by_name[options.merge[0]], Path(options.merge[1]))
        return 0
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed here (it has wheels for Linux): nothing is fuzzed")
        return 0
    if options.one:
        _fuzz(by_name[options.one], options)
    wanted = [reader for reader in READERS if fnmatch.fnmatch(reader.name, options.only)]
    if not wanted:
        raise SystemExit(f"no reader matches {options.only!r}; known: {', '.join(by_name)}")
    sys.path.insert(0, str(ROOT))
    from benchmarks.records import machine, replace_record
    from convscale import __version__

    rows: list[dict[str, Any]] = []
    about = {"convscale": __version__, "python": sys.version.split()[0], "machine": machine()}
    for reader in wanted:
        row = _run(reader, options, max(1.0, 60 * options.minutes / len(wanted)))
        replace_record(options.output, {**row, **about}, ("benchmark", "reader"))
        rows.append(row)
        print(
            f"{reader.name:24} {row['tried']:>9,} tried, {row['results']:>8,} results, {row['refused']:>8,} refused, "
            f"{row['unlike']} unlike, {row['seconds']:.0f} s",
            flush=True,
        )
    _write_total(options.output, about)
    unlike = sum(row["unlike"] for row in rows)
    print(f"{unlike} unlike outcomes{f', kept in {options.found}' if unlike else ''}")
    return 1 if unlike else 0


if __name__ == "__main__":
    sys.exit(main())
