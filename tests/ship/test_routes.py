"""INT8 by each quantiser: what is quantised, how near to float it stays, which route a single export takes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from convscale.artifact.artifact import Artifact, load_artifact
from convscale.errors import UserError
from convscale.formats.onnx import write_onnx
from convscale.images.preprocess import Preprocessing
from convscale.ship import export as export_module
from convscale.ship import quantize as quantize_module
from convscale.ship.draft import Shared
from convscale.ship.export import export, export_as
from convscale.ship.pays import Slower
from convscale.ship.quantize import ROUTES, quantize_file, routes_of
from convscale.ship.request import ExportRequest
from convscale.ship.tune import Settings, Trial
from convscale.ship.verify import Verification, Withheld
from tests.ship.conftest import OnMaps

PRE = Preprocessing(image_size=16, mean=(0.5,) * 3, std=(0.25,) * 3)


class Three(nn.Module):
    """Three convolutions with an activation between them, and a linear head."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 1, 1), activation, nn.Conv2d(8, 8, 3, 1, 1, groups=8), activation, nn.Conv2d(8, 16, 1)
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.body(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    coarse = np.random.default_rng(3).integers(0, 256, (40, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2)


def float_file(net: nn.Module, folder: Path) -> Path:
    write_onnx(net.eval(), torch.randn(2, 3, 16, 16), folder / "float.onnx")
    return folder / "float.onnx"


def batches_of(pictures: np.ndarray) -> list[np.ndarray]:
    return [PRE.normalize_array(pictures[i : i + 1]) for i in range(len(pictures))]


def session(path: Path, optimised: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("activation", "between"),
    [(nn.LeakyReLU(0.1), {"QLinearLeakyRelu"}), (nn.SiLU(), {"QLinearSigmoid", "QLinearMul"})],
)
def test_onnx_runtime_quantises_what_stands_between_convolutions(
    activation: nn.Module, between: set[str], pictures: np.ndarray, tmp_path: Path
) -> None:
    """As its own optimiser sees it: all three convolutions in 8 bits, and nothing in float between them."""
    torch.manual_seed(0)
    source = float_file(Three(activation), tmp_path)
    batches = batches_of(pictures)
    quantize_file(source, tmp_path / "model.onnx", "onnxruntime", batches)
    ours = session(tmp_path / "model.onnx", tmp_path / "optimised.onnx")
    found = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert (found["QLinearConv"], found["Conv"] + found["FusedConv"]) == (3, 0)
    assert between <= set(found)
    assert not {"LeakyRelu", "Sigmoid", "Mul"} & set(found)
    expected = np.concatenate([session(source).run(None, {"images": batch})[0] for batch in batches])
    given = np.concatenate([ours.run(None, {"images": batch})[0] for batch in batches])
    error = np.abs(given - expected).max() / np.abs(expected).max()
    assert 1e-5 < error < 0.08
    assert not onnx.load(tmp_path / "model.onnx").metadata_props


def test_openvino_keeps_silu_whole(pictures: np.ndarray, tmp_path: Path) -> None:
    """Counted by hand: what goes into three convolutions, the mean and the head is quantised, nothing within SiLU."""
    import openvino as ov

    torch.manual_seed(0)
    source = float_file(Three(nn.SiLU()), tmp_path)
    quantize_file(source, tmp_path / "model.xml", "nncf", batches_of(pictures))
    model = ov.Core().read_model(tmp_path / "model.xml")
    found = Counter(op.get_type_name() for op in model.get_ops())
    assert (found["Swish"], found["Sigmoid"]) == (2, 0)
    assert found["FakeQuantize"] == 5


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("value", ["", "conv2d_1"])
def test_named_layers_stay_in_float(route: str, value: str, pictures: np.ndarray, tmp_path: Path) -> None:
    torch.manual_seed(0)
    quantize_file(
        float_file(Three(nn.LeakyReLU(0.1)), tmp_path),
        tmp_path / "model.onnx",
        route,
        batches_of(pictures[:8]),
        [value] if value else [],
    )
    graph = onnx.load(tmp_path / "model.onnx").graph
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    quantised = [
        node.output[0]
        for node in graph.node
        if node.op_type == "Conv" and all(made_by.get(name) == "DequantizeLinear" for name in node.input[:2])
    ]
    assert len(quantised) == (2 if value else 3)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("route", "format"), [*((route, "onnx") for route in ROUTES), ("nncf", "xml")])
def test_a_linear_layer_on_maps_stays_in_float_with_its_product(
    route: str, format: str, bias: bool, pictures: np.ndarray, tmp_path: Path
) -> None:
    """Its name is the sum's; the 8 bits are the product's. The other two stay in 8 bits."""
    import openvino as ov

    torch.manual_seed(0)
    target = tmp_path / f"model.{format}"
    quantize_file(float_file(OnMaps(bias), tmp_path), target, route, batches_of(pictures[:8]), ["linear_1"])
    if format == "xml":
        ops = [op for op in ov.Core().read_model(target).get_ordered_ops() if op.get_type_name() == "MatMul"]
        behind = [[op.input_value(i).get_node().get_type_name() for i in range(2)] for op in ops]
        weight = "Constant"
    else:
        graph = onnx.load(target).graph
        made_by = {name: node.op_type for node in graph.node for name in node.output}
        products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
        behind = [[made_by.get(name, "") for name in node.input[:2]] for node in products]
        weight = ""
    up, down, head = behind
    assert down == ["Gelu", weight]
    assert {up[1], head[1]} == {"Multiply" if format == "xml" else "DequantizeLinear"}


@pytest.mark.parametrize(
    ("route", "format"), [*((name, "onnx") for name, route in ROUTES.items() if not route.rescues), ("nncf", "xml")]
)
def test_a_network_without_a_layer_for_8_bits_is_refused(
    route: str, format: str, pictures: np.ndarray, tmp_path: Path
) -> None:
    """What a quantiser leaves as it is would be the float file under another name."""

    class Brightest(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.amax((2, 3))

    source, batches = float_file(Brightest(), tmp_path), batches_of(pictures[:8])
    with pytest.raises(UserError, match=f"^{route} finds nothing to quantise in this network; leave int8 out$"):
        quantize_file(source, tmp_path / f"model.{format}", route, batches)


def test_baked_preprocessing_and_probabilities_stay_in_float(pictures: np.ndarray, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {"bake": True, "preprocessing": PRE, "max_drop": 100.0, "verify_images": pictures}
    request = ExportRequest(**options, int8=True, int8_route="onnxruntime", calibration_images=pictures)
    art = export_as(Three(nn.SiLU()), tmp_path / "int8", request)
    nodes = list(onnx.load(art.model_path).graph.node)
    first = next(i for i, node in enumerate(nodes) if node.op_type == "Conv")
    steps = [node for node in nodes[:first] if node.op_type == "QuantizeLinear"]
    assert len(steps) == 1, "pixels are normalised in float, then quantised once for the first convolution"
    (last,) = [node for node in nodes if "logits" in node.output]
    assert last.op_type == "Gemm"
    assert [node.op_type for node in nodes if "logits" in node.input] == ["Softmax"]
    assert np.allclose(art(pictures).sum(axis=1), 1, atol=1e-5)
    assert art.manifest["int8"]["route"] == "onnxruntime"


def trial(artifact: Artifact, seconds: float) -> Trial:
    how = Settings(runtime=artifact.runtime, threads=1, streams=1, batch_size=1)
    return Trial(settings=how, times_s=(seconds,))


LOOKS = {"float": 1.0, "nncf": 0.9, "nncf-symmetric": 0.9, "onnxruntime": 0.5}


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds that each form takes at first sight; where this was called, in order."""
    seconds = dict(LOOKS)
    monkeypatch.setattr(
        export_module,
        "first_look",
        lambda artifact, how: seconds[artifact.folder.name.removeprefix("look-")],
    )
    return seconds


def int8(net: nn.Module, folder: Path, pictures: np.ndarray, **options: object) -> Artifact:
    keywords = {"max_drop": 100.0, "calibration_images": pictures, "verify_images": pictures} | options
    return export(net, folder, format="onnx", int8=True, preprocessing=PRE, **keywords)  # pyright: ignore[reportArgumentType]


def test_a_single_export_takes_the_fastest_route(looks: dict[str, float], pictures: np.ndarray, tmp_path: Path) -> None:
    assert routes_of("onnx") == ["nncf", "onnxruntime"]
    art = int8(Three(nn.SiLU()), tmp_path / "a", pictures)
    assert art.manifest["int8"]["route"] == "onnxruntime"
    looks["nncf"] = 0.4
    art = int8(Three(nn.SiLU()), tmp_path / "b", pictures)
    assert art.manifest["int8"]["route"] == "nncf"
    looks["nncf-symmetric"] = 0.38  # 1.05 times as fast
    assert (
        int8(Three(nn.SiLU()), tmp_path / "b", pictures, overwrite=True).manifest["int8"]["route"] == "nncf-symmetric"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert load_artifact(tmp_path / "b").precision == "int8"


def test_a_twin_ships_where_the_route_itself_can_not_be_made(
    looks: dict[str, float], pictures: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = export_module.sketch

    def sketch(net: nn.Module, folder: Path, request: ExportRequest, shared: Shared) -> Artifact:
        if request.int8_route == "nncf":
            raise UserError("nncf knows no such operator")
        return real(net, folder, request, shared)

    monkeypatch.setattr(export_module, "sketch", sketch)
    looks["nncf-symmetric"] = 0.3
    art = int8(Three(nn.SiLU()), tmp_path / "a", pictures)
    assert art.manifest["int8"]["route"] == "nncf-symmetric"


@pytest.mark.parametrize(
    ("made", "ships", "looked_at"),
    [
        (0.35, "nncf-symmetric", ["nncf-symmetric"]),  # still 1.05 times as fast as the usual one at sight, 0.4
        (0.50, "nncf", ["nncf-symmetric", "nncf-symmetric", "nncf"]),
        (0.39, "nncf-symmetric", ["nncf-symmetric", "nncf-symmetric", "nncf"]),
    ],
)
def test_symmetric_activations_with_layers_in_float_compete_again(
    made: float,
    ships: str,
    looked_at: list[str],
    pictures: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They were looked at with all layers in 8 bits."""
    seconds = {"float": 1.0, "look-nncf": 0.4, "look-nncf-symmetric": 0.3, "look-onnxruntime": 0.9, "nncf": 0.41}
    seen: list[str] = []

    def first_look(artifact: Artifact, how: Settings) -> float:
        seen.append(artifact.folder.name)
        return (seconds | {"nncf-symmetric": made})[seen[-1]]

    monkeypatch.setattr(export_module, "first_look", first_look)
    monkeypatch.setattr(export_module, "_keeps_floats", lambda made: "symmetric" in made.folder.name)
    art = int8(Three(nn.LeakyReLU(0.1)), tmp_path / "a", pictures)
    assert art.manifest["int8"]["route"] == ships
    assert seen[4:] == looked_at


@pytest.mark.parametrize(
    ("drops", "route", "quantised"),
    [
        # By the smallest and the largest value; where that loses too much, without outliers, if that loses less.
        ({"onnxruntime": 0.4}, "onnxruntime", ["onnxruntime"]),
        ({"onnxruntime": 3.0, "onnxruntime-percentile": 0.4}, "onnxruntime-percentile", None),
        ({"onnxruntime": 3.0, "onnxruntime-percentile": 4.0}, "onnxruntime", None),
    ],
)
def test_outliers_are_left_out_of_ranges_where_all_of_them_lose_too_much(
    drops: dict[str, float],
    route: str,
    quantised: list[str] | None,
    pictures: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[str] = []
    real, verify = export_module.quantize_file, export_module.verify

    def quantize(source: Path, target: Path, by: str, *others: Any, **options: Any) -> None:
        made.append(by)
        real(source, target, by, *others, **options)

    def judged(*given: Any, **options: Any) -> Verification:
        lost = drops[made[-1]] if len(made) < 3 else 0.0  # the search for layers to leave in float ends at once
        return replace(verify(*given, **options), top1_agreement=1 - lost / 100)

    monkeypatch.setattr(export_module, "quantize_file", quantize)
    monkeypatch.setattr(export_module, "verify", judged)
    request = ExportRequest(
        int8=True, int8_route="onnxruntime", calibration_images=pictures, verify_images=pictures, preprocessing=PRE,
        max_drop=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    art = export_as(Three(nn.SiLU()), tmp_path / "a", request)
    assert art.manifest["int8"]["route"] == route
    assert made[:2] == (quantised or ["onnxruntime", "onnxruntime-percentile"])


def test_percentiles_cut_an_outlier_off(pictures: np.ndarray, tmp_path: Path) -> None:
    """One value in 30,720 is 40 times as large: by the largest value the scale is that much coarser."""
    torch.manual_seed(0)
    source = float_file(Three(nn.SiLU()), tmp_path)
    batches = batches_of(pictures)
    batches[0][0, 0, 0, 0] = 80.0
    steps = {}
    for route in ("onnxruntime", "onnxruntime-percentile"):
        quantize_file(source, tmp_path / f"{route}.onnx", route, batches)
        graph = onnx.load(tmp_path / f"{route}.onnx").graph
        values = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
        (first,) = [node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "images"]
        steps[route] = float(values[first.input[1]])
    assert steps["onnxruntime"] == pytest.approx(82 / 255, rel=0.01)  # from -2 to 80
    assert steps["onnxruntime-percentile"] == pytest.approx(4 / 255, rel=0.05)  # from -2 to 2


def test_histograms_are_made_once_of_a_network_and_of_few_images(
    pictures: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that stay in float change no range; another network has its own."""
    from onnxruntime.quantization.calibrate import HistogramCalibrater

    seen: list[int] = []
    real, most = HistogramCalibrater.collect_data, 8
    monkeypatch.setattr(HistogramCalibrater, "collect_data", lambda *given: seen.append(1) or real(*given))
    monkeypatch.setattr(quantize_module, "PERCENTILE_IMAGES", most)
    quantize_module._LAST_RANGES.clear()
    torch.manual_seed(0)
    source, batches = float_file(Three(nn.LeakyReLU(0.1)), tmp_path), batches_of(pictures)
    route = "onnxruntime-percentile"
    quantize_file(source, tmp_path / "a.onnx", route, batches)
    assert len(seen) == most
    quantize_file(source, tmp_path / "b.onnx", route, batches, ["conv2d_1"])
    assert len(seen) == most
    quantize_module._LAST_RANGES.clear()
    quantize_file(source, tmp_path / "c.onnx", route, batches, ["conv2d_1"])
    assert len(seen) == 2 * most
    a, b, c = ((tmp_path / f"{name}.onnx").read_bytes() for name in "abc")
    assert (b == c, a == b) == (True, False)
    quantize_file(float_file(Three(nn.SiLU()), tmp_path), tmp_path / "d.onnx", route, batches)
    assert len(seen) == 3 * most


def test_int8_that_is_slower_than_float_is_not_written(
    looks: dict[str, float], pictures: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks |= {"nncf": 1.3, "nncf-symmetric": 1.3, "onnxruntime": 1.2}
    said = r"^artefact a is not written in INT8, which is slower than float here: 0\.8333 against 1 images/s"
    with pytest.raises(Slower, match=said):
        int8(Three(nn.SiLU()), tmp_path / "a", pictures)
    # Near float at sight, then slower in turns.
    monkeypatch.undo()
    monkeypatch.setattr(export_module, "first_look", lambda artifact, how: LOOKS["float"])
    seconds = {"int8": 1.25, "fp32": 1.0}
    monkeypatch.setattr(
        "convscale.ship.pays.in_turns",
        lambda rivals: [trial(artifact, seconds[artifact.precision]) for artifact, _ in rivals],
    )
    with pytest.raises(Slower, match=r"0\.8 against 1 images/s in onnxruntime"):
        int8(Three(nn.SiLU()), tmp_path / "a", pictures)
    assert list(tmp_path.iterdir()) == []
    seconds["int8"] = 0.9
    assert int8(Three(nn.SiLU()), tmp_path / "a", pictures).precision == "int8"


def test_int8_with_the_rest_in_bf16_is_held_against_bf16_too(
    looks: dict[str, float], pictures: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faster than float32 it may be, and slower than what ships without 8 bits."""
    monkeypatch.setattr("convscale.runtimes.openvino._has_bf16", lambda: True)
    looks |= {"bf16": 0.6, "nncf": 0.7, "nncf-symmetric": 0.7}
    options = {"max_drop": 100.0, "calibration_images": pictures, "verify_images": pictures, "preprocessing": PRE}
    with pytest.raises(Slower, match=r"slower than float here: 1\.429 against 1\.667 images/s in openvino"):
        export(Three(nn.SiLU()), tmp_path / "a", format="openvino", int8=True, bf16=True, **options)  # pyright: ignore


def test_where_the_fastest_is_withheld_the_next_is_tried(
    looks: dict[str, float], pictures: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantise, judge = export_module.quantize_file, export_module.verify
    routes: list[str] = []

    def quantize_file(source: Path, target: Path, route: str, *rest: object, **how: object) -> None:
        routes.append(route)
        quantise(source, target, route, *rest, **how)  # pyright: ignore[reportArgumentType]

    def verify(*args: object, **options: object) -> Verification:
        """What ONNX Runtime's quantiser made is wrong in every answer, whatever its ranges."""
        found = judge(*args, **options)  # pyright: ignore[reportArgumentType]
        if not routes[-1].startswith("onnxruntime"):
            return found
        return replace(found, top1_agreement=0.0, passed=False, reason="INT8 disagrees")

    monkeypatch.setattr(export_module, "quantize_file", quantize_file)
    monkeypatch.setattr(export_module, "verify", verify)
    torch.manual_seed(0)
    art = int8(Three(nn.LeakyReLU(0.1)), tmp_path / "a", pictures, max_drop=50.0)
    assert art.manifest["int8"]["route"] == "nncf"
    looks |= {"nncf": 2.0, "nncf-symmetric": 2.0}
    with pytest.raises(Withheld, match=r"artefact .*b is withheld: INT8 disagrees"):
        int8(Three(nn.LeakyReLU(0.1)), tmp_path / "b", pictures, max_drop=50.0)


def test_a_network_that_can_not_be_quantised_is_told_in_one_line(
    pictures: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object) -> None:
        raise RuntimeError("no such operator\nand more")

    for route in ROUTES.values():
        monkeypatch.setitem(route.__dict__, "quantise", fails)
    with pytest.raises(UserError, match=r"^nncf can not quantise this network: no such operator$"):
        int8(Three(nn.SiLU()), tmp_path / "a", pictures)
    assert list(tmp_path.iterdir()) == []
