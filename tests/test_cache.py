"""The cache on disk: what a key and the digest tell apart, where it lies, several writers."""

from __future__ import annotations

import ast
import pwd
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

import convscale
from convscale import cache

ROOT = Path(convscale.__file__).parent


@dataclass(frozen=True)
class Spec:
    """Stands for a NetSpec."""

    width: int = 4


def test_a_key_tells_what_is_kept_of_what_by_which_code(monkeypatch: pytest.MonkeyPatch) -> None:
    key = cache.key_of("trace", Spec(), size=8)
    assert cache.key_of("trace", Spec(), size=8) == key
    others = (
        cache.key_of("trace", Spec(), size=9),
        cache.key_of("trace", Spec(5), size=8),
        cache.key_of("kernels", Spec(), size=8),
    )
    assert key not in others
    monkeypatch.setattr(cache, "code_digest", lambda: "other")
    assert cache.key_of("trace", Spec(), size=8) != key


def test_several_processes_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVSCALE_CACHE", str(tmp_path))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: cache.save(f"key{i}", {"value": i}), range(40)))
    assert [cache.load(f"key{i}") for i in range(40)] == [{"value": i} for i in range(40)]


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"CONVSCALE_CACHE": "/a/b", "XDG_CACHE_HOME": "/x"}, "/a/b"),
        ({"CONVSCALE_CACHE": "", "XDG_CACHE_HOME": "/x"}, "/x/convscale"),
        ({"XDG_CACHE_HOME": ""}, "/home/u/.cache/convscale"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/u/.cache/convscale"),  # to be ignored, says the specification
        ({}, "/home/u/.cache/convscale"),
    ],
)
def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], folder: str) -> None:
    """XDG Base Directory Specification 0.8."""
    for name in ("CONVSCALE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/u")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache.cache_dir() == Path(folder)


@pytest.mark.parametrize("home", [None, "", "relative"])
def test_without_a_home_directory_temporary_files_are_kept(monkeypatch: pytest.MonkeyPatch, home: str | None) -> None:
    def unknown(_user: int) -> None:
        raise KeyError(_user)

    for name in ("CONVSCALE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/t")
    assert cache.cache_dir().parent == Path("/t")


def test_a_result_of_other_code_is_never_read(tmp_path: Path) -> None:
    root = tmp_path / "package"
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns("__pycache__"))
    before = cache.digest_of(root)
    assert cache.digest_of(root) == before
    for name in (
        "conditions.py",
        "arch/families/mobile.py",
        "nn/blocks.py",
        "networks/inputs.py",
        "cost/autocast.py",
        "choice/speeds.py",
        "predictor/predict.py",
        "predictor/devices.json",
    ):
        text = (root / name).read_bytes()
        (root / name).write_bytes(text + b"\n")
        assert cache.digest_of(root) != before, name
        (root / name).write_bytes(text)
    assert cache.digest_of(root) == before
    (root / "cost" / "trace.py").write_bytes(b"")
    assert cache.digest_of(root, "cost/operators.py") == cache.digest_of(ROOT, "cost/operators.py")


def test_two_files_that_change_places_are_other_code(tmp_path: Path) -> None:
    for name, text in {"arch/a.py": "x = 1", "nn/a.py": "x = 2"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = cache.digest_of(tmp_path)
    (tmp_path / "arch/a.py").write_text("x = 2")
    (tmp_path / "nn/a.py").write_text("x = 1")
    assert cache.digest_of(tmp_path) != before


def test_a_line_that_moves_to_the_next_file_is_other_code(tmp_path: Path) -> None:
    digests = []
    (tmp_path / "arch").mkdir()
    for first, second in (("x = 1\ny = 2\n", "z = 3\n"), ("x = 1\n", "y = 2\nz = 3\n")):
        (tmp_path / "arch/a.py").write_text(first)
        (tmp_path / "arch/b.py").write_text(second)
        digests.append(cache.digest_of(tmp_path))
    assert digests[0] != digests[1]


def modules_in(source: str) -> Iterator[str]:
    """Dotted names below ``convscale`` that a module imports anywhere, and parts of packages that it may take."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import is not followed here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield str(node.module)


def file_of(name: str) -> Path | None:
    """The file of a module of the package, or None."""
    top, *rest = name.split(".")
    path = ROOT.joinpath(*rest)
    if top != "convscale" or not rest:
        return None
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def reachable(start: set[Path]) -> set[Path]:
    """Files that are imported from ``start``, directly or by others, in functions too; with their packages."""
    known, left = set(start), list(start)
    while left:
        for name in modules_in(left.pop().read_text(encoding="utf-8")):
            file = file_of(name)
            if file is not None and file not in known:
                known.add(file)
                left.append(file)
    packages = {file.parent / "__init__.py" for file in known if file.parent != ROOT}
    return known | packages


def keepers() -> set[Path]:
    """Modules that keep results: those that import ``save`` from the cache."""
    files = (file for file in ROOT.rglob("*.py") if file.name != "cache.py")
    return {file for file in files if "convscale.cache.save" in modules_in(file.read_text(encoding="utf-8"))}


def test_the_digest_holds_all_code_that_a_kept_result_depends_on() -> None:
    """So no result of other code is read: whatever a module imports that keeps results is in the digest."""
    assert {ROOT / "cost/counting.py", ROOT / "predictor/workload.py", ROOT / "choice/speeds.py"} <= keepers()
    used, digested = reachable(keepers()), set(cache.files_of(ROOT))
    assert {ROOT / "conditions.py", ROOT / "nn/blocks.py", ROOT / "arch/families/__init__.py"} <= used
    assert ROOT / "arch/families/mobile.py" in digested  # families are found by listing their folder, not by imports
    assert sorted(str(file.relative_to(ROOT)) for file in used - digested) == []


def test_the_digest_holds_the_data_beside_that_code() -> None:
    data = {
        file
        for folder in {file.parent for file in reachable(keepers())} - {ROOT}
        for file in folder.iterdir()
        if file.is_file() and file.suffix != ".py"
    }
    assert ROOT / "predictor/coefficients.json" in data
    assert data <= set(cache.files_of(ROOT))
