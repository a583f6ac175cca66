"""A load generator that is cheap and bounded: clients in one event loop, each with one connection, asking in a circle.

    python -m benchmarks.serve_load PLAN.json      prints what it saw as JSON

A plan holds the address, the whole bytes of each request, what each answer must end in, the number of clients, the
seconds, and the rate at which they ask together (0: as fast as they are answered).
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

TOLERANCE = 1e-4
"""Of a probability: batches of another size are computed in another order."""


@dataclass
class Seen:
    """What the clients saw."""

    latencies_s: list[float] = field(default_factory=list)
    wrong: int = 0
    refused: int = 0
    """Told to come again."""
    lost: int = 0
    """Sent, and never answered."""
    shut: int = 0
    """Nobody listened."""


async def _client(plan: dict[str, Any], number: int, seen: Seen, until: float) -> None:
    requests, right = plan["requests"], plan["right"]
    clients, rate = plan["clients"], plan["rate"]
    at, due = number, time.perf_counter() + number / max(rate, 1e-9) if rate else 0.0
    reader = writer = None
    while time.perf_counter() < until:
        if rate:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            due += clients / rate
        at = (at + 1) % len(requests)
        try:
            if writer is None or reader is None:
                reader, writer = await asyncio.open_connection("127.0.0.1", plan["port"])
        except OSError:
            seen.shut += 1
            await asyncio.sleep(0.02)
            continue
        try:
            start = time.perf_counter()
            writer.write(requests[at])
            status, body, closes = await _answer(reader)
        except (OSError, asyncio.IncompleteReadError, ValueError):
            seen.lost += 1
            writer = None
            await asyncio.sleep(0.01)
            continue
        if status == 200:
            seen.latencies_s.append(time.perf_counter() - start)
            if plan["check"] and not _is_right(body, right[at], plan["json"]):
                seen.wrong += 1
        else:
            seen.refused += 1
            await asyncio.sleep(plan["patience"])
        if closes:
            writer.close()
            writer = None
    if writer is not None:
        writer.close()


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bytes, bool]:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0])
    return int(head[9:12]), await reader.readexactly(length), b"connection: close" in head


def _is_right(body: bytes, right: np.ndarray, as_json: bool) -> bool:
    data = base64.b64decode(json.loads(body)["row"]) if as_json else body[-right.nbytes :]
    return len(data) == right.nbytes and bool(np.abs(np.frombuffer(data, "<f4") - right).max() <= TOLERANCE)


async def _main(plan: dict[str, Any]) -> Seen:
    seen = Seen()
    # Once, before the clock starts: else the first clients are late, and catch up all at once.
    plan["requests"] = [base64.b64decode(text) for text in plan["requests"]]
    plan["right"] = [np.array(row, np.float32) for row in plan["right"]]
    until = time.perf_counter() + plan["seconds"]
    await asyncio.gather(*(_client(plan, number, seen, until) for number in range(plan["clients"])))
    return seen


def main() -> None:
    """Ask, and print."""
    plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    seen = asyncio.run(_main(plan))
    seconds = plan["seconds"]
    ordered = sorted(seen.latencies_s) or [float("nan")]
    print(
        json.dumps(
            {
                "answers": len(seen.latencies_s),
                "per_s": len(seen.latencies_s) / seconds,
                "p50_ms": 1e3 * ordered[len(ordered) // 2],
                "p99_ms": 1e3 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
                "wrong": seen.wrong,
                "refused": seen.refused,
                "lost": seen.lost,
                "shut": seen.shut,
            }
        )
    )


if __name__ == "__main__":
    main()
