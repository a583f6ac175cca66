"""What benchmarks share: calls timed in turns, and records in which a row takes the place of an earlier one of the same
subject.

A record is written by the run that made it and never edited. ``results/made.json`` keeps of each file its digest, the
commit, and a digest of the code that it tells about; a test compares the first, and the docs mark as older what stands
there for other code than today's.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from convscale.files import write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
MADE = "made.json"
"""The file beside the records that says how each came about."""

_SHIPPED = ("convscale/formats", "convscale/runtimes", "convscale/ship", "convscale/nn/blocks.py")
_COUNTED = ("convscale/cost", "convscale/nn/blocks.py", "convscale/nn/layers.py", "convscale/nn/norm.py")
_PREDICTED = ("convscale/predictor", "convscale/cost/fusion.py", "convscale/cost/kernels.py")
_LEARNT = tuple(
    f"convscale/learn/{name}.py"
    for name in ("augment", "ema", "loader", "loop", "loss", "optim", "recipe", "recipes", "schedule")
)
CODE: dict[str, tuple[str, ...]] = {
    "ablation": (*_SHIPPED, *_PREDICTED),
    "ablation_accuracy": (*_LEARNT, "convscale/arch/families/tresnet.py", *_PREDICTED),
    "choose": ("convscale/choice", *_PREDICTED),
    "choose_untraced": ("convscale/choice", *_COUNTED, *_PREDICTED),
    "count": _COUNTED,
    "demo": ("convscale/pipeline", "convscale/choice", *_LEARNT),
    "detection": ("convscale/detect", "convscale/nn/detectors.py", "convscale/learn/loop.py"),
    "detection_speed": (*_SHIPPED, "convscale/nn/detectors.py"),
    "distil": _LEARNT,
    "fashion": _LEARNT,
    "fit_peers": ("convscale/pipeline", "convscale/learn"),
    "front": ("convscale/choice/decide.py", *_PREDICTED),
    "kill_loop": ("convscale/learn/checkpoint.py", "convscale/learn/loop.py", "convscale/files.py"),
    "light": ("convscale/artifact", "convscale/runtimes", "convscale/images/decode.py"),
    "loader": ("convscale/learn/loader.py", "convscale/learn/augment.py", "convscale/images/decode.py"),
    "memory": ("convscale/cost/memory.py", "convscale/nn/norm.py"),
    "multilabel": _LEARNT,
    "multilabel-heads": (*_LEARNT, "convscale/nn/decoder.py"),
    "nas_coefficients": (
        *(f"convscale/nas/{name}.py" for name in ("coefficients", "directions", "points")),
        *_PREDICTED,
    ),
    "nas_space": tuple(f"convscale/nas/{name}.py" for name in ("choices", "space", "spaces", "tally")),
    "nas_tables": ("convscale/nas/walk.py", "convscale/nas/sampling.py", "convscale/nas/zero_cost.py"),
    "parity": ("convscale/nn/blocks.py", "convscale/nn/layers.py", "convscale/nn/net.py", "convscale/nn/norm.py"),
    "predictor": _PREDICTED,
    "predictor_attention": _PREDICTED,
    "predictor_mnas": _PREDICTED,
    "predictor_public": _PREDICTED,
    "predictor_rivals": _PREDICTED,
    "predictor_v100": _PREDICTED,
    "ray_classify": ("convscale/ship/ray_engine.py", "convscale/ship/shards.py", "convscale/ship/stream.py"),
    "search_fashion": ("convscale/nas", "convscale/choice/members.py", *_LEARNT),
    "serve": ("convscale/serve", "convscale/runtimes"),
    "ship": _SHIPPED,
    "ship_peers": _SHIPPED,
    "ship_classify": (*_SHIPPED, "convscale/images/decode.py"),
    "ship_gate": _SHIPPED,
    "train_speed": ("convscale/nn/norm.py", "convscale/learn/loop.py"),
    "transfer": _LEARNT,
}
"""By record the files and folders whose change makes it a record of older code."""


def write_record(path: Path, text: str) -> None:
    """Write a record, and beside it how it came about."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    seal(path)


