"""Post-training INT8.

Two quantisers do it, each a row of ``ROUTES``: NNCF, and ONNX Runtime's own. 8-bit weights per channel, 8-bit
activations per tensor, ranges from calibration images. Weights use half of their range, so that the 16-bit sums of
processors without VNNI can not overflow: an artefact made on one machine says the same on another.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np

from convscale.errors import UserError, first_line
from convscale.files import refusing_full
from convscale.runtimes.signals import signal_stack_kept
from convscale.runtimes.silence import quiet
from convscale.ship.layers import products_of

MIN_CALIBRATION = 32
"""Fewer calibration images than this leave activation ranges to chance."""
CALIBRATION = 300
"""Calibration images used at most; NNCF's own default."""
SKETCH = 4
"""Images that a quantised network is made with where its speed is looked at, and nothing else."""

PERCENTILE = 99.99
"""Of the sizes of a map's values, without their signs, where ranges leave outliers out: so many reach as far as the
range, on the side of zero that needs it; the other side ends where its values do, if that is nearer."""
PERCENTILE_IMAGES = 64
"""Images that such ranges come from at most: a histogram of every map takes seconds an image."""

Quantiser = Callable[[Path, Path, Sequence[np.ndarray], Sequence[str]], None]
"""From a float ONNX file to a quantised file, by images as the network takes them, one in a batch; last come output
names of layers to leave in float."""


@dataclass(frozen=True, kw_only=True)
class Route:
    """A way to 8 bits."""

    formats: tuple[str, ...]
    """The formats that it writes."""
    library: str
    """The module that quantises."""
    install: str
    """How a user gets it."""
    quantise: Quantiser
    """What does it; :func:`quantize_file` names what fails."""
    quantise_tuned: Quantiser
    """For a network that has learnt to be rounded: without correcting biases towards what it says unrounded."""
    only_for: str | None = None
    """A runtime that is not here, whose files alone it writes; None: it is tried for every runtime that is."""
    twin_of: str | None = None
    """A route that it is as, but for symmetric activations: looked at beside that one, and made where it is faster."""
    rescues: str | None = None
    """A route that it is as, but for ranges that leave outliers out: tried where that one loses more than allowed."""

    @property
    def usual(self) -> bool:
        """Whether it is tried whatever others come to."""
        return self.only_for is None and self.twin_of is None and self.rescues is None


def routes_of(format: str | None = None) -> list[str]:
    """The routes to an INT8 file of a format (None: of any) whose libraries are installed here, the usual one first."""
    known = _usual_of(format)
    return [name for name, route in known.items() if find_spec(route.library) is not None]


def _usual_of(format: str | None) -> dict[str, Route]:
    """The usual routes to a format, by name."""
    usual = {name: route for name, route in ROUTES.items() if route.usual}
    return {name: route for name, route in usual.items() if format is None or format in route.formats}


def twin_of(route: str) -> str | None:
    """The route that is as this one, but for symmetric activations; None: there is none."""
    return next((name for name, other in ROUTES.items() if other.twin_of == route), None)


def rescue_of(route: str) -> str | None:
    """The route that may save what loses too much by this one; None: there is none."""
    return next((name for name, other in ROUTES.items() if other.rescues == route), None)


def routes_for(runtime: str) -> list[str]:
    """The routes to an INT8 ONNX file for a runtime that is not here, the usual one first."""
    return [name for name, route in ROUTES.items() if route.only_for == runtime] or routes_of("onnx")


def check_calibration(images: np.ndarray | None, format: str | None = None) -> np.ndarray:
    """The calibration images to use: all, or ``CALIBRATION`` of them from all over the set, since sets often stand
    class by class.

    Args:
        images: (N, H, W, C); None: none were given.
        format: what is to be quantised; None: any will do.

    Raises:
        UserError: there are none or too few; or no quantiser of this format is installed.
    """
    if not routes_of(format):
        wanted = list(_usual_of(format))
        raise UserError(f"INT8 needs {' or '.join(wanted)}, which is not installed; {ROUTES[wanted[0]].install}")
    count = 0 if images is None else len(images)
    if images is None or count < MIN_CALIBRATION:
        raise UserError(f"INT8 needs at least {MIN_CALIBRATION} calibration images of the training set, got {count}")
    return images[spread(count, CALIBRATION)]


def spread(count: int, wanted: int) -> np.ndarray:
    """Positions of at most ``wanted`` of ``count`` things, evenly over all of them: int64, ascending."""
    return np.linspace(0, count - 1, min(count, wanted)).round().astype(np.int64)


