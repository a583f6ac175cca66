"""Weights in and out: files and dicts in any known key layout, strict, with errors that name keys and shapes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from convscale.arch.spec import NetSpec
from convscale.arch.zoo import get_tag
from convscale.errors import UserError, check_flag, check_text, first_line, nearest
from convscale.nn import keymaps
from convscale.nn.as_trained import as_trained, original_spec
from convscale.nn.placing import Placed, is_foreign, part_of, place, split_key, their_keys, without_wrappers
from convscale.nn.state_dicts import StateDict, read_state_dict
from convscale.words import safe

_DECODER = (
    "embed",
    "norm_query",
    "query",
    "key",
    "value",
    "out",
    "norm_attention",
    "expand",
    "contract",
    "norm_output",
)
"""Parts of an ml_decoder head."""
_OFFICIAL_EPS = 1e-5
"""InPlace-ABN as the TResNet authors trained it scales by |weight| + this."""


@dataclass(frozen=True, kw_only=True)
class LoadedWeights:
    """What ``load_weights`` did."""

    layout: str
    """Of the source's keys."""
    prefix: str = ""
    """What stood before the network's keys in the source and was taken off, but for ``module.`` and ``_orig_mod.``."""
    ignored: tuple[str, ...] = ()
    """Keys of the source that the network has no place for: by design (a backbone has no head), or because they are of
    something else (a loss, a second head, a counter)."""
    fresh: tuple[str, ...] = ()
    """Our keys that kept their values: a classifier of another class count."""
    adapted_stem: bool = False
    """Whether the stem was adapted to another number of image channels."""
    without_head: bool = False
    """Whether the source has no classifier, or nothing behind the pool, where the network has one."""
    changed: str = ""
    """What of the network was changed to what the weights were trained with; its ``spec`` says so too."""
    classes: tuple[str, ...] = ()
    """Class names in the order of the outputs that the weights were trained for, where the source says them."""

    def notes(self, classes: Sequence[str] | None = None, *, source_classes: Sequence[str] | None = None) -> list[str]:
        """What a user should know of it, one line each.

        Args:
            classes: the names of the network's own classes; with them a classifier that was taken over is compared.
            source_classes: names of the source's classes; None: those that it says.
        """
        notes = []
        if self.ignored:
            notes.append(f"weights: left out as no part of the network: {_some([safe(k[:80]) for k in self.ignored])}")
        if self.adapted_stem:
            notes.append("weights: the first convolution was adapted to another number of image channels")
        if self.changed:
            notes.append(f"weights: the network took over {self.changed}, which they were trained with")
        theirs = tuple(self.classes if source_classes is None else source_classes)
        ours = tuple(classes or ())
        if ours and len(theirs) == len(ours) and theirs != ours and not self.fresh:
            what = "the same classes in another order" if set(theirs) == set(ours) else "other classes"
            some = _some([safe(name[:80]) for name in theirs])
            notes.append(f"weights: their classifier, taken over, is for {what}: {some}")
        return notes


