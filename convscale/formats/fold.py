"""Exact rewrites of a captured network: what only training needs goes, batch norm moves into the convolution before it.

The network is captured by ``torch.export`` and rewritten as a graph of ATen operators, so that any module that can be
exported can be
folded: ours, timm's, a user's. Scales are computed in float64 and rounded once, which keeps the float32 difference of a
deep network near that of the unfolded one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from convscale.errors import UserError, first_line
from convscale.networks.foreign import reparameterized
from convscale.nn.modes import evaluating
from convscale.runtimes.silence import quiet

aten = torch.ops.aten

_DROPOUTS = (aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default, aten.alpha_dropout.default)
_SHAPE_ONLY = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.permute.default,
    aten.transpose.int,
    aten.contiguous.default,
    aten.clone.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.pixel_unshuffle.default,
    aten.alias.default,
}


def capture(net: nn.Module, example: torch.Tensor) -> fx.GraphModule:
    """The network in eval mode as a graph of ATen operators, for any batch size.

    Args:
        net: any module that takes one batch of images; it is left as it is.
        example: (N, C, H, W), or (N, H, W, C) where the network takes that; N is at least 2.

    Raises:
        UserError: the network can not take this size, or can not be captured; the message says at what.
    """
    with evaluating(net), torch.no_grad():
        try:
            with quiet():
                exported = torch.export.export(
                    net, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), strict=False
                )
                return exported.module(check_guards=False)  # pyright: ignore[reportReturnType]
        except Exception as error:
            _run_once(net, example)  # a size that the network can not take fails here too, with a shorter message
            raise UserError(
                f"{type(net).__name__} can not be captured by torch.export for any batch size: {first_line(error)}"
            ) from error


def _merged(net: nn.Module) -> nn.Module:
    """timm's network with its branches merged, in its own type: timm merges some in single precision."""
    merged = reparameterized(net)
    return merged if merged is net else merged.to(next(net.parameters()).dtype)


def fold(net: nn.Module, example: torch.Tensor, *, strided_stem: bool = False) -> fx.GraphModule:
    """Capture ``net`` and apply every exact rewrite; the branches of timm's re-parameterised networks become one
    convolution first.

    Args:
        net: any module; it is left as it is.
        example: as for :func:`capture`.
        strided_stem: write space-to-depth followed by a convolution as one strided convolution; whether that is faster
            depends on the runtime.

    Returns:
        A module with the same outputs: to 1e-10 relative in float64.
    """
    graph = net if isinstance(net, fx.GraphModule) else capture(_merged(net), example)
    graph = copy.copy(graph)
    graph.graph = copy.deepcopy(graph.graph)
    drop_training_only(graph)
    fold_batch_norm(graph)
    clamp_hardtanh(graph)
    if strided_stem:
        stride_stem(graph, example)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()
    _drop_unused(graph)
    return graph


def drop_training_only(graph: fx.GraphModule) -> int:
    """Take out dropouts that do nothing in eval mode; returns how many."""
    count = 0
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.target in _DROPOUTS and not node.args[2]:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
            count += 1
    return count


def clamp_hardtanh(graph: fx.GraphModule) -> int:
    """Write ReLU6 and its kind as a clamp, which is the same and which exporters take apart in half the time; returns
    how many were.
    """
    count = 0
    for node in graph.graph.nodes:
        if node.op != "call_function" or node.target not in (aten.hardtanh.default, aten.hardtanh_.default):
            continue
        low, high = (*node.args[1:], *(-1.0, 1.0)[len(node.args) - 1 :])
        if node.kwargs or (node.target is aten.hardtanh_.default and len(node.args[0].users) > 1):
            continue  # who else reads what was written over
        node.target, node.args = aten.clamp.default, (node.args[0], low, high)
        count += 1
    return count


