"""The predictor beside its rivals, on the same rows.

    python -m benchmarks.predictor_rivals --tables DIR [--rows 1200] [--json] [--output results/predictor_rivals.json]

Two contests:

- *Lone convolutions* in single precision with TF32 off (DIR's ``conv-fp32-*.csv``): each of three cards left out in
  turn, everything learnt on the other two.
- *Networks* in NCHW inference of timm's tables: each card left out, every family too (in three groups).

The rivals, each written from its paper or by what its name says:

- *roofline*: the larger of products over the peak and bytes over the bandwidth, kernel by kernel, by the data sheet;
  one factor, the middle of the ratio on what is learnt from.
- *MACs*: proportional, over the card's peak. *log-linear*: linear in logs of counts, time taken in units of the card's
  bandwidth.
- *kernel regression*, after Li, Sun and Jog, "Path Forward Beyond Simulators" (MICRO 2023): kernels fall into classes;
  in each the time is linear in the one of input, products and output that explains it best; on an unseen card a slope
  is scaled by the bandwidths (their inter-GPU model). For networks the classes' sums are fitted, since the tables have
  no time of single kernels.
- *tiles*, after Lee, Phanishayee and Mahajan, "NeuSight" (ASPLOS 2025): the output is cut into tiles, which run in
  waves over the units, and a small neural network gives the share of the roofline that a wave reaches, from figures
  over the card's own; for lone convolutions alone.

*ours* on lone convolutions has products of 3 x 3 kernels with stride 1 divided by 2.25, as Winograd's algorithm needs
them (Lavin and Gray, 2016), and no bound by the sheet. *ours, swept* has seen 100 convolutions of the card too: what
``convscale calibrate --sweep`` would bring.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.predictor import CARD_FOLDS, cross_joined, fit_of, joined, latency_s, ordered_right
from benchmarks.predictor_data import Row, TableFile, find_tables, is_traced, rows_traced_before
from convscale.cost.kernels import Kernel
from convscale.files import write_json, write_text
from convscale.predictor.devices import Device, get_device
from convscale.predictor.fitted import Fitted
from convscale.predictor.fitting import NOISE, Part, fit
from convscale.predictor.interval import folds_of
from convscale.predictor.roofline import MATRIX, PRIOR, net_s, table_of

CARDS = {
    "a100-80gb-pcie": replace(
        get_device("a100-80gb"), name="a100-80gb-pcie", generation="volta", tf32_tflops=19.5, bandwidth_gb_s=1935
    ),
    "v100-pcie-32gb": replace(get_device("v100"), name="v100-pcie-32gb", tf32_tflops=14.1, fp32_tflops=14.1),
    "p100-pcie-16gb": replace(
        get_device("v100"),
        name="p100-pcie-16gb",
        tensor_tflops=18.7,
        tf32_tflops=9.3,
        fp32_tflops=9.3,
        bandwidth_gb_s=732,
        l2_mb=4,
        units=56,
        clock_ghz=1.3,
    ),
}
"""The cards of the lone convolutions by their makers' sheets, TF32 switched off: as a generation that has none."""
SWEPT, SEED = 100, 0


@dataclass(frozen=True, kw_only=True)
class Conv:
    """One lone convolution on one card."""

    kernel: Kernel
    """As eager PyTorch would launch it."""
    seconds: float
    """Measured."""
    shape: tuple[int, int]
    """Kernel and stride."""


