"""Schedule-free AdamW: the library's own loop gives the weights that are watched; a resumed run goes on exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from convscale.errors import MissingExtra, UserError
from convscale.learn.ema import build_ema
from convscale.learn.optim import build_optimizer
from convscale.learn.recipe import Recipe
from convscale.learn.train import train
from tests.learn.nets import halves_data, small_net

FREE = Recipe(
    name="x",
    epochs=2,
    batch_size=32,
    optimizer="schedule-free",
    lr=0.02,
    weight_decay=0.1,
    schedule="constant",
    augment="none",
    precision="fp32",
    layout="nchw",
)


def test_what_is_watched_is_what_the_library_evaluates() -> None:
    library = pytest.importorskip("schedulefree")
    torch.manual_seed(0)
    ours, theirs = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
    theirs.load_state_dict(ours.state_dict())
    mine = build_optimizer(ours, FREE)
    average = build_ema(ours, FREE, mine)
    assert average is not None
    peer = library.AdamWScheduleFree(theirs.parameters(), lr=0.02, weight_decay=0.1)
    peer.train()
    for step in range(5):
        for net, optimizer in ((ours, mine), (theirs, peer)):
            optimizer.zero_grad()
            net(torch.full((1, 3), float(step - 2))).square().sum().backward()
            optimizer.step()
        average.update(ours)
    torch.testing.assert_close(ours.weight, theirs.weight)
    assert not torch.allclose(average.net.weight, ours.weight)  # pyright: ignore
    peer.eval()
    torch.testing.assert_close(average.net.weight, theirs.weight)


def test_a_run_learns_and_resumes_exactly(tmp_path: Path) -> None:
    pytest.importorskip("schedulefree")

    def run(**options: Any) -> Any:
        torch.manual_seed(5)
        return train(small_net(), halves_data(), recipe=FREE, seed=3, **options)

    whole = run()
    assert whole.best_metric > 0.5
    run(output=tmp_path / "run", epochs=1)
    again = run(output=tmp_path / "run", resume=True)
    states = whole.net.state_dict(), again.net.state_dict()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schedule": "cosine"}, "schedule is cosine; optimizer schedule-free averages .* it must be constant"),
        ({"ema_decay": 0.9}, r"ema_decay is 0\.9; .* it must be 0"),
        ({"ema_width": 0.1}, r"ema_width is 0\.1; .* it must be 0"),
        ({"momentum": 0}, "momentum is 0; optimizer schedule-free needs one above 0"),
    ],
)
def test_what_does_not_go_with_it_is_told(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        FREE.override(change)


def test_a_missing_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(MissingExtra, match=r"optimizer schedule-free needs schedulefree.*convscale\[schedule-free\]"):
        build_optimizer(nn.Linear(1, 1), FREE)
