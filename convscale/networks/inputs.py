"""What a network takes: one answer for measuring, counting, training and shipping, whoever wrote the network.

Importing this loads no torch, and neither does asking about a spec or a name.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from numbers import Real
from typing import TYPE_CHECKING

from convscale.arch.spec import NetSpec
from convscale.conditions import Size, as_size, sides
from convscale.errors import UserError
from convscale.images.preprocess import Preprocessing
from convscale.networks.foreign import Foreign
from convscale.networks.resolve import Network, find, resolve

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class InputFacts:
    """What images a network takes, as far as it says so."""

    name: str
    """The network's, or its class's, for messages."""
    channels: int
    """Of an image."""
    size: Size | None
    """What it was made for, in pixels; None: it does not say."""
    mean: tuple[float, ...] | None = None
    """Per channel, subtracted from pixels in [0, 1]; None: it does not say."""
    std: tuple[float, ...] | None = None
    """Per channel, divided by after the mean; None: it does not say."""
    interpolation: str = "bilinear"
    """How its images were resized."""
    crop_pct: float = 0.875
    """The crop's sides as a share of the resized image's."""

    def sides(self, image_size: Size | None = None) -> tuple[int, int]:
        """Height and width in pixels: those of ``image_size``, or the network's own for None.

        Raises:
            UserError: neither is known, or no whole numbers of at least 1.
        """
        if image_size is not None:
            return sides(image_size)
        if self.size is None:
            raise UserError(f"{self.name} does not say its image size; give image_size in pixels")
        return sides(self.size)

    def shape(self, image_size: Size | None = None) -> tuple[int, int, int]:
        """Channels, height and width of one input; ``image_size`` as for ``sides``."""
        return (self.channels, *self.sides(image_size))

    def preprocessing(self, image_size: Size | None = None) -> Preprocessing:
        """How a picture becomes its input, at another size where one is given.

        Raises:
            UserError: it names no mean and std, or of another number of channels than it takes.
        """
        advice = "give preprocessing=Preprocessing(...)"
        if self.mean is None or self.std is None:
            raise UserError(f"the preprocessing of {self.name} is not known; {advice}")
        if len(self.mean) != self.channels:
            raise UserError(
                f"the network takes {self.channels} channel(s), its pretrained_cfg has the mean of {len(self.mean)}; "
                f"{advice}"
            )
        return Preprocessing(
            image_size=self.sides(image_size),
            channels=self.channels,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            interpolation=self.interpolation,
        )


def input_facts(net: Network) -> InputFacts:
    """What a module, a spec or a named model takes.

    A module's ``pretrained_cfg`` says it (timm's form), else its ``spec``, else its first convolution its channels. A
    value there that is no finite number (of the size: no whole one) says nothing.

    Raises:
        UserError: it is no network, an unknown name, a module that takes several inputs, or one with lazy layers.
    """
    if isinstance(net, str):
        net = find(net)
    module, spec = resolve(net)
    if module is None:
        assert spec is not None
        return _of_spec(spec)
    check_one_input(module)
    check_shapes_known(module)
    config = _config(module)
    size, channels = _declared(config.get("input_size"))
    crop_pct = _number(config.get("crop_pct"))
    own_spec = getattr(module, "spec", None)
    known = _of_spec(own_spec) if isinstance(own_spec, NetSpec) else None
    return InputFacts(
        name=net.name if isinstance(net, Foreign) else type(module).__name__,
        channels=_channels(module, channels),
        size=size if size is not None or known is None else known.size,
        mean=_floats(config.get("mean")) or (known.mean if known else None),
        std=_floats(config.get("std")) or (known.std if known else None),
        interpolation=str(config.get("interpolation") or (known.interpolation if known else "bilinear")),
        crop_pct=crop_pct if crop_pct is not None else (known.crop_pct if known else 0.875),
    )


def check_one_input(net: nn.Module) -> None:
    """UserError where a module's ``forward`` can not be called with one batch of images."""
    try:
        parameters = inspect.signature(net.forward).parameters.values()
    except (TypeError, ValueError):  # compiled code may have no signature
        return
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p for p in parameters if p.default is inspect.Parameter.empty and p.kind not in several]
    if len(needed) > 1 or any(p.kind is inspect.Parameter.KEYWORD_ONLY for p in needed):
        names = ", ".join(p.name for p in needed)
        raise UserError(
            f"{type(net).__name__} takes {len(needed)} inputs ({names}); it must take one batch of images, "
            "so wrap it in a module that gives it the others"
        )


