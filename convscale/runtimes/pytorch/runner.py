"""A module in PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import nn

from convscale.errors import UserError
from convscale.machine import available_cores, need_cuda
from convscale.runtimes.base import Batch, Opening, Runner, installed_runtimes

Outputs = torch.Tensor | Sequence[torch.Tensor]


class TorchRunner(Runner[torch.Tensor, Outputs]):
    """A module in PyTorch: eager, compiled, or compiled with its weights frozen in."""

    def __init__(self, net: object, runtime: str, how: Opening) -> None:
        assert isinstance(net, nn.Module), f"{type(net).__name__} is no module"
        if how.device.startswith("cuda"):
            need_cuda(how.device)
        self.runtime, self.threads = runtime, how.threads or available_cores()
        self._device = torch.device(how.device)
        self._dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(how.precision, torch.float32)
        self._format = torch.channels_last if how.layout == "nhwc" else torch.contiguous_format
        self._amp = how.precision if how.precision in ("amp", "amp_bf16") else ""
        net = net.train(how.train).to(device=self._device, dtype=self._dtype)
        if how.layout == "nhwc":
            net = net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.module = net
        self._graphs = runtime == "compiled-max"
        self._static = runtime != "eager" and (how.static or self._graphs)
        self._met: set[tuple[object, ...]] = set()
        self.net: Callable[[torch.Tensor], Outputs] = (
            net if runtime == "eager" else _compiled(net, runtime, static=self._static, anew=how.static)
        )
        if self._device.type == "cuda":
            self.synchronize = lambda: torch.cuda.synchronize(self._device)

    def prepare(self, batch: Batch) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(batch)) if isinstance(batch, np.ndarray) else batch
        assert isinstance(tensor, torch.Tensor), f"{type(tensor).__name__} is no batch"
        if tensor.is_floating_point():
            tensor = tensor.to(self._dtype)
        return tensor.to(self._device).contiguous(memory_format=self._format)

    def run(self, prepared: torch.Tensor) -> Outputs:
        if self._graphs:  # the outputs of the call before were fetched: their memory may be written again
            torch.compiler.cudagraph_mark_step_begin()
        with torch_threads(self.threads), torch.no_grad():
            return self.forward(prepared)

    def forward(self, prepared: torch.Tensor) -> Outputs:
        """One forward pass under the precision's autocast, with gradients where they are on."""
        met = (prepared.shape, prepared.dtype, torch.is_grad_enabled())
        known = not self._static or met in self._met
        with self._autocast(), contextlib.nullcontext() if known else _many_shapes():
            outputs = self.net(prepared)
        if not known:
            self._met.add(met)
        return outputs

    def plain(self, prepared: torch.Tensor) -> Outputs:
        """As :meth:`forward`, operator by operator: nothing is compiled for a batch that is only looked at."""
        with self._autocast():
            return self.module(prepared)

    def parameters(self) -> list[nn.Parameter]:
        """The module's parameters, as they are on the device."""
        return list(self.module.parameters())

    def fetch(self, outputs: Outputs) -> tuple[np.ndarray, ...]:
        tensors = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        return tuple(output.float().cpu().numpy() for output in tensors)

    def _autocast(self) -> AbstractContextManager[object]:
        kind = self._device.type
        if not self._amp:
            return contextlib.nullcontext()
        half = torch.float16 if kind == "cuda" and self._amp == "amp" else torch.bfloat16
        return torch.autocast(kind, half)


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


_COMPILE: dict[str, dict[str, Any]] = {
    "compiled": {},
    "compiled-frozen": {"options": {"freezing": True}},  # weights as constants, laid out for the processor
    "compiled-max": {"mode": "max-autotune"},
}
"""What ``torch.compile`` is told for each runtime."""


def _many_shapes() -> AbstractContextManager[object]:
    """While open, a network is compiled for as many shapes as PyTorch allows for all networks together: after eight of
    one it compiles no more, and runs it operator by operator.
    """
    from torch._dynamo import config  # slow to import

    return config.patch(recompile_limit=config.accumulated_recompile_limit)


def _compiled(net: nn.Module, runtime: str, *, static: bool, anew: bool) -> Callable[[torch.Tensor], Outputs]:
    """``torch.compile`` as a runtime has it.

    Args:
        static: code for each shape; else from the second shape on code for all shapes, which is slower.
        anew: PyTorch hands on what it compiled for other networks of the same class: drop what this process compiled
            before. Who else has a compiled network open pays for it, so it is for a timing.
    """
    if "compiled" not in installed_runtimes() and next(net.parameters(), torch.empty(0)).device.type == "cpu":
        raise UserError(
            "runtime compiled needs a C++ compiler on a CPU; install g++, or use runtime eager or onnxruntime"
        )
    if anew:
        from torch import _dynamo  # slow to import

        _dynamo.reset()
    return torch.compile(net, dynamic=False if static else None, **_COMPILE[runtime])
