"""Data flows one way: a module imports only from rooms before its own, and no modules import each other in a circle.

All kinds of import count: at the top, inside functions, under ``TYPE_CHECKING``, ``import_module`` with a literal.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import convscale
from tools.imports import Checkout, Module, public_table

ROOT = Path(convscale.__file__).parent
HOUSE = Checkout.on_disk(ROOT.parent)
MODULES = [module for module in HOUSE.modules if module.room]

GROUND = ("_version", "aside", "errors", "machine", "locks", "files", "read", "cache", "words", "conditions", "stats")
ROOMS = (
    *("arch", "nn", "images", "networks", "runtimes", "artifact", "formats", "cost", "speed", "predictor", "ship"),
    *("choice", "learn", "detect", "maps", "nas", "show", "serve", "pipeline", "cli", "__main__"),
)
RANK = {room: rank for rank, room in enumerate((*GROUND, *ROOMS))}

TORCH = ("torch", "torchvision", "timm")
TORCH_FREE = (*GROUND, "arch", "runtimes", "artifact", "serve")
TORCH_FREE_MODULES = (
    "convscale.images.decode",
    "convscale.images.walk",
    "convscale.ship.cluster",
    "convscale.ship.containers",
    "convscale.ship.layouts",
    "convscale.ship.ray_engine",
    "convscale.ship.repository",
    "convscale.ship.rows",
    "convscale.ship.shards",
    "convscale.ship.stream",
    "convscale.ship.tune",
)
"""What runs an artefact in rooms that also train."""
TORCH_MODULES = ("convscale.runtimes.pytorch", "convscale.machine")
"""What may import torch in a room that is free of it, by name and by what stands below that name: the runtime that is
PyTorch, and the machine, which asks it for a GPU's name."""

# By the names they are imported by: the extras, and what only reports and trainings draw on.
EXTRAS = (
    *("openvino", "nncf", "timm", "optuna", "ray", "plotly", "tensorboard"),
    *("captum", "faster_coco_eval", "fastapi", "starlette", "uvicorn", "python_multipart", "prometheus_client"),
)


def torch_free(module: Module) -> bool:
    """Whether a module must not import torch."""
    if module.name in TORCH_FREE_MODULES:
        return True
    return module.room in TORCH_FREE and not f"{module.name}.".startswith(tuple(f"{name}." for name in TORCH_MODULES))


def violations(module: Module) -> list[str]:
    """One line for each import that a module must not make."""
    if module.room not in RANK:
        return [f"{module.path}: {module.room} has no rank"]
    wrong = set()
    for one in module.imports:
        top, room, *_ = [*one.name.split("."), ""]
        if top in TORCH and torch_free(module):
            wrong.add(f"{module.path}:{one.line} imports {top}, which {module.room} must not need")
        elif top == "convscale" and room not in RANK:
            taken = f"convscale.{room}".rstrip(".")
            wrong.add(f"{module.path}:{one.line} imports {taken}: import the module that defines the name")
        elif top == "convscale" and RANK[room] > RANK[module.room]:
            wrong.add(f"{module.path}:{one.line} imports {room}, but {module.room} comes before it")
    return sorted(wrong)


def test_every_room_has_a_rank() -> None:
    assert set(HOUSE.rooms) <= set(RANK)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)
def test_imports_go_one_way(module: Module) -> None:
    assert violations(module) == []


@pytest.mark.parametrize("room", HOUSE.rooms)
def test_no_circle_inside_a_room(room: str) -> None:
    assert HOUSE.circles_inside(room) == []


def test_no_room_has_a_public_name() -> None:
    """A module with the name of a public function would replace it on the second access."""
    assert set(HOUSE.rooms) & set(convscale.__all__) == set()


def test_the_public_table_is_complete() -> None:
    assert set(HOUSE.public) == set(convscale.__all__) - {"__version__"}


@pytest.mark.parametrize("name", sorted(set(convscale.__all__) - {"__version__"}))
def test_a_public_name_is_listed_where_it_is_defined(name: str) -> None:
    value = getattr(convscale, name)
    assert value.__module__ == HOUSE.public[name]
    assert getattr(convscale, name) is value, "the second access gives something else"


LIGHT_IMPORT = """
import importlib, importlib.metadata, sys

def block(names):
    sys.modules.update(dict.fromkeys(names))  # None: as if it were not installed

def import_all(modules):
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:
            print(f"{module}: {type(error).__name__}: {error}")

distribution = importlib.metadata.Distribution.from_name.__func__

def without_extras(cls, name):
    if name.lower().replace("-", "_") in EXTRAS:
        raise importlib.metadata.PackageNotFoundError(name)
    return distribution(cls, name)

importlib.metadata.Distribution.from_name = classmethod(without_extras)
block((*EXTRAS, *TORCH))
import_all(LIGHT)
for name in set(TORCH) - set(EXTRAS):
    del sys.modules[name]
import_all(MODULES)
"""


