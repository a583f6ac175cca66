"""Kernels by hand, the roofline by hand, predictions against what others published, calibration, bad input."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from convscale.conditions import Conditions
from convscale.cost.fusion import fused_kernels, kernels_of
from convscale.cost.kernels import Kernel, eager_kernels, prefers_channels_last
from convscale.errors import UserError
from convscale.machine import Environment
from convscale.predictor.calibrate import Observation, calibrate, observations_of
from convscale.predictor.calibration import RENAMED, Calibration, load_calibration, save_calibration
from convscale.predictor.devices import devices, get_device
from convscale.predictor.fitted import fitted_sets
from convscale.predictor.interval import GROUPS, MARKS
from convscale.predictor.loading import workload_for
from convscale.predictor.predict import predict, predict_workload
from convscale.predictor.roofline import PRIOR, kernel_s, net_s, table_of
from convscale.predictor.workload import load_workload
from convscale.speed.records import Record
from convscale.speed.timing import Measurement
from tests.cost.helpers import trace
from tests.predictor.calibrations import calibration_of


class ConvNormAct(nn.Sequential):
    """16 -> 32 channels on a 16 x 16 map."""

    def __init__(self, groups: int = 1, bias: bool = False) -> None:
        super().__init__(
            nn.Conv2d(16, 32, 3, padding=1, groups=groups, bias=bias), nn.BatchNorm2d(32), nn.ReLU(inplace=True)
        )


def lowered(net: nn.Module, *, compiled: bool, batch_size: int = 2, precision: str = "fp32") -> list[Kernel]:
    traced = trace(net, 16, batch_size, channels=16, precision=precision)
    return fused_kernels(traced) if compiled else eager_kernels(traced)


MAP = 4 * 2 * 32 * 256  # bytes of the output map at batch 2


def test_eager_runs_one_kernel_per_operator_and_one_for_the_bias() -> None:
    kernels = lowered(ConvNormAct(bias=True), compiled=False)
    assert [k.kind for k in kernels] == ["conv", "pointwise_mixed", "batch_norm", "pointwise"]
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
    assert [k.kind for k in kernels] == ["cast", "cast", "conv", "batch_norm", "pointwise"]
    assert kernels[2].itemsize == 2


@pytest.mark.parametrize(("groups", "kind"), [(1, "conv"), (4, "grouped"), (16, "depthwise_native")])
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
    assert kinds == ["pointwise", "copy", "conv_1x1"]
    assert [k.kind for k in lowered(Split(), compiled=True)] == ["fused", "conv_1x1"]


def test_grouped_networks_stay_channels_first_when_compiled() -> None:
    assert prefers_channels_last(trace(ConvNormAct(), 16, channels=16))
    assert not prefers_channels_last(trace(ConvNormAct(4), 16, channels=16))


def test_equal_layers_fall_together() -> None:
    traced = trace(nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(5))), 16, channels=16)
    assert [count for _, count in kernels_of(traced)] == [5]


def flat() -> dict[str, float]:
    """Coefficients of an ideal card: efficiencies 1, no overhead, no cache, no layout changes, the larger of the two
    times.
    """
    return {
        **PRIOR,
        **{name: 1.0 for name in PRIOR if name.startswith(("compute.", "memory."))},
        **{name: 1e-9 for name in PRIOR if name.startswith(("transform.", "small.", "work."))},
        "p": 50.0,
        "overhead_us": 1e-9,
        "peak": 1.0,
        "bandwidth": 1.0,
        **dict.fromkeys(("depth0", "width0", "window.depthwise"), 1e-9),
        **dict.fromkeys(("depthwise.window0", "grouped.width0", "batch_norm_train.channels0"), 1e-9),
        **dict.fromkeys(("depthwise.weight", "depthwise.input", "depthwise.wide", "depthwise_native.generic"), 1.0),
        "cache.gain": 1e-9,
        "permute": 1.0,
        "huge": 1.0,
    }


def test_roofline_by_hand() -> None:
    device = get_device("rtx-3090")  # 71.2 TFLOPS, by its clocks 1.12 times that; 936.2 GB/s
    compute = Kernel("conv", macs=10**12, in_bytes=10**6, out_bytes=10**6, rows=10**6, width=64, depth=576, channels=64)
    memory = Kernel("pointwise", in_bytes=9 * 10**9, out_bytes=9 * 10**9)
    total, arithmetic, traffic = kernel_s(table_of([[(compute, 1), (memory, 1)]]), device, flat())
    assert total == pytest.approx([2e12 / (1.12 * 71.2e12), 18e9 / 936.2e9], rel=1e-3)
    assert arithmetic[0] > traffic[0]
    assert arithmetic[1] == pytest.approx(0, abs=1e-9)
    # Half of both, where no data sheet is a limit.
    slow = {**flat(), "peak": 0.5, "bandwidth": 0.5}
    halved = kernel_s(table_of([[(compute, 1), (memory, 1)]]), device, slow).total_s
    assert halved == pytest.approx([4e12 / (1.12 * 71.2e12), 36e9 / 936.2e9], rel=1e-3)


def test_ragged_channels_cost_their_padding() -> None:
    device, c = get_device("rtx-3090"), flat()
    even = Kernel("conv", macs=10**12, rows=10**6, width=80, depth=720, channels=80)
    odd = Kernel("conv", macs=10**12 * 76 * 76 // 6400, rows=10**6, width=76, depth=684, channels=76)
    times = net_s(table_of([[(even, 1)], [(odd, 1)]]), device, c)
    assert times[1] == pytest.approx(times[0] * c["ragged"], rel=1e-3)


def test_counts_multiply() -> None:
    kernel = Kernel("pointwise", in_bytes=10**9, out_bytes=10**9)
    times = net_s(table_of([[(kernel, 1)], [(kernel, 3)]]), get_device("v100"), PRIOR)
    assert times[1] == pytest.approx(3 * times[0])


@pytest.fixture(scope="module")
def resnet50() -> nn.Module:
    from torchvision.models import resnet50

    with torch.device("meta"):
        return resnet50()


@pytest.mark.parametrize(("mode", "published", "within"), [("infer", 2830, 0.35), ("train", 805, 0.35)])
def test_resnet50_against_the_tresnet_papers_v100(
    resnet50: nn.Module, mode: str, published: float, within: float
) -> None:
    """Ridnik et al., arXiv 2003.13630, table 1: a card and a library version that no coefficient was fitted on."""
    result = predict(resnet50, device="v100", mode=mode, image_size=224, batch_size=256)
    assert abs(math.log(result.images_per_s / published)) < within
    assert result.low < result.images_per_s < result.high


def test_faster_cards_are_faster_and_say_what_binds(resnet50: nn.Module) -> None:
    speeds = {
        name: predict(resnet50, device=name, image_size=224).images_per_s
        for name in ("t4", "v100", "a100-40gb", "a100-80gb", "h200", "b200")
    }
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


def test_a_processors_memory_is_not_known(resnet50: nn.Module) -> None:
    """It is as large as its owner made it; the same batch is beyond a card's."""
    ask: dict[str, Any] = {"image_size": 224, "batch_size": 65536, "precision": "fp32"}
    assert any("needs about" in doubt for doubt in predict(resnet50, device="a100-80gb", **ask).doubts)
    for device in ("cpu", "i7-12700h", "i9-10940x"):
        assert not any("needs about" in doubt for doubt in predict(resnet50, device=device, **ask).doubts)


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
    with pytest.raises(UserError, match=r"device 'rtx-4900' is unknown \(nearest: rtx-4090"):
        predict(resnet50, device="rtx-4900", image_size=224)
    with pytest.raises(UserError, match="give image_size"):
        predict(resnet50)
    with pytest.raises(UserError, match="int8"):
        predict(resnet50, precision="int8", image_size=224)
    with pytest.raises(UserError, match="batch_size"):
        predict(resnet50, image_size=224, batch_size=0)


