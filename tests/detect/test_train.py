"""A detector learns, goes on exactly after a stop, and is kept and judged."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

import convscale as cs
from convscale.detect.boxes import BoxSplits
from convscale.detect.evaluate import judge
from convscale.detect.loader import BoxLoader, _Samples, _scale_jitter
from convscale.detect.ship import squares
from convscale.detect.train import _whole_side
from convscale.detect.trainer import DetectionTrainer
from convscale.errors import UserError
from convscale.images.preprocess import Preprocessing
from convscale.learn.checkpoint import load_checkpoint, save_checkpoint
from convscale.learn.distributed import Processes
from convscale.learn.job import Job
from convscale.learn.loader import TrainLoader
from convscale.learn.recipe import Recipe
from convscale.learn.recipes import get_recipe
from convscale.learn.schedule import lr_factor
from convscale.learn.train import TrainRun
from convscale.nn.detectors import HEADS
from convscale.ship.box_metrics import Found
from tests.detect.sets import coco_set, cut_off, small_detector, small_spec
from tests.learn.nets import halves_data

SHORT = get_recipe("detect-small").override({"batch_size": 6, "epochs": 2})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> BoxSplits:
    return cs.open_boxes(coco_set(tmp_path_factory.mktemp("set") / "set"))


def trained(data: BoxSplits, output: Path | None = None, **options: object) -> TrainRun:
    given: dict[str, object] = {"recipe": SHORT, "output": output, "workers": 0, **options}
    size = {"image_size": 64, "detector": {"neck_width": 64, "head_depth": 1}}
    return cs.train_detector(small_spec(), data, **size, **given)  # pyright: ignore


@pytest.fixture(scope="module")
def run(data: BoxSplits, tmp_path_factory: pytest.TempPathFactory) -> TrainRun:
    return trained(data, tmp_path_factory.mktemp("runs") / "whole")


def test_a_run_leaves_its_checkpoints_log_and_examples(run: TrainRun, data: BoxSplits) -> None:
    assert run.output is not None
    assert [row["epoch"] for row in run.history] == [1, 2]
    assert run.history[1]["train_loss"] < run.history[0]["train_loss"]
    assert run.best_metric == max(0.0 if row["val_map"] is None else row["val_map"] for row in run.history)
    figures = json.loads((run.output / "detection.json").read_text())
    assert figures["map"] == pytest.approx(run.best_metric)
    assert figures["classes"] == ["red", "green"]
    drawn = sorted(path.name for path in (run.output / "examples").iterdir())
    assert drawn == ["best-1.png", "best-2.png", "worst-1.png", "worst-2.png"]  # of two validation pictures
    kept = load_checkpoint(run.output)
    assert kept.classes == ("red", "green")
    assert kept.meta["splits"] == data.digests()
    assert all(
        torch.equal(a, b) for a, b in zip(kept.net.state_dict().values(), run.net.state_dict().values(), strict=True)
    )
    first, second = (cs.evaluate_detector(net, data, workers=0) for net in (run.net, kept.net))
    assert first.map == second.map
    assert first.n == len(data.test)


@pytest.mark.parametrize("head", HEADS)
def test_a_step_in_half_precision_is_nearly_the_one_in_single(head: str, data: BoxSplits) -> None:
    """Of one step of plain SGD the change of the weights is the gradient: it points the same way, and is another's."""
    plain = {"optimizer": "sgd", "lr": 1e-3, "weight_decay": 0.0, "ema_decay": 0.0, "augment": "none", "epochs": 1}
    losses, changes = [], []
    for precision in ("fp32", "bf16"):
        torch.manual_seed(3)
        detector = small_detector(head)
        before = {name: value.detach().clone() for name, value in detector.named_parameters()}
        recipe = SHORT.override({**plain, "batch_size": len(data.train), "precision": precision})
        run = cs.train_detector(detector, data, recipe=recipe, workers=0)
        assert run.settings.precision == precision
        losses.append(run.history[0]["train_loss"])
        after = dict(run.net.named_parameters())
        changes.append(torch.cat([(after[name].detach() - old).flatten() for name, old in before.items()]).double())
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert torch.cosine_similarity(*changes, dim=0) > 0.98
    assert float(changes[1].norm() / changes[0].norm()) == pytest.approx(1, abs=0.05)


