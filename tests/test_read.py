"""The one reader of JSON, YAML and safetensors: any bytes give a plain value or one line, and soon."""

from __future__ import annotations

import ast
import json
import os
import struct
import time
from pathlib import Path

import pytest

import convscale
from convscale.arch.spec import NetSpec, load_spec
from convscale.arch.zoo import get_spec
from convscale.errors import UserError
from convscale.learn.recipes import RECIPES, get_recipe
from convscale.read import YAML, Limits, check_tensors, json_of, read_json, read_json_lines, read_yaml, yaml_of

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
"""A kilobyte whose aliases stand for 9 ** 9 values."""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": [1, NaN]}', r"has nan, which is no finite number at a\[1\]"),
        ('{"a": {"b": -Infinity}}', r"has -inf, which is no finite number at a\.b"),
        ('{"a": 1e999}', r"has inf, which is no finite number at a"),
        ('{"a": 1, "a": 2}', "says the key 'a' twice"),
        ("[" * 100_000, "is nested more than 64 deep"),
        ("[" * 65 + "]" * 65, "is nested more than 64 deep"),
        ('{"x": {"y": ' + "9" * 41 + "}}", r"has a whole number of more than 40 digits at x\.y"),
        ("9" * 10_000, "has a whole number of more than 40 digits"),
        ('{"a": "\\ud800"}', "has half a character at a"),
        (b"\xff{}", "is no text in UTF-8: invalid start byte at byte 0"),
        ("", "is not JSON"),
        ("{", "is not JSON"),
    ],
)
def test_json_beyond_its_limits_is_one_line(text: str | bytes, said: str) -> None:
    with pytest.raises(UserError, match=f"^record x {said}") as caught:
        json_of(text, "record x")
    assert "\n" not in str(caught.value)


def test_yaml_parts_the_digits_of_a_number_where_it_likes() -> None:
    """YAML 1.1 (types/int) leaves underscores out; Python takes single ones within a number alone."""
    assert yaml_of("[1_000, 1_, 1__0, -2_]", "x") == [1000, 1, 10, -2]


def test_json_within_its_limits_is_read() -> None:
    assert json_of('{"a": [1, 2.5, null, true, "\\u00e9"]}', "x") == {"a": [1, 2.5, None, True, "é"]}
    assert json_of("[" * 64 + "]" * 64, "x")
    assert json_of("9" * 40, "x") == int("9" * 40)
    assert json_of("NaN", "x", Limits(finite=False)) != 0
    with pytest.raises(UserError, match="has more than 5 values"):
        json_of("[1,2,3,4,5]", "x", Limits(nodes=5))
    assert json_of("[1,2,3,4]", "x", Limits(nodes=5)) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "has more than 50,000 values, with what its aliases stand for"),
        ("a: &a [*a]", "is nested more than 64 deep"),
        ("a: &a {b: *a}", "is nested more than 64 deep"),
        ("[" * 1000, "is nested more than 64 deep"),
        ("a: !!python/object/apply:os.system [ls]", r"has the tag .*os\.system', which is of no plain value at a"),
        ("a: !!binary eA==", r"has the tag .*binary', which is of no plain value at a"),
        ("a: !!set {b}", r"has the tag .*set', which is of no plain value at a"),
        ("a: 1\na: 2", "says the key 'a' twice"),
        ("? [a]\n: b", "has a key that is no text, line 1"),
        ("a: {b: .inf}", r"has inf, which is no finite number at a\.b"),
        (f"a: {'9' * 5000}", "has a whole number of more than 40 digits at a"),
        ("<<: [1]", "merges in something that is no mapping at <<"),
        ("--- 1\n--- 2", "is no valid YAML: but found another document, line 2"),
        ("*x", "is no valid YAML: found undefined alias 'x', line 1"),
        ("\x00", "is no valid YAML: unacceptable character"),
        ("lr: [", "is no valid YAML: .*line 1"),
    ],
)
def test_yaml_beyond_its_limits_is_one_line(text: str, said: str) -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match=f"^recipe x {said}") as caught:
        yaml_of(text, "recipe x")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 60  # a bomb takes for ever, and all memory


