"""What was tuned on a card opens wherever it arrives. Cards are stand-ins; the record is written by hand."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from convscale.artifact.artifact import Artifact, load_artifact
from convscale.artifact.facts import write_promise
from convscale.conditions import Conditions
from convscale.errors import UserError
from convscale.maps.files import Explainer
from convscale.runtimes import base
from convscale.runtimes.base import Opening
from convscale.runtimes.onnxruntime import OnnxRunner
from convscale.runtimes.tensorrt import Tensorrt
from convscale.serve.models import How, Model, Named
from convscale.ship import confirm as confirm_module
from convscale.ship.confirm import confirm
from convscale.speed.timing import Measurement
from tests.ship.test_confirm import PROMISE, ProcessorAsCard

COLUMNS = 120
ON_A_CARD = {"name": "tensorrt", "threads": 3, "streams": 2, "batch_size": 64, "device": "cuda"}
HERE = {"name": "openvino", "threads": 2, "streams": 2, "batch_size": 4, "device": "cpu"}


@pytest.fixture
def folder(onnx_art: Artifact, tmp_path: Path) -> Path:
    """An artefact that was tuned on a card."""
    made = Path(shutil.copytree(onnx_art.folder, tmp_path / "copy"))
    load_artifact(made).keep(runtime=ON_A_CARD)
    return made


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Opening]:
    """How a machine with TensorRT, which is the processor, was asked to open files in it."""
    asked: list[Opening] = []

    def opening(self: Tensorrt, source: Path, how: Opening) -> OnnxRunner:
        asked.append(how)
        return ProcessorAsCard(source, replace(how, device="cpu"))

    monkeypatch.setattr(base, "find_spec", lambda name: find_spec("numpy" if name == "tensorrt" else name))
    monkeypatch.setattr(Tensorrt, "open", opening)
    monkeypatch.setattr(confirm_module, "card_name", lambda device: "NVIDIA L4")
    return asked


def settings(art: Artifact) -> tuple[object, ...]:
    return art.runtime, art.threads, art.streams, art.batch_size, art.tuned


def test_each_kind_of_device_has_its_own_settings(folder: Path, opened: list[Opening]) -> None:
    assert settings(load_artifact(folder)) == ("onnxruntime", None, 1, 32, False)
    assert settings(load_artifact(folder, device="cuda:1")) == ("tensorrt", 3, 2, 64, True)
    assert settings(load_artifact(folder, runtime="openvino", threads=1)) == ("openvino", 1, 1, 32, False)
    with pytest.raises(UserError, match="runs in onnxruntime or openvino, not in tensorrt"):
        load_artifact(folder, runtime="tensorrt")
    art = load_artifact(folder)
    art.keep(runtime={key: value for key, value in ON_A_CARD.items() if key != "device"})  # what no version wrote
    assert settings(load_artifact(folder)) == ("onnxruntime", None, 1, 32, False)
    art.keep(runtime=HERE)
    assert settings(load_artifact(folder)) == ("openvino", 2, 2, 4, True)
    assert settings(load_artifact(folder, device="cuda")) == ("onnxruntime", None, 1, 32, False)
    art.keep(runtime=ON_A_CARD, precision="int8", int8={"passed_in": ["openvino"]})
    assert load_artifact(folder).runtime == "openvino"
    art.keep(runtime={"name": "eager"}, precision="fp32")
    with pytest.raises(UserError, match="runs in onnxruntime or openvino, not in eager"):
        load_artifact(folder)


def test_it_is_served_and_explained_on_the_processor_and_laid_out_for_the_card(
    folder: Path, onnx_art: Artifact, images: np.ndarray, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    found = load_artifact(folder)(images)
    np.testing.assert_array_equal(found, onnx_art(images))
    net = Explainer.open(folder).net
    assert isinstance(net, Artifact)
    assert net.runtime == "onnxruntime"
    model = Model(Named(name="a", folder=folder), How(), lambda event: None)  # pyright: ignore
    assert model.current.takes.platform == "onnx_onnxruntime"
    model.current.batcher.close()
    code, _, err = call("export", folder, "--layout", "triton", "--output", tmp_path / "repository", "--name", "net")
    assert (code, err) == (0, "")
    config = (tmp_path / "repository" / "net" / "config.pbtxt").read_text()
    assert "max_batch_size: 64" in config
    assert "KIND_GPU" in config


def test_its_promise_is_confirmed_where_it_was_tuned(folder: Path, opened: list[Opening]) -> None:
    write_promise(folder, replace(PROMISE, device="l4", runtime="compiled", precision="fp32", threads=None))
    for given in (folder, load_artifact(folder)):
        found = confirm(given, min_seconds=0.02)
        assert found.measurement.conditions.runtime == "tensorrt"
    assert [how.device for how in opened] == ["cuda", "cuda"]


@pytest.mark.parametrize("runtime", [None, "tensorrt"])
def test_measure_opens_it_on_the_device(
    runtime: str | None,
    folder: Path,
    opened: list[Opening],
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[..., tuple[int, str, str]],
) -> None:
    seen: list[tuple[str, str, str]] = []

    def timed(net: Artifact, cond: Conditions, *others: object) -> Iterator[Measurement]:
        seen.append((net.device, net.runtime, cond.runtime))
        return iter(())

    monkeypatch.setattr("convscale.cli.measure._measured", timed)
    named = () if runtime is None else ("--runtime", runtime)
    assert call("measure", folder, "--device", "cuda", *named) == (0, "", "")
    assert seen == [("cuda", "tensorrt", "tensorrt")]
