"""Sections of a fit's report, each by itself."""

from __future__ import annotations

import re

import pytest

from convscale.show.fit_candidates import candidate_table
from convscale.show.fit_record import fit_record as typed
from convscale.show.fit_sections import story, verification
from tests.show.example import fit_record


@pytest.mark.parametrize(("mean", "title"), [(None, "Accuracy"), (0.9, "Mean average precision")])
def test_the_accuracy_of_what_is_shipped_is_called_what_it_is(mean: float | None, title: str) -> None:
    record = fit_record()
    record["evaluation"]["mean_average_precision"] = mean
    record["verification"] |= {"accuracy_before": 0.9, "accuracy_after": 0.875}
    if mean is None:
        record["verification"] |= {"accuracy_before_interval": [0.8, 0.95], "accuracy_after_interval": [0.78, 0.93]}
    section = verification(typed(record))
    assert section is not None
    said = " ".join(re.sub("<[^>]*>", " ", section.body).split())
    before, after = ("", "") if mean else (" (95 % interval 80.0 % to 95.0 %)", " (95 % interval 78.0 % to 93.0 %)")
    assert f" {title} 90.00 % as trained{before}, 87.50 % as shipped{after}" in said


def test_what_was_known_early_has_its_interval_and_the_weights_their_data() -> None:
    """Wilson's, by hand: 18 of 20 are 69.9 to 97.2 %; 90.5 % of 6,000 are 5,430: 89.7 to 91.2 %."""
    record = fit_record()
    record["candidates"][3] |= {"licence": "cc-by-nc-4.0", "extra_data": "ImageNet-12k"}
    record["candidates"][3]["probe"] = {"top1": 0.9, "train": 80, "validation": 20}
    section = candidate_table(typed(record))
    assert section is not None
    said = " ".join(re.sub("<[^>]*>", " ", section.body).split())
    assert "90.0 % 69.9 % to 97.2 %" in said
    assert "90.5 % 89.7 % to 91.2 % · " in said
    assert "cc-by-nc-4.0 · trained on ImageNet-12k too" in said
    assert "Under it stands its 95 % interval." in said
    record["evaluation"]["mean_average_precision"] = 0.9
    several = candidate_table(typed(record))
    assert several is not None
    assert "69.9 %" not in several.body
    assert "it is right on 92.1 % of 10,000 test images (95 % interval 91.5 % to 92.6 %), which" in story(
        typed(fit_record())
    )
