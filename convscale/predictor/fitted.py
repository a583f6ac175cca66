"""The coefficients that travel with the package, fitted to measured tables; and what can be predicted with them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import NamedTuple

from convscale.conditions import Conditions
from convscale.errors import UserError
from convscale.predictor.devices import Device, at_hand, get_device, is_processor
from convscale.runtimes.base import runtime_of
from convscale.words import listed

RUNTIMES = ("eager", "compiled")
"""Runtimes that tables speak of: PyTorch, as it is or behind its compiler."""
STAND_INS = {"onnxruntime": "compiled", "tensorrt": "compiled"}
"""Runtimes that no table speaks of, and the one that each is predicted by: all three fuse what follows a convolution
into it."""
TITLES = {"onnxruntime": "ONNX Runtime", "tensorrt": "TensorRT"}
"""Their makers' names for them."""
STAND_IN_FACTOR = 2.5
"""How far a runtime may be from its stand-in: 80 % of networks lie within this factor either way. A judgement by what
little is published: EfficientNet-B4 (380 px) and EfficientNetV2-S (384 px) in TensorRT, fp16, on A100 and V100
(EfficientNetV2's results, batches 1 and 64) are 1.2 to 2.5 times as fast as compiled PyTorch is predicted; lone
convolutions in TensorRT on a V100 (alibaba/lightweight-neural-architecture-search, those that take 0.3 ms or more) take
1.2 to 1.5 times as long in the middle, short ones up to 3 times. The two point in different directions, so the middle
stays. Of ONNX Runtime on GPUs nothing was found; it is taken to be as far off."""
PRECISIONS = ("amp", "amp_bf16", "bf16", "fp16", "fp32")
"""Precisions that can be predicted: ``amp`` is autocast to float16, ``amp_bf16`` autocast to bfloat16, ``fp16`` and
``bf16`` weights and maps in float16 or bfloat16, ``fp32`` PyTorch's default, whose convolutions run in TF32 where a
card has it."""
EIGHT_BITS = tuple(STAND_INS)
"""Runtimes that are predicted in ``int8`` too, on a GPU."""
PREDICTED_BATCH, MEASURED_BATCH = 256, 8
"""Images per call where none is said, on a named GPU and on what is at hand."""
PREDICTED_RUNTIMES = (*RUNTIMES, *STAND_INS)
"""Those of PyTorch, which tables speak of, and those that are predicted by them, with a doubt."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Coefficients of one mode and layout with how far they were off on families they were not fitted on."""

    coefficients: Mapping[str, float]
    """Names as in ``roofline.PRIOR``."""
    sigmas: Mapping[str, float]
    """How far it was off on families left out, as in ``interval.fit_sigmas``."""
    devices: tuple[str, ...]
    """Devices that the tables were measured on."""
    cards: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """What each of them was found to reach of its data sheet: factors on ``roofline.REACH``."""
    eras: Mapping[str, float] = field(default_factory=dict)
    """Times under older generations of PyTorch, by their name (``pt210`` is 2.1), as a factor on those of the newest
    in the tables, which a prediction is of."""

    def reach(self, device: Device) -> dict[str, float]:
        """What a device is taken to reach of its data sheet: a known card what was found, another of a known
        generation three parts of that generation's mean and one of all, and else the mean of all known cards; but no
        rate above that mean: cards that no fit had seen came out too fast more often than too slow.
        """
        if device.name in self.cards or not self.cards:
            return dict(self.cards.get(device.name, {}))
        everywhere = _mean(list(self.cards.values()))
        kin = [found for name, found in self.cards.items() if get_device(name).generation == device.generation]
        if not kin:
            return everywhere
        mixed = _mean([everywhere, *3 * [_mean(kin)]])
        return {name: value if name == "overhead_us" else min(value, everywhere[name]) for name, value in mixed.items()}


