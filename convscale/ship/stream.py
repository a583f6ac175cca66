"""Classify image files with an artefact: any number of them, in order, decoding while the network runs."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO, cast

import numpy as np

from convscale.artifact.answers import NOT_FINITE, box_answer
from convscale.artifact.artifact import Artifact
from convscale.aside import aside
from convscale.errors import UserError, check_text, first_line, naming_extras
from convscale.files import is_full
from convscale.images.decode import (
    EXTENSIONS,
    MAX_BYTES,
    MAX_PIXELS,
    ImageError,
    check_size,
    decode_image,
    preload,
    read_bytes,
)
from convscale.images.letterbox import Square, square_of
from convscale.images.preprocess import Preprocessing
from convscale.images.walk import Tally, pictures_below
from convscale.locks import OutputLock
from convscale.machine import available_cores
from convscale.ship.nvjpeg import NvJpeg
from convscale.ship.rows import Row, appended, csv_line, format_of, header_of, json_line, prepare_output

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+-]*://")
"""How fsspec's paths begin."""
DECODERS = ("cpu", "nvjpeg")
AHEAD = 4
"""Batches that are decoded ahead of the network; what bounds the memory."""


@dataclass(frozen=True, kw_only=True)
class Classified:
    """What a run came to."""

    images: int
    """Files classified in this run, bad ones included."""
    errors: int
    """Bad ones among them."""
    resumed: int
    """Files that an earlier run had done."""
    seconds: float
    """Of this run, from the first file to the last."""
    resumed_errors: int = 0
    """Bad ones among those that an earlier run had done."""
    note: str = ""
    """Why the output was not locked against a second run; empty where it was."""

    @property
    def images_per_s(self) -> float:
        """Files per second, end to end."""
        return self.images / self.seconds if self.seconds > 0 else 0.0


def image_paths(
    arguments: Iterable[str], stdin: Iterable[str] | None = None, tally: Tally | None = None
) -> Iterator[str]:
    """The files that command-line arguments mean, one at a time.

    A folder gives the images below it, in the order of their names, links followed, no folder twice; a pattern
    (``photos/*.jpg``) what it matches, and one with ``**`` the images among that; ``-`` the lines of ``stdin``; a file
    itself. ``tally`` counts what of folders is left out, once all paths were taken.

    Raises:
        UserError: an argument that is nothing of that, or gives nothing; before the first path.
    """
    arguments = list(arguments)
    if not arguments:
        raise UserError("no images are named; give files, folders, patterns, or - for a list on standard input")
    for argument in arguments:
        if argument != "-" and not os.path.lexists(argument) and not glob.has_magic(argument):
            raise UserError(f"image {argument} does not exist")
        if argument == "-" and stdin is None:
            raise UserError("- needs a list of paths on standard input")
        if argument != "-" and not os.path.isfile(argument) and next(_expand(argument, stdin, Tally()), None) is None:
            raise UserError(f"{argument} gives no image; known extensions: {', '.join(EXTENSIONS)}")
    counted = Tally() if tally is None else tally
    return (path for argument in arguments for path in _expand(argument, stdin, counted))


def classify_stream(
    paths: Iterable[str],
    artifact: Artifact,
    *,
    top: int = 1,
    batch_size: int | None = None,
    workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
    gpu: NvJpeg | None = None,
) -> Iterator[Row]:
    """Rows for files, in their order. A few batches are decoded ahead by threads; nothing else is held.

    Args:
        top: likeliest classes per row; a detector's rows have all of its boxes.
        batch_size: images per call; None: the artefact's.
        workers: decoding threads; None: one per core.
        max_pixels: larger pictures are refused before they are decoded.
        gpu: decodes plain JPEGs in the place of the threads; None: they do.
    """
    batch_size = artifact.batch_size if batch_size is None else batch_size
    workers = available_cores() if workers is None else workers
    _check_options(top, artifact, batch_size, workers)
    paths = iter(paths)
    preload()
    waiting: deque[tuple[str, Future[np.ndarray | Square]]] = deque()
    decode = _decode_square if artifact.is_detector else _decode
    decode = decode if gpu is None else gpu.read
    with ThreadPoolExecutor(workers) as pool:

        def fill() -> None:
            while len(waiting) < AHEAD * batch_size:
                path = next(paths, None)
                if path is None:
                    return
                waiting.append((path, pool.submit(decode, path, artifact.preprocessing, max_pixels)))

        try:
            fill()
            while waiting:
                batch = [waiting.popleft() for _ in range(min(batch_size, len(waiting)))]
                decoded = [_result(path, future) for path, future in batch]
                fill()  # before the network runs, so that the decoders have work meanwhile
                if gpu is not None:
                    decoded = cast("list[tuple[str, np.ndarray | Square | str]]", gpu.decoded(decoded))
                yield from _rows(decoded, artifact, top, batch_size)
        finally:
            for _, future in waiting:
                future.cancel()


