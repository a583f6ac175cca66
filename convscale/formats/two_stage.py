"""Faster R-CNN as one ONNX file with a free batch: the first stage, its suppression, the second stage.

What the second stage looks at depends on what the first one finds, so the two are captured apart. Between them stands
the suppression of ``formats.suppression``, whose table has as many rows for each picture as the first stage may
propose; rows without a proposal are boxes without area, and so is what the second stage makes of them. So no shape
depends on the picture.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convscale.errors import UserError
from convscale.formats.baked import BakedBoxes
from convscale.formats.fold import fold
from convscale.formats.onnx import write_onnx
from convscale.formats.suppression import OUTPUT, add_suppression
from convscale.images.preprocess import Preprocessing
from convscale.nn.detector_graph import OUTPUTS, TWO_STAGES, DetectorGraph
from convscale.nn.modes import evaluating

_FIRST, _PROPOSALS = "first_", "proposals"


def check_two_stages(form: str, *, int8: bool) -> None:
    """
    Raises:
        UserError: Faster R-CNN has no such form.
    """
    if form == "torch" or int8:
        raise UserError(
            f"head {TWO_STAGES} ships as onnx or openvino, in float: its second stage depends on what the first finds; "
            "got " + ("int8" if int8 else f"format {form}")
        )


def write_two_stages(graph: DetectorGraph, path: str | os.PathLike[str], bake: Preprocessing | None = None) -> None:
    """Write a Faster R-CNN on the CPU as one ONNX file with a free batch: images to candidates (``OUTPUTS``).

    Args:
        graph: of the detector, in any mode; it is left as it is.
        path: the file.
        bake: normalising becomes a part of it; None: it takes normalised images.
    """
    import onnx

    first, second = graph.first, graph.second
    assert first is not None, "a graph of two stages"
    assert second is not None, "a graph of two stages"
    example = torch.zeros(2, 3, graph.side, graph.side)
    behind = Path(f"{path}.second")
    with evaluating(graph):
        with torch.no_grad():
            maps = tuple(first(example)[3:])
        names = tuple(f"map{number}" for number in range(len(maps)))
        folded: nn.Module = fold(first, example)
        if bake is not None:
            folded, example = BakedBoxes(folded, bake), torch.zeros(2, graph.side, graph.side, 3, dtype=torch.uint8)
        write_onnx(folded, example, path, outputs=(*OUTPUTS, *names))
        add_suppression(path, side=graph.side, score_threshold=0.0, nms_threshold=first.nms_threshold, most=second.most)
        table = torch.zeros(2, second.most, 6)
        write_onnx(second, (table, maps), behind, outputs=OUTPUTS, inputs=(_PROPOSALS, *names))
    joined = _joined(onnx.load(os.fspath(path)), onnx.load(behind), names)
    behind.unlink()
    onnx.checker.check_model(joined)
    onnx.save(joined, os.fspath(path))


def _joined(first: Any, second: Any, shared: Sequence[str]) -> Any:
    """One model: ``first``, whose own names get a prefix, then ``second``, which takes its table and ``shared``."""
    known = {name: name for name in ("", *shared, *(each.name for each in first.graph.input))} | {OUTPUT: _PROPOSALS}
    _rename(first.graph, lambda name: known.get(name, _FIRST + name))
    if first.functions or second.functions:
        raise UserError("the exporter left functions in a detector's file; it can not be joined")
    first.graph.node.extend(second.graph.node)
    first.graph.initializer.extend(second.graph.initializer)
    first.graph.value_info.extend(second.graph.value_info)
    del first.graph.output[:]
    first.graph.output.extend(second.graph.output)
    domains = {each.domain for each in first.opset_import}
    first.opset_import.extend(each for each in second.opset_import if each.domain not in domains)
    return first


def _rename(graph: Any, name_of: Callable[[str], str]) -> None:
    """Give every value and node of a graph another name."""
    for each in (*graph.initializer, *graph.value_info, *graph.input, *graph.output):
        each.name = name_of(each.name)
    for node in graph.node:
        node.name = _FIRST + node.name
        for names in (node.input, node.output):
            names[:] = [name_of(name) for name in names]
