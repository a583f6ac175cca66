"""Runs as a list, and two beside each other: counted by hand, and by scipy."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from convscale.errors import UserError
from convscale.machine import code_commit
from convscale.show.comparison import compare, verdict
from convscale.show.predictions import FILE, Predictions, read_predictions
from convscale.show.runs import runs_below, whole_run
from convscale.show.train_report import write_train_report
from convscale.stats import mcnemar

COLUMNS = 200
OLD = Path(__file__).parent.parent / "old_files" / "v0_1"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A fit, an interrupted fit, a training and an artefact of version 0.1."""
    top = tmp_path / "runs"
    for name in ("fits/finished", "fits/interrupted", "trainings/finished", "artefacts/openvino_fp32"):
        shutil.copytree(OLD / name, top / name)
    return top


def predictions(predicted: list[int], labels: list[int], digest: str = "d") -> Predictions:
    return Predictions(digest=digest, classes=("a", "b", "c"), labels=tuple(labels), predicted=tuple(predicted))


# ---------------------------------------------------------------- the test


@pytest.mark.parametrize(
    ("first", "second", "p"),
    # 2 * (C(12,0) + C(12,1) + C(12,2)) / 2**12 = 158 / 4096; 2 * 1 / 2**5; 2 * (1 + 8) / 2**8; never above 1
    [(10, 2, 158 / 4096), (5, 0, 2 / 32), (1, 7, 18 / 256), (4, 4, 1.0), (0, 0, 1.0), (1, 0, 1.0)],
)
def test_mcnemar_by_hand(first: int, second: int, p: float) -> None:
    assert mcnemar(first, second) == pytest.approx(p)
    assert mcnemar(second, first) == pytest.approx(p)


def test_runs_are_compared_image_by_image(runs: Path) -> None:
    labels = [0] * 20 + [1] * 20
    before = predictions([0] * 20 + [1] * 16 + [2] * 4, labels)  # 36 right
    after = predictions([2] * 10 + [0] * 10 + [1] * 18 + [2] * 2, labels)  # 28 right: 10 lost, 2 won
    base = whole_run(runs / "trainings" / "finished")
    old, new = (
        replace(base, predictions=p, run=replace(base.run, accuracy=sum(p.right) / 40)) for p in (before, after)
    )
    found = compare(old, new)
    assert (found.only_old, found.only_new) == (10, 2)
    assert found.p == pytest.approx(158 / 4096)
    assert found.drop_points == pytest.approx(20)
    assert verdict(found) == (
        "20.0 points less accurate; of the same test images 10 were right before only, 2 are right now only "
        "(McNemar's exact test: p = 0.039)"
    )
    other = compare(old, replace(new, predictions=predictions([0] * 40, labels, "e")))
    assert (other.p, other.why_not, other.drop_points) == (None, "they were tested on other images", None)
    assert compare(old, replace(new, predictions=None)).p is None


@pytest.mark.parametrize(
    ("digests", "told", "said"),
    [
        (("x", "y"), ("", ""), "of different images; `convscale evaluate RUN --data-dir DATA --predictions` with the"),
        (("x", "y"), ("d", ""), "of different images"),
        (("x", "y"), ("d", "d"), ""),  # what both say of the same test images can be compared, whatever trained them
        (("x", "x"), ("d", "e"), "of different images"),
        (("x", "x"), ("", "d"), ""),
        ((None, "x"), ("", ""), ""),
    ],
)
def test_accuracies_of_different_images_are_not_compared(
    runs: Path, digests: tuple[str | None, str], told: tuple[str, str], said: str
) -> None:
    """Without predictions the data's digests were not looked at."""
    base = whole_run(runs / "trainings" / "finished")
    old, new = (
        replace(
            base,
            run=replace(base.run, accuracy=accuracy, data_digest=data),
            predictions=predictions([0], [0], kept) if kept else None,
        )
        for accuracy, data, kept in zip((0.75, 0.5), digests, told, strict=True)
    )
    found = compare(old, new)
    assert found.drop_points == (None if said else 25)
    if not (told[0] and told[1]):  # what both were judged on is known: what they learned from is another matter
        same, others = (
            compare(
                replace(old, run=replace(old.run, judged_digest="v")),
                replace(new, run=replace(new.run, judged_digest=digest)),
            )
            for digest in ("v", "w")
        )
        assert (same.drop_points, same.unlike, others.drop_points) == (25, "", None)
    assert said in found.unlike
    assert bool(said) == bool(found.unlike)
    other = compare(old, replace(new, run=replace(new.run, metric="top-1, test")))
    assert other.drop_points is None
    assert other.unlike.startswith("one is top-1, validation, the other top-1, test; `convscale evaluate")


