"""The kernels behind a compiler: which operators its scheduler would join into one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from convscale.cost.kernels import (
    Kernel,
    eager_kernels,
    is_slice,
    matrix_kernel,
    moving_kernel,
    nbytes,
    prefers_channels_last,
)
from convscale.cost.trace import Operator, Trace, Use

_FUSIBLE = frozenset({"pointwise", "copy", "cast", "random"})
_RESIZING = frozenset({"constant_pad_nd", "reflection_pad2d", "upsample_nearest2d", "upsample_bilinear2d", "cat"})
_SPECIAL = frozenset(
    {"silu", "sigmoid", "gelu", "mish", "tanh", "elu", "exp", "erf", "log", "softplus", "pow", "selu", "celu"}
)
_TWICE = frozenset({"silu", "gelu", "mish", "hardswish", "elu", "leaky_relu"})
_REALIZE, _REALIZE_SHARED = 8, 4
"""Reads above which PyTorch's compiler writes a chain, and one with several readers."""


def kernels_of(traced: Trace, *, compiled: bool = False) -> list[tuple[Kernel, int]]:
    """The kernels of one call with how often each runs, ``scope`` left out so that equal layers fall together."""
    launched = fused_kernels(traced) if compiled else eager_kernels(traced)
    return list(Counter(kernel._replace(scope="") for kernel in launched).items())


class _Value:
    """A block's content while kernels are joined: written to memory, or a chain of pointwise operators over blocks that
    are.
    """

    __slots__ = ("bases", "doubled", "kernel", "nbytes", "written")

    def __init__(
        self, nbytes: int, bases: dict[tuple[int, int], int], written: bool, kernel: int = -1, doubled: bool = False
    ) -> None:
        self.doubled = doubled
        """Whether the chain reads a norm's output twice (x * sigmoid(x)): the compiler then writes that output where
        the size changes."""
        self.nbytes = nbytes
        self.bases = bases
        """(block, version) -> bytes read of it; (-1, operator) -> special functions evaluated for it."""
        self.written = written
        self.kernel = kernel
        """The kernel that has it in registers, or -1."""


def _reads(bases: Mapping[tuple[int, int], int]) -> int:
    """How many blocks a chain reads."""
    return sum(block >= 0 for block, _ in bases)


