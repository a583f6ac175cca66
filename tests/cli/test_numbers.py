"""Every numeric option of every command: no number, and one beyond the bounds, is one line and exit code 2."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer

from convscale.cli import app as cli
from convscale.cli.app import app

COLUMNS = 120
BAD: dict[type, tuple[str, ...]] = {
    int: ("99999999999999999999", "2147483648", "nan", ""),
    float: ("99999999999999999999", "nan", "inf", ""),
}
WORSE: dict[type, tuple[str, ...]] = {
    int: ("9" * 5000, "-99999999999999999999", "inf", "1.5", "x"),
    float: ("9" * 5000, "-nan", "-inf", "1e999", "x"),
}
"""Of one option of each kind."""


def kind_of(annotation: object) -> type | None:
    """``int`` or ``float``, where an option takes one or several of it."""
    if typing.get_origin(annotation) is typing.Annotated:
        return kind_of(typing.get_args(annotation)[0])
    if annotation in (int, float):
        assert isinstance(annotation, type)
        return annotation
    return next((kind for each in typing.get_args(annotation) if (kind := kind_of(each))), None)


def numeric_options() -> Iterator[tuple[str, str, type, tuple[str, ...]]]:
    """Of each numeric option that there is: command, option, kind, and what the command needs beside it."""
    group = typer.main.get_command(app)
    for info in app.registered_commands:
        assert info.callback is not None
        name = info.name or info.callback.__name__
        hints = typing.get_type_hints(info.callback, include_extras=True)
        needs: list[str] = []
        options: list[tuple[str, type]] = []
        for parameter in group.commands[name].params:  # pyright: ignore[reportAttributeAccessIssue]
            option = max(parameter.opts, key=len)
            if parameter.required:
                needs += [option, "x"] if option.startswith("-") else ["x"]
            elif option.startswith("-") and (kind := kind_of(hints.get(parameter.name))) is not None:
                options.append((option, kind))
        assert set(inspect.signature(info.callback).parameters) <= set(hints)
        yield from ((name, option, kind, tuple(needs)) for option, kind in options)


OPTIONS = list(numeric_options())
GROUP = typer.main.get_command(app)
"""Made once: to make it anew for each call takes most of the time."""


@pytest.fixture(autouse=True)
def _made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "app", GROUP)


def test_the_walk_finds_what_there_is() -> None:
    """Some by hand, of both kinds, in several commands."""
    assert {
        ("train", "--lr", float),
        ("train", "--epochs", int),
        ("measure", "--threads", int),
        ("measure", "--batch-size", int),
        ("fit", "--min-throughput", float),
        ("classify", "--top", int),
        ("scale", "--phi", float),
    } <= {each[:3] for each in OPTIONS}
    assert len(OPTIONS) > 50


@pytest.mark.parametrize(("command", "option", "kind", "needs"), OPTIONS, ids=lambda value: str(value))
def test_what_is_no_number_within_bounds_is_one_line(
    call: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    option: str,
    kind: type,
    needs: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    more = WORSE[kind] if command == "scale" else ()
    for value in BAD[kind] + more + (("1025",) if option in ("--threads", "--workers") else ()):
        code, out, err = call(command, *needs, f"{option}={value}")
        assert (code, out) == (2, ""), (value, err)
        assert err.startswith("convscale: "), (value, err)
        assert option in err, (value, err)
        assert err.count("\n") == 1
        assert len(err) < 400
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("train",), "convscale: Missing option '--"),
        (("train", "--nothing"), "convscale: No such option: --nothing"),
        (("nothing",), "convscale: No such command 'nothing'"),
        (("scale", "resnet18", "--phi", "x"), "convscale: Invalid value for '--phi'"),
    ],
)
def test_a_command_line_that_can_not_be_read_is_one_line(
    call: Callable[..., tuple[int, str, str]], args: tuple[str, ...], said: str
) -> None:
    code, out, err = call(*args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert "--help` shows all)" in err


def test_no_command_at_all_is_help(call: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = call()
    assert code == 2
    assert "Pick, scale, train and ship image ConvNets" in out + err


def test_numbers_within_bounds_are_let_through(call: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = call("scale", "resnet18", "--width", "0.5", "--divisor", "8", "--json")
    assert code == 0
    assert '"name": "resnet18-w0.5"' in out
