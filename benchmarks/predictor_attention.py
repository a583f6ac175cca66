"""How far the predictor is off on networks with attention, of which no fit has seen one.

    python -m benchmarks.predictor_attention --tables DIR [--json] [--output results/predictor_attention.json]

Rows of timm's tables in NCHW inference (DIR's ``benchmark-infer-amp-nchw-*.csv``) whose networks multiply maps with
each other, and whose workloads travel with the package; predicted by the coefficients that ship.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.predictor import ordered_right
from benchmarks.predictor_data import Row, TableFile, find_tables, is_traced, job_of
from benchmarks.records import seal
from convscale.conditions import Conditions
from convscale.files import write_json
from convscale.networks.foreign import Foreign
from convscale.predictor.predict import predict_table
from convscale.predictor.roofline import table_of
from convscale.predictor.traced import store
from convscale.predictor.workload import Workload


def rows_of(table: TableFile) -> Iterator[tuple[Row, Workload]]:
    """The rows of a table that are of networks with attention."""
    from timm.models import _registry as registry

    held = store("compiled" if table.compiled else "eager")
    assert held is not None
    with open(table.path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            model = row["model"].split(".")[0]
            family = registry._model_to_module.get(model)
            if family is None or model.startswith("test_") or not row["infer_samples_per_sec"]:
                continue
            job, _ = job_of(table, row)
            size, batch, params = job.image_size, job.batch_size, float(row["param_count"])
            at = held.find(Foreign(model, "timm"), size, batch) if isinstance(size, int) else None
            if at is None or held.failed(at):
                continue
            work = held.workload(at, batch)
            if not work.attention or abs(work.params / 1e6 - params) > 0.02 + 0.01 * params:
                continue
            macs = sum(kernel.macs * times for kernel, times in work.kernels) / batch
            speed = float(row["infer_samples_per_sec"])
            counts = {"params": work.params, "macs": macs, "activations": 1e6 * float(row["infer_macts"] or 0)}
            made = Row(
                model=model,
                family=family,
                size=int(str(size)),
                batch=batch,
                images_per_s=speed,
                kernels=work.kernels,
                **counts,
            )
            yield made, work


def record_of(table: TableFile) -> dict[str, Any]:
    """The figures of one table."""
    found = list(rows_of(table))
    rows = [row for row, _ in found]
    errors, inside = [], []
    for row, work in found:
        asked = Conditions(
            device=table.device.name,
            precision=table.precision,
            layout=table.layout,
            image_size=row.size,
            batch_size=row.batch,
            runtime="compiled" if table.compiled else "eager",
        )
        (made,) = predict_table(table_of([row.kernels]), [work], [asked])
        errors.append(-math.log(made.images_per_s / row.images_per_s))
        inside.append(made.low <= row.images_per_s <= made.high)
    off = 100 * np.abs(np.expm1(-np.array(errors)))
    transformers = [-e for e, row in zip(errors, rows, strict=True) if row.family in ("vision_transformer", "deit")]
    return {
        "table": table.name,
        "networks": len(rows),
        "median_pct": round(float(np.median(off)), 1),
        "p90_pct": round(float(np.percentile(off, 90)), 1),
        "bias_pct": round(float(100 * np.expm1(-np.median(errors))), 1),
        "pairs_right_pct": round(ordered_right(rows, np.array(errors)), 1),
        "inside_80_pct": round(100 * float(np.mean(inside)), 1),
        "transformers_bias_pct": round(float(100 * np.expm1(np.median(transformers))), 1),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tables", type=Path, required=True, help="folder with timm's benchmark-*.csv")
    parser.add_argument("--json", action="store_true", help="print records as JSON instead of a table")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args(arguments)
    records = [record_of(table) for table in find_tables(options.tables) if is_traced(table)]
    if options.output:
        write_json(options.output, {"command": "python -m benchmarks.predictor_attention", "records": records})
        seal(options.output)
    if options.json:
        print(json.dumps(records))
    else:
        for record in records:
            print(*(f"{key} {value}" for key, value in record.items()), sep=", ")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
