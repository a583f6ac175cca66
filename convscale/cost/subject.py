"""What is to be traced, and at which size: settled once, before a trace is made or read from the cache."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from convscale.arch.spec import NetSpec
from convscale.cache import key_of
from convscale.conditions import Conditions, as_size
from convscale.errors import UserError
from convscale.networks.foreign import Foreign
from convscale.networks.inputs import checked_size
from convscale.networks.resolve import find, resolve, shapes_of

if TYPE_CHECKING:
    from torch import nn

Network: TypeAlias = "nn.Module | NetSpec | Foreign | str"
"""A module, a spec, a network that other code builds, or a name of any of them."""
PRECISIONS = ("fp32", "amp", "amp_bf16", "bf16", "fp16")
"""What a trace can be of; ``bf16`` is another name of ``amp_bf16``. Not ``int8``: which layers hold 8 bits is settled
layer by layer when a network is exported, and which maps between them do is the runtime's affair."""


def subject_of(network: Network, conditions: Conditions) -> tuple[nn.Module | None, NetSpec | None, Conditions]:
    """(module, None) or (None, spec), and the conditions with the image size.

    A network of timm's by its name is taken in its re-parameterised form for inference: so it is shipped. A module is
    taken as it is.

    Raises:
        UserError: not a network, an unknown name, a size that is not known, or a precision that is not counted.
    """
    if isinstance(network, str):
        network = find(network)
    if isinstance(network, Foreign):
        net, spec = shapes_of(network, fused=conditions.mode == "infer"), None
    else:
        net, spec = resolve(network)
        if net is not None and hasattr(net, "detector_spec"):
            from convscale.nn.modes import as_graph

            net = as_graph(net)
    if conditions.precision not in PRECISIONS:
        raise UserError(
            f"precision {conditions.precision!r} is not counted: which layers hold 8 bits is settled when a network is "
            f"exported; count it in {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}"
        )
    return net, spec, replace(conditions, image_size=as_size(*checked_size(conditions.image_size, net, spec)))


def pass_key(kind: str, spec: NetSpec | Foreign, conditions: Conditions, *, compiled: bool = False) -> str:
    """The key under which the cache keeps what a pass over a network gives.

    Args:
        kind: what is kept.
        spec: the network, as a value.
        conditions: their image size, batch, mode, precision and layout decide a pass; device, runtime and threads do
            not.
        compiled: whether kernels are those behind a compiler.

    Whether our own kernels are switched on (``CONVSCALE_KERNELS``) is a part of it.
    """
    from convscale.nn.kernels.wanted import switched_on

    return key_of(
        kind,
        spec,
        size=conditions.image_size,
        batch=conditions.batch_size,
        mode=conditions.mode,
        precision=conditions.precision,
        layout=conditions.layout,
        compiled=compiled,
        kernels=switched_on() is True,
    )
