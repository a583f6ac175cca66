"""Workloads that travel with the package: the same as a fresh trace's, at every batch; never of other code."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import convscale as cs
from benchmarks.traced import FILES, entries_of, networks
from convscale.choice import speeds
from convscale.choice.basis import Asked, basis_of
from convscale.choice.candidates import candidates_of
from convscale.choice.facts import SizedSpec
from convscale.conditions import Conditions
from convscale.cost.counting import count
from convscale.networks.foreign import Foreign
from convscale.predictor import traced
from convscale.predictor.predict import predict_table, predict_workload
from convscale.predictor.roofline import table_of
from convscale.predictor.traced import Entry, Store, entry_key, lines_of, read_store, upper_lines, write_store
from convscale.predictor.workload import load_workload

NETWORKS = (
    SizedSpec(cs.get_spec("mobilenetv2_050"), 64),
    SizedSpec(Foreign("mobilenetv3_small_050", "timm"), 64),
    SizedSpec(Foreign("repvgg_a0", "timm"), 32),
)
BATCHES = (1, 2, 7, 100, 256)


def conditions(runtime: str = "eager", precision: str = "amp", batch: int = 256, size: int = 64) -> Conditions:
    return Conditions(
        device="rtx-4090", precision=precision, runtime=runtime, batch_size=batch, image_size=size, layout="nchw"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three networks as the script writes them."""
    place = tmp_path_factory.mktemp("traced")
    made = {str(entry_key(*network)): entries_of(network) for network in NETWORKS}
    for name in FILES:
        write_store(place / f"{name}.npz", {key: entries[name] for key, entries in made.items()}, "2.0")
    return place


def stored(folder: Path, name: str) -> Store:
    return read_store(folder / f"{name}.npz")


def place_of(store: Store, network: SizedSpec, batch: int = 256) -> int:
    at = store.find(*network, batch)
    assert at is not None
    return at


@pytest.mark.parametrize("runtime", ["eager", "compiled"])
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.spec.name)
def test_kernels_are_those_of_a_fresh_trace_at_every_batch(folder: Path, network: SizedSpec, runtime: str) -> None:
    store = stored(folder, runtime)
    for batch in BATCHES:
        fresh = load_workload(network.spec, conditions(runtime, batch=batch, size=network.image_size))
        kept = store.workload(place_of(store, network, batch), batch)
        assert sorted(kept.kernels) == sorted(fresh.kernels)
        assert dataclasses.replace(kept, kernels=()) == dataclasses.replace(fresh, kernels=())


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.spec.name)
def test_counts_are_those_of_a_fresh_count(folder: Path, network: SizedSpec) -> None:
    store = stored(folder, "counts")
    for batch in BATCHES[1:]:
        cost = count(network.spec, network.image_size, batch)
        at = place_of(store, network, batch)
        assert store.line("macs", at, batch) == cost.macs * batch
        assert store.line("traffic", at, batch) == cost.read_bytes + cost.written_bytes
        assert store.peak_bytes(at, batch) == cost.peak_bytes
        assert store.about(at, batch).params == cost.params


def test_many_are_predicted_as_one_is(folder: Path) -> None:
    """By the columns of the file, by kernels one by one, and by kernels side by side."""
    store = stored(folder, "eager")
    places = [place_of(store, network) for network in NETWORKS]
    for device in ("rtx-4090", "h200"):
        asked = [dataclasses.replace(conditions(size=size), device=device) for _, size in NETWORKS]
        works = [store.workload(at, 256) for at in places]
        alone = [predict_workload(work, c) for work, c in zip(works, asked, strict=True)]
        about = [store.about(at, 256) for at in places]
        for many in (
            predict_table(store.table(places, 256), about, asked),
            predict_table(table_of([work.kernels for work in works]), works, asked),
        ):
            for one, other in zip(alone, many, strict=True):
                assert other.images_per_s == pytest.approx(one.images_per_s, rel=1e-12)
                assert (other.low, other.high) == (pytest.approx(one.low), pytest.approx(one.high))
                assert (other.doubts, other.bound_by) == (one.doubts, one.bound_by)
                assert other.conditions == one.conditions


def test_entries_of_other_code_are_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, timms = NETWORKS[:2]
    store = stored(folder, "eager")
    assert store.find(*own, 256) is not None
    assert store.find(own.spec, 65, 256) is None
    other = dataclasses.replace(store, digests={**store.digests, "own": "0"})
    assert other.find(*own, 256) is None
    assert other.find(*timms, 256) is not None
    for cached in (traced._timm_version, traced._digest):
        cached.cache_clear()
    monkeypatch.setattr(traced, "version", lambda name: "0.0.1")
    try:
        assert store.find(*own, 256) is not None
        assert store.find(*timms, 256) is None
    finally:
        monkeypatch.undo()
        for cached in (traced._timm_version, traced._digest):
            cached.cache_clear()


