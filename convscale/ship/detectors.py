"""A detector becomes an artefact: captured, folded, written, checked box by box, sealed; or nothing at all."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from torch import fx, nn

from convscale.artifact.artifact import Artifact, load_artifact
from convscale.artifact.boxes import INSIDE, OUTSIDE, Boxes, Cut
from convscale.artifact.folder import CARD, seal, staged_folder
from convscale.artifact.manifest import MODEL_FILES, Manifest
from convscale.errors import UserError, check_text
from convscale.files import write_json, write_text
from convscale.formats.baked import BakedBoxes
from convscale.formats.fold import capture, fold
from convscale.formats.ir import write_ir
from convscale.formats.onnx import OPSET, store_half, write_onnx
from convscale.formats.program import write_program
from convscale.formats.suppression import add_suppression
from convscale.formats.two_stage import check_two_stages, write_two_stages
from convscale.images.preprocess import Preprocessing
from convscale.machine import code_commit
from convscale.networks.pictures import taught_of
from convscale.nn.detector_graph import OUTPUTS, TWO_STAGES, DetectorGraph
from convscale.nn.detectors import Detector, DetectorSpec
from convscale.nn.modes import evaluating
from convscale.runtimes.base import runtimes_of
from convscale.ship.box_metrics import Found, Truth, coco_metrics, matched, need_coco
from convscale.ship.box_verification import BoxesWithheld, BoxVerification
from convscale.ship.detector_card import detector_card
from convscale.ship.float_layers import RANKING, rank_layers, search_float_layers
from convscale.ship.layers import LAYER_OPERATORS, Layer
from convscale.ship.pays import check_pays
from convscale.ship.quantize import quantize_file, routes_of, spread
from convscale.ship.request import FLOAT_FILE, ExportRequest, need_space, noise_images, on_processor
from convscale.ship.verify import passed_in

SURE = 0.3
"""Score of the boxes that are compared."""
SAME_IOU = 0.99
"""What two boxes must share to be the same."""
LEAST_SAME = 0.999
"""Share of the boxes that must be the same in a float artefact, both ways."""
LOOSE_IOU = 0.5
"""What is the same box in an INT8 artefact."""
MAX_SCORE = {"fp32": 1e-3, "fp16": 1e-2}
"""Largest difference of a sorted candidate's score, where candidates are given."""
LEAST_SIDE = 0.01
"""Pixels: boxes with a shorter side are not compared; rounding alone decides what they share."""
CHUNK = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    """What an export consists of."""

    detector: Detector
    request: ExportRequest
    cut: Cut
    preprocessing: Preprocessing
    images: np.ndarray
    """uint8 (N, side, side, 3), to check on."""
    truths: Sequence[Truth] | None
    """Their boxes, in the square's pixels."""
    reference: Sequence[Found]
    """What the trained detector says of them."""


