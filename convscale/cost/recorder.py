"""The dispatch mode that turns every operator of a pass into one on meta tensors, and notes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from convscale.cost.autocast import tensors_in
from convscale.cost.kernels import OWN_KERNELS
from convscale.cost.operators import FREE, base_name, kind_of, macs_of
from convscale.cost.trace import Operator, Use
from convscale.nn.kernels import launch
from convscale.nn.kernels.norm import PARTS

_OVERWRITING = frozenset({"fill", "zero", "copy", "bernoulli", "uniform", "normal"})
"""Operators whose in-place form does not read what it overwrites."""
_CONTIGUOUS_ONLY = frozenset({"native_layer_norm", "native_group_norm"})
"""CUDA's kernels for these take maps in the order of their dimensions only and copy all others first."""
_SHAPE_KEEPING = frozenset(
    {"relu", "silu", "sigmoid", "hardswish", "hardsigmoid", "hardtanh", "leaky_relu", "mish", "gelu", "tanh", "elu"}
    | {"threshold", "add", "sub", "mul", "div"}
)
"""Pointwise operators whose output has their first input's shape and type, where the others fit into it."""


class _Call(NamedTuple):
    """One operator as the dispatcher hands it over, on meta tensors."""

    func: OpOverload
    """The overload that was called."""
    name: str
    """Its base name: no overload, in-place underscore or ``_backward``."""
    kind: str
    """As ``kind_of`` has it."""
    args: Sequence[Any]
    """Positional arguments, tensors moved to the meta device and laid out as CUDA would have them."""
    kwargs: Mapping[str, Any]
    """Keyword arguments, moved too."""
    out: Any
    """What it gave: a tensor or several."""
    backward: bool
    """Whether it computes gradients."""


