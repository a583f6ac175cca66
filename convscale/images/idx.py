"""MNIST-style idx files (plain or .gz), as MNIST, Fashion-MNIST, KMNIST and EMNIST are published.

The format: two zero bytes, a type code (8: unsigned byte), the number of dimensions, each dimension as a big-endian
32-bit integer, then the values.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from pathlib import Path

import numpy as np
import torch

from convscale.errors import UserError
from convscale.images.splits import ArraySplit

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
"""Fashion-MNIST's class names (Xiao, Rasul, Vollgraf 2017, table 2)."""

_FASHION_LABELS_SHA256 = frozenset(
    {
        "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
        "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
    }
)
_MAX_BYTES = 4_000_000_000
_MOST_RANK = 8


def find_idx(folder: Path) -> Path | None:
    """The folder that holds a train set as idx files: ``folder`` itself or torchvision's ``NAME/raw`` below it; None
    when there is none.
    """
    for place in (folder, folder / "raw", *sorted(folder.glob("*/raw"))):
        if _file(place, "train", "images"):
            return place
    return None


def read_idx(path: Path) -> np.ndarray:
    """A uint8 array from an idx file.

    Raises:
        UserError: missing, damaged, another type than unsigned bytes, or a size that its header does not promise.
    """
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rb") as file:
                data = file.read(_MAX_BYTES + 1)
        else:
            data = path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: can not be read ({error})") from error
    if len(data) > _MAX_BYTES:
        raise UserError(f"{path}: more than {_MAX_BYTES / 1e9:.0f} GB unpacked; not read")
    if len(data) < 4 or data[:2] != b"\0\0":
        raise UserError(f"{path}: not an idx file (it starts with {data[:4].hex() or 'nothing'})")
    if data[2] != 8:
        raise UserError(f"{path}: idx type code {data[2]:#04x} is not supported; 0x08 (unsigned byte) is")
    rank = data[3]
    if rank > _MOST_RANK:
        raise UserError(f"{path}: its header says {rank} dimensions; images have 3, labels 1")
    shape = tuple(np.frombuffer(data, ">u4", count=rank, offset=4).tolist()) if len(data) >= 4 + 4 * rank else ()
    expected = math.prod(shape)
    many = math.prod(size or 1 for size in shape) > _MAX_BYTES  # no array has such sides, empty ones neither
    if len(shape) != rank or len(data) - 4 - 4 * rank != expected or many:
        raise UserError(
            f"{path}: its header promises {' x '.join(map(str, shape))} values, it holds {len(data) - 4 - 4 * rank}"
        )
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def open_idx(folder: Path, *, channels: int | None) -> tuple[ArraySplit, ArraySplit | None]:
    """Train and (where there is one) test set of a folder of idx files; labels are numbered by the train set's own, in
    order.
    """
    images, labels = _read_pair(folder, "train")
    values = np.unique(labels)
    classes = _class_names(folder, values, labels)
    train = _split("train", images, np.searchsorted(values, labels), classes, channels)
    if _file(folder, "t10k", "images") is None:
        return train, None
    images, labels = _read_pair(folder, "t10k")
    if unknown := sorted(set(np.unique(labels).tolist()) - set(values.tolist())):
        raise UserError(f"{folder}: the test set has label(s) {unknown} that the train set has not")
    if images.shape[1:] != train.pixels.shape[1:3]:
        raise UserError(
            f"{folder}: test images are {images.shape[1:]} pixels, train images {tuple(train.pixels.shape[1:3])}"
        )
    return train, _split("test", images, np.searchsorted(values, labels), classes, channels)


def _file(folder: Path, part: str, kind: str) -> Path | None:
    number = 3 if kind == "images" else 1
    for separator in ("-", "."):
        for suffix in ("", ".gz"):
            path = folder / f"{part}-{kind}{separator}idx{number}-ubyte{suffix}"
            if path.is_file():
                return path
    return None


def _read_pair(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    image_file, label_file = _file(folder, part, "images"), _file(folder, part, "labels")
    if image_file is None or label_file is None:
        raise UserError(f"{folder}: {part}-labels-idx1-ubyte(.gz) is missing beside {part}-images-idx3-ubyte(.gz)")
    images, labels = read_idx(image_file), read_idx(label_file)
    if images.ndim != 3 or labels.ndim != 1:
        raise UserError(
            f"{image_file}: images must have 3 dimensions and labels 1, got {images.ndim} and {labels.ndim}"
        )
    if len(images) != len(labels):
        raise UserError(f"{image_file}: {len(images)} images but {len(labels)} labels")
    return images, labels


def _split(
    split: str, images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], channels: int | None
) -> ArraySplit:
    pixels = torch.from_numpy(images.copy())[..., None]
    if channels == 3:
        pixels = pixels.expand(-1, -1, -1, 3)
    return ArraySplit(
        split=split,
        classes=classes,
        labels=torch.from_numpy(labels.astype(np.int64)),
        channels=channels or 1,
        pixels=pixels,
        origin=split,
    )


def _class_names(folder: Path, values: np.ndarray, labels: np.ndarray) -> tuple[str, ...]:
    known = hashlib.sha256(labels.tobytes()).hexdigest() in _FASHION_LABELS_SHA256
    named = any("fashion" in part.lower() for part in folder.resolve().parts[-3:])
    if (known or named) and values.tolist() == list(range(10)):
        return FASHION_CLASSES
    return tuple(str(value) for value in values.tolist())
