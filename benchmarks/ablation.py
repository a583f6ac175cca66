"""TResNet's ingredients one by one, measured on this machine's CPU.

    python -m benchmarks.ablation [--runtimes onnxruntime eager] [--records results/ablation.jsonl] [--json]

Every spec is timed in turn, round after round, so that a machine that slows down slows all of them; the calls of all rounds make one record.
`convscale report` shows the records beside what is predicted for GPUs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from convscale.show.studies import ABLATION
from convscale.speed.records import Record, append_record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "eager"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of timed calls, per network and round")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--records", type=Path, default=Path("results/ablation.jsonl"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    from convscale.ship.measure import measure
    from convscale.speed.cost import count

    for runtime in args.runtimes:
        found = {}
        for _ in range(args.rounds):
            for line, spec in ABLATION.items():
                m = measure(spec, runtime=runtime, batch_size=args.batch_size, threads=args.threads, min_seconds=args.seconds)
                found[line] = dataclasses.replace(m, times_s=(*found[line].times_s, *m.times_s)) if line in found else m
        base = next(iter(found.values())).images_per_s
        for line, m in found.items():
            cost = count(ABLATION[line])
            record = Record(model=ABLATION[line].name, measurement=m, params=cost.params, macs=cost.macs, activations=cost.activations)
            append_record(args.records, record)
            if args.json:
                print(json.dumps(record.to_dict()))
            else:
                print(f"{line:38s} {m.images_per_s:8.2f} images/s  x {m.images_per_s / base:.2f}  IQR {m.iqr_rel:.1%}  ({m})")


if __name__ == "__main__":
    main()
