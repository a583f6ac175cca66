"""Servers on the loopback, each in a thread of its own, before an artefact of version 0.1: no torch is needed."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from convscale.artifact.artifact import Artifact, load_artifact
from convscale.artifact.boxes import Cut
from convscale.artifact.folder import seal
from convscale.artifact.reference import write_reference
from convscale.serve.answering import Answering
from convscale.serve.app import build
from convscale.serve.guard import Guard
from convscale.serve.models import How, Named
from convscale.serve.server import bind, server_of
from convscale.serve.settings import Limits, Settings

OLD = Path(__file__).parent.parent / "old_files" / "v0_1" / "artefacts"


def copied(target: Path, form: str = "onnx_fp32", *, reference: bool = True) -> Artifact:
    """A copy of an old artefact, with reference images or, as it was, without."""
    shutil.copytree(OLD / form, target)
    artifact = load_artifact(target)
    if reference:
        write_reference(target, artifact, pixels(artifact, 6))
        seal(target, {key: value for key, value in artifact.manifest.items() if key not in ("schema", "files")})
    return load_artifact(target)


def as_detector(artifact: Artifact) -> Path:
    """Its folder; the record says from now on that it gives boxes."""
    cut = Cut(nms="inside", score_threshold=0.1, nms_threshold=0.5, max_detections=10, head="fcos", backbone="net")
    artifact.keep(detection=cut.to_dict())
    return artifact.folder


def pixels(artifact: Artifact, count: int, seed: int = 0) -> np.ndarray:
    """Smooth noise, uint8 (count, H, W, C)."""
    prep = artifact.preprocessing
    coarse = np.random.default_rng(seed).integers(
        0, 256, (count, prep.height // 4, prep.width // 4, prep.channels), dtype=np.uint8
    )
    return coarse.repeat(4, axis=1).repeat(4, axis=2)


@dataclasses.dataclass
class Running:
    """A server that runs."""

    url: str
    answering: Answering
    guard: Guard
    said: list[dict[str, object]]
    """Lines of its log."""
    connections: Callable[[], set[object]]
    """Those that are open."""

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def says(self, wanted: Callable[[dict[str, object]], bool], count: int = 1) -> list[dict[str, object]]:
        """The wanted lines of its log, once there are ``count`` of them; those there are after a minute."""
        end = time.monotonic() + 60
        while len(lines := [line for line in list(self.said) if wanted(line)]) < count and time.monotonic() < end:
            time.sleep(0.002)
        return lines


@contextmanager
def running(
    *models: Named, how: How | None = None, limits: Limits | None = None, **options: object
) -> Iterator[Running]:
    """Serve in a thread, until the end of the block."""
    settings = Settings(
        models=models,
        how=how or How(),
        limits=limits or Limits(),
        decoders=1,
        drain_s=0.0,
        log="none",
        **{"poll_s": 0.0, **options},  # pyright: ignore[reportArgumentType]
    )
    answering = Answering(settings)
    lines: list[dict[str, object]] = []
    answering.log.write = lambda event, **facts: lines.append({"event": event, **facts})  # pyright: ignore
    guard = build(answering)
    up = threading.Event()
    server = server_of(guard, settings, up.set)
    sock = bind("127.0.0.1", 0)
    port = sock.getsockname()[1]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    assert up.wait(20)
    try:
        yield Running(f"http://127.0.0.1:{port}", answering, guard, lines, lambda: set(server.server_state.connections))
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(params=["httptools and uvloop", "h11 and asyncio"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What servers of a test are made of: without ``uvicorn[standard]`` users have the second pair."""
    if request.param == "h11 and asyncio":
        for name in ("uvloop", "uvicorn.protocols.http.httptools_impl"):
            monkeypatch.setitem(sys.modules, name, None)
    else:
        for name in ("uvloop", "httptools"):
            pytest.importorskip(name)
    return request.param


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return copied(tmp_path_factory.mktemp("serve") / "fashion")


@pytest.fixture(scope="module")
def server(artifact: Artifact) -> Iterator[Running]:
    with running(Named("fashion", artifact.folder)) as one:
        yield one