def test_a_stopped_run_goes_on_to_the_bit(run: TrainRun, data: BoxSplits, tmp_path: Path) -> None:
    """Stopped in the middle of the second epoch, the run ends with the weights of one that was not stopped."""
    steps = 0

    def stop(event: dict) -> None:
        nonlocal steps
        steps += event["kind"] == "step"
        if event["kind"] == "step" and steps == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = trained(data, tmp_path / "run", progress=stop)
    assert not stopped.finished
    resumed = trained(data, tmp_path / "run", resume=True)
    assert resumed.finished
    states = zip(run.net.state_dict().values(), resumed.net.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)
    assert [row["train_loss"] for row in resumed.history] == [row["train_loss"] for row in run.history]


def test_a_resumed_detector_is_the_one_that_was_begun(run: TrainRun, data: BoxSplits, tmp_path: Path) -> None:
    assert run.output is not None
    output = Path(shutil.copytree(run.output, tmp_path / "run"))
    resumed = {"recipe": SHORT, "output": output, "workers": 0, "resume": True}
    whole = cs.train_detector(small_spec(), data, **resumed)  # pyright: ignore
    assert whole.preprocessing.width == 64
    assert whole.net.detector_spec == run.net.detector_spec  # nobody asked for 64 px and a narrow neck again
    for asked, said in (
        ({"image_size": 96}, "image_size 64, not 96"),
        ({"head": "retinanet"}, "head fcos, not retinanet"),
        ({"detector": {"nms_threshold": 0.3}}, "nms_threshold 0.6, not 0.3"),
        ({"detector": {"head_depth": 2}}, "head_depth 1, not 2"),
    ):
        with pytest.raises(cs.UserError, match=f"run was trained with {said}; a resumed run keeps it"):
            cs.train_detector(small_spec(), data, **{**resumed, **asked})  # pyright: ignore
    with pytest.raises(cs.UserError, match="was trained with image_size 64, not 96"):
        cs.train_detector(small_detector(image_size=96), data, **resumed)  # pyright: ignore


def test_validation_pictures_that_can_not_be_decoded_are_told(tmp_path: Path) -> None:
    split = cs.open_boxes(coco_set(tmp_path)).train.subset(range(4), "validation")
    events: list[Any] = []
    trainer = DetectionTrainer.__new__(DetectionTrainer)
    trainer.net, trainer.ema, trainer._told = small_detector(), None, set()
    trainer.boxes, trainer.eval_batch = split, 2
    trainer.job = cast(
        Job,
        SimpleNamespace(
            processes=Processes(),
            device=torch.device("cpu"),
            preprocessing=SimpleNamespace(width=64),
            settings=SimpleNamespace(precision="fp32"),
            loader=SimpleNamespace(workers=0),
            max_bad_rate=0.01,
            progress=events.append,
        ),
    )
    for count in (1, 2):
        broken = Path(split.paths[count])
        broken.write_bytes(broken.read_bytes()[:300])
        if count == 1:
            result = trainer._validate()
            assert len(result.bad) == 1
            assert str(broken) in result.bad[0]
            assert events == [{"kind": "note", "text": f"left out: {result.bad[0]}"}]
    with pytest.raises(cs.UserError, match=r"2 of 4 validation images \(50.0%\) can not be decoded"):
        trainer._validate()


