"""Classifying files: order, errors as rows, bounded memory, resuming."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convscale.artifact.artifact import Artifact, load_artifact
from convscale.errors import UserError
from convscale.images.decode import read_image
from convscale.images.preprocess import Preprocessing
from convscale.locks import OutputLock
from convscale.ship import stream as module
from convscale.ship.ray_engine import ClassifyShards
from convscale.ship.stream import classify, classify_stream, image_paths, read_url


class Colours:
    """An artefact that says which channel is the brightest, and counts its calls."""

    classes = ("red", "green", "blue")
    preprocessing = Preprocessing(image_size=8, mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=1.0)
    batch_size, is_detector = 4, False
    thresholds: tuple[float, ...] | None = None

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, images: np.ndarray, *, batch_size: int) -> np.ndarray:
        assert len(images) <= batch_size
        assert (images.dtype, images.shape[1:]) == (np.uint8, (8, 8, 3))
        self.calls.append(len(images))
        means = images.mean((1, 2), dtype=np.float64)
        return (means / means.sum(1, keepdims=True)).astype(np.float32)


@pytest.fixture
def artifact() -> Colours:
    return Colours()


def colour(i: int) -> tuple[int, int, int]:
    return ((200, 50, 0), (50, 200, 0), (0, 50, 200))[i % 3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """11 flat PNGs in two folders, red, green, blue in turn; one of them damaged, one that is no image."""
    place = tmp_path / "photos"
    (place / "b").mkdir(parents=True)
    for i in range(11):
        Image.new("RGB", (16, 16), colour(i)).save(place / ("b" if i >= 8 else "") / f"{i:02}.png")
    (place / "04.png").write_bytes((place / "04.png").read_bytes()[:40])
    (place / "07.png").write_text("not an image")
    (place / "notes.txt").write_text("left out")
    return place


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_in_order_with_errors_as_rows(folder: Path, artifact: Colours, tmp_path: Path) -> None:
    result = classify(image_paths([str(folder)]), artifact, tmp_path / "out.csv")
    rows = rows_of((tmp_path / "out.csv").read_text())
    assert [Path(row["path"]).name for row in rows] == [f"{i:02}.png" for i in range(11)]
    assert [row["class"] for row in rows] == ["" if i in (4, 7) else ("red", "green", "blue")[i % 3] for i in range(11)]
    assert float(rows[0]["probability"]) == pytest.approx(0.8)
    assert "truncated" in rows[4]["error"] or "damaged" in rows[4]["error"]
    assert rows[7]["error"].startswith("not a JPEG")
    assert (result.images, result.errors, result.resumed) == (11, 2, 0)
    assert artifact.calls == [4, 2, 3]  # bad images are left out of a batch, not run as something else


def test_json_lines_with_the_best_three(folder: Path, artifact: Colours) -> None:
    out = io.StringIO()
    classify([str(folder / "00.png"), str(folder / "07.png")], artifact, out, format="jsonl", top=3)
    good, bad = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [c["class"] for c in good["classes"]] == ["red", "green", "blue"]
    assert [c["probability"] for c in good["classes"]] == pytest.approx([0.8, 0.2, 0.0])
    assert set(bad) == {"path", "error"}


def test_csv_columns_for_more_classes(folder: Path, artifact: Colours) -> None:
    out = io.StringIO()
    classify([str(folder / "00.png")], artifact, out, top=2)
    assert out.getvalue().splitlines()[0] == "path,class_1,probability_1,class_2,probability_2,error"
    assert out.getvalue().splitlines()[1].endswith(",red,0.8,green,0.2,")


def test_arguments(folder: Path) -> None:
    names = [f"{i:02}.png" for i in range(11)]
    assert [Path(p).name for p in image_paths([str(folder)])] == names
    assert [Path(p).name for p in image_paths([str(folder / "*.png")])] == names[:8]
    assert [Path(p).name for p in image_paths([str(folder / "**" / "*.png")])] == names
    assert list(image_paths(["-", str(folder / "notes.txt")], ["x.jpg\n", "\n", "y z.png\r\n"])) == [
        "x.jpg",
        "y z.png",
        str(folder / "notes.txt"),
    ]


def test_arguments_that_mean_nothing(folder: Path) -> None:
    with pytest.raises(UserError, match=r"image nowhere\.jpg does not exist"):
        image_paths(["nowhere.jpg"])
    with pytest.raises(UserError, match=r"\*\.gif gives no image; known extensions: \.jpg"):
        image_paths([str(folder / "*.gif")])
    with pytest.raises(UserError, match="no images are named"):
        image_paths([])
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="empty gives no image"):
        image_paths([str(folder / "empty")])


def test_a_missing_file_on_a_list_is_a_row(folder: Path, artifact: Colours) -> None:
    rows = list(classify_stream(["nowhere.png", str(folder / "00.png")], artifact))
    assert [row.error for row in rows] == ["can not be read (No such file or directory)", ""]


def test_an_image_bomb_is_a_row(folder: Path, artifact: Colours) -> None:
    (row,) = classify_stream([str(folder / "00.png")], artifact, max_pixels=100)
    assert "above the cap" in row.error


def test_resume_goes_on_where_it_stopped(folder: Path, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole.csv", tmp_path / "part.csv"
    classify(image_paths([str(folder)]), Colours(), whole)
    lines = whole.read_text().splitlines(keepends=True)
    for kept in (0, 1, 2, 6, 12):
        part.write_text("".join(lines[:kept]) + ("" if kept in (0, 12) else lines[kept][:9]))  # and a torn line
        artifact = Colours()
        result = classify(image_paths([str(folder)]), artifact, part, resume=True)
        assert part.read_text() == whole.read_text()
        assert result.resumed == max(0, kept - 1)
        assert result.images == 11 - result.resumed


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_bad_images_of_an_earlier_run_count(folder: Path, tmp_path: Path, ending: str) -> None:
    """A run that was resumed was judged by what was left of it."""
    out = tmp_path / f"out.{ending}"
    classify(image_paths([str(folder)]), Colours(), out)  # images 4 and 7 are bad
    lines = out.read_text().splitlines(keepends=True)
    for kept, errors, before in ((4, 2, 0), (6, 1, 1), (8, 0, 2), (11, 0, 2)):
        out.write_text("".join(lines[: kept + (ending == "csv")]))
        done = classify(image_paths([str(folder)]), Colours(), out, resume=True)
        assert (done.resumed, done.images, done.errors, done.resumed_errors) == (kept, 11 - kept, errors, before)


def test_resume_json_lines(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    classify(image_paths([str(folder)]), Colours(), out)
    text = out.read_text()
    out.write_text("".join(text.splitlines(keepends=True)[:5]) + '{"path": "/x')
    assert classify(image_paths([str(folder)]), Colours(), out, resume=True).resumed == 5
    assert out.read_text() == text


def test_resume_with_other_files_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    classify([str(folder / "00.png")], Colours(), out)
    before = out.read_text()
    with pytest.raises(
        UserError, match=r"has a row for .*00\.png where the list has .*01\.png; resume with the same images"
    ):
        classify([str(folder / "01.png")], Colours(), out, resume=True)
    with pytest.raises(UserError, match="has other columns than path,class_1"):
        classify([str(folder / "00.png")], Colours(), out, resume=True, top=2)
    (tmp_path / "diary.csv").write_text("dear,diary\n")
    with pytest.raises(UserError, match="no table of convscale classify"):
        classify([str(folder / "01.png")], Colours(), tmp_path / "diary.csv", resume=True)
    assert out.read_text() == before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("notes.json", '{"my":"notes"}'),
        ("notes.json", "[]"),
        ("list.json", '{"path": "PATH", "label": "red"}'),
        ("list.json", '{"path": "PATH", "label": "red"}\n{"path": "x'),
        ("notes.jsonl", "dear diary\ntoday"),
        ("notes.csv", "dear diary"),
        ("notes.csv", "\ndear diary"),
        ("list.csv", "path,label"),
        ("list.csv", "path,label\na.png,red"),
        ("list.csv", "path,class,probability,error\nother.png,red,1,\nlast"),
    ],
)
def test_resume_leaves_a_file_of_the_users_own_untouched(folder: Path, tmp_path: Path, name: str, text: str) -> None:
    path, out = str(folder / "00.png"), tmp_path / name
    out.write_text(text.replace("PATH", path))
    before = out.read_bytes()
    with pytest.raises(UserError, match=r"is no table of convscale classify|has other columns than|has a row for"):
        classify([path], Colours(), out, resume=True)
    assert out.read_bytes() == before


def test_resume_goes_on_behind_any_first_line_of_ours(folder: Path, tmp_path: Path) -> None:
    path = str(folder / "00.png")
    for name in ("out.csv", "out.jsonl"):
        out = tmp_path / name
        classify([path], Colours(), out)
        whole = out.read_bytes()
        for size in range(len(whole) + 1):
            out.write_bytes(whole[:size])
            assert classify([path], Colours(), out, resume=True).resumed == (size == len(whole))
            assert out.read_bytes() == whole


def test_an_output_that_is_a_pipe_is_refused(folder: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "out.csv"
    os.mkfifo(pipe)
    for options in ({"resume": True}, {"overwrite": True}, {}):
        with pytest.raises(UserError, match=r"out\.csv is no regular file; name another"):
            classify([str(folder / "00.png")], Colours(), pipe, **options)
    assert classify([str(folder / "00.png")], Colours(), "/dev/null", format="csv").images == 1


def test_a_file_behind_a_url_is_not_read_beyond_a_pictures_size(
    folder: Path, artifact: Colours, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fsspec").filesystem("memory").pipe("/huge.png", (folder / "00.png").read_bytes())
    for place in ("convscale.images.decode", "convscale.ship.stream"):
        monkeypatch.setattr(f"{place}.MAX_BYTES", 20)
    (row,) = classify_stream(["memory://huge.png"], artifact)
    assert row.error == "the file has 0 MB, above the cap of 0"


class InPieces(BaseHTTPRequestHandler):
    """A server that says no length, and sends in three pieces; a name of digits is that many bytes, any other a file's
    in the working folder.
    """

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        name = self.path.removeprefix("/")
        data = b"x" * int(name) if name.isdigit() else Path(name).read_bytes()
        third = len(data) // 3
        with suppress(BrokenPipeError, ConnectionResetError):  # whoever asks for the length alone goes away
            for piece in (data[:third], data[third : 2 * third], data[2 * third :]):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                self.wfile.flush()
                time.sleep(0.02)
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def test_a_picture_that_comes_in_pieces_is_read_whole(
    folder: Path, artifact: Colours, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp")
    pytest.importorskip("fsspec")
    monkeypatch.chdir(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), InPieces)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = f"http://127.0.0.1:{server.server_port}"
    try:
        assert bytes(read_url(f"{place}/01.png")) == Path("01.png").read_bytes()
        (row,) = classify_stream([f"{place}/01.png"], artifact)
        assert (row.error, row.classes) == ("", ("green",))
        for name in ("convscale.images.decode", "convscale.ship.stream"):
            monkeypatch.setattr(f"{name}.MAX_BYTES", 300)
        assert len(read_url(f"{place}/300")) == 300
        with pytest.raises(UserError, match="the file has 0 MB, above the cap of 0"):
            read_url(f"{place}/900")
    finally:
        server.shutdown()
        server.server_close()


def test_existing_output(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out.csv").write_text("precious")
    with pytest.raises(UserError, match="exists; use --resume, --overwrite"):
        classify([str(folder / "00.png")], Colours(), tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == "precious"
    classify([str(folder / "00.png")], Colours(), tmp_path / "out.csv", overwrite=True)
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 2


def test_memory_is_bounded(folder: Path, artifact: Colours) -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield str(folder / "00.png")

    stream = classify_stream(endless(), artifact)
    for done in range(1, 200):
        next(stream)
        assert taken <= done + (module.AHEAD + 1) * artifact.batch_size
    stream.close()


def test_decoding_overlaps_inference(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the network runs its first batch, images of later batches are decoded: it waits until one has been."""
    later = threading.Event()
    decode, count = module._decode, 0

    def counting(*arguments: object) -> np.ndarray:
        nonlocal count
        count += 1
        if count > 4:
            later.set()
        return decode(*arguments)  # type: ignore[arg-type]

    class Waiting(Colours):
        def __call__(self, images: np.ndarray, *, batch_size: int) -> np.ndarray:
            assert later.wait(20)
            return super().__call__(images, batch_size=batch_size)

    monkeypatch.setattr(module, "_decode", counting)
    assert len(list(classify_stream([str(folder / "00.png")] * 12, Waiting(), workers=1))) == 12


