"""A server, asked over HTTP by clients that nobody here wrote, and by some that wish it ill."""

from __future__ import annotations

import asyncio
import base64
import gzip
import http.client
import io
import json
import shutil
import socket
import subprocess
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from convscale.artifact.artifact import Artifact, load_artifact
from convscale.artifact.folder import seal
from convscale.errors import UserError
from convscale.images.decode import decode_image
from convscale.runtimes.onnxruntime import OnnxRunner
from convscale.serve import answering as answering_module
from convscale.serve.answering import Answering
from convscale.serve.guard import Told
from convscale.serve.models import How, Named
from convscale.serve.protocol import Problem
from convscale.serve.settings import Limits, Settings
from tests.serve.conftest import Running, copied, pixels, running


def ask(
    server: Running, path: str, body: bytes | None = None, method: str | None = None, **headers: str
) -> tuple[int, dict[str, str], Any]:
    """Status, headers and value of an answer, once it stands in the log and the metrics."""
    with closing(http.client.HTTPConnection(*server.address, timeout=20)) as line:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        line.request(method or ("GET" if body is None else "POST"), path, body, named)
        answer = line.getresponse()
        data = answer.read()
        kind = answer.headers.get("content-type", "")
        value = json.loads(data) if kind.startswith("application/json") else data
        found = {name.lower(): text for name, text in answer.headers.items()}
        if number := found.get("x-request-id"):  # the line is written after the last byte has left
            server.says(lambda line: line["event"] == "request" and line["request_id"] == number)
        return answer.status, found, value


def picture(image: np.ndarray, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image[:, :, 0]).save(file, form)
    return file.getvalue()


@pytest.fixture(scope="module")
def images(artifact: Artifact) -> np.ndarray:
    return pixels(artifact, 5, seed=3)


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[Any]:
    with triton.InferenceServerClient(server.url.removeprefix("http://"), concurrency=8) as one:
        yield one


def tensor(images: np.ndarray, *, binary: bool = True) -> list[Any]:
    made = triton.InferInput("images", images.shape, "UINT8")
    made.set_data_from_numpy(images, binary_data=binary)
    return [made]


# ---------------------------------------------------------------- tritonclient and curl


def test_tritonclient_finds_what_is_served(client: Any, artifact: Artifact) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("fashion")
    assert client.is_model_ready("fashion", "1")
    assert not client.is_model_ready("other")
    assert not client.is_model_ready("fashion", "2")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    assert client.get_model_metadata("fashion")["inputs"][0]["shape"] == [-1, 28, 28, 1]
    assert client.get_model_repository_index() == [{"name": "fashion", "version": "1", "state": "READY", "reason": ""}]


