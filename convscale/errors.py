"""The exceptions for what a user can put right, and the checks of single arguments that raise them."""

from __future__ import annotations

import errno
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path

MOST_THREADS = 1_024
"""Of threads and of processes that are asked for."""
MOST_WHOLE = 2**31 - 1
"""No whole number that a user gives may be larger."""


class UserError(ValueError):
    """Bad input: one line that says what was wrong, the value, and what would be right.

    The command line prints it and exits with code 2; nothing else is caught there, so our own mistakes keep their
    traceback.
    """


class Stopped(UserError):
    """A run was told to stop, and its state is saved where it has one; the command line exits with 130, as after
    Ctrl-C.
    """


class DoesNotFit(UserError):
    """Memory does not hold a network at the batch asked for."""


EXTRAS = {
    "train": (
        *("torch", "torchvision", "torchmetrics", "tensorboard", "scipy", "safetensors", "huggingface_hub"),
        *("onnx", "onnxscript", "jinja2", "plotly"),
    ),
    "openvino": ("openvino", "nncf"),
    "timm": ("timm",),
    "schedule-free": ("schedulefree",),
    "search": ("optuna",),
    "ray": ("ray",),
    "detect": ("faster_coco_eval",),
    "explain": ("captum",),
    "serve": ("fastapi", "uvicorn", "python_multipart", "prometheus_client"),
    "mlflow": ("mlflow",),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}
"""What each extra of the package installs, by the names they are imported by."""


class MissingExtra(ImportError, UserError):
    """Something needs a library that comes with an extra of the package."""


@contextmanager
def naming_extras(what: str) -> Iterator[None]:
    """Turn the failing import of an extra's library into one line that says how to install it.

    Wherever a user comes in (a public name, a command, a function that needs torch for some of its answers) stands one
    of these; nothing else in the package looks after missing libraries of extras.

    Args:
        what: what needs it, for the message.

    Raises:
        MissingExtra: in the place of the ImportError.
    """
    try:
        yield
    except MissingExtra:
        raise
    except ImportError as error:
        known = {library: extra for extra, libraries in EXTRAS.items() for library in libraries}
        named = (error.name or "").partition(".")[0]
        library = named or next((word for word in re.findall(r"\w+", str(error)) if word in known), "")
        if library not in known:
            raise
        absent = isinstance(error, ModuleNotFoundError) and error.name == library
        trouble = "is not installed" if absent else f"can not be imported ({first_line(error)})"
        raise MissingExtra(
            f'{what} needs {library}, which {trouble}; pip install "convscale[{known[library]}]"', name=library
        ) from error


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The end of an unknown-name message: `` (nearest: a, b)``, or all known names when there are few and none is
    close.
    """
    from difflib import get_close_matches  # slow to import, and rarely needed

    known = list(known)
    close = get_close_matches(name, known, n=count, cutoff=0.5)
    if close:
        return f" (nearest: {', '.join(close)})"
    return f" (known: {', '.join(sorted(known))})" if len(known) <= 24 else ""


def short(value: object, most: int = 200) -> str:
    """A value in a message: at most some characters of it, and never an error."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a whole number of thousands of digits; a list that holds itself
        text = f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def check_whole(name: str, value: object, least: int = 1) -> int:
    """``value`` as an int.

    Raises:
        UserError: it is no whole number from ``least`` to 2**31 - 1; True and False are none.
    """
    whole = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if whole is None or not least <= whole <= MOST_WHOLE:
        most = f" and at most {MOST_WHOLE}" if whole is not None and whole > MOST_WHOLE else ""
        raise UserError(f"{name} is {short(value)}; it must be a whole number of at least {least}{most}")
    return whole


def check_number(name: str, value: object, right: str, low: float = -math.inf, high: float = math.inf) -> float:
    """``value`` as a float.

    Args:
        name: what is checked.
        value: what was given.
        right: the end of the message: what it must be.
        low: the least right value.
        high: the largest.

    Raises:
        UserError: it is no finite number in [low, high]; True and False are none.
    """
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # a whole number beyond what a float can hold
        number = math.inf
    if not math.isfinite(number) or not low <= number <= high:
        raise UserError(f"{name} is {short(value)}; it must be {right}")
    return number


def check_path(name: str, value: object) -> Path:
    """``value`` as a path; UserError if it is neither text nor a path."""
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise UserError(f"{name} is {value!r}; it must be a path")
    return Path(value)


def check_flag(name: str, value: object) -> bool:
    """``value``, if it is True or False; UserError if not: the text "false" is no false."""
    if not isinstance(value, bool):
        raise UserError(f"{name} is {value!r}; it must be True or False")
    return value


def check_text(name: str, value: object, known: Collection[str] | None = None, what: str = "") -> str:
    """``value``, if it is text, and one of ``known`` where that is given.

    Args:
        name: what is checked.
        value: what was given.
        known: the values it may have.
        what: an example, for the message where ``known`` is left out.

    Raises:
        UserError: it is not; the nearest of ``known`` are named.
    """
    if not isinstance(value, str):
        right = f"one of {', '.join(map(repr, known))}" if known else f"text{f' such as {what!r}' if what else ''}"
        raise UserError(f"{name} is {value!r}; it must be {right}")
    if known is not None and value not in known:
        raise UserError(f"{name} {value!r} is unknown{nearest(value, known)}")
    return value


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something, else its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


_SYSTEM_TROUBLE = {
    errno.EMFILE: "too many open files: raise the limit (ulimit -n) or use fewer workers",
    errno.ENFILE: "too many open files in the whole system: end some programs",
    errno.ENOMEM: "out of memory: use a smaller batch or fewer workers",
    errno.EIO: "the disk or the network behind it fails: input/output error",
    errno.ESTALE: "the network folder it is in went away: mount it again",
    errno.ENODEV: "the device it is on went away",
    errno.ENXIO: "the device it is on went away",
}


class SystemTrouble(UserError):
    """The system, not the input, is what fails: never a reason to call a picture bad."""


def stop_if_system(error: OSError, path: object) -> None:
    """Return where an error is about the file itself.

    Raises:
        SystemTrouble: the system is at the end of its means (open files, memory), or its disk fails; one line.
    """
    if error.errno in _SYSTEM_TROUBLE:
        raise SystemTrouble(f"{path}: {_SYSTEM_TROUBLE[error.errno]}") from error
