"""One pass over a network that computes nothing and sees every operator.

The network runs on meta tensors (shapes without values) under a dispatch mode that stands below autograd, so what is
recorded is what a GPU would be
asked for: casts of autocast, in-place updates, the backward's own operators. Nothing of the module changes: its
parameters are stood in for by meta ones during the pass, flags are put back, and no random number is drawn.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from convscale.cost.autocast import Autocast, tensors_in
from convscale.cost.operators import FREE, base_name, kind_of, macs_of
from convscale.errors import UserError, first_line
from convscale.networks.inputs import image_channels

_LOW = {"amp": torch.float16, "bf16": torch.bfloat16}


class Use(NamedTuple):
    """One tensor as an operator reads or writes it."""

    storage: int
    """Number of the memory block it lies in; views share it."""
    shape: tuple[int, ...]
    """Its shape."""
    itemsize: int
    """Bytes of an element."""
    nbytes: int
    """Bytes touched; an expanded dimension counts once."""
    dense: bool
    """Whether PyTorch takes its strides for channels-last (always False unless it has four dimensions)."""


class Operator(NamedTuple):
    """One operator as it reaches the device."""

    name: str
    """ATen name without overload, in-place underscore and ``_backward``."""
    kind: str
    """conv, linear, norm, softmax, reduce, pool, copy, cast, random, pointwise, update, or unknown."""
    scope: str
    """Dotted path of the module that called it, empty for the network itself."""
    phase: str
    """``forward``, ``backward`` or ``update`` (the optimiser)."""
    inputs: tuple[Use, ...]
    """Tensors read."""
    outputs: tuple[Use, ...]
    """Tensors written."""
    macs: int
    """Multiply-accumulates."""
    groups: int = 1
    """Groups of a convolution."""
    kernel: tuple[int, ...] = ()
    """Kernel of a convolution or a pool's window where given."""
    stride: tuple[int, ...] = ()
    """Stride of a convolution."""
    bias: bool = False
    """Whether a convolution adds a bias, which CUDA does in a kernel of its own."""
    product: str = ""
    """For a backward convolution or product, what it makes: ``input`` or ``weight`` gradient."""
    dilated: bool = False
    """Whether a convolution's kernel is dilated."""

    @property
    def read_bytes(self) -> int:
        """Bytes read."""
        return sum(use.nbytes for use in self.inputs)

    @property
    def written_bytes(self) -> int:
        """Bytes written."""
        return sum(use.nbytes for use in self.outputs)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """All operators of one call of a network, with the conditions they hold for."""

    operators: tuple[Operator, ...]
    """In the order of dispatch; views and allocations are left out."""
    views: int
    """How many views and allocations were left out: they cost the host time only."""
    storages: tuple[int, ...]
    """Bytes of each memory block, by its number."""
    weights: frozenset[int]
    """Numbers of the blocks that hold parameters, buffers and the optimiser's state."""
    results: frozenset[int]
    """Numbers of the blocks that the network's outputs lie in."""
    params: int
    """Parameters, shared ones once."""
    param_tensors: int
    """Parameter tensors, shared ones once."""
    unsupported: dict[str, int]
    """Operators of unknown kind and how often they came; their bytes are counted, their MACs are not."""
    batch_size: int
    """Images a call."""
    image_size: tuple[int, int]
    """Height and width of the input in pixels."""
    mode: str
    """``infer`` or ``train``."""
    precision: str
    """``fp32``, ``amp``, ``bf16`` (both autocast) or ``fp16`` (the whole network in half precision)."""
    layout: str
    """``nchw`` or ``nhwc``."""


