"""Methods that search a table of networks which others trained: our sampler, random search, regularised evolution,
REINFORCE and Optuna's estimator, a query being one row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from convscale.nas.sampling import STARTUP, Tried, best_of, features, is_local, models_of, tilt_of
from convscale.nas.walk import ROUND

EXPONENT = 0.07
"""MnasNet, section 3; EfficientNet, section 4."""
POPULATION, TOURNAMENT = 50, 10
"""Of the evolution, as Real et al. (arXiv 1802.01548) and later tables have it in this proportion."""
RATE, DECAY = 0.1, 0.9
"""Of REINFORCE: learning rate of the logits, and of the baseline's moving average."""
KIN, NEAREST = 2, 16
"""Of a local turn: of how many of the best, and among how many of the nearest rows."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Networks with what is known of them."""

    name: str
    genes: np.ndarray
    """int (N, variables): which option of each variable."""
    accuracy: np.ndarray
    """float (N,), percent."""
    costs: dict[str, np.ndarray]
    """By name, float (N,): what is to be small."""
    params: np.ndarray
    """float (N,)."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Options of each variable."""
        return tuple(int(top) + 1 for top in self.genes.max(0))

    def reward(self, by: str) -> np.ndarray:
        """Accuracy x (cost / median cost)^-0.07, float (N,)."""
        cost = self.costs[by]
        return self.accuracy * (cost / np.median(cost)) ** -EXPONENT


Method = Callable[[Table, np.ndarray, np.random.Generator, int], np.ndarray]
"""A table, its rewards, a generator and a budget to the rows that were queried, in order."""


class Pool:
    """Rows that are left, and those that were queried."""

    def __init__(self, table: Table) -> None:
        self.table, self.left, self.queried = table, np.ones(len(table.genes), dtype=bool), list[int]()

    def take(self, row: int) -> int:
        """Query a row."""
        self.left[row] = False
        self.queried.append(row)
        return row

    def nearest(self, genes: np.ndarray, rng: np.random.Generator) -> int:
        """Query the row that is left with the fewest choices apart; of several any."""
        rows = np.flatnonzero(self.left)
        apart = (self.table.genes[rows] != genes).sum(1)
        return self.take(int(rng.choice(rows[apart == apart.min()])))


def random(table: Table, rewards: np.ndarray, rng: np.random.Generator, budget: int) -> np.ndarray:
    """Rows drawn."""
    return rng.permutation(len(rewards))[:budget]


def evolution(table: Table, rewards: np.ndarray, rng: np.random.Generator, budget: int) -> np.ndarray:
    """Regularised evolution: the best of a few of those alive is changed in one choice, and the oldest dies."""
    pool, sizes = Pool(table), table.sizes
    alive = [pool.take(int(row)) for row in rng.permutation(len(rewards))[:POPULATION]]
    while len(pool.queried) < budget:
        some = rng.choice(len(alive), TOURNAMENT, replace=False)
        child = table.genes[max((alive[at] for at in some), key=lambda row: rewards[row])].copy()
        at = rng.integers(len(sizes))
        child[at] = (child[at] + 1 + rng.integers(sizes[at] - 1)) % sizes[at]
        alive.append(pool.nearest(child, rng))
        alive.pop(0)
    return np.array(pool.queried)


def reinforce(table: Table, rewards: np.ndarray, rng: np.random.Generator, budget: int) -> np.ndarray:
    """REINFORCE on a categorical policy for each choice, with a moving average as the baseline; rewards in standard
    deviations of those seen.
    """
    pool, sizes = Pool(table), table.sizes
    logits = [np.zeros(size) for size in sizes]
    baseline, seen = 0.0, list[float]()
    while len(pool.queried) < budget:
        shares = [np.exp(each - each.max()) / np.exp(each - each.max()).sum() for each in logits]
        drawn = np.array([rng.choice(len(share), p=share) for share in shares])
        row = pool.nearest(drawn, rng)
        seen.append(float(rewards[row]))
        scale = float(np.std(seen)) or 1.0
        baseline = seen[0] if len(seen) == 1 else DECAY * baseline + (1 - DECAY) * seen[-1]
        for each, share, option in zip(logits, shares, table.genes[row], strict=True):
            gradient = -share
            gradient[option] += 1
            each += RATE * (seen[-1] - baseline) / scale * gradient
    return np.array(pool.queried)


def guided(table: Table, rewards: np.ndarray, rng: np.random.Generator, budget: int, by: str) -> np.ndarray:
    """The engine's own sampler, in its rounds and turns, over the rows that are left; it knows the cost of what it
    queried, as a search does.
    """
    pool, inputs, speeds = Pool(table), features(table.genes, table.sizes), 1 / table.costs[by]
    tried: list[Tried] = []
    for row in rng.permutation(len(rewards))[:STARTUP]:
        pool.take(int(row))
    while len(pool.queried) < budget:
        for row in pool.queried[len(tried) :]:
            genes = tuple(table.genes[row].tolist())
            tried.append(Tried(genes=genes, value=float(rewards[row]), speed=float(speeds[row])))
        models = models_of(tried, table.sizes, 0.0)
        best = [pool.queried[at] for at in np.argsort(-rewards[pool.queried])[:KIN]]
        for turn in range(min(ROUND, budget - len(pool.queried))):
            rows = np.flatnonzero(pool.left)
            if is_local(turn, models, 0.0):
                apart = np.min([(table.genes[rows] != table.genes[row]).sum(1) for row in best], axis=0)
                rows = rows[np.argsort(apart, kind="stable")[:NEAREST]]
            pool.take(int(rows[best_of(inputs[rows], models, rng, 0.0, tilt_of(turn, rng, 0.0))]))
    return np.array(pool.queried)


def tpe(table: Table, rewards: np.ndarray, rng: np.random.Generator, budget: int) -> np.ndarray:
    """Optuna's estimator, multivariate."""
    import warnings

    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    pool = Pool(table)
    kinds = {
        f"x{at:02d}": optuna.distributions.CategoricalDistribution(tuple(range(size)))
        for at, size in enumerate(table.sizes)
    }
    sampler = optuna.samplers.TPESampler(multivariate=True, seed=int(rng.integers(2**31)))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    while len(pool.queried) < budget:
        trial = study.ask(kinds)  # pyright: ignore[reportArgumentType]
        row = pool.nearest(np.array([trial.params[name] for name in kinds]), rng)
        params = {name: int(option) for name, option in zip(kinds, table.genes[row], strict=True)}
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        study.add_trial(optuna.trial.create_trial(params=params, distributions=dict(kinds), value=float(rewards[row])))
    return np.array(pool.queried)