class _Fuser:
    """Joins pointwise chains into kernels the way PyTorch's compiler does.

    A pointwise value is written only where something else than a pointwise operator needs it. A reduction takes its
    input's chain into its kernel and writes the chain's value in passing where others need it too. A convolution or
    product is a library call: its inputs are in memory.
    """

    def __init__(self, traced: Trace) -> None:
        self.traced = traced
        self.nhwc = traced.layout == "nhwc" or prefers_channels_last(traced)
        self.kernels: list[Kernel] = []
        self.done = 0
        self.values: dict[int, _Value] = {}
        self.versions: Counter[int] = Counter()
        self.uses_left: Counter[int] = Counter(use.storage for op in traced.operators for use in op.inputs)

    def value(self, use: Use) -> _Value:
        if use.storage not in self.values:  # a weight or the input
            self.values[use.storage] = _Value(self.traced.storages[use.storage], {}, True)
        return self.values[use.storage]

    def bases(self, use: Use) -> dict[tuple[int, int], int]:
        """What a kernel reads that computes on ``use``."""
        value = self.value(use)
        if value.written:
            return {(use.storage, self.versions[use.storage]): use.nbytes}
        share = use.nbytes / max(value.nbytes, 1)
        if share >= 1:
            return value.bases
        return {key: round(size * share) for key, size in value.bases.items()}

    def write(self, use: Use, op: Operator) -> None:
        """Have the block that ``use`` lies in written."""
        value = self.value(use)
        if value.written:
            return
        value.written = True
        if value.kernel >= 0:
            kernel = self.kernels[value.kernel]
            self.kernels[value.kernel] = kernel._replace(out_bytes=kernel.out_bytes + value.nbytes)
        else:
            value.kernel = self.launch("fused", value.bases, value.nbytes, op, use)

    def launch(self, kind: str, bases: dict[tuple[int, int], int], out_bytes: int, op: Operator, use: Use) -> int:
        side = use.shape[-1] if len(use.shape) == 4 else 1
        phase = "forward" if op.phase == "forward" else "backward"
        read = sum(size for (block, _), size in bases.items() if block >= 0)
        kernel = Kernel(
            kind,
            phase=phase,
            in_bytes=read,
            out_bytes=out_bytes,
            side=side,
            window=_reads(bases),
            nhwc=self.nhwc,
            scope=op.scope,
        )
        self.kernels.append(kernel._replace(specials=sum(bases.values()) - read))
        return len(self.kernels) - 1

    def set(self, use: Use, value: _Value) -> None:
        self.versions[use.storage] += 1
        self.values[use.storage] = value

    def fuse(self, op: Operator) -> None:
        """A pointwise operator: its output is a chain over what its inputs read."""
        bases: dict[tuple[int, int], int] = {}
        if op.name in _RESIZING:
            for use in op.inputs:
                if self.value(use).doubled:
                    self.write(use, op)
        for use in op.inputs:
            for key, size in self.bases(use).items():
                bases[key] = max(bases.get(key, 0), size)
        if op.name in _SPECIAL and op.outputs:
            bases[-1, self.done] = op.outputs[0].nbytes // op.outputs[0].itemsize
        doubled = (_reads(bases) > 4 and op.name in _TWICE) or any(self.value(use).doubled for use in op.inputs)
        for use in op.outputs:
            if use.nbytes < self.traced.storages[use.storage]:  # a part of a block is written in place
                self.launch("fused", bases, use.nbytes, op, use)
                self.set(use, _Value(self.traced.storages[use.storage], {}, True))
            else:
                self.set(use, _Value(use.nbytes, bases, False, doubled=doubled))
                if _reads(bases) > _REALIZE:
                    self.write(use, op)

    def reduce(self, op: Operator) -> None:
        """A reduction or a norm over rows: one kernel with its input's chain; a map that comes out stays in its
        registers until needed.

        A norm over more than rows fit in registers for (group norm, batch norm in training) reads its input again to
        apply what it found. A mean over positions goes across rows and stands alone.
        """
        big = max(op.inputs, key=lambda use: use.nbytes, default=None)
        if op.kind == "reduce" and big is not None and len(big.shape) == 4 and big.shape[2] * big.shape[3] > 1:
            if _reads(self.bases(big)) > _REALIZE_SHARED:
                self.write(big, op)
            self.launch("fused-mean", self.bases(big), nbytes(op.outputs), op, big)
            for use in op.outputs:
                self.set(use, _Value(use.nbytes, {}, True))
            return
        if "group_norm" in op.name or "batch_norm" in op.name:
            again: dict[tuple[int, int], int] = {}
            if big is not None and _reads(self.bases(big)) > _REALIZE_SHARED:
                self.write(big, op)
            for use in op.inputs:
                again |= self.bases(use)
            self.launch("fused-mean", again, 0, op, big or op.outputs[0])
            for use in op.outputs:
                self.set(use, _Value(use.nbytes, dict(again), False))
            return
        bases: dict[tuple[int, int], int] = {}
        for use in op.inputs:
            bases |= self.bases(use)
        index = self.launch("fused-reduce", bases, 0, op, big or op.outputs[0])
        if big is not None and not self.value(big).written and self.uses_left[big.storage] > 1:
            self.value(big).kernel = index
            self.write(big, op)
        for use in op.outputs:
            self.set(use, _Value(use.nbytes, {}, False, index))
            if big is None or use.nbytes * 4 < big.nbytes:
                self.write(use, op)

    def call(self, op: Operator) -> None:
        """A library call, a pool, or anything else: inputs in memory, outputs in memory."""
        for use in op.inputs:
            self.write(use, op)
        if op.kind in ("conv", "linear"):
            self.kernels.append(matrix_kernel(op, self.nhwc))
        elif (
            op.kind == "pool" and op.phase == "forward"
        ):  # a pointwise operator over a window; unused indices are never made
            bases: dict[tuple[int, int], int] = {}
            for use in op.inputs:
                bases |= self.bases(use)
            for use in op.outputs:
                self.set(use, _Value(use.nbytes, bases, False))
            return
        else:
            self.kernels.append(moving_kernel(op))
        for use in op.outputs:
            self.set(use, _Value(use.nbytes, {}, True))
        if op.bias:  # added by the kernel that reads the map next
            use = op.outputs[0]
            self.set(use, _Value(use.nbytes, {(use.storage, self.versions[use.storage]): use.nbytes}, False))

    def lay_out(self, op: Operator) -> None:
        """A map in another order: the kernel that makes it writes it so, but a part of one is written by itself."""
        source, target = op.inputs[0], op.outputs[0]
        if is_slice(source, self.traced):
            self.launch("fused", self.bases(source), source.nbytes, op, source)
            self.set(target, _Value(target.nbytes, {}, True))
        else:
            self.set(target, self.value(source))

    def run(self) -> list[Kernel]:
        for index, op in enumerate(self.traced.operators):
            self.done = index
            batch_norm = (
                op.kind == "norm" and "batch_norm" in op.name and op.phase == "forward" and self.traced.mode == "infer"
            )
            if op.name == "contiguous":
                self.lay_out(op)
            elif op.kind in _FUSIBLE or batch_norm:
                self.fuse(op)
            elif op.kind in ("reduce", "softmax", "norm"):
                self.reduce(op)
            else:
                self.call(op)
            for use in op.inputs:
                self.uses_left[use.storage] -= 1
        last = self.traced.operators[-1] if self.traced.operators else None
        for number in self.traced.results:
            if number in self.values and last is not None:
                size = self.values[number].nbytes
                self.write(Use(number, (), 1, size, False), last)
        return self.kernels


def fused_kernels(traced: Trace) -> list[Kernel]:
    """The kernels after a compiler has joined what it can."""
    return _Fuser(traced).run()