def load_weights(
    net: nn.Module,
    src: str | os.PathLike[str] | Mapping[str, object],
    layout: str | None = None,
    allow_head_mismatch: bool = False,
) -> LoadedWeights:
    """Load weights into a network, strictly.

    Args:
        net: a network of ``create_model``, ``features_only`` or not; any other module takes its own keys only.
        src: a ``.safetensors`` file, a PyTorch file of tensors (``.pth``, ``.pt``, ``.bin``, ``.ckpt``, ``.tar``), a
            checkpoint folder of ours, or a state dict. What trainers wrap it into (timm's, torchvision's, Lightning's,
            torch's ``AveragedModel`` ...) is unwrapped, averaged weights first; a prefix of all keys is taken off.
        layout: ``convscale``, ``timm``, ``torchvision``, ``official`` (the TResNet authors'),
            ``efficientnet_lite_pytorch``, ``efficientnet_pytorch``; None: found by its keys.
        allow_head_mismatch: a classifier of another class count stays as it is instead of being an error. A module's
            classifier is what its ``pretrained_cfg`` names, else its last linear layer.

    Official TResNet weights were trained with ``|weight| + 1e-5`` as the norms' scale and are converted so. Some
    layouts exist only for weights that were trained with constants of their own, which the network then takes over (its
    ``spec`` too): official TResNet V2 has leaky slopes of 1e-6, efficientnet_pytorch and efficientnet_lite_pytorch have
    TensorFlow's SAME padding and epsilon of 1e-3, torchvision's MobileNetV3 and EfficientNetV2 that epsilon.

    Keys of something else in the file (a loss, a second head) are left out and named in the result; keys that the
    network's own parts would have, were it another, are an error.

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
    source, now, spec = read_state_dict(src), spec, original_spec(net, spec)
    placed, translated, ignored = _ours(net, spec, source, layout)
    heads = [
        {key.partition(".")[0] for key in keys} & {"classifier", "pooled"} for keys in (net.state_dict(), translated)
    ]
    if placed.layout == "official":
        norms = {key for key in translated if key.endswith("norm.weight")}
        translated = {key: value.abs() + _OFFICIAL_EPS if key in norms else value for key, value in translated.items()}
    row = keymaps.layout_of(spec, placed.layout)
    for key in (f"{module}.weight" for module in (row.linear if row else ())):
        if key in translated and translated[key].ndim == 2:
            translated[key] = translated[key][:, :, None, None]
    adapted = _adapt_stem(net, spec, translated)
    parts = {part_of(theirs) for theirs in _table(spec, placed.layout).values()}
    fresh = _check(net, translated, ignored, placed.layout, ("classifier",) if allow_head_mismatch else (), parts)
    net.load_state_dict({**net.state_dict(), **translated})
    return LoadedWeights(
        layout=placed.layout,
        prefix=placed.prefix,
        ignored=(*ignored, *placed.outside, *source.others),
        fresh=tuple(fresh),
        adapted_stem=adapted,
        without_head=not heads[0] <= heads[1],
        changed=as_trained(net, now, placed.layout),
        classes=source.classes,
    )


def class_count(net: nn.Module, source: StateDict) -> int | None:
    """The number of classes that the classifier of weights for ``net`` has; None where they have none."""
    spec = getattr(net, "spec", None)
    if isinstance(spec, NetSpec):
        weights, names = _ours(net, original_spec(net, spec), source, None)[1], ("classifier",)
    else:
        own = net.state_dict()
        weights = place(without_wrappers(source.tensors, own), {"own": their_keys(own, None)}, type(net).__name__)
        weights, names = weights.tensors, _classifiers(net)
    found = [weights[f"{name}.weight"] for name in names if f"{name}.weight" in weights]
    return int(found[0].shape[0]) if found and found[0].ndim else None


def _ours(
    net: nn.Module, spec: NetSpec, source: StateDict, layout: str | None
) -> tuple[Placed, dict[str, Tensor], list[str]]:
    """Where the network's weights stand in a source; they under our keys; the keys that a backbone has no place for."""
    own = net.state_dict()
    tables = {name: _table(spec, name) for name in keymaps.layouts(spec)}
    if layout is not None:
        tables = {layout: _table(spec, layout)}
    expected = {name: their_keys(own, table) for name, table in tables.items()}
    placed = place(without_wrappers(source.tensors, own), expected, spec.name)
    table = tables[placed.layout]
    translated, ignored = _translate(
        placed.tensors, table, set(own), is_backbone=not any(key.startswith("classifier.") for key in own)
    )
    return placed, translated, ignored


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
        module, leaf = split_key(key, table)
        if row and module in row.linear and leaf == "weight":
            value = value.flatten(1)
        if layout == "official" and key.endswith("norm.weight"):
            if (value < _OFFICIAL_EPS).any():
                raise UserError(
                    f"{key} has a weight of {value.min():.3g}; the official layout can express none below "
                    f"{_OFFICIAL_EPS:g}"
                )
            value = value - _OFFICIAL_EPS
        if module not in table:
            raise UserError(f"layout {layout!r} has no key for {key} of {spec.name}; our own is {keymaps.OWN!r}")
        theirs = f"{table[module]}.{leaf}" if leaf else table[module]
        if theirs.endswith(f".{keymaps.FACTORS}"):
            value = value[:, None, None]
        out[theirs] = value.detach().cpu().clone()
    return out


def _check_module(function: str, net: object) -> None:
    if not isinstance(net, nn.Module):
        raise UserError(f"{function} takes a network, got {type(net).__name__}")


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


def _load_plain(net: nn.Module, source: StateDict, allow_head_mismatch: bool) -> LoadedWeights:
    own = net.state_dict()
    placed = place(without_wrappers(source.tensors, own), {"own": their_keys(own, None)}, type(net).__name__)
    weights, ignored = dict(placed.tensors), []
    may_differ = _classifiers(net) if allow_head_mismatch else ()
    fresh = _check(net, weights, ignored, "own", may_differ, {part_of(key) for key in own})
    net.load_state_dict({**own, **weights})
    return LoadedWeights(
        layout="own",
        prefix=placed.prefix,
        ignored=(*ignored, *placed.outside, *source.others),
        fresh=tuple(fresh),
        classes=source.classes,
    )


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
    table = known[layout](spec)
    if spec.head.kind == "ml_decoder":  # its parts have our names in every layout
        table |= {f"classifier.{part}": f"classifier.{part}" for part in _DECODER}
    return table


