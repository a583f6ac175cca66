"""What a call costs: hand sums, liveness, sizes, the cache of specs, bad input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from convscale.conditions import Conditions
from convscale.cost import counting as cost
from convscale.cost.counting import count
from convscale.cost.subject import pass_key
from convscale.errors import UserError
from convscale.predictor.largest_batch import predict_largest_batch

COLUMNS = 200


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 8, 1, bias=False), nn.Conv2d(8, 2, 1, bias=False))


def test_sums_by_hand() -> None:
    result = count(chain(), image_size=10, batch_size=3)
    assert result.params == 12 + 32 + 16
    assert result.macs == 100 * (12 + 32 + 16)
    assert result.activations == 100 * (4 + 8 + 2)
    assert result.read_bytes == 4 * (3 * 100 * (3 + 4 + 8) + 60)
    assert result.written_bytes == 4 * 3 * 100 * (4 + 8 + 2)
    assert (result.weight_bytes, result.optimizer_bytes, result.saved_bytes) == (4 * 60, 0, 0)


def test_peak_is_the_widest_moment() -> None:
    # weights and input stay; the second convolution holds its 4 input and 8 output channels at once, the third 8 and 2
    assert count(chain(), image_size=10, batch_size=3).peak_bytes == 4 * 60 + 4 * 3 * 100 * (3 + 4 + 8)


def test_training_keeps_the_maps_for_backward() -> None:
    result = count(chain(), image_size=10, batch_size=3, mode="train")
    assert result.macs == 100 * (12 * 2 + 32 * 3 + 16 * 3)  # the image needs no gradient
    assert result.activations == 100 * (4 + 8 + 2)
    assert (result.weight_bytes, result.optimizer_bytes) == (4 * 60, 4 * 60)  # a momentum for each weight
    assert result.saved_bytes == 4 * 3 * 100 * (3 + 4 + 8)  # each convolution's input
    assert result.peak_bytes >= 2 * 4 * 60 + 4 * 3 * 100 * (3 + 4 + 8 + 2)


def test_batch_changes_bytes_not_macs_per_image() -> None:
    one, eight = count(chain(), 16), count(chain(), 16, batch_size=8)
    assert (one.macs, one.activations) == (eight.macs, eight.activations)
    assert eight.written_bytes == 8 * one.written_bytes


def test_compiled_a_norm_and_an_activation_ride_on_one_pass() -> None:
    """Eager: convolution, norm and ReLU write the map, each its own; compiled: the convolution, and one kernel for both
    others.
    """
    net = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    eager, fused = count(net, 16, 4, precision="amp"), count(net, 16, 4, precision="amp", compiled=True)
    image, a_map = 4 * 3 * 256, 4 * 8 * 256  # elements
    assert eager.written_bytes == 2 * image + 2 * 24 + 3 * 2 * a_map  # casts of image and weights among them
    assert fused.written_bytes == 2 * image + 2 * 24 + 2 * 2 * a_map
    assert (eager.kernels, fused.kernels) == (5, 4)
    assert (eager.compiled, fused.compiled) == (False, True)
    assert (eager.macs, eager.peak_bytes) == (fused.macs, fused.peak_bytes)


def test_own_size_comes_from_the_config() -> None:
    net = chain()
    with pytest.raises(UserError, match="Sequential does not say its image size; give image_size"):
        count(net)
    net.pretrained_cfg = {"input_size": (3, 24, 32)}  # type: ignore[assignment]
    assert count(net).image_size == (24, 32)
    assert count(net, image_size=7).macs == 49 * 60


def test_training_flag_is_ignored() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
    assert count(net.train(), 8).operators == count(net.eval(), 8).operators
    assert not net.training


@pytest.mark.parametrize("size", [0, -3, True, 2.5, (8, 0)])
def test_bad_size(size: object) -> None:
    with pytest.raises(UserError, match="image_size must be a whole number of pixels of at least 1"):
        count(chain(), image_size=size)  # type: ignore[arg-type]


def test_rectangles_by_hand() -> None:
    result = count(chain(), image_size=(6, 10), batch_size=3)
    assert (result.macs, result.image_size) == (60 * (12 + 32 + 16), (6, 10))
    assert result.read_bytes == 4 * (3 * 60 * (3 + 4 + 8) + 60)


def test_int8_is_refused_not_counted_as_single_precision() -> None:
    """Which layers hold 8 bits is settled at export; it gave the figures of fp32 before."""
    with pytest.raises(
        UserError, match=r"precision 'int8' is not counted: .*; count it in fp32, amp, amp_bf16, bf16 or fp16"
    ):
        count(chain(), 8, precision="int8")
    with pytest.raises(UserError, match="precision 'int8' is not counted"):
        predict_largest_batch(chain(), "t4", mode="infer", precision="int8", image_size=8)


def test_int8_is_refused_on_the_command_line(call: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = call("count", "resnet18", "--precision", "int8")
    assert (code, out) == (2, "")
    assert "precision 'int8' is not counted" in " ".join(err.split())


def test_autocast_in_bfloat16_has_two_names_and_moves_as_much_as_in_float16() -> None:
    half, full, *both = (count(chain(), 8, precision=name) for name in ("amp", "fp32", "amp_bf16", "bf16"))
    assert [made.precision for made in both] == ["amp_bf16", "bf16"]
    assert {made.read_bytes for made in both} == {half.read_bytes} != {full.read_bytes}
    assert {made.peak_bytes for made in both} == {half.peak_bytes} != {full.peak_bytes}


@pytest.mark.parametrize("size", [2**31 - 1, (2**31 - 1, 2**17)])
def test_images_that_no_tensor_holds_are_one_line(size: int | tuple[int, int]) -> None:
    with pytest.raises(UserError, match=r"^a batch of 4 x 3 x 2147483647 x \d+ \(.*\) is more than any tensor holds"):
        count(chain(), size, batch_size=4)


def test_bad_net_and_conditions() -> None:
    with pytest.raises(UserError, match="expected a network, a NetSpec or a model's name, got int"):
        count(3)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="mode 'tain' is unknown"):
        count(chain(), 8, mode="tain")
    with pytest.raises(UserError, match="batch_size must be"):
        count(chain(), 8, batch_size=0)


@dataclass(frozen=True)
class Input:
    size: int = 12


@dataclass(frozen=True)
class Spec:
    width: int = 4
    input: Input = field(default_factory=Input)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Widths that were really built; specs of this file build a one-convolution net."""
    widths: list[int] = []

    def build(spec: Spec) -> nn.Module:
        widths.append(spec.width)
        return nn.Conv2d(3, spec.width, 3, bias=True)

    monkeypatch.setattr(cost, "build_meta", build)
    monkeypatch.setenv("CONVSCALE_CACHE", str(tmp_path))
    return widths


