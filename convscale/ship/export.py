"""A network becomes an artefact: folded, written, checked, sealed; or nothing at all."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
from torch import fx, nn

from convscale.arch.spec import NetSpec
from convscale.artifact.artifact import Artifact, load_artifact
from convscale.artifact.boxes import INSIDE, OUTSIDE
from convscale.artifact.folder import CARD, seal, staged_folder
from convscale.artifact.manifest import MODEL_FILES
from convscale.artifact.promise import Promise
from convscale.artifact.reference import write_reference
from convscale.conditions import Size
from convscale.errors import UserError, check_text
from convscale.files import write_json, write_text
from convscale.images.preprocess import Preprocessing
from convscale.machine import available_cores
from convscale.networks.resolve import Network, as_module
from convscale.runtimes.base import runtimes_of
from convscale.ship.box_metrics import Truth
from convscale.ship.card import model_card
from convscale.ship.draft import Draft, Shared, draft, write_model
from convscale.ship.float_layers import RANKING, rank_layers, search_float_layers
from convscale.ship.layers import LAYER_OPERATORS, Layer, shipped_graph
from convscale.ship.pays import PAYS_BATCH, check_pays, slower
from convscale.ship.qat import fine_tune
from convscale.ship.quantize import (
    ROUTES,
    SKETCH,
    quantize_file,
    rescue_of,
    routes_of,
    spread,
    twin_of,
)
from convscale.ship.request import (
    FLOAT_FILE,
    ExportRequest,
    Images,
    Labels,
    check_form,
    class_labels,
    noise_images,
    on_processor,
)
from convscale.ship.tune import Settings, first_look
from convscale.ship.verify import MAX_BATCH_RELATIVE, Verification, Withheld, passed_in, verify

HOPELESS = 1.1
"""An INT8 form that costs so many times what float costs at first sight is not looked at again."""
TWIN_GAIN = 1.05
"""A form with symmetric activations, which lose more, is made where it is so many times as fast at first sight."""


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
    bf16: bool = False,
    int8: bool | str = False,
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
    temperatures: Sequence[float] | None = None,
    with_features: bool = False,
    nms: str = INSIDE,
) -> Artifact:
    """Write a trained network as an artefact folder, and check it against the network before it gets its name.

    Args:
        net: any module (a name or a ``NetSpec`` is built untrained); it is left as it is.
        out_dir: the folder to make; it appears whole or not at all.
        format: ``onnx``, ``openvino`` or ``torch``.
        image_size: side in pixels; None: the preprocessing's or the network's own.
        classes: their names in the order of the outputs; None: their numbers.
        preprocessing: None: what the network was trained with, else as its ``pretrained_cfg`` says.
        bake: cast, normalise, permute and softmax become part of the network: uint8 (N, H, W, C) in, probabilities out.
            Resizing stays outside.
        half: store the weights in half precision (they are computed with in float32 on a CPU).
        strided_stem: write a space-to-depth stem as one strided convolution; ``export_fastest`` tries whether that is
            faster here.
        bf16: compute in bfloat16 (format ``openvino``), with ``int8`` what is left in float. Processors without it
            compute such an artefact in float32; none is written there.
        int8: quantise to 8 bits after training (format ``onnx`` or ``openvino``), by the fastest quantiser that is
            installed and passes. Where it is not faster than float here, nothing is written. ``"qat"``: where rounding
            loses more than ``max_drop``, the weights of a copy learn to be rounded first (minutes; the network itself
            is the teacher, so no labels are needed).
        calibration_images: for INT8: uint8 (N, H, W, C) images of the training set, resized; at least 32; of more than
            300, 300 that are spread evenly over them are used. ``"qat"`` takes at least 64, and up to 4,096.
        max_drop: accuracy points INT8 may lose on ``verify_images``; sensitive layers stay in float until that holds.
            Without labels: points of disagreement.
        spec: the ``NetSpec`` to keep beside it; None: ``net.spec`` where there is one.
        card: facts for the model card: ``data``, ``recipe``, ``accuracy``, ``speed``, ``licence`` and others.
        thresholds: of a network for several labels per image: for each class the probability above which it counts as
            present. Probabilities are sigmoids then, and thresholds are those of the network's own logits; with
            ``temperatures`` the artefact's are moved along. None: one label per image.
        verify_images: uint8 (N, H, W, C) real images, resized, or batches of them; None: a little noise, and the record
            says so.
        verify_labels: their classes, for accuracies: (N,), or for several labels (N, classes) of zeros and ones.
        overwrite: replace an artefact of that name, once the new one is whole.
        shared: what earlier exports of the same network, preprocessing and images have made.
        promise: a predicted speed to hold the artefact to on the day its device is there; it stands in the record and
            in the model card, and :func:`convscale.confirm` checks it.
        temperatures: with ``thresholds``: for each class what its logit is divided by before the sigmoid, so that its
            probabilities are calibrated (Guo et al. 2017); ``train`` fits them on validation. None: 1 for all.
        with_features: the map in front of the pool becomes one more output, and the classifier's weights stand beside
            the network, so that ``explain(artifact, images, method="cam")`` needs nothing else. The head must be an
            average pool and a linear layer.
        nms: of a detector: non-maximum suppression ``inside`` the network, whose output is a table of boxes for each
            picture, or ``outside``: it gives candidates, and ``classify`` does the rest. Format ``torch`` has it
            outside. A detector's ``verify_images`` are squares (``convscale.detect.ship.squares``), its
            ``verify_labels`` their boxes.

    Raises:
        UserError: bad input, a network that can not be written in this format, an unknown preprocessing, an existing
            folder; INT8 is slower than float, or bf16 emulated.
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
        bf16=bf16,
        int8=bool(int8),
        qat=wants_qat(int8),
        calibration_images=calibration_images,
        max_drop=max_drop,
        spec=spec,
        card=card,
        thresholds=thresholds,
        verify_images=verify_images,
        verify_labels=verify_labels,
        promise=promise,
        temperatures=temperatures,
        with_features=with_features,
        nms=nms,
    )
    return export_as(net, out_dir, request, overwrite=overwrite, shared=shared)


