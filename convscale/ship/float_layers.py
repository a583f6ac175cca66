"""Which layers must stay in float for the accuracy to hold where the rest is in 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from convscale.ship.layers import Layer
from convscale.stats import smallest_true

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
