"""The solved head against scikit-learn, and what fine-tuning makes of it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from convscale.errors import UserError
from convscale.images.preprocess import Preprocessing
from convscale.images.splits import ArraySplit
from convscale.learn import probe
from convscale.learn.loop import Trainer
from convscale.learn.probe import solve_head
from convscale.learn.recipe import Recipe
from convscale.learn.train import train
from convscale.learn.validate import Validation
from tests.learn.nets import halves_data, small_net

PLAIN = Preprocessing(image_size=2, channels=1, mean=(0.0,), std=(1.0,), crop_pct=1.0)


class Pixels(nn.Module):
    """Features are the four pixels; the head is linear."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.fc = nn.Linear(4, classes)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = x.flatten(1)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def _split(labels: torch.Tensor, seed: int, name: str) -> ArraySplit:
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 120, (len(labels), 2, 2, 1), dtype=np.uint8)
    if labels.ndim == 1:
        pixels.reshape(-1, 4)[np.arange(len(labels)), labels.numpy()] += 60
    else:
        pixels.reshape(-1, 4)[:, :3] += 120 * labels.numpy().astype(np.uint8)  # each class has a pixel
    return ArraySplit(split=name, classes=("a", "b", "c"), labels=labels, channels=1, pixels=torch.from_numpy(pixels))


def test_it_is_logistic_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    monkeypatch.setattr(probe, "DECAYS", (0.1,))
    train_split, validation = (
        _split(torch.arange(count) % 3, seed, name) for count, seed, name in ((90, 0, "train"), (30, 1, "validation"))
    )
    net = Pixels()
    assert solve_head(net, train_split, validation, PLAIN, device=torch.device("cpu"))[0] == 0.1
    x = train_split.images.numpy().reshape(90, 4) / 255
    standard = (x - x.mean(0)) / x.std(0, ddof=1)
    golden = linear_model.LogisticRegression(C=1 / (0.1 * 90), tol=1e-8, max_iter=1000).fit(
        standard, train_split.labels.numpy()
    )
    with torch.no_grad():
        ours = net(PLAIN.normalize(train_split.images)).softmax(1).numpy()
    np.testing.assert_allclose(ours, golden.predict_proba(standard), atol=2e-4)


def test_few_images_are_judged_in_turns_by_heads_that_have_not_seen_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside scikit-learn's heads on the same fifths: of each class in turn one image in each."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    monkeypatch.setattr(probe, "DECAYS", (0.1,))
    parts = [_split(torch.arange(count) % 3, seed, name) for count, seed, name in ((63, 0, "train"), (27, 1, "held"))]
    net = Pixels()
    before = net.fc.weight.clone()
    made = probe.probe(net, *parts, PLAIN, device=torch.device("cpu"))
    x = np.concatenate([part.images.numpy().reshape(-1, 4) for part in parts]) / 255
    labels = np.concatenate([part.labels.numpy() for part in parts])
    fold = np.empty(90, int)
    fold[np.argsort(labels, kind="stable")] = np.arange(90) % 5
    right = 0
    for number in range(5):
        seen = fold != number
        mean, std = x[seen].mean(0), x[seen].std(0, ddof=1)
        model = linear_model.LogisticRegression(C=1 / (0.1 * seen.sum()), tol=1e-8, max_iter=1000)
        model.fit((x[seen] - mean) / std, labels[seen])
        right += int((model.predict((x[~seen] - mean) / std) == labels[~seen]).sum())
    assert (made.top1, made.train, made.validation, made.folds) == (right / 90, 72, 90, 5)
    assert 0.4 < made.top1 < 0.95  # so that a head that sees its own images would be found out
    assert torch.equal(net.fc.weight, before)


def test_a_large_validation_set_judges_alone() -> None:
    parts = [_split(torch.arange(count) % 3, seed, name) for count, seed, name in ((90, 0, "train"), (30, 1, "held"))]
    net = Pixels()
    made = probe.probe(net, *parts, PLAIN, device=torch.device("cpu"), most=60)
    solve_head(net, parts[0].subset(torch.linspace(0, 89, 60).long()), parts[1], PLAIN, device=torch.device("cpu"))
    with torch.no_grad():
        right = (net(PLAIN.normalize(parts[1].images)).argmax(1) == parts[1].labels).double().mean()
    assert (made.top1, made.train, made.validation, made.folds) == (float(right), 60, 30, None)


