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
        with pytest.raises(UserError, match="holds something other than a run of convscale; it is not overwritten"):
            check(tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos" / "cats" / "1.jpg").read_bytes() == b"x"


@pytest.mark.parametrize("mark", ["fit.json", "recipe.yaml", "checkpoints"])
def test_a_run_is_overwritten_when_asked(tmp_path: Path, mark: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / mark).write_text("{}")
    with pytest.raises(UserError, match="use --resume, --overwrite or another name"):
        new_output_dir(tmp_path / "run")
    new_output_dir(tmp_path / "run", overwrite=True)
    assert list((tmp_path / "run").iterdir()) == []


def test_numbers_that_json_has_no_word_for_are_none() -> None:
    assert json_numbers({"a": [1.5, float("nan")], "b": (float("inf"), "x", 2)}) == {"a": [1.5, None], "b": [None, "x", 2]}
