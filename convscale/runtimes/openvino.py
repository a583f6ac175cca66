"""OpenVINO: runs its own files and ONNX files, on processors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from convscale.errors import UserError, first_line
from convscale.runtimes.base import FileRunner, Opening, Runtime, register, run_error, threads_and_streams
from convscale.runtimes.signals import signal_stack_kept
from convscale.runtimes.silence import quiet

if TYPE_CHECKING:
    from openvino import CompiledModel, InferRequest
    from openvino.utils.data_helpers import OVDict

    Results = list[tuple[OVDict, int]]
    """Of each stream its outputs, and how many of their images count."""


@register
class OpenVino(Runtime):
    """OpenVINO's CPU plugin."""

    name = "openvino"
    order = 20
    formats = ("onnx", "openvino")
    library = "openvino"
    install = "pip install openvino"
    streams = True
    knows_batch = True

    def open(self, source: object, how: Opening) -> OpenVinoRunner:
        assert isinstance(source, Path), f"{source} is no file"
        return OpenVinoRunner(source, how)


class OpenVinoRunner(FileRunner["Results"]):
    """An OpenVINO IR or ONNX file in OpenVINO, on the CPU.

    Float networks compute in float32: OpenVINO's own default on processors with bfloat16 is to round every layer to it.
    A batch of the stated size runs in a form compiled for that size alone, which is faster; one of another size in a
    form for any, compiled when it is first needed. With an open batch size a quantised network crashes OpenVINO on
    processors with AMX (its issue 37577): odd batches are filled up to a power of 2.

    A form has one request per stream. Its outputs lie in the request's own memory, so two threads that ran it at once
    would read each other's: calls hold the runner's lock.
    """

    runtime = OpenVino.name

    def __init__(self, path: Path, how: Opening) -> None:
        with quiet():
            import openvino as ov

        self.threads, self.streams = threads_and_streams(how)
        self._name = path.name
        self._config: dict[str, int | str] = {
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": self.streams,
            "INFERENCE_PRECISION_HINT": "f32",
        }
        self._core = ov.Core()
        try:
            self._model = self._core.read_model(str(path))
        except Exception as error:
            raise UserError(f"OpenVINO can not open {self._name}: {first_line(error)}") from error
        self.dtype = np.dtype(self._model.input(0).get_element_type().to_dtype())
        # Parts of different sizes would need a form each.
        stated = how.batch_size
        self._part = stated // self.streams if stated and stated % self.streams == 0 else None
        self._quantised = any(op.get_type_name() == "FakeQuantize" for op in self._model.get_ops())
        # A compiled network must live as long as its requests.
        self._forms: dict[int | None, tuple[CompiledModel, list[InferRequest]]] = {}
        self._form(self._part or (1 if self._quantised else None))

    def _form(self, part: int | None) -> list[InferRequest]:
        """One request per stream of the network for parts of this size; None: of any."""
        if part not in self._forms:
            model = self._model
            try:
                if part is not None:
                    model = model.clone()
                    shape = model.input(0).partial_shape
                    shape[0] = part
                    model.reshape(shape)
                with signal_stack_kept():
                    compiled = self._core.compile_model(model, "CPU", self._config)
            except Exception as error:
                raise UserError(f"OpenVINO can not open {self._name}: {first_line(error)}") from error
            self._forms[part] = compiled, [compiled.create_infer_request() for _ in range(self.streams)]
        return self._forms[part][1]

    def run(self, prepared: list[np.ndarray]) -> Results:
        counts = [len(part) for part in prepared]
        if set(counts) == {self._part}:
            busy = self._form(self._part)[: len(prepared)]
        elif not self._quantised:
            busy = self._form(None)[: len(prepared)]
        else:
            prepared = [_filled_up(part) for part in prepared]
            busy = [self._form(len(part))[i] for i, part in enumerate(prepared)]
        try:
            if len(prepared) == 1:
                return [(busy[0].infer([prepared[0]], share_inputs=True, share_outputs=True), counts[0])]
            for request, part in zip(busy, prepared, strict=True):
                request.start_async([part], share_inputs=True)
            for request in busy:
                request.wait()
        except Exception as error:
            raise run_error("OpenVINO", self._name, error) from error
        return [(request.results, count) for request, count in zip(busy, counts, strict=True)]

    def fetch(self, outputs: Results) -> tuple[np.ndarray, ...]:
        # Joining copies, which is needed: a request's own memory is overwritten by its next run.
        parts = [[part[i][:count] for i in range(len(part))] for part, count in outputs]
        return tuple(np.concatenate(output) for output in zip(*parts, strict=True))


def _filled_up(part: np.ndarray) -> np.ndarray:
    """With zeros, to a power of two of images."""
    missing = (1 << (len(part) - 1).bit_length()) - len(part)
    return np.concatenate([part, np.zeros((missing, *part.shape[1:]), part.dtype)]) if missing else part
