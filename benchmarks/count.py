"""Counts of the whole zoo beside torch's own counter on timm's networks, and how long a trace takes.

    python -m benchmarks.count [--json] [--models NAME ...] [--output results/count.jsonl]

For every architecture that timm has too, at its own size: multiply-accumulates against torch's FlopCounterMode / 2 on
timm's network of that name, parameters and activations (outputs of convolutions and products, as a dispatch mode of
this file sees them) against the same, and the seconds of a trace on one
thread: the median of several, the network already built on the meta device, nothing read from a cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import convscale as cs
from benchmarks.parity import NOT_IN_TIMM
from benchmarks.records import write_record
from convscale.arch.zoo import ARCHITECTURES
from convscale.conditions import Conditions
from convscale.cost.counting import cost_of
from convscale.cost.tracing import trace
from convscale.machine import Environment
from convscale.networks.resolve import build_meta

PRODUCTS = ("aten::convolution", "aten::addmm", "aten::mm", "aten::bmm")
SLOW_S = 1.0
"""A trace should be quicker than this."""


def peer_name(name: str) -> str:
    """timm's network to count beside ours: the authors' V2 differs from timm's in its slopes alone."""
    return name.removesuffix("_official")


NAMES = tuple(name for name in ARCHITECTURES if peer_name(name) not in NOT_IN_TIMM)


class Outputs(TorchDispatchMode):
    """Counts the numbers that convolutions and products put out."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name in PRODUCTS:
            self.count += out.numel()
        return out


def peer_counts(name: str, size: int) -> dict[str, float]:
    """Params, MACs and activations of timm's network, by torch's counter and by ``Outputs``."""
    import timm

    with torch.device("meta"):
        net = timm.create_model(peer_name(name)).eval()
        images = torch.empty(1, 3, size, size)
    with torch.no_grad():
        with FlopCounterMode(display=False) as flops:
            net(images)
        with Outputs() as outputs:
            net(images)
    return {
        "params": sum(p.numel() for p in net.parameters()),
        "macs": flops.get_total_flops() / 2,
        "activations": outputs.count,
    }


def row_of(name: str, rounds: int) -> dict[str, Any]:
    """Our counts beside the peer's, and the seconds of our traces."""
    spec = cs.get_spec(name)
    net, size = build_meta(spec), spec.input.size
    conditions = Conditions(image_size=size, batch_size=1)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        trace(net, conditions)
        seconds.append(time.perf_counter() - start)
    cost, peer = cost_of(trace(net, conditions)), peer_counts(name, size)
    row: dict[str, Any] = {
        "name": name,
        "image_size": size,
        "trace_s": round(statistics.median(seconds), 4),
        "traces_s": [round(s, 4) for s in seconds],
    }
    for key, value in peer.items():
        row |= {key: getattr(cost, key), f"peer_{key}": value, f"{key}_difference": getattr(cost, key) / value - 1}
    return {**row, "unsupported": cost.unsupported}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--models", nargs="+", default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("results/count.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    # the first trace of a process imports
    trace(build_meta(cs.get_spec("resnet18")), Conditions(image_size=64, batch_size=1))
    rows = []
    for name in args.models or NAMES:
        rows.append(row_of(name, args.rounds))
        r = rows[-1]
        differences = (f"{key} {r[f'{key}_difference']:+.2%}" for key in ("macs", "params", "activations"))
        shown = f"{name:24} {r['trace_s']:6.3f} s  {', '.join(differences)}"
        print(json.dumps(r) if args.json else shown, flush=True)
    import timm

    where = Environment.here()
    header: dict[str, Any] = {
        "what": "counts beside timm's networks, and seconds of a trace",
        "command": "python -m benchmarks.count",
        "threads": 1,
    }
    header |= {
        "machine": where.device_name,
        "cores": where.cores,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "networks": len(rows),
    }
    quick = sum(row["trace_s"] < SLOW_S for row in rows) / len(rows)
    header |= {
        f"worst_{key}_difference": max(abs(row[f"{key}_difference"]) for row in rows)
        for key in ("macs", "params", "activations")
    }
    header |= {"share_under_1_s": quick, "median_trace_s": statistics.median(row["trace_s"] for row in rows)}
    header |= {
        "slowest_trace_s": max(row["trace_s"] for row in rows),
        "unsupported": sorted({name for row in rows for name in row["unsupported"]}),
    }
    print(json.dumps(header, indent=2))
    write_record(args.output, "".join(json.dumps(row) + "\n" for row in [header, *rows]))


if __name__ == "__main__":
    main()
