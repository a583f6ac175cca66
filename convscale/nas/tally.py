"""Parameters and multiply-accumulates of a candidate, put together from its parts: each part is traced once, however
many networks it is in.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn

from convscale.arch.block import BlockSpec, RunSpec, StageSpec
from convscale.arch.parts import RELU, NormSpec
from convscale.arch.spec import NetSpec
from convscale.conditions import Conditions
from convscale.cost.tracing import trace
from convscale.networks.resolve import build_meta
from convscale.nn.blocks import build_block

_BEHIND = ("head", "global_pool", "pooled", "classifier")
"""Children of a network that stand behind its last stage."""
_PARTS = 1 << 16
"""Parts that are kept."""


class Counts(NamedTuple):
    """What a part or a network costs."""

    params: int
    """Parameters."""
    macs: int
    """Multiply-accumulates per image."""


def tally(spec: NetSpec) -> Counts:
    """The counts of a network with a classifier of 1,000 classes for RGB images of its own size; those of ``count``."""
    bare = _bare(spec)
    stem, side = _stem(bare)
    found, channels = [stem], spec.stem.widths[-1]
    for stage in spec.stages:
        stride = stage.stride
        for run in stage.runs:
            for number in range(min(run.repeat, 2)):
                part, side = _block(_counted(run.block, spec.norm), channels, stride, spec.norm, spec.padding, side)
                # What follows a run's first block takes what the block gives: from the second on all are alike.
                found += [part] * (1 if number == 0 else run.repeat - 1)
                channels, stride = run.block.width, 1
    head = _head(bare, side)
    return Counts(
        params=sum(part.params for part in found) + head.params, macs=sum(part.macs for part in found) + head.macs
    )


def _counted(block: BlockSpec, norm: NormSpec) -> BlockSpec:
    """The block with the activation that stands for all, since plain ones have no weights and no multiply-accumulates:
    fewer parts are traced. Norms in place are made for theirs.
    """
    return block if norm.kind == "inplace" or block.activation.affine else replace(block, activation=RELU)


def _bare(spec: NetSpec) -> NetSpec:
    """What the ends of a network depend on: its stem and head around a plain convolution of the last stage's width."""
    plain = BlockSpec(kind="conv", width=spec.stages[-1].width, kernels=(1,))
    return replace(spec, stages=(StageSpec(runs=(RunSpec(block=plain),)),), lineage=None)


@lru_cache(_PARTS)
def _stem(bare: NetSpec) -> tuple[Counts, int]:
    """The stem, and the side of its map."""
    net = build_meta(bare)
    stem = nn.Sequential(
        *(part for part in (net.space_to_depth, net.stem, net.stem_pool) if isinstance(part, nn.Module))
    )
    return _traced(stem, bare.input.size, 3), _side(stem, 3, bare.input.size)


@lru_cache(_PARTS)
def _head(bare: NetSpec, side: int) -> Counts:
    """What stands behind the last stage."""
    net = build_meta(bare)
    behind = nn.Sequential(*(getattr(net, name) for name in _BEHIND if isinstance(getattr(net, name), nn.Module)))
    return _traced(behind, side, bare.stages[-1].width)


@lru_cache(_PARTS)
def _block(block: BlockSpec, channels: int, stride: int, norm: NormSpec, padding: str, side: int) -> tuple[Counts, int]:
    """A block, and the side of its map."""
    with torch.device("meta"):
        module = build_block(block, channels, stride, norm=norm, padding=padding, drop_path=0.0)
    return _traced(module, side, channels), _side(module, channels, side) if stride > 1 else side


def _traced(module: nn.Module, side: int, channels: int) -> Counts:
    if not any(True for _ in module.parameters()):
        return Counts(0, 0)
    traced = trace(module, Conditions(batch_size=1, image_size=side), channels=channels)
    return Counts(params=traced.params, macs=sum(operator.macs for operator in traced.operators))


def _side(module: nn.Module, channels: int, side: int) -> int:
    """Side of a module's output."""
    with torch.no_grad():
        return int(module.eval()(torch.empty(1, channels, side, side, device="meta")).shape[-1])
