"""How far the predictor is off on networks and cards it was not fitted on, beside two baselines.

    python -m benchmarks.predictor --tables DIR [--cache DIR] [--json] [--output results/predictor.json] [--write-coefficients FILE]

DIR holds tables of timm's benchmark.py (timm's results folder has such). Whole families (timm's module files) are held out; the split is
``predictor_split.json``: tuning families were looked at while the model was made, final ones only when it was done. Every figure printed is of the
final families, of coefficients fitted on the tuning families alone. ``--write-coefficients`` then fits on all rows and writes what the package ships.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.predictor_data import SPLIT, Row, TableFile, load_tables
from convscale.errors import UserError
from convscale.files import write_json
from convscale.speed.cache import cache_dir
from convscale.speed.device import Device
from convscale.speed.fit import Part, fit
from convscale.speed.roofline import net_s, table_of

RIDGE = 0.5
REFERENCE = ("resnet50", 224)
Tables = Mapping[TableFile, list[Row]]


def latency_s(rows: Sequence[Row]) -> np.ndarray:
    """Measured seconds of a call."""
    return np.array([row.batch / row.images_per_s for row in rows])


def part_of(rows: Sequence[Row], device: Device) -> Part:
    """Rows as the fit takes them."""
    return Part(table=table_of([row.kernels for row in rows]), latency_s=latency_s(rows), device=device)


def chosen(rows: Sequence[Row], split: str) -> list[Row]:
    """The rows of the tuning or the final families."""
    return [row for row in rows if row.family in SPLIT[split]]


def log_errors(rows: Sequence[Row], device: Device, coefficients: Mapping[str, float]) -> np.ndarray:
    """Log of predicted over measured time."""
    part = part_of(rows, device)
    return np.log(net_s(part.table, device, coefficients) / part.latency_s)


def loglinear(train: Sequence[Row], test: Sequence[Row], columns: Sequence[str]) -> np.ndarray:
    """Baseline: log time per image linear in logs of counts, or proportional to one; returns log errors on ``test``."""

    def design(rows: Sequence[Row]) -> np.ndarray:
        logs = [np.log([getattr(row, column) for row in rows]) for column in columns]
        return np.stack([*logs, np.ones(len(rows))], axis=1)

    target = -np.log([row.images_per_s for row in train])
    truth = -np.log([row.images_per_s for row in test])
    if len(columns) == 1:
        shift = float(np.median(target - design(train)[:, 0]))
        return design(test)[:, 0] + shift - truth
    weights, *_ = np.linalg.lstsq(design(train), target, rcond=None)
    return design(test) @ weights - truth


def ordered_right(rows: Sequence[Row], errors: np.ndarray) -> float:
    """Share of the pairs whose true speeds differ by 1.1 to 1.25 times that are ordered right, in %."""
    truth = -np.log([row.images_per_s for row in rows])
    first, second = np.triu_indices(len(rows), 1)
    gap = truth[first] - truth[second]
    hard = (np.abs(gap) > np.log(1.1)) & (np.abs(gap) < np.log(1.25))
    guess = (truth + errors)[first] - (truth + errors)[second]
    return float(100 * np.mean(np.sign(guess[hard]) == np.sign(gap[hard])))


def summary(rows: Sequence[Row], errors: np.ndarray) -> dict[str, Any]:
    """Figures of one method on one table."""
    off = 100 * np.abs(np.expm1(-errors))  # error of the speed, as a share of the true speed
    return {
        "networks": len(rows),
        "median_pct": round(float(np.median(off)), 1),
        "p90_pct": round(float(np.percentile(off, 90)), 1),
        "bias_pct": round(float(100 * np.expm1(-np.median(errors))), 1),
        "pairs_right_pct": round(ordered_right(rows, errors), 1),
    }


def spread_of(tables: Sequence[tuple[TableFile, list[Row]]], start: Mapping[str, float], folds: int = 3) -> float:
    """80th percentile of the absolute log error over the tuning families, each left out in turn with a third of the others."""
    families = sorted({row.family for _, rows in tables for row in rows}, key=lambda name: -sum(r.family == name for _, rows in tables for r in rows))
    errors = []
    for fold in range(folds):
        out = set(families[fold::folds])
        kept = [part_of([r for r in rows if r.family not in out], table.device) for table, rows in tables]
        coefficients = fit(kept, ridge=RIDGE, steps=8, warm=start)
        errors += [log_errors([r for r in rows if r.family in out], table.device, coefficients) for table, rows in tables]
    return float(np.quantile(np.abs(np.concatenate(errors)), 0.8))


def evaluate(tables: Tables, log: Any) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Every table's figures on the final families, and each set's coefficients and spread from the tuning families."""
    records: list[dict[str, Any]] = []
    sets: dict[str, dict[str, Any]] = {}
    for name in sorted({table.set_name for table in tables}):
        mine = [(table, rows) for table, rows in tables.items() if table.set_name == name]
        tuning = [(table, chosen(rows, "tuning")) for table, rows in mine]
        coefficients = fit([part_of(rows, table.device) for table, rows in tuning], ridge=RIDGE)
        spread = spread_of(tuning, coefficients)
        log(f"{name}: fitted on {sum(len(rows) for _, rows in tuning)} rows, spread {spread:.3f}")
        sets[name] = {"coefficients": coefficients, "spread": spread, "cards": sorted({table.device.name for table, _ in mine})}
        for table, rows in mine:
            final = chosen(rows, "final")
            train = chosen(rows, "tuning")
            errors = log_errors(final, table.device, coefficients)
            base = {"set": name, "table": table.name}
            records.append({**base, "method": "MACs", **summary(final, loglinear(train, final, ["macs"]))})
            counts = ["macs", "activations", "params"]
            records.append({**base, "method": "log-linear", **summary(final, loglinear(train, final, counts))})
            inside = round(100 * float(np.mean(np.abs(errors) <= spread)), 1)
            records.append({**base, "method": "roofline", **summary(final, errors), "inside_80_pct": inside})
            families = {family: [e for e, row in zip(errors, final, strict=True) if row.family == family] for family in SPLIT["final"]}
            records[-1]["families"] = {
                family: round(float(np.median(np.abs(np.expm1(-np.array(values))))) * 100, 1) for family, values in families.items() if values
            }
        # the figures above judge the tuning families' spread; what ships must also cover what the final ones showed
        seen = np.concatenate([log_errors(chosen(rows, "final"), table.device, coefficients) for table, rows in mine])
        sets[name]["spread"] = max(spread, float(np.quantile(np.abs(seen), 0.8)))
        sets[name]["card_spread"] = 0.0
        records += _cards_left_out(mine, sets[name], name)
    return records, sets


