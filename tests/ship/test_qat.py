"""Quantisation-aware fine-tuning: rounding by hand, nearer to the network afterwards, what is refused."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from convscale.errors import UserError
from convscale.formats.fold import fold
from convscale.formats.onnx import write_onnx
from convscale.images.preprocess import Preprocessing
from convscale.ship import export as export_module
from convscale.ship.draft import Shared
from convscale.ship.export import export
from convscale.ship.forms import export_fastest
from convscale.ship.qat import Grid, _distance, _divergence, _levels, _Rounded, fine_tune, grid_of
from convscale.ship.quantize import quantize_file
from convscale.ship.request import ExportRequest
from tests.ship.conftest import OnMaps, randomise

PRE = Preprocessing(image_size=16, mean=(0.5,) * 3, std=(0.25,) * 3)


def some_pictures() -> np.ndarray:
    coarse = np.random.default_rng(3).integers(0, 256, (512, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2)


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return some_pictures()


def silus() -> nn.Module:
    """Depthwise and dense layers with SiLU, whose logits differ from picture to picture."""
    torch.manual_seed(0)
    body: list[nn.Module] = [nn.Conv2d(3, 16, 3, 2, 1), nn.SiLU()]
    for _ in range(4):
        body += [nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.BatchNorm2d(16), nn.SiLU()]
        body += [nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.SiLU()]
    head = nn.Linear(16, 4)
    net = randomise(nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head), 16)
    with torch.no_grad():
        head.weight *= 8
        head.bias -= net(PRE.normalize(torch.from_numpy(some_pictures()))).mean(0)
    return net


def test_rounding_by_hand() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([64.0, 1.3]).view(2, 1, 1, 1))  # type: ignore[operator, union-attr]
    graph = fold(net, torch.zeros(2, 1, 1, 1))
    entry = next(node.name for node in graph.graph.nodes if node.op == "placeholder")
    layer = next(node.name for node in graph.graph.nodes if "conv" in node.name)
    rounded = _Rounded(graph, Grid(values={entry: (2.0, 0, 0, 255)}, inputs={}, weights={layer: 64}, gates={}))
    x = torch.tensor([4.8, 700.0]).view(2, 1, 1, 1)
    # 4.8 becomes 4, 700 is clipped to 255 levels of 2; each channel's largest weight is its 64th level, so both stay
    expected = torch.tensor([[4 * 64.0, 4 * 1.3], [510 * 64.0, 510 * 1.3]])
    torch.testing.assert_close(rounded.run(x), expected)


def test_a_gate_by_hand() -> None:
    net = nn.Sequential(nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    graph = fold(net, torch.zeros(2, 1, 1, 1))
    name = next(node.name for node in graph.graph.nodes if "silu" in node.name)
    rounded = _Rounded(graph, Grid(values={}, inputs={}, weights={}, gates={name: (0.25, 0, 0, 255)}))
    x = torch.tensor([1.0, -3.0]).view(2, 1, 1, 1)
    # sigmoid(1) = 0.731 becomes 0.75, sigmoid(-3) = 0.047 becomes 0
    torch.testing.assert_close(rounded.run(x), torch.tensor([[0.75], [0.0]]))


def test_a_shift_of_all_logits_counts_where_an_image_may_have_several_labels() -> None:
    graph: Any = lambda batch: torch.zeros(len(batch), 2)  # noqa: E731
    shifted: Any = SimpleNamespace(run=lambda batch: torch.full((len(batch), 2), math.log(3)), jitter=None)
    batch = PRE.normalize(torch.zeros(4, 16, 16, 3, dtype=torch.uint8))
    assert _divergence(graph, shifted, batch, False).item() == pytest.approx(0, abs=1e-6)
    # one half against three quarters, each class by itself
    expected = -0.5 * math.log(0.75) - 0.5 * math.log(0.25)
    assert _divergence(graph, shifted, batch, True).item() == pytest.approx(expected, rel=1e-6)
    images = np.zeros((40, 16, 16, 3), np.uint8)
    assert _distance(graph, shifted, images, PRE, True) == pytest.approx(expected, rel=1e-6)


def test_probabilities_of_several_labels_come_nearer(pictures: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rounded network's logits are all too high, and its biases learn to be lower."""
    graph = fold(silus(), PRE.normalize(torch.from_numpy(pictures[:2])))
    run = _Rounded.run
    monkeypatch.setattr(_Rounded, "run", lambda self, *batch: run(self, *batch) + 0.2)
    tuned = [fine_tune(graph, pictures, PRE, "onnxruntime", several=several, lr=3e-3) for several in (False, True)]
    batch = PRE.normalize(torch.from_numpy(pictures))
    with torch.no_grad():
        lower = [float((graph(batch) - one(batch)).mean()) for one in tuned]
    assert lower == [pytest.approx(0, abs=0.05), pytest.approx(0.2, abs=0.1)]


