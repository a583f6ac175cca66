"""A network's workload as a file: traced once, predicted anywhere in milliseconds, without torch or the network.

The file is JSON, in plain words::

    {
      "kind": "convscale workload", "format": 1, "name": "mine",
      "conditions": {"mode": "infer", "precision": "amp", "layout": "nchw", "batch_size": 256, "image_size": 224,
                     "runtime": "eager"},
      "params": 25557032, "peak_bytes": 2415919104, "attention": false, "unsupported": {},
      "columns": ["kind", "phase", "macs", ...],
      "kernels": [[54, "conv", "forward", 115605504, ...], ...]
    }

``columns`` are the fields of ``convscale.cost.kernels.Kernel`` that follow the count in each row of ``kernels``; a
field that is left out has its default. A prediction from it holds for those conditions, on any device. Of runtime
``compiled`` there may be ``eager_kernels`` too, what eager PyTorch launches in their place: a network that is predicted
slower behind the compiler is a doubt.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from convscale.conditions import Conditions, as_size, sides
from convscale.cost.kernels import MATRIX, OTHERS, PHASES, Kernel
from convscale.errors import UserError, check_text, first_line, short
from convscale.files import write_json
from convscale.predictor.doubts import compiler_doubt
from convscale.predictor.workload import Workload
from convscale.read import OWN, object_of, read_json

if TYPE_CHECKING:
    from convscale.cost.subject import Network

KIND, FORMAT, SUFFIX = "convscale workload", 1, ".workload.json"
"""What such a file says of itself, the version of its form, and how its name ends."""
MOST_KERNELS, MOST = 1_000_000, 2**62
"""The most rows that are read, and the largest figure in one."""
_COLUMNS = tuple(name for name in Kernel._fields if name != "scope")
_TEXTS = ("kind", "phase")
_TRUTHS = ("nhwc", "permuted")
_KEPT = ("mode", "precision", "layout", "batch_size", "image_size", "runtime")


@dataclass(frozen=True, kw_only=True)
class StoredWorkload:
    """A workload with what it was traced under."""

    name: str
    """The network's name."""
    work: Workload
    """Its kernels."""
    conditions: Conditions
    """What it holds for; the device is whichever is asked for."""
    eager: Workload | None = None
    """Of a compiled network what eager PyTorch launches; None: it is not compiled, or the file does not say."""


def save_workload(
    network: Network, path: str | os.PathLike[str], conditions: Conditions, *, name: str = ""
) -> StoredWorkload:
    """Trace a network and write its workload.

    Args:
        network: a module, a spec or a model's name.
        path: the file to write.
        conditions: mode, precision, layout, batch, image size (None: the network's own) and runtime.
        name: what to call it; empty: its own name.

    Raises:
        UserError: a network that can not be traced, or a file that can not be written.
    """
    from convscale.cost.subject import subject_of
    from convscale.predictor.loading import traced_as, workload_for

    traced = dataclasses.replace(conditions, precision=traced_as(conditions.precision))
    size = subject_of(network, traced)[2].image_size
    conditions = dataclasses.replace(conditions, image_size=size)
    own = network if isinstance(network, str) else str(getattr(network, "name", None) or type(network).__name__)
    eager = None
    if conditions.runtime == "compiled":
        eager = workload_for(network, dataclasses.replace(conditions, runtime="eager"))
    work = workload_for(network, conditions)
    stored = StoredWorkload(name=name or own, work=work, conditions=conditions, eager=eager)
    write_json(path, to_dict(stored))
    return stored


def to_dict(stored: StoredWorkload) -> dict[str, object]:
    """As plain JSON values."""
    work, conditions = stored.work, stored.conditions.to_dict()
    return {
        "kind": KIND,
        "format": FORMAT,
        "name": stored.name,
        "conditions": {key: conditions[key] for key in _KEPT},
        "params": work.params,
        "peak_bytes": work.peak_bytes,
        "attention": work.attention,
        "unsupported": dict(work.unsupported),
        "columns": list(_COLUMNS),
        "kernels": _rows(work),
        **({} if stored.eager is None else {"eager_kernels": _rows(stored.eager)}),
    }


def _rows(work: Workload) -> list[list[object]]:
    return [[count, *(getattr(kernel, name) for name in _COLUMNS)] for kernel, count in work.kernels]


