"""Bounds of what a speed depends on, and of what an image's size may be."""

from __future__ import annotations

from typing import Any

import pytest

import convscale as cs
from convscale.conditions import sides
from convscale.errors import UserError


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"batch_size": 2**31},
            "batch_size must be a whole number of at least 1 and at most 2147483647, got 2147483648",
        ),
        ({"threads": 1025}, "threads must be a whole number of at least 1 and at most 1024, got 1025"),
        ({"threads": 0}, "threads must be a whole number of at least 1, got 0"),
        ({"image_size": 2**31}, "image_size is 2147483648; it must be at most 2147483647 pixels"),
        ({"image_size": (224, 2**40)}, r"image_size is \(224, 1099511627776\); it must be at most 2147483647 pixels"),
    ],
)
def test_numbers_beyond_their_bounds(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        cs.Conditions(**given)


def test_the_bounds_themselves() -> None:
    made = cs.Conditions(batch_size=2**31 - 1, threads=1024, image_size=(1, 2**31 - 1))
    assert (made.batch_size, made.threads, sides(made.image_size or 0)) == (2**31 - 1, 1024, (1, 2**31 - 1))
