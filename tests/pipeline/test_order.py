"""Which networks ``fit`` compares, in which order, and which it takes, by tables made by hand; nothing is timed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import convscale as cs
from convscale.choice.candidates import Candidate
from convscale.choice.decide import Option
from convscale.choice.facts import NetworkFacts, SizedSpec, Speed
from convscale.conditions import Conditions, Constraint
from convscale.errors import UserError
from convscale.images.splits import DataSplits
from convscale.learn.probe import Probe
from convscale.learn.recipe import Recipe
from convscale.networks.foreign import Foreign
from convscale.networks.offered import Filter
from convscale.networks.weight_files import WeightFiles
from convscale.pipeline.contender import Contender
from convscale.pipeline.finding import Finder
from convscale.pipeline.probing import Prober
from convscale.pipeline.reach import Reached
from convscale.pipeline.record import RunRecord
from convscale.pipeline.request import Training
from convscale.pipeline.steps import Fit
from convscale.show.fit_parts import Brief, Probed
from convscale.show.fit_parts import Candidate as Row
from tests.learn.nets import halves_data

SPEC = cs.get_spec("mobilenetv2_050")
SPLITS: DataSplits = halves_data()
BASIS: Any = SimpleNamespace(
    conditions=Conditions(device="cpu", batch_size=8, runtime="onnxruntime"), predicted=False, tuned=False, within=None
)


def _record(folder: Path, rows: list[Row]) -> RunRecord:
    record = RunRecord(folder, {}, resume=False)
    record.put(candidates=tuple(rows))
    return record


def _finder(
    record: RunRecord, constraint: Constraint, *, predicted: bool = False, size: int | None = 224, **asked: Any
) -> Finder:
    return Finder(
        asked=SimpleNamespace(**{"named": None, "image_size": size, "rows": None, "training": Training(), **asked}),  # type: ignore[arg-type]
        splits=SPLITS,
        basis=SimpleNamespace(**{**vars(BASIS), "predicted": predicted}),  # type: ignore[arg-type]
        constraint=constraint,
        record=record,
        folder=record.folder,
        say=lambda text: None,
    )


def _option(
    name: str,
    speed: float | tuple[float, float, float],
    top1: float,
    verdict: str = "yes",
    kind: str = "measured",
) -> Option:
    low, middle, high = speed if isinstance(speed, tuple) else (speed, speed, speed)
    return Option(
        candidate=Candidate(name=name, spec=SPEC, image_size=224, group=name, top1=top1, licence="MIT"),
        facts=NetworkFacts(params=1, macs=1, speed=Speed(low=low, images_per_s=middle, high=high, kind=kind)),
        verdict=verdict,
        batch_size=8,
    )


def _released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[Option], floor: float) -> Any:
    """What ``released`` keeps of options that are judged already."""
    finder = _finder(_record(tmp_path, []), Constraint(min_throughput=floor))
    reached = Reached(found=tuple((o.candidate, "pretrained") for o in options), unreached=())
    monkeypatch.setattr(Finder, "_reached", lambda self, files: reached)
    monkeypatch.setattr(Finder, "_judged_options", lambda self, pool: tuple(options))
    monkeypatch.setattr(Finder, "_members_instead", lambda self, rival: None)
    return finder.released(SimpleNamespace()), finder  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [None, 128, 224])
def test_a_size_at_which_nobody_published_a_figure_leaves_the_weights_in(tmp_path: Path, size: int | None) -> None:
    """As ``fit --data-dir ... --weights-dir ... --img-size 128`` asks, naming no network."""
    (tmp_path / "tf_efficientnet_lite0.in1k.pth").write_bytes(b"")
    finder = _finder(_record(tmp_path / "run", []), Constraint(min_throughput=1.0), size=size, offer=Filter())
    files = WeightFiles(folder=tmp_path)
    found = [
        (candidate.name, candidate.image_size, place) for candidate, place in finder._reached(files).found if place
    ]
    mine = tmp_path / "tf_efficientnet_lite0.in1k.pth"
    assert [row for row in found if row[2] == mine] == [("tf_efficientnet_lite0.in1k", size or 224, mine)]


def test_of_released_weights_the_accurate_ones_that_keep_the_speed_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [
        _option("fast", 900, 70.0),
        _option("slow", 90, 85.0, "no"),
        _option("good", 200, 80.0),
        _option("as good but faster", 300, 80.0),
    ]
    kept, finder = _released(tmp_path, monkeypatch, options, 150)
    assert [c.name for c in kept.contenders] == ["as good but faster", "good", "fast"]
    assert kept.missed == ""
    assert [row.name for row in finder.record.now.candidates if row.kept] == ["as good but faster", "good", "fast"]


def test_at_most_ten_are_probed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [_option(f"n{number}", 200, 60.0 + number) for number in range(12)]
    kept, _ = _released(tmp_path, monkeypatch, options, 150)
    assert [c.name for c in kept.contenders] == [f"n{number}" for number in range(11, 1, -1)]


def test_those_that_may_keep_it_do_by_their_middle_and_only_where_none_surely_does(tmp_path: Path) -> None:
    """As measured; a prediction has the probability that was asked for, or it does not keep it."""
    finder = _finder(_record(tmp_path, []), Constraint(min_throughput=150))
    sure, likely = _option("sure", 200, 70.0), _option("likely", (100, 150, 200), 80.0, "maybe")
    unlikely = _option("unlikely", (100, 149, 200), 81.0, "maybe")
    told = _option("told", (100, 180, 300), 81.0, "maybe", "predicted")
    assert finder._keeping([likely, sure, unlikely, told]) == [sure]
    assert finder._keeping([likely, unlikely, told]) == [likely]
    assert finder._keeping([unlikely, told]) == []
    assert finder._likely([likely, unlikely, told]) == [likely, told]


def test_where_nothing_keeps_it_the_fastest_is_taken_and_the_shortfall_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [_option("a", 90, 85.0, "no"), _option("b", 120, 70.0, "no")]
    kept, _ = _released(tmp_path, monkeypatch, options, 150)
    assert [c.name for c in kept.contenders] == ["b"]
    assert kept.missed == "nothing keeps at least 150 images/s: the fastest is b @224 with 120 images/s, 20% below"


def _member(name: str, macs: int, speed: float) -> tuple[tuple[SizedSpec, str, float], Row]:
    spec = dataclasses.replace(SPEC, name=name)
    row = Row(name=name, family=name, image_size=224, params=1, macs=macs)
    return (SizedSpec(spec, 224), name, speed), row


@pytest.mark.parametrize(
    ("floor", "contenders", "missed"),
    [
        (100.0, ["large", "small"], ""),  # 100 is just enough
        (101.0, ["small"], ""),
        (500.0, ["small"], "nothing keeps at least 500 images/s: the fastest is small with 400 images/s, 20% below"),
    ],
)
def test_of_scaled_members_the_larger_that_keep_the_speed_come_first(
    tmp_path: Path, floor: float, contenders: list[str], missed: str
) -> None:
    made = [_member("small", 10, 400.0), _member("large", 90, 100.0), _member("slow", 99, 50.0)]
    finder = _finder(_record(tmp_path, [row for _, row in made]), Constraint(min_throughput=floor))
    kept = finder._judged([found for found, _ in made])
    assert [c.name for c in kept.contenders] == contenders
    assert kept.missed == missed
    rows = {row.name: row for row in finder.record.now.candidates}
    assert {name for name, row in rows.items() if row.kept} == (set(contenders) if not missed else set())
    assert rows["slow"].reason == f"too slow: 50 of {floor:.0f} images/s"


def test_a_latency_is_a_constraint_of_fit_too(tmp_path: Path) -> None:
    """8 images in 40 ms are 200 images/s; the stricter of two limits counts."""
    record = _record(tmp_path, [])
    assert _finder(record, Constraint(max_latency_ms=40)).floor == pytest.approx(200)
    assert _finder(record, Constraint(max_latency_ms=40, min_throughput=300)).floor == pytest.approx(300)
    assert _finder(record, Constraint(max_latency_ms=40, min_throughput=100)).floor == pytest.approx(200)


def test_a_predicted_speed_counts_at_the_confidence_asked_for(tmp_path: Path) -> None:
    """An 80 % interval's lower end is passed with 90 %; with 50 % it is the middle that counts."""
    from convscale.show.fit_parts import Predicted

    record = _record(tmp_path, [])
    row = Row(name="a", image_size=224, predicted=Predicted(images_per_s=200.0, low=100.0, high=400.0))
    assert _finder(record, Constraint(min_throughput=1, confidence=0.9))._sure(row) == pytest.approx(100)
    assert _finder(record, Constraint(min_throughput=1, confidence=0.5))._sure(row) == pytest.approx(200)
    assert _finder(record, Constraint(min_throughput=1, confidence=0.8))._sure(row) == pytest.approx(
        200 * 0.5 ** (0.8416212 / 1.2815516)  # quantiles of the normal distribution
    )


