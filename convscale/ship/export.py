"""A network becomes an artefact: folded, written, checked, sealed; or nothing at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import fx, nn

from convscale.arch.spec import NetSpec
from convscale.artifact.artifact import CARD, Artifact, load_artifact, seal, staged_folder
from convscale.artifact.boxes import INSIDE
from convscale.artifact.manifest import MODEL_FILES, Manifest
from convscale.artifact.promise import Promise
from convscale.conditions import Size, size_text
from convscale.errors import UserError, first_line
from convscale.files import write_json, write_text
from convscale.formats.baked import Baked
from convscale.formats.fold import fold
from convscale.formats.ir import write_ir
from convscale.formats.onnx import OPSET, store_half, write_onnx
from convscale.formats.program import write_program
from convscale.images.preprocess import Preprocessing
from convscale.networks.inputs import example_input, preprocessing_of
from convscale.networks.resolve import Network, as_module
from convscale.nn.modes import forward_logits
from convscale.runtimes.base import runtimes_of
from convscale.ship.box_metrics import Truth
from convscale.ship.card import model_card
from convscale.ship.layers import LAYER_OPERATORS, Layer, shipped_graph
from convscale.ship.quantize import RANKING, quantize_file, rank_layers, search_float_layers, spread
from convscale.ship.request import (
    FLOAT_FILE,
    ExportRequest,
    Images,
    Labels,
    check_form,
    class_labels,
    need_space,
    noise_images,
)
from convscale.ship.verify import MAX_BATCH_RELATIVE, Verification, Withheld, reference_logits, verify

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
    reference: np.ndarray | None = None
    """Its logits of the images that artefacts are checked on."""

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


def export(
    net: Network,
    out_dir: str | os.PathLike[str],
    *,
    format: str = "onnx",
    image_size: Size | None = None,
    classes: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    bake: bool = False,
    half: bool = False,
    strided_stem: bool = False,
    int8: bool = False,
    calibration_images: np.ndarray | None = None,
    max_drop: float = 0.5,
    spec: NetSpec | Mapping[str, object] | None = None,
    card: Mapping[str, str] | None = None,
    thresholds: Sequence[float] | None = None,
    verify_images: Images | None = None,
    verify_labels: Labels | Sequence[Truth] | None = None,
    overwrite: bool = False,
    shared: Shared | None = None,
    promise: Promise | None = None,
    nms: str = INSIDE,
) -> Artifact:
    """Write a trained network as an artefact folder, and check it against the network before it gets its name.

    Args:
        net: any module (a name or a ``NetSpec`` is built untrained); it is left as it is.
        out_dir: the folder to make; it appears whole or not at all.
        format: ``onnx``, ``openvino`` or ``torch``.
        image_size: side in pixels; None: the preprocessing's or the network's own.
        classes: their names in the order of the outputs; None: their numbers.
        preprocessing: None: as the network's ``pretrained_cfg`` says.
        bake: cast, normalise, permute and softmax become part of the network: uint8 (N, H, W, C) in, probabilities out.
            Resizing stays outside.
        half: store the weights in half precision (they are computed with in float32 on a CPU).
        strided_stem: write a space-to-depth stem as one strided convolution; ``export_fastest`` tries whether that is
            faster here.
        int8: quantise to 8 bits after training (format ``onnx`` or ``openvino``).
        calibration_images: for INT8: uint8 (N, H, W, C) images of the training set, resized; at least 32; of more than
            300, 300 that are spread evenly over them are used.
        max_drop: accuracy points INT8 may lose on ``verify_images``; sensitive layers stay in float until that holds.
            Without labels: points of disagreement.
        spec: the ``NetSpec`` to keep beside it; None: ``net.spec`` where there is one.
        card: facts for the model card: ``data``, ``recipe``, ``accuracy``, ``speed``, ``licence`` and others.
        thresholds: of a network for several labels per image: for each class the probability above which it counts as
            present. Probabilities are sigmoids then. None: one label per image.
        verify_images: uint8 (N, H, W, C) real images, resized, or batches of them; None: a little noise, and the record
            says so.
        verify_labels: their classes, for accuracies: (N,), or for several labels (N, classes) of zeros and ones.
        overwrite: replace an artefact of that name, once the new one is whole.
        shared: what earlier exports of the same network, preprocessing and images have made.
        promise: a predicted speed to hold the artefact to on the day its device is there; it stands in the record and
            in the model card, and :func:`convscale.confirm` checks it.
        nms: of a detector: non-maximum suppression ``inside`` the network, whose output is a table of boxes for each
            picture, or ``outside``: it gives candidates, and ``classify`` does the rest. Format ``torch`` has it
            outside.
            A detector's ``verify_images`` are squares (``convscale.detect.ship.squares``), its ``verify_labels`` their
            boxes.

    Raises:
        UserError: bad input, a network that can not be written in this format, an unknown preprocessing, an existing
            folder.
        Withheld: the artefact does not say what the network says; nothing is left under ``out_dir``.
    """
    request = ExportRequest(
        format=format,
        image_size=image_size,
        classes=classes,
        preprocessing=preprocessing,
        bake=bake,
        half=half,
        strided_stem=strided_stem,
        int8=int8,
        calibration_images=calibration_images,
        max_drop=max_drop,
        spec=spec,
        card=card,
        thresholds=thresholds,
        verify_images=verify_images,
        verify_labels=verify_labels,
        promise=promise,
        nms=nms,
    )
    return export_as(net, out_dir, request, overwrite=overwrite, shared=shared)


def export_as(
    net: Network,
    out_dir: str | os.PathLike[str],
    request: ExportRequest,
    *,
    overwrite: bool = False,
    shared: Shared | None = None,
) -> Artifact:
    """:func:`export`, asked for by a value.

    Args:
        shared: what earlier exports of the same network, preprocessing and images have made.
    """
    calibration = check_form(request)
    module, name = as_module(net)
    if getattr(module, "detector_spec", None) is not None:
        from convscale.ship.detectors import export_detector  # slow to import

        return export_detector(module, out_dir, request, calibration, overwrite=overwrite)
    preprocessing = _preprocessing(module, request.preprocessing, request.image_size)
    if request.promise is not None and request.promise.image_size != preprocessing.image_size:
        raise UserError(
            f"the promise is of {size_text(request.promise.image_size)} px, the artefact takes "
            f"{size_text(preprocessing.image_size)} px"
        )
    example = example_input(module, preprocessing.image_size).cpu()
    classes = _class_names(module, name, example, request)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    record = _record(request, module, name, len(classes))
    images = noise_images(preprocessing) if request.verify_images is None else request.verify_images
    with staged_folder(out_dir, overwrite=overwrite) as folder:
        need_space(folder, module)
        write_json(folder / "classes.json", classes)
        write_json(folder / "preprocessing.json", preprocessing.to_dict())
        shared = shared or Shared(folder=folder)
        manifest = Manifest.from_dict({**record, "files": {}}, folder)
        try:
            _write_model(module.cpu(), example, folder, manifest, preprocessing, shared)
        finally:
            module.to(device)
        artifact = Artifact(folder, manifest)
        reference = shared.logits(module, artifact, images)
        if calibration is not None:
            record["int8"] = _quantise(module, artifact, shared, calibration, images, request)
            artifact = Artifact(folder, manifest)  # the file is another now
        checked = verify(
            module,
            artifact,
            images,
            class_labels(request),
            source="noise" if request.verify_images is None else "given",
            max_drop=request.max_drop,
            reference=reference,
        )
        if not checked.passed:
            raise withheld(out_dir, checked)
        write_json(folder / "verification.json", checked.to_dict())
        write_text(folder / CARD, model_card(record, classes, preprocessing, checked, request.card or {}))
        seal(folder, record)
    return load_artifact(out_dir)


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
    return names


def _record(request: ExportRequest, module: nn.Module, name: str, num_classes: int) -> dict[str, object]:
    """What the artefact's record says, before its files are there."""
    spec = getattr(module, "spec", None) if request.spec is None else request.spec
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": name,
        "format": request.format,
        "precision": request.precision,
        "baked": request.bake,
        "strided_stem": request.strided_stem,
        "num_classes": num_classes,
        "thresholds": None if request.thresholds is None else [float(value) for value in request.thresholds],
        "opset": OPSET if request.format == "onnx" else None,
        "runtime": {"name": runtimes_of(request.format)[0], "threads": None, "batch_size": None},
        "spec": spec.to_dict() if isinstance(spec, NetSpec) else spec,
        **({} if request.promise is None else {"promise": request.promise.to_dict()}),
    }


