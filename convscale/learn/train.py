"""Images to trained weights: ``train``."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convscale.arch.spec import NetSpec
from convscale.conditions import sides
from convscale.errors import UserError, check_flag, check_number, check_whole
from convscale.files import check_output_dir, new_output_dir
from convscale.images.preprocess import Preprocessing
from convscale.images.sources import open_dataset
from convscale.images.splits import DataSplits, FileSplit, Split
from convscale.learn.checkpoint import list_checkpoints, load_checkpoint, load_state
from convscale.learn.cost import RunCost, measure_cost
from convscale.learn.distributed import join
from convscale.learn.loader import TrainLoader, eval_batches, into_memory, measure_mean_std
from convscale.learn.loop import Job, Trainer
from convscale.learn.loss import build_loss
from convscale.learn.progress import Event, Progress, duration, logged
from convscale.learn.recipe import Recipe
from convscale.learn.recipes import get_recipe
from convscale.learn.record import EpochRow
from convscale.learn.resume import restore
from convscale.learn.settings import Settings, choose_settings, usable_device
from convscale.learn.shrink import shrink_split
from convscale.learn.teacher import open_teacher
from convscale.networks.inputs import input_facts
from convscale.nn.modes import evaluating
from convscale.nn.norm import convert_sync


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainRun:
    """What a run gave."""

    net: nn.Module
    """The best network on validation (averaged weights when the recipe averages), in eval mode."""
    history: list[EpochRow]
    """One entry per epoch: epoch, train_loss, val_loss, val_top1, val_map, lr, images, train_seconds, images_per_s,
    wait_share, seconds (since the start), skipped_steps."""
    best_metric: float
    """Validation top-1 of ``net``, in [0, 1]; mean average precision for several labels."""
    best_epoch: int
    """The epoch it comes from; 0: the solved head, before the first."""
    thresholds: tuple[float, ...] | None
    """For several labels: per class the probability above which it counts as present, set on validation; else None."""
    classes: tuple[str, ...]
    """Class names."""
    preprocessing: Preprocessing
    """How images become inputs."""
    recipe: Recipe
    """With every override."""
    settings: Settings
    """Precision and layout, with what was measured to choose them."""
    seconds: float
    """Training and validation, data loading included."""
    output: Path | None
    """Where checkpoints and the log are."""
    notes: tuple[str, ...]
    """What a user should know, in order."""
    finished: bool
    """False when the run was told to stop; its state is saved then."""

    cost: RunCost
    """What it cost, and what would have made it faster."""

    def describe(self) -> str:
        """The result, what the run cost, and what would have made it faster."""
        if not self.history:
            return "no epoch was finished"
        images_per_s = sum(row["images_per_s"] for row in self.history) / len(self.history)
        text = f"{len(self.history)} epochs in {duration(self.seconds)}, {images_per_s:,.0f} training images/s"
        text += f" at {self.settings.precision} {self.settings.layout}; best validation result {self.best_metric:.2%} "
        text += f"after epoch {self.best_epoch}"
        return "\n".join((text, *self.cost.lines()))


def train(
    net: nn.Module | NetSpec | str,
    data: DataSplits | str | os.PathLike[str],
    *,
    recipe: Recipe | str | os.PathLike[str] | None = None,
    epochs: int | None = None,
    output: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    seed: int = 0,
    max_seconds: float | None = None,
    progress: Progress | None = None,
    init: str | os.PathLike[str] | None = None,
    preprocessing: Preprocessing | None = None,
    teacher: nn.Module | str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    checkpoint_seconds: float = 300.0,
    keep: int = 2,
    tensorboard: bool = False,
    **overrides: Any,
) -> TrainRun:
    """Train a network on labelled images.

    Args:
        net: a module with one output per class (it is trained in place), a spec, or a name.
        data: splits, or a folder or manifest for ``open_dataset``, which carves missing splits with its own seed 0.
        recipe: a named recipe, a YAML file, or a Recipe; None: a resumed run's own, else ``small``.
        epochs: instead of the recipe's.
        output: folder for checkpoints and log; None: nothing is written.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        seed: of weights, order and augmentation; with the same seed, threads and settings a run on a CPU gives the same
            bits.
        max_seconds: the learning-rate schedule is driven so that it ends by then, if the epochs have not ended before.
        progress: called with a dictionary per step, epoch and note; see ``LiveProgress``.
        init: ``pretrained`` (for a name with released weights), or a checkpoint or weights file to start from; None: as
            given, or fresh.
        preprocessing: how images become inputs; None: the network's own size and statistics for pictures, the data's
            for small images in memory.
        teacher: a network on the same inputs, or a checkpoint of ours with the same classes, whose outputs are imitated
            by the recipe's distill_weight (0.5 where that is 0).
        resume: go on from the newest state in ``output`` when there is one.
        overwrite: replace an output folder that exists.
        workers: processes that decode files; None: one per core.
        checkpoint_seconds: a training state is written after every epoch and at least this often.
        keep: training states that are kept.
        tensorboard: write the history for TensorBoard too, into ``output/tensorboard``.
        overrides: recipe keys (``lr=0.05``).

    Started by torchrun, the processes share every global batch of ``batch_size`` x processes images, and the norms'
    statistics; the first one writes.

    Raises:
        UserError: bad input, in one line.
    """
    recipe = _recipe(recipe, output if resume else None).override(
        {**overrides, **({} if epochs is None else {"epochs": epochs})}
    )
    seed = _checked_seed(seed)
    for name, flag in (("resume", resume), ("overwrite", overwrite), ("tensorboard", tensorboard)):
        check_flag(name, flag)
    keep = check_whole("keep", keep)
    workers = None if workers is None else check_whole("workers", workers, 0)
    if max_seconds is not None:
        max_seconds = check_number("max_seconds", max_seconds, "a number of seconds above 0", math.ulp(0.0))
    checkpoint_seconds = check_number("checkpoint_seconds", checkpoint_seconds, "a number of seconds of at least 0", 0)
    where = usable_device(device)
    notes: list[str] = []
    tell = _teller(progress if int(os.environ.get("RANK", "0")) == 0 else None, notes)
    # what is carved here does not depend on the run's seed: evaluate must find the same test set
    splits = data if isinstance(data, DataSplits) else open_dataset(data)
    processes, where = join(where)
    with torch.random.fork_rng(devices=[]), _stop_signal(output is not None) as stop:
        folder = None if output is None else check_output_dir(output, overwrite=overwrite, resume=resume)
        resumed = processes.from_first(folder is not None and resume and bool(list_checkpoints(folder)))
        torch.manual_seed(seed)
        module = build_net(net, splits, recipe, init).to(where)
        preprocessing = preprocessing or choose_preprocessing(module, splits, recipe)
        if teacher is not None:
            recipe = recipe if recipe.distill_weight else recipe.override({"distill_weight": 0.5})
            teacher = open_teacher(teacher, splits.classes, preprocessing).to(where)
        elif recipe.distill_weight:
            raise UserError(
                f"distill_weight is {recipe.distill_weight:g}, but there is no teacher; give one (--teacher), or set "
                "it to 0"
            )
        train_split, validation = _hold(splits, preprocessing, recipe, tell)
        if "batch_size" not in overrides:
            recipe = _fit_batch(recipe, len(train_split), tell)
        loader = TrainLoader(
            train_split,
            recipe,
            image_size=preprocessing.image_size,
            seed=seed,
            workers=workers,
            rank=processes.rank,
            world=processes.world,
        )
        if folder is not None and processes.first:  # all input was good: only now is anything written or replaced
            new_output_dir(folder, overwrite=overwrite, resume=resume, need_bytes=_state_bytes(module) * (keep + 1))
            if tensorboard:
                tell = logged(tell, folder / "tensorboard")
        if recipe.grad_checkpointing:
            _checkpoint_gradients(module)
        settings = (
            _kept_settings(folder)
            if resumed and folder is not None
            else _settings(module, recipe, loader, preprocessing, where)
        )
        settings = processes.from_first(settings)
        if processes.world > 1:
            module = convert_sync(module)
        # pyright: ignore[reportCallIssue]
        module.to(memory_format=torch.channels_last if settings.layout == "nhwc" else torch.contiguous_format)
        job = Job(
            net=module,
            recipe=recipe,
            loader=loader,
            validation=validation,
            preprocessing=preprocessing,
            loss=build_loss(recipe, train_split.class_counts(), multilabel=splits.multilabel),
            settings=settings,
            seed=seed,
            device=where,
            max_seconds=max_seconds,
            output=folder,
            checkpoint_seconds=checkpoint_seconds,
            keep=keep,
            teacher=teacher,
            progress=tell,
            stop=stop,
            processes=processes,
        )
        with nullcontext() if teacher is None else evaluating(teacher):
            return _run(job, resumed=resumed, notes=notes)


def _checked_seed(seed: object) -> int:
    """``seed`` as an int that torch takes."""
    number = int(seed) if isinstance(seed, Integral) and not isinstance(seed, bool) else None
    if number is None or not -(2**63) <= number < 2**64:
        raise UserError(f"seed is {seed!r}; it must be a whole number of at most 64 bits")
    return number


def _recipe(recipe: Recipe | str | os.PathLike[str] | None, resumed: str | os.PathLike[str] | None) -> Recipe:
    """What was asked for; else the one that a resumed run wrote; else ``small``."""
    if recipe is None and resumed is not None and (Path(resumed) / "recipe.yaml").is_file():
        return get_recipe(Path(resumed) / "recipe.yaml")
    return get_recipe("small" if recipe is None else recipe)


def _run(job: Job, *, resumed: bool, notes: list[str]) -> TrainRun:
    trainer = Trainer(job)
    if job.output is not None:
        if resumed:
            place = restore(trainer, job.output)
            job.progress({"kind": "note", "text": f"resumed from {place}"})
        if job.processes.first:
            job.recipe.save(job.output / "recipe.yaml")
    if job.recipe.solve_head and not resumed:
        trainer.start_from_solved_head()
    trainer.run()
    finished = trainer.epoch >= job.recipe.epochs or not job.stop()
    weights = trainer.best_weights or {name: value.clone() for name, value in trainer.watched.state_dict().items()}
    job.net.load_state_dict(weights)
    thresholds = trainer.best.get("thresholds")
    # pyright: ignore[reportCallIssue]
    net = job.net.requires_grad_(True).to(memory_format=torch.contiguous_format).eval()
    return TrainRun(
        net=net,
        history=trainer.history,
        best_metric=max(trainer.best["metric"], 0.0),
        best_epoch=trainer.best["epoch"],
        thresholds=None if thresholds is None else tuple(thresholds),
        classes=job.loader.split.classes,
        preprocessing=job.preprocessing,
        recipe=job.recipe,
        settings=job.settings,
        seconds=trainer.elapsed,
        output=job.output,
        notes=tuple(notes),
        finished=finished,
        cost=measure_cost(trainer),
    )


def _hold(splits: DataSplits, preprocessing: Preprocessing, recipe: Recipe, tell: Progress) -> tuple[Split, Split]:
    """Train and validation set in memory at the network's size, where they fit and the augmentation allows it."""
    held = []
    for split in (splits.train, splits.validation):
        bad: tuple[str, ...] = ()
        if recipe.shrink and isinstance(split, FileSplit) and split is splits.train:
            split, said = shrink_split(split, round(recipe.shrink * max(preprocessing.height, preprocessing.width)))
            tell({"kind": "note", "text": said})
        if recipe.augment == "shift-crop" or split is splits.validation:
            split, bad = into_memory(split, preprocessing)
        for problem in bad:
            tell({"kind": "note", "text": f"left out: {problem}"})
        held.append(split)
    return held[0], held[1]


