"""Measuring: what is timed, under which conditions, and what happens when memory ends. No time is asserted."""

from __future__ import annotations

import copy
import dataclasses
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from convscale.artifact.artifact import Artifact
from convscale.choice.basis import Asked, basis_of
from convscale.conditions import Conditions
from convscale.errors import UserError
from convscale.images.preprocess import Preprocessing
from convscale.learn.settings import usable_device
from convscale.machine import Environment
from convscale.predictor.sweep import sheet_here
from convscale.runtimes.base import Opening, Runner, open_runtime
from convscale.runtimes.pytorch import runner as torch_runner
from convscale.ship.export import export
from convscale.ship.request import need_device
from convscale.speed import measuring, subjects
from convscale.speed.measuring import export_and_time, largest_batch, measure, measure_calmly, sweep
from convscale.speed.subjects import is_too_large
from convscale.speed.timing import Measurement

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


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_a_timed_network_is_compiled_for_its_batch_alone(
    mode: str, tiny: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first call with two images made code for all sizes, and that was timed."""
    seen: list[int] = []
    given: list[dict[str, object]] = []

    def compile(net: nn.Module, **options: object) -> object:
        given.append(options)
        return lambda x: seen.append(len(x)) or net(x)

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch_runner, "installed_runtimes", lambda: ("compiled",))
    measure(tiny, mode=mode, runtime="compiled", batch_size=5, threads=1, **QUICK)
    assert set(seen) == {5}
    assert [options["dynamic"] for options in given] == [False]


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


def test_a_sweep_opens_an_artefact_for_each_batch_where_its_runtime_compiles_for_it(
    onnx_art: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int | None] = []
    real = subjects.open_artifact

    def opening(artifact: Artifact, runtime: str, how: Opening) -> Runner:
        opened.append(how.batch_size)
        return real(artifact, runtime, how)

    monkeypatch.setattr(subjects, "open_artifact", opening)
    found = list(sweep(onnx_art, batch_sizes=[2, 3], runtime="openvino", threads=1, batch_size=2, **QUICK))
    assert [m.conditions.batch_size for m in found] == opened == [2, 3]
    opened.clear()
    list(sweep(onnx_art, batch_sizes=[2, 3], runtime="onnxruntime", threads=1, batch_size=2, **QUICK))
    assert opened == [2]


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
    assert 0.9 * 100 * 31 / 32 - 1 < m.conditions.batch_size <= 0.9 * 100  # the largest is found to one part in 32


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
        "device_count": lambda: 2,
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
    assert is_too_large(torch.OutOfMemoryError("x"))
    assert is_too_large(MemoryError())
    assert is_too_large(RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"))
    assert is_too_large(RuntimeError("input tensor must fit into 32-bit index math"))
    assert is_too_large(RuntimeError("Expected canUse32BitIndexMath(input) && canUse32BitIndexMath(output) to be true"))
    assert not is_too_large(RuntimeError("mat1 and mat2 shapes"))
    assert not is_too_large(ValueError("out of memory"))


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
    with pytest.raises(UserError, match="Flatten does not say its image size; give image_size"):
        measure(nn.Flatten())
    with pytest.raises(UserError, match="fp32 and nchw"):
        measure(tiny, runtime="openvino", precision="bf16")
    with pytest.raises(UserError, match="no parameter"):
        measure(nn.Flatten(), image_size=4, mode="train")


@pytest.mark.parametrize(
    ("device", "cards", "message"),
    [
        ("cuda:1", 1, "device 'cuda:1' is not there: there are 1 CUDA devices, counted from 0; use device cpu, or "),
        ("cuda:10", 2, "device 'cuda:10' is not there: there are 2 CUDA devices, counted from 0; use device cpu, or "),
        ("cuda:0", 0, "device 'cuda:0' is not there: torch sees no CUDA GPU; use device cpu, or "),
        ("cuda:x", 1, "device 'cuda:x' is none of this machine's; cpu, cuda or cuda:N would be right"),
        ("cuda:", 1, "device 'cuda:' is none of this machine's; cpu, cuda or cuda:N would be right"),
    ],
)
def test_a_card_that_is_not_there_is_one_clear_line(
    device: str, cards: int, message: str, tiny: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To measure on, to choose for, to sweep, to train on, to tune for, and to open a module on."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    for ask in (lambda: measure(tiny, device=device), lambda: basis_of(Asked(device=device))):
        with pytest.raises(UserError) as caught:
            ask()
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError) as caught:
        sheet_here(device)
    assert str(caught.value).startswith(message.removesuffix("use device cpu, or "))
    for need in (usable_device, need_device, lambda name: open_runtime(tiny, "eager", Opening(device=name))):
        with pytest.raises(UserError) as caught:
            need(device)
        assert str(caught.value) == message.removesuffix(", or ")


def test_a_device_that_is_none_is_one_clear_line(tiny: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        UserError, match=r"^device 'cudax' is none of this machine's; cpu, cuda or cuda:N would be right$"
    ):
        measure(tiny, device="cudax")
    with pytest.raises(UserError, match=r"^device 'cudax' is unknown"):
        basis_of(Asked(device="cudax"))


def test_seeded_input_has_no_subnormal_numbers(tiny: nn.Module) -> None:
    from convscale.networks.inputs import example_input

    x = example_input(tiny, batch_size=3).numpy()
    assert np.array_equal(x, example_input(tiny, batch_size=3).numpy())
    assert not ((np.abs(x) < np.finfo(np.float32).tiny) & (x != 0)).any()


# --- what is recorded is what ran


@pytest.mark.parametrize("form", ["onnx", "torch"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"precision": "int8"}, "the artefact is in fp32, got precision 'int8'"),
        ({"precision": "bf16"}, "the artefact is in fp32, got precision 'bf16'"),
        ({"layout": "nhwc"}, "an artefact lays out memory itself, got layout 'nhwc'"),
        ({"image_size": 64}, "the artefact takes 32 px, got image_size 64"),
        ({"mode": "train"}, "an artefact can not train"),
        ({"runtime": "openvin"}, r"runtime 'openvin' is unknown \(nearest: openvino"),
    ],
)
def test_an_artefact_is_not_recorded_under_conditions_it_did_not_run_in(
    form: str, wrong: dict, message: str, tiny: nn.Module, preprocessing: Preprocessing, tmp_path: Path
) -> None:
    """By keyword and in a ``Conditions``; 0.1.0 wrote ``int8``, ``bf16`` and ``nhwc`` down for a float32 file."""
    art = export(tiny, tmp_path / form, format=form, preprocessing=preprocessing)
    with pytest.raises(UserError, match=message):
        measure(art, **wrong, **QUICK)
    with pytest.raises(UserError, match=message):
        measure(art, Conditions(**wrong), **QUICK)


def test_bf16_in_openvino_is_not_recorded_for_a_float32_artefact(onnx_art: Artifact) -> None:
    with pytest.raises(UserError, match="the artefact is in fp32, got precision 'bf16'"):
        measure(onnx_art, runtime="openvino", precision="bf16", **QUICK)


@pytest.mark.parametrize("given", [None, Conditions(), Conditions(batch_size=4)])
def test_conditions_left_at_their_defaults_are_the_artefacts_own(given: Conditions | None, onnx_art: Artifact) -> None:
    c = measure(onnx_art, given, threads=1, **QUICK).conditions
    assert (c.runtime, c.precision, c.layout, c.image_size, c.threads) == ("onnxruntime", "fp32", "nchw", 32, 1)


class Rectangular(nn.Module):
    """Takes 20 x 30 px, and says so as timm's networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, 20, 30)}
        self.conv = nn.Conv2d(3, 4, 3)
        self.shapes: list[tuple[int, ...]] = []

    def __deepcopy__(self, memo: dict) -> Rectangular:
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(x.shape[2:]))
        return self.conv(x).mean((2, 3))


