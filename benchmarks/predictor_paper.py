"""The TResNet paper's V100 table beside the predictor.

    python -m benchmarks.predictor_paper [--json] [--output results/predictor_v100.json]

Ridnik et al., arXiv 2003.13630, table 1: images/s in mixed precision at 90 % of the largest training batch. Predicted:
eager, AMP, from the data sheet, and scaled so that the ResNet50 row agrees. The paper's TResNets used InPlace-ABN and
TorchScript; ours are traced as shipped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import seal
from convscale.files import write_json
from convscale.predictor.predict import predict

PAPER = (
    ("resnet50", 224, 805, 2830, 288),
    ("resnet50d", 224, 600, 2670, None),
    ("resnext50_32x4d", 224, 490, 1940, None),
    ("efficientnet_b1", 240, 440, 2740, 196),
    ("seresnext50_32x4d", 224, 400, 1770, None),
    ("mixnet_l", 224, 400, 1400, None),
    ("tresnet_m", 224, 730, 2930, 512),
    ("tresnet_l", 224, 345, 1390, 316),
    ("tresnet_xl", 224, 250, 1060, 240),
)
"""Name, side in pixels, training and inference images/s, largest training batch; batches the paper does not give are
taken as 224."""


def rows() -> list[dict[str, Any]]:
    """One record a network."""
    found = []
    for model, size, train, infer, largest in PAPER:
        batch = int(0.9 * (largest or 224))
        record: dict[str, Any] = {"model": model, "size": size, "batch": batch}
        for mode, published in (("infer", infer), ("train", train)):
            made = predict(model, device="v100", mode=mode, image_size=size, batch_size=batch)
            record[mode] = {
                "published": published,
                "predicted": round(made.images_per_s),
                "low": round(made.low),
                "high": round(made.high),
            }
        found.append(record)
    for mode in ("infer", "train"):
        scale = found[0][mode]["published"] / found[0][mode]["predicted"]
        for record in found:
            record[mode]["scaled"] = round(record[mode]["predicted"] * scale)
    return found


def inside(records: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How many of the paper's figures lie in the 80 % interval, by mode."""
    modes = ("infer", "train")
    return {
        mode: sum(record[mode]["low"] <= record[mode]["published"] <= record[mode]["high"] for record in records)
        for mode in modes
    }


def ranks(records: Sequence[dict[str, Any]], mode: str) -> tuple[list[str], list[str]]:
    """Models from the fastest to the slowest, as published and as predicted."""
    published, predicted = (sorted(records, key=lambda record: -record[mode][key]) for key in ("published", "scaled"))
    return [record["model"] for record in published], [record["model"] for record in predicted]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args(arguments)
    records = rows()
    if options.output:
        write_json(
            options.output, {"source": "arXiv 2003.13630, table 1", "records": records, "inside_80": inside(records)}
        )
        seal(options.output)
    if options.json:
        print(json.dumps(records))
        return 0
    print(
        "| model | infer: paper | predicted (80 %) | scaled by ResNet50 | train: paper | predicted (80 %) | scaled by "
        "ResNet50 |"
    )
    print("|---|---|---|---|---|---|---|")
    for record in records:
        cells = [
            f"{m['published']} | {m['predicted']} ({m['low']}-{m['high']}) | {m['scaled']} "
            f"({m['scaled'] / m['published'] - 1:+.0%})"
            for m in (record["infer"], record["train"])
        ]
        print(f"| {record['model']} | {' | '.join(cells)} |")
    print()
    for mode, held in inside(records).items():
        published, predicted = ranks(records, mode)
        print(f"{mode}: {held} of {len(records)} inside the 80 % interval")
        print(f"  order of the paper: {', '.join(published)}")
        print(f"  order predicted:    {', '.join(predicted)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
