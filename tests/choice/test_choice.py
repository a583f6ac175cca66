"""Choosing: fronts, reasons, maybes and bisections against tables made by hand; nothing here is timed."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import convscale as cs
from convscale.arch.rules import ScalingRule, save_rule
from convscale.arch.scaling import scale
from convscale.arch.spec import NetSpec
from convscale.choice import largest as choice_scaling
from convscale.choice import measured as choice_measured
from convscale.choice import speeds as choice_speeds
from convscale.choice.basis import Asked, Basis, basis_of
from convscale.choice.candidates import Candidate, aligned_variants, candidates_of
from convscale.choice.choose import choose
from convscale.choice.decide import Choice, Judged, Option, beats, decide, front_of
from convscale.choice.facts import NetworkFacts, SizedSpec, Speed
from convscale.choice.largest import Direction, Effort, Largest, crossing, largest_under, own_device
from convscale.choice.measured import Bench, explore, sized_spec_of
from convscale.choice.speeds import facts_of
from convscale.conditions import Conditions, Constraint
from convscale.cost.counting import count
from convscale.errors import DoesNotFit, UserError
from convscale.machine import Environment
from convscale.networks.foreign import Foreign
from convscale.networks.offered import Filter, in_zoo
from convscale.predictor.fitted import usual_on
from convscale.speed import measuring
from convscale.speed.timing import Measurement
from tests.predictor.calibrations import calibration_file

SPEC = cs.get_spec("mobilenetv2_050")


def option(
    name: str,
    speed: float | tuple[float, float, float] | None,
    top1: float | None = None,
    *,
    size: int = 224,
    group: str = "",
    macs: int = 100,
    params: int = 1_000_000,
    memory: int = 2**30,
    batch: int = 8,
    kind: str = "predicted",
    **fact_fields: Any,
) -> Option:
    """An option of a hand-made table; ``speed`` is (low, middle, high) or exact."""
    if speed is not None and not isinstance(speed, tuple):
        speed = (speed, speed, speed)
    held = None if speed is None else Speed(low=speed[0], images_per_s=speed[1], high=speed[2], kind=kind)
    return Option(
        candidate=Candidate(name=name, spec=SPEC, image_size=size, group=group or name, top1=top1),
        facts=NetworkFacts(params=params, macs=macs, memory_bytes=memory, speed=held, **fact_fields),
        batch_size=batch,
    )


def names(options: Any) -> list[str]:
    return [o.name for o in options]


def reason(parts: Judged, name: str) -> str:
    return next(o.reason for o in parts.options if o.name == name)


TABLE = [
    option("a", 4000, 70.0),
    option("b", 3000, 75.0),
    option("c", 2500, 74.0),  # slower and worse than b
    option("d", 2000, 80.0),
    option("e", 1000, 83.0),
    option("f", 1000, 82.0),  # as fast as e, worse
    option("g", 3500, None),
]


def test_the_front_holds_what_nothing_beats() -> None:
    assert names(front_of(TABLE)) == ["a", "b", "d", "e"]


def test_the_front_equals_brute_force() -> None:
    draw = random.Random(3)
    table = [option(str(i), draw.randint(1, 30), float(draw.randint(1, 30))) for i in range(60)]

    def beaten(o: Option) -> bool:
        return any(
            (p.images_per_s or 0) >= (o.images_per_s or 0)
            and (p.top1 or 0) >= (o.top1 or 0)
            and (p.images_per_s, p.top1) != (o.images_per_s, o.top1)
            for p in table
        )

    assert {(o.images_per_s, o.top1) for o in front_of(table)} == {
        (o.images_per_s, o.top1) for o in table if not beaten(o)
    }


def test_the_best_is_the_most_accurate_that_keeps_the_speed() -> None:
    parts = decide(TABLE, Constraint(min_throughput=2000))
    assert parts.best.name == "d"
    assert parts.best.reason == "the most accurate of 4 that keep at least 2,000 images/s"
    assert names(parts.alternatives) == ["g"]
    assert parts.maybe == ()
    assert set(names(parts.rejected)) == {"a", "b", "c", "e", "f"}
    assert reason(parts, "b") == "keeps it, but 5.00 points less accurate than d @224"
    assert reason(parts, "e") == "too slow: 1,000 images/s predicted (80 %: 1,000 to 1,000), needed 2,000"
    assert [o.verdict for o in parts.front] == ["yes", "yes", "yes", "no"]


def test_of_two_equally_accurate_the_faster_wins() -> None:
    parts = decide([option("slow", 2000, 80.0), option("fast", 3000, 80.0)], Constraint(min_throughput=1000))
    assert parts.best.name == "fast"
    assert reason(parts, "slow") == "keeps it, but no more accurate than fast @224, which is faster"


def test_an_interval_across_the_constraint_is_a_maybe() -> None:
    table = [
        option("sure", (2100, 2300, 2500), 80.0),
        option("better", (1900, 2050, 2200), 82.0),
        option("worse", (1900, 2050, 2200), 79.0),
    ]
    parts = decide(table, Constraint(min_throughput=2000))
    assert parts.best.name == "sure"
    assert names(parts.maybe) == ["better"]
    assert names(parts.rejected) == ["worse"]
    assert reason(parts, "worse").startswith("maybe fast enough, but 1.00 points less accurate")
    assert "needed 2,000" in reason(parts, "better")


def test_where_only_a_maybe_is_left_the_choice_is_not_certain() -> None:
    table = [
        option("likely", (1900, 2100, 2300), 80.0),
        option("unlikely", (1500, 1700, 2010), 85.0),
        option("no", (100, 110, 120), 90.0),
    ]
    parts = decide(table, Constraint(min_throughput=2000))
    assert (parts.best.name, parts.best.verdict) == ("likely", "maybe")
    assert names(parts.maybe) == ["unlikely"]
    assert "not certain" in parts.best.reason


@pytest.mark.parametrize(("floor", "chance"), [(1000.0, 0.5), (800.0, 0.9), (1250.0, 0.1), (1600.0, 0.0052)])
def test_the_chance_follows_the_80_percent_interval(floor: float, chance: float) -> None:
    """800 to 1250 around 1000 is symmetric in the logarithm: a tenth lies beyond either end; 1600 is 2.7 deviations
    away less a bit.
    """
    assert option("x", (800, 1000, 1250)).chance(floor) == pytest.approx(chance, abs=0.002)


def test_a_measured_speed_has_no_chance() -> None:
    assert option("x", (800, 1000, 1250), kind="measured").chance(900) is None


def test_without_a_figure_at_its_size_an_option_ranks_within_its_weights() -> None:
    table = [
        option("w", 3000, 80.0, size=224, macs=100),
        option("w", 2500, None, size=256, macs=130),
        option("w", 2200, None, size=272, macs=150),
        option("w", 1500, 81.0, size=288, macs=170),
        option("w", 3500, None, size=192, macs=70),
        option("v", 2600, 79.0, size=224, macs=110),
    ]
    parts = decide(table, Constraint(min_throughput=2000))
    assert parts.best.label == "w @224"
    assert [o.label for o in parts.alternatives] == ["w @272"]
    reasons = {o.label: o.reason for o in parts.rejected}
    assert reasons["w @256"] == "keeps it, but w @272, larger and of the same weights, keeps it too"
    assert reasons["w @192"] == "keeps it, but w @224, larger and of the same weights, keeps it too"
    assert set(reasons) == {"w @256", "w @192", "w @288", "v @224"}


def test_scaled_members_are_ranked_by_size_within_their_family() -> None:
    table = [option(f"n{i}", 4000 / i, group="net", macs=i) for i in (1, 2, 3, 4)] + [
        option("m1", 5000, group="other", macs=1)
    ]
    parts = decide(table, Constraint(min_throughput=1500))
    assert parts.best.name == "n2"
    assert parts.best.top1 is None
    assert "families compare by training only" in parts.best.reason
    assert names(parts.alternatives) == ["m1"]
    assert reason(parts, "n1") == "keeps it, but n2 @224, larger and of the same family, keeps it too"
    assert names(parts.front) == ["m1", "n1", "n2", "n3", "n4"]


def test_options_of_different_groups_without_figures_do_not_compare() -> None:
    assert beats(option("a", 1, group="x"), option("b", 1, group="y")) is None
    assert beats(option("a", 1, 70.0), option("b", 1)) is None
    assert beats(option("a", 1, 70.0), option("b", 1, 69.0)) is True


def test_memory_and_parameters_are_constraints_too() -> None:
    table = [
        option("big", 900, 85.0, params=80_000_000),
        option("hungry", 900, 84.0, memory=20 * 2**30),
        option("fits", 900, 80.0),
    ]
    parts = decide(table, Constraint(max_params_m=50, max_memory_gb=16))
    assert parts.best.name == "fits"
    assert reason(parts, "big") == "too large: 80.0 M parameters, at most 50 M"
    assert reason(parts, "hungry") == "takes 20.00 GB at batch 8, at most 16 GB"


def test_a_latency_is_a_throughput_at_the_batch() -> None:
    assert Constraint(max_latency_ms=4).floor(8) == pytest.approx(2000)
    assert Constraint(max_latency_ms=4, min_throughput=3000).floor(8) == pytest.approx(3000)
    assert Constraint(max_params_m=4).floor(8) == 0


@pytest.mark.parametrize("value", [0, -5, float("nan"), float("inf"), True, "fast"])
@pytest.mark.parametrize("name", ["min_throughput", "max_latency_ms", "max_memory_gb", "max_params_m"])
def test_a_limit_that_is_not_above_zero_is_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"{name} is .*; it must be a finite number above 0"):
        Constraint(**{name: value})


def test_when_nothing_keeps_it_the_fastest_is_named() -> None:
    with pytest.raises(
        UserError,
        match=r"no candidate keeps at least 9,000 images/s; the fastest is a @224 with 4,000 images/s predicted",
    ):
        decide(TABLE, Constraint(min_throughput=9000))
    with pytest.raises(UserError, match=r"the smallest is x @224 with 1\.0 M parameters and 1\.00 GB at batch 8"):
        decide([option("x", 100, 70.0)], Constraint(max_params_m=0.5))


def test_a_network_that_can_not_be_traced_is_rejected_with_its_operator() -> None:
    table = [option("ok", 100, 70.0), option("broken", None, 90.0, failed="can not be traced: operator nonzero")]
    parts = decide(table, Constraint(min_throughput=50))
    assert parts.best.name == "ok"
    assert reason(parts, "broken") == "can not be traced: operator nonzero"


# --- candidates


def test_weights_come_with_their_published_accuracy_and_recipe() -> None:
    found = {c.label: c for c in candidates_of(["tresnet_m"])}
    best = found["tresnet_m.miil_in21k_ft_in1k @224"]
    assert best.top1 == pytest.approx(83.1, abs=0.05)  # PAPERS: TResNet-M from ImageNet-21k
    assert best.recipe == "miil_in21k_ft_in1k"
    assert "timm" in best.source
    assert found["tresnet_m.miil_in1k_448 @448"].top1 == pytest.approx(81.7, abs=0.05)


def test_at_a_size_without_a_figure_no_accuracy_is_claimed() -> None:
    found = candidates_of("resnet50.a1_in1k", image_sizes=[224, 225])
    assert [(c.image_size, c.top1 is None) for c in found] == [(224, False), (225, True)]


def test_a_size_that_a_network_does_not_take_is_said() -> None:
    assert "multiple of 4" in candidates_of("tresnet_m", image_sizes=[225])[0].why_not


def test_candidates_are_patterns_specs_and_own_accuracies() -> None:
    own = candidates_of("mixnet*", offer=Filter(zoo="own"))
    assert {c.name for c in own} == set(cs.list_models("mixnet*", pretrained=True))
    spec = scale("efficientnet_b0", phi=1.0)
    (one,) = candidates_of([spec])
    assert (one.name, one.group, one.top1, one.image_size) == (spec.name, "efficientnet_b0", None, spec.input.size)
    (own,) = candidates_of([spec], accuracy={spec.name: 76.5})
    assert (own.top1, own.source) == (76.5, "given by the caller")
    assert all(c.top1 is None for c in candidates_of("resnet18", accuracy="none"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet5O",), r"no model matches 'resnet5O' \(nearest: resnet50"),
        (([],), "candidates is empty"),
        (("resnet50", [0]), "image size is 0"),
        (("resnet50", None, "imagnet"), r"accuracy 'imagnet' is unknown \(nearest: imagenet\)"),
        (("resnet18", None, {"resnet18.a1_in1k": 150}), "must be in percent"),
        (([3],), "a candidate is a name, a pattern or a NetSpec, got 3"),
    ],
)
def test_bad_candidates_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        candidates_of(*arguments)


@pytest.mark.parametrize(
    ("name", "variant", "params_m", "gmacs"),
    [
        ("tresnet_l", "tresnet_l-base80", 61.89, 12.05),
        ("tresnet_l", "tresnet_l-base72", 50.39, 9.77),
        ("tresnet_xl", "tresnet_xl-base80", 72.97, 14.09),
    ],
)
def test_aligned_variants_have_the_papers_sizes(name: str, variant: str, params_m: float, gmacs: float) -> None:
    """Counted on timm's TResNet with these base widths by torch's FlopCounterMode / 2."""
    found = {spec.name: spec for spec in aligned_variants(cs.get_spec(name))}
    cost = count(found[variant])
    assert (cost.params / 1e6, cost.macs / 1e9) == (pytest.approx(params_m, abs=0.006), pytest.approx(gmacs, abs=0.006))


def test_a_rounded_variant_changes_odd_widths_alone_and_aligned_networks_need_none() -> None:
    first = aligned_variants(cs.get_spec("tresnet_l"))[0]
    assert first.name == "tresnet_l-x8"
    assert (first.stem.widths, first.widths) == ((80,), (80, 152, 1216, 2432))
    assert all(
        aligned_variants(cs.get_spec(name)) == []
        for name in ("tresnet_m", "resnet50", "efficientnet_b0", "resnext50_32x4d")
    )


# --- networks of other code


def fake_examine_any(network: SizedSpec, basis: Basis) -> NetworkFacts:
    """All the same."""
    speed = Speed(images_per_s=100, low=90, high=110, kind="predicted")
    return NetworkFacts(params=1, macs=1, memory_bytes=1, speed=speed)


def test_every_released_convnet_is_a_candidate_at_its_published_sizes() -> None:
    found = candidates_of(None)
    assert {c.name for c in found} == {name for name, each in in_zoo("all").items() if not each.attention}
    sizes = {c.image_size: c.top1 for c in found if c.name == "convnext_tiny.in12k_ft_in1k"}
    assert sizes == {224: 84.192, 288: 84.448}  # timm's table of results
    own = {c.name: c.spec for c in found if c.name == "resnet50.a1_in1k"}
    assert isinstance(own["resnet50.a1_in1k"], NetSpec)  # both zoos have it: it counts once, as the own code builds it
    assert len({c.label for c in found}) == len(found)


def test_candidates_carry_licence_data_and_source(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice_speeds, "examine", fake_examine_any)
    c = choose(device="rtx-4090", min_throughput=1, candidates=["vgg16.tv_in1k", "timm/repvgg_b0"])
    rows = {row["name"]: row for row in (o.to_dict() for o in c.options)}
    vgg = rows["vgg16.tv_in1k"]
    assert (vgg["licence"], vgg["extra_data"], vgg["top1"]) == ("bsd-3-clause", "", 71.594)  # timm's card and table
    assert "results-imagenet.csv" in str(vgg["source"])
    assert rows["repvgg_b0.rvgg_in1k"]["licence"] == "mit"


def test_filters_leave_candidates_out(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice_speeds, "examine", fake_examine_any)

    def chosen(**keywords: Any) -> Choice:
        return choose(device="rtx-4090", min_throughput=1, **keywords)

    nano = "convnextv2_nano*"
    assert {o.licence for o in chosen(candidates=nano).options} == {"cc-by-nc-4.0"}
    with pytest.raises(UserError, match="are left out by --commercial"):
        chosen(candidates=nano, commercial=True)
    assert {o.candidate.extra_data for o in chosen(extra_data=False).options} == {""}
    assert {o.candidate.licence for o in chosen(licences=["mit"]).options} == {"mit"}
    assert all(isinstance(o.spec, NetSpec) for o in chosen(zoo="own").options)
    assert all(isinstance(o.spec, Foreign) for o in chosen(zoo="timm", candidates="resnet18").options)
    attention = chosen(candidates="vit_tiny*", attention=True)
    assert any("networks with attention are among the candidates" in note for note in attention.notes)
    with pytest.raises(UserError, match="licence 'gpl' is unknown"):
        chosen(licences=["gpl"])


def test_merged_networks_are_said_to_be_merged() -> None:
    """RepVGG-A0: 8.31 M parameters merged, 9.11 M as trained (arXiv 2101.03697, table 4: 8.30 and 9.10)."""
    network = SizedSpec(Foreign("repvgg_a0", "timm"), 224)
    facts = choice_speeds.examine(network, basis_of(Asked(device="rtx-4090")))
    assert facts.fused
    assert facts.params / 1e6 == pytest.approx(8.31, abs=0.006)
    trained = choice_speeds.examine(network, basis_of(Asked(device="rtx-4090", mode="train", batch_size=2)))
    assert not trained.fused
    assert trained.params / 1e6 == pytest.approx(9.11, abs=0.006)


def test_autocast_in_bfloat16_is_counted_where_it_is_measured() -> None:
    """In half the bytes: the peak is under that of single precision, the work is the same."""
    half, other = (
        choice_speeds.examine(SizedSpec(SPEC, 64), basis_of(Asked(runtime="eager", precision=precision)))
        for precision in ("amp_bf16", "fp32")
    )
    assert (half.failed, half.speed) == ("", None)
    assert (half.params, half.macs) == (other.params, other.macs)
    assert half.memory_bytes < other.memory_bytes


def test_attention_is_a_doubt() -> None:
    network = SizedSpec(Foreign("vit_tiny_patch16_224", "timm"), 224)
    facts = choice_speeds.examine(network, basis_of(Asked(device="rtx-4090")))
    assert facts.speed is not None
    assert any("attention" in doubt for doubt in facts.speed.doubts)


def test_processes_build_timms_networks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CONVSCALE_CACHE", str(tmp_path))
    monkeypatch.setattr(choice_speeds, "MANY", 2)
    monkeypatch.setattr(choice_speeds, "traced_before", lambda networks, basis: {})
    basis = basis_of(Asked(device="rtx-4090"))
    networks = [SizedSpec(Foreign("mobilenetv3_small_050", "timm"), 64), SizedSpec(SPEC, 64)]
    alone = {network: choice_speeds.examine(network, basis) for network in networks}
    monkeypatch.setattr(choice_speeds, "examine", lambda *a: pytest.fail("left to this process"))
    assert facts_of(networks, basis) == alone


def test_what_is_traced_has_the_compilers_doubt_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``predict`` says it, and what was traced beforehand."""
    monkeypatch.setattr(choice_speeds, "compiler_doubt", lambda compiled, eager: f"slow: {compiled:.0f}, {eager:.0f}")
    network = SizedSpec(SPEC, 40)
    eager = choice_speeds.examine(network, basis_of(Asked(device="l4"))).speed
    compiled_basis = basis_of(Asked(device="l4", compiled=True))
    made = choice_speeds.examine(network, compiled_basis).speed
    assert eager is not None
    assert made is not None
    assert made.doubts.count(f"slow: {made.images_per_s:.0f}, {eager.images_per_s:.0f}") == 1
    assert not any(each.startswith("slow: ") for each in eager.doubts)
    assert made.doubts == choice_speeds.predicted(network, compiled_basis).doubts