def fold_batch_norm(graph: fx.GraphModule) -> int:
    """Move each batch norm in eval mode into the convolution or linear layer before it; returns how many were folded.

    Where it follows a concatenation of convolutions (MixNet's mixed kernels), each convolution takes its slice. A batch
    norm after anything else, or after a convolution whose output is used elsewhere too, stays.
    """
    count = 0
    for norm in list(graph.graph.find_nodes(op="call_function", target=aten.batch_norm.default)):
        source, *tensors, training, _momentum, eps, _cudnn = norm.args
        if training or not isinstance(source, fx.Node) or tensors[2] is None:
            continue
        branches = _branches(source)
        if not branches or any(_output_channels(graph, node) is None for node in branches):
            continue
        scale, shift = _affine(graph, tensors, eps)
        start = 0
        for node in branches:
            end = start + (_output_channels(graph, node) or 0)
            _scale_output(graph, node, scale[start:end], shift[start:end])
            start = end
        assert start == len(scale), f"{norm.name}: {start} channels in, {len(scale)} normalised"
        norm.replace_all_uses_with(source)
        graph.graph.erase_node(norm)
        count += 1
    return count


def stride_stem(graph: fx.GraphModule, example: torch.Tensor) -> int:
    """Write space-to-depth(b) then a k x k convolution as one (b k) x (b k) convolution of stride b; returns how many
    were found.

    Space-to-depth is recognised by what it does to an image of indices, however it is written.
    """
    count = 0
    placeholder = next(node for node in graph.graph.nodes if node.op == "placeholder")
    for conv in list(graph.graph.find_nodes(op="call_function", target=aten.conv2d.default)):
        chain = _shape_chain(conv.args[0])
        if not chain or chain[0].args[0] is not placeholder or _conv_arguments(conv)[4:] != ([1, 1], 1):
            continue
        order = _space_to_depth_order(graph, chain, tuple(example.shape[1:]))
        if order is None:
            continue
        block, index = order
        weight = _tensor(graph, conv.args[1]).detach()
        out, _, kh, kw = weight.shape
        channels = weight.shape[1] // block**2
        # inverse of the order: (channel, block row, block column) <- position among the convolution's inputs
        weight = weight[:, index].reshape(out, channels, block, block, kh, kw)
        weight = weight.permute(0, 1, 4, 2, 5, 3).reshape(out, channels, kh * block, kw * block).contiguous()
        _, _, bias, stride, *_ = _conv_arguments(conv)
        padding = _conv_padding(conv)
        args = (placeholder, None, bias, [s * block for s in stride], [p * block for p in padding])
        with graph.graph.inserting_before(conv):
            conv.args = (args[0], _new_tensor(graph, weight), *args[2:])
        count += 1
    return count


def has_deep_stem(net: nn.Module, example: torch.Tensor) -> bool:
    """Whether a network begins with space-to-depth and a convolution, so that ``strided_stem`` changes it."""
    first = next((module for module in net.modules() if isinstance(module, nn.Conv2d)), None)
    if first is not None and first.in_channels == example.shape[1]:
        return False  # it sees the image as it is: no need to capture the network
    graph = capture(net, example)
    return stride_stem(graph, example) > 0


def _run_once(net: nn.Module, example: torch.Tensor) -> None:
    try:
        net(example)
    except Exception as error:
        raise UserError(
            f"{type(net).__name__} can not take an input of shape {tuple(example.shape)}: {first_line(error)}"
        ) from error


def _branches(source: fx.Node) -> list[fx.Node]:
    """The convolutions whose outputs, side by side, are ``source`` and nothing else's input; empty where there are
    none.
    """
    if len(source.users) != 1:
        return []
    if source.target is aten.cat.default and len(source.args) == 2 and source.args[1] == 1:
        parts = list(source.args[0])  # pyright: ignore[reportArgumentType]
    else:
        parts = [source]
    known = (aten.conv2d.default, aten.conv2d.padding, aten.linear.default)
    if all(isinstance(p, fx.Node) and p.target in known and len(p.users) == 1 for p in parts) and len(
        set(parts)
    ) == len(parts):
        return parts  # pyright: ignore[reportReturnType]
    return []


