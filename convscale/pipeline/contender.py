"""A network that ``fit`` may train, with where its first weights come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from convscale.arch.spec import NetSpec
from convscale.choice.facts import SizedSpec
from convscale.images.splits import DataSplits
from convscale.networks.foreign import TIMM_PREFIXES, Foreign, build_foreign
from convscale.networks.resolve import Named, find
from convscale.nn.net import create_model
from convscale.show.fit_parts import Candidate as Row

PRETRAINED = "pretrained"
"""Weights that the hub is asked for."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A network at an image size, and what it starts from."""

    name: str
    """As in the record: ``arch.tag``, or a spec's name."""
    spec: Named
    """What is built."""
    image_size: int
    """Side in pixels."""
    family: str
    """Candidates of one family are compared by size where nothing else is known."""
    weights: Path | str | None = None
    """A file, ``pretrained`` for the hub's, or None: trained from scratch."""
    published: float | None = None
    """Top-1 on ImageNet-1k, in percent."""
    licence: str = ""
    """Of the weights."""

    @property
    def network(self) -> Named | str:
        """What ``train`` takes: released weights go by their name, so that their preprocessing is used; timm's by one
        that means no own network. What nobody released is what was given, a file of weights of its or not.
        """
        released = self.weights == PRETRAINED or (self.weights is not None and self.licence)
        return name_to_find(self.name, self.spec) if released else self.spec

    @classmethod
    def of(cls, row: Row, named: Mapping[str, Named]) -> Contender:
        """From what a record says of it, or as it was ``named``: a record holds no modules, and one of version 0.1 no
        specs.
        """
        place = row.weights if row.weights in (None, PRETRAINED) else Path(str(row.weights))
        if row.spec is not None:
            spec: Named = NetSpec.from_dict(dict(row.spec))
        elif row.origin == "timm":
            spec = Foreign(row.name, "timm", family=row.family or "")
        else:
            spec = named.get(row.name) or find(row.name)
        assert row.image_size is not None
        return cls(
            name=row.name,
            spec=spec,
            image_size=row.image_size,
            family=row.family or spec.family,
            weights=place,
            published=row.published_top1,
            licence=row.licence or "",
        )

    @property
    def init(self) -> str | None:
        """What ``train`` starts from."""
        return None if self.weights is None else str(self.weights)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What keeps the constraint."""

    contenders: tuple[Contender, ...]
    """The most promising first; where nothing keeps it, the fastest alone."""
    missed: str = ""
    """Where nothing keeps it: by how much the fastest misses."""


def at_own_size(spec: NetSpec) -> SizedSpec:
    """A member at the size that it was scaled to."""
    return SizedSpec(spec, spec.input.size)


def name_to_find(name: str, spec: Named) -> str:
    """What ``find`` takes for a network of a name: timm's where it is that one's, whoever else has one so called."""
    return f"{TIMM_PREFIXES[0]}{name}" if isinstance(spec, Foreign) and spec.origin == "timm" else name


def build(spec: Named, splits: DataSplits) -> nn.Module:
    """An untrained network for the data's classes and channels; torch's global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        if isinstance(spec, Foreign):
            return build_foreign(spec, num_classes=len(splits.classes), in_chans=splits.channels)
        return create_model(spec, num_classes=len(splits.classes), in_chans=splits.channels)
