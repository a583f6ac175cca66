"""Settings of a recipe do what they say: crop scale, cutout, mixing, smoothing, average, freezing, seed."""

from __future__ import annotations

import copy
import itertools
import math
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from convscale.errors import UserError
from convscale.images.preprocess import Preprocessing
from convscale.images.sources import open_dataset
from convscale.images.splits import ArraySplit
from convscale.learn.augment import mix, resized_crop
from convscale.learn.compiling import Compiling
from convscale.learn.distributed import Processes
from convscale.learn.ema import Ema
from convscale.learn.loader import TrainLoader
from convscale.learn.loss import build_loss, distillation_loss
from convscale.learn.recipe import Recipe
from convscale.learn.schedule import lr_factor
from convscale.learn.settings import lone_pixels_learnt, told_of_lone_values
from convscale.learn.train import train
from convscale.learn.validate import validate
from tests.learn.nets import halves_data, small_net

WHOLE = Recipe(name="x", augment="resized-crop", crop_scale=1.0, flip=0.0, batch_size=4)


def _gradient(height: int, width: int) -> np.ndarray:
    """Every pixel of its own colour."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([y * 7, x * 5, y + x], axis=2).astype(np.uint8)


def test_a_crop_of_at_least_everything_is_the_picture() -> None:
    """Crops of all the area whose shape is not the picture's do not fit into it: the whole picture is what is left."""
    image = torch.from_numpy(_gradient(24, 24))
    for seed in range(20):
        assert torch.equal(resized_crop(image, 24, np.random.default_rng(seed), WHOLE), image)


def test_small_crops_are_taken_where_they_are_allowed() -> None:
    """Of crops between 4 % and all of the area half are below 52 %; shown at 24 px, neighbours then differ less."""
    image = torch.from_numpy(_gradient(24, 24))
    recipe = WHOLE.override({"crop_scale": 0.04})
    spans = []
    for seed in range(200):
        red = resized_crop(image, 24, np.random.default_rng(seed), recipe)[..., 0].float()
        green = resized_crop(image, 24, np.random.default_rng(seed), recipe)[..., 1].float()
        spans.append(float((red.max() - red.min() + 7) / (24 * 7) * (green.max() - green.min() + 5) / (24 * 5)))
    assert np.mean(np.array(spans) < 0.52) == pytest.approx(0.5, abs=0.12)
    assert min(spans) < 0.2


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_pictures_from_files_keep_the_recipes_crop_scale(tmp_path: Path, suffix: str) -> None:
    for split in ("train", "val", "test"):
        for number, name in enumerate(("a", "b")):
            (tmp_path / split / name).mkdir(parents=True)
            for twin in range(2):
                pixels = np.roll(_gradient(24, 24), 2 * number + twin, axis=0)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{twin}{suffix}", quality=100)
    data = open_dataset(tmp_path)
    for epoch in range(4):
        loader = TrainLoader(data.train, WHOLE, image_size=24, seed=3, workers=0)
        (batch,) = loader.batches(epoch)
        for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
            own = np.asarray(Image.open(data.train.paths[index]).convert("RGB"))
            assert np.abs(image.numpy().astype(int) - own).max() <= 2  # JPEG decoders differ by as much


def test_a_pictures_cutout_is_a_mid_gray_square_of_its_share() -> None:
    """Half of the shorter side: 8 of 16 x 24; its centre lies anywhere, so the border may cut it to a quarter."""
    image, recipe = torch.zeros(16, 24, 3, dtype=torch.uint8), WHOLE.override({"cutout": 0.5})
    areas = []
    for seed in range(60):
        gray = resized_crop(image, (16, 24), np.random.default_rng(seed), recipe) == 128
        assert torch.equal(gray[..., 0], gray[..., 2])
        rows, columns = gray[..., 0].any(1), gray[..., 0].any(0)
        assert torch.equal(gray[..., 0], rows[:, None] & columns)  # a rectangle
        areas.append((int(rows.sum()), int(columns.sum())))
    assert max(areas) == (8, 8)
    assert min(min(area) for area in areas) >= 4
    assert len(set(areas)) > 5
    assert not (resized_crop(image, (16, 24), np.random.default_rng(0), WHOLE) == 128).any()


