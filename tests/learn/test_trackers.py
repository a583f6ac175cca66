"""What experiment trackers are told: a recorded one always, the real ones where they are installed."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from convscale.errors import UserError
from convscale.learn import trackers
from convscale.learn.progress import Event
from convscale.learn.trackers import Tracked, Tracker, Tracking
from convscale.pipeline.tracked import tracked

ROW = {
    "kind": "epoch",
    "epoch": 2,
    "epochs": 3,
    "train_loss": 0.5,
    "val_loss": math.nan,
    "val_top1": 0.75,
    "val_map": None,
    "lr": 0.1,
    "images": 10,
    "train_seconds": 1.0,
    "images_per_s": 10.0,
    "wait_share": 0.25,
    "seconds": 2.0,
    "skipped_steps": 0,
    "best": 0.75,
    "seconds_left": 1.0,
}


class Recorded(Tracker):
    """Keeps what it is told, and fails when it is told to."""

    told: list[object] = []  # noqa: RUF012
    fails = False

    def __init__(self, run: Tracked) -> None:
        self.told.append(dict(run.facts))

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        if self.fails:
            raise ConnectionError("the server is away\nand more")
        self.told.append((epoch, dict(values)))

    def end(self, *, finished: bool) -> None:
        self.told.append(finished)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    monkeypatch.setattr(trackers, "_KINDS", {**trackers._KINDS, "mlflow": Recorded})
    monkeypatch.setattr(Recorded, "told", [])
    return []


def test_a_tracker_is_told_of_every_epoch(events: list[Event], tmp_path: Path) -> None:
    tracking = Tracking("mlflow", Tracked(name="a", folder=tmp_path, facts={"lr": 0.1}), events.append)
    tracking({"kind": "note", "text": "x"})
    tracking(ROW)  # pyright: ignore[reportArgumentType]
    tracking.end(finished=True)
    facts, (epoch, values), finished = Recorded.told
    assert (facts, epoch, finished) == ({"lr": 0.1}, 2, True)
    assert values.pop("val_loss") != values.get("val_loss")  # NaN is told as it is
    assert values == {
        "train_loss": 0.5,
        "val_top1": 0.75,
        "lr": 0.1,
        "images_per_s": 10.0,
        "wait_share": 0.25,
        "seconds": 2.0,
    }
    assert [event["kind"] for event in events] == ["note", "epoch"]


def test_a_tracker_that_fails_is_said_once(
    events: list[Event], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recorded, "fails", True)
    tracking = Tracking("mlflow", Tracked(name="a", folder=tmp_path), events.append)
    tracking(ROW)  # pyright: ignore[reportArgumentType]
    tracking(ROW)  # pyright: ignore[reportArgumentType]
    tracking.end(finished=False)
    notes = [event["text"] for event in events if event["kind"] == "note"]
    assert notes == ["mlflow fails, and is told nothing more: the server is away"]
    assert Recorded.told == [{}]


class NeverBegins(Recorded):
    def __init__(self, run: Tracked) -> None:
        raise PermissionError("api_key not configured (no-tty)\nand more")


def test_a_tracker_that_can_not_begin_is_said_once(
    events: list[Event], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training ended before it began, behind an emptied folder; a fit ended after it had chosen for hours."""
    monkeypatch.setattr(trackers, "_KINDS", {"mlflow": NeverBegins})
    with tracked("mlflow", tmp_path, {}, events.append) as told:
        assert isinstance(told, Tracking)
        told(ROW)  # pyright: ignore[reportArgumentType]
        told.tell({"test_top1": 0.5}, 3)
    notes = [event["text"] for event in events if event["kind"] == "note"]
    assert notes == ["mlflow can not begin a run, and is told nothing: api_key not configured (no-tty)"]
    assert [event["kind"] for event in events] == ["note", "epoch"]
    assert (told.id, list(tmp_path.iterdir()), Recorded.told) == ("", [], [])  # there is no run to go on with


