"""Bytes that our simulation of PyTorch's compiler counts, beside those of the compiler's own scheduler.

The scheduler decides what becomes one kernel before any code is made, so asking it needs no C++ compiler and no GPU. It
is that of the processor's build, told to choose as a GPU's does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import convscale as cs
from convscale.conditions import Conditions
from convscale.cost.counting import trace_of
from convscale.cost.fusion import launched_kernels

BATCH, SIDE = 4, 128
# MixNet is left out: where a convolution reads a slice of a map, the scheduler counts the whole map.
NETWORKS = (
    *("resnet18", "resnet50", "resnet50d", "resnext50_32x4d", "seresnext50_32x4d", "wide_resnet50_2", "tresnet_m"),
    *("efficientnet_b0", "efficientnet_lite0", "efficientnetv2_s", "poolnet", "mobilenetv2_100", "hgnetv2_b0"),
    *("mobilenetv3_large_100", "mobilenetv3_small_100", "mobilenetv4_conv_small", "regnetx_002", "regnety_002"),
    *("convnext_atto", "convnextv2_atto"),
)
ALLOWED = {("seresnext50_32x4d", "train"): 0.15}
"""Shares by which the two may differ where that is more than a tenth."""


class _Enough(Exception):
    """The scheduler has decided."""


@dataclass
class Scheduled:
    """What the compiler's scheduler has decided on, graph by graph."""

    graphs: list[int] = field(default_factory=list)
    """Bytes that each graph's kernels read and write."""

    def backend(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        """For ``torch.compile``: each graph is scheduled, and then run as it is."""
        from torch._functorch.aot_autograd import make_boxed_func
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        def inner(part: torch.fx.GraphModule, examples: Any, **options: Any) -> Any:
            plain = copy.deepcopy(part)
            before = len(self.graphs)
            with pytest.raises(Exception, match="enough"):
                compile_fx_inner(part, examples, **options)
            assert len(self.graphs) == before + 1
            return make_boxed_func(plain.forward)

        return compile_fx(graph, inputs, inner_compile=inner)


@pytest.fixture
def scheduled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scheduled]:
    """The compiler, stopped before it makes code."""
    from torch._inductor import config, ir
    from torch._inductor.graph import GraphLowering

    found = Scheduled()

    def codegen(self: Any) -> None:
        self.init_wrapper_code()
        self._update_scheduler()
        found.graphs.append(sum(node.get_read_write_buffers_sizes() for node in self.scheduler.nodes))
        raise _Enough("enough")

    monkeypatch.setattr(GraphLowering, "codegen", codegen)
    # On a processor what takes an exponential is kept for its next reader; a GPU's build computes it again.
    monkeypatch.setattr(ir, "is_cpu", lambda node: False)
    # Concatenations join what reads them on a GPU; on a processor the compiler leaves that out.
    # In training it would copy maps of grouped convolutions into another layout for the processor's library.
    with config.patch(fx_graph_cache=False, force_pointwise_cat=True, layout_optimization=False):
        torch._dynamo.reset()
        yield found
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("mode", ["infer", "train"])
@pytest.mark.parametrize("name", NETWORKS)
def test_fused_kernels_move_as_many_bytes_as_the_compilers_scheduler_says(
    name: str, mode: str, scheduled: Scheduled
) -> None:
    """Inference in channels-last, training in NCHW, as each is laid out without a copy."""
    training = mode == "train"
    layout, memory_format = ("nchw", torch.contiguous_format) if training else ("nhwc", torch.channels_last)
    net: nn.Module = cs.create_model(name).train(training).requires_grad_(training)
    net = net.to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]
    images = torch.randn(BATCH, 3, SIDE, SIDE).contiguous(memory_format=memory_format)
    outputs = torch.compile(net, backend=scheduled.backend, dynamic=False)(images)
    if training:
        outputs.sum().backward()
    assert len(scheduled.graphs) == (2 if training else 1)
    conditions = Conditions(mode=mode, layout=layout, batch_size=BATCH, image_size=SIDE)
    kernels = launched_kernels(trace_of(net, conditions), compiled=True)
    ours = sum(k.in_bytes + k.weight_bytes + k.out_bytes for k in kernels if k.kind != "update")  # no optimiser there
    assert ours == pytest.approx(sum(scheduled.graphs), rel=ALLOWED.get((name, mode), 0.1))
