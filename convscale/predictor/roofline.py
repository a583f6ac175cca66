"""How long kernels take: a roofline per kernel with fitted efficiencies.

time = (compute ** p + memory ** p) ** (1 / p) + overhead

compute = 2 * MACs / (peak * efficiency * saturation), memory = bytes / (bandwidth * efficiency). Efficiencies hold for
a mode (eager, compiled, training) and a layout on every card; the card's own figures come from its data sheet. All
coefficients are kept as logarithms of positive numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from convscale.cost.kernels import MATRIX, OTHERS, PHASES, Kernel
from convscale.predictor.devices import Device

KINDS = (*MATRIX, *OTHERS)
_DEPTHWISE = [KINDS.index("depthwise"), KINDS.index("direct")]
_GROUPED = [KINDS.index("group"), KINDS.index("even"), KINDS.index("packed")]
BINDINGS = ("compute", "memory", "launch")

PRIOR: dict[str, float] = {
    "p": 3.0,
    "overhead_us": 3.0,
    "peak": 1.0,
    "bandwidth": 0.9,
    **{f"compute.{kind}": 0.8 for kind in ("conv", "conv1", "linear")},
    "compute.group": 0.3,
    "compute.even": 0.3,
    "compute.packed": 0.3,
    "compute.depthwise": 0.1,
    "compute.direct": 0.1,
    "window0": 9.0,
    "compute.wide": 0.4,
    "direct.generic": 0.7,
    "stats0": 16.0,
    "compute.general": 0.3,
    "compute.input": 0.9,
    "compute.weight": 0.7,
    "direct.weight": 0.3,
    "direct.input": 0.5,
    "depth0": 100.0,
    "width0": 16.0,
    "group0": 16.0,
    "ragged": 1.3,
    "window.depthwise": 0.15,
    **{f"memory.{kind}": 1.0 for kind in KINDS},
    **{f"transform.{kind}": 0.5 for kind in ("conv", "conv1", "group", "even", "packed", "depthwise")},
    "memory.weight": 0.8,
    "memory.backward": 1.0,
    "window.pool": 0.2,
    "special": 150.0,
    "permute": 2.0,
    "transform.odd": 1.3,
    "small.norm": 0.1,
    "small.stats": 0.1,
    "small.reduce": 0.1,
    "small.copy": 0.1,
    "huge": 1.2,
    "cache.gain": 0.5,
    "cache.share": 0.3,
}
"""What each coefficient is before anything was fitted; also the list of their names."""

NAMES = tuple(PRIOR)


@dataclass(frozen=True, kw_only=True)
class Table:
    """Kernels of one or more networks as columns; equal launches of a network are one row."""

    net: np.ndarray
    """Index of the network each row belongs to."""
    count: np.ndarray
    """How often the kernel is launched."""
    kind: np.ndarray
    """Index in ``KINDS``."""
    phase: np.ndarray
    """Index in ``PHASES``."""
    values: Mapping[str, np.ndarray]
    """The other columns of ``Kernel`` as floats."""

    @property
    def nets(self) -> int:
        """How many networks."""
        return int(self.net.max()) + 1 if len(self.net) else 0


_TILE, _SPLITS = 128, 4
"""Side of the tile of a product that one unit makes, and into how many parts of its depth a library splits it. Not
fitted: the batches are large."""
_FIELDS = tuple(name for name in Kernel._fields if name not in ("kind", "phase", "scope"))


def table_of(lists: Sequence[Sequence[tuple[Kernel, int]]]) -> Table:
    """Stack the kernels of several networks."""
    rows = [(net, kernel, count) for net, kernels in enumerate(lists) for kernel, count in kernels]
    return Table(
        net=np.array([net for net, _, _ in rows], dtype=np.int64),
        count=np.array([count for _, _, count in rows], dtype=float),
        kind=np.array([KINDS.index(kernel.kind) for _, kernel, _ in rows], dtype=np.int64),
        phase=np.array([PHASES.index(kernel.phase) for _, kernel, _ in rows], dtype=np.int64),
        values={name: np.array([getattr(kernel, name) for _, kernel, _ in rows], dtype=float) for name in _FIELDS},
    )


def _by_kind(coefficients: Mapping[str, float], group: str, default: float = 0.0) -> np.ndarray:
    return np.array([coefficients.get(f"{group}.{kind}", default) for kind in KINDS])


def _up(channels: np.ndarray, multiple: int) -> np.ndarray:
    return np.ceil(channels / multiple) * multiple


def is_ragged(table: Table) -> np.ndarray:
    """Which kernels multiply matrices with a side that is no multiple of 8, which matrix units pad; an image's few
    channels do not count.
    """
    v = table.values
    dense = (table.kind < len(MATRIX)) & ~np.isin(table.kind, _DEPTHWISE)
    return dense & (((v["channels"] % 8 > 0) & (v["channels"] > 4)) | (v["width"] % 8 > 0))


def compute_s(table: Table, device: Device, c: Mapping[str, float]) -> np.ndarray:
    """Seconds of arithmetic of each row's kernel, once."""
    v = table.values
    half = v["itemsize"] <= 2
    peak = (
        np.where(
            half,
            device.tensor_tflops * device.sustained,
            np.where(table.kind == KINDS.index("linear"), device.fp32_tflops, device.tf32_tflops),
        )
        * 1e12
        * c["peak"]
    )
    matrix = table.kind < len(MATRIX)
    direct = table.kind == KINDS.index("direct")
    depthwise, grouped = np.isin(table.kind, _DEPTHWISE), np.isin(table.kind, _GROUPED)
    efficiency = np.where(matrix, _by_kind(c, "compute", 1.0)[table.kind], 1.0)
    phase = np.array([1.0, c["compute.input"], c["compute.weight"], 1.0])[table.phase]
    phase = np.where(depthwise, np.array([1.0, c["direct.input"], c["direct.weight"], 1.0])[table.phase], phase)
    depth, width = np.maximum(v["depth"], 1), np.maximum(v["width"], 1)
    channels = np.maximum(v["channels"], 1)
    padded = np.where(depthwise | ~matrix, 1.0, _up(channels, 8) / channels * _up(width, 8) / width)
    ragged = np.where(is_ragged(table), c["ragged"], 1.0)
    saturation = depth / (depth + c["depth0"]) * width / (width + c["width0"])
    saturation = np.where(grouped, width / (width + c["group0"]), saturation)
    tensor = 2 * v["macs"] * padded * ragged / (peak * efficiency * phase * saturation)
    tensor = np.minimum(tensor, 2 * v["macs"] / (device.fp32_tflops * 1e12 * c["peak"] * c["compute.general"] * phase))
    # a product of few tiles leaves units idle, though a library splits its depth; a weight's gradient is deep enough to
    # fill them
    tiles = np.maximum(v["rows"] / _TILE, 1) * np.maximum(width / _TILE, 1) * np.maximum(v["groups"], 1)
    filled = np.minimum(1.0, tiles * _SPLITS / device.units)
    tensor = tensor / np.where(table.phase == PHASES.index("weight"), 1.0, filled)
    window = np.maximum(v["window"], 1)
    efficiency = efficiency * np.where(depthwise, window / (window + c["window0"]), 1.0)
    efficiency = efficiency * np.where(direct & ~np.isin(window, (1, 9, 25)), c["direct.generic"], 1.0)
    efficiency = efficiency * np.where(depthwise & ~direct & (window > 49), c["compute.wide"], 1.0)
    general = 2 * v["macs"] / (device.fp32_tflops * 1e12 * c["peak"] * efficiency * phase)
    special = v["specials"] * c["special"] / (device.fp32_tflops * 1e12)
    return np.where(depthwise, general, np.where(matrix, tensor, special))


