"""``compile=graphs`` without a card: a stand-in for ``torch.compile`` gives outputs and gradients in memory that its
next call writes again, as a CUDA graph's replay does.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import benchmarks.gpu as gpu
from convscale.errors import UserError
from convscale.learn import cost, graphs
from convscale.learn.train import TrainRun, train
from tests.learn.nets import halves_data, small_net
from tests.learn.test_compiling import same
from tests.learn.test_train import QUICK


class Replays:
    """Stands for ``torch.compile`` on a GPU."""

    def __init__(self) -> None:
        self.modes: list[str] = []
        self.calls = self.steps = self.written = 0

    def compile(self, net: nn.Module, mode: str = "default") -> nn.Module:
        self.modes.append(mode)
        return Replayed(self, net) if mode == "reduce-overhead" else net

    def mark(self) -> None:
        """``torch.compiler.cudagraph_mark_step_begin``."""
        self.steps += 1


class Replayed(nn.Module):
    """The network, but for its memory."""

    def __init__(self, owner: Replays, net: nn.Module) -> None:
        super().__init__()
        self.net, self.owner = net, [owner]
        self.memory: list[torch.Tensor] = []
        self.fresh = set[nn.Parameter]()
        for param in net.parameters():
            param.register_post_accumulate_grad_hook(self.wrote)

    def wrote(self, param: torch.Tensor) -> None:
        """Autograd has made what the backward graph wrote the gradient, where there was none to add to."""
        if param in self.fresh and param.grad is not None:
            self.memory.append(param.grad.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        owner = self.owner[0]
        owner.calls += 1
        assert owner.steps == owner.calls, "the step was not marked"
        for tensor in self.memory:
            tensor.fill_(float("nan"))
            owner.written += 1
        self.fresh = {param for param in self.net.parameters() if param.grad is None}
        out = self.net(x)
        self.memory = [out.detach()]
        return out


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> Replays:
    replays = Replays()
    monkeypatch.setattr(torch, "compile", replays.compile)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", replays.mark)
    monkeypatch.setattr(graphs, "has_graphs", lambda _: True)
    return replays


def _net() -> nn.Module:
    torch.manual_seed(5)
    return small_net()


def _run(**options: Any) -> tuple[TrainRun, list[float]]:
    losses: list[float] = []
    more = {key: options.pop(key) for key in ("teacher", "output", "resume", "epochs") if key in options}

    def told(event: Any) -> None:
        if event["kind"] == "step":
            losses.append(event["loss"])

    recipe = QUICK.override({"epochs": 2, "ema_decay": 0.9, **options})
    return train(_net(), halves_data(), recipe=recipe, progress=told, **more), losses


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({}, 12),
        ({"accumulate": 3, "clip_norm": 0.1}, 12),
        ({"accumulate": 2, "optimizer": "muon", "freeze_epochs": 1}, 12),
        ({"precision": "bf16", "ema_width": 0.1, "ema_decay": 0.0, "epochs": 1}, 6),
    ],
)
def test_a_run_is_the_same_though_its_passes_memory_is_written_again(
    replays: Replays, options: dict[str, Any], calls: int
) -> None:
    plain, right = _run(**options)
    graphed, losses = _run(compile="graphs", **options)
    assert (losses, same(plain, graphed)) == (right, True)
    assert (replays.calls, replays.modes) == (calls, ["reduce-overhead"])
    assert replays.written >= calls - 1  # outputs at least; gradients too, which were moved or gone
    assert graphed.cost.compile is None


def test_a_teacher_and_what_a_hook_saw_are_used_up_in_their_step(replays: Replays) -> None:
    teacher = small_net().eval()
    options: dict[str, Any] = {"teacher": teacher, "distill_kl": 2.0, "distill_features": 1.0, "accumulate": 2}
    plain, right = _run(**options)
    graphed, losses = _run(compile="graphs", **options)
    assert (losses, same(plain, graphed)) == (right, True)
    assert replays.calls == 12


def test_gradients_that_are_added_to_are_moved_once_into_memory_that_stays(replays: Replays) -> None:
    net = _net()
    graphed, given, seen = graphs.Graphed(net), torch.rand(4, 1, 12, 12), []
    for _ in range(2):
        for _ in range(3):
            graphed(given).square().mean().backward()
            seen.append(net.get_parameter("9.weight").grad)
        net.zero_grad(set_to_none=True)
    assert seen[0] is not seen[1]
    assert seen[1] is seen[2] is seen[4] is seen[5]
    assert torch.isfinite(seen[1]).all()


def test_without_a_gpu_it_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    said = "recipe quick: compile is graphs, CUDA graphs, and device cpu is no CUDA GPU; compile=auto would be right"
    with pytest.raises(UserError) as refused:
        train(_net(), halves_data(), recipe=QUICK, compile="graphs", output=tmp_path / "run")
    assert str(refused.value) == said.replace("quick", QUICK.name)
    assert not (tmp_path / "run").exists()
    graphs.check_compile(QUICK.override({"compile": "graphs"}), torch.device("cuda", 1))
    graphs.check_compile(QUICK.override({"compile": True}), torch.device("cpu"))


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        (False, ["torch.compile is tried where the time left could pay for it, with and without CUDA graphs"]),
        (True, ["CUDA graphs are tried too, which save the launches of small images' steps"]),
        ("graphs", []),
        ("auto", []),
    ],
)
def test_the_cost_says_what_was_not_tried_on_a_gpu(choice: bool | str, said: list[str]) -> None:
    job = SimpleNamespace(
        recipe=QUICK.override({"compile": choice, "layout": "auto"}),
        settings=SimpleNamespace(precision="bf16", layout="nhwc"),
        loader=SimpleNamespace(in_memory=True),
        device=torch.device("cuda"),
        processes=SimpleNamespace(world=1),
    )
    spent = cost.RunCost(
        seconds=9.0, training_s=9.0, waiting_s=0.0, validation_s=0.0, images=1, peak_memory_bytes=1, advice=()
    )
    trainer: Any = SimpleNamespace(job=job, net=nn.Identity())
    assert cost._advice(trainer, spent) == [f"--set compile=auto: {text}" for text in said]
    job.processes.world = 2
    assert cost._advice(trainer, spent) == []


@pytest.mark.slow
def test_without_a_gpu_no_graphs_are_there_to_give_back() -> None:
    """By PyTorch's own, whose inside this is; it takes seconds to import."""
    assert not graphs.other_graphs()
    graphs.drop_graphs()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("accumulate", [1, 3])
def test_graphs_on_a_gpu_train_as_what_is_compiled(accumulate: int) -> None:
    losses: dict[bool | str, list[float]] = {True: [], "graphs": []}
    for choice, found in losses.items():
        recipe = QUICK.override({"compile": choice, "accumulate": accumulate, "epochs": 4})
        told = lambda event, found=found: found.append(event["loss"]) if event["kind"] == "step" else None  # noqa: E731
        train(_net(), halves_data(), recipe=recipe, device="cuda", progress=told)
    assert losses["graphs"] == pytest.approx(losses[True], rel=0.02)


def test_the_benchmark_trains_small_images_in_three_ways(replays: Replays) -> None:
    rows = list(gpu.graphs(gpu.Card("cpu", tiny=True)))
    assert [(row["mode"], row["image_size"], row["batch"]) for row in rows] == [
        (mode, 28, 4) for mode in ("eager", "default", "graphs")
    ]
    assert all(row["images_per_s"] > 0 for row in rows)
    assert replays.modes == ["default", "reduce-overhead"]
    assert list(gpu.STAGES)[-1] == "graphs"
