"""What ``fit`` is asked for that can not be: told before anything is searched, trained or written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from convscale.choice.basis import Asked, basis_of
from convscale.conditions import Constraint
from convscale.errors import UserError
from convscale.images.preprocess import Preprocessing
from convscale.networks.foreign import Foreign
from convscale.networks.offered import Filter
from convscale.networks.weight_files import WeightFiles
from convscale.pipeline.finding import Finder
from convscale.pipeline.request import FitRequest, Start, Training
from convscale.pipeline.run import _usual_runtime
from convscale.pipeline.ship import Shipping, ship_fastest
from convscale.pipeline.steps import Fit
from tests.pipeline.test_order import BASIS, SPEC, SPLITS, _record


class Net(torch.nn.Sequential):
    """A network of the user's own, so and so wide."""

    def __init__(self, width: int) -> None:
        pooled = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(width, 2)]
        super().__init__(torch.nn.Conv2d(3, width, 3), *pooled)


def _request(**given: Any) -> FitRequest:
    values = {
        "data": SPLITS,
        "output": Path("run"),
        "constraint": Constraint(min_throughput=1.0),
        "where": Asked(),
        "shipping": Shipping(runtime=None, int8=False, max_drop=0.5),
        "training": Training(),
        "start": Start(),
    }
    return FitRequest(**{**values, **given})


def test_two_networks_of_one_name_are_refused() -> None:
    """A module is named by its class: one would be timed and the other shipped."""
    same = "two networks that differ are named Net; give one of them another name"
    with pytest.raises(UserError, match=same):
        _request(candidates=[Net(4), Net(8)], image_size=32).check_networks(SPLITS)
    twice = _request(candidates=("mobilenetv2_0*", SPEC.name), image_size=32).networks  # the same network, twice
    assert [one.spec.name for one in twice].count(SPEC.name) == 1


def test_a_pattern_means_the_networks_of_the_weights_that_it_matches() -> None:
    """Where no weights can be had, they start from scratch: once each, timm's and the own ones."""
    both = _request(candidates=("vgg1[13]*", "resnet50.*"), image_size=32, start=Start(scratch=True))
    both.check_networks(SPLITS)
    assert sorted(one.spec.name for one in both.networks) == ["resnet50", "vgg11", "vgg11_bn", "vgg13", "vgg13_bn"]
    spec = next(one.spec for one in both.networks if one.spec.name == "resnet50")
    assert spec.input.size == 32
    assert {one.spec.name for one in _request(candidates="vgg11", image_size=32).networks} == {"vgg11"}
    with pytest.raises(UserError, match=r"unknown model 'nobody\*'"):
        _request(candidates="nobody*", start=Start(scratch=True)).check_networks(SPLITS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"where": Asked(precision="int8")}, r"precision 'int8' is what int8=True \(--int8\) lets fit ship"),
        (
            {"where": Asked(device="l4", precision="int8")},
            r"precision 'int8' is what int8=True \(--int8\) lets fit ship",
        ),
        (
            {"where": Asked(device="cuda"), "shipping": Shipping(runtime="openvino", int8=False, max_drop=0.5)},
            "runtime openvino runs on device cpu here, got 'cuda'; leave runtime out",
        ),
        *(
            (
                {
                    "where": Asked(device="l4", runtime=runtime),
                    "shipping": Shipping(runtime=None, int8=True, max_drop=1),
                },
                f"int8 on l4 is predicted in runtime onnxruntime or tensorrt, not in {runtime or 'compiled'}; name one",
            )
            for runtime in (None, "compiled", "eager")
        ),
        *(
            (
                {
                    "where": Asked(device="i9-10940x", runtime=runtime),
                    "shipping": Shipping(runtime=None, int8=True, max_drop=1),
                },
                "precision 'int8' is predicted on GPUs alone, got device i9-10940x; fp32 is predicted there",
            )
            for runtime in (None, "onnxruntime")
        ),
        (
            {
                "where": Asked(device="l4", runtime="tensorrt", precision="amp"),
                "shipping": Shipping(runtime=None, int8=True, max_drop=1),
            },
            "precision 'amp' and int8 exclude each other; give one of them",
        ),
        *(
            (
                {"training": Training(recipe=recipe, overrides={"compile": "graphs"})},
                f"recipe {name}: compile is graphs, CUDA graphs, and device cpu is no CUDA GPU; compile=auto would be",
            )
            for recipe, name in ((None, "of the data"), ("small", "small"))
        ),
    ],
)
def test_what_could_not_ship_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _request(**given)


