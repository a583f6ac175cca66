"""An artefact as the big servers want it: a model repository for Triton or OpenVINO Model Server, or a container.

Sources: Triton's ``model_config.proto`` and ``model_repository.md``; OpenVINO Model Server's ``models_repository.md``
and the schema of its ``config.json``; KServe's ``v1beta1`` InferenceService. No torch is needed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from convscale.artifact.artifact import Artifact
from convscale.artifact.manifest import MODEL_FILES
from convscale.artifact.naming import check_model_name, name_of
from convscale.artifact.reference import TOLERANCE, read_reference
from convscale.conditions import sides
from convscale.errors import UserError, nearest
from convscale.files import MARK, check_outside, mark_as_ours, told, whole_folder, write_json, write_text
from convscale.machine import available_cores
from convscale.runtimes.base import Opening, open_runtime, runtime_of
from convscale.ship.containers import write_container
from convscale.ship.repository import Port, Serving, check_script, kserve_text, ovms_config, triton_config
from convscale.ship.tune import not_passed
from convscale.words import plural, safe

LAYOUTS = ("triton", "ovms", "docker")


@dataclass(frozen=True, kw_only=True)
class Laid:
    """A layout that was written."""

    folder: Path
    """Where it lies."""
    layout: str
    """One of ``LAYOUTS``."""
    name: str
    """The model's."""
    files: tuple[str, ...]
    """What is in it, by paths below the folder."""
    checked: tuple[str, ...]
    """Runtimes that loaded its files and gave the artefact's own outputs."""
    notes: tuple[str, ...] = ()
    """What a user should know of it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """What goes in and comes out, to check a server with."""

    images: np.ndarray
    """uint8 (N, H, W, C): the artefact's reference images, or seeded noise where it has none."""
    inputs: np.ndarray
    """As the model file takes them."""
    outputs: tuple[np.ndarray, ...]
    """As the artefact's own runtime gives them, float32."""
    probabilities: np.ndarray
    """float32 (N, classes)."""


