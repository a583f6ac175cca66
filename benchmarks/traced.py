"""Write convscale/predictor/traced/: every network that can be chosen by default, traced beforehand.

    python -m benchmarks.traced [--output FOLDER] [--afresh]

Own weights and timm's at the sizes that a figure was published for, with the hardware-aligned relatives that `choose`
offers: kernels for inference under AMP, eager and compiled, and counts in single precision. Entries that the code at
hand made are kept, unless --afresh. One process; about 25 minutes where nothing is kept, seconds where all is.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from convscale.choice.candidates import candidates_of
from convscale.choice.choose import relatives_of
from convscale.choice.facts import SizedSpec
from convscale.conditions import Conditions
from convscale.cost.fusion import launched_kernels
from convscale.cost.kernels import PHASES
from convscale.cost.liveness import alive_bytes
from convscale.cost.trace import Trace
from convscale.cost.tracing import trace
from convscale.errors import UserError
from convscale.networks.offered import Filter
from convscale.networks.resolve import shapes_of
from convscale.predictor.roofline import KINDS
from convscale.predictor.traced import (
    BATCH,
    COLUMNS,
    Entry,
    Store,
    digest,
    entry_key,
    folder,
    lines_of,
    read_store,
    upper_lines,
    write_store,
)
from convscale.predictor.workload import workload_of

FEW = 2
"""The other batch that lines go through: a batch of one is a case of its own."""
FILES = ("eager", "compiled", "counts")
Entries = dict[str, dict[str, Entry]]


def networks() -> dict[str, SizedSpec]:
    """What can be chosen by default in either zoo, and its aligned relatives, by the key of their entry."""
    found: dict[str, SizedSpec] = {}
    for zoo in ("own", "timm"):
        pool = candidates_of(None, offer=Filter(zoo=zoo, attention=True))
        for each in (*pool, *(relative for _, relative in relatives_of(pool))):
            key = entry_key(each.spec, each.image_size)
            if key is not None and not each.why_not:
                found.setdefault(key, SizedSpec(each.spec, each.image_size))
    return found


def kept(place: Path, wanted: dict[str, SizedSpec]) -> Entries:
    """Entries of all files that the code at hand made."""
    stores = {name: read_store(place / f"{name}.npz") for name in FILES if (place / f"{name}.npz").is_file()}
    if len(stores) < len(FILES):
        return {name: {} for name in FILES}

    def has(store: Store, key: str) -> bool:
        zoo = key.partition(" ")[0]
        return key in store.index and store.digests.get(zoo) == digest(zoo)

    good = [key for key in wanted if all(has(store, key) for store in stores.values())]
    return {name: {key: store.entry(store.index[key]) for key in good} for name, store in stores.items()}


def entries_of(network: SizedSpec) -> dict[str, Entry]:
    """A network's entry in each file."""
    spec, size = network
    try:
        net = shapes_of(spec, fused=True)
        amp = Conditions(device="rtx-4090", precision="amp", image_size=size)
        traces = {batch: trace(net, replace(amp, batch_size=batch)) for batch in (1, FEW, BATCH)}
        single = replace(amp, precision="fp32")
        counted = {batch: trace(net, replace(single, batch_size=batch)) for batch in (FEW, BATCH)}
    except UserError as error:
        return dict.fromkeys(FILES, Entry(failed=str(error)))
    return {
        "eager": kernel_entry(traces, compiled=False),
        "compiled": kernel_entry(traces, compiled=True),
        "counts": count_entry(counted),
    }


