"""The in-place norm's kernels, in Triton's interpreter, and their twins, against PyTorch's batch norm in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convscale.nn.kernels import norm as ops
from convscale.nn.kernels import norm_twin as twin

pytest.importorskip("triton")
SHAPES = [(3, 5, 7, 3), (2, 48, 4, 4), (1, 130, 3, 3), (5, 16, 1, 1), (2, 3, 33, 65)]
"""Odd channels and sizes, more channels than a block, planes larger than a block."""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
if os.environ.get("TRITON_INTERPRET") == "1":
    # The interpreter cuts float32 off where a card rounds it to the nearest bfloat16: an error of up to 2**-7.
    TOLERANCE[torch.bfloat16] = 8e-3


def parameters(channels: int) -> tuple[Tensor, Tensor]:
    """Weights from 1 to below what is inverted, of both signs; biases."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.empty(channels).uniform_(0.3, 1.0, generator=generator)
    weight[1::3] *= -1
    return weight, torch.empty(channels).uniform_(-0.5, 0.5, generator=generator)


def by_autograd(
    x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, slope: float | None, running: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, ...]:
    """Output and gradients in float64 by batch norm and leaky ReLU."""
    given = [value.detach().double().clone().requires_grad_() for value in (x, weight, bias)]
    stats = (None, None) if running is None else tuple(value.double() for value in running)
    y = F.batch_norm(given[0], *stats, given[1], given[2], running is None, 0.0, 1e-5)
    y = y if slope is None else F.leaky_relu(y, slope)
    return (y.detach(), *torch.autograd.grad(y, given, dy.double()))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def check(
    dtype: torch.dtype, shape: tuple[int, ...], layout: torch.memory_format, slope: float | None, batch: bool
) -> None:
    """Output and gradients of the operator stay within the type's rounding of float64 on the same rounded numbers."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 30).to(dtype)  # a mean that cancels
    x = x.contiguous(memory_format=layout)
    dy = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).contiguous(memory_format=layout)
    weight, bias = (value.to(torch.promote_types(dtype, torch.float32)) for value in parameters(shape[1]))
    running = None if batch else (torch.full_like(weight, 29.0), torch.full_like(weight, 3.0))
    y, mean, var = ops.norm_act(x, weight, bias, *(running or (None, None)), 1e-5, slope)
    expected, *gradients = by_autograd(x, weight, bias, dy, slope, running)
    assert y.stride() == x.stride()
    assert relative(y, expected) < TOLERANCE[dtype], (dtype, shape, layout, slope, batch, relative(y, expected))
    if batch:
        wide = x.double()
        assert relative(mean, wide.mean((0, 2, 3))) < 1e-6
        assert relative(var, wide.var((0, 2, 3), correction=0)) < 1e-5
    # The backward pass is given the output as float64 has it, rounded once: its own error is what is looked at.
    rounded = expected.to(dtype).contiguous(memory_format=layout)
    found = ops.norm_act_backward(rounded, dy, weight, bias, var, 1e-5, slope, batch)
    loose = 4 if dtype != torch.float32 else 8
    for name, mine, right in zip(("dx", "dweight", "dbias"), found, gradients, strict=True):
        assert relative(mine, right) < loose * TOLERANCE[dtype], name


def check_finish() -> None:
    """More slices than are taken at a time, more channels than a block: sums of all, and what is made of them."""
    from convscale.nn.kernels.launch import launch

    slices, channels, values = 150, 21, 700
    part = torch.rand(slices, 2, channels, generator=torch.Generator().manual_seed(0))
    part[:, 1] += 3  # squares, so that the variance is not negative
    sums = part.double().sum(0)
    shift, options = torch.linspace(-5, 5, channels), {"BS": 64, "BC": 16}
    one, two, three, four = (torch.empty(channels) for _ in range(4))
    sizes = (slices, values, channels)
    launch("finish_statistics", (2, 1), [part, shift], [one, two], sizes, **options)
    mean = sums[0] / values
    assert relative(one, mean + shift) < 1e-6
    assert relative(two, sums[1] / values - mean**2) < 1e-6
    for batch in (True, False):
        launch("finish_sums", (2, 1), [part], [one, two, three, four], sizes, USE_BATCH=batch, **options)
        assert relative(torch.stack([one, two]), sums) < 1e-6
        assert relative(torch.stack([three, four]) + 1, sums / values * batch + 1) < 1e-6


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("slope", [None, 1e-2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_twins_equal_float64(dtype: torch.dtype, layout: torch.memory_format, slope: float | None, batch: bool) -> None:
    for shape in SHAPES[:2]:
        check(dtype, shape, layout, slope, batch)


SCRIPT = """
import sys, torch
from tests.nn.kernels.test_norm import SHAPES, check, check_finish
from convscale.nn.kernels import norm_launch, norm_twin

def refuse(*_, **__):
    raise AssertionError("the twin was asked")

