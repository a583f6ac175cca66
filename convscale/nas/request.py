"""What a search is asked for, checked, as one value."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from convscale.choice.basis import Basis
from convscale.choice.candidates import SMALL_IMAGE
from convscale.errors import UserError, check_flag, check_number, check_text, check_whole
from convscale.images.digest import data_digest
from convscale.images.extent import small_side
from convscale.images.splits import DataSplits
from convscale.learn.graphs import check_compile
from convscale.learn.recipe import Recipe
from convscale.learn.recipes import get_recipe
from convscale.learn.request import checked_seed
from convscale.learn.usual import usual_recipe
from convscale.nas.engines.base import Place
from convscale.nas.records import Reward
from convscale.nas.sampling import SAMPLERS
from convscale.nas.space import SearchSpace
from convscale.nas.spaces import get_space
from convscale.nas.zero_cost import SCORES

HALVING = 2
"""At each rung the better one of so many goes on (successive halving; Li et al., arXiv 1810.05934)."""
_LEAST_TRIALS = 2
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is trained."""

    trials: int | None = None
    """Trained in all; None: as many as the time allows."""
    minutes: float | None = None
    """Of this call."""
    epochs: int = 3
    """Of a trial."""
    most_images: int = 20_000
    """Of the train set in a trial."""
    sampler: str = "guided"
    """One of ``SAMPLERS``."""
    zero_cost: str | None = "size"
    """The score that the first trials are chosen by, and later proposals filtered; None: none."""
    seed: int = 0
    """Of everything drawn."""
    inherit: bool = False
    """Whether candidates begin with the weights of the nearest network that they can grow from."""

    def __post_init__(self) -> None:
        if self.trials is None and self.minutes is None:
            raise UserError("a search needs trials or minutes; give one of them")
        if self.trials is not None and check_whole("trials", self.trials) < _LEAST_TRIALS:
            raise UserError(f"trials is {self.trials}; a search compares, so it needs at least {_LEAST_TRIALS}")
        if self.minutes is not None:
            check_number("minutes", self.minutes, "a number above 0", 1e-6)
        check_whole("epochs", self.epochs)
        check_whole("most_images", self.most_images)
        check_text("sampler", self.sampler, SAMPLERS)
        if self.zero_cost is not None:
            check_text("zero_cost", self.zero_cost, SCORES)
        checked_seed(self.seed)
        check_flag("inherit", self.inherit)

    @property
    def rungs(self) -> tuple[int, ...]:
        """Epochs after which a trial may be given up."""
        found, at = list[int](), 1
        while at < self.epochs:
            found.append(at)
            at *= HALVING
        return tuple(found)


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """All that a search goes by, checked."""

    splits: DataSplits
    data: str | None
    """Where other processes read it from; None: nowhere."""
    space: SearchSpace
    basis: Basis
    reward: Reward
    effort: Effort
    recipe: Recipe
    place: Place
    """Where it is trained."""
    confidence: float
    say: Say

    @cached_property
    def data_digest(self) -> str:
        """Of the images and labels that are trained and judged on."""
        return data_digest((self.splits.train, self.splits.validation))

    @property
    def judged(self) -> dict[str, object]:
        """What an accuracy is, and of how many images."""
        return {"metric": "mAP" if self.splits.multilabel else "top-1", "images": len(self.splits.validation)}

    @cached_property
    def calibration(self) -> str | None:
        """Digest of the calibration that speeds are predicted by; None: there is none."""
        return self.basis.calibration_digest

    def written(self) -> dict[str, object]:
        """What must be the same for a search to go on."""
        effort = self.effort
        return {
            "space": self.space.name,
            "space_digest": self.space.digest,
            "data": self.data,
            "data_digest": self.data_digest,
            "classes": list(self.splits.classes),
            "reward": str(self.reward),
            "conditions": self.basis.conditions.to_dict(),
            "calibration": self.calibration,
            "confidence": self.confidence,
            "recipe": self.recipe.to_dict(),
            "sampler": effort.sampler,
            "zero_cost": effort.zero_cost,
            "seed": effort.seed,
            "inherit": effort.inherit,
            "most_images": effort.most_images,
        }


def fixed_form(recipe: Recipe, device: str) -> Recipe:
    """The recipe with nothing left to be measured on the spot, which would make two runs differ.

    Raises:
        UserError: it asks for CUDA graphs on another device.
    """
    check_compile(recipe, torch.device(device))
    here = device.partition(":")[0]
    chosen = {"precision": "fp32" if here == "cpu" else "amp", "layout": "nchw" if here == "cpu" else "nhwc"}
    return recipe.override({key: value for key, value in chosen.items() if getattr(recipe, key) == "auto"})


def native_size(splits: DataSplits) -> int | None:
    """The side in pixels at which small images are searched; None: they are larger."""
    return small_side(splits.train, SMALL_IMAGE)


def recipe_for(
    recipe: Recipe | str | os.PathLike[str] | None, splits: DataSplits, image_size: int | None = None
) -> Recipe:
    """The recipe asked for; else ``small`` for small images, unless they are enlarged above that (``image_size``; None:
    their own), and ``pictures`` for others.
    """
    return get_recipe(usual_recipe(splits, image_size, weights=False) if recipe is None else recipe)


def space_for(
    space: SearchSpace | str | os.PathLike[str] | None, splits: DataSplits, image_size: int | None
) -> SearchSpace:
    """The space at the size of the data, or the one asked for."""
    native = native_size(splits)
    found = space if isinstance(space, SearchSpace) else get_space(space or ("mobile" if native is None else "small"))
    if image_size is not None:
        return found.at_size(image_size)
    return found if native is None or native in found.image_sizes else found.at_size(native)
