"""What the predictor needs of a traced network: its kernels, and little else. A stored one needs no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING

from convscale.cache import load, save
from convscale.conditions import Conditions
from convscale.cost.fusion import kernels_of, launched_kernels
from convscale.cost.kernels import Kernel
from convscale.cost.liveness import peak_bytes
from convscale.cost.trace import Trace
from convscale.networks.foreign import Foreign
from convscale.predictor.fitted import stand_in

if TYPE_CHECKING:
    from convscale.cost.subject import Network


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What the predictor needs of a traced network; small enough to keep many on disk."""

    kernels: tuple[tuple[Kernel, int], ...]
    """Kernels and how often each runs."""
    peak_bytes: int
    """Most bytes alive at once."""
    attention: bool
    """Whether it multiplies maps with each other."""
    unsupported: dict[str, int] = field(default_factory=dict)
    """Operators of unknown kind."""
    params: int = 0
    """Parameters, shared ones once."""

    @property
    def launches(self) -> int:
        """Kernels a call launches."""
        return sum(count for _, count in self.kernels)


def workload_of(traced: Trace, *, compiled: bool, by_layer: bool = False) -> Workload:
    """A trace's kernels and what else a prediction needs of it.

    Args:
        traced: the network's operators.
        compiled: behind PyTorch's compiler; else eager.
        by_layer: every kernel with the module it belongs to, in order; else equal ones fall together.
    """
    products = any(op.name in ("bmm", "baddbmm") or "scaled_dot_product" in op.name for op in traced.operators)
    if by_layer:
        kernels = [(kernel, 1) for kernel in launched_kernels(traced, compiled=compiled)]
    else:
        kernels = kernels_of(traced, compiled=compiled)
    return Workload(
        kernels=tuple(kernels),
        peak_bytes=peak_bytes(traced),
        attention=products,
        unsupported=traced.unsupported,
        params=traced.params,
    )


def load_workload(network: Network, conditions: Conditions) -> Workload:
    """The workload of a network under conditions (their image size must be set or known to the network); a spec's and
    timm's by its name come from the cache if they can.

    Raises:
        UserError: as for ``count``.
    """
    from convscale.cost.subject import pass_key, subject_of
    from convscale.cost.tracing import trace
    from convscale.networks.resolve import build_meta, find

    compiled = stand_in(conditions.runtime) == "compiled"
    named = find(network) if isinstance(network, str) else network
    key = None
    if isinstance(named, Foreign) and named.origin == "timm" and conditions.image_size is not None:
        key = pass_key(f"workload of timm {version('timm')}", named, conditions, compiled=compiled)
        if (kept := _kept(key)) is not None:
            return kept
    net, spec, conditions = subject_of(named, conditions)
    if spec is not None:
        key = pass_key("workload", spec, conditions, compiled=compiled)
        if (kept := _kept(key)) is not None:
            return kept
        net = build_meta(spec)
    assert net is not None  # a network is one of the two
    work = workload_of(trace(net, conditions), compiled=compiled)
    if key is not None:
        save(key, {f.name: getattr(work, f.name) for f in dataclasses.fields(work)})
    return work


def _kept(key: str) -> Workload | None:
    """From the cache."""
    if (kept := load(key)) is None:
        return None
    kernels = tuple((Kernel(*values), count) for values, count in kept["kernels"])
    return Workload(**{**kept, "kernels": kernels})