def convolutions(path: Path, count: int) -> list[Conv]:
    """A sample of a table; the same shapes of every card, where it has them."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    order = np.random.default_rng(SEED).permutation(len(rows))[:count]
    return [_conv({name: float(rows[i][name]) for name in _COLUMNS}) for i in sorted(order)]


_COLUMNS = ("batch", "in_chs", "out_chs", "kernel", "size", "stride", "padding", "latency_ms")


def _conv(row: Mapping[str, float]) -> Conv:
    batch, c, out, k, size, stride, pad = (int(row[name]) for name in _COLUMNS[:-1])
    side = (size + 2 * pad - k) // stride + 1
    positions = batch * side * side
    kernel = Kernel(
        "conv_1x1" if k == 1 else "conv",
        macs=positions * out * c * k * k,
        in_bytes=4 * batch * c * size * size,
        out_bytes=4 * positions * out,
        weight_bytes=4 * out * c * k * k,
        rows=positions,
        width=out,
        depth=c * k * k,
        channels=c,
        window=k * k,
        step=stride,
        side=side,
        itemsize=4,
    )
    return Conv(kernel=kernel, seconds=row["latency_ms"] / 1e3, shape=(k, stride))


# ---------------------------------------------------------------- rivals on lone convolutions

Told = Callable[[Mapping[str, list[Conv]], list[Conv], Device], np.ndarray]
"""From other cards' convolutions and a card's: the seconds predicted of the latter."""


def _seconds(convs: Sequence[Conv]) -> np.ndarray:
    return np.array([conv.seconds for conv in convs])


def _columns(convs: Sequence[Conv]) -> dict[str, np.ndarray]:
    """Operations, and bytes in and out."""
    k = [conv.kernel for conv in convs]
    return {
        "flops": np.array([2.0 * x.macs for x in k]),
        "in": np.array([float(x.in_bytes + x.weight_bytes) for x in k]),
        "out": np.array([float(x.out_bytes) for x in k]),
    }


def _roofline_s(convs: Sequence[Conv], device: Device) -> np.ndarray:
    c = _columns(convs)
    return np.maximum(c["flops"] / (device.fp32_tflops * 1e12), (c["in"] + c["out"]) / (device.bandwidth_gb_s * 1e9))


def roofline(known: Mapping[str, list[Conv]], convs: list[Conv], device: Device) -> np.ndarray:
    """The data sheet, with one factor."""
    ratios = [np.log(_seconds(some) / _roofline_s(some, CARDS[card])) for card, some in known.items()]
    return _roofline_s(convs, device) * np.exp(np.median(np.concatenate(ratios)))


def macs(known: Mapping[str, list[Conv]], convs: list[Conv], device: Device) -> np.ndarray:
    """Operations over the peak, with one factor."""
    ratios = [
        np.log(_seconds(some) * CARDS[card].fp32_tflops * 1e12 / _columns(some)["flops"])
        for card, some in known.items()
    ]
    factor = np.exp(np.median(np.concatenate(ratios)))
    return factor * _columns(convs)["flops"] / (device.fp32_tflops * 1e12)


def loglinear(known: Mapping[str, list[Conv]], convs: list[Conv], device: Device) -> np.ndarray:
    """Linear in logs; time in units of the card's bandwidth."""

    def design(some: Sequence[Conv]) -> np.ndarray:
        return np.stack([*(np.log(v) for v in _columns(some).values()), np.ones(len(some))], axis=1)

    target = np.concatenate([np.log(_seconds(some) * CARDS[card].bandwidth_gb_s) for card, some in known.items()])
    weights, *_ = np.linalg.lstsq(np.concatenate([design(some) for some in known.values()]), target, rcond=None)
    return np.exp(design(convs) @ weights) / device.bandwidth_gb_s


def kernel_regression(known: Mapping[str, list[Conv]], convs: list[Conv], device: Device) -> np.ndarray:
    """A line in each class of shapes and each card, its driver chosen by what is left; slopes scaled by bandwidths."""
    found = np.empty(len(convs))
    classes = np.array([f"{conv.shape}" for conv in convs])
    for name in np.unique(classes):
        here = np.flatnonzero(classes == name)
        lines = []
        for card, some in known.items():
            mine = [conv for conv in some if f"{conv.shape}" == name] or some
            columns, seconds = _columns(mine), _seconds(mine)
            fits = {key: np.polyfit(v, seconds, 1, w=1 / seconds) for key, v in columns.items()}
            left = {key: np.sum((np.polyval(fits[key], v) / seconds - 1) ** 2) for key, v in columns.items()}
            lines.append((CARDS[card].bandwidth_gb_s, min(left, key=lambda key: left[key]), fits))
        driver = lines[0][1]
        values = _columns([convs[i] for i in here])[driver]
        scaled = [np.polyval(fits[driver], values) * bandwidth / device.bandwidth_gb_s for bandwidth, _, fits in lines]
        found[here] = np.maximum(np.mean(scaled, axis=0), 1e-6)
    return found


