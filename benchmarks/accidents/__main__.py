"""Play the accidents that users have, from the command line, and say whether each is held: no hang, no traceback, one
line and exit code 2 where something is refused, and nothing lost.

    python -m benchmarks.accidents [--only 'links/*'] [--seconds 170] [--place DIR] [--again] [--keep] [--list]
    [--output results/accidents.jsonl]

Each accident gets a folder of its own with small pictures. Its commands are ``convscale ...`` in a process each; most
are forked from one that has PyTorch and the command line loaded, for the start takes longer than the accident, and
those about the system (memory, open files, signals, locks, two at once) are started as a user's shell does. One that
takes longer than 60 s is killed, and failed. Disks that are full or read-only are mounted where the user may; without
that right those rows are `skipped`.

The record has a row for each accident, and what it already has of this version of the code is not played again (with
``--keep`` what was held by an earlier one neither); ``--seconds`` stops after so many, the next call goes on. The exit
code is 1 where one failed.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import pkgutil
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.accidents import manifests, numbers, outputs, pictures, processes, records
from benchmarks.accidents.outputs import Skipped
from benchmarks.accidents.play import ROOT, Accident, Play, shown
from benchmarks.accidents.stage import Stage
from benchmarks.records import machine, replace_record

ACCIDENTS: list[Accident] = [
    *pictures.ACCIDENTS,
    *manifests.ACCIDENTS,
    *records.ACCIDENTS,
    *outputs.ACCIDENTS,
    *numbers.ACCIDENTS,
    *processes.ACCIDENTS,
]


ALL = "all"
"""The name of the row with the counts."""


def version() -> str:
    """A digest of all code that an outcome depends on."""
    found = hashlib.sha256()
    for folder in (ROOT / "convscale", ROOT / "benchmarks" / "accidents"):
        for file in sorted(folder.rglob("*.py")):
            found.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return found.hexdigest()[:16]


def play(accident: Accident, stage: Stage, number: int) -> dict[str, Any]:
    """One accident's row."""
    here = stage.place / f"a{number:03d}"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir()
    one = Play(stage=stage, here=here)
    begun, skipped = time.perf_counter(), ""
    try:
        accident.act(one)
    except Skipped as error:
        skipped = str(error)
    except Exception:  # what was made is not what the accident goes by: that is a failure of the row
        one.problems.append(" ".join(traceback.format_exc(limit=-2).split()))
    one.finish()
    seconds = time.perf_counter() - begun
    problems = [*one.problems, *(f"lost or changed: {each}" for each in one.lost)]
    refusals = [seen for seen in one.seen if seen.code == 2]
    return {
        "benchmark": "accidents",
        "name": accident.name,
        "did": accident.did,
        "verdict": "skipped" if skipped else "failed" if problems else "held",
        "commands": len(one.seen),
        "command": one.said[-1] if one.said else "",
        "exit": one.seen[-1].code if one.seen else None,
        "one_line": all(seen.one_line for seen in refusals) if refusals else None,
        "no_traceback": not any(seen.traceback for seen in one.seen),
        "nothing_lost": not one.lost,
        "seconds": round(seconds, 2),
        "said": shown(one.seen[-1].line, stage.place) if one.seen else skipped,
        "problems": [shown(each, stage.place) for each in problems[:5]],
    }


def counts_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many of ``rows`` have each verdict."""
    return {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in ("held", "failed", "skipped")}


def summary_of(rows: Sequence[Mapping[str, Any]], code: str) -> dict[str, Any]:
    """The row ``all``: over every accident's row, whichever of them the last call was asked for, on the machines that
    played them.
    """
    return {
        "accidents": len(rows),
        **counts_of(rows),
        "commands": sum(row["commands"] for row in rows),
        "seconds": round(sum(row["seconds"] for row in rows)),
        "of_this_code": sum(row["code"] == code for row in rows),
        "machine": "; ".join(sorted({row["machine"] for row in rows})),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="benchmarks.accidents"
    )
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names that match, such as 'links/*'")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no accident after so many")
    parser.add_argument(
        "--place", type=Path, help="where to work, kept for the next call; a temporary folder if left out"
    )
    parser.add_argument("--again", action="store_true", help="play those that the record has, too")
    parser.add_argument("--keep", action="store_true", help="do not play again what was held by earlier code")
    parser.add_argument("--list", action="store_true", help="print the names, and play nothing")
    parser.add_argument("--output", type=Path, default=Path("results/accidents.jsonl"))
    options = parser.parse_args()
    wanted = [(number, each) for number, each in enumerate(ACCIDENTS) if fnmatch.fnmatch(each.name, options.only)]
    if not wanted:
        raise SystemExit(f"no accident matches {options.only!r}; --list shows all")
    if options.list:
        print("\n".join(f"{each.name:28} {each.did}" for _, each in wanted))
        return
    with tempfile.TemporaryDirectory(prefix="accidents-") as temporary:
        _play_all(wanted, options, (options.place or Path(temporary)).resolve())


def _play_all(wanted: list[tuple[int, Accident]], options: argparse.Namespace, place: Path) -> None:
    code, made = version(), machine()
    rows: dict[str, dict[str, Any]] = {}
    if options.output.is_file():
        lines = options.output.read_text(encoding="utf-8").splitlines()
        found = [row for row in map(json.loads, lines) if row["name"] != ALL]
        rows = {row["name"]: row for row in found if row["code"] == code or (options.keep and row["verdict"] == "held")}
    os.environ["OMP_NUM_THREADS"] = "1"
    _load()
    stage, begun = Stage(place), time.perf_counter()
    for number, accident in wanted:
        if accident.name in rows and not options.again:
            continue
        if time.perf_counter() - begun > options.seconds:
            break
        row = {**play(accident, stage, number), **_conditions(), "machine": made, "code": code}
        replace_record(options.output, row, ("benchmark", "name"))
        rows[accident.name] = row
        print(f"{row['verdict']:8} {row['seconds']:6.1f} s  {row['name']:28} {'; '.join(row['problems'])}", flush=True)
    asked = [rows[each.name] for _, each in wanted if each.name in rows]
    counts = counts_of(asked)
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    print(f"{len(asked)} of {len(wanted)} accidents: {said or 'none played'}; {sum(r['seconds'] for r in asked):.0f} s")
    if len(rows) == len(ACCIDENTS):
        summary = summary_of([*rows.values()], code)
        whole = {"benchmark": "accidents", "name": ALL, **summary, **_conditions(), "code": code}
        replace_record(options.output, whole, ("benchmark", "name"))
    if counts["failed"]:
        sys.exit(1)


def _load() -> None:
    """What commands import, before they are forked. Nothing of it may start a thread: a fork takes none along."""
    import convscale

    for each in pkgutil.walk_packages(convscale.__path__, "convscale."):
        if not each.name.endswith("__main__"):
            import_module(each.name)
    for name in ("onnx", "onnxruntime", "scipy.stats", "timm", "torchmetrics", "plotly.graph_objects", "jinja2"):
        import_module(name)
    import torch

    torch.set_num_threads(1)


def _conditions() -> dict[str, str]:
    """What the outcome goes with."""
    import numpy
    import PIL
    import torch

    from convscale import __version__

    return {
        "convscale": __version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        "python": sys.version.split()[0],
    }


if __name__ == "__main__":
    main()