def quantize_file(
    source: Path,
    target: Path,
    route: str,
    batches: Sequence[np.ndarray],
    float_values: Sequence[str] = (),
    *,
    tuned: bool = False,
) -> None:
    """Quantise an ONNX file into another, or into an OpenVINO IR.

    Args:
        source: the float ONNX file.
        target: ``.onnx`` or ``.xml``.
        route: a key of ``ROUTES`` that writes such files.
        batches: the calibration images, each as the network takes it: (1, C, H, W), or (1, H, W, C) where preprocessing
            is baked in.
        float_values: output names of layers to leave in float.
        tuned: it has learnt to be rounded (:mod:`convscale.ship.qat`).

    Raises:
        UserError: this network can not be quantised so, or nothing of it.
    """
    try:
        with quiet(), signal_stack_kept():
            how = ROUTES[route].quantise_tuned if tuned else ROUTES[route].quantise
            how(source, target, batches, float_values)
    except Exception as error:
        raise UserError(f"{route} can not quantise this network: {first_line(error)}") from error
    if not _has_rounding(target):
        beside = f" beside its {len(float_values)} layers that stay in float" if float_values else ""
        raise UserError(f"{route} finds nothing to quantise in this network{beside}; leave int8 out")


def _has_rounding(path: Path) -> bool:
    """Whether anything is in 8 bits in a file that a quantiser wrote."""
    import onnx

    if path.suffix == ".xml":
        return 'type="FakeQuantize"' in path.read_text(encoding="utf-8")
    nodes = onnx.load(os.fspath(path), load_external_data=False).graph.node
    return any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in nodes)


def _by_nncf(
    source: Path,
    target: Path,
    batches: Sequence[np.ndarray],
    float_values: Sequence[str],
    *,
    preset: str,
    correct: bool,
) -> None:
    import nncf
    import onnx
    import openvino as ov
    from nncf.quantization.advanced_parameters import (
        AdvancedQuantizationParameters,
        OverflowFix,
        QuantizationParameters,
    )

    model: Any = onnx.load(os.fspath(source))
    to_onnx = target.suffix == ".onnx"
    kept = {*float_values, *products_of(model.graph, float_values)}
    names = [node.name for node in model.graph.node if node.output and node.output[0] in kept]
    if not to_onnx:
        # The converter joins what belongs together, SiLU above all: of a sigmoid and a product, as a file is read,
        # NNCF would quantise both branches.
        model = ov.convert_model(os.fspath(source))
        # An exporter's linear layer with bias becomes two operators named after it.
        all_names = [op.get_friendly_name() for op in model.get_ordered_ops()]
        names = [name for name in all_names if any(name == n or name.startswith(f"{n}/") for n in names)]
    first = _input_name(source) if to_onnx else None
    dataset = nncf.Dataset(batches, (lambda batch: {first: batch}) if to_onnx else None)
    quantised: Any = nncf.quantize(
        model,
        dataset,
        preset=nncf.QuantizationPreset(preset),
        subset_size=len(batches),
        ignored_scope=nncf.IgnoredScope(names=names, validate=False) if names else None,
        # ONNX Runtime's convolution takes one scale for its input; NNCF would give a depthwise one a scale per channel.
        advanced_parameters=AdvancedQuantizationParameters(
            disable_bias_correction=not correct,
            overflow_fix=OverflowFix.ENABLE,
            activations_quantization_params=QuantizationParameters(per_channel=False) if to_onnx else None,
        ),
    )
    if to_onnx:
        onnx.save(quantised, os.fspath(target))
    else:
        with refusing_full(target):
            ov.save_model(quantised, os.fspath(target), compress_to_fp16=False)


LAYERS = ("Conv", "Gemm", "MatMul")
"""ONNX operators with weights."""
BETWEEN = (
    *("Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "Mul", "Add", "Concat", "Split"),
    *("MaxPool", "AveragePool", "GlobalAveragePool", "Reshape", "Transpose", "Squeeze", "Unsqueeze"),
)
"""ONNX operators that ONNX Runtime has 8-bit kernels for, or that only pass values on: between two layers they stay in
8 bits, so that activations such as SiLU and leaky ReLU do not go back to float."""


AROUND_ZERO = {"ActivationSymmetric": True, "WeightSymmetric": True, "AddQDQPairToWeight": True, "QuantizeBias": False}
"""How TensorRT wants 8 bits: no zero point, weights in float with a pair of their own, biases in float."""


def _by_onnx_runtime(
    source: Path,
    target: Path,
    batches: Sequence[np.ndarray],
    float_values: Sequence[str],
    *,
    signed: bool = False,
    percentile: float | None = None,
) -> None:
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
            batch = next(self.left, None)
            return None if batch is None else {first: batch}

        def __len__(self) -> int:
            return len(batches)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.left = iter(batches[start_index:end_index])

    ranges: dict[str, object] = {}
    model = onnx.load(os.fspath(source))
    first = model.graph.input[0].name
    add_pre_process_metadata(model)  # batch norm is folded already: else it asks for that, on the root logger
    if percentile is not None:
        batches = [batches[i] for i in spread(len(batches), PERCENTILE_IMAGES)]
        # All maps of an image at a time: of all images no memory holds them.
        ranges = {"CalibPercentile": percentile, "CalibStridedMinMax": 1}
    with nullcontext({}) if percentile is None else _ranges_kept(quantize_static, model, batches) as kept:
        quantize_static(
            model,
            os.fspath(target),
            Reader(),
            quant_format=QuantFormat.QDQ,
            calibrate_method=CalibrationMethod.MinMax if percentile is None else CalibrationMethod.Percentile,
            op_types_to_quantize=[*LAYERS, *BETWEEN],
            nodes_to_exclude=_stay_in_float(model.graph, {*float_values, *products_of(model.graph, float_values)}),
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QInt8 if signed else QuantType.QUInt8,  # signed: half as fast without AMX
            weight_type=QuantType.QInt8,
            extra_options={
                "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"],  # logits are not rounded
                **(AROUND_ZERO if signed else {}),
                **ranges,
            },
            **kept,
        )
    quantised = onnx.load(os.fspath(target))
    del quantised.metadata_props[:]
    onnx.save(quantised, os.fspath(target))