def read_workload(path: str | os.PathLike[str]) -> StoredWorkload:
    """Read a workload.

    Raises:
        UserError: no such file, or not a workload that this version reads; the message names the part.
    """
    value = object_of(read_json(path, "workload", OWN), f"workload {path}")
    try:
        return from_dict(value)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"workload {path}: {first_line(error)}") from error


def from_dict(value: Mapping[str, Any]) -> StoredWorkload:
    """From what ``to_dict`` gave.

    Raises:
        UserError: another kind of file or form, fields that are missing, or impossible figures.
    """
    if value.get("kind") != KIND or value.get("format") != FORMAT:
        raise UserError(
            f"kind and format are {short(value.get('kind'))} and {short(value.get('format'))}; "
            f"they must be {KIND!r} and {FORMAT}"
        )
    conditions, columns, rows = (value.get(key) for key in ("conditions", "columns", "kernels"))
    if not isinstance(conditions, Mapping) or set(conditions) - set(_KEPT):
        raise UserError(f"conditions are {short(conditions)}; they must be an object of {', '.join(_KEPT)}")
    if not isinstance(columns, list) or not {"kind"} <= set(columns) <= set(_COLUMNS):
        raise UserError(f"columns are {short(columns)}; they must be kind and some of {', '.join(_COLUMNS[1:])}")
    unsupported = value.get("unsupported", {})
    if not isinstance(unsupported, Mapping):
        raise UserError(f"unsupported is {short(unsupported)}; it must be an object of names and counts")
    size = conditions.get("image_size")
    work = Workload(
        kernels=_kernels("kernels", rows, columns),
        peak_bytes=_figure("peak_bytes", value.get("peak_bytes", 0)),
        attention=value.get("attention", False) is True,
        unsupported={check_text("unsupported", key): _figure(key, count) for key, count in unsupported.items()},
        params=_figure("params", value.get("params", 0)),
    )
    kept = {**conditions, "image_size": as_size(*sides(tuple(size) if isinstance(size, list) else size or 1))}
    eager = None
    if (others := value.get("eager_kernels")) is not None:
        eager = dataclasses.replace(work, kernels=_kernels("eager_kernels", others, columns))
    name = check_text("name", value.get("name", "workload"))
    return StoredWorkload(name=name, work=work, conditions=Conditions(**kept), eager=eager)


def _kernels(name: str, rows: object, columns: list[str]) -> tuple[tuple[Kernel, int], ...]:
    if not isinstance(rows, list) or not 0 < len(rows) <= MOST_KERNELS:
        raise UserError(f"{name} must be a list of 1 to {MOST_KERNELS:,} rows, got {short(rows)}")
    return tuple(_kernel(row, columns) for row in rows)


def _kernel(row: object, columns: list[str]) -> tuple[Kernel, int]:
    if not isinstance(row, list) or len(row) != len(columns) + 1:
        raise UserError(f"a kernel is {short(row)}; it must be a count and {len(columns)} figures")
    fields = dict(zip(columns, row[1:], strict=True))
    for name, known in (("kind", (*MATRIX, *OTHERS)), ("phase", PHASES)):
        if fields.get(name, "forward") not in known:
            raise UserError(f"a kernel's {name} is {short(fields[name])}; it must be one of {', '.join(known)}")
    for name, figure in fields.items():
        if name in _TRUTHS:
            if not isinstance(figure, bool):
                raise UserError(f"a kernel's {name} is {short(figure)}; it must be true or false")
        elif name not in _TEXTS:
            _figure(f"a kernel's {name}", figure)
    return Kernel(**fields), max(1, _figure("a kernel's count", row[0]))


def _figure(name: str, value: object) -> int:
    """A whole number from 0 on."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST:
        raise UserError(f"{name} is {short(value)}; it must be a whole number from 0 to 2**62")
    return value


def predict_stored(stored: StoredWorkload, device: str) -> Any:
    """The ``Prediction`` of a stored workload on a device; needs no torch.

    Raises:
        UserError: an unknown device, or one that the conditions can not be predicted for.
    """
    from convscale.predictor.predict import predict_workload, with_doubt

    conditions = dataclasses.replace(stored.conditions, device=device)
    made = predict_workload(stored.work, conditions)
    if stored.eager is None or conditions.runtime != "compiled":
        return made
    eager = predict_workload(stored.eager, dataclasses.replace(conditions, runtime="eager"))
    return with_doubt(made, compiler_doubt(made.images_per_s, eager.images_per_s))
