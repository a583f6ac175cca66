"""ConvNeXt's ingredients against values worked out by hand, and what its layout asks of sizes, heads and weights."""

from dataclasses import replace

import pytest
import torch

import convscale as cs
from convscale.arch.block import BlockSpec
from convscale.arch.parts import StemSpec
from convscale.arch.small import for_image_size
from convscale.nn.layernorm import LayerNorm2d
from convscale.nn.layers import GlobalResponseNorm, LayerScale

SMALL = cs.scale("convnext_atto", depth=0.2, width=0.2)


def test_layer_norm_by_hand():
    norm = LayerNorm2d(4, eps=1e-30).double()
    norm.weight.data = torch.tensor([1.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    norm.bias.data = torch.tensor([0.0, 0.0, 0.0, 5.0], dtype=torch.float64)
    x = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)  # mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5
    wanted = torch.tensor([-2.0, -2.0, 0.0, 3.0], dtype=torch.float64) / 3.5**0.5
    wanted[3] += 5
    torch.testing.assert_close(norm(x[None]), wanted[None])
    torch.testing.assert_close(norm(x.view(1, 4, 1, 1).expand(2, 4, 3, 5))[1, :, 2, 4], wanted)


@pytest.mark.parametrize("channels_last", [False, True])
def test_response_norm_by_hand(channels_last):
    # two channels of 1 x 2 pixels with norms 5 and 13: their mean is 9
    x = torch.tensor([[[[3.0, 4.0]], [[5.0, 12.0]]]], dtype=torch.float64)
    norm = GlobalResponseNorm(2, channels_last=channels_last).double()
    take = (lambda t: norm(t.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)) if channels_last else norm
    assert torch.equal(take(x), x)  # it starts as the identity
    norm.weight.data = torch.tensor([9.0, 18.0], dtype=torch.float64)
    norm.bias.data = torch.tensor([1.0, -1.0], dtype=torch.float64)
    wanted = torch.tensor([[[[3 + 15 + 1, 4 + 20 + 1.0]], [[5 + 130 - 1, 12 + 312 - 1.0]]]], dtype=torch.float64)
    torch.testing.assert_close(take(x), wanted, rtol=1e-6, atol=0)


def test_layer_scale_starts_where_it_is_told():
    assert torch.equal(LayerScale(2, 0.5)(torch.ones(1, 2, 1, 1)), torch.full((1, 2, 1, 1), 0.5))
    net = cs.create_model(SMALL)
    assert torch.equal(net.stages[0][0].scale.gamma, torch.full((8,), 1e-6))  # type: ignore[index, union-attr]
    assert cs.create_model("convnextv2_atto").stages[0][0].scale is None  # type: ignore[index, union-attr]


def test_linear_layers_are_the_same_function():
    blocks = [replace(stage.runs[0].block, linear=True) for stage in SMALL.stages]
    stages = tuple(
        replace(stage, runs=(replace(stage.runs[0], block=block),))
        for stage, block in zip(SMALL.stages, blocks, strict=True)
    )
    net, linear = cs.create_model(SMALL).double(), cs.create_model(replace(SMALL, stages=stages)).double()
    own = linear.state_dict()
    linear.load_state_dict({key: value.reshape(own[key].shape) for key, value in net.state_dict().items()})
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(net(x), linear(x))


# parameters in millions, MACs in billions as the papers print them (arXiv 2201.03545, table 1; V2's atto, 2301.00808)
@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [("convnext_tiny", 29, 4.5), ("convnext_base", 89, 15.4), ("convnextv2_atto", 3.7, 0.55)],
)
def test_counts_are_the_papers(name, params, macs):
    cost = cs.count(name)
    assert cost.params / 1e6 == pytest.approx(params, rel=0.02)
    assert cost.macs / 1e9 == pytest.approx(macs, rel=0.01)


