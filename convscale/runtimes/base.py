"""One interface over eager and compiled PyTorch, ONNX Runtime and OpenVINO: arrays in, arrays out, with a stated number
of threads.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from convscale.errors import UserError, first_line, nearest
from convscale.machine import available_cores
from convscale.runtimes.signals import signal_stack_kept
from convscale.runtimes.silence import quiet

RUNTIMES = ("eager", "compiled", "compiled-frozen", "onnxruntime", "openvino")
Batch = np.ndarray | torch.Tensor

_INSTALL = {"onnxruntime": "pip install onnxruntime", "openvino": "pip install openvino"}


class Runner:
    """A network opened in a runtime.

    Calling it takes a batch and gives a tuple of arrays, one per output. The three steps are apart so that a timing can
    leave the copies
    out: :meth:`prepare` once, :meth:`run` repeatedly, :meth:`fetch` at the end.
    """

    runtime: str
    threads: int
    synchronize: Callable[[], object] | None = None
    """Waits for the device; None where :meth:`run` returns when the work is done."""

    def prepare(self, batch: Batch) -> Any:
        """The batch as the runtime wants it, on its device."""
        raise NotImplementedError

    def run(self, prepared: Any) -> Any:
        """The network's outputs in the runtime's own form."""
        raise NotImplementedError

    def fetch(self, outputs: Any) -> tuple[np.ndarray, ...]:
        """The outputs as arrays."""
        raise NotImplementedError

    def __call__(self, batch: Batch) -> tuple[np.ndarray, ...]:
        return self.fetch(self.run(self.prepare(batch)))


class TorchRunner(Runner):
    """A module in PyTorch: eager, compiled, or compiled with its weights frozen in."""

    def __init__(
        self,
        net: nn.Module,
        runtime: str,
        *,
        threads: int | None,
        device: str,
        precision: str,
        layout: str,
        train: bool = False,
    ) -> None:
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"device {device!r} is not there: torch sees no CUDA GPU; use device cpu")
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
        if precision == "int8":
            raise UserError("precision int8 needs a quantised artefact; export one with int8 and measure that")
        self.runtime, self.threads = runtime, threads or available_cores()
        self._device, self._dtype = torch.device(device), dtype
        self._format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
        amp_type = torch.float16 if self._device.type == "cuda" else torch.bfloat16
        self._autocast = (
            (lambda: torch.autocast(self._device.type, amp_type)) if precision == "amp" else contextlib.nullcontext
        )
        net = net.train(train).to(device=self._device, dtype=dtype)
        if layout == "nhwc":
            net = net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.module = net
        self.net = net if runtime == "eager" else _compiled(net, frozen=runtime == "compiled-frozen")
        if self._device.type == "cuda":
            self.synchronize = lambda: torch.cuda.synchronize(self._device)

    def prepare(self, batch: Batch) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(batch)) if isinstance(batch, np.ndarray) else batch
        if tensor.is_floating_point():
            tensor = tensor.to(self._dtype)
        return tensor.to(self._device).contiguous(memory_format=self._format)

    def run(self, prepared: torch.Tensor) -> Any:
        with torch_threads(self.threads), torch.no_grad():
            return self.forward(prepared)

    def forward(self, prepared: torch.Tensor) -> Any:
        """One forward pass under the precision's autocast, with gradients where they are on."""
        with self._autocast():
            return self.net(prepared)

    def parameters(self) -> list[nn.Parameter]:
        """The module's parameters, as they are on the device."""
        return list(self.module.parameters())

    def fetch(self, outputs: Any) -> tuple[np.ndarray, ...]:
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        return tuple(o.float().cpu().numpy() for o in outputs)


class FileRunner(Runner):
    """What the runtimes of model files share: a batch is cut into one part per stream, and the streams run side by
    side.

    Two streams of one thread each often beat one of two threads: nothing waits for the slower half of a layer.
    """

    streams: int
    _dtype: Any

    def prepare(self, batch: Batch) -> list[np.ndarray]:
        array = batch.detach().cpu().numpy() if isinstance(batch, torch.Tensor) else batch
        array = np.ascontiguousarray(array, dtype=self._dtype)
        return np.array_split(array, min(self.streams, max(1, len(array))))

    def fetch(self, outputs: Any) -> tuple[np.ndarray, ...]:
        return tuple(np.concatenate(parts) for parts in zip(*outputs, strict=True))


