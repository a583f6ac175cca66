"""The speed that an artefact was promised to have on a device that was not there; and its place in the model card."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from convscale.conditions import LAYOUTS, PRECISIONS, Size, as_size, sides, size_text
from convscale.errors import UserError, check_flag
from convscale.words import exact, odds

TITLE = "## Promised speed"
"""The heading of its section in the model card."""
SAME_SPEED = 0.1
"""A network that was measured on the device is as fast as it was there within this share, a judgement: trained weights,
another driver and another day make more than its calls scatter."""


@dataclass(frozen=True, kw_only=True)
class Promise:
    """A speed that an artefact is to be held to on the day its device arrives: predicted, or measured there before the
    network was trained.

    Raises:
        UserError: a field has an impossible value; the message names it.
    """

    device: str
    """The device's name in the table of devices (``l4``), or ``cpu``."""
    runtime: str
    """The runtime that the speed is of."""
    precision: str
    """What it is of: ``fp32``, ``amp``, ``bf16``, ``fp16`` or ``int8``."""
    layout: str = "nchw"
    """``nchw`` or ``nhwc``."""
    batch_size: int
    """Images a call."""
    image_size: Size
    """Side of the square input in pixels, or (height, width)."""
    threads: int | None = None
    """Compute threads on a CPU; None: one per core."""
    images_per_s: float
    """The prediction's middle, or the median that was measured; model only."""
    low: float
    """Lower end of the prediction's 80 % interval, or of the middle half of the calls that were measured."""
    high: float
    """Upper end of the same."""
    min_throughput: float | None = None
    """Images/s that were asked for; None: none were."""
    confidence: float | None = None
    """Probability that the speed reaches ``min_throughput``, by the interval; None where none was asked for, and of a
    measurement.
    """
    doubts: tuple[str, ...] = ()
    """Reasons to trust it less, each a sentence."""
    calibration: str = ""
    """The calibration that the prediction went by, in words; empty: data sheets and published tables alone."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """What predicted it, by name: ``convscale`` and its version."""
    measured: bool = False
    """Whether the untrained network was measured on the device, instead of predicted."""

    def __post_init__(self) -> None:
        for name in ("device", "runtime"):
            if not isinstance(value := getattr(self, name), str) or not value:
                raise UserError(f"a promise's {name} must be a name, got {value!r}")
        for name, known in (("precision", PRECISIONS), ("layout", LAYOUTS)):
            if (value := getattr(self, name)) not in known:
                raise UserError(f"a promise's {name} must be one of {', '.join(known)}, got {value!r}")
        object.__setattr__(self, "image_size", as_size(*sides(self.image_size)))
        for name in ("batch_size", "threads"):
            value = getattr(self, name)
            if value is None and name == "threads":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"a promise's {name} must be a whole number of at least 1, got {value!r}")
        for name in ("images_per_s", "low", "high", "min_throughput", "confidence"):
            value = getattr(self, name)
            if value is None and name in ("min_throughput", "confidence"):
                continue
            least = 0 if name == "confidence" else math.ulp(0.0)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
                raise UserError(f"a promise's {name} must be a finite number above 0, got {value!r}")
        if not self.low <= self.images_per_s <= self.high:
            raise UserError(
                f"a promise's interval must hold its speed, got {self.low!r} to {self.high!r} around "
                f"{self.images_per_s!r}"
            )
        if self.confidence is not None and self.confidence > 1:
            raise UserError(f"a promise's confidence must lie between 0 and 1, got {self.confidence!r}")
        if check_flag("a promise's measured", self.measured) and self.confidence is not None:
            raise UserError(f"a promise of a measurement has no confidence, got {self.confidence!r}")
        object.__setattr__(self, "doubts", tuple(str(doubt) for doubt in self.doubts))

    @property
    def expected(self) -> tuple[float, float]:
        """Images/s between which it is as fast as promised: the interval of a prediction; of a measurement
        ``SAME_SPEED`` on either side, or the middle half of its calls where that is wider.
        """
        if not self.measured:
            return self.low, self.high
        return min(self.low, (1 - SAME_SPEED) * self.images_per_s), max(self.high, (1 + SAME_SPEED) * self.images_per_s)

    @property
    def floor(self) -> float:
        """Images/s that keep the promise: what was asked for, else the least that is expected."""
        return self.expected[0] if self.min_throughput is None else self.min_throughput

    @property
    def conditions(self) -> str:
        """What it holds for, in words."""
        threads = f", {self.threads} threads" if self.threads else ""
        return (
            f"{self.runtime}, {self.precision}, {self.layout}, batch {self.batch_size}, "
            f"{size_text(self.image_size)} px{threads}"
        )

    def __str__(self) -> str:
        kept = ""
        if self.min_throughput is not None:
            sure = "" if self.confidence is None else f", {odds(self.confidence)} likely"
            kept = f", {exact(self.min_throughput)} asked for{sure}"
        how = f"measured on {self.device} before training" if self.measured else f"predicted for {self.device}"
        return f"{exact(self.images_per_s)} images/s {how} ({self.span}){kept}; {self.conditions}"

    @property
    def span(self) -> str:
        """From where to where it goes, in words."""
        return f"{'middle half of the calls' if self.measured else '80 %'}: {exact(self.low)} to {exact(self.high)}"

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values; the inverse of :meth:`from_dict`."""
        values = dataclasses.asdict(self)
        size = self.image_size
        return {
            **values,
            "image_size": size if isinstance(size, int) else list(size),
            "doubts": list(self.doubts),
            "versions": dict(self.versions),
        }

    @classmethod
    def from_dict(cls, value: object) -> Promise:
        """From what :meth:`to_dict` gave. Fields of later versions are passed over.

        Raises:
            UserError: a field is missing or impossible.
        """
        if not isinstance(value, Mapping):
            raise UserError(f"a promise must be an object of JSON, got {type(value).__name__}")
        known = {f.name for f in dataclasses.fields(cls)}
        given = {str(key): item for key, item in value.items() if key in known}
        size = given.get("image_size")
        if isinstance(size, list):
            given["image_size"] = tuple(size)
        try:
            return cls(**given)  # pyright: ignore[reportArgumentType]
        except TypeError as error:
            raise UserError(f"a promise can not be read: {error}") from error


