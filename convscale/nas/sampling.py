"""Which network to try next: at random, by evolution, or guided by a linear model of what was tried.

Every proposal depends on the seed, the trial's number and what was tried before, on nothing else: a search that was
interrupted goes on as if it had not been.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from convscale.errors import UserError, check_text

SAMPLERS = ("guided", "tpe", "evolution", "random")
STARTUP = 12
"""Trials before the model and the evolution take over."""
POPULATION, TOURNAMENT = 32, 8
"""Of the regularised evolution (Real et al., arXiv 1802.01548, section 3): how many live, and how many compete."""
_DRAWN, _PARENTS, _CHILDREN = 400, 8, 24
"""Candidates of a guided proposal: drawn at random, and changed from the best so far."""
_PRIOR, _NOISE = 3.0, 0.3
"""Precision of the model's weights and variance of what it can not say, for values of variance 1."""
_SPREAD = 0.5
"""How far a drawn model strays from the most likely one: less than the posterior says, since there are few trials."""
_CLOSEST = 2
"""Of a proposal among kin alone: of so many of the best."""
_TILT = 1.5
"""Most that the speed counts beside the value."""
_TRIES = 200


class Walk(Protocol):
    """What is searched: genes that can be drawn and changed. ``SearchSpace`` is one."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many options each variable has."""
        ...

    def draw(self, rng: np.random.Generator) -> tuple[int, ...]:
        """Any genes."""
        ...

    def changed(self, genes: tuple[int, ...], rng: np.random.Generator) -> tuple[int, ...]:
        """Genes with one choice changed."""
        ...


@dataclass(frozen=True, kw_only=True)
class Tried:
    """What became of genes."""

    genes: tuple[int, ...]
    value: float | None = None
    """What is to be highest; None: not trained, or not yet."""
    speed: float | None = None
    """Images/s; None: not known."""


class UsedUp(UserError):
    """Nothing in the space was left to try."""


def propose(
    walk: Walk, tried: Sequence[Tried], *, sampler: str, seed: int, number: int, floor: float = 0.0
) -> tuple[int, ...]:
    """Genes that were not tried before.

    Args:
        walk: what is searched.
        tried: so far, in order; those under way too.
        sampler: ``guided``, ``evolution`` or ``random``.
        seed: of the search.
        number: of the trial.
        floor: images/s below which nothing is trained: guided proposals stay above it by what is known.

    Raises:
        UsedUp: nothing that was not tried is found.
    """
    check_text("sampler", sampler, SAMPLERS)
    rng = np.random.default_rng((seed % 2**63, number))
    seen = {one.genes for one in tried}
    valued = [one for one in tried if one.value is not None]
    if sampler == "evolution" and len(valued) >= STARTUP:
        return _fresh(lambda: walk.changed(_parent(valued, rng), rng), walk, seen, rng)
    if sampler == "guided" and len(valued) >= STARTUP:
        return _guided(walk, tried, seen, rng, number, floor)
    return _fresh(lambda: walk.draw(rng), walk, seen, rng)


def several(walk: Walk, tried: Sequence[Tried], *, count: int, seed: int, number: int) -> list[tuple[int, ...]]:
    """So many genes at random that were not tried before; fewer where no more are left.

    Raises:
        UsedUp: none is left.
    """
    drawn: list[tuple[int, ...]] = []
    for extra in range(1, count + 1):
        known = [*tried, *(Tried(genes=genes) for genes in drawn)]
        try:
            drawn.append(propose(walk, known, sampler="random", seed=seed, number=number + extra * 1_000_003))
        except UsedUp:
            if not drawn:
                raise
            break
    return drawn


def _fresh(
    make: Callable[[], tuple[int, ...]], walk: Walk, seen: set[tuple[int, ...]], rng: np.random.Generator
) -> tuple[int, ...]:
    """Made until it is new; after some tries anything new is taken."""
    for attempt in range(2 * _TRIES):
        genes = make() if attempt < _TRIES else walk.draw(rng)
        if genes not in seen:
            return genes
    raise UsedUp(f"all that is found in the space was tried: {len(seen)} networks; a larger space would be right")


def _parent(valued: Sequence[Tried], rng: np.random.Generator) -> tuple[int, ...]:
    """The best of a few of those that live: the youngest ones."""
    alive = valued[-POPULATION:]
    some = rng.choice(len(alive), size=min(TOURNAMENT, len(alive)), replace=False)
    return max((alive[int(at)] for at in some), key=lambda one: one.value or 0.0).genes


