"""The model card of a detector's artefact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from convscale.images.letterbox import fill_of
from convscale.images.preprocess import Preprocessing
from convscale.words import markdown

_FACTS = ("data", "recipe", "accuracy", "speed", "licence")


def detector_card(
    manifest: Mapping[str, Any],
    classes: Sequence[str],
    preprocessing: Preprocessing,
    checked: Mapping[str, Any],
    facts: Mapping[str, str],
) -> str:
    """Markdown. Facts that nobody gave are named as not stated."""
    cut, side = manifest["detection"], preprocessing.width
    lines = [
        f"# {markdown(str(manifest['model']))}",
        "",
        f"A detector of {len(classes)} classes ({cut['head']} over {markdown(str(cut['backbone']))}), exported by "
        f"convscale as {manifest['format']} ({manifest['precision']}).",
        "",
    ]
    for key in (*_FACTS, *sorted(set(facts) - set(_FACTS))):
        lines.append(f"- **{markdown(key.capitalize())}**: {markdown(facts.get(key, 'not stated'))}")
    inside = cut["nms"] == "inside"
    takes = (
        f"uint8 (N, {side}, {side}, 3) pixels, which it normalises itself"
        if manifest["baked"]
        else f"float32 (N, 3, {side}, {side}): pixels in [0, 1], less {list(preprocessing.mean)}, over "
        f"{list(preprocessing.std)}"
    )
    gives = (
        f"`detections`, float32 (N, {cut['max_detections']}, 6): x1, y1, x2, y2, score, label (from 1); a score of 0 "
        "says that there is nothing. Non-maximum suppression is inside"
        if inside
        else "`boxes` (N, K, 4), `scores` (N, K), `labels` (N, K, from 1): candidates. Non-maximum suppression is "
        f"outside: scores above {cut['score_threshold']:g}, IoU {cut['nms_threshold']:g} within a class, at most "
        f"{cut['max_detections']} boxes"
    )
    lines += [
        "",
        "## Input and output",
        "",
        f"A picture is decoded upright, resized (Pillow, bilinear) so that its longer side is {side} px, and put into "
        f"the upper left corner of a square filled with {list(fill_of(preprocessing.mean))}. The network takes "
        f"{takes}. It gives {gives}. Coordinates are the square's pixels; N is free.",
        "",
        "```python",
        "import convscale as cs",
        "",
        'artifact = cs.load_artifact("this folder")',
        'for answer in artifact.classify("photos/"):',
        "    print(answer.labels, answer.probabilities, answer.boxes)  # boxes in the picture's own pixels",
        "```",
        "",
        "## Check against the trained detector",
        "",
        f"{'Passed' if checked['passed'] else 'Failed'} on {checked['n']} pictures ({checked['images']}): "
        f"{checked['reason']}.",
        "",
    ]
    if checked.get("map_before") is not None and checked.get("map_after") is not None:
        lines += [
            f"mAP before {100 * checked['map_before']:.2f} %, after {100 * checked['map_after']:.2f} % (on squares).",
            "",
        ]
    if "int8" in manifest:
        last = manifest["int8"]["steps"][-1]
        kept = ", ".join(last["float_layers"]) or "none"
        lines += [
            "## INT8",
            "",
            f"Quantised with {manifest['int8']['calibration_images']} calibration pictures; {last['drop_points']:.2f} "
            f"points lost. Layers left in float: {kept}.",
            "",
        ]
    return "\n".join(lines)
