"""What the predictor needs of a traced network: its kernels, and little else. A stored one needs no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from convscale.cache import load, save
from convscale.conditions import Conditions
from convscale.cost.fusion import kernels_of, launched_kernels
from convscale.cost.kernels import Kernel
from convscale.cost.liveness import peak_bytes
from convscale.cost.trace import Trace
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
    )


def load_workload(network: Network, conditions: Conditions) -> Workload:
    """The workload of a network under conditions (their image size must be set or known to the network); a spec's comes
    from the cache if it can.

    Raises:
        UserError: as for ``count``.
    """
    from convscale.cost.subject import pass_key, subject_of
    from convscale.cost.tracing import trace
    from convscale.networks.resolve import build_meta

    net, spec, conditions = subject_of(network, conditions)
    compiled = stand_in(conditions.runtime) == "compiled"
    if spec is None:
        assert net is not None  # a network is one of the two
        return workload_of(trace(net, conditions), compiled=compiled)
    key = pass_key("workload", spec, conditions, compiled=compiled)
    if (kept := load(key)) is not None:
        kernels = tuple((Kernel(*values), count) for values, count in kept["kernels"])
        return Workload(**{**kept, "kernels": kernels})
    work = workload_of(trace(build_meta(spec), conditions), compiled=compiled)
    save(key, {f.name: getattr(work, f.name) for f in dataclasses.fields(work)})
    return work
