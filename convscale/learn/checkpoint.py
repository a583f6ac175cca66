"""A checkpoint is a folder: safetensors weights, JSON, perhaps a training state, and the checksums of all three.

It is written under a temporary name, flushed, and renamed, so it is wholly there or not at all. Its checksums are
verified on loading. A network is never taken from another state than the one asked for: where that is damaged, loading
is refused. Only a training that goes on may fall back to the state before, and says so. No pickle is written or read.

    run/
      recipe.yaml, log.jsonl
      checkpoints/step-00001055/    the last K, with training state
      checkpoints/best-00000844/    the best on validation: weights only
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from convscale._version import __version__
from convscale.artifact.manifest import checked_ids
from convscale.errors import UserError, check_whole, first_line
from convscale.files import fsync_dir, inside_fit, is_full, sha256, sweep, whole_folder
from convscale.images.preprocess import Preprocessing
from convscale.learn.tree import from_plain, to_plain
from convscale.networks.foreign import Foreign, build_foreign, need_timm, timm_has
from convscale.networks.pictures import Taught, keep_taught
from convscale.read import TRUSTED_NUMBERS, check_tensors, object_of, read_json

FORMAT_VERSION = 1
"""Raised when an older convscale could not read what is written."""

ORIGIN = "convscale_origin"
"""Attribute of a module that other code built from a name: the ``Foreign`` that it can be built from again."""
_SUMS = "SHA256SUMS"
_NAME = re.compile(r"(step|best)-(\d+)")


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A trained network with what it needs to be used."""

    net: nn.Module
    """In eval mode, on the CPU."""
    classes: tuple[str, ...]
    """Class names in the order of its outputs."""
    preprocessing: Preprocessing
    """How images become inputs."""
    meta: dict[str, Any]
    """Recipe, versions, metrics, step, thresholds ... as written."""
    path: Path
    """Where it was read from."""

    @property
    def epoch(self) -> int | None:
        """The epoch after which it was written; None where that is not known."""
        return self.meta.get("metrics", {}).get("epoch")

    @property
    def state(self) -> str:
        """Which state of its run it is, in words: its folder, the best or the last, the epoch."""
        if "untrained" in self.meta:
            return str(self.meta["untrained"])
        name = _NAME.fullmatch(self.path.name)
        kind = {"best": "the best on validation", "step": "a state of training"}[name[1]] if name else "a checkpoint"
        return f"{self.path}, {kind}" + (f", epoch {self.epoch}" if self.epoch is not None else "")

    @property
    def thresholds(self) -> tuple[float, ...] | None:
        """For several labels: per class the probability above which it is present, set on validation; else None."""
        found = self.meta.get("metrics", {}).get("best", {}).get("thresholds")
        return None if found is None else tuple(found)

    @property
    def temperatures(self) -> tuple[float, ...] | None:
        """For several labels: what each class's logit is divided by before the sigmoid, fitted on validation; None: by
        1.
        """
        found = self.meta.get("metrics", {}).get("best", {}).get("temperatures")
        return None if found is None else tuple(found)


