"""Every command that writes, where it can not: full and read-only disks, files for folders, long names, links."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.accidents.play import Accident, Limits, Play, Seen, Word, digest, into_full, start, wait
from benchmarks.accidents.stage import bind_read_only, classes_in, log_of, long_training, mount, saved, unmount, until


class Skipped(Exception):
    """An accident that this user can not cause here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Writer:
    """A command that writes."""

    name: str
    """Of its row."""
    words: Callable[[Play, Path], tuple[Word, ...]]
    """With the output's path."""
    output: str = "made"
    """What the output is called."""
    minimal: int = 0
    """Bytes that it writes at least; a disk that is full has fewer."""
    late: bool = False
    """It works for long before it writes, so that only what it refuses at its start is played."""


def _report(play: Play, output: Path) -> tuple[Word, ...]:
    return ("report", "--records", play.stage.records, "--output", output)


_FIT = ("--scratch", "--epochs", "1", "--min-throughput", "10")
WRITERS = (
    Writer(
        name="scale", output="made.yaml",
        words=lambda play, out: ("scale", "resnet18", "--phi", "0", "--output", out),
    ),
    Writer(name="recipes", output="made.yaml", words=lambda play, out: ("recipes", "small", "--output", out)),
    Writer(
        name="measure", output="made.jsonl",
        words=lambda play, out: (
            "measure", play.stage.spec, "--runtime", "eager", "-b", "1", "--seconds", "0.01", "--record", out,
        ),
    ),
    Writer(
        name="measure table", output="made.csv",
        words=lambda play, out: (
            "measure", play.stage.spec, "--runtime", "eager", "-b", "1", "--seconds", "0.01", "--record", out,
        ),
    ),
    Writer(
        name="calibrate", output="made.json",
        words=lambda play, out: ("calibrate", "--measurement", play.stage.records, "--output", out),
    ),
    Writer(
        name="choose", output="made.html",
        words=lambda play, out: (
            "choose", "--device", "h100", "--model", "resnet18", "--min-throughput", "100", "--output", out,
        ),
    ),
    Writer(
        name="choose scale", output="made.yaml",
        words=lambda play, out: (
            "choose", "--device", "h100", "--scale", "resnet18", "--min-throughput", "1000", "--output", out,
        ),
    ),
    Writer(
        name="choose kit",
        words=lambda play, out: (
            "choose", "--device", "t4", "--model", "mobilenetv2_050", "--min-throughput", "100", "--kit", out,
        ),
    ),
    Writer(name="train", words=lambda play, out: play.stage.training(out)),
    Writer(name="export", words=lambda play, out: ("export", play.stage.run, "--output", out)),
    Writer(
        name="classify", output="made.csv",
        words=lambda play, out: (
            "classify", play.stage.data / "test", "--model", play.stage.artifact, "--output", out, "--workers", "1",
        ),
    ),
    Writer(name="report", output="made.html", words=_report),
    Writer(name="report run", output="made.html", words=lambda play, out: ("report", play.stage.run, "--output", out)),
    Writer(
        name="fit", words=lambda play, out: ("fit", "--data-dir", play.stage.data, "--output", out, *_FIT), late=True
    ),
    Writer(name="demo", words=lambda play, out: ("demo", "--output", out, "--max-minutes", "0.1"), late=True),
)  # fmt: skip


def _refused(play: Play, writer: Writer, seen: Seen, *words: str) -> None:
    """One line that is ours, at the end, and exit code 2. What a run told on its way may stand before it."""
    play.expect(seen.code == 2, f"{writer.name}: exit code {seen.code}: {seen.line}")
    play.expect(seen.line.startswith("convscale: "), f"{writer.name}: the last line is {seen.line!r}")
    play.expect(seen.err.count("convscale: ") == 1, f"{writer.name}: said more than once")
    for word in words:
        play.expect(re.search(word, seen.line), f"{writer.name}: {word!r} is not said: {seen.line}")


@contextmanager
def disk(play: Play, *, size: str = "1m", read_only: bool = False) -> Iterator[Path]:
    """A disk of its own."""
    place = play.here / "disk"
    if not mount(place, size=size, read_only=read_only):
        raise Skipped("this user may not mount a disk")
    try:
        yield place
    finally:
        unmount(place)


# ---------------------------------------------------------------- one accident, each command


def _full(writer: Writer) -> Callable[[Play], None]:
    def act(play: Play) -> None:
        words = writer.words(play, play.here / "disk" / writer.output)
        with disk(play, size="64k") as place:
            for free in (0, 4096):
                _fill(place, free)
                seen = play.forked(*words)
                if not (free and seen.code == 0):  # what is small finds room there
                    _refused(play, writer, seen, "o space left|are needed")
                left = [path.name for path in place.iterdir() if path.name not in ("ballast", writer.output)]
                play.expect(not left, f"{writer.name} leaves {left[:3]}")
                shutil.rmtree(place / writer.output, ignore_errors=True)
                (place / "ballast").unlink()

    return act


