"""What every test shares: one compute thread per test process, no display, no telemetry, a fixed seed."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Set before torch is first imported. Two pytest-xdist workers that each start a thread per core get in each other's
# way.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("CI", "true")  # or OpenVINO and NNCF fork a process for every event that they report home


SETTLED_EVERY = 200
"""Tests between two times that what lives is left out of Python's garbage collection."""
_run = 0


def _settle() -> None:
    """What pytest and libraries hold lives to the end, and each full collection would walk over all of it: a fifth of
    the time of tests that make many small objects.
    """
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    """The tests themselves are there now."""
    _settle()


def pytest_runtest_teardown() -> None:
    """Some libraries more."""
    global _run
    _run += 1
    if _run % SETTLED_EVERY == 0:
        _settle()


@pytest.fixture(autouse=True)
def _seed() -> None:
    """A test that draws random numbers draws the same ones alone and in the suite; torch is seeded only by tests that
    use it.
    """
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)


@pytest.fixture(scope="module")
def briefly() -> Iterator[None]:
    """Whatever is timed is timed for a moment: for tests of what follows from a speed, not of how it is taken."""
    from convscale.learn import settings
    from convscale.ship import tune
    from convscale.speed import measuring

    timed, called, stepped = tune._timed, measuring.time_callable, settings._images_per_s

    def time_callable(*args: Any, min_seconds: float, max_seconds: float, **options: Any) -> tuple[float, ...]:
        return called(*args, min_seconds=0.02 * min_seconds, max_seconds=0.02 * max_seconds, **options)

    def images_per_s(net: Any, inputs: Any, precision: str, layout: str, seconds: float, **options: Any) -> float:
        return stepped(net, inputs, precision, layout, 0.02 * seconds, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "_timed", lambda call, seconds, least: timed(call, 0.02 * seconds, least))
        patch.setattr(measuring, "time_callable", time_callable)
        patch.setattr(settings, "_images_per_s", images_per_s)
        yield


@pytest.fixture
def call(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Exit code, standard output and standard error of ``convscale ARGS``, in a terminal of the test module's
    ``COLUMNS``.
    """
    from convscale.cli import app as cli

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["convscale", *map(str, args)])
        monkeypatch.setenv("COLUMNS", str(request.module.COLUMNS))
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


@pytest.fixture(scope="session")
def chromium() -> Path:
    """A headless-capable browser; the test is skipped without one."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found:
            return Path(found)
    pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")


@pytest.fixture(scope="session")
def fashion_mnist_dir() -> Path:
    """The folder of Fashion-MNIST's four files; the test is skipped without it."""
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not (folder / "t10k-images-idx3-ubyte.gz").is_file():
        pytest.skip("no Fashion-MNIST on this machine (Debian: apt-get install dataset-fashion-mnist)")
    return folder
