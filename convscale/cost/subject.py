"""What is to be traced, and at which size: settled once, before a trace is made or read from the cache."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from convscale.arch.spec import NetSpec
from convscale.cache import key_of
from convscale.conditions import Conditions, as_size
from convscale.errors import UserError
from convscale.networks.inputs import checked_size
from convscale.networks.resolve import resolve

if TYPE_CHECKING:
    from torch import nn

Network: TypeAlias = "nn.Module | NetSpec | str"
"""A module, a spec or a model's name."""
PRECISIONS = ("fp32", "amp", "bf16", "fp16")
"""What a trace can be of. Not ``int8``: which layers hold 8 bits is settled layer by layer when a network is exported,
and which maps between them do is the runtime's affair."""


def subject_of(network: Network, conditions: Conditions) -> tuple[nn.Module | None, NetSpec | None, Conditions]:
    """(module, None) or (None, spec), and the conditions with the image size.

    Raises:
        UserError: not a network, an unknown name, a size that is not known, or a precision that is not counted.
    """
    net, spec = resolve(network)
    if conditions.precision not in PRECISIONS:
        raise UserError(
            f"precision {conditions.precision!r} is not counted: which layers hold 8 bits is settled when a network is "
            f"exported; count it in {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}"
        )
    return net, spec, replace(conditions, image_size=as_size(*checked_size(conditions.image_size, net, spec)))


def pass_key(kind: str, spec: NetSpec, conditions: Conditions, *, compiled: bool = False) -> str:
    """The key under which the cache keeps what a pass over a network gives.

    Args:
        kind: what is kept.
        spec: the network.
        conditions: their image size, batch, mode, precision and layout decide a pass; device, runtime and threads do
            not.
        compiled: whether kernels are those behind a compiler.
    """
    return key_of(
        kind,
        spec,
        size=conditions.image_size,
        batch=conditions.batch_size,
        mode=conditions.mode,
        precision=conditions.precision,
        layout=conditions.layout,
        compiled=compiled,
    )
