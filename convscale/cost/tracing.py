"""One pass over a network that computes nothing and sees every operator.

The network runs on meta tensors (shapes without values) under a dispatch mode that stands below autograd, so what is
recorded is what a GPU would be asked for: casts of autocast, in-place updates, the backward's own operators. Nothing of
the module changes: its parameters are stood in for by meta ones during the pass, flags are put back, and no random
number is drawn.
"""

from __future__ import annotations

import math
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from convscale.conditions import Conditions, sides
from convscale.cost.autocast import Autocast, tensors_in
from convscale.cost.recorder import Recorder
from convscale.cost.subject import subject_of
from convscale.cost.trace import Trace
from convscale.errors import UserError, first_line
from convscale.networks.inputs import check_shapes_known, image_channels
from convscale.nn.modes import as_it_was, in_mode

_LOW = {"amp": torch.float16, "amp_bf16": torch.bfloat16, "bf16": torch.bfloat16}
_MOST_ELEMENTS = 2**48
"""Of a batch of images: a thousand times what the largest card holds, and far from where sizes overflow."""
_ONE_AT_A_TIME = threading.RLock()
"""Held during a pass: another thread's may be over the same network, whose weights are stood in for meanwhile."""


def trace(
    net: nn.Module, conditions: Conditions, *, channels: int | None = None, fast_norm: bool | None = None
) -> Trace:
    """Trace one call of ``net`` without computing anything.

    Args:
        net: any module that takes an (N, C, H, W) batch, on any device, the meta device too; its ``training`` flags are
            ignored and left alone.
        conditions: batch and image size; mode: ``infer`` (no gradients) or ``train`` (forward, backward, and an SGD
            step with momentum); precision: ``fp32``, ``amp`` or ``amp_bf16`` (CUDA's autocast to float16 or bfloat16;
            ``bf16`` is the latter's other name), or ``fp16`` (weights and input in half precision); layout of input
            and weights.
        channels: image channels; None: those that the network takes.
        fast_norm: whether layer, group and RMS norm stay in low precision under autocast, as timm's ``fast_norm`` has
            it; None: yes for timm's own networks, since its published tables ran so, no for all others.

    Raises:
        UserError: the network's size is neither given nor known; or it can not run on these shapes or without values:
            the message names the operator; or it has weights to train and gives nothing that depends on them.
    """
    check_shapes_known(net)
    _, _, conditions = subject_of(net, conditions)
    with _ONE_AT_A_TIME, torch.inference_mode(False):  # whoever calls this may be in inference mode
        return _traced(net, conditions, channels or image_channels(net), fast_norm)


def _traced(net: nn.Module, conditions: Conditions, channels: int, fast_norm: bool | None) -> Trace:
    """As ``trace``, with all that is to be settled before settled."""
    training = conditions.mode == "train"
    recorder = Recorder()

    # 1. What goes in: a meta tensor for each parameter and buffer, whose blocks get the first numbers, and the images.
    stand_ins = _stand_ins(net, conditions)
    recorder.weights = {recorder.number(tensor) for tensor in stand_ins.values()}
    images = _images(conditions, channels)

    # 2. The pass. A network that can not run says why in one line; where it stopped is the recorder's last operator.
    fast_norm = type(net).__module__.startswith("timm.") if fast_norm is None else fast_norm
    autocast = _autocast(conditions, stand_ins, fast_norm)
    results: list[torch.Tensor] = []

    def run(module: nn.Module, batch: torch.Tensor) -> None:
        with autocast:
            output = module(batch)
        results.extend(t for t in tensors_in((output,)) if t.is_floating_point())
        if training:
            with _Recomputing(recorder, autocast):
                _go_back(type(net).__name__, results, stand_ins, recorder)

    scopes = _Scopes(net, recorder, autocast)
    try:
        with (
            as_it_was(net),
            in_mode(net, training),
            scopes,
            _random_state(),
            torch.set_grad_enabled(training),
            recorder,
        ):
            _with_stand_ins(net, stand_ins, images, run)
    except UserError:
        raise
    except Exception as error:
        where = f" in {scope}" if (scope := scopes.of(error)) else ""
        raise UserError(
            f"{type(net).__name__} can not be traced at {images.shape[2]}x{images.shape[3]} px: operator "
            f"{recorder.last}{where}: {first_line(error)}"
        ) from error

    # 3. What came out, as a value.
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
        conditions=conditions,
    )


