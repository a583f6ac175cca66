"""Fashion-MNIST under the demo's constraint: our search against random search, against itself without zero-cost scores,
and against the best scaled member that `fit` finds; each result trained to the end by the same recipe.

    python -m benchmarks.search_fashion --data-dir DIR [--arm guided random unscored members] [--seeds 0 1 2]
    [--minutes 30] [--epochs 16] [--work FOLDER] [--records results/search_fashion.jsonl]

The constraint is `demo`'s: six times the speed of a ResNet-18 at 28 px in ONNX Runtime on this machine, measured once
and kept in the work folder, so that all arms keep the same. An arm of `members` takes of each of `fit`'s families the
largest member that keeps it, and the best of them on validation after a brief training, as `fit` does. The test set is
read once for each row, at its end. Rows that are there are not made again, and a search that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.records import machine, replace_record
from convscale.arch.small import for_image_size
from convscale.arch.spec import NetSpec
from convscale.arch.zoo import get_spec
from convscale.choice.basis import Asked, basis_of
from convscale.choice.members import families_for, largest_member, members
from convscale.files import write_json
from convscale.images.sources import open_dataset
from convscale.images.splits import DataSplits
from convscale.learn.evaluate import evaluate
from convscale.learn.recipes import get_recipe
from convscale.learn.train import train
from convscale.nas.pace import Pace
from convscale.nas.request import fixed_form
from convscale.nas.study import search
from convscale.nas.trial import Job, run_job
from convscale.nn.net import create_model
from convscale.speed.measuring import measure

SHARE = 6.0
"""The demo's: times the speed of a ResNet-18."""
ARMS: dict[str, dict[str, Any]] = {
    "guided": {"sampler": "guided", "zero_cost": "size"},
    "unscored": {"sampler": "guided", "zero_cost": None},
    "random": {"sampler": "random", "zero_cost": None},
    "tpe": {"sampler": "tpe", "zero_cost": "size"},
}


def floor_of(work: Path, splits: DataSplits) -> float:
    """Images/s to keep: measured once."""
    path = work / "floor.json"
    if not path.is_file():
        net = create_model(for_image_size(get_spec("resnet18"), 28), num_classes=10, in_chans=1)
        speeds = [measure(net, runtime="onnxruntime", image_size=28).images_per_s for _ in range(3)]
        write_json(path, {"floor": float(f"{SHARE * median(speeds):.2g}"), "machine": machine()})
    return float(json.loads(path.read_text())["floor"])


def best_member(splits: DataSplits, floor: float, work: Path, epochs: int, most_images: int, seed: int) -> NetSpec:
    """Of each family the largest member that keeps the speed; of these the best after a brief training."""
    pace = Pace(basis_of(Asked()), classes=10, channels=1, confidence=0.8, records=work / "speeds.jsonl")
    recipe = fixed_form(get_recipe("small").override({"epochs": epochs}), "cpu").to_dict()
    found: list[tuple[float, NetSpec]] = []
    for base in families_for(28):
        one = largest_member(members(base, 28), floor, lambda spec: pace(spec).speed.images_per_s)
        if not one.keeps:
            continue
        job = Job(
            number=len(found),
            spec={**one.spec.to_dict(), "name": one.spec.name},
            data=None,
            recipe=recipe,
            seed=seed,
            device="cpu",
            most_images=most_images,
        )
        found.append((run_job(job, splits).accuracy, one.spec))
        print(f"  {one.spec.name}: {one.images_per_s:,.0f} images/s, {100 * found[-1][0]:.2f} %", flush=True)
    return max(found, key=lambda one: one[0])[1]


def trained(spec: NetSpec, splits: DataSplits, epochs: int, seed: int) -> dict[str, Any]:
    """The network trained to the end and read once on the test set."""
    recipe = fixed_form(get_recipe("small").override({"epochs": epochs, "image_size": spec.input.size}), "cpu")
    run = train(spec, splits, recipe=recipe, seed=seed)
    result = evaluate(run.net, splits.test, run.preprocessing)
    return {
        "test_top1": result.top1,
        "interval": [result.top1_low, result.top1_high],
        "val_top1": run.best_metric,
        "final_seconds": run.seconds,
        "params": sum(value.numel() for value in run.net.parameters()),
    }


def arm(name: str, seed: int, args: argparse.Namespace, splits: DataSplits, floor: float) -> dict[str, Any]:
    """A row: search, then train what was found."""
    began = time.perf_counter()
    facts: dict[str, Any] = {}
    if name == "members":
        spec = best_member(splits, floor, args.work, args.trial_epochs, args.most_images, seed)
    else:
        study = search(
            splits,
            space="small",
            min_throughput=floor,
            minutes=args.minutes,
            epochs=args.trial_epochs,
            most_images=args.most_images,
            output=args.work / f"{name}-{seed}",
            seed=seed,
            resume=True,
            say=lambda text: print(f"  {text}", flush=True),
            **ARMS[name],
        )
        spec = study.best.spec
        states = [trial.state for trial in study.trials]
        facts = {"candidates": len(states), "trained": states.count("trained"), "pruned": states.count("pruned")}
        facts |= {"times": study.times, "brief_top1": study.best.accuracy}
    searching = time.perf_counter() - began
    row = {"arm": name, "seed": seed, "minutes": args.minutes, "epochs": args.epochs, "floor": floor, **facts}
    row |= {"search_seconds": searching, "name": spec.name, "spec": spec.to_dict()}
    pace = Pace(basis_of(Asked()), classes=10, channels=1, confidence=0.8, records=args.work / "finals.jsonl")
    shipped = pace.shipped(replace(spec, name=spec.name))
    row |= {"shipped_images_per_s": shipped.images_per_s, "shipped_in": shipped.how}
    return {**row, **trained(spec, splits, args.epochs, seed), "machine": machine()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--arm", nargs="+", default=["guided", "random", "members", "unscored"], dest="arms")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--epochs", type=int, default=16, help="of the training to the end")
    parser.add_argument("--trial-epochs", type=int, default=3)
    parser.add_argument("--most-images", type=int, default=20_000)
    parser.add_argument("--work", type=Path, default=Path("build/search_fashion"))
    parser.add_argument("--records", type=Path, default=Path("results/search_fashion.jsonl"))
    args = parser.parse_args()
    keys = ("arm", "seed", "minutes", "epochs", "machine")
    made = [json.loads(line) for line in args.records.read_text().splitlines()] if args.records.is_file() else []
    there = {tuple(row[key] for key in keys) for row in made}
    args.work.mkdir(parents=True, exist_ok=True)
    splits = open_dataset(args.data_dir)
    floor = floor_of(args.work, splits)
    print(f"the constraint: {floor:,.0f} images/s at batch 8", flush=True)
    for seed in args.seeds:
        for name in args.arms:
            if (name, seed, args.minutes, args.epochs, machine()) in there:
                continue
            print(f"{name}, seed {seed}", flush=True)
            row = arm(name, seed, args, splits, floor)
            replace_record(args.records, row, keys)
            speed = f"{row['shipped_images_per_s']:,.0f} images/s"
            print(f"{name}, seed {seed}: test {100 * row['test_top1']:.2f} %, {speed}", flush=True)


if __name__ == "__main__":
    main()
