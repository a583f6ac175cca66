"""A list of images in shards, each with a file of rows of its own: what a run over several machines is made of.

A shard's file bears the digest of all that its rows depend on, and appears whole or not at all. So a run that was
killed goes on with the shards whose files are missing, whoever wrote the others, and no row is lost or written twice.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from convscale.errors import UserError, check_whole, first_line
from convscale.files import atomic_path
from convscale.read import json_of
from convscale.ship.rows import ROW, Row, row_values

FORMATS = ("jsonl", "parquet")
SHARD = 1_000
"""Images of a shard, where nothing else is asked for."""
_LOCAL = ("file", "local")
"""fsspec's names for this machine's files."""
_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci")
"""fsspec's names for stores that show an object once all of it is there."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Some images that follow each other in the list."""

    number: int
    """Its place."""
    paths: tuple[str, ...]
    """The images."""
    file: str
    """The name of its rows' file."""


def is_url(path: str) -> bool:
    """Whether a path is fsspec's, such as ``s3://bucket/a.jpg``."""
    head, sign, _ = path.partition("://")
    return bool(sign) and head.replace("+", "").replace("-", "").isalnum()


def is_relative(path: str) -> bool:
    """Whether a path depends on the folder that a process works in; fsspec's local ones may, too."""
    head, _, rest = path.partition("://")
    if is_url(path):
        return head in _LOCAL and not os.path.isabs(rest)
    return not os.path.isabs(path)