def withheld(out_dir: str | os.PathLike[str], checked: Verification) -> Withheld:
    """The error for an artefact that did not pass, naming where the difference starts if that is known."""
    where = f"; the difference starts at {checked.drift_layer}" if checked.drift_layer else ""
    return Withheld(f"artefact {Path(out_dir)} is withheld: {checked.reason}{where}", checked)


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


def _write_model(
    module: nn.Module,
    example: torch.Tensor,
    folder: Path,
    manifest: Manifest,
    preprocessing: Preprocessing,
    shared: Shared,
) -> None:
    """The model file of a format, weights inside or beside it; for INT8 the float network it will be made from."""
    form, half, int8 = manifest.format, manifest.precision == "fp16", manifest.precision == "int8"
    baked, strided = manifest.baked, manifest.strided_stem
    net: nn.Module = shared.folded(module, example)
    if strided:
        net = fold(net, example, strided_stem=True)
    if baked:
        net, example = (
            Baked(net, preprocessing, several=manifest.thresholds is not None),
            torch.from_numpy(noise_images(preprocessing, 2)),
        )
    if form == "torch":
        write_program(net, example, folder / "model.pt2")
        return
    onnx_path = folder / (FLOAT_FILE if int8 else "model.onnx")
    kept = shared.folder / f"shared{'-baked' * baked}{'-strided' * strided}.onnx"
    if shared.folder == folder:
        write_onnx(net, example, onnx_path, outputs=OUTPUTS[baked])
    else:
        if not kept.is_file():
            write_onnx(net, example, kept, outputs=OUTPUTS[baked])
        shutil.copyfile(kept, onnx_path)
    if int8:
        return
    if form == "openvino":
        write_ir(onnx_path, folder / "model.xml", half=half)
        onnx_path.unlink()
    elif half:
        store_half(onnx_path)


