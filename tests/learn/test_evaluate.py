"""Evaluation against hand calculation and scikit-learn-free definitions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from convscale.errors import UserError
from convscale.images.preprocess import Preprocessing
from convscale.images.sources import open_dataset
from convscale.images.splits import ArraySplit
from convscale.learn.checkpoint import load_checkpoint
from convscale.learn.distributed import Processes
from convscale.learn.evaluate import best_thresholds, evaluate, predict_split
from convscale.learn.probe import solve_head
from convscale.learn.recipe import Recipe
from convscale.learn.settings import choose_settings
from convscale.learn.train import train
from convscale.learn.validate import validate
from convscale.networks.pictures import preprocessing_of
from tests.learn.nets import halves_data, small_net

PLAIN = Preprocessing(image_size=1, channels=3, mean=(0, 0, 0), std=(1 / 255,) * 3, crop_pct=1.0)


class Colours(nn.Module):
    """Logits are the three channels' values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


def _split(logits: list[list[int]], labels: torch.Tensor) -> ArraySplit:
    pixels = torch.tensor(logits, dtype=torch.uint8).view(-1, 1, 1, 3)
    return ArraySplit(split="test", classes=("a", "b", "c"), labels=labels, channels=3, pixels=pixels)


def test_outputs_that_are_no_numbers_are_an_error_with_the_image() -> None:
    class Divides(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1) / (x.flatten(1).sum(1, keepdim=True))  # 0 / 0 for a black image

    split = _split([[2, 1, 0], [0, 0, 0], [1, 0, 2]], torch.tensor([0, 1, 0]))
    with pytest.raises(UserError, match=r"not finite numbers for 1 of 3 images of the test split \(first: .*1"):
        evaluate(Divides(), split, PLAIN)


def test_one_label_by_hand() -> None:
    split = _split([[2, 1, 0], [0, 3, 0], [1, 0, 2], [4, 0, 0], [0, 0, 1]], torch.tensor([0, 1, 0, 1, 2]))
    net = Colours().train()
    done: list[int] = []
    result = evaluate(net, split, PLAIN, batch_size=2, on_images=done.append)
    assert done == [0, 2, 4, 5]
    assert net.training
    assert (result.n, result.top1, result.top5) == (5, 0.6, None)
    assert result.baseline == 0.4  # two of five are a
    assert "(always the most frequent class: 40.00%)" in result.describe()
    # Wilson's interval of 3 of 5, by his formula: (3 + z^2 / 2 +- z sqrt(6 / 5 + z^2 / 4)) / (5 + z^2)
    assert (result.top1_low, result.top1_high) == pytest.approx((0.2307, 0.8824), abs=1e-4)
    assert "top-1 60.00% (95 % interval 23.07% to 88.24%) on 5 images" in result.describe()
    from_train = evaluate(net, split, PLAIN, train_labels=torch.tensor([2, 2, 0]))
    assert (from_train.baseline, from_train.top1) == (0.2, 0.6)  # one of five is c
    assert result.confusion.tolist() == [[1, 0, 1], [1, 1, 0], [0, 0, 1]]
    assert result.per_class == pytest.approx((0.5, 0.5, 1.0))
    assert [(miss.index, miss.true, miss.predicted) for miss in result.wrong] == [(3, 1, 0), (2, 0, 2)]
    assert result.wrong[0].confidence == pytest.approx(torch.tensor([4.0, 0, 0]).softmax(0)[0].item())
    confidence = torch.tensor([[2.0, 1, 0], [0, 3, 0], [1, 0, 2], [4, 0, 0], [0, 0, 1]]).softmax(1).max(1).values
    # bins of width 1/15: 0.576 stands alone, 0.665 twice (one right), 0.909 and 0.965 alone
    bins: dict[int, list[tuple[float, float]]] = {}
    for value, right in zip(confidence.tolist(), [1.0, 1.0, 0.0, 0.0, 1.0], strict=True):
        bins.setdefault(int(value * 15), []).append((value, right))
    expected = sum(abs(sum(v - r for v, r in entries)) for entries in bins.values()) / 5
    assert result.calibration_error == pytest.approx(expected, abs=1e-5)


