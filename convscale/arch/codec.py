"""Frozen dataclasses to plain JSON values and back, checked against their annotations."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Literal

from convscale.arch.bounds import MOST_ITEMS, MOST_NODES, check_cost, most_of
from convscale.errors import MOST_WHOLE, UserError, nearest, short
from convscale.read import Limits, check_plain

_LIMITS = Limits(nodes=MOST_NODES)
"""Of a spec that is read."""


def require(ok: bool, field_name: str, value: object, right: str) -> None:
    """Raise UserError naming the field, its value and what would be right, unless ``ok``."""
    if not ok:
        raise UserError(f"{field_name} is {short(value)}; it must be {right}")


def to_plain(value: object) -> dict[str, object]:
    """A dataclass as JSON values; fields at their default are left out."""
    assert is_dataclass(value)
    plain = {}
    for f in fields(value):
        item = getattr(value, f.name)
        if f.default is not MISSING and item == f.default and type(item) is type(f.default):
            continue
        plain[f.name] = _item_to_plain(item)
    return plain


def _item_to_plain(value: object) -> object:
    if is_dataclass(value):
        return to_plain(value)
    return [_item_to_plain(item) for item in value] if isinstance(value, tuple) else value


@cache
def field_types(cls: type) -> dict[str, object]:
    """Field name -> resolved annotation."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def check_type(where: str, value: object, annotation: object) -> None:
    """Raise UserError when ``value`` does not fit ``annotation``; ``where`` names it in the message."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if origin is Literal:
        require(value in args, where, value, f"one of {', '.join(map(str, args))}")
    elif origin in (typing.Union, types.UnionType):
        if value is not None:
            check_type(where, value, _not_none(args))
        else:
            require(type(None) in args, where, value, "set")
    elif origin is tuple:
        require(isinstance(value, tuple), where, value, "a list")
        items = typing.cast("tuple[object, ...]", value)
        require(len(items) <= MOST_ITEMS, where, value, f"a list of at most {MOST_ITEMS}")
        for i, item in enumerate(items):
            check_type(f"{where}[{i}]", item, args[0])
        if where == "NetSpec.stages":
            check_cost(typing.cast(typing.Any, value))
    elif annotation is float:
        require(number and _is_finite(typing.cast(float, value)), where, value, "a finite number")
        require(typing.cast(float, value) <= most_of(where), where, value, f"at most {most_of(where)}")
    elif annotation is int:
        whole = number and isinstance(value, int)
        require(whole, where, value, "a whole number")
        require(-MOST_WHOLE <= typing.cast(int, value) <= most_of(where), where, value, f"at most {most_of(where)}")
    elif annotation is bool:
        require(isinstance(value, bool), where, value, "true or false")
    else:
        assert isinstance(annotation, type)
        require(isinstance(value, annotation), where, value, f"a {annotation.__name__}")


def from_plain(annotation: object, value: object, where: str) -> object:
    """The inverse of ``to_plain`` for a value of type ``annotation``; UserError on unknown or missing fields, and on
    more values, or deeper ones, than any spec has.
    """
    check_plain(value, where, _LIMITS)
    return _from_plain(annotation, value, where)


def _from_plain(annotation: object, value: object, where: str) -> object:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _from_plain(_not_none(args), value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where} is {short(value)}; it must be a list")
        return tuple(_from_plain(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if not isinstance(annotation, type) or not is_dataclass(annotation):
        return value
    if not isinstance(value, Mapping):
        raise UserError(f"{where} is {short(value)}; it must be a mapping of fields")
    hints = field_types(annotation)
    for key in value:
        if key not in hints:
            raise UserError(f"{where} has an unknown field {key!r}{nearest(str(key), hints)}")
    for f in fields(annotation):
        if f.default is MISSING and f.default_factory is MISSING and f.name not in value:
            raise UserError(f"{where} lacks the field {f.name!r}")
    return annotation(**{key: _from_plain(hints[key], item, f"{where}.{key}") for key, item in value.items()})


def _is_finite(value: float) -> bool:
    """Whether a number is finite; a whole one beyond what a float can hold counts as infinite."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _not_none(options: tuple[object, ...]) -> object:
    """The other half of ``X | None``."""
    return next(option for option in options if option is not type(None))
