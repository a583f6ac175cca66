"""The papers' comparisons: what they compare is what they say."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from benchmarks import ablation
from convscale.arch.zoo import get_spec
from convscale.conditions import Conditions
from convscale.cost.counting import count
from convscale.machine import Environment
from convscale.predictor.devices import get_device
from convscale.show.studies import ABLATION, PAPER, papers_example, tresnet_ablation
from convscale.speed.records import Record
from convscale.speed.timing import Measurement


def test_the_ablation_starts_from_the_published_network() -> None:
    assert ABLATION["TResNet-M"] == get_spec("tresnet_m")


@pytest.mark.parametrize("line", [line for line in ABLATION if line != "TResNet-M"])
def test_one_ingredient_changes_at_a_time(line: str) -> None:
    """The specs differ in the fields that the line names, and in nothing else."""
    base, spec = (json.loads(json.dumps(dataclasses.asdict(s))) for s in (ABLATION["TResNet-M"], ABLATION[line]))
    changed = {key for key in base if base[key] != spec[key]} - {"name"}
    what = line.partition(":")[0]
    assert changed == {"stem": {"stem", "input"}, "norm": {"norm"}}.get(what, {"stages"})
    if changed == {"stages"}:
        fields = {"blur": {"downsample"}, "SE": {"se"}, "blocks": {"kind", "width", "inner_ratio", "se"}}[what]
        for own, other in zip(base["stages"], spec["stages"], strict=True):
            blocks = own["runs"][0]["block"], other["runs"][0]["block"]
            assert {key for key in blocks[0] if blocks[0][key] != blocks[1][key]} <= fields
            assert own["runs"][0]["repeat"] == other["runs"][0]["repeat"]


def test_squeeze_and_excitation_weighs_what_the_paper_gives() -> None:
    """Two 1x1 convolutions with bias a block, reduced to max(planes / 4, 64) or max(planes * 4 / 8, 64) channels
    (section 2 of the paper).
    """

    def se(channels: int, reduced: int) -> int:
        return channels * reduced + reduced + reduced * channels + channels

    weight = 3 * se(64, 64) + 4 * se(128, 64) + 11 * se(256, 128)
    assert count(ABLATION["TResNet-M"]).params - count(ABLATION["SE: in no stage"]).params == weight


def test_published_figures_are_the_papers() -> None:
    assert {row.name: (row.infer, row.train) for row in PAPER} == {
        "resnet50": (2830, 805),
        "tresnet_m": (2930, 730),
        "efficientnet_b1": (2740, 440),
        "mixnet_l": (1400, 400),
    }


def test_the_papers_example_holds_both_kinds_in_both_modes() -> None:
    comparison = papers_example()
    found = {(p.name, p.conditions.mode, p.kind): p for p in comparison.points}
    assert len(found) == 4 * 2 * 2
    assert {p.device for p in comparison.points} == {get_device("v100").title}
    assert found["tresnet_m", "train", "predicted"].conditions.batch_size == 460  # 90 % of 512
    assert found["efficientnet_b1", "infer", "published"].conditions.image_size == 240
    assert all(
        p.low is not None and p.low < p.images_per_s < (p.high or 0) for p in comparison.points if p.kind == "predicted"
    )


def test_the_ablation_takes_the_last_measurement() -> None:
    records = [
        Record(
            model="tresnet_m_no_blur",
            measurement=Measurement(
                times_s=(seconds,),
                conditions=Conditions(batch_size=8, image_size=224),
                environment=Environment(device_name="CPU", cores=2),
            ),
        )
        for seconds in (2.0, 1.0)
    ]
    comparison = tresnet_ablation(["v100"], records)
    measured = [p for p in comparison.points if p.kind == "measured"]
    assert [(p.name, p.images_per_s) for p in measured] == [("blur: none, plain strides", 8.0)]
    assert [p.name for p in comparison.points if p.kind == "predicted"] == list(ABLATION)


def test_the_table_of_accuracies_by_hand() -> None:
    """Differences a seed and ratios of speed; what is within the seeds' spread, or 5 % of a speed, is not told."""
    base = {"data": "clothes", "image_size": 28, "seconds": 100.0, "recipe": "small", "machine": "a machine"}
    speeds = {"training_images_per_s": 100.0, "images_per_s": 1000.0, "predicted_rtx_4090": 5000.0}

    def rows(line: str, tops: list[float], **other: float) -> list[dict[str, Any]]:
        return [{**base, **speeds, "line": line, "seed": at, "test_top1": top, **other} for at, top in enumerate(tops)]

    table = ablation.accuracy_table(
        [
            *rows("TResNet", [0.90, 0.91, 0.92]),
            *rows("SE: in no stage", [0.89, 0.899, 0.911], images_per_s=1100.0, predicted_rtx_4090=5200.0),
            *rows("blur: none, plain strides", [0.91, 0.919, 0.931], images_per_s=900.0, predicted_rtx_4090=6000.0),
            *rows("norm: BatchNorm and leaky ReLU", [0.91, 0.90, 0.92], images_per_s=1040.0),
            *rows("SE: in all four stages", [0.93]),
        ]
    )
    assert "## clothes, 28 px, 100 s of recipe `small`" in table
    assert "| TResNet | 91.00% (90.00%, 91.00%, 92.00%) |  |" in table
    se = "| SE: in no stage | 90.00% (89.00%, 89.90%, 91.10%) | -1.00 ± 0.10 | 1.00 | 1.10 | 1.04 | lower, faster |"
    assert f"{se} yes; yes, not told |" in table
    assert "| +1.00 ± 0.10 | 1.00 | 0.90 | 1.20 | lower, faster | no; no, yes |" in table
    assert "| +0.00 ± 1.00 | 1.00 | 1.04 | 1.00 | same, same | yes; yes, yes |" in table
    assert "| SE: in all four stages | 93.00% (93.00%) | +3.00 | 1.00 | 1.00 | 1.00 | same, slower | not told;" in table
    wrong = "blur: none, plain strides (accuracy); blur: none, plain strides (speed here)"
    assert f"- Does not agree: {wrong}.\n" in table
    assert set(ablation.PAPER) == set(ablation.SMALL) - {"TResNet"}
