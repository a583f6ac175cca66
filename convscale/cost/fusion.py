"""The kernels behind a compiler: which operators its scheduler would join into one.

A simulation of what TorchInductor does with a traced graph. It walks the operators once and keeps, for every block of
memory, whether its content is written or is still a *chain*: pointwise operators over blocks that are written, not
computed yet. A pointwise operator makes a longer chain and no kernel; whatever can not take a chain has it written
first, and that is a kernel. So a chain's inputs are read once and its end is written once, and nothing between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from convscale.cost.kernels import (
    OWN_KERNELS,
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
"""Kinds of operators that become part of a chain."""
_RESIZING = frozenset({"constant_pad_nd", "reflection_pad2d", "upsample_nearest2d", "upsample_bilinear2d", "cat"})
"""Operators whose output has another size than their input, so that each input element is asked for anew."""
_SPECIAL = frozenset(
    {"silu", "sigmoid", "gelu", "mish", "tanh", "elu", "exp", "erf", "log", "softplus", "pow", "selu", "celu"}
)
"""Operators that evaluate an exponential or the like for each element."""
_TWICE = frozenset({"silu", "gelu", "mish", "hardswish", "elu", "leaky_relu"})
"""Activations that use their input twice, as x * sigmoid(x) does."""
_REALIZE, _REALIZE_SHARED = 8, 4
"""Blocks read above which PyTorch's compiler writes a chain, and one with several readers.

Source: torch._inductor.config's ``realize_acc_reads_threshold`` (where it was on) and ``realize_reads_threshold``."""

Bases = dict[tuple[int, int], int]
"""What a chain reads: (block, version of its content) -> bytes; (-1, operator) -> special functions evaluated for it.
A dictionary, since a block that comes in twice is read once."""


@dataclass(slots=True)
class _Content:
    """A block's content while kernels are joined: written to memory, or a chain of pointwise operators over blocks that
    are.
    """

    nbytes: int
    """Bytes it takes once written."""
    bases: Bases
    """What the chain reads; empty once written."""
    written: bool
    """Whether it is in memory."""
    kernel: int = -1
    """The kernel that has it in registers, or -1."""
    doubled: bool = False
    """Whether the chain reads a norm's output twice (x * sigmoid(x)): the compiler then writes that output where the
    size changes."""


def kernels_of(traced: Trace, *, compiled: bool = False) -> list[tuple[Kernel, int]]:
    """The kernels of one call with how often each runs, ``scope`` left out so that equal layers fall together."""
    return list(Counter(kernel._replace(scope="") for kernel in launched_kernels(traced, compiled=compiled)).items())


def launched_kernels(traced: Trace, *, compiled: bool = False) -> list[Kernel]:
    """The kernels of one call in order, behind a compiler or as eager mode runs them."""
    return fused_kernels(traced) if compiled else eager_kernels(traced)


def fused_kernels(traced: Trace) -> list[Kernel]:
    """The kernels after a compiler has joined what it can."""
    return _Fuser(traced).run()


