"""EfficientNet's table 3, counted: which of its rows the natural scaling rules reproduce.

    python -m benchmarks.scaling [--json] [--output results/scaling.md]

Depth: blocks per stage times d, rounded up; width: every stage, stem and head times w, rounded to 8; resolution:
round(224 r). Multiply-accumulates come from tracing the built network.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import convscale as cs
from benchmarks.records import write_record

ROWS: tuple[tuple[str, dict[str, float], float], ...] = (
    ("mobilenetv1_100", {}, 0.6),
    ("mobilenetv1_100", {"width": 2.0}, 2.2),
    ("mobilenetv1_100", {"resolution": 2.0}, 2.2),
    ("mobilenetv1_100", {"depth": 1.4, "width": 1.2, "resolution": 1.3}, 2.3),
    ("mobilenetv2_100", {}, 0.3),
    ("mobilenetv2_100", {"depth": 4.0}, 1.2),
    ("mobilenetv2_100", {"width": 2.0}, 1.1),
    ("mobilenetv2_100", {"resolution": 2.0}, 1.2),
    ("resnet50", {}, 4.1),
    ("resnet50", {"depth": 4.0}, 16.2),
    ("resnet50", {"width": 2.0}, 14.7),
    ("resnet50", {"resolution": 2.0}, 16.4),
    ("efficientnet_b0", {}, 0.4),
    ("efficientnet_b0", {"depth": 4.0}, 1.8),
    ("efficientnet_b0", {"width": 2.0}, 1.8),
    ("efficientnet_b0", {"resolution": 2.0}, 1.9),
    ("efficientnet_b0", {"depth": 1.4, "width": 1.2, "resolution": 1.3}, 1.8),
)
CLOSE = 0.05


def rows() -> list[dict[str, Any]]:
    """Each published row with our count."""
    out = []
    for name, options, published in ROWS:
        spec = cs.scale(name, **options) if options else cs.get_spec(name)  # type: ignore[arg-type]
        counted = cs.count(spec, image_size=spec.input.size).macs / 1e9
        difference = counted / published - 1
        # the baselines are published with one digit, so they can only be compared after rounding
        close = abs(difference) <= CLOSE if options else round(counted, 1) == published
        out.append(
            {
                "name": name,
                **options,
                "published_gmacs": published,
                "counted_gmacs": counted,
                "difference": difference,
                "reproduced": close,
            }
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("results/scaling.md"))
    args = parser.parse_args()
    compared = rows()
    lines = [
        "| baseline | depth | width | resolution | published G | counted G | difference | within 5 % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in compared:
        dims = " | ".join(f"{row[key]:g}" if key in row else "" for key in ("depth", "width", "resolution"))
        lines.append(
            f"| {row['name']} | {dims} | {row['published_gmacs']} | {row['counted_gmacs']:.3f} | "
            f"{row['difference']:+.1%} | "
            f"{'yes' if row['reproduced'] else 'no'} |"
        )
    text = "\n".join(lines)
    print(json.dumps(compared, indent=2) if args.json else text)
    write_record(
        args.output, f"# EfficientNet's table 3, counted\n\nMade by `python -m benchmarks.scaling`.\n\n{text}\n"
    )


if __name__ == "__main__":
    main()