def test_several_labels_by_hand() -> None:
    labels = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]])
    result = evaluate(Colours(), _split([[4, 1, 0], [3, 2, 0], [2, 3, 0], [1, 0, 0]], labels), PLAIN)
    # class a in the order of its score: right, wrong, right, wrong -> (1 + 2/3) / 2; class b: right, right -> 1
    assert result.per_class[:2] == pytest.approx((5 / 6, 1.0))
    assert result.per_class[2] != result.per_class[2]  # no image: NaN
    assert result.mean_average_precision == pytest.approx(11 / 12)
    assert result.top1 == 0.5
    assert result.baseline == 0.5  # two of four have a, two b, none c
    assert "mAP 91.67% on 4 images (the same answer for all: 50.00%)" in result.describe()


class Eleven(nn.Module):
    """Class 0 is the most probable, then 1, and so on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -torch.arange(11.0).expand(len(x), 11)


@pytest.mark.parametrize("several", [False, True])
def test_top5_is_told_above_ten_classes(several: bool) -> None:
    labels = torch.tensor([0, 4, 5, 10])
    split = dataclasses.replace(
        _split([[0, 0, 0]] * 4, torch.eye(11)[labels] if several else labels), classes=tuple("abcdefghijk")
    )
    result = evaluate(Eleven(), split, PLAIN)
    assert result.top5 == 0.5
    assert result.top1 == 0.25


def test_thresholds_reach_the_best_f1() -> None:
    logits = torch.tensor([[3.0, 0.1], [1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]])
    labels = torch.tensor([[1.0, 0], [0, 0], [1, 0], [0, 0]])
    first, second = best_thresholds(logits, labels)
    assert torch.tensor(1.0).sigmoid() < first < torch.tensor(2.0).sigmoid()
    assert second == 0.5


def _pictures(place: Path) -> Path:
    """Class folders r, s, t of plain pictures; so many of a split's are of the class whose channel is brightest."""
    for split, right, wrong in (("train", 4, 0), ("val", 2, 2), ("test", 1, 0)):
        for label, name in enumerate("rst"):
            (place / split / name).mkdir(parents=True)
            for number in range(right + (wrong if label == 2 else 0)):
                pixels = np.zeros((8, 8, 3), np.uint8)
                pixels[..., label if number < right else 0] = 100 + number
                Image.fromarray(pixels).save(place / split / name / f"{number}.png")
    return place


def test_a_path_or_an_opened_set_is_evaluated_on(tmp_path: Path) -> None:
    place = _pictures(tmp_path)
    for given in (place, str(place), open_dataset(place)):
        test, validation, everything = (
            evaluate(Colours(), given, PLAIN, part=part) for part in (None, "validation", "all")
        )
        assert (test.n, test.top1, test.classes) == (3, 1.0, ("r", "s", "t"))
        assert (validation.n, validation.top1) == (8, 0.75)
        assert validation.baseline == 0.25  # always the first of train's, of which all are as frequent
        assert (everything.n, everything.top1) == (23, 21 / 23)
    with pytest.raises(UserError, match="part is 'test', but one split is given already; leave it out"):
        evaluate(Colours(), open_dataset(place).test, PLAIN, part="test")
    with pytest.raises(UserError, match="part 'val' is unknown"):
        evaluate(Colours(), place, PLAIN, part="val")


def test_a_trained_network_knows_its_preprocessing() -> None:
    """Small images have statistics of their own, which no architecture knows."""
    data = halves_data()
    run = train(small_net(), data, recipe=Recipe(name="x", epochs=1, batch_size=32, precision="fp32", layout="nchw"))
    known, told = evaluate(run.net, data), evaluate(run.net, data.test, run.preprocessing)
    assert (known.loss, known.top1) == (told.loss, told.top1)
    assert preprocessing_of(run.net) == run.preprocessing
    assert preprocessing_of(run.net, 24) == dataclasses.replace(run.preprocessing, image_size=24)
    other = dataclasses.replace(run.preprocessing, mean=(0.0,), std=(1.0,))
    assert evaluate(run.net, data, other).loss != known.loss


