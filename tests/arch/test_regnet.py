"""RegNets against the paper's figures of its released networks (arXiv 2003.13678, appendix D and its tables)."""

from __future__ import annotations

import pytest

import convscale as cs
from convscale.cost.counting import count

# blocks and channels per stage, channels per group, multiply-accumulates in G, parameters in M
PAPER = {
    "regnetx_002": ((1, 1, 4, 7), (24, 56, 152, 368), 8, 0.2, 2.7),
    "regnetx_004": ((1, 2, 7, 12), (32, 64, 160, 384), 16, 0.4, 5.2),
    "regnetx_006": ((1, 3, 5, 7), (48, 96, 240, 528), 24, 0.6, 6.2),
    "regnetx_008": ((1, 3, 7, 5), (64, 128, 288, 672), 16, 0.8, 7.3),
    "regnetx_016": ((2, 4, 10, 2), (72, 168, 408, 912), 24, 1.6, 9.2),
    "regnetx_032": ((2, 6, 15, 2), (96, 192, 432, 1008), 48, 3.2, 15.3),
    "regnetx_040": ((2, 5, 14, 2), (80, 240, 560, 1360), 40, 4.0, 22.1),
    "regnetx_064": ((2, 4, 10, 1), (168, 392, 784, 1624), 56, 6.5, 26.2),
    "regnetx_080": ((2, 5, 15, 1), (80, 240, 720, 1920), 120, 8.0, 39.6),
    "regnetx_120": ((2, 5, 11, 1), (224, 448, 896, 2240), 112, 12.1, 46.1),
    "regnetx_160": ((2, 6, 13, 1), (256, 512, 896, 2048), 128, 15.9, 54.3),
    "regnetx_320": ((2, 7, 13, 1), (336, 672, 1344, 2520), 168, 31.7, 107.8),
    "regnety_002": ((1, 1, 4, 7), (24, 56, 152, 368), 8, 0.2, 3.2),
    "regnety_004": ((1, 3, 6, 6), (48, 104, 208, 440), 8, 0.4, 4.3),
    "regnety_006": ((1, 3, 7, 4), (48, 112, 256, 608), 16, 0.6, 6.1),
    "regnety_008": ((1, 3, 8, 2), (64, 128, 320, 768), 16, 0.8, 6.3),
    "regnety_016": ((2, 6, 17, 2), (48, 120, 336, 888), 24, 1.6, 11.2),
    "regnety_032": ((2, 5, 13, 1), (72, 216, 576, 1512), 24, 3.2, 19.4),
    "regnety_040": ((2, 6, 12, 2), (128, 192, 512, 1088), 64, 4.0, 20.6),
    "regnety_064": ((2, 7, 14, 2), (144, 288, 576, 1296), 72, 6.4, 30.6),
    "regnety_080": ((2, 4, 10, 1), (168, 448, 896, 2016), 56, 8.0, 39.2),
    "regnety_120": ((2, 5, 11, 1), (224, 448, 896, 2240), 112, 12.1, 51.8),
    "regnety_160": ((2, 4, 11, 1), (224, 448, 1232, 3024), 112, 15.9, 83.6),
    "regnety_320": ((2, 5, 12, 1), (232, 696, 1392, 3712), 232, 32.3, 145.0),
}


@pytest.mark.parametrize("name", PAPER)
def test_stages_and_counts_are_the_papers(name: str) -> None:
    depths, widths, group, gmacs, params_m = PAPER[name]
    spec = cs.get_spec(name)
    assert (spec.depths, spec.widths) == (depths, widths)
    groups = [stage.runs[0].block.group_width for stage in spec.stages]
    assert groups == [min(group, width) for width in widths]
    cost = count(spec)
    assert cost.macs / 1e9 == pytest.approx(gmacs, abs=0.06)  # one digit is published
    assert cost.params / 1e6 == pytest.approx(params_m, abs=0.06)


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("regnetx_004_tv", (32, 64, 160, 400)),  # 392 is half-way between whole groups of 16
        ("regnety_008_tv", (64, 144, 320, 784)),  # so are 136 and 776
        ("regnety_080_tv", (224, 448, 896, 2016)),  # 192 to groups of 56: 168 is less than 90 % of it
    ],
)
def test_torchvision_rounds_some_widths_up(name: str, widths: tuple[int, ...]) -> None:
    from torchvision.models import regnet

    peers = {
        "regnetx_004_tv": "regnet_x_400mf",
        "regnety_008_tv": "regnet_y_800mf",
        "regnety_080_tv": "regnet_y_8gf",
    }
    peer = getattr(regnet, peers[name])()
    spec = cs.get_spec(name)
    assert spec.widths == widths
    assert count(spec).params == sum(p.numel() for p in peer.parameters())


def test_group_widths_are_kept_where_it_is_scaled() -> None:
    spec = cs.scale("regnety_040", width=0.6, depth=0.5)
    # 128, 192, 512, 1088 times 0.6: 76.8, 115.2, 307.2, 652.8; inside, whole groups of 64
    assert spec.widths == (80, 112, 304, 656)
    blocks = [stage.runs[0].block for stage in spec.stages]
    assert [block.group_width for block in blocks] == [64] * 4
    assert [block.inner_width(0) for block in blocks] == [64, 128, 320, 640]
    assert spec.depths == (1, 3, 6, 1)
    assert cs.NetSpec.from_yaml(spec.to_yaml()) == spec
