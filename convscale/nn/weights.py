"""Weights in and out: files and dicts in any known key layout, strict, with errors that name keys and shapes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from convscale.arch.block import StageSpec
from convscale.arch.families.tresnet import OFFICIAL_V2_SLOPE
from convscale.arch.parts import ActSpec
from convscale.arch.spec import NetSpec
from convscale.arch.zoo import get_tag
from convscale.errors import UserError, check_flag, check_path, check_text, first_line, nearest
from convscale.nn import keymaps
from convscale.nn.layers import conv2d
from convscale.nn.norm import BatchNormAct, InPlaceABN, set_fields, with_slope

_WRAPPERS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
_OFFICIAL_EPS = 1e-5
"""InPlace-ABN as the TResNet authors trained it scales by |weight| + this."""

_TENSORFLOW_EPS = 1e-3


@dataclass(frozen=True, kw_only=True)
class LoadedWeights:
    """What ``load_weights`` did."""

    layout: str
    """Of the source's keys."""
    ignored: tuple[str, ...] = ()
    """Keys of the source that the network has no place for by design (a backbone has no head)."""
    fresh: tuple[str, ...] = ()
    """Our keys that kept their values: a classifier of another class count."""
    adapted_stem: bool = False
    """Whether the stem was adapted to another number of image channels."""
    changed: str = ""
    """What of the network was changed to what the weights were trained with; its ``spec`` says so too."""


def load_weights(
    net: nn.Module,
    src: str | os.PathLike[str] | Mapping[str, object],
    layout: str | None = None,
    allow_head_mismatch: bool = False,
) -> LoadedWeights:
    """Load weights into a network, strictly.

    Args:
        net: a network of ``create_model``, ``features_only`` or not; any other module takes its own keys only.
        src: a ``.safetensors`` file, a ``.pth``/``.pt``/``.bin`` file of tensors, a checkpoint folder of ours, or a
            state dict; wrapped ones (``state_dict``, ``model``, ``model_ema``, ``module.``) are unwrapped.
        layout: ``convscale``, ``timm``, ``torchvision``, ``official`` (the TResNet authors'),
            ``efficientnet_lite_pytorch``; None: found by its keys.
        allow_head_mismatch: a classifier of another class count stays as it is instead of being an error. A module's
            classifier is what its ``pretrained_cfg`` names, else its last linear layer.

    Official TResNet weights were trained with ``|weight| + 1e-5`` as the norms' scale and are converted so. Some
    layouts exist only for weights that were trained with constants of their own, which the network then takes over (its
    ``spec`` too): official TResNet V2 has leaky slopes of 1e-6, efficientnet_lite_pytorch has TensorFlow's SAME padding
    and epsilon of 1e-3, torchvision's MobileNetV3 and EfficientNetV2 that epsilon.

    Raises:
        UserError: no such file, a foreign pickle, an unknown layout, missing or unexpected keys, or shapes that differ;
            all are named. The network is then unchanged.
    """
    _check_module("load_weights", net)
    check_flag("allow_head_mismatch", allow_head_mismatch)
    spec = getattr(net, "spec", None)
    if layout is not None:
        check_text("layout", layout, None if isinstance(spec, NetSpec) else keymaps.layout_names(), what="timm")
    if not isinstance(spec, NetSpec):
        if layout not in (None, keymaps.OWN):
            raise UserError(
                f"layout is {layout!r}; {type(net).__name__} is no network of create_model and takes its own keys only"
            )
        return _load_plain(net, read_state_dict(src), allow_head_mismatch)
    source = read_state_dict(src)
    name = layout or _detect(spec, source)
    table = _table(spec, name)
    known = set(net.state_dict())
    translated, ignored = _translate(source, table, known, is_backbone="classifier.weight" not in known)
    if name == "official":
        norms = {key for key in translated if key.endswith("norm.weight")}
        translated = {key: value.abs() + _OFFICIAL_EPS if key in norms else value for key, value in translated.items()}
    row = keymaps.layout_of(spec, name)
    for key in (f"{module}.weight" for module in (row.linear if row else ())):
        if key in translated and translated[key].ndim == 2:
            translated[key] = translated[key][:, :, None, None]
    adapted = _adapt_stem(net, spec, translated)
    fresh = _check(net, translated, ignored, name, ("classifier",) if allow_head_mismatch else ())
    net.load_state_dict({**net.state_dict(), **translated})
    changed = _as_trained(net, spec, name)
    return LoadedWeights(layout=name, ignored=tuple(ignored), fresh=tuple(fresh), adapted_stem=adapted, changed=changed)


