"""A moving average of a network's weights and running statistics."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from convscale.learn.recipe import Recipe


class Ema:
    """Keeps ``net``, whose tensors follow the trained network's: ``average = d average + (1 - d) now``.

    With a constant ``decay``: it warms up, ``d = min(decay, (1 + t) / (10 + t))`` after t updates (TensorFlow's
    ExponentialMovingAverage), so that the first weights are soon forgotten. With a ``power``: ``d = (1 - 1 / t) **
    (power + 1)`` after t optimiser steps, so that the weights of step t count about as ``t ** power`` however long the
    run is (Karras et al. 2024, arXiv 2312.02696, equation 2).
    """

    def __init__(self, net: nn.Module, decay: float, power: float | None = None) -> None:
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.decay, self.power = decay, power
        self.updates = 0

    @torch.no_grad()
    def update(self, net: nn.Module, steps: int = 1) -> None:
        """Follow ``net``; ``steps`` is how many optimiser steps it took since the last call."""
        self.updates += 1
        decay = self._decay(steps)
        ours, theirs = self.net.state_dict(), net.state_dict()
        floats = [name for name, value in ours.items() if value.is_floating_point()]
        torch._foreach_lerp_([ours[name] for name in floats], [theirs[name] for name in floats], 1 - decay)
        for name, value in ours.items():
            if not value.is_floating_point():
                value.copy_(theirs[name])

    def _decay(self, steps: int) -> float:
        """What is left of the average at this update, the ``updates``-th, each of ``steps`` steps."""
        if self.power is None:
            return min(self.decay**steps, (1 + self.updates) / (10 + self.updates))
        return (1 - 1 / self.updates) ** (self.power + 1)  # the product over the steps since the last update


def power_of(width: float) -> float:
    """The power of the average whose weights' relative standard deviation is ``width``: 16.97 for 0.05, 6.94 for 0.1.

    Args:
        width: over the length of the run, above 0 and below 0.288, which is a plain mean's.

    Returns:
        The largest root of Karras et al. 2024 (arXiv 2312.02696), algorithm 2.
    """
    inverse = width**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class ScheduleFreeAverage(Ema):
    """The weights that schedule-free optimisation is judged by (Defazio et al. 2024, arXiv 2405.15682): the trained
    ones are y, between these, x, and the steps' own, z, which the optimiser keeps. Running statistics are those at y.
    """

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(net, 0.0)
        self._optimizer = optimizer

    @torch.no_grad()
    def update(self, net: nn.Module, steps: int = 1) -> None:
        self.updates += 1
        self.net.load_state_dict(net.state_dict())
        ours, theirs = (dict(each.named_parameters()) for each in (self.net, net))
        names = {param: name for name, param in theirs.items()}
        for group in self._optimizer.param_groups:
            share = 1 - 1 / group["betas"][0]  # y = (1 - beta) z + beta x
            for param in group["params"]:
                if (base := self._optimizer.state.get(param, {}).get("z")) is not None:
                    ours[names[param]].copy_(torch.lerp(param, base.to(param), share))


def build_ema(net: nn.Module, recipe: Recipe, optimizer: torch.optim.Optimizer | None = None) -> Ema | None:
    """The recipe's average; None: it has none."""
    if recipe.optimizer == "schedule-free" and optimizer is not None:
        return ScheduleFreeAverage(net, optimizer)
    if recipe.ema_width:
        return Ema(net, 0.0, power_of(recipe.ema_width))
    return Ema(net, recipe.ema_decay) if recipe.ema_decay else None