def test_odd_names(folder: Path, tmp_path: Path) -> None:
    odd = folder / 'a, "b"\nc.png'
    odd.write_bytes((folder / "00.png").read_bytes())
    out = tmp_path / "out.csv"
    classify([str(odd)], Colours(), out)
    assert rows_of(out.read_text())[0]["path"] == str(odd).replace("\n", "\\n")
    assert classify([str(odd), str(folder / "01.png")], Colours(), out, resume=True).resumed == 1


def test_progress_and_bad_input(folder: Path, artifact: Colours, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    classify(image_paths([str(folder)]), artifact, io.StringIO(), on_rows=lambda n, bad: seen.append((n, bad)))
    assert seen == [(4, 0), (8, 2), (11, 2)]
    with pytest.raises(UserError, match="format 'xml' is unknown"):
        classify([], artifact, io.StringIO(), format="xml")
    with pytest.raises(UserError, match="top must lie between 1 and the 3 classes, got 4"):
        list(classify_stream([], artifact, top=4))
    with pytest.raises(UserError, match="is a folder; name a file"):
        classify([], artifact, tmp_path)


def test_several_labels_are_those_above_their_thresholds(folder: Path, tmp_path: Path) -> None:
    several = Colours()
    several.thresholds = (0.2, 0.9, 0.0)
    row = next(iter(classify_stream([str(folder / "00.png")], several, top=1)))
    shares = dict(
        zip(
            several.classes,
            several(several.preprocessing.resize(read_image(folder / "00.png"))[None], batch_size=1)[0],
            strict=True,
        )
    )
    assert row.labels == tuple(
        name for name, least in zip(several.classes, several.thresholds, strict=True) if shares[name] > least
    )
    classify([str(folder / "00.png")], several, tmp_path / "rows.csv")
    with open(tmp_path / "rows.csv", newline="", encoding="utf-8") as file:
        written = next(csv.DictReader(file))
    assert list(written) == ["path", "labels", "class", "probability", "error"]
    assert json.loads(written["labels"]) == list(row.labels or ())
    classify([str(folder / "00.png")], several, tmp_path / "rows.jsonl")
    assert json.loads((tmp_path / "rows.jsonl").read_text())["labels"] == list(row.labels or ())


def test_a_second_run_on_one_output_is_refused(folder: Path, tmp_path: Path) -> None:
    """Two `classify --resume` on one file left rows of both, interleaved."""
    paths, output = [str(folder / "00.png")], tmp_path / "rows.csv"
    classify(paths, Colours(), output)
    before = output.read_text()
    with OutputLock() as lock:
        lock.take(output)
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(UserError, match=r"output .*rows\.csv is being written by another run"):
                classify(paths, Colours(), output, **options)
    assert output.read_text() == before
    assert classify(paths, Colours(), output, resume=True).resumed == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_note_that_nobody_reads_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was told as an output that can not be written."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as gone:
        monkeypatch.setattr(sys, "stderr", gone)
        module._on_stderr("decoded by nvJPEG")
        monkeypatch.undo()


def test_a_full_disk_is_told_by_its_own_message(folder: Path, tmp_path: Path) -> None:
    """Guards: the file was closed while the message was on its way, which failed again and took its place."""
    (tmp_path / "rows.csv").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"no space left on the disk of .*rows\.csv; 1 images are done, free some"):
        classify([str(folder / "00.png")], Colours(), tmp_path / "rows.csv")


