"""What a measurement times: a network opened in a runtime under stated conditions, and a try at a batch that may not
fit in memory.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import nn

from convscale.artifact.artifact import Artifact, open_artifact
from convscale.conditions import LAYOUTS, Conditions, as_size, sides, size_text
from convscale.cost.counting import count
from convscale.cost.memory import free_bytes
from convscale.errors import UserError, nearest
from convscale.formats.fold import fold
from convscale.formats.onnx import write_onnx
from convscale.machine import available_cores, need_cuda
from convscale.networks.inputs import example_input, input_shape
from convscale.networks.resolve import Network, as_module, find
from convscale.nn.modes import as_graph
from convscale.runtimes.base import Opening, Runner, check_runtime, need_runtime, open_runtime, runtime_of
from convscale.runtimes.pytorch.runner import TorchRunner, torch_threads
from convscale.speed.timing import DeviceEvents, Stopwatch, WallClock

GUARDED_BATCH = 32
"""From this batch on, a call on a CPU must fit in the memory that is free, as counted: the system would not refuse it
but end the process."""
MARGIN = 1.25
"""What a runtime takes over the counted bytes."""

T = TypeVar("T")

Measured: TypeAlias = "Network | Artifact"
"""What can be timed."""
Opener = Callable[[int], tuple[Callable[[], object], Stopwatch]]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is timed: a network opened in a runtime."""

    name: str
    """The network's name."""
    cond: Conditions
    """With size and threads filled in."""
    open_call: Opener
    """Makes a call to time at a batch size, and what times it."""
    need_bytes: Callable[[int], int] = lambda batch_size: 0
    """Bytes that a call at a batch size takes, as counted; 0 where they can not be."""
    notes: tuple[str, ...] = ()
    """What the reader must know of the runtime."""


def subjects(net: Measured, cond: Conditions | None, keywords: dict[str, object]) -> list[Subject]:
    """One subject, or one for each layout where the faster is asked for."""
    auto = keywords.get("layout") == "auto"
    if auto:
        keywords = {key: value for key, value in keywords.items() if key != "layout"}
    first = _conditions(net, cond, keywords)
    if not auto:
        return [_subject(net, first)]
    if isinstance(net, Artifact) or not runtime_of(first.runtime).opens_modules:  # these lay out memory themselves
        return [_subject(net, dataclasses.replace(first, layout="nchw"))]
    return [_subject(net, dataclasses.replace(first, layout=layout)) for layout in LAYOUTS]


def _conditions(net: Measured, cond: Conditions | None, keywords: dict[str, object]) -> Conditions:
    """The conditions asked for, which can be kept; an artefact's own runtime, precision, size and threads where nothing
    else is.
    """
    usual = Conditions()
    known = {field.name for field in dataclasses.fields(Conditions)}
    if unknown := sorted(set(keywords) - known):
        raise UserError(f"measure has no condition {unknown[0]!r}{nearest(unknown[0], known)}")
    if isinstance(net, Artifact) and cond is None:
        keywords = {"batch_size": tuned_batch(net) or usual.batch_size, **keywords}
    cond = dataclasses.replace(cond or usual, **keywords)  # pyright: ignore[reportArgumentType]
    check_runtime(cond.runtime)
    if isinstance(net, Artifact):
        stated = {name for name in known if name in keywords or getattr(cond, name) != getattr(usual, name)}
        cond = _of_artifact(net, cond, stated)
    if cond.mode == "train" and (isinstance(net, Artifact) or not runtime_of(cond.runtime).trains):
        what = "an artefact" if isinstance(net, Artifact) else f"runtime {cond.runtime}"
        raise UserError(f"{what} can not train; measure mode train in runtime eager or compiled")
    if not (cond.device == "cpu" or cond.device.startswith("cuda")):
        raise UserError(f"device {cond.device!r} can not be measured here; use cpu or cuda, or predict for it")
    if cond.device != "cpu":
        need_cuda(cond.device, "use device cpu, or predict for a named GPU")
    return dataclasses.replace(cond, threads=cond.threads or available_cores())


def tuned_batch(net: Artifact) -> int | None:
    """The batch that an artefact was found to be fastest at, on this kind of device; None: it was not tuned on it."""
    runs = net.manifest.runtime
    return runs.batch_size if runs.device == net.device.partition(":")[0] else None


def _of_artifact(net: Artifact, cond: Conditions, stated: set[str]) -> Conditions:
    """An artefact's own conditions, with those that were stated where it can keep them.

    Raises:
        UserError: a precision, layout or size that is not the artefact's: it was written in one.
    """
    runtime = cond.runtime if "runtime" in stated else net.runtime
    precision = net.computed_in(runtime)
    if "precision" in stated and cond.precision != precision:
        where = "" if precision == net.precision else f", and computed in {precision} by {runtime} here"
        raise UserError(
            f"the artefact is in {net.precision}{where}, got precision {cond.precision!r}; export it in that, or leave "
            "precision out"
        )
    if "layout" in stated and cond.layout != "nchw":
        raise UserError(f"an artefact lays out memory itself, got layout {cond.layout!r}; leave layout out")
    if "image_size" in stated and cond.image_size != net.image_size:
        raise UserError(f"the artefact takes {size_text(net.image_size)} px, got image_size {cond.image_size}")
    return dataclasses.replace(
        cond,
        precision=precision,
        layout="nchw",
        image_size=net.image_size,
        runtime=runtime,
        threads=cond.threads if "threads" in stated else net.threads,
    )


