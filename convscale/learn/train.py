"""Images to trained weights: ``train``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from convscale import words
from convscale.arch.spec import NetSpec
from convscale.errors import check_path
from convscale.images.preprocess import Preprocessing
from convscale.images.sources import open_dataset
from convscale.images.splits import DataSplits
from convscale.learn.branch import branch_off, check_branch, keep_best, recipe_of_state
from convscale.learn.cost import RunCost, measure_cost
from convscale.learn.distributed import join
from convscale.learn.loop import Trainer
from convscale.learn.prepare import begin_folder, end_if_told, ended, prepare
from convscale.learn.probe import headed_parts
from convscale.learn.progress import Progress, Relay, noted
from convscale.learn.recipe import Recipe
from convscale.learn.recipes import get_recipe, recipe_of
from convscale.learn.record import EpochRow
from convscale.learn.request import TrainRequest
from convscale.learn.resume import restore
from convscale.learn.settings import Settings, lone_pixels_learnt, usable_device
from convscale.learn.stop import stop_signal
from convscale.learn.usual import can_finetune, usual_recipe, why
from convscale.locks import OutputLock
from convscale.networks.foreign import Foreign
from convscale.networks.pictures import Taught, keep_taught
from convscale.nn.modes import evaluating


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
    temperatures: tuple[float, ...] | None
    """For several labels: per class what its logit is divided by before the sigmoid so that probabilities are
    calibrated, fitted on validation; ``thresholds`` are for logits as they are. Else None."""
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
    """False when the run was told to stop, by any of its processes; its state is saved then."""

    cost: RunCost
    """What it cost, and what would have made it faster."""

    def describe(self) -> str:
        """The result, what the run cost, and what would have made it faster."""
        if not self.history:
            return "no epoch was finished"
        images_per_s = sum(row["images_per_s"] for row in self.history) / len(self.history)
        text = f"{len(self.history)} epochs in {words.duration(self.seconds)}, {images_per_s:,.0f} training images/s"
        text += f" at {self.settings.precision} {self.settings.layout}; best validation result {self.best_metric:.2%} "
        text += f"after epoch {self.best_epoch}"
        return "\n".join((text, *self.cost.lines()))


def train(
    net: nn.Module | NetSpec | Foreign | str,
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
    teacher_cache: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    checkpoint_seconds: float = 300.0,
    keep: int = 2,
    tensorboard: bool = False,
    track: str | None = None,
    branch: str | os.PathLike[str] | None = None,
    **overrides: object,
) -> TrainRun:
    """Train a network on labelled images.

    Args:
        net: a module with one output per class (it is trained in place), a spec, or a name: an own one, timm's, or
            ``package.module:function``.
        data: splits, or a folder or manifest for ``open_dataset``, which carves missing splits with its own seed 0.
        recipe: a named recipe, a YAML file, or a Recipe; None: a resumed run's own, else ``finetune`` where ``init``
            gives weights, ``small`` for images of up to 64 px, and ``pictures`` for others, which is noted.
        epochs: instead of the recipe's.
        output: folder for checkpoints and log; None: nothing is written.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        seed: of weights, order and augmentation; with the same seed, threads and settings a run on a CPU gives the same
            bits.
        max_seconds: the learning-rate schedule is driven so that it ends by then, if the epochs have not ended before.
        progress: called with a dictionary per step, epoch and note; see ``LiveProgress``.
        init: ``pretrained`` (for a name with released weights; timm's come by its own loader), or a checkpoint or
            weights file to start from; None: as given, or fresh.
        preprocessing: how images become inputs; None: the network's own size and statistics for pictures, the data's
            for small images in memory.
        teacher: a network on the same inputs, or a checkpoint of ours with the same classes, or a name with released
            weights of as many (``resnet50.a1_in1k``), whose outputs are imitated by the recipe's distill_weight,
            distill_kl or distill_features (a distill_weight of 0.5 where all are 0). A network of timm's is a module
            too; ``convscale.learn.teacher.Teacher`` gives it its own normalisation.
        teacher_cache: a folder where its outputs are kept, one row for each image and epoch: a second student of the
            same teacher, data, augmentation and seed need not ask it again. Not with mixed images.
        resume: go on from the newest state in ``output`` when there is one.
        overwrite: replace an output folder that exists.
        workers: processes that decode files; None: one per core.
        checkpoint_seconds: a training state is written after every epoch and at least this often.
        keep: training states that are kept.
        tensorboard: write the history for TensorBoard too, into ``output/tensorboard``.
        track: ``mlflow``, ``wandb`` or ``trackio``: tell this tracker of the run, too; where, its own environment
            variables say (MLflow without them: a SQLite file in ``output``).
        branch: a training state of another run (``checkpoints/step-...``) whose schedule is ``wsd`` or ``constant`` and
            whose rate stood at its peak: go on from there as that run, and decay by the schedule ``wsd``, ``epochs``
            being counted from that run's start. What comes of it is bit for bit what a run of so many epochs would
            have been. None: none.
        overrides: recipe keys (``lr=0.05``).

    Started by torchrun, the processes share every global batch of ``batch_size`` x processes images, and the norms'
    statistics; the first one writes.

    Raises:
        UserError: bad input, in one line.
    """
    told = {**overrides, **({} if epochs is None else {"epochs": epochs})}
    named = recipe_of(recipe, output if resume else None)
    if named is None and branch is not None:
        named = recipe_of_state(check_path("branch", branch))
    made = (named or Recipe(name="given")).override(told)
    request = TrainRequest(
        net=net,
        data=data,
        recipe=made,
        recipe_from=recipe,
        batch_is_asked="batch_size" in overrides,
        output=None if output is None else check_path("output", output),
        device=usable_device(device),
        seed=seed,
        max_seconds=max_seconds,
        progress=progress,
        init=init,
        preprocessing=preprocessing,
        teacher=teacher,
        teacher_cache=None if teacher_cache is None else check_path("teacher_cache", teacher_cache),
        resume=resume,
        overwrite=overwrite,
        workers=workers,
        checkpoint_seconds=checkpoint_seconds,
        keep=keep,
        tensorboard=tensorboard,
        track=track,
        branch=None if branch is None else check_path("branch", branch),
    )
    if request.branch is not None:
        check_branch(request.branch, made)
    return _train(request, told if named is None else None)


def _train(request: TrainRequest, unnamed: dict[str, object] | None) -> TrainRun:
    """Build what was asked for, and run it; ``unnamed`` are the recipe's keys where no recipe is named."""
    notes: list[str] = []
    tell = Relay(noted(request.progress, notes))
    # what is carved here does not depend on the run's seed: evaluate must find the same test set
    splits = request.data if isinstance(request.data, DataSplits) else open_dataset(request.data)
    if unnamed is not None:
        init = request.init is not None
        weights = init and can_finetune(request.net, splits, unnamed)
        name = usual_recipe(splits, request.recipe.image_size, weights=weights)
        tell({"kind": "note", "text": f"no recipe is named: {name}, {why(name, request.net, init=init)}"})
        request = replace(request, recipe=get_recipe(name).override(unnamed))
    processes, device = join(request.device)
    with torch.random.fork_rng(devices=[]), stop_signal(request.output is not None) as stop, OutputLock() as lock:
        job, resumed = prepare(request, splits, processes=processes, device=device, tell=tell, stop=stop, lock=lock)
        if job.output is not None:
            older = splits.digests(older=True) if resumed else None
            job = replace(job, data=splits.digests(), data_older=older)
        with ended(tell) as finish:
            with nullcontext() if job.teacher is None else evaluating(job.teacher):
                trainer = Trainer(job)
                with as_given(trainer):
                    _check(trainer, request, resumed=resumed)
                    begin_folder(request, job, tell, lock)
                    run = _run(trainer, request, resumed=resumed, notes=notes)
            finish(run.finished)
        return run


def begin(trainer: Trainer, *, resumed: bool) -> None:
    """Put a run where it was stopped, and write its recipe."""
    job = trainer.job
    if job.output is None:
        return
    if resumed:
        place = restore(trainer, job.output)
        job.progress({"kind": "note", "text": f"resumed from {place}"})
        if trainer.folder is not None:
            with trainer.trouble.held():
                trainer.folder.take_up(place, trainer.batches(), trainer.watched, trainer.metrics(), trainer.state())
    if job.processes.first:
        with trainer.trouble.held():
            job.recipe.save(job.output / "recipe.yaml")
    trainer.trouble.settle()


def result_of(trainer: Trainer, notes: list[str]) -> TrainRun:
    """What a run gave that has ended or was told to stop; the network takes its best weights."""
    job = trainer.job
    trainer.trouble.settle()  # the last state may not have been written
    weights = trainer.best_weights or {name: value.clone() for name, value in trainer.watched.state_dict().items()}
    job.net.load_state_dict(weights)
    classes = job.loader.split.classes
    digest = None if trainer.folder is None else trainer.folder.digest
    known = {"splits": job.data, "data_digest": digest, "category_ids": job.category_ids}
    taught = Taught(preprocessing=job.preprocessing, classes=classes, **known)
    keep_taught(job.net, taught)
    thresholds, temperatures = trainer.best["thresholds"], trainer.best["temperatures"]
    return TrainRun(
        net=job.net.to(memory_format=torch.contiguous_format).eval(),  # pyright: ignore[reportCallIssue]
        history=trainer.history,
        best_metric=max(trainer.best["metric"], 0.0),
        best_epoch=trainer.best["epoch"],
        thresholds=None if thresholds is None else tuple(thresholds),
        temperatures=None if temperatures is None else tuple(temperatures),
        classes=classes,
        preprocessing=job.preprocessing,
        recipe=job.recipe,
        settings=job.settings,
        seconds=trainer.elapsed,
        output=job.output,
        notes=tuple(notes),
        finished=trainer.epoch >= job.recipe.epochs or trainer.agreeing.go_on(),
        cost=measure_cost(trainer),
    )


@contextmanager
def as_given(trainer: Trainer) -> Iterator[None]:
    """However it ends, the networks are left without hooks, and the trained one with those parameters trainable that
    were so: what a run that broke off had frozen is not what the next one is to keep frozen.
    """
    try:
        yield
    finally:
        trainer.freezing.restore()
        if trainer.imitation is not None:
            trainer.imitation.close()


def _check(trainer: Trainer, request: TrainRequest, *, resumed: bool) -> None:
    """Put the trainer where it starts; the last that can refuse what was asked for."""
    if request.branch is not None and not resumed:
        branch_off(trainer, request.branch)
    elif trainer.job.recipe.solve_head and not resumed:
        headed_parts(trainer.net)
    if trainer.imitation is not None:
        job = trainer.job
        trainer.imitation.check(len(job.loader.split.classes), job.preprocessing, job.device)


def _run(trainer: Trainer, request: TrainRequest, *, resumed: bool, notes: list[str]) -> TrainRun:
    if request.branch is not None and not resumed:
        keep_best(trainer)
    begin(trainer, resumed=resumed)
    if trainer.job.recipe.solve_head and not resumed and request.branch is None:
        # before what takes minutes; behind it the first step sees it, and saves
        end_if_told(trainer.job, "nothing was trained yet, run it again with --resume")
        trainer.start_from_solved_head()
    with lone_pixels_learnt(trainer.job.net, trainer.job.settings.precision, trainer.job.device):
        trainer.run()
    return result_of(trainer, notes)
