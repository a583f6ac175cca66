"""Speeds of networks as points to draw: measured, predicted and published ones told apart, each with its conditions and
its accuracy's source.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from convscale import words
from convscale.arch.spec import NetSpec
from convscale.arch.zoo import ARCHITECTURES, get_tag
from convscale.choice.basis import device_title
from convscale.conditions import Size
from convscale.errors import UserError, nearest
from convscale.networks.names import is_spec_of
from convscale.networks.released import released
from convscale.show.fit_parts import Timed
from convscale.show.stated import Conditions
from convscale.speed.records import Record

if TYPE_CHECKING:
    from convscale.predictor.predict import Prediction

KINDS = ("measured", "predicted", "published")


@dataclass(frozen=True, kw_only=True)
class SpeedPoint:
    """One network's speed under stated conditions.

    Raises:
        UserError: the kind is unknown, or the speed is not above 0.
    """

    name: str
    """The network's name, with the weights' tag where the accuracy is that tag's."""
    images_per_s: float
    """Median images/s."""
    kind: str = "measured"
    """``measured``, ``predicted`` or ``published``."""
    family: str = ""
    """What it is grouped by; empty: looked up by name."""
    device: str = ""
    """The device in words."""
    conditions: Conditions = field(default_factory=Conditions)
    """What it holds under."""
    low: float | None = None
    """Lower end of the speed's interval: 80 % of a prediction, interquartile of a measurement."""
    high: float | None = None
    """Upper end."""
    top1: float | None = None
    """ImageNet-1k validation accuracy in percent; None: none is claimed."""
    weights: str = ""
    """The weights that ``top1`` is of, recipe included."""
    accuracy_source: str = ""
    """Who published ``top1``."""
    params: float | None = None
    """Parameters."""
    macs: float | None = None
    """Multiply-accumulates per image."""
    bound_by: str = ""
    """What binds a predicted network: compute, memory or launch."""
    chosen: bool = False
    """Whether it is the one that was chosen among all of them."""
    notes: tuple[str, ...] = ()
    """Doubts of a prediction, warnings of a measurement, the source of a published figure."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"kind {self.kind!r} is unknown{nearest(self.kind, KINDS)}")
        if not self.images_per_s > 0:
            raise UserError(f"{self.name}: images_per_s must be above 0, got {self.images_per_s!r}")
        if not self.family:
            object.__setattr__(self, "family", family_of(self.name))

    @property
    def setting(self) -> str:
        """What points must share to stand in one picture: device, mode, precision, layout, a CPU's runtime."""
        c = self.conditions
        mode = {"train": "training", "infer": "inference"}.get(c.mode or "")
        text = ", ".join(part for part in (self.device, mode, c.runtime, c.precision, c.layout) if part)
        return text or str(Conditions())


def family_of(name: str) -> str:
    """The family of a named architecture; for names that are not ours, their letters before the first digit or
    underscore.
    """
    arch = name.partition(".")[0]
    if arch in ARCHITECTURES:
        return ARCHITECTURES[arch].family
    head = arch.removeprefix("tf_")
    end = next((i for i, letter in enumerate(head) if not letter.isalpha()), len(head))
    return head[:end] or "other"


class PublishedAccuracy(NamedTuple):
    """What somebody published of released weights; the fields of a point."""

    top1: float | None = None
    """Percent."""
    weights: str = ""
    """The weights, recipe included."""
    source: str = ""
    """Who published it."""


def published_accuracy(name: str, image_size: Size | None) -> PublishedAccuracy:
    """The accuracy that somebody published at this size; without a figure where nobody did.

    A name without a tag stands for its default weights. A size without a published figure has none: accuracy is not
    interpolated.
    """
    try:
        tag = get_tag(name)
    except UserError:
        if (tag := released().get(name.removeprefix("timm/"))) is None:
            return PublishedAccuracy()
    size = image_size or tag.image_size
    result = next((result for result in tag.results if result.image_size == size), None)
    return PublishedAccuracy() if result is None else PublishedAccuracy(result.top1, tag.name, result.source)


