"""A new device learnt from lone kernels: some hundred of the kinds that the model tells apart, timed in two minutes.

No network is needed. Each probe is one layer, several times over, at a shape that networks have; its trace says what
kernels it launches, and the predictor is set to their times as to those of networks. So what a device does with grouped
or depthwise convolutions, norms or exponentials is seen by itself, where a network shows but the sum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convscale.conditions import Conditions
from convscale.errors import UserError
from convscale.machine import need_cuda
from convscale.predictor.calibrate import Observation
from convscale.predictor.devices import Device, devices, get_device

if TYPE_CHECKING:
    from torch import nn

SECONDS = 0.25
"""Timed seconds of each probe, at least."""
REPEATS = 4
"""How often a layer comes in its probe, so that what a call costs beside its layers (the input, the call itself)
weighs little."""
_IMAGES = {"gpu": 256, "cpu": 2}
"""Images a call: enough that no more than a tenth of the layers wait for the host, on the fastest GPU too, and few
enough for a CPU to take two minutes."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One layer to time."""

    name: str
    """What it is, for people."""
    channels: int
    """Channels that go in, and come out where it repeats."""
    side: int
    """Height and width of its map in pixels."""
    make: Callable[[], nn.Module]
    """The layer."""
    repeats: int = REPEATS
    """How often it comes; once where it changes the map's shape."""

    def module(self) -> nn.Module:
        """The layer, as often as it comes, as a network of ``in_chans`` channels."""
        from torch import nn

        net = nn.Sequential(*(self.make() for _ in range(self.repeats)))
        net.in_chans = self.channels  # pyright: ignore[reportArgumentType]
        net.name = self.name  # pyright: ignore[reportArgumentType]
        return net


_DENSE = ((32, 112), (64, 56), (128, 28), (256, 14), (512, 7), (64, 28), (256, 28), (512, 14))
_POINTWISE_CONV = ((16, 96, 112), (24, 144, 56), (64, 256, 56), (256, 64, 56), (256, 1024, 14), (512, 128, 28))
_DEPTHWISE = ((32, 112), (96, 56), (144, 56), (240, 28), (480, 14), (960, 7))
_MAPS = ((64, 112), (64, 56), (256, 28), (512, 14), (1024, 7))


def probes() -> list[Probe]:
    """The layers of a sweep: about a hundred."""
    return [*_convolutions(), *_grouped(), *_depthwise(), *_moving()]


