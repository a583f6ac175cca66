"""Folders, splits, single pictures and names: what a data set meets."""

from __future__ import annotations

import csv
import io
import json
import os
import socket
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, features

from benchmarks.accidents.play import Accident, Limits, Play, Seen
from benchmarks.accidents.stage import classes_in, encoded, fill, picture, splits_in

CLASSIFY_MB = 1_500
"""Of memory, more than which a thin picture of a few bytes must not take."""

# ---------------------------------------------------------------- what a command is asked


def checked(play: Play, data: Path, *more: str) -> dict[str, object]:
    """What ``check`` says of a folder or manifest; empty where it refuses."""
    seen = play.forked("check", data, "--json", *more)
    play.done(seen)
    return json.loads(seen.out) if seen.code == 0 else {}


def count(found: dict[str, object]) -> int:
    """Pictures that were found, in all splits."""
    return sum(int(str(found.get(split, 0))) for split in ("train", "validation", "test"))


def notes(found: dict[str, object]) -> str:
    """All that was said of them."""
    return " | ".join(str(each) for key in ("notes", "warnings", "bad") for each in found.get(key) or ())  # type: ignore[attr-defined]


def rows_of(seen: Seen) -> list[dict[str, str]]:
    """The table that ``classify`` printed."""
    return list(csv.DictReader(io.StringIO(seen.out)))


def classified(play: Play, *images: str | bytes | Path, limits: Limits | None = None) -> list[dict[str, str]]:
    """Rows for pictures; it must end well."""
    words = ("classify", *images, "--model", play.stage.artifact, "--workers", "1")
    seen = play.fresh(*words, limits=limits) if limits else play.forked(*words)
    play.done(seen)
    return rows_of(seen)


def bad(rows: Sequence[dict[str, str]]) -> list[str]:
    """Reasons of those that could not be used."""
    return [row["error"] for row in rows if row["error"]]


# ---------------------------------------------------------------- links and what is no file


def _loop(play: Play) -> None:
    data = classes_in(play.here / "data", 6)
    os.symlink(".", data / "cat" / "loop")
    found = checked(play, data)
    play.expect(count(found) == 12, f"{count(found)} pictures of 12")
    play.expect("a link reaches again: 1" in notes(found), "the loop is not said")
    rows = classified(play, data)
    play.expect(len(rows) == 12, f"{len(rows)} rows for 12 pictures")


def _two_loops(play: Play) -> None:
    data = classes_in(play.here / "data", 6)
    os.symlink("../dog", data / "cat" / "b")
    os.symlink("../cat", data / "dog" / "a")
    found, rows = checked(play, data), classified(play, data)
    play.expect(count(found) == 12, f"{count(found)} pictures of 12")
    play.expect(len(rows) == 12, f"{len(rows)} rows for 12 pictures")


def _linked_class(play: Play) -> None:
    data = classes_in(play.here / "data", 6)
    os.rename(data / "dog", play.here / "elsewhere")
    os.symlink(play.here / "elsewhere", data / "dog")
    found, rows = checked(play, data), classified(play, data)
    play.expect(count(found) == 12, f"{count(found)} pictures of 12")
    play.expect(len(rows) == 12, f"{len(rows)} rows for 12 pictures")


def _broken_links(play: Play) -> None:
    data = classes_in(play.here / "data", 6)
    os.symlink("nowhere.png", data / "cat" / "gone.png")
    os.symlink("itself.png", data / "cat" / "itself.png")
    found, rows = checked(play, data), classified(play, data)
    play.expect(count(found) == 12 and len(rows) == 12, f"{count(found)} pictures and {len(rows)} rows of 12")
    play.expect("lead nowhere: 2" in notes(found), "the links are not said")


def _loop_trains(play: Play) -> None:
    data = splits_in(play.here / "data")
    os.symlink(".", data / "train" / "cat" / "loop")
    os.mkfifo(data / "train" / "cat" / "x.jpg")
    seen = play.forked(*play.stage.training(play.here / "run", data=data))
    play.done(seen, "left out")


