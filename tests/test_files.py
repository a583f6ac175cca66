"""Output folders: what is ours may be replaced, what is a user's never."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from convscale.errors import UserError
from convscale.files import (
    atomic_path,
    check_output_dir,
    json_numbers,
    new_output_dir,
    told,
    whole_folder,
    write_text,
)

COLUMNS = 400


def test_a_folder_of_pictures_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    (tmp_path / "photos" / "cats" / "1.jpg").write_bytes(b"x")
    for check in (check_output_dir, new_output_dir):
        with pytest.raises(UserError, match="holds something other than a run of convscale; nothing is done to it"):
            check(tmp_path / "photos", overwrite=True)
        with pytest.raises(UserError, match="nothing is done to it"):
            check(tmp_path / "photos", resume=True)  # it would leave a mark that makes the folder ours
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cats"]
    assert (tmp_path / "photos" / "cats" / "1.jpg").read_bytes() == b"x"


def test_a_folder_that_can_not_be_made_is_told_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("x")
    os.symlink("itself", tmp_path / "itself")
    for name in ("taken", "itself"):
        with pytest.raises(UserError, match=rf"run can not be written: \S*{name} is no folder"):
            check_output_dir(tmp_path / name / "deeper" / "run")
    assert check_output_dir(tmp_path / "new" / "run") == tmp_path / "new" / "run"
    monkeypatch.chdir(tmp_path)
    assert check_output_dir("new/run") == Path("new/run")
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path) != tmp_path)
    with pytest.raises(UserError, match=rf"run can not be written: {tmp_path} is read-only"):
        check_output_dir("new/run")


def test_demo_refuses_its_output_before_it_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from convscale.pipeline import demo

    monkeypatch.setattr(demo, "measure", lambda *_args, **_more: pytest.fail("it measures"))
    (tmp_path / "taken").write_text("x")
    with pytest.raises(UserError, match="is a file; name a folder"):
        demo.demo(output=tmp_path / "taken", data_dir=tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(UserError, match=r"full exists and is not empty; use another name$"):  # it has no other way
        demo.demo(output=tmp_path / "full", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("ways", "said"),
    [
        (("--resume", "--overwrite"), "use --resume, --overwrite or another name"),
        (("--overwrite",), "use --overwrite or another name"),
        ((), "use another name"),
    ],
)
def test_what_a_command_can_do_with_a_folder_that_is_there(tmp_path: Path, ways: tuple[str, ...], said: str) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UserError, match=f"exists and is not empty; {said}$"):
        check_output_dir(tmp_path, ways=ways)


def test_a_users_project_is_no_run(tmp_path: Path) -> None:
    for name in ("checkpoints", "recipe.yaml"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).mkdir()
        with pytest.raises(UserError, match="holds something other than a run"):
            new_output_dir(tmp_path / name, overwrite=True)


@pytest.mark.parametrize("older", [("fit.json",), ("recipe.yaml", "log.jsonl"), None])
def test_a_run_is_overwritten_when_asked(tmp_path: Path, older: tuple[str, ...] | None) -> None:
    run = tmp_path / "run"
    if older is None:
        new_output_dir(run)
    else:
        run.mkdir()
    for name in older or ("half-written",):
        (run / name).write_text("{}")
    with pytest.raises(UserError, match="use --resume, --overwrite or another name"):
        new_output_dir(run)
    new_output_dir(run, overwrite=True)
    assert [path.name for path in run.iterdir()] == [".convscale"]


def test_numbers_that_json_has_no_word_for_are_none() -> None:
    assert json_numbers({"a": [1.5, float("nan")], "b": (float("inf"), "x", 2)}) == {
        "a": [1.5, None],
        "b": [None, "x", 2],
    }


# ---------------------------------------------------------------- what outlives a power cut


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is flushed to the disk and renamed, in order."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def flushed(fd: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else f"file of {os.fstat(fd).st_size} bytes")
        fsync(fd)

    def replaced(old: str | Path, new: str | Path) -> None:
        done.append(f"rename to {Path(new).name}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", replaced)
    return done


def test_a_file_is_flushed_before_it_takes_its_name_and_its_folder_after(tmp_path: Path, steps: list[str]) -> None:
    """Else a power cut can leave an empty file under the name, or the old one (fsync(2), rename(2))."""
    write_text(tmp_path / "a.txt", "12345")
    assert steps == ["file of 5 bytes", "rename to a.txt", "folder"]


def test_a_folder_is_flushed_with_all_in_it_before_it_takes_its_name(tmp_path: Path, steps: list[str]) -> None:
    with whole_folder(tmp_path / "out") as staging:
        (staging / "a").write_text("1")
        (staging / "sub").mkdir()
        (staging / "sub" / "b").write_text("22")
    assert sorted(steps[:2]) == ["file of 1 bytes", "file of 2 bytes"]
    assert steps[2:] == ["folder", "folder", "rename to out", "folder"]  # sub, the folder itself; then its parent


# ---------------------------------------------------------------- places that can not be written


def test_a_link_is_written_through_and_stays(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").symlink_to(tmp_path / "there" / "real")
    (tmp_path / "folder").symlink_to(tmp_path / "there" / "out")
    write_text(tmp_path / "file", "x")
    for _ in range(2):
        with whole_folder(tmp_path / "folder") as staging:
            (staging / "a").write_text("x")
    assert (tmp_path / "file").is_symlink()
    assert (tmp_path / "folder").is_symlink()
    assert (tmp_path / "there" / "real").read_text() == (tmp_path / "there" / "out" / "a").read_text() == "x"
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["out", "real"]


@pytest.mark.parametrize("name", ["x" * 255, "\u00e9" * 127])
def test_a_name_of_the_longest_length_is_written(tmp_path: Path, name: str) -> None:
    """255 bytes is the most that Linux's file systems take; a temporary name beside it is no longer."""
    write_text(tmp_path / name, "x")
    with whole_folder(tmp_path / "sub" / name) as staging:
        (staging / "a").write_text("x")
    assert (tmp_path / name).read_text() == "x"