def memory_s(table: Table, device: Device, c: Mapping[str, float]) -> np.ndarray:
    """Seconds of memory traffic of each row's kernel, once."""
    v = table.values
    maps = v["in_bytes"] + v["out_bytes"]
    moved = maps + v["weight_bytes"]
    bandwidth = device.bandwidth_gb_s * 1e9 * c["bandwidth"] * _by_kind(c, "memory", 1.0)[table.kind]
    bandwidth = bandwidth * np.array([1.0, 1.0, c["memory.weight"], c["memory.backward"]])[table.phase]
    moved = moved * np.where(v["permuted"] > 0, c["permute"], 1.0)
    few = (table.kind == KINDS.index("stats")) & (v["nhwc"] == 0)
    # one block a channel, and a block's own rate is about the same on all cards
    moved = moved * np.where(few, 1 + c["stats0"] * device.bandwidth_gb_s / 936 / np.maximum(v["channels"], 1), 1.0)
    for kind in ("norm", "stats", "reduce", "copy"):
        moved = moved * np.where(
            (table.kind == KINDS.index(kind)) & (v["side"] > 1), 1 + c[f"small.{kind}"] * 7 / v["side"], 1.0
        )
    moved = moved + np.where(
        table.kind == KINDS.index("pool"), c["window.pool"] * v["window"] * v["rows"] * v["itemsize"], 0.0
    )
    depthwise = np.isin(table.kind, _DEPTHWISE)
    moved = moved * np.where(depthwise, 1 + c["window.depthwise"] * (np.sqrt(v["window"]) - 3), 1.0)
    return moved * _missed(maps, device, c) / bandwidth


