"""Which network: candidates and a constraint become a choice with reasons; and the largest scale that keeps a speed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec

from convscale.arch.spec import NetSpec
from convscale.choice.candidates import SMALL_IMAGE as SMALL_IMAGE
from convscale.choice.candidates import Candidate, aligned_variants, candidates_of
from convscale.choice.candidates import scaled_members as scaled_members
from convscale.choice.candidates import sized as sized
from convscale.choice.decide import Aligned, Choice, Option, decide
from convscale.choice.largest import Largest
from convscale.choice.largest import largest as largest_under
from convscale.choice.measured import Bench, explore, might_keep, tuned_mark, unit_of
from convscale.choice.speeds import Known, Say, Setting, Unit, at_hand, check_device, device_title, known
from convscale.conditions import Conditions, Constraint
from convscale.errors import UserError
from convscale.runtimes.base import check_runtime

FIT_FAMILIES = ("tresnet_m", "efficientnet_b0", "resnet50d")
"""Baselines whose scaled members `fit` tries by itself: the two papers' and the strongest plain one."""
BEST = "best"
"""The runtime that stands for the fastest of all."""
PREDICTED_BATCH, MEASURED_BATCH = 256, 8
"""Images per call where none is said; one where a latency is limited."""


def setting_of(
    device: str,
    *,
    batch_size: int | None = None,
    precision: str | None = None,
    runtime: str | None = None,
    mode: str = "infer",
    layout: str = "nchw",
    compiled: bool = False,
    threads: int | None = None,
    calibration: str | os.PathLike[str] | None = None,
    latency: bool = False,
) -> Setting:
    """The conditions of a comparison with what was left out filled in.

    On a named GPU: batch 256, ``amp``, eager PyTorch; on this machine's processor: batch 8, ``fp32``, the fastest of
    what is installed (eager for training); on its GPU: batch 8, ``amp``, eager. With ``latency`` the batch is 1.

    Args:
        runtime: one of ``Conditions``, or ``best``: each network in the form and the runtime in which it is fastest on
            this machine's processor, as ``tune`` finds them; with precision ``int8`` in 8 bits too.

    Raises:
        UserError: an unknown device (the nearest are named) or condition, or a runtime that no prediction knows.
    """
    device = check_device(device)
    if runtime not in (None, BEST):
        check_runtime(runtime)
    if calibration is not None:
        if not os.path.isfile(calibration):
            raise UserError(f"calibration file {calibration} does not exist; `convscale calibrate` writes one")
        if device.startswith("cuda"):
            raise UserError(f"a calibration is of a named GPU, not {device!r}; give the name that it was made for")
    here = at_hand(device) and calibration is None
    if runtime is None:
        runtime = (
            "compiled"
            if compiled
            else BEST
            if here and device == "cpu" and mode == "infer" and precision in (None, "fp32", "int8")
            else "eager"
        )
    elif compiled and runtime == "eager":
        runtime = "compiled"
    if runtime == BEST:
        _need_tunable(device, here, mode, precision)
    if not here and runtime not in ("eager", "compiled"):
        raise UserError(
            f"runtime {runtime!r} can not be predicted; speeds on {device} are predicted for eager or compiled PyTorch"
        )
    if here and precision == "int8" and runtime != BEST:
        raise UserError(
            f"precision 'int8' is measured with runtime best, which chooses the form too; got runtime {runtime!r}"
        )
    if not here and precision == "int8":
        raise UserError("precision 'int8' can not be predicted; amp, bf16, fp16 or fp32 are")
    if here and device.startswith("cuda"):
        _need_cuda(device)
    batch_size = (
        batch_size
        if batch_size is not None
        else 1
        if latency
        else MEASURED_BATCH
        if at_hand(device)
        else PREDICTED_BATCH
    )
    precision = precision or ("fp32" if device == "cpu" else "amp")
    tuned, int8 = runtime == BEST, runtime == BEST and precision == "int8"
    if tuned:
        runtime, precision = "onnxruntime", "fp32"  # placeholders: each network's own are found by tuning
    conditions = Conditions(
        device=device,
        mode=mode,
        precision=precision,
        layout=layout,
        batch_size=batch_size,
        runtime=runtime,
        threads=threads,
    )
    if calibration is not None:
        from convscale.predictor.calibration import load_calibration

        load_calibration(calibration).require(conditions)
    return Setting(
        conditions=conditions, calibration=None if calibration is None else str(calibration), tuned=tuned, int8=int8
    )


