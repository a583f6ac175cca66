"""``classify --engine ray``: the rows of ``classify``, whatever is killed on the way."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.ray_classify import actors_of
from convscale.artifact.artifact import Artifact, load_artifact
from convscale.artifact.boxes import Boxes
from convscale.errors import UserError
from convscale.images.preprocess import Preprocessing
from convscale.ship import ray_engine
from convscale.ship.ray_engine import ClassifyShards, Cluster, classify_on_ray
from convscale.ship.rows import Row
from convscale.ship.shards import Rows, Shard, listed, shards_of
from convscale.ship.stream import Classified, classify

COLUMNS = 200
OLD = Path(__file__).parent.parent / "old_files" / "v0_1" / "artefacts" / "onnx_fp32"
COUNT, SIZE = 57, 10


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, one of them damaged."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(COUNT):
        pixels = np.random.default_rng(number).integers(0, 256, (7, 7), dtype=np.uint8).repeat(6, 0).repeat(6, 1)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    (folder / "013.png").write_bytes((folder / "013.png").read_bytes()[:60])
    return folder


class TwoBoxes:
    """Stands in for a detector's artefact."""

    is_detector, thresholds, classes, batch_size = True, None, ("cat", "dog"), 2
    preprocessing = Preprocessing(image_size=32, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)

    def boxes_in_squares(
        self, squares: list[np.ndarray], sizes: list[tuple[int, int]], *, batch_size: int
    ) -> list[Boxes]:
        assert len(squares) <= batch_size
        assert [square.shape for square in squares] == [(32, 32, 3)] * len(sizes)
        whole = [(0.0, 0.0, width, height) for height, width in sizes]
        sides = [np.array([(1.0, 2.0, 10.0, 20.5), box], np.float32) for box in whole]
        scores, labels = np.array([0.75, 0.5], np.float32), np.array([2, 1])
        return [Boxes(boxes=each, scores=scores, labels=labels) for each in sides]


def expected(photos: Path, tmp_path: Path) -> list[dict]:
    """What the usual engine says."""
    paths = [str(path) for path in sorted(photos.iterdir())]
    classify(paths, load_artifact(OLD), tmp_path / "local.jsonl", top=2)
    return [json.loads(line) for line in (tmp_path / "local.jsonl").read_text().splitlines()]


def here(shards: list[Shard], artifact: Artifact, output: str, *_: object) -> Iterator[dict[str, Any]]:
    """In the place of a cluster: an actor of this process does all shards."""
    actor = ClassifyShards(str(artifact.folder), 1, 1, None, output)
    for shard in shards:
        told = actor({"file": [shard.file], "paths": [np.array(shard.paths)]})
        yield {name: value[0] for name, value in told.items()}


def rows_of(folder: Path) -> list[dict]:
    """All rows of a folder of parts, in their order."""
    return [json.loads(line) for part in sorted(folder.glob("part-*")) for line in part.read_text().splitlines()]


def test_shards_are_named_after_all_that_their_rows_depend_on() -> None:
    paths = [f"{i}.png" for i in range(5)]
    made = list(shards_of(paths, size=2, format="jsonl", facts="a"))
    assert [shard.paths for shard in made] == [("0.png", "1.png"), ("2.png", "3.png"), ("4.png",)]
    assert [shard.file[:12] for shard in made] == ["part-000000-", "part-000001-", "part-000002-"]
    again = {shard.file for shard in shards_of(paths, size=2, format="jsonl", facts="a")}
    assert again == {shard.file for shard in made}
    for other in (
        shards_of(paths[::-1], size=2, format="jsonl", facts="a"),
        shards_of(paths, size=2, format="jsonl", facts="b"),
        shards_of(paths, size=2, format="parquet", facts="a"),
    ):
        assert not again & {shard.file for shard in other}


def test_parquet_in_and_out(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"path": ["a.png", "b.png"], "x": [1, 2]}), tmp_path / "list.parquet")
    assert list(listed(str(tmp_path / "list.parquet"))) == ["a.png", "b.png"]
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    with pytest.raises(UserError, match=r"has no column 'path' \(it has x\)"):
        list(listed(str(tmp_path / "other.parquet")))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="can not be read"):
        list(listed(str(tmp_path / "bad.parquet")))
    rows = [Row(path="a", classes=("x", "y"), probabilities=(0.75, 0.25)), Row(path="b", error="damaged")]
    Rows(str(tmp_path / "out")).write("part-0.parquet", rows, several=False)
    assert pq.read_table(tmp_path / "out" / "part-0.parquet").to_pylist() == [
        {"path": "a", "classes": ["x", "y"], "probabilities": [0.75, 0.25], "error": None},
        {"path": "b", "classes": [], "probabilities": [], "error": "damaged"},
    ]