def test_rectangles_are_predicted(resnet50: nn.Module) -> None:
    tall, wide, square = (
        predict(resnet50, image_size=size, batch_size=64) for size in ((256, 128), (128, 256), (256, 256))
    )
    assert tall.conditions.image_size == (256, 128)
    assert "256x128 px" in str(tall)
    assert predict(resnet50, image_size=(192, 192), batch_size=64) == predict(resnet50, image_size=192, batch_size=64)
    assert square.conditions.image_size == 256
    for half in (tall, wide):  # half the pixels; small maps are a little less even
        assert half.latency_s == pytest.approx(square.latency_s / 2, rel=0.1)
    assert json.loads(json.dumps(tall.to_dict()))["conditions"]["image_size"] == [256, 128]


def test_devices_go_by_other_names_too(resnet50: nn.Module) -> None:
    plain = predict(resnet50, device="h100-sxm", image_size=64)
    assert predict(resnet50, device="H100", image_size=64) == plain
    work = load_workload(resnet50, plain.conditions)
    assert predict_workload(work, dataclasses.replace(plain.conditions, device="h100")) == plain


def test_runtimes_that_nothing_is_predicted_for(resnet50: nn.Module) -> None:
    """They were predicted as PyTorch behind its compiler."""
    conditions = Conditions(device="v100", precision="amp", image_size=64, runtime="openvino")
    work = load_workload(resnet50, dataclasses.replace(conditions, runtime="eager"))
    with pytest.raises(UserError, match="runtime 'openvino' can not be predicted; speeds on v100 are predicted for"):
        predict_workload(work, conditions)
    with pytest.raises(UserError, match="device 'rtx-4900' is unknown"):
        predict_workload(work, dataclasses.replace(conditions, runtime="eager", device="rtx-4900"))


