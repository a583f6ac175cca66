"""What candidates cost and how fast they are predicted to be: from the cache, or traced by a few processes side by
side.

Nothing here imports torch unless something has to be traced, so an answer from the cache is quick.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from convscale.arch.spec import NetSpec
from convscale.cache import code_digest, load, save
from convscale.conditions import Conditions
from convscale.errors import UserError
from convscale.predictor.devices import devices

Say = Callable[[str], None]
"""Told a line now and then while work goes on."""
MANY = 24
"""From this many untraced networks on, processes share the work: starting one takes as long as tracing a dozen."""
_HERE = ("cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Under what conditions candidates are compared, and how their speed is found."""

    conditions: Conditions
    """Without an image size: that is a candidate's."""
    calibration: str | None = None
    """File that a prediction for the user's own device goes by."""
    tuned: bool = False
    """Measure each network as it would be shipped: in the fastest of all forms and runtimes; those of ``conditions``
    only stand in."""
    int8: bool = False
    """With ``tuned``: in 8 bits too."""

    @property
    def predicted(self) -> bool:
        """Whether speeds are predicted: for a named GPU, and wherever a calibration is given."""
        return self.calibration is not None or not at_hand(self.conditions.device)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """A speed, measured or predicted, and how far it may be off."""

    images_per_s: float
    low: float
    """Lower end: of the 80 % interval of a prediction, of the middle half of a measurement's calls."""
    high: float
    """Upper end."""
    kind: str
    """``measured`` or ``predicted``."""
    bound_by: str = ""
    """What binds a predicted network."""
    how: str = ""
    """Of a tuned network: the form, the runtime and its streams."""
    doubts: tuple[str, ...] = ()
    """Reasons to trust it less."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known of a network at a size."""

    params: int = 0
    """Parameters."""
    macs: int = 0
    """Multiply-accumulates per image, in the setting's mode."""
    traffic: int = 0
    """Bytes read and written per image."""
    memory_bytes: int = 0
    """Most bytes alive at once in a call at the setting's batch."""
    speed: Speed | None = None
    """None: not measured or predicted."""
    failed: str = ""
    """Why it could not be traced, built or timed."""
    estimate: float | None = None
    """A guess in images/s from counts and the measured networks: good for deciding what to measure, never reported as a
    speed."""


Unit = tuple[NetSpec, int]
"""A network and an image size: what a speed depends on beside the setting."""


def at_hand(device: str) -> bool:
    """Whether a device is this machine's own: ``cpu``, ``cuda`` or ``cuda:N``."""
    return device.partition(":")[0] in _HERE


def spec_key(spec: NetSpec) -> str:
    """Equal for specs that build the same network."""
    value = {**spec.to_dict(), "name": "", "family": "", "lineage": None}
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _keys(units: Sequence[Unit], setting: Setting) -> list[str]:
    calibration = (
        "" if setting.calibration is None else hashlib.sha256(Path(setting.calibration).read_bytes()).hexdigest()
    )
    tail = json.dumps([setting.conditions.to_dict(), calibration, setting.predicted, code_digest()])
    specs = {id(spec): spec for spec, _ in units}
    keys = {number: spec_key(spec) for number, spec in specs.items()}
    return [hashlib.sha256(f"{keys[id(spec)]} {size} {tail}".encode()).hexdigest() for spec, size in units]


def known(units: Iterable[Unit], setting: Setting, say: Say = lambda text: None) -> dict[Unit, Known]:
    """Counts of every unit, and its speed where the setting is a predicted one.

    A network that can not be traced has ``failed`` set; it never ends the others.
    """
    wanted = list(dict.fromkeys(units))
    keys = _keys(wanted, setting)
    rows = {unit: row for unit, key in zip(wanted, keys, strict=True) if (row := load(key)) is not None}
    missing = [unit for unit in wanted if unit not in rows]
    if missing:
        say(f"{'predicting' if setting.predicted else 'counting'} {len(missing)} networks that were not met before")
        found = _in_processes(missing, setting, say) if len(missing) >= MANY else {}
        found |= {unit: examine(*unit, setting) for unit in missing if unit not in found}
        for unit, key in zip(wanted, keys, strict=True):
            if unit in found and not found[unit].get("failed"):
                save(key, found[unit])
        rows |= found
    return {unit: _known(rows[unit]) for unit in wanted}


def examine(spec: NetSpec, image_size: int, setting: Setting) -> dict[str, Any]:
    """Trace one network and, in a predicted setting, predict it: a ``Known`` as JSON values."""
    try:
        return _predict_row(spec, image_size, setting) if setting.predicted else _count_row(spec, image_size, setting)
    except UserError as error:
        return {"failed": str(error)}


def _count_row(spec: NetSpec, image_size: int, setting: Setting) -> dict[str, Any]:
    from convscale.cost.counting import count

    c = setting.conditions
    precision = c.precision if c.precision != "int8" else "fp32"
    cost = count(
        spec, image_size=image_size, batch_size=c.batch_size, mode=c.mode, precision=precision, layout=c.layout
    )
    traffic = (cost.read_bytes + cost.written_bytes) // c.batch_size
    return {"params": cost.params, "macs": cost.macs, "traffic": traffic, "memory_bytes": cost.peak_bytes}