def check_shapes_known(net: nn.Module) -> None:
    """UserError where a module has lazy layers that wait for their first batch."""
    from torch.nn.parameter import is_lazy

    if any(is_lazy(tensor) for tensor in chain(net.parameters(), net.buffers())):
        raise UserError(
            f"{type(net).__name__} has lazy layers, whose weights have no shape yet; run it once on a real batch first"
        )


def example_input(net: nn.Module, image_size: Size | None = None, *, batch_size: int = 2) -> torch.Tensor:
    """Seeded noise in the network's input shape and dtype, like normalised pixels."""
    import torch

    dtype = next((p.dtype for p in net.parameters()), torch.float32)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch_size, *input_facts(net).shape(image_size), generator=generator).to(dtype)


def _of_spec(spec: NetSpec) -> InputFacts:
    pixels = spec.input
    return InputFacts(
        name=spec.name,
        channels=len(pixels.mean),
        size=pixels.size,
        mean=pixels.mean,
        std=pixels.std,
        interpolation=pixels.interpolation,
        crop_pct=pixels.crop_pct,
    )


def _config(net: nn.Module) -> Mapping[str, object]:
    """What a module's ``pretrained_cfg`` says: a mapping, or timm's dataclass."""
    config = getattr(net, "pretrained_cfg", None)
    if dataclasses.is_dataclass(config):
        return vars(config)
    return config if isinstance(config, Mapping) else {}


def _declared(input_size: object) -> tuple[Size | None, int | None]:
    """Size and channels of timm's ``input_size``: (channels, height, width), or without the channels."""
    if isinstance(input_size, list | tuple) and len(input_size) in (2, 3):
        *channels, height, width = (_whole(side) for side in input_size)
        if height is None or width is None:
            return None, channels[0] if channels else None
        return as_size(height, width), channels[0] if channels else None
    return _whole(input_size), None


_PACKED_COLOURS = 48
"""Channels that three colours have behind a space-to-depth of 4."""


def _channels(net: nn.Module, declared: int | None) -> int:
    """Channels of the images a module takes: its own ``in_chans``; else its first convolution's, which behind a
    space-to-depth of 2 or 4 has 4 or 16 for each: where a module does that, or ``declared`` fits it.
    """
    from torch import nn

    own = getattr(net, "in_chans", None)
    if isinstance(own, int):
        return own
    first, block = declared or 3, 1
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            first = module.in_channels
            break
        block = _block(module) or block
    if declared is not None and first in (declared, 4 * declared, 16 * declared):
        return declared
    if block == 1 and first == _PACKED_COLOURS:  # a TResNet that torch.fx drew has no module left that says it
        return 3
    return first // block**2 if first % block**2 == 0 else first


def _block(module: nn.Module) -> int | None:
    """Side of the blocks that a module packs into channels, where that is what it does: torch's, ours and timm's."""
    from torch import nn

    if isinstance(module, nn.PixelUnshuffle):
        return module.downscale_factor
    if "SpaceToDepth" not in type(module).__name__:  # the authors' own is a SpaceToDepthModule
        return None
    return next((side for name in ("block", "bs", "block_size") if (side := _whole(getattr(module, name, None)))), 4)


def _floats(values: object) -> tuple[float, ...] | None:
    """A list of numbers; None for anything else: what is no number says nothing."""
    numbers = [_number(value) for value in values] if isinstance(values, list | tuple) else []
    return tuple(number for number in numbers if number is not None) if numbers and None not in numbers else None


def _number(value: object) -> float | None:
    """A finite number; None for anything else, True and False among it."""
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # a whole number beyond what a float can hold
        return None
    return number if math.isfinite(number) else None


def _whole(value: object) -> int | None:
    """A whole number; None for anything else."""
    number = _number(value)
    return int(number) if number is not None and number.is_integer() else None


# ---------------------------------------------------------------- short ways that others call


def image_channels(net: nn.Module) -> int:
    """Channels of the images a module takes."""
    return input_facts(net).channels


def input_shape(net: nn.Module, image_size: Size | None = None) -> tuple[int, int, int]:
    """Channels, height and width that a module takes."""
    return input_facts(net).shape(image_size)


def preprocessing_of(net: nn.Module, image_size: Size | None = None) -> Preprocessing:
    """The preprocessing that a module names, at another size where one is given."""
    return input_facts(net).preprocessing(image_size)


def checked_size(image_size: Size | None, net: nn.Module | None, spec: NetSpec | None) -> tuple[int, int]:
    """``image_size`` as (height, width), or the own one of whichever of ``net`` and ``spec`` is given for None."""
    if image_size is not None:
        return sides(image_size)
    if net is not None:
        return input_facts(net).sides()
    assert spec is not None
    return sides(spec.input.size)
