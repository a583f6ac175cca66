"""What must hold of predictions whatever was fitted: expectations from data sheets and physics, on every device."""

from __future__ import annotations

import itertools

import pytest

from convscale.arch.scaling import scale
from convscale.arch.zoo import get_spec
from convscale.predictor.devices import Device, devices
from convscale.predictor.predict import Prediction, predict

NETS = ("resnet50", "efficientnet_b0", "tresnet_m")
GPUS = tuple(name for name, device in devices().items() if device.kind == "gpu")


def speed(net: object, device: str, **options: object) -> Prediction:
    return predict(net, device=device, image_size=224, **{"batch_size": 256, **options})  # type: ignore[arg-type]


def no_worse(a: Device, b: Device) -> bool:
    """Whether every rate and size that a data sheet gives is at least as high."""
    sheets = [(d.tensor_tflops * d.sustained, d.tf32_tflops, d.fp32_tflops, d.bandwidth_gb_s, d.l2_mb) for d in (a, b)]
    return sheets[0] != sheets[1] and all(x >= y for x, y in zip(*sheets, strict=True))


ORDERED = [(a, b) for a, b in itertools.permutations(GPUS, 2) if no_worse(devices()[a], devices()[b])]


def test_the_data_sheets_order_the_cards_as_their_generations() -> None:
    for faster, slower in itertools.pairwise(["b200", "h200", "h100-sxm", "h100-pcie", "a100-80gb", "v100", "t4"]):
        assert (faster, slower) in ORDERED
    for faster, slower in itertools.pairwise(["rtx-5090", "rtx-4090", "rtx-3090", "t4"]):
        assert (faster, slower) in ORDERED


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compiled": True},
        {"layout": "nhwc"},
        {"mode": "train"},
        {"mode": "train", "layout": "nhwc"},
        {"precision": "fp32"},
    ],
)
@pytest.mark.parametrize("net", NETS)
def test_a_card_that_is_better_on_every_line_is_faster(net: str, options: dict[str, object]) -> None:
    speeds = {name: speed(net, name, **options).images_per_s for name in GPUS}
    for better, worse in ORDERED:
        assert speeds[better] > speeds[worse], f"{better} {speeds[better]:.0f}, {worse} {speeds[worse]:.0f}"


@pytest.mark.parametrize("device", ["t4", "rtx-4090", "h100-sxm"])
@pytest.mark.parametrize("mode", ["infer", "train"])
@pytest.mark.parametrize("net", NETS)
def test_more_images_take_longer_and_fill_the_card_better(net: str, mode: str, device: str) -> None:
    found = {batch: speed(net, device, mode=mode, batch_size=batch) for batch in (1, 8, 64, 256)}
    for small, large in itertools.pairwise(found.values()):
        assert large.latency_s >= small.latency_s
    # up to where maps no longer fit the cache a larger batch is no slower per image; beyond, it loses at most what the
    # cache gave
    assert found[8].images_per_s > found[1].images_per_s
    assert found[256].images_per_s > 0.6 * found[64].images_per_s


@pytest.mark.parametrize("rule", ["compound", "fast"])
@pytest.mark.parametrize("options", [{}, {"compiled": True}, {"mode": "train"}])
def test_a_larger_network_is_slower(rule: str, options: dict[str, object]) -> None:
    base = get_spec("efficientnet_b0")
    sizes = [scale(base, phi=phi, rule=rule) if phi else base for phi in (0.0, 1.0, 2.0, 3.0)]
    speeds = [
        predict(spec, device="a100-40gb", image_size=spec.input.size, batch_size=64, **options).images_per_s
        for spec in sizes
    ]  # type: ignore[arg-type]
    assert speeds == sorted(speeds, reverse=True)
    assert speeds[0] > 2 * speeds[3]  # eight times the MACs


@pytest.mark.parametrize("net", NETS)
def test_larger_images_are_slower(net: str) -> None:
    speeds = [predict(net, device="t4", image_size=size, batch_size=64).images_per_s for size in (160, 224, 320)]
    assert speeds == sorted(speeds, reverse=True)
    assert speeds[0] / speeds[2] == pytest.approx(
        4.0, rel=0.35
    )  # time follows pixels where no large cache holds the small maps


@pytest.mark.parametrize("device", GPUS)
def test_precision_follows_the_data_sheet(device: str) -> None:
    sheet = devices()[device]
    named = ("amp", "amp_bf16", "fp16", "bf16", "fp32")
    found = {precision: speed("resnet50", device, precision=precision).images_per_s for precision in named}
    assert found["fp32"] < found["amp"] < found["fp16"]  # whose weights need no cast
    if sheet.bfloat16:
        assert found["amp_bf16"] == pytest.approx(found["amp"], rel=1e-6)
        assert found["bf16"] == pytest.approx(found["fp16"], rel=1e-6)
    else:  # Volta and Turing compute it on their general cores
        assert found["amp_bf16"] < 0.7 * found["amp"]
        assert found["bf16"] < 0.7 * found["fp16"]
    assert speed("resnet50", device, mode="train").images_per_s < found["amp"]
