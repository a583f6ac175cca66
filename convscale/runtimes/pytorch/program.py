"""``torch.export`` archives, checked before PyTorch may read them.

PyTorch's own reader unpickles some entries of an archive and evaluates the expressions in it, so a hostile one runs
code. An archive is read only when everything in it is of the few kinds that
:func:`convscale.formats.program.write_program` puts there.
"""

from __future__ import annotations

import io
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from convscale.errors import UserError, first_line
from convscale.read import Limits, json_of
from convscale.runtimes.silence import quiet

_ENTRY = re.compile(
    r"[^/]+/(data/weights/weight_\d+|data/(weights/model_weights|constants/model_constants)_config\.json|data/constants/tensor_\d+"
    r"|models/model\.json|data/sample_inputs/model\.pt|archive_format|archive_version|byteorder|\.data/(version|serialization_id))"
)
_OPERATOR = re.compile(
    r"(torch\.ops\.)?aten\.[A-Za-z0-9_]+\.[A-Za-z0-9_]+|(_?operator\.|torch\.ops\.aten\.sym_)[a-z_]+(\.[a-z]+)?"
)
_EXPRESSION = re.compile(
    r"(Symbol\('s\d+'(, (positive|integer|nonnegative)=True)*\)|s\d+|Mul|Add|FloorDiv|Integer|[0-9 ()*+,-])*"
)

_GRAPH = Limits(size=128 * 2**20, depth=40, nodes=10_000_000, finite=False)
"""Of a network's graph."""
_MOST_TEXT, _MOST_DEPTH, _MOST_DIGITS = 2_000, 20, 12
"""Of an expression: characters, brackets in each other, and digits in a row. One of powers in each other, or of a long
number, would be worked out for ever."""


def read_program(path: Path) -> nn.Module:
    """Check an archive and give its network.

    Raises:
        UserError: as :func:`check_program`, or PyTorch can not read it.
    """
    check_program(path)
    try:
        with quiet():
            module = torch.export.load(os.fspath(path)).module(check_guards=False)
    except Exception as error:
        raise UserError(f"{path.name} can not be read by torch {torch.__version__}: {first_line(error)}") from error
    assert isinstance(module, fx.GraphModule), f"an archive gave a {type(module).__name__}"
    # An exported module refuses train() and eval(); it is in eval mode for good.
    module.train = lambda mode=True: module  # pyright: ignore[reportAttributeAccessIssue]
    return module


def check_program(path: Path) -> None:
    """Refuse an archive with anything in it that could run code: pickles, libraries, unknown operators, expressions
    that are not shapes.

    Raises:
        UserError: it is no archive, or holds such a thing.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            for name in names:
                if not _ENTRY.fullmatch(name):
                    raise UserError(
                        f"{path.name} holds {name!r}, which no archive of convscale has; foreign archives are not "
                        "loaded"
                    )
            for name in names:
                if name.endswith("_config.json"):
                    _check_config(path, json_of(_entry(archive, name), name, _GRAPH))
                elif name.endswith("models/model.json"):
                    _check_graph(path, json_of(_entry(archive, name), name, _GRAPH))
                elif name.endswith("model.pt"):
                    torch.load(io.BytesIO(_entry(archive, name)), weights_only=True)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path.name} is damaged or no archive of convscale ({type(error).__name__}); foreign archives are not "
            "loaded"
        ) from error


def _entry(archive: zipfile.ZipFile, name: str) -> bytes:
    """What is packed under a name, bounded: a few bytes can unpack to any number."""
    with archive.open(name) as packed:
        data = packed.read(_GRAPH.size + 1)
    if len(data) > _GRAPH.size:
        raise ValueError(f"{name} is too large")
    return data


def _is_shape(text: str) -> bool:
    """Whether an expression is of a shape, and can be worked out at once."""
    if len(text) > _MOST_TEXT or "**" in text or re.search(rf"\d{{{_MOST_DIGITS + 1}}}", text):
        return False
    depth = most = 0
    for sign in text:
        depth += (sign == "(") - (sign == ")")
        most = max(most, depth)
    return most <= _MOST_DEPTH and bool(_EXPRESSION.fullmatch(text))


def _check_config(path: Path, config: Any) -> None:
    for name, entry in config["config"].items():
        if entry["use_pickle"]:
            raise UserError(f"{path.name} holds {name!r} as a pickle; foreign archives are not loaded")


def _check_graph(path: Path, model: Any) -> None:
    if model.get("guards_code"):
        raise UserError(f"{path.name} holds code; foreign archives are not loaded")
    waiting = [model]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            for key, fits, what in (("target", _OPERATOR.fullmatch, "operator"), ("expr_str", _is_shape, "expression")):
                if isinstance(value.get(key), str) and not fits(value[key]):
                    raise UserError(
                        f"{path.name} holds the {what} {value[key][:80]!r}, which no network here has; foreign "
                        "archives are not loaded"
                    )
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