class _Recorder(TorchDispatchMode):
    """Turns every operator into one on meta tensors and notes it."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Operator] = []
        self.views = 0
        self.storages: list[int] = []
        self.unsupported: Counter[str] = Counter()
        self.phase = "forward"
        self.scope = [""]
        self.last = "none"
        self._numbers: dict[int, int] = {}
        self._alive: list[Any] = []  # a freed block's address could come back as another's
        self._moved: dict[int, torch.Tensor] = {}
        self._facts: dict[Any, tuple[str, str]] = {}
        self.weights: set[int] = set()

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
            elements *= size if step else min(size, 1)
        return Use(
            self.number(tensor),
            shape,
            tensor.element_size(),
            elements * tensor.element_size(),
            _is_channels_last(tensor),
        )

    def _to_meta(self, value: Any) -> Any:
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

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self._facts:
            self._facts[func] = (base_name(func), kind_of(func))
        name, kind = self._facts[func]
        self.last = str(func)
        if name == "_local_scalar_dense" and args[0].device.type != "meta":
            return func(*args, **kwargs)
        args = self._to_meta(args)
        if kwargs:
            kwargs = {key: self._to_meta(value) for key, value in kwargs.items()}
        backward = func._schema.name.endswith("_backward")
        out = _shortcut(func, name, args)
        if out is None:
            out = func(*args, **kwargs)
        if kind == "conv":
            args, out = self._with_cuda_layout(args, out, backward)
        elif backward and name == "native_batch_norm" and _is_channels_last(args[0]) != _is_channels_last(args[1]):
            args = [self._laid_out(args[0], _is_channels_last(args[1])), *args[1:]]
            out = (torch.empty_like(args[1]), *out[1:])
        elif name in _CONTIGUOUS_ONLY:
            args = [self._laid_out(a, False) if isinstance(a, torch.Tensor) and a.dim() > 2 else a for a in args]
        if kind in FREE:
            self.views += 1
            return out
        if name == "copy" and len(args) > 1 and not isinstance(args[1], torch.Tensor):
            return out
        self._note(func, name, kind, args, kwargs, out, backward)
        return out

    def _with_cuda_layout(self, args: Sequence[Any], out: Any, backward: bool) -> tuple[list[Any], Any]:
        """A convolution's inputs and outputs as CUDA lays them out, which a meta convolution does not.

        All maps are channels-last if the input or the weight is; a map that lies otherwise is copied first
        (cudnn_conv_suggest_memory_format).
        """
        args = list(args)
        maps = (0, 1) if backward else (0,)
        last = any(_is_channels_last(args[i]) for i in (*maps[1:], len(maps)) if isinstance(args[i], torch.Tensor)) or (
            not backward and _is_channels_last(args[0])
        )
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
        self.operators.append(
            Operator("contiguous", "copy", self.scope[-1], self.phase, (self.use(tensor),), (self.use(copy),), 0)
        )
        return copy

    def _note(self, func: Any, name: str, kind: str, args: Any, kwargs: Any, out: Any, backward: bool) -> None:
        inputs = [self.use(t) for t in tensors_in((args, tuple(kwargs.values())))]
        if name in ("fill", "zero", "copy", "bernoulli", "uniform", "normal") and func._schema.is_mutable:
            inputs = inputs[1:]  # what it overwrites it does not read
        outputs = [self.use(t) for t in tensors_in((out,))]
        if kind == "copy" and name == "embedding" and not backward:
            inputs[0] = inputs[0]._replace(nbytes=min(inputs[0].nbytes, outputs[0].nbytes))
        if kind == "cast" and _dtype_of(args) == _dtype_of((out,)):
            kind = "copy"
        if name == "native_batch_norm" and kind == "norm" and not backward:
            outputs = [use for use in outputs if use.nbytes]
        if kind == "unknown":
            self.unsupported[str(func)] += 1
        scope = self.scope[-1]
        if kind == "conv" and backward:
            self._note_conv_backward(args, out, inputs, scope)
            return
        operator = Operator(
            name, kind, scope, self.phase, tuple(inputs), tuple(outputs), 0 if backward else macs_of(name, args, out)
        )
        if kind == "conv":
            groups, stride, dilation = (args[8], args[3], args[5]) if name == "convolution" else (1, (), ())
            facts = {
                "stride": tuple(stride),
                "kernel": tuple(args[1].shape[2:]),
                "dilated": any(step > 1 for step in dilation),
            }
            operator = operator._replace(groups=groups, bias=len(args) > 2 and args[2] is not None, **facts)
        elif kind == "linear" and self.phase == "backward":
            operator = operator._replace(
                product="weight" if outputs[0].shape and args[0].dim() == 2 and _is_transposed(args[0]) else "input"
            )
        elif kind == "pool":
            window = next((a for a in args[1:] if isinstance(a, list | tuple)), ())
            operator = operator._replace(kernel=tuple(window))
        self.operators.append(operator)

    def _note_conv_backward(self, args: Any, out: Any, inputs: list[Use], scope: str) -> None:
        """A backward convolution is up to three kernels: the input's gradient, the weight's, the bias's."""
        gradient, x, weight = inputs[:3]
        stride, transposed, groups = args[4], args[7], args[9]
        grid = args[1].shape if transposed else args[0].shape
        macs = grid[0] * weight.nbytes // weight.itemsize
        for size in grid[2:]:
            macs *= size
        for position, (product, read) in enumerate((("input", (gradient, weight)), ("weight", (gradient, x)))):
            if out[position] is not None:
                self.operators.append(
                    Operator(
                        "convolution",
                        "conv",
                        scope,
                        self.phase,
                        read,
                        (self.use(out[position]),),
                        macs,
                        groups,
                        tuple(weight.shape[2:]),
                        tuple(stride),
                        product=product,
                        dilated=any(step > 1 for step in args[6]),
                    )
                )
        if out[2] is not None:
            self.operators.append(Operator("sum", "reduce", scope, self.phase, (gradient,), (self.use(out[2]),), 0))


