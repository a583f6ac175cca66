"""The command `explain`: pictures with what a network looks at."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from convscale.cli.live import Live, count_aside
from convscale.cli.options import Json, Output, Overwrite, names_on_stdin, print_json, say
from convscale.errors import UserError


def register(app: typer.Typer) -> None:
    """Put the command on the app."""
    app.command("explain")(explain_command)


def explain_command(
    images: Annotated[list[str], typer.Argument(help="Files, folders, patterns, or - for a list on standard input.")],
    model: Annotated[
        Path, typer.Option("--model", help="Artefact folder, checkpoint, or folder of a training or fit.")
    ],
    output: Output,
    method: Annotated[
        str | None,
        typer.Option("--method", help="cam, gradcam or occlusion; cam where it is exact, else occlusion, if left out."),
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", help="A class's name or number; each picture's likeliest if left out.")
    ] = None,
    batch_size: Annotated[int, typer.Option("-b", "--batch-size", help="Pictures held at once.")] = 16,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Draw where pictures speak for a class, one picture with its map each, and a row each in maps.jsonl."""
    from convscale.files import check_output_dir, new_output_dir, write_text
    from convscale.images.walk import Tally
    from convscale.locks import OutputLock
    from convscale.maps.files import Explainer, explain_files
    from convscale.ship.stream import image_paths

    left_out = Tally()
    paths = image_paths(images, names_on_stdin(), left_out)
    explainer = Explainer.open(model)
    explainer.number_of(target)
    inputs = [("model", model), *(("image", each) for each in images)]
    check_output_dir(output, overwrite=overwrite, inputs=inputs, ways=["--overwrite"])

    live = Live("pictures", None if "-" in images else count_aside(lambda: image_paths(images, None)))
    with OutputLock() as lock:
        lock.take(output)
        new_output_dir(output, overwrite=overwrite)
        lock.take(output)
        if lock.note:
            say(lock.note, err=True)
        rows = explain_files(
            explainer, paths, output, method=method, target=target, batch_size=batch_size, on_rows=live
        )
        lines = [{key: value for key, value in asdict(row).items() if value} for row in rows]
        write_text(output / "maps.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    live.end()
    for note in left_out.report().notes():
        say(note, err=True)
    bad = [row for row in rows if row.error]
    if as_json:
        print_json({"output": str(output), "maps": lines, "errors": len(bad)})
    else:
        for row in bad:
            say(f"left out: {row.path}: {row.error}", err=True)
        how = next((row.method for row in rows if row.method), "")
        say(f"{len(rows) - len(bad):,} maps{f' by {how}' if how else ''} in {output}, {len(bad):,} bad pictures")
    if rows and len(bad) == len(rows):
        raise UserError(f"none of {len(rows)} pictures can be read; first: {bad[0].path}: {bad[0].error}")
