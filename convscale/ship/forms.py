"""Of all the forms in which a network can be shipped, the one that is fastest on this device and passed its gate."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from convscale.artifact.artifact import Artifact, load_artifact, staged_folder
from convscale.conditions import Size
from convscale.errors import UserError, first_line, nearest
from convscale.formats.fold import has_deep_stem
from convscale.networks.inputs import example_input
from convscale.networks.resolve import as_module
from convscale.runtimes.base import installed_runtimes, runtime_of, runtimes_of
from convscale.ship.export import ExportRequest, Network, Shared, export_as
from convscale.ship.tune import BATCH_SIZES, Trial, Tuning, cost, in_turns, settings_of, tune
from convscale.ship.verify import Withheld

FLOAT = "onnx-fp32"
"""The form that every network must pass in; what the others are compared with."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """A way to write a network."""

    format: str
    """Of the file."""
    int8: bool = False
    """In 8 bits."""
    strided_stem: bool = False
    """A space-to-depth stem as one strided convolution."""


FORMS = {
    FLOAT: Form(format="onnx"),
    "onnx-fp32-strided": Form(format="onnx", strided_stem=True),
    "openvino-fp32": Form(format="openvino"),
    "torch-fp32": Form(format="torch"),
    "onnx-int8": Form(format="onnx", int8=True),
    "onnx-int8-strided": Form(format="onnx", int8=True, strided_stem=True),
    "openvino-int8": Form(format="openvino", int8=True),
    "openvino-int8-strided": Form(format="openvino", int8=True, strided_stem=True),
}
"""The forms by name, in the order they are tried. ``strided``: a space-to-depth stem as one strided convolution."""
NEAR = 1.3
"""Forms that cost at most this many times the cheapest are timed against it, in turns, at the end."""

INT8_MARGIN = 1.05
"""INT8 is shipped where it is at least so many times as fast as float: what it may cost in accuracy has to buy
something."""

Forms = dict[str, Artifact | UserError]
OnForm = Callable[[str, "Tuning | UserError"], object]


@dataclass(frozen=True, kw_only=True)
class Fastest:
    """What a search over forms came to."""

    winner: str
    """A key of ``forms``."""
    forms: Mapping[str, Tuning | UserError]
    """Each form's tuning, or why there is none: it was withheld, or no runtime can run it."""
    again: Mapping[str, Trial]
    """The forms that came near the best, each under its best settings, timed in turns; and the float form under its
    usual ones, as ``usual``."""

    @property
    def goal(self) -> str:
        """``throughput`` or ``latency``."""
        return next(result.goal for result in self.forms.values() if isinstance(result, Tuning))

    @property
    def gain(self) -> float:
        """How many times faster the winner is than the float ONNX form under its usual settings, both timed in the same
        turns.
        """
        return cost(self.again["usual"], self.goal) / cost(self.again[self.winner], self.goal)

    @property
    def gain_interval(self) -> tuple[float, float]:
        """The gain's ends by the middle halves of both: the usual's faster quartile over the winner's slower one, and
        the other way round.
        """
        usual, winner = self.again["usual"], self.again[self.winner]
        (fast, slow), (quick, long) = (_quartiles(trial) for trial in (usual, winner))
        return self.gain * fast / long, self.gain * slow / quick

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values: of each form its speed and settings, or why there is none."""
        forms: dict[str, dict[str, object]] = {}
        for name, result in self.forms.items():
            if isinstance(result, Withheld):
                forms[name] = {"withheld": result.verification.reason}
            elif isinstance(result, UserError):
                forms[name] = {"failed": str(result)}
            else:
                forms[name] = {k: v for k, v in self.again.get(name, result.best).to_dict().items() if k != "times_s"}
        usual = {k: v for k, v in self.again["usual"].to_dict().items() if k != "times_s"}
        found = {"goal": self.goal, "winner": self.winner, "gain": self.gain, "usual": usual, "forms": forms}
        return {**found, "gain_interval": list(self.gain_interval)}


def _quartiles(trial: Trial) -> tuple[float, float]:
    """The lower and the upper quartile of a call's time, over its median."""
    low, high = np.percentile(trial.times_s, (25, 75))
    return float(low) / trial.latency_s, float(high) / trial.latency_s


def form_names(net: Network, *, int8: bool, image_size: Size | None = None, torch: bool = False) -> list[str]:
    """The forms worth trying for a network with what is installed here.

    Args:
        torch: try PyTorch's compiler too; it needs a minute per network, and on CPUs the others were faster on every
            network measured.
    """
    can_run_openvino = set(runtimes_of("openvino")) & set(installed_runtimes())
    best_int8 = "openvino-int8" if can_run_openvino else "onnx-int8"
    wanted = [FLOAT, *(["torch-fp32"] if torch else []), *({"onnx-int8", best_int8} if int8 else ())]
    module, _ = as_module(net)
    if has_deep_stem(module, example_input(module, image_size)):
        wanted += [f"{FLOAT}-strided", *([f"{best_int8}-strided"] if int8 else [])]
    return [name for name in FORMS if name in wanted]


def forms_in(runtime: str | None, names: Sequence[str]) -> list[str]:
    """Those of ``names`` that a runtime reads, and the float form that all are compared with; None: all of them."""
    if runtime is None:
        return list(names)
    formats = runtime_of(runtime).formats
    return [name for name in names if name == FLOAT or FORMS[name].format in formats]


