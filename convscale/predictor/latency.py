"""Where the seconds of one call go: the one calculation behind a prediction, its layers, and its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from convscale.conditions import Conditions
from convscale.cost.kernels import Kernel
from convscale.predictor.calibration import Calibration
from convscale.predictor.devices import Device
from convscale.predictor.fitted import Fitted, check_predicted, fitted_sets, set_name, stand_in
from convscale.predictor.roofline import BINDINGS, Table, kernel_s, table_of

_HOST_US = {"eager": 8.0, "compiled": 5.0}
"""Microseconds a host takes to launch one kernel, PyTorch on a fast desktop CPU. Not fitted: at the tables' large
batches the host is never late."""


@dataclass(frozen=True, kw_only=True)
class Basis:
    """What a prediction rests on, beside the network."""

    conditions: Conditions
    """With the device's own name."""
    device: Device
    """Its data sheet, with the rates that hold for the precision."""
    coefficients: Mapping[str, float]
    """As fitted, or as a calibration has them."""
    fitted: Fitted
    """The set of the mode and layout."""
    calibration: Calibration | None
    """What measurements on the device changed."""


@dataclass(frozen=True, kw_only=True)
class CallTimes:
    """The seconds of one call of each of N networks, by kernel. ``latency_s`` is the sum of what a network's rows in
    ``seconds`` come to and of ``waiting_s``.
    """

    table: Table
    """The kernels, a row each."""
    seconds: np.ndarray
    """Of all launches of each row."""
    once_s: np.ndarray
    """Of one launch of each row."""
    binding: np.ndarray
    """Index in ``BINDINGS`` of what binds each row."""
    host_s: np.ndarray
    """(N,): what the host takes to launch all kernels; 0 on a CPU."""

    @property
    def busy_s(self) -> np.ndarray:
        """(N,): seconds that the device works."""
        return np.bincount(self.table.net, weights=self.seconds, minlength=len(self.host_s))

    @property
    def waiting_s(self) -> np.ndarray:
        """(N,): seconds that the device waits for the host: what its launches take longer than the work."""
        return np.maximum(0.0, self.host_s - self.busy_s)

    @property
    def latency_s(self) -> np.ndarray:
        """(N,): seconds of the call: launches and work go on side by side, and the slower of the two lasts."""
        return np.maximum(self.host_s, self.busy_s)

    def shares(self) -> dict[str, np.ndarray]:
        """Of the work, the share bound by each of ``BINDINGS``, (N,) each; where the device waits for the host,
        launches bind.
        """
        busy, waiting = np.maximum(self.busy_s, 1e-12), self.waiting_s > 0
        spent = {
            name: np.bincount(self.table.net, weights=self.seconds * (self.binding == i), minlength=len(busy)) / busy
            for i, name in enumerate(BINDINGS)
        }
        return {name: np.where(waiting, float(name == "launch"), share) for name, share in spent.items()}


def basis_of(conditions: Conditions, calibration: Calibration | None = None) -> Basis:
    """What a prediction under these conditions rests on.

    Raises:
        UserError: a device, runtime or precision that nothing is predicted for, or a calibration of other conditions.
    """
    conditions, device = check_predicted(conditions)
    fitted = fitted_sets()[set_name(conditions, device)]
    if calibration is not None:
        calibration.require(conditions)
    if conditions.precision == "bf16" and not device.bfloat16:  # the general cores do it
        device = replace(device, tensor_tflops=device.fp32_tflops, sustained=1.0)
    return Basis(
        conditions=conditions,
        device=device,
        coefficients=fitted.coefficients if calibration is None else calibration.coefficients,
        fitted=fitted,
        calibration=calibration,
    )


def call_times(table: Table, networks: int, basis: Basis) -> CallTimes:
    """The seconds of a call of each network of a table that holds ``networks`` of them."""
    times = kernel_s(table, basis.device, basis.coefficients)
    launches = np.bincount(table.net, weights=table.count, minlength=networks)
    launch_us = _HOST_US[stand_in(basis.conditions.runtime)] if basis.device.kind == "gpu" else 0.0
    return CallTimes(
        table=table,
        seconds=times.total_s * table.count,
        once_s=times.total_s,
        binding=times.binding(basis.coefficients["overhead_us"] * 1e-6),
        host_s=launches * launch_us * 1e-6,
    )


def call_time(kernels: Sequence[tuple[Kernel, int]], basis: Basis) -> CallTimes:
    """The seconds of a call of one network that launches these kernels, each so many times."""
    return call_times(table_of([kernels]), 1, basis)
