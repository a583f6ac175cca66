"""What a spec may cost, and whether it can run at its own size; checked before anything is built.

The bounds lie far above any network that was published: EfficientNet-B7 has 55 blocks, ConvNeXt-XXL 3,072 channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from convscale.errors import MOST_WHOLE, UserError

DROPS_BORDERS = ("patch", "avgpool", "maxpool")
"""Ways to take a stride of 2 that leave an odd map's last row and column unused."""
MOST_ITEMS = 256
"""Of a list in a spec."""
MOST_BLOCKS = 2_000
"""Of a network."""
MOST_CHANNELS_SQUARED = 10**9
"""The blocks' output channels squared, added up: about the weights of one 1x1 convolution in each of them."""
MOST_NODES = 50_000
"""Values in a spec that is read, with what an alias stands for."""
_MOST = {
    "RunSpec.repeat": 1_000,
    "BlockSpec.width": 65_536,
    "BlockSpec.kernels": 127,
    "BlockSpec.start_kernel": 127,
    "BlockSpec.layers": 100,
    "BlockSpec.inner_ratio": 64,
    "BlockSpec.inner_divisor": 65_536,
    "BlockSpec.expand_groups": 1_024,
    "BlockSpec.project_groups": 1_024,
    "SESpec.floor": 65_536,
    "SESpec.divisor": 65_536,
    "StemSpec.widths": 65_536,
    "StemSpec.kernel": 127,
    "HeadSpec.width": 1_000_000,
    "HeadSpec.pooled_width": 1_000_000,
    "InputSpec.size": 16_384,
    "ScalingRules.divisor": 65_536,
}


def most_of(field: str) -> int:
    """The largest value of a field, which is named ``RunSpec.repeat`` or, in a list, ``StemSpec.widths[0]``."""
    return _MOST.get(field.partition("[")[0], MOST_WHOLE)


class _Kind(Protocol):
    @property
    def projects(self) -> bool: ...
    @property
    def takes_ratio(self) -> bool: ...


class _Block(Protocol):
    @property
    def kind(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def kernels(self) -> Sequence[int]: ...
    @property
    def group_width(self) -> int | None: ...
    @property
    def expand_groups(self) -> int: ...
    @property
    def project_groups(self) -> int: ...
    @property
    def downsample(self) -> str: ...
    @property
    def traits(self) -> _Kind: ...
    def inner_width(self, block_input: int) -> int: ...


class _Run(Protocol):
    @property
    def block(self) -> _Block: ...
    @property
    def repeat(self) -> int: ...


class _Stage(Protocol):
    @property
    def runs(self) -> Sequence[_Run]: ...
    @property
    def stride(self) -> int: ...


class _Stem(Protocol):
    @property
    def kind(self) -> str: ...
    @property
    def widths(self) -> Sequence[int]: ...
    @property
    def stride(self) -> int: ...
    @property
    def pool(self) -> bool: ...


class _Input(Protocol):
    @property
    def size(self) -> int: ...


class _Net(Protocol):
    """A ``NetSpec``, which can not be imported: it is made of what is checked by this."""

    @property
    def name(self) -> str: ...
    @property
    def input(self) -> _Input: ...
    @property
    def stem(self) -> _Stem: ...
    @property
    def stages(self) -> Sequence[_Stage]: ...


def check_cost(stages: Sequence[_Stage]) -> None:
    """Refuse stages that no machine could build.

    Raises:
        UserError: there are more blocks, or wider ones, than a network may have.
    """
    runs = [run for stage in stages for run in stage.runs]
    blocks = sum(run.repeat for run in runs)
    if blocks > MOST_BLOCKS:
        raise UserError(f"NetSpec.stages have {blocks:,} blocks; a network may have at most {MOST_BLOCKS:,}")
    squared = sum(run.repeat * run.block.width**2 for run in runs)
    if squared > MOST_CHANNELS_SQUARED:
        raise UserError(
            f"NetSpec.stages have {squared:.1e} channels squared in their blocks; a network may have at most "
            f"{MOST_CHANNELS_SQUARED:.0e}"
        )


def check_fits(net: _Net) -> None:
    """Refuse a network that can not run at the size it says it takes: a map is too small for a patch or a pool, a
    block's two branches meet at different sizes, or channels can not be split as a block says.

    Raises:
        UserError: the message names the stage, and what would be right.
    """
    stem = net.stem
    side = side_after_stem(stem, net.input.size)
    if side < 1:
        raise UserError(f"{net.name} can not run at its own size, {net.input.size} px; the stem takes {stem.stride} px")
    channels = stem.widths[-1]
    for number, stage in enumerate(net.stages):
        stride = stage.stride
        for run in stage.runs:
            where = f"{net.name} can not run at its own size, {net.input.size} px: stages[{number}]"
            # What follows a run's first block takes what the block gives: from the second on all are alike.
            for _ in range(min(run.repeat, 2)):
                side = _after(where, run.block, side, stride)
                _check_channels(f"{net.name}, stages[{number}]", run.block, channels)
                channels, stride = run.block.width, 1


def side_after_stem(stem: _Stem, size: int) -> int:
    """The side of the maps that the stages get."""
    if stem.kind in ("patch", "space_to_depth"):
        size //= stem.stride
    elif stem.stride > 1:
        size = math.ceil(size / stem.stride)
    return math.ceil(size / 2) if stem.pool else size


def can_halve(downsample: str, projects: bool, side: int) -> bool:
    """Whether a block, whose shortcut ``projects`` or not, can take a stride of 2 on maps of that side in this way."""
    if downsample in (*DROPS_BORDERS, "blur") and side < 2:
        return False
    return not (downsample in ("avgpool", "maxpool") and projects and side % 2)


def halved(downsample: str, side: int) -> int:
    """The side behind a stride of 2."""
    return side // 2 if downsample in DROPS_BORDERS else math.ceil(side / 2)


def _after(where: str, block: _Block, side: int, stride: int) -> int:
    """The map's side behind a block."""
    if stride == 1:
        return side
    how = block.downsample
    if not can_halve(how, block.traits.projects, side):
        if side < 2:
            raise UserError(f"{where} gets maps of 1 px, and its {how} takes 2; a larger size would be right")
        raise UserError(f"{where} gets maps of {side} px, which its {how} halves and its shortcut does not")
    return halved(how, side)


def _check_channels(where: str, block: _Block, channels: int) -> None:
    """Whether a block can split the channels that it gets, and those inside, as it says."""
    inner = block.inner_width(channels)
    splits = ((channels if block.traits.takes_ratio else inner, block.expand_groups), (inner, block.expand_groups))
    for found, parts in (*splits, (inner, block.project_groups), (block.width, block.project_groups)):
        if found < parts:
            raise UserError(f"{where}: {found} channels can not be split over {parts} convolutions")
    if inner < len(block.kernels):
        raise UserError(f"{where}: {inner} channels can not be split over {len(block.kernels)} kernels")
    if block.kind == "aggregated" and block.width < 2:
        raise UserError(f"{where}: an aggregated block has at least 2 channels, half of them inside")
    group = block.group_width
    if group is not None and block.kind == "basic" and (channels % group or block.width % (channels // group)):
        raise UserError(f"{where}: groups of {group} channels do not divide {channels} channels to {block.width}")
