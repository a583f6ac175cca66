"""Workloads that were traced beforehand and travel with the package, so that many networks are predicted at once.

``python -m benchmarks.traced`` makes the files in ``traced/``: one for eager kernels and one for compiled ones
(inference, ``amp``, NCHW), one of counts alone (inference, ``fp32``, NCHW, eager). What is kept of a network is lines
in the batch size: every figure of a kernel is a whole number plus a whole number for each image, at two images and more
always in ConvNets, and for one image where ``one_image`` says so. An entry is read only while the code that made it
(and for timm's networks timm's version) is the code that is here. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path

import numpy as np

from convscale.arch.spec import NetSpec
from convscale.conditions import Conditions
from convscale.cost.kernels import PHASES, Kernel
from convscale.networks.resolve import Named
from convscale.predictor.fitted import RUNTIMES, stand_in
from convscale.predictor.roofline import KINDS, Table
from convscale.predictor.workload import Workload

BATCH = 256
"""The batch that every entry is exact at: the usual one of a prediction."""
COLUMNS = tuple(name for name in Kernel._fields if name not in ("kind", "phase", "scope"))
"""Figures of a kernel."""
_BOTH = ("cost", "predictor/workload.py", "networks/foreign.py", "networks/inputs.py", "nn/modes.py")
_OWN = (*_BOTH, "nn", "arch/block.py", "arch/spec.py", "arch/parts.py", "arch/rows.py")
"""Code that decides what a trace of timm's networks, and of own ones, is. Which own networks there are does not matter:
an own one is known by its whole spec."""
_VALUES = (
    *("nn/weights.py", "nn/keymaps.py", "nn/placing.py", "nn/state_dicts.py", "nn/as_trained.py"),
    *("nn/detectors.py", "nn/detector_graph.py", "nn/frozen_parts.py"),
)
"""Code below these that no stored trace depends on: which values a network's tensors have, and detectors."""


# ---------------------------------------------------------------- what an entry belongs to


def digest(zoo: str) -> str:
    """Digest of the code that entries of a zoo (``own`` or ``timm``) were made by; of timm's its version is a part."""
    return _digest(zoo, _timm_version() if zoo == "timm" else "")


@cache
def _timm_version() -> str:
    try:
        return version("timm")
    except PackageNotFoundError:
        return "none"


@cache
def _digest(zoo: str, other: str) -> str:
    root = Path(str(files("convscale")))
    made = hashlib.sha256(other.encode())
    for part in _OWN if zoo == "own" else _BOTH:
        place = root / part
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            if (name := file.relative_to(root).as_posix()) not in _VALUES:
                made.update(f"{name} ".encode() + file.read_bytes())
    return made.hexdigest()[:16]


@cache
def _spec_digest(spec: NetSpec) -> str:
    value = {**spec.to_dict(), "name": "", "family": "", "lineage": None}
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def spec_digest(spec: NetSpec) -> str:
    """Equal for specs that build the same network."""
    return _spec_digest(spec)


def entry_key(network: Named, image_size: int) -> str | None:
    """The key of a network at a size; None for one that nobody can trace beforehand."""
    code = network_key(network)
    return None if code is None else f"{code} {image_size}"


def network_key(network: Named) -> str | None:
    """Equal for what builds the same network, whatever its weights; None for a module or a factory, whose code may
    change unseen.
    """
    if isinstance(network, NetSpec):
        return f"own {spec_digest(network)[:24]}"
    return f"timm {network.arch}" if network.origin == "timm" else None