def _affine(graph: fx.GraphModule, tensors: list[Any], eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift of a batch norm in float64, each (channels,). The weight keeps its sign."""
    weight, bias, mean, var = (None if t is None else _tensor(graph, t).detach().double() for t in tensors)
    assert mean is not None, "a batch norm without running statistics was not skipped"
    assert var is not None, "a batch norm without running statistics was not skipped"
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def _scale_output(graph: fx.GraphModule, node: fx.Node, scale: torch.Tensor, shift: torch.Tensor) -> None:
    """Give a convolution or linear layer weights that put out ``scale * y + shift``."""
    args = list(node.args) + [None] * (3 - len(node.args))
    weight = _tensor(graph, args[1]).detach()
    folded = weight.double() * scale.view(-1, *[1] * (weight.ndim - 1))
    if args[2] is not None:
        shift = shift + _tensor(graph, args[2]).detach().double() * scale
    with graph.graph.inserting_before(node):
        args[1] = _new_tensor(graph, folded.to(weight.dtype))
        args[2] = _new_tensor(graph, shift.to(weight.dtype))
    node.args = tuple(args)


def _tensor(graph: fx.GraphModule, node: Any) -> torch.Tensor:
    """The tensor that a ``get_attr`` node reads."""
    assert isinstance(node, fx.Node), f"{node} is no tensor of the graph"
    assert node.op == "get_attr", f"{node.name} is no tensor of the graph"
    owner, _, name = str(node.target).rpartition(".")
    return getattr(graph.get_submodule(owner), name)


def _new_tensor(graph: fx.GraphModule, value: torch.Tensor) -> fx.Node:
    """Register a parameter under a free name and read it."""
    number = sum(1 for name, _ in graph.named_parameters(recurse=False) if name.startswith("folded_"))
    name = f"folded_{number}"
    graph.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return graph.graph.get_attr(name)


def _drop_unused(graph: fx.GraphModule) -> None:
    """Take out the tensors that nothing reads any more: the weights before folding."""
    used = {str(node.target) for node in graph.graph.find_nodes(op="get_attr")}
    for name in [
        name
        for name, _ in (*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False))
    ]:
        if name not in used:
            owner, _, attribute = name.rpartition(".")
            delattr(graph.get_submodule(owner), attribute)


def _output_channels(graph: fx.GraphModule, node: fx.Node) -> int | None:
    """Channels a convolution puts out; None where its weight is computed rather than stored."""
    weight = node.args[1]
    return _tensor(graph, weight).shape[0] if isinstance(weight, fx.Node) and weight.op == "get_attr" else None


def _conv_arguments(conv: fx.Node) -> tuple[Any, ...]:
    """input, weight, bias, stride, dilation, groups; the padding is apart."""
    defaults = (None, None, None, [1, 1], [0, 0], [1, 1], 1)
    args: Any = (*conv.args, *defaults[len(conv.args) :])
    return (*args[:3], list(args[3]), list(args[5]), args[6])


def _conv_padding(conv: fx.Node) -> list[int]:
    padding = conv.args[4] if len(conv.args) > 4 else [0, 0]
    return list(cast(list[int], padding))


def _shape_chain(node: Any) -> list[fx.Node]:
    """The run of operators ending at ``node`` that only move pixels about, first one first."""
    chain: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.target in _SHAPE_ONLY:
        chain.insert(0, node)
        node = node.args[0]
    return chain


def _space_to_depth_order(
    graph: fx.GraphModule, chain: list[fx.Node], shape: tuple[int, ...]
) -> tuple[int, torch.Tensor] | None:
    """Block size and, for each (channel, block row, block column) of a block, its position among the output channels;
    None for another move.
    """
    channels, height, width = shape
    image = torch.arange(channels * height * width).view(1, channels, height, width)
    values: dict[fx.Node, Any] = {}

    def value(node: Any) -> Any:
        # Whatever is neither the chain nor a constant is the batch size, one here.
        return values.get(node, 1) if isinstance(node, fx.Node) else node

    current = image
    for node in chain:
        target: Callable[..., torch.Tensor] = node.target  # pyright: ignore[reportAssignmentType]
        rest = map_aggregate(node.args[1:], value)
        current = target(current, *rest, **node.kwargs)
        values[node] = current
    if current.ndim != 4 or height % current.shape[2] or height // current.shape[2] != width // current.shape[3]:
        return None
    block = height // current.shape[2]
    wanted = nn.functional.pixel_unshuffle(
        image, block
    )  # (1, C * b * b, H / b, W / b), channels in the order (c, row, column)
    if block == 1 or current.shape != wanted.shape:
        return None
    position = {int(v): i for i, v in enumerate(current[0, :, 0, 0])}
    try:
        index = torch.tensor([position[int(v)] for v in wanted[0, :, 0, 0]])
    except KeyError:
        return None
    return (block, index) if torch.equal(current[:, index], wanted) else None
