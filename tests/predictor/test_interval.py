"""Interval widths: sigmas found again from errors made with them, a card's doubt by hand."""

from __future__ import annotations

import numpy as np
import pytest

from convscale.cost.kernels import Kernel
from convscale.predictor.devices import get_device
from convscale.predictor.interval import (
    GROUPS,
    MARKS,
    RATES,
    fit_sigmas,
    folds_of,
    groups_of,
    rate_covariance,
    rate_shares,
    rate_sigma,
    rate_sigmas,
    sigma_of,
)
from convscale.predictor.roofline import PRIOR, kernel_s, table_of


def test_shares_by_group_add_up_to_the_whole() -> None:
    kernels = [
        (Kernel("conv", macs=10**11, in_bytes=10**8, out_bytes=10**8, rows=10**6, width=76, depth=684, channels=76), 2),
        (
            Kernel(
                "depthwise",
                macs=10**9,
                in_bytes=10**8,
                out_bytes=10**8,
                rows=10**6,
                width=1,
                depth=49,
                channels=1,
                groups=64,
                window=49,
            ),
            1,
        ),
        (Kernel("pointwise", in_bytes=10**9, out_bytes=10**9), 3),
    ]
    table = table_of([kernels])
    total = kernel_s(table, get_device("rtx-3090"), PRIOR)[0]
    shares = {name: float(values[0]) for name, values in groups_of(table, total).items()}
    assert sum(shares[name] for name in GROUPS) == pytest.approx(1)
    assert shares["dense"] == pytest.approx(2 * total[0] / (total * table.count).sum())
    assert (shares["ragged"], shares["wide"], shares["huge"]) == (shares["dense"], shares["depthwise"], 0)


def test_sigmas_are_found_again() -> None:
    rng = np.random.default_rng(0)
    count = 4000
    groups = {name: np.zeros(count) for name in (*GROUPS, *MARKS)}
    groups["dense"] = rng.uniform(0, 1, count)
    groups["maps"] = 1 - groups["dense"]
    truth = dict.fromkeys(groups, 0.1) | {"base": 0.02, "dense": 0.05, "maps": 0.2}
    errors = rng.normal(size=count) * sigma_of(groups, truth)
    found = fit_sigmas(groups, errors, [str(number % 40) for number in range(count)])
    assert found["dense"] == pytest.approx(0.05, rel=0.15)
    assert found["maps"] == pytest.approx(0.2, rel=0.1)
    assert found["factor"] == pytest.approx(1.2816, rel=0.05)  # the normal distribution's 90th percentile
    assert np.mean(np.abs(errors) < found["factor"] * sigma_of(groups, found)) == pytest.approx(0.8, abs=0.01)


def test_intervals_hold_in_families_that_no_fit_saw() -> None:
    """Families with an error of their own, one of them as large as all others together: new families are inside 80 % of
    the time.
    """
    rng = np.random.default_rng(0)

    def families(count: int, large: int) -> tuple[dict[str, np.ndarray], np.ndarray, list[str]]:
        sizes = [large] + [4] * (count - 1)
        names = [str(number) for number, size in enumerate(sizes) for _ in range(size)]
        own = np.array([0.02 if number == 0 else rng.normal(scale=0.1) for number in range(count)])
        groups = {name: np.zeros(len(names)) for name in (*GROUPS, *MARKS)} | {"dense": np.ones(len(names))}
        return groups, own[[int(name) for name in names]] + rng.normal(scale=0.02, size=len(names)), names

    groups, errors, names = families(600, 2400)
    sigmas = fit_sigmas(groups, errors, names)
    new, far, _ = families(2000, 4)
    assert np.mean(np.abs(far) <= sigmas["factor"] * sigma_of(new, sigmas)) == pytest.approx(0.8, abs=0.04)
    assert np.mean(np.abs(errors) <= sigmas["factor"] * sigma_of(groups, sigmas)) == pytest.approx(
        0.9, abs=0.02
    )  # all of the large family


def test_folds_keep_families_whole_and_even() -> None:
    assert folds_of(["a"] * 6 + ["b"] * 3 + ["c"] * 2 + ["d"], 2) == [{"a"}, {"b", "c", "d"}]
    assert folds_of(["a", "b"], 8) == [{"a"}, {"b"}]


def test_what_binds_a_network_says_which_rate_it_follows() -> None:
    compute = Kernel("conv", macs=10**13, in_bytes=1, out_bytes=1, rows=10**6, width=512, depth=4608, channels=512)
    memory = Kernel("pointwise", in_bytes=10**10, out_bytes=10**10)
    launches = Kernel("pointwise", in_bytes=1, out_bytes=1)
    idle = {**PRIOR, "work.pointwise": 1e-6}
    shares = rate_shares(table_of([[(compute, 1)], [(memory, 1)], [(launches, 1)]]), get_device("rtx-3090"), idle)
    assert shares == pytest.approx(
        -np.diag([1.0, 1.0, -1.0]), abs=0.02
    )  # twice the peak halves the time, twice the launch time doubles it


def test_one_measurement_removes_the_doubt_it_speaks_of() -> None:
    prior = {"peak": 0.2, "bandwidth": 0.1, "overhead_us": 0.3}
    before = np.diag([prior[name] ** 2 for name in RATES])
    after = rate_covariance(prior, np.array([[-1.0, 0.0, 0.0]]), np.array([0.05]))
    assert rate_sigma([-1.0, 0.0, 0.0], before) == pytest.approx(0.2)
    assert rate_sigma([-1.0, 0.0, 0.0], after) == pytest.approx(1 / np.hypot(1 / 0.2, 1 / 0.05))
    assert rate_sigma([0.0, -1.0, 0.0], after) == pytest.approx(0.1)


def test_assumed_power_limits_and_new_cards_are_less_sure() -> None:
    known, new, limited = (
        rate_sigmas(get_device("rtx-4090"), True),
        rate_sigmas(get_device("rtx-5090"), False),
        rate_sigmas(get_device("t4"), False),
    )
    assert known["peak"] < new["peak"] < limited["peak"]
    assert rate_sigmas(get_device("cpu"), True)["peak"] > limited["peak"]
