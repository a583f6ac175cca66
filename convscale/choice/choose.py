"""Which network: candidates and a constraint become a choice with reasons; and the largest scale that keeps a speed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

from convscale.arch.spec import NetSpec
from convscale.choice.basis import Asked, Basis, basis_of, device_title
from convscale.choice.candidates import Candidate, aligned_variants, candidates_of
from convscale.choice.decide import Aligned, Choice, Option, decide
from convscale.choice.facts import NetworkFacts, SizedSpec
from convscale.choice.largest import Effort
from convscale.choice.measured import Bench, chosen_among, explore, might_keep, sized_spec_of
from convscale.choice.rows import Rows, as_it_is, by_rows, kind_of, note_of, read_rows, rows_of, with_kinds
from convscale.choice.speeds import Say, facts_of
from convscale.conditions import Constraint
from convscale.errors import UserError, check_text, check_whole, naming_extras
from convscale.machine import Environment
from convscale.networks.foreign import timm_is_installed
from convscale.networks.offered import Filter
from convscale.networks.resolve import Network

if TYPE_CHECKING:
    from convscale.choice.detectors import DetectorChoice


class CommonOptions(TypedDict, total=False):
    """Options of ``choose`` for any task; it says what they are."""

    device: str
    min_throughput: float | None
    batch_size: int | None
    precision: str | None
    runtime: str | None
    mode: str
    layout: str
    compiled: bool
    threads: int | None
    candidates: Sequence[Network] | Network | None
    image_sizes: Sequence[int] | None
    calibration: str | os.PathLike[str] | None
    seconds: float
    confidence: float
    progress: Say | None


class ClassifierOptions(CommonOptions, total=False):
    """Options of ``choose`` for classifiers alone."""

    max_latency_ms: float | None
    max_memory_gb: float | None
    max_params_m: float | None
    accuracy: str | Mapping[str, float]
    zoo: str
    licences: Sequence[str] | None
    commercial: bool
    extra_data: bool
    attention: bool
    aligned: bool
    records: str | os.PathLike[str] | None
    budget: int
    measured: str | os.PathLike[str] | None


class DetectorOptions(CommonOptions, total=False):
    """Options of ``choose`` for detectors alone."""

    head: str | None
    num_classes: int | None
    detector: Mapping[str, Any] | None


_TAKEN = {"classification": ClassifierOptions, "detection": DetectorOptions}
"""Tasks, and what each takes."""


@overload
def choose(*, task: Literal["classification"] = "classification", **options: Unpack[ClassifierOptions]) -> Choice: ...
@overload
def choose(*, task: Literal["detection"], **options: Unpack[DetectorOptions]) -> DetectorChoice: ...
@naming_extras("convscale.choose")
def choose(
    *,
    task: str = "classification",
    device: str = "cpu",
    min_throughput: float | None = None,
    max_latency_ms: float | None = None,
    max_memory_gb: float | None = None,
    max_params_m: float | None = None,
    batch_size: int | None = None,
    precision: str | None = None,
    runtime: str | None = None,
    mode: str = "infer",
    layout: str = "nchw",
    compiled: bool = False,
    threads: int | None = None,
    candidates: Sequence[Network] | Network | None = None,
    image_sizes: Sequence[int] | None = None,
    accuracy: str | Mapping[str, float] = "imagenet",
    zoo: str = "all",
    licences: Sequence[str] | None = None,
    commercial: bool = False,
    extra_data: bool = True,
    attention: bool = False,
    calibration: str | os.PathLike[str] | None = None,
    aligned: bool = True,
    records: str | os.PathLike[str] | None = None,
    budget: int = 20,
    seconds: float = 1.0,
    confidence: float = 0.8,
    progress: Say | None = None,
    measured: str | os.PathLike[str] | None = None,
    head: str | None = None,
    num_classes: int | None = None,
    detector: Mapping[str, Any] | None = None,
) -> Choice | DetectorChoice:
    """Choose the most accurate network that keeps a constraint on a device.

    On this machine's own device speeds are measured, in the runtime named and as the network would be shipped; on a
    named device, or with a calibration, they are predicted. One choice mixes the two only where ``measured`` is given,
    and then says of each which it is.

    With task ``detection`` a detector's backbone is chosen: that with the best published ImageNet accuracy whose
    detector keeps ``min_throughput``, measured as shipped in ONNX Runtime, or predicted without non-maximum
    suppression. ImageNet accuracy says how good features are, not what mAP a detector reaches.

    Args:
        task: ``classification`` or ``detection``. The latter takes ``head``, ``num_classes``, ``detector`` and, of the
            others, ``device``, ``min_throughput``, ``confidence``, the conditions, ``calibration``, ``candidates``
            (names and specs; None: a dozen usual ones), ``image_sizes`` (one), ``seconds`` and ``progress``.
        device: ``cpu``, ``cuda``, ``cuda:N``, or a named GPU or processor (``rtx-4090``, ``i9-10940x``).
        min_throughput: images/s to keep at the batch, model only.
        max_latency_ms: milliseconds that a call of the whole batch may take.
        max_memory_gb: 2**30 bytes that may be alive at once in a call, as counted.
        max_params_m: millions of parameters.
        batch_size, precision, runtime, mode, layout, threads: conditions; see
            ``convscale.choice.basis.basis_of`` for what None and runtime
            ``best`` mean.
        compiled: PyTorch behind its compiler instead of eager.
        candidates: names, shell patterns, tags, specs, modules, or ``package.module:function``; None: all released
            weights that the options below let through. Specs made by ``scale`` are ranked within their family by size,
            and no accuracy is claimed for them.
        image_sizes: sides in pixels to try each candidate at; None: those with a published figure. At a size without
            one no accuracy is claimed.
        accuracy: ``imagenet``, ``none``, or a mapping from names to percent; see ``candidates_of``.
        zoo: whose released weights: ``own``, ``timm``, or ``all``: both, an architecture that both have once, by the
            own code.
        licences: only weights under one of these licences, as timm's model cards name them; None: any.
        commercial: leave out weights whose licence forbids commercial use or is not known.
        extra_data: take weights that were trained on more than ImageNet-1k, too.
        attention: take networks with attention, too; predictions were fitted on ConvNets, which is then a doubt.
        calibration: file of ``convscale calibrate``: predict for the device that it was made on.
        aligned: offer hardware-aligned relatives of networks with odd channels (predicted devices only).
        records: JSON-lines file of measurements: those of this machine and these conditions are reused, new ones
            appended.
        budget: measure at most this many networks.
        seconds: timed seconds per network, at least.
        confidence: probability with which a predicted speed must keep the limits on speed, 0.5 to 0.99.
        progress: told a line now and then.
        measured: JSON lines measured on the named device (by the script of a kit, see ``write_kit``; by ``measure
            --record`` or ``confirm`` there). Networks with a row go by it, all others are predicted and set by the rows
            (``convscale.choice.rows.set_by`` has the formula). Where no runtime is named it is the rows'.
        head: of each detector, as ``create_detector`` has it; None: ``fcos``.
        num_classes: of each detector; None: 20.
        detector: more of it (``{"neck_width": 64}``).

    Returns:
        A ``Choice``: ``best``, ``front``, ``rejected``; for detectors a ``DetectorChoice``: ``best``, ``options``,
        ``rejected``.

    Raises:
        UserError: an unknown device, candidate or condition, a damaged row or one of other conditions, a limit that is
            not above 0, or nothing keeps the constraint (the fastest and its speed are named).
    """
    _check_options(task, dict(locals()))
    constraint = Constraint(
        min_throughput=min_throughput,
        max_latency_ms=max_latency_ms,
        max_memory_gb=max_memory_gb,
        max_params_m=max_params_m,
        confidence=confidence,
    )
    asked = Asked(
        device=device,
        batch_size=batch_size,
        precision=precision,
        runtime=runtime,
        mode=mode,
        layout=layout,
        compiled=compiled,
        threads=threads,
        latency=max_latency_ms is not None and min_throughput is None,
    )
    if task == "detection":
        from convscale.choice.detectors import backbones_of, basis_as_shipped, choose_backbone, one_size

        basis = basis_as_shipped(asked, calibration)
        return choose_backbone(
            min_throughput,
            basis.conditions,
            predicted=basis.predicted,
            backbones=backbones_of(candidates),
            head=head or "fcos",
            image_size=one_size(image_sizes),
            options=detector,
            num_classes=num_classes or 20,
            seconds=seconds,
            compiled=basis.conditions.runtime == "compiled",
            calibration=basis.read_calibration(),
            confidence=confidence,
            say=progress or (lambda text: None),
        )
    found = None
    if measured is not None:
        found, asked = read_rows(measured, asked)
    basis = basis_of(asked, calibration)
    rows = None if found is None or measured is None else rows_of(found, basis, measured, candidates)
    budget = check_whole("budget", budget)
    offer = Filter(
        zoo=zoo,
        licences=licences,
        commercial=commercial,
        extra_data=extra_data,
        attention=attention,
    )
    pool = candidates_of(candidates, image_sizes, accuracy, offer)
    effort = Effort(records=records, seconds=seconds, say=progress or (lambda text: None))
    notes = notes_on(offer, candidates)
    return choose_from(pool, basis, constraint, effort, budget=budget, aligned=aligned, notes=notes, rows=rows)


def _check_options(task: str, given: Mapping[str, object]) -> None:
    """
    Raises:
        UserError: an unknown task, or an option that goes with another one.
    """
    taken = _TAKEN[check_text("task", task, _TAKEN)].__optional_keys__
    for name, parameter in signature(choose).parameters.items():
        if name not in (*taken, "task") and given[name] != parameter.default:
            other = next(each for each in _TAKEN if each != task)
            raise UserError(f"{name} does not go with task={task!r}: it is for {other}; leave it out")


def choose_from(
    pool: Sequence[Candidate],
    basis: Basis,
    constraint: Constraint,
    effort: Effort,
    *,
    budget: int = 20,
    aligned: bool = True,
    notes: tuple[str, ...] = (),
    rows: Rows | None = None,
    seen: Callable[[Option], Option] = as_it_is,
) -> Choice:
    """``choose`` by values: the candidates, the basis they are compared on, the constraint and the effort; ``notes`` of
    the caller come before its own; ``rows`` were measured on the device; an option is judged as ``seen`` gives it.
    """
    relatives = relatives_of(pool) if aligned and basis.predicted else []
    networks = [SizedSpec(c.spec, c.image_size) for c in (*pool, *(r for _, r in relatives)) if not c.why_not]
    facts = facts_of([*networks, *(rows.measured if rows else ())], basis, effort.say)
    predictions = facts
    if rows is not None:
        facts = by_rows(facts, rows)
    options = [seen(_option(candidate, facts, basis)) for candidate in pool]
    notes += _notes(options, constraint, basis)
    floor = constraint.floor(basis.conditions.batch_size)
    bench = None
    if not basis.predicted:
        bench = Bench(basis, facts, records=effort.records, seconds=effort.seconds, say=effort.say)
        options = explore(options, constraint, bench, budget=budget, say=effort.say)
        options = [_with_failure(option, bench) for option in options]
        notes += (
            f"{len(bench.speeds)} of {len({sized_spec_of(o) for o in options})} networks and sizes were measured, "
            f"{bench.reused} of them earlier",
        )
    judged = decide(options, constraint, likely=lambda option: bench is None or might_keep(option, floor, bench.speeds))
    if rows is not None:
        judged = with_kinds(judged)
        notes += (note_of(rows, predictions),)
    device = basis.conditions.device
    return Choice(
        **{f.name: getattr(judged, f.name) for f in fields(judged)},
        constraint=constraint,
        conditions=basis.conditions,
        kind=kind_of(judged.options) if rows else "predicted" if basis.predicted else "measured",
        device=device_title(device) if basis.predicted else Environment.here(device).device_name,
        aligned=_gains(relatives, judged.options, facts, basis),
        notes=notes,
        floor=floor,
        chosen_from=chosen_among(basis) if basis.tuned else "",
    )


def notes_on(offer: Filter, wanted: object) -> tuple[str, ...]:
    """What a reader must know of the candidates that there were.

    Args:
        offer: which released weights were asked for.
        wanted: the candidates that were named; None: all.
    """
    found = []
    if wanted is None and offer.zoo == "all" and not timm_is_installed():
        found.append(
            "timm is not installed, so that only the own zoo was considered; with it (pip install 'convscale[timm]') "
            "every released ConvNet is"
        )
    if offer.attention:
        found.append(
            "networks with attention are among the candidates: predictions were fitted on ConvNets; transformers in "
            "tables that others measured are about twice as fast as predicted, so measure before you rank them"
        )
    return tuple(found)


def _with_failure(option: Option, bench: Bench) -> Option:
    """The option with the reason why it could not be timed, where it could not."""
    failed = bench.failed.get(sized_spec_of(option), option.facts.failed)
    return replace(option, facts=replace(option.facts, failed=failed))


def _option(candidate: Candidate, facts: Mapping[SizedSpec, NetworkFacts], basis: Basis) -> Option:
    return Option(
        candidate=candidate,
        facts=facts.get(SizedSpec(candidate.spec, candidate.image_size), NetworkFacts()),
        batch_size=basis.conditions.batch_size,
    )


def relatives_of(pool: Sequence[Candidate]) -> list[tuple[Candidate, Candidate]]:
    """(candidate, hardware-aligned relative at its size), one for each architecture and size."""
    made: dict[tuple[str, int], tuple[Candidate, Candidate]] = {}
    for candidate in pool:
        if candidate.why_not or not isinstance(candidate.spec, NetSpec):
            continue
        for spec in aligned_variants(candidate.spec):
            relative = Candidate(name=spec.name, spec=spec, image_size=candidate.image_size, group=candidate.spec.name)
            made.setdefault((spec.name, candidate.image_size), (candidate, relative))
    return list(made.values())


def _gains(
    relatives: Sequence[tuple[Candidate, Candidate]],
    options: Sequence[Option],
    facts: Mapping[SizedSpec, NetworkFacts],
    basis: Basis,
) -> tuple[Aligned, ...]:
    by_candidate = {id(o.candidate): o for o in options}
    pairs = [
        Aligned(of=by_candidate[id(candidate)], option=_option(relative, facts, basis))
        for candidate, relative in relatives
    ]
    return tuple(sorted((a for a in pairs if a.of.speed and a.option.speed), key=lambda a: -a.gain))


def _notes(options: Sequence[Option], constraint: Constraint, basis: Basis) -> tuple[str, ...]:
    found = []
    if str(constraint) == "no constraint":
        found.append("no constraint was given, so the choice is the most accurate of all")
    if any(o.top1 is not None for o in options):
        found.append(
            "accuracies are of the weights as published, and recipes differ: they compare weights, not architectures"
        )
    if basis.int8:
        found.append(
            "accuracies are not of 8-bit networks: `convscale export --int8 --max-drop` keeps theirs, with some layers "
            "in float where it must"
        )
    broken = [o for o in options if o.facts.failed]
    if broken:
        found.append(
            f"{len(broken)} candidates could not be examined, {broken[0].label} first: {broken[0].facts.failed}"
        )
    return tuple(found)
