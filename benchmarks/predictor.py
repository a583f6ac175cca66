"""How far the predictor is off on networks and cards it was not fitted on, beside two baselines.

    python -m benchmarks.predictor --tables DIR [--cache DIR] [--json] [--output results/predictor.json]
    [--write-coefficients FILE]

DIR holds tables of timm's benchmark.py (timm's results folder has such). Whole families (timm's module files) are held
out, in two ways: the final families of ``predictor_split.json`` by coefficients fitted on the tuning families alone,
and every family by coefficients fitted on the others (in ``FOLDS`` groups). ``--write-coefficients`` then fits on all
rows and writes what the package ships.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.predictor_data import SPLIT, Row, TableFile, load_tables
from benchmarks.records import seal, write_record
from convscale.cache import cache_dir
from convscale.errors import UserError
from convscale.files import write_json
from convscale.predictor.calibrate import most_likely
from convscale.predictor.devices import Device
from convscale.predictor.fitting import Part, fit
from convscale.predictor.interval import (
    FOLDS,
    RATES,
    fit_sigmas,
    folds_of,
    groups_of,
    rate_shares,
    rate_sigmas,
    sigma_of,
)
from convscale.predictor.roofline import kernel_s, net_s, table_of

RIDGE = 0.3
REFERENCE = ("resnet50", 224)
Coefficients = Mapping[str, float]
Groups = dict[str, np.ndarray]
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


@dataclass(frozen=True)
class LeftOut:
    """Errors on families left out of the fit, one entry a row."""

    rows: list[Row]
    errors: np.ndarray
    groups: Groups
    """Shares of the time, as ``interval.groups_of`` gives them."""


def left_out(rows: Sequence[Row], device: Device, coefficients: Coefficients) -> LeftOut:
    """Errors of ``coefficients`` on rows they were not fitted on."""
    table = table_of([row.kernels for row in rows])
    return LeftOut(
        list(rows),
        np.log(net_s(table, device, coefficients) / latency_s(rows)),
        groups_of(table, kernel_s(table, device, coefficients).total_s),
    )


def joined(parts: Sequence[LeftOut]) -> LeftOut:
    """Several as one."""
    groups = {name: np.concatenate([part.groups[name] for part in parts]) for name in parts[0].groups}
    return LeftOut(
        [row for part in parts for row in part.rows], np.concatenate([part.errors for part in parts]), groups
    )


def cross_validated(tables: Sequence[tuple[TableFile, list[Row]]]) -> list[LeftOut]:
    """Each table's rows, every family predicted by coefficients fitted on others alone."""
    found: list[list[LeftOut]] = [[] for _ in tables]
    for out in folds_of([row.family for _, rows in tables for row in rows], FOLDS):
        kept = [
            part_of(some, table.device)
            for table, rows in tables
            if (some := [row for row in rows if row.family not in out])
        ]
        coefficients = fit(kept, ridge=RIDGE)
        for mine, (table, rows) in zip(found, tables, strict=True):
            if some := [row for row in rows if row.family in out]:
                mine.append(left_out(some, table.device, coefficients))
    return [joined(mine) for mine in found]


def sigmas_from(part: LeftOut) -> dict[str, float]:
    """Interval widths from errors on families left out."""
    return fit_sigmas(part.groups, part.errors, [row.family for row in part.rows])


def half_widths(whole: LeftOut, parts: Sequence[LeftOut]) -> list[np.ndarray]:
    """Half the 80 % interval (log) of every row of ``parts``, each from the errors on the families of other folds
    alone.
    """
    families = np.array([row.family for row in whole.rows])
    found = [np.empty(len(part.rows)) for part in parts]
    for out in folds_of(families.tolist(), FOLDS):
        sigmas = sigmas_from(where(whole, ~np.isin(families, list(out))))
        for mine, part in zip(found, parts, strict=True):
            here = np.isin([row.family for row in part.rows], list(out))
            mine[here] = half_width(where(part, here), sigmas)
    return found


