"""Quantisation-aware fine-tuning: where rounding a trained network loses too much, its weights learn to live with it.

The folded network runs with the rounding of its weights and values in the way, where a quantiser puts it, as in Jacob
et al. 2018 (section 3; gradients pass rounding unchanged where nothing is clipped), and learns to say what it said
before: the teacher is the network itself, so no labels are needed.
"""

from __future__ import annotations

import copy
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx

from convscale.errors import UserError
from convscale.formats.onnx import write_onnx
from convscale.images.preprocess import Preprocessing
from convscale.ship.layers import LAYER_OPERATORS, products_of
from convscale.ship.quantize import LAYERS, quantize_file

MIN_IMAGES = 64
"""Fewer images than this are learnt by heart."""
MOST_IMAGES = 4096
"""Of more images so many are used, spread evenly."""
EPOCHS = 2
"""Passes over the images."""
BATCH = 32
"""Images a step."""
PEAK_LR = 1e-4
"""Adam's step size at its peak; a cosine takes it to 0."""
HELD_OUT = 8
"""Every eighth image is held out: the state that is kept is the one that is nearest to the teacher on these."""
RANGE_IMAGES = 128
"""Images that the ranges of activations come from."""
LOGITS = "logits"
"""The output's name in a file that is quantised to see where."""
JITTER = 0.05
"""Quantisers choose ranges each in its own way, so that in training each range is scaled by up to so much at random:
weights that fit one grid alone are no use in another.
"""


