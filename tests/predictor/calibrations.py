"""Calibrations for tests, which no measurement stands behind."""

from __future__ import annotations

from pathlib import Path

from convscale.predictor.calibration import Calibration, save_calibration
from convscale.predictor.fitted import usual_on
from convscale.predictor.roofline import PRIOR


def calibration_of(device: str, threads: int | None = None) -> Calibration:
    """Under the usual conditions of a device, by the predictor's first coefficients."""
    usual = usual_on(device, "infer")
    return Calibration(
        device=device,
        mode="infer",
        runtime=usual.runtime,
        layout="nchw",
        precision=usual.precision,
        threads=threads,
        count=1,
        coefficients=dict(PRIOR),
        covariance=[[0.01, 0.0, 0.0]] * 3,
    )


def calibration_file(folder: Path, device: str, threads: int | None = None) -> Path:
    """The same, written to a folder."""
    path = folder / f"{device}-{threads}.json"
    save_calibration(calibration_of(device, threads), path)
    return path
