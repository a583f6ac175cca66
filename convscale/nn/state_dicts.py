"""State dicts out of what trainers write: files, wrappers, prefixes. Nothing that a file names is imported or called.

A pickle may name classes of its own. A few that trainers are known to store beside the weights (``argparse.Namespace``,
numbers of numpy, paths, dates, Lightning's and Hydra's dictionaries) are replaced by stand-ins that keep fields and do
nothing; any other makes the file refused.
"""

from __future__ import annotations

import os
import re
import threading
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from convscale.errors import UserError, check_path
from convscale.read import TRUSTED_NUMBERS, check_tensors, read_json
from convscale.words import safe

WRAPPERS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema_model_state_dict", "ema_model", "params_ema", "ema"),
    *("state_dict", "model_state_dict", "model_state", "model", "model_weights", "net_state_dict", "net", "network"),
    *("weights", "params", "module"),
)
"""Keys under which trainers keep the weights, the one that is taken first in front: averaged ones."""
_DEPTH = 6
"""Wrappers inside each other."""
_PREFIXES = ("module.", "_orig_mod.")
_COUNT = "n_averaged"
"""What torch's ``AveragedModel`` counts beside the weights, whose keys then begin with ``module.``."""
_NAMES = ("classes", "class_names", "class_to_idx", "idx_to_class", "labels", "label_names", "id2label", "CLASSES")
_ABOUT = ("args", "hyper_parameters", "hparams", "config", "meta", "pretrained_cfg")
"""Where trainers keep what they know of their data, beside the top."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StateDict:
    """What was found in a file or a dict."""

    tensors: dict[str, Tensor]
    """By key, as they stand there, but for ``module.`` and ``_orig_mod.`` before all of them."""
    others: tuple[str, ...] = ()
    """Keys beside them whose values are no tensors."""
    classes: tuple[str, ...] = ()
    """Class names in the order of the outputs, where it says any."""
    model: str = ""
    """The name of the network as timm's trainer writes it, where it says one."""


def read_state_dict(src: str | os.PathLike[str] | Mapping[str, object]) -> StateDict:
    """Tensors from a file, a checkpoint folder or a dict, unwrapped.

    Raises:
        UserError: no such file, a foreign pickle, or nothing in it is a mapping from names to tensors.
    """
    classes: tuple[str, ...] = ()
    if isinstance(src, Mapping):
        values: object = src
        where = "state dict"
    else:
        path = check_path("weights", src)
        if path.is_dir():
            classes = _folder_classes(path)
            path = path / "model.safetensors"
        where = str(path)
        if not path.is_file():
            raise UserError(f"no weights at {path}; name a .safetensors or .pth file")
        values = _read_file(path)
    found = _unwrapped(values)
    if found is None:
        holds = f" (it holds {_listed(values)})" if isinstance(values, Mapping) and values else ""
        raise UserError(f"{where} holds no state dict; a mapping from names to tensors is needed{holds}")
    tensors: dict[str, Tensor] = {}
    others = []
    for key, value in found.items():
        if not isinstance(key, str):
            raise UserError(f"{where} holds no state dict: {str(key)[:40]!r} is no name of a tensor")
        if isinstance(value, Tensor):
            if value.is_quantized or value.is_meta or value.is_nested or value.layout != torch.strided:
                raise UserError(f"{where}: {safe(key[:80])} is quantised, sparse, nested or empty; give plain tensors")
            tensors[key] = value
        else:
            others.append(key)
    arch = _fields(values).get("arch")
    return StateDict(
        tensors=_without_prefixes(tensors),
        others=tuple(others),
        classes=classes or class_names(values, found),
        model=arch if isinstance(arch, str) and len(arch) < 200 else "",
    )


def class_names(*values: object) -> tuple[str, ...]:
    """The class names that a checkpoint says, in the order of its outputs; none where it says none."""
    places: list[object] = []
    for value in values:
        places.append(value)
        for key in _ABOUT:
            about = _fields(value).get(key)
            places.append(about)
    for place in places:
        fields = _fields(place)
        for key in _NAMES:
            if names := _ordered(fields.get(key)):
                return names
    return ()


def _fields(value: object) -> Mapping[Any, object]:
    """Of a mapping, or of a stand-in."""
    if isinstance(value, Mapping):
        return value
    return vars(value) if isinstance(value, _StandIn | Namespace | SimpleNamespace) else {}


