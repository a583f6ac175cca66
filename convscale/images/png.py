"""What Pillow does not notice of a damaged PNG: wrong checksums, and streams with too few rows."""

from __future__ import annotations

import struct
import zlib

Bytes = bytes | bytearray

_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column and row, and steps of both, of the seven passes of an interlaced PNG (PNG specification, 8.2)."""


def check_chunks(data: Bytes) -> None:
    """Every chunk whole, its CRC-32 right, IEND at the end (PNG specification, section 5)."""
    at = 8
    while True:
        if at + 12 > len(data):
            raise ValueError("truncated")
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        end = at + 8 + length
        if end + 4 > len(data):
            raise ValueError("truncated")
        if zlib.crc32(memoryview(data)[at + 4 : end]) != struct.unpack(">I", data[end : end + 4])[0]:
            raise ValueError(f"wrong checksum in its {kind.decode('ascii', 'replace')} chunk")
        if kind == b"IEND":
            return
        at = end + 4


def has_few_rows(data: Bytes, last_row: bytes) -> bool:
    """Whether a PNG's stream ends before its last row (given as decoded); Pillow leaves the rest at zero, wordless.

    The stream is only gone through again where the last row is zero, or where rows come interlaced.
    """
    width, height, depth, kind, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    if not interlaced and last_row.strip(b"\0"):
        return False
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(kind, 1)
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    wanted = 0
    for left, top, across, down in passes:
        columns, lines = max(0, -(-(width - left) // across)), max(0, -(-(height - top) // down))
        wanted += lines * (1 + (columns * bits + 7) // 8) if columns else 0
    return _inflated(data, wanted) < wanted


def _inflated(data: Bytes, wanted: int) -> int:
    """Bytes in a PNG's stream, counted up to ``wanted``."""
    stream, at, total = zlib.decompressobj(), 8, 0
    while at + 12 <= len(data) and total < wanted and not stream.eof:
        length, kind = struct.unpack_from(">I4s", data, at)
        rest = bytes(data[at + 8 : at + 8 + length]) if kind == b"IDAT" else b""
        while rest and total < wanted and not stream.eof:
            try:
                total += len(stream.decompress(rest, 1 << 20))
            except zlib.error:
                return wanted  # not too short, but damaged: the decoder has its word on that
            rest = stream.unconsumed_tail
        at += 12 + length
    return total