def _contender(name: str, published: float | None, weights: str | None = "pretrained") -> Contender:
    return Contender(name=name, spec=SPEC, image_size=224, family=name, weights=weights, published=published)


def _probed(name: str, top1: float, published: float | None, validation: int = 100_000) -> Row:
    probe = Probed(top1=top1, train=1, validation=validation)
    return Row(name=name, image_size=224, probe=probe, published_top1=published, spec=SPEC.to_dict())


def test_the_finalists_are_those_whose_features_suit_the_data_best(tmp_path: Path) -> None:
    """1.2 and 1.4 points behind are as good as each other, so what was published decides; 10 points are not."""
    table = [("far", 0.80, 99.0), ("first", 0.90, 60.0), ("third", 0.888, 70.0), ("second", 0.886, 80.0)]
    rows = [_probed(*row) for row in table]
    finder = _finder(_record(tmp_path, rows), Constraint(min_throughput=1))
    contenders = [_contender(name, published) for name, _, published in table]
    made = finder.probed([_contender("scratch", None, None), *contenders], Recipe(name="x"))
    assert [c.name for c in made] == ["first", "second", "third", "scratch"]
    left = finder.record.row("far", 224)
    assert left is not None
    assert left.reason == "keeps it; its features are 10.0 points behind on this data"


