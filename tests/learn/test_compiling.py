"""``compile=auto`` pays or leaves no trace: with a stand-in for torch.compile and a clock that passes count."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from convscale.learn import compiling, loop
from convscale.learn.compiling import Compiled, Compiling
from convscale.learn.distributed import Processes
from convscale.learn.recipe import Recipe
from convscale.learn.record import read_train_run
from convscale.learn.train import TrainRun, train
from tests.learn.nets import halves_data, small_net
from tests.learn.test_train import QUICK


class Machine:
    """A clock that stands but for the network's passes."""

    def __init__(self) -> None:
        self.now, self.plain, self.quick, self.compiling = 0.0, 100.0, 50.0, 70.0
        self.error: Exception | None = None
        self.compiled = 0  # passes
        self.graphed, self.recording = 30.0, 80.0  # as quick and compiling are, of CUDA graphs
        self.graph_error: Exception | None = None
        self.replayed = self.dropped = 0

    def compile(self, net: nn.Module, mode: str = "default") -> nn.Module:
        machine, first = self, [True]

        class Fast(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                if machine.error is not None:
                    net(x)  # statistics and generator move on before it fails
                    raise machine.error
                machine.compiled += 1
                machine.now += machine.quick - machine.plain + (machine.compiling if first.pop() else 0.0)
                first.append(False)
                return net(x)

        class Graph(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                if machine.graph_error is not None:
                    net(x).sum().backward()
                    raise machine.graph_error
                machine.replayed += 1
                machine.now += machine.graphed - machine.plain + (machine.recording if first.pop() else 0.0)
                first.append(False)
                return net(x)

        return Graph() if mode == "reduce-overhead" else Fast()

    def drop(self) -> None:
        self.dropped += 1


class Ticking(nn.Module):
    """A network whose pass takes the machine's time."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.body, self._machine = small_net(), [machine]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._machine[0].now += self._machine[0].plain
        return self.body(x)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(torch, "compile", machine.compile)
    monkeypatch.setattr(compiling, "clock", lambda: machine.now)
    monkeypatch.setattr(compiling, "installed_runtimes", lambda: ("compiled",))
    monkeypatch.setattr(compiling, "WARM", 1)
    monkeypatch.setattr(compiling, "TIMED", 2)
    fake = SimpleNamespace(perf_counter=lambda: machine.now, monotonic=lambda: 0.0)
    monkeypatch.setattr(loop, "time", fake)
    return machine


Run = Callable[..., tuple[TrainRun, list[float]]]


@pytest.fixture
def run(machine: Machine) -> Run:
    def run(**options: Any) -> tuple[TrainRun, list[float]]:
        losses: list[float] = []
        output = options.pop("output", None)
        recipe = QUICK.override({"epochs": 4, "ema_decay": 0, **options})
        told = lambda event: losses.append(event["loss"]) if event["kind"] == "step" else None  # noqa: E731
        return train(Ticking(machine), halves_data(), recipe=recipe, progress=told, output=output), losses

    return run


def same(left: TrainRun, right: TrainRun) -> bool:
    pairs = zip(left.net.state_dict().values(), right.net.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_what_pays_is_kept_and_recorded(machine: Machine, run: Run, tmp_path: Path) -> None:
    """24 steps: one begins the counting, three are timed, one gives the trial its images; 19 are left."""
    plain, losses = run()
    assert plain.cost.compile is None
    tried, other = run(compile="auto", output=tmp_path / "run")
    assert machine.compiled == 3 + 19
    why = "kept: forward and backward 1e+05 ms, compiled 5e+04 ms, 19 times to go; compiling took 70.0 s"
    found = {"kept": True, "why": why, "gain": 0.5, "compile_seconds": 70.0, "mode": "default"}
    assert tried.cost.compile == found
    assert read_train_run(tmp_path / "run").compile == found
    assert f"compile=auto, {why}" in tried.notes
    assert f"compile=auto, {why}" in tried.describe().splitlines()
    assert (other, same(plain, tried)) == (losses, True)  # the stand-in computes the same
    assert set(tried.net.state_dict()) == set(plain.net.state_dict())
    trial = 3 * 100 + 70 + 3 * 50
    assert tried.cost.training_s == 5 * 100 + trial + 19 * 50


@pytest.mark.parametrize("quick", [50.0, 120.0])
def test_a_run_that_goes_on_keeps_to_what_it_came_to(machine: Machine, tmp_path: Path, quick: float) -> None:
    """24 steps of 6 an epoch, left in the third: nothing is tried again, and what was kept is compiled at once."""
    machine.quick = quick
    recipe = QUICK.override({"epochs": 4, "ema_decay": 0, "compile": "auto"})

    def told(event: Any) -> None:
        if event["kind"] == "step" and event["epoch"] == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(Ticking(machine), halves_data(), recipe=recipe, progress=told, output=tmp_path / "run")
    found, machine.compiled = read_train_run(tmp_path / "run").compile, 0
    assert found is not None
    assert found["kept"] is (quick == 50.0)
    again = train(Ticking(machine), halves_data(), recipe=recipe, output=tmp_path / "run", resume=True)
    assert again.cost.compile == found
    assert machine.compiled == (12 if quick == 50.0 else 0)  # no trial's three among them


@pytest.mark.parametrize(
    ("quick", "compile_s", "frozen", "said"),
    [
        (99.0, 70.0, 0, "not kept: forward and backward 1e+05 ms, compiled 9.9e+04 ms"),
        (120.0, 70.0, 0, "not kept: forward and backward 1e+05 ms, compiled 1.2e+05 ms"),
        (97.0, 70.0, 3, "compiling took 70.0 s, 1 more to come"),  # 57 s saved
    ],
)
def test_what_does_not_pay_leaves_no_trace(
    machine: Machine, run: Run, quick: float, compile_s: float, frozen: int, said: str
) -> None:
    machine.quick, machine.compiling = quick, compile_s
    tried, losses = run(compile="auto", freeze_epochs=frozen)
    assert tried.cost.compile is not None
    assert tried.cost.compile["kept"] is False
    assert said in str(tried.cost.compile["why"])
    assert machine.compiled == 3
    plain, right = run(freeze_epochs=frozen)
    assert (losses, same(plain, tried)) == (right, True)


def test_what_can_not_be_compiled_is_said_and_leaves_no_trace(machine: Machine, run: Run) -> None:
    machine.error = RuntimeError("no C++ compiler\nand more")
    tried, losses = run(compile="auto")
    why = "not kept: the trial failed (no C++ compiler)"
    nothing = {"gain": None, "compile_seconds": None, "mode": "default"}
    assert tried.cost.compile == {"kept": False, "why": why, **nothing}
    plain, right = run()
    assert (losses, same(plain, tried)) == (right, True)


def test_where_the_time_left_can_not_pay_nothing_is_tried(machine: Machine, run: Run) -> None:
    machine.plain = 1.0
    tried, _ = run(compile="auto")
    assert tried.cost.compile is not None
    assert tried.cost.compile["why"] == "not tried: 10% of 20 steps of 1 s would not pay for 60 s of compiling"
    assert machine.compiled == 0


@pytest.fixture
def card(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The machine, with CUDA graphs."""
    monkeypatch.setattr(compiling, "has_graphs", lambda _: True)
    monkeypatch.setattr(compiling, "other_graphs", lambda: False)
    monkeypatch.setattr(compiling, "drop_graphs", machine.drop)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    return machine


def test_on_a_gpu_graphs_are_tried_too_and_what_is_fastest_is_kept(card: Machine, run: Run, tmp_path: Path) -> None:
    plain, losses = run()
    tried, other = run(compile="auto", output=tmp_path / "run")
    assert (card.compiled, card.replayed, card.dropped) == (3, 3 + 19, 0)
    why = "kept as CUDA graphs: forward and backward 1e+05 ms, compiled 5e+04 ms, as CUDA graphs 3e+04 ms, 19 times "
    why += "to go; compiling took 70.0 s and 80.0 s"
    found = {"kept": True, "why": why, "gain": 0.7, "compile_seconds": 80.0, "mode": "graphs"}
    assert tried.cost.compile == found
    assert read_train_run(tmp_path / "run").compile == found
    assert (other, same(plain, tried)) == (losses, True)
    assert tried.cost.training_s == 5 * 100 + (3 * 100 + 70 + 3 * 50 + 80 + 3 * 30) + 19 * 30


@pytest.mark.parametrize(("quick", "kept"), [(50.0, True), (99.0, False)])
def test_graphs_that_are_not_kept_give_their_memory_back(card: Machine, run: Run, quick: float, kept: bool) -> None:
    card.quick, card.graphed = quick, quick + 0.5
    tried, losses = run(compile="auto")
    assert tried.cost.compile is not None
    assert (tried.cost.compile["kept"], tried.cost.compile["mode"]) == (kept, "default")
    assert (card.compiled, card.replayed, card.dropped) == (3 + 19 * kept, 3, 1)
    plain, right = run()
    assert (losses, same(plain, tried)) == (right, True)


def test_graphs_that_can_not_be_recorded_leave_what_was_compiled_plainly(
    card: Machine, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    card.graph_error = RuntimeError("operation not permitted when stream is capturing\nand more")
    monkeypatch.setattr(compiling, "other_graphs", lambda: True)  # a teacher's: they must stay
    tried, losses = run(compile="auto")
    assert tried.cost.compile is not None
    said = "compiling took 70.0 s; CUDA graphs failed (operation not permitted when stream is capturing)"
    assert str(tried.cost.compile["why"]).startswith("kept: forward and backward 1e+05 ms, compiled 5e+04 ms, 19 times")
    assert str(tried.cost.compile["why"]).endswith(said)
    assert (card.compiled, card.replayed, card.dropped) == (3 + 19, 0, 0)
    plain, right = run()
    assert (losses, same(plain, tried)) == (right, True)


def test_where_the_time_left_pays_for_one_trial_graphs_are_not_tried(card: Machine, run: Run) -> None:
    card.plain, card.quick, card.graphed = 60.0, 30.0, 10.0  # 10 % of 20 steps of 60 s: 120 s, of which two take 120
    tried, _ = run(compile="auto")
    assert tried.cost.compile is not None
    assert (tried.cost.compile["kept"], tried.cost.compile["mode"]) == (True, "default")
    assert (card.compiled, card.replayed, card.dropped) == (3 + 19, 0, 0)


def test_a_run_goes_on_as_graphs_where_there_are_any(
    card: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = QUICK.override({"epochs": 4, "ema_decay": 0, "compile": "auto"})

    def told(event: Any) -> None:
        if event["kind"] == "step" and event["epoch"] == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(Ticking(card), halves_data(), recipe=recipe, progress=told, output=tmp_path / "run")
    card.compiled = card.replayed = 0
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    again = train(Ticking(card), halves_data(), recipe=recipe, output=tmp_path / "run", resume=True)
    assert again.cost.compile is not None
    assert (again.cost.compile["mode"], card.compiled, card.replayed) == ("graphs", 0, 12)
    monkeypatch.setattr(compiling, "has_graphs", lambda _: False)
    card.replayed = 0
    there = train(Ticking(card), halves_data(), recipe=recipe, output=tmp_path / "other", resume=True)
    assert there.cost.compile is not None
    assert (there.cost.compile["mode"], card.replayed) == ("default", 0)
    assert card.compiled > 0  # tried anew


def test_what_an_older_run_came_to_has_no_mode() -> None:
    older = {"kept": True, "why": "kept", "gain": 0.5, "compile_seconds": 70.0}
    assert Compiled(**older).mode == "default"
    with pytest.raises(ValueError, match=r"compile\.mode is 'fast'; it must be default or graphs"):
        Compiled(**older, mode="fast")


def _trainer(**more: Any) -> Any:
    told: list[str] = []
    recipe = Recipe(name="r", epochs=10, accumulate=2)
    job = SimpleNamespace(
        recipe=recipe,
        loader=SimpleNamespace(image_size=32),
        processes=Processes(),
        max_seconds=None,
        progress=lambda event: told.append(event["text"]),
    )
    values = {"job": job, "epoch": 0, "step": 0, "elapsed": 0.0, "steps_per_epoch": 1000, "steady": True, "told": told}
    return SimpleNamespace(**{**values, "forward": nn.Identity(), "graph": (32, False), **more})


def _asked(trainer: Any, seconds: float, waited: float) -> str:
    found = Compiling("auto", trainer.forward, nullcontext)
    for _ in range(1 + compiling.WARM + compiling.TIMED):
        assert found.after(cast(Any, trainer), seconds, waited) == 0
    return found.found.why if found.found else ""


def test_what_waits_for_images_or_changes_is_not_tried() -> None:
    assert _asked(_trainer(), 2.0, 0.9) == ""  # 10,000 x (2 - 0.9) / 2 x 10 % is worth 60 s
    assert _asked(_trainer(), 2.0, 1.1) == "not tried: 55% of a step is waiting for images"
    assert "changes from step to step" in _asked(_trainer(steady=False), 2.0, 0.0)


def test_counting_begins_anew_where_layers_join_or_images_grow_within_an_epoch() -> None:
    """As they do where time ends a run."""
    trainer = _trainer(graph=(32, True))
    found, enough = Compiling("auto", trainer.forward, nullcontext), compiling.WARM + compiling.TIMED
    for graph in ((32, True), (32, False), (64, False)):
        trainer.graph = graph
        for _ in range(enough):  # the first begins the counting
            found.after(trainer, 2.0, 1.1)
        assert found.found is None
    found.after(trainer, 2.0, 1.1)
    assert found.found is not None


@pytest.mark.parametrize(("graph", "left", "more"), [((32, True), 9, 1), ((32, True), 2, 1), ((32, False), 2, 0)])
def test_what_is_compiled_again_is_what_is_not_used_yet(graph: tuple[int, bool], left: int, more: int) -> None:
    """Of ten epochs the first eight train the head alone; time has brought the run to one that is ``left``."""
    trainer = _trainer(graph=graph, elapsed=100.0 - 10 * left)
    trainer.job.max_seconds = 100.0
    trainer.job.recipe = trainer.job.recipe.override({"freeze_epochs": 8})
    assert compiling._graphs_to_come(trainer) == more


def test_a_run_that_ends_by_its_time_has_fewer_steps_left() -> None:
    trainer = _trainer(elapsed=500.0)
    trainer.job.max_seconds = 1000.0
    assert _asked(trainer, 4.0, 0.0) == "not tried: 10% of 250 steps of 2 s would not pay for 60 s of compiling"


def test_several_processes_try_nothing_and_take_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one process kept before, too, is not what they go on with."""
    monkeypatch.setattr(compiling, "installed_runtimes", lambda: ("compiled",))
    trainer = _trainer()
    found = Compiling("auto", trainer.forward, nullcontext, world=2)
    kept = {"kept": True, "why": "kept", "gain": 0.5, "compile_seconds": 70.0, "mode": "default"}
    assert found.go_on(kept) is trainer.forward
    assert found.found is None
    for _ in range(2 + compiling.WARM + compiling.TIMED):
        assert found.after(trainer, 100.0, 0.0) == 0
    assert trainer.told == [f"compile=auto, not tried: {compiling.SEVERAL}"]
    assert found.found == Compiled(kept=False, why=f"not tried: {compiling.SEVERAL}")


def test_a_trial_puts_back_statistics_generator_and_gradients() -> None:
    net = small_net()
    trainer: Any = SimpleNamespace(net=net, job=SimpleNamespace(device=torch.device("cpu")))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    drawn = torch.get_rng_state()
    with compiling._traceless(trainer):
        net(torch.randn(4, 1, 12, 12)).sum().backward()
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize(
    ("given", "value"),
    [("auto", "auto"), ("AUTO", "auto"), ("true", True), ("off", False), (True, True), ("graphs", "graphs")],
)
def test_the_recipes_key(given: object, value: object) -> None:
    recipe = QUICK.override({"compile": given})
    assert recipe.compile == value
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert QUICK.compile is False
