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
from functools import cached_property
from typing import NamedTuple

import numpy as np

from convscale.cost.kernels import MATRIX, OTHERS, PHASES, Kernel
from convscale.predictor.devices import Device

KINDS = (*MATRIX, *OTHERS)
MOVING = tuple(kind for kind in OTHERS if kind not in ("update", "batch_norm_train"))
"""Kinds whose units may be busier than the memory."""
BINDINGS = ("compute", "memory", "launch")
"""What a kernel's time can be bound by."""

PRIOR: dict[str, float] = {
    # The roofline's edge, a launch, and the card's two rates as shares of its data sheet's.
    "sheet": 1.0,
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
    "batch_norm_train.reads": 2.0,
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
    **{f"work.{kind}": 400.0 if kind in ("layer_norm", "group_norm") else 100.0 for kind in MOVING},
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
    "cache.gain": 0.15,
    "cache.share": 0.3,
}
"""What each coefficient is before anything was fitted; also the list of their names."""

FIXED = ("sheet", "batch_norm_train.reads")
"""Coefficients that are known and never fitted to tables: no kernel is faster than the card's data sheet allows (a
calibration by measurements moves ``sheet`` where a card runs above its clocks; of a processor it is next to nothing); a
norm that makes statistics reads its map for them,
and again to apply them, and its backward pass reads map and gradient twice (PyTorch's ``Normalization.cuh``)."""
CACHE_GAIN = 0.2
"""The most that a last-level cache may save of the traffic of maps much smaller than it. Caches are two to four times
as fast as memory, so more could be; but a larger gain would make small batches faster than large ones, which no
published table of a batch's effect shows."""
_BOUNDS = {
    "cache.gain": (1e-3, CACHE_GAIN),
    "cache.share": (0.01, 1.0),
    "transform.odd": (1.0, 1.15),  # a map of 15 x 15 takes no longer than one of 16 x 16
    "p": (1.0, 8.0),
    "peak": (0.01, 1.5),
    "bandwidth": (0.01, 1.2),
    **dict.fromkeys(("ragged", "permute", "huge"), (1.0, 8.0)),
    **dict.fromkeys(("depthwise.wide", "depthwise_native.generic", "depthwise.weight", "depthwise.input"), (0.01, 1.0)),
}


def bounds_of(name: str) -> tuple[float, float]:
    """Between which values a fit may move a coefficient, so that larger work never takes less time."""
    return _BOUNDS.get(name, (0.0, float("inf")))


RATES = ("peak", "bandwidth", "overhead_us")
"""Coefficients that stand for a card."""
REACH = (*RATES, "memory.group_norm")
"""Coefficients that differ from card to card: its rates, and group norm, which libraries wrote anew (on an RTX 5090 it
is slower than on an RTX 4090)."""


def for_card(c: Mapping[str, float], reach: Mapping[str, float]) -> dict[str, float]:
    """Coefficients with what a card reaches of its data sheet: factors on ``REACH``, those that are left out 1."""
    return {**c, **{name: c[name] * reach.get(name, 1.0) for name in REACH}}