def export_weights(net: nn.Module, layout: str = "timm") -> dict[str, Tensor]:
    """The network's state dict under another layout's keys: the exact inverse of loading from it. Tensors are copies on
    the CPU.

    Raises:
        UserError: a layout that this kind of network has not; or ``official`` with a norm weight below 1e-5, which
            ``|weight| + 1e-5`` can not express.
    """
    _check_module("export_weights", net)
    check_text("layout", layout, what="timm")
    spec = getattr(net, "spec", None)
    if not isinstance(spec, NetSpec):
        raise UserError(f"{type(net).__name__} has no spec; export_weights takes networks of create_model")
    table, row = _table(spec, layout), keymaps.layout_of(spec, layout)
    out = {}
    for key, value in net.state_dict().items():
        module, leaf = _split(key, table)
        if row and module in row.linear and leaf == "weight":
            value = value.flatten(1)
        if layout == "official" and key.endswith("norm.weight"):
            if (value < _OFFICIAL_EPS).any():
                raise UserError(
                    f"{key} has a weight of {value.min():.3g}; the official layout can express none below "
                    f"{_OFFICIAL_EPS:g}"
                )
            value = value - _OFFICIAL_EPS
        theirs = f"{table[module]}.{leaf}" if leaf else table[module]
        if theirs.endswith(f".{keymaps.FACTORS}"):
            value = value[:, None, None]
        out[theirs] = value.detach().cpu().clone()
    return out


def _check_module(function: str, net: object) -> None:
    if not isinstance(net, nn.Module):
        raise UserError(f"{function} takes a network, got {type(net).__name__}")


def read_state_dict(src: str | os.PathLike[str] | Mapping[str, object]) -> dict[str, Tensor]:
    """Tensors by key from a file, a checkpoint folder or a dict, unwrapped. Raises UserError on anything else."""
    if isinstance(src, Mapping):
        values: object = src
        where = "state dict"
    else:
        path = check_path("weights", src)
        if path.is_dir():
            path = path / "model.safetensors"
        where = str(path)
        if not path.is_file():
            raise UserError(f"no weights at {path}; name a .safetensors or .pth file")
        values = _read_file(path)
    while isinstance(values, Mapping):
        inner = next((values[key] for key in _WRAPPERS if isinstance(values.get(key), Mapping)), None)
        if inner is None:
            break
        values = inner
    out: dict[str, Tensor] = {}
    for key, value in values.items() if isinstance(values, Mapping) else ():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(f"{where} holds no state dict; a mapping from names to tensors is needed")
        out[key] = value
    if not out:
        raise UserError(f"{where} holds no state dict; a mapping from names to tensors is needed")
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in out):
            out = {key.removeprefix(prefix): value for key, value in out.items()}
    return out


def download(name: str) -> Path:
    """The file of a released weights tag (``tresnet_m.miil_in1k``), from the Hugging Face hub or its local cache.

    Raises:
        UserError: an unknown tag, no network and nothing cached, or no such repository.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    tag = get_tag(name)
    advice = "download the file by hand and pass checkpoint_path"
    names = ("model.safetensors", "pytorch_model.bin")
    for filename in names:  # what is cached needs no network, and no waiting for one that is down
        cached = try_to_load_from_cache(tag.hf_hub_id, filename)
        if isinstance(cached, str):
            return Path(cached)
    for filename in names:
        try:
            return Path(hf_hub_download(tag.hf_hub_id, filename))
        except LocalEntryNotFoundError as error:
            raise UserError(
                f"weights {tag.name} are not cached and the hub can not be reached; connect, or {advice}"
            ) from error
        except RepositoryNotFoundError as error:
            raise UserError(f"weights {tag.name}: the hub has no repository {tag.hf_hub_id}; {advice}") from error
        except EntryNotFoundError:
            continue
        except (HfHubHTTPError, OSError) as error:
            reason = first_line(error)
            raise UserError(
                f"weights {tag.name} could not be fetched from {tag.hf_hub_id} ({reason}); try again, or {advice}"
            ) from error
    raise UserError(
        f"weights {tag.name}: {tag.hf_hub_id} holds neither model.safetensors nor pytorch_model.bin; {advice}"
    )


def set_slopes(net: nn.Module, slope: float) -> None:
    """Give every leaky ReLU of ``net`` another slope, in place; norms whose activation then no longer inverts become
    batch norms.
    """

    def changed(act: ActSpec) -> ActSpec:
        return replace(act, slope=slope) if act.kind == "leaky_relu" else act

    for parent in net.modules():
        for name, child in parent.named_children():
            if isinstance(child, BatchNormAct | InPlaceABN) and child.activation == "leaky_relu":
                setattr(parent, name, with_slope(child, slope))
    spec = getattr(net, "spec", None)
    if isinstance(spec, NetSpec):
        stem = replace(spec.stem, activation=changed(spec.stem.activation))
        stages = tuple(_with_activations(stage, changed) for stage in spec.stages)
        set_fields(net, spec=replace(spec, stem=stem, stages=stages, lineage=None))


def _with_activations(stage: StageSpec, changed: Callable[[ActSpec], ActSpec]) -> StageSpec:
    """The stage with another activation inside its blocks."""
    blocks = [replace(run.block, activation=changed(run.block.activation)) for run in stage.runs]
    return replace(stage, runs=tuple(replace(run, block=block) for run, block in zip(stage.runs, blocks, strict=True)))


def set_same_padding(net: nn.Module, eps: float) -> None:
    """Give every convolution of ``net`` TensorFlow's SAME padding and every norm ``eps``, in place."""
    for parent in net.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Conv2d and child.stride != (1, 1) and child.kernel_size != (1, 1):
                new = conv2d(
                    child.in_channels,
                    child.out_channels,
                    child.kernel_size[0],
                    stride=child.stride[0],
                    groups=child.groups,
                    bias=child.bias is not None,
                    padding="same",
                )
                new.weight, new.bias = child.weight, child.bias
                setattr(parent, name, new.train(child.training))
            elif isinstance(child, BatchNormAct | InPlaceABN):
                child.eps = eps
    spec = getattr(net, "spec", None)
    if isinstance(spec, NetSpec):
        set_fields(net, spec=replace(spec, padding="same", norm=replace(spec.norm, eps=eps)))


