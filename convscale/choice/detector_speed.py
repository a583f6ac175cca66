"""A detector's speed, its parts told apart: backbone, neck, heads, non-maximum suppression."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from convscale.conditions import Conditions
from convscale.errors import UserError
from convscale.formats.fold import fold
from convscale.formats.onnx import write_onnx
from convscale.formats.suppression import add_suppression
from convscale.formats.two_stage import write_two_stages
from convscale.machine import Environment, available_cores
from convscale.nn.detector_graph import OUTPUTS, DetectorGraph, SecondStage
from convscale.nn.detectors import Detector
from convscale.predictor.calibration import Calibration
from convscale.predictor.devices import get_device
from convscale.predictor.predict import Prediction, predict, with_doubt
from convscale.runtimes.base import Opening, open_runtime, runtime_of
from convscale.speed.timing import Measurement, time_callable

PARTS = ("backbone", "neck", "heads", "nms")
_READING = (
    "the second stage reads each proposal from every map, as it ships, by roi_align, which no table holds: each number "
    "is the mean of 16 pixels, of which a quarter is taken to come from memory and the rest from a cache; at the slow "
    "end of the interval all do, at the fast end none"
)
_FROM_MEMORY, _AT_MOST, _PIXEL_BYTES = 4, 16, 4
"""Pixels of single precision behind one number that a box is read as: four places between four pixels each. Those of
one place lie beside each other. A judgement.
"""


@dataclass(frozen=True, kw_only=True)
class DetectorSpeed:
    """A measured detector."""

    whole: Measurement
    """Pixels to finished boxes, non-maximum suppression inside."""
    parts_s: Mapping[str, float]
    """Seconds a call of each part: the difference to what ends before it, 0 where that is below the noise."""

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        return {
            **self.whole.to_dict(),
            "images_per_s": self.whole.images_per_s,
            "p99_s": self.whole.p99_s,
            "parts_s": dict(self.parts_s),
        }


@dataclass(frozen=True, kw_only=True)
class DetectorPrediction:
    """A predicted detector, without non-maximum suppression."""

    whole: Prediction
    """Pixels to candidates."""
    parts_s: Mapping[str, float]
    """Seconds a call of backbone, neck and heads."""

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        return {**self.whole.to_dict(), "parts_s": dict(self.parts_s)}


def measure_detector(
    detector: Detector, cond: Conditions, *, min_seconds: float = 1.0, max_seconds: float = 30.0
) -> DetectorSpeed:
    """Time a detector as it would be shipped, and up to the end of each of its parts.

    The input is seeded noise, and no candidate is dropped for its score, so that the time of non-maximum suppression is
    an upper bound, of a trained detector too. Of Faster R-CNN the suppression between its stages is a part of the
    heads; what the second stage does hardly depends on the pictures, since its table has room for all proposals that
    there may be.

    Args:
        detector: trained or not; it is left as it is.
        cond: on ``cpu``, in a runtime that opens ONNX files, fp32; its image size is the detector's.
        min_seconds: the timed calls of each part together last at least so long.
        max_seconds: and at most about so long.

    Raises:
        UserError: conditions that it can not be measured under.
    """
    runtime = runtime_of(cond.runtime)
    if runtime.opens_modules or cond.precision != "fp32" or cond.layout != "nchw" or cond.mode != "infer":
        raise UserError(
            "a detector is measured as it ships: runtime onnxruntime or openvino, fp32, nchw, infer; got "
            f"{cond.runtime}, {cond.precision}, {cond.layout}, {cond.mode}"
        )
    graph, side = _graph(detector).cpu(), detector.detector_spec.image_size
    threads = cond.threads or available_cores()
    cond = dataclasses.replace(cond, image_size=side, threads=threads)
    how = Opening(threads=threads, device=cond.device, batch_size=None)
    batch = np.random.default_rng(0).normal(size=(cond.batch_size, 3, side, side)).astype(np.float32)
    times: dict[str, tuple[float, ...]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, path in _files(graph, detector, Path(folder)).items():
            runner = open_runtime(path, cond.runtime, how)
            prepared = runner.prepare(batch)
            times[name] = time_callable(
                lambda runner=runner, prepared=prepared: runner.run(prepared),
                min_seconds=min_seconds,
                max_seconds=max_seconds,
            )
    whole = Measurement(
        times_s=times["nms"],
        conditions=cond,
        environment=Environment.here(cond.device),
        model=detector.detector_spec.name,
        notes=("non-maximum suppression inside, of every candidate whatever its score: an upper bound",),
        peak_bytes=None,
    )
    return DetectorSpeed(whole=whole, parts_s=_differences({name: float(np.median(t)) for name, t in times.items()}))


def _graph(detector: Detector) -> DetectorGraph:
    """Of a copy, in evaluation mode: a graph shares the parts of what it is made of."""
    return DetectorGraph(copy.deepcopy(detector)).eval()


def _files(graph: DetectorGraph, detector: Detector, folder: Path) -> dict[str, Path]:
    """ONNX files that end after each part."""
    spec, found = detector.detector_spec, {}
    example = torch.zeros(2, 3, spec.image_size, spec.image_size)
    for name, part in graph.stages().items():
        found[name] = folder / f"{name}.onnx"
        if name == "heads" and graph.second is not None:
            write_two_stages(graph, found[name])
            continue
        write_onnx(fold(part, example), example, found[name], outputs=OUTPUTS if name == "heads" else ())
    assert spec.nms_threshold is not None, "a spec fills in its thresholds"
    assert spec.max_detections is not None, "a spec fills in its thresholds"
    found["nms"] = folder / "nms.onnx"
    found["nms"].write_bytes(found["heads"].read_bytes())
    add_suppression(
        found["nms"],
        side=spec.image_size,
        score_threshold=0.0,  # at the spec's an untrained head's candidates may all be dropped: RetinaNet's are
        nms_threshold=spec.nms_threshold,
        most=spec.max_detections,
    )
    return found


def _differences(ends: Mapping[str, float]) -> dict[str, float]:
    """What each part adds."""
    before, parts = 0.0, {}
    for name, seconds in ends.items():
        parts[name], before = max(0.0, seconds - before), seconds
    return parts


def predict_detector(
    detector: Detector, cond: Conditions, *, compiled: bool = False, calibration: Calibration | None = None
) -> DetectorPrediction:
    """Predict a detector's throughput on a named device: all but non-maximum suppression, whose cost depends on what is
    found. Faster R-CNN's second stage gets as many proposals as there may be, the best by score; how long its boxes
    take to be read from the maps no table knows, which is a doubt that widens the interval. The detector is left as it
    is.

    Raises:
        UserError: an unknown device, or conditions that are not predicted.
    """
    if cond.mode != "infer":
        raise UserError(f"a detector is predicted in mode infer, got {cond.mode}")
    parts: dict[str, Prediction] = {}
    graph = _graph(detector)
    for name, module in graph.stages().items():
        parts[name] = predict(
            module,
            cond.device,
            precision=cond.precision,
            image_size=detector.detector_spec.image_size,
            batch_size=cond.batch_size,
            compiled=compiled,
            layout=cond.layout,
            calibration=calibration,
            runtime=None if compiled else cond.runtime,
        )
    if graph.second is not None:
        parts["heads"] = _with_reading(parts["heads"], graph.second)
    ends = {name: each.latency_s for name, each in parts.items()}
    return DetectorPrediction(whole=parts["heads"], parts_s=_differences(ends))


def _with_reading(made: Prediction, second: SecondStage) -> Prediction:
    """A prediction of both stages with the time that boxes take to be read, beyond that of the numbers written."""
    batch, device = made.conditions.batch_size, get_device(made.conditions.device)
    one_s = batch * second.numbers * _PIXEL_BYTES / (device.bandwidth_gb_s * 1e9)
    latency_s = made.latency_s + _FROM_MEMORY * one_s
    shares = {name: share * made.latency_s / latency_s for name, share in made.shares.items()}
    shares["memory"] = shares.get("memory", 0.0) + _FROM_MEMORY * one_s / latency_s
    longer = dataclasses.replace(
        made,
        latency_s=latency_s,
        images_per_s=batch / latency_s,
        low=batch / (batch / made.low + _AT_MOST * one_s),
        shares=shares,
        bound_by=max(shares, key=lambda name: shares[name]),
    )
    return with_doubt(longer, _READING)
