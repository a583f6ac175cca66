"""Schedule, optimisers, average, losses and augmentation against hand calculation, torch and torchvision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convscale.learn.augment import crop_box, erase, mix, resized_crop, shift_crop
from convscale.learn.ema import Ema
from convscale.learn.loss import asymmetric_loss, asymmetric_single_loss, build_loss, distillation_loss
from convscale.learn.optim import Lamb, RMSpropTF, build_optimizer, layer_depths, set_lr
from convscale.learn.recipe import Recipe
from convscale.learn.schedule import lr_factor
from tests.learn.nets import small_net


def test_one_cycle_and_cosine_by_hand() -> None:
    cycle = Recipe(name="x", schedule="onecycle", start_factor=0.1, final_factor=0.01)
    assert [round(lr_factor(cycle, at, 10), 6) for at in (0, 0.125, 0.25, 0.625, 1)] == [0.1, 0.55, 1.0, 0.5, 0.01]
    cosine = Recipe(name="x", schedule="cosine", warmup_epochs=0, final_factor=0)
    assert lr_factor(cosine, 0.5, 10) == pytest.approx(0.5)
    warm = Recipe(name="x", schedule="cosine", warmup_epochs=2, start_factor=0, final_factor=0)
    assert lr_factor(warm, 0.1, 10) == pytest.approx(0.5)
    assert lr_factor(warm, 0.6, 10) == pytest.approx(0.5)


def test_step_and_exponential_by_hand() -> None:
    exponential = Recipe(name="x", schedule="exponential", decay_rate=0.97, decay_epochs=2.4)
    assert lr_factor(exponential, 0.48, 10) == pytest.approx(0.97**2)
    assert lr_factor(exponential, 0.6, 10) == pytest.approx(0.97**2.5)
    step = Recipe(name="x", schedule="step", decay_rate=0.1, decay_epochs=30)
    assert [lr_factor(step, epoch / 90, 90) for epoch in (0, 29.9, 30, 59, 60)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_rmsprop_is_tensorflows_by_hand() -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    optimizer = RMSpropTF([weight], lr=0.1, decay=0.9, momentum=0.9, epsilon=0.001)
    value, square, buffer = 1.0, 1.0, 0.0
    for gradient in (2.0, -1.0, 0.5):
        weight.grad = torch.tensor([gradient])
        optimizer.step()
        square = 0.9 * square + 0.1 * gradient**2
        buffer = 0.9 * buffer + 0.1 * gradient / math.sqrt(square + 0.001)
        value -= buffer
        assert weight.item() == pytest.approx(value, rel=1e-6)


def test_lamb_by_hand() -> None:
    weight, bias = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.tensor([1.0]))
    groups = [{"params": [weight], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = Lamb(groups, lr=0.01, betas=(0.9, 0.999), epsilon=0.0)
    weight.grad, bias.grad = torch.tensor([[0.3, -0.4]]), torch.tensor([0.5])  # total norm below 1: not shrunk
    optimizer.step()
    direction = torch.tensor([[1 + 0.3, -1 + 0.4]])  # Adam's first direction is the sign; plus decay times weight
    trust = 5.0 / direction.norm()
    torch.testing.assert_close(weight.detach(), torch.tensor([[3.0, 4.0]]) - 0.01 * trust * direction)
    torch.testing.assert_close(bias.detach(), torch.tensor([0.99]))


@pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop"])
def test_weight_decay_is_decoupled_and_spares_norms_and_biases(name: str) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with torch.no_grad():
        for param in net.parameters():
            param.fill_(1.0)
    optimizer = build_optimizer(net, Recipe(name="x", optimizer=name, lr=0.5, weight_decay=0.1))
    for param in net.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    torch.testing.assert_close(net[0].weight, torch.full((2, 2), 0.95))  # 1 - lr * decay, whatever the optimiser
    for param in (net[0].bias, net[1].weight, net[1].bias):
        torch.testing.assert_close(param, torch.ones(2))


def test_layer_decay_counts_from_the_head() -> None:
    net = small_net()
    assert layer_depths(net)["9.weight"] == 0
    assert layer_depths(net)["4.bias"] == 1
    assert layer_depths(net)["0.weight"] == 4
    optimizer = build_optimizer(net, Recipe(name="x", layer_decay=0.5))
    set_lr(optimizer, 0.8)
    rates = {id(param): group["lr"] for group in optimizer.param_groups for param in group["params"]}
    assert rates[id(net[9].weight)] == pytest.approx(0.8)
    assert rates[id(net[0].weight)] == pytest.approx(0.05)


def test_average_warms_up() -> None:
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, 0.0)
    ema = Ema(net, 0.5)
    nn.init.constant_(net.weight, 1.0)
    ema.update(net)  # decay (1 + 1) / (10 + 1)
    assert ema.net.weight.item() == pytest.approx(1 - 2 / 11)
    for _ in range(20):
        ema.update(net)
    nn.init.constant_(net.weight, 3.0)
    before = ema.net.weight.item()
    ema.update(net)  # warmed up: 0.5
    assert ema.net.weight.item() == pytest.approx(0.5 * before + 1.5)


def test_asymmetric_loss_by_hand_and_as_binary_cross_entropy() -> None:
    logits = torch.tensor([[0.0, 2.0], [-1.0, 0.5]], dtype=torch.float64)
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    plain = asymmetric_loss(logits, targets, negative=0, positive=0, margin=0)
    assert plain.item() == pytest.approx(
        F.binary_cross_entropy_with_logits(logits, targets, reduction="sum").item() / 2
    )

    def sigmoid(value: float) -> float:
        return 1 / (1 + math.exp(-value))

    def absent(value: float) -> float:
        shifted = max(sigmoid(value) - 0.05, 0)
        return -(shifted**4) * math.log(1 - shifted)

    def present(value: float) -> float:
        return -(1 - sigmoid(value)) * math.log(sigmoid(value))

    expected = (present(0.0) + absent(2.0) + absent(-1.0) + present(0.5)) / 2
    assert asymmetric_loss(logits, targets, negative=4, positive=1, margin=0.05).item() == pytest.approx(expected)


def test_asymmetric_loss_for_one_label_by_hand() -> None:
    """Softmax, exponents 4 and 0, smoothing 0.1 (FACTS section 9): logits ln 1, ln 2, ln 5 are 1/8, 2/8, 5/8."""
    logits = torch.tensor([[0.0, math.log(2), math.log(5)]] * 2, dtype=torch.float64)
    labels = torch.tensor([2, 0])
    p, spread = (1 / 8, 2 / 8, 5 / 8), 0.1 / 3
    first = (0.9 + spread) * math.log(p[2]) + spread * (p[0] ** 4 * math.log(p[0]) + p[1] ** 4 * math.log(p[1]))
    second = (0.9 + spread) * math.log(p[0]) + spread * (p[1] ** 4 * math.log(p[1]) + p[2] ** 4 * math.log(p[2]))
    counts = torch.tensor([10, 20, 40])
    loss = build_loss(Recipe(name="x", loss="asymmetric"), counts, multilabel=False)
    assert loss(logits, labels).item() == pytest.approx(-(first + second) / 2)
    one_hot = F.one_hot(labels, 3).double()
    assert loss(logits, one_hot).item() == pytest.approx(-(first + second) / 2)
    focused = asymmetric_single_loss(logits, one_hot, negative=4, positive=2, smoothing=0)
    own = ((3 / 8) ** 2 * math.log(p[2]) + (7 / 8) ** 2 * math.log(p[0])) / 2
    assert focused.item() == pytest.approx(-own)
    plain = asymmetric_single_loss(logits, one_hot, negative=0, positive=0, smoothing=0.1)
    assert plain.item() == pytest.approx(F.cross_entropy(logits, labels, label_smoothing=0.1).item())
    weighted = Recipe(name="x", loss="asymmetric", class_weights=True, label_smoothing=0)
    told = build_loss(weighted, counts, multilabel=False)(logits, labels).item()  # 12/7, 6/7, 3/7: their mean is 1
    assert told == pytest.approx(-(3 / 7 * math.log(p[2]) + 12 / 7 * math.log(p[0])) / 2)


def test_losses_follow_the_recipe() -> None:
    logits, labels = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])
    counts = torch.tensor([10, 20, 40])
    smooth = build_loss(Recipe(name="x", label_smoothing=0.1), counts, multilabel=False)
    soft = F.one_hot(labels, 3) * 0.9 + 0.1 / 3
    torch.testing.assert_close(smooth(logits, labels), -(soft * logits.log_softmax(1)).sum(1).mean())
    weighted = build_loss(Recipe(name="x", label_smoothing=0, class_weights=True), counts, multilabel=False)
    weight = torch.tensor([4.0, 2.0, 1.0]) * 3 / 7
    torch.testing.assert_close(weighted(logits, labels), F.cross_entropy(logits, labels, weight=weight))
    recipe = Recipe(name="x", loss="bce", label_smoothing=0, class_weights=True)
    each = F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, 3).float(), reduction="none")
    torch.testing.assert_close(build_loss(recipe, counts, multilabel=False)(logits, labels), (each * weight).mean())
    torch.testing.assert_close(distillation_loss(logits, logits, temperature=3), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_shift_crop_by_hand() -> None:
    image = torch.arange(1, 17, dtype=torch.uint8).view(1, 4, 4, 1)
    still = torch.tensor([[0.5, 0.5, 0.9, 0.0, 0.0]])
    assert torch.equal(shift_crop(image, still, pad=1, flip=0.5, cutout=0), image)
    flipped = shift_crop(image, torch.tensor([[0.5, 0.5, 0.1, 0, 0]]), pad=1, flip=0.5, cutout=0)
    assert torch.equal(flipped, image.flip(2))
    up_left = shift_crop(image, torch.tensor([[0.99, 0.99, 0.9, 0, 0]]), pad=1, flip=0.5, cutout=0)[0, ..., 0]
    assert up_left.tolist() == [[6, 7, 8, 0], [10, 11, 12, 0], [14, 15, 16, 0], [0, 0, 0, 0]]
    both = shift_crop(image, torch.tensor([[0.5, 0.99, 0.1, 0, 0]]), pad=1, flip=0.5, cutout=0)[0, ..., 0]
    assert both.tolist() == [[0, 4, 3, 2], [0, 8, 7, 6], [0, 12, 11, 10], [0, 16, 15, 14]]
    cut = shift_crop(image, torch.tensor([[0.5, 0.5, 0.9, 0.5, 0.25]]), pad=0, flip=0.5, cutout=2, fill=99)[0, ..., 0]
    assert cut.tolist() == [[1, 2, 3, 4], [99, 99, 7, 8], [99, 99, 11, 12], [13, 14, 15, 16]]


def test_crop_boxes_lie_inside_and_follow_torchvisions_distribution() -> None:
    from torchvision.transforms import v2

    random = np.random.default_rng(0)
    ours = np.array([crop_box(100, 150, random, min_scale=0.08) for _ in range(4000)])
    assert (ours[:, 0] + ours[:, 2] <= 100).all()
    assert (ours[:, 1] + ours[:, 3] <= 150).all()
    assert (ours >= 0).all()
    torch.manual_seed(0)
    transform = v2.RandomResizedCrop(8)
    image = torch.zeros(3, 100, 150, dtype=torch.uint8)
    theirs = np.array(
        [
            [value[key] for key in ("top", "left", "height", "width")]
            for value in (transform.make_params([image]) for _ in range(4000))
        ]
    )
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 2.0  # four standard errors
    assert np.abs(ours.std(0) - theirs.std(0)).max() < 2.0


def test_a_crop_for_the_other_way_has_a_pixel() -> None:
    """A picture one pixel wide has no box as flat as 4 : 1, and ended the training."""
    for (height, width), aspect, box in (((10, 1), 4.0, (4, 0, 1, 1)), ((1, 10), 0.25, (0, 4, 1, 1))):
        assert crop_box(height, width, np.random.default_rng(0), min_scale=1.0, aspect=aspect) == box
    image = torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1)
    cropped = resized_crop(image, (2, 8), np.random.default_rng(0), Recipe(name="x", crop_scale=1.0))
    assert torch.equal(cropped, torch.full((2, 8, 1), 4, dtype=torch.uint8))


def test_resized_crop_is_fixed_by_its_stream() -> None:
    image = torch.randint(0, 255, (40, 50, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for policy in ("none", "randaugment", "autoaugment", "trivialaugment"):
        recipe = Recipe(name="x", policy=policy)
        first, again = (resized_crop(image, 16, np.random.default_rng(7), recipe) for _ in range(2))
        assert torch.equal(first, again)
        assert first.shape == (16, 16, 3)
        assert not torch.equal(first, resized_crop(image, 16, np.random.default_rng(8), recipe))


def test_mixup_and_cutmix_keep_the_targets_honest() -> None:
    images = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)])
    targets = torch.eye(2)
    for mixup, cutmix in ((0.8, 0.0), (0.0, 1.0)):
        mixed, labels = mix(images, targets, np.random.default_rng(3), mixup=mixup, cutmix=cutmix)
        torch.testing.assert_close(labels.sum(1), torch.ones(2))
        # image 0 is black and image 1 white: a mixed image's mean is the share of class 1 in it
        torch.testing.assert_close(mixed.mean((1, 2, 3)), labels[:, 1])
        assert 0 < labels[0, 1] < 1


def test_erasing_hits_the_share_of_images() -> None:
    images = erase(torch.full((400, 1, 16, 16), 5.0), list(range(400)), chance=0.25)
    touched = (images != 5.0).flatten(1).any(1)
    assert 70 <= int(touched.sum()) <= 130
    area = (images != 5.0)[touched].float().mean((1, 2, 3))
    assert area.min() > 0.005
    assert area.max() < 0.45
