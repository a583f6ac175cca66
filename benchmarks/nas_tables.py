"""Searches on tables of networks that others trained: our sampler against random search, regularised evolution,
REINFORCE and Optuna's estimator; what a search by FLOPs costs a user of an A100; what zero-cost scores are worth.

    python -m benchmarks.nas_tables [--tables FOLDER] [--seeds 20] [--records FILE]
        [--table mnasnet|macro] [--reward REWARD ...] [--only METHOD ...] [--again] [--list]

The tables are Accel-NASBench's MnasNet space (3,425 networks, ImageNet accuracy by a proxy, images/s on an A100 and an
RTX 3090) and NAS-Bench-Macro (6,561 networks, CIFAR-10, mean of three trainings). A query is one row of a table. A
method whose proposal is no row of the table, or was queried before, gets the nearest row that is left (fewest choices
apart). Rewards are accuracy x (cost / median cost)^-0.07, by MACs, by throughput as measured on each card, and by
throughput as this package predicts it for the A100, which saw none of these networks. Regret is against the best of the
table, in points of the reward; the hypervolume of accuracy and the logarithm of the cost is a share of the whole
table's. Each row of the records is made once: run again, it goes on, and ``--table``, ``--reward`` and ``--only`` say
which rows; ``--list`` says which are there and makes none. How many kin a local turn looks at was chosen on half of the
seeds of NAS-Bench-Macro. The predictions take a quarter of an hour the first time, so what needs them comes last, and
so does Optuna's estimator, which takes a minute a search.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.nas_methods import Method, Table, evolution, guided, random, reinforce, tpe
from benchmarks.records import machine, replace_record
from convscale.arch.parts import RELU, RELU6, HeadSpec, InputSpec, StemSpec
from convscale.arch.rows import conv, run, stages
from convscale.arch.spec import NetSpec

BUDGETS = (100, 300, 1000)
METHODS = ("guided", "random", "evolution", "reinforce", "tpe")
REWARDS = (
    ("mnasnet", "a100"),
    ("mnasnet", "rtx3090"),
    ("mnasnet", "macs"),
    ("macro", "macs"),
    ("mnasnet", "predicted"),
)
"""Tables and what their reward's cost is; ``predicted``: the time on the A100 as this package predicts it."""
CARDS = {"a100": "a100-40gb", "rtx3090": "rtx-3090"}
"""Cards that the table was measured on, by our names."""
SCORED = 100
"""Networks of each table that zero-cost scores are asked for."""
PREDICTED = 200
"""Networks of the table whose predicted speed is compared with the measured one."""
FEW_SEEDS = 5
"""Of Optuna's estimator, which takes a minute a search."""


def _read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def mnasnet(folder: Path, cards: Sequence[str] = ("a100",), *, predictions: bool = False) -> Table:
    """Accel-NASBench's networks that were measured on all of some cards, with our predictions of their speed on the
    A100 where they are asked for.
    """
    rows = [row for row in _read(folder / "nas-mnasnet-imagenet.csv") if all(row[speed_on(card)] for card in cards)]
    digits = np.array(
        [[int(digit) for key in ("expansion", "kernel", "layers", "se") for digit in row[key]] for row in rows]
    )
    genes = np.stack([np.unique(column, return_inverse=True)[1] for column in digits.T], axis=1)
    costs = {
        "macs": np.array([float(row["macs_m"]) for row in rows]),
        **{card: 1 / np.array([float(row[speed_on(card)]) for row in rows]) for card in cards},
    }
    if predictions:
        costs["predicted"] = 1 / np.array(predicted([mnasnet_spec(row) for row in rows]))
    return Table(
        name="mnasnet",
        genes=genes,
        accuracy=np.array([float(row["top1"]) for row in rows]),
        costs=costs,
        params=np.array([float(row["params_m"]) * 1e6 for row in rows]),
    )


def speed_on(card: str) -> str:
    """The column of the speed on a card; two networks lack that on the RTX 3090."""
    return f"{card}_images_per_s"


def mnasnet_spec(row: dict[str, str], image_size: int = 224) -> NetSpec:
    """A row's network; parameters agree exactly."""
    rows = []
    for at, (width, stride) in enumerate(zip((16, 24, 40, 80, 112, 192, 320), (1, 2, 2, 2, 1, 2, 1), strict=True)):
        expansion, kernel, layers, se = (int(row[key][at]) for key in ("expansion", "kernel", "layers", "se"))
        block = run(layers, kernel, 0 if expansion == 1 else expansion, width, RELU, se=0.25 * se)
        rows.append((stride, (block,)))
    name = "-".join(row[key] for key in ("expansion", "kernel", "layers", "se"))
    return NetSpec(
        name=name,
        input=InputSpec(size=image_size),
        stem=StemSpec(widths=(32,)),
        stages=stages(*rows),
        head=HeadSpec(width=1280),
    )