def set_eps(net: nn.Module, eps: float) -> None:
    """Give every norm of ``net`` this epsilon, in place."""
    for module in net.modules():
        if isinstance(module, BatchNormAct | InPlaceABN):
            module.eps = eps
    spec = getattr(net, "spec", None)
    if isinstance(spec, NetSpec):
        set_fields(net, spec=replace(spec, norm=replace(spec.norm, eps=eps)))


def _as_trained(net: nn.Module, spec: NetSpec, layout: str) -> str:
    """Make ``net`` the network that weights of this layout were trained with; returns what was changed, in words."""
    if layout == "official" and all(stage.runs[0].block.kind == "bottleneck" for stage in spec.stages):
        if spec.stem.activation.slope != OFFICIAL_V2_SLOPE:
            set_slopes(net, OFFICIAL_V2_SLOPE)
            return f"leaky slopes of {OFFICIAL_V2_SLOPE:g}"
    elif layout == "efficientnet_lite_pytorch" and (spec.padding, spec.norm.eps) != ("same", _TENSORFLOW_EPS):
        set_same_padding(net, _TENSORFLOW_EPS)
        return f"SAME padding and a norm epsilon of {_TENSORFLOW_EPS:g}"
    row = keymaps.layout_of(spec, layout)
    if row is not None and row.eps is not None and row.eps != spec.norm.eps:
        set_eps(net, row.eps)
        return f"a norm epsilon of {row.eps:g}"
    return ""


def _read_file(path: Path) -> object:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is no valid safetensors file: {error}") from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds; all mean that the file is not plain weights
        kind = "a foreign pickle" if "weights only" in str(error).lower() else "damaged or of another kind"
        raise UserError(
            f"{path} is no file of weights alone ({kind}), so it is not loaded; save a state dict or safetensors"
        ) from None


def _load_plain(net: nn.Module, source: dict[str, Tensor], allow_head_mismatch: bool) -> LoadedWeights:
    fresh = _check(net, source, [], "own", _classifiers(net) if allow_head_mismatch else ())
    net.load_state_dict({**net.state_dict(), **source})
    return LoadedWeights(layout="own", fresh=tuple(fresh))


def _classifiers(net: nn.Module) -> tuple[str, ...]:
    """The names of a module's classifiers: what its ``pretrained_cfg`` says, else its last linear layer."""
    config = getattr(net, "pretrained_cfg", None)
    stated = config.get("classifier") if isinstance(config, Mapping) else getattr(config, "classifier", None)
    if isinstance(stated, str):
        return (stated,)
    if isinstance(stated, list | tuple):
        return tuple(map(str, stated))
    return tuple([name for name, module in net.named_modules() if isinstance(module, nn.Linear)][-1:])


def _table(spec: NetSpec, layout: str) -> keymaps.Table:
    known = keymaps.layouts(spec)
    if layout not in known:
        raise UserError(f"layout {layout!r} is unknown for {spec.name}{nearest(layout, known)}")
    return known[layout](spec)


def _detect(spec: NetSpec, source: dict[str, Tensor]) -> str:
    """The layout that knows most of the keys."""
    scores = {}
    for name, make in keymaps.layouts(spec).items():
        modules = set(make(spec).values())
        scores[name] = sum(key.rpartition(".")[0] in modules or key in modules for key in source)
    best = max(scores, key=lambda name: scores[name])
    if scores[best] == 0:
        some = ", ".join(list(source)[:3])
        raise UserError(f"the weights' keys ({some} ...) are of no layout known for {spec.name} ({', '.join(scores)})")
    return best


