"""From what a user asked for to a job that can run: the network, the data, how they meet."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
from torch import nn

from convscale.arch.spec import NetSpec
from convscale.conditions import sides
from convscale.errors import Stopped, UserError
from convscale.files import check_output_dir, file_or_none, new_output_dir
from convscale.images.digest import data_digest
from convscale.images.preprocess import Preprocessing
from convscale.images.splits import DataSplits, FileSplit, Split
from convscale.learn.checkpoint import ORIGIN, drop_from, list_checkpoints, load_state, weights_of
from convscale.learn.distributed import Processes, Trouble
from convscale.learn.imitate import TeacherCache, cache_key
from convscale.learn.job import Job
from convscale.learn.loader import (
    Batch,
    TrainLoader,
    check_bad_rate,
    eval_batches,
    into_memory,
    measure_mean_std,
)
from convscale.learn.loss import build_loss
from convscale.learn.progress import Progress, Relay, logged
from convscale.learn.recipe import Recipe
from convscale.learn.request import TrainRequest
from convscale.learn.settings import Settings, choose_settings
from convscale.learn.shrink import shrink_split
from convscale.learn.teacher import open_teacher
from convscale.learn.trackers import Tracked, Tracking, need_tracker
from convscale.locks import OutputLock
from convscale.machine import code_commit
from convscale.networks.foreign import Foreign, build_foreign
from convscale.networks.inputs import input_facts
from convscale.networks.pictures import crop_mode_of
from convscale.networks.resolve import find
from convscale.nn.norm import convert_sync


def prepare(
    request: TrainRequest,
    splits: DataSplits,
    *,
    processes: Processes,
    device: torch.device,
    tell: Progress,
    stop: Callable[[], bool],
    lock: OutputLock,
) -> tuple[Job, bool]:
    """Everything that a run needs, and whether it goes on from a saved state; the output folder's ``lock`` is taken.

    Nothing is written yet: whatever can be wrong with the input is found before ``begin_folder``.
    """
    folder, resumed = request.output, take_folder(request, splits.places(), processes, lock)
    torch.manual_seed(request.seed)
    net = build_net(request.net, splits, request.recipe, request.init, tell=tell).to(device)
    preprocessing = request.preprocessing or choose_preprocessing(net, splits, request.recipe)
    recipe, teacher = _prepare_teacher(request, splits, preprocessing, device)
    train_split, validation = _prepare_splits(splits, preprocessing, recipe, tell, request.workers)
    if not request.batch_is_asked:
        recipe = fit_batch(recipe, len(train_split), tell, processes.world)
    loader = TrainLoader(
        train_split,
        recipe,
        image_size=preprocessing.image_size,
        seed=request.seed,
        workers=request.workers,
        rank=processes.rank,
        world=processes.world,
    )
    if recipe.grad_checkpointing:
        _checkpoint_gradients(net)
    if resumed and folder is not None:
        settings = kept_settings(folder)
    elif request.branch is not None:
        settings = kept_settings(request.branch)
    else:
        batch = first_batch(loader.split, preprocessing, recipe.batch_size, splits.max_bad_rate)
        settings = choose_settings(net, recipe, preprocessing.normalize(batch.images.to(device)))
    settings = processes.from_first(settings)
    job = Job(
        net=laid_out(net, settings, processes),
        recipe=recipe,
        loader=loader,
        validation=validation,
        preprocessing=preprocessing,
        loss=build_loss(recipe, train_split.class_counts(), multilabel=splits.multilabel),
        settings=settings,
        seed=request.seed,
        device=device,
        max_seconds=request.max_seconds,
        output=folder,
        checkpoint_seconds=request.checkpoint_seconds,
        keep=request.keep,
        teacher=teacher,
        teacher_cache=_teacher_cache(request, recipe, teacher, train_split, preprocessing),
        progress=tell,
        stop=stop,
        processes=processes,
        max_bad_rate=splits.max_bad_rate,
    )
    return job, resumed


def take_folder(
    request: TrainRequest, data: Iterable[tuple[str, object]], processes: Processes, lock: OutputLock
) -> bool:
    """See that the output folder, where there is to be one, can be written, and lock it, and that the tracker is there
    that is to be told; gives whether the run goes on from a state in it.

    Args:
        request: what is asked for.
        data: where the images lie, as ``places`` of splits says it.
        processes: those of the run.
        lock: that of the folder.
    """
    folder, trouble = request.output, Trouble(processes)
    if folder is not None:
        with trouble.held():
            inputs: dict[str, object] = {"recipe": file_or_none(request.recipe_from)}
            inputs |= {"teacher": request.teacher, "branch": request.branch}
            inputs |= {"init": None if request.init == "pretrained" else request.init}
            read = chain(inputs.items(), data if processes.first else ())  # to look at many files once will do
            check_output_dir(folder, overwrite=request.overwrite, resume=request.resume, inputs=read)
            if processes.first:
                if request.track is not None:
                    need_tracker(request.track)  # which the others, on other machines too, need not have
                lock.take(folder)
    trouble.settle()
    return processes.from_first(folder is not None and request.resume and bool(list_checkpoints(folder)))


def begin_folder(request: TrainRequest, job: Job, tell: Relay, lock: OutputLock, **more: object) -> None:
    """Make the job's output folder, or empty it, and let ``tell`` tell TensorBoard and an experiment tracker too where
    that is asked for; ``more`` is what a tracker is told of the run beside the recipe.

    To be called when all input was found good: only here is anything of an earlier run replaced.

    Raises:
        Stopped: the run was told to stop meanwhile; nothing was touched.
    """
    end_if_told(job, "the output folder is as it was")
    folder, trouble = job.output, Trouble(job.processes)
    if folder is not None and job.processes.first:
        with trouble.held():
            need_bytes = state_bytes(job.net) * (request.keep + 1)
            lock.take(folder)  # another run may have made it since it was looked at
            new_output_dir(folder, overwrite=request.overwrite, resume=request.resume, need_bytes=need_bytes)
            lock.take(folder)
            if not list_checkpoints(folder):  # a run that ended before its first state left it: this one starts anew
                drop_from(folder, 0, kind="best")
            if lock.note:
                tell({"kind": "note", "text": lock.note})
            if request.tensorboard:
                tell.to = logged(tell.to, folder / "tensorboard")
            if request.track is not None:
                tell.to = Tracking(request.track, _tracked(job, folder, more), tell.to)
    trouble.settle()


def end_if_told(job: Job, so_far: str) -> None:
    """End a run that has no state yet.

    Raises:
        Stopped: it was told to stop, in the first process.
    """
    if job.processes.from_first(job.stop()):
        raise Stopped(f"told to stop before training began; {so_far}")


def laid_out(net: nn.Module, settings: Settings, processes: Processes) -> nn.Module:
    """The network in the settings' layout; of several processes the norms share their statistics."""
    if processes.world > 1:
        net = convert_sync(net)
    memory_format = torch.channels_last if settings.layout == "nhwc" else torch.contiguous_format
    return net.to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]


