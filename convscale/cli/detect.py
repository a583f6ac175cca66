"""What the commands do for detectors: train, evaluate, export, classify."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convscale import words
from convscale.cli.choice_text import in_words
from convscale.cli.live import Live
from convscale.cli.options import overrides_of, print_json, say
from convscale.cli.tables import Column, number_column, print_table
from convscale.errors import UserError, check_number
from convscale.files import check_new_file, json_numbers

if TYPE_CHECKING:
    from convscale.artifact.artifact import Artifact
    from convscale.choice.basis import Basis
    from convscale.choice.choose import CommonOptions
    from convscale.conditions import Conditions
    from convscale.detect.boxes import BoxSplits
    from convscale.learn.checkpoint import Checkpoint
    from convscale.learn.train import TrainRun
    from convscale.nn.detectors import Detector

_CLASSES = 20
"""Of a detector that is timed untrained, where nothing is said: VOC's."""
_WHOLE = ("neck_width", "head_depth", "frozen_stages", "max_detections")
_NUMBERS = ("anchor_scale", "score_threshold", "nms_threshold")


def detector_options(pairs: list[str] | None, *, timed: bool = False) -> dict[str, Any]:
    """``--detector key=value`` as options of ``create_detector``; of one that is timed ``num_classes`` too, which data
    say to all others.

    Raises:
        UserError: an unknown key, or a value of another kind.
    """
    options: dict[str, Any] = {"num_classes": _CLASSES} if timed else {}
    whole = (*_WHOLE, "num_classes") if timed else _WHOLE
    for key, text in overrides_of(pairs, flag="--detector").items():
        if key == "norm":
            options[key] = text
            continue
        if key == "num_classes" and not timed:
            raise UserError("--detector num_classes is for a detector that is timed; the data say how many there are")
        if key not in (*whole, *_NUMBERS):
            raise UserError(f"--detector {key} is unknown (known: {', '.join((*whole, *_NUMBERS, 'norm'))})")
        try:
            options[key] = int(text) if key in whole else float(text)
        except ValueError:
            kind = "a whole number" if key in whole else "a number"
            raise UserError(f"--detector {key} is {text!r}; it must be {kind}") from None
    return options


def train_boxes(
    model: str, data_dir: Path, head: str, pairs: list[str] | None, max_bad_rate: float, common: dict[str, Any]
) -> TrainRun:
    """``train --task detection``."""
    from convscale.detect.data import open_boxes
    from convscale.detect.train import train_detector
    from convscale.learn.progress import LiveProgress
    from convscale.networks.names import is_spec_file, network_of

    options = detector_options(pairs)
    if "head" in common:
        raise UserError(
            f"--set head={common['head']} puts a head on a classifier; a detector's is chosen by --head (--head {head})"
        )
    named: Any = network_of(model) if is_spec_file(model) else model
    splits = open_boxes(data_dir, max_bad_rate=max_bad_rate)
    asked = common.pop("image_size", None)
    image_size: Any = int(asked) if isinstance(asked, str) and asked.isdecimal() else asked
    with LiveProgress() as live:
        for note in (splits.describe(), *splits.notes):
            live({"kind": "note", "text": note})
        return train_detector(
            named, splits, head=head, detector=options, image_size=image_size, progress=live, **common
        )