def test_batches_depend_on_the_seed_alone(data: BoxSplits) -> None:
    def batches(workers: int, start: int = 0, seed: int = 0) -> list[torch.Tensor]:
        loader = BoxLoader(data.train, SHORT, image_size=64, fill=(1, 2, 3), seed=seed, workers=workers)
        found = list(loader.batches(1, start))
        return [
            torch.cat([each.images.flatten().float(), *(t["boxes"].flatten() for t in each.targets)]) for each in found
        ]

    whole = batches(0)
    assert all(map(torch.equal, whole, batches(2)))
    assert torch.equal(whole[2], batches(0, start=2)[0])
    assert not torch.equal(whole[0], batches(0, seed=1)[0])


def test_augmented_boxes_stay_on_their_squares(data: BoxSplits) -> None:
    """The colour of what is inside a box after scaling, cropping and flipping is its class's."""
    loader = BoxLoader(data.train, SHORT, image_size=64, fill=(128, 128, 128), workers=0)
    seen = 0
    for epoch in range(3):
        for batch in loader.batches(epoch):
            for image, target in zip(batch.images, batch.targets, strict=True):
                for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
                    x1, y1, x2, y2 = box
                    if x2 - x1 < 8 or y2 - y1 < 8 or len(target["labels"]) > 1:
                        continue  # squares of one picture may lie on each other
                    inner = image[int(y1) + 2 : int(y2) - 2, int(x1) + 2 : int(x2) - 2].float().mean((0, 1))
                    assert inner.argmax() == label - 1, (box, label)
                    assert inner[label - 1] > 200
                    seen += 1
    assert seen > 20


@pytest.mark.parametrize("size", [(400, 2), (2, 400)])
def test_a_long_picture_made_small_keeps_a_pixel(size: tuple[int, int]) -> None:
    jitter = _scale_jitter(SHORT, 64, (0, 0, 0)).transforms[0]
    for seed in range(3):
        torch.manual_seed(seed)
        assert min(jitter(torch.zeros(3, *size, dtype=torch.uint8)).shape) == 1


def test_what_makes_samples_can_be_sent_to_processes(data: BoxSplits) -> None:
    samples = _Samples(data.train, SHORT, 64, (1, 2, 3), 0, 1)
    samples.chunks = [[0, 1]]
    sent = pickle.loads(pickle.dumps(samples))
    assert torch.equal(sent[0].images, samples[0].images)
    assert all(map(torch.equal, (t["labels"] for t in sent[0].targets), (t["labels"] for t in samples[0].targets)))


@pytest.mark.parametrize("name", ["detect-small", "detect-1x"])
def test_the_recipes_of_detection_set_nothing_that_is_not_read(name: str) -> None:
    assert _whole_side(get_recipe(name)) is None


def test_the_published_schedule_drops_at_eight_and_eleven() -> None:
    recipe = get_recipe("detect-1x")
    at = [lr_factor(recipe, epoch / 12, 12) for epoch in (1, 7.99, 8, 10.99, 11, 11.99)]
    assert at == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"augment": "resized-crop"}, "augment resized-crop knows no boxes"),
        ({"mixup": 0.2}, "progressive, mixup, cutmix and policy know no boxes"),
        ({"freeze_epochs": 1}, "freeze_epochs is 1; a detector has no classifier to train alone"),
        ({"erase": 0.2}, "erase is 0.2, which does nothing for a detector; leave it out, or at 0.0"),
        ({"grad_checkpointing": True}, "grad_checkpointing is True, which does nothing for a detector"),
        ({"loss": "focal"}, "loss is focal, which does nothing for a detector; leave it out, or at cross-entropy"),
        ({"distill_kl": 1.0}, "distill_kl is 1.0, which does nothing for a detector"),
        ({"schedule": "multistep", "decay_at": "11,8"}, "decay_at must be ascending epochs"),
        ({"scale_low": 2.0, "scale_high": 1.0}, "scale_low 2 is above scale_high 1"),
        ({"batch_size": 100}, "batch_size 100 is larger than the train set"),
    ],
)
def test_a_recipe_that_does_not_go_is_told(data: BoxSplits, change: dict[str, object], said: str) -> None:
    with pytest.raises(cs.UserError, match=said):
        trained(data, **change)


