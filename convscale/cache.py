"""Results kept on disk between runs: one SQLite file in the user's cache folder, safe with several processes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

CODE = ("arch", "nn", "networks", "cost", "predictor", "choice")
"""Folders whose code and data decide what a network costs and how fast it is predicted to be."""
_KEEP = 20_000  # entries; a few kB each


def cache_dir() -> Path:
    """``$CONVSCALE_CACHE``, else ``convscale`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if chosen := os.environ.get("CONVSCALE_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convscale"


def digest_of(root: Path, *names: str) -> str:
    """Digest of torch's version and of the code and data of ``root`` that decide what a network costs, without
    importing torch.

    Args:
        root: the package's folder.
        names: files below it; none: all of the folders in ``CODE``.
    """
    digest = hashlib.sha256(version("torch").encode())
    everything = (
        file for folder in CODE for file in sorted((root / folder).rglob("*")) if file.suffix in (".py", ".json")
    )
    for file in [root / name for name in names] or everything:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


@cache
def code_digest() -> str:
    """Digest of the code and data that a cost or a prediction depends on: a result of other code is never read back."""
    return digest_of(Path(__file__).parent)


def key_of(kind: str, spec: Any, **conditions: Any) -> str:
    """The key of a result for a spec (a dataclass) under conditions (plain values)."""
    value = {"kind": kind, "code": code_digest(), "spec": dataclasses.asdict(spec), **conditions}
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def _database() -> Iterator[sqlite3.Connection]:
    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(folder / "costs-v1.sqlite", timeout=10)) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, value BLOB NOT NULL)")
        yield connection


def load(key: str) -> Any:
    """The JSON value kept under ``key``, or None. A cache that can not be read is no cache, never an error."""
    try:
        with _database() as connection:
            row = connection.execute("SELECT value FROM entries WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(zlib.decompress(row[0]))
    except (sqlite3.Error, OSError, zlib.error, ValueError):
        return None


def save(key: str, value: Any) -> None:
    """Keep a JSON value under ``key``; the oldest entries go when there are too many. A cache that can not be written
    is left alone.
    """
    blob = zlib.compress(json.dumps(value, separators=(",", ":")).encode(), 3)
    try:
        with _database() as connection, connection:
            connection.execute("INSERT OR REPLACE INTO entries VALUES (?, ?)", (key, blob))
            connection.execute("DELETE FROM entries WHERE rowid <= (SELECT max(rowid) FROM entries) - ?", (_KEEP,))
    except (sqlite3.Error, OSError):
        return