def evaluate_boxes(
    loaded: Checkpoint | None,
    place: Path,
    data_dir: Path,
    split: str | None,
    batch_size: int | None,
    device: str,
    workers: int | None,
    as_json: bool,
    lost: list[str],
    *,
    max_bad_rate: float = 0.01,
) -> None:
    """``evaluate`` on a detector's checkpoint, or on its artefact; the options in ``lost`` are not for these."""
    from convscale.artifact.artifact import load_artifact
    from convscale.detect.data import open_boxes
    from convscale.detect.evaluate import BATCH, evaluate_detector
    from convscale.ship.box_metrics import need_coco

    need_coco()  # before pictures are looked at
    if split == "all":
        raise UserError("split 'all' is not for detectors (known: train, validation, test)")
    net: Any = load_artifact(place, device=device) if loaded is None else loaded.net
    classes = net.classes if loaded is None else loaded.classes
    if loaded is None and not net.is_detector:
        raise UserError(f"{place} is a classifier's artefact; evaluate its checkpoint instead")
    if lost:
        what = "an artefact, which has its network" if lost[0] == "--model" else "detectors, whose measure is mAP"
        raise UserError(f"{lost[0]} is not for {what}; leave it out")
    splits = open_boxes(data_dir, classes=classes, max_bad_rate=max_bad_rate)
    looked_at = split or "test"
    for note in (*splits.notes, *_not_as_trained(splits, loaded, looked_at)):
        say(f"note: {note}", err=True)
    live = Live("pictures", len(getattr(splits, looked_at)))
    ev = evaluate_detector(
        net,
        splits,
        split=looked_at,
        batch_size=batch_size,
        device=device,
        workers=workers,
        on_images=live,
    )
    live.end()
    if as_json:
        print_json(json_numbers(ev.to_dict()))
        return
    say(f"{ev.split}: {ev.describe()}")
    sizes = (("small", ev.map_small), ("medium", ev.map_medium), ("large", ev.map_large))
    say("mAP by size: " + ", ".join(f"{name} {_share(value)}" for name, value in sizes))
    if loaded is None:
        under = f"{net.device}, {net.runtime}, {net.precision}, batch {batch_size or net.batch_size}"
    else:
        under = f"{device}, fp32, batch {batch_size or BATCH}"
    say(f"{ev.images_per_s:,.1f} images/s (whole evaluation, {under})")
    for note in ev.bad:
        say(f"left out: {note}", err=True)
    say("mAP and AP50 per class")
    for name, value, at50 in zip(ev.classes, ev.per_class, ev.per_class_50, strict=True):
        say(f"  {name:24} {_share(value):>9} {_share(at50):>9}")


def _not_as_trained(splits: BoxSplits, loaded: Checkpoint | None, split: str) -> list[str]:
    """A note where another set is carved than the one of a checkpoint's training; an artefact does not say its own."""
    from convscale.images.sources import not_as_trained

    if loaded is None:
        return []
    return not_as_trained(splits, loaded.meta.get("splits"), split, loaded.meta.get("data_digest"))


def _share(value: float) -> str:
    return "no box" if value != value else f"{value:.2%}"


def export_boxes(
    loaded: Checkpoint,
    output: Path,
    data_dir: Path | None,
    facts: dict[str, str],
    form: dict[str, Any],
    as_json: bool,
    *,
    max_bad_rate: float = 0.01,
) -> None:
    """``export`` of a detector."""
    from convscale.detect.data import open_boxes
    from convscale.detect.ship import for_int8, squares
    from convscale.images.letterbox import fill_of
    from convscale.ship.box_metrics import need_coco
    from convscale.ship.detectors import describe
    from convscale.ship.export import export
    from convscale.ship.quantize import CALIBRATION

    options: dict[str, Any] = {"classes": loaded.classes, "card": facts, **form}
    if data_dir is not None:
        need_coco()  # before pictures are looked at
        splits = open_boxes(data_dir, classes=loaded.classes, max_bad_rate=max_bad_rate)
        side, fill = loaded.preprocessing.width, fill_of(loaded.preprocessing.mean)
        known, checked, notes = for_int8(splits) if form["int8"] else (splits.train, splits.test, ())
        for note in (*notes, *_not_as_trained(splits, loaded, checked.split)):
            say(f"note: {note}", err=True)
        options["verify_images"], options["verify_labels"] = squares(
            checked,
            side,
            fill,
            max_bad_rate=max_bad_rate,
            tell=lambda problem: say(f"left out: {problem}", err=True),
        )
        if form["int8"]:
            options["calibration_images"], _ = squares(known, side, fill, most=CALIBRATION, max_bad_rate=max_bad_rate)
    artifact = export(loaded.net, output, **options)
    say(f"exported {loaded.state}", err=as_json)
    verification = artifact.verification or {}
    if as_json:
        print_json({"output": str(output), "verification": verification, "int8": artifact.manifest.get("int8")})
        return
    assert artifact.cut is not None, "a detector's artefact has a cut"
    say(
        f"{output}: {artifact.format} {artifact.precision}, {len(artifact.classes)} classes, {artifact.image_size} px, "
        f"non-maximum suppression {artifact.cut.nms}"
    )
    say(describe(verification))
    if steps := artifact.manifest.get("int8", {}).get("steps"):
        kept = steps[-1]["float_layers"]
        say(f"8 bits cost {steps[-1]['drop_points']:.2f} points; {len(kept)} layers stay in float")