def _quantise(
    module: nn.Module,
    probe: Artifact,
    shared: Shared,
    calibration: np.ndarray,
    images: Images,
    request: ExportRequest,
) -> dict[str, object]:
    """Quantise the float file, leaving in float what must stay so. Returns what the manifest says about it."""
    folder, labels, max_drop = probe.folder, class_labels(request), request.max_drop
    source, target = folder / FLOAT_FILE, folder / MODEL_FILES[probe.format][0]
    total = sum(1 for node in cast(fx.GraphModule, shared.graph).graph.nodes if node.target in LAYER_OPERATORS)

    def ranked() -> Sequence[Layer]:
        graph, layers, batch = shipped_graph(
            module, probe.preprocessing, calibration[spread(len(calibration), RANKING)], baked=probe.baked
        )
        return rank_layers(graph, batch, layers)

    def batches() -> Iterator[np.ndarray]:
        for i in range(len(calibration)):
            yield probe.input_batch(calibration[i : i + 1])

    def attempt(kept: Sequence[Layer]) -> float:
        quantize_file(source, target, batches, len(calibration), [layer.file_value for layer in kept])
        candidate = Artifact(folder, probe.manifest)
        checked = verify(
            module, candidate, images, labels, max_drop=max_drop, reference=shared.reference, find_drift=False
        )
        if checked.batch_rel > MAX_BATCH_RELATIVE:
            return 100.0  # as good as nothing: other layers may be steady
        return 100 * (1 - checked.top1_agreement) if checked.drop_points is None else checked.drop_points

    steps, _ = search_float_layers(ranked, total, attempt, max_drop)
    source.unlink()
    return {
        "calibration_images": len(calibration),
        "max_drop": max_drop,
        "layers": total,
        "steps": [step.to_dict() for step in steps],
    }