def _predict_row(spec: NetSpec, image_size: int, setting: Setting) -> dict[str, Any]:
    from convscale.predictor.predict import predict_workload
    from convscale.predictor.workload import load_workload

    c = dataclasses.replace(setting.conditions, image_size=image_size)
    work = load_workload(spec, c)
    p = predict_workload(work, c, _calibration(setting.calibration))
    speed = {
        "images_per_s": p.images_per_s,
        "low": p.low,
        "high": p.high,
        "kind": "predicted",
        "bound_by": p.bound_by,
        "doubts": list(p.doubts),
    }
    kernels = [(kernel, times) for kernel, times in work.kernels]
    return {
        "params": _params(spec),
        "macs": sum(kernel.macs * times for kernel, times in kernels) // c.batch_size,
        "traffic": sum((kernel.in_bytes + kernel.out_bytes + kernel.weight_bytes) * times for kernel, times in kernels)
        // c.batch_size,
        "memory_bytes": work.peak_bytes,
        "speed": speed,
    }


def _params(spec: NetSpec) -> int:
    """Parameters, from the cache where the spec was built before."""
    from convscale.networks.resolve import build_meta

    key = hashlib.sha256(f"params {spec_key(spec)} {code_digest()}".encode()).hexdigest()
    if (kept := load(key)) is None:
        kept = sum(p.numel() for p in build_meta(spec).parameters())
        save(key, kept)
    return kept


def _calibration(path: str | None) -> Any:
    """The calibration in a file, read again once the file has changed."""
    if path is None:
        return None
    return _calibration_of(path, os.stat(path).st_mtime_ns)


@cache
def _calibration_of(path: str, _changed: int) -> Any:
    from convscale.predictor.calibration import load_calibration

    return load_calibration(path)


def predicted(spec: NetSpec, image_size: int, setting: Setting) -> Any:
    """The ``Prediction`` for a setting."""
    from convscale.predictor.predict import predict

    c = setting.conditions
    return predict(
        spec,
        device=c.device,
        mode=c.mode,
        precision=c.precision,
        image_size=image_size,
        batch_size=c.batch_size,
        compiled=c.runtime == "compiled",
        layout=c.layout,
        calibration=_calibration(setting.calibration),
    )


def _known(row: Mapping[str, Any]) -> Known:
    speed = row.get("speed")
    return Known(**{**row, "speed": Speed(**{**speed, "doubts": tuple(speed["doubts"])}) if speed else None})


def _in_processes(units: Sequence[Unit], setting: Setting, say: Say) -> dict[Unit, dict[str, Any]]:
    """Rows found by one process per core. What a process did not get to, because it died or could not start, is missing
    and left to the caller.

    Processes are started as commands of their own: forking a process that runs torch's threads can hang, and
    multiprocessing's other way runs the caller's script again.
    """
    from convscale.machine import available_cores

    workers = min(available_cores(), max(1, len(units) // (MANY // 2)))
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    shares = [units[number::workers] for number in range(workers)]
    running = []
    for share in shares:
        job = {
            "conditions": setting.conditions.to_dict(),
            "calibration": setting.calibration,
            "units": [[spec.to_dict(), size] for spec, size in share],
        }
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "convscale.choice.speeds"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
            )
        except OSError:
            continue
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(job))
            process.stdin.close()
        except BrokenPipeError:
            pass
        running.append((process, share))
    found: dict[Unit, dict[str, Any]] = {}
    for process, share in running:
        with process:
            try:
                assert process.stdout is not None
                for unit, line in zip(share, process.stdout, strict=False):
                    found[unit] = json.loads(line)
            except json.JSONDecodeError:  # it died in the middle of a line
                pass
    if len(found) < len(units):
        say(f"{len(units) - len(found)} networks are left to this process")
    return found


def as_json(speed: Speed | None) -> dict[str, Any] | None:
    """As plain JSON values."""
    return None if speed is None else dataclasses.asdict(speed)


def check_device(device: str) -> str:
    """The device's own name.

    Raises:
        UserError: it is neither this machine's nor a known GPU; the nearest names are given.
    """
    if not isinstance(device, str):
        raise UserError(f"device is {device!r}; it must be text such as 'cpu' or 'rtx-4090'")
    if at_hand(device):
        return device
    from convscale.predictor.devices import get_device

    return get_device(device).name


def device_title(device: str) -> str:
    """The maker's name of a named GPU, else the name given."""
    return devices()[device].title if device in devices() else device


def _work() -> None:
    """A worker: a job as JSON on standard input, one line of JSON a unit on standard output."""
    job = json.load(sys.stdin)
    setting = Setting(conditions=Conditions(**job["conditions"]), calibration=job["calibration"])
    for spec, size in job["units"]:
        print(json.dumps(examine(NetSpec.from_dict(spec), size, setting)), flush=True)


if __name__ == "__main__":
    _work()
