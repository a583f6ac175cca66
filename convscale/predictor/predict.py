"""The throughput of a network on a device that need not be at hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from convscale.conditions import Conditions
from convscale.errors import UserError
from convscale.networks.inputs import checked_size
from convscale.networks.resolve import resolve
from convscale.predictor.devices import Device, get_device
from convscale.predictor.doubts import _open_doubts, doubts_of
from convscale.predictor.fitted import Fitted, fitted_sets, set_name
from convscale.predictor.interval import CARD, card_shares, card_sigma, card_sigmas, groups_of, network_sigma
from convscale.predictor.roofline import Table, kernel_s, shares, table_of
from convscale.predictor.workload import Workload, load_workload

if TYPE_CHECKING:
    from convscale.arch.spec import NetSpec
    from convscale.predictor.calibration import Calibration

_HOST_US = {"eager": 8.0, "compiled": 5.0}
"""Microseconds a host takes to launch one kernel, PyTorch on a fast desktop CPU. Not fitted: at the tables' large
batches the host is never late."""


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
            f"{self.images_per_s:,.0f} images/s predicted (80 %: {self.low:,.0f} to {self.high:,.0f}), {c.mode} on "
            f"{c.device}, {c.precision}, "
            f"{c.layout}, {c.runtime}, batch {c.batch_size}, {c.image_size} px; bound by {self.bound_by}"
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        values = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("conditions", "shares", "doubts")
        }
        return {
            "kind": "prediction",
            **values,
            "shares": dict(self.shares),
            "doubts": list(self.doubts),
            "conditions": self.conditions.to_dict(),
        }


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
        net_or_spec: any module (on any device, the meta device too; ``training`` is ignored), a NetSpec, or a model's
            name.
        device: a known device (``convscale.predictor.devices.devices``).
        mode: ``infer`` or ``train`` (forward, backward and an SGD step).
        precision: ``amp``, ``fp32``, ``bf16`` or ``fp16``.
        image_size: side in pixels; None: the network's own.
        batch_size: images a call; one that does not fit the device is a doubt, not an error.
        compiled: behind ``torch.compile``; else eager PyTorch.
        layout: ``nchw`` or ``nhwc``.
        calibration: what ``calibrate`` made of measurements on the device.

    Raises:
        UserError: an unknown device (the message names the nearest), an impossible condition, a network that can not be
            traced.
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
    """Predict from a workload that is already there; ``conditions.device`` names the device. Arguments and errors as
    for ``predict``.
    """
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
    host_s = (
        work.launches * _HOST_US["eager" if conditions.runtime == "eager" else "compiled"] * 1e-6
        if sheet.kind == "gpu"
        else 0.0
    )
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


def _spread(
    fitted: Fitted, device: Device, table: Table, coefficients: Mapping[str, float], calibration: Calibration | None
) -> float:
    """Half the width of the 80 % interval in log units, from errors on families left out and what is not known of the
    card.

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
