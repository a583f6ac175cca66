"""Data sheets and coefficients against figures from elsewhere: makers' sheets, chips' arithmetic, timm's tables."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from convscale.conditions import Conditions
from convscale.cost.kernels import Kernel
from convscale.predictor.devices import devices, get_device
from convscale.predictor.predict import predict, predict_workload
from convscale.predictor.roofline import PRIOR, kernel_s, table_of
from convscale.predictor.workload import Workload

MEMORY = {
    "v100": (4096, 1.752, 6),
    "v100-32gb": (4096, 1.752, 6),
    "v100-pcie": (4096, 1.752, 6),
    "v100-pcie-32gb": (4096, 1.752, 6),
    "t4": (256, 10, 4),
    "rtx-3090": (384, 19.5, 6),
    "rtx-4090": (384, 21, 72),
    "rtx-5090": (512, 28, 96),
    "rtx-pro-6000": (512, 28, 128),
    "rtx-pro-6000-max-q": (512, 28, 128),
    "a10": (384, 12.5, 6),
    "a100-40gb": (5120, 2.43, 40),
    "a100-80gb": (5120, 3.186, 40),
    "a100-pcie-40gb": (5120, 2.43, 40),
    "a100-pcie-80gb": (5120, 3.024, 40),
    "l4": (192, 12.5, 48),
    "l40s": (384, 18, 96),
    "h100-sxm": (5120, 5.237, 50),
    "h100-pcie": (5120, 3.186, 50),
    "h100-nvl": (6144, 5.127, 50),
    "h200": (6144, 6.25, 60),
    "b200": (8192, 7.8125, 126),
    "rtx-3080": (320, 19, 5),
    "rtx-4070": (192, 21, 36),
    "rtx-4080": (256, 22.4, 64),
    "rtx-a6000": (384, 16, 6),
    "rtx-6000-ada": (384, 20, 96),
    "mi210": (4096, 3.2, 8),
    "mi250": (4096, 3.2, 8),
    "mi300x": (8192, 5.2, 256),
    "jetson-orin": (256, 6.4, 4),
}
"""Bus width in bits, Gbit/s a pin, and last-level cache in 2**20 bytes, as on the makers' sheets."""

DENSE = {
    "v100": (80, 1024, 1.53),
    "v100-32gb": (80, 1024, 1.53),
    "v100-pcie": (80, 1024, 1.38),
    "v100-pcie-32gb": (80, 1024, 1.38),
    "t4": (40, 1024, 1.59),
    "rtx-3090": (82, 512, 1.695),
    "rtx-4090": (128, 512, 2.52),
    "rtx-5090": (170, 512, 2.407),
    "rtx-pro-6000": (188, 1024, 2.617),
    "rtx-pro-6000-max-q": (188, 1024, 2.28),
    "a10": (72, 1024, 1.695),
    "a100-40gb": (108, 2048, 1.41),
    "a100-80gb": (108, 2048, 1.41),
    "a100-pcie-40gb": (108, 2048, 1.41),
    "a100-pcie-80gb": (108, 2048, 1.41),
    "l4": (58, 1024, 2.04),
    "l40s": (142, 1024, 2.52),
    "h100-sxm": (132, 4096, 1.83),
    "h100-pcie": (114, 4096, 1.62),
    "h100-nvl": (132, 4096, 1.545),
    "h200": (132, 4096, 1.83),
    "rtx-3080": (68, 512, 1.71),
    "rtx-4070": (46, 512, 2.475),
    "rtx-4080": (76, 512, 2.505),
    "rtx-a6000": (84, 1024, 1.8),
    "rtx-6000-ada": (142, 1024, 2.505),
    "mi210": (104, 1024, 1.7),
    "mi250": (104, 1024, 1.7),
    "mi300x": (304, 2048, 2.1),
    "jetson-orin": (16, 2048, 1.3),
}
"""Streaming multiprocessors, dense half-precision operations a clock in each, and the boost clock in GHz. The rates
with sparsity are twice these."""


@pytest.mark.parametrize("name", MEMORY)
def test_bandwidth_is_bus_width_times_rate_a_pin(name: str) -> None:
    bits, rate, cache_mb = MEMORY[name]
    assert devices()[name].bandwidth_gb_s == pytest.approx(bits / 8 * rate, rel=0.01)
    assert devices()[name].l2_mb == cache_mb


@pytest.mark.parametrize("name", DENSE)
def test_matrix_rates_are_dense(name: str) -> None:
    units, operations, clock_ghz = DENSE[name]
    assert devices()[name].units == units
    assert devices()[name].tensor_tflops == pytest.approx(units * operations * clock_ghz / 1e3, rel=0.02)


def test_eight_b200_have_half_of_their_boards_sparse_rate() -> None:
    """The board of eight is sold with 36 PFLOPS in half precision with sparsity."""
    assert devices()["b200"].tensor_tflops == 36_000 / 8 / 2


