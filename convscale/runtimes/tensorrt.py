"""TensorRT: runs ONNX files on NVIDIA's GPUs, by ONNX Runtime's provider for it. Not measured on a GPU by this project.

An engine is built when a file meets a batch size for the first time, which takes minutes; it is kept in the cache
folder, by the file's own content, and built again where TensorRT or the card is another. Where that folder can not be
written nothing is kept.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from contextlib import suppress
from pathlib import Path

from convscale.cache import cache_dir
from convscale.runtimes.base import Opening, Runtime, register
from convscale.runtimes.onnxruntime import CUDA, BoundOnnxRunner


@register
class Tensorrt(Runtime):
    """TensorRT."""

    name = "tensorrt"
    order = 40
    formats = ("onnx",)
    library = "tensorrt"
    install = "pip install onnxruntime-gpu tensorrt"
    devices = ("cuda",)
    precisions = ("fp32", "fp16")

    def open(self, source: object, how: Opening) -> TensorrtRunner:
        assert isinstance(source, Path), f"{source} is no file"
        return TensorrtRunner(source, how)


class TensorrtRunner(BoundOnnxRunner):
    """An ONNX file in TensorRT: what it can not do goes to CUDA, never to the processor."""

    runtime = Tensorrt.name
    needs = "CUDA, cuDNN and TensorRT"
    instead = "pip install onnxruntime-gpu tensorrt, or use runtime onnxruntime"

    def providers(self, path: Path, how: Opening) -> list[tuple[str, dict[str, object]]]:
        settings: dict[str, object] = {
            "device_id": self._card,
            "trt_fp16_enable": how.precision == "fp16",
            "trt_int8_enable": _holds(path, b"QuantizeLinear"),  # by the scales in the file; it has no others
        }
        kept = cache_dir() / "tensorrt" / _digest(path)
        with suppress(OSError):  # a full or read-only disk costs minutes, no more
            kept.mkdir(parents=True, exist_ok=True)
            settings |= {
                "trt_engine_cache_enable": True,
                "trt_engine_cache_path": os.fspath(kept),
                "trt_timing_cache_enable": True,
                "trt_timing_cache_path": os.fspath(kept.parent),
            }
        return [("TensorrtExecutionProvider", settings), (CUDA, {"device_id": self._card})]


def _digest(path: Path) -> str:
    """Of a file and of its weights, where they lie beside it."""
    total = hashlib.sha256()
    for each in (path, path.with_name(f"{path.name}.data")):
        if each.is_file():
            with open(each, "rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:24]


def _holds(path: Path, word: bytes) -> bool:
    """Whether a file holds a word, without reading a large one whole."""
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as inside:
            return inside.find(word) >= 0
