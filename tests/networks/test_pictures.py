"""The crop mode of a network's pictures: as its weights were evaluated."""

from __future__ import annotations

import pytest
from torch import nn

import convscale as cs
from convscale.arch.zoo import get_tag, list_models
from convscale.errors import UserError
from convscale.networks.pictures import crop_mode_of, preprocessing_of


class Named(nn.Conv2d):
    """One layer with timm's configuration."""

    def __init__(self, mode: object) -> None:
        super().__init__(3, 2, 1)
        self.pretrained_cfg = {"input_size": (3, 64, 64), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_mode": mode}


def test_a_configuration_says_it() -> None:
    made = preprocessing_of(Named("squash"))
    assert (made.crop_mode, made.image_size, made.mean) == ("squash", 64, (0.5, 0.5, 0.5))
    assert preprocessing_of(Named("squash"), 32).crop_mode == "squash"
    assert crop_mode_of(Named(None)) == crop_mode_of(nn.Conv2d(3, 2, 1)) == "center"
    with pytest.raises(UserError, match="crop_mode 'border' is unknown"):
        preprocessing_of(Named("border"))


def test_released_weights_say_it_as_timm_does() -> None:
    timm = pytest.importorskip("timm")
    names = list_models(pretrained=True)
    theirs = {name: timm.models.get_pretrained_cfg(name).crop_mode for name in names}
    assert {name: get_tag(name).crop_mode for name in names} == theirs
    assert theirs["convnext_tiny.fb_in22k_ft_in1k_384"] == "squash"


def test_own_networks_have_that_of_their_weights() -> None:
    from convscale.learn.prepare import choose_preprocessing
    from convscale.learn.recipe import Recipe
    from tests.learn.nets import halves_data

    net = cs.create_model("convnext_atto.d2_in1k")
    assert preprocessing_of(net).crop_mode == "center"
    net.spec = cs.get_spec("convnext_tiny.in12k_ft_in1k_384")  # its weights' name is all that counts
    assert preprocessing_of(net).crop_mode == "squash"
    data = halves_data()
    assert choose_preprocessing(net, data, Recipe(name="x")).crop_mode == "center"  # small images, held at their size
