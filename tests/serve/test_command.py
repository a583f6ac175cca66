"""``convscale serve`` as it is started, and how it ends."""

from __future__ import annotations

import http.client
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import tritonclient.http as triton

from convscale.artifact.artifact import Artifact
from convscale.errors import UserError
from convscale.serve.answering import Answering
from convscale.serve.app import build
from convscale.serve.models import Named, named, newest
from convscale.serve.server import _Worker, _Workers, server_of
from convscale.serve.settings import TOKEN, Settings
from tests.serve.conftest import as_detector, copied, pixels

COLUMNS = 200


@contextmanager
def started(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], dict]]:
    """A server in a process of its own, and what it says when it serves."""
    command = [sys.executable, "-W", "error", "-m", "convscale", "serve", *map(str, arguments), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        text = ""
        while not text.endswith("\n}\n"):
            line = process.stdout.readline()
            assert line, f"it ended: {process.communicate()}"
            text += line
        try:
            yield process, json.loads(text)
        finally:
            process.kill()


def asks_until(
    address: tuple[str, int], body: bytes, size: str, right: np.ndarray, counts: dict[str, int], stop: threading.Event
) -> None:
    """A client that asks again and again, on one connection for as long as the server keeps it."""
    line = http.client.HTTPConnection(*address, timeout=20)
    while not stop.is_set():
        try:
            line.connect()
        except OSError:  # nobody listens any more
            return
        try:
            line.request("POST", "/v2/models/m/infer", body, {"Inference-Header-Content-Length": size})
            answer = line.getresponse()
            data = answer.read()
        except (ConnectionError, http.client.HTTPException):
            counts["lost"] += 1
            continue
        finally:
            line.close()
        good = answer.status == 200 and np.array_equal(np.frombuffer(data[-right.nbytes :], "<f4"), right)
        counts["good" if good else "wrong"] += 1


@pytest.mark.parametrize("workers", [1, 2])
def test_told_to_stop_under_load_it_answers_what_it_took(artifact: Artifact, workers: int) -> None:
    image = pixels(artifact, 1)
    body, size = _binary(image)
    counts = {"good": 0, "wrong": 0, "lost": 0}
    with started(f"m={artifact.folder}", "--workers", workers) as (process, said):
        assert said["models"][0]["checked"].startswith("4 reference images")
        host, _, port = said["url"].removeprefix("http://").partition(":")
        address, stop = (host, int(port)), threading.Event()
        arguments = (address, body, size, artifact(image)[0], counts, stop)
        clients = [threading.Thread(target=asks_until, args=arguments) for _ in range(6)]
        for each in clients:
            each.start()
        end = time.monotonic() + 60
        while counts["good"] < 50 and time.monotonic() < end:
            time.sleep(0.01)
        metrics = _get(address, "/metrics")
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        for each in clients:
            each.join(30)
        stop.set()
        assert process.returncode == 0
    assert counts["good"] >= 50
    assert (counts["wrong"], counts["lost"]) == (0, 0)
    lines = [json.loads(line) for line in err.splitlines()]
    assert [line["status"] for line in lines if line["path"].endswith("/infer")] == [200] * counts["good"]
    counted = metrics.partition('convscale_requests_total{endpoint="infer",model="m",status="200"} ')[2]
    assert 44 <= float(counted.partition("\n")[0]) <= counts["good"]  # of all processes together


def test_signals_that_come_together_are_one_stop(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C and systemd tell each worker, and their parent tells it once more: what was accepted was cancelled."""
    settings = Settings(models=(Named("m", artifact.folder),), drain_s=0.5, log="none")
    answering = Answering(settings)
    try:
        guard = build(answering)
        server = server_of(guard, settings, lambda: None)
        now = [100.0]
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        for moment, number in ((100.0, signal.SIGINT), (100.9, signal.SIGTERM)):
            now[0] = moment
            server.handle_exit(number, None)
            assert (guard.draining, server.force_exit, server.should_exit) == (True, False, False)
            assert server.stop_at == 100.5  # pyright: ignore[reportAttributeAccessIssue]
        now[0] = 101.1
        server.handle_exit(signal.SIGINT, None)
        assert (server.force_exit, server.should_exit) == (True, True)
    finally:
        monkeypatch.undo()
        answering.close()


def _get(address: tuple[str, int], path: str) -> str:
    with closing(http.client.HTTPConnection(*address, timeout=20)) as line:
        line.request("GET", path)
        return line.getresponse().read().decode()


def _binary(image: np.ndarray) -> tuple[bytes, str]:
    tensor = triton.InferInput("images", image.shape, "UINT8")
    tensor.set_data_from_numpy(image)
    body, size = triton.InferenceServerClient.generate_request_body([tensor])
    return body, str(size)


def test_bad_input_is_one_line(
    artifact: Artifact, call: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    folder = artifact.folder
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    (damaged / "classes.json").write_text("[]")
    newer = shutil.copytree(folder, tmp_path / "newer")
    record = json.loads((newer / "artifact.json").read_text())
    (newer / "artifact.json").write_text(json.dumps({**record, "schema": 99}))
    boxes = as_detector(copied(tmp_path / "boxes"))
    (tmp_path / "empty").mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for arguments, said in (
            ((folder, f"{folder.name}={folder}"), f"two artefacts have the name '{folder.name}'"),
            ((f"a/b={folder}",), "model name 'a/b' can not stand in an address"),
            ((folder, "--port", port), f"port {port} of 127.0.0.1 is in use"),
            ((folder, "--port", 70_000), "--port is 70000; it must be at most 65535"),
            ((folder, "--host", "nowhere.invalid"), "host 'nowhere.invalid' is unknown"),
            ((damaged, "--port", 0), "the checksum of classes.json is wrong"),
            ((newer, "--port", 0), "has schema 99"),
            ((boxes, "--port", 0), f"artefact {boxes} is a detector's; serve takes classifiers"),
            ((tmp_path / "empty", "--port", 0), "is no artefact"),
            ((tmp_path / "none", "--port", 0), "does not exist"),
            ((folder, "--workers", 0), "--workers is 0"),
            ((folder, "--queue", 0), "--queue is 0"),
            ((folder, "--timeout-s", 0), "limit answer_s is 0.0"),
            ((folder, "--max-delay-ms", -1), "--max-delay-ms is -1"),
            ((folder, "--log", "xml"), "--log 'xml' is unknown"),
            ((folder, "--runtime", "nothing", "--port", 0), "runs in onnxruntime or openvino, not in nothing"),
        ):
            code, out, err = call("serve", *arguments)
            assert (code, out, len(err.splitlines())) == (2, "", 1), err
            assert said in err
    for token, said in ((" ", "is set and empty"), ("ä", "printable ASCII"), (" a", "printable ASCII")):
        monkeypatch.setenv(TOKEN, token)
        code, _, err = call("serve", folder)
        assert (code, said in err) == (2, True), err
    monkeypatch.setitem(sys.modules, "fastapi", None)
    code, _, err = call("serve", folder)
    assert (code, 'needs fastapi, which is not installed; pip install "convscale[serve]"' in err) == (2, True), err


@pytest.mark.slow
def test_both_workers_serve_what_one_of_them_was_asked_to_load(tmp_path: Path) -> None:
    """Nobody looks by himself (``--poll-s 0``)."""
    top = tmp_path / "m"
    copied(top / "1")
    with started(f"m={top}", "--workers", 2, "--poll-s", 0) as (_, said):
        host, _, port = said["url"].removeprefix("http://").partition(":")
        copied(top / "2")
        with closing(http.client.HTTPConnection(host, int(port), timeout=20)) as line:
            line.request("POST", "/v2/repository/models/m/load")
            assert line.getresponse().status == 200
        end, row = time.monotonic() + 60, 0
        while row < 40 and time.monotonic() < end:  # one of two would answer so often by a chance of 1 in 10^12
            versions = json.loads(_get((host, int(port)), "/v2/models/m"))["versions"]
            row = row + 1 if versions == ["2"] else 0
        assert row == 40


def test_a_worker_that_can_not_start_ends_the_server(artifact: Artifact, tmp_path: Path) -> None:
    damaged = shutil.copytree(artifact.folder, tmp_path / "damaged")
    (damaged / "classes.json").write_text("[]")
    command = [sys.executable, "-m", "convscale", "serve", str(damaged), "--workers", "2", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "COLUMNS": "200"})
    assert (done.returncode, done.stdout) == (2, "")
    assert "checksum of classes.json is wrong" in done.stderr
    assert len(done.stderr.splitlines()) == 1


class Gone:
    """Stands in for a worker's process."""

    def __init__(self, code: int | None) -> None:
        self.exitcode, self.pid = code, 4_194_305

    def is_alive(self) -> bool:
        return self.exitcode is None


def worker(code: int | None, since: float, *words: object) -> _Worker:
    """A worker that said something; of an exit code it is gone."""
    here, there = multiprocessing.Pipe(duplex=False)
    for word in words:
        there.send(word)
    there.close()
    return _Worker(cast("Any", Gone(code)), here, since)


def test_a_worker_that_can_not_start_again_is_tried_later_while_another_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server ended with it, whatever the others did, and nobody said why."""
    now, fresh = [1_000.0], worker(None, 0.0)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(_Workers, "_begun", lambda _: fresh)
    with socket.socket() as sock:
        workers = _Workers(Settings(models=()), sock, 2, tmp_path)
        serving, facts = worker(None, 0.0), [{"model": "m"}]
        assert workers._kept(serving, []) is serving
        assert workers._kept(worker(-9, 900.0, facts), []) is fresh  # it had served, so another begins at once
        refused = worker(2, 900.0, "artefact m is damaged")
        for moment, found in ((1_000.0, refused), (1_009.9, refused), (1_010.0, fresh)):
            now[0] = moment
            assert workers._kept(refused, [serving]) is found
        soon = worker(-9, 1_005.0, facts)
        assert (workers._kept(soon, [serving]), soon.again_at) == (soon, 1_020.0)
        with pytest.raises(UserError, match=r"^artefact m is damaged$"):
            workers._kept(worker(2, 900.0, "artefact m is damaged"), [soon])
        with pytest.raises(UserError, match="a worker ended with code -9 soon after it began"):
            workers._kept(worker(-9, 1_005.0), [])
    said = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    damaged = (2, "artefact m is damaged")
    assert [(line["code"], line["why"]) for line in said] == [
        *((-9, "code -9"), damaged, (-9, "code -9"), damaged, (-9, "code -9"))
    ]
    assert {line["event"] for line in said} == {"worker ended"}


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc on this system")
def test_workers_end_with_a_parent_that_is_killed(artifact: Artifact) -> None:
    """They served on, and nobody could listen at their port."""
    with started(f"m={artifact.folder}", "--workers", 2) as (process, said):
        host, _, port = said["url"].removeprefix("http://").partition(":")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        try:
            process.communicate(timeout=60)  # until the last that writes there is gone
        finally:
            for each in children:
                with suppress(ProcessLookupError):
                    os.kill(int(each), signal.SIGKILL)
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, int(port)))
            sock.listen()


def test_names_and_versions_of_folders(tmp_path: Path, artifact: Artifact) -> None:
    top = tmp_path / "a=b"
    shutil.copytree(artifact.folder, top / "9")
    (top / "10").mkdir()
    (top / "notes").mkdir()
    assert newest(top) == (9, top / "9")  # 10 is not whole yet
    shutil.copytree(artifact.folder, top / "10", dirs_exist_ok=True)
    assert newest(top) == (10, top / "10")
    assert newest(artifact.folder) == (0, artifact.folder)
    with pytest.raises(UserError, match="can not stand in an address"):
        named([str(top)])  # it is there, so it is no NAME=FOLDER
    assert named([f"x={top}"])[0].folder == top
    with pytest.raises(UserError, match="no artefact is named"):
        named([])