def test_the_grid_is_the_quantiser_s(pictures: np.ndarray) -> None:
    graph = fold(silus(), PRE.normalize(torch.from_numpy(pictures[:2])))
    images = pictures[:8].copy()
    images[0, 0, 0], images[0, 0, 1] = 0, 255  # (0 - 0.5) / 0.25 = -2 to 2
    grid = grid_of(graph, images, PRE, "onnxruntime")
    names = [node.name for node in graph.graph.nodes]
    entry = next(node.name for node in graph.graph.nodes if node.op == "placeholder")
    scale, zero, *ends = grid.values[entry]
    assert scale == pytest.approx(4 / 255, rel=1e-5)
    assert (zero in (127, 128), ends) == (True, [0, 255])
    wanted = {name for name in names if name.startswith(("conv2d", "silu"))} | {entry}
    assert wanted <= set(grid.values)
    assert set(grid.gates) == {name for name in names if name.startswith("silu")}
    layers = {name for name in names if name.startswith(("conv2d", "linear"))}
    assert set(grid.inputs) == set(grid.weights) == layers
    assert all(0 < scale <= 1 / 255 and zero == 0 for scale, zero, *_ in grid.gates.values()), "sigmoids lie in [0, 1]"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("route", ["onnxruntime", "nncf"])
def test_the_grid_of_linear_layers_on_maps_and_before_relu(route: str, bias: bool, pictures: np.ndarray) -> None:
    """Weights are written transposed there, and ONNX Runtime's quantiser takes a ReLU into its convolution. Each
    output's largest weight is 64 of its scales, or 63.5 where the range is -63.5 to 63.5.
    """
    torch.manual_seed(0)
    graph = fold(OnMaps(bias), PRE.normalize(torch.from_numpy(pictures[:2])))
    grid = grid_of(graph, pictures[:8], PRE, route)
    levels = 64 if route == "onnxruntime" else 63.5
    assert dict(grid.weights) == {
        name: pytest.approx(levels, rel=1e-3) for name in ("conv2d", "linear", "linear_1", "linear_2")
    }
    gelu = grid.values["gelu"]
    assert grid.inputs["linear_1"] == gelu
    batch = PRE.normalize(torch.from_numpy(pictures[:8]))
    with torch.no_grad():
        error = (_Rounded(graph, grid).run(batch) - graph(batch)).norm() / graph(batch).norm()  # pyright: ignore
    assert 1e-4 < error < 0.1


def test_scales_of_something_else_than_outputs_are_told_in_one_line() -> None:
    assert _levels(np.array([1.0, 2.0]), np.array([0.5]), "linear", "nncf") == 3.0
    with pytest.raises(UserError, match="nncf gives the weights of linear 3 scales for 2 outputs"):
        _levels(np.array([1.0, 2.0]), np.array([0.5, 0.5, 0.5]), "linear", "nncf")


def by_onnx_runtime(graph: nn.Module, pictures: np.ndarray, folder: Path) -> np.ndarray:
    """Logits of the network as ONNX Runtime's own quantiser makes it."""
    folder.mkdir()
    write_onnx(graph, PRE.normalize(torch.from_numpy(pictures[:2])), folder / "float.onnx")
    batches = [PRE.normalize_array(pictures[i : i + 1]) for i in range(64)]
    quantize_file(folder / "float.onnx", folder / "int8.onnx", "onnxruntime", batches)
    session = ort.InferenceSession(folder / "int8.onnx")
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: batch})[0] for batch in np.split(PRE.normalize_array(pictures), 8)])


