"""The answers of ``choose`` by prediction on cards that the predictor has never seen, beside the best that measuring
every network there would give.

    python -m benchmarks.front --tables DIR [--cache DIR] [--cards ...] [--speeds 15] [--json] [--output
        results/front.json]

DIR holds tables of timm's benchmark.py (timm's results folder has such). For each card of ``CARDS`` every network of
its table is predicted by coefficients that were fitted without any table of that card and, fold by fold, without the
network's own family; the width of the interval comes from the others alone, too. Candidates are the released weights
of the networks in the table, at the sizes there, with their published top-1. For each of ``--speeds`` speeds, evenly
spaced in logarithms between the fifth and the ninety-fifth percentile of the table's own front, the candidate is chosen
by the package's own ``decide`` and looked up in the table. ``kit N``: the N networks that ``choose --kit`` would write
are measured there first (looked up), and the choice is made again by their rows, as ``choose --measured`` makes it.

The line ``every`` is the best answer: networks are few and far between along a front, so that even it leaves some of
the speed unused.

Lost: the top-1 of the best answer that the table allows, less that of the answer; an answer that misses the speed loses
nothing by its accuracy, but counts as missed. Used: the speed asked for over the answer's measured speed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.predictor import cross_joined, fit_of, half_width, joined, left_out, sigmas_from, where
from benchmarks.predictor_data import Row, TableFile, find_tables, load_tables, rows_traced_before
from benchmarks.records import seal, write_record
from convscale.cache import cache_dir
from convscale.choice.candidates import Candidate
from convscale.choice.carried import could_win
from convscale.choice.decide import Choice, NothingKeeps, Option, decide
from convscale.choice.facts import NetworkFacts, Speed
from convscale.choice.rows import set_by
from convscale.conditions import Conditions, Constraint
from convscale.files import write_json
from convscale.networks.foreign import Foreign
from convscale.networks.released import released
from convscale.predictor.fitted import Fitted
from convscale.predictor.interval import FOLDS, folds_of

CARDS = {
    "RTX 5090, eager": "infer-amp-nchw-pt291-cu130-5090",
    "RTX 5090, compiled": "infer-amp-nchw-pt291-cu130-5090-dynamo",
    "RTX 4090, eager": "infer-amp-nchw-pt291-cu128-4090",
    "RTX 4090, compiled": "infer-amp-nchw-pt291-cu128-4090-dynamo",
    "i9-10940X, compiled": "infer-fp32-nchw-pt240-cpu-i9_10940x-dynamo",
}
"""Tables whose card is taken to be unknown."""
CONFIDENCES = (0.8, 0.95)
KITS = (0, 1, 4, 8)
EVERY = "every"
"""In the place of a kit's size: the best answer that the table allows, every network measured."""
Tables = Mapping[TableFile, list[Row]]


@dataclass(frozen=True)
class Told:
    """A network of a table, with what is predicted of it by others."""

    row: Row
    images_per_s: float
    low: float
    high: float


def load(folder: Path, cache: Path, cards: Sequence[str]) -> dict[TableFile, list[Row]]:
    """The tables that ``cards`` and their fits need."""
    found = {
        table: rows_traced_before(table)
        for table in find_tables(folder)
        if (table.mode, table.layout, table.precision) == ("infer", "nchw", "amp") and table.torch >= "pt240"
    }
    if not any(CARDS[card].startswith("infer-fp32") for card in cards):
        return found
    cpu = load_tables(
        folder,
        cache,
        lambda text: print(text, file=sys.stderr, flush=True),
        lambda table: table.device.kind == "cpu" and table.torch >= "pt240",
    )
    return found | cpu


