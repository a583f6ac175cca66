"""How long an answer takes: every released ConvNet at its published sizes, predicted for a card.

    python -m benchmarks.choose [--device rtx-4090] [--min-throughput 2000] [--json] [--output results/choose.jsonl]

Each time is of `convscale choose` as a command of its own, the start of Python included. Cold: an empty cache folder,
made for each round; the workloads that travel with the package are there, as for a new user.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.records import write_record
from convscale.machine import Environment
from convscale.networks.offered import offered


def answer(command: list[str], cache: str) -> tuple[float, dict[str, Any]]:
    """Seconds of the command, and what it printed."""
    start = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "CONVSCALE_CACHE": cache}
    )
    return time.perf_counter() - start, json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="rtx-4090")
    parser.add_argument("--min-throughput", type=float, default=2000)
    parser.add_argument("--rounds", type=int, default=2, help="cold ones; each is followed by two from the cache")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("results/choose.jsonl"))
    args = parser.parse_args()
    options = [
        "--device",
        args.device,
        "--min-throughput",
        f"{args.min_throughput:g}",
    ]
    command = [sys.executable, "-m", "convscale.cli.app", "choose", *options, "--json"]
    cold, cached, found = [], [], {}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as cache:
            seconds, found = answer(command, cache)
            cold.append(seconds)
            for _ in range(2):
                seconds, again = answer(command, cache)
                cached.append(seconds)
                assert again == found, "the cache gave another answer"
    options_seen = sum(len(found[key]) for key in ("maybe", "alternatives", "rejected")) + 1
    where, weights = Environment.here(), offered()
    row = {
        "what": "seconds of convscale choose",
        "command": "python -m benchmarks.choose",
        "options": options,
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
    write_record(args.output, json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
