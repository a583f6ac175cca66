"""ML-Decoder against torch's own attention, as a head of networks, and as shipped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import convscale as cs
from convscale.nn.decoder import MLDecoder


def spec(width: int = 48, groups: int = 0) -> cs.NetSpec:
    """A small ResNet with a narrow decoder."""
    base = cs.scale(cs.get_spec("resnet18"), width=0.25, depth=0.3, image_size=64)
    return replace(base, head=replace(base.head, kind="ml_decoder", decoder_width=width, decoder_groups=groups))


def by_torch(ours: MLDecoder, x: torch.Tensor) -> torch.Tensor:
    """The same from torch's layers: MultiheadAttention, LayerNorm, and a loop over groups."""
    width = ours.width
    attention = nn.MultiheadAttention(width, 8, batch_first=True).double()
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        attention.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
        attention.out_proj.load_state_dict(ours.out.state_dict())
        tokens = nn.functional.relu(ours.embed(x.flatten(2).permute(0, 2, 1)))
        target = ours.norm_query(2 * ours.queries)[None].expand(len(x), -1, -1)
        target = ours.norm_attention(target + attention(target, tokens, tokens)[0])
        target = ours.norm_output(target + ours.contract(nn.functional.relu(ours.expand(target))))
        groups = [target[:, at] @ ours.group_weight[at] for at in range(ours.groups)]
        return torch.cat(groups, 1)[:, : ours.num_classes] + ours.bias


@pytest.mark.parametrize(("classes", "groups", "queries"), [(7, 0, 7), (250, 0, 100), (10, 4, 4)])
def test_it_says_what_torchs_layers_say(classes: int, groups: int, queries: int) -> None:
    torch.manual_seed(0)
    ours = MLDecoder(12, classes, width=48, groups=groups).double().eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(3, 12, 4, 5, dtype=torch.float64)
    assert ours.groups == queries
    torch.testing.assert_close(ours(x), by_torch(ours, x), rtol=1e-11, atol=1e-11)


def test_published_sizes() -> None:
    """768 wide, 2048 hidden, 80 queries for 80 classes; counted by hand: embedding, four projections, the hidden
    layers, three norms, one logit a query with its bias. The queries are no parameters.
    """
    decoder = MLDecoder(2048, 80)
    expected = 2048 * 768 + 768 + 4 * (768 * 768 + 768) + 2 * 768 * 2048 + 2048 + 768 + 3 * 2 * 768 + 80 * 768 + 80
    assert sum(parameter.numel() for parameter in decoder.parameters()) == expected
    assert "queries" in decoder.state_dict()


def test_create_model() -> None:
    net = cs.create_model(spec(), num_classes=80).eval()
    by_name = cs.create_model("resnet18", head="ml_decoder", num_classes=80)
    assert isinstance(net.get_classifier(), MLDecoder)
    assert isinstance(by_name.get_classifier(), MLDecoder)
    assert by_name.spec.head.kind == "ml_decoder"
    assert cs.NetSpec.from_json(by_name.spec.to_json()) == by_name.spec
    x = torch.randn(2, 3, 64, 64)
    features = net.forward_features(x)
    assert net(x).shape == (2, 80)
    torch.testing.assert_close(net(x), net.forward_head(features))
    assert net.forward_head(features, pre_logits=True).shape == (2, 80, 48)
    net.reset_classifier(5)
    assert net(x).shape == (2, 5)
    assert isinstance(cs.create_model(net.spec, head="gap", num_classes=5).get_classifier(), nn.Linear)


def test_macs_by_hand() -> None:
    """Of the head alone: what the pooled one costs is taken off, and both linear heads are known."""
    own, gap = (
        cs.count(cs.create_model(spec(), num_classes=10)),
        cs.count(cs.create_model(spec(), head="gap", num_classes=10)),
    )
    channels, places, width, hidden = own_width(), 4, 48, 128
    decoder = places * channels * width + 10 * width * width  # embedding; queries
    decoder += 2 * places * width * width + 2 * 10 * places * width + 10 * width * width  # keys, values; attention; out
    decoder += 2 * 10 * width * hidden + 10 * width  # hidden layers; one logit a query
    assert own.macs - (gap.macs - 10 * channels) == decoder


def own_width() -> int:
    return spec().map_width


def test_pooled_weights_load_into_it_but_for_the_head() -> None:
    pooled = cs.create_model(spec(), head="gap", num_classes=10)
    net = cs.create_model(spec(), num_classes=80)
    done = cs.load_weights(net, cs.export_weights(pooled, layout="timm"), allow_head_mismatch=True)
    assert all(key.startswith("classifier.") for key in done.fresh)
    torch.testing.assert_close(net.stem[0].conv.weight, pooled.stem[0].conv.weight)
    with pytest.raises(cs.UserError, match="do not fit"):
        cs.load_weights(net, cs.export_weights(pooled, layout="timm"))
    other = cs.create_model(spec(), num_classes=80)
    cs.load_weights(other, cs.export_weights(net, layout="timm"))
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))


def test_same_seed_same_weights() -> None:
    nets = []
    for _ in range(2):
        torch.manual_seed(3)
        nets.append(cs.create_model(spec(), num_classes=6))
    assert torch.equal(nets[0].classifier.queries, nets[1].classifier.queries)
    assert torch.equal(nets[0].classifier.group_weight, nets[1].classifier.group_weight)
    # Xavier's normal of each group: 48 in, 1 out
    assert nets[0].classifier.group_weight.std().item() == pytest.approx((2 / 49) ** 0.5, rel=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "mldecoder"}, "'mldecoder' is unknown.*ml_decoder"),
        ({"head": "ml_decoder", "features_only": True}, "features_only=True gives maps and no classifier"),
        ({"head": "ml_decoder", "global_pool": "max"}, "an ml_decoder head has no pool"),
    ],
)
def test_bad_heads_are_one_line(options: dict, message: str) -> None:
    with pytest.raises(cs.UserError, match=message):
        cs.create_model("resnet18", **options)


def test_an_impossible_width_is_told() -> None:
    with pytest.raises(cs.UserError, match=r"HeadSpec.decoder_width is 100; it must be a multiple of 24"):
        spec(width=100)


@pytest.mark.slow
def test_it_ships_in_float_and_in_8_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """INT8 by the same gate as other networks; what it says stays near."""
    pytest.importorskip("nncf")
    torch.manual_seed(0)
    net = cs.create_model(spec(), num_classes=6).eval()
    images = np.random.default_rng(0).integers(0, 256, (48, 64, 64, 3), dtype=np.uint8)
    how = {"image_size": 64, "thresholds": [0.5] * 6, "verify_images": images}
    plain = cs.export(net, tmp_path / "plain", **how)
    with torch.no_grad():
        expected = net(plain.preprocessing.normalize(torch.from_numpy(images))).numpy()
    np.testing.assert_allclose(plain.logits(images), expected, atol=1e-4)
    # What so small a network takes is chance: INT8 pays.
    monkeypatch.setattr("convscale.ship.export.first_look", lambda artifact, settings: 1.0)
    monkeypatch.setattr("convscale.ship.export.check_pays", lambda *rivals: None)
    small = cs.export(net, tmp_path / "int8", int8=True, calibration_images=images, max_drop=30, **how)
    assert small.precision == "int8"
    assert np.corrcoef(small.logits(images).ravel(), expected.ravel())[0, 1] > 0.95
