"""What a network takes, whoever wrote it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import convscale as cs
from convscale.images.preprocess import Preprocessing
from convscale.networks.inputs import InputFacts, example_input, input_facts
from convscale.networks.resolve import as_module, build_meta, resolve
from convscale.nn.layers import SpaceToDepth


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return self.conv(image) + text


class OneInput(nn.Module):
    """One batch of images; what else it takes has defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)

    def forward(self, image: Tensor, mask: Tensor | None = None, *more: Tensor, scale: float = 1.0) -> Tensor:
        return self.conv(image) * scale


class KeywordInput(OneInput):
    def forward(self, image: Tensor, *, task: str) -> Tensor:  # type: ignore[override]
        return self.conv(image)


def test_a_spec_its_network_and_its_name_say_the_same() -> None:
    spec = cs.get_spec("efficientnet_b1.ra4_e3600_r240_in1k")
    wanted = InputFacts(
        name=spec.name,
        channels=3,
        size=240,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        interpolation="bicubic",
        crop_pct=0.9,
    )  # timm's pretrained_cfg of these weights
    assert input_facts(spec) == input_facts(spec.name) == wanted
    net = build_meta(spec)
    assert input_facts(net) == dataclasses.replace(wanted, name="ConvNet")


def test_a_rectangle_in_the_config_is_a_rectangle_everywhere() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    config = {"input_size": (3, 96, 160), "mean": (0.1, 0.2, 0.3), "std": [0.4, 0.5, 0.6], "crop_pct": 1.0}
    net.pretrained_cfg = config  # type: ignore[assignment]
    facts = input_facts(net)
    assert facts.size == (96, 160)
    assert facts.shape() == (3, 96, 160)
    assert facts.shape(64) == (3, 64, 64)
    assert facts.shape((32, 48)) == (3, 32, 48)
    assert example_input(net).shape == (2, 3, 96, 160)
    assert facts.preprocessing() == Preprocessing(
        image_size=(96, 160), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop_pct=1.0
    )
    assert facts.preprocessing(64).image_size == 64
    assert cs.count(net).macs == 96 * 160 * 12


def test_timms_dataclass_is_read_as_its_dictionary_is() -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        net = timm.create_model("tresnet_m.miil_in1k_448")
    facts = input_facts(net)
    assert (facts.channels, facts.size, facts.mean, facts.std) == (3, 448, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    net.pretrained_cfg = timm.models.get_pretrained_cfg("tresnet_m.miil_in1k_448")
    assert dataclasses.is_dataclass(net.pretrained_cfg)
    assert input_facts(net) == facts


def test_channels_are_the_networks_own() -> None:
    assert input_facts(cs.create_model("tresnet_m", in_chans=1)).channels == 1
    assert input_facts(OneInput()).channels == 1
    packed = OneInput()
    packed.conv = nn.Conv2d(32, 4, 3)
    packed.in_chans = 8  # pyright: ignore[reportAttributeAccessIssue]
    assert input_facts(packed).channels == 8  # by its first convolution it would be 32
    with pytest.raises(cs.UserError, match=r"takes 1 channel\(s\), its pretrained_cfg has the mean of 3"):
        input_facts(cs.create_model("tresnet_m", in_chans=1)).preprocessing()


@pytest.mark.parametrize(
    ("before", "taken", "channels"),
    [
        ([], 16, 16),
        ([], 32, 32),
        ([nn.PixelUnshuffle(4)], 16, 1),
        ([nn.PixelUnshuffle(2)], 12, 3),
        ([SpaceToDepth(4)], 48, 3),
        ([nn.PixelUnshuffle(4)], 12, 12),  # does not go into it
    ],
)
def test_channels_are_fewer_than_the_first_convolutions_behind_space_to_depth_alone(
    before: list[nn.Module], taken: int, channels: int
) -> None:
    net = nn.Sequential(*before, nn.Conv2d(taken, 8, 3), nn.PixelUnshuffle(2))
    assert input_facts(net).channels == channels


def test_timms_space_to_depth_is_known() -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        net = timm.create_model("tresnet_m")
    net.pretrained_cfg, net.default_cfg = {}, {}
    assert input_facts(net).channels == 3


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"input_size": (3, None, None)}, {}),
        ({"input_size": (3, "a", 1)}, {}),
        ({"input_size": (3, float("inf"), 3)}, {}),
        ({"input_size": (3, 8.5, 8)}, {}),
        ({"input_size": True}, {}),
        ({"input_size": (3, 8, 12)}, {"size": (8, 12)}),
        ({"input_size": 12}, {"size": 12}),
        ({"mean": (None,)}, {}),
        ({"mean": ("x",), "std": [True]}, {}),
        ({"mean": (0.5, float("nan"), 0.5)}, {}),
        ({"mean": (0, 1, 0.5)}, {"mean": (0.0, 1.0, 0.5)}),
        ({"crop_pct": float("nan")}, {}),
        ({"crop_pct": True}, {}),
        ({"crop_pct": 0}, {"crop_pct": 0.0}),
        ({"crop_pct": 1}, {"crop_pct": 1.0}),
    ],
)
def test_what_is_no_number_in_a_config_says_nothing(config: dict[str, object], said: dict[str, object]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1))
    plain = input_facts(net)
    net.pretrained_cfg = config  # type: ignore[assignment]
    assert input_facts(net) == dataclasses.replace(plain, **said)


