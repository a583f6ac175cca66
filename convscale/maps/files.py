"""Maps of picture files, written as pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from convscale.artifact.answers import decoded, prepared
from convscale.artifact.artifact import Artifact, load_artifact
from convscale.artifact.manifest import MANIFEST
from convscale.errors import UserError, check_text, check_whole
from convscale.images.letterbox import square_of
from convscale.images.preprocess import Preprocessing
from convscale.maps.draw import overlaid, save_png
from convscale.maps.explain import METHODS, explain
from convscale.maps.result import NOTHING, Maps

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of a file."""

    path: str
    """As it was found."""
    map: str = ""
    """Name of the picture with its map; empty where there is an error."""
    target: str = ""
    """The class that the map is of; empty where a detector finds nothing."""
    method: str = ""
    """How it was made."""
    error: str = ""
    """Why there is no map."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Explainer:
    """A network with what goes around it: uint8 images to maps."""

    net: nn.Module | Artifact
    """What is explained."""
    preprocessing: Preprocessing
    """How pictures become its images."""
    classes: tuple[str, ...]
    """Names of its outputs."""

    @property
    def is_detector(self) -> bool:
        """Whether it finds boxes: its labels count from 1, pictures are fitted into a square, and it normalises them
        itself.
        """
        return hasattr(self.net, "detector_spec")

    @classmethod
    def open(cls, folder: Path) -> Explainer:
        """An artefact, a checkpoint, or a folder of ``train`` or ``fit``.

        Raises:
            UserError: it is none of these, or damaged, or a detector's artefact.
        """
        if (folder / MANIFEST).is_file():
            artifact = load_artifact(folder)
            if artifact.is_detector:
                raise UserError(
                    f"artefact {folder} is a detector's, which gives boxes alone; explain its checkpoint, or the "
                    "folder of its training"
                )
            return cls(net=artifact, preprocessing=artifact.preprocessing, classes=artifact.classes)
        from convscale.learn.checkpoint import load_checkpoint

        loaded = load_checkpoint(folder)
        return cls(net=loaded.net, preprocessing=loaded.preprocessing, classes=loaded.classes)

    def maps(self, images: np.ndarray, method: str, target: int | list[int] | None, *, batch_size: int = 32) -> Maps:
        """Maps of uint8 images (N, H, W, C), as :meth:`prepared` gives them; raises as :func:`explain` does."""
        if isinstance(self.net, Artifact):
            return explain(self.net, images, method, target, batch_size=batch_size)
        import torch

        pixels = torch.from_numpy(np.require(images, requirements=["C", "W"]))
        if self.is_detector:
            batch = pixels.permute(0, 3, 1, 2).float() / 255
        else:
            batch = self.preprocessing.normalize(pixels)
        return explain(self.net, batch, method, target, batch_size=batch_size)

    def prepared(self, path: str) -> np.ndarray:
        """A picture as the network takes it, uint8 (H, W, C).

        Raises:
            ImageError: it can not be read.
        """
        how = self.preprocessing
        if self.is_detector:
            return square_of(decoded(path, path, how.channels), how.width, how.mean).pixels
        return prepared(path, path, how)

    def best_method(self) -> str:
        """``cam`` where it is exact, else ``occlusion``."""
        if isinstance(self.net, Artifact):
            return "cam" if self.net.keeps_features else "occlusion"
        if self.is_detector:
            return "occlusion"
        shape = (1, self.preprocessing.height, self.preprocessing.width, self.preprocessing.channels)
        try:
            self.maps(np.full(shape, 128, np.uint8), "cam", None)
        except UserError:
            return "occlusion"
        return "cam"

    def number_of(self, target: str | None) -> int | None:
        """A class by its name or number; a detector's numbers count from 1.

        Raises:
            UserError: there is no such class.
        """
        first = self._first
        if target is None or target in self.classes:
            return None if target is None else first + self.classes.index(target)
        last = first + len(self.classes) - 1
        if target.isascii() and target.isdigit() and len(target) < 10 and first <= int(target) <= last:
            return int(target)
        from convscale.errors import nearest

        raise UserError(
            f"target {target!r} is neither a class nor a number from {first} to {last}{nearest(target, self.classes)}"
        )

    def name_of(self, number: int) -> str:
        """A class's name by its number; empty where a detector finds nothing."""
        return "" if number == NOTHING else self.classes[number - self._first]

    @property
    def _first(self) -> int:
        return 1 if self.is_detector else 0


def explain_files(
    explainer: Explainer,
    paths: Iterable[str],
    folder: Path,
    *,
    method: str | None = None,
    target: str | None = None,
    batch_size: int = 16,
    on_rows: Callable[[int], object] = lambda count: None,
) -> list[Row]:
    """Write each picture under its map into a folder that is there.

    Args:
        explainer: the network.
        paths: picture files.
        folder: gets ``00001-NAME.png`` and so on.
        method: as for :func:`explain`; None: ``cam`` where it is exact, else ``occlusion``.
        target: a class's name or number; None: the likeliest of each picture.
        batch_size: pictures that are held at once.
        on_rows: called with the number of files that are done.

    Returns:
        A row for each file, in order; one that can not be read has its ``error``.

    Raises:
        UserError: a method that the network does not have, or an unknown class.
    """
    batch_size = check_whole("batch_size", batch_size)
    chosen = explainer.best_method() if method is None else check_text("method", method, METHODS)
    number = explainer.number_of(target)
    rows: list[Row] = []
    for some in _chunks(paths, batch_size):
        rows += _explain_some(explainer, some, folder, chosen, number, len(rows))
        on_rows(len(rows))
    return rows


def _explain_some(
    explainer: Explainer, paths: Sequence[str], folder: Path, method: str, target: int | None, done: int
) -> list[Row]:
    from convscale.images.decode import ImageError

    errors: dict[int, str] = {}
    images: list[np.ndarray] = []
    for at, path in enumerate(paths):
        try:
            images.append(explainer.prepared(path))
        except ImageError as error:
            errors[at] = str(error).removeprefix(f"{path}: ")
    maps = explainer.maps(np.stack(images), method, target) if images else None
    rows, number = [], 0
    for at, path in enumerate(paths):
        if at in errors or maps is None:
            rows.append(Row(path=path, error=errors[at]))
            continue
        name = f"{done + at + 1:05}-{_plain(Path(path).stem)}.png"
        save_png(overlaid(images[number], maps.values[number]), folder / name)
        label = explainer.name_of(int(maps.targets[number]))
        rows.append(Row(path=path, map=name, target=label, method=method))
        number += 1
    return rows


def _plain(stem: str) -> str:
    """A name that every file system takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", stem)[:60] or "picture"


def _chunks(paths: Iterable[str], size: int) -> Iterator[list[str]]:
    some: list[str] = []
    for path in paths:
        some.append(path)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some
