"""The throughput of a network on a device that need not be at hand."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from convscale.errors import UserError
from convscale.speed.cache import key_of, load, save
from convscale.speed.conditions import Conditions
from convscale.speed.cost import build_meta, checked_size, peak_bytes, resolve
from convscale.speed.device import Device, get_device
from convscale.speed.kernels import Kernel, kernels_of
from convscale.speed.roofline import Table, kernel_s, shares, table_of
from convscale.speed.spread import CARD, card_shares, card_sigma, card_sigmas, groups_of, network_sigma
from convscale.speed.trace import Trace, trace

if TYPE_CHECKING:
    from convscale.arch.spec import NetSpec
    from convscale.speed.calibrate import Calibration

_HOST_US = {"eager": 8.0, "compiled": 5.0}
"""Microseconds a host takes to launch one kernel, PyTorch on a fast desktop CPU. Not fitted: at the tables' large batches the host is never late."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A predicted speed with its 80 % interval; never a measurement."""

    images_per_s: float
    """Images a second."""
    low: float
    """Lower end of the 80 % interval, in images a second."""
    high: float
    """Upper end of the 80 % interval, in images a second."""
    latency_s: float
    """Seconds a call of the whole batch."""
    bound_by: str
    """What most of the time is spent on: ``compute``, ``memory`` or ``launch``."""
    shares: Mapping[str, float]
    """Of the time, the share bound by compute, by memory and by launches."""
    doubts: tuple[str, ...]
    """Reasons to trust it less, each a sentence; empty when none is known."""
    conditions: Conditions
    """What it holds for."""
    peak_bytes: int
    """Most bytes alive at once, without the runtime's workspaces."""
    calibrated: bool = False
    """Whether measurements on the device set the scale."""

    def __str__(self) -> str:
        c = self.conditions
        return (
            f"{self.images_per_s:,.0f} images/s predicted (80 %: {self.low:,.0f} to {self.high:,.0f}), {c.mode} on {c.device}, {c.precision}, "
            f"{c.layout}, {c.runtime}, batch {c.batch_size}, {c.image_size} px; bound by {self.bound_by}"
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("conditions", "shares", "doubts")}
        return {"kind": "prediction", **values, "shares": dict(self.shares), "doubts": list(self.doubts), "conditions": self.conditions.to_dict()}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What the predictor needs of a traced network; small enough to keep many on disk."""

    kernels: tuple[tuple[Kernel, int], ...]
    """Kernels and how often each runs."""
    peak_bytes: int
    """Most bytes alive at once."""
    attention: bool
    """Whether it multiplies maps with each other."""
    unsupported: dict[str, int] = field(default_factory=dict)
    """Operators of unknown kind."""

    @property
    def launches(self) -> int:
        """Kernels a call launches."""
        return sum(count for _, count in self.kernels)


def workload_of(traced: Trace, *, compiled: bool) -> Workload:
    """A trace's kernels and what else a prediction needs of it."""
    products = any(op.name in ("bmm", "baddbmm") or "scaled_dot_product" in op.name for op in traced.operators)
    return Workload(
        kernels=tuple(kernels_of(traced, compiled=compiled)), peak_bytes=peak_bytes(traced), attention=products, unsupported=traced.unsupported
    )