def check_box_outputs(
    artifact: Artifact,
    output: Path | None,
    coco: Path | None,
    draw: Path | None,
    min_score: float,
    *,
    resume: bool,
    overwrite: bool,
) -> int:
    """The time, in nanoseconds since 1970, from which on drawings can be of the rows that a run will have: with
    ``resume`` that of the rows that are there, since nothing is drawn before all are.

    Raises:
        UserError: results or drawings are asked for that can not be made.
    """
    check_number("--min-score", min_score, "a score from 0 to 1", 0, 1)
    if coco is None and draw is None:
        return 0
    if not artifact.is_detector:
        raise UserError("--coco and --draw are for detectors; this artefact is a classifier's")
    if output is None:
        raise UserError("--coco and --draw are made from the rows; name a file for those (--output boxes.jsonl)")
    if coco is not None and coco.is_dir():
        raise UserError(f"--coco {coco} is a folder; name a file")
    if coco is not None:
        check_new_file(coco, overwrite=resume or overwrite, what="--coco")
    if draw is not None and draw.exists() and not draw.is_dir():
        raise UserError(f"--draw {draw} is a file; name a folder")
    if draw is not None and draw.is_dir() and any(draw.iterdir()) and not (resume or overwrite):
        raise UserError(f"--draw {draw} exists and is not empty; use --resume, --overwrite or another name")
    return output.stat().st_mtime_ns if resume and output.is_file() else time.time_ns()


def write_box_outputs(
    artifact: Artifact, output: Path, coco: Path | None, draw: Path | None, min_score: float, *, since_ns: int
) -> None:
    """COCO's results and drawings of a finished run; drawings from before ``since_ns`` are made again."""
    from convscale.ship.box_outputs import draw_results, write_coco_results

    if coco is not None:
        count = write_coco_results(output, coco, artifact.classes, artifact.manifest.category_ids)
        say(f"{count:,} boxes in {coco}", err=True)
    if draw is not None:
        count = draw_results(output, draw, artifact.classes, min_score=min_score, since_ns=since_ns)
        say(f"{count:,} images drawn into {draw}", err=True)


# ---------------------------------------------------------------- speed


def _timed(model: str, head: str | None, img_size: int | None, pairs: list[str] | None) -> Detector:
    """The detector that a name or a checkpoint's folder stands for, to be timed."""
    from convscale.learn.checkpoint import load_checkpoint
    from convscale.networks.detectors import create_detector
    from convscale.networks.names import is_spec_file, network_of
    from convscale.nn.detectors import Detector

    if Path(model).is_dir():
        net = load_checkpoint(model).net
        if not isinstance(net, Detector):
            raise UserError(f"{model} is no detector's checkpoint; leave out --task detection")
        asked = {"--head": head, "--img-size": img_size, "--detector": pairs}
        if lost := [name for name, value in asked.items() if value]:
            raise UserError(f"{lost[0]} is for networks by name; {model} is a trained detector, which has its own")
        return net
    named: Any = network_of(model) if is_spec_file(model) else model
    return create_detector(named, head or "fcos", image_size=img_size, **detector_options(pairs, timed=True)).eval()


