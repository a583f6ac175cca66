"""Saved bytes against hand calculation, and against figures measured with a tool of its own (the issue's reference)."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from convscale import UserError, create_model, get_spec, saved_bytes
from convscale.cost.counting import count
from convscale.cost.memory import free_bytes, image_channels
from convscale.errors import DoesNotFit


class Square(nn.Module):
    """x * w, squared: keeps x, w x twice (one storage) and the parameter w."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.w).square()


def test_by_hand() -> None:
    """x and w x, of 3 * 8 * 8 floats each; per image, whatever the batch."""
    for batch in (1, 4):
        assert saved_bytes(Square(), image_size=8, batch_size=batch) == 2 * 3 * 8 * 8 * 4
    assert saved_bytes(Square(), image_size=(4, 8), batch_size=2) == 2 * 3 * 4 * 8 * 4
    assert saved_bytes(Square().double(), image_size=8, batch_size=2) == 2 * 3 * 8 * 8 * 8


def test_convolution_and_relu_by_hand() -> None:
    """The convolution keeps its input (3 maps), the in-place ReLU its output (5 maps), which the next convolution
    shares; parameters don't count.
    """
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(5, 2, 1), nn.Flatten())
    assert saved_bytes(net, image_size=16, batch_size=2) == (3 + 5) * 16 * 16 * 4


def test_views_of_one_storage_count_once() -> None:
    class Split(Square):
        def forward(self, x: Tensor) -> Tensor:
            y = x * self.w
            return y[:, :1].square() + y[:, 1:2].square()

    assert saved_bytes(Split(), image_size=8, batch_size=1) == 2 * 3 * 8 * 8 * 4


@pytest.mark.parametrize(("name", "mb"), [("tresnet_m", 66.8), ("resnet50", 86.0)])
def test_peers_figures(name: str, mb: float) -> None:
    """timm 1.0.31 at 224 px, float32, batch 4, as the project's issue gives them."""
    assert round(saved_bytes(timm.create_model(name)) / 1e6, 1) == mb


def test_leaves_the_network_and_the_generator_as_found() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).eval()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    with torch.no_grad():
        assert saved_bytes(net, image_size=8) > 0
    assert not any(m.training for m in net.modules())
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(p.grad is None for p in net.parameters())


def test_image_channels() -> None:
    assert image_channels(nn.Sequential(nn.Conv2d(1, 4, 3))) == 1
    assert image_channels(timm.create_model("tresnet_m", in_chans=1)) == 1
    assert image_channels(timm.create_model("tresnet_m")) == 3
    assert image_channels(nn.Flatten()) == 3
    with_own = nn.Conv2d(48, 4, 3)
    with_own.in_chans = 48
    assert image_channels(with_own) == 48


def test_bad_input() -> None:
    with pytest.raises(UserError, match="batch_size is 0; it must be a whole number of at least 1"):
        saved_bytes(Square(), batch_size=0)
    with pytest.raises(UserError, match=r"image_size must be a whole number of pixels of at least 1, or .*, got 2\.5"):
        saved_bytes(Square(), image_size=2.5)
    with pytest.raises(UserError, match="Flatten has no parameter that requires a gradient"):
        saved_bytes(nn.Flatten())
    with pytest.raises(UserError, match=r"batch_size is 2147483648; it must be .* at least 1 and at most 2147483647"):
        saved_bytes(Square(), batch_size=2**31)
    with pytest.raises(UserError, match="expected a network, a NetSpec or a model's name, got int"):
        saved_bytes(3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("free", [None, 2**30])
@pytest.mark.parametrize(("size", "batch"), [(224, 2**31 - 1), ((2**31 - 1, 2**31 - 1), 4)])
def test_what_memory_can_not_hold_is_told(
    size: int | tuple[int, int], batch: int, free: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system does not say what is free, by what the allocator says."""
    monkeypatch.setattr("convscale.speed.saved.free_bytes", lambda: free)
    with pytest.raises(DoesNotFit, match=r"Square does not fit in memory at .* px and batch .*; take a smaller batch"):
        saved_bytes(Square(), size, batch)


def test_a_pass_that_the_system_would_end_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = 2 * 3 * 224 * 224 * 4
    for free, fits in ((32 * kept // 2, False), (32 * kept * 4, True)):
        monkeypatch.setattr("convscale.speed.saved.free_bytes", lambda free=free: free)
        if fits:
            assert saved_bytes(Square(), 224, 32) == kept
            continue
        with pytest.raises(DoesNotFit, match="Square does not fit in memory at 224 px and batch 32"):
            saved_bytes(Square(), 224, 32)


def test_a_spec_and_a_name_are_networks_too() -> None:
    """resnet18's as autograd keeps them of the built module; a tag asks for no weights."""
    kept = saved_bytes(create_model("resnet18"), 64, 2)
    for net in (get_spec("resnet18"), "resnet18", "resnet18.a1_in1k"):
        assert saved_bytes(net, 64, 2) == kept


@pytest.mark.parametrize("name", ["resnet50", "tresnet_m", "efficientnet_b0", "mobilenetv2_100"])
def test_the_traced_bytes_are_those_that_autograd_keeps(name: str) -> None:
    """Two ways to one figure: the trace's operators, and the hooks of a real step. Statistics of batch norms are a
    thousandth.
    """
    assert count(name, 64, 4, mode="train").saved_bytes / 4 == pytest.approx(
        saved_bytes(create_model(name), 64, 4), rel=0.01
    )


def test_free_memory_is_the_containers_where_that_is_less(tmp_path: Path) -> None:
    assert free_bytes(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    assert free_bytes(tmp_path) == 5000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("3000000\n")
    (group / "memory.current").write_text("1000000\n")
    assert free_bytes(tmp_path) == 2000000
    (group / "memory.max").write_text("max\n")
    assert free_bytes(tmp_path) == 5000 * 1024
