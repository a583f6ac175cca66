"""Measured speeds on disk: JSON lines with all conditions, and timm's benchmark tables."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convscale.conditions import Conditions
from convscale.errors import UserError, check_number, check_text, check_whole, first_line
from convscale.files import atomic_path
from convscale.locks import alone
from convscale.machine import Environment
from convscale.read import read_json_lines, read_text
from convscale.speed.timing import Measurement

SCHEMA = 1
"""Version of a record's fields; a reader refuses newer ones."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measured network."""

    model: str
    """The network's name."""
    measurement: Measurement
    """Times, conditions and machine."""
    params: float | None = None
    """Parameters."""
    macs: float | None = None
    """Multiply-accumulates per image at the measured size."""
    activations: float | None = None
    """Numbers that convolutions and linear layers put out per image."""
    spec: Mapping[str, Any] | None = None
    """The network's spec as JSON values, where its name alone does not say what to build: a scaled network, one with
    another head."""
    source: str = "convscale"
    """Who measured: this project, or the name of the table it was read from."""

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values, schema version included."""
        counts = {"params": self.params, "macs": self.macs, "activations": self.activations}
        return {
            "schema": SCHEMA,
            "model": self.model,
            "source": self.source,
            **counts,
            **({} if self.spec is None else {"spec": dict(self.spec)}),
            "measurement": self.measurement.to_dict(),
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Record:
        """From what :meth:`to_dict` gave.

        Raises:
            UserError: the schema is newer than this version reads, or a field is missing or impossible.
        """
        schema = value.get("schema")
        if not isinstance(schema, int):
            raise UserError("a record has no schema version")
        if schema > SCHEMA:
            raise UserError(
                f"a record has schema {schema}, this version of convscale reads up to {SCHEMA}; update convscale"
            )
        if missing := [key for key in ("model", "measurement") if key not in value]:
            raise UserError(f"a record lacks {', '.join(missing)}")
        counts = {key: value.get(key) for key in ("params", "macs", "activations")}
        for key, count in counts.items():
            if count is not None:
                check_number(f"a record's {key}", count, "a count", 0)
        spec = value.get("spec")
        if spec is not None and not isinstance(spec, Mapping):
            raise UserError(f"a record's spec must be an object of JSON, got {type(spec).__name__}")
        return cls(
            model=check_text("a record's model", value["model"]),
            measurement=Measurement.from_dict(value["measurement"]),
            spec=spec,
            source=check_text("a record's source", value.get("source", "")),
            **counts,
        )


def append_record(path: str | os.PathLike[str], record: Record | Measurement) -> None:
    """Add one line to a JSON-lines file. Several processes may do so at once.

    The line goes out in a single write to a file opened for appending, under a lock where the system has one; a last
    line that an earlier crash left without its end is closed first, so that only that one is lost.
    """
    if isinstance(record, Measurement):
        record = Record(model=record.model, measurement=record)
    line = json.dumps(record.to_dict(), allow_nan=False).encode() + b"\n"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        with alone(fd):
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":
                line = b"\n" + line
            if os.write(fd, line) != len(line):
                os.ftruncate(fd, size)  # a disk that fills up in the middle of a line; nothing of it stays
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))
            os.fsync(fd)
    finally:
        os.close(fd)


def read_records(path: str | os.PathLike[str], *, torn: Callable[[str], object] | None = None) -> list[Record]:
    """All records of a JSON-lines file, in its order; blank lines are skipped.

    Args:
        path: the file.
        torn: is told of a line that was only begun (``append_record`` was killed), which is passed over; None: it is
            damaged as others are.

    Raises:
        UserError: the file is missing, or a line is damaged or of a newer schema; the message has its number.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"records file {path} does not exist")
    found = []
    for number, value in read_json_lines(path, "records file", torn=torn):
        if not isinstance(value, dict):
            raise UserError(f"{path}, line {number} is not a record; remove that line")
        try:
            found.append(Record.from_dict(value))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path}, line {number}: {first_line(error)}") from error
    return found


