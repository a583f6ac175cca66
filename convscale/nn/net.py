"""One builder for all families: a NetSpec becomes a network with timm's conventions."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from typing import Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from convscale.arch.block import StageSpec
from convscale.arch.spec import NetSpec
from convscale.arch.tags import find_tag
from convscale.arch.zoo import as_spec, get_tag
from convscale.errors import UserError, check_flag, check_number, check_path, check_text, check_whole
from convscale.nn.activations import is_symbol
from convscale.nn.blocks import Block, ConvNormAct, build_block
from convscale.nn.decoder import MLDecoder
from convscale.nn.features import FeatureInfo, resolve_indices
from convscale.nn.heads import PooledHead
from convscale.nn.layers import POOLS, GlobalPool, SpaceToDepth
from convscale.nn.norm import BatchNormAct, InPlaceABN
from convscale.nn.stems import make_stem

NormKind = Literal["inplace", "batchnorm"]
HeadKind = Literal["gap", "ml_decoder"]


class Trunk(nn.Module):
    """Stem and stages: (N, in_chans, H, W) -> feature maps."""

    def __init__(
        self, spec: NetSpec, *, in_chans: int = 3, drop_path_rate: float = 0.0, num_stages: int | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.in_chans = in_chans
        self.grad_checkpointing = False
        self.space_to_depth = SpaceToDepth(spec.stem.stride) if spec.stem.kind == "space_to_depth" else None
        self.stem = make_stem(spec, in_chans)
        self.stem_pool = nn.MaxPool2d(3, 2, 1) if spec.stem.pool else None
        self.stages = nn.Sequential()
        in_chs, index, total = spec.stem.widths[-1], 0, sum(spec.depths)
        for stage in spec.stages[:num_stages]:
            self.stages.append(_stage(spec, stage, in_chs, drop_path_rate, index, total))
            in_chs, index = stage.width, index + stage.depth

    def forward_taps(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The last map and all feature taps, shallowest first."""
        self._check_input(x)
        taps = []
        x = self.stem(x if self.space_to_depth is None else self.space_to_depth(x))
        if self.spec.stem.tap:
            taps.append(x)
        if self.stem_pool is not None:
            x = self.stem_pool(x)
        for spec, stage in zip(self.spec.stages, self.stages, strict=False):
            for block in stage:  # type: ignore[attr-defined] - a stage is an nn.Sequential
                x = (
                    _run_checkpointed(block, x)
                    if self.grad_checkpointing and self.training and torch.is_grad_enabled()
                    else block(x)
                )
            if spec.tap:
                taps.append(x)
        return x, taps

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in backward instead of keeping its maps; statistics still take each batch once."""
        self.grad_checkpointing = check_flag("enable", enable)

    def group_matcher(self, coarse: bool = False) -> dict[str, str | list[tuple[str, tuple[int] | None]]]:
        """Regular expressions that sort parameters into layers, for layer-wise learning rates (timm's form)."""
        fine = [(r"^stages\.(\d+)\.(\d+)", None), (r"^(?:head|pooled)\b", (99999,))]
        blocks = r"^stages\.(\d+)" if check_flag("coarse", coarse) else fine
        return {"stem": r"^stem", "blocks": blocks}

    def _check_input(self, x: Tensor) -> None:
        if torch.compiler.is_compiling() or is_symbol(x):
            return  # sizes may be symbols there; the layers guard them
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise UserError(f"input has shape {tuple(x.shape)}; {self.spec.name} takes (N, {self.in_chans}, H, W)")
        for side in x.shape[2:]:
            self.spec.check_size(int(side))


class ConvNet(Trunk):
    """A classification network: (N, in_chans, H, W) -> (N, num_classes).

    Children: ``stem``, ``stages``, ``head`` (the 1x1 convolution of mobile nets, else nothing), ``global_pool``,
    ``pooled`` (what stands behind the pool, else nothing), ``head_drop``, ``classifier``. Made by ``create_model``.
    """

    def __init__(
        self,
        spec: NetSpec,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__(spec, in_chans=in_chans, drop_path_rate=drop_path_rate)
        last, head = spec.stages[-1].width, spec.head
        self.head = (
            ConvNormAct(last, head.width, norm=spec.norm, act=head.activation, padding=spec.padding)
            if head.width
            else None
        )
        self.num_features, self.head_hidden_size = spec.map_width, spec.num_features
        behind = (head.pooled_width or head.pooled_norm) and head.kind == "gap"
        self.pooled = PooledHead(head, spec.map_width, spec.norm) if behind else None
        self.feature_info = FeatureInfo.of(spec)
        self.drop_rate = drop_rate
        self.head_drop = nn.Dropout(drop_rate) if drop_rate else None
        self._set_classifier(num_classes, global_pool)
        self.default_cfg = self.pretrained_cfg = _pretrained_cfg(spec, num_classes, in_chans)
        initialise(self, spec)

    def _set_classifier(self, num_classes: int, global_pool: str) -> None:
        check_text("global_pool", global_pool, POOLS)
        check_whole("num_classes", num_classes, least=0)
        if global_pool == "" and num_classes:
            raise UserError(
                "global_pool is '' (no pooling), which leaves nothing to classify; use num_classes=0 with it"
            )
        pool = GlobalPool(global_pool)
        if self.pooled is not None and pool.feat_mult() != 1:
            raise UserError(
                f"global_pool is {global_pool!r}; {self.spec.name} has a layer behind the pool that takes one value "
                "per channel: avg, max or avgmax"
            )
        head = self.spec.head
        if head.kind == "ml_decoder" and global_pool != "avg":
            raise UserError(f"global_pool is {global_pool!r}; an ml_decoder head has no pool, so leave it out")
        self.num_classes = num_classes
        self.global_pool = pool
        if not num_classes:
            self.classifier: nn.Module = nn.Identity()
        elif head.kind == "ml_decoder":
            self.classifier = MLDecoder(
                self.num_features, num_classes, width=head.decoder_width, groups=head.decoder_groups
            )
        else:
            self.classifier = nn.Linear(self.head_hidden_size * pool.feat_mult(), num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> the last map (N, num_features, h, w), before pooling."""
        x, _ = self.forward_taps(x)
        return x if self.head is None else self.head(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map -> logits (N, num_classes), or with ``pre_logits`` the features that the classifier takes (N,
        head_hidden_size); of an ml_decoder head what its queries found (N, groups, head_hidden_size).
        """
        if isinstance(self.classifier, MLDecoder):
            x = x if self.head_drop is None else self.head_drop(x)
            return self.classifier.decode(x) if pre_logits else self.classifier(x)
        x = self.global_pool(x)
        if self.pooled is not None:
            x = self.pooled(x)
        if self.head_drop is not None:
            x = self.head_drop(x)
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The last map and chosen feature taps (timm's signature).

        Args:
            x: (N, in_chans, H, W).
            indices: taps by index, negative from the end; an int: the last that many; None: all.
            norm: ignored, maps are normalised already.
            stop_early: ignored with a last map asked for; the taps are the same.
            output_fmt: ``NCHW``, the only one.
            intermediates_only: only the taps.
        """
        if output_fmt != "NCHW":
            raise UserError(f"output_fmt is {output_fmt!r}; it must be 'NCHW'")
        for name, value in (("norm", norm), ("stop_early", stop_early), ("intermediates_only", intermediates_only)):
            check_flag(name, value)
        wanted = resolve_indices(indices, len(self.feature_info), name="indices")
        last, taps = self.forward_taps(x)
        chosen = [taps[i] for i in wanted]
        if intermediates_only:
            return chosen
        return (last if self.head is None else self.head(last)), chosen

    def get_classifier(self) -> nn.Module:
        """The last linear layer, or the decoder."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for ``num_classes`` classes (0: none), freshly initialised.

        Raises:
            UserError: no whole number of at least 0, an unknown pool, or classes without a pool. The network is then
                unchanged.
        """
        old = self.classifier
        self._set_classifier(num_classes, self.global_pool.kind if global_pool is None else global_pool)
        self.classifier.train(old.training)
        self.pretrained_cfg["num_classes"] = num_classes
        if isinstance(self.classifier, nn.Linear):
            _initialise_linear(self.classifier, self.spec.init)
        reference = next(old.parameters(), next(self.parameters()))
        self.classifier.to(device=reference.device, dtype=reference.dtype)


class FeatureNet(Trunk):
    """A backbone: (N, in_chans, H, W) -> list of maps, shallowest first; ``feature_info`` tells channels and
    reductions.
    """

    def __init__(
        self,
        spec: NetSpec,
        *,
        out_indices: Sequence[int] | int | None = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
    ) -> None:
        info = FeatureInfo.of(spec)
        self_indices = resolve_indices(out_indices, len(info))
        taps = ([-1] if spec.stem.tap else []) + [i for i, stage in enumerate(spec.stages) if stage.tap]
        super().__init__(
            spec, in_chans=in_chans, drop_path_rate=drop_path_rate, num_stages=max(taps[i] for i in self_indices) + 1
        )
        self.out_indices = self_indices
        self.feature_info = info.select(self_indices)
        self.default_cfg = self.pretrained_cfg = _pretrained_cfg(spec, 0, in_chans)
        initialise(self, spec)

    def forward(self, x: Tensor) -> list[Tensor]:
        _, taps = self.forward_taps(x)
        return [taps[i] for i in self.out_indices]


class ModelOptions(TypedDict, total=False):
    """Options that ``create_model`` takes whatever it returns; it says what they are."""

    checkpoint_path: str | os.PathLike[str] | None
    num_classes: int | None
    in_chans: int
    drop_rate: float
    drop_path_rate: float
    global_pool: str
    norm: NormKind | None
    head: HeadKind | None
    out_indices: Sequence[int] | int | None


@overload
def create_model(
    model: str | NetSpec,
    pretrained: bool = False,
    *,
    features_only: Literal[False] = False,
    **options: Unpack[ModelOptions],
) -> ConvNet: ...
@overload
def create_model(
    model: str | NetSpec, pretrained: bool = False, *, features_only: Literal[True], **options: Unpack[ModelOptions]
) -> FeatureNet: ...
@overload
def create_model(
    model: str | NetSpec, pretrained: bool = False, *, features_only: bool, **options: Unpack[ModelOptions]
) -> ConvNet | FeatureNet: ...
def create_model(
    model: str | NetSpec,
    pretrained: bool = False,
    *,
    checkpoint_path: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    in_chans: int = 3,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    global_pool: str = "avg",
    norm: NormKind | None = None,
    head: HeadKind | None = None,
    features_only: bool = False,
    out_indices: Sequence[int] | int | None = None,
) -> ConvNet | FeatureNet:
    """Build a network.

    Args:
        model: a name (``tresnet_m``), a name with a weights tag (``tresnet_m.miil_in21k_ft_in1k``), or a NetSpec.
        pretrained: load released weights, the architecture's default ones when the name has no tag.
        checkpoint_path: load these weights instead (.safetensors or .pth; any known key layout); another class count
            gets a new classifier; weights without one need ``num_classes``.
        num_classes: of the classifier; None: the weights' own, 1000 without a tag; 0: no classifier.
        in_chans: image channels; pretrained stems adapt (one channel: the sum over colours).
        drop_rate: dropout in front of the classifier.
        drop_path_rate: stochastic depth of the last block; earlier ones grow to it linearly from 0 (Huang et al., arXiv
            1603.09382).
        global_pool: ``avg``, ``max``, ``avgmax``, ``catavgmax`` or '' (with num_classes=0).
        norm: None (the spec's), ``inplace`` (InPlace-ABN where the activation inverts) or ``batchnorm``.
        head: None (the spec's), ``gap`` (pool and linear classifier) or ``ml_decoder`` (ML-Decoder: fixed queries, one
            for each of at most 100 groups of classes, attend to the last map; for several labels and many classes).
        features_only: a backbone that returns a list of maps; it has no classifier, so ``num_classes``, ``drop_rate``,
            ``head`` and ``global_pool`` do not go with it.
        out_indices: which maps of a backbone; None: all.

    Returns:
        A network in training mode; same torch seed, same weights.

    Raises:
        UserError: an unknown name (the nearest are named), an impossible option, or weights that do not fit.
    """
    spec = as_spec(model)
    if norm is not None:
        if norm not in ("inplace", "batchnorm"):
            raise UserError(f"norm is {norm!r}; it must be None, 'inplace' or 'batchnorm'")
        if spec.norm.kind == "layernorm":
            raise UserError(f"norm is {norm!r}; {spec.name} has layer norms, so leave it out")
        spec = replace(spec, norm=replace(spec.norm, kind=norm))
    if head is not None:
        check_text("head", head, ("gap", "ml_decoder"))
        if features_only is True:
            raise UserError(f"head is {head!r}; features_only=True gives maps and no classifier, so leave it out")
        spec = replace(spec, head=replace(spec.head, kind=head))
    check_flag("pretrained", pretrained)
    check_whole("in_chans", in_chans)
    if num_classes is not None:
        check_whole("num_classes", num_classes, least=0)
    for name, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
        check_number(name, rate, "in [0, 1)", 0, math.nextafter(1, 0))
    check_text("global_pool", global_pool, POOLS)
    if checkpoint_path is not None:
        check_path("checkpoint_path", checkpoint_path)
    if check_flag("features_only", features_only):
        _refuse_head_options(num_classes, drop_rate, global_pool)
    elif out_indices is not None:
        raise UserError(f"out_indices is {out_indices!r}; it goes with features_only=True alone")
    tag = get_tag(spec.name) if pretrained else find_tag(spec.name)
    if tag is not None and tag.name != spec.name:
        usual, own = as_spec(spec.name).input, spec.input
        changed = {f.name: value for f in fields(own) if (value := getattr(own, f.name)) != getattr(usual, f.name)}
        spec = replace(spec, input=replace(as_spec(tag.name).input, **changed), name=tag.name)
    classes_are_given = num_classes is not None
    if num_classes is None:
        num_classes = tag.num_classes if tag else 1000
    if features_only:
        net: ConvNet | FeatureNet = FeatureNet(
            spec, out_indices=out_indices, in_chans=in_chans, drop_path_rate=drop_path_rate
        )
    else:
        net = ConvNet(
            spec,
            num_classes=num_classes,
            in_chans=in_chans,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            global_pool=global_pool,
        )
    if pretrained or checkpoint_path is not None:
        from convscale.nn.weights import download, load_weights

        source = checkpoint_path if checkpoint_path is not None else download(spec.name)
        loaded = load_weights(net, source, allow_head_mismatch=True)
        if loaded.without_head and num_classes and not classes_are_given:
            raise UserError(
                f"{source} holds no classifier of {spec.name}; give num_classes for a new one, or 0 for none"
            )
    return net


def _refuse_head_options(num_classes: int | None, drop_rate: float, global_pool: str) -> None:
    """UserError where options of a classifier are given to a backbone, which has none."""
    given = {"num_classes": num_classes or None, "drop_rate": drop_rate or None}
    given["global_pool"] = None if global_pool == "avg" else global_pool
    for name, value in given.items():
        if value is not None:
            raise UserError(f"{name} is {value!r}; features_only=True gives maps and no classifier, so leave it out")


def initialise(net: nn.Module, spec: NetSpec) -> None:
    """Fresh weights by the spec's rule, in module order, from torch's global generator; nothing to do on the meta
    device.
    """
    if next(net.parameters()).is_meta:
        return
    own = {part for module in net.modules() if isinstance(module, MLDecoder) for part in module.modules()}
    for module in net.modules():
        if isinstance(module, MLDecoder):
            module.reset_parameters()
        elif module in own:
            continue
        elif isinstance(module, nn.Conv2d):
            if spec.init == "convnext":
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif spec.init == "efficientnet":
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
            else:
                nn.init.kaiming_normal_(
                    module.weight, mode="fan_out", nonlinearity="leaky_relu" if spec.init == "tresnet" else "relu"
                )
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            _initialise_linear(module, spec.init)
        elif isinstance(module, Block) and module.has_shortcut and spec.init in ("resnet", "tresnet"):
            # the block starts as its shortcut (Goyal et al., arXiv 1706.02677, section 5.1), but for one whose branch
            # ends in an activation, which would put out nothing for ever
            norm = module.last_unit().norm
            if norm.activation == "identity":
                nn.init.zeros_(norm.weight)


def _initialise_linear(linear: nn.Linear, rule: str) -> None:
    if rule == "tresnet":
        nn.init.normal_(linear.weight, 0.0, 0.01)
    elif rule == "efficientnet":
        bound = 1.0 / math.sqrt(linear.out_features)
        nn.init.uniform_(linear.weight, -bound, bound)
    elif rule == "convnext":
        nn.init.trunc_normal_(linear.weight, std=0.02)
    else:
        linear.reset_parameters()
    if rule != "resnet":
        nn.init.zeros_(linear.bias)


def _stage(
    spec: NetSpec, stage: StageSpec, in_chs: int, drop_path_rate: float, first: int, total: int
) -> nn.Sequential:
    blocks, stride = nn.Sequential(), stage.stride
    for run in stage.runs:
        for _ in range(run.repeat):
            rate = drop_path_rate * (first + len(blocks)) / max(1, total - 1)
            blocks.append(build_block(run.block, in_chs, stride, norm=spec.norm, padding=spec.padding, drop_path=rate))
            in_chs, stride = run.block.width, 1
    return blocks


def _run_checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    norms = [m for m in block.modules() if isinstance(m, BatchNormAct | InPlaceABN)]

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _FrozenStatistics(norms)

    out = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
    assert isinstance(out, Tensor)
    return out


class _FrozenStatistics(AbstractContextManager[None]):
    """Running statistics as they were: a recomputed forward must not count its batch twice."""

    def __init__(self, norms: list[BatchNormAct | InPlaceABN]) -> None:
        self.norms = norms

    def __enter__(self) -> None:
        self.kept = [(buffer, buffer.clone()) for norm in self.norms for buffer in norm.buffers()]

    def __exit__(self, *_: object) -> None:
        for buffer, value in self.kept:
            buffer.copy_(value)


def _pretrained_cfg(spec: NetSpec, num_classes: int, in_chans: int) -> dict[str, object]:
    pixels = spec.input
    return {
        "architecture": spec.name.partition(".")[0],
        "tag": spec.name.partition(".")[2],
        "num_classes": num_classes,
        "input_size": (in_chans, pixels.size, pixels.size),
        "mean": pixels.mean,
        "std": pixels.std,
        "interpolation": pixels.interpolation,
        "crop_pct": pixels.crop_pct,
        "first_conv": "stem.0.conv",
        "classifier": "classifier",
    }
