"""One pass that computes nothing: against hand counts, torch's own counter, and what the module was before."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from convscale.cost.operators import autocast_policy, kind_of
from convscale.cost.trace import Trace
from convscale.errors import UserError
from tests.cost.helpers import trace

ZOO = [
    *(f"tresnet_{v}" for v in ("m", "l", "xl", "v2_l")),
    *(f"efficientnet_b{i}" for i in range(8)),
    *(f"tf_efficientnet_b{i}" for i in range(8)),
    *(f"tf_efficientnet_lite{i}" for i in range(5)),
    *(f"resnet{n}" for n in (18, 34, 50, 101, 152, 200)),
    *(
        "resnet50d",
        "resnet101d",
        "resnet152d",
        "resnext50_32x4d",
        "resnext101_32x8d",
        "seresnext50_32x4d",
        "wide_resnet50_2",
    ),
    *(
        "mobilenetv1_100",
        "mobilenetv2_050",
        "mobilenetv2_100",
        "mobilenetv2_140",
        "mnasnet_100",
        "mixnet_s",
        "mixnet_m",
        "mixnet_l",
    ),
]


class Small(nn.Module):
    """3 -> 8 channels, norm, ReLU in place, mean, linear to 10."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.norm(self.conv(x))).mean((2, 3)))


def kinds(traced: Trace, phase: str = "forward") -> list[str]:
    return [operator.kind for operator in traced.operators if operator.phase == phase]


def test_operators_by_hand() -> None:
    traced = trace(Small(), 32, batch_size=2)
    assert [(op.name, op.kind, op.scope) for op in traced.operators] == [
        ("convolution", "conv", "conv"),
        ("native_batch_norm", "norm", "norm"),
        ("relu", "pointwise", "act"),
        ("mean", "reduce", ""),
        ("addmm", "linear", "head"),
    ]
    conv, norm, relu, mean, head = traced.operators
    assert conv.macs == 2 * 8 * 16 * 16 * 27
    assert conv.read_bytes == 4 * (2 * 3 * 32 * 32 + 8 * 27)
    assert conv.written_bytes == 4 * 2 * 8 * 16 * 16
    assert (conv.kernel, conv.stride, conv.groups, conv.bias) == ((3, 3), (2, 2), 1, False)
    assert norm.read_bytes == 4 * (2 * 8 * 16 * 16 + 4 * 8)
    assert relu.inputs[0].storage == relu.outputs[0].storage  # in place
    assert (mean.read_bytes, mean.written_bytes) == (4 * 2 * 8 * 256, 4 * 2 * 8)
    assert head.macs == 2 * 8 * 10
    assert traced.params == 8 * 27 + 16 + 90


def test_amp_casts_as_cuda_autocast_does() -> None:
    traced = trace(Small(), 32, batch_size=2, precision="amp")
    assert kinds(traced) == ["cast", "cast", "conv", "norm", "pointwise", "reduce", "cast", "cast", "linear"]
    image, weight = traced.operators[:2]
    assert (image.read_bytes, image.written_bytes) == (4 * 2 * 3 * 32 * 32, 2 * 2 * 3 * 32 * 32)
    assert (weight.read_bytes, weight.written_bytes) == (4 * 8 * 27, 2 * 8 * 27)
    assert traced.operators[2].outputs[0].itemsize == 2
    assert traced.operators[3].read_bytes == 2 * 2 * 8 * 256 + 4 * 4 * 8  # half map, float statistics


@pytest.mark.parametrize(
    ("name", "policy"), [("conv2d", "low"), ("linear", "low"), ("softmax", "full"), ("cat", "widest"), ("relu", "none")]
)
def test_autocast_policy(name: str, policy: str) -> None:
    assert autocast_policy(name) == policy


def test_softmax_and_layer_norm_run_in_full_precision_under_amp() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.norm = nn.LayerNorm(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.conv(x).permute(0, 2, 3, 1)).softmax(-1)

    by_name = {op.name: op for op in trace(Net(), 8, precision="amp").operators}
    assert by_name["convolution"].outputs[0].itemsize == 2
    assert by_name["native_layer_norm"].inputs[0].itemsize == 4
    assert by_name["_softmax"].outputs[0].itemsize == 4


