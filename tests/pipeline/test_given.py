"""Networks of the user's own in ``fit``: they stay what was given, whatever their name and whoever has it too."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import convscale as cs
from convscale.arch.spec import NetSpec
from convscale.choice.candidates import Candidate
from convscale.choice.facts import SizedSpec
from convscale.conditions import Constraint
from convscale.networks.foreign import Foreign
from convscale.networks.offered import Filter
from convscale.networks.resolve import find
from convscale.pipeline.candidate_rows import new_row
from convscale.pipeline.contender import Contender
from convscale.pipeline.steps import Fit
from convscale.show.fit_record import read_fit
from tests.pipeline.test_order import SPEC, SPLITS, _finder, _fit, _option, _record


def test_smaller_images_are_for_the_network_that_was_given(tmp_path: Path) -> None:
    """A spec of the user's own, and a module with the name of one of the zoo's: not what the name stands for."""
    own, net = dataclasses.replace(SPEC, name="my_net"), cs.create_model("resnet18", num_classes=3)
    options = []
    for spec in (own, Foreign("resnet18", "module", net)):
        candidate = Candidate(name=spec.name, spec=spec, image_size=224, group=spec.name)
        options.append(dataclasses.replace(_option(spec.name, 90, 0.0, "no"), candidate=candidate))
    lite = _option("tf_efficientnet_lite0.in1k", 90, 75.0, "no")
    finder = _finder(_record(tmp_path, []), Constraint(min_throughput=100), size=None, offer=Filter())
    found = {c.name: c for c in finder._smaller([*options, lite])}
    assert sorted(found) == ["my_net", "resnet18", lite.name]
    assert found["my_net"].spec is own
    assert isinstance(found["resnet18"].spec, Foreign)
    assert found["resnet18"].spec.module is net
    assert found[lite.name].licence == "apache-2.0"
    assert {c.image_size for c in found.values()} == {192}


def test_a_network_of_timm_s_stays_timm_s_though_an_own_one_has_its_name(tmp_path: Path) -> None:
    """From choosing over the record, as a resumed run reads it, to what is probed, trained and shipped."""
    name = "resnet18.a1_in1k"
    assert isinstance(find(name), NetSpec)  # which is what its bare name means
    candidate = Candidate(
        name=name, spec=Foreign("resnet18", "timm"), image_size=224, group=name, top1=71.5, licence="MIT"
    )
    option = dataclasses.replace(_option(name, 90, 71.5, "no"), candidate=candidate)
    finder = _finder(_record(tmp_path, []), Constraint(min_throughput=100), size=None, offer=Filter())
    finder._write_options([option], [option], {name: "pretrained"})
    (row,) = read_fit(tmp_path).candidates
    for contender in (finder._contender(option, "pretrained"), Contender.of(row, {})):
        assert isinstance(contender.spec, Foreign)
        assert (contender.spec.arch, contender.spec.origin) == ("resnet18", "timm")
        assert contender.network == "timm/resnet18.a1_in1k"
        assert find(contender.network) == Foreign(name, "timm")
    bare = new_row(SizedSpec(Foreign("resnet18", "timm"), 32), "resnet18", SPLITS)  # without weights
    assert Contender.of(bare, {}).network == Foreign("resnet18", "timm")
    own = dataclasses.replace(_option(name, 90, 71.5).candidate, spec=SPEC)
    assert finder._contender(dataclasses.replace(option, candidate=own), "pretrained").network == name
    assert {c.spec for c in finder._smaller([option])} == {Foreign("resnet18", "timm")}


def test_a_brief_training_leaves_a_module_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The full training begins where a run without a comparison would."""
    net = torch.nn.Linear(2, 2)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    seen: list[torch.nn.Module] = []

    def train(given: Any, splits: Any, **options: Any) -> Any:
        module = given.module
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
        with torch.no_grad():
            module.weight += 1
        seen.append(module)
        return SimpleNamespace(best_metric=0.5, seconds=1.0)

    monkeypatch.setattr("convscale.pipeline.steps.train", train)
    monkeypatch.setattr(Fit, "training", lambda self, contender: {})
    fit = _fit(_record(tmp_path, []), monkeypatch)
    for _ in range(2):
        contender = Contender(name="own", spec=Foreign("own", "module", net), image_size=224, family="own")
        assert fit._train_briefly(contender).top1 == 0.5
    assert len(seen) == 2
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