def test_half_a_point_of_a_probe_says_nothing(tmp_path: Path) -> None:
    """0.4 points behind the best is no worse than it, so what was published decides; 0.6 points are."""
    table = [("best", 0.900, 70.0), ("near", 0.896, 80.0), ("behind", 0.894, 90.0)]
    rows = [_probed(*row) for row in table]
    finder = _finder(_record(tmp_path, rows), Constraint(min_throughput=1))
    made = finder.probed([_contender(name, published) for name, _, published in table], Recipe(name="x"))
    assert [c.name for c in made] == ["near", "best", "behind"]


@pytest.mark.parametrize(("images", "order"), [(112, ["near", "best", "far"]), (1_800, ["best", "near", "far"])])
def test_a_standard_error_of_a_probe_says_nothing(tmp_path: Path, images: int, order: list[str]) -> None:
    """The deviation of 80 % of 112 images is 3.8 points, of 1,800 0.94; 3 and 5 points behind are tried."""
    table = [("best", 0.80, 70.0), ("near", 0.77, 80.0), ("far", 0.75, 90.0)]
    finder = _finder(_record(tmp_path, [_probed(*row, images) for row in table]), Constraint(min_throughput=1))
    made = finder.probed([_contender(name, published) for name, _, published in table], Recipe(name="x"))
    assert [c.name for c in made] == order


def test_where_nothing_is_published_for_a_size_features_decide_all_the_same(tmp_path: Path) -> None:
    table = [("a", 0.78, None), ("b", 0.80, None), ("c", 0.79, None)]
    finder = _finder(_record(tmp_path, [_probed(*row, 112) for row in table]), Constraint(min_throughput=1))
    made = finder.probed([_contender(name, None) for name, *_ in table], Recipe(name="x"))
    assert [c.name for c in made] == ["b", "c", "a"]


