"""The command classify: what image files show, one after the other, here or on a Ray cluster. ``register`` puts it on
the command line.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from convscale.cli.detect import check_box_outputs, write_box_outputs
from convscale.cli.live import Live, count_aside
from convscale.cli.options import Device, Json, Overwrite, Resume, WordyCommand, names_on_stdin, print_json, say
from convscale.errors import UserError, check_number, check_text

if TYPE_CHECKING:
    from convscale.artifact.artifact import Artifact
    from convscale.ship.stream import Classified


def register(app: typer.Typer) -> None:
    """Put the command on the app."""
    app.command("classify", cls=WordyCommand)(classify_command)


def classify_command(
    images: Annotated[list[str], typer.Argument(help="Files, folders, patterns, or - for a list on standard input.")],
    model: Annotated[Path, typer.Option("--model", help="Artefact folder.")],
    output: Annotated[
        str | None,
        typer.Option("--output", metavar="PATH", help="A .csv or .jsonl file; standard output when left out."),
    ] = None,
    format: Annotated[
        str | None, typer.Option("--format", help="csv or jsonl; with --engine ray jsonl or parquet.")
    ] = None,
    top: Annotated[int, typer.Option("--top", help="Likeliest classes per image.")] = 1,
    coco: Annotated[
        Path | None, typer.Option("--coco", help="Of a detector: its boxes as COCO's results, too; needs --output.")
    ] = None,
    draw: Annotated[
        Path | None, typer.Option("--draw", help="Of a detector: a folder for the images with boxes drawn.")
    ] = None,
    min_score: Annotated[float, typer.Option("--min-score", help="Boxes below it are not drawn.")] = 0.3,
    batch_size: Annotated[
        int | None, typer.Option("-b", "--batch-size", help="Images per call; the artefact's own when left out.")
    ] = None,
    device: Device = "cpu",
    workers: Annotated[
        int | None, typer.Option("--workers", help="Decoding threads; one per core when left out.")
    ] = None,
    decode: Annotated[
        str,
        typer.Option(
            "--decode", help="cpu, as training did; nvjpeg: plain JPEGs on the GPU of --device, with other pixels."
        ),
    ] = "cpu",
    max_bad_rate: Annotated[
        float | None,
        typer.Option("--max-bad-rate", help="Exit with 2 where a larger share of images, and more than one, is bad."),
    ] = None,
    engine: Annotated[
        str, typer.Option("--engine", help="local; ray: on Ray Data, --output is a folder of parts.")
    ] = "local",
    address: Annotated[
        str | None, typer.Option("--address", help="Of a Ray cluster; one of this machine when left out.")
    ] = None,
    actors: Annotated[
        int | None, typer.Option("--actors", help="Of Ray: processes that hold the artefact; one per core.")
    ] = None,
    shard_size: Annotated[int, typer.Option("--shard-size", help="Of Ray: images of a part.")] = 1_000,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Classify images, or find boxes in them by a detector: one row each, in order."""
    from convscale.artifact.artifact import load_artifact
    from convscale.files import check_outside
    from convscale.images.walk import Tally
    from convscale.ship.stream import classify, image_paths

    if max_bad_rate is not None:
        check_number("--max-bad-rate", max_bad_rate, "a share from 0 to 1", 0, 1)
    left_out = Tally()
    check_text("engine", engine, ("local", "ray"))
    if engine == "ray":
        if coco is not None or draw is not None:
            raise UserError("--coco and --draw go with --engine local")
        if device != "cpu" or workers is not None or decode != "cpu":
            raise UserError(
                "--device, --workers and --decode go with --engine local; --actors says how many processes Ray has"
            )
        done = _classify_on_ray(
            images,
            model,
            output,
            _Ray(address=address, actors=actors, shard_size=shard_size),
            format=format,
            top=top,
            batch_size=batch_size,
            resume=resume,
            overwrite=overwrite,
            count_kept=max_bad_rate is not None,
        )
        _tell_done(done, output, as_json=as_json)
        _check_bad_rate(done, max_bad_rate)
        return
    if address is not None or actors is not None:
        raise UserError("--address and --actors go with --engine ray")
    paths = image_paths(images, names_on_stdin(), left_out)
    file = None if output is None else Path(output)
    target = sys.stdout if file is None else file
    form = format or ("jsonl" if as_json and output is None else None)

    if output is not None and overwrite and not resume:
        check_outside(output, (("image", each) for each in images))
    opened = load_artifact(model, device=device)
    since_ns = check_box_outputs(opened, file, coco, draw, min_score, resume=resume, overwrite=overwrite)

    known = None if "-" in images else count_aside(lambda: image_paths(images, None))
    live = Live("images", known)

    done = classify(
        paths,
        opened,
        target,
        format=form,
        top=top,
        batch_size=batch_size,
        workers=workers,
        resume=resume,
        overwrite=overwrite,
        on_rows=lambda count, errors: live(count, f", {errors:,} bad"),
        on_kept=lambda count: setattr(live, "kept", count),
        decode=decode,
    )
    live.end()
    for note in (*left_out.report().notes(), *filter(None, [done.note])):
        say(note, err=True)
    say(_told(done, opened, device, batch_size), err=True)
    if file is not None:
        write_box_outputs(opened, file, coco, draw, min_score, since_ns=since_ns)
    _tell_done(done, output, as_json=as_json)
    _check_bad_rate(done, max_bad_rate)


