"""Weights between two states of a network."""

from __future__ import annotations

from collections.abc import Mapping

import torch

SHARES = (0.25, 0.5, 0.75)
"""Of the trained weights, where they are joined with those that training started from."""


def between(
    start: Mapping[str, torch.Tensor], end: Mapping[str, torch.Tensor], share: float
) -> dict[str, torch.Tensor]:
    """The state at ``share`` of the way from one to another, running statistics included; what is no float, as at the
    end (WiSE-FT: Wortsman et al. 2022, arXiv 2109.01903, equation 1).
    """
    return {
        name: torch.lerp(start[name].to(value), value, share) if value.is_floating_point() else value
        for name, value in end.items()
    }