def _stand_ins(net: nn.Module, conditions: Conditions) -> dict[str, torch.Tensor]:
    """A meta tensor for each parameter and buffer, shared ones once."""
    training = conditions.mode == "train"
    result: dict[str, torch.Tensor] = {}
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        meta = torch.empty_like(tensor.detach(), device="meta")
        if meta.is_floating_point():  # in which type the network is kept does not matter
            meta = meta.to(torch.float16 if conditions.precision == "fp16" else torch.float32)
        if conditions.layout == "nhwc" and meta.dim() == 4:
            meta = meta.to(memory_format=torch.channels_last)
        result[name] = meta.requires_grad_(training and isinstance(tensor, nn.Parameter) and tensor.requires_grad)
    return result


def _images(conditions: Conditions, channels: int) -> torch.Tensor:
    """The input (N, C, H, W) on the meta device."""
    assert conditions.image_size is not None  # settled by subject_of
    shape = (conditions.batch_size, channels, *sides(conditions.image_size))
    if math.prod(shape) > _MOST_ELEMENTS:
        raise UserError(
            f"a batch of {' x '.join(map(str, shape))} (images, channels, height, width) is more than any tensor "
            "holds; take smaller images or fewer"
        )
    dtype = torch.float16 if conditions.precision == "fp16" else torch.float32
    images = torch.empty(shape, dtype=dtype, device="meta")
    return images.contiguous(memory_format=torch.channels_last) if conditions.layout == "nhwc" else images


def _autocast(
    conditions: Conditions, stand_ins: Mapping[str, torch.Tensor], fast_norm: bool
) -> AbstractContextManager[object]:
    """CUDA's autocast for the precision, or nothing."""
    low = _LOW.get(conditions.precision)
    return nullcontext() if low is None else Autocast(low, {id(tensor) for tensor in stand_ins.values()}, fast_norm)


class _Pass(nn.Module):
    """A network and what is done with it, so that the stand-ins stay for all of it: what gradient checkpointing runs
    again, it runs in the backward pass.
    """

    def __init__(self, net: nn.Module, run: Callable[[nn.Module, torch.Tensor], None]) -> None:
        super().__init__()
        self.net = net
        self.run = run

    def forward(self, images: torch.Tensor) -> None:
        self.run(self.net, images)


def _with_stand_ins(
    net: nn.Module,
    stand_ins: Mapping[str, torch.Tensor],
    images: torch.Tensor,
    run: Callable[[nn.Module, torch.Tensor], None],
) -> None:
    """Call ``run`` with the network on stand-ins for its parameters."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in net.modules()):
        run(net, images)  # its parameters can not be stood in for; the recorder moves them one by one
    else:
        named = {f"net.{name}": tensor for name, tensor in stand_ins.items()}
        torch.func.functional_call(_Pass(net, run), named, (images,))


def _go_back(name: str, results: list[torch.Tensor], stand_ins: Mapping[str, torch.Tensor], recorder: Recorder) -> None:
    """The backward pass from every output, and the optimiser's step."""
    recorder.phase = "backward"
    recorder.scope[:] = [""]  # autograd does not say which module an operator belongs to
    weights = [t for t in stand_ins.values() if t.requires_grad]
    if not weights:
        return
    ends = [t for t in results if t.requires_grad]
    seeds = [torch.empty_like(t) for t in ends]
    gradients: Sequence[torch.Tensor | None] = [None] * len(weights)
    if ends:  # by the engine itself: torch.autograd.grad would switch function modes off for as long as it takes
        gradients = _engine_run_backward(
            tuple(ends), tuple(seeds), False, False, tuple(weights), allow_unreachable=True, accumulate_grad=False
        )
    if all(gradient is None for gradient in gradients):
        raise UserError(
            f"{name} has weights to train, but nothing that it gives depends on them, so that its training can not be "
            "counted; its output must be tensors, in lists, dictionaries or dataclasses, and no part of it scripted"
        )
    for weight, gradient in zip(weights, gradients, strict=True):
        if gradient is not None:
            recorder.update(weight, gradient)


