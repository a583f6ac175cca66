"""Maps: exact where they claim to be, in agreement where they are not, and about the network rather than the image."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

import convscale as cs
from convscale.images.letterbox import fill_of, letterbox
from convscale.images.preprocess import Preprocessing
from convscale.learn.checkpoint import save_checkpoint
from convscale.maps.draw import overlaid
from convscale.maps.result import resized
from convscale.maps.scores import faithfulness, randomised, rank_agreement, sanity
from tests.detect.sets import small_detector

COLUMNS = 120
SIDE = 32
HOW = Preprocessing(image_size=SIDE, channels=3, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def striped(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Noise with a 12 x 12 patch of stripes somewhere: uint8 images (N, H, W, 3), whether the stripes stand, and where
    the patch is (N, H, W).
    """
    random = np.random.default_rng(seed)
    images = random.integers(96, 160, (count, SIDE, SIDE, 3), dtype=np.uint8)
    labels, where = np.arange(count) % 2, np.zeros((count, SIDE, SIDE), bool)
    wave = np.where(np.arange(12) % 4 < 2, 0, 255).astype(np.uint8)
    for row, label in enumerate(labels):
        y, x = random.integers(0, SIDE - 12, 2)
        patch = np.broadcast_to(wave[None] if label else wave[:, None], (12, 12))
        images[row, y : y + 12, x : x + 12] = patch[..., None]
        where[row, y : y + 12, x : x + 12] = True
    return images, labels, where


class Plain(nn.Module):
    """Convolutions, average pool, linear: what has an exact map, without a name that timm gives."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 12, 3, 2, 1), nn.ReLU(), nn.Conv2d(12, 24, 3, 2, 1), nn.ReLU(), nn.Conv2d(24, 24, 3, 1, 1)
        )
        self.last = nn.Linear(24, 2)
        self.num_classes = 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu_(self.body(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def learned() -> nn.Module:
    """Tells lying from standing stripes."""
    torch.manual_seed(0)
    net = Plain()
    images, labels, _ = striped(256, 0)
    x, y = HOW.normalize(torch.from_numpy(images)), torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    for step in range(150):
        some = torch.arange(32) + 32 * (step % 8)
        loss = nn.functional.cross_entropy(net(x[some]), y[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    optimizer.zero_grad()
    return net.eval()


@pytest.fixture(scope="module")
def some() -> tuple[np.ndarray, torch.Tensor, np.ndarray]:
    """Images that it has not seen: as pixels, as its input, and where their stripes are."""
    images, _, where = striped(8, 1)
    return images, HOW.normalize(torch.from_numpy(images)), where


def slim(name: str, size: int = 64) -> cs.NetSpec:
    return cs.scale(cs.get_spec(name), width=0.25, depth=0.3, image_size=size)


NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: cs.create_model(slim("resnet18"), num_classes=4),
    "tresnet": lambda: cs.create_model(slim("tresnet_m"), num_classes=4),
    "efficientnet": lambda: cs.create_model(slim("efficientnet_b0"), num_classes=4),
    "timm": lambda: timm.create_model("resnet10t", num_classes=4),
    "torchvision": lambda: torchvision.models.resnet18(num_classes=4),
}


@pytest.mark.parametrize("name", NETS)
def test_cam_sums_to_the_logit_without_its_bias(name: str) -> None:
    """In float64, for our networks, timm's and torchvision's; the classifier's bias is not 0."""
    torch.manual_seed(1)
    net = NETS[name]().double().eval()
    head = net.fc if name in ("torchvision", "timm") else net.get_classifier()
    with torch.no_grad():
        head.weight.normal_()
        head.bias.normal_()
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    maps = cs.explain(net, x, method="cam", target=[0, 3, 2])
    with torch.no_grad():
        expected = net(x)[range(3), [0, 3, 2]] - head.bias[[0, 3, 2]]
    np.testing.assert_allclose(maps.raw.sum((1, 2)), expected.numpy(), rtol=1e-12, atol=1e-12)
    assert maps.targets.tolist() == [0, 3, 2]
    assert maps.raw.shape == (3, 2, 2)
    assert maps.values.shape == (3, 64, 64)
    assert maps.values.min() == 0
    assert maps.values.max() == 1


