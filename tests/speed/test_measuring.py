"""Measuring: what is timed, under which conditions, and what happens when memory ends. No time is asserted."""

from __future__ import annotations

import copy
import dataclasses
import time
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from convscale.artifact.artifact import Artifact
from convscale.conditions import Conditions
from convscale.errors import UserError
from convscale.runtimes.pytorch import runner as torch_runner
from convscale.speed import subjects
from convscale.speed.measuring import export_and_time, is_out_of_memory, largest_batch, measure, sweep

QUICK = {"min_seconds": 0.01, "max_seconds": 0.5}


@pytest.mark.parametrize("runtime", ["eager", "onnxruntime", "openvino"])
def test_conditions_are_complete(runtime: str, tiny: nn.Module) -> None:
    m = measure(tiny, Conditions(batch_size=3, threads=1), runtime=runtime, **QUICK)
    c = m.conditions
    assert (c.batch_size, c.image_size, c.threads, c.runtime, c.mode) == (3, 32, 1, runtime, "infer")
    assert len(m.times_s) >= 5
    assert m.images_per_s == pytest.approx(3 / m.latency_s)
    assert m.model == "Tiny"
    assert m.environment.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_the_batch_and_size_are_what_runs() -> None:
    seen: list[tuple[int, ...]] = []

    class Spy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((*x.shape, torch.get_num_threads()))
            assert not self.training
            return x.mean((2, 3))

    class Shared(Spy):
        def __deepcopy__(self, memo: dict) -> Shared:
            return Shared()

    before = torch.get_num_threads()
    measure(Shared(), batch_size=5, image_size=12, threads=1, **QUICK)
    assert set(seen) == {(5, 3, 12, 12, 1)}
    assert torch.get_num_threads() == before


def test_training_steps_a_copy(tiny: nn.Module) -> None:
    before = copy.deepcopy(tiny.state_dict())
    m = measure(tiny, mode="train", batch_size=4, threads=1, **QUICK)
    assert (m.conditions.mode, m.conditions.batch_size) == ("train", 4)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), tiny.state_dict().values(), strict=True))
    assert not tiny.training


def test_training_really_trains(monkeypatch: pytest.MonkeyPatch, tiny: nn.Module) -> None:
    made: list[list[nn.Parameter]] = []
    sgd = torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda params, **k: made.append(list(params)) or sgd(made[-1], **k))
    measure(tiny, mode="train", batch_size=4, threads=1, **QUICK)
    start = dict(tiny.named_parameters())["head.weight"]
    assert not any(p.shape == start.shape and torch.equal(p, start) for p in made[0])


def test_export_and_time_runs_what_is_shipped(tiny: nn.Module) -> None:
    m = export_and_time(tiny, batch_size=2, threads=1, image_size=24, **QUICK)
    assert (m.conditions.runtime, m.conditions.image_size) == ("onnxruntime", 24)


def test_artefact_in_its_own_runtime_and_another(onnx_art: Artifact) -> None:
    m = measure(onnx_art, batch_size=2, threads=1, **QUICK)
    assert (m.conditions.runtime, m.conditions.image_size, m.conditions.precision) == ("onnxruntime", 32, "fp32")
    assert measure(onnx_art, batch_size=2, runtime="openvino", threads=1, **QUICK).conditions.runtime == "openvino"
    for ask in ({"image_size": 64}, {"cond": Conditions(image_size=64)}):
        with pytest.raises(UserError, match="takes 32 px, got image_size 64"):
            measure(onnx_art, **ask)


def test_a_name_is_built() -> None:
    pytest.importorskip("convscale.nn.net")
    m = measure("efficientnet_lite0", batch_size=1, image_size=32, threads=1, **QUICK)
    assert (m.model, m.conditions.image_size) == ("efficientnet_lite0", 32)


class Limited(nn.Module):
    """Runs out of memory above a batch size."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.seen = limit, []

    def __deepcopy__(self, memo: dict) -> Limited:
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(x))
        if len(x) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return x.mean((2, 3))


class Sleepy(Limited):
    """Throughput grows with the batch without end: a call takes as long whatever its size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.002)
        return super().forward(x)


def test_a_batch_that_does_not_fit_is_halved_and_reported() -> None:
    m = measure(Limited(5), batch_size=16, image_size=4, threads=1, **QUICK)
    assert m.conditions.batch_size == 4
    assert m.notes == ("batch 16 did not fit in memory; halved to 8", "batch 8 did not fit in memory; halved to 4")


