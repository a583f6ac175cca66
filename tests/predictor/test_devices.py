"""Data sheets: complete, plausible against each other, found by loose names."""

from __future__ import annotations

import pytest

from convscale.errors import UserError
from convscale.predictor.devices import devices, get_device

NAMES = [
    "v100",
    "t4",
    "rtx-3090",
    "rtx-4090",
    "rtx-5090",
    "rtx-pro-6000",
    "rtx-pro-6000-max-q",
    "a10",
    "a100-40gb",
    "a100-80gb",
    "l4",
    "l40s",
    "h100-sxm",
    "h100-pcie",
    "h200",
    "b200",
    "cpu",
]


def test_all_promised_devices_are_there() -> None:
    assert sorted(devices()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_sheet_is_complete_and_sane(name: str) -> None:
    device = devices()[name]
    assert len(device.source) > 10
    assert device.tensor_tflops >= device.tf32_tflops >= device.fp32_tflops > 0
    assert 50 < device.bandwidth_gb_s < 10_000
    assert 0 < device.sustained <= 1
    assert device.kind == ("cpu" if name == "cpu" else "gpu")


def test_figures_against_arithmetic_of_the_chips() -> None:
    """Units x operations a clock x boost clock: 2048, 1024 and 512 half-precision operations a clock and unit on GA100,
    Volta and Ada.
    """
    assert devices()["a100-40gb"].tensor_tflops == pytest.approx(108 * 2048 * 1.410e9 / 1e12, rel=0.01)
    assert devices()["v100"].tensor_tflops == pytest.approx(80 * 1024 * 1.530e9 / 1e12, rel=0.01)
    assert devices()["rtx-4090"].tensor_tflops == pytest.approx(128 * 512 * 2.520e9 / 1e12, rel=0.01)
    assert devices()["rtx-3090"].fp32_tflops == pytest.approx(82 * 256 * 1.695e9 / 1e12, rel=0.01)
    assert devices()["rtx-3090"].bandwidth_gb_s == pytest.approx(
        384 / 8 * 19.5, rel=0.01
    )  # bus width in bytes x rate a pin
    assert devices()["rtx-5090"].bandwidth_gb_s == pytest.approx(512 / 8 * 28, rel=0.01)


def test_loose_names() -> None:
    assert get_device("RTX 4090").name == "rtx-4090"
    assert get_device("h100_sxm").name == "h100-sxm"
    assert get_device("H100").name == "h100-sxm"
    assert get_device("GeForce RTX 3090").name == "rtx-3090"
    assert get_device("NVIDIA H100 80GB HBM3").name == "h100-sxm"  # as its driver has it
    assert get_device("Tesla T4").name == "t4"
    assert get_device("nvidia-a10").name == "a10"


def test_no_two_devices_share_a_name() -> None:
    for device in devices().values():
        for name in (device.name, device.title, *device.aliases):
            assert get_device(name) is device, name


def test_unknown_device_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"device 'rtx-4900' is unknown \(nearest: rtx-4090"):
        get_device("rtx-4900")