class OnnxRunner(FileRunner):
    """An ONNX file in ONNX Runtime."""

    runtime = "onnxruntime"

    def __init__(self, path: str | os.PathLike[str], *, threads: int | None, device: str, streams: int = 1) -> None:
        need_runtime("onnxruntime")
        import onnxruntime as ort

        self.threads, self.streams = _streams(threads, streams)
        provider = "CUDAExecutionProvider" if device.startswith("cuda") else "CPUExecutionProvider"
        if provider not in ort.get_available_providers():
            raise UserError(f"this onnxruntime has no {provider}; pip install onnxruntime-gpu, or use device cpu")
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads // self.streams
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            # A session's threads serve all its callers, so each stream has a session of its own where it has more than
            # its caller's.
            count = self.streams if options.intra_op_num_threads > 1 else 1
            self._sessions = [
                ort.InferenceSession(os.fspath(path), options, providers=[provider]) for _ in range(count)
            ]
        except Exception as error:
            raise UserError(f"ONNX Runtime can not open {Path(path).name}: {first_line(error)}") from error
        self._name = Path(path).name
        if provider not in self._sessions[0].get_providers():
            # It goes on with the processor where the provider's libraries do not load, and would be timed as a GPU.
            raise UserError(
                f"ONNX Runtime's {provider} does not start here (are CUDA and cuDNN of its version installed?); or use "
                "device cpu"
            )
        self._input = self._sessions[0].get_inputs()[0]
        self._dtype = (
            np.uint8 if "uint8" in self._input.type else np.float16 if "float16" in self._input.type else np.float32
        )
        self._pool = ThreadPoolExecutor(self.streams) if self.streams > 1 else None

    def run(self, prepared: list[np.ndarray]) -> Any:
        if self._pool is None or len(prepared) == 1:
            return [self._one(part, 0) for part in prepared]
        return list(self._pool.map(self._one, prepared, range(len(prepared))))

    def _one(self, part: np.ndarray, stream: int) -> list[np.ndarray]:
        try:
            # pyright: ignore[reportReturnType]
            return self._sessions[stream % len(self._sessions)].run(None, {self._input.name: part})
        except Exception as error:
            raise _failed("ONNX Runtime", self._name, error) from error


class OpenVinoRunner(FileRunner):
    """An OpenVINO IR or ONNX file in OpenVINO, on the CPU.

    Float networks compute in float32: OpenVINO's own default on processors with bfloat16 is to round every layer to it.
    A batch of the stated size runs in a form compiled for that size alone, which is faster; one of another size in a
    form for any, compiled when it is first needed. With an open batch size a quantised network crashes OpenVINO on
    processors with AMX (its issue 37577): odd batches are filled up to a power of 2.
    """

    runtime = "openvino"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int | None,
        device: str,
        precision: str = "fp32",
        streams: int = 1,
        batch_size: int | None = None,
    ) -> None:
        need_runtime("openvino")
        with quiet():
            import openvino as ov

        if device != "cpu":
            raise UserError(f"runtime openvino runs on device cpu here, got {device!r}")
        self.threads, self.streams = _streams(threads, streams)
        self._name = Path(path).name
        self._config: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": self.streams,
            "INFERENCE_PRECISION_HINT": "bf16" if precision in ("bf16", "amp") else "f32",
        }
        self._core = ov.Core()
        try:
            self._model = self._core.read_model(os.fspath(path))
        except Exception as error:
            raise UserError(f"OpenVINO can not open {self._name}: {first_line(error)}") from error
        self._dtype = np.dtype(self._model.input(0).get_element_type().to_dtype())
        # Parts of different sizes would need a form each.
        self._part = batch_size // self.streams if batch_size and batch_size % self.streams == 0 else None
        self._quantised = any(op.get_type_name() == "FakeQuantize" for op in self._model.get_ops())
        self._forms: dict[int | None, tuple[Any, list[Any]]] = {}  # a compiled network as long as its requests
        self._form(self._part or (1 if self._quantised else None))

    def _form(self, part: int | None) -> list[Any]:
        """One request per stream of the network for parts of this size; None: of any."""
        if part not in self._forms:
            model = self._model
            if part is not None:
                model = model.clone()
                shape = model.input(0).partial_shape
                shape[0] = part
            try:
                if part is not None:
                    model.reshape(shape)  # pyright: ignore[reportPossiblyUnboundVariable]
                with signal_stack_kept():
                    compiled = self._core.compile_model(model, "CPU", self._config)
            except Exception as error:
                raise UserError(f"OpenVINO can not open {self._name}: {first_line(error)}") from error
            self._forms[part] = compiled, [compiled.create_infer_request() for _ in range(self.streams)]
        return self._forms[part][1]

    def run(self, prepared: list[np.ndarray]) -> Any:
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
            raise _failed("OpenVINO", self._name, error) from error
        return [(request.results, count) for request, count in zip(busy, counts, strict=True)]

    def fetch(self, outputs: Any) -> tuple[np.ndarray, ...]:
        # Joining copies, which is needed: a request's own memory is overwritten by its next run.
        return super().fetch([[part[i][:count] for i in range(len(part))] for part, count in outputs])


