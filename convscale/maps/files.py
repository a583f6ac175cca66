"""Maps of picture files, written as pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from convscale.artifact.answers import prepared
from convscale.artifact.artifact import Artifact, load_artifact
from convscale.artifact.manifest import MANIFEST
from convscale.errors import UserError, check_text, check_whole
from convscale.images.preprocess import Preprocessing
from convscale.maps.draw import overlaid, save_png
from convscale.maps.explain import METHODS, explain
from convscale.maps.result import Maps

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
    """The class that the map is of."""
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

    @classmethod
    def open(cls, folder: Path) -> Explainer:
        """An artefact, a checkpoint, or a folder of ``train`` or ``fit``.

        Raises:
            UserError: it is none of these, or damaged.
        """
        if (folder / MANIFEST).is_file():
            artifact = load_artifact(folder)
            return cls(net=artifact, preprocessing=artifact.preprocessing, classes=artifact.classes)
        from convscale.learn.checkpoint import load_checkpoint

        loaded = load_checkpoint(folder)
        return cls(net=loaded.net, preprocessing=loaded.preprocessing, classes=loaded.classes)

    def maps(self, images: np.ndarray, method: str, target: int | list[int] | None, *, batch_size: int = 32) -> Maps:
        """Maps of uint8 images (N, H, W, C), resized by ``preprocessing.resize``; raises as :func:`explain` does."""
        if isinstance(self.net, Artifact):
            return explain(self.net, images, method, target, batch_size=batch_size)
        import torch

        batch = self.preprocessing.normalize(torch.from_numpy(np.require(images, requirements=["C", "W"])))
        return explain(self.net, batch, method, target, batch_size=batch_size)

    def best_method(self) -> str:
        """``cam`` where it is exact, else ``occlusion``."""
        if isinstance(self.net, Artifact):
            return "cam" if self.net.keeps_features else "occlusion"
        shape = (1, self.preprocessing.height, self.preprocessing.width, self.preprocessing.channels)
        try:
            self.maps(np.full(shape, 128, np.uint8), "cam", None)
        except UserError:
            return "occlusion"
        return "cam"

    def number_of(self, target: str | None) -> int | None:
        """A class by its name or number.

        Raises:
            UserError: there is no such class.
        """
        if target is None or target in self.classes:
            return None if target is None else self.classes.index(target)
        if target.isascii() and target.isdigit() and len(target) < 10 and int(target) < len(self.classes):
            return int(target)
        from convscale.errors import nearest

        raise UserError(
            f"target {target!r} is neither a class nor a number from 0 to {len(self.classes) - 1}"
            f"{nearest(target, self.classes)}"
        )


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
            images.append(prepared(path, path, explainer.preprocessing))
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
        label = explainer.classes[maps.targets[number]]
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