def _tracked(job: Job, folder: Path, more: Mapping[str, object]) -> Tracked:
    """What an experiment tracker is told of a run."""
    named = getattr(getattr(job.net, "spec", None), "name", type(job.net).__name__)
    digest = data_digest((job.loader.split, job.validation))
    facts = {"model": named, "seed": job.seed, "data_digest": digest, "commit": code_commit()}
    return Tracked(name=folder.resolve().name, folder=folder, facts={**job.recipe.to_dict(), **facts, **more})


@contextmanager
def ended(tell: Relay) -> Iterator[Callable[[bool], None]]:
    """A run that ``tell`` is told of: its tracker, where there is one, learns that it ended, and whether the function
    that this gives was called with True before.
    """
    finished = False

    def finish(value: bool) -> None:
        nonlocal finished
        finished = value

    try:
        yield finish
    finally:
        if isinstance(tell.to, Tracking):
            tell.to.end(finished=finished)


def _prepare_teacher(
    request: TrainRequest, splits: DataSplits, preprocessing: Preprocessing, device: torch.device
) -> tuple[Recipe, nn.Module | None]:
    """The recipe with a weight for the teacher, and the teacher on its device."""
    recipe = request.recipe
    named = {key: getattr(recipe, key) for key in ("distill_weight", "distill_kl", "distill_features")}
    asked = {key: value for key, value in named.items() if value}
    if request.teacher is not None:
        recipe = recipe if asked else recipe.override({"distill_weight": 0.5})
        return recipe, open_teacher(request.teacher, splits.classes, preprocessing).to(device)
    for key, value in asked.items():
        raise UserError(f"{key} is {value:g}, but there is no teacher; give one (--teacher), or set it to 0")
    return recipe, None


