"""The gate, by hand-made networks whose differences are known."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from convscale.artifact.artifact import Artifact
from convscale.errors import UserError
from convscale.images.preprocess import Preprocessing
from convscale.ship.verify import Verification, verify
from convscale.stats import wilson

PRE = Preprocessing(image_size=4, mean=(0.0,) * 3, std=(1.0,) * 3)


class Means(nn.Module):
    """Logits are the channels' means."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


class FakeArtifact:
    """Gives the network's logits, changed."""

    format, baked, preprocessing = "fake", False, PRE

    def __init__(self, change: Any = lambda logits, batch: logits, precision: str = "fp32") -> None:
        self.change, self.precision = change, precision
        self.batches: list[int] = []

    def logits(self, images: np.ndarray, *, batch_size: int | None = None) -> np.ndarray:
        step = batch_size or 32
        parts = []
        for i in range(0, len(images), step):
            self.batches.append(len(images[i : i + step]))
            parts.append(
                self.change(
                    images[i : i + step].mean((1, 2), dtype=np.float64).astype(np.float32) / 255, self.batches[-1]
                )
            )
        return np.concatenate(parts)


def pictures(n: int = 10) -> np.ndarray:
    """Flat pictures, brightest in channel i % 3: (200, 100, 50) of 255."""
    images = np.zeros((n, 4, 4, 3), np.uint8)
    for i in range(n):
        images[i, :, :] = np.roll([200, 100, 50], i % 3)
    return images


def check(artifact: Any, images: Any = None, labels: Any = None, **keywords: Any) -> Verification:
    return verify(Means(), artifact, pictures() if images is None else images, labels, **keywords)


def test_equal_passes() -> None:
    v = check(FakeArtifact())
    assert (v.n, v.top1_agreement, v.passed) == (10, 1.0, True)
    assert v.max_rel < 1e-6
    assert v.drop_points is None


def test_differences_by_hand() -> None:
    def shifted(logits: np.ndarray, batch: int) -> np.ndarray:
        return logits + np.array([0.01, 0, 0], np.float32)

    v = check(FakeArtifact(shifted))
    assert v.max_abs == pytest.approx(0.01, abs=1e-6)
    assert v.max_rel == pytest.approx(0.01 / (200 / 255), rel=1e-4)
    assert v.mean_abs == pytest.approx(0.01 / 3, rel=1e-3)
    assert not v.passed
    assert "differ by 1.3e-02 relative, 0.001 is allowed" in v.reason


def test_an_odd_batch_that_is_wrong_is_found() -> None:
    v = check(FakeArtifact(lambda logits, batch: logits + (0.5 if batch == 7 else 0)))
    assert not v.passed
    assert v.max_abs == pytest.approx(0.5, abs=1e-6)


def test_batches_run() -> None:
    artifact = FakeArtifact()
    check(artifact, pictures(40), batch_sizes=(1, 2, 7))
    assert artifact.batches == [32, 1, 1, 1, 2, 2, 1, 7, 7, 1, 8]


def test_agreement_gate() -> None:
    near = pictures(12)
    near[0] = 100
    v = check(FakeArtifact(lambda logits, batch: logits + np.array([0, 1e-4, 0], np.float32)), near)
    assert v.max_rel < 1e-3
    assert v.top1_agreement == pytest.approx(11 / 12)
    assert not v.passed
    assert "top-1 agrees on 91.67 % of 12 images, 99.9 % are needed" in v.reason


def test_nan_never_passes() -> None:
    v = check(FakeArtifact(lambda logits, batch: logits * np.nan))
    assert not v.passed
    assert "not finite" in v.reason


def test_nan_at_an_odd_batch_never_passes() -> None:
    for precision in ("fp32", "int8"):
        v = check(FakeArtifact(lambda logits, batch: logits * (np.nan if batch == 2 else 1), precision), max_drop=100)
        assert not v.passed
        assert "not finite" in v.reason


def dimmed(count: int) -> np.ndarray:
    """Pictures of which the first ``count`` are a little darker."""
    images = pictures()
    images[:count] -= 1
    return images


def wrong_on_dimmed(logits: np.ndarray, batch: int) -> np.ndarray:
    """Turns the darker pictures round."""
    return np.where(logits.max(1, keepdims=True) < 199.5 / 255, -logits, logits)


@pytest.mark.parametrize(
    ("wrong", "max_drop", "passed"), [(1, 0.5, False), (1, 10.0, True), (0, 0.0, True), (2, 10.0, False)]
)
def test_int8_is_judged_by_accuracy(wrong: int, max_drop: float, passed: bool) -> None:
    v = check(
        FakeArtifact(wrong_on_dimmed, "int8"), dimmed(wrong), labels=[i % 3 for i in range(10)], max_drop=max_drop
    )
    assert v.accuracy_before == 1.0
    assert v.accuracy_after == pytest.approx(1 - wrong / 10)
    assert v.drop_points == pytest.approx(10 * wrong)
    assert v.passed is passed
    assert f"{max_drop:g} are allowed" in v.reason