def _ordered(value: object) -> tuple[str, ...]:
    """Names out of a list, or a mapping to or from their numbers."""
    if isinstance(value, Mapping):
        pairs = list(value.items())
        if all(isinstance(name, str) and type(at) is int for name, at in pairs):
            pairs = [(at, name) for name, at in pairs]
        if all(isinstance(at, str) and at.isdecimal() and len(at) < 10 for at, _ in pairs):  # keys that were JSON
            pairs = [(int(at), name) for at, name in pairs]
        if not all(type(at) is int for at, _ in pairs) or sorted(at for at, _ in pairs) != list(range(len(pairs))):
            return ()
        value = [name for _, name in sorted(pairs, key=lambda pair: pair[0])]
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        return ()
    return tuple(value) if len(set(value)) == len(value) else ()


def _unwrapped(values: object, depth: int = 0) -> Mapping[object, object] | None:
    """The mapping that holds tensors; None where none does."""
    if not isinstance(values, Mapping) or depth > _DEPTH:
        return None
    for key in WRAPPERS:
        if (found := _unwrapped(values.get(key), depth + 1)) is not None:
            return found
    return values if any(isinstance(value, Tensor) for value in values.values()) else None


def _without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what wrappers put before every key, however they are nested."""
    while tensors:
        mine = {key: value for key, value in tensors.items() if key != _COUNT}
        prefix = next((one for one in _PREFIXES if mine and all(key.startswith(one) for key in mine)), None)
        if prefix is None:
            break
        tensors = {key.removeprefix(prefix): value for key, value in mine.items()}
    return tensors


def _listed(values: Mapping[Any, object]) -> str:
    names = [safe(str(key)[:40]) for key in list(values)[:6]]
    return ", ".join(names) + (f" and {len(values) - 6} more" if len(values) > 6 else "")


def _folder_classes(folder: Path) -> tuple[str, ...]:
    """What a checkpoint folder of ours calls its classes."""
    about = folder / "checkpoint.json"
    return class_names(read_json(about, "checkpoint", TRUSTED_NUMBERS)) if about.is_file() else ()


# ---------------------------------------------------------------- files


class _StandIn:
    """Stands where a pickle has an object of other code: keeps its fields and does nothing."""

    def __new__(cls, *args: object) -> _StandIn:
        return object.__new__(cls)

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            vars(self).update({key: value for key, value in state.items() if isinstance(key, str)})


class _Dict:
    """Stands for dictionaries of other kinds."""

    def __new__(cls, *args: object) -> dict[object, object]:  # pyright: ignore[reportInconsistentConstructor]
        return {}


class _List:
    """Stands for lists of other kinds; they are empty at first."""

    def __new__(cls, *args: object) -> list[object]:  # pyright: ignore[reportInconsistentConstructor]
        return []


_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path", "PurePath")
_OBJECTS = (
    *("argparse.Namespace", "types.SimpleNamespace", "torch.torch_version.TorchVersion"),
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS),
    *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray"),
    *(f"builtins.{name}" for name in ("dict", "list", "tuple", "int", "float", "str", "bool")),
    *("typing.Any", "omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata"),
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"),
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "String", "Integer", "Float", "Boolean", "Bytes", "Path")),
)
"""What trainers store beside weights, by the names that pickles know."""
_DICTS = (
    "collections.defaultdict",
    *(f"{lightning}.utilities.data.AttributeDict" for lightning in ("lightning.fabric", "lightning_fabric")),
    *(f"{lightning}.utilities.parsing.AttributeDict" for lightning in ("lightning.pytorch", "pytorch_lightning")),
)
_LISTS = ("collections.deque",)
_KNOWN: list[tuple[Callable[..., object], str]] = [
    *((_StandIn, name) for name in _OBJECTS),
    *((_Dict, name) for name in _DICTS),
    *((_List, name) for name in _LISTS),
]
_ONE_AT_A_TIME = threading.Lock()
"""What a pickle may name is kept by torch for the whole process."""
_NAMED = re.compile(r"GLOBAL (\S+) (?:was not an allowed|whose module)")


def _read_file(path: Path) -> object:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        check_tensors(path, "weights")
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"{path} is no valid safetensors file: {error}") from None
    try:
        with _ONE_AT_A_TIME, warnings.catch_warnings(), torch.serialization.safe_globals(_KNOWN):  # pyright: ignore
            warnings.simplefilter("ignore")  # on protocols and TorchScript: what matters is raised, too
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds; all mean that the file is not plain weights
        said = str(error)
        foreign = "weights only" in said.lower()
        named = _NAMED.search(said)
        kind = "a foreign pickle" if foreign else "damaged or of another kind"
        what = f": it names {safe(named[1][:80])}" if foreign and named else ""
        raise UserError(
            f"{path} is no file of weights alone ({kind}), so it is not loaded{what}; save a state dict or safetensors"
        ) from None
