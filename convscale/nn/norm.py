"""Normalisation with its activation: BatchNorm, and the in-place kind that keeps one map for the backward pass.

Both kinds have BatchNorm's parameters, buffers and signed weight, so a state dict fits either and `convert_norm` is
exact both ways.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from convscale.arch.spec import NetSpec
from convscale.errors import UserError, nearest
from convscale.nn import sync_cuda
from convscale.nn.activations import ACTIVATIONS, apply_activation, is_symbol
from convscale.nn.kernels.norm import norm_act as norm_operator
from convscale.nn.kernels.norm_twin import sums_dtype
from convscale.nn.kernels.wanted import switched_on
from convscale.nn.layernorm import LayerNorm2d
from convscale.nn.norm_ops import (
    RECOMPUTABLE,
    InPlaceNorm,
    RecomputedNormAct,
    SyncNorm,
    being_traced,
    joint_statistics,
    update_running,
)

SMALLEST_SLOPE = 1e-3
"""The smallest leaky slope that is inverted: below it the output of the negative side is too coarse to tell its input.
"""
NORM_KINDS = ("batchnorm", "inplace")
"""The two forms of batch norm."""
Keep = Literal["output", "input"]


def inverts(activation: str, slope: float) -> bool:
    """Whether InPlaceABN can invert this activation: the identity, or a leaky ReLU with a slope of at least 1e-3."""
    return activation == "identity" or (activation == "leaky_relu" and slope >= SMALLEST_SLOPE)


class _Processes:
    """A process group that a deep copy of its network shares (the group itself can't be copied)."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, object]) -> _Processes:
        return self

    def resolve(self) -> dist.ProcessGroup | None:
        """The group; none given: the one of all processes."""
        return dist.group.WORLD if self.group is None else self.group


class _Norm(_NormBase):
    """What the two kinds share: construction, which statistics count, and normalisation that keeps its input."""

    weight: nn.Parameter
    bias: nn.Parameter
    sync: _Processes | None = None
    keep: Keep = "output"  # what InPlaceABN keeps; BatchNormAct, which keeps its input, remembers it for convert_norm

    def _setup(self, activation: str, slope: float) -> None:
        if activation not in ACTIVATIONS:
            raise UserError(f"activation {activation!r} is unknown{nearest(activation, ACTIVATIONS)}")
        self.activation, self.slope = activation, slope
        self.sync = None

    def _step(self, x: Tensor) -> tuple[bool, float]:
        """Whether the batch's statistics are used, and how far the running ones move (and count the batch)."""
        if is_symbol(x):
            return self.training or self.running_mean is None, self.momentum or 0.0
        if x.dim() != 4 or x.shape[1] != self.num_features:
            raise UserError(f"the norm takes maps (N, {self.num_features}, H, W), got shape {tuple(x.shape)}")
        use_batch = self.training or self.running_mean is None
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        if use_batch and self._group(use_batch) is None and x.shape[0] * x.shape[2] * x.shape[3] == 1:
            raise UserError(
                f"batch statistics need more than one value per channel, got shape {tuple(x.shape)}: use a larger "
                "batch or eval()"
            )
        return use_batch, momentum

    def _group(self, use_batch: bool) -> dist.ProcessGroup | None:
        """The other processes, where statistics are shared with any."""
        if (
            self.sync is None
            or not use_batch
            or not self.training
            or not dist.is_available()
            or not dist.is_initialized()
        ):
            return None
        group = self.sync.resolve()
        return group if dist.get_world_size(group) > 1 else None

    def _running(self) -> tuple[Tensor | None, Tensor | None]:
        """The running statistics to update, or to use; none in training where the layer tracks none."""
        if self.training and not self.track_running_stats:
            return None, None
        return self.running_mean, self.running_var

    def _affine(self) -> tuple[Tensor, Tensor]:
        """Weight and bias; in float32 where they are stored in half precision (``net.bfloat16()``), which is too coarse
        for statistics.
        """
        dtype = sums_dtype(self.weight.dtype)
        return self.weight.to(dtype), self.bias.to(dtype)

    def _lean(
        self, function: type[torch.autograd.Function], x: Tensor, use_batch: bool, momentum: float, *extra: object
    ) -> Tensor:
        """One of norm_ops' functions with this layer's parameters and statistics."""
        weight, bias = self._affine()
        running = self._running()
        stats = [None if s is None else s.to(weight.dtype) for s in running]
        y = function.apply(x, weight, bias, *stats, use_batch, momentum, self.eps, *extra)
        for mine, new in zip(running, stats, strict=True):
            if use_batch and mine is not None and new is not None and new is not mine:
                mine.copy_(new)
        assert isinstance(y, Tensor)
        return y

    def _wants_grad(self, x: Tensor) -> bool:
        """Whether there will be a backward pass that it is ours to arrange: a compiler arranges its own."""
        if is_symbol(x):
            return False
        needed = x.requires_grad or self.weight.requires_grad or self.bias.requires_grad
        return torch.is_grad_enabled() and needed and not being_traced()

    def normalise(self, x: Tensor) -> Tensor:
        """Batch norm without the activation, keeping x (N, C, H, W) for the backward pass."""
        use_batch, momentum = self._step(x)
        group = self._group(use_batch)
        if group is None:
            running_mean, running_var = self._running()
            return F.batch_norm(x, running_mean, running_var, self.weight, self.bias, use_batch, momentum, self.eps)
        return self._normalise_together(x, momentum, group)[0]

    def normalise_with_statistics(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`normalise`, and the mean and inverse standard deviation (C,) it used (without gradient)."""
        use_batch, momentum = self._step(x)
        group = self._group(use_batch)
        if group is not None:
            return self._normalise_together(x, momentum, group)
        running_mean, running_var = self._running()
        if use_batch:
            y, mean, invstd = torch.native_batch_norm(
                x, self.weight, self.bias, running_mean, running_var, True, momentum, self.eps
            )
            return y, mean.detach(), invstd.detach()
        assert running_mean is not None
        assert running_var is not None
        y = F.batch_norm(x, running_mean, running_var, self.weight, self.bias, False, 0.0, self.eps)
        return y, running_mean.clone(), torch.rsqrt(running_var + self.eps)

    def _normalise_together(
        self, x: Tensor, momentum: float, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias = self._affine()
        if sync_cuda.takes(x):
            with torch.no_grad():
                mean, invstd, counts = sync_cuda.joint_statistics(x, self._running(), momentum, self.eps, group)
            y = sync_cuda.SyncNormCuda.apply(x, weight, bias, mean, invstd, counts, self.eps, group)
            assert isinstance(y, Tensor)
            return y, mean, invstd
        with torch.no_grad():
            mean, var, count = joint_statistics(x, group)
            update_running(*self._running(), mean, var, count, momentum)
            mean, invstd = mean.to(weight.dtype), torch.rsqrt(var + self.eps).to(weight.dtype)
        y = SyncNorm.apply(x, weight, bias, mean, invstd, count, group)
        assert isinstance(y, Tensor)
        return y, mean, invstd

    def extra_repr(self) -> str:
        slope = f", slope={self.slope:g}" if self.activation == "leaky_relu" else ""
        return f"{self.num_features}, eps={self.eps:g}, momentum={self.momentum}, activation={self.activation!r}{slope}"


_NormT = TypeVar("_NormT", bound=_Norm)


class BatchNormAct(_Norm, nn.BatchNorm2d):
    """Batch norm, then an activation, in place where the backward pass allows it.

    Args:
        num_features: channels C of the maps (N, C, H, W).
        eps: added to the variance.
        momentum: weight of the new batch in the running statistics; None: their plain average.
        activation: a name from `ACTIVATIONS`.
        slope: of leaky ReLU's negative side.
        lean: keep the norm's input alone where the activation would keep the norm's output besides (SiLU, hard-swish,
            Mish, GELU), and make that output again in the backward pass, which then has no derivative of its own.
        track_running_stats: False: the batch's own statistics in eval mode too.

    Raises:
        UserError: an unknown activation.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        activation: str = "identity",
        slope: float = 0.01,
        *,
        lean: bool = False,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, track_running_stats=track_running_stats)
        self._setup(activation, slope)
        self.lean = lean

    def forward(self, input: Tensor) -> Tensor:
        if self.lean and self.activation in RECOMPUTABLE and self.sync is None and self._wants_grad(input):
            use_batch, momentum = self._step(input)
            act = ACTIVATIONS[self.activation](self.slope, True)
            return self._lean(RecomputedNormAct, input, use_batch, momentum, act, self.activation)
        return apply_activation(self.normalise(input), self.activation, self.slope, inplace=True)


class InPlaceABN(_Norm):
    """Batch norm and activation that keep one map for the backward pass (Rota Bulò et al., CVPR 2018).

    With ``keep="output"`` the output overwrites the input and is all that is kept: a convolution after it keeps the
    same map, so the norm costs nothing. The normalised input is got back as (z - bias) / d with d = sign(w) * max(|w|,
    1e-3) (1e-2 in half precision), so that gradients stay bounded as w nears 0; below that |w| the weight's own
    gradient shrinks with it. A norm that *starts* at weight 0 takes ``keep="input"``: it keeps its input in place of
    its output, which is exact for every weight, and costs the same one map where nothing else keeps the output (before
    a residual addition).

    While the network is being compiled or exported, and where no gradient is wanted, it is plain batch norm and
    activation: a compiler chooses by itself what to keep.

    It is no ``nn.BatchNorm2d``, so that what looks for those passes it over: ``torch.optim.swa_utils.update_bn`` takes
    ``convert_norm(net, "batchnorm")``, whose state dict fits the network itself afterwards.

    Args:
        num_features: channels C of the maps (N, C, H, W).
        eps: added to the variance.
        momentum: weight of the new batch in the running statistics; None: their plain average.
        activation: ``identity`` or ``leaky_relu``.
        slope: of leaky ReLU's negative side, at least 1e-3.
        keep: ``output`` or ``input`` (identity only).
        track_running_stats: False: the batch's own statistics in eval mode too.

    Raises:
        UserError: an activation that can't be inverted, an unknown `keep`, an input that may not be overwritten (a leaf
            that requires grad, a view).
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        activation: str = "identity",
        slope: float = 0.01,
        keep: Keep = "output",
        *,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, track_running_stats=track_running_stats)
        self._setup(activation, slope)
        if not inverts(activation, slope):
            what = f"leaky_relu with slope {slope:g}" if activation == "leaky_relu" else repr(activation)
            raise UserError(
                f"InPlaceABN inverts identity and leaky_relu with a slope of at least {SMALLEST_SLOPE:g}, got {what}"
            )
        if keep not in ("output", "input"):
            raise UserError(f"keep must be 'output' or 'input', got {keep!r}")
        if keep == "input" and activation != "identity":
            raise UserError(f"keep='input' needs activation 'identity', got {activation!r}")
        self.keep = keep
        # Asked once: a compiler that traces the forward pass does not look at the environment.
        self.in_operator = switched_on() is True

    def forward(self, x: Tensor) -> Tensor:
        if self.in_operator and not is_symbol(x) and self.keep == "output" and self._is_compiled(x):
            return self._as_operator(x)
        if self.keep == "input" or not self._wants_grad(x):
            return apply_activation(self.normalise(x), self.activation, self.slope, inplace=True)
        if x.requires_grad:
            _check_overwritable(x)
        use_batch, momentum = self._step(x)
        group = self._group(use_batch)
        slope = self.slope if self.activation == "leaky_relu" else None
        return self._lean(InPlaceNorm, x, use_batch, momentum, slope, group)

    def _is_compiled(self, x: Tensor) -> bool:
        """Whether a compiler is to see one operator, which keeps the output alone."""
        needed = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad or self.bias.requires_grad)
        return needed and torch.compiler.is_compiling() and not torch.compiler.is_exporting()

    def _as_operator(self, x: Tensor) -> Tensor:
        use_batch, momentum = self._step(x)
        if self._group(use_batch) is not None:
            return apply_activation(self.normalise(x), self.activation, self.slope, inplace=True)
        running = self._running()
        slope = self.slope if self.activation == "leaky_relu" else None
        given = (None, None) if use_batch else running
        y, mean, var = norm_operator(x, *self._affine(), *given, self.eps, slope)
        if use_batch:
            with torch.no_grad():
                update_running(*running, mean, var, x.numel() // self.num_features, momentum)
        return y

    def extra_repr(self) -> str:
        return super().extra_repr() + (", keep='input'" if self.keep == "input" else "")


def _check_overwritable(x: Tensor) -> None:
    if x.is_leaf:
        raise UserError(
            "InPlaceABN overwrites its input, and a leaf tensor that requires grad can't be overwritten: pass x.clone()"
        )
    if x._is_view():
        raise UserError(
            f"InPlaceABN overwrites its input, and a view (shape {tuple(x.shape)}) would change the tensor it looks "
            "at: pass x.clone()"
        )


def norm_act(
    kind: str,
    num_features: int,
    *,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    activation: str = "identity",
    slope: float = 0.01,
    keep: Keep = "output",
) -> BatchNormAct | InPlaceABN | LayerNorm2d:
    """A norm of the given kind; ``inplace`` gives a lean BatchNormAct where the activation can't be inverted, or where
    its input is to be kept. ``layernorm`` has no statistics, so no use for ``momentum`` and ``keep``.

    Raises:
        UserError: an unknown kind or activation.
    """
    if kind == "layernorm":
        return LayerNorm2d(num_features, eps, activation=activation, slope=slope)
    if kind not in NORM_KINDS:
        raise UserError(f"norm {kind!r} is unknown{nearest(kind, (*NORM_KINDS, 'layernorm'))}")
    return batch_norm_act(kind, num_features, eps=eps, momentum=momentum, activation=activation, slope=slope, keep=keep)


def batch_norm_act(
    kind: str,
    num_features: int,
    *,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    activation: str = "identity",
    slope: float = 0.01,
    keep: Keep = "output",
) -> BatchNormAct | InPlaceABN:
    """``norm_act`` of the two forms of batch norm."""
    if kind == "inplace" and inverts(activation, slope) and (keep == "output" or activation == "identity"):
        return InPlaceABN(num_features, eps, momentum, activation, slope, keep)
    norm = BatchNormAct(num_features, eps, momentum, activation, slope, lean=kind == "inplace")
    norm.keep = keep
    return norm


def convert_norm(net: nn.Module, to: Literal["batchnorm", "inplace"] = "batchnorm") -> nn.Module:
    """A copy of `net` with its norms of the other kind, and the same outputs; `net` itself stays as it is.

    Going to ``inplace``, a norm whose activation can't be inverted stays BatchNormAct (a lean one), and a bare
    ``nn.BatchNorm2d`` stays too: what follows it is not known, so neither is whether its output may be overwritten; so
    do layer norms. The `spec` of a network built from one says the new kind.

    Raises:
        UserError: no network, or an unknown kind.
    """
    if not isinstance(net, nn.Module):
        raise UserError(f"convert_norm takes a network, got {type(net).__name__}")
    if to not in NORM_KINDS:
        raise UserError(f"to must be 'batchnorm' or 'inplace', got {to!r}")
    net = _replace(copy.deepcopy(net), lambda module: _converted(module, to) if isinstance(module, _Norm) else None)
    for module in net.modules():
        spec, lean = getattr(module, "spec", None), getattr(module, "lean", None)
        if isinstance(spec, NetSpec) and spec.norm.kind in NORM_KINDS:
            set_fields(module, spec=replace(spec, norm=replace(spec.norm, kind=to)))
        if isinstance(lean, bool):
            set_fields(module, lean=to == "inplace")  # beside in-place norms, blocks make again what is cheap to make
    return net


def set_fields(module: nn.Module, **values: object) -> None:
    """Set what a module says of itself; to a type checker a module holds tensors and modules alone."""
    for name, value in values.items():
        setattr(module, name, value)


def _replace(net: nn.Module, new_for: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """`net` with each module for which `new_for` gives another replaced by it; one in two places stays one."""
    own = new_for(net)
    if own is not None:
        return own
    new: dict[nn.Module, nn.Module | None] = {}
    for parent in list(net.modules()):
        for name, child in list(parent._modules.items()):
            if child is None:
                continue
            if child not in new:
                new[child] = new_for(child)
            parent._modules[name] = new[child] or child
    return net


def _converted(old: _Norm, to: str) -> _Norm:
    if to == "inplace" and isinstance(old, InPlaceABN):
        return old
    new = batch_norm_act(
        to,
        old.num_features,
        eps=old.eps,
        momentum=old.momentum,
        activation=old.activation,
        slope=old.slope,
        keep=old.keep,
    )
    new.sync = old.sync
    return _take_over(new, old)


def with_slope(old: BatchNormAct | InPlaceABN, slope: float) -> BatchNormAct | InPlaceABN:
    """A norm with another leaky slope in place of ``old``: same parameters, buffers, mode and processes; a lean batch
    norm where an in-place one could not invert it, which becomes one again with a slope that it can.
    """
    kind = "inplace" if isinstance(old, InPlaceABN) or old.lean else "batchnorm"
    new = batch_norm_act(
        kind,
        old.num_features,
        eps=old.eps,
        momentum=old.momentum,
        activation=old.activation,
        slope=slope,
        keep=old.keep,
    )
    new.sync = old.sync
    return _take_over(new, old)


def _take_over(new: _NormT, old: _NormBase) -> _NormT:
    """`new` with the parameters, buffers and mode of `old`."""
    new.weight, new.bias = old.weight, old.bias
    new.track_running_stats = old.track_running_stats
    new.running_mean, new.running_var, new.num_batches_tracked = (
        old.running_mean,
        old.running_var,
        old.num_batches_tracked,
    )
    return new.train(old.training)


def convert_sync(net: nn.Module, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Share batch statistics over the processes of `group` (None: all) in every norm of `net`; changes it in place and
    returns it.

    A bare ``nn.BatchNorm2d`` becomes BatchNormAct, its parameters staying the same objects; norms of other libraries
    stay as they are. Works with any backend, gloo on a CPU included. While no process group is initialised, and in eval
    mode, each process is on its own. ``nn.SyncBatchNorm.convert_sync_batchnorm`` does the same for batch norms of our
    networks, but passes over in-place ones.
    """
    net = _replace(net, _bare_converted)
    for module in net.modules():
        if isinstance(module, _Norm):
            module.sync = _Processes(group)
    return net


def synchronised(old: BatchNormAct, plain: nn.SyncBatchNorm) -> BatchNormAct:
    """``old`` with the parameters, statistics, mode and processes of the norm that a converter made of it."""
    new = BatchNormAct(plain.num_features, plain.eps, plain.momentum, old.activation, old.slope, lean=old.lean)
    new.keep, new.sync = old.keep, _Processes(plain.process_group)
    return _take_over(new, plain)


def _bare_converted(old: nn.Module) -> BatchNormAct | None:
    """A plain ``nn.BatchNorm2d`` as BatchNormAct, with its own parameters and buffers."""
    if type(old) is not nn.BatchNorm2d or not old.affine:
        return None
    new = BatchNormAct(old.num_features, old.eps, old.momentum)
    return _take_over(new, old)
