"""The walker: links, pipes, hidden files, and the report of what is left out."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from convscale.errors import SystemTrouble, UserError
from convscale.images import walk
from convscale.images.decode import ImageError, check_image, read_bytes
from convscale.images.sources import open_dataset
from convscale.images.walk import Tally, is_hidden, pictures_below
from convscale.ship.stream import image_paths

MakeTree = Callable[..., Path]


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail what hangs."""

    def late(*_: object) -> None:
        raise AssertionError(f"still not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def names(folder: Path, tally: Tally | None = None, files_first: bool = False) -> list[str]:
    return [os.path.relpath(path, folder) for path in pictures_below(str(folder), tally, files_first=files_first)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "photos"
    for name in ("b.jpg", "a/x.png", "a/deep/y.jpg", "c/z.jpg"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(b"x")
    return place


def test_order(folder: Path) -> None:
    assert names(folder) == ["a/deep/y.jpg", "a/x.png", "b.jpg", "c/z.jpg"]
    assert names(folder, files_first=True) == ["b.jpg", "a/x.png", "a/deep/y.jpg", "c/z.jpg"]


def test_links_are_followed_once(folder: Path, tmp_path: Path) -> None:
    before, tally = names(folder), Tally()
    (folder / "a" / "loop").symlink_to(".")
    (folder / "a" / "up").symlink_to("..")
    (folder / "m1").mkdir()
    (folder / "m2").mkdir()
    (folder / "m1" / "to2").symlink_to("../m2")
    (folder / "m2" / "to1").symlink_to("../m1")
    (folder / "round").symlink_to("round")
    with within(20):
        assert names(folder, tally) == before
    # a/loop, a/up; m2, which m1/to2 reached before, and m2/to1 on the way: m1
    assert tally.report().count(walk.SEEN) == 4
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "n.jpg").write_bytes(b"x")
    (folder / "d").symlink_to(elsewhere)
    (folder / "e.jpg").symlink_to(elsewhere / "n.jpg")
    (folder / "f.jpg").symlink_to(elsewhere / "gone.jpg")
    tally = Tally()
    assert [name for name in names(folder, tally) if name not in before] == ["d/n.jpg", "e.jpg"]
    assert tally.report().count(walk.BROKEN_LINK) == 1


def test_patterns_do_not_go_round_in_links(folder: Path) -> None:
    (folder / "a" / "up").symlink_to("..")
    (folder / "c" / "up").symlink_to("..")
    with within(20):
        found = [os.path.relpath(path, folder) for path in image_paths([f"{folder}/**/*.jpg"])]
    assert found == ["a/deep/y.jpg", "b.jpg", "c/z.jpg"]
    assert list(image_paths([f"{folder}/**/deep/?.jpg"])) == [str(folder / "a" / "deep" / "y.jpg")]


def test_a_link_does_not_multiply_a_class(make_tree: MakeTree) -> None:
    root = make_tree({"cat": 12, "dog": 12})
    (root / "cat" / "loop").symlink_to(".")
    (root / "cat" / "others").symlink_to("../dog")
    (root / "dog" / "up").symlink_to("..")
    with within(60):
        data = open_dataset(root)
    assert data.whole().class_counts().tolist() == [12, 12]
    assert data.preflight.count(walk.SEEN) == 3
    assert f"left out: folders that a link reaches again: 3 (first: {root}/cat/loop)" in data.notes


def test_two_names_of_one_class_folder_are_refused(make_tree: MakeTree) -> None:
    root = make_tree({"cat": 5, "dog": 5})
    (root / "kitty").symlink_to("cat")
    with pytest.raises(UserError, match="class folders cat and kitty are one folder, by a link"):
        open_dataset(root)


def test_only_regular_files_are_opened(make_tree: MakeTree, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_tree({"cat": 5, "dog": 5})
    os.mkfifo(root / "cat" / "pipe.jpg")
    (root / "cat" / "device.jpg").symlink_to("/dev/zero")
    monkeypatch.chdir(root / "dog")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket.jpg")
        with within(60):
            data = open_dataset(root)
            assert len(list(image_paths([str(root)]))) == 10
    assert data.preflight.count(walk.NO_FILE) == 3
    assert len(data.whole()) == 10
    for open_it in (check_image, read_bytes):
        for name in ("cat/pipe.jpg", "cat/device.jpg", "cat"):
            with within(5), pytest.raises(ImageError, match="no regular file"):
                open_it(root / name)


def test_hidden_and_system_files_by_one_rule(make_tree: MakeTree) -> None:
    root = make_tree({"cat": 5, "dog": 5})
    picture = (root / "cat" / "000.jpg").read_bytes()
    for name in (".DS_Store", "cat/._000.jpg", "cat/Thumbs.db", "cat/.thumbs/a.jpg", "__MACOSX/cat/b.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture)
    data = open_dataset(root)
    assert data.classes == ("cat", "dog")
    assert len(data.whole()) == 10
    assert data.preflight.count(walk.HIDDEN) == 5
    assert len(list(image_paths([str(root)]))) == 10
    assert not is_hidden("thumbs.jpg")


def test_what_else_is_left_out_is_said(make_tree: MakeTree) -> None:
    root = make_tree({"cat": 5, "dog": 5})
    for name in ("loose.jpg", "README.md", "cat/a.txt", "cat/b.txt", "dog/noextension"):
        (root / name).write_bytes(b"x")
    notes = open_dataset(root).notes
    assert f"left out: images beside the class folders: 1 (first: {root}/loose.jpg)" in notes
    (said,) = [note for note in notes if "extension" in note]
    assert said == (
        f"left out: files without an image's extension: 4 (2 .txt, 1 .md, 1 no extension; first: {root}/README.md)"
    )


def test_a_closed_folder_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def closed(path: str) -> object:  # root may read everything, so the modes of files do not do
        if path.endswith("/a"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    tally = Tally()
    with monkeypatch.context() as patched:
        patched.setattr(walk.os, "scandir", closed)
        assert names(folder, tally) == ["b.jpg", "c/z.jpg"]
    assert tally.report().count(walk.CLOSED) == 1


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOMEM, errno.EIO])
def test_a_failing_system_is_not_an_empty_folder(folder: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(walk.os, "scandir", fail)
        with pytest.raises(SystemTrouble) as caught:
            list(pictures_below(str(folder)))
    assert "\n" not in str(caught.value)


def test_a_thousand_levels_are_no_recursion(tmp_path: Path) -> None:
    here = os.getcwd()
    try:
        os.chdir(tmp_path)
        deep = "d"
        for _ in range(1200):
            os.mkdir("d")
            os.chdir("d")
        Path("x.jpg").write_bytes(b"x")
        os.chdir(here)
        found = list(pictures_below(str(tmp_path)))
        assert [os.path.basename(path) for path in found] == ["x.jpg"]
        assert found[0].count(f"/{deep}/") > 0
    finally:
        os.chdir(here)
        # Python's own rmtree, with which pytest tidies up, goes as deep as the folders do and fails.
        subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)
