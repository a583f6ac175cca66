"""What a decoder may raise, what it may take, and the rarer formats."""

from __future__ import annotations

import errno
import io
import os
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from convscale.errors import SystemTrouble
from convscale.images import decode
from convscale.images.decode import BYTES_PER_PIXEL, ImageError, check_image, decode_image, parse_header, read_image
from convscale.images.preprocess import Preprocessing

NOISE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def png(width: int, height: int, rows: int, *, depth: int = 8, kind: int = 2) -> bytes:
    """A PNG of one colour whose stream holds only so many rows."""
    channels = {0: 1, 2: 3, 6: 4}[kind]
    raw = (b"\0" + b"\x50" * (channels * depth // 8 * width)) * rows
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(raw)), (b"IEND", b""))
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def test_the_cap_counts_what_is_decoded() -> None:
    gif = b"GIF89a" + struct.pack("<HHBBB", 10, 10, 0, 0, 0)
    gif += b"\x2c" + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0x80) + b"\0\0\0\xff\xff\xff\x02\x02\x4c\x01\0\x3b"
    header = parse_header(gif)
    assert header is not None
    assert (header.width, header.height) == (65_535, 65_535)
    with pytest.raises(ImageError, match=r"bad\.gif: GIF image of 65535 x 65535 pixels .* above the cap"):
        decode_image(gif, name="bad.gif")
    plain = encode(Image.fromarray(NOISE).quantize(200), "GIF", comment=b"c" * 700)
    header = parse_header(plain)
    assert header is not None
    assert (header.width, header.height) == (64, 48)


@pytest.mark.parametrize(
    "error", [RuntimeError, ZeroDivisionError, KeyError, AssertionError, MemoryError, RecursionError]
)
def test_whatever_a_decoder_raises_is_a_bad_picture(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error("odd\nthings")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(ImageError, match=r"x\.png: PNG image is damaged: .*odd") as caught:
        decode_image(png(4, 4, 4), name="x.png")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO])
