"""The throughput of a network on a device that need not be at hand."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from convscale.conditions import Conditions, Size, precision_text, size_text
from convscale.errors import UserError, naming_extras
from convscale.predictor.calibration import Calibration, calibration_of
from convscale.predictor.devices import get_device
from convscale.predictor.doubts import ATTENTION_FACTOR, compiler_doubt, doubts_of, runtime_doubt
from convscale.predictor.fitted import STAND_IN_FACTOR, check_predicted, usual_on
from convscale.predictor.interval import RATES, groups_of, rate_shares, rate_sigma, rate_sigmas, sigma_of
from convscale.predictor.latency import Basis, basis_of, call_times
from convscale.predictor.loading import traced_as, workload_for
from convscale.predictor.roofline import Table, table_of
from convscale.predictor.workload import Workload
from convscale.predictor.workload import load_workload as load_workload

if TYPE_CHECKING:
    from convscale.cost.subject import Network

_WIDER, _MOST_WIDER = 1.5, 3
"""Factor on the interval for each doubt that no table says anything of, and how many of them count: a judgement."""

_HOST_WIDTH = math.log(1.5)
"""Half the interval's width (log) of what a host takes to launch: so far apart are desktop and server processors."""


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
            f"{c.device}, {precision_text(c.precision)}, {c.layout}, {c.runtime}, batch {c.batch_size}, {size} px; "
            f"bound by {self.bound_by}"
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


@naming_extras("convscale.predict")
def predict(
    net_or_spec: Network,
    device: str = "rtx-4090",
    mode: str = "infer",
    precision: str | None = None,
    image_size: Size | None = None,
    batch_size: int | None = None,
    compiled: bool = False,
    layout: str = "nchw",
    calibration: Calibration | str | os.PathLike[str] | None = None,
    runtime: str | None = None,
) -> Prediction:
    """Predict a network's throughput on a device by its data sheet, without the device.

    What is left out is filled in by the device: on a GPU batch 256, ``amp``, eager PyTorch; on a processor by its name
    batch 1, ``fp32``, compiled (training: eager), which is what tables of such hold; on ``cpu`` batch 8, ``fp32``,
    eager.

    Args:
        net_or_spec: any module (on any device, the meta device too; ``training`` is ignored), a NetSpec, or a model's
            name.
        device: a known device (``convscale.predictor.devices.devices``), by its name, an alias or its driver's name.
        mode: ``infer`` or ``train`` (forward, backward and an SGD step).
        precision: ``amp`` (autocast to float16), ``amp_bf16`` (to bfloat16), ``fp16`` or ``bf16`` (weights in it too),
            ``fp32`` (PyTorch's default: convolutions in TF32 where the card has it), or ``int8`` in ONNX Runtime and
            TensorRT on a GPU; None: by the device.
        image_size: side in pixels, or (height, width); None: the network's own.
        batch_size: images a call, None: by the device; one that does not fit the device is a doubt, not an error.
        compiled: behind ``torch.compile``.
        layout: ``nchw`` or ``nhwc``.
        calibration: what ``calibrate`` made of measurements on the device, or its file.
        runtime: ``eager``, ``compiled``, ``onnxruntime`` or ``tensorrt`` (a GPU); None: as ``compiled`` says, else by
            the device. The last two are in no table: they are predicted as compiled PyTorch, with a doubt and an
            interval that ``STAND_IN_FACTOR`` (``convscale.predictor.fitted``) widens either way, unless a calibration
            made in them is given.

    Raises:
        UserError: an unknown device (the message names the nearest), an impossible condition, a network that can not be
            traced.
    """
    from convscale.cost.subject import subject_of  # loads torch, which a stored workload can do without

    if compiled and runtime not in (None, "compiled"):
        raise UserError(f"compiled=True and runtime {runtime!r} exclude each other; give one of them")
    calibration = calibration_of(calibration)
    usual = usual_on(get_device(device).name, mode)
    asked = Conditions(
        device=device,
        mode=mode,
        precision=usual.precision if precision is None else precision,
        layout=layout,
        batch_size=usual.batch_size if batch_size is None else batch_size,
        image_size=image_size,
        runtime=runtime or ("compiled" if compiled else usual.runtime),
    )
    named, _ = check_predicted(asked)
    _, _, sized = subject_of(net_or_spec, replace(named, precision=traced_as(named.precision)))
    conditions = replace(sized, precision=named.precision)
    made = predict_workload(workload_for(net_or_spec, conditions), conditions, calibration)
    if conditions.runtime != "compiled" or calibration is not None:
        return made
    plain = replace(conditions, runtime="eager")
    eager = predict_workload(workload_for(net_or_spec, plain), plain)
    return with_doubt(made, compiler_doubt(made.images_per_s, eager.images_per_s))