def test_bandwidth_counts_in_powers_of_ten_and_the_cache_in_powers_of_two() -> None:
    """By hand: of maps as large as the cache half are found there, 1 - gain / (1 + (bytes / cache) ** 2)."""
    ideal = {"cache.gain": 1e-9, "overhead_us": 1e-9, "work.pointwise": 1e-9, "p": 50.0}
    ideal |= dict.fromkeys(("bandwidth", "memory.pointwise", "huge"), 1.0)
    plain = {**PRIOR, **ideal}
    device = get_device("rtx-3090")
    far = table_of([[(Kernel("pointwise", in_bytes=468_100_000_000, out_bytes=468_100_000_000), 1)]])
    assert kernel_s(far, device, plain).total_s[0] == pytest.approx(1.0, rel=1e-6)  # 936.2e9 bytes at 936.2 GB/s
    assert kernel_s(far, device, {**plain, "bandwidth": 0.5}).total_s[0] == pytest.approx(2.0, rel=1e-6)
    kept = {**plain, "cache.gain": 1.0, "cache.share": 1.0}
    cache = 6 * 2**20
    near = table_of([[(Kernel("pointwise", in_bytes=cache // 2, out_bytes=cache // 2), 1)]])
    assert kernel_s(near, device, kept).total_s[0] == pytest.approx(cache / 2 / 936.2e9, rel=1e-6)


@pytest.mark.parametrize(("name", "published"), [("wide_resnet101_2", 996.51), ("resnet152", 1332.5)])
def test_networks_bound_by_convolutions_against_timms_table(name: str, published: float) -> None:
    """timm's benchmark-infer-amp-nchw-pt210-cu121-rtx3090.csv, 224 px, batch 1024: efficiencies that are half as high
    again would be a quarter off.
    """
    import torchvision.models

    with torch.device("meta"):
        net: nn.Module = getattr(torchvision.models, name)()
    predicted = predict(net, device="rtx-3090", image_size=224, batch_size=1024).images_per_s
    assert predicted == pytest.approx(published, rel=0.06)


def _half_width(*, precision: str = "amp", runtime: str = "eager", attention: bool = False, unknown: int = 0) -> float:
    """Half the interval's width in log units for one large map on a card of the tables."""
    kernel = Kernel("pointwise", in_bytes=10**9, out_bytes=10**9)
    work = Workload(
        kernels=((kernel, 50),),
        peak_bytes=10**9,
        attention=attention,
        unsupported={"odd": unknown} if unknown else {},
    )
    conditions = Conditions(
        device="rtx-4090", precision=precision, batch_size=256, image_size=224, layout="nchw", runtime=runtime
    )
    made = predict_workload(work, conditions)
    assert math.log(made.high / made.images_per_s) == pytest.approx(math.log(made.images_per_s / made.low))
    return math.log(made.high / made.low) / 2


def test_each_open_doubt_widens_the_interval_by_half_and_at_most_three_count() -> None:
    sure = _half_width()
    assert _half_width(precision="fp16") == pytest.approx(1.5 * sure)
    assert _half_width(precision="fp16", unknown=2) == pytest.approx(1.5**2 * sure)
    few = Workload(
        kernels=((Kernel("pointwise", in_bytes=10**9, out_bytes=10**9), 1),),
        peak_bytes=10**9,
        attention=False,
        unsupported={"odd": 1},
    )
    at_one = Conditions(
        device="rtx-3090",
        mode="train",
        runtime="compiled",
        precision="fp16",
        batch_size=1,
        image_size=224,
        layout="nchw",
    )
    four = predict_workload(few, at_one)
    assert len(four.doubts) == 4
    plain = predict_workload(
        Workload(kernels=few.kernels, peak_bytes=10**9, attention=False),
        Conditions(device="rtx-3090", mode="train", precision="amp", batch_size=256, image_size=224, layout="nchw"),
    )
    assert math.log(four.high / four.low) == pytest.approx(1.5**3 * math.log(plain.high / plain.low))


def test_attention_adds_its_own_factor() -> None:
    """1.8 times either way, as variances add."""
    assert _half_width(attention=True) == pytest.approx(math.hypot(_half_width(), math.log(1.8)))


def test_a_stand_in_runtime_adds_its_own_factor() -> None:
    """ONNX Runtime is predicted by compiled PyTorch, 2.5 times either way: the two widths add as variances do."""
    compiled, foreign = _half_width(runtime="compiled"), _half_width(runtime="onnxruntime")
    assert foreign == pytest.approx(math.hypot(compiled, math.log(2.5)))


def test_weights_are_read_too() -> None:
    """Half of the bytes are weights: 936.2e9 bytes at 936.2 GB/s are a second."""
    ideal = {"cache.gain": 1e-9, "overhead_us": 1e-9, "bandwidth": 1.0, "memory.linear": 1.0, "p": 50.0, "huge": 1.0}
    half = 468_100_000_000
    kernel = Kernel("linear", in_bytes=half // 2, out_bytes=half // 2, weight_bytes=half, rows=1, width=8, depth=8)
    made = kernel_s(table_of([[(kernel, 1)]]), get_device("rtx-3090"), {**PRIOR, **ideal})
    assert made.memory_s[0] == pytest.approx(1.0, rel=1e-6)
