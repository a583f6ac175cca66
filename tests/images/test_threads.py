"""Many small calls in threads: in order, all of them, and their exceptions."""

import threading

import pytest

from convscale.images.threads import in_threads


def test_results_come_in_order_whatever_the_chunk() -> None:
    for chunk in (1, 3, 1000):
        assert list(in_threads(lambda x: x * x, range(10), workers=3, chunk=chunk)) == [x * x for x in range(10)]
    assert list(in_threads(str, [])) == []


def test_chunks_run_side_by_side() -> None:
    both = threading.Barrier(2, timeout=30)  # broken unless two are there at once
    assert list(in_threads(lambda x: both.wait() >= 0, range(2), workers=2, chunk=1)) == [True, True]


def test_an_exception_comes_up() -> None:
    def halve(x: int) -> float:
        return 6 / x

    found = in_threads(halve, [1, 2, 0], chunk=2)
    assert [next(found), next(found)] == [6.0, 3.0]
    with pytest.raises(ZeroDivisionError):
        next(found)
