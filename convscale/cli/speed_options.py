"""Options that the commands about speed share."""

from __future__ import annotations

from typing import Annotated

import typer

from convscale.cli.options import say

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
Head = Annotated[str, typer.Option("--head", help="With --task detection: fcos, retinanet or ssdlite.")]
DetectorOptions = Annotated[
    list[str] | None,
    typer.Option("--detector", help="With --task detection, more of it: --detector neck_width=64. Repeatable."),
]


def progress_aside(text: str) -> None:
    """To people on the side, so that standard output stays clean."""
    say(text, err=True)
