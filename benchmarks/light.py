"""What it takes to run an artefact: the size of the plain install, and the time and memory of a fresh process.

    python -m benchmarks.light [--model mobilenetv2_100] [--rounds 25] [--json] [--output results/light.jsonl]

A virtual environment is made under a temporary folder, and convscale is installed there from this repository without
any extra. Then fresh processes run in turns: one opens the artefact's ONNX file in ONNX Runtime and runs it once on
zeros, the next opens the artefact with convscale (checksums and all) and runs it once on zeros, the last classifies a
500 x 375 px JPEG from its file instead, which needs a decoder (Pillow) too.
The first turn is left out: it reads the libraries from the disk. The weights are random: times do not depend on them.

The exit code is 1 where a bound is broken: 250 MB installed, no torch, 1.3 times bare ONNX Runtime's time (medians),
150 MB of memory (the largest peak of resident memory).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.records import replace_record
from benchmarks.ship_gate import photographs
from convscale.artifact.artifact import Artifact
from convscale.errors import EXTRAS
from convscale.machine import Environment
from convscale.nn.net import create_model
from convscale.ship.export import export

ROOT = Path(__file__).parent.parent
MOST_MB, MOST_RATIO, MOST_MEMORY_MB = 250, 1.3, 150

BARE = """
import sys
import numpy as np
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx", providers=["CPUExecutionProvider"])
inputs = session.get_inputs()[0]
print(session.run(None, {inputs.name: np.zeros((1, *inputs.shape[1:]), np.float32)})[0].argmax())
"""
LOADED = """
import sys
import numpy as np
import convscale as cs
artifact = cs.load_artifact(sys.argv[1])
taken = artifact.preprocessing
print(artifact(np.zeros((1, taken.height, taken.width, taken.channels), np.uint8))[0].argmax())
"""
CLASSIFIED = """
import sys
import convscale as cs
(answer,) = cs.load_artifact(sys.argv[1]).classify(sys.argv[2], top=1)
print(answer.labels[0])
"""
PEAK = """
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
"""The peak in KiB, as Linux tells the process itself: what it tells a parent counts the parent's own memory, which a
child shares until it runs its program."""
SIZES = """
import importlib.metadata, importlib.util, json, sys
sizes = {}
for one in importlib.metadata.distributions():
    files = [file.locate() for file in one.files or ()]
    sizes[one.name] = sum(file.stat().st_size for file in files if file.is_file())
found = [name for name in json.loads(sys.argv[1]) if importlib.util.find_spec(name)]
print(json.dumps({"sizes": sizes, "found": found}))
"""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A fresh process."""

    seconds: float
    """From its start to its end."""
    cpu_seconds: float
    """Of processor time, in the process and the system."""
    peak_mb: float
    """Its largest resident memory, in 10**6 bytes."""
    said: str
    """What it printed before."""


def install(place: Path) -> Path:
    """A virtual environment with the plain install of this repository. Returns its Python."""
    source, environment = place / "source", place / "venv"
    shutil.copytree(ROOT / "convscale", source / "convscale", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-warn-script-location"]
    subprocess.run([*command, "--constraint", str(ROOT / "constraints.txt"), str(source)], check=True)
    return python


def run(command: Sequence[str]) -> Run:
    """Run a command and wait for its end."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_environment())
    assert child.stdout is not None, "it was asked for"
    with child.stdout:
        said = child.stdout.read()
    _, status, used = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command[:2])} ... ended with {child.returncode}")
    answer, _, peak = said.strip().rpartition("\n")
    return Run(seconds=seconds, cpu_seconds=used.ru_utime + used.ru_stime, peak_mb=int(peak) * 1024 / 1e6, said=answer)


