"""The predictor's own test: what is left out must not be seen, by poisoning it and looking at what moves."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from benchmarks import predictor, predictor_public, predictor_rivals
from benchmarks.predictor import cross_validated, fit_of, half_widths, joined, sigmas_from
from benchmarks.predictor_data import Row, TableFile
from convscale.cost.kernels import Kernel
from convscale.predictor.devices import get_device
from convscale.predictor.fitted import Fitted
from convscale.predictor.interval import GROUPS, MARKS
from convscale.predictor.predict import Prediction, predict
from convscale.predictor.roofline import PRIOR, net_s, table_of

FAMILIES = tuple("abcdef")


def _table(device: str = "rtx-3090") -> TableFile:
    return TableFile(
        path=Path("benchmark-x.csv"),
        mode="infer",
        precision="amp",
        layout="nchw",
        torch="pt240",
        device=get_device(device),
        compiled=False,
    )


def _rows(table: TableFile, poison: dict[str, float] | None = None) -> list[Row]:
    """Three networks to a family, of one matrix product and one map each; times are the prior's with some noise, and
    ``poison`` on families.
    """
    random, rows, byte = np.random.default_rng(0), [], 10**8
    for family in FAMILIES:
        for number in range(3):
            width = int(random.integers(64, 512))
            shape = {"rows": 10**5, "width": width, "depth": 9 * width, "channels": width}
            product = Kernel("conv", macs=10**10 * (number + 1), in_bytes=byte, out_bytes=byte, **shape)
            kernels = [
                (product, 4),
                (Kernel("pointwise", in_bytes=int(random.integers(10**7, 10**9)), out_bytes=byte), 3),
            ]
            seconds = float(net_s(table_of([kernels]), table.device, PRIOR)[0]) * float(np.exp(random.normal(0, 0.05)))
            seconds *= (poison or {}).get(family, 1.0)
            counts = {"size": 224, "batch": 64, "params": 1, "macs": 1, "activations": 1}
            rows.append(
                Row(model=f"{family}{number}", family=family, images_per_s=64 / seconds, kernels=kernels, **counts)
            )
    return rows


@pytest.fixture(autouse=True)
def _few_coefficients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits of the coefficients that these kernels use are a matter of milliseconds."""
    fit = predictor.fit
    free = ["peak", "bandwidth", "compute.conv", "memory.pointwise"]  # no card's own reach: its sheet stands for it
    monkeypatch.setattr(predictor, "fit", lambda parts, ridge, near: fit(parts, ridge=ridge, near=near, free=free))


def _predicted(poison: dict[str, float]) -> dict[str, float]:
    """Predicted seconds of every network by coefficients that have not seen its family."""
    table = _table()
    rows = _rows(table, poison)
    (part,) = cross_validated([(table, rows)])
    return {
        row.model: float(np.exp(error)) * row.batch / row.images_per_s
        for row, error in zip(part.rows, part.errors, strict=True)
    }


def test_a_family_is_predicted_without_its_own_times() -> None:
    plain, poisoned = _predicted({}), _predicted({"a": 3.0})
    for number in range(3):
        assert poisoned[f"a{number}"] == pytest.approx(plain[f"a{number}"], rel=1e-6)
    assert any(
        abs(poisoned[f"b{number}"] / plain[f"b{number}"] - 1) > 0.02 for number in range(3)
    )  # others have seen them


def test_an_interval_is_made_without_its_familys_own_errors() -> None:
    table = _table()
    (part,) = cross_validated([(table, _rows(table))])
    mine = np.array([row.family == "a" for row in part.rows])
    off = dataclasses.replace(part, errors=np.where(mine, part.errors + 0.4, part.errors))
    (plain,), (poisoned,) = half_widths(joined([part]), [part]), half_widths(joined([off]), [off])
    np.testing.assert_allclose(poisoned[mine], plain[mine])
    assert (poisoned[~mine] > 1.02 * plain[~mine]).any()


