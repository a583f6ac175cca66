"""From operators to the kernels a GPU runs: one each in eager mode, fused ones behind a compiler.

What the predictor sees of a network is this list, so the bytes here are the model: a convolution's bias is a kernel of its own in eager CUDA, a cast
costs its bytes, and a compiler reads a chain of pointwise operators' inputs once and writes its end once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod
from typing import NamedTuple

from convscale.speed.trace import Operator, Trace, Use

MATRIX = ("conv", "conv1", "group", "even", "packed", "depthwise", "direct", "linear")
"""Kinds that multiply matrices: dense convolution, its 1x1 case, grouped (any, in even shapes, in shapes that pack well), depthwise, depthwise by
PyTorch's own kernel instead of cuDNN's, linear."""
NORMS = ("norm", "stats", "layer-norm", "group-norm")
"""Norms: batch norm as in inference, batch norm that makes statistics, layer norm, group norm."""
FUSED = ("fused", "fused-reduce", "fused-mean")
"""What a compiler makes: chains of pointwise operators, with a reduction over rows, with one over positions."""
OTHERS = (*NORMS, "point", "uneven", "reduce", "softmax", "pool", "copy", "cast", "update", *FUSED)
"""Kinds that move data; ``uneven`` is a pointwise kernel whose inputs differ in shape, type or order, which PyTorch does not vectorise."""
PHASES = ("forward", "input", "weight", "backward")
"""What a kernel makes: the forward map, an input's or a weight's gradient, any other gradient (or the update)."""
_FUSIBLE = frozenset({"pointwise", "copy", "cast", "random"})
_REALIZE, _REALIZE_SHARED = 8, 4  # reads above which PyTorch's compiler writes a chain, and one with several readers
_RESIZING = frozenset({"constant_pad_nd", "reflection_pad2d", "upsample_nearest2d", "upsample_bilinear2d", "cat"})
_SPECIAL = frozenset({"silu", "sigmoid", "gelu", "mish", "tanh", "elu", "exp", "erf", "log", "softplus", "pow", "selu", "celu"})
_TWICE = frozenset({"silu", "gelu", "mish", "hardswish", "elu", "leaky_relu"})


class Kernel(NamedTuple):
    """One kind of kernel launch and what it moves; equal launches are one row with a count."""

    kind: str
    """One of ``MATRIX`` or ``OTHERS``."""
    phase: str = "forward"
    """One of ``PHASES``."""
    macs: int = 0
    """Multiply-accumulates."""
    in_bytes: int = 0
    """Bytes of maps read."""
    out_bytes: int = 0
    """Bytes of maps written."""
    weight_bytes: int = 0
    """Bytes of weights read."""
    rows: int = 0
    """Positions of the output, all images: the M of the matrix product."""
    width: int = 0
    """Output channels of a group: N."""
    depth: int = 0
    """Input channels of a group times kernel size: K."""
    channels: int = 0
    """Input channels of a group."""
    groups: int = 1
    """Groups."""
    window: int = 1
    """Positions of the kernel or window."""
    step: int = 1
    """Stride along one side."""
    side: int = 1
    """Width of the output map in pixels."""
    itemsize: int = 2
    """Bytes of an element of the product's inputs."""
    nhwc: bool = False
    """Whether the maps lie channels last."""
    permuted: bool = False
    """Whether inputs and outputs lie in different orders."""
    specials: int = 0
    """Exponentials and the like that a fused kernel evaluates."""
    scope: str = ""
    """The module it belongs to."""


def kernels_of(traced: Trace, *, compiled: bool = False) -> list[tuple[Kernel, int]]:
    """The kernels of one call with how often each runs, ``scope`` left out so that equal layers fall together."""
    launched = fused_kernels(traced) if compiled else eager_kernels(traced)
    return list(Counter(kernel._replace(scope="") for kernel in launched).items())


def eager_kernels(traced: Trace) -> list[Kernel]:
    """One kernel per operator as CUDA's eager mode runs them."""
    result: list[Kernel] = []
    operators = traced.operators
    for index, op in enumerate(operators):
        if op.kind in ("conv", "linear"):
            kernel = _matrix_kernel(op, any(use.dense for use in op.outputs if op.product != "weight") or op.inputs[0].dense)
            result.append(kernel)
            if op.bias and kernel.kind != "direct":  # PyTorch's own depthwise kernel adds its bias itself
                out = op.outputs[0].nbytes
                result.append(Kernel("uneven", in_bytes=out, out_bytes=out, side=kernel.side, nhwc=kernel.nhwc, scope=op.scope))
        else:
            kernel = _moving_kernel(op)
            if op.name == "contiguous":
                kernel = kernel._replace(permuted=op.inputs[0].dense != op.outputs[0].dense)
            elif op.name == "clone":
                # a copy that changes the order of elements, unless autograd keeps a map that the next operator overwrites
                follower = operators[index + 1] if index + 1 < len(operators) else op
                kept = follower.kind == "pointwise" and follower.outputs[0].storage == op.inputs[0].storage
                kernel = kernel._replace(permuted=not kept)
            result.append(kernel)
    return result


