"""Any number of threads may call an artefact or a runner at once.

Guards wrong answer 11 of issue E: threads that shared an OpenVINO artefact read each other's outputs.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from convscale.artifact.artifact import Artifact, load_artifact
from convscale.runtimes.base import Opening, installed_runtimes, open_runtime
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


def test_an_int8_artefact(tiny: nn.Module, images: np.ndarray, batches: list[np.ndarray], tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    art = export(
        tiny,
        tmp_path / "art",
        format="openvino",
        int8=True,
        calibration_images=images,
        verify_images=images,
        max_drop=100.0,
    )
    _same_from_many_threads(art, batches)
