"""How fast a network is: any network, in any runtime, for inference or training."""

from __future__ import annotations

import copy
import dataclasses
import gc
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from convscale.errors import UserError, nearest
from convscale.ship.artifact import Artifact, open_artifact
from convscale.ship.fold import fold
from convscale.ship.nets import as_module, example_input, input_shape
from convscale.ship.onnx_files import write_onnx
from convscale.ship.runtime import OnnxRunner, OpenVinoRunner, Runner, TorchRunner, need_runtime, torch_threads
from convscale.speed.conditions import Conditions
from convscale.speed.timing import DeviceEvents, Environment, Measurement, Stopwatch, WallClock, available_cores, time_callable

PROTOCOLS = ("tresnet",)
FILE_RUNTIMES = ("onnxruntime", "openvino")
MAX_BATCH = 8192
"""The search for the largest batch stops here."""


def measure(
    net: Any,
    cond: Conditions | None = None,
    *,
    min_seconds: float = 1.0,
    max_seconds: float = 30.0,
    protocol: str | None = None,
    **keywords: Any,
) -> Measurement:
    """Time a network under stated conditions.

    For ONNX Runtime and OpenVINO a module is exported to a temporary file first, trained or not: speed does not depend on the weights. Inputs
    are seeded noise, already on the device; copies and preprocessing are left out. The network is left as it is.

    Args:
        net: a module, a ``NetSpec``, a model's name, or an :class:`~convscale.ship.artifact.Artifact` (in its own runtime and threads unless
            others are named).
        cond: the conditions; None: the defaults.
        min_seconds: the timed calls together last at least this long.
        max_seconds: and warm-up and timed calls at most about this long.
        protocol: ``tresnet``: at 90 % of the largest batch that fits (the TResNet paper, section 4.1); the batch size given is not used.
        keywords: fields of :class:`~convscale.speed.conditions.Conditions`, over those of ``cond``.

    Returns:
        A measurement whose conditions are complete: size and threads are filled in, and a batch that did not fit is halved, which a note says.

    Raises:
        UserError: an impossible condition, an unknown size, a runtime that is missing or does not do what is asked, no batch that fits.
    """
    conditions = _conditions(net, cond, keywords)
    if protocol is not None and protocol not in PROTOCOLS:
        raise UserError(f"protocol {protocol!r} is unknown{nearest(protocol, PROTOCOLS)}")
    name, cond, open_call = _subject(net, conditions)
    notes: tuple[str, ...] = ()
    if protocol == "tresnet":
        largest = largest_batch(lambda size: _fits(open_call, size, conditions.device), device=cond.device)
        cond = dataclasses.replace(cond, batch_size=max(1, int(0.9 * largest)))
        notes = (f"tresnet protocol: the largest batch that fits is {largest}",)
    while True:
        try:
            call, stopwatch = open_call(cond.batch_size)
            times = time_callable(call, min_seconds=min_seconds, max_seconds=max_seconds, stopwatch=stopwatch)
            break
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            half = cond.batch_size // 2
            if half < 1:
                raise UserError(f"{name} does not fit in the memory of {cond.device} at {cond.image_size} px, even one image at a time") from error
            notes = (*notes, f"batch {cond.batch_size} did not fit in memory; halved to {half}")
            cond = dataclasses.replace(cond, batch_size=half)
            _free(cond.device)
    return Measurement(times_s=times, conditions=cond, environment=Environment.here(cond.device), model=name, notes=notes)


def export_and_time(net: Any, cond: Conditions | None = None, *, min_seconds: float = 1.0, max_seconds: float = 15.0, **keywords: Any) -> Measurement:
    """Time a candidate as it would be shipped: exported untrained and run in ONNX Runtime (or ``runtime=``), without a check of its outputs."""
    keywords.setdefault("runtime", "onnxruntime" if cond is None else cond.runtime)
    return measure(net, cond, min_seconds=min_seconds, max_seconds=max_seconds, **keywords)


def largest_batch(fits: Callable[[int], bool], *, device: str = "cuda", limit: int = MAX_BATCH) -> int:
    """The largest batch size that fits: doubled until one does not, then bisected to within one part in 32.

    Args:
        fits: whether a batch of this size runs; called about 15 times at most.
        device: for the message.
        limit: the largest size tried.

    Returns:
        At least 1.

    Raises:
        UserError: not even one image fits.
    """
    if not fits(1):
        raise UserError(f"not even one image fits in the memory of {device}; take a smaller network or size")
    low = 1
    while low < limit and fits(min(2 * low, limit)):
        low = min(2 * low, limit)
    high = min(2 * low, limit + 1)
    while low < limit and high - low > max(1, low // 32):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of PyTorch or of a runtime means that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        sign in text
        for sign in ("out of memory", "can't allocate memory", "not enough memory", "failed to allocate memory", "bad_alloc", "cudnn_status_alloc")
    )


