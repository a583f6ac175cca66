"""INT8: what it costs, and what stays in float so that it does not cost more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from convscale.artifact.artifact import load_artifact
from convscale.errors import UserError
from convscale.images.preprocess import Preprocessing
from convscale.runtimes.openvino import OpenVinoRunner
from convscale.ship.export import export
from convscale.ship.float_layers import rank_layers, search_float_layers
from convscale.ship.layers import Layer
from convscale.ship.quantize import CALIBRATION, check_calibration, spread
from convscale.ship.verify import Withheld

PRE = Preprocessing(image_size=8, mean=(0.0,) * 3, std=(1.0,) * 3)


class Colours(nn.Module):
    """Says which channel is the brightest, by weights set by hand; the third convolution's input has one channel of
    another magnitude.
    """

    def __init__(self, outlier: float) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 3, 1)
        with torch.no_grad():
            for conv in (self.first, self.second, self.third):
                conv.weight.zero_()
                assert conv.bias is not None
                conv.bias.zero_()
                for i in range(3):
                    conv.weight[i, i] = 1.0
            self.first.weight[3] = 1.0
            self.second.weight[3, 3] = outlier

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.second(x))
        return self.third(x).mean((2, 3))


def data(n: int = 150, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Flat pictures whose brightest channel leads by at least 20 of 255: uint8 (N, 8, 8, 3), and the channel."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    colours = rng.integers(60, 120, (n, 3))
    colours[np.arange(n), labels] = rng.integers(140, 255, n)
    return np.broadcast_to(colours[:, None, None].astype(np.uint8), (n, 8, 8, 3)).copy(), labels


@pytest.mark.parametrize(("format", "bake"), [("onnx", True), ("openvino", False)])
def test_int8_says_the_same_where_it_can(format: str, bake: bool, tmp_path: Path) -> None:
    images, labels = data()
    art = export(
        Colours(1.0),
        tmp_path / "a",
        format=format,
        bake=bake,
        int8=True,
        preprocessing=PRE,
        calibration_images=data(64, 1)[0],
        verify_images=images,
        verify_labels=labels,
    )
    record = art.verification
    assert record is not None
    assert (record["precision"], record["accuracy_before"], record["accuracy_after"]) == ("int8", 1.0, 1.0)
    assert [step["float_layers"] for step in art.manifest["int8"]["steps"]] == [[]]
    assert "float.onnx" not in {path.name for path in art.folder.iterdir()}
    logits = load_artifact(art.folder).logits(images)
    expected = images[:, 0, 0] / 255
    # Rounded; and clipped, since a range is the mean of the images' own ranges and these images are flat.
    assert 0 < np.abs(logits - expected).max() < 0.25
    assert np.median(np.abs(logits - expected)) < 0.02
    if format == "onnx":
        assert "QuantizeLinear" in {node.op_type for node in onnx.load(art.model_path).graph.node}


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_openvino_sees_a_quantised_network_in_fixed_batch_sizes_only(format: str, tmp_path: Path) -> None:
    images, _ = data()
    exported = export(
        Colours(1.0),
        tmp_path / "a",
        format=format,
        int8=True,
        preprocessing=PRE,
        calibration_images=data(64, 1)[0],
        verify_images=images,
        max_drop=100.0,
    )
    art = load_artifact(exported.folder, runtime="openvino", threads=1)
    runner = art.runner
    assert isinstance(runner, OpenVinoRunner)
    expected = art.logits(images[:12], batch_size=12)
    for size in (*range(1, 12), 1):
        assert np.abs(art.logits(images[:12], batch_size=size) - expected).max() < 1e-5
    assert art.logits(images[:5]).shape == (5, 3)
    inputs = [form.compiled.input(0).partial_shape for form in runner._forms.values()]
    assert all(shape.is_static for shape in inputs)
    assert {1, 2, 4, 8, 16} >= {shape[0].get_length() for shape in inputs} - {runner._part}


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_the_sensitive_layer_stays_in_float(format: str, tmp_path: Path) -> None:
    images, labels = data()
    art = export(
        Colours(3000.0),
        tmp_path / "a",
        format=format,
        int8=True,
        preprocessing=PRE,
        calibration_images=data(64, 1)[0],
        verify_images=images,
        verify_labels=labels,
        max_drop=1.0,
    )
    first, last = art.manifest["int8"]["steps"]
    assert first["float_layers"] == []
    assert first["drop_points"] > 20
    assert last["float_layers"] == ["third"]
    assert last["drop_points"] <= 1.0
    assert (art(images).argmax(1) == labels).mean() >= 0.99
    assert "third" in (art.folder / "README.md").read_text()


def test_withheld_when_nothing_helps(tmp_path: Path) -> None:
    images, labels = data()
    labels[:30] = -1  # no class: the network is wrong there, INT8 or not
    net = Colours(3000.0)
    with torch.no_grad():
        net.first.weight[3] = (
            3000.0  # an outlier in the second layer's input too: more than half of the layers would have to stay
        )
    with pytest.raises(
        Withheld,
        match=r"withheld: INT8 loses .* points of accuracy on 150 images, 0.5 are allowed; the difference starts at",
    ) as caught:
        export(
            net,
            tmp_path / "a",
            int8=True,
            preprocessing=PRE,
            calibration_images=images[:64],
            verify_images=images,
            verify_labels=labels,
        )
    assert caught.value.verification.accuracy_before == 0.8
    assert list(tmp_path.iterdir()) == []


class Mixed(nn.Module):
    """Depthwise convolutions of two kernels side by side, as in MixNet."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.small, self.large = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 5, padding=2, groups=4)
        self.last = nn.Conv2d(8, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = nn.functional.silu(self.first(x)).split(4, dim=1)
        x = torch.cat([self.small(a), self.large(b)], dim=1)
        return self.last(nn.functional.silu(x)).mean((2, 3))


def test_onnx_runtime_runs_quantised_depthwise_convolutions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images, _ = data()
    art = export(
        Mixed(),
        tmp_path / "a",
        int8=True,
        preprocessing=PRE,
        calibration_images=data(64, 1)[0],
        verify_images=images,
        max_drop=100.0,
    )
    graph = onnx.load(art.model_path).graph
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in graph.initializer}
    steps = [node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] not in sizes]
    # An activation has one scale: ONNX Runtime's quantised convolution takes no more.
    assert len(steps) >= 4
    assert {sizes[node.input[1]] for node in steps} == {1}
    assert np.isfinite(art.logits(images)).all()