@pytest.mark.parametrize(("asked", "runs"), [(None, (20, 30)), ((24, 40), (24, 40)), (16, 16)])
def test_rectangles_are_measured_as_rectangles(asked: object, runs: object) -> None:
    """Version 0.1.0 timed 20 x 30 as 20 x 20 in silence, and met a tuple with a traceback."""
    net = Rectangular()
    m = measure(net, image_size=asked, **QUICK)
    assert m.conditions.image_size == runs
    assert set(net.shapes) == {runs if isinstance(runs, tuple) else (runs, runs)}


class Two(nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x * mask


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_a_network_of_two_inputs_is_one_clear_line(mode: str) -> None:
    with pytest.raises(UserError, match=r"Two takes 2 inputs \(x, mask\)"):
        measure(Two(), mode=mode, image_size=16, **QUICK)


class Several(nn.Module):
    """Logits and an auxiliary output, in the shape that ``give`` makes of them."""

    def __init__(self, give: object) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)
        self.give = give

    def forward(self, x: torch.Tensor) -> object:
        logits = self.fc(x.mean((2, 3)))
        return self.give(logits) if callable(self.give) else self.give


def as_tuple(logits: torch.Tensor) -> object:
    return logits, logits * 2


def as_mapping(logits: torch.Tensor) -> object:
    return {"out": logits, "aux": logits * 2}


