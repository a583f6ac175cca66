"""OpenVINO: runs its own files and ONNX files, on processors."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from convscale.errors import UserError, first_line
from convscale.runtimes.base import FileRunner, Opening, Runtime, register, run_error, threads_and_streams
from convscale.runtimes.signals import signal_stack_kept
from convscale.runtimes.silence import quiet

if TYPE_CHECKING:
    from openvino import CompiledModel, InferRequest

Results = list[list[np.ndarray]]
"""Of each stream its outputs."""


@register
class OpenVino(Runtime):
    """OpenVINO's CPU plugin."""

    name = "openvino"
    order = 20
    formats = ("onnx", "openvino")
    library = "openvino"
    install = "pip install openvino"
    precisions = ("fp32", "bf16")
    streams = True
    knows_batch = True

    def native(self, precision: str) -> bool:
        return precision != "bf16" or _has_bf16()

    def open(self, source: object, how: Opening) -> OpenVinoRunner:
        assert isinstance(source, Path), f"{source} is no file"
        return OpenVinoRunner(source, how)


@dataclass
class _Form:
    """The network compiled for parts of one size, and the requests that nobody uses at the moment.

    A request's outputs lie in its own memory, so it belongs to one call until they are copied out. There are as many as
    calls ever ran at once; of what a network computes each stream has one memory, whatever the number of requests.
    """

    compiled: CompiledModel
    idle: list[InferRequest] = field(default_factory=list)

    def take(self) -> InferRequest:
        """A request of the caller's own, until it is given back."""
        try:
            return self.idle.pop()
        except IndexError:
            return self.compiled.create_infer_request()


class OpenVinoRunner(FileRunner[Results]):
    """An OpenVINO IR or ONNX file in OpenVINO, on the CPU.

    Float networks compute in float32 unless bfloat16 is asked for: OpenVINO's own default on processors that have it is
    to round every layer to it.
    A batch of the stated size runs in a form compiled for that size alone, which is faster; one of another size in a
    form for any, compiled when it is first needed. With an open batch size a quantised network crashes OpenVINO on
    processors with AMX (its issue 37577): odd batches are filled up to a power of 2.

    Calls take requests from a pool, and more than one may run at once: with free streams side by side, else one after
    the other in OpenVINO's own queue.
    """

    runtime = OpenVino.name

    def __init__(self, path: Path, how: Opening) -> None:
        with quiet():
            import openvino as ov

        self.threads, self.streams = threads_and_streams(how)
        self.whole = not how.divided
        parts = 1 if self.whole else self.streams
        self._name = path.name
        self._config: dict[str, int | str] = {
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": self.streams,
            "INFERENCE_PRECISION_HINT": _HINTS[how.precision],
        }
        self._core = ov.Core()
        try:
            self._model = self._core.read_model(str(path))
        except Exception as error:
            raise UserError(f"OpenVINO can not open {self._name}: {first_line(error)}") from error
        self.dtype = np.dtype(self._model.input(0).get_element_type().to_dtype())
        # Parts of different sizes would need a form each.
        stated = how.batch_size
        self._part = stated // parts if stated and stated % parts == 0 else None
        self._quantised = any(op.get_type_name() == "FakeQuantize" for op in self._model.get_ops())
        self.lock = nullcontext()  # each call has requests of its own
        self._compiling = threading.Lock()
        self._forms: dict[int | None, _Form] = {}
        self._form(self._part or (1 if self._quantised else None))

    def _form(self, part: int | None) -> _Form:
        """The network for parts of this size; None: of any. Who asks for one that is there does not wait for another's
        to be compiled.
        """
        if (made := self._forms.get(part)) is not None:
            return made
        with self._compiling:
            if part not in self._forms:
                self._forms[part] = self._compile(part)
            return self._forms[part]

    def _compile(self, part: int | None) -> _Form:
        model = self._model
        try:
            if part is not None:
                model = model.clone()
                shape = model.input(0).partial_shape
                shape[0] = part
                model.reshape(shape)
            with signal_stack_kept():
                return _Form(self._core.compile_model(model, "CPU", self._config))
        except Exception as error:
            raise UserError(f"OpenVINO can not open {self._name}: {first_line(error)}") from error

    def _run_as(self, counts: list[int]) -> list[int | None]:
        """For parts of so many images the sizes of the forms that they run in; None: that for any."""
        if set(counts) == {self._part}:
            return [self._part] * len(counts)
        return [1 << (count - 1).bit_length() if self._quantised else None for count in counts]

    def sizes(self, batch: int) -> tuple[int, ...]:
        made, found = set[int | None](), list[int]()
        for count in range(batch, 0, -1):
            pieces = self.pieces(count)
            if new := {*self._run_as([(count + i) // pieces for i in range(pieces)])} - made:
                made |= new
                found.append(count)
        return tuple(found)

    def run(self, prepared: list[np.ndarray]) -> Results:
        counts = [len(part) for part in prepared]
        sizes = self._run_as(counts)
        prepared = [_filled_up(part, size or len(part)) for part, size in zip(prepared, sizes, strict=True)]
        forms = [self._form(size) for size in sizes]
        # A request that fails is not given back.
        requests = [form.take() for form in forms]
        try:
            if len(prepared) == 1:
                requests[0].infer([prepared[0]], share_inputs=True, share_outputs=True)
            else:
                for request, part in zip(requests, prepared, strict=True):
                    request.start_async([part], share_inputs=True)
                for request in requests:
                    request.wait()
        except Exception as error:
            raise run_error("OpenVINO", self._name, error) from error
        outputs = [
            [tensor.data[:count].copy() for tensor in request.output_tensors]
            for request, count in zip(requests, counts, strict=True)
        ]
        for form, request in zip(forms, requests, strict=True):
            form.idle.append(request)
        return outputs

    def fetch(self, outputs: Results) -> tuple[np.ndarray, ...]:
        return tuple(np.concatenate(parts) for parts in zip(*outputs, strict=True))


_HINTS = {"fp32": "f32", "bf16": "bf16"}


@cache
def _has_bf16() -> bool:
    """Whether OpenVINO finds bfloat16 instructions in this processor."""
    with quiet():
        import openvino as ov
    with signal_stack_kept():
        return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _filled_up(part: np.ndarray, size: int) -> np.ndarray:
    """With zeros, to so many images."""
    missing = size - len(part)
    return np.concatenate([part, np.zeros((missing, *part.shape[1:]), part.dtype)]) if missing else part