def _fit(record: RunRecord, monkeypatch: pytest.MonkeyPatch, contenders: tuple[Contender, ...] = ()) -> Fit:
    from convscale.pipeline.contender import Kept

    finder = SimpleNamespace(probed=lambda found, recipe: found)
    monkeypatch.setattr(Fit, "_kept", lambda self, loaded: (Kept(contenders=contenders), finder))
    asked: Any = SimpleNamespace(
        constraint=Constraint(min_throughput=100),
        named=None,
        training=SimpleNamespace(recipe="small", brief_epochs=1, overrides={}, seed=0),
        strict=False,
        progress=None,
        size_for=lambda splits: 224,
        recipe_for=lambda splits, pretrained, image_size: "small",
    )
    return Fit(asked=asked, record=record, splits=SPLITS, folder=record.folder, basis=BASIS, files=None)


def test_the_first_three_are_finalists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["d", "b", "a", "c"]
    record = _record(tmp_path, [Row(name=name, image_size=224) for name in sorted(names)])
    _fit(record, monkeypatch, tuple(_contender(name, None, None) for name in names)).find()
    assert [(row.name, row.finalist) for row in record.now.candidates] == [
        ("a", True),
        ("b", True),
        ("c", False),
        ("d", True),
    ]
    assert record.now.constraint.min_throughput == 100


def test_the_comparison_takes_a_share_of_each_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = _fit(_record(tmp_path, []), monkeypatch)
    assert fit._few() is SPLITS
    monkeypatch.setattr("convscale.pipeline.steps.BRIEF_IMAGES", 24)
    few = fit._few()
    whole = SPLITS.train.class_counts().tolist()
    assert few.train.class_counts().tolist() == [round(24 / sum(whole) * count) for count in whole]
    assert few.validation is SPLITS.validation
    assert fit._few().train.labels.tolist() == few.train.labels.tolist()


BRIEFLY = {"a": 0.71, "b": 0.83, "c": 0.79}


def _compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, validation: int, epochs: int | None, probed: int = 3
) -> tuple[RunRecord, list[str]]:
    """Three finalists with these probes, compared; which of them were trained briefly."""
    tables = [("a", 0.80, 75.0), ("b", 0.78, 77.0), ("c", 0.70, 78.0)]
    rows = [dataclasses.replace(_probed(*row, validation), finalist=True) for row in tables]
    rows[probed:] = [dataclasses.replace(row, probe=None) for row in rows[probed:]]
    record = _record(tmp_path, rows)
    held = SPLITS.validation.subset([0] * validation)
    fit = dataclasses.replace(_fit(record, monkeypatch), splits=dataclasses.replace(SPLITS, validation=held))
    vars(fit.asked.training).update(brief_epochs=epochs)
    trained: list[str] = []

    def train(self: Fit, contender: Contender) -> Brief:
        trained.append(contender.name)
        return Brief(epochs=1, top1=BRIEFLY[contender.name], seconds=1.0)

    monkeypatch.setattr(Fit, "_train_briefly", train)
    fit.compare()
    return record, trained


def test_finalists_that_validation_does_not_tell_apart_are_not_trained_briefly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """80 % of 100 images are known to 4 points: b is as good as a, and more is published of it; c is 10 behind."""
    record, trained = _compared(tmp_path, monkeypatch, 100, None)
    assert trained == []
    assert record.now.winner.name == "b"
    assert (
        record.now.winner.reason
        == "by features and published accuracy the most promising of 3 finalists, and fast enough"
    )
    assert {row.name: row.reason for row in record.now.candidates} == {
        "a": "keeps it; its features are as good within 4.0 points, b comes first by its published accuracy",
        "b": "of 3 finalists the most promising by features and published accuracy",
        "c": "keeps it; its features are 10.0 points behind on this data",
    }
    assert record.now.choice_notes == (
        "the finalists were not trained briefly: 100 validation images tell no networks apart that are within 4.0 "
        "points; a new run with --brief-epochs 1 does it all the same",
    )


@pytest.mark.parametrize(
    ("validation", "epochs", "probed"),
    [(401, None, 3), (100, 1, 3), (100, None, 2)],
    ids=["many images", "asked for", "one without a probe"],
)
def test_finalists_are_trained_briefly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, validation: int, epochs: int | None, probed: int
) -> None:
    """80 % of 401 images are known to just less than 2 points."""
    record, trained = _compared(tmp_path, monkeypatch, validation, epochs, probed)
    assert trained == ["a", "b", "c"]
    assert record.now.winner.name == "b"
    assert record.now.choice_notes == ()


