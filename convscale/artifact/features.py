"""The classifier's weights beside a network that keeps its feature map: what a class activation map needs, as a
safetensors file that numpy alone reads.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convscale.errors import UserError
from convscale.files import atomic_path
from convscale.read import Limits, check_tensors, json_of, read_bytes

HEAD_FILE = "classifier.safetensors"
_LIMITS = Limits(size=2**30)


@dataclass(frozen=True, kw_only=True, eq=False)
class Head:
    """A linear classifier of pooled features."""

    weight: np.ndarray
    """float32 (classes, C)."""
    bias: np.ndarray
    """float32 (classes,)."""


def write_head(folder: Path, head: Head) -> None:
    """Write it into an artefact's folder."""
    arrays = {"bias": head.bias, "weight": head.weight}
    header: dict[str, object] = {}
    start = 0
    for name, array in arrays.items():
        size = 4 * array.size
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(folder / HEAD_FILE) as path, open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array, "<f4").tobytes())


def read_head(folder: str | os.PathLike[str], num_classes: int) -> Head:
    """Read it from an artefact's folder.

    Raises:
        UserError: it is missing, damaged, or of another number of classes.
    """
    path = Path(folder) / HEAD_FILE
    check_tensors(path, "classifier")
    data = read_bytes(path, "classifier", _LIMITS)
    length = int.from_bytes(data[:8], "little")
    header = json_of(data[8 : 8 + length], f"classifier {path}, header")
    found: dict[str, np.ndarray] = {}
    for name, dimensions in (("weight", 2), ("bias", 1)):
        entry = header.get(name) or {}
        shape = entry.get("shape") or []
        if entry.get("dtype") != "F32" or len(shape) != dimensions or shape[0] != num_classes:
            raise UserError(
                f"artefact {folder} has a damaged {HEAD_FILE}: {name} must be F32 of {num_classes} classes; export it "
                "again"
            )
        begin, end = entry["data_offsets"]
        found[name] = np.frombuffer(data[8 + length + begin : 8 + length + end], "<f4").reshape(shape)
    return Head(weight=found["weight"], bias=found["bias"])
