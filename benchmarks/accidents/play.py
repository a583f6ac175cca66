"""How an accident is played: a folder of its own, commands with a limit on their time, and what must hold of each."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import resource
import select
import shutil
import signal
import stat
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.accidents.stage import Stage

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 60.0
"""A command that takes longer hangs, and is killed."""
_TORCH_THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

Word = str | bytes | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a command did."""

    code: int | None
    """Its exit code, negative for a signal; None where it was killed for its time."""
    out: str
    """Standard output; bytes that are no UTF-8 as surrogates."""
    err: str
    """Standard error."""
    seconds: float
    """From its start to its end, by the clock."""
    peak_mb: float = 0.0
    """Its largest resident memory, in 10**6 bytes; 0 where the command was not alone in its process."""

    @property
    def line(self) -> str:
        """What it said at its end: the last line of standard error."""
        return (self.err.strip().splitlines() or [""])[-1]

    @property
    def hung(self) -> bool:
        """Whether it had to be killed."""
        return self.code is None

    @property
    def traceback(self) -> bool:
        """Whether it ended with a traceback."""
        return "Traceback (most recent call last)" in self.out + self.err

    @property
    def one_line(self) -> bool:
        """Whether standard error is one line of ours."""
        return len(self.err.strip().splitlines()) == 1 and self.err.startswith("convscale: ")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the system grants a command."""

    files: int | None = None
    """``ulimit -n``."""
    memory: int | None = None
    """``ulimit -v``, in bytes."""

    def set(self) -> None:
        """For this process."""
        for kind, most in ((resource.RLIMIT_NOFILE, self.files), (resource.RLIMIT_AS, self.memory)):
            if most is not None:
                resource.setrlimit(kind, (most, most))


def environment(changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """This process's, with one thread, no hub, no cache of the user's; None takes a name away."""
    found: dict[str, str | None] = {**os.environ, **_TORCH_THREADS, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    found["PYTHONPATH"] = str(ROOT)
    found |= changes or {}
    return {name: value for name, value in found.items() if value is not None}


def start(
    words: Sequence[Word], place: Path, *, number: int = 0, env: Mapping[str, str | None] | None = None,
    limits: Limits = Limits(), stdin: int = subprocess.DEVNULL, module: str = "convscale.cli",
) -> subprocess.Popen[bytes]:  # fmt: skip
    """``convscale WORDS`` in a process of its own; what it says goes to files in ``place``, for :func:`wait`."""
    command = [sys.executable, "-m", module, *map(os.fsencode, words)]
    with open(place / f"{number}.out", "wb") as out, open(place / f"{number}.err", "wb") as err:
        return subprocess.Popen(
            command, stdin=stdin, stdout=out, stderr=err, cwd=place, env=environment(env), preexec_fn=limits.set
        )


def wait(child: subprocess.Popen[bytes], place: Path, *, number: int = 0, limit_s: float = LIMIT_S) -> Seen:
    """Its end, or its killing; the seconds are from now on."""
    return _ended(child.pid, place, number, limit_s, lambda code: setattr(child, "returncode", code))


def _ended(pid: int, place: Path, number: int, limit_s: float, tell: Callable[[int], object]) -> Seen:
    begun = time.perf_counter()
    hung = not _ends_within(pid, limit_s)
    if hung:
        os.kill(pid, signal.SIGKILL)
    _, status, used = os.wait4(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    tell(code)
    said = [(place / f"{number}.{kind}").read_bytes().decode(errors="surrogateescape") for kind in ("out", "err")]
    return Seen(
        code=None if hung else code,
        out=said[0],
        err=said[1],
        seconds=time.perf_counter() - begun,
        peak_mb=used.ru_maxrss * 1024 / 1e6,
    )


def _ends_within(pid: int, limit_s: float) -> bool:
    """Whether a child ends in time; it is not reaped."""
    fd = os.pidfd_open(pid)
    try:
        return bool(select.select([fd], [], [], limit_s)[0])
    finally:
        os.close(fd)


def forked(
    words: Sequence[Word], place: Path, *, number: int = 0, env: Mapping[str, str | None] | None = None,
    limits: Limits = Limits(),
) -> Seen:  # fmt: skip
    """``convscale WORDS`` in a process that is forked from this one, which has torch and the command line loaded: all
    but Python's start and their imports is as in one of its own.
    """
    from convscale.cli import app  # loaded here, once

    with open(place / f"{number}.out", "wb") as out, open(place / f"{number}.err", "wb") as err:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _become(out.fileno(), err.fileno(), place, environment(env), limits)
                sys.argv = ["convscale", *(os.fsdecode(word) for word in words)]
                code = _main(app.main)
            finally:
                with suppress(OSError, ValueError):
                    sys.stdout.flush()
                with suppress(OSError, ValueError):
                    sys.stderr.flush()
                os._exit(code)
    return dataclasses.replace(_ended(pid, place, number, LIMIT_S, lambda _code: None), peak_mb=0.0)


def into_full(words: Sequence[Word], place: Path, *, number: int = 0) -> Seen:
    """``convscale WORDS`` in a process of its own, whose standard output goes to a device that is always full."""
    command = [sys.executable, "-m", "convscale.cli", *map(os.fsencode, words)]
    (place / f"{number}.out").touch()
    with open("/dev/full", "wb") as out, open(place / f"{number}.err", "wb") as err:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=place, env=environment()
        )
    return wait(child, place, number=number)


def _become(out: int, err: int, place: Path, env: dict[str, str], limits: Limits) -> None:
    nowhere = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nowhere, 0), (out, 1), (err, 2)):
        os.dup2(source, target)
    # As Python opens them at its start.
    sys.stdin = os.fdopen(0, encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    os.chdir(place)
    os.environ.clear()
    os.environ.update(env)
    limits.set()


def _main(main: Callable[[], object]) -> int:
    try:
        main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def digest(path: Path) -> str:
    """Of a file, or of all files below a folder, with their names; links by what they say."""
    found = hashlib.sha256()
    for each in sorted([path, *(path.rglob("*") if path.is_dir() and not path.is_symlink() else ())]):
        found.update(os.fsencode(each.relative_to(path)) + b"\0")
        if each.is_symlink():
            found.update(os.fsencode(os.readlink(each)))
        elif each.exists() and stat.S_ISREG(each.stat().st_mode):
            found.update(each.read_bytes())
    return found.hexdigest()


@dataclass(kw_only=True)
class Play:
    """One accident while it is played."""

    stage: Stage
    """What all accidents share."""
    here: Path
    """Its own folder, empty at first."""
    seen: list[Seen] = field(default_factory=list)
    """What its commands did."""
    said: list[str] = field(default_factory=list)
    """Their words, for the record."""
    problems: list[str] = field(default_factory=list)
    """What did not hold; none: it is held."""
    lost: list[str] = field(default_factory=list)
    """What should have stayed and is not as it was."""
    _kept: dict[Path, str] = field(default_factory=dict)

    def keeps(self, *paths: Path) -> None:
        """These files and folders must be at the end what they are now."""
        self._kept |= {path: digest(path) for path in paths}

    def expect(self, holds: object, otherwise: str) -> None:
        """Note a problem where something does not hold."""
        if not holds:
            self.problems.append(otherwise)

    def fresh(
        self, *words: Word, env: Mapping[str, str | None] | None = None, limits: Limits = Limits(), stdin: bytes = b""
    ) -> Seen:
        """``convscale WORDS`` in a process of its own."""
        given = subprocess.DEVNULL
        if stdin:
            (self.here / "given").write_bytes(stdin)
            given = os.open(self.here / "given", os.O_RDONLY)
        begun = time.perf_counter()
        child = start(words, self.talk, number=len(self.seen), env=env, limits=limits, stdin=given)
        if given >= 0:
            os.close(given)
        found = wait(child, self.talk, number=len(self.seen))
        return self.took(dataclasses.replace(found, seconds=time.perf_counter() - begun), words)

    def forked(self, *words: Word, env: Mapping[str, str | None] | None = None, limits: Limits = Limits()) -> Seen:
        """``convscale WORDS`` in a process that has its imports behind it."""
        return self.took(forked(words, self.talk, number=len(self.seen), env=env, limits=limits), words)

    def took(self, seen: Seen, words: Sequence[Word]) -> Seen:
        """Note what a command did, and what none may do."""
        self.seen.append(seen)
        self.said.append(" ".join(shown(os.fsdecode(word), self.stage.place) for word in words))
        self.expect(not seen.hung, "it hung")
        self.expect(not seen.traceback, f"a traceback: {seen.line}")
        self.expect(seen.code is None or seen.code in (0, 2, 3, 130), f"exit code {seen.code}: {seen.line}")
        self.expect("\x1b" not in seen.out + seen.err, "an escape sequence reached the terminal")
        return seen

    def refused(self, seen: Seen, *words: str, code: int = 2) -> None:
        """It must have ended with one line and exit code 2, and the line must hold these words."""
        self.expect(seen.code == code, f"exit code {seen.code}, not {code}: {seen.line}")
        self.expect(seen.one_line, f"not one line: {seen.err[-300:]!r}")
        for word in words:
            self.expect(re.search(word, seen.line), f"{word!r} is not said: {seen.line}")

    def done(self, seen: Seen, *words: str) -> None:
        """It must have ended well, and have said these."""
        self.expect(seen.code == 0, f"exit code {seen.code}, not 0: {seen.line}")
        for word in words:
            self.expect(re.search(word, seen.out + seen.err), f"{word!r} is not said")

    @property
    def talk(self) -> Path:
        """Where commands run and what they say is kept, out of the way of what they read."""
        place = self.here.with_name(f"{self.here.name}.talk")
        place.mkdir(exist_ok=True)
        return place

    def finish(self) -> None:
        """Compare what had to be kept, and tidy up."""
        for path, before in self._kept.items():
            if not os.path.lexists(path) or digest(path) != before:
                self.lost.append(shown(str(path), self.stage.place))
        for place in (self.here, self.talk):
            shutil.rmtree(place, ignore_errors=True)


def shown(text: str, place: Path) -> str:
    """A word of a command or of a message for the record: one line, without this machine's folders."""
    text = text.replace(f"{place}/", "").replace(str(ROOT), "")
    text = text.encode(errors="backslashreplace").decode()
    text = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
    return text if len(text) <= 240 else f"{text[:120]}...{text[-100:]}"


@dataclass(frozen=True, kw_only=True)
class Accident:
    """One way in which something goes wrong."""

    name: str
    """``group/what``."""
    did: str
    """What was done, in words."""
    act: Callable[[Play], object]
    """Does it and says what must hold."""