def _no_file(make: Callable[[Path], object]) -> Callable[[Play], None]:
    def act(play: Play) -> None:
        data = classes_in(play.here / "data", 6)
        make(data / "cat" / "x.jpg")
        found, rows = checked(play, data), classified(play, data)
        play.expect(count(found) == 12 and len(rows) == 12, f"{count(found)} pictures and {len(rows)} rows of 12")
        play.expect("pipes, sockets or devices: 1" in notes(found), "it is not said")

    return act


def _socket(path: Path) -> None:
    place = os.getcwd()
    os.chdir(path.parent)  # a socket's name is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(place)


def _named_pipe(play: Play) -> None:
    os.mkfifo(play.here / "x.jpg")
    rows = classified(play, play.here / "x.jpg", next((play.stage.data / "test" / "cat").iterdir()))
    play.expect(len(rows) == 2 and len(bad(rows)) == 1, f"{len(rows)} rows, {len(bad(rows))} bad, not 2 and 1")


def _hidden(play: Play) -> None:
    data = classes_in(play.here / "data", 6)
    for name in (".DS_Store", "._00.png", "Thumbs.db", "desktop.ini"):
        (data / "cat" / name).write_bytes(b"\0\1")
    fill(data / "__MACOSX" / "cat", 2, 5)
    fill(data / ".thumbnails", 2, 6)
    found, rows = checked(play, data), classified(play, data)
    play.expect(found.get("classes") == ["cat", "dog"], f"classes {found.get('classes')}")
    play.expect(count(found) == 12 and len(rows) == 12, f"{count(found)} pictures and {len(rows)} rows of 12")


def _loose(play: Play) -> None:
    data = classes_in(play.here / "data", 6)
    fill(data, 3, 7)
    found = checked(play, data)
    play.expect(count(found) == 12, f"{count(found)} pictures of 12")
    play.expect("images beside the class folders: 3" in notes(found), "they are not said")


def _closed_folder(play: Play) -> None:
    data = classes_in(play.here / "data", 6)
    (data / "cat" / "notes.txt").write_text("x")
    (data / "cat" / "deeper").mkdir()
    fill(data / "cat" / "deeper" / "still", 2, 9)
    found = checked(play, data)
    play.expect(count(found) == 14, f"{count(found)} pictures of 14")
    play.expect("without an image's extension: 1" in notes(found), "the text file is not said")


# ---------------------------------------------------------------- splits and classes


def _named(*names: str) -> Callable[[Play], None]:
    """Split folders by these names: 8, 3 and 3 pictures of each class."""

    def act(play: Play) -> None:
        data, counts = play.here / "data", (8, 3, 3)
        for number, name in enumerate(names):
            classes_in(data / name, counts[number], seed=number)
        found = checked(play, data)
        play.expect(found.get("classes") == ["cat", "dog"], f"classes {found.get('classes')}")
        got = [found.get(split) for split in ("train", "validation", "test")]
        right = [16, 6, 6] if len(names) == 3 else None
        play.expect(right is None or got == right, f"{got} pictures, not {right}")
        play.expect(len(names) == 3 or got[2] == 6, f"the test set has {got[2]} pictures, not 6")

    return act


def _two_of_one(play: Play) -> None:
    for name in ("train", "val", "validation"):
        classes_in(play.here / "data" / name, 3)
    play.refused(play.forked("check", play.here / "data"), "both val/ and validation/|both validation/ and val/")


def _nested(play: Play) -> None:
    for name in ("cat", "dog"):
        classes_in(play.here / "data" / name, 3)
    play.refused(play.forked("check", play.here / "data"), "cat")


def _in_two_splits(play: Play) -> None:
    data = splits_in(play.here / "data")
    (data / "test" / "cat" / "again.png").write_bytes((data / "train" / "cat" / "00.png").read_bytes())
    play.expect("in two splits" in notes(checked(play, data)), "it is not said by check")
    play.done(play.forked(*play.stage.training(play.here / "run", data=data)), "in two splits")


def _with_two_labels(play: Play) -> None:
    data = splits_in(play.here / "data")
    (data / "train" / "dog" / "again.png").write_bytes((data / "train" / "cat" / "00.png").read_bytes())
    play.expect("with different labels" in notes(checked(play, data)), "it is not said by check")
    play.done(play.forked(*play.stage.training(play.here / "run", data=data)), "with different labels")