def wants_qat(int8: object) -> bool:
    """Whether INT8 is asked for with fine-tuning.

    Raises:
        UserError: it is neither true, false nor ``"qat"``.
    """
    if not isinstance(int8, bool) and int8 != "qat":
        raise UserError(f"int8 must be true, false or 'qat', got {int8!r}")
    return int8 == "qat"


def is_detector(net: Network) -> bool:
    """Whether a network gives boxes."""
    return isinstance(net, nn.Module) and getattr(net, "detector_spec", None) is not None


def export_as(
    net: Network,
    out_dir: str | os.PathLike[str],
    request: ExportRequest,
    *,
    overwrite: bool = False,
    shared: Shared | None = None,
    rival: Artifact | None = None,
    for_speed: bool = False,
) -> Artifact:
    """:func:`export`, asked for by a value.

    Args:
        shared: what earlier exports of the same network, preprocessing and images have made.
        rival: the float form that an INT8 one of a stated route has to be faster than; None: that is looked at
            elsewhere.
        for_speed: it is timed and thrown away: what is in bfloat16 need not agree. An untrained network's answers are
            nearly ties, and its speed does not depend on them.
    """
    with on_processor(net):
        if is_detector(net):
            from convscale.ship.detectors import export_detector  # slow to import

            return export_detector(as_module(net)[0], out_dir, request, check_form(request), overwrite=overwrite)
        if check_text("nms", request.nms, (INSIDE, OUTSIDE)) != INSIDE:
            raise UserError(f"nms is {request.nms!r}, which is for detectors, and this is a classifier; leave it out")
        if request.int8 and request.int8_route is None:
            return _export_int8(net, out_dir, request, overwrite=overwrite, shared=shared)
        return _export_form(net, out_dir, request, overwrite=overwrite, shared=shared, rival=rival, for_speed=for_speed)


def _export_form(
    net: Network,
    out_dir: str | os.PathLike[str],
    request: ExportRequest,
    *,
    overwrite: bool,
    shared: Shared | None,
    rival: Artifact | None,
    for_speed: bool,
) -> Artifact:
    """A classifier in float, or in INT8 of a stated route."""
    made = draft(net, request)
    module, preprocessing, record = made.module, made.preprocessing, made.record
    images = noise_images(preprocessing) if request.verify_images is None else request.verify_images
    with staged_folder(out_dir, overwrite=overwrite) as folder:
        shared = shared or Shared(folder=folder)
        artifact = made.write(folder, shared)
        reference = shared.logits(module, artifact, images)
        gate = partial(
            verify,
            module,
            images=images,
            labels=class_labels(request),
            source="noise" if request.verify_images is None else "given",
            max_drop=request.max_drop,
            reference=reference,
        )
        int8 = None
        if made.calibration is not None:
            int8 = _quantise(made, artifact, shared, images, request)
            artifact = Artifact(folder, artifact.manifest)  # the file is another now
        checked = gate(artifact)
        if not checked.passed and not (for_speed and checked.precision == "bf16" and math.isfinite(checked.max_abs)):
            raise withheld(out_dir, checked)
        if rival is not None:
            check_pays(artifact, rival, out_dir)
        if int8 is not None:
            passed = passed_in(artifact, lambda other: gate(other, find_drift=False).passed)
            made_for = ROUTES[str(int8["route"])].only_for
            record["int8"] = {**int8, "passed_in": passed, **({"made_for": made_for} if made_for else {})}
        write_json(folder / "verification.json", checked.to_dict())
        write_reference(folder, artifact, images)
        card = model_card(record, made.classes, preprocessing, checked, request.card or {})
        write_text(folder / CARD, card)
        seal(folder, record)
    return load_artifact(out_dir)