_SHAPES_KEPT = (
    "relu silu sigmoid hardswish hardsigmoid hardtanh leaky_relu mish gelu tanh elu threshold add sub mul div"
)
_SHAPE_KEEPING = frozenset(_SHAPES_KEPT.split())


def _shortcut(func: Any, name: str, args: Sequence[Any]) -> Any:
    """The output of a batch norm, or of a pointwise operator that plainly has its first input's shape and type, else
    None.

    Torch's own way to these shapes takes a millisecond or more a call, most of a trace's time.
    """
    if (
        name == "native_batch_norm"
        and not func._schema.name.endswith("_backward")
        and isinstance(args[0], torch.Tensor)
    ):
        x = args[0]
        statistics = x.new_empty(
            x.shape[1] if args[5] else 0, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32
        )
        return torch.empty_like(x), statistics, torch.empty_like(statistics)
    if name not in _SHAPE_KEEPING or not isinstance(args[0], torch.Tensor) or not args[0].is_floating_point():
        return None
    first, shape = args[0], args[0].shape
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


_CONTIGUOUS_ONLY = frozenset({"native_layer_norm", "native_group_norm"})
"""CUDA's kernels for these take maps in the order of their dimensions only and copy all others first."""


def _is_channels_last(tensor: torch.Tensor) -> bool:
    """Whether PyTorch takes a tensor's strides for channels-last, as in ``is_channels_last_strides_2d``: unsure ones
    are not.
    """
    if tensor.dim() != 4:
        return False
    least, sizes, strides = 0, tensor.shape, tensor.stride()
    if strides[1] == 0:
        return False
    for d in (1, 3, 2, 0):
        if sizes[d] == 0 or strides[d] < least or (d == 0 and least == strides[1]):
            return False
        least = strides[d] * max(sizes[d], 1)
    return True


def _dtype_of(values: Any) -> torch.dtype | None:
    return next((t.dtype for t in tensors_in(values)), None)


def _is_transposed(tensor: torch.Tensor) -> bool:
    return tensor.stride(0) == 1 and tensor.shape[0] > 1


