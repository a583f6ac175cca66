"""Doubtful labels, by hand and by a small trained network."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from convscale.errors import UserError
from convscale.images.preprocess import Preprocessing
from convscale.images.splits import DataSplits
from convscale.learn.doubtful import DoubtfulLabel, doubtful_labels, find_doubtful, sample_probabilities
from convscale.learn.recipe import Recipe
from convscale.learn.train import train
from tests.learn.nets import CLASSES, halves_data, small_net

CATS = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.3, 0.7]])
"""Three are said to be cats, the last a dog: thresholds 0.6 and 0.7."""


def test_by_hand() -> None:
    found = doubtful_labels(CATS, [0, 0, 0, 1], ("cat", "dog"), list("wxyz"))
    assert found == (
        DoubtfulLabel(index=2, name="y", given="cat", suggested="dog", confidence=0.1, suggested_confidence=0.9),
    )
    assert found[0].describe() == "y: labelled cat, looks like dog (90% sure, 10% of the label)"


def test_a_rival_below_its_own_threshold_is_no_doubt() -> None:
    """Dogs are usually known at (0.95 + 0.95) / 2: 0.9 is not enough, though it is more than the cat's 0.1."""
    probabilities = [*CATS[:3], [0.05, 0.95], [0.05, 0.95]]
    assert doubtful_labels(probabilities, [0, 0, 0, 1, 1], ("cat", "dog"), list("vwxyz")) == ()


def test_order_is_by_what_is_usual_for_the_label() -> None:
    """Both are given 0.2 for their labels, of which a's mean is 0.7 and b's 0.4; c is reached by both at 0.5."""
    probabilities = [
        [0.95, 0.03, 0.02],
        [0.95, 0.03, 0.02],
        [0.2, 0.2, 0.6],  # said to be a
        [0.3, 0.6, 0.1],
        [0.2, 0.2, 0.6],  # said to be b
        [0.25, 0.25, 0.5],
    ]
    labels = [0, 0, 0, 1, 1, 2]
    found = doubtful_labels(probabilities, labels, ("a", "b", "c"), [*"uvwxyz"], indices=range(10, 16))
    assert [(each.index, each.name, each.given, each.suggested) for each in found] == [
        (12, "w", "a", "c"),
        (14, "y", "b", "c"),
    ]
    assert doubtful_labels(probabilities, labels, ("a", "b", "c"), [*"uvwxyz"], 1) == (
        dataclasses.replace(found[0], index=2),
    )


def test_a_class_without_labels_suggests_nothing() -> None:
    assert doubtful_labels([[0.4, 0.6], [0.3, 0.7]], [0, 0], ("a", "b"), ["x", "y"]) == ()


def test_several_labels_by_hand() -> None:
    """Class a: w lacks it (0.95, usual 0.9), z has it (0.05; those without it are not it at 0.68 on average)."""
    probabilities = [[0.95, 0.1], [0.9, 0.9], [0.9, 0.8], [0.0, 0.2], [0.01, 0.1], [0.05, 0.9]]
    labels = [[0, 0], [1, 1], [1, 1], [0, 0], [0, 0], [1, 1]]
    found = doubtful_labels(probabilities, labels, ("a", "b"), [*"wxyuvz"])
    # has a: (0.9 + 0.9 + 0.05) / 3; has it not: (0.05 + 1 + 0.99) / 3 = 0.68; 0.05 / 0.617 is above 0.05 / 0.68
    assert [(each.name, each.given, each.suggested) for each in found] == [("w", None, "a"), ("z", "a", None)]
    assert found[0].confidence == pytest.approx(0.05)
    assert found[0].describe() == "w: lacks the label a (95% sure, 5% of the label)"
    assert found[1].describe() == "z: labelled a, looks like none (95% sure, 5% of the label)"


def test_labels_that_are_not_known_are_no_doubts() -> None:
    """Of class a the first and the fourth image's labels are not known: they are none of the doubts, and move no
    threshold; the others are found under their own numbers."""
    probabilities = np.array([[0.99], [0.95], [0.9], [0.99], [0.9], [0.0], [0.01], [0.05]])
    labels = np.array([np.nan, 0, 1, np.nan, 1, 0, 0, 1])[:, None]
    found = doubtful_labels(probabilities, labels, ("a",), [*"abcdefgh"])
    assert [(each.index, each.name, each.given, each.suggested) for each in found] == [
        (1, "b", None, "a"),
        (7, "h", "a", None),
    ]
    known = [1, 2, 4, 5, 6, 7]
    names = [*"bcefgh"]
    assert found == doubtful_labels(probabilities[known], labels[known], ("a",), names, indices=known)
    assert doubtful_labels([[0.9], [0.1]], [[np.nan], [np.nan]], ("a",), ["x", "y"]) == ()


@pytest.mark.parametrize(
    ("probabilities", "labels", "names", "message"),
    [
        (CATS[:, :1], [0, 0, 0, 1], "wxyz", r"shape \(4, 1\); \(images, 2\) would be right"),
        (CATS, [0, 0, 0], "wxyz", r"4 images, but labels of shape \(3,\)"),
        (CATS, [0, 0, 0, 1], "wxy", "3 names"),
        (CATS, [0, 0, 0, 2], "wxyz", "labels reach from 0 to 2; 0 to 1 would be right"),
        (CATS * 2, [0, 0, 0, 1], "wxyz", r"must lie in \[0, 1\]"),
        (CATS * np.nan, [0, 0, 0, 1], "wxyz", r"must lie in \[0, 1\]"),
    ],
)
def test_bad_input(probabilities: np.ndarray, labels: list[int], names: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        doubtful_labels(probabilities, labels, ("cat", "dog"), [*names])


def test_flipped_labels_are_found_by_a_trained_network() -> None:
    """Two labels of 96 were flipped before training."""
    data = halves_data()
    labels = data.train.labels.clone()
    flipped = [7, 40]
    labels[flipped] = (labels[flipped] + 1) % 3
    wrong = DataSplits(
        train=dataclasses.replace(data.train, labels=labels),
        validation=data.validation,
        test=data.test,
        classes=data.classes,
    )
    recipe = Recipe(name="x", epochs=6, batch_size=16, augment="none", precision="fp32", layout="nchw", lr=0.01)
    run = train(small_net(), wrong, recipe=recipe)
    found = find_doubtful(run.net, wrong.train, run.preprocessing, count=2)
    assert {(each.index, each.given, each.suggested) for each in found} == {
        (index, CLASSES[labels[index]], CLASSES[data.train.labels[index]]) for index in flipped
    }
    assert {each.name for each in found} == {wrong.train.name(index) for index in flipped}


def test_a_sample_is_evenly_taken() -> None:
    data = halves_data()
    net = small_net()
    plain = Preprocessing(image_size=12, channels=1, mean=(0.0,), std=(1.0,), crop_pct=1.0)
    seen = sample_probabilities(net, data.train, plain, most=6)
    assert seen.indices.tolist() == [0, 16, 32, 48, 64, 80]
    assert seen.labels.tolist() == data.train.labels[::16].tolist()
    with torch.no_grad():
        golden = net.eval()(plain.normalize(data.train.images[::16])).softmax(1)
    np.testing.assert_allclose(seen.values, golden.numpy(), atol=1e-6)