def sketch(net: Network, folder: Path, request: ExportRequest, shared: Shared) -> Artifact:
    """The form that a request asks for as far as its speed goes: quantised on a few images, with no layer left in
    float, and not checked. It takes seconds where an export takes minutes, and is not to be kept.

    Args:
        folder: to make.

    Raises:
        UserError: as for export, of what is bad before anything is run; or the route can not quantise the network.
    """
    made = draft(net, request)
    folder.mkdir()
    artifact = made.write(folder, shared)
    if made.calibration is not None:
        assert request.int8_route is not None, "a sketch is of one route"
        few = made.calibration[spread(len(made.calibration), SKETCH)]
        _quantised(artifact, shared, request.int8_route, few, ())
        (folder / FLOAT_FILE).unlink()
    return artifact


def _export_int8(
    net: Network,
    out_dir: str | os.PathLike[str],
    request: ExportRequest,
    *,
    overwrite: bool,
    shared: Shared | None,
) -> Artifact:
    """INT8 by the fastest quantiser whose artefact passes; all are looked at on a few images first.

    Raises:
        Slower: none is faster than float.
        UserError: those that are failed, or were withheld.
    """
    check_form(request)
    reasons: list[UserError] = []
    with (
        staged_folder(out_dir, overwrite=overwrite) as folder,
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=".int8.") as place,
    ):
        shared = shared or Shared(folder=Path(place))
        plain = replace(request, int8=False)
        rivals = [sketch(net, Path(place) / "float", replace(plain, format="onnx", bf16=False), shared)]
        if request.bf16:  # what the rest is computed in is a form of its own, and faster than float32
            rivals.append(sketch(net, Path(place) / "bf16", plain, shared))
        how = Settings(
            runtime=runtimes_of(request.format)[0],
            threads=rivals[0].threads or available_cores(),
            streams=1,
            batch_size=PAYS_BATCH,
        )
        looks = [first_look(each, how) for each in rivals]
        rival, floats = min(zip(rivals, looks, strict=True), key=lambda each: each[1])
        seconds: dict[str, float] = {}
        usual = routes_of(request.format)
        for route in (*usual, *filter(None, map(twin_of, usual))):
            try:
                look = sketch(net, Path(place) / f"look-{route}", replace(request, int8_route=route), shared)
                seconds[route] = first_look(look, how)
            except UserError as reason:
                reasons.append(reason)
        for route, twin in [(route, twin_of(route)) for route in usual]:
            if twin in seconds and seconds[twin] * TWIN_GAIN > seconds.get(route, math.inf):
                del seconds[twin]
        passed: list[Artifact] = []
        for route in sorted(seconds, key=lambda route: seconds[route]):
            if seconds[route] > HOPELESS * floats:
                reasons.append(slower(out_dir, how, 1 / seconds[route], 1 / floats))
                continue
            try:
                one = replace(request, int8_route=route)
                made = export_as(net, Path(place) / route, one, shared=shared, rival=rival)
            except Withheld as reason:
                reasons.append(withheld(out_dir, reason.verification))
                continue
            except UserError as reason:
                reasons.append(reason)
                continue
            passed.append(made)
            # A twin was looked at with all layers in 8 bits; with some of them in float it may be the slower one.
            usual_s = seconds.get(ROUTES[route].twin_of or "")
            if usual_s is None or not _keeps_floats(made) or first_look(made, how) * TWIN_GAIN <= usual_s:
                break
        if not passed:
            raise min(reasons, key=lambda reason: not isinstance(reason, Withheld))
        best = passed[0] if len(passed) == 1 else min(passed, key=lambda made: first_look(made, how))
        for path in best.folder.iterdir():
            shutil.move(path, folder / path.name)
    return load_artifact(out_dir)


def _keeps_floats(made: Artifact) -> bool:
    """Whether an INT8 artefact has layers in float, for the accuracy."""
    return bool(made.manifest["int8"]["steps"][-1]["float_layers"])


def withheld(out_dir: str | os.PathLike[str], checked: Verification) -> Withheld:
    """The error for an artefact that did not pass, naming where the difference starts if that is known."""
    where = f"; the difference starts at {checked.drift_layer}" if checked.drift_layer else ""
    return Withheld(f"artefact {Path(out_dir)} is withheld: {checked.reason}{where}", checked)


