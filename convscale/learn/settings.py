"""Precision and memory layout by measurement: which of them trains this network fastest on this device."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
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