def _convolutions() -> Iterator[Probe]:
    from torch import nn

    def dense(c: int, out: int, kernel: int, stride: int = 1) -> Callable[[], nn.Module]:
        return lambda: nn.Conv2d(c, out, kernel, stride, kernel // 2, bias=False)

    for c, side in _DENSE:
        yield Probe(name=f"conv 3x3 {c} at {side}", channels=c, side=side, make=dense(c, c, 3))
        yield Probe(name=f"conv 1x1 {c} at {side}", channels=c, side=side, make=dense(c, c, 1))
    for c, out, side in _POINTWISE_CONV:
        yield Probe(name=f"conv 1x1 {c} to {out} at {side}", channels=c, side=side, make=dense(c, out, 1), repeats=1)
    for c, out, side in ((64, 128, 56), (128, 256, 28), (256, 512, 14)):
        name = f"conv 3x3, stride 2, {c} to {out} at {side}"
        yield Probe(name=name, channels=c, side=side, make=dense(c, out, 3, 2), repeats=1)
    for c, side in ((76, 56), (83, 28), (20, 112), (150, 14)):
        yield Probe(name=f"conv 3x3 of ragged {c} at {side}", channels=c, side=side, make=dense(c, c, 3))
        yield Probe(name=f"conv 1x1 of ragged {c} at {side}", channels=c, side=side, make=dense(c, c, 1))
    yield Probe(name="stem 7x7", channels=3, side=224, make=dense(3, 64, 7, 2), repeats=1)
    yield Probe(name="stem 3x3", channels=3, side=224, make=dense(3, 32, 3, 2), repeats=1)
    yield Probe(name="patches 4x4", channels=3, side=224, make=lambda: nn.Conv2d(3, 96, 4, 4), repeats=1)
    for c in (512, 1024, 2048):
        yield Probe(
            name=f"linear {c} to 1000",
            channels=c,
            side=1,
            make=lambda c=c: nn.Sequential(nn.Flatten(), nn.Linear(c, 1000)),
            repeats=1,
        )


def _grouped() -> Iterator[Probe]:
    from torch import nn

    for c, width, side in ((128, 4, 56), (256, 8, 28), (512, 16, 14), (1024, 32, 7), (256, 64, 28), (72, 24, 56)):
        yield Probe(
            name=f"conv 3x3 of {c // width} groups of {width} at {side}",
            channels=c,
            side=side,
            make=lambda c=c, width=width: nn.Conv2d(c, c, 3, 1, 1, groups=c // width, bias=False),
        )


def _depthwise() -> Iterator[Probe]:
    from torch import nn

    def depthwise(c: int, kernel: int, stride: int = 1) -> Callable[[], nn.Module]:
        return lambda: nn.Conv2d(c, c, kernel, stride, kernel // 2, groups=c, bias=False)

    for c, side in _DEPTHWISE:
        for kernel in (3, 5, 7):
            name = f"depthwise {kernel}x{kernel} {c} at {side}"
            yield Probe(name=name, channels=c, side=side, make=depthwise(c, kernel))
    for c, side in ((96, 112), (144, 56), (288, 28)):
        name = f"depthwise 3x3, stride 2, {c} at {side}"
        yield Probe(name=name, channels=c, side=side, make=depthwise(c, 3, 2), repeats=1)


def _moving() -> Iterator[Probe]:
    from torch import nn

    def over_maps(what: str, make: Callable[[int, int], nn.Module], repeats: int = REPEATS) -> Iterator[Probe]:
        for c, side in _MAPS:
            name = f"{what} {c} at {side}"
            yield Probe(name=name, channels=c, side=side, make=lambda c=c, side=side: make(c, side), repeats=repeats)

    yield from over_maps("batch norm", lambda c, _: nn.BatchNorm2d(c))
    yield from over_maps("ReLU", lambda *_: nn.ReLU())
    yield from over_maps("SiLU", lambda *_: nn.SiLU())
    yield from over_maps("hardswish", lambda *_: nn.Hardswish())
    yield from over_maps("group norm", lambda c, _: nn.GroupNorm(32, c), 2)
    yield from over_maps("max pool", lambda *_: nn.MaxPool2d(3, 2, 1), 1)
    yield from over_maps("mean", lambda *_: nn.AdaptiveAvgPool2d(1), 1)
    yield from over_maps("layer norm", lambda c, side: nn.LayerNorm([c, side, side]), 2)


def measure_sweep(
    conditions: Conditions,
    *,
    layers: Sequence[Probe] | None = None,
    seconds: float = SECONDS,
    say: Callable[[str], None] = lambda text: None,
) -> list[Observation]:
    """Time the probes here.

    Args:
        conditions: of the device at hand (``cpu``, ``cuda`` or ``cuda:N``); mode, precision, layout and runtime (eager
            or compiled) as a calibration is wanted for. Batch and image size are the probes'.
        layers: what to time; None: all of ``probes``.
        seconds: timed seconds of each, at least.
        say: told a line now and then.

    Returns:
        What ``calibrate`` takes, with the device's own name.

    Raises:
        UserError: mode ``train``, which lone layers say nothing of, or a GPU that has no data sheet here.
    """
    from convscale.speed.measuring import measure

    if conditions.mode != "infer":
        raise UserError(f"a sweep times layers in inference, got mode {conditions.mode!r}; calibrate with networks")
    sheet = sheet_here(conditions.device)
    found = []
    layers = probes() if layers is None else layers
    for number, probe in enumerate(layers, start=1):
        asked = dataclasses.replace(conditions, batch_size=_IMAGES[sheet.kind], image_size=probe.side)
        net = probe.module()
        made = measure(net, asked, min_seconds=seconds, max_seconds=8 * seconds)
        there = dataclasses.replace(made.conditions, device=sheet.name)
        found.append(Observation(net=net, conditions=there, images_per_s=made.images_per_s))
        if number % 10 == 0 or number == len(layers):
            say(f"{number} of {len(layers)} kernels timed; last: {probe.name}, {1e3 * made.latency_s:.3g} ms")
    return found


def sheet_here(device: str) -> Device:
    """The data sheet of the device at hand.

    Raises:
        UserError: a GPU that is not there, or that no data sheet is known of.
    """
    if device == "cpu":
        return devices()["cpu"]
    import torch

    need_cuda(device, "sweep the cpu, or run it where it is")
    return get_device(torch.cuda.get_device_name(device))
