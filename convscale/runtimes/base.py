"""One interface over everything that runs a network: arrays in, arrays out, with a stated number of threads.

A runtime is a file in this folder: a class that describes and opens it, put into the registry by :func:`register`.
What must know of runtimes asks the registry, so a new one is a new file and no other change. Importing this module
loads neither torch nor a runtime's library.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Generic, Protocol, Self, TypeVar

import numpy as np

from convscale.errors import UserError, first_line, nearest
from convscale.machine import available_cores
from convscale.words import listed

Prepared = TypeVar("Prepared")
Outputs = TypeVar("Outputs")


class TensorLike(Protocol):
    """A batch in PyTorch, for what does not know PyTorch."""

    def detach(self) -> TensorLike:
        """Without its gradient."""
        ...

    def cpu(self) -> TensorLike:
        """In the processor's memory."""
        ...

    def numpy(self) -> np.ndarray:
        """As an array."""
        ...


Batch = np.ndarray | TensorLike


@dataclass(frozen=True, kw_only=True)
class Opening:
    """How a network is to be opened."""

    threads: int | None = None
    """Compute threads in all; None: one per core."""
    device: str = "cpu"
    """``cpu``, ``cuda`` or ``cuda:N``."""
    precision: str = "fp32"
    """What it is computed in."""
    layout: str = "nchw"
    """How activations lie in memory."""
    streams: int = 1
    """Parts of a batch that run side by side, the threads shared among them."""
    divided: bool = True
    """A batch is cut into a part for each stream; False, as a server wants it: it stays whole, who calls fills the
    streams by calling from several threads, and between calls the cores are left to others."""
    batch_size: int | None = None
    """The one that most calls will have; None: not known."""
    train: bool = False
    """In training mode."""
    static: bool = False
    """A compiler makes code for each shape of a batch, from nothing, as a timing wants it; False: once shapes differ,
    one for all."""


class Runner(ABC, Generic[Prepared, Outputs]):
    """A network opened in a runtime.

    Calling it takes a batch and gives a tuple of arrays, one per output; any number of threads may call it at once.
    The three steps are apart so that a timing can leave the copies out: :meth:`prepare` once, :meth:`run` repeatedly,
    :meth:`fetch` at the end. These take no lock: one thread at a time may go through them.
    """

    runtime: str
    threads: int
    synchronize: Callable[[], object] | None = None
    """Waits for the device; None where :meth:`run` returns when the work is done."""
    lock: AbstractContextManager[object]
    """Held from :meth:`run` until the outputs are fetched, which may lie in memory that the next run overwrites."""

    def __new__(cls, *_args: object, **_options: object) -> Self:
        runner = super().__new__(cls)
        runner.lock = threading.Lock()
        return runner

    @abstractmethod
    def prepare(self, batch: Batch) -> Prepared:
        """The batch as the runtime wants it, on its device."""

    @abstractmethod
    def run(self, prepared: Prepared) -> Outputs:
        """The network's outputs in the runtime's own form."""

    @abstractmethod
    def fetch(self, outputs: Outputs) -> tuple[np.ndarray, ...]:
        """The outputs as arrays of their own."""

    def sizes(self, batch: int) -> tuple[int, ...]:
        """Numbers of images to call it with so that nothing is left to be compiled or allocated for any call of up to
        ``batch`` images.
        """
        return tuple(sorted({batch, max(1, batch - 1), 1}, reverse=True))

    def __call__(self, batch: Batch) -> tuple[np.ndarray, ...]:
        prepared = self.prepare(batch)
        with self.lock:
            return self.fetch(self.run(prepared))


class FileRunner(Runner[list[np.ndarray], Outputs]):
    """What the runtimes of model files share: a batch is cut into one part per stream, and the streams run side by
    side.

    Two streams of one thread each often beat one of two threads: nothing waits for the slower half of a layer.
    """

    streams: int
    whole = False
    """A batch is not cut."""
    dtype: np.dtype
    """Of the network's input."""

    def prepare(self, batch: Batch) -> list[np.ndarray]:
        array = batch if isinstance(batch, np.ndarray) else batch.detach().cpu().numpy()
        array = np.ascontiguousarray(array, dtype=self.dtype)
        return np.array_split(array, self.pieces(len(array)))

    def pieces(self, count: int) -> int:
        """Parts that a batch of so many images is cut into."""
        return 1 if self.whole else min(self.streams, max(1, count))


class Runtime(ABC):
    """What a runtime is, and how it opens a network."""

    name: ClassVar[str]
    """As users write it."""
    order: ClassVar[int] = 100
    """Its place among all: the first that runs a format is that format's usual one."""
    formats: ClassVar[tuple[str, ...]]
    """The formats of artefacts that it runs."""
    opens_modules: ClassVar[bool] = False
    """It takes PyTorch modules; else model files alone, which lay out memory themselves."""
    library: ClassVar[str]
    """The module to import."""
    install: ClassVar[str]
    """How a user gets it."""
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    """Kinds of devices that it runs on: ``cpu``, ``cuda``."""
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    """What it can compute a float network in."""
    layouts: ClassVar[tuple[str, ...]] = ("nchw",)
    """The layouts that it can be told to use."""
    trains: ClassVar[bool] = False
    """It can compute gradients."""
    streams: ClassVar[bool] = False
    """It can run parts of a batch side by side."""
    knows_batch: ClassVar[bool] = False
    """It is faster where it is told the batch size."""
    copies_batches: ClassVar[bool] = False
    """On a GPU, each call takes the batch there and the outputs back."""

    def installed(self) -> bool:
        """Whether it can be used here."""
        return find_spec(self.library) is not None

    def runs_on(self, device: str) -> bool:
        """Whether it runs on a device of this kind."""
        return device.split(":")[0] in self.devices

    def native(self, precision: str) -> bool:
        """Whether the processor here has instructions for one of ``precisions``; without them it is emulated, and
        slower than float32.
        """
        return True

    @abstractmethod
    def open(self, source: object, how: Opening) -> Runner:
        """A module or a model file, opened; :func:`open_runtime` has checked what :class:`Runtime` says."""


