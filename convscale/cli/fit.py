"""The whole way on the command line: fit, and demo, a fit on an embedded default. ``register`` puts them there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from convscale import words
from convscale.cli.options import (
    Attention,
    Commercial,
    Confidence,
    DataDir,
    Epochs,
    ImgSize,
    Json,
    Licences,
    MaxBadRate,
    NoExtraData,
    Output,
    Overwrite,
    Resume,
    Seed,
    Sets,
    Threads,
    WordyCommand,
    Zoo,
    end_where_missed,
    keep_inputs,
    overrides_of,
    print_json,
    say,
)
from convscale.cli.speed_options import Device
from convscale.errors import UserError
from convscale.networks.names import spec_or_name

if TYPE_CHECKING:
    from convscale.pipeline.run import FitRun


def register(app: typer.Typer) -> None:
    """Put the commands on the app."""
    app.command("fit", cls=WordyCommand)(fit_command)
    app.command("demo")(demo_command)


def fit_command(
    data_dir: DataDir,
    output: Output,
    min_throughput: Annotated[
        float | None,
        typer.Option(
            "--min-throughput",
            help="Images/s that the shipped network must keep, model only. Without any limit on speed the knee of what "
            "the device can do is taken.",
        ),
    ] = None,
    max_latency: Annotated[
        float | None, typer.Option("--max-latency", help="Milliseconds that a call of the whole batch may take.")
    ] = None,
    max_memory: Annotated[
        float | None, typer.Option("--max-memory", help="2**30 bytes alive at once in a call, as counted.")
    ] = None,
    max_params: Annotated[float | None, typer.Option("--max-params", help="Millions of parameters.")] = None,
    confidence: Confidence = 0.8,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 2 where nothing keeps it, untrained, or what ships misses it.")
    ] = False,
    device: Device = "cpu",
    batch_size: Annotated[
        int | None,
        typer.Option(
            "-b",
            "--batch-size",
            help="Images per call; when left out 1 with --max-latency alone, else 8 here, 256 on a named GPU "
            "(processor: 1).",
        ),
    ] = None,
    img_size: ImgSize = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            "--runtime",
            help="onnxruntime or openvino (cuda: tensorrt), the fastest installed one when left out; on a named device "
            "what is predicted: eager, compiled (when left out), onnxruntime, or on a GPU tensorrt.",
        ),
    ] = None,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8",
            help="Ship 8 bits where that is faster and keeps the accuracy; on a named GPU with --runtime tensorrt or "
            "onnxruntime.",
        ),
    ] = False,
    qat: Annotated[
        bool, typer.Option("--qat", help="Fine-tune for 8 bits where they lose too much; `--int8 qat` says the same.")
    ] = False,
    max_drop: Annotated[
        float, typer.Option("--max-drop", help="Accuracy points that INT8 may lose on validation.")
    ] = 0.5,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Ship what computes in bfloat16 where that is faster, and agrees.")
    ] = False,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            help="On a named GPU: amp (fp16) when left out, fp32, bf16, fp16; on a processor fp32; with --int8 none.",
        ),
    ] = None,
    threads: Threads = None,
    candidates: Annotated[
        list[str] | None,
        typer.Option("--model", help="Choose among these names, patterns or spec files only. Repeatable."),
    ] = None,
    search: Annotated[
        float | None,
        typer.Option("--search", help="Minutes in which a network of your own is searched for first."),
    ] = None,
    space: Annotated[str | None, typer.Option("--space", help="With --search: see `convscale search`.")] = None,
    zoo: Zoo = "all",
    licences: Licences = None,
    commercial: Commercial = False,
    no_extra_data: NoExtraData = False,
    attention: Attention = False,
    measured: Annotated[
        Path | None,
        typer.Option("--measured", help="JSON lines measured on the named device, as a kit's measure.py writes them."),
    ] = None,
    scratch: Annotated[
        bool,
        typer.Option("--scratch", help="Scaled networks from scratch, instead of released weights."),
    ] = False,
    weights_dir: Annotated[
        Path | None,
        typer.Option("--weights-dir", help="Folder of released weights: files named by tag, or as in the hub's cache."),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option("--init", help="'pretrained': released weights for small images too; or weights of the --model."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="A named recipe or a YAML file; chosen by the data when left out.")
    ] = None,
    epochs: Epochs = None,
    brief_epochs: Annotated[
        int | None,
        typer.Option(help="Epochs of the comparison of finalists; left out: 1, if validation can tell them apart."),
    ] = None,
    max_minutes: Annotated[float | None, typer.Option(help="The full training ends by then.")] = None,
    sets: Sets = None,
    track: Annotated[
        str | None,
        typer.Option("--track", help="Tell mlflow, wandb or trackio of the winner's training and its result."),
    ] = None,
    max_bad_rate: MaxBadRate = 0.01,
    seed: Seed = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """The whole way: choose, train, export, check and report."""
    from convscale.learn.progress import LiveProgress
    from convscale.pipeline.run import fit as run_fit

    keep_inputs(output, [*(candidates or []), space], data_dir, overwrite=overwrite, resume=resume)
    with LiveProgress() as live:
        run = run_fit(
            data_dir,
            output=output,
            min_throughput=min_throughput,
            max_latency_ms=max_latency,
            max_memory_gb=max_memory,
            max_params_m=max_params,
            confidence=confidence,
            strict=strict,
            device=device,
            batch_size=batch_size,
            precision=precision,
            runtime=runtime,
            int8="qat" if qat else int8,
            max_drop=max_drop,
            bf16=bf16,
            threads=threads,
            image_size=img_size,
            candidates=[spec_or_name(name) for name in candidates] if candidates else None,
            search=search,
            space=space,
            zoo=zoo,
            licences=licences,
            commercial=commercial,
            extra_data=not no_extra_data,
            attention=attention,
            scratch=scratch,
            weights_dir=weights_dir,
            init=init,
            recipe=recipe,
            epochs=epochs,
            brief_epochs=brief_epochs,
            max_minutes=max_minutes,
            seed=seed,
            measured=measured,
            max_bad_rate=max_bad_rate,
            resume=resume,
            overwrite=overwrite,
            progress=live,
            track=track,
            overrides=overrides_of(sets),
        )
    _finish(run, as_json, strict=strict)


def demo_command(
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder to make; a new one under runs/ when left out.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="Fashion-MNIST's idx files; found or downloaded when left out.")
    ] = None,
    max_minutes: Annotated[float, typer.Option(help="The full training ends by then.")] = 4.0,
    as_json: Json = False,
) -> None:
    """Fit on Fashion-MNIST under a speed that this machine sets."""
    from convscale.learn.progress import LiveProgress
    from convscale.pipeline.demo import demo as run_demo

    with LiveProgress() as live:
        run = run_demo(output=output, data_dir=data_dir, max_minutes=max_minutes, progress=live)
    _finish(run, as_json)


def _finish(run: FitRun, as_json: bool, *, strict: bool = False) -> None:
    """Print the result; exit with 3 where the constraint is missed.

    Raises:
        UserError: it is missed, which ``strict`` refuses.
    """
    if as_json:
        keys = ("winner", "evaluation", "verification", "artifact", "timings", "constraint", "missed")
        record = run.record
        print_json({"output": str(run.output), "report": str(run.report), **{key: record.get(key) for key in keys}})
    else:
        result = run.result
        images = words.plural(result.evaluation.n or 0, "test image")
        several = result.evaluation.mean_average_precision is not None
        right = "mean average precision on" if several else "of"
        told, under = result.foretold, result.constraint.conditions
        speed = ""
        if result.artifact.measurement is None and told is not None and under is not None:
            speed = f"predicted {words.rate(told.images_per_s)} images/s on {under.device} ({under.runtime}); "
        say(
            f"{result.winner.name}: {words.percent(result.top1, 2)} {right} {images}"
            f"{'' if several else f' right{words.surely(result.evaluation.top1_interval)}'}; "
            f"{speed}artefact {run.output / 'artifact'}, report {run.report}"
        )
    if strict and run.missed:
        raise UserError(f"{run.missed}; --strict refuses it, the artefact stays in {run.output / 'artifact'}")
    end_where_missed(run.missed)
