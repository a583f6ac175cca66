"""How a row of probabilities becomes an answer, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from convscale.artifact.answers import Said

ROW = np.array([0.1, 0.5, 0.1, 0.3])


@pytest.mark.parametrize(("top", "labels"), [(None, ("b", "d", "a", "c")), (2, ("b", "d")), (1, ("b",))])
def test_the_likeliest_come_first_and_of_equals_the_first_class(top: int | None, labels: tuple[str, ...]) -> None:
    answer = Said(classes=("a", "b", "c", "d"), thresholds=None, top=top).answer(ROW, "x.jpg")
    assert answer.labels == labels
    assert answer.probabilities == tuple(sorted(ROW.tolist(), reverse=True))[: len(labels)]
    assert (answer.name, answer.error) == ("x.jpg", "")


def test_of_several_labels_those_above_their_own_thresholds_count() -> None:
    """On its threshold a class is not above it."""
    said = Said(classes=("a", "b", "c", "d"), thresholds=(0.05, 0.5, 0.2, 0.2), top=None)
    assert said.answer(ROW, "").labels == ("d", "a")
    none = Said(classes=("a", "b", "c", "d"), thresholds=(0.9,) * 4, top=3)
    assert none.answer(ROW, "").labels == ()
