"""The command line: one thin function per command.

Nothing heavy is imported before a command runs, so that ``--help`` answers at once. Bad input prints one line and exits with 2.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from convscale import __version__
from convscale.errors import UserError

app = typer.Typer(
    name="convscale",
    help="Pick, scale, train and ship image ConvNets by throughput.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Model = Annotated[str, typer.Option("--model", help="A model name (see `convscale list`), or a spec file.")]
DataDir = Annotated[Path, typer.Option("--data-dir", help="Folder of class folders, idx files, or a manifest.")]
ImgSize = Annotated[int | None, typer.Option("--img-size", help="Side in pixels; the model's own when left out.")]
Batch = Annotated[int, typer.Option("-b", "--batch-size", help="Images per call.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.")]
Precision = Annotated[str, typer.Option("--precision", help="fp32, amp, bf16, fp16 or int8.")]
Runtime = Annotated[str, typer.Option("--runtime", help="eager, compiled, compiled-frozen, onnxruntime or openvino.")]
Threads = Annotated[int | None, typer.Option("--threads", help="Compute threads; one per core when left out.")]
Output = Annotated[Path, typer.Option("--output", help="Folder to make.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on in the output folder.")]
RecipeOption = Annotated[str, typer.Option("--recipe", help="A named recipe or a YAML file.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Override a recipe key: --set lr=0.05. Repeatable.")]
Epochs = Annotated[int | None, typer.Option("--epochs", help="Instead of the recipe's.")]
Seed = Annotated[int, typer.Option("--seed", help="Of everything drawn.")]


def _say(text: str) -> None:
    typer.echo(text)


def _json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, default=str))


def _spec(name: str) -> Any:
    """A spec from a file's path or a name."""
    from convscale.arch.spec import load_spec
    from convscale.arch.zoo import get_spec

    return load_spec(name) if Path(name).suffix in (".json", ".yaml", ".yml") else get_spec(name)


def _overrides(pairs: list[str] | None) -> dict[str, Any]:
    out = {}
    for pair in pairs or []:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise UserError(f"--set takes key=value, got {pair!r}")
        out[key.strip()] = value.strip()
    return out


@app.command("list")
def list_command(
    pattern: Annotated[str, typer.Argument(help="Shell pattern, such as 'tresnet*'.")] = "*",
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Released weights instead of architectures.")] = False,
    as_json: Json = False,
) -> None:
    """List models, or released weights with their published accuracy."""
    from convscale.arch.zoo import get_tag, list_models

    names = list_models(pattern, pretrained=pretrained)
    if not names:
        raise UserError(f"no model matches {pattern!r}; `convscale list` shows all")
    if not pretrained:
        _json(names) if as_json else _say("\n".join(names))
        return
    rows = [
        {"name": name, "results": [{"image_size": r.image_size, "top1": r.top1, "source": r.source} for r in get_tag(name).results]} for name in names
    ]
    if as_json:
        _json(rows)
        return
    for row in rows:
        figures = ", ".join(f"{r['top1']:.2f} % @{r['image_size']}" for r in row["results"])
        _say(f"{row['name']:48} {figures or 'no published ImageNet-1k figure known'}")
    _say("ImageNet-1k top-1; recipes differ, so figures compare weights, not architectures. Source: timm's results table.")


@app.command()
def show(model: Annotated[str, typer.Argument(help="A model name or a spec file.")], as_json: Json = False) -> None:
    """Print a model's spec as YAML."""
    spec = _spec(model)
    _json(spec.to_dict()) if as_json else _say(f"# {spec!r}\n{spec.to_yaml()}".rstrip())


@app.command()
def scale(
    model: Annotated[str, typer.Argument(help="A model name or a spec file.")],
    phi: Annotated[float | None, typer.Option(help="Compound coefficient; negative scales down.")] = None,
    rule: Annotated[str, typer.Option(help="compound, fast, depth, width or resolution.")] = "compound",
    depth: Annotated[float | None, typer.Option(help="Multiplier of blocks.")] = None,
    width: Annotated[float | None, typer.Option(help="Multiplier of channels.")] = None,
    resolution: Annotated[float | None, typer.Option(help="Multiplier of the image's side.")] = None,
    img_size: ImgSize = None,
    divisor: Annotated[int | None, typer.Option(help="Widths become multiples of this.")] = None,
    output: Annotated[Path | None, typer.Option("--output", help="Write the spec to this .yaml or .json file.")] = None,
    as_json: Json = False,
) -> None:
    """Scale a model and print or save the new spec."""
    from convscale.arch.scale import scale as scale_spec
    from convscale.arch.spec import save_spec

    spec = scale_spec(_spec(model), phi=phi, rule=rule, depth=depth, width=width, resolution=resolution, image_size=img_size, divisor=divisor)
    if output is not None:
        save_spec(spec, output)
    if as_json:
        _json(spec.to_dict())
    else:
        _say(repr(spec))
        _say(f"written to {output}" if output else "--output FILE.yaml saves it; wherever a model name goes, the file goes too")