@pytest.mark.parametrize("form", ["set", "split"])
def test_labels_of_other_classes_are_refused(tmp_path: Path, form: str) -> None:
    """By their numbers alone they would be right or wrong by accident."""
    data, turned = halves_data(), ("left", "dark", "top")
    recipe = Recipe(name="x", epochs=1, batch_size=32, precision="fp32", layout="nchw")
    run = train(small_net(), data, recipe=recipe, output=tmp_path / "run")
    net = load_checkpoint(tmp_path / "run", net=small_net()).net
    parts = {name: dataclasses.replace(getattr(data, name), classes=turned) for name in ("train", "validation", "test")}
    other = dataclasses.replace(data, **parts, classes=turned)
    for each in (run.net, net):
        assert evaluate(each, data if form == "set" else data.test).n == 30
        with pytest.raises(UserError, match=r"data's classes \['left', 'dark', 'top'\] are not the network's \['dark'"):
            evaluate(each, other if form == "set" else other.test)


def test_what_is_no_classifier_is_told_in_one_line(tmp_path: Path) -> None:
    detector = Colours()
    detector.detector_spec = object()
    with pytest.raises(UserError, match="the network is a detector; evaluate_detector judges its boxes"):
        evaluate(detector, tmp_path, PLAIN)
    with pytest.raises(UserError, match="net is 3; it must be a path"):
        evaluate(3, tmp_path)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r"checkpoint .*nothing does not exist"):
        evaluate(tmp_path / "nothing", tmp_path)


def test_bad_input() -> None:
    split = _split([[1, 0, 0]], torch.tensor([0]))
    with pytest.raises(UserError, match="network has 3 classes, the data 2"):
        evaluate(Colours(), dataclasses.replace(split, classes=("a", "b")), PLAIN)
    with pytest.raises(UserError, match="test split is empty"):
        evaluate(Colours(), split.subset([]), PLAIN)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"precision": "float32"}, "precision 'float32' is unknown"),
        ({"precision": "int8"}, "precision 'int8' is unknown"),
        ({"precision": 16}, "precision 16 is unknown"),
        ({"batch_size": 0}, "batch_size is 0; it must be a whole number of at least 1"),
        ({"batch_size": True}, "batch_size is True; it must be"),
        ({"batch_size": "8"}, "batch_size is '8'; it must be"),
        ({"batch_size": float("nan")}, "batch_size is nan; it must be"),
        ({"workers": -1}, "workers is -1; it must be"),
        ({"workers": 1.5}, "workers is 1.5; it must be"),
        ({"device": "tpu"}, "device 'tpu' is none of this machine's"),
    ],
)
def test_options_of_the_wrong_kind(option: dict[str, Any], message: str) -> None:
    """``precision='amp'`` was a KeyError, and so was any other unknown one; a text for a number a TypeError."""
    with pytest.raises(UserError, match=message):
        evaluate(Colours(), _split([[1, 0, 0]], torch.tensor([0])), PLAIN, **option)


@pytest.mark.parametrize(("precision", "dtype"), [("amp", torch.bfloat16), ("bf16", torch.bfloat16), ("fp32", None)])
def test_precision_is_what_runs(precision: str, dtype: torch.dtype | None) -> None:
    """A matrix multiplication under autocast gives the half type, and the logits of the rounded operands."""
    net, seen = nn.Sequential(nn.Flatten(), nn.Linear(3, 3)), []
    net.register_forward_hook(lambda _module, _inputs, outputs: seen.append(outputs.dtype))
    evaluate(net, _split([[3, 1, 0], [0, 5, 9]], torch.tensor([0, 2])), PLAIN, precision=precision)
    assert seen == [dtype or torch.float32]


def test_a_network_moves_outside_of_inference_mode() -> None:
    class Mover(nn.Module):
        """Moved there, its weights could not be trained any more."""

        def __init__(self) -> None:
            super().__init__()
            self.body, self.moves = small_net(), 0

        def to(self, *args: Any, **kwargs: Any) -> Any:
            assert not torch.is_inference_mode_enabled()
            self.moves += 1
            return super().to(*args, **kwargs)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert torch.is_inference_mode_enabled()
            return self.body(x)

    net, data = Mover().train(), halves_data()
    plain = Preprocessing(image_size=12, channels=1, mean=(0.0,), std=(1.0,), crop_pct=1.0)
    logits, _, _, _ = predict_split(net, data.test, plain)
    assert (net.moves, net.training) == (2, True)
    with torch.no_grad():
        assert torch.equal(logits, net.eval().body(plain.normalize(data.test.images)))