def load_workload(net_or_spec: nn.Module | NetSpec | str, conditions: Conditions) -> Workload:
    """The workload of a network under conditions (their image size must be set or known to the network); a spec's comes from the cache if it can."""
    net, spec = resolve(net_or_spec)
    size = checked_size(conditions.image_size, net, spec)
    options: dict[str, Any] = {"mode": conditions.mode, "precision": conditions.precision, "layout": conditions.layout}
    compiled = conditions.runtime != "eager"
    if spec is None:
        assert net is not None
        return workload_of(trace(net, size, conditions.batch_size, **options), compiled=compiled)
    key = key_of("workload", spec, size=size, batch=conditions.batch_size, compiled=compiled, **options)
    if (kept := load(key)) is not None:
        kernels = tuple((Kernel(*values), count) for values, count in kept["kernels"])
        return Workload(**{**kept, "kernels": kernels})
    result = workload_of(trace(build_meta(spec), size, conditions.batch_size, **options), compiled=compiled)
    save(key, {f.name: getattr(result, f.name) for f in dataclasses.fields(result)})
    return result


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Coefficients of one mode and layout with how far they were off on families they were not fitted on."""

    coefficients: Mapping[str, float]
    """Names as in ``roofline.PRIOR``."""
    sigmas: Mapping[str, float]
    """How far it was off on families left out, as in ``spread.fit_sigmas``."""
    cards: tuple[str, ...]
    """Devices that the tables were measured on."""


@cache
def fitted_sets() -> Mapping[str, Fitted]:
    """All fitted sets: eager-nchw, eager-nhwc, compiled, train-nchw, train-nhwc, cpu."""
    record = json.loads((files("convscale.speed") / "coefficients.json").read_text(encoding="utf-8"))
    return MappingProxyType({name: Fitted(**{**value, "cards": tuple(value["cards"])}) for name, value in record["sets"].items()})


def set_name(conditions: Conditions, device: Device) -> str:
    """Which fitted set holds for conditions on a device."""
    if device.kind == "cpu":
        return "cpu"
    if conditions.mode == "train":
        return f"train-{conditions.layout}"
    return "compiled" if conditions.runtime != "eager" else f"eager-{conditions.layout}"


def doubts_of(work: Workload, conditions: Conditions, device: Device, share: Mapping[str, float], calibrated: bool) -> tuple[str, ...]:
    """Why a prediction may be off: what the tables do not hold, and what the predictor is known to get wrong."""
    return (*_known_doubts(work, conditions, device, share, calibrated), *_open_doubts(work, conditions, device, share, calibrated))


def _known_doubts(work: Workload, conditions: Conditions, device: Device, share: Mapping[str, float], calibrated: bool) -> list[str]:
    """Doubts whose error was measured on families or cards left out, so that the interval holds it already."""
    found: list[str] = []
    if work.peak_bytes > device.memory_gb * 2**30:
        found.append(f"the batch needs about {work.peak_bytes / 2**30:.1f} GB and {device.title} has {device.memory_gb:g} GB")
    if device.kind == "gpu" and device.name not in fitted_sets()[set_name(conditions, device)].cards and not calibrated:
        found.append(f"no measurement of a {device.title} was fitted: its data sheet scales what others measured")
    if device.sustained < 1 and not calibrated:
        found.append(f"its power limit of {device.watts:g} W does not hold the peak rate; {device.sustained:.0%} of it is assumed")
    if device.kind == "cpu" and not calibrated:
        found.append("no measurement of this CPU was given: calibrate with about a dozen measured models")
    if share["wide"] > 0.1:
        found.append(f"depthwise kernels larger than 5 x 5 take {share['wide']:.0%} of the time; their speed varies by size and library version")
    if share["ragged"] > 0.15:
        found.append(f"channel counts that are no multiple of 8 take {share['ragged']:.0%} of the time; libraries differ in what they do then")
    if share["grouped"] > 0.1 and conditions.layout == "nhwc":
        found.append(f"grouped convolutions in channels-last take {share['grouped']:.0%} of the time; their speed varies by library version")
    if share["huge"] > 0.1:
        found.append("a map has more than 2**31 elements: libraries then split the batch or fall back to slower kernels")
    return found


def _open_doubts(work: Workload, conditions: Conditions, device: Device, share: Mapping[str, float], calibrated: bool) -> list[str]:
    """Doubts that no table says anything of: each widens the interval."""
    found: list[str] = []
    if device.kind == "cpu" and not calibrated:
        if conditions.mode == "train" or conditions.precision != "fp32" or conditions.batch_size != 1:
            found.append("the CPU table holds single-precision inference at batch 1 only")
        if conditions.runtime == "eager" or conditions.layout != "nchw":
            found.append("the CPU table was measured behind PyTorch's compiler and in NCHW only")
    if conditions.mode == "train" and conditions.runtime != "eager":
        found.append("compiled training was never measured for the fit")
    if device.kind == "gpu" and conditions.precision != "amp" and not calibrated:
        found.append(f"all GPU measurements fitted ran under AMP, none in {conditions.precision}")
    if conditions.precision == "bf16" and not device.bfloat16:
        found.append(f"{device.title} has no matrix units for bfloat16")
    if work.attention:
        found.append("it multiplies maps with each other (attention); only ConvNets were fitted")
    if work.unsupported:
        found.append(f"unknown operators: {', '.join(sorted(work.unsupported))}")
    if share["host"] > 0.5:
        found.append("the host's launches take longer than the GPU's work; how long depends on its CPU, which is assumed")
    elif device.kind == "gpu" and conditions.batch_size < 32 and not calibrated:
        found.append("the tables hold large batches; at small ones kernels no longer fill the card")
    return found


def predict(
    net_or_spec: nn.Module | NetSpec | str,
    device: str = "rtx-4090",
    mode: str = "infer",
    precision: str = "amp",
    image_size: int | None = None,
    batch_size: int = 256,
    compiled: bool = False,
    layout: str = "nchw",
    calibration: Calibration | None = None,
) -> Prediction:
    """Predict a network's throughput on a device by its data sheet, without the device.

    Args:
        net_or_spec: any module (on any device, the meta device too; ``training`` is ignored), a NetSpec, or a model's name.
        device: a known device (``convscale.speed.device.devices``).
        mode: ``infer`` or ``train`` (forward, backward and an SGD step).
        precision: ``amp``, ``fp32``, ``bf16`` or ``fp16``.
        image_size: side in pixels; None: the network's own.
        batch_size: images a call; one that does not fit the device is a doubt, not an error.
        compiled: behind ``torch.compile``; else eager PyTorch.
        layout: ``nchw`` or ``nhwc``.
        calibration: what ``calibrate`` made of measurements on the device.

    Raises:
        UserError: an unknown device (the message names the nearest), an impossible condition, a network that can not be traced.
    """
    sheet = get_device(device)
    net, spec = resolve(net_or_spec)
    size = checked_size(image_size, net, spec)
    conditions = Conditions(
        device=sheet.name,
        mode=mode,
        precision=precision,
        layout=layout,
        batch_size=batch_size,
        image_size=size[0] if size[0] == size[1] else None,
        runtime="compiled" if compiled else "eager",
    )
    if precision == "int8":
        raise UserError("precision 'int8' is not predicted; amp, bf16, fp16 or fp32 are")
    if size[0] != size[1]:
        raise UserError(f"image_size must be one side in pixels for a prediction, got {size[0]}x{size[1]}")
    return predict_workload(load_workload(net_or_spec, conditions), conditions, calibration)


def predict_workload(work: Workload, conditions: Conditions, calibration: Calibration | None = None) -> Prediction:
    """Predict from a workload that is already there; ``conditions.device`` names the device. Arguments and errors as for ``predict``."""
    sheet = get_device(conditions.device)
    fitted = fitted_sets()[set_name(conditions, sheet)]
    coefficients: Mapping[str, float] = fitted.coefficients
    if calibration is not None:
        calibration.require(conditions)
        coefficients = calibration.coefficients
    if conditions.precision == "bf16" and not sheet.bfloat16:  # the general cores do it
        sheet = dataclasses.replace(sheet, tensor_tflops=sheet.fp32_tflops, sustained=1.0)
    table = table_of([work.kernels])
    total, _, _ = kernel_s(table, sheet, coefficients)
    share = {name: float(values[0]) for name, values in groups_of(table, total).items()}
    busy_s = float((total * table.count).sum())
    host_s = work.launches * _HOST_US["eager" if conditions.runtime == "eager" else "compiled"] * 1e-6 if sheet.kind == "gpu" else 0.0
    late = host_s > busy_s
    share["host"] = 1.0 if late else 0.0
    bound = {"compute": 0.0, "memory": 0.0, "launch": 1.0} if late else shares(table, sheet, coefficients)[0]
    latency_s = max(host_s, busy_s)
    doubts = doubts_of(work, conditions, sheet, share, calibration is not None)
    widened = 1.5 ** min(len(_open_doubts(work, conditions, sheet, share, calibration is not None)), 3)
    spread = widened * _spread(fitted, sheet, table, coefficients, calibration)
    images_per_s = conditions.batch_size / latency_s
    return Prediction(
        images_per_s=images_per_s,
        low=images_per_s * math.exp(-spread),
        high=images_per_s * math.exp(spread),
        latency_s=latency_s,
        bound_by=max(bound, key=lambda name: bound[name]),
        shares=MappingProxyType(bound),
        doubts=doubts,
        conditions=conditions,
        peak_bytes=work.peak_bytes,
        calibrated=calibration is not None,
    )


def _spread(fitted: Fitted, device: Device, table: Table, coefficients: Mapping[str, float], calibration: Calibration | None) -> float:
    """Half the width of the 80 % interval in log units, from errors on families left out and what is not known of the card.

    The caller widens it by half again for each doubt that no table says anything of: a judgement.
    """
    of_network = float(network_sigma(table, device, coefficients, fitted.sigmas)[0])
    of_card = 0.0
    if calibration is not None:
        of_card = card_sigma(card_shares(table, device, coefficients)[0], calibration.covariance)
    elif device.name not in fitted.cards or device.kind == "cpu":
        prior = card_sigmas(device, known=False)
        of_card = card_sigma(card_shares(table, device, coefficients)[0], np.diag([prior[name] ** 2 for name in CARD]))
    spread = fitted.sigmas["factor"] * math.hypot(of_network, of_card)
    return max(spread, calibration.spread) if calibration is not None and calibration.count > 1 else spread
