"""TResNet's ingredients one by one, measured on this machine's CPU.

    python -m benchmarks.ablation [--runtimes onnxruntime openvino eager] [--records results/ablation.jsonl] [--json]

Every spec is opened once and timed in turn, round after round, so that a machine that slows down slows all of them; the
calls of all rounds make one record. Records of other runtimes stay in the file. `convscale report --ablation --records
results/ablation.jsonl` shows them beside what is predicted for GPUs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.records import write_record
from convscale.show.studies import ABLATION
from convscale.speed.records import Record, read_records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "openvino", "eager"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=2.0, help="of timed calls, per network and round")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--records", type=Path, default=Path("results/ablation.jsonl"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    from convscale.cost.counting import count
    from convscale.machine import Environment
    from convscale.speed.subjects import subjects
    from convscale.speed.timing import Measurement, time_callable

    kept = (
        [r for r in read_records(args.records) if r.measurement.conditions.runtime not in args.runtimes]
        if args.records.exists()
        else []
    )
    lines = [json.dumps(record.to_dict()) + "\n" for record in kept]
    for runtime in args.runtimes:
        conditions = {"runtime": runtime, "batch_size": args.batch_size, "threads": args.threads}
        opened = {line: subjects(spec, None, conditions)[0] for line, spec in ABLATION.items()}
        calls = {line: subject.open_call(args.batch_size) for line, subject in opened.items()}
        times: dict[str, list[float]] = {line: [] for line in opened}
        for _ in range(args.rounds):
            for line, (call, stopwatch) in calls.items():
                times[line] += time_callable(
                    call, min_seconds=args.seconds, max_seconds=4 * args.seconds, stopwatch=stopwatch
                )
        base = None
        for line, subject in opened.items():
            name, where = ABLATION[line].name, Environment.here()
            m = Measurement(
                times_s=tuple(times[line]), conditions=subject.cond, environment=where, model=name, notes=subject.notes
            )
            cost = count(ABLATION[line])
            record = Record(model=name, measurement=m, params=cost.params, macs=cost.macs, activations=cost.activations)
            lines.append(json.dumps(record.to_dict()) + "\n")
            base = base or m.images_per_s
            if args.json:
                print(lines[-1], end="", flush=True)
            else:
                print(
                    f"{line:38s} {m.images_per_s:8.2f} images/s  x {m.images_per_s / base:.2f}  IQR {m.iqr_rel:.1%}  "
                    f"({m})",
                    flush=True,
                )
    write_record(args.records, "".join(lines))


if __name__ == "__main__":
    main()