def measure_boxes(
    models: list[str],
    head: str | None,
    img_size: int | None,
    pairs: list[str] | None,
    cond: Conditions,
    seconds: float,
    as_json: bool,
) -> None:
    """``measure --task detection``."""
    from convscale.choice.detector_speed import measure_detector

    done, classes = [], list[int]()
    for model in models:
        detector = _timed(model, head, img_size, pairs)
        classes.append(detector.num_classes)
        done.append(measure_detector(detector, cond, min_seconds=seconds, max_seconds=max(10.0, 10 * seconds)))
        if not as_json:
            say(f"{done[-1].whole}; {words.plural(classes[-1], 'class', 'classes')}")
            for warning in (*done[-1].whole.warnings, *done[-1].whole.notes):
                say(f"note: {warning}", 2)
    if as_json:
        print_json([{**each.to_dict(), "num_classes": number} for each, number in zip(done, classes, strict=True)])
        return
    _print_parts([(each.whole.model, each.whole.images_per_s, each.parts_s) for each in done])


def predict_boxes(
    models: list[str], head: str | None, img_size: int | None, pairs: list[str] | None, basis: Basis, as_json: bool
) -> None:
    """``predict --task detection``."""
    from convscale.choice.detector_speed import predict_detector

    cond = basis.conditions
    rows = []
    for model in models:
        detector = _timed(model, head, img_size, pairs)
        found = predict_detector(
            detector, cond, compiled=cond.runtime == "compiled", calibration=basis.read_calibration()
        )
        rows.append((detector.detector_spec, found))
    if as_json:
        print_json([{"name": spec.name, "num_classes": spec.num_classes, **found.to_dict()} for spec, found in rows])
        return
    for spec, found in rows:
        say(f"{spec.name}: {found.whole}; {words.plural(spec.num_classes, 'class', 'classes')}")
    _print_parts([(spec.name, found.whole.images_per_s, found.parts_s) for spec, found in rows])
    say("without non-maximum suppression, whose cost depends on what is found")
    for doubt in dict.fromkeys(doubt for _, found in rows for doubt in found.whole.doubts):
        say(f"doubt: {doubt}")


def _print_parts(rows: list[tuple[str, float, Any]]) -> None:
    """Where a call's time goes."""
    names = list(dict.fromkeys(part for _, _, parts in rows for part in parts))
    columns = [Column("detector"), number_column("images/s"), *(number_column(name) for name in names)]
    print_table(
        columns,
        [[name, words.rate(rate), *(words.seconds(parts[part]) for part in names)] for name, rate, parts in rows],
    )


def choose_boxes(
    models: list[str] | None, head: str, pairs: list[str] | None, common: CommonOptions, as_json: bool
) -> None:
    """``choose --task detection``."""
    from convscale.choice.basis import device_title
    from convscale.choice.choose import DetectorOptions, choose
    from convscale.networks.names import spec_or_name

    options: DetectorOptions = {
        **common,
        "head": head,
        "candidates": [spec_or_name(name) for name in models] if models else None,
        "detector": detector_options(pairs, timed=True),
        "progress": lambda text: None if as_json else say(text, err=True),
    }
    choice = choose(task="detection", **options)
    if as_json:
        print_json(choice.to_dict())
        return
    best, held = choice.best, choice.conditions
    how = "predicted, without non-maximum suppression" if choice.predicted else "measured as shipped"
    say(f"{best.backbone}: {best.images_per_s:,.1f} images/s with head {choice.head} at {held.image_size} px ({how})")
    say(f"on {device_title(held.device)}: {in_words(held)}", 2)
    say(f"as a detector of {words.plural(choice.num_classes, 'class', 'classes')}", 2)
    print_table(
        [Column("backbone"), number_column("top-1"), number_column("images/s"), Column("")],
        [
            [
                each.backbone,
                words.accuracy(each.top1),
                words.UNKNOWN if each.speed is None else words.rate(each.images_per_s),
                "chosen" if each is best else each.reason,
            ]
            for each in choice.options
        ],
    )
    say(
        "top-1 is the best published ImageNet figure of weights that saw nothing more: how good features are, not what "
        "mAP a detector reaches on other data"
    )
