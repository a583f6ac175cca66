"""What tests of traces share."""

from __future__ import annotations

from torch import nn

from convscale.conditions import Conditions, Size
from convscale.cost import tracing
from convscale.cost.trace import Trace


def trace(
    net: nn.Module, image_size: Size, batch_size: int = 1, *, channels: int | None = None, **conditions: str
) -> Trace:
    """A trace by loose conditions: a test says the one or two that it is about."""
    stated = Conditions(image_size=image_size, batch_size=batch_size, **conditions)  # type: ignore[arg-type]
    return tracing.trace(net, stated, channels=channels)
