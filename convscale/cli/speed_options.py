"""Options that the commands about speed share."""

from __future__ import annotations

from typing import Annotated

import typer

from convscale.cli.options import say
from convscale.errors import UserError, check_text

Device = Annotated[
    str,
    typer.Option(
        "--device",
        help="A named GPU or processor such as rtx-4090 or i9-10940x (predicted), or cpu, cuda, cuda:N (measured).",
    ),
]
BatchOption = Annotated[
    int | None,
    typer.Option(
        "-b",
        "--batch-size",
        help="Images per call; 256 on a named GPU, 1 on a named processor, 8 here when left out.",
    ),
]
PrecisionOption = Annotated[
    str | None,
    typer.Option(
        "--precision",
        help="fp32, amp (fp16), amp_bf16, bf16, fp16, int8; amp on a GPU, else fp32 if left out.",
    ),
]
Layout = Annotated[str, typer.Option("--layout", help="nchw or nhwc.")]
Compiled = Annotated[bool, typer.Option("--compiled", help="Behind PyTorch's compiler instead of eager.")]
Mode = Annotated[str, typer.Option("--mode", help="infer or train.")]


Task = Annotated[str, typer.Option("--task", help="classification, or detection: the network with a detector's head.")]
TASKS = ("classification", "detection")
Head = Annotated[
    str | None,
    typer.Option(
        "--head",
        help="With --task detection: fcos (when left out), retinanet, faster_rcnn or ssdlite.",
    ),
]
DetectorOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--detector",
        help="With --task detection, more of it: --detector neck_width=64, and of one that is timed "
        "num_classes=80 (20 when left out). Repeatable.",
    ),
]


def detector_head(task: str, head: str | None, options: list[str] | None) -> str | None:
    """The head of the detector that ``--task`` asks for; None: a classifier is asked for.

    Raises:
        UserError: an unknown task, or options of a detector for a classifier.
    """
    if check_text("--task", task, TASKS) == "detection":
        return "fcos" if head is None else head
    if head is not None:
        raise UserError(
            f"--head {head} goes with --task detection; `train --set head=ml_decoder` puts ML-Decoder on a classifier"
        )
    if options:
        raise UserError(f"--detector {options[0]} goes with --task detection; leave it out")
    return None


def progress_aside(text: str) -> None:
    """To people on the side, so that standard output stays clean."""
    say(text, err=True)