def _teacher_cache(
    request: TrainRequest, recipe: Recipe, teacher: nn.Module | None, train: Split, preprocessing: Preprocessing
) -> TeacherCache | None:
    """Where the teacher's outputs are kept, where that was asked for."""
    if request.teacher_cache is None:
        return None
    if teacher is None:
        raise UserError(f"teacher_cache is {request.teacher_cache}, but there is no teacher; give one, or leave it out")
    if recipe.distill_features:
        raise UserError("teacher_cache keeps outputs alone; set distill_features to 0, or leave it out")
    key = cache_key(teacher, train, preprocessing, recipe, request.seed)
    cache = TeacherCache(request.teacher_cache, key, len(train))
    cache.check()
    return cache


def _prepare_splits(
    splits: DataSplits, preprocessing: Preprocessing, recipe: Recipe, tell: Progress, workers: int | None
) -> tuple[Split, Split]:
    """Train and validation set in memory at the network's size, where they fit and the augmentation allows it."""
    prepared = []
    for split in (splits.train, splits.validation):
        bad: tuple[str, ...] = ()
        if recipe.shrink and isinstance(split, FileSplit) and split is splits.train:
            split, note = shrink_split(split, round(recipe.shrink * max(preprocessing.height, preprocessing.width)))
            tell({"kind": "note", "text": note})
        if recipe.augment == "shift-crop" or split is splits.validation:
            split, bad = into_memory(split, preprocessing, max_bad_rate=splits.max_bad_rate, workers=workers)
        for problem in bad:
            tell({"kind": "note", "text": f"left out: {problem}"})
        prepared.append(split)
    return prepared[0], prepared[1]


def state_bytes(net: nn.Module) -> int:
    """About what one training state takes: weights, their average and best, two moments each, and the best checkpoint
    beside it.
    """
    return 7 * sum(value.numel() * value.element_size() for value in net.state_dict().values())


def fit_batch(recipe: Recipe, images: int, tell: Progress, world: int = 1) -> Recipe:
    """The recipe with a batch of which ``world`` processes' are not larger than the set; only for a batch that nobody
    asked for.
    """
    share = images // world
    if recipe.batch_size <= share or not share:
        return recipe
    part = "the size of the train set" if world == 1 else f"what {world} processes have each of the train set"
    tell({"kind": "note", "text": f"batch size {recipe.batch_size} lowered to {share}, {part}"})
    return recipe.override({"batch_size": share})


def _checkpoint_gradients(net: nn.Module) -> None:
    if not hasattr(net, "set_grad_checkpointing"):
        raise UserError("grad_checkpointing: this network has no set_grad_checkpointing")
    net.set_grad_checkpointing(True)  # pyright: ignore[reportCallIssue]


def kept_settings(folder: Path) -> Settings:
    place, _, state, _ = load_state(folder)
    kept = state.get("settings")
    if not isinstance(kept, dict) or not all(isinstance(kept.get(key), str) for key in ("precision", "layout")):
        raise UserError(f"training state {place / 'state.json'} is damaged: it has no settings of precision and layout")
    return Settings(precision=kept["precision"], layout=kept["layout"])


def first_batch(split: Split, preprocessing: Preprocessing, batch_size: int, max_bad_rate: float) -> Batch:
    """The first images of the train set, at most 128, that can be decoded: what precision and layout are measured on.

    Raises:
        UserError: too many images before them can not be.
    """
    bad = list[str]()
    for batch in eval_batches(split, preprocessing, batch_size=min(batch_size, 128), workers=0):
        if len(batch.indices):
            return batch
        bad += batch.bad
        check_bad_rate(bad, len(split), max_bad_rate, split.split)
    raise UserError(f"the {split.split} set has no image")


