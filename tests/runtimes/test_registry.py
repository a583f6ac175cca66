"""A new runtime is one file: what is registered works everywhere, and nothing else lists runtimes."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from torch import nn

import convscale
from convscale.artifact.artifact import Artifact, load_artifact
from convscale.errors import UserError
from convscale.runtimes import base
from convscale.runtimes.base import (
    Opening,
    check_runtime,
    file_runtimes,
    installed_runtimes,
    need_runtime,
    runtime_of,
    runtimes,
    runtimes_of,
)
from convscale.ship.tune import tune
from convscale.speed.measuring import measure

ROOT = Path(convscale.__file__).parent

NEW_RUNTIME = """
import onnx
import numpy as np
from onnx.reference import ReferenceEvaluator

from convscale.runtimes.base import FileRunner, Runtime, register


@register
class Reference(Runtime):
    name = "reference"
    formats = ("onnx",)
    library = "onnx"
    install = "pip install onnx"

    def open(self, source, how):
        return ReferenceRunner(source, how)


class ReferenceRunner(FileRunner):
    runtime = "reference"
    dtype = np.dtype("float32")
    runs = 0

    def __init__(self, path, how):
        self.threads, self.streams = how.threads or 1, 1
        self.evaluator = ReferenceEvaluator(onnx.load(path))

    def run(self, prepared):
        ReferenceRunner.runs += 1
        return self.evaluator.run(None, {"images": prepared[0]})

    def fetch(self, outputs):
        return tuple(outputs)
"""


@pytest.fixture
def reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type]:
    """A runtime of one file: ONNX's own evaluator in NumPy."""
    (tmp_path / "reference_runtime.py").write_text(NEW_RUNTIME)
    monkeypatch.syspath_prepend(tmp_path)
    known = runtimes()
    yield importlib.import_module("reference_runtime").ReferenceRunner
    base._REGISTRY[:] = known
    del sys.modules["reference_runtime"]


def test_a_new_runtime_is_one_file(reference: type, tiny: nn.Module, onnx_art: Artifact, images: np.ndarray) -> None:
    assert runtimes_of("onnx") == ("onnxruntime", "openvino", "reference")
    m = measure(tiny, runtime="reference", batch_size=2, threads=1, min_seconds=0.01, max_seconds=0.1)
    assert m.conditions.runtime == "reference"
    assert reference.runs >= len(m.times_s) > 0  # pyright: ignore[reportAttributeAccessIssue]
    other = load_artifact(onnx_art.folder, runtime="reference")
    assert np.allclose(other(images), onnx_art(images), atol=1e-5)
    tuned = tune(onnx_art, runtimes=["reference"], batch_sizes=(1, 2), min_seconds=0.01, save=False)
    assert {trial.settings.runtime for trial in tuned.trials} == {"reference"}
    with pytest.raises(UserError, match="reference can not train"):
        measure(tiny, runtime="reference", mode="train")
    with pytest.raises(UserError, match="runtime reference computes in fp32, not in fp16"):
        base.open_runtime(onnx_art.model_path, "reference", Opening(precision="fp16"))
    with pytest.raises(UserError, match="runtime reference runs on device cpu here, got 'cuda'"):
        base.open_runtime(onnx_art.model_path, "reference", Opening(device="cuda"))


def test_what_is_known() -> None:
    assert {runtime.name for runtime in runtimes()} == {
        *("eager", "compiled", "compiled-frozen", "compiled-max", "onnxruntime", "openvino", "tensorrt")
    }
    assert file_runtimes() == ("onnxruntime", "openvino")
    assert runtimes_of("onnx") == ("onnxruntime", "openvino")
    assert runtimes_of("openvino") == ("openvino",)
    assert runtimes_of("torch") == ("eager", "compiled", "compiled-frozen")
    assert runtimes_of("torch", "cuda") == ("eager", "compiled", "compiled-frozen", "compiled-max")
    assert [runtime.name for runtime in runtimes() if runtime.trains] == ["eager", "compiled"]
    assert "eager" in installed_runtimes()
    with pytest.raises(UserError, match=r"runtime 'onnxruntim' is unknown.*onnxruntime"):
        check_runtime("onnxruntim")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(runtime_of("openvino")), "library", "a_library_that_is_not_there")
    assert "openvino" not in installed_runtimes()
    with pytest.raises(UserError, match=r"^runtime openvino is not installed; pip install openvino$"):
        need_runtime("openvino")


def test_the_registry_loads_no_library() -> None:
    code = (
        "import sys; from convscale.runtimes.base import check_runtime, installed_runtimes; installed_runtimes(); "
        "check_runtime('eager'); print([n for n in ('torch', 'onnxruntime', 'openvino') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


ROOMS = ("artifact", "ship", "formats", "speed", "pipeline")
"""Rooms that ask the registry. ``openvino`` is a format's name too, so its runtime is looked for where a runtime is
compared or listed."""


def _listed(tree: ast.AST) -> list[str]:
    """Tuples, lists and sets of two or more runtimes' names, and comparisons of something called runtime with one."""
    names = {"eager", "compiled", "compiled-frozen", "compiled-max", "onnxruntime", "openvino"}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            values = {value.value for value in node.elts if isinstance(value, ast.Constant)}
            if len(values & names) > 1:
                found.append(ast.unparse(node))
        if isinstance(node, ast.Compare) and "runtime" in ast.unparse(node.left):
            values = {value.value for value in ast.walk(node) if isinstance(value, ast.Constant)}
            if values & names:
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    "path",
    [p for room in ROOMS for p in sorted((ROOT / room).rglob("*.py"))],
    ids=lambda p: f"{p.parent.name}-{p.stem}",
)
def test_nothing_else_lists_runtimes(path: Path) -> None:
    assert _listed(ast.parse(path.read_text())) == []


def test_a_list_of_runtimes_is_found() -> None:
    for source in ("A = ('onnxruntime', 'openvino')", "if s.runtime == 'openvino': pass", "x in {'eager', 'compiled'}"):
        assert _listed(ast.parse(source))