def _need_tunable(device: str, here: bool, mode: str, precision: str | None) -> None:
    """
    Raises:
        UserError: nothing can be tuned under these conditions, or in 8 bits without the library that makes them.
    """
    if not here:
        raise UserError(
            f"runtime 'best' is found by measuring on this machine's processor; speeds on {device} are predicted for "
            "eager or compiled"
        )
    if device != "cpu" or mode != "infer":
        raise UserError(f"runtime 'best' is for inference on device cpu, got {device}, {mode}; name a runtime")
    if precision not in (None, "fp32", "int8"):
        raise UserError(f"runtime 'best' measures fp32, or int8 beside it, got precision {precision!r}")
    if precision == "int8" and find_spec("nncf") is None:
        raise UserError("precision int8 needs nncf, which is not installed; pip install nncf openvino")


def _need_cuda(device: str) -> None:
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            f"device {device!r} is not there: torch sees no CUDA GPU; use device cpu, or name a GPU to predict for"
        )


def choose(
    *,
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
    candidates: Sequence[str | NetSpec] | str | NetSpec | None = None,
    image_sizes: Sequence[int] | None = None,
    accuracy: str | Mapping[str, float] = "imagenet",
    calibration: str | os.PathLike[str] | None = None,
    aligned: bool = True,
    records: str | os.PathLike[str] | None = None,
    budget: int = 20,
    seconds: float = 1.0,
    progress: Say | None = None,
) -> Choice:
    """Choose the most accurate network that keeps a constraint on a device.

    On this machine's own device speeds are measured, in the runtime named and as the network would be shipped; on a
    named GPU, or with a calibration, they are predicted. One choice never mixes the two.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:N``, or a named GPU (``rtx-4090``).
        min_throughput: images/s to keep at the batch, model only.
        max_latency_ms: milliseconds that a call of the whole batch may take.
        max_memory_gb: 2**30 bytes that may be alive at once in a call, as counted.
        max_params_m: millions of parameters.
        batch_size, precision, runtime, mode, layout, threads: conditions; see ``setting_of`` for what None and runtime
            ``best`` mean.
        compiled: PyTorch behind its compiler instead of eager.
        candidates: names, shell patterns, tags or specs; None: all released weights. Specs made by ``scale`` are ranked
            within their family by size, and no accuracy is claimed for them.
        image_sizes: sides in pixels to try each candidate at; None: those with a published figure. At a size without
            one no accuracy is claimed.
        accuracy: ``imagenet``, ``none``, or a mapping from names to percent; see ``candidates_of``.
        calibration: file of ``convscale calibrate``: predict for the device that it was made on.
        aligned: offer hardware-aligned relatives of networks with odd channels (predicted devices only).
        records: JSON-lines file of measurements: those of this machine and these conditions are reused, new ones
            appended.
        budget: measure at most this many networks.
        seconds: timed seconds per network, at least.
        progress: told a line now and then.

    Raises:
        UserError: an unknown device, candidate or condition, a limit that is not above 0, or nothing keeps the
            constraint (the fastest and its speed are named).
    """
    constraint = Constraint(
        min_throughput=min_throughput,
        max_latency_ms=max_latency_ms,
        max_memory_gb=max_memory_gb,
        max_params_m=max_params_m,
    )
    setting = setting_of(
        device,
        batch_size=batch_size,
        precision=precision,
        runtime=runtime,
        mode=mode,
        layout=layout,
        compiled=compiled,
        threads=threads,
        calibration=calibration,
        latency=max_latency_ms is not None and min_throughput is None,
    )
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise UserError(f"budget is {budget!r}; it must be a whole number of networks to measure, at least 1")
    say = progress or (lambda text: None)
    wanted = [candidates] if isinstance(candidates, str | NetSpec) else candidates
    pool = candidates_of(wanted, image_sizes, accuracy)
    relatives = _relatives(pool) if aligned and setting.predicted else []
    facts = known([(c.spec, c.image_size) for c in (*pool, *(r for _, r in relatives)) if not c.why_not], setting, say)
    options = [_option(candidate, facts, setting) for candidate in pool]
    notes = _notes(options, constraint, setting)
    floor = constraint.floor(setting.conditions.batch_size)
    bench = None
    if not setting.predicted:
        bench = Bench(setting, facts, records=records, seconds=seconds)
        options = explore(options, constraint, bench, budget=budget, say=say)
        options = [
            replace(o, known=replace(o.known, failed=bench.failed.get(unit_of(o), o.known.failed))) for o in options
        ]
        notes += (
            f"{len(bench.speeds)} of {len({unit_of(o) for o in options})} networks and sizes were measured, "
            f"{bench.reused} of them earlier",
        )
    parts = decide(options, constraint, likely=lambda option: bench is None or might_keep(option, floor, bench.speeds))
    title = device_title(setting.conditions.device) if setting.predicted else _own_name(setting.conditions.device)
    return Choice(
        **parts,
        constraint=constraint,
        conditions=setting.conditions,
        kind="predicted" if setting.predicted else "measured",
        device=title,
        aligned=_gains(relatives, parts["options"], facts, setting),
        notes=notes,
        floor=floor,
        tuned=tuned_mark(setting) if setting.tuned else "",
    )


