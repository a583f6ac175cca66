"""TResNet-M written straight from the lean operations: what blocks of them keep at best, without the builder."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convscale.nn.layers import BlurPool, GlobalPool, SpaceToDepth, SqueezeExcite, conv2d
from convscale.nn.lean import conv_after, gated_norm
from convscale.nn.norm import Keep, norm_act


class ConvNorm(nn.Module):
    """A convolution and its norm."""

    def __init__(self, ins: int, outs: int, kernel: int, *, slope: float | None = None, keep: Keep = "output") -> None:
        super().__init__()
        self.conv = conv2d(ins, outs, kernel)
        self.norm = norm_act(
            "inplace", outs, activation="identity" if slope is None else "leaky_relu", slope=slope or 0.01, keep=keep
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Shortcut(nn.Module):
    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False) if stride == 2 else None
        self.project = ConvNorm(ins, outs, 1, keep="input")

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is None:
            return self.project(x)
        return self.project.norm(conv_after(self.project.conv, self.pool, x))


class Basic(nn.Module):
    def __init__(self, ins: int, planes: int, stride: int) -> None:
        super().__init__()
        self.shortcut = Shortcut(ins, planes, stride) if stride == 2 or ins != planes else None
        self.conv1 = ConvNorm(ins, planes, 3, slope=1e-3)
        self.blur = BlurPool() if stride == 2 else None
        self.conv2 = ConvNorm(planes, planes, 3, keep="input")
        self.se = SqueezeExcite(planes, max(planes // 4, 64))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        y = self.conv1(x)
        y = self.conv2.conv(y) if self.blur is None else conv_after(self.conv2.conv, self.blur, y)
        y = gated_norm(self.conv2.norm, self.se, y)
        return F.relu_(y.add_(shortcut))


class Bottleneck(nn.Module):
    def __init__(self, ins: int, planes: int, stride: int, use_se: bool) -> None:
        super().__init__()
        self.shortcut = Shortcut(ins, planes * 4, stride) if stride == 2 or ins != planes * 4 else None
        self.conv1 = ConvNorm(ins, planes, 1, slope=1e-3)
        self.conv2 = ConvNorm(planes, planes, 3, slope=1e-3)
        self.blur = BlurPool() if stride == 2 else None
        self.se = SqueezeExcite(planes, max(planes // 2, 64)) if use_se else None
        self.conv3 = ConvNorm(planes, planes * 4, 1, keep="input")

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        y = self.conv2(self.conv1(x))
        conv3 = self.conv3.conv
        if self.blur is not None and self.se is not None:
            blur = self.blur
            blurred = blur(y)
            gate = self.se.gate(blurred)
            y = conv_after(conv3, lambda y, gate: blur(y) * gate, y, gate, prepared=blurred * gate)
        elif self.blur is not None:
            y = conv_after(conv3, self.blur, y)
        elif self.se is not None:
            y = conv_after(conv3, torch.mul, y, self.se.gate(y))
        else:
            y = conv3(y)
        return F.relu_(self.conv3.norm(y).add_(shortcut))


def tresnet_m(num_classes: int = 1000) -> nn.Module:
    """TResNet-M (PAPERS: blocks 3, 4, 11, 3; basic then bottleneck; SE in the first three stages)."""
    layers: list[nn.Module] = [SpaceToDepth(4), ConvNorm(48, 64, 3, slope=1e-2)]
    ins = 64
    for stage, (planes, depth) in enumerate(zip((64, 128, 256, 512), (3, 4, 11, 3), strict=True)):
        for block in range(depth):
            stride = 2 if stage and not block else 1
            layers.append(Basic(ins, planes, stride) if stage < 2 else Bottleneck(ins, planes, stride, stage == 2))
            ins = planes if stage < 2 else planes * 4
    return nn.Sequential(*layers, GlobalPool("avg"), nn.Linear(ins, num_classes))
