"""What a training leaves to look at: its evaluation, and the best and worst pictures with boxes drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from convscale.detect.boxes import BoxSplit
from convscale.detect.evaluate import DetectorEvaluation, answers, judge
from convscale.files import json_numbers, whole_folder, write_json
from convscale.images.decode import ImageError
from convscale.images.drawing import COLOURS, draw_boxes

EXAMPLES, FIGURES = "examples", "detection.json"
SHOWN = 6
"""Pictures of each kind."""
SCORE = 0.3
"""Boxes of lower scores are not drawn."""
_TRUE = "#2ca02c"
"""Colour of what is there; other colours are of what was said."""


def write_examples(
    net: nn.Module, split: BoxSplit, folder: Path, *, image_size: int, device: torch.device, most: int = 2000
) -> DetectorEvaluation:
    """Evaluate on (at most ``most`` pictures of) a split, and write the figures as ``detection.json`` and the best and
    worst pictures, with the boxes that are there and those that were said, into ``examples/``.
    """
    import time

    some = split if len(split) <= most else split.subset(np.linspace(0, len(split) - 1, most).astype(int))
    began = time.perf_counter()
    found, bad = answers(net, some, image_size=image_size, batch_size=16, device=device, precision="fp32", workers=0)
    result = judge(some, found, bad, seconds=time.perf_counter() - began)
    shown = {"best": result.best(SHOWN), "worst": result.worst(SHOWN)}
    listed: dict[str, list[dict[str, object]]] = {"best": [], "worst": []}
    with whole_folder(folder / EXAMPLES) as place:
        for kind, positions in shown.items():
            for number, at in enumerate(positions, 1):
                name = f"{kind}-{number}.png"
                if draw_example(result, some, at, place / name):
                    listed[kind].append(
                        {"file": name, "picture": Path(some.paths[at]).name, "quality": float(result.quality[at])}
                    )
    write_json(folder / FIGURES, json_numbers({**result.to_dict(), "examples": listed}))
    return result


def draw_example(result: DetectorEvaluation, split: BoxSplit, at: int, target: Path) -> bool:
    """A picture with what is there (green) and what was said; False where it can not be read."""
    from PIL import Image

    try:
        pixels = split.read(at)
    except ImageError:
        return False
    said = result.found[at].above(SCORE)
    names = [f"{split.classes[label - 1]} {score:.2f}" for label, score in zip(said.labels, said.scores, strict=True)]
    others = [colour for colour in COLOURS if colour != _TRUE]
    colours = [_TRUE] * len(split.boxes[at]) + [others[int(label) % len(others)] for label in said.labels]
    boxes = np.concatenate([split.boxes[at], said.boxes])
    texts = [""] * len(split.boxes[at]) + names
    Image.fromarray(draw_boxes(pixels, boxes, texts, colours=colours, most=480)).save(target)
    return True