def test_several_labels_are_solved_one_by_one() -> None:
    labels = torch.eye(3)[torch.arange(90) % 3]
    labels[:, 2] = 1.0 - labels[:, 2]  # often present
    net = Pixels()
    solve_head(net, _split(labels, 0, "train"), _split(labels[:30], 1, "validation"), PLAIN, device=torch.device("cpu"))
    with torch.no_grad():
        right = ((net(PLAIN.normalize(_split(labels[:60], 2, "test").images)) > 0) == labels[:60].bool()).float().mean()
    assert right > 0.95  # 0.67 by always saying what is more frequent


def test_labels_that_are_not_known_count_for_nothing() -> None:
    """The head of a class is solved from the images that say something of it, as if the others were not there."""
    labels = torch.eye(3)[torch.arange(90) % 3]
    partly = labels.clone()
    partly[45:, 0] = torch.nan
    splits = [_split(labels, 0, "train"), _split(labels[:30], 1, "validation")]
    first = splits[0].subset(torch.arange(45))
    splits[0] = dataclasses.replace(splits[0], labels=partly)
    net, alone = Pixels(), Pixels()
    solve_head(net, *splits, PLAIN, device=torch.device("cpu"))
    assert torch.isfinite(net.fc.weight).all()
    x = PLAIN.normalize(_split(labels[:60], 2, "test").images)
    solve_head(alone, first, splits[1], PLAIN, device=torch.device("cpu"))
    with torch.no_grad():
        right = ((net(x) > 0) == labels[:60].bool()).float().mean(0)
        apart = ((alone(x) > 0) == labels[:60].bool()).float().mean(0)
    assert right.min() > 0.9
    assert right[0] == pytest.approx(float(apart[0]), abs=0.04)  # penalties weigh a little more on half of the images
    made = probe.probe(net, *splits, PLAIN, device=torch.device("cpu"))
    assert made.top1 > 0.95


def test_training_starts_from_it_and_never_ends_below() -> None:
    from convscale.nn.net import create_model

    torch.manual_seed(0)
    net = create_model("mobilenetv2_050", num_classes=3, in_chans=1)
    recipe = Recipe(
        name="x", epochs=2, batch_size=16, lr=1e-9, augment="none", solve_head=True, precision="fp32", layout="nchw"
    )
    run = train(net, halves_data(), recipe=recipe)
    said = next(note for note in run.notes if "before the first epoch: validation result" in note)
    assert run.best_metric >= float(said.split()[-1].rstrip("%")) / 100 - 1e-4
    assert run.best_metric > 0.5  # of three classes, with no training to speak of


def test_a_network_without_such_a_head_is_refused() -> None:
    with pytest.raises(UserError, match="solve_head needs a network with forward_features"):
        train(
            small_net(),
            halves_data(),
            recipe=Recipe(name="x", solve_head=True, epochs=1, batch_size=16, augment="none"),
        )


@pytest.mark.parametrize(("script", "best"), [((0.8, 0.7, 0.8), 2), ((0.8, 0.7, 0.6), 0), ((0.8, 0.9, 0.9), 1)])
def test_of_equal_results_the_trained_one_is_kept(
    script: tuple[float, ...], best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its loss, which smoothed labels raise; of two trained ones that with the lower loss."""
    from convscale.nn.net import create_model

    left = iter([Validation(loss=number + 0.1, top1=top1) for number, top1 in enumerate(script)])
    monkeypatch.setattr(Trainer, "_validate", lambda trainer: next(left))
    torch.manual_seed(0)
    net = create_model("mobilenetv2_050", num_classes=3, in_chans=1)
    recipe = Recipe(
        name="x", epochs=2, batch_size=16, lr=1e-9, augment="none", solve_head=True, precision="fp32", layout="nchw"
    )
    assert train(net, halves_data(), recipe=recipe).best_epoch == best


def test_kept_statistics_stay_and_weights_learn() -> None:
    torch.manual_seed(0)
    net = small_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    recipe = Recipe(name="x", epochs=1, batch_size=16, lr=0.05, keep_statistics=True, precision="fp32", layout="nchw")
    run = train(net, halves_data(), recipe=recipe)
    after = run.net.state_dict()
    assert {name for name, value in after.items() if torch.equal(value, before[name])} == {
        f"{norm}.{part}" for norm in ("1", "4") for part in ("running_mean", "running_var", "num_batches_tracked")
    }