# ---------------------------------------------------------------- lines in the batch size


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One network at one size. Lines are rows of two whole numbers: what is always there, and what each image adds."""

    kernels: np.ndarray = field(default_factory=lambda: np.zeros((0, 3 + 2 * len(COLUMNS)), np.int64))
    """(kinds of kernel, 3 + 2 x columns): index in ``KINDS`` and in ``PHASES``, launches, the constants, the slopes."""
    peak: np.ndarray = field(default_factory=lambda: np.zeros((1, 2), np.int64))
    """(lines, 2): the most bytes alive at once are the largest of these."""
    macs: tuple[int, int] = (0, 0)
    """Line of the multiply-accumulates; of counts alone."""
    traffic: tuple[int, int] = (0, 0)
    """Line of the bytes read and written; of counts alone."""
    params: int = 0
    """Parameters."""
    attention: bool = False
    """Whether it multiplies maps with each other."""
    unsupported: str = "{}"
    """Operators of unknown kind and how often they come, as JSON."""
    any_batch: bool = True
    """Whether it holds for two images and more; else for ``BATCH`` alone."""
    one_image: bool = True
    """Whether it holds for one image too."""
    failed: str = ""
    """Why it can not be traced."""


_SCALARS = ("macs", "traffic", "params", "attention", "unsupported", "any_batch", "one_image", "failed")


@dataclass(frozen=True, kw_only=True, eq=False)
class Store:
    """The entries of one file, as columns."""

    digests: dict[str, str]
    """Of the code that made the entries of each zoo."""
    index: dict[str, int]
    """Where each key's entry stands."""
    kernels: np.ndarray
    """All kernels, entry by entry."""
    kernel_ends: np.ndarray
    """After which row each entry's kernels end."""
    peaks: np.ndarray
    peak_ends: np.ndarray
    scalars: dict[str, np.ndarray]
    """By name, one for each entry."""

    def find(self, network: Named, image_size: int, batch_size: int) -> int | None:
        """Where the entry of a network at a size stands; None where there is none that holds for the batch, or the code
        that made it has changed.
        """
        key = entry_key(network, image_size)
        at = None if key is None else self.index.get(key)
        if key is None or at is None or self.digests.get(zoo := key.partition(" ")[0]) != digest(zoo):
            return None
        held = batch_size == BATCH or (
            self.scalars["any_batch"][at] and (batch_size > 1 or self.scalars["one_image"][at])
        )
        return at if held else None

    def entry(self, at: int) -> Entry:
        """One entry, as it was put in."""
        values = {name: self.scalars[name][at] for name in _SCALARS}
        values = {name: value if isinstance(value, str) else value.tolist() for name, value in values.items()}
        return Entry(
            kernels=self.kernels[slice(*self._span(self.kernel_ends, at))],
            peak=self.peaks[slice(*self._span(self.peak_ends, at))],
            **{**values, "macs": tuple(values["macs"]), "traffic": tuple(values["traffic"])},
        )

    @staticmethod
    def _span(ends: np.ndarray, at: int) -> tuple[int, int]:
        return (int(ends[at - 1]) if at else 0, int(ends[at]))

    def failed(self, at: int) -> str:
        """Why an entry's network can not be traced; empty for all others."""
        return str(self.scalars["failed"][at])

    def about(self, at: int, batch_size: int) -> Workload:
        """What is known of an entry beside its kernels, which are left out."""
        return Workload(
            kernels=(),
            peak_bytes=self.peak_bytes(at, batch_size),
            attention=bool(self.scalars["attention"][at]),
            unsupported=json.loads(str(self.scalars["unsupported"][at])),
            params=int(self.scalars["params"][at]),
        )

    def peak_bytes(self, at: int, batch_size: int) -> int:
        """Most bytes alive at once."""
        lines = self.peaks[slice(*self._span(self.peak_ends, at))]
        return int((lines[:, 0] + batch_size * lines[:, 1]).max())

    def line(self, name: str, at: int, batch_size: int) -> int:
        """A line's value: ``macs`` or ``traffic``."""
        constant, slope = self.scalars[name][at]
        return int(constant) + batch_size * int(slope)

    def table(self, places: Sequence[int], batch_size: int) -> Table:
        """The kernels of several entries, as a prediction takes them."""
        spans = [self._span(self.kernel_ends, at) for at in places]
        rows = np.concatenate([np.arange(*span) for span in spans]) if spans else np.zeros(0, np.int64)
        found, width = self.kernels[rows], len(COLUMNS)
        values = (found[:, 3 : 3 + width] + batch_size * found[:, 3 + width :]).astype(float)
        return Table(
            net=np.repeat(np.arange(len(spans)), [end - start for start, end in spans]),
            count=found[:, 2].astype(float),
            kind=found[:, 0],
            phase=found[:, 1],
            values={name: values[:, i] for i, name in enumerate(COLUMNS)},
        )

    def workload(self, at: int, batch_size: int) -> Workload:
        """An entry with its kernels."""
        rows, width = self.entry(at).kernels, len(COLUMNS)
        figures = rows[:, 3 : 3 + width] + batch_size * rows[:, 3 + width :]
        kernels = []
        for (kind, phase, count), values in zip(rows[:, :3].tolist(), figures.tolist(), strict=True):
            kernel = Kernel(KINDS[kind], PHASES[phase])._replace(**dict(zip(COLUMNS, values, strict=True)))
            kernels.append((kernel._replace(nhwc=bool(kernel.nhwc), permuted=bool(kernel.permuted)), count))
        return replace(self.about(at, batch_size), kernels=tuple(kernels))


# ---------------------------------------------------------------- files