def seal(path: Path) -> None:
    """Keep in ``results/made.json`` how a record came about; of files elsewhere nothing is kept."""
    if path.resolve().parent != RESULTS:
        return
    made = made_of()
    made[path.name] = {"sha256": digest(path), "commit": commit(), "code": code_digest(path.stem)}
    write_json(RESULTS / MADE, dict(sorted(made.items())))


def made_of() -> dict[str, dict[str, str | None]]:
    """How each record came about, by its file's name: ``sha256``, ``commit`` and ``code``."""
    path = RESULTS / MADE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def commit() -> str | None:
    """The commit that runs, with ``+`` where files differ from it; None outside a checkout. Records do not count: the
    one that is being written differs always.
    """
    head = _git("rev-parse", "--short=10", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)results")
    return head and f"{head}+" if changed else head


def _git(*words: str) -> str | None:
    """What git prints; None where it prints nothing."""
    said = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return said.stdout.strip() or None


@cache
def code_digest(name: str) -> str | None:
    """A digest of the code that a record tells about; None where none is named."""
    if name not in CODE:
        return None
    total = hashlib.sha256()
    for place in (ROOT / named for named in CODE[name]):
        files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.suffix in (".py", ".json"))
        for file in files:
            total.update(f"{file.relative_to(ROOT).as_posix()}\n".encode() + file.read_bytes())
    return total.hexdigest()[:16]


def is_of_this_code(name: str) -> bool | None:
    """Whether all of a record was made by the code that stands here; None where that is not known."""
    now, lines = code_digest(name), RESULTS / f"{name}.jsonl"
    made = next((row for file, row in made_of().items() if Path(file).stem == name), None)
    if now is None or made is None:
        return None
    whole = made["code"]
    if whole is None:  # from before digests were kept
        return _unchanged_since(made["commit"], CODE[name])
    rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()] if lines.is_file() else []
    by_row = any("made" in row for row in rows)
    return whole == now and (not by_row or all(row.get("made", {}).get("code") == now for row in rows))


@cache
def _unchanged_since(commit: str | None, places: tuple[str, ...]) -> bool | None:
    """Whether files and folders of code are as a commit had them; None where git does not have it, or where it is not
    known what it was run with: a ``+`` says that some file differed.
    """
    if commit is None:
        return None
    inside = [f"{place}/**/*{ending}" for place in places for ending in (".py", ".json")]
    files = [f":(glob){each}" for each in (*places, *inside) if not (ROOT / each).is_dir()]
    command = ["git", "diff", "--quiet", commit.rstrip("+"), "--", *files]
    code = subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode
    return {0: None if commit.endswith("+") else True, 1: False}.get(code)


def machine() -> str:
    """What it ran on, for a record."""
    from convscale.machine import Environment

    here = Environment.here("cpu")
    return f"{here.device_name}, {here.cores} cores"


def replace_record(
    path: Path, row: Mapping[str, Any], keys: Sequence[str], *, usual: Mapping[str, object] | None = None
) -> None:
    """Write ``row`` into a file of JSON lines, over the row that agrees with it in ``keys`` where there is one, else at
    the end.

    Args:
        keys: fields, those inside of others with dots: ``conditions.threads``.
        usual: by key what a row had that does not say it, from before it was kept.
    """

    def key_of(row: Mapping[str, Any]) -> list[object]:
        return [_field(row, key, (usual or {}).get(key)) for key in keys]

    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines]
    row = {**row, "made": {"commit": commit(), "code": code_digest(path.stem)}}
    same = [i for i, old in enumerate(rows) if key_of(old) == key_of(row)]
    if same:
        rows[same[0]] = row
    else:
        rows.append(row)
    write_record(path, "".join(json.dumps(r) + "\n" for r in rows))


def _field(row: Mapping[str, Any], key: str, usual: object) -> object:
    value: Any = row
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return usual
        value = value[part]
    return value


def in_turns(calls: Mapping[str, Callable[[], object]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of each contender's calls: everybody for ``seconds``, then again, ``rounds`` times."""
    for call in calls.values():
        for _ in range(2):
            call()
    times: dict[str, list[float]] = {label: [] for label in calls}
    for _ in range(rounds):
        for label, call in calls.items():
            call()  # the caches are somebody else's still
            spent = 0.0
            while spent < seconds:
                start = time.perf_counter()
                call()
                times[label].append(time.perf_counter() - start)
                spent += times[label][-1]
    return times