for name in ("statistics", "normalise", "backward"):
    setattr(norm_twin, name, refuse)
check_finish()
count = 0
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for layout in (torch.contiguous_format, torch.channels_last):
        for slope, batch in ((None, True), (1e-2, True), (1e-3, False)):
            every, few = (SHAPES, SHAPES[1:3]) if dtype is torch.float32 else (SHAPES[1:3], SHAPES[1:2])
            for shape in every if "every" in sys.argv or slope == 1e-2 else few:
                check(dtype, shape, layout, slope, batch)
                count += 1
print(count)
"""


@pytest.mark.parametrize(("which", "cases"), [("some", 34), pytest.param("every", 54, marks=pytest.mark.slow)])
def test_kernels_equal_float64_in_the_interpreter(which: str, cases: int) -> None:
    """In a process of its own: whether Triton interprets is decided when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CONVSCALE_KERNELS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, which],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == str(cases)


def test_small_weights_keep_gradients_bounded() -> None:
    """Below the smallest divisor the weight's gradient shrinks with |w|; the input's is exact while the output is."""
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dy = torch.randn(4, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight = torch.tensor([5e-4, 0.0, 1.0], dtype=torch.float64)
    bias = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
    y, _, var = ops.norm_act(x, weight, bias, None, None, 1e-5, None)
    _, dx, dweight, dbias = by_autograd(x, weight, bias, dy, None, None)
    mine = ops.norm_act_backward(y, dy, weight, bias, var, 1e-5, None, True)
    torch.testing.assert_close(mine[2], dbias)
    # |w| = 5e-4 over the divisor 1e-3: half of the gradient; at 0 none
    torch.testing.assert_close(mine[1], dweight * torch.tensor([0.5, 0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(mine[0][:, 2], dx[:, 2])
    assert mine[0][:, 1].abs().max() == 0


@pytest.mark.filterwarnings("ignore")  # opcheck looks at gradients of what is no leaf
def test_the_operator_is_as_pytorch_wants_it() -> None:
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    weight, bias = (value.requires_grad_() for value in parameters(4))
    torch.library.opcheck(ops.norm_act, (x, weight, bias, None, None, 1e-5, 0.01))
    running = (torch.zeros(4), torch.ones(4))
    torch.library.opcheck(ops.norm_act, (x, weight, bias, *running, 1e-5, None))


def test_compiled_it_keeps_one_map() -> None:
    """Behind a compiler the backward pass is given the output alone, where batch norm and leaky ReLU keep more."""
    saved: list[int] = []

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1, bias=False)
            self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            y = ops.norm_act(self.one(x), self.weight, self.bias, None, None, 1e-5, 0.01)[0]
            return self.two(y).square().mean()

    def pack(value: Tensor) -> Tensor:
        if value.dim() == 4 and value.shape[0] == 2:
            saved.append(value.numel())
        return value

    net, x = Pair(), torch.randn(2, 3, 6, 6)
    eager = net(x)
    expected = torch.autograd.grad(eager, list(net.parameters()))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        loss = torch.compile(net, backend="aot_eager", fullgraph=True)(x)
    for mine, right in zip(torch.autograd.grad(loss, list(net.parameters())), expected, strict=True):
        torch.testing.assert_close(mine, right)
    maps = sorted(count for count in saved)
    # the input, the norm's output (which the second convolution keeps as well), and the last map: no input of the norm
    assert maps == [2 * 3 * 36, 2 * 8 * 36, 2 * 8 * 36]


def test_each_twin_is_used_where_no_kernel_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVSCALE_KERNELS", "1")
    x = torch.randn(2, 3, 4, 4)
    mean, var = ops.statistics(x)  # no GPU, and no interpreter in this process
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(var, x.var((0, 2, 3), correction=0))
    assert twin.normalise(x, torch.zeros(3), torch.ones(3), torch.zeros(3), None).equal(x)
    assert Path(ops.__file__).name == "norm.py"


def test_a_card_takes_the_grid_of_any_map(monkeypatch: pytest.MonkeyPatch) -> None:
    from convscale.nn.kernels import blur, norm_launch

    grids = {}
    for module in (norm_launch, blur):
        monkeypatch.setattr(module, "launch", lambda name, grid, *_, **__: grids.update({name: grid}))
    x = torch.empty(168, 64, 112, 112, device="meta").contiguous(memory_format=torch.channels_last)
    one = torch.empty(64, device="meta")
    norm_launch.statistics(x)
    norm_launch.normalise(x, one, one, one, None)
    norm_launch.backward(x, x, one, one, one, None, True)
    blur.blur(x, 1)
    blur.backward(x, (112, 112), 1)
    assert grids["normalise_rows"] == grids["blur_gradient_rows"] == (65856, 1)
    assert len(grids) == 8
    assert all(grid[1] <= 65535 for grid in grids.values())
