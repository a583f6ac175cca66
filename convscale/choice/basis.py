"""On what basis candidates are compared: under which conditions, and whether speeds are measured or predicted."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from convscale.conditions import BEST, Conditions
from convscale.errors import UserError, check_path
from convscale.files import sha256
from convscale.machine import need_cuda
from convscale.predictor.calibration import Calibration, load_calibration
from convscale.predictor.devices import at_hand, devices, get_device, is_processor
from convscale.predictor.fitted import PREDICTED_RUNTIMES, check_predicted, usual_on
from convscale.runtimes.base import check_runtime, need_bf16

TUNED = (None, "fp32", "int8", "bf16")
"""Precisions that runtime ``best`` is for."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The conditions as a person gave them: what is None is filled in by :func:`basis_of`."""

    device: str = "cpu"
    """``cpu``, ``cuda``, ``cuda:N``, or a named GPU or processor."""
    batch_size: int | None = None
    """Images per call."""
    precision: str | None = None
    """One of ``Conditions``."""
    runtime: str | None = None
    """A runtime's name or ``best``."""
    mode: str = "infer"
    """``infer`` or ``train``."""
    layout: str = "nchw"
    """``nchw`` or ``nhwc``."""
    compiled: bool = False
    """PyTorch behind its compiler instead of eager."""
    threads: int | None = None
    """Compute threads on a CPU."""
    latency: bool = False
    """Whether a latency alone is limited: the batch is 1 then."""
    by_rows: bool = False
    """Whether measurements on the device go with it, which brings its threads (``choice.rows``, ``calibrate``)."""


@dataclass(frozen=True, kw_only=True)
class Basis:
    """Under what conditions candidates are compared, and how their speed is found."""

    conditions: Conditions
    """Without an image size: that is a candidate's. With runtime ``best`` each network is measured as it would be
    shipped, in the fastest of all forms and runtimes; precision ``int8`` then allows 8 bits beside float, ``bf16``
    bfloat16."""
    calibration: str | None = None
    """File that a prediction for the user's own device goes by."""
    within: str | None = None
    """The one runtime that tuned forms must run in; None: any that is installed."""
    bf16: bool = False
    """Whether tuned forms that compute in bfloat16 may win."""

    @property
    def predicted(self) -> bool:
        """Whether speeds are predicted: for a named device, and wherever a calibration is given."""
        return self.calibration is not None or not at_hand(self.conditions.device)

    @property
    def tuned(self) -> bool:
        """Whether each network's form and runtime are found by tuning."""
        return self.conditions.runtime == BEST

    @property
    def int8(self) -> bool:
        """Whether forms in 8 bits may win."""
        return self.conditions.precision == "int8"

    @property
    def calibration_digest(self) -> str | None:
        """SHA-256 of the calibration's file; None: there is none."""
        return None if self.calibration is None else sha256(Path(self.calibration))

    def read_calibration(self) -> Calibration | None:
        """The calibration in the file, read again once the file has changed."""
        return (
            None if self.calibration is None else _calibration(self.calibration, os.stat(self.calibration).st_mtime_ns)
        )


@cache
def _calibration(path: str, _changed: int) -> Calibration:
    return load_calibration(path)


def check_device(device: str) -> str:
    """The device's own name.

    Raises:
        UserError: it is neither this machine's nor known; the nearest names are given.
    """
    if not isinstance(device, str):
        raise UserError(f"device is {device!r}; it must be text such as 'cpu' or 'rtx-4090'")
    return device if at_hand(device) else get_device(device).name


def device_title(device: str) -> str:
    """The maker's name of a named device, else the name given."""
    return devices()[device].title if device in devices() else device


