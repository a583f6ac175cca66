"""Bytes kept for the backward pass, ours beside timm's.

    python -m benchmarks.memory [--json] [--output results/memory.jsonl]

Distinct storages that autograd keeps in a train-mode forward, parameters apart, per image: 224 px, fp32, batch 4. Nothing is timed: any machine gives
the same figures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import convscale as cs
from convscale.files import write_text

NETS = (("tresnet_m", None), ("tresnet_m", "batchnorm"), ("resnet50", None), ("efficientnet_b0", None), ("efficientnet_b0", "inplace"))


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
            "saved_bytes": int(cs.saved_bytes(cs.create_model(name, norm=norm))),  # type: ignore[arg-type]
            "timm_saved_bytes": int(cs.saved_bytes(timm.create_model(name))),
        }
        rows.append(row)
        shown = f"{name:16} {row['norm']:9} ours {row['saved_bytes'] / 1e6:6.2f} MB, timm {row['timm_saved_bytes'] / 1e6:6.2f} MB per image"
        print(json.dumps(row) if args.json else shown, flush=True)
    header = {"what": "bytes kept for backward per image", "image_size": 224, "batch_size": 4, "precision": "fp32"}
    header |= {"torch": torch.__version__, "timm": timm.__version__, "command": "python -m benchmarks.memory"}
    write_text(args.output, "".join(json.dumps(row) + "\n" for row in [header, *rows]))


if __name__ == "__main__":
    main()
