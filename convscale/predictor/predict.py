"""The throughput of a network on a device that need not be at hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from convscale.conditions import Conditions, Size, size_text
from convscale.errors import UserError
from convscale.predictor.calibration import Calibration
from convscale.predictor.doubts import doubts_of, runtime_doubt
from convscale.predictor.fitted import STAND_IN_FACTOR, check_predicted
from convscale.predictor.interval import RATES, groups_of, network_sigma, rate_shares, rate_sigma, rate_sigmas
from convscale.predictor.latency import Basis, basis_of, call_time
from convscale.predictor.roofline import Table
from convscale.predictor.workload import Workload, load_workload

if TYPE_CHECKING:
    from convscale.cost.subject import Network

_WIDER, _MOST_WIDER = 1.5, 3
"""Factor on the interval for each doubt that no table says anything of, and how many of them count: a judgement."""


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
        size = "?" if c.image_size is None else size_text(c.image_size)
        return (
            f"{self.images_per_s:,.0f} images/s predicted (80 %: {self.low:,.0f} to {self.high:,.0f}), {c.mode} on "
            f"{c.device}, {c.precision}, {c.layout}, {c.runtime}, batch {c.batch_size}, {size} px; bound by "
            f"{self.bound_by}"
        )

    def to_dict(self) -> dict[str, object]:
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
    net_or_spec: Network,
    device: str = "rtx-4090",
    mode: str = "infer",
    precision: str = "amp",
    image_size: Size | None = None,
    batch_size: int = 256,
    compiled: bool = False,
    layout: str = "nchw",
    calibration: Calibration | None = None,
    runtime: str | None = None,
) -> Prediction:
    """Predict a network's throughput on a device by its data sheet, without the device.

    Args:
        net_or_spec: any module (on any device, the meta device too; ``training`` is ignored), a NetSpec, or a model's
            name.
        device: a known device (``convscale.predictor.devices.devices``), by its name, an alias or its driver's name.
        mode: ``infer`` or ``train`` (forward, backward and an SGD step).
        precision: ``amp``, ``fp32``, ``bf16`` or ``fp16``.
        image_size: side in pixels, or (height, width); None: the network's own.
        batch_size: images a call; one that does not fit the device is a doubt, not an error.
        compiled: behind ``torch.compile``; else eager PyTorch.
        layout: ``nchw`` or ``nhwc``.
        calibration: what ``calibrate`` made of measurements on the device.
        runtime: ``eager``, ``compiled``, ``onnxruntime`` or ``tensorrt``; None: as ``compiled`` says. The last two are
            in no table: they are predicted as compiled PyTorch, with a doubt and an interval that ``STAND_IN_FACTOR``
            (``convscale.predictor.fitted``) widens either way, unless a calibration made in them is given.

    Raises:
        UserError: an unknown device (the message names the nearest), an impossible condition, a network that can not be
            traced.
    """
    from convscale.cost.subject import subject_of  # loads torch, which a stored workload can do without

    if compiled and runtime not in (None, "compiled"):
        raise UserError(f"compiled=True and runtime {runtime!r} exclude each other; give one of them")
    asked = Conditions(
        device=device,
        mode=mode,
        precision=precision,
        layout=layout,
        batch_size=batch_size,
        image_size=image_size,
        runtime=runtime or ("compiled" if compiled else "eager"),
    )
    named, _ = check_predicted(asked)
    _, _, conditions = subject_of(net_or_spec, named)
    return predict_workload(load_workload(net_or_spec, conditions), conditions, calibration)


def predict_workload(work: Workload, conditions: Conditions, calibration: Calibration | None = None) -> Prediction:
    """Predict from a workload that is already there; ``conditions.device`` names the device. Arguments and errors as
    for ``predict``; needs no torch.
    """
    basis = basis_of(conditions, calibration)
    time = call_time(work.kernels, basis)
    share = {name: float(values[0]) for name, values in groups_of(time.table, time.once_s).items()}
    share["host"] = 1.0 if time.waiting_s > 0 else 0.0
    doubts = doubts_of(work, basis.conditions, basis.device, share, calibration is not None)
    half_width = _WIDER ** min(len(doubts.open), _MOST_WIDER) * _half_width(time.table, basis)
    foreign = runtime_doubt(basis.conditions) if calibration is None else ""
    if foreign:
        half_width = math.hypot(half_width, math.log(STAND_IN_FACTOR))
    images_per_s = conditions.batch_size / time.latency_s
    bound = time.shares()
    return Prediction(
        images_per_s=images_per_s,
        low=images_per_s * math.exp(-half_width),
        high=images_per_s * math.exp(half_width),
        latency_s=time.latency_s,
        bound_by=max(bound, key=lambda name: bound[name]),
        shares=MappingProxyType(bound),
        doubts=(*filter(None, [foreign]), *doubts.known, *doubts.open),
        conditions=basis.conditions,
        peak_bytes=work.peak_bytes,
        calibrated=calibration is not None,
    )


def _half_width(table: Table, basis: Basis) -> float:
    """Half the width of the 80 % interval in log units, from errors on families left out and what is not known of the
    card. Doubts that no table says anything of are not in it.
    """
    device, coefficients, calibration = basis.device, basis.coefficients, basis.calibration
    of_network = float(network_sigma(table, device, coefficients, basis.fitted.sigmas)[0])
    of_card = 0.0
    if calibration is not None:
        of_card = rate_sigma(rate_shares(table, device, coefficients)[0], calibration.covariance)
    elif device.name not in basis.fitted.devices or device.kind == "cpu":
        prior = rate_sigmas(device, known=False)
        of_card = rate_sigma(rate_shares(table, device, coefficients)[0], np.diag([prior[name] ** 2 for name in RATES]))
    half_width = basis.fitted.sigmas["factor"] * math.hypot(of_network, of_card)
    if calibration is not None and calibration.count > 1:
        return max(half_width, calibration.spread)
    return half_width
