"""Bytes kept for the backward pass, ours beside timm's; and the largest training batches of a V100, predicted beside
the TResNet paper's.

    python -m benchmarks.memory [--json] [--output results/memory.jsonl]

Distinct storages that autograd keeps in a train-mode forward, parameters apart, per image: 224 px, fp32, batch 4;
beside them what a trace counts. The paper's batches (arXiv 2003.13630, table 1) are of a V100 with 16 GB under mixed
precision; ours are counted bytes against its memory less a share for fragmentation and workspaces, which ResNet50's row
set. Nothing is timed: any machine gives the same figures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import convscale as cs
from benchmarks.records import write_record

PAPER = (
    ("resnet50", 224, 288),
    ("tresnet_m", 224, 512),
    ("efficientnet_b1", 240, 196),
    ("tresnet_l", 224, 316),
    ("tresnet_xl", 224, 240),
)
"""Name, side in pixels, largest training batch."""
NETS = (
    ("tresnet_m", None),
    ("tresnet_m", "batchnorm"),
    ("resnet50", None),
    ("efficientnet_b0", None),
    ("efficientnet_b0", "inplace"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("results/memory.jsonl"))
    args = parser.parse_args()
    import timm

    rows = []
    for name, norm in NETS:
        row = {
            "name": name,
            "norm": norm or cs.get_spec(name).norm.kind,
            "saved_bytes": int(cs.saved_bytes(net := cs.create_model(name, norm=norm))),  # type: ignore[arg-type]
            "traced_bytes": cs.count(net, 224, 4, mode="train").saved_bytes // 4,
            "timm_saved_bytes": int(cs.saved_bytes(timm.create_model(name))),
        }
        rows.append(row)
        ours, peer = (row[key] / 1e6 for key in ("saved_bytes", "timm_saved_bytes"))
        shown = f"{name:16} {row['norm']:9} ours {ours:6.2f} MB, timm {peer:6.2f} MB per image"
        print(json.dumps(row) if args.json else shown, flush=True)
    for name, size, paper in PAPER:
        found = cs.predict_largest_batch(name, "v100", image_size=size)
        batch = {
            "name": name,
            "device": "v100",
            "precision": "amp",
            "image_size": size,
            "largest_batch": found.batch_size,
            "paper_largest_batch": paper,
        }
        rows.append(
            {
                **batch,
                "difference": found.batch_size / paper - 1,
                "peak_bytes": found.cost.peak_bytes,
                "usable_bytes": found.usable_bytes,
            }
        )
        shown = (
            f"{name:16} largest training batch on a V100: predicted {found.batch_size}, paper {paper} "
            f"({found.batch_size / paper - 1:+.0%})"
        )
        print(json.dumps(rows[-1]) if args.json else shown, flush=True)
    header = {
        "what": "bytes kept for backward per image; largest training batches",
        "image_size": 224,
        "batch_size": 4,
        "precision": "fp32",
    }
    header |= {"torch": torch.__version__, "timm": timm.__version__, "command": "python -m benchmarks.memory"}
    write_record(args.output, "".join(json.dumps(row) + "\n" for row in [header, *rows]))


if __name__ == "__main__":
    main()
