"""Optimisers: decoupled weight decay for all of them, RMSProp in TensorFlow's form, learning rates per layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from convscale.learn.recipe import Recipe


class RMSpropTF(torch.optim.Optimizer):
    """RMSProp as TensorFlow has it: epsilon below the root, the mean square starts at 1, momentum over lr-scaled steps.

    ``v = decay v + (1 - decay) g^2``; ``b = momentum b + lr g / sqrt(v + epsilon)``; ``w = w - b``
    (tf.raw_ops.ApplyRMSProp). PyTorch's own takes ``sqrt(v) + epsilon`` with v from 0 and multiplies the momentum
    buffer by lr, which makes other first steps and other steps while lr changes.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        decay: float = 0.9,
        momentum: float = 0.9,
        epsilon: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "decay": decay, "momentum": momentum, "epsilon": epsilon, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """One step; weight decay is decoupled."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            for param in params:
                if not self.state[param]:
                    self.state[param] = {"mean_square": torch.ones_like(param), "buffer": torch.zeros_like(param)}
            grads: list[torch.Tensor] = [param.grad for param in params]
            squares = [self.state[param]["mean_square"] for param in params]
            buffers = [self.state[param]["buffer"] for param in params]
            torch._foreach_mul_(squares, group["decay"])
            torch._foreach_addcmul_(squares, grads, grads, 1 - group["decay"])
            roots = torch._foreach_add(squares, group["epsilon"])
            torch._foreach_sqrt_(roots)
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_addcdiv_(buffers, grads, roots, group["lr"])
            decay_weights(params, group["lr"] * group["weight_decay"])
            torch._foreach_sub_(params, buffers)
        return loss


class SGD(torch.optim.SGD):
    """torch's SGD with Nesterov momentum and decoupled weight decay, kept in the group as ``decoupled_decay``."""

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """One step: weights shrink by lr x decoupled_decay, then move."""
        for group in self.param_groups:
            decay_weights(
                [param for param in group["params"] if param.grad is not None], group["lr"] * group["decoupled_decay"]
            )
        return super().step(closure)


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2019, arXiv 1904.00962, algorithm 2): AdamW's direction, each tensor's step as long as ``lr``
    times its weights' norm.

    Weight decay is part of the direction, as in the paper. Tensors without weight decay (norms, biases) take AdamW's
    step, and gradients are first divided by their total norm where it is above 1; both are what later implementations
    settled on.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "epsilon": epsilon, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        every = [param.grad for group in self.param_groups for param in group["params"] if param.grad is not None]
        shrink = 1 / torch.nn.utils.get_total_norm(every).clamp(min=1.0)
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state.update(
                        step=torch.zeros(()), mean=torch.zeros_like(param), mean_square=torch.zeros_like(param)
                    )
                grad = param.grad * shrink
                state["step"] += 1
                state["mean"].lerp_(grad, 1 - beta1)
                state["mean_square"].lerp_(grad * grad, 1 - beta2)
                count = state["step"].item()
                root = (state["mean_square"] / (1 - beta2**count)).sqrt_().add_(group["epsilon"])
                direction = (state["mean"] / (1 - beta1**count)).div_(root)
                if group["weight_decay"]:
                    direction.add_(param, alpha=group["weight_decay"])
                    weight_norm, direction_norm = param.norm(), direction.norm()
                    trust = torch.where(
                        (weight_norm > 0) & (direction_norm > 0),
                        weight_norm / direction_norm,
                        torch.ones_like(weight_norm),
                    )
                    direction.mul_(trust)
                param.sub_(direction, alpha=group["lr"])
        return loss


def decay_weights(params: list[torch.Tensor], amount: float) -> None:
    """``w = w (1 - amount)``, in place."""
    if amount and params:
        torch._foreach_mul_(params, 1 - amount)


def build_optimizer(net: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser over all parameters of ``net``.

    Each group carries ``lr_scale`` (layer-wise decay); norms, biases and other vectors have no weight decay.
    """
    groups = _groups(net, recipe)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(
            groups, lr=recipe.lr, betas=(recipe.momentum, recipe.beta2), eps=recipe.epsilon, fused=True
        )
    if recipe.optimizer == "lamb":
        return Lamb(groups, lr=recipe.lr, betas=(recipe.momentum, recipe.beta2), epsilon=recipe.epsilon)
    if recipe.optimizer == "rmsprop":
        return RMSpropTF(groups, lr=recipe.lr, decay=recipe.beta2, momentum=recipe.momentum, epsilon=recipe.epsilon)
    for group in groups:
        group["decoupled_decay"] = group.pop("weight_decay")
    return SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of every group: ``lr`` times its ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def layer_depths(net: nn.Module) -> dict[str, int]:
    """Parameter name -> distance from the output: 0 for the head, counting up towards the input.

    By the network's ``group_matcher`` (timm's convention) where it has one, else by its top-level children.
    """
    names = [name for name, _ in net.named_parameters()]
    matcher = getattr(net, "group_matcher", None)
    if matcher is None:
        children = list(dict.fromkeys(name.split(".")[0] for name in names))
        return {name: len(children) - 1 - children.index(name.split(".")[0]) for name in names}
    patterns: list[tuple[str, tuple[Any, ...] | None]] = []
    for value in matcher(coarse=False).values():
        patterns += (
            [(value, None)]
            if isinstance(value, str)
            else [(entry if isinstance(entry, tuple) else (entry, None)) for entry in value]
        )

    def key(name: str) -> tuple[float, ...]:
        for order, (pattern, fixed) in enumerate(patterns):
            if found := re.match(pattern, name):
                digits = tuple(float(group) for group in found.groups() if group is not None)
                return tuple(float(value) for value in fixed) if fixed else (float(order > 0), *digits)
        return (float("inf"),)

    keys = {name: key(name) for name in names}
    order = sorted(set(keys.values()))
    return {name: len(order) - 1 - order.index(keys[name]) for name in names}


def _groups(net: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    depths = layer_depths(net) if recipe.layer_decay < 1 else {}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, param in net.named_parameters():
        decay = recipe.weight_decay if param.ndim > 1 else 0.0
        scale = recipe.layer_decay ** depths.get(name, 0)
        group = groups.setdefault((decay, scale), {"params": [], "weight_decay": decay, "lr_scale": scale})
        group["params"].append(param)
    return list(groups.values())
