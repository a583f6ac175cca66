"""Where a network's time goes, layer by layer, as the predictor sees it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from convscale.conditions import Conditions, Size
from convscale.cost.kernels import Kernel
from convscale.predictor.calibration import Calibration, calibration_of
from convscale.predictor.devices import Device
from convscale.predictor.fitted import stand_in
from convscale.predictor.latency import CallTimes, basis_of, call_time
from convscale.predictor.loading import eight_bits, traced_as
from convscale.predictor.roofline import BINDINGS
from convscale.predictor.workload import workload_of

if TYPE_CHECKING:
    from convscale.cost.subject import Network

MOST_PARTS = 14
"""Parts that one figure holds legibly."""
ITSELF, BACKWARD, UPDATE, WAITING = (
    "(the network itself)",
    "(backward pass)",
    "(optimiser step)",
    "(waiting for the host's launches)",
)
"""Rows of what belongs to no module: operators of the network's own ``forward``; the backward pass, of which autograd
does not say whose it is; the optimiser; and the time that the device waits because the host launches too slowly."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What one module's own kernels cost in a call; or a row of what belongs to no module (``ITSELF`` and the like)."""

    name: str
    """Dotted path of the module."""
    kind: str
    """Kind of the kernel that takes most of its time; ``host`` for the wait."""
    time_s: float
    """Seconds of all its kernels."""
    macs: int
    """Multiply-accumulates of the whole batch."""
    nbytes: int
    """Bytes read and written."""
    launches: int
    """Kernels."""
    bound_by: str
    """What binds most of its time: ``compute``, ``memory`` or ``launch``."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A network's layers on a device."""

    name: str
    """The network's name."""
    device: str
    """The device's title."""
    conditions: Mapping[str, Any]
    """A ``Conditions`` as JSON."""
    layers: tuple[Layer, ...]
    """In the order of their first kernel, then the wait for the host where there is one. Their times add up to the
    latency that ``predict`` gives."""
    peak_tflops: float
    """The data sheet's rate for the precision, in 1e12 operations/s."""
    bandwidth_bytes_s: float
    """The data sheet's memory bandwidth."""

    def parts(self) -> dict[str, list[Layer]]:
        """Layers by part of the network: as fine as ``MOST_PARTS`` allow."""
        result: dict[str, list[Layer]] = {}
        for depth in (1, 2, 3, 4):
            finer: dict[str, list[Layer]] = {}
            for layer in self.layers:
                finer.setdefault(".".join(layer.name.split(".")[:depth]), []).append(layer)
            if result and len(finer) > MOST_PARTS:
                break
            result = finer
        return result


def profile(
    net_or_spec: Network,
    conditions: Conditions,
    *,
    image_size: Size | None = None,
    name: str = "",
    calibration: Calibration | str | os.PathLike[str] | None = None,
) -> Profile:
    """Predict the time of every layer of a network on a device, by the same calculation as ``predict``; the rows' times
    add up to the latency that it gives.

    Args:
        net_or_spec: a module, a spec or a model's name.
        conditions: device, mode, precision, layout, batch and runtime, as ``predict`` takes them.
        image_size: side in pixels, or (height, width); None: the conditions', else the network's own.
        name: the network's name, where it does not say it.
        calibration: what ``calibrate`` made of measurements on the device, or its file.

    Raises:
        UserError: an unknown device, a network that can not be traced, or bad conditions.
    """
    from convscale.cost.counting import trace_of

    calibration = calibration_of(calibration)
    if image_size is not None:
        conditions = replace(conditions, image_size=image_size)
    basis = basis_of(conditions, calibration)
    precision = basis.conditions.precision
    traced = trace_of(net_or_spec, replace(basis.conditions, precision=traced_as(precision)))
    work = workload_of(traced, compiled=stand_in(conditions.runtime) == "compiled", by_layer=True)
    work = eight_bits(work) if precision == "int8" else work
    time = call_time(work.kernels, basis)
    return Profile(
        name=name or _name_of(net_or_spec),
        device=basis.device.title,
        conditions=replace(basis.conditions, image_size=traced.conditions.image_size).to_dict(),
        layers=_layers([kernel for kernel, _ in work.kernels], time),
        peak_tflops=_peak_tflops(basis.device, precision),
        bandwidth_bytes_s=basis.device.bandwidth_gb_s * 1e9,
    )


def _name_of(network: Network) -> str:
    """A spec's name, the name itself, or a module's class."""
    return network if isinstance(network, str) else str(getattr(network, "name", None) or type(network).__name__)


def _peak_tflops(device: Device, precision: str) -> float:
    """The rate that a precision can reach on a device, as ``basis_of`` gives it."""
    if precision == "int8":
        return device.int8_tops
    return device.tf32_tflops if precision == "fp32" else device.tensor_tflops


class _Spent(NamedTuple):
    """One kernel with its time and what binds it."""

    kernel: Kernel
    time_s: float
    bound_by: str


def _layers(kernels: Sequence[Kernel], time: CallTimes) -> tuple[Layer, ...]:
    """Rows by module in the order of their first kernel, and the wait for the host."""
    rows: dict[str, list[_Spent]] = {}
    for kernel, seconds, binding in zip(kernels, time.seconds, time.binding, strict=True):
        rows.setdefault(_row_of(kernel), []).append(_Spent(kernel, float(seconds), BINDINGS[binding]))
    layers = [_layer(name, spent) for name, spent in rows.items()]
    waiting_s = float(time.waiting_s[0])
    if waiting_s > 0:
        wait = Layer(name=WAITING, kind="host", time_s=waiting_s, macs=0, nbytes=0, launches=0, bound_by="launch")
        layers.append(wait)
    return tuple(layers)


def _row_of(kernel: Kernel) -> str:
    """The module that a kernel belongs to, or what else it is of."""
    if kernel.scope:
        return kernel.scope
    if kernel.kind == "update":
        return UPDATE
    return ITSELF if kernel.phase == "forward" else BACKWARD


def _layer(name: str, spent: Sequence[_Spent]) -> Layer:
    """The sum of a module's kernels."""
    kinds: dict[str, float] = {}
    bounds: dict[str, float] = dict.fromkeys(BINDINGS, 0.0)
    for kernel, seconds, bound in spent:
        kinds[kernel.kind] = kinds.get(kernel.kind, 0.0) + seconds
        bounds[bound] += seconds
    return Layer(
        name=name,
        kind=max(kinds, key=lambda kind: kinds[kind]),
        time_s=sum(seconds for _, seconds, _ in spent),
        macs=sum(kernel.macs for kernel, _, _ in spent),
        nbytes=sum(kernel.in_bytes + kernel.out_bytes + kernel.weight_bytes for kernel, _, _ in spent),
        launches=len(spent),
        bound_by=max(bounds, key=lambda bound: bounds[bound]),
    )
