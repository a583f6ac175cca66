"""How long an answer takes: every released ConvNet at its published sizes, predicted for a card.

    python -m benchmarks.choose [--device rtx-4090] [--min-throughput 2000] [--json] [--output results/choose.jsonl]
    python -m benchmarks.choose --without-stored --rounds 1    writes results/choose_untraced.jsonl

Each time is of `convscale choose` as a command of its own, the start of Python included. Cold: an empty cache folder,
made for each round; the workloads that travel with the package are there, as for a new user. With ``--without-stored``
the command runs from a copy of the package that has none of them, so that every network is traced.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import convscale
from benchmarks.records import write_record
from convscale.machine import Environment
from convscale.networks.offered import offered


def answer(command: list[str], cache: str, place: str | None = None) -> tuple[float, dict[str, Any]]:
    """Seconds of the command, run where another copy of the package lies (None: here), and what it printed."""
    own = {} if place is None else {"PYTHONPATH": place}
    environment = {**os.environ, **own, "CONVSCALE_CACHE": cache}
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=place)
    return time.perf_counter() - start, json.loads(done.stdout)


def copy_without_stored(place: str) -> None:
    """A copy of the package, its compiled code included, without what was traced beforehand."""
    package = Path(convscale.__file__).parent
    shutil.copytree(package, Path(place) / package.name, ignore=shutil.ignore_patterns("traced"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="rtx-4090")
    parser.add_argument("--min-throughput", type=float, default=2000)
    parser.add_argument("--rounds", type=int, default=2, help="cold ones; each is followed by two from the cache")
    parser.add_argument("--without-stored", action="store_true", help="nothing that was traced beforehand is there")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--output", type=Path, help="results/choose.jsonl, or choose_untraced.jsonl, when left out")
    args = parser.parse_args()
    name = "choose_untraced" if args.without_stored else "choose"
    output = args.output or Path(f"results/{name}.jsonl")
    options = [
        "--device",
        args.device,
        "--min-throughput",
        f"{args.min_throughput:g}",
    ]
    command = [sys.executable, "-m", "convscale.cli.app", "choose", *options, "--json"]
    cold, cached, found = [], [], {}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as copy:
            place = copy if args.without_stored else None
            if place is not None:
                copy_without_stored(place)
            seconds, found = answer(command, cache, place)
            cold.append(seconds)
            for _ in range(2):
                seconds, again = answer(command, cache, place)
                cached.append(seconds)
                assert again == found, "the cache gave another answer"
    options_seen = sum(len(found[key]) for key in ("maybe", "alternatives", "rejected")) + 1
    where, weights = Environment.here(), offered()
    row = {
        "what": "seconds of convscale choose",
        "command": f"python -m benchmarks.choose{' --without-stored' if args.without_stored else ''}",
        "options": options,
        "stored": not args.without_stored,
        "weights": len(weights),
    }
    row |= {
        "networks": len({each.arch for each in weights}),
        "candidates": options_seen,
        "cold_s": cold,
        "cached_s": cached,
        "best": found["best"]["name"],
    }
    row |= {
        "best_image_size": found["best"]["image_size"],
        "chance": found["chance"],
        "machine": where.device_name,
        "cores": where.cores,
    }
    row |= {"versions": dict(where.versions)}
    shown = ", ".join(f"{key} {' '.join(f'{s:.2f}' for s in row[f'{key}_s'])} s" for key in ("cold", "cached"))
    print(
        json.dumps(row)
        if args.json
        else f"{row['candidates']} candidates: {shown}; {row['best']} @{row['best_image_size']}"
    )
    write_record(output, json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