def _one_image(play: Play) -> None:
    data = classes_in(play.here / "data", 8)
    fill(data / "bird", 1, 3)
    found = checked(play, data)
    play.expect("stay in train" in notes(found) and "bird (1)" in notes(found), "no note on the class of one image")
    play.done(play.forked(*play.stage.training(play.here / "run", data=data)), "bird")


def _one_class(play: Play) -> None:
    fill(play.here / "data" / "cat", 5, 1)
    play.refused(play.forked("check", play.here / "data"), "only 1 class")


def _empty_class(play: Play) -> None:
    data = splits_in(play.here / "data")
    (data / "train" / "bird").mkdir()
    play.refused(play.forked("check", data), "bird")


def _empty_folder(play: Play) -> None:
    (play.here / "data").mkdir()
    for words in (("check", play.here / "data"), play.stage.training(play.here / "run", data=play.here / "data")):
        play.refused(play.forked(*words), "no images found")


def _other_classes(play: Play) -> None:
    data = splits_in(play.here / "data")
    fill(data / "val" / "bird", 2, 3)
    play.refused(play.forked("check", data), "bird")


def _evaluate_one_split(play: Play) -> None:
    splits_in(play.here / "data")
    os.rename(play.here / "data" / "test", play.here / "test")
    play.done(play.forked("evaluate", play.stage.run, "--data-dir", play.here / "test", "-j", "0"), "6 images|of 6")


def _evaluate_few(play: Play) -> None:
    classes_in(play.here / "data", 1)
    play.done(play.forked("evaluate", play.stage.run, "--data-dir", play.here / "data", "-j", "0"), "2 images|of 2")


# ---------------------------------------------------------------- single pictures


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, rows: int | None = None, *, idat: bytes | None = None) -> bytes:
    """A gray PNG whose stream holds only so many rows."""
    raw = (b"\0" + b"\x50" * width) * (height if rows is None else rows)
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = _chunk(b"IHDR", head) + _chunk(b"IDAT", zlib.compress(raw, 9) if idat is None else idat)
    return b"\x89PNG\r\n\x1a\n" + body + _chunk(b"IEND", b"")


GIF = b"GIF89a" + struct.pack("<HHBBB", 10, 10, 0, 0, 0) + b"\x2c" + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0x80)
GIF += b"\0\0\0\xff\xff\xff\x02\x02\x4c\x01\0\x3b"
BMP = (
    b"BM"
    + struct.pack("<IHHI", 70, 0, 0, 54)
    + struct.pack("<IiiHHIIiiII", 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0)
)


def tiff(width: int, height: int, *, strip: tuple[int, int] = (200, 12)) -> bytes:
    """A gray TIFF of one strip that begins and is as long as is said."""
    offset, length = strip
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, offset), (277, 3, 1)]
    tags += [(278, 4, height), (279, 4, length)]
    body = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return (b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + struct.pack("<I", 0)).ljust(200, b"\0") + b"\1" * 12


def _hostile(name: str, make: Callable[[], bytes]) -> Callable[[Play], None]:
    """One picture among good ones: a bad row with a reason, a listed bad file, and a training that goes on."""

    def act(play: Play) -> None:
        data = splits_in(play.here / "data")
        (data / "train" / "cat" / name).write_bytes(make())
        rows = classified(play, data / "train")
        play.expect(len(rows) == 17, f"{len(rows)} rows for 17 pictures")
        play.expect(len(bad(rows)) == 1, f"{len(bad(rows))} bad rows, not 1")
        found = checked(play, data)
        listed = found.get("bad")
        play.expect(isinstance(listed, list) and len(listed) == 1 and name in listed[0], f"listed as bad: {listed}")
        play.done(play.forked(*play.stage.training(play.here / "run", data=data)))

    return act


def _thin(width: int, height: int) -> Callable[[Play], None]:
    def act(play: Play) -> None:
        (play.here / "thin.png").write_bytes(png(width, height))
        rows = classified(play, play.here / "thin.png", limits=Limits())
        play.expect(len(rows) == 1 and not bad(rows), f"bad: {bad(rows)}")
        peak = play.seen[-1].peak_mb
        play.expect(peak < CLASSIFY_MB, f"{peak:.0f} MB of memory")

    return act


