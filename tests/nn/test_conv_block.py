"""The block of one convolution, against the same written by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import convscale as cs
from convscale.arch.block import BlockSpec, SESpec
from convscale.arch.parts import IDENTITY, RELU, SILU, ActSpec, NormSpec
from convscale.nn.blocks import build_block


def block(act: ActSpec, *, skip: bool, norm: str = "batchnorm", drop_path: float = 0.0) -> nn.Module:
    spec = BlockSpec(kind="conv", width=8, activation=act, out_activation=IDENTITY, skip=skip)
    kind = NormSpec(kind="inplace" if norm == "inplace" else "batchnorm")
    return build_block(spec, 8, 1, norm=kind, padding="symmetric", drop_path=drop_path).double()


@pytest.mark.parametrize("norm", ["batchnorm", "inplace"])
@pytest.mark.parametrize("act", [RELU, SILU, IDENTITY, ActSpec(kind="leaky_relu"), ActSpec(kind="hardswish")])
@pytest.mark.parametrize("skip", [True, False])
def test_outputs_and_gradients(act: ActSpec, skip: bool, norm: str) -> None:
    torch.manual_seed(0)
    ours = block(act, skip=skip, norm=norm)
    conv = ours.conv1.conv
    bn = nn.BatchNorm2d(8).double()
    functions = {
        "relu": torch.relu,
        "silu": nn.functional.silu,
        "identity": lambda x: x,
        "leaky_relu": lambda x: nn.functional.leaky_relu(x, 0.01),
        "hardswish": nn.functional.hardswish,
    }
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = functions[act.kind](bn(nn.functional.conv2d(b, conv.weight, padding=1)))
    expected = b + y if skip else y
    got = ours(a)
    weights = torch.randn_like(expected)
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.allclose(got, expected, atol=1e-12)
    assert torch.allclose(a.grad, b.grad, atol=1e-12)


@pytest.mark.parametrize("kind", ["conv", "aggregated"])
@pytest.mark.parametrize("norm", ["batchnorm", "inplace"])
@pytest.mark.parametrize("act", ["relu", "leaky_relu", "identity"])
def test_a_second_activation_leaves_what_the_first_kept(kind: str, norm: str, act: str) -> None:
    torch.manual_seed(0)
    more = {"downsample": "depthwise", "layers": 1} if kind == "aggregated" else {}
    first, last = ActSpec(kind=act), ActSpec(kind="leaky_relu", slope=0.01)
    spec = BlockSpec(kind=kind, width=8, activation=first, out_activation=last, skip=False, **more)
    made = build_block(spec, 8, 1, norm=NormSpec(kind=norm), padding="symmetric", drop_path=0.0)
    twin = build_block(spec, 8, 1, norm=NormSpec(kind="batchnorm"), padding="symmetric", drop_path=0.0)
    twin.load_state_dict(made.state_dict())
    twin.after = nn.Identity()
    x = torch.randn(2, 8, 5, 5)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    made(a).square().sum().backward()
    nn.functional.leaky_relu(twin(b).clone(), 0.01).square().sum().backward()
    assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-4)


def test_it_drops_whole_samples() -> None:
    torch.manual_seed(0)
    net = block(RELU, skip=True, drop_path=0.5).train()
    x = torch.rand(64, 8, 3, 3, dtype=torch.float64)
    kept = [(not torch.equal(out, before)) for out, before in zip(net(x), x, strict=True)]
    assert 10 < sum(kept) < 54


def test_what_it_has_no_use_for_is_refused() -> None:
    with pytest.raises(cs.UserError, match=r"BlockSpec\.se is .*; it must be None for a conv block"):
        BlockSpec(kind="conv", width=8, se=SESpec())
    with pytest.raises(cs.UserError, match="one size, and no splits, for a conv block"):
        BlockSpec(kind="conv", width=8, kernels=(3, 5))
    with pytest.raises(cs.UserError, match="None for a conv block, which has no groups"):
        BlockSpec(kind="conv", width=8, group_width=4)
    with pytest.raises(cs.UserError, match=r"BlockSpec.inner_ratio is 2.0; it must be 1.0 for a conv block"):
        BlockSpec(kind="conv", width=8, inner_ratio=2.0)
