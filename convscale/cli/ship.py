"""The commands about shipping: export and tune. ``register`` puts them on the command line."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convscale.cli.detect import export_boxes
from convscale.cli.live import Live
from convscale.cli.options import (
    Device,
    ImgSize,
    Json,
    MaxBadRate,
    Output,
    Overwrite,
    Threads,
    WordyCommand,
    overrides_of,
    print_json,
    refuse_lost,
    say,
)
from convscale.errors import UserError, check_text

if TYPE_CHECKING:
    from convscale.images.preprocess import Preprocessing
    from convscale.learn.checkpoint import Checkpoint
    from convscale.ship.tune import Trial, Tuning


def register(app: typer.Typer) -> None:
    """Put the commands on the app."""
    app.command("export", cls=WordyCommand)(export_command)
    app.command("tune")(tune_command)


def export_command(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Checkpoint, or folder of a training or fit; a file of weights of any trainer, with --model; or a "
            "name: with a tag (arch.tag) its released weights, else untrained. With --layout an artefact, too."
        ),
    ],
    output: Output,
    format: Annotated[
        str, typer.Option("--format", help="onnx, openvino, torch; or fastest: all are tried and tuned on this device.")
    ] = "onnx",
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="Check it on this data's test set; on noise when left out.")
    ] = None,
    max_bad_rate: MaxBadRate = 0.01,
    img_size: ImgSize = None,
    half: Annotated[bool, typer.Option("--half", help="Store weights in half precision.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Quantise to 8 bits; needs --data-dir for calibration.")] = False,
    qat: Annotated[
        bool,
        typer.Option("--qat", help="Where 8 bits lose too much, fine-tune for them first; `--int8 qat` says the same."),
    ] = False,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Compute in bfloat16; with --format fastest it competes.")
    ] = False,
    max_drop: Annotated[
        float, typer.Option("--max-drop", help="Accuracy points that INT8 may lose on validation.")
    ] = 0.5,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="package.module:function that builds the network of a checkpoint of its; or what network a file of "
            "weights is of.",
        ),
    ] = None,
    card: Annotated[
        list[str] | None,
        typer.Option("--card", help="A fact for the model card, as key=value: --card licence=CC-BY-4.0. Repeatable."),
    ] = None,
    bake: Annotated[bool, typer.Option("--bake", help="Put preprocessing and softmax into the network.")] = False,
    layout: Annotated[
        str | None,
        typer.Option(
            "--layout",
            help="triton, ovms or docker: --output becomes a folder that these load as it is, not an artefact.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="With --layout: the model's; its folder's when left out.")
    ] = None,
    with_features: Annotated[
        bool, typer.Option("--with-features", help="Keep the last feature map as an output, for `explain`.")
    ] = False,
    nms: Annotated[
        str | None,
        typer.Option(
            "--nms", help="Of a detector: non-maximum suppression inside the network (when left out), or outside."
        ),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="With --format fastest: cpu, cuda or cuda:N, where it is tuned.")
    ] = "cpu",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Export a checkpoint, or a network by its name, as an artefact, checked against it."""
    if name is not None and layout is None:
        raise UserError("--name goes with --layout; an artefact is called as its folder is")
    if max_bad_rate != 0.01 and data_dir is None:
        raise UserError("--max-bad-rate is of the images of --data-dir; give both, or neither")
    if max_drop != 0.5 and not int8 and not qat:
        raise UserError(f"--max-drop {max_drop:g} is what 8 bits may lose; give --int8 with it, or leave it out")
    if device != "cpu" and format != "fastest":
        raise UserError(
            f"--device {device} goes with --format fastest, which tunes there; `convscale tune` takes others"
        )
    from convscale.artifact.manifest import MANIFEST  # brings numpy, which help does without
    from convscale.files import check_outside, inside_fit

    shipped = inside_fit(Path(checkpoint), "artifact")
    if layout is not None and (shipped / MANIFEST).is_file():
        given = {"--int8": int8, "--qat": qat, "--bf16": bf16, "--half": half, "--bake": bake, "--model": model}
        given |= {"--with-features": with_features, "--data-dir": data_dir, "--img-size": img_size, "--card": card}
        given |= {"--device": device != "cpu", "--nms": nms, "--format": format != "onnx"}
        what = "an artefact" if shipped == Path(checkpoint) else f"what fit shipped, {shipped},"
        refuse_lost(given, f"is for a checkpoint; {what} is laid out as it is")
        _lay_out(shipped, layout, output, name, overwrite=overwrite, as_json=as_json)
        return
    if layout is not None:
        name = name or output.resolve().name
        _check_layout(layout, format, output, name, overwrite=overwrite)
    if (qat or int8) and data_dir is None:
        raise UserError("--int8 needs --data-dir: its training images calibrate the artefact, others check it")
    if device != "cpu":
        from convscale.ship.request import need_device

        need_device(device)  # before images are read
    if overwrite:
        check_outside(output, [("checkpoint", checkpoint), ("data", data_dir)])
    loaded = _to_export(checkpoint, model)
    if nms is not None and not hasattr(loaded.net, "detector_spec"):
        raise UserError(f"--nms {nms} is for detectors, and this is a classifier; leave --nms out")
    # With a layout the artefact is the same, whatever is asked of it; it only lies elsewhere.
    write = partial(
        _export,
        loaded,
        data_dir=data_dir,
        max_bad_rate=max_bad_rate,
        format=format,
        img_size=img_size,
        half=half,
        int8=int8,
        qat=qat,
        bf16=bf16,
        max_drop=max_drop,
        card=card,
        bake=bake,
        with_features=with_features,
        nms=nms or "inside",
        device=device,
    )
    if layout is None:
        write(output, overwrite=overwrite, as_json=as_json)
        return
    if hasattr(loaded.net, "detector_spec"):
        raise UserError("--layout takes classifiers, and this is a detector; leave --layout out")
    with TemporaryDirectory() as aside:
        with redirect_stdout(sys.stderr):
            write(Path(aside) / "artifact", overwrite=False, as_json=False)
        _lay_out(Path(aside) / "artifact", layout, output, name, overwrite=overwrite, as_json=as_json)