def classify(
    paths: Iterable[str],
    artifact: Artifact,
    output: str | os.PathLike[str] | TextIO,
    *,
    format: str | None = None,
    top: int = 1,
    batch_size: int | None = None,
    workers: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_rows: Callable[[int, int], object] | None = None,
    decode: str = "cpu",
    on_note: Callable[[str], object] | None = None,
    on_kept: Callable[[int], object] | None = None,
) -> Classified:
    """Classify files and write a row for each, in order.

    A file that can not be used gets a row with its error. Rows are written as they come, so that a run that was stopped
    goes on where it stopped with ``resume``; the same files in the same order must then be named.

    Args:
        paths: see :func:`image_paths`.
        output: a file, or an open text stream.
        format: ``csv`` or ``jsonl``; None: by the file's ending, CSV for a stream; boxes are ``jsonl`` always.
        resume: keep the rows that ``output`` has and go on behind them.
        overwrite: replace an existing file.
        on_rows: called with the numbers of files and of bad ones so far, after each batch.
        decode: ``cpu``, the decoder that training used; or ``nvjpeg``, by which the GPU of an artefact that is opened
            on ``cuda`` decodes plain JPEGs (gray or luma and chroma, upright), all others being decoded as ever. Its
            pixels differ: how far, and how many answers change by it, is looked at on the first batch.
        on_note: told of that; None: standard error is.
        on_kept: called with the number of rows that ``resume`` keeps, before others are made.

    Raises:
        UserError: an unknown format or decoder, one that is not there, an output that exists or has rows of other
            files, a disk that is full.
    """
    check_text("decode", decode, DECODERS)
    gpu = None if decode == "cpu" else NvJpeg(artifact, _bytes_of, on_note or _on_stderr)
    form = format_of(output, format, boxes=artifact.is_detector)
    _check_options(top, artifact, batch_size, workers)  # before anything is written
    if isinstance(artifact, Artifact):
        _ = artifact.runner  # so is a device that is not there
    if not isinstance(output, (str, os.PathLike)):
        made = _Rows(top, batch_size, workers, on_rows, gpu)
        return _write_rows(paths, artifact, output, form, made, begins_empty=True)
    path = Path(output)
    paths = iter(paths)
    with OutputLock() as lock:
        header = header_of(top, artifact.thresholds is not None)
        done, errors = prepare_output(path, form, header, paths, resume=resume, overwrite=overwrite, lock=lock)
        if on_kept is not None:
            on_kept(done)
        rows = _Rows(top, batch_size, workers, on_rows, gpu)
        stream = appended(path)
        try:
            found = _write_rows(paths, artifact, stream, form, rows, begins_empty=path.stat().st_size == 0)
            stream.close()
        except OSError as error:
            if is_full(error):
                raise UserError(
                    f"no space left on the disk of {output}; {rows.count} images are done, free some and use --resume"
                ) from error
            raise UserError(f"output {output} can not be written: {error.strerror or error}; name another") from error
        finally:
            with suppress(OSError):  # what could not be written is told above; closing tries it once more
                stream.close()
        return replace(found, resumed=done, resumed_errors=errors, note=lock.note)


@dataclass
class _Rows:
    """How rows are made, and how many there are."""

    top: int
    batch_size: int | None
    workers: int | None
    on_rows: Callable[[int, int], object] | None
    gpu: NvJpeg | None
    count: int = 0


def _write_rows(
    paths: Iterable[str], artifact: Artifact, stream: TextIO, form: str, rows: _Rows, *, begins_empty: bool
) -> Classified:
    """Write a row for each path as it comes, and flush after each batch."""
    several = artifact.thresholds is not None
    writer = csv_line if form == "csv" else json_line
    start = time.perf_counter()
    errors = 0
    step = rows.batch_size or artifact.batch_size
    if form == "csv" and begins_empty:
        stream.write(header_of(rows.top, several))
    made = classify_stream(
        paths, artifact, top=rows.top, batch_size=rows.batch_size, workers=rows.workers, gpu=rows.gpu
    )
    for row in made:
        stream.write(writer(row, rows.top, several))
        rows.count += 1
        errors += bool(row.error)
        if rows.count % step == 0:
            stream.flush()
            if rows.on_rows is not None:
                rows.on_rows(rows.count, errors)
    stream.flush()
    if rows.on_rows is not None:
        rows.on_rows(rows.count, errors)
    return Classified(images=rows.count, errors=errors, resumed=0, seconds=time.perf_counter() - start)


