"""What an artefact is asked to be, checked; what exports of classifiers and of detectors share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from torch import nn

from convscale.arch.spec import NetSpec
from convscale.artifact.boxes import INSIDE
from convscale.artifact.manifest import MODEL_FILES
from convscale.artifact.promise import Promise
from convscale.conditions import Size
from convscale.errors import UserError, nearest
from convscale.files import around_temporary
from convscale.images.preprocess import Preprocessing
from convscale.machine import check_own, need_cuda
from convscale.networks.foreign import Foreign
from convscale.runtimes.base import need_runtime, no_bf16, runtimes_of
from convscale.ship.box_metrics import Truth
from convscale.ship.qat import check_tunable
from convscale.ship.quantize import check_calibration

FORMATS = tuple(MODEL_FILES)
FLOAT_FILE = "float.onnx"
"""The float network INT8 is made from; gone before the folder gets its name."""
NOISE_IMAGES = 8
"""Images of seeded noise that stand in where none are given."""

Images = np.ndarray | Sequence[np.ndarray]
"""uint8 (N, H, W, C), or batches of that."""
Labels = Sequence[int] | np.ndarray
"""(N,), or for several labels (N, classes) of zeros and ones."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ExportRequest:
    """What an artefact is to be: the arguments of :func:`export`, which says what they mean."""

    format: str = "onnx"
    """``onnx``, ``openvino`` or ``torch``."""
    image_size: Size | None = None
    """In pixels; None: the preprocessing's or the network's own."""
    classes: Sequence[str] | None = None
    """Names of the outputs; None: their numbers."""
    preprocessing: Preprocessing | None = None
    """None: as the network says."""
    bake: bool = False
    """Preprocessing and softmax become part of the network."""
    half: bool = False
    """Weights in half precision."""
    computes_half: bool = False
    """The whole network in half precision (format ``onnx``), for a GPU: a processor computes it in float32."""
    strided_stem: bool = False
    """A space-to-depth stem as one strided convolution."""
    bf16: bool = False
    """Float operations are computed in bfloat16."""
    int8: bool = False
    """Quantised to 8 bits."""
    qat: bool = False
    """Where that loses too much, weights learn to be rounded first."""
    int8_route: str | None = None
    """The quantiser, a key of ``ROUTES``; None: the fastest that passes."""
    calibration_images: np.ndarray | None = None
    """For INT8: uint8 (N, H, W, C)."""
    max_drop: float = 0.5
    """Accuracy points INT8 may lose."""
    spec: NetSpec | Mapping[str, object] | None = None
    """To keep beside it; None: the network's own."""
    card: Mapping[str, str] | None = None
    """Facts for the model card."""
    thresholds: Sequence[float] | None = None
    """For several labels per image; None: one label."""
    verify_images: Images | None = None
    """To check it on; None: noise."""
    verify_labels: Labels | Sequence[Truth] | None = None
    """Their classes; of a detector their boxes."""
    promise: Promise | None = None
    """The speed it is to have on a device that is not here."""
    temperatures: Sequence[float] | None = None
    """For several labels per image: what each class's logit is divided by before the sigmoid; None: by 1."""
    with_features: bool = False
    """Its last feature map is an output, too."""

    nms: str = INSIDE
    """Of a detector: where non-maximum suppression is done, ``inside`` the network or ``outside``."""

    @property
    def precision(self) -> str:
        """As the artefact's record has it."""
        halved = self.half or self.computes_half
        return "int8" if self.int8 else "bf16" if self.bf16 else "fp16" if halved else "fp32"


def class_labels(request: ExportRequest) -> Labels | None:
    """What a classifier is checked by.

    Raises:
        UserError: boxes were given.
    """
    labels = request.verify_labels
    if labels is not None and not isinstance(labels, np.ndarray) and any(isinstance(each, Truth) for each in labels):
        raise UserError("verify_labels holds boxes; a classifier's are class numbers")
    return cast("Labels | None", labels)


def noise_images(preprocessing: Preprocessing, count: int = NOISE_IMAGES) -> np.ndarray:
    """Seeded uint8 noise (count, H, W, C) in the shape an artefact takes."""
    shape = (count, preprocessing.height, preprocessing.width, preprocessing.channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def check_form(request: ExportRequest) -> np.ndarray | None:
    """The calibration images for INT8, None for float.

    Raises:
        UserError: an unknown format, a missing runtime, or a combination that does not exist.
    """
    if request.format not in FORMATS:
        raise UserError(f"format {request.format!r} is unknown{nearest(request.format, FORMATS)}")
    need_runtime(runtimes_of(request.format)[0])
    if request.format == "torch" and (request.half or request.int8):
        form = "int8" if request.int8 else "half"
        raise UserError(f"format torch has no {form} form; use format onnx or openvino")
    if request.half and (request.int8 or request.bf16):
        raise UserError(f"half and {'int8' if request.int8 else 'bf16'} exclude each other; choose one")
    if request.bf16 and (reason := no_bf16(request.format)):
        raise UserError(reason)
    if request.int8 and request.qat:
        check_tunable(request.calibration_images)
    return check_calibration(request.calibration_images, request.format) if request.int8 else None


def need_device(device: str) -> None:
    """
    Raises:
        UserError: it is no device of this machine, or a card that is not there.
    """
    if check_own(device) != "cpu":
        need_cuda(device)


@contextmanager
def on_processor(net: object) -> Iterator[None]:
    """A network in the processor's memory, and back where it was afterwards; a name or a spec is built there anyhow.

    An artefact is captured, ranked and compared there: images lie there, and a GPU's TensorFloat-32 is no reference.
    """
    module = net.module if isinstance(net, Foreign) else net
    held = [*module.parameters(), *module.buffers()] if isinstance(module, nn.Module) else []
    device = next((tensor.device for tensor in held if tensor.device.type != "cpu"), None)
    if not isinstance(module, nn.Module) or device is None:
        yield
        return
    try:
        module.cpu()
        yield
    finally:
        module.to(device)


def need_space(folder: Path, module: nn.Module) -> None:
    """
    Raises:
        UserError: the disk has no room for the weights twice (the file, and its temporary form).
    """
    need = 2 * sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()]) + 10_000_000
    free = shutil.disk_usage(folder).free
    if free < need:
        raise UserError(
            f"the disk of {around_temporary(folder)} has {free / 1e6:.0f} MB free, {need / 1e6:.0f} MB are needed; "
            "free some or name another folder"
        )
