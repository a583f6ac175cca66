"""SyncNorm by CUDA's own kernels, without a card: plain stand-ins for them that check what they are given, over two
gloo processes, against the plain path; and fake CUDA tensors through the same code.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from convscale.nn import sync_cuda
from convscale.nn.kernels.norm_twin import per_channel, sums_dtype
from convscale.nn.norm import convert_sync, norm_act
from tests.nn.test_sync import BATCHES, CASES, STEPS, check, close, join, net_of, spawn, steps

KEEPING_INPUT = [case for case in CASES if case[0] == "batchnorm" or case[2] == "input"]
CALLS: list[str] = []


def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``batch_norm_stats``: mean and inverse deviation (C,) of one process's maps."""
    CALLS.append("stats")
    assert x.numel(), "CUDA's kernel takes no empty maps"
    var, mean = torch.var_mean(x.to(sums_dtype(x.dtype)), dim=(0, 2, 3), correction=0)
    return mean, torch.rsqrt(var + eps)


def gather(
    x: Tensor,
    means: Tensor,
    invstds: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    """``batch_norm_gather_stats_with_counts``, step by step as the kernel does it (Welford)."""
    CALLS.append("gather")
    processes, channels = means.shape
    assert invstds.shape == means.shape
    assert counts.shape == (processes,)
    wanted = x.dtype if running_mean is None else running_mean.dtype
    assert counts.dtype == wanted, "the kernel reads counts as this type"
    assert means.dtype == invstds.dtype == sums_dtype(wanted)
    mean, var, n = torch.zeros_like(means[0]), torch.zeros_like(means[0]), counts.new_zeros(())
    for each in range(processes):
        count, m = counts[each], means[each]
        factor = 1.0 / (n + count)
        var = var + (1 / invstds[each] ** 2 - eps) * count + (mean - m) ** 2 * n * count * factor
        mean = n * factor * mean + count * factor * m
        n = n + count
    if running_mean is not None and running_var is not None:
        assert running_mean.shape == running_var.shape == (channels,)
        running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
        running_var.mul_(1 - momentum).add_(var / (n - 1), alpha=momentum)
    return mean, torch.rsqrt(var / n + eps)


def elemt(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, eps: float) -> Tensor:
    """``batch_norm_elemt``."""
    CALLS.append("elemt")
    assert {t.shape for t in (weight, bias, mean, invstd)} == {(x.shape[1],)}
    assert {t.dtype for t in (weight, bias, mean, invstd)} == {sums_dtype(x.dtype)}
    return ((x.to(mean.dtype) - per_channel(mean)) * per_channel(invstd * weight) + per_channel(bias)).to(x.dtype)


def reduce(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, *wanted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``batch_norm_backward_reduce``: this process's sums."""
    CALLS.append("reduce")
    assert (dy.shape, dy.dtype, dy.stride()) == (x.shape, x.dtype, x.stride())
    assert wanted == (True, True, True)
    wide = dy.to(mean.dtype)
    sum_dy, sum_dy_xmu = wide.sum((0, 2, 3)), (wide * (x.to(mean.dtype) - per_channel(mean))).sum((0, 2, 3))
    return sum_dy, sum_dy_xmu, (sum_dy_xmu * invstd).to(weight.dtype), sum_dy.to(weight.dtype)


def back(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    counts: Tensor,
) -> Tensor:
    """``batch_norm_backward_elemt``, with the sums of all processes."""
    CALLS.append("back")
    assert counts.dtype == torch.int32
    assert counts.dim() == 1
    assert sum_dy.shape == sum_dy_xmu.shape == (x.shape[1],)
    share = 1.0 / counts.sum().to(mean.dtype)
    centred = x.to(mean.dtype) - per_channel(mean)
    dx = dy.to(mean.dtype) - per_channel(sum_dy * share) - centred * per_channel(sum_dy_xmu * share * invstd**2)
    return (dx * per_channel(weight * invstd)).to(x.dtype)


STAND_INS = SimpleNamespace(
    batch_norm_stats=stats,
    batch_norm_gather_stats_with_counts=gather,
    batch_norm_elemt=elemt,
    batch_norm_backward_reduce=reduce,
    batch_norm_backward_elemt=back,
)


def work(rank: int, port: int, folder: str) -> None:
    join(rank, port)
    taken: Any = sync_cuda
    taken.takes, taken.aten = lambda _: True, STAND_INS
    found: dict[Any, Any] = {}
    for case in KEEPING_INPUT:
        for name, counts in BATCHES.items():
            CALLS.clear()
            found[(*case, name)] = steps(convert_sync(net_of(*case)), counts, rank)
            found[(*case, name, "calls")] = list(CALLS)
    for precision in (torch.float32, torch.bfloat16):
        for used in (True, False):
            taken.takes = lambda _, used=used: used
            found[precision, used] = once(precision, (4, 1)[rank], rank)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def once(precision: torch.dtype, count: int, rank: int) -> list[Tensor]:
    """A step of a lone norm stored in a precision, on channels-last maps: output, gradients, running statistics."""
    generator = torch.Generator().manual_seed(rank)
    x, dy = (torch.randn(count, 4, 5, 3, generator=generator).to(precision) for _ in range(2))
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    norm = convert_sync(norm_act("batchnorm", 4)).to(precision)
    y = norm(x)
    y.backward(dy)
    grads = [p.grad for p in norm.parameters()]
    return [t.detach().float() for t in (y, x.grad, *grads, *norm.buffers()) if t is not None]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return spawn(work, tmp_path_factory.mktemp("sync"))


@pytest.mark.parametrize("batches", list(BATCHES))
@pytest.mark.parametrize("case", KEEPING_INPUT, ids="-".join)
def test_two_processes_equal_one_on_the_joint_batch(found: list[dict], case: tuple, batches: str) -> None:
    check([f[(*case, batches)] for f in found], steps(net_of(*case), BATCHES[batches], None))
    norms = 2 if case[0] == "batchnorm" else 1
    forward, backward = ["stats", "gather", "elemt"], ["reduce", "back"]
    for rank, share in enumerate(found):
        calls = share[(*case, batches, "calls")]
        if BATCHES[batches][rank]:
            assert sorted(calls) == sorted((forward + backward) * norms * STEPS)
        else:
            assert set(calls) == {"gather"}, "without an image only the exchange is taken part in"


@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_other_precisions_equal_the_plain_path(found: list[dict], precision: torch.dtype, tolerance: float) -> None:
    for share in found:
        for mine, plain in zip(share[precision, True], share[precision, False], strict=True):
            torch.testing.assert_close(mine, plain, rtol=tolerance, atol=tolerance)


def test_fake_cuda_tensors_run_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tensors on CUDA are taken, and what comes out lies there too."""
    ours = SimpleNamespace(get_world_size=lambda _: 2, get_rank=lambda _: 0, all_reduce=lambda *_, **__: None)
    monkeypatch.setattr(sync_cuda, "dist", ours)
    monkeypatch.setattr(sync_cuda, "aten", STAND_INS)
    assert not sync_cuda.takes(torch.zeros(1))
    with FakeTensorMode(), torch.device("cuda"):
        x = torch.empty(2, 4, 5, 5, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
        norm = norm_act("batchnorm", 4)
        assert sync_cuda.takes(x)
        y, mean, invstd = norm._normalise_together(x, 0.1, None)  # type: ignore[union-attr, arg-type]
    assert (y.device.type, y.dtype, y.shape) == ("cuda", torch.float16, x.shape)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert mean.shape == invstd.shape == (4,)
    assert mean.dtype == invstd.dtype == torch.float32


def test_statistics_of_an_empty_share_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has no image; the other has 8 values of mean 3 and variance 4: theirs are the statistics."""
    eps = 1e-5

    def exchange(table: Tensor, **_: object) -> None:
        table[1] = torch.tensor([3.0, 3.0, (4 + eps) ** -0.5, (4 + eps) ** -0.5, 8.0])

    ours = SimpleNamespace(get_world_size=lambda _: 2, get_rank=lambda _: 0, all_reduce=exchange)
    monkeypatch.setattr(sync_cuda, "dist", ours)
    monkeypatch.setattr(sync_cuda, "aten", STAND_INS)
    running = torch.zeros(2), torch.ones(2)
    mean, invstd, counts = sync_cuda.joint_statistics(torch.zeros(0, 2, 2, 2), running, 0.5, eps, None)
    assert close(mean, torch.full((2,), 3.0))
    assert close(invstd, torch.full((2,), (4 + eps) ** -0.5))
    assert counts.tolist() == [0, 8]
    assert close(running[0], torch.full((2,), 1.5))
    assert torch.allclose(running[1], torch.full((2,), (1 + 4 * 8 / 7) / 2), rtol=1e-5)
