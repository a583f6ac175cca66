"""Where a network's weights stand among the keys of a source: under which layout, and behind which prefix."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from convscale.errors import UserError
from convscale.nn import keymaps
from convscale.words import safe

_INSIDE = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
"""What torch's wrappers of single layers put into keys."""
_DEPTH = 12
"""Names in front of a network's own keys, at most."""
_AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged)([._]|$)")
COUNTERS = ("n_averaged", "total_ops", "total_params")
"""Tensors beside weights that count something: how often was averaged, and thop's costs of each layer."""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """The part of a source that belongs to a network."""

    layout: str
    """Of the keys."""
    prefix: str
    """What stood before them."""
    tensors: dict[str, Tensor]
    """By key, without the prefix."""
    outside: tuple[str, ...]
    """Keys that lack the prefix."""


def their_keys(own: Mapping[str, Tensor], table: keymaps.Table | None) -> dict[str, int]:
    """The keys that a layout gives to a network's tensors, each with its number of elements; None: the network's own.
    What counts batches is left out.
    """
    keys = {}
    for key, value in own.items():
        if key.endswith("num_batches_tracked"):
            continue
        theirs = key
        if table is not None:
            module, leaf = split_key(key, table)
            if module not in table:
                continue
            theirs = f"{table[module]}.{leaf}" if leaf else table[module]
        keys[theirs] = value.numel()
    return keys


def split_key(key: str, table: Mapping[str, str]) -> tuple[str, str]:
    """A key as module in the table and leaf; a split convolution's leaf has its number in front; a tensor that stands
    in the table itself has none.
    """
    if key in table:
        return key, ""
    module, _, leaf = key.rpartition(".")
    if module not in table:
        module, _, number = module.rpartition(".")
        leaf = f"{number}.{leaf}"
    return module, leaf


def place(source: Mapping[str, Tensor], expected: Mapping[str, Mapping[str, int]], name: str) -> Placed:
    """Find the layout and the prefix under which most of a network's tensors are there.

    Args:
        source: tensors by key.
        expected: by layout, the keys that the network's tensors have there and their numbers of elements.
        name: of the network, for messages.

    Raises:
        UserError: no key is of any layout; or several prefixes have the whole network, with other values, and none of
            them says that it is an average.
    """
    scores: dict[tuple[str, str], list[int]] = {}
    for layout, keys in expected.items():
        for key, value in source.items():
            for at in _starts(key):
                if (count := keys.get(key[at:])) is not None:
                    score = scores.setdefault((layout, key[:at]), [0, 0])
                    score[0] += count == value.numel()
                    score[1] += 1
    if not scores:
        some = ", ".join(safe(key[:80]) for key in list(source)[:3])
        raise UserError(f"the weights' keys ({some} ...) are of no layout known for {name} ({', '.join(expected)})")
    best = max(scores, key=lambda each: scores[each])
    layout, prefix = best
    if 2 * scores[best][1] > len(expected[layout]):
        same = {each: other for other, each in reversed(scores) if scores[other, each] == scores[best]}
        prefix = _one_of(source, list(same), name)
        layout = same[prefix]
    elif (layout, "") in scores:
        prefix = ""
    inside = {key.removeprefix(prefix): value for key, value in source.items() if key.startswith(prefix)}
    outside = tuple(key for key in source if not key.startswith(prefix) and key.rpartition(".")[2] != COUNTERS[0])
    return Placed(layout=layout, prefix=prefix, tensors=inside, outside=outside)


def _starts(key: str) -> Iterator[int]:
    """Where a network's own key may begin."""
    at = 0
    for _ in range(_DEPTH):
        yield at
        at = key.find(".", at) + 1
        if at == 0:
            return


def _one_of(source: Mapping[str, Tensor], prefixes: list[str], name: str) -> str:
    """The prefix to take where several hold the whole network."""
    averaged = [prefix for prefix in prefixes if _AVERAGED.search(prefix)]
    if len(prefixes) == 1 or len(averaged) == 1:
        return averaged[0] if averaged else prefixes[0]
    first, *others = sorted(prefixes, key=len)
    if all(_equal(source, first, other) for other in others):
        return first
    shown = ", ".join(repr(safe(prefix[:80])) for prefix in sorted(prefixes))
    raise UserError(f"the weights hold {name} several times, under {shown}; give a state dict with one of them")


def _equal(source: Mapping[str, Tensor], one: str, other: str) -> bool:
    for key, value in source.items():
        if key.startswith(one):
            twin = source.get(other + key.removeprefix(one))
            if twin is not None and not torch.equal(value, twin):
                return False
    return True


def without_wrappers(source: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what wrappers of single layers put into keys, unless the network has it too or two keys would be one."""
    words = [word for word in _INSIDE if not any(word in key for key in own)]
    renamed = {}
    for key, value in source.items():
        for word in words:
            key = key.replace(word, "")
        renamed[key] = value
    return renamed if len(renamed) == len(source) else source


def is_foreign(key: str, parts: set[str]) -> bool:
    """Whether a key that a network has no place for is of something else: a loss, a second head, a counter. One that
    begins as parts of the network do is a sign of another architecture.
    """
    return key.rpartition(".")[2] in COUNTERS or part_of(key) not in parts


def part_of(key: str) -> str:
    """What a key begins with, without its number: ``layer`` of ``layer3.0.conv1.weight``."""
    return re.sub(r"\d+", "", key.partition(".")[0])
