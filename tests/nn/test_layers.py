"""The small layers against hand calculation, torch's own operations and timm."""

from __future__ import annotations

import copy

import pytest
import timm.layers
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convscale import UserError
from convscale.nn.activations import activation
from convscale.nn.layers import (
    BlurPool,
    DropPath,
    GlobalPool,
    MixedConv2d,
    SameConv2d,
    SpaceToDepth,
    SqueezeExcite,
    conv2d,
    same_padding,
    split_channels,
)


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- activations
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("identity", {-2.0: -2.0, 3.0: 3.0}),
        ("relu", {-2.0: 0.0, 3.0: 3.0}),
        ("relu6", {-2.0: 0.0, 3.0: 3.0, 8.0: 6.0}),
        ("leaky_relu", {-2.0: -0.5, 3.0: 3.0}),
        ("silu", {-2.0: -2 / (1 + torch.e**2), 3.0: 3 / (1 + torch.e**-3)}),
        ("hardswish", {-2.0: -2 / 6, 1.0: 4 / 6, 4.0: 4.0}),
        ("hardsigmoid", {-4.0: 0.0, 0.0: 0.5, 1.5: 0.75}),
        ("sigmoid", {0.0: 0.5, 1.0: 1 / (1 + torch.e**-1)}),
    ],
)
@pytest.mark.parametrize("inplace", [True, False])
def test_activation_values(name: str, at: dict[float, float], inplace: bool) -> None:
    x = torch.tensor(list(at))
    assert torch.allclose(activation(name, slope=0.25, inplace=inplace)(x), torch.tensor(list(at.values())), atol=1e-6)


def test_unknown_activation() -> None:
    with pytest.raises(UserError, match=r"activation 'hard_swish' is unknown \(nearest: hardswish"):
        activation("hard_swish")


# --- convolutions
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "expected"),
    [
        (224, 3, 2, (0, 1)),
        (225, 3, 2, (1, 1)),
        (7, 5, 2, (2, 2)),
        (8, 5, 2, (1, 2)),
        (5, 3, 1, (1, 1)),
        (4, 1, 2, (0, 0)),
    ],
)
def test_same_padding_is_tensorflows(size: int, kernel: int, stride: int, expected: tuple[int, int]) -> None:
    """By TensorFlow's stated rule: out = ceil(in / stride), total = (out - 1) * stride + kernel - in, the odd one
    after.
    """
    assert same_padding(size, kernel, stride) == expected


@pytest.mark.parametrize("size", [8, 9, 13])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"),
    [(3, 1, 1), (3, 2, 1), (5, 2, 1), (7, 2, 1), (3, 1, 2), (3, 2, 2), (2, 1, 1), (1, 2, 1)],
)
def test_same_convolution_equals_timms(size: int, kernel: int, stride: int, dilation: int) -> None:
    ours = conv2d(4, 6, kernel, stride=stride, groups=2, padding="same", dilation=dilation, bias=True)
    theirs = timm.layers.create_conv2d(
        4, 6, kernel, stride=stride, groups=2, padding="same", dilation=dilation, bias=True
    )
    theirs.load_state_dict(ours.state_dict())
    x = seeded(2, 4, size, size + 1)
    assert torch.equal(ours(x), theirs(x))
    assert (type(ours) is nn.Conv2d) == (stride == 1 and dilation * (kernel - 1) % 2 == 0)
    assert ours(x).shape[2:] == (-(-size // stride), -(-(size + 1) // stride))


def test_conv2d_symmetric() -> None:
    conv = conv2d(4, 8, 5, stride=2, groups=4, dilation=2)
    assert type(conv) is nn.Conv2d
    assert (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.bias) == (
        (5, 5),
        (2, 2),
        (4, 4),
        (2, 2),
        4,
        None,
    )
    with pytest.raises(UserError, match=r"padding 'valid' is unknown \(.*symmetric"):
        conv2d(4, 4, 3, padding="valid")
    with pytest.raises(UserError, match="got 3 groups for 4 -> 6 channels"):
        conv2d(4, 6, 3, groups=3)


@pytest.mark.parametrize("depthwise", [True, False])
@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize(("ins", "kernels"), [(22, (3, 5, 7)), (20, (3, 5, 7, 9)), (9, (1, 1))])
def test_mixed_convolution_equals_timms(depthwise: bool, padding: str, ins: int, kernels: tuple[int, ...]) -> None:
    outs = ins if depthwise else 2 * ins + 1
    ours = MixedConv2d(ins, outs, kernels, stride=2, depthwise=depthwise, padding=padding)
    theirs = timm.layers.MixedConv2d(
        ins, outs, list(kernels), stride=2, depthwise=depthwise, padding="same" if padding == "same" else ""
    )
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    theirs.load_state_dict(ours.state_dict())
    x = seeded(2, ins, 9, 8)
    assert torch.equal(ours(x), theirs(x))
    assert list(dict(ours.named_children())) == [str(i) for i in range(len(kernels))]


def test_split_channels() -> None:
    assert split_channels(22, 3) == [8, 7, 7]  # by hand: 7 each, the first takes the one that is left
    with pytest.raises(UserError, match="2 channels can't be split over 3 kernels"):
        split_channels(2, 3)


# --- space to depth, blur
# --------------------------------------------------------------------------------------------------------------


def test_space_to_depth_order() -> None:
    """One entry per channel by the formula of the paper's code: channel (row * 4 + column) * C + c holds pixel (4 i +
    row, 4 j + column).
    """
    x = torch.arange(2 * 3 * 8 * 12, dtype=torch.float32).view(2, 3, 8, 12)
    y = SpaceToDepth(4)(x)
    assert y.shape == (2, 48, 2, 3)
    for row in range(4):
        for column in range(4):
            for c in range(3):
                assert torch.equal(y[:, (row * 4 + column) * 3 + c], x[:, c, row::4, column::4])
    assert torch.equal(y, timm.layers.SpaceToDepth(4)(x))


def test_space_to_depth_is_a_strided_convolution() -> None:
    """The docstring's formula, which lets a runtime without it use one convolution."""
    conv = nn.Conv2d(48, 5, 3, padding=1, bias=False).double()
    b, c, v = 4, 3, conv.weight.detach()
    weight = torch.zeros(5, c, 12, 12).double()
    for i in range(b):
        for j in range(b):
            for ch in range(c):
                weight[:, ch, i::b, j::b] = v[:, (i * b + j) * c + ch]
    x = seeded(2, 3, 16, 12, dtype=torch.float64)
    assert torch.allclose(F.conv2d(x, weight, stride=4, padding=4), conv(SpaceToDepth(4)(x)), atol=1e-12)


def test_space_to_depth_refuses_other_sizes() -> None:
    with pytest.raises(UserError, match="must be multiples of 4, got 18 x 16"):
        SpaceToDepth(4)(torch.zeros(1, 3, 18, 16))


def test_blur_by_hand() -> None:
    """A single 16 in the middle gives the kernel itself at stride 1; a reflected edge counts its neighbour twice."""
    x = torch.zeros(1, 1, 5, 5)
    x[0, 0, 2, 2] = 16
    assert torch.equal(BlurPool(1)(x)[0, 0, 1:4, 1:4], torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]))
    ramp = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    assert torch.equal(BlurPool(2)(ramp)[0, 0, 0], torch.tensor([0.5, 2.0]))  # (2 * 0 + 1 + 1) / 4; (1 + 2 * 2 + 3) / 4


