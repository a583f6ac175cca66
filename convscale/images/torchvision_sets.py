"""torchvision's data sets by name, from local files: the papers' transfer sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from convscale.errors import UserError, first_line, nearest
from convscale.images.splits import ArraySplit, FileSplit, Split


@dataclass(frozen=True, kw_only=True)
class _Known:
    """How to open one set."""

    type_name: str
    """The class in ``torchvision.datasets``."""
    marker: str
    """A folder or file in its root that gives it away."""
    splits: tuple[dict[str, Any] | None, dict[str, Any] | None, dict[str, Any] | None]
    """Constructor arguments of train, validation and test; None: there is none."""
    files: Callable[[Any], tuple[list[str], list[int]]] | None = None
    """(paths, labels) of an opened set of files; None: the set is in memory."""


def _files(paths: str, labels: str) -> Callable[[Any], tuple[list[str], list[int]]]:
    return lambda opened: (
        [str(path) for path in getattr(opened, paths)],
        [int(label) for label in getattr(opened, labels)],
    )


def _samples(opened: Any) -> tuple[list[str], list[int]]:
    return [str(path) for path, _ in opened._samples], [int(label) for _, label in opened._samples]


_TRAIN_TEST: tuple[dict[str, Any], None, dict[str, Any]] = ({"split": "train"}, None, {"split": "test"})
_KNOWN = {
    "cifar10": _Known(
        type_name="CIFAR10", marker="cifar-10-batches-py", splits=({"train": True}, None, {"train": False})
    ),
    "cifar100": _Known(
        type_name="CIFAR100", marker="cifar-100-python", splits=({"train": True}, None, {"train": False})
    ),
    "flowers102": _Known(
        type_name="Flowers102",
        marker="flowers-102",
        splits=({"split": "train"}, {"split": "val"}, {"split": "test"}),
        files=_files("_image_files", "_labels"),
    ),
    "oxfordiiitpet": _Known(
        type_name="OxfordIIITPet",
        marker="oxford-iiit-pet",
        splits=({"split": "trainval"}, None, {"split": "test"}),
        files=_files("_images", "_labels"),
    ),
    "food101": _Known(
        type_name="Food101", marker="food-101", splits=_TRAIN_TEST, files=_files("_image_files", "_labels")
    ),
    "fgvcaircraft": _Known(
        type_name="FGVCAircraft",
        marker="fgvc-aircraft-2013b",
        splits=({"split": "train"}, {"split": "val"}, {"split": "test"}),
        files=_files("_image_files", "_labels"),
    ),
    "stanfordcars": _Known(type_name="StanfordCars", marker="stanford_cars", splits=_TRAIN_TEST, files=_samples),
}


def find_torchvision(root: Path) -> str | None:
    """The set whose files lie in ``root``, or None."""
    for name, known in _KNOWN.items():
        if (root / known.marker).is_dir():
            return name
    return None


def open_torchvision(
    name: str, root: Path, *, channels: int, max_pixels: int
) -> tuple[Split, Split | None, Split | None]:
    """Train, validation and test set of torchvision's ``name``; nothing is downloaded.

    Raises:
        UserError: an unknown name, or files that are missing or damaged.
    """
    key = name.lower().replace("-", "").replace("_", "")
    if key not in _KNOWN:
        raise UserError(f"torchvision data set {name!r} is unknown{nearest(key, _KNOWN)}")
    known = _KNOWN[key]
    from torchvision import datasets

    splits: list[Split | None] = []
    for split, arguments in zip(("train", "validation", "test"), known.splits, strict=True):
        if arguments is None:
            splits.append(None)
            continue
        try:
            opened = getattr(datasets, known.type_name)(root, download=False, **arguments)
        except (RuntimeError, OSError, ImportError, ValueError, KeyError) as error:
            reason = first_line(error)
            raise UserError(
                f"{root}: torchvision's {known.type_name} can not be opened from local files ({reason})"
            ) from error
        classes = splits[0].classes if splits and splits[0] is not None else None
        splits.append(_to_split(split, opened, known, channels, max_pixels, classes))
    assert splits[0] is not None
    return splits[0], splits[1], splits[2]


def _to_split(
    split: str, opened: Any, known: _Known, channels: int, max_pixels: int, of_train: tuple[str, ...] | None
) -> Split:
    """A split with the train set's class names (None: this is the train set)."""
    own = tuple(str(name) for name in getattr(opened, "classes", None) or ())
    if of_train and own and own != of_train:
        raise UserError(
            f"{opened.root}: the {split} set's classes are not the train set's, in this order: "
            f"{_first_difference(own, of_train)}"
        )
    if known.files is None:
        pixels = torch.from_numpy(np.ascontiguousarray(opened.data))
        if channels == 1:
            luma = torch.tensor([0.299, 0.587, 0.114])
            pixels = (pixels.float() @ luma).round_().to(torch.uint8)[..., None]
        labels = torch.tensor(opened.targets, dtype=torch.long)
        return ArraySplit(split=split, classes=of_train or own, labels=labels, channels=channels, pixels=pixels)
    paths, labels = known.files(opened)
    classes = of_train or own or tuple(str(label) for label in range(max(labels) + 1))
    if max(labels) >= len(classes):
        raise UserError(
            f"{opened.root}: the {split} set has label {max(labels)}, there are {len(classes)} classes in train"
        )
    return FileSplit(
        split=split,
        classes=classes,
        labels=torch.tensor(labels, dtype=torch.long),
        channels=channels,
        paths=tuple(paths),
        max_pixels=max_pixels,
    )


def _first_difference(left: tuple[str, ...], right: tuple[str, ...]) -> str:
    for a, b in zip(left, right, strict=False):
        if a != b:
            return f"{a!r} stands where train has {b!r}"
    return f"{len(left)} classes, train has {len(right)}"