def write_layout(
    artifact: Artifact,
    layout: str,
    output: str | os.PathLike[str],
    *,
    name: str | None = None,
    overwrite: bool = False,
) -> Laid:
    """Write an artefact in a server's layout; the folder appears whole or not at all.

    Args:
        layout: ``triton``: a model repository with a ``config.pbtxt``; ``ovms``: one with a ``config.json``;
            ``docker``: a container with convscale's own server.
        output: the folder to make.
        name: the model's; None: the artefact's folder's.
        overwrite: replace a layout that stands there.

    Raises:
        UserError: an unknown layout, a detector's artefact, a format that the server can not load, a folder that holds
            something else, or a model file that says something else in a runtime of the server.
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout {layout!r} is unknown{nearest(str(layout), LAYOUTS)}")
    if artifact.is_detector:
        raise UserError(f"artefact {artifact.folder} is a detector's; --layout takes classifiers")
    if artifact.format == "torch":
        raise UserError(
            f"--layout {layout} needs an ONNX or OpenVINO form, artefact {artifact.folder} is of format torch; export "
            "the network with --format onnx or openvino"
        )
    called = name_of(artifact.folder) if name is None else check_model_name(name)
    write: Callable[[Artifact, str, Path, Sample], tuple[str, ...]]
    write = {"triton": _write_triton, "ovms": _write_ovms, "docker": _write_docker}[layout]
    may = partial(check_folder, Path(output), overwrite=overwrite, inputs=[("artefact", artifact.folder)])
    may()
    sample = sample_of(artifact)
    with _new_folder(Path(output), may) as folder:
        checked = write(artifact, called, folder, sample)
        mark_as_ours(folder)
    files = sorted(path.relative_to(output).as_posix() for path in Path(output).rglob("*") if path.is_file())
    notes: tuple[str, ...] = ()
    if layout == "triton" and artifact.format == "openvino":
        how = _as_tuned(artifact)
        notes = (
            "Triton's OpenVINO backend joins no requests; for the tuned speed ask for "
            f"{plural(how.images_each, 'image')} in a request, with {plural(how.streams, 'request')} on the way",
        )
    elif layout != "triton" and artifact.manifest.runtime.device != "cpu":
        notes = (f"it was tuned on {artifact.manifest.runtime.device}, and {layout} runs it on a processor, not tuned",)
    return Laid(folder=Path(output), layout=layout, name=called, files=tuple(files), checked=checked, notes=notes)


def check_folder(target: Path, *, overwrite: bool, inputs: Iterable[tuple[str, object]] = ()) -> None:
    """
    Raises:
        UserError: something stands where a layout is to be written that may not be replaced; ``inputs`` as for
            ``check_output_dir``.
    """
    if overwrite:
        check_outside(target, inputs)
    if target.exists() and not target.is_dir():
        raise UserError(f"output {target} is a file; name a folder")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise UserError(f"output folder {target} exists and is not empty; use --overwrite or another name")
        if not (target / MARK).is_file():
            raise UserError(
                f"output folder {target} holds something other than a layout of convscale; use another name"
            )


@contextmanager
def _new_folder(target: Path, may: Callable[[], None]) -> Iterator[Path]:
    """A folder that takes its name when it is whole, and ``may`` still lets it.

    Raises:
        UserError: it can not be written.
    """
    try:
        with whole_folder(target, check=may) as staging:
            yield staging
    except OSError as error:
        raise told(error) or error from error


def sample_of(artifact: Artifact) -> Sample:
    """Images with what the artefact says of them here."""
    reference = read_reference(artifact)
    if reference is None:
        height, width = sides(artifact.image_size)
        shape = (2, height, width, artifact.preprocessing.channels)
        images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    else:
        images = reference.images
    inputs = np.ascontiguousarray(artifact.input_batch(images))
    outputs = tuple(np.asarray(each, np.float32) for each in artifact.runner(inputs))
    return Sample(images=images, inputs=inputs, outputs=outputs, probabilities=artifact(images))


# ---------------------------------------------------------------- what a model file takes and gives


def ports_of(artifact: Artifact) -> tuple[Port, tuple[Port, ...]]:
    """The input and the outputs that stand in the model file.

    Raises:
        UserError: the number of images is fixed in it.
    """
    read = _onnx_ports if artifact.format == "onnx" else _openvino_ports
    inputs, outputs, free = read(artifact.model_path)
    if not free:
        raise UserError(f"artefact {artifact.folder} takes a fixed number of images; export it again")
    return inputs[0], outputs


def _onnx_ports(path: Path) -> tuple[tuple[Port, ...], tuple[Port, ...], bool]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def port(value: ort.NodeArg) -> Port:
        kind = value.type.removeprefix("tensor(").removesuffix(")")
        kinds = {"float": "FP32", "float16": "FP16", "uint8": "UINT8"}
        return Port(name=value.name, datatype=kinds[kind], shape=tuple(value.shape[1:]))

    first = session.get_inputs()
    free = not isinstance(first[0].shape[0], int)
    return tuple(map(port, first)), tuple(map(port, session.get_outputs())), free


def _openvino_ports(path: Path) -> tuple[tuple[Port, ...], tuple[Port, ...], bool]:
    import openvino as ov

    model = ov.Core().read_model(str(path))

    def port(value: ov.Output) -> Port:
        kinds = {"f32": "FP32", "f16": "FP16", "u8": "UINT8"}
        shape = tuple(side.get_length() for side in list(value.get_partial_shape())[1:])
        return Port(name=value.any_name, datatype=kinds[value.get_element_type().get_type_name()], shape=shape)

    free = model.input(0).get_partial_shape()[0].is_dynamic
    return tuple(map(port, model.inputs)), tuple(map(port, model.outputs)), free


# ---------------------------------------------------------------- the layouts


def _copy_model(artifact: Artifact, version: Path) -> tuple[Path, tuple[str, ...]]:
    """The model's files in a version's folder. Returns the first of them, and the names of all."""
    version.mkdir(parents=True)
    names = MODEL_FILES[artifact.format]
    for file in names:
        shutil.copyfile(artifact.folder / file, version / file)
    return version / names[0], names


def check_file(path: Path, artifact: Artifact, sample: Sample) -> tuple[str, ...]:
    """Open a model file as the servers do, and compare.

    Returns:
        The runtimes that were asked: those that it may ship in, in INT8 where it has passed its gate, that are
        installed and run files.

    Raises:
        UserError: one of them says something else than the artefact.
    """
    asked: list[str] = []
    allowed = TOLERANCE.get(artifact.precision, max(TOLERANCE.values()))
    for name in artifact.checked_in:
        runtime = runtime_of(name)
        if runtime.opens_modules or not runtime.installed():
            continue
        found = open_runtime(path, name, Opening(threads=1, precision=artifact.floats_in(name)))(sample.inputs)
        for one, other in zip(found, sample.outputs, strict=True):
            worst = float(np.abs(np.asarray(one, np.float32) - other).max())
            if not worst <= allowed * max(1.0, float(np.abs(other).max())):
                raise UserError(f"{path.name} says something else in {name}: outputs differ by {worst:.2g}")
        asked.append(name)
    return tuple(asked)


def _write_sample(artifact: Artifact, folder: Path, sample: Sample, outputs: tuple[Port, ...]) -> None:
    """Reference images and answers, for whoever wants to check the server."""
    folder.mkdir()
    np.save(folder / "images.npy", sample.images, allow_pickle=False)
    np.save(folder / "inputs.npy", sample.inputs, allow_pickle=False)
    for port, array in zip(outputs, sample.outputs, strict=True):
        np.save(folder / f"{port.name}.npy", array, allow_pickle=False)
    best = sample.probabilities.argmax(axis=1)
    write_json(
        folder / "answers.json",
        {
            "classes": list(artifact.classes),
            "labels": [artifact.classes[i] for i in best],
            "probabilities": [[float(f"{value:.7g}") for value in row] for row in sample.probabilities],
            "preprocessing": artifact.preprocessing.to_dict(),
        },
    )


def _write_labels(artifact: Artifact, path: Path) -> None:
    write_text(path, "".join(f"{safe(name)}\n" for name in artifact.classes))


def _on_processor(artifact: Artifact) -> Serving:
    """Batch, threads and streams, as ``tune`` found them or as they are by default."""
    threads = artifact.threads or available_cores()
    return Serving(
        batch_size=artifact.batch_size,
        threads=threads,
        streams=min(artifact.streams, threads),
        computes=artifact.manifest.computes,
    )


def _as_tuned(artifact: Artifact) -> Serving:
    """The same; of an artefact that was tuned on a GPU what was found there, though it is opened here."""
    usual, runs = _on_processor(artifact), artifact.manifest.runtime
    if runs.device != "cuda":
        return usual
    half = "FP16" if artifact.manifest.computes == "fp16" else "FP32"
    return replace(
        usual,
        batch_size=runs.batch_size or usual.batch_size,
        threads=runs.threads or usual.threads,
        streams=runs.streams or 1,
        device="cuda",
        tensorrt=("INT8" if artifact.precision == "int8" else half) if runs.name == "tensorrt" else "",
    )


def _write_triton(artifact: Artifact, name: str, folder: Path, sample: Sample) -> tuple[str, ...]:
    """``NAME/config.pbtxt``, ``NAME/1/model.onnx``; beside them labels, warm-up requests, and a sample."""
    source, outputs = ports_of(artifact)
    model = folder / name
    path, _ = _copy_model(artifact, model / "1")
    how = _as_tuned(artifact)
    _write_labels(artifact, model / "labels.txt")
    warm = model / "warmup"
    warm.mkdir()
    (warm / "one").write_bytes(sample.inputs[:1].tobytes())
    backend = "onnxruntime" if artifact.format == "onnx" else "openvino"
    write_text(model / "config.pbtxt", triton_config(name, backend, source, outputs, how))
    _write_sample(artifact, model / "reference", sample, outputs)
    write_text(model / "reference" / "check.py", check_script(name, source, outputs, artifact.precision))
    write_text(folder / "kserve.yaml", kserve_text(name, "triton", how, artifact.format))
    return check_file(path, artifact, sample)


def _write_ovms(artifact: Artifact, name: str, folder: Path, sample: Sample) -> tuple[str, ...]:
    """``config.json`` and ``NAME/1/model.xml``.

    Raises:
        UserError: OpenVINO runs it there, and its INT8 has not passed in that.
    """
    if "openvino" not in artifact.checked_in:
        raise UserError(not_passed(artifact, "openvino"))
    source, outputs = ports_of(artifact)
    path, _ = _copy_model(artifact, folder / name / "1")
    how = _on_processor(artifact)
    write_json(folder / "config.json", ovms_config(name, how))
    _write_labels(artifact, folder / name / "labels.txt")
    _write_sample(artifact, folder / name / "reference", sample, outputs)
    write_text(folder / name / "reference" / "check.py", check_script(name, source, outputs, artifact.precision))
    write_text(folder / "kserve.yaml", kserve_text(name, "ovms", how, artifact.format))
    return check_file(path, artifact, sample)


def _write_docker(artifact: Artifact, name: str, folder: Path, sample: Sample) -> tuple[str, ...]:
    """A Dockerfile, what it installs, convscale itself without its tables, and the artefact."""
    write_container(artifact, name, folder)
    how = _on_processor(artifact)
    write_text(folder / "kserve.yaml", kserve_text(name, "docker", how, artifact.format))
    return check_file(folder / "models" / name / MODEL_FILES[artifact.format][0], artifact, sample)
