"""What one worker is told, for all to hear: a request for a new version reaches one process of several."""

from __future__ import annotations

import os
from pathlib import Path

from convscale.serve.metrics import SHARED

_SUFFIX = ".load"


class Bell:
    """Files in the folder that workers share, one for each model; a change of one rings. A lone process has none."""

    def __init__(self) -> None:
        folder = os.environ.get(SHARED)
        self.folder = Path(folder) if folder else None
        self._heard = self._stamps()

    def ring(self, model: str) -> None:
        """Let all workers look for a model's new version."""
        if self.folder is not None:
            (self.folder / f"{model}{_SUFFIX}").write_text(f"{os.getpid()}\n", encoding="ascii")

    def heard(self) -> set[str]:
        """Models for which it has rung since it was asked for the last time; where the folder can not be read now (too
        many open files, or a file went meanwhile) the next time tells of them.
        """
        try:
            now = self._stamps()
        except OSError:
            return set()
        rung = {name for name, stamp in now.items() if self._heard.get(name) != stamp}
        self._heard = now
        return rung

    def _stamps(self) -> dict[str, int]:
        if self.folder is None:
            return {}
        return {file.stem: file.stat().st_mtime_ns for file in self.folder.glob(f"*{_SUFFIX}")}
