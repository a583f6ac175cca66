"""The one door for JSON, YAML and safetensors: whatever the bytes are, there is a plain value or one line that says why
not.

Bounded are a file's size, the depth of its nesting, the number of its values (those that an alias of YAML stands for
are counted each time) and the digits of its numbers. Only regular files are opened, so none can wait for ever.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from tokenize import TokenError
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, TypeAlias

from convscale.errors import UserError, first_line

if TYPE_CHECKING:
    from yaml.nodes import MappingNode, Node, ScalarNode


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a file may hold at most."""

    size: int = 64 * 2**20
    """Bytes."""
    depth: int = 64
    """Lists and objects inside each other."""
    nodes: int = 2_000_000
    """Values, those of lists and objects and they themselves."""
    digits: int = 40
    """Of a whole number."""
    finite: bool = True
    """Whether NaN and infinity, which JSON has no word for, are refused."""
    surrogates: bool = False
    """Whether texts may hold the halves of characters that stand for bytes of a file's name."""


USUAL = Limits()
"""Of JSON."""
YAML = Limits(size=2**20, nodes=50_000)
"""Of YAML, which people write by hand and which takes long to read."""
OWN = Limits(surrogates=True)
"""Of our own records: files have names of any bytes, and a record that names one must be read again."""
TRUSTED_NUMBERS = Limits(finite=False, surrogates=True)
"""Of what a training keeps of itself, in which a loss may be infinite."""
LINES = Limits(size=512 * 2**20)
"""Of a file of lines, each of which is read by itself."""
_HEADER = Limits(size=16 * 2**20, depth=4, nodes=1_000_000)
_ALL_DIMENSIONS, _MOST_ELEMENTS = 8, 2**48
NO_NPY = (OSError, EOFError, ValueError, SyntaxError, TokenError, TypeError, OverflowError, RecursionError, MemoryError)
"""What NumPy raises of a .npy file that is none: it reads a header that is no literal as Python's source once more."""
_BYTES_OF = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}
"""Bytes of an element by the name that safetensors has for its kind."""


# ---------------------------------------------------------------- bytes and text


@contextmanager
def _regular(path: str | os.PathLike[str], where: str) -> Iterator[BinaryIO]:
    """A regular file, open. A pipe is opened too, without waiting for who writes into it, and closed at once."""
    fd = -1
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
            raise UserError(f"{where} can not be read: it is {kind}, not a file")
        with open(fd, "rb", closefd=False) as file:
            yield file
    except OSError as error:
        raise UserError(f"{where} can not be read: {_why(error)}") from error
    except UserError:
        raise
    except ValueError as error:  # a path with a zero in it
        raise UserError(f"{where} can not be read: {_why(error)}") from error
    finally:
        if fd >= 0:
            os.close(fd)


def read_bytes(path: str | os.PathLike[str], what: str, limits: Limits = USUAL) -> bytes:
    """All of a regular file.

    Args:
        path: the file.
        what: what it is, for messages: they begin with it and the path.
        limits: its ``size`` counts.

    Raises:
        UserError: it is not there, no regular file, too large, or can not be read.
    """
    with _regular(path, f"{what} {_shown(path)}") as file:
        about = os.fstat(file.fileno())
        if about.st_size > limits.size:
            raise UserError(
                f"{what} {_shown(path)} has {about.st_size:,} bytes; at most {limits.size:,} are read of such a file"
            )
        data = file.read(limits.size + 1)
    if len(data) > limits.size:
        raise UserError(f"{what} {_shown(path)} grows while it is read; at most {limits.size:,} bytes are read of it")
    return data


def read_text(path: str | os.PathLike[str], what: str, limits: Limits = USUAL) -> str:
    """All of a regular file as UTF-8, a mark of the byte order left out; raises as :func:`read_bytes` does."""
    try:
        return read_bytes(path, what, limits).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {_shown(path)} is no text in UTF-8: {error.reason} at byte {error.start}") from None


# ---------------------------------------------------------------- JSON


def read_json(path: str | os.PathLike[str], what: str, limits: Limits = USUAL) -> Any:
    """The value in a JSON file; raises as :func:`read_text` and :func:`json_of` do."""
    return json_of(read_text(path, what, limits), f"{what} {_shown(path)}", limits)


