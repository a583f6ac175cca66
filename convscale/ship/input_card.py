"""How pictures become a network's input, to the letter: the part of a model card that lets others do the same.

In words, and as a few lines of onnxruntime, Pillow and NumPy that give the answers of ``Artifact.classify`` bit for bit
(tests/ship/test_card.py runs them).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from convscale.images.preprocess import Preprocessing


@dataclass(frozen=True, kw_only=True)
class Form:
    """What of an artefact's record decides how it is fed and read."""

    format: str
    """``onnx``, ``openvino`` or ``torch``."""
    baked: bool
    """Normalising and softmax are parts of the network."""
    thresholds: Sequence[float] | None = None
    """For several labels per image."""
    temperatures: Sequence[float] | None = None
    """What their logits are divided by; None: 1."""


def input_lines(form: Form, how: Preprocessing) -> list[str]:
    """Lines of Markdown: the steps, and for an ONNX file the code."""
    steps = _steps(form, how)
    lines = [f"{number}. {text}" for number, text in enumerate(steps, 1)]
    if form.format == "onnx":
        lines += ["", "Without convscale, the same answers:", "", "```python", *_code(form, how), "```"]
    return lines


def _steps(form: Form, how: Preprocessing) -> list[str]:
    gray = how.channels == 1
    target = _targets(how)
    if how.crop_mode == "squash":
        sides = f"the height becomes {target[0]} px and the width {target[1]} px, whatever the shape"
    elif how.height == how.width:
        sides = (
            f"the shorter side becomes {target[0]} px, the longer one `int({target[0]} * longer / shorter)` (cut to "
            "whole pixels)"
        )
    else:
        sides = (
            f"both sides are divided by `min(height / {target[0]}, width / {target[1]})` and rounded to nearest (ties "
            "to even)"
        )
    normal = (
        f"The network takes the pixels as they are, uint8 (N, {how.height}, {how.width}, {how.channels}), and "
        f"normalises them itself, by mean {list(how.mean)} and std {list(how.std)} of pixels in [0, 1]."
        if form.baked
        else "Each pixel value v becomes `v * scale + shift`, with `scale = 1 / (255 * std)` and "
        "`shift = -mean / std` of each channel rounded to float32, the sum computed in float64 and rounded once to "
        f"float32; mean {list(how.mean)}, std {list(how.std)}. The network takes float32 (N, {how.channels}, "
        f"{how.height}, {how.width})."
    )
    return [
        "JPEG, PNG, WebP, GIF and BMP are decoded as Pillow does it: JPEG by libjpeg-turbo's exact (`islow`) transform "
        "with smooth chroma"
        + (", the luma alone" if gray else "")
        + "; the first frame of an animation; no colour profile is applied. 16-bit gray becomes `rint(v / 257)`.",
        "The picture is turned as its EXIF orientation says, or XMP's where EXIF has none "
        "(`ImageOps.exif_transpose`); one whose EXIF block can not be read stays as it is.",
        "What is transparent, palettes and colour keys included, is composed on white at full size, in 8 bits "
        "(`Image.alpha_composite`).",
        f"Palettes, CMYK and {'colour' if gray else 'gray'} become {'gray' if gray else 'RGB'} by "
        f"`Image.convert({'L' if gray else 'RGB'!r})`"
        + (" (ITU-R 601 luma in 16-bit fixed point)" if gray else " (gray is repeated)")
        + ".",
        f"Resize: {sides}, by Pillow's `Image.resize` with `{how.interpolation.upper()}`"
        + ("" if how.interpolation == "nearest" else ": antialiased, columns first, then rows, 8 bits between the two")
        + ". Training and checks resize by the same code.",
        f"Crop: {how.width} x {how.height} px (width x height) from the centre; `left = round((width - {how.width}) / "
        f"2)`, `top = round((height - {how.height}) / 2)`, ties to even.",
        normal,
    ]


def _targets(how: Preprocessing) -> tuple[int, int]:
    """(height, width) that the resized picture covers."""
    return math.floor(how.height / how.crop_pct), math.floor(how.width / how.crop_pct)


def _code(form: Form, how: Preprocessing) -> list[str]:
    """Python."""
    gray, height, width = how.channels == 1, how.height, how.width
    target = _targets(how)
    constants = [
        f"mean, std = np.array({list(how.mean)}), np.array({list(how.std)})",
        'scale, shift = (1 / (255 * std)).astype("float32").astype("float64"), (-mean / std).astype("float32")',
    ]
    if how.crop_mode == "squash":
        resize = [f"    size = {target[1]}, {target[0]}"]
    elif height == width:
        resize = [f"    size = [int({target[0]} * side / min(image.size)) for side in image.size]"]
    else:
        resize = [
            f"    ratio = min(image.height / {target[0]}, image.width / {target[1]})",
            "    size = [round(side / ratio) for side in image.size]",
        ]
    batch = "[None, :, :, None]" if gray else "[None]"
    return [
        "import json, numpy as np, onnxruntime",
        "from PIL import Image, ImageOps",
        "",
        'session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])',
        'classes = json.load(open("classes.json", encoding="utf-8"))',
        *([] if form.baked else constants),
        *([] if form.thresholds is None else [f"thresholds = np.array({list(form.thresholds)})"]),
        *([f"temperatures = np.array({list(form.temperatures)})"] if form.temperatures and not form.baked else []),
        "",
        "",
        "def classify(path):",
        "    image = Image.open(path)",
        *(['    image.draft("L", None)  # of a JPEG its luma'] if gray else []),
        "    image = ImageOps.exif_transpose(image)",
        '    if image.mode.startswith("I"):',
        "        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))",
        "    if image.has_transparency_data:",
        '        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))',
        *resize,
        f'    image = image.convert("{"L" if gray else "RGB"}").resize(size, '
        f"Image.Resampling.{how.interpolation.upper()})",
        f"    left, top = round((image.width - {width}) / 2), round((image.height - {height}) / 2)",
        f"    pixels = np.asarray(image.crop((left, top, left + {width}, top + {height}))){batch}",
        *([] if form.baked else ['    pixels = (pixels * scale + shift).astype("float32").transpose(0, 3, 1, 2)']),
        "    outputs = session.run(None, {session.get_inputs()[0].name: pixels})[0][0]",
        *_answer(form),
    ]


def _answer(form: Form) -> list[str]:
    """The lines that make the first output an answer."""
    if form.thresholds is not None:
        heat = " / temperatures" if form.temperatures else ""
        sigmoid = [] if form.baked else [f"    outputs = 0.5 * (1 + np.tanh(0.5 * outputs{heat}))  # the sigmoid"]
        return [*sigmoid, "    return [classes[i] for i in np.flatnonzero(outputs > thresholds)]"]
    if form.baked:
        return ["    return classes[outputs.argmax()], outputs.max()"]
    return [
        "    outputs = np.exp(outputs - outputs.max())  # the softmax",
        "    return classes[outputs.argmax()], outputs.max() / outputs.sum()",
    ]