def _cards_left_out(mine: Sequence[tuple[TableFile, list[Row]]], record: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """For a set with several cards: each predicted from the others' fit and its data sheet, then scaled by one measured network."""
    found: list[dict[str, Any]] = []
    if len({table.device.name for table, _ in mine}) < 2:
        return found
    spreads = []
    for table, rows in mine:
        others = [part_of(chosen(r, "tuning"), t.device) for t, r in mine if t.device.name != table.device.name]
        coefficients = fit(others, ridge=RIDGE)
        final = chosen(rows, "final")
        errors = log_errors(final, table.device, coefficients)
        reference = [row for row in rows if (row.model, row.size) == REFERENCE]
        base = {"set": name, "table": table.name}
        found.append({**base, "method": "card left out, data sheet", **summary(final, errors)})
        if reference:
            scaled = errors - log_errors(reference, table.device, coefficients)[0]
            found.append({**base, "method": "card left out, one measured", **summary(final, scaled)})
        spreads.append(float(np.quantile(np.abs(errors), 0.8)))
    record["card_spread"] = max(spreads)
    return found


def final_coefficients(tables: Tables, sets: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What the package ships: fitted on all families, with the spreads of the held-out ones."""
    shipped = {}
    for name, record in sets.items():
        mine = [(table, rows) for table, rows in tables.items() if table.set_name == name]
        coefficients = fit([part_of(rows, table.device) for table, rows in mine], ridge=RIDGE, warm=record["coefficients"])
        # a mode with one card says nothing of others: the eager figure stands in
        other = record["card_spread"] or max(r["card_spread"] for r in sets.values()) or 0.2
        rounded = {key: float(f"{value:.5g}") for key, value in coefficients.items()}
        shipped[name] = {
            "coefficients": rounded,
            "spread": round(record["spread"], 4),
            "card_spread": round(max(other, 0.1), 4),
            "cards": record["cards"],
        }
    return {"format": 1, "sets": shipped}


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """The figures as a table."""
    lines = [
        "| table | method | networks | median % | 90th % | bias % | pairs right % | inside the 80 % interval |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        cells = [r["table"], r["method"], r["networks"], r["median_pct"], r["p90_pct"], f"{r['bias_pct']:+}", r["pairs_right_pct"]]
        lines.append(f"| {' | '.join(map(str, cells))} | {r.get('inside_80_pct', '')} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tables", type=Path, required=True, help="folder with timm's benchmark-*.csv")
    parser.add_argument("--cache", type=Path, default=None, help="folder for traces (default: the user's cache)")
    parser.add_argument("--json", action="store_true", help="print records as JSON instead of a table")
    parser.add_argument("--output", type=Path, default=None, help="write records there as JSON")
    parser.add_argument("--write-coefficients", type=Path, default=None, help="fit on all rows and write the package's coefficients there")
    options = parser.parse_args(arguments)

    def log(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        tables = load_tables(options.tables, options.cache or cache_dir() / "predictor-traces", log)
    except UserError as error:
        log(f"error: {error}")
        return 2
    records, sets = evaluate(tables, log)
    if options.output:
        write_json(options.output, {"split": SPLIT, "ridge": RIDGE, "records": records})
    print(json.dumps(records) if options.json else markdown(records))
    if options.write_coefficients:
        write_json(options.write_coefficients, final_coefficients(tables, sets))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
