"""Scores of a network that was not trained: what it costs a second to ask, to choose what to train first.

``size``: the logarithm of the parameters. ``naswot``: how differently images switch its activations (Mellor et al.,
arXiv 2006.04647, section 4). ``zico``: how steady its gradients are over batches (Li et al., arXiv 2301.11300, section
3.3). ``zen``: how strongly its map answers to a small change of its input (Lin et al., arXiv 2102.01063, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from convscale.arch.spec import NetSpec
from convscale.errors import UserError, check_text
from convscale.nn.net import create_model
from convscale.nn.norm import BatchNormAct, InPlaceABN

SCORES = ("size", "naswot", "zico", "zen")
IMAGES = 16
"""In a batch of noise."""
_ALPHA = 0.01
"""Of Zen's noise on its input (section 3.2)."""
_aten = torch.ops.aten
_SWITCHES = {
    *(_aten.relu, _aten.relu_, _aten.leaky_relu, _aten.leaky_relu_, _aten.hardtanh, _aten.hardtanh_),
    *(_aten.silu, _aten.silu_, _aten.hardswish, _aten.hardswish_, _aten.gelu),
}
"""Activations; a positive output is a positive input to each."""


def zero_cost(
    name: str,
    spec: NetSpec,
    *,
    batches: Sequence[tuple[Tensor, Tensor]] | None = None,
    num_classes: int = 10,
    in_chans: int = 3,
    seed: int = 0,
) -> float:
    """A score of a fresh network; the higher, the better it may become.

    Args:
        name: one of ``SCORES``.
        spec: the network, at its own size.
        batches: (normalised images float (N, C, H, W), labels int64 (N,)), at least two for ``zico``; None: noise.
        num_classes: of its head.
        in_chans: channels of its images.
        seed: of weights and noise.

    Raises:
        UserError: an unknown name (the nearest are given).
    """
    check_text("zero-cost score", name, SCORES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = create_model(spec, num_classes=num_classes, in_chans=in_chans)
        if name == "size":
            return math.log(sum(value.numel() for value in net.parameters()))
        given = batches or [
            (torch.randn(IMAGES, in_chans, spec.input.size, spec.input.size), torch.arange(IMAGES) % num_classes)
            for _ in range(2)
        ]
        if name == "naswot":
            return naswot(net, given[0][0])
        if name == "zico":
            return zico(net, given)
        return zen(net, torch.randn_like(given[0][0]))


class _Codes(TorchDispatchMode):
    """Watches every activation, whoever wrote the network."""

    def __init__(self, images: int) -> None:
        super().__init__()
        self.kernel = torch.zeros(images, images, dtype=torch.float64)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in _SWITCHES and out.shape[0] == len(self.kernel):
            code = (out > 0).flatten(1).to(torch.float32)
            self.kernel += (code @ code.T + (1 - code) @ (1 - code).T).double()
        return out


def naswot(net: nn.Module, images: Tensor) -> float:
    """The logarithm of the determinant of K, where K_ij counts the activations that two images switch alike.

    Args:
        net: any network.
        images: float (N, C, H, W).

    Returns:
        Minus infinity where two images switch all alike, or nothing switches.
    """
    codes = _Codes(len(images))
    with torch.no_grad(), _training(net), codes:
        net(images)
    sign, log = torch.linalg.slogdet(codes.kernel)
    return float(log) if sign > 0 else -math.inf


def zico(net: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Over layers, the sum of log(sum over weights of mean(|g|) / deviation(|g|)), g the gradients of the batches.

    Args:
        net: any network.
        batches: (images float (N, C, H, W), labels int64 (N,)), at least two.

    Raises:
        UserError: fewer than two batches.
    """
    if len(batches) < 2:
        raise UserError(f"zico has {len(batches)} batches; it needs at least 2, as it compares gradients")
    layers = {name: m.weight for name, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    with _training(net):
        for images, labels in batches:
            loss = F.cross_entropy(net(images), labels)
            grads = torch.autograd.grad(loss, list(layers.values()), allow_unused=True)
            for name, grad in zip(layers, grads, strict=True):
                if grad is not None:
                    found[name].append(grad.detach().abs().flatten())
    total = 0.0
    for grads in found.values():
        if not grads:
            continue
        stacked = torch.stack(grads).double()
        spread = stacked.std(0, correction=0)
        steady = float((stacked.mean(0)[spread > 0] / spread[spread > 0]).sum())
        total += math.log(steady) if steady > 0 else 0.0
    return total


def zen(net: nn.Module, noise: Tensor) -> float:
    """log(mean over images of |f(x) - f(x + 0.01 e)|) + sum over norms of log(root of the mean variance), where f is
    the last map of the network with normal weights. Residual connections, which the paper takes out, stay.

    Args:
        net: a network of ours, whose weights are drawn anew.
        noise: float (N, C, H, W), standard normal.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    features = getattr(net, "forward_features", net)
    scales: list[float] = []

    def watch(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        variance = inputs[0].float().var((0, 2, 3), correction=0).mean()
        scales.append(0.5 * math.log(max(float(variance), 1e-30)))

    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d | BatchNormAct | InPlaceABN)]
    hooks = [module.register_forward_pre_hook(watch) for module in norms]
    with torch.no_grad(), _training(net):
        plain = features(noise)
        for hook in hooks:
            hook.remove()
        moved = features(noise + _ALPHA * torch.randn_like(noise))
    change = float((plain - moved).flatten(1).abs().sum(1).mean())
    return math.log(max(change, 1e-30)) + sum(scales)


@contextmanager
def _training(net: nn.Module) -> Iterator[None]:
    """While open, norms go by their batch."""
    before = net.training
    net.train()
    try:
        yield
    finally:
        net.train(before)
