"""Numbers in records: finite, whole where they must be, and no truth values."""

from __future__ import annotations

import pytest

from convscale.errors import UserError
from convscale.show.fit_parts import Brief
from convscale.show.json_values import from_json


def test_whole_numbers_may_be_written_with_a_point() -> None:
    assert from_json(Brief, {"epochs": 2.0, "top1": 1}, "brief") == Brief(epochs=2, top1=1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "0.5", [0.5]])
def test_what_is_no_finite_number_is_named(value: object) -> None:
    with pytest.raises(UserError, match=r"brief\.top1 is .*; it must be a finite number"):
        from_json(Brief, {"top1": value}, "brief")


@pytest.mark.parametrize("value", [1.5, False, "2", float("inf")])
def test_what_is_no_whole_number_is_named(value: object) -> None:
    with pytest.raises(UserError, match=r"brief\.epochs is .*; it must be a whole number"):
        from_json(Brief, {"epochs": value}, "brief")