def test_targets_default_to_the_likeliest_class(learned: nn.Module, some: tuple) -> None:
    with torch.no_grad():
        likeliest = learned(some[1]).argmax(1).tolist()
    assert cs.explain(learned, some[1]).targets.tolist() == likeliest
    assert cs.explain(learned, some[1], target=1).targets.tolist() == [1] * 8


def test_gradcam_is_what_of_cam_is_above_zero(learned: nn.Module, some: tuple) -> None:
    """Selvaraju et al. 2017, section 3.1: with a pooled linear head the two are the same, but for the ReLU."""
    pytest.importorskip("captum")
    before = learned.training
    cam, grad = (cs.explain(learned, some[1], method=method) for method in ("cam", "gradcam"))
    # captum looks at the last module's output, before the ReLU that is a function: take it from there
    with torch.no_grad():
        features = learned.body(some[1])
    gate = (features > 0).double()
    weight = learned.last.weight.detach().double()[cam.targets]
    alpha = torch.einsum("nchw,nc->nc", gate, weight) / features.shape[2] / features.shape[3] / 64
    expected = torch.einsum("nchw,nc->nhw", features.double(), alpha).relu().numpy()
    np.testing.assert_allclose(grad.raw, expected, rtol=1e-4, atol=1e-6)
    assert learned.training is before
    assert all(parameter.grad is None for parameter in learned.parameters())