def file_of(conditions: Conditions) -> str | None:
    """The file that holds workloads, or of single precision counts, of these conditions; None: none does. Runtimes that
    no table speaks of share the workloads of the one that they are predicted by.
    """
    if (conditions.mode, conditions.layout) != ("infer", "nchw"):
        return None
    if conditions.precision in ("amp", "amp_bf16") and stand_in(conditions.runtime) in RUNTIMES:
        return stand_in(conditions.runtime)
    return "counts" if conditions.precision == "fp32" else None


def folder() -> Path:
    """Where the files lie."""
    return Path(str(files("convscale.predictor"))) / "traced"


@cache
def store(name: str) -> Store | None:
    """A file's entries; None where it is not there."""
    path = folder() / f"{name}.npz"
    return read_store(path) if path.is_file() else None


def read_store(path: Path) -> Store:
    """What :func:`write_store` wrote."""
    with np.load(path, allow_pickle=False) as found:
        about = json.loads(str(found["about"]))
        texts = {name: np.array(about[name], dtype=object) for name in ("unsupported", "failed")}
        numbers = {name: found[name] for name in _SCALARS if name not in texts}
        width = 3 + 2 * len(COLUMNS)
        kernels = np.stack([found[f"k{i}"].astype(np.int64) for i in range(width)], axis=1)
        return Store(
            digests=about["digests"],
            index={key: i for i, key in enumerate(about["keys"])},
            kernels=kernels,
            kernel_ends=found["kernel_ends"],
            peaks=found["peaks"],
            peak_ends=found["peak_ends"],
            scalars={**numbers, **texts},
        )


def write_store(path: Path, entries: dict[str, Entry], torch_version: str) -> None:
    """Write entries by their key, compressed; the torch that traced them is said in the file and not checked."""
    listed = list(entries.values())
    about = {
        "digests": {zoo: digest(zoo) for zoo in ("own", "timm")},
        "timm": _timm_version(),
        "torch": torch_version,
        "keys": list(entries),
        "unsupported": [entry.unsupported for entry in listed],
        "failed": [entry.failed for entry in listed],
    }
    kernels = np.concatenate([entry.kernels for entry in listed])
    columns: dict[str, np.ndarray] = {f"k{i}": _narrow(kernels[:, i]) for i in range(kernels.shape[1])}
    numbers: dict[str, np.ndarray] = {
        name: np.array([getattr(entry, name) for entry in listed])
        for name in _SCALARS
        if name not in ("unsupported", "failed")
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path,
        about=np.array(json.dumps(about)),
        kernel_ends=np.cumsum([len(entry.kernels) for entry in listed]),
        peaks=np.concatenate([entry.peak for entry in listed]),
        peak_ends=np.cumsum([len(entry.peak) for entry in listed]),
        **columns,  # pyright: ignore[reportArgumentType]
        **numbers,  # pyright: ignore[reportArgumentType]
    )


def _narrow(values: np.ndarray) -> np.ndarray:
    """In as few bytes as hold the values."""
    most = int(np.abs(values).max(initial=0))
    types = {2**7: np.int8, 2**15: np.int16, 2**31: np.int32}
    return values.astype(next((kind for limit, kind in types.items() if most < limit), np.int64))


# ---------------------------------------------------------------- lines from two traces


def lines_of(
    few: np.ndarray, many: np.ndarray, batch_few: int, batch_many: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """(constants, slopes) of figures at two batches; None where they do not lie on lines of whole numbers."""
    slopes, rest = np.divmod(many - few, batch_many - batch_few)
    return None if rest.any() else (few - batch_few * slopes, slopes)


def upper_lines(constants: Iterable[int], slopes: Iterable[int]) -> np.ndarray:
    """(lines, 2): of many lines those that are the largest at some batch of at least 1."""
    steepest: dict[int, int] = {}
    for constant, slope in zip(constants, slopes, strict=True):
        steepest[slope] = max(steepest.get(slope, constant), constant)
    hull: list[tuple[int, int]] = []
    for slope in sorted(steepest):
        line = (steepest[slope], slope)
        while hull and (sum(hull[-1]) <= sum(line) or (len(hull) > 1 and _hidden(hull[-2], hull[-1], line))):
            hull.pop()
        hull.append(line)
    return np.array(hull, np.int64)


def _hidden(flat: tuple[int, int], middle: tuple[int, int], steep: tuple[int, int]) -> bool:
    """Whether of three lines by rising slope the middle one is nowhere the largest."""
    return (flat[0] - steep[0]) * (middle[1] - flat[1]) <= (flat[0] - middle[0]) * (steep[1] - flat[1])