class Recorder(TorchDispatchMode):
    """Turns every operator into one on meta tensors and notes it."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Operator] = []
        self.views = 0
        self.storages: list[int] = []
        """Bytes of each block, by its number."""
        self.weights: set[int] = set()
        """Blocks of parameters, buffers and the optimiser's state."""
        self.unsupported: Counter[str] = Counter()
        self.phase = "forward"
        self.scope = [""]
        """Paths of the modules that run, the innermost last."""
        self.last = "none"
        """The operator that ran last, for messages."""
        self._numbers: dict[int, int] = {}
        self._alive: list[object] = []  # a freed block's address could come back as another's
        self._moved: dict[int, torch.Tensor] = {}
        self._facts: dict[OpOverload, tuple[str, str]] = {}

    def number(self, tensor: torch.Tensor) -> int:
        """The number of the block that ``tensor`` lies in."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._numbers:
            self._numbers[key] = len(self.storages)
            self.storages.append(storage.nbytes())
            self._alive.append(storage)
        return self._numbers[key]

    def use(self, tensor: torch.Tensor) -> Use:
        """How ``tensor`` is touched."""
        shape = tuple(tensor.shape)
        elements = 1
        for size, step in zip(shape, tensor.stride(), strict=True):
            elements *= size if step else min(size, 1)  # an expanded dimension is one element read again and again
        return Use(
            self.number(tensor),
            shape,
            tensor.element_size(),
            elements * tensor.element_size(),
            _is_channels_last(tensor),
        )

    def update(self, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        """Note a step of SGD with momentum: weight, gradient and momentum are read, weight and momentum written."""
        use = self.use(weight)
        momentum = use._replace(storage=len(self.storages))
        self.storages.append(use.nbytes)
        self.weights.add(momentum.storage)
        inputs = (use, self.use(gradient), momentum)
        self.operators.append(Operator("sgd", "update", "", "update", inputs, (use, momentum), 0))

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func not in self._facts:
            self._facts[func] = (base_name(func), kind_of(func))
        name, kind = self._facts[func]
        self.last = str(func)
        # A number of a tensor that has values may be asked for; of a meta tensor the call below raises, and the trace
        # ends with an error that names the operator.
        if name == "_local_scalar_dense" and args[0].device.type != "meta":
            return func(*args, **(kwargs or {}))

        # 1. Run it on the meta device: shapes, types and strides come out, nothing is computed.
        args = self._to_meta(args)
        kwargs = {key: self._to_meta(value) for key, value in (kwargs or {}).items()}
        if func._schema.name == launch.NAME:
            self._note_launch(*args)
            return None
        if func._schema.name in PARTS:
            with self:
                return PARTS[func._schema.name](*args, **kwargs)
        backward = func._schema.name.endswith(("_backward", "_backward_data"))
        out = _shortcut(func, name, args)
        if out is None:
            out = func(*args, **kwargs)

        # 2. Lay the maps out as CUDA would. A meta kernel keeps its input's layout; CUDA's convolutions and norms copy
        # maps that lie otherwise than they need, and those copies are kernels with bytes of their own.
        if kind == "conv":
            args, out = self._with_cuda_layout(args, out, backward)
        elif backward and name == "native_batch_norm" and _is_channels_last(args[0]) != _is_channels_last(args[1]):
            args = [self._laid_out(args[0], _is_channels_last(args[1])), *args[1:]]
            out = (torch.empty_like(args[1]), *out[1:])
        elif name in _CONTIGUOUS_ONLY:
            args = [self._laid_out(a, False) if isinstance(a, torch.Tensor) and a.dim() > 2 else a for a in args]

        # 3. Note it, unless no kernel would run: views, allocations, and copies of plain numbers.
        if kind in FREE:
            self.views += 1
            return out
        if name == "copy" and len(args) > 1 and not isinstance(args[1], torch.Tensor):
            return out
        self._note(_Call(func, name, kind, args, kwargs, out, backward))
        return out

    def _to_meta(self, value: Any) -> Any:
        """``value`` with every tensor in it on the meta device; one tensor always becomes the same one."""
        if isinstance(value, torch.Tensor):
            if value.device.type == "meta":
                return value
            if value.dim() == 0 and not isinstance(value, nn.Parameter):
                return value  # a number in a tensor mixes with any device
            if id(value) not in self._moved:
                self._moved[id(value)] = value.to("meta")
                self._alive.append(value)
            return self._moved[id(value)]
        if isinstance(value, list | tuple):
            return type(value)([self._to_meta(item) for item in value])
        return torch.device("meta") if isinstance(value, torch.device) else value

    def _with_cuda_layout(self, args: Sequence[Any], out: Any, backward: bool) -> tuple[list[Any], Any]:
        """A convolution's inputs and outputs as CUDA lays them out, which a meta convolution does not.

        All maps are channels-last if the input or the weight is; a map that lies otherwise is copied first.

        Source: ``cudnn_conv_suggest_memory_format`` in PyTorch's ``ConvUtils.h``.
        """
        args = list(args)
        # Forward: (input, weight, ...). Backward: (gradient, input, weight, ...), where the gradient has no say.
        maps, voters = ((0, 1), (1, 2)) if backward else ((0,), (0, 1))
        last = any(_is_channels_last(args[i]) for i in voters if isinstance(args[i], torch.Tensor))
        for i in maps:
            args[i] = self._laid_out(args[i], last)
        form = torch.channels_last if last else torch.contiguous_format
        outs = (out,) if isinstance(out, torch.Tensor) else out
        outs = [t.contiguous(memory_format=form) if isinstance(t, torch.Tensor) and t.dim() == 4 else t for t in outs]
        return args, outs[0] if isinstance(out, torch.Tensor) else tuple(outs)

    def _laid_out(self, tensor: torch.Tensor, last: bool) -> torch.Tensor:
        """``tensor`` in channels-last or in its own order, by a copy that is noted where it lies otherwise or is a part
        of a larger map.
        """
        form = torch.channels_last if last and tensor.dim() == 4 else torch.contiguous_format
        if tensor.is_contiguous(memory_format=form):
            return tensor
        copy = torch.empty_like(tensor, memory_format=form)
        uses = (self.use(tensor),), (self.use(copy),)
        self.operators.append(Operator("contiguous", "copy", self.scope[-1], self.phase, *uses, 0))
        return copy

    def _note_launch(self, name: str, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> None:
        """One of our own kernels, by what it reads and writes."""
        inputs, outputs = (tuple(self.use(tensor) for tensor in tensors) for tensors in (reads, writes))
        kind = OWN_KERNELS[name]
        window = (3, 3) if kind == "pool" else ()
        self.operators.append(Operator(name, kind, self.scope[-1], self.phase, inputs, outputs, 0, kernel=window))

    def _note(self, call: _Call) -> None:
        """Append the operator, or the operators, that a call is to a GPU."""
        name, kind, args, backward = call.name, call.kind, call.args, call.backward
        inputs = [self.use(t) for t in tensors_in((args, tuple(call.kwargs.values())))]
        if name in _OVERWRITING and call.func._schema.is_mutable:
            inputs = inputs[1:]  # what it overwrites it does not read
        outputs = [self.use(t) for t in tensors_in((call.out,))]
        if name == "embedding" and kind == "copy" and not backward:  # of its table only the rows looked up are read
            inputs[0] = inputs[0]._replace(nbytes=min(inputs[0].nbytes, outputs[0].nbytes))
        if kind == "cast" and _dtype_of(args) == _dtype_of((call.out,)):
            kind = "copy"  # the same type in another order or place
        if name == "native_batch_norm" and kind == "norm" and not backward:
            outputs = [use for use in outputs if use.nbytes]  # in inference its statistics are empty
        if kind == "unknown":
            self.unsupported[str(call.func)] += 1
        if kind == "conv" and backward:
            self._note_conv_backward(call, inputs)
            return
        macs = 0 if backward else macs_of(name, args, call.out)
        operator = Operator(name, kind, self.scope[-1], self.phase, tuple(inputs), tuple(outputs), macs)
        if kind == "conv":
            operator = _with_conv_facts(operator, args)
        elif kind == "linear" and self.phase == "backward":
            # Autograd makes a weight's gradient as (gradient transposed) x input.
            weight = bool(outputs[0].shape) and args[0].dim() == 2 and _is_transposed(args[0])
            operator = operator._replace(product="weight" if weight else "input")
        elif kind == "pool":
            window = next((a for a in args[1:] if isinstance(a, list | tuple)), ())
            operator = operator._replace(kernel=tuple(window))
        self.operators.append(operator)

    def _note_conv_backward(self, call: _Call, inputs: Sequence[Use]) -> None:
        """A backward convolution is up to three kernels: the input's gradient, the weight's, the bias's.

        Each of the two products multiplies as often as the forward pass did: the positions of its smaller map (the
        output; of a transposed convolution the input) times the weight's elements.
        """
        # aten::convolution_backward(gradient, input, weight, bias_sizes, stride, padding, dilation, transposed,
        # output_padding, groups, output_mask)
        gradient, x, weight = inputs[:3]
        stride, dilation, transposed, groups = call.args[4], call.args[6], call.args[7], call.args[9]
        grid = call.args[1 if transposed else 0].shape  # (N, C, H, W)
        macs = grid[0] * prod(grid[2:]) * (weight.nbytes // weight.itemsize)
        products = (("input", (gradient, weight)), ("weight", (gradient, x)))
        for (product, read), made in zip(products, call.out[:2], strict=True):
            if made is not None:
                operator = Operator(
                    name="convolution",
                    kind="conv",
                    scope=self.scope[-1],
                    phase=self.phase,
                    inputs=read,
                    outputs=(self.use(made),),
                    macs=macs,
                    groups=groups,
                    kernel=tuple(weight.shape[2:]),
                    stride=tuple(stride),
                    product=product,
                    dilated=any(step > 1 for step in dilation),
                )
                self.operators.append(operator)
        if call.out[2] is not None:
            uses = (gradient,), (self.use(call.out[2]),)
            self.operators.append(Operator("sum", "reduce", self.scope[-1], self.phase, *uses, 0))


def _with_conv_facts(operator: Operator, args: Sequence[Any]) -> Operator:
    """A forward convolution with its kernel, stride, groups, bias and dilation."""
    # aten::convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
    groups, stride, dilation = (args[8], args[3], args[5]) if operator.name == "convolution" else (1, (), ())
    return operator._replace(
        groups=groups,
        kernel=tuple(args[1].shape[2:]),
        stride=tuple(stride),
        bias=len(args) > 2 and args[2] is not None,
        dilated=any(step > 1 for step in dilation),
    )


def _shortcut(func: OpOverload, name: str, args: Sequence[Any]) -> Any:
    """The output of a batch norm, or of a pointwise operator that plainly has its first input's shape and type, else
    None.

    Torch's own way to these shapes takes a millisecond or more a call, most of a trace's time.
    """
    if not args or not isinstance(args[0], torch.Tensor):
        return None
    first, shape = args[0], args[0].shape
    if name == "native_batch_norm" and not func._schema.name.endswith("_backward"):
        # (input, weight, bias, running_mean, running_var, training, ...) -> the map, its mean, its inverse deviation,
        # the last two empty in inference and never below single precision
        channels = shape[1] if args[5] else 0
        statistics = first.new_empty(channels, dtype=torch.promote_types(first.dtype, torch.float32))
        return torch.empty_like(first), statistics, torch.empty_like(statistics)
    if name not in _SHAPE_KEEPING or not first.is_floating_point():
        return None
    for other in args[1:]:
        if isinstance(other, torch.Tensor) and other is not first:
            fits = len(other.shape) <= len(shape) and all(
                mine in (1, size) for mine, size in zip(reversed(other.shape), reversed(shape), strict=False)
            )
            if other.dtype != first.dtype or not fits:
                return None
        elif isinstance(other, complex):
            return None
    return first if func._schema.is_mutable else torch.empty_like(first)


def _is_channels_last(tensor: torch.Tensor) -> bool:
    """Whether PyTorch takes a tensor's strides for channels-last, as in ``is_channels_last_strides_2d``: unsure ones
    are not.
    """
    if tensor.dim() != 4:
        return False
    least, sizes, strides = 0, tensor.shape, tensor.stride()
    if strides[1] == 0:
        return False
    # Strides must grow from channels over width and height to images.
    for d in (1, 3, 2, 0):
        if sizes[d] == 0 or strides[d] < least or (d == 0 and least == strides[1]):
            return False
        least = strides[d] * max(sizes[d], 1)
    return True


def _dtype_of(values: Sequence[object]) -> torch.dtype | None:
    """Type of the first tensor among ``values``."""
    return next((t.dtype for t in tensors_in(values)), None)


def _is_transposed(tensor: torch.Tensor) -> bool:
    """Whether a matrix is a view of its transpose."""
    return tensor.stride(0) == 1 and tensor.shape[0] > 1
