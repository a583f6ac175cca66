"""The parts of what a run of ``fit`` writes down, as values. Any may be missing; one that is there has the type that
stands here.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from convscale.show.json_values import Open, from_json
from convscale.show.stated import Conditions, Machine
from convscale.speed.timing import WIDE_IQR, Measurement


@dataclass(frozen=True, kw_only=True)
class Timed(Open):
    """A measured speed: raw times, or the median and spread of an older record."""

    omitted = ("images_per_s", "iqr_rel", "warnings")

    model: str = ""
    conditions: Conditions | None = None
    environment: Machine | None = None
    times_s: tuple[float, ...] = ()
    """Seconds of each call."""
    notes: tuple[str, ...] = ()
    peak_bytes: int | None = None
    images_per_s: float | None = None
    """Where there are no raw times."""
    iqr_rel: float | None = None
    """Where there are no raw times."""
    warnings: tuple[str, ...] | None = None
    """Where there are no raw times."""

    @property
    def batch_size(self) -> int | None:
        """Images per call."""
        return self.conditions.batch_size if self.conditions else None

    @property
    def speed(self) -> float | None:
        """Images/s: as written, or batch over the median time."""
        if self.images_per_s is not None:
            return self.images_per_s
        return self.batch_size / statistics.median(self.times_s) if self.times_s and self.batch_size else None

    @property
    def spread(self) -> float | None:
        """Interquartile range as a share of the median: as written, or from the raw times (four or more)."""
        if self.iqr_rel is not None:
            return self.iqr_rel
        if len(self.times_s) < 4:
            return None
        low, middle, high = statistics.quantiles(self.times_s, n=4, method="inclusive")
        return (high - low) / middle

    @property
    def quartiles(self) -> tuple[float, float] | None:
        """Images/s at the slower and the faster quartile of the times; by the spread where there are no raw times."""
        middle = self.speed
        if middle is None:
            return None
        if len(self.times_s) >= 4 and self.batch_size:
            fast, _, slow = statistics.quantiles(self.times_s, n=4, method="inclusive")
            return self.batch_size / slow, self.batch_size / fast
        half = (self.spread or 0) / 2
        return (middle * (1 - half), middle * (1 + half)) if half else None

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why not to trust the median, and what was noted with it, one line each."""
        found = self.warnings
        if found is None:
            found = ()
            if 0 < len(self.times_s) < 4:
                found = (f"only {len(self.times_s)} time(s): the spread is not known",)
            elif self.spread is not None and self.spread > WIDE_IQR:
                found = (
                    f"wide spread: the interquartile range is {self.spread:.0%} of the median; "
                    "is something else running?",
                )
        return (*found, *self.notes)

    @classmethod
    def of(cls, measurement: Measurement) -> Timed:
        """A measurement as it is written down."""
        return from_json(cls, measurement.to_dict(), "measurement")


@dataclass(frozen=True, kw_only=True)
class Constraint(Open):
    """What was asked for."""

    omitted = ("max_latency_ms", "max_memory_gb", "max_params_m", "confidence")

    min_throughput: float | None = None
    """Images/s; where none was asked for, what the run settled on."""
    conditions: Conditions | None = None
    max_latency_ms: float | None = None
    max_memory_gb: float | None = None
    max_params_m: float | None = None
    confidence: float | None = None
    """With what probability a predicted speed must keep it."""


@dataclass(frozen=True, kw_only=True)
class FrontRow(Open):
    """One network that no other beats in both accuracy and speed."""

    name: str = "?"
    image_size: int | None = None
    top1: float | None = None
    """Published, in percent."""
    images_per_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Data(Open):
    """What was learned from."""

    name: str | None = None
    path: str | None = None
    classes: tuple[str, ...] = ()
    channels: int | None = None
    image_size: int | None = None
    """Side in pixels that candidates were built for."""
    train: int | None = None
    """Images."""
    validation: int | None = None
    test: int | None = None
    digest: str | None = None
    """Of names and labels; the same for the same data."""
    test_digest: str | None = None
    """Of those of the test images; None in older records."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Brief(Open):
    """A finalist's brief training."""

    epochs: int | None = None
    top1: float | None = None
    """Of the validation images, of 1."""
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Predicted(Open):
    """A predicted speed."""

    omitted = ("precision",)

    images_per_s: float | None = None
    low: float | None = None
    """Lower end of the 80 % interval."""
    high: float | None = None
    bound_by: str | None = None
    """What binds it."""
    doubts: tuple[str, ...] = ()
    precision: str | None = None
    """Where it is another than was asked for."""


