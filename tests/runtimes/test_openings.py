"""What is refused before a runtime opens anything, and how a batch is parted."""

from __future__ import annotations

import numpy as np
import pytest

from convscale.errors import UserError
from convscale.runtimes import base
from convscale.runtimes.base import Opening, open_runtime, run_error, runtimes, threads_and_streams
from convscale.runtimes.openvino import OpenVinoRunner


def test_streams_share_the_threads() -> None:
    assert threads_and_streams(Opening(threads=4, streams=4)) == (4, 4)
    for streams in (0, 5):
        with pytest.raises(UserError, match=f"streams must lie between 1 and the 4 threads, got {streams}"):
            threads_and_streams(Opening(threads=4, streams=streams))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (Opening(precision="fp16"), "runtime onnxruntime computes in fp32, not in fp16"),
        (Opening(precision="int8"), "precision int8 needs a quantised artefact"),
        (Opening(device="tpu"), "runtime onnxruntime runs on device cpu or cuda here, got 'tpu'"),
    ],
)
def test_what_it_can_not_do_is_told_before_the_file_is_opened(how: Opening, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_runtime("/nowhere/model.onnx", "onnxruntime", how)


def test_running_out_of_memory_stays_what_it_is() -> None:
    """A smaller batch may fit; all else is the user's in one line."""
    for error in (MemoryError("x"), RuntimeError("Failed to allocate 3 GB"), RuntimeError("CUDA out of memory")):
        assert run_error("ONNX Runtime", "model.onnx", error) is error
    other = run_error("ONNX Runtime", "model.onnx", RuntimeError("bad shape\nmore"))
    assert isinstance(other, UserError)
    assert str(other) == "ONNX Runtime can not run model.onnx: bad shape"


def test_the_usual_runtimes_come_first() -> None:
    assert [runtime.order for runtime in runtimes()] == sorted(runtime.order for runtime in runtimes())
    assert base.runtimes_of("onnx")[0] == "onnxruntime"


@pytest.mark.parametrize(("images", "streams", "parts"), [(7, 3, [3, 2, 2]), (2, 3, [1, 1]), (8, 1, [8]), (0, 2, [0])])
def test_a_batch_is_parted_for_the_streams(images: int, streams: int, parts: list[int]) -> None:
    """As evenly as can be, the longer parts first, none of them empty; in the network's type."""
    runner = IdleRunner(streams)
    batch = np.arange(images * 2).reshape(images, 2)
    made = runner.prepare(batch)
    assert [len(part) for part in made] == parts
    assert {part.dtype for part in made} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(np.concatenate(made), batch)


def test_what_is_run_before_clients_wait() -> None:
    """Elsewhere the batch, the largest below it, one; in OpenVINO one number for each form, which are powers of two of
    a quantised network, beside the stated part.
    """
    assert [IdleRunner(1).sizes(batch) for batch in (1, 2, 3, 8)] == [(1,), (2, 1), (3, 2, 1), (8, 7, 1)]
    by_hand = (
        (False, 1, None, 8, (8,)),
        (False, 1, 8, 8, (8, 7)),
        (False, 1, 8, 4, (4,)),
        (True, 1, 6, 6, (6, 5, 4, 2, 1)),
        (True, 1, None, 6, (6, 4, 2, 1)),
        (True, 2, 4, 8, (8, 5, 3)),  # in parts 4 + 4, 3 + 2, 2 + 1
    )
    for quantised, streams, part, batch, sizes in by_hand:
        runner = OpenVinoRunner.__new__(OpenVinoRunner)
        runner.streams, runner._part, runner._quantised = streams, part, quantised
        assert runner.sizes(batch) == sizes


class IdleRunner(base.FileRunner):
    """Nothing runs in it."""

    def __init__(self, streams: int) -> None:
        self.streams, self.dtype = streams, np.dtype(np.float32)

    run = fetch = None  # type: ignore[assignment]
