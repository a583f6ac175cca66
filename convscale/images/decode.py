"""A file becomes pixels: header check first, then the decoder that is fast or careful enough for its format.

One decoder for training and for what was shipped, without torch. What it gives is what Pillow gives, bit for bit. Usual
JPEGs go through simplejpeg's libjpeg-turbo where it is installed, which is faster and has the same pixels; everything
else, and what simplejpeg refuses, through Pillow. Pillow does not check a PNG's checksums, so that is done here.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import stat
import struct
from dataclasses import dataclass, replace
from importlib import import_module
from threading import RLock
from typing import Any

import numpy as np

from convscale.errors import SystemTrouble, UserError, first_line, stop_if_system
from convscale.images.formats import MORE_EXTENSIONS, MORE_PLUGINS, find_format, find_late, is_read, jpeg_markers
from convscale.images.png import check_chunks, has_few_rows
from convscale.words import listed

_PLUGINS = {
    "JPEG": "PIL.JpegImagePlugin",
    "PNG": "PIL.PngImagePlugin",
    "WEBP": "PIL.WebPImagePlugin",
    "GIF": "PIL.GifImagePlugin",
    "BMP": "PIL.BmpImagePlugin",
}
_IMPORTING = RLock()
FORMATS = (*_PLUGINS, *MORE_PLUGINS)
EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", *MORE_EXTENSIONS)
MAX_PIXELS = 80_000_000
"""Largest picture that is decoded: 80 megapixels (240 MB as RGB). A small PNG can claim hundreds."""
MAX_BYTES = 2_000_000_000
"""Largest file that is looked at; one of a picture of ``MAX_PIXELS`` with 16 bits, not compressed at all, is a third of
it."""
BYTES_PER_PIXEL = 24
"""Memory that decoding takes at most for each pixel, beside the file itself; RGB alone is 3."""

_HEAD_BYTES = 65_536
_JPEG_SEGMENT = struct.Struct(">BBHBHHB")
"""0xFF, marker and length; then, in a frame header, precision, height, width and number of components."""
_JPEG_HEIGHT = struct.Struct(">H")
"""As it stands in a frame header."""
_JPEG_ROWS = 16
"""Rows of pixels in a row of blocks where chroma is halved; the height that a decoder is told is a multiple of it."""
_BAND_VALUES = 1_000_000
"""Values of 16 bits that are made bytes at a time."""
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(="|>)([0-9])')
_UNREADABLE = (SyntaxError, ValueError, TypeError, OSError, struct.error, OverflowError)
"""What Pillow raises where an EXIF block is damaged."""
_CUT_OFF = (struct.error, IndexError, ValueError, OverflowError)
"""What is raised of a header that is not whole."""

Bytes = bytes | bytearray


class ImageError(UserError):
    """A picture that can not be used; the message starts with its path."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What the first bytes of a picture say."""

    format: str
    """One of ``FORMATS``."""
    width: int
    """In pixels, before any EXIF rotation."""
    height: int
    """In pixels, before any EXIF rotation."""
    orientation: int = 1
    """How a JPEG is turned, 1 (upright) to 8, by EXIF or, where that says nothing, by XMP; 0 where its EXIF block can
    not be read."""
    components: int = 0
    """Of a JPEG: 1 gray, 3 colour, 4 ink."""
    depth: int = 8
    """Bits of a value, where PNG or one of the rarer formats says it."""
    height_at: int = 0
    """Where in the bytes the height of a JPEG stands that can be decoded down to any row (baseline, gray or three
    components); 0: of none."""


def preload() -> None:
    """Import all that decoding and resizing need: to be called before threads or processes decode."""
    _import(*_PLUGINS.values(), "PIL.ImageOps")
    with contextlib.suppress(ImportError):  # no wheel for this platform
        _import("simplejpeg")


def _import(*names: str) -> None:
    """Import modules, one thread at a time: threads that import parts of a package for the first time at the same time
    may see them half made.
    """
    with _IMPORTING:
        for name in names:
            import_module(name)