def test_a_network_without_an_eager_workload_takes_no_doubt_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two networks whose compiled workloads travel, one whose eager one does too."""
    monkeypatch.setattr(choice_speeds, "compiler_doubt", lambda compiled, eager: "slow")
    basis = basis_of(Asked(device="l4", compiled=True))
    one, other = (SizedSpec(cs.get_spec(name), 224) for name in ("resnet18", "resnet50"))
    held = choice_speeds.store("eager")
    assert held is not None
    find = type(held).find
    monkeypatch.setattr(
        type(held), "find", lambda self, spec, *a: None if (self, spec) == (held, other.spec) else find(self, spec, *a)
    )
    made = choice_speeds.traced_before([other, one], basis)
    doubts = [made[network].speed.doubts for network in (other, one)]  # pyright: ignore[reportOptionalMemberAccess]
    assert ["slow" in each for each in doubts] == [False, True]


# --- bisection


def test_bisection_equals_brute_force() -> None:
    for last in range(25):
        for answer, start in itertools.product(range(-1, last + 1), range(last + 1)):
            assert crossing(last, lambda i, answer=answer: i <= answer, start=start) == (
                answer if answer >= 0 else None
            )


def test_a_pocket_beyond_the_crossing_is_found() -> None:
    keeps = {*range(10), 12}
    assert crossing(30, lambda i: i in keeps, start=5) == 12
    assert crossing(30, lambda i: i in {*range(10), 20}, start=5) == 9  # too far beyond


def test_members_far_beyond_the_answer_are_never_tried() -> None:
    asked = []
    crossing(1000, lambda i: asked.append(i) or i <= 100, start=100)
    assert max(asked) < 110


def work(spec: NetSpec, image_size: int) -> float:
    """Grows with depth, width and size, as multiply-accumulates do."""
    blocks = sum(run.repeat * run.block.width for stage in spec.stages for run in stage.runs)
    return float(image_size**2 * (blocks + sum(spec.stem.widths)))


def largest(
    base: NetSpec | str,
    *,
    device: str,
    min_throughput: float | None = None,
    along: str = "phi",
    rule: Any = "compound",
    confidence: float = 0.5,
) -> Largest:
    """The largest scale of a network under the usual conditions of a device."""
    direction = Direction(along=along, rule=rule)
    constraint = Constraint(min_throughput=min_throughput, confidence=confidence)
    return largest_under(base, basis_of(Asked(device=device)), constraint, direction, Effort())


def fake_examine(network: SizedSpec, basis: Basis) -> NetworkFacts:
    """1e8 units of work a second, 10 % either way."""
    amount = work(*network)
    value = 1e11 / amount
    speed = Speed(images_per_s=value, low=value / 1.1, high=value * 1.1, kind="predicted", bound_by="compute")
    return NetworkFacts(
        params=sum(network.spec.widths),
        macs=int(amount),
        memory_bytes=2**30,
        speed=speed if basis.predicted else None,
    )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Predictions by a rule of thumb, in this process, cached in a new folder."""
    monkeypatch.setenv("CONVSCALE_CACHE", str(tmp_path))
    monkeypatch.setattr(choice_speeds, "examine", fake_examine)
    monkeypatch.setattr(choice_speeds, "traced_before", lambda networks, basis: {})
    monkeypatch.setattr(choice_speeds, "MANY", 10**9)
    return tmp_path


