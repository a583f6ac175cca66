"""One picture under the maps of a network and of the same network scaled by depth, width, resolution and all three,
from trainings of them (EfficientNet, Tan and Le 2019, figure 7).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import torch

from convscale import words
from convscale.arch.spec import NetSpec
from convscale.artifact.answers import prepared
from convscale.conditions import size_text
from convscale.cost.counting import count
from convscale.errors import UserError
from convscale.files import write_text
from convscale.images.decode import ImageError
from convscale.learn.checkpoint import Checkpoint, load_checkpoint
from convscale.learn.record import reached
from convscale.maps.draw import data_uri, overlaid
from convscale.maps.explain import explain
from convscale.show.page import Column, Figures, Section, cell, page, paragraph, table

_ORDER = ("baseline", "deeper", "wider", "higher resolution", "compound")
"""As the figure has it."""


@dataclass(frozen=True, kw_only=True)
class _Scaled:
    """A training of a scaled network."""

    kind: str
    """One of ``_ORDER``."""
    factors: str
    """What it was multiplied by."""
    loaded: Checkpoint


def write_scaling_maps(
    base: NetSpec,
    checkpoints: Sequence[str | os.PathLike[str]],
    pictures: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
) -> Path:
    """Write a page with a row for each picture and a column for each network.

    Args:
        base: what the networks were scaled from.
        checkpoints: their trainings' folders, or checkpoints.
        pictures: files.
        output: the page.

    Raises:
        UserError: no picture, no checkpoint, one of another network or of other classes, or a picture that can not be
            read.
    """
    if not checkpoints or not pictures:
        missing = "--checkpoint" if not checkpoints else "--picture"
        raise UserError(f"--scaling needs trainings (--checkpoint) and pictures (--picture); there is no {missing}")
    found = sorted((_scaled(base, Path(path)) for path in checkpoints), key=lambda each: _ORDER.index(each.kind))
    for each in found[1:]:
        if each.loaded.classes != found[0].loaded.classes:
            raise UserError(f"checkpoint {each.loaded.path} has other classes than {found[0].loaded.path}")
    columns = [Column(title="picture", kind="name")] + [Column(title=_title(each)) for each in found]
    rows = [("", [cell(Path(path).name), *(_map(each, path) for each in found)]) for path in pictures]
    intro = paragraph(
        "Class activation maps of the likeliest class (Zhou et al. 2016): red places speak most for it. The networks "
        f"are {base.name} and what was scaled from it, each at its own size.",
        "note",
    )
    text = page(
        title=f"What {base.name} looks at when it is scaled",
        kicker="convscale report --scaling",
        head=intro,
        sections=[
            Section(title="Maps", body=table(columns, rows), anchor="maps"),
            Section(title="Networks", body=_networks(found), anchor="networks"),
        ],
        figures=Figures(),
    )
    write_text(output, text)
    return Path(output)


def _scaled(base: NetSpec, path: Path) -> _Scaled:
    """A training, and how its network comes from the baseline.

    Raises:
        UserError: it does not.
    """
    loaded = load_checkpoint(path)
    spec = getattr(loaded.net, "spec", None)
    if not isinstance(spec, NetSpec):
        raise UserError(f"checkpoint {path} is no network of convscale's, so nothing says what it was scaled from")
    lineage = spec.lineage
    if (lineage.base if lineage else spec) != base:
        origin = lineage.base.name if lineage else spec.name
        raise UserError(f"checkpoint {path} is {spec.name}, scaled from {origin}, not from {base.name}")
    factors = (1.0, 1.0, 1.0) if lineage is None else (lineage.depth, lineage.width, lineage.resolution)
    changed = [name for name, factor in zip(_ORDER[1:4], factors, strict=True) if abs(factor - 1) > 1e-9]
    kind = _ORDER[0] if not changed else changed[0] if len(changed) == 1 else _ORDER[4]
    said = ", ".join(f"{name} {factor:g}" for name, factor in zip("dwr", factors, strict=True))
    return _Scaled(kind=kind, factors=said, loaded=loaded)


def _title(each: _Scaled) -> str:
    return f"{each.kind} ({each.factors})"


def _map(each: _Scaled, path: str | os.PathLike[str]) -> str:
    """A picture under a network's map, and what the network said, as HTML."""
    loaded = each.loaded
    try:
        pixels = prepared(os.fspath(path), path, loaded.preprocessing)
    except ImageError as error:
        raise UserError(str(error)) from error
    batch = loaded.preprocessing.normalize(torch.from_numpy(np.ascontiguousarray(pixels[None])))
    maps = explain(loaded.net, batch, "cam")
    with torch.no_grad():
        probability = float(loaded.net(batch).softmax(1)[0, int(maps.targets[0])])
    said = f"{loaded.classes[int(maps.targets[0])]}, {words.percent(probability, 0)}"
    uri = data_uri(overlaid(pixels, maps.values[0]))
    return f'<img src="{uri}" alt="{escape(_title(each))}" style="width:100%;max-width:15rem"><br>{escape(said)}'


def _networks(found: Sequence[_Scaled]) -> str:
    """What each network is, and what its training reached."""
    rows = []
    for each in found:
        spec, validated = each.loaded.net.spec, reached(each.loaded.meta, each.loaded.path.name)
        assert isinstance(spec, NetSpec), "it was looked at before"
        size = each.loaded.preprocessing.image_size
        macs = count(each.loaded.net, image_size=size if isinstance(size, int) else None).macs
        best = words.percent(None if validated is None else validated[0], 1)
        cells = [spec.name, each.factors, f"{size_text(size)} px", words.number(macs / 1e6), best]
        rows.append(("", [cell(each.kind), *map(cell, cells)]))
    titles = ("scaled", "network", "factors", "size", "M MACs", "validation")
    return table([Column(title=title) for title in titles], rows)
