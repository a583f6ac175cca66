"""The head that a recipe puts on networks: they are timed with the one that they are trained and shipped with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from convscale.arch.spec import NetSpec
from convscale.choice.candidates import Candidate
from convscale.errors import UserError
from convscale.networks.resolve import Named

OWN = "own"
"""As the network's own spec says."""


def with_head(spec: NetSpec, head: str) -> NetSpec:
    """A spec with a head: ``own``, ``gap`` or ``ml_decoder``; its name stays."""
    return spec if head == OWN else replace(spec, head=replace(spec.head, kind=head))  # pyright: ignore[reportArgumentType]


def named_with_head(network: Named, head: str) -> Named:
    """A network that was named, with a head.

    Raises:
        UserError: it is other code's, whose head is its own.
    """
    if head != OWN and not isinstance(network, NetSpec):
        raise _others(network.name, head)
    return with_head(cast(NetSpec, network), head) if head != OWN else network


def candidates_with_head(found: Sequence[Candidate], head: str) -> list[Candidate]:
    """Candidates with a head; of other code's networks there are none then.

    Raises:
        UserError: there are no others.
    """
    if head == OWN:
        return list(found)
    kept = [replace(each, spec=with_head(each.spec, head)) for each in found if isinstance(each.spec, NetSpec)]
    if found and not kept:
        raise _others(found[0].name, head)
    return kept


def _others(name: str, head: str) -> UserError:
    return UserError(
        f"head={head} as a recipe key is for networks that are built here from a spec; {name} is other code's"
    )
