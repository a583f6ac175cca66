"""What candidates cost and how fast they are predicted to be: from the cache, or traced by a few processes side by
side.

Nothing here imports torch unless something has to be traced, so an answer from the cache is quick.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from convscale.arch.spec import NetSpec
from convscale.cache import code_digest, load, save
from convscale.choice.basis import Basis
from convscale.choice.facts import NetworkFacts, SizedSpec, Speed
from convscale.conditions import Conditions
from convscale.errors import UserError
from convscale.machine import available_cores, start_python
from convscale.networks.foreign import Foreign, build_foreign, is_reparameterizable, timm_is_installed
from convscale.networks.released import fused_architectures
from convscale.networks.resolve import Named
from convscale.predictor.doubts import compiler_doubt
from convscale.predictor.predict import Prediction, predict_table, predict_workload, with_doubt
from convscale.predictor.traced import Store, entry_key, file_of, store
from convscale.predictor.workload import Workload

Say = Callable[[str], None]
"""Told a line now and then while work goes on."""
MANY = 24
"""From this many untraced networks on, processes share the work: starting one takes as long as tracing a dozen."""


def _keys(networks: Sequence[SizedSpec], basis: Basis) -> dict[SizedSpec, str]:
    """The key of each network's facts in the cache; none for those whose code may change unseen."""
    calibration = basis.calibration_digest or ""
    tail = json.dumps([basis.conditions.to_dict(), calibration, basis.predicted, code_digest()])
    found = {}
    for network in networks:
        entry = entry_key(*network)
        if entry is not None:
            timm = version("timm") if entry.startswith("timm") and timm_is_installed() else ""
            found[network] = hashlib.sha256(f"{entry} {timm} {tail}".encode()).hexdigest()
    return found


def facts_of(wanted: Iterable[SizedSpec], basis: Basis, say: Say = lambda text: None) -> dict[SizedSpec, NetworkFacts]:
    """Counts of every network at its size, and its speed where the basis is a predicted one.

    What was traced beforehand is taken from the package, what was met before from the cache, and the rest is traced. A
    network that can not be traced has ``failed`` set; it never ends the others.
    """
    networks = [SizedSpec(*item) for item in dict.fromkeys(wanted)]
    facts = traced_before(networks, basis)
    left = [item for item in networks if item not in facts]
    keys = _keys(left, basis)
    facts |= {item: NetworkFacts.from_row(row) for item, key in keys.items() if (row := load(key)) is not None}
    missing = [item for item in left if item not in facts]
    if missing:
        say(f"{'predicting' if basis.predicted else 'counting'} {len(missing)} networks that were not met before")
        shared = [item for item in missing if isinstance(item.spec, NetSpec) or item.spec.travels]
        fresh = _in_processes(shared, basis, say) if len(shared) >= MANY else {}
        fresh |= {item: examine(item, basis) for item in missing if item not in fresh}
        for item, made in fresh.items():
            if not made.failed and item in keys:
                save(keys[item], made.to_row())
        facts |= fresh
    return {item: facts[item] for item in networks}


def traced_before(networks: Sequence[SizedSpec], basis: Basis) -> dict[SizedSpec, NetworkFacts]:
    """The facts of networks whose workloads travel with the package; those that it does not have are left out."""
    c = dataclasses.replace(basis.conditions, precision=_counted_precision(basis))
    name = file_of(c)
    if name is None or basis.predicted == (name == "counts") or (held := store(name)) is None:
        return {}
    places = {item: at for item in networks if (at := held.find(*item, c.batch_size)) is not None}
    if not basis.predicted:
        return {item: _stored_counts(item, held, at, basis) for item, at in places.items()}
    found = {item: NetworkFacts(failed=held.failed(at)) for item, at in places.items() if held.failed(at)}
    good = {item: at for item, at in places.items() if item not in found}
    table = held.table(list(good.values()), c.batch_size)
    works = [held.about(at, c.batch_size) for at in good.values()]
    conditions = [dataclasses.replace(basis.conditions, image_size=size) for _, size in good]
    predictions = predict_table(table, works, conditions, basis.read_calibration())
    if c.runtime == "compiled" and basis.calibration is None:
        predictions = _beside_eager(predictions, list(good), conditions)
    v, nets = table.values, len(works)
    macs = np.bincount(table.net, weights=v["macs"] * table.count, minlength=nets)
    moved = (v["in_bytes"] + v["out_bytes"] + v["weight_bytes"]) * table.count
    traffic = np.bincount(table.net, weights=moved, minlength=nets)
    for i, (item, work, prediction) in enumerate(zip(good, works, predictions, strict=True)):
        found[item] = NetworkFacts(
            params=work.params,
            macs=int(macs[i]) // c.batch_size,
            traffic=int(traffic[i]) // c.batch_size,
            memory_bytes=work.peak_bytes,
            speed=_speed(prediction),
            fused=is_fused(item, basis),
        )
    return found


def _beside_eager(
    predictions: Sequence[Prediction], networks: Sequence[SizedSpec], conditions: Sequence[Conditions]
) -> list[Prediction]:
    """Predictions behind the compiler, with a doubt where eager PyTorch is predicted to be faster; a network whose
    eager workload does not travel with the package has none.
    """
    batch_size = conditions[0].batch_size if conditions else 1
    made = list(predictions)
    if (held := store("eager")) is None:
        return made
    places = {i: held.find(*network, batch_size) for i, network in enumerate(networks)}
    found = {i: at for i, at in places.items() if at is not None and not held.failed(at)}
    if not found:
        return made
    eager = predict_table(
        held.table(list(found.values()), batch_size),
        [held.about(at, batch_size) for at in found.values()],
        [dataclasses.replace(conditions[i], runtime="eager") for i in found],
    )
    for i, plain in zip(found, eager, strict=True):
        made[i] = with_doubt(made[i], compiler_doubt(made[i].images_per_s, plain.images_per_s))
    return made