@dataclass(frozen=True, kw_only=True)
class Probed(Open):
    """What a pretrained network's features are worth, before any training."""

    omitted = ("folds",)

    top1: float | None = None
    """Of the images that it was judged on, of 1; mean average precision for several labels."""
    train: int | None = None
    """Images that the head was solved on."""
    validation: int | None = None
    """Images that it was judged on."""
    folds: int | None = None
    """Heads that were each judged on what they had not seen; None: one, on validation."""
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Candidate(Open):
    """One network and what became of it."""

    omitted = (
        *("kept", "finalist", "reason", "brief"),
        *("tuned", "predicted", "published_top1", "weights", "licence", "extra_data", "probe", "spec", "origin"),
    )

    name: str = "?"
    family: str | None = None
    image_size: int | None = None
    params: int | None = None
    macs: int | None = None
    scaling: Mapping[str, float | None] | None = None
    """Multipliers of the baseline."""
    measurement: Timed | None = None
    """In one runtime as it comes; None: not timed."""
    tuned: Timed | None = None
    """In the form and settings in which it would ship; None: not timed so."""
    predicted: Predicted | None = None
    """For a device that is not here."""
    published_top1: float | None = None
    """On ImageNet-1k, in percent."""
    weights: str | None = None
    """The file that it starts from, or ``pretrained`` for the hub's; None: nothing."""
    spec: Mapping[str, object] | None = None
    """The architecture, so that a resumed run can build it."""
    origin: str | None = None
    """Of a network of other code who builds it, as in ``Foreign``: an own one may have its name."""
    licence: str | None = None
    """Of the weights."""
    extra_data: str | None = None
    """Images beside ImageNet-1k's that the weights were trained on; empty: none; None: not known."""
    probe: Probed | None = None
    kept: bool | None = None
    """Whether it is fast enough; None: not yet judged."""
    finalist: bool | None = None
    reason: str | None = None
    """Why it was kept or lost."""
    brief: Brief | None = None

    @property
    def timed(self) -> Timed | None:
        """As it would ship where it was timed so, else as it comes."""
        return self.tuned or self.measurement

    @property
    def images_per_s(self) -> float | None:
        """Median speed, or the middle of a prediction; None where there is neither."""
        return self.timed.speed if self.timed else self.predicted.images_per_s if self.predicted else None

    @property
    def iqr_rel(self) -> float | None:
        """Interquartile range of the speed as a share of the median."""
        return self.timed.spread if self.timed else None

    @property
    def brief_top1(self) -> float | None:
        """Validation accuracy after the brief training, of 1."""
        return self.brief.top1 if self.brief else None

    @property
    def early_top1(self) -> float | None:
        """What was known of its accuracy before the full training, of 1: after the brief one, else by its features."""
        return self.brief_top1 if self.brief else self.probe.top1 if self.probe else None

    @property
    def low(self) -> float:
        """Speed at the slower quartile of its times; 0 where it was not measured."""
        return self._quartiles()[0]

    @property
    def high(self) -> float:
        """Speed at the faster quartile."""
        return self._quartiles()[1]

    def _quartiles(self) -> tuple[float, float]:
        speed = self.images_per_s or 0.0
        if self.timed is None and self.predicted is not None:
            return self.predicted.low or speed, self.predicted.high or speed
        return (self.timed.quartiles if self.timed else None) or (speed, speed)


@dataclass(frozen=True, kw_only=True)
class Winner(Open):
    """What was chosen, and how good it is."""

    omitted = ("image_size", "validation_top1", "test_top1", "weights", "licence", "extra_data")

    name: str | None = None
    image_size: int | None = None
    """Side in pixels; None: an older record, whose candidates have a name each."""
    reason: str | None = None
    validation_top1: float | None = None
    test_top1: float | None = None
    weights: str | None = None
    """What its training started from; None: nothing."""
    licence: str | None = None
    """Of these weights; None: not known."""
    extra_data: str | None = None
    """As of a candidate."""


@dataclass(frozen=True, kw_only=True)
class Epoch(Open):
    """One epoch of the full training."""

    epoch: int | None = None
    train_loss: float | None = None
    val_loss: float | None = None
    val_top1: float | None = None
    lr: float | None = None
    images_per_s: float | None = None
    seconds: float | None = None
    """Since the training began."""


