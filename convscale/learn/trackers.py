"""Experiment trackers beside TensorBoard: MLflow, Weights & Biases, trackio, behind one small interface.

Each is told the recipe and the facts of a run once, its numbers after every epoch, and how it ended. A tracker that
fails is said once, and the training goes on.
"""

from __future__ import annotations

import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from convscale.errors import UserError, check_text, first_line
from convscale.learn.progress import Event, Progress

TRACKERS = ("mlflow", "wandb", "trackio")
PROJECT = "convscale"
"""What runs stand under, where the tracker's own environment variables name nothing."""
_NUMBERS = ("train_loss", "val_loss", "val_top1", "val_map", "lr", "images_per_s", "wait_share", "seconds")


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """What a tracker is told of a run at its start."""

    name: str
    """Its folder's."""
    folder: Path
    """Where a tracker that keeps files may put them."""
    facts: Mapping[str, object] = field(default_factory=dict)
    """The recipe's keys, the network, the data's digest, the commit."""
    again: str = ""
    """Its id, where it was begun before and goes on; empty: it is a new one."""


class Tracker(ABC):
    """A run in an experiment tracker."""

    library = ""
    """What must be installed; empty: nothing."""
    id = ""
    """By which the tracker knows the run."""

    @abstractmethod
    def __init__(self, run: Tracked) -> None:
        """Begin."""

    @abstractmethod
    def log(self, values: Mapping[str, float], epoch: int) -> None:
        """Numbers of an epoch."""

    @abstractmethod
    def end(self, *, finished: bool) -> None:
        """The end."""


class MlflowTracker(Tracker):
    """MLflow: where ``MLFLOW_TRACKING_URI`` says, else a SQLite file in the run's folder."""

    library = "mlflow"

    def __init__(self, run: Tracked) -> None:
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.folder.absolute() / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=uri)
        if run.again:
            self.id = run.again
            self._client.update_run(self.id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        found = self._client.get_experiment_by_name(name)
        if found is None:
            place = None if os.environ.get("MLFLOW_TRACKING_URI") else (run.folder.absolute() / "mlflow").as_uri()
            experiment = self._client.create_experiment(name, artifact_location=place)
        else:
            experiment = found.experiment_id
        self.id = self._client.create_run(experiment, run_name=run.name).info.run_id
        try:
            for key, value in run.facts.items():
                self._client.log_param(self.id, key, str(value)[:500])
        except BaseException:  # it is told nothing more, and would run for ever
            with suppress(Exception):
                self._client.set_terminated(self.id, status="FAILED")
            raise

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        for key, value in values.items():
            self._client.log_metric(self.id, key, value, step=epoch)

    def end(self, *, finished: bool) -> None:
        self._client.set_terminated(self.id, status="FINISHED" if finished else "KILLED")


class WandbTracker(Tracker):
    """Weights & Biases; offline with ``WANDB_MODE=offline``, by its own variables otherwise."""

    library = "wandb"

    def __init__(self, run: Tracked) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=run.name,
            dir=str(run.folder),
            config=dict(run.facts),
            id=run.again or None,
            resume="allow" if run.again else None,
        )
        self.id = str(self._run.id)

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        self._run.log(dict(values), step=epoch)

    def end(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class TrackioTracker(Tracker):
    """trackio: a local SQLite file (``TRACKIO_DIR``), shown by ``trackio show``."""

    library = "trackio"

    def __init__(self, run: Tracked) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        self._trackio = trackio
        facts = {key: value if isinstance(value, int | float) else str(value) for key, value in run.facts.items()}
        begun = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT") or PROJECT,
            name=run.again or run.name,
            config=facts,
            embed=False,
            resume="allow" if run.again else "never",
        )
        self.id = str(begun.name)  # another than the asked one, where an earlier run has that

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        self._trackio.log(dict(values), step=epoch)

    def end(self, *, finished: bool) -> None:
        self._trackio.finish()


_KINDS: Mapping[str, type[Tracker]] = {"mlflow": MlflowTracker, "wandb": WandbTracker, "trackio": TrackioTracker}


class Tracking:
    """A progress function that also tells a tracker. One that can not begin a run, such as without a login or with its
    server away, is said once: what was to be tracked goes on.

    Raises:
        UserError: the tracker is unknown, or not installed.
    """

    def __init__(self, kind: str, run: Tracked, progress: Progress) -> None:
        self._kind, self._progress, self._failed = kind, progress, False
        self._tracker: Tracker | None = None
        begin = _KINDS[check_tracker(kind)]
        try:
            self._tracker = begin(run)
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and error.name == kind:
                raise UserError(_missing(kind)) from error
            self._failed = True
            progress({"kind": "note", "text": f"{kind} can not begin a run, and is told nothing: {first_line(error)}"})

    def __call__(self, event: Event) -> None:
        if event["kind"] == "epoch":
            given = {key: event.get(key) for key in _NUMBERS}
            values = {key: float(value) for key, value in given.items() if isinstance(value, int | float)}
            self._try(lambda tracker: tracker.log(values, event["epoch"]))
        self._progress(event)

    @property
    def id(self) -> str:
        """By which the tracker knows the run; empty where none could be begun."""
        return self._tracker.id if self._tracker else ""

    def tell(self, values: Mapping[str, float], epoch: int) -> None:
        """Numbers that no epoch has: what came of the run in the end."""
        self._try(lambda tracker: tracker.log(values, epoch))

    def end(self, *, finished: bool) -> None:
        """Say how the run ended."""
        self._try(lambda tracker: tracker.end(finished=finished))

    def _try(self, call: Callable[[Tracker], object]) -> None:
        """A server that is away must not end a training."""
        if self._failed or self._tracker is None:
            return
        try:
            call(self._tracker)
        except Exception as error:
            self._failed = True
            self._progress(
                {"kind": "note", "text": f"{self._kind} fails, and is told nothing more: {first_line(error)}"}
            )


def need_tracker(kind: str) -> str:
    """A tracker's name; UserError if it is unknown, or not installed."""
    library = _KINDS[check_tracker(kind)].library
    if library and importlib.util.find_spec(library) is None:
        raise UserError(_missing(kind))
    return kind


def _missing(kind: str) -> str:
    return f"--track {kind} needs {kind}, which is not installed; pip install {kind}"


def check_tracker(kind: str) -> str:
    """A tracker's name; UserError if it is unknown."""
    return check_text("tracker", kind, TRACKERS)
