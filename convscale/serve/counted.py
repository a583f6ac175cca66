"""What number an artefact without one has, where several workers serve it: each sees its own share of the changes in a
folder, so they count in a file that they share.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from convscale.artifact.manifest import Manifest
from convscale.locks import alone
from convscale.serve.metrics import SHARED

_SUFFIX = ".versions"


def counted(model: str, manifest: Manifest) -> int | None:
    """The artefact's place, from 1, among all that workers have served as this model: the same in each of them, and
    the same again where an earlier one comes back. None: a lone process, which counts by itself.
    """
    folder = os.environ.get(SHARED)
    if not folder:
        return None
    digest = hashlib.sha256(json.dumps(manifest.written, sort_keys=True).encode()).hexdigest()
    with open(Path(folder) / f"{model}{_SUFFIX}", "a+", encoding="ascii") as file, alone(file.fileno()):
        file.seek(0)
        known = file.read().split()
        if digest not in known:
            known.append(digest)
            file.write(f"{digest}\n")
            file.flush()
    return known.index(digest) + 1