def shards_of(paths: Iterable[str], *, size: int, format: str, facts: str) -> Iterator[Shard]:
    """The list in shards, in order.

    Args:
        size: images of each but the last.
        facts: what rows depend on beside the images: the artefact's digest, the labels of a row.
    """
    check_whole("shard size", size)
    rest = iter(paths)
    number = 0
    while some := tuple(islice(rest, size)):
        text = json.dumps([facts, number, some], ensure_ascii=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        yield Shard(number=number, paths=some, file=f"part-{number:06d}-{digest}.{format}")
        number += 1


def listed(source: str) -> Iterator[str]:
    """The paths in a Parquet file's column ``path``, a batch at a time.

    Raises:
        UserError: it is no such file, or has no such column of text.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with _opened(source) as file:
            table = pq.ParquetFile(file)
            if "path" not in table.schema_arrow.names:
                raise UserError(f"listing {source} has no column 'path' (it has {', '.join(table.schema_arrow.names)})")
            for batch in table.iter_batches(columns=["path"]):
                for value in batch.column(0).to_pylist():
                    if not isinstance(value, str):
                        raise UserError(f"listing {source} has a path that is no text")
                    yield value
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"listing {source} can not be read: {error}") from error


def _opened(source: str) -> Any:
    if is_url(source):
        import fsspec

        return fsspec.open(source, "rb").open()  # pyright: ignore[reportAttributeAccessIssue]
    return open(source, "rb")


# ---------------------------------------------------------------- the folder of rows


class Rows:
    """The folder that shards' files go into: here, or anywhere that fsspec reaches."""

    def __init__(self, place: str) -> None:
        self.place = place.rstrip("/")
        self._files: Any = None
        self._folder = Path(self.place)
        if is_url(place):
            import fsspec

            files, self._root = fsspec.core.url_to_fs(self.place)
            if set(_kinds(files)) & set(_LOCAL):  # opened by fsspec, a part would stand there before it is whole
                self._folder = Path(self._root)
            else:
                self._files = files

    def names(self) -> set[str]:
        """Files of shards that are there, those that other processes wrote too: what a file system remembers of an
        earlier look is thrown away.

        Raises:
            UserError: it is a file, or can not be read.
        """
        try:
            if self._files is not None:
                self._files.invalidate_cache()
                found = self._files.ls(self._root, detail=False) if self._files.exists(self._root) else []
                every = [str(name).rpartition("/")[2] for name in found]
            else:
                folder = self._folder
                if folder.exists() and not folder.is_dir():
                    raise UserError(f"output {folder} is a file; with --engine ray it is a folder of parts")
                every = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        except OSError as error:
            raise UserError(f"output {self.place} can not be read: {error}") from error
        return {name for name in every if name.startswith("part-") and name.endswith((".jsonl", ".parquet"))}

    def errors(self, name: str) -> int:
        """How many rows of a shard's file have an error.

        Raises:
            UserError: it can not be read, or is damaged.
        """
        part = f"part {name} of {self.place}"
        try:
            with self._opened(name) as file:
                data = io.BytesIO(file.read())
        except Exception as error:  # a file system raises what it likes
            raise UserError(f"{part} can not be read: {first_line(error)}; use --resume once it can be") from error
        try:
            if name.endswith(".parquet"):
                import pyarrow.parquet as pq

                column = pq.read_table(data, columns=["error"]).column("error")
                return len(column) - column.null_count
            may_be = (line.decode("utf-8", "surrogateescape") for line in data if b'"error"' in line)
            return sum("error" in json_of(line, "a row", ROW) for line in may_be)
        except Exception as error:  # so does pyarrow, OSError among it
            raise UserError(f"{part} is damaged: {first_line(error)}; remove it") from error

    def _opened(self, name: str) -> IO[bytes]:
        if self._files is not None:
            return self._files.open(f"{self._root}/{name}", "rb")
        return open(self._folder / name, "rb")

    def remove(self, names: Iterable[str]) -> None:
        """Take files away."""
        for name in names:
            if self._files is not None:
                self._files.rm(f"{self._root}/{name}")
            else:
                (self._folder / name).unlink(missing_ok=True)

    def write(self, name: str, rows: Sequence[Row], *, several: bool, boxes: bool = False) -> None:
        """A shard's file, whole or not at all; of several labels for an image, or of a detector's boxes."""
        data = _packed(rows, several, boxes) if name.endswith(".parquet") else _lines(rows, several)
        if self._files is None:
            with atomic_path(self._folder / name) as temporary:
                temporary.write_bytes(data)
        elif set(_kinds(self._files)) & set(_STORES):
            self._files.pipe_file(f"{self._root}/{name}", data)
        else:
            self._moved(name, data)

    def _moved(self, name: str, data: bytes) -> None:
        """Write a file under a hidden name first, where one that is only begun can be seen."""
        self._files.makedirs(self._root, exist_ok=True)
        hidden = f"{self._root}/.{name}.{os.urandom(4).hex()}.tmp"
        try:
            self._files.pipe_file(hidden, data)
            self._files.mv(hidden, f"{self._root}/{name}")
        except BaseException:
            with suppress(Exception):  # a file system raises what it likes; what went wrong first is told
                self._files.rm(hidden)
            raise


def _kinds(files: Any) -> tuple[str, ...]:
    """The names that a file system of fsspec goes by."""
    return (files.protocol,) if isinstance(files.protocol, str) else tuple(files.protocol)


def _lines(rows: Sequence[Row], several: bool) -> bytes:
    return "".join(json.dumps(row_values(row, several)) + "\n" for row in rows).encode("utf-8", "surrogateescape")


def _packed(rows: Sequence[Row], several: bool, boxes: bool) -> bytes:
    """Columns ``path``, ``classes``, ``probabilities``, ``error``; for several labels ``labels``; of a detector
    ``boxes``, for each of ``classes`` x1, y1, x2, y2.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {
        "path": pa.array([row.path.encode("utf-8", "backslashreplace").decode() for row in rows], pa.string()),
        "classes": pa.array([list(row.classes) for row in rows], pa.list_(pa.string())),
        "probabilities": pa.array([list(row.probabilities) for row in rows], pa.list_(pa.float64())),
        "error": pa.array([row.error or None for row in rows], pa.string()),
    }
    if several:
        columns["labels"] = pa.array([list(row.labels or ()) for row in rows], pa.list_(pa.string()))
    if boxes:
        sides = [[list(box) for box in row.boxes or ()] for row in rows]
        columns["boxes"] = pa.array(sides, pa.list_(pa.list_(pa.float64())))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()
