"""Data flows one way: a module imports only from ranks before its own, also inside functions."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import convscale

ROOT = Path(convscale.__file__).parent
ORDER = ("arch", "nn", "images", "speed", "ship", "choice", "learn", "show", "pipeline", "demo", "cli")
RANK = {name: rank for rank, name in enumerate(ORDER, start=1)} | {"errors": 0, "files": 0, "__main__": len(ORDER) + 1}
# Large rooms that are several modules beside each other.
RANK |= {f"choice_{part}": RANK["choice"] for part in ("candidates", "measured", "result", "scaling", "speeds")}
RANK |= {f"pipeline_{part}": RANK["pipeline"] for part in ("record", "ship")}
RANK |= {f"cli_{part}": RANK["cli"] for part in ("common", "learn", "measure", "report", "ship", "speed")}
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def imported(source: str, module: str, *, is_package: bool = False) -> set[str]:
    """Dotted names of every module that ``source`` imports, at its top or inside functions; relative ones resolved,
    literal ``import_module`` too.
    """
    names: set[str] = set()
    package = module.split(".") if is_package else module.split(".")[:-1]
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                # `import convscale as cs` is an import of every `cs.name` that is used.
                used = attributes(tree, alias.asname or alias.name) if alias.name == "convscale" else set()
                names.update({f"convscale.{attribute}" for attribute in used} or {alias.name})
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            names.update(f"{prefix}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names.update(
                arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
            )
    return names


def attributes(tree: ast.Module, name: str) -> set[str]:
    """What is taken from the variable ``name``, as in ``name.attribute``."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == name
    }


def violations(source: str, path: Path) -> list[str]:
    """One line for each import that ``convscale/path`` must not make."""
    parts = [*path.with_suffix("").parts]
    is_package = parts[-1] == "__init__"
    parts = parts[:-1] if is_package else parts
    room = parts[0]
    found = []
    for name in sorted(imported(source, ".".join(["convscale", *parts]), is_package=is_package)):
        top, *rest = name.split(".")
        if top == "convscale" and rest != ["__version__"]:
            if not rest or rest[0] not in RANK:
                found.append(f"{path} imports {name}: inside the package, import the module that defines a name")
            elif RANK[rest[0]] > RANK[room] or (RANK[rest[0]] == 0 == RANK[room] and room == "errors"):
                found.append(f"{path} imports {name}: {room} comes before {rest[0]}")
        if room in ("arch", "errors", "files") and top in ("torch", "torchvision", "timm"):
            found.append(f"{path} imports {name}: {room} knows no torch")
    return found


def test_every_room_has_a_rank() -> None:
    assert {path.parts[0].removesuffix(".py") for path in MODULES} <= set(RANK)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_one_way(path: Path) -> None:
    assert violations((ROOT / path).read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("nn/net.py", "from convscale.cost.counting import count"),
        ("nn/net.py", "def f():\n    from convscale.learn import train"),
        ("nn/net.py", "from ..speed import cost"),
        ("nn/__init__.py", "from ..speed import cost"),
        ("nn/net.py", "import importlib\nimportlib.import_module('convscale.cli.app')"),
        ("nn/net.py", "import convscale as cs"),
        ("nn/net.py", "import convscale as cs\nnet = cs.create_model('x')\nversion = cs.__version__"),
        ("nn/net.py", "from convscale import create_model"),
        ("choice.py", "import convscale.learn.train"),
        ("arch/spec.py", "import torch.nn as nn"),
        ("errors.py", "from convscale.files import write_text"),
    ],
)
def test_a_wrong_import_is_found(path: str, source: str) -> None:
    assert len(violations(source, Path(path))) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "nn/net.py",
            "import torch\nfrom convscale.arch.spec import NetSpec\nfrom convscale.nn.blocks import Block\nfrom . "
            "import norm",
        ),
        ("files.py", "from convscale.errors import UserError"),
        ("learn/train.py", "import convscale\nversion = convscale.__version__"),
        ("cli.py", "from convscale import __version__\nfrom convscale.pipeline.run import fit"),
    ],
)
def test_a_right_import_is_let_through(path: str, source: str) -> None:
    assert violations(source, Path(path)) == []