@contextmanager
def _mode_of(net: nn.Module, training: bool) -> Iterator[None]:
    """Every submodule's ``training`` flag set, and put back as it was, each one by itself."""
    flags = [(module, module.training) for module in net.modules()]
    try:
        for module, _ in flags:
            module.training = training
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def _scopes(net: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep ``stack`` at the path of the module that runs, by hooks that stand for the time of the pass only."""
    names = {id(module): name for name, module in net.named_modules()}

    def enter(module: nn.Module, _inputs: Any) -> None:
        stack.append(names.get(id(module), stack[-1]))

    def leave(_module: nn.Module, _inputs: Any, _outputs: Any) -> None:
        stack.pop()

    hooks = (
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _random_state() -> Iterator[None]:
    """Python's and torch's generators as they were."""
    python, cpu = random.getstate(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(cpu)


def _stand_ins(net: nn.Module, precision: str, layout: str, training: bool) -> dict[str, torch.Tensor]:
    """A meta tensor for each parameter and buffer, shared ones once."""
    result: dict[str, torch.Tensor] = {}
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        meta = torch.empty_like(tensor.detach(), device="meta")
        if precision == "fp16" and meta.is_floating_point():
            meta = meta.half()
        if layout == "nhwc" and meta.dim() == 4:
            meta = meta.to(memory_format=torch.channels_last)
        result[name] = meta.requires_grad_(training and isinstance(tensor, nn.Parameter) and tensor.requires_grad)
    return result


def _run(net: nn.Module, stand_ins: dict[str, torch.Tensor], x: torch.Tensor) -> Any:
    if any(isinstance(module, torch.jit.ScriptModule) for module in net.modules()):
        return net(x)  # its parameters can not be stood in for; the recorder moves them one by one
    return torch.func.functional_call(net, stand_ins, (x,))


def _record(
    net: nn.Module,
    stand_ins: dict[str, torch.Tensor],
    x: torch.Tensor,
    recorder: _Recorder,
    autocast: Any,
    training: bool,
) -> Any:
    with (
        _mode_of(net, training),
        _scopes(net, recorder.scope),
        _random_state(),
        torch.set_grad_enabled(training),
        recorder,
    ):
        with autocast:
            output = _run(net, stand_ins, x)
        results = [t for t in tensors_in((output,)) if t.is_floating_point()]
        if training:
            recorder.phase, recorder.scope = "backward", [""]
            wanted = [t for t in stand_ins.values() if t.requires_grad]
            ends = [t for t in results if t.requires_grad]
            if wanted and ends:
                gradients = torch.autograd.grad(ends, wanted, [torch.empty_like(t) for t in ends], allow_unused=True)
                _updates(wanted, gradients, recorder)
    return results


def _updates(weights: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None], recorder: _Recorder) -> None:
    """SGD with momentum: weight, gradient and momentum are read, weight and momentum written."""
    for weight, gradient in zip(weights, gradients, strict=True):
        if gradient is not None:
            use = recorder.use(weight)
            momentum = use._replace(storage=len(recorder.storages))
            recorder.storages.append(use.nbytes)
            recorder.weights.add(momentum.storage)
            recorder.operators.append(
                Operator("sgd", "update", "", "update", (use, recorder.use(gradient), momentum), (use, momentum), 0)
            )


def trace(
    net: nn.Module,
    image_size: int | tuple[int, int],
    batch_size: int = 1,
    *,
    mode: str = "infer",
    precision: str = "fp32",
    layout: str = "nchw",
    channels: int | None = None,
    fast_norm: bool | None = None,
) -> Trace:
    """Trace one call of ``net`` on ``batch_size`` images without computing anything.

    Args:
        net: any module that takes an (N, C, H, W) batch, on any device, the meta device too; its ``training`` flags are
            ignored and left alone.
        image_size: the input's side in pixels, or (height, width).
        batch_size: images a call.
        mode: ``infer`` (no gradients) or ``train`` (forward, backward, and an SGD step with momentum).
        precision: ``fp32``; ``amp`` or ``bf16``: CUDA's autocast to float16 or bfloat16; ``fp16``: weights and input in
            half precision.
        layout: ``nchw`` or ``nhwc`` for input and weights.
        channels: image channels; None: those the network declares (``in_chans``), else 3.
        fast_norm: whether layer and group norm stay in low precision under autocast, as timm's ``fast_norm`` has it;
            None: yes for timm's own networks, since its published tables ran so, no for all others.

    Raises:
        UserError: the network can not run on these shapes or without values; the message names the operator.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    training = mode == "train"
    recorder = _Recorder()
    stand_ins = _stand_ins(net, precision, layout, training)
    recorder.weights = {recorder.number(tensor) for tensor in stand_ins.values()}
    low = _LOW.get(precision)
    fast = type(net).__module__.startswith("timm.") if fast_norm is None else fast_norm
    autocast = nullcontext() if low is None else Autocast(low, {id(tensor) for tensor in stand_ins.values()}, fast)
    x = torch.empty(batch_size, channels or image_channels(net), height, width, device="meta")
    x = x.half() if precision == "fp16" else x
    x = x.contiguous(memory_format=torch.channels_last) if layout == "nhwc" else x
    try:
        results = _record(net, stand_ins, x, recorder, autocast, training)
    except UserError:
        raise
    except Exception as error:
        reason = first_line(error)
        where = f" in {recorder.scope[-1]}" if recorder.scope[-1] else ""
        raise UserError(
            f"{type(net).__name__} can not be traced at {height}x{width} px: operator {recorder.last}{where}: {reason}"
        ) from error
    params = list(net.parameters())
    return Trace(
        operators=tuple(recorder.operators),
        views=recorder.views,
        storages=tuple(recorder.storages),
        weights=frozenset(recorder.weights),
        results=frozenset(recorder.number(t) for t in results),
        params=sum(p.numel() for p in params),
        param_tensors=len(params),
        unsupported=dict(recorder.unsupported),
        batch_size=batch_size,
        image_size=(height, width),
        mode=mode,
        precision=precision,
        layout=layout,
    )
