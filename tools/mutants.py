"""Seeded breaks: does a named test fail when a line of the package is broken on purpose?

    python tools/mutants.py                      run all that were not run as they now are
    python tools/mutants.py --only 'predictor/*' those whose name matches; `--jobs 2` at a time
    python tools/mutants.py --list               the list, and nothing is run

The list is `tools/mutants/ROOM.yaml`: for each break a name, a file, an exact old text that stands there once, a new
text, and the ids of the tests that must notice (60 s of a processor together). Every break is made in a copy of the
tree in a temporary folder; the working tree is never touched. The named tests first run unbroken, all at once: a break
whose tests fail without it proves nothing.

`results/mutants.jsonl` holds one row for each break: killed (a test failed), survived (none did), timeout, stale (the
old text is not there exactly once), failing (the tests fail unbroken) or error (pytest could not run them). Only a
failed test counts as killed. A row is kept while the break, its file and its tests' files are what they were; other
code may have changed since. The exit code is 1 where less than 92 % of the breaks asked for are killed, or one is
stale, failing or was not run.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import importlib
import json
import math
import os
import queue
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple, NoReturn

import yaml

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 60.0
"""Processor seconds that the tests of one break may take, imports included; by the clock ten times as many."""
SHARE = 0.92
"""Of the breaks, at least this share is to be killed."""
PRELOAD = ("torch", "pytest")
"""What takes longest to import, and is no part of the tree."""
LEFT_OUT = (".git", ".venv", "__pycache__", "*.pyc", "build", "dist", "runs", "node_modules", ".cache", ".*_cache")
OUTCOMES = ("killed", "survived", "timeout", "stale", "failing", "error")


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One break."""

    name: str
    """``room/what is broken``."""
    file: str
    """Where, from the root."""
    old: str
    """The text that is replaced; it stands there exactly once."""
    new: str
    """What it becomes."""
    tests: tuple[str, ...]
    """Ids of the tests that must notice."""
    why: str = ""
    """For one that survives: why that is known and left so."""

    @property
    def room(self) -> str:
        """The part of the package that it is listed under."""
        return self.name.partition("/")[0]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one break."""

    name: str
    file: str
    tests: tuple[str, ...]
    digest: str
    """Of the break, its file and its tests' files: where it is another now, the row is old."""
    outcome: str
    """One of ``OUTCOMES``."""
    cpu_s: float
    """Processor time of the tests with the break, imports included."""
    said: str = ""
    """The first failed test, or why there is none."""


def load(folder: Path) -> list[Mutant]:
    """The list, by room.

    Raises:
        ValueError: a key is missing or unknown, a name comes twice, or nothing would change.
    """
    found: dict[str, Mutant] = {}
    for path in sorted(folder.glob("*.yaml")):
        for entry in yaml.safe_load(path.read_text(encoding="utf-8")) or ():
            name = f"{path.stem}/{entry.get('name')}"
            known, needed = {field.name for field in fields(Mutant)}, {"name", "file", "old", "new", "tests"}
            if not needed <= set(entry) <= known:
                raise ValueError(f"{path.name}: {name} has the keys {sorted(entry)}, {sorted(needed)} are needed")
            if name in found:
                raise ValueError(f"{path.name}: the name {name} comes twice")
            if entry["old"] == entry["new"] or not entry["tests"]:
                raise ValueError(f"{path.name}: {name} changes nothing, or names no test")
            found[name] = Mutant(**{**entry, "name": name, "tests": tuple(entry["tests"])})
    return list(found.values())


def digest_of(root: Path, mutant: Mutant) -> str:
    """Changes with the break, the file that it is in, and the files of its tests."""
    digest = hashlib.sha256(json.dumps([mutant.file, mutant.old, mutant.new, mutant.tests]).encode())
    for name in (mutant.file, *sorted({test.partition("::")[0] for test in mutant.tests})):
        path = root / name
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()[:16]


def broken(text: str, mutant: Mutant) -> str | None:
    """The file's text with the break; None where the old text is not there exactly once."""
    return text.replace(mutant.old, mutant.new) if text.count(mutant.old) == 1 else None


@contextmanager
def copy_of(root: Path) -> Iterator[Path]:
    """A copy of the tree in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(root, tree, ignore=shutil.ignore_patterns(*LEFT_OUT))
        # Compiled code that is checked by content: a file changed twice in one second is never taken for the old one.
        package = [sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "checked-hash", str(tree)]
        subprocess.run(package, check=False, capture_output=True)
        yield tree


class Tester:
    """Runs pytest in children of a process that has imported what takes longest: each starts as that was.

    Args:
        preload: modules that it imports; none of the tree.
    """

    def __init__(self, preload: Sequence[str] = PRELOAD) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", *preload]
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, tree: Path, tests: Sequence[str], limit_s: float) -> Outcome:
        """The named tests on a tree; what they cache ends with the call."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.TemporaryDirectory(prefix="mutants-cache-") as cache:
            asked = {"tree": str(tree), "tests": list(tests), "cache": cache, "limit_s": limit_s}
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            code, wall_s, cpu_s = json.loads(self._process.stdout.readline())
            said = (Path(cache) / "said.txt").read_text(encoding="utf-8", errors="replace")
        return Outcome(code, said, wall_s, cpu_s)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