def test_a_stored_workload_is_predicted_without_torch() -> None:
    code = """
import sys
from convscale.conditions import Conditions
from convscale.cost.kernels import Kernel
from convscale.predictor.calibration import load_calibration
from convscale.predictor.predict import predict_workload
from convscale.predictor.workload import Workload
work = Workload(kernels=((Kernel("pointwise", in_bytes=10**9, out_bytes=10**9), 50),), peak_bytes=1, attention=False)
p = predict_workload(work, Conditions(device="rtx-4090", precision="amp", batch_size=256, image_size=64))
print(p.bound_by, round(p.latency_s, 3), "torch" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    bound_by, latency_s, torch_loaded = ran.stdout.split()
    assert (bound_by, torch_loaded) == ("memory", "False")
    assert float(latency_s) == pytest.approx(50 * 2e9 / 1008e9, rel=0.25)  # its bytes at the data sheet's rate


def test_every_set_has_all_coefficients() -> None:
    assert set(fitted_sets()) == {"eager-nchw", "eager-nhwc", "compiled", "train-nchw", "train-nhwc", "cpu"}
    for fitted in fitted_sets().values():
        assert set(fitted.coefficients) == set(PRIOR)
        assert all(value > 0 and np.isfinite(value) for value in fitted.coefficients.values())
        assert set(fitted.sigmas) == {"base", *GROUPS, *MARKS, "factor"}
        assert 0.005 < fitted.sigmas["base"] < 0.2
        assert 0.8 < fitted.sigmas["factor"] < 2.2  # 1.28 if errors were normal; training has heavier tails
        assert set(fitted.devices) <= set(devices())


def observation(net: nn.Module, images_per_s: float, size: int = 64, **changes: object) -> Observation:
    conditions = Conditions(device="l4", precision="amp", batch_size=512, image_size=size)
    # type: ignore[arg-type]
    return Observation(net=net, conditions=dataclasses.replace(conditions, **changes), images_per_s=images_per_s)


def test_one_measurement_sets_the_scale(resnet50: nn.Module) -> None:
    plain = predict(resnet50, device="l4", image_size=64, batch_size=512)
    made = calibrate([observation(resnet50, plain.images_per_s * 0.8)])
    again = predict(resnet50, device="l4", image_size=64, batch_size=512, calibration=made)
    assert (
        0.8 * plain.images_per_s < again.images_per_s < 0.9 * plain.images_per_s
    )  # most of the way, since one network is off by itself too
    assert (again.calibrated, made.count) == (True, 1)
    assert again.high / again.low < plain.high / plain.low
    other = predict(resnet50, device="l4", image_size=128, batch_size=512, calibration=made)
    ratio = other.images_per_s / predict(resnet50, device="l4", image_size=128, batch_size=512).images_per_s
    assert 0.78 < ratio < 0.92


@pytest.mark.parametrize("name", ["convnext_tiny", "tresnet_m"])
def test_a_measurement_as_predicted_changes_nothing_but_the_doubt(resnet50: nn.Module, name: str) -> None:
    """Neither of the network nor of others, which spend more of their time at the data sheet's bandwidth."""
    plain = predict(resnet50, device="a10", image_size=64, batch_size=512)
    made = calibrate([observation(resnet50, plain.images_per_s, device="a10")])
    again = predict(resnet50, device="a10", image_size=64, batch_size=512, calibration=made)
    assert again.images_per_s == pytest.approx(plain.images_per_s, rel=1e-3)
    assert again.high / again.low < plain.high / plain.low
    asked = {"device": "a10", "image_size": 224, "batch_size": 64}
    before, after = (predict(name, calibration=each, **asked) for each in (None, made))
    assert after.images_per_s == pytest.approx(before.images_per_s, rel=1e-3)


