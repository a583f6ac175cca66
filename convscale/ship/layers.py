"""The layers of a network as they stand in its exported file: exporters keep the names of the graph's values."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from convscale.formats.baked import Baked
from convscale.formats.fold import capture, fold
from convscale.images.preprocess import Preprocessing

aten = torch.ops.aten
LAYER_OPERATORS = (aten.conv2d.default, aten.conv2d.padding, aten.linear.default)

_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A convolution or linear layer."""

    name: str
    """In the network: ``layer1.0.conv2``."""
    value: str
    """Its output's name in the captured graph."""
    file_value: str
    """Its output's name in the exported file."""


def shipped_graph(
    net: nn.Module, preprocessing: Preprocessing, images: np.ndarray, *, baked: bool
) -> tuple[fx.GraphModule, list[Layer], torch.Tensor]:
    """The graph that export writes, captured once more.

    Args:
        images: uint8 (N, H, W, C); a single one is doubled, since a capture needs two.

    Returns:
        The graph, its layers in running order, and the images as the graph takes them.
    """
    images = np.require(np.concatenate([images, images]) if len(images) < 2 else images, requirements=["C", "W"])
    pixels = torch.from_numpy(images)
    normalised = preprocessing.normalize(pixels)
    folded = fold(net, normalised)
    names = [_module_name(node) for node in folded.graph.nodes if node.target in LAYER_OPERATORS]
    batch = pixels if baked else normalised
    graph = capture(Baked(folded, preprocessing) if baked else folded, batch)
    output = next(node for node in graph.graph.nodes if node.op == "output").args[0]
    last = output[-1] if isinstance(output, (tuple, list)) else output
    while isinstance(last, fx.Node) and last.target in _CASTS:
        last = last.all_input_nodes[0]
    nodes = [node for node in graph.graph.nodes if node.target in LAYER_OPERATORS]
    layers = [
        Layer(name=name, value=node.name, file_value="logits" if node is last else node.name)
        for node, name in zip(nodes, names, strict=True)
    ]
    return graph, layers, batch


def products_of(graph: Any, values: Collection[str]) -> dict[str, str]:
    """Of each of these values that an ONNX graph makes by a product and a sum, as exporters write a linear layer with
    bias on maps or tokens, the product's name and the value's own, which is the sum's.
    """
    made = {node.output[0] for node in graph.node if node.op_type == "MatMul"}
    sums = [node for node in graph.node if node.op_type == "Add" and node.output[0] in values]
    return {name: node.output[0] for node in sums for name in node.input if name in made}


def _module_name(node: fx.Node) -> str:
    """The module an operator belongs to, where the capture has kept it."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if path]
    return paths[-1] if paths else node.name