def _own_name(device: str) -> str:
    from convscale.machine import Environment

    return Environment.here(device).device_name


def _option(candidate: Candidate, facts: Mapping[Unit, Known], setting: Setting) -> Option:
    return Option(
        candidate=candidate,
        known=facts.get((candidate.spec, candidate.image_size), Known()),
        batch_size=setting.conditions.batch_size,
    )


def _relatives(pool: Sequence[Candidate]) -> list[tuple[Candidate, Candidate]]:
    """(candidate, hardware-aligned relative at its size), one for each architecture and size."""
    made: dict[tuple[str, int], tuple[Candidate, Candidate]] = {}
    for candidate in pool:
        if candidate.why_not:
            continue
        for spec in aligned_variants(candidate.spec):
            relative = Candidate(name=spec.name, spec=spec, image_size=candidate.image_size, group=candidate.spec.name)
            made.setdefault((spec.name, candidate.image_size), (candidate, relative))
    return list(made.values())


def _gains(
    relatives: Sequence[tuple[Candidate, Candidate]],
    options: Sequence[Option],
    facts: Mapping[Unit, Known],
    setting: Setting,
) -> tuple[Aligned, ...]:
    by_candidate = {id(o.candidate): o for o in options}
    pairs = [
        Aligned(of=by_candidate[id(candidate)], option=_option(relative, facts, setting))
        for candidate, relative in relatives
    ]
    return tuple(sorted((a for a in pairs if a.of.speed and a.option.speed), key=lambda a: -a.gain))


def _notes(options: Sequence[Option], constraint: Constraint, setting: Setting) -> tuple[str, ...]:
    found = []
    if str(constraint) == "no constraint":
        found.append("no constraint was given, so the choice is the most accurate of all")
    if any(o.top1 is not None for o in options):
        found.append(
            "accuracies are of the weights as published, and recipes differ: they compare weights, not architectures"
        )
    if setting.int8:
        found.append(
            "accuracies are not of 8-bit networks: `convscale export --int8 --max-drop` keeps theirs, with some layers "
            "in float where it must"
        )
    broken = [o for o in options if o.known.failed]
    if broken:
        found.append(
            f"{len(broken)} candidates could not be examined, {broken[0].label} first: {broken[0].known.failed}"
        )
    return tuple(found)


def largest(
    base: NetSpec | str,
    *,
    device: str = "cpu",
    min_throughput: float | None = None,
    max_latency_ms: float | None = None,
    along: str = "phi",
    rule: str = "compound",
    batch_size: int | None = None,
    precision: str | None = None,
    runtime: str | None = None,
    mode: str = "infer",
    layout: str = "nchw",
    compiled: bool = False,
    threads: int | None = None,
    calibration: str | os.PathLike[str] | None = None,
    records: str | os.PathLike[str] | None = None,
    seconds: float = 1.0,
    confirm: bool = True,
    progress: Say | None = None,
) -> Largest:
    """The largest phi (or depth, width, size) of a family that keeps a speed on a device.

    Predicted for a named GPU or by a calibration (and then measured, where the device is this machine's own and
    ``confirm`` is set), measured on this machine's own device; see ``choice_scaling.largest`` for ``along``, ``rule``
    and the steps, and ``setting_of`` for the conditions.

    Raises:
        UserError: as ``choose``; or even the smallest member is too slow.
    """
    setting = setting_of(
        device,
        batch_size=batch_size,
        precision=precision,
        runtime=runtime,
        mode=mode,
        layout=layout,
        compiled=compiled,
        threads=threads,
        calibration=calibration,
        latency=max_latency_ms is not None and min_throughput is None,
    )
    return largest_under(
        base,
        setting=setting,
        min_throughput=min_throughput,
        max_latency_ms=max_latency_ms,
        along=along,
        rule=rule,
        seconds=seconds,
        records=records,
        confirm=confirm,
        progress=progress,
    )
