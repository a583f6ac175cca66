"""One pass over a network that computes nothing and sees every operator.

The network runs on meta tensors (shapes without values) under a dispatch mode that stands below autograd, so what is
recorded is what a GPU would be asked for: casts of autocast, in-place updates, the backward's own operators. Nothing of
the module changes: its parameters are stood in for by meta ones during the pass, flags are put back, and no random
number is drawn.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from convscale.conditions import Conditions, sides
from convscale.cost.autocast import Autocast, tensors_in
from convscale.cost.recorder import Recorder
from convscale.cost.subject import subject_of
from convscale.cost.trace import Trace
from convscale.errors import UserError, first_line
from convscale.networks.inputs import image_channels
from convscale.nn.modes import in_mode

_LOW = {"amp": torch.float16, "amp_bf16": torch.bfloat16, "bf16": torch.bfloat16}
_MOST_ELEMENTS = 2**48
"""Of a batch of images: a thousand times what the largest card holds, and far from where sizes overflow."""


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
        fast_norm: whether layer and group norm stay in low precision under autocast, as timm's ``fast_norm`` has it;
            None: yes for timm's own networks, since its published tables ran so, no for all others.

    Raises:
        UserError: the network's size is neither given nor known; or it can not run on these shapes or without values:
            the message names the operator.
    """
    _, _, conditions = subject_of(net, conditions)
    training = conditions.mode == "train"
    recorder = Recorder()

    # 1. What goes in: a meta tensor for each parameter and buffer, whose blocks get the first numbers, and the images.
    stand_ins = _stand_ins(net, conditions)
    recorder.weights = {recorder.number(tensor) for tensor in stand_ins.values()}
    images = _images(conditions, channels or image_channels(net))

    # 2. The pass. A network that can not run says why in one line; where it stopped is the recorder's last operator.
    fast_norm = type(net).__module__.startswith("timm.") if fast_norm is None else fast_norm
    autocast = _autocast(conditions, stand_ins, fast_norm)
    try:
        with (
            in_mode(net, training),
            _scopes(net, recorder.scope),
            _random_state(),
            torch.set_grad_enabled(training),
            recorder,
        ):
            with autocast:
                output = _run(net, stand_ins, images)
            results = [t for t in tensors_in((output,)) if t.is_floating_point()]
            if training:
                _go_back(results, stand_ins, recorder)
    except UserError:
        raise
    except Exception as error:
        where = f" in {recorder.scope[-1]}" if recorder.scope[-1] else ""
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
        if conditions.precision == "fp16" and meta.is_floating_point():
            meta = meta.half()
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
            f"{shape[0]} images of {channels} x {shape[2]} x {shape[3]} are more than any tensor holds; take "
            "smaller or fewer ones"
        )
    images = torch.empty(shape, device="meta")
    images = images.half() if conditions.precision == "fp16" else images
    return images.contiguous(memory_format=torch.channels_last) if conditions.layout == "nhwc" else images


def _autocast(
    conditions: Conditions, stand_ins: Mapping[str, torch.Tensor], fast_norm: bool
) -> AbstractContextManager[object]:
    """CUDA's autocast for the precision, or nothing."""
    low = _LOW.get(conditions.precision)
    return nullcontext() if low is None else Autocast(low, {id(tensor) for tensor in stand_ins.values()}, fast_norm)


def _run(net: nn.Module, stand_ins: dict[str, torch.Tensor], images: torch.Tensor) -> object:
    """The network's output on stand-ins for its parameters."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in net.modules()):
        return net(images)  # its parameters can not be stood in for; the recorder moves them one by one
    return torch.func.functional_call(net, stand_ins, (images,))


def _go_back(results: list[torch.Tensor], stand_ins: Mapping[str, torch.Tensor], recorder: Recorder) -> None:
    """The backward pass from every output, and the optimiser's step."""
    recorder.phase, recorder.scope = "backward", [""]  # autograd does not say which module an operator belongs to
    weights = [t for t in stand_ins.values() if t.requires_grad]
    ends = [t for t in results if t.requires_grad]
    if not weights or not ends:
        return
    gradients = torch.autograd.grad(ends, weights, [torch.empty_like(t) for t in ends], allow_unused=True)
    for weight, gradient in zip(weights, gradients, strict=True):
        if gradient is not None:
            recorder.update(weight, gradient)


@contextmanager
def _scopes(net: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep ``stack`` at the path of the module that runs, by hooks that stand for the time of the pass only."""
    names = {id(module): name for name, module in net.named_modules()}

    def enter(module: nn.Module, _inputs: object) -> None:
        stack.append(names.get(id(module), stack[-1]))

    def leave(_module: nn.Module, _inputs: object, _outputs: object) -> None:
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