def _split(key: str, table: keymaps.Table) -> tuple[str, str]:
    """A key as module in the table and leaf; a split convolution's leaf has its number in front; a tensor that stands
    in the table itself has none.
    """
    if key in table:
        return key, ""
    module, _, leaf = key.rpartition(".")
    if module not in table:
        module, _, number = module.rpartition(".")
        leaf = f"{number}.{leaf}"
    return module, leaf


def _translate(
    source: dict[str, Tensor], table: keymaps.Table, known: set[str], *, is_backbone: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """The source under our keys; apart, the keys that only a head or later stages would take."""
    inverse = {theirs: ours for ours, theirs in table.items()}
    out, ignored = {}, []
    for key, value in source.items():
        module, leaf = _split(key, inverse)
        ours = (f"{inverse[module]}.{leaf}" if leaf else inverse[module]) if module in inverse else None
        value = value.flatten() if key.endswith(f".{keymaps.FACTORS}") else value
        if ours is not None and (ours in known or not is_backbone):
            out[ours] = value
        elif ours is not None or is_backbone:
            ignored.append(key)
        else:
            out[f"?{key}"] = value
    return out, ignored


def _adapt_stem(net: nn.Module, spec: NetSpec, weights: dict[str, Tensor]) -> bool:
    """Make the first convolution's weight fit another number of image channels, in ``weights``.

    One channel takes the sum over the source's (a grey image is then as good as three equal channels); more repeat them
    in order, scaled so that the response to equal channels stays.
    """
    key = "stem.0.conv.weight"
    own = net.state_dict().get(key)
    given = weights.get(key)
    if (
        own is None
        or given is None
        or own.shape == given.shape
        or own.shape[0] != given.shape[0]
        or own.shape[2:] != given.shape[2:]
    ):
        return False
    cells = spec.stem.stride**2 if spec.stem.kind == "space_to_depth" else 1
    out_chs, _, height, width = given.shape
    per_cell = given.reshape(out_chs, cells, -1, height, width)
    old, new = per_cell.shape[2], own.shape[1] // cells
    if new == 1:
        adapted = per_cell.sum(2, keepdim=True)
    else:
        repeats = -(-new // old)
        adapted = per_cell.repeat(1, 1, repeats, 1, 1)[:, :, :new] * (old / new)
    weights[key] = adapted.reshape(own.shape).to(given.dtype)
    return True


def _check(
    net: nn.Module, weights: dict[str, Tensor], ignored: list[str], layout: str, may_differ: tuple[str, ...]
) -> list[str]:
    """Keys that stay as they are, those of the layers ``may_differ`` that do not fit; they leave ``weights``.

    Raises:
        UserError: keys are missing or unexpected, or tensors of another shape; they are named.
    """
    own = net.state_dict()
    fresh = []
    for layer in may_differ:
        keys = [key for key in own if key.rpartition(".")[0] == layer]
        if any(key not in weights or weights[key].shape != own[key].shape for key in keys):
            for key in [key for key in weights if key.rpartition(".")[0] == layer]:
                del weights[key]
            fresh += keys
    behind_pool = [key for key in own if key.startswith("pooled.")]
    if (may_differ or not getattr(net, "num_classes", 1)) and not any(key in weights for key in behind_pool):
        fresh += behind_pool  # weights that were trained without a head (masked autoencoders)
    for key in ("classifier.weight", "classifier.bias"):
        if key not in own and key in weights and getattr(net, "num_classes", None) == 0:
            ignored.append(key)
            del weights[key]
    problems = []
    missing = [
        key for key in own if key not in weights and key not in fresh and not key.endswith("num_batches_tracked")
    ]
    unexpected = [key.removeprefix("?") for key in weights if key not in own]
    shapes = [
        f"{key} is {tuple(weights[key].shape)}, the network's is {tuple(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    if missing:
        problems.append(f"missing {_some(missing)}")
    if unexpected:
        problems.append(f"unexpected {_some(unexpected)}")
    if shapes:
        problems.append(_some(shapes))
    if problems:
        head = not may_differ and any(text.startswith(f"{name}.") for text in shapes for name in _classifiers(net))
        hint = "; pass allow_head_mismatch=True to keep the network's own classifier" if head else ""
        name = getattr(getattr(net, "spec", None), "name", type(net).__name__)
        raise UserError(f"weights ({layout} layout) do not fit {name}: {'; '.join(problems)}{hint}")
    return fresh


def _some(items: list[str], count: int = 4) -> str:
    return ", ".join(items[:count]) + (f" and {len(items) - count} more" if len(items) > count else "")