def _state_bytes(net: nn.Module) -> int:
    """About what one training state takes: weights, their average and best, two moments each, and the best checkpoint
    beside it.
    """
    return 7 * sum(value.numel() * value.element_size() for value in net.state_dict().values())


def _fit_batch(recipe: Recipe, images: int, tell: Progress) -> Recipe:
    """The recipe with a batch that is not larger than the set; only for a batch that nobody asked for."""
    if recipe.batch_size <= images:
        return recipe
    tell({"kind": "note", "text": f"batch size {recipe.batch_size} lowered to {images}, the size of the train set"})
    return recipe.override({"batch_size": images})


def _checkpoint_gradients(net: nn.Module) -> None:
    if not hasattr(net, "set_grad_checkpointing"):
        raise UserError("grad_checkpointing: this network has no set_grad_checkpointing")
    net.set_grad_checkpointing(True)  # pyright: ignore[reportCallIssue]


def _kept_settings(folder: Path) -> Settings:
    kept = load_state(folder)[2]["settings"]
    return Settings(precision=kept["precision"], layout=kept["layout"])


def _settings(
    net: nn.Module, recipe: Recipe, loader: TrainLoader, preprocessing: Preprocessing, device: torch.device
) -> Settings:
    """Precision and layout, measured on some images of the train set where the recipe leaves them open."""
    some = loader.split.subset(range(min(recipe.batch_size, 128)))
    batch = next(eval_batches(some, preprocessing, batch_size=128, workers=0))
    if not len(batch.indices):
        raise UserError(f"none of the first images can be decoded; first: {batch.bad[0]}")
    return choose_settings(net, recipe, preprocessing.normalize(batch.images.to(device)))


