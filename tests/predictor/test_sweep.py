"""A sweep of lone layers: it tells all kinds of kernels apart, and sets the predictor to a device made up by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch import nn

from convscale.conditions import Conditions
from convscale.cost.kernels import MATRIX
from convscale.errors import UserError
from convscale.predictor.calibrate import Observation, calibrate
from convscale.predictor.calibration import load_calibration, save_calibration
from convscale.predictor.devices import get_device
from convscale.predictor.latency import basis_of
from convscale.predictor.loading import workload_for
from convscale.predictor.roofline import net_s, table_of
from convscale.predictor.sweep import Probe, measure_sweep, probes, sheet_here

CONDITIONS = Conditions(device="a10", precision="amp", batch_size=128)


def test_a_sweep_has_every_kind_of_product() -> None:
    asked = {}
    for probe in probes():
        conditions = Conditions(device="a10", precision="amp", batch_size=128, image_size=probe.side)
        for kernel, _ in workload_for(probe.module(), conditions).kernels:
            asked.setdefault(kernel.kind, probe.name)
    assert set(MATRIX) <= set(asked)
    assert {"batch_norm", "group_norm", "layer_norm", "pointwise", "pool", "reduce", "cast"} <= set(asked)
    assert 80 <= len(probes()) <= 130


def test_a_made_up_card_is_found_again() -> None:
    """An A10 whose bandwidth is 0.7 of what is assumed: layers that move maps say so, networks then come out slower."""
    basis = basis_of(Conditions(device="a10", precision="amp", batch_size=128, image_size=56))
    truth = {**basis.coefficients, "bandwidth": 0.7 * basis.coefficients["bandwidth"], "sheet": 1e-6}
    observed = []
    for probe in probes()[::3]:
        conditions = Conditions(device="a10", precision="amp", batch_size=128, image_size=probe.side)
        net = probe.module()
        seconds = float(net_s(table_of([workload_for(net, conditions).kernels]), get_device("a10"), truth)[0])
        observed.append(Observation(net=net, conditions=conditions, images_per_s=128 / seconds))
    made = calibrate(observed)
    moved = Probe(name="SiLU", channels=256, side=56, make=nn.SiLU, repeats=1).module()
    table = table_of([workload_for(moved, Conditions(device="a10", precision="amp", image_size=56)).kernels])
    before, after, true = (
        net_s(table, get_device("a10"), c)[0] for c in (basis.coefficients, made.coefficients, truth)
    )
    assert abs(np.log(after / true)) < 0.3 * abs(np.log(before / true))


def test_a_sweep_of_this_machine(tmp_path: Path) -> None:
    conditions = Conditions(device="cpu", threads=1)
    some = [probe for probe in probes() if probe.side == 7][:4]
    found = measure_sweep(conditions, layers=some, seconds=0.01)
    assert [item.conditions.image_size for item in found] == [7] * 4
    assert all(item.images_per_s > 0 and item.conditions.device == "cpu" for item in found)
    save_calibration(calibrate(found), tmp_path / "cpu.json")
    assert load_calibration(tmp_path / "cpu.json").count == 4


def test_what_a_sweep_can_not_do() -> None:
    with pytest.raises(UserError, match="got mode 'train'"):
        measure_sweep(Conditions(device="cpu", mode="train"))
    with pytest.raises(UserError, match="torch sees no CUDA GPU"):
        sheet_here("cuda")