def export_detector(
    detector: nn.Module,
    out_dir: str | os.PathLike[str],
    request: ExportRequest,
    calibration: np.ndarray | None,
    *,
    overwrite: bool = False,
) -> Artifact:
    """Write a detector as an artefact folder, and check its boxes before it gets its name.

    Args:
        detector: one of ours; it is left as it is.
        out_dir: the folder to make; it appears whole or not at all.
        request: what it is to be; ``verify_images`` are squares, ``verify_labels`` their boxes.
        calibration: for INT8: squares of the training set.
        overwrite: replace an artefact of that name.

    Raises:
        Slower: INT8 is slower than float here.
        UserError: bad input, or a detector that can not be written so.
        BoxesWithheld: the artefact does not say what the detector says.
    """
    assert isinstance(detector, Detector), f"{type(detector).__name__} is no detector of ours"
    if request.verify_labels is not None:
        need_coco()
    spec = detector.detector_spec
    nms = check_text("nms", request.nms, (INSIDE, OUTSIDE))
    nms = OUTSIDE if request.format == "torch" else nms
    names = _class_names(spec, request)
    preprocessing = _preprocessing(spec, request)
    with on_processor(detector):
        if spec.head == TWO_STAGES:
            check_two_stages(request.format, int8=calibration is not None or request.int8)
        graph = DetectorGraph(detector)
        images, truths = _images(request, preprocessing)
        cut = Cut(
            nms=nms,
            score_threshold=cast(float, spec.score_threshold),
            nms_threshold=cast(float, spec.nms_threshold),
            max_detections=cast(int, spec.max_detections),
            head=spec.head,
            backbone=spec.backbone_name,
        )
        job = _Job(
            detector=detector,
            request=request,
            cut=cut,
            preprocessing=preprocessing,
            images=images,
            truths=truths,
            reference=trained_answers(detector, images),
        )
        record = _record(job, spec, len(names))
        with staged_folder(out_dir, overwrite=overwrite) as folder, ExitStack() as stack:
            need_space(folder, detector)
            write_json(folder / "classes.json", names)
            write_json(folder / "preprocessing.json", preprocessing.to_dict())
            manifest = Manifest.from_dict({**record, "files": {}}, folder)
            folded = _write(job, graph, folder)
            int8 = rival = None
            if calibration is not None and folded is not None:
                rival = _float_form(job, folder, record, stack)
                int8 = _quantise(job, folded, folder, manifest, calibration)
            artifact = Artifact(folder, manifest)
            checked = _verify(job, artifact)
            if not checked.passed:
                raise BoxesWithheld(f"artefact {Path(out_dir)} is withheld: {checked.reason}", checked)
            if int8 is not None and rival is not None:
                check_pays(artifact, rival, out_dir)
                passed = passed_in(artifact, lambda other: _verify(job, other).passed)
                record["int8"] = {**int8, "passed_in": passed}
            write_json(folder / "verification.json", checked.to_dict())
            card = detector_card(record, names, preprocessing, checked.to_dict(), request.card or {})
            write_text(folder / CARD, card)
            seal(folder, record)
    return load_artifact(out_dir)


def _class_names(spec: DetectorSpec, request: ExportRequest) -> list[str]:
    names = [str(n) for n in range(1, spec.num_classes + 1)]
    names = names if request.classes is None else [str(name) for name in request.classes]
    if len(names) != spec.num_classes:
        raise UserError(f"classes names {len(names)} classes, the detector has {spec.num_classes}")
    return names


def _preprocessing(spec: DetectorSpec, request: ExportRequest) -> Preprocessing:
    if request.image_size not in (None, spec.image_size):
        raise UserError(f"image_size is {request.image_size}; a detector's is its own, {spec.image_size}")
    no_form = {
        "thresholds": request.thresholds is not None,
        "temperatures": request.temperatures is not None,
        "strided_stem": request.strided_stem,
        "with_features": request.with_features,
        "preprocessing": request.preprocessing is not None,
        "promise": request.promise is not None,
        "bf16": request.bf16,
        "int8='qat'": request.int8 and request.qat,
    }
    for name, asked in no_form.items():
        if asked:
            raise UserError(f"{name} is for classifiers; a detector has none, leave it out")
    return Preprocessing(image_size=spec.image_size, channels=3, mean=spec.mean, std=spec.std, crop_pct=1.0)


def _images(request: ExportRequest, preprocessing: Preprocessing) -> tuple[np.ndarray, Sequence[Truth] | None]:
    """Squares to check on, and their boxes."""
    if request.verify_images is None:
        return noise_images(preprocessing), None
    given = request.verify_images
    images = given if isinstance(given, np.ndarray) else np.concatenate(list(given))
    side = preprocessing.width
    if images.dtype != np.uint8 or images.shape[1:] != (side, side, 3) or not len(images):
        raise UserError(
            f"verify_images must be uint8 (N, {side}, {side}, 3), at least one, got {images.dtype} {images.shape}"
        )
    truths = request.verify_labels
    if truths is None:
        return images, None
    if len(truths) != len(images) or not all(isinstance(each, Truth) for each in truths):
        raise UserError(f"verify_labels of a detector must be {len(images)} Truth values, one for each image")
    return images, cast(Sequence[Truth], truths)