def test_not_even_one_fits() -> None:
    with pytest.raises(UserError, match="does not fit in the memory of cpu at 4 px, even one image at a time"):
        measure(Limited(0), batch_size=2, image_size=4, threads=1, **QUICK)


def test_tresnet_protocol_takes_90_percent_of_the_largest() -> None:
    m = measure(Limited(20), protocol="tresnet", image_size=4, threads=1, **QUICK)
    assert m.conditions.batch_size == 18
    assert m.notes == ("tresnet protocol: the largest batch that fits is 20",)


@pytest.mark.parametrize("largest", [1, 2, 3, 7, 64, 100, 513, 5000])
def test_largest_batch(largest: int) -> None:
    tried: list[int] = []
    found = largest_batch(lambda n: tried.append(n) or n <= largest)
    assert 1 <= found <= largest
    assert found >= largest - max(1, largest // 32)
    assert min(tried) >= 1
    assert len(tried) < 25


def test_largest_batch_ends_at_the_limit() -> None:
    assert largest_batch(lambda n: True, limit=100) == 100
    with pytest.raises(UserError, match="not even one image fits"):
        largest_batch(lambda n: False)


def test_a_sweep_opens_once_and_measures_each_batch(tiny: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    real = subjects._open_module
    monkeypatch.setattr(subjects, "_open_module", lambda *a: opened.append(a) or real(*a))
    found = list(sweep(tiny, batch_sizes=[4, 1], runtime="onnxruntime", threads=1, **QUICK))
    assert [m.conditions.batch_size for m in found] == [4, 1]
    assert len(opened) == 1


def test_a_sweep_without_sizes_ends_where_memory_does() -> None:
    found = list(sweep(Sleepy(6), image_size=4, threads=1, **QUICK))
    assert [m.conditions.batch_size for m in found] == [1, 2, 4]


def test_a_sweep_without_sizes_ends_where_throughput_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of a call: 1 up to 4 images, then a quarter of a second an image; two doublings after 4 bring nothing."""
    monkeypatch.setattr(subjects, "_stopwatch", lambda *a: Counted())
    found = list(sweep(Sleepy(10**6), image_size=4, threads=1, **QUICK))
    assert [(m.conditions.batch_size, m.images_per_s) for m in found] == [(1, 1), (2, 2), (4, 4), (8, 4), (16, 4)]


def test_a_sweep_checks_all_sizes_first(tiny: nn.Module) -> None:
    with pytest.raises(UserError, match="batch_size must be a whole number of at least 1, got 0"):
        next(sweep(tiny, batch_sizes=[4, 0]))


def test_the_layout_is_chosen_by_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    class Picky(nn.Module):
        """Slow in channels-last, or in the other layout."""

        def __init__(self, slow: bool) -> None:
            super().__init__()
            self.slow = slow

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Counted.seconds = 0.5 if x.is_contiguous(memory_format=torch.channels_last) == self.slow else 0.25
            return x.mean((2, 3))

    class Told(Counted):
        def time(self, fn):
            fn()
            return Counted.seconds

    monkeypatch.setattr(subjects, "_stopwatch", lambda *a: Told())
    for slow, layout, speeds in (
        (True, "nchw", "nchw 8.0 images/s, nhwc 4.0"),
        (False, "nhwc", "nchw 4.0 images/s, nhwc 8.0"),
    ):
        m = measure(Picky(slow), batch_size=2, image_size=4, threads=1, layout="auto", **QUICK)
        assert (m.conditions.layout, m.images_per_s) == (layout, 8.0)
        assert m.notes == (f"layout chosen by measuring: {speeds} images/s",)


def test_runtimes_of_files_choose_their_layout_themselves(tiny: nn.Module) -> None:
    m = measure(tiny, batch_size=1, threads=1, layout="auto", runtime="onnxruntime", **QUICK)
    assert (m.conditions.layout, m.notes) == ("nchw", ())


def test_on_a_cpu_a_batch_is_not_tried_that_the_system_would_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 x 4 x 4 float32 pixels in, 3 numbers out: 204 bytes an image as counted, a quarter more as guarded."""
    net = Limited(10**9)
    monkeypatch.setattr(subjects, "free_bytes", lambda: int(1.25 * 204 * 100))
    m = measure(net, batch_size=400, image_size=4, threads=1, **QUICK)
    assert m.conditions.batch_size == 100
    assert max(net.seen) == 100
    m = measure(net, protocol="tresnet", image_size=4, threads=1, **QUICK)
    assert m.conditions.batch_size == int(0.9 * 100)


class Counted:
    """A stopwatch that goes by the batch: a second up to 4 images, a quarter of a second an image from there on."""

    seconds = 0.0

    def time(self, fn) -> float:
        return max(1.0, len(fn()) / 4)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU in name only: work stays on the CPU, what is asked of the device is written down."""
    log: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            log.append(f"event on {stream}")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, other: Event) -> float:
            return 20.0  # milliseconds

    class OnCpu(torch_runner.TorchRunner):
        def __init__(self, net, runtime, how) -> None:
            super().__init__(net, runtime, dataclasses.replace(how, device="cpu"))
            self.synchronize = lambda: log.append("sync")

    monkeypatch.setattr(torch_runner, "TorchRunner", OnCpu)
    for name, value in {
        "is_available": lambda: True,
        "Event": Event,
        "synchronize": lambda device: log.append(f"drain {device}"),
        "current_stream": lambda device: f"stream of {device}",
        "get_device_name": lambda device: "A GPU in name only",
        "empty_cache": lambda: log.append("empty"),
        "reset_peak_memory_stats": lambda device: log.append("reset"),
        "max_memory_allocated": lambda device: 3 * 2**30,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return log


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_on_a_gpu_time_is_the_streams_and_memory_is_watched(cuda: list[str], tiny: nn.Module, mode: str) -> None:
    seen: list[bool] = []
    tiny.register_forward_pre_hook(lambda *a: seen.append(torch.backends.cudnn.benchmark))
    m = measure(tiny, device="cuda:1", mode=mode, batch_size=4, threads=1, min_seconds=0.05, max_seconds=1)
    assert set(m.times_s) == {0.02}
    assert m.images_per_s == 200
    assert (m.peak_bytes, m.environment.device_name) == (3 * 2**30, "A GPU in name only")
    assert all(seen), "cuDNN chooses its algorithms by timing them"
    assert not torch.backends.cudnn.benchmark
    first = cuda.index("drain cuda:1")
    assert cuda[first : first + 4] == ["drain cuda:1", "event on stream of cuda:1", "event on stream of cuda:1", "wait"]
    assert cuda.index("reset") < first


def test_after_running_out_the_gpus_memory_is_given_back_before_the_next_try(
    cuda: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exception holds the frames, and they the tensors; while it lives nothing is freed."""
    held: list[weakref.ref] = []

    class Big:
        pass

    class Bursting(Limited):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            big = Big()
            held.append(weakref.ref(big))
            return super().forward(x)

    monkeypatch.setattr(
        torch.cuda, "empty_cache", lambda: cuda.append(f"empty, {sum(ref() is not None for ref in held)} alive")
    )
    m = measure(Bursting(3), device="cuda", batch_size=8, image_size=4, threads=1, min_seconds=0.05, max_seconds=1)
    assert m.conditions.batch_size == 2
    assert {line for line in cuda if line.startswith("empty")} == {"empty, 0 alive"}


def test_out_of_memory_is_told_from_other_errors() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_bad_input(tiny: nn.Module, onnx_art: Artifact) -> None:
    with pytest.raises(UserError, match=r"no condition 'batchsize' \(nearest: batch_size, image_size\)"):
        measure(tiny, batchsize=3)
    with pytest.raises(UserError, match="runtime onnxruntime can not train"):
        measure(tiny, mode="train", runtime="onnxruntime")
    with pytest.raises(UserError, match="an artefact can not train"):
        measure(onnx_art, mode="train")
    with pytest.raises(UserError, match="device 'rtx-4090' can not be measured here; use cpu or cuda"):
        measure(tiny, device="rtx-4090")
    with pytest.raises(UserError, match="protocol 'timm' is unknown"):
        measure(tiny, protocol="timm")
    with pytest.raises(UserError, match="the input size of Flatten is not known; give image_size"):
        measure(nn.Flatten())
    with pytest.raises(UserError, match="fp32 and nchw"):
        measure(tiny, runtime="openvino", precision="bf16")
    with pytest.raises(UserError, match="no parameter"):
        measure(nn.Flatten(), image_size=4, mode="train")


def test_seeded_input_has_no_subnormal_numbers(tiny: nn.Module) -> None:
    from convscale.networks.inputs import example_input

    x = example_input(tiny, batch_size=3).numpy()
    assert np.array_equal(x, example_input(tiny, batch_size=3).numpy())
    assert not ((np.abs(x) < np.finfo(np.float32).tiny) & (x != 0)).any()
