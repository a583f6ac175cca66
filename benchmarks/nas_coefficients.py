"""Coefficients of scaling: EfficientNet-X's published ones by our prediction, and our own on Fashion-MNIST.

    python -m benchmarks.nas_coefficients published [--records results/nas_coefficients.jsonl]
    python -m benchmarks.nas_coefficients study --data-dir DIR [--base mobile|tresnet] [--by macs|time|rtx-4090]
    [--minutes 30] [--epochs 3] [--seeds 0 1 2] [--work FOLDER]

``published``: EfficientNet-B0 scaled by EfficientNet's coefficients and by those that EfficientNet-X (Li et al., arXiv
2102.05610) found for GPUs by latency, predicted on a V100, AMP, batch 64. The same baseline, so only the coefficients
differ. ``study``: alpha, beta and gamma for a small baseline by the costs named, then scaled to four times the cost and
trained beside EfficientNet's direction at equal cost.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from benchmarks.records import machine, replace_record
from convscale.arch.families.tresnet import tresnet
from convscale.arch.multipliers import scale_to
from convscale.arch.scaling import scale
from convscale.arch.small import for_image_size
from convscale.arch.spec import NetSpec
from convscale.arch.zoo import get_spec

PLAIN = (
    (1, 1, 224),
    (1, 1.1, 240),
    (1.1, 1.2, 260),
    (1.2, 1.4, 300),
    (1.4, 1.8, 380),
    (1.6, 2.2, 456),
    (1.8, 2.6, 528),
)
PLAIN = (*PLAIN, (2.0, 3.1, 600))
"""Width, depth, side in pixels of EfficientNet-B0 to B7."""
GPU = (
    *((1, 1, 224), (1.05, 1.09, 229), (1.13, 1.24, 237), (1.31, 1.63, 255), (1.63, 2.4, 282)),
    *((1.94, 3.29, 306), (2.25, 4.28, 328), (2.58, 5.46, 350)),
)
"""The same of EfficientNet-X for GPUs."""


def published(records: Path) -> None:
    """Both scalings on a V100 and what they cost in multiply-accumulates."""
    from convscale.cost.counting import count
    from convscale.predictor.predict import predict

    base = get_spec("efficientnet_b0")
    for number, pair in enumerate(zip(PLAIN, GPU, strict=True)):
        row: dict[str, Any] = {"what": "published", "name": f"b{number}"}
        for label, (width, depth, size) in zip(("efficientnet", "efficientnet_x"), pair, strict=True):
            spec = scale_to(base, depth=depth, width=width, image_size=size)
            cost = count(spec)
            guess = predict(spec, device="v100", precision="amp", image_size=size, batch_size=64)
            row[label] = {
                "width": width,
                "depth": depth,
                "image_size": size,
                "macs": cost.macs,
                "params": cost.params,
                "images_per_s": guess.images_per_s,
                "low": guess.low,
                "high": guess.high,
            }
        row["speedup"] = row["efficientnet_x"]["images_per_s"] / row["efficientnet"]["images_per_s"]
        row["macs_ratio"] = row["efficientnet_x"]["macs"] / row["efficientnet"]["macs"]
        replace_record(records, row, ("what", "name"))
        print(f"b{number}: {row['speedup']:.2f}x the speed at {row['macs_ratio']:.2f}x the MACs", flush=True)


def baseline(name: str) -> NetSpec:
    """B0-like or TResNet-like, for 28 px."""
    if name == "tresnet":
        return for_image_size(tresnet("tresnet_small", (1, 1, 2, 1), 16, norm="batchnorm", image_size=28), 28)
    small = scale(get_spec("efficientnet_b0"), width=0.5, depth=0.5, name="b0_small")
    return for_image_size(small, 28)


def study(args: argparse.Namespace) -> None:
    """Find the coefficients, then four times the cost by them and by EfficientNet's direction."""
    from convscale.images.sources import open_dataset
    from convscale.nas.coefficients import find_scaling
    from convscale.nas.points import PUBLISHED
    from convscale.nas.trial import Job, run_job

    splits = open_dataset(args.data_dir)
    base, by = baseline(args.base), args.by
    folder = args.work / f"{args.base}-{by}"
    rule = find_scaling(
        base,
        splits,
        device="rtx-4090" if by == "rtx-4090" else "cpu",
        runtime=None if by == "rtx-4090" else "openvino",
        cost="macs" if by == "macs" else "time",
        minutes=args.minutes,
        epochs=args.epochs,
        most_images=args.most_images,
        output=folder,
        resume=True,
        say=lambda text: print(f"  {text}", flush=True),
    )
    found = json.loads((folder / "scaling.json").read_text())
    row: dict[str, Any] = {"what": "study", "name": f"{args.base} by {by}", "rule": rule.to_dict()}
    row |= {"points": found["points"], "epochs": args.epochs, "most_images": args.most_images, "machine": machine()}
    row["shares"] = dict(zip(("depth", "width", "resolution"), rule.shares, strict=True))
    row["efficientnet_shares"] = dict(zip(("depth", "width", "resolution"), PUBLISHED.shares, strict=True))
    own = next(point for point in found["points"] if math.dist(point["shares"], PUBLISHED.shares) < 1e-9)
    ways = {"found": (rule.alpha, rule.beta, rule.gamma), "efficientnet": (own["alpha"], own["beta"], own["gamma"])}
    for label, (alpha, beta, gamma) in ways.items():
        spec = scale_to(base, depth=alpha**2, width=beta**2, resolution=gamma**2)  # phi 2: four times the cost
        accuracies = []
        for seed in args.seeds:
            job = Job(
                number=seed,
                spec={**spec.to_dict(), "name": spec.name},
                data=None,
                recipe=found["asked"]["recipe"],
                seed=100 + seed,
                device="cpu",
                most_images=args.most_images,
            )
            accuracies.append(run_job(job, splits).accuracy)
        row[f"{label}_4x"] = {"spec": spec.name, "val_top1": accuracies}
        print(f"{label} x 4: {spec!r}: {accuracies}", flush=True)
    replace_record(args.records, row, ("what", "name", "machine"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("published", "study"))
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--base", default="mobile", choices=("mobile", "tresnet"))
    parser.add_argument("--by", default="time", choices=("macs", "time", "rtx-4090"))
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--most-images", type=int, default=20_000)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("build/nas_coefficients"))
    parser.add_argument("--records", type=Path, default=Path("results/nas_coefficients.jsonl"))
    args = parser.parse_args()
    if args.what == "published":
        published(args.records)
    else:
        study(args)


if __name__ == "__main__":
    main()
