"""``classify`` on Ray Data: shards go to actors that hold the artefact, on this machine or on a cluster.

Each actor writes its shard's file itself. Ray starts an actor that died again and gives it the shard once more; what
the driver's death leaves undone, ``resume`` does. The rows are those of :func:`convscale.classify`.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from convscale.artifact.artifact import Artifact, load_artifact
from convscale.errors import UserError, check_text, check_whole
from convscale.machine import available_cores
from convscale.ship.cluster import begin, check_answers
from convscale.ship.shards import FORMATS, SHARD, Rows, Shard, is_relative, shards_of
from convscale.ship.stream import Classified, classify_stream

_READERS = 16
"""Threads that read the parts of an earlier run: each waits for a network, where they are behind one."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where and how wide.

    Raises:
        UserError: a number is below 1.
    """

    address: str | None = None
    """Ray's; None: a cluster of this machine alone, which ends with the run."""
    actors: int | None = None
    """Processes that hold the artefact; None: one per core of this machine."""
    shard_size: int = SHARD
    """Images of a shard."""

    def __post_init__(self) -> None:
        check_whole("shard size", self.shard_size)
        if self.actors is not None:
            check_whole("actors", self.actors)


class ClassifyShards:
    """An actor: the artefact, opened once. It works in the driver's folder, where that counts: Ray's own is another,
    and paths of images and of the output mean what the user means by them.

    Raises:
        UserError: this machine has no such folder.
    """

    def __init__(
        self, folder: str, threads: int, top: int, batch_size: int | None, output: str, here: str | None = None
    ) -> None:
        if here is not None:
            try:
                os.chdir(here)
            except OSError as error:
                raise UserError(
                    f"{socket.gethostname()} has no folder {here}, from which the paths go out; name whole paths"
                ) from error
        self.artifact = load_artifact(folder, threads=threads)
        self.top, self.batch_size, self.threads = top, batch_size, threads
        self.rows = Rows(output)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Classify the shards of a batch; how many images, and how many bad ones, each has."""
        counts: list[int] = []
        errors: list[int] = []
        for file, paths in zip(batch["file"], batch["paths"], strict=True):
            rows = list(
                classify_stream(
                    [str(path) for path in paths],
                    self.artifact,
                    top=self.top,
                    batch_size=self.batch_size,
                    workers=self.threads,
                )
            )
            several, boxes = self.artifact.thresholds is not None, self.artifact.is_detector
            self.rows.write(str(file), rows, several=several, boxes=boxes)
            counts.append(len(rows))
            errors.append(sum(bool(row.error) for row in rows))
        return {"file": list(batch["file"]), "images": counts, "errors": errors}


def classify_on_ray(
    paths: Iterable[str],
    artifact: Artifact,
    output: str,
    *,
    cluster: Cluster | None = None,
    format: str = "jsonl",
    top: int = 1,
    batch_size: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_rows: Callable[[int, int], object] | None = None,
    count_kept: bool = True,
) -> Classified:
    """Classify files on several processes or machines, in order: a folder of parts, each with the rows of a shard.

    Args:
        paths: files, or fsspec's paths; machines of a cluster must reach them, the artefact and the output.
        artifact: what classifies.
        output: the folder of parts, here or anywhere that fsspec reaches.
        cluster: where, and how wide.
        format: ``jsonl`` or ``parquet``.
        top: labels of a row.
        batch_size: images per call; None: the artefact's.
        resume: keep the parts that are there and make the others; the same images in the same order must be named.
        overwrite: remove the parts that are there first.
        on_rows: called with the numbers of files and of bad ones so far.
        count_kept: count the bad images of the parts that are kept, by reading all of these; else
            ``resumed_errors`` is 0.

    Raises:
        UserError: an unknown format, parts of other images, an address that does not answer, or Ray can not be started.
    """
    check_text("format", format, FORMATS)
    if not 1 <= top <= len(artifact.classes):
        raise UserError(f"top must lie between 1 and the {len(artifact.classes)} classes, got {top}")
    cluster = cluster or Cluster()
    if cluster.address is not None:  # before the parts that are there are removed
        check_answers(cluster.address)
    place = Rows(output)
    shards = list(shards_of(paths, size=cluster.shard_size, format=format, facts=_facts(artifact, top, batch_size)))
    missing = _missing(place, shards, resume=resume, overwrite=overwrite)
    resumed = sum(len(shard.paths) for shard in shards) - sum(len(shard.paths) for shard in missing)
    made = {shard.file for shard in shards} - {shard.file for shard in missing}
    with ThreadPoolExecutor(_READERS) as pool:
        resumed_errors = sum(pool.map(place.errors, made if count_kept else ()))
    start = time.perf_counter()
    images = errors = 0
    for row in _run(missing, artifact, place.place, cluster, top, batch_size) if missing else ():
        images, errors = images + int(row["images"]), errors + int(row["errors"])
        if on_rows is not None:
            on_rows(images, errors)
    there = place.names()
    lost = [shard.file for shard in missing if shard.file not in there]
    if lost:
        raise UserError(f"{len(lost)} parts are missing at the end (first: {lost[0]}); use --resume")
    seconds = time.perf_counter() - start
    return Classified(images=images, errors=errors, resumed=resumed, seconds=seconds, resumed_errors=resumed_errors)


def _facts(artifact: Artifact, top: int, batch_size: int | None) -> str:
    """What rows depend on beside the images."""
    files = sorted((name, str(entry.get("sha256"))) for name, entry in artifact.manifest.files.items())
    return f"{hashlib.sha256(repr(files).encode()).hexdigest()} {artifact.runtime} {top} {batch_size}"


def _missing(place: Rows, shards: list[Shard], *, resume: bool, overwrite: bool) -> list[Shard]:
    """The shards that are to be made.

    Raises:
        UserError: there are parts already and neither was asked for, or parts of other images.
    """
    there = place.names()
    if there and not resume and not overwrite:
        raise UserError(f"output {place.place} has parts already; use --resume, --overwrite or another name")
    if not resume:
        place.remove(there)
        return shards
    if other := sorted(there - {shard.file for shard in shards}):
        raise UserError(
            f"output {place.place} has {other[0]}, a part of other images, options or another artefact; resume with "
            "the same, or name another output"
        )
    return [shard for shard in shards if shard.file not in there]


def _here(output: str, shards: list[Shard]) -> str | None:
    """The folder that the actors must work in; None: no path asks for it."""
    named = (output, *(path for shard in shards for path in shard.paths))
    return os.getcwd() if any(is_relative(path) for path in named) else None


def _run(
    shards: list[Shard], artifact: Artifact, output: str, cluster: Cluster, top: int, batch_size: int | None
) -> Iterable[dict[str, Any]]:
    """How many images and bad ones each shard has, as they come."""
    import ray
    import ray.data
    import ray.exceptions

    ours = not ray.is_initialized()
    cores = available_cores()
    if ours:
        begin(ray, cluster.address, cores=cores)
    actors = min(cluster.actors or cores, len(shards))
    threads = max(1, cores // actors)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.actor_task_retry_on_errors = False  # an error of ours is told at once; a death is not one
        items = [{"file": shard.file, "paths": list(shard.paths)} for shard in shards]
        made = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            ClassifyShards,
            fn_constructor_args=(
                str(artifact.folder.resolve()),
                threads,
                top,
                batch_size,
                output,
                _here(output, shards),
            ),
            concurrency=actors,
            batch_size=1,
            num_cpus=1,
            max_restarts=-1,
            max_task_retries=-1,
        )
        yield from made.iter_rows()
    except ray.exceptions.RayError as error:
        raise UserError(f"Ray ended the run: {str(error).strip().splitlines()[-1][:300]}; use --resume") from error
    finally:
        if ours:
            ray.shutdown()
