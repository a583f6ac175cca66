"""Detectors are built over any backbone, and are torchvision's."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights as FasterWeights
from torchvision.models.detection import FCOS_ResNet50_FPN_Weights as FcosWeights
from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights as RetinaWeights
from torchvision.models.detection.fcos import FCOS
from torchvision.ops import batched_nms

import convscale as cs
from convscale.artifact.boxes import suppress
from convscale.choice.detector_speed import _files, measure_detector, predict_detector
from convscale.nn.detector_graph import DetectorGraph
from convscale.nn.detectors import HEADS
from convscale.nn.norm import BatchNormAct, convert_sync
from tests.detect.sets import small_detector, small_spec

NORMS = 53_120
"""Weights and biases of ResNet-50's batch norms, which torchvision's frozen ones do not count as parameters."""


@pytest.mark.parametrize(
    ("head", "classes", "weights"),
    [("fcos", 91, FcosWeights), ("retinanet", 91, RetinaWeights), ("faster_rcnn", 90, FasterWeights)],
)
def test_parameters_are_those_that_torchvision_publishes(head: str, classes: int, weights: type) -> None:
    """FCOS and RetinaNet of torchvision have an output for the background that they never learn; ours have none."""
    with torch.device("meta"):
        detector = cs.create_detector("resnet50", head=head, num_classes=classes, image_size=256)
    count = sum(parameter.numel() for parameter in detector.parameters())
    assert count == weights.COCO_V1.meta["num_params"] + NORMS  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    "head", ["retinanet", *(pytest.param(h, marks=pytest.mark.slow) for h in ("fcos",)), *HEADS[2:]]
)
def test_a_detector_is_called_as_torchvisions_are(head: str) -> None:
    detector = small_detector(head)
    images = [torch.rand(3, 50, 70), torch.rand(3, 64, 64)]
    targets = [
        {"boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]]), "labels": torch.tensor([2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)},  # background alone
    ]
    losses = detector(images, targets)
    total = sum(losses.values())
    assert torch.isfinite(total)
    assert total > 0
    total.backward()
    first = next(detector.backbone.body.parameters())  # pyright: ignore
    assert first.grad is not None
    assert first.grad.abs().sum() > 0
    with torch.no_grad():
        answers = detector.eval()(images)
    assert [sorted(each) for each in answers] == [["boxes", "labels", "scores"]] * 2
    for answer, image in zip(answers, images, strict=True):
        assert len(answer["labels"]) == 0 or (answer["labels"].min() >= 1 and answer["labels"].max() <= 2)
        assert len(answer["boxes"]) == 0 or (
            answer["boxes"].min() >= 0 and answer["boxes"][:, 2].max() <= image.shape[2]
        )


def test_the_head_is_torchvisions_own() -> None:
    """The same weights in a plain FCOS of torchvision with a class more give the same boxes, labels one less."""
    detector = small_detector("fcos").eval()
    with torch.no_grad():
        detector.head.classification_head.cls_logits.bias += 3  # pyright: ignore
    plain = FCOS(
        detector.backbone,  # pyright: ignore
        2,
        min_size=64,
        max_size=64,
        image_mean=list(detector.detector_spec.mean),
        image_std=list(detector.detector_spec.std),
        anchor_generator=detector.anchor_generator,  # pyright: ignore
        head=detector.head,  # pyright: ignore
        score_thresh=0.05,
        size_divisible=64,
    ).eval()
    image = [torch.rand(3, 64, 64)]
    with torch.no_grad():
        ours, theirs = detector(image)[0], plain(image)[0]
    assert len(ours["boxes"]) > 10
    assert torch.equal(ours["boxes"], theirs["boxes"])
    assert torch.equal(ours["labels"], theirs["labels"] + 1)


@pytest.mark.parametrize("head", ["fcos", "retinanet", "ssdlite"])
def test_the_graph_for_export_gives_the_detectors_own_boxes(head: str) -> None:
    """For a whole batch at once what torchvision does picture by picture, bit for bit."""
    torch.manual_seed(1)
    detector = small_detector(head).eval()
    for name, parameter in detector.head.named_parameters():  # pyright: ignore
        if parameter.ndim == 1 and "cls" in name:
            parameter.data += 2.0  # untrained scores are too low to be boxes
    spec = detector.detector_spec
    images = torch.rand(3, 3, 64, 64)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (spec.mean, spec.std))
    with torch.no_grad():
        expected = detector(images)
        boxes, scores, labels = DetectorGraph(detector).eval()((images - mean) / std)
    assert spec.score_threshold is not None
    assert spec.nms_threshold is not None
    assert spec.max_detections is not None
    for at, each in enumerate(expected):
        sure = scores[at] > spec.score_threshold
        some = boxes[at][sure], scores[at][sure], labels[at][sure]
        kept = suppress(*(part.numpy() for part in some), spec.nms_threshold, spec.max_detections)
        assert len(each["boxes"]) > 10
        assert torch.equal(some[0][kept], each["boxes"])
        assert torch.equal(some[2][kept], each["labels"])


def test_suppression_is_torchvisions() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(300, 2, generator=generator) * 80
    boxes = torch.cat([corners, corners + 5 + torch.rand(300, 2, generator=generator) * 30], 1)
    scores, labels = torch.rand(300, generator=generator), torch.randint(1, 4, (300,), generator=generator)
    expected = batched_nms(boxes, scores, labels, 0.5)[:60]
    assert suppress(boxes.numpy(), scores.numpy(), labels.numpy(), 0.5, 60).tolist() == expected.tolist()


def test_a_detector_is_a_value() -> None:
    detector = small_detector("retinanet", norm="frozen", anchor_scale=3.0)
    told = json.loads(json.dumps(detector.detector_spec.to_dict()))
    spec = cs.DetectorSpec.from_dict(told)
    assert spec == detector.detector_spec
    torch.manual_seed(3)
    first = cs.create_detector(spec)
    torch.manual_seed(3)
    second = cs.create_detector(spec)
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    sides = first.anchor_generator.sizes[0]  # pyright: ignore
    assert sides == pytest.approx((24.0, 24 * 2 ** (1 / 3), 24 * 2 ** (2 / 3)))  # three times the stride of 8


def test_frozen_parts_do_not_learn_and_keep_their_statistics() -> None:
    detector = small_detector("fcos", norm="frozen", frozen_stages=2).train()
    body = detector.backbone.body  # pyright: ignore
    assert not any(parameter.requires_grad for parameter in body.stem.parameters())
    assert not any(parameter.requires_grad for parameter in body.stages[0].parameters())
    assert any(parameter.requires_grad for parameter in body.stages[3].parameters())
    before = {name: value.clone() for name, value in body.named_buffers()}
    target = {"boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    detector([torch.rand(3, 64, 64)], [target])
    assert all(torch.equal(value, before[name]) for name, value in body.named_buffers())


def test_frozen_norms_stay_frozen_when_processes_share_their_statistics() -> None:
    """Over several processes bare batch norms, timm's and torchvision's for instance, are replaced after the detector
    was built."""

    class Body(torch.nn.Module):
        """Maps at strides 8, 16 and 32."""

        feature_info = SimpleNamespace(channels=lambda: [8, 8, 8], reduction=lambda: [8, 16, 32])

        def __init__(self) -> None:
            super().__init__()
            parts = [(3, 4), (8, 2), (8, 2), (8, 2)]
            self.stem, *stages = (
                torch.nn.Sequential(torch.nn.Conv2d(channels, 8, 3, stride, 1), torch.nn.BatchNorm2d(8))
                for channels, stride in parts
            )
            self.stages = torch.nn.ModuleList(stages)

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            maps = [self.stem(x)]
            for stage in self.stages:
                maps.append(stage(maps[-1]))
            return maps[1:]

    options = {"num_classes": 1, "image_size": 64, "neck_width": 64, "head_depth": 1, "frozen_stages": 1}
    detector = cs.create_detector(Body(), head="fcos", norm="frozen", **options)  # pyright: ignore
    detector.backbone = convert_sync(detector.backbone)
    detector.train()
    body = detector.backbone.body  # pyright: ignore
    norms = [module for module in body.modules() if hasattr(module, "running_mean")]
    assert len(norms) == 1 + len(body.stages)
    assert all(isinstance(norm, BatchNormAct) for norm in norms)
    assert not any(norm.training for norm in norms)
    assert not any(parameter.requires_grad for norm in norms for parameter in norm.parameters())
    assert not body.stem[0].training
    assert all(stage[0].training and stage[0].weight.requires_grad for stage in body.stages)
    before = {name: value.clone() for name, value in body.named_buffers()}
    target = {"boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    detector([torch.rand(3, 64, 64)], [target])
    assert all(torch.equal(value, before[name]) for name, value in body.named_buffers())


def test_timms_networks_are_backbones_too() -> None:
    pytest.importorskip("timm")
    detector = cs.create_detector("timm/mobilenetv2_035", head="ssdlite", num_classes=3, image_size=64)
    assert detector.backbone.strides == [16, 32]  # pyright: ignore
    with torch.no_grad():
        assert len(detector.eval()([torch.rand(3, 64, 64)])[0]["boxes"]) > 0


@pytest.mark.parametrize(
    ("name", "stages", "frozen", "learning"),
    [
        ("resnet18", 1, ["conv1", "bn1"], ["layer1"]),
        ("resnet18", 2, ["conv1", "bn1", "layer1"], ["layer2", "layer3"]),
        ("mobilenetv2_035", 2, ["conv_stem", "blocks.0", "blocks.1"], ["blocks.2", "blocks.3"]),
        ("convnext_atto", 1, ["stem_0", "stem_1", "stages_0"], ["stages_1"]),
        ("densenet121", 2, ["features_conv0", "features_denseblock1"], ["features_transition1"]),
    ],
)
def test_frozen_stages_of_timms_networks_end_at_their_maps(
    name: str, stages: int, frozen: list[str], learning: list[str]
) -> None:
    """Their first children are single layers: two of ResNet's froze its first convolution and norm."""
    pytest.importorskip("timm")
    with torch.device("meta"):
        detector = cs.create_detector(f"timm/{name}", num_classes=1, image_size=64, frozen_stages=stages)
    body = detector.backbone.body  # pyright: ignore
    for part, learns in ((frozen, False), (learning, True)):
        for each in part:
            told = {parameter.requires_grad for parameter in body.get_submodule(each).parameters()}
            assert told == {learns}, each
    with pytest.raises(cs.UserError, match=r"frozen_stages is 6; the backbone has \d maps, and the last must learn"):
        cs.create_detector(f"timm/{name}", num_classes=1, image_size=64, frozen_stages=6)


