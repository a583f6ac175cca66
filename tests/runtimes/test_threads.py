"""Any number of threads may call an artefact or a runner at once.

Guards wrong answer 11 of issue E: threads that shared an OpenVINO artefact read each other's outputs.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from convscale.artifact.artifact import Artifact, load_artifact
from convscale.runtimes.base import Opening, installed_runtimes, open_runtime
from convscale.runtimes.openvino import OpenVinoRunner, _Form
from convscale.ship.export import export

THREADS, CALLS = 8, 120
SIZES = (1, 2, 3, 5, 7)


def _same_from_many_threads(call, batches: list[np.ndarray]) -> None:
    expected = [call(batch) for batch in batches]
    assert not np.array_equal(expected[0][:1], expected[1][:1]), "the batches must differ"
    with ThreadPoolExecutor(THREADS) as pool:
        answers = list(pool.map(lambda i: call(batches[i % len(batches)]), range(CALLS)))
    wrong = [i for i, answer in enumerate(answers) if not np.allclose(answer, expected[i % len(batches)], atol=1e-6)]
    assert wrong == []


@pytest.fixture
def batches(images: np.ndarray) -> list[np.ndarray]:
    return [np.roll(images, -3 * i, axis=0)[: SIZES[i % len(SIZES)]] for i in range(10)]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("streams", [1, 2])
def test_a_runner(runtime: str, streams: int, onnx_art: Artifact, batches: list[np.ndarray]) -> None:
    run = open_runtime(onnx_art.model_path, runtime, Opening(threads=2, streams=streams, batch_size=2))
    _same_from_many_threads(lambda batch: run(onnx_art.input_batch(batch))[0], batches)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("streams", [2, 4])
def test_a_runner_with_free_streams(runtime: str, streams: int, onnx_art: Artifact, batches: list[np.ndarray]) -> None:
    """Calls of one image take one stream each, so that calls share what others leave free; more threads than cores."""
    run = open_runtime(onnx_art.model_path, runtime, Opening(threads=4, streams=streams))
    _same_from_many_threads(lambda batch: run(onnx_art.input_batch(batch))[0], [batch[:1] for batch in batches[:8]])


def test_calls_of_openvino_do_not_wait_for_each_other(onnx_art: Artifact, images: np.ndarray) -> None:
    """Two calls are in the network at the same time, each with a request of its own, which it gives back."""
    run = open_runtime(onnx_art.model_path, "openvino", Opening(threads=2, streams=2))
    assert isinstance(run, OpenVinoRunner)
    inside = threading.Barrier(2, timeout=20)
    taken: list[object] = []

    class Waiting:
        """A form whose requests are handed out when two callers want one."""

        def __init__(self, form: _Form) -> None:
            self.form, self.idle = form, form.idle

        def take(self) -> object:
            request = self.form.take()
            taken.append(request)
            inside.wait()
            return request

    form = run._form(None)
    run._forms[None] = Waiting(form)  # pyright: ignore[reportArgumentType]
    batch = onnx_art.input_batch(images[:1])
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: run(batch)[0], range(2))
    assert np.array_equal(first, second)
    assert len(set(map(id, taken))) == 2
    assert set(map(id, form.idle)) == set(map(id, taken))


def test_a_call_does_not_wait_while_another_forms_is_compiled(onnx_art: Artifact, images: np.ndarray) -> None:
    run = open_runtime(onnx_art.model_path, "openvino", Opening(threads=1))
    assert isinstance(run, OpenVinoRunner)
    batch = onnx_art.input_batch(images[:1])
    with ThreadPoolExecutor(1) as pool:
        expected = run(batch)[0]
        with run._compiling:  # as long as it takes
            assert np.array_equal(pool.submit(run, batch).result(timeout=60)[0], expected)


@pytest.mark.parametrize("runtime", [name for name in ("eager", "compiled") if name in installed_runtimes()])
def test_pytorch(runtime: str, tiny: nn.Module, onnx_art: Artifact, batches: list[np.ndarray]) -> None:
    run = open_runtime(tiny, runtime, Opening(threads=1))
    _same_from_many_threads(lambda batch: run(onnx_art.input_batch(batch))[0], batches)


@pytest.mark.parametrize("bake", [False, True])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_an_artefact(tiny: nn.Module, batches: list[np.ndarray], tmp_path: Path, bake: bool, runtime: str) -> None:
    folder = export(tiny, tmp_path / "art", bake=bake).folder
    # Calls in threads come first, so that opening is one of the things that threads do at once.
    fresh, other = (load_artifact(folder, runtime=runtime, threads=2) for _ in range(2))
    with ThreadPoolExecutor(THREADS) as pool:
        answers = list(pool.map(fresh, batches))
    for batch, answer in zip(batches, answers, strict=True):
        assert np.allclose(answer, other(batch), atol=1e-6)
    _same_from_many_threads(other, batches)
    _same_from_many_threads(other.logits, batches)


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_an_int8_artefact(
    format: str, tiny: nn.Module, images: np.ndarray, batches: list[np.ndarray], tmp_path: Path
) -> None:
    pytest.importorskip("nncf")
    art = export(
        tiny,
        tmp_path / "art",
        format=format,
        int8=True,
        calibration_images=images,
        verify_images=images,
        max_drop=100.0,
    )
    _same_from_many_threads(load_artifact(art.folder, threads=1), batches)


def test_a_program(tiny: nn.Module, batches: list[np.ndarray], images: np.ndarray, tmp_path: Path) -> None:
    art = export(tiny, tmp_path / "art", format="torch", verify_images=images)
    _same_from_many_threads(load_artifact(art.folder, runtime="eager", threads=1), batches)