def tiles(known: Mapping[str, list[Conv]], convs: list[Conv], device: Device) -> np.ndarray:
    """Waves of tiles, and a small network for the share of the roofline that they reach."""
    import torch
    from torch import nn

    def features(some: Sequence[Conv], card: Device) -> tuple[torch.Tensor, np.ndarray]:
        k = table_of([[(conv.kernel, 1)] for conv in some]).values
        count = np.ceil(k["rows"] / 128) * np.ceil(k["width"] / 128)
        waves = np.ceil(count / card.units)
        ideal = _roofline_s(some, card) * waves * card.units / count  # the last wave is as long as a full one
        flops, moved = _columns(some)["flops"], _columns(some)["in"] + _columns(some)["out"]
        given = [
            np.log(flops / count / card.fp32_tflops / 1e12 * card.units),
            np.log(moved / count / card.bandwidth_gb_s / 1e9 * card.units),
            np.log(waves),
            np.log(flops / moved),
            np.log(k["depth"]),
            np.log(k["width"]),
            k["window"] / 9,
            k["step"],
        ]
        return torch.tensor(np.stack(given, axis=1), dtype=torch.float32), ideal

    torch.manual_seed(SEED)
    parts = [features(some, CARDS[card]) for card, some in known.items()]
    x, ideal = torch.cat([f for f, _ in parts]), np.concatenate([i for _, i in parts])
    y = torch.tensor(np.log(np.concatenate([_seconds(some) for some in known.values()]) / ideal), dtype=torch.float32)
    mean, scale = x.mean(0), x.std(0) + 1e-6
    net = nn.Sequential(nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(600):
        optimizer.zero_grad()
        loss = (net((x - mean) / scale)[:, 0] - y).abs().mean()
        loss.backward()
        optimizer.step()
    mine, there = features(convs, device)
    with torch.no_grad():
        return there * np.exp(net((mine - mean) / scale)[:, 0].numpy())


def _winograd(conv: Conv) -> Kernel:
    few = conv.shape == (3, 1)
    return conv.kernel._replace(macs=int(conv.kernel.macs / 2.25)) if few else conv.kernel


def _part(convs: Sequence[Conv], device: Device, card: str = "") -> Part:
    table = table_of([[(_winograd(conv), 1)] for conv in convs])
    return Part(table=table, latency_s=_seconds(convs), device=device, card=card)


def _known(known: Mapping[str, list[Conv]]) -> dict[str, float]:
    """Ours, of the other cards: the mean of what they reach is taken for the card's."""
    start = {**PRIOR, "sheet": 1e-6}
    parts = [_part(some, CARDS[card], card) for card, some in known.items()]
    return fit(parts, start=start, free=[name for name in fit_names(parts) if name not in ("sheet",)])


def fit_names(parts: Sequence[Part]) -> list[str]:
    """Coefficients that lone convolutions speak of, and what each card reaches."""
    kinds = ("compute.conv", "compute.conv_1x1", "memory.conv", "memory.conv_1x1", "compute.general")
    shared = ("p", "overhead_us", "peak", "bandwidth", "depth0", "width0", "ragged", "cache.gain", "cache.share")
    cards = [f"{part.card}:{rate}" for part in parts if part.card for rate in ("peak", "bandwidth")]
    return [*kinds, *shared, *cards]


def ours(known: Mapping[str, list[Conv]], convs: list[Conv], device: Device) -> np.ndarray:
    """This package's model, fitted on the other cards."""
    return net_s(_part(convs, device).table, device, {n: v for n, v in _known(known).items() if ":" not in n})


def swept(known: Mapping[str, list[Conv]], convs: list[Conv], device: Device) -> np.ndarray:
    """The same with a sweep of the card: its convolutions are split, those swept are predicted by the others."""
    c = {name: value for name, value in _known(known).items() if ":" not in name}
    found = np.empty(len(convs))
    order = np.random.default_rng(SEED).permutation(len(convs))
    for part in (order[: len(order) // 2], order[len(order) // 2 :]):
        others = np.setdiff1d(order, part)[:SWEPT]
        seen = replace(_part([convs[i] for i in others], device), weight=NOISE / 0.1)
        names = [name for name in fit_names([]) if name in c]
        made = fit([seen], start=c, free=names, ridge=dict.fromkeys(names, 0.3))
        found[part] = net_s(_part([convs[i] for i in part], device).table, device, made)
    return found


LONE: dict[str, Told] = {
    "ours": ours,
    "ours, swept": swept,
    "roofline": roofline,
    "MACs": macs,
    "log-linear": loglinear,
    "kernel regression (Li et al.)": kernel_regression,
    "tiles (NeuSight)": tiles,
}


def lone(folder: Path, count: int, log: Callable[[str], None]) -> list[dict[str, Any]]:
    """One record for each rival and card left out."""
    sets = {card: convolutions(folder / f"conv-fp32-nchw-pt210-{card}.csv", count) for card in CARDS}
    records = []
    for card, convs in sets.items():
        known = {other: some for other, some in sets.items() if other != card}
        for name, told in LONE.items():
            errors = np.log(told(known, convs, CARDS[card]) / _seconds(convs))
            records.append({"contest": "lone convolutions", "left_out": card, "method": name, **figures(errors)})
        log(f"lone convolutions: {card}")
    return records


def figures(errors: np.ndarray) -> dict[str, Any]:
    """Median, 90th percentile and bias of the speeds' errors in %."""
    off = 100 * np.abs(np.expm1(-errors))
    return {
        "rows": len(errors),
        "median_pct": round(float(np.median(off)), 1),
        "p90_pct": round(float(np.percentile(off, 90)), 1),
        "bias_pct": round(float(100 * np.expm1(-np.median(errors))), 1),
    }


# ---------------------------------------------------------------- rivals on networks

Sheets = Sequence[tuple[TableFile, list[Row]]]


def _sums(rows: Sequence[Row]) -> np.ndarray:
    """(networks, classes): operations of each kind of product, bytes of each kind of kernel, launches."""
    table = table_of([row.kernels for row in rows])
    v, kinds = table.values, sorted(set(range(len(MATRIX) + 20)))
    columns = []
    for kind in kinds:
        mine = table.kind == kind
        for value in (2 * v["macs"], v["in_bytes"] + v["out_bytes"] + v["weight_bytes"]):
            columns.append(np.bincount(table.net, weights=value * table.count * mine, minlength=len(rows)))
    columns.append(np.bincount(table.net, weights=table.count, minlength=len(rows)))
    return np.stack(columns, axis=1)


def _network_regression(known: Sheets, rows: Sequence[Row], device: Device) -> np.ndarray:
    """Each kind of kernel linear in its operations and bytes, slopes scaled by the bandwidths."""
    from scipy.optimize import nnls

    design = np.concatenate([_sums(some) / table.device.bandwidth_gb_s for table, some in known])
    seconds = np.concatenate([latency_s(some) for _, some in known])
    scale = np.maximum((design / seconds[:, None]).max(axis=0), 1e-30)
    weights, _ = nnls(design / seconds[:, None] / scale, np.ones(len(seconds)), maxiter=10_000)
    return (_sums(rows) / device.bandwidth_gb_s) @ (weights / scale)


def _plain_roofline(rows: Sequence[Row], device: Device) -> np.ndarray:
    table = table_of([row.kernels for row in rows])
    v = table.values
    once = np.maximum(
        2 * v["macs"] / (device.tensor_tflops * 1e12),
        (v["in_bytes"] + v["out_bytes"] + v["weight_bytes"]) / (device.bandwidth_gb_s * 1e9),
    )
    return np.bincount(table.net, weights=once * table.count, minlength=len(rows))


def _one_factor(told: Callable[[Sequence[Row], Device], np.ndarray]) -> Callable[..., np.ndarray]:
    def scaled(known: Sheets, rows: Sequence[Row], device: Device) -> np.ndarray:
        ratios = [np.log(latency_s(some) / told(some, table.device)) for table, some in known]
        return told(rows, device) * np.exp(np.median(np.concatenate(ratios)))

    return scaled


def _network_loglinear(known: Sheets, rows: Sequence[Row], device: Device) -> np.ndarray:
    def design(some: Sequence[Row]) -> np.ndarray:
        logs = [np.log([getattr(row, name) for row in some]) for name in ("macs", "activations", "params", "batch")]
        return np.stack([*logs, np.ones(len(some))], axis=1)

    target = np.concatenate([np.log(latency_s(some) * table.device.bandwidth_gb_s) for table, some in known])
    weights, *_ = np.linalg.lstsq(np.concatenate([design(some) for _, some in known]), target, rcond=None)
    return np.exp(design(rows) @ weights) / device.bandwidth_gb_s


NETWORKS: dict[str, Callable[..., np.ndarray]] = {
    "roofline": _one_factor(_plain_roofline),
    "MACs": _one_factor(lambda rows, d: np.array([2 * r.macs * r.batch for r in rows]) / (d.tensor_tflops * 1e12)),
    "log-linear": _network_loglinear,
    "kernel regression (Li et al.)": _network_regression,
}


def networks(folder: Path, log: Callable[[str], None], every: int) -> list[dict[str, Any]]:
    """One record for each rival and table of a card left out."""
    records = []
    tables = [(t, rows_traced_before(t)[::every]) for t in find_tables(folder) if is_traced(t) and t.torch != "pt210"]
    for name in ("eager-nchw", "compiled"):
        mine = [(table, rows) for table, rows in tables if table.set_name == name]
        near: Fitted | None = None
        for card in sorted({table.device.name for table, _ in mine}):
            others = [(t, rows) for t, rows in mine if t.device.name != card]
            folds = folds_of([row.family for _, rows in mine for row in rows], CARD_FOLDS)
            fits = []
            for out in folds:
                fits.append(fit_of([(t, [r for r in rows if r.family not in out]) for t, rows in others], near))
                near = fits[-1]
            for table, rows in mine:
                if table.device.name != card:
                    continue
                base = {"contest": name, "left_out": f"{card} ({table.name})"}
                part = joined(cross_joined([(table, rows)], folds, fits))
                pairs = {"pairs_right_pct": round(ordered_right(part.rows, part.errors), 1)}
                records.append({**base, "method": "ours", **figures(part.errors), **pairs})
                for label, told in NETWORKS.items():
                    kept, errors = _crossed(told, table, rows, others, folds)
                    pairs = {"pairs_right_pct": round(ordered_right(kept, errors), 1)}
                    records.append({**base, "method": label, **figures(errors), **pairs})
            log(f"{name}: {card}")
    return records


def _crossed(
    told: Callable[..., np.ndarray], table: TableFile, rows: Sequence[Row], others: Sheets, folds: Sequence[set[str]]
) -> tuple[list[Row], np.ndarray]:
    kept: list[Row] = []
    errors = []
    for out in folds:
        if here := [row for row in rows if row.family in out]:
            known = [(t, [row for row in some if row.family not in out]) for t, some in others]
            kept += here
            errors.append(np.log(told(known, here, table.device) / latency_s(here)))
    return kept, np.concatenate(errors)


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """The figures as a table."""
    lines = [
        "| contest | left out | method | rows | median % | 90th % | bias % | pairs right % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        cells = [r["contest"], r["left_out"], r["method"], r["rows"], r["median_pct"], r["p90_pct"]]
        cells += [f"{r['bias_pct']:+}", r.get("pairs_right_pct", "")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tables", type=Path, required=True, help="folder with the measurements")
    parser.add_argument("--rows", type=int, default=1200, help="convolutions of each card")
    parser.add_argument("--every", type=int, default=1, help="every so many rows of timm's tables")
    parser.add_argument("--json", action="store_true", help="print records as JSON instead of a table")
    parser.add_argument("--output", type=Path, default=None, help="write records there as JSON, and the table beside")
    options = parser.parse_args(arguments)

    def log(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    records = lone(options.tables, options.rows, log)
    records += networks(options.tables, log, options.every)
    if options.output:
        about = {"command": "python -m benchmarks.predictor_rivals", "rows": options.rows, "every": options.every}
        write_json(options.output, {**about, "records": records})
        write_text(options.output.with_suffix(".md"), markdown(records))
    print(json.dumps(records) if options.json else markdown(records))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