def test_predictions_come_back_and_damage_is_told(tmp_path: Path) -> None:
    kept = predictions([0, 1, 2], [0, 1, 1])
    kept.save(tmp_path / FILE)
    assert read_predictions(tmp_path / FILE) == kept
    assert kept.right == (True, True, False)
    value = json.loads((tmp_path / FILE).read_text())
    for key, wrong, said in (
        ("labels", [0, 1, 3], "labels must be a list of classes"),
        ("labels", [0, 1, True], "labels must be a list of classes"),
        ("predicted", [0], "3 labels, 1 predictions"),
        ("classes", [1], "classes a list"),
        ("schema", 2, "newer version"),
    ):
        (tmp_path / FILE).write_text(json.dumps({**value, key: wrong}))
        with pytest.raises(UserError, match=said):
            read_predictions(tmp_path / FILE)


# ---------------------------------------------------------------- the list


def test_every_kind_of_run_is_told_of(runs: Path) -> None:
    found = {str(run.path.relative_to(runs)): run for run in runs_below(runs)}
    assert {name: run.kind for name, run in found.items()} == {
        "artefacts/openvino_fp32": "ship",
        "fits/finished": "fit",
        "fits/interrupted": "fit",
        "trainings/finished": "train",
    }
    fit = found["fits/finished"]
    record = json.loads((runs / "fits/finished/fit.json").read_text())
    assert (fit.network, fit.accuracy, fit.images) == ("tiny_resnet18", record["evaluation"]["top1"], 60)
    assert fit.interval == pytest.approx((0.2562, 0.4932), abs=1e-4)  # Wilson's of 22 in 60
    assert (fit.data, fit.seconds, fit.state) == ("fashion", pytest.approx(35.916, abs=1e-3), "done")
    timed = record["artifact"]["measurement"]  # raw times alone, as every fit here writes them
    assert fit.images_per_s == pytest.approx(128 / median(timed["times_s"]))
    assert "images_per_s" not in timed
    assert fit.conditions.startswith("onnxruntime, fp32, nchw, batch 128, 28 px, 1 thread")
    assert found["fits/interrupted"].state == "unfinished"
    train = found["trainings/finished"]
    rows = [json.loads(line) for line in (runs / "trainings/finished/log.jsonl").read_text().splitlines()]
    assert (train.network, train.metric, train.accuracy, train.state) == (
        "tiny_resnet18",
        "top-1, validation",
        max(row["val_top1"] for row in rows),
        "done",
    )
    assert train.images_per_s == pytest.approx(sum(row["images_per_s"] for row in rows) / len(rows))
    assert found["artefacts/openvino_fp32"].network == "tiny_resnet18"


PREDICTED = {"images_per_s": 812.5, "low": 700.0, "high": 900.0}
ON_L4 = {"device": "l4", "precision": "amp", "layout": "nhwc", "batch_size": 256, "runtime": "eager"}


def test_a_fit_for_a_card_that_is_not_here_is_told_with_its_predicted_speed(runs: Path) -> None:
    path = runs / "fits/finished/fit.json"
    value = json.loads(path.read_text())
    value["artifact"]["measurement"] = None
    value["constraint"]["conditions"] = ON_L4
    for each in value["candidates"]:
        each.update(measurement=None, tuned=None, predicted=PREDICTED if each["name"] == "tiny_resnet18" else None)

    def told() -> tuple[float | None, str]:
        path.write_text(json.dumps(value))
        (found,) = [run for run in runs_below(runs) if run.path == path.parent]
        return found.images_per_s, found.conditions

    assert told() == (812.5, "eager, amp, nhwc, batch 256, l4; predicted")
    # what ships is float after all, and its own prediction
    value["artifact"]["predicted"] = {**PREDICTED, "images_per_s": 400.5, "precision": "fp32"}
    assert told() == (400.5, "eager, fp32, nhwc, batch 256, l4; predicted")
    value["artifact"]["predicted"], value["candidates"] = None, []
    assert told() == (None, "")


def test_an_artefact_is_told_with_its_commit_and_with_what_it_promises(runs: Path) -> None:
    path = runs / "artefacts/openvino_fp32/artifact.json"
    value = json.loads(path.read_text())
    del value["tuning"]
    value |= {
        "commit": "a" * 40,
        "data_digest": "0123456789abcdef",
        "promise": {**ON_L4, **PREDICTED, "image_size": 28},
    }
    path.write_text(json.dumps(value))
    (told,) = runs_below(runs / "artefacts")
    assert (told.commit, told.images_per_s, told.data_digest) == ("a" * 40, 812.5, "0123456789abcdef")
    assert told.conditions == "eager, amp, nhwc, batch 256, 28 px, l4; predicted"


