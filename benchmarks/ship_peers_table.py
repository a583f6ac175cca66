"""The records of :mod:`benchmarks.ship_peers` as a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODELS = (
    *("resnet50", "tresnet_m", "tresnet_l", "efficientnet_b0"),
    *("efficientnet_b3", "mobilenetv2_100", "mixnet_m", "tf_efficientnet_lite0"),
)
ROWS = ("fp32", "bf16", "int8")
EQUAL = 0.97
"""From here on a ratio counts as equal."""
SPREADS = ("quartiles", "range")
"""Of a row's speeds."""


def ratio_of(rows: Sequence[dict[str, Any]], kind: str) -> tuple[float, float, float, str] | None:
    """Ours over the best peer of a row, the ends by the quartiles of both, and who that is."""
    some = [row for row in rows if row["row"] == kind and "images_per_s" in row]
    mine = next((row for row in some if row["contender"] == "ours"), None)
    others = [row for row in some if not row["contender"].startswith("ours")]
    if mine is None or not others:
        return None
    best = max(others, key=lambda row: row["images_per_s"])
    low, high = mine["quartiles"][0] / best["quartiles"][1], mine["quartiles"][1] / best["quartiles"][0]
    return mine["images_per_s"] / best["images_per_s"], low, high, best["contender"]


def records_in(path: Path) -> list[dict[str, Any]]:
    """Those that are there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def cells_of(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, int, int], list[dict[str, Any]]]:
    """Records by network, batch and threads, in the networks' order."""
    found: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda r: (MODELS.index(r["model"]), r["batch_size"], r["threads"])):
        found.setdefault((row["model"], row["batch_size"], row["threads"]), []).append(row)
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """All records as Markdown: ratios first, then every speed."""
    first = rows[0]["environment"]
    versions = ", ".join(f"{name} {value}" for name, value in first["versions"].items())
    lines = [
        "Made by `python -m benchmarks.ship_peers`; records: [ship_peers.jsonl](ship_peers.jsonl). "
        f"{first['device_name']}, {first['cores']} cores, not measured on a GPU; {versions}. All contenders of a "
        "line in turns in one process; medians, in brackets the quartiles, and after them the slowest and the fastest "
        "call where the record has them. Random weights.",
        "",
        f"## Ours over the best by hand ({EQUAL} counts as equal)",
        "",
        "| network | px | batch | threads | fp32 | bf16 | int8 |",
        "|---|---|---|---|---|---|---|",
    ]
    for (model, batch, threads), some in cells_of(rows).items():
        cells = []
        for kind in ROWS:
            found = ratio_of(some, kind)
            cells.append("" if found is None else f"{found[0]:.2f}x ({found[1]:.2f}-{found[2]:.2f}) of {found[3]}")
        lines.append(f"| {model} | {some[0]['image_size']} | {batch} | {threads} | {' | '.join(cells)} |")
    lines += ["", "## images/s", "", "| network | batch | threads | form | who | how | images/s | p50, p99 (ms) |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for (model, batch, threads), some in cells_of(rows).items():
        for row in sorted(some, key=lambda r: (ROWS.index(r["row"]), -r.get("images_per_s", 0.0))):
            start = f"| {model} | {batch} | {threads} | {row['row']} | {row['contender']} |"
            if "failed" in row:
                lines.append(f"{start} failed: {row['failed'].replace('|', '/')} | | |")
                continue
            spread = "; ".join(f"{low:.1f}-{high:.1f}" for low, high in (row[k] for k in SPREADS if k in row))
            lines.append(
                f"{start} {row['how']} | {row['images_per_s']:.1f} ({spread}) | {row['p50_ms']:.1f}, "
                f"{row['p99_ms']:.1f} |"
            )
    peaks = rows[-1]["peak_gflops"]
    lines += [
        "",
        "Matrix products, GFLOP/s: " + ", ".join(f"{kind} {value:.0f}" for kind, value in peaks.items()) + ".",
    ]
    return "\n".join(lines) + "\n"