def _deep(play: Play) -> None:
    data = play.here / "data"
    for at, name in enumerate(("cat", "dog")):
        (data / name).mkdir(parents=True)
        for number in range(6):
            values = np.random.default_rng(10 * at + number).integers(0, 4096, (24, 28), dtype=np.uint16)
            Image.fromarray(values).save(data / name / f"{number}.png")
    play.expect("use 12 at most" in notes(checked(play, data)), "no note on 12 bits in 16")


def _rare(play: Play) -> None:
    folder = play.here / "data"
    folder.mkdir()
    kinds = {"tif": "TIFF", "ppm": "PPM", "bmp": "BMP", "gif": "GIF", "webp": "WEBP", "jpg": "JPEG"}
    kinds |= {"jp2": "JPEG2000"} if features.check("jpg_2000") else {}
    kinds |= {"avif": "AVIF"} if features.check("avif") else {}
    for ending, kind in kinds.items():
        (folder / f"x.{ending}").write_bytes(encoded(picture(1, size=(64, 64)), kind))
    (folder / "cmyk.jpg").write_bytes(encoded(picture(2).convert("CMYK"), "JPEG"))
    rows = classified(play, folder)
    play.expect(len(rows) == len(kinds) + 1 and not bad(rows), f"{len(rows)} rows, bad: {bad(rows)}")


def _few_files(play: Play) -> None:
    data = classes_in(play.here / "data", 30)
    classify = ("classify", data, "--model", play.stage.artifact, "--workers", "8")
    for most in (12, 16, 24, 40):
        seen = play.fresh(*classify, limits=Limits(files=most))
        if seen.code == 0:
            play.expect(
                not bad(rows_of(seen)), f"with {most} files open pictures are called bad: {bad(rows_of(seen))[:1]}"
            )
        else:
            play.expect(seen.code == 2 and seen.err.count("\n") == 1, f"with {most} files open: {seen.err[-200:]!r}")
        seen = play.fresh("check", data, limits=Limits(files=most))
        if seen.code == 0:
            play.expect("bad:" not in seen.out, f"with {most} files open pictures are listed as bad")
        else:
            play.expect(seen.code == 2 and seen.err.count("\n") == 1, f"with {most} files open: {seen.err[-200:]!r}")


def _bad_rate(play: Play) -> None:
    data = splits_in(play.here / "data")
    for number in range(4):
        (data / "train" / "cat" / f"{number:02d}.png").write_bytes(b"")
    play.refused(play.forked(*play.stage.training(play.here / "run", data=data)), "4 of 16 train images")
    play.done(play.forked(*play.stage.training(play.here / "run2", "--max-bad-rate", "0.5", data=data)), "left out")
    words = ("classify", data / "train", "--model", play.stage.artifact, "--max-bad-rate", "0.1")
    seen = play.forked(*words)
    play.expect(seen.code == 2 and "4 of 16 images are bad" in seen.err, f"classify said {seen.line}")
    play.expect(len(rows_of(seen)) == 16, f"{len(rows_of(seen))} rows for 16 pictures")
    found = checked(play, data)
    play.expect(len(found.get("bad") or ()) == 4, "check does not list four bad files")  # type: ignore[arg-type]


# ---------------------------------------------------------------- names

ODD = (
    b"\xff\xfe",
    b"two\nlines",
    b"\x1b[31mred",
    b"=1+1",
    b"+1",
    b"-1",
    b"@SUM(A1)",
    b'a,b"c',
    "\u202egnp".encode(),
    b"\r",
)
"""Names of files and of classes."""


