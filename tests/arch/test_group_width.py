"""Widths of blocks with grouped convolutions round to whole groups, by hand."""

from __future__ import annotations

import pytest

from convscale.arch.block import BlockSpec


@pytest.mark.parametrize(("asked", "width"), [(70, 72), (61, 72), (59, 48), (97, 96), (8, 24), (1, 24)])
def test_a_basic_block_keeps_whole_groups(asked: int, width: int) -> None:
    block = BlockSpec(kind="basic", width=48, group_width=24).with_width(asked, 8)
    assert (block.width, block.group_width) == (width, 24)


def test_a_dense_basic_block_takes_the_width_as_it_is() -> None:
    assert BlockSpec(kind="basic", width=64).with_width(70, 8).width == 70


def test_a_bottleneck_keeps_its_output_and_rounds_its_inner_width_to_whole_groups() -> None:
    """Half of 144 is 72; the least common multiple of 8 and 6 is 24, so 72 stays; half of 152 is 76, which becomes
    72.
    """
    block = BlockSpec(kind="bottleneck", width=96, inner_ratio=0.5, group_width=6)
    assert [(b.width, b.inner_width(b.width)) for b in (block.with_width(144, 8), block.with_width(152, 8))] == [
        (144, 72),
        (152, 72),
    ]
