"""What is served: which artefact of a folder is taken up, and when."""

from __future__ import annotations

import asyncio
import errno
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from convscale.artifact.artifact import load_artifact
from convscale.errors import UserError
from convscale.runtimes.openvino import OpenVinoRunner
from convscale.serve import answering as answering_module
from convscale.serve.answering import Answering
from convscale.serve.app import build
from convscale.serve.bell import Bell
from convscale.serve.guard import Log
from convscale.serve.metrics import SHARED, Metrics
from convscale.serve.models import How, Model, Named
from convscale.serve.settings import Settings
from tests.serve.conftest import copied, pixels


def test_a_version_seen_while_it_is_copied_is_taken_once_it_is_whole(tmp_path: Path) -> None:
    """Its record came first, so it was refused, and for ever."""
    top, whole = tmp_path / "versions", copied(tmp_path / "whole").folder
    copied(top / "1")
    answering = Answering(Settings(models=(Named("m", top),), log="none"))
    try:
        model = answering.models.all["m"]
        (top / "2").mkdir()
        late = (top / "2" / "model.onnx", whole / "model.onnx")
        for file in whole.iterdir():
            if file != late[1]:
                shutil.copy2(file, top / "2")
        with pytest.raises(UserError, match=r"lacks its file model\.onnx"):
            model.refresh()
        assert model.refresh() is None  # said once
        late[0].write_bytes(late[1].read_bytes()[:1000])
        with pytest.raises(UserError, match=r"the checksum of model\.onnx is wrong"):
            model.refresh()
        late[0].write_bytes(late[1].read_bytes())
        taken = model.refresh()
        assert taken is not None
        assert (taken.number, model.current.number, model.refresh()) == (2, 2, None)
    finally:
        answering.close()


def test_of_a_fit_what_it_ships_is_served(tmp_path: Path) -> None:
    copied(tmp_path / "photos" / "artifact")
    (tmp_path / "photos" / "fit.json").write_text("{}")
    answering = Answering(Settings(models=(Named("photos", tmp_path / "photos"),), log="none"))
    try:
        model = answering.models.all["photos"]
        assert (model.current.artifact.folder, model.refresh()) == (tmp_path / "photos" / "artifact", None)
    finally:
        answering.close()


def test_at_the_start_the_highest_that_can_be_served_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A worker that died beside a newer version, which the others had refused, did not come up again."""
    top = tmp_path / "versions"
    for number in ("1", "2", "10"):
        copied(top / number)
    for number in ("2", "10"):
        (top / number / "classes.json").write_text("[]")
    settings = Settings(models=(Named("m", top),))
    answering = Answering(settings)
    try:
        model = answering.models.all["m"]
        assert (model.current.number, model.refresh()) == (1, None)  # what was refused is not opened again and again
        with pytest.raises(UserError, match=r"the checksum of classes\.json is wrong"):
            model.refresh(again=True)
        said = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
        assert [(line["event"], line["version"]) for line in said] == [
            ("version refused", "10"),
            ("version refused", "2"),
        ]
        assert all("the checksum of classes.json is wrong" in line["why"] for line in said)
        shutil.copy2(top / "1" / "classes.json", top / "10")
        taken = model.refresh()
        assert taken is not None
        assert taken.number == 10
    finally:
        answering.close()
    (top / "1" / "classes.json").write_text("[]")
    shutil.rmtree(top / "10")
    with pytest.raises(UserError, match=r"versions/2 .*the checksum of classes\.json is wrong"):
        Answering(settings)


def test_what_one_worker_is_asked_to_load_all_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a look of their own the others served the old version for ever."""
    (shared := tmp_path / "shared").mkdir()
    monkeypatch.setattr(answering_module, "LISTEN_S", 0.01)
    top = tmp_path / "versions"
    copied(top / "1")
    settings = Settings(models=(Named("m", top),), log="none", poll_s=0.0)
    workers = [Answering(settings) for _ in range(3)]
    for each in workers[:2]:
        with monkeypatch.context() as patch:  # prometheus_client reads the same variable
            patch.setenv(SHARED, str(shared))
            each.bell = Bell()

    async def asked() -> None:
        watching = [asyncio.create_task(each.watch()) for each in workers]
        copied(top / "2")
        await asyncio.sleep(0.05)
        assert [each.models.all["m"].current.number for each in workers] == [1, 1, 1]
        await workers[0].load("m")
        for _ in range(1_000):
            if workers[1].models.all["m"].current.number == 2:
                break
            await asyncio.sleep(0.01)
        assert [each.models.all["m"].current.number for each in workers] == [2, 2, 1]  # the third is of another server
        assert watching[2].done()  # it looks only when it is asked
        for each in watching:
            each.cancel()

    try:
        asyncio.run(asked())
        assert [each.bell.heard() for each in workers[:2]] == [set(), set()]
    finally:
        for each in workers:
            each.close()


class Unwritable:
    """A standard error that nothing can be written to."""

    def __init__(self, error: Exception, *, late: bool = False) -> None:
        self.error, self.late, self.tried = error, late, 0

    def write(self, _: str) -> None:
        self.tried += 1
        if not self.late:
            raise self.error

    def flush(self) -> None:
        raise self.error