class Outcome(NamedTuple):
    """How a run of pytest ended."""

    code: int | None
    """Its exit code; None: out of time."""
    said: str
    """What it printed."""
    wall_s: float
    cpu_s: float


def serve(preload: Sequence[str]) -> None:
    """``Tester``'s process: a line of JSON asks for a run, a line of JSON answers it."""
    for name in preload:
        importlib.import_module(name)
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.perf_counter()
        child = os.fork()
        if child == 0:
            seconds = math.ceil(asked["limit_s"])
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
            _become_pytest(asked["tree"], asked["tests"], asked["cache"])
        while True:
            ended, status, used = os.wait4(child, os.WNOHANG)
            late = time.perf_counter() - started > 10 * asked["limit_s"]
            if ended or late:
                break
            time.sleep(0.02)
        if not ended:
            os.killpg(child, signal.SIGKILL)  # the tests' own processes too; the group is the child's alone
            _, _, used = os.wait4(child, 0)
        code = os.waitstatus_to_exitcode(status) if ended else None
        code = None if code == -signal.SIGXCPU else code
        print(json.dumps([code, time.perf_counter() - started, used.ru_utime + used.ru_stime]), flush=True)


def _become_pytest(tree: str, tests: Sequence[str], cache: str) -> NoReturn:
    """In a child: run the tests as the command line would, and end."""
    code = 70
    try:
        os.setsid()
        said = os.open(os.path.join(cache, "said.txt"), os.O_WRONLY | os.O_CREAT)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (said, 1), (said, 2)):
            os.dup2(source, target)
        os.environ.update(PYTHONPATH=tree, CONVSCALE_CACHE=cache)
        os.chdir(tree)
        sys.path[:1] = [tree]  # where the tool's own folder stood
        import pytest

        every = ("-m", "slow or not slow")  # a test that is left to make test-full is named on purpose
        code = int(pytest.main(["-q", "-rfE", "--tb=line", "-p", "no:cacheprovider", *every, *tests]))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def failed_of(said: str) -> list[str]:
    """Ids of the tests that pytest's summary calls failed."""
    return re.findall(r"^(?:FAILED|ERROR) (\S+\.py(?:::[^\s\[]+(?:\[[^\n]*?\])?)?)", said, re.MULTILINE)


def try_one(tester: Tester, tree: Path, mutant: Mutant, limit_s: float) -> tuple[str, float, str]:
    """(outcome, processor seconds, what was said) of one break, made in ``tree`` and taken back."""
    path = tree / mutant.file
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    after = broken(before, mutant)
    if after is None:
        return "stale", 0.0, f"the old text stands {before.count(mutant.old)} times in {mutant.file}"
    path.write_text(after, encoding="utf-8")
    try:
        code, said, _, seconds = tester.run(tree, mutant.tests, limit_s)
    finally:
        path.write_text(before, encoding="utf-8")
    if code is None:
        return "timeout", seconds, f"no end after {limit_s:g} s of the processor"
    if code == 0:
        return "survived", seconds, "every named test passed"
    if code == 1:
        return "killed", seconds, next(iter(failed_of(said)), "")
    return "error", seconds, f"pytest ended with {code}: {' '.join(said.split()[-12:])}"


def unbroken(tester: Tester, tree: Path, mutants: Sequence[Mutant], limit_s: float) -> set[str]:
    """The named tests that fail without any break, and those that do not exist."""
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    code, said, *_ = tester.run(tree, tests, limit_s * max(1, len(tests)))
    if code == 0:
        return set()
    starts = {test: (f"{test}[", f"{test}::") for test in tests}
    bad = {test for test in tests for name in failed_of(said) if name == test or name.startswith(starts[test])}
    if not bad:  # nothing ran: an id that does not exist stops all of them
        bad = {test for test in tests if tester.run(tree, [test], limit_s).code != 0}
    return bad


