"""The predictor beside what makers published of whole networks on a V100 and an A100.

    python -m benchmarks.predictor_public --tables DIR [--json] [--output results/predictor_public.json]

DIR's ``public-gpu-figures.csv`` (NVIDIA/DeepLearningExamples, PyTorch, NGC 20.06 to 21.03; a data loader is in the
times). No coefficient has seen a row of it. Where a batch is not stated 128 is taken.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.records import seal
from convscale.files import write_json
from convscale.predictor.predict import predict

NAMES = {
    "resnet50 (v1.5)": "resnet50",
    "efficientnet_b0": "efficientnet_b0",
    "efficientnet_b4": "efficientnet_b4",
    "resnext101_32x4d": "resnext101_32x4d",
    "seresnext101_32x4d": "seresnext101_32x4d",
}
CARDS = {
    "V100-SXM2-16GB": "v100",
    "V100-SXM2-32GB": "v100-32gb",
    "A100-SXM4-40GB": "a100-40gb",
    "A100-SXM4-80GB": "a100-80gb",
}
PRECISIONS = {"amp-fp16": "amp", "tf32": "fp32", "fp32": "fp32"}
UNSAID = 128


def records(folder: Path) -> list[dict[str, Any]]:
    """One record a row that can be predicted."""
    found = []
    with open(folder / "public-gpu-figures.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            name = NAMES.get(row["model"])
            if name is None or row["precision"] not in PRECISIONS or "PyTorch" not in row["framework"]:
                continue
            batch = int(row["batch"] or UNSAID)
            asked = {
                "mode": row["mode"],
                "precision": PRECISIONS[row["precision"]],
                "layout": row["layout"] or "nchw",
                "image_size": int(row["image_px"]),
                "batch_size": batch,
            }
            made = predict(name, device=CARDS[row["gpu"]], **asked)
            published = float(row["images_per_s"])
            found.append(
                {
                    "model": name,
                    "gpu": row["gpu"],
                    **asked,
                    "published": published,
                    "predicted": round(made.images_per_s, 1),
                    "ratio": round(made.images_per_s / published, 3),
                    "inside_80": made.low <= published <= made.high,
                }
            )
    return found


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By card, mode and size of the batch."""
    lines = []
    sizes = {"batch 1 to 8": lambda b: b <= 8, "batch 16 and more": lambda b: b > 8}
    for card in ("V100", "A100"):
        for mode in ("infer", "train"):
            for name, fits in sizes.items():
                some = [r for r in rows if r["gpu"].startswith(card) and r["mode"] == mode and fits(r["batch_size"])]
                if not some:
                    continue
                off = np.array([100 * abs(r["ratio"] - 1) for r in some])
                lines.append(
                    {
                        "card": card,
                        "mode": mode,
                        "batches": name,
                        "rows": len(some),
                        "median_pct": round(float(np.median(off)), 1),
                        "p90_pct": round(float(np.percentile(off, 90)), 1),
                        "bias_pct": round(100 * (float(np.median([r["ratio"] for r in some])) - 1), 1),
                        "worst_factor": round(max(math.exp(abs(math.log(r["ratio"]))) for r in some), 2),
                        "inside_80_pct": round(100 * float(np.mean([r["inside_80"] for r in some])), 1),
                    }
                )
    return lines


def markdown(lines: Sequence[dict[str, Any]]) -> str:
    """The summary as a table."""
    text = ["| card | mode | batches | rows | median % | 90th % | bias % | worst factor | inside the 80 % interval % |"]
    text += ["|---|---|---|---|---|---|---|---|---|"]
    text += [f"| {' | '.join(str(value) for value in line.values())} |" for line in lines]
    return "\n".join(text) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tables", type=Path, required=True, help="folder with the measurements")
    parser.add_argument("--json", action="store_true", help="print records as JSON")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args(arguments)
    rows = records(options.tables)
    lines = summary(rows)
    if options.output:
        write_json(options.output, {"command": "python -m benchmarks.predictor_public", "summary": lines})
        seal(options.output)
    print(json.dumps(rows) if options.json else markdown(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
