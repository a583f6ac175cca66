"""timm's networks by their names, and a user's own by package.module:function."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import convscale as cs
from convscale.arch.spec import NetSpec
from convscale.formats.fold import fold
from convscale.networks.foreign import Foreign, build_foreign, is_reparameterizable, reparameterized
from convscale.networks.inputs import input_facts
from convscale.networks.names import network_of, size_of, spec_of
from convscale.networks.resolve import as_module, find, resolve, shapes_of

FACTORY = """
from torch import nn

def make(num_classes=7):
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))

READY = make(5)
FACTS = 3

def wrong():
    return 3

def passes_on(**options):
    return make(**options)

def knows_no_classes(**options):
    return nn.Conv2d(3, 4, **{"kernel_size": 3, **options})

def broken():
    raise RuntimeError("no weights here")
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """``mine.nets:`` in the working folder."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").touch()
    (tmp_path / "mine/nets.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "mine.nets"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield "mine.nets:"
    for name in ("mine", "mine.nets"):
        sys.modules.pop(name, None)


def test_own_names_win_and_timms_are_found() -> None:
    assert isinstance(find("resnet50.a1_in1k"), NetSpec)
    assert find("vit_tiny_patch16_224") == Foreign("vit_tiny_patch16_224", "timm")
    assert find("timm/resnet18.a1_in1k") == Foreign("resnet18.a1_in1k", "timm")
    assert find("vit_small_patch14_dinov2.lvd142m") == Foreign("vit_small_patch14_dinov2.lvd142m", "timm")  # no figure
    with pytest.raises(cs.UserError, match=r"unknown model 'vit_tiny_patch17_224' \(nearest: vit_tiny_patch16_224"):
        find("vit_tiny_patch17_224")
    with pytest.raises(cs.UserError, match="unknown model 'timm/resnet5'"):
        find("timm/resnet5")


def test_timms_networks_are_counted_as_timm_counts_them() -> None:
    """Parameters of timm's results table; built on the meta device, so that nothing is computed."""
    assert cs.count("vit_tiny_patch16_224.augreg_in21k_ft_in1k").params / 1e6 == pytest.approx(5.72, abs=0.006)
    assert cs.count("timm/resnet18").params == cs.count("resnet18").params
    module, spec = resolve("vit_tiny_patch16_224")
    assert spec is None
    assert module is not None
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}


def test_what_a_name_of_timms_takes_is_what_its_card_says() -> None:
    facts = input_facts("mobilevitv2_075.cvnets_in1k")
    assert (facts.size, facts.crop_pct, facts.mean) == (256, 0.888, (0.0, 0.0, 0.0))  # timm's pretrained_cfg
    assert facts.name == "mobilevitv2_075.cvnets_in1k"
    assert size_of(network_of("mobilevitv2_075.cvnets_in1k")) == 256


def test_a_module_of_timms_has_values_and_no_download() -> None:
    module, name = as_module(find("timm/mobilenetv3_small_050"))
    assert name == "mobilenetv3_small_050"
    assert all(parameter.device.type == "cpu" for parameter in module.parameters())
    measured = cs.measure("timm/mobilenetv3_small_050.lamb_in1k", runtime="eager", image_size=32, batch_size=2,
                          min_seconds=0.01)  # fmt: skip
    assert measured.model == "mobilenetv3_small_050.lamb_in1k"


