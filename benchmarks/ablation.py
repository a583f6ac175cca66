"""TResNet's ingredients one by one, measured on this machine's CPU, or trained.

    python -m benchmarks.ablation [--runtimes onnxruntime openvino eager] [--records results/ablation.jsonl] [--json]
    python -m benchmarks.ablation --accuracy --data-dir DIR [--img-size 28] [--recipe small] [--train-seconds 100]
    [--seeds 0 1 2] [--accuracy-records results/ablation_accuracy.jsonl] [--table-only]

Every spec is opened once and timed in turn, round after round, so that a machine that slows down slows all of them; the
calls of all rounds make one record. Records of other runtimes stay in the file. `convscale report --ablation --records
results/ablation.jsonl` shows them beside what is predicted for GPUs.

With ``--accuracy`` a TResNet scaled down for small images is trained once for each ingredient and seed, each run for
the same time and by the same recipe, and its accuracy on the test set stands beside its speed: in training and exported
here, and as predicted for an RTX 4090. Runs that are there are not made again. After each the table beside the records
is written anew (``results/ablation_accuracy.md``): what each ingredient does, and whether that is what the paper says.
``--table-only`` trains nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import machine, replace_record, write_record
from convscale.arch.families.tresnet import tresnet
from convscale.arch.small import for_image_size
from convscale.arch.spec import NetSpec
from convscale.errors import UserError
from convscale.show.studies import ABLATION
from convscale.speed.records import Record, read_records

WIDTH, DEPTHS = 24, (1, 2, 4, 1)
"""Of the TResNet that is scaled down: channels of its first stage, and blocks of each."""
SMALL: dict[str, dict[str, Any]] = {
    "TResNet": {},
    "stem: convolution": {"space_to_depth": False},
    "blur: none, plain strides": {"blur": False},
    "norm: BatchNorm and leaky ReLU": {"norm": "batchnorm"},
    "blocks: bottleneck in all stages": {"kinds": ("bottleneck",) * 4},
    "blocks: basic in all stages": {"kinds": ("basic",) * 4},
    "SE: in no stage": {"se_stages": ()},
    "SE: in all four stages": {"se_stages": (0, 1, 2, 3)},
    "slope: 1e-2": {"slope": 1e-2},
}
"""The ingredients, one changed at a time, as ``tresnet`` takes them."""
PAPER = {
    "stem: convolution": ("not higher", "slower"),
    "blur: none, plain strides": ("lower", "faster"),
    "norm: BatchNorm and leaky ReLU": ("same", "same"),
    "blocks: bottleneck in all stages": ("", "slower"),
    "blocks: basic in all stages": ("lower", ""),
    "SE: in no stage": ("lower", "faster"),
    "SE: in all four stages": ("same", "slower"),
    "slope: 1e-2": ("not higher", "same"),
}
"""What accuracy and speed become by a change, as the paper argues for its ingredients (Ridnik et al., arXiv 2003.13630,
section 2); empty: it says nothing. Its figures for single ingredients are not at hand."""
SAME = 0.05
"""Of a speed: smaller differences say nothing."""


def small_tresnet(line: str, image_size: int) -> NetSpec:
    """A line of ``SMALL`` for images of that side in pixels."""
    name = f"tresnet_small_{list(SMALL).index(line)}"
    return for_image_size(tresnet(name, DEPTHS, WIDTH, **SMALL[line]), image_size)


def accuracy(args: argparse.Namespace) -> None:
    """Train every line with every seed, in turns: what the machine does otherwise falls on all of them."""
    from convscale.images.sources import open_dataset
    from convscale.learn.evaluate import evaluate
    from convscale.learn.recipes import get_recipe
    from convscale.learn.train import train
    from convscale.nas.request import fixed_form
    from convscale.nn.net import create_model
    from convscale.predictor.predict import predict
    from convscale.speed.measuring import measure

    splits = open_dataset(args.data_dir)
    recipe = fixed_form(get_recipe(args.recipe), "cpu").override({"image_size": args.img_size})
    keys = ("line", "data", "image_size", "seconds", "recipe", "seed", "machine")
    path = args.accuracy_records
    made = [json.loads(text) for text in path.read_text().splitlines()] if path.is_file() else []
    there = {tuple(row[key] for key in keys) for row in made}
    for seed in args.seeds:
        for line in SMALL:
            row: dict[str, Any] = {
                "line": line,
                "data": args.data_dir.name,
                "image_size": args.img_size,
                "seconds": args.train_seconds,
                "recipe": args.recipe,
                "seed": seed,
                "machine": machine(),
            }
            if tuple(row[key] for key in keys) in there:
                continue
            spec = small_tresnet(line, args.img_size)
            run = train(spec, splits, recipe=recipe, seed=seed, max_seconds=args.train_seconds)
            result = evaluate(run.net, splits.test, run.preprocessing)
            net = create_model(spec, num_classes=len(splits.classes), in_chans=splits.channels)
            speed = measure(net, image_size=args.img_size, batch_size=8, runtime="onnxruntime", min_seconds=0.5)
            guess = predict(spec, device="rtx-4090", precision="amp", image_size=args.img_size, batch_size=256)
            row |= {
                "test_top1": result.top1,
                "val_top1": run.best_metric,
                "epochs": len(run.history),
                "training_images_per_s": sum(each["images_per_s"] for each in run.history) / len(run.history),
                "params": sum(value.numel() for value in net.parameters()),
                "images_per_s": speed.images_per_s,
                "iqr_rel": speed.iqr_rel,
                "predicted_rtx_4090": guess.images_per_s,
            }
            replace_record(path, row, keys)
            write_table(path)
            print(
                f"{line:36} seed {seed}: {100 * result.top1:.2f} %, {row['epochs']} epochs, "
                f"{speed.images_per_s:,.0f} images/s here, {guess.images_per_s:,.0f} predicted on an RTX 4090",
                flush=True,
            )


def change(points: Sequence[float]) -> str:
    """What differences of accuracy, one a seed, say: ``lower``, ``higher`` or ``same``: zero lies in their 95 %
    interval by Student's t; empty: too few to tell.
    """
    from scipy.stats import t

    if len(points) < 2:
        return ""
    middle, error = statistics.mean(points), statistics.stdev(points) / math.sqrt(len(points))
    if abs(middle) <= float(t.ppf(0.975, len(points) - 1)) * error:
        return "same"
    return "lower" if middle < 0 else "higher"


def pace(ratio: float) -> str:
    """What a speed over TResNet's says."""
    return "same" if abs(ratio - 1) < SAME else "faster" if ratio > 1 else "slower"


