"""The commands about learning: train, evaluate. ``register`` puts them on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convscale.cli_common import (
    Batch,
    DataDir,
    Device,
    Epochs,
    ImgSize,
    Json,
    Model,
    Output,
    Overwrite,
    RecipeOption,
    Resume,
    Seed,
    Sets,
    overrides_of,
    print_json,
    say,
    spec_of,
)
from convscale.errors import UserError


def register(app: typer.Typer) -> None:
    """Put the commands on the app."""
    app.command("train")(train_command)
    app.command("evaluate")(evaluate_command)


def train_command(
    data_dir: DataDir,
    output: Output,
    model: Model,
    recipe: RecipeOption = "small",
    epochs: Epochs = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option("-b", "--batch-size", help="Training batch.")] = None,
    img_size: ImgSize = None,
    amp: Annotated[bool, typer.Option("--amp", help="Mixed precision.")] = False,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Channels-last layout.")] = False,
    model_ema: Annotated[bool, typer.Option("--model-ema", help="Average the weights.")] = False,
    sets: Sets = None,
    init: Annotated[str | None, typer.Option("--init", help="'pretrained', or weights to start from.")] = None,
    device: Device = "cpu",
    seed: Seed = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train a model on labelled images."""
    from convscale.learn.progress import LiveProgress
    from convscale.learn.train import train as train_net

    overrides = overrides_of(sets)
    flags = {"lr": lr, "batch_size": batch_size, "image_size": img_size, "precision": "amp" if amp else None}
    flags |= {"layout": "nhwc" if channels_last else None, "ema_decay": 0.999 if model_ema else None}
    overrides |= {key: value for key, value in flags.items() if value is not None}
    with LiveProgress() as live:
        run = train_net(
            spec_of(model),
            data_dir,
            recipe=recipe,
            epochs=epochs,
            output=output,
            device=device,
            seed=seed,
            init=init,
            resume=resume,
            overwrite=overwrite,
            progress=live,
            **overrides,
        )
    if as_json:
        print_json({"output": str(output), "best_top1": run.best_top1, "best_epoch": run.best_epoch, "seconds": run.seconds, "history": run.history})
    else:
        say(run.describe())


def evaluate_command(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint or training folder.")],
    data_dir: DataDir,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    batch_size: Batch = 256,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Evaluate a checkpoint on a split of the data."""
    from convscale.images.sources import open_dataset
    from convscale.learn.checkpoint import load_checkpoint
    from convscale.learn.evaluate import evaluate as evaluate_net

    if split not in ("train", "validation", "test"):
        raise UserError(f"split {split!r} is unknown (known: train, validation, test)")
    loaded = load_checkpoint(checkpoint)
    splits = open_dataset(data_dir, channels=loaded.preprocessing.channels)
    if splits.classes != loaded.classes:
        raise UserError(f"the data's classes {list(splits.classes)} are not the checkpoint's {list(loaded.classes)}, in this order")
    ev = evaluate_net(loaded.net, getattr(splits, split), loaded.preprocessing, batch_size=batch_size, device=device)
    if as_json:
        names = ("n", "loss", "top1", "top1_low", "top1_high", "top5", "per_class", "calibration_error", "images_per_s")
        print_json({**{name: getattr(ev, name) for name in names}, "confusion": ev.confusion.tolist()})
        return
    say(f"{split}: top-1 {ev.top1:.2%} ({ev.top1_low:.2%} to {ev.top1_high:.2%}, 95 %), top-5 {ev.top5:.2%}, {ev.n:,} images")
    for name, share in zip(ev.classes, ev.per_class, strict=True):
        say(f"  {name:24} {share:.2%}")