_LAST_RANGES: dict[str, bytes] = {}
"""Of the last float network that histograms were made of, by a digest of it and of the images."""


@contextmanager
def _ranges_kept(
    quantise: Callable[..., object], model: Any, batches: Sequence[np.ndarray]
) -> Generator[dict[str, Any]]:
    """What to ask ONNX Runtime's quantiser for besides, so that it makes histograms of a network once: which layers
    stay in float changes no range. Nothing where it can not keep them (before 1.31).
    """
    if "calibration_cache_path" not in signature(quantise).parameters:
        yield {}
        return
    digest = hashlib.sha256(model.SerializeToString(deterministic=True))
    for batch in batches:
        digest.update(np.ascontiguousarray(batch).tobytes())
    key = digest.hexdigest()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ranges.json"
        if key in _LAST_RANGES:
            path.write_bytes(_LAST_RANGES[key])
        yield {"calibration_cache_path": path}
        _LAST_RANGES.clear()
        _LAST_RANGES[key] = path.read_bytes()


def _stay_in_float(graph: Any, float_values: set[str]) -> list[str]:
    """Names of an ONNX graph's nodes that are not to be quantised: those asked for, what stands before the first layer
    (baked preprocessing), and what comes after the logits.
    """
    below: set[str] = set()
    after = {"logits"}
    names = []
    ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        # ONNX Runtime multiplies by one matrix of 8 bits at a time: a weight of several stays in float.
        if node.op_type == "MatMul" and any(ranks.get(name, 2) != 2 for name in node.input):
            names.append(node.name)
            below |= set(node.output)
            continue
        if node.op_type in LAYERS or below & set(node.input):
            below |= set(node.output)
        past = bool(after & set(node.input))
        if past:
            after |= set(node.output)
        if past or not below & set(node.output) or float_values & set(node.output):
            names.append(node.name)
    return names


ROUTES = {
    "nncf": Route(
        formats=("openvino", "onnx"),
        library="nncf",
        install="pip install nncf openvino",
        quantise=partial(_by_nncf, preset="mixed", correct=True),
        quantise_tuned=partial(_by_nncf, preset="mixed", correct=False),
    ),
    "onnxruntime": Route(
        formats=("onnx",),
        library="onnxruntime",
        install="pip install onnxruntime",
        quantise=_by_onnx_runtime,
        quantise_tuned=_by_onnx_runtime,
    ),
    "nncf-symmetric": Route(
        formats=("openvino", "onnx"),
        library="nncf",
        install="pip install nncf openvino",
        quantise=partial(_by_nncf, preset="performance", correct=True),
        quantise_tuned=partial(_by_nncf, preset="performance", correct=False),
        twin_of="nncf",
    ),
    "onnxruntime-percentile": Route(
        formats=("onnx",),
        library="onnxruntime",
        install="pip install onnxruntime",
        quantise=partial(_by_onnx_runtime, percentile=PERCENTILE),
        quantise_tuned=partial(_by_onnx_runtime, percentile=PERCENTILE),
        rescues="onnxruntime",
    ),
    # TensorRT reads signed 8 bits around zero, and no others.
    "onnxruntime-signed": Route(
        formats=("onnx",),
        library="onnxruntime",
        install="pip install onnxruntime",
        quantise=partial(_by_onnx_runtime, signed=True),
        quantise_tuned=partial(_by_onnx_runtime, signed=True),
        only_for="tensorrt",
    ),
}
"""The quantisers by name, the usual one of each format first."""


def _input_name(path: Path) -> str:
    import onnx

    return onnx.load(os.fspath(path), load_external_data=False).graph.input[0].name