def test_with_mixup_and_cutmix_either_comes_half_of_the_time_with_its_own_alpha() -> None:
    """Black and white pictures: cutmix leaves every pixel black or white, mixup none. Beta(1000, 1000) is about a half,
    and Beta(1, 1) anything.
    """
    images, targets = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)]), torch.eye(2)
    cut, shares = 0, {True: [], False: []}
    for seed in range(300):
        mixed, labels = mix(images, targets, np.random.default_rng(seed), mixup=1000.0, cutmix=1.0)
        sharp = bool(((mixed == 0) | (mixed == 1)).all())
        torch.testing.assert_close(mixed.mean((1, 2, 3)), labels[:, 1])
        cut += sharp
        shares[sharp].append(float(labels[0, 0]))
    assert 115 <= cut <= 185  # four standard errors around 150
    assert np.std(shares[False]) < 0.02
    assert np.mean(shares[False]) == pytest.approx(0.5, abs=0.01)
    assert np.std(shares[True]) > 0.15


@pytest.mark.parametrize(("several", "present", "absent"), [(False, 0.925, 0.025), (True, 0.95, 0.05)])
def test_label_smoothing_under_binary_cross_entropy_by_hand(several: bool, present: float, absent: float) -> None:
    """0.1 is spread over four classes, or for several labels over yes and no."""
    loss = build_loss(Recipe(name="x", loss="bce", label_smoothing=0.1), torch.tensor([5, 5, 5, 5]), multilabel=several)
    logits = torch.tensor([[2.0, -1.0, 0.5, 0.0]])
    labels = torch.tensor([[1.0, 0, 0, 0]]) if several else torch.tensor([0])
    expected = 0.0
    for value, target in zip((2.0, -1.0, 0.5, 0.0), (present, absent, absent, absent), strict=True):
        chance = 1 / (1 + math.exp(-value))
        expected -= (target * math.log(chance) + (1 - target) * math.log(1 - chance)) / 4
    assert loss(logits, labels).item() == pytest.approx(expected, rel=1e-6)


def test_an_average_of_every_third_step_forgets_as_fast_as_one_of_every_step() -> None:
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, 0.0)
    ema = Ema(net, 0.9)
    for _ in range(60):  # (1 + t) / (10 + t) is above 0.729 then
        ema.update(net, 3)
    nn.init.constant_(net.weight, 1.0)
    ema.update(net, 3)
    assert ema.net.weight.item() == pytest.approx(1 - 0.9**3)


def test_the_schedule_starts_when_the_frozen_layers_join() -> None:
    """Two of ten epochs with a frozen body: the rate stands at its peak, then the cosine covers the other eight."""
    recipe = Recipe(name="x", schedule="cosine", warmup_epochs=0, final_factor=0.0, freeze_epochs=2)
    assert [lr_factor(recipe, at, 10) for at in (0.0, 0.1, 0.19)] == [1.0, 1.0, 1.0]
    assert lr_factor(recipe, 0.2, 10) == pytest.approx(1.0)
    assert lr_factor(recipe, 0.4, 10) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert lr_factor(recipe, 0.6, 10) == pytest.approx(0.5)
    assert lr_factor(recipe, 1.0, 10) == pytest.approx(0.0)
    warm = recipe.override({"warmup_epochs": 4, "start_factor": 0.0})
    assert lr_factor(warm, 0.4, 10) == pytest.approx(0.5)  # two of the four epochs after the second
    stepped = recipe.override({"schedule": "step", "decay_rate": 0.1, "decay_epochs": 4})
    assert [lr_factor(stepped, at, 10) for at in (0.59, 0.6, 0.99)] == pytest.approx([1, 0.1, 0.1])


def test_what_was_given_frozen_stays_so() -> None:
    """Whether the head is trained first or not."""
    for epochs in (0, 1):
        net = small_net()
        net[0].requires_grad_(False)
        before = {name: value.clone() for name, value in net.named_parameters()}
        recipe = Recipe(name="x", epochs=3, batch_size=32, lr=0.05, augment="none", precision="fp32", layout="nchw")
        train(net, halves_data(), recipe=recipe.override({"freeze_epochs": epochs, "weight_decay": 0.1}))
        assert [name for name, value in net.named_parameters() if not value.requires_grad] == ["0.weight"]
        assert torch.equal(net[0].weight, before["0.weight"])
        assert not torch.equal(net[3].weight, before["3.weight"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError])
