"""Copies of what a run holds: on a GPU they go to the host while it computes on, so that its memory is left to
training.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import nn

cuda = torch.cuda
Value = TypeVar("Value")


class Copy(Generic[Value]):
    """A copy that may still be on its way to the host.

    Args:
        value: the copy.
        arrived: the device's event after it; None: it is there.
    """

    def __init__(self, value: Value, arrived: torch.cuda.Event | None) -> None:
        self._value, self._arrived = value, arrived

    def wait(self) -> Value:
        """The copy, once it is there."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        return self._value


class Waited(Generic[Value]):
    """An attribute that takes a ``Copy`` and is waited for when it is first read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_waited_{name}"

    def __get__(self, holder: object, owner: type | None = None) -> Value | None:
        held = vars(holder).get(self._name)
        if isinstance(held, Copy):
            held = vars(holder)[self._name] = held.wait()
        return held

    def __set__(self, holder: object, value: Copy[Value] | Value | None) -> None:
        vars(holder)[self._name] = value


def copy_into(sources: list[torch.Tensor], targets: list[torch.Tensor]) -> None:
    """Write tensors over others, in one launch."""
    if sources:
        torch._foreach_copy_(targets, sources)


def copied(net: nn.Module) -> Copy[dict[str, torch.Tensor]]:
    """A network's weights and statistics as they are now."""
    state = net.state_dict()
    arrived = _Arrival()
    return Copy({name: arrived.copied(value.detach()) for name, value in state.items()}, arrived.event())


def copied_state(state: Mapping[str, Any]) -> Copy[dict[str, Any]]:
    """A training state (dictionaries and lists of tensors and numbers) as it is now."""
    arrived = _Arrival()
    # a deep copy takes what is in its memo for copied: tensors of a GPU must not be copied there
    on_card = {id(each): each for each in _tensors(state) if _on_card(each)}
    memo: dict[int, Any] = {number: arrived.copied(each) for number, each in on_card.items()}
    return Copy(copy.deepcopy(dict(state), memo), arrived.event())


class _Arrival:
    """Copies tensors, and knows when the last of those that a GPU sends is there."""

    def __init__(self) -> None:
        self._device: torch.device | None = None

    def copied(self, value: torch.Tensor) -> torch.Tensor:
        if not _on_card(value):
            return value.clone()
        self._device = value.device
        # pinned: else the host would wait, and what it enqueues next would too
        return _host_memory(value).copy_(value.detach(), non_blocking=True)

    def event(self) -> torch.cuda.Event | None:
        if self._device is None:
            return None
        # on the stream that trains: its next step changes the weights after they were sent
        arrived = cuda.Event()
        arrived.record(cuda.current_stream(self._device))
        return arrived


def _on_card(value: torch.Tensor) -> bool:
    """Whether a copy beside it would take a GPU's memory."""
    return value.is_cuda


def _host_memory(value: torch.Tensor) -> torch.Tensor:
    """Room for a tensor in memory that a GPU writes to by itself, or in any where the host has none left to pin."""
    try:
        return torch.empty_like(value, device="cpu", pin_memory=True, requires_grad=False)
    except RuntimeError:
        return torch.empty_like(value, device="cpu", requires_grad=False)


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
