"""Networks whose in-place norms run in kernels, or as one operator behind a compiler: same steps, same memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from convscale.nn.norm import InPlaceABN

pytest.importorskip("triton")

SCRIPT = """
import os, sys, torch
import convscale as cs
from convscale.nn.kernels import norm as ops

torch.manual_seed(0)
STEPS = int(sys.argv[1])
LAYOUTS = (torch.channels_last, torch.contiguous_format)[: int(sys.argv[2])]
spec = cs.scale("tresnet_m", width=0.125, depth=0.3, image_size=32)
start = cs.create_model(spec, num_classes=5).state_dict()
x, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
count = 0

def counted(function):
    def call(*args, **options):
        global count
        count += 1
        return function(*args, **options)
    return call

ops.norm_launch.backward = counted(ops.norm_launch.backward)

def steps(on, layout):
    os.environ["CONVSCALE_KERNELS"] = "1" if on else "0"
    net = cs.create_model(spec, num_classes=5).train().to(memory_format=layout)
    net.load_state_dict(start)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        loss = torch.nn.functional.cross_entropy(net(x.contiguous(memory_format=layout)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, net

for layout in LAYOUTS:
    plain, first = steps(False, layout)
    assert count == 0
    mine, second = steps(True, layout)
    assert count > 0
    count = 0
    torch.testing.assert_close(torch.tensor(mine), torch.tensor(plain), rtol=2e-4, atol=0)
    for (name, one), two in zip(first.named_buffers(), second.buffers()):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4, msg=name)
print("same")
"""


@pytest.mark.parametrize(("steps", "layouts"), [(2, 1), pytest.param(5, 2, marks=pytest.mark.slow)])
def test_a_small_tresnet_takes_the_same_steps(steps: int, layouts: int) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(steps), str(layouts)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "same"


class Net(nn.Module):
    """Convolutions with in-place norms between them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1, bias=False), InPlaceABN(8, activation="leaky_relu", slope=1e-2)),
            *(nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), InPlaceABN(16, activation="leaky_relu")),
            *(nn.Conv2d(16, 16, 1, bias=False), InPlaceABN(16)),
        )
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def step(net: nn.Module, call: nn.Module, x: Tensor) -> tuple[float, int, list[Tensor]]:
    """Loss, bytes kept for the backward pass, gradients."""
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        if value.dim() == 4 and value.shape[0] == len(x):
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        loss = call(x).square().mean()
    return float(loss.detach()), sum(kept.values()), list(torch.autograd.grad(loss, list(net.parameters())))


def test_compiled_it_keeps_what_eager_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    eager = Net().train()
    monkeypatch.setenv("CONVSCALE_KERNELS", "1")
    operator = Net().train()
    monkeypatch.setenv("CONVSCALE_KERNELS", "0")
    plain = Net().train()
    for other in (operator, plain):
        other.load_state_dict(eager.state_dict())
    loss, kept, gradients = step(eager, eager, x)
    found = step(operator, torch.compile(operator, backend="aot_eager", fullgraph=True), x)  # type: ignore[arg-type]
    without = step(plain, torch.compile(plain, backend="aot_eager", fullgraph=True), x)  # type: ignore[arg-type]
    assert found[0] == pytest.approx(loss, rel=1e-6)
    for mine, right in zip(found[2], gradients, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-6)
    for mine, right in zip(operator.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(mine, right)
    assert found[1] <= 1.02 * kept
    assert without[1] > 1.5 * kept, "a compiler that sees batch norm and leaky ReLU keeps more"
