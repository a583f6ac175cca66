"""HGNetV2's stem, blocks and head against values worked out by hand."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import convscale as cs
from convscale.arch.block import BlockSpec, SESpec
from convscale.arch.parts import IDENTITY, RELU, ActSpec, NormSpec, StemSpec
from convscale.arch.small import for_image_size
from convscale.nn.blocks import AggregatedBlock, build_block
from convscale.nn.layers import LearnableAffine

AFFINE = ActSpec(kind="relu", affine=True)


def block_of(in_chs: int, stride: int, *, light: bool = False, act: ActSpec = RELU) -> AggregatedBlock:
    spec = BlockSpec(
        kind="aggregated",
        width=8,
        inner_ratio=0.5,
        activation=act,
        out_activation=IDENTITY,
        downsample="depthwise",
        layers=3,
        light=light,
    )
    block = build_block(spec, in_chs, stride, norm=NormSpec(), padding="symmetric", drop_path=0.0)
    assert isinstance(block, AggregatedBlock)
    return block.eval()


def test_affine_by_hand():
    layer = LearnableAffine()
    x = torch.tensor([[[[1.0, -2.0]]]])
    assert torch.equal(layer(x), x)
    layer.scale.data.fill_(3.0)
    layer.bias.data.fill_(0.5)
    assert layer(x).flatten().tolist() == [3.5, -5.5]


@pytest.mark.parametrize("act", [RELU, AFFINE], ids=["relu", "affine"])
def test_dense_block_by_hand(act):
    block = block_of(8, 1, act=act)
    x = torch.randn(2, 8, 5, 5)

    def unit(convolution, x, **options):
        x = F.conv2d(x, convolution.conv.weight, **options) / (1 + 1e-5) ** 0.5
        x = torch.relu(x)
        return x if convolution.affine is None else convolution.affine.scale * x + convolution.affine.bias

    for child in block.modules():
        if isinstance(child, LearnableAffine):
            torch.nn.init.constant_(child.scale, 0.7)
            torch.nn.init.constant_(child.bias, -0.1)
    maps = [x]
    for layer in block.layers:
        maps.append(unit(layer, maps[-1], padding=1))
    assert [m.shape[1] for m in maps] == [8, 4, 4, 4]
    wanted = unit(block.excite, unit(block.squeeze, torch.cat(maps, 1))) + x
    torch.testing.assert_close(block(x), wanted)


def test_light_layers_and_the_way_down():
    block = block_of(6, 2, light=True)
    assert not block.has_shortcut
    assert block(torch.randn(1, 6, 7, 7)).shape == (1, 8, 4, 4)
    down = 6 * (9 + 2)
    layers = (6 * 4 + 8) + 4 * (9 + 2) + 2 * ((4 * 4 + 8) + 4 * (9 + 2))
    aggregation = (6 + 3 * 4) * 4 + 8 + 4 * 8 + 16
    assert sum(p.numel() for p in block.parameters()) == down + layers + aggregation


def test_a_gradient_reaches_what_the_activation_kept():
    """The add must not overwrite the ReLU's output, by which its derivative is told."""
    block = block_of(8, 1).double().train()
    x = torch.randn(3, 8, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,), fast_mode=True)


def test_stem_keeps_sizes_and_shrinks_by_four():
    spec = cs.get_spec("hgnetv2_b0")
    net = cs.create_model(spec, features_only=True).eval()
    for size in (1, 2, 31, 32, 33):
        assert net(torch.randn(1, 3, size, size))[0].shape[-1] == -(-size // 4)
    small = for_image_size(spec, 32)
    assert (small.stem.stride, small.reduction) == (2, 16)
    assert cs.create_model(small, features_only=True).eval()(torch.randn(1, 3, 32, 32))[-1].shape[-1] == 2
    with pytest.raises(cs.UserError, match=r"StemSpec\.widths is \(3, 8\).*even at first for a branched stem"):
        StemSpec(kind="branched", widths=(3, 8), stride=4)


def test_scaled_members_follow():
    scaled = cs.scale("hgnetv2_b4", width=0.5, depth=2)
    assert (scaled.widths, scaled.depths, scaled.head.pooled_width) == ((64, 256, 512, 1024), (2, 2, 6, 2), 2048)
    assert [stage.runs[0].block.inner_width(0) for stage in scaled.stages] == [24, 48, 96, 192]
    assert scaled.stem.widths == (16, 24)
    assert cs.NetSpec.from_yaml(scaled.to_yaml()) == scaled


def test_affine_layers_stand_where_they_are_used():
    with pytest.raises(cs.UserError, match=r"SESpec\.activation is ActSpec\(relu, affine\)"):
        SESpec(activation=AFFINE)
    with pytest.raises(cs.UserError, match=r"BlockSpec\.out_activation is ActSpec\(relu, affine\)"):
        BlockSpec(kind="basic", width=8, out_activation=AFFINE)
    with pytest.raises(cs.UserError, match=r"BlockSpec\.layers is 0.*at least 1"):
        replace(cs.get_spec("hgnetv2_b0").stages[0].runs[0].block, layers=0)
    net = cs.create_model("hgnetv2_b0")
    assert sum(isinstance(module, LearnableAffine) for module in net.modules()) == 5 + 2 * 3 + 3 * 3 + 5 * 2 + 1


def test_a_fresh_block_is_alive():
    """A norm that starts at zero before a ReLU would never learn."""
    for init in ("kaiming", "resnet"):
        net = cs.create_model(replace(cs.get_spec("hgnetv2_b4"), init=init), num_classes=2)
        assert net.stages[2][1].has_shortcut  # type: ignore[index, union-attr]
        assert net.stages[2][1].excite.norm.weight.min() == 1  # type: ignore[index, union-attr]
