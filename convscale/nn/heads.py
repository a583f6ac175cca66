"""What stands between the pool and the classifier."""

from __future__ import annotations

from torch import Tensor, nn

from convscale.arch.parts import IDENTITY, HeadSpec, NormSpec
from convscale.nn.activations import activation, is_symbol
from convscale.nn.dressed import HoldsNorms
from convscale.nn.layers import LearnableAffine, conv2d
from convscale.nn.norm import norm_act


class PooledHead(HoldsNorms):
    """A 1x1 convolution, norm and activation of pooled features (N, C) -> (N, C'); of a map (N, C, H, W) where there is
    no pool.

    Args:
        head: says which of them there are.
        in_chs: C.
        norm: kind and constants of the norm.
    """

    def __init__(self, head: HeadSpec, in_chs: int, norm: NormSpec) -> None:
        super().__init__()
        width = head.pooled_width
        self.conv = conv2d(in_chs, width, 1, bias=head.pooled_bias) if width else None
        act = head.activation if width else IDENTITY
        self.norm: nn.Module | None = None
        if head.pooled_norm:
            self.norm = norm_act(
                norm.kind,
                width or in_chs,
                eps=norm.eps,
                momentum=norm.momentum,
                activation=act.kind,
                slope=act.slope,
                keep="output" if width else "input",  # without a convolution its input is a view of what was pooled
            )
        alone = self.norm is None and act.kind != "identity"
        self.act = activation(act.kind, act.slope) if alone else None
        self.affine = LearnableAffine() if act.affine else None

    def forward(self, x: Tensor) -> Tensor:
        pooled = is_symbol(x) or x.ndim == 2
        x = x[:, :, None, None] if pooled else x
        for part in (self.conv, self.norm, self.act, self.affine):
            x = x if part is None else part(x)
        return x.flatten(1) if pooled else x