def _subject(net: Measured, cond: Conditions) -> Subject:
    """The network opened in its runtime."""
    notes = (
        ("the batch's way to the GPU and back is in the time",)
        if runtime_of(cond.runtime).copies_batches and cond.device != "cpu"
        else ()
    )
    if isinstance(net, Artifact):
        own = (net.runtime, net.threads or available_cores(), net.manifest.runtime.device)
        streams = net.streams if (cond.runtime, cond.threads, cond.device.partition(":")[0]) == own else 1
        how = Opening(threads=cond.threads, device=cond.device, streams=streams, static=True)
        opened = {
            cond.batch_size: open_artifact(net, cond.runtime, dataclasses.replace(how, batch_size=cond.batch_size))
        }

        def runner_for(size: int) -> Runner:
            """One at a time: large networks would fill the memory."""
            key = size if runtime_of(cond.runtime).knows_batch else cond.batch_size
            if key not in opened:
                opened.clear()
                opened[key] = open_artifact(net, cond.runtime, dataclasses.replace(how, batch_size=key))
            return opened[key]

        shape = (*sides(net.image_size), net.preprocessing.channels)

        def pixels(batch_size: int) -> Any:
            return net.input_batch(np.random.default_rng(0).integers(0, 256, (batch_size, *shape), dtype=np.uint8))

        notes = (*notes, *net.fallbacks(cond.runtime))
        notes = (*notes, f"{streams} streams share the threads") if streams > 1 else notes
        name = net.manifest.model

        def timed(size: int) -> tuple[Callable[[], object], Stopwatch]:
            return _inference(runner_for(size), pixels(size), cond.device)

        return Subject(name=name, cond=cond, open_call=timed, notes=notes)
    # A name with a tag of weights is timed untrained: speed does not depend on them, and nothing is downloaded.
    named = find(net) if isinstance(net, str) else net
    module, name = as_module(named, fused=cond.mode == "infer")
    if hasattr(module, "detector_spec"):
        module, notes = as_graph(module), (*notes, "without non-maximum suppression")
    shape = input_shape(module, cond.image_size)
    cond = dataclasses.replace(cond, image_size=as_size(*shape[1:]))
    need = needed_bytes(module, cond)
    if cond.mode == "train":
        return Subject(
            name=name, cond=cond, open_call=lambda size: _training(module, cond, size), need_bytes=need, notes=notes
        )
    runner = _open_module(module, cond)

    def call(size: int) -> tuple[Callable[[], object], Stopwatch]:
        return _inference(runner, example_input(module, cond.image_size, batch_size=size).float(), cond.device)

    return Subject(name=name, cond=cond, open_call=call, need_bytes=need, notes=notes)


def _open_module(module: nn.Module, cond: Conditions) -> Runner:
    """A copy of the module in the runtime asked for, exported on the way where the runtime opens files."""
    if runtime_of(cond.runtime).opens_modules:
        return open_runtime(copy.deepcopy(module), cond.runtime, _opening(cond))
    if cond.precision != "fp32" or cond.layout != "nchw":
        raise UserError(
            f"{cond.runtime} times a module in fp32 and nchw (it lays out memory itself), got {cond.precision}, "
            f"{cond.layout}; or measure an artefact"
        )
    need_runtime(cond.runtime)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        module = copy.deepcopy(module).cpu().float()
        example = example_input(module, cond.image_size)
        write_onnx(fold(module, example), example, path)
        return open_runtime(path, cond.runtime, Opening(threads=cond.threads, device=cond.device))


def _opening(cond: Conditions, *, train: bool = False) -> Opening:
    """How a module is opened under conditions."""
    return Opening(
        threads=cond.threads,
        device=cond.device,
        precision=cond.precision,
        layout=cond.layout,
        train=train,
        static=True,
    )


def needed_bytes(module: nn.Module, cond: Conditions) -> Callable[[int], int]:
    """Counted bytes of a call by its batch size: a line through two small batches, counted when first asked for."""
    line: list[tuple[float, float]] = []

    def needed(batch_size: int) -> int:
        if not line:
            options: dict[str, Any] = {
                "mode": cond.mode,
                "precision": cond.precision if cond.precision in ("fp32", "fp16") else "amp",
            }
            try:
                small, large = (count(module, cond.image_size, size, **options).peak_bytes for size in (8, 16))
            except UserError:  # what can not be traced is not guarded
                small = large = 0
            line.append((2.0 * small - large, (large - small) / 8))
        fixed, each = line[0]
        return int(MARGIN * (fixed + each * batch_size))

    return needed