def export_forms(net: Network, folder: str | os.PathLike[str], names: Sequence[str], **keywords: Any) -> Forms:
    """Export a network in several forms, each into a folder of its name below ``folder``. What they share is made once.

    Args:
        names: keys of ``FORMS``, the float form among them.
        keywords: as for :func:`~convscale.ship.export.export`, without those of the form.

    Returns:
        By name the artefact, or why there is none.

    Raises:
        UserError: an unknown form; or the float form could not be made, or was withheld.
    """
    if unknown := [name for name in names if name not in FORMS]:
        raise UserError(f"form {unknown[0]!r} is unknown{nearest(unknown[0], FORMS)}")
    place = Path(folder)
    request = ExportRequest(**keywords)
    forms: Forms = {}
    with tempfile.TemporaryDirectory(dir=place, prefix=".shared.") as common:
        shared = Shared(folder=Path(common))
        for name in sorted(names, key=lambda name: name != FLOAT):
            form = FORMS[name]
            wanted = replace(request, format=form.format, int8=form.int8, strided_stem=form.strided_stem)
            try:
                forms[name] = export_as(net, place / name, wanted, shared=shared)
            except UserError as reason:
                if name == FLOAT:
                    raise
                forms[name] = reason
            except Exception as error:
                if not form.int8:
                    raise
                # A runtime may refuse what the quantiser made of one network; the other forms can still be shipped.
                forms[name] = UserError(first_line(error))
    return forms


def fastest_of(
    forms: Forms,
    *,
    goal: str = "throughput",
    batch_sizes: Sequence[int] = BATCH_SIZES,
    threads: int | None = None,
    min_seconds: float = 0.5,
    runtimes: Sequence[str] | None = None,
    device: str = "cpu",
    on_form: OnForm | None = None,
) -> Fastest:
    """Tune each form, then time those that came near the best in turns.

    The winner's record says what all of them came to.

    Args:
        runtimes: those to try; None: all that are installed.
        device: ``cpu`` or ``cuda``.
        on_form: called after each form, to show progress.

    Raises:
        UserError: as for tune, of the float form.
    """
    options: dict[str, Any] = {"goal": goal, "batch_sizes": batch_sizes, "threads": threads, "min_seconds": min_seconds}
    arts = {
        name: load_artifact(form.folder, device=device) for name, form in forms.items() if isinstance(form, Artifact)
    }
    results: dict[str, Tuning | UserError] = {}
    for name, form in forms.items():
        try:
            known = [r for r in runtimes or () if name in arts and r in runtimes_of(arts[name].format)] or runtimes
            results[name] = form if isinstance(form, UserError) else tune(arts[name], runtimes=known, **options)
        except UserError as reason:
            if name == FLOAT:
                raise
            results[name] = reason
        if on_form is not None:
            on_form(name, results[name])
    costs = {name: cost(result.best, goal) for name, result in results.items() if isinstance(result, Tuning)}
    near = [name for name in costs if costs[name] <= NEAR * min(costs.values())]
    tuned = {name: load_artifact(art.folder, device=device) for name, art in arts.items()}
    base = results[FLOAT]
    assert isinstance(base, Tuning), "the float form passed"
    *trials, usual = in_turns(
        [*((tuned[name], settings_of(tuned[name])) for name in near), (tuned[FLOAT], base.usual.settings)]
    )
    again = dict(zip(near, trials, strict=True))
    winner = min(
        near, key=lambda name: cost(again[name], goal) * (INT8_MARGIN if arts[name].precision == "int8" else 1.0)
    )
    found = Fastest(winner=winner, forms=results, again=again | {"usual": usual})
    tuned[winner].keep(search=found.to_dict())
    return found


def export_fastest(
    net: Network,
    out_dir: str | os.PathLike[str],
    *,
    goal: str = "throughput",
    batch_sizes: Sequence[int] = BATCH_SIZES,
    threads: int | None = None,
    int8: bool = True,
    torch: bool = False,
    min_seconds: float = 0.5,
    overwrite: bool = False,
    on_form: OnForm | None = None,
    **keywords: object,
) -> tuple[Artifact, Fastest]:
    """Export in float and, with calibration images, in INT8 for each runtime; tune each; keep the fastest that passed
    its gate.

    Args:
        int8: try INT8 too; needs ``calibration_images``.
        torch: try PyTorch's compiler too.
        on_form: called after each form, to show progress.
        keywords: as for :func:`~convscale.ship.export.export`, without those of the form.

    Returns:
        The artefact under ``out_dir``, whose record says what every form came to, and the same as a value.

    Raises:
        UserError: as for export.
        Withheld: not even the float form passed.
    """
    int8 = int8 and keywords.get("calibration_images") is not None
    request = ExportRequest(**keywords)  # pyright: ignore[reportArgumentType]
    size = request.image_size or (request.preprocessing.image_size if request.preprocessing else None)
    names = form_names(net, int8=int8, torch=torch, image_size=size)
    choose = partial(
        fastest_of, goal=goal, batch_sizes=batch_sizes, threads=threads, min_seconds=min_seconds, on_form=on_form
    )
    fastest = export_winner(net, out_dir, names, choose, overwrite=overwrite, **keywords)
    return load_artifact(out_dir), fastest


def export_winner(
    net: Network,
    out_dir: str | os.PathLike[str],
    names: Sequence[str],
    choose: Callable[[Forms], Fastest],
    *,
    overwrite: bool = False,
    **keywords: Any,
) -> Fastest:
    """Export a network in several forms and keep the one that ``choose`` takes, usually :func:`fastest_of`.

    Args:
        keywords: as for :func:`export_forms`.
    """
    with (
        staged_folder(out_dir, overwrite=overwrite) as folder,
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=".forms.") as place,
    ):
        fastest = choose(export_forms(net, place, names, **keywords))
        for path in (Path(place) / fastest.winner).iterdir():
            shutil.move(path, folder / path.name)
    return fastest