def test_int8_without_labels_is_judged_by_disagreement() -> None:
    assert not check(FakeArtifact(wrong_on_dimmed, "int8"), dimmed(1), max_drop=9).passed
    assert check(FakeArtifact(wrong_on_dimmed, "int8"), dimmed(1), max_drop=10).passed


def test_int8_that_differs_between_batch_sizes_is_withheld() -> None:
    v = check(
        FakeArtifact(lambda logits, batch: logits * (1.2 if batch == 7 else 1), "int8"),
        labels=[i % 3 for i in range(10)],
    )
    assert v.batch_rel == pytest.approx(0.2)
    assert not v.passed
    assert "differ by 2.0e-01 relative between batch sizes" in v.reason


def test_several_labels_are_judged_by_mean_average_precision() -> None:
    labels = np.zeros((10, 3))
    labels[np.arange(10), np.arange(10) % 3] = 1
    labels[:, 2] = 0  # a class that no image has does not count
    v = check(
        FakeArtifact(lambda logits, batch: logits * np.array([1, -1, 1], np.float32), "int8"),
        labels=labels,
        max_drop=100,
    )
    assert v.accuracy_before == 1.0
    # class 1 ranked the wrong way round: its three images come last of ten and together, at a precision of 3/10
    assert v.accuracy_after == pytest.approx((1 + 3 / 10) / 2)
    assert v.accuracy_after_interval is None
    labels[:, 0] = 0  # one class alone
    assert check(FakeArtifact(), labels=labels).accuracy_after == 1.0
    assert check(FakeArtifact(), labels=np.zeros((10, 3))).accuracy_after is None
    with pytest.raises(UserError, match="do not go with logits"):
        check(FakeArtifact(), labels=labels[:, :2])


def test_labels_that_are_not_known_count_for_nothing_in_the_mean() -> None:
    labels = np.zeros((10, 3), np.float32)
    labels[np.arange(10), np.arange(10) % 3] = 1
    labels[:, 2] = 0  # a class that no image has does not count
    labels[::3, 1] = np.nan
    flipped = FakeArtifact(lambda logits, batch: logits * np.array([1, -1, 1], np.float32), "int8")
    v = check(flipped, labels=labels, max_drop=24)
    # class 1 ranked the wrong way round: its three images come last of the six that are known, at a precision of 3/6
    assert v.accuracy_after == pytest.approx((1 + 3 / 6) / 2)
    assert (v.passed, v.reason) == (
        False, "INT8 loses 25.00 points of mean average precision on 10 images, 24 are allowed"
    )  # fmt: skip
    assert check(flipped, labels=labels, max_drop=25).passed  # though the likeliest class differs for 3 of 10


def test_batches_of_images_may_be_given() -> None:
    v = check(FakeArtifact(), iter([pictures(5), pictures(4)]), labels=np.arange(9) % 3)
    assert v.n == 9


def test_bad_input() -> None:
    with pytest.raises(UserError, match="10 images and 3 labels"):
        check(FakeArtifact(), labels=[0, 1, 2])
    with pytest.raises(UserError, match="no images"):
        check(FakeArtifact(), pictures(0))


def test_wilson_by_hand() -> None:
    # p = 0.9, n = 100, z = 1.959964: (0.9 + 0.019207) / 1.038415 = 0.885203; half = 0.059598 (Wilson 1927)
    low, high = wilson(90, 100)
    assert low == pytest.approx(0.825635, abs=2e-5)
    assert high == pytest.approx(0.944770, abs=2e-5)
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == 1
    with pytest.raises(UserError, match="5 of 4"):
        wilson(5, 4)


def test_record_round_trip() -> None:
    v = check(FakeArtifact(), labels=[i % 3 for i in range(10)])
    assert Verification.from_dict(v.to_dict()) == v
    assert dataclasses.replace(v, n=3) != v


def test_a_real_artefact(tiny: nn.Module, onnx_art: Artifact, images: np.ndarray) -> None:
    v = verify(tiny, onnx_art, images)
    assert v.passed
    assert v.max_rel < 1e-5


@pytest.mark.parametrize(
    ("layer", "format", "bake"),
    [
        ("stem.0", "onnx", False),
        ("block.0", "onnx", False),
        ("head", "onnx", False),
        ("block.0", "onnx", True),
        ("head", "openvino", True),
    ],
)
def test_drift_names_the_layer(
    layer: str, format: str, bake: bool, tiny: nn.Module, images: np.ndarray, tmp_path: Path
) -> None:
    import copy

    from convscale.ship.drift import first_drift
    from convscale.ship.export import export

    other = copy.deepcopy(tiny)
    with torch.no_grad():
        weight = other.get_submodule(layer).weight
        assert isinstance(weight, nn.Parameter)
        weight.mul_(1.1)
    art = export(other, tmp_path / "a", format=format, bake=bake)
    assert first_drift(tiny, art, images[:3]) == layer
    assert first_drift(other, art, images[:3]) is None