def build_net(
    net: nn.Module | NetSpec | Foreign | str,
    splits: DataSplits,
    recipe: Recipe,
    init: str | os.PathLike[str] | None,
    *,
    tell: Progress | None = None,
) -> nn.Module:
    """The network to train: given, or built for the data's classes and channels; then its first weights. What is to be
    known of these is told as notes.
    """
    classes = len(splits.classes)
    if isinstance(net, str):
        named = find(net)
        net = named if isinstance(named, Foreign) else net
    if isinstance(net, nn.Module):
        module = net
        known = getattr(net, "num_classes", classes)
        if known != classes:
            raise UserError(
                f"the network has {known} classes, the data {classes}; create_model(..., num_classes={classes}) would "
                "be right"
            )
    elif isinstance(net, Foreign):
        module = _build_foreign(net, splits, recipe, pretrained=init == "pretrained")
    else:
        from convscale.nn.net import create_model

        module = create_model(
            net,
            pretrained=init == "pretrained",
            num_classes=classes,
            in_chans=splits.channels,
            drop_rate=recipe.drop_rate,
            drop_path_rate=recipe.drop_path_rate,
            head=None if recipe.head == "own" else recipe.head,  # pyright: ignore[reportArgumentType] - checked
        )
    if init is None or init == "pretrained":
        if init and isinstance(net, nn.Module):
            raise UserError("init='pretrained' needs a name; a network that is given brings its own weights")
        return module
    from convscale.nn.weights import load_weights

    weights, named = weights_of(init) if Path(init).is_dir() else (init, None)
    loaded = load_weights(module, weights, allow_head_mismatch=True)
    for note in loaded.notes(splits.classes, source_classes=named):
        if tell is not None:
            tell({"kind": "note", "text": note})
    return module


def _build_foreign(net: Foreign, splits: DataSplits, recipe: Recipe, *, pretrained: bool) -> nn.Module:
    """A network of other code for the data's classes and channels; it remembers who builds it, for its checkpoints.

    Raises:
        UserError: it can not be built, or has another number of classes.
    """
    classes = len(splits.classes)
    if pretrained and net.origin != "timm":
        raise UserError(f"init='pretrained' is for released weights; {net.name} brings its own")
    module = build_foreign(
        net,
        pretrained=pretrained,
        num_classes=classes,
        in_chans=splits.channels,
        drop_rate=recipe.drop_rate or None,  # not all of timm's networks take these
        drop_path_rate=recipe.drop_path_rate or None,
    )
    known = getattr(module, "num_classes", classes)
    if known != classes:
        raise UserError(f"{net.name} has {known} classes, the data {classes}; a factory may take num_classes")
    setattr(module, ORIGIN, net)
    return module


def choose_preprocessing(net: nn.Module, splits: DataSplits, recipe: Recipe) -> Preprocessing:
    """Pictures: the network's own size and statistics. Small images in memory: measured statistics and the data's size,
    or the network's own size where that is at most twice the data's."""
    facts = input_facts(net)
    channels, images = splits.channels, splits.train.images
    if images is not None:
        native = max(images.shape[1:3])
        size = recipe.image_size
        if size is None:
            size = facts.size if facts.size is not None and max(sides(facts.size)) <= 2 * native else native
        mean, std = measure_mean_std(splits.train)
        return Preprocessing(image_size=size, channels=channels, mean=mean, std=std, crop_pct=1.0)
    mean, std = facts.mean or (0.485, 0.456, 0.406), facts.std or (0.229, 0.224, 0.225)
    if len(mean) != channels:
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    return Preprocessing(
        image_size=recipe.image_size or facts.size or 224,
        channels=channels,
        mean=mean,
        std=std,
        crop_pct=facts.crop_pct if recipe.augment == "resized-crop" else 1.0,
        interpolation=facts.interpolation,
        crop_mode=crop_mode_of(net),
    )
