"""A search whose workers and driver are killed, again and again: nothing may be lost, and the trials must be those of a
search that nobody disturbed. With ``--time``: what two workers save.

    python -m benchmarks.nas_kills [--engine local|ray] [--workers 2] [--worker-kills 10] [--driver-kills 5]
    [--trials 16] [--time] [--work FOLDER] [--records results/nas_kills.jsonl]

The data are small pictures of three colours, made on the spot; speeds are predicted, so that they are the same each
time. Only processes that this benchmark started are killed, by their numbers.
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
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.records import machine, replace_record

SIDE = 32


def pictures(folder: Path, train: int) -> Path:
    """Noise whose strongest channel is the class, as files."""
    if folder.is_dir():
        return folder
    rng = np.random.default_rng(0)
    for name, count in (("train", train), ("val", 120), ("test", 30)):
        for number in range(count):
            label = number % 3
            image = rng.integers(0, 180, (SIDE, SIDE, 3))
            image[:, :, label] += 40
            place = folder / name / ("red", "green", "blue")[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.astype(np.uint8)).save(place / f"{number}.png")
    return folder


def command(data: Path, output: Path, args: argparse.Namespace, *, engine: str, workers: int) -> list[str]:
    """The command line of a search; its threads are those of one core, whatever the workers."""
    search = [
        sys.executable,
        "-m",
        "convscale",
        "search",
        "--data-dir",
        str(data),
        "--space",
        "small",
        "--img-size",
        "32",
    ]
    asked = ["--device", "rtx-4090", "--min-throughput", "1000", "--trials", str(args.trials), "--epochs", "2"]
    where = [
        "--engine",
        engine,
        "--workers",
        str(workers),
        "--recipe",
        "small-adamw",
        "--output",
        str(output),
        "--resume",
    ]
    return [*search, *asked, *where]


def children(pid: int) -> list[int]:
    """Processes that a process started, and those that these started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    direct = [int(each) for each in found]
    return [*direct, *(other for each in direct for other in children(each))]


def is_worker(pid: int) -> bool:
    """Whether a process trains: ours by its module, Ray's by the name that it gives itself."""
    try:
        text = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return False
    return "convscale.nas.engines.local" in text or text.startswith("ray::")


def disturbed(call: list[str], args: argparse.Namespace, rng: random.Random) -> tuple[int, int, int]:
    """Run until done; (kills of workers, kills of the driver, calls)."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = drivers = calls = 0
    while True:
        calls += 1
        process = subprocess.Popen(call, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + rng.uniform(8, 20)
        while process.poll() is None:
            time.sleep(rng.uniform(0.5, 2.0))
            alive = [pid for pid in children(process.pid) if is_worker(pid)]
            if alive and workers < args.worker_kills and time.monotonic() < until:
                with suppress(OSError):
                    os.kill(rng.choice(alive), signal.SIGKILL)
                    workers += 1
            elif drivers < args.driver_kills and time.monotonic() >= until:
                below = children(process.pid)
                process.kill()
                for pid in below:  # as a machine that goes down takes them with it
                    with suppress(OSError):
                        os.kill(pid, signal.SIGKILL)
                drivers += 1
        if process.wait() == 0:
            return workers, drivers, calls


def trials_of(output: Path) -> list[tuple[str, str, list[float]]]:
    """Name, state and curve of every trial."""
    result = json.loads((output / "study.json").read_text())["result"]
    return [(trial["name"], trial["state"], trial["curve"]) for trial in result["trials"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="local", choices=("local", "ray"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--worker-kills", type=int, default=10)
    parser.add_argument("--driver-kills", type=int, default=5)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--train-images", type=int, default=1200)
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("build/nas_kills"))
    parser.add_argument("--records", type=Path, default=Path("results/nas_kills.jsonl"))
    args = parser.parse_args()
    data = pictures(args.work / f"data{args.train_images}", args.train_images)
    row: dict[str, Any] = {"engine": args.engine, "trials": args.trials, "machine": machine()}
    row |= {"train_images": args.train_images, "what": "time" if args.time else "kills"}
    plain = args.work / "plain"
    shutil.rmtree(plain, ignore_errors=True)
    began = time.perf_counter()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = 1 if args.time else args.workers
    subprocess.run(command(data, plain, args, engine=args.engine, workers=workers), env=env, check=True)
    row["seconds_plain"] = time.perf_counter() - began
    other = args.work / f"{args.engine}-{row['what']}"
    shutil.rmtree(other, ignore_errors=True)
    call = command(data, other, args, engine=args.engine, workers=args.workers)
    began = time.perf_counter()
    if args.time:
        subprocess.run(call, env=env, check=True)
        row["workers"] = args.workers
    else:
        row["worker_kills"], row["driver_kills"], row["calls"] = disturbed(call, args, random.Random(0))
    row["seconds"] = time.perf_counter() - began
    row["ratio"] = row["seconds"] / row["seconds_plain"]
    row["same_trials"] = trials_of(plain) == trials_of(other)
    replace_record(args.records, row, ("engine", "what", "trials", "machine"))
    print(json.dumps(row))


if __name__ == "__main__":
    main()