def features(genes: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Genes (N, variables) as zeros and ones (N, options of all variables and one for the mean)."""
    columns = [genes[:, [at]] == np.arange(size)[None] for at, size in enumerate(sizes)]
    return np.concatenate([*columns, np.ones((len(genes), 1), dtype=bool)], axis=1).astype(float)


@dataclass(frozen=True)
class Linear:
    """The posterior of a Bayesian linear regression on standardised values."""

    mean: np.ndarray
    factor: np.ndarray
    """Lower Cholesky factor of the precision."""
    centre: float
    scale: float

    @classmethod
    def fitted(cls, inputs: np.ndarray, values: np.ndarray) -> Linear:
        """
        Args:
            inputs: float64 (N, D).
            values: float64 (N,).
        """
        centre, scale = float(values.mean()), float(values.std()) or 1.0
        aims = (values - centre) / scale
        precision = inputs.T @ inputs / _NOISE + _PRIOR * np.eye(inputs.shape[1])
        factor = np.linalg.cholesky(precision)
        mean = np.linalg.solve(precision, inputs.T @ aims / _NOISE)
        return cls(mean, factor, centre, scale)

    def drawn(self, rng: np.random.Generator, spread: float = _SPREAD) -> np.ndarray:
        """Weights of a model that is as likely as any (Thompson sampling)."""
        return self.mean + spread * np.linalg.solve(self.factor.T, rng.standard_normal(len(self.mean)))

    def said(self, inputs: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Values by a model's weights."""
        return self.centre + self.scale * (inputs @ weights)


def _guided(
    walk: Walk, tried: Sequence[Tried], seen: set[tuple[int, ...]], rng: np.random.Generator, turn: int, floor: float
) -> tuple[int, ...]:
    """The best by a model drawn from those that explain the trials, among random networks and kin of the best ones.

    Every third of four turns looks at kin alone: what no linear model says is found beside the best. Every fourth goes
    along the front of values and speeds, where no floor says which speed is wanted.
    """
    sizes = walk.sizes
    models = models_of(tried, sizes, floor)
    valued = [one for one in tried if one.value is not None]
    local = is_local(turn, models, floor)
    valued = [one for one in valued if (one.speed or floor) >= floor] or valued
    best = sorted(valued, key=lambda one: -(one.value or 0.0))[: _CLOSEST if local else _PARENTS]
    pool = set() if local else {walk.draw(rng) for _ in range(_DRAWN)}
    for parent in best:
        for _ in range(_CHILDREN):
            child = walk.changed(parent.genes, rng)
            pool.add(child)
            if not local and rng.random() < 0.5:
                pool.add(walk.changed(child, rng))
    fresh = sorted(pool - seen)
    if not fresh:
        return _fresh(lambda: walk.draw(rng), walk, seen, rng)
    return fresh[best_of(features(np.array(fresh), sizes), models, rng, floor, tilt_of(turn, rng, floor))]


def is_local(turn: int, models: tuple[Linear, Linear | None], floor: float) -> bool:
    """Whether a turn looks at kin of the best ones alone."""
    return turn % 4 == 2 or (turn % 4 == 3 and not floor and models[1] is None)


def tilt_of(turn: int, rng: np.random.Generator, floor: float) -> float:
    """How much of the speed, in deviations of either, is added to the value in a turn that goes along the front."""
    return float(rng.uniform(-_TILT, _TILT)) if turn % 4 == 3 and not floor else 0.0


def models_of(tried: Sequence[Tried], sizes: Sequence[int], floor: float) -> tuple[Linear, Linear | None]:
    """A model of the values, and one of the logarithms of the speeds where enough was timed."""
    valued = [one for one in tried if one.value is not None]
    known = features(np.array([one.genes for one in valued]), sizes)
    model = Linear.fitted(known, np.array([float(one.value or 0.0) for one in valued]))
    timed = [one for one in tried if one.speed]
    if len(timed) < STARTUP:
        return model, None
    speeds = np.array([math.log(one.speed or 1.0) for one in timed])
    return model, Linear.fitted(features(np.array([one.genes for one in timed]), sizes), speeds)


def best_of(
    inputs: np.ndarray, models: tuple[Linear, Linear | None], rng: np.random.Generator, floor: float, tilt: float = 0.0
) -> int:
    """Which of some candidates a drawn model takes for the best that keeps the speed; else the fastest of them.

    Args:
        inputs: features of the candidates.
        models: of ``models_of``.
        rng: draws the model.
        floor: images/s; 0: none.
        tilt: how much of the speed is added, in deviations of either.
    """
    model, pace = models
    scores = model.said(inputs, model.drawn(rng))
    if pace is None or not (floor or tilt):
        return int(scores.argmax())
    fast = pace.said(inputs, pace.mean)
    if not floor:
        return int((scores / model.scale + tilt * fast / pace.scale).argmax())
    keeps = fast >= math.log(floor)
    return int((np.where(keeps, scores, -np.inf) if keeps.any() else fast).argmax())
