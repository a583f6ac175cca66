"""Training and evaluation mode, entered and left without a trace."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn


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