def _at_two_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, validation: int) -> RunRecord:
    """One network at two image sizes: the smaller, which stands second, is the better by features and when trained."""
    rows = [
        dataclasses.replace(_probed("a", 0.70, None, validation), finalist=True, image_size=288),
        dataclasses.replace(_probed("a", 0.90, None, validation), finalist=True),
    ]
    record = _record(tmp_path, rows)
    held = SPLITS.validation.subset([0] * validation)
    fit = dataclasses.replace(_fit(record, monkeypatch), splits=dataclasses.replace(SPLITS, validation=held))
    vars(fit.asked.training).update(brief_epochs=None)
    share = {224: 0.9, 288: 0.7}
    monkeypatch.setattr(Fit, "_train_briefly", lambda self, c: Brief(epochs=1, top1=share[c.image_size], seconds=1.0))
    fit.compare()
    chosen = record.now.chosen
    assert chosen is not None
    assert (record.now.winner.name, record.now.winner.image_size, chosen.image_size) == ("a", 224, 224)
    assert fit._winner().image_size == 224
    return record


def test_of_one_network_at_two_sizes_the_better_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_features = _at_two_sizes(tmp_path / "few", monkeypatch, 50)
    assert [row.reason for row in by_features.now.candidates] == [
        "keeps it; its features are 20.0 points behind on this data",
        "of 2 finalists the most promising by features",
    ]
    trained = _at_two_sizes(tmp_path / "many", monkeypatch, 5_000)
    assert [row.reason for row in trained.now.candidates] == [
        "20.0 points behind a @224 after 1 epoch",
        "most accurate on validation after 1 epoch",
    ]


def test_a_network_of_the_users_own_stays_the_one_that_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the zoo has one of its name."""
    net = cs.create_model("resnet18", num_classes=3)
    row = Row(name="resnet18", image_size=224, finalist=True)
    fit = _fit(_record(tmp_path, [row]), monkeypatch)
    vars(fit.asked).update(named=(net,))
    spec = fit.contenders()[0].spec
    assert isinstance(spec, Foreign)
    assert spec.module is net


OWN = """
from torch import nn

