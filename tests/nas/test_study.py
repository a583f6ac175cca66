"""Searches on a tiny data set: what is trained, what is not, and what an interruption costs."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import convscale as cs
from convscale.arch.spec import load_spec
from convscale.choice.facts import Speed
from convscale.errors import UserError
from convscale.images.splits import DataSplits
from convscale.learn.recipe import Recipe
from convscale.nas import walk
from convscale.nas.engines import local
from convscale.nas.engines.local import Here, Processes
from convscale.nas.pace import Counted, Pace
from convscale.nas.records import Reward, TrialRecord, front_of
from convscale.nas.result import Study, read_study
from convscale.nas.space import SearchSpace
from convscale.nas.trial import Job, Result
from convscale.ship.cluster import check_answers
from convscale.show.search_report import write_search_report

if TYPE_CHECKING:
    import optuna

COLUMNS = 120
QUICK = {"epochs": 2, "recipe": "small-adamw", "device": "rtx-4090", "zero_cost": None}


def by_macs(self: Pace, spec: cs.NetSpec) -> Counted:
    """A device on which time is multiply-accumulates."""
    cost = cs.count(spec, spec.input.size)
    speed = 1e9 / cost.macs
    return Counted(
        speed=Speed(images_per_s=speed, low=speed, high=speed, kind="measured"), params=cost.params, macs=cost.macs
    )


@pytest.fixture
def simple(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds by ``by_macs``."""
    monkeypatch.setattr(Pace, "__call__", by_macs)


def by_name(job: Job, splits: DataSplits | None = None) -> Result:
    """A training whose curve is drawn by the network's spec, and which is given up as real ones are."""
    rng = np.random.default_rng(zlib.crc32(json.dumps(dict(job.spec), sort_keys=True).encode()))
    curve = np.sort(rng.uniform(0.2, 0.9, Recipe.from_dict(dict(job.recipe)).epochs)).tolist()
    ends = [at for at, value in enumerate(curve, 1) if value * job.factor < job.rungs.get(str(at), 0.0)]
    return Result(number=job.number, curve=tuple(curve[: ends[0]] if ends else curve), pruned=ends[0] if ends else 0)


