"""Public functions of naming, building, scaling and loading are typed, and by no ``Any``."""

from __future__ import annotations

import inspect

import pytest

import convscale as cs

ROOMS = ("convscale.arch.", "convscale.nn.", "convscale.networks.")
PUBLIC = [getattr(cs, name) for name in cs.__all__ if getattr(getattr(cs, name), "__module__", "").startswith(ROOMS)]


@pytest.mark.parametrize("function", [value for value in PUBLIC if inspect.isfunction(value)], ids=lambda f: f.__name__)
def test_a_public_function_is_typed(function) -> None:
    signature = inspect.signature(function)
    annotations = [signature.return_annotation, *(p.annotation for p in signature.parameters.values())]
    assert inspect.Signature.empty not in annotations
    assert not [text for text in annotations if "Any" in str(text)]


def test_they_are_all_here() -> None:
    functions = {value.__name__ for value in PUBLIC if inspect.isfunction(value)}
    naming = {"get_spec", "list_models", "load_spec", "save_spec", "scale"}
    assert functions == naming | {"convert_norm", "create_detector", "create_model", "export_weights", "load_weights"}
