"""What a user of convscale can name: parameters of public names, options of commands, keys of ``--json``.

Written down once with old code (``tools/make_old_files.py``).
``tests/test_surface.py`` compares it with the present code.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import cast
from unittest import mock

import click
import typer

Json = Mapping[str, "Json"] | list["Json"] | str | int | float | bool | None
Facts = dict[str, str | bool | int | list[str]]
"""What is told of one parameter or option."""

OPEN_KEYS = ("versions", "unsupported", "forms", "coefficients")
"""Objects whose keys are data (names of installed libraries, operators, files): their keys are written as ``*``."""


def public_names() -> dict[str, dict[str, dict[str, Facts]]]:
    """Public name -> its own parameters, and for a class its members' (none for what is no function)."""
    import convscale

    names: dict[str, dict[str, dict[str, Facts]]] = {}
    for name in convscale.__all__:
        value = getattr(convscale, name)
        if callable(value):
            members = {member: parameters(getattr(value, member)) for member in _members(value)}
            names[name] = {
                "parameters": parameters(value),
                **{f".{member}": facts for member, facts in members.items()},
            }
        else:
            names[name] = {}
    return names


def parameters(value: object) -> dict[str, Facts]:
    """Parameter -> its kind and whether it may be left out; empty for what can not be called."""
    if not callable(value):
        return {}
    try:
        signature = inspect.signature(value)
    except ValueError:  # some built-in classes have none
        return {}
    return {
        name: {"kind": parameter.kind.name, "has_default": parameter.default is not parameter.empty}
        for name, parameter in signature.parameters.items()
        if name != "self"
    }


def _members(value: object) -> list[str]:
    """Public attributes of a class that convscale gave it."""
    if not inspect.isclass(value):
        return []
    own = {name for base in value.__mro__ if base.__module__.startswith("convscale") for name in vars(base)}
    return sorted(name for name in own if not name.startswith("_"))


def command_options() -> dict[str, dict[str, Facts]]:
    """Command -> option string (or an argument's name) -> whether it is required, a flag, repeatable."""
    group = _command_group()
    context = click.Context(group)
    options: dict[str, dict[str, Facts]] = {"": _options(group)}
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None, name
        options[name] = _options(command)
    return options


def _command_group() -> click.Group:
    """The app that ``convscale`` runs, wherever it is defined."""
    from convscale.cli.app import main

    apps: list[typer.Typer] = []
    with (
        mock.patch.object(typer.Typer, "__call__", lambda app, *_, **__: apps.append(app)),
        contextlib.suppress(SystemExit),  # of a command that is done
    ):
        main()
    return cast(click.Group, typer.main.get_command(apps[0]))


def _options(command: click.Command) -> dict[str, Facts]:
    options: dict[str, Facts] = {}
    for parameter in command.params:
        flag = bool(getattr(parameter, "is_flag", False))
        facts: Facts = {
            "required": parameter.required,
            "flag": flag,
            "repeatable": parameter.multiple or parameter.nargs == -1,
        }
        names = parameter.opts if parameter.param_type_name == "option" else [str(parameter.name)]
        options |= dict.fromkeys((*names, *parameter.secondary_opts), facts)
    return options


def key_paths(value: Json) -> list[str]:
    """Every path to a value: ``a.b`` for objects, ``a[]`` for what lists hold, all items merged."""
    return sorted(set(_paths(value, "")))


def _paths(value: Json, prefix: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        is_open = prefix.rpartition(".")[2] in OPEN_KEYS
        for key, item in value.items():
            path = f"{prefix}.{'*' if is_open else key}".lstrip(".")
            yield path
            yield from _paths(item, path)
    elif isinstance(value, list):
        for item in value:
            yield f"{prefix}[]"
            yield from _paths(item, f"{prefix}[]")
