"""``fit`` with a search in front."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import convscale as cs
from convscale.errors import UserError
from convscale.nas.space import SearchSpace
from convscale.pipeline import run as run_module
from convscale.pipeline import searched
from convscale.pipeline.request import FitRequest


class _Found:
    """A study whose best network is known."""

    def __init__(self, spec: cs.NetSpec, output: Path) -> None:
        self.output, self.best, self.spec = output, self, spec


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tiny: SearchSpace) -> dict[str, Any]:
    """What the search and the fit behind it were asked; neither runs."""
    seen: dict[str, Any] = {}

    def search(data: object, **given: Any) -> _Found:
        seen["search"] = given
        return _Found(tiny.sample(3), given["output"])

    monkeypatch.setattr(searched, "search", search)
    monkeypatch.setattr(searched, "write_search_report", lambda folder: None)
    monkeypatch.setattr(run_module, "fit_request", lambda request: seen.__setitem__("fit", request))
    return seen


def test_what_is_searched_for_is_fitted(
    asked: dict[str, Any], colour_folder: Path, tmp_path: Path, tiny: SearchSpace
) -> None:
    cs.fit(colour_folder, output=tmp_path / "a", device="l4", min_throughput=2000, search=5, space="small", seed=4)
    given, request = asked["search"], asked["fit"]
    assert isinstance(request, FitRequest)
    assert request.candidates == [tiny.sample(3)]
    kept = {key: given[key] for key in ("device", "min_throughput", "minutes", "space", "seed", "runtime", "precision")}
    assert kept == {
        "device": "l4",
        "min_throughput": 2000,
        "minutes": 5,
        "space": "small",
        "seed": 4,
        "runtime": "compiled",  # as fit predicts for a named GPU
        "precision": "amp",
    }
    assert given["output"] == tmp_path / "a-search"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"candidates": "resnet18"}, "leave out candidates, weights and init"),
        ({"min_throughput": None}, "search needs a limit on speed"),
        ({"search": 0.0}, "search is 0.0; it must be a number of minutes above 0"),
    ],
)
def test_bad_input_is_one_line(
    given: dict[str, Any], message: str, asked: dict[str, Any], colour_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        cs.fit(colour_folder, output=tmp_path / "a", **{"search": 5.0, "min_throughput": 100.0, **given})
    assert "search" not in asked
