"""How long kernels take: a roofline per kernel with fitted efficiencies.

time = (compute ** p + memory ** p) ** (1 / p) + transform + overhead

compute = 2 * MACs / (peak * efficiency * saturation), memory = bytes / (bandwidth * efficiency), transform = the change
of layout around a kernel that wants another one. Efficiencies hold for a mode (eager, compiled, training) and a layout
on every card; the card's own figures come from its data sheet. All coefficients are positive, and fitted as logarithms.

Williams, Waterman and Patterson, "Roofline" (2009), with a smooth edge: p = 1 would add the two times, p = infinity
takes the larger.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from convscale.cost.kernels import MATRIX, OTHERS, PHASES, Kernel
from convscale.predictor.devices import Device

KINDS = (*MATRIX, *OTHERS)
BINDINGS = ("compute", "memory", "launch")
"""What a kernel's time can be bound by."""

PRIOR: dict[str, float] = {
    # The roofline's edge, a launch, and the card's two rates as shares of its data sheet's.
    "p": 3.0,
    "overhead_us": 3.0,
    "peak": 1.0,
    "bandwidth": 0.9,
    # Arithmetic: share of the peak by kind, and what lowers it.
    **{f"compute.{kind}": 0.8 for kind in ("conv", "conv_1x1", "linear")},
    "compute.grouped": 0.3,
    "compute.grouped_pow2": 0.3,
    "compute.grouped_packed": 0.3,
    "compute.depthwise": 0.1,
    "compute.depthwise_native": 0.1,
    "depthwise.window0": 9.0,
    "depthwise.wide": 0.4,
    "depthwise_native.generic": 0.7,
    "batch_norm_train.channels0": 16.0,
    "compute.general": 0.3,
    "compute.input": 0.9,
    "compute.weight": 0.7,
    "depthwise.weight": 0.3,
    "depthwise.input": 0.5,
    "depth0": 100.0,
    "width0": 16.0,
    "grouped.width0": 16.0,
    "ragged": 1.3,
    # Memory: share of the bandwidth by kind and phase, and what is moved beside the maps.
    "window.depthwise": 0.15,
    **{f"memory.{kind}": 1.0 for kind in KINDS},
    **{
        f"transform.{kind}": 0.5
        for kind in ("conv", "conv_1x1", "grouped", "grouped_pow2", "grouped_packed", "depthwise")
    },
    "memory.weight": 0.8,
    "memory.backward": 1.0,
    "window.pool": 0.2,
    "special": 150.0,
    "permute": 2.0,
    "transform.odd": 1.3,
    "small.batch_norm": 0.1,
    "small.batch_norm_train": 0.1,
    "small.reduce": 0.1,
    "small.copy": 0.1,
    "huge": 1.2,
    "cache.gain": 0.5,
    "cache.share": 0.3,
}
"""What each coefficient is before anything was fitted; also the list of their names."""

_DEPTHWISE = [KINDS.index("depthwise"), KINDS.index("depthwise_native")]
_GROUPED = [KINDS.index("grouped"), KINDS.index("grouped_pow2"), KINDS.index("grouped_packed")]
_TILE, _SPLITS = 128, 4
"""Side of the tile of a product that one unit makes, and into how many parts of its depth a library splits it. Not
fitted: the batches are large."""
_HUGE = 2**31
"""Elements of a map that 32-bit indices can not tell apart: libraries then split the batch or use slower kernels."""
_FIELDS = tuple(name for name in Kernel._fields if name not in ("kind", "phase", "scope"))


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

    @property
    def is_matrix(self) -> np.ndarray:
        """Which rows multiply matrices."""
        return self.kind < len(MATRIX)

    @property
    def is_depthwise(self) -> np.ndarray:
        """Which rows are depthwise convolutions."""
        return np.isin(self.kind, _DEPTHWISE)

    @property
    def largest_map(self) -> np.ndarray:
        """Elements of the larger of input and output."""
        return np.maximum(self.values["in_bytes"], self.values["out_bytes"]) / self.values["itemsize"]

    def is_kind(self, kind: str) -> np.ndarray:
        """Which rows are of a kind."""
        return self.kind == KINDS.index(kind)


class KernelTimes(NamedTuple):
    """Seconds of each row's kernel, launched once."""

    total_s: np.ndarray
    """All of it."""
    compute_s: np.ndarray
    """Arithmetic alone."""
    memory_s: np.ndarray
    """Memory traffic alone, changes of layout among it."""

    def binding(self, overhead_s: float) -> np.ndarray:
        """Index in ``BINDINGS`` of what takes longest in each row; memory where memory and arithmetic draw."""
        work = np.where(self.compute_s > self.memory_s, BINDINGS.index("compute"), BINDINGS.index("memory"))
        return np.where(overhead_s > np.maximum(self.compute_s, self.memory_s), BINDINGS.index("launch"), work)


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