def parse_header(data: Bytes) -> Header | None:
    """Format and size from a picture's bytes (the first 64 KiB nearly always do); None when it is none of ``FORMATS``
    or cut before its size.
    """
    try:
        if data[:3] == b"\xff\xd8\xff":
            return _jpeg_header(data)
        if data[:8] == _PNG_SIGNATURE and data[12:16] == b"IHDR":
            width, height = struct.unpack(">II", data[16:24])
            return Header(format="PNG", width=width, height=height, depth=data[24] if len(data) > 24 else 8)
        if data[:6] in (b"GIF87a", b"GIF89a"):
            return _gif_header(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp_header(data)
        if data[:2] == b"BM":
            core = data[14:18] == b"\x0c\0\0\0"  # OS/2's header of 12 bytes has sides of 16 bits
            width, height = struct.unpack("<HH", data[18:22]) if core else struct.unpack("<ii", data[18:26])
            return Header(format="BMP", width=abs(width), height=abs(height))
        if (found := find_format(data)) is not None:
            return Header(**found._asdict())
    except _CUT_OFF:
        return None
    return None


def _late_header(head: bytes, file: io.FileIO) -> Header | None:
    """Of a file whose size stands behind its first bytes: behind a large EXIF block or colour profile, or in a
    directory at the end.
    """

    def read(at: int, count: int) -> bytes:
        file.seek(min(at, MAX_BYTES))
        return file.read(count)

    if head[:3] == b"\xff\xd8\xff":
        found = parse_header(jpeg_markers(read))
        return found and replace(found, height_at=0)  # it is of the markers alone
    with contextlib.suppress(*_CUT_OFF):
        if (found := find_late(head, read)) is not None:
            return Header(**found._asdict())
    return None


def check_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Header:
    """Read a picture's header without decoding it.

    Raises:
        ImageError: missing, empty, larger than ``MAX_BYTES``, no known format, or more than ``max_pixels``.
    """
    try:
        with _open_regular(path) as file:
            head = file.read(_HEAD_BYTES)
            header = parse_header(head) or _late_header(head, file)
    except OSError as error:
        stop_if_system(error, path)
        raise ImageError(f"{path}: can not be read ({error.strerror})") from error
    return _accept(path, head, header, max_pixels)


def read_image(
    path: str | os.PathLike[str], *, channels: int = 3, max_pixels: int = MAX_PIXELS, min_side: int | None = None
) -> np.ndarray:
    """Decode a picture, upright.

    EXIF orientation is applied, CMYK and palettes become RGB, 16 bits become 8, transparent pixels are shown on white,
    and of an animation the first frame is taken.

    Args:
        path: a picture in one of ``FORMATS``, as far as the installed libraries read it; its content counts, not its
            extension.
        channels: 3 for RGB, 1 for gray.
        max_pixels: larger pictures are refused before decoding.
        min_side: allow a JPEG to be decoded at a half, a quarter or an eighth of its size as long as its shorter side
            keeps this many pixels: faster, with slightly different pixels. None: always the full size.

    Returns:
        uint8, (height, width, channels).

    Raises:
        ImageError: one line with the path and what is wrong.
    """
    return decode_image(read_bytes(path), name=path, channels=channels, max_pixels=max_pixels, min_side=min_side)


def read_bytes(path: str | os.PathLike[str]) -> bytearray:
    """A file's bytes.

    Raises:
        ImageError: it is missing, may not be read, is no regular file, or is larger than ``MAX_BYTES``.
        SystemTrouble: the system is at the end of its means, or the disk fails.
    """
    try:
        with _open_regular(path) as file:
            data = bytearray(os.fstat(file.fileno()).st_size)
            if file.readinto(data) != len(data):  # a file that changes
                file.seek(0)
                return bytearray(file.read())
            return data
    except OSError as error:
        stop_if_system(error, path)
        raise ImageError(f"{path}: can not be read ({error.strerror})") from error


def _open_regular(path: str | os.PathLike[str]) -> io.FileIO:
    """Open a regular file that is no larger than a picture's. A pipe would wait for its writer, a device may do
    anything: neither is opened.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ImageError(f"{path}: no regular file, but a folder, a pipe, a socket or a device")
    check_size(found.st_size, path)
    # Without waiting, for what takes the file's place meanwhile; a regular file is read as ever.
    return io.FileIO(path, "r", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))


def check_size(size: int, name: str | os.PathLike[str]) -> None:
    """Refuse a file of more bytes than any picture has, before it is read.

    Raises:
        ImageError: it has more than ``MAX_BYTES``.
    """
    if size > MAX_BYTES:
        raise ImageError(f"{name}: the file has {size / 1e6:,.0f} MB, above the cap of {MAX_BYTES / 1e6:,.0f}")


def largest_value(path: str | os.PathLike[str]) -> int | None:
    """The largest value of a gray picture of 16 bits; None of any other, or where it can not be decoded."""
    data = read_bytes(path)
    header = parse_header(data)
    if header is None or header.depth <= 8 or header.width * header.height > MAX_PIXELS:
        return None
    _import((_PLUGINS | MORE_PLUGINS)[header.format])
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=[header.format]) as image:
            return int(np.asarray(image).max()) if image.mode.startswith("I") else None
    except Exception:  # said where it is decoded in earnest
        return None


def decode_image(
    data: Bytes,
    *,
    name: str | os.PathLike[str] = "image",
    channels: int = 3,
    max_pixels: int = MAX_PIXELS,
    min_side: int | None = None,
    rows: int | None = None,
) -> np.ndarray:
    """``read_image`` on bytes in memory; ``name`` stands in messages.

    With ``rows``, an upright JPEG may come back without what lies below so many rows of the whole picture (scaled with
    it by ``min_side``): entropy coding can not be entered in its middle, but it can be left. What is damaged below them
    is then not noticed; a cut-off file is.
    """
    header = _accept(name, data, parse_header(data), max_pixels)
    try:
        if header.format == "JPEG":
            divisor = 1 if min_side is None else _divisor(min(header.width, header.height), min_side)
            if rows is not None and (pixels := _decode_jpeg_top(data, header, channels, rows, divisor)) is not None:
                return pixels
            if divisor == 1 and (pixels := _decode_jpeg(data, header, channels)) is not None:
                return pixels
        if header.format == "PNG":
            check_chunks(data)
        return _decode_pillow(data, name, header.format, channels, min_side, max_pixels)
    except UserError:
        raise
    except Exception as error:  # decoders raise what they like, and none of it is our own mistake
        if isinstance(error, OSError):
            stop_if_system(error, name)
        if isinstance(error, MemoryError) and not _has_memory(header):
            raise SystemTrouble(f"{name}: out of memory: use a smaller batch or fewer workers") from error
        reason = "truncated" if "truncated" in str(error).lower() else f"damaged: {first_line(error)}"
        raise ImageError(f"{name}: {header.format} image is {reason}") from error


def _accept(name: str | os.PathLike[str], data: Bytes, header: Header | None, max_pixels: int) -> Header:
    if not data:
        raise ImageError(f"{name}: the file is empty")
    if header is None:
        raise ImageError(f"{name}: not a {listed(FORMATS, 'or')} image, or cut off in its header")
    if header.format in MORE_PLUGINS and not is_read(header.format):
        raise ImageError(f"{name}: {header.format} image, which no installed library reads")
    _check_pixels(name, header, max_pixels)
    return header


def _check_pixels(name: str | os.PathLike[str], header: Header, max_pixels: int) -> None:
    """Refuse a picture without area, and one that is too large to be decoded."""
    pixels = header.width * header.height
    if pixels == 0:
        raise ImageError(f"{name}: {header.format} image of {header.width} x {header.height} pixels has no area")
    if pixels > max_pixels:
        size = f"{header.width} x {header.height}"
        raise ImageError(
            f"{name}: {header.format} image of {size} pixels ({pixels / 1e6:.0f} megapixels) is above the cap of "
            f"{max_pixels / 1e6:.0f}"
        )


def _has_memory(header: Header) -> bool:
    """Whether there is memory for a picture of this size: then a decoder that lacked some was led astray by it."""
    try:
        bytearray(BYTES_PER_PIXEL * header.width * header.height)
    except MemoryError:
        return False
    return True


def _gif_header(data: Bytes) -> Header:
    """The screen, or the first frame where that is larger: its size is what is decoded (GIF89a, sections 18 to 20)."""
    width, height, flags = struct.unpack("<HHB", data[6:11])
    at = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    while at + 10 <= len(data) and data[at] == 0x21:  # extensions: blocks until an empty one
        at += 2
        while at < len(data) and data[at]:
            at += 1 + data[at]
        at += 1
    if at + 9 <= len(data) and data[at] == 0x2C:
        left, top, wide, high = struct.unpack_from("<4H", data, at + 1)
        width, height = max(width, left + wide), max(height, top + high)
    return Header(format="GIF", width=width, height=height)


def _jpeg_header(data: Bytes) -> Header | None:
    """Walk the markers to the frame header (ITU-T T.81, B.2.2)."""
    at, last = 2, len(data) - _JPEG_SEGMENT.size
    exif, xmp = b"", b""
    while at <= last:
        first, marker, length, _, height, width, components = _JPEG_SEGMENT.unpack_from(data, at)
        if first != 0xFF:
            return None
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height_at = at + 5 if marker in (0xC0, 0xC1) and components in (1, 3) else 0
            return Header(
                format="JPEG",
                width=width,
                height=height,
                orientation=_orientation(exif, xmp),
                components=components,
                height_at=height_at,
            )
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            more = bytes(data[at + 4 : at + 2 + length])
            exif += more[6:] if exif else more  # a block may go on in the next segment
        elif marker == 0xE1 and data[at + 4 : at + 4 + len(_XMP)] == _XMP:
            xmp = bytes(data[at + 4 + len(_XMP) : at + 2 + length])
        at += 2 if marker in (0xD8, 0x01) or 0xD0 <= marker <= 0xD7 else 2 + length
    return None


def _orientation(exif: bytes, xmp: bytes) -> int:
    """What ``ImageOps.exif_transpose`` would go by."""
    found = None
    if exif:
        _import("PIL.Image")
        from PIL import Image

        try:
            values = Image.Exif()
            values.load(exif)
            found = values.get(0x0112)
        except _UNREADABLE:
            return 0
    if found is None and xmp and (match := _XMP_ORIENTATION.search(xmp)):
        found = int(match[2])
    return found if isinstance(found, int) and 2 <= found <= 8 else 1


def _webp_header(data: Bytes) -> Header | None:
    """Size from a WebP's first chunk (RFC 9649, section 2)."""
    kind = data[12:16]
    if kind == b"VP8X":
        width = 1 + int.from_bytes(data[24:27], "little")
        height = 1 + int.from_bytes(data[27:30], "little")
    elif kind == b"VP8L":
        bits = struct.unpack("<I", data[21:25])[0]
        width, height = (bits & 0x3FFF) + 1, ((bits >> 14) & 0x3FFF) + 1
    elif kind == b"VP8 ":
        width, height = (value & 0x3FFF for value in struct.unpack("<HH", data[26:30]))
    else:
        return None
    return Header(format="WEBP", width=width, height=height)


def _decode_jpeg(data: Bytes, header: Header, channels: int) -> np.ndarray | None:
    """A whole JPEG of gray or three components, upright; None where Pillow must see to it."""
    if header.components not in (1, 3) or header.orientation == 0:
        return None
    try:
        _import("simplejpeg")
        import simplejpeg

        pixels = simplejpeg.decode_jpeg(data, colorspace="RGB" if channels == 3 else "GRAY")
    except ImportError:  # no wheel for this platform
        return None
    except ValueError as error:  # damage, which Pillow may see past or puts in words
        if "premature end of data segment" in str(error).lower():
            raise ValueError("truncated") from error
        return None
    return pixels if header.orientation == 1 else np.ascontiguousarray(_turned(pixels, header.orientation))


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels as EXIF's ``orientation`` says that they are to be seen."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return pixels[::rows, ::columns]


def _divisor(side: int, min_side: int) -> int:
    """By what 8, 4, 2 or 1 a side can be divided and keep ``min_side`` pixels."""
    return next((divisor for divisor in (8, 4, 2) if side >= divisor * min_side), 1)


def _decode_jpeg_top(data: Bytes, header: Header, channels: int, rows: int, divisor: int) -> np.ndarray | None:
    """At least the first ``rows`` of an upright baseline JPEG, all sides over ``divisor``; None where that can not be
    had or is no gain.

    The decoder is told a smaller height and so stops early. Smooth chroma looks one row ahead, so the last row that it
    is told of is not used, unless it is the picture's own last. A file that does not end as it should is left to the
    decoder that says why.
    """
    if not header.height_at or header.orientation != 1 or data[-2:] != b"\xff\xd9":
        return None
    try:
        _import("simplejpeg")
        import simplejpeg
    except ImportError:  # no wheel for this platform
        return None
    told = min(header.height, -(-(rows + 1) // _JPEG_ROWS) * _JPEG_ROWS)
    shorter = data if isinstance(data, bytearray) else bytearray(data)
    options: dict[str, Any] = {"colorspace": "RGB" if channels == 3 else "GRAY", "strict": False}
    if divisor > 1:
        options |= {"min_height": -(-told // divisor), "min_width": -(-header.width // divisor)}
    _JPEG_HEIGHT.pack_into(shorter, header.height_at, told)
    try:
        return simplejpeg.decode_jpeg(shorter, **options)
    except ValueError:
        return None
    finally:
        _JPEG_HEIGHT.pack_into(shorter, header.height_at, header.height)


def _decode_pillow(
    data: Bytes, name: str | os.PathLike[str], format: str, channels: int, min_side: int | None, max_pixels: int
) -> np.ndarray:
    # this format's plugin alone: all of them take longer than opening an artefact
    _import((_PLUGINS | MORE_PLUGINS)[format], "PIL.ImageOps")
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(data), formats=[format]) as image:
        # what the decoder goes by counts, not what the first bytes said
        _check_pixels(name, Header(format=format, width=image.width, height=image.height), max_pixels)
        if format == "JPEG" and (channels == 1 or min_side is not None):  # gray straight from the file's luma
            image.draft("L" if channels == 1 else None, None if min_side is None else (min_side, min_side))
        image.load()
        last_row = (0, image.height - 1, image.width, image.height)
        if format == "PNG" and has_few_rows(data, image.crop(last_row).tobytes()):
            raise ValueError("truncated")
        try:
            image.getexif()
        except _UNREADABLE:
            upright = image
        else:
            upright = ImageOps.exif_transpose(image)  # by XMP, where EXIF says nothing
    if upright.mode == "F":
        raise ValueError("pixels are floating-point numbers, whose range is not known; store 8 or 16 bits")
    if upright.mode.startswith("I"):
        upright = Image.fromarray(_high_bytes(np.asarray(upright)))
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        white = Image.new("RGBA", upright.size, (255, 255, 255, 255))
        upright = Image.alpha_composite(white, upright)
    array = np.array(upright.convert("L" if channels == 1 else "RGB"))
    return array.reshape(array.shape[0], array.shape[1], channels)


def _high_bytes(deep: np.ndarray) -> np.ndarray:
    """uint8: 16-bit values over 257, rounded; what is beyond 16 bits is cut. A band at a time, to spare memory."""
    out = np.empty(deep.shape, np.uint8)
    step = max(1, _BAND_VALUES // max(1, deep.shape[1]))
    for top in range(0, len(deep), step):
        band = np.clip(deep[top : top + step].astype(np.int64), 0, 65_535)
        out[top : top + step] = (band + 128) // 257  # 257 is odd: nothing lies halfway
    return out
