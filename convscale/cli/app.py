"""The command line: one thin function per command.

Nothing heavy is imported before a command runs, so that ``--help`` answers at once. Bad input prints one line and exits
with 2.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NoReturn

import typer
from typer.core import TyperGroup

from convscale import words
from convscale._version import __version__
from convscale.aside import aside
from convscale.cli import calibrate as cli_calibrate
from convscale.cli import check as cli_check
from convscale.cli import classify as cli_classify
from convscale.cli import explain as cli_explain
from convscale.cli import fit as cli_fit
from convscale.cli import learn as cli_learn
from convscale.cli import measure as cli_measure
from convscale.cli import report as cli_report
from convscale.cli import search as cli_search
from convscale.cli import serve as cli_serve
from convscale.cli import ship as cli_ship
from convscale.cli import speed as cli_speed
from convscale.cli.live import take_away
from convscale.cli.numbers import with_numbers_checked
from convscale.cli.options import (
    ImgSize,
    Json,
    Overwrite,
    Zoo,
    print_json,
    say,
)
from convscale.cli.tables import Column, number_column, print_table
from convscale.errors import Stopped, UserError, naming_extras
from convscale.files import check_new_file, told
from convscale.networks.names import is_spec_file, network_of, spec_of

if TYPE_CHECKING:
    from typer._click.core import Command, Context
    from typer._click.formatting import HelpFormatter


class Commands(TyperGroup):
    """The commands a user begins with, each with a line; the others by name, group by group: all on one screen."""

    FIRST = ("fit", "choose", "measure", "train", "export", "classify", "report")
    REST: ClassVar[dict[str, tuple[str, ...]]] = {
        "Networks": ("list", "show", "scale", "search", "count"),
        "Speed and serving": ("predict", "calibrate", "tune", "serve"),
        "Data and training": ("check", "evaluate", "explain", "recipes"),
        "To try it": ("demo",),
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._checked: set[str] = set()

    def get_command(self, ctx: Context, cmd_name: str) -> Command | None:
        """A command, whose numbers are bounded."""
        command = super().get_command(ctx, cmd_name)
        # A command is looked up more than once in a call, and wrapped once.
        if command is not None and command.callback is not None and cmd_name not in self._checked:
            self._checked.add(cmd_name)
            options = {str(each.name): max(each.opts, key=len) for each in command.params if each.opts}
            command.callback = with_numbers_checked(command.callback, options)
        return command

    def list_commands(self, ctx: Context) -> list[str]:
        """In the order in which help shows them; one that stands in no group comes last."""
        names = [*self.FIRST, *(name for group in self.REST.values() for name in group)]
        return [*(name for name in names if name in self.commands), *(set(self.commands) - set(names))]

    def format_commands(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Write the commands."""
        width = formatter.width - 14
        rows = [(name, self.commands[name].get_short_help_str(width)) for name in self.FIRST]
        with formatter.section("Commands"):
            formatter.write_dl(rows)
        with formatter.section("More (convscale COMMAND --help)"):
            formatter.write_dl([(title, ", ".join(names)) for title, names in self.REST.items()])


