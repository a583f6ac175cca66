"""A moving average of a network's weights and running statistics."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Ema:
    """Keeps ``net``, whose tensors follow the trained network's: ``average = d average + (1 - d) now``.

    The decay warms up, ``d = min(decay, (1 + t) / (10 + t))`` after t updates (TensorFlow's ExponentialMovingAverage),
    so that the first weights are soon forgotten.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, net: nn.Module, steps: int = 1) -> None:
        """Follow ``net``; ``steps`` is how many optimiser steps it took since the last call."""
        self.updates += 1
        decay = min(self.decay**steps, (1 + self.updates) / (10 + self.updates))
        ours, theirs = self.net.state_dict(), net.state_dict()
        floats = [name for name, value in ours.items() if value.is_floating_point()]
        torch._foreach_lerp_([ours[name] for name in floats], [theirs[name] for name in floats], 1 - decay)
        for name, value in ours.items():
            if not value.is_floating_point():
                value.copy_(theirs[name])