def test_what_a_run_that_broke_off_had_frozen_is_not_left_so(error: type[BaseException]) -> None:
    """Nor are its hooks; the next run took the frozen body for the user's wish."""
    net, teacher = small_net(), small_net()
    net[1].requires_grad_(False)

    def progress(event: dict[str, object]) -> None:
        if event["kind"] == "step":
            assert not net[0].weight.requires_grad
            raise error("x")

    recipe = Recipe(name="x", epochs=3, batch_size=32, freeze_epochs=1, augment="none", precision="fp32", layout="nchw")
    recipe = recipe.override({"distill_features": 1.0})
    with pytest.raises(error):
        train(net, halves_data(), recipe=recipe, teacher=teacher, progress=progress)  # type: ignore[arg-type]
    assert [name for name, value in net.named_parameters() if not value.requires_grad] == ["1.weight", "1.bias"]
    assert not any(module._forward_pre_hooks for module in (*net.modules(), *teacher.modules()))


@pytest.mark.parametrize("per_epoch", [3, 48])  # many epochs of few steps; half of one, of many
def test_sizes_and_freezing_follow_the_time_that_ends_a_run(monkeypatch: pytest.MonkeyPatch, per_epoch: int) -> None:
    """Frozen for a fifth of the epochs is a fifth of the time; sizes grow from 0.6 x 12 px to three quarters of it.

    By a clock of which each look takes a millisecond.
    """
    looks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(looks) / 1000)
    seen: list[tuple[int, bool]] = []
    told: list[object] = []  # by which compile=auto knows that steps are of another kind
    monkeypatch.setattr(Compiling, "after", lambda self, trainer, *_: (told.append(trainer.graph), 0.0)[1])

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small_net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                seen.append((x.shape[-1], not self.body[0].weight.requires_grad))
            return self.body(x)

    recipe = Recipe(name="x", batch_size=96 // per_epoch, augment="none", precision="fp32", layout="nchw")
    recipe = recipe.override({"freeze_epochs": 2000, "epochs": 10_000, "progressive": 0.6, "ema_decay": 0.0})
    train(Watched(), halves_data(), recipe=recipe, max_seconds=0.9 if per_epoch == 3 else 0.15)
    assert told == seen
    frozen = [still for _, still in seen]
    assert frozen == sorted(frozen, reverse=True)
    assert 0.1 < sum(frozen) / len(frozen) < 0.35
    sizes = [size for size, _ in seen]
    assert sizes[0] == 8
    assert sizes == sorted(sizes)
    assert len(sizes) < per_epoch if per_epoch == 48 else sizes[-1] == 12


def test_frozen_layers_stand_still_for_their_epochs_and_no_longer() -> None:
    torch.manual_seed(5)
    net = small_net()
    bodies, heads = [net[0].weight.detach().clone()], [net[9].weight.detach().clone()]
    statistics = [net[1].running_mean.clone()]

    def progress(event: dict[str, object]) -> None:
        if event["kind"] == "epoch":
            bodies.append(net[0].weight.detach().clone())
            heads.append(net[9].weight.detach().clone())
            statistics.append(net[1].running_mean.clone())

    recipe = Recipe(
        name="x", epochs=3, batch_size=32, lr=0.05, freeze_epochs=2, augment="none", precision="fp32", layout="nchw"
    )
    train(net, halves_data(), recipe=recipe, progress=progress)  # type: ignore[arg-type]
    still = [torch.equal(a, b) for a, b in pairwise(bodies)]
    assert still == [True, True, False]
    assert [torch.equal(a, b) for a, b in pairwise(statistics)] == [True, True, False]
    assert [torch.equal(a, b) for a, b in pairwise(heads)] == [False, False, False]


def test_a_resumed_run_keeps_its_seed(tmp_path: Path) -> None:
    recipe = Recipe(name="x", epochs=1, batch_size=32, augment="none", precision="fp32", layout="nchw")
    train(small_net(), halves_data(), recipe=recipe, seed=3, output=tmp_path / "run")
    before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    with pytest.raises(UserError, match=r"run was trained with seed 3, not 4; a resumed run keeps its seed"):
        train(small_net(), halves_data(), recipe=recipe, epochs=2, seed=4, output=tmp_path / "run", resume=True)
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == before
    resumed = train(small_net(), halves_data(), recipe=recipe, epochs=2, seed=3, output=tmp_path / "run", resume=True)
    assert [row["epoch"] for row in resumed.history] == [1, 2]


def test_a_run_tells_its_average_how_many_steps_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps of an epoch, two epochs: the average follows after every second one."""
    told: list[int] = []
    update = Ema.update
    monkeypatch.setattr(Ema, "update", lambda self, net, steps=1: (told.append(steps), update(self, net, steps))[1])
    recipe = Recipe(name="x", epochs=2, batch_size=32, ema_decay=0.9, ema_every=2, augment="none")
    train(small_net(), halves_data(), recipe=recipe.override({"precision": "fp32", "layout": "nchw"}))
    assert told == [2, 2, 2]


@pytest.mark.parametrize("layout", ["nchw", "auto"])  # in the run itself, and where a layout is measured before it
def test_a_batch_of_one_behind_a_pool_is_told_in_one_line(layout: str) -> None:
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(1, 3))
    recipe = Recipe(name="x", epochs=1, batch_size=1, augment="none", precision="fp32", layout=layout)
    with pytest.raises(UserError, match=r"^a batch of 1 leaves a norm with one value per channel.*use batch_size 2"):
        train(net, halves_data(2), recipe=recipe)
    run = train(net, halves_data(2), recipe=recipe.override({"keep_statistics": True}))
    assert len(run.history) == 1


def test_other_errors_of_a_network_stay_as_they_are() -> None:
    with pytest.raises(ValueError, match="of its own"), told_of_lone_values():
        raise ValueError("of its own")


def test_distillation_by_hand() -> None:
    """Two images, temperature 2: the Kullback-Leibler divergence of the halved logits, mean over images, times 4."""
    student, teacher = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 2.0], [0.0, 4.0]])

    def share(first: float, second: float) -> tuple[float, float]:
        total = math.exp(first) + math.exp(second)
        return math.exp(first) / total, math.exp(second) / total

    expected = 0.0
    for mine, wanted in (((1.0, 0.0), (0.0, 1.0)), ((0.0, 0.0), (0.0, 2.0))):
        expected += sum(q * math.log(q / p) for p, q in zip(share(*mine), share(*wanted), strict=True)) * 4 / 2
    assert distillation_loss(student, teacher, temperature=2.0).item() == pytest.approx(expected, rel=1e-6)


def test_validation_by_hand() -> None:
    """A network whose logits are the pixels: of four images two are right, and one is wrong on either side."""
    pixels = torch.tensor([[[9, 0, 0]], [[0, 9, 0]], [[0, 0, 9]], [[9, 0, 0]]], dtype=torch.uint8)[:, :, None]
    split = ArraySplit(
        split="validation", classes=("a", "b", "c"), labels=torch.tensor([0, 1, 0, 2]), channels=3, pixels=pixels
    )
    plain = Preprocessing(image_size=1, mean=(0.0,) * 3, std=(1 / 255,) * 3, crop_pct=1.0)
    made = validate(
        nn.Flatten(), split, plain, processes=Processes(), device=torch.device("cpu"), precision="fp32", workers=0
    )
    right, wrong = math.log(1 + 2 * math.exp(-9)), math.log(math.exp(9) + 2)
    assert made.top1 == made.metric == 0.5
    assert made.loss == pytest.approx((2 * right + 2 * wrong) / 4, rel=1e-6)


@pytest.mark.parametrize(("kernel", "padding", "side"), [(3, 1, 1), (5, 2, 1), (3, 1, 2)])
def test_a_strided_convolution_over_one_pixel_learns_what_it_should(kernel: int, padding: int, side: int) -> None:
    """PyTorch's own gradient in bfloat16 is what lies in memory, so it is filled with what must not come back."""
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 64, kernel, stride=2, padding=padding, bias=False)
    pixels = torch.randn(6, 64, side, side)
    whole = copy.deepcopy(conv).double()
    whole(pixels.bfloat16().double()).sum().backward()
    right = whole.weight.grad
    assert right is not None
    with lone_pixels_learnt(conv, "bf16", torch.device("cpu")):
        for _ in range(40):
            conv.weight.grad = None
            for count in (5_000, 36_864, 73_728):
                torch.full((count,), math.nan, dtype=torch.bfloat16)
            with torch.autocast("cpu", torch.bfloat16):
                made = conv(pixels)
            made.float().sum().backward()
            torch.testing.assert_close(conv.weight.grad.double(), right, atol=0.05, rtol=0.02)
    with torch.no_grad():
        torch.testing.assert_close(made.double(), whole(pixels.double()), atol=0.05, rtol=0.02)
    assert not conv._forward_hooks
