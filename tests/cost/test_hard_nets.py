"""Networks that a pass must not trip over: checkpointed, lazy, caching, scripted, in several threads."""

from __future__ import annotations

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from convscale import create_model, saved_bytes
from convscale.cost.counting import count
from convscale.cost.fusion import launched_kernels
from convscale.cost.operators import autocast_policy, kind_of
from convscale.errors import UserError
from tests.cost.helpers import trace


class Chain(nn.Module):
    """Four 1x1 convolutions, ReLUs between; the middle part is checkpointed on request."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1, bias=False)
        inner = (nn.Conv2d(8, 8, 1, bias=False) for _ in range(2))
        self.middle = nn.Sequential(nn.ReLU(), next(inner), nn.ReLU(), next(inner), nn.ReLU())
        self.last = nn.Conv2d(8, 4, 1, bias=False)
        self.checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.checkpointed:
            x = torch.utils.checkpoint.checkpoint(self.middle, x, use_reentrant=False)
        else:
            x = self.middle(x)
        return self.last(x)


@pytest.mark.parametrize(("precision", "size", "casts"), [("fp32", 4, 0), ("amp", 2, 2 * 64 * 2), ("fp16", 2, 0)])
def test_checkpointing_by_hand(precision: str, size: int, casts: int) -> None:
    """The middle part runs once more; kept is what comes in, in the place of what two of its ReLUs give (under autocast
    and of the casts of its weights).
    """
    net = Chain()
    plain = count(net, 4, 2, mode="train", precision=precision)
    net.checkpointed = True
    lean = count(net, 4, 2, mode="train", precision=precision)
    assert lean.macs - plain.macs == 2 * 16 * 8 * 8
    assert lean.activations == plain.activations
    assert plain.saved_bytes - lean.saved_bytes == 2 * 16 * 8 * size + casts


class Functional(nn.Module):
    """A function of the network's own is checkpointed: between its layers it calls a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1, bias=False)
        self.inner = nn.Conv2d(8, 8, 1, bias=False)

    def middle(self, x: Tensor) -> Tensor:
        return self.inner(torch.softmax(self.inner(x), 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.middle, self.first(x), use_reentrant=False)


@pytest.mark.parametrize("precision", ["fp32", "amp"])
def test_a_checkpointed_function_is_run_again_too(precision: str) -> None:
    """The first product and the softmax, and no more: what the second product gives, no gradient needs."""
    traced = trace(Functional(), 4, mode="train", precision=precision)
    again = [(op.name, op.scope) for op in traced.operators if op.phase == "recompute"]
    assert [name for name, _ in again if name in ("convolution", "_softmax")] == ["convolution", "_softmax"]
    assert ("convolution", "inner") in again
    halves = {use.itemsize for op in traced.operators if op.name == "convolution" for use in op.inputs}
    assert halves == ({2} if precision == "amp" else {4})


def test_what_is_made_anew_is_forward_work_to_the_compiler_as_well() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))

    class Lean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net
            self.end = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.end(torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False))

    traced = trace(Lean(), 8, mode="train", precision="fp32")
    for compiled in (False, True):
        phases = [k.phase for k in launched_kernels(traced, compiled=compiled) if k.scope.startswith("net")]
        assert phases.count("forward") == len(phases), compiled


def test_what_checkpointing_runs_again_is_told_by_phase_and_scope() -> None:
    net = Chain()
    net.checkpointed = True
    traced = trace(net, 4, mode="train", precision="amp")
    again = [(op.name, op.scope, op.product) for op in traced.operators if op.phase == "recompute"]
    assert again == [
        ("relu", "middle.0", ""),
        ("_to_copy", "middle.1", ""),  # autocast's cache is left behind with the forward pass
        ("convolution", "middle.1", ""),
        ("relu", "middle.2", ""),
        ("_to_copy", "middle.3", ""),
        ("convolution", "middle.3", ""),
        ("relu", "middle.4", ""),
    ]
    backward = [op for op in traced.operators if op.phase == "backward"]
    assert {op.scope for op in backward} == {""}
    assert [op.product for op in backward if op.kind == "conv"] == [*3 * ["input", "weight"], "weight"]


