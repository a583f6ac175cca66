"""What is served: which artefact of a folder is taken up, and when."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from convscale.errors import UserError
from convscale.serve.answering import Answering
from convscale.serve.models import Named
from convscale.serve.settings import Settings
from tests.serve.conftest import copied


def test_a_version_seen_while_it_is_copied_is_taken_once_it_is_whole(tmp_path: Path) -> None:
    """Its record came first, so it was refused, and for ever."""
    top, whole = tmp_path / "versions", copied(tmp_path / "whole").folder
    copied(top / "1")
    answering = Answering(Settings(models=(Named("m", top),), log="none"))
    try:
        model = answering.models.all["m"]
        (top / "2").mkdir()
        late = (top / "2" / "model.onnx", whole / "model.onnx")
        for file in whole.iterdir():
            if file != late[1]:
                shutil.copy2(file, top / "2")
        with pytest.raises(UserError, match=r"lacks its file model\.onnx"):
            model.refresh()
        assert model.refresh() is None  # said once
        late[0].write_bytes(late[1].read_bytes()[:1000])
        with pytest.raises(UserError, match=r"the checksum of model\.onnx is wrong"):
            model.refresh()
        late[0].write_bytes(late[1].read_bytes())
        taken = model.refresh()
        assert taken is not None
        assert (taken.number, model.current.number, model.refresh()) == (2, 2, None)
    finally:
        answering.close()