def failed_imports(light: list[str], modules: list[str]) -> list[str]:
    """What can not be imported in a fresh process: ``light`` without torch and extras, ``modules`` without extras."""
    lists = {"EXTRAS": EXTRAS, "TORCH": TORCH, "LIGHT": light, "MODULES": modules}
    code = "\n".join([*(f"{name} = {value!r}" for name, value in lists.items()), LIGHT_IMPORT])
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240, cwd=ROOT.parent)
    return done.stdout.splitlines()


def test_every_module_imports_without_extras() -> None:
    """Those of the rooms that are free of torch without torch as well."""
    light = [module.name for module in MODULES if torch_free(module)]
    assert failed_imports(light, [module.name for module in MODULES if module.room != "__main__"]) == []


# ---------------------------------------------------------------- the checks can fail


def module(path: str, source: str) -> Module:
    return Module(f"convscale/{path}", source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("nn/net.py", "from convscale.speed.timing import Measurement"),
        ("nn/net.py", "from convscale import speed"),
        ("nn/net.py", "def f():\n    from convscale.learn import train"),
        ("nn/net.py", "class A:\n    def f(self):\n        if self:\n            import convscale.learn.train"),
        ("nn/net.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from convscale.cost import trace"),
        ("nn/net.py", "import typing\nif typing.TYPE_CHECKING:\n    from convscale.cost import trace"),
        ("nn/net.py", "try:\n    from convscale.cost import trace\nexcept ImportError:\n    pass"),
        ("nn/net.py", "from ..speed import timing"),
        ("nn/net.py", "from .. import speed"),
        ("nn/__init__.py", "from ..speed import timing"),
        ("nn/kernels/bn.py", "from ...speed import timing"),
        ("nn/net.py", "import importlib\nimportlib.import_module('convscale.cli')"),
        ("nn/net.py", "from importlib import import_module\ncli = import_module(name='convscale.cli.app')"),
        ("nn/net.py", "from importlib import import_module\nimport_module('..cli', __package__)"),
        ("nn/net.py", "def f():\n    return __import__('convscale.cli')"),
        ("nn/net.py", "import convscale as cs"),
        ("nn/net.py", "import convscale as cs\nnet = cs.create_model('x')"),
        ("nn/net.py", "import convscale as cs\ncs.speed.timing.measure()"),
        ("nn/net.py", "import convscale.nn.blocks\nconvscale.speed.timing.measure()"),
        ("nn/net.py", "from convscale import create_model"),
        ("nn/net.py", "from convscale import *"),
        ("nn/net.py", "from convscale import __version__"),
        ("choice/choose.py", "import convscale.learn.train"),
        ("artifact/artifact.py", "from convscale.formats.onnx import write_onnx"),
        ("errors.py", "from convscale.files import write_text"),
        ("helpers.py", "from convscale.errors import UserError"),
        ("files.py", "from convscale.conditions import Conditions"),
        ("words.py", "from convscale.arch.spec import NetSpec"),
        ("arch/spec.py", "import torch.nn as nn"),
        ("arch/spec.py", "def f():\n    import timm"),
        ("arch/spec.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torch import Tensor"),
        ("cache.py", "from torch import cuda"),
        ("artifact/artifact.py", "import importlib\nimportlib.import_module('torch')"),
        ("runtimes/base.py", "import torch"),
        ("runtimes/pytorch_like.py", "import torch"),
        ("images/decode.py", "def f():\n    import torchvision"),
    ],
)
def test_a_wrong_import_is_found(path: str, source: str) -> None:
    assert len(violations(module(path, source))) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("nn/net.py", "import torch\nfrom convscale.arch.spec import NetSpec\nfrom convscale.nn.blocks import Block"),
        ("nn/net.py", "from . import norm\nfrom ..arch import spec\nimport convscale.arch.spec"),
        ("nn/net.py", "import convscale.arch.spec\nconvscale.arch.spec.NetSpec()"),
        ("nn/net.py", "import convscale as cs\ncs.arch.spec.NetSpec()"),
        ("nn/net.py", "import importlib\nimportlib.import_module('torch')\nimportlib.import_module(f'{__name__}.x')"),
        ("files.py", "from convscale.errors import UserError"),
        ("conditions.py", "from convscale.errors import UserError\nfrom convscale.machine import Environment"),
        ("images/decode.py", "import numpy as np\nfrom convscale.files import read_bytes"),
        ("learn/train.py", "from convscale._version import __version__"),
        ("runtimes/pytorch.py", "import torch\nfrom convscale.nn.net import create_model"),
        ("runtimes/pytorch/compiled.py", "import torch"),
        ("cli/app.py", "from convscale.pipeline.run import fit\nfrom convscale.cli import options"),
        ("__main__.py", "from convscale.cli.app import main"),
    ],
)
def test_a_right_import_is_let_through(path: str, source: str) -> None:
    assert violations(module(path, source)) == []