def test_the_network_that_was_kept_is_told_of_not_the_best_epoch(runs: Path) -> None:
    """A solved head that no epoch beat, or what was joined with the start, has no row in the log."""
    run = runs / "trainings" / "finished"
    (about,) = (run / "checkpoints").glob("step-*/checkpoint.json")
    value = json.loads(about.read_text())
    value["metrics"] = {"best": {"metric": 0.9375, "loss": 0.1, "epoch": 0}}
    about.write_text(json.dumps(value))
    (told,) = [each for each in runs_below(runs) if each.path == run]
    assert (told.metric, told.accuracy) == ("top-1, validation", 0.9375)
    page = write_train_report(run).read_text(encoding="utf-8")
    assert "Best on validation: top-1 93.75 % before the first epoch" in page


def test_a_training_tells_of_its_validation_images(runs: Path) -> None:
    run = runs / "trainings" / "finished"
    (about,) = (run / "checkpoints").glob("step-*/checkpoint.json")
    value = json.loads(about.read_text())

    def told(images: object) -> tuple[int | None, tuple[float, float] | None]:
        value.update(val_images=images, metrics={"best": {"metric": 22 / 60, "loss": 0.1, "epoch": 1}})
        about.write_text(json.dumps(value))
        (found,) = [each for each in runs_below(runs) if each.path == run]
        assert (found.kind, found.accuracy) == ("train", 22 / 60)
        return found.images, found.interval

    assert told(60) == (60, pytest.approx((0.2562, 0.4932), abs=1e-4))  # Wilson's of 22 in 60
    for older in (None, 0, "60", True):
        assert told(older) == (None, None)
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    (run / "log.jsonl").write_text("".join(json.dumps({**row, "val_map": 0.25}) + "\n" for row in rows))
    assert told(60) == (60, None)  # mean average precision is no share of images


def test_a_training_that_ended_early_says_how_far_it_came(runs: Path) -> None:
    """Its minutes were over, or it no longer gained: it is not unfinished."""
    recipe = runs / "trainings" / "finished" / "recipe.yaml"
    lines = recipe.read_text().splitlines()
    recipe.write_text("\n".join("epochs: 12" if line.startswith("epochs:") else line for line in lines))
    (told,) = [run for run in runs_below(runs) if run.kind == "train"]
    assert told.state == "3 of 12 epochs"


def test_a_damaged_run_is_a_row_too(runs: Path) -> None:
    (runs / "fits/finished/fit.json").write_text("{")
    (broken,) = [run for run in runs_below(runs) if run.path.name == "finished" and run.kind == "fit"]
    assert "is not JSON" in broken.state


