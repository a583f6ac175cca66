"""Every numeric option of every command with numbers that are none, or too large."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable

from benchmarks.accidents.play import Accident, Play, Word

BEYOND = ("99999999999999999999", str(2**31), "nan", "inf", "-inf", "", "x")
"""What no numeric option takes."""
NEEDED: dict[str, Callable[[Play], tuple[Word, ...]]] = {
    "scale": lambda play: ("resnet18",),
    "count": lambda play: ("resnet18",),
    "measure": lambda play: ("resnet18",),
    "fit": lambda play: ("--data-dir", play.stage.data, "--output", play.here / "made"),
    "demo": lambda play: ("--output", play.here / "made"),
    "check": lambda play: (play.stage.data,),
    "train": lambda play: ("--data-dir", play.stage.data, "--output", play.here / "made", "--model", "resnet18"),
    "evaluate": lambda play: (play.stage.run, "--data-dir", play.stage.data),
    "export": lambda play: (play.stage.run, "--output", play.here / "made"),
    "tune": lambda play: (play.stage.artifact,),
    "classify": lambda play: (play.stage.data, "--model", play.stage.artifact),
    "predict": lambda play: ("resnet18", "--device", "h100"),
    "choose": lambda play: ("--device", "h100"),
    "calibrate": lambda play: ("--output", play.here / "made"),
    "report": lambda play: ("--records", play.stage.records),
    "explain": lambda play: (play.stage.data, "--model", play.stage.artifact, "--output", play.here / "made"),
    "serve": lambda play: (play.stage.artifact,),
    "search": lambda play: ("--data-dir", play.stage.data, "--output", play.here / "made"),
}
"""What each command needs beside the option."""


def numeric_options() -> list[tuple[str, str]]:
    """(command, option) of every option that takes a number, by the commands' own signatures."""
    from convscale.cli.app import app

    found = []
    for command in app.registered_commands:
        assert command.callback is not None
        hints = typing.get_type_hints(command.callback, include_extras=True)
        for name in inspect.signature(command.callback).parameters:
            base, *more = (
                typing.get_args(hints[name]) if typing.get_origin(hints[name]) is typing.Annotated else (hints[name],)
            )
            kinds = set(typing.get_args(base)) | {base} if isinstance(base, types.UnionType) else {base}
            kinds |= {inner for kind in kinds for inner in typing.get_args(kind)}
            stated = [(getattr(info, "default", None), *(getattr(info, "param_decls", None) or ())) for info in more]
            given = [each for names in stated for each in names if isinstance(each, str) and each.startswith("-")]
            if kinds & {int, float}:
                option = max(given, key=len) if given else f"--{name.replace('_', '-')}"
                found.append((command.name or command.callback.__name__, option))
    return found


def _beyond(command: str, options: list[str]) -> Callable[[Play], None]:
    def act(play: Play) -> None:
        for option in options:
            for value in BEYOND:
                if option == "--seed" and value == str(2**31):
                    continue
                words = (command, *NEEDED[command](play), f"{option}={value}")
                seen = play.forked(*words)
                play.expect(seen.code == 2 and seen.one_line, f"{option}={value!r}: exit code {seen.code}: {seen.line}")
        play.expect(not (play.here / "made").exists(), "something is written")

    return act


def _accidents() -> list[Accident]:
    by_command: dict[str, list[str]] = {}
    for command, option in numeric_options():
        by_command.setdefault(command, []).append(option)
    return [
        Accident(
            name=f"numbers/{command}", did=f"{', '.join(options)}: too large, NaN, infinite, empty, text",
            act=_beyond(command, options),
        )
        for command, options in by_command.items()
    ]  # fmt: skip


def _threads(play: Play) -> None:
    for words in (
        ("measure", "resnet18", "--threads", "1025"),
        ("classify", play.stage.data, "--model", play.stage.artifact, "--workers", "1025"),
        ("train", "--data-dir", play.stage.data, "--output", play.here / "made", "--model", "resnet18", "-j", "1025"),
        ("tune", play.stage.artifact, "--threads", "1025"),
    ):
        play.refused(play.forked(*words), "1024")


def _settings(play: Play) -> None:
    """Recipe keys by ``--set``."""
    for key in ("lr", "epochs", "batch_size", "weight_decay", "image_size", "mixup", "label_smoothing", "ema_decay"):
        for value in ("99999999999999999999", "nan", "inf", "-1e999", "", "x", "[1]", "{}", "9" * 5000):
            seen = play.forked(*play.stage.training(play.here / "made", "--set", f"{key}={value}"))
            play.expect(seen.code == 2 and seen.one_line, f"{key}={value[:30]!r}: exit code {seen.code}: {seen.line}")


def _large_batch(play: Play) -> None:
    """A batch that would not fit is a doubt of a prediction, not an error."""
    play.done(play.forked("predict", "resnet18", "--device", "h100", "-b", "100000000"), "needs about .* has 80 GB")


ACCIDENTS = [
    *_accidents(),
    Accident(name="numbers/threads", did="1,025 threads or workers", act=_threads),
    Accident(name="numbers/--set", did="recipe keys that are no numbers, or beyond them", act=_settings),
    Accident(name="numbers/batch", did="predict with a batch that fits nowhere", act=_large_batch),
]
