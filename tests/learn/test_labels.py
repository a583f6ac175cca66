"""Several labels: losses against torchvision and arithmetic by hand, labels that are not known, thresholds and
temperatures.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

import convscale as cs
from convscale.errors import UserError
from convscale.images.preprocess import Preprocessing
from convscale.images.splits import ArraySplit, DataSplits
from convscale.learn.checkpoint import load_checkpoint
from convscale.learn.evaluate import best_temperatures, best_thresholds, binary_calibration_error
from convscale.learn.inputs import network_inputs
from convscale.learn.loader import Batch
from convscale.learn.loss import asymmetric_loss, build_loss, focal_loss, partial_bce, two_way_loss, zlpr_loss
from convscale.learn.recipe import Recipe
from convscale.learn.recipes import get_recipe
from convscale.learn.schedule import lr_factor
from convscale.stats import average_precisions
from tests.learn.nets import small_net

NAN = math.nan


def some(count: int = 6, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, classes, generator=generator, dtype=torch.float64)
    return logits, (torch.rand(count, classes, generator=generator) > 0.6).double()


def test_focal_loss_is_torchvisions() -> None:
    logits, targets = some()
    expected = sigmoid_focal_loss(logits, targets, alpha=0.25, gamma=2, reduction="none").sum(1).mean()
    torch.testing.assert_close(focal_loss(logits, targets), expected)


def test_unknown_labels_that_are_taken_as_absent_leave_mixed_ones_as_they_are() -> None:
    labels = torch.tensor([[1.0, NAN], [NAN, 0.0]])
    recipe = Recipe(name="x", mixup=1.0, loss="bce", partial="negative")
    job: Any = SimpleNamespace(
        recipe=recipe,
        seed=0,
        device=torch.device("cpu"),
        settings=SimpleNamespace(layout="nchw"),
        loader=SimpleNamespace(rank=0, split=SimpleNamespace(classes=("a", "b"))),
        preprocessing=Preprocessing(image_size=4, channels=1, mean=(0.5,), std=(0.25,), crop_pct=1.0),
    )
    batch = Batch(images=torch.zeros(2, 4, 4, 1, dtype=torch.uint8), labels=labels, indices=torch.arange(2))
    for step in range(4):
        _, mixed = network_inputs(job, batch, 0, step)
        share = mixed[0, 0].item()
        assert 0 < share < 1
        torch.testing.assert_close(mixed, torch.tensor([[share, 0], [1 - share, 0]]))
    assert labels.isnan().sum() == 2  # the split's own
    job.recipe = recipe.override({"partial": "ignore"})
    assert network_inputs(job, batch, 0, 0)[1].isnan().all()


def test_zlpr_by_hand() -> None:
    """log(1 + e^-1) + log(1 + e^0.5 + e^-2) of logits 1 (present), 0.5 and -2 (absent)."""
    logits, targets = torch.tensor([[1.0, 0.5, -2.0]]), torch.tensor([[1.0, 0, 0]])
    expected = math.log(1 + math.exp(-1)) + math.log(1 + math.exp(0.5) + math.exp(-2))
    assert zlpr_loss(logits, targets).item() == pytest.approx(expected, rel=1e-6)
    nothing = math.log(1 + math.exp(1) + math.exp(0.5) + math.exp(-2))
    assert zlpr_loss(logits, 0 * targets).item() == pytest.approx(nothing, rel=1e-6)


def test_two_way_by_hand() -> None:
    """Two images, two classes; temperatures 4 for what is present and 1 for what is not. Of each image and class that
    has something: softplus(log sum exp(absent) + 4 log sum exp(-present / 4)).
    """
    logits = torch.tensor([[2.0, -1.0], [0.5, 3.0]], dtype=torch.float64)
    targets = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    softplus = lambda x: math.log(1 + math.exp(x))  # noqa: E731
    image = softplus(-1.0 - 2.0)  # image 0: absent -1, present 2; image 1 has nothing
    column = softplus(0.5 - 2.0)  # class 0: absent 0.5, present 2; class 1 is nowhere
    assert two_way_loss(logits, targets).item() == pytest.approx(image + column, rel=1e-12)
    both = torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    first = 0.0  # nothing is absent from image 0: softplus of a very low number
    second = softplus(3.0 - 0.5)
    class_1 = softplus(3.0 + 1.0)
    expected = (first + second) / 2 + (0.0 + class_1) / 2
    assert two_way_loss(logits, both).item() == pytest.approx(expected, rel=1e-12)


def test_asymmetric_loss_without_a_gradient_through_its_weights() -> None:
    """As the authors' script: the same value, and the gradient of a weighted cross-entropy."""
    logits, targets = some()
    logits.requires_grad_()
    options = {"negative": 4.0, "positive": 1.0, "margin": 0.05}
    value = asymmetric_loss(logits, targets, detach=True, **options)
    assert value.item() == asymmetric_loss(logits, targets, **options).item()
    (grad,) = torch.autograd.grad(value, logits)
    p = logits.detach().sigmoid()
    q = (p - 0.05).clamp(min=0)
    present = -(1 - p) * (1 - p)  # (1 - p)^1 times the slope of -log p
    absent = q**4 * p * (1 - p) / (1 - q) * (q > 0)
    expected = torch.where(targets > 0, present, absent) / len(logits)
    torch.testing.assert_close(grad, expected)