def with_doubt(made: Prediction, doubt: str) -> Prediction:
    """A prediction with one doubt more that does not widen it; the same where the doubt is empty."""
    return replace(made, doubts=(*made.doubts, doubt)) if doubt else made


def predict_workload(work: Workload, conditions: Conditions, calibration: Calibration | None = None) -> Prediction:
    """Predict from a workload that is already there; ``conditions.device`` names the device. Arguments and errors as
    for ``predict``; needs no torch.
    """
    return predict_table(table_of([work.kernels]), [work], [conditions], calibration)[0]


def predict_table(
    table: Table,
    works: Sequence[Workload],
    conditions: Sequence[Conditions],
    calibration: Calibration | None = None,
) -> list[Prediction]:
    """Predict many networks at once: a hundred take hardly longer than one.

    Args:
        table: the kernels of all networks, as columns.
        works: what else is known of each network, in the order of the table's ``net``; their kernels are not looked at.
        conditions: of each network; they differ in the image size alone.
        calibration: what ``calibrate`` made of measurements on the device.

    Raises:
        UserError: as for ``predict``.
    """
    if not works:
        return []
    basis = basis_of(conditions[0], calibration)
    time = call_times(table, len(works), basis)
    groups = _filled(groups_of(table, time.once_s), len(works))
    widths = _half_widths(table, basis, groups)
    bounds, waiting, latency = time.shares(), time.waiting_s, time.latency_s
    foreign = runtime_doubt(basis.conditions) if calibration is None else ""
    made = []
    for i, (work, asked) in enumerate(zip(works, conditions, strict=True)):
        share = {name: float(values[i]) for name, values in groups.items()}
        share["host"] = 1.0 if waiting[i] > 0 else 0.0
        doubts = doubts_of(work, basis.conditions, basis.device, share, calibration is not None)
        half_width = _WIDER ** min(len(doubts.open), _MOST_WIDER) * float(widths[i])
        if waiting[i] > 0:
            half_width = math.hypot(half_width, _HOST_WIDTH)
        if work.attention:
            half_width = math.hypot(half_width, math.log(ATTENTION_FACTOR))
        if foreign:
            half_width = math.hypot(half_width, math.log(STAND_IN_FACTOR))
        images_per_s = asked.batch_size / float(latency[i])
        bound = {name: float(values[i]) for name, values in bounds.items()}
        made.append(
            Prediction(
                images_per_s=images_per_s,
                low=images_per_s * math.exp(-half_width),
                high=images_per_s * math.exp(half_width),
                latency_s=float(latency[i]),
                bound_by=max(bound, key=lambda name: bound[name]),
                shares=MappingProxyType(bound),
                doubts=(*filter(None, [foreign]), *doubts.known, *doubts.open),
                conditions=replace(basis.conditions, image_size=asked.image_size),
                peak_bytes=work.peak_bytes,
                calibrated=calibration is not None,
            )
        )
    return made


def _filled(groups: Mapping[str, np.ndarray], networks: int) -> dict[str, np.ndarray]:
    """Shares of each network; the table does not count last ones that launch nothing."""
    return {name: np.pad(values, (0, networks - len(values))) for name, values in groups.items()}


def _half_widths(table: Table, basis: Basis, groups: Mapping[str, np.ndarray]) -> np.ndarray:
    """Half the width of each network's 80 % interval in log units, from errors on families left out and what is not
    known of the card. Doubts that no table says anything of are not in it.
    """
    device, coefficients, calibration = basis.device, basis.coefficients, basis.calibration
    of_network = sigma_of(groups, basis.fitted.sigmas)
    of_card = np.zeros(len(of_network))
    covariance = None
    if calibration is not None:
        covariance = np.asarray(calibration.covariance)
    elif device.name not in basis.fitted.devices:
        prior = rate_sigmas(device, known=False)
        covariance = np.diag([prior[name] ** 2 for name in RATES])
    if covariance is not None:
        shares = rate_shares(table, device, coefficients)
        of_card[: len(shares)] = [rate_sigma(row, covariance) for row in shares]
    half_widths = basis.fitted.sigmas["factor"] * np.hypot(of_network, of_card)
    if calibration is not None and calibration.count > 1:
        return np.maximum(half_widths, calibration.spread)
    return half_widths
