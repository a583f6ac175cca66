"""``torch.export`` archives: write one."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import nn

from convscale.formats.fold import capture
from convscale.runtimes.pytorch.program import check_program
from convscale.runtimes.silence import quiet


def write_program(net: nn.Module, example: torch.Tensor, path: Path) -> None:
    """Write a network in eval mode as an archive with a dynamic batch, without the stack traces that name this
    machine's files.

    Raises:
        UserError: it can not be captured.
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
        held = io.BytesIO()  # torch's own writer of files ends the process where the disk is full
        torch.export.save(program, held)
    path.write_bytes(held.getbuffer())
    check_program(path)
