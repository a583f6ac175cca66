"""The model card of an artefact: what a person opening the folder should know."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from convscale.artifact.promise import Promise, promise_section
from convscale.conditions import size_text
from convscale.images.preprocess import Preprocessing
from convscale.ship.verify import Verification

_FACTS = ("data", "recipe", "accuracy", "speed", "licence")


def model_card(
    manifest: Mapping[str, Any],
    classes: Sequence[str],
    preprocessing: Preprocessing,
    checked: Verification,
    facts: Mapping[str, str],
) -> str:
    """Markdown. Facts that nobody gave are named as not stated, so that nobody takes silence for an answer."""
    height, width, channels = preprocessing.height, preprocessing.width, preprocessing.channels
    takes = (
        f"uint8 (N, {height}, {width}, {channels})"
        if manifest["baked"]
        else f"float32 (N, {channels}, {height}, {width}), normalised"
    )
    before = [math.floor(side / preprocessing.crop_pct) for side in (height, width)]
    resized = f"to {before[0]} px on the shorter side" if height == width else f"to cover {before[0]} x {before[1]} px"
    several = "" if manifest.get("thresholds") is None else ", any number of them to an image"
    gives = "probabilities and logits" if manifest["baked"] else "logits"
    lines = [
        f"# {manifest['model']}",
        "",
        f"An image classifier with {len(classes)} classes{several}, exported by convscale as {manifest['format']} "
        f"({manifest['precision']}).",
        "",
    ]
    for key in (*_FACTS, *sorted(set(facts) - set(_FACTS))):
        lines.append(f"- **{key.capitalize()}**: {facts.get(key, 'not stated')}")
    lines.append("")
    if (promised := manifest.get("promise")) is not None:
        lines += promise_section(Promise.from_dict(promised))
    lines += [
        "## Input",
        "",
        f"The network takes {takes} and gives {gives}. Images are resized {resized} ({preprocessing.interpolation}) "
        f"and cut to {size_text(preprocessing.image_size)} px in the centre; mean {list(preprocessing.mean)}, std "
        f"{list(preprocessing.std)} of pixels in [0, 1].",
        "",
        "```python",
        "import convscale as cs",
        "",
        'art = cs.load_artifact("this folder")',
        "probs = art(images)  # uint8 (N, H, W, C) after art.preprocessing.resize",
        "```",
        "",
        "## Check against the trained network",
        "",
        f"{'Passed' if checked.passed else 'Failed'} on {checked.n} images ({checked.images}): {checked.reason}.",
        "",
    ]
    if checked.accuracy_before is not None and checked.accuracy_after is not None:
        what = "Mean average precision" if manifest.get("thresholds") is not None else "Accuracy"
        before, after = _interval(checked.accuracy_before_interval), _interval(checked.accuracy_after_interval)
        lines += [
            f"{what} before {100 * checked.accuracy_before:.2f} %{before}, after {100 * checked.accuracy_after:.2f} "
            f"%{after}.",
            "",
        ]
    if "int8" in manifest:
        last = manifest["int8"]["steps"][-1]
        kept = ", ".join(last["float_layers"]) or "none"
        lines += [
            "## INT8",
            "",
            f"Quantised with {manifest['int8']['calibration_images']} calibration images. Layers left in float: "
            f"{kept}.",
            "",
        ]
        lines += [
            f"- {len(step['float_layers'])} layers in float: {step['drop_points']:.2f} points lost"
            for step in manifest["int8"]["steps"]
        ]
        lines.append("")
    return "\n".join(lines)


def _interval(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f" (95 % interval {100 * ends[0]:.2f} to {100 * ends[1]:.2f})"
