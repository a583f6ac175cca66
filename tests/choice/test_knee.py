"""The front's knee, by hand."""

from pathlib import Path
from typing import Any

import pytest

from convscale.arch.zoo import get_spec
from convscale.choice import knee
from convscale.choice.basis import Asked, basis_of
from convscale.choice.candidates import Candidate
from convscale.choice.facts import NetworkFacts, Speed
from convscale.choice.knee import _some, knee_of, survey
from convscale.choice.largest import Effort
from convscale.conditions import Constraint


def test_the_knee_is_farthest_above_the_line_between_the_ends():
    # log2 of the speed falls 3, 2, 1, 0; accuracy rises 60, 75, 78, 80. Above the line, as shares of both extents:
    # 0; 15/20 - 1/3 = 0.417; 18/20 - 2/3 = 0.233; 0
    assert knee_of([(800, 60), (400, 75), (200, 78), (100, 80)]) == 1
    # speeds count by their logarithms: 8/20 - 1/3 = 0.07 and 16/20 - 2/3 = 0.13; on a straight scale both lie below it
    assert knee_of([(800, 60), (400, 68), (200, 76), (100, 80)]) == 2
    # accuracy that comes late: 2/20 - 1/3 < 0, 5/20 - 2/3 < 0, so the accurate end
    assert knee_of([(800, 60), (400, 62), (200, 65), (100, 80)]) == 3


def test_short_fronts_end_at_the_accurate_end():
    assert knee_of([(800, 60)]) == 0
    assert knee_of([(800, 60), (400, 61)]) == 1


def test_five_rows_hold_both_ends_and_the_knee():
    assert _some(4, 2) == [0, 1, 2, 3]
    for must in range(12):
        rows = _some(12, must)
        assert len(rows) == 5
        assert {0, must, 11} <= set(rows)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, [("small", 1000), ("middle", 500), ("large", 400)]),
        ({"max_params_m": 30.0}, [("small", 1000), ("middle", 500)]),
        ({"max_memory_gb": 1.5}, [("small", 1000)]),
        ({"max_params_m": 1.0}, None),
    ],
)
def test_what_is_too_large_is_no_part_of_the_front(
    limits: dict[str, float], expected: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its speed would be asked of networks that are within the limits."""
    table = {"small": (1000, 70.0, 5), "middle": (500, 80.0, 25), "large": (400, 82.0, 90)}  # images/s, top-1, M
    sizes = {name: 224 + 32 * number for number, name in enumerate(table)}
    pool = [
        Candidate(name=name, spec=get_spec("resnet18"), image_size=sizes[name], group=name, top1=top1)
        for name, (_, top1, _) in table.items()
    ]

    def facts(wanted: Any, *rest: Any) -> dict[Any, NetworkFacts]:
        found = {}
        for network, (name, (speed, _, params)) in zip(wanted, table.items(), strict=True):
            assert network.image_size == sizes[name]
            held = Speed(images_per_s=speed, low=speed, high=speed, kind="predicted")
            memory = (1 + (name != "small")) * 2**30
            found[network] = NetworkFacts(params=params * 10**6, macs=1, memory_bytes=memory, speed=held)
        return found

    monkeypatch.setattr(knee, "facts_of", facts)
    effort = Effort(records=tmp_path / "speeds.jsonl", seconds=0.1, say=lambda text: None)
    front = survey(pool, basis_of(Asked(device="l4")), effort, constraint=Constraint(**limits))
    assert (front and [(o.name, o.images_per_s) for o in front.rows]) == expected
