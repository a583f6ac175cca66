"""What a run writes while it trains: training states, the best checkpoint, the log."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from convscale.files import json_numbers, write_text
from convscale.images.digest import data_digest
from convscale.learn.checkpoint import (
    batches_of,
    drop_from,
    list_checkpoints,
    prune,
    save_checkpoint,
    verify_checkpoint,
)
from convscale.learn.job import Job
from convscale.learn.record import PREDICTIONS, SCHEMA_VERSION, EpochRow
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
        self.digest = data_digest((job.loader.split, job.validation))
        """What the data of training and validation are known by."""
        self._commit = code_commit()

    def save_state(
        self, batches: int, net: nn.Module, metrics: dict[str, object], state: dict[str, Any], *, anew: bool = False
    ) -> None:
        """A training state after so many batches of the run, of which the last few are kept; ``anew`` where one that
        stands there knows less: of an epoch's last step, before it was validated.
        """
        name = f"step-{batches:08d}"
        if anew and (self.folder / "checkpoints" / name).exists():
            self._save_anew("step", batches, net, metrics, self._with_settings(state))
            prune(self.folder, keep=self.job.keep)
        elif self._save(name, net, metrics, self._with_settings(state)):
            prune(self.folder, keep=self.job.keep)

    def save_best(self, batches: int, net: nn.Module, metrics: dict[str, object]) -> None:
        """The best network so far, in the place of the one before."""
        self._save(f"best-{batches:08d}", net, metrics, None)
        prune(self.folder, keep=1, kind="best")

    def go_back(self, batches: int, net: nn.Module, metrics: dict[str, object], state: dict[str, Any]) -> None:
        """Let the folder stand where a rollback has put the run: nothing is left of what was written since."""
        self._save_anew("step", batches, net, metrics, self._with_settings(state))
        prune(self.folder, keep=self.job.keep)
        self._best_as_known(batches, net, metrics, state)
        self.write_log(state["numbers"]["history"])

    def take_up(
        self, place: Path, batches: int, net: nn.Module, metrics: dict[str, object], state: dict[str, Any]
    ) -> None:
        """Put right what a rollback, or an epoch's end, left that was cut short before the state in ``place`` was all.

        The state gets its own number, and a best network of later gives way to the one that the state knows. Later
        states were passed over as damaged: left there, they would count for the last few that are kept.
        """
        drop_from(self.folder, batches_of(place) + 1)
        if batches_of(place) > batches:
            drop_from(self.folder, batches, keep=place)
        self._best_as_known(batches, net, metrics, state)

    def _best_as_known(self, batches: int, net: nn.Module, metrics: dict[str, object], state: dict[str, Any]) -> None:
        """Let no best network of after so many batches stand: every earlier one would be taken for an older."""
        if not any(batches_of(place) > batches for place in list_checkpoints(self.folder, ("best",))):
            return
        weights, epoch = state["best_weights"], state["numbers"]["best"]["epoch"]
        if weights is None:
            drop_from(self.folder, batches + 1, kind="best")
        else:
            best = copy.deepcopy(net)
            best.load_state_dict(weights)
            self._save_anew("best", epoch * self.steps_per_epoch, best, metrics | {"epoch": epoch}, None)

    def _save_anew(
        self, kind: str, batches: int, net: nn.Module, metrics: dict[str, object], state: dict[str, Any] | None
    ) -> None:
        """A checkpoint in the place of all of its kind after so many batches and more.

        It is written as the newest of all, and takes its number when the others are gone: at every moment the newest is
        whole, and none that was given up stands before it.
        """
        newest = max(map(batches_of, list_checkpoints(self.folder, (kind,))), default=batches - 1)
        name = f"{kind}-{max(batches, newest + 1):08d}"
        self._save(name, net, metrics, state)
        drop_from(self.folder, batches, kind=kind, keep=self.folder / "checkpoints" / name)

    def _with_settings(self, state: dict[str, Any]) -> dict[str, Any]:
        settings = self.job.settings
        return {**state, "settings": {"precision": settings.precision, "layout": settings.layout}}

    def write_log(self, history: Sequence[EpochRow]) -> None:
        """The whole history, a line for each epoch."""
        lines = "".join(json.dumps(json_numbers(row)) + "\n" for row in history)
        write_text(self.folder / "log.jsonl", lines)

    def _save(self, name: str, net: nn.Module, metrics: dict[str, object], state: dict[str, Any] | None) -> bool:
        """Write a checkpoint, unless it stands there undamaged."""
        target = self.folder / "checkpoints" / name
        if _whole(target):
            return False
        (self.folder / PREDICTIONS).unlink(missing_ok=True)  # they are of the network that stood here before
        meta = {
            "record_version": SCHEMA_VERSION,
            "recipe": self.job.recipe.to_dict(),
            "seed": self.job.seed,
            "steps_per_epoch": self.steps_per_epoch,
            "metrics": json_numbers(metrics),
            "data_digest": self.digest,
            "val_images": len(self.job.validation),
            "commit": self._commit,
            **({} if self.job.data is None else {"splits": self.job.data}),
            **({"category_ids": list(self.job.category_ids)} if self.job.category_ids else {}),
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