def from_record(record: Record) -> SpeedPoint:
    """A measured point."""
    m = record.measurement
    named = m.conditions.device not in ("cpu", "") and not m.conditions.device.startswith("cuda")
    low, high = Timed.of(m).quartiles or (None, None)
    accuracy = published_accuracy(record.model, m.conditions.image_size) if _is_named(record) else PublishedAccuracy()
    return SpeedPoint(
        name=record.model,
        images_per_s=m.images_per_s,
        device=device_title(m.conditions.device) if named else m.environment.device_name,
        conditions=Conditions.of(m.conditions.to_dict()),
        low=low,
        high=high,
        top1=accuracy.top1,
        weights=accuracy.weights,
        accuracy_source=accuracy.source,
        params=record.params,
        macs=record.macs,
        notes=(*m.warnings, *m.notes),
    )


def _is_named(record: Record) -> bool:
    """Whether a record is of what its name stands for: a spec in it may be another network's that kept the name."""
    if record.spec is None:
        return True
    try:
        return is_spec_of(record.model, NetSpec.from_dict(dict(record.spec)))
    except UserError:
        return False


def from_prediction(
    name: str, prediction: Prediction, *, params: float | None = None, macs: float | None = None
) -> SpeedPoint:
    """A predicted point."""
    conditions = prediction.conditions
    accuracy = published_accuracy(name, conditions.image_size)
    return SpeedPoint(
        name=name,
        kind="predicted",
        images_per_s=prediction.images_per_s,
        device=device_title(conditions.device),
        conditions=Conditions.of(conditions.to_dict()),
        low=prediction.low,
        high=prediction.high,
        top1=accuracy.top1,
        weights=accuracy.weights,
        accuracy_source=accuracy.source,
        params=params,
        macs=macs,
        bound_by=prediction.bound_by,
        notes=prediction.doubts,
    )


def points_of(records: Iterable[Record | SpeedPoint]) -> list[SpeedPoint]:
    """Records and ready points as points, fastest first."""
    points = [record if isinstance(record, SpeedPoint) else from_record(record) for record in records]
    return sorted(points, key=lambda p: -p.images_per_s)


def by_setting(points: Iterable[SpeedPoint]) -> dict[str, list[SpeedPoint]]:
    """Points that may stand in one picture, the largest group first."""
    groups: dict[str, list[SpeedPoint]] = {}
    for point in points:
        groups.setdefault(point.setting, []).append(point)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def front(points: Sequence[SpeedPoint]) -> list[SpeedPoint]:
    """The points that no other beats in both speed and accuracy, fastest first; those without accuracy are left out."""
    best: list[SpeedPoint] = []
    known = [p for p in points if p.top1 is not None]
    for p in sorted(known, key=lambda p: (-p.images_per_s, -(p.top1 or 0))):
        if not best or (p.top1 or 0) > (best[-1].top1 or 0):
            best.append(p)
    return best


def told_apart(series: Sequence[tuple[str, str]]) -> tuple[str, list[str]]:
    """What (setting, kind) pairs share, and what tells each from the others, in words."""
    parts = [[*words.device(setting).split(", "), kind] for setting, kind in series]
    shared = [part for part in parts[0] if all(part in other for other in parts)] if parts else []
    names = [", ".join(part for part in own if part not in shared) for own in parts]
    return ", ".join(shared), [name or shared[-1] for name in names]


def hover_lines(p: SpeedPoint) -> list[str]:
    """What is said of a point when pointed at, plain text."""
    interval = ""
    if p.low is not None and p.high is not None:
        what = "80 % interval" if p.kind == "predicted" else "interquartile"
        interval = f" ({what} {words.rate(p.low)} to {words.rate(p.high)})"
    lines = [f"{words.rate(p.images_per_s)} images/s, {p.kind}{interval}"]
    if p.top1 is not None:
        lines.append(
            f"top-1 {words.accuracy(p.top1)} "
            f"({p.weights or 'weights not named'}; {p.accuracy_source or 'source not named'})"
        )
    lines.append(str(replace(p.conditions, device=p.device or p.conditions.device)))
    counts = [f"{words.large(p.params)} params" if p.params else "", f"{words.large(p.macs)} MACs" if p.macs else ""]
    lines.append(", ".join(part for part in counts if part))
    lines.append(f"bound by {p.bound_by}" if p.bound_by else "")
    lines.extend(p.notes)
    return [words.shortened(line, 110) for line in lines if line]
