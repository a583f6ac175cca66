"""Counts of our networks against torch's own counter on timm's networks of the same name."""

from __future__ import annotations

import pytest

from benchmarks.count import NAMES, peer_counts
from convscale.arch.zoo import list_models
from convscale.cost.counting import cost_of
from convscale.networks.resolve import build_meta
from tests.cost.helpers import trace

timm = pytest.importorskip("timm")
SAMPLE = (
    "tresnet_m",
    "tresnet_v2_l",
    "efficientnet_b1",
    "tf_efficientnet_lite0",
    "tf_efficientnetv2_b0",
    "resnet50d",
    "seresnext50_32x4d",
    "regnety_004",
    "mobilenetv2_050",
    "mobilenetv3_small_050",
    "mixnet_m",
    "convnext_tiny",
    "convnextv2_atto",
    "mobilenetv4_conv_small",
    "mobilenetv4_conv_aa_medium",
    "mobilenetv4_conv_blur_medium",
    "hgnetv2_b0",
    "hgnetv2_b4",
)
"""One of each kind of block, stem and padding."""


def check(name: str) -> None:
    from convscale.arch.zoo import get_spec

    spec = get_spec(name)
    cost, peer = cost_of(trace(build_meta(spec), spec.input.size)), peer_counts(name, spec.input.size)
    assert cost.params == peer["params"]
    assert cost.macs == pytest.approx(peer["macs"], rel=0.005)
    assert cost.activations == pytest.approx(peer["activations"], rel=0.005)
    assert cost.unsupported == {}


@pytest.mark.parametrize("name", SAMPLE)
def test_counts_equal_the_peers(name: str) -> None:
    check(name)


def test_all_that_timm_has_too_are_counted() -> None:
    peers = {name for name in list_models() if timm.is_model(name.removesuffix("_official"))}
    assert {*NAMES} == peers
    assert {*list_models()} - peers == {"poolnet"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in SAMPLE])
def test_counts_equal_the_peers_over_the_zoo(name: str) -> None:
    check(name)