def _check_options(top: int, artifact: Artifact, batch_size: int | None, workers: int | None) -> None:
    for name, value in (("batch_size", batch_size), ("workers", workers)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    if not 1 <= top <= len(artifact.classes):
        raise UserError(f"top must lie between 1 and the {len(artifact.classes)} classes, got {top}")


def _expand(argument: str, stdin: Iterable[str] | None, tally: Tally) -> Iterator[str]:
    if argument == "-":
        yield from (line.rstrip("\r\n") for line in stdin or () if line.strip())
    elif os.path.isdir(argument):
        yield from pictures_below(argument, tally)
    elif os.path.lexists(argument):
        yield argument
    elif "**" in argument.split("/"):
        yield from sorted(_below_pattern(argument, tally))
    else:
        yield from (path for path in sorted(glob.iglob(argument)) if os.path.isfile(path))


def _below_pattern(pattern: str, tally: Tally) -> Iterator[str]:
    """Images that a pattern with ``**`` matches; ``glob`` itself goes round in links for ever."""
    parts = pattern.split("/")
    first = parts.index("**")
    top, rest = "/".join(parts[:first]), parts[first:]
    begins = sorted(glob.iglob(top)) if top else ["/" if pattern.startswith("/") else "."]
    for begin in begins:
        for path in pictures_below(begin, tally) if os.path.isdir(begin) else ():
            if _matches(os.path.relpath(path, begin).split(os.sep), rest):
                yield os.path.relpath(path) if begin == "." else path


def _matches(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path are what a pattern's parts say; ``**`` stands for any number of them."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_matches(path[at:], pattern[1:]) for at in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and _matches(path[1:], pattern[1:])


def _decode(path: str, preprocessing: Preprocessing, max_pixels: int) -> np.ndarray:
    """uint8 (H, W, C) in the artefact's size."""
    return preprocessing.resize(_image(path, preprocessing.channels, max_pixels))


def read_url(path: str) -> bytearray:
    """The bytes behind one of fsspec's paths, such as ``s3://bucket/a.jpg``.

    Raises:
        ImageError: they can not be read, or are more than ``MAX_BYTES``.
    """
    with naming_extras(f"reading {path}"):
        import fsspec
    try:
        data = bytearray()
        with fsspec.open(path, "rb") as file:  # a server's stream gives what has come so far, and nothing at its end
            while len(data) <= MAX_BYTES and (
                more := file.read(MAX_BYTES + 1 - len(data))  # pyright: ignore[reportAttributeAccessIssue]
            ):
                data += more
        check_size(len(data), path)
        return data
    except ImageError:
        raise
    except Exception as error:  # a file system raises what it likes
        raise ImageError(f"{path}: can not be read ({type(error).__name__}: {first_line(error)})") from error


def _decode_square(path: str, preprocessing: Preprocessing, max_pixels: int) -> Square:
    """A picture fitted into a detector's square."""
    return square_of(_image(path, 3, max_pixels), preprocessing.width, preprocessing.mean)


def _image(path: str, channels: int, max_pixels: int) -> np.ndarray:
    """A decoded picture, here or behind one of fsspec's paths."""
    return decode_image(_bytes_of(path), name=path, channels=channels, max_pixels=max_pixels)


def _bytes_of(path: str) -> bytearray:
    """A file's bytes, here or behind one of fsspec's paths."""
    return read_url(path) if _URL.match(path) else read_bytes(path)


def _on_stderr(text: str) -> None:
    with aside():  # nobody reads it, or its disk is full: the rows' own disk is not
        print(text, file=sys.stderr, flush=True)


def _result(path: str, future: Future[np.ndarray | Square]) -> tuple[str, np.ndarray | Square | str]:
    """The pixels, or the reason why there are none, without the path it starts with."""
    try:
        return path, future.result()
    except ImageError as error:
        return path, str(error).removeprefix(f"{path}: ")
    except UserError:  # the system, not the picture: every further row would say the same
        raise
    except (OSError, ValueError, MemoryError) as error:
        return path, f"can not be read ({error})"


def _box_rows(
    decoded: list[tuple[str, np.ndarray | Square | str]], artifact: Artifact, batch_size: int
) -> Iterator[Row]:
    squares = [each for _, each in decoded if isinstance(each, Square)]
    pixels, sizes = [each.pixels for each in squares], [each.size for each in squares]
    found = iter(artifact.boxes_in_squares(pixels, sizes, batch_size=batch_size))
    for path, each in decoded:
        if isinstance(each, str):
            yield Row(path=path, error=each)
            continue
        said = box_answer(next(found), artifact.classes, None, path)
        yield Row(path=path, classes=said.labels, probabilities=said.probabilities, boxes=said.boxes)


def _rows(
    decoded: list[tuple[str, np.ndarray | Square | str]], artifact: Artifact, top: int, batch_size: int
) -> Iterator[Row]:
    if artifact.is_detector:
        yield from _box_rows(decoded, artifact, batch_size)
        return
    images = [image for _, image in decoded if isinstance(image, np.ndarray)]
    probabilities = iter(artifact(np.stack(images), batch_size=batch_size) if images else ())
    for path, image in decoded:
        if isinstance(image, str):
            yield Row(path=path, error=image)
            continue
        row = next(probabilities)
        if not np.isfinite(row).all():
            yield Row(path=path, error=NOT_FINITE)
            continue
        best = np.argsort(-row, kind="stable")[:top]
        labels = None
        if artifact.thresholds is not None:
            labels = tuple(
                name
                for name, value, least in zip(artifact.classes, row, artifact.thresholds, strict=True)
                if value > least
            )
        yield Row(
            path=path,
            classes=tuple(artifact.classes[i] for i in best),
            probabilities=tuple(float(row[i]) for i in best),
            labels=labels,
        )