def _filled_up(part: np.ndarray) -> np.ndarray:
    """With zeros, to a power of two of images."""
    missing = (1 << (len(part) - 1).bit_length()) - len(part)
    return np.concatenate([part, np.zeros((missing, *part.shape[1:]), part.dtype)]) if missing else part


def open_runtime(
    source: nn.Module | str | os.PathLike[str],
    runtime: str,
    *,
    threads: int | None = None,
    device: str = "cpu",
    precision: str = "fp32",
    layout: str = "nchw",
    streams: int = 1,
    batch_size: int | None = None,
) -> Runner:
    """Open a module (PyTorch runtimes) or a model file (ONNX Runtime: ``.onnx``; OpenVINO: ``.onnx`` or ``.xml``) for
    inference.

    A module is moved to the device, precision and layout and put in eval mode. ``streams`` cuts the batch into parts
    that run side by side, the threads shared among them; PyTorch's runtimes have one. ``batch_size`` is the one most
    calls will have; OpenVINO is faster where it knows it.

    Raises:
        UserError: the runtime is unknown or not installed (the message says how to install it), or can not open this
            source.
    """
    check_runtime(runtime)
    if isinstance(source, nn.Module):
        if runtime not in ("eager", "compiled", "compiled-frozen"):
            raise UserError(f"runtime {runtime} opens model files, not modules; export the network first")
        return TorchRunner(source, runtime, threads=threads, device=device, precision=precision, layout=layout)
    if runtime == "onnxruntime":
        return OnnxRunner(source, threads=threads, device=device, streams=streams)
    if runtime == "openvino":
        return OpenVinoRunner(
            source, threads=threads, device=device, precision=precision, streams=streams, batch_size=batch_size
        )
    raise UserError(f"runtime {runtime} opens modules, not {Path(source).name}")


def check_runtime(runtime: str) -> str:
    """The name of a runtime, as it is.

    Raises:
        UserError: unknown; the nearest are named.
    """
    if runtime not in RUNTIMES:
        raise UserError(f"runtime {runtime!r} is unknown{nearest(runtime, RUNTIMES)}")
    return runtime


def installed_runtimes() -> tuple[str, ...]:
    """The runtimes that can be used here, in the order of ``RUNTIMES``."""
    compilers = shutil.which("g++") or shutil.which("clang++") or os.environ.get("CXX")
    return tuple(
        name
        for name in RUNTIMES
        if (name == "eager") or (compilers if name.startswith("compiled") else find_spec(name))
    )


def need_runtime(runtime: str) -> None:
    """
    Raises:
        UserError: the runtime's library is not installed; the message says how to install it.
    """
    if runtime in _INSTALL and find_spec(runtime) is None:
        raise UserError(f"runtime {runtime} is not installed; {_INSTALL[runtime]}")


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """PyTorch's compute threads, set for a while."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _compiled(net: nn.Module, *, frozen: bool) -> Callable[..., Any]:
    """``torch.compile``; with freezing, weights become constants and are laid out for the processor."""
    if "compiled" not in installed_runtimes() and next(net.parameters(), torch.empty(0)).device.type == "cpu":
        raise UserError(
            "runtime compiled needs a C++ compiler on a CPU; install g++, or use runtime eager or onnxruntime"
        )
    return torch.compile(net, options={"freezing": True}) if frozen else torch.compile(net)


def _streams(threads: int | None, streams: int) -> tuple[int, int]:
    """Threads and streams to use.

    Raises:
        UserError: there are more streams than threads.
    """
    threads = threads or available_cores()
    if not 1 <= streams <= threads:
        raise UserError(f"streams must lie between 1 and the {threads} threads, got {streams}")
    return threads, streams


def _failed(runtime: str, name: str, error: Exception) -> Exception:
    """What to raise where a network that could be opened does not run. Out of memory stays what it is: a smaller batch
    may fit.
    """
    text = str(error).lower()
    if isinstance(error, MemoryError) or "memory" in text or "alloc" in text:
        return error
    return UserError(f"{runtime} can not run {name}: {first_line(error)}")