def _is_slice(use: Use, traced: Trace) -> bool:
    return len(use.shape) == 4 and use.shape[0] > 1 and use.nbytes < traced.storages[use.storage]


def _phase(op: Operator) -> str:
    return op.product or ("forward" if op.phase == "forward" else "backward")


def _nbytes(uses: tuple[Use, ...]) -> int:
    return sum(use.nbytes for use in uses)


_KIND = {"pointwise": "point", "random": "point", "unknown": "copy"}
_NORM = {"native_layer_norm": "layer-norm", "native_group_norm": "group-norm"}


def _is_map(use: Use) -> bool:
    """Whether it is a whole map, not one that stands for a smaller one spread over it."""
    return len(use.shape) == 4 and use.shape[1] > 1 and use.shape[2] * use.shape[3] > 1 and use.nbytes == prod(use.shape) * use.itemsize


def _moving_kernel(op: Operator) -> Kernel:
    maps = [use for use in (*op.inputs, *op.outputs) if _is_map(use)]
    kind = _NORM.get(op.name) or _KIND.get(op.kind, op.kind)
    if kind == "norm" and len(op.outputs) > 1:  # a batch norm in training makes statistics or their gradients
        kind = "stats"
    if kind == "point" and len({(use.shape, use.itemsize, use.dense, use.nbytes) for use in (*op.inputs, *op.outputs) if use.shape}) > 1:
        kind = "uneven"
    return Kernel(
        kind,
        phase=_phase(op),
        in_bytes=_nbytes(op.inputs),
        out_bytes=_nbytes(op.outputs),
        channels=maps[0].shape[1] if maps else 0,
        window=prod(op.kernel) if op.kernel else 1,
        side=maps[-1].shape[-1] if maps else 1,
        rows=op.outputs[0].nbytes // op.outputs[0].itemsize if op.kind == "pool" and op.outputs else 0,
        itemsize=op.inputs[0].itemsize if op.inputs else 4,
        nhwc=bool(maps) and maps[0].dense,
        permuted=len({use.dense for use in maps}) > 1,
        scope=op.scope,
    )


def _matrix_kernel(op: Operator, nhwc: bool) -> Kernel:
    if op.kind == "linear" or len(op.inputs[0].shape) < 3:
        return _linear_kernel(op)
    if op.product == "weight":
        (gradient, x), weight = op.inputs[:2], op.outputs[0]
        inputs, outputs, weights = gradient.nbytes + x.nbytes, weight.nbytes, 0
        grid = gradient.shape
    else:
        source, weight = op.inputs[:2]
        inputs, outputs, weights = source.nbytes, op.outputs[0].nbytes, weight.nbytes
        grid = source.shape if op.product == "input" else op.outputs[0].shape
    window = prod(op.kernel)
    channels, width = weight.shape[1], weight.shape[0] // op.groups
    return Kernel(
        _kind_of_conv(op, channels, width, nhwc),
        phase=_phase(op),
        macs=op.macs,
        in_bytes=inputs,
        out_bytes=outputs,
        weight_bytes=weights,
        rows=grid[0] * prod(grid[2:]),
        width=width,
        depth=channels * window,
        channels=channels,
        groups=op.groups,
        window=window,
        step=op.stride[0] if op.stride else 1,
        side=grid[-1],
        itemsize=op.inputs[0].itemsize,
        nhwc=nhwc,
        scope=op.scope,
    )


def _kind_of_conv(op: Operator, channels: int, width: int, nhwc: bool) -> str:
    if op.groups == 1:
        return "conv1" if prod(op.kernel) == 1 else "conv"
    if channels == 1:
        return "depthwise" if nhwc or _cudnn_takes(op) else "direct"
    if channels != width or op.dilated or width & (width - 1):
        return "group"
    return "packed" if width <= 32 and op.groups % 32 == 0 else "even"


def _cudnn_takes(op: Operator) -> bool:
    """Whether PyTorch leaves a depthwise convolution of NCHW maps to cuDNN, as ``ConvParams.use_cudnn_depthwise`` decides; else it runs its own."""
    side, channels = op.kernel[0], op.groups
    data = op.outputs[0] if op.product == "input" else op.inputs[1 if op.product == "weight" else 0]
    if len(op.kernel) != 2 or op.kernel[0] != op.kernel[1] or side not in (1, 3, 5) or op.inputs[0].itemsize != 2 or op.dilated:
        return False
    if channels < 32 or data.shape[3] < 7 or len(set(op.stride)) > 1:
        return False
    return op.stride[0] == 1 or (op.stride[0] == 2 and side > 1 and (channels >= 512 or (channels >= 256 and data.shape[3] >= 28)))