def _told(done: Classified, artifact: Artifact, where: str, batch_size: int | None) -> str:
    """What a run came to, with what its speed was taken under, for people."""
    precision = artifact.computed_in(artifact.runtime)
    under = f"{where}, {artifact.runtime}, {precision}, batch {batch_size or artifact.batch_size}"
    speed = f"{done.images_per_s:,.1f} images/s end to end ({under})"
    return f"{done.images:,} images, {done.errors:,} bad, {speed}"


def _tell_done(done: Classified, output: str | None, *, as_json: bool) -> None:
    """What a run came to, for machines, where standard output does not hold the rows."""
    if as_json and output is not None:
        said = {"output": output, "images": done.images, "errors": done.errors, "resumed": done.resumed}
        print_json({**said, "seconds": done.seconds, "images_per_s": done.images_per_s})


def _check_bad_rate(done: Classified, most: float | None) -> None:
    """By all rows of the output, those of earlier runs too.

    Raises:
        UserError: more images than one, and a larger share of them than was asked for, are bad.
    """
    bad, images = done.errors + done.resumed_errors, done.images + done.resumed
    if most is not None and bad > max(1, most * images):
        raise UserError(f"{bad:,} of {images:,} images are bad, at most {most:.1%} may be")


@dataclass(frozen=True, kw_only=True)
class _Ray:
    """The options of Ray."""

    address: str | None
    actors: int | None
    shard_size: int


def _classify_on_ray(
    images: list[str],
    model: Path,
    output: str | None,
    how: _Ray,
    *,
    format: str | None,
    top: int,
    batch_size: int | None,
    resume: bool,
    overwrite: bool,
    count_kept: bool,
) -> Classified:
    """``classify`` on Ray Data; a Parquet file among the images is a listing, with a column ``path``."""
    from convscale.artifact.artifact import load_artifact
    from convscale.errors import naming_extras
    from convscale.ship.ray_engine import Cluster, classify_on_ray
    from convscale.ship.shards import listed
    from convscale.ship.stream import image_paths

    if output is None:
        raise UserError("--engine ray needs --output, a folder for the parts")
    with naming_extras("--engine ray"):
        import ray  # noqa: F401
    artifact, names = load_artifact(model), names_on_stdin()

    def every() -> Iterator[str]:
        for each in images:
            if each.endswith(".parquet"):
                yield from listed(each)
            elif "://" in each:
                yield each
            else:
                yield from image_paths([each], names)

    done = classify_on_ray(
        every(),
        artifact,
        output,
        cluster=Cluster(address=how.address, actors=how.actors, shard_size=how.shard_size),
        format=format or "jsonl",
        top=top,
        batch_size=batch_size,
        resume=resume,
        overwrite=overwrite,
        count_kept=count_kept,
    )
    kept = f", {done.resumed:,} done before" if done.resumed else ""
    say(_told(done, artifact, "cpu, Ray", batch_size) + kept, err=True)
    return done
