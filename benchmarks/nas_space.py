"""Networks of a space sampled, encoded, changed, built on the meta device and counted: none may be invalid.

Every second one is built and counted as it was drawn, the others as they were changed. An invalid one makes it exit
with 1.

    python -m benchmarks.nas_space [--space small] [--count 10000] [--processes 2] [--records results/nas_space.jsonl]

Counts are put together from parts that are traced once each. A few are compared with the count of the whole network.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.records import machine, replace_record
from convscale.cost.counting import count
from convscale.nas.spaces import get_space
from convscale.nas.tally import tally
from convscale.networks.resolve import build_meta

COMPARED = 2_001
"""One in so many, of those drawn and of those changed in turn, is counted as a whole too."""


def check(space_name: str, number: int, seed: int) -> int:
    """How many of some networks, and of those changed from them, are not as they should be."""
    space, wrong = get_space(space_name), 0
    for at, spec in enumerate(space.sample(seed, count=number)):
        other = space.mutate(spec, at)
        vector = space.encode(spec)
        built = other if at % 2 else spec
        net = build_meta(built)
        counts = tally(built)
        ok = space.decode(vector) == spec and other != spec and other in space
        ok = ok and sum(value.numel() for value in net.parameters()) == counts.params
        if at % COMPARED == 0:
            whole = count(built)
            ok = ok and (whole.params, whole.macs) == counts
        wrong += not ok
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="small")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--records", type=Path, default=Path("results/nas_space.jsonl"))
    parser.add_argument("--share", type=int, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.share is not None:
        print(check(args.space, args.count, args.share))
        return
    began = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.nas_space", "--space", args.space]
    each = args.count // args.processes
    running = [
        subprocess.Popen([*command, "--count", str(each), "--share", str(seed)], stdout=subprocess.PIPE, text=True)
        for seed in range(args.processes)
    ]
    outputs = [process.communicate()[0] for process in running]
    seconds = time.perf_counter() - began
    row = {
        "space": args.space,
        "count": each * args.processes,
        "processes": args.processes,
        "wrong": sum(map(int, outputs)),
        "seconds": seconds,
        "machine": machine(),
    }
    replace_record(args.records, row, ("space", "count", "machine"))
    print(f"{row['count']:,} networks of {args.space}: {row['wrong']} wrong, {seconds:.1f} s")
    sys.exit(bool(row["wrong"]))


if __name__ == "__main__":
    main()