def where(part: LeftOut, mask: np.ndarray) -> LeftOut:
    """Some of its rows."""
    groups = {name: share[mask] for name, share in part.groups.items()}
    return LeftOut([row for row, kept in zip(part.rows, mask, strict=True) if kept], part.errors[mask], groups)


def half_width(part: LeftOut, sigmas: Mapping[str, float], card: np.ndarray | float = 0.0) -> np.ndarray:
    """Half the 80 % interval (log) of each row; ``card`` is the standard log error that an unknown card adds."""
    return sigmas["factor"] * np.hypot(sigma_of(part.groups, sigmas), card)


def inside(part: LeftOut, width: np.ndarray) -> dict[str, float]:
    """Share of the errors inside the 80 % interval in %: of the networks, and in the mean of the families."""
    held = np.abs(part.errors) <= width
    families = np.array([row.family for row in part.rows])
    return {
        "inside_80_pct": round(100 * float(np.mean(held)), 1),
        "inside_80_families_pct": round(
            100 * float(np.mean([np.mean(held[families == family]) for family in np.unique(families)])), 1
        ),
        "interval_pct": round(100 * float(np.median(np.expm1(width))), 1),
    }


def by_family(part: LeftOut) -> dict[str, tuple[float, float]]:
    """Median absolute error of each family's speeds in %, and the median with its sign (above 0: too fast)."""
    found: dict[str, list[float]] = {}
    for row, error in zip(part.rows, part.errors, strict=True):
        found.setdefault(row.family, []).append(100 * float(np.expm1(-error)))
    return {
        family: (round(float(np.median(np.abs(off))), 1), round(float(np.median(off)), 1))
        for family, off in sorted(found.items())
    }


def evaluate(tables: Tables, log: Any) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Every table's figures, and what ships of each set."""
    records: list[dict[str, Any]] = []
    sets: dict[str, dict[str, Any]] = {}
    for name in sorted({table.set_name for table in tables}):
        mine = [(table, rows) for table, rows in tables.items() if table.set_name == name]
        records += _final_families(mine, name)
        whole = fit([part_of(rows, table.device) for table, rows in mine], ridge=RIDGE)
        crossed = cross_validated(mine)
        half = half_widths(joined(crossed), crossed)
        for (table, _), part, width in zip(mine, crossed, half, strict=True):
            record = {
                "set": name,
                "table": table.name,
                "method": "every family left out",
                **summary(part.rows, part.errors),
            }
            records.append({**record, **inside(part, width), "families": by_family(part)})
        sigmas = sigmas_from(joined(crossed))
        sets[name] = {
            "coefficients": whole,
            "sigmas": sigmas,
            "devices": sorted({table.device.name for table, _ in mine}),
        }
        log(f"{name}: {sum(len(rows) for _, rows in mine)} rows")
    return records, sets


def _final_families(mine: Sequence[tuple[TableFile, list[Row]]], name: str) -> list[dict[str, Any]]:
    """The final families by what the tuning families say, beside the baselines, and with each card left out."""
    tuning = [(table, chosen(rows, "tuning")) for table, rows in mine]
    coefficients = fit([part_of(rows, table.device) for table, rows in tuning], ridge=RIDGE)
    sigmas = sigmas_from(joined(cross_validated(tuning)))
    records: list[dict[str, Any]] = []
    for table, rows in mine:
        final, train = chosen(rows, "final"), chosen(rows, "tuning")
        base = {"set": name, "table": table.name}
        for label, columns in (("MACs", ["macs"]), ("log-linear", ["macs", "activations", "params"])):
            records.append({**base, "method": label, **summary(final, loglinear(train, final, columns))})
        part = left_out(final, table.device, coefficients)
        record = {
            **base,
            "method": "final families",
            **summary(final, part.errors),
            **inside(part, half_width(part, sigmas)),
        }
        records.append({**record, "families": by_family(part)})
    if len({table.device.name for table, _ in mine}) > 1:
        for table, rows in mine:
            others = [part_of(some, t.device) for t, some in tuning if t.device.name != table.device.name]
            kept = [(t, some) for t, some in tuning if t.device.name != table.device.name]
            narrow = sigmas_from(joined(cross_validated(kept)))
            records += _card_left_out(table, rows, fit(others, ridge=RIDGE), narrow, {"set": name, "table": table.name})
    return records