def test_a_failing_system_is_no_bad_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(png(4, 4, 4))

    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(decode.io, "FileIO", fail)
        for open_it in (check_image, read_image):
            with pytest.raises(SystemTrouble) as caught:
                open_it(path)
            assert not isinstance(caught.value, ImageError)
            assert "\n" not in str(caught.value)
    with monkeypatch.context() as patched:
        patched.setattr(
            decode.io, "FileIO", lambda *_, **__: (_ for _ in ()).throw(PermissionError(errno.EACCES, "no"))
        )
        with pytest.raises(ImageError, match="can not be read"):
            check_image(path)
    monkeypatch.setattr(decode, "_has_memory", lambda header: False)
    monkeypatch.setattr(Image, "open", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(SystemTrouble, match=r"x\.png: out of memory"):
        read_image(path)


@pytest.mark.parametrize(("depth", "kind"), [(8, 2), (8, 0), (16, 0), (8, 6)])
def test_streams_with_too_few_rows_are_noticed(depth: int, kind: int) -> None:
    assert decode_image(png(9, 40, 40, depth=depth, kind=kind)).shape == (40, 9, 3)
    for rows in (39, 20, 0):
        with pytest.raises(ImageError, match="PNG image is truncated"):
            decode_image(png(9, 40, rows, depth=depth, kind=kind))


def test_black_rows_are_not_too_few() -> None:
    black = Image.fromarray(np.zeros((40, 9, 3), np.uint8))
    for mode in ("RGB", "L", "1", "P", "RGBA"):
        assert decode_image(encode(black.convert(mode), "PNG")).shape == (40, 9, 3)
    gray = np.full((40, 9), 80, np.uint8)
    adam7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    raw = b"".join(b"\0" + row.tobytes() for x, y, dx, dy in adam7 for row in gray[y::dy, x::dx])
    for stream, whole in ((raw, True), (raw[:-10], False)):
        head = struct.pack(">IIBBBBB", 9, 40, 8, 0, 0, 0, 1)
        chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(stream)), (b"IEND", b""))
        body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
        if whole:
            assert (decode_image(b"\x89PNG\r\n\x1a\n" + body, channels=1) == 80).all()
        else:
            with pytest.raises(ImageError, match="truncated"):
                decode_image(b"\x89PNG\r\n\x1a\n" + body)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_ends_early_is_noticed(progressive: bool) -> None:
    pytest.importorskip("simplejpeg")
    data = encode(Image.fromarray(NOISE), "JPEG", quality=90, progressive=progressive)
    with pytest.raises(ImageError, match="JPEG image is truncated"):
        decode_image(data[: len(data) // 2] + b"\xff\xd9")


@pytest.mark.parametrize("size", [(1, 65_000), (65_000, 1), (3, 20_000)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_a_thin_picture_is_cropped_before_it_is_enlarged(size: tuple[int, int], interpolation: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    how = Preprocessing(image_size=224, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation=interpolation)
    made = how.resize(pixels)
    assert made.shape == (224, 224, 3)
    # by hand: the middle of the strip, which the crop shows: 224 of 256 in width, the same share of its length
    short, middle = min(size), max(size) // 2
    strip = pixels.reshape(max(size), short, 3) if size[0] > size[1] else pixels.transpose(1, 0, 2)
    if short == 1:
        low, high = strip[middle - 3 : middle + 4].min((0, 1)), strip[middle - 3 : middle + 4].max((0, 1))
        slack = 40 if interpolation == "bicubic" else 0  # it overshoots
        assert (made >= low.astype(int) - slack).all()
        assert (made <= high.astype(int) + slack).all()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("shape", [(20, 700), (700, 20), (300, 9_700), (8_001, 201)])
@pytest.mark.parametrize("image_size", [32, (24, 40)])
def test_the_same_pixels_as_by_resizing_all(
    interpolation: str, shape: tuple[int, int], image_size: int | tuple[int, int]
) -> None:
    """Against Pillow: resize the whole picture, then crop."""
    pixels = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    how = Preprocessing(image_size=image_size, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation=interpolation)
    size = how.resized(*shape)
    assert max(size) > 32 * min(size)
    whole = np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling[interpolation.upper()]))
    top, left = round((size[0] - how.height) / 2), round((size[1] - how.width) / 2)
    golden = whole[top : top + how.height, left : left + how.width].astype(int)
    difference = np.abs(how.resize(pixels).astype(int) - golden)
    assert (difference > (0 if interpolation == "nearest" else 1)).mean() < 0.001


MORE = [
    ("TIFF", {}, None),
    ("TIFF", {"compression": "tiff_lzw"}, "libtiff"),
    ("TIFF", {"compression": "tiff_deflate"}, "libtiff"),
    ("PPM", {}, None),
    ("JPEG2000", {"irreversible": False}, "jpg_2000"),
    ("AVIF", {"quality": 95}, "avif"),
]


@pytest.mark.parametrize(("format", "options", "feature"), MORE)
def test_more_formats(tmp_path: Path, format: str, options: dict, feature: str | None) -> None:
    if feature is not None and not features.check(feature):
        pytest.skip(f"Pillow was built without {feature}")
    data = encode(Image.fromarray(NOISE), format, **options)
    path = tmp_path / "x.bin"
    path.write_bytes(data)
    header = check_image(path)
    assert (header.format, header.width, header.height) == (format, 64, 48)
    golden = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(read_image(path), golden)
    with pytest.raises(ImageError):
        decode_image(data[: len(data) // 2])
    with pytest.raises(ImageError, match="above the cap"):
        check_image(path, max_pixels=3000)


def test_raw_codestreams_and_late_directories(tmp_path: Path) -> None:
    if features.check("jpg_2000"):
        out = io.BytesIO()
        Image.fromarray(NOISE).save(out, "JPEG2000", no_jp2=True)
        header = parse_header(out.getvalue())
        assert header is not None
        assert (header.format, header.width, header.height) == ("JPEG2000", 64, 48)
    # big-endian, its directory behind 100,000 bytes of pixels
    entries = [(256, 3, 1, 400 << 16), (257, 3, 1, 250 << 16), (258, 3, 1, 8 << 16), (259, 3, 1, 1 << 16)]
    entries += [(262, 3, 1, 1 << 16), (273, 4, 1, 8), (277, 3, 1, 1 << 16), (278, 4, 1, 250), (279, 4, 1, 100_000)]
    pixels = np.random.default_rng(0).integers(0, 256, (250, 400), dtype=np.uint8)
    data = b"MM\0*" + struct.pack(">I", 100_008) + pixels.tobytes() + struct.pack(">H", len(entries))
    data += b"".join(struct.pack(">HHII", *entry) for entry in entries) + bytes(4)
    path = tmp_path / "late.tif"
    path.write_bytes(data)
    header = check_image(path)
    assert (header.format, header.width, header.height, header.depth) == ("TIFF", 400, 250, 8)
    assert np.array_equal(read_image(path, channels=1)[..., 0], pixels)


def late_jpeg() -> list[tuple[int, bytes]]:
    """By 200 profiles of 65,535 bytes, between EXIF (turned by 90 degrees) and the frame of 640 x 480."""
    exif = b"Exif\0\0II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)
    parts, at = [(0, b"\xff\xd8\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif)], 6 + len(exif)
    for _ in range(200):
        parts.append((at, b"\xff\xe2\xff\xff"))
        at += 2 + 65_535
    frame = struct.pack(">BHHB", 8, 480, 640, 3) + bytes((1, 0x22, 0, 2, 0x11, 1, 3, 0x11, 1))
    return [*parts, (at, 7 * b"\xff" + b"\xff\xc0" + struct.pack(">H", 2 + len(frame)) + frame + bytes(9))]


def late_tiff() -> list[tuple[int, bytes]]:
    """Little-endian, its directory behind 100 MB, and the three values of its depth at the very end."""
    entries = [(256, 3, 1, 640), (257, 4, 1, 480), (258, 3, 3, 100_001_000)]
    directory = struct.pack("<H", 3) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    start = b"II*\0" + struct.pack("<I", 100_000_000)
    return [(0, start), (100_000_000, directory), (100_001_000, struct.pack("<3H", 16, 16, 16))]


def late_avif() -> list[tuple[int, bytes]]:
    """What is in it stands behind what it is made of, in a box whose size takes 64 bits."""
    ispe = struct.pack(">I4sIII", 20, b"ispe", 0, 640, 480)
    start = struct.pack(">I4s4sI4s", 20, b"ftyp", b"avif", 0, b"mif1") + struct.pack(">I4sQ", 1, b"mdat", 100_000_000)
    return [(0, start), (100_000_020, struct.pack(">I4sI", 12 + len(ispe), b"meta", 0) + ispe)]


def late_jpeg2000() -> list[tuple[int, bytes]]:
    """Its codestream is the last box, of size 0: to the end."""
    start = b"\0\0\0\x0cjP  \r\n\x87\n" + struct.pack(">I4s", 100_000_000, b"uuid")
    size = struct.pack(">HHIIIIIIIIHBBB", 47, 0, 640, 480, 0, 0, 640, 480, 0, 0, 3, 7, 1, 1)
    return [(0, start), (100_000_012, struct.pack(">I4s", 0, b"jp2c") + b"\xff\x4f\xff\x51" + size + bytes(20))]


@pytest.mark.parametrize("parts", [late_jpeg, late_tiff, late_avif, late_jpeg2000])
def test_a_size_that_comes_late_is_read_where_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: Callable[[], list[tuple[int, bytes]]]
) -> None:
    """All of the file was read to look at its header, with a buffer of half a gigabyte, by eight threads."""
    monkeypatch.setattr(decode, "is_read", lambda format: True)
    path = tmp_path / "late.bin"
    with open(path, "wb") as file:  # with holes, which take no space
        for at, data in parts():
            file.seek(at)
            file.write(data)
    check_image(path)  # modules are imported
    tracemalloc.start()
    header = check_image(path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    form, turned, depth = {
        late_jpeg: ("JPEG", 6, 8),
        late_tiff: ("TIFF", 1, 16),
        late_avif: ("AVIF", 1, 8),
        late_jpeg2000: ("JPEG2000", 1, 8),
    }[parts]
    assert (header.format, header.width, header.height) == (form, 640, 480)
    assert (header.orientation, header.depth, header.height_at) == (turned, depth, 0)
    assert most < 500_000
    os.truncate(path, path.stat().st_size - 40)
    with pytest.raises(ImageError, match="or cut off in its header"):
        check_image(path)


@pytest.mark.parametrize("kind", [b"meta", b"mdat"])
def test_a_box_that_is_smaller_than_its_head_is_no_picture(tmp_path: Path, kind: bytes) -> None:
    for size in (*range(1, 8), 2**31):
        (tmp_path / "x.avif").write_bytes(
            struct.pack(">I4s4sI", 16, b"ftyp", b"avif", 0) + struct.pack(">I4s", size, kind)
        )
        with pytest.raises(ImageError, match="or cut off in its header"):
            check_image(tmp_path / "x.avif")


def test_a_bitmap_of_os2() -> None:
    """Its sides have 16 bits; read as two of 32 they were far above the cap."""
    core = struct.pack("<IHHHH", 12, 2, 3, 1, 24)  # rows from the bottom, blue first, each filled up to 4 bytes
    rows = [bytes((1, 2, 3, 4, 5, 6, 0, 0)), bytes((7, 8, 9, 10, 11, 12, 0, 0)), bytes((13, 14, 15, 16, 17, 18, 0, 0))]
    data = b"BM" + struct.pack("<IHHI", 26 + 24, 0, 0, 26) + core + b"".join(rows)
    header = parse_header(data)
    assert header is not None
    assert (header.format, header.width, header.height) == ("BMP", 2, 3)
    assert decode_image(data)[::-1, :, ::-1].tolist() == [
        [[1, 2, 3], [4, 5, 6]],
        [[7, 8, 9], [10, 11, 12]],
        [[13, 14, 15], [16, 17, 18]],
    ]


def test_sixteen_bits() -> None:
    values = np.arange(65_536, dtype=np.uint16).reshape(256, 256)
    golden = np.rint(values.astype(np.float64) / 257).astype(np.uint8)
    for format in ("PNG", "TIFF"):
        data = encode(Image.fromarray(values), format)
        header = parse_header(data)
        assert header is not None
        assert header.depth == 16
        assert np.array_equal(decode_image(data, channels=1)[..., 0], golden)
    with pytest.raises(ImageError, match="floating-point"):
        decode_image(encode(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"))


@pytest.mark.parametrize("cut", range(0, 60, 3))
@pytest.mark.parametrize(
    "start", [b"II*\0", b"MM\0*", b"II+\0", b"\0\0\0\x0cjP  \r\n\x87\n", b"\0\0\0\x20ftypavif", b"P6\n"]
)
def test_any_bytes_behind_a_signature_are_an_image_error(start: bytes, cut: int) -> None:
    random = np.random.default_rng(cut)
    for _ in range(20):
        with pytest.raises(ImageError) as caught:
            decode_image(start + random.integers(0, 256, cut, dtype=np.uint8).tobytes())
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("most", "said"), [(4095, True), (4096, False), (65_535, False)])
def test_twelve_bits_in_sixteen_are_said(tmp_path: Path, most: int, said: bool) -> None:
    from convscale.images.sources import open_dataset

    for number in range(12):
        path = tmp_path / "ab"[number % 2] / f"{number}.{('png', 'tif')[number // 6]}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.array([[0, number], [7, most]], np.uint16)).save(path)
    notes = [note for note in open_dataset(tmp_path).notes if "16 bits" in note]
    assert len(notes) == said
    if said:
        assert "12 images have 16 bits" in notes[0]
        assert "largest value 4095 of 65535" in notes[0]


def test_formats_that_nothing_reads_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from convscale.images import formats, walk

    monkeypatch.setattr(formats, "is_read", lambda format: format != "HEIF")
    monkeypatch.setattr(decode, "is_read", lambda format: format != "HEIF")
    for name in ("a.jpg", "b.heic", "c.HEIF", "d.avif"):
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic\0\0\0\x14ispe\0\0\0\0\0\0\0\x40\0\0\0\x30")
    tally = walk.Tally()
    assert [Path(path).name for path in walk.pictures_below(str(tmp_path), tally)] == ["a.jpg", "d.avif"]
    assert tally.report().count("HEIF files, which no installed library reads") == 2
    header = parse_header((tmp_path / "b.heic").read_bytes())
    assert header is not None
    assert (header.format, header.width, header.height) == ("HEIF", 64, 48)
    with pytest.raises(ImageError, match="HEIF image, which no installed library reads"):
        check_image(tmp_path / "b.heic")


MEMORY = """
import re, sys
from convscale.images.decode import decode_image, preload
preload()
small, large = (open(path, "rb").read() for path in sys.argv[1:3])
decode_image(small)
def peak():  # getrusage tells of the parent, too
    return 1024 * int(re.search("VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
before = peak()
decode_image(large)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
@pytest.mark.parametrize(("depth", "kind"), [(8, 6), (16, 0), (8, 2)])
def test_memory_is_a_multiple_of_the_pixels(tmp_path: Path, depth: int, kind: int) -> None:
    side = 2500
    (tmp_path / "small.png").write_bytes(png(64, 64, 64, depth=depth, kind=kind))
    (tmp_path / "large.png").write_bytes(png(side, side, side, depth=depth, kind=kind))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "small.png"), str(tmp_path / "large.png")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 3 * side * side < int(done.stdout) < BYTES_PER_PIXEL * side * side
