"""Stems for small images."""

import pytest
import torch

import convscale as cs
from convscale.arch.small import for_image_size


@pytest.mark.parametrize(
    ("name", "size", "kind", "stride", "pool"),
    [
        ("tresnet_m", 28, "space_to_depth", 2, False),  # 28 -> 14, 14, 7, 4, 2
        ("resnet50d", 28, "deep", 2, False),
        ("efficientnet_b0", 28, "conv", 1, False),
        ("tresnet_m", 16, "conv", 1, False),  # 16 -> 16, 8, 4, 2
        ("tresnet_m", 64, "space_to_depth", 4, False),
        ("resnet18", 64, "conv", 2, True),
    ],
)
def test_stem_gives_way(name, size, kind, stride, pool):
    spec = for_image_size(cs.get_spec(name), size)
    assert (spec.stem.kind, spec.stem.stride, spec.stem.pool, spec.input.size) == (kind, stride, pool, size)
    net = cs.create_model(spec, features_only=True).eval()
    with torch.no_grad():
        assert net(torch.zeros(1, 3, size, size))[-1].shape[-1] == 2


def test_sizes_that_the_gentler_stem_takes():
    small = for_image_size(cs.get_spec("tresnet_m"), 28)
    assert (small.input.multiple, small.input.min_size) == (
        2,
        10,
    )  # 10 -> 5, 5, 3, 2, 1: the last blur still gets two pixels
    net = cs.create_model(small, num_classes=3).eval()
    assert net(torch.zeros(1, 3, 10, 10)).shape == (1, 3)
    with pytest.raises(ValueError, match="takes a multiple of 2 and at least 10 px"):
        net(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="takes a multiple of 2 from 10 px up"):
        for_image_size(cs.get_spec("tresnet_m"), 27)


def test_nothing_changes_at_the_family_s_own_size():
    spec = cs.get_spec("resnet50")
    assert for_image_size(spec, 224) == spec
