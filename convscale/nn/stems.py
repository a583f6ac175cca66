"""Stems: from the image to the first stage."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convscale.arch.spec import NetSpec
from convscale.nn.blocks import ConvNormAct


class BranchedStem(nn.Sequential):
    """(N, in_chans, H, W) -> (N, widths[1], H / stride, W / stride): a convolution, then two 2x2 ones beside a 2x2
    max-pool of stride 1, a convolution of both and a 1x1 (PP-HGNetV2).

    Before each 2x2 window of stride 1 the map gets a row and a column of zeros at its end, so that its size stays.
    """

    def __init__(self, spec: NetSpec, in_chans: int) -> None:
        (mid, out), stride, shared = (
            spec.stem.widths,
            spec.stem.stride,
            {"norm": spec.norm, "act": spec.stem.activation},
        )
        first, second = min(stride, 2), 2 if stride == 4 else 1
        kernel, padding = (spec.stem.kernel,), spec.padding
        super().__init__(
            ConvNormAct(in_chans, mid, kernel, stride=first, padding=padding, **shared),
            ConvNormAct(mid, mid // 2, (2,), padding="none", **shared),
            ConvNormAct(mid // 2, mid, (2,), padding="none", **shared),
            ConvNormAct(2 * mid, mid, kernel, stride=second, padding=padding, **shared),
            ConvNormAct(mid, out, **shared),
        )

    def forward(self, input: Tensor) -> Tensor:
        start, left, right, both, last = self
        x = F.pad(start(input), (0, 1, 0, 1))
        convolved = right(F.pad(left(x), (0, 1, 0, 1)))
        return last(both(torch.cat([F.max_pool2d(x, 2, 1), convolved], 1)))


def make_stem(spec: NetSpec, in_chans: int) -> nn.Sequential:
    """The convolutions of ``spec``'s stem for images of ``in_chans`` channels; space-to-depth and the max-pool stand
    outside it.
    """
    stem, convs = spec.stem, nn.Sequential()
    if stem.kind == "branched":
        return BranchedStem(spec, in_chans)
    stride, in_chs = stem.stride, in_chans
    if stem.kind == "space_to_depth":
        stride, in_chs = 1, in_chans * stem.stride**2
    for i, width in enumerate(stem.widths):
        convs.append(
            ConvNormAct(
                in_chs,
                width,
                (stem.kernel,),
                norm=spec.norm,
                act=stem.activation,
                stride=stride if i == 0 else 1,
                padding="none" if stem.kind == "patch" else spec.padding,
            )
        )
        in_chs = width
    return convs
