"""The formats that are read where the installed libraries can: TIFF, JPEG 2000, PPM, AVIF, HEIF; their headers."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import NamedTuple, TypeAlias

Bytes = bytes | bytearray
Read: TypeAlias = Callable[[int, int], Bytes]
"""The bytes of a picture from a place on, at most so many."""

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
_MOST_META = 1 << 24
"""Bytes of the box in which a HEIF file says what is in it."""


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
        return _tiff(lambda at, count: data[at : at + count])
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


def find_late(head: Bytes, read: Read) -> Found | None:
    """As ``find_format``, of a file whose first bytes do not say it: what does is read where it stands, and nothing of
    what lies before it.

    Raises:
        struct.error: it is cut off in its header.
    """
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _tiff(read)
    if head[4:12] == b"jP  \r\n\x87\n":
        at, _ = _box(read, b"jp2c")
        stream = read(at, 64)
        return _codestream(stream, 0) if stream[:4] == b"\xff\x4f\xff\x51" else None
    if head[4:8] == b"ftyp":
        at, size = _box(read, b"meta")
        return _heif(head[: struct.unpack_from(">I", head)[0]] + read(at, min(size, _MOST_META)))
    return None


def _box(read: Read, wanted: bytes) -> tuple[int, int]:
    """Where the content of the first box of a kind begins, and its size (ISO/IEC 14496-12, 4.2).

    Raises:
        struct.error: there is none.
    """
    at = 0
    for _ in range(_MOST_ENTRIES):
        size, kind = struct.unpack(">I4s", read(at, 8))
        begins = 8
        if size == 1:
            (size,), begins = struct.unpack(">Q", read(at + 8, 8)), 16
        if 0 < size < begins:
            break
        if kind == wanted:
            return at + begins, size - begins if size else _MOST_META
        if not size:  # to the end of the file
            break
        at += size
    raise struct.error(f"no box {wanted!r}")


def jpeg_markers(read: Read) -> bytes:
    """Of a JPEG the segments that tell how large it is and how it is turned, without the profiles and previews between
    them (ITU-T T.81, B.1.1.4).
    """
    kept, at = list[Bytes]((b"\xff\xd8",)), 2
    for _ in range(_MOST_ENTRIES):
        first = read(at, 4)
        if len(first) < 4 or first[0] != 0xFF:
            break
        marker = first[1]
        if marker == 0xFF:  # fill bytes
            fill = read(at, 4096)
            at += max(1, len(fill) - len(fill.lstrip(b"\xff")) - 1)
            continue
        if marker in (0xD8, 0x01) or 0xD0 <= marker <= 0xD7:  # without a length
            at += 2
            continue
        length = 2 + int.from_bytes(first[2:], "big")
        frame = 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)
        if marker == 0xE1 or frame:
            kept.append(bytes(read(at, length)))
        if frame:
            break
        at += length
    return b"".join(kept)


def _tiff(read: Read) -> Found | None:
    """The first directory (TIFF 6.0, section 2; BigTIFF has wider fields)."""
    start = read(0, 16)
    order = "<" if start[:2] == b"II" else ">"
    big = start[2:4] in (b"+\0", b"\0+")
    wide, step, value_at = ("Q", 20, 12) if big else ("I", 12, 8)
    at = struct.unpack_from(order + wide, start, 8 if big else 4)[0]
    (count,) = struct.unpack(order + ("Q" if big else "H"), read(at, 8 if big else 2))
    entries = read(at + (8 if big else 2), step * min(count, _MOST_ENTRIES))
    found: dict[int, int] = {}
    for entry in range(0, step * min(count, _MOST_ENTRIES), step):
        tag, kind = struct.unpack_from(order + "HH", entries, entry)
        if tag in (_WIDTH, _HEIGHT, _BITS) and kind in _TIFF_TYPES:
            value, size = order + _TIFF_TYPES[kind], struct.calcsize(_TIFF_TYPES[kind])
            if struct.unpack_from(order + wide, entries, entry + 4)[0] * size > (8 if big else 4):
                place = struct.unpack_from(order + wide, entries, entry + value_at)[0]
                (found[tag],) = struct.unpack(value, read(place, size))
            else:
                (found[tag],) = struct.unpack_from(value, entries, entry + value_at)
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