def test_gradcam_equals_cam_of_ours() -> None:
    pytest.importorskip("captum")
    torch.manual_seed(0)
    net = cs.create_model(slim("resnet18"), num_classes=4).double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    cam, grad = (cs.explain(net, x, method=method, target=1) for method in ("cam", "gradcam"))
    np.testing.assert_allclose(grad.raw, np.maximum(cam.raw, 0), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("method", ["cam", "occlusion", "gradcam"])
def test_maps_find_the_stripes(learned: nn.Module, some: tuple, method: str) -> None:
    pytest.importorskip("captum")
    maps = cs.explain(learned, some[1], method=method)
    inside = np.array([value[where].mean() for value, where in zip(maps.values, some[2], strict=True)])
    outside = np.array([value[~where].mean() for value, where in zip(maps.values, some[2], strict=True)])
    assert (inside > outside + 0.15).all(), (inside, outside)


def test_occlusion_agrees_with_cam_in_rank(learned: nn.Module, some: tuple) -> None:
    cam = cs.explain(learned, some[1])
    occluded = cs.explain(learned, some[1], method="occlusion", grid=8)
    assert occluded.raw.shape == (8, 8, 8)
    same_size = np.stack([resized(one, (8, 8)) for one in cam.raw])
    assert rank_agreement(same_size, occluded.raw).mean() > 0.4


def test_occlusion_of_a_sum_is_what_was_covered() -> None:
    """A function whose output is the sum of one channel loses what stood there, less the mean colour."""
    image = np.zeros((1, 2, 8, 8), np.float32)
    image[0, 1, 2, 5] = 6.0
    maps = cs.explain(lambda x: x.sum((2, 3)), image, method="occlusion", target=1, grid=4)
    mean = 6.0 / 64
    expected = np.zeros((4, 4))
    for y in range(4):
        for x in range(4):
            rows, columns = (range(max(0, 2 * at - 1), min(8, 2 * at + 3)) for at in (y, x))
            expected[y, x] = (6.0 if 2 in rows and 5 in columns else 0.0) - mean * len(rows) * len(columns)
    np.testing.assert_allclose(maps.raw[0], expected, rtol=1e-5)


def test_deletion_and_insertion_tell_a_map_from_its_opposite(learned: nn.Module, some: tuple) -> None:
    maps = cs.explain(learned, some[1])
    good = faithfulness(learned, some[1], maps)
    bad = faithfulness(learned, some[1], replace(maps, values=1 - maps.values))
    assert good.deletion.mean() < bad.deletion.mean() - 0.1
    assert good.insertion.mean() > bad.insertion.mean() + 0.1


def test_deletion_of_a_known_curve() -> None:
    """Two pixels decide: with both the probability is sigmoid(2 x 4), with one sigmoid(4), with none one half."""

    class Sum(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            total = x.sum((1, 2, 3))
            return torch.stack([torch.zeros_like(total), total], 1)

    x = torch.full((1, 1, 1, 2), 4.0)
    maps = cs.explain(Sum(), x, method="occlusion", target=1, grid=2)
    found = faithfulness(Sum(), x, maps, steps=2)
    both, one = 1 / (1 + np.exp(-8)), 1 / (1 + np.exp(-4))
    assert found.deletion[0] == pytest.approx((both / 2 + one + 0.5 / 2) / 2, rel=1e-5)
    assert found.insertion[0] == found.deletion[0]


def test_maps_change_with_what_was_learned(learned: nn.Module, some: tuple) -> None:
    alike = sanity(learned, some[1])  # 1 for each image would be a method that shows the image alone
    assert abs(alike.mean()) < 0.4
    assert alike.max() < 0.95
    blank = randomised(learned)
    for old, new in zip(learned.parameters(), blank.parameters(), strict=True):
        assert torch.equal(old.flatten().sort().values, new.flatten().sort().values)


@pytest.fixture(scope="module")
def artefacts(learned: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, cs.Promise]:
    """The network as shipped: with its features plain and baked, and without."""
    place = tmp_path_factory.mktemp("maps")
    how = {"classes": ["lying", "standing"], "preprocessing": HOW}
    return {
        "plain": cs.export(learned, place / "plain", with_features=True, **how),
        "baked": cs.export(learned, place / "baked", with_features=True, bake=True, format="torch", **how),
        "without": cs.export(learned, place / "without", **how),
    }


@pytest.mark.parametrize("form", ["plain", "baked"])
def test_an_artefact_gives_the_networks_maps(artefacts: dict, learned: nn.Module, some: tuple, form: str) -> None:
    art = cs.load_artifact(artefacts[form].folder)
    expected, found = cs.explain(learned, some[1]), cs.explain(art, some[0])
    np.testing.assert_allclose(found.raw, expected.raw, atol=1e-5 * np.abs(expected.raw).max())
    assert found.targets.tolist() == expected.targets.tolist()
    logits = art.logits(some[0])[range(8), found.targets]
    np.testing.assert_allclose(found.raw.sum((1, 2)) + art.head.bias[found.targets], logits, atol=1e-5)
    assert art(some[0]).shape == (8, 2)


def test_occlusion_of_an_artefact_is_the_networks(artefacts: dict, learned: nn.Module, some: tuple) -> None:
    expected = cs.explain(learned, some[1][:2], method="occlusion", grid=6)
    found = cs.explain(artefacts["without"], some[0][:2], method="occlusion", grid=6)
    # the mean colour is rounded to a whole one
    np.testing.assert_allclose(found.raw, expected.raw, atol=0.05 * np.abs(expected.raw).max())


def test_a_damaged_classifier_is_refused(artefacts: dict, tmp_path: Path) -> None:
    copied = shutil.copytree(artefacts["plain"].folder, tmp_path / "copied")
    opened = cs.load_artifact(copied)
    file = copied / "classifier.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(cs.UserError, match="checksum of classifier"):
        cs.load_artifact(copied)
    with pytest.raises(cs.UserError, match=r"classifier\.safetensors is damaged"):
        opened.head  # noqa: B018


def test_what_has_no_exact_map_says_so() -> None:
    """MobileNetV3 has layers between the pool and the classifier."""
    net = cs.create_model(slim("mobilenetv3_small_100"), num_classes=3)
    with pytest.raises(cs.UserError, match=r"has no exact class activation map.*gradcam"):
        cs.explain(net, torch.randn(1, 3, 64, 64))
    with pytest.raises(cs.UserError, match="pool and a linear classifier; of this network what its classifier sees"):
        cs.export(net, "never", image_size=64, with_features=True)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), {}, r"uint8 \(1, 3, 8, 8\); a module's must be float"),
        (torch.zeros(3, 8, 8), {}, "must be float"),
        (torch.zeros(0, 3, 32, 32), {}, "no images to explain"),
        (torch.zeros(1, 3, 32, 32), {"method": "cams"}, "'cams' is unknown"),
        (torch.zeros(1, 3, 32, 32), {"target": 2}, "target is 2; it must be a class's number from 0 to 1"),
        (torch.zeros(2, 3, 32, 32), {"target": [0]}, "a list of 2, one for each image"),
        (torch.zeros(1, 3, 32, 32), {"target": "cat"}, "target is 'cat'"),
        (torch.full((1, 3, 32, 32), torch.nan), {}, "not finite"),
        (torch.zeros(1, 1, 32, 32), {"method": "occlusion"}, "can not take images of shape"),
    ],
)
def test_bad_input_is_one_line(learned: nn.Module, images: torch.Tensor, options: dict, message: str) -> None:
    with pytest.raises(cs.UserError, match=message) as caught:
        cs.explain(learned, images, **options)
    assert "\n" not in str(caught.value)