def test_a_card_left_out_is_left_out_of_the_widths_too() -> None:
    def records(poison: dict[str, float], card: str) -> dict[str, dict]:
        here, there = _table("rtx-3090"), dataclasses.replace(_table("rtx-4090"), path=Path("benchmark-y.csv"))
        mine = [(here, _rows(here, poison)), (there, _rows(there))]
        found = predictor._card_left_out(card, mine, fit_of(mine), "eager-nchw")
        return {record["method"]: record for record in found}

    label, poison = "card left out, data sheet", dict.fromkeys(FAMILIES[:4], 1.5) | {"a": 3.0}
    plain, poisoned = records({}, "rtx-3090")[label], records(poison, "rtx-3090")[label]
    assert poisoned["interval_pct"] == plain["interval_pct"]  # the card's own times were poisoned
    assert poisoned["median_pct"] != plain["median_pct"]
    assert records(poison, "rtx-4090")[label]["interval_pct"] != records({}, "rtx-4090")[label]["interval_pct"]


def test_what_a_card_reaches_is_found_and_handed_on() -> None:
    """Cards by hand: one reaches 0.8 of another's share of its bandwidth; an unknown one is taken for their mean."""
    known = Fitted(
        coefficients=PRIOR,
        sigmas={},
        devices=("rtx-3090", "rtx-4090"),
        cards={"rtx-3090": {"bandwidth": 0.8}, "rtx-4090": {"bandwidth": 1.25}},
    )
    assert known.reach(get_device("rtx-3090")) == {"bandwidth": 0.8}
    assert known.reach(get_device("h100-sxm"))["bandwidth"] == pytest.approx(1.0)
    assert known.reach(get_device("a10"))["bandwidth"] == pytest.approx(0.8**0.75)  # an Ampere as the RTX 3090
    assert known.reach(get_device("l4"))["bandwidth"] == pytest.approx(1.0)  # an Ada, but no better than the mean


def test_widths_hold_what_they_were_fitted_on() -> None:
    table = _table()
    (part,) = cross_validated([(table, _rows(table))])
    held = predictor.inside(part, predictor.half_width(part, sigmas_from(part)))
    assert 60 <= held["inside_80_pct"] <= 100


def test_published_figures_are_predicted_for_their_own_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An A100 of 80 GB has 2,039 GB/s, one of 40 GB 1,555."""
    columns = "model,gpu,mode,precision,batch,image_px,images_per_s,framework,layout"
    row = "resnet50 (v1.5),A100-SXM4-{}GB,infer,amp-fp16,256,224,2000,PyTorch,nhwc"
    (tmp_path / "public-gpu-figures.csv").write_text("\n".join([columns, row.format(40), row.format(80)]))
    asked: list[str] = []

    def predicted(name: str, device: str, **options: object) -> Prediction:
        asked.append(device)
        return predict(name, device=device, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(predictor_public, "predict", predicted)
    small, large = predictor_public.records(tmp_path)
    assert asked == ["a100-40gb", "a100-80gb"]
    assert large["predicted"] > 1.05 * small["predicted"]


def test_lone_convolutions_ran_without_tf32() -> None:
    """So no change of layout around them, and no power limit of the matrix units."""
    assert {card.has_tf32 for card in predictor_rivals.CARDS.values()} == {False}


def test_a_network_measured_as_predicted_leaves_a_cards_others_as_they_were() -> None:
    """By the calibration that ships: where the sheet's floor binds, too."""
    table = _table()
    rows = _rows(table)
    high = {**PRIOR, "bandwidth": 1.0, "memory.pointwise": 1.8, "memory.conv": 1.8}  # the floor binds
    at_floor = [
        dataclasses.replace(row, images_per_s=row.batch / float(net_s(table_of([row.kernels]), table.device, high)[0]))
        for row in rows
    ]
    known = Fitted(coefficients=high, sigmas={}, devices=())
    sigmas = dict.fromkeys(("base", *GROUPS, *MARKS), 0.05)
    _, errors = predictor._calibrated(at_floor[:1], table, at_floor, ([set(FAMILIES)], [known], sigmas))
    np.testing.assert_allclose(errors, 0, atol=1e-3)