def read_json_lines(
    path: str | os.PathLike[str], what: str, limits: Limits = LINES, *, torn: Callable[[str], object] | None = None
) -> Iterator[tuple[int, Any]]:
    """Number (from 1) and value of each line of our own that is not blank.

    Args:
        path, what, limits: as for :func:`read_json`, which raises what this does.
        torn: is told of an object that was only begun, as whoever was killed while writing leaves it, and the line is
            passed over; None: it is refused.
    """
    for number, line in enumerate(read_text(path, what, limits).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json_of(line, f"{what} {_shown(path)}, line {number}", OWN)
        except UserError as error:
            if not _is_torn(line):
                raise
            if torn is None:
                raise UserError(f"{error}; it was only begun: remove that line") from None
            torn(f"{error}; it was only begun and is passed over")
            continue
        yield number, value


_IN_QUOTES = re.compile(r'"(?:[^"\\]|\\.)*"?')


def _is_torn(line: str) -> bool:
    """Whether a line is the beginning of one object, or nothing but zeros, as a power cut leaves them."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        bare = _IN_QUOTES.sub("", line)
        is_open = sum(map(bare.count, "{[")) > sum(map(bare.count, "}]"))
        return (line.startswith("{") and is_open and error.msg != "Extra data") or not line.strip("\0")
    except (ValueError, RecursionError):
        return False
    return False


def json_of(text: str | bytes, where: str, limits: Limits = USUAL) -> Any:
    """The value that a JSON text says.

    Args:
        text: the text; bytes are UTF-8.
        where: what it is, for messages: they begin with it.
        limits: what it may hold.

    Raises:
        UserError: it is no JSON, says a key twice, or is beyond the limits; the message names the key.
    """
    if len(text) > limits.size:
        raise UserError(f"{where} has {len(text):,} bytes; at most {limits.size:,} are read")
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        if sum(map(text.count, ",[{")) > limits.nodes:  # before they are made: each takes far more than its text
            _refuse(where, f"has more than {limits.nodes:,} values")
        value = json.loads(text, object_pairs_hook=_object, parse_int=_whole, parse_constant=float)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg}, line {error.lineno}, column {error.colno})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is no text in UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise UserError(f"{where} is nested more than {limits.depth} deep") from None
    except _Twice as error:
        raise UserError(f"{where} says the key {error.args[0]!r} twice") from None
    check_plain(value, where, limits)
    return value


_Place: TypeAlias = Any
"""Where a value stands: None for the outermost, else the place of what holds it, and its key there."""


class _Twice(Exception):
    """A key that an object says twice."""


class _TooLong:
    """A whole number of more digits than any that is meant."""


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        raise _Twice(next(key for key, _ in pairs if key in seen or seen.add(key))[:80])
    return found


def _whole(text: str) -> int | _TooLong:
    return int(text) if len(text) <= USUAL.digits else _TooLong()


def check_plain(value: object, where: str, limits: Limits = USUAL) -> None:
    """Refuse what is no plain value, or beyond the limits. A list or object that stands at several places counts at
    each.

    Raises:
        UserError: the message names the key.
    """
    waiting: list[tuple[object, int, _Place]] = [(value, 0, None)]
    count = 0
    while waiting:
        item, depth, place = waiting.pop()
        count += 1
        if count > limits.nodes:
            _refuse(where, f"has more than {limits.nodes:,} values", place)
        if isinstance(item, (dict, list, tuple)):
            if depth >= limits.depth:
                _refuse(where, f"is nested more than {limits.depth} deep", place)
            if isinstance(item, dict):
                for key in item:
                    if not isinstance(key, str):
                        _refuse(where, f"has the key {key!r}, which is no text", place)
                    _check_text(key, where, place, limits)
            pairs = item.items() if isinstance(item, dict) else enumerate(item)
            waiting.extend((below, depth + 1, (place, key)) for key, below in pairs)
        elif isinstance(item, str):
            _check_text(item, where, place, limits)
        elif isinstance(item, float):
            if limits.finite and not math.isfinite(item):
                _refuse(where, f"has {item}, which is no finite number", place)
        elif isinstance(item, _TooLong) or (isinstance(item, int) and item.bit_length() > 4 * limits.digits):
            _refuse(where, f"has a whole number of more than {limits.digits} digits", place)
        elif item is not None and not isinstance(item, (bool, int)):
            _refuse(where, f"has a {type(item).__name__}, which is no plain value", place)


def _check_text(text: str, where: str, place: _Place, limits: Limits) -> None:
    if not text.isascii() and not limits.surrogates and re.search("[\ud800-\udfff]", text):
        _refuse(where, "has half a character", place)


def _refuse(where: str, what: str, place: _Place = None) -> NoReturn:
    keys: list[str] = []
    while place is not None:
        place, key = place
        keys.append(f"[{key}]" if isinstance(key, int) else f".{ascii(key)[1:-1][:80]}")
    at = f" at {''.join(reversed(keys)).removeprefix('.')}" if keys else ""
    raise UserError(f"{where} {what}{at if len(at) < 120 else at[:120] + '...'}")


# ---------------------------------------------------------------- YAML


def read_yaml(path: str | os.PathLike[str], what: str, limits: Limits = YAML) -> Any:
    """The value in a YAML file; raises as :func:`read_text` and :func:`yaml_of` do."""
    return yaml_of(read_text(path, what, limits), f"{what} {_shown(path)}", limits)


def yaml_of(text: str, where: str, limits: Limits = YAML) -> Any:
    """The value that a YAML text says, of the kinds that JSON has.

    Keys are the text that is written (``1``, ``on`` and ``2024-01-01`` too). A date is text, and so is a number that is
    written with a leading zero, in another base or with colons: what YAML 1.1 makes of those is rarely meant.

    Raises:
        UserError: it is no YAML, has a tag of other than plain values, says a key twice, or is beyond the limits.
    """
    import yaml

    if len(text) > limits.size:
        raise UserError(f"{where} has {len(text):,} characters; at most {limits.size:,} are read")
    try:
        node = _composer(limits)(text).get_single_node()
    except UserError as error:
        raise UserError(f"{where} {error}") from None
    except yaml.MarkedYAMLError as error:
        at = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where} is no valid YAML: {error.problem or error.context}{at}") from None
    except (yaml.YAMLError, RecursionError, ValueError, IndexError) as error:
        raise UserError(f"{where} is no valid YAML: {first_line(error)}") from None
    if node is None:
        return None
    value = _Plain(where, limits).value(node, None, 0)
    check_plain(value, where, limits)
    return value


@cache
def _composer(limits: Limits) -> Callable[[str], Any]:
    """YAML's own reader up to its nodes, which stops beyond the limits. Nothing is constructed."""
    from yaml.composer import Composer
    from yaml.parser import Parser
    from yaml.reader import Reader
    from yaml.resolver import Resolver
    from yaml.scanner import Scanner

    class Bounded(Reader, Scanner, Parser, Composer, Resolver):
        depth = nodes = 0

        def __init__(self, text: str) -> None:
            Reader.__init__(self, text)
            for part in (Scanner, Parser, Composer, Resolver):
                part.__init__(self)

        def compose_node(self, parent: Node | None, index: object) -> Node | None:
            """One node and what is below it."""
            self.depth, self.nodes = self.depth + 1, self.nodes + 1
            if self.depth > limits.depth + 1:
                raise UserError(f"is nested more than {limits.depth} deep")
            if self.nodes > limits.nodes:
                raise UserError(f"has more than {limits.nodes:,} values")
            node = Composer.compose_node(self, parent, index)  # pyright: ignore[reportArgumentType]
            self.depth -= 1
            return node

    return Bounded


_TAG = "tag:yaml.org,2002:"
_TRUTH = {**dict.fromkeys(("yes", "true", "on"), True), **dict.fromkeys(("no", "false", "off"), False)}
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+][0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|nan)", re.I)