def test_pictures_that_can_not_be_read_are_left_out_of_what_is_judged(tmp_path: Path) -> None:
    file = coco_set(tmp_path / "set", 20)
    strict, lenient = (cs.open_boxes(file, max_bad_rate=rate) for rate in (0.01, 0.2))
    train, detector = strict.train, small_detector().eval()
    gone = [at for at, boxes in enumerate(train.boxes) if len(boxes)][:2]
    left = train.box_count - sum(len(train.boxes[at]) for at in gone)
    cut_off(*(train.paths[at] for at in gone))
    said = [
        None if at in gone else Found(boxes=boxes, scores=np.ones(len(boxes), np.float32), labels=labels)
        for at, (boxes, labels) in enumerate(zip(train.boxes, train.labels, strict=True))
    ]
    ev = judge(train, said, seconds=1.0)
    assert (ev.map, ev.recall, ev.n, ev.boxes) == (1.0, 1.0, 14, left)
    assert np.flatnonzero(np.isnan(ev.quality)).tolist() == gone
    assert set(ev.worst(100)) == set(ev.best(100)) == set(range(16)) - set(gone)
    refused = r"2 of 16 train images \(12.5%\) can not be decoded, at most 1.0% may be"
    with pytest.raises(UserError, match=refused):
        cs.evaluate_detector(detector, strict, split="train", workers=0)
    with pytest.raises(UserError, match=refused):
        squares(train, 64, (0, 0, 0))
    ev = cs.evaluate_detector(detector, lenient, split="train", workers=0)
    assert (ev.n, ev.boxes, len(ev.bad)) == (14, left, 2)
    told: list[str] = []
    images, truths = squares(train, 64, (0, 0, 0), max_bad_rate=0.2, tell=told.append)
    assert (len(images), len(truths), len(told)) == (14, 14, 2)


def test_what_does_not_fit_the_data_is_told(data: BoxSplits, tmp_path: Path) -> None:
    with pytest.raises(cs.UserError, match="the detector has 3 classes, the data 2"):
        cs.train_detector(small_detector(num_classes=3), data, workers=0)
    with pytest.raises(cs.UserError, match="does not say its image size; give image_size"):
        cs.evaluate_detector(torch.nn.Identity(), data)
    jittered = Recipe(name="x", augment="scale-jitter", batch_size=2)
    with pytest.raises(cs.UserError, match="is for pictures with boxes"):
        TrainLoader(halves_data().train, jittered, image_size=8)
    background = data.train.subset(np.flatnonzero([len(each) == 0 for each in data.train.boxes]))
    nothing = dataclasses.replace(data, train=background)
    with pytest.raises(cs.UserError, match="the train set has no box"):
        trained(nothing)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"head_depth": 2}, r"is of another architecture: it has head\.\S+ and \d+ more"),
        ({"neck_width": 96}, r"backbone\.neck\.\S+ is \(96, .*\), the network's \(64, .*\)"),
    ],
)
def test_a_start_from_another_detector_is_told_in_one_line(
    data: BoxSplits, tmp_path: Path, options: dict[str, object], said: str
) -> None:
    how = Preprocessing(image_size=64, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3, crop_pct=1.0)
    save_checkpoint(tmp_path / "other", small_detector(**options), classes=data.classes, preprocessing=how)
    with pytest.raises(cs.UserError, match=said) as caught:
        trained(data, init=tmp_path / "other")
    assert "\n" not in str(caught.value)


def test_a_recipe_with_a_classifier_s_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="puts the head ml_decoder on a classifier; a detector has heads of its own"):
        cs.train_detector("resnet18", tmp_path / "none", recipe="ml-decoder")