def test_frozen_norms_stay_in_eval_mode() -> None:
    """Evaluating, solving the head and measuring settings put every submodule back into its own mode.

    ``net.train(net.training)`` un-froze batch norms that a user had put into eval mode.
    """
    data = halves_data()
    plain = Preprocessing(image_size=12, channels=1, mean=(0.0,), std=(1.0,), crop_pct=1.0)
    net = _Headed().train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    before = [module.training for module in net.modules()]
    assert set(before) == {True, False}
    evaluate(net, data.test, plain)
    assert [module.training for module in net.modules()] == before
    validate(
        net,
        data.validation,
        plain,
        processes=Processes(),
        device=torch.device("cpu"),
        precision="fp32",
        workers=0,
    )
    assert [module.training for module in net.modules()] == before
    solve_head(net, data.train, data.validation, plain, device=torch.device("cpu"))
    assert [module.training for module in net.modules()] == before
    choose_settings(net, Recipe(name="x"), plain.normalize(data.train.images[:4]), seconds_each=0)
    assert [module.training for module in net.modules()] == before
    with pytest.raises(UserError, match="3 classes, the data 2"):
        evaluate(net, dataclasses.replace(data.test, classes=("a", "b")), plain)
    assert [module.training for module in net.modules()] == before


def test_a_teacher_keeps_its_modes() -> None:
    """A module that teaches is asked in eval mode and comes back as it was."""
    modes: list[bool] = []
    teacher = small_net().train()
    teacher[1].eval()
    before = [module.training for module in teacher.modules()]
    teacher.register_forward_hook(lambda module, _inputs, _outputs: modes.append(module.training))
    recipe = Recipe(name="x", epochs=1, batch_size=32, augment="none", precision="fp32", layout="nchw")
    train(small_net(), halves_data(), recipe=recipe, teacher=teacher)
    assert modes == [False] * 4  # a look before anything is written, and three steps
    assert [module.training for module in teacher.modules()] == before


def test_training_and_evaluation_at_a_rectangle(tmp_path: Path) -> None:
    """The network sees (height, width), a quarter smaller in the first epoch; checkpoint and resumed run keep it."""
    seen: list[tuple[int, ...]] = []
    net = small_net()
    net.register_forward_pre_hook(lambda _module, inputs: seen.append(tuple(inputs[0].shape[2:])))
    recipe = Recipe(
        name="x", epochs=2, batch_size=32, augment="shift-crop", precision="fp32", layout="nchw", progressive=0.75
    )
    data, folder = halves_data(), tmp_path / "run"
    run = train(net, data, recipe=recipe, output=folder, image_size="16x8")
    assert seen == [(12, 8)] * 3 + [(16, 8)] + [(16, 8)] * 4
    loaded = load_checkpoint(folder, net=small_net())
    assert loaded.preprocessing.image_size == run.preprocessing.image_size == (16, 8)
    result = evaluate(loaded.net, data.test, loaded.preprocessing)
    pixels = torch.stack([run.preprocessing.resize(image) for image in data.test.images])
    with torch.no_grad():
        predicted = run.net(run.preprocessing.normalize(pixels)).argmax(1)
    assert result.top1 == pytest.approx((predicted == data.test.labels).float().mean().item())
    resumed = train(small_net(), data, output=folder, resume=True, epochs=3)
    assert resumed.recipe.image_size == (16, 8)
    assert "resumed with another epochs: 3 instead of 2" in resumed.notes
    assert not any("image_size" in note for note in resumed.notes)


class _Headed(nn.Module):
    """The small network with timm's names for its parts."""

    def __init__(self) -> None:
        super().__init__()
        *body, head = small_net()
        self.body, self.head = nn.Sequential(*body), head

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))
