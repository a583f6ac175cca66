"""What a training run consists of, once everything is read, checked and built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from convscale.images.preprocess import Preprocessing
from convscale.images.splits import Split
from convscale.learn.distributed import Processes
from convscale.learn.imitate import Imitation, TeacherCache
from convscale.learn.loader import TrainLoader
from convscale.learn.loss import Loss
from convscale.learn.progress import Progress
from convscale.learn.recipe import Recipe
from convscale.learn.settings import Settings


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """What a run consists of; fixed from its start to its end."""

    net: nn.Module
    """On its device, in its layout."""
    recipe: Recipe
    """How to train."""
    loader: TrainLoader
    """Training batches."""
    validation: Split
    """Watched after every epoch."""
    preprocessing: Preprocessing
    """How images become inputs."""
    loss: Loss
    """What is minimised."""
    settings: Settings
    """Precision and layout."""
    seed: int
    """Of everything random."""
    device: torch.device
    """Where to compute."""
    max_seconds: float | None
    """The schedule ends by then; None: after the recipe's epochs."""
    output: Path | None
    """Folder for checkpoints and log; None: nothing is written."""
    checkpoint_seconds: float
    """A training state is written at least this often, and after every epoch."""
    keep: int
    """Training states that are kept."""
    teacher: nn.Module | None
    """Whose outputs are imitated."""
    progress: Progress
    """Told about every step and epoch."""
    stop: Callable[[], bool]
    """Whether the run should save and end before its time."""
    processes: Processes = field(default_factory=Processes)
    """This process among those that train together."""
    teacher_cache: TeacherCache | None = None
    """The teacher's outputs on the disk; None: it is asked each time."""
    max_bad_rate: float = 0.01
    """Share of images that may be unreadable."""
    data: Mapping[str, object] | None = None
    """What the data is known by, as it was opened (``DataSplits.digests``); None: by the sets that are trained on."""
    data_older: Mapping[str, object] | None = None
    """The same as earlier versions wrote it, where a run goes on that one of them may have begun."""
    category_ids: tuple[int, ...] = ()
    """Of a detector: the annotations' own numbers of the classes; empty: they have none."""

    def imitation(self, autocast: Callable[[], AbstractContextManager[object]]) -> Imitation | None:
        """What the teacher adds to the loss, where there is one; ``autocast`` gives the context that it is asked in."""
        if self.teacher is None:
            return None
        return Imitation(
            self.net,
            self.teacher,
            self.recipe,
            multilabel=self.loader.split.multilabel,
            autocast=autocast,
            cache=self.teacher_cache,
        )
