"""One trial: a candidate trained briefly on part of the data, wherever that happens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convscale.arch.spec import NetSpec
from convscale.errors import UserError, first_line
from convscale.files import atomic_path
from convscale.images.sources import open_dataset
from convscale.images.splits import DataSplits, Split
from convscale.learn.progress import Event
from convscale.learn.recipe import Recipe
from convscale.learn.train import train
from convscale.nas.inherit import grown
from convscale.nn.net import ConvNet


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a process needs to know to run a trial; plain values alone."""

    number: int
    """Of the trial."""
    spec: Mapping[str, Any]
    """The candidate, as ``NetSpec.to_dict`` gives it."""
    data: str | None
    """Where the data is read from; None: the splits are given beside the job."""
    recipe: Mapping[str, Any]
    """How it is trained, as ``Recipe.to_dict`` gives it; its epochs are the trial's."""
    seed: int
    """Of the training."""
    device: str
    """Where it is trained."""
    most_images: int
    """Of the train set, at most."""
    threads: int | None = None
    """Compute threads; None: as the process has them."""
    factor: float = 1.0
    """What accuracies are multiplied by before they are compared with ``rungs``."""
    rungs: Mapping[str, float] = field(default_factory=dict)
    """Epoch, as text -> the least value with which the training goes on."""
    save: str | None = None
    """File that the trained weights go to; None: they are not kept."""
    parent: Mapping[str, Any] | None = None
    """The spec of a trained network that this one grows from; None: it starts fresh."""
    parent_weights: str | None = None
    """That network's file."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a trial gave."""

    number: int
    """Of the trial."""
    curve: tuple[float, ...] = ()
    """Validation accuracy (mean average precision for several labels) after each epoch, in [0, 1]."""
    pruned: int = 0
    """The epoch after which it was given up; 0: it was not."""
    failed: str = ""
    """Why it could not be trained."""
    seconds: float = 0.0
    """In training and validation."""
    wait_seconds: float = 0.0
    """Of these, waiting for images."""
    note: str = ""
    """Why it started from fresh weights where it should have grown from others; empty: it did as it should."""

    @property
    def accuracy(self) -> float:
        """The best of the curve."""
        return max(self.curve, default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**dataclasses.asdict(self), "curve": list(self.curve)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Result:
        """From what ``to_dict`` gave."""
        return cls(**{**value, "curve": tuple(value["curve"])})


class _GivenUp(Exception):
    """A trial is behind those before it."""


def part_of(splits: DataSplits, most_images: int) -> DataSplits:
    """The data with at most so many train images, the same ones for every trial: every n-th, over a fixed order."""
    train_split: Split = splits.train
    if len(train_split) <= most_images:
        return splits
    order = torch.randperm(len(train_split), generator=torch.Generator().manual_seed(0))[:most_images]
    return dataclasses.replace(splits, train=train_split.subset(order.sort().values))


def run_job(job: Job, splits: DataSplits | None = None) -> Result:
    """Train a candidate and give its curve. What a user could not put right (no memory, a loss that is not finite) is
    the trial's failure, not the search's. Where it can not grow from its parent it starts from fresh weights, with a
    note.
    """
    curve: list[float] = []
    seconds = wait = 0.0

    def watch(event: Event) -> None:
        nonlocal seconds, wait
        if event["kind"] != "epoch":
            return
        metric = event["val_top1"] if event["val_map"] is None else event["val_map"]
        curve.append(metric if math.isfinite(metric) else 0.0)
        seconds, wait = event["seconds"], wait + event["wait_share"] * event["train_seconds"]
        least = job.rungs.get(str(event["epoch"]))
        if least is not None and event["epoch"] < event["epochs"] and max(curve) * job.factor < least:
            raise _GivenUp

    recipe, pruned, failed, note = Recipe.from_dict(dict(job.recipe)), 0, "", ""
    try:
        if splits is None:
            assert job.data is not None, "a job has a place or splits"
            splits = _opened(job.data)
        spec = NetSpec.from_dict(dict(job.spec))
        recipe = recipe.override({"image_size": spec.input.size})
        begin: NetSpec | ConvNet = spec
        if job.parent is not None:
            try:
                begin = _child(job, spec, splits)
            except UserError as error:
                note = f"from fresh weights: {first_line(error)}"
        with _threads(job.threads):
            run = train(
                begin,
                part_of(splits, job.most_images),
                recipe=recipe,
                device=job.device,
                seed=job.seed,
                progress=watch,
            )
        if job.save is not None:
            _save(run.net, Path(job.save))
    except _GivenUp:
        pruned = len(curve)
    except (UserError, RuntimeError, MemoryError) as error:
        failed = first_line(error)
    return Result(
        number=job.number,
        curve=tuple(curve),
        pruned=pruned,
        failed=failed,
        seconds=seconds,
        wait_seconds=wait,
        note=note,
    )


def _child(job: Job, spec: NetSpec, splits: DataSplits) -> ConvNet:
    """The network grown from its parent's weights."""
    from convscale.nn.state_dicts import read_state_dict

    assert job.parent is not None
    assert job.parent_weights is not None
    parent = ConvNet(NetSpec.from_dict(dict(job.parent)), num_classes=len(splits.classes), in_chans=splits.channels)
    try:
        parent.load_state_dict(read_state_dict(job.parent_weights).tensors)
    except RuntimeError as error:
        raise UserError(f"the weights in {job.parent_weights} do not fit {parent.spec.name}") from error
    return grown(parent, spec, seed=job.seed)


def _save(net: nn.Module, path: Path) -> None:
    """Write a network's weights, all or nothing."""
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        save_file({name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}, temporary)


_OPEN: dict[str, DataSplits] = {}


def _opened(place: str) -> DataSplits:
    """The data of a place, read once in a process."""
    if place not in _OPEN:
        _OPEN.clear()
        _OPEN[place] = open_dataset(place, compare=False)
    return _OPEN[place]


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """While open, PyTorch computes with so many threads."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


More = Callable[[], bool]
"""Whether a further trial may be begun."""
