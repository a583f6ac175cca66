"""A teacher's say: USI's loss by hand, features, and outputs kept on the disk."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import timm
import torch
from torch import nn

import convscale as cs
from convscale.errors import UserError
from convscale.files import MARK
from convscale.images.preprocess import Preprocessing
from convscale.learn.imitate import Imitation, TeacherCache, Where
from convscale.learn.loss import similarity_loss
from convscale.learn.recipe import Recipe
from convscale.learn.teacher import check_teacher
from tests.learn.nets import halves_data, small_net

PLAIN = {
    "augment": "shift-crop",
    "batch_size": 24,
    "lr": 5e-3,
    "label_smoothing": 0.0,
    "precision": "fp32",
    "layout": "nchw",
}
HERE = Where(epoch=0, indices=torch.arange(2))


class Fixed(nn.Module):
    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits), requires_grad=False)
        self.asked = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        return self.logits[: len(x)]


def test_usi_by_hand() -> None:
    """Teacher (.8, .2) and (.5, .5), student (.5, .5) twice: KL = .8 log 1.6 + .2 log .4 for the first and 0 for the
    second, mean of the batch, five times.
    """
    teacher = Fixed([[float(np.log(0.8)), float(np.log(0.2))], [0.0, 0.0]])
    recipe = Recipe(name="x", distill_kl=5.0, distill_temperature=1.0)
    imitation = Imitation(small_net(2), teacher, recipe, multilabel=False)
    found = imitation.added(torch.tensor(0.7), torch.zeros(2, 2), torch.zeros(2, 1, 12, 12), HERE)
    assert found.item() == pytest.approx(0.7 + 5 * (0.8 * np.log(1.6) + 0.2 * np.log(0.4)) / 2, rel=1e-6)


def test_similarity_by_hand() -> None:
    """Student: two equal images, similarities (1, 1) / sqrt 2 in each row. Teacher: unlike ones, (1, 0) and (0, 1)."""
    same, unlike = torch.ones(2, 3), torch.eye(2, 5)
    half = 2**-0.5
    expected = ((1 - half) ** 2 + half**2) / 2
    assert similarity_loss(same, unlike).item() == pytest.approx(expected, rel=1e-6)
    assert similarity_loss(unlike, 7 * unlike).item() == pytest.approx(0, abs=1e-12)


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    torch.manual_seed(1)
    run = cs.train(small_net(), halves_data(), recipe="small-adamw", epochs=10, **PLAIN)
    return run.net.eval().requires_grad_(False)


def test_features_of_timms_teacher() -> None:
    """Student ours, teacher timm's; afterwards no hook is left on either."""
    torch.manual_seed(0)
    timms = timm.create_model("resnet10t", num_classes=3, in_chans=1).eval().requires_grad_(False)
    data = halves_data(48)
    net = small_net()
    options = {**PLAIN, "distill_features": 10.0, "distill_kl": 1.0}
    run = cs.train(net, data, recipe="small-adamw", epochs=1, teacher=timms, **options)
    assert np.isfinite(run.history[0]["train_loss"])
    assert not any(module._forward_pre_hooks for module in (*net.modules(), *timms.modules()))


def test_what_is_refused_leaves_no_hook() -> None:
    """A teacher without a classifier, and a recipe that its data does not go with."""
    net, teacher, options = small_net(), small_net(), {**PLAIN, "distill_features": 1.0}
    bare = nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for other, more, said in ((bare, {}, "has none"), (teacher, {"accumulate": 9}, "accumulate 9 is more")):
        with pytest.raises(UserError, match=said):
            cs.train(net, halves_data(), recipe="small-adamw", epochs=1, teacher=other, **{**options, **more})
        assert not any(module._forward_pre_hooks for module in (*net.modules(), *teacher.modules()))


def test_cached_outputs_train_the_same_bits(teacher: nn.Module, tmp_path: Path) -> None:
    """With the cache written, with it read, and without: the same weights; a second student asks nothing."""
    weights, asked = [], []
    counted = Counted(teacher)
    for cache in (None, tmp_path / "kept", tmp_path / "kept"):
        torch.manual_seed(0)
        counted.asked = 0
        run = cs.train(
            small_net(),
            halves_data(),
            recipe="small-adamw",
            epochs=2,
            teacher=counted,
            teacher_cache=cache,
            distill_kl=5.0,
            distill_temperature=1.0,
            **PLAIN,
        )
        weights.append(torch.cat([value.flatten().float() for value in run.net.state_dict().values()]))
        asked.append(counted.asked)
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])
    assert asked == [8, 8, 0]
    (place,) = (tmp_path / "kept").iterdir()
    table = np.load(place / "epoch-00001.npy")
    assert table.shape == (96, 3)
    assert np.isfinite(table).all()


