"""The servers that `benchmarks.serve` compares, each in a process of its own: python -m benchmarks.serve_peers NAME ...

ours      `convscale serve`'s own application
empty     the same, with a network that answers zeros at once: what HTTP alone costs
fastapi   a plain FastAPI route: the body to an array, the artefact in FastAPI's thread pool
litserve  LitServe, with its batching at the artefact's batch and the delay of ours
ort       a FastAPI route before ONNX Runtime in a thread pool, one thread and one image each
direct    no server: the artefact in a loop, at its batch, until standard input ends
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from convscale.artifact.artifact import Artifact, load_artifact
from convscale.machine import available_cores

DELAY_S = 0.005


def image_of(artifact: Artifact, body: bytes) -> np.ndarray:
    how = artifact.preprocessing
    return np.frombuffer(body, np.uint8).reshape(-1, how.height, how.width, how.channels)


def serve_ours(folder: Path, port: int, *, empty: bool = False) -> None:
    """Our own."""
    from convscale.serve.answering import Answering
    from convscale.serve.app import build
    from convscale.serve.models import How, Named
    from convscale.serve.server import SWITCH_S, bind, server_of
    from convscale.serve.settings import Settings

    sys.setswitchinterval(SWITCH_S)
    settings = Settings(models=(Named("m", folder),), how=How(max_delay_s=DELAY_S), log="none", poll_s=0.0)
    answering = Answering(settings)
    if empty:
        classes = len(answering.models.all["m"].current.takes.classes)
        batcher = answering.models.all["m"].current.batcher
        batcher._run, batcher._alone = lambda images: np.zeros((len(images), classes), np.float32), None
    with bind("127.0.0.1", port) as sock:
        server_of(build(answering), settings, lambda: None).run(sockets=[sock])


def _app(answer: Any) -> Any:
    """A FastAPI application with one route."""
    from fastapi import FastAPI, Request, Response

    app = FastAPI()

    async def infer(request: Request) -> Response:
        return Response(await answer(await request.body()), media_type="application/octet-stream")

    infer.__annotations__ = {"request": Request, "return": Response}
    app.post("/infer", response_class=Response)(infer)
    return app


def _run(app: Any, port: int) -> None:
    import uvicorn

    uvicorn.run(app, host="127.0.0.1", port=port, log_config=None, access_log=False)


def serve_fastapi(folder: Path, port: int) -> None:
    """What most people write first."""
    from starlette.concurrency import run_in_threadpool

    artifact = load_artifact(folder)

    async def answer(body: bytes) -> bytes:
        rows = await run_in_threadpool(artifact, image_of(artifact, body))
        return rows.tobytes()

    _run(_app(answer), port)


def serve_ort(folder: Path, port: int) -> None:
    """Sessions of one thread, as many at once as there are cores."""
    import asyncio

    import onnxruntime as ort

    artifact = load_artifact(folder)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(artifact.model_path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    pool = ThreadPoolExecutor(available_cores())

    def run(body: bytes) -> bytes:
        logits = np.asarray(session.run(None, {name: artifact.input_batch(image_of(artifact, body))})[0])
        if artifact.baked:
            return np.asarray(logits, np.float32).tobytes()
        exp = np.exp(logits - logits.max(axis=1, keepdims=True))
        return (exp / exp.sum(axis=1, keepdims=True)).astype(np.float32).tobytes()

    async def answer(body: bytes) -> bytes:
        return await asyncio.get_running_loop().run_in_executor(pool, run, body)

    _run(_app(answer), port)


def serve_litserve(folder: Path, port: int) -> None:
    """LitServe, with its batching."""
    from benchmarks.serve_litserve import run

    run(folder, port, delay_s=DELAY_S)


def run_direct(folder: Path) -> None:
    """Images/s until standard input ends, on standard output."""
    import threading

    artifact = load_artifact(folder)
    how = artifact.preprocessing
    images = np.zeros((artifact.batch_size, how.height, how.width, how.channels), np.uint8)
    for _ in range(3):
        artifact(images)
    print("ready", flush=True)
    stop = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
    count, start = 0, time.perf_counter()
    while not stop.is_set():
        artifact(images)
        count += len(images)
    print(count / (time.perf_counter() - start), flush=True)


def main() -> None:
    """Run one of them."""
    name, folder, port = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if name in ("ours", "empty"):
        serve_ours(folder, port, empty=name == "empty")
    elif name == "direct":
        run_direct(folder)
    else:
        {"fastapi": serve_fastapi, "ort": serve_ort, "litserve": serve_litserve}[name](folder, port)


if __name__ == "__main__":
    main()
