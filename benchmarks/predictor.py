"""How far the predictor is off on networks and cards it was not fitted on, beside two baselines.

    python -m benchmarks.predictor --tables DIR [--cache DIR] [--every N] [--sets ...] [--json]
    [--output results/predictor.json] [--write-coefficients FILE]

DIR holds tables of timm's benchmark.py (timm's results folder has such). Whole families (timm's module files) are held
out, in two ways: the final families of ``predictor_split.json`` by coefficients fitted on the tuning families alone,
and every family by coefficients fitted on the others (in ``FOLDS`` groups). ``--write-coefficients`` then fits on all
rows and writes what the package ships.

Each card of a set's tables is also left out: all its tables, and so its generation, since the tables hold one card of
each. Networks in NCHW inference are those whose workloads travel with the package: figures rest on every N-th, and what
ships on all. Of the others every N-th of each family is traced. A set's record stays when other sets are run
(``--sets``).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.predictor_data import SPLIT, Row, TableFile, is_traced, load_tables
from benchmarks.records import seal, write_record
from convscale.cache import cache_dir
from convscale.errors import UserError
from convscale.files import write_json
from convscale.predictor.calibrate import most_likely
from convscale.predictor.devices import Device
from convscale.predictor.fitted import Fitted
from convscale.predictor.fitting import Part, fit, reach_of
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
from convscale.predictor.roofline import PRIOR, Table, for_card, kernel_s, net_s, table_of

RIDGE = 0.3
CARD_FOLDS = 3
"""Groups of families that are left out in turn beside a card."""
MEASURED = 8
"""How many networks are tried as the one that is measured on a card."""
SETS = ("eager-nchw", "eager-nhwc", "compiled", "train-nchw", "train-nhwc", "cpu")
REFERENCE = ("resnet50", 224)
Coefficients = Mapping[str, float]
Groups = dict[str, np.ndarray]
Tables = Mapping[TableFile, list[Row]]


def latency_s(rows: Sequence[Row]) -> np.ndarray:
    """Measured seconds of a call."""
    return np.array([row.batch / row.images_per_s for row in rows])


def part_of(rows: Sequence[Row], device: Device, era: str = "") -> Part:
    """Rows as the fit takes them: what a card reaches of its sheet is fitted too."""
    kernels = table_of([row.kernels for row in rows])
    return Part(table=kernels, latency_s=latency_s(rows), device=device, card=device.name, era=era)


def fitted_of(c: Coefficients, parts: Sequence[Part], sigmas: Mapping[str, float] | None = None) -> Fitted:
    """What a fit on some tables says, as the package has it."""
    cards = sorted({part.card for part in parts} - {""})
    eras = sorted({part.era for part in parts} - {""})
    return Fitted(
        coefficients={name: c[name] for name in PRIOR},
        sigmas=sigmas or {},
        devices=tuple(sorted({part.device.name for part in parts})),
        cards={card: reach_of(c, card) for card in cards},
        eras={era: c[f"{era}:time"] for era in eras},
    )


def fit_of(tables: Sequence[tuple[TableFile, Sequence[Row]]], near: Fitted | None = None) -> Fitted:
    """Fit on the rows of some tables; ``near``: where to begin the search."""
    several = len({table.era for table, rows in tables if rows}) > 1  # of one alone nothing can be told
    parts = [part_of(rows, table.device, table.era if several else "") for table, rows in tables if rows]
    guess = None
    if near is not None:
        reach = {f"{card}:{name}": value for card, found in near.cards.items() for name, value in found.items()}
        guess = {**near.coefficients, **reach, **{f"{era}:time": value for era, value in near.eras.items()}}
    return fitted_of(fit(parts, ridge=RIDGE, near=guess), parts)


def seconds_of(rows: Sequence[Row], table: TableFile, fitted: Fitted) -> tuple[Table, np.ndarray, Coefficients]:
    """Kernels and predicted seconds of a table's rows, by the coefficients that hold for its card."""
    kernels, c = table_of([row.kernels for row in rows]), for_card(fitted.coefficients, fitted.reach(table.device))
    return kernels, fitted.eras.get(table.era, 1.0) * net_s(kernels, table.device, c), c


def chosen(rows: Sequence[Row], split: str) -> list[Row]:
    """The rows of the tuning or the final families."""
    return [row for row in rows if row.family in SPLIT[split]]


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
    unsure: np.ndarray
    """Log error that the card adds where its sheet alone is known."""


def left_out(rows: Sequence[Row], table: TableFile, fitted: Fitted) -> LeftOut:
    """Errors of a fit on rows it was not made of."""
    kernels, seconds, c = seconds_of(rows, table, fitted)
    return LeftOut(
        list(rows),
        np.log(seconds / latency_s(rows)),
        groups_of(kernels, kernel_s(kernels, table.device, c).total_s),
        unsure_of(kernels, table.device, c),
    )