def test_a_card_may_run_above_its_sheet(resnet50: nn.Module) -> None:
    """Measured 1.2 times as fast as predicted: what the sheet's bandwidth holds back becomes faster too."""
    plain = predict(resnet50, device="a10", image_size=64, batch_size=512)
    made = calibrate([observation(resnet50, 1.2 * plain.images_per_s, device="a10")])
    again = predict(resnet50, device="a10", image_size=64, batch_size=512, calibration=made)
    assert 1.1 < again.images_per_s / plain.images_per_s < 1.2
    assert made.coefficients["sheet"] < 0.98


def test_measurements_that_wait_for_the_host_are_left_out(resnet50: nn.Module) -> None:
    """At batch 1 the host's 161 launches last, whatever the GPU: they say nothing of it."""
    large = observation(resnet50, predict(resnet50, device="l4", image_size=64, batch_size=512).images_per_s * 0.8)
    small = observation(resnet50, 100.0, batch_size=1)
    said: list[str] = []
    made = calibrate([large, small], said.append)
    assert made.count == 1
    assert made.coefficients == calibrate([large]).coefficients
    assert said == [
        "left out, since the host's launches are predicted to take longer than the GPU's work there: ResNet (batch 1)"
    ]
    with pytest.raises(UserError, match=r"nothing to calibrate with, .*ResNet \(batch 1\); measure larger batches"):
        calibrate([small])


def test_more_measurements_leave_less_doubt(resnet50: nn.Module) -> None:
    def speed(size: int) -> float:
        return 0.8 * predict(resnet50, device="l4", image_size=size, batch_size=512).images_per_s

    one = calibrate([observation(resnet50, speed(64))])
    three = calibrate([observation(resnet50, speed(size), size) for size in (64, 96, 128)])
    assert np.trace(three.covariance) < np.trace(one.covariance)
    asked = {"device": "l4", "image_size": 128, "batch_size": 512}
    off = [abs(predict(resnet50, calibration=made, **asked).images_per_s / speed(128) - 1) for made in (one, three)]
    assert off[1] < off[0]


def test_many_measurements_refit_a_cpu() -> None:
    """A CPU whose time is its MACs over 50 GFLOPS: after a dozen networks the rest follows within 15 %."""
    nets = [
        nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1))
        for width in range(16, 216, 16)
    ]

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


def record_of(name: str, source: str = "convscale", mode: str = "infer") -> Record:
    measurement = Measurement(
        times_s=(0.1,) * 5,
        conditions=Conditions(device="cpu", batch_size=2, image_size=64, mode=mode),
        environment=Environment(device_name="a processor", cores=2),
    )
    return Record(model=name, measurement=measurement, source=source)


