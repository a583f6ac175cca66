"""Layer norm over the channels of each pixel of a map."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from convscale.nn.activations import apply_activation


class LayerNorm2d(nn.LayerNorm):
    """(N, C, H, W) or (N, C) to the same shape: each pixel's C values normalised, scaled and shifted (Ba et al., arXiv
    1607.06450; ConvNeXt, arXiv 2201.03545, section 2.6), then an activation.

    The result lies in memory with channels last, as it is computed.

    Args:
        channels: C.
        eps: added to the variance.
        activation: a name from `ACTIVATIONS`.
        slope: of leaky ReLU's negative side.
    """

    def __init__(self, channels: int, eps: float = 1e-6, *, activation: str = "identity", slope: float = 0.01) -> None:
        super().__init__(channels, eps=eps)
        self.activation, self.slope = activation, slope

    def forward(self, input: Tensor) -> Tensor:
        flat = input if input.ndim == 2 else input.permute(0, 2, 3, 1)
        y = F.layer_norm(flat, self.normalized_shape, self.weight, self.bias, self.eps)
        y = apply_activation(y, self.activation, self.slope, inplace=False)
        return y if input.ndim == 2 else y.permute(0, 3, 1, 2)