def _record(job: _Job, spec: DetectorSpec, num_classes: int) -> dict[str, object]:
    request, taught = job.request, taught_of(job.detector)
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": code_commit(),
        "data_digest": None if taught is None else taught.data_digest,
        "model": spec.name,
        "format": request.format,
        "precision": request.precision,
        "baked": request.bake,
        "strided_stem": False,
        "num_classes": num_classes,
        "thresholds": None,
        "opset": OPSET if request.format == "onnx" else None,
        "runtime": {"name": runtimes_of(request.format)[0], "threads": None, "batch_size": None},
        "spec": None,
        "detector": spec.to_dict(),
        "category_ids": [] if taught is None else list(taught.category_ids),
        "detection": job.cut.to_dict(),
    }


# ---------------------------------------------------------------- what the trained one says


def trained_answers(detector: nn.Module, images: np.ndarray) -> list[Found]:
    """A detector's boxes of squares, uint8 (N, side, side, 3), in their pixels."""
    parameter = next(detector.parameters())
    found: list[Found] = []
    with evaluating(detector), torch.no_grad():
        for start in range(0, len(images), CHUNK):
            pixels = torch.from_numpy(np.require(images[start : start + CHUNK], requirements=["C", "W"]))
            inputs = pixels.to(parameter.device).permute(0, 3, 1, 2).to(parameter.dtype) / 255
            for each in detector(list(inputs)):
                values = {name: each[name].float().cpu().numpy() for name in ("boxes", "scores", "labels")}
                found.append(Found(**{**values, "labels": values["labels"].astype(np.int64)}))
    return found


def _found(boxes: Boxes) -> Found:
    return Found(boxes=boxes.boxes, scores=boxes.scores, labels=boxes.labels)


# ---------------------------------------------------------------- files


def _write(job: _Job, graph: DetectorGraph, folder: Path) -> fx.GraphModule | None:
    """The model file of the format; for INT8 the float network that it will be made from. Gives the folded graph; None
    where there are two stages.
    """
    request, side = job.request, job.preprocessing.width
    if graph.second is not None:
        path = folder / "model.onnx"
        write_two_stages(graph, path, job.preprocessing if request.bake else None)
        _finish(job, path)
        return None
    example = torch.zeros(2, 3, side, side)
    with evaluating(graph):
        folded = fold(graph, example)
    net: nn.Module = folded
    if request.bake:
        net, example = BakedBoxes(folded, job.preprocessing), torch.zeros(2, side, side, 3, dtype=torch.uint8)
    if request.format == "torch":
        write_program(net, example, folder / MODEL_FILES["torch"][0])
        return folded
    path = folder / (FLOAT_FILE if request.int8 else "model.onnx")
    write_onnx(net, example, path, outputs=OUTPUTS)
    if request.int8:
        return folded
    _finish(job, path)
    return folded


def _finish(job: _Job, path: Path) -> None:
    """Half precision, suppression and the format, where they are wanted."""
    request = job.request
    if request.format == "onnx" and request.half:
        store_half(path)
    if job.cut.nms == INSIDE:
        _suppress_inside(path, job)
    if request.format == "openvino":
        write_ir(path, path.with_name("model.xml"), half=request.half)
        path.unlink()


def _float_form(job: _Job, folder: Path, record: Mapping[str, object], stack: ExitStack) -> Artifact:
    """The float network that an INT8 one has to be faster than, from ``FLOAT_FILE``; gone when the stack is left."""
    place = Path(stack.enter_context(TemporaryDirectory(dir=folder.parent, prefix=".float.")))
    for name in ("classes.json", "preprocessing.json"):
        shutil.copyfile(folder / name, place / name)
    shutil.copyfile(folder / FLOAT_FILE, place / MODEL_FILES["onnx"][0])
    if job.cut.nms == INSIDE:
        _suppress_inside(place / MODEL_FILES["onnx"][0], job)
    plain = {**record, "format": "onnx", "precision": "fp32", "runtime": {"name": runtimes_of("onnx")[0]}, "files": {}}
    return Artifact(place, Manifest.from_dict(plain, place))


