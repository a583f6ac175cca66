"""The package as a user first meets it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import convscale


def test_import_loads_neither_torch_nor_numpy() -> None:
    heavy = ("torch", "torchvision", "numpy", "scipy", "onnx")
    code = f"import sys, convscale; dir(convscale); print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_architectures_need_no_torch() -> None:
    code = (
        "import sys, convscale as cs; cs.list_models(); cs.scale(cs.get_spec('efficientnet_b0'), phi=1.0); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"


STUB = Path(convscale.__file__).with_suffix(".pyi")
PUBLIC = {
    alias.name: node.module
    for node in ast.parse(STUB.read_text(encoding="utf-8")).body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_name_resolves(name: str) -> None:
    value = getattr(convscale, name)
    assert value.__module__ == f"convscale.{PUBLIC[name]}", "listed where it is not defined"
    assert value.__doc__, "a public name says what it is"
    assert name in dir(convscale)


def test_public_names_do_not_hide_modules() -> None:
    """A module with the name of a public function would replace it on the second access."""
    for name in PUBLIC:
        getattr(convscale, name)
        assert not isinstance(getattr(convscale, name), type(sys))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = convscale.no_such_name
