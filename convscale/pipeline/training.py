"""How ``fit`` trains its finalists and the winner, as one value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from convscale.errors import UserError, check_number, check_text, check_whole
from convscale.learn.recipe import Recipe
from convscale.learn.recipes import get_recipe
from convscale.learn.request import checked_seed


@dataclass(frozen=True, kw_only=True)
class Training:
    """How finalists and the winner are trained.

    Raises:
        UserError: a value is impossible, or a recipe key has an argument of its own.
    """

    recipe: str | None = None
    """A recipe's name or file; None: by the data, see ``recipe_for``."""
    init: str | None = None
    """``pretrained``: from released weights, whatever the data are."""
    epochs: int | None = None
    """Of the full training; None: the recipe's."""
    brief_epochs: int | None = None
    """Of the comparison of finalists; None: ``BRIEF_EPOCHS``, where the validation set can tell them apart."""
    max_minutes: float | None = None
    """The full training ends by then."""
    seed: int = 0
    """Of everything drawn."""
    overrides: Mapping[str, object] = field(default_factory=dict)
    """Recipe keys, ``epochs`` and ``image_size`` not among them: they have arguments."""

    def __post_init__(self) -> None:
        if not isinstance(self.overrides, Mapping):
            raise UserError(f"overrides is {self.overrides!r}; it must map recipe keys to values")
        overrides = dict(self.overrides)
        if "image_size" in overrides:
            raise UserError(
                f"image_size={overrides['image_size']} as a recipe key: networks are timed at their size, use "
                "image_size= (--img-size)"
            )
        epochs = overrides.pop("epochs", self.epochs)
        if self.recipe is not None:
            check_text("recipe", self.recipe, what="small")
        if self.init not in (None, "pretrained"):
            raise UserError(f"init is {self.init!r}; it must be 'pretrained' or a file of weights")
        if self.max_minutes is not None:
            check_number("max_minutes", self.max_minutes, "a number of minutes above 0", math.ulp(0.0))
        values = {"epochs": epochs, "overrides": overrides, "seed": checked_seed(self.seed)}
        if self.brief_epochs is not None:
            values["brief_epochs"] = check_whole("brief_epochs", self.brief_epochs)
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def checked_epochs(self, recipe: str) -> int | None:
        """The epochs as a whole number; None: the recipe's own.

        Raises:
            UserError: no such recipe, or it takes no such key or value.
        """
        epochs = {} if self.epochs is None else {"epochs": self.epochs}
        made = get_recipe(recipe).override({**self.overrides, **epochs})
        return made.epochs if epochs else None

    @property
    def head(self) -> str:
        """The head that networks are timed, trained and shipped with: ``own``, ``gap`` or ``ml_decoder``.

        Raises:
            UserError: as ``checked_epochs``.
        """
        return self.asked_recipe.head

    @property
    def asked_recipe(self) -> Recipe:
        """The recipe asked for, with its overrides; where none is, the data's are not known yet, but for these.

        Raises:
            UserError: as ``checked_epochs``.
        """
        recipe = Recipe(name="of the data") if self.recipe is None else get_recipe(self.recipe)
        return recipe.override(dict(self.overrides))