def _suppress_inside(path: Path, job: _Job) -> None:
    add_suppression(
        path,
        side=job.preprocessing.width,
        score_threshold=job.cut.score_threshold,
        nms_threshold=job.cut.nms_threshold,
        most=job.cut.max_detections,
    )


def _quantise(
    job: _Job, folded: fx.GraphModule, folder: Path, manifest: Manifest, calibration: np.ndarray
) -> dict[str, object]:
    """Quantise the float file, leaving in float what must stay so. Returns what the manifest says about it."""
    request = job.request
    source, target = folder / FLOAT_FILE, folder / MODEL_FILES[request.format][0]
    probe = Artifact(folder, manifest)
    if job.cut.nms == INSIDE and request.format == "openvino":
        _suppress_inside(source, job)
    total = sum(1 for node in folded.graph.nodes if node.target in LAYER_OPERATORS)

    def ranked() -> Sequence[Layer]:
        some = np.require(calibration[spread(len(calibration), RANKING)], requirements=["C", "W"])
        pixels = torch.from_numpy(some)
        batch = pixels if request.bake else job.preprocessing.normalize(pixels)
        graph = capture(BakedBoxes(folded, job.preprocessing) if request.bake else folded, batch)
        names = [_module_name(node) for node in folded.graph.nodes if node.target in LAYER_OPERATORS]
        nodes = [node for node in graph.graph.nodes if node.target in LAYER_OPERATORS]
        layers = [Layer(name=n, value=v.name, file_value=v.name) for n, v in zip(names, nodes, strict=True)]
        return rank_layers(graph, batch, layers)

    route = routes_of(request.format)[0]
    batches = [probe.input_batch(calibration[at : at + 1]) for at in range(len(calibration))]

    def attempt(kept: Sequence[Layer]) -> float:
        quantize_file(source, target, route, batches, [layer.file_value for layer in kept])
        if job.cut.nms == INSIDE and request.format == "onnx":
            _suppress_inside(target, job)
        return _lost(_verify(job, Artifact(folder, manifest)))

    steps, _ = search_float_layers(ranked, total, attempt, request.max_drop)
    source.unlink()
    return {
        "route": route,
        "calibration_images": len(calibration),
        "max_drop": request.max_drop,
        "layers": total,
        "steps": [step.to_dict() for step in steps],
    }


def _module_name(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if path]
    return str(paths[-1]) if paths else node.name


# ---------------------------------------------------------------- the check


def verify_boxes(
    detector: nn.Module,
    artifact: Artifact,
    images: np.ndarray,
    truths: Sequence[Truth] | None = None,
    *,
    batch_sizes: Sequence[int] = (1, 2, 7),
    max_drop: float = 0.5,
    source: str = "given",
    reference: Sequence[Found] | None = None,
) -> BoxVerification:
    """Run a detector and its artefact on the same squares, and judge.

    Args:
        detector: the trained one.
        artifact: what was made from it.
        images: uint8 (N, side, side, 3).
        truths: the boxes of each, in the square's pixels, for mAP.
        batch_sizes: the first images go through the artefact once at every size.
        max_drop: points of mAP an INT8 artefact may lose; without truth, points of disagreement.
        source: what the images are, for the record.
        reference: the detector's answers, where they are known already.
    """
    before = trained_answers(detector, images) if reference is None else reference
    assert artifact.cut is not None, "a detector's artefact has a cut"
    int8 = artifact.precision == "int8"
    least = LOOSE_IOU if int8 else SAME_IOU
    after = [_found(each) for each in artifact.detect(images)]
    pairs = [(_with_area(old), _with_area(new)) for old, new in zip(before, after, strict=True)]
    if not int8:
        for size in batch_sizes:
            few = min(len(images), 2 * size + 1)
            there = [_found(each) for each in artifact.detect(images[:few], batch_size=size)]
            pairs += [(old, _with_area(new)) for (old, _), new in zip(pairs[:few], there, strict=True)]
    known, again, given, shared = 0, 0, 0, 0
    for old, new in pairs:
        # a box just below the line on one side is no box that is missing on the other
        low_old, low_new = old.above(SURE - 0.02), new.above(SURE - 0.02)
        known, again = known + len(old.above(SURE).boxes), again + matched(old.above(SURE), low_new, least)
        given, shared = given + len(new.above(SURE).boxes), shared + matched(new.above(SURE), low_old, least)
    found: dict[str, Any] = {
        "n": len(images),
        "images": source,
        "batch_sizes": tuple(batch_sizes),
        "boxes": sum(len(_with_area(each).above(SURE).boxes) for each in before),
        "sure": SURE,
        "least_iou": least,
        "found_again": again / known if known else 1.0,
        "made_up": 1 - shared / given if given else 0.0,
        "max_score": max((_score_difference(old, new) for old, new in pairs), default=0.0),
        "precision": artifact.precision,
        "nms": artifact.cut.nms,
        "max_drop": max_drop if int8 else None,
    }
    if truths is not None:
        for name, said in (("before", before), ("after", after)):
            metrics = coco_metrics(truths, said, len(artifact.classes))
            found |= {f"map_{name}": _known(metrics.map), f"ap50_{name}": _known(metrics.ap50)}
    passed, reason = _judge(BoxVerification(**found))
    return BoxVerification(**found, passed=passed, reason=reason)