def basis_of(asked: Asked, calibration: str | os.PathLike[str] | None = None) -> Basis:
    """The basis of a comparison, with what was left out filled in.

    On a named GPU: batch 256, ``amp``, eager PyTorch; on a named processor: batch 1, ``fp32``, compiled (training:
    eager), which is what tables of such hold; on this machine's processor: batch 8, ``fp32``, the fastest of
    what is installed (eager for training); on its GPU: batch 8, ``amp``, eager. A processor's threads are those of the
    calibration.

    Args:
        asked: as a person gave them. Runtime ``best`` means each network in the form and the runtime in which it is
            fastest on this machine's processor or GPU, as ``tune`` finds them; with precision ``int8`` in 8 bits too,
            with ``bf16`` in bfloat16 too.
        calibration: file of ``convscale calibrate``.

    Raises:
        UserError: an unknown device (the nearest are named) or condition; a runtime or precision that can be neither
            measured here nor predicted there, or another runtime beside the compiler; threads of a processor that is
            not here, without a calibration; a calibration that is not there, damaged, or of other conditions; ``cuda``
            where torch sees no such GPU.
    """
    device = check_device(asked.device)
    _check_calibration(device, calibration)
    here = at_hand(device) and calibration is None
    runtime = _runtime(asked, device, here)
    usual = usual_on(device, asked.mode)
    batch_size = 1 if asked.latency else usual.batch_size
    conditions = Conditions(
        device=device,
        mode=asked.mode,
        precision=asked.precision or usual.precision,
        layout=asked.layout,
        batch_size=batch_size if asked.batch_size is None else asked.batch_size,
        runtime=runtime,
        threads=asked.threads,
    )
    _check_possible(conditions, here, asked.precision)
    if asked.threads is not None and calibration is None and not asked.by_rows:
        _check_threads(asked.threads, device)
    made = Basis(
        conditions=conditions,
        calibration=None if calibration is None else str(calibration),
        bf16=runtime == BEST and asked.precision == "bf16",
    )
    if (known := made.read_calibration()) is not None:
        known.require(conditions)
        if is_processor(device) and conditions.threads is None:  # a prediction is of those that it was calibrated with
            made = replace(made, conditions=replace(conditions, threads=known.threads))
    return made


def _check_calibration(device: str, calibration: str | os.PathLike[str] | None) -> None:
    if calibration is None:
        return
    if not check_path("calibration", calibration).is_file():
        raise UserError(f"calibration file {calibration} does not exist; `convscale calibrate` writes one")
    if device.startswith("cuda"):
        raise UserError(f"a calibration is of a named device, not {device!r}; give the name that it was made for")


def _runtime(asked: Asked, device: str, here: bool) -> str:
    """The runtime asked for, or the usual one.

    Raises:
        UserError: an unknown one, or the compiler beside another.
    """
    if asked.runtime is not None:
        if asked.runtime != BEST and (here or asked.runtime not in PREDICTED_RUNTIMES):
            check_runtime(asked.runtime)
        if asked.compiled and asked.runtime != "compiled":
            raise UserError(f"compiled=True and runtime {asked.runtime!r} exclude each other; give one of them")
        return asked.runtime
    if asked.compiled:
        return "compiled"
    tunable = device == "cpu" and asked.mode == "infer" and asked.precision in TUNED
    if here and tunable:
        return BEST
    return usual_on(device, asked.mode).runtime


def _check_possible(conditions: Conditions, here: bool, precision: str | None) -> None:
    """
    Raises:
        UserError: what the conditions ask for can be neither measured here nor predicted.
    """
    device, runtime = conditions.device, conditions.runtime
    if runtime == BEST:
        _need_tunable(conditions, here, precision)
    if not here:
        check_predicted(conditions)
        return
    if precision == "int8" and runtime != BEST:
        raise UserError(
            f"precision 'int8' is measured with runtime best, which chooses the form too; got runtime {runtime!r}"
        )
    if device.startswith("cuda"):
        need_cuda(device, "use device cpu, or name a GPU to predict for")


def _check_threads(threads: int, device: str) -> None:
    """
    Raises:
        UserError: the device is a processor that is not here, and nothing measured with those threads is given.
    """
    if is_processor(device) and not at_hand(device):
        raise UserError(
            f"threads is {threads}, and the tables hold {device} with all its cores; leave threads out, or give "
            f"what was measured there with {threads}: a calibration (calibrate --threads {threads}), or a kit's rows "
            f"(measure.py --threads {threads})"
        )


def _need_tunable(conditions: Conditions, here: bool, precision: str | None) -> None:
    """
    Raises:
        UserError: nothing can be tuned under these conditions, or in 8 bits without the library that makes them, or in
            bfloat16 without what computes in it.
    """
    device, mode = conditions.device, conditions.mode
    if not here:
        raise UserError(
            f"runtime 'best' is found by measuring on this machine; speeds on {device} are predicted for eager or "
            "compiled"
        )
    if mode != "infer":
        raise UserError(f"runtime 'best' is for inference, got mode {mode}; name a runtime")
    if precision not in TUNED:
        raise UserError(f"runtime 'best' measures fp32, or int8 or bf16 beside it, got precision {precision!r}")
    if precision == "bf16" and device != "cpu":
        raise UserError(f"runtime 'best' tries bf16 on a processor, got device {device!r}; leave precision out")
    if precision == "bf16":
        need_bf16()
    if precision == "int8" and find_spec("nncf") is None:
        raise UserError("precision int8 needs nncf, which is not installed; pip install nncf openvino")