def promise_section(promise: Promise) -> list[str]:
    """Lines of Markdown for the model card: the speed, its doubts, and how to check it on the device."""
    asked = ""
    if promise.min_throughput is not None:
        sure = "" if promise.confidence is None else f" ({odds(promise.confidence)} likely)"
        asked = f" Asked for were {exact(promise.min_throughput)} images/s{sure}."
    by = ", ".join(f"{name} {version}" for name, version in promise.versions.items())
    rests = promise.calibration or "data sheets and published tables, no measurement of the device"
    how = f"Predicted for {promise.device}, not measured"
    interval = f"80 % interval {exact(promise.low)} to {exact(promise.high)}"
    if promise.measured:
        how, interval = f"Measured on {promise.device} before the network was trained", promise.span
    return [
        TITLE,
        "",
        f"{how}: {exact(promise.images_per_s)} images/s ({interval}), {promise.conditions}, model only.{asked}",
        f"It rests on {rests}{f' ({by})' if by else ''}.",
        "",
        *(f"- Doubt: {doubt}." for doubt in promise.doubts),
        *([""] if promise.doubts else []),
        "On the day the device is there, check it; what is measured is written for `convscale calibrate`:",
        "",
        "```sh",
        'convscale measure "this folder" --promised --output measured.jsonl',
        "```",
        "",
    ]


def with_promise(card: str, promise: Promise) -> str:
    """A model card with the section of a promise: in the place of an earlier one, else before the section on input."""
    lines = card.split("\n")
    if TITLE in lines:
        start = lines.index(TITLE)
        ends = [i for i, line in enumerate(lines) if i > start and line.startswith("## ")]
        end = ends[0] if ends else len(lines)
    else:
        headings = [i for i, line in enumerate(lines) if line.startswith("## ")]
        start = end = headings[0] if headings else len(lines)
    return "\n".join([*lines[:start], *promise_section(promise), *lines[end:]])