def _stored_counts(network: SizedSpec, held: Store, at: int, basis: Basis) -> NetworkFacts:
    if held.failed(at):
        return NetworkFacts(failed=held.failed(at))
    batch = basis.conditions.batch_size
    return NetworkFacts(
        params=held.about(at, batch).params,
        macs=held.line("macs", at, batch) // batch,
        traffic=held.line("traffic", at, batch) // batch,
        memory_bytes=held.peak_bytes(at, batch),
        fused=is_fused(network, basis),
    )


def is_fused(network: SizedSpec, basis: Basis) -> bool:
    """Whether a network is examined in its re-parameterised form: timm's that has one, for inference."""
    spec = network.spec
    if isinstance(spec, NetSpec) or spec.origin != "timm" or basis.conditions.mode != "infer":
        return False
    known = fused_architectures()
    if known.get(spec.arch) is None:
        return is_reparameterizable(build_foreign(spec, meta=True))
    return known[spec.arch]


def examine(network: SizedSpec, basis: Basis) -> NetworkFacts:
    """Trace one network and, on a predicted basis, predict it."""
    try:
        facts = _predicted_facts(network, basis) if basis.predicted else _counts(network, basis)
        return dataclasses.replace(facts, fused=is_fused(network, basis))
    except UserError as error:
        return NetworkFacts(failed=str(error))


def _counted_precision(basis: Basis) -> str:
    """Forms in less are counted as the float network that they are made from."""
    return "fp32" if basis.int8 or basis.tuned else basis.conditions.precision


def _counts(network: SizedSpec, basis: Basis) -> NetworkFacts:
    """As dispatched in eager mode."""
    from convscale.cost.counting import count

    c = basis.conditions
    cost = count(
        network.spec,
        image_size=network.image_size,
        batch_size=c.batch_size,
        mode=c.mode,
        precision=_counted_precision(basis),
        layout=c.layout,
    )
    traffic = (cost.read_bytes + cost.written_bytes) // c.batch_size
    return NetworkFacts(params=cost.params, macs=cost.macs, traffic=traffic, memory_bytes=cost.peak_bytes)


def _predicted_facts(network: SizedSpec, basis: Basis) -> NetworkFacts:
    from convscale.predictor.loading import workload_for

    c = dataclasses.replace(basis.conditions, image_size=network.image_size)
    work = workload_for(network.spec, c)
    moved = sum((kernel.in_bytes + kernel.out_bytes + kernel.weight_bytes) * times for kernel, times in work.kernels)
    return NetworkFacts(
        params=work.params,
        macs=sum(kernel.macs * times for kernel, times in work.kernels) // c.batch_size,
        traffic=moved // c.batch_size,
        memory_bytes=work.peak_bytes,
        speed=_speed(_doubted(predict_workload(work, c, basis.read_calibration()), network, basis)),
    )


def _speed(p: Prediction) -> Speed:
    """A prediction as a candidate's speed."""
    return Speed(
        images_per_s=p.images_per_s, low=p.low, high=p.high, kind="predicted", bound_by=p.bound_by, doubts=p.doubts
    )


def predicted(network: SizedSpec, basis: Basis) -> Prediction:
    """The whole ``Prediction`` of a network on a basis, from what was traced beforehand where it is there."""
    conditions = dataclasses.replace(basis.conditions, image_size=network.image_size)
    made = predict_workload(_workload(network, conditions), conditions, basis.read_calibration())
    return _doubted(made, network, basis)


def _doubted(made: Prediction, network: SizedSpec, basis: Basis) -> Prediction:
    """A prediction behind the compiler, with a doubt where eager PyTorch is predicted to be faster."""
    if basis.conditions.runtime != "compiled" or basis.calibration is not None:
        return made
    plain = dataclasses.replace(basis.conditions, image_size=network.image_size, runtime="eager")
    eager = predict_workload(_workload(network, plain), plain)
    return with_doubt(made, compiler_doubt(made.images_per_s, eager.images_per_s))


def _workload(network: SizedSpec, conditions: Conditions) -> Workload:
    """What was traced beforehand, else a trace."""
    from convscale.predictor.loading import workload_for

    name = file_of(conditions)
    held = None if name in (None, "counts") else store(str(name))
    at = None if held is None else held.find(*network, conditions.batch_size)
    if held is not None and at is not None and not held.failed(at):
        return held.workload(at, conditions.batch_size)
    return workload_for(network.spec, conditions)


def _in_processes(networks: Sequence[SizedSpec], basis: Basis, say: Say) -> dict[SizedSpec, NetworkFacts]:
    """Facts found by one process per core. What a process did not get to, because it died or could not start, is
    missing and left to the caller.
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
    job = {
        "conditions": basis.conditions.to_dict(),
        "calibration": basis.calibration,
        "networks": [[_to_plain(spec), size] for spec, size in share],
    }
    try:
        process = start_python("convscale.choice.speeds", OMP_NUM_THREADS="1")
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
        print(json.dumps(examine(SizedSpec(_from_plain(spec), size), basis).to_row()), flush=True)


def _to_plain(spec: Named) -> dict[str, object]:
    """A network as JSON values, for another process."""
    if isinstance(spec, NetSpec):
        return spec.to_dict()
    return {"foreign": spec.name, "origin": spec.origin, "family": spec.family}


def _from_plain(value: dict[str, Any]) -> Named:
    """What ``_to_plain`` gave."""
    if "foreign" in value:
        return Foreign(value["foreign"], value["origin"], family=value["family"])
    return NetSpec.from_dict(value)


if __name__ == "__main__":
    _work()