def kernel_s(table: Table, device: Device, c: Mapping[str, float]) -> KernelTimes:
    """Seconds of each row's kernel, once.

    Args:
        table: the kernels.
        device: its data sheet.
        c: coefficients, names as in ``PRIOR``.
    """
    compute, memory = _compute_s(table, device, c), _memory_s(table, device, c)
    # The p-norm, scaled by the larger of the two so that no power overflows.
    top = np.maximum(np.maximum(compute, memory), 1e-12)
    low = np.minimum(compute, memory) / top
    work = top * (1 + low ** c["p"]) ** (1 / c["p"])
    work = work * np.where(table.largest_map > _HUGE, c["huge"], 1.0)
    transform = _transform_s(table, device, c)
    return KernelTimes(work + transform + c["overhead_us"] * 1e-6, compute, memory + transform)


def net_s(table: Table, device: Device, c: Mapping[str, float]) -> np.ndarray:
    """Seconds of a call of each network."""
    return np.bincount(table.net, weights=kernel_s(table, device, c).total_s * table.count, minlength=table.nets)


def is_ragged(table: Table) -> np.ndarray:
    """Which kernels multiply matrices with a side that is no multiple of 8, which matrix units pad; an image's few
    channels do not count.
    """
    v = table.values
    dense = table.is_matrix & ~table.is_depthwise
    return dense & (((v["channels"] % 8 > 0) & (v["channels"] > 4)) | (v["width"] % 8 > 0))


def is_huge(table: Table) -> np.ndarray:
    """Which kernels read or write a map of more than 2 ** 31 elements."""
    return table.largest_map > _HUGE


def _by_kind(c: Mapping[str, float], group: str, default: float = 0.0) -> np.ndarray:
    """A group's coefficients, one for each of ``KINDS``."""
    return np.array([c.get(f"{group}.{kind}", default) for kind in KINDS])


def _by_phase(table: Table, *values: float) -> np.ndarray:
    """One value for each row, by its phase in the order of ``PHASES``."""
    return np.array(values)[table.phase]


def _up(channels: np.ndarray, multiple: int) -> np.ndarray:
    """Channel counts rounded up."""
    return np.ceil(channels / multiple) * multiple


def _compute_s(table: Table, device: Device, c: Mapping[str, float]) -> np.ndarray:
    """Seconds of arithmetic of each row's kernel, once."""
    special = table.values["specials"] * c["special"] / (device.fp32_tflops * 1e12)
    matrix = np.where(table.is_matrix, _matrix_s(table, device, c), special)
    return np.where(table.is_depthwise, _depthwise_s(table, device, c), matrix)


def _matrix_s(table: Table, device: Device, c: Mapping[str, float]) -> np.ndarray:
    """Seconds of a product (rows, depth) x (depth, width) for each group, on matrix units."""
    v = table.values
    flops = 2 * v["macs"]
    depth, width, channels = np.maximum(v["depth"], 1), np.maximum(v["width"], 1), np.maximum(v["channels"], 1)

    # 1. The card's peak for the type: half precision as far as its power limit lets it, TF32 for convolutions, the
    # general cores for products in single precision (PyTorch's default for each).
    single = np.where(table.is_kind("linear"), device.fp32_tflops, device.tf32_tflops)
    peak = np.where(v["itemsize"] <= 2, device.tensor_tflops * device.sustained, single) * 1e12 * c["peak"]

    # 2. What share of it such a kernel reaches: by kind, by what it makes (a weight's gradient is a product of another
    # shape), and by saturation: a short inner product or few output channels leave the units waiting for data.
    kind = np.where(table.is_matrix, _by_kind(c, "compute", 1.0)[table.kind], 1.0)
    phase = _by_phase(table, 1.0, c["compute.input"], c["compute.weight"], 1.0)
    saturation = depth / (depth + c["depth0"]) * width / (width + c["width0"])
    saturation = np.where(np.isin(table.kind, _GROUPED), width / (width + c["grouped.width0"]), saturation)

    # 3. Channels that are no multiple of 8 are computed as if they were, and cost a slower kernel beside.
    padded = np.where(table.is_matrix, _up(channels, 8) / channels * _up(width, 8) / width, 1.0)
    ragged = np.where(is_ragged(table), c["ragged"], 1.0)
    seconds = flops * padded * ragged / (peak * kind * phase * saturation)

    # 4. Where that would be slower than not to use matrix units at all, a library does not.
    general = device.fp32_tflops * 1e12 * c["peak"] * c["compute.general"] * phase
    seconds = np.minimum(seconds, flops / general)

    # 5. A product of few tiles leaves units idle, though a library splits its depth; a weight's gradient is deep enough
    # to fill them.
    tiles = np.maximum(v["rows"] / _TILE, 1) * np.maximum(width / _TILE, 1) * np.maximum(v["groups"], 1)
    filled = np.minimum(1.0, tiles * _SPLITS / device.units)
    return seconds / np.where(table.phase == PHASES.index("weight"), 1.0, filled)