@pytest.mark.parametrize(
    ("source", "mode", "params"),
    [("convscale", "infer", 8.31), ("kit", "infer", 8.31), ("convscale", "train", 9.11), ("timm.csv", "infer", 9.11)],
)
def test_a_measured_network_is_traced_in_the_form_that_was_timed(source: str, mode: str, params: float) -> None:
    """RepVGG-A0 has 8.31 M parameters merged, as ``measure`` and kits time it, and 9.11 M as trained."""
    (observation,), unknown = observations_of([record_of("repvgg_a0", source, mode)], "cpu")
    assert unknown == []
    assert workload_for(observation.net, observation.conditions).params / 1e6 == pytest.approx(params, abs=0.006)


@pytest.mark.parametrize("source", ["convscale", "timm.csv"])
def test_names_that_nothing_builds_are_left_out_and_run_no_code(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm refused such names with errors of all kinds, and asked the network for some."""
    (tmp_path / "mynets.py").write_text("raise SystemExit('a row of a file ran this')")
    monkeypatch.chdir(tmp_path)
    names = ["mynets:make", "someone/net", "hf-hub:someone/net", "http://[", "resnet18.no_such_tag", "nobody_knows_it"]
    found, unknown = observations_of([record_of(name, source) for name in [*names, "resnet18"]], "cpu")
    assert unknown == names
    assert [getattr(each.net, "name", "") for each in found] == ["resnet18"]
    assert "mynets" not in sys.modules


def test_calibration_on_disk(tmp_path: Path) -> None:
    made = calibration_of("t4")
    save_calibration(made, tmp_path / "t4.json")
    assert load_calibration(tmp_path / "t4.json") == made
    value = made.to_dict()
    del value["coefficients"]["peak"]
    with pytest.raises(UserError, match=r"not a calibration: coefficients are missing \(peak\)"):
        Calibration.from_dict(value)
    with pytest.raises(UserError, match="a calibration has format 2, this version of convscale reads 3 to 5"):
        Calibration.from_dict({**made.to_dict(), "format": 2})
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(UserError, match=r"bad\.json holds a list, not an object"):
        load_calibration(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"covariance": None}, "covariance is None; it must be 3 rows of 3 numbers"),
        ({"covariance": [[0.01, 0.0]] * 3}, "it must be 3 rows of 3 numbers"),
        ({"covariance": [[0.01, 0.0, "x"]] * 3}, "covariance is 'x'; it must be numbers"),
        ({"count": -1}, "count is -1; it must be a whole number of at least 1"),
        ({"threads": "2"}, "threads is '2'; it must be a whole number"),
        ({"scale": 0.0}, r"scale is 0\.0; it must be a factor above 0"),
        ({"device": ["t4"]}, "device is .*; it must be text"),
        ({"coefficients": dict(PRIOR) | {"peak": 1e300}}, r"peak is 1e\+300; it must be from 1e-06 to 1e\+06"),
        ({"coefficients": None}, "not a calibration: "),
    ],
)
def test_a_part_of_a_calibration_that_can_not_be_used_is_named(change: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Calibration.from_dict(calibration_of("t4").to_dict() | change)


def test_a_calibration_of_the_format_before_is_read() -> None:
    """Format 3 had the same coefficients by older names."""
    made = calibration_of("t4")
    old_names = {new: old for old, new in RENAMED.items()}
    old = {**made.to_dict(), "format": 3}
    old["coefficients"] = {old_names.get(name, name): value for name, value in made.coefficients.items()}
    assert {"stats0", "compute.even", "memory.uneven", "direct.weight", "window0"} <= set(old["coefficients"])
    assert Calibration.from_dict(old) == made


def test_calibration_refuses_other_conditions(resnet50: nn.Module) -> None:
    made = calibration_of("t4")
    with pytest.raises(UserError, match="made for device 't4', not 'v100'"):
        predict(resnet50, device="v100", image_size=64, calibration=made)
    with pytest.raises(UserError, match="calibration is 3; it must be what calibrate gave, or a file of"):
        predict(resnet50, device="t4", image_size=64, calibration=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="at least one measured network"):
        calibrate([])
    with pytest.raises(UserError, match="made for precision 'amp', not 'fp32'"):
        predict(resnet50, device="t4", precision="fp32", image_size=64, calibration=made)
    with pytest.raises(UserError, match="share their precision"):
        calibrate([observation(resnet50, 10.0), observation(resnet50, 10.0, precision="fp32")])
    with pytest.raises(UserError, match="runtime 'openvino' can not be predicted; speeds on l4 are predicted for"):
        calibrate([observation(resnet50, 10.0, runtime="openvino")])
    with pytest.raises(UserError, match="share their layout"):
        calibrate([observation(resnet50, 10.0), observation(resnet50, 10.0, layout="nhwc")])


def depthwise(channels: int, kernel: int, stride: int, size: int, layout: str, precision: str = "fp16") -> str:
    conv = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)
    traced = trace(conv, size, 4, channels=channels, precision=precision, layout=layout)
    return next(k.kind for k in eager_kernels(traced) if k.macs)


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "size", "layout", "precision", "kind"),
    [
        (64, 3, 1, 56, "nchw", "fp16", "depthwise"),
        (64, 7, 1, 56, "nchw", "fp16", "depthwise_native"),  # cuDNN's depthwise kernels are 1, 3 and 5 wide
        (16, 3, 1, 56, "nchw", "fp16", "depthwise_native"),  # and want 32 channels
        (64, 3, 2, 56, "nchw", "fp16", "depthwise_native"),  # and many channels where they stride
        (512, 3, 2, 14, "nchw", "fp16", "depthwise"),
        (64, 3, 1, 56, "nchw", "fp32", "depthwise_native"),
        (64, 7, 1, 56, "nhwc", "fp16", "depthwise"),  # channels-last is always cuDNN's
    ],
)
def test_who_runs_a_depthwise_convolution(
    channels: int, kernel: int, stride: int, size: int, layout: str, precision: str, kind: str
) -> None:
    """PyTorch's rule, aten/src/ATen/native/Convolution.cpp, ``use_cudnn_depthwise`` and
    ``check_cudnn_depthwise_workload_with_filter``.
    """
    assert depthwise(channels, kernel, stride, size, layout, precision) == kind


@pytest.mark.parametrize(
    ("channels", "groups", "dilation", "kind"),
    [(128, 32, 1, "grouped_packed"), (64, 4, 1, "grouped_pow2"), (96, 4, 1, "grouped"), (128, 32, 2, "grouped")],
)
def test_kinds_of_grouped_convolutions(channels: int, groups: int, dilation: int, kind: str) -> None:
    conv = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, groups=groups, bias=False)
    assert [k.kind for k in eager_kernels(trace(conv, 16, 2, channels=channels))] == [kind]


def test_pointwise_kernels_that_spread_or_mix_are_told_apart() -> None:
    class Gate(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(x)
            return x * x.mean((2, 3), keepdim=True) + x

    assert [k.kind for k in lowered(Gate(), compiled=False)] == ["pointwise", "reduce", "pointwise_mixed", "pointwise"]
    assert not any(k.permuted for k in lowered(Gate(), compiled=False))


def test_batch_norm_in_training_is_its_own_kind() -> None:
    traced = trace(ConvNormAct(), 16, 2, channels=16, mode="train")
    kinds = [(k.kind, k.phase) for k in eager_kernels(traced) if k.kind in ("batch_norm", "batch_norm_train")]
    assert kinds == [("batch_norm_train", "forward"), ("batch_norm_train", "backward")]


def test_few_channels_leave_units_idle_in_training_norms() -> None:
    """One block a channel: as many bytes in 4 channels take longer than in 256, channels first; channels-last is spread
    evenly.
    """
    device, c = get_device("rtx-3090"), flat() | {"batch_norm_train.channels0": 16.0}
    few, many = (
        Kernel("batch_norm_train", in_bytes=10**9, out_bytes=10**9, channels=channels, side=56) for channels in (4, 256)
    )
    times = net_s(
        table_of([[(few, 1)], [(many, 1)], [(few._replace(nhwc=True), 1)], [(many._replace(nhwc=True), 1)]]), device, c
    )
    assert times[0] / times[1] == pytest.approx((1 + 16 / 4) / (1 + 16 / 256), rel=1e-3)
    assert times[2] == pytest.approx(times[3])


def test_a_tiny_product_does_not_fill_the_card() -> None:
    device, c = get_device("h100-sxm"), flat()
    one = Kernel("conv_1x1", macs=128 * 128 * 4096, rows=128, width=128, depth=4096, channels=4096)
    full = one._replace(macs=one.macs * 132, rows=128 * 132)
    times = net_s(table_of([[(one, 1)], [(full, 1)]]), device, c)
    assert times[1] == pytest.approx(
        4 * times[0] / device.sustained, rel=1e-3
    )  # 132 tiles on 132 units, where one tile was split among four; the full card runs into its power limit


@pytest.mark.parametrize(("runtime", "title"), [("tensorrt", "TensorRT"), ("onnxruntime", "ONNX Runtime")])
def test_a_runtime_of_no_table_is_compiled_pytorch_with_a_doubt_and_a_wide_interval(
    resnet50: nn.Module, runtime: str, title: str
) -> None:
    """The interval by hand: half-widths in the logarithm, compiled PyTorch's and that of 2.5 times, in quadrature."""
    by = predict(resnet50, device="l4", image_size=64, batch_size=64, compiled=True)
    p = predict(resnet50, device="l4", image_size=64, batch_size=64, runtime=runtime)
    assert p.images_per_s == by.images_per_s
    half = math.hypot(math.log(by.high / by.images_per_s), math.log(2.5))
    assert p.high / p.images_per_s == pytest.approx(math.exp(half), rel=1e-9)
    assert p.low / p.images_per_s == pytest.approx(math.exp(-half), rel=1e-9)
    assert p.doubts[0] == (
        f"no table speaks of {title}: predicted by compiled PyTorch's speed, the interval widened 2.5 times either way"
    )
    assert p.doubts[1:] == by.doubts
    assert p.conditions.runtime == runtime


def test_measurements_in_a_runtime_of_no_table_move_the_prediction_there(resnet50: nn.Module) -> None:
    """TensorRT as twice as fast as predicted: one measurement moves the figure most of the way, and the doubt ends."""
    before = predict(resnet50, device="l4", image_size=64, batch_size=512, runtime="tensorrt")
    measured = Observation(net=resnet50, conditions=before.conditions, images_per_s=2 * before.images_per_s)
    after = predict(
        resnet50, device="l4", image_size=64, batch_size=512, runtime="tensorrt", calibration=calibrate([measured])
    )
    assert 1.6 < after.images_per_s / before.images_per_s < 2.1
    assert after.high / after.low < before.high / before.low
    assert not any("TensorRT" in doubt for doubt in after.doubts)


def test_one_runtime_is_asked_for(resnet50: nn.Module) -> None:
    with pytest.raises(UserError, match="compiled=True and runtime 'eager' exclude each other"):
        predict(resnet50, device="l4", image_size=64, compiled=True, runtime="eager")
    with pytest.raises(UserError, match="runtime tensorrt can not train; eager and compiled PyTorch can"):
        predict(resnet50, device="l4", image_size=64, mode="train", runtime="tensorrt")


@pytest.mark.parametrize(
    ("device", "given", "wanted"),
    [
        ("rtx-4090", {}, (256, "amp", "eager")),
        ("rtx-4090", {"compiled": True, "batch_size": 2}, (2, "amp", "compiled")),
        ("Intel Core i9-10940X", {}, (1, "fp32", "compiled")),
        ("i9-10940x", {"mode": "train"}, (1, "fp32", "eager")),
        ("i9-10940x", {"runtime": "eager", "precision": "amp", "batch_size": 4}, (4, "amp", "eager")),
        ("cpu", {}, (8, "fp32", "eager")),
    ],
)
def test_what_is_left_out_is_what_the_tables_of_the_device_hold(
    device: str, given: dict[str, object], wanted: tuple[int, str, str]
) -> None:
    c = predict(ConvNormAct(), device, image_size=16, **given).conditions  # pyright: ignore[reportArgumentType]
    assert (c.batch_size, c.precision, c.runtime) == wanted
