"""What serving costs: `convscale serve` beside its peers, on the loopback alone, within bounds of time and memory.

    python -m benchmarks.serve [--model tf_efficientnet_lite0] [--img-size 224] [--seconds 10] [--rounds 3]
        [--only throughput latency load answers overload stops] [--output results/serve.jsonl]
    python -m benchmarks.serve --model tresnet_m --depth 0.34 --width 0.375 --img-size 64

The network is exported with random weights and tuned here. Each server runs in a process of its own
(`benchmarks.serve_peers`), the clients in another (`benchmarks.serve_load`), which checks every answer.

- throughput: 32 clients that ask in a circle, the servers in turns. Beside them what the artefact does in a loop while
  the same clients drive an endpoint that computes nothing, at the rate that was served: what is left of the machine.
- latency: one client.
- load: 70 % of our own throughput, the 99th percentile against the tuned batch's time.
- answers: 100,000 of them under load, each compared with what the artefact says in-process.
- overload: five times as many requests a second as it answers, from more clients than the queue has places, for a
  while: memory, wrong and lost answers, and the first good answer after it.
- stops: SIGTERM under load, again and again: every request that was taken is answered.

A row that is in the output for the same network and part is made again only with --again.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.records import machine, replace_record
from convscale.arch.scaling import scale
from convscale.artifact.artifact import Artifact, load_artifact
from convscale.machine import busy
from convscale.networks.names import network_of
from convscale.networks.resolve import Network

PARTS = ("throughput", "latency", "load", "answers", "overload", "stops")
ANSWERS = 100_000
SERVERS = ("ours", "fastapi", "litserve", "ort")
CLIENTS = 32
OVERLOAD = 5.0
"""Times what it answers."""
KEYS = ("benchmark", "model", "image_size", "part")


def exported(network: Network, size: int | None, folder: Path) -> Artifact:
    """A tuned ONNX artefact with random weights."""
    from convscale.ship.export import export
    from convscale.ship.tune import tune

    artifact = export(network, folder, image_size=size)
    tune(artifact, batch_sizes=(4, 8, 16), min_seconds=0.3)
    return load_artifact(folder)


class Bench:
    """An artefact, images with their answers, and processes around them."""

    def __init__(self, artifact: Artifact, images: int = 16) -> None:
        self.artifact = artifact
        how = artifact.preprocessing
        shape = (images, how.height, how.width, how.channels)
        self.images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        self.right = artifact(self.images)

    def batch_s(self) -> float:
        """Seconds of a call of the tuned batch."""
        batch = np.resize(self.images, (self.artifact.batch_size, *self.images.shape[1:]))
        times: list[float] = []
        for _ in range(8):
            start = time.perf_counter()
            self.artifact(batch)
            times.append(time.perf_counter() - start)
        return median(times[2:])

    @contextmanager
    def server(self, name: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
        """A server that answers, and its port."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = int(free.getsockname()[1])
        command = [sys.executable, "-m", "benchmarks.serve_peers", name, str(self.artifact.folder), str(port)]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            self._wait(name, port, process)
            yield process, port
        finally:
            with_group(process, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                with_group(process, signal.SIGKILL)
                process.wait()

    def _wait(self, name: str, port: int, process: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end and process.poll() is None:
            try:
                if self.ask(name, port, clients=1, seconds=0.2, check=False)["answers"]:
                    return
            except (OSError, ValueError):
                pass
            time.sleep(0.2)
        raise SystemExit(f"{name} does not answer")

    def requests(self, name: str) -> list[bytes]:
        """The whole bytes of a request for each image."""
        made: list[bytes] = []
        for image in self.images:
            body, kind, more, path = image.tobytes(), "application/octet-stream", "", "/infer"
            if name in ("ours", "empty"):
                tensor = {"name": "images", "datatype": "UINT8", "shape": [1, *image.shape]}
                tensor["parameters"] = {"binary_data_size": len(body)}
                head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
                body, path = head + body, "/v2/models/m/infer"
                more = f"inference-header-content-length: {len(head)}\r\n"
            elif name == "litserve":
                body, kind = json.dumps({"image": base64.b64encode(body).decode()}).encode(), "application/json"
            start = (
                f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n{more}\r\n"
            )
            made.append(start.encode() + body)
        return made

    def load(self, name: str, port: int, **how: Any) -> subprocess.Popen[str]:
        """The clients, begun."""
        plan = {
            "port": port,
            "requests": [base64.b64encode(each).decode() for each in self.requests(name)],
            "right": self.right.tolist(),
            "json": name == "litserve",
            "check": name != "empty",
            "rate": 0.0,
            "patience": 0.05,
            **how,
        }
        with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
            json.dump(plan, file)
        command = [sys.executable, "-m", "benchmarks.serve_load", file.name]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def ask(self, name: str, port: int, **how: Any) -> dict[str, Any]:
        """What the clients saw."""
        out, _ = self.load(name, port, **how).communicate(timeout=600)
        return json.loads(out)


def with_group(process: subprocess.Popen[Any], what: signal.Signals) -> None:
    """Tell a process and all that it started."""
    try:
        os.killpg(process.pid, what)
    except ProcessLookupError:
        return


def throughput(bench: Bench, seconds: float, rounds: int) -> dict[str, Any]:
    """32 clients, all servers in turns; and what a loop does beside an endpoint that computes nothing."""
    rates: dict[str, list[float]] = {name: [] for name in (*SERVERS, "direct")}
    wrong = lost = 0
    for _ in range(rounds):
        for name in SERVERS:
            with bench.server(name) as (_, port):
                bench.ask(name, port, clients=CLIENTS, seconds=1.0)
                seen = bench.ask(name, port, clients=CLIENTS, seconds=seconds)
                rates[name].append(seen["per_s"])
                if name == "ours":
                    wrong, lost = wrong + seen["wrong"], lost + seen["lost"]
        rates["direct"].append(beside_an_empty_endpoint(bench, seconds, rates["ours"][-1]))
    middle = {name: median(each) for name, each in rates.items()}
    best = max(middle[name] for name in SERVERS if name != "ours")
    return {
        "images_per_s": middle,
        "rounds": rates,
        "of_direct": middle["ours"] / middle["direct"],
        "of_best_peer": middle["ours"] / best,
        "wrong": wrong,
        "lost": lost,
        "clients": CLIENTS,
    }


def beside_an_empty_endpoint(bench: Bench, seconds: float, rate: float) -> float:
    """Images/s of a loop in a process of its own while clients ask an empty endpoint at a rate."""
    command = [sys.executable, "-m", "benchmarks.serve_peers", "direct", str(bench.artifact.folder), "0"]
    with bench.server("empty") as (_, port):
        loop = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert loop.stdin is not None
        assert loop.stdout is not None
        loop.stdout.readline()
        bench.ask("empty", port, clients=CLIENTS, seconds=seconds, rate=rate)
        loop.stdin.close()
        found = float(loop.stdout.readline())
        loop.wait()
        return found


def latency(bench: Bench, seconds: float, rounds: int) -> dict[str, Any]:
    """One client."""
    found: dict[str, list[float]] = {name: [] for name in SERVERS}
    for _ in range(rounds):
        for name in SERVERS:
            with bench.server(name) as (_, port):
                bench.ask(name, port, clients=1, seconds=1.0)
                found[name].append(bench.ask(name, port, clients=1, seconds=seconds)["p50_ms"])
    middle = {name: median(each) for name, each in found.items()}
    best = min(middle[name] for name in SERVERS if name != "ours")
    return {"p50_ms": middle, "rounds": found, "of_best_peer": middle["ours"] / best, "clients": 1}


def load(bench: Bench, seconds: float, rounds: int) -> dict[str, Any]:
    """70 % of what we can do; the tail against the tuned batch's time."""
    with bench.server("ours") as (_, port):
        most = bench.ask("ours", port, clients=CLIENTS, seconds=seconds)["per_s"]
        seen = [bench.ask("ours", port, clients=CLIENTS, seconds=seconds, rate=0.7 * most) for _ in range(rounds)]
    batch_ms = 1e3 * bench.batch_s()
    p99 = median(each["p99_ms"] for each in seen)
    return {"rate": 0.7 * most, "p99_ms": p99, "batch_ms": batch_ms, "of_batch": p99 / batch_ms, "seen": seen}


def answers(bench: Bench, seconds: float, rounds: int) -> dict[str, Any]:
    """As many as are owed, from 32 clients, however long it takes."""
    del rounds
    seen: list[dict[str, Any]] = []
    with bench.server("ours") as (_, port):
        while sum(each["answers"] for each in seen) < ANSWERS:
            seen.append(bench.ask("ours", port, clients=CLIENTS, seconds=max(seconds, 30.0)))
    return {key: sum(each[key] for each in seen) for key in ("answers", "wrong", "refused", "lost", "shut")}


def overload(bench: Bench, seconds: float, rounds: int) -> dict[str, Any]:
    """Five times the requests a second that it answers."""
    del rounds
    artifact = bench.artifact
    clients = 17 * artifact.batch_size + 256  # the queue's and a batch's, and enough that are free to ask
    with bench.server("ours") as (process, port):
        bench.ask("ours", port, clients=CLIENTS, seconds=3.0)
        most = bench.ask("ours", port, clients=CLIENTS, seconds=5.0)["per_s"]
        before = _rss_mb(process.pid)
        how = {"clients": clients, "seconds": max(seconds, 10.0), "rate": OVERLOAD * most, "patience": 0.0}
        running = bench.load("ours", port, **how)
        peak = before
        while running.poll() is None:
            peak = max(peak, _rss_mb(process.pid))
            time.sleep(0.2)
        seen = json.loads(running.communicate()[0])
        start = time.perf_counter()
        while not bench.ask("ours", port, clients=1, seconds=0.2)["answers"]:
            pass
        return {
            "clients": clients,
            "most_per_s": most,
            "asked_of_most": (seen["answers"] + seen["refused"]) / how["seconds"] / most,
            "before_mb": before,
            "peak_mb": peak,
            "grown": peak / before - 1,
            "recovery_s": time.perf_counter() - start,
            "seen": seen,
        }


def _rss_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def stops(bench: Bench, seconds: float, rounds: int) -> dict[str, Any]:
    """SIGTERM under load."""
    del seconds
    count = max(rounds, 20)
    good = wrong = lost = 0
    codes: list[int | None] = []
    for _ in range(count):
        with bench.server("ours") as (process, port):
            running = bench.load("ours", port, clients=8, seconds=2.5)
            time.sleep(1.2)
            process.send_signal(signal.SIGTERM)
            seen = json.loads(running.communicate()[0])
            process.wait(20)
            codes.append(process.returncode)
            good, wrong, lost = good + seen["answers"], wrong + seen["wrong"], lost + seen["lost"]
    return {"stops": count, "answers": good, "wrong": wrong, "lost": lost, "codes": codes}


MEASURES: dict[str, Callable[[Bench, float, int], dict[str, Any]]] = {
    "throughput": throughput,
    "latency": latency,
    "load": load,
    "answers": answers,
    "overload": overload,
    "stops": stops,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--depth", type=float, default=1.0)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("results/serve.jsonl"))
    asked = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the servers end with it
    done = [json.loads(line) for line in asked.output.read_text().splitlines()] if asked.output.is_file() else []
    with tempfile.TemporaryDirectory() as folder:
        name, network = asked.model, network_of(asked.model)
        if (asked.depth, asked.width) != (1.0, 1.0):
            network = scale(asked.model, depth=asked.depth, width=asked.width)
            name = network.name
        artifact = exported(network, asked.img_size, Path(folder) / "m")
        bench = Bench(artifact)
        facts = {
            "benchmark": "serve",
            "model": name,
            "image_size": artifact.image_size,
            "machine": machine(),
        }
        for part in asked.only:
            row = {**facts, "part": part}
            if not asked.again and any(all(old.get(key) == row[key] for key in KEYS) for old in done):
                print(f"{part}: is there")
                continue
            found = MEASURES[part](bench, asked.seconds, asked.rounds)
            record = {
                **row,
                "batch_size": artifact.batch_size,
                "runtime": artifact.runtime,
                "threads": artifact.threads,
                "streams": artifact.streams,
                "seconds": asked.seconds,
                "busy": busy(),
                **found,
            }
            replace_record(asked.output, record, KEYS)
            print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