def _odd_files(play: Play) -> None:
    data = play.here / "data"
    data.mkdir()
    for number, name in enumerate(ODD):
        Path(os.fsdecode(os.fsencode(data) + b"/" + name + b".png")).write_bytes(encoded(picture(number), "PNG"))
    seen = play.forked("classify", data, "--model", play.stage.artifact)
    play.done(seen)
    lines = seen.out.split("\n")[1:-1]
    play.expect(len(lines) == len(ODD), f"{len(lines)} lines for {len(ODD)} pictures")
    output = play.here / "rows.csv"
    names = sorted(Path(os.fsdecode(each)).name for each in os.listdir(os.fsencode(data)))
    given = b"".join(os.fsencode(name) + b"\n" for name in names if "\n" not in name and "\r" not in name)
    for name in names:
        (play.talk / name).write_bytes((data / name).read_bytes())
    words = ("classify", "-", "--model", play.stage.artifact, "--output", output)
    play.done(play.fresh(*words, stdin=given))
    cells = [row["path"] for row in csv.DictReader(output.open(encoding="utf-8", errors="surrogateescape", newline=""))]
    play.expect(len(cells) == given.count(b"\n"), f"{len(cells)} rows for {given.count(10)} names")
    play.expect(not [each for each in cells if each[:1] in "=+-@"], "a cell is a formula")
    play.done(play.fresh(*words, "--resume", stdin=given))
    again = output.read_bytes().count(b"\n")
    play.expect(again == len(cells) + 1, f"{again - 1} rows after a resume, not {len(cells)}")


def _odd_classes(play: Play) -> None:
    data = play.here / "data"
    names = (*ODD, b"<script>alert(1)</script>"[:8], b"a|b", b"`x`")
    for number, name in enumerate(names):
        fill(Path(os.fsdecode(os.fsencode(data) + b"/" + name.replace(b"/", b""))), 5, number)
    play.done(play.forked("check", data))
    play.done(play.forked(*play.stage.training(play.here / "run", data=data)))
    play.done(play.forked("evaluate", play.here / "run", "--data-dir", data, "-j", "0", "--confusion"))
    play.done(play.forked("export", play.here / "run", "--output", play.here / "made"))
    play.done(play.forked("report", play.here / "run"))
    card = (play.here / "made" / "README.md").read_text(encoding="utf-8")
    play.expect("<script" not in card and "\x1b" not in card, "the model card holds what a class is called, as it is")
    some = next((data / "a|b").iterdir())
    seen = play.forked("classify", some, "--model", play.here / "made", "--top", str(len(names)))
    play.done(seen)
    play.expect(seen.out.count("\n") == 2, "a row is no one line")
    page = next((play.here / "run").glob("*.html")).read_text(encoding="utf-8")
    play.expect("<script><" not in page and "\x1b" not in page, "the report holds what a class is called, as it is")


def _not_there(play: Play) -> None:
    for words in (("check", "no\nwhere\x1b[1m"), ("classify", b"\xff.png", "--model", play.stage.artifact)):
        play.refused(play.forked(*words), "does not exist")


