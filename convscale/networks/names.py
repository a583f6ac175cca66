"""A network's spec from a name or a file, without torch."""

from __future__ import annotations

from pathlib import Path

from convscale.arch.spec import NetSpec, load_spec
from convscale.arch.zoo import get_spec


def spec_of(name: str) -> NetSpec:
    """A spec from a file's path or a name."""
    return load_spec(name) if Path(name).suffix in (".json", ".yaml", ".yml") else get_spec(name)
