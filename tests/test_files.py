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

from convscale.artifact.folder import staged_folder
from convscale.errors import UserError
from convscale.files import (
    around_temporary,
    atomic_path,
    check_output_dir,
    json_numbers,
    new_output_dir,
    sweep,
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


def test_a_folder_that_was_emptied_by_half_is_still_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "fit.json").write_text("{}")  # of a version that left no mark
    (run / "train").mkdir()

    def interrupted(_path: Path) -> None:
        (run / "fit.json").unlink(missing_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        new_output_dir(run, overwrite=True)
    monkeypatch.undo()
    assert sorted(path.name for path in run.iterdir()) == [".convscale", "train"]
    new_output_dir(run, overwrite=True)
    (run / ".convscale").write_text("the very file")
    new_output_dir(run, overwrite=True)
    assert (run / ".convscale").read_text() == "the very file"  # a lock may stand on it
    assert [path.name for path in run.iterdir()] == [".convscale"]


def test_a_full_disk_is_told_before_anything_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_output_dir(tmp_path / "run")
    (run / "train").mkdir()
    (run / "train" / "state").write_bytes(bytes(3_000_000))
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=2_000_000))
    with pytest.raises(UserError, match=r"has 2 MB free, 6 MB are needed; free some or name another folder"):
        new_output_dir(run, overwrite=True, need_bytes=6_000_000)
    assert (run / "train" / "state").stat().st_size == 3_000_000
    with pytest.raises(UserError, match="4 MB are needed"):
        new_output_dir(run, resume=True, need_bytes=4_000_000)
    with pytest.raises(UserError, match="4 MB are needed"):
        new_output_dir(tmp_path / "new" / "run", need_bytes=4_000_000)
    assert not (tmp_path / "new").exists()
    new_output_dir(run, overwrite=True, need_bytes=5_000_000)  # what is deleted goes free
    assert [path.name for path in run.iterdir()] == [".convscale"]


# ---------------------------------------------------------------- what happens while a folder is written


def _refuse(target: Path) -> None:
    if target.is_dir() and any(target.iterdir()):
        raise UserError("it holds something")


def test_a_second_run_of_the_same_folder_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "art"
    with whole_folder(target, check=lambda: _refuse(target)) as first:
        (first / "a").write_text("first")
        with (
            pytest.raises(UserError, match=f"folder {target} is being written by another run; wait for it, or name"),
            whole_folder(target, check=lambda: None),
        ):
            pass
        with whole_folder(tmp_path / "art.v2", check=lambda: None) as other:
            (other / "b").write_text("other")
    assert (target / "a").read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["art", "art.v2"]


def test_what_is_put_there_while_a_folder_is_written_stays(tmp_path: Path) -> None:
    """Between the check at the start and the end lie minutes to hours."""
    target = tmp_path / "art"

    def export() -> None:
        with staged_folder(target) as staging:
            (staging / "a").write_text("x")
            target.mkdir()
            (target / "notes").write_text("mine")

    with pytest.raises(UserError, match=r"output folder \S*art exists and is not empty; use --overwrite"):
        export()
    with (
        pytest.raises(UserError, match="holds something other than an artefact"),
        staged_folder(target, overwrite=True),
    ):
        pytest.fail("it begins")
    assert (target / "notes").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["art"]


def test_what_can_not_be_put_back_is_kept_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something takes the name between the two renames."""
    target = tmp_path / "art"
    target.mkdir()
    (target / "a").write_text("old")

    def replace(_old: Path, new: Path) -> None:
        new.mkdir()
        (new / "notes").write_text("mine")
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(UserError, match="was made by something else") as caught, whole_folder(target) as staging:
        (staging / "a").write_text("new")
    monkeypatch.undo()
    (room,) = tmp_path.glob(".art.*.tmp")
    assert (room / "old" / "art" / "a").read_text() == "old"
    assert str(room / "old" / "art") in str(caught.value)
    sweep(tmp_path, target)
    assert (target / "notes").read_text() == "mine"
    assert (room / "old" / "art" / "a").read_text() == "old"


KILLED = """
import os, sys
from pathlib import Path
from convscale import files
if sys.argv[2] == "between":
    os.replace = lambda *_: os._exit(9)
with files.whole_folder(Path(sys.argv[1]), check=lambda: None) as staging:
    (staging / "a").write_text("new")
    (staging.parent / ".forms.x").mkdir()
    if sys.argv[2] == "within":
        os._exit(9)
"""
"""A run that is killed while it writes a folder, or between its two renames."""


def _killed(target: Path, when: str) -> None:
    assert subprocess.run([sys.executable, "-c", KILLED, str(target), when], check=False, timeout=120).returncode == 9


def test_a_folder_gets_its_name_back_when_its_run_was_killed_between_two_renames(tmp_path: Path) -> None:
    target = tmp_path / "art"
    target.mkdir()
    (target / "a").write_text("old")
    _killed(target, "between")
    assert not target.exists()
    with pytest.raises(UserError, match="it holds something"), whole_folder(target, check=lambda: _refuse(target)):
        pytest.fail("it begins")
    assert (target / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["art"]


def test_what_a_killed_run_left_is_removed_by_the_next_of_its_name(tmp_path: Path) -> None:
    for name in ("art", "art.v2"):
        _killed(tmp_path / name, "within")
    (tmp_path / ".art.abcdefgh.tmp").mkdir()  # some other program's
    with whole_folder(tmp_path / "art", check=lambda: None) as staging:
        (staging / "a").write_text("new")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in left if not name.startswith(".art.v2.")] == [".art.abcdefgh.tmp", "art"]
    assert len(left) == 4  # what was being written, and its name's lock


def test_a_run_that_goes_on_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    run = new_output_dir(tmp_path / "run")
    (run / ".fit.json.0123abcd.tmp").write_text("{")
    _killed(run / "artifact", "within")
    with atomic_path(run / "log.jsonl") as writing:
        writing.write_text("1")
        new_output_dir(run, resume=True)
        assert sorted(path.name for path in run.iterdir()) == [".artifact.lock", ".convscale", writing.name]


def test_a_file_has_the_users_mode_without_a_moment_in_which_all_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", lambda _mask: pytest.fail("other threads make files now"))
        write_text(tmp_path / "a", "x")
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


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


def test_a_user_is_told_of_folders_that_are_his(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "art") as folder:
        assert around_temporary(folder) == around_temporary(folder / ".forms.x" / "onnx") == tmp_path
    assert around_temporary(tmp_path / "art") == tmp_path
