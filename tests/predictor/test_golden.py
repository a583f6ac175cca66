"""Predictions beside measured rows, by value: twenty networks of timm's tables on the three cards that were fitted.

Source: huggingface/pytorch-image-models, results/benchmark-infer-amp-nchw-{pt240-cu124-rtx3090, pt291-cu128-4090,
pt291-cu130-5090}[-dynamo].csv, Apache-2.0.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from convscale.conditions import Conditions
from convscale.predictor.latency import basis_of
from convscale.predictor.predict import predict, predict_workload
from convscale.predictor.roofline import net_s, table_of
from convscale.predictor.traced import folder, read_store
from convscale.predictor.workload import Workload

MEASURED = (
    ("resnet50", "rtx-3090", "eager", 160, 1024, 6033.87),
    ("efficientnet_b0", "rtx-3090", "eager", 224, 1024, 6924.93),
    ("densenet121", "rtx-3090", "eager", 224, 1024, 2764.41),
    ("mobilenetv2_100", "rtx-3090", "eager", 224, 1024, 8629.73),
    ("resnet50", "rtx-4090", "compiled", 160, 1024, 15725.42),
    ("convnext_tiny", "rtx-4090", "compiled", 224, 1024, 6698.28),
    ("vgg16", "rtx-4090", "compiled", 224, 1024, 3852.37),
    ("densenet121", "rtx-4090", "compiled", 224, 1024, 6209.44),
    ("resnet18", "rtx-4090", "eager", 160, 1024, 26589.31),
    ("resnet101", "rtx-4090", "eager", 160, 1024, 5462.45),
    ("convnext_nano", "rtx-4090", "eager", 224, 1024, 6224.5),
    ("efficientnet_b1", "rtx-4090", "eager", 224, 1024, 6181.86),
    ("resnet101", "rtx-5090", "compiled", 160, 1024, 15061.15),
    ("resnet50", "rtx-5090", "compiled", 160, 1024, 24613.55),
    ("convnext_tiny", "rtx-5090", "compiled", 224, 1024, 9524.46),
    ("efficientnet_b0", "rtx-5090", "compiled", 224, 1024, 18234.44),
    ("resnet50", "rtx-5090", "eager", 160, 1024, 11604.38),
    ("efficientnet_b0", "rtx-5090", "eager", 224, 1024, 13282.18),
    ("densenet121", "rtx-5090", "eager", 224, 1024, 5369.35),
    ("vgg16", "rtx-5090", "eager", 224, 1024, 3417.92),
)
"""timm's name, card, runtime, side in pixels, batch and measured images/s; under AMP, in NCHW."""
MOST, MEDIAN = 0.15, 0.05
"""The stated error in log: of each, and in the middle."""


PROCESSORS = (
    ("resnet18", 224, {"i9-10940x": 126.23, "i7-12700h": 62.22}),
    ("resnet50d", 224, {"i9-10940x": 64.83, "i7-12700h": 29.3}),
    ("mobilenetv2_100", 224, {"i9-10940x": 188.22, "i7-12700h": 151.16}),
    ("efficientnet_b0", 224, {"i9-10940x": 100.41, "i7-12700h": 93.58}),
)
"""timm's name, side in pixels and measured images/s by processor: single images, fp32, NCHW, compiled (PyTorch 2.4).

Source: the same, results/benchmark-infer-fp32-nchw-pt240-cpu-{i9_10940x, i7_12700h}-dynamo.csv."""


@pytest.fixture(scope="module")
def works() -> list[Workload]:
    """Their workloads, whatever code traced them."""
    stores = {runtime: read_store(folder() / f"{runtime}.npz") for runtime in ("eager", "compiled")}
    return [
        stores[runtime].workload(stores[runtime].index[f"timm {name} {size}"], batch)
        for name, _, runtime, size, batch, _ in MEASURED
    ]


def conditions(row: tuple[str, str, str, int, int, float]) -> Conditions:
    _, device, runtime, size, batch, _ = row
    return Conditions(device=device, precision="amp", runtime=runtime, image_size=size, batch_size=batch)


def test_predictions_are_what_was_measured(works: list[Workload]) -> None:
    made = [predict_workload(work, conditions(row)) for work, row in zip(works, MEASURED, strict=True)]
    off = np.array([math.log(p.images_per_s / row[-1]) for p, row in zip(made, MEASURED, strict=True)])
    assert np.abs(off).max() < MOST, dict(zip([row[:3] for row in MEASURED], off.round(3), strict=True))
    assert np.median(np.abs(off)) < MEDIAN
    inside = [p.low <= row[-1] <= p.high for p, row in zip(made, MEASURED, strict=True)]
    assert np.mean(inside) >= 0.7


@pytest.mark.parametrize("device", ["i9-10940x", "i7-12700h"])
def test_processors_are_what_was_measured(device: str) -> None:
    made = {
        name: predict(name, device=device, runtime="compiled", precision="fp32", image_size=size, batch_size=1)
        for name, size, _ in PROCESSORS
    }
    off = np.array([math.log(made[name].images_per_s / speeds[device]) for name, _, speeds in PROCESSORS])
    assert np.abs(off).max() < 0.25, off
    assert np.median(np.abs(off)) < 0.12, off
    assert all(made[name].low <= speeds[device] <= made[name].high for name, _, speeds in PROCESSORS)
    assert not any("no measurement of this CPU" in doubt for one in made.values() for doubt in one.doubts)


@pytest.mark.parametrize("name", ["bandwidth", "peak"])
@pytest.mark.parametrize("factor", [1 / 1.6, 1.6])
def test_a_coefficient_that_is_scaled_is_noticed(works: list[Workload], name: str, factor: float) -> None:
    """The rows above would fail: a rate of 1.6 times, or 1/1.6, puts many networks outside the stated error."""
    off = []
    for work, row in zip(works, MEASURED, strict=True):
        basis = basis_of(conditions(row))
        wrong = {**basis.coefficients, name: factor * basis.coefficients[name], "sheet": 1e-6}
        seconds = float(net_s(table_of([work.kernels]), basis.device, wrong)[0])
        off.append(abs(math.log(row[4] / seconds / row[-1])))
    assert max(off) > MOST
    assert np.median(off) > MEDIAN


def test_the_data_sheet_is_read(works: list[Workload]) -> None:
    """A card of half the bandwidth and half the rates is half as fast, but for launches."""
    basis = basis_of(conditions(MEASURED[0]))
    device = basis.device
    halved = dataclasses.replace(
        device,
        tensor_tflops=device.tensor_tflops / 2,
        fp32_tflops=device.fp32_tflops / 2,
        tf32_tflops=device.tf32_tflops / 2,
        clock_ghz=device.clock_ghz / 2,
        bandwidth_gb_s=device.bandwidth_gb_s / 2,
    )
    table = table_of([works[0].kernels])
    here, there = (net_s(table, card, basis.coefficients)[0] for card in (device, halved))
    assert there / here == pytest.approx(2, rel=0.03)
