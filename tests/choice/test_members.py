"""A family's members from small to large, and the largest that keeps a speed."""

import math
from itertools import pairwise

import pytest

import convscale as cs
from convscale.arch.small import for_image_size
from convscale.choice.members import _largest_keeping, largest_member, members
from convscale.errors import DoesNotFit

FAMILIES = ("tresnet_m", "efficientnet_b0", "resnet50d")


@pytest.mark.parametrize("name", [*(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES[:2]), FAMILIES[2]])
def test_members_of_small_images_grow_in_small_steps_at_one_size(name):
    rising = members(name, 28)
    assert {spec.input.size for spec in rising} == {28}
    macs = [cs.count(spec, image_size=28).macs for spec in rising[:24]]
    assert len({spec.name for spec in rising}) == len(rising)
    falls = sum(later < earlier for earlier, later in pairwise(macs))
    assert falls <= len(macs) // 4  # the order of those between is a guess
    assert macs[-1] > 5 * macs[0]
    assert sum(later < 1.35 * earlier for earlier, later in pairwise(macs)) >= 0.8 * len(macs)


@pytest.mark.parametrize("name", FAMILIES)
def test_members_of_pictures_follow_the_compound_rule(name):
    """alpha 1.2, beta 1.1, gamma 1.15 (EfficientNet, section 3.3), at the baseline's size for phi 0."""
    rising = members(name)
    own = cs.get_spec(name)
    at = rising.index(own)
    assert rising[at - 1].input.size == pytest.approx(own.input.size * 1.15**-0.1, abs=4)
    assert rising[-1].lineage.depth == pytest.approx(1.2**3)
    assert rising[-1].lineage.width == pytest.approx(1.1**3)
    assert rising[0].lineage.resolution == pytest.approx(1.15**-6, rel=0.03)


def test_members_above_a_size_asked_for_keep_it():
    rising = members("resnet50d", 160)
    assert max(spec.input.size for spec in rising) == 160
    assert rising[-1].lineage.depth == pytest.approx(1.2**3)
    assert for_image_size(cs.get_spec("resnet50d"), 160) in rising


def test_a_member_between_two_depths_is_deeper_by_one_block():
    names = [spec.name for spec in members("resnet50d", 28)]
    at = names.index("resnet50d-w0.375-d0.275")
    before, after = members("resnet50d", 28)[at : at + 2]
    assert before.depths == (1, 2, 2, 1)  # ceil(0.275 x (3, 4, 6, 3))
    assert after.depths == (1, 2, 2, 2)
    assert before.widths == after.widths
    assert cs.create_model(after, num_classes=3) is not None


@pytest.mark.parametrize("count", [1, 2, 7, 60])
def test_the_crossing_is_found_wherever_it_is(count):
    for edge in range(-1, count):
        asked: list[int] = []

        def speed(index, asked=asked):
            asked.append(index)
            return 1e4 * 1.09**-index

        found = _largest_keeping(count, speed, 1e4 * 1.09 ** -(edge + 0.5))
        assert found == (None if edge < 0 else edge)
        assert len(set(asked)) <= 6  # of 60: bisection alone would take as many


def test_the_member_found_uses_most_of_the_speed_once_it_is_tuned():
    """Tuned networks are 1.5 times as fast: the plain crossing at 1,000 images/s would leave a third unused."""
    rising = members("resnet50d", 28)
    order = {spec: index for index, spec in enumerate(rising)}
    plain = {spec: 8000 * 1.07**-index for spec, index in order.items()}
    found = largest_member(rising, 1000, lambda spec: plain[spec], lambda spec: 1.5 * plain[spec])
    assert found.keeps
    assert 1000 <= found.images_per_s <= 1000 / 0.85
    assert found.images_per_s == pytest.approx(1.5 * plain[found.spec])
    alone = largest_member(rising, 1000, lambda spec: plain[spec])
    assert order[alone.spec] == math.floor(math.log(8) / math.log(1.07))
    assert order[found.spec] > order[alone.spec]


def test_where_none_keeps_the_speed_the_smallest_is_found():
    rising = members("resnet50d", 28)
    found = largest_member(rising, 1e9, lambda spec: 100.0, lambda spec: 120.0)
    assert (found.spec, found.images_per_s, found.keeps) == (rising[0], 120.0, False)
    assert not largest_member(rising, 1e9, lambda spec: 100.0).keeps
    with pytest.raises(ValueError, match="there are no members"):
        largest_member([], 1.0, lambda spec: 1.0)


def test_a_member_that_is_too_slow_once_tuned_gives_way_to_a_smaller_one():
    """Tuned alone, a network may be slower than it was timed: here by 30 %, so that the plain crossing is too large."""
    rising = members("resnet50d", 28)
    order = {spec: index for index, spec in enumerate(rising)}
    plain = {spec: 8000 * 1.07**-index for spec, index in order.items()}
    found = largest_member(rising, 1000, lambda spec: plain[spec], lambda spec: 0.7 * plain[spec])
    assert found.keeps
    assert 1000 <= found.images_per_s <= 1000 / 0.85


@pytest.mark.parametrize("slow", [0.3, 0.5])
@pytest.mark.parametrize("upper", [False, True])
def test_quick_timings_that_were_disturbed_do_not_hide_the_larger_members(slow, upper):
    """Half of the quick timings came out too slow, as another guest of the machine has it; tuned ones are right. Seen
    in a demo: the member found used 34 % of the speed allowed, after two of three tries.
    """
    rising = members("resnet50d", 28)
    order = {spec: index for index, spec in enumerate(rising)}
    true = {spec: 8000 * 1.07**-index for spec, index in order.items()}
    fits = {spec for spec, index in order.items() if true[spec] >= 1000 * 1.02}
    disturbed = {spec for spec in rising if (order[spec] % 2 == 0) == upper}
    found = largest_member(
        rising, 1000, lambda spec: true[spec] * (slow if spec in disturbed else 1.0), lambda spec: true[spec]
    )
    assert found.keeps
    assert found.spec in fits
    assert found.images_per_s <= 1000 * 1.02 / 0.85


@pytest.mark.parametrize("holds", [1, 2, 9, 1000])
@pytest.mark.parametrize("tuned", [False, True])
def test_a_member_that_memory_does_not_hold_keeps_no_speed(holds, tuned):
    rising = members("resnet50d", 28)
    order = {spec: index for index, spec in enumerate(rising)}

    def plain(spec):
        if order[spec] >= holds:
            raise DoesNotFit("too large")
        return 8000 * 1.07 ** -order[spec]

    found = largest_member(rising, 10, plain, plain if tuned else None)
    assert found.keeps
    assert order[found.spec] == min(holds, len(rising)) - 1
    if holds <= order[rising[-1]]:
        with pytest.raises(DoesNotFit, match="too large"):
            largest_member(rising[-1:], 10, plain)
