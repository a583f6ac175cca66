"""The named recipes as a table: one entry each, with its source."""

from __future__ import annotations

from convscale.learn.recipe import Recipe

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="small",
            source="convscale's own, for training small images (28 to 64 px) from scratch: one-cycle SGD, shifts, flips and cutout, averaged weights",
            epochs=10,
            batch_size=128,
            optimizer="sgd",
            lr=0.1,
            weight_decay=5e-3,
            schedule="onecycle",
            label_smoothing=0.1,
            augment="shift-crop",
            shift=0.07,
            cutout=0.28,
            ema_decay=0.998,
            ema_every=5,
        ),
    )
}
"""Name -> recipe."""
