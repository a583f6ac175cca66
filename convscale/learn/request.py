"""What a user asks of ``train``, checked."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import torch
from torch import nn

from convscale.arch.spec import NetSpec
from convscale.errors import UserError, check_flag, check_number, check_path, check_whole
from convscale.images.preprocess import Preprocessing
from convscale.images.splits import DataSplits
from convscale.learn.graphs import check_compile
from convscale.learn.progress import Progress
from convscale.learn.recipe import Recipe
from convscale.learn.settings import usable_device
from convscale.learn.trackers import check_tracker
from convscale.networks.foreign import Foreign


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainRequest:
    """``train``'s arguments as one value; the names are the same.

    Raises:
        UserError: a number, flag, path or device is impossible, or a tracker unknown.
    """

    net: nn.Module | NetSpec | Foreign | str
    """To train: a module, or what is to be built."""
    data: DataSplits | str | os.PathLike[str]
    """Splits, or where they are read from."""
    recipe: Recipe
    """With every override."""
    batch_is_asked: bool
    """Whether the batch size is the user's own, which is not lowered in silence."""
    output: Path | None
    """Folder for checkpoints and log; None: nothing is written."""
    device: torch.device
    """Where to compute."""
    seed: int
    """Of weights, order and augmentation."""
    max_seconds: float | None
    """The schedule ends by then; None: after the recipe's epochs."""
    progress: Progress | None
    """Called with every event."""
    init: str | os.PathLike[str] | None
    """What the weights start from."""
    preprocessing: Preprocessing | None
    """How images become inputs; None: to be chosen."""
    teacher: nn.Module | str | os.PathLike[str] | None
    """Whose outputs are imitated."""
    teacher_cache: Path | None
    """Folder where its outputs are kept; None: nowhere."""
    resume: bool
    """Go on from the newest state in ``output``."""
    overwrite: bool
    """Replace an output folder that exists."""
    workers: int | None
    """Processes that decode files; None: one per core."""
    checkpoint_seconds: float
    """A training state is written at least this often."""
    keep: int
    """Training states that are kept."""
    tensorboard: bool
    """Write the history for TensorBoard too."""
    track: str | None = None
    """The experiment tracker that is told of the run; None: none."""
    recipe_from: object = None
    """What the recipe was asked for by: a name, a file, itself; None: nothing."""
    branch: Path | None = None
    """A training state of the stable phase of another run, to decay from; None: none."""

    def __post_init__(self) -> None:
        for name in ("resume", "overwrite", "tensorboard"):
            check_flag(name, getattr(self, name))
        if self.track is not None:
            if self.output is None:
                raise UserError(f"track {self.track!r} needs an output folder; give output")
            check_tracker(self.track)
        if self.branch is not None:
            self._check_branch(check_path("branch", self.branch))
        right = "a number of seconds of at least 0"
        checked: dict[str, object] = {
            "seed": checked_seed(self.seed),
            "keep": check_whole("keep", self.keep),
            "checkpoint_seconds": check_number("checkpoint_seconds", self.checkpoint_seconds, right, 0),
            "device": usable_device(self.device),
        }
        check_compile(self.recipe, usable_device(self.device))
        if self.workers is not None:
            checked["workers"] = check_whole("workers", self.workers, 0)
        if self.max_seconds is not None:
            right = "a number of seconds above 0"
            checked["max_seconds"] = check_number("max_seconds", self.max_seconds, right, math.ulp(0.0))
        if self.output is not None:
            checked["output"] = check_path("output", self.output)
        if self.teacher_cache is not None:
            checked["teacher_cache"] = check_path("teacher_cache", self.teacher_cache)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def _check_branch(self, place: Path) -> None:
        if self.recipe.schedule != "wsd":
            raise UserError(f"branch is {place}, and the schedule {self.recipe.schedule}; it must be wsd, which decays")
        for name in ("init", "max_seconds"):
            if getattr(self, name) is not None:
                raise UserError(f"branch is {place}, which brings weights and position; leave {name} out")
        object.__setattr__(self, "branch", place)


def checked_seed(seed: object) -> int:
    """``seed`` as an int that torch takes."""
    number = int(seed) if isinstance(seed, Integral) and not isinstance(seed, bool) else None
    if number is None or not -(2**63) <= number < 2**64:
        raise UserError(f"seed is {seed!r}; it must be a whole number of at most 64 bits")
    return number