@pytest.mark.slow
def test_an_independent_quantiser_s_network_comes_nearer(pictures: np.ndarray, tmp_path: Path) -> None:
    net = silus()
    graph = fold(net, PRE.normalize(torch.from_numpy(pictures[:2])))
    before = {name: value.clone() for name, value in graph.state_dict().items()}
    tuned = fine_tune(graph, pictures, PRE, "onnxruntime", epochs=8)
    again = fine_tune(graph, pictures, PRE, "onnxruntime", epochs=8)
    assert all(torch.equal(a, b) for a, b in zip(tuned.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(value, before[name]) for name, value in graph.state_dict().items()), "the network is left"
    with torch.no_grad():
        expected = net(PRE.normalize(torch.from_numpy(pictures))).argmax(1).numpy()
    wrong = [
        float((by_onnx_runtime(one, pictures, tmp_path / name).argmax(1) != expected).mean())
        for name, one in (("before", graph), ("after", tuned))
    ]
    assert wrong[1] < 0.6 * wrong[0], wrong


def test_the_state_before_the_first_step_competes(pictures: np.ndarray) -> None:
    graph = fold(silus(), PRE.normalize(torch.from_numpy(pictures[:2])))
    ruined = fine_tune(graph, pictures[:64], PRE, "onnxruntime", epochs=1, lr=1e3)
    assert all(torch.equal(a, b) for a, b in zip(ruined.parameters(), graph.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore")
def test_an_export_fine_tunes_only_where_rounding_loses_too_much(
    pictures: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convscale.ship.export.fine_tune", partial(fine_tune, epochs=8))
    monkeypatch.setattr("convscale.ship.export.routes_of", lambda format: ["onnxruntime"])
    options = {"calibration_images": pictures, "preprocessing": PRE, "verify_images": pictures, "int8": "qat"}
    gentle = export(silus(), tmp_path / "a", max_drop=100.0, **options)  # type: ignore[arg-type]
    assert "qat" not in gentle.manifest["int8"]
    strict = export(silus(), tmp_path / "b", max_drop=35.0, **options)  # type: ignore[arg-type]
    said = strict.manifest["int8"]
    assert said["qat"]["drop_before"] > 35.0 >= said["steps"][-1]["drop_points"]


def test_a_twin_takes_the_weights_that_learnt_for_the_usual_route(
    pictures: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fine-tuning takes minutes, and what comes first may be either."""
    learnt: list[object] = []

    def learn(graph: object, images: object, pre: object, route: str, *, several: bool) -> object:
        learnt.append((route, several))
        return graph

    monkeypatch.setattr(export_module, "write_model", lambda *_: None)
    monkeypatch.setattr(export_module, "fine_tune", learn)
    graph = fold(silus(), PRE.normalize(torch.from_numpy(pictures[:2])))
    shared = Shared(folder=tmp_path, graph=graph)
    made: Any = SimpleNamespace(module=None, example=None, preprocessing=PRE)
    probe: Any = SimpleNamespace(folder=tmp_path, manifest=None)
    for route, thresholds in (("nncf-symmetric", None), ("nncf", None), ("onnxruntime", (0.5,) * 4)):
        request = ExportRequest(
            int8=True, qat=True, int8_route=route, calibration_images=pictures, thresholds=thresholds
        )
        tuned = export_module._tuned(made, probe, shared, request)
        assert (tuned.graph, tuned.is_tuned) == (graph, True)
    assert learnt == [("nncf", False), ("onnxruntime", True)]


def test_bad_input(pictures: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs at least 64 calibration images of the training set, got 10"):
        export(silus(), tmp_path / "a", int8="qat", calibration_images=pictures[:10], preprocessing=PRE)
    for images in (None, pictures[:10]):  # the fastest form was float, and nothing was said
        with pytest.raises(UserError, match=f"got {0 if images is None else 10}$"):
            export_fastest(silus(), tmp_path / "a", int8="qat", calibration_images=images, preprocessing=PRE)
    with pytest.raises(UserError, match="int8 must be true, false or 'qat', got 'quick'"):
        export(silus(), tmp_path / "a", int8="quick", calibration_images=pictures, preprocessing=PRE)
    assert list(tmp_path.iterdir()) == []