def _missed(moved: np.ndarray, device: Device, c: Mapping[str, float]) -> np.ndarray:
    """Share of the traffic that reaches memory: maps much smaller than the last-level cache are found there."""
    cached = device.l2_mb * 2**20 * c["cache.share"]
    return np.maximum(1 - c["cache.gain"] / (1 + (moved / cached) ** 2), 0.05)


def transform_s(table: Table, device: Device, c: Mapping[str, float]) -> np.ndarray:
    """Seconds of turning maps to channels-last and back around a matrix kernel on NCHW maps: kernels of their own,
    before and after it.
    """
    v = table.values
    maps = v["in_bytes"] + v["out_bytes"]
    turned = (
        (table.kind < len(MATRIX)) & (table.kind != KINDS.index("direct")) & (v["nhwc"] == 0) & (v["itemsize"] <= 2)
    )
    share = _by_kind(c, "transform")[table.kind] * np.where((v["side"] ** 2) % 8 > 0, c["transform.odd"], 1.0)
    moved = np.where(turned, 2 * maps * share, 0.0)
    return moved * _missed(maps, device, c) / (device.bandwidth_gb_s * 1e9 * c["bandwidth"])


def kernel_s(table: Table, device: Device, c: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Seconds of each row's kernel, once: in total, of arithmetic alone, of memory traffic alone."""
    compute, memory = compute_s(table, device, c), memory_s(table, device, c)
    p = c["p"]
    top = np.maximum(np.maximum(compute, memory), 1e-12)
    low = np.minimum(compute, memory) / top
    work = top * (1 + low**p) ** (1 / p)
    transform = transform_s(table, device, c)
    largest = np.maximum(table.values["in_bytes"], table.values["out_bytes"]) / table.values["itemsize"]
    work = work * np.where(largest > 2**31, c["huge"], 1.0)
    return work + transform + c["overhead_us"] * 1e-6, compute, memory + transform


def net_s(table: Table, device: Device, c: Mapping[str, float]) -> np.ndarray:
    """Seconds of a call of each network."""
    total, _, _ = kernel_s(table, device, c)
    return np.bincount(table.net, weights=total * table.count, minlength=table.nets)


def shares(table: Table, device: Device, c: Mapping[str, float]) -> list[dict[str, Any]]:
    """Of each network's time, what share is bound by arithmetic, by memory, by launches."""
    total, compute, memory = kernel_s(table, device, c)
    spent = total * table.count
    overhead = np.full_like(total, c["overhead_us"] * 1e-6)
    winner = np.where(overhead > np.maximum(compute, memory), 2, np.where(compute > memory, 0, 1))
    result = []
    for net in range(table.nets):
        mine = table.net == net
        whole = spent[mine].sum()
        result.append({name: float(spent[mine & (winner == i)].sum() / whole) for i, name in enumerate(BINDINGS)})
    return result
