"""What may be chosen in a stage of a search space, and which choices have an effect together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal

from convscale.arch.block import BLOCK_KINDS, BlockSpec, RunSpec, SESpec, StageSpec
from convscale.arch.bounds import can_halve, halved
from convscale.arch.codec import require
from convscale.arch.parts import IDENTITY, RELU, ActSpec, Part, require_positive

KINDS = ("conv", "basic", "bottleneck", "inverted_residual", "fused_inverted_residual", "depthwise_separable")
"""Kinds of blocks that a space may offer."""
FIELDS = {
    "kind": "kinds",
    "kernel": "kernels",
    "expansion": "expansions",
    "width": "widths",
    "depth": "depths",
    "se": "se",
    "se_where": "se_where",
    "activation": "activations",
    "skip": "skips",
    "downsample": "downsamples",
}
"""What is chosen in a stage -> the field of ``StageChoices`` that holds its options."""
ORDERED = ("kernel", "expansion", "width", "depth", "se")
"""Choices whose options lie on a line; the others are words."""


@dataclass(frozen=True, kw_only=True)
class StageChoices(Part):
    """The options of one stage. All its blocks share what is chosen; the first one takes the stride."""

    kinds: tuple[str, ...]
    """Kinds of blocks, of ``KINDS``."""
    widths: tuple[int, ...]
    """Output channels; a bottleneck's inside."""
    depths: tuple[int, ...]
    """Blocks."""
    kernels: tuple[int, ...] = (3,)
    """Sides of the spatial convolution's kernel in pixels."""
    expansions: tuple[float, ...] = (6.0,)
    """Inner width over the input's, of inverted residuals and of fused ones; no effect on other kinds."""
    se: tuple[float, ...] = (0.0,)
    """Squeezed width over the block's input width (mobile kinds) or its output's (``basic``; of a ``bottleneck`` twice
    as much of the inner one, as TResNet has it); 0: no squeeze-and-excitation. No effect on ``conv``."""
    se_where: tuple[Literal["inner", "output"], ...] = ("inner",)
    """Where it stands, for kinds that leave a choice; other kinds take the place that they have."""
    se_floor: int = 1
    """Least squeezed width."""
    activations: tuple[ActSpec, ...] = (RELU,)
    """Of all convolutions in the block but the last."""
    skips: tuple[bool, ...] = (True,)
    """Whether mobile kinds have a residual connection; no effect where no block could have one."""
    downsamples: tuple[Literal["stride", "blur", "blur_zeros", "avgpool", "maxpool"], ...] = ("stride",)
    """How a stride of 2 is taken; no effect without one."""
    shortcut: Literal["conv", "avgpool"] = "conv"
    """Of ``basic`` and ``bottleneck`` blocks where shapes differ."""
    bottleneck: float = 4.0
    """Output channels of a bottleneck over those inside."""
    stride: int = 1
    """1 or 2: by what the stage divides the map's sides."""

    def validate(self) -> None:
        for name in FIELDS.values():
            options = getattr(self, name)
            require(len(options) >= 1, f"StageChoices.{name}", options, "at least one option")
            require(len(set(options)) == len(options), f"StageChoices.{name}", options, "options that differ")
        for kind in self.kinds:
            require(kind in KINDS, "StageChoices.kinds", kind, f"of {', '.join(KINDS)}")
        for name in ("widths", "depths"):
            require(min(getattr(self, name)) >= 1, f"StageChoices.{name}", getattr(self, name), "at least 1 each")
        odd = all(kernel >= 1 and kernel % 2 for kernel in self.kernels)
        require(odd, "StageChoices.kernels", self.kernels, "odd sizes of at least 1")
        require(all(ratio > 0 for ratio in self.expansions), "StageChoices.expansions", self.expansions, "above 0")
        require(all(0 <= ratio <= 4 for ratio in self.se), "StageChoices.se", self.se, "0, or a share in (0, 4]")
        require(1 <= self.bottleneck <= 64, "StageChoices.bottleneck", self.bottleneck, "a factor from 1 to 64")
        require(self.stride in (1, 2), "StageChoices.stride", self.stride, "1 or 2")
        require_positive(self, "se_floor")
        for kind in self.kinds:  # what can not be built is told now, not in the middle of a search
            for se, where, how in product(self.se, self.se_where, self.downsamples):
                chosen = {name: getattr(self, field)[0] for name, field in FIELDS.items()}
                self.stage({**chosen, "kind": kind, "se": se, "se_where": where, "downsample": how}, tap=True)

    def options(self, name: str) -> tuple[object, ...]:
        """The options of one of ``FIELDS``."""
        return getattr(self, FIELDS[name])

    def active(self, name: str, chosen: Mapping[str, object]) -> bool:
        """Whether a choice has an effect beside the others: an expansion on kinds that expand, and so on."""
        kind = BLOCK_KINDS[str(chosen["kind"])]
        if name == "expansion":
            return kind.takes_ratio and kind.inner_of == "input"
        if name == "se":
            return bool(kind.se_places)
        if name == "se_where":
            return bool(chosen["se"]) and set(self.se_where) <= set(kind.se_places)
        if name == "skip":
            return not kind.projects and (chosen["depth"] != 1 or self.stride == 1)
        if name == "downsample":
            return self.stride == 2
        return True

    def fitting(self, kind: object, side: int) -> tuple[object, ...]:
        """Of the ways to take a stride of 2 those that a kind of block has on maps of that side: pooling does not halve
        an odd one as a shortcut does.
        """
        projects = BLOCK_KINDS[str(kind)].projects
        return tuple(how for how in self.downsamples if can_halve(how, projects, side))

    def side_after(self, chosen: Mapping[str, object], side: int) -> int:
        """The side of its maps."""
        return halved(str(chosen["downsample"]), side) if self.stride == 2 else side

    def count(self, side: int = 1 << 20) -> int:
        """How many different stages there are, for maps of that side in pixels."""
        return sum(self.counts(side).values())

    def counts(self, side: int) -> dict[int, int]:
        """How many different stages there are, by the side of their maps."""
        found: dict[int, int] = {}
        for kind, depth, se in product(self.kinds, self.depths, self.se):
            chosen = {"kind": kind, "depth": depth, "se": se}
            if se != self.se[0] and not self.active("se", chosen):
                continue
            free = ("kernel", "expansion", "width", "se_where", "activation", "skip")
            alike = math.prod(len(self.options(name)) for name in free if self.active(name, chosen))
            for how in self.fitting(kind, side) if self.stride == 2 else self.downsamples[:1]:
                after = self.side_after({"downsample": how}, side)
                found[after] = found.get(after, 0) + alike
        return found

    def stage(self, chosen: Mapping[str, object], *, tap: bool) -> StageSpec:
        """The stage of a choice: option by name of ``FIELDS``."""
        return StageSpec(
            runs=(RunSpec(block=self.block(chosen), repeat=int(str(chosen["depth"]))),), stride=self.stride, tap=tap
        )

    def block(self, chosen: Mapping[str, object]) -> BlockSpec:
        """The block of a choice."""
        kind, act, width = str(chosen["kind"]), chosen["activation"], int(str(chosen["width"]))
        assert isinstance(act, ActSpec)
        traits = BLOCK_KINDS[kind]
        narrow = kind == "bottleneck"
        expands = traits.takes_ratio and traits.inner_of == "input"
        ratio = float(str(chosen["expansion"])) if expands else 1 / self.bottleneck if narrow else 1.0
        dense_out = RELU if act.kind == "leaky_relu" else act  # as TResNet has it
        return BlockSpec(
            kind=kind,
            width=round(width * self.bottleneck) if narrow else width,
            inner_ratio=ratio,
            inner_divisor=8 if expands else 1,
            kernels=(int(str(chosen["kernel"])),),
            se=self._se(kind, chosen, act),
            activation=act,
            out_activation=dense_out if traits.projects else IDENTITY,
            downsample=str(chosen["downsample"]),  # pyright: ignore[reportArgumentType] - BlockSpec checks it
            shortcut=self.shortcut if traits.projects else "conv",
            skip=bool(chosen["skip"]) or traits.projects,
        )

    def _se(self, kind: str, chosen: Mapping[str, object], act: ActSpec) -> SESpec | None:
        """Squeeze-and-excitation of a choice: by the input's width in mobile kinds, rounded down by the output's or the
        inner one in the others (TResNet, section 2).
        """
        ratio, places = float(str(chosen["se"])), BLOCK_KINDS[kind].se_places
        if not ratio or not places:
            return None
        where = str(chosen["se_where"])
        place = next(place for place in (where, *places) if place in places)
        assert place in ("inner", "output")
        if not BLOCK_KINDS[kind].projects:
            return SESpec(ratio=ratio, where=place, floor=self.se_floor, activation=act)
        narrow = kind == "bottleneck"
        return SESpec(
            ratio=2 * ratio if narrow else ratio,
            of="inner" if narrow else "output",
            where=place,
            floor=self.se_floor,
            rounding="down",
        )

    def chosen_in(self, stage: StageSpec) -> dict[str, object] | None:
        """The inverse of ``stage``: what was chosen, or None where the stage is none of these. Choices without an
        effect have their first option.
        """
        run = stage.runs[0]
        block, se = run.block, run.block.se
        width = round(block.width / self.bottleneck) if block.kind == "bottleneck" else block.width
        ratio = 0.0 if se is None else se.ratio / 2 if block.kind == "bottleneck" else se.ratio
        said: dict[str, object] = {
            "kind": block.kind,
            "kernel": block.kernels[0] if block.kernels else 0,
            "expansion": block.inner_ratio,
            "width": width,
            "depth": run.repeat,
            "se": ratio,
            "se_where": "" if se is None else se.where,
            "activation": block.activation,
            "skip": block.skip,
            "downsample": block.downsample,
        }
        if block.kind not in self.kinds:
            return None
        found: dict[str, object] = {}
        for name in FIELDS:
            options = self.options(name)
            active = self.active(name, {**said, **found})
            if active and said[name] not in options:
                return None
            found[name] = said[name] if active else options[0]
        return found if self.stage(found, tap=stage.tap) == stage else None
