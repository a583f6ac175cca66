"""An artefact: one folder with a network ready to run, what it needs to know, how it was checked, and checksums of it
all.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from convscale.artifact.answers import (
    NOT_FINITE,
    TOP,
    Answer,
    Picture,
    Said,
    box_answer,
    checked_top,
    pictures_of,
    pixels_or_error,
    prepared,
)
from convscale.artifact.boxes import Boxes, boxes_of, in_picture
from convscale.artifact.checks import check_onnx
from convscale.artifact.features import HEAD_FILE, Head, read_head
from convscale.artifact.folder import CARD, identity
from convscale.artifact.manifest import MANIFEST, MODEL_FILES, Manifest, read_class_names, read_manifest, read_part
from convscale.conditions import Size, sides, size_text
from convscale.errors import UserError, check_whole
from convscale.files import inside_fit, sha256, write_json
from convscale.images.letterbox import fill_of, letterbox
from convscale.images.preprocess import Preprocessing
from convscale.machine import check_own
from convscale.runtimes.base import Opening, Runner, need_runtime, open_runtime, runtime_of, runtimes_of
from convscale.words import listed

if TYPE_CHECKING:
    from convscale.artifact.promise import Promise


class _Call(threading.local):
    """The call of an artefact that a thread is in."""

    depth = 0
    """Calls inside each other."""
    runner: Runner | None = None
    """What it runs in, once it does."""


class Artifact:
    """A loaded artefact. Call it with images to get probabilities; any number of threads may at once.

    Made by :func:`load_artifact` and :func:`convscale.export`.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        runtime: str | None = None,
        threads: int | None = None,
        device: str = "cpu",
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.hashed: dict[str, tuple[int, ...]] = {}
        self.format = manifest.format
        self.precision = manifest.precision
        self.baked = manifest.baked
        self.device, runs = check_own(device), manifest.runtime
        known, anywhere = runtimes_of(self.format, device), runtimes_of(self.format, "cuda")
        # What was found on one kind of device says nothing of another, which may not even have the runtime.
        own = runs.device == device.partition(":")[0] and (runs.name in known or runs.name not in anywhere)
        self.runtime = runtime or (runs.name if own else self.checked_in[0])
        self.threads = threads or (runs.threads if own else None)
        # The tuned number of streams belongs to the tuned runtime, too.
        tuned = own and self.runtime == runs.name and threads is None
        self.cut = manifest.detection
        self.streams = runs.streams or 1 if tuned else 1
        self.tuned = tuned and runs.streams is not None
        self.divided = True
        """Set to False before the first call, batches stay whole: who calls fills the streams, by as many threads."""
        self.batch_size = (runs.batch_size if own else None) or 32
        self.classes = read_class_names(folder, manifest.num_classes)
        try:
            self.preprocessing = Preprocessing.from_dict(read_part(folder, "preprocessing.json"))
        except UserError as error:
            raise UserError(f"artefact {folder} has a damaged preprocessing.json: {error}; export it again") from error
        self.thresholds = manifest.thresholds
        self.temperatures = manifest.temperatures
        if self.runtime not in known:
            raise UserError(f"an artefact of format {self.format} runs in {listed(known, 'or')}, not in {self.runtime}")
        need_runtime(self.runtime)
        self._runner: Runner | None = None
        self._closed = False
        self._opening = threading.Lock()
        self._call = _Call()

    @property
    def is_detector(self) -> bool:
        """Whether it gives boxes instead of probabilities."""
        return self.cut is not None

    @property
    def model_path(self) -> Path:
        """The model file a runtime opens."""
        return self.folder / MODEL_FILES[self.format][0]

    @property
    def image_size(self) -> Size:
        """Side of the square images it takes, in pixels, or their (height, width)."""
        return self.preprocessing.image_size

    @property
    def checked_in(self) -> tuple[str, ...]:
        """The runtimes that it may ship in: those of its format. Each rounds 8 bits in its own way, so in INT8 those
        in which it passed its gate, and the one that it was made for elsewhere (:attr:`made_for`); a record that names
        none is of a version that asked the usual one alone.
        """
        known, about = runtimes_of(self.format, self.device), self.manifest.get("int8")
        if self.precision != "int8" or not isinstance(about, Mapping):
            return known
        said = about.get("passed_in")
        passed = [name for name in known if isinstance(said, list) and name in said] or known[:1]
        return tuple(name for name in known if name in passed or name == self.made_for)

    @property
    def made_for(self) -> str | None:
        """The runtime that its 8 bits were made for without it, so that its gate was held in others alone; None: there
        is none."""
        about = self.manifest.get("int8")
        named = about.get("made_for") if isinstance(about, Mapping) else None
        return named if self.precision == "int8" and isinstance(named, str) else None

    @property
    def gate_elsewhere(self) -> tuple[str, ...]:
        """A sentence where its accuracy in the runtime that it was made for was not checked; mostly nothing."""
        if self.made_for is None:
            return ()
        held = " and ".join(name for name in self.checked_in if name != self.made_for)
        return (f"its INT8 gate was held in {held}: the accuracy in {self.made_for} was not checked",)

    def floats_in(self, runtime: str) -> str:
        """What float operations are computed in by a runtime here: as the record says where that can be done, else
        float32, which is nearer to the trained network.
        """
        known, wanted = runtime_of(runtime), self.manifest.computes
        return wanted if wanted in known.precisions and known.native(wanted) else "fp32"

    def computed_in(self, runtime: str) -> str:
        """``precision`` as a runtime has it here, for what is measured: bfloat16 is float32 where there is none, and so
        is half precision on a processor."""
        half = self.manifest.computes == "fp16" and self.device == "cpu"
        return self.floats_in(runtime) if half or self.precision == "bf16" else self.precision

    def fallbacks(self, runtime: str) -> tuple[str, ...]:
        """What a reader of a measurement in a runtime must know of ``floats_in`` and of its gate, as sentences; mostly
        nothing.
        """
        wanted, found = self.manifest.computes, self.floats_in(runtime)
        unchecked = self.gate_elsewhere if runtime == self.made_for else ()
        if found == wanted or (wanted == "fp16" and self.device != "cpu"):  # a card computes in what the file is in
            return unchecked
        return (f"{runtime} has no {wanted} here: float operations were computed in {found}", *unchecked)

    @property
    def verification(self) -> dict[str, Any] | None:
        """What was checked at export, as plain values; None where nothing was."""
        return read_part(self.folder, "verification.json") if (self.folder / "verification.json").is_file() else None

    @property
    def promise(self) -> Promise | None:
        """The speed it was promised to have on a device that was not there; None: nothing was promised."""
        return self.manifest.promise

    @property
    def runner(self) -> Runner:
        """The network opened in the artefact's runtime, on first use."""
        if self._call.runner is not None:
            return self._call.runner
        with self._opening:
            if self._closed:
                raise UserError(f"artefact {self.folder} was closed; load it again")
            if self._runner is None:
                how = Opening(
                    threads=self.threads,
                    device=self.device,
                    streams=self.streams,
                    divided=self.divided,
                    batch_size=self.batch_size if self.tuned else None,
                )
                self._runner = open_artifact(self, self.runtime, how)
                self._check_unchanged()
            if self._call.depth:
                self._call.runner = self._runner
            return self._runner

    @contextmanager
    def _under_way(self) -> Iterator[None]:
        """While open, this thread runs in what it began with, also when another one closes the artefact."""
        self._call.depth += 1
        try:
            yield
        finally:
            self._call.depth -= 1
            if not self._call.depth:
                self._call.runner = None

    def close(self) -> None:
        """Let go of the runtime and its memory, once calls that are under way have ended; later ones are refused."""
        with self._opening:
            self._runner, self._closed = None, True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_unchanged(self) -> None:
        """Refuse what a runtime opened where it is not what was hashed: a file changed in between."""
        for name, before in self.hashed.items():
            if identity(self.folder / name) != before:
                self._runner = None
                raise UserError(f"artefact {self.folder}: {name} changed while it was opened; open it again")

    def __call__(self, images: np.ndarray, *, batch_size: int | None = None) -> np.ndarray:
        """Probabilities of images.

        Args:
            images: uint8 (N, H, W, C), any N, resized by ``preprocessing.resize``.
            batch_size: images a call of the network; None: the artefact's own.

        Returns:
            float32 (N, classes): rows summing to 1; for several labels per image (``thresholds`` is set) each class's
            own probability. A detector gives a list with a dictionary for each image instead, as torchvision's do:
            ``boxes`` float32 (n, 4) in the image's pixels, ``scores`` and ``labels`` (from 1).

        Raises:
            UserError: the images have another shape or type.
        """
        if self.is_detector:
            return [each.to_dict() for each in self.detect(images, batch_size=batch_size)]  # pyright: ignore[reportReturnType]
        if self.baked:
            return self._outputs(images, 0, batch_size)
        logits = self._outputs(images, 0, batch_size)
        if self.thresholds is not None:
            if self.temperatures is not None:
                logits = logits / np.array(self.temperatures, np.float32)
            return 0.5 * (1 + np.tanh(0.5 * logits))  # the sigmoid, without an overflow
        exp = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exp / exp.sum(axis=1, keepdims=True)

    def detect(self, images: np.ndarray, *, batch_size: int | None = None) -> list[Boxes]:
        """A detector's boxes of squares, the surest first.

        Args:
            images: uint8 (N, side, side, 3), fitted by ``convscale.images.letterbox``.
            batch_size: images a call; None: the artefact's own.

        Raises:
            UserError: it is a classifier, or the images have another shape or type.
        """
        if self.cut is None:
            raise UserError(f"artefact {self.folder} is a classifier's; it gives probabilities, not boxes")
        self._check(images)
        step = self._step(batch_size)
        found: list[Boxes] = []
        with self._under_way():
            for start in range(0, len(images), step):
                outputs = self.runner(self.input_batch(images[start : start + step]))
                found += boxes_of(outputs, self.cut, len(self.classes))
        return found

    def classify(
        self, pictures: Picture | Sequence[Picture], *, top: int | None = TOP, batch_size: int | None = None
    ) -> list[Answer]:
        """Labels with probabilities of pictures as people have them, read by the very decoder that training used.

        Args:
            pictures: a file, a file's bytes, a PIL image, a uint8 array (H, W, C) or (N, H, W, C), a folder, or a list
                of any of them.
            top: labels of an answer at most; None: all. A network for several labels per image gives those above their
                thresholds; a detector its ``boxes``, all that it finds unless another number than the usual is asked
                for.
            batch_size: pictures a call of the network; None: the artefact's own.

        Returns:
            One answer for each picture, in order. A picture that can not be read has an answer with its ``error``.

        Raises:
            UserError: something that is no picture, a folder without any, or a number below 1.
        """
        step = self._step(batch_size)
        with self._under_way():
            if self.is_detector:
                return self._box_answers(list(pictures_of(pictures)), None if top in (None, TOP) else top, step)
            said = Said(classes=self.classes, thresholds=self.thresholds, top=checked_top(top, len(self.classes)))
            given = list(pictures_of(pictures))
            answers: list[Answer] = []
            for start in range(0, len(given), step):
                answers += self._answers(given[start : start + step], said)
        return answers

    def _step(self, batch_size: int | None) -> int:
        """Images a call of the network."""
        return self.batch_size if batch_size is None else check_whole("batch_size", batch_size)

    def _answers(self, batch: Sequence[tuple[str, Picture]], said: Said) -> list[Answer]:
        """Answers of a batch: what can be read goes through the network together."""
        from convscale.images.decode import ImageError  # here: who gives arrays needs no decoder

        errors: dict[int, Answer] = {}
        images: list[np.ndarray] = []
        for number, (name, picture) in enumerate(batch):
            try:
                images.append(prepared(name, picture, self.preprocessing))
            except ImageError as error:
                errors[number] = Answer(error=str(error).removeprefix(f"{name}: "), name=name)
        rows = iter(self(np.stack(images), batch_size=len(batch)) if images else ())
        answers: list[Answer] = []
        for number, (name, _) in enumerate(batch):
            if number in errors:
                answers.append(errors[number])
                continue
            row = next(rows)
            answers.append(said.answer(row, name) if np.isfinite(row).all() else Answer(error=NOT_FINITE, name=name))
        return answers

    def _box_answers(self, given: Sequence[tuple[str, Picture]], top: int | None, step: int) -> list[Answer]:
        """A detector's answers, batch by batch."""
        most = None if top is None else check_whole("top", top)
        answers: list[Answer] = []
        for start in range(0, len(given), step):
            batch = given[start : start + step]
            pixels = [pixels_or_error(name, picture, self.preprocessing.channels) for name, picture in batch]
            found = iter(self.boxes_in([each for each in pixels if isinstance(each, np.ndarray)], batch_size=step))
            for (name, _), each in zip(batch, pixels, strict=True):
                if isinstance(each, str):
                    answers.append(Answer(error=each, name=name))
                else:
                    answers.append(box_answer(next(found), self.classes, most, name))
        return answers

    def boxes_in(self, pictures: Sequence[np.ndarray], *, batch_size: int | None = None) -> list[Boxes]:
        """A detector's boxes of whole pictures, uint8 (H, W, 3) of any sizes, in their pixels."""
        if not pictures:
            return []
        side, fill = self.preprocessing.width, fill_of(self.preprocessing.mean)
        squares = [letterbox(each, side, fill) for each in pictures]
        sizes = [(each.shape[0], each.shape[1]) for each in pictures]
        return self.boxes_in_squares(squares, sizes, batch_size=batch_size)

    def boxes_in_squares(
        self, squares: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]], *, batch_size: int | None = None
    ) -> list[Boxes]:
        """The same of pictures that were fitted into squares already, whose own (height, width) are ``sizes``."""
        if not squares:
            return []
        found = self.detect(np.stack(squares), batch_size=batch_size)
        return [in_picture(each, size, self.preprocessing.width) for each, size in zip(found, sizes, strict=True)]

    def logits(self, images: np.ndarray, *, batch_size: int | None = None) -> np.ndarray:
        """The network's outputs before the softmax, float32 (N, classes); ``images`` as for calling."""
        return self._outputs(images, 1 if self.baked else 0, batch_size)

    @property
    def keeps_features(self) -> bool:
        """Whether :meth:`features` gives something: it was exported with its feature map."""
        return self.manifest.features

    def features(self, images: np.ndarray, *, batch_size: int | None = None) -> np.ndarray:
        """The map in front of the pool, float32 (N, C, h, w); ``images`` as for calling.

        Raises:
            UserError: it was exported without; or as for calling.
        """
        if not self.keeps_features:
            raise UserError(
                f"artefact {self.folder} keeps no feature map; export it with --with-features (with_features=True)"
            )
        return self._outputs(images, 2 if self.baked else 1, batch_size)

    @property
    def head(self) -> Head:
        """The classifier of the pooled features; UserError as for :meth:`features`."""
        if not self.keeps_features:
            raise UserError(f"artefact {self.folder} keeps no classifier; export it with --with-features")
        return read_head(self.folder, self.manifest.num_classes)

    def input_batch(self, images: np.ndarray) -> np.ndarray:
        """Images as the network takes them: as they are where preprocessing is baked in, else normalised float32 (N, C,
        H, W).
        """
        self._check(images)
        if self.baked:
            return images
        return self.preprocessing.normalize_array(images)

    def _check(self, images: np.ndarray) -> None:
        shape = (*sides(self.image_size), self.preprocessing.channels)
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != shape:
            got = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
            raise UserError(
                f"images must be a uint8 array (N, {', '.join(map(str, shape))}), got {got}; preprocessing.resize "
                "makes them so"
            )

    def _outputs(self, images: np.ndarray, index: int, batch_size: int | None = None) -> np.ndarray:
        if self.is_detector:
            raise UserError(f"artefact {self.folder} is a detector's; it gives boxes, not logits: use detect")
        step = self._step(batch_size)
        self._check(images)
        with self._under_way():
            parts = [self.runner(self.input_batch(images[i : i + step]))[index] for i in range(0, len(images), step)]
        if not parts:
            return np.zeros((0, len(self.classes)), np.float32)
        return np.concatenate(parts).astype(np.float32, copy=False)

    def keep(self, **values: object) -> None:
        """Put values into the artefact's record, here and on the disk."""
        self.manifest = Manifest.from_dict({**self.manifest, **values}, self.folder)
        write_json(self.folder / MANIFEST, dict(self.manifest))

    def __repr__(self) -> str:
        return (
            f"Artifact({str(self.folder)!r}, {self.manifest.model}, {self.format}, {self.precision}, "
            f"{self.runtime}, {size_text(self.image_size)} px, {len(self.classes)} classes)"
        )


