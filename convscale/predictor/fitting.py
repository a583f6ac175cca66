"""Fitting the roofline's coefficients to measured times."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from convscale.cost.kernels import FUSED, MATRIX, PHASES
from convscale.predictor.devices import Device, is_processor
from convscale.predictor.roofline import (
    FIXED,
    KINDS,
    PRIOR,
    REACH,
    Table,
    bounds_of,
    chosen,
    for_card,
    is_huge,
    kernel_s,
)

NOISE = 0.05
"""Log error beyond which a row's pull grows linearly: tables of others have outliers."""


ERA_SIGMA = 0.02
"""Log error that one generation of a framework is expected to differ by from another as a whole: PyTorch 2.4 and 2.9 on
one RTX 4090 differ by 0 to 3 % from family to family. Held so near, it does not stand for what a card is."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Measured networks of one table."""

    table: Table
    """Their kernels."""
    latency_s: np.ndarray
    """Measured seconds of a call, one for each network."""
    device: Device
    """What they ran on."""
    weight: float | np.ndarray = 1.0
    """Pull of each row; ``NOISE`` over its standard error where that is known."""
    card: str = ""
    """Name under which what the card reaches of its data sheet is fitted (``reach_of``); empty: it is taken for what
    the sheet says."""
    era: str = ""
    """Name under which a factor on all its times is fitted: a generation of the framework, a machine; empty: none."""


class _Compact:
    """All parts of one card with equal kernels of their networks evaluated once: networks share most of theirs, and a
    fit evaluates them thousands of times.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        from scipy.sparse import csr_matrix

        starts = np.cumsum([0, *(part.table.nets for part in parts)])
        net = np.concatenate([part.table.net + start for part, start in zip(parts, starts, strict=False)])
        tables = [part.table for part in parts]
        columns = np.concatenate(
            [np.stack([table.kind, table.phase, *table.values.values()], axis=1) for table in tables]
        )
        _, first, inverse = np.unique(columns, axis=0, return_index=True, return_inverse=True)
        self.unique = Table(
            net=np.zeros(len(first), dtype=np.int64),
            count=np.ones(len(first)),
            kind=columns[first, 0].astype(np.int64),
            phase=columns[first, 1].astype(np.int64),
            values={name: columns[first, 2 + i] for i, name in enumerate(tables[0].values)},
        )
        count = np.concatenate([table.count for table in tables])
        self.launches = csr_matrix((count, (net, inverse.reshape(-1))), shape=(int(starts[-1]), len(first)))
        self.device, self.card = parts[0].device, parts[0].card
        self.eras = np.repeat([part.era for part in parts], [part.table.nets for part in parts])
        self.latency_s = np.concatenate([part.latency_s for part in parts])
        self.weight = np.concatenate([np.broadcast_to(part.weight, len(part.latency_s)) for part in parts])
        self._some: dict[str, _Some] = {}

    def some(self, name: str) -> _Some:
        """The kernels that a coefficient speaks of, with their launches."""
        if name not in self._some:
            rows = rows_of(name, self.unique)
            self._some[name] = _Some(chosen(self.unique, rows), self.launches[:, np.flatnonzero(rows)])
        return self._some[name]

    def net_s(self, coefficients: Mapping[str, float]) -> np.ndarray:
        """Seconds of a call of each network."""
        factors = {era: coefficients.get(f"{era}:time", 1.0) for era in np.unique(self.eras)}
        return self._seconds(_Some(self.unique, self.launches), coefficients) * [factors[era] for era in self.eras]

    def _seconds(self, some: _Some, coefficients: Mapping[str, float]) -> np.ndarray:
        """Under the newest era."""
        c = for_card(coefficients, reach_of(coefficients, self.card)) if self.card else coefficients
        return some.launches @ kernel_s(some.table, self.device, c).total_s

    def slopes(self, name: str, coefficients: Mapping[str, float], newest_s: np.ndarray) -> np.ndarray:
        """By how much each network's log time follows the logarithm of one coefficient; ``newest_s`` is what their
        calls take under the newest era. Only the kernels that the coefficient speaks of are evaluated again.
        """
        owner, _, what = name.rpartition(":")
        if what == "time":
            return (self.eras == owner).astype(float)
        some = self.some(what)
        if (owner and owner != self.card) or not len(some.table.kind):
            return np.zeros(len(newest_s))
        moved = {**coefficients, name: coefficients[name] * float(np.exp(_STEP))}
        return (self._seconds(some, moved) - self._seconds(some, coefficients)) / newest_s / _STEP

    def jacobian(self, names: Sequence[str], coefficients: Mapping[str, float]) -> np.ndarray:
        """(networks, coefficients): all slopes, by each network's weight."""
        newest_s = self._seconds(_Some(self.unique, self.launches), coefficients)
        return np.stack([self.slopes(name, coefficients, newest_s) for name in names], axis=1) * self.weight[:, None]