def test_training_has_both_gradients_and_the_update() -> None:
    traced = trace(Small(), 32, batch_size=2, mode="train")
    convs = [op for op in traced.operators if op.kind == "conv"]
    assert [op.product for op in convs] == ["", "weight"]  # the image needs no gradient
    assert convs[1].macs == convs[0].macs
    assert [op.written_bytes for op in convs[1:]] == [4 * 8 * 27]
    linears = [op for op in traced.operators if op.kind == "linear"]
    assert [op.product for op in linears] == ["", "input", "weight"]
    assert [op.macs for op in linears] == [160] * 3  # forward, and backward for the input and the weight
    updates = [op for op in traced.operators if op.kind == "update"]
    assert len(updates) == 5
    assert sum(op.read_bytes for op in updates) == 3 * 4 * traced.params


def test_the_module_and_the_generators_are_left_as_they_were() -> None:
    net = Small()
    net.norm.eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    flags = [module.training for module in net.modules()]
    addresses = [p.data_ptr() for p in net.parameters()]
    torch.manual_seed(3)
    random.seed(3)
    expected = (torch.rand(1), random.random())
    torch.manual_seed(3)
    random.seed(3)
    trace(net, 32, mode="train")
    assert (torch.rand(1), random.random()) == expected
    assert [module.training for module in net.modules()] == flags
    assert [p.data_ptr() for p in net.parameters()] == addresses
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in before.items())
    assert not net._forward_hooks
    assert not nn.modules.module._global_forward_hooks


def test_a_net_on_the_meta_device_costs_the_same() -> None:
    with torch.device("meta"):
        meta = Small()
    assert trace(meta, 32).operators == trace(Small(), 32).operators


def test_channels_last_shows_in_the_operators() -> None:
    conv = trace(Small(), 32, layout="nhwc").operators[0]
    assert conv.inputs[0].channels_last
    assert conv.outputs[0].channels_last
    assert not trace(Small(), 32).operators[0].inputs[0].channels_last


def test_grouped_and_transposed_convolutions_by_hand() -> None:
    assert trace(nn.Conv2d(8, 16, 3, padding=1, groups=4), 10, channels=8).operators[0].macs == 16 * 100 * 2 * 9
    assert trace(nn.ConvTranspose2d(8, 16, 2, stride=2), 10, channels=8).operators[0].macs == 8 * 100 * 16 * 4