@pytest.mark.parametrize("packed", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient_infers(
    client: Any, artifact: Artifact, images: np.ndarray, packed: str | None, binary: bool
) -> None:
    result = client.infer(
        "fashion",
        tensor(images, binary=binary),
        request_compression_algorithm=packed,
        response_compression_algorithm=packed,
    )
    assert np.array_equal(result.as_numpy("probabilities"), artifact(images))


def test_many_requests_at_once_get_their_own_answers(client: Any, artifact: Artifact) -> None:
    many = pixels(artifact, 64, seed=9)
    waiting = [client.async_infer("fashion", tensor(many[at : at + 1])) for at in range(64)]
    found = np.concatenate([each.get_result().as_numpy("probabilities") for each in waiting])
    assert np.abs(found - artifact(many)).max() < 1e-6


def test_large_answers_come_packed(artifact: Artifact, server: Running) -> None:
    many = pixels(artifact, 40)
    body, size = triton.InferenceServerClient.generate_request_body(tensor(many))
    _, headers, data = ask(
        server,
        "/v2/models/fashion/infer",
        body,
        Inference_Header_Content_Length=str(size),
        Accept_Encoding="br;q=1, gzip;q=0.5",
    )
    assert headers["content-encoding"] == "gzip"
    length = int(headers["inference-header-content-length"])
    probabilities = np.frombuffer(gzip.decompress(data)[length:], "<f4").reshape(40, 10)
    assert np.array_equal(probabilities, artifact(many))


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")
def test_curl_classifies(server: Running, artifact: Artifact, images: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(images[0]))
    url = f"{server.url}/v2/models/fashion/classify?top=3"
    expected = artifact.classify(tmp_path / "a.png", top=3)[0]
    for way in (["--data-binary", "@a.png"], ["-F", "one=@a.png"], ["-T", "a.png", "-X", "POST"]):
        done = subprocess.run(
            ["curl", "-sS", *way, url], capture_output=True, check=True, timeout=20, cwd=tmp_path, text=True
        )
        (answer,) = json.loads(done.stdout)["answers"]
        assert tuple(answer["labels"]) == expected.labels
        assert answer["probabilities"] == pytest.approx(expected.probabilities)


# ---------------------------------------------------------------- pictures


def test_pictures_as_the_artefact_reads_them(server: Running, artifact: Artifact, tmp_path: Path) -> None:
    large = pixels(artifact, 1).repeat(5, axis=1).repeat(7, axis=2)[0]
    forms = [picture(large, "PNG"), picture(large, "JPEG"), picture(large, "WEBP"), picture(large)[:90]]
    listed = json.dumps([base64.b64encode(data).decode() for data in forms]).encode()
    status, _, value = ask(server, "/v2/models/fashion/classify", listed, Content_Type="application/json")
    assert status == 200
    for data, found in zip(forms, value["answers"], strict=True):
        (expected,) = artifact.classify(data)
        if expected.error:
            assert found == {"error": "PNG image is truncated"}
        else:
            assert tuple(found["labels"]) == expected.labels
            assert found["probabilities"] == pytest.approx(expected.probabilities)


@pytest.mark.parametrize(
    ("body", "kind", "status", "said"),
    [
        (b"", "image/png", 400, "no picture"),
        (b"abc", "image/png", 400, "not a JPEG, PNG"),
        (b"abc", "text/plain", 415, "content type 'text/plain' is unknown"),
        (b"[]", "application/json", 400, "no picture"),
        (b"{", "application/json", 400, "not JSON"),
        (b'["?"]', "application/json", 400, "not base64"),
        (b"[1]", "application/json", 400, "a list of pictures"),
        (json.dumps(["AAAA"] * 65).encode(), "application/json", 413, "65 pictures are sent at once; at most 64"),
        (b"--b\r\n", "multipart/form-data", 400, "form can not be read"),
        (b"--b--\r\n", "multipart/form-data; boundary=b", 400, "no picture"),
    ],
)
def test_bad_pictures_are_told(server: Running, body: bytes, kind: str, status: int, said: str) -> None:
    found, _, value = ask(server, "/v2/models/fashion/classify", body, Content_Type=kind)
    assert found == status
    assert said in value["error"]


def test_a_picture_that_claims_too_many_pixels_is_not_decoded(artifact: Artifact) -> None:
    with running(Named("m", artifact.folder), limits=Limits(pixels=1_000)) as small:
        status, _, value = ask(small, "/v2/models/m/classify", picture(np.zeros((100, 100, 1), np.uint8)))
        assert status == 400
        assert "above the cap" in value["error"]


# ---------------------------------------------------------------- those who wish it ill


def raw(server: Running, data: bytes, then: bytes = b"") -> bytes:
    """What comes back to these bytes, and, once something did, to more of them, until the server ends the connection,
    which it must do in time.
    """
    with socket.create_connection(server.address, timeout=8) as line:
        line.sendall(data)
        got = b""
        while part := line.recv(65_536):
            got += part
            line.sendall(then)
            then = b""
        return got


@pytest.mark.parametrize(
    ("body", "headers", "status", "said"),
    [
        (b"{}", {"Inference_Header_Content_Length": "7"}, 400, "whole number up to 2"),
        (b"{}", {"Inference_Header_Content_Length": "-0"}, 400, "whole number up to 2"),
        (b"\x00" * 9, {"Inference_Header_Content_Length": "0"}, 400, "not JSON"),
        (b"nonsense", {"Content_Encoding": "gzip"}, 400, "the body is no gzip"),
        (gzip.compress(b"{}", mtime=0)[:-3], {"Content_Encoding": "gzip"}, 400, "cut off"),
        (gzip.compress(b"{}", mtime=0) + b"x", {"Content_Encoding": "gzip"}, 400, "something follows"),
        (b"{}", {"Content_Encoding": "br"}, 415, "content encoding 'br' is unknown"),
        (b'{"inputs": [{"data": NaN}]}', {}, 400, "no finite number"),
    ],
)
def test_malformed_requests_are_told(
    server: Running, body: bytes, headers: dict[str, str], status: int, said: str
) -> None:
    found, _, value = ask(server, "/v2/models/fashion/infer", body, **headers)
    assert (found, list(value)) == (status, ["error"])
    assert said in value["error"]


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/nowhere", "GET", 404),
        ("/v2/models/other", "GET", 404),
        ("/v2/models/fashion/versions/2", "GET", 404),
        ("/v2/models/..%2f..%2fetc/infer", "POST", 404),
        ("/v2/models/fashion/infer", "GET", 405),
        ("/v2/repository/models/other/load", "POST", 404),
    ],
)
def test_what_is_not_there(server: Running, path: str, method: str, status: int) -> None:
    found, _, value = ask(server, path, b"" if method == "POST" else None, method)
    assert (found, list(value)) == (status, ["error"])


