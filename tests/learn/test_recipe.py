"""Recipes as values: overrides, files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from convscale.errors import UserError
from convscale.learn.recipe import Recipe
from convscale.learn.recipes import get_recipe, list_recipes


def test_every_named_recipe_is_valid_and_has_a_source() -> None:
    assert "small" in list_recipes()
    for name in list_recipes():
        recipe = get_recipe(name)
        assert recipe.name == name
        assert len(recipe.source) > 20


def test_overrides_by_text_are_parsed() -> None:
    recipe = get_recipe("small").override(
        ["lr=0.05", "epochs = 3", "ema-decay=0", "class_weights=yes", "image_size=none", "optimizer=adamw"]
    )
    assert (recipe.lr, recipe.epochs, recipe.ema_decay, recipe.class_weights, recipe.image_size) == (
        0.05,
        3,
        0.0,
        True,
        None,
    )
    assert recipe.override({"image_size": 32}).image_size == 32


@pytest.mark.parametrize(
    ("given", "size"),
    [("192x160", (192, 160)), ("64x64", 64), ("48", 48), ((192, 160), (192, 160)), ([5, 7], (5, 7)), (None, None)],
)
def test_an_image_size_may_be_a_rectangle(given: object, size: object, tmp_path: Path) -> None:
    recipe = Recipe(name="x").override({"image_size": given})
    assert recipe.image_size == size
    recipe.save(tmp_path / "recipe.yaml")
    assert get_recipe(tmp_path / "recipe.yaml") == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize(
    "given", ["", "0", "192x", "1x2x3", "ax2", "20000", 2.5, True, float("nan"), [], (4, 0), {"a": 1}]
)
def test_an_impossible_image_size(given: object) -> None:
    with pytest.raises(
        UserError, match="image_size must be a whole number of pixels from 1 to 10000, or height x width"
    ):
        Recipe(name="x").override({"image_size": given})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lr=0", r"lr must lie between 1e-09 and 100, got 0\.0"),
        ("lr=1e9", "lr must lie between"),
        ("lr=fast", "lr must be a number, got 'fast'"),
        ("lr=nan", "lr must be a number, got 'nan'"),
        ("epochs=2.5", "epochs must be a whole number, got '2.5'"),
        ("compile=maybe", "compile must be true, false, auto or graphs, got 'maybe'"),
        ("image_size=", "image_size must be a whole number of pixels from 1 to 10000, .*, got ''"),
        ("optimizer=adam", r"optimizer 'adam' is unknown \(nearest: adamw"),
        ("leraning_rate=1", "has no key 'leraning_rate'"),
        ("momentun=1", r"no key 'momentun' \(nearest: momentum"),
        ("lr", "write key=value"),
    ],
)
def test_bad_overrides(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_recipe("small").override([setting])


def test_files_round_trip(tmp_path: Path) -> None:
    recipe = get_recipe("small").override({"lr": 1e-3, "name": "mine"})
    recipe.save(tmp_path / "r.yaml")
    assert get_recipe(tmp_path / "r.yaml") == recipe
    (tmp_path / "r.json").write_text('{"name": "short", "lr": 0.5}')
    assert get_recipe(tmp_path / "r.json") == Recipe(name="short", lr=0.5)
    (tmp_path / "exponent.yaml").write_text("lr: 1e-3")  # YAML reads this as a text
    assert get_recipe(tmp_path / "exponent.yaml").lr == 0.001
    (tmp_path / "bad.yaml").write_text("lr: [")
    with pytest.raises(UserError, match=r"bad\.yaml is no valid YAML"):
        get_recipe(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match="must be a table"):
        get_recipe(tmp_path / "list.yaml")
    with pytest.raises(UserError, match=r"recipe 'smal' is unknown \(nearest: small"):
        get_recipe("smal")
    with pytest.raises(UserError, match="can not be read"):
        get_recipe("nowhere.yaml")
