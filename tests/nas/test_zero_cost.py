"""Zero-cost scores by hand, on networks small enough for it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import convscale as cs
from convscale.errors import UserError
from convscale.images.splits import DataSplits
from convscale.nas import walk
from convscale.nas.sampling import propose
from convscale.nas.space import SearchSpace
from convscale.nas.zero_cost import SCORES, naswot, zen, zero_cost, zico
from tests.nas.test_study import QUICK, simple, untrained

__all__ = ["simple", "untrained"]


def test_naswot_counts_what_switches_alike() -> None:
    """Four ReLUs; the images switch (1, 1, 0, 0) and (1, 0, 0, 1): two alike of four. K = [[4, 2], [2, 4]]."""
    net = nn.Sequential(nn.Flatten(), nn.ReLU())
    images = torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, -1.0, -1.0, 1.0]]).view(2, 1, 2, 2)
    assert naswot(net, images) == pytest.approx(math.log(4 * 4 - 2 * 2))


def test_naswot_of_images_that_switch_alike_is_the_least() -> None:
    net = nn.Sequential(nn.Flatten(), nn.SiLU())
    assert naswot(net, torch.ones(2, 1, 2, 2)) == -math.inf


def test_zico_by_hand() -> None:
    """One layer, two batches of one image: the gradients of a softmax of zeros are (p - y) x."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    nn.init.zeros_(net[1].weight)  # pyright: ignore[reportArgumentType]
    batches = [
        (torch.tensor([[1.0, 2.0]]).view(1, 1, 1, 2), torch.tensor([0])),
        (torch.tensor([[3.0, 4.0]]).view(1, 1, 1, 2), torch.tensor([1])),
    ]
    # |g| is x / 2 for both classes: 0.5 and 1.5 (mean 1, deviation 0.5), 1 and 2 (mean 1.5, deviation 0.5).
    assert zico(net, batches) == pytest.approx(math.log(2 * (1 / 0.5) + 2 * (1.5 / 0.5)))
    with pytest.raises(UserError, match="zico has 1 batches"):
        zico(net, batches[:1])


def test_zen_is_the_answer_without_norms() -> None:
    """The norms' terms give back what the norms took: with one channel a chain scores as the same chain without them
    (Zen-NAS, theorem 1).
    """

    def chain(norm: bool) -> nn.Sequential:
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Conv2d(1, 1, 3, padding=1, bias=False), *([nn.BatchNorm2d(1)] if norm else [])]
        return nn.Sequential(*layers)

    noise = torch.randn(64, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    scores = []
    for norm in (True, False):
        torch.manual_seed(0)
        scores.append(zen(chain(norm), noise))
    assert scores[0] == pytest.approx(scores[1], abs=0.02)


def test_scores_of_a_spec(tiny: SearchSpace) -> None:
    spec = tiny.sample(0)
    found = {name: zero_cost(name, spec, num_classes=3) for name in SCORES}
    assert found["size"] == pytest.approx(math.log(cs.count(cs.create_model(spec, num_classes=3), 12).params))
    assert all(math.isfinite(value) for value in found.values())
    assert zero_cost("naswot", spec, num_classes=3) == found["naswot"]
    with pytest.raises(UserError, match=r"zero-cost score 'nasswot' is unknown"):
        zero_cost("nasswot", spec)


def test_of_later_proposals_the_worst_by_the_score_is_left_out(
    colours: DataSplits, tiny: SearchSpace, tmp_path: Path, untrained: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three; the sampler's own first one otherwise. A search that is cut asks for the same ones."""
    seen: dict[int, list[tuple[int, ...]]] = {}

    def spied(*given: Any, number: int, **more: Any) -> tuple[int, ...]:
        genes = propose(*given, number=number, **more)
        assert number % 4 == number % walk._APART % 4  # turns of a sampler go by fours
        seen.setdefault(number % walk._APART, []).append(genes)
        return genes

    ask = {**QUICK, "zero_cost": "size", "space": tiny, "trials": 18}
    monkeypatch.setattr(walk, "propose", spied)
    whole = cs.search(colours, output=tmp_path / "whole", **ask)
    assert min(seen) == 4  # the first round's are the best of six by the score
    kept = 0
    for trial in whole.trials[4:]:
        drawn = seen[trial.number]
        sizes = [zero_cost("size", tiny.spec_of(genes), num_classes=3) for genes in drawn]
        assert len(set(drawn)) == 3
        first = 1 if sizes[0] == min(sizes) else 0
        assert trial.genes == tiny.canonical(drawn[first])
        kept += first == 0
    assert 4 < kept < 14
    told, calls = walk.Store.tell, 0

    def tell(self: walk.Store, *given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 10:
            raise KeyboardInterrupt
        told(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(walk.Store, "tell", tell)
        with pytest.raises(KeyboardInterrupt):
            cs.search(colours, output=tmp_path / "cut", **ask)
    assert cs.search(colours, output=tmp_path / "cut", resume=True, **ask).trials == whole.trials
