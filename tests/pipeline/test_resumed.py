"""What a resumed run of ``fit`` may not change under itself."""

from __future__ import annotations

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import convscale as cs
from convscale.errors import Stopped, UserError
from convscale.pipeline.record import RunRecord, describe
from convscale.pipeline.steps import Fit
from tests.learn.nets import halves_data


def test_a_run_does_not_go_on_with_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []

    def check(self: Fit) -> None:
        looked.append(len(self.splits.train))
        raise Stopped("here")

    monkeypatch.setattr(Fit, "check", check)
    data, folder = halves_data(), tmp_path / "run"
    ask: dict[str, Any] = {"output": folder, "min_throughput": 1.0, "candidates": ["mobilenetv2_050"], "scratch": True}
    with pytest.raises(Stopped):
        cs.fit(data, **ask)
    written = (folder / "fit.json").read_bytes()
    for name in ("train", "validation", "test"):
        split = getattr(data, name)
        other = dataclasses.replace(data, **{name: split.subset([*range(1, len(split)), 0])})
        with pytest.raises(UserError, match=r"run was begun on other data: .*, or begin another run$"):
            cs.fit(other, resume=True, **ask)
    assert (folder / "fit.json").read_bytes() == written
    with pytest.raises(Stopped):
        cs.fit(data, resume=True, **ask)
    assert looked == [96, 96]


def test_a_record_without_a_digest_goes_on(tmp_path: Path) -> None:
    """As the first versions wrote them."""
    data = halves_data()
    record = RunRecord(tmp_path, {}, resume=False)
    record.put(data=describe(data, "given splits", 224))
    kept = json.loads((tmp_path / "fit.json").read_text())
    assert kept["data"].pop("digest")
    (tmp_path / "fit.json").write_text(json.dumps(kept))
    again = RunRecord(tmp_path, {}, resume=True)
    assert again.now.data.digest is None
    again.check_data(dataclasses.replace(data, test=data.train))


def test_a_stop_before_training_says_how_the_fit_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_given: Any, **_more: Any) -> Any:
        raise Stopped("told to stop before training began; the output folder is as it was")

    monkeypatch.setattr("convscale.pipeline.steps.train", stopped)
    training = SimpleNamespace(max_minutes=None, checked_epochs=lambda _recipe: 1)
    here: Any = SimpleNamespace(
        folder=tmp_path,
        splits=halves_data(),
        asked=SimpleNamespace(resume=False, training=training),
        record=SimpleNamespace(now=SimpleNamespace(history=()), clocked=lambda _name: nullcontext()),
        recipe=lambda _contender: None,
        training=lambda _contender: {},
        _winner=lambda: SimpleNamespace(network="small"),
    )
    with pytest.raises(Stopped) as told:
        Fit.train_winner(here, print)
    assert str(told.value) == f"told to stop before training began; go on with --resume in {tmp_path}"
