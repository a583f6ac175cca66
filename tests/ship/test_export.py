"""Artefacts say what PyTorch says, and a folder is whole or not there."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from torch import nn

import convscale as cs
from convscale.artifact.artifact import Artifact, load_artifact
from convscale.errors import UserError
from convscale.formats.onnx import OPSET
from convscale.images.preprocess import Preprocessing
from convscale.machine import code_commit
from convscale.networks.pictures import Taught, keep_taught, preprocessing_of
from convscale.ship.draft import draft
from convscale.ship.export import export
from convscale.ship.request import ExportRequest
from convscale.ship.verify import Withheld
from tests.ship.conftest import Tiny, randomise


def expected(net: nn.Module, images: np.ndarray, mean: float = 0.4, std: float = 0.3) -> np.ndarray:
    """Logits by PyTorch, preprocessing written out."""
    x = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std
    with torch.no_grad():
        return net(x).numpy()


def softmax(logits: np.ndarray) -> np.ndarray:
    return torch.softmax(torch.from_numpy(logits), 1).numpy()


@pytest.mark.parametrize("format", ["onnx", "openvino", "torch"])
@pytest.mark.parametrize("bake", [False, True])
def test_outputs_at_every_batch(format: str, bake: bool, tiny: nn.Module, images: np.ndarray, tmp_path: Path) -> None:
    art = export(tiny, tmp_path / "a", format=format, bake=bake, classes=list("abcde"))
    assert art.classes == tuple("abcde")
    assert (art.format, art.baked) == (format, bake)
    for n in (1, 2, 7, 40):
        logits = expected(tiny, images[:n])
        assert np.abs(art.logits(images[:n]) - logits).max() < 1e-5 * np.abs(logits).max() + 1e-6
        probs = art(images[:n])
        assert (probs.shape, probs.dtype) == ((n, 5), np.float32)
        assert np.allclose(probs, softmax(logits), atol=1e-6)
    assert art(images[:0]).shape == (0, 5)


@pytest.mark.parametrize("bake", [False, True])
def test_several_labels_per_image(bake: bool, tiny: nn.Module, images: np.ndarray, tmp_path: Path) -> None:
    truth = np.eye(5)[np.arange(40) % 5]
    options: dict = {"verify_images": images, "verify_labels": truth, "classes": list("abcde")}
    art = export(tiny, tmp_path / "a", bake=bake, thresholds=[0.1, 0.2, 0.3, 0.4, 0.5], **options)
    assert art.thresholds == (0.1, 0.2, 0.3, 0.4, 0.5)
    assert np.allclose(art(images), 1 / (1 + np.exp(-expected(tiny, images))), atol=1e-6)
    assert art.verification is not None
    assert art.verification["accuracy_before"] == pytest.approx(art.verification["accuracy_after"])
    assert "Mean average precision before" in (art.folder / "README.md").read_text()
    with pytest.raises(UserError, match="thresholds must be 5 probabilities"):
        export(tiny, tmp_path / "b", thresholds=[0.5], **options)


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_half_stores_half_the_bytes(format: str, tmp_path: Path) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5)
    ).eval()
    pre = Preprocessing(image_size=16, mean=(0.5,) * 3, std=(0.5,) * 3)
    sizes = []
    for half in (False, True):
        art = export(net, tmp_path / str(half), format=format, half=half, preprocessing=pre)
        sizes.append(max(f["bytes"] for f in art.manifest["files"].values()))
    assert sizes[1] < 0.62 * sizes[0]
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    logits = expected(net, images, 0.5, 0.5)
    assert 0 < np.abs(art.logits(images) - logits).max() < 1e-2 * np.abs(logits).max()


def test_in_place_norm_exports(tmp_path: Path) -> None:
    """TResNet with InPlaceABN: users' oldest pain is that it does not export."""
    spec = cs.scale("tresnet_m", width=0.25, depth=0.3)
    net = randomise(cs.create_model(spec, num_classes=6), 64)
    assert any(type(module).__name__ == "InPlaceABN" for module in net.modules())
    images = np.random.default_rng(2).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    art = export(net, tmp_path / "a", image_size=64)
    logits = expected(net, images, 0.0, 1.0)
    assert np.abs(art.logits(images) - logits).max() < 1e-4 * np.abs(logits).max()
    assert art.manifest["model"] == net.spec.name
    assert art.manifest["commit"] == code_commit()
    assert cs.NetSpec.from_dict(art.manifest["spec"]) == net.spec


def test_gray_images(tmp_path: Path) -> None:
    net = randomise(Tiny(channels=1), channels=1)
    art = export(net, tmp_path / "a", bake=True)
    images = np.random.default_rng(2).integers(0, 256, (3, 32, 32, 1), dtype=np.uint8)
    assert np.allclose(art(images), softmax(expected(net, images)), atol=1e-6)


def test_onnx_file_states_its_form(onnx_art: Artifact) -> None:
    model = onnx.load(onnx_art.model_path)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", OPSET)]
    assert onnx_art.manifest["opset"] == OPSET
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert (shape[0].dim_param, shape[0].dim_value, [d.dim_value for d in shape[1:]]) == ("batch", 0, [3, 32, 32])
    assert (model.graph.input[0].name, model.graph.output[0].name) == ("images", "logits")
    assert not any(node.op_type == "BatchNormalization" for node in model.graph.node)
    assert b"site-packages" not in onnx_art.model_path.read_bytes()


