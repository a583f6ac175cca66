"""Nested values with tensors in them as one safetensors file and one JSON text: a training state without a pickle."""

from __future__ import annotations

from typing import Any

import torch

_TENSOR, _PAIRS, _TUPLE = "__tensor__", "__pairs__", "__tuple__"


def to_plain(value: Any, tensors: dict[str, torch.Tensor], where: str = "") -> Any:
    """``value`` as JSON values, its tensors moved into ``tensors`` under their place's name."""
    if isinstance(value, torch.Tensor):
        tensors[where or "value"] = value.detach().cpu().contiguous()
        return {_TENSOR: where or "value"}
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: to_plain(item, tensors, f"{where}.{key}" if where else key) for key, item in value.items()}
        return {
            _PAIRS: [
                [key, to_plain(item, tensors, f"{where}.{key}" if where else str(key))] for key, item in value.items()
            ]
        }
    if isinstance(value, (list, tuple)):
        items = [to_plain(item, tensors, f"{where}.{index}") for index, item in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{where}: {type(value).__name__} can not be kept in a training state")


def from_plain(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The inverse of ``to_plain``."""
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        if _PAIRS in value:
            return {key: from_plain(item, tensors) for key, item in value[_PAIRS]}
        if _TUPLE in value:
            return tuple(from_plain(item, tensors) for item in value[_TUPLE])
        return {key: from_plain(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [from_plain(item, tensors) for item in value]
    return value