ACCIDENTS = [
    Accident(name="links/loop", did="ln -s . cat/loop; check and classify", act=_loop),
    Accident(name="links/two loops", did="two classes that link to each other", act=_two_loops),
    Accident(name="links/linked class", did="a class folder that is a link", act=_linked_class),
    Accident(name="links/broken", did="links to nowhere and to itself", act=_broken_links),
    Accident(name="links/train", did="train over a loop and a pipe", act=_loop_trains),
    Accident(name="files/pipe", did="mkfifo cat/x.jpg; check and classify", act=_no_file(os.mkfifo)),
    Accident(name="files/socket", did="a socket called x.jpg", act=_no_file(_socket)),
    Accident(
        name="files/device", did="x.jpg links to /dev/zero", act=_no_file(lambda path: os.symlink("/dev/zero", path))
    ),
    Accident(name="files/pipe by name", did="classify a pipe that is named itself", act=_named_pipe),
    Accident(name="files/hidden", did=".DS_Store, ._x.png, Thumbs.db, __MACOSX/", act=_hidden),
    Accident(name="files/loose", did="pictures beside class folders", act=_loose),
    Accident(name="files/deeper", did="folders in folders, a text file among pictures", act=_closed_folder),
    Accident(name="splits/Train Test", did="Train/ and Test/", act=_named("Train", "Test")),
    Accident(name="splits/Val", did="train/, Val/ and test/", act=_named("train", "Val", "test")),
    Accident(name="splits/synonyms", did="TRAINING/, dev/ and Testing/", act=_named("TRAINING", "dev", "Testing")),
    Accident(name="splits/twice", did="val/ and validation/", act=_two_of_one),
    Accident(name="splits/nested", did="class folders that hold the same class folders", act=_nested),
    Accident(name="splits/other classes", did="a class in val/ that train/ lacks", act=_other_classes),
    Accident(name="splits/copies", did="the same picture in train and test", act=_in_two_splits),
    Accident(name="splits/two labels", did="the same picture as cat and dog", act=_with_two_labels),
    Accident(name="splits/one image", did="a class of one image", act=_one_image),
    Accident(name="splits/one class", did="one class", act=_one_class),
    Accident(name="splits/empty class", did="an empty class folder", act=_empty_class),
    Accident(name="splits/empty", did="an empty folder; check and train", act=_empty_folder),
    Accident(name="splits/evaluate one", did="evaluate a folder called test, alone", act=_evaluate_one_split),
    Accident(name="splits/evaluate few", did="evaluate a picture of each class", act=_evaluate_few),
    *(
        Accident(
            name=f"pictures/{name}", did=f"{did}, among good ones: classify, check, train", act=_hostile(file, make)
        )
        for name, file, did, make in (
            ("gif", "x.gif", "a GIF of 37 bytes with a frame of 65,535 x 65,535", lambda: GIF),
            ("png bomb", "x.png", "a PNG that says 60,000 x 60,000", lambda: png(60_000, 60_000, 1)),
            ("png rows", "x.png", "a PNG whose stream ends early, its checksums right", lambda: png(40, 40, 20)),
            ("png stream", "x.png", "a PNG whose stream is no zlib", lambda: png(40, 40, idat=b"\1\2\3")),
            ("bmp", "x.bmp", "a BMP that says 60,000 x 60,000", lambda: BMP),
            ("tiff large", "x.tif", "a TIFF that says 4 billion pixels a side", lambda: tiff(2**32 - 1, 2**32 - 1)),
            (
                "tiff strip",
                "x.tif",
                "a TIFF whose pixels lie beyond its end",
                lambda: tiff(40, 40, strip=(2**31, 1600)),
            ),
            ("tiff circle", "x.tif", "a TIFF whose pixels are its own header", lambda: tiff(40, 40, strip=(0, 1600))),
            ("jpeg cut", "x.jpg", "half a JPEG", lambda: encoded(picture(1), "JPEG")[:400]),
            ("webp cut", "x.webp", "half a WebP", lambda: encoded(picture(1), "WEBP")[:300]),
            ("png cut", "x.png", "half a PNG", lambda: encoded(picture(1), "PNG")[:300]),
            ("empty", "x.jpg", "an empty file", lambda: b""),
            ("text", "x.png", "a text called x.png", lambda: b"<html>not found</html>"),
            (
                "noise",
                "x.jpg",
                "random bytes behind a JPEG's first ones",
                lambda: b"\xff\xd8\xff\xe0" + bytes(range(256)) * 9,
            ),
        )
    ),
    Accident(name="pictures/thin", did="classify a PNG of 1 x 65,000", act=_thin(1, 65_000)),
    Accident(name="pictures/wide", did="classify a PNG of 65,000 x 1", act=_thin(65_000, 1)),
    Accident(name="pictures/12 bits", did="12-bit values in 16-bit PNGs", act=_deep),
    Accident(name="pictures/rare kinds", did="TIFF, PPM, BMP, GIF, WebP, JPEG 2000, AVIF, CMYK", act=_rare),
    Accident(name="pictures/few files", did="ulimit -n 12 to 40; classify and check", act=_few_files),
    Accident(name="pictures/bad rate", did="a quarter of a class is empty files; --max-bad-rate", act=_bad_rate),
    Accident(name="names/files", did="no UTF-8, ends of lines, escapes, = + - @ in names of files", act=_odd_files),
    Accident(name="names/classes", did="the same and HTML in names of classes: train to report", act=_odd_classes),
    Accident(name="names/not there", did="such names of what is not there", act=_not_there),
]