def test_on_this_machine_s_gpu_networks_are_chosen_in_the_form_that_ships(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convscale.choice.basis.need_cuda", lambda *_: None)
    monkeypatch.setattr("convscale.pipeline.request.usable_device", lambda device: device)
    where, installed = Asked(device="cuda:1", batch_size=64), []
    monkeypatch.setattr("convscale.pipeline.request.need_runtime", installed.append)
    for runtime, int8 in ((None, False), (None, True), ("tensorrt", True)):
        basis = _request(where=where, shipping=Shipping(runtime=runtime, int8=int8, max_drop=1)).basis()
        c = basis.conditions
        assert (basis.tuned, basis.int8, basis.within) == (True, int8, runtime)
        assert (c.device, c.precision, c.batch_size) == ("cuda:1", "int8" if int8 else "fp32", 64)
    assert installed == ["tensorrt"]
    plain = Finder(
        asked=_request(where=where), splits=SPLITS, basis=replace(basis, within=None), constraint=Constraint(),
        record=None, folder=Path(), say=print,  # pyright: ignore[reportArgumentType]
    ).plain  # fmt: skip
    assert (plain.device, plain.runtime, plain.precision) == ("cuda:1", "onnxruntime", "fp32")
    with pytest.raises(UserError, match="runtime tensorrt runs on device cuda here, got 'cpu'; leave runtime out"):
        _request(shipping=Shipping(runtime="tensorrt", int8=False, max_drop=1))


def test_a_runtime_that_is_not_installed_is_told_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convscale.runtimes.base.find_spec", lambda library: None if library == "openvino" else library)
    with pytest.raises(UserError, match="runtime openvino is not installed; pip install openvino"):
        _request(shipping=Shipping(runtime="openvino", int8=False, max_drop=1))


def _bf16(runtime: str | None = None) -> Shipping:
    return Shipping(runtime=runtime, int8=False, max_drop=0.5, bf16=True)


def test_bfloat16_ships_where_this_processor_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convscale.runtimes.base.no_bf16", lambda format: "this processor has no bf16 instructions")
    with pytest.raises(UserError, match="this processor has no bf16 instructions"):
        _bf16()
    with pytest.raises(UserError, match=r"precision 'bf16' is what bf16=True \(--bf16\) lets fit ship"):
        _request(where=Asked(precision="bf16"))
    monkeypatch.setattr("convscale.runtimes.base.no_bf16", lambda format: "")
    with pytest.raises(UserError, match="bf16 is computed in runtime openvino, not in onnxruntime; leave one of them"):
        _bf16("onnxruntime")
    with pytest.raises(UserError, match=r"bf16=True \(--bf16\) lets forms ship .* got device 'l4'; leave it out"):
        _request(where=Asked(device="l4"), shipping=_bf16())
    assert _request(where=Asked(device="l4", precision="bf16")).basis().conditions.precision == "bf16"
    for int8, precision in ((False, "bf16"), (True, "int8")):
        asked = _request(shipping=replace(_bf16("openvino"), int8=int8))
        basis = asked.basis()
        assert (basis.bf16, basis.int8, basis.within) == (True, int8, "openvino")
        assert basis.conditions.precision == precision
        assert asked.shipping.to_json()["bf16"] is True
    assert "bf16" not in Shipping(runtime=None, int8=False, max_drop=0.5).to_json()  # older runs are resumed


def test_forms_in_bfloat16_are_among_those_that_may_ship(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convscale.runtimes.base.no_bf16", lambda format: "")
    seen: list[Any] = []

    def export_winner(net: Any, place: Path, names: list[str], *given: Any, **options: Any) -> None:
        seen.append(names)
        raise UserError("stop here")

    monkeypatch.setattr("convscale.pipeline.ship.export_winner", export_winner)
    monkeypatch.setattr("convscale.ship.forms.no_bf16", lambda format: "")
    pre = Preprocessing(image_size=12, channels=1, mean=(0.5,), std=(0.5,))
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    for how in (_bf16(), replace(_bf16(), bf16=False)):
        basis = _request(shipping=how).basis()
        with pytest.raises(UserError, match="stop here"):
            ship_fastest(net, tmp_path / "a", SPLITS, SPLITS.test, pre, basis, how, card={}, say=print)
    assert seen == [["onnx-fp32", "openvino-bf16"], ["onnx-fp32"]]


@pytest.mark.parametrize(
    ("candidates", "why"),
    [
        (SPEC, "nobody released weights of what was named: networks start from scratch"),
        ("tf_efficientnet_lite0", "no released weights can be had (none in the hub's cache"),
    ],
)
def test_the_hub_is_not_blamed_for_weights_that_nobody_released(
    candidates: Any, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finder: Any = SimpleNamespace(released=lambda files: None, scaled=lambda: "scaled")
    monkeypatch.setattr(Fit, "_finder", lambda self, loaded: finder)
    asked, record = _request(candidates=candidates), _record(tmp_path, [])
    fit = Fit(asked=asked, record=record, splits=SPLITS, folder=tmp_path, basis=BASIS, files=WeightFiles())
    assert fit._kept(False)[0] == "scaled"
    assert [note.startswith(why) for note in record.now.choice_notes or ()] == [True]


@pytest.mark.parametrize(
    ("offer", "begin"),
    [
        ({}, ["timm is not installed, so that only the own zoo was considered"]),
        ({"zoo": "own"}, []),
        ({"zoo": "own", "attention": True}, ["networks with attention are among the candidates"]),
    ],
)
def test_what_there_was_to_choose_from_is_said_as_choose_says_it(
    offer: dict[str, Any], begin: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without timm the own zoo alone was looked at, and nothing said so."""
    monkeypatch.setattr("convscale.choice.choose.timm_is_installed", lambda: False)
    finder: Any = SimpleNamespace(released=lambda files: "released")
    monkeypatch.setattr(Fit, "_finder", lambda self, loaded: finder)
    asked, record = _request(start=Start(scratch=False), offer=Filter(**offer)), _record(tmp_path, [])
    fit = Fit(asked=asked, record=record, splits=SPLITS, folder=tmp_path, basis=BASIS, files=WeightFiles())
    assert fit._kept(False)[0] == "released"
    notes = record.now.choice_notes or ()
    assert [note[: len(text)] for note, text in zip(notes, begin, strict=True)] == begin


@pytest.mark.parametrize(
    ("given", "asks"),
    [
        ({"training": Training(init="pretrained")}, "init 'pretrained'"),
        ({"start": Start(weights_dir=Path())}, r"weights_dir \."),
    ],
)
@pytest.mark.parametrize("bare", ["mobilenetv3_large_075", SPEC])
def test_weights_that_nobody_released_are_refused_where_they_are_asked_for(
    bare: Any, given: dict[str, Any], asks: str
) -> None:
    name = getattr(bare, "name", bare)
    with pytest.raises(UserError, match=f"nobody released weights of {name}, and {asks} asks for some; leave that out"):
        _request(candidates=bare, **given).check_networks(SPLITS)
    _request(candidates=[bare, "tf_efficientnet_lite0"], **given).check_networks(SPLITS)  # one of them has some
    if bare is SPEC:
        _request(candidates=bare).check_networks(SPLITS)  # then it starts from scratch, and a note says so


def test_a_name_stands_for_weights(tmp_path: Path) -> None:
    """Nobody wrote that it should start from scratch; what is the user's own can start from nothing else."""
    names, own = ["mobilenetv3_large_075", "nf_seresnet26"], replace(SPEC, name="mine")
    file = tmp_path / "w.pth"
    torch.save({"w": torch.zeros(1)}, file)
    for given in (names, names[0], names[1]):
        with pytest.raises(UserError, match=r"nobody released weights of .*; scratch=True \(--scratch\) trains from"):
            _request(candidates=given, image_size=224).check_networks(SPLITS)
    _request(candidates=names[0], image_size=224, resume=True).check_networks(SPLITS)  # which an earlier version began
    _request(candidates=names[0], image_size=224, start=Start(scratch=True)).check_networks(SPLITS)
    _request(candidates=names[0], image_size=224, start=Start(file=file)).check_networks(SPLITS)
    _request(candidates=[names[0], own], image_size=224).check_networks(SPLITS)
    _request(candidates=names[0]).check_networks(SPLITS)  # small images are learned from scratch anyway


class Untraceable(Net):
    """Asks for values, which a trace has none of."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.sum().item() > 0 else x


@pytest.mark.parametrize("start", [Start(), Start(scratch=True)])
def test_an_own_module_that_can_not_be_traced_is_told_before_anything_is_written(start: Start) -> None:
    _request(candidates=["resnet18", Net(4)], image_size=32, start=start).check_networks(SPLITS)
    with pytest.raises(UserError, match="Untraceable") as told:
        _request(candidates=["resnet18", Untraceable(4)], image_size=32, start=start).check_networks(SPLITS)
    assert "\n" not in str(told.value)


def test_too_few_images_for_8_bits_are_told_before_the_training() -> None:
    whole, tuned = (Shipping(runtime=None, int8=True, max_drop=0.5, qat=qat) for qat in (False, True))
    with pytest.raises(UserError, match="INT8 needs at least 32 calibration images of the training set, got 10"):
        whole.check_images(10)
    whole.check_images(32)
    with pytest.raises(UserError, match="fine-tuning needs at least 64 calibration images of the training set, got 63"):
        tuned.check_images(63)
    tuned.check_images(64)
    Shipping(runtime=None, int8=False, max_drop=0.5).check_images(1)


def test_a_file_of_weights_is_of_whatever_network_is_named(tmp_path: Path) -> None:
    """By the name that it has among the candidates."""
    file = tmp_path / "w.pth"
    file.write_bytes(b"x")
    own = replace(SPEC, name="mine")
    networks = {
        "mine": own,
        "nets:make": Foreign("nets:make", "factory"),
        "Net": Net(4),
        "mobilenetv3_large_075": "mobilenetv3_large_075",  # nobody released weights of it
        "mobilenetv2_050.lamb_in1k": "mobilenetv2_050",
    }
    for name, network in networks.items():
        assert Start(file=file).files((network,)).given == {name: file}
    for named in (None, (own, SPEC)):
        with pytest.raises(UserError, match=r"init is the file .*; name the one network that it is of \(--model\)"):
            Start(file=file).files(named)
    with pytest.raises(UserError, match="candidate is 3; it must be text"):
        Start(file=file).files((3,))  # pyright: ignore[reportArgumentType]


def test_misnamed_files_beside_good_ones_are_refused(tmp_path: Path) -> None:
    for name in ("resnet18.a1_in1k.pth", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert Start(weights_dir=tmp_path).files(None).folder == tmp_path
    (tmp_path / "resnet18_best.pth").write_bytes(b"x")
    with pytest.raises(UserError, match=r"holds resnet18_best\.pth; files must be named by tag, as in tf_eff"):
        Start(weights_dir=tmp_path).files(None)


@pytest.mark.parametrize(
    ("device", "others"), [("l4", "tensorrt, onnxruntime or eager"), ("i9-10940x", "onnxruntime or eager")]
)
def test_the_runtimes_that_are_named_are_those_of_the_device(device: str, others: str) -> None:
    conditions = basis_of(Asked(device=device, runtime="compiled")).conditions
    assert _usual_runtime(conditions) == (
        f"speeds are predicted for {device} in runtime compiled, since none was named; --runtime {others} predicts for "
        "another"
    )
