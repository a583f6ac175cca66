"""The plain convolutions with max-pools, against the same network written by hand in PyTorch's own layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import convscale as cs
from convscale.arch.multipliers import scale_to
from convscale.arch.small import for_image_size
from convscale.choice.members import families_for, members


class ByHand(nn.Module):
    """Stem, then per stage a convolution with a max-pool behind it and one with a shortcut."""

    def __init__(self, stem: int, widths: tuple[int, ...], classes: int) -> None:
        super().__init__()
        chain = (stem, *(width for width in widths for _ in range(2)))
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1, bias=False)
            for before, after in zip((3, *chain), chain, strict=False)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in chain)
        self.last = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = F.relu(norm(conv(x)))
            if number == 0:
                x = y
            else:
                x = F.max_pool2d(y, 2) if number % 2 else x + y
        return self.last(x.mean((2, 3)))


@pytest.mark.parametrize("size", [28, 33])
def test_outputs_and_gradients_are_those_of_plain_layers(size: int) -> None:
    spec = scale_to(cs.get_spec("poolnet"), width=0.25, depth=0.3)
    assert (spec.stem.widths, spec.widths, spec.depths) == ((8,), (16, 32, 64), (2, 2, 2))
    net = cs.create_model(spec, num_classes=5).double()
    twin = ByHand(8, (16, 32, 64), 5).double()
    ours, theirs = net.state_dict(), twin.state_dict()
    convs = [key for key in ours if key.endswith("conv.weight")]
    for number, key in enumerate(convs):
        theirs[f"convs.{number}.weight"] = ours[key]
    theirs["last.weight"], theirs["last.bias"] = ours["classifier.weight"], ours["classifier.bias"]
    twin.load_state_dict(theirs)
    images = torch.randn(4, 3, size, size, dtype=torch.float64)
    a, b = images.clone().requires_grad_(), images.clone().requires_grad_()
    torch.testing.assert_close(net(a), twin(b), rtol=1e-12, atol=1e-12)
    net(a).square().sum().backward()
    twin(b).square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(net.eval()(a), twin.eval()(b), rtol=1e-12, atol=1e-12)


def test_macs_by_hand() -> None:
    spec = for_image_size(scale_to(cs.get_spec("poolnet"), width=0.5, depth=0.3), 28)
    stem = 28 * 28 * 9 * 3 * 16
    firsts = 9 * (28 * 28 * 16 * 32 + 14 * 14 * 32 * 64 + 7 * 7 * 64 * 128)
    seconds = 9 * (14 * 14 * 32 * 32 + 7 * 7 * 64 * 64 + 3 * 3 * 128 * 128)
    assert cs.count(spec, image_size=28).macs == stem + firsts + seconds + 128 * 1000


def test_it_is_tried_on_small_images_alone() -> None:
    assert "poolnet" in families_for(64)
    assert "poolnet" not in families_for(65)
    rising = members("poolnet", 28)
    assert (rising[0].widths, rising[0].depths) == ((8, 16, 32), (2, 2, 2))
    assert rising[-1].widths == (128, 256, 512)  # twice the baseline's
    assert len(rising) > 20


def test_a_map_of_one_pixel_can_not_be_pooled() -> None:
    with pytest.raises(ValueError, match="at least 8 px"):
        for_image_size(cs.get_spec("poolnet"), 7)