def _card_left_out(
    table: TableFile, rows: Sequence[Row], coefficients: Coefficients, sigmas: Mapping[str, float], base: dict[str, Any]
) -> list[dict[str, Any]]:
    """The final families on a card by another card's fit: by data sheet alone, with ResNet50 measured, with each of
    some tuning networks measured.
    """
    final, device = chosen(rows, "final"), table.device
    shares = rate_shares(part_of(final, device).table, device, coefficients)
    prior = rate_sigmas(device, known=False)
    unsure = np.sqrt((shares**2) @ np.array([prior[name] ** 2 for name in RATES]))
    part = left_out(final, device, coefficients)
    records = [
        {
            **base,
            "method": "card left out, data sheet",
            **summary(final, part.errors),
            **inside(part, half_width(part, sigmas, unsure)),
        }
    ]
    one = [row for row in rows if (row.model, row.size) == REFERENCE][:1]
    if one:
        records.append(
            {
                **base,
                "method": "card left out, ResNet50 measured",
                **summary(final, _calibrated(one, final, device, coefficients, sigmas)),
            }
        )
    every = chosen(rows, "tuning")[:: max(len(rows) // 40, 1)]
    tried = [summary(final, _calibrated([row], final, device, coefficients, sigmas)) for row in every]
    if tried:
        middle = {key: round(float(np.median([t[key] for t in tried])), 1) for key in tried[0]}
        records.append(
            {**base, "method": f"card left out, one measured, middle of {len(tried)}", **middle, "networks": len(final)}
        )
    return records


def _calibrated(
    measured: Sequence[Row],
    rows: Sequence[Row],
    device: Device,
    coefficients: Coefficients,
    sigmas: Mapping[str, float],
) -> np.ndarray:
    """Log errors on ``rows`` once ``measured`` ones are known of the card."""
    made, _ = most_likely(part_of(measured, device), coefficients, sigmas, known=False)
    return log_errors(rows, device, made)


def shipped(sets: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What the package ships: fitted on all families, with the sigmas of every family left out."""

    def rounded(values: Mapping[str, float]) -> dict[str, float]:
        return {key: float(f"{value:.5g}") for key, value in values.items()}

    kept = {
        name: {**record, "coefficients": rounded(record["coefficients"]), "sigmas": rounded(record["sigmas"])}
        for name, record in sets.items()
    }
    return {"format": 3, "sets": kept}


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """The figures as a table."""
    lines = [
        "| table | method | networks | median % | 90th % | bias % | pairs right % | inside the 80 %: networks / mean "
        "of families | half width % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        cells = [
            r["table"],
            r["method"],
            r["networks"],
            r["median_pct"],
            r["p90_pct"],
            f"{r['bias_pct']:+}",
            r["pairs_right_pct"],
        ]
        held = f"{r['inside_80_pct']} / {r['inside_80_families_pct']}" if "inside_80_pct" in r else ""
        lines.append(f"| {' | '.join(map(str, cells))} | {held} | {r.get('interval_pct', '')} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tables", type=Path, required=True, help="folder with timm's benchmark-*.csv")
    parser.add_argument("--cache", type=Path, default=None, help="folder for traces (default: the user's cache)")
    parser.add_argument("--json", action="store_true", help="print records as JSON instead of a table")
    parser.add_argument("--output", type=Path, default=None, help="write records there as JSON")
    parser.add_argument(
        "--write-coefficients",
        type=Path,
        default=None,
        help="fit on all rows and write the package's coefficients there",
    )
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
        seal(options.output)
        write_record(options.output.with_suffix(".md"), markdown(records) + "\n")
    print(json.dumps(records) if options.json else markdown(records))
    if options.write_coefficients:
        write_json(options.write_coefficients, shipped(sets))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