def kernel_entry(traces: dict[int, Trace], *, compiled: bool) -> Entry:
    """Kernels as lines through two batches, checked at one image."""
    found = {batch: rows_of(traced, compiled=compiled) for batch, traced in traces.items()}
    about = workload_of(traces[BATCH], compiled=compiled)
    lines = None
    if found[FEW].shape == found[BATCH].shape and (found[FEW][:, :2] == found[BATCH][:, :2]).all():
        lines = lines_of(found[FEW][:, 2:], found[BATCH][:, 2:], FEW, BATCH)
    peak = peak_lines(traces[FEW], traces[BATCH])
    any_batch = lines is not None and peak is not None
    constants, slopes = lines if lines is not None else (found[BATCH][:, 2:], np.zeros_like(found[BATCH][:, 2:]))
    rows = np.concatenate([found[BATCH][:, :2], constants, slopes], axis=1)
    distinct, counts = np.unique(rows, axis=0, return_counts=True) if len(rows) else (rows, np.zeros(0, np.int64))
    one = found[1].shape == found[BATCH].shape and bool((found[1][:, :2] == rows[:, :2]).all())
    return Entry(
        kernels=np.concatenate([distinct[:, :2], counts[:, None], distinct[:, 2:]], axis=1),
        peak=peak if any_batch and peak is not None else np.array([[about.peak_bytes, 0]], np.int64),
        params=about.params,
        attention=about.attention,
        unsupported=json.dumps(about.unsupported, sort_keys=True),
        any_batch=any_batch,
        one_image=one and any_batch and bool((found[1][:, 2:] == constants + slopes).all()),
    )


def rows_of(traced: Trace, *, compiled: bool) -> np.ndarray:
    """(launches, 2 + columns): each kernel's kind, phase and figures."""
    kernels = launched_kernels(traced, compiled=compiled)
    rows = [[KINDS.index(k.kind), PHASES.index(k.phase), *(int(getattr(k, name)) for name in COLUMNS)] for k in kernels]
    return np.array(rows, np.int64).reshape(len(rows), 2 + len(COLUMNS))


def peak_lines(few: Trace, many: Trace) -> np.ndarray | None:
    """The most bytes alive at once as lines in the batch; None where there are none."""
    low, high = np.array(alive_bytes(few)), np.array(alive_bytes(many))
    lines = lines_of(low, high, FEW, BATCH) if low.shape == high.shape else None
    return None if lines is None else upper_lines(*(part.tolist() for part in lines))


def count_entry(traces: dict[int, Trace]) -> Entry:
    """Counts alone."""
    few, many = traces[FEW], traces[BATCH]
    sums = {batch: np.array(sums_of(traced)) for batch, traced in traces.items()}
    lines, peak = lines_of(sums[FEW], sums[BATCH], FEW, BATCH), peak_lines(few, many)
    any_batch = lines is not None and peak is not None
    constants, slopes = lines if lines is not None else (sums[BATCH], np.zeros_like(sums[BATCH]))
    about = workload_of(many, compiled=False)
    return Entry(
        peak=peak if any_batch and peak is not None else np.array([[about.peak_bytes, 0]], np.int64),
        macs=(int(constants[0]), int(slopes[0])),
        traffic=(int(constants[1]), int(slopes[1])),
        params=many.params,
        attention=about.attention,
        any_batch=any_batch,
        one_image=any_batch,
    )


def sums_of(traced: Trace) -> tuple[int, int]:
    """Multiply-accumulates, and bytes read and written."""
    return (
        sum(op.macs for op in traced.operators),
        sum(op.read_bytes + op.written_bytes for op in traced.operators),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=folder())
    parser.add_argument("--afresh", action="store_true", help="trace everything again")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start, wanted = time.perf_counter(), networks()
    made: Entries = {name: {} for name in FILES} if args.afresh else kept(args.output, wanted)
    missing = [key for key in wanted if key not in made["eager"]]
    print(f"{len(wanted)} networks at their sizes, {len(missing)} to trace", flush=True)

    def write() -> None:
        for name in FILES:
            write_store(args.output / f"{name}.npz", made[name], torch.__version__)

    for number, key in enumerate(missing, 1):
        for name, entry in entries_of(wanted[key]).items():
            made[name][key] = entry
        if number % 200 == 0 or number == len(missing):
            write()
            print(f"{number} of {len(missing)} after {time.perf_counter() - start:.0f} s", flush=True)
    if not missing:
        write()  # entries that nobody can choose any more go
    eager = made["eager"].values()
    sizes = {name: (args.output / f"{name}.npz").stat().st_size for name in FILES}
    print(
        f"{sum(bool(e.failed) for e in eager)} can not be traced, {sum(not e.any_batch for e in eager)} hold for batch "
        f"{BATCH} alone, {sum(not e.one_image for e in eager)} not for one image; {sum(sizes.values()) / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main()