def test_an_artefact_says_what_it_lacks(artefacts: dict, some: tuple) -> None:
    with pytest.raises(cs.UserError, match="keeps no feature map; export it with --with-features"):
        cs.explain(artefacts["without"], some[0])
    with pytest.raises(cs.UserError, match="no gradients"):
        cs.explain(artefacts["plain"], some[0], method="gradcam")
    with pytest.raises(cs.UserError, match="must be a uint8 array"):
        cs.explain(artefacts["plain"], some[1].numpy())


class Backbone(nn.Module):
    out_channels = 32

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 32, 3, 2, 1), nn.ReLU())

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"0": self.body(x)}


def test_detectors_are_explained_by_their_surest_box() -> None:
    pytest.importorskip("captum")
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    torch.manual_seed(0)
    anchors = AnchorGenerator(((8,),), ((1.0,),))
    net = FCOS(Backbone(), 3, min_size=32, max_size=32, anchor_generator=anchors, score_thresh=0.0).eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        surest = [int(one["labels"][one["scores"].argmax()]) for one in net(list(x))]
    for method in ("occlusion", "gradcam"):
        maps = cs.explain(net, x, method=method, grid=4) if method == "occlusion" else cs.explain(net, x, method)
        assert maps.targets.tolist() == surest
        assert maps.values.shape == (2, 32, 32)
        assert np.isfinite(maps.raw).all()
    net.score_thresh = 1.1
    nothing = cs.explain(net, x, method="occlusion")
    assert nothing.targets.tolist() == [-1, -1]
    assert not nothing.values.any()
    with pytest.raises(cs.UserError, match="no exact class activation map"):
        cs.explain(net, x)


@pytest.mark.parametrize("head", ["fcos", "ssdlite", "faster_rcnn"])
def test_a_detectors_classes_are_its_labels(head: str) -> None:
    """All three of them, whether or not a picture shows them; 0 is none."""
    torch.manual_seed(0)
    net = small_detector(head, num_classes=3, score_threshold=0.9)
    x = torch.rand(2, 3, 64, 64)
    assert cs.explain(net, x, "occlusion", target=[1, 3], grid=2).targets.tolist() == [1, 3]
    for target in (0, 4):
        with pytest.raises(cs.UserError, match=rf"target is {target}; it must be a class's number from 1 to 3"):
            cs.explain(net, x, "occlusion", target=target, grid=2)


def test_torchvisions_ssdlite_says_its_labels() -> None:
    """Without what is ours it is torchvision's."""
    net = small_detector("ssdlite", num_classes=3, score_threshold=0.9)
    del net.detector_spec
    maps = cs.explain(net, torch.rand(1, 3, 64, 64), "occlusion", target=3, grid=2)
    assert maps.targets.tolist() == [3]
    assert not maps.values.any()