@pytest.mark.parametrize("precision", ["fp32", "amp"])
def test_checkpointed_networks_of_ours_and_of_timms(precision: str) -> None:
    timm = pytest.importorskip("timm")
    for net in (create_model("resnet18"), timm.create_model("resnet18")):
        plain = count(net, 32, 2, mode="train", precision=precision)
        net.set_grad_checkpointing(True)
        lean = count(net, 32, 2, mode="train", precision=precision)
        assert lean.macs > 1.1 * plain.macs
        assert lean.saved_bytes < 0.8 * plain.saved_bytes
        assert lean.optimizer_bytes == plain.optimizer_bytes


def test_two_threads_count_as_one_does() -> None:
    nets = [Chain(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))]
    alone = [count(net, 8, mode="train").operators for net in nets]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            got = list(pool.map(lambda net: count(net, 8, mode="train").operators, nets * 2))
            assert got == alone * 2


def test_modules_that_other_threads_run_are_no_scopes_of_ours() -> None:
    """Another thread enters a module in ours and leaves it after: its end took our path off."""
    entered, leave = threading.Event(), threading.Event()

    class Elsewhere(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            entered.set()
            assert leave.wait(10)
            return x

    class Starts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=Elsewhere(), args=(one,))
            thread.start()
            assert entered.wait(10)
            started.append(thread)
            return x.sigmoid()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.starts = Starts()

        def forward(self, x: Tensor) -> Tensor:
            x = self.starts(x).relu()
            leave.set()
            started[0].join()
            return x.tanh()

    started: list[threading.Thread] = []
    one = torch.ones(1)
    scopes = {op.name: op.scope for op in trace(Net(), 4).operators}
    assert scopes == {"sigmoid": "starts", "relu": "", "tanh": ""}


def test_training_is_counted_in_inference_mode() -> None:
    wanted = count(Chain(), 4, mode="train")
    outside = saved_bytes(Chain(), 4)
    with torch.inference_mode():
        assert count(Chain(), 4, mode="train") == wanted
        assert saved_bytes(Chain(), 4) == outside


@dataclass
class Answer:
    logits: Tensor
    name: str = "answer"


class Answers(Chain):
    def forward(self, x: Tensor) -> Answer:  # type: ignore[override]
        return Answer(super().forward(x))


def test_a_dataclass_as_the_output_is_seen() -> None:
    assert count(Answers(), 4, mode="train").macs == count(Chain(), 4, mode="train").macs