_STEP = 1e-4
"""By which a coefficient's logarithm is moved to find a slope."""


class _Some(NamedTuple):
    """Some of a part's kernels."""

    table: Table
    """Each once."""
    launches: Any
    """(networks, kernels), sparse."""


_OF_KINDS: dict[str, tuple[str, ...]] = {
    "depthwise": ("depthwise", "depthwise_native"),
    "grouped": ("grouped", "grouped_pow2", "grouped_packed"),
    "depthwise_native": ("depthwise_native",),
    "batch_norm_train": ("batch_norm_train",),
    "special": FUSED,
    "window.pool": ("pool",),
    "window.depthwise": ("depthwise", "depthwise_native"),
    **dict.fromkeys(("peak", "depth0", "width0", "ragged", "transform.odd", "compute.general"), MATRIX),
}
_OF_PHASES = {
    "compute.input": "input",
    "compute.weight": "weight",
    "depthwise.input": "input",
    "depthwise.weight": "weight",
    "memory.weight": "weight",
    "memory.backward": "backward",
}


def rows_of(name: str, table: Table) -> np.ndarray:
    """Which kernels' times a coefficient may change."""
    if name in _OF_PHASES:
        return table.phase == PHASES.index(_OF_PHASES[name])
    if name == "permute":
        return table.values["permuted"] > 0
    if name == "huge":
        return is_huge(table)
    group, _, kind = name.rpartition(".")
    of_kind = group in ("compute", "memory", "transform", "small", "work") and kind in KINDS
    kinds = (kind,) if of_kind else _OF_KINDS.get(name, _OF_KINDS.get(group, KINDS))
    return np.isin(table.kind, [KINDS.index(each) for each in kinds])


def reach_of(coefficients: Mapping[str, float], card: str) -> dict[str, float]:
    """What a fit found that a card reaches of its data sheet: factors on ``REACH``."""
    return {name: coefficients.get(f"{card}:{name}", 1.0) for name in REACH}


def terms_of(parts: Sequence[Part]) -> dict[str, float]:
    """The further coefficients that parts with a card or an era ask for, at 1."""
    cards = [f"{card}:{name}" for card in sorted({part.card for part in parts} - {""}) for name in REACH]
    return dict.fromkeys([*cards, *(f"{era}:time" for era in sorted({part.era for part in parts} - {""}))], 1.0)


def _errors(parts: Sequence[_Compact], coefficients: Mapping[str, float]) -> np.ndarray:
    return np.concatenate([c.weight * np.log(c.net_s(coefficients) / c.latency_s) for c in parts])


def _by_card(parts: Sequence[Part]) -> list[_Compact]:
    """Parts of one card together."""
    cards: dict[tuple[str, str], list[Part]] = {}
    for part in parts:
        cards.setdefault((part.device.name, part.card), []).append(part)
    return [_Compact(some) for some in cards.values()]


