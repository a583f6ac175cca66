"""MobileNetV4's blocks and head: what they hold, what they refuse, and the paper's counts."""

import pytest
import torch
from torch.nn import functional as F

import convscale as cs
from convscale.arch.block import BlockSpec, RunSpec, StageSpec
from convscale.arch.parts import IDENTITY, NormSpec
from convscale.arch.small import for_image_size
from convscale.nn.blocks import build_block
from convscale.nn.layers import BlurPool

NORM = NormSpec()


def universal(start: int, middle: int, **fields: object) -> BlockSpec:
    kernels = (middle,) if middle else ()
    values = {"width": 8, "inner_ratio": 2.0, "start_kernel": start, "kernels": kernels, "out_activation": IDENTITY}
    return BlockSpec(kind="universal", **{**values, **fields})  # type: ignore[arg-type]


# expansion 8 -> 16 and projection 16 -> 8 with their norms; a depthwise convolution has k * k + 2 per channel
BARE = 8 * 16 + 32 + 16 * 8 + 16


@pytest.mark.parametrize(
    ("start", "middle", "more"),
    [(0, 0, 0), (3, 0, 8 * (9 + 2)), (0, 5, 16 * (25 + 2)), (5, 3, 8 * (25 + 2) + 16 * (9 + 2))],
    ids=["FFN", "ConvNeXt", "IB", "ExtraDW"],
)
def test_the_four_forms_of_the_universal_block(start, middle, more):
    spec = universal(start, middle)
    block = build_block(spec, 8, 1, norm=NORM, padding="symmetric", drop_path=0.0)
    assert sum(p.numel() for p in block.parameters()) == BARE + more
    assert block.has_shortcut
    if start or middle:
        block = build_block(spec, 8, 2, norm=NORM, padding="symmetric", drop_path=0.0)
        assert block(torch.randn(2, 8, 9, 9)).shape == (2, 8, 5, 5)
        assert not block.has_shortcut
    stage = StageSpec(runs=(RunSpec(block=spec),))
    assert cs.NetSpec.from_json(cs.NetSpec(stem=cs.get_spec("resnet18").stem, stages=(stage,)).to_json()).stages == (
        stage,
    )


def test_what_makes_no_block_is_refused():
    with pytest.raises(cs.UserError, match="1, as the first block has no convolution that could take it"):
        StageSpec(runs=(RunSpec(block=universal(0, 0)),), stride=2)
    with pytest.raises(cs.UserError, match=r"BlockSpec\.start_kernel is 4"):
        universal(4, 3)
    with pytest.raises(cs.UserError, match=r"BlockSpec\.kernels is \(\)"):
        BlockSpec(kind="inverted_residual", width=8, kernels=())
    with pytest.raises(cs.UserError, match=r"BlockSpec\.start_kernel is 3.*0 for a inverted_residual block"):
        BlockSpec(kind="inverted_residual", width=8, start_kernel=3)


def test_fused_block_by_hand():
    spec = BlockSpec(kind="fused_inverted_residual", width=1, inner_ratio=1.0, kernels=(3,), out_activation=IDENTITY)
    block = build_block(spec, 1, 1, norm=NORM, padding="symmetric", drop_path=0.0).eval()
    for unit, value in ((block.conv1, 2.0), (block.conv2, 3.0)):
        torch.nn.init.constant_(unit.conv.weight, value)  # type: ignore[union-attr, arg-type]
        unit.norm.eps = 0.0  # type: ignore[union-attr]
    x = torch.ones(1, 1, 3, 3)
    assert block(x)[0, 0].tolist() == [[25, 37, 25], [37, 55, 37], [25, 37, 25]]  # 3 * 2 * neighbours + 1


def test_blur_with_zeros_by_hand():
    x = torch.ones(1, 2, 4, 4)
    assert BlurPool(2, zeros=True)(x)[0, 1].tolist() == [[9 / 16, 12 / 16], [12 / 16, 1.0]]
    x = torch.rand(1, 3, 7, 7)
    kernel = torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0])) / 16
    wanted = F.conv2d(F.pad(x, (1, 1, 1, 1)), kernel.expand(3, 1, 3, 3), stride=2, groups=3)
    torch.testing.assert_close(BlurPool(2, zeros=True)(x), wanted)


# the paper's MACs in billions at the paper's sizes (arXiv 2404.10518, table of results on ImageNet-1k)
@pytest.mark.parametrize(
    ("name", "size", "macs"),
    [("small", 224, 0.2), ("medium", 256, 1.0)],
)
def test_counts_are_the_papers(name, size, macs):
    assert cs.get_spec(f"mobilenetv4_conv_{name}").input.size == size
    assert cs.count(f"mobilenetv4_conv_{name}").macs / 1e9 == pytest.approx(macs, abs=0.1)


def test_half_the_width_keeps_stem_and_head():
    half = cs.get_spec("mobilenetv4_conv_small_050")
    assert (half.stem.widths, half.widths, half.head.pooled_width) == ((32,), (16, 32, 48, 64, 480), 1280)
    deeper = cs.scale("mobilenetv4_conv_medium", depth=1.5)
    assert (deeper.depths[0], deeper.depths[-1]) == (1, 1)
    assert deeper.depths[2] == 12  # 8 blocks


def test_pooled_head():
    net = cs.create_model("mobilenetv4_conv_small_050", num_classes=5).eval()
    x = torch.randn(2, 3, 64, 64)
    last = net.forward_features(x)
    assert last.shape == (2, net.num_features, 2, 2) == (2, 480, 2, 2)
    features = net.forward_head(last, pre_logits=True)
    assert features.shape == (2, net.head_hidden_size) == (2, 1280)
    torch.testing.assert_close(net.classifier(features), net(x))
    by_hand = torch.relu(F.conv2d(last.mean((2, 3), keepdim=True), net.pooled.conv.weight) / (1 + 1e-5) ** 0.5)
    torch.testing.assert_close(features, by_hand.flatten(1))
    net.reset_classifier(0, "")
    assert net(x).shape == (2, 1280, 2, 2)


def test_pools_need_whole_windows():
    with pytest.raises(cs.UserError, match="takes at least 31 px"):
        cs.get_spec("mobilenetv4_conv_aa_medium").check_size(30)
    net = cs.create_model("mobilenetv4_conv_aa_medium", features_only=True).eval()
    assert net(torch.randn(1, 3, 31, 31))[-1].shape[-2:] == (1, 1)
    small = for_image_size(cs.get_spec("mobilenetv4_conv_aa_medium"), 28)
    assert small.stem.stride == 1
    assert cs.create_model(small, features_only=True).eval()(torch.randn(1, 3, 28, 28))[-1].shape[-2:] == (1, 1)


def test_taps_are_one_per_resolution():
    net = cs.create_model("mobilenetv4_conv_small", features_only=True)
    assert net.feature_info.reduction() == [2, 4, 8, 16, 32]  # timm's feature_info
    assert net.feature_info.channels() == [32, 32, 64, 96, 960]