def test_scaling_keeps_the_blocks():
    scaled = cs.scale("convnext_atto", depth=1.5, width=1.2)
    assert (scaled.depths, scaled.widths) == ((3, 3, 9, 3), (48, 96, 192, 384))  # convnext_femto's widths
    assert scaled.stem.widths == (48,)
    assert cs.NetSpec.from_yaml(scaled.to_yaml()) == scaled
    net = cs.create_model(scaled, num_classes=0)
    assert net(torch.randn(1, 3, 64, 64)).shape == (1, 384)


def test_borders_that_fill_no_patch_are_left_out():
    assert cs.create_model(SMALL, features_only=True)(torch.randn(1, 3, 79, 63))[-1].shape[-2:] == (2, 1)
    with pytest.raises(cs.UserError, match="takes at least 32 px"):
        cs.create_model(SMALL)(torch.randn(1, 3, 31, 31))
    small = for_image_size(SMALL, 32)
    assert (small.stem.stride, small.stem.kernel, small.reduction) == (2, 2, 16)
    assert cs.create_model(small, features_only=True)(torch.randn(1, 3, 32, 32))[-1].shape[-2:] == (2, 2)
    least = for_image_size(SMALL, 8)
    assert (least.stem.stride, least.input.min_size) == (1, 8)  # three halvings of 8 px leave one
    with pytest.raises(cs.UserError, match="image size is 7 px"):
        for_image_size(SMALL, 7)


def test_what_goes_with_no_other_block_is_refused():
    for field, value in (("grn", True), ("linear", True), ("layer_scale", 0.1), ("downsample", "patch")):
        with pytest.raises(cs.UserError, match=rf"BlockSpec\.{field} is .*for a bottleneck block"):
            BlockSpec(kind="bottleneck", width=8, **{field: value})
    with pytest.raises(cs.UserError, match=r"BlockSpec\.downsample is 'stride'.*'patch' for a convnext block"):
        BlockSpec(kind="convnext", width=8)
    with pytest.raises(cs.UserError, match=r"StemSpec\.kernel is 3"):
        StemSpec(kind="patch", stride=4)


def test_layer_norms_have_no_other_form():
    with pytest.raises(cs.UserError, match="norm is 'inplace'; convnext_atto has layer norms, so leave it out"):
        cs.create_model("convnext_atto", norm="inplace")
    net = cs.create_model(SMALL)
    assert cs.convert_norm(net, "inplace").spec.norm.kind == "layernorm"  # type: ignore[union-attr]
    with pytest.raises(cs.UserError, match=r"'catavgmax'; .* has a layer behind the pool"):
        net.reset_classifier(3, "catavgmax")
    assert net.num_classes == 1000


def test_weights_without_a_head_fit():
    """Masked autoencoders have neither classifier nor the norm before it."""
    net = cs.create_model(SMALL)
    bare = {key: value for key, value in cs.export_weights(net).items() if not key.startswith("head.")}
    other = cs.create_model(SMALL, num_classes=0)
    loaded = cs.load_weights(other, bare)
    assert loaded.fresh == ("pooled.norm.weight", "pooled.norm.bias")
    assert torch.equal(other.stem[0].conv.weight, net.stem[0].conv.weight)  # type: ignore[union-attr]
    loaded = cs.load_weights(cs.create_model(SMALL, num_classes=7), bare, allow_head_mismatch=True)
    assert set(loaded.fresh) == {"classifier.weight", "classifier.bias", "pooled.norm.weight", "pooled.norm.bias"}
    with pytest.raises(cs.UserError, match=r"missing pooled\.norm\.weight"):
        cs.load_weights(cs.create_model(SMALL), bare)


def test_an_in_place_norm_between_stages_leaves_the_map_that_is_given_out():
    spec = cs.get_spec("convnext_atto")
    spec = replace(spec, stages=tuple(replace(s, tap=True) for s in spec.stages))
    nets = []
    for kind in ("batchnorm", "inplace"):
        torch.manual_seed(0)
        nets.append(cs.create_model(replace(spec, norm=replace(spec.norm, kind=kind)), features_only=True))
    nets[1].load_state_dict(nets[0].state_dict())
    x = torch.randn(2, 3, 64, 64)
    for ours, theirs in zip(nets[1](x), nets[0](x), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