def test_what_is_too_large_is_refused_announced_or_not(artifact: Artifact, parts: str) -> None:
    with running(Named("m", artifact.folder), limits=Limits(body=10_000)) as small:
        path = "/v2/models/m/infer"
        status, _, value = ask(small, path, bytes(10_001))
        assert (status, value["error"]) == (413, "the request has more than 10,000 bytes; send fewer images at once")
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".encode()
        chunk = b"1000\r\n" + bytes(4096) + b"\r\n"
        last = b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        assert raw(small, head + 3 * chunk + b"0\r\n\r\n", last).startswith(b"HTTP/1.1 413")
        packed = zlib.compress(bytes(5_000_000))
        assert len(packed) < 10_000
        status, _, value = ask(small, path, packed, Content_Encoding="deflate")
        assert status == 413
        assert ask(small, "/v2/health/ready")[0] == 200


def test_slow_clients_are_let_go(artifact: Artifact, parts: str) -> None:
    limits = Limits(header_s=0.3, body_s=0.3)
    with running(Named("m", artifact.folder), limits=limits) as short:
        assert raw(short, b"POST /v2/models/m/infer HT") == b""
        assert raw(short, b"") == b""
        answer = raw(short, b"POST /v2/models/m/infer HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\nabc")
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"was not there within 0.3 s" in answer
        # A second request on a connection is no way around it.
        answer = raw(short, b"GET /v2 HTTP/1.1\r\nhost: x\r\n\r\n", b"GET /v2 HT")
        assert answer.count(b"HTTP/1.1 200") == 1
        assert ask(short, "/v2/health/live")[0] == 200


def test_connections_are_bounded_and_idle_ones_do_no_harm(artifact: Artifact, images: np.ndarray, parts: str) -> None:
    limits = Limits(connections=150, header_s=30)
    with running(Named("m", artifact.folder), limits=limits) as one, ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(one.address, timeout=5)) for _ in range(149)]
        assert len(idle) == 149
        with triton.InferenceServerClient(one.url.removeprefix("http://")) as client:
            found = client.infer("m", tensor(images)).as_numpy("probabilities")
            assert np.array_equal(found, artifact(images))
            refused = raw(one, b"GET /v2 HTTP/1.1\r\nhost: x\r\n\r\n")
            assert refused.startswith(b"HTTP/1.1 503 ")
            head, _, body = refused.partition(b"\r\n\r\n")
            assert b"retry-after: 1" in head
            assert json.loads(body) == {"error": "too many connections are open; try again"}
        stack.close()
        end = time.monotonic() + 60
        while ask(one, "/v2/health/live")[0] != 200:
            assert time.monotonic() < end