def save_checkpoint(
    folder: str | os.PathLike[str],
    net: nn.Module,
    *,
    classes: tuple[str, ...],
    preprocessing: Preprocessing,
    meta: dict[str, object] | None = None,
    state: dict[str, object] | None = None,
) -> Path:
    """Write a checkpoint folder atomically.

    Args:
        folder: its final name; must not exist.
        net: its weights are kept, and its ``spec`` where it has one, or by which name other code builds it.
        classes: class names.
        preprocessing: how images become inputs.
        meta: more JSON values to keep (recipe, metrics ...).
        state: nested values and tensors of the training state; None: the checkpoint can be used but not resumed.

    Raises:
        UserError: the folder exists, can not be written, or the disk is full; nothing is left behind then.
    """
    target = Path(folder)
    if target.exists():
        raise UserError(f"checkpoint {target} exists already")
    about = {
        "format_version": FORMAT_VERSION,
        "spec": _spec_dict(net),
        "foreign": _foreign_dict(net),
        **_detector_dict(net),
        **_pool_dict(net),
        "in_chans": preprocessing.channels,
        "classes": list(classes),
        "preprocessing": preprocessing.to_dict(),
        "versions": {"convscale": __version__, "torch": torch.__version__, "python": platform.python_version()},
        **(meta or {}),
    }
    weights = {name: value.detach().cpu().contiguous().clone() for name, value in net.state_dict().items()}
    try:
        with whole_folder(target) as place:
            save_file(weights, place / "model.safetensors")
            (place / "checkpoint.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
            if state is not None:
                tensors: dict[str, torch.Tensor] = {}
                plain = to_plain(state, tensors)
                save_file({name: value.clone() for name, value in tensors.items()}, place / "state.safetensors")
                (place / "state.json").write_text(json.dumps(plain), encoding="utf-8")
            sums = "".join(f"{sha256(path)}  {path.name}\n" for path in sorted(place.iterdir()))
            (place / _SUMS).write_text(sums, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        if is_full(error):
            raise UserError(
                f"no space left on the disk of {target.parent}; checkpoint {target.name} was not written, older ones "
                "are intact"
            ) from error
        raise UserError(f"checkpoint {target} can not be written ({error})") from error
    return target


def load_checkpoint(path: str | os.PathLike[str], *, net: nn.Module | None = None) -> Checkpoint:
    """Read a network from a checkpoint folder, or from a run's folder (``fit``'s too) its best, else its last.

    Args:
        path: a folder.
        net: takes the weights; None: built from the checkpoint's spec, or by timm where it is timm's.

    Raises:
        UserError: no checkpoint, a damaged one (of a run, the message names one that is whole), one of a newer
            version, a pickle, or weights that do not fit.
    """
    place, about = _asked(Path(path))
    if net is None:
        net = _build(about, place)
    load_weights_into(net, place)
    classes, preprocessing = tuple(about["classes"]), _preprocessing(about, place)
    ids = checked_ids(about.get("category_ids", ()), len(classes), f"checkpoint {place}: ")
    known = {"splits": about.get("splits"), "data_digest": about.get("data_digest"), "category_ids": ids}
    keep_taught(net, Taught(preprocessing=preprocessing, classes=classes, **known))
    return Checkpoint(net=net.eval(), classes=classes, preprocessing=preprocessing, meta=about, path=place)


def weights_of(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """The weights and class names that ``load_checkpoint`` would load, for a network that is there already."""
    place, about = _asked(Path(path))
    return _tensors(place / "model.safetensors"), tuple(about["classes"])


def _asked(path: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that a path names, and what it says of itself; it is not damaged."""
    place, *others = _candidates(path, ("best", "step"))
    if problem := verify_checkpoint(place):
        whole = next((other for other in others if verify_checkpoint(other) is None), None)
        advice = f"; to use another state, name it: {whole}" if whole else ""
        raise UserError(f"checkpoint {place} is damaged ({problem}){advice}")
    return place, _about(place)


def network_for(path: str | os.PathLike[str], model: str | None) -> nn.Module | None:
    """The untrained network of a checkpoint as ``package.module:function`` builds it for the checkpoint's classes; None
    where no function is named.

    Raises:
        UserError: no checkpoint, or the function is of another kind of name, fails, or gives no module.
    """
    if model is None:
        return None
    if ":" not in model:
        raise UserError(f"model {model!r} must be package.module:function; a checkpoint knows all other networks")
    about = _about(_candidates(Path(path), ("best", "step"))[0])
    net = Foreign(model, "factory")
    module = build_foreign(net, num_classes=len(about["classes"]), in_chans=about["in_chans"])
    setattr(module, ORIGIN, net)
    return module


def load_state(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any], dict[str, Any], list[str]]:
    """The newest training state of a run's folder that is not damaged.

    Returns:
        Its checkpoint folder, what the checkpoint says about itself, the state, and notes on damaged ones that were
        passed over.
    """
    place, notes = _newest_whole(_candidates(Path(path), ("step",)))
    if not (place / "state.json").is_file():
        raise UserError(f"checkpoint {place} has no training state; it can be evaluated or fine-tuned, not resumed")
    tensors = _tensors(place / "state.safetensors")
    plain = read_json(place / "state.json", "training state", TRUSTED_NUMBERS)
    try:
        state = object_of(from_plain(plain, tensors), f"training state {place / 'state.json'}")
    except (KeyError, TypeError, ValueError) as error:
        raise _unlike(place / "state.json", error) from error
    return place, _about(place), state, notes


def about_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What the newest training state of a run's folder that is not damaged says about itself."""
    return _about(_newest_whole(_candidates(Path(path), ("step",)))[0])


def load_weights_into(net: nn.Module, place: Path) -> None:
    """The checkpoint's weights into ``net``; every key and shape must fit."""
    weights = _tensors(place / "model.safetensors")
    own = net.state_dict()
    missing, unknown = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    shapes = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if missing or unknown or shapes:
        parts = [
            f"lacks {missing[0]} and {len(missing) - 1} more" if missing else "",
            f"has {unknown[0]} and {len(unknown) - 1} more" if unknown else "",
        ]
        if shapes:
            name = shapes[0]
            parts.append(f"{name} is {tuple(weights[name].shape)}, the network's {tuple(own[name].shape)}")
        raise UserError(
            f"checkpoint {place} is of another architecture: it {'; '.join(part for part in parts if part)}"
        )
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        raise _unlike(place / "model.safetensors", error) from error


def list_checkpoints(run: str | os.PathLike[str], kinds: tuple[str, ...] = ("step",)) -> list[Path]:
    """Checkpoint folders of a run, kinds in the order given, the newest first."""
    folder = Path(run) / "checkpoints"
    found = []
    for entry in folder.iterdir() if folder.is_dir() else ():
        if (match := _NAME.fullmatch(entry.name)) and match[1] in kinds and entry.is_dir():
            found.append((kinds.index(match[1]), -int(match[2]), entry))
    return [entry for _, _, entry in sorted(found)]


def prune(run: str | os.PathLike[str], *, keep: int, kind: str = "step") -> None:
    """Remove all but the ``keep`` newest checkpoints of a kind, and what interrupted writes left behind; what another
    run is writing stays.
    """
    for old in list_checkpoints(run, (kind,))[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    sweep(Path(run) / "checkpoints")


def drop_from(run: str | os.PathLike[str], batches: int, *, kind: str = "step", keep: Path | None = None) -> None:
    """Remove the checkpoints of a kind after so many batches and more, which a run has gone back behind; ``keep`` stays
    and takes the number.
    """
    for place in list_checkpoints(run, (kind,)):
        if place != keep and batches_of(place) >= batches:
            shutil.rmtree(place, ignore_errors=True)
    if keep is not None and batches_of(keep) != batches:
        os.rename(keep, keep.with_name(f"{kind}-{batches:08d}"))
        fsync_dir(keep.parent)


def batches_of(place: Path) -> int:
    """After how many batches of its run a checkpoint was written, by its name."""
    return int(place.name.rpartition("-")[2])


def verify_checkpoint(place: Path) -> str | None:
    """What is wrong with a checkpoint folder's files; None when every checksum is right."""
    try:
        lines = (place / _SUMS).read_text(encoding="utf-8").splitlines()
        expected = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        if not {"model.safetensors", "checkpoint.json"} <= set(expected):
            return f"{_SUMS} is incomplete"
        for name, digest in expected.items():
            if os.path.basename(name) != name or sha256(place / name) != digest:
                return f"{name} does not have the checksum it was written with"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _candidates(path: Path, kinds: tuple[str, ...]) -> list[Path]:
    """A checkpoint's own folder, or those of a run, kinds in the order given, the newest first; at least one."""
    path = inside_fit(path, "train")
    if path.is_file():
        kind = (
            "a pickle or foreign file" if path.suffix in (".pt", ".pth", ".pkl", ".bin", ".ckpt", ".tar") else "a file"
        )
        raise UserError(f"{path} is {kind}, not a convscale checkpoint folder; load plain weights with load_weights")
    if not path.is_dir():
        raise UserError(f"checkpoint {path} does not exist")
    if (path / "checkpoint.json").is_file() or (path / _SUMS).is_file():
        return [path]
    if not (places := list_checkpoints(path, kinds)):
        raise UserError(f"no checkpoint found in {path}")
    return places


def _newest_whole(places: list[Path]) -> tuple[Path, list[str]]:
    """The first that is not damaged, and a note on each before it."""
    notes = []
    for place in places:
        problem = verify_checkpoint(place)
        if problem is None:
            return place, notes
        notes.append(f"checkpoint {place} is damaged ({problem}); the one before it is used")
    raise UserError(
        f"{notes[0].split('; the one')[0]}" + (f", and so are the {len(notes) - 1} before it" if len(notes) > 1 else "")
    )


def _unlike(path: Path, error: Exception) -> UserError:
    """What a part of a checkpoint that can not be used is told by."""
    said = f"it lacks {error}" if isinstance(error, KeyError) else first_line(error)
    return UserError(f"{path} is damaged, or of another version ({said})")


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file."""
    check_tensors(path, "checkpoint's file")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise _unlike(path, error) from error


_PARTS: dict[str, tuple[type, ...]] = {
    "format_version": (int,),
    "spec": (dict, type(None)),
    "in_chans": (int,),
    "classes": (list,),
    "preprocessing": (dict,),
}
"""What every ``checkpoint.json`` says, and what kind of value."""
_MAY: dict[str, tuple[type, ...]] = {
    "foreign": (dict, type(None)),
    "detector": (dict,),
    "global_pool": (str,),
    "metrics": (dict,),
    "recipe": (dict,),
    "versions": (dict,),
    "seed": (int,),
    "steps_per_epoch": (int,),
    "data_digest": (str, type(None)),
    "splits": (dict,),
}
"""What it may say."""


def _about(place: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, each part of its kind."""
    path = place / "checkpoint.json"
    about = object_of(read_json(path, "checkpoint", TRUSTED_NUMBERS), f"checkpoint {path}")
    if missing := [key for key in _PARTS if key not in about]:
        raise UserError(f"checkpoint {path} lacks {', '.join(missing)}")
    for key, kinds in (_PARTS | _MAY).items():
        value = about.get(key)
        if key in about and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise UserError(f"checkpoint {path}: {key} is {repr(value)[:40]}; it must be {_WORDS[kinds[0]]}")
    classes, foreign = about["classes"], about.get("foreign")
    if not classes or len(set(map(str, classes))) < len(classes) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"checkpoint {path}: classes must be names, each once, and at least one")
    if foreign is not None and not all(isinstance(foreign.get(key), str) for key in ("name", "origin")):
        raise UserError(f"checkpoint {path}: foreign must have name and origin, texts both")
    if not isinstance(best := about.get("metrics", {}).get("best", {}), dict):
        raise UserError(f"checkpoint {path}: metrics.best is {repr(best)[:40]}; it must be an object")
    for key in ("thresholds", "temperatures"):
        if best.get(key) is not None and not _one_each(best[key], classes):
            raise UserError(f"checkpoint {path}: metrics.best.{key} must be a finite number for each class")
    check_whole(f"checkpoint {path}: in_chans", about["in_chans"])
    if about["format_version"] > FORMAT_VERSION:
        raise UserError(
            f"checkpoint {place} has format {about['format_version']}, this convscale reads up to {FORMAT_VERSION}; "
            "update convscale"
        )
    return about


_WORDS = {str: "text", int: "a whole number", dict: "an object", list: "a list"}


def _one_each(values: object, classes: list[str]) -> bool:
    """Whether ``values`` are finite numbers, one for each class."""
    return (
        isinstance(values, list)
        and len(values) == len(classes)
        and all(isinstance(value, int | float) and math.isfinite(value) for value in values)
    )


def _preprocessing(about: dict[str, Any], place: Path) -> Preprocessing:
    try:
        return Preprocessing.from_dict(about["preprocessing"])
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"checkpoint {place / 'checkpoint.json'}: preprocessing: {first_line(error)}") from error


def _spec_dict(net: nn.Module) -> dict[str, object] | None:
    spec = getattr(net, "spec", None)
    return spec.to_dict() if spec is not None else None


def _pool_dict(net: nn.Module) -> dict[str, str]:
    """How a network of ours pools, which its spec does not say; nothing for the usual mean."""
    kind = getattr(getattr(net, "global_pool", None), "kind", "avg")
    return {} if kind == "avg" or getattr(net, "spec", None) is None else {"global_pool": kind}


def _build_foreign(name: str, origin: str, about: dict[str, Any], place: Path) -> nn.Module:
    """timm's network. A function of a user's own is not called because a file says so: whoever wrote the file would
    choose what runs.
    """
    if origin != "timm":
        raise UserError(
            f"checkpoint {place} is of a network that {name} built; give the network: load_checkpoint(path, net=...), "
            f"or --model {name}"
        )
    need_timm(name)
    if not timm_has(name):
        raise UserError(f"checkpoint {place} is of timm's {name!r}, which the installed timm does not have")
    net = Foreign(name, "timm")
    module = build_foreign(net, num_classes=len(about["classes"]), in_chans=about["in_chans"])
    setattr(module, ORIGIN, net)
    return module


def _detector_dict(net: nn.Module) -> dict[str, object]:
    """What a detector of ours is built from; nothing for any other network."""
    spec = getattr(net, "detector_spec", None)
    return {} if spec is None else {"detector": spec.to_dict()}


def _build_detector(about: dict[str, Any], place: Path) -> nn.Module:
    from convscale.networks.detectors import create_detector
    from convscale.nn.detectors import DetectorSpec

    try:
        spec = DetectorSpec.from_dict(about["detector"])
    except UserError as error:
        raise UserError(f"checkpoint {place / 'checkpoint.json'}: detector: {error}") from error
    if spec.num_classes != len(about["classes"]):
        raise UserError(
            f"checkpoint {place} names {len(about['classes'])} classes, its detector has {spec.num_classes}"
        )
    if isinstance(spec.backbone, str) and ":" in spec.backbone:
        raise UserError(
            f"checkpoint {place} is of a detector over a network that {spec.backbone} built; give the network: "
            "load_checkpoint(path, net=...)"
        )
    return create_detector(spec)


def _foreign_dict(net: nn.Module) -> dict[str, str] | None:
    """Who builds a network that other code built from a name."""
    origin = getattr(net, ORIGIN, None)
    return {"name": origin.name, "origin": origin.origin} if isinstance(origin, Foreign) else None


def _build(about: dict[str, Any], place: Path) -> nn.Module:
    if "detector" in about:
        return _build_detector(about, place)
    if (foreign := about.get("foreign")) is not None:
        return _build_foreign(str(foreign["name"]), str(foreign["origin"]), about, place)
    if about["spec"] is None:
        raise UserError(
            f"checkpoint {place} has no spec (its network was not built by convscale); give the network: "
            "load_checkpoint(path, net=...)"
        )
    from convscale.arch.spec import NetSpec
    from convscale.nn.net import create_model

    try:
        spec, pool = NetSpec.from_dict(about["spec"]), about.get("global_pool", "avg")
        return create_model(spec, num_classes=len(about["classes"]), in_chans=about["in_chans"], global_pool=pool)
    except UserError as error:
        raise UserError(f"checkpoint {place / 'checkpoint.json'}: {error}") from error