def test_keys_of_yaml_are_the_text_that_is_written() -> None:
    assert yaml_of("1: a\non: b\n2024-01-01: c\n0x10: d\n~: e\n1.5: f", "x") == {
        "1": "a",
        "on": "b",
        "2024-01-01": "c",
        "0x10": "d",
        "~": "e",
        "1.5": "f",
    }


def test_dates_octals_and_sixties_are_the_text_that_is_written() -> None:
    """YAML 1.1 (section 10.2, and its types int, float and timestamp) makes a date, 8 and 5400 of them."""
    assert yaml_of("[2024-01-01, 010, 1:30:00, 0x10, 0b1]", "x") == ["2024-01-01", "010", "1:30:00", "0x10", "0b1"]
    assert yaml_of("[1, -2, 1_000, 1.5, 1.0e-05, .5, true, no, null, ~, '1', \"no\"]", "x") == [
        *(1, -2, 1000, 1.5, 1e-5, 0.5, True, False, None, None, "1", "no")
    ]
    assert yaml_of("", "x") is None


def test_aliases_and_merges_within_the_limits_are_read() -> None:
    assert yaml_of("a: &a {b: 1, c: 2}\nd: {<<: *a, c: 3}\ne: *a", "x") == {
        "a": {"b": 1, "c": 2},
        "d": {"b": 1, "c": 3},
        "e": {"b": 1, "c": 2},
    }


def test_what_we_write_is_read_back() -> None:
    for name in ("tresnet_m", "efficientnet_b0", "convnext_tiny"):
        spec = get_spec(name)
        assert yaml_of(spec.to_yaml(), "x") == json.loads(spec.to_json())
    for recipe in RECIPES.values():
        assert yaml_of(recipe.to_yaml(), "x") == json.loads(json.dumps(recipe.to_dict()))


def test_only_regular_files_of_a_bounded_size_are_opened(tmp_path: Path) -> None:
    fifo = tmp_path / "pipe.json"
    os.mkfifo(fifo)  # to open it in the usual way would wait for ever
    with pytest.raises(UserError, match=r"^record .*pipe\.json can not be read: it is a pipe or a device, not a file$"):
        read_json(fifo, "record")
    with pytest.raises(UserError, match=r"can not be read: it is a folder, not a file$"):
        read_json(tmp_path, "record")
    with pytest.raises(UserError, match=r"can not be read: No such file or directory$"):
        read_json(tmp_path / "none", "record")
    with pytest.raises(UserError, match=r"can not be read: File name too long$"):
        read_json(tmp_path / ("x" * 300), "record")
    with open(tmp_path / "big.yaml", "wb") as file:
        file.truncate(YAML.size + 1)
    with pytest.raises(UserError, match=r"has 1,048,577 bytes; at most 1,048,576 are read of such a file"):
        read_yaml(tmp_path / "big.yaml", "recipe")


def test_a_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n\n{"a": NaN}\n')
    lines = read_json_lines(tmp_path / "rows.jsonl", "log")
    assert next(lines) == (1, {"a": 1})
    with pytest.raises(UserError, match=r"rows\.jsonl, line 3 has nan, which is no finite number at a"):
        next(lines)


def test_wherever_writing_stopped_the_line_was_only_begun(tmp_path: Path) -> None:
    whole, told = json.dumps({"a}": [1.5e-7, True, None, {}], 'b"{\\': {"c": "\u00e9\n", "d": [[-2], "]"]}}), []
    for length in range(1, len(whole)):
        (tmp_path / "rows.jsonl").write_text(f"{whole[:length]}\n{whole}\n")
        assert [*read_json_lines(tmp_path / "rows.jsonl", "log", torn=told.append)] == [(2, json.loads(whole))]
        assert len(told) == length