def fit(
    parts: Sequence[Part],
    *,
    start: Mapping[str, float] | None = None,
    free: Sequence[str] | None = None,
    ridge: float | Mapping[str, float] = 0.3,
    steps: int = 40,
    robust: bool = True,
    near: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Fit coefficients by a robust log error.

    Args:
        parts: measured tables; coefficients are shared between them.
        start: coefficients to start from and to stay near; None: the prior.
        free: names of the coefficients that may move; None: all of the prior's.
        ridge: pull towards the start, in log units of a row's error per log unit of a coefficient; what the data says
            little of stays where it was.
            One for all, or by name: ``NOISE`` over the coefficient's standard error, where that is known.
        steps: most evaluations of the Jacobian.
        robust: whether a row that is far off pulls less than by the square of its error, for tables with outliers.
        near: coefficients to begin the search at, which the result does not depend on; None: at ``start``.
    """
    begin = {**PRIOR, **terms_of(parts), **(start or {})}
    names = [name for name in begin if name not in FIXED] if free is None else list(free)
    x0 = np.log([begin[name] for name in names])
    low, high = _bounds(names, x0, start is None)
    x0 = np.clip(x0, low, high)

    def unpack(x: np.ndarray) -> dict[str, float]:
        return {**begin, **dict(zip(names, np.exp(x).tolist(), strict=True))}

    compact = _by_card(parts)
    pulls = np.array([_pull(name, ridge) for name in names])

    def residuals(x: np.ndarray) -> np.ndarray:
        return np.concatenate([_errors(compact, unpack(x)), pulls * (x - x0)]) / NOISE

    def jacobian(x: np.ndarray) -> np.ndarray:
        here = unpack(x)
        return np.concatenate([*(each.jacobian(names, here) for each in compact), np.diag(pulls)]) / NOISE

    guess = x0 if near is None else np.clip(np.log([near.get(name, begin[name]) for name in names]), low, high)
    return unpack(_least(Problem(residuals, jacobian, low, high, robust), guess, steps))


def _pull(name: str, ridge: float | Mapping[str, float]) -> float:
    """The pull on a coefficient."""
    owner, _, what = name.rpartition(":")
    # Large batches say little of launches; of a processor's the tables hold single images.
    if what == "time" or (what == "overhead_us" and owner and not is_processor(owner)):
        return NOISE / ERA_SIGMA
    return ridge[name] if isinstance(ridge, Mapping) else ridge


class Problem(NamedTuple):
    """A sum of squares, or of robust ones, between bounds."""

    residuals: Callable[[np.ndarray], np.ndarray]
    jacobian: Callable[[np.ndarray], np.ndarray]
    low: np.ndarray
    high: np.ndarray
    robust: bool
    """Whether a residual r counts as 2 * (sqrt(1 + r ** 2) - 1), scipy's ``soft_l1``, instead of r ** 2."""

    def cost(self, r: np.ndarray) -> float:
        """What is to be made small."""
        return float(np.sum(2 * (np.sqrt(1 + r**2) - 1))) if self.robust else float(r @ r)


def _least(problem: Problem, x: np.ndarray, steps: int) -> np.ndarray:
    """Levenberg and Marquardt's method with projection on the bounds: what stands at a bound and would go beyond it
    stays out of a step. Many coefficients end at their bounds, where methods that keep inside crawl.

    Nocedal and Wright, "Numerical Optimization" (2006), sections 10.3 and 16.7.
    """
    r = problem.residuals(x)
    cost, damping = problem.cost(r), 1e-3
    for _ in range(steps):
        jacobian = problem.jacobian(x)
        weight = 1 / np.sqrt(1 + r**2) if problem.robust else np.ones(len(r))
        gradient = jacobian.T @ (weight * r)
        stuck = ((x <= problem.low) & (gradient > 0)) | ((x >= problem.high) & (gradient < 0))
        free = np.flatnonzero(~stuck)
        curvature = (jacobian[:, free].T * weight) @ jacobian[:, free]
        before = cost
        for _ in range(8):
            lifted = curvature + damping * np.diag(np.diag(curvature))
            moved = x.copy()
            moved[free] -= np.linalg.solve(lifted, gradient[free])
            moved = np.clip(moved, problem.low, problem.high)
            there = problem.residuals(moved)
            if (new := problem.cost(there)) < cost:
                x, r, cost, damping = moved, there, new, max(damping / 5, 1e-7)
                break
            damping *= 5
        if before - cost < 1e-5 * before:
            break
    return x


def _bounds(names: Sequence[str], x0: np.ndarray, physical: bool) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper logarithms; a fit to a card at hand, which starts from another's coefficients, goes by what was
    measured there: cards run above the clocks of their sheets.
    """
    if not physical:
        return x0 - 4, x0 + 4
    pairs = [bounds_of(name) for name in names]
    low = np.log([max(low, 1e-9) for low, _ in pairs])
    high = np.log([min(high, 1e9) for _, high in pairs])
    return np.maximum(low, x0 - 4), np.minimum(high, x0 + 4)