def test_bodies_that_come_at_once_are_bounded_in_memory(parts: str) -> None:
    """Of four bodies of 60 kB that come before the server looks at any, two are held; later all is as ever. Each is
    counted against the queue of its own model, and who sends none loses nothing.
    """
    import uvicorn
    from uvicorn.server import ServerState

    from convscale.serve.guard import Guard, Log, Message, Receive, Scope, Send
    from convscale.serve.metrics import Metrics
    from convscale.serve.server import _connections
    from convscale.serve.settings import Settings

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        size, more = 0, True
        while more:
            message: Message = await receive()
            size, more = size + len(message["body"]), message["more_body"]
        body = f"{size:05d}".encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": body})

    class Wire(asyncio.Transport):
        def __init__(self) -> None:
            super().__init__()
            self.said = b""

        def write(self, data: bytes | bytearray | memoryview) -> None:
            self.said += data

        def is_closing(self) -> bool:
            return False

        def get_write_buffer_size(self) -> int:
            return 0

        def close(self) -> None: ...

        def pause_reading(self) -> None: ...

        def resume_reading(self) -> None: ...

    def post(model: str) -> bytes:
        path = f"/v2/models/{model}/infer".encode()
        return b"POST " + path + b" HTTP/1.1\r\nhost: x\r\ncontent-length: 60000\r\n\r\n" + bytes(60_000)

    async def asked(*crowds: list[bytes]) -> list[list[bytes]]:
        limits = Limits(unread=130_000)
        config = uvicorn.Config(
            Guard(app, Settings(models=(), limits=limits), Metrics(), Log("none")),  # pyright: ignore
            log_config=None,
        )
        config.load()
        made, state = _connections(limits, lambda model: places[model]), ServerState()
        lines = [made(config=config, server_state=state, app_state={}) for _ in crowds[0]]  # pyright: ignore
        found: list[list[bytes]] = []
        for crowd in crowds:
            wires = [Wire() for _ in crowd]
            for line, wire, data in zip(lines, wires, crowd, strict=False):
                line.connection_made(wire)
                line.data_received(data)
            for _ in range(200):
                await asyncio.sleep(0.005)
                if all(wire.said for wire in wires):
                    break
            found.append([wire.said[9:12] + b" " + wire.said[-5:] for wire in wires])
        for line in lines:
            line.connection_lost(None)
        return found

    places, full = {"a": 0, "b": 0}, b'503 ain"}'
    first, later = asyncio.run(asked([post("a")] * 4, [post("a")]))
    assert first == [b"200 60000", b"200 60000", full, full]
    assert later == [b"200 60000"]
    health = b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\n"
    other = b"POST / HTTP/1.1" + post("a").partition(b" HTTP/1.1")[2]
    places["b"] = 3  # what a queue would take is never thrown away, and what another would is of no account
    (mixed,) = asyncio.run(asked([post("a"), *[post("b")] * 3, health, post("a"), other, post("b"), health]))
    assert mixed == [*[b"200 60000"] * 4, b"200 00000", full, full, full, b"200 00000"]


def test_overload_is_refused_and_every_answer_is_right(artifact: Artifact, images: np.ndarray) -> None:
    with running(Named("m", artifact.folder), how=How(batch_size=1, queue_batches=2)) as one:
        batcher = one.answering.models.all["m"].current.batcher
        may, began, run = threading.Event(), threading.Event(), batcher._run

        def waits(batch: np.ndarray) -> np.ndarray:
            began.set()
            assert may.wait(60)
            return run(batch)

        batcher._run = waits
        body, size = triton.InferenceServerClient.generate_request_body(tensor(images[:1]))
        found: list[tuple[int, dict[str, str], Any]] = []
        threads = [
            threading.Thread(
                target=lambda: found.append(
                    ask(one, "/v2/models/m/infer", body, Inference_Header_Content_Length=str(size))
                )
            )
            for _ in range(12)
        ]
        threads[0].start()
        assert began.wait(60)  # or it would still wait when the others come
        for each in threads[1:]:
            each.start()
        end = time.monotonic() + 60
        while len(found) < 9 and time.monotonic() < end:  # one runs, two wait, the others are told at once
            time.sleep(0.005)
        assert [(status, int(headers["retry-after"]) >= 1) for status, headers, _ in found] == [(503, True)] * 9
        assert (one.answering.places("m"), one.answering.places("other")) == (0, 0)
        behind, one.guard.app = one.guard.app, None  # pyright: ignore - who is refused at the door never comes so far
        versioned = f"/v2/models/m/versions/{one.answering.version('m', None).takes.version}"
        for path in ("/v2/models/m/infer", f"{versioned}/infer", f"{versioned}/classify"):
            assert ask(one, path, body, Inference_Header_Content_Length=str(size))[0] == 503
        one.guard.app = behind
        assert ask(one, "/v2/models/m/ready", None)[0] == ask(one, "/v2/models/m", None)[0] == 200
        assert ask(one, "/v2/models/other/infer", body)[0] == 404
        may.set()
        for each in threads:
            each.join()
        answers = [data for status, _, data in found if status == 200]
        assert len(answers) == 3
        assert (one.answering.places("m"), one.answering.places("other")) == (2, 0)
        assert all(np.array_equal(np.frombuffer(a[-40:], "<f4"), artifact(images[:1])[0]) for a in answers)