class Broken(Colours):
    """Gives NaN for the first of its images."""

    def __call__(self, images: np.ndarray, *, batch_size: int) -> np.ndarray:
        found = super().__call__(images, batch_size=batch_size)
        found[0, 1] = np.nan
        return found


def test_outputs_that_are_no_numbers_are_an_error_of_their_row(folder: Path) -> None:
    rows = list(classify_stream([str(folder / "00.png"), str(folder / "01.png")], Broken()))
    assert [row.error for row in rows] == ["the network's outputs are not finite numbers", ""]
    assert rows[0].classes == ()
    assert rows[1].classes == ("green",)


def test_impossible_options(folder: Path) -> None:
    for option in ("batch_size", "workers"):
        with pytest.raises(UserError, match=f"{option} must be at least 1, got 0"):
            classify([str(folder / "00.png")], Colours(), io.StringIO(), **{option: 0})


class Counted:
    """An artefact's runner, with the batches that it was given."""

    def __init__(self, artifact: Artifact) -> None:
        self.inner, self.batches = artifact.runner, list[int]()
        artifact._runner = self  # pyright: ignore[reportAttributeAccessIssue]

    def __call__(self, batch: np.ndarray) -> tuple[np.ndarray, ...]:
        self.batches.append(len(batch))
        return self.inner(batch)