def verdict(said: str, found: str) -> str:
    """Whether what was found is what the paper says: ``yes``, ``no``, or ``not told``."""
    if not said or not found:
        return "not told"
    if said == "not higher":
        return "no" if found == "higher" else "yes"
    if said == found:
        return "yes"
    # What it says is a difference, and none was seen: seeds or calls may be too few.
    return "not told" if found == "same" else "no"


def accuracy_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: by data and recipe each ingredient's accuracy and speed beside TResNet's, and beside the paper."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("data", "image_size", "seconds", "recipe"))
        groups.setdefault(key, []).append(row)
    machines = " and ".join(sorted({str(row["machine"]) for row in rows}))
    parts = [
        "Made by `python -m benchmarks.ablation --accuracy`; records: "
        f"[ablation_accuracy.jsonl](ablation_accuracy.jsonl). {machines}. One ingredient of a TResNet of {WIDTH} "
        f"channels and {sum(DEPTHS)} blocks is changed at a time; test top-1, images/s of ONNX Runtime at batch 8, and "
        "as predicted for an RTX 4090 (AMP, batch 256). An accuracy is told apart where zero lies outside the "
        f"95 % interval of the seeds' differences, a speed by {SAME:.0%}. The paper: what its section 2 argues, not "
        "its figures."
    ]
    for (data, size, seconds, recipe), group in groups.items():
        parts += [f"## {data}, {size} px, {seconds:g} s of recipe `{recipe}`", _group_table(group)]
    return "\n\n".join(parts) + "\n"


def _group_table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| changed | test top-1 (each seed) | points beside | training speed | speed here | RTX 4090, predicted | "
        "the paper: accuracy, speed | as it says: accuracy; speed here, predicted |",
        "|---|---|---|---|---|---|---|---|",
    ]
    by_line = {name: {row["seed"]: row for row in rows if row["line"] == name} for name in SMALL}
    base, verdicts = by_line["TResNet"], {"yes": list[str](), "no": list[str](), "not told": list[str]()}
    for name, mine in by_line.items():
        if not mine:
            continue
        tops = [mine[seed]["test_top1"] for seed in sorted(mine)]
        cells = [f"{statistics.mean(tops):.2%} ({', '.join(f'{top:.2%}' for top in tops)})"]
        shared = sorted(base.keys() & mine.keys())
        if name == "TResNet" or not shared:
            lines.append(f"| {name} | {cells[0]} |  |  |  |  |  |  |")
            continue
        points = [100 * (mine[seed]["test_top1"] - base[seed]["test_top1"]) for seed in shared]
        spread = f" ± {statistics.stdev(points):.2f}" if len(points) > 1 else ""
        ratios = [
            statistics.median(mine[seed][key] / base[seed][key] for seed in shared)
            for key in ("training_images_per_s", "images_per_s", "predicted_rtx_4090")
        ]
        said_accuracy, said_speed = PAPER[name]
        found = {
            "accuracy": verdict(said_accuracy, change(points)),
            "speed here": verdict(said_speed, pace(ratios[1])),
            "speed predicted": verdict(said_speed, pace(ratios[2])),
        }
        for what, each in found.items():
            verdicts[each].append(f"{name} ({what})")
        cells += [f"{statistics.mean(points):+.2f}{spread}", *(f"{ratio:.2f}" for ratio in ratios)]
        cells += [f"{said_accuracy or '–'}, {said_speed or '–'}"]
        cells += [f"{found['accuracy']}; {found['speed here']}, {found['speed predicted']}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    heads = {"yes": "Agrees with the paper", "no": "Does not agree", "not told": "Not told"}
    summary = [f"- {heads[each]}: {'; '.join(named) or 'nothing'}." for each, named in verdicts.items()]
    return "\n".join([*lines, "", *summary])


def write_table(path: Path) -> None:
    """The table of a file of records, beside it."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    if not rows:
        raise UserError(f"{path} has no record; train first (--accuracy --data-dir DIR)")
    write_record(path.with_suffix(".md"), accuracy_table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "openvino", "eager"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=2.0, help="of timed calls, per network and round")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--records", type=Path, default=Path("results/ablation.jsonl"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--accuracy", action="store_true", help="train each ingredient instead")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--img-size", type=int, default=28)
    parser.add_argument("--recipe", default="small")
    parser.add_argument("--train-seconds", type=float, default=100.0, help="of each training")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--accuracy-records", type=Path, default=Path("results/ablation_accuracy.jsonl"))
    parser.add_argument("--table-only", action="store_true", help="write the table of --accuracy's records anew")
    args = parser.parse_args()
    if args.table_only:
        write_table(args.accuracy_records)
        return
    if args.accuracy:
        accuracy(args)
        write_table(args.accuracy_records)
        return
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
