"""A network from a name or a file, as the command line takes it, without torch."""

from __future__ import annotations

from pathlib import Path

from convscale.arch.spec import NetSpec, load_spec
from convscale.arch.zoo import ARCHITECTURES, get_spec
from convscale.errors import UserError
from convscale.networks.foreign import Foreign
from convscale.networks.released import released
from convscale.networks.resolve import Named, find

SPEC_FILES = (".json", ".yaml", ".yml")
"""How the names of files end that hold a spec."""


def is_spec_file(name: str) -> bool:
    """Whether a name is that of a spec's file."""
    return Path(name).suffix in SPEC_FILES


def network_of(name: str) -> Named:
    """A network from a spec's file, or a name as :func:`convscale.networks.resolve.find` takes it."""
    return load_spec(name) if is_spec_file(name) else find(name)


def spec_or_name(name: str) -> NetSpec | str:
    """A spec from a file, else the name as it is: among candidates it may be a pattern."""
    return load_spec(name) if is_spec_file(name) else name


def spec_of(name: str) -> NetSpec:
    """A spec from a file's path or a name, where only a spec will do: to scale it, or to print it.

    Raises:
        UserError: an unknown name, or a network that other code builds.
    """
    if is_spec_file(name):
        return load_spec(name)
    try:
        return get_spec(name)
    except UserError:
        if isinstance(find(name), Foreign):  # an unknown name is told by this
            raise UserError(
                f"{name} is built by other code and has no spec; this takes an own architecture (`convscale list "
                "--zoo own`) or a spec file"
            ) from None
        raise


def is_spec_of(name: str, spec: NetSpec) -> bool:
    """Whether a spec is what the zoo has under a name, so that what is published under the name holds for it."""
    try:
        return get_spec(name) == spec
    except UserError:
        return False


def spec_beside(net: object) -> dict[str, object] | None:
    """A spec as JSON values, where its name alone does not say what to build: it is not of the zoo, or was edited and
    kept the zoo's name. None for any other network.
    """
    if not isinstance(net, NetSpec) or (net.name in ARCHITECTURES and is_spec_of(net.name, net)):
        return None
    return net.to_dict()


def size_of(network: Named) -> int:
    """The side of the square images that a network was made for, in pixels: a spec's, or what timm's card of it says.

    Raises:
        UserError: a network of the user's own does not say it, or takes other images than square ones.
    """
    if isinstance(network, NetSpec):
        return network.input.size
    if network.origin == "timm" and network.name in released():
        return released()[network.name].image_size
    from convscale.networks.inputs import input_facts

    height, width = input_facts(network).sides()
    if height != width:
        raise UserError(f"{network.name} takes {height}x{width} px; give --img-size, the side of a square")
    return height
