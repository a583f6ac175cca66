"""COCO's figures of cases that can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from convscale.ship.box_metrics import NOTHING, Found, Truth, coco_metrics, iou, matched, quality


def truth(
    *boxes: list[float],
    labels: list[int] | None = None,
    crowd: list[bool] | None = None,
    areas: list[float] | None = None,
) -> Truth:
    table = np.array(boxes, np.float32).reshape(-1, 4)
    marks = np.array(crowd or [False] * len(table), bool)
    covered = None if areas is None else np.array(areas)
    return Truth(size=(100, 100), boxes=table, labels=np.array(labels or [1] * len(table)), crowd=marks, areas=covered)


def found(*boxes: list[float], scores: list[float], labels: list[int] | None = None) -> Found:
    table = np.array(boxes, np.float32).reshape(-1, 4)
    return Found(boxes=table, scores=np.array(scores, np.float32), labels=np.array(labels or [1] * len(table)))


def test_an_iou_of_four_fifths_is_right_at_seven_of_ten_thresholds() -> None:
    """A box of 50 x 40 in one of 50 x 50: 0.8; COCO's thresholds are 0.5, 0.55 ... 0.95."""
    metrics = coco_metrics([truth([0, 0, 50, 50])], [found([0, 0, 50, 40], scores=[0.9])], 1)
    assert metrics.map == pytest.approx(0.7)
    assert (metrics.ap50, metrics.ap75) == (1.0, 1.0)
    assert metrics.medium == pytest.approx(0.7)  # 2500 pixels: between 32 and 96 squared
    assert math.isnan(metrics.small)
    assert math.isnan(metrics.large)


def test_what_covers_little_of_its_box_is_small() -> None:
    """COCO judges sizes by the annotation's area, of 900 pixels here, not by the box's 2500."""
    metrics = coco_metrics([truth([0, 0, 50, 50], areas=[900])], [found([0, 0, 50, 40], scores=[0.9])], 1)
    assert metrics.map == pytest.approx(0.7)
    assert metrics.small == pytest.approx(0.7)
    assert math.isnan(metrics.medium)


def test_a_false_box_before_the_right_one_halves_the_precision() -> None:
    metrics = coco_metrics([truth([0, 0, 20, 20])], [found([60, 60, 80, 80], [0, 0, 20, 20], scores=[0.9, 0.8])], 1)
    assert metrics.map == pytest.approx(0.5)
    assert metrics.small == pytest.approx(0.5)
    assert np.allclose(metrics.curves[0], 0.5)


def test_half_of_the_boxes_found_is_half_of_the_curve() -> None:
    """51 of 101 recall levels (0 to 0.5) have a precision of 1, the others 0."""
    metrics = coco_metrics([truth([0, 0, 20, 20], [50, 50, 70, 70])], [found([0, 0, 20, 20], scores=[0.9])], 1)
    assert metrics.map == pytest.approx(51 / 101)
    assert metrics.recall == pytest.approx(0.5)


def test_classes_count_alike_and_one_without_boxes_not_at_all() -> None:
    truths = [truth([0, 0, 20, 20], [50, 50, 70, 70], labels=[1, 3])]
    metrics = coco_metrics(truths, [found([0, 0, 20, 20], scores=[0.9])], 3)
    assert metrics.per_class[0] == pytest.approx(1.0)
    assert math.isnan(metrics.per_class[1])
    assert metrics.per_class[2] == 0
    assert metrics.map == pytest.approx(0.5)


def test_crowds_are_neither_found_nor_missed() -> None:
    truths = [truth([0, 0, 20, 20], [50, 50, 90, 90], crowd=[False, True])]
    metrics = coco_metrics(truths, [found([0, 0, 20, 20], [50, 50, 70, 70], scores=[0.5, 0.9])], 1)
    assert metrics.map == pytest.approx(1.0)


def test_nothing_said_is_nothing_found_and_no_truth_is_no_figure() -> None:
    assert coco_metrics([truth([0, 0, 20, 20])], [NOTHING], 1).map == 0
    assert math.isnan(coco_metrics([truth()], [found([0, 0, 5, 5], scores=[0.9])], 1).map)


def test_boxes_are_matched_one_to_one() -> None:
    two = found([0, 0, 20, 20], [0, 0, 20, 20], scores=[0.9, 0.8])
    one = found([0, 0, 20, 20], scores=[0.9])
    assert matched(two, one, 0.99) == 1
    assert matched(one, two, 0.99) == 1
    other = found([0, 0, 20, 20], scores=[0.9], labels=[2])
    assert matched(one, other, 0.5) == 0
    table = iou(np.array([[0.0, 0, 10, 10]]), np.array([[5.0, 0, 15, 10], [20, 20, 30, 30]]))
    assert np.allclose(table, [[1 / 3, 0]])


def test_quality_is_f1() -> None:
    assert quality(truth([0, 0, 20, 20], [50, 50, 70, 70]), found([0, 0, 20, 20], scores=[0.9])) == pytest.approx(2 / 3)
    assert quality(truth(), NOTHING) == 1
    assert quality(truth(), found([0, 0, 20, 20], scores=[0.9])) == 0
    assert quality(truth([0, 0, 20, 20]), found([0, 0, 20, 20], scores=[0.2])) == 0  # not sure enough