def test_a_mistake_in_a_recipe_names_file_and_key(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("lr: 2024-01-01\n")
    with pytest.raises(UserError, match=r"recipe .*mine\.yaml: recipe key lr must be a number, got '2024-01-01'"):
        get_recipe(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text("1: 2\n")
    with pytest.raises(UserError, match=r"recipe .*mine\.yaml: recipe custom has no key '1'"):
        get_recipe(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text(BOMB)
    with pytest.raises(UserError, match=r"recipe .*mine\.yaml has more than 50,000 values"):
        get_recipe(tmp_path / "mine.yaml")


# ---------------------------------------------------------------- safetensors


def tensors_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """The format: the header's length as 8 bytes, the least first; the header in JSON; the tensors' bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def tensor(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_a_whole_safetensors_file_is_let_through(tmp_path: Path) -> None:
    header = {"b": tensor(), "a": tensor("BF16", [1, 3], [8, 14]), "__metadata__": {"format": "pt"}}
    check_tensors(tensors_file(tmp_path / "a", header, bytes(14)), "weights")
    check_tensors(tensors_file(tmp_path / "b", {}), "weights")


@pytest.mark.parametrize(
    ("header", "data", "length", "said"),
    [
        ({"a": tensor()}, bytes(8), 2**60, "has no header, or is cut short"),
        ({"a": tensor()}, bytes(7), None, "its tensors have 8 bytes, 7 are there"),
        ({"a": tensor()}, bytes(9), None, "its tensors have 8 bytes, 9 are there"),
        ({"a": tensor("F33")}, bytes(8), None, "tensor 'a' is of the unknown kind 'F33'"),
        ({"a": tensor(["F32"])}, bytes(8), None, "tensor 'a' is of the unknown kind"),
        ({"a": tensor(shape=[3])}, bytes(8), None, "tensor 'a' has other bytes than its shape takes"),
        ({"a": tensor(shape=[-2])}, bytes(8), None, "tensor 'a' has an impossible shape or place"),
        ({"a": tensor(shape=[2**62, 0], offsets=[0, 0])}, b"", None, "tensor 'a' has an impossible shape or place"),
        ({"a": tensor(shape=[True, 2])}, bytes(8), None, "tensor 'a' has an impossible shape or place"),
        ({"a": tensor(offsets=[4, 12])}, bytes(12), None, "tensor 'a' begins at byte 4, not at 0"),
        ({"a": tensor(), "b": tensor()}, bytes(8), None, "tensor 'b' begins at byte 0, not at 8"),
        ({"a": 3}, b"", None, "tensor 'a' is no object"),
        ([], b"", None, "its header is no object"),
        (b'{"a": 1, "a": 1}', b"", None, "header says the key 'a' twice"),
        (b"[" * 5000, b"", None, "header is nested more than"),
    ],
)
def test_a_forged_safetensors_file_is_one_line(
    tmp_path: Path, header: object, data: bytes, length: int | None, said: str
) -> None:
    path = tensors_file(tmp_path / "x.safetensors", header, data, length)
    with pytest.raises(UserError, match=f"^weights .*x.safetensors.*{said}"):
        check_tensors(path, "weights")


# ---------------------------------------------------------------- everywhere


ELSEWHERE = {
    "arch/tags.py": "a file of the package",
    "networks/released.py": "a file of the package",
    "predictor/devices.py": "a file of the package",
    "predictor/fitted.py": "a file of the package",
    "predictor/traced.py": "a file of the package",
    "nas/engines/local.py": "what another process of the same run says",
    "choice/speeds.py": "what another process of the same run says",
    "learn/checkpoint.py": "load_file behind check_tensors",
    "nn/state_dicts.py": "load_file behind check_tensors",
    "show/page.py": "what plotly made of our own figures",
    "read.py": "the reader",
}
"""Modules that read such texts without the reader, and why they may."""
READERS = {("json", "load"), ("json", "loads"), ("yaml", "safe_load"), ("yaml", "load"), ("yaml", "safe_load_all")}


def readers_in(source: str) -> list[str]:
    """Calls of the libraries' own readers."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in READERS:
                found.append(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.Name) and node.id in ("load_file", "safe_open"):
            found.append(node.id)
    return found


def test_no_module_reads_such_files_by_itself() -> None:
    root = Path(convscale.__file__).parent
    found = {
        path.relative_to(root).as_posix() for path in root.rglob("*.py") if readers_in(path.read_text(encoding="utf-8"))
    }
    assert found <= set(ELSEWHERE)
    assert readers_in("import json\nx = json.loads(y)") == ["json.loads"]


# ---------------------------------------------------------------- specs


def spec_of(**changes: object) -> dict[str, object]:
    """A small spec as JSON values."""
    block = {"kind": "basic", "width": 8}
    return {"stem": {"widths": [8]}, "stages": [{"runs": [{"block": block, "repeat": 1}]}], **changes}


def stage(repeat: int = 1, width: int = 8, stride: int = 1, **more: object) -> dict[str, object]:
    return {"runs": [{"block": {"kind": "basic", "width": width, **more}, "repeat": repeat}], "stride": stride}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stages": [stage(repeat=100_000_000)]}, r"RunSpec\.repeat is 100000000; it must be at most 1000"),
        ({"stages": [stage(repeat=900)] * 3}, r"NetSpec\.stages have 2,700 blocks; a network may have at most 2,000"),
        ({"stages": [stage(width=2**20)]}, r"BlockSpec\.width is 1048576; it must be at most 65536"),
        ({"stages": [stage(width=40_000)]}, r"NetSpec\.stages have 1\.6e\+09 channels squared"),
        ({"stages": [stage()] * 300}, r"NetSpec\.stages is .*; it must be a list of at most 256"),
        ({"stages": [stage(width=10**5000)]}, r"has a whole number of more than 40 digits at stages\[0\]\.runs\[0\]"),
        ({"stem": {"widths": [8] * 60_000}}, r"spec has more than 50,000 values"),
        ({"stages": [stage(kernels=[99_999])]}, r"BlockSpec\.kernels\[0\] is 99999; it must be at most 127"),
        ({1: 2}, "spec has the key 1, which is no text"),
    ],
)
def test_a_spec_that_no_machine_could_build_is_refused_at_once(changes: dict[str, object], said: str) -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match=said) as caught:
        NetSpec.from_dict(spec_of() | changes)  # pyright: ignore[reportOperatorIssue]
    assert len(str(caught.value)) < 500
    assert time.monotonic() - started < 10