def build_net(
    net: nn.Module | NetSpec | str, splits: DataSplits, recipe: Recipe, init: str | os.PathLike[str] | None
) -> nn.Module:
    """The network to train: given, or built for the data's classes and channels; then its first weights."""
    classes = len(splits.classes)
    if isinstance(net, nn.Module):
        module = net
        known = getattr(net, "num_classes", classes)
        if known != classes:
            raise UserError(
                f"the network has {known} classes, the data {classes}; create_model(..., num_classes={classes}) would "
                "be right"
            )
    else:
        from convscale.nn.net import create_model

        options: dict[str, Any] = {"drop_rate": recipe.drop_rate, "drop_path_rate": recipe.drop_path_rate}
        module = create_model(
            net, pretrained=init == "pretrained", num_classes=classes, in_chans=splits.channels, **options
        )
    if init is None or init == "pretrained":
        if init and isinstance(net, nn.Module):
            raise UserError("init='pretrained' needs a name; a network that is given brings its own weights")
        return module
    if Path(init).is_dir():
        weights: Any = load_checkpoint(init).net.state_dict()
    else:
        weights = init
    from convscale.nn.weights import load_weights

    load_weights(module, weights, allow_head_mismatch=True)
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
    )


def _teller(progress: Progress | None, notes: list[str]) -> Progress:
    def tell(event: Event) -> None:
        if event["kind"] == "note":
            notes.append(event["text"])
        if progress is not None:
            progress(event)

    return tell


@contextmanager
def _stop_signal(wanted: bool) -> Iterator[Callable[[], bool]]:
    """While open, SIGTERM and a first Ctrl-C ask the run to save and end instead of killing it; only where there is a
    folder to save into.
    """
    asked = threading.Event()
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, _frame: Any) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    wanted_signals = [
        number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) is not signal.SIG_IGN
    ]  # as nohup and & set it
    before = {number: signal.signal(number, ask) for number in wanted_signals}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
