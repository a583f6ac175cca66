"""A network that other code builds: timm's, by its name; a factory or module of the user's own.

Importing this loads neither torch nor timm: they are loaded when a network is built.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from convscale.errors import UserError, first_line

if TYPE_CHECKING:
    from torch import nn

TIMM_PREFIXES = ("timm/", "hf-hub:timm/", "hf_hub:timm/")
"""What may stand before a name that means timm's own network, whoever else has one of that name."""


@dataclass(frozen=True)
class Foreign:
    """A network whose code is not ours, as a value."""

    name: str
    """``convnext_tiny.in12k_ft_in1k`` of timm's, ``mypackage.nets:make`` of a factory's, else a module's own name."""
    origin: Literal["timm", "factory", "module"]
    """Who builds it: timm; a function or class found by its name; nobody any more, it is there."""
    module: nn.Module | None = None
    """Of the origin ``module``: the network itself."""
    family: str = field(default="", compare=False)
    """What relatives of timm's share: the module of timm's that they stand in; empty where that is not known."""

    @property
    def arch(self) -> str:
        """The name without a tag of weights."""
        return self.name.partition(".")[0] if self.origin == "timm" else self.name

    @property
    def travels(self) -> bool:
        """Whether another process can build it from its name."""
        return self.origin != "module"

    def __repr__(self) -> str:
        return f"Foreign({self.name!r}, {self.origin!r})"


def timm_is_installed() -> bool:
    """Whether timm can be imported here."""
    return find_spec("timm") is not None


def need_timm(name: str) -> None:
    """
    Raises:
        UserError: timm, which is an extra, is not installed.
    """
    if not timm_is_installed():
        raise UserError(f"{name} is timm's network, and timm is not installed; pip install 'convscale[timm]'")


def timm_name(text: str) -> str | None:
    """The name after one of ``TIMM_PREFIXES``, or None where there is none of them."""
    prefix = next((prefix for prefix in TIMM_PREFIXES if text.startswith(prefix)), None)
    return None if prefix is None else text.removeprefix(prefix)


def timm_has(name: str) -> bool:
    """Whether the installed timm can build ``arch`` or ``arch.tag``. Imports timm, and so torch."""
    if not timm_is_installed():
        return False
    import timm

    arch, _, tag = name.partition(".")
    return timm.is_model(arch) and (not tag or name in timm.list_pretrained(f"{arch}.*"))


def build_foreign(
    net: Foreign,
    *,
    meta: bool = False,
    pretrained: bool = False,
    fused: bool = False,
    **options: object,
) -> nn.Module:
    """Build it, untrained unless its weights are asked for.

    Args:
        net: what to build.
        meta: on the meta device, shapes without values: for timm's; a user's own factory is called as it is.
        pretrained: with timm's released weights, by timm's own loader.
        fused: in the re-parameterised form for inference, where it is timm's and has one.
        options: ``num_classes``, ``in_chans`` and the like; a factory gets those that its signature names, and
            ``num_classes`` where it takes any (``**kwargs``).

    Raises:
        UserError: timm is not installed or refuses; a factory can not be found, fails, or gives no module.
    """
    if net.origin == "module":
        assert net.module is not None
        return net.module
    if net.origin == "factory":
        return _call_factory(net.name, options, as_it_is=meta)
    need_timm(net.name)
    module = _create(net.name, meta, pretrained, options)
    return reparameterized(module) if fused else module


def _create(name: str, meta: bool, pretrained: bool, options: dict[str, object]) -> nn.Module:
    """timm's network."""
    import timm
    import torch

    given = {key: value for key, value in options.items() if value is not None}
    with torch.device("meta") if meta else nullcontext(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old names and the like: nothing that a user of the network can act on
        try:
            return timm.create_model(name, pretrained=pretrained, **given)  # pyright: ignore[reportArgumentType]
        except Exception as error:  # whatever a network's code, or a download, raises
            what = "weights of timm's" if pretrained else "timm's"
            raise UserError(f"{what} {name} can not be had: {first_line(error)}") from error


def is_reparameterizable(net: nn.Module) -> bool:
    """Whether a network has parts that timm merges for inference: branches that become one convolution."""
    return any(
        callable(getattr(module, name, None))
        for module in net.modules()
        for name in ("reparameterize", "fuse", "switch_to_deploy")
    )


def reparameterized(net: nn.Module) -> nn.Module:
    """The network with its branches merged, a copy; the network itself where it is not timm's or has none to merge.

    A network on the meta device stays there: shapes are all that is asked of it.
    """
    import torch

    if not type(net).__module__.startswith("timm.") or not is_reparameterizable(net):
        return net
    from timm.utils.model import reparameterize_model

    parameter = next(net.parameters(), None)
    place = torch.device("meta") if parameter is not None and parameter.is_meta else nullcontext()
    training = net.training
    with place, torch.no_grad():
        merged = reparameterize_model(net)
    return merged.train(training)


def _call_factory(name: str, options: dict[str, object], *, as_it_is: bool) -> nn.Module:
    """What ``package.module:function`` gives; it may name a module that is there already, too: a copy of that is given,
    since whoever builds a network may train it, and the next one builds it anew. ``as_it_is``: the module itself, where
    its shapes are all that is asked.
    """
    from torch import nn

    place, _, attribute = name.partition(":")
    if not place or not all(part.isidentifier() for part in (*place.split("."), *attribute.split("."))):
        raise UserError(f"{name!r} names no network of your own; it must be package.module:function")
    with _here_first():
        try:
            found: object = importlib.import_module(place)
        except Exception as error:  # whatever the user's code raises
            raise UserError(f"{name}: {place} can not be imported: {first_line(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UserError(f"{name}: {place} has no {attribute}")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        try:
            return found if as_it_is else copy.deepcopy(found)
        except Exception as error:  # whatever a module of the user's holds
            raise UserError(f"{name} can not be copied: {first_line(error)}; name a function that makes it") from error
    if not callable(found):
        raise UserError(f"{name} is a {type(found).__name__}; it must be a module, or a function that gives one")
    found = _called(name, found, options)
    if not isinstance(found, nn.Module):
        raise UserError(f"{name} gives a {type(found).__name__}; it must give a torch.nn.Module")
    return found


def _called(name: str, factory: object, options: dict[str, object]) -> object:
    """The factory's result, with the options that its signature names, and with ``num_classes`` too where it takes any
    and this one with them.
    """
    assert callable(factory)
    try:
        known = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        known = {}
    named = {key: value for key, value in options.items() if key in known and value is not None}
    classes = options.get("num_classes")
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    try:
        if takes_any and classes is not None:
            try:
                return factory(**{**named, "num_classes": classes})
            except TypeError as error:  # what it hands them on to may not know it
                if "'num_classes'" not in str(error):
                    raise
        return factory(**named)
    except Exception as error:  # whatever the user's code raises
        raise UserError(f"{name} can not be built: {first_line(error)}") from error


@contextmanager
def _here_first() -> Iterator[None]:
    """The working folder on Python's path, as it is for ``python -m``."""
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)
