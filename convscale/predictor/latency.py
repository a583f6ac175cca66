"""Where the seconds of one call go: the one calculation behind a prediction, its layers, and its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from convscale.conditions import Conditions
from convscale.cost.kernels import PHASES, Kernel
from convscale.predictor.calibration import Calibration
from convscale.predictor.devices import Device
from convscale.predictor.fitted import Fitted, check_predicted, fitted_sets, set_name
from convscale.predictor.roofline import BINDINGS, Table, for_card, kernel_s, table_of

_HOST = {"eager": 1.0, "compiled": 0.3, "onnxruntime": 0.3, "tensorrt": 0.1}
"""Of a device's ``host_us``, which is the time to call one operator from a module in eager PyTorch, the share that a
kernel takes the host in each runtime. Not fitted: at the tables' large batches the host is never late."""
_BENEATH = {"cast": 0.27, "update": 0.1}
"""The share of kernels that no module calls: autocast's casts of weights, by the difference between half and single
precision in NVIDIA's tables of a V100 at batch 1; an optimiser's, which go over many tensors at once."""
_BACKWARD = 0.35
"""The same of a backward pass, which runs beneath Python: a judgement."""


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
    if conditions.precision in ("bf16", "amp_bf16") and not device.bfloat16:  # the general cores do it
        device = replace(device, tensor_tflops=device.fp32_tflops, sustained=1.0)
    return Basis(
        conditions=conditions,
        device=device,
        coefficients=for_card(fitted.coefficients, fitted.reach(device))
        if calibration is None
        else calibration.coefficients,
        fitted=fitted,
        calibration=calibration,
    )


def host_shares(table: Table, runtime: str) -> np.ndarray:
    """By how much of a device's ``host_us`` each row's launch keeps the host."""
    shares = np.where(table.phase == PHASES.index("forward"), 1.0, _BACKWARD)
    for kind, share in _BENEATH.items():
        shares = np.where(table.is_kind(kind), share, shares)
    return shares * _HOST[runtime] if runtime == "eager" else np.full(len(shares), _HOST[runtime])


def call_times(table: Table, networks: int, basis: Basis) -> CallTimes:
    """The seconds of a call of each network of a table that holds ``networks`` of them."""
    times = kernel_s(table, basis.device, basis.coefficients)
    calls = table.count * host_shares(table, basis.conditions.runtime)
    launches = np.bincount(table.net, weights=calls, minlength=networks)
    launch_us = basis.device.host_us if basis.device.kind == "gpu" else 0.0
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
