"""The commands about learning: train, evaluate, recipes. ``register`` puts them on the command line."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convscale import words
from convscale.aside import aside
from convscale.cli.detect import evaluate_boxes, train_boxes
from convscale.cli.live import Live
from convscale.cli.options import (
    Device,
    Epochs,
    Json,
    MaxBadRate,
    Model,
    Output,
    Overwrite,
    Resume,
    Seed,
    Sets,
    WordyCommand,
    keep_inputs,
    overrides_of,
    print_json,
    say,
)
from convscale.cli.speed_options import DetectorOptions, Head, Task, detector_head
from convscale.errors import UserError
from convscale.files import inside_fit, json_numbers
from convscale.networks.names import network_of

if TYPE_CHECKING:
    from convscale.learn.evaluate import Evaluation
    from convscale.learn.train import TrainRun

AnyData = Annotated[
    Path,
    typer.Option(
        "--data-dir",
        help="Folder of class folders, idx files, or a manifest; of a detector a set in COCO's, YOLO's or VOC's form.",
    ),
]
Dataset = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        help="torchvision's name of the set in --data-dir (cifar10, food101 ...), or coco, voc, nus-wide, open-images; "
        "else recognised.",
    ),
]
Workers = Annotated[
    int | None, typer.Option("-j", "--workers", help="Processes that decode files; one per core when left out.")
]
SPLITS = ("train", "validation", "test", "all")


def register(app: typer.Typer) -> None:
    """Put the commands on the app."""
    app.command("train", cls=WordyCommand)(train_command)
    app.command("evaluate")(evaluate_command)
    app.command("recipes")(recipes_command)


def train_command(
    data_dir: AnyData,
    output: Output,
    model: Model,
    task: Task = "classification",
    head: Head = None,
    detector: DetectorOptions = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            help="A named recipe (`convscale recipes`) or a YAML file; when left out a resumed run's own, else "
            "finetune with --init, small for images of up to 64 px, pictures for others, detect-small for boxes.",
        ),
    ] = None,
    epochs: Epochs = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option("-b", "--batch-size", help="Training batch, per process.")] = None,
    img_size: Annotated[
        str | None,
        typer.Option(
            "--img-size", help="Side in pixels, or height x width as in 192x160; the model's own when left out."
        ),
    ] = None,
    amp: Annotated[bool, typer.Option("--amp", help="Mixed precision: bf16; fp16 on a GPU without it.")] = False,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Channels-last layout.")] = False,
    schedule: Annotated[
        str | None, typer.Option("--schedule", help="onecycle, cosine, step, multistep, exponential, constant or wsd.")
    ] = None,
    decay_share: Annotated[
        float | None, typer.Option("--decay-share", help="With wsd: share of the run in which the rate decays.")
    ] = None,
    model_ema: Annotated[bool, typer.Option("--model-ema", help="Average the weights.")] = False,
    sets: Sets = None,
    init: Annotated[str | None, typer.Option("--init", help="'pretrained', or weights to start from.")] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher", help="Checkpoint, training folder, or name with weights, whose outputs are imitated."
        ),
    ] = None,
    teacher_cache: Annotated[
        Path | None, typer.Option("--teacher-cache", help="Folder where the teacher's outputs are kept for others.")
    ] = None,
    dataset: Dataset = None,
    workers: Workers = None,
    max_minutes: Annotated[float | None, typer.Option(help="The schedule ends by then.")] = None,
    keep: Annotated[int, typer.Option(help="Training states to keep, the best checkpoint apart.")] = 2,
    checkpoint_seconds: Annotated[float, typer.Option(help="Save at least this often, and after every epoch.")] = 300.0,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write for TensorBoard too.")] = False,
    branch: Annotated[
        Path | None,
        typer.Option("--branch", help="Decay (schedule wsd) from this training state of another run's stable phase."),
    ] = None,
    track: Annotated[str | None, typer.Option("--track", help="Tell mlflow, wandb or trackio of the run, too.")] = None,
    max_bad_rate: MaxBadRate = 0.01,
    device: Device = "cpu",
    seed: Seed = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train a model on labelled images, or a detector on images with boxes."""
    from convscale.images.sources import open_dataset
    from convscale.learn.progress import LiveProgress
    from convscale.learn.recipe import Recipe
    from convscale.learn.recipes import get_recipe
    from convscale.learn.train import train as train_net

    boxes_by, overrides = detector_head(task, head, detector), overrides_of(sets)
    keep_inputs(output, [model], data_dir, overwrite=overwrite, resume=resume)
    flags = {"lr": lr, "batch_size": batch_size, "image_size": img_size, "precision": "amp" if amp else None}
    flags |= {"layout": "nhwc" if channels_last else None, "ema_decay": 0.999 if model_ema else None}
    flags |= {"schedule": schedule, "decay_share": decay_share}
    stated = {key: value for key, value in {"epochs": epochs, **flags}.items() if value is not None}
    # Unknown keys and impossible values are told before anything is read, those of a key that a flag states too.
    told = {**stated, **overrides}
    overrides |= {key: value for key, value in stated.items() if key != "epochs"}
    (Recipe(name="given") if recipe is None else get_recipe(recipe)).override(told)
    common: dict[str, Any] = {
        "recipe": recipe,
        "epochs": overrides.pop("epochs", epochs),
        "output": output,
        "device": device,
        "seed": seed,
        "max_seconds": None if max_minutes is None else 60 * max_minutes,
        "init": init,
        "resume": resume,
        "overwrite": overwrite,
        "workers": workers,
        "checkpoint_seconds": checkpoint_seconds,
        "keep": keep,
        "tensorboard": tensorboard,
        "track": track,
        **overrides,
    }
    if boxes_by is not None:
        if any(given is not None for given in (teacher, teacher_cache, dataset, branch)):
            raise UserError(
                "--teacher, --teacher-cache, --dataset and --branch do not go with --task detection; leave them out"
            )
        run = train_boxes(model, data_dir, boxes_by, detector, max_bad_rate, common)
    else:
        net, splits = network_of(model), open_dataset(data_dir, dataset=dataset, max_bad_rate=max_bad_rate)
        with LiveProgress() as live:
            for note in splits.notes:
                live({"kind": "note", "text": note})
            asked = {"teacher": teacher, "teacher_cache": teacher_cache, "branch": branch}
            run = train_net(net, splits, progress=live, **asked, **common)
    with nullcontext() if run.finished else aside():  # what told it to stop may have ended who reads it too
        _tell_run(run, output, as_json)
    if not run.finished:
        say(f"told to stop; the state is in {output}, --resume goes on from there", err=True)
        raise typer.Exit(130)


