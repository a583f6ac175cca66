"""``compile=graphs``: forward and backward as CUDA graphs, which a GPU is given by one launch each and not by one for
every kernel: what a step on small images is mostly made of.

PyTorch records and replays them (``torch._inductor.cudagraph_trees``), on these terms:

- What a pass gives lies in the graphs' memory, which the passes of the next step write again. The loop keeps nothing of
  it: losses are computed outside, from a pass's outputs, and have memory of their own; so has what a teacher says; and
  what a hook took out of the network is used up by the backward pass. But gradients are outputs too: autograd makes the
  very tensor that a backward graph wrote a parameter's ``grad``. One batch's are used up by its step. Those that a
  further batch is to be added to are moved out beforehand (``Graphed``).
- Weights and statistics must stay where they are: optimisers, averages, a trial and a restored state write in place.
- A replay draws random numbers by the generator's seed as it is then, so ``torch.manual_seed`` at every step counts.
- Of several processes each has graphs of its own; ``DistributedDataParallel`` exchanges gradients between them, and
  keeps these in memory of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from convscale.errors import UserError
from convscale.learn.recipe import Recipe


class Graphed(nn.Module):
    """The network with its passes as CUDA graphs; it shares its parameters.

    Every call begins a step: what the calls before it gave, gradients apart, may be overwritten.

    Args:
        net: as it is called.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net: Any = torch.compile(net, mode="reduce-overhead")
        self._trained = list(net.parameters())
        self._own: dict[nn.Parameter, torch.Tensor] = {}
        """Memory for gradients that are added to, made once."""

    def forward(self, *inputs: Any) -> Any:
        self._move_gradients()
        torch.compiler.cudagraph_mark_step_begin()
        return self.net(*inputs)

    def _move_gradients(self) -> None:
        """Out of the graphs' memory, in one launch; those that were moved before stay."""
        there = [(param, param.grad) for param in self._trained if param.grad is not None]
        there = [(param, grad) for param, grad in there if grad is not self._own.get(param)]
        if not there:
            return
        for param, grad in there:
            if param not in self._own:
                self._own[param] = torch.empty_like(grad)
        torch._foreach_copy_([self._own[param] for param, _ in there], [grad for _, grad in there])
        for param, _ in there:
            param.grad = self._own[param]


def has_graphs(device: torch.device) -> bool:
    """Whether passes can be CUDA graphs there."""
    return device.type == "cuda"


def check_compile(recipe: Recipe, device: torch.device) -> None:
    """
    Raises:
        UserError: the recipe asks for CUDA graphs on another device.
    """
    if recipe.compile == "graphs" and not has_graphs(device):
        raise UserError(
            f"recipe {recipe.name}: compile is graphs, CUDA graphs, and device {device} is no CUDA GPU; compile=auto "
            "would be right"
        )


def other_graphs() -> bool:
    """Whether there are graphs of PyTorch's already, say of a teacher that came compiled."""
    from torch._inductor.cudagraph_trees import get_manager  # slow to import

    return get_manager(create_if_none_exists=False) is not None


def drop_graphs() -> None:
    """Give back the memory of all graphs; none of them can be called again."""
    from torch._inductor.cudagraph_trees import reset_cudagraph_trees  # slow to import

    reset_cudagraph_trees()