def test_pictures_of_one_model_take_no_place_of_anothers(
    artifact: Artifact, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy model's pictures were counted against the queue of every other."""
    may = threading.Event()

    def waits(*arguments: Any, **options: Any) -> np.ndarray:
        assert may.wait(60)
        return decode_image(*arguments, **options)

    monkeypatch.setattr(answering_module, "decode_image", waits)
    models = (Named("busy", artifact.folder), Named("idle", artifact.folder))
    answering = Answering(Settings(models=models, how=How(batch_size=1, queue_batches=2), log="none", decoders=1))
    busy, idle = (answering.version(name, None) for name in ("busy", "idle"))
    one: Any = SimpleNamespace(told=Told(), answer_by=None, receive=lambda: asyncio.sleep(60))

    async def asked() -> None:
        first = asyncio.create_task(answering.decode(one, [picture(images[0])] * 2, busy))
        await asyncio.sleep(0)
        second = asyncio.create_task(answering.decode(one, [picture(images[1])], idle))
        await asyncio.sleep(0)
        with pytest.raises(Problem, match="the queue is full"):
            await answering.decode(one, [picture(images[0])], busy)
        may.set()
        assert [len(await each) for each in (first, second)] == [2, 1]
        (pixels_of_one,) = await answering.decode(one, [picture(images[0])], busy)
        assert np.array_equal(pixels_of_one, images[0])

    try:
        asyncio.run(asked())
    finally:
        may.set()
        answering.close()


def test_a_client_that_leaves_and_one_that_is_late(artifact: Artifact, images: np.ndarray, parts: str) -> None:
    limits = Limits(answer_s=0.4)
    with running(Named("m", artifact.folder), how=How(batch_size=1), limits=limits) as one:
        batcher = one.answering.models.all["m"].current.batcher
        may, ran, run = threading.Event(), [], batcher._run

        def waits(batch: np.ndarray) -> np.ndarray:
            ran.append(len(batch))
            assert may.wait(20)
            return run(batch)

        batcher._run = waits
        body, size = triton.InferenceServerClient.generate_request_body(tensor(images[:1]))
        head = f"POST /v2/models/m/infer HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        request = f"{head}inference-header-content-length: {size}\r\n\r\n".encode() + body
        with socket.create_connection(one.address) as leaves:
            leaves.sendall(request)  # this one runs
            while not ran:
                time.sleep(0.002)
            with socket.create_connection(one.address) as waiting:
                waiting.sendall(request)  # this one waits, and leaves
                while not batcher.waiting:
                    time.sleep(0.002)
        late = ask(one, "/v2/models/m/infer", body, Inference_Header_Content_Length=str(size))
        assert (late[0], late[1]["retry-after"]) == (504, "1")
        may.set()
        good = ask(one, "/v2/models/m/infer", body, Inference_Header_Content_Length=str(size))
        assert good[0] == 200
        assert ran == [1, 1]
        lines = one.says(lambda line: line["event"] == "request", 4)
        assert sorted(str(line["status"]) for line in lines) == ["200", "499", "499", "504"]


def test_streams_answer_as_the_artefact_does(artifact: Artifact, images: np.ndarray, tmp_path: Path) -> None:
    one = copied(tmp_path / "m")
    manifest = {key: value for key, value in one.manifest.items() if key not in ("schema", "files")}
    manifest["runtime"] = {"name": "onnxruntime", "threads": 2, "streams": 2, "batch_size": 4}
    seal(one.folder, manifest)
    with running(Named("m", one.folder)) as up:
        current = up.answering.models.all["m"].current
        alone = current.batcher._alone
        assert isinstance(alone, Artifact)
        assert (alone.streams, alone.threads, alone.batch_size) == (1, 2, 1)
        assert (current.artifact.streams, current.artifact.batch_size, current.artifact.divided) == (2, 2, False)
        assert len(current.artifact.runner.prepare(images[:2])) == 1  # not cut
        entry = "session.intra_op.allow_spinning"  # a thread that spins takes its core from the requests
        for opened in (current.artifact, alone):
            assert isinstance(opened.runner, OnnxRunner)
            for session in opened.runner._sessions:
                assert session.get_session_options().get_session_config_entry(entry) == "0"
        assert isinstance(one.runner, OnnxRunner)
        with pytest.raises(RuntimeError, match="does not have"):  # alone on its cores it may
            one.runner._sessions[0].get_session_options().get_session_config_entry(entry)
        with triton.InferenceServerClient(up.url.removeprefix("http://")) as client:
            for image, right in zip(images, artifact(images), strict=True):
                row = client.infer("m", tensor(image[None])).as_numpy("probabilities")
                np.testing.assert_allclose(row[0], right, atol=1e-6)


def test_both_forms_of_a_version_are_of_one_artefact(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another takes its place between the two: refused, not served half and half."""
    one, other = copied(tmp_path / "m"), copied(tmp_path / "other")
    for each, count in ((one, 4), (other, 6)):
        manifest = {key: value for key, value in each.manifest.items() if key not in ("schema", "files")}
        manifest["runtime"] = {"name": "onnxruntime", "threads": 2, "streams": 2, "batch_size": count}
        seal(each.folder, manifest)
    with open(other.folder / "classes.json", "a") as file:
        file.write("\n")
    seal(other.folder, {k: v for k, v in load_artifact(one.folder).manifest.items() if k not in ("schema", "files")})
    places = iter((one.folder, other.folder))
    monkeypatch.setattr(
        "convscale.serve.models.load_artifact", lambda folder, **how: load_artifact(next(places), **how)
    )
    with pytest.raises(UserError, match="changed while it was opened"), running(Named("m", one.folder)):
        pass


def test_answers_that_are_no_numbers_are_an_error(artifact: Artifact, images: np.ndarray) -> None:
    with running(Named("m", artifact.folder)) as one:
        batcher = one.answering.models.all["m"].current.batcher
        batcher._run = lambda batch: np.full((len(batch), 10), np.nan, np.float32)
        with (
            triton.InferenceServerClient(one.url.removeprefix("http://")) as client,
            pytest.raises(Exception, match="not finite"),
        ):
            client.infer("m", tensor(images))
        status, _, value = ask(one, "/v2/models/m/classify", picture(images[0]))
        assert (status, "not finite" in value["error"]) == (400, True)

        def fails(_: np.ndarray) -> np.ndarray:
            raise RuntimeError(f"in {artifact.folder}")

        batcher._run = fails
        status, _, value = ask(one, "/v2/models/m/classify", picture(images[0]))
        assert (status, value) == (500, {"error": "model 'm' can not run this; the server's log says why"})
        (line,) = one.says(lambda line: line["event"] == "run failed")
        assert line["error"] == f"RuntimeError: in {artifact.folder}"


# ---------------------------------------------------------------- token, log, metrics, page


def test_a_token_is_asked_for(artifact: Artifact, images: np.ndarray) -> None:
    with running(Named("m", artifact.folder), token="s3cret") as one:
        for path in ("/v2", "/v2/models/m", "/metrics", "/openapi.json"):
            status, headers, value = ask(one, path)
            assert (status, headers["www-authenticate"]) == (401, "Bearer")
            assert "s3cret" not in json.dumps(value)
        assert ask(one, "/v2", Authorization="Bearer s3cre")[0] == 401
        assert ask(one, "/v2", Authorization="Basic s3cret")[0] == 401
        assert ask(one, "/v2", Authorization="Bearer s3cret")[0] == 200
        assert [ask(one, path)[0] for path in ("/", "/v2/health/live", "/v2/health/ready")] == [200] * 3
        assert "s3cret" not in json.dumps(one.said)


def test_each_request_has_a_number_in_answer_and_log(server: Running, images: np.ndarray) -> None:
    path = "/v2/models/fashion/classify"
    assert ask(server, path, picture(images[0]), X_Request_Id="mine-1")[1]["x-request-id"] == "mine-1"
    (line,) = server.says(lambda line: line.get("request_id") == "mine-1")
    assert (line["model"], line["status"], line["images"], line["batch"]) == ("fashion", 200, 1, 1)
    assert {"queue_ms", "run_ms", "ms", "bytes"} <= set(line)
    made = ask(server, "/v2", X_Request_Id='"; forged')[1]["x-request-id"]
    assert len(made) == 32


def counted(one: Running) -> dict[tuple[str, ...], float]:
    """The metrics of a server, by name and labels."""
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(ask(one, "/metrics")[2].decode())
        for sample in family.samples
    }


def test_metrics_count_what_was_asked(artifact: Artifact, images: np.ndarray) -> None:
    with running(Named("m", artifact.folder)) as one:
        ask(one, "/v2/models/m/classify", picture(images[0]))
        ask(one, "/v2/models/m/classify", b"nonsense")
        body, size = triton.InferenceServerClient.generate_request_body(tensor(images))
        ask(one, "/v2/models/m/infer", body, Inference_Header_Content_Length=str(size))
        wanted = {("convscale_batch_images_count", "m"): 2, ("convscale_seconds_count", "m", "total"): 3}
        end = time.monotonic() + 60
        while not wanted.items() <= (samples := counted(one)).items() and time.monotonic() < end:
            time.sleep(0.002)  # some are counted once the answer is out
    assert samples["convscale_requests_total", "200", "classify", "m"] == 1
    assert samples["convscale_requests_total", "400", "classify", "m"] == 1
    assert samples["convscale_requests_total", "200", "infer", "m"] == 1
    assert samples["convscale_batch_images_sum", "m"] == 6
    assert samples["convscale_batch_images_count", "m"] == 2
    for stage, count in (("decode", 2), ("queue", 2), ("run", 2), ("read", 1), ("total", 3)):
        assert samples["convscale_seconds_count", *sorted(("m", stage))] == count


def test_the_page_classifies_in_a_browser(
    server: Running, artifact: Artifact, chromium: Path, images: np.ndarray, tmp_path: Path
) -> None:
    """Headless Chromium runs the page's own script; a picture is handed to it as a dropped file would be."""
    from tests.show.browser import QUIET

    page = ask(server, "/")[2].decode()
    drop = (
        f'<script>fetch("data:image/png;base64,{base64.b64encode(picture(images[0])).decode()}")'
        ".then(r => r.blob()).then(b => classify(b))</script></body>"
    )
    extra = page.replace("</body>", drop)
    server.guard.app.router.routes.insert(0, _route(extra))  # pyright: ignore
    try:
        command = [str(chromium), *QUIET, f"--user-data-dir={tmp_path}", "--dump-dom", f"{server.url}/with-drop"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    finally:
        server.guard.app.router.routes.pop(0)  # pyright: ignore
    (expected,) = artifact.classify(picture(images[0]))
    table = shown.partition('<table id="answers">')[2].partition("</table>")[0]
    assert [cell.partition("<")[0] for cell in table.split("<tr><td>")[1:]] == list(expected.labels)
    assert f"{100 * expected.probabilities[0]:.1f} %" in table


def _route(html: str) -> Any:
    from starlette.responses import HTMLResponse
    from starlette.routing import Route

    return Route("/with-drop", lambda _: HTMLResponse(html))


# ---------------------------------------------------------------- versions


def test_a_new_version_takes_over_and_a_bad_one_does_not(tmp_path: Path) -> None:
    top = tmp_path / "versions"
    first = copied(top / "1")
    images = pixels(first, 3)
    with running(Named("m", top)) as one:
        model = one.answering.models.all["m"]
        assert model.current.number == 1
        assert "4 reference images" in model.current.checked
        second = copied(tmp_path / "new", "onnx_int8")
        # Its answers are changed, so its reference images do not fit any more.
        wrong = copied(tmp_path / "wrong")
        said = json.loads((wrong.folder / "reference.json").read_text())
        said["probabilities"][0] = said["probabilities"][0][::-1]
        (wrong.folder / "reference.json").write_text(json.dumps(said))
        kept = {key: value for key, value in wrong.manifest.items() if key not in ("schema", "files")}
        seal(wrong.folder, kept)
        (tmp_path / "wrong").rename(top / "2")
        path = "/v2/repository/models/m/load"
        status, _, value = ask(one, path, b"{}")
        assert (status, "refused" in value["error"], str(tmp_path) in value["error"]) == (409, True, False)
        assert model.current.number == 1
        (refused,) = one.says(lambda line: line["event"] == "version refused")
        assert "something else of its reference images" in str(refused["why"])
        (tmp_path / "new").rename(top / "3")
        assert ask(one, path, b"{}")[0] == 200
        assert model.current.number == 3
        with triton.InferenceServerClient(one.url.removeprefix("http://")) as client:
            result = client.infer("m", tensor(images))
        assert result.get_response()["model_version"] == "3"
        loaded = second.__class__(top / "3", second.manifest)
        assert np.abs(result.as_numpy("probabilities") - loaded(images)).max() < 1e-6
        # Damaged bytes are refused by their checksum.
        broken = copied(tmp_path / "broken")
        data = bytearray(broken.model_path.read_bytes())
        data[-1] ^= 1
        broken.model_path.write_bytes(data)
        (tmp_path / "broken").rename(top / "4")
        assert ask(one, path, b"{}")[0] == 409
        assert model.current.number == 3


def test_an_answer_names_the_version_that_gave_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that had found the old version, and came to its queue when the new one had taken over."""
    place = tmp_path / "m"
    old = copied(place)
    new = copied(tmp_path / "next", "onnx_int8")
    image = pixels(old, 1)
    body, size = triton.InferenceServerClient.generate_request_body(tensor(image))
    assert np.abs(old(image) - new(image)).max() > 1e-3
    right = new(image)[0]
    with running(Named("m", place)) as one:
        before = one.answering.version("m", None)
        place.rename(tmp_path / "aside")
        (tmp_path / "next").rename(place)
        assert ask(one, "/v2/repository/models/m/load", b"{}")[0] == 200
        monkeypatch.setattr(one.answering, "version", lambda name, version: before)
        status, headers, data = ask(one, "/v2/models/m/infer", body, Inference_Header_Content_Length=str(size))
        length = int(headers["inference-header-content-length"])
        assert (status, json.loads(data[:length])["model_version"]) == (200, "2")
        np.testing.assert_allclose(np.frombuffer(data[length:], "<f4"), right, atol=1e-6)
        status, _, said = ask(one, "/v2/models/m/classify", picture(image[0]))
        assert (status, said["model_version"]) == (200, "2")
        # who asks for a version gets that one's answer, or none
        path = "/v2/models/m/versions/1"
        assert ask(one, f"{path}/infer", body, Inference_Header_Content_Length=str(size))[0] == 503
        assert ask(one, f"{path}/classify", picture(image[0]))[0] == 503


def test_a_version_that_comes_is_taken_up_under_load(tmp_path: Path) -> None:
    """Requests go on all the while, and each is answered by one version or the other."""
    place = tmp_path / "m"
    old = copied(place)
    new = copied(tmp_path / "next", "onnx_int8")
    image = pixels(old, 1)
    body, size = triton.InferenceServerClient.generate_request_body(tensor(image))
    right = {"1": old(image)[0], "2": new(image)[0]}
    seen: list[str] = []
    stop = threading.Event()

    def client(one: Running) -> None:
        while not stop.is_set():
            status, headers, data = ask(one, "/v2/models/m/infer", body, Inference_Header_Content_Length=str(size))
            length = int(headers["inference-header-content-length"])
            version = json.loads(data[:length])["model_version"]
            assert status == 200
            assert np.abs(np.frombuffer(data[length:], "<f4") - right[version]).max() < 1e-6
            seen.append(version)

    with running(Named("m", place), poll_s=0.05) as one:
        threads = [threading.Thread(target=client, args=(one,)) for _ in range(3)]
        for each in threads:
            each.start()
        end = time.monotonic() + 120
        while len(seen) < 20:
            time.sleep(0.005)
        place.rename(tmp_path / "aside")
        (tmp_path / "next").rename(place)
        while (not seen or seen[-1] != "2") and time.monotonic() < end:
            time.sleep(0.01)
        stop.set()
        for each in threads:
            each.join()
    assert {"1", "2"} == set(seen)