def _fill(place: Path, free: int) -> None:
    """All but so many bytes; with a page free an output can be begun and not finished."""
    with open(place / "ballast", "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError:
            file.truncate(file.tell() // 4096 * 4096 - free)


def _read_only(writer: Writer) -> Callable[[Play], None]:
    def act(play: Play) -> None:
        words = writer.words(play, play.here / "disk" / writer.output)
        with disk(play, read_only=True):
            _refused(play, writer, play.forked(*words))

    return act


def _below_file(writer: Writer) -> Callable[[Play], None]:
    """The folder that would hold the output is a file; the output is a folder where a file is meant, or the reverse."""

    def act(play: Play) -> None:
        (play.here / "taken").write_text("precious")
        play.keeps(play.here / "taken")
        _refused(play, writer, play.forked(*writer.words(play, play.here / "taken" / writer.output)))
        other = play.here / f"other-{writer.output}"
        if "." in writer.output:
            other.mkdir()
            (other / "precious").write_text("precious")
        else:
            other.write_text("precious")
        play.keeps(other)
        _refused(play, writer, play.forked(*writer.words(play, other)))

    return act


def _long_name(writer: Writer) -> Callable[[Play], None]:
    def act(play: Play) -> None:
        out = play.here / ("n" * 300 + writer.output)
        _refused(play, writer, play.forked(*writer.words(play, out)))
        deep = play.here.joinpath(*["d" * 200] * 25, writer.output)
        _refused(play, writer, play.forked(*writer.words(play, deep)))

    return act


def _link(writer: Writer) -> Callable[[Play], None]:
    """The output is a link to where it should be: the link stays, and what it leads to is written."""

    def act(play: Play) -> None:
        real, out = play.here / "real" / writer.output, play.here / writer.output
        real.parent.mkdir()
        if "." not in writer.output:
            real.mkdir()
        os.symlink(real, out)
        seen = play.forked(*writer.words(play, out))
        play.expect(seen.code == 0, f"{writer.name}: exit code {seen.code}: {seen.line}")
        play.expect(out.is_symlink(), f"{writer.name} puts its output in the place of the link")
        full = real.stat().st_size if real.is_file() else any(real.iterdir())
        play.expect(full, f"{writer.name} writes nothing where the link leads")

    return act


def _link_to_nowhere(writer: Writer) -> Callable[[Play], None]:
    """A link into a folder that is not there, and one to itself."""

    def act(play: Play) -> None:
        os.symlink("itself", play.here / "itself")
        _refused(play, writer, play.forked(*writer.words(play, play.here / "itself" / writer.output)))

    return act


def _foreign_output(writer: Writer) -> Callable[[Play], None]:
    """What stands there already is the user's own."""

    def act(play: Play) -> None:
        out = play.here / writer.output
        out.mkdir()
        (out / "precious.txt").write_text("precious")
        play.keeps(out)
        for more in ((), ("--overwrite",), ("--resume",)):
            if more == ("--resume",) and writer.name not in ("train", "fit"):
                continue
            if more and writer.name == "demo":
                continue
            _refused(play, writer, play.forked(*writer.words(play, out), *more))

    return act


def _no_home(writer: Writer) -> Callable[[Play], None]:
    """No HOME, one that is not there, one that can not be written."""

    def act(play: Play) -> None:
        for number, home in enumerate((None, "", "/nonexistent/home", "/proc")):
            env = {"HOME": home, "XDG_CACHE_HOME": None, "CONVSCALE_CACHE": None}
            out = play.here / f"{number}-{writer.output}"
            seen = play.forked(*writer.words(play, out), env=env)
            play.expect(seen.code == 0, f"HOME={home}: exit code {seen.code}: {seen.line}")
            play.expect(out.exists(), f"HOME={home}: nothing is written")

    return act


# ---------------------------------------------------------------- single ones


def _full_output(play: Play) -> None:
    """What is printed goes to a disk that is full."""
    if not os.path.exists("/dev/full"):
        raise Skipped("there is no /dev/full")
    for words in (
        ("list",),
        ("show", "resnet18"),
        ("classify", play.stage.data / "test", "--model", play.stage.artifact),
        ("check", play.stage.data),
    ):
        seen = into_full(words, play.talk, number=len(play.seen))
        play.took(seen, words)
        play.expect(seen.code == 2, f"{words[0]}: exit code {seen.code}: {seen.line}")
        play.expect(seen.one_line, f"{words[0]}: not one line: {seen.err[-300:]!r}")


def _full_resumes(play: Play) -> None:
    """`classify` on a disk that fills: what is done stays, and a resume ends with each row once."""
    data = classes_in(play.here / "data", 150)
    words = ("classify", data, "--model", play.stage.artifact, "-b", "8", "--workers", "1", "--output")
    with disk(play, size="16k") as place:
        seen = play.forked(*words, place / "rows.csv")
        play.expect(seen.code == 2 and "no space left" in seen.line, f"exit code {seen.code}: {seen.line}")
        play.expect("--resume" in seen.line, f"what to do is not said: {seen.line}")
        rows = (place / "rows.csv").read_bytes()
        play.expect(rows.count(b"\n") > 8, f"only {rows.count(10)} lines are kept")
        (play.here / "rows.csv").write_bytes(rows)
    play.done(play.forked(*words, play.here / "rows.csv", "--resume"))
    paths = [line.split(b",")[0] for line in (play.here / "rows.csv").read_bytes().splitlines()[1:]]
    play.expect(len(paths) == 300 and len(set(paths)) == 300, f"{len(paths)} rows, {len(set(paths))} unlike, of 300")


def _full_training(play: Play) -> None:
    """The disk of a training fills between two saves: one line, and the states of before are whole."""
    with disk(play, size="64m") as place:
        run = place / "run"
        words = long_training(play, run)
        child = start(words, play.talk, number=90)
        play.expect(until(lambda: saved(run)), "nothing is saved")
        _fill(place, 0)
        seen = play.took(wait(child, play.talk, number=90), words)
        play.expect(seen.code == 2 and "o space left" in seen.line, f"exit code {seen.code}: {seen.line}")
        (place / "ballast").unlink()
        child = start((*words, "--resume"), play.talk, number=91)
        before, log = len(log_of(run)), run / "log.jsonl"
        further = until(lambda: child.poll() is not None or (log.is_file() and log.read_bytes().count(b"\n") > before))
        play.expect(further, "a resume trains nothing")
        child.send_signal(signal.SIGTERM)
        seen = play.took(wait(child, play.talk, number=91), words)
        play.expect(seen.code == 130, f"the resumed run ends with {seen.code}: {seen.line}")
        epochs = [row["epoch"] for row in log_of(run)]
        play.expect(epochs == [*range(1, len(epochs) + 1)], f"epochs in the log: {epochs}")


def _tune_read_only(play: Play) -> None:
    """``tune`` writes into the artefact."""
    made = play.stage.copy(play.stage.artifact, play)
    before = digest(made)
    if not bind_read_only(made):
        raise Skipped("this user may not mount a folder read-only")
    try:
        seen = play.forked("tune", made, "-b", "1", "--threads", "1")
    finally:
        unmount(made)
    play.expect(seen.code == 2 and seen.line.startswith("convscale: "), f"exit code {seen.code}: {seen.line}")
    play.expect(digest(made) == before, "the artefact changed")


def _memory(play: Play) -> None:
    """``ulimit -v``: a result, or one line."""
    commands: tuple[tuple[Word, ...], ...] = (
        ("count", "resnet50"),
        ("measure", "resnet50", "--runtime", "eager", "-b", "64", "--seconds", "0.01"),
        ("classify", play.stage.data / "test", "--model", play.stage.artifact),
        play.stage.training(play.here / "run", "--set", "image_size=512", "-b", "16"),
    )
    for words in commands:
        for megabytes in (400, 900, 1500):
            seen = play.fresh(*words, limits=Limits(memory=megabytes * 2**20))
            play.expect(
                seen.code in (0, 2), f"{words[0]} in {megabytes} MB: exit code {seen.code}: {seen.err[-200:]!r}"
            )
            play.expect(seen.code == 0 or seen.line.startswith("convscale: "), f"{words[0]}: {seen.line}")


_QUICK = tuple(writer for writer in WRITERS if not writer.late)
_HOME = tuple(
    writer
    for writer in _QUICK
    if writer.name in ("scale", "measure", "calibrate", "choose", "train", "export", "classify", "report")
)
_FOLDERS = tuple(writer for writer in WRITERS if "." not in writer.output)


def _each(
    group: str, did: str, make: Callable[[Writer], Callable[[Play], None]], among: tuple[Writer, ...]
) -> list[Accident]:
    return [Accident(name=f"{group}/{writer.name}", did=did, act=make(writer)) for writer in among]


ACCIDENTS = [
    *_each("full disk", "the output's disk is full, then full but for a page", _full, _QUICK),
    *_each("read-only", "the output's disk is read-only", _read_only, WRITERS),
    *_each("file and folder", "a file where a folder should be, and the reverse", _below_file, WRITERS),
    *_each("long names", "a name of 300 characters, a path of 5,000", _long_name, WRITERS),
    *_each("linked", "the output is a link to where it goes", _link, _QUICK),
    *_each("circle", "the output lies below a link to itself", _link_to_nowhere, WRITERS),
    *_each("user's own", "the output is a folder of the user's; --overwrite, --resume", _foreign_output, _FOLDERS),
    *_each("no home", "HOME unset, empty, not there, not to be written", _no_home, _HOME),
    Accident(name="full disk/printed", did="standard output on a full disk", act=_full_output),
    Accident(name="full disk/classify resumes", did="the disk fills while rows come; --resume", act=_full_resumes),
    Accident(name="full disk/training", did="the disk fills while a training saves", act=_full_training),
    Accident(name="read-only/tune", did="the artefact's folder is read-only", act=_tune_read_only),
    Accident(name="memory/ulimit", did="ulimit -v 400 to 1500 MB: count, measure, classify, train", act=_memory),
]  # fmt: skip
