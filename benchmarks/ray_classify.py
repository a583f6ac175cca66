"""``classify --engine ray`` beside the usual ``classify``: how fast, and what killing its actors and its driver costs.

    python -m benchmarks.ray_classify [--model mobilenetv2_100] [--files 20000] [--rounds 3] [--kills 10]
        [--only throughput kills] [--output results/ray_classify.jsonl]

JPEG files are made on the spot (smooth noise, 256 x 192 px); the network has random weights and is exported to ONNX,
float32. Both commands run whole, start included, in turns, with the same number of threads in all: Ray's two actors
share them. Kills: an actor or the driver, drawn at random after one to six further parts, again and again, each time
resumed; the rows must be those of a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.records import machine, replace_record
from convscale.machine import available_cores, busy

PARTS = ("throughput", "kills")
KEYS = ("benchmark", "model", "part", "machine")


def pictures(folder: Path, count: int) -> Path:
    """Files that differ from each other."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((256, 192), Image.Resampling.BICUBIC).save(
            folder / f"{number:06d}.jpg", quality=85
        )
    return folder


def exported(model: str, folder: Path) -> Path:
    """An artefact with random weights."""
    from convscale.networks.names import network_of
    from convscale.ship.export import export

    export(network_of(model), folder, image_size=128)
    return folder


def command(photos: Path, artifact: Path, output: Path, *more: str) -> list[str]:
    """The command line."""
    head = [sys.executable, "-m", "convscale", "classify", str(photos), "--model", str(artifact)]
    return [*head, "--output", str(output), "--top", "1", *more]


RAY = ("--engine", "ray", "--actors", "2", "--shard-size")
QUIET = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


def run(arguments: Sequence[str]) -> float:
    """Seconds of a command that must end well."""
    began = time.perf_counter()
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env={**os.environ, **QUIET})
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return time.perf_counter() - began


def rows_in(output: Path) -> list[str]:
    """Names and labels, in order: a probability's last digit depends on the batch."""
    files = sorted(output.glob("part-*")) if output.is_dir() else [output]
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [f"{row['path']} {row['classes'][0]['class']}" for row in rows]


def throughput(photos: Path, artifact: Path, place: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Files a second of both, start and end included."""
    seconds: dict[str, list[float]] = {"local": [], "ray": []}
    same: list[bool] = []
    for _ in range(args.rounds):
        local, ray = place / "rows.jsonl", place / "rows"
        seconds["local"].append(run(command(photos, artifact, local)))
        seconds["ray"].append(run(command(photos, artifact, ray, *RAY, "1000")))
        same.append(rows_in(local) == rows_in(ray))
        local.unlink()
        shutil.rmtree(ray)
    middle = {name: args.files / median(each) for name, each in seconds.items()}
    return {
        "files_per_s": middle,
        "ray_over_local": middle["ray"] / middle["local"],
        "seconds": seconds,
        "same_rows": all(same),
    }


def actors_of(driver: int) -> list[int]:
    """Processes of the actors that a driver's own cluster runs."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if b"MapWorker" in words and _is_below(int(entry.name), driver):
            found.append(int(entry.name))
    return found


def _is_below(pid: int, top: int) -> bool:
    while pid > 1:
        if pid == top:
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return False
    return False


def kills(photos: Path, artifact: Path, place: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Runs whose actors and drivers are killed, until they end; their rows beside the undisturbed run's."""
    whole = place / "whole.jsonl"
    run(command(photos, artifact, whole))
    right = rows_in(whole)
    rng = random.Random(0)
    killed = {"actor": 0, "driver": 0}
    output, ended, wrong = place / "killed", 0, 0
    size = max(1, args.files // 40)
    while sum(killed.values()) < args.kills or output.exists():
        more = ("--resume",) if output.exists() else ()
        process = subprocess.Popen(
            command(photos, artifact, output, *RAY, str(size), *more),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **QUIET},
            start_new_session=True,
        )
        done = len(list(output.glob("part-*"))) if output.exists() else 0
        what = rng.choice(("actor", "driver")) if sum(killed.values()) < args.kills else None
        goal = done + rng.randint(1, 6)
        while process.poll() is None:
            time.sleep(0.02)
            if what is None or not output.exists() or len(list(output.glob("part-*"))) < goal:
                continue
            if what == "actor" and (victims := actors_of(process.pid)):
                os.kill(rng.choice(victims), signal.SIGKILL)
                killed["actor"] += 1
                what = None
            elif what == "driver":
                os.killpg(process.pid, signal.SIGKILL)
                killed["driver"] += 1
                process.wait()
        if process.returncode == 0:
            ended += 1
            wrong += rows_in(output) != right
            shutil.rmtree(output)
    return {
        "kills": sum(killed.values()),
        "killed": killed,
        "runs_ended": ended,
        "runs_wrong": wrong,
        "rows": len(right),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilenetv2_100")
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--output", type=Path, default=Path("results/ray_classify.jsonl"))
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        photos, artifact = pictures(place / "photos", args.files), exported(args.model, place / "artifact")
        for part in args.only:
            made = {"throughput": throughput, "kills": kills}[part](photos, artifact, place, args)
            record = {
                "benchmark": "ray_classify",
                "model": args.model,
                "part": part,
                "machine": machine(),
                "files": args.files,
                "image_size": 128,
                "cores": available_cores(),
                "busy": busy(),
                **made,
            }
            replace_record(args.output, record, KEYS)
            print(json.dumps(record, indent=2), flush=True)


if __name__ == "__main__":
    main()
