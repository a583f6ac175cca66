"""How fast a network is: any network, in any runtime, for inference or training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from convscale.conditions import Conditions, check_seconds, size_text
from convscale.errors import DoesNotFit, UserError, nearest
from convscale.machine import Environment
from convscale.speed.subjects import Measured, Subject, in_memory, once, subjects, twice
from convscale.speed.timing import Measurement, Stopwatch, time_callable
from convscale.stats import largest_true

PROTOCOLS = ("tresnet",)
MAX_BATCH = 8192
"""The search for the largest batch stops here."""
GROWTH = 1.03
"""A sweep goes on while two doublings of the batch bring more than this."""
CALM_IQR = 0.2
"""Times whose interquartile range is a larger share of their median were disturbed."""
CALM_TRIES = 3
"""Times that a glance is taken at most."""


def measure(
    net: Measured,
    cond: Conditions | None = None,
    *,
    min_seconds: float = 1.0,
    max_seconds: float = 30.0,
    protocol: str | None = None,
    **keywords: object,
) -> Measurement:
    """Time a network under stated conditions.

    For ONNX Runtime and OpenVINO a module is exported to a temporary file first, trained or not: speed does not depend
    on the weights. Inputs are seeded noise, already on the device; copies and preprocessing are left out. The network
    is left as it is. On a GPU cuDNN chooses its algorithms by timing them, as timm's benchmark has it.

    Args:
        net: a module, a ``NetSpec``, a model's name, or an :class:`~convscale.artifact.artifact.Artifact` (in its own
            runtime and threads, and at the batch that it was tuned to, unless others are named).
        cond: the conditions; None: the defaults, eager PyTorch among them (``convscale measure`` takes ONNX Runtime).
        min_seconds: the timed calls together last at least this long.
        max_seconds: and warm-up and timed calls at most about this long.
        protocol: ``tresnet``: at 90 % of the largest batch that fits (the TResNet paper, section 4.1); the batch size
            given is not used.
        keywords: fields of :class:`~convscale.conditions.Conditions`, over those of ``cond``; ``layout="auto"``
            measures both layouts and gives the faster.

    Returns:
        A measurement whose conditions are complete: size and threads are filled in, and a batch that did not fit is
            halved, which a note says.

    Raises:
        UserError: an impossible condition, an unknown size, a runtime that is missing or does not do what is asked, no
            batch that fits.
    """
    if protocol is not None and protocol not in PROTOCOLS:
        raise UserError(f"protocol {protocol!r} is unknown{nearest(str(protocol), PROTOCOLS)}")
    check_seconds(min_seconds, max_seconds)
    timed = [
        _measured(subject, subject.cond.batch_size, min_seconds, max_seconds, protocol)
        for subject in subjects(net, cond, keywords)
    ]
    return _fastest(timed)


def measure_calmly(net: Measured, cond: Conditions, *, min_seconds: float, max_seconds: float) -> Measurement:
    """``measure`` for a glance: where the times spread widely, which other work on the machine brings about, the
    network is timed again, twice at most, exported and opened once. The fastest of them.

    Args:
        net, cond, min_seconds, max_seconds: as for :func:`measure`; the seconds are of each time.

    Raises:
        UserError: as :func:`measure`.
    """
    opened, found = subjects(net, cond, {}), []
    for _ in range(CALM_TRIES):
        made = _fastest([_measured(subject, subject.cond.batch_size, min_seconds, max_seconds) for subject in opened])
        found.append(made)
        if made.iqr_rel <= CALM_IQR or made.conditions.batch_size != cond.batch_size:
            break
    return max(found, key=lambda made: made.images_per_s)


def whole_batch(made: Measurement, batch_size: int) -> Measurement:
    """A measurement, where it is of the batch that was asked for: at another one it would be another speed.

    Raises:
        DoesNotFit: memory does not hold that batch.
    """
    if made.conditions.batch_size != batch_size:
        size = size_text(made.conditions.image_size or 0)
        raise DoesNotFit(f"{made.model} @{size} does not fit in memory at batch {batch_size}; take a smaller one")
    return made


def sweep(
    net: Measured,
    cond: Conditions | None = None,
    *,
    batch_sizes: Sequence[int] | None = None,
    min_seconds: float = 1.0,
    max_seconds: float = 30.0,
    **keywords: object,
) -> Iterator[Measurement]:
    """Time a network at several batch sizes, exported and opened once; a measurement is given as soon as it is made.

    Args:
        batch_sizes: those to time, in this order; None: 1, 2, 4 ... until two doublings together bring less than 3 % or
            memory ends.
        net, cond, min_seconds, max_seconds, keywords: as for :func:`measure`.

    Raises:
        UserError: as :func:`measure`.
    """
    check_seconds(min_seconds, max_seconds)
    if batch_sizes is not None and (isinstance(batch_sizes, int | str) or not batch_sizes):
        raise UserError(f"batch_sizes must be whole numbers of images, at least one, got {batch_sizes!r}")
    sizes = [*batch_sizes] if batch_sizes is not None else [2**power for power in range(MAX_BATCH.bit_length())]
    for size in sizes:
        dataclasses.replace(cond or Conditions(), batch_size=size)  # every size is checked before the first is timed
    opened = subjects(net, cond, keywords)
    speeds: list[float] = []
    for size in sizes:
        found = _fastest([_measured(subject, size, min_seconds, max_seconds) for subject in opened])
        if batch_sizes is None and found.conditions.batch_size != size:
            return
        yield found
        speeds.append(found.images_per_s)
        if batch_sizes is None and len(speeds) > 2 and max(speeds[-2:]) < GROWTH * max(speeds[:-2]):
            return


def _measured(
    subject: Subject, batch_size: int, min_seconds: float, max_seconds: float, protocol: str | None = None
) -> Measurement:
    """At a batch size, halved until it fits."""
    cond = dataclasses.replace(subject.cond, batch_size=batch_size)
    notes = subject.notes
    if protocol == "tresnet":
        tried = twice if cond.mode == "train" else once
        largest = largest_batch(lambda size: in_memory(subject, size, tried) is not None, device=cond.device)
        cond = dataclasses.replace(cond, batch_size=max(1, int(0.9 * largest)))
        notes = (*notes, f"tresnet protocol: the largest batch that fits is {largest}")

    def timed(call: Callable[[], object], stopwatch: Stopwatch) -> tuple[float, ...]:
        return time_callable(call, min_seconds=min_seconds, max_seconds=max_seconds, stopwatch=stopwatch)

    while (found := in_memory(subject, cond.batch_size, timed)) is None:
        half = cond.batch_size // 2
        if half < 1:
            raise DoesNotFit(
                f"{subject.name} does not fit in the memory of {cond.device} at {cond.image_size} px, even one image "
                "at a time"
            )
        notes = (*notes, f"batch {cond.batch_size} did not fit in memory; halved to {half}")
        cond = dataclasses.replace(cond, batch_size=half)
    times, peak = found
    return Measurement(
        times_s=times,
        conditions=cond,
        environment=Environment.here(cond.device),
        model=subject.name,
        notes=notes,
        peak_bytes=peak,
    )


def _fastest(found: Sequence[Measurement]) -> Measurement:
    """The fastest of a network's layouts, with a note of what the others reached."""
    best = max(found, key=lambda m: m.images_per_s)
    if len(found) == 1:
        return best
    speeds = ", ".join(f"{m.conditions.layout} {m.images_per_s:,.1f} images/s" for m in found)
    return dataclasses.replace(best, notes=(*best.notes, f"layout chosen by measuring: {speeds}"))