def unsure_of(kernels: Table, device: Device, c: Coefficients) -> np.ndarray:
    """Standard log error that a card adds to each network whose sheet alone is known."""
    shares, prior = rate_shares(kernels, device, c), rate_sigmas(device, known=False)
    return np.sqrt((shares**2) @ np.array([prior[name] ** 2 for name in RATES]))


def joined(parts: Sequence[LeftOut]) -> LeftOut:
    """Several as one."""
    groups = {name: np.concatenate([part.groups[name] for part in parts]) for name in parts[0].groups}
    return LeftOut(
        [row for part in parts for row in part.rows],
        np.concatenate([part.errors for part in parts]),
        groups,
        np.concatenate([part.unsure for part in parts]),
    )


def cross_validated(tables: Sequence[tuple[TableFile, list[Row]]], near: Fitted | None = None) -> list[LeftOut]:
    """Each table's rows, every family predicted by coefficients fitted on others alone."""
    found: list[list[LeftOut]] = [[] for _ in tables]
    for out in folds_of([row.family for _, rows in tables for row in rows], FOLDS):
        fitted = fit_of([(table, [row for row in rows if row.family not in out]) for table, rows in tables], near)
        for mine, (table, rows) in zip(found, tables, strict=True):
            if some := [row for row in rows if row.family in out]:
                mine.append(left_out(some, table, fitted))
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
    rows = [row for row, kept in zip(part.rows, mask, strict=True) if kept]
    return LeftOut(rows, part.errors[mask], groups, part.unsure[mask])


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


def evaluate(
    tables: Tables, log: Any, names: Sequence[str], every: int
) -> tuple[list[dict[str, Any]], dict[str, Fitted]]:
    """Every table's figures, which rest on every so many rows of the tables that were traced beforehand, and what ships
    of each set, which rests on all.
    """
    records: list[dict[str, Any]] = []
    sets: dict[str, Fitted] = {}
    for name in names:
        mine = [(table, rows) for table, rows in tables.items() if table.set_name == name]
        whole = fit_of(mine)
        log(f"{name}: {sum(len(rows) for _, rows in mine)} rows, fitted")
        mine = [(table, rows[:: every if is_traced(table) else 1]) for table, rows in mine]
        crossed = cross_validated(mine, whole)
        half = half_widths(joined(crossed), crossed)
        for (table, _), part, width in zip(mine, crossed, half, strict=True):
            record = {
                "set": name,
                "table": table.name,
                "method": "every family left out",
                **summary(part.rows, part.errors),
            }
            records.append({**record, **inside(part, width), "families": by_family(part)})
        sets[name] = replace(whole, sigmas=sigmas_from(joined(crossed)))
        log(f"{name}: families left out")
        records += _baselines(mine, name)
        if len({table.device.name for table, _ in mine}) > 1:
            for card in sorted({table.device.name for table, _ in mine}):
                records += _card_left_out(card, mine, whole, name)
                log(f"{name}: {card} left out")
    return records, sets


def _baselines(mine: Sequence[tuple[TableFile, list[Row]]], name: str) -> list[dict[str, Any]]:
    """MACs and counts on the final families, fitted on the tuning families of the same table."""
    found = []
    for table, rows in mine:
        final, train = chosen(rows, "final"), chosen(rows, "tuning")
        for label, columns in (("MACs", ["macs"]), ("log-linear", ["macs", "activations", "params"])):
            figures = summary(final, loglinear(train, final, columns))
            found.append({"set": name, "table": table.name, "method": label, **figures})
    return found


def _card_left_out(
    card: str, mine: Sequence[tuple[TableFile, list[Row]]], near: Fitted, name: str
) -> list[dict[str, Any]]:
    """All tables of a card by fits on the other cards', every family left out too: by its data sheet alone, then with
    ResNet50 measured, and with each of some networks measured.
    """
    others = [(table, rows) for table, rows in mine if table.device.name != card]
    tables = [(table, rows) for table, rows in mine if table.device.name == card]
    begin = replace(near, cards={}, eras={})
    folds = folds_of([row.family for _, rows in mine for row in rows], CARD_FOLDS)
    fits = [fit_of([(t, [row for row in rows if row.family not in out]) for t, rows in others], begin) for out in folds]
    sigmas = sigmas_from(joined(cross_joined(others, folds, fits)))
    records = []
    for table, rows in tables:
        base = {"set": name, "table": table.name}
        part = joined(cross_joined([(table, rows)], folds, fits))
        label = "card left out, data sheet"
        figures = {**summary(part.rows, part.errors), **inside(part, half_width(part, sigmas, part.unsure))}
        records.append({**base, "method": label, **figures, "families": by_family(part)})
        records += [{**base, **record} for record in _measured_there(table, rows, (folds, fits, sigmas))]
    return records