class _Plain:
    """Nodes to values; what an alias stands for is counted each time."""

    def __init__(self, where: str, limits: Limits) -> None:
        self.where, self.limits, self.count = where, limits, 0

    def value(self, node: Node, place: _Place, depth: int) -> Any:
        """Of a node and all below it."""
        from yaml.nodes import MappingNode, ScalarNode

        self.count += 1
        if self.count > self.limits.nodes:
            _refuse(self.where, f"has more than {self.limits.nodes:,} values, with what its aliases stand for", place)
        if depth > self.limits.depth:
            _refuse(self.where, f"is nested more than {self.limits.depth} deep", place)
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, ScalarNode):
            return self._scalar(node, kind, place)
        if kind != ("map" if isinstance(node, MappingNode) else "seq"):
            _refuse(self.where, f"has the tag {node.tag[:80]!r}, which is of no plain value", place)
        if isinstance(node, MappingNode):
            return self._mapping(node, place, depth)
        return [self.value(item, (place, i), depth + 1) for i, item in enumerate(node.value)]

    def _mapping(self, node: MappingNode, place: _Place, depth: int) -> dict[str, Any]:
        """What ``<<`` merges in stands below what the mapping says itself."""
        from yaml.nodes import ScalarNode

        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for key_node, item in node.value:
            if not isinstance(key_node, ScalarNode):
                _refuse(self.where, f"has a key that is no text, line {key_node.start_mark.line + 1}", place)
            key = str(key_node.value)
            if key_node.tag == f"{_TAG}merge":
                found = self.value(item, (place, key), depth + 1)
                for each in reversed(found if isinstance(found, list) else [found]):
                    if not isinstance(each, dict):
                        _refuse(self.where, "merges in something that is no mapping", (place, key))
                    merged |= each
                continue
            if key in own:
                _refuse(self.where, f"says the key {key[:80]!r} twice", place)
            own[key] = self.value(item, (place, key), depth + 1)
        return {**merged, **own}

    def _scalar(self, node: ScalarNode, kind: str, place: _Place) -> Any:
        text = str(node.value)
        if kind in ("str", "timestamp", "value", "merge"):
            return text
        if kind == "null":
            return None
        if kind == "bool" and text.lower() in _TRUTH:
            return _TRUTH[text.lower()]
        if kind == "int":
            if not _WHOLE.fullmatch(text):
                return text
            if len(text) > self.limits.digits:
                _refuse(self.where, f"has a whole number of more than {self.limits.digits} digits", place)
            return int(text.replace("_", ""))
        if kind == "float":
            if _NOT_FINITE.fullmatch(text):
                return float(text.replace(".", "", 1))
            return float(text.replace("_", "")) if _FLOAT.fullmatch(text) else text
        _refuse(self.where, f"has the tag {node.tag[:80]!r}, which is of no plain value", place)


