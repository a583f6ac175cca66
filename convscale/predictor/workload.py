"""What the predictor needs of a traced network: its kernels, and little else."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from convscale.cache import key_of, load, save
from convscale.conditions import Conditions
from convscale.cost.counting import peak_bytes
from convscale.cost.fusion import kernels_of
from convscale.cost.kernels import Kernel
from convscale.cost.trace import Trace, trace
from convscale.networks.inputs import checked_size
from convscale.networks.resolve import build_meta, resolve

if TYPE_CHECKING:
    from convscale.arch.spec import NetSpec


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


def workload_of(traced: Trace, *, compiled: bool) -> Workload:
    """A trace's kernels and what else a prediction needs of it."""
    products = any(op.name in ("bmm", "baddbmm") or "scaled_dot_product" in op.name for op in traced.operators)
    return Workload(
        kernels=tuple(kernels_of(traced, compiled=compiled)),
        peak_bytes=peak_bytes(traced),
        attention=products,
        unsupported=traced.unsupported,
    )


def load_workload(net_or_spec: nn.Module | NetSpec | str, conditions: Conditions) -> Workload:
    """The workload of a network under conditions (their image size must be set or known to the network); a spec's comes
    from the cache if it can.
    """
    net, spec = resolve(net_or_spec)
    size = checked_size(conditions.image_size, net, spec)
    options: dict[str, Any] = {"mode": conditions.mode, "precision": conditions.precision, "layout": conditions.layout}
    compiled = conditions.runtime != "eager"
    if spec is None:
        assert net is not None
        return workload_of(trace(net, size, conditions.batch_size, **options), compiled=compiled)
    key = key_of("workload", spec, size=size, batch=conditions.batch_size, compiled=compiled, **options)
    if (kept := load(key)) is not None:
        kernels = tuple((Kernel(*values), count) for values, count in kept["kernels"])
        return Workload(**{**kept, "kernels": kernels})
    result = workload_of(trace(build_meta(spec), size, conditions.batch_size, **options), compiled=compiled)
    save(key, {f.name: getattr(result, f.name) for f in dataclasses.fields(result)})
    return result
