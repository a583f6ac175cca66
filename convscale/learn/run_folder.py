"""What a run writes while it trains: training states, the best checkpoint, the log."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from convscale.files import json_numbers, write_text
from convscale.images.digest import data_digest
from convscale.learn.checkpoint import prune, save_checkpoint, verify_checkpoint
from convscale.learn.job import Job
from convscale.learn.record import SCHEMA_VERSION, EpochRow
from convscale.machine import code_commit


class RunFolder:
    """The folder of a job.

    Args:
        job: what is trained.
        folder: where to write.
        steps_per_epoch: batches of an epoch.
    """

    def __init__(self, job: Job, folder: Path, steps_per_epoch: int) -> None:
        self.job, self.folder, self.steps_per_epoch = job, folder, steps_per_epoch
        self._digest = data_digest((job.loader.split, job.validation))
        self._commit = code_commit()

    def save_state(self, batches: int, net: nn.Module, metrics: dict[str, object], state: dict[str, object]) -> None:
        """A training state after so many batches of the run, of which the last few are kept."""
        settings = self.job.settings
        state = {**state, "settings": {"precision": settings.precision, "layout": settings.layout}}
        if self._save(f"step-{batches:08d}", net, metrics, state):
            prune(self.folder, keep=self.job.keep)

    def save_best(self, batches: int, net: nn.Module, metrics: dict[str, object]) -> None:
        """The best network so far, in the place of the one before."""
        self._save(f"best-{batches:08d}", net, metrics, None)
        prune(self.folder, keep=1, kind="best")

    def write_log(self, history: Sequence[EpochRow]) -> None:
        """The whole history, a line for each epoch."""
        lines = "".join(json.dumps(json_numbers(row)) + "\n" for row in history)
        write_text(self.folder / "log.jsonl", lines)

    def _save(self, name: str, net: nn.Module, metrics: dict[str, object], state: dict[str, object] | None) -> bool:
        """Write a checkpoint, unless it stands there undamaged."""
        target = self.folder / "checkpoints" / name
        if _whole(target):
            return False
        meta = {
            "record_version": SCHEMA_VERSION,
            "recipe": self.job.recipe.to_dict(),
            "seed": self.job.seed,
            "steps_per_epoch": self.steps_per_epoch,
            "metrics": json_numbers(metrics),
            "data_digest": self._digest,
            "commit": self._commit,
        }
        classes, preprocessing = self.job.loader.split.classes, self.job.preprocessing
        save_checkpoint(target, net, classes=classes, preprocessing=preprocessing, meta=meta, state=state)
        return True


def _whole(place: Path) -> bool:
    """Whether an undamaged checkpoint stands there; a damaged one is removed."""
    if not place.exists():
        return False
    if verify_checkpoint(place) is None:
        return True
    shutil.rmtree(place)
    return False
