"""The model card of an artefact: what a person opening the folder should know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from convscale.artifact.promise import Promise, promise_section
from convscale.images.preprocess import Preprocessing
from convscale.ship.input_card import Form, input_lines
from convscale.ship.verify import Verification
from convscale.words import markdown

_BF16 = "; what is float is computed in bfloat16"
_FACTS = ("data", "recipe", "accuracy", "speed", "licence")


def model_card(
    manifest: Mapping[str, Any],
    classes: Sequence[str],
    preprocessing: Preprocessing,
    checked: Verification,
    facts: Mapping[str, str],
) -> str:
    """Markdown. Facts that nobody gave are named as not stated, so that nobody takes silence for an answer."""
    several = "" if manifest.get("thresholds") is None else ", any number of them to an image"
    form = Form(
        format=manifest["format"],
        baked=manifest["baked"],
        thresholds=manifest.get("thresholds"),
        temperatures=manifest.get("temperatures"),
    )
    gives = "probabilities and logits" if manifest["baked"] else "logits"
    gives += ", and the last feature map" if manifest.get("features") else ""
    lines = [
        f"# {markdown(str(manifest['model']))}",
        "",
        f"An image classifier with {len(classes)} classes{several}, exported by convscale as {manifest['format']} "
        f"({manifest['precision']}{', which a GPU computes in' if manifest.get('computes') == 'fp16' else ''}).",
        "",
    ]
    for key in (*_FACTS, *sorted(set(facts) - set(_FACTS))):
        lines.append(f"- **{markdown(key.capitalize())}**: {markdown(facts.get(key, 'not stated'))}")
    lines.append("")
    if (promised := manifest.get("promise")) is not None:
        lines += promise_section(Promise.from_dict(promised))
    lines += [
        "## Input",
        "",
        f"The network gives {gives}. What it takes is made of a picture like this, and `classify` does it:",
        "",
        *input_lines(form, preprocessing),
        "",
        "With convscale (`pip install convscale` suffices, without PyTorch):",
        "",
        "```python",
        "import convscale as cs",
        "",
        'artifact = cs.load_artifact("this folder")',
        'answers = artifact.classify("photos/")  # or a file, bytes, a PIL image, an array, a list of them',
        "probabilities = artifact(images)  # uint8 (N, H, W, C) after artifact.preprocessing.resize",
        "```",
        "",
        "## Check against the trained network",
        "",
        f"{'Passed' if checked.passed else 'Failed'} on {checked.n} images ({markdown(checked.images)}): "
        f"{checked.reason}.",
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
            f"Quantised by {manifest['int8'].get('route', 'nncf')} with {manifest['int8']['calibration_images']} "
            f"calibration images. Layers left in float: {kept}{_BF16 if manifest.get('computes') == 'bf16' else ''}.",
            "",
        ]
        lines += [
            f"- {len(step['float_layers'])} layers in float: {step['drop_points']:.2f} points lost"
            for step in manifest["int8"]["steps"]
        ]
        if "made_for" in manifest["int8"]:
            held, there = " and ".join(manifest["int8"]["passed_in"]), manifest["int8"]["made_for"]
            lines += ["", f"Made for {there}, which was not there: the gate was held in {held}."]
        lines.append("")
    return "\n".join(lines)


def _interval(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f" (95 % interval {100 * ends[0]:.2f} to {100 * ends[1]:.2f})"