_DEPTHWISE = [KINDS.index("depthwise"), KINDS.index("depthwise_native")]
_GROUPED = [KINDS.index("grouped"), KINDS.index("grouped_pow2"), KINDS.index("grouped_packed")]
_LEAN = [KINDS.index(kind) for kind in ("batch_norm", "pointwise", "pointwise_mixed", "cast", "copy", "fused")]
"""Kinds whose kernels go over maps once and add nothing up."""
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

    @cached_property
    def is_matrix(self) -> np.ndarray:
        """Which rows multiply matrices."""
        return self.kind < len(MATRIX)

    @cached_property
    def is_depthwise(self) -> np.ndarray:
        """Which rows are depthwise convolutions."""
        return np.isin(self.kind, _DEPTHWISE)

    @cached_property
    def largest_map(self) -> np.ndarray:
        """Elements of the larger of input and output."""
        return np.maximum(self.values["in_bytes"], self.values["out_bytes"]) / self.values["itemsize"]

    def is_kind(self, kind: str) -> np.ndarray:
        """Which rows are of a kind."""
        if kind not in self._of_kind:
            self._of_kind[kind] = self.kind == KINDS.index(kind)
        return self._of_kind[kind]

    @cached_property
    def _of_kind(self) -> dict[str, np.ndarray]:
        """Masks that were asked for."""
        return {}

    @cached_property
    def is_grouped(self) -> np.ndarray:
        """Which rows are grouped convolutions that are not depthwise."""
        return np.isin(self.kind, _GROUPED)

    @cached_property
    def is_ragged(self) -> np.ndarray:
        """Which kernels multiply matrices with a side that is no multiple of 8."""
        v = self.values
        dense = self.is_matrix & ~self.is_depthwise
        return dense & (((v["channels"] % 8 > 0) & (v["channels"] > 4)) | (v["width"] % 8 > 0))

    @cached_property
    def padding(self) -> np.ndarray:
        """By how much padding channels to multiples of 8 makes a product larger."""
        channels, width = np.maximum(self.values["channels"], 1), np.maximum(self.values["width"], 1)
        return np.where(self.is_matrix, _up(channels, 8) / channels * _up(width, 8) / width, 1.0)


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


