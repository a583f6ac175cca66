"""Precision and memory layout by measurement: which of them trains this network fastest on this device."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from convscale.errors import UserError, nearest
from convscale.learn.freeze import keep_statistics
from convscale.learn.recipe import Recipe
from convscale.machine import check_own, need_cuda

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Autocast's type by precision; fp32 has none."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a run computes."""

    precision: str
    """``fp32``, ``bf16`` or ``fp16``."""
    layout: str
    """``nchw`` or ``nhwc``."""
    measured: tuple[tuple[str, str, float], ...] = ()
    """(precision, layout, training images/s) of what was tried; empty when nothing was left to choose."""


def usable_device(device: str | torch.device) -> torch.device:
    """The device by its name.

    Raises:
        UserError: an unknown one, or one that is not there.
    """
    where = torch.device(check_own(str(device)))
    if where.type == "cuda":
        need_cuda(str(where))
    return where


def choose_settings(net: nn.Module, recipe: Recipe, inputs: torch.Tensor, *, seconds_each: float = 1.0) -> Settings:
    """The recipe's precision and layout, with ``auto`` replaced by the fastest as measured by forward and backward on a
    copy of ``net``.

    fp32 is always tried; bf16 only where the device computes in it natively.

    Args:
        net: on its device.
        recipe: precision and layout, perhaps ``auto``.
        inputs: float (N, C, H, W), a batch on that device.
        seconds_each: time for each candidate, its warm-up apart.
    """
    precisions = [recipe.precision]
    if recipe.precision == "auto":
        precisions = native_precisions(inputs.device)
    elif recipe.precision == "amp":
        precisions = [half_precision(inputs.device)]
    layouts = ["nchw", "nhwc"] if recipe.layout == "auto" else [recipe.layout]
    candidates = [(precision, layout) for precision in precisions for layout in layouts]
    if len(candidates) == 1:
        return Settings(precision=candidates[0][0], layout=candidates[0][1])
    measured = tuple(
        (precision, layout, _images_per_s(net, inputs, precision, layout, seconds_each, keep=recipe.keep_statistics))
        for precision, layout in candidates
    )
    best = max(measured, key=lambda entry: entry[2])
    return Settings(precision=best[0], layout=best[1], measured=measured)


def half_precision(device: torch.device) -> str:
    """What ``amp`` means: the half precision that is native to the device, ``bf16`` where none is."""
    return next((precision for precision in native_precisions(device) if precision != "fp32"), "bf16")


def autocast_type(precision: str, device: torch.device) -> torch.dtype | None:
    """The type that autocast computes in for ``fp32`` (None: no autocast), ``bf16``, ``fp16`` or ``amp``.

    Raises:
        UserError: another precision.
    """
    known = ("fp32", "amp", *AUTOCAST)
    if precision not in known:
        raise UserError(f"precision {precision!r} is unknown{nearest(str(precision), known)}")
    return AUTOCAST.get(half_precision(device) if precision == "amp" else precision)


def native_precisions(device: torch.device) -> list[str]:
    """Of ``fp32``, ``bf16`` and ``fp16`` those that the device computes in natively; of a GPU its half precision."""
    if device.type == "cuda":
        return ["bf16"] if torch.cuda.is_bf16_supported(including_emulation=False) else ["fp16"]
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return ["fp32", "bf16"] if has_bf16 else ["fp32"]


@contextmanager
def told_of_lone_values() -> Iterator[None]:
    """A forward pass in training: a norm that is left with one value per channel has nothing to be a statistic of.

    Raises:
        UserError: in the place of torch's ValueError.
    """
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            "a batch of 1 leaves a norm with one value per channel, where a map is 1 x 1; use batch_size 2 or more, a "
            "larger image, or keep_statistics=true"
        ) from error


@contextmanager
def lone_pixels_learnt(net: nn.Module, precision: str, device: torch.device) -> Iterator[None]:
    """Where a dense convolution strides over a map of one pixel, it learns from what it should.

    In bfloat16 on a processor the gradient of such a kernel (wider than one) is whatever lies in memory, in PyTorch
    2.14 at least: seen in half of 200 calls. With a stride of 1 the convolution says the same of one pixel, and its
    gradient is right.
    """
    meant = precision == "bf16" and device.type == "cpu"
    found = [part for part in net.modules() if isinstance(part, nn.Conv2d) and _may_be_wrong(part)] if meant else []
    hooks = [part.register_forward_hook(_without_stride) for part in found]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _may_be_wrong(conv: nn.Conv2d) -> bool:
    strided, wide = max(conv.stride) > 1, max(conv.kernel_size) > 1
    # With this padding, one pixel stays one pixel whatever the stride.
    same = isinstance(conv.padding, tuple) and all(
        2 * pad == dilation * (side - 1)
        for pad, dilation, side in zip(conv.padding, conv.dilation, conv.kernel_size, strict=True)
    )
    plain = type(conv).forward is nn.Conv2d.forward  # some standardise their weights first
    return plain and strided and wide and same and conv.groups == 1 and conv.padding_mode == "zeros"


def _without_stride(conv: nn.Module, given: tuple[torch.Tensor, ...], made: torch.Tensor) -> torch.Tensor:
    assert isinstance(conv, nn.Conv2d)
    if not conv.training or given[0].shape[-2:] != (1, 1):
        return made
    return F.conv2d(given[0], conv.weight, conv.bias, 1, conv.padding, conv.dilation)


def _images_per_s(
    net: nn.Module, inputs: torch.Tensor, precision: str, layout: str, seconds: float, *, keep: bool
) -> float:
    trial = copy.deepcopy(net).train()
    if keep:
        keep_statistics(trial)
    memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    # pyright: ignore[reportCallIssue]
    trial, inputs = trial.to(memory_format=memory_format), inputs.to(memory_format=memory_format)
    times, started = [], 0.0
    while len(times) < 2 or (time.perf_counter() - started < seconds and len(times) < 30):
        if len(times) == 1:
            started = time.perf_counter()  # the first step pays for allocations
        before = time.perf_counter()
        half = torch.autocast(
            inputs.device.type, AUTOCAST.get(precision, torch.bfloat16), enabled=precision in AUTOCAST
        )
        with half, told_of_lone_values():
            outputs = trial(inputs)
        outputs.float().square().mean().backward()
        if inputs.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - before)
    return len(inputs) / min(times[1:])