def test_the_list_on_the_command_line(runs: Path, call: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, out, _ = call("list", "--runs", runs)
    assert code == 0
    (line,) = [line for line in out.splitlines() if line.startswith("fits/finished")]
    assert "36.7 % (25.6–49.3)" in line
    head = out.splitlines()[0].split()
    assert head[head.index("images/s") + 1] == "under"
    code, out, _ = call("list", "--runs", runs, "--json")
    told = json.loads(out)
    assert [value["kind"] for value in told] == ["ship", "fit", "fit", "train"]
    (under,) = [value["conditions"] for value in told if value["path"].endswith("fits/finished")]
    assert under.split(", ")[0] in line
    (tmp_path / "empty").mkdir()
    for folder, said in ((tmp_path / "none", "does not exist"), (tmp_path / "empty", "holds no run")):
        code, _, err = call("list", "--runs", folder)
        assert (code, said in err) == (2, True)


# ---------------------------------------------------------------- report OLD NEW


@pytest.fixture
def pair(runs: Path) -> tuple[Path, Path]:
    """The same training twice, with other predictions and another learning rate."""
    old = runs / "trainings" / "finished"
    new = shutil.copytree(old, runs / "trainings" / "other")
    text = (new / "recipe.yaml").read_text()
    (new / "recipe.yaml").write_text("\n".join("epochs: 7" if x.startswith("epochs:") else x for x in text.split("\n")))
    labels = [0] * 20 + [1] * 20
    predictions([0] * 20 + [1] * 16 + [2] * 4, labels).save(old / FILE)
    predictions([2] * 10 + [0] * 10 + [1] * 18 + [2] * 2, labels).save(new / FILE)
    return old, new


def test_a_worse_run_exits_with_three(
    pair: tuple[Path, Path], call: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    page = tmp_path / "both.html"
    code, out, err = call("report", *pair, "--max-drop", 0.5, "--output", page)
    assert code == 3
    assert "20.0 points less accurate" in out
    assert "epochs: 3 -> 7" in out
    assert "loses more than 0.5 points" in err
    text = page.read_text(encoding="utf-8")
    for expected in ("Overview", "Curves", "Confusions that differ", "McNemar", "p = 0.039", "+10.0", "-50.0"):
        assert expected in text
    assert call("report", *pair, "--max-drop", 20, "--output", page)[0] == 0
    assert call("report", *reversed(pair), "--max-drop", 0, "--output", page)[0] == 0
    code, out, _ = call("report", *pair, "--json", "--output", page)
    value = json.loads(out)
    assert (code, value["worse"], value["compared"][0]["only_old"]) == (0, [], 10)
    assert value["compared"][0]["recipe"]["epochs"] == [3, 7]


def test_bad_comparisons_are_told(
    pair: tuple[Path, Path], runs: Path, call: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    old, _ = pair
    for arguments, said in (
        ((old, "--max-drop", 1), "--max-drop compares runs"),
        ((old, tmp_path), "holds no run of convscale fit or train"),
        ((old, old, "--max-drop", -1), "--max-drop is -1"),
        ((old, runs / "fits" / "interrupted", "--max-drop", 1), "accuracies of the same kind"),
        ((old, old, "--papers"), "go with --max-drop, --output and --json alone"),
        ((old, old, "--output", tmp_path / "x.png"), "must end in .html"),
        ((old,) * 6, "6 runs are given; at most 5"),
    ):
        code, _, err = call("report", *arguments)
        assert (code, said in err, len(err.splitlines())) == (2, True, 1), err


def test_the_run_that_can_not_be_compared_is_named_and_no_good_news(
    pair: tuple[Path, Path], runs: Path, call: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    old, new = pair
    for run, digest in ((old, "x"), (new, "y")):
        (about,) = (run / "checkpoints").glob("step-*/checkpoint.json")
        about.write_text(json.dumps({**json.loads(about.read_text()), "data_digest": digest}))
        (run / FILE).rename(run / "kept")
    code, _, err = call("report", old, new, "--max-drop", 50)
    assert (code, len(err.splitlines())) == (2, 1)
    assert f"{new}: their accuracies can not be compared: they are of different images; `convscale evaluate" in err
    for run in pair:
        (run / "kept").rename(run / FILE)
    unlike, page = runs / "fits" / "interrupted", tmp_path / "x.html"
    code, _, err = call("report", old, new, unlike, "--max-drop", 50, "--output", page)
    assert code == 2
    assert f"{unlike}: their accuracies can not be compared" in err
    assert call("report", old, old, unlike, "--output", page)[0] == 0
    frames = re.findall(
        r'class="alert (\w*)">[^<]*: (both are equally accurate|their accuracies can not)', page.read_text()
    )
    assert frames == [("good", "both are equally accurate"), ("warn", "their accuracies can not")]


# ---------------------------------------------------------------- the commit


def test_the_commit_is_read_from_git(tmp_path: Path) -> None:
    git = tmp_path / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    (tmp_path / "deep").mkdir()
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "refs" / "heads" / "main").write_text("a" * 40 + "\n")
    assert code_commit(tmp_path / "deep") == "a" * 40
    (git / "refs" / "heads" / "main").unlink()
    (git / "packed-refs").write_text(f"# pack-refs\n{'b' * 40} refs/heads/main\n{'c' * 40} refs/heads/other\n")
    assert code_commit(tmp_path) == "b" * 40
    (git / "HEAD").write_text("d" * 40)
    assert code_commit(tmp_path) == "d" * 40
    (git / "HEAD").unlink()
    assert code_commit(tmp_path) is None


def test_evaluate_keeps_what_it_says_of_each_image(
    runs: Path, call: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    run = runs / "trainings" / "finished"
    data = ("--data-dir", OLD / "data" / "fashion", "-j", 0)
    code, out, err = call("evaluate", run, *data, "--predictions", "--json")
    assert code == 0, err
    value = json.loads(out)
    kept = read_predictions(run / FILE)
    assert sum(kept.right) / len(kept.right) == pytest.approx(value["top1"])
    confusion = value["confusion"]
    for i, row in enumerate(confusion):
        for j, count in enumerate(row):
            assert count == sum((a, b) == (i, j) for a, b in zip(kept.labels, kept.predicted, strict=True))
    (told,) = [each for each in runs_below(runs) if each.path == run]
    assert (told.metric, told.accuracy, told.images) == ("top-1, test", pytest.approx(value["top1"]), value["n"])
    before = (run / FILE).read_bytes()
    fit = tmp_path / "fit"  # whose training is the same one
    shutil.copytree(run, fit / "train", ignore=shutil.ignore_patterns(FILE))
    (fit / "fit.json").write_text("{}")
    code, _, err = call("evaluate", fit, *data, "--predictions")
    assert (code, (fit / "train" / FILE).read_bytes()) == (0, before), err
    code, _, err = call("evaluate", run, *data, "--predictions", "--split", "train")
    assert (code, "the split that was read is train" in err) == (2, True), err
    assert (run / FILE).read_bytes() == before
    code, _, err = call("evaluate", run / "checkpoints", *data, "--predictions")
    assert (code, "keeps one label per image beside a training run" in err or "no checkpoint" in err) == (2, True), err
