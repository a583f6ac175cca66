"""Output folders: what is ours may be replaced, what is a user's never."""

from __future__ import annotations

from pathlib import Path

import pytest

from convscale.errors import UserError
from convscale.files import check_output_dir, json_numbers, new_output_dir


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