def chosen(table: Table, rows: np.ndarray) -> Table:
    """Some rows of a table, by a mask."""
    values = {name: column[rows] for name, column in table.values.items()}
    return Table(
        net=table.net[rows], count=table.count[rows], kind=table.kind[rows], phase=table.phase[rows], values=values
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
    work = np.maximum(work, c["sheet"] * least_s(table, device, c))
    work = work * np.where(table.largest_map > _HUGE, c["huge"], 1.0)
    transform = _transform_s(table, device, c)
    return KernelTimes(work + transform + c["overhead_us"] * 1e-6, compute, memory + transform)


def least_s(table: Table, device: Device, c: Mapping[str, float]) -> np.ndarray:
    """Seconds below which the data sheet lets no kernel stay: products over the rate for their type, bytes over the
    bandwidth but for what ``c`` lets the last-level cache hold.
    """
    v = table.values
    maps = v["in_bytes"] + v["out_bytes"]  # of weights nothing lies in the cache from the call before
    memory = (maps * _missed(maps, device, c) + v["weight_bytes"]) / (device.bandwidth_gb_s * 1e9)
    rate = np.where(table.is_depthwise, device.fp32_tflops * device.boost * 1e12, _rate(table, device))
    return np.maximum(memory, np.where(table.is_matrix, 2 * v["macs"] / rate, 0.0))


def _rate(table: Table, device: Device) -> np.ndarray:
    """Operations a second that the card's units have for each row's product, whatever its power limit lets them do:
    half precision or 8 bits; TF32 for convolutions in single precision, the general cores for other products in it
    (PyTorch's default for each).
    """
    size = table.values["itemsize"]
    single = np.where(table.is_kind("linear"), device.fp32_tflops, device.tf32_tflops)
    half = np.where(size < 2, device.int8_tops, device.tensor_tflops)
    return np.where(size <= 2, half, single) * device.boost * 1e12


def _sustained(table: Table, device: Device) -> np.ndarray:
    """Share of that rate that the power limit lets a card hold: matrix units are meant, not the general cores."""
    general = (table.values["itemsize"] > 2) & (table.is_kind("linear") | (not device.has_tf32))
    return np.where(general, 1.0, device.sustained)


def net_s(table: Table, device: Device, c: Mapping[str, float]) -> np.ndarray:
    """Seconds of a call of each network."""
    return np.bincount(table.net, weights=kernel_s(table, device, c).total_s * table.count, minlength=table.nets)


def is_ragged(table: Table) -> np.ndarray:
    """Which kernels multiply matrices with a side that is no multiple of 8, which matrix units pad; an image's few
    channels do not count.
    """
    return table.is_ragged


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
    """Seconds of arithmetic of each row's kernel, once; exponentials run on units of their own."""
    rate = device.special_tflops * device.boost * 1e12
    special = table.values["specials"] * c["special"] / rate
    # What a kernel that moves maps does for each element (indices, sums over threads, divisions) takes its units' time:
    # norms are slower than their bytes where a card's bandwidth is large for its units.
    work = table.largest_map * _by_kind(c, "work")[table.kind] / rate
    # On the cards of the tables it hides behind the bytes. So they do not say that it outlasts them on a data centre's,
    # which have more bandwidth for their units, and what such cards reach of it says that it does not.
    if device.form == "data-centre":
        maps_s = (table.values["in_bytes"] + table.values["out_bytes"]) / (device.bandwidth_gb_s * 1e9)
        work = np.where(np.isin(table.kind, _LEAN), np.minimum(work, maps_s), work)
    matrix = np.where(table.is_matrix, _matrix_s(table, device, c), special + work)
    return np.where(table.is_depthwise, _depthwise_s(table, device, c), matrix)


def _matrix_s(table: Table, device: Device, c: Mapping[str, float]) -> np.ndarray:
    """Seconds of a product (rows, depth) x (depth, width) for each group, on matrix units."""
    v = table.values
    flops = 2 * v["macs"]
    depth, width = np.maximum(v["depth"], 1), np.maximum(v["width"], 1)

    # 1. The card's peak for the type.
    peak = _rate(table, device) * c["peak"]

    # 2. What share of it such a kernel reaches: by kind, by what it makes (a weight's gradient is a product of another
    # shape), and by saturation: a short inner product or few output channels leave the units waiting for data.
    kind = np.where(table.is_matrix, _by_kind(c, "compute", 1.0)[table.kind], 1.0)
    phase = _by_phase(table, 1.0, c["compute.input"], c["compute.weight"], 1.0)
    saturation = depth / (depth + c["depth0"]) * width / (width + c["width0"])
    saturation = np.where(table.is_grouped, width / (width + c["grouped.width0"]), saturation)

    # 3. Channels that are no multiple of 8 are computed as if they were, and cost a slower kernel beside.
    padded = table.padding
    ragged = np.where(is_ragged(table), c["ragged"], 1.0)
    seconds = flops * padded * ragged / (peak * kind * phase * saturation)
    general_s = flops / (device.fp32_tflops * device.boost * 1e12 * c["peak"] * c["compute.general"] * phase)

    # 4. A product of few tiles leaves units idle, though a library splits its depth; a weight's gradient is deep enough
    # to fill them. Idle units draw little power, so that its limit binds only what fills the card.
    tiles = np.maximum(v["rows"] / _TILE, 1) * np.maximum(width / _TILE, 1) * np.maximum(v["groups"], 1)
    busy = np.where(table.phase == PHASES.index("weight"), 1.0, np.minimum(1.0, tiles * _SPLITS / device.units))

    # 5. Where matrix units would be slower than the general cores, a library does not use them.
    return np.minimum(seconds / np.minimum(busy, _sustained(table, device)), general_s / busy)


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
    return 2 * table.values["macs"] / (device.fp32_tflops * device.boost * 1e12 * c["peak"] * share * phase)


def _memory_s(table: Table, device: Device, c: Mapping[str, float]) -> np.ndarray:
    """Seconds of memory traffic of each row's kernel, once."""
    v = table.values
    maps = v["in_bytes"] + v["out_bytes"]
    again = np.where(table.is_kind("batch_norm_train"), c["batch_norm_train.reads"] - 1, 0.0) * v["in_bytes"]
    moved = maps + v["weight_bytes"] + again

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
    moved = moved * np.where(
        table.is_depthwise, 1 + c["window.depthwise"] * np.maximum(np.sqrt(v["window"]) - 3, 0), 1.0
    )

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
    units = (v["itemsize"] <= 2) | (device.has_tf32 & ~table.is_depthwise)
    turned = table.is_matrix & ~table.is_kind("depthwise_native") & (v["nhwc"] == 0) & units
    # Each map is read and written; maps of an odd number of pixels can not be moved eight at a time.
    share = _by_kind(c, "transform")[table.kind] * np.where((v["side"] ** 2) % 8 > 0, c["transform.odd"], 1.0)
    moved = np.where(turned, 2 * maps * share, 0.0)
    return moved * _missed(maps, device, c) / (device.bandwidth_gb_s * 1e9 * c["bandwidth"])