def run(
    root: Path,
    mutants: Sequence[Mutant],
    record: Path,
    *,
    jobs: int = 1,
    limit_s: float = LIMIT_S,
    preload: Sequence[str] = PRELOAD,
) -> dict[str, Row]:
    """Try all whose row in ``record`` is missing or old; gives the rows of all by name. The record is whole after each.

    Args:
        root: the tree; it is not touched.
        mutants: what to try.
        record: JSON lines, one row for each break; rows of others are kept.
        jobs: how many at a time, each in a copy of its own.
        limit_s: processor seconds that the tests of one may take.
        preload: modules that the tests' processes start with; none of the tree.
    """
    rows, digests = read(record), {mutant.name: digest_of(root, mutant) for mutant in mutants}
    left = [mutant for mutant in mutants if (row := rows.get(mutant.name)) is None or row.digest != digests[row.name]]
    if not left:
        return rows
    places: queue.SimpleQueue[tuple[Tester, Path]] = queue.SimpleQueue()

    def one(mutant: Mutant) -> tuple[Mutant, str, float, str]:
        place = places.get()
        try:
            if wrong := sorted(failing & set(mutant.tests)):
                return mutant, "failing", 0.0, f"{wrong[0]} fails without the break"
            return mutant, *try_one(*place, mutant, limit_s)
        finally:
            places.put(place)

    with copy_of(root) as first, ExitStack() as testers:
        for number in range(jobs):
            tree = first if number == 0 else Path(shutil.copytree(first, first.with_name(f"tree{number}")))
            tester = Tester(preload)
            testers.callback(tester.close)
            places.put((tester, tree))
        print(f"{len(left)} of {len(mutants)} to run; their tests first, unbroken", flush=True)
        tester, tree = places.get()
        failing = unbroken(tester, tree, left, limit_s)
        places.put((tester, tree))
        with ThreadPoolExecutor(jobs) as pool:
            try:
                for mutant, outcome, seconds, said in pool.map(one, left):
                    row = Row(
                        name=mutant.name,
                        file=mutant.file,
                        tests=mutant.tests,
                        digest=digests[mutant.name],
                        outcome=outcome,
                        cpu_s=round(seconds, 1),
                        said=said,
                    )
                    rows[row.name] = row
                    write(record, rows)
                    print(
                        f"{outcome:9} {seconds:5.1f} s  {mutant.name}{f'  ({said})' if outcome != 'killed' else ''}",
                        flush=True,
                    )
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return rows


def read(record: Path) -> dict[str, Row]:
    """Rows by name; none where there is no record."""
    if not record.is_file():
        return {}
    found = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    return {row["name"]: Row(**{**row, "tests": tuple(row["tests"])}) for row in found}


def write(record: Path, rows: dict[str, Row]) -> None:
    """Rows by name, in one piece."""
    record.parent.mkdir(parents=True, exist_ok=True)
    whole = record.with_name(f".{record.name}.tmp")
    whole.write_text("".join(json.dumps(asdict(rows[name])) + "\n" for name in sorted(rows)), encoding="utf-8")
    os.replace(whole, record)
    if str(ROOT) not in sys.path:  # run as a script, the tool's own folder stands there
        sys.path.append(str(ROOT))
    from benchmarks.records import seal  # what stands there is what this run wrote

    seal(record)


def report(root: Path, mutants: Sequence[Mutant], rows: dict[str, Row]) -> tuple[str, bool]:
    """The table by room with all that were not killed below it, and whether enough were."""
    known = {m.name: row for m in mutants if (row := rows.get(m.name)) and row.digest == digest_of(root, m)}
    counts = Counter((m.room, known[m.name].outcome if m.name in known else "not run") for m in mutants)
    shown = [name for name in (*OUTCOMES, "not run") if any(outcome == name for _, outcome in counts)]
    lines = [f"{'room':12}" + "".join(f"{name:>10}" for name in shown)]
    for room in (*sorted({mutant.room for mutant in mutants}), "all"):
        each = [sum(n for (at, o), n in counts.items() if o == name and room in (at, "all")) for name in shown]
        lines.append(f"{room:12}" + "".join(f"{number:10}" for number in each))
    for mutant in mutants:
        row = known.get(mutant.name)
        if row is not None and row.outcome != "killed":
            lines.append(f"{row.outcome}: {mutant.name}: {mutant.why or row.said}")
    killed = sum(row.outcome == "killed" for row in known.values())
    lines.append(
        f"killed: {killed} of {len(mutants)} ({killed / max(1, len(mutants)):.1%}, at least {SHARE:.0%} asked)"
    )
    sound = all(row.outcome not in ("stale", "failing", "error") for row in known.values())
    return "\n".join(lines), sound and len(known) == len(mutants) and killed >= SHARE * len(mutants)


def main(argv: Sequence[str] | None = None, root: Path = ROOT, preload: Sequence[str] = PRELOAD) -> int:
    """The command line; gives the exit code."""
    parser = argparse.ArgumentParser(description="Seeded breaks against named tests.")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="names to run, as a shell pattern: 'learn/*'")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument(
        "--limit", type=float, default=LIMIT_S, metavar="SECONDS", help="of the processor, for the tests of one break"
    )
    parser.add_argument("--list", action="store_true", help="print the list and run nothing")
    parser.add_argument("--serve", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.serve is not None:
        serve(options.serve)
        return 0
    mutants = [m for m in load(root / "tools" / "mutants") if fnmatch.fnmatch(m.name, options.only)]
    record = root / "results" / "mutants.jsonl"
    if options.list:
        print("\n".join(f"{m.name}: {m.file}" for m in mutants))
        return 0
    rows = run(root, mutants, record, jobs=max(1, options.jobs), limit_s=options.limit, preload=preload)
    text, enough = report(root, mutants, rows)
    print(text)
    return 0 if enough else 1


if __name__ == "__main__":
    sys.exit(main())
