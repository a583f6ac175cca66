"""Where a network's time goes, layer by layer, as the predictor sees it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from convscale.conditions import Conditions
from convscale.predictor.devices import get_device
from convscale.predictor.roofline import BINDINGS, kernel_s, table_of

if TYPE_CHECKING:
    from convscale.predictor.calibration import Calibration

MOST_PARTS = 14
"""Parts that one figure holds legibly."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What one module's own kernels cost in a call."""

    name: str
    """Dotted path of the module."""
    kind: str
    """Kind of the kernel that takes most of its time."""
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
    """In the order of their first kernel."""
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
    net_or_spec: Any,
    conditions: Conditions,
    *,
    image_size: int | None = None,
    name: str = "",
    calibration: Calibration | str | os.PathLike[str] | None = None,
) -> Profile:
    """Predict the time of every layer of a network on a device; the layers' times add up to the latency that
    ``predict`` gives.

    Args:
        net_or_spec: a module, a spec or a model's name.
        conditions: device, mode, precision, layout, batch and runtime, as ``choice.setting_of`` makes them.
        image_size: side in pixels; None: the network's own.
        calibration: what ``calibrate`` made of measurements on the device, or its file.

    Raises:
        UserError: an unknown device, a network that can not be traced, or bad conditions.
    """
    from convscale.cost.counting import trace_of
    from convscale.cost.fusion import fused_kernels
    from convscale.cost.kernels import eager_kernels
    from convscale.predictor.calibration import Calibration, load_calibration
    from convscale.predictor.fitted import fitted_sets, set_name

    card = get_device(conditions.device)
    options: dict[str, Any] = {"mode": conditions.mode, "precision": conditions.precision, "layout": conditions.layout}
    traced = trace_of(net_or_spec, image_size, conditions.batch_size, **options)
    conditions = replace(conditions, image_size=traced.image_size[-1])
    launched = fused_kernels(traced) if conditions.runtime != "eager" else eager_kernels(traced)
    coefficients = fitted_sets()[set_name(conditions, card)].coefficients
    if calibration is not None:
        made = calibration if isinstance(calibration, Calibration) else load_calibration(calibration)
        made.require(conditions)
        coefficients = made.coefficients
    total, compute, memory = kernel_s(table_of([[(kernel, 1) for kernel in launched]]), card, coefficients)
    overhead = coefficients["overhead_us"] * 1e-6
    rows: dict[str, list[tuple[Any, float, str]]] = {}
    for kernel, seconds, of_compute, of_memory in zip(launched, total, compute, memory, strict=True):
        bound = "launch" if overhead > max(of_compute, of_memory) else "compute" if of_compute > of_memory else "memory"
        rows.setdefault(kernel.scope or "(the network itself)", []).append((kernel, float(seconds), bound))
    return Profile(
        name=name
        or str(
            getattr(net_or_spec, "name", None)
            or (net_or_spec if isinstance(net_or_spec, str) else type(net_or_spec).__name__)
        ),
        device=card.title,
        conditions=conditions.to_dict(),
        layers=tuple(_layer(scope, found) for scope, found in rows.items()),
        peak_tflops=card.tf32_tflops if conditions.precision == "fp32" else card.tensor_tflops,
        bandwidth_bytes_s=card.bandwidth_gb_s * 1e9,
    )


def _layer(name: str, found: Sequence[tuple[Any, float, str]]) -> Layer:
    """The sum of a module's kernels."""
    kinds: dict[str, float] = {}
    bounds: dict[str, float] = dict.fromkeys(BINDINGS, 0.0)
    for kernel, seconds, bound in found:
        kinds[kernel.kind] = kinds.get(kernel.kind, 0.0) + seconds
        bounds[bound] += seconds
    return Layer(
        name=name,
        kind=max(kinds, key=lambda kind: kinds[kind]),
        time_s=sum(seconds for _, seconds, _ in found),
        macs=sum(kernel.macs for kernel, _, _ in found),
        nbytes=sum(kernel.in_bytes + kernel.out_bytes + kernel.weight_bytes for kernel, _, _ in found),
        launches=len(found),
        bound_by=max(bounds, key=lambda bound: bounds[bound]),
    )