def _export(
    loaded: Checkpoint,
    output: Path,
    *,
    data_dir: Path | None,
    max_bad_rate: float,
    format: str,
    img_size: int | None,
    half: bool,
    int8: bool,
    qat: bool,
    bf16: bool,
    max_drop: float,
    card: list[str] | None,
    bake: bool,
    with_features: bool,
    nms: str,
    device: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """A checkpoint as an artefact, as the options of ``export`` ask for it."""
    from dataclasses import replace

    from convscale.ship.export import export
    from convscale.ship.forms import export_fastest

    eight: bool | str = "qat" if qat else int8
    if hasattr(loaded.net, "detector_spec"):
        if format == "fastest" or img_size is not None:
            raise UserError("--format fastest and --img-size are not for detectors; name a format")
        if bf16 or qat or with_features:
            raise UserError("--bf16, --qat and --with-features are not for detectors; leave them out")
        facts = _card(loaded, data_dir, card)
        form = {"format": format, "half": half, "int8": int8, "bake": bake, "nms": nms, "max_drop": max_drop}
        form |= {"overwrite": overwrite}
        export_boxes(loaded, output, data_dir, facts, form, as_json, max_bad_rate=max_bad_rate)
        return
    preprocessing = replace(loaded.preprocessing, image_size=img_size) if img_size else loaded.preprocessing
    images: dict[str, Any] = {}
    if data_dir is not None:
        images = _check_images(data_dir, loaded, preprocessing, eight, max_bad_rate)
    options: dict[str, Any] = {
        "classes": loaded.classes,
        "preprocessing": preprocessing,
        "bake": bake,
        "max_drop": max_drop,
        "thresholds": loaded.thresholds,
        "temperatures": loaded.temperatures,
        "overwrite": overwrite,
        "card": _card(loaded, data_dir, card),
        **images,
    }
    search = None
    if format == "fastest":
        if with_features:
            raise UserError("--with-features does not go with --format fastest; name a format")
        if half:
            raise UserError("--half does not go with --format fastest; name a format")
        artifact, search = export_fastest(
            loaded.net,
            output,
            int8=eight,
            bf16=bf16,
            device=device,
            on_form=None if as_json else _tell_form,
            **options,
        )
    else:
        artifact = export(
            loaded.net,
            output,
            format=format,
            half=half,
            bf16=bf16,
            int8=eight,
            with_features=with_features,
            **options,
        )
    say(f"exported {loaded.state}", err=as_json)
    if as_json:
        print_json(
            {
                "output": str(output),
                "verification": artifact.verification,
                "search": None if search is None else search.to_dict(),
            }
        )
        return
    if search is not None:
        say(f"fastest: {search.winner}, {search.gain:.2f} times as fast as the float ONNX form in its usual settings")
    checked = artifact.verification or {}
    say(f"{output}: {artifact.format} {artifact.precision}, {len(artifact.classes)} classes, {artifact.image_size} px")
    say(
        f"agrees with the trained network on {checked['top1_agreement']:.2%} of {checked['n']:,} images "
        f"({checked['images']})"
    )
    if steps := artifact.manifest.get("int8", {}).get("steps"):
        kept = steps[-1]["float_layers"]
        say(
            f"8 bits cost {steps[-1]['drop_points']:.2f} points; {len(kept)} of {artifact.manifest['int8']['layers']} "
            "layers stay in float"
        )
        say(f"  {', '.join(kept)}") if kept else None


def _check_layout(layout: str, format: str, output: Path, name: str, *, overwrite: bool) -> None:
    """Before a network is exported for it."""
    from convscale.artifact.naming import check_model_name
    from convscale.ship.layouts import LAYOUTS, check_folder

    check_text("layout", layout, LAYOUTS)
    if format == "torch":
        raise UserError(f"--layout {layout} needs an ONNX or OpenVINO form; give --format onnx or openvino, not torch")
    check_model_name(name)
    check_folder(output, overwrite=overwrite)


def _lay_out(artifact: Path, layout: str, output: Path, name: str | None, *, overwrite: bool, as_json: bool) -> None:
    """An artefact as a server wants it."""
    from dataclasses import asdict

    from convscale.artifact.artifact import load_artifact
    from convscale.ship.layouts import write_layout
    from convscale.ship.repository import label_of

    laid = write_layout(load_artifact(artifact), layout, output, name=name, overwrite=overwrite)
    for note in laid.notes:
        say(f"note: {note}", err=True)
    if as_json:
        print_json(asdict(laid))
        return
    say(f"{laid.folder}: {layout}, model {laid.name}; its files say the same in {' and '.join(laid.checked)}")
    how = {
        "triton": f"tritonserver --model-repository={laid.folder}",
        "ovms": f"docker run -v {laid.folder.resolve()}:/models -p 8000:8000 openvino/model_server "
        "--config_path /models/config.json --rest_port 8000",
        "docker": f"docker build -t {label_of(laid.name)} {laid.folder}",
    }
    say(how[layout])


def _to_export(what: str, model: str | None) -> Checkpoint:
    """A checkpoint, or a network by its name as if it came from one."""
    from convscale.arch.tags import find_tag
    from convscale.learn.checkpoint import Checkpoint, load_checkpoint, network_for
    from convscale.learn.weights_file import NUMBERED, open_weights
    from convscale.networks.foreign import Foreign
    from convscale.networks.names import is_spec_file, network_of

    if Path(what).is_file() and not is_spec_file(what):
        loaded, notes = open_weights(Path(what), model)
        for note in notes:
            say(f"note: {note}", err=True)
        return loaded
    is_place = (Path(what).exists() or "/" in what.removeprefix("timm/")) and not is_spec_file(what)
    if is_place or model is not None:
        return load_checkpoint(what, net=network_for(what, model))
    from convscale.networks.pictures import preprocessing_of
    from convscale.networks.resolve import as_module

    named = network_of(what)  # a spec's file, too
    net, name = as_module(named if is_spec_file(what) else what)
    classes = getattr(net, "num_classes", None)
    if not isinstance(classes, int) or classes < 1:
        raise UserError(f"{name} does not say its number of classes; give a module with num_classes")
    timms = isinstance(named, Foreign) and named.origin == "timm" and "." in named.name
    released = not is_spec_file(what) and (timms or find_tag(what) is not None)
    meta = {"untrained": f"{name}, " + ("its released weights" if released else "untrained"), NUMBERED: True}
    names = tuple(str(number) for number in range(classes))
    return Checkpoint(net=net.eval(), classes=names, preprocessing=preprocessing_of(net), meta=meta, path=Path(name))


def _card(loaded: Checkpoint, data_dir: Path | None, given: list[str] | None) -> dict[str, str]:
    """Facts for the model card: what the checkpoint says of itself, and over it what was given as key=value."""
    from convscale.learn.record import reached

    facts = {
        "recipe": str((loaded.meta.get("recipe") or {}).get("name") or ""),
        "data": "" if data_dir is None else data_dir.name,
    }
    if (found := reached(loaded.meta, loaded.path.name)) is not None:
        metric, epoch = found
        facts["accuracy"] = f"{metric:.2%} on validation, in epoch {epoch}"
    facts |= {key: str(value) for key, value in overrides_of(given, flag="--card").items()}
    return {key: value for key, value in facts.items() if value}


def _tell_form(name: str, result: Tuning | UserError) -> None:
    """One form's outcome, on standard error."""
    if isinstance(result, UserError):
        checked = getattr(result, "verification", None)
        say(f"{name}: {'withheld: ' + checked.reason if checked is not None else result}", err=True)
        return
    s = result.best.settings
    say(
        f"{name}: {result.best.images_per_s:,.1f} images/s ({s.runtime}, {s.streams} streams, batch {s.batch_size})",
        err=True,
    )


def _check_images(
    data_dir: Path, loaded: Checkpoint, preprocessing: Preprocessing, int8: bool | str, max_bad_rate: float = 0.01
) -> dict[str, Any]:
    """Images for the gate with the names of their classes, and for INT8 those that calibrate: INT8 is judged on
    validation, since layers are chosen by it.
    """
    import numpy as np

    from convscale.images.sources import not_as_trained, open_dataset
    from convscale.learn.loader import EvalImages, readable
    from convscale.learn.weights_file import names_of
    from convscale.ship.qat import MOST_IMAGES
    from convscale.ship.quantize import CALIBRATION, spread

    splits = open_dataset(data_dir, channels=preprocessing.channels, max_bad_rate=max_bad_rate)
    classes, note = names_of(loaded, splits.classes)
    if note:
        say(f"note: {note}", err=True)
    chosen = splits.validation if int8 else splits.test
    for note in not_as_trained(splits, loaded.meta.get("splits"), chosen.split):
        say(f"note: {note}", err=True)
    checks, bad = readable(chosen, preprocessing, max_bad_rate=splits.max_bad_rate)
    for problem in bad:
        say(f"left out: {problem}", err=True)
    live = Live("images compared", len(checks))  # of one pass: how many layers stay in float says how many there are
    out: dict[str, Any] = {"verify_images": EvalImages(checks, preprocessing, on_images=live)}
    out |= {"verify_labels": checks.labels.numpy(), "classes": classes}
    if int8:
        most = MOST_IMAGES if int8 == "qat" else CALIBRATION
        chosen = splits.train.subset(spread(len(splits.train), most).tolist())
        some, _ = readable(chosen, preprocessing, max_bad_rate=splits.max_bad_rate)
        out["calibration_images"] = np.concatenate(list(EvalImages(some, preprocessing)))
    return out


def tune_command(
    artifact: Annotated[Path, typer.Argument(help="Artefact folder.")],
    goal: Annotated[str, typer.Option(help="throughput or latency.")] = "throughput",
    batch_size: Annotated[
        list[int] | None,
        typer.Option("-b", "--batch-size", help="A batch to try for throughput; of latency it is 1. Repeatable."),
    ] = None,
    threads: Threads = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Find an artefact's fastest runtime settings on this device and keep them in it."""
    from convscale.artifact.artifact import load_artifact
    from convscale.ship.tune import BATCH_SIZES, tune

    def tell(trial: Trial) -> None:
        if not as_json:
            s = trial.settings
            say(
                f"{s.runtime}, {s.threads} threads, {s.streams} streams, batch {s.batch_size}: "
                f"{trial.images_per_s:,.1f} images/s",
                err=True,
            )

    if goal == "latency" and set(batch_size or ()) - {1}:
        raise UserError(f"--goal latency is of one image a call, got -b {max(batch_size or ())}; leave -b out")
    found = tune(
        load_artifact(artifact, device=device),
        goal=goal,
        batch_sizes=batch_size or BATCH_SIZES,
        threads=threads,
        on_trial=tell,
    )
    if as_json:
        print_json(found.to_dict())
        return
    best = found.best
    s = best.settings
    say(f"best for {goal}: {s.runtime}, {s.threads} threads, {s.streams} streams, batch {s.batch_size}")
    say(
        f"{best.images_per_s:,.1f} images/s, {1000 * best.latency_s:.1f} ms a call; {found.gain:.2f} times the usual "
        f"settings; kept in {artifact}"
    )