@pytest.mark.parametrize(
    "stream",
    [
        Unwritable(OSError(errno.ENOSPC, "No space left on device"), late=True),
        Unwritable(BrokenPipeError(errno.EPIPE, "Broken pipe")),
        Unwritable(ValueError("I/O operation on closed file")),
        None,
    ],
    ids=["full", "gone", "closed", "none"],
)
def test_a_log_that_can_not_be_written_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: Unwritable | None
) -> None:
    """The look for new versions ended with its first line, and new versions were never taken up again."""
    top = tmp_path / "versions"
    copied(top / "1")
    answering = Answering(Settings(models=(Named("m", top),), poll_s=0.01))

    async def watched() -> None:
        watching = asyncio.create_task(answering.watch())
        for number in (2, 3):
            copied(tmp_path / str(number)).folder.rename(top / str(number))
            for _ in range(1_000):
                tried = stream is None or stream.tried == number - 1  # anew each time: the disk may have room again
                if watching.done() or (tried and answering.models.all["m"].current.number == number):
                    break
                await asyncio.sleep(0.01)
        assert (answering.models.all["m"].current.number, watching.done()) == (3, False)
        watching.cancel()

    monkeypatch.setattr(sys, "stderr", stream)
    try:
        asyncio.run(watched())
    finally:
        answering.close()
    assert stream is None or stream.tried == 2


def test_workers_agree_on_the_number_of_an_artefact_in_anothers_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each counted the changes that it saw, so a worker that started again called the same artefact version 1."""
    (shared := tmp_path / "shared").mkdir()
    place, kinds = tmp_path / "m", [copied(tmp_path / name).folder for name in "abc"]
    for number, folder in enumerate(kinds):
        load_artifact(folder).keep(model=f"network {number}")

    def put(number: int) -> None:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(kinds[number], place)

    put(0)
    how, watcher = How(), Metrics().watching("m")
    alone = Model(Named("m", place), how, watcher)
    monkeypatch.setenv(SHARED, str(shared))
    first, second = (Model(Named("m", place), how, watcher) for _ in range(2))
    put(1)
    assert first.refresh() is not None  # the second does not look
    put(2)
    for each in (first, second):
        assert each.refresh() is not None
    third = Model(Named("m", place), how, watcher)
    assert [each.current.number for each in (first, second, third)] == [3, 3, 3]
    assert {each.current.takes.version for each in (first, second, third)} == {"3"}
    put(1)
    assert first.refresh() is not None
    assert Model(Named("other", place), how, watcher).current.number == 1
    monkeypatch.delenv(SHARED)
    assert alone.refresh() is not None
    assert (first.current.number, alone.current.number) == (2, 2)


@pytest.mark.parametrize(
    ("batch_size", "forms"), [(1, [1]), (5, [1, 2, 4, 5]), (6, [1, 2, 4, 6, 8]), (8, [1, 2, 4, 8])]
)
def test_nothing_is_compiled_while_a_quantised_network_answers(
    tmp_path: Path, batch_size: int, forms: list[int]
) -> None:
    """OpenVINO made its forms for 2, 4 and 8 images while clients waited."""
    pytest.importorskip("openvino")
    folder = copied(tmp_path / "m", "openvino_int8").folder
    load_artifact(folder).keep(runtime={"name": "openvino", "threads": 1, "batch_size": batch_size, "streams": 1})
    model = Model(Named("m", folder), How(), Metrics().watching("m"))
    artifact = model.current.artifact
    runner = artifact.runner
    assert isinstance(runner, OpenVinoRunner)
    assert model.current.batcher.batch_size == batch_size
    assert sorted(form or 0 for form in runner._forms) == forms
    for count in range(1, batch_size + 1):
        artifact(pixels(artifact, count))
    assert sorted(form or 0 for form in runner._forms) == forms


def test_a_bell_rings_for_one_model_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SHARED, str(tmp_path))
    one, other = Bell(), Bell()
    one.ring("birds-1.0")
    assert (other.heard(), other.heard()) == ({"birds-1.0"}, set())
    assert Bell().heard() == set()  # who comes later opens the newest anyway


def test_a_bell_that_can_not_be_heard_now_is_heard_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SHARED, str(tmp_path))
    one, other = Bell(), Bell()
    one.ring("birds")

    def full(*_: object) -> list[Path]:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "glob", full)
        assert other.heard() == set()
    assert (other.heard(), other.heard()) == ({"birds"}, set())


def test_models_are_closed_whatever_ended_the_look_for_new_ones() -> None:
    closed: list[str] = []

    async def watch() -> None:
        raise OSError("the look for new versions failed")

    stand_in = SimpleNamespace(
        watch=watch,
        close=lambda: closed.append("closed"),
        settings=Settings(models=(), log="none"),
        metrics=Metrics(),
        log=Log("none"),
        models=SimpleNamespace(all={}),
    )
    app: Any = build(stand_in).app  # pyright: ignore[reportArgumentType]

    async def lived() -> None:
        async with app.router.lifespan_context(app):
            await asyncio.sleep(0)

    with pytest.raises(OSError, match="the look for new versions failed"):
        asyncio.run(lived())
    assert closed == ["closed"]
