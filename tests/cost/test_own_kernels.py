"""This library's own kernels in a trace: their launches, with the bytes of their own loads and stores; and what they
make of TResNet-M.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from convscale.arch.zoo import get_spec
from convscale.conditions import Conditions
from convscale.cost.counting import cost_of
from convscale.cost.fusion import launched_kernels
from convscale.cost.kernels import OWN_KERNELS, Kernel
from convscale.cost.subject import pass_key
from convscale.cost.trace import Trace
from convscale.nn.kernels import norm as ops
from convscale.nn.net import create_model
from convscale.nn.norm import InPlaceABN
from tests.cost.helpers import trace

STEPS = ["statistics", "normalise", "sums", "gradient"]
"""Launches that go over maps; after the first and the third one puts the sums of slices together."""


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVSCALE_KERNELS", "1")


class Pair(nn.Module):
    """A convolution to 16 channels and an in-place norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), InPlaceABN(16, activation="leaky_relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Direct(Pair):
    """The same by the operator that a compiler sees."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.norm_act(self.conv(x), self.norm.weight, self.norm.bias, None, None, 1e-5, 0.01)[0]


@pytest.mark.usefixtures("on")
@pytest.mark.parametrize(("precision", "size"), [("amp", 2), ("fp32", 4)])
@pytest.mark.parametrize(("layout", "form"), [("nhwc", "rows"), ("nchw", "planes")])
@pytest.mark.parametrize("net", [Pair, Direct])
def test_launches_by_hand(net: type[Pair], layout: str, form: str, precision: str, size: int) -> None:
    """With maps of half precision 6 bytes an element forward and 10 backward, beside vectors in float32."""
    traced = trace(net(), 8, batch_size=2, mode="train", layout=layout, precision=precision)
    every = [op for op in traced.operators if op.name in OWN_KERNELS]
    assert [op.name for op in every if op.name.startswith("finish")] == ["finish_statistics", "finish_sums"]
    assert every[1].inputs[0] == every[0].outputs[0], "what slices gave"
    assert every[4].inputs == every[3].outputs
    mine = [op for op in every if not op.name.startswith("finish")]
    assert [(op.name, op.kind) for op in mine] == [(f"{step}_{form}", "norm") for step in STEPS]
    assert [op.phase for op in mine] == ["forward", "forward", "backward", "backward"]
    whole, vector = 2 * 16 * 8 * 8 * size, 16 * 4
    assert [op.read_bytes for op in mine] == [
        whole + vector,
        whole + 3 * vector,
        2 * whole + 2 * vector,
        2 * whole + 5 * vector,
    ]
    assert [mine[1].written_bytes, mine[3].written_bytes] == [whole, whole]
    assert all(op.written_bytes % (2 * vector) == 0 for op in (mine[0], mine[2])), "two sums a slice"
    in_place = mine[1].inputs[0].storage == mine[1].outputs[0].storage
    assert in_place == (net is Pair)
    assert not traced.unsupported
    assert not any("batch_norm" in op.name for op in traced.operators)


@pytest.mark.usefixtures("on")
def test_rows_of_the_predictor() -> None:
    """Eager or compiled, every launch is a row that reads and writes once; a compiler joins nothing to it."""
    traced = trace(Pair(), 8, batch_size=2, mode="train", layout="nhwc", precision="amp")
    whole = 2 * 16 * 8 * 8 * 2
    for compiled in (False, True):
        rows = [k for k in launched_kernels(traced, compiled=compiled) if k.in_bytes >= whole and "norm" in k.kind]
        assert [(k.kind, k.phase) for k in rows] == [("batch_norm", "forward")] * 2 + [("batch_norm", "backward")] * 2
        assert [(k.in_bytes // whole, k.out_bytes // whole) for k in rows] == [(1, 0), (1, 1), (2, 0), (2, 1)]
        assert all(k.nhwc and k.channels == 16 for k in rows)


def test_they_are_off_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONVSCALE_KERNELS", raising=False)
    usual = trace(Pair(), 8, batch_size=2, mode="train")
    assert not any(op.name in OWN_KERNELS for op in usual.operators)
    assert sum(op.name == "native_batch_norm" for op in usual.operators) == 2
    spec, conditions = get_spec("tresnet_m"), Conditions(image_size=224)
    key = pass_key("trace", spec, conditions)
    monkeypatch.setenv("CONVSCALE_KERNELS", "0")
    assert trace(Pair(), 8, batch_size=2, mode="train") == usual
    assert pass_key("trace", spec, conditions) == key
    monkeypatch.setenv("CONVSCALE_KERNELS", "1")
    assert trace(Pair(), 8, batch_size=2) == trace(Pair(), 8, batch_size=2)
    assert pass_key("trace", spec, conditions) != key, "what was kept without kernels is not read with them"


def moved(kernel: Kernel) -> int:
    """Bytes that a kernel moves: a batch norm that makes statistics reads its maps for them and again to use them."""
    again = kernel.in_bytes if kernel.kind == "batch_norm_train" else 0
    return kernel.in_bytes + kernel.out_bytes + kernel.weight_bytes + again


def tresnet(norm: str) -> Trace:
    with torch.device("meta"):
        net = create_model("tresnet_m", norm=norm)
    return trace(net, 224, 256, mode="train", precision="bf16", layout="nhwc")


def test_tresnet_m_trains_at_batch_norms_bytes_and_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVSCALE_KERNELS", "0")
    plain, before = tresnet("batchnorm"), tresnet("inplace")
    monkeypatch.setenv("CONVSCALE_KERNELS", "1")
    mine = tresnet("inplace")
    bytes_of = {
        name: sum(map(moved, launched_kernels(t))) for name, t in zip("pbm", (plain, before, mine), strict=True)
    }
    saved = {name: cost_of(t).saved_bytes for name, t in zip("pbm", (plain, before, mine), strict=True)}
    assert bytes_of["b"] > 1.5 * bytes_of["p"]
    assert bytes_of["m"] <= 1.10 * bytes_of["p"]
    assert saved["m"] <= 0.75 * saved["p"]
    assert saved["m"] == pytest.approx(saved["b"], rel=0.01)
    assert len(launched_kernels(mine)) < 1.6 * len(launched_kernels(plain)), "few launches over vectors beside maps"
