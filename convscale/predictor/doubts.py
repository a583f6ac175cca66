"""Reasons to trust a prediction less."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from convscale.conditions import Conditions
from convscale.predictor.devices import Device, is_processor
from convscale.predictor.fitted import STAND_IN_FACTOR, STAND_INS, TITLES, fitted_sets, set_name
from convscale.predictor.workload import Workload

ATTENTION_FACTOR = 1.8
"""How far a network with attention may be from its prediction, beside what its kernels say: with it 80 % of those in
the tables of timm's lie inside their interval (``benchmarks.predictor_attention``; no fit has seen one). Transformers
are faster, since PyTorch's attention in one kernel writes no map of weights, which the trace has."""


class Doubts(NamedTuple):
    """Sentences that say why a prediction may be off."""

    known: tuple[str, ...]
    """Doubts whose error was measured on families or cards left out, so that the interval holds it already."""
    open: tuple[str, ...]
    """Doubts that no table says anything of: each widens the interval."""


def runtime_doubt(conditions: Conditions) -> str:
    """The doubt about a runtime that no table speaks of; empty for the others. It widens the interval by a factor of
    its own, which it states.
    """
    if conditions.runtime not in STAND_INS:
        return ""
    title = TITLES[conditions.runtime]
    by = "a processor behind PyTorch's compiler" if is_processor(conditions.device) else "compiled PyTorch's speed"
    return f"no table speaks of {title}: predicted by {by}, the interval widened {STAND_IN_FACTOR:g} times either way"


def compiler_doubt(compiled: float, eager: float) -> str:
    """The doubt about a network that is predicted slower behind the compiler than without, in images/s; else empty."""
    if compiled >= eager:
        return ""
    return (
        f"compiled it is predicted slower than eager PyTorch ({compiled:,.0f} and {eager:,.0f} images/s), which a "
        "compiler seldom is: one of the two is off"
    )


def doubts_of(
    work: Workload, conditions: Conditions, device: Device, share: Mapping[str, float], calibrated: bool
) -> Doubts:
    """What the tables do not hold, and what the predictor is known to get wrong.

    Args:
        work: the network's kernels.
        conditions: what is predicted for.
        device: its data sheet.
        share: of the time, by ``interval.GROUPS`` and ``MARKS``; and ``host``: 1 where the host's launches bind.
        calibrated: whether measurements on the device set the scale.
    """
    return Doubts(
        tuple(_known_doubts(work, conditions, device, share, calibrated)),
        tuple(_open_doubts(work, conditions, device, share, calibrated)),
    )


def _known_doubts(
    work: Workload, conditions: Conditions, device: Device, share: Mapping[str, float], calibrated: bool
) -> list[str]:
    """Doubts whose error was measured on families or cards left out, so that the interval holds it already."""
    doubts: list[str] = []
    # A processor's memory is as large as its owner made it: the data sheet says at most how large that may be.
    if device.kind == "gpu" and work.peak_bytes > device.memory_gb * 2**30:
        doubts.append(
            f"the batch needs about {work.peak_bytes / 2**30:.1f} GB and {device.title} has {device.memory_gb:g} GB"
        )
    if (
        device.kind == "gpu"
        and device.name not in fitted_sets()[set_name(conditions, device)].devices
        and not calibrated
    ):
        doubts.append(f"no table holds a measurement of a {device.title}: its data sheet scales what others measured")
        if device.generation.startswith("cdna"):
            doubts.append("no table speaks of a card by AMD: its libraries are taken to be as good as NVIDIA's")
    if device.sustained < 1 and not calibrated:
        doubts.append(
            f"its power limit of {device.watts:g} W does not hold the peak rate; {device.sustained:.0%} of it is "
            "assumed"
        )
    if device.kind == "cpu" and device.name not in fitted_sets()["cpu"].devices and not calibrated:
        doubts.append("no measurement of this CPU was given: calibrate with about a dozen measured models")
    if share["wide"] > 0.1:
        doubts.append(
            f"depthwise kernels larger than 5 x 5 take {share['wide']:.0%} of the time; their speed varies by size and "
            "library version"
        )
    if share["ragged"] > 0.15:
        doubts.append(
            f"channel counts that are no multiple of 8 take {share['ragged']:.0%} of the time; libraries differ in "
            "what they do then"
        )
    if share["grouped"] > 0.1 and conditions.layout == "nhwc":
        doubts.append(
            f"grouped convolutions in channels-last take {share['grouped']:.0%} of the time; their speed varies by "
            "library version"
        )
    if work.attention:
        doubts.append(
            "it multiplies maps with each other (attention); only ConvNets were fitted, and four of five such networks "
            f"of the tables are within {ATTENTION_FACTOR:g} times either way, transformers mostly faster"
        )
    if share["huge"] > 0.1:
        doubts.append(
            "a map has more than 2**31 elements: libraries then split the batch or fall back to slower kernels"
        )
    return doubts


def _open_doubts(
    work: Workload, conditions: Conditions, device: Device, share: Mapping[str, float], calibrated: bool
) -> list[str]:
    """Doubts that no table says anything of: each widens the interval."""
    doubts: list[str] = []
    if device.kind == "cpu" and not calibrated:
        if conditions.mode == "train" or conditions.precision != "fp32" or conditions.batch_size != 1:
            doubts.append("the CPU table holds single-precision inference at batch 1 only")
        if conditions.runtime == "eager" or conditions.layout != "nchw":
            doubts.append("the CPU table was measured behind PyTorch's compiler and in NCHW only")
    if conditions.mode == "train" and conditions.runtime == "compiled":
        doubts.append("compiled training was never measured for the fit")
    if device.kind == "gpu" and conditions.precision != "amp" and not calibrated:
        doubts.append(f"all GPU measurements fitted ran under AMP (fp16), none in {conditions.precision}")
    if conditions.precision == "int8":
        doubts.append("int8 is taken to reach every layer; what a runtime leaves in half precision is slower")
    if conditions.precision in ("bf16", "amp_bf16") and not device.bfloat16:
        doubts.append(f"{device.title} has no matrix units for bfloat16")
    if work.unsupported:
        doubts.append(f"unknown operators: {', '.join(sorted(work.unsupported))}")
    if share["host"] > 0.5:
        doubts.append(
            "the host's launches take longer than the GPU's work; how long depends on its CPU, which is assumed "
            f"({device.host_us:g} microseconds an operator of eager PyTorch)"
        )
    elif device.kind == "gpu" and conditions.batch_size < 32 and not calibrated:
        doubts.append("the tables hold large batches; at small ones kernels no longer fill the card")
    return doubts
