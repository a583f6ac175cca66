"""Of all the forms in which a network can be shipped, the one that is fastest on this device and passed its gate."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from convscale.artifact.artifact import Artifact, load_artifact
from convscale.artifact.folder import staged_folder
from convscale.conditions import Size
from convscale.errors import UserError, first_line, nearest
from convscale.formats.fold import has_deep_stem
from convscale.machine import available_cores
from convscale.networks.inputs import example_input
from convscale.networks.resolve import Network, as_module
from convscale.runtimes.base import installed_runtimes, no_bf16, runtime_of, runtimes_of
from convscale.ship.draft import Shared
from convscale.ship.export import TWIN_GAIN, export_as, sketch, wants_qat
from convscale.ship.form_table import FLOAT, FORMS
from convscale.ship.qat import check_tunable
from convscale.ship.quantize import ROUTES, routes_of
from convscale.ship.request import ExportRequest, need_device, on_processor
from convscale.ship.tune import (
    BATCH_SIZES,
    Settings,
    Trial,
    Tuning,
    cost,
    first_look,
    in_turns,
    not_passed,
    settings_of,
    tune,
    usual_batch,
)
from convscale.ship.verify import Withheld
from convscale.words import exact

NEAR = 1.3
"""Forms that cost at most this many times the cheapest are timed against it, in turns, at the end."""
NEAR_AT_SIGHT = 1.5
"""Forms that cost more than this many times the cheapest that passed, both looked at for a moment, are not made."""
LOOK_BATCH = 8
"""Images per call of such a look, at most."""

INT8_MARGIN = 1.05
"""INT8 is shipped where it is at least so many times as fast as float: what it may cost in accuracy has to buy
something."""

Forms = dict[str, Artifact | UserError]
OnForm = Callable[[str, "Tuning | UserError"], object]


class TooSlow(UserError):
    """A form was not made: at first sight it is too slow to win."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """What the fastest form is looked for by."""

    goal: str = "throughput"
    """``throughput`` or ``latency``."""
    batch_sizes: Sequence[int] = BATCH_SIZES
    """Those to try."""
    threads: int | None = None
    """The most to use; None: one per core."""
    min_seconds: float = 0.5
    """Each setting is timed for at least this long."""
    runtimes: Sequence[str] | None = None
    """Those to try; None: all that are installed."""
    device: str = "cpu"
    """``cpu`` or ``cuda``."""

    def first_look(self, artifact: Artifact) -> float:
        """Seconds per image in the best runtime, at one setting, for a moment.

        Raises:
            UserError: no runtime can run it.
        """
        threads = self.threads or available_cores()
        batch = min(LOOK_BATCH, usual_batch(self.goal, self.batch_sizes))
        installed = [name for name in runtimes_of(artifact.format) if name in installed_runtimes()]
        asked = [name for name in installed if name in (self.runtimes or installed)]
        known = [name for name in asked if name in artifact.checked_in]
        found: list[float] = []
        reason = UserError(f"no runtime for format {artifact.format} is installed")
        if asked and not known:
            reason = UserError(not_passed(artifact, asked[0]))
        for name in known:
            streams = threads if self.goal == "throughput" and batch >= threads and runtime_of(name).streams else 1
            how = Settings(runtime=name, threads=threads, streams=streams, batch_size=batch)
            try:
                found.append(first_look(artifact, how))
            except UserError as error:
                reason = error
        if not found:
            raise reason
        return min(found)


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
            elif isinstance(result, TooSlow):
                forms[name] = {"skipped": str(result)}
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


def form_names(
    net: Network,
    *,
    int8: bool,
    bf16: bool = False,
    image_size: Size | None = None,
    torch: bool = False,
    device: str = "cpu",
) -> list[str]:
    """The forms worth trying for a network with what is installed here and runs on a device.

    Args:
        int8: by every quantiser; with the rest in bfloat16 too, where the processor has it.
        bf16: what is float in bfloat16 too.
        torch: try PyTorch's compiler too; it needs a minute per network, and on CPUs the others were faster on every
            network measured.
    """
    wanted = [FLOAT]
    able = {name for name in installed_runtimes() if runtime_of(name).runs_on(device)}
    has_bf16 = "openvino" in able and not no_bf16("openvino")
    for name, form in FORMS.items():
        runs = able.intersection(runtimes_of(form.format, device))
        # OpenVINO opens the float ONNX file itself.
        if form.strided_stem or not runs or (form.format == "openvino" and form.int8 is None and not form.bf16):
            continue
        if form.int8 is not None:
            its_own = ROUTES[form.int8].only_for in able
            if int8 and (its_own or form.int8 in routes_of(form.format)) and (has_bf16 or not form.bf16):
                wanted.append(name)
        elif (form.bf16 and bf16 and has_bf16) or (form.format == "torch" and torch):
            wanted.append(name)
    module, _ = as_module(net)
    with on_processor(module):
        is_deep = has_deep_stem(module, example_input(module, image_size))
    if is_deep:
        best = "openvino" if "openvino-int8" in wanted else "onnx"
        wanted += [f"{name}-strided" for name in wanted if FORMS[name].int8 is None or FORMS[name].format == best]
    return [name for name in FORMS if name in wanted]


def forms_in(runtime: str | None, names: Sequence[str]) -> list[str]:
    """Those of ``names`` that a runtime reads, and the float form that all are compared with; None: all of them."""
    if runtime is None:
        return list(names)
    formats = runtime_of(runtime).formats
    return [name for name in names if name == FLOAT or FORMS[name].format in formats]


def export_forms(
    net: Network,
    folder: str | os.PathLike[str],
    names: Sequence[str],
    *,
    search: Search | None = None,
    twins: bool = True,
    for_speed: bool = False,
    **keywords: Any,
) -> Forms:
    """Export a network in several forms, each into a folder of its name below ``folder``. What they share is made once.

    Args:
        names: keys of ``FORMS``, the float form among them.
        search: look at each form's speed first, in seconds, and export those near the best alone; None: all of them.
        twins: with a search, look at the twin of the best that passed too, whose activations are symmetric.
        for_speed: as for :func:`~convscale.ship.export.export_as`.
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
    with on_processor(net), tempfile.TemporaryDirectory(dir=place, prefix=".shared.") as common:
        shared = Shared(folder=Path(common))
        usual = forms[FLOAT] = export_as(net, place / FLOAT, FORMS[FLOAT].of(request), shared=shared)
        others = [name for name in names if name != FLOAT]
        looks: dict[str, float] = {}
        if search is not None and search.device == "cpu" and any(FORMS[name].int8 for name in others):
            looks[FLOAT] = search.first_look(usual)
            for name in others:
                # PyTorch's compiler takes a minute to look at.
                if FORMS[name].format == "torch":
                    continue
                folder_of = Path(common) / f"look-{name}"
                looked = _tried(name, partial(_look, net, folder_of, FORMS[name].of(request), shared, search))
                if isinstance(looked, UserError):
                    forms[name] = looked
                else:
                    looks[name] = looked
        for name in sorted((n for n in others if n not in forms), key=lambda name: looks.get(name, 0.0)):
            passed = {done: looks[done] for done, form in forms.items() if isinstance(form, Artifact) and done in looks}
            if name in looks and (reason := _too_slow(name, looks, passed)):
                forms[name] = reason
                continue
            form = FORMS[name].of(request)
            export_it = partial(export_as, net, place / name, form, shared=shared, for_speed=for_speed)
            made = forms[name] = _tried(name, export_it)
            if name in looks and search is not None and isinstance(made, Artifact) and _lost_runtimes(made):
                looked = _tried(name, partial(search.first_look, made))
                if isinstance(looked, UserError):
                    forms[name] = looked
                else:
                    looks[name] = looked
        if passed := [name for name, form in forms.items() if isinstance(form, Artifact) and name in looks]:
            best = min(passed, key=lambda name: looks[name])
            twin = f"{best}-symmetric"
            if search is not None and twins and twin in FORMS:
                form = FORMS[twin].of(request)
                looked = _tried(twin, partial(_look, net, Path(common) / f"look-{twin}", form, shared, search))
                if isinstance(looked, float) and looked * TWIN_GAIN <= looks[best]:
                    forms[twin] = _tried(twin, partial(export_as, net, place / twin, form, shared=shared))
    return {name: forms[name] for name in FORMS if name in forms}