class _Scopes:
    """Keeps a recorder's scope at the path of the module that runs, by hooks that stand for the time of the pass only;
    modules that other threads run are passed over.

    In the backward pass a module runs where gradient checkpointing makes its maps anew: then the recorder is told, and
    autocast is on again, with weights cast anew.
    """

    def __init__(self, net: nn.Module, recorder: Recorder, autocast: AbstractContextManager[object]) -> None:
        self.names = {id(module): name for name, module in net.named_modules()}
        self.recorder = recorder
        self.autocast = autocast
        self.thread = threading.get_ident()
        self._raised: BaseException | None = None
        self._raised_in = ""

    def __enter__(self) -> None:
        self._hooks = (
            nn.modules.module.register_module_forward_pre_hook(self._begin),
            # always: checkpointing leaves modules by an exception, once it has all that it wants
            nn.modules.module.register_module_forward_hook(self._end, always_call=True),
        )

    def __exit__(self, *_raised: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def of(self, error: BaseException) -> str:
        """The path of the innermost module that an error came from."""
        return self._raised_in if error is self._raised else self.recorder.scope[-1]

    def _begin(self, module: nn.Module, _inputs: object) -> None:
        if threading.get_ident() != self.thread:
            return
        if self.recorder.phase == "backward":
            if not _in_checkpoint():  # a gradient of a kind of its own, which may call modules
                return
            self.recorder.phase = "recompute"
            self.autocast.__enter__()
        scope = self.recorder.scope
        scope.append(self.names.get(id(module), scope[-1]))

    def _end(self, _module: nn.Module, _inputs: object, _outputs: object) -> None:
        if threading.get_ident() != self.thread or self.recorder.phase == "backward":
            return
        scope = self.recorder.scope
        error = sys.exc_info()[1]  # of a module that fails, where it is the innermost one
        if error is not None and error is not self._raised:
            self._raised, self._raised_in = error, scope[-1]
        scope.pop()
        if self.recorder.phase == "recompute" and len(scope) == 1:
            self.recorder.phase = "backward"
            self.autocast.__exit__(None, None, None)


class _Recomputing(TorchFunctionMode):
    """What gradient checkpointing makes anew outside of any module, in a function of the network's own."""

    def __init__(self, recorder: Recorder, autocast: AbstractContextManager[object]) -> None:
        super().__init__()
        self.recorder = recorder
        self.autocast = autocast

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if self.recorder.phase != "backward" or not _in_checkpoint():
            return func(*args, **given)
        self.recorder.phase = "recompute"
        try:
            if isinstance(self.autocast, Autocast):
                return self.autocast.__torch_function__(func, types, args, given)
            return func(*args, **given)
        finally:
            self.recorder.phase = "backward"


def _in_checkpoint() -> bool:
    """Whether this is called, in a backward pass of ours, by torch's gradient checkpointing."""
    frame = sys._getframe()
    while frame is not None and frame.f_code is not _go_back.__code__:
        if frame.f_globals.get("__name__") == checkpoint.__name__:
            return True
        frame = frame.f_back
    return False


@contextmanager
def _random_state() -> Iterator[None]:
    """Python's and torch's generators as they were."""
    python, cpu = random.getstate(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(cpu)
