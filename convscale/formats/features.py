"""A captured network that puts out its last feature map beside its logits."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx
from torch.fx.graph import CodeGen

from convscale.errors import UserError

aten = torch.ops.aten
_PASSED = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten._to_copy.default,
}
"""What changes nothing between a pool and the classifier."""
_POOLS = {aten.mean.dim, aten.adaptive_avg_pool2d.default}


def keeping_features(graph: fx.GraphModule) -> tuple[fx.GraphModule, torch.Tensor, torch.Tensor]:
    """The network with outputs (logits, features), and its classifier.

    Args:
        graph: a network from :func:`convscale.formats.fold.fold` whose head is an average pool over all places and a
            linear layer; it is left as it is.

    Returns:
        The graph: (N, C, H, W) -> (N, classes), (N, C', h, w); weight (classes, C') and bias (classes,) of the
        classifier.

    Raises:
        UserError: its head is another.
    """
    kept = copy.copy(graph)
    kept.graph = copy.deepcopy(graph.graph)
    output = next(node for node in kept.graph.nodes if node.op == "output")
    logits: Any = output.args[0]
    logits = logits[0] if isinstance(logits, tuple | list) else logits
    linear = _behind(logits)
    if linear is None or linear.target is not aten.linear.default:
        raise _other_head("its last layer is not linear")
    pool = _behind(linear.args[0])
    features = _pooled(pool) if pool is not None and pool.target in _POOLS else None
    if features is None:
        raise _other_head("what its classifier sees is not the average of a map")
    output.args = ((logits, features),)
    # The tree of outputs that the capture wrote down is that of the logits alone.
    kept.graph.set_codegen(CodeGen())
    kept.recompile()
    weight = _stored(kept, linear.args[1])
    bias = _stored(kept, linear.args[2]) if len(linear.args) > 2 and linear.args[2] is not None else None
    return kept, weight, torch.zeros(len(weight)) if bias is None else bias


def _behind(node: Any) -> fx.Node | None:
    """The node whose value arrives here, but for changes of shape and type."""
    while isinstance(node, fx.Node) and node.target in _PASSED:
        node = node.args[0]
    return node if isinstance(node, fx.Node) else None


def _pooled(pool: fx.Node) -> fx.Node | None:
    """The map (N, C, h, w) that a pool takes the mean of, over every place; None: it is another pool."""
    source: Any = pool.args[0]
    where: Any = pool.args[1]
    if pool.target is aten.adaptive_avg_pool2d.default:
        return source if list(where) == [1, 1] else None
    if sorted(at % 4 for at in where) == [2, 3] and len(where) == 2:
        return source
    flat = source.target is aten.flatten.using_ints and list(source.args[1:]) in ([2], [2, 3], [2, -1])
    return source.args[0] if flat and list(where) in ([2], [-1]) else None


def _stored(graph: fx.GraphModule, node: Any) -> torch.Tensor:
    """The tensor that a node reads."""
    owner, _, name = str(node.target).rpartition(".")
    return getattr(graph.get_submodule(owner), name).detach()


def _other_head(why: str) -> UserError:
    return UserError(
        f"--with-features keeps the map in front of an average pool and a linear classifier; of this network {why}"
    )
