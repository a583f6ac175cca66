"""Statistics over two gloo processes against one process on the joint batch."""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from convscale.nn.norm import convert_sync, norm_act

CASES = [
    ("inplace", "leaky_relu", "output"),
    ("inplace", "identity", "output"),
    ("inplace", "identity", "input"),
    ("batchnorm", "relu", "output"),
]
BATCHES = {"even": (3, 3), "uneven": (4, 1), "one empty": (5, 0)}
STEPS = 2


def net_of(kind: str, activation: str, keep) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        norm_act(kind, 4, activation=activation, slope=0.1, keep=keep),
        nn.Conv2d(4, 4, 1),
        norm_act(kind, 4),
    )
    net = net.double()
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([0.7, -0.4, 1.2, -1.0]))
        net[1].bias.copy_(torch.tensor([0.3, -0.2, 0.0, 1.0]))
    return net


def bare_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double()


def images(count: int, step: int) -> tuple[Tensor, Tensor]:
    """The joint batch of a step, and the gradient of its output; far from 0, where sums of squares cancel."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(count, 3, 6, 5, generator=generator).double() + 10, torch.randn(
        count, 4, 4, 3, generator=generator
    ).double()


def steps(net: nn.Module, counts: tuple[int, ...], rank: int | None) -> dict[str, list[Tensor]]:
    """What STEPS training steps give on one process's share of the batch (rank None: on all of it)."""
    first = sum(counts[:rank]) if rank is not None else 0
    share = slice(first, first + counts[rank] if rank is not None else sum(counts))
    found: dict[str, list[Tensor]] = {"outputs": [], "inputs": [], "parameters": []}
    for step in range(STEPS):
        net.zero_grad()
        x, dy = (t[share] for t in images(sum(counts), step))
        x = x.requires_grad_()
        y = net(x)
        y.backward(dy)
        found["outputs"].append(y.detach())
        found["inputs"].append(x.grad)
        found["parameters"].append([p.grad.clone() for p in net.parameters()])
    found["buffers"] = [b.clone() for b in net.buffers()]
    with torch.no_grad():
        found["eval"] = [net.eval()(images(2, 9)[0])]
    return found


def join(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)


def work(rank: int, port: int, folder: str) -> None:
    join(rank, port)
    found = {}
    for case in CASES:
        for name, counts in BATCHES.items():
            net = copy.deepcopy(convert_sync(net_of(*case)))
            found[(*case, name)] = steps(net, counts, rank)
    found["bare"] = steps(convert_sync(bare_net()), BATCHES["uneven"], rank)
    groups = [dist.new_group([0]), dist.new_group([1])]
    alone = convert_sync(net_of(*CASES[0]), groups[rank])
    found["alone"] = steps(copy.deepcopy(alone), BATCHES["even"], rank)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def work_compiled(rank: int, port: int, folder: str) -> None:
    join(rank, port)
    compiled = torch.compile(convert_sync(net_of(*CASES[0])), backend="aot_eager", fullgraph=True)
    torch.save(steps(compiled, BATCHES["even"], rank), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def spawn(target: Callable[..., None], folder: Path) -> list[dict]:
    """What each of two processes saved."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(target, (port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What two processes found in every case."""
    return spawn(work, tmp_path_factory.mktemp("sync"))


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-6, atol=1e-9)


def check(shares: list[dict], joint: dict) -> None:
    for step in range(STEPS):
        for what in ("outputs", "inputs"):
            assert close(torch.cat([share[what][step] for share in shares]), joint[what][step]), what
        for ours, theirs in zip(
            zip(*(share["parameters"][step] for share in shares), strict=True), joint["parameters"][step], strict=True
        ):
            assert close(sum(ours), theirs)
    for share in shares:
        for a, b in zip(share["buffers"], joint["buffers"], strict=True):
            assert close(a.double(), b.double())
        assert close(share["eval"][0], joint["eval"][0])


@pytest.mark.parametrize("batches", list(BATCHES))
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_two_processes_equal_one_on_the_joint_batch(found: list[dict], case: tuple, batches: str) -> None:
    check([f[(*case, batches)] for f in found], steps(net_of(*case), BATCHES[batches], None))


def test_a_bare_batch_norm_is_synchronised_too(found: list[dict]) -> None:
    check([f["bare"] for f in found], steps(bare_net(), BATCHES["uneven"], None))


@pytest.mark.slow
def test_compiles_over_processes(tmp_path: Path) -> None:
    shares = spawn(work_compiled, tmp_path)
    check(shares, steps(net_of(*CASES[0]), BATCHES["even"], None))


def test_a_group_of_one_is_on_its_own(found: list[dict]) -> None:
    for rank in range(2):
        alone = steps(net_of(*CASES[0]), BATCHES["even"], rank)
        for a, b in zip(found[rank]["alone"]["outputs"], alone["outputs"], strict=True):
            assert close(a, b)
    assert not close(found[0]["alone"]["buffers"][0], found[1]["alone"]["buffers"][0])


def test_without_a_process_group_nothing_is_shared() -> None:
    plain, synced = (steps(net, (3, 3), 0) for net in (net_of(*CASES[0]), convert_sync(net_of(*CASES[0]))))
    for a, b in zip(plain["outputs"], synced["outputs"], strict=True):
        assert torch.equal(a, b)