def _quantise(
    made: Draft, probe: Artifact, shared: Shared, images: Images, request: ExportRequest
) -> dict[str, object]:
    """Quantise the float file, leaving in float what must stay so. Returns what the manifest says about it."""
    folder, labels, max_drop = probe.folder, class_labels(request), request.max_drop
    module, calibration = made.module, made.calibration
    assert request.int8_route is not None, "a route was chosen"
    route: str = request.int8_route
    assert calibration is not None, "INT8 has images to calibrate by"
    total = sum(1 for node in cast(fx.GraphModule, shared.graph).graph.nodes if node.target in LAYER_OPERATORS)

    def ranked() -> Sequence[Layer]:
        if probe.baked not in untuned.ranking:
            graph, layers, batch = shipped_graph(
                module, probe.preprocessing, calibration[spread(len(calibration), RANKING)], baked=probe.baked
            )
            untuned.ranking[probe.baked] = rank_layers(graph, batch, layers)
        return untuned.ranking[probe.baked]

    last: tuple[object, float] = None, 0.0

    def attempt(kept: Sequence[Layer]) -> float:
        nonlocal last
        values = [layer.file_value for layer in kept]
        asked = (route, shared.is_tuned, tuple(values))
        if last[0] != asked:  # else its file is still there
            last = asked, drop_of(values)
        return last[1]

    def drop_of(values: Sequence[str]) -> float:
        _quantised(probe, shared, route, calibration, values)
        candidate = Artifact(folder, probe.manifest)
        checked = verify(
            module, candidate, images, labels, max_drop=max_drop, reference=shared.reference, find_drift=False
        )
        if checked.batch_rel > MAX_BATCH_RELATIVE:
            return 100.0  # as good as nothing: other layers may be steady
        return 100 * (1 - checked.top1_agreement) if checked.drop_points is None else checked.drop_points

    untuned, before = shared, attempt(()) if request.qat else -math.inf
    if tuned := before > max_drop:
        shared = _tuned(made, probe, untuned, request)
        if not (tuned := attempt(()) < before):
            shared = untuned
            write_model(module, made.example, folder, probe.manifest, made.preprocessing, shared)
    if not request.qat and (rescue := rescue_of(route)) is not None and (by_all := attempt(())) > max_drop:
        usual, route = route, rescue
        with suppress(UserError):  # then the usual ranges are all there are
            if attempt(()) < by_all:
                usual = route
        route = usual
    steps, _ = search_float_layers(ranked, total, attempt, max_drop)
    (folder / FLOAT_FILE).unlink()
    return {
        "route": route,
        "calibration_images": len(calibration),
        "max_drop": max_drop,
        "layers": total,
        "steps": [step.to_dict() for step in steps],
        **({"qat": {"drop_before": before}} if tuned else {}),
    }


def _tuned(made: Draft, probe: Artifact, shared: Shared, request: ExportRequest) -> Shared:
    """Put the float file of the fine-tuned network into an artefact's folder. What is shared from there on is its own,
    but for the answers that it is held to.
    """
    assert request.calibration_images is not None, "checked before"
    assert request.int8_route is not None, "a route was chosen"
    route = ROUTES[request.int8_route].twin_of or request.int8_route  # minutes for what a twin's own grid would change
    if route not in shared.tuned:
        graph = shared.folded(made.module, made.example)
        several = request.thresholds is not None
        shared.tuned[route] = fine_tune(graph, request.calibration_images, made.preprocessing, route, several=several)
    own = Shared(folder=probe.folder, graph=shared.tuned[route], is_tuned=True, reference=shared.reference)
    write_model(made.module, made.example, probe.folder, probe.manifest, made.preprocessing, own)
    return own


def _quantised(
    probe: Artifact,
    shared: Shared,
    route: str,
    calibration: np.ndarray,
    float_values: Sequence[str],
) -> None:
    """Put the quantised network into an artefact's folder, made from the float file there or kept from an earlier
    export: what float operations are computed in does not change it.

    Args:
        float_values: output names of layers to leave in float.
    """
    names = MODEL_FILES[probe.format]
    key = (probe.format, route, probe.baked, probe.manifest.strided_stem, len(calibration))
    kept = None if float_values else shared.quantised.get(key)
    if kept is not None:
        for name in names:
            shutil.copyfile(kept / name, probe.folder / name)
        return
    # One image at a time: ranges are of each.
    batches = [probe.input_batch(calibration[i : i + 1]) for i in range(len(calibration))]
    quantize_file(probe.folder / FLOAT_FILE, probe.model_path, route, batches, float_values, tuned=shared.is_tuned)
    if shared.folder == probe.folder or float_values:
        return
    kept = shared.quantised[key] = shared.folder / f"int8-{len(shared.quantised)}"
    kept.mkdir()
    for name in names:
        shutil.copyfile(probe.folder / name, kept / name)