def make(num_classes=7):
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
"""


def test_what_nobody_released_is_a_candidate_beside_what_somebody_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function of the user's and a bare architecture join; a name whose weights are out of reach is said."""
    (tmp_path / "tf_efficientnet_lite0.in1k.pth").write_bytes(b"")
    (tmp_path / "own_nets_of_mine.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    named = ("tf_efficientnet_lite0", "tf_efficientnet_lite1", "own_nets_of_mine:make", SPEC)
    record = _record(tmp_path / "run", [])
    finder = _finder(record, Constraint(min_throughput=1.0), size=128, named=named, offer=Filter())
    found = finder._reached(WeightFiles(folder=tmp_path)).found
    assert [(candidate.name, place is not None) for candidate, place in found] == [
        ("tf_efficientnet_lite0.in1k", True),
        ("own_nets_of_mine:make", False),
        (SPEC.name, False),
    ]
    assert record.now.choice_notes == ("left out, since their weights can not be had: tf_efficientnet_lite1.in1k",)


def test_limits_on_size_hold_for_networks_that_were_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MobileNetV2 at half its width has 2.0 M parameters, at full width 3.5 (timm's table), of each 1.3 in a head of
    1000 classes.
    """
    specs = [SizedSpec(SPEC, 224), SizedSpec(cs.get_spec("mobilenetv2_100"), 224)]
    monkeypatch.setattr(Finder, "_speed", lambda self, one, family: 500.0)
    for limit, left in ((1.5, ["mobilenetv2_050"]), (4.0, ["mobilenetv2_100", "mobilenetv2_050"])):
        rows = [Row(name=one.spec.name, image_size=224, params=1, macs=number) for number, one in enumerate(specs)]
        record, limits = _record(tmp_path / str(limit), rows), Constraint(min_throughput=100, max_params_m=limit)
        finder = _finder(record, limits, named=("x",), networks=specs)
        assert [c.name for c in finder.scaled().contenders] == left
        note = f"left out: mobilenetv2_100: larger than at most {limit} M parameters"
        assert record.now.choice_notes == ((note,) if len(left) == 1 else ())
    finder = _finder(record, Constraint(min_throughput=100, max_params_m=0.5), named=("x",), networks=specs)
    with pytest.raises(UserError, match="no network that was named keeps"):
        finder.scaled()


def test_smaller_images_start_from_the_smallest_that_was_too_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 224 px 90 of 100 images/s were measured, so 192 px are tried, whatever 288 px is guessed at; and networks
    above a limit on parameters take no place.
    """
    options = [_option("a", 75, 81.0, "no"), _option("a", 90, 80.0, "no"), _option("large", 90, 90.0, "no")]
    options[0] = dataclasses.replace(options[0], candidate=dataclasses.replace(options[0].candidate, image_size=288))
    facts = dataclasses.replace(options[2].facts, params=50_000_000)
    options[2] = dataclasses.replace(options[2], facts=facts)
    monkeypatch.setattr(
        Finder,
        "_candidates",
        lambda self, names, sizes: [SimpleNamespace(name=names[0], image_size=sizes[0], why_not="")],
    )
    finder = _finder(_record(tmp_path, []), Constraint(min_throughput=100, max_params_m=6), size=None)
    assert [(c.name, c.image_size) for c in finder._smaller(options)] == [("a", 192)]


def test_a_run_that_was_stopped_while_it_probed_keeps_its_probes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = _record(tmp_path, [_probed("good", 0.8, 80.0)])
    finder = _finder(record, Constraint(min_throughput=150))
    options = [_option("good", 200, 80.0), _option("new", 300, 70.0)]
    finder._write_options(options, options, {"good": "pretrained", "new": "pretrained"})
    assert [row.probe.top1 if row.probe else None for row in record.now.candidates] == [0.8, None]


def test_a_network_is_probed_where_its_images_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both on the device that trains: here ``meta``, in the place of a GPU."""
    seen = {}

    def probe(net: Any, train: Any, validation: Any, preprocessing: Any, *, device: torch.device) -> Probe:
        seen.update(net=next(net.parameters()).device.type, images=device.type)
        return Probe(top1=0.5, train=1, validation=1, seconds=0.0)

    monkeypatch.setattr("convscale.pipeline.probing.probe", probe)
    finder = _finder(_record(tmp_path, []), Constraint(min_throughput=1), training_device="meta")
    prober = Prober(asked=finder.asked, splits=SPLITS, record=finder.record, say=print)
    prober._probe(_contender("mobilenetv2_050", None, None), Recipe(name="x"))
    assert seen == {"net": "meta", "images": "meta"}


def test_a_search_looks_at_the_output_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (output / "mine.txt").write_text("kept")

    def search(*given: Any, **options: Any) -> None:
        raise AssertionError("minutes of searching")

    monkeypatch.setattr("convscale.pipeline.searched.search", search)
    with pytest.raises(UserError, match="exists and is not empty"):
        cs.fit(SPLITS, output=output, min_throughput=1.0, search=30.0)


def test_the_winner_is_the_most_accurate_after_brief_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    briefs = {"a": 0.71, "b": 0.83, "c": 0.79}
    rows = [
        Row(
            name=name,
            image_size=224,
            finalist=True,
            brief=Brief(epochs=1, top1=top1, seconds=1.0),
            spec=SPEC.to_dict(),
        )
        for name, top1 in briefs.items()
    ]
    record = _record(tmp_path, [*rows, Row(name="left out", image_size=224)])
    _fit(record, monkeypatch).compare()
    assert record.now.winner.name == "b"
    assert record.now.winner.reason == "the most accurate of 3 finalists on validation after 1 epoch, and fast enough"
    assert {row.name: row.reason for row in record.now.candidates} == {
        "a": "12.0 points behind b after 1 epoch",
        "b": "most accurate on validation after 1 epoch",
        "c": "4.0 points behind b after 1 epoch",
        "left out": None,
    }
