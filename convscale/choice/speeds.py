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
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from convscale.arch.spec import NetSpec
from convscale.cache import code_digest, load, save
from convscale.choice.basis import Basis
from convscale.choice.facts import NetworkFacts, SizedSpec, Speed
from convscale.conditions import Conditions
from convscale.errors import UserError
from convscale.machine import available_cores

if TYPE_CHECKING:
    from convscale.predictor.predict import Prediction

Say = Callable[[str], None]
"""Told a line now and then while work goes on."""
MANY = 24
"""From this many untraced networks on, processes share the work: starting one takes as long as tracing a dozen."""


def spec_key(spec: NetSpec) -> str:
    """Equal for specs that build the same network."""
    value = {**spec.to_dict(), "name": "", "family": "", "lineage": None}
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _keys(networks: Sequence[SizedSpec], basis: Basis) -> list[str]:
    calibration = "" if basis.calibration is None else hashlib.sha256(Path(basis.calibration).read_bytes()).hexdigest()
    tail = json.dumps([basis.conditions.to_dict(), calibration, basis.predicted, code_digest()])
    specs = {id(spec): spec for spec, _ in networks}
    keys = {number: spec_key(spec) for number, spec in specs.items()}
    return [hashlib.sha256(f"{keys[id(spec)]} {size} {tail}".encode()).hexdigest() for spec, size in networks]


def facts_of(wanted: Iterable[SizedSpec], basis: Basis, say: Say = lambda text: None) -> dict[SizedSpec, NetworkFacts]:
    """Counts of every network at its size, and its speed where the basis is a predicted one.

    A network that can not be traced has ``failed`` set; it never ends the others.
    """
    networks = [SizedSpec(*item) for item in dict.fromkeys(wanted)]
    keys = dict(zip(networks, _keys(networks, basis), strict=True))
    facts = {item: NetworkFacts.from_row(row) for item, key in keys.items() if (row := load(key)) is not None}
    missing = [item for item in networks if item not in facts]
    if missing:
        say(f"{'predicting' if basis.predicted else 'counting'} {len(missing)} networks that were not met before")
        fresh = _in_processes(missing, basis, say) if len(missing) >= MANY else {}
        fresh |= {item: examine(item, basis) for item in missing if item not in fresh}
        for item, made in fresh.items():
            if not made.failed:
                save(keys[item], made.to_row())
        facts |= fresh
    return {item: facts[item] for item in networks}


def examine(network: SizedSpec, basis: Basis) -> NetworkFacts:
    """Trace one network and, on a predicted basis, predict it."""
    try:
        return _predicted_facts(network, basis) if basis.predicted else _counts(network, basis)
    except UserError as error:
        return NetworkFacts(failed=str(error))


def _counts(network: SizedSpec, basis: Basis) -> NetworkFacts:
    """As dispatched in eager mode; 8-bit forms are counted as the float network that they are made from."""
    from convscale.cost.counting import count

    c = basis.conditions
    precision = "fp32" if basis.int8 else c.precision
    cost = count(
        network.spec,
        image_size=network.image_size,
        batch_size=c.batch_size,
        mode=c.mode,
        precision=precision,
        layout=c.layout,
    )
    traffic = (cost.read_bytes + cost.written_bytes) // c.batch_size
    return NetworkFacts(params=cost.params, macs=cost.macs, traffic=traffic, memory_bytes=cost.peak_bytes)


def _predicted_facts(network: SizedSpec, basis: Basis) -> NetworkFacts:
    from convscale.predictor.predict import predict_workload
    from convscale.predictor.workload import load_workload

    c = dataclasses.replace(basis.conditions, image_size=network.image_size)
    work = load_workload(network.spec, c)
    p = predict_workload(work, c, basis.read_calibration())
    moved = sum((kernel.in_bytes + kernel.out_bytes + kernel.weight_bytes) * times for kernel, times in work.kernels)
    return NetworkFacts(
        params=_params(network.spec),
        macs=sum(kernel.macs * times for kernel, times in work.kernels) // c.batch_size,
        traffic=moved // c.batch_size,
        memory_bytes=work.peak_bytes,
        speed=Speed(
            images_per_s=p.images_per_s,
            low=p.low,
            high=p.high,
            kind="predicted",
            bound_by=p.bound_by,
            doubts=p.doubts,
        ),
    )


def _params(spec: NetSpec) -> int:
    """Parameters, from the cache where the spec was built before."""
    from convscale.networks.resolve import build_meta

    key = hashlib.sha256(f"params {spec_key(spec)} {code_digest()}".encode()).hexdigest()
    if (kept := load(key)) is None:
        kept = sum(p.numel() for p in build_meta(spec).parameters())
        save(key, kept)
    return kept


def predicted(network: SizedSpec, basis: Basis) -> Prediction:
    """The whole ``Prediction`` of a network on a basis."""
    from convscale.predictor.predict import predict_workload
    from convscale.predictor.workload import load_workload

    conditions = dataclasses.replace(basis.conditions, image_size=network.image_size)
    return predict_workload(load_workload(network.spec, conditions), conditions, basis.read_calibration())


def _in_processes(networks: Sequence[SizedSpec], basis: Basis, say: Say) -> dict[SizedSpec, NetworkFacts]:
    """Facts found by one process per core. What a process did not get to, because it died or could not start, is
    missing and left to the caller.

    Processes are started as commands of their own: forking a process that runs torch's threads can hang, and
    multiprocessing's other way runs the caller's script again.
    """
    workers = min(available_cores(), max(1, len(networks) // (MANY // 2)))
    shares = [networks[number::workers] for number in range(workers)]
    running = [(process, share) for share in shares if (process := _start_worker(share, basis)) is not None]
    facts: dict[SizedSpec, NetworkFacts] = {}
    for process, share in running:
        with process:
            try:
                assert process.stdout is not None
                for network, line in zip(share, process.stdout, strict=False):
                    facts[network] = NetworkFacts.from_row(json.loads(line))
            except json.JSONDecodeError:  # it died in the middle of a line
                pass
    if len(facts) < len(networks):
        say(f"{len(networks) - len(facts)} networks are left to this process")
    return facts


def _start_worker(share: Sequence[SizedSpec], basis: Basis) -> subprocess.Popen[str] | None:
    """A process that examines a share of the networks; None where none can be started."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    job = {
        "conditions": basis.conditions.to_dict(),
        "calibration": basis.calibration,
        "networks": [[spec.to_dict(), size] for spec, size in share],
    }
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "convscale.choice.speeds"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        )
    except OSError:
        return None
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(job))
        process.stdin.close()
    except BrokenPipeError:
        pass
    return process


def _work() -> None:
    """A worker: a job as JSON on standard input, one line of JSON a network on standard output."""
    job = json.load(sys.stdin)
    basis = Basis(conditions=Conditions(**job["conditions"]), calibration=job["calibration"])
    for spec, size in job["networks"]:
        print(json.dumps(examine(SizedSpec(NetSpec.from_dict(spec), size), basis).to_row()), flush=True)


if __name__ == "__main__":
    _work()