@dataclass(frozen=True, kw_only=True)
class Evaluation(Open):
    """How good the trained network is on the test set."""

    omitted = ("mean_average_precision", "baseline")

    n: int | None = None
    top1: float | None = None
    top1_interval: tuple[float, ...] | None = None
    """95 %, low and high."""
    top5: float | None = None
    confusion: tuple[tuple[int, ...], ...] = ()
    """Images by true class (row) and said class (column)."""
    per_class: tuple[float | None, ...] = ()
    """Share that is right; None for a class without images."""
    calibration_error: float | None = None
    mean_average_precision: float | None = None
    """For several labels per image, else None."""
    baseline: float | None = None
    """What always saying the most frequent class of the train set would reach."""


@dataclass(frozen=True, kw_only=True)
class Doubtful(Open):
    """A train image whose label is probably wrong."""

    name: str | None = None
    given: str | None = None
    """Its label; None: it lacks the one suggested (several labels per image)."""
    suggested: str | None = None
    """What it looks like; None: the label given should go (several labels per image)."""
    confidence: float | None = None
    """The network's probability for what is given."""
    suggested_confidence: float | None = None


@dataclass(frozen=True, kw_only=True)
class Mistake(Open):
    """A test image that it got wrong."""

    omitted = ("map", "map_method")

    name: str | None = None
    true: object = None
    """A class's name or number."""
    predicted: object = None
    confidence: float | None = None
    image: str = ""
    """A data URI."""
    map: str | None = None
    """A data URI: the picture as the network sees it, under the map of the class that it said."""
    map_method: str | None = None
    """``cam`` or ``occlusion``; None beside a map: ``cam``."""


@dataclass(frozen=True, kw_only=True)
class Verification(Open):
    """How the artefact compares with the trained network."""

    omitted = ("accuracy_before_interval", "accuracy_after_interval")

    n: int | None = None
    top1_agreement: float | None = None
    max_abs: float | None = None
    max_rel: float | None = None
    passed: bool | None = None
    reason: str | None = None
    accuracy_before: float | None = None
    """Of 1; for several labels mean average precision."""
    accuracy_before_interval: tuple[float, ...] | None = None
    """95 %, low and high."""
    accuracy_after: float | None = None
    accuracy_after_interval: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Form(Open):
    """A form that was tried: its speed and settings, or why there is none."""

    omitted = (
        "runtime",
        "threads",
        "streams",
        "batch_size",
        "images_per_s",
        "latency_s",
        "withheld",
        "failed",
        "skipped",
    )

    runtime: str | None = None
    threads: int | None = None
    streams: int | None = None
    batch_size: int | None = None
    images_per_s: float | None = None
    latency_s: float | None = None
    withheld: str | None = None
    failed: str | None = None
    skipped: str | None = None


@dataclass(frozen=True, kw_only=True)
class Search(Open):
    """What the search for the fastest form came to."""

    omitted = ("gain_interval",)

    goal: str | None = None
    winner: str | None = None
    gain: float | None = None
    gain_interval: tuple[float, ...] | None = None
    """Its ends by the middle halves of both."""
    usual: Form | None = None
    forms: Mapping[str, Form] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class FloatLayers(Open):
    """One try of the quantiser: which layers stayed in float, and what the others cost."""

    float_layers: tuple[str, ...] = ()
    drop_points: float | None = None


@dataclass(frozen=True, kw_only=True)
class Int8(Open):
    """How 8 bits were made."""

    max_drop: float | None = None
    layers: int | None = None
    calibration_images: int | None = None
    steps: tuple[FloatLayers, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Shipped(Open):
    """The artefact."""

    omitted = ("predicted",)

    path: str | None = None
    """Folder, below the run's."""
    format: str | None = None
    precision: str | None = None
    """What it is computed in where it was timed."""
    opset: int | None = None
    bytes: int | None = None
    measurement: Timed | None = None
    runtime: Mapping[str, object] = field(default_factory=dict)
    search: Search | None = None
    int8: Int8 | None = None
    keeps_constraint: bool | None = None
    predicted: Predicted | None = None
    """The speed predicted for it, where it ships in another precision than it was chosen in."""


@dataclass(frozen=True, kw_only=True)
class RecipeFacts(Open):
    """How it was trained."""

    name: str | None = None
    source: str | None = None