@pytest.mark.parametrize(
    ("along", "rule", "floor", "deviations"),
    [
        ("phi", "compound", 2000.0, 0.0),
        ("phi", "fast", 900.0, 0.84162),
        ("phi", ScalingRule(alpha=1.3, beta=1.05, gamma=1.1), 900.0, 0.0),
        ("resolution", "compound", 1500.0, 0.84162),
        ("width", "compound", 600.0, 0.0),
    ],
)
def test_the_largest_scale_equals_brute_force(
    fake: Path, along: str, rule: Any, floor: float, deviations: float
) -> None:
    """By the middle, or four in five: as many deviations of ln 1.1 / 1.28155."""
    if isinstance(rule, ScalingRule):  # by its file, as ``choose --scale --rule FILE`` takes it
        save_rule(rule, fake / "rule.yaml")
        rule = str(fake / "rule.yaml")
    base, confidence = cs.get_spec("mobilenetv2_050"), 0.8 if deviations else 0.5
    found = largest(base, device="rtx-4090", min_throughput=floor, along=along, rule=rule, confidence=confidence)
    least = floor * 1.1 ** (deviations / 1.28155)
    assert found.found.speed.images_per_s >= least

    def speed(value: float) -> float:
        if along == "resolution":
            return 1e11 / work(base, int(value))
        made = (scale(base, phi=value, rule=rule) if value else base) if along == "phi" else scale(base, width=value)
        return 1e11 / work(made, made.input.size)

    step = 1.0 if along == "resolution" else 0.05
    every = (
        [32 + i for i in range(800)]
        if along == "resolution"
        else [round(i * step, 4) for i in range(2 if along == "width" else -120, 161)]
    )
    assert found.value == max(value for value in every if speed(value) >= least)
    assert found.sure is not None
    assert found.sure.speed.low >= floor
    assert found.sure.value <= found.value
    assert found.following is not None
    assert found.following.speed.images_per_s < least


