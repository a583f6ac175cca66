"""JSON to frozen dataclasses, leniently: what a record lacks takes its default, what it has beside is left alone."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from typing import ClassVar, TypeVar

from convscale.errors import UserError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Open:
    """A part of a record that keeps what it does not know: another version's keys survive being read and written."""

    extra: Mapping[str, object] = dataclasses.field(default_factory=dict)
    """Keys without a field."""
    omitted: ClassVar[tuple[str, ...]] = ()
    """Fields that are written only once they have a value."""


@cache
def _fields(cls: type) -> dict[str, object]:
    """Field name -> resolved annotation."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def from_json(cls: type[T], value: object, where: str) -> T:
    """A dataclass from JSON values. Null is the default where there is one; unknown keys go into ``extra`` (``Open``),
    or are left out.

    Args:
        cls: a dataclass of plain values, tuples, mappings with text keys and other dataclasses.
        value: what ``json.loads`` gave.
        where: names the value in messages: a file, then keys.

    Raises:
        UserError: a value of the wrong kind, or a field without default that is missing; the message names it.
    """
    if not isinstance(value, Mapping):
        raise UserError(f"{where} is {_short(value)}; it must be an object")
    made: dict[str, object] = {}
    if issubclass(cls, Open):
        made["extra"] = {str(key): item for key, item in value.items() if key not in _fields(cls)}
    for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
        if field.name in made:
            continue
        item = value.get(field.name)
        optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if item is None and optional:
            continue
        if item is None:
            raise UserError(f"{where} lacks {field.name!r}")
        made[field.name] = _convert(_fields(cls)[field.name], item, f"{where}.{field.name}")
    return cls(**made)  # pyright: ignore[reportArgumentType]


def _convert(annotation: object, value: object, where: str) -> object:
    """``value`` as the annotation wants it."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        kinds = [kind for kind in args if kind is not type(None)]
        return None if value is None else _convert(kinds[0], value, where) if len(kinds) == 1 else value
    if origin is tuple or annotation is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise UserError(f"{where} is {_short(value)}; it must be a list")
        kinds = args[:1] if args[-1:] == (Ellipsis,) else ()
        if not kinds and len(value) != len(args):
            raise UserError(f"{where} is {_short(value)}; it must be a list of {len(args)}")
        wanted = zip([kinds[0]] * len(value) if kinds else args, value, strict=True)
        return tuple(_convert(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(wanted))
    if origin is Mapping or annotation is Mapping:
        if not isinstance(value, Mapping):
            raise UserError(f"{where} is {_short(value)}; it must be an object")
        there = ((key, item) for key, item in value.items() if item is not None)
        return {str(key): _convert(args[1], item, f"{where}.{key}") for key, item in there}
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return from_json(annotation, value, where)
    return _plain(annotation, value, where)


_WORDS = {str: "text", bool: "true or false", int: "a whole number", float: "a finite number"}


def _plain(annotation: object, value: object, where: str) -> object:
    """A text, a number or a truth value; anything where the annotation is ``object``."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is float and number and math.isfinite(value):  # pyright: ignore[reportArgumentType]
        return float(value)  # pyright: ignore[reportArgumentType]
    if annotation is int and number and float(value).is_integer():  # pyright: ignore[reportArgumentType]
        return int(value)  # pyright: ignore[reportArgumentType, reportCallIssue]
    if annotation is object or (annotation in (str, bool) and isinstance(value, annotation)):  # pyright: ignore[reportArgumentType]
        return value
    raise UserError(f"{where} is {_short(value)}; it must be {_WORDS.get(annotation, annotation)}")  # pyright: ignore[reportArgumentType, reportCallIssue]


def to_json(value: object) -> object:
    """Dataclasses, tuples and mappings as JSON values, every field written that ``omitted`` does not name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.name != "extra"}
        if isinstance(value, Open):
            items = {name: item for name, item in items.items() if item is not None or name not in value.omitted}
            items |= value.extra
        return {name: to_json(item) for name, item in items.items()}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    return value


def _short(value: object) -> str:
    """At most some forty characters of it."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
