"""A newcomer's family: one file, with a kind of block that no family has yet."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import convscale as cs
from convscale.arch import families, zoo
from convscale.arch.block import BLOCK_KINDS, BlockKind, BlockSpec
from convscale.arch.parts import NormSpec
from convscale.nn import keymaps
from convscale.nn.blocks import BLOCKS, Block, ConvNormAct

FAMILY = """
from convscale.arch.block import BlockSpec, RunSpec, StageSpec
from convscale.arch.parts import InputSpec, StemSpec
from convscale.arch.spec import NetSpec

BLOCK = BlockSpec(kind="fused", width=8, inner_ratio=2.0)
SPECS = {
    "toy": NetSpec(
        name="toy",
        family="toy",
        input=InputSpec(size=16),
        stem=StemSpec(widths=(8,)),
        stages=(StageSpec(runs=(RunSpec(block=BLOCK, repeat=1),)),),
    )
}
"""


class Fused(Block):
    """A 3x3 convolution that expands, and a 1x1 that projects."""

    def __init__(
        self, spec: BlockSpec, in_chs: int, stride: int, *, norm: NormSpec, padding: str, drop_path: float
    ) -> None:
        super().__init__(spec, in_chs, stride, norm, drop_path)
        inner = spec.inner_width(in_chs)
        self._project_shortcut(spec, in_chs, stride, norm, padding)
        self.conv1 = ConvNormAct(in_chs, inner, spec.kernels, norm=norm, act=spec.activation, stride=stride)
        self.conv2 = ConvNormAct(inner, spec.width, norm=norm, act=self.last_act, keep="input")

    def residual(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> cs.NetSpec:
    """The file in the folder of families, and the kind in its three places."""
    (tmp_path / "toy.py").write_text(FAMILY)
    monkeypatch.setitem(BLOCK_KINDS, "fused", BlockKind(inner_of="input", takes_ratio=True, depthwise=False))
    monkeypatch.setitem(BLOCKS, "fused", Fused)
    monkeypatch.setitem(keymaps.BLOCK_KEYS, "fused", keymaps.BlockKeys(convs=(1, 2), spatial=1))
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    loaded = families.load()
    assert list(loaded)[-1] == "toy"
    assert list(loaded)[:-1] == list(zoo.ARCHITECTURES)
    monkeypatch.setattr(zoo, "ARCHITECTURES", loaded)
    return loaded["toy"]


def test_it_is_listed_built_counted_and_scaled(toy: cs.NetSpec) -> None:
    assert cs.list_models("toy*") == ["toy"]
    assert cs.get_spec("toy") is toy
    net = cs.create_model("toy", num_classes=10)
    stem, block, classifier = 3 * 8 * 9 + 2 * 8, 8 * 16 * 9 + 2 * 16 + 16 * 8 + 2 * 8, 8 * 10 + 10
    assert sum(p.numel() for p in net.parameters()) == stem + block + classifier
    cost = cs.count(net)
    assert cost.params == stem + block + classifier
    assert cost.macs == 64 * (3 * 8 * 9 + 8 * 16 * 9 + 16 * 8) + 80
    assert net.stages[0][0].conv2.norm.weight.abs().max() == 0  # type: ignore[index, union-attr]
    scaled = cs.scale("toy", depth=2, width=3)
    assert (scaled.depths, scaled.widths) == ((2,), (24,))
    assert cs.create_model(scaled, num_classes=0)(torch.randn(2, 3, 16, 16)).shape == (2, 24)


def test_its_weights_and_its_spec_go_out_and_come_back(toy: cs.NetSpec) -> None:
    net, other = cs.create_model("toy"), cs.create_model("toy")
    report = cs.load_weights(other, cs.export_weights(net, layout="convscale"))
    assert report.layout == "convscale"
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))
    assert cs.NetSpec.from_json(toy.to_json()) == toy


def test_a_name_is_given_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "twin.py").write_text("from convscale.arch.families.resnet import SPECS as SPECS\n")
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    with pytest.raises(ValueError, match=r"twin\.py defines 'resnet101', which another family has"):
        families.load()