def plain_blur(x: Tensor, stride: int) -> Tensor:
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]], dtype=x.dtype).div(16).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, stride=stride, groups=x.shape[1])


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("height", "width"), [(2, 2), (2, 3), (3, 3), (4, 7), (13, 8)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_blur_equals_the_plain_operations(stride: int, height: int, width: int, layout: torch.memory_format) -> None:
    x = seeded(2, 3, height, width, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    ours, theirs = BlurPool(stride).double()(x), plain_blur(twin, stride)
    dy = seeded(*ours.shape, seed=1, dtype=torch.float64)
    ours.backward(dy), theirs.backward(dy)
    assert torch.allclose(ours, theirs, atol=1e-14)
    assert torch.allclose(x.grad, twin.grad, atol=1e-14)


@pytest.mark.parametrize(("height", "width"), [(2, 3), (4, 5)])
def test_blur_gradcheck(height: int, width: int) -> None:
    x = seeded(1, 2, height, width, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(BlurPool().double(), x)
    assert torch.autograd.gradgradcheck(BlurPool().double(), x)


def saved_shapes(function, *inputs: Tensor) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        function(*inputs)
    return shapes


def test_blur_keeps_no_map_and_no_state() -> None:
    blur = BlurPool()
    assert list(blur.state_dict()) == []
    assert blur.kernel.numel() == 9
    assert saved_shapes(blur, seeded(2, 64, 8, 8).requires_grad_()) == [(1, 1, 3, 3)]


def test_blur_refuses_a_side_of_one() -> None:
    with pytest.raises(UserError, match="at least 2 x 2, got 1 x 4: use a larger image"):
        BlurPool()(torch.zeros(1, 3, 1, 4))


def test_blur_survives_meta_and_half() -> None:
    with torch.device("meta"):
        blur = BlurPool()
    blur.to_empty(device="cpu")
    x = seeded(1, 2, 5, 5)
    assert torch.equal(blur(x), BlurPool()(x))
    half = BlurPool().half()(x.half())
    assert half.dtype == torch.float16
    assert torch.allclose(half.float(), plain_blur(x, 2), atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blur_under_autocast_keeps_the_maps_type(dtype: torch.dtype) -> None:
    for map_dtype in (dtype, torch.float32):
        x = seeded(2, 3, 6, 6, dtype=map_dtype).requires_grad_()
        with torch.autocast("cpu", dtype):
            y = BlurPool()(x)
        y.sum().backward()
        assert y.dtype == x.grad.dtype == map_dtype
        assert torch.allclose(y.float(), plain_blur(x.detach().float(), 2), atol=0.02)


# --- pooling, attention, drop path
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["avg", "max", "avgmax", "catavgmax", ""])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_global_pool_equals_timms(kind: str, layout: torch.memory_format) -> None:
    x = seeded(2, 5, 7, 4).contiguous(memory_format=layout).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    theirs = timm.layers.SelectAdaptivePool2d(pool_type=kind, flatten=bool(kind))
    a, b = GlobalPool(kind)(x), theirs(twin)
    assert torch.allclose(a, b, atol=1e-6)
    a.square().sum().backward(), b.square().sum().backward()
    assert torch.allclose(x.grad, twin.grad, atol=1e-5)
    assert GlobalPool(kind).feat_mult() == theirs.feat_mult()


def test_global_pool_keeps_no_map() -> None:
    for kind in ("avg", "max", "avgmax", "catavgmax"):
        assert not [
            s for s in saved_shapes(GlobalPool(kind), seeded(2, 5, 7, 4).requires_grad_()) if 7 * 4 in s or 7 in s
        ]
    with pytest.raises(UserError, match=r"global_pool 'average' is unknown"):
        GlobalPool("average")


@pytest.mark.parametrize("gate", ["sigmoid", "hardsigmoid"])
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_squeeze_excite_equals_timms(gate: str, act: str) -> None:
    ours = SqueezeExcite(8, 3, activation=act, gate=gate)
    theirs = timm.layers.SqueezeExcite(
        8, rd_channels=3, act_layer=act, gate_layer="hard_sigmoid" if gate == "hardsigmoid" else gate
    )
    theirs.fc1.load_state_dict(ours.reduce.state_dict())
    theirs.fc2.load_state_dict(ours.expand.state_dict())
    x = seeded(2, 8, 5, 6)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    assert ours.gate(x).shape == (2, 8, 1, 1)
    assert torch.equal(ours(x), x * ours.gate(x))
    assert saved_shapes(ours, x.requires_grad_()).count((2, 8, 5, 6)) == 1  # x, for the product alone
    assert saved_shapes(ours.gate, x).count((2, 8, 5, 6)) == 0


def test_squeeze_excite_arguments() -> None:
    assert SqueezeExcite(8, 3, bias=False).expand.bias is None
    with pytest.raises(UserError, match="gate 'tanh' is unknown"):
        SqueezeExcite(8, 3, gate="tanh")


def test_drop_path() -> None:
    x = torch.ones(4000, 2, 1, 1).requires_grad_()
    drop = DropPath(0.25)
    torch.manual_seed(0)
    y = drop(x)
    assert set(y.detach().flatten().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.equal(y[:, 0], y[:, 1])  # whole samples
    assert y.mean().item() == pytest.approx(1.0, abs=0.03)  # 4 standard errors: sqrt(1 / 3 / 4000)
    assert saved_shapes(drop, x) == [(4000, 1, 1, 1)]
    assert drop.eval()(x) is x
    assert DropPath(0.0)(x) is x
    with pytest.raises(UserError, match=r"drop_path_rate must be in \[0, 1\), got 1.0"):
        DropPath(1.0)


# --- compile and export
# --------------------------------------------------------------------------------------------------------------


def everything() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        SpaceToDepth(2),
        conv2d(12, 10, 3, stride=2, padding="same"),
        SqueezeExcite(10, 4),
        BlurPool(),
        MixedConv2d(10, 10, (3, 5), stride=1, depthwise=True, padding="same"),
        GlobalPool("catavgmax"),
        DropPath(0.0),
    )


@pytest.mark.parametrize("training", [pytest.param(True, marks=pytest.mark.slow), False])
def test_compiles_without_a_graph_break(training: bool) -> None:
    net = everything().train(training)
    compiled = torch.compile(copy.deepcopy(net), backend="aot_eager", fullgraph=True)
    x = seeded(2, 3, 30, 26)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours, theirs = compiled(a), net(b)
    ours.square().sum().backward(), theirs.square().sum().backward()
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert torch.allclose(a.grad, b.grad, atol=1e-5)
    for p, q in zip(compiled.parameters(), net.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-4)


def test_exports_with_a_dynamic_batch() -> None:
    net = everything().eval()
    program = torch.export.export(net, (seeded(2, 3, 30, 26),), dynamic_shapes=({0: torch.export.Dim("n", min=1)},))
    for count in (1, 5):
        x = seeded(count, 3, 30, 26, seed=count)
        assert torch.allclose(program.module()(x), net(x), atol=1e-6)


def test_same_convolution_follows_the_size_when_compiled() -> None:
    conv = conv2d(3, 4, 3, stride=2, padding="same")
    assert isinstance(conv, SameConv2d)
    compiled = torch.compile(conv, backend="aot_eager", fullgraph=True)
    for size in (8, 9, 11, 12):
        x = seeded(1, 3, size, size)
        assert torch.allclose(compiled(x), conv(x), atol=1e-6)