app = typer.Typer(
    name="convscale",
    cls=Commands,
    help="Pick, scale, train and ship image ConvNets by throughput.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command("list")
def list_command(
    pattern: Annotated[
        str, typer.Argument(help="Shell pattern, such as 'tresnet*'; or a function or spec file of your own.")
    ] = "*",
    devices: Annotated[
        bool, typer.Option("--devices", help="Devices that speeds are predicted for, with how well each is known.")
    ] = False,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Released weights instead of architectures.")
    ] = False,
    zoo: Zoo = "all",
    runs: Annotated[
        Path | None, typer.Option("--runs", help="Runs in this folder: fits, trainings, searches, artefacts.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List models, own and timm's, or released weights with their published accuracy."""
    if devices:
        _list_devices(as_json)
        return
    if runs is not None:
        cli_report.list_runs(runs, as_json)
        return
    from convscale.networks.offered import architectures_in, weights_in

    own = ":" in pattern or is_spec_file(pattern)
    if own and pretrained:
        raise UserError(f"{pattern!r} is a network of your own, which has no released weights; leave --pretrained out")
    if not pretrained:
        names = [_checked(pattern)] if own else architectures_in(zoo, pattern)
        if not names:
            raise _unlisted(pattern)
        print_json(names) if as_json else typer.echo("\n".join(names))
        return
    weights = weights_in(zoo, pattern)
    if not weights:
        raise _unlisted(pattern)
    if as_json:
        print_json(
            [
                {
                    "name": each.name,
                    "zoo": each.zoo,
                    "licence": each.licence,
                    "extra_data": each.extra_data,
                    "attention": each.attention,
                    "results": [{"image_size": r.image_size, "top1": r.top1, "source": r.source} for r in each.results],
                }
                for each in weights
            ]
        )
        return
    print_table(
        [
            Column("weights"),
            number_column("px"),
            number_column("top-1"),
            Column("zoo"),
            Column("licence"),
            Column("extra data"),
        ],
        [
            [
                each.name,
                words.UNKNOWN if result is None else str(result.image_size),
                words.accuracy(result and result.top1),
                each.zoo,
                each.licence,
                each.extra_data or words.UNKNOWN,
            ]
            for each in weights
            for result in each.results or (None,)
        ],
    )
    say(
        "ImageNet-1k top-1, – where no published figure is known; recipes differ, so figures compare weights, not "
        "architectures. Extra data: beside ImageNet-1k. Source: timm's results table and model cards."
    )


def _checked(name: str) -> str:
    """The name of a user's own function or spec file, once a network came of it: it goes wherever a name goes.

    Raises:
        UserError: it can not be read, found or built.
    """
    from convscale.networks.resolve import shapes_of

    shapes_of(network_of(name))
    return name


def _unlisted(pattern: str) -> UserError:
    """What a pattern that matches nothing is told."""
    return UserError(f"no model matches {pattern!r}; `convscale list` shows all")


def _list_devices(as_json: bool) -> None:
    """What speeds are predicted for."""
    from dataclasses import asdict

    from convscale.predictor.devices import devices
    from convscale.predictor.fitted import known_by

    found = [(device, known_by(device.name)) for device in devices().values()]
    if as_json:
        print_json([{**asdict(device), "measured": list(modes)} for device, modes in found])
        return
    columns = [Column("device"), Column("also"), number_column("TFLOPS"), number_column("GB/s"), number_column("GB")]
    rows = [
        [
            device.name,
            ", ".join(device.aliases) or words.UNKNOWN,
            words.number(device.tensor_tflops),
            words.number(device.bandwidth_gb_s),
            words.number(device.memory_gb),
            ", ".join(modes) if modes else "its data sheet",
        ]
        for device, modes in found
    ]
    print_table([*columns, Column("known by")], rows)
    say(
        "TFLOPS: dense half precision by the maker's data sheet; sources: --json. Known by: tables of measurements in "
        "these modes, else the data sheet alone; `convscale calibrate` makes a device of yours known."
    )


@app.command()
def show(model: Annotated[str, typer.Argument(help="A model name or a spec file.")], as_json: Json = False) -> None:
    """Print a model's spec as YAML."""
    spec = spec_of(model)
    print_json(spec.to_dict()) if as_json else typer.echo(f"# {spec!r}\n{spec.to_yaml()}".rstrip())


@app.command()
def scale(
    model: Annotated[str, typer.Argument(help="A model name or a spec file.")],
    phi: Annotated[float | None, typer.Option(help="Compound coefficient; negative scales down.")] = None,
    rule: Annotated[
        str, typer.Option(help="compound, fast, depth, width, resolution, or a file of `search --scaling`.")
    ] = "compound",
    depth: Annotated[float | None, typer.Option(help="Multiplier of blocks.")] = None,
    width: Annotated[float | None, typer.Option(help="Multiplier of channels.")] = None,
    resolution: Annotated[float | None, typer.Option(help="Multiplier of the image's side.")] = None,
    img_size: ImgSize = None,
    divisor: Annotated[int | None, typer.Option(help="Widths become multiples of this.")] = None,
    output: Annotated[Path | None, typer.Option("--output", help="Write the spec to this .yaml or .json file.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Scale a model and print or save the new spec."""
    from convscale.arch.scaling import scale as scale_spec
    from convscale.arch.spec import save_spec

    spec = scale_spec(
        spec_of(model),
        phi=phi,
        rule=rule,
        depth=depth,
        width=width,
        resolution=resolution,
        image_size=img_size,
        divisor=divisor,
    )
    if output is not None:
        check_new_file(output, overwrite=overwrite)
        save_spec(spec, output)
    if as_json:
        print_json(spec.to_dict())
    else:
        say(repr(spec))
        say(
            f"written to {output}"
            if output
            else "--output FILE.yaml saves it; wherever a model name goes, the file goes too"
        )


cli_measure.register(app)
cli_fit.register(app)


def _version(value: bool) -> None:
    if value:
        say(f"convscale {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


cli_check.register(app)
cli_learn.register(app)
cli_ship.register(app)
cli_classify.register(app)
cli_explain.register(app)
cli_speed.register(app)
cli_calibrate.register(app)
cli_report.register(app)
cli_serve.register(app)
cli_search.register(app)


_OUT_OF_MEMORY = (
    "can't allocate memory",
    "out of memory",
    "bad_alloc",
    "Cannot allocate memory",
    "cannot allocate memory",
    "failed to map segment",
    "Storage size calculation overflowed",
)
"""How libraries say it."""


def _refuse(error: UserError) -> NoReturn:
    """One line, and the exit code."""
    line = words.safe(str(error))
    # What standard output still holds can not be written where its disk is full: the exit would fail once more.
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    with aside():
        typer.echo(f"convscale: {line}", err=True)
    sys.exit(130 if isinstance(error, Stopped) else 2)


def _open_standard_streams() -> None:
    """Where the shell has closed one (``>&-``), what goes there goes nowhere, and no file that is opened gets its
    number.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - to the process's end


def main() -> None:
    """Run the command line: exit code 0, 2 on bad input or where the file system or the memory does not let it, 3
    where what came out is not what was asked for, 130 when interrupted.
    """
    _open_standard_streams()
    try:
        try:
            with naming_extras("this command"):
                code = app(standalone_mode=False)
        finally:
            take_away()
    except UserError as error:
        _refuse(error)
    except OSError as error:
        if (line := told(error)) is None:
            raise
        _refuse(line)
    except (MemoryError, RuntimeError, ImportError) as error:
        if not isinstance(error, MemoryError) and not any(text in str(error) for text in _OUT_OF_MEMORY):
            raise
        _refuse(UserError("out of memory; a smaller batch, image size or network would be right"))
    except KeyboardInterrupt:
        with aside():
            typer.echo("convscale: interrupted", err=True)
        sys.exit(130)
    except Exception as error:
        if (line := _usage(error)) is None:
            raise
        _refuse(UserError(line))
    sys.exit(code if isinstance(code, int) else 0)


def _usage(error: Exception) -> str | None:
    """What typer says of a command line that it can not read, in one line; None for any other error. Without a command
    its help is shown.
    """
    if not hasattr(error, "format_message") or not hasattr(error, "show"):
        return None  # click's error, or typer's own copy of it: no type is right for both
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # pyright: ignore[reportAttributeAccessIssue]
        sys.exit(2)
    said = " ".join(str(error.format_message()).split())  # pyright: ignore[reportAttributeAccessIssue]
    said = said if len(said) <= 300 else f"{said[:200]}...{said[-60:]}"
    command = getattr(getattr(error, "ctx", None), "command_path", "convscale")
    return f"{said.rstrip('.')} (`{command} --help` shows all)"


if __name__ == "__main__":
    main()