def test_what_is_predicted_for_the_own_processor_is_measured_and_taken_back(
    fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured 2 % slower than predicted, so a smaller member is the answer; for a card that is not here nothing is
    measured.
    """
    asked: list[int] = []

    def time_network(network: SizedSpec, basis: Basis, seconds: float) -> Measurement:
        spec, size = network
        assert basis.conditions.device == "cpu"
        asked.append(size)
        return timed(8, 0.98 * 1e11 / work(spec, size), size, spec.name)

    monkeypatch.setattr(choice_scaling, "time_network", time_network)
    predicted = largest("resnet18", device="rtx-4090", min_throughput=1500, along="resolution")
    assert (predicted.confirmed, asked) == (None, [])
    basis = Basis(conditions=Conditions(device="cpu"), calibration="made-up")
    monkeypatch.setattr(
        choice_speeds, "_keys", lambda units, basis: {unit: f"{unit.spec.name} {unit.image_size}" for unit in units}
    )
    monkeypatch.setattr(Basis, "read_calibration", lambda self: None)
    constraint, along = Constraint(min_throughput=1500), Direction(along="resolution")
    found = largest_under("resnet18", basis, constraint, along, Effort())
    wanted = max(size for size in range(32, 897) if 0.98 * 1e11 / work(cs.get_spec("resnet18"), size) >= 1500)
    assert found.value == wanted < predicted.value
    assert found.confirmed is not None
    assert found.confirmed.kind == "measured"
    assert asked == list(range(int(predicted.value), int(found.value) - 1, -1))
    assert "on this machine: " in str(found)
    assert "images/s measured (middle half: 1,508 to 1,508), keeps it" in str(found)
    assert found.following is not None
    assert (found.following.value, found.following.speed.kind) == (found.value + 1, "measured")
    assert found.following.speed.images_per_s < 1500
    assert not largest_under("resnet18", basis, constraint, along, Effort(confirm=False)).confirmed


def test_what_a_calibration_predicted_is_measured_with_its_threads(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prediction of one thread, measured on all cores, was kept by a network that misses it."""

    def calibrated(device: str, threads: int | None) -> Basis:
        return basis_of(Asked(device=device), calibration_file(fake, device, threads))

    assert calibrated("cpu", None).conditions.threads is None
    assert calibrated("l4", 8).conditions.threads is None, "what a GPU is measured with does not matter"
    asked: list[int | None] = []

    def time_network(network: SizedSpec, basis: Basis, seconds: float) -> Measurement:
        asked.append(basis.conditions.threads)
        return timed(8, 1e4, network.image_size, network.spec.name)

    monkeypatch.setattr(choice_scaling, "time_network", time_network)
    found = largest_under(
        "resnet18", calibrated("cpu", 3), Constraint(min_throughput=1500), Direction(along="resolution"), Effort()
    )
    assert found.basis.conditions.threads == 3
    assert asked == [3]


def full_above(size: int, message: str = "memory does not hold it") -> Any:
    """Times networks at 10,000 images/s; those of larger images do not fit in memory."""

    def time_network(network: SizedSpec, basis: Basis, seconds: float) -> Measurement:
        if network.image_size > size:
            raise DoesNotFit(message)
        return timed(8, 1e4, network.image_size, network.spec.name)

    return time_network


def test_what_does_not_fit_in_memory_is_not_the_largest(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice_measured, "time_network", full_above(250))
    said: list[str] = []
    basis, along = basis_of(Asked(runtime="onnxruntime")), Direction(along="resolution")
    found = largest_under("resnet18", basis, Constraint(min_throughput=1500), along, Effort(say=said.append))
    assert (found.value, found.following, found.tried) == (240, None, 2)  # 224 is its own size, 256 the next step
    assert "memory does not hold it" in said
    monkeypatch.setattr(choice_measured, "time_network", full_above(0, "not even this"))
    with pytest.raises(UserError, match="not even this"):
        largest_under("resnet18", basis, Constraint(min_throughput=1500), along, Effort())


def test_a_prediction_that_does_not_fit_in_memory_here_is_taken_back(
    fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predicted = largest("resnet18", device="rtx-4090", min_throughput=1500, along="resolution").value
    monkeypatch.setattr(choice_scaling, "own_device", lambda basis: "cuda")
    monkeypatch.setattr(choice_scaling, "time_network", full_above(int(predicted) - 2))
    found = largest("resnet18", device="rtx-4090", min_throughput=1500, along="resolution")
    assert (found.value, found.following) == (predicted - 2, None)
    assert found.confirmed is not None
    assert found.confirmed.images_per_s == pytest.approx(1e4)
    monkeypatch.setattr(choice_scaling, "time_network", full_above(0, "not even this"))
    with pytest.raises(UserError, match="not even this"):
        largest("resnet18", device="rtx-4090", min_throughput=1500, along="resolution")
    with pytest.raises(UserError, match=r"keeps 1,000,000,000 images/s; the smallest, "):  # by the middle: no chance
        largest("resnet18", device="rtx-4090", min_throughput=1e9, along="resolution", confidence=0.9)


def test_a_prediction_that_can_not_be_measured_here_stays_one(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In ONNX Runtime nothing times a network in amp, which a card is predicted in."""

    def time_network(network: SizedSpec, basis: Basis, seconds: float) -> Measurement:
        raise UserError("runtime onnxruntime computes modules in fp32, got precision 'amp'")

    ask: dict[str, Any] = {"min_throughput": 1500, "along": "resolution", "confidence": 0.9}
    elsewhere = largest("resnet18", device="rtx-4090", **ask)
    monkeypatch.setattr(choice_scaling, "own_device", lambda basis: "cuda")
    monkeypatch.setattr(choice_scaling, "time_network", time_network)
    found = largest("resnet18", device="rtx-4090", **ask)
    assert replace(found, unconfirmed="", tried=0) == replace(elsewhere, tried=0)
    assert found.confirmed is None
    assert found.to_dict()["unconfirmed"] == "runtime onnxruntime computes modules in fp32, got precision 'amp'"
    assert "not measured on this machine: runtime onnxruntime computes modules in fp32, got precision" in str(found)
    assert (elsewhere.to_dict()["unconfirmed"], "not measured" in str(elsewhere)) == (None, False)


def test_seconds_to_time_are_looked_at_before_anything_is_done() -> None:
    with pytest.raises(UserError, match=r"^seconds to time are -1; they must be a finite number above 0$"):
        Effort(seconds=-1)


@pytest.mark.parametrize(
    ("driver", "device", "here"),
    [
        ("NVIDIA GeForce RTX 4090", "rtx-4090", "cuda"),
        ("NVIDIA GeForce RTX 4090", "rtx-3090", ""),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb", "cuda"),
        ("NVIDIA A100-SXM4-80GB", "a100-40gb", ""),
        ("NVIDIA H100 80GB HBM3", "h100-sxm", "cuda"),
        ("NVIDIA H100 PCIe", "h100-sxm", ""),
        ("Tesla V100-SXM2-16GB", "v100", "cuda"),
        ("Tesla T4", "t4", "cuda"),
        ("NVIDIA A10G", "a10", ""),
        ("NVIDIA L40", "l4", ""),
        ("NVIDIA L40S", "l40s", "cuda"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "rtx-4090", ""),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "rtx-pro-6000", ""),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "rtx-pro-6000-max-q", "cuda"),
    ],
)
def test_the_own_card_is_known_by_its_drivers_name(
    driver: str, device: str, here: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: driver)
    assert own_device(basis_of(Asked(device=device))) == here


def test_a_speed_that_even_the_smallest_misses_is_refused(fake: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"no mobilenetv2_050 scaled along resolution keeps 1,000,000 images/s with the confidence 0.7; the.*has",
    ):
        largest("mobilenetv2_050", device="rtx-4090", min_throughput=1e6, along="resolution", confidence=0.7)
    with pytest.raises(UserError, match="along 'hight' is unknown"):
        largest("mobilenetv2_050", device="rtx-4090", min_throughput=10, along="hight")
    with pytest.raises(UserError, match="needs min_throughput or max_latency_ms"):
        largest("mobilenetv2_050", device="rtx-4090")


# --- the whole way


def test_choose_for_a_gpu_predicts(fake: Path) -> None:
    c = choose(device="rtx-4090", min_throughput=250, candidates=["resnet18", "mobilenetv2_100", "tresnet_m"])
    assert c.kind == "predicted"
    assert (c.conditions.batch_size, c.conditions.precision, c.conditions.runtime) == (256, "amp", "eager")
    best = max(
        (o for o in c.options if o.low and o.low >= 250 and o.top1 is not None),
        key=lambda o: o.top1 or 0,
    )
    assert c.best is best
    assert len(c.options) == 1 + len(c.maybe) + len(c.alternatives) + len(c.rejected)
    assert all(o.reason for o in c.options)
    assert c.best.to_dict()["speed"] == c.best.speed.to_dict() if c.best.speed else False
    assert c.best.label in str(c)


def test_odd_channels_bring_aligned_relatives(fake: Path) -> None:
    c = choose(device="v100", min_throughput=10, candidates=["tresnet_xl.miil_in1k"])
    assert [a.option.name for a in c.aligned] == ["tresnet_xl-base80", "tresnet_xl-x8", "tresnet_xl-base88"]
    assert c.aligned[0].gain == pytest.approx(
        work(cs.get_spec("tresnet_xl"), 224) / work(c.aligned[0].option.spec, 224)
    )


def test_the_second_answer_comes_from_the_cache(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = choose(device="rtx-4090", min_throughput=900, candidates="resnet18")
    monkeypatch.setattr(choice_speeds, "examine", lambda *a: pytest.fail("traced again"))
    assert choose(device="rtx-4090", min_throughput=900, candidates="resnet18").to_dict() == first.to_dict()


def test_processes_find_what_this_one_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CONVSCALE_CACHE", str(tmp_path))
    monkeypatch.setattr(choice_speeds, "MANY", 2)
    basis = basis_of(Asked())
    networks = [SizedSpec(SPEC, 32), SizedSpec(SPEC, 64)]
    alone = {network: choice_speeds.examine(network, basis) for network in networks}
    monkeypatch.setattr(choice_speeds, "examine", lambda *a: pytest.fail("left to this process"))
    assert facts_of(networks, basis) == alone


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"device": "rtx-4900"}, r"device 'rtx-4900' is unknown \(nearest: rtx-4090"),
        ({"device": "rtx-4090", "runtime": "openvino"}, "runtime 'openvino' can not be predicted"),
        ({"device": "rtx-4090", "runtime": "tensorrt", "mode": "train"}, "runtime tensorrt can not train"),
        ({"device": "rtx-4090", "precision": "int8"}, "precision 'int8' can not be predicted"),
        (
            {"device": "rtx-4090", "runtime": "best"},
            "runtime 'best' is found by measuring on this machine; speeds on rtx-4090 are predicted",
        ),
        (
            {"device": "cpu", "runtime": "best", "mode": "train"},
            "runtime 'best' is for inference, got mode train; name a runtime",
        ),
        (
            {"device": "cpu", "runtime": "best", "precision": "fp16"},
            "measures fp32, or int8 or bf16 beside it, got precision 'fp16'",
        ),
        (
            {"device": "cuda", "runtime": "best", "precision": "bf16"},
            "runtime 'best' tries bf16 on a processor, got device 'cuda'; leave precision out",
        ),
        ({"device": "cpu", "runtime": "eager", "precision": "int8"}, "'int8' is measured with runtime best"),
        *(
            (
                {"device": device, "runtime": name, "compiled": True},
                f"compiled=True and runtime '{name}' exclude each other; give one of them",
            )
            for device, name in (("cpu", "onnxruntime"), ("cpu", "best"), ("cpu", "eager"), ("l4", "eager"))
        ),
        ({"device": "cpu", "batch_size": 0}, "batch_size must be a whole number"),
        ({"device": "cpu", "calibration": "missing.json"}, "calibration file missing.json does not exist"),
        ({"device": "cpu", "calibration": 3}, "calibration is 3; it must be a path"),
        ({"device": "cpu", "budget": 0}, "budget is 0"),
        ({"device": "cpu", "budget": 2**40}, "budget is 1099511627776; it must be .* at most 2147483647"),
        ({"device": "cpu", "image_sizes": [2**31]}, "image size is 2147483648; it must be .* at most 2147483647"),
        ({"device": 3}, "device is 3"),
    ],
)
def test_bad_conditions_are_refused(keywords: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose(min_throughput=10, **keywords)


def test_what_is_left_out_is_filled_in_by_device() -> None:
    def filled(device: str, **keywords: Any) -> tuple[Any, ...]:
        c = basis_of(Asked(device=device, **keywords)).conditions
        return c.batch_size, c.precision, c.runtime

    assert filled("cpu", runtime="openvino") == (8, "fp32", "openvino")
    assert filled("cpu") == (8, "fp32", "best")
    assert filled("cpu", precision="int8") == (8, "int8", "best")
    assert usual_on("cuda:1", "infer") == (8, "amp", "eager")  # where no card is, ``basis_of`` refuses it
    assert basis_of(Asked()).tuned
    assert not basis_of(Asked()).int8
    assert basis_of(Asked(precision="int8")).int8
    assert filled("cpu", mode="train") == (8, "fp32", "eager")
    assert filled("RTX 4090", compiled=True) == (256, "amp", "compiled")
    assert filled("RTX 4090", compiled=True, runtime="compiled") == (256, "amp", "compiled")
    assert filled("v100", latency=True) == (1, "amp", "eager")
    assert filled("i9-10940X") == (1, "fp32", "compiled")  # as the tables of processors were measured
    assert filled("i9-10940X", mode="train", batch_size=8) == (8, "fp32", "eager")


# --- measuring few


def timed(batch: int, images_per_s: float, size: int, name: str = "") -> Measurement:
    conditions = Conditions(batch_size=batch, image_size=size, runtime="onnxruntime", threads=choice_measured_threads())
    return Measurement(
        times_s=(batch / images_per_s,) * 5, conditions=conditions, environment=Environment.here(), model=name
    )


def choice_measured_threads() -> int:
    from convscale.machine import available_cores

    return available_cores()


ZOO = [
    (name, family, top1, macs)
    for family, factor in (("efficientnet", 3.0), ("resnet", 1.0))
    for name, top1, macs in ((f"{family}{i}", 60.0 + 5 * i + factor, int(1e8 * 1.7**i)) for i in range(12))
]


def test_measuring_few_finds_the_same_as_measuring_all() -> None:
    """24 made-up networks whose speed is not what counts say: one family runs at a third of it."""
    specs = {name: scale("mobilenetv2_050", width=1 + i / 4, name=name) for i, (name, *_) in enumerate(ZOO)}
    true: dict[SizedSpec, float] = {}
    options = []
    for name, family, top1, macs in ZOO:
        spec = cs.NetSpec.from_dict({**specs[name].to_dict(), "family": family})
        true[SizedSpec(spec, 224)] = 3e10 / macs * (1 / 3 if family == "efficientnet" else 1)
        candidate = Candidate(name=name, spec=spec, image_size=224, group=name, top1=top1)
        options.append(Option(candidate=candidate, facts=NetworkFacts(macs=macs, params=1), batch_size=8))
    for floor in (1.0, 7.0, 20.0, 60.0):
        asked: list[SizedSpec] = []

        def bench(unit: SizedSpec, asked: list[SizedSpec] = asked) -> Speed:
            asked.append(unit)
            return Speed(images_per_s=true[unit], low=true[unit], high=true[unit], kind="measured")

        constraint = Constraint(min_throughput=floor)
        found = decide(explore(options, constraint, bench, budget=14, say=lambda text: None), constraint)
        expected = max((o for o in options if true[sized_spec_of(o)] >= floor), key=lambda o: o.top1 or 0)
        assert found.best.name == expected.name
        assert len(asked) == len(set(asked)) <= 14


def test_the_budget_ends_measuring_and_the_rest_is_said_to_be_unmeasured(
    fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        choice_measured,
        "time_network",
        lambda network, basis, seconds: timed(8, 1e11 / work(*network), network.image_size, network.spec.name),
    )
    options: dict[str, Any] = {
        "device": "cpu",
        "min_throughput": 1,
        "candidates": ["resnet*", "mobilenet*"],
        "zoo": "own",
        "budget": 3,
    }
    options |= {"runtime": "onnxruntime", "records": fake / "records.jsonl"}
    c = choose(**options)
    assert c.kind == "measured"
    assert sum(o.speed is not None and o.speed.kind == "measured" for o in c.options) >= 3
    assert {o.spec.name for o in c.options if o.speed} == {
        r.model for r in choice_measured_records(fake / "records.jsonl")
    }
    assert all(o.verdict == "unknown" and o.images_per_s is None for o in c.maybe)
    assert all(o.reason.startswith("not measured") for o in c.maybe)
    monkeypatch.setattr(choice_measured, "time_network", lambda *a: pytest.fail("measured again"))
    again = choose(**options)
    assert again.best.label == c.best.label
    assert "3 of them earlier" in again.notes[-1]


def choice_measured_records(path: Path) -> Any:
    from convscale.speed.records import read_records

    return read_records(path)


def test_records_of_other_conditions_are_not_reused(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def time_network(network: SizedSpec, basis: Basis, seconds: float) -> Measurement:
        calls.append(network.image_size)
        return timed(basis.conditions.batch_size, 50, network.image_size, network.spec.name)

    monkeypatch.setattr(choice_measured, "time_network", time_network)
    path = fake / "records.jsonl"

    def named(**more: Any) -> Basis:
        return basis_of(Asked(runtime="onnxruntime", **more))

    said: list[str] = []
    for basis in (named(), named(), named(batch_size=4)):
        network = SizedSpec(SPEC, 64)
        bench = Bench(basis, facts_of([network], basis), records=path, say=said.append)
        speed = bench(network)
        assert speed is not None
        assert speed.images_per_s == pytest.approx(50)
        with open(path, "a") as file:
            file.write('{"schema": 1, "mod')  # as a run that is killed leaves it, which goes on with --resume
    assert len(calls) == 2
    assert [text.rpartition("; ")[2] for text in said] == 2 * ["it was only begun and is passed over"]


def test_a_batch_that_was_halved_is_no_speed_of_the_batch_asked_for(
    fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(spec: NetSpec, conditions: Conditions, **limits: float) -> Measurement:
        size = conditions.image_size
        assert isinstance(size, int)
        return timed(8 if size == 32 else 4, 50, size, spec.name)

    monkeypatch.setattr(measuring, "measure", measure)
    basis, path = basis_of(Asked(runtime="onnxruntime")), fake / "records.jsonl"
    small, large = SizedSpec(SPEC, 32), SizedSpec(SPEC, 64)
    bench = Bench(basis, facts_of([small, large], basis), records=path)
    said = "mobilenetv2_050 @64 does not fit in memory at batch 8"
    with pytest.raises(UserError, match=said):
        bench(large)
    speed = bench(small)
    assert speed is not None
    assert speed.images_per_s == pytest.approx(50)
    assert bench(large) is None
    assert bench.failed[large].startswith(said)
    assert [record.measurement.conditions.image_size for record in choice_measured_records(path)] == [32]


def test_a_tuned_choice_says_in_what_each_network_is_fastest(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of a tuned network are reused by choices that try the same forms, and by no other."""
    asked: list[str] = []

    def time_fastest(network: SizedSpec, basis: Basis, seconds: float) -> Measurement:
        spec, size = network
        asked.append(spec.name)
        m = timed(8, 1e11 / work(spec, size), size, spec.name)
        won = Conditions(
            **{**m.conditions.to_dict(), "runtime": "openvino", "precision": "int8" if basis.int8 else "fp32"}
        )
        form = "openvino-int8 in openvino, 2 streams"
        return replace(m, conditions=won, form=form, chosen_from=choice_measured.chosen_among(basis))

    monkeypatch.setattr(choice_measured, "time_fastest", time_fastest)
    options: dict[str, Any] = {
        "device": "cpu",
        "min_throughput": 1,
        "candidates": ["resnet18"],
        "records": fake / "r.jsonl",
    }
    c = choose(**options, precision="int8")
    assert c.best.speed is not None
    assert c.best.speed.how == "openvino-int8 in openvino, 2 streams"
    assert "images/s measured as openvino-int8 in openvino, 2 streams" in str(c)
    assert c.conditions.runtime == "best"
    assert c.chosen_from.startswith("the fastest of onnxruntime")
    assert any("accuracies are not of 8-bit networks" in note for note in c.notes)
    before = len(asked)
    assert choose(**options, precision="int8").best.label == c.best.label
    assert len(asked) == before
    choose(**options)
    assert len(asked) > before
    monkeypatch.setattr(
        choice_measured, "time_network", lambda network, *a: timed(8, 50, network.image_size, network.spec.name)
    )
    plain = choose(**options, runtime="onnxruntime")
    assert plain.best.images_per_s == pytest.approx(50)


@pytest.mark.parametrize("broken", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_network_is_timed_in_its_fastest_form_at_the_batch_asked_for(
    broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real one: exported, quantised with noise, tuned; the winner is the machine's to say. A form that can not be
    made is left out and named.
    """
    from convscale.ship import export as export_module
    from convscale.ship.forms import FORMS, form_names

    if broken:
        monkeypatch.setattr(
            export_module,
            "quantize_file",
            lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no such operator\nmore")),
        )
    basis = basis_of(Asked(batch_size=2, threads=1, precision="int8"))
    torch.manual_seed(0)  # of some other weights INT8 is withheld, rightly: their answers depend on the batch
    m = choice_measured.time_fastest(SizedSpec(scale("resnet18", width=0.125, name="tiny"), 32), basis, 0.02)
    c = m.conditions
    assert (c.batch_size, c.image_size, c.threads, m.model) == (2, 32, 1, "tiny")
    assert c.runtime in ("onnxruntime", "openvino")
    speed = choice_measured.speed_of(m)
    assert speed.how.split(" in ")[1] == c.runtime
    assert ("int8" if "int8" in speed.how.split(" in ")[0] else "fp32") == c.precision
    assert choice_measured.chosen_among(basis) == m.chosen_from
    left_out = [note for note in m.notes if "can not be made" in note]
    assert speed.doubts == (*m.warnings, *left_out)
    eight = [name for name in form_names("resnet18", int8=True) if FORMS[name].int8]
    assert len(eight) >= 3
    assert left_out == ([f"{name} can not be made: no such operator" for name in eight] if broken else [])
    assert not broken or c.precision == "fp32"


def test_a_form_that_may_be_withheld_when_shipping_does_not_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate stands open while choosing: symmetric activations would always pass."""
    asked: list[dict[str, Any]] = []

    def export_forms(*given: object, **options: Any) -> None:
        asked.append(options)
        raise UserError("stop here")

    monkeypatch.setattr("convscale.ship.forms.export_forms", export_forms)
    basis = basis_of(Asked(batch_size=2, threads=1, precision="int8"))
    with pytest.raises(UserError, match="stop here"):
        choice_measured.time_fastest(SizedSpec(scale("resnet18", width=0.125, name="tiny"), 32), basis, 0.02)
    assert [(options["twins"], options["max_drop"]) for options in asked] == [(False, 100.0)]


@pytest.mark.parametrize(("within", "files"), [(None, "onnxruntime and tensorrt"), ("tensorrt", "tensorrt")])
def test_forms_are_timed_on_the_device(within: str | None, files: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What OpenVINO alone could run is not made for a GPU."""
    seen: dict[str, Any] = {}

    def export_forms(net: object, folder: object, names: list[str], *, search: Any, **options: Any) -> None:
        seen.update(names=names, device=search.device, runtimes=search.runtimes)
        raise UserError("stop here")

    installed = ("onnxruntime", "openvino", "tensorrt")
    for module in ("convscale.choice.measured", "convscale.ship.forms"):
        monkeypatch.setattr(f"{module}.installed_runtimes", lambda: installed)
    monkeypatch.setattr("convscale.ship.forms.export_forms", export_forms)
    conditions = Conditions(device="cuda:1", batch_size=2, threads=1, precision="int8", runtime="best")
    basis = Basis(conditions=conditions, within=within)
    with pytest.raises(UserError, match="stop here"):
        choice_measured.time_fastest(SizedSpec(scale("resnet18", width=0.125, name="tiny"), 32), basis, 0.02)
    forms = ["onnx-fp32", "onnx-int8", "onnx-int8-ort", "onnx-int8-signed"]
    assert seen == {"names": forms, "device": "cuda:1", "runtimes": None if within is None else (within,)}
    assert choice_measured.chosen_among(basis) == f"the fastest of {files}, float and 8 bits"


@pytest.mark.parametrize("runtime", [None, "best"])
def test_bfloat16_may_win_where_the_processor_has_it(runtime: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timed untrained, whose answers are nearly ties: its gate stands open."""
    asked = Asked(batch_size=2, threads=1, precision="bf16", runtime=runtime)
    monkeypatch.setattr("convscale.runtimes.base.no_bf16", lambda format: "this processor has none")
    with pytest.raises(UserError, match="this processor has none"):
        basis_of(asked)
    monkeypatch.setattr("convscale.runtimes.base.no_bf16", lambda format: "")
    basis = basis_of(asked)
    assert (basis.tuned, basis.bf16, basis.int8) == (True, True, False)
    files = choice_measured.chosen_among(basis).rpartition(", ")[0]
    both = replace(basis, conditions=replace(basis.conditions, precision="int8"))
    assert choice_measured.chosen_among(basis) == f"{files}, float and bfloat16"
    assert choice_measured.chosen_among(both) == f"{files}, float, bfloat16 and 8 bits"
    assert not basis_of(Asked(precision="int8")).bf16
    seen: dict[str, Any] = {}

    def form_names(net: object, **options: Any) -> list[str]:
        seen.update(options)
        return ["onnx-fp32"]

    def export_forms(*given: object, **options: Any) -> None:
        seen.update(options)
        raise UserError("stop here")

    monkeypatch.setattr("convscale.ship.forms.form_names", form_names)
    monkeypatch.setattr("convscale.ship.forms.export_forms", export_forms)
    with pytest.raises(UserError, match="stop here"):
        choice_measured.time_fastest(SizedSpec(scale("resnet18", width=0.125, name="tiny"), 32), basis, 0.02)
    assert (seen["bf16"], seen["int8"], seen["for_speed"]) == (True, False, True)


def test_conditions_that_can_not_be_measured_end_at_the_first(fake: Path) -> None:
    with pytest.raises(UserError, match="times a module in fp32 and nchw"):
        choose(
            device="cpu",
            precision="bf16",
            runtime="onnxruntime",
            min_throughput=10,
            candidates="resnet18",
            image_sizes=[32],
        )


def test_public_names() -> None:
    assert cs.choose is choose


def test_nothing_that_was_asked_for_is_dropped_in_silence() -> None:
    from dataclasses import replace

    from convscale.arch.zoo import get_spec

    spec = get_spec("resnet18")
    wider = replace(spec, head=replace(spec.head, width=64))
    with pytest.raises(UserError, match="two candidates that differ are named resnet18 @224"):
        candidates_of([spec, wider])
    assert len(candidates_of([spec, spec])) == 1
    with pytest.raises(UserError, match=r"accuracy is given for 'resnet81', which is no candidate \(nearest: resnet18"):
        candidates_of([spec], accuracy={"resnet81": 70.0})
    assert candidates_of([spec], accuracy={"resnet18": 70.0})[0].top1 == 70


@pytest.mark.parametrize(
    ("confidence", "best"),
    # medians 1,000 and 900 with 80 % intervals of a factor 1.25 either way: 800 images/s are kept by "slow" with
    # P = Phi(ln(900/800) / ln(1.25) x 1.2816) = 0.751, by "fast" with 0.9 (its lower end is 800)
    [(0.7, "slow"), (0.8, "fast"), (0.9, "fast")],
)
def test_the_choice_keeps_the_speed_with_the_confidence_asked_for(confidence: float, best: str) -> None:
    options = [option("fast", (800, 1000, 1250), top1=75.0), option("slow", (720, 900, 1125), top1=80.0)]
    parts = decide(options, Constraint(min_throughput=800, confidence=confidence))
    assert parts.best.name == best


def test_a_confidence_outside_its_range_is_refused() -> None:
    for value in (0.49, 1.0, "high", True):
        with pytest.raises(ValueError, match=r"confidence is .*; it must be a probability from 0\.5 to 0\.99"):
            Constraint(confidence=value)  # type: ignore[arg-type]


def test_among_equals_the_faster_is_chosen() -> None:
    table = [option("slow", 2000, 80.0), option("fast", 3000, 80.0), option("worse", 5000, 79.9)]
    for order in itertools.permutations(table):
        assert decide(order, Constraint(min_throughput=1000)).best.name == "fast"
