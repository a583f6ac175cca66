"""What a user asks of ``fit``, as one value, checked before anything is read or written."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from convscale.arch.spec import NetSpec
from convscale.arch.zoo import as_spec
from convscale.choice.candidates import SMALL_IMAGE, scaled_members, sized
from convscale.choice.finalists import FIT_FAMILIES
from convscale.conditions import Conditions, Constraint
from convscale.errors import UserError, check_flag, check_number, check_path, check_text, check_whole
from convscale.images.splits import DataSplits
from convscale.learn.progress import Progress
from convscale.learn.recipes import get_recipe
from convscale.learn.request import checked_seed
from convscale.learn.settings import usable_device
from convscale.pipeline.ship import Shipping

Given = str | NetSpec | Sequence[str | NetSpec]
"""Candidates as a user names them: one, or several."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How finalists and the winner are trained.

    Raises:
        UserError: a value is impossible, or a recipe key has an argument of its own.
    """

    recipe: str | None = None
    """A recipe's name or file; None: by the data, see ``recipe_for``."""
    init: str | None = None
    """``pretrained``: from released weights; None: from scratch."""
    epochs: int | None = None
    """Of the full training; None: the recipe's."""
    brief_epochs: int = 1
    """Of the comparison."""
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
            raise UserError(f"init is {self.init!r}; it must be 'pretrained', or left out to train from scratch")
        if self.max_minutes is not None:
            check_number("max_minutes", self.max_minutes, "a number of minutes above 0", math.ulp(0.0))
        values = {"epochs": epochs, "overrides": overrides, "seed": checked_seed(self.seed)}
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


@dataclass(frozen=True, kw_only=True, eq=False)
class FitRequest:
    """``fit``'s arguments as one value.

    Raises:
        UserError: an argument is impossible; the message names it, the value and what would be right.
    """

    data: str | os.PathLike[str] | DataSplits
    """Splits, or where they are read from."""
    output: Path
    """The folder to make."""
    constraint: Constraint
    """What the shipped network must keep."""
    conditions: Conditions
    """Under which it must keep it."""
    shipping: Shipping
    """In which forms it may be shipped."""
    training: Training
    """How it is trained."""
    candidates: Given | None = None
    """What to choose from; None: scaled members of ``FIT_FAMILIES``."""
    image_size: int | None = None
    """Side in pixels; None: by the data, see ``size_for``."""
    resume: bool = False
    """Go on in ``output``."""
    overwrite: bool = False
    """Replace ``output``."""
    progress: Progress | None = None
    """Called with every event."""

    def __post_init__(self) -> None:
        if not isinstance(self.data, DataSplits):
            check_path("data_dir", self.data)
        object.__setattr__(self, "output", check_path("output", self.output))
        check_flag("resume", self.resume)
        check_flag("overwrite", self.overwrite)
        if self.progress is not None and not callable(self.progress):
            raise UserError(f"progress is {self.progress!r}; it must be a function that takes events")
        if self.constraint.min_throughput is None:
            raise UserError("min_throughput is None; it must be a number of images/s above 0")
        usable_device(self.conditions.device)
        if self.training.init is not None and self.candidates is None:
            raise UserError(
                f"init is {self.training.init!r}, but scaled members have no released weights; name candidates that "
                "have some"
            )

    def size_for(self, splits: DataSplits) -> int:
        """The side in pixels that candidates are built for."""
        return self.image_size or default_size(splits)

    def recipe_for(self, splits: DataSplits) -> str:
        """The recipe's name: ``small`` for small images, ``finetune`` from released weights, else ``pictures``."""
        if self.training.recipe is not None:
            return self.training.recipe
        if self.training.init:
            return "finetune"
        return "small" if default_size(splits) <= SMALL_IMAGE else "pictures"

    def pool(self, splits: DataSplits) -> list[tuple[NetSpec, str]]:
        """(spec, family) of every candidate, a family's members from small to large.

        Raises:
            UserError: candidates of another kind, an unknown name, none, or one name twice.
        """
        given = self.candidates
        if given is None:
            size = self.size_for(splits)
            return [(spec, base) for base in FIT_FAMILIES for spec in scaled_members(base, size)]
        if isinstance(given, str | NetSpec):
            given = [given]
        if not isinstance(given, Iterable):
            raise UserError(f"candidates is {given!r}; it must be a network's name or spec, or a list of them")
        named = [sized(as_spec(item), self.image_size) for item in given]
        if not named:
            raise UserError("candidates is empty; name at least one network")
        if len({spec.name for spec in named}) < len(named):
            raise UserError(f"candidates repeat a name: {', '.join(spec.name for spec in named)}")
        return [(spec, spec.name) for spec in named]

    def to_json(self, splits: DataSplits) -> dict[str, object]:
        """What a run is known by: only an equal one is resumed."""
        training, recipe = self.training, self.recipe_for(splits)
        return {
            "data": str(self.data) if not isinstance(self.data, DataSplits) else "given splits",
            "min_throughput": self.constraint.min_throughput,
            "conditions": self.conditions.to_dict(),
            "shipping": asdict(self.shipping),
            "candidates": [spec.to_dict() for spec, _ in self.pool(splits)],
            "recipe": recipe,
            "init": training.init,
            "overrides": training.overrides,
            "epochs": training.checked_epochs(recipe),
            "brief_epochs": training.brief_epochs,
            "seed": training.seed,
        }


def default_size(splits: DataSplits) -> int:
    """The side in pixels that candidates are built for: small images' own, else 224."""
    images = splits.train.images
    if images is not None and max(images.shape[1:3]) <= SMALL_IMAGE:
        return int(max(images.shape[1:3]))
    return 224
