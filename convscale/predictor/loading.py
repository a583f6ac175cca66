"""The workload of a network as a prediction takes it: also in the precisions that no trace knows."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from convscale.conditions import Conditions
from convscale.cost.kernels import Kernel
from convscale.predictor.workload import Workload, load_workload

if TYPE_CHECKING:
    from convscale.cost.subject import Network

TRACED_AS = {"amp_bf16": "amp", "bf16": "fp16", "int8": "fp16"}
"""Precisions by the one whose trace they share: both halves have 2 bytes, and 8 bits start from a network in half.
``bf16`` is what ``measure`` times by that name, weights and maps in bfloat16; the traces' own counts call autocast to
it so too."""


def traced_as(precision: str) -> str:
    """The precision that a network is traced in to be predicted in one."""
    return TRACED_AS.get(precision, precision)


def workload_for(network: Network, conditions: Conditions) -> Workload:
    """The workload of a network under conditions, as ``load_workload`` gives it, in any precision that is predicted.

    Raises:
        UserError: as for ``load_workload``.
    """
    work = load_workload(network, dataclasses.replace(conditions, precision=traced_as(conditions.precision)))
    return eight_bits(work) if conditions.precision == "int8" else work


def eight_bits(work: Workload) -> Workload:
    """A network whose kernels ran in half precision, with maps and weights of 8 bits: products of dense and grouped
    convolutions and linear layers by the 8-bit rate, all maps in half the bytes. Which layers a runtime leaves in half
    precision is its affair, so this is the most that 8 bits can bring.
    """
    return dataclasses.replace(work, kernels=tuple((_eight_bits(kernel), count) for kernel, count in work.kernels))


def _eight_bits(kernel: Kernel) -> Kernel:
    if kernel.itemsize != 2:
        return kernel
    return kernel._replace(
        in_bytes=kernel.in_bytes // 2,
        out_bytes=kernel.out_bytes // 2,
        weight_bytes=kernel.weight_bytes // 2,
        itemsize=1,
    )
