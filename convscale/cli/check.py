"""The command `check`: what is odd about a data set, before anything is trained on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convscale.cli.options import Json, print_json, say


def register(app: typer.Typer) -> None:
    """Put the command on the app."""
    app.command("check")(check_command)


def check_command(
    data_dir: Annotated[Path, typer.Argument(help="Folder of class folders, idx files, or a manifest.")],
    img_size: Annotated[
        int | None,
        typer.Option("--img-size", help="The network's side in pixels: smaller images are counted."),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", help="torchvision's name of the set in DATA_DIR (cifar10 ...); else recognised."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Decode 5,000 images at most, instead of every one to list the bad ones.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check data before training: what is left out, bad files, duplicates across splits, tiny classes, small images."""
    from convscale.images.check import check_data
    from convscale.images.sources import open_dataset

    splits = open_dataset(data_dir, dataset=dataset, compare=False, listing=True)
    found = check_data(splits, img_size, every=not quick)
    if as_json:
        print_json({"classes": list(splits.classes), **found.to_dict()})
        return
    say(splits.describe())
    for note in found.notes:
        say(f"note: {note}")
    for warning in found.warnings:
        say(f"warning: {warning}")
    for problem in found.bad:
        say(f"bad: {problem}")
    if not found.warnings and not found.bad:
        say("nothing to warn about")
    say(found.describe_cost())
