"""The queue: who goes together, who waits, who is refused, who is forgotten."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from convscale.serve.batching import Answered, Batcher, Closed, Overloaded


class Notes:
    """What a batcher tells."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.lost: list[str] = []

    def batch(self, images: int, run_s: float) -> None:
        self.batches.append(images)

    def dropped(self, why: str) -> None:
        self.lost.append(why)


class Slow:
    """A network that says of each image its first pixel, and goes on only when it may."""

    def __init__(self) -> None:
        self.may, self.began = threading.Event(), threading.Event()
        self.threads: set[int] = set()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self.threads.add(threading.get_ident())
        self.began.set()
        assert self.may.wait(20)
        return images[:, :1, 0, 0].astype(np.float32)


def made(run: Callable[[np.ndarray], np.ndarray], **options: object) -> tuple[Batcher, Notes]:
    notes = Notes()
    how = {"batch_size": 4, "max_delay_s": 0.0, "most_waiting": 8, **options}
    return Batcher(run, name="m", watcher=notes, **how), notes  # pyright: ignore[reportArgumentType]


def image(value: int, count: int = 1) -> np.ndarray:
    return np.full((count, 2, 2, 1), value, np.uint8)


def test_what_waits_goes_together_and_each_gets_its_own() -> None:
    slow = Slow()
    batcher, notes = made(slow)

    async def clients() -> list[Answered]:
        futures = [batcher.submit(image(1), 10)]
        while not slow.began.is_set():
            await asyncio.sleep(0.001)
        futures += [batcher.submit(image(value, count), 10) for value, count in ((2, 1), (3, 2), (4, 1), (5, 1))]
        slow.may.set()
        return await asyncio.gather(*futures)

    found = asyncio.run(clients())
    batcher.close()
    assert [each.rows.tolist() for each in found] == [[[1]], [[2]], [[3], [3]], [[4]], [[5]]]
    assert notes.batches == [1, 4, 1]
    assert [each.batch for each in found] == [1, 4, 4, 4, 1]
    assert len(slow.threads) == 1


def test_streams_run_side_by_side_and_whole_batches_alone_wait_in_the_runtime() -> None:
    slow = Slow()
    batcher, notes = made(slow, streams=2, batch_size=2)

    async def clients() -> list[Answered]:
        async def threads(count: int) -> None:
            while len(slow.threads) < count:
                await asyncio.sleep(0.001)

        futures = [batcher.submit(image(1), 10)]
        await threads(1)
        futures.append(batcher.submit(image(2), 10))
        await threads(2)
        futures.append(batcher.submit(image(3), 10))
        await asyncio.sleep(0.05)
        assert (len(slow.threads), batcher.waiting) == (2, 1)  # less than a batch waits for a stream
        futures.append(batcher.submit(image(4), 10))
        await threads(3)
        futures.append(batcher.submit(image(5, 2), 10))
        await threads(4)
        futures.append(batcher.submit(image(6, 2), 10))
        await asyncio.sleep(0.05)
        assert (len(slow.threads), batcher.waiting) == (4, 2)
        slow.may.set()
        return await asyncio.gather(*futures)

    found = asyncio.run(clients())
    batcher.close()
    assert [each.rows[0].tolist() for each in found] == [[1], [2], [3], [4], [5], [6]]
    assert [each.batch for each in found] == [1, 1, 2, 2, 2, 2]
    assert sorted(notes.batches) == [1, 1, 2, 2, 2]


def test_an_image_by_itself_goes_through_the_form_that_answers_it_sooner() -> None:
    slow = Slow()
    alone: list[int] = []

    def sooner(images: np.ndarray) -> np.ndarray:
        alone.append(int(images[0, 0, 0, 0]))
        return slow(images)

    batcher, _ = made(slow, streams=2, batch_size=2, alone=sooner)

    async def clients() -> list[Answered]:
        futures = [batcher.submit(image(1), 10)]
        while not slow.threads:
            await asyncio.sleep(0.001)
        futures.append(batcher.submit(image(2), 10))  # beside another
        while len(slow.threads) < 2:
            await asyncio.sleep(0.001)
        slow.may.set()
        found = list(await asyncio.gather(*futures))
        while batcher._running:
            await asyncio.sleep(0.001)
        found.append(await batcher.submit(image(3, 2), 10))  # two
        while batcher._running:
            await asyncio.sleep(0.001)
        found.append(await batcher.submit(image(4), 10))
        return found

    found = asyncio.run(clients())
    batcher.close()
    assert [each.rows[0].tolist() for each in found] == [[1], [2], [3], [4]]
    assert alone == [1, 4]


