"""What the commands share: option types, printing, specs from names or files. Nothing heavy is imported."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, ClassVar, TextIO

import typer
from typer.core import TyperCommand

from convscale import words
from convscale.aside import aside
from convscale.errors import UserError
from convscale.files import check_outside, json_numbers
from convscale.networks.names import is_spec_file

MISSED = 3
"""Exit code of what is done, but misses its constraint."""
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Model = Annotated[
    str,
    typer.Option(
        "--model", help="A name (`convscale list`), a spec file, or package.module:function for a network of your own."
    ),
]
DataDir = Annotated[Path, typer.Option("--data-dir", help="Folder of class folders, idx files, or a manifest.")]
ImgSize = Annotated[int | None, typer.Option("--img-size", help="Side in pixels; the model's own when left out.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.")]
Precision = Annotated[str, typer.Option("--precision", help="fp32, amp (fp16), amp_bf16, bf16, fp16 or int8.")]
Runtime = Annotated[
    str,
    typer.Option(
        "--runtime", help="eager, compiled, compiled-frozen, compiled-max, onnxruntime, openvino or tensorrt."
    ),
]
Threads = Annotated[int | None, typer.Option("--threads", help="Compute threads; one per core when left out.")]
Output = Annotated[Path, typer.Option("--output", help="Folder to make.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output.")]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Go on in the output, or start where there is nothing yet (also: --resume auto)."),
]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Override a recipe key: --set lr=0.05. Repeatable.")]
Epochs = Annotated[int | None, typer.Option("--epochs", help="Instead of the recipe's.")]
Zoo = Annotated[
    str, typer.Option("--zoo", help="own, timm, or all: an architecture that both have comes from the own code.")
]
Licences = Annotated[list[str] | None, typer.Option("--licence", help="Only weights under this licence. Repeatable.")]
Commercial = Annotated[
    bool, typer.Option("--commercial", help="No weights that must not be sold, or whose licence is not known.")
]
NoExtraData = Annotated[bool, typer.Option("--no-extra-data", help="No weights that saw more than ImageNet-1k.")]
Attention = Annotated[
    bool, typer.Option("--attention", help="Networks with attention too; predictions were fitted on ConvNets.")
]
Confidence = Annotated[
    float,
    typer.Option("--confidence", help="Probability with which a predicted speed must keep it, 0.5 to 0.99."),
]
MaxBadRate = Annotated[
    float, typer.Option("--max-bad-rate", help="Share of images that may be unreadable and are left out, 0 to 1.")
]
Seed = Annotated[int, typer.Option("--seed", help="Of everything drawn.")]


class WordyCommand(TyperCommand):
    """A command two of whose flags may be followed by a word: ``--resume auto``, as in job scripts (go on where there
    is a state, else start), and ``--int8 qat``.
    """

    SAME: ClassVar = {("--resume", "auto"): (), ("--int8", "qat"): ("--qat",)}
    """By flag and word what to put in the word's place."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put options in the place of words."""
        # ``ctx`` is click's or, in newer versions, typer's own copy of it: no type is right for both.
        kept: list[str] = []
        for word in args:
            flag, _, after = word.partition("=")
            if (flag, after) in self.SAME:
                kept += [flag, *self.SAME[flag, after]]
            else:
                kept += self.SAME.get((kept[-1] if kept else "", word), (word,))
        return super().parse_args(ctx, kept)


def end_where_missed(missed: str) -> None:
    """Say on the side that a constraint is missed, and end with the code for that; nothing where it is kept (empty)."""
    if missed:
        say(f"convscale: {missed}", err=True)
        raise typer.Exit(MISSED)


def terminal_width() -> int:
    """Characters of a line: the terminal's, or ``COLUMNS``; 120 where there is no terminal."""
    return max(shutil.get_terminal_size((120, 24)).columns, 40)


def say(text: str = "", indent: int = 0, *, err: bool = False) -> None:
    """Print, wrapped to the terminal; continued lines stand further in. What goes to standard error may be lost."""
    width, lead = terminal_width(), " " * indent
    for line in map(words.safe, text.split("\n")):
        wrapped = textwrap.wrap(
            line,
            width,
            initial_indent=lead,
            subsequent_indent=lead + "  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        with aside() if err else nullcontext():
            typer.echo("\n".join(wrapped), err=err)


def refuse_lost(given: Mapping[str, object], why: str) -> None:
    """
    Raises:
        UserError: one of these options is given, which nothing would go by; ``why`` follows its name.
    """
    if lost := [flag for flag, value in given.items() if value]:
        raise UserError(f"{lost[0]} {why}")


def print_json(value: object) -> None:
    """Print for machines."""
    typer.echo(json.dumps(json_numbers(value), indent=2, default=str, allow_nan=False))


def names_on_stdin() -> TextIO:
    """Standard input, which names files, one a line: those that are no UTF-8 too, as the system's own calls give them.
    To be called before anything is read of it.
    """
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    return sys.stdin


def keep_inputs(output: Path, models: Iterable[str | None], data_dir: Path, *, overwrite: bool, resume: bool) -> None:
    """Refuse to replace a folder with the file of a spec in it that is to be built, or the data: for before these are
    read.

    Raises:
        UserError: the data or one of the models lies in it.
    """
    if overwrite and not resume:
        files = [name for name in models if name is not None and is_spec_file(name)]
        check_outside(output, [("data", data_dir), *(("model", name) for name in files)])


def overrides_of(pairs: list[str] | None, *, flag: str = "--set") -> dict[str, Any]:
    """Keys and values from ``--set key=value``, or from another flag; to be unpacked into keywords, so of any type."""
    out: dict[str, str] = {}
    for pair in pairs or []:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise UserError(f"{flag} takes key=value, got {pair!r}")
        out[key.strip()] = value.strip()
    return out
