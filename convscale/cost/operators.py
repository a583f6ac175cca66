"""What an ATen operator is: its kind, its multiply-accumulates, and what CUDA's autocast does to it.

Kinds decide which kernels a GPU would run. Names are those that reach the dispatcher below autograd, in-place
underscores and ``_backward`` stripped.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

FREE = frozenset({"view", "alloc"})
"""Kinds that run no kernel: a view is arithmetic on strides, an allocation comes from a pool."""

_NAMES = {
    "conv": """
        convolution _convolution convolution_overrideable cudnn_convolution cudnn_convolution_transpose
        mkldnn_convolution conv2d conv1d conv3d conv_transpose2d _slow_conv2d_forward _conv_depthwise2d
        thnn_conv2d
    """,
    "linear": """
        mm addmm bmm baddbmm mv addmv dot linear _scaled_dot_product_flash_attention
        _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
        _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_fused_attention_overrideable
        _scaled_dot_product_attention_math scaled_dot_product_attention
    """,
    "norm": """
        native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional
        _native_batch_norm_legit_no_training _batch_norm_with_update batch_norm cudnn_batch_norm
        native_layer_norm native_group_norm _fused_rms_norm rms_norm layer_norm group_norm instance_norm
        native_batch
    """,
    "softmax": """
        _softmax _safe_softmax _log_softmax softmax log_softmax
    """,
    "reduce": """
        mean sum var std var_mean std_mean amax amin aminmax max min argmax argmin prod norm linalg_vector_norm
        logsumexp any all cumsum cumprod nll_loss_forward nll_loss2d_forward nll_loss nll_loss2d topk sort
        nansum median count_nonzero mse_loss
    """,
    "pool": """
        max_pool2d_with_indices max_pool2d avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d
        adaptive_max_pool2d avg_pool1d avg_pool3d max_pool3d_with_indices adaptive_avg_pool1d
        _adaptive_avg_pool3d adaptive_avg_pool3d adaptive_max_pool3d fractional_max_pool2d
    """,
    "copy": """
        clone contiguous cat stack constant_pad_nd reflection_pad1d reflection_pad2d replication_pad2d
        replication_pad1d copy index index_select gather scatter scatter_add index_put _unsafe_index
        _unsafe_index_put index_add roll flip repeat repeat_interleave pixel_shuffle pixel_unshuffle im2col
        col2im upsample_nearest2d _upsample_nearest_exact2d upsample_bilinear2d upsample_bicubic2d
        _upsample_bilinear2d_aa _upsample_bicubic2d_aa upsample_nearest1d upsample_linear1d embedding
        embedding_dense slice select diagonal as_strided slice_scatter select_scatter grid_sampler_2d
        channel_shuffle native_channel_shuffle tril triu masked_select nonzero one_hot unfold take _pad_circular
        expand_copy view_copy permute_copy split_with_sizes_copy affine_grid_generator
    """,
    "cast": """
        _to_copy to
    """,
    "random": """
        bernoulli rand randn randint randperm rand_like randn_like randint_like uniform normal native_dropout
        dropout random exponential _fused_dropout multinomial
    """,
    "alloc": """
        empty empty_like new_empty empty_strided new_empty_strided _empty_affine_quantized resize
    """,
    "view": """
        _unsafe_view _reshape_alias view reshape detach alias lift_fresh set unbind unsafe_split
        unsafe_split_with_sizes
    """,
    "pointwise": """
        zeros zeros_like new_zeros ones ones_like new_ones full full_like new_full fill zero arange linspace
        scalar_tensor eye hardswish hardtanh leaky_relu hardsigmoid elu mish _prelu_kernel prelu softplus glu
        threshold rrelu_with_noise masked_fill where relu6 native silu relu add sub mul div rsub pow sqrt rsqrt
        neg exp log abs sign clamp clamp_min clamp_max sigmoid tanh gelu erf softshrink hardshrink log_sigmoid
        log_sigmoid_forward addcmul addcdiv lerp eq ne gt lt ge le logical_not logical_and logical_or
        bitwise_not isnan isfinite nan_to_num floor ceil round trunc sin cos minimum maximum celu square
        reciprocal lift remainder fmod floor_divide celu selu
    """,
}
_KIND_OF = {name: kind for kind, names in _NAMES.items() for name in names.split()}

_LOW_PRECISION = """
    conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d convolution mm addmm bmm addbmm
    baddbmm mv addmv addr matmul __matmul__ __rmatmul__ linear prelu einsum scaled_dot_product_attention
    multi_head_attention_forward chain_matmul linalg_vecdot linalg_multi_dot lstm_cell gru_cell rnn_tanh_cell
    rnn_relu_cell
