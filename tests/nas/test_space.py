"""The space as a value: counted, drawn, encoded, changed, written down."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import convscale as cs
from convscale.arch.block import BlockSpec
from convscale.arch.parts import RELU, SILU, ActSpec, InputSpec, NormSpec, StemSpec
from convscale.arch.spec import NetSpec
from convscale.choice.facts import Speed
from convscale.errors import UserError
from convscale.nas import space as space_module
from convscale.nas.choices import StageChoices
from convscale.nas.pace import Counted
from convscale.nas.records import Reward
from convscale.nas.smallest import need_one_that_keeps, smallest_of
from convscale.nas.space import SearchSpace, load_space, save_space
from convscale.nas.spaces import SPACES
from convscale.nas.tally import _counted, tally

STEM = (StemSpec(widths=(8,), stride=2),)


def space(*stages: StageChoices, **other: object) -> SearchSpace:
    given = {"stems": STEM, "image_sizes": (32,), "input": InputSpec(size=32), **other}
    return SearchSpace(stages=stages, **given)  # pyright: ignore[reportArgumentType]


MIXED = space(
    StageChoices(kinds=("conv", "basic", "bottleneck"), widths=(8, 16), depths=(1, 2), se=(0.0, 0.25)),
    StageChoices(
        kinds=("inverted_residual", "depthwise_separable"),
        kernels=(3, 5),
        widths=(16, 24),
        depths=(1, 2),
        expansions=(2.0, 3.0),
        se=(0.25, 0.0),
        se_where=("inner", "output"),
        skips=(True, False),
        downsamples=("stride", "blur"),
        stride=2,
    ),
    image_sizes=(32, 48),
)


def test_the_count_by_hand() -> None:
    # conv: 2 widths x 2 depths; basic and bottleneck: those x 2 of SE.
    assert MIXED.stages[0].count() == 4 + 8 + 8
    # kernel 2 x width 2 x downsample 2 x (SE off, or at 2 places) x (depth 1, or depth 2 with 2 of skip): 72; the kind
    # that expands twice as many.
    assert MIXED.stages[1].count() == 8 * 3 * 3 * (2 + 1)
    assert len(MIXED) == 2 * 20 * 216


def test_the_count_is_that_of_different_networks() -> None:
    every = {MIXED.canonical(genes) for genes in product(*(range(size) for size in MIXED.sizes))}
    assert len(every) == len(MIXED)
    some = sorted(every)[:: len(every) // 400]
    assert len({MIXED.spec_of(genes) for genes in some}) == len(some)


def test_odd_maps_are_halved_only_as_their_blocks_can() -> None:
    """Max-pooling makes 3 of 7 px, a projected shortcut 4: a basic block has a plain stride there."""
    plain = StageChoices(kinds=("conv", "basic"), widths=(8,), depths=(1,))
    halving = replace(plain, depths=(1, 2), downsamples=("maxpool", "stride"), stride=2)
    stems = tuple(StemSpec(widths=(8,), stride=stride) for stride in (1, 2))
    space = SearchSpace(name="odd", stages=(plain, halving, halving), stems=stems, image_sizes=(14,))
    every = {space.canonical(genes) for genes in product(*(range(size) for size in space.sizes))}
    # behind a stride of 1: 14 px, 2 kinds x 2 depths x 2 ways; 7 px, 4 with conv and 2 with basic: 2 x 8 x 6. Behind 2:
    # of 7 px conv makes 4 or 3 px, basic 4; 4 px give 8 and 3 px 6: 2 x (4 x 8 + 2 x 6).
    assert len(every) == len(space) == 2 * 8 * 6 + 2 * (4 * 8 + 2 * 6)
    made = {space.spec_of(genes) for genes in every}
    assert len(made) == len(every)
    assert all(spec in space and space.spec_of(space.genes_of(spec)) == spec for spec in made)
    for seed in range(40):
        assert space.mutate(space.sample(seed), seed) in made
    only = replace(halving, downsamples=("maxpool",))
    with pytest.raises(UserError, match="gets maps of 7 px, which its maxpool halves and its shortcut does not"):
        SearchSpace(name="odd", stages=(plain, only, only), stems=stems[:1], image_sizes=(14,))


def test_mnasnet_as_published() -> None:
    mnasnet = cs.get_space("mnasnet")
    # MobileNetV2's filters (table 2 there) x {0.75, 1, 1.25}, in eights as its code rounds them: 96 gives 72, 96, 120.
    assert mnasnet.stages[4].widths == (72, 96, 120)
    assert mnasnet.stages[4].depths == (2, 3, 4)
    assert [stage.kernels for stage in mnasnet.stages] == [(3, 5)] * 7
    # One middle stage: 4 convolutions (plain, depthwise, 2 expansions) x 2 kernels x 3 widths x 3 depths x 2 skips, and
    # 2 of SE but on plain ones. Every depth is over 1 in stage 4.
    assert mnasnet.stages[4].count() == 2 * 3 * 3 * 2 * (1 + 3 * 2)


def test_the_papers_networks_are_in_their_spaces() -> None:
    assert cs.get_spec("tresnet_m") in cs.get_space("tresnet")
    assert cs.get_spec("efficientnet_b0") in cs.get_space("mobile")
    assert cs.get_spec("tresnet_m") not in cs.get_space("mobile")
    a1 = cs.get_spec("mnasnet_100")  # B1, whose 192 channels are none of 160 x {0.75, 1, 1.25}
    with pytest.raises(UserError, match=r"its stage 5, 4 x inverted_residual of 192 channels, is no option there"):
        cs.get_space("mnasnet").encode(a1)


@pytest.mark.parametrize("name", SPACES)
def test_named_spaces_draw_encode_and_build(name: str) -> None:
    found = cs.get_space(name)
    assert type(found).from_yaml(found.to_yaml()) == found
    assert type(found).from_json(found.to_json()) == found
    for spec in found.sample(1, count=3):
        vector = found.encode(spec)
        assert vector.shape == (len(found.variables),)
        assert found.decode(vector) == spec
        changed = found.mutate(spec, 7)
        assert changed != spec
        assert changed in found
    assert found.sample(5) == found.sample(5)
    assert found.sample(5) != found.sample(6)


def test_specs_are_built_and_counted() -> None:
    small = cs.get_space("small").at_size(28)
    assert all(spec in small for spec in small.sample(0, count=200))
    spec = small.sample(2)
    net = cs.create_model(spec, num_classes=10, in_chans=1)
    import torch

    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("name", SPACES)
def test_counts_by_parts_are_those_of_the_whole(name: str) -> None:
    spec = cs.get_space(name).sample(3)
    cost = cs.count(spec)
    assert tally(spec) == (cost.params, cost.macs)


def test_networks_that_differ_in_their_activation_are_put_together_from_the_same_parts() -> None:
    block, batch, in_place = BlockSpec(kind="basic", width=8, activation=SILU), NormSpec(), NormSpec(kind="inplace")
    assert _counted(block, batch) == BlockSpec(kind="basic", width=8)
    assert _counted(block, in_place) is block  # made for its activation
    affine = replace(block, activation=ActSpec(affine=True))
    assert _counted(affine, batch) is affine  # it has two weights


def test_any_vector_is_a_network() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        vector = rng.normal(0.5, 1.0, len(MIXED.variables))
        assert MIXED.decode(vector) in MIXED
    with pytest.raises(UserError, match=r"must be .* finite numbers"):
        MIXED.decode(np.zeros(3))
    with pytest.raises(UserError, match="finite"):
        MIXED.decode(np.full(len(MIXED.variables), np.nan))


def test_draws_are_even() -> None:
    """Depthwise-separable blocks have no expansion: drawn gene by gene they would come in half of all cases."""
    rng = np.random.default_rng(0)
    kind = [variable.name for variable in MIXED.variables].index("1.kind")
    share = np.mean([MIXED.draw(rng)[kind] == 1 for _ in range(900)])
    assert abs(share - 1 / 3) < 0.05  # 1 of 3 by the count above; its deviation is 0.016


def test_neighbours_differ_in_one_choice(tiny: SearchSpace) -> None:
    spec = tiny.sample(0)
    found = tiny.neighbours(spec)
    assert spec not in found
    assert len(set(found)) == len(found)
    genes = tiny.genes_of(spec)
    for other in found:
        theirs = tiny.genes_of(other)
        # A change of kind may take an effect away from one other choice.
        assert 1 <= sum(a != b for a, b in zip(genes, theirs, strict=True)) <= 2
    single = [sum(a != b for a, b in zip(genes, tiny.genes_of(other), strict=True)) == 1 for other in found]
    assert sum(single) >= 5


def test_limits_are_kept(tiny: SearchSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    free = [cs.count(spec).macs for spec in tiny.sample(0, count=3)]
    limit = min(free)
    assert max(free) > limit
    limited = replace(tiny, max_macs_m=limit / 1e6)
    assert max(cs.count(spec).macs for spec in limited.sample(0, count=2)) <= limit
    monkeypatch.setattr(space_module, "_TRIES", 5)
    with pytest.raises(UserError, match="none keeps its limits"):
        replace(MIXED, max_params_m=1e-6).sample(0)


def test_the_smallest_of_a_space_have_each_activation_and_no_shortcuts_too(tiny: SearchSpace) -> None:
    """A member with ReLU may keep a speed that none with the first activation does."""
    options = {"activations": (SILU, RELU), "skips": (True, False)}
    stages = tuple(replace(stage, kinds=("depthwise_separable",), **options) for stage in tiny.stages)
    found = [replace(tiny, stages=stages).spec_of(genes) for genes in smallest_of(replace(tiny, stages=stages))]
    blocks = [[stage.runs[0].block for stage in spec.stages] for spec in found]
    seen = {(first.activation.kind, first.skip) for first, _ in blocks}
    assert seen == {(act, skip) for act in ("silu", "relu") for skip in (True, False)}
    assert {sum(spec.depths) for spec in found} == {2}
    speeds = {spec: 1e4 if spec.stages[0].runs[0].block.activation == RELU else 10.0 for spec in found}

    class Pace:
        """Faster with ReLU."""

        def __call__(self, spec: NetSpec) -> Counted:
            speed = Speed(images_per_s=speeds[spec], low=1, high=1, kind="measured")
            return Counted(speed=speed, params=1, macs=1)

        def sure(self, speed: Speed) -> float:
            return speed.images_per_s

    pace: Any = Pace()
    need_one_that_keeps(replace(tiny, stages=stages), Reward(target=9_000.0), pace, print)
    with pytest.raises(
        UserError, match=r"is found that keeps .*; the nearest of the 4 smallest, .* has 10,000 images/s"
    ):
        need_one_that_keeps(replace(tiny, stages=stages), Reward(target=11_000.0), pace, print)


def test_the_smallest_of_a_space_are_in_it(tiny: SearchSpace) -> None:
    found = [tiny.spec_of(genes) for genes in smallest_of(tiny)]
    assert min(cs.count(spec).macs for spec in found) == min(
        cs.count(tiny.spec_of(genes)).macs
        for genes in {tiny.canonical(genes) for genes in product(*(range(2) for _ in tiny.sizes))}
    )


def test_files(tmp_path: Path, tiny: SearchSpace) -> None:
    save_space(tiny, tmp_path / "mine.yaml")
    assert load_space(tmp_path / "mine.yaml") == tiny
    assert cs.get_space(str(tmp_path / "mine.yaml")) == tiny
    (tmp_path / "bad.json").write_text('{"stages": [{"kinds": ["bsic"], "widths": [8], "depths": [1]}]}')
    with pytest.raises(UserError, match=r"bad.json: space lacks the field 'stems'"):
        load_space(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kinds": ("bsic",)}, "StageChoices.kinds is 'bsic'; it must be of conv, basic"),
        ({"widths": ()}, r"StageChoices.widths is \(\); it must be at least one option"),
        ({"depths": (0, 1)}, r"StageChoices.depths is \(0, 1\); it must be at least 1 each"),
        ({"kernels": (4,)}, "StageChoices.kernels"),
        ({"widths": (8, 8)}, "options that differ"),
        ({"stride": 3}, "StageChoices.stride is 3; it must be 1 or 2"),
    ],
)
def test_bad_choices_are_told(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        StageChoices(**{"kinds": ("basic",), "widths": (8,), "depths": (1,), **change})


def test_what_could_not_run_is_told_when_the_space_is_made() -> None:
    pools = StageChoices(kinds=("basic",), widths=(8,), depths=(1,), downsamples=("stride", "maxpool"), stride=2)
    assert len(space(pools)) == 2
    with pytest.raises(UserError, match="maxpool halves and its shortcut does not"):
        space(pools, image_sizes=(34,))  # a map of 17
    assert len(space(pools, image_sizes=(32, 34))) == 2 + 1


def test_unknown_names() -> None:
    with pytest.raises(UserError, match=r"search space 'mnasnt' is unknown \(nearest: mnasnet\)"):
        cs.get_space("mnasnt")


def test_a_huge_space_says_its_size() -> None:
    stage = StageChoices(kinds=("basic",), widths=tuple(range(8, 1608, 8)), depths=(1, 2, 3, 4, 5))
    huge = space(*(stage,) * 7)
    assert huge.size == 1000**7
    with pytest.raises(UserError, match=r"1.0e\+21 networks"):
        len(huge)
    assert isinstance(huge.sample(0), NetSpec)
