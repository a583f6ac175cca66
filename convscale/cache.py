"""Results kept on disk between runs: one SQLite file in the user's cache folder, safe with several processes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sqlite3
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convscale.read import OWN, USUAL, json_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

CODE = ("*", "arch", "nn", "images", "networks", "runtimes", "cost", "predictor", "choice")
"""Folders whose code and data decide what a network costs and how fast it is predicted to be; ``*``: the modules that
stand beside them. A test walks the imports of every module that keeps results, and fails where one leads out of these.
"""
_KEEP = 20_000  # entries; a few kB each


def cache_dir() -> Path:
    """``$CONVSCALE_CACHE``, else ``convscale`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    As the XDG Base Directory Specification says, an empty or relative ``$XDG_CACHE_HOME`` is ignored. Where there is no
    home directory either it is a folder for temporary files, one a user.
    """
    if chosen := os.environ.get("CONVSCALE_CACHE"):
        return Path(chosen)
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if base.is_absolute():
        return base / "convscale"
    home = _home()
    if home is not None:
        return home / ".cache" / "convscale"
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()) / f"convscale-{user}"


def _home() -> Path | None:
    """The user's home directory; None where the system knows none."""
    if os.environ.get("HOME") == "":  # Path.home would take it for the root of all folders
        return None
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home if home.is_absolute() else None


def files_of(root: Path) -> list[Path]:
    """The files of the package at ``root`` whose code and data decide cached results, in order."""
    folders = [root.glob("*") if folder == "*" else (root / folder).rglob("*") for folder in CODE]
    return sorted(file for folder in folders for file in folder if file.suffix in (".py", ".json"))


def digest_of(root: Path, *names: str) -> str:
    """Digest of torch's version and of the code and data of ``root`` that decide what a network costs, without
    importing torch.

    Args:
        root: the package's folder.
        names: files below it; none: ``files_of`` it.
    """
    try:
        torch = version("torch")
    except PackageNotFoundError:  # predictions by traced networks need none
        torch = ""
    digest = hashlib.sha256(torch.encode())
    for file in [root / name for name in names] or files_of(root):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(root).as_posix()} {len(content)} ".encode() + content)
    return digest.hexdigest()[:16]


@cache
def code_digest() -> str:
    """Digest of the code and data that a cost or a prediction depends on: a result of other code is never read back."""
    return digest_of(Path(__file__).parent)


def key_of(kind: str, spec: DataclassInstance, **conditions: object) -> str:
    """The key of a result.

    Args:
        kind: what is kept.
        spec: the network, a dataclass.
        conditions: plain values that the result depends on beside it and the code.
    """
    value = {"kind": kind, "code": code_digest(), "spec": dataclasses.asdict(spec), **conditions}
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def _database() -> Iterator[sqlite3.Connection]:
    """The open database, made where there is none."""
    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(folder / "costs-v1.sqlite", timeout=10)) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, value BLOB NOT NULL)")
        yield connection


def _unpacked(blob: bytes) -> bytes:
    """What was packed, up to a byte more than is read."""
    return zlib.decompressobj().decompress(blob, USUAL.size + 1)


def load(key: str) -> Any:
    """The JSON value kept under ``key``, or None. A cache that can not be read is no cache, never an error."""
    try:
        with _database() as connection:
            row = connection.execute("SELECT value FROM entries WHERE key = ?", (key,)).fetchone()
        return None if row is None else json_of(_unpacked(row[0]), "a kept result", OWN)
    except (sqlite3.Error, OSError, zlib.error, ValueError):
        return None


def save(key: str, value: object) -> None:
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
