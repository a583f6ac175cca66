"""What accidents share: small pictures, a network that was trained on them for a moment, its artefact."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.accidents.play import LIMIT_S, Play, environment, forked
from convscale.files import sha256

SIDE = 32
EACH = {"train": 8, "val": 3, "test": 3}
"""Pictures of a class in a split."""
CLASSES = ("cat", "dog")


def picture(seed: int, *, bright: bool = False, size: tuple[int, int] = (24, 28)) -> Image.Image:
    """Noise, no two alike; dark or bright."""
    random = np.random.default_rng(seed)
    low = 110 if bright else 10
    return Image.fromarray(random.integers(low, low + 120, (*size, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """A picture's bytes."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def fill(folder: Path, count: int, seed: int, *, bright: bool = False) -> None:
    """PNG files in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture(1000 * seed + number, bright=bright).save(folder / f"{number:02d}.png")


def classes_in(folder: Path, count: int = 8, *, seed: int = 0, names: tuple[str, ...] = CLASSES) -> Path:
    """Two class folders."""
    for at, name in enumerate(names):
        fill(folder / name, count, 10 * seed + at, bright=bool(at))
    return folder


def splits_in(folder: Path) -> Path:
    """Train, val and test folders."""
    for number, (split, count) in enumerate(EACH.items(), 1):
        classes_in(folder / split, count, seed=number)
    return folder


class Stage:
    """Made when first asked for, and kept in ``place``."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.made = place / "shared"
        self.made.mkdir(parents=True, exist_ok=True)

    def _run(self, *words: str | Path) -> None:
        """A command that must end well."""
        place = self.made / "talk"
        place.mkdir(exist_ok=True)
        seen = forked(words, place)
        if seen.code != 0:
            raise SystemExit(f"{' '.join(map(str, words))} ended with {seen.code}:\n{seen.err[-2000:]}")

    @cached_property
    def data(self) -> Path:
        """Two classes in three splits."""
        place = self.made / "data"
        return place if place.is_dir() else splits_in(place)

    @cached_property
    def spec(self) -> Path:
        """A network of some thousand parameters."""
        place = self.made / "small.yaml"
        if not place.is_file():
            options = ("--depth", "0.1", "--width", "0.1", "--img-size", str(SIDE))
            self._run("scale", "resnet18", *options, "--output", place)
        return place

    def training(self, output: Path, *more: str | Path, data: Path | None = None) -> tuple[str | Path, ...]:
        """The words of a short training."""
        options = ("--epochs", "1", "-b", "4", "-j", "0", "--img-size", str(SIDE), "--set", "augment=none")
        # Else they are measured, and one run is not another's.
        options += ("--set", "precision=fp32", "--set", "layout=nchw")
        return ("train", "--model", self.spec, "--data-dir", data or self.data, "--output", output, *options, *more)

    @cached_property
    def run(self) -> Path:
        """A training's folder."""
        place = self.made / "run"
        if not (place / "log.jsonl").is_file():
            shutil.rmtree(place, ignore_errors=True)
            self._run(*self.training(place))
        return place

    @cached_property
    def artifact(self) -> Path:
        """What was exported from it, in ONNX's format."""
        return self._exported("onnx")

    @cached_property
    def program(self) -> Path:
        """The same in torch's format."""
        return self._exported("torch")

    def _exported(self, format: str) -> Path:
        place = self.made / f"artifact-{format}"
        if not place.is_dir():
            self._run("export", self.run, "--format", format, "--output", place)
        return place

    @cached_property
    def records(self) -> Path:
        """A file with one measurement."""
        place = self.made / "records.jsonl"
        if not place.is_file():
            words = ("measure", self.spec, "--runtime", "eager", "-b", "1", "--seconds", "0.01", "--record", place)
            self._run(*words)
        return place

    @cached_property
    def calibration(self) -> Path:
        """A calibration of the processor, by that measurement."""
        place = self.made / "calibration.json"
        if not place.is_file():
            self._run("calibrate", "--measurement", self.records, "--output", place)
        return place

    def copy(self, what: Path, play: Play, name: str = "copy") -> Path:
        """A copy of a folder or file in an accident's own folder."""
        target = play.here / name
        shutil.copytree(what, target) if what.is_dir() else shutil.copy(what, target)
        return target


def checkpoint_of(run: Path) -> Path:
    """The best checkpoint's folder of a training."""
    from convscale.learn.checkpoint import list_checkpoints

    return list_checkpoints(run, ("best", "step"))[0]


def resum(checkpoint: Path) -> None:
    """Write a checkpoint's checksums anew, as whoever forges one would."""
    names = sorted(path.name for path in checkpoint.iterdir() if path.name != "SHA256SUMS")
    (checkpoint / "SHA256SUMS").write_text("".join(f"{sha256(checkpoint / name)}  {name}\n" for name in names))


def reseal(artifact: Path, changes: dict[str, Any] | None = None) -> None:
    """Write an artefact's checksums anew, and other parts of its record."""
    path = artifact / "artifact.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    for name in record["files"]:
        if (artifact / name).is_file():
            record["files"][name] = {"sha256": sha256(artifact / name), "bytes": (artifact / name).stat().st_size}
    path.write_text(json.dumps({**record, **(changes or {})}), encoding="utf-8")


def mount(place: Path, *, size: str = "1m", read_only: bool = False) -> bool:
    """A small disk at ``place``; False where this user may not mount."""
    place.mkdir(parents=True, exist_ok=True)
    options = f"size={size}" + (",ro" if read_only else "")
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    return subprocess.run(command, stderr=subprocess.DEVNULL, env=environment(), check=False).returncode == 0


def bind_read_only(place: Path) -> bool:
    """Make a folder read-only, for root too; False where this user may not."""
    steps = (["mount", "--bind", str(place), str(place)], ["mount", "-o", "remount,bind,ro", str(place)])
    done = [subprocess.run(step, stderr=subprocess.DEVNULL, check=False).returncode == 0 for step in steps]
    if not all(done):
        unmount(place)
    return all(done)


def unmount(place: Path) -> None:
    """Take it away."""
    # os.path.ismount does not see a folder that is bound to itself
    subprocess.run(["umount", "-l", str(place)], check=False, stderr=subprocess.DEVNULL)


def until(holds: Callable[[], object], seconds: float = LIMIT_S) -> bool:
    """Wait until a call says yes; False after so long."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        if holds():
            return True
        time.sleep(0.005)
    return False


def log_of(run: Path) -> list[dict[str, Any]]:
    """The epochs in a training's log."""
    path = run / "log.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def long_training(play: Play, run: Path, epochs: int = 400, *more: str) -> tuple[str | Path, ...]:
    """The words of a training that saves after every step."""
    words = play.stage.training(run, "--checkpoint-seconds", "0", *more)
    at = words.index("--epochs")
    return (*words[: at + 1], str(epochs), *words[at + 2 :])


def saved(run: Path) -> bool:
    """Whether a training has saved a state."""
    return any((run / "checkpoints").glob("step-*/SHA256SUMS"))
