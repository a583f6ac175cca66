"""Kernels by hand, the roofline by hand, predictions against what others published, calibration, bad input."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from convscale.errors import UserError
from convscale.speed.calibrate import Calibration, Observation, calibrate, load_calibration, save_calibration
from convscale.speed.conditions import Conditions
from convscale.speed.device import devices, get_device
from convscale.speed.kernels import Kernel, eager_kernels, fused_kernels, kernels_of, prefers_channels_last
from convscale.speed.predict import fitted_sets, predict
from convscale.speed.roofline import PRIOR, kernel_s, net_s, table_of
from convscale.speed.trace import trace


class ConvNormAct(nn.Sequential):
    """16 -> 32 channels on a 16 x 16 map."""

    def __init__(self, groups: int = 1, bias: bool = False) -> None:
        super().__init__(nn.Conv2d(16, 32, 3, padding=1, groups=groups, bias=bias), nn.BatchNorm2d(32), nn.ReLU(inplace=True))


def lowered(net: nn.Module, *, compiled: bool, batch_size: int = 2, precision: str = "fp32") -> list[Kernel]:
    traced = trace(net, 16, batch_size, channels=16, precision=precision)
    return fused_kernels(traced) if compiled else eager_kernels(traced)


MAP = 4 * 2 * 32 * 256  # bytes of the output map at batch 2


def test_eager_runs_one_kernel_per_operator_and_one_for_the_bias() -> None:
    kernels = lowered(ConvNormAct(bias=True), compiled=False)
    assert [k.kind for k in kernels] == ["conv", "point", "norm", "point"]
    conv, bias, norm, relu = kernels
    assert (conv.rows, conv.width, conv.depth, conv.channels) == (2 * 256, 32, 16 * 9, 16)
    assert conv.macs == 2 * 256 * 32 * 144
    assert (conv.in_bytes, conv.out_bytes, conv.weight_bytes) == (MAP // 2, MAP, 4 * 32 * 144)
    assert (bias.in_bytes, bias.out_bytes) == (MAP, MAP)
    assert (norm.in_bytes, norm.out_bytes) == (MAP + 4 * 4 * 32, MAP)
    assert (relu.in_bytes, relu.out_bytes) == (MAP, MAP)


def test_a_compiler_joins_norm_and_activation() -> None:
    kernels = lowered(ConvNormAct(), compiled=True)
    assert [k.kind for k in kernels] == ["conv", "fused"]
    assert (kernels[1].in_bytes, kernels[1].out_bytes) == (MAP + 4 * 4 * 32, MAP)


def test_a_residual_is_read_once_and_written_once() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(16, 16, 1, bias=False), nn.Conv2d(16, 16, 1, bias=False)
            self.norm = nn.BatchNorm2d(16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            return torch.relu(self.norm(self.b(x)) + x)

    fused = [k for k in lowered(Residual(), compiled=True) if k.kind == "fused"]
    half = MAP // 2
    assert [(k.in_bytes, k.out_bytes) for k in fused] == [(2 * half + 4 * 4 * 16, half)]


def test_casts_of_weights_are_kernels() -> None:
    kernels = lowered(ConvNormAct(), compiled=False, precision="amp")
    assert [k.kind for k in kernels] == ["cast", "cast", "conv", "norm", "point"]
    assert kernels[2].itemsize == 2


@pytest.mark.parametrize(("groups", "kind"), [(1, "conv"), (4, "group"), (16, "depthwise")])
def test_kinds_of_convolutions(groups: int, kind: str) -> None:
    assert lowered(ConvNormAct(groups), compiled=False)[0].kind == kind


def test_split_channels_are_gathered_first() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(torch.relu(x)[:, 8:])

    kinds = [k.kind for k in lowered(Split(), compiled=False)]
    assert kinds == ["point", "copy", "conv1"]
    assert [k.kind for k in lowered(Split(), compiled=True)] == ["fused", "conv1"]


def test_grouped_networks_stay_channels_first_when_compiled() -> None:
    assert prefers_channels_last(trace(ConvNormAct(), 16, channels=16))
    assert not prefers_channels_last(trace(ConvNormAct(4), 16, channels=16))


def test_equal_layers_fall_together() -> None:
    traced = trace(nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(5))), 16, channels=16)
    assert [count for _, count in kernels_of(traced)] == [5]


def flat() -> dict[str, float]:
    """Coefficients of an ideal card: efficiencies 1, no overhead, no cache, no layout changes, the larger of the two times."""
    return {
        **PRIOR,
        **{name: 1.0 for name in PRIOR if name.startswith(("compute.", "memory."))},
        **{name: 1e-9 for name in PRIOR if name.startswith(("transform.", "small."))},
        "p": 50.0,
        "overhead_us": 1e-9,
        "peak": 1.0,
        "bandwidth": 1.0,
        "depth0": 1e-9,
        "width0": 1e-9,
        "cache.gain": 1e-9,
        "permute": 1.0,
        "huge": 1.0,
    }


def test_roofline_by_hand() -> None:
    device = get_device("rtx-3090")  # 71.2 TFLOPS, 936.2 GB/s
    compute = Kernel("conv", macs=10**12, in_bytes=10**6, out_bytes=10**6, width=64, depth=576, channels=64)
    memory = Kernel("point", in_bytes=9 * 10**9, out_bytes=9 * 10**9)
    total, arithmetic, traffic = kernel_s(table_of([[(compute, 1), (memory, 1)]]), device, flat())
    assert total == pytest.approx([2e12 / 71.2e12, 18e9 / 936.2e9], rel=1e-3)
    assert arithmetic[0] > traffic[0]
    assert arithmetic[1] == 0


def test_ragged_channels_cost_their_padding() -> None:
    device, c = get_device("rtx-3090"), flat()
    even = Kernel("conv", macs=10**12, width=80, depth=720, channels=80)
    odd = Kernel("conv", macs=10**12 * 76 * 76 // 6400, width=76, depth=684, channels=76)
    times = net_s(table_of([[(even, 1)], [(odd, 1)]]), device, c)
    assert times[1] == pytest.approx(times[0] * c["ragged"], rel=1e-3)


def test_counts_multiply() -> None:
    kernel = Kernel("point", in_bytes=10**9, out_bytes=10**9)
    times = net_s(table_of([[(kernel, 1)], [(kernel, 3)]]), get_device("v100"), PRIOR)
    assert times[1] == pytest.approx(3 * times[0])


@pytest.fixture(scope="module")
def resnet50() -> nn.Module:
    from torchvision.models import resnet50

    with torch.device("meta"):
        return resnet50()


@pytest.mark.parametrize(("mode", "published", "within"), [("infer", 2830, 0.35), ("train", 805, 0.35)])
def test_resnet50_against_the_tresnet_papers_v100(resnet50: nn.Module, mode: str, published: float, within: float) -> None:
    """Ridnik et al., arXiv 2003.13630, table 1: a card and a library version that no coefficient was fitted on."""
    result = predict(resnet50, device="v100", mode=mode, image_size=224, batch_size=256)
    assert abs(math.log(result.images_per_s / published)) < within
    assert result.low < result.images_per_s < result.high


def test_faster_cards_are_faster_and_say_what_binds(resnet50: nn.Module) -> None:
    speeds = {name: predict(resnet50, device=name, image_size=224).images_per_s for name in ("t4", "v100", "a100-40gb", "a100-80gb", "h200", "b200")}
    assert list(speeds.values()) == sorted(speeds.values())
    result = predict(resnet50, device="rtx-4090", image_size=224)
    assert sum(result.shares.values()) == pytest.approx(1)
    assert result.bound_by == "memory"  # eager batch norm and ReLU move more bytes than the convolutions take time
    assert result.conditions.device == "rtx-4090"
    assert "predicted" in str(result)


def test_compiled_is_faster_than_eager_and_training_slower(resnet50: nn.Module) -> None:
    eager = predict(resnet50, image_size=224).images_per_s
    assert predict(resnet50, image_size=224, compiled=True).images_per_s > 1.2 * eager
    assert predict(resnet50, image_size=224, mode="train").images_per_s < 0.5 * eager


def test_the_module_may_be_in_either_mode(resnet50: nn.Module) -> None:
    before = predict(resnet50.eval(), image_size=64)
    assert predict(resnet50.train(), image_size=64) == before
    assert resnet50.training


def test_a_batch_that_does_not_fit_is_a_doubt(resnet50: nn.Module) -> None:
    fits = predict(resnet50, device="rtx-3090", image_size=224, batch_size=256)
    assert not any("needs about" in doubt for doubt in fits.doubts)
    large = predict(resnet50, device="rtx-3090", image_size=224, batch_size=16384)
    assert any("needs about" in doubt and "24 GB" in doubt for doubt in large.doubts)
    assert large.images_per_s > 0


def test_small_batches_are_bound_by_launches(resnet50: nn.Module) -> None:
    result = predict(resnet50, device="h100-sxm", image_size=64, batch_size=1)
    assert result.bound_by == "launch"
    assert any("host's launches" in doubt for doubt in result.doubts)


def test_unknown_cards_widen_the_interval(resnet50: nn.Module) -> None:
    known, new = predict(resnet50, device="rtx-3090", image_size=224), predict(resnet50, device="a10", image_size=224)
    assert new.high / new.low > known.high / known.low
    assert any("data sheet" in doubt for doubt in new.doubts)
    assert not known.doubts


def test_doubts_of_known_weak_spots() -> None:
    ragged = nn.Sequential(*(nn.Conv2d(76, 76, 3, padding=1, bias=False) for _ in range(4)))
    ragged.in_chans = 76  # type: ignore[assignment]
    assert any("multiple of 8" in doubt for doubt in predict(ragged, image_size=56).doubts)
    large = nn.Sequential(*(nn.Conv2d(64, 64, 9, padding=4, groups=64, bias=False) for _ in range(4)))
    large.in_chans = 64  # type: ignore[assignment]
    assert any("larger than 5 x 5" in doubt for doubt in predict(large, image_size=56).doubts)
    assert any("bfloat16" in doubt for doubt in predict(ragged, device="v100", precision="bf16", image_size=56).doubts)


def test_bad_input(resnet50: nn.Module) -> None:
    with pytest.raises(UserError, match=r"device 'rtx-4080' is unknown \(nearest: rtx-4090"):
        predict(resnet50, device="rtx-4080", image_size=224)
    with pytest.raises(UserError, match="give image_size"):
        predict(resnet50)
    with pytest.raises(UserError, match="int8"):
        predict(resnet50, precision="int8", image_size=224)
    with pytest.raises(UserError, match="batch_size"):
        predict(resnet50, image_size=224, batch_size=0)


def test_every_set_has_all_coefficients() -> None:
    assert set(fitted_sets()) == {"eager-nchw", "eager-nhwc", "compiled", "train-nchw", "train-nhwc", "cpu"}
    for fitted in fitted_sets().values():
        assert set(fitted.coefficients) == set(PRIOR)
        assert all(value > 0 and np.isfinite(value) for value in fitted.coefficients.values())
        assert 0.02 < fitted.spread < 0.6
        assert set(fitted.cards) <= set(devices())


def observation(net: nn.Module, images_per_s: float, size: int = 64, **changes: object) -> Observation:
    conditions = Conditions(device="t4", precision="amp", batch_size=64, image_size=size)
    return Observation(net=net, conditions=dataclasses.replace(conditions, **changes), images_per_s=images_per_s)  # type: ignore[arg-type]


def test_one_measurement_sets_the_scale(resnet50: nn.Module) -> None:
    plain = predict(resnet50, device="t4", image_size=64, batch_size=64)
    made = calibrate([observation(resnet50, plain.images_per_s * 0.8)])
    assert (made.count, made.coefficients) == (1, None)
    again = predict(resnet50, device="t4", image_size=64, batch_size=64, calibration=made)
    assert again.images_per_s == pytest.approx(0.8 * plain.images_per_s)
    assert again.calibrated
    assert again.high / again.low < plain.high / plain.low
    other = predict(resnet50, device="t4", image_size=128, batch_size=64, calibration=made)
    assert other.images_per_s == pytest.approx(0.8 * predict(resnet50, device="t4", image_size=128, batch_size=64).images_per_s)


def test_many_measurements_refit_a_cpu() -> None:
    """A CPU whose time is its MACs over 50 GFLOPS: after a dozen networks the rest follows within 15 %."""
    nets = [nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)) for width in range(16, 216, 16)]

    def truth(width: int, size: int) -> float:
        return 50e9 / (2 * size * size * width * 9 * (3 + width))

    def on(width: int, net: nn.Module, size: int) -> Observation:
        conditions = Conditions(device="cpu", batch_size=1, image_size=size)
        return Observation(net=net, conditions=conditions, images_per_s=truth(width, size))

    widths = list(range(16, 216, 16))
    made = calibrate([on(width, net, 64) for width, net in zip(widths, nets, strict=True)])
    assert made.coefficients is not None
    net = nn.Sequential(nn.Conv2d(3, 104, 3, padding=1), nn.Conv2d(104, 104, 3, padding=1))
    result = predict(net, device="cpu", precision="fp32", image_size=96, batch_size=1, calibration=made)
    assert result.images_per_s == pytest.approx(truth(104, 96), rel=0.15)


def test_calibration_on_disk(tmp_path: Path) -> None:
    made = Calibration(device="t4", mode="infer", runtime="eager", layout="nchw", count=1, scale=1.25)
    save_calibration(made, tmp_path / "t4.json")
    assert load_calibration(tmp_path / "t4.json") == made
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(UserError, match=r"can not be read"):
        load_calibration(tmp_path / "bad.json")


def test_calibration_refuses_other_conditions(resnet50: nn.Module) -> None:
    made = Calibration(device="t4", mode="infer", runtime="eager", layout="nchw", count=1)
    with pytest.raises(UserError, match="made for device 't4', not 'v100'"):
        predict(resnet50, device="v100", image_size=64, calibration=made)
    with pytest.raises(UserError, match="at least one measured network"):
        calibrate([])
    with pytest.raises(UserError, match="share their layout"):
        calibrate([observation(resnet50, 10.0), observation(resnet50, 10.0, layout="nhwc")])