def macro(folder: Path) -> Table:
    """NAS-Bench-Macro's networks."""
    rows = _read(folder / "nas-macro-cifar10.csv")
    return Table(
        name="macro",
        genes=np.array([[int(digit) for digit in row["architecture"]] for row in rows]),
        accuracy=np.array([np.mean([float(row[f"acc_{n}"]) for n in (1, 2, 3)]) for row in rows]),
        costs={"macs": np.array([float(row["macs"]) for row in rows])},
        params=np.array([float(row["params"]) for row in rows]),
    )


def macro_spec(row: dict[str, str]) -> NetSpec:
    """A row's network; parameters agree exactly. An identity that changes shape is a 1x1 convolution."""
    rows, at = [], 0
    for width, layers in ((64, 2), (128, 3), (256, 3)):
        runs = []
        for number, digit in enumerate(row["architecture"][at : at + layers]):
            if digit == "0" and number == 0:
                runs.append(conv(1, 1, width, RELU6))
            elif digit != "0":
                runs.append(run(1, 3 if digit == "1" else 5, 3 if digit == "1" else 6, width, RELU6))
        at += layers
        rows.append((2, tuple(runs)))
    return NetSpec(
        name=row["architecture"],
        input=InputSpec(size=32),
        stem=StemSpec(widths=(32,), stride=1, activation=RELU6),
        stages=stages(*rows),
        head=HeadSpec(width=1280, activation=RELU6),
    )


def predicted(specs: list[NetSpec], card: str = "a100") -> list[float]:
    """Images/s on a card as this package predicts it: AMP, channels-last, eager, batch 256. Kept in its cache."""
    from convscale.choice.basis import Asked, basis_of
    from convscale.choice.facts import SizedSpec
    from convscale.choice.speeds import facts_of

    basis = basis_of(Asked(device=CARDS[card], layout="nhwc", precision="amp", batch_size=256))
    wanted = [SizedSpec(spec, spec.input.size) for spec in specs]
    found: dict[SizedSpec, float] = {}
    for start in range(0, len(wanted), 200):
        for one, facts in facts_of(wanted[start : start + 200], basis).items():
            assert facts.speed is not None, facts.failed
            found[one] = facts.speed.images_per_s
        print(f"predicted {min(start + 200, len(wanted))} of {len(wanted)}", flush=True)
    return [found[one] for one in wanted]


def hypervolume(accuracy: np.ndarray, cost: np.ndarray, table: Table, by: str) -> float:
    """The area under the front of accuracy and the logarithm of the cost, over the whole table's."""
    whole = _area(table.accuracy, table.costs[by], table, by)
    return _area(accuracy, cost, table, by) / whole


def _area(accuracy: np.ndarray, cost: np.ndarray, table: Table, by: str) -> float:
    logs, all_logs = np.log(cost), np.log(table.costs[by])
    x = (all_logs.max() - logs) / (all_logs.max() - all_logs.min())
    y = (accuracy - table.accuracy.min()) / (table.accuracy.max() - table.accuracy.min())
    area, top = 0.0, 0.0
    for at in np.argsort(-x):
        if y[at] > top:
            area += x[at] * (y[at] - top)
            top = float(y[at])
    return area


def searched(table: Table, by: str, method: str, seeds: int) -> dict[str, Any]:
    """A record: one method on one reward."""
    run_method: Method = {
        "random": random,
        "evolution": evolution,
        "reinforce": reinforce,
        "guided": partial(guided, by=by),
        "tpe": tpe,
    }[method]
    rewards, truths = table.reward(by), [card for card in CARDS if card in table.costs] or ["macs"]
    true = {truth: table.reward(truth) for truth in truths}
    rows: dict[str, list[list[float]]] = {
        "regret": [],
        "hypervolume": [],
        **{f"regret_{truth}": [] for truth in truths},
    }
    for seed in range(seeds):
        queried = run_method(table, rewards, np.random.default_rng(seed), max(BUDGETS))
        heads = [queried[:budget] for budget in BUDGETS]
        rows["regret"].append([float(rewards.max() - rewards[head].max()) for head in heads])
        rows["hypervolume"].append([hypervolume(table.accuracy[h], table.costs[by][h], table, by) for h in heads])
        found = [head[rewards[head].argmax()] for head in heads]
        for truth in truths:
            rows[f"regret_{truth}"].append([float(true[truth].max() - true[truth][row]) for row in found])
    record: dict[str, Any] = {"table": table.name, "reward": by, "method": method, "seeds": seeds}
    for name, values in rows.items():
        array = np.array(values)
        for at, budget in enumerate(BUDGETS):
            record[f"{name}_{budget}"] = float(array[:, at].mean())
            record[f"{name}_{budget}_sd"] = float(array[:, at].std(ddof=1))
    return record


