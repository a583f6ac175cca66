"""CUDA's autocast where there is no CUDA: which operators a trace sees in which precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from convscale.cost.operators import autocast_policy
from convscale.nn.norm_ops import EMULATED

_FAST_NORMS = frozenset({"layer_norm", "group_norm", "rms_norm"})


class Autocast(TorchFunctionMode):
    """What ``torch.autocast("cuda")`` would cast, which does not stand without CUDA: above autograd, where the real one
    stands too.

    Args:
        low: the type of convolutions and products.
        weights: ids of the tensors whose copies are kept for the call, as autocast's cache keeps them.
        fast_norm: whether layer, group and RMS norm stay in ``low``.
    """

    def __init__(self, low: torch.dtype, weights: set[int], fast_norm: bool) -> None:
        super().__init__()
        self.low = low
        self.weights = weights
        self.fast_norm = fast_norm
        self._copies: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def __enter__(self) -> Autocast:
        self._copies.clear()
        self._before = EMULATED.set(self.low)  # for autograd functions of ours, which ask what autocast would do
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        EMULATED.reset(self._before)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        """``value`` in ``dtype``, lists and tuples item by item; what autocast leaves alone comes back as it is."""
        if isinstance(value, list | tuple):
            return type(value)([self._cast(item, dtype) for item in value])
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        if value.dtype in (dtype, torch.float64):
            return value
        if id(value) not in self.weights:
            return value.to(dtype)
        key = (id(value), dtype)
        if key not in self._copies:
            self._copies[key] = value.to(dtype)
        return self._copies[key]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        policy = "low" if self.fast_norm and name in _FAST_NORMS else autocast_policy(name)
        if policy == "none":
            return func(*args, **kwargs)
        dtype = self.low
        if policy == "full" or (policy == "widest" and any(t.dtype == torch.float32 for t in tensors_in(args))):
            dtype = torch.float32
        return func(*self._cast(args, dtype), **{key: self._cast(value, dtype) for key, value in kwargs.items()})


def tensors_in(values: Iterable[object]) -> Iterator[torch.Tensor]:
    """All tensors of nested lists, tuples, dicts and dataclasses, in order."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)
        elif isinstance(value, dict):
            yield from tensors_in(value.values())
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from tensors_in([getattr(value, field.name, None) for field in dataclasses.fields(value)])
