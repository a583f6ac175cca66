"""Frozen dataclasses to plain JSON values and back, checked against their annotations."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Literal

from convscale.errors import MOST_WHOLE, UserError, nearest


def require(ok: bool, field_name: str, value: object, right: str) -> None:
    """Raise UserError naming the field, its value and what would be right, unless ``ok``."""
    if not ok:
        raise UserError(f"{field_name} is {value!r}; it must be {right}")


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
        for i, item in enumerate(typing.cast("tuple[object, ...]", value)):
            check_type(f"{where}[{i}]", item, args[0])
    elif annotation is float:
        require(number and math.isfinite(typing.cast(float, value)), where, value, "a finite number")
    elif annotation is int:
        whole = number and isinstance(value, int)
        require(whole, where, value, "a whole number")
        require(typing.cast(int, value) <= MOST_WHOLE, where, value, f"at most {MOST_WHOLE}")
    elif annotation is bool:
        require(isinstance(value, bool), where, value, "true or false")
    else:
        assert isinstance(annotation, type)
        require(isinstance(value, annotation), where, value, f"a {annotation.__name__}")


def from_plain(annotation: object, value: object, where: str) -> object:
    """The inverse of ``to_plain`` for a value of type ``annotation``; UserError on unknown or missing fields."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else from_plain(_not_none(args), value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where} is {value!r}; it must be a list")
        return tuple(from_plain(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if not isinstance(annotation, type) or not is_dataclass(annotation):
        return value
    if not isinstance(value, Mapping):
        raise UserError(f"{where} is {value!r}; it must be a mapping of fields")
    hints = field_types(annotation)
    for key in value:
        if key not in hints:
            raise UserError(f"{where} has an unknown field {key!r}{nearest(str(key), hints)}")
    for f in fields(annotation):
        if f.default is MISSING and f.default_factory is MISSING and f.name not in value:
            raise UserError(f"{where} lacks the field {f.name!r}")
    return annotation(**{key: from_plain(hints[key], item, f"{where}.{key}") for key, item in value.items()})


def _not_none(options: tuple[object, ...]) -> object:
    """The other half of ``X | None``."""
    return next(option for option in options if option is not type(None))