class Counted(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.asked = net, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        return self.net(x)


def test_a_row_that_was_cut_short_is_asked_again(tmp_path: Path) -> None:
    teacher = Fixed([[1.0, 2.0], [3.0, 4.0]])
    cache = TeacherCache(tmp_path, {"a": 1}, 2)
    first = cache.outputs(teacher, torch.zeros(2, 1), HERE)
    table = np.load(next(tmp_path.glob("*/epoch-00001.npy")), mmap_mode="r+")
    table[1, 0] = np.nan
    table.flush()
    again = TeacherCache(tmp_path, {"a": 1}, 2)
    assert torch.equal(again.outputs(teacher, torch.zeros(2, 1), HERE), first)
    assert (again.asked, again.found) == (2, 0)
    other = TeacherCache(tmp_path, {"a": 2}, 2)
    assert other.folder != cache.folder
    header = b"{'descr': '<f4', 'shape': (2, 2".ljust(117) + b"\n"
    for damaged in (b"rubbish", b"", b"\x93NUMPY\x01\x00\x76\x00" + header):
        next(cache.folder.glob("epoch*")).write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged"):
            TeacherCache(tmp_path, {"a": 1}, 2).outputs(teacher, torch.zeros(2, 1), HERE)


SMALL_DISK = """
import sys
from pathlib import Path
import torch
from convscale.errors import UserError
from convscale.learn.imitate import TeacherCache, Where
cache = TeacherCache(Path(sys.argv[1]), {"a": 1}, 20_000)
try:
    cache.outputs(lambda inputs: torch.zeros(2, 50), torch.zeros(2, 1), Where(epoch=0, indices=torch.arange(2)))
except UserError as error:
    print(error, list(cache.folder.glob(".*")))
"""


def test_a_cache_on_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """4 MB of outputs on a disk of 1 MB: a page that is mapped and has no place on the disk kills the process."""
    mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=1m none "$0" && exec "$@"', str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run([*mount, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    command = [*mount, sys.executable, "-c", SMALL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        r"no space left on the disk of \S+ while writing epoch-00001.npy; free some .* \[\]\n", done.stdout
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_cache": "kept"}, "but there is no teacher"),
        ({"distill_kl": 5.0}, "distill_kl is 5, but there is no teacher"),
        ({"teacher": small_net(), "teacher_cache": "kept", "mixup": 0.2}, "set mixup and cutmix to 0"),
        ({"teacher": small_net(), "teacher_cache": "kept", "distill_features": 1.0}, "keeps outputs alone"),
        ({"teacher": small_net(), "teacher_cache": "kept", "accumulate": 9}, "accumulate 9 is more than the . batches"),
    ],
)
def test_bad_input_is_one_line(options: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        cs.train(small_net(), halves_data(), recipe="small-adamw", epochs=1, **PLAIN, **options)
    assert not list(tmp_path.iterdir())


class Pair(nn.Module):
    """Gives two tensors."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (small_net(5), r"^the teacher gives \(2, 5\) for two images; the data has 3 classes, so it must be \(2, 3\)$"),
        (Pair(), r"^the teacher gives a tuple; it must give a tensor of logits, \(N, 3\)$"),
        (
            small_net(channels=3),
            r"^the teacher can not be run on the student's inputs, \(2, 1, 12, 12\): .*3 channels, but got 1",
        ),
    ],
)
def test_a_teacher_of_something_else_is_told_before_a_run_is_replaced(
    teacher: nn.Module, message: str, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / MARK).write_text("")
    (tmp_path / "run" / "log.jsonl").write_text("precious")
    with pytest.raises(UserError, match=message) as caught:
        cs.train(
            small_net(), halves_data(), epochs=1, teacher=teacher, output=tmp_path / "run", overwrite=True, **PLAIN
        )
    assert "\n" not in str(caught.value)
    assert (tmp_path / "run" / "log.jsonl").read_text() == "precious"
    assert all(module.training for module in teacher.modules())


def _half_teacher() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 3)).half()


def test_a_half_teacher_of_a_float32_run_is_told_before_a_run_is_replaced(tmp_path: Path) -> None:
    """It was asked in its own type, and failed in the first step, behind the emptied folder."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / MARK).write_text("")
    (tmp_path / "run" / "log.jsonl").write_text("precious")
    options = {**PLAIN, "output": tmp_path / "run", "overwrite": True}
    with pytest.raises(UserError, match=r"^the teacher can not be run on the student's inputs, .*: .*dtype"):
        cs.train(small_net(), halves_data(), epochs=1, teacher=_half_teacher(), **options)
    assert (tmp_path / "run" / "log.jsonl").read_text() == "precious"


def test_a_half_teacher_of_a_half_run_is_asked_under_its_autocast() -> None:
    options = {**PLAIN, "precision": "bf16"}
    run = cs.train(small_net(), halves_data(), epochs=1, teacher=_half_teacher(), **options)
    assert np.isfinite(run.history[0]["train_loss"])


def test_a_look_compiles_nothing() -> None:
    """A teacher compiled for the look's two images took all later batches with dynamic shapes."""
    compiled: list[tuple[int, ...]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        compiled.extend(tuple(each.shape) for each in inputs if isinstance(each, torch.Tensor) and each.ndim == 4)
        return graph

    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    teacher = cast(nn.Module, torch.compile(net, backend=backend))
    plain = Preprocessing(image_size=12, channels=1, mean=(0.5,), std=(0.5,))
    check_teacher(teacher, 3, plain, torch.device("cpu"))
    assert compiled == []
    with torch.no_grad():
        teacher(torch.zeros(24, 1, 12, 12))
    assert (24, 1, 12, 12) in compiled


def test_a_look_at_a_teacher_leaves_no_trace() -> None:
    """Of its modes, its attributes and the random numbers that come next."""

    class Drawing(Counted):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + torch.rand(3, device=x.device)

    teacher = Drawing(small_net())
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    check_teacher(teacher, 3, Preprocessing(image_size=12, channels=1, mean=(0.5,), std=(0.5,)), torch.device("cpu"))
    assert torch.equal(torch.rand(2), expected)
    assert (teacher.asked, teacher.training) == (0, True)
