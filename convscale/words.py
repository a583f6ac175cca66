"""Numbers in words: the one place where a number becomes text. Everything returned is plain text, not yet HTML.

And names of files and classes, which people choose: made safe for a line, a cell of CSV, or Markdown.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, ends of lines, marks that turn the direction of writing, and what is no character at all."""
_MARKDOWN = re.compile(r"[\\`*\[\]|]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
UNKNOWN = "–"
"""Stands where a record has no value."""


def number(value: float | None, digits: int = 3) -> str:
    """``digits`` significant digits, thousands parted: 2310.4 -> ``2,310``; 0.12345 -> ``0.123``."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    if value == 0:
        return "0"
    value = float(f"{value:.{digits - 1}e}")  # rounded first: 9.996 has two digits before its point then
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:,.{max(0, decimals)}f}"


def exact(value: float) -> str:
    """Four digits, or all of a larger whole number: ``0.1234``, ``12.34``, ``2,130``: what a constraint is compared
    with is not rounded to it.
    """
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"


def odds(chance: float) -> str:
    """A probability: ``97 %``; never quite certain."""
    return "over 99 %" if chance > 0.99 else "under 1 %" if chance < 0.01 else f"{100 * chance:.0f} %"


def rate(images_per_s: float | None) -> str:
    """Images/s: three digits, four from a thousand on, so that what just keeps a constraint is told from it."""
    return number(images_per_s, 4 if images_per_s is not None and images_per_s >= 1000 else 3)


def percent(share: float | None, decimals: int = 1) -> str:
    """A share of 1 as percent: 0.9231 -> ``92.3 %``. What is not all is never rounded to 100 %."""
    if share is None or not math.isfinite(share):
        return UNKNOWN
    if share == 1:
        return "100 %"
    text = f"{100 * share:.{decimals}f}"
    if share < 1 and float(text) == 100:
        text = f"{100 * share:.{decimals + 2}f}"
        if float(text) == 100:
            return f"just under {100 * share:.0f} %"
    return f"{text} %"


def interval(ends: Sequence[float] | None, decimals: int = 1) -> str:
    """The ends of an interval of a share: ``81.2 % to 90.4 %``; empty where there is none."""
    return "" if not ends or len(ends) != 2 else f"{percent(ends[0], decimals)} to {percent(ends[1], decimals)}"


def surely(ends: Sequence[float] | None, decimals: int = 1) -> str:
    """The same behind a share: `` (95 % interval 81.2 % to 90.4 %)``."""
    text = interval(ends, decimals)
    return f" (95 % interval {text})" if text else ""


def accuracy(value: float | None) -> str:
    """A published accuracy, which comes in percent: 83.09 -> ``83.09 %``."""
    return UNKNOWN if value is None else f"{value:.2f} %"


def gigabytes(nbytes: float | None) -> str:
    """Memory in units of 2**30 bytes, as cards are sold: 12345678901 -> ``11.5 GB``."""
    return UNKNOWN if nbytes is None else f"{number(nbytes / 2**30)} GB"


def count(value: float | None) -> str:
    """A whole number, thousands parted."""
    return UNKNOWN if value is None else f"{round(value):,}"


def large(value: float | None, unit: str = "") -> str:
    """With K, M or G: 1234567 -> ``1.23 M``."""
    if value is None:
        return UNKNOWN
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{number(value / size)} {letter}{unit}"
    return f"{number(value)} {unit}".rstrip()


def seconds(value: float | None) -> str:
    """A time span at the unit that suits it: 0.0034 -> ``3.4 ms``; 312 -> ``5 min 12 s``."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms")):
        if abs(value) < limit:
            return f"{number(value * factor)} {unit}"
    if value < 100:
        return f"{number(value, 2)} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def duration(seconds: float) -> str:
    """``42 s``, ``4 min 10 s`` or ``3 h 05 min``."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def device(text: str) -> str:
    """A device's name without what its maker adds to all of them: ``Intel(R) Xeon(R) Processor`` -> ``Intel Xeon``."""
    for noise in ("(R)", "(TM)", "NVIDIA ", "GeForce ", "Tesla ", " Processor"):
        text = text.replace(noise, "")
    return text


def listed(items: Iterable[str], last: str = "and") -> str:
    """``a``, ``a and b``, ``a, b and c``; ``last`` may be ``or``."""
    parts = list(items)
    return f"{', '.join(parts[:-1])} {last} {parts[-1]}" if len(parts) > 1 else "".join(parts)


def plural(n: int, one: str, many: str | None = None) -> str:
    """``1 image``, ``2 images``."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def shortened(text: str, length: int = 28) -> str:
    """At most ``length`` characters, the end kept, since variants differ there."""
    if len(text) <= length:
        return text
    tail = length // 2
    return f"{text[: length - tail - 1]}…{text[-tail:]}"


def safe(text: str) -> str:
    """One line that a terminal only shows: ends of lines, escape sequences and bytes that are no UTF-8 are written out,
    as ``\\n``, ``\\x1b`` and ``\\xe9``.
    """
    return _UNSAFE.sub(_written_out, text)


def _written_out(match: re.Match[str]) -> str:
    character = match[0]
    if character in "\n\r\t":
        return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}[character]
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file's name, as Python keeps it
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def csv_cell(text: str) -> str:
    """``safe``, and nothing that a spreadsheet takes for a formula: an apostrophe stands before ``=``, ``+``, ``-`` and
    ``@``.
    """
    line = safe(text)
    return f"'{line}" if line.startswith(("=", "+", "-", "@")) else line


def markdown(text: str) -> str:
    """``safe``, and shown by Markdown as it is written: no markup, no HTML."""
    line = _MARKDOWN.sub(lambda match: "\\" + match[0], safe(text))
    return "".join(_HTML.get(character, character) for character in line)
