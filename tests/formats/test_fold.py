"""Folding changes no output: golden values are the unfolded network's own."""

from __future__ import annotations

import copy
from types import ModuleType

import pytest
import timm
import torch
from torch import nn

import convscale as cs
from convscale.errors import UserError
from convscale.formats.fold import capture, fold
from tests.ship.conftest import randomise

aten = torch.ops.aten


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max())


def targets(graph: nn.Module) -> list[object]:
    return [node.target for node in graph.graph.nodes]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("create", "name"),
    [
        (timm, "resnet18"),
        (cs, "tresnet_m"),
        (timm, "efficientnet_b0"),
        pytest.param(cs, "mixnet_s", marks=pytest.mark.slow),
    ],
)
def test_equal_in_float64_and_near_in_float32(create: ModuleType, name: str) -> None:
    torch.manual_seed(0)
    size = 64
    net = randomise(create.create_model(name, num_classes=7), size)
    x = torch.rand(3, 3, size, size)
    with torch.no_grad():
        double = copy.deepcopy(net).double()
        exact, single = double(x.double()), net(x)
        folded = fold(double, x.double(), strided_stem=True)
        assert relative(folded(x.double()), exact) < 1e-10
        assert aten.batch_norm.default not in targets(folded)
        own = relative(single, exact)
        assert relative(fold(net, x)(x), exact) <= 4 * own


def test_folded_weight_by_hand() -> None:
    net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, eps=1.0)).eval()
    conv, norm = net
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert conv.bias is not None
    with torch.no_grad():
        conv.weight.fill_(3.0)
        conv.bias.fill_(1.0)
        norm.weight.fill_(-2.0)
        norm.bias.fill_(0.5)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.fill_(5.0)
        norm.running_var.fill_(3.0)
    folded = fold(net, torch.zeros(2, 1, 2, 2))
    # (3 x + 1 - 5) / 2 * -2 + 0.5 = -3 x + 4.5
    assert [p.item() for p in folded.parameters()] == [-3.0, 4.5]


def test_the_network_is_left_as_it_was() -> None:
    net = randomise(timm.create_model("resnet18", num_classes=3), 32).train()
    before = copy.deepcopy(net.state_dict())
    fold(net, torch.zeros(2, 3, 32, 32))
    assert net.training
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), before.values(), strict=True))


def test_nothing_of_training_is_left(tiny: nn.Module) -> None:
    folded = fold(tiny, torch.zeros(2, 3, 32, 32))
    assert aten.dropout.default not in targets(folded)
    assert sum(p.numel() for p in folded.parameters()) == 8 * 27 + 8 + 8 * 72 + 8 + 8 * 5 + 5
    assert list(folded.buffers()) == []


@pytest.mark.parametrize(
    ("limits", "golden"),
    [((), [-1.0, -0.5, 0.5, 1.0]), ((-2.0,), [-2.0, -0.5, 0.5, 1.0]), ((0.0, 6.0), [0, 0, 0.5, 6])],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_hardtanh_is_a_clamp(limits: tuple[float, ...], golden: list[float], inplace: bool) -> None:
    class Limited(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (torch.ops.aten.hardtanh_ if inplace else torch.ops.aten.hardtanh)(x * 1.0, *limits)

    x = torch.tensor([-3.0, -0.5, 0.5, 9.0]).reshape(1, 1, 2, 2).repeat(2, 1, 1, 1)
    graph = fold(Limited(), x)
    assert "clamp" in graph.code
    assert "aten.hardtanh" not in graph.code
    assert graph(x)[1].flatten().tolist() == golden


def test_what_is_written_over_and_read_again_stays() -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 1.0
            return nn.functional.relu6(y, inplace=True) + y

    x = torch.tensor([-3.0, 0.5, 2.0, 9.0]).reshape(1, 1, 2, 2).repeat(2, 1, 1, 1)
    assert fold(Twice(), x)(x)[0].flatten().tolist() == [0.0, 1.0, 4.0, 12.0]


def test_a_convolution_used_twice_keeps_its_norm() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            return (self.norm(x) + x).mean((2, 3))

    net = randomise(Twice())
    x = torch.rand(2, 3, 8, 8)
    folded = fold(net, x)
    assert aten.batch_norm.default in targets(folded)
    assert torch.equal(folded(x), net(x))


def test_joined_convolutions_used_twice_keep_their_norm() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 2, 3), nn.BatchNorm2d(6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.cat([self.one(x), self.two(x)], 1)
            return (self.norm(x) + x).mean((2, 3))

    net = randomise(Twice())
    x = torch.rand(2, 3, 8, 8)
    folded = fold(net, x)
    assert aten.batch_norm.default in targets(folded)
    assert torch.equal(folded(x), net(x))


def test_strided_stem_is_one_convolution() -> None:
    net = randomise(timm.create_model("tresnet_m", num_classes=3), 64)
    x = torch.rand(2, 3, 64, 64)
    folded = fold(net, x, strided_stem=True)
    first = next(node for node in folded.graph.nodes if node.target is aten.conv2d.default)
    assert folded.get_parameter(str(first.args[1].target)).shape == (64, 3, 12, 12)
    assert first.args[0].op == "placeholder"
    assert (list(first.args[3]), list(first.args[4])) == ([4, 4], [4, 4])
    assert relative(folded(x), net(x)) < 1e-4


def test_pixel_unshuffle_stem_too() -> None:
    net = (
        nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 5, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        .double()
        .eval()
    )
    x = torch.rand(2, 3, 10, 10, dtype=torch.double)
    folded = fold(net, x, strided_stem=True)
    assert aten.pixel_unshuffle.default not in targets(folded)
    assert relative(folded(x), net(x)) < 1e-12


def test_capture_takes_any_batch(tiny: nn.Module) -> None:
    graph = capture(tiny, torch.zeros(2, 3, 32, 32))
    for n in (1, 2, 7):
        x = torch.rand(n, 3, 32, 32)
        assert torch.allclose(graph(x), tiny(x), atol=1e-6)


def test_a_size_the_network_can_not_take() -> None:
    with pytest.raises(UserError, match=r"can not take an input of shape \(2, 3, 30, 30\)"):
        capture(timm.create_model("tresnet_m", num_classes=3), torch.zeros(2, 3, 30, 30))


def test_a_network_that_can_not_be_captured() -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))

    with pytest.raises(UserError, match="Branching can not be captured"):
        capture(Branching(), torch.zeros(2, 3, 8, 8))