def flops_cost(table: Table, card: str = "a100") -> dict[str, Any]:
    """What the best network by each reward is on a card, and what a user loses there: the best accuracy of any network
    of the table at least as fast as the one found by MACs; and over 19 speeds that are asked for (every 20th of the
    table's), by how much the best of the front by MACs is behind the best of all that keep it.
    """
    record: dict[str, Any] = {"table": table.name, "reward": "all", "method": whole_table(card), "seeds": 0}
    speeds = 1 / table.costs[card]
    for by in table.costs:
        row = int(table.reward(by).argmax())
        record[by] = {
            "top1": float(table.accuracy[row]),
            f"{card}_images_per_s": float(speeds[row]),
            "macs_m": float(table.costs["macs"][row]),
            f"reward_{card}": float(table.reward(card)[row]),
            "best_top1_as_fast": float(table.accuracy[speeds >= speeds[row]].max()),
        }
    losses = []
    on_front = front_by_macs(table)
    for floor in np.quantile(speeds, np.linspace(0.05, 0.95, 19)):
        keeps = speeds >= floor
        losses.append(float(table.accuracy[keeps].max() - table.accuracy[keeps & on_front].max(initial=-np.inf)))
    kept = [loss for loss in losses if math.isfinite(loss)]
    record["floors"] = len(losses)
    record["floors_kept_by_macs"] = len(kept)
    record["loss_of_macs_front_mean"] = float(np.mean(kept))
    record["loss_of_macs_front_most"] = float(max(kept))
    return record


def whole_table(card: str) -> str:
    """What the row of ``flops_cost`` is called."""
    return "whole table" if card == "a100" else f"whole table on {card}"


def prediction_on(card: str) -> str:
    """What the row of ``prediction`` is called."""
    return "prediction" if card == "a100" else f"prediction on {card}"


def front_by_macs(table: Table) -> np.ndarray:
    """bool (N,): networks that no other beats in accuracy and MACs: what a search by FLOPs would keep."""
    order = np.lexsort((-table.accuracy, table.costs["macs"]))
    found, top = np.zeros(len(order), dtype=bool), -np.inf
    for row in order:
        if table.accuracy[row] > top:
            found[row], top = True, table.accuracy[row]
    return found


