"""Multiply-accumulates of matrix operators, by hand."""

from __future__ import annotations

import pytest
import torch

from convscale.cost.operators import macs_of


def _empty(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


@pytest.mark.parametrize(
    ("name", "shapes", "macs"),
    [
        ("linear", [(5, 7), (3, 7)], 5 * 7 * 3),
        ("mm", [(5, 7), (7, 3)], 5 * 7 * 3),
        ("mv", [(5, 7), (7,)], 5 * 7),
        ("addmm", [(3,), (5, 7), (7, 3)], 5 * 7 * 3),
        ("addmv", [(5,), (5, 7), (7,)], 5 * 7),
        ("bmm", [(2, 5, 7), (2, 7, 3)], 2 * 5 * 7 * 3),
        ("baddbmm", [(2, 5, 3), (2, 5, 7), (2, 7, 3)], 2 * 5 * 7 * 3),
        # queries (2 heads, 5, 7), keys (2, 11, 7), values (2, 11, 3): products of 5 x 7 x 11 and of 5 x 11 x 3 each
        ("scaled_dot_product_attention", [(2, 5, 7), (2, 11, 7), (2, 11, 3)], 2 * 5 * 11 * (7 + 3)),
        ("relu", [(5, 7)], 0),
    ],
)
def test_by_hand(name: str, shapes: list[tuple[int, ...]], macs: int) -> None:
    assert macs_of(name, [_empty(*shape) for shape in shapes], None) == macs


def test_a_convolution_counts_outputs_and_a_transposed_one_inputs() -> None:
    """16 channels in 4 groups, 3 x 3 kernels, 8 outputs: 4 x 9 products an output of 10 x 10."""
    x, weight = _empty(2, 16, 12, 12), _empty(8, 4, 3, 3)
    assert macs_of("convolution", [x, weight], _empty(2, 8, 10, 10)) == 2 * 8 * 100 * 4 * 9
    back = _empty(16, 2, 3, 3)  # 16 channels to 2 in each of 4 groups: every input meets 2 x 9 weights
    assert macs_of("conv_transpose2d", [x, back], _empty(2, 8, 14, 14)) == 2 * 16 * 144 * 2 * 9