TYPING = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "
A_TO_B = "from convscale.room.b import y"


@pytest.mark.parametrize(
    "b",
    [
        "from convscale.room.a import x",
        "from convscale.room import a",
        "from . import a",
        "from .a import x",
        "import convscale.room.a",
        "import convscale.room as room\nroom.a.x()",
        "import convscale as cs\ncs.room.a.x()",
        "import convscale as cs\ncs.public()",
        "def f():\n    from convscale.room.a import x",
        f"{TYPING}from convscale.room.a import x",
        f"{TYPING}pass\nelse:\n    from convscale.room.a import x",
        "import importlib\nimportlib.import_module('convscale.room.a')",
        "from convscale.room.c import z",
    ],
)
def test_a_circle_is_found(b: str) -> None:
    files = {
        "convscale/__init__.pyi": "from .room.a import public as public",
        "convscale/room/__init__.py": "",
        "convscale/room/a.py": A_TO_B,
        "convscale/room/b.py": b,
        "convscale/room/c.py": f"def f():\n    {TYPING.splitlines()[0]}\n    import convscale.room.a",
        "convscale/room/d.py": "from convscale.room import a, b, c",
    }
    members = ("convscale.room.a", "convscale.room.b", *(["convscale.room.c"] if "room.c" in b else []))
    assert Checkout.of("synthetic", files).circles_inside("room") == [members]


def test_a_circle_through_the_rooms_own_init_is_found() -> None:
    files = {"convscale/room/__init__.py": "from .a import x", "convscale/room/a.py": "from convscale.room import y"}
    assert Checkout.of("synthetic", files).circles_inside("room") == [("convscale.room", "convscale.room.a")]


def test_two_circles_are_two() -> None:
    modules = {"a": "from . import b", "b": "from . import a", "c": "from . import a, d", "d": "from . import c"}
    files = {f"convscale/room/{name}.py": text for name, text in modules.items()}
    pairs = [("convscale.room.a", "convscale.room.b"), ("convscale.room.c", "convscale.room.d")]
    assert Checkout.of("synthetic", files).circles_inside("room") == pairs


def test_no_circle_where_there_is_none() -> None:
    """A diamond, an import of the module itself, the package of a module, another room's module of the same name."""
    files = {
        "convscale/room/__init__.py": "from . import d",
        "convscale/room/a.py": "def f():\n    import convscale.room.a",
        "convscale/room/b.py": "from . import a",
        "convscale/room/c.py": "from convscale.room import a\nfrom convscale.other import d",
        "convscale/room/d.py": f"from .b import x\n{TYPING}from .c import y",
        "convscale/other/d.py": "from convscale.room import d",
    }
    house = Checkout.of("synthetic", files)
    assert house.circles_inside("room") == []
    assert house.circles_between_rooms() == [("other", "room")]


@pytest.mark.parametrize(
    ("init", "stub"),
    [
        ('_PUBLIC = {"fit": "pipeline.run", "NetSpec": "arch.spec"}', None),
        ("", "from .arch.spec import NetSpec as NetSpec\nfrom .pipeline.run import fit as fit\n__all__ = ['fit']"),
        ("", "from convscale.arch.spec import NetSpec\nfrom convscale.pipeline.run import fit\nimport typing"),
        ("", "from typing import Any\nfrom ._version import __version__\nfrom .arch.spec import NetSpec\n"
         "from .pipeline.run import fit"),
    ],
)  # fmt: skip
def test_the_public_table_is_read(init: str, stub: str | None) -> None:
    assert public_table(init, stub) == {"NetSpec": "convscale.arch.spec", "fit": "convscale.pipeline.run"}


def test_a_failed_import_is_told() -> None:
    optional = ["openvino", "plotly", "torch.utils.tensorboard"]
    lines = failed_imports(["torch", "json"], ["torch", "json", *optional])
    assert [line.split(":")[0] for line in lines] == ["torch", *optional]