def test_ranking_finds_the_outlier() -> None:
    from convscale.ship.layers import shipped_graph

    graph, layers, batch = shipped_graph(Colours(3000.0), PRE, data(8)[0], baked=False)
    assert [layer.name for layer in layers] == ["first", "second", "third"]
    assert rank_layers(graph, batch, layers)[0].name == "third"


@pytest.mark.parametrize("total", [1, 2, 3, 7, 40, 53])
def test_search_finds_the_fewest_layers_up_to_half_of_them(total: int) -> None:
    """Every edge against what brute force would find. The search once gave up at the last power of two below half."""
    layers = [Layer(name=f"l{i}", value=f"v{i}", file_value=f"v{i}") for i in range(total)]
    for needed in range(total + 1):
        seen: list[int] = []

        def attempt(kept: Sequence[Layer], needed: int = needed, seen: list[int] = seen) -> float:
            assert list(kept) == layers[: len(kept)], "the most sensitive come first"
            seen.append(len(kept))
            return 0.0 if len(kept) >= needed else 5.0

        steps, kept_it = search_float_layers(lambda: layers, total, attempt, 0.5)
        assert kept_it == (needed <= total // 2)
        assert [len(step.float_layers) for step in steps] == seen
        assert max(seen) <= total // 2
        if kept_it:  # what is left behind is the last try
            assert seen[-1] == needed
            assert steps[-1].drop_points == 0.0
        else:
            assert seen[-1] == total // 2
            assert steps[-1].drop_points == 5.0
        assert len(seen) <= 2 + 2 * math.ceil(math.log2(max(2, total)))


def test_nothing_is_ranked_where_all_may_be_quantised() -> None:
    def ranked() -> Sequence[Layer]:
        raise AssertionError("ranking takes a pass per layer")

    assert search_float_layers(ranked, 40, lambda kept: 0.0, 0.5)[1]


def test_bad_input(tmp_path: Path) -> None:
    images, _ = data(40)
    net = Colours(1.0)
    with pytest.raises(UserError, match="at least 32 calibration images of the training set, got 5"):
        export(net, tmp_path / "a", int8=True, preprocessing=PRE, calibration_images=images[:5])
    with pytest.raises(UserError, match="at least 32 calibration images of the training set, got 0"):
        export(net, tmp_path / "a", int8=True, preprocessing=PRE)
    with pytest.raises(UserError, match="format torch has no int8 form"):
        export(net, tmp_path / "a", format="torch", int8=True, preprocessing=PRE, calibration_images=images)
    with pytest.raises(UserError, match="half and int8 exclude each other"):
        export(net, tmp_path / "a", half=True, int8=True, preprocessing=PRE, calibration_images=images)
    assert list(tmp_path.iterdir()) == []


def test_missing_nncf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convscale.ship.quantize.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"INT8 needs nncf or onnxruntime, which is not installed; pip install nncf"):
        export(Colours(1.0), tmp_path / "a", int8=True, preprocessing=PRE, calibration_images=data(40)[0])
    options = {"int8": True, "preprocessing": PRE, "calibration_images": data(40)[0]}
    with pytest.raises(UserError, match=r"INT8 needs nncf, which is not installed; pip install nncf openvino"):
        export(Colours(1.0), tmp_path / "a", format="openvino", **options)


def test_calibration_images_come_from_all_over_a_set_that_stands_class_by_class() -> None:
    assert spread(5, 8).tolist() == [0, 1, 2, 3, 4]
    assert spread(9, 3).tolist() == [0, 4, 8]
    images = np.repeat(np.arange(10, dtype=np.uint8), 60)[:, None, None, None]  # ten classes, one after the other
    for count in (599, 600):
        chosen = check_calibration(images[:count])
        assert len(chosen) == CALIBRATION
        assert np.bincount(chosen.reshape(-1)).tolist() == pytest.approx([30] * 10, abs=1)
