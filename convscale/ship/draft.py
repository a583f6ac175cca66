"""What an export is to be, and what it writes before anything is checked."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import fx, nn

from convscale.arch.spec import NetSpec
from convscale.artifact.artifact import Artifact
from convscale.artifact.features import Head, write_head
from convscale.artifact.manifest import Manifest
from convscale.conditions import Size, size_text
from convscale.errors import UserError, first_line
from convscale.files import write_json
from convscale.formats.baked import Baked
from convscale.formats.features import keeping_features
from convscale.formats.fold import fold
from convscale.formats.ir import write_ir
from convscale.formats.onnx import OPSET, compute_half, store_half, write_onnx
from convscale.formats.program import write_program
from convscale.images.preprocess import Preprocessing
from convscale.machine import code_commit
from convscale.networks.inputs import example_input
from convscale.networks.pictures import preprocessing_of, taught_of
from convscale.networks.resolve import Network, as_module
from convscale.nn.modes import forward_logits
from convscale.runtimes.base import runtimes_of
from convscale.ship.layers import Layer
from convscale.ship.request import FLOAT_FILE, ExportRequest, Images, check_form, need_space, noise_images, on_processor
from convscale.ship.verify import reference_logits

OUTPUTS = {False: ("logits",), True: ("probabilities", "logits")}
"""Names of a network's outputs, without and with baked preprocessing."""


@dataclass(kw_only=True)
class Shared:
    """What several exports of one network, at one preprocessing and on the same images, have in common: made once, by
    the first that needs it.
    """

    folder: Path
    """Where the float ONNX files are kept."""
    graph: fx.GraphModule | None = None
    """The network, folded."""
    is_tuned: bool = False
    """``graph`` is one that has learnt to be rounded."""
    tuned: dict[str, fx.GraphModule] = field(default_factory=dict)
    """It again, its weights having learnt to be rounded, by the quantiser that rounds them; a twin takes those of the
    route that it is as."""
    reference: np.ndarray | None = None
    """Its logits of the images that artefacts are checked on."""
    ranking: dict[bool, list[Layer]] = field(default_factory=dict)
    """Its layers, most sensitive to rounding first, without and with what is baked: no quantiser changes that."""
    quantised: dict[tuple[object, ...], Path] = field(default_factory=dict)
    """Folders of quantised files without a layer in float, by format, route, what is baked and strided, and the number
    of calibration images."""

    def folded(self, module: nn.Module, example: torch.Tensor) -> fx.GraphModule:
        """The network, captured and folded."""
        if self.graph is None:
            self.graph = fold(module, example)
        return self.graph

    def logits(self, module: nn.Module, artifact: Artifact, images: Images) -> np.ndarray:
        """The network's logits of the images."""
        if self.reference is None:
            parts = [images] if isinstance(images, np.ndarray) else images
            logits = [reference_logits(module, artifact, part) for part in parts if len(part)]
            if not logits:
                raise UserError("there are no images to check the artefact on; give at least one")
            self.reference = np.concatenate(logits)
        return self.reference


@dataclass(frozen=True, kw_only=True, eq=False)
class Draft:
    """What an export is made of, checked before anything is written."""

    module: nn.Module
    """The network."""
    example: torch.Tensor
    """A batch as it takes them."""
    preprocessing: Preprocessing
    """What is shipped with it."""
    classes: list[str]
    """Names of its outputs."""
    calibration: np.ndarray | None
    """The images that ranges come from; None: it stays in float."""
    record: dict[str, object]
    """What the artefact's record will say, without its files."""

    def write(self, folder: Path, shared: Shared) -> Artifact:
        """The folder's files without a check; for INT8 the float network it will be made from."""
        need_space(folder, self.module)
        write_json(folder / "classes.json", self.classes)
        write_json(folder / "preprocessing.json", self.preprocessing.to_dict())
        manifest = Manifest.from_dict({**self.record, "files": {}}, folder)
        with on_processor(self.module):
            write_model(self.module, self.example, folder, manifest, self.preprocessing, shared)
        return Artifact(folder, manifest)


def draft(net: Network, request: ExportRequest) -> Draft:
    """What a request comes to, checked as far as that goes without writing anything.

    Raises:
        UserError: as for :func:`convscale.ship.export.export`.
    """
    calibration = check_form(request)
    module, name = as_module(net)
    preprocessing = _preprocessing(module, request.preprocessing, request.image_size)
    if request.promise is not None and request.promise.image_size != preprocessing.image_size:
        raise UserError(
            f"the promise is of {size_text(request.promise.image_size)} px, the artefact takes "
            f"{size_text(preprocessing.image_size)} px"
        )
    example = example_input(module, preprocessing.image_size).cpu()
    classes = _class_names(module, name, example, request)
    return Draft(
        module=module,
        example=example,
        preprocessing=preprocessing,
        classes=classes,
        calibration=calibration,
        record=_record(request, module, name, len(classes)),
    )