def _mean(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Geometric mean, name by name."""
    return {name: math.exp(sum(math.log(each.get(name, 1.0)) for each in found) / len(found)) for name in found[0]}


@cache
def fitted_sets() -> Mapping[str, Fitted]:
    """All fitted sets: eager-nchw, eager-nhwc, compiled, train-nchw, train-nhwc, cpu."""
    record = json.loads((files("convscale.predictor") / "coefficients.json").read_text(encoding="utf-8"))
    return MappingProxyType(
        {name: Fitted(**{**value, "devices": tuple(value["devices"])}) for name, value in record["sets"].items()}
    )


def stand_in(runtime: str) -> str:
    """The runtime whose figures a prediction goes by: itself, or the one that stands in for it."""
    return STAND_INS.get(runtime, runtime)


class Usual(NamedTuple):
    """What a prediction is of where nothing else is said: what the tables of such a device hold."""

    batch_size: int
    """Images per call."""
    precision: str
    """One of ``PRECISIONS``."""
    runtime: str
    """One of ``RUNTIMES``."""


def usual_on(device: str, mode: str) -> Usual:
    """The usual conditions on a GPU, on a processor by its name, and on what is at hand (``cpu``, ``cuda``)."""
    if at_hand(device):
        return Usual(MEASURED_BATCH, "fp32" if device == "cpu" else "amp", "eager")
    if not is_processor(device):
        return Usual(PREDICTED_BATCH, "amp", "eager")
    return Usual(1, "fp32", "compiled" if mode == "infer" else "eager")


def predicted_runtimes(device: str) -> tuple[str, ...]:
    """``PREDICTED_RUNTIMES`` that run on a device."""
    kind = "cpu" if is_processor(device) else "cuda"
    return tuple(name for name in PREDICTED_RUNTIMES if runtime_of(name).runs_on(kind))


def check_on_processor(runtime: str, precision: str, device: str) -> None:
    """
    Raises:
        UserError: the device is a processor, and the runtime or the precision is of GPUs alone.
    """
    if not is_processor(device):
        return
    known = predicted_runtimes(device)
    if runtime in PREDICTED_RUNTIMES and runtime not in known:
        raise UserError(
            f"runtime {runtime} runs on GPUs, got device {device}; {listed(known, 'or')} can be predicted there"
        )
    if precision == "int8":
        raise UserError(
            f"precision 'int8' is predicted on GPUs alone, got device {device}; fp32 is predicted there, and on "
            "that machine device cpu measures int8"
        )


def set_name(conditions: Conditions, device: Device) -> str:
    """Which fitted set holds for conditions on a device."""
    if device.kind == "cpu":
        return "cpu"
    if conditions.mode == "train":
        return f"train-{conditions.layout}"
    return "compiled" if stand_in(conditions.runtime) == "compiled" else f"eager-{conditions.layout}"


def check_predicted(conditions: Conditions) -> tuple[Conditions, Device]:
    """The conditions with the device's own name, and its data sheet.

    Raises:
        UserError: an unknown device (the message names the nearest), or a runtime or precision that nothing is
            predicted for.
    """
    device = get_device(conditions.device)
    runtime, precision = conditions.runtime, conditions.precision
    check_on_processor(runtime, precision, device.name)
    if runtime not in PREDICTED_RUNTIMES:
        others = [name for name in predicted_runtimes(device.name) if name in STAND_INS]
        raise UserError(
            f"runtime {runtime!r} can not be predicted; speeds on {device.name} are predicted for "
            f"{listed(RUNTIMES, 'or')} PyTorch, and by them for {listed(others)}"
        )
    if runtime in STAND_INS and conditions.mode == "train":
        raise UserError(f"runtime {runtime} can not train; {listed(RUNTIMES)} PyTorch can")
    if precision not in PRECISIONS and not (precision == "int8" and runtime in EIGHT_BITS):
        raise UserError(
            f"precision {precision!r} can not be predicted in {runtime}; {listed(PRECISIONS)} can, and int8 in "
            f"{listed(EIGHT_BITS)} on a GPU"
        )
    return replace(conditions, device=device.name), device


def known_by(device: str) -> tuple[str, ...]:
    """The fitted sets whose tables were measured on a device; none: only its data sheet is known."""
    return tuple(name for name, fitted in fitted_sets().items() if device in fitted.devices)