def test_folder_has_everything(onnx_art: Artifact) -> None:
    names = {path.name for path in onnx_art.folder.iterdir()}
    assert names == {
        "artifact.json",
        "model.onnx",
        "classes.json",
        "preprocessing.json",
        "verification.json",
        "reference.npy",
        "reference.json",
        "README.md",
    }
    assert onnx_art.preprocessing == Preprocessing(image_size=32, mean=(0.4,) * 3, std=(0.3,) * 3, crop_pct=0.9)
    record = onnx_art.verification
    assert record is not None
    assert (record["passed"], record["n"], record["images"], record["top1_agreement"]) == (True, 40, "given", 1.0)
    card = (onnx_art.folder / "README.md").read_text()
    assert "5 classes" in card
    assert "**Licence**: not stated" in card


def test_facts_and_accuracy_reach_the_card(tiny: nn.Module, images: np.ndarray, tmp_path: Path) -> None:
    labels = expected(tiny, images).argmax(1)
    labels[:4] = (labels[:4] + 1) % 5
    art = export(
        tiny, tmp_path / "a", verify_images=images, verify_labels=labels, card={"licence": "CC0", "data": "squares"}
    )
    card = (art.folder / "README.md").read_text()
    assert "**Licence**: CC0" in card
    # 36 of 40: Wilson's interval is 76.95 to 96.04 % (by hand from the formula)
    assert "Accuracy before 90.00 % (95 % interval 76.95 to 96.04), after 90.00 %" in card


def test_it_is_silent(
    tiny: nn.Module, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        export(tiny, tmp_path / "a")
    out, err = capfd.readouterr()
    assert (out, err, caplog.text) == ("", "", "")


def test_network_keeps_its_mode_and_device(tmp_path: Path) -> None:
    net = randomise(Tiny()).train()
    export(net, tmp_path / "a")
    assert net.training


def test_existing_folder(tiny: nn.Module, tmp_path: Path) -> None:
    export(tiny, tmp_path / "a", classes=list("abcde"))
    with pytest.raises(UserError, match="exists and is not empty"):
        export(tiny, tmp_path / "a")
    art = export(tiny, tmp_path / "a", classes=list("vwxyz"), overwrite=True)
    assert art.classes == tuple("vwxyz")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_overwrite_spares_what_is_no_artefact(tiny: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds something other than an artefact"):
        export(tiny, tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_withheld_leaves_nothing_and_names_the_layer(
    tiny: nn.Module, images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import convscale.ship.draft as module

    write = module.write_model

    def damaged(net: nn.Module, example: torch.Tensor, folder: Path, *rest: object) -> None:
        write(net, example, folder, *rest)  # type: ignore[arg-type]
        model = onnx.load(folder / "model.onnx")
        second = [n for n in model.graph.node if n.op_type == "Conv"][1]
        weight = next(t for t in model.graph.initializer if t.name == second.input[1])
        weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 1.05, weight.name))
        onnx.save(model, folder / "model.onnx")

    monkeypatch.setattr(module, "write_model", damaged)
    with pytest.raises(
        Withheld, match=r"withheld: .* differ by .* relative, 0.001 is allowed; the difference starts at block\.0"
    ) as caught:
        export(tiny, tmp_path / "a", verify_images=images)
    assert not caught.value.verification.passed
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments(tiny: nn.Module, preprocessing: Preprocessing, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"format 'onx' is unknown \(nearest: onnx\)"):
        export(tiny, tmp_path / "a", format="onx")
    with pytest.raises(UserError, match="classes names 2 classes, Tiny has 5 outputs"):
        export(tiny, tmp_path / "a", classes=["cat", "dog"])
    with pytest.raises(UserError, match="image_size is 64, preprocessing says 32"):
        export(tiny, tmp_path / "a", image_size=64, preprocessing=preprocessing)
    with pytest.raises(UserError, match="the preprocessing of Flatten is not known"):
        export(nn.Flatten(), tmp_path / "a", image_size=8)
    with pytest.raises(UserError, match=r"outputs \(N, classes\), Conv2d gives \(2, 4, 30, 30\)"):
        export(nn.Conv2d(3, 4, 3), tmp_path / "a", preprocessing=preprocessing)
    with pytest.raises(UserError, match=r"can not take an input of shape \(2, 3, 30, 30\)"):
        export(timm.create_model("tresnet_m"), tmp_path / "a", image_size=30)
    assert list(tmp_path.iterdir()) == []


def test_an_operator_without_onnx_form(preprocessing: Preprocessing, tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.airy_ai(x.mean((2, 3)))

    with pytest.raises(UserError, match=r"can not be written as ONNX: .*airy"):
        export(Odd(), tmp_path / "a", preprocessing=preprocessing)
    assert list(tmp_path.iterdir()) == []


def test_runtimes_are_interchangeable(onnx_art: Artifact, tiny: nn.Module, images: np.ndarray) -> None:
    other = load_artifact(onnx_art.folder, runtime="openvino", threads=1)
    assert np.allclose(other(images), softmax(expected(tiny, images)), atol=1e-6)
    assert other.manifest == json.loads((onnx_art.folder / "artifact.json").read_text())


def test_an_artefact_knows_what_its_network_was_trained_on() -> None:
    net, request = Tiny(), ExportRequest()
    assert draft(net, request).record["data_digest"] is None
    keep_taught(net, Taught(preprocessing=preprocessing_of(net), classes=("a",), data_digest="0123456789abcdef"))
    assert draft(net, request).record["data_digest"] == "0123456789abcdef"


@pytest.mark.parametrize("own", ["a word", object(), {"kind": "mine"}, torch.zeros(2)])
def test_a_user_s_own_attribute_is_no_spec(tmp_path: Path, own: object) -> None:
    net = Tiny()
    net.spec = own  # pyright: ignore[reportAttributeAccessIssue]
    assert export(net, tmp_path / "a").manifest["spec"] is None