def _environment() -> dict[str, str]:
    """This process's, without what leads to this checkout."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def sizes(python: Path) -> tuple[dict[str, float], float, list[str]]:
    """Of each package its MB, of all that is installed the MB, and which libraries of the extras are there."""
    libraries = [library for names in EXTRAS.values() for library in names]
    told = json.loads(subprocess.check_output([str(python), "-I", "-c", SIZES, json.dumps(libraries)], text=True))
    (packages,) = (python.parent.parent / "lib").glob("*/site-packages")
    total = sum(file.stat().st_size for file in packages.rglob("*") if file.is_file() and not file.is_symlink())
    return {name: size / 1e6 for name, size in told["sizes"].items()}, total / 1e6, told["found"]


def artefact(name: str, place: Path) -> tuple[Artifact, Path]:
    """A network as an ONNX artefact, and a picture."""
    art = export(create_model(name).eval(), place / "artifact", format="onnx")
    picture = place / "picture.jpg"
    (crop,) = photographs(1, 300)
    Image.fromarray(crop).resize((500, 375), Image.Resampling.BICUBIC).save(picture, quality=90)
    return art, picture


@dataclass(frozen=True, kw_only=True)
class Record:
    """What was found, as it is kept."""

    schema: int = 1
    model: str
    """The network's name."""
    model_mb: float
    """Of its ONNX file; MB are 10**6 bytes here."""
    installed_mb: float
    """All files of the environment's packages."""
    packages_mb: dict[str, float]
    """Of each package."""
    libraries_of_extras: list[str]
    """Those that came along; there should be none."""
    seconds: dict[str, list[float]]
    """Of each contender's processes, from start to end."""
    cpu_seconds: dict[str, list[float]]
    """Processor time of the same."""
    peak_mb: dict[str, float]
    """The largest of their peaks of resident memory."""
    time_ratio: float
    """convscale's median over ONNX Runtime's."""
    cpu_ratio: float
    """The same of processor time, which other work on the machine disturbs less."""
    classify_ratio: float
    """The median of classifying a JPEG over ONNX Runtime's, which reads none."""
    environment: dict[str, object]

    def broken(self) -> list[str]:
        """The bounds that do not hold, each in a line."""
        ratio, peak = self.time_ratio, self.peak_mb["classify"]
        lines = {
            f"{self.installed_mb:.0f} MB installed, more than {MOST_MB}": self.installed_mb > MOST_MB,
            f"installed with it: {', '.join(self.libraries_of_extras)}": bool(self.libraries_of_extras),
            f"{ratio:.2f} times ONNX Runtime's time, more than {MOST_RATIO}": ratio > MOST_RATIO,
            f"{peak:.0f} MB of memory, more than {MOST_MEMORY_MB}": peak > MOST_MEMORY_MB,
        }
        return [line for line, wrong in lines.items() if wrong]

    def __str__(self) -> str:
        """For people."""
        lines = [f"installed: {self.installed_mb:.1f} MB, libraries of extras: {self.libraries_of_extras or 'none'}"]
        lines += [f"  {name:20s} {size:6.1f} MB" for name, size in self.packages_mb.items()]
        lines.append(f"{self.model}, {self.model_mb:.1f} MB, in fresh processes:")
        for label, seconds in self.seconds.items():
            low, middle, high = np.percentile(seconds, (25, 50, 75))
            cpu = np.median(self.cpu_seconds[label])
            lines.append(
                f"  {label:12s} {middle:.3f} s (half of {len(seconds)} in {low:.3f} to {high:.3f}), processor time "
                f"{cpu:.3f} s, peak {self.peak_mb[label]:.0f} MB"
            )
        lines.append(
            f"convscale / onnxruntime: {self.time_ratio:.2f} (processor time {self.cpu_ratio:.2f}); classify: "
            f"{self.classify_ratio:.2f}"
        )
        return "\n".join(lines)


def compare(name: str, rounds: int) -> Record:
    """All of it."""
    with tempfile.TemporaryDirectory(prefix="convscale-light-") as folder:
        art, picture = artefact(name, Path(folder))
        python = install(Path(folder))
        by_package, installed, found = sizes(python)
        commands = {
            "onnxruntime": [str(python), "-c", BARE + PEAK, str(art.folder)],
            "convscale": [str(python), "-c", LOADED + PEAK, str(art.folder)],
            "classify": [str(python), "-c", CLASSIFIED + PEAK, str(art.folder), str(picture)],
        }
        runs: dict[str, list[Run]] = {label: [] for label in commands}
        for turn in range(rounds + 1):
            for label, command in commands.items():
                one = run(command)
                if turn:
                    runs[label].append(one)
        (answer,) = art.classify(picture, top=1)
        said = {one.said for one in runs["classify"]}
        assert said == {answer.labels[0]}, f"the plain install says {said}, this environment {answer.labels[0]}"
        model_mb = art.model_path.stat().st_size / 1e6
    seconds = {label: [round(one.seconds, 4) for one in many] for label, many in runs.items()}
    cpu = {label: [round(one.cpu_seconds, 4) for one in many] for label, many in runs.items()}
    return Record(
        model=name,
        model_mb=round(model_mb, 2),
        installed_mb=round(installed, 1),
        packages_mb={name: round(size, 1) for name, size in sorted(by_package.items(), key=lambda item: -item[1])},
        libraries_of_extras=found,
        seconds=seconds,
        cpu_seconds=cpu,
        peak_mb={label: round(max(one.peak_mb for one in many), 1) for label, many in runs.items()},
        time_ratio=_ratio(seconds),
        cpu_ratio=_ratio(cpu),
        classify_ratio=_ratio(seconds, "classify"),
        environment=dataclasses.asdict(Environment.here()),
    )


def _ratio(times: dict[str, list[float]], label: str = "convscale") -> float:
    return round(float(np.median(times[label]) / np.median(times["onnxruntime"])), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilenetv2_100")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("results/light.jsonl"))
    args = parser.parse_args()
    record = compare(args.model, args.rounds)
    replace_record(args.output, dataclasses.asdict(record), ("model",))
    print(json.dumps(dataclasses.asdict(record)) if args.json else record)
    for line in record.broken():
        print(f"broken: {line}", file=sys.stderr)
    sys.exit(bool(record.broken()))


if __name__ == "__main__":
    main()
