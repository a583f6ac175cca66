"""Whatever a user of convscale 0.1.0 could name is still there: parameters, options, keys of ``--json``.

More may come beside them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tools.describe_surface import command_options, key_paths, public_names

OLD = Path(__file__).parent / "old_files" / "v0_1"
SURFACE = json.loads((OLD / "surface.json").read_text(encoding="utf-8"))
COLUMNS = 200


def lost(old: dict[str, dict], new: dict[str, dict], needed: str) -> list[str]:
    """One line for each old parameter or option that is gone or changed, and for each new one that must be given.

    Args:
        old, new: name -> facts.
        needed: the fact that tells whether it must be given: ``required`` (true) or ``has_default`` (false).
    """
    lines = [f"{name} is gone" for name in old if name not in new]
    lines += [
        f"{name} was {old[name]}, is {new[name]}" for name in old if name in new and not _serves(old[name], new[name])
    ]
    needed_value = needed == "required"
    return lines + [
        f"{name} is new and must be given" for name in new if name not in old and new[name].get(needed) is needed_value
    ]


def _serves(old: dict, new: dict) -> bool:
    """Whether the new one can be given as the old one was: a parameter by name may also become one by position, and
    what had to be given may be left out.
    """
    for optional in ({"has_default": True}, {"required": False}):
        if set(optional) <= set(old) and optional.items() <= new.items():
            old = {**old, **optional}
    kinds = {old.get("kind"), new.get("kind")}
    if kinds == {"KEYWORD_ONLY", "POSITIONAL_OR_KEYWORD"} and old["kind"] == "KEYWORD_ONLY":
        return old["has_default"] == new["has_default"]
    return old == new


NAMES = public_names()


@pytest.mark.parametrize("name", sorted(SURFACE["names"]))
def test_parameters(name: str) -> None:
    assert name in NAMES
    for member, parameters in SURFACE["names"][name].items():
        assert member in NAMES[name] or member[1:] in NAMES[name]["parameters"], f"{name}{member} is gone"
        assert lost(parameters, NAMES[name].get(member, {}), "has_default") == []


@pytest.mark.parametrize("command", sorted(SURFACE["options"]))
def test_options(command: str) -> None:
    options = command_options()
    assert command in options
    assert lost(SURFACE["options"][command], options[command], "required") == []


@pytest.fixture(scope="module")
def old_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the old files that all commands work in."""
    return shutil.copytree(OLD, tmp_path_factory.mktemp("surface") / "v0_1")


@pytest.mark.parametrize("command", SURFACE["json"], ids=lambda command: " ".join(command["args"])[:60])
def test_json_keys(
    command: dict, call: Callable[..., tuple[int, str, str]], old_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(old_files)
    monkeypatch.setenv("CONVSCALE_CACHE", str(old_files.parent / "cache"))
    code, out, err = call(*command["args"], "--json")
    assert code == 0, err
    try:
        value = json.loads(out)
    except json.JSONDecodeError:
        value = [json.loads(line) for line in out.splitlines()]
    assert sorted(set(command["keys"]) - set(key_paths(value))) == []


@pytest.mark.parametrize(
    ("new", "line"),
    [
        ({}, "a is gone"),
        ({"a": {"kind": "KEYWORD_ONLY", "has_default": False}}, "a was "),
        ({"a": {"kind": "VAR_KEYWORD", "has_default": True}}, "a was "),
        (
            {"a": {"kind": "KEYWORD_ONLY", "has_default": True}, "b": {"kind": "KEYWORD_ONLY", "has_default": False}},
            "b is new and must be given",
        ),
    ],
)
def test_what_is_lost_is_found(new: dict[str, dict], line: str) -> None:
    old = {"a": {"kind": "KEYWORD_ONLY", "has_default": True}}
    (only,) = lost(old, new, "has_default")
    assert only.startswith(line)


def test_what_had_to_be_given_may_become_optional_but_not_the_other_way() -> None:
    must, may = {"kind": "KEYWORD_ONLY", "has_default": False}, {"kind": "KEYWORD_ONLY", "has_default": True}
    assert lost({"a": must}, {"a": may}, "has_default") == []
    assert len(lost({"a": may}, {"a": must}, "has_default")) == 1
    assert lost({"a": {"required": True}}, {"a": {"required": False}}, "required") == []
    assert len(lost({"a": {"required": False}}, {"a": {"required": True}}, "required")) == 1


def test_more_is_no_loss() -> None:
    old = {"a": {"kind": "KEYWORD_ONLY", "has_default": True}}
    new = {
        "a": {"kind": "POSITIONAL_OR_KEYWORD", "has_default": True},
        "b": {"kind": "KEYWORD_ONLY", "has_default": True},
    }
    assert lost(old, new, "has_default") == []


def test_keys_are_found_in_lists_and_objects() -> None:
    value = {"a": [{"b": 1}, {"c": {"d": None}}], "versions": {"torch": "1"}, "e": []}
    assert key_paths(value) == ["a", "a[]", "a[].b", "a[].c", "a[].c.d", "e", "versions", "versions.*"]
