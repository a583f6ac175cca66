"""EfficientNetV2 against the paper (arXiv 2104.00298, tables 4 and 7) and its authors' released coefficients."""

from __future__ import annotations

import pytest
import torch

import convscale as cs
from convscale.arch.block import BlockSpec, SESpec
from convscale.arch.parts import IDENTITY, SILU, NormSpec
from convscale.cost.counting import count
from convscale.nn.blocks import build_block

# stage: kind, expansion, stride, channels, layers; table 4
TABLE_4 = [
    ("conv", 1.0, 1, 24, 2),
    ("fused_inverted_residual", 4.0, 2, 48, 4),
    ("fused_inverted_residual", 4.0, 2, 64, 4),
    ("inverted_residual", 4.0, 2, 128, 6),
    ("inverted_residual", 6.0, 1, 160, 9),
    ("inverted_residual", 6.0, 2, 256, 15),
]


@pytest.mark.parametrize("name", ["efficientnetv2_s", "tf_efficientnetv2_s"])
def test_stages_of_s_are_table_4(name: str) -> None:
    spec = cs.get_spec(name)
    rows = []
    for stage in spec.stages:
        (run,) = stage.runs
        rows.append((run.block.kind, run.block.inner_ratio, stage.stride, run.block.width, run.repeat))
        squeezes = run.block.kind == "inverted_residual"
        assert run.block.se == (SESpec(ratio=0.25, activation=SILU) if squeezes else None)
    assert rows == TABLE_4
    assert (spec.stem.widths, spec.head.width) == ((24,), 1280)


@pytest.mark.parametrize(
    ("name", "size", "gmacs", "params_m"),
    [
        ("tf_efficientnetv2_b0", 224, 0.72, 7.1),
        ("tf_efficientnetv2_b1", 240, 1.2, 8.1),
        ("tf_efficientnetv2_b2", 260, 1.7, 10.1),
        ("tf_efficientnetv2_b3", 300, 3.0, 14.4),
        ("tf_efficientnetv2_s", 384, 8.4, 21.5),
        ("tf_efficientnetv2_m", 480, 24.7, 54.1),
    ],
)
def test_counts_are_the_authors(name: str, size: int, gmacs: float, params_m: float) -> None:
    cost = count(name, image_size=size)
    assert cost.macs / 1e9 == pytest.approx(gmacs, rel=0.05)
    assert cost.params / 1e6 == pytest.approx(params_m, abs=0.05)


def test_b3_by_hand() -> None:
    # 16 32 48 96 112 192 times 1.2, to the nearest multiple of 8: 19.2, 38.4, 57.6, 115.2, 134.4, 230.4
    spec = cs.scale("tf_efficientnetv2_b0", width=1.2, depth=1.4, image_size=240)
    assert spec.widths == (16, 40, 56, 112, 136, 232)  # 16 is 83 % of 19.2: no least share here
    assert spec.depths == (2, 3, 3, 5, 7, 12)
    assert (spec.stem.widths, spec.head.width) == ((40,), 1536)
    assert spec.stages == cs.get_spec("tf_efficientnetv2_b3").stages
    assert cs.NetSpec.from_yaml(spec.to_yaml()) == spec


@pytest.mark.parametrize("where", ["inner", ""])
def test_the_fused_block_by_hand(where: str) -> None:
    torch.manual_seed(0)
    se = SESpec(ratio=0.5, where=where) if where else None  # type: ignore[arg-type]
    spec = BlockSpec(
        kind="fused_inverted_residual", width=8, inner_ratio=4.0, se=se, activation=SILU, out_activation=IDENTITY
    )
    block = build_block(spec, 8, 1, norm=NormSpec(), padding="symmetric", drop_path=0.0).double().eval()
    wide, narrow = block.conv1.conv, block.conv2.conv
    assert (wide.weight.shape, narrow.weight.shape) == ((32, 8, 3, 3), (8, 32, 1, 1))
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    eps = (1 + 1e-5) ** -0.5  # of norms that have seen nothing
    with torch.no_grad():
        y = torch.nn.functional.silu(torch.nn.functional.conv2d(x, wide.weight, padding=1) * eps)
        y = block.se(y) if where == "inner" else y
        y = torch.nn.functional.conv2d(y, narrow.weight) * eps
        assert torch.allclose(block(x), x + y, atol=1e-12)
        strided = build_block(spec, 8, 2, norm=NormSpec(), padding="symmetric", drop_path=0.0)
    assert not strided.has_shortcut
    assert strided(x.float()).shape == (2, 8, 3, 3)


def test_fused_blocks_have_one_kernel_and_no_groups() -> None:
    with pytest.raises(cs.UserError, match="one size, and no splits, for a fused_inverted_residual block"):
        BlockSpec(kind="fused_inverted_residual", width=8, expand_groups=2)
    with pytest.raises(cs.UserError, match="None for a fused_inverted_residual block, which has no groups"):
        BlockSpec(kind="fused_inverted_residual", width=8, group_width=4)


def test_torchvisions_weights_are_for_the_networks_that_it_has() -> None:
    from convscale.nn.keymaps import layouts

    assert "torchvision" in layouts(cs.get_spec("efficientnetv2_s"))
    assert "torchvision" not in layouts(cs.get_spec("tf_efficientnetv2_s"))
    assert "torchvision" not in layouts(cs.get_spec("efficientnetv2_rw_s"))