def told_without(card: TableFile, tables: Tables) -> list[Told]:
    """Every network of a table, predicted without the card and without the network's family: coefficients are of the
    other families on the other cards, and the interval's width is of their errors.
    """
    mine = tables[card]
    others = [(t, rows) for t, rows in tables.items() if t.set_name == card.set_name and t.device != card.device]
    folds = folds_of([row.family for _, rows in [*others, (card, mine)] for row in rows], FOLDS)
    fitted: list[Fitted] = []
    for out in folds:
        kept = [(t, [row for row in rows if row.family not in out]) for t, rows in others]
        fitted.append(fit_of(kept, fitted[0] if fitted else None))
    whole = joined(cross_joined(others, folds, fitted))
    families = np.array([row.family for row in whole.rows])
    found: list[Told] = []
    for out, known in zip(folds, fitted, strict=True):
        here = [row for row in mine if row.family in out]
        if not here:
            continue
        sigmas = sigmas_from(where(whole, ~np.isin(families, list(out))))
        part = left_out(here, card, known)
        width = half_width(part, sigmas, part.unsure)
        for row, error, half in zip(here, part.errors, width, strict=True):
            speed = row.images_per_s * float(np.exp(-error))
            found.append(Told(row, speed, speed * float(np.exp(-half)), speed * float(np.exp(half))))
    return found


def options_of(told: Sequence[Told]) -> tuple[list[Option], dict[str, float]]:
    """Released weights of the networks, as ``choose`` has them, and what each was measured at."""
    by_network = {(one.row.model, one.row.size): one for one in told}
    options, measured = [], {}
    for name, weights in released().items():
        for result in weights.results:
            one = by_network.get((name.partition(".")[0], result.image_size))
            if one is None or weights.attention:
                continue
            candidate = Candidate(
                name=name,
                spec=Foreign(name, "timm"),
                image_size=result.image_size,
                group=name,
                top1=result.top1,
                licence=weights.licence,
            )
            speed = Speed(images_per_s=one.images_per_s, low=one.low, high=one.high, kind="predicted")
            facts = NetworkFacts(params=one.row.params, macs=int(one.row.macs), speed=speed)
            options.append(Option(candidate=candidate, facts=facts, batch_size=one.row.batch))
            measured[candidate.label] = one.row.images_per_s
    return options, measured


def chosen(options: Sequence[Option], constraint: Constraint) -> Choice:
    """The choice as the package makes it; the fastest where nothing keeps the speed."""
    try:
        judged = decide(options, constraint)
        parts = {name: getattr(judged, name) for name in judged.__dataclass_fields__}
    except NothingKeeps as nothing:
        fastest = max(nothing.options, key=lambda o: o.images_per_s or 0.0)
        parts = {"best": fastest, "front": (), "maybe": (), "alternatives": (), "rejected": ()}
        parts["options"] = nothing.options
    floor = constraint.min_throughput or 0.0
    return Choice(
        **parts, constraint=constraint, conditions=Conditions(), kind="predicted", device="", aligned=(), floor=floor
    )


def with_rows(options: Sequence[Option], carried: Sequence[Option], measured: Mapping[str, float]) -> list[Option]:
    """The options once those carried in a kit were measured: they go by it, the others are set by them."""
    ratios = [float(np.log(measured[o.label] / (o.images_per_s or 1.0))) for o in carried]
    networks = {(o.spec.arch if isinstance(o.spec, Foreign) else o.spec.name, o.image_size) for o in carried}
    made = []
    for o in options:
        assert o.speed is not None
        assert isinstance(o.spec, Foreign)
        if (o.spec.arch, o.image_size) in networks:
            true = measured[o.label]
            speed = Speed(images_per_s=true, low=true, high=true, kind="measured")
        else:
            speed = set_by(o.speed, ratios)
        made.append(replace(o, facts=replace(o.facts, speed=speed)))
    return made


def speeds_of(options: Sequence[Option], measured: Mapping[str, float], count: int) -> list[float]:
    """Speeds to ask for, along the table's own front."""
    best, front = -1.0, []
    for o in sorted(options, key=lambda o: (-measured[o.label], -(o.top1 or 0.0))):
        if (o.top1 or 0.0) > best:
            best = o.top1 or 0.0
            front.append(measured[o.label])
    ends = np.percentile(np.log(front), [5, 95])
    return np.exp(np.linspace(ends[0], ends[1], count)).tolist()


