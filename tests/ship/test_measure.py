"""Measuring: what is timed, under which conditions, and what happens when memory ends. No time is asserted."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from convscale.errors import UserError
from convscale.ship.artifact import Artifact
from convscale.ship.measure import export_and_time, is_out_of_memory, largest_batch, measure
from convscale.speed.conditions import Conditions

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
    with pytest.raises(UserError, match="takes 32 px, got image_size 64"):
        measure(onnx_art, image_size=64)


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
    from convscale.ship.nets import example_input

    x = example_input(tiny, batch_size=3).numpy()
    assert np.array_equal(x, example_input(tiny, batch_size=3).numpy())
    assert not ((np.abs(x) < np.finfo(np.float32).tiny) & (x != 0)).any()
