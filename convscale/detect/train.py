"""Pictures with boxes to a trained detector: ``train_detector``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from convscale.arch.spec import NetSpec
from convscale.detect.boxes import BoxSplits
from convscale.detect.data import open_boxes
from convscale.detect.evaluate import own_size
from convscale.detect.loader import BoxLoader
from convscale.detect.pages import write_examples
from convscale.detect.resume import check_as_written, written_options, written_side
from convscale.detect.trainer import DetectionTrainer
from convscale.errors import UserError, check_path
from convscale.images.preprocess import Preprocessing
from convscale.learn.checkpoint import about_state, load_checkpoint, load_weights_into
from convscale.learn.distributed import Processes, join
from convscale.learn.job import Job
from convscale.learn.prepare import begin_folder, ended, fit_batch, kept_settings, laid_out, take_folder
from convscale.learn.progress import Progress, Relay, noted
from convscale.learn.recipe import Recipe
from convscale.learn.recipes import get_recipe, recipe_of
from convscale.learn.request import TrainRequest
from convscale.learn.settings import Settings, half_precision, lone_pixels_learnt, usable_device
from convscale.learn.stop import stop_signal
from convscale.learn.train import TrainRun, as_given, begin, result_of
from convscale.locks import OutputLock
from convscale.networks.detectors import create_detector
from convscale.nn.detectors import DetectorSpec, is_detector
from convscale.ship.box_metrics import need_coco

USUAL = "detect-small"
"""The recipe where none is named."""
_OF_CLASSIFIERS = (
    *("grad_checkpointing", "solve_head", "balanced", "class_weights", "loss", "partial"),
    *("erase", "cutout", "shrink", "scaled_decode", "drop_rate", "drop_path_rate"),
    *("distill_weight", "distill_temperature", "distill_kl", "distill_features"),
)
"""Keys of a recipe that nothing here reads."""


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What is asked for beside a ``TrainRequest``."""

    head: str
    image_size: int | None
    options: Mapping[str, object]


def train_detector(
    net: nn.Module | NetSpec | DetectorSpec | str,
    data: BoxSplits | str | os.PathLike[str],
    *,
    head: str = "fcos",
    recipe: Recipe | str | os.PathLike[str] | None = None,
    epochs: int | None = None,
    output: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    detector: Mapping[str, object] | None = None,
    device: str = "cpu",
    seed: int = 0,
    max_seconds: float | None = None,
    progress: Progress | None = None,
    init: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    checkpoint_seconds: float = 300.0,
    keep: int = 2,
    tensorboard: bool = False,
    track: str | None = None,
    **overrides: object,
) -> TrainRun:
    """Train a detector on pictures with boxes, by the same loop as :func:`convscale.train`: crash-safe, resumed to the
    bit on a CPU, averaged, on one or several processes.

    Args:
        net: a detector (``create_detector``; trained in place), any module that is called as torchvision's are (with
            ``image_size``), a ``DetectorSpec``, or a backbone's name or spec, which gets ``head`` for the data's
            classes.
        data: an opened set, or a path for ``open_boxes``: COCO, YOLO or VOC.
        head: ``fcos``, ``retinanet``, ``faster_rcnn`` or ``ssdlite``.
        recipe: a named recipe (``detect-small``, ``detect-1x``), a YAML file, or a Recipe; None: a resumed run's own,
            else ``detect-small``.
        epochs: instead of the recipe's.
        output: folder for checkpoints, log and examples; None: nothing is written.
        image_size: side in pixels of the square that pictures are fitted into; None: the recipe's, or the detector's.
        detector: more of ``create_detector``'s options (``neck_width``, ``norm`` ...), for a backbone's name.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        seed: of weights, order and augmentation.
        max_seconds: the learning-rate schedule is driven so that it ends by then.
        progress: called with a dictionary per step, epoch and note.
        init: ``pretrained``: the backbone's released weights; a file of the backbone's weights; or a detector's
            checkpoint or run to start from.
        resume: go on from the newest state in ``output`` when there is one.
        overwrite: replace an output folder that exists.
        workers: processes that decode; None: one per core.
        checkpoint_seconds: a training state is written after every epoch and at least this often.
        keep: training states that are kept.
        tensorboard: write the history for TensorBoard too.
        track: ``mlflow``, ``wandb`` or ``trackio``: tell this tracker of the run, too, as :func:`convscale.train` does.
        overrides: recipe keys (``lr=0.01``).

    Returns:
        A ``TrainRun`` whose ``net`` is the detector with the best validation mAP, in eval mode; of each epoch
        ``val_map`` is the mAP and ``val_top1`` the AP50.

    Raises:
        UserError: bad input, in one line.
    """
    need_coco("training a detector")
    found = (recipe_of(recipe, output if resume else None) or get_recipe(USUAL)).override(
        {**overrides, **({} if epochs is None else {"epochs": epochs})}
    )
    if found.head != "own":
        raise UserError(
            f"recipe {found.name} puts the head {found.head} on a classifier; a detector has heads of its own"
        )
    request = TrainRequest(
        net=cast(Any, net),
        data=cast(Any, data),
        recipe=found,
        recipe_from=recipe,
        batch_is_asked="batch_size" in overrides,
        output=None if output is None else check_path("output", output),
        device=usable_device(device),
        seed=seed,
        max_seconds=max_seconds,
        progress=progress,
        init=init,
        preprocessing=None,
        teacher=None,
        teacher_cache=None,
        resume=resume,
        overwrite=overwrite,
        workers=workers,
        checkpoint_seconds=checkpoint_seconds,
        keep=keep,
        tensorboard=tensorboard,
        track=track,
    )
    splits = data if isinstance(data, BoxSplits) else open_boxes(data)
    return _train(request, splits, _Asked(head=head, image_size=image_size, options=dict(detector or {})))


