"""The command `search`: the best baseline of a space, or how to scale one. ``register`` puts it on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convscale import words
from convscale.cli.options import (
    Confidence,
    DataDir,
    ImgSize,
    Json,
    Output,
    Overwrite,
    Resume,
    Seed,
    Threads,
    WordyCommand,
    end_where_missed,
    keep_inputs,
    print_json,
    say,
)
from convscale.cli.speed_options import BatchOption, Compiled, Device, PrecisionOption, progress_aside
from convscale.cli.tables import Column, number_column, print_table
from convscale.errors import UserError
from convscale.networks.names import spec_of

if TYPE_CHECKING:
    from convscale.nas.result import Study


def register(app: typer.Typer) -> None:
    """Put the command on the app."""
    app.command("search", cls=WordyCommand)(search_command)


def search_command(
    data_dir: DataDir,
    output: Output,
    space: Annotated[
        str | None,
        typer.Option(
            "--space",
            help="mnasnet, tresnet, mobile, small, or a space's file; small for images of up to 64 px, else mobile.",
        ),
    ] = None,
    device: Device = "cpu",
    min_throughput: Annotated[
        float | None, typer.Option("--min-throughput", help="Images/s to keep, or the target of a soft --reward.")
    ] = None,
    trials: Annotated[int | None, typer.Option("--trials", help="Trained in all, earlier calls included.")] = None,
    minutes: Annotated[float | None, typer.Option("--minutes", help="Of this call.")] = None,
    reward: Annotated[
        str, typer.Option("--reward", help="hard (keep it), soft: accuracy x (cost / target)^w, or hard-like.")
    ] = "hard",
    reward_weight: Annotated[
        float | None, typer.Option("--reward-weight", help="w of the soft --reward; -0.07 when left out.")
    ] = None,
    reward_by: Annotated[
        str, typer.Option("--reward-by", help="throughput, or macs with --target-macs.")
    ] = "throughput",
    target_macs: Annotated[float | None, typer.Option("--target-macs", help="Millions per image.")] = None,
    scaling: Annotated[
        str | None,
        typer.Option("--scaling", help="Find how to scale this baseline (a name or a spec file), instead of one."),
    ] = None,
    budget: Annotated[float | None, typer.Option("--budget", help="With --scaling: times the cost; 2.")] = None,
    cost: Annotated[str | None, typer.Option("--cost", help="With --scaling: time (when left out) or macs.")] = None,
    method: Annotated[str, typer.Option("--method", help="With --scaling: grid or bayes.")] = "grid",
    engine: Annotated[str, typer.Option("--engine", help="local or ray.")] = "local",
    workers: Annotated[int, typer.Option("--workers", help="Trials at a time.")] = 1,
    address: Annotated[str | None, typer.Option("--address", help="Of a Ray cluster: host:port or auto.")] = None,
    sampler: Annotated[str, typer.Option("--sampler", help="guided, tpe, evolution or random.")] = "guided",
    zero_cost: Annotated[
        str,
        typer.Option("--zero-cost", help="Chooses trials: size, naswot, zico, zen or none."),
    ] = "size",
    inherit: Annotated[
        bool, typer.Option("--inherit", help="Begin with the weights of the nearest network that it can grow from.")
    ] = False,
    epochs: Annotated[int, typer.Option("--epochs", help="Of a trial.")] = 3,
    most_images: Annotated[int, typer.Option("--most-images", help="Of the train set in a trial.")] = 20_000,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Of the trials: a name or a YAML file; by the images when left out.")
    ] = None,
    batch_size: BatchOption = None,
    img_size: ImgSize = None,
    precision: PrecisionOption = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            "--runtime",
            help="eager, compiled, onnxruntime, openvino or tensorrt (on a GPU); when left out here the fastest, on a "
            "named GPU eager, on a named processor compiled.",
        ),
    ] = None,
    compiled: Compiled = False,
    threads: Threads = None,
    confidence: Confidence = 0.8,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", help="Predict by this file of `convscale calibrate`.")
    ] = None,
    training_device: Annotated[
        str | None, typer.Option("--training-device", help="Where trials are trained: cpu, cuda or cuda:N.")
    ] = None,
    seed: Seed = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Search a space for the most accurate baseline that keeps a speed, or how to scale one."""
    keep_inputs(output, [scaling], data_dir, overwrite=overwrite, resume=resume)
    shared: dict[str, Any] = {
        "device": device,
        "minutes": minutes,
        "trials": trials,
        "output": output,
        "engine": engine,
        "workers": workers,
        "address": address,
        "batch_size": batch_size,
        "precision": precision,
        "runtime": runtime,
        "compiled": compiled,
        "calibration": calibration,
        "image_size": img_size,
        "training_device": training_device,
        "recipe": recipe,
        "epochs": epochs,
        "most_images": most_images,
        "seed": seed,
        "resume": resume,
        "overwrite": overwrite,
        "say": progress_aside,
    }
    if scaling is not None:
        if min_throughput is not None or space is not None:
            raise UserError("--scaling takes a baseline and a --budget; leave out --space and --min-throughput")
        of_baselines = {"--sampler": sampler != "guided", "--zero-cost": zero_cost != "size", "--inherit": inherit}
        of_baselines |= {"--reward": reward != "hard", "--reward-by": reward_by != "throughput"}
        of_baselines |= {"--target-macs": target_macs is not None, "--confidence": confidence != 0.8}
        of_baselines |= {"--threads": threads is not None, "--reward-weight": reward_weight is not None}
        if lost := [flag for flag, given in of_baselines.items() if given]:
            raise UserError(f"{lost[0]} goes with a search for a baseline; leave it out with --scaling")
        shared["batch_size"] = 64 if batch_size is None else batch_size
        _scaling(scaling, data_dir, 2.0 if budget is None else budget, cost or "time", method, shared, as_json)
        return
    if budget is not None or cost is not None or method != "grid":
        raise UserError("--budget, --cost and --method are of --scaling; give the baseline to scale with it")
    if reward_weight is not None:
        if reward != "soft":
            raise UserError(f"--reward-weight is w of --reward soft, got --reward {reward}; leave it out, or say soft")
        shared["reward_weight"] = reward_weight
    from convscale.nas.study import search

    study = search(
        data_dir,
        space=space,
        min_throughput=min_throughput,
        reward=reward,
        reward_by=reward_by,
        target_macs_m=target_macs,
        sampler=sampler,
        zero_cost=None if zero_cost == "none" else zero_cost,
        confidence=confidence,
        threads=threads,
        inherit=inherit,
        **shared,
    )
    from convscale.show.search_report import write_search_report

    report = write_search_report(study.output)
    if as_json:
        print_json({**study.to_dict(), "report": str(report)})
    else:
        _print_front(study)
        say(str(study))
        say(f"{study.output / 'best.yaml'}: `convscale fit --model` takes it; report {report}")
    end_where_missed(study.missed)


def _scaling(
    model: str, data_dir: Path, budget: float, cost: str, method: str, shared: dict[str, Any], as_json: bool
) -> None:
    """How to scale a baseline."""
    from convscale.nas.coefficients import RULE, find_scaling

    rule = find_scaling(spec_of(model), data_dir, budget=budget, cost=cost, method=method, **shared)
    file = Path(shared["output"]) / RULE
    if as_json:
        print_json({**rule.to_dict(), "file": str(file)})
        return
    say(f"alpha {rule.alpha:.3f}, beta {rule.beta:.3f}, gamma {rule.gamma:.3f} ({rule.conditions})")
    for note in rule.notes:
        say(note, 2)
    say(f"written to {file}; `convscale scale {model} --phi 1 --rule {file}` scales by it")


def _print_front(study: Study) -> None:
    """Trained networks that no other beats in both accuracy and speed."""
    columns = [Column("network"), number_column("val top-1"), number_column("images/s"), number_column("params")]
    rows = [
        [
            trial.spec.name,
            words.percent(trial.accuracy, 2),
            words.rate(trial.images_per_s),
            words.large(trial.params),
            words.large(trial.macs),
        ]
        for trial in study.front
    ]
    print_table([*columns, number_column("MACs")], rows)
