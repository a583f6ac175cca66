"""An artefact's record: what it is, how it runs, and the checksums of its files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convscale.artifact.boxes import Cut
from convscale.errors import MOST_THREADS, MOST_WHOLE, UserError, check_number, check_text, check_whole, short
from convscale.read import OWN, read_json

if TYPE_CHECKING:
    from convscale.artifact.promise import Promise

SCHEMA = 1
"""Version of a classifier's layout; a reader refuses newer ones."""
DETECTOR_SCHEMA = 2
"""Of a detector's: who does not know detectors must not take it for a classifier."""
MANIFEST = "artifact.json"
MODEL_FILES = {"onnx": ("model.onnx",), "openvino": ("model.xml", "model.bin"), "torch": ("model.pt2",)}
"""The model's files by format, the one that a runtime opens first."""
COMPUTES = ("fp32", "bf16", "fp16")
"""What an artefact's float operations are computed in."""

_REQUIRED = ("format", "precision", "baked", "runtime", "num_classes", "files")


@dataclass(frozen=True, kw_only=True)
class RunsIn:
    """The runtime that an artefact runs in where none is asked for."""

    name: str
    """Its name."""
    threads: int | None = None
    """Compute threads; None: one per core."""
    batch_size: int | None = None
    """Images per call; None: not tuned."""
    streams: int | None = None
    """Parts of a batch that run side by side; None: not tuned."""
    device: str = "cpu"
    """The kind of device that it was tuned on, ``cpu`` or ``cuda``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Manifest(Mapping[str, Any]):
    """The record, read once and checked. As a mapping it gives the JSON values as they were written."""

    format: str
    """A key of ``MODEL_FILES``."""
    precision: str
    """``fp32``, ``fp16`` (stored in it, or computed in it too), ``bf16`` (computed in it) or ``int8``."""
    computes: str
    """What float operations are computed in, ``fp32``, ``bf16`` or ``fp16``; where the processor has none of these two,
    in ``fp32``."""
    baked: bool
    """Preprocessing and softmax are parts of the network."""
    runtime: RunsIn
    """How it runs."""
    num_classes: int
    """The network's outputs."""
    thresholds: tuple[float, ...] | None
    """For several labels per image: each class's probability above which it counts as present; None: one label."""
    temperatures: tuple[float, ...] | None
    """For several labels per image: what each class's logit is divided by before the sigmoid; None: by 1."""
    features: bool
    """The last feature map is an output, and the classifier's weights stand beside the network."""
    model: str
    """The network's name; empty where it is not known."""
    strided_stem: bool
    """A space-to-depth stem was written as one strided convolution."""
    files: Mapping[str, Mapping[str, Any]]
    """Of each file its ``sha256`` and ``bytes``."""
    category_ids: tuple[int, ...]
    """Of a detector: the numbers that its data have for the classes; empty: 1 to their number."""
    detection: Cut | None
    """How a detector's answers are cut; None: a classifier."""
    promise: Promise | None
    """The speed it was promised to have on a device that was not there; None: nothing was promised."""
    written: Mapping[str, Any]
    """All of it, as plain JSON values."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], folder: Path) -> Manifest:
        """From JSON values, those of earlier versions too.

        Raises:
            UserError: something that every record has is missing or of another kind, or the format is unknown.
        """
        if missing := [key for key in _REQUIRED if key not in values]:
            raise _damaged(folder, f"it lacks {', '.join(missing)}; ")
        runtime, files = values["runtime"], values["files"]
        if not isinstance(values["format"], str) or values["format"] not in MODEL_FILES:
            known = ", ".join(MODEL_FILES)
            raise UserError(f"artefact {folder} has the unknown format {short(values['format'])}; known: {known}")
        if (computes := values.get("computes", "fp32")) not in COMPUTES:
            raise _damaged(folder, f"it computes in {short(computes)}, known are {', '.join(COMPUTES)}; ")
        if not isinstance(files, dict) or not isinstance(runtime, dict) or "name" not in runtime:
            raise _damaged(folder)
        if not isinstance(values["precision"], str) or not isinstance(values["baked"], bool):
            raise _damaged(folder, "precision must be text, and baked true or false; ")
        thresholds = values.get("thresholds")
        try:
            num_classes, thresholds = check_whole("num_classes", values["num_classes"]), _numbers(thresholds)
            temperatures = _numbers(values.get("temperatures"), "temperatures")
            if temperatures is not None and (len(temperatures) != num_classes or min(temperatures) <= 0):
                raise UserError(f"temperatures must be {num_classes} numbers above 0")
            category_ids = checked_ids(values.get("category_ids", ()), num_classes)
            runs = RunsIn(
                name=check_text("runtime.name", runtime["name"]),
                threads=_count("runtime.threads", runtime.get("threads")),
                batch_size=_count("runtime.batch_size", runtime.get("batch_size"), MOST_WHOLE),
                streams=_count("runtime.streams", runtime.get("streams")),
                device=check_text("runtime.device", runtime.get("device", "cpu")),
            )
            detection = None if values.get("detection") is None else Cut.from_dict(values["detection"])
            promise = None if values.get("promise") is None else _promise_of(values["promise"])
        except UserError as error:
            raise _damaged(folder, f"{error}; ") from error
        return cls(
            format=values["format"],
            precision=values["precision"],
            computes=computes,
            baked=values["baked"],
            runtime=runs,
            num_classes=num_classes,
            thresholds=thresholds,
            temperatures=temperatures,
            features=values.get("features") is True,
            model=str(values.get("model", "")),
            strided_stem=bool(values.get("strided_stem", False)),
            files=files,
            category_ids=category_ids,
            detection=detection,
            promise=promise,
            written=dict(values),
        )

    def __getitem__(self, key: str) -> Any:
        return self.written[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.written)

    def __len__(self) -> int:
        return len(self.written)


def _count(name: str, value: object, most: int = MOST_THREADS) -> int | None:
    """A whole number up to ``most``, or None."""
    if value is None:
        return None
    if check_whole(name, value) > most:
        raise UserError(f"{name} is {value}; it must be at most {most}")
    return check_whole(name, value)


def _numbers(value: object, name: str = "thresholds") -> tuple[float, ...] | None:
    """A list of numbers, or None."""
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        raise UserError(f"{name} is {short(value)}; it must be a list of numbers")
    return tuple(check_number(name, each, "a list of numbers") for each in value)


def checked_ids(values: object, count: int, where: str = "") -> tuple[int, ...]:
    """The ids of a record's classes, of which there are so many; none where it has none.

    Raises:
        UserError: they are no whole numbers, each once, or more or fewer.
    """
    ids: list[Any] = list(values) if isinstance(values, list | tuple) else [None]
    whole = all(isinstance(each, int) and not isinstance(each, bool) for each in ids)
    if not whole or len(set(ids)) < len(ids) or len(ids) not in (0, count):
        raise UserError(f"{where}category_ids is {short(values, 40)}; it must be {count} whole numbers, each once")
    return tuple(ids)


def read_manifest(folder: Path) -> Manifest:
    """The record in an artefact's folder.

    Raises:
        UserError: the folder is none, or holds no artefact, a damaged one or one of a newer version.
    """
    if not folder.exists():
        raise UserError(f"artefact folder {folder} does not exist")
    if not folder.is_dir():
        raise UserError(
            f"{folder} is a file; an artefact is a folder made by convscale export (foreign archives and pickles are "
            "not loaded)"
        )
    if not (folder / MANIFEST).is_file():
        raise UserError(f"folder {folder} is no artefact: it has no {MANIFEST}")
    values = read_part(folder, MANIFEST)
    if not isinstance(values, dict) or not isinstance(values.get("schema"), int):
        raise _damaged(folder)
    if values["schema"] > DETECTOR_SCHEMA:
        raise UserError(
            f"artefact {folder} has schema {values['schema']}, this version of convscale reads up to "
            f"{DETECTOR_SCHEMA}; update convscale"
        )
    return Manifest.from_dict(values, folder)


def read_part(folder: Path, name: str) -> Any:
    """The JSON value in a file of an artefact."""
    try:
        return read_json(folder / name, "file", OWN)
    except UserError as error:
        raise UserError(f"artefact {folder} has a damaged {name}: {error}; export it again") from error


def read_class_names(folder: Path, count: int) -> tuple[str, ...]:
    """The names of an artefact's outputs, of which there are so many.

    Raises:
        UserError: they are no names, or more or fewer.
    """
    names = read_part(folder, "classes.json")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"artefact {folder} has a damaged classes.json: it must be a list of names; export it again")
    if len(names) != count:
        raise UserError(f"artefact {folder} names {len(names)} classes, its network has {count}; export it again")
    return tuple(names)


def _damaged(folder: Path, why: str = "") -> UserError:
    return UserError(f"artefact {folder} has a damaged {MANIFEST}{': ' + why if why else '; '}export it again")


def _promise_of(values: Mapping[str, Any]) -> Promise:
    from convscale.artifact.promise import Promise

    return Promise.from_dict(values)
