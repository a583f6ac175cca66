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
from convscale.nn.layers import SameConv2d, conv2d
from convscale.nn.norm import BatchNormAct, InPlaceABN, set_fields, with_slope


def original_spec(net: nn.Module, spec: NetSpec) -> NetSpec:
    """The spec that a network, whose spec is ``spec``, had before weights gave it their constants."""
    before = getattr(net, _BEFORE, None)
    return replace(before, norm=replace(before.norm, kind=spec.norm.kind)) if isinstance(before, NetSpec) else spec


def as_trained(net: nn.Module, spec: NetSpec, layout: str) -> str:
    """Make ``net`` the network that weights of this layout were trained with, whatever others made of it before;
    returns what was changed, in words. Weights in our own keys change nothing: they may be the network's own.
    """
    if layout == keymaps.OWN:
        return ""
    before = original_spec(net, spec)
    goal, said = _trained(before, layout), []
    if goal.stem.activation.slope != spec.stem.activation.slope:
        set_slopes(net, goal.stem.activation.slope)
        said.append(f"leaky slopes of {goal.stem.activation.slope:g}")
    if goal.padding != spec.padding:
        set_padding(net, goal.padding)
        said.append(f"{'SAME' if goal.padding == 'same' else goal.padding} padding")
    if goal.norm.eps != spec.norm.eps:
        set_eps(net, goal.norm.eps)
        said.append(f"a norm epsilon of {goal.norm.eps:g}")
    if said:
        set_fields(net, **{_BEFORE: before, "spec": goal})
    return " and ".join(said)


_BEFORE = "spec_before_weights"
"""The attribute of a network that keeps its spec as it was before weights changed it."""


def _trained(spec: NetSpec, layout: str) -> NetSpec:
    """The spec of the network that weights of this layout were trained with."""
    is_v2 = layout == "official" and all(stage.runs[0].block.kind == "bottleneck" for stage in spec.stages)
    if is_v2:
        return _with_slopes(spec, OFFICIAL_V2_SLOPE)
    row = keymaps.layout_of(spec, layout)
    if row is None or row.eps is None:
        return spec
    padding = "same" if row.same_padding else spec.padding
    return replace(spec, padding=padding, norm=replace(spec.norm, eps=row.eps))


def set_slopes(net: nn.Module, slope: float) -> None:
    """Give every leaky ReLU of ``net`` another slope, in place; norms whose activation then no longer inverts become
    batch norms.
    """
    for parent in net.modules():
        for name, child in parent.named_children():
            if isinstance(child, BatchNormAct | InPlaceABN) and child.activation == "leaky_relu":
                setattr(parent, name, with_slope(child, slope))
    spec = getattr(net, "spec", None)
    if isinstance(spec, NetSpec):
        set_fields(net, spec=_with_slopes(spec, slope))


def _with_slopes(spec: NetSpec, slope: float) -> NetSpec:
    """The spec with another slope of every leaky ReLU; itself where that changes nothing."""

    def changed(act: ActSpec) -> ActSpec:
        return replace(act, slope=slope) if act.kind == "leaky_relu" else act

    stem = replace(spec.stem, activation=changed(spec.stem.activation))
    stages = tuple(_with_activations(stage, changed) for stage in spec.stages)
    new = replace(spec, stem=stem, stages=stages)
    return spec if new == spec else replace(new, lineage=None)


def _with_activations(stage: StageSpec, changed: Callable[[ActSpec], ActSpec]) -> StageSpec:
    """The stage with another activation inside its blocks."""
    blocks = [replace(run.block, activation=changed(run.block.activation)) for run in stage.runs]
    return replace(stage, runs=tuple(replace(run, block=block) for run, block in zip(stage.runs, blocks, strict=True)))


def set_padding(net: nn.Module, padding: str) -> None:
    """Give every convolution of ``net`` with a stride TensorFlow's SAME padding, or another in its place."""
    other = nn.Conv2d if padding == "same" else SameConv2d
    for parent in net.modules():
        for name, child in parent.named_children():
            if type(child) is not other:
                continue
            if child.stride != (1, 1) and child.kernel_size != (1, 1):
                new = conv2d(
                    child.in_channels,
                    child.out_channels,
                    child.kernel_size[0],
                    stride=child.stride[0],
                    groups=child.groups,
                    bias=child.bias is not None,
                    padding=padding,
                )
                new.weight, new.bias = child.weight, child.bias
                setattr(parent, name, new.train(child.training))
    spec = getattr(net, "spec", None)
    if isinstance(spec, NetSpec):
        set_fields(net, spec=replace(spec, padding=padding))


def set_eps(net: nn.Module, eps: float) -> None:
    """Give every norm of ``net`` this epsilon, in place."""
    for module in net.modules():
        if isinstance(module, BatchNormAct | InPlaceABN):
            module.eps = eps
    spec = getattr(net, "spec", None)
    if isinstance(spec, NetSpec):
        set_fields(net, spec=replace(spec, norm=replace(spec.norm, eps=eps)))
