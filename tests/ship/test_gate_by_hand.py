"""The gate of what is shipped, at its edges; and what a tuning makes small."""

from __future__ import annotations

import math
from typing import Any

import pytest

from convscale.ship.tune import Settings, Trial, cost
from convscale.ship.verify import Verification, _judge


def _verification(**values: Any) -> Verification:
    kept: dict[str, Any] = {
        "n": 1000,
        "images": "given",
        "batch_sizes": (1,),
        "top1_agreement": 1.0,
        "max_abs": 0.0,
        "max_rel": 0.0,
        "mean_abs": 0.0,
    }
    return Verification(**{**kept, **values})


@pytest.mark.parametrize(
    ("values", "passes"),
    [
        ({}, True),
        ({"top1_agreement": 0.999}, True),
        ({"top1_agreement": 0.998}, False),
        ({"max_rel": 0.9e-3}, True),
        ({"max_rel": 1.1e-3}, False),
        ({"max_rel": 0.9e-2, "precision": "fp16"}, True),
        ({"max_rel": 1.1e-2, "precision": "fp16"}, False),
        ({"max_abs": math.nan}, False),
        ({"max_abs": math.inf}, False),
    ],
)
def test_float_artefacts(values: dict[str, Any], passes: bool) -> None:
    assert _judge(_verification(**values))[0] is passes


@pytest.mark.parametrize(
    ("values", "passes"),
    [
        ({"accuracy_before": 0.9, "accuracy_after": 0.895}, True),  # half a point, as allowed
        ({"accuracy_before": 0.9, "accuracy_after": 0.894}, False),
        ({"accuracy_before": 0.9, "accuracy_after": 0.95}, True),
        ({"top1_agreement": 0.995}, True),  # without labels disagreement bounds the loss
        ({"top1_agreement": 0.994}, False),
        ({"batch_rel": 0.11}, False),
        ({"batch_rel": 0.09, "max_rel": 0.5}, True),
        ({"max_abs": math.nan}, False),
    ],
)
def test_int8_artefacts(values: dict[str, Any], passes: bool) -> None:
    assert _judge(_verification(precision="int8", max_drop=0.5, **values))[0] is passes


def test_latency_is_of_a_call_and_throughput_of_an_image() -> None:
    trial = Trial(settings=Settings(runtime="eager", threads=1, streams=1, batch_size=4), times_s=(0.2, 0.4, 0.9))
    assert cost(trial, "latency") == pytest.approx(0.4)
    assert cost(trial, "throughput") == pytest.approx(0.1)
    assert cost(trial, "latency", 1.0) == pytest.approx(0.9)