def load_artifact(
    folder: str | os.PathLike[str], *, runtime: str | None = None, threads: int | None = None, device: str = "cpu"
) -> Artifact:
    """Check an artefact's checksums and open it.

    Args:
        folder: the artefact's, or that of the ``fit`` that shipped it.
        runtime: None: the one in the artefact's record (the tuned one, where it was tuned); what was tuned on another
            kind of device runs in the usual one of its format here.
        threads: None: the record's, where it was tuned on this kind of device, else one per core.

    Raises:
        UserError: it is no artefact, damaged, of a newer version, reads data outside its folder, or its runtime is not
            installed.
    """
    folder = inside_fit(Path(folder), "artifact")
    manifest = read_manifest(folder)
    hashed: dict[str, tuple[int, ...]] = {}
    for name, entry in manifest.files.items():
        path = folder / name
        if Path(name).name != name or name in ("", ".", ".."):
            raise UserError(f"artefact {folder} names the file {name!r} outside its folder; refused")
        if not path.is_file() or path.is_symlink():
            raise UserError(f"artefact {folder} lacks its file {name}; export it again")
        if path.stat().st_nlink > 1:
            raise UserError(
                f"artefact {folder}: {name} has a second name somewhere (a hard link), by which it can change unseen; "
                "copy the folder"
            )
        hashed[name] = identity(path)
        if not isinstance(entry, Mapping) or sha256(path) != entry.get("sha256"):
            raise UserError(f"artefact {folder} is damaged: the checksum of {name} is wrong; export it again")
    needed = (*MODEL_FILES[manifest.format], "classes.json", "preprocessing.json")
    needed = (*needed, HEAD_FILE) if manifest.features else needed
    if missing := [name for name in needed if name not in manifest.files]:
        raise UserError(f"artefact {folder} has no checksum of {', '.join(missing)}; export it again")
    if manifest.format == "onnx":
        check_onnx(folder / "model.onnx", manifest.files)
    artifact = Artifact(folder, manifest, runtime=runtime, threads=threads, device=device)
    artifact.hashed = {name: before for name, before in hashed.items() if name != CARD}
    return artifact


def open_artifact(artifact: Artifact, runtime: str, how: Opening) -> Runner:
    """Open an artefact's model file in a runtime that can run its format, computing as ``Artifact.floats_in`` says; one
    in half precision in that, where the runtime has to be told.
    """
    half = artifact.precision == "fp16" and "fp16" in runtime_of(runtime).precisions
    precision = "fp16" if half else artifact.floats_in(runtime)
    return open_runtime(artifact.model_path, runtime, replace(how, precision=precision))