def test_trackios_run_has_the_name_that_trackio_gave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a name that an earlier run has trackio makes another; going on by the asked name went on with that run."""
    asked: list[tuple[object, object]] = []

    def init(**options: object) -> SimpleNamespace:
        asked.append((options["name"], options["resume"]))
        return SimpleNamespace(name=options["name"] if options["resume"] == "allow" else "dainty-sunset-1")

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=init))  # pyright: ignore[reportArgumentType]
    first = Tracking("trackio", Tracked(name="one", folder=tmp_path), print)
    again = Tracking("trackio", Tracked(name="one", folder=tmp_path, again=first.id), print)
    assert (first.id, again.id) == ("dainty-sunset-1", "dainty-sunset-1")
    assert asked == [("one", "never"), ("dainty-sunset-1", "allow")]


@pytest.mark.parametrize("away", [False, True])
def test_mlflows_run_that_could_not_be_told_its_facts_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, away: bool
) -> None:
    """It was left as RUNNING for ever. What a server that is away says to that is no second note."""
    calls: list[tuple[object, ...]] = []

    class Client:
        def __init__(self, tracking_uri: str) -> None:
            pass

        def get_experiment_by_name(self, name: str) -> SimpleNamespace:
            return SimpleNamespace(experiment_id="7")

        def create_run(self, experiment: str, run_name: str) -> SimpleNamespace:
            calls.append(("create", experiment, run_name))
            return SimpleNamespace(info=SimpleNamespace(run_id="r1"))

        def log_param(self, run_id: str, key: str, value: str) -> None:
            calls.append(("param", run_id, key))
            if key == "model":
                raise ConnectionError("no answer")

        def set_terminated(self, run_id: str, status: str) -> None:
            calls.append(("end", run_id, status))
            if away:
                raise ConnectionError("still no answer")

    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=Client))  # pyright: ignore[reportArgumentType]
    events: list[Event] = []
    tracking = Tracking("mlflow", Tracked(name="one", folder=tmp_path, facts={"lr": 1, "model": "m"}), events.append)
    tracking.end(finished=True)
    assert calls == [("create", "7", "one"), ("param", "r1", "lr"), ("param", "r1", "model"), ("end", "r1", "FAILED")]
    notes = [event["text"] for event in events if event["kind"] == "note"]
    assert (notes, tracking.id) == (["mlflow can not begin a run, and is told nothing: no answer"], "")


def test_an_unknown_or_missing_tracker_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="tracker 'mlflw' is unknown"):
        Tracking("mlflw", Tracked(name="a", folder=tmp_path), print)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--track wandb needs wandb, which is not installed; pip install wandb"):
        Tracking("wandb", Tracked(name="a", folder=tmp_path), print)


@pytest.mark.filterwarnings("ignore:.*``noload`` loader strategy:DeprecationWarning")  # MLflow's own, of SQLAlchemy
def test_mlflow_on_sqlite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracking = Tracking("mlflow", Tracked(name="one", folder=tmp_path, facts={"lr": 0.1, "model": "m"}), lambda _: None)
    tracking(ROW)  # pyright: ignore[reportArgumentType]
    tracking.end(finished=True)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("convscale")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("one", "FINISHED")
    assert run.data.params == {"lr": "0.1", "model": "m"}
    assert (run.data.metrics["val_top1"], run.data.metrics["train_loss"]) == (0.75, 0.5)


def test_trackio_keeps_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # read when it is imported
    pytest.importorskip("trackio")
    tracking = Tracking("trackio", Tracked(name="one", folder=tmp_path, facts={"lr": 0.1}), lambda _: None)
    tracking(ROW)  # pyright: ignore[reportArgumentType]
    tracking.end(finished=True)
    assert list(tmp_path.rglob("*.db"))


def test_wandb_keeps_a_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracking = Tracking("wandb", Tracked(name="one", folder=tmp_path, facts={"lr": 0.1}), lambda _: None)
    tracking(ROW)  # pyright: ignore[reportArgumentType]
    tracking.end(finished=True)
    assert list(tmp_path.rglob("*.wandb"))


@pytest.mark.filterwarnings("ignore:.*``noload`` loader strategy:DeprecationWarning")  # MLflow's own, of SQLAlchemy
def test_mlflow_goes_on_with_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    first = Tracking("mlflow", Tracked(name="one", folder=tmp_path, facts={"lr": 0.1}), lambda _: None)
    first.end(finished=False)
    again = Tracking("mlflow", Tracked(name="one", folder=tmp_path, again=first.id), lambda _: None)
    again.tell({"test_top1": 0.5}, 3)
    again.end(finished=True)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("convscale").experiment_id])
    assert (run.info.run_id, run.info.status, run.data.metrics) == (first.id, "FINISHED", {"test_top1": 0.5})