@pytest.mark.parametrize(
    ("arch", "params"),
    [
        ("repvgg_a0", 8_309_384),  # RepVGG, arXiv 2101.03697, table 4: 8.30 M deployed, 9.10 M trained
        ("mobileone_s1", 4_765_848),  # MobileOne, arXiv 2206.04040, table 9: 4.8 M
        ("repvit_m1", None),
        ("fastvit_t8", None),
        ("repghostnet_050", None),
    ],
)
def test_branches_are_merged_for_inference(arch: str, params: int | None) -> None:
    """The merged network gives the same answers; its shapes need no values."""
    net = timm.create_model(arch, num_classes=10).eval()
    assert is_reparameterizable(net)
    for module in net.modules():  # statistics that are not those of a fresh network
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    merged = reparameterized(net)
    assert merged is not net
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = net(images)
        assert (merged(images) - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    shapes = shapes_of(f"timm/{arch}", fused=True)
    assert {parameter.device.type for parameter in shapes.parameters()} == {"meta"}
    count = sum(parameter.numel() for parameter in shapes.parameters())
    assert count < sum(parameter.numel() for parameter in shapes_of(f"timm/{arch}").parameters())
    assert params is None or count == pytest.approx(params, rel=2e-3)


def test_what_ships_is_merged_too() -> None:
    net = timm.create_model("repvgg_a0", num_classes=10).eval()
    images = torch.randn(2, 3, 32, 32)
    graph = fold(net, images)
    convolutions = [node for node in graph.graph.nodes if "conv2d" in str(node.target)]
    assert len(convolutions) == 22  # RepVGG-A0: 1 + 2 + 4 + 14 + 1 blocks, one 3 x 3 each
    with torch.no_grad():
        assert torch.allclose(graph(images), net(images), atol=1e-4)


def test_a_network_of_ones_own_goes_where_a_name_goes(factory: str) -> None:
    net = build_foreign(Foreign(f"{factory}make", "factory"), num_classes=3, in_chans=3)
    assert net[-1].out_features == 3
    assert cs.count(f"{factory}make", image_size=16).params == 3 * 4 * 9 + 4 + 4 * 7 + 7
    assert cs.count(f"{factory}READY", image_size=16).params == 3 * 4 * 9 + 4 + 4 * 5 + 5
    assert cs.predict(f"{factory}make", device="rtx-4090", image_size=64).images_per_s > 0
    choice = cs.choose(device="rtx-4090", min_throughput=1, candidates=f"{factory}make", image_sizes=[64])
    assert choice.best.name == f"{factory}make"
    assert choice.best.candidate.licence == ""


def test_a_factory_that_takes_any_options_gets_the_number_of_classes(factory: str) -> None:
    net = build_foreign(Foreign("torchvision.models:resnet18", "factory"), num_classes=5, in_chans=1)
    assert (net.fc.out_features, net.conv1.in_channels) == (5, 3)  # in_chans it does not name, nor know
    assert build_foreign(Foreign(f"{factory}passes_on", "factory"), num_classes=4)[-1].out_features == 4
    assert build_foreign(Foreign(f"{factory}passes_on", "factory"), num_classes=None)[-1].out_features == 7
    assert isinstance(build_foreign(Foreign(f"{factory}knows_no_classes", "factory"), num_classes=5), nn.Conv2d)


def test_a_module_that_a_name_leads_to_is_never_trained_in_place(factory: str) -> None:
    """Each network that is built by the name starts from the weights that the user's module has."""
    name = Foreign(f"{factory}READY", "factory")
    first = build_foreign(name)
    kept = first[0].weight.detach().clone()
    with torch.no_grad():
        first[0].weight.zero_()
    assert torch.equal(build_foreign(name)[0].weight, kept)
    assert kept.abs().max() > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.nets:make", "gone.nets can not be imported: No module named 'gone'"),
        ("mine.nets:lost", "mine.nets has no lost"),
        ("mine.nets:wrong", r"gives a int; it must give a torch.nn.Module"),
        ("mine.nets:FACTS", "is a int; it must be a module, or a function that gives one"),
        ("mine.nets:broken", "can not be built: no weights here"),
        (":make", "must be package.module:function"),
        ("mine.nets:1", "must be package.module:function"),
    ],
)
def test_a_factory_that_gives_no_network_is_told(factory: str, name: str, message: str) -> None:
    with pytest.raises(cs.UserError, match=message) as caught:
        cs.count(name, image_size=16)
    assert "\n" not in str(caught.value)


def test_a_size_that_a_factory_does_not_say_is_asked_for(factory: str) -> None:
    with pytest.raises(cs.UserError, match="does not say its image size"):
        cs.choose(device="rtx-4090", min_throughput=1, candidates=f"{factory}make")


def test_a_module_is_a_candidate_too() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    choice = cs.choose(device="rtx-4090", min_throughput=1, candidates=[net, "resnet18.a1_in1k"], image_sizes=[64])
    assert {option.name for option in choice.options} == {"Sequential", "resnet18.a1_in1k"}


def test_only_a_spec_can_be_scaled() -> None:
    with pytest.raises(cs.UserError, match="vit_tiny_patch16_224 is built by other code and has no spec"):
        spec_of("vit_tiny_patch16_224")


def test_timms_own_refusal_is_one_line() -> None:
    with pytest.raises(cs.UserError, match=r"timm's vit_tiny_patch16_224 can not be had") as caught:
        build_foreign(Foreign("vit_tiny_patch16_224", "timm"), what_is_this=3)
    assert "\n" not in str(caught.value)


def test_a_name_that_both_have_is_suggested_once() -> None:
    with pytest.raises(ValueError, match="unknown model 'hgnetv2_b9'") as told:
        find("hgnetv2_b9")
    nearest = str(told.value).partition("nearest: ")[2].partition(")")[0].split(", ")
    assert len(nearest) == len(set(nearest)) >= 2