def _train(request: TrainRequest, splits: BoxSplits, asked: _Asked) -> TrainRun:
    notes: list[str] = []
    tell = Relay(noted(request.progress, notes))
    processes, device = join(request.device)
    with torch.random.fork_rng(devices=[]), stop_signal(request.output is not None) as stop, OutputLock() as lock:
        job, resumed = _prepare(request, splits, asked, processes, device, tell, stop, lock)
        with ended(tell) as finish:
            trainer = DetectionTrainer(job, splits.validation, eval_batch=max(1, job.recipe.batch_size))
            with as_given(trainer):
                begin_folder(request, job, tell, lock, **_facts(job.net, job.preprocessing.width))
                run = _run(trainer, splits, resumed=resumed, notes=notes)
            finish(run.finished)
        return run


def _prepare(
    request: TrainRequest,
    splits: BoxSplits,
    asked: _Asked,
    processes: Processes,
    device: torch.device,
    tell: Progress,
    stop: Callable[[], bool],
    lock: OutputLock,
) -> tuple[Job, bool]:
    """Everything that a run needs, and whether it goes on from a saved state; nothing is written yet."""
    folder, resumed = request.output, take_folder(request, splits.places(), processes, lock)
    if splits.borrowed is not None:
        raise UserError(
            f"data {splits.origin} has no train set, and what has learnt from its {splits.borrowed} set is not judged "
            "by it; add a train set"
        )
    if not splits.train.box_count:
        raise UserError("the train set has no box; there is nothing to learn")
    torch.manual_seed(request.seed)
    recipe = request.recipe
    about = about_state(folder) if resumed and folder is not None else None
    net, preprocessing = _network(request, splits, asked, about)
    if about is not None:
        check_as_written(about, folder, net, preprocessing.width)
    if not request.batch_is_asked:
        recipe = fit_batch(recipe, len(splits.train), tell, processes.world)
    net = net.to(device)
    side, fill = own_size(net, preprocessing.width)
    loader = BoxLoader(
        splits.train,
        recipe,
        image_size=side,
        fill=fill,
        seed=request.seed,
        workers=request.workers,
        rank=processes.rank,
        world=processes.world,
    )
    settings = kept_settings(folder) if resumed and folder is not None else _settings(recipe, device)
    settings = processes.from_first(settings)
    job = Job(
        net=laid_out(net, settings, processes),
        recipe=recipe,
        loader=cast(Any, loader),
        validation=cast(Any, splits.validation),
        preprocessing=preprocessing,
        loss=cast(Any, None),
        settings=settings,
        seed=request.seed,
        device=device,
        max_seconds=request.max_seconds,
        output=folder,
        checkpoint_seconds=request.checkpoint_seconds,
        keep=request.keep,
        teacher=None,
        progress=tell,
        stop=stop,
        processes=processes,
        max_bad_rate=splits.max_bad_rate,
        data=None if folder is None else splits.digests(),
        data_older=splits.digests(older=True) if resumed and folder is not None else None,
        category_ids=splits.train.category_ids,
    )
    return job, resumed


