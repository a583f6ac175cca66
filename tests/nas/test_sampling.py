"""Proposals: new ones, the same for the same history, and better than chance."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import nas_tables
from convscale.errors import UserError
from convscale.nas.sampling import STARTUP, Linear, Tried, features, propose


class Grid:
    """Genes without structure."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes

    def draw(self, rng: np.random.Generator) -> tuple[int, ...]:
        return tuple(int(rng.integers(size)) for size in self.sizes)

    def changed(self, genes: tuple[int, ...], rng: np.random.Generator) -> tuple[int, ...]:
        at = int(rng.integers(len(genes)))
        return (*genes[:at], int(rng.integers(self.sizes[at])), *genes[at + 1 :])


def best_after(sampler: str, trials: int, seed: int) -> float:
    """Of a sum over ten genes of three options, highest at 20, with noise."""
    walk, rng, tried = Grid(*[3] * 10), np.random.default_rng(seed), list[Tried]()
    for number in range(trials):
        genes = propose(walk, tried, sampler=sampler, seed=seed, number=number)
        tried.append(Tried(genes=genes, value=sum(genes) + rng.normal(0, 0.5)))
    return max(sum(one.genes) for one in tried)


def test_guided_finds_a_sum() -> None:
    guided = np.mean([best_after("guided", 40, seed) for seed in range(4)])
    random = np.mean([best_after("random", 40, seed) for seed in range(4)])
    evolution = np.mean([best_after("evolution", 40, seed) for seed in range(4)])
    assert guided >= 19.5  # of 20
    assert guided > evolution > random


@pytest.mark.parametrize("sampler", ["guided", "evolution", "random"])
def test_proposals_are_new_and_repeatable(sampler: str) -> None:
    walk, tried = Grid(3, 3, 3), list[Tried]()
    for number in range(27):
        genes = propose(walk, tried, sampler=sampler, seed=3, number=number)
        assert genes == propose(walk, tried, sampler=sampler, seed=3, number=number)
        assert genes not in {one.genes for one in tried}
        tried.append(Tried(genes=genes, value=float(sum(genes))))
    with pytest.raises(UserError, match="27 networks; a larger space would be right"):
        propose(walk, tried, sampler=sampler, seed=3, number=27)


def test_too_slow_ones_are_kept_out() -> None:
    """Accuracy rises with every gene and speed falls: only sums up to 6 are fast enough."""
    walk, rng = Grid(*[3] * 8), np.random.default_rng(0)
    tried = []
    for _ in range(3 * STARTUP):
        genes = walk.draw(rng)
        tried.append(Tried(genes=genes, value=float(sum(genes)), speed=float(np.exp(-sum(genes)))))
    sums = [
        sum(propose(walk, tried, sampler="guided", seed=1, number=100 + at, floor=float(np.exp(-6.5))))
        for at in range(10)
    ]
    assert 4 <= np.mean(sums) <= 7
    free = [sum(propose(walk, tried, sampler="guided", seed=1, number=200 + at)) for at in range(10)]
    assert np.mean(free) > 12


def test_the_linear_model_by_ridge_regression() -> None:
    """The posterior mean is ridge regression's with penalty prior x noise, as numpy's least squares gives it."""
    rng = np.random.default_rng(0)
    inputs, values = rng.normal(size=(20, 4)), rng.normal(size=20)
    model = Linear.fitted(inputs, values)
    aims = (values - values.mean()) / values.std()
    stacked = np.concatenate([inputs, np.sqrt(3.0 * 0.3) * np.eye(4)])
    expected = np.linalg.lstsq(stacked, np.concatenate([aims, np.zeros(4)]), rcond=None)[0]
    np.testing.assert_allclose(model.mean, expected, rtol=1e-9)


def test_features_by_hand() -> None:
    found = features(np.array([[0, 1], [2, 0]]), (3, 2))
    assert found.tolist() == [[1, 0, 0, 0, 1, 1], [0, 0, 1, 1, 0, 1]]


def test_rows_of_the_tables_are_chosen_and_networks_without_a_speed_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    head = "expansion,kernel,layers,se,top1,params_m,macs_m,a100_images_per_s,rtx3090_images_per_s"
    shape = "6611141,5555353,1132111,0000000"
    rows = [f"{shape},{50 + at},2,{300 + at},{1000 * (at + 1)},{'' if at == 1 else 500 * (at + 1)}" for at in range(3)]
    (tmp_path / "nas-mnasnet-imagenet.csv").write_text("\n".join([head, *rows]) + "\n")
    whole, both = nas_tables._table(tmp_path, "mnasnet"), nas_tables._table(tmp_path, "rtx3090")
    assert whole.accuracy.tolist() == [50.0, 51.0, 52.0]
    assert sorted(whole.costs) == ["a100", "macs"]
    assert both.accuracy.tolist() == [50.0, 52.0]
    assert (1 / both.costs["rtx3090"]).tolist() == pytest.approx([500.0, 1500.0])
    cost = nas_tables.flops_cost(both, "rtx3090")
    assert (cost["method"], cost["rtx3090"]["rtx3090_images_per_s"]) == ("whole table on rtx3090", pytest.approx(1500))
    ask = ["nas_tables", "--records", str(tmp_path / "none.jsonl"), "--list", "--table", "mnasnet"]
    for more, said in (
        (["--reward", "accuracy", "--only", "zero-cost zen"], ["mnasnet, accuracy, zero-cost zen, is missing"]),
        (["--reward", "predicted", "--only", "tpe"], ["mnasnet, predicted, tpe, is missing"]),
        (["--only", "prediction"], [f"mnasnet, none, prediction{on}, is missing" for on in ("", " on rtx3090")]),
    ):
        monkeypatch.setattr(sys, "argv", [*ask, *more])
        nas_tables.main()
        assert capsys.readouterr().out.splitlines() == said
