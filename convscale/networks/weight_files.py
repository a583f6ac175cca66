"""Where the files of released weights are: a folder of the user's, the hub's cache, or the hub itself.

Importing this loads no torch.
"""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from urllib.error import HTTPError, URLError

from convscale.arch.tags import find_tag
from convscale.errors import UserError, check_path

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".pth.tar")
"""Of files of weights, the one that is taken first in front."""
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
"""What a repository of the hub calls its weights."""
_WAIT_S = 5.0
"""How long the hub may take to answer whether it is there."""


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """Looks for weights in a folder of the user's first, then in the hub's cache, then on the hub.

    In the folder a file is found by its tag (``resnet50.a1_in1k.safetensors`` or ``.pth``, ``.pt``, ``.bin``), in a
    folder of that name (``resnet50.a1_in1k/model.safetensors``), or where the hub's cache has it
    (``models--timm--resnet50.a1_in1k/snapshots/...``).

    Raises:
        UserError: the folder does not exist.
    """

    folder: Path | None = None
    """The user's (``--weights-dir``); None: there is none."""
    given: dict[str, Path] = field(default_factory=dict)
    """Files that were named one by one, by the name of the weights."""

    def __post_init__(self) -> None:
        if self.folder is not None:
            folder = check_path("weights_dir", self.folder)
            if not folder.is_dir():
                raise UserError(f"weights folder {folder} does not exist; give one whose files are named by tag")
            object.__setattr__(self, "folder", folder)

    def find(self, name: str) -> Path | None:
        """The file of the weights called ``arch.tag`` on this machine; None: only the hub may have it."""
        if name in self.given:
            return self.given[name]
        local = None if self.folder is None else self._in_folder(self.folder, name)
        return local or self._cached(name)

    def reach(self, name: str) -> Path | str | None:
        """A file; ``pretrained`` where the hub has to be asked and answers; None: out of reach."""
        return self.find(name) or ("pretrained" if self.hub_answers else None)

    @staticmethod
    def _in_folder(folder: Path, name: str) -> Path | None:
        for suffix in SUFFIXES:
            if (file := folder / f"{name}{suffix}").is_file():
                return file
        repository = hub_id(name)
        places = [folder / name, folder / repository.rpartition("/")[2]]
        places += _snapshots(folder / f"models--{repository.replace('/', '--')}")
        return next((place / file for place in places for file in HUB_FILES if (place / file).is_file()), None)

    @staticmethod
    def _cached(name: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        for file in HUB_FILES:
            cached = try_to_load_from_cache(hub_id(name), file)
            if isinstance(cached, str):
                return Path(cached)
        return None

    @cached_property
    def hub_answers(self) -> bool:
        """Whether the hub can be reached: asked once, and waited for a few seconds at most."""
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            return False
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=_WAIT_S):
                return True
        except HTTPError:  # it answered
            return True
        except (URLError, OSError, ValueError):
            return False

    def check_folder(self, known: Iterable[str]) -> None:
        """See that the user's folder has weights, and that all its files of weights are of some called ``known``:
        others may be what was meant by a name, and nobody would be told. What else lies there (a README, say) is none.

        Raises:
            UserError: a file of weights is named as none of them, or there is nothing of any.
        """
        if self.folder is None:
            return
        mine: set[str] = set()
        for name in known:
            repository = hub_id(name)
            mine |= {name, repository.rpartition("/")[2], f"models--{repository.replace('/', '--')}"}
        names = sorted(entry.name for entry in os.scandir(self.folder) if not entry.name.startswith("."))
        foreign = tuple(name for name in names if name not in mine and _without_suffix(name) not in mine)
        files = tuple(name for name in foreign if name.endswith(SUFFIXES) and (self.folder / name).is_file())
        if not files and len(foreign) < len(names):
            return
        named = files or foreign
        more = ", ..." if len(named) > 3 else ""
        holds = f"holds {', '.join(named[:3])}{more}" if named else "is empty"
        raise UserError(
            f"weights folder {self.folder} {holds}; files must be named by tag, as in "
            "tf_efficientnet_lite0.in1k.safetensors, or lie as in the hub's cache"
        )


def hub_id(name: str) -> str:
    """The hub's repository of the weights called ``arch.tag``: as the own table says, else timm's of that name."""
    tag = find_tag(name)
    return f"timm/{name}" if tag is None else tag.hf_hub_id


def _snapshots(cached: Path) -> list[Path]:
    """A repository's states in a folder laid out as the hub's cache: what its main branch stood at first."""
    snapshots, named = cached / "snapshots", cached / "refs" / "main"
    try:
        main = named.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        main = ""
    found = sorted(snapshots.iterdir()) if snapshots.is_dir() else []
    return sorted(found, key=lambda place: place.name != main)


def _without_suffix(name: str) -> str:
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)
