"""How far a prediction may be off: the interval's width from where a network's time goes, and what is not known of a
card.

The log error of a network's time is about the sum over groups of kernels of (their share of the time) x (the group's
error), so its variance is ``base ** 2 + sum (share * sigma) ** 2``. The sigmas are fitted to errors on families left
out of the fit. A card that no table holds adds the errors of its peak, bandwidth and launch time, each by the share of
the time that follows it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from convscale.cost.kernels import FUSED, NORMS
from convscale.predictor.devices import Device
from convscale.predictor.roofline import KINDS, RATES, Table, is_huge, is_ragged, kernel_s, net_s

GROUPS: dict[str, tuple[str, ...]] = {
    "dense": ("conv", "conv_1x1", "linear"),
    "grouped": ("grouped", "grouped_pow2", "grouped_packed"),
    "depthwise": ("depthwise", "depthwise_native"),
    "norm": NORMS,
    "maps": ("pointwise", "pointwise_mixed", "reduce", "softmax", "pool", "copy", "cast", "update"),
    "fused": FUSED,
}
"""Groups of kernels whose errors go together."""
MARKS = ("ragged", "wide", "huge")
"""What is known to be off beside its group: channels that are no multiple of 8, depthwise kernels beyond 5 x 5, maps
over 2 ** 31 elements."""
NEW_SIGMA = {"peak": 0.2, "bandwidth": 0.135, "overhead_us": 0.3}
"""Log error expected of a data sheet's rates on a card that no table holds, machine and host among it. Bandwidth by the
three cards of the tables, each left out (``benchmarks.predictor``): in eager mode two come out 4 to 10 % too slow, one
13 % too fast. Peak and launch time are a judgement."""
OWN_SIGMA = {"peak": 0.1, "bandwidth": 0.05, "overhead_us": 0.3}
"""The same for the user's own card of a kind that the tables hold: cooling, power limit, host, versions."""
CPU_SIGMA = {"peak": 0.45, "bandwidth": 0.3, "overhead_us": 0.9}
"""The same for a processor that no table holds, by the two of the tables: what they reach of their sheets differs by
1.7, 1.4 and 2.9 times."""
ANY_CPU_SIGMA = {"peak": 0.7, "bandwidth": 0.7, "overhead_us": 0.9}
"""The same for ``cpu``, which may be any processor with any number of its cores: a judgement."""
FOLDS = 8
"""Groups of families that are left out in turn."""
LIMITED = 0.15
"""Further log error of the peak where a power limit is assumed to lower it."""


def groups_of(table: Table, total: np.ndarray) -> dict[str, np.ndarray]:
    """Share of each network's time by group and mark; ``total`` is the seconds of each row's kernel, once."""
    spent = total * table.count
    whole = np.maximum(np.bincount(table.net, weights=spent, minlength=table.nets), 1e-12)
    masks = {name: np.isin(table.kind, [KINDS.index(kind) for kind in kinds]) for name, kinds in GROUPS.items()}
    masks["ragged"] = is_ragged(table)
    masks["wide"] = table.is_depthwise & (table.values["window"] > 25)
    masks["huge"] = is_huge(table)
    return {
        name: np.bincount(table.net, weights=spent * mask, minlength=table.nets) / whole for name, mask in masks.items()
    }


def sigma_of(groups: Mapping[str, np.ndarray], sigmas: Mapping[str, float]) -> np.ndarray:
    """Standard log error of each network's time by the shares ``groups_of`` gave."""
    return np.sqrt(sigmas["base"] ** 2 + sum((sigmas[name] * share) ** 2 for name, share in groups.items()))


def folds_of(families: Sequence[str], count: int) -> list[set[str]]:
    """Families (one entry a row) in at most ``count`` groups of about as many rows."""
    folds: list[set[str]] = [set() for _ in range(count)]
    sizes = [0] * count
    for family, rows in sorted(Counter(families).items(), key=lambda item: (-item[1], item[0])):
        smallest = sizes.index(min(sizes))
        folds[smallest].add(family)
        sizes[smallest] += rows
    return [fold for fold in folds if fold]