def _class_names(module: nn.Module, name: str, example: torch.Tensor, request: ExportRequest) -> list[str]:
    """The names of the network's outputs.

    Raises:
        UserError: there are not as many names, or thresholds, as outputs; a threshold is no probability.
    """
    count = _num_classes(module, example)
    names = [str(i) for i in range(count)] if request.classes is None else [str(c) for c in request.classes]
    if len(names) != count:
        raise UserError(f"classes names {len(names)} classes, {name} has {count} outputs")
    given = request.thresholds
    if given is not None and not (len(given) == count and all(0 <= value <= 1 for value in given)):
        raise UserError(f"thresholds must be {count} probabilities, one for each class, got {list(given)}")
    heat = request.temperatures
    if heat is not None and given is None:
        raise UserError("temperatures are for several labels per image; give thresholds too")
    if heat is not None and not (len(heat) == count and all(math.isfinite(value) and value > 0 for value in heat)):
        raise UserError(f"temperatures must be {count} numbers above 0, one for each class, got {list(heat)}")
    return names


def _record(request: ExportRequest, module: nn.Module, name: str, num_classes: int) -> dict[str, object]:
    """What the artefact's record says, before its files are there."""
    own = getattr(module, "spec", None)  # a user's module may call anything so
    spec = (own if isinstance(own, NetSpec) else None) if request.spec is None else request.spec
    taught = taught_of(module)
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": code_commit(),
        "data_digest": None if taught is None else taught.data_digest,
        "model": name,
        "format": request.format,
        "precision": request.precision,
        "computes": "bf16" if request.bf16 else "fp16" if request.computes_half else "fp32",
        "baked": request.bake,
        "strided_stem": request.strided_stem,
        "num_classes": num_classes,
        "thresholds": _calibrated_thresholds(request),
        "opset": OPSET if request.format == "onnx" else None,
        "runtime": {"name": runtimes_of(request.format)[0], "threads": None, "batch_size": None},
        "spec": spec.to_dict() if isinstance(spec, NetSpec) else spec,
        **({} if request.promise is None else {"promise": request.promise.to_dict()}),
        **({} if request.temperatures is None else {"temperatures": [float(value) for value in request.temperatures]}),
        **({"features": True} if request.with_features else {}),
    }


def _calibrated_thresholds(request: ExportRequest) -> list[float] | None:
    """Thresholds of calibrated probabilities: the same logits are above them."""
    if request.thresholds is None:
        return None
    given = [float(value) for value in request.thresholds]
    if request.temperatures is None:
        return given
    inside = [min(max(value, 1e-12), 1 - 1e-12) for value in given]
    logits = [math.log(value / (1 - value)) for value in inside]
    return [1 / (1 + math.exp(-z / heat)) for z, heat in zip(logits, request.temperatures, strict=True)]


def _preprocessing(module: nn.Module, given: Preprocessing | None, image_size: Size | None) -> Preprocessing:
    """The preprocessing to ship, checked against a size asked for beside it."""
    if given is None:
        return preprocessing_of(module, image_size)
    if image_size is not None and image_size != given.image_size:
        raise UserError(f"image_size is {image_size}, preprocessing says {given.image_size}; give one of them")
    return given


def _num_classes(module: nn.Module, example: torch.Tensor) -> int:
    """Outputs per image, by running it.

    Raises:
        UserError: it can not take the example's shape, or does not give (N, classes).
    """
    try:
        logits = forward_logits(module, example)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{type(module).__name__} can not take an input of shape {tuple(example.shape)}: {first_line(error)}"
        ) from error
    if logits.ndim != 2:
        raise UserError(
            f"an artefact is a classifier with outputs (N, classes), {type(module).__name__} gives "
            f"{tuple(logits.shape)}"
        )
    return logits.shape[1]


def write_model(
    module: nn.Module,
    example: torch.Tensor,
    folder: Path,
    manifest: Manifest,
    preprocessing: Preprocessing,
    shared: Shared,
) -> None:
    """The model file of a format, weights inside or beside it; for INT8 the float network it will be made from."""
    form, half, int8 = manifest.format, manifest.precision == "fp16", manifest.precision == "int8"
    baked, strided, outputs = manifest.baked, manifest.strided_stem, list(OUTPUTS[manifest.baked])
    graph = shared.folded(module, example)
    if strided:
        graph = fold(graph, example, strided_stem=True)
    if manifest.features:
        graph, weight, bias = keeping_features(graph)
        write_head(folder, Head(weight=weight.float().cpu().numpy(), bias=bias.float().cpu().numpy()))
        outputs.append("features")
    net: nn.Module = graph
    if baked:
        net, example = (
            Baked(net, preprocessing, several=manifest.thresholds is not None, temperatures=manifest.temperatures),
            torch.from_numpy(noise_images(preprocessing, 2)),
        )
    if form == "torch":
        write_program(net, example, folder / "model.pt2")
        return
    onnx_path = folder / (FLOAT_FILE if int8 else "model.onnx")
    kept = shared.folder / f"shared{'-baked' * baked}{'-strided' * strided}{'-features' * manifest.features}.onnx"
    if shared.folder == folder:
        write_onnx(net, example, onnx_path, outputs=tuple(outputs))
    else:
        if not kept.is_file():
            write_onnx(net, example, kept, outputs=tuple(outputs))
        shutil.copyfile(kept, onnx_path)
    if int8:
        return
    if form == "openvino":
        write_ir(onnx_path, folder / "model.xml", half=half)
        onnx_path.unlink()
    elif manifest.computes == "fp16":
        compute_half(onnx_path)
    elif half:
        store_half(onnx_path)
