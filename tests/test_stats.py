"""Searches for an edge, against brute force: every predicate that changes once, wherever the search begins."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convscale.stats import largest_true, smallest_true

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