def fit_sigmas(groups: Mapping[str, np.ndarray], errors: np.ndarray, families: Sequence[str]) -> dict[str, float]:
    """Sigmas by maximum likelihood from errors on families left out, with ``factor``: half an 80 % interval's width
    over sigma.

    Every family weighs the same, since what is asked for next is a network of a family of its own; and the factor is
    taken from errors over sigmas that were fitted on other families (in ``FOLDS`` groups). Sigmas judged by the errors
    they were fitted to would look too sure.

    Args:
        groups: share of each network's time by group, as ``groups_of`` gives them; each (N,).
        errors: (N,), log errors of coefficients that were not fitted on the network's family.
        families: each network's family.
    """
    names, inverse, counts = np.unique(families, return_inverse=True, return_counts=True)
    weights = len(errors) / len(names) / counts[inverse]
    ratios = np.empty(len(errors))
    for fold in folds_of(list(families), FOLDS):
        out = np.isin(families, list(fold))
        kept = {name: share[~out] for name, share in groups.items()}
        sigmas = _likeliest(kept, errors[~out], weights[~out]) if not out.all() else _likeliest(groups, errors, weights)
        ratios[out] = np.abs(errors[out]) / sigma_of({name: share[out] for name, share in groups.items()}, sigmas)
    factor = np.quantile(ratios, 0.8, weights=weights, method="inverted_cdf")
    return {**_likeliest(groups, errors, weights), "factor": float(factor)}


def _likeliest(groups: Mapping[str, np.ndarray], errors: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """Sigmas of greatest likelihood.

    Errors beyond 0.5 count as 0.5, so that one network of a kind of its own does not widen all intervals; a weak prior
    keeps unused sigmas at 0.1.
    """
    from scipy.optimize import minimize

    names = ["base", *groups]
    shares = np.stack([np.ones(len(errors)), *groups.values()], axis=1) ** 2
    squares = np.minimum(np.abs(errors), 0.5) ** 2

    def loss(x: np.ndarray) -> float:
        variance = shares @ np.exp(2 * x)
        return float(0.5 * np.sum(weights * (np.log(variance) + squares / variance)) + np.sum((x - np.log(0.1)) ** 2))

    start = np.full(len(names), np.log(0.05))
    solution = minimize(loss, start, method="L-BFGS-B", bounds=[(np.log(0.01), 0.0)] * len(names))
    return dict(zip(names, np.exp(solution.x).tolist(), strict=True))


def rate_sigmas(device: Device, known: bool, further: float = 0.0) -> dict[str, float]:
    """Log errors expected of a card's rates before anything was measured on it.

    Args:
        device: its data sheet.
        known: whether the tables hold this card.
        further: log error that each has beside, where a runtime that no table speaks of runs there.
    """
    cpu = ANY_CPU_SIGMA if device.name == "cpu" else CPU_SIGMA
    sigmas = dict(cpu if device.kind == "cpu" else OWN_SIGMA if known else NEW_SIGMA)
    if device.sustained < 1:
        sigmas["peak"] = float(np.hypot(sigmas["peak"], LIMITED))
    return {name: math.hypot(sigma, further) for name, sigma in sigmas.items()}


def rate_shares(table: Table, device: Device, coefficients: Mapping[str, float]) -> np.ndarray:
    """By how much each network's log time follows the logs of ``RATES``: one row a network."""
    here, step = np.log(net_s(table, device, coefficients)), 0.01
    moved = [np.log(net_s(table, device, {**coefficients, name: coefficients[name] * np.exp(step)})) for name in RATES]
    return np.stack([(there - here) / step for there in moved], axis=1)


def network_sigma(
    table: Table, device: Device, coefficients: Mapping[str, float], sigmas: Mapping[str, float]
) -> np.ndarray:
    """Standard log error of each network's time on a card that is known."""
    return sigma_of(groups_of(table, kernel_s(table, device, coefficients).total_s), sigmas)


def rate_covariance(prior: Mapping[str, float], shares: np.ndarray, noise: np.ndarray) -> list[list[float]]:
    """Covariance of the card's log errors once networks with ``shares`` were measured, each with its own error
    ``noise``.
    """
    precision = np.diag([1 / prior[name] ** 2 for name in RATES]) + (shares / noise[:, None] ** 2).T @ shares
    return np.linalg.inv(precision).tolist()


def rate_sigma(shares: Sequence[float] | np.ndarray, covariance: Sequence[Sequence[float]] | np.ndarray) -> float:
    """Standard log error that what is not known of a card adds to one network."""
    row = np.asarray(shares)
    return float(np.sqrt(max(row @ np.asarray(covariance) @ row, 0.0)))