def _depthwise_s(table: Table, device: Device, c: Mapping[str, float]) -> np.ndarray:
    """Seconds of a depthwise convolution's arithmetic, on general cores."""
    window = np.maximum(table.values["window"], 1)
    native = table.is_kind("depthwise_native")
    share = np.where(table.is_matrix, _by_kind(c, "compute", 1.0)[table.kind], 1.0)
    # A large window does more with each element loaded; but PyTorch's own kernel is unrolled for 1 x 1, 3 x 3 and 5 x 5
    # only, and cuDNN's is poor beyond 7 x 7.
    share = share * np.where(table.is_depthwise, window / (window + c["depthwise.window0"]), 1.0)
    share = share * np.where(native & ~np.isin(window, (1, 9, 25)), c["depthwise_native.generic"], 1.0)
    share = share * np.where(~native & (window > 49), c["depthwise.wide"], 1.0)
    phase = _by_phase(table, 1.0, c["depthwise.input"], c["depthwise.weight"], 1.0)
    return 2 * table.values["macs"] / (device.fp32_tflops * 1e12 * c["peak"] * share * phase)


def _memory_s(table: Table, device: Device, c: Mapping[str, float]) -> np.ndarray:
    """Seconds of memory traffic of each row's kernel, once."""
    v = table.values
    maps = v["in_bytes"] + v["out_bytes"]
    moved = maps + v["weight_bytes"]

    # 1. A kernel that reads in one order and writes in another uses parts of each line that it loads.
    moved = moved * np.where(v["permuted"] > 0, c["permute"], 1.0)

    # 2. A training norm on NCHW maps has one block a channel: few channels leave units idle. A block's own rate is
    # about the same on all cards, so what is lost grows with the card's bandwidth (936 GB/s is the RTX 3090's).
    idle = c["batch_norm_train.channels0"] * device.bandwidth_gb_s / 936 / np.maximum(v["channels"], 1)
    moved = moved * np.where(table.is_kind("batch_norm_train") & (v["nhwc"] == 0), 1 + idle, 1.0)

    # 3. Rows of few pixels do not fill the accesses of kernels that go channel by channel.
    for kind in ("batch_norm", "batch_norm_train", "reduce", "copy"):
        small = table.is_kind(kind) & (v["side"] > 1)
        moved = moved * np.where(small, 1 + c[f"small.{kind}"] * 7 / v["side"], 1.0)

    # 4. Windows overlap: some of what a neighbour read is read again.
    window = c["window.pool"] * v["window"] * v["rows"] * v["itemsize"]
    moved = moved + np.where(table.is_kind("pool"), window, 0.0)
    moved = moved * np.where(table.is_depthwise, 1 + c["window.depthwise"] * (np.sqrt(v["window"]) - 3), 1.0)

    # 5. The bandwidth that such a kernel reaches, for what the last-level cache does not hold.
    bandwidth = device.bandwidth_gb_s * 1e9 * c["bandwidth"] * _by_kind(c, "memory", 1.0)[table.kind]
    bandwidth = bandwidth * _by_phase(table, 1.0, 1.0, c["memory.weight"], c["memory.backward"])
    return moved * _missed(maps, device, c) / bandwidth


def _missed(moved: np.ndarray, device: Device, c: Mapping[str, float]) -> np.ndarray:
    """Share of the traffic that reaches memory: maps much smaller than the last-level cache are found there."""
    cached = device.l2_mb * 2**20 * c["cache.share"]
    return np.maximum(1 - c["cache.gain"] / (1 + (moved / cached) ** 2), 0.05)


def _transform_s(table: Table, device: Device, c: Mapping[str, float]) -> np.ndarray:
    """Seconds of turning maps to channels-last and back around a matrix kernel on NCHW maps: kernels of their own,
    before and after it.
    """
    v = table.values
    maps = v["in_bytes"] + v["out_bytes"]
    turned = table.is_matrix & ~table.is_kind("depthwise_native") & (v["nhwc"] == 0) & (v["itemsize"] <= 2)
    # Each map is read and written; maps of an odd number of pixels can not be moved eight at a time.
    share = _by_kind(c, "transform")[table.kind] * np.where((v["side"] ** 2) % 8 > 0, c["transform.odd"], 1.0)
    moved = np.where(turned, 2 * maps * share, 0.0)
    return moved * _missed(maps, device, c) / (device.bandwidth_gb_s * 1e9 * c["bandwidth"])
