"""Fitting the roofline's coefficients to measured times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from convscale.predictor.devices import Device
from convscale.predictor.roofline import PRIOR, Table, kernel_s

NOISE = 0.05
"""Log error beyond which a row's pull grows linearly: tables of others have outliers."""


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


class _Compact:
    """A part with equal kernels of all its networks evaluated once: networks share most of theirs, and a fit evaluates
    them thousands of times.
    """

    def __init__(self, part: Part) -> None:
        from scipy.sparse import csr_matrix

        table = part.table
        columns = np.stack([table.kind, table.phase, *table.values.values()], axis=1)
        _, first, inverse = np.unique(columns, axis=0, return_index=True, return_inverse=True)
        self.unique = Table(
            net=np.zeros(len(first), dtype=np.int64),
            count=np.ones(len(first)),
            kind=table.kind[first],
            phase=table.phase[first],
            values={name: column[first] for name, column in table.values.items()},
        )
        self.launches = csr_matrix((table.count, (table.net, inverse.reshape(-1))), shape=(table.nets, len(first)))
        self.part = part

    def net_s(self, coefficients: Mapping[str, float]) -> np.ndarray:
        """Seconds of a call of each network."""
        return self.launches @ kernel_s(self.unique, self.part.device, coefficients).total_s


def _errors(parts: Sequence[_Compact], coefficients: Mapping[str, float]) -> np.ndarray:
    return np.concatenate([c.part.weight * np.log(c.net_s(coefficients) / c.part.latency_s) for c in parts])


def fit(
    parts: Sequence[Part],
    *,
    start: Mapping[str, float] | None = None,
    free: Sequence[str] | None = None,
    ridge: float | Mapping[str, float] = 0.3,
    steps: int = 20,
    robust: bool = True,
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
    """
    from scipy.optimize import least_squares

    begin = {**PRIOR, **(start or {})}
    names = list(PRIOR if free is None else free)
    x0 = np.log([begin[name] for name in names])

    def unpack(x: np.ndarray) -> dict[str, float]:
        return {**begin, **dict(zip(names, np.exp(x).tolist(), strict=True))}

    compact = [_Compact(part) for part in parts]
    pulls = np.array([ridge[name] if isinstance(ridge, Mapping) else ridge for name in names])

    def residuals(x: np.ndarray) -> np.ndarray:
        return np.concatenate([_errors(compact, unpack(x)), pulls * (x - x0)]) / NOISE

    def jacobian(x: np.ndarray) -> np.ndarray:
        here, step = residuals(x), 1e-4
        columns = []
        for index in range(len(x)):
            if idle is not None and idle[index]:
                columns.append(pull[index])
                continue
            moved = x.copy()
            moved[index] += step
            columns.append((residuals(moved) - here) / step)
        return np.stack(columns, axis=1)

    # a coefficient that no kernel of these tables uses need not be tried again: only the pull on it remains
    pull = np.zeros((len(names), len(residuals(x0))))
    pull[np.arange(len(names)), pull.shape[1] - len(names) + np.arange(len(names))] = pulls / NOISE
    idle: list[bool] | None = None
    idle = [bool(np.allclose(column, pull[index])) for index, column in enumerate(jacobian(x0).T)]
    loss, bounds = "soft_l1" if robust else "linear", (x0 - 4, x0 + 4)
    # From a dictionary, since scipy's stubs take ``jac`` for the name of a method only.
    options = {"jac": jacobian, "loss": loss, "max_nfev": steps, "bounds": bounds}
    solution = least_squares(residuals, x0, **options)
    return unpack(solution.x)
