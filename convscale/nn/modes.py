"""Training and evaluation mode, entered and left without a trace."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

_Container = list | dict | set | deque


@contextmanager
def in_mode(net: nn.Module, training: bool) -> Iterator[nn.Module]:
    """The network in training or evaluation mode; afterwards every submodule is back in the mode that it was in.

    ``net.train(before)`` would put submodules that were frozen in evaluation mode into training mode.
    """
    modes = [(module, module.training) for module in net.modules()]
    net.train(training)
    try:
        yield net
    finally:
        for module, flag in modes:
            module.training = flag


@contextmanager
def as_it_was(net: nn.Module) -> Iterator[None]:
    """Afterwards every submodule has the attributes that it had, lists, dictionaries and sets with what was in them:
    what a forward pass keeps for the next one (a grid, a mask) is forgotten.
    """
    before = [(module, dict(vars(module))) for module in net.modules()]
    held: dict[int, tuple[_Container, dict[Any, Any] | list[Any]]] = {}
    waiting = [value for _, values in before for value in values.values() if isinstance(value, _Container)]
    while waiting:
        value = waiting.pop()
        if id(value) in held:
            continue
        held[id(value)] = (value, content := dict(value) if isinstance(value, dict) else list(value))
        inside = content.values() if isinstance(content, dict) else content
        waiting.extend(each for each in inside if isinstance(each, _Container))
    try:
        yield
    finally:
        for module, values in before:
            now = vars(module)
            for name in now.keys() - values.keys():
                del now[name]
            now.update({name: value for name, value in values.items() if now.get(name, now) is not value})
        for value, content in held.values():
            _put_back(value, content)


def _put_back(value: _Container, content: dict[Any, Any] | list[Any]) -> None:
    """Give a container the content that it had, in place, since others may hold it too; one that has it still is not
    touched.
    """
    now = dict(value) if isinstance(value, dict) else list(value)
    if _same(now, content) and (not isinstance(value, dict) or _same(value.values(), dict(content).values())):
        return
    value.clear()
    if isinstance(value, list | deque):
        value.extend(content)
    else:
        value.update(content)


def _same(one: Collection[object], other: Collection[object]) -> bool:
    """Whether two hold the very same objects, in order."""
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def evaluating(net: nn.Module) -> AbstractContextManager[nn.Module]:
    """The network in evaluation mode; afterwards every submodule is back in the mode that it was in."""
    return in_mode(net, False)


def as_graph(net: nn.Module) -> nn.Module:
    """A network as what is counted, traced and timed with one batch: itself; of a detector of ours everything but
    non-maximum suppression.
    """
    if getattr(net, "detector_spec", None) is None:
        return net
    from convscale.nn.detector_graph import DetectorGraph  # torchvision's detection is slow to import
    from convscale.nn.detectors import Detector

    assert isinstance(net, Detector), f"{type(net).__name__} is no detector of ours"
    return DetectorGraph(net)


def forward_logits(net: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Float32 logits (N, classes) of a module on its own device, in evaluation mode; its modes are put back."""
    parameter = next(net.parameters(), torch.empty(0))
    with evaluating(net), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return net(batch.to(device=parameter.device, dtype=parameter.dtype)).float().cpu()