def cross_joined(
    tables: Sequence[tuple[TableFile, list[Row]]], folds: Sequence[set[str]], fits: Sequence[Fitted]
) -> list[LeftOut]:
    """Each table's rows by the fit that saw none of their families."""
    return [
        joined(
            [
                left_out(some, table, fitted)
                for out, fitted in zip(folds, fits, strict=True)
                if (some := [row for row in rows if row.family in out])
            ]
        )
        for table, rows in tables
    ]


Crossed = tuple[Sequence[set[str]], Sequence[Fitted], Mapping[str, float]]


def _measured_there(table: TableFile, rows: Sequence[Row], crossed: Crossed) -> list[dict[str, Any]]:
    """A card left out once one network is measured there: ResNet50, and the middle of others."""
    found = []
    one = [row for row in rows if (row.model, row.size) == REFERENCE][:1]
    if one:
        figures = summary(*_calibrated(one, table, rows, crossed))
        found.append({"method": "card left out, ResNet50 measured", **figures})
    every = rows[:: max(len(rows) // MEASURED, 1)]
    tried = [summary(*_calibrated([row], table, rows, crossed)) for row in every]
    middle = {key: round(float(np.median([t[key] for t in tried])), 1) for key in tried[0]}
    label = f"card left out, one measured, middle of {len(tried)}"
    found.append({"method": label, **middle, "networks": len(rows) - 1})
    return found


def _calibrated(
    measured: Sequence[Row], table: TableFile, rows: Sequence[Row], crossed: Crossed
) -> tuple[list[Row], np.ndarray]:
    """Rows and their log errors once ``measured`` ones are known of the card, by fits without the rows' families."""
    folds, fits, sigmas = crossed
    kept: list[Row] = []
    errors: list[np.ndarray] = []
    for out, fitted in zip(folds, fits, strict=True):
        some = [row for row in rows if row.family in out and row not in measured]
        if not some:
            continue
        c = for_card(fitted.coefficients, fitted.reach(table.device))
        era = fitted.eras.get(table.era, 1.0)
        part = part_of(measured, table.device)
        made, _ = most_likely(replace(part, card="", latency_s=part.latency_s / era), c, sigmas, known=False)
        kernels = table_of([row.kernels for row in some])
        kept += some
        errors.append(np.log(era * net_s(kernels, table.device, made) / latency_s(some)))
    return kept, np.concatenate(errors)


def shipped(sets: Mapping[str, Fitted], before: Mapping[str, Any]) -> dict[str, Any]:
    """What the package ships: fitted on all families, with the sigmas of every family left out; sets that were not
    fitted stay as ``before`` has them.
    """

    def rounded(values: Mapping[str, float]) -> dict[str, float]:
        return {key: float(f"{value:.5g}") for key, value in values.items()}

    made = {
        name: {
            "coefficients": rounded(fitted.coefficients),
            "sigmas": rounded(fitted.sigmas),
            "devices": list(fitted.devices),
            "cards": {card: rounded(reach) for card, reach in fitted.cards.items()},
            "eras": rounded(fitted.eras),
        }
        for name, fitted in sets.items()
    }
    return {"format": 4, "sets": {**before, **made}}


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
    parser.add_argument("--every", type=int, default=2, help="figures rest on every so many networks")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    options = parser.parse_args(arguments)

    def log(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def wanted(table: TableFile) -> bool:
        return table.set_name in options.sets and (table.torch != "pt210" or is_traced(table))

    try:
        cache = options.cache or cache_dir() / "predictor-traces"
        tables = load_tables(options.tables, cache, log, wanted, options.every)
    except UserError as error:
        log(f"error: {error}")
        return 2
    records, sets = evaluate(tables, log, options.sets, options.every)
    records = [{**record, "every": options.every} for record in records]
    if options.output:
        old = json.loads(options.output.read_text(encoding="utf-8")) if options.output.is_file() else {"records": []}
        kept = [record for record in old["records"] if record["set"] not in options.sets]
        about = {"split": SPLIT, "ridge": RIDGE}
        write_json(options.output, {**about, "records": [*kept, *records]})
        seal(options.output)
        write_record(options.output.with_suffix(".md"), markdown([*kept, *records]) + "\n")
    print(json.dumps(records) if options.json else markdown(records))
    if options.write_coefficients:
        path = options.write_coefficients
        before = json.loads(path.read_text(encoding="utf-8"))["sets"] if path.is_file() else {}
        write_json(path, shipped(sets, before))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