def prediction(folder: Path, card: str = "a100") -> dict[str, Any]:
    """How well this package predicts a card's speed of some of the table's networks, beside what MACs say."""
    rows = [row for row in _read(folder / "nas-mnasnet-imagenet.csv") if row[speed_on(card)]][:PREDICTED]
    measured = np.array([float(row[speed_on(card)]) for row in rows])
    macs = np.array([float(row["macs_m"]) for row in rows])
    guess = np.array(predicted([mnasnet_spec(row) for row in rows], card))
    off = np.log(guess / measured)
    first, second = np.triu_indices(len(rows), 1)
    apart = np.abs(np.log(measured[first] / measured[second]))
    close = (apart > math.log(1.1)) & (apart < math.log(1.25))

    def ordered(values: np.ndarray) -> float:
        right = (measured[first] > measured[second]) == (values[first] > values[second])
        return float(right[close].mean())

    return {
        "table": "mnasnet",
        "reward": "none",
        "method": prediction_on(card),
        "seeds": 0,
        "networks": len(rows),
        "rank_correlation": spearman(measured, guess),
        "macs_rank_correlation": spearman(measured, -macs),
        "median_ratio": float(np.exp(np.median(off))),
        "median_error_of_scaled": float(np.median(np.abs(off - np.median(off)))),
        "close_pairs_right": ordered(guess),
        "close_pairs_right_by_macs": ordered(-macs),
    }


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation."""
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)  # pyright: ignore[reportAttributeAccessIssue]


def scored(table: Table, specs: Callable[[int], NetSpec], name: str, size: int) -> dict[str, Any]:
    """A record: the rank correlation of a zero-cost score with accuracy, over some networks drawn from a table."""
    from scipy.stats import kendalltau

    from convscale.nas.zero_cost import zero_cost

    rows = np.random.default_rng(0).permutation(len(table.genes))[:SCORED]
    values = np.array([zero_cost(name, specs(int(row)), num_classes=10) for row in rows])
    good = np.isfinite(values)
    tau = kendalltau(values[good], table.accuracy[rows][good]).statistic  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "table": table.name,
        "reward": "accuracy",
        "method": f"zero-cost {name}",
        "seeds": 1,
        "networks": int(good.sum()),
        "image_size": size,
        "spearman": spearman(values[good], table.accuracy[rows][good]),
        "kendall": float(tau),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, default=Path("../shared/measurements"))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--table", choices=("mnasnet", "macro"), help="rows of this one alone")
    rewards = sorted({by for _, by in REWARDS} | {"accuracy", "all", "none"})
    parser.add_argument("--reward", nargs="+", choices=rewards, help="rows of these alone; of the scores: accuracy")
    parser.add_argument("--only", nargs="+", help="methods, or their first words: guided tpe zero-cost 'zero-cost zen'")
    parser.add_argument("--again", action="store_true", help="make rows that are there anew")
    parser.add_argument("--list", action="store_true", help="say which rows are there, and make none")
    parser.add_argument("--records", type=Path, default=Path("results/nas_tables.jsonl"))
    args = parser.parse_args()
    from convscale.nas.zero_cost import SCORES

    made = [json.loads(line) for line in args.records.read_text().splitlines()] if args.records.is_file() else []
    keys = ("table", "reward", "method")
    there = {tuple(row[key] for key in keys) for row in made}
    read = cache(partial(_table, args.tables))
    jobs: list[tuple[tuple[str, str, str], Callable[[], dict[str, Any]]]] = []
    late: list[tuple[tuple[str, str, str], Callable[[], dict[str, Any]]]] = []
    for method in METHODS:
        seeds = min(args.seeds, FEW_SEEDS) if method == "tpe" else args.seeds
        for name, by in REWARDS:
            make = partial(_searched, read, name, by, method, seeds)
            (late if by == "predicted" else jobs).append(((name, by, method), make))
    for score in SCORES:
        jobs.append((("macro", "accuracy", f"zero-cost {score}"), partial(_macro_scored, read, args.tables, score)))
        jobs.append((("mnasnet", "accuracy", f"zero-cost {score}"), partial(_mnasnet_scored, read, args.tables, score)))
    for card in CARDS:
        jobs.append((("mnasnet", "all", whole_table(card)), partial(_flops_cost, read, card)))
        jobs.append((("mnasnet", "none", prediction_on(card)), partial(prediction, args.tables, card)))
    jobs = sorted([*jobs, *late], key=lambda job: (job[0][2] == "tpe", job[0][1] == "predicted"))
    for key, make in jobs:
        name, by, method = key
        if (args.table and name != args.table) or (args.reward and by not in args.reward):
            continue
        if args.only and not {method, method.split()[0]} & {*args.only}:
            continue
        if args.list:
            print(*key, "is there" if key in there else "is missing", sep=", ")
        if args.list or (key in there and not args.again):
            continue
        record = {**make(), "machine": machine()}
        replace_record(args.records, record, keys)
        shown = {name: round(value, 3) for name, value in record.items() if isinstance(value, float)}
        print(*key, {name: value for name, value in shown.items() if not name.endswith("_sd")}, flush=True)


def _table(folder: Path, name: str) -> Table:
    """``macro``, ``mnasnet``, ``predicted`` (the same with predictions) or ``rtx3090`` (with that card's speeds)."""
    if name == "macro":
        return macro(folder)
    return mnasnet(folder, tuple(CARDS) if name == "rtx3090" else ("a100",), predictions=name == "predicted")


def _searched(read: Callable[[str], Table], name: str, by: str, method: str, seeds: int) -> dict[str, Any]:
    return searched(read(by if by in ("predicted", "rtx3090") else name), by, method, seeds)


def _flops_cost(read: Callable[[str], Table], card: str) -> dict[str, Any]:
    return flops_cost(read("mnasnet" if card == "a100" else card), card)


def _macro_scored(read: Callable[[str], Table], folder: Path, score: str) -> dict[str, Any]:
    rows = _read(folder / "nas-macro-cifar10.csv")
    return scored(read("macro"), lambda row: macro_spec(rows[row]), score, 32)


def _mnasnet_scored(read: Callable[[str], Table], folder: Path, score: str) -> dict[str, Any]:
    """At 64 px: a score at 224 takes as long as a brief training."""
    rows = _read(folder / "nas-mnasnet-imagenet.csv")
    return scored(read("mnasnet"), lambda row: mnasnet_spec(rows[row], 64), score, 64)


if __name__ == "__main__":
    main()