def check_runtime(runtime: str) -> str:
    """The name of a runtime, as it is.

    Raises:
        UserError: unknown; the nearest are named.
    """
    return runtime_of(runtime).name


def runtime_of(name: str) -> Runtime:
    """The runtime of this name.

    Raises:
        UserError: unknown; the nearest are named.
    """
    known = {runtime.name: runtime for runtime in runtimes()}
    if name not in known:
        raise UserError(f"runtime {name!r} is unknown{nearest(str(name), known)}")
    return known[name]


def runtimes() -> tuple[Runtime, ...]:
    """All that are known, the usual one of each format first."""
    _look_through_this_folder()
    return tuple(sorted(_REGISTRY, key=lambda runtime: runtime.order))


def runtimes_of(format: str, device: str = "cpu") -> tuple[str, ...]:
    """Names of the runtimes that can run artefacts of a format on a processor, or on a device, the usual one first."""
    here = [runtime for runtime in runtimes() if runtime.runs_on("cpu") or runtime.runs_on(device)]
    return tuple(runtime.name for runtime in here if format in runtime.formats)


def file_runtimes(device: str = "cpu") -> tuple[str, ...]:
    """Names of the runtimes that open model files alone and run on a device, the usual one first."""
    return tuple(runtime.name for runtime in runtimes() if not runtime.opens_modules and runtime.runs_on(device))


def installed_runtimes() -> tuple[str, ...]:
    """Names of the runtimes that can be used here."""
    return tuple(runtime.name for runtime in runtimes() if runtime.installed())


def need_runtime(runtime: str) -> None:
    """
    Raises:
        UserError: the runtime's library is not installed; the message says how to install it.
    """
    known = runtime_of(runtime)
    if find_spec(known.library) is None:
        raise UserError(f"runtime {runtime} is not installed; {known.install}")


def no_bf16(format: str) -> str:
    """Why there is no bf16 form of an artefact's format here; empty where there is one."""
    formats = dict.fromkeys(form for runtime in runtimes() for form in runtime.formats)
    usual = {form: runtime_of(runtimes_of(form)[0]) for form in formats}
    able = [form for form, runtime in usual.items() if "bf16" in runtime.precisions and not runtime.opens_modules]
    if format not in able:
        return f"format {format} has no bf16 form; use format {' or '.join(able)}"
    if not usual[format].installed():
        return f"bf16 is computed by {usual[format].name}, which is not installed; {usual[format].install}"
    if not usual[format].native("bf16"):
        return "this processor has no bf16 instructions: emulated it is slower than fp32; leave bf16 out"
    return ""


def need_bf16() -> None:
    """
    Raises:
        UserError: there is no form in bfloat16 here; the message says why.
    """
    if why := no_bf16("openvino"):
        raise UserError(why)


def open_runtime(source: object, runtime: str, how: Opening | None = None) -> Runner:
    """Open a module (PyTorch's runtimes) or a model file (those of files) for inference.

    A module is moved to the device, precision and layout and put in eval mode.

    Args:
        source: a ``torch.nn.Module`` or the path of a model file.
        runtime: a name that :func:`runtimes` knows.
        how: threads, device and so on; None: one thread per core, on the processor.

    Raises:
        UserError: the runtime is unknown or not installed (the message says how to install it), can not open this
            source, or can not run it so.
    """
    known = runtime_of(runtime)
    how = how or Opening()
    is_file = isinstance(source, (str, os.PathLike))
    if not is_file and not known.opens_modules:
        raise UserError(f"runtime {runtime} opens model files, not modules; export the network first")
    need_runtime(runtime)
    if how.precision not in known.precisions:
        if how.precision == "int8":
            raise UserError("precision int8 needs a quantised artefact; export one with int8 and measure that")
        raise UserError(f"runtime {runtime} computes in {listed(known.precisions, 'or')}, not in {how.precision}")
    if not known.runs_on(how.device):
        raise UserError(f"runtime {runtime} runs on device {listed(known.devices, 'or')} here, got {how.device!r}")
    return known.open(Path(source) if isinstance(source, (str, os.PathLike)) else source, how)


def threads_and_streams(how: Opening) -> tuple[int, int]:
    """Threads and streams to use.

    Raises:
        UserError: there are more streams than threads.
    """
    threads = how.threads or available_cores()
    if not 1 <= how.streams <= threads:
        raise UserError(f"streams must lie between 1 and the {threads} threads, got {how.streams}")
    return threads, how.streams


def run_error(runtime: str, name: str, error: Exception) -> Exception:
    """What to raise where a network that could be opened does not run. Out of memory stays what it is: a smaller batch
    may fit.
    """
    text = str(error).lower()
    if isinstance(error, MemoryError) or "memory" in text or "alloc" in text:
        return error
    return UserError(f"{runtime} can not run {name}: {first_line(error)}")


_REGISTRY: list[Runtime] = []

Kind = TypeVar("Kind", bound=Runtime)


def register(runtime: type[Kind]) -> type[Kind]:
    """Class decorator: put a runtime into the registry."""
    _REGISTRY.append(runtime())
    return runtime


@cache
def _look_through_this_folder() -> None:
    """Import each module beside this one, in the order of their names, so that the runtimes in it are registered."""
    package = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")