def _network(
    request: TrainRequest, splits: BoxSplits, asked: _Asked, about: Mapping[str, Any] | None
) -> tuple[nn.Module, Preprocessing]:
    """The detector to train, and how pictures become its input; what nobody asks for is as ``about`` says, the
    checkpoint of a run that goes on.
    """
    classes, given = len(splits.classes), request.net
    of_recipe = _whole_side(request.recipe)
    size = asked.image_size or of_recipe
    says_all = isinstance(given, DetectorSpec) or hasattr(given, "detector_spec")
    if size is None and about is not None and not says_all:
        size = written_side(about)
    if isinstance(given, nn.Module):
        if _backbone_weights(request.init) is not False:
            raise UserError(
                "init needs a name where it is of a backbone; a detector that is given brings its own weights"
            )
        net = given
    else:
        options: dict[str, Any] = {**({} if about is None else written_options(about)), **asked.options}
        spec = given if isinstance(given, DetectorSpec) else None
        if spec is not None:
            spec = replace(spec, image_size=size or spec.image_size)
        net = create_detector(
            cast(Any, spec or given),
            asked.head,
            num_classes=None if spec else classes,
            image_size=size,
            pretrained_backbone=_backbone_weights(request.init),
            **options,
        )
    spec = getattr(net, "detector_spec", None)
    if spec is not None and spec.num_classes != classes:
        raise UserError(
            f"the detector has {spec.num_classes} classes, the data {classes}; create_detector(..., "
            f"num_classes={classes}) would be right"
        )
    if spec is not None and size is not None and size != spec.image_size:
        raise UserError(f"image_size is {size}, the detector's is {spec.image_size}; give one of them")
    if request.init is not None and Path(request.init).is_dir():
        start = load_checkpoint(request.init)
        if not is_detector(start.net) or start.classes != splits.classes:
            raise UserError(f"{request.init} is no detector of the data's classes {list(splits.classes)}")
        load_weights_into(net, start.path)
    side, _ = own_size(net, None if spec is not None else size)
    mean, std = (spec.mean, spec.std) if spec is not None else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return net, Preprocessing(image_size=side, channels=3, mean=mean, std=std, crop_pct=1.0)


def _facts(net: nn.Module, side: int) -> dict[str, object]:
    """What a tracker is told of a detector beside its recipe."""
    spec = getattr(net, "detector_spec", None)
    facts: dict[str, object] = {"image_size": side}
    if isinstance(spec, DetectorSpec):
        facts["head"] = spec.head
        if spec.backbone is not None:
            facts["model"] = spec.backbone if isinstance(spec.backbone, str) else spec.backbone.name
    return facts


def _backbone_weights(init: str | os.PathLike[str] | None) -> bool | str | os.PathLike[str]:
    """What a backbone starts from: released weights, a file of them, or nothing."""
    if init is None or Path(init).is_dir():
        return False
    return True if init == "pretrained" else init


def _whole_side(recipe: Recipe) -> int | None:
    if recipe.image_size is not None and not isinstance(recipe.image_size, int):
        raise UserError(f"recipe {recipe.name}: image_size is {recipe.image_size}; a detector's is one side")
    if recipe.progressive != 1 or recipe.mixup or recipe.cutmix or recipe.policy != "none":
        raise UserError(f"recipe {recipe.name}: progressive, mixup, cutmix and policy know no boxes; leave them out")
    if recipe.freeze_epochs:  # it would thaw frozen norms and stages too
        raise UserError(
            f"recipe {recipe.name}: freeze_epochs is {recipe.freeze_epochs}; a detector has no classifier to train "
            "alone: frozen_stages and norm='frozen' keep parts of its backbone"
        )
    usual = {field.name: field.default for field in fields(Recipe)}
    for name in _OF_CLASSIFIERS:
        if (value := getattr(recipe, name)) != usual[name]:
            raise UserError(
                f"recipe {recipe.name}: {name} is {value}, which does nothing for a detector; leave it out, or at "
                f"{usual[name]}"
            )
    return recipe.image_size


def _settings(recipe: Recipe, device: torch.device) -> Settings:
    """Precision and layout; ``auto`` is the device's half precision on a GPU, single on a processor."""
    precision = recipe.precision
    if precision == "amp" or (precision == "auto" and device.type == "cuda"):
        precision = half_precision(device) if device.type == "cuda" or recipe.precision == "amp" else "fp32"
    if precision == "auto":
        precision = "fp32"
    layout = recipe.layout if recipe.layout != "auto" else ("nhwc" if device.type == "cuda" else "nchw")
    return Settings(precision=precision, layout=layout)


def _run(trainer: DetectionTrainer, splits: BoxSplits, *, resumed: bool, notes: list[str]) -> TrainRun:
    job = trainer.job
    begin(trainer, resumed=resumed)
    with lone_pixels_learnt(job.net, job.settings.precision, job.device):
        trainer.run()
    run = result_of(trainer, notes)
    if run.finished and job.output is not None and job.processes.first:
        write_examples(run.net, splits.validation, job.output, image_size=job.preprocessing.width, device=job.device)
    return run
