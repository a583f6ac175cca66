"""Scaling: a spec and multipliers become another spec, always computed from the unrounded baseline."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from convscale.arch.block import RunSpec, StageSpec
from convscale.arch.spec import Lineage, NetSpec
from convscale.errors import UserError, check_number, check_whole

RULES = ("compound", "fast", "depth", "width", "resolution")
_LEAST_FLOAT = math.ulp(0.0)
_EXACT = 1e-9  # products such as 1.1 * 3 / 1.1 must not be lifted over the next whole number by rounding noise


def multipliers(
    phi: float,
    *,
    rule: str = "compound",
    alpha: float = 1.2,
    beta: float = 1.1,
    gamma: float = 1.15,
    width_share: float = 0.8,
) -> tuple[float, float, float]:
    """(depth, width, resolution) of ``phi`` under a rule; see ``scale``. Invariant of ``fast``: depth * width^2 *
    resolution^2 = 2^phi.
    """
    check_number("phi", phi, "a number between -20 and 20", -20, 20)
    if rule == "compound":
        for key, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
            check_number(key, value, "at least 1", 1)
        return alpha**phi, beta**phi, gamma**phi
    check_number("width_share", width_share, "in [0, 1]", 0, 1)
    rest = (1 - width_share) / 2
    shares = {"fast": (rest, width_share, rest), "depth": (1, 0, 0), "width": (0, 1, 0), "resolution": (0, 0, 1)}[rule]
    cost = 2.0**phi
    return cost ** shares[0], cost ** (shares[1] / 2), cost ** (shares[2] / 2)


def scale_to(
    spec: NetSpec,
    *,
    depth: float = 1.0,
    width: float = 1.0,
    resolution: float = 1.0,
    image_size: int | None = None,
    divisor: int | None = None,
    name: str | None = None,
) -> NetSpec:
    """``scale`` by multipliers alone."""
    for key, value in (("depth", depth), ("width", width), ("resolution", resolution)):
        check_number(key, value, "a finite number above 0", _LEAST_FLOAT)
    if divisor is not None:
        check_whole("divisor", divisor)
    if image_size is not None and resolution != 1.0:
        raise UserError(f"scale takes either resolution ({resolution!r}) or image_size ({image_size!r}), not both")
    base, before = _baseline(spec)
    total_depth, total_width = depth * before[0], width * before[1]
    if image_size is not None:
        size = base.check_size(image_size)
        total_resolution = size / base.input.size
    else:
        total_resolution = resolution * before[2]
        size = _size_at(base, total_resolution)
    rules = spec.scaling if divisor is None else replace(spec.scaling, divisor=divisor)
    unchanged = total_width == 1.0 and divisor is None and rules == base.scaling

    def widen(channels: int) -> int:
        return (
            channels
            if unchanged
            else round_width(channels * total_width, divisor=rules.divisor, min_fraction=rules.min_fraction)
        )

    fixed = {i % len(base.stages) for i in rules.fixed_depth_stages}
    stages = tuple(
        _scale_stage(stage, 1.0 if i in fixed else total_depth, widen, rules.divisor)
        for i, stage in enumerate(base.stages)
    )

    def widen_by(rule: str, channels: int) -> int:
        if not channels or rule == "fixed":
            return channels
        return max(widen(channels), channels) if rule == "at_least" else widen(channels)

    stem = replace(base.stem, widths=tuple(widen_by(rules.stem, width) for width in base.stem.widths))
    head = replace(
        spec.head,
        width=widen_by(rules.head, base.head.width),
        pooled_width=widen_by(rules.head, base.head.pooled_width),
    )
    scaled = replace(
        base,
        name=name or _name(base.name, total_depth, total_width, size, base.input.size),
        input=replace(spec.input, size=base.input.size),
        stem=stem,
        stages=stages,
        head=head,
        norm=spec.norm,
        padding=spec.padding,
        scaling=rules,
        lineage=Lineage(base=base, depth=total_depth, width=total_width, resolution=total_resolution),
    )
    scaled.check_size(size)
    return replace(scaled, input=replace(scaled.input, size=size))


def round_width(width: float, *, divisor: int = 8, min_fraction: float = 0.9) -> int:
    """The multiple of ``divisor`` nearest to ``width`` channels that is not below ``min_fraction`` of it
    (EfficientNet's released rule).
    """
    rounded = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < min_fraction * width else rounded


def _baseline(spec: NetSpec) -> tuple[NetSpec, tuple[float, float, float]]:
    """The unrounded baseline of ``spec`` and its multipliers so far; one edited by hand since is a baseline of its own,
    but for its size.
    """
    past = spec.lineage
    if past is None:
        return spec, (1.0, 1.0, 1.0)
    resolution = (
        past.resolution
        if _size_at(past.base, past.resolution) == spec.input.size
        else spec.input.size / past.base.input.size
    )
    done = (past.depth, past.width, resolution)
    start = replace(past.base, scaling=spec.scaling)
    if spec.scaling.divisor != past.base.scaling.divisor:
        again = scale_to(start, depth=past.depth, width=past.width, divisor=spec.scaling.divisor)
    else:
        again = scale_to(start, depth=past.depth, width=past.width)
    same = (again.stem, again.stages, again.head.width, again.head.pooled_width, again.init) == (
        spec.stem,
        spec.stages,
        spec.head.width,
        spec.head.pooled_width,
        spec.init,
    )
    return (past.base, done) if same else (replace(spec, lineage=None), (1.0, 1.0, 1.0))


def _size_at(base: NetSpec, resolution: float) -> int:
    """Side in pixels at a multiplier of the baseline's."""
    step = base.input.multiple
    return max(round(base.input.size * resolution / step) * step, base.input.min_size)


def _scale_stage(stage: StageSpec, depth: float, widen: Callable[[int], int], divisor: int) -> StageSpec:
    repeats = _scale_repeats([run.repeat for run in stage.runs], depth)
    runs = tuple(
        RunSpec(block=run.block.with_width(widen(run.block.width), divisor), repeat=repeat)
        for run, repeat in zip(stage.runs, repeats, strict=True)
    )
    return replace(stage, runs=runs)


def _scale_repeats(repeats: list[int], depth: float) -> list[int]:
    """The stage's blocks times ``depth``, rounded up; runs share them in proportion and keep at least one each."""
    total = max(len(repeats), math.ceil(sum(repeats) * depth - _EXACT))
    out = []
    left, blocks = sum(repeats), total
    for i, repeat in enumerate(repeats):
        after = len(repeats) - i - 1
        share = min(blocks - after, max(1, int(blocks * repeat / left + _EXACT)))
        out.append(share if after else blocks)
        blocks, left = blocks - share, left - repeat
    return out


def _name(base: str, depth: float, width: float, size: int, base_size: int) -> str:
    parts = [base.partition(".")[0]]  # a scaled network has no released weights, so no tag
    if depth != 1:
        parts.append(f"d{depth:.3g}")
    if width != 1:
        parts.append(f"w{width:.3g}")
    if size != base_size:
        parts.append(f"{size}px")
    return "-".join(parts)
