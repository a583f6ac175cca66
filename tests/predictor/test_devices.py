"""Data sheets: complete, plausible against each other, found by loose names."""

from __future__ import annotations

import pytest

from convscale.errors import UserError
from convscale.predictor.devices import devices, get_device, is_processor, is_processor_here, was_on

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
    "v100-32gb",
    "v100-pcie",
    "v100-pcie-32gb",
    "a100-pcie-40gb",
    "a100-pcie-80gb",
    "h100-nvl",
    "h100-pcie",
    "h200",
    "b200",
    "rtx-3080",
    "rtx-4070",
    "rtx-4080",
    "rtx-a6000",
    "rtx-6000-ada",
    "mi210",
    "mi250",
    "mi300x",
    "jetson-orin",
    "i7-12700h",
    "i9-10940x",
    "cpu",
]
PROCESSORS = ("i7-12700h", "i9-10940x", "cpu")


def test_all_promised_devices_are_there() -> None:
    assert sorted(devices()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_sheet_is_complete_and_sane(name: str) -> None:
    device = devices()[name]
    assert len(device.source) > 10
    assert device.tensor_tflops >= device.tf32_tflops >= device.fp32_tflops > 0
    assert 50 < device.bandwidth_gb_s < 10_000
    assert device.int8_tops >= device.tensor_tflops * (1 if device.bfloat16 else 0.5)
    assert 0 < device.sustained <= 1
    assert device.kind == ("cpu" if name in PROCESSORS else "gpu")


def test_processors_against_arithmetic_of_their_chips() -> None:
    """Cores x single-precision operations a clock (two units of 8 or 16 lanes, a multiplication and an addition each) x
    clock; channels x 8 bytes x rate; and four times the operations in 8 bits (VNNI).
    """
    i7, i9 = devices()["i7-12700h"], devices()["i9-10940x"]
    assert i7.fp32_tflops == pytest.approx(6 * 2 * 8 * 2 * 4.7e9 / 1e12, rel=0.01)
    assert i9.fp32_tflops == pytest.approx(14 * 2 * 16 * 2 * 3.3e9 / 1e12, rel=0.01)
    assert i7.bandwidth_gb_s == pytest.approx(2 * 8 * 4.8, rel=0.01)
    assert i9.bandwidth_gb_s == pytest.approx(4 * 8 * 2.933, rel=0.01)
    assert [device.int8_tops / device.fp32_tflops for device in (i7, i9)] == pytest.approx([4, 4], rel=0.01)


def test_processors_by_the_names_that_they_give_themselves() -> None:
    assert get_device("Intel(R) Core(TM) i9-10940X CPU @ 3.30GHz").name == "i9-10940x"
    assert get_device("12th Gen Intel(R) Core(TM) i7-12700H").name == "i7-12700h"
    assert was_on("i9-10940x", "cpu", "Intel(R) Core(TM) i9-10940X CPU @ 3.30GHz")
    assert not was_on("i9-10940x", "cpu", "Intel(R) Core(TM) i9-10900X CPU @ 3.70GHz")
    assert not was_on("i9-10940x", "cuda", "Intel(R) Core(TM) i9-10940X CPU @ 3.30GHz")
    assert [is_processor(name) for name in ("cpu", "i9-10940x", "l4", "nothing")] == [True, True, False, False]


def test_the_processor_here_by_whichever_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convscale.predictor.devices.processor_name", lambda: "12th Gen Intel(R) Core(TM) i7-12700H")
    found = [is_processor_here(name) for name in ("cpu", "i7-12700h", "i9-10940x", "l4")]
    assert found == [True, True, False, False]


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
    assert get_device("A100").name == "a100-40gb"
    assert get_device("4080").name == "rtx-4080"
    assert get_device("RTX 6000 Ada").name == "rtx-6000-ada"
    assert get_device("AMD Instinct MI300X").name == "mi300x"


def test_memory_is_what_torch_sees() -> None:
    """MiB that the driver reports with ECC as these cards ship: T4 15,360, A10 23,028, L4 23,034, L40S 46,068."""
    for name, reported in (("t4", 15_360), ("a10", 23_028), ("l4", 23_034), ("l40s", 46_068)):
        assert devices()[name].memory_gb * 1024 == pytest.approx(reported, rel=0.002), name


def test_special_functions_go_by_units_and_clock() -> None:
    """16 a clock and unit, whatever the lanes: 108 x 16 x 1.41 GHz on an A100, 128 x 16 x 2.52 on an RTX 4090."""
    assert devices()["a100-40gb"].special_tflops == pytest.approx(16 * 108 * 16 * 1.41e-3)
    assert devices()["rtx-4090"].special_tflops == pytest.approx(devices()["rtx-4090"].fp32_tflops, rel=0.001)
    assert devices()["v100"].special_tflops == pytest.approx(2 * devices()["v100"].fp32_tflops, rel=0.01)


def test_no_two_devices_share_a_name() -> None:
    for device in devices().values():
        for name in (device.name, device.title, *device.aliases):
            assert get_device(name) is device, name


def test_unknown_device_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"device 'rtx-4900' is unknown \(nearest: rtx-4090"):
        get_device("rtx-4900")