def answers(name: str, options: list[Option], measured: Mapping[str, float], count: int) -> list[dict[str, Any]]:
    """One record for each speed, confidence and size of kit."""
    found = []
    for floor in speeds_of(options, measured, count):
        possible = [o for o in options if measured[o.label] >= floor]
        best = max(possible, key=lambda o: o.top1 or 0.0)
        speed = measured[best.label]
        found.append(
            {
                "card": name,
                "asked": round(floor, 2),
                "confidence": 1.0,
                "kit": EVERY,
                "answer": best.label,
                "top1": best.top1,
                "measured": round(speed, 2),
                "kept": True,
                "used": round(floor / speed, 4),
                "best": best.label,
                "best_top1": best.top1,
                "lost": 0.0,
            }
        )
        for confidence in CONFIDENCES:
            constraint = Constraint(min_throughput=floor, confidence=confidence)
            first = chosen(options, constraint)
            for kit in KITS:
                answer = first.best
                if kit:
                    carried = could_win(first, kit)
                    answer = chosen(with_rows(options, carried, measured), constraint).best
                speed = measured[answer.label]
                found.append(
                    {
                        "card": name,
                        "asked": round(floor, 2),
                        "confidence": confidence,
                        "kit": kit,
                        "answer": answer.label,
                        "top1": answer.top1,
                        "measured": round(speed, 2),
                        "kept": speed >= floor,
                        "used": round(floor / speed, 4),
                        "best": best.label,
                        "best_top1": best.top1,
                        "lost": round(max(0.0, (best.top1 or 0.0) - (answer.top1 or 0.0)), 3),
                    }
                )
    return found


def summary(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for each card, confidence and kit, and one over all cards."""
    lines = []
    cards = [*dict.fromkeys(r["card"] for r in records)]
    for card in [*cards, "all"]:
        for confidence, kits in ((CONFIDENCES[0], KITS), (CONFIDENCES[1], KITS), (1.0, (EVERY,))):
            for kit in kits:
                some = [
                    r
                    for r in records
                    if card in ("all", r["card"]) and (r["confidence"], r["kit"]) == (confidence, kit)
                ]
                lines.append(
                    {
                        "card": card,
                        "confidence": confidence,
                        "kit": kit,
                        "speeds": len(some),
                        "lost_mean": round(statistics.mean(r["lost"] for r in some), 2),
                        "kept_pct": round(100 * statistics.mean(r["kept"] for r in some), 1),
                        "used_median_pct": round(100 * statistics.median(r["used"] for r in some), 1),
                    }
                )
    return lines


def markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    """The summary as a table."""
    text = [
        "| card | confidence | networks measured there first | speeds | points lost, mean | kept % | speed used, "
        "median % |",
        "|---|---|---|---|---|---|---|",
    ]
    text += [f"| {' | '.join(str(value) for value in line.values())} |" for line in lines]
    return "\n".join(text) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tables", type=Path, required=True, help="folder with timm's benchmark-*.csv")
    parser.add_argument("--cache", type=Path, default=None, help="folder for traces (default: the user's cache)")
    parser.add_argument("--cards", nargs="+", choices=CARDS, default=list(CARDS))
    parser.add_argument("--speeds", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="print records as JSON instead of a table")
    parser.add_argument("--output", type=Path, default=None, help="write records there as JSON, and the table beside")
    options = parser.parse_args(arguments)
    tables = load(options.tables, options.cache or cache_dir() / "predictor-traces", options.cards)
    named = {table.name: table for table in tables}
    records: list[dict[str, Any]] = []
    for card in options.cards:
        if (table := CARDS[card]) not in named:
            print(f"no table {table}: {card} is left out", file=sys.stderr)
            continue
        found, measured = options_of(told_without(named[table], tables))
        records += answers(card, found, measured, options.speeds)
    lines = summary(records)
    if options.output:
        write_json(options.output, {"command": "python -m benchmarks.front", "summary": lines, "records": records})
        seal(options.output)
        note = "`python -m benchmarks.front --tables DIR`; every card left out of the fit, and every family.\n\n"
        write_record(options.output.with_suffix(".md"), note + markdown(lines))
    print(json.dumps(records) if options.json else markdown(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
