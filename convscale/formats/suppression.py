"""Non-maximum suppression as a part of an ONNX file: candidates in, a fixed number of boxes for each picture out."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

OUTPUT = "detections"
"""Name of the output: float32 (N, most, 6): x1, y1, x2, y2, score, label; a score of 0 says that there is nothing."""


def add_suppression(
    path: str | os.PathLike[str], *, side: int, score_threshold: float, nms_threshold: float, most: int
) -> None:
    """Put non-maximum suppression behind a file's outputs ``boxes`` (N, K, 4), ``scores`` (N, K), ``labels`` (N, K).

    Boxes of different classes are moved apart by their label times the square's side, so that one suppression does for
    all classes, as torchvision does it. What is kept is written into a table of ``most`` rows for each picture, so that
    the output has a fixed shape but for the batch. Other outputs stay, behind the table.

    Args:
        path: the file; it is replaced.
        side: of the square, in pixels.
        score_threshold: candidates at or below it do not count.
        nms_threshold: of two boxes of a class with a larger IoU the weaker one is dropped.
        most: boxes of a picture.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(os.fspath(path))
    graph = model.graph
    nodes: list[Any] = []

    def constant(name: str, value: np.ndarray) -> str:
        graph.initializer.append(numpy_helper.from_array(value, f"nms_{name}"))
        return f"nms_{name}"

    def node(kind: str, inputs: list[str], output: str, **options: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [f"nms_{output}"], name=f"nms_{output}_node", **options))
        return f"nms_{output}"

    whole = {name: constant(name, np.array(value, np.int64)) for name, value in (("zero", 0), ("one", 1))}
    axes = {at: constant(f"axis{at}", np.array([at], np.int64)) for at in (0, 1, 2)}

    # classes far apart from each other
    labels = node("Cast", ["labels"], "labels", to=TensorProto.FLOAT)
    step = constant("step", np.array(side + 1, np.float32))
    apart = node("Unsqueeze", [node("Mul", [labels, step], "apart"), axes[2]], "apart3")
    moved = node("Add", ["boxes", apart], "moved")
    scores = node("Unsqueeze", ["scores", axes[1]], "scores3")
    limits = [
        constant("most", np.array(most, np.int64)),
        constant("iou", np.array(nms_threshold, np.float32)),
        constant("least", np.array(score_threshold, np.float32)),
    ]
    kept = node("NonMaxSuppression", [moved, scores, *limits], "kept")  # (M, 3): picture, 0, candidate

    # what is kept, as rows
    pair = node("Gather", [kept, constant("pair_at", np.array([0, 2], np.int64))], "pair", axis=1)
    columns = [
        node("GatherND", ["boxes", pair], "kept_boxes"),
        *(
            node("Unsqueeze", [node("GatherND", [source, pair], f"kept_{name}"), axes[1]], f"kept_{name}1")
            for name, source in (("scores", "scores"), ("labels", labels))
        ),
    ]
    rows = node("Concat", columns, "rows", axis=1)  # (M, 6)

    # the how manieth of its picture each row is
    count = node("Squeeze", [node("Slice", [node("Shape", ["boxes"], "shape"), axes[0], axes[1]], "n1")], "n")
    pictures = node("Range", [whole["zero"], count, whole["one"]], "pictures")
    picture = node("Gather", [kept, axes[0]], "picture", axis=1)  # (M, 1)
    is_of = node("Cast", [node("Equal", [picture, pictures], "same")], "is_of", to=TensorProto.INT64)  # (M, N)
    so_far = node("Mul", [is_of, node("CumSum", [is_of, whole["zero"]], "cumulated")], "so_far")
    place = node("Sub", [node("ReduceSum", [so_far, axes[1]], "place1", keepdims=1), whole["one"]], "place")

    # into the table
    target = node("Concat", [picture, place], "target", axis=1)
    size = constant("size", np.array([most, 6], np.int64))
    shape = node("Concat", [node("Unsqueeze", [count, axes[0]], "n2"), size], "table_shape", axis=0)
    empty = node("Expand", [constant("nothing", np.array(0, np.float32)), shape], "empty")
    nodes.append(helper.make_node("ScatterND", [empty, target, rows], [OUTPUT], name="nms_table_node"))

    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param or "batch"
    graph.node.extend(nodes)
    others = [each for each in graph.output if each.name not in ("boxes", "scores", "labels")]
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [batch, most, 6]))
    graph.output.extend(others)
    onnx.checker.check_model(model)
    onnx.save(model, os.fspath(path))
