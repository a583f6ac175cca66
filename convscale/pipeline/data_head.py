"""Networks with the data's classes: released weights come with a head of their own, what is trained and shipped has the
data's, and it is that which a limit on parameters is for.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from convscale.arch.spec import NetSpec
from convscale.choice.decide import Option, judge
from convscale.choice.facts import SizedSpec
from convscale.conditions import Constraint
from convscale.cost.counting import count
from convscale.errors import UserError
from convscale.images.splits import DataSplits
from convscale.networks.foreign import Foreign, build_foreign
from convscale.networks.resolve import Named, shapes_of
from convscale.nn.net import create_model
from convscale.pipeline.contender import build

LARGEST_HEAD_M = 8.2
"""Millions of parameters that a head of 1000 classes has at most: those of 8,192 features, ResNetV2-152x4's."""
_RELEASED_CLASSES, _RELEASED_CHANNELS = 1000, 3


def params_on(splits: DataSplits, spec: Named) -> int:
    """Parameters of a network with the data's classes and channels, as it is trained.

    Raises:
        UserError: it can not be built.
    """
    if isinstance(spec, Foreign) and spec.origin != "timm":
        return _parameters(build(spec, splits))
    return _params(spec, len(splits.classes), splits.channels)


@lru_cache(maxsize=1024)
def _params(spec: Named, classes: int, channels: int) -> int:
    if isinstance(spec, Foreign):
        return _parameters(build_foreign(spec, meta=True, num_classes=classes, in_chans=channels))
    with torch.device("meta"):
        return _parameters(create_model(spec, num_classes=classes, in_chans=channels))


@lru_cache(maxsize=1024)
def _as_released(spec: Foreign) -> int:
    return _parameters(shapes_of(spec))


def _parameters(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def check_own(network: SizedSpec) -> None:
    """Build a network of other code, and trace it where it is the user's own: nobody else has tried that.

    Raises:
        UserError: it can not be built, or not be traced at its size.
    """
    spec, image_size = network
    if not isinstance(spec, Foreign):
        return
    if spec.origin == "timm":
        shapes_of(spec)
    else:
        count(spec, image_size=image_size)


def counted_on(o: Option, splits: DataSplits) -> Option:
    """An option with the parameters that it has on the data; as it is where it can not be built."""
    if o.candidate.why_not or o.facts.failed:
        return o
    spec = o.spec
    try:
        params = params_on(splits, spec)
        if not isinstance(spec, NetSpec) and spec.origin == "timm":  # counted fused, and at its size
            params = o.facts.params + params - _as_released(spec)
    except UserError:
        return o
    return replace(o, facts=replace(o.facts, params=params))


def judged_on_data(o: Option, splits: DataSplits, most_m: float | None) -> Option:
    """An option as it is judged by a limit on parameters: counted on the data where its own head may decide.

    Args:
        o: counted as it was released.
        splits: the data.
        most_m: millions of parameters; None: no limit.
    """
    if most_m is None or o.params_m - LARGEST_HEAD_M > most_m:
        return o
    smaller = len(splits.classes) <= _RELEASED_CLASSES and splits.channels <= _RELEASED_CHANNELS
    return o if smaller and o.params_m <= most_m else counted_on(o, splits)


def as_on_data(o: Option, splits: DataSplits, constraint: Constraint) -> Option:
    """An option as it is written down: counted on the data, and where it is too large its reason with that count."""
    made = counted_on(o, splits)
    if not o.reason.startswith("too large"):
        return made
    verdict, reason = judge(made, constraint)
    return replace(made, verdict=verdict, reason=reason)