@app.command()
def count(models: Annotated[list[str], typer.Argument(help="Model names or spec files.")], img_size: ImgSize = None, as_json: Json = False) -> None:
    """Count parameters, multiply-accumulates, activations and bytes per image."""
    from convscale.speed.cost import count as count_cost

    rows = []
    for model in models:
        spec = _spec(model)
        cost = count_cost(spec, image_size=img_size)
        rows.append(
            {
                "name": spec.name,
                "image_size": img_size or spec.input.size,
                "params": cost.params,
                "macs": cost.macs,
                "activations": cost.activations,
                "read_bytes": cost.read_bytes,
                "written_bytes": cost.written_bytes,
            }
        )
    if as_json:
        _json(rows)
        return
    for row in rows:
        _say(
            f"{row['name']} at {row['image_size']} px: {row['params'] / 1e6:.2f} M parameters, {row['macs'] / 1e9:.3f} G multiply-accumulates, "
            f"{row['activations'] / 1e6:.2f} M activations, {row['read_bytes'] / 1e6:.1f} MB read and {row['written_bytes'] / 1e6:.1f} MB written "
            "(eager, fp32)"
        )


@app.command()
def measure(
    models: Annotated[list[str], typer.Argument(help="Model names, spec files or artefact folders.")],
    batch_size: Batch = 8,
    img_size: ImgSize = None,
    device: Device = "cpu",
    precision: Precision = "fp32",
    layout: Annotated[str, typer.Option(help="nchw or nhwc.")] = "nchw",
    runtime: Runtime = "onnxruntime",
    mode: Annotated[str, typer.Option(help="infer or train.")] = "infer",
    threads: Threads = None,
    protocol: Annotated[str | None, typer.Option(help="tresnet: at 90 % of the largest batch that fits.")] = None,
    seconds: Annotated[float, typer.Option(help="Timed seconds per model, at least.")] = 1.0,
    record: Annotated[Path | None, typer.Option("--record", help="Append the measurements to this JSON-lines file.")] = None,
    as_json: Json = False,
) -> None:
    """Measure throughput on this device, with its conditions and spread."""
    from convscale.ship.artifact import load_artifact
    from convscale.ship.measure import measure as measure_net
    from convscale.speed.conditions import Conditions
    from convscale.speed.records import append_record

    runtime = "eager" if mode == "train" and runtime == "onnxruntime" else runtime
    cond = Conditions(
        device=device, mode=mode, precision=precision, layout=layout, batch_size=batch_size, image_size=img_size, runtime=runtime, threads=threads
    )
    out = []
    for model in models:
        net = load_artifact(model, runtime=runtime, threads=threads) if Path(model).is_dir() else _spec(model)
        found = measure_net(net, cond, min_seconds=seconds, protocol=protocol)
        if record is not None:
            append_record(record, found)
        out.append(found)
        if not as_json:
            _say(f"{model}: {found}")
            for warning in (*found.warnings, *found.notes):
                _say(f"  note: {warning}")
    if as_json:
        _json([m.to_dict() for m in out])