def test_an_actor_keeps_boxes_in_parquet_and_reads_fsspec_paths_for_a_detector(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").pipe("/photos/one.png", (photos / "000.png").read_bytes())
    monkeypatch.setattr(ray_engine, "load_artifact", lambda folder, threads: TwoBoxes())
    actor = ClassifyShards("", 1, 2, None, str(tmp_path))
    good = ["memory://photos/one.png", str(photos / "000.png")]
    actor(
        {"file": ["part-0.parquet", "part-1.parquet"], "paths": [np.array(good), np.array([str(photos / "013.png")])]}
    )
    rows = pq.read_table(tmp_path / "part-0.parquet").to_pylist()
    assert [row["path"] for row in rows] == good
    for row in rows:
        assert (row["classes"], row["error"]) == (["dog", "cat"], None)
        assert row["probabilities"] == pytest.approx([0.75, 0.5])
        assert row["boxes"] == [[1.0, 2.0, 10.0, 20.5], [0.0, 0.0, 42.0, 42.0]]
    bad = pq.read_table(tmp_path / "part-1.parquet")
    assert bad.schema.field("boxes").type == pq.read_table(tmp_path / "part-0.parquet").schema.field("boxes").type
    assert bad.to_pylist()[0]["boxes"] == []
    assert bad.to_pylist()[0]["error"]


def test_fsspec_paths_are_read_and_written(photos: Path, tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.pipe("/pictures/a.png", (photos / "000.png").read_bytes())
    artifact = load_artifact(OLD)
    classify(
        ["memory://pictures/a.png", "memory://pictures/none.png", str(photos / "000.png")],
        artifact,
        tmp_path / "rows.jsonl",
    )
    first, missing, same = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert first["classes"] == same["classes"]
    assert "FileNotFoundError" in missing["error"]
    place = Rows("memory://out/rows")
    assert place.names() == set()
    place.write("part-000000-x.jsonl", [Row(path="a", error="e")], several=False)
    assert place.names() == {"part-000000-x.jsonl"}
    assert memory.cat("/out/rows/part-000000-x.jsonl") == b'{"path": "a", "error": "e"}\n'
    place.remove(place.names())
    assert place.names() == set()


def test_bad_input_is_one_line(
    photos: Path, call: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    ray = ("--engine", "ray", "--output", out)
    for arguments, said in (
        (("--engine", "spark"), "engine 'spark' is unknown"),
        (("--engine", "ray"), "--engine ray needs --output"),
        (("--actors", "2"), "--address and --actors go with --engine ray"),
        ((*ray, "--actors", "0"), "actors is 0"),
        ((*ray, "--shard-size", "0"), "shard size is 0"),
        ((*ray, "--format", "csv"), "format 'csv' is unknown"),
        ((*ray, "--top", "11"), "top must lie between 1 and the 10 classes"),
    ):
        code, _, err = call("classify", photos, "--model", OLD, *arguments)
        assert (code, said in err, len(err.splitlines())) == (2, True, 1), err
    out.mkdir()
    (out / "part-000000-0123456789ab.jsonl").write_text("")
    for more, said in (((), "has parts already"), (("--resume",), "a part of other images")):
        code, _, err = call("classify", photos, "--model", OLD, *ray, *more)
        assert (code, said in err) == (2, True), err
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = call("classify", photos, "--model", OLD, "--engine", "ray", "--output", tmp_path / "new")
    assert (code, 'pip install "convscale[ray]"' in err) == (2, True), err


def test_bad_images_and_options_count_on_ray_too(
    photos: Path, call: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    done = Classified(images=40, errors=3, seconds=2.0, resumed=0)
    monkeypatch.setattr(ray_engine, "classify_on_ray", lambda *_, **__: done)
    ask = ("classify", photos, "--model", OLD, "--engine", "ray", "--output", tmp_path / "out")
    code, _, err = call(*ask, "--max-bad-rate", 0.05)
    assert (code, err.splitlines()[-1]) == (2, "convscale: 3 of 40 images are bad, at most 5.0% may be")
    assert call(*ask, "--max-bad-rate", 0.1)[0] == call(*ask)[0] == 0
    resumed = Classified(images=40, errors=1, seconds=2.0, resumed=60, resumed_errors=8)
    monkeypatch.setattr(ray_engine, "classify_on_ray", lambda *_, **__: resumed)
    code, _, err = call(*ask, "--max-bad-rate", 0.05, "--resume")
    assert (code, err.splitlines()[-1]) == (2, "convscale: 9 of 100 images are bad, at most 5.0% may be")
    for more in (("--device", "cuda"), ("--workers", 2)):
        code, _, err = call(*ask, *more)
        assert (code, "--device, --workers and --decode go with --engine local" in err, len(err.splitlines())) == (
            2,
            True,
            1,
        )


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_bad_images_of_parts_that_are_kept_count(
    photos: Path, tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(ray_engine, "_run", here)
    paths = [str(path) for path in sorted(photos.iterdir())]  # number 13 is damaged
    out, artifact, cluster = tmp_path / "rows", load_artifact(OLD), Cluster(shard_size=SIZE)
    first = classify_on_ray(paths, artifact, str(out), cluster=cluster, format=format)
    assert (first.images, first.errors, first.resumed, first.resumed_errors) == (COUNT, 1, 0, 0)
    for name in ("part-000000-*", "part-000003-*"):
        next(out.glob(name)).unlink()
    again = classify_on_ray(paths, artifact, str(out), cluster=cluster, format=format, resume=True)
    assert (again.images, again.errors, again.resumed, again.resumed_errors) == (2 * SIZE, 0, COUNT - 2 * SIZE, 1)
    (kept,) = out.glob("part-000001-*")
    kept.write_bytes(b'{"error"\n')
    with pytest.raises(UserError, match=rf"^part {kept.name} of {out} is damaged: .*; remove it$"):
        classify_on_ray(paths, artifact, str(out), cluster=cluster, format=format, resume=True)


def test_parts_that_are_kept_are_read_only_where_their_bad_images_count(
    photos: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    monkeypatch.setattr(ray_engine, "_run", here)
    out = tmp_path / "rows"
    ask = ("classify", photos, "--model", OLD, "--engine", "ray", "--output", out, "--shard-size", SIZE)
    assert call(*ask)[0] == 0
    next(out.glob("part-000002-*")).unlink()
    opened: list[str] = []

    def fails(_: Rows, name: str) -> Any:
        opened.append(name)
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Rows, "_opened", fails)
    assert (call(*ask, "--resume")[0], opened) == (0, [])
    next(out.glob("part-000002-*")).unlink()
    code, _, err = call(*ask, "--resume", "--max-bad-rate", 0.1)
    assert (code, bool(opened)) == (2, True)
    assert "can not be read: [Errno 13] Permission denied; use --resume once it can be" in err
    assert "remove it" not in err


def test_relative_paths_are_the_drivers(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Actors of a cluster looked for them in the cluster's own folder, and wrote there."""
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (mine := tmp_path / "mine").mkdir()
    (mine / "a.png").write_bytes((photos / "000.png").read_bytes())
    monkeypatch.chdir(mine)
    (shard,) = shards_of(["a.png"], size=2, format="jsonl", facts="")
    here = ray_engine._here("rows", [shard])
    monkeypatch.chdir(elsewhere)
    actor = ClassifyShards(str(OLD.resolve()), 1, 1, None, "rows", here)
    assert actor({"file": [shard.file], "paths": [np.array(shard.paths)]})["errors"] == [0]
    (row,) = rows_of(mine / "rows")
    assert (row["path"], list(elsewhere.iterdir())) == ("a.png", [])  # as it was given
    with pytest.raises(UserError, match=rf" has no folder {tmp_path}/gone, from which the paths go out"):
        ClassifyShards(str(OLD), 1, 1, None, "rows", f"{tmp_path}/gone")


@pytest.mark.parametrize(
    ("output", "path", "relative"),
    [
        ("rows", "/a.png", True),
        ("/rows", "a.png", True),
        ("/rows", "/a.png", False),
        ("s3://bucket/rows", "s3://bucket/a.png", False),
        ("file:///rows", "/a.png", False),
        ("file://rows", "/a.png", True),
    ],
)
def test_only_relative_paths_need_the_drivers_folder(output: str, path: str, relative: bool) -> None:
    shards = list(shards_of(["/b.png", path], size=1, format="jsonl", facts=""))
    assert ray_engine._here(output, shards) == (os.getcwd() if relative else None)


@pytest.mark.parametrize("output", ["file:///data/rows", "s3://bucket/rows", "rows", "/data/rows"])
def test_an_output_of_ray_is_taken_as_it_is_named(
    photos: Path, call: Callable[..., tuple[int, str, str]], output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``file:///data/rows`` became ``file://data/rows``, a folder beside the user's."""
    found: list[str] = []

    def classified(paths: Iterator[str], artifact: Artifact, output: str, **_: object) -> Classified:
        found.append(output)
        return Classified(images=1, errors=0, seconds=1.0, resumed=0)

    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    monkeypatch.setattr(ray_engine, "classify_on_ray", classified)
    code, said, _ = call("classify", photos, "--model", OLD, "--engine", "ray", "--output", output, "--json")
    assert (code, found, json.loads(said)["output"]) == (0, [output], output)


def test_parts_that_others_wrote_are_found_by_one_look(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3's file system remembers what it listed, and did not see what the actors wrote; it was asked once a shard."""
    fsspec = pytest.importorskip("fsspec")
    local = fsspec.get_filesystem_class("file")

    class Remembering(local):
        protocol = "remembering"
        looks = 0

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return local._strip_protocol(path.removeprefix("remembering://"))

        def ls(self, path: str, detail: bool = False, **_: object) -> Any:
            if path not in self.dircache:
                Remembering.looks += 1
                self.dircache[path] = super().ls(path, detail=True)
            found = self.dircache[path]
            return found if detail else [each["name"] for each in found]

        def invalidate_cache(self, path: str | None = None) -> None:
            self.dircache.clear()

    fsspec.register_implementation("remembering", Remembering, clobber=True)
    (out := tmp_path / "rows").mkdir()
    monkeypatch.setattr(
        ray_engine, "_run", lambda shards, artifact, output, *_: here(shards, artifact, str(out))
    )  # whose parts that file system is not told of
    paths = [str(path) for path in sorted(photos.iterdir())]
    done = classify_on_ray(paths, load_artifact(OLD), f"remembering://{out}", cluster=Cluster(shard_size=SIZE))
    assert (done.images, parts(out)) == (COUNT, 6)
    assert Remembering.looks == 2  # before and after


@pytest.mark.parametrize("kind", ["file", "local", "far", "oss"])
def test_a_part_that_could_not_be_written_whole_is_not_there(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsspec opens this machine's files under their last name: on a full disk a torn part stayed, and counted as done.
    A store that shows whole objects alone is not asked to move them.
    """
    fsspec = pytest.importorskip("fsspec")
    local = fsspec.get_filesystem_class("file")
    opener = pytest.importorskip("fsspec.implementations.local").LocalFileOpener
    full = True

    def write(file: Any, data: bytes) -> int:
        if full:
            file.f.write(data[:7])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return file.f.write(data)

    class Far(local):
        protocol = kind

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return local._strip_protocol(path.removeprefix(f"{kind}://"))

        def mv(self, path1: str, path2: str, **options: Any) -> None:
            assert kind != "oss"
            super().mv(path1, path2, **options)

    if kind in ("far", "oss"):
        fsspec.register_implementation(kind, Far, clobber=True)
    monkeypatch.setattr(opener, "write", write)
    rows, name = [Row(path="a", error="e")], "part-000000-x.jsonl"
    place = Rows(f"{kind}://{tmp_path}/out")
    if kind == "far":
        with pytest.raises(OSError, match="No space left"):
            place.write(name, rows, several=False)
        assert (place.names(), list((tmp_path / "out").iterdir())) == (set(), [])
    full = kind in ("file", "local")  # which fsspec does not open here
    (tmp_path / "out").mkdir(exist_ok=True)
    place.write(name, rows, several=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
    assert (tmp_path / "out" / name).read_bytes() == b'{"path": "a", "error": "e"}\n'
    assert (place.names(), place.errors(name)) == ({name}, 1)
    place.remove([name])
    assert place.names() == set()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1 ("),
        ("ray://127.0.0.1:1", "no Ray cluster answers at ray://127.0.0.1:1 ("),
        ("nowhere", "Ray address 'nowhere' is none; host:port, ray://host:port or auto would be right"),
    ],
)
def test_a_cluster_that_does_not_answer_is_one_line_and_removes_nothing(
    address: str, said: str, photos: Path, call: Callable[..., tuple[int, str, str]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    (part := tmp_path / "part-000000-0123456789ab.jsonl").write_text("{}")
    ask = ("classify", photos, "--model", OLD, "--engine", "ray", "--output", tmp_path, "--overwrite")
    code, _, err = call(*ask, "--address", address)
    assert (code, err.startswith(f"convscale: {said}"), len(err.splitlines())) == (2, True, 1), err
    assert part.read_text() == "{}"


@pytest.mark.parametrize(("address", "wanted"), [(None, "local"), ("10.0.0.5:6379", "10.0.0.5:6379")])
def test_without_an_address_a_cluster_of_its_own_is_started(
    address: str | None, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray joined the one that ran on this machine, or RAY_ADDRESS's, and refused a number of cores."""
    begun: list[dict[str, object]] = []

    def init(**given: object) -> None:
        begun.append(given)
        raise ValueError("no\nroom")

    ray = ModuleType("ray")
    ray.__dict__.update(init=init, is_initialized=lambda: False)
    for name, module in {"ray": ray, "ray.data": ModuleType("ray.data"), "ray.exceptions": ModuleType("x")}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("convscale.ship.cluster.check_answers", lambda address: None)
    said = (
        r"^(no Ray cluster can be started on this machine: no; engine|the Ray cluster at 10.0.0.5:6379 can not be used)"
    )
    with pytest.raises(UserError, match=said):
        list(ray_engine._run([], load_artifact(OLD), "out", ray_engine.Cluster(address=address), 1, None))
    assert begun[0]["address"] == wanted
    assert ("num_cpus" in begun[0]) == (address is None)


SLOWED = """
import sys, time
from convscale.images.preprocess import Preprocessing
from convscale.ship import ray_engine
whole = ray_engine.ClassifyShards.__call__
def slowed(self, batch):
    time.sleep(0.4)
    return whole(self, batch)
ray_engine.ClassifyShards.__call__ = slowed
import cloudpickle
cloudpickle.register_pickle_by_value(ray_engine)  # so that the actors are slowed too
from convscale.cli.app import main
main()
"""


def started(photos: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    arguments = ["classify", str(photos), "--model", str(OLD), "--engine", "ray", "--output", str(out), "--top", "2"]
    environment = {**os.environ, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    return subprocess.Popen(
        [sys.executable, "-c", SLOWED, *arguments, "--shard-size", str(SIZE), "--actors", "2", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def parts(out: Path) -> int:
    return len(list(out.glob("part-*"))) if out.is_dir() else 0


def wait_for_parts(out: Path, count: int, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while parts(out) < count and time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_an_actor_writes_the_rows_of_the_usual_engine(photos: Path, tmp_path: Path) -> None:
    paths = [str(path) for path in sorted(photos.iterdir())]
    shards = list(shards_of(paths, size=SIZE, format="jsonl", facts=""))
    actor = ClassifyShards(str(OLD), 1, 2, None, str(tmp_path / "rows"))
    for shard in reversed(shards):  # they may come in any order
        told = actor({"file": [shard.file], "paths": [np.array(shard.paths)]})
        assert told == {"file": [shard.file], "images": [len(shard.paths)], "errors": [int(shard.number == 1)]}
    assert rows_of(tmp_path / "rows") == expected(photos, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc on this system")
def test_nothing_is_lost_or_twice_when_an_actor_and_then_the_driver_is_killed(photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    out = tmp_path / "rows"
    process = started(photos, out)
    wait_for_parts(out, 1, process)
    (victim, *_) = actors_of(process.pid)
    os.kill(victim, signal.SIGKILL)
    wait_for_parts(out, 4, process)  # the others go on, and so does the killed one's successor
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = parts(out)
    assert 4 <= before < 6
    process = started(photos, out, "--resume")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f"{before * SIZE if before < 6 else COUNT} done before" in err
    assert rows_of(out) == expected(photos, tmp_path)
    assert not list(out.glob(".*"))
    shutil.rmtree(out)