def export_and_time(
    net: Measured,
    cond: Conditions | None = None,
    *,
    min_seconds: float = 1.0,
    max_seconds: float = 15.0,
    **keywords: object,
) -> Measurement:
    """Time a candidate as it would be shipped: exported untrained and run in ONNX Runtime (or ``runtime=``), without a
    check of its outputs.
    """
    keywords.setdefault("runtime", "onnxruntime" if cond is None else cond.runtime)
    (subject,) = subjects(net, cond, keywords)
    return _measured(subject, subject.cond.batch_size, min_seconds, max_seconds)


def largest_batch(fits: Callable[[int], bool], *, device: str = "cuda", limit: int = MAX_BATCH) -> int:
    """The largest batch size that fits, to within one part in 32.

    Args:
        fits: whether a batch of this size runs; called about 18 times at most.
        device: for the message.
        limit: the largest size tried.

    Returns:
        At least 1.

    Raises:
        UserError: not even one image fits.
    """
    sizes = _coarse_sizes(limit)
    at = largest_true(lambda i: fits(sizes[i]), 0, len(sizes) - 1)
    if at is None:
        raise UserError(f"not even one image fits in the memory of {device}; take a smaller network or size")
    return sizes[at]


def _coarse_sizes(limit: int) -> list[int]:
    """Batch sizes 1 to ``limit``, steps of at most one part in 32."""
    sizes = [1]
    while sizes[-1] < limit:
        sizes.append(min(limit, sizes[-1] + max(1, sizes[-1] // 32)))
    return sizes