@app.command()
def train(
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

    overrides = _overrides(sets)
    flags = {"lr": lr, "batch_size": batch_size, "image_size": img_size, "precision": "amp" if amp else None}
    flags |= {"layout": "nhwc" if channels_last else None, "ema_decay": 0.999 if model_ema else None}
    overrides |= {key: value for key, value in flags.items() if value is not None}
    with LiveProgress() as live:
        run = train_net(
            _spec(model),
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
        _json({"output": str(output), "best_top1": run.best_top1, "best_epoch": run.best_epoch, "seconds": run.seconds, "history": run.history})
    else:
        _say(run.describe())


@app.command()
def evaluate(
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
        _json({**{name: getattr(ev, name) for name in names}, "confusion": ev.confusion.tolist()})
        return
    _say(f"{split}: top-1 {ev.top1:.2%} ({ev.top1_low:.2%} to {ev.top1_high:.2%}, 95 %), top-5 {ev.top5:.2%}, {ev.n:,} images")
    for name, share in zip(ev.classes, ev.per_class, strict=True):
        _say(f"  {name:24} {share:.2%}")


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint or training folder.")],
    output: Output,
    format: Annotated[str, typer.Option("--format", help="onnx, openvino or torch.")] = "onnx",
    data_dir: Annotated[Path | None, typer.Option("--data-dir", help="Check it on this data's test set; on noise when left out.")] = None,
    img_size: ImgSize = None,
    half: Annotated[bool, typer.Option("--half", help="Store weights in half precision.")] = False,
    bake: Annotated[bool, typer.Option("--bake", help="Put preprocessing and softmax into the network.")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Export a checkpoint as an artefact, checked against it."""
    from dataclasses import replace

    from convscale.images.sources import open_dataset
    from convscale.learn.checkpoint import load_checkpoint
    from convscale.learn.loader import into_memory
    from convscale.ship.export import export as export_net

    loaded = load_checkpoint(checkpoint)
    preprocessing = replace(loaded.preprocessing, image_size=img_size) if img_size else loaded.preprocessing
    images = labels = None
    if data_dir is not None:
        held, _ = into_memory(open_dataset(data_dir, channels=preprocessing.channels).test, preprocessing)
        assert held.images is not None
        images, labels = held.images.numpy(), held.labels.numpy()
    artifact = export_net(
        loaded.net,
        output,
        format=format,
        classes=loaded.classes,
        preprocessing=preprocessing,
        bake=bake,
        half=half,
        verify_images=images,
        verify_labels=labels,
        overwrite=overwrite,
    )
    _json({"output": str(output), "verification": artifact.verification}) if as_json else _say(f"{artifact!r}")


@app.command()
def fit(
    data_dir: DataDir,
    min_throughput: Annotated[float, typer.Option("--min-throughput", help="Images/s that the shipped network must keep, model only.")],
    output: Output,
    device: Device = "cpu",
    batch_size: Batch = 8,
    img_size: ImgSize = None,
    runtime: Runtime = "onnxruntime",
    precision: Precision = "fp32",
    threads: Threads = None,
    candidates: Annotated[
        list[str] | None, typer.Option("--model", help="Choose among these names or spec files only. Repeatable; scaled families when left out.")
    ] = None,
    recipe: RecipeOption = "small",
    epochs: Epochs = None,
    brief_epochs: Annotated[int, typer.Option(help="Epochs of the comparison of finalists.")] = 1,
    max_minutes: Annotated[float | None, typer.Option(help="The full training ends by then.")] = None,
    sets: Sets = None,
    seed: Seed = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """The whole way: choose, train, export, check and report."""
    from convscale.learn.progress import LiveProgress
    from convscale.pipeline import fit as run_fit

    with LiveProgress() as live:
        run = run_fit(
            data_dir,
            min_throughput=min_throughput,
            output=output,
            device=device,
            batch_size=batch_size,
            precision=precision,
            runtime=runtime,
            threads=threads,
            image_size=img_size,
            candidates=[_spec(name) for name in candidates] if candidates else None,
            recipe=recipe,
            epochs=epochs,
            brief_epochs=brief_epochs,
            max_minutes=max_minutes,
            seed=seed,
            resume=resume,
            overwrite=overwrite,
            progress=live,
            overrides=_overrides(sets),
        )
    _finish(run, as_json)


@app.command()
def demo(
    output: Annotated[Path | None, typer.Option("--output", help="Folder to make; a new one under runs/ when left out.")] = None,
    data_dir: Annotated[Path | None, typer.Option("--data-dir", help="Fashion-MNIST's idx files; found or downloaded when left out.")] = None,
    max_minutes: Annotated[float, typer.Option(help="The full training ends by then.")] = 6.0,
    as_json: Json = False,
) -> None:
    """Fit on Fashion-MNIST under a speed that this machine sets."""
    from convscale.demo import demo as run_demo
    from convscale.learn.progress import LiveProgress

    with LiveProgress() as live:
        run = run_demo(output=output, data_dir=data_dir, max_minutes=max_minutes, progress=live)
    _finish(run, as_json)


def _finish(run: Any, as_json: bool) -> None:
    if as_json:
        keys = ("winner", "evaluation", "verification", "artifact", "timings", "constraint")
        _json({"output": str(run.output), "report": str(run.report), **{key: run.record[key] for key in keys}})
        return
    winner, ev = run.record["winner"], run.record["evaluation"]
    _say(f"{winner['name']}: {ev['top1']:.2%} on {ev['n']:,} test images; artefact {run.output / 'artifact'}, report {run.report}")


def _version(value: bool) -> None:
    if value:
        _say(f"convscale {__version__}")
        raise typer.Exit


@app.callback()
def _options(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    pass


def main() -> None:
    """Run the command line: exit code 0, 2 on bad input, 130 when interrupted."""
    try:
        app()
    except UserError as error:
        typer.echo(f"convscale: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("convscale: interrupted", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
