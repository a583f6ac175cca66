"""Searches for an edge, against brute force: every predicate that changes once, wherever the search begins."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convscale.errors import UserError
from convscale.stats import (
    average_precisions,
    chance_above,
    largest_true,
    mean_of_known,
    smallest_true,
    standard_error,
)

LOWS, SPANS, STARTS = st.integers(-50, 50), st.integers(0, 3000), st.integers(-60, 3100) | st.none()


@settings(deadline=None)
@given(low=LOWS, span=SPANS, edge=st.integers(-1, 3001), start=STARTS)
def test_the_largest_equals_brute_force_and_each_number_is_asked_once(
    low: int, span: int, edge: int, start: int | None
) -> None:
    high, last = low + span, low + min(edge, span)
    asked: list[int] = []

    def holds(number: int) -> bool:
        asked.append(number)
        assert low <= number <= high
        return number <= last

    assert largest_true(holds, low, high, start=start) == (last if edge >= 0 else None)
    assert len(asked) == len(set(asked))
    begin = low if start is None else min(max(start, low), high)
    assert len(asked) <= 2 * math.log2(abs(begin - last) + 1) + 3


@settings(deadline=None)
@given(low=LOWS, span=SPANS, edge=st.integers(0, 3001), start=STARTS)
def test_the_smallest_equals_brute_force(low: int, span: int, edge: int, start: int | None) -> None:
    first = low + edge
    expected = first if first <= low + span else None
    assert smallest_true(lambda number: number >= first, low, low + span, start=start) == expected


def test_numbers_far_beyond_the_edge_are_never_tried() -> None:
    """Those take longest to try: batches that do not fit, networks that are far too large."""
    asked: list[int] = []
    assert largest_true(lambda n: asked.append(n) or n <= 100, 0, 10**6, start=100) == 100
    assert max(asked) < 110


def test_an_empty_range_is_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="low must not be above high"):
        largest_true(lambda number: True, 1, 0)


@settings(deadline=None, max_examples=60)
@given(images=st.integers(1, 40), classes=st.integers(1, 5), levels=st.integers(1, 50), seed=st.integers(0, 2**32 - 1))
def test_average_precisions_are_those_of_torchmetrics(images: int, classes: int, levels: int, seed: int) -> None:
    """Over random scores, most of them tied where there are few levels, and classes that no image has."""
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("torchmetrics.functional.classification")
    random = np.random.default_rng(seed)
    scores = (random.integers(0, levels, (images, classes)) / levels).astype(np.float32)
    truth = (random.random((images, classes)) < random.random(classes)).astype(np.float32)
    ours = average_precisions(scores, truth)
    for column in range(classes):
        if not truth[:, column].any():
            assert math.isnan(ours[column])
            continue
        probabilities, present = torch.from_numpy(scores[:, column]), torch.from_numpy(truth[:, column]).long()
        golden = functional.binary_average_precision(probabilities, present)
        assert ours[column] == pytest.approx(float(golden), abs=1e-6)


def test_average_precisions_by_hand() -> None:
    """Right, wrong, right: (1 + 2/3) / 2; two that are tied are found together: 1/2; no image: not known."""
    logits = np.array([[3.0, 1, 0], [2, 1, 0], [1, 0, 0]])
    values = average_precisions(logits, np.array([[1.0, 0, 0], [0, 1, 0], [1, 0, 0]]))
    assert values[:2] == pytest.approx([5 / 6, 1 / 2])
    assert math.isnan(values[2])
    assert mean_of_known(values) == pytest.approx(2 / 3)
    assert math.isnan(mean_of_known(values[2:]))


@pytest.mark.parametrize(
    ("floor", "chance"),
    [(100.0, 0.5), (50.0, 0.9), (200.0, 0.1), (25.0, 0.994815), (400.0, 0.005185)],
)
def test_chances_by_hand(floor: float, chance: float) -> None:
    """An 80 % interval of 50 to 200 around 100: its ends are passed with 90 and 10 %, a quarter and four times with the
    normal distribution's 2.5632.
    """
    assert chance_above(floor, 100.0, 50.0, 200.0) == pytest.approx(chance, abs=2e-5)


def test_either_side_has_its_own_width() -> None:
    assert chance_above(50.0, 100.0, 50.0, 110.0) == pytest.approx(0.9, abs=2e-5)
    assert chance_above(110.0, 100.0, 50.0, 110.0) == pytest.approx(0.1, abs=2e-5)
    assert chance_above(100.0, 100.0, 100.0, 100.0) == 1.0
    assert chance_above(101.0, 100.0, 100.0, 100.0) == 0.0


def test_standard_error_by_hand() -> None:
    """The root of 0.8 x 0.2 / 100; all of six right counts as six of seven: the root of 6/7 x 1/7 / 6."""
    assert standard_error(0.8, 100) == pytest.approx(0.04)
    assert standard_error(1.0, 6) == pytest.approx(1 / 7)
    assert standard_error(0.0, 6) == pytest.approx(1 / 7)
    assert standard_error(0.5, 1) == pytest.approx(0.5)
    with pytest.raises(UserError, match="n >= 1"):
        standard_error(0.5, 0)
