"""MobileNetV3 against the paper (arXiv 1905.02244, tables 1, 2 and 3)."""

from __future__ import annotations

import pytest
import torch

import convscale as cs
from convscale.arch.block import SESpec
from convscale.arch.rows import V3_SE
from convscale.cost.counting import count

# expansion, output, squeeze-and-excitation, activation (re, hs) and stride of each block; tables 1 and 2
LARGE = [
    (16, 16, False, "re", 1),
    (64, 24, False, "re", 2),
    (72, 24, False, "re", 1),
    (72, 40, True, "re", 2),
    (120, 40, True, "re", 1),
    (120, 40, True, "re", 1),
    (240, 80, False, "hs", 2),
    (200, 80, False, "hs", 1),
    (184, 80, False, "hs", 1),
    (184, 80, False, "hs", 1),
    (480, 112, True, "hs", 1),
    (672, 112, True, "hs", 1),
    (672, 160, True, "hs", 2),
    (960, 160, True, "hs", 1),
    (960, 160, True, "hs", 1),
]
SMALL = [
    (16, 16, True, "re", 2),
    (72, 24, False, "re", 2),
    (88, 24, False, "re", 1),
    (96, 40, True, "hs", 2),
    (240, 40, True, "hs", 1),
    (240, 40, True, "hs", 1),
    (120, 48, True, "hs", 1),
    (144, 48, True, "hs", 1),
    (288, 96, True, "hs", 2),
    (576, 96, True, "hs", 1),
    (576, 96, True, "hs", 1),
]
KERNELS = {
    "mobilenetv3_large_100": [3, 3, 3, 5, 5, 5, 3, 3, 3, 3, 3, 3, 5, 5, 5],
    "mobilenetv3_small_100": [3, 3, 3, 5, 5, 5, 5, 5, 5, 5, 5],
}


@pytest.mark.parametrize(("name", "table"), [("mobilenetv3_large_100", LARGE), ("mobilenetv3_small_100", SMALL)])
def test_blocks_are_the_tables(name: str, table: list[tuple[int, int, bool, str, int]]) -> None:
    spec = cs.get_spec(name)
    rows, kernels, width = [], [], spec.stem.widths[-1]
    for stage in spec.stages[:-1]:
        for i, block in enumerate(run.block for run in stage.runs for _ in range(run.repeat)):
            act = {"relu": "re", "hardswish": "hs"}[block.activation.kind]
            stride = stage.stride if i == 0 else 1
            rows.append((block.inner_width(width), block.width, block.se is not None, act, stride))
            kernels.append(block.kernels[0])
            width = block.width
    assert rows == table
    assert kernels == KERNELS[name]


@pytest.mark.parametrize(
    ("name", "mmacs", "params_m"),
    [
        ("mobilenetv3_large_100", 219, 5.4),
        ("mobilenetv3_large_075", 155, 4.0),
        ("mobilenetv3_small_100", 56, 2.5),
        ("mobilenetv3_small_075", 44, 2.0),
    ],
)
def test_counts_are_those_of_table_3(name: str, mmacs: float, params_m: float) -> None:
    cost = count(name)
    assert cost.macs / 1e6 == pytest.approx(mmacs, rel=0.03)
    assert cost.params / 1e6 == pytest.approx(params_m, abs=0.1)


@pytest.mark.parametrize(
    ("inner", "squeezed"),
    [(72, 24), (120, 32), (480, 120), (672, 168), (960, 240), (16, 8), (96, 24), (88, 24)],  # 18 -> 16 is below 90 %
)
def test_squeezed_widths_by_hand(inner: int, squeezed: int) -> None:
    assert V3_SE.squeezed(block_input=1, inner=inner, output=1) == squeezed


def test_the_least_share_is_checked() -> None:
    with pytest.raises(cs.UserError, match=r"SESpec.min_fraction is 1.5; it must be in \[0, 1\]"):
        SESpec(min_fraction=1.5)


def test_the_stem_and_the_head_do_not_shrink() -> None:
    small = cs.scale("mobilenetv3_large_100", width=0.5)
    assert (small.stem.widths, small.head.pooled_width) == ((16,), 1280)
    large = cs.scale("mobilenetv3_large_100", width=1.5)
    assert (large.stem.widths, large.head.pooled_width, large.widths[-1]) == ((24,), 1280, 1440)
    assert cs.scale(small, width=2.0).stages == cs.get_spec("mobilenetv3_large_100").stages
    assert cs.NetSpec.from_json(large.to_json()) == large


def test_a_layer_stands_behind_the_pool() -> None:
    net = cs.create_model("mobilenetv3_small_050", num_classes=5).eval()
    assert (net.num_features, net.head_hidden_size) == (288, 1024)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        last = net.forward_features(x)
        assert last.shape == (2, 288, 2, 2)
        features = net.forward_head(last, pre_logits=True)
        assert features.shape == (2, 1024)
        assert torch.equal(net.classifier(features), net(x))
        assert net.pooled is not None
        assert net.pooled.conv is not None
        by_hand = torch.nn.functional.hardswish(torch.nn.functional.linear(
            last.mean((2, 3)), net.pooled.conv.weight.flatten(1), net.pooled.conv.bias
        ))  # fmt: skip
        assert torch.allclose(features, by_hand, atol=1e-6)
    net.reset_classifier(0, "")
    assert net(x).shape == (2, 1024, 2, 2)
    net.reset_classifier(7, "max")
    assert net(x).shape == (2, 7)
    with pytest.raises(cs.UserError, match="a layer behind the pool that takes one value per channel: avg, max or"):
        net.reset_classifier(7, "catavgmax")
    assert net(x).shape == (2, 7)


def test_torchvisions_weights_bring_their_epsilon() -> None:
    import torchvision

    peer = torchvision.models.mobilenet_v3_small()
    net = cs.create_model("mobilenetv3_small_100")
    assert cs.load_weights(net, peer.state_dict()).changed == "a norm epsilon of 0.001"
    assert net.spec.norm.eps == 1e-3
    assert {module.eps for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)} == {1e-3}
    tensorflow = cs.create_model("tf_mobilenetv3_small_100")  # pads otherwise, so their weights are not for it
    with pytest.raises(cs.UserError, match="of no layout known for tf_mobilenetv3_small_100"):
        cs.load_weights(tensorflow, peer.state_dict())
