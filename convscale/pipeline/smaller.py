"""At which smaller images released weights should keep a speed that they do not keep at the size of their figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from convscale.choice.decide import Option

LEAST_SIZE, SIZE_STEP = 96, 32
"""Images that released weights are tried at where they are too slow at their own size: no smaller than this side in
pixels, in steps of what most networks divide maps by."""
NEAR = 2.0
"""What should keep half of a speed at the smallest images is tried at them, since without weights a network starts from
scratch. A judgement: another job that wants all cores takes half of them, so that a timing at larger images beside it
comes out at half of the speed. Beside several it may be further off."""


TRIED_SMALLEST = 3
"""Networks that are tried at the smallest images for nothing but being the fastest."""


def smaller_sizes(
    options: Sequence[Option],
    speed_of: Callable[[Option], float],
    floor: float,
    most_params_m: float | None,
    *,
    measured: bool,
) -> dict[str, int]:
    """The largest images, in steps of ``SIZE_STEP``, at which weights should keep a speed, by their names: time is
    taken to be proportional to pixels. Where none of those that are measured should keep it at any, the smallest
    images, for those that may.

    Args:
        options: those that are too slow.
        speed_of: the images/s of one that count, 0 where nobody knows.
        floor: images/s to keep.
        most_params_m: millions of parameters; None: no limit.
        measured: speeds are taken here, where other work may disturb them; a prediction is what it is.
    """
    sizes, near = dict[str, int](), dict[str, int]()
    seen = set[str]()
    for o in sorted(options, key=lambda o: o.image_size):  # the smallest that was too slow bounds the others
        known = speed_of(o) or o.facts.estimate
        if most_params_m and o.params_m > most_params_m:
            continue
        if known and floor and o.name not in seen:
            seen.add(o.name)
            side = o.image_size * math.sqrt(known / floor / 1.05)
            size = min(int(side) // SIZE_STEP * SIZE_STEP, o.image_size - 1)
            if size >= LEAST_SIZE:
                sizes[o.name] = size
            elif measured and o.image_size > LEAST_SIZE and side * math.sqrt(NEAR) >= LEAST_SIZE:
                near[o.name] = LEAST_SIZE
    return sizes or near


def least_sizes(
    options: Sequence[Option], speed_of: Callable[[Option], float], most_params_m: float | None
) -> dict[str, int]:
    """The smallest images for the few weights that should be the fastest at them, by their names: time is taken to be
    proportional to pixels. What was tried at images so small has its speed.

    Args:
        options, speed_of, most_params_m: as for ``smaller_sizes``.
    """
    tried = {o.name for o in options if o.image_size <= LEAST_SIZE}
    speeds = dict[str, float]()
    for o in options:
        known = speed_of(o) or o.facts.estimate
        if known and o.name not in tried and not (most_params_m and o.params_m > most_params_m):
            speeds[o.name] = max(speeds.get(o.name, 0.0), known * (o.image_size / LEAST_SIZE) ** 2)
    return dict.fromkeys(sorted(speeds, key=lambda name: -speeds[name])[:TRIED_SMALLEST], LEAST_SIZE)