def _tell_run(run: TrainRun, output: Path, as_json: bool) -> None:
    """What came of a training."""
    if not as_json:
        say(run.describe())
        return
    values = {
        "output": str(output),
        "best_metric": run.best_metric,
        "best_epoch": run.best_epoch,
        "finished": run.finished,
    }
    print_json(
        {
            **values,
            "seconds": run.seconds,
            "cost": vars(run.cost),
            "thresholds": _named(run.classes, run.thresholds),
            "temperatures": _named(run.classes, run.temperatures),
            "history": run.history,
        }
    )


def evaluate_command(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint, or folder of a training or fit.")],
    data_dir: AnyData,
    split: Annotated[
        str | None,
        typer.Option(
            help="train, validation, test, or all: every image; test, or the one split there is, when left out."
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "-b", "--batch-size", help="Images per call; 256, of a detector 16, of an artefact its own, when left out."
        ),
    ] = None,
    dataset: Dataset = None,
    workers: Workers = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="package.module:function that builds the network of a checkpoint of its."),
    ] = None,
    confusion: Annotated[
        bool,
        typer.Option(
            "--confusion", help="Print the confusion matrix (of one label per image): rows are true, columns predicted."
        ),
    ] = False,
    predictions: Annotated[
        bool,
        typer.Option("--predictions", help="Keep what it says of each image beside the run, for `report OLD NEW`."),
    ] = False,
    max_bad_rate: MaxBadRate = 0.01,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Evaluate a checkpoint on a split of the data: accuracy, per class, calibration, throughput; of a detector, or its
    artefact, mean average precision.
    """
    from convscale.images.sources import open_evaluation
    from convscale.learn.checkpoint import load_checkpoint, network_for
    from convscale.learn.evaluate import evaluate as evaluate_net
    from convscale.learn.loader import check_bad_rate, readable
    from convscale.show.predictions import FILE as PREDICTIONS
    from convscale.show.predictions import predictions_of

    if split is not None and split not in SPLITS:
        raise UserError(f"split {split!r} is unknown (known: {', '.join(SPLITS)})")
    of_classes = {"--predictions": predictions, "--confusion": confusion, "--dataset": dataset}
    lost = [flag for flag, given in of_classes.items() if given]
    judge_boxes = partial(
        evaluate_boxes,
        place=checkpoint,
        data_dir=data_dir,
        split=split,
        batch_size=batch_size,
        device=device,
        workers=workers,
        as_json=as_json,
        lost=lost,
        max_bad_rate=max_bad_rate,
    )
    if (checkpoint / "artifact.json").is_file():
        lost += ["--model"] if model is not None else []
        judge_boxes(None)
        return
    loaded = load_checkpoint(checkpoint, net=network_for(checkpoint, model))
    if hasattr(loaded.net, "detector_spec"):
        judge_boxes(loaded)
        return
    found = open_evaluation(
        data_dir,
        classes=loaded.classes,
        split=split,
        dataset=dataset,
        channels=loaded.preprocessing.channels,
        max_bad_rate=max_bad_rate,
        trained_on=loaded.meta.get("splits"),
    )
    if confusion and found.split.multilabel:
        raise UserError("--confusion is of one label per image, and these have several; leave it out")
    for note in found.notes:
        say(f"note: {note}", err=True)
    split_read, batch_size = found.split, 256 if batch_size is None else batch_size
    run = inside_fit(checkpoint, "train")
    if predictions:
        if found.split.split in ("train", "validation"):
            raise UserError(
                f"--predictions keeps what is said of the test set; the split that was read is {found.split.split}"
            )
        if not (run / "log.jsonl").is_file() or found.split.multilabel:
            raise UserError(
                f"--predictions keeps one label per image beside a training run; {checkpoint} is none, or has several"
            )
        split_read, bad = readable(found.split, loaded.preprocessing, max_bad_rate=max_bad_rate, workers=workers)
        for note in bad:
            say(f"left out: {note}", err=True)
    live = Live("images", len(split_read))
    ev = evaluate_net(
        loaded.net,
        split_read,
        loaded.preprocessing,
        batch_size=batch_size,
        device=device,
        workers=workers,
        train_labels=found.train_labels,
        on_images=live,
    )
    live.end()
    check_bad_rate(ev.bad, len(split_read), max_bad_rate, found.split.split)
    if predictions:
        predictions_of(ev, split_read, found.split).save(run / PREDICTIONS)
    thresholds = _named(loaded.classes, loaded.thresholds)
    if as_json:
        names = (
            "n",
            "loss",
            "top1",
            "top1_low",
            "top1_high",
            "top5",
            "baseline",
            "mean_average_precision",
            "calibration_error",
            "images_per_s",
            "bad",
        )
        values = {name: getattr(ev, name) for name in names} | {
            "per_class": list(ev.per_class),
            "confusion": ev.confusion.tolist(),
        }
        print_json(
            json_numbers({"split": found.split.split, "classes": list(ev.classes), **values, "thresholds": thresholds})
        )
        return
    top5 = "" if ev.top5 is None else f"top-5 {ev.top5:.2%}, "
    say(f"{found.split.split}: {ev.describe()}, {top5}loss {ev.loss:.4f}, calibration error {ev.calibration_error:.2%}")
    say(f"{ev.images_per_s:,.0f} images/s (whole evaluation, {device}, fp32, batch {batch_size})")
    for note in ev.bad:
        say(f"left out: {note}", err=True)
    multilabel = found.split.multilabel
    say(
        "average precision per class" + (", and the threshold set on validation" if thresholds else "")
        if multilabel
        else "right per class"
    )
    for name, share in zip(ev.classes, ev.per_class, strict=True):
        shown = "no image" if share != share else f"{share:.2%}"
        say(f"  {name:24} {shown}" + (f"  above {thresholds[name]:.3f}" if multilabel and thresholds else ""))
    if confusion:
        _print_confusion(ev)


def recipes_command(
    recipe: Annotated[
        str | None, typer.Argument(help="A named recipe or a YAML file, to print as YAML; all names when left out.")
    ] = None,
    sets: Sets = None,
    output: Annotated[Path | None, typer.Option("--output", help="Write the YAML to this file.")] = None,
    as_json: Json = False,
) -> None:
    """List training recipes with their sources, or print one."""
    from convscale.learn.recipes import get_recipe, list_recipes

    if recipe is None:
        if output is not None or sets:
            raise UserError(
                "--output and --set need a recipe: convscale recipes NAME --set lr=0.1 --output my-recipe.yaml"
            )
        found = [get_recipe(name) for name in list_recipes()]
        if as_json:
            print_json([{"name": each.name, "source": each.source} for each in found])
            return
        for each in found:
            say(f"{each.name:14} {each.source}")
        return
    chosen = get_recipe(recipe).override(overrides_of(sets))
    if output is not None:
        if output.exists():
            raise UserError(f"{output} exists already; name another file")
        chosen.save(output)
    print_json(chosen.to_dict()) if as_json else typer.echo(chosen.to_yaml().rstrip())


def _named(classes: tuple[str, ...], thresholds: tuple[float, ...] | None) -> dict[str, float] | None:
    return None if thresholds is None else dict(zip(classes, thresholds, strict=True))


def _print_confusion(ev: Evaluation) -> None:
    width = max(5, len(str(int(ev.confusion.max()))) + 1)
    typer.echo(" " * 26 + "".join(f"{column:>{width}}" for column in range(len(ev.classes))))
    for row, (name, counts) in enumerate(zip(ev.classes, ev.confusion.tolist(), strict=True)):
        typer.echo(f"  {row:3} {words.safe(name)[:18]:18}  " + "".join(f"{count:>{width}}" for count in counts))