@pytest.mark.parametrize("target", [None, "red"])
def test_command_takes_a_detector(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path, target: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures are fitted into its square and not normalised; the last class is named by its label."""
    from PIL import Image

    monkeypatch.setattr("convscale.maps.files.explain", partial(cs.explain, grid=3))

    torch.manual_seed(0)
    net = small_detector(score_threshold=0.0, nms_threshold=1.0, max_detections=1000)
    with torch.no_grad():
        net.head.classification_head.cls_logits.bias[1] += 1  # pyright: ignore
    spec = net.detector_spec
    how = Preprocessing(image_size=64, channels=3, mean=spec.mean, std=spec.std, crop_pct=1.0)
    place = save_checkpoint(tmp_path / "c", net, classes=("red", "green"), preprocessing=how)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    asked = [] if target is None else ["--target", target]
    code, said, err = call(
        "explain", tmp_path / "a.png", "--model", place, "--output", tmp_path / "m", "--json", *asked
    )
    assert code == 0, err
    row = json.loads(said)["maps"][0]
    label = {None: 2, "red": 1}[target]
    assert row["target"] == ("red", "green")[label - 1]
    square = letterbox(pixels, 64, fill_of(spec.mean))
    batch = torch.from_numpy(square).permute(2, 0, 1)[None].float() / 255
    maps = cs.explain(net, batch, "occlusion", None if target is None else label, grid=3)
    assert maps.targets.tolist() == [label]
    assert maps.values.any()
    with Image.open(tmp_path / "m" / row["map"]) as drawn:
        assert np.array_equal(np.asarray(drawn), overlaid(square, maps.values[0]))


def test_command_says_what_a_detector_lacks(call: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """A picture in which it finds nothing has no class; there is no class 0."""
    from PIL import Image

    net = small_detector(score_threshold=1.0)
    how = Preprocessing(image_size=64, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3, crop_pct=1.0)
    place = save_checkpoint(tmp_path / "c", net, classes=("red", "green"), preprocessing=how)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    code, said, err = call("explain", tmp_path / "a.png", "--model", place, "--output", tmp_path / "m", "--json")
    assert code == 0, err
    assert json.loads(said)["maps"] == [
        {"path": str(tmp_path / "a.png"), "map": "00001-a.png", "method": "occlusion"},
    ]
    for target in ("0", "3", "gren"):
        code, _, err = call(
            "explain", tmp_path / "a.png", "--model", place, "--output", tmp_path / "n", "--target", target
        )
        assert (code, err.count("\n")) == (2, 1)
        assert f"target '{target}' is neither a class nor a number from 1 to 2" in err


@pytest.fixture
def photos(some: tuple, tmp_path: Path) -> Path:
    from PIL import Image

    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(2):
        Image.fromarray(some[0][number]).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def test_command(
    call: Callable[..., tuple[int, str, str]], artefacts: dict, photos: Path, some: tuple, tmp_path: Path
) -> None:
    from PIL import Image

    out = tmp_path / "maps"
    code, said, err = call("explain", photos, "--model", artefacts["plain"].folder, "--output", out)
    assert code == 0, err
    assert "2 maps by cam" in said
    rows = [json.loads(line) for line in (out / "maps.jsonl").read_text().splitlines()]
    likeliest = artefacts["plain"](some[0][:2]).argmax(1)
    assert [row.get("target") for row in rows] == [*(("lying", "standing")[at] for at in likeliest), None]
    assert "error" in rows[2]
    with Image.open(out / rows[0]["map"]) as drawn:
        assert drawn.size == (SIDE, SIDE)
        red = np.asarray(drawn).astype(int)
    values = cs.explain(artefacts["plain"], some[0][:1]).values[0]
    assert red[..., 0][values > 0.95].mean() > red[..., 2][values > 0.95].mean()
    code, _, err = call("explain", photos, "--model", artefacts["plain"].folder, "--output", out)
    assert code == 2
    assert "--overwrite" in err
    code, _, err = call(
        "explain", photos, "--model", artefacts["plain"].folder, "--output", tmp_path / "b", "--target", "lion"
    )
    assert code == 2
    assert "'lion' is neither a class" in err


def test_command_takes_a_checkpoint(call: Callable[..., tuple[int, str, str]], photos: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = cs.create_model(slim("resnet18", 32), num_classes=2)
    place = save_checkpoint(tmp_path / "c", net, classes=("a", "b"), preprocessing=HOW)
    code, said, err = call(
        "explain", photos / "0.png", "--model", place, "--output", tmp_path / "m", "--target", "1", "--json"
    )
    assert code == 0, err
    found = json.loads(said)
    assert found["maps"][0]["target"] == "b"
    assert found["maps"][0]["method"] == "cam"