def test_a_spec_is_traced_once(built: list[int]) -> None:
    first, second = count(Spec()), count(Spec())  # type: ignore[arg-type]
    assert first == second
    assert first.operators[0] == second.operators[0]
    assert first.macs == 100 * 4 * 27
    count(Spec(), image_size=20)  # type: ignore[arg-type]
    count(Spec(width=5))  # type: ignore[arg-type]
    assert built == [4, 4, 5]


def test_a_key_tells_what_decides_a_pass() -> None:
    def key(kind: str = "trace", compiled: bool = False, **changes: object) -> str:
        stated = replace(Conditions(image_size=8), **changes)  # type: ignore[arg-type]
        return pass_key(kind, Spec(), stated, compiled=compiled)  # type: ignore[arg-type]

    assert key(device="cuda", threads=2, runtime="compiled") == key()
    keys = {key(), key("workload"), key(compiled=True), key(image_size=(8, 9)), key(batch_size=3)}
    keys |= {key(mode="train"), key(precision="amp"), key(layout="nhwc")}
    assert len(keys) == 8


def test_a_broken_cache_is_no_cache(built: list[int], tmp_path: Path) -> None:
    (tmp_path / "costs-v1.sqlite").write_bytes(b"not a database" * 100)
    assert count(Spec()).macs == 100 * 4 * 27  # type: ignore[arg-type]


def test_a_real_net_by_its_published_size() -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        net = timm.create_model("tresnet_m")
    result = count(net)
    assert result.params == 31_389_032
    assert result.macs / 1e9 == pytest.approx(5.737, abs=0.001)
    assert result.image_size == (224, 224)
