"""Sections of a fit's report, each by itself."""

from __future__ import annotations

import re

import pytest

from convscale.show.fit_record import fit_record as typed
from convscale.show.fit_sections import verification
from tests.show.example import fit_record


@pytest.mark.parametrize(("mean", "title"), [(None, "Accuracy"), (0.9, "Mean average precision")])
def test_the_accuracy_of_what_is_shipped_is_called_what_it_is(mean: float | None, title: str) -> None:
    record = fit_record()
    record["evaluation"]["mean_average_precision"] = mean
    record["verification"] |= {"accuracy_before": 0.9, "accuracy_after": 0.875}
    section = verification(typed(record))
    assert section is not None
    said = " ".join(re.sub("<[^>]*>", " ", section.body).split())
    assert f" {title} 90.00 % as trained, 87.50 % as shipped" in said