def _inference(runner: Runner, batch: Any, device: str) -> tuple[Callable[[], object], Stopwatch]:
    prepared = runner.prepare(batch)
    return (lambda: runner.run(prepared)), _stopwatch(device, runner.synchronize)


def _training(module: nn.Module, cond: Conditions, batch_size: int) -> tuple[Callable[[], object], Stopwatch]:
    """Forward, cross-entropy, backward and a step of SGD with momentum, on a copy."""
    runner = open_runtime(copy.deepcopy(module), cond.runtime, _opening(cond, train=True))
    assert isinstance(runner, TorchRunner), f"{cond.runtime} can not train"
    parameters = [p for p in runner.parameters() if p.requires_grad]
    if not parameters:
        raise UserError("the network has no parameter that requires a gradient; nothing to train")
    optimiser = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)
    images = runner.prepare(example_input(module, cond.image_size, batch_size=batch_size).float())
    with torch.no_grad(), torch_threads(runner.threads):
        outputs = runner.plain(images[:2] if batch_size > 1 else images.expand(2, -1, -1, -1))
        classes = _logits(outputs, module).shape[1]
    labels = torch.arange(batch_size, device=images.device) % classes

    def step() -> None:
        with torch_threads(runner.threads):
            loss = nn.functional.cross_entropy(_logits(runner.forward(images), module).float(), labels)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    return step, _stopwatch(cond.device, runner.synchronize)


def _logits(outputs: object, module: nn.Module) -> torch.Tensor:
    """What a training step's loss is taken of: the output; of several the first, as torchvision's networks with
    auxiliary classifiers give them (a named tuple, or a mapping with ``out``).

    Raises:
        UserError: there is none of shape (N, classes).
    """
    if isinstance(outputs, Mapping):
        outputs = outputs.get("out", next(iter(outputs.values()), None))
    elif isinstance(outputs, tuple | list):
        outputs = next(iter(outputs), None)
    if isinstance(outputs, torch.Tensor) and outputs.ndim == 2:
        return outputs
    shape = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
    raise UserError(
        f"a training step is timed with logits (N, classes); {type(module).__name__} gives {shape}; "
        "wrap it in a module that gives its logits"
    )


def in_memory(
    subject: Subject, batch_size: int, use: Callable[[Callable[[], object], Stopwatch], T]
) -> tuple[T, int | None] | None:
    """What ``use`` makes of a call at a batch size and the bytes the GPU held at most meanwhile (None on a CPU); None
    where memory ran out.
    """
    device = subject.cond.device
    cuda = device.startswith("cuda")
    if not cuda and batch_size >= GUARDED_BATCH:
        free, need = free_bytes(), subject.need_bytes(batch_size)
        if free is not None and need > free:
            return None
    if cuda:
        _release(device)
        torch.cuda.reset_peak_memory_stats(device)
    try:
        with _chosen_algorithms(cuda):
            made = use(*subject.open_call(batch_size))
        in_torch = cuda and runtime_of(subject.cond.runtime).opens_modules  # other runtimes allocate by themselves
        return made, torch.cuda.max_memory_allocated(device) if in_torch else None
    except Exception as error:
        if not is_too_large(error):
            raise
    # Only here is the exception gone, and with it the frames that held the tensors.
    _release(device)
    return None


def once(call: Callable[[], object], stopwatch: Stopwatch) -> float:
    """Run a call, waiting for the device."""
    return stopwatch.time(call)


def twice(call: Callable[[], object], stopwatch: Stopwatch) -> float:
    """Run a call two times, waiting for the device: a training's second step holds the optimiser's state too, which its
    first only makes.
    """
    return stopwatch.time(call) + stopwatch.time(call)


def is_too_large(error: BaseException) -> bool:
    """Whether an exception of PyTorch or of a runtime means that a batch was too large: memory ran out, or a kernel can
    not count so many elements.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        sign in text
        for sign in (
            "out of memory",
            "can't allocate memory",
            "not enough memory",
            "failed to allocate memory",
            "bad_alloc",
            "cudnn_status_alloc",
            "32-bit index",
            "canuse32bitindexmath",
        )
    )


@contextmanager
def _chosen_algorithms(cuda: bool) -> Iterator[None]:
    """cuDNN times its algorithms for a shape that it meets first, in the warm-up; the setting is put back."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or cuda
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _stopwatch(device: str, synchronize: Callable[[], object] | None) -> Stopwatch:
    """Events on the GPU's stream for work that a call only enqueues; host time for work that is done on return."""
    if device.startswith("cuda") and synchronize is not None:
        return DeviceEvents.cuda(device)
    return WallClock(synchronize=synchronize)


def _release(device: str) -> None:
    """Give cached memory back, so that the next try is not told that an earlier one still holds it."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