def test_a_share_that_no_crop_has_is_refused_where_it_is_used() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1))
    net.pretrained_cfg = {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0}  # type: ignore[assignment]
    with pytest.raises(cs.UserError, match=r"crop_pct must lie in \[.*, 1\], got 0\.0"):
        input_facts(net).preprocessing(8)


def test_what_is_not_known_is_asked_for() -> None:
    facts = input_facts(OneInput())
    assert (facts.size, facts.mean, facts.std) == (None, None, None)
    with pytest.raises(cs.UserError, match="OneInput does not say its image size; give image_size"):
        facts.shape()
    with pytest.raises(cs.UserError, match=r"preprocessing of OneInput is not known; give preprocessing=Pre"):
        facts.preprocessing(8)


@pytest.mark.parametrize("size", [0, -1, True, "8", 8.0, (8,), (8, 8, 8), (8, 0), (8, "8")])
def test_bad_sizes(size: object) -> None:
    with pytest.raises(cs.UserError, match="image_size must be a whole number of pixels"):
        input_facts(OneInput()).shape(size)  # type: ignore[arg-type]


def test_example_inputs_are_the_same_every_time_in_the_networks_type() -> None:
    net = OneInput().half()
    x = example_input(net, 8, batch_size=3)
    assert (x.shape, x.dtype) == ((3, 1, 8, 8), torch.float16)
    assert torch.equal(x, example_input(net, 8, batch_size=3))


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (TwoInputs(), r"TwoInputs takes 2 inputs \(image, text\); it must take one batch of images"),
        (KeywordInput(), r"KeywordInput takes 2 inputs \(image, task\)"),
    ],
)
def test_a_network_of_several_inputs_is_refused_in_one_line(net: nn.Module, message: str) -> None:
    for ask in (
        lambda: input_facts(net),
        lambda: cs.count(net, image_size=8),
        lambda: cs.measure(net, image_size=8, batch_size=1),
    ):
        with pytest.raises(cs.UserError, match=message) as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_what_is_no_network() -> None:
    for wrong in (5, None, ["resnet18"], cs.NetSpec):
        with pytest.raises(cs.UserError, match="expected a network, a NetSpec or a model's name, got"):
            resolve(wrong)  # type: ignore[arg-type]
        with pytest.raises(cs.UserError, match="expected a network, a NetSpec or a model's name, got"):
            as_module(wrong)  # type: ignore[arg-type]
    with pytest.raises(cs.UserError, match=r"unknown model 'resnet19' \(nearest: "):
        resolve("resnet19")


def test_names_of_modules() -> None:
    assert as_module(OneInput())[1] == "OneInput"
    assert as_module(cs.scale("resnet18", width=0.25))[1] == "resnet18-w0.25"
    assert as_module(cs.create_model("resnet18"))[1] == "resnet18"


def test_asking_about_a_spec_loads_no_torch() -> None:
    script = (
        "import sys, convscale as cs\n"
        "from convscale.networks.inputs import input_facts\n"
        "from convscale.networks.names import spec_of\n"
        "from convscale.networks.resolve import Network\n"
        "assert input_facts('tresnet_m').shape() == (3, 224, 224)\n"
        "assert input_facts(spec_of('resnet18')).preprocessing(64).height == 64\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
