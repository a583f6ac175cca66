"""Numbers in words."""

from __future__ import annotations

import pytest

from convscale import words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2310.4, "2,310"),
        (0.12345, "0.123"),
        (0, "0"),
        (9.996, "10.0"),
        (-1234.5, "-1,230"),
        (None, "–"),
        (float("nan"), "–"),
        (1e9, "1,000,000,000"),
    ],
)
def test_number(value: float | None, text: str) -> None:
    assert words.number(value) == text


def test_listed() -> None:
    assert [words.listed("abc"[:count]) for count in range(4)] == ["", "a", "a and b", "a, b and c"]
    assert words.listed(["amp", "fp16", "fp32"], "or") == "amp, fp16 or fp32"


@pytest.mark.parametrize(
    ("value", "text"), [(4004.6, "4,005"), (999.4, "999"), (12.34, "12.3"), (123456.0, "123,500"), (None, "–")]
)
def test_rate(value: float | None, text: str) -> None:
    assert words.rate(value) == text


@pytest.mark.parametrize(
    ("share", "decimals", "text"),
    [
        (0.9231, 1, "92.3 %"),
        (1.0, 2, "100 %"),
        (0.99996, 1, "99.996 %"),
        (0.9999999, 1, "just under 100 %"),
        (0.0, 1, "0.0 %"),
        (None, 1, "–"),
    ],
)
def test_percent_never_rounds_up_to_all(share: float | None, decimals: int, text: str) -> None:
    assert words.percent(share, decimals) == text


@pytest.mark.parametrize(
    ("value", "text"), [(1_234_567, "1.23 M"), (4.11e9, "4.11 G"), (999, "999"), (12_300, "12.3 K"), (None, "–")]
)
def test_large(value: float | None, text: str) -> None:
    assert words.large(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(34e-6, "34.0 µs"), (0.0034, "3.40 ms"), (61.2, "61 s"), (312, "5 min 12 s"), (7322, "2 h 2 min"), (None, "–")],
)
def test_seconds(value: float | None, text: str) -> None:
    assert words.seconds(value) == text


def test_accuracy_has_two_decimals() -> None:
    assert words.accuracy(83.0899) == "83.09 %"
    assert words.accuracy(None) == "–"


def test_gigabytes_are_of_two_to_the_thirty() -> None:
    assert words.gigabytes(12_345_678_901) == "11.5 GB"
    assert words.gigabytes(2**29) == "0.500 GB"
    assert words.gigabytes(None) == "–"


def test_shortened_keeps_the_end() -> None:
    assert words.shortened("efficientnet_b0 depth 0.5 width 0.35", 20) == "efficient…width 0.35"
    assert len(words.shortened("x" * 99, 20)) == 20


def test_devices_without_their_makers_noise() -> None:
    assert words.device("Intel(R) Xeon(R) Processor") == "Intel Xeon"
    assert words.device("NVIDIA GeForce RTX 4090, inference") == "RTX 4090, inference"
    assert words.device("AMD EPYC 7763 64-Core Processor") == "AMD EPYC 7763 64-Core"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_a_time_that_is_not_known_is_no_number(value: float | None) -> None:
    assert words.seconds(value) == words.UNKNOWN