def test_training_that_reaches_no_weight_is_refused() -> None:
    class Hides(Chain):
        def forward(self, x: Tensor) -> object:  # type: ignore[override]
            return object() if super().forward(x) is not None else None

    class Cuts(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated; networks that use it are still about
        scripted = torch.jit.script(nn.Conv2d(3, 4, 3))
    for net in (Hides(), Cuts(), nn.Sequential(scripted)):
        with pytest.raises(UserError, match=r"^\w+ has weights to train, but nothing that it gives depends on them"):
            count(net, 8, mode="train")
        assert count(net, 8).macs > 0
    assert count(Chain().requires_grad_(False), 8, mode="train").saved_bytes == 0  # nothing to train is no mistake


def test_what_a_forward_pass_keeps_is_forgotten() -> None:
    class Caches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.grid: Tensor | None = None
            self.by_size: dict[int, Tensor] = {}
            self.seen = [0]
            self.nested: dict[str, dict[int, Tensor]] = {"grids": {}}
            self.register_buffer("mask", None, persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            if self.grid is None:
                self.grid = self.mask = torch.ones(x.shape[-2:], device=x.device)
                self.late = self.grid
            self.seen.append(1)
            self.seen[0] += 1
            grid = self.by_size.setdefault(x.shape[-1], self.grid)
            grid = self.nested["grids"].setdefault(x.shape[-1], grid)
            return self.conv(x) * grid * self.mask

    net = Caches()
    by_size, seen = net.by_size, net.seen
    for mode in ("infer", "train"):
        count(net, 8, mode=mode)
        assert net.grid is net.mask is None
        assert net.by_size is by_size == {}
        assert net.seen is seen == [0]
        assert net.nested == {"grids": {}}
        assert not hasattr(net, "late")
    assert net(torch.zeros(1, 3, 8, 8)).shape == (1, 4, 8, 8)


def test_lazy_layers_are_asked_to_run_once() -> None:
    net = nn.Sequential(nn.LazyConv2d(8, 3))
    for ask in (lambda: count(net, 32), lambda: trace(net, 32, channels=3), lambda: saved_bytes(net, 32)):
        with pytest.raises(UserError, match=r"^Sequential has lazy layers, .*; run it once on a real batch first$"):
            ask()
    net(torch.zeros(1, 3, 8, 8))
    assert count(net, 8).macs == 36 * 8 * 27


def test_saved_bytes_says_in_one_line_what_a_network_can_not() -> None:
    with pytest.raises(
        UserError, match=r"^Sequential can not be run at 2x2 px: Calculated padded input size"
    ) as caught:
        saved_bytes(nn.Sequential(nn.Conv2d(3, 4, 3)), 2)
    assert "\n" not in str(caught.value)
    net = Chain()
    net.lock = threading.Lock()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError, match=r"^Chain can not be copied: cannot pickle"):
        saved_bytes(net, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_type_that_a_network_is_kept_in_does_not_matter(dtype: torch.dtype) -> None:
    for precision in ("fp32", "amp", "fp16"):
        wanted = count(Chain(), 4, mode="train", precision=precision)
        assert count(Chain().to(dtype), 4, mode="train", precision=precision) == wanted


@pytest.mark.parametrize(
    ("names", "policy"),
    [
        ("addbmm addr linalg_vecdot linalg_multi_dot lstm_cell gru_cell conv2d", "low"),
        ("rms_norm __rdiv__ __rtruediv__ dist renorm soft_margin_loss triplet_margin_loss reciprocal", "full"),
        ("bilinear atan2 vdot", "widest"),
        ("add div", "none"),
    ],
)
def test_autocasts_lists_are_cudas(names: str, policy: str) -> None:
    """ATen/autocast_mode.h of torch 2.14."""
    assert {name: autocast_policy(name) for name in names.split()} == dict.fromkeys(names.split(), policy)


def test_one_over_a_half_map_is_single_precision_under_autocast() -> None:
    class Inverts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return 1 / self.conv(x)

    op = next(op for op in trace(Inverts(), 4, precision="amp").operators if op.name == "reciprocal")
    assert op.inputs[0].itemsize == op.outputs[0].itemsize == 4


def test_kinds_of_softmaxs_gradient_and_of_splits() -> None:
    aten = torch.ops.aten
    assert kind_of(aten._softmax_backward_data.default) == "softmax"
    assert kind_of(aten._log_softmax_backward_data.default) == "softmax"
    assert kind_of(aten.unsafe_split.Tensor) == "view"
    net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Softmax(1), nn.LogSoftmax(1))
    traced = trace(net, 4, mode="train")
    assert not traced.unsupported
    gradients = [op for op in traced.operators if op.kind == "softmax" and op.phase == "backward"]
    assert [(op.name, op.read_bytes, op.written_bytes) for op in gradients] == [
        ("_log_softmax", 2 * 4 * 4 * 16, 4 * 4 * 16),  # the gradient and the output in, the gradient out
        ("_softmax", 2 * 4 * 4 * 16, 4 * 4 * 16),
    ]
