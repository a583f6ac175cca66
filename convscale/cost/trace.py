"""A trace as a value: every operator of one call of a network. :mod:`convscale.cost.tracing` makes it; nothing here
needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from convscale.conditions import Conditions, sides


class Use(NamedTuple):
    """One tensor as an operator reads or writes it."""

    storage: int
    """Number of the memory block it lies in; views share it."""
    shape: tuple[int, ...]
    """Its shape."""
    itemsize: int
    """Bytes of an element."""
    nbytes: int
    """Bytes touched; an expanded dimension counts once."""
    channels_last: bool
    """Whether PyTorch takes its strides for channels-last (always False unless it has four dimensions)."""


class Operator(NamedTuple):
    """One operator as it reaches the device."""

    name: str
    """ATen name without overload, in-place underscore and ``_backward``."""
    kind: str
    """conv, linear, norm, softmax, reduce, pool, copy, cast, random, pointwise, update, or unknown."""
    scope: str
    """Dotted path of the module that called it, empty for the network itself."""
    phase: str
    """``forward``, ``backward``, ``recompute`` (a forward map that checkpointing makes again for the backward pass) or
    ``update`` (the optimiser)."""
    inputs: tuple[Use, ...]
    """Tensors read."""
    outputs: tuple[Use, ...]
    """Tensors written."""
    macs: int
    """Multiply-accumulates."""
    groups: int = 1
    """Groups of a convolution."""
    kernel: tuple[int, ...] = ()
    """Kernel of a convolution or a pool's window where given."""
    stride: tuple[int, ...] = ()
    """Stride of a convolution."""
    bias: bool = False
    """Whether a convolution adds a bias, which CUDA does in a kernel of its own."""
    product: str = ""
    """For a backward convolution or product, what it makes: ``input`` or ``weight`` gradient."""
    dilated: bool = False
    """Whether a convolution's kernel is dilated."""

    @property
    def read_bytes(self) -> int:
        """Bytes read."""
        return sum(use.nbytes for use in self.inputs)

    @property
    def written_bytes(self) -> int:
        """Bytes written."""
        return sum(use.nbytes for use in self.outputs)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """All operators of one call of a network, with the conditions they hold for."""

    operators: tuple[Operator, ...]
    """In the order of dispatch; views and allocations are left out."""
    views: int
    """How many views and allocations were left out: they cost the host time only."""
    storages: tuple[int, ...]
    """Bytes of each memory block, by its number."""
    weights: frozenset[int]
    """Numbers of the blocks that hold parameters, buffers and the optimiser's state."""
    results: frozenset[int]
    """Numbers of the blocks that the network's outputs lie in."""
    params: int
    """Parameters, shared ones once."""
    param_tensors: int
    """Parameter tensors, shared ones once."""
    unsupported: dict[str, int]
    """Operators of unknown kind and how often they came; their bytes are counted, their MACs are not."""
    conditions: Conditions
    """Mode, precision, layout, batch and image size that it holds for; device, runtime and threads do not matter."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the input in pixels."""
        assert self.conditions.image_size is not None  # a trace is of one size
        return sides(self.conditions.image_size)

    @property
    def batch_size(self) -> int:
        """Images a call."""
        return self.conditions.batch_size
