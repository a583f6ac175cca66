"""``fit`` times networks with the head that it trains, or says that it can not."""

from __future__ import annotations

import pytest

from convscale.errors import UserError
from convscale.pipeline.request import Training


def test_a_head_by_recipe_is_refused() -> None:
    with pytest.raises(UserError, match=r"head=ml_decoder as a recipe key.*convscale train"):
        Training(recipe="ml-decoder").checked_epochs("ml-decoder")
    assert Training(recipe="coco-asl").checked_epochs("coco-asl") is None
