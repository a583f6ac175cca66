"""Post-training INT8, and which layers must stay in float for the accuracy to hold.

NNCF does the quantising: 8-bit weights per channel, 8-bit activations per tensor, ranges from calibration images.
Weights use half of their range, so that the 16-bit sums of processors without VNNI can not overflow: an artefact made
on one machine says the same on another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

from convscale.errors import UserError, first_line
from convscale.runtimes.signals import signal_stack_kept
from convscale.runtimes.silence import quiet
from convscale.ship.layers import Layer
from convscale.stats import smallest_true

MIN_CALIBRATION = 32
"""Fewer calibration images than this leave activation ranges to chance."""
CALIBRATION = 300
"""Calibration images used at most; NNCF's own default."""
RANKING = 8
"""Images that the sensitivity of layers is ranked with."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One try at quantising: which layers stayed in float, and what the rest cost."""

    float_layers: tuple[str, ...]
    """Names of the layers left in float."""
    drop_points: float
    """Accuracy points lost, or points of disagreement where there are no labels."""

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        return {"float_layers": list(self.float_layers), "drop_points": self.drop_points}


def check_calibration(images: np.ndarray | None) -> np.ndarray:
    """The calibration images to use: all, or ``CALIBRATION`` of them from all over the set, since sets often stand
    class by class.

    Raises:
        UserError: there are none or too few; or NNCF is not installed.
    """
    if find_spec("nncf") is None:
        raise UserError("INT8 needs nncf, which is not installed; pip install nncf openvino")
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
    batches: Callable[[], Iterator[np.ndarray]],
    count: int,
    float_values: Sequence[str] = (),
) -> None:
    """Quantise an ONNX file into another, or into an OpenVINO IR.

    Args:
        source: the float ONNX file.
        target: ``.onnx`` or ``.xml``.
        batches: gives the calibration images one at a time, as the network takes them: (1, C, H, W), or (1, H, W, C)
            where preprocessing is baked in.
        count: how many there are.
        float_values: output names of layers to leave in float.

    Raises:
        UserError: NNCF can not quantise this network.
    """
    with quiet(), signal_stack_kept():
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
        names = [node.name for node in model.graph.node if node.output and node.output[0] in set(float_values)]
        if not to_onnx:
            # An exporter's linear layer with bias becomes two operators named after it.
            model = ov.Core().read_model(os.fspath(source))
            all_names = [op.get_friendly_name() for op in model.get_ordered_ops()]
            names = [name for name in all_names if any(name == n or name.startswith(f"{n}/") for n in names)]
        first = _input_name(source) if to_onnx else None
        dataset = nncf.Dataset(list(batches()), (lambda batch: {first: batch}) if to_onnx else None)
        try:
            quantised: Any = nncf.quantize(
                model,
                dataset,
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=count,
                ignored_scope=nncf.IgnoredScope(names=names, validate=False) if names else None,
                # ONNX Runtime's convolution takes one scale for its input; NNCF would give a depthwise one a scale per
                # channel.
                advanced_parameters=AdvancedQuantizationParameters(
                    overflow_fix=OverflowFix.ENABLE,
                    activations_quantization_params=QuantizationParameters(per_channel=False) if to_onnx else None,
                ),
            )
        except Exception as error:
            raise UserError(f"NNCF can not quantise this network: {first_line(error)}") from error
        if to_onnx:
            onnx.save(quantised, os.fspath(target))
        else:
            ov.save_model(quantised, os.fspath(target), compress_to_fp16=False)


def rank_layers(graph: fx.GraphModule, batch: torch.Tensor, layers: Sequence[Layer]) -> list[Layer]:
    """Layers by how far rounding each of them alone moves the logits, the farthest first.

    Each layer's input and weight are rounded to 8 bits in turn and the rest of the network runs in float: one pass per
    layer over a few images.

    Args:
        graph: the captured network, folded.
        batch: a few images as it takes them.
        layers: those to rank; a value of ``graph`` each.
    """
    wanted = {layer.value for layer in layers}

    class Rounding(fx.Interpreter):
        rounded = ""

        def run_node(self, n: fx.Node) -> object:
            if n.name != self.rounded:
                return super().run_node(n)
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            source, weight, *rest = args
            return super().call_function(n.target, (_round_tensor(source), _round_rows(weight), *rest), kwargs)

    runner = Rounding(graph)
    moved: dict[str, float] = {}
    with torch.no_grad():
        expected = _logits(runner.run(batch))
        for node in graph.graph.nodes:
            if node.name in wanted:
                runner.rounded = node.name
                moved[node.name] = float((_logits(runner.run(batch)) - expected).norm())
    return sorted(layers, key=lambda layer: -moved.get(layer.value, 0.0))


def search_float_layers(
    ranked: Callable[[], Sequence[Layer]], total: int, attempt: Callable[[Sequence[Layer]], float], max_drop: float
) -> tuple[list[Step], bool]:
    """Leave the fewest sensitive layers in float that keep the accuracy.

    None are tried first, then more and more of them up to half of all, then the gap is halved
    (:func:`convscale.stats.smallest_true`).

    Args:
        ranked: gives the layers, most sensitive first; asked for only where quantising all of them loses too much.
        total: how many layers there are; with more than half of them in float INT8 is given up.
        attempt: quantises with these layers in float and gives the points lost.
        max_drop: points that may be lost.

    Returns:
        The tries in order, the last one that which ``attempt`` left behind, and whether it keeps the accuracy.
    """
    steps: list[Step] = []
    order: Sequence[Layer] = ()

    def good(count: int) -> bool:
        drop = attempt(order[:count])
        steps.append(Step(float_layers=tuple(layer.name for layer in order[:count]), drop_points=drop))
        return drop <= max_drop + 1e-9

    fewest = 0 if good(0) else None
    if fewest is None and total >= 2:
        order = ranked()
        fewest = smallest_true(good, 1, total // 2)
    if fewest is not None and len(steps[-1].float_layers) != fewest:
        good(fewest)  # what the last try left behind is another
    return steps, fewest is not None


def _round_tensor(x: torch.Tensor) -> torch.Tensor:
    """256 levels from the smallest to the largest value."""
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low).clamp(min=1e-12) / 255
    return torch.round(x / scale) * scale


def _round_rows(weight: torch.Tensor) -> torch.Tensor:
    """127 levels per output channel: half the range of 8 bits."""
    scale = weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True).clamp(min=1e-12) / 63
    return torch.round(weight / scale) * scale


def _logits(output: torch.Tensor | tuple[torch.Tensor, ...] | list[torch.Tensor]) -> torch.Tensor:
    """A network gives its logits; one with baked preprocessing probabilities and logits; a detector scores before its
    labels, which are whole numbers.
    """
    if isinstance(output, torch.Tensor):
        return output
    return [each for each in output if each.is_floating_point()][-1]


def _input_name(path: Path) -> str:
    import onnx

    return onnx.load(os.fspath(path), load_external_data=False).graph.input[0].name