# ---------------------------------------------------------------- safetensors


def check_tensors(path: str | os.PathLike[str], what: str) -> None:
    """Refuse a safetensors file whose header is damaged, or whose tensors are not just what stands behind it, before a
    library opens it.

    Raises:
        UserError: the message names the file and the tensor.
    """
    where = f"{what} {_shown(path)}"
    with _regular(path, where) as file:
        about = os.fstat(file.fileno())
        length = int.from_bytes(file.read(8), "little")
        if about.st_size < 10 or not 2 <= length <= min(_HEADER.size, about.st_size - 8):
            raise UserError(f"{where} is no safetensors file: it has no header, or is cut short")
        header = json_of(file.read(length), f"{where}, header", _HEADER)
    if not isinstance(header, dict):
        raise UserError(f"{where} is no safetensors file: its header is no object")
    spans = sorted(_span(where, name, entry) for name, entry in header.items() if name != "__metadata__")
    end = 0
    for start, stop, name in spans:
        if start != end:
            raise UserError(f"{where} is damaged: tensor {name!r} begins at byte {start}, not at {end}")
        end = stop
    if end != about.st_size - 8 - length:
        raise UserError(f"{where} is damaged: its tensors have {end:,} bytes, {about.st_size - 8 - length:,} are there")


def _span(where: str, name: str, entry: object) -> tuple[int, int, str]:
    """Where a tensor's bytes begin and end, and its name."""
    if not isinstance(entry, dict):
        raise UserError(f"{where} is damaged: tensor {name[:80]!r} is no object")
    kind, shape, span = entry.get("dtype"), _counts(entry.get("shape")), _counts(entry.get("data_offsets"))
    if not isinstance(kind, str) or kind not in _BYTES_OF:
        raise UserError(f"{where} is damaged: tensor {name[:80]!r} is of the unknown kind {str(kind)[:40]!r}")
    if shape is None or span is None or len(shape) > _ALL_DIMENSIONS or len(span) != 2:
        raise UserError(f"{where} is damaged: tensor {name[:80]!r} has an impossible shape or place")
    if math.prod(shape) * _BYTES_OF[kind] != span[1] - span[0]:
        raise UserError(f"{where} is damaged: tensor {name[:80]!r} has other bytes than its shape takes")
    return span[0], span[1], name[:80]


def _counts(value: object) -> list[int] | None:
    """Whole numbers that can count elements or bytes of a file; None where it is something else."""
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item <= _MOST_ELEMENTS for item in value):
        return None
    return value


# ---------------------------------------------------------------- messages


def _shown(path: str | os.PathLike[str]) -> str:
    """A path in one line."""
    text = os.fspath(path)
    shown = text if text.isprintable() else ascii(text)[1:-1]
    return shown if len(shown) <= 300 else f"...{shown[-290:]}"


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def object_of(value: object, where: str) -> dict[str, Any]:
    """``value``, if it is an object of JSON; UserError if not."""
    if not isinstance(value, dict):
        raise UserError(f"{where} holds {'a list' if isinstance(value, list) else repr(value)[:40]}, not an object")
    return value