@pytest.mark.parametrize("give", [as_tuple, as_mapping])
def test_auxiliary_outputs_are_left_out_of_a_training_step(give: object) -> None:
    """As torchvision's inception (a named tuple) and segmentation networks (a mapping) give them."""
    assert measure(Several(give), mode="train", image_size=16, batch_size=2, **QUICK).conditions.mode == "train"


def as_nothing(logits: torch.Tensor) -> object:
    return ()


def test_a_training_step_without_logits_is_one_clear_line() -> None:
    with pytest.raises(UserError, match=r"logits \(N, classes\); Several gives NoneType"):
        measure(Several(as_nothing), mode="train", image_size=16, batch_size=2, **QUICK)


@pytest.mark.parametrize("value", [0, -1, True, "1", float("nan"), float("inf")])
def test_seconds_that_are_no_time(value: object, tiny: nn.Module) -> None:
    with pytest.raises(UserError, match="seconds to time are"):
        measure(tiny, min_seconds=value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rounds", "calls", "speed"),
    [
        ([(0.01, 0.0101, 0.0102, 0.0103)], 1, 2 / 0.01015),  # calm: the first is taken
        ([(0.01, 0.02, 0.04, 0.05), (0.011,) * 4], 2, 2 / 0.011),  # disturbed, then calm
        ([(0.01, 0.02, 0.04, 0.05), (0.031,) * 4], 2, 2 / 0.03),  # calm but slowed down throughout: the faster
        ([(0.01, 0.02, 0.04, 0.05), (0.01, 0.02, 0.02, 0.05), (0.03, 0.01, 0.04, 0.05)], 3, 2 / 0.02),
    ],
)
def test_a_disturbed_glance_is_taken_again(
    rounds: list[tuple[float, ...]], calls: int, speed: float, tiny: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measured(subject: object, batch_size: int, *seconds: float) -> Measurement:
        times = rounds[len(asked)]
        asked.append((batch_size, *seconds))
        return Measurement(times_s=times, conditions=Conditions(batch_size=2), environment=Environment.here())

    monkeypatch.setattr(measuring, "_measured", measured)
    made = measure_calmly(tiny, Conditions(batch_size=2, image_size=8), min_seconds=0.3, max_seconds=5.0)
    assert made.images_per_s == pytest.approx(speed)
    assert asked == [(2, 0.3, 5.0)] * calls
