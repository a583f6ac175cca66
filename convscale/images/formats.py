"""The formats that are read where the installed libraries can: TIFF, JPEG 2000, PPM, AVIF, HEIF; their headers."""

from __future__ import annotations

import re
import struct
from functools import cache
from importlib import import_module
from typing import NamedTuple

Bytes = bytes | bytearray

MORE_PLUGINS = {
    "TIFF": "PIL.TiffImagePlugin",
    "JPEG2000": "PIL.Jpeg2KImagePlugin",
    "PPM": "PIL.PpmImagePlugin",
    "AVIF": "PIL.AvifImagePlugin",
    "HEIF": "pillow_heif",
}
MORE_EXTENSIONS = {
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".jp2", ".j2k", ".jpx"), "JPEG2000"),
    **dict.fromkeys((".ppm", ".pgm", ".pbm", ".pnm"), "PPM"),
    ".avif": "AVIF",
    **dict.fromkeys((".heic", ".heif"), "HEIF"),
}
_LIBRARY = {"JPEG2000": "jpg_2000", "AVIF": "avif"}
"""What Pillow calls the libraries that it may have been built without."""
_NETPBM = re.compile(rb"P([1-6])(?:\s|#[^\n]*\n)+(\d+)(?:\s|#[^\n]*\n)+(\d+)(?:(?:\s|#[^\n]*\n)+(\d+))?")
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_TIFF_TYPES = {3: "H", 4: "I", 16: "Q"}
_WIDTH, _HEIGHT, _BITS = 256, 257, 258
_MOST_ENTRIES = 4096


class Found(NamedTuple):
    """What the first bytes say."""

    format: str
    width: int
    height: int
    depth: int = 8
    """Bits of a value, as far as it is said."""


@cache
def is_read(format: str) -> bool:
    """Whether the installed libraries read one of these formats."""
    try:
        if format == "HEIF":
            import_module("pillow_heif").register_heif_opener()
            return True
        import_module(MORE_PLUGINS[format])
        features = import_module("PIL.features")
    except ImportError:
        return False
    return format not in _LIBRARY or bool(features.check(_LIBRARY[format]))


def unread_format(suffix: str) -> str | None:
    """The format of files with this ending where no installed library reads it; None where one does."""
    format = MORE_EXTENSIONS.get(suffix)
    return None if format is None or is_read(format) else format


def find_format(data: Bytes) -> Found | None:
    """Format and size; None where it is none of these, or cut before its size.

    Raises:
        struct.error: it is cut off in its header.
    """
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _tiff(data)
    if data[:4] == b"\xff\x4f\xff\x51":
        return _codestream(data, 0)
    if data[4:12] == b"jP  \r\n\x87\n":
        at = data.find(b"\xff\x4f\xff\x51")
        return None if at < 0 else _codestream(data, at)
    if data[4:8] == b"ftyp":
        return _heif(data)
    if data[:1] == b"P" and (match := _NETPBM.match(data)):
        deep = match[1] not in (b"1", b"4") and int(match[4] or 0) > 255
        return Found("PPM", int(match[2]), int(match[3]), 16 if deep else 8)
    return None


def may_come_late(data: Bytes) -> bool:
    """Whether the size may stand behind the first bytes that were read."""
    return (
        data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
        or data[4:8] == b"jP  "
        or (data[4:8] == b"ftyp" and any(brand in data[8:64] for brand in (b"avif", b"avis", *_HEIF_BRANDS)))
    )


def _tiff(data: Bytes) -> Found | None:
    """The first directory (TIFF 6.0, section 2; BigTIFF has wider fields)."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    at = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)[0]
    count = struct.unpack_from(order + ("Q" if big else "H"), data, at)[0]
    at += 8 if big else 2
    step, value_at = (20, 12) if big else (12, 8)
    found: dict[int, int] = {}
    for entry in range(min(count, _MOST_ENTRIES)):
        start = at + step * entry
        tag, kind = struct.unpack_from(order + "HH", data, start)
        if tag in (_WIDTH, _HEIGHT, _BITS) and kind in _TIFF_TYPES:
            many = struct.unpack_from(order + ("Q" if big else "I"), data, start + 4)[0]
            place = start + value_at
            if many * struct.calcsize(_TIFF_TYPES[kind]) > (8 if big else 4):
                place = struct.unpack_from(order + ("Q" if big else "I"), data, place)[0]
            found[tag] = struct.unpack_from(order + _TIFF_TYPES[kind], data, place)[0]
    if _WIDTH not in found or _HEIGHT not in found:
        return None
    return Found("TIFF", found[_WIDTH], found[_HEIGHT], found.get(_BITS, 1))


def _codestream(data: Bytes, at: int) -> Found:
    """JPEG 2000's SIZ marker segment (ITU-T T.800, A.5.1)."""
    right, bottom, left, top = struct.unpack_from(">4I", data, at + 8)
    depth = (struct.unpack_from(">B", data, at + 42)[0] & 0x7F) + 1
    return Found("JPEG2000", max(0, right - left), max(0, bottom - top), depth)


def _heif(data: Bytes) -> Found | None:
    """The largest of the sizes that stand in ``ispe`` boxes (ISO/IEC 23008-12, 6.5.3): tiles and previews have
    theirs too.
    """
    size = struct.unpack_from(">I", data)[0]
    brands = bytes(data[8 : min(size, 256)])
    avif = b"avif" in brands or b"avis" in brands
    if not avif and not any(brand in brands for brand in _HEIF_BRANDS):
        return None
    sizes, at = list[tuple[int, int]](), data.find(b"ispe")
    while at >= 0 and len(sizes) < _MOST_ENTRIES:
        sizes.append(struct.unpack_from(">II", data, at + 8))
        at = data.find(b"ispe", at + 4)
    if not sizes:
        return None
    width, height = max(sizes, key=lambda each: each[0] * each[1])
    return Found("AVIF" if avif else "HEIF", width, height)