def test_a_module_of_ones_own_is_a_backbone() -> None:
    body = cs.create_model(small_spec(), features_only=True)
    detector = cs.create_detector(body, head="fcos", num_classes=1, image_size=64, neck_width=64, head_depth=1)
    assert detector.backbone.strides == [8, 16, 32]  # pyright: ignore


def test_weights_of_a_function_of_ones_own_are_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody but the function could load them."""
    body = 'cs.create_model(cs.scale("resnet18", width=0.125, depth=0.5), features_only=True)'
    (tmp_path / "own_backbones.py").write_text(f"import convscale as cs\n\n\ndef make():\n    return {body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    given = {"num_classes": 2, "image_size": 64, "neck_width": 64, "head_depth": 1}
    assert cs.create_detector("own_backbones:make", **given).backbone.strides == [8, 16, 32]  # pyright: ignore
    said = "pretrained_backbone is True; own_backbones:make is a function of your own: let it load its weights itself"
    with pytest.raises(cs.UserError, match=said):
        cs.create_detector("own_backbones:make", pretrained_backbone=True, **given)  # pyright: ignore


@pytest.mark.parametrize(
    ("backbone", "options", "said"),
    [
        ("resnet18", {"head": "yolo"}, r"head 'yolo' is unknown"),
        ("resnet18", {"image_size": 100}, r"image_size is 100; a detector's must be a multiple of 32"),
        ("resnet18", {"num_classes": 0}, r"num_classes is 0; it must be a whole number of at least 1"),
        ("resnet18", {"num_classes": None}, r"num_classes is missing"),
        ("resnet18", {"norm": "group"}, r"norm is 'group'; it must be None, 'inplace', 'batchnorm' or 'frozen'"),
        ("resnet18", {"neck": 3}, r"no option 'neck'"),
        ("resnet18", {"neck_width": 48}, r"neck_width is 48; with head fcos it must be a multiple of 32"),
        ("poolnet", {}, r"backbone poolnet has maps at strides .*; head fcos stands on those at 8, 16, 32"),
        ("resnet81", {}, r"unknown model 'resnet81'"),
        (3, {}, r"backbone is a int; it must be a name"),
        (torch.nn.Identity(), {}, r"Identity is no backbone: it has no feature_info"),
    ],
)
def test_what_can_not_be_built_is_told(backbone: object, options: dict[str, object], said: str) -> None:
    given: dict[str, object] = {"num_classes": 2, **options}
    with pytest.raises(cs.UserError, match=said):
        cs.create_detector(backbone, **given)  # pyright: ignore


@pytest.mark.parametrize(
    ("boxes", "labels", "said"),
    [
        ([[40.0, 5.0, 10.0, 40.0]], [1], r"has the box \[40.0, 5.0, 10.0, 40.0\]; it must have x1 < x2"),
        ([[5.0, 5.0, 10.0, 40.0]], [3], r"has labels 3 to 3; they must be 1 to 2"),
        ([[5.0, 5.0, 10.0, 40.0]], [0], r"has labels 0 to 0; they must be 1 to 2"),
        ([[5.0, 5.0, 10.0, 40.0]], [1, 1], r"must be a tensor of 1 labels"),
    ],
)
def test_targets_that_are_none_are_told(boxes: list[list[float]], labels: list[int], said: str) -> None:
    target = {"boxes": torch.tensor(boxes), "labels": torch.tensor(labels)}
    with pytest.raises(cs.UserError, match=said):
        small_detector()([torch.rand(3, 64, 64)], [target])
    with pytest.raises(cs.UserError, match="needs targets"):
        small_detector()([torch.rand(3, 64, 64)])


def test_a_spec_from_outside_is_checked() -> None:
    told = small_detector().detector_spec.to_dict()
    with pytest.raises(cs.UserError, match="has no key 'width'"):
        cs.DetectorSpec.from_dict({**told, "width": 3})
    with pytest.raises(cs.UserError, match="lacks backbone"):
        cs.DetectorSpec.from_dict({"num_classes": 3})
    with pytest.raises(cs.UserError, match="score_threshold is 2"):
        cs.DetectorSpec.from_dict({**told, "score_threshold": 2})


def test_one_image_alone_has_no_statistics_of_a_last_pixel() -> None:
    detector = cs.create_detector("mobilenetv2_035", head="ssdlite", num_classes=3, image_size=64)
    image, target = (
        torch.rand(3, 64, 64),
        {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])},
    )
    with pytest.raises(cs.UserError, match="no statistics of one image: train with batches of at least 2"):
        detector([image], [target])
    assert set(detector([image] * 2, [target] * 2)) == {"bbox_regression", "classification"}
    assert len(detector.eval()([image])) == 1


def test_its_speed_is_asked_of_a_copy() -> None:
    """Both put a trained detector into evaluation mode, and a measurement took it off its device."""
    detector = small_detector("fcos").train()
    detector.backbone.body.eval()  # pyright: ignore
    parts = {name: id(part) for name, part in detector.named_modules()}
    modes = {name: part.training for name, part in detector.named_modules()}
    predict_detector(detector, cs.Conditions(device="rtx-4090", batch_size=2))
    cond = cs.Conditions(device="cpu", runtime="onnxruntime", batch_size=1)
    measure_detector(detector, cond, min_seconds=0.01, max_seconds=0.02)
    assert {name: part.training for name, part in detector.named_modules()} == modes
    assert {name: id(part) for name, part in detector.named_modules()} == parts


@pytest.mark.parametrize("head", ["fcos", "retinanet", "ssdlite"])
def test_measured_suppression_has_something_to_suppress(head: str, tmp_path: Path) -> None:
    """RetinaNet starts at a probability of 0.01, below its threshold of 0.05: what was measured was of no box."""
    import onnxruntime

    torch.manual_seed(0)
    detector = small_detector(head).eval()
    path = _files(DetectorGraph(detector), detector, tmp_path)["nms"]
    session = onnxruntime.InferenceSession(path)
    noise = np.random.default_rng(0).normal(size=(2, 3, 64, 64)).astype(np.float32)
    (rows,) = session.run(None, {session.get_inputs()[0].name: noise})
    assert ((rows[:, :, 4] > 0).sum(1) > 10).all()  # pyright: ignore