def _blocks_read(bases: Mapping[tuple[int, int], int]) -> int:
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
        self.nhwc = traced.conditions.layout == "nhwc" or prefers_channels_last(traced)
        self.kernels: list[Kernel] = []
        self.position = 0
        """Of the operator at hand."""
        self.contents: dict[int, _Content] = {}
        """By block."""
        self.versions: Counter[int] = Counter()
        """How often each block was set: in-place operators give it a content that must not be taken for the old one."""
        self.uses_left: Counter[int] = Counter(use.storage for op in traced.operators for use in op.inputs)

    def run(self) -> list[Kernel]:
        """Walk the operators and write what is left at the end."""
        for position, op in enumerate(self.traced.operators):
            self.position = position
            # In inference a batch norm is a multiplication and an addition for each channel: pointwise.
            folded_norm = "batch_norm" in op.name and op.phase == "forward" and self.traced.conditions.mode == "infer"
            if op.name in OWN_KERNELS:
                self._call(op)
            elif op.name == "contiguous":
                self._lay_out(op)
            elif op.kind in _FUSIBLE or (op.kind == "norm" and folded_norm):
                self._extend(op)
            elif op.kind in ("reduce", "softmax", "norm"):
                self._reduce(op)
            elif op.kind == "pool" and op.phase in ("forward", "recompute"):
                self._pool(op)
            else:
                self._call(op)
            for use in op.inputs:
                self.uses_left[use.storage] -= 1
        # The network's outputs are needed in memory; chains that nobody asked for are dead and never run.
        if self.traced.operators:
            for number in sorted(self.traced.results & self.contents.keys()):
                whole = Use(number, (), 1, self.contents[number].nbytes, False)
                self._write(whole, self.traced.operators[-1])
        return self.kernels

    # What is known of blocks.

    def _content(self, use: Use) -> _Content:
        """The content of the block that ``use`` lies in."""
        if use.storage not in self.contents:  # a weight or the input
            self.contents[use.storage] = _Content(self.traced.storages[use.storage], {}, written=True)
        return self.contents[use.storage]

    def _set(self, use: Use, content: _Content) -> None:
        """Give a block a new content."""
        self.versions[use.storage] += 1
        self.contents[use.storage] = content

    def _bases(self, use: Use) -> Bases:
        """What a kernel reads that computes on ``use``: the block itself, or what its chain reads."""
        content = self._content(use)
        if content.written:
            return {(use.storage, self.versions[use.storage]): use.nbytes}
        # A part of a chain's value needs that part of what the chain reads.
        share = use.nbytes / max(content.nbytes, 1)
        if share >= 1:
            return content.bases
        return {key: round(size * share) for key, size in content.bases.items()}

    def _joined_bases(self, op: Operator) -> Bases:
        """What a kernel reads that computes on all inputs of ``op``."""
        bases: Bases = {}
        for use in op.inputs:
            bases |= self._bases(use)
        return bases

    # How kernels come about.

    def _launch(self, kind: str, bases: Bases, out_bytes: int, op: Operator, use: Use) -> int:
        """Add a kernel that reads ``bases`` and writes ``out_bytes``; ``use`` says the map's side. Its number."""
        read = sum(size for (block, _), size in bases.items() if block >= 0)
        kernel = Kernel(
            kind,
            phase="forward" if op.phase in ("forward", "recompute") else "backward",
            in_bytes=read,
            out_bytes=out_bytes,
            window=_blocks_read(bases),
            side=use.shape[-1] if len(use.shape) == 4 else 1,
            nhwc=self.nhwc,
            specials=sum(bases.values()) - read,
            scope=op.scope,
        )
        self.kernels.append(kernel)
        return len(self.kernels) - 1

    def _write(self, use: Use, op: Operator) -> None:
        """Have the block that ``use`` lies in written, by the kernel that has it in registers or by one of its own."""
        content = self._content(use)
        if content.written:
            return
        content.written = True
        if content.kernel >= 0:
            kernel = self.kernels[content.kernel]
            self.kernels[content.kernel] = kernel._replace(out_bytes=kernel.out_bytes + content.nbytes)
        else:
            content.kernel = self._launch("fused", content.bases, content.nbytes, op, use)

    # What each sort of operator does.

    def _extend(self, op: Operator) -> None:
        """A pointwise operator: its output is a chain over what its inputs read."""
        # 1. A pad, an upsampling or a concatenation would evaluate a doubled chain once for each of its own elements:
        # the compiler writes the chain first.
        if op.name in _RESIZING:
            for use in op.inputs:
                if self._content(use).doubled:
                    self._write(use, op)

        # 2. The new chain reads what all inputs read; of a block that several read, the largest part.
        bases: Bases = {}
        for use in op.inputs:
            for key, size in self._bases(use).items():
                bases[key] = max(bases.get(key, 0), size)
        if op.name in _SPECIAL and op.outputs:
            bases[-1, self.position] = op.outputs[0].nbytes // op.outputs[0].itemsize
        norm_twice = _blocks_read(bases) > 4 and op.name in _TWICE  # a map and its norm's four vectors
        doubled = norm_twice or any(self._content(use).doubled for use in op.inputs)

        # 3. The output stays a chain, unless it is a part of a block, which is written in place, or reads so much that
        # the compiler would rather not do it again for every reader.
        for use in op.outputs:
            if use.nbytes < self.traced.storages[use.storage]:
                self._launch("fused", bases, use.nbytes, op, use)
                self._set(use, _Content(self.traced.storages[use.storage], {}, written=True))
            else:
                self._set(use, _Content(use.nbytes, bases, written=False, doubled=doubled))
                if _blocks_read(bases) > _REALIZE:
                    self._write(use, op)

    def _reduce(self, op: Operator) -> None:
        """A reduction, a softmax, or a norm that makes statistics: one kernel with its input's chain."""
        source = max(op.inputs, key=lambda use: use.nbytes, default=None)
        pixels = source.shape[2] * source.shape[3] if source is not None and len(source.shape) == 4 else 1
        if op.kind == "reduce" and source is not None and pixels > 1:
            self._mean(op, source)
        elif "group_norm" in op.name or "batch_norm" in op.name:
            self._norm_twice(op, source)
        else:
            self._reduce_rows(op, source)

    def _mean(self, op: Operator, source: Use) -> None:
        """A sum or mean over positions goes across rows of memory and stands alone: nothing joins on behind it."""
        if _blocks_read(self._bases(source)) > _REALIZE_SHARED:
            self._write(source, op)
        self._launch("fused_mean", self._bases(source), nbytes(op.outputs), op, source)
        for use in op.outputs:
            self._set(use, _Content(use.nbytes, {}, written=True))

    def _norm_twice(self, op: Operator, source: Use | None) -> None:
        """A norm over more than fits in registers (group norm, batch norm in training): a kernel reads its input for
        the statistics, and what comes out is a chain that reads the input again to apply them.
        """
        if source is not None and _blocks_read(self._bases(source)) > _REALIZE_SHARED:
            self._write(source, op)
        training = self.traced.conditions.mode == "train"
        bases = self._joined_bases(op)
        index = self._launch("fused_mean", bases, 0, op, source or op.outputs[0])
        for use in op.outputs:
            # In training statistics and the gradients of weight and bias are wanted: the first kernel's sums are they.
            if training and source is not None and use.nbytes * 4 < source.nbytes:
                self._set(use, _Content(use.nbytes, {}, written=False, kernel=index))
                self._write(use, op)
            else:
                self._set(use, _Content(use.nbytes, dict(bases), written=False))

    def _reduce_rows(self, op: Operator, source: Use | None) -> None:
        """A reduction over rows that fit in registers (layer norm, softmax): a map that comes out stays there until
        needed, and its input's chain is written in passing where others need it too.
        """
        index = self._launch("fused_reduce", self._joined_bases(op), 0, op, source or op.outputs[0])
        if source is not None and not self._content(source).written and self.uses_left[source.storage] > 1:
            self._content(source).kernel = index
            self._write(source, op)
        for use in op.outputs:
            self._set(use, _Content(use.nbytes, {}, written=False, kernel=index))
            if source is None or use.nbytes * 4 < source.nbytes:  # a number for each row, not a map
                self._write(use, op)

    def _pool(self, op: Operator) -> None:
        """A pool: a pointwise operator over a window of a map in memory; indices that nobody reads are never made."""
        for use in op.inputs:
            self._write(use, op)
        bases = self._joined_bases(op)
        for use in op.outputs:
            self._set(use, _Content(use.nbytes, bases, written=False))

    def _call(self, op: Operator) -> None:
        """A library call, or anything else: inputs in memory, outputs in memory."""
        for use in op.inputs:
            self._write(use, op)
        matrix = op.kind in ("conv", "linear")
        self.kernels.append(matrix_kernel(op, self.nhwc) if matrix else moving_kernel(op))
        for use in op.outputs:
            self._set(use, _Content(use.nbytes, {}, written=True))
        if op.bias:  # added by the kernel that reads the map next
            use = op.outputs[0]
            bases = {(use.storage, self.versions[use.storage]): use.nbytes}
            self._set(use, _Content(use.nbytes, bases, written=False))

    def _lay_out(self, op: Operator) -> None:
        """A map in another order: the kernel that makes it writes it so, but a part of one is written by itself."""
        source, target = op.inputs[0], op.outputs[0]
        if is_slice(source, self.traced):
            self._launch("fused", self._bases(source), source.nbytes, op, source)
            self._set(target, _Content(target.nbytes, {}, written=True))
        else:
            self._set(target, self._content(source))