def _linear_kernel(op: Operator) -> Kernel:
    out = op.outputs[0]
    left = next((use for use in op.inputs if len(use.shape) >= 2 and use.shape[-2:-1] == out.shape[-2:-1]), op.inputs[0])
    depth = left.shape[-1] if left.shape else 1
    batches = prod(out.shape[:-2]) if op.name in ("bmm", "baddbmm") else 1
    return Kernel(
        "linear",
        phase=_phase(op),
        macs=op.macs,
        in_bytes=_nbytes(op.inputs),
        out_bytes=_nbytes(op.outputs),
        rows=(out.nbytes // out.itemsize) // max(out.shape[-1], 1) // batches if out.shape else 1,
        width=out.shape[-1] if out.shape else 1,
        depth=depth,
        channels=depth,
        groups=batches,
        itemsize=op.inputs[0].itemsize,
        scope=op.scope,
    )


def prefers_channels_last(traced: Trace) -> bool:
    """Whether PyTorch's compiler turns the maps to channels-last: by MACs, since grouped convolutions lose what the others gain.

    Source: the measured speed-ups that torch._inductor weighs in ``GraphLowering.decide_layout_opt`` (grouped 1.358, small 0.783, narrowing 0.725,
    others 0.823 of the time); in training any grouped or narrowing convolution decides against it.
    """
    macs: Counter[str] = Counter()
    for op in traced.operators:
        if op.kind != "conv" or op.phase != "forward" or len(op.inputs[1].shape) < 4:
            continue
        out_channels, in_channels, height = op.inputs[1].shape[:3]
        if op.groups > 1 and in_channels > 1:
            macs["grouped"] += op.macs
        elif out_channels <= 64 and in_channels <= 64:
            macs["small"] += op.macs
        elif out_channels * 2 <= in_channels and height > 1:
            macs["narrowing"] += op.macs
        else:
            macs["other"] += op.macs
    if traced.mode == "train":
        return not macs["grouped"] and not macs["narrowing"] and macs["other"] > 0
    weighed = 1.358 * macs["grouped"] + 0.783 * macs["small"] + 0.725 * macs["narrowing"] + 0.823 * macs["other"]
    return 0 < weighed <= sum(macs.values())


class _Value:
    """A block's content while kernels are joined: written to memory, or a chain of pointwise operators over blocks that are."""

    __slots__ = ("bases", "doubled", "kernel", "nbytes", "written")

    def __init__(self, nbytes: int, bases: dict[tuple[int, int], int], written: bool, kernel: int = -1, doubled: bool = False) -> None:
        self.doubled = doubled
        """Whether the chain reads a norm's output twice (x * sigmoid(x)): the compiler then writes that output where the size changes."""
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

    A pointwise value is written only where something else than a pointwise operator needs it. A reduction takes its input's chain into its kernel and
    writes the chain's value in passing where others need it too. A convolution or product is a library call: its inputs are in memory.
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
        kernel = Kernel(kind, phase=phase, in_bytes=read, out_bytes=out_bytes, side=side, window=_reads(bases), nhwc=self.nhwc, scope=op.scope)
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
        """A reduction or a norm over rows: one kernel with its input's chain; a map that comes out stays in its registers until needed.

        A norm over more than rows fit in registers for (group norm, batch norm in training) reads its input again to apply what it found. A mean over
        positions goes across rows and stands alone.
        """
        big = max(op.inputs, key=lambda use: use.nbytes, default=None)
        if op.kind == "reduce" and big is not None and len(big.shape) == 4 and big.shape[2] * big.shape[3] > 1:
            if _reads(self.bases(big)) > _REALIZE_SHARED:
                self.write(big, op)
            self.launch("fused-mean", self.bases(big), _nbytes(op.outputs), op, big)
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
            self.kernels.append(_matrix_kernel(op, self.nhwc))
        elif op.kind == "pool" and op.phase == "forward":  # a pointwise operator over a window; unused indices are never made
            bases: dict[tuple[int, int], int] = {}
            for use in op.inputs:
                bases |= self.bases(use)
            for use in op.outputs:
                self.set(use, _Value(use.nbytes, bases, False))
            return
        else:
            self.kernels.append(_moving_kernel(op))
        for use in op.outputs:
            self.set(use, _Value(use.nbytes, {}, True))
        if op.bias:  # added by the kernel that reads the map next
            use = op.outputs[0]
            self.set(use, _Value(use.nbytes, {(use.storage, self.versions[use.storage]): use.nbytes}, False))

    def lay_out(self, op: Operator) -> None:
        """A map in another order: the kernel that makes it writes it so, but a part of one is written by itself."""
        source, target = op.inputs[0], op.outputs[0]
        if _is_slice(source, self.traced):
            self.launch("fused", self.bases(source), source.nbytes, op, source)
            self.set(target, _Value(target.nbytes, {}, True))
        else:
            self.set(target, self.value(source))

    def run(self) -> list[Kernel]:
        for index, op in enumerate(self.traced.operators):
            self.done = index
            batch_norm = op.kind == "norm" and "batch_norm" in op.name and op.phase == "forward" and self.traced.mode == "infer"
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