def test_a_spec_file_that_is_a_bomb_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bomb.yaml").write_text(BOMB)
    with pytest.raises(UserError, match=r"bomb\.yaml: spec has more than 50,000 values"):
        load_spec(tmp_path / "bomb.yaml")


def test_scaling_beyond_what_can_be_built_is_refused() -> None:
    with pytest.raises(UserError, match=r"must be at most 1000|blocks; a network may have at most 2,000"):
        convscale.scale("resnet50", phi=20, rule="depth")
    with pytest.raises(UserError, match=r"must be at most 65536|channels squared"):
        convscale.scale("resnet50", phi=20, rule="width")


def bottom(downsample: str) -> list[dict[str, object]]:
    return [stage(stride=2), stage(stride=2), stage(stride=2, downsample=downsample)]


@pytest.mark.parametrize(
    ("size", "downsample", "said"),
    [
        # Stem of stride 2 (3 -> 2 px), then 1 px, 1 px: nothing is left to reflect (PyTorch: padding < input).
        (3, "blur", r"stages\[2\] gets maps of 1 px, and its blur takes 2"),
        (3, "avgpool", r"stages\[2\] gets maps of 1 px, and its avgpool takes 2"),
        # 36 -> 18 -> 9 -> 5 px: pooled to 2 px by halves, to 3 px where a border counts (PyTorch's ceil_mode).
        (36, "avgpool", r"stages\[2\] gets maps of 5 px, which its avgpool halves"),
    ],
)
def test_a_spec_that_can_not_run_at_its_own_size_is_refused(size: int, downsample: str, said: str) -> None:
    values = spec_of(input={"size": size}, stages=bottom(downsample))
    with pytest.raises(UserError, match=f"custom can not run at its own size, {size} px: {said}"):
        NetSpec.from_dict(values)
    NetSpec.from_dict(spec_of(input={"size": 32}, stages=bottom(downsample)))  # 32 -> 16 -> 8 -> 4 -> 2 px


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"kind": "basic", "width": 12, "group_width": 3}, "groups of 3 channels do not divide 8 channels to 12"),
        ({"kind": "basic", "width": 16, "group_width": 16}, "groups of 16 channels do not divide 8 channels to 16"),
        ({"kind": "depthwise_separable", "width": 4, "kernels": [3] * 9}, "8 channels can not be split over 9 kernels"),
        ({"kind": "inverted_residual", "width": 2, "project_groups": 3}, "2 channels can not be split over 3 conv"),
    ],
)
def test_channels_that_can_not_be_split_are_refused(block: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        NetSpec.from_dict(spec_of(stages=[{"runs": [{"block": block, "repeat": 1}]}]))
