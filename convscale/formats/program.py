"""``torch.export`` archives: write one."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from convscale.files import refusing_full
from convscale.formats.fold import capture
from convscale.runtimes.pytorch.program import check_program
from convscale.runtimes.silence import quiet


def write_program(net: nn.Module, example: torch.Tensor, path: Path) -> None:
    """Write a network in eval mode as an archive with a dynamic batch, without the stack traces that name this
    machine's files.

    Raises:
        UserError: it can not be captured, or the disk is full.
    """
    graph = capture(net, example)
    for node in graph.graph.nodes:
        node.meta.pop("stack_trace", None)
        node.meta.pop("from_node", None)
    with quiet(), torch.no_grad():
        program = torch.export.export(
            graph, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), strict=False
        )
        for node in program.graph.nodes:
            for key in ("stack_trace", "from_node", "torch_fn"):
                node.meta.pop(key, None)
        with refusing_full(path):
            torch.export.save(program, os.fspath(path))
    check_program(path)
