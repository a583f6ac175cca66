"""The layers of a network: by the same calculation as the prediction, to the last row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from convscale.conditions import Conditions
from convscale.cost.counting import count
from convscale.errors import UserError
from convscale.predictor.calibrate import Observation, calibrate
from convscale.predictor.calibration import save_calibration
from convscale.predictor.devices import get_device
from convscale.predictor.predict import Prediction, predict
from convscale.predictor.profile import BACKWARD, ITSELF, UPDATE, WAITING, Profile, profile


def both(net: str, conditions: Conditions, calibrated: bool = False) -> tuple[Prediction, Profile]:
    """The prediction and the profile, by the sheet or by a measurement at two thirds of the predicted speed."""
    c = conditions
    loose = (c.device, c.mode, c.precision, c.image_size, c.batch_size, False, c.layout)
    made = None
    if calibrated:
        large = (*loose[:4], 256, *loose[5:])  # whose time is the GPU's, not its host's
        plain = predict(net, *large, runtime=c.runtime)
        measured = Observation(net=net, conditions=plain.conditions, images_per_s=plain.images_per_s / 1.5)
        made = calibrate([measured])
    return predict(net, *loose, made, c.runtime), profile(net, conditions, calibration=made)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(
    ("device", "precision", "mode", "layout", "runtime", "batch_size"),
    [
        ("v100", "bf16", "infer", "nchw", "eager", 256),  # no matrix units for it: 3.4 times apart before
        ("t4", "bf16", "train", "nhwc", "eager", 32),
        ("rtx-pro-6000-max-q", "amp", "infer", "nchw", "compiled", 64),  # a clock that its power limit lowers
        ("rtx-4090", "amp", "infer", "nchw", "eager", 1),  # launches bind
        ("h100-sxm", "fp16", "infer", "nhwc", "compiled", 1),
        ("b200", "amp", "train", "nchw", "eager", 1),
        ("l4", "fp32", "train", "nchw", "compiled", 16),
        ("cpu", "fp32", "infer", "nchw", "compiled", 1),
        ("a10", "amp_bf16", "infer", "nchw", "eager", 64),
        ("l4", "int8", "infer", "nchw", "tensorrt", 64),
    ],
)
def test_the_layers_add_up_to_the_prediction(
    device: str, precision: str, mode: str, layout: str, runtime: str, batch_size: int, calibrated: bool
) -> None:
    conditions = Conditions(
        device=device, precision=precision, mode=mode, layout=layout, runtime=runtime, batch_size=batch_size
    )
    whole, parts = both("resnet18", conditions, calibrated)
    assert sum(layer.time_s for layer in parts.layers) == pytest.approx(whole.latency_s, rel=1e-12)
    waits = [layer for layer in parts.layers if layer.name == WAITING]
    assert bool(waits) == any("host's launches" in doubt for doubt in whole.doubts)
    for wait in waits:
        assert (wait.kind, wait.bound_by, wait.launches, wait.nbytes, wait.macs) == ("host", "launch", 0, 0, 0)


def test_the_wait_for_the_host_is_a_row_of_its_own() -> None:
    """20 us a module's operator in eager mode: at batch 1 an H100 has done its work long before."""
    found = profile("resnet18", Conditions(device="h100-sxm", precision="fp32", batch_size=1))
    launches = count("resnet18", precision="fp32").kernels
    work_s = sum(layer.time_s for layer in found.layers[:-1])
    assert found.layers[-1].name == WAITING
    assert sum(layer.launches for layer in found.layers) == launches
    assert found.layers[-1].time_s == pytest.approx(20e-6 * launches - work_s)
    assert found.layers[-1].time_s > 0.1 * work_s
    assert WAITING in found.parts()


def test_what_belongs_to_no_module_has_rows_that_say_so() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.conv(x)).mean((2, 3))

    conditions = Conditions(device="v100", mode="train", batch_size=4096, image_size=64)  # too much work to wait
    found = {layer.name: layer for layer in profile(Net(), conditions).layers}
    assert list(found) == ["conv", ITSELF, BACKWARD, UPDATE]
    macs = 4096 * 64 * 64 * 8 * 27
    assert (found["conv"].macs, found[BACKWARD].macs) == (macs, macs)  # the weight's gradient; the image needs none
    assert found[UPDATE].nbytes == 5 * 4 * 8 * 27  # weight, gradient and momentum read, weight and momentum written


def test_roofs_are_the_rates_that_the_precision_reaches() -> None:
    def roof(device: str, precision: str, runtime: str = "eager") -> float:
        conditions = Conditions(device=device, precision=precision, batch_size=8, runtime=runtime)
        found = profile("resnet18", conditions)
        assert found.conditions["precision"] == precision
        return found.peak_tflops

    sheet = get_device("v100")
    assert roof("v100", "amp") == sheet.tensor_tflops
    assert roof("v100", "fp32") == sheet.tf32_tflops
    assert roof("v100", "bf16") == sheet.fp32_tflops  # on its general cores
    assert roof("a10", "bf16") == roof("a10", "amp_bf16") == get_device("a10").tensor_tflops
    assert roof("v100", "amp_bf16") == sheet.fp32_tflops
    assert roof("l4", "int8", "tensorrt") == get_device("l4").int8_tops


def test_a_calibrations_file_does_as_well(tmp_path: Path) -> None:
    plain = predict("resnet18", "a10", batch_size=64)
    made = calibrate([Observation(net="resnet18", conditions=plain.conditions, images_per_s=plain.images_per_s / 2)])
    save_calibration(made, tmp_path / "a10.json")
    conditions = Conditions(device="a10", precision="amp", batch_size=64)
    by_value, by_file = (profile("resnet18", conditions, calibration=c) for c in (made, tmp_path / "a10.json"))
    assert by_value == by_file
    assert sum(layer.time_s for layer in by_value.layers) > 1.5 * plain.latency_s


def test_a_calibration_in_bfloat16_without_matrix_units_hits_what_was_measured() -> None:
    """Calibrated by one rate and predicted by another, the V100 was off by a factor before."""
    plain = predict("resnet50", "v100", precision="bf16", batch_size=64)
    measured = plain.images_per_s * 0.9
    made = calibrate([Observation(net="resnet50", conditions=plain.conditions, images_per_s=measured)])
    again = predict("resnet50", "v100", precision="bf16", batch_size=64, calibration=made)
    assert measured < again.images_per_s < plain.images_per_s


def test_rectangles_and_bad_conditions() -> None:
    found = profile("resnet18", Conditions(device="RTX 4090", precision="amp", batch_size=8), image_size=(96, 128))
    assert (found.conditions["image_size"], found.conditions["device"]) == ((96, 128), "rtx-4090")
    assert found.device == "NVIDIA GeForce RTX 4090"
    with pytest.raises(UserError, match="runtime 'openvino' can not be predicted; speeds on v100 are predicted for e"):
        profile("resnet18", Conditions(device="v100", runtime="openvino"))
    with pytest.raises(UserError, match="'int8' can not be predicted in eager; amp, amp_bf16, bf16, fp16 and fp32 can"):
        profile("resnet18", Conditions(device="v100", precision="int8"))
