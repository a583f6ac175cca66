"""The blur's kernels, in Triton's interpreter, against PyTorch's padding and convolution in float64; and in a trace."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from convscale.cost.kernels import OWN_KERNELS
from convscale.nn.kernels import blur as kernels
from convscale.nn.layers import BlurPool
from tests.cost.helpers import trace
from tests.nn.kernels.test_norm import TOLERANCE, relative

pytest.importorskip("triton")
SHAPES = [(2, 5, 7, 3), (1, 48, 4, 4), (2, 130, 2, 3), (1, 3, 33, 20), (3, 16, 5, 2)]
"""Odd channels and sizes, more channels than a block, the least sides that can be reflected, both ends one position."""


def check(dtype: torch.dtype, shape: tuple[int, ...], stride: int) -> None:
    """Output and gradient of a BlurPool within the type's rounding of float64 on the same rounded numbers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    y = BlurPool(stride)(x)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype)
    line = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64) / 4
    kernel = torch.outer(line, line).expand(shape[1], 1, 3, 3)
    wide = x.detach().double().requires_grad_()
    expected = F.conv2d(F.pad(wide, (1, 1, 1, 1), mode="reflect"), kernel, stride=stride, groups=shape[1])
    assert y.shape == expected.shape
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert relative(y, expected.detach()) < TOLERANCE[dtype], (dtype, shape, stride)
    (dx,) = torch.autograd.grad(y, x, dy)
    (right,) = torch.autograd.grad(expected, wide, dy.double())
    assert dx.is_contiguous(memory_format=torch.channels_last) or not kernels.takes(x, stride)
    assert relative(dx, right) < 2 * TOLERANCE[dtype], (dtype, shape, stride, "gradient")


SCRIPT = """
import torch
from convscale.nn.kernels import blur as kernels
from tests.nn.kernels.test_blur import SHAPES, check

launched = []
launch = kernels.launch

def counted(name, *args, **options):
    launched.append(name)
    launch(name, *args, **options)

kernels.launch = counted
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for stride in (1, 2):
        for shape in SHAPES:
            check(dtype, shape, stride)
print(len(launched), *sorted(set(launched)))
"""


def test_kernels_equal_float64_in_the_interpreter() -> None:
    """In a process of its own: whether Triton interprets is decided when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CONVSCALE_KERNELS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["60", "blur_gradient_rows", "blur_rows"]


@pytest.mark.parametrize("stride", [1, 2])
def test_without_kernels_it_is_pytorchs(monkeypatch: pytest.MonkeyPatch, stride: int) -> None:
    monkeypatch.setattr(kernels, "launch", lambda *_, **__: pytest.fail("a kernel was launched"))
    for shape in SHAPES:
        check(torch.float32, shape, stride)


@pytest.mark.parametrize(("layout", "stride", "taken"), [("nhwc", 2, True), ("nhwc", 3, False), ("nchw", 2, False)])
def test_in_a_trace(monkeypatch: pytest.MonkeyPatch, layout: str, stride: int, taken: bool) -> None:
    """Read once and written once, where padding copies the map, and turning it copies it again."""
    monkeypatch.setenv("CONVSCALE_KERNELS", "1")
    net = nn.Sequential(nn.Conv2d(3, 16, 1, bias=False), BlurPool(stride))
    traced = trace(net, 8, batch_size=2, mode="train", layout=layout, precision="amp")
    mine = [op for op in traced.operators if op.name in OWN_KERNELS]
    if not taken:
        assert mine == []
        return
    whole, small = 2 * 16 * 8 * 8 * 2, 2 * 16 * 4 * 4 * 2
    assert [(op.name, op.kind, op.phase, op.read_bytes, op.written_bytes) for op in mine] == [
        ("blur_rows", "pool", "forward", whole, small),
        ("blur_gradient_rows", "pool", "backward", small, whole),
    ]
    assert not any("pad" in op.name or op.groups > 1 for op in traced.operators)


def test_a_second_derivative_is_not_left_out() -> None:
    """The kernels have none of their own: where one is asked for, the backward pass is PyTorch's."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CONVSCALE_KERNELS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SECOND], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


SECOND = """
import torch
from convscale.nn.layers import BlurPool

x = torch.randn(1, 16, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
(dx,) = torch.autograd.grad(BlurPool(2)(x).pow(3).sum(), x, create_graph=True)
(second,) = torch.autograd.grad(dx.sum(), x)
assert second.abs().max() > 0.1
"""