def fine_tune(
    graph: fx.GraphModule,
    images: np.ndarray,
    preprocessing: Preprocessing,
    route: str,
    *,
    several: bool = False,
    epochs: int = EPOCHS,
    lr: float = PEAK_LR,
    seed: int = 0,
) -> fx.GraphModule:
    """A copy of a folded network whose weights have learnt to be rounded.

    Args:
        graph: the folded network, of normalised images (N, C, H, W) to logits (N, classes).
        images: uint8 (N, H, W, C) of the training set, resized.
        route: the quantiser that will round it.
        several: an image may have several labels: each class's own probability is kept, so that thresholds and
            temperatures hold.
        epochs, lr, seed: passes over the images, the largest step size, and what orders them.

    Returns:
        The state that came nearest to the network on held-out images; the one before the first step competes.

    Raises:
        UserError: there are too few images.
    """
    check_tunable(images)
    chosen = images[np.linspace(0, len(images) - 1, min(len(images), MOST_IMAGES)).round().astype(np.int64)]
    held = np.arange(len(chosen)) % HELD_OUT == 0
    tuned = copy.deepcopy(graph)
    weights = [p.requires_grad_(True) for p in tuned.parameters() if p.is_floating_point()]
    rounded = _Rounded(tuned, grid_of(graph, chosen[:: max(1, len(chosen) // RANGE_IMAGES)], preprocessing, route))
    train, check = chosen[~held], chosen[held]
    optimizer = torch.optim.Adam(weights, lr=lr, betas=(0.9, 0.99))
    steps = epochs * math.ceil(len(train) / BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    order = np.random.default_rng(seed)
    best, kept = _distance(graph, rounded, check, preprocessing, several), copy.deepcopy(tuned.state_dict())
    for _ in range(epochs):
        for part in np.array_split(order.permutation(len(train)), math.ceil(len(train) / BATCH)):
            batch = preprocessing.normalize(torch.from_numpy(train[part]))
            rounded.jitter = order
            loss = _divergence(graph, rounded, batch, several)
            rounded.jitter = None
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        distance = _distance(graph, rounded, check, preprocessing, several)
        if distance < best:
            best, kept = distance, copy.deepcopy(tuned.state_dict())
    tuned.load_state_dict(kept)
    for weight in weights:
        weight.requires_grad_(False)
    return tuned


def check_tunable(images: np.ndarray | None) -> None:
    """
    Raises:
        UserError: there are too few images to fine-tune on.
    """
    count = 0 if images is None else len(images)
    if count < MIN_IMAGES:
        raise UserError(
            f"quantisation-aware fine-tuning needs at least {MIN_IMAGES} calibration images of the training set, got "
            f"{count}"
        )


Levels = tuple[float, int, int, int]
"""Scale, zero point, least and largest level."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Where a quantiser rounds a network, and how finely."""

    values: Mapping[str, Levels]
    """By the names of the graph's values."""
    inputs: Mapping[str, Levels]
    """Of what goes into a layer, by the name of the layer's value."""
    weights: Mapping[str, float]
    """The largest weight of each of a layer's output channels over its scale, by the name of the layer's value."""
    gates: Mapping[str, Levels]
    """Of a SiLU's sigmoid, by the name of the SiLU's own value."""


class _Rounded(fx.Interpreter):
    """Runs a network with its values and its layers' weights rounded as a grid says."""

    def __init__(self, graph: fx.GraphModule, grid: Grid) -> None:
        super().__init__(graph)
        self.grid = grid
        self.jitter: np.random.Generator | None = None

    def run_node(self, n: fx.Node) -> object:
        grid, name = self.grid, n.name
        if n.target in LAYER_OPERATORS:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            x, weight, *rest = args
            if name in grid.inputs:
                x = self._round(x, grid.inputs[name])
            if name in grid.weights:
                weight = _round_weight(weight, grid.weights[name])
            value = super().call_function(n.target, (x, weight, *rest), kwargs)  # pyright: ignore[reportArgumentType]
        elif name in grid.gates:
            x = self.fetch_args_kwargs_from_env(n)[0][0]
            value = x * self._round(x.sigmoid(), grid.gates[name])
        else:
            value = super().run_node(n)
        return self._round(value, grid.values[name]) if name in grid.values else value

    def _round(self, value: torch.Tensor, how: Levels) -> torch.Tensor:
        scale, zero, least, most = how
        if self.jitter is not None:
            scale *= self.jitter.uniform(1 - JITTER, 1 + JITTER)
        return torch.fake_quantize_per_tensor_affine(value, scale, zero, least, most)


def _round_weight(weight: torch.Tensor, levels: float) -> torch.Tensor:
    scales = weight.detach().abs().amax(dim=tuple(range(1, weight.ndim))).clamp(min=1e-8) / levels
    zeros = torch.zeros(len(scales), dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scales, zeros, 0, -128, 127)


def grid_of(graph: fx.GraphModule, images: np.ndarray, preprocessing: Preprocessing, route: str) -> Grid:
    """Where a quantiser rounds a network when it makes an ONNX file of it, ranges from these images.

    Raises:
        UserError: it can not quantise the network.
    """
    import onnx

    with tempfile.TemporaryDirectory() as place:
        source, target = Path(place) / "float.onnx", Path(place) / "int8.onnx"
        example = preprocessing.normalize(torch.from_numpy(np.ascontiguousarray(images[:2])))
        write_onnx(graph, example, source, outputs=(LOGITS,))
        batches = [preprocessing.normalize_array(images[i : i + 1]) for i in range(len(images))]
        quantize_file(source, target, route, batches, tuned=True)
        file, plain = onnx.load(os.fspath(target)).graph, onnx.load(os.fspath(source)).graph
    floats = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in plain.initializer}
    weighted = [node for node in plain.node if node.op_type in LAYERS and node.input[1] in floats]
    largest_of = {node.name: _largest(node, floats[node.input[1]]) for node in weighted}
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in file.initializer}
    nodes = list(graph.graph.nodes)
    known = {node.name: node.target for node in nodes}
    layers = [node.name for node in nodes if node.target in LAYER_OPERATORS]
    # What a file calls otherwise than the graph: what comes in, and the last layer.
    names = {file.input[0].name: next(node.name for node in nodes if node.op == "placeholder"), LOGITS: layers[-1]}
    products = products_of(plain, {*layers, LOGITS})
    # By the nodes' own names: a quantiser may take out a ReLU, whose value its layer makes then.
    outputs = {node.name: products.get(node.output[0], node.output[0]) for node in weighted}
    layer_of = {name: names.get(value, value) for name, value in outputs.items()}
    makes = {name: node.op_type for node in file.node for name in node.output}
    rounded: dict[str, Levels] = {}
    scales: dict[str, np.ndarray] = {}
    behind: dict[str, str] = {}
    inputs: dict[str, Levels] = {}
    weights: dict[str, float] = {}
    gates: dict[str, Levels] = {}
    for node in file.node:
        sources = [behind.get(name, name) for name in node.input]
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            behind[node.output[0]] = sources[0]
            scale, zero = stored[node.input[1]], stored[node.input[2]]
            if sources[0] in stored:
                scales[sources[0]] = scale
            elif scale.size == 1:
                ends = np.iinfo(zero.dtype)
                rounded[sources[0]] = (float(scale.item()), int(zero.item()), int(ends.min), int(ends.max))
        elif (layer := layer_of.get(node.name, "")) in layers:
            if sources[0] in rounded:
                inputs[layer] = rounded[sources[0]]
            if sources[1] in scales:
                weights[layer] = _levels(largest_of[node.name], scales[sources[1]], layer, route)
        elif node.op_type == "Mul":
            made = names.get(node.output[0], node.output[0])
            gates.update((made, rounded[n]) for n in sources if makes.get(n) == "Sigmoid" and n in rounded)
    silu = (torch.ops.aten.silu.default, torch.ops.aten.silu_.default)
    return Grid(
        values={names.get(name, name): how for name, how in rounded.items() if names.get(name, name) in known},
        inputs=inputs,
        weights=weights,
        gates={name: how for name, how in gates.items() if known.get(name) in silu},
    )


def _largest(node: Any, weight: np.ndarray) -> np.ndarray:
    """The largest size of a weight of each of a layer's outputs: a convolution's stand along the first axis, a
    product's along the last, where it is not told to transpose them.
    """
    transposed = any(each.name == "transB" and each.i for each in node.attribute)
    first = node.op_type == "Conv" or transposed
    return np.abs(weight).max(axis=tuple(range(1, weight.ndim) if first else range(weight.ndim - 1)))


def _levels(largest: np.ndarray, scales: np.ndarray, layer: str, route: str) -> float:
    """How many steps of its scale the largest weight of an output is.

    Raises:
        UserError: the scales are of something else than the outputs.
    """
    if scales.size not in (1, largest.size):
        raise UserError(
            f"{route} gives the weights of {layer} {scales.size} scales for {largest.size} outputs, which can not be "
            "fine-tuned for; use int8=True"
        )
    return float(np.median(largest / scales))


def _batches(images: np.ndarray, preprocessing: Preprocessing) -> list[torch.Tensor]:
    parts = np.array_split(images, math.ceil(len(images) / BATCH))
    # A capture's batch is two images or more.
    return [preprocessing.normalize(torch.from_numpy(part if len(part) > 1 else part.repeat(2, 0))) for part in parts]


def _divergence(graph: fx.GraphModule, rounded: _Rounded, batch: torch.Tensor, several: bool) -> torch.Tensor:
    """How far the rounded network is from the float one: KL divergence of their classes, mean over images; for several
    labels binary cross-entropy of each class's own probability, which sees a shift that all logits share.
    """
    with torch.no_grad():
        teacher = graph(batch)
    student = rounded.run(batch)  # pyright: ignore[reportArgumentType]
    if several:
        return F.binary_cross_entropy_with_logits(student, teacher.sigmoid())
    both = F.log_softmax(student, 1), F.log_softmax(teacher, 1)
    return F.kl_div(*both, reduction="batchmean", log_target=True)


def _distance(
    graph: fx.GraphModule, rounded: _Rounded, images: np.ndarray, preprocessing: Preprocessing, several: bool
) -> float:
    with torch.no_grad():
        parts = [_divergence(graph, rounded, batch, several) for batch in _batches(images, preprocessing)]
    return float(torch.stack(parts).mean())