def _translate(
    source: dict[str, Tensor], table: keymaps.Table, known: set[str], *, is_backbone: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """The source under our keys; apart, the keys that only a head or later stages would take. Keys of what the network
    has no place for get a question mark in front.
    """
    inverse = {theirs: ours for ours, theirs in table.items()}
    places, head = {_place(key) for key in known}, table["classifier"].partition(".")[0] + "."
    out, ignored = {}, []
    for key, value in source.items():
        module, leaf = split_key(key, inverse)
        ours = (f"{inverse[module]}.{leaf}" if leaf else inverse[module]) if module in inverse else None
        value = value.flatten() if key.endswith(f".{keymaps.FACTORS}") else value
        if ours is not None and (ours in known or not is_backbone):
            out[ours] = value
        elif is_backbone and (key.startswith(head) if ours is None else _place(ours) not in places):
            ignored.append(key)
        else:
            out[f"?{key}"] = value
    return out, ignored


def _place(key: str) -> str:
    """The stage that one of our keys is of, or its other part of the network."""
    parts = key.split(".")
    return ".".join(parts[:2]) if parts[0] == "stages" else parts[0]


def _adapt_stem(net: nn.Module, spec: NetSpec, weights: dict[str, Tensor]) -> bool:
    """Make the first convolution's weight fit another number of image channels, in ``weights``.

    One channel takes the sum over the source's (a grey image is then as good as three equal channels); more repeat them
    in order, scaled so that the response to equal channels stays.

    Raises:
        UserError: the network takes more than one channel, but fewer than the source.
    """
    key = "stem.0.conv.weight"
    own = net.state_dict().get(key)
    given = weights.get(key)
    if (
        own is None
        or given is None
        or own.shape == given.shape
        or given.ndim != 4
        or own.shape[0] != given.shape[0]
        or own.shape[2:] != given.shape[2:]
    ):
        return False
    cells = spec.stem.stride**2 if spec.stem.kind == "space_to_depth" else 1
    if not given.shape[1] or given.shape[1] % cells:
        return False
    out_chs, _, height, width = given.shape
    per_cell = given.reshape(out_chs, cells, -1, height, width)
    old, new = per_cell.shape[2], own.shape[1] // cells
    if 1 < new < old != 3:  # of three colours the first two serve, as timm has it
        raise UserError(
            f"the weights take images of {old} channels and {spec.name} of {new}, which leaves open which to drop; "
            f"build it with in_chans={old} or 1"
        )
    if new == 1:
        adapted = per_cell.sum(2, keepdim=True)
    else:
        repeats = -(-new // old)
        adapted = per_cell.repeat(1, 1, repeats, 1, 1)[:, :, :new] * (old / new)
    weights[key] = adapted.reshape(own.shape).to(given.dtype)
    return True


def _check(
    net: nn.Module,
    weights: dict[str, Tensor],
    ignored: list[str],
    layout: str,
    may_differ: tuple[str, ...],
    parts: set[str],
) -> list[str]:
    """Keys that stay as they are, those of the layers ``may_differ`` that do not fit; they leave ``weights``. So do
    keys of something else, which are added to ``ignored``, where all of the network's are there. What keys of the
    network begin with is in ``parts``.

    Raises:
        UserError: keys are missing or unexpected, or tensors of another shape or kind; they are named.
    """
    own = net.state_dict()
    fresh = []
    for layer in may_differ:
        keys = [key for key in own if key.startswith(f"{layer}.")]
        if any(key not in weights or weights[key].shape != own[key].shape for key in keys):
            for key in [key for key in weights if key.startswith(f"{layer}.")]:
                del weights[key]
            fresh += keys
    behind_pool = [key for key in own if key.startswith("pooled.")]
    if (may_differ or not getattr(net, "num_classes", 1)) and not any(key in weights for key in behind_pool):
        fresh += behind_pool  # weights that were trained without a head (masked autoencoders)
    for key in ("classifier.weight", "classifier.bias"):
        if key not in own and key in weights and getattr(net, "num_classes", None) == 0:
            ignored.append(key)
            del weights[key]
    missing = [
        key for key in own if key not in weights and key not in fresh and not key.endswith("num_batches_tracked")
    ]
    problems = [_unlike(key, weights[key], value) for key, value in own.items() if key in weights]
    problems = [problem for problem in problems if problem]
    strange = [key for key in weights if key not in own]
    if not missing and not problems:
        for key in [key for key in strange if is_foreign(key.removeprefix("?"), parts)]:
            del weights[key]
            strange.remove(key)
            ignored.append(key.removeprefix("?"))
    shapes = problems
    problems = []
    if missing:
        problems.append(f"missing {_some(missing)}")
    if strange:
        problems.append(f"unexpected {_some([safe(key.removeprefix('?')[:80]) for key in strange])}")
    if shapes:
        problems.append(_some(shapes))
    if problems:
        head = not may_differ and any(text.startswith(f"{name}.") for text in shapes for name in _classifiers(net))
        hint = "; pass allow_head_mismatch=True to keep the network's own classifier" if head else ""
        name = getattr(getattr(net, "spec", None), "name", type(net).__name__)
        raise UserError(f"weights ({layout} layout) do not fit {name}: {'; '.join(problems)}{hint}")
    return fresh


def _unlike(key: str, given: Tensor, own: Tensor) -> str:
    """What keeps a tensor from being taken; empty: nothing."""
    if given.shape != own.shape:
        return f"{key} is {tuple(given.shape)}, the network's is {tuple(own.shape)}"
    if own.is_floating_point() and not given.is_floating_point():  # complex or whole: both would lose something
        return f"{key} is of {given.dtype}, the network's of {own.dtype}"
    return ""


def _some(items: list[str], count: int = 4) -> str:
    return ", ".join(items[:count]) + (f" and {len(items) - count} more" if len(items) > count else "")