def _with_area(found: Found) -> Found:
    """Without boxes that are lines or points."""
    keep = (found.boxes[:, 2:] - found.boxes[:, :2]).min(1, initial=np.inf) >= LEAST_SIDE
    return Found(boxes=found.boxes[keep], scores=found.scores[keep], labels=found.labels[keep])


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _score_difference(old: Found, new: Found) -> float:
    """Between the best scores of both, sorted; of those that both have."""
    count = min(len(old.scores), len(new.scores), 10)
    if not count:
        return float(max((*old.scores[:1], *new.scores[:1]), default=0.0))
    return float(np.abs(np.sort(old.scores)[::-1][:count] - np.sort(new.scores)[::-1][:count]).max())


def _verify(job: _Job, artifact: Artifact) -> BoxVerification:
    return verify_boxes(
        job.detector,
        artifact,
        job.images,
        job.truths,
        max_drop=job.request.max_drop,
        source="noise" if job.request.verify_images is None else "given",
        reference=job.reference,
    )


def _lost(v: BoxVerification) -> float:
    """Points that an INT8 artefact loses: of mAP, or of boxes where there is no truth."""
    if v.drop_points is not None:
        return v.drop_points
    return 100 * max(1 - v.found_again, v.made_up)


def _judge(v: BoxVerification) -> tuple[bool, str]:
    """The gate. Returns whether it passes, and why in one line."""
    if v.precision == "int8":
        assert v.max_drop is not None, "an INT8 verification states its max_drop"
        what = "mAP" if v.drop_points is not None else f"boxes above {v.sure} (no truth)"
        reason = f"INT8 loses {_lost(v):.2f} points of {what} on {v.n} pictures, {v.max_drop:g} are allowed"
        return _lost(v) <= v.max_drop + 1e-9, reason
    if v.max_score > MAX_SCORE[v.precision]:
        return False, f"scores differ by {v.max_score:.1e}, {MAX_SCORE[v.precision]:g} is allowed"
    if v.found_again < LEAST_SAME or v.made_up > 1 - LEAST_SAME:
        return (
            False,
            f"{100 * v.found_again:.2f} % of {v.boxes} boxes are found again with an IoU of {v.least_iou}, and "
            f"{100 * v.made_up:.2f} % are made up; {100 * LEAST_SAME:g} % must be the same",
        )
    if not v.boxes:
        return True, f"no box above {v.sure} to compare; the best scores differ by at most {v.max_score:.1e}"
    return (
        True,
        f"{100 * v.found_again:.2f} % of {v.boxes} boxes above {v.sure} are the same (IoU {v.least_iou}), scores "
        f"differ by at most {v.max_score:.1e}",
    )


def describe(checked: Mapping[str, Any]) -> str:
    """A stored verification in a line."""
    text = str(checked["reason"])
    if checked.get("map_before") is not None and checked.get("map_after") is not None:
        text += f"; mAP {100 * checked['map_before']:.2f} % before, {100 * checked['map_after']:.2f} % after"
    return text
