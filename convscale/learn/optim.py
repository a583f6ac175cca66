"""Optimisers: decoupled weight decay for all of them, RMSProp in TensorFlow's form, learning rates per layer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from convscale.errors import naming_extras
from convscale.learn.recipe import Recipe
from convscale.learn.settings import native_precisions


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
        loss = _loss_of(closure)
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
        loss = _loss_of(closure)
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


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks") for kernels of convolutions,
    AdamW for all else.

    A kernel's momentum (Nesterov's) is taken as a matrix of output channels by what each of them sees, group by group,
    and replaced by the orthogonal matrix nearest to it, found by five Newton-Schulz iterations. Steps are scaled by
    ``0.2 sqrt(max(rows, columns))``, which gives them the root mean square that AdamW's have (Liu et al. 2025, arXiv
    2502.16982, section 2.2), and weight decay is decoupled.

    Args:
        params: groups; those with ``matrices`` > 0 hold kernels (O, I, h, w) and take Muon's step, ``matrices`` groups
            each, the others AdamW's.
        lr: of all.
        momentum: of Muon.
        betas: of AdamW.
        epsilon: of AdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-2,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "epsilon": epsilon, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "matrices": 0})

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """One step."""
        loss = _loss_of(closure)
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                decay_weights(params, group["lr"] * group["weight_decay"])
                (self._step_kernels if group["matrices"] else self._step_others)(params, group)
        return loss

    def _step_kernels(self, params: list[torch.Tensor], group: dict[str, Any]) -> None:
        for param in params:
            if not self.state[param]:
                self.state[param] = {"momentum": torch.zeros_like(param)}
        grads = [param.grad for param in params if param.grad is not None]
        kept = [self.state[param]["momentum"] for param in params]
        torch._foreach_mul_(kept, group["momentum"])
        torch._foreach_add_(kept, grads)
        ahead = torch._foreach_add(grads, kept, alpha=group["momentum"])
        for param, update in zip(params, ahead, strict=True):
            matrices = update.reshape(group["matrices"], len(update) // group["matrices"], -1)
            scale = 0.2 * math.sqrt(max(matrices.shape[1:]))
            param.sub_(orthogonal(matrices).reshape(update.shape), alpha=group["lr"] * scale)

    def _step_others(self, params: list[torch.Tensor], group: dict[str, Any]) -> None:
        for param in params:
            if not self.state[param]:
                empty = {name: torch.zeros_like(param) for name in ("mean", "mean_square")}
                self.state[param] = {"step": torch.zeros(()), **empty}
        beta1, beta2 = group["betas"]
        grads = [param.grad for param in params if param.grad is not None]
        means = [self.state[param]["mean"] for param in params]
        squares = [self.state[param]["mean_square"] for param in params]
        for param in params:
            self.state[param]["step"] += 1
        count = self.state[params[0]]["step"].item()
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, math.sqrt(1 - beta2**count))
        torch._foreach_add_(roots, group["epsilon"])
        torch._foreach_addcdiv_(params, means, roots, -group["lr"] / (1 - beta1**count))


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic that Muon's author tuned: singular values come to lie in about [0.7, 1.2] in five
iterations."""


def orthogonal(matrices: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Of each matrix U S V^T about U V^T: (B, M, N) -> (B, M, N), float32.

    Each iteration is ``X <- a X + (b A + c A A) X`` with ``A = X X^T``, of the matrix with at most as many rows as
    columns, divided by its Frobenius norm. In bfloat16 where the device multiplies that natively: what the iterations
    do not reach is far more than what its rounding loses.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-30)
    x = x.to(torch.bfloat16 if "bf16" in native_precisions(x.device) else torch.float32)
    a, b, c = NEWTON_SCHULZ
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()


def _loss_of(closure: Callable[[], float] | None) -> float | None:
    """What the closure that a step may be given computes."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


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
    if recipe.optimizer == "muon":
        return Muon(groups, lr=recipe.lr, momentum=recipe.momentum, betas=(0.9, recipe.beta2), epsilon=recipe.epsilon)
    if recipe.optimizer == "schedule-free":
        return _schedule_free(groups, recipe)
    if recipe.optimizer == "rmsprop":
        return RMSpropTF(groups, lr=recipe.lr, decay=recipe.beta2, momentum=recipe.momentum, epsilon=recipe.epsilon)
    for group in groups:
        group["decoupled_decay"] = group.pop("weight_decay")
    return SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)


def _schedule_free(groups: list[dict[str, Any]], recipe: Recipe) -> torch.optim.Optimizer:
    """Schedule-free AdamW of the authors' library (Defazio et al. 2024, arXiv 2405.15682), where it trains."""
    with naming_extras("optimizer schedule-free"):
        from schedulefree import AdamWScheduleFree  # pyright: ignore[reportMissingImports]
    betas = (recipe.momentum, recipe.beta2)
    made = AdamWScheduleFree(groups, lr=recipe.lr, betas=betas, eps=recipe.epsilon)
    made.train()
    return made


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
    matrices = _kernels(net) if recipe.optimizer == "muon" else {}
    groups: dict[tuple[float, float, int], dict[str, Any]] = {}
    for name, param in net.named_parameters():
        decay = recipe.weight_decay if param.ndim > 1 else 0.0
        scale = recipe.layer_decay ** depths.get(name, 0)
        count = matrices.get(name, 0)
        if recipe.optimizer == "muon" and not count:
            scale *= recipe.others_lr
        group = groups.setdefault((decay, scale, count), {"params": [], "weight_decay": decay, "lr_scale": scale})
        if count:
            group["matrices"] = count
        group["params"].append(param)
    return list(groups.values())


def _kernels(net: nn.Module) -> dict[str, int]:
    """Convolutions' kernels by name, with their groups; depthwise ones, whose matrices have one row, are left out."""
    return {
        f"{name}.weight" if name else "weight": module.groups
        for name, module in net.named_modules()
        if isinstance(module, nn.Conv2d) and module.out_channels > module.groups
    }


def follow_layout(optimizer: torch.optim.Optimizer) -> None:
    """Put moments into their parameter's memory layout: a state is kept contiguous, and fused steps walk memory without
    looking at strides.
    """
    for param, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == param.shape and value.stride() != param.stride():
                state[key] = torch.empty_like(param, dtype=value.dtype).copy_(value)