def read_timm_csv(path: str | os.PathLike[str], *, conditions: Conditions, environment: Environment) -> list[Record]:
    """Read a table of timm's ``benchmark.py`` (``infer_*`` or ``train_*`` columns).

    The table holds speed, batch, size and counts; everything else stands in its file name, which a reader can not
    trust, so the caller says it.

    Args:
        conditions: device, mode, precision, layout and runtime of the table; batch and size are taken from its rows.
        environment: the machine and versions of the table.

    Returns:
        One record a row with a speed; each has one time, ``batch / images per second``.

    Raises:
        UserError: the file is missing, is of another mode, lacks columns (they are named) or a row is not numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"benchmark table {path} does not exist")
    reader = csv.DictReader(io.StringIO(read_text(path, "benchmark table"), newline=""))
    try:
        columns, rows = reader.fieldnames or [], list(reader)
    except csv.Error as error:
        raise UserError(f"benchmark table {path} is no CSV: {error}") from error
    mode = conditions.mode
    other = {"infer": "train", "train": "infer"}[mode]
    if f"{mode}_samples_per_sec" not in columns and f"{other}_samples_per_sec" in columns:
        raise UserError(f"benchmark table {path} is of mode {other} alone, asked is mode {mode}; give --mode {other}")
    needed = ("model", f"{mode}_samples_per_sec", f"{mode}_batch_size", f"{mode}_img_size")
    if missing := [name for name in needed if name not in columns]:
        raise UserError(
            f"benchmark table {path} lacks the columns {', '.join(missing)}; timm's benchmark.py writes them"
        )
    return [_timm_record(row, number, mode, path, conditions, environment) for number, row in enumerate(rows, start=2)]


def write_timm_csv(path: str | os.PathLike[str], records: Iterable[Record]) -> None:
    """Write records as timm's benchmark table, fastest first. Records of one mode only.

    Raises:
        UserError: there are no records, or they mix inference and training.
    """
    records = sorted(records, key=lambda r: -r.measurement.images_per_s)
    modes = {r.measurement.conditions.mode for r in records}
    if len(modes) != 1:
        raise UserError(f"a timm table holds records of one mode, got {', '.join(sorted(modes)) or 'none'}")
    mode = modes.pop()
    columns = [
        "model",
        f"{mode}_img_size",
        f"{mode}_samples_per_sec",
        f"{mode}_step_time",
        f"{mode}_batch_size",
        "param_count",
    ]
    if mode == "infer":
        columns += ["infer_gmacs", "infer_macts"]
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for record in records:
            m, c = record.measurement, record.measurement.conditions
            row = {
                f"{mode}_img_size": c.image_size,
                f"{mode}_samples_per_sec": round(m.images_per_s, 2),
                f"{mode}_batch_size": c.batch_size,
            }
            row |= {
                "model": record.model,
                f"{mode}_step_time": round(m.latency_s * 1e3, 3),
                "param_count": _scaled(record.params, 1e6),
            }
            writer.writerow(
                row | {"infer_gmacs": _scaled(record.macs, 1e9), "infer_macts": _scaled(record.activations, 1e6)}
            )


def _timm_record(
    row: Mapping[str, str], number: int, mode: str, path: Path, conditions: Conditions, environment: Environment
) -> Record:
    """One row; counts that the table lacks stay unknown."""
    try:
        batch, size = (check_whole(key, int(row[key])) for key in (f"{mode}_batch_size", f"{mode}_img_size"))
        images_per_s = float(row[f"{mode}_samples_per_sec"])
        counts = [
            round(float(row[key]) * unit) if row.get(key) else None
            for key, unit in (("param_count", 1e6), ("infer_gmacs", 1e9), ("infer_macts", 1e6))
        ]
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"benchmark table {path}, line {number}: {first_line(error)}") from error
    # A speed so small that the time of a batch is no number is none either.
    if not 0 < images_per_s < math.inf or not math.isfinite(batch / images_per_s):
        raise UserError(f"benchmark table {path}, line {number}: {images_per_s} images/s is no speed")
    measurement = Measurement(
        times_s=(batch / images_per_s,),
        conditions=Conditions(**{**conditions.to_dict(), "mode": mode, "batch_size": batch, "image_size": size}),
        environment=environment,
        model=row["model"],
        notes=(f"read from {path.name}: the median only",),
    )
    return Record(
        model=row["model"],
        measurement=measurement,
        params=counts[0],
        macs=counts[1],
        activations=counts[2],
        source=path.name,
    )


def _scaled(value: float | None, unit: float) -> float | str:
    return "" if value is None else round(value / unit, 2)