def _conditions(net: Any, cond: Conditions | None, keywords: dict[str, Any]) -> Conditions:
    """The conditions asked for; an artefact's own runtime, precision and threads where none are."""
    known = {field.name for field in dataclasses.fields(Conditions)}
    if unknown := sorted(set(keywords) - known):
        raise UserError(f"measure has no condition {unknown[0]!r}{nearest(unknown[0], known)}")
    if isinstance(net, Artifact):
        own = {"runtime": net.runtime, "precision": net.precision, "threads": net.threads, "image_size": net.image_size}
        cond = dataclasses.replace(cond or Conditions(), **(own if cond is None else {"precision": net.precision, "image_size": net.image_size}))
    cond = dataclasses.replace(cond or Conditions(), **keywords)
    if cond.mode == "train" and (isinstance(net, Artifact) or cond.runtime in (*FILE_RUNTIMES, "compiled-frozen")):
        what = "an artefact" if isinstance(net, Artifact) else f"runtime {cond.runtime}"
        raise UserError(f"{what} can not train; measure mode train in runtime eager or compiled")
    if not (cond.device == "cpu" or cond.device.startswith("cuda")):
        raise UserError(f"device {cond.device!r} can not be measured here; use cpu or cuda, or predict for a named GPU")
    if cond.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {cond.device!r} is not there: torch sees no CUDA GPU; use device cpu, or predict for a named GPU")
    return dataclasses.replace(cond, threads=cond.threads or available_cores())


Opener = Callable[[int], tuple[Callable[[], object], Stopwatch]]


def _subject(net: Any, cond: Conditions) -> tuple[str, Conditions, Opener]:
    """The network's name, its conditions with the size filled in, and what makes a call to time at a batch size."""
    if isinstance(net, Artifact):
        if cond.image_size != net.image_size:
            raise UserError(f"the artefact takes {net.image_size} px, got image_size {cond.image_size}")
        streams = net.streams if (cond.runtime, cond.threads) == (net.runtime, net.threads or available_cores()) else 1
        runner = open_artifact(net, cond.runtime, threads=cond.threads, device=cond.device, streams=streams)
        shape = (net.image_size, net.image_size, net.preprocessing.channels)

        def pixels(batch_size: int) -> Any:
            return net.input_batch(np.random.default_rng(0).integers(0, 256, (batch_size, *shape), dtype=np.uint8))

        return str(net.manifest.get("model", "")), cond, lambda size: _inference(runner, pixels(size), cond.device)
    module, name = as_module(net)
    shape = input_shape(module, cond.image_size)
    cond = dataclasses.replace(cond, image_size=shape[1])
    if cond.mode == "train":
        return name, cond, lambda size: _training(module, cond, size)
    runner = _open_module(module, cond)
    return name, cond, lambda size: _inference(runner, example_input(module, cond.image_size, batch_size=size).float(), cond.device)


def _open_module(module: nn.Module, cond: Conditions) -> Runner:
    """A copy of the module in the runtime asked for, exported on the way where the runtime opens files."""
    if cond.runtime not in FILE_RUNTIMES:
        return TorchRunner(
            copy.deepcopy(module), cond.runtime, threads=cond.threads, device=cond.device, precision=cond.precision, layout=cond.layout
        )
    if cond.precision != "fp32" or cond.layout != "nchw":
        raise UserError(
            f"{cond.runtime} times a module in fp32 and nchw (it lays out memory itself), got {cond.precision}, {cond.layout}; or measure an artefact"
        )
    need_runtime(cond.runtime)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        module = copy.deepcopy(module).cpu().float()
        example = example_input(module, cond.image_size)
        write_onnx(fold(module, example), example, path)
        if cond.runtime == "onnxruntime":
            return OnnxRunner(path, threads=cond.threads, device=cond.device)
        return OpenVinoRunner(path, threads=cond.threads, device=cond.device)


def _inference(runner: Runner, batch: Any, device: str) -> tuple[Callable[[], object], Stopwatch]:
    prepared = runner.prepare(batch)
    return (lambda: runner.run(prepared)), _stopwatch(device, runner.synchronize)


def _training(module: nn.Module, cond: Conditions, batch_size: int) -> tuple[Callable[[], object], Stopwatch]:
    """Forward, cross-entropy, backward and a step of SGD with momentum, on a copy."""
    runner = TorchRunner(
        copy.deepcopy(module), cond.runtime, threads=cond.threads, device=cond.device, precision=cond.precision, layout=cond.layout, train=True
    )
    parameters = [p for p in runner.parameters() if p.requires_grad]
    if not parameters:
        raise UserError("the network has no parameter that requires a gradient; nothing to train")
    optimiser = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)
    images = runner.prepare(example_input(module, cond.image_size, batch_size=batch_size).float())
    with torch.no_grad(), torch_threads(runner.threads):
        classes = runner.forward(images[:2] if batch_size > 1 else images.expand(2, -1, -1, -1)).shape[1]
    labels = torch.arange(batch_size, device=images.device) % classes

    def step() -> None:
        with torch_threads(runner.threads):
            loss = nn.functional.cross_entropy(runner.forward(images).float(), labels)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    return step, _stopwatch(cond.device, runner.synchronize)


def _fits(open_call: Opener, batch_size: int, device: str) -> bool:
    """Whether one call at this batch size runs."""
    try:
        call, _ = open_call(batch_size)
        call()
        return True
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        _free(device)
        return False


def _stopwatch(device: str, synchronize: Callable[[], object] | None) -> Stopwatch:
    return DeviceEvents.cuda(device) if device.startswith("cuda") else WallClock(synchronize=synchronize)


def _free(device: str) -> None:
    """Give cached memory back, so that the next try is not told that an earlier one still holds it."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
