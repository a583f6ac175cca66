"""Frozen dataclasses to plain JSON values and back, checked against their annotations."""

from __future__ import annotations

import math
import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal

from convscale.errors import UserError, nearest


def require(ok: bool, field_name: str, value: object, right: str) -> None:
    """Raise UserError naming the field, its value and what would be right, unless ``ok``."""
    if not ok:
        raise UserError(f"{field_name} is {value!r}; it must be {right}")


def to_plain(value: Any) -> Any:
    """A dataclass (or a part of one) as JSON values; fields at their default are left out."""
    if is_dataclass(value) and not isinstance(value, type):
        out = {}
        for f in fields(value):
            item = getattr(value, f.name)
            if f.default is not MISSING and item == f.default and type(item) is type(f.default):
                continue
            out[f.name] = to_plain(item)
        return out
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    return value


@cache
def field_types(cls: type) -> dict[str, Any]:
    """Field name -> resolved annotation."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def check_type(where: str, value: Any, annotation: Any) -> None:
    """Raise UserError when ``value`` does not fit ``annotation``; ``where`` names it in the message."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        require(value in args, where, value, f"one of {', '.join(map(str, args))}")
    elif origin in (typing.Union, types.UnionType):
        if value is not None:
            check_type(where, value, next(a for a in args if a is not type(None)))
        else:
            require(type(None) in args, where, value, "set")
    elif origin is tuple:
        require(isinstance(value, tuple), where, value, "a list")
        for i, item in enumerate(value):
            check_type(f"{where}[{i}]", item, args[0])
    elif annotation is float:
        require(
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value),
            where,
            value,
            "a finite number",
        )
    elif annotation is int:
        require(isinstance(value, int) and not isinstance(value, bool), where, value, "a whole number")
    elif annotation is bool:
        require(isinstance(value, bool), where, value, "true or false")
    else:
        require(isinstance(value, annotation), where, value, f"a {annotation.__name__}")


def from_plain(annotation: Any, value: Any, where: str) -> Any:
    """The inverse of ``to_plain`` for a value of type ``annotation``; UserError on unknown or missing fields."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else from_plain(next(a for a in args if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where} is {value!r}; it must be a list")
        return tuple(from_plain(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if not is_dataclass(annotation):
        return value
    if not isinstance(value, dict):
        raise UserError(f"{where} is {value!r}; it must be a mapping of fields")
    assert isinstance(annotation, type)
    hints = field_types(annotation)
    for key in value:
        if key not in hints:
            raise UserError(f"{where} has an unknown field {key!r}{nearest(str(key), hints)}")
    for f in fields(annotation):
        if f.default is MISSING and f.default_factory is MISSING and f.name not in value:
            raise UserError(f"{where} lacks the field {f.name!r}")
    return annotation(**{key: from_plain(hints[key], item, f"{where}.{key}") for key, item in value.items()})