@pytest.mark.parametrize(("asked", "batches"), [(None, [32, 32, 6]), (50, [50, 20]), (30, [30, 30, 10])])
def test_a_call_has_as_many_images_as_are_asked_for(
    onnx_art: Artifact, folder: Path, tmp_path: Path, asked: int | None, batches: list[int]
) -> None:
    paths = [str(folder / "00.png")] * 70
    made = load_artifact(onnx_art.folder)
    counted = Counted(made)
    rows = list(classify_stream(paths, made, batch_size=asked, workers=1))
    assert (len(rows), counted.batches) == (70, batches)
    counted.batches.clear()
    assert len(made.classify(paths, batch_size=asked)) == 70
    assert counted.batches == batches
    counted.batches.clear()
    assert made(np.zeros((70, 32, 32, 3), np.uint8), batch_size=asked).shape == (70, 5)
    assert counted.batches == batches
    actor = ClassifyShards(str(onnx_art.folder), 1, 1, asked, str(tmp_path / "parts"))
    counted = Counted(actor.artifact)
    actor({"file": ["part-0.jsonl"], "paths": [paths]})
    assert counted.batches == batches


def test_a_batch_below_1_is_told(onnx_art: Artifact) -> None:
    for ask in (onnx_art, onnx_art.logits, onnx_art.classify):
        with pytest.raises(UserError, match="batch_size"):
            ask(np.zeros((2, 32, 32, 3), np.uint8), batch_size=0)  # pyright: ignore[reportArgumentType]


FRESH = """
import sys
import convscale as cs
from convscale.ship.stream import classify, image_paths
done = classify(image_paths(sys.argv[2:]), cs.load_artifact(sys.argv[1]), sys.stdout, workers=4)
"""


def test_png_and_jpeg_together_in_a_fresh_process(onnx_art: Artifact, tmp_path: Path) -> None:
    """Guards wrong answer 14 of issue E: threads imported the decoders at the same time, one found half of one."""
    paths = []
    for i, ending in enumerate(("png", "jpg", "png", "jpg")):
        paths.append(str(tmp_path / f"{i}.{ending}"))
        Image.new("RGB", (40, 40), colour(i)).save(paths[-1])
    command = [sys.executable, "-W", "error", "-c", FRESH, str(onnx_art.folder), *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert [(row["path"], row["error"]) for row in rows_of(done.stdout)] == [(path, "") for path in paths]
