"""ONNX Runtime: runs ONNX files, on processors and GPUs."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from convscale.errors import UserError, first_line
from convscale.runtimes.base import Batch, FileRunner, Opening, Runtime, register, run_error, threads_and_streams

CUDA = "CUDAExecutionProvider"


@register
class OnnxRuntime(Runtime):
    """ONNX Runtime."""

    name = "onnxruntime"
    order = 10
    formats = ("onnx",)
    library = "onnxruntime"
    install = "pip install onnxruntime"
    devices = ("cpu", "cuda")
    streams = True

    def open(self, source: object, how: Opening) -> OnnxRunner:
        assert isinstance(source, Path), f"{source} is no file"
        return BoundOnnxRunner(source, how) if how.device.startswith("cuda") else OnnxRunner(source, how)


class OnnxRunner(FileRunner[list[list[np.ndarray]]]):
    """An ONNX file in ONNX Runtime."""

    runtime = OnnxRuntime.name
    needs, instead = "CUDA and cuDNN", "pip install onnxruntime-gpu, or use device cpu"
    """What must be installed beside it on a GPU, and what to do where it lacks a provider."""

    def providers(self, path: Path, how: Opening) -> list[tuple[str, dict[str, object]]]:
        """ONNX Runtime's execution providers with their options, the one asked for first."""
        if how.device.startswith("cuda"):
            return [(CUDA, {"device_id": self._card})]
        return [("CPUExecutionProvider", {})]

    def __init__(self, path: Path, how: Opening) -> None:
        import onnxruntime as ort

        self.lock = nullcontext()  # sessions may be called by many threads, and give arrays of their own
        self.threads, self.streams = threads_and_streams(how)
        self.whole = not how.divided
        self._name = path.name
        self._card = int(how.device.partition(":")[2] or 0)
        chosen = self.providers(path, how)
        provider = chosen[0][0]
        if provider not in ort.get_available_providers():
            raise UserError(f"this onnxruntime has no {provider}; {self.instead}")
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads // self.streams
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if self.whole:
            # A server's cores have other work between two batches: a thread that waits for the next by turning on the
            # spot takes it from the requests.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # A session's threads serve all its callers, so each stream has a session of its own where it has more than its
        # caller's.
        count = self.streams if options.intra_op_num_threads > 1 else 1
        try:
            self._sessions = [ort.InferenceSession(str(path), options, providers=chosen) for _ in range(count)]
        except Exception as error:
            raise UserError(f"ONNX Runtime can not open {path.name}: {first_line(error)}") from error
        if provider not in self._sessions[0].get_providers():
            # It goes on with the processor where the provider's libraries do not load, and would be timed as a GPU.
            raise UserError(
                f"ONNX Runtime's {provider} does not start here (are {self.needs} of its version installed?); or use "
                "device cpu"
            )
        self._input = self._sessions[0].get_inputs()[0]
        kind = self._input.type
        self.dtype = np.dtype("uint8" if "uint8" in kind else "float16" if "float16" in kind else "float32")
        self._turns = itertools.count()
        self._pool = None
        if self.streams > 1 and not self.whole:
            from concurrent.futures import ThreadPoolExecutor  # slow to import

            self._pool = ThreadPoolExecutor(self.streams)

    def run(self, prepared: list[np.ndarray]) -> list[list[np.ndarray]]:
        if self._pool is None or len(prepared) == 1:
            # Callers at once take the sessions in turns.
            return [self._one(part, next(self._turns)) for part in prepared]
        return list(self._pool.map(self._one, prepared, range(len(prepared))))

    def fetch(self, outputs: list[list[np.ndarray]]) -> tuple[np.ndarray, ...]:
        return tuple(np.concatenate(parts) for parts in zip(*outputs, strict=True))

    def _one(self, part: np.ndarray, stream: int) -> list[np.ndarray]:
        try:
            outputs = self._sessions[stream % len(self._sessions)].run(None, {self._input.name: part})
        except Exception as error:
            raise run_error("ONNX Runtime", self._name, error) from error
        return [np.asarray(output) for output in outputs]


class BoundOnnxRunner(OnnxRunner):
    """An ONNX file in ONNX Runtime on a GPU: the batch lies there before a run, and the outputs stay there until they
    are fetched, so that a timing leaves both ways out. Not measured on a GPU by this project.
    """

    place = "cuda"
    """Where the arrays lie, as ONNX Runtime has it."""

    def prepare(self, batch: Batch) -> list[Any]:
        from onnxruntime import OrtValue

        return [OrtValue.ortvalue_from_numpy(part, self.place, self._card) for part in super().prepare(batch)]

    def fetch(self, outputs: list[list[Any]]) -> tuple[np.ndarray, ...]:
        return super().fetch([[value.numpy() for value in part] for part in outputs])

    def _one(self, part: Any, stream: int) -> list[Any]:
        session = self._sessions[stream % len(self._sessions)]
        try:
            binding = session.io_binding()
            binding.bind_ortvalue_input(self._input.name, part)
            for output in session.get_outputs():
                binding.bind_output(output.name, self.place, self._card)
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            return binding.get_outputs()
        except Exception as error:
            raise run_error("ONNX Runtime", self._name, error) from error
