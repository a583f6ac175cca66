"""Activations by name, as functions and as modules."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convscale.errors import UserError, nearest

ACTIVATIONS: dict[str, Callable[[float, bool], nn.Module]] = {
    "identity": lambda slope, inplace: nn.Identity(),
    "relu": lambda slope, inplace: nn.ReLU(inplace),
    "relu6": lambda slope, inplace: nn.ReLU6(inplace),
    "leaky_relu": lambda slope, inplace: nn.LeakyReLU(slope, inplace),
    "silu": lambda slope, inplace: nn.SiLU(inplace),
    "hardswish": lambda slope, inplace: nn.Hardswish(inplace),
    "hardsigmoid": lambda slope, inplace: nn.Hardsigmoid(inplace),
    "sigmoid": lambda slope, inplace: nn.Sigmoid(),
    "tanh": lambda slope, inplace: nn.Tanh(),
    "elu": lambda slope, inplace: nn.ELU(inplace=inplace),
    "gelu": lambda slope, inplace: nn.GELU(),
    "mish": lambda slope, inplace: nn.Mish(inplace),
}
"""Name -> module, from the leaky slope and whether to work in place."""

# Backward of these needs their output alone, so that overwriting the input costs no copy.
_FROM_OUTPUT: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu_,
    "leaky_relu": F.leaky_relu_,
    "relu6": lambda x: F.hardtanh_(x, 0.0, 6.0),
}


def is_symbol(x: object) -> bool:
    """Whether ``torch.fx`` draws a graph, in which a tensor has no sizes and asks for nothing yet."""
    return isinstance(x, torch.fx.Proxy)


def activation(name: str, slope: float = 0.01, inplace: bool = True) -> nn.Module:
    """The activation module of this name; `slope` is leaky ReLU's.

    Raises:
        UserError: an unknown name.
    """
    if name not in ACTIVATIONS:
        raise UserError(f"activation {name!r} is unknown{nearest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name](slope, inplace)


def apply_activation(x: Tensor, name: str, slope: float = 0.01, *, inplace: bool) -> Tensor:
    """The activation as a function; `inplace` lets it overwrite x where that is worth it (x must then be the caller's
    own).
    """
    if name == "identity":
        return x
    if is_symbol(x) and name not in _FROM_OUTPUT:  # a module that is in no network can't be called on it
        return ACTIVATIONS[name](slope, False).forward(x)
    if inplace and (name in _FROM_OUTPUT or not torch.is_grad_enabled()):
        if name == "leaky_relu":
            return F.leaky_relu_(x, slope)
        return _FROM_OUTPUT[name](x) if name in _FROM_OUTPUT else ACTIVATIONS[name](slope, True)(x)
    return ACTIVATIONS[name](slope, False)(x)
