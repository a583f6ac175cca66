"""NetSpec: validation, equality, round trips."""

import dataclasses

import pytest

import convscale as cs
from convscale.arch.block import BlockSpec, RunSpec, SESpec, StageSpec
from convscale.arch.parts import ActSpec, HeadSpec, InputSpec, NormSpec, StemSpec
from convscale.arch.spec import NetSpec
from convscale.arch.zoo import ARCHITECTURES


def tiny(**changes) -> NetSpec:
    block = BlockSpec(kind="basic", width=8)
    values = {"stem": StemSpec(widths=(8,)), "stages": (StageSpec(runs=(RunSpec(block=block, repeat=2),)),), **changes}
    return NetSpec(**values)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_json_and_yaml_round_trip(name):
    spec = ARCHITECTURES[name]
    for again in (NetSpec.from_json(spec.to_json()), NetSpec.from_yaml(spec.to_yaml())):
        assert again == spec
        assert (again.name, again.family, again.lineage) == (spec.name, spec.family, spec.lineage)


def test_spec_is_frozen_hashable_and_equal_by_value():
    a, b = tiny(name="a"), tiny(name="b")
    assert a == b
    assert hash(a) == hash(b)
    assert a != tiny(norm=NormSpec(eps=1e-3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.name = "c"  # type: ignore[misc]


def test_file_round_trip(tmp_path):
    spec = cs.get_spec("mixnet_m")
    for suffix in (".json", ".yaml"):
        cs.save_spec(spec, tmp_path / f"mine{suffix}")
        assert cs.load_spec(tmp_path / f"mine{suffix}") == spec


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockSpec(kind="basic", width=0), "BlockSpec.width is 0; it must be at least 1"),
        (lambda: BlockSpec(kind="bottle", width=8), "BlockSpec.kind is 'bottle'; it must be one of basic, bottleneck"),
        (
            lambda: BlockSpec(kind="basic", width=8.5),  # type: ignore[arg-type]
            "BlockSpec.width is 8.5; it must be a whole number",
        ),
        (lambda: BlockSpec(kind="basic", width=8, kernels=(4,)), r"BlockSpec.kernels is \(4,\); it must be odd"),
        (
            lambda: BlockSpec(kind="bottleneck", width=64, inner_ratio=0.25, group_width=3),
            "group_width is 3; it must be a divisor of the inner width 16",
        ),
        (lambda: StageSpec(runs=()), "StageSpec.runs"),
        (lambda: StemSpec(kind="deep", widths=(8,)), "three widths for a deep stem"),
        (lambda: SESpec(ratio=-1.0), r"SESpec.ratio is -1.0; it must be in \(0, 4\]"),
        (lambda: ActSpec(slope=2.0), r"ActSpec.slope is 2.0; it must be in \[0, 1\)"),
        (lambda: HeadSpec(dropout=1.0), "HeadSpec.dropout is 1.0"),
        (lambda: NormSpec(eps=0.0), "NormSpec.eps"),
        (lambda: NormSpec(eps=float("nan")), "NormSpec.eps is nan; it must be a finite number"),
        (lambda: InputSpec(size=30, multiple=4), "InputSpec.size is 30; it must be a multiple of 4"),
        (lambda: InputSpec(std=(0.0, 1.0, 1.0)), "InputSpec.std"),
        (
            lambda: tiny(stem=StemSpec(kind="space_to_depth", widths=(8,), stride=4)),
            "InputSpec.multiple is 1; it must be a multiple of 4",
        ),
        (
            lambda: tiny(stem=StemSpec(kind="conv", widths=(8,), stride=4)),
            "StemSpec.stride is 4; it must be 1 or 2 for a conv stem",
        ),
        (
            lambda: BlockSpec(kind="basic", width=8, se=SESpec(where="inner")),
            "SESpec.where is 'inner'; it must be 'output' for a basic block",
        ),
        (lambda: tiny(stages=()), "at least one stage"),
    ],
)
def test_bad_values_name_field_and_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"stem": {}}', "spec lacks the field 'stages'"),
        ('{"stem": {}, "stages": [], "haed": {}}', r"spec has an unknown field 'haed' \(nearest: head"),
        ('{"stem": 3, "stages": []}', "spec.stem is 3; it must be a mapping"),
        ('{"stem": {}, "stages": {}}', "spec.stages is {}; it must be a list"),
        ("[1, 2]", "it must be a mapping"),
        ("{", "spec is not JSON"),
    ],
)
def test_bad_json_says_what_and_where(text, message):
    with pytest.raises(ValueError, match=message):
        NetSpec.from_json(text)


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.json"):
        cs.load_spec(tmp_path / "spec.txt")
    with pytest.raises(ValueError, match="can not be read: No such file"):
        cs.load_spec(tmp_path / "spec.json")
    (tmp_path / "spec.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"spec\.yaml: spec is no valid YAML"):
        cs.load_spec(tmp_path / "spec.yaml")


@pytest.mark.parametrize(
    ("name", "size", "ok"),
    [("tresnet_m", 100, True), ("tresnet_m", 20, True), ("resnet50", 129, True), ("resnet50", 1, True)],
)
def test_sizes_that_a_network_takes(name, size, ok):
    assert cs.get_spec(name).check_size(size) == size


@pytest.mark.parametrize(("name", "size"), [("tresnet_m", 130), ("tresnet_m", 16), ("resnet50", 0), ("resnet50", 12.5)])
def test_sizes_that_it_does_not_take(name, size):
    with pytest.raises(ValueError, match="image size is"):
        cs.get_spec(name).check_size(size)


def test_squeezed_widths_by_hand():
    efficientnet = SESpec(ratio=0.25)
    assert efficientnet.squeezed(block_input=40, inner=240, output=40) == 10
    tresnet_basic = SESpec(ratio=0.25, of="output", floor=64, rounding="down")
    assert tresnet_basic.squeezed(block_input=64, inner=64, output=64) == 64  # max(64 / 4, 64)
    tresnet_xl_bottleneck = SESpec(ratio=0.5, of="inner", floor=64, rounding="down")
    assert tresnet_xl_bottleneck.squeezed(block_input=1, inner=332, output=1) == 166
    seresnext = SESpec(ratio=1 / 16, of="output", divisor=8)
    assert seresnext.squeezed(block_input=1, inner=1, output=256) == 16