@pytest.fixture
def untrained(simple: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is trained: ``by_name``."""
    monkeypatch.setattr(local, "run_job", by_name)


def journal_of(study: Study) -> optuna.Study:
    """A study as Optuna has it."""
    import optuna

    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(study.output / "journal.log"))  # pyright: ignore
    )
    return optuna.load_study(study_name="convscale", storage=storage)


@pytest.fixture(scope="module")
def study(colours: DataSplits, tiny: SearchSpace, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Twelve trials under a speed that half of the space keeps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pace, "__call__", by_macs)
        folder = tmp_path_factory.mktemp("search") / "study"
        return cs.search(colours, space=tiny, min_throughput=8_000, trials=12, output=folder, **QUICK)


def test_the_best_is_the_best_that_keeps_the_speed(study: Study) -> None:
    trained = [trial for trial in study.trials if trial.state == "trained"]
    assert study.best.accuracy == max(trial.accuracy or 0.0 for trial in trained)
    assert study.best.accuracy > 0.5  # of three classes
    assert all((trial.images_per_s or 0) >= 8_000 for trial in trained)
    assert sum(trial.state in ("trained", "pruned") for trial in study.trials) == 12
    assert load_spec(study.output / "best.yaml") == study.best.spec


def test_what_is_too_slow_is_never_trained(study: Study) -> None:
    slow = [trial for trial in study.trials if trial.state == "too slow"]
    assert slow
    assert all(trial.result is None and (trial.images_per_s or 0) < 8_000 for trial in slow)
    assert "images/s, needed 8,000" in slow[0].reason


def test_those_behind_are_given_up(study: Study) -> None:
    given_up = [trial for trial in study.trials if trial.state == "pruned"]
    assert given_up
    assert all(trial.result is not None and len(trial.result.curve) == 1 for trial in given_up)
    # The first six had nobody to be behind.
    assert all(trial.state != "pruned" for trial in [t for t in study.trials if t.result is not None][:6])


def test_the_journal_holds_constraints_for_optuna(study: Study) -> None:
    loaded = journal_of(study)
    states = {trial.number: trial.state for trial in study.trials}
    for trial in loaded.get_trials():
        unfit = trial.constraints.get("cost", 0.0) > 0
        assert unfit == (states[trial.number] == "too slow")
        assert not (unfit and trial.intermediate_values)
    assert loaded.best_value == study.best.value


def test_the_folder_says_it_all(study: Study) -> None:
    again = read_study(study.output)
    assert again.best == study.best
    assert [trial.genes for trial in again.trials] == [trial.genes for trial in study.trials]
    text = write_search_report(study.output).read_text(encoding="utf-8")
    for word in (study.best.spec.name, "efficientnet_b0", "tresnet_m", "Which choices mattered", "too slow"):
        assert word in text
    assert sum(study.importance.values()) == pytest.approx(1.0)


def test_a_search_that_is_killed_goes_on_as_if_it_was_not(
    study: Study, colours: DataSplits, tiny: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the sixth trial, the second of its round, is told: it is trained again, all others stay."""
    monkeypatch.setattr(Pace, "__call__", by_macs)
    told = walk.Store.tell
    calls = 0

    def tell(self: walk.Store, *given: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        told(self, *given)  # pyright: ignore[reportArgumentType]

    ask = {"space": tiny, "min_throughput": 8_000, "output": tmp_path / "killed", **QUICK}
    monkeypatch.setattr(walk.Store, "tell", tell)
    with pytest.raises(KeyboardInterrupt):
        cs.search(colours, trials=8, **ask)
    with open(tmp_path / "killed" / "journal.log", "ab") as journal:
        journal.write(b'{"op_code": 4, "worker')  # half a line, as a power cut leaves it
    monkeypatch.setattr(walk.Store, "tell", told)
    again = cs.search(colours, trials=8, resume=True, **ask)
    assert calls == 6
    same = [trial for trial in study.trials if trial.number < len(again.trials)]
    assert [t.genes for t in again.trials] == [t.genes for t in same]
    assert [t.result and t.result.curve for t in again.trials] == [t.result and t.result.curve for t in same]


PARAM, STATE, NOTE = 5, 6, 8
"""Lines of Optuna's journal: a parameter, the beginning or the end of a trial, what is known of it."""
ADDED = ("round", "rungs", "same")
"""What an older version did not note of a trial."""
LONGER = {**QUICK, "min_throughput": 8_000, "trials": 14}


@pytest.fixture(scope="module")
def wholes(colours: DataSplits, tiny: SearchSpace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Study]:
    """Searches that nobody stopped, by sampler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pace, "__call__", by_macs)
        patch.setattr(local, "run_job", by_name)
        place = tmp_path_factory.mktemp("wholes")
        return {
            sampler: cs.search(colours, space=tiny, sampler=sampler, output=place / sampler, **LONGER)
            for sampler in ("guided", "tpe")
        }


@pytest.mark.parametrize(
    ("sampler", "line", "count"),
    [
        ("guided", STATE, 60),  # two of the third round's four trials are told
        ("guided", PARAM, 157),  # trial 22, which is enqueued, has three of its seven parameters
        ("guided", NOTE, 11),  # trial 6 is known to be too slow, and has not ended
        ("tpe", STATE, 20),  # two of the last round's four trials are told
        ("tpe", STATE, 16),  # of a round that is asked for, one was trained before, and has that one's curve
        ("tpe", NOTE, 27),  # the same, and is known to be that one, and has not ended
        ("tpe", PARAM, 38),  # trial 5, drawn at random, has three of its parameters
        ("tpe", PARAM, 136),  # trial 19, which the estimator draws, too
    ],
)
def test_a_search_that_is_cut_asks_and_prunes_what_it_would_have(
    sampler: str, line: int, count: int, wholes: dict[str, Study], colours: DataSplits, tiny: SearchSpace,
    tmp_path: Path, untrained: None, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from optuna.storages.journal import JournalFileBackend

    def append(self: JournalFileBackend, logs: list[dict]) -> None:
        nonlocal seen
        append_logs(self, logs)
        seen += sum(each["op_code"] == line for each in logs)
        if seen >= count:
            raise KeyboardInterrupt

    ask = {"space": tiny, "sampler": sampler, "output": tmp_path / "cut", **LONGER}
    seen, append_logs = 0, JournalFileBackend.append_logs
    with monkeypatch.context() as patch:
        patch.setattr(JournalFileBackend, "append_logs", append)
        with pytest.raises(KeyboardInterrupt):
            cs.search(colours, **ask)
    again, whole = cs.search(colours, resume=True, **ask), wholes[sampler]
    assert any(trial.state == "pruned" for trial in whole.trials)
    assert again.trials == whole.trials
    drawn = [[trial.params for trial in journal_of(each).get_trials()] for each in (again, whole)]
    assert drawn[0] == drawn[1]


def test_what_an_older_version_left_goes_on(
    wholes: dict[str, Study], colours: DataSplits, tiny: SearchSpace, tmp_path: Path, untrained: None
) -> None:
    """It noted no rounds; two of its last round's trials were not told yet."""
    place = shutil.copytree(wholes["guided"].output, tmp_path / "older")
    lines = [json.loads(line) for line in (place / "journal.log").read_text(encoding="utf-8").splitlines()]
    ends = [at for at, line in enumerate(lines) if line["op_code"] == STATE]
    for line in lines:
        if "asked" in line.get("user_attr", {}):
            line["user_attr"]["asked"] = {k: v for k, v in line["user_attr"]["asked"].items() if k not in ADDED}
    kept = "".join(json.dumps(line) + "\n" for line in lines[: ends[59] + 1])
    (place / "journal.log").write_text(kept, encoding="utf-8")
    again = cs.search(colours, space=tiny, sampler="guided", output=place, resume=True, **LONGER)
    done = [trial for trial in again.trials if trial.state in ("trained", "pruned")]
    assert len(done) == 14
    assert [trial.genes for trial in again.trials[:31]] == [trial.genes for trial in wholes["guided"].trials[:31]]


def test_minutes_count_per_call(colours: DataSplits, tiny: SearchSpace, tmp_path: Path, simple: None) -> None:
    first = cs.search(colours, space=tiny, minutes=1e-6, output=tmp_path / "a", **QUICK)
    assert sum(trial.state == "trained" for trial in first.trials) == 1
    again = cs.search(colours, space=tiny, minutes=1e-6, output=tmp_path / "a", resume=True, **QUICK)
    assert sum(trial.state == "trained" for trial in again.trials) == 2
    assert again.trials[0] == first.trials[0]


def test_the_parzen_estimator(colours: DataSplits, tiny: SearchSpace, tmp_path: Path, simple: None) -> None:
    found = cs.search(
        colours,
        space=tiny,
        min_throughput=8_000,
        trials=3,
        output=tmp_path / "a",
        sampler="tpe",
        **{**QUICK, "epochs": 1},
    )
    assert len({trial.genes for trial in found.trials if trial.state == "trained"}) >= 2


def test_the_first_ones_by_a_score(colours: DataSplits, tiny: SearchSpace, tmp_path: Path, simple: None) -> None:
    """By size, the first of six drawn networks is the largest one: larger than most of the space."""
    ask = {**QUICK, "zero_cost": "size", "epochs": 1}
    found = cs.search(colours, space=tiny, trials=2, output=tmp_path / "a", **ask)
    drawn = sorted(cs.count(spec, 12).params for spec in tiny.sample(0, count=30))
    assert found.trials[0].params > drawn[15]


def test_nothing_keeps_it(
    colours: DataSplits, tiny: SearchSpace, tmp_path: Path, simple: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Here, "run", lambda *given: pytest.fail("something was trained"))
    with pytest.raises(UserError, match=r"of the space tiny is found that keeps .* has [\d,]+ images/s measured"):
        cs.search(colours, space=tiny, min_throughput=1e7, trials=4, output=tmp_path / "a", **QUICK)


def test_a_study_of_another_space(study: Study, colours: DataSplits, tiny: SearchSpace, simple: None) -> None:
    other = replace(tiny, name="other", image_sizes=(16,))
    ask = {"min_throughput": 8_000, "trials": 12, "output": study.output, "resume": True, **QUICK}
    with pytest.raises(UserError, match=r"was begun with space 'tiny', not 'other'"):
        cs.search(colours, space=other, **ask)
    with pytest.raises(UserError, match=r"was begun with seed 0, not 1"):
        cs.search(colours, space=tiny, seed=1, **ask)
    moved = replace(colours, validation=colours.validation.subset(range(1, len(colours.validation))))
    with pytest.raises(UserError, match="was begun with other data: images or labels have come, gone or changed; ask"):
        cs.search(moved, space=tiny, **ask)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"trials": 1}, "trials is 1; a search compares, so it needs at least 2"),
        ({"trials": None}, "a search needs trials or minutes"),
        ({"sampler": "tpee"}, r"sampler 'tpee' is unknown \(nearest: tpe\)"),
        ({"reward": "soft"}, "reward soft by throughput needs min_throughput"),
        ({"reward_by": "macs"}, "reward hard by macs needs target_macs_m"),
        (
            {"target_macs_m": 400},
            "target_macs_m goes with reward_by macs, got target_macs_m 400 and reward_by throughput",
        ),
        ({"engine": "spark"}, "engine 'spark' is unknown"),
        ({"reuse": True}, "reuse takes the result of an earlier call, which resume goes on with; give resume too"),
        ({"engine": "ray", "address": "127.0.0.1:1"}, "no Ray cluster answers at 127.0.0.1:1"),
        ({"address": "127.0.0.1:1"}, "is of a Ray cluster; give it with engine ray"),
        ({"workers": 2}, "splits in memory are trained on in this process alone"),
        ({"min_throughput": -1.0}, "min_throughput is -1.0; it must be a number above 0"),
        ({"recipe": Recipe(name="mine", compile="graphs")}, "recipe mine: compile is graphs, CUDA graphs, and device"),
    ],
)
def test_bad_input_is_one_line(
    given: dict, message: str, colours: DataSplits, tiny: SearchSpace, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        cs.search(colours, output=tmp_path / "a", **{"space": tiny, "trials": 4, **QUICK, **given})
    assert not (tmp_path / "a").exists()


# ---------------------------------------------------------------- rewards


def test_rewards_by_hand() -> None:
    """MnasNet, section 3: (a, l) and (1.05 a, 2 l) are worth the same with w = -0.07."""
    soft = Reward(form="soft", target=100.0)
    assert 1.05 * soft.factor(2.0) == pytest.approx(soft.factor(1.0), rel=2e-3)
    assert soft.ratio(50.0, 0) == 2.0
    hard_like = Reward(form="hard-like", target=100.0)
    assert [hard_like.factor(ratio) for ratio in (0.5, 1.0, 2.0)] == [1.0, 1.0, 0.5]
    macs = Reward(form="soft", by="macs", target=400.0)
    assert macs.ratio(1.0, 800_000_000) == 2.0
    assert not Reward(target=100.0).keeps(1.01)
    assert Reward(target=100.0).keeps(1.0)


@pytest.mark.parametrize("form", ["soft", "hard-like"])
def test_a_soft_target_is_no_constraint(
    form: str, colours: DataSplits, tiny: SearchSpace, tmp_path: Path, untrained: None
) -> None:
    """What goes past it pays for that in its value; Optuna is not told that it can not be had."""
    ask = {"space": tiny, "min_throughput": 8_000, "reward": form, "trials": 8, **QUICK}
    found = cs.search(colours, output=tmp_path / "a", **ask)
    past = [trial.number for trial in found.trials if (trial.images_per_s or 0) < 8_000]
    assert past
    assert len(past) < 8
    assert all(trial.constraints["cost"] <= 0 for trial in journal_of(found).get_trials())


def test_the_front(tiny: SearchSpace) -> None:
    rows = [(100, 0.9), (200, 0.8), (150, 0.7), (300, 0.5), (90, 0.9)]
    trials = [
        TrialRecord(
            number=at,
            genes=(),
            spec=tiny.sample(0),
            state="trained",
            speed=Speed(images_per_s=speed, low=speed, high=speed, kind="measured"),
            result=Result(number=at, curve=(accuracy,)),
        )
        for at, (speed, accuracy) in enumerate(rows)
    ]
    assert [trial.number for trial in front_of(trials)] == [3, 1, 0]


# ---------------------------------------------------------------- engines


def job(number: int, data: Path | None, tiny: SearchSpace) -> Job:
    from convscale.learn.recipes import get_recipe

    recipe = get_recipe("small-adamw").override({"epochs": 1, "precision": "fp32", "layout": "nchw"})
    return Job(
        number=number,
        spec=tiny.sample(number).to_dict(),
        data=None if data is None else str(data),
        recipe=recipe.to_dict(),
        seed=number,
        device="cpu",
        most_images=1000,
        threads=1,
    )


def test_processes_give_what_this_process_gives_and_survive_a_death(
    colour_folder: Path, tiny: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first worker is killed before its first job."""
    started = Processes._start

    def start(self: Processes) -> object:
        process = started(self)
        if not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            process.kill()
            process.wait()
        return process

    monkeypatch.setattr(Processes, "_start", start)
    jobs = [job(0, colour_folder, tiny)]
    engine = Processes(1)
    try:
        found = {result.number: result for result in engine.run(jobs, lambda: True)}
    finally:
        engine.close()
    here = [local.run_job(one) for one in jobs]
    assert [found[0].curve] == [result.curve for result in here]
    assert not any(result.failed for result in found.values())


def test_a_job_that_can_not_be_trained_fails_alone(colours: DataSplits, tiny: SearchSpace) -> None:
    plain = job(0, None, tiny)
    result = local.run_job(replace(plain, recipe={**plain.recipe, "batch_size": 128}), colours)
    assert result.curve  # a batch that nobody asked for is lowered
    bad = local.run_job(replace(plain, device="cuda:7"), colours)
    assert "cuda:7" in bad.failed


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", "ray://127.0.0.1:1", "10.0.0..5:6379", f"{64 * 'a'}:1"])
def test_a_cluster_that_does_not_answer(address: str) -> None:
    with pytest.raises(UserError, match=r"no Ray cluster answers at|is none; host:port"):
        check_answers(address)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ray_gives_the_same_trials(colour_folder: Path, tiny: SearchSpace, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    ask = {**QUICK, "space": tiny, "trials": 4, "threads_per_trial": 1, "epochs": 1}
    here = cs.search(colour_folder, output=tmp_path / "a", **ask)
    ray = cs.search(colour_folder, output=tmp_path / "b", engine="ray", workers=2, **ask)
    assert [(t.genes, t.result and t.result.curve) for t in ray.trials] == [
        (t.genes, t.result and t.result.curve) for t in here.trials
    ]


# ---------------------------------------------------------------- the command


def test_the_command(
    call: Callable[..., tuple[int, str, str]], colour_folder: Path, tmp_path: Path, simple: None
) -> None:
    place = tmp_path / "a"
    common = ["search", "--data-dir", colour_folder, "--space", "small", "--img-size", "12", "--output", place]
    quick = ["--recipe", "small-adamw", "--epochs", "1", "--zero-cost", "none", "--device", "rtx-4090"]
    code, out, err = call(*common, *quick, "--trials", "2", "--json")
    assert code == 0, err
    value = json.loads(out)
    assert value["best"]["state"] == "trained"
    assert (place / "report.html").is_file()
    assert load_spec(place / "best.yaml").name == value["best"]["name"]
    made = (place / "report.html").read_text(encoding="utf-8")
    (place / "report.html").unlink()
    assert call("report", place)[0] == 0
    assert (place / "report.html").read_text(encoding="utf-8") == made
    code, _, err = call(*common, *quick, "--trials", "1", "--overwrite")
    assert (code, err.count("\n")) == (2, 1)
    code, _, err = call(*common, *quick, "--trials", "2", "--budget", "2")
    assert code == 2
    assert "--budget, --cost and --method are of --scaling" in err


def test_speeds_as_they_would_ship(tiny: SearchSpace, colours: DataSplits, tmp_path: Path, simple: None) -> None:
    """What ships is twice as fast here, so half the speed is asked of candidates; the very fastest form of the best one
    turns out to be too slow, so the next is taken.
    """
    slow: list[str] = []

    def shipped(self: Pace, spec: cs.NetSpec) -> Speed:
        speed = 2 * by_macs(self, spec).speed.images_per_s
        if self.factor is not None and not slow:
            slow.append(spec.name)
            speed = 1.0
        return Speed(images_per_s=speed, low=speed, high=speed, kind="measured", how="a form")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pace, "shipped", shipped)
        ask = {**QUICK, "device": "cpu", "epochs": 1}
        found = cs.search(colours, space=tiny, min_throughput=16_000, trials=4, output=tmp_path / "a", **ask)
    trained = [trial for trial in found.trials if trial.state == "trained"]
    assert all((trial.images_per_s or 0) >= 8_000 for trial in trained)
    assert found.best.spec.name not in slow
    assert sorted(trial.value or 0 for trial in trained)[-2] == found.best.value
    assert found.shipped is not None
    assert found.shipped.images_per_s >= 16_000
    assert read_study(tmp_path / "a").best == found.best


def test_children_begin_where_their_parents_ended(
    colours: DataSplits, tiny: SearchSpace, tmp_path: Path, simple: None
) -> None:
    """In a space of widths and depths alone, every child of the smallest network grows from it."""
    plain = replace(
        tiny,
        stages=tuple(replace(stage, kinds=("basic",), widths=stage.widths[:1]) for stage in tiny.stages),
        stems=tiny.stems[:1],
    )
    assert len(plain) == 6
    ask = {**QUICK, "sampler": "random", "space": plain, "trials": 6, "inherit": True, "epochs": 1}
    found = cs.search(colours, output=tmp_path / "a", **ask)
    grown = [trial for trial in found.trials if trial.parent is not None]
    assert grown
    for trial in grown:
        parent = found.trials[trial.parent or 0]
        assert all(a <= b for a, b in zip(parent.spec.depths, trial.spec.depths, strict=True))
        assert trial.result is not None
        assert not trial.result.failed
    started = [trial for trial in found.trials if trial.parent is None]
    assert max(t.accuracy or 0 for t in grown) >= max(t.accuracy or 0 for t in started)
