"""Which blocks of memory are alive when, by a trace."""

from __future__ import annotations

from convscale.cost.trace import Trace


def peak_bytes(traced: Trace) -> int:
    """Most bytes alive at once, with every block freed after its last use and weights, input and outputs kept.

    In eager mode a local name can hold a map a little longer, so a real peak lies somewhat above.
    """
    return max(alive_bytes(traced))


def alive_bytes(traced: Trace) -> list[int]:
    """Bytes alive before the first operator, then during each."""
    # 1. The operator after which each block is free: its last use. Weights, the input and the outputs are never free.
    last_use: dict[int, int] = {}
    for position, operator in enumerate(traced.operators):
        for use in (*operator.inputs, *operator.outputs):
            last_use[use.storage] = position
    known = set(traced.weights)
    image = next((use.storage for op in traced.operators for use in op.inputs if use.storage not in known), None)
    known |= set() if image is None else {image}
    freed_after: dict[int, list[int]] = {}
    for number, position in last_use.items():
        if number not in known | traced.results:
            freed_after.setdefault(position, []).append(number)

    # 2. Walk along: a block counts from the first operator that touches it.
    alive = sum(traced.storages[number] for number in known)
    levels = [alive]
    for position, operator in enumerate(traced.operators):
        for use in (*operator.inputs, *operator.outputs):
            if use.storage not in known:
                known.add(use.storage)
                alive += traced.storages[use.storage]
        levels.append(alive)
        alive -= sum(traced.storages[number] for number in freed_after.get(position, ()))
    return levels


def saved_for_backward(traced: Trace) -> int:
    """Bytes of the blocks that the forward pass fills or takes in and the backward pass reads; weights left out, views
    counted once.
    """
    early: set[int] = set()
    read: set[int] = set()
    for operator in traced.operators:
        if operator.phase == "forward":
            early.update(use.storage for use in (*operator.inputs, *operator.outputs))
        elif operator.phase in ("backward", "recompute"):
            read.update(use.storage for use in operator.inputs)
    return sum(traced.storages[number] for number in (early & read) - traced.weights)
