"""Our networks against timm's with timm's weights: one of each family and mechanism, every name in the slow sweep."""

import pytest

pytest.importorskip("timm")

from benchmarks.parity import LIMIT, NAMES, NOT_IN_TIMM, compare, passes
from convscale.arch.zoo import ARCHITECTURES

FAST = (
    "resnet18",
    "resnet50d",
    "seresnext50_32x4d",
    "regnetx_002",
    "regnety_008_tv",
    "tresnet_m",
    "tf_efficientnet_b0",
    "efficientnet_lite0",
    "tf_efficientnetv2_b0",
    "efficientnetv2_rw_s",
    "mobilenetv1_100",
    "mobilenetv3_small_050",
    "tf_mobilenetv3_small_minimal_100",
    "mnasnet_100",
    "mixnet_s",
    "convnext_atto",
    "convnextv2_atto",
    "convnext_tiny",
    "mobilenetv4_conv_small_050",
    "mobilenetv4_conv_aa_medium",
    "mobilenetv4_conv_blur_medium",
    "hgnetv2_b0",
    "hgnetv2_b4",
)


def check(name: str, **options) -> None:
    row = compare(name, **options)
    assert row["params"] == row["peer_params"]
    assert row["keys_come_back"]
    for key in ("eval", "features", "train", "gradient", "statistics"):
        assert row[key] <= LIMIT, (key, row[key])
    assert passes(row), row


@pytest.mark.parametrize("name", FAST)
def test_parity(name):
    sides = (48, 68) if name.startswith("tresnet") else (64, 65)  # the last leaves odd maps to the end
    check(name, both_sizes=name in ("resnet18", "tf_efficientnet_b0"), sides=sides)


def test_only_networks_without_a_peer_are_left_out():
    import timm

    assert {name for name in ARCHITECTURES if not timm.is_model(name)} == NOT_IN_TIMM
    assert {*NAMES} == {*ARCHITECTURES} - NOT_IN_TIMM


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in FAST])
def test_parity_of_every_other_name(name):
    check(name)


@pytest.mark.parametrize("name", ["resnet18", "mixnet_l", "tresnet_xl", "wide_resnet50_2", "tf_efficientnet_b7"])
def test_parameter_counts_of_others(name):
    import timm
    import torch

    import convscale as cs

    with torch.device("meta"):
        ours, peer = cs.create_model(name), timm.create_model(name)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in peer.parameters())