def test_an_error_of_the_file_system_is_one_line_with_its_path() -> None:
    for number, said in (
        (errno.ENOSPC, "no space left on the disk of /a/b; free some and run again"),
        (errno.EDQUOT, "no space left on the disk of /a/b; free some and run again"),
        (errno.EROFS, "/a/b can not be used: Read-only file system; name another"),
        (errno.EACCES, "/a/b can not be used: Permission denied; name another"),
        (errno.ENOTDIR, "/a/b can not be used: Not a directory; name another"),
    ):
        assert str(told(OSError(number, os.strerror(number), "/a/b"))) == said
    assert told(OSError(errno.ECHILD, "no child")) is None
    assert told(OSError("of our own")) is None
    long = told(OSError(errno.ENAMETOOLONG, "File name too long", "/tmp/" + "x" * 300 + "\n"))
    assert str(long).endswith("can not be used: File name too long; name another")
    assert len(str(long)) < 200


WRITERS = {
    "scale": ("scale", "resnet18", "--phi", "1", "--output", "{}.yaml"),
    "recipes": ("recipes", "small", "--output", "{}.yaml"),
}
"""Commands that write a file and need no torch for it."""


@pytest.mark.parametrize("command", list(WRITERS))
@pytest.mark.parametrize("place", ["file/x", "x" * 300, "loop/x", "sealed/x"])
def test_a_place_that_can_not_be_written_is_one_line(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path, command: str, place: str
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "sealed").mkdir(mode=0o555)
    if place.startswith("sealed") and os.access(tmp_path / "sealed", os.W_OK):
        pytest.skip("this user may write everywhere")
    code, _, err = call(*(word.format(tmp_path / place) for word in WRITERS[command]))
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith("convscale: ")
    assert "can not be used" in err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_standard_output_on_a_full_disk_is_one_line(tmp_path: Path) -> None:
    code = "import sys; from convscale.cli.app import main; sys.argv[0] = 'convscale'; main()"
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, "list", "--zoo", "own"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=240,
            check=False,
        )
    assert (done.returncode, done.stderr) == (2, "convscale: no space left on the disk; free some and run again\n")


def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "a", "old")

    def full(_fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(UserError, match="no space left on the disk of"),
        atomic_path(tmp_path / "a") as temporary,
    ):
        temporary.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_a_librarys_own_word_for_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors has an error of its own, which is no OSError."""
    from safetensors import SafetensorError

    def write() -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    line = f"no space left on the disk of {tmp_path} while writing a; free some and run again"
    with pytest.raises(UserError, match=f"^{line}$"), atomic_path(tmp_path / "a"):
        write()
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=4096))
    with pytest.raises(UserError, match=f"^{line}$"), atomic_path(tmp_path / "a"):
        raise RuntimeError("basic_ios::clear: iostream error")  # OpenVINO's word for it
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**30))
    with pytest.raises(RuntimeError, match="iostream error"), atomic_path(tmp_path / "a"):
        raise RuntimeError("basic_ios::clear: iostream error")
    with pytest.raises(SafetensorError, match=r"^else$"), atomic_path(tmp_path / "a"):
        raise SafetensorError("else")
    assert not list(tmp_path.iterdir())