"""
_FULL_PRECISION = """
    acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal __rdiv__ __rtruediv__ rsqrt sinh tan pow __pow__
    __rpow__ softplus layer_norm native_layer_norm rms_norm group_norm dist pdist cdist renorm logsumexp interpolate
    upsample prod softmax log_softmax softmin cumprod cumsum sum norm vector_norm linalg_vector_norm matrix_norm
    linalg_matrix_norm linalg_norm frobenius_norm nuclear_norm normalize cosine_similarity nll_loss nll_loss2d
    cross_entropy mse_loss l1_loss smooth_l1_loss huber_loss kl_div binary_cross_entropy_with_logits poisson_nll_loss
    cosine_embedding_loss hinge_embedding_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss
    triplet_margin_loss multi_margin_loss
"""
_WIDEST = """
    cat concat stack addcdiv addcmul atan2 bilinear grid_sample grid_sampler index_put scatter_add tensordot cross
    linalg_cross dot vdot
"""
_POLICY_OF = {
    name: policy
    for policy, names in (("low", _LOW_PRECISION), ("full", _FULL_PRECISION), ("widest", _WIDEST))
    for name in names.split()
}


def base_name(func: torch._ops.OpOverload) -> str:
    """The operator's name without overload, in-place underscore and ``_backward``: ``aten::relu_`` gives ``relu``."""
    name = func._schema.name.split("::")[-1]
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return name.removesuffix("_backward_data").removesuffix("_backward")


def kind_of(func: torch._ops.OpOverload) -> str:
    """The kind of an operator: conv, linear, norm, softmax, reduce, pool, copy, cast, random, pointwise, view, alloc or
    unknown.
    """
    name = base_name(func)
    schema = func._schema
    aliased = [r.alias_info for r in schema.returns if r.alias_info is not None]
    if aliased and not any(info.is_write for info in aliased) and name not in ("_to_copy", "contiguous"):
        return "view"
    if name in _KIND_OF:
        return _KIND_OF[name]
    for kind in ("pointwise", "reduction"):
        if (tag := getattr(torch.Tag, kind, None)) is not None and tag in func.tags:
            return "reduce" if kind == "reduction" else kind
    return "unknown"


def autocast_policy(name: str) -> str:
    """CUDA's autocast rule for a torch function of that name: ``low``, ``full``, ``widest`` or ``none``.

    Source: PyTorch's ``ATen/autocast_mode.h``, the lists for CUDA, and its "Autocast Op Reference".
    """
    return _POLICY_OF.get(name, "none")


def macs_of(name: str, args: Sequence[Any], out: Any) -> int:
    """Multiply-accumulates of one matrix operator's call, forward only; 0 for anything else.

    A convolution costs (outputs) x (input channels per group) x (kernel size); a transposed one (inputs) x (output
    channels per group) x (kernel size).
    """
    if name in ("mm", "mv", "dot"):
        return prod(args[0].shape) * (args[1].shape[-1] if args[1].dim() > 1 else 1)
    if name in ("addmm", "addmv"):
        return prod(args[1].shape) * (args[2].shape[-1] if args[2].dim() > 1 else 1)
    if name == "bmm":
        return prod(args[0].shape) * args[1].shape[-1]
    if name == "baddbmm":
        return prod(args[1].shape) * args[2].shape[-1]
    if name == "linear":
        return prod(args[0].shape) * args[1].shape[0]
    if "scaled_dot_product" in name:
        *batch, queries, head = args[0].shape
        return prod(batch) * queries * args[1].shape[-2] * (head + args[2].shape[-1])
    if _KIND_OF.get(name) == "conv":
        x, weight = args[0], args[1]
        transposed = (
            name.startswith("conv_transpose") or name.endswith("_transpose") or (len(args) > 6 and args[6] is True)
        )
        positions = x.shape[0] * prod(x.shape[2:]) if transposed else prod(out.shape[:1]) * prod(out.shape[2:])
        return positions * prod(weight.shape)
    return 0
