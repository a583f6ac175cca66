"""A network made the one that released weights were trained with: slopes, padding and epsilons of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from convscale.arch.block import StageSpec
from convscale.arch.families.tresnet import OFFICIAL_V2_SLOPE
from convscale.arch.parts import ActSpec
from convscale.arch.spec import NetSpec
from convscale.nn import keymaps
from convscale.nn.layers import conv2d
from convscale.nn.norm import BatchNormAct, InPlaceABN, set_fields, with_slope


def as_trained(net: nn.Module, spec: NetSpec, layout: str) -> str:
    """Make ``net`` the network that weights of this layout were trained with; returns what was changed, in words."""
    is_v2 = layout == "official" and all(stage.runs[0].block.kind == "bottleneck" for stage in spec.stages)
    if is_v2 and spec.stem.activation.slope != OFFICIAL_V2_SLOPE:
        set_slopes(net, OFFICIAL_V2_SLOPE)
        return f"leaky slopes of {OFFICIAL_V2_SLOPE:g}"
    row = keymaps.layout_of(spec, layout)
    if row is None or row.eps is None:
        return ""
    if row.same_padding and (spec.padding, spec.norm.eps) != ("same", row.eps):
        set_same_padding(net, row.eps)
        return f"SAME padding and a norm epsilon of {row.eps:g}"
    if row.eps != spec.norm.eps:
        set_eps(net, row.eps)
        return f"a norm epsilon of {row.eps:g}"
    return ""


def set_slopes(net: nn.Module, slope: float) -> None:
    """Give every leaky ReLU of ``net`` another slope, in place; norms whose activation then no longer inverts become
    batch norms.
    """

    def changed(act: ActSpec) -> ActSpec:
        return replace(act, slope=slope) if act.kind == "leaky_relu" else act

    for parent in net.modules():
        for name, child in parent.named_children():
            if isinstance(child, BatchNormAct | InPlaceABN) and child.activation == "leaky_relu":
                setattr(parent, name, with_slope(child, slope))
    spec = getattr(net, "spec", None)
    if isinstance(spec, NetSpec):
        stem = replace(spec.stem, activation=changed(spec.stem.activation))
        stages = tuple(_with_activations(stage, changed) for stage in spec.stages)
        set_fields(net, spec=replace(spec, stem=stem, stages=stages, lineage=None))


def _with_activations(stage: StageSpec, changed: Callable[[ActSpec], ActSpec]) -> StageSpec:
    """The stage with another activation inside its blocks."""
    blocks = [replace(run.block, activation=changed(run.block.activation)) for run in stage.runs]
    return replace(stage, runs=tuple(replace(run, block=block) for run, block in zip(stage.runs, blocks, strict=True)))


def set_same_padding(net: nn.Module, eps: float) -> None:
    """Give every convolution of ``net`` TensorFlow's SAME padding and every norm ``eps``, in place."""
    for parent in net.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Conv2d and child.stride != (1, 1) and child.kernel_size != (1, 1):
                new = conv2d(
                    child.in_channels,
                    child.out_channels,
                    child.kernel_size[0],
                    stride=child.stride[0],
                    groups=child.groups,
                    bias=child.bias is not None,
                    padding="same",
                )
                new.weight, new.bias = child.weight, child.bias
                setattr(parent, name, new.train(child.training))
            elif isinstance(child, BatchNormAct | InPlaceABN):
                child.eps = eps
    spec = getattr(net, "spec", None)
    if isinstance(spec, NetSpec):
        set_fields(net, spec=replace(spec, padding="same", norm=replace(spec.norm, eps=eps)))


def set_eps(net: nn.Module, eps: float) -> None:
    """Give every norm of ``net`` this epsilon, in place."""
    for module in net.modules():
        if isinstance(module, BatchNormAct | InPlaceABN):
            module.eps = eps
    spec = getattr(net, "spec", None)
    if isinstance(spec, NetSpec):
        set_fields(net, spec=replace(spec, norm=replace(spec.norm, eps=eps)))