LOSSES = {
    "asymmetric": asymmetric_loss,
    "focal": focal_loss,
    "zlpr": zlpr_loss,
    "two-way": two_way_loss,
    "bce": lambda logits, targets: partial_bce(logits, targets) * targets.shape[1],
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_class_that_is_never_known_counts_for_nothing(name: str) -> None:
    logits, targets = some()
    whole = torch.cat([logits, 3 * torch.ones(len(logits), 1, dtype=torch.float64)], 1)
    unknown = torch.cat([targets, torch.full((len(logits), 1), NAN, dtype=torch.float64)], 1)
    factor = 6 / 5 if name == "bce" else 1  # a mean over what is known, scaled by all here
    assert LOSSES[name](whole, unknown).item() == pytest.approx(LOSSES[name](logits, targets).item() * factor)


def test_a_recipe_says_what_is_not_known() -> None:
    logits, targets = torch.zeros(1, 2), torch.tensor([[1.0, NAN]])
    counts = torch.tensor([1, 1])
    ignored = build_loss(Recipe(name="x", loss="bce", label_smoothing=0), counts, multilabel=True)
    absent = build_loss(Recipe(name="x", loss="zlpr", partial="negative"), counts, multilabel=True)
    assert ignored(logits, targets).item() == pytest.approx(math.log(2))
    assert absent(logits, targets).item() == pytest.approx(2 * math.log(2))


def test_average_precision_leaves_out_what_is_not_known() -> None:
    """Of three known images the present ones stand first and third: (1 + 2 / 3) / 2."""
    logits = np.array([[3.0], [2.5], [2.0], [1.0]])
    truth = np.array([[1.0], [NAN], [0.0], [1.0]])
    assert average_precisions(logits, truth)[0] == pytest.approx((1 + 2 / 3) / 2)


def test_thresholds_by_f_beta() -> None:
    """Probabilities .9 (right), .8 (wrong), .7 (wrong), .6 (right): F1 is 2/3 at the first and at all four, F2 is
    highest with all, F0.5 with the first alone.
    """
    logits = torch.tensor([0.9, 0.8, 0.7, 0.6, NAN], dtype=torch.float64).logit().nan_to_num()[:, None]
    labels = torch.tensor([[1.0], [0.0], [0.0], [1.0], [NAN]])
    assert best_thresholds(logits, labels, beta=2.0)[0] == pytest.approx(0.3)
    assert best_thresholds(logits, labels, beta=0.5)[0] == pytest.approx(0.85)


def test_temperatures_undo_a_known_scale() -> None:
    """Labels are drawn by probabilities whose logits were then taken times 3 and times a half."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(20_000, 3, generator=generator, dtype=torch.float64)
    labels = (torch.rand(20_000, 3, generator=generator) < z.sigmoid()).double()
    labels[:, 2] = 0
    found = best_temperatures(z * torch.tensor([3.0, 0.5, 1.0]), labels)
    assert found[0] == pytest.approx(3.0, rel=0.06)
    assert found[1] == pytest.approx(0.5, rel=0.06)
    assert found[2] == 1.0
    before = binary_calibration_error((3 * z[:, :1]).sigmoid(), labels[:, :1])
    after = binary_calibration_error((3 * z[:, :1] / found[0]).sigmoid(), labels[:, :1])
    assert before > 0.1
    assert after < 0.02


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "zlpr", "mixup": 0.2}, "takes no mixed labels"),
        ({"loss": "focal-ish"}, "focal"),
        ({"epochs": 40, "schedule_epochs": 20}, "schedule_epochs is 20; it must be 0, or at least the 40 epochs"),
        ({"distill_kl": 5, "distill_weight": 0.5}, "give one of them"),
        ({"head": "decoder"}, "ml_decoder"),
    ],
)
def test_impossible_recipes_are_one_line(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Recipe(name="x").override(settings)


def test_published_recipes() -> None:
    """FACTS sections 9 to 11: an 80-epoch one-cycle, 20 % of it up, stopped in its middle; KL 5 at temperature 1."""
    asl, decoder, usi = (get_recipe(name) for name in ("coco-asl", "ml-decoder", "usi"))
    assert (asl.asymmetric_negative, asl.asymmetric_positive, asl.asymmetric_margin) == (4, 0, 0.05)
    assert (asl.lr, asl.weight_decay, asl.batch_size, asl.ema_decay, asl.cutout) == (1e-4, 1e-4, 128, 0.9997, 0.5)
    assert lr_factor(asl, 16 / 40, 40) == 1.0
    assert lr_factor(asl, 1.0, 40) == pytest.approx(0.5 * (1 + math.cos(math.pi * (40 - 16) / (80 - 16))))
    assert (decoder.head, decoder.batch_size, decoder.image_size) == ("ml_decoder", 56, 448)
    assert (usi.distill_kl, usi.distill_temperature, usi.lr, usi.mixup, usi.cutmix) == (5.0, 1.0, 2e-3, 0.8, 1.0)
    assert usi.batch_size * usi.accumulate == 1024


def corners(count: int, seed: int, split: str, unknown: float = 0.0) -> ArraySplit:
    """16 x 16 gray noise; three labels: the left, the top, the middle is bright; some labels are not known."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(count, 3, generator=generator) > 0.5).float()
    pixels = torch.randint(0, 60, (count, 16, 16, 1), generator=generator, dtype=torch.uint8)
    pixels[labels[:, 0] > 0, :, :5] += 90
    pixels[labels[:, 1] > 0, :5] += 90
    pixels[labels[:, 2] > 0, 6:10, 6:10] += 90
    labels[torch.rand(count, 3, generator=generator) < unknown] = NAN
    return ArraySplit(split=split, classes=("left", "top", "middle"), labels=labels, channels=1, pixels=pixels)


@pytest.mark.parametrize("loss", ["asymmetric", "focal", "two-way", "zlpr", "bce"])
def test_training_with_half_of_the_labels(loss: str, tmp_path: Path) -> None:
    """Every loss learns it from half the labels; thresholds and temperatures come to the artefact."""
    torch.manual_seed(0)
    data = DataSplits(
        train=corners(240, 0, "train", 0.5),
        validation=corners(60, 1, "validation", 0.2),
        test=corners(60, 2, "test"),
        classes=("left", "top", "middle"),
    )
    options = {"loss": loss, "lr": 1e-2, "batch_size": 48, "augment": "none", "flip": 0.0, "label_smoothing": 0.0}
    run = cs.train(small_net(), data, recipe="small-adamw", epochs=6, output=tmp_path / "run", **options)
    assert run.best_metric > 0.9
    assert cs.evaluate(run.net, data.test, run.preprocessing).mean_average_precision > 0.9
    kept = load_checkpoint(tmp_path / "run", net=small_net())
    assert kept.temperatures == run.temperatures
    if loss != "two-way":
        return
    art = cs.export(
        run.net,
        tmp_path / "art",
        preprocessing=run.preprocessing,
        classes=run.classes,
        thresholds=run.thresholds,
        temperatures=run.temperatures,
        bake=True,
    )
    images = data.test.pixels.numpy()
    with torch.no_grad():
        logits = run.net(run.preprocessing.normalize(data.test.pixels))
    calibrated = (logits / torch.tensor(run.temperatures)).sigmoid()
    np.testing.assert_allclose(art(images), calibrated.numpy(), atol=1e-5)
    above = art(images) > np.array(art.thresholds, np.float32)
    near = (logits.sigmoid() - torch.tensor(run.thresholds)).abs() < 1e-4
    assert (torch.from_numpy(above) == (logits.sigmoid() > torch.tensor(run.thresholds)))[~near].all()
    plain = cs.export(
        run.net,
        tmp_path / "plain",
        preprocessing=run.preprocessing,
        thresholds=run.thresholds,
        temperatures=run.temperatures,
    )
    np.testing.assert_allclose(plain(images), calibrated.numpy(), atol=1e-5)
    assert "/ temperatures" in (tmp_path / "plain" / "README.md").read_text()


def test_temperatures_must_fit(tmp_path: Path) -> None:
    net = small_net(channels=3)
    how = {"preprocessing": Preprocessing(image_size=12, channels=3, mean=(0, 0, 0), std=(1, 1, 1))}
    with pytest.raises(UserError, match="give thresholds too"):
        cs.export(net, tmp_path / "a", temperatures=[1.0] * 3, **how)
    with pytest.raises(UserError, match="temperatures must be 3 numbers above 0"):
        cs.export(net, tmp_path / "a", thresholds=[0.5] * 3, temperatures=[1.0, 0.0, 1.0], **how)


def test_bce_of_known_labels_is_torchs() -> None:
    logits, targets = some()
    assert partial_bce(logits, targets).item() == F.binary_cross_entropy_with_logits(logits, targets).item()