def test_more_than_a_batch_goes_alone() -> None:
    slow = Slow()
    slow.may.set()
    batcher, notes = made(slow)

    async def client() -> Answered:
        return await batcher.submit(image(7, 20), 10)  # more than may wait, too: the queue is empty

    assert asyncio.run(client()).rows.shape == (20, 1)
    batcher.close()
    assert notes.batches == [20]


def test_one_waits_only_while_another_comes() -> None:
    slow = Slow()
    slow.may.set()
    batcher, notes = made(slow, max_delay_s=5.0)

    async def clients() -> float:
        start = time.perf_counter()
        await batcher.submit(image(1), 10)  # nobody else comes: not one moment of the five seconds
        alone = time.perf_counter() - start
        with batcher.coming():
            first = batcher.submit(image(2), 10)
            await asyncio.sleep(0.05)
            assert not first.done()
            second = batcher.submit(image(3), 10)
        await asyncio.gather(first, second)
        return alone

    assert asyncio.run(clients()) < 4
    batcher.close()
    assert notes.batches == [1, 2]


def test_a_full_queue_refuses_and_says_when_to_come_again() -> None:
    slow = Slow()
    batcher, _ = made(slow)

    async def clients() -> int:
        futures = [batcher.submit(image(0), 10)]
        while not slow.began.is_set():
            await asyncio.sleep(0.001)
        futures += [batcher.submit(image(1, 4), 10), batcher.submit(image(2, 4), 10)]
        with pytest.raises(Overloaded) as caught:
            batcher.submit(image(3), 10)
        with pytest.raises(Overloaded):
            batcher.check_room()
        slow.may.set()
        assert [len(each.rows) for each in await asyncio.gather(*futures)] == [1, 4, 4]
        return caught.value.retry_after_s

    assert asyncio.run(clients()) >= 1
    batcher.close()


def test_who_left_or_is_late_is_not_run() -> None:
    slow = Slow()
    batcher, notes = made(slow)

    async def clients() -> Answered:
        first = batcher.submit(image(0), 10)
        while not slow.began.is_set():
            await asyncio.sleep(0.001)
        left, late, stays = batcher.submit(image(1), 10), batcher.submit(image(2), -1.0), batcher.submit(image(3), 10)
        left.cancel()
        slow.may.set()
        await first
        with pytest.raises(TimeoutError):
            await late
        return await stays

    assert asyncio.run(clients()).rows.tolist() == [[3]]
    batcher.close()
    assert notes.lost == ["left", "late"]
    assert notes.batches == [1, 1]


def test_a_failure_reaches_all_of_its_batch_and_the_next_goes_on() -> None:
    calls: list[int] = []

    def fails_once(images: np.ndarray) -> np.ndarray:
        calls.append(len(images))
        if len(calls) == 1:
            raise ValueError("broken")
        return images[:, :1, 0, 0].astype(np.float32)

    batcher, _ = made(fails_once, max_delay_s=5.0)

    async def clients() -> Answered:
        with batcher.coming():
            both = [batcher.submit(image(1), 10), batcher.submit(image(2), 10)]
        for future in both:
            with pytest.raises(ValueError, match="broken"):
                await future
        return await batcher.submit(image(9), 10)

    assert asyncio.run(clients()).rows.tolist() == [[9]]
    batcher.close()
    assert calls == [2, 1]


def test_closing_answers_what_waits_and_takes_nothing_more() -> None:
    slow = Slow()
    batcher, _ = made(slow)

    async def clients() -> list[Answered]:
        futures = [batcher.submit(image(value), 10) for value in range(6)]
        closing = asyncio.get_running_loop().run_in_executor(None, batcher.close)
        while not batcher._closing:
            await asyncio.sleep(0.001)
        with pytest.raises(Closed):
            batcher.submit(image(9), 10)
        slow.may.set()
        await closing
        return await asyncio.gather(*futures)

    assert [each.rows.tolist() for each in asyncio.run(clients())] == [[[value]] for value in range(6)]