def test_tensors_that_are_no_parameters() -> None:
    class Blur(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.taps = torch.ones(3, 1, 3, 3) / 9  # neither parameter nor buffer, on the CPU

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.conv2d(x, self.taps, groups=3)

    assert trace(Blur(), 8).operators[0].macs == 3 * 36 * 9


def test_scripted_modules() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated; networks that use it are still about
        scripted = torch.jit.script(nn.Conv2d(3, 4, 3, bias=False))
    net = nn.Sequential(scripted, nn.ReLU())
    assert sum(op.macs for op in trace(net, 8).operators) == 36 * 3 * 9 * 4


def test_a_module_that_takes_gray_images() -> None:
    traced = trace(nn.Sequential(nn.Conv2d(1, 4, 3, bias=False)), 8)
    assert sum(op.macs for op in traced.operators) == 36 * 1 * 9 * 4


def test_an_unknown_operator_is_reported_not_dropped() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.i0e(torch.fft.fft(x).real)

    traced = trace(Odd(), 8)
    assert any("fft" in name for name in traced.unsupported)
    assert any(op.kind == "unknown" and op.read_bytes == 4 * 3 * 64 for op in traced.operators)


def test_what_needs_values_is_an_error_that_names_the_operator() -> None:
    class Asks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(UserError, match=r"Asks can not be traced at 8x8 px: operator .*_local_scalar_dense"):
        trace(Asks(), 8)
    with pytest.raises(UserError, match="Conv2d can not be traced"):
        trace(nn.Conv2d(4, 4, 3), 8, channels=3)


def test_kinds() -> None:
    aten = torch.ops.aten
    assert kind_of(aten.silu_.default) == "pointwise"
    assert kind_of(aten.view.default) == "view"
    assert kind_of(aten.permute.default) == "view"
    assert kind_of(aten.hardswish_backward.default) == "pointwise"
    assert kind_of(aten.max_pool2d_with_indices_backward.default) == "pool"
    assert kind_of(aten.fft_fft.default) == "unknown"


def peer_macs(net: nn.Module, size: int) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net.eval()(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() / 2


def check_against_peer(name: str) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        net = timm.create_model(name)
    size = net.pretrained_cfg["input_size"][-1]
    traced = trace(net, size)
    assert sum(op.macs for op in traced.operators) == pytest.approx(peer_macs(net, size), rel=0.005)
    assert not traced.unsupported


@pytest.mark.parametrize(
    "name", ["tresnet_m", "efficientnet_b0", "mixnet_s", "resnext50_32x4d", "convnext_atto", "vit_tiny_patch16_224"]
)
def test_macs_equal_torch_flop_counter(name: str) -> None:
    check_against_peer(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_macs_equal_torch_flop_counter_over_the_zoo(name: str) -> None:
    check_against_peer(name)


def test_torchvision_nets() -> None:
    from torchvision.models import googlenet, mobilenet_v3_small, shufflenet_v2_x1_0

    for make in (mobilenet_v3_small, shufflenet_v2_x1_0):
        with torch.device("meta"):
            net = make()
        assert sum(op.macs for op in trace(net, 224).operators) == pytest.approx(peer_macs(net, 224), rel=0.005)
    assert not trace(googlenet(init_weights=False), 224, mode="train").unsupported  # several outputs


class Normed(nn.Module):
    """A convolution, a norm over channels through permutes, and a convolution again: how ConvNeXt's stem goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.LayerNorm(8)
        self.after = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.norm(self.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def test_maps_lie_as_cuda_leaves_them() -> None:
    """By PyTorch's rule: layer norm copies what is not in order, its output is; a convolution follows the layout of its
    input or its weight.
    """
    traced = trace(Normed(), 32, batch_size=2)
    assert [(op.name, op.outputs[0].channels_last) for op in traced.operators] == [
        ("convolution", False),
        ("contiguous", False),  # (N, H, W, C) in order
        ("native_layer_norm", False),  # the same, seen as (N, C, H, W) channels-last
        ("convolution", True),
    ]
    copy = traced.operators[1]
    assert (copy.kind, copy.read_bytes, copy.written_bytes) == ("copy", 4 * 2 * 8 * 64, 4 * 2 * 8 * 64)
    nhwc = trace(Normed(), 32, batch_size=2, layout="nhwc")
    assert [op.name for op in nhwc.operators] == ["convolution", "native_layer_norm", "convolution"]  # nothing to copy


def test_group_norm_breaks_channels_last_and_the_next_convolution_restores_it() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, bias=False))
    names = [(op.name, op.outputs[0].channels_last) for op in trace(net, 16, batch_size=2, layout="nhwc").operators]
    assert [name for name, _ in names] == [
        "convolution",
        "contiguous",
        "native_group_norm",
        "contiguous",
        "convolution",
    ]
    assert [dense for _, dense in names] == [True, False, False, True, True]
    plain = [op.name for op in trace(net, 16, batch_size=2).operators]
    assert plain == ["convolution", "native_group_norm", "convolution"]


def test_dilated_convolutions_are_marked() -> None:
    plain, dilated = trace(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, dilation=2)), 16, mode="train"
    ).operators[:2]
    assert (plain.dilated, dilated.dilated) == (False, True)
    backward = [
        op
        for op in trace(nn.Conv2d(3, 8, 3, dilation=2), 16, mode="train").operators
        if op.phase == "backward" and op.kind == "conv"
    ]
    assert backward
    assert all(op.dilated for op in backward)