def test_the_digest_is_of_the_code_that_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    root = tmp_path / "convscale"
    shutil.copytree(Path(cs.__file__).parent, root, ignore=shutil.ignore_patterns("__pycache__", "*.npz"))
    monkeypatch.setattr(traced, "files", lambda name: root)

    def digests() -> tuple[str, str]:
        traced._digest.cache_clear()
        return traced.digest("own"), traced.digest("timm")

    try:
        before = digests()
        for file, changes in {
            "nn/blocks.py": (True, False),
            "cost/fusion.py": (True, True),
            "networks/foreign.py": (True, True),
            "predictor/predict.py": (False, False),
            "nn/weights.py": (False, False),
        }.items():
            text = (root / file).read_bytes()
            (root / file).write_bytes(text + b"\n")
            assert tuple(a != b for a, b in zip(digests(), before, strict=True)) == changes, file
            (root / file).write_bytes(text)
    finally:
        traced._digest.cache_clear()


def test_a_batch_that_an_entry_does_not_hold_for_is_traced(folder: Path) -> None:
    store = stored(folder, "eager")
    at = place_of(store, NETWORKS[0])
    store.scalars["one_image"][at] = False
    assert store.find(*NETWORKS[0], 1) is None
    assert store.find(*NETWORKS[0], 2) == at
    store.scalars["any_batch"][at] = False
    assert store.find(*NETWORKS[0], 2) is None
    assert store.find(*NETWORKS[0], 256) == at


def test_lines_go_through_whole_numbers_alone() -> None:
    found = lines_of(np.array([10, 4]), np.array([30, 4]), 2, 12)
    assert found is not None
    assert [part.tolist() for part in found] == [[6, 4], [2, 0]]
    assert lines_of(np.array([10]), np.array([31]), 2, 12) is None


def test_upper_lines_are_the_largest_at_every_batch() -> None:
    draw = np.random.default_rng(5)
    for _ in range(50):
        lines = draw.integers(0, 60, (30, 2))
        kept = upper_lines(*lines.T.tolist())
        assert len(kept) <= len(lines)
        for batch in range(1, 80):
            assert (kept @ [1, batch]).max() == (lines @ [1, batch]).max()
    assert upper_lines([5, 9, 1], [1, 1, 0]).tolist() == [[9, 1]]


def test_what_can_not_be_traced_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = NETWORKS[0]
    write_store(tmp_path / "eager.npz", {str(entry_key(*network)): Entry(failed="operator nonzero")}, "2.0")
    monkeypatch.setattr(speeds, "store", lambda name: read_store(tmp_path / "eager.npz"))
    (facts,) = speeds.traced_before([network], basis_of(Asked(device="rtx-4090"))).values()
    assert facts.failed == "operator nonzero"


# ---------------------------------------------------------------- the files of the package

RENEW = "python -m benchmarks.traced writes convscale/predictor/traced/ again"


def test_every_default_candidate_was_traced_by_the_code_that_is_here() -> None:
    stores = {name: traced.store(name) for name in FILES}
    for each in candidates_of(None):
        for name, store in stores.items():
            assert store is not None, RENEW
            assert store.find(each.spec, each.image_size, 256) is not None, f"{each.label} in {name}: {RENEW}"


def test_the_files_say_what_fresh_traces_say() -> None:
    store = traced.store("eager")
    assert store is not None
    for name, size in (("mobilenetv2_050", 224), ("mobilenetv3_small_050", 224), ("repvgg_a0", 224)):
        keys = {network.spec.name: network.spec for network in networks().values()}
        at = store.find(keys[name], size, 256)
        assert at is not None, RENEW
        fresh = load_workload(keys[name], conditions(size=size))
        assert sorted(store.workload(at, 256).kernels) == sorted(fresh.kernels), RENEW


def test_the_files_are_small() -> None:
    assert sum(file.stat().st_size for file in traced.folder().glob("*.npz")) < 15e6


def test_an_answer_from_the_files_needs_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys, convscale as cs\n"
        "from convscale.choice import speeds\n"
        "speeds.examine = speeds._in_processes = None  # nothing is traced\n"
        "c = cs.choose(device='rtx-4090', min_throughput=2000)\n"
        "assert len(c.options) > 500, len(c.options)\n"
        "sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, env={**os.environ, "CONVSCALE_CACHE": str(tmp_path)}
    )
    assert done.returncode == 0, RENEW