Made = TypeVar("Made")


def _tried(name: str, make: Callable[[], Made]) -> Made | UserError:
    """What was made, or why not. A runtime may refuse what a quantiser made of one network; the other forms can still
    be shipped.
    """
    try:
        return make()
    except UserError as reason:
        return reason
    except Exception as error:
        if FORMS[name].int8 is None:
            raise
        return UserError(first_line(error))


def _look(net: Network, folder: Path, request: ExportRequest, shared: Shared, search: Search) -> float:
    """Seconds per image of a sketch, which is gone afterwards."""
    try:
        return search.first_look(sketch(net, folder, request, shared))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _lost_runtimes(made: Artifact) -> bool:
    """Whether its sketch was looked at in a runtime that it did not pass in."""
    return any(name in installed_runtimes() and name not in made.checked_in for name in runtimes_of(made.format))


def _too_slow(name: str, looks: Mapping[str, float], passed: Mapping[str, float]) -> TooSlow | None:
    """Why a form is not worth making in full: it is far behind one that passed, or, in 8 bits, behind float. Those that
    looked faster were tried before it.
    """
    best, limit, what = min(passed.values()), NEAR_AT_SIGHT * min(passed.values()), "the best that passed"
    floats = min(seconds for form, seconds in passed.items() if FORMS[form].int8 is None)
    if FORMS[name].int8 is not None and floats < limit:
        best, limit, what = floats, floats, "float"
    if looks[name] <= limit:
        return None
    speed = exact(1 / looks[name])
    return TooSlow(f"not made: at first sight ({speed} images/s) it costs {looks[name] / best:.1f} times {what}")


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
            can = runtimes_of(arts[name].format, device) if name in arts else ()
            known = [r for r in runtimes or () if r in can] or runtimes
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
    int8: bool | str = True,
    bf16: bool = False,
    torch: bool = False,
    min_seconds: float = 0.5,
    device: str = "cpu",
    overwrite: bool = False,
    on_form: OnForm | None = None,
    **keywords: object,
) -> tuple[Artifact, Fastest]:
    """Export in float and, with calibration images, in INT8 by each quantiser; tune each; keep the fastest that passed
    its gate. With INT8 all are looked at for a moment first, and those far from the best are not made in full.

    Args:
        int8: try INT8 too; needs ``calibration_images``. ``"qat"``: with fine-tuning where it loses too much, as in
            :func:`~convscale.ship.export.export`.
        bf16: try bfloat16 too, where the processor has it (where not, the record says so); its gate is wider than
            float32's.
        torch: try PyTorch's compiler too.
        device: where forms are tuned: ``cpu``, ``cuda`` or ``cuda:N``. Their gate is held on the processor.
        on_form: called after each form, to show progress.
        keywords: as for :func:`~convscale.ship.export.export`, without those of the form.

    Returns:
        The artefact under ``out_dir``, whose record says what every form came to, and the same as a value.

    Raises:
        UserError: as for export; or the device is not there; or there are too few calibration images for ``"qat"``.
        Withheld: not even the float form passed.
    """
    need_device(device)
    keywords["qat"] = wants_qat(int8)
    if keywords["qat"]:
        check_tunable(cast("np.ndarray | None", keywords.get("calibration_images")))
    int8 = bool(int8) and keywords.get("calibration_images") is not None
    request = ExportRequest(**keywords)  # pyright: ignore[reportArgumentType]
    size = request.image_size or (request.preprocessing.image_size if request.preprocessing else None)
    names = form_names(net, int8=int8, bf16=bf16, torch=torch, image_size=size, device=device)
    why = no_bf16("openvino") if bf16 else ""
    refused = {"openvino-bf16": UserError(why)} if why else None
    search = Search(goal=goal, batch_sizes=batch_sizes, threads=threads, min_seconds=min_seconds, device=device)
    fastest = export_winner(
        net, out_dir, names, search, refused=refused, overwrite=overwrite, on_form=on_form, **keywords
    )
    return load_artifact(out_dir, device=device), fastest


def export_winner(
    net: Network,
    out_dir: str | os.PathLike[str],
    names: Sequence[str],
    search: Search,
    *,
    refused: Mapping[str, UserError] | None = None,
    overwrite: bool = False,
    on_form: OnForm | None = None,
    **keywords: Any,
) -> Fastest:
    """Export a network in several forms and keep the one that :func:`fastest_of` takes.

    Args:
        search: what it is looked for by.
        refused: forms that were asked for and can not be made here, which the record then says.
        on_form: called after each form, to show progress.
        keywords: as for :func:`export_forms`.
    """
    with (
        staged_folder(out_dir, overwrite=overwrite) as folder,
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=".forms.") as place,
    ):
        forms = {**export_forms(net, place, names, search=search, **keywords), **(refused or {})}
        fastest = fastest_of(forms, **vars(search), on_form=on_form)
        for path in (Path(place) / fastest.winner).iterdir():
            shutil.move(path, folder / path.name)
    return fastest
