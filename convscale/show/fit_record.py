"""What a run of ``fit`` writes down, as a value: ``fit.json`` is a ``FitRecord`` in JSON.

Any part may be missing, since a run writes its record as it goes; a part that is there has the type that stands here.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from convscale import words
from convscale.errors import UserError
from convscale.files import write_json
from convscale.read import OWN, read_json
from convscale.show.fit_parts import (
    Brief,
    Candidate,
    Constraint,
    Data,
    Doubtful,
    Epoch,
    Evaluation,
    FrontRow,
    Mistake,
    Predicted,
    Probed,
    Shipped,
    Verification,
    Winner,
)
from convscale.show.json_values import Open, from_json, to_json
from convscale.show.stated import Machine
from convscale.stats import wilson

SCHEMA = 1
"""Of ``fit.json``: a reader refuses newer ones."""
FILE = "fit.json"


@dataclass(frozen=True, kw_only=True)
class FitRecord(Open):
    """A run of ``fit``."""

    schema: int = SCHEMA
    request: Mapping[str, object] = field(default_factory=dict)
    """What was asked for, as plain values."""
    request_digest: str | None = None
    """Of the request: only the same one is resumed."""
    created: str | None = None
    """When it began, ISO 8601."""
    command: str | None = None
    constraint: Constraint = field(default_factory=Constraint)
    commit: str | None = None
    """What the repository that it was started in stood at."""
    environment: Mapping[str, object] = field(default_factory=dict)
    """The machine, and whatever else was written of it."""
    data: Data = field(default_factory=Data)
    data_warnings: tuple[str, ...] | None = None
    """What is odd about the data, one line each."""
    front: tuple[FrontRow, ...] = ()
    """What this device can do, where no speed was asked for."""
    candidates: tuple[Candidate, ...] = ()
    choice_notes: tuple[str, ...] = ()
    """How candidates were found, and what could not be had, one line each."""
    winner: Winner = field(default_factory=Winner)
    history: tuple[Epoch, ...] = ()
    recipe: Mapping[str, object] = field(default_factory=dict)
    """Every key of the recipe."""
    training_notes: tuple[str, ...] | None = None
    cost: str | None = None
    """What the training cost, in words."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    wrong: tuple[Mistake, ...] | None = None
    doubtful: tuple[Doubtful, ...] | None = None
    """Train images that are most likely mislabelled, the most doubtful first."""
    left_out: tuple[str, ...] | None = None
    """Test images that could not be read, one line each."""
    verification: Verification = field(default_factory=Verification)
    artifact: Shipped = field(default_factory=Shipped)
    missed: str | None = None
    """By how much the constraint is missed, in words; None: it is kept, or was not asked for."""
    timings: Mapping[str, float] = field(default_factory=dict)
    """Seconds by step."""

    @property
    def machine(self) -> Machine:
        """Where it ran."""
        return from_json(Machine, self.environment, "environment")

    @property
    def top1(self) -> float | None:
        """Share of the test set that the trained network gets right; mean average precision for several labels."""
        if self.evaluation.mean_average_precision is not None:
            return self.evaluation.mean_average_precision
        return self.winner.test_top1 if self.evaluation.top1 is None else self.evaluation.top1

    @property
    def chosen(self) -> Candidate | None:
        """The candidate that was chosen."""
        winner = self.winner
        named = (c for c in self.candidates if c.name == winner.name)
        return next((c for c in named if winner.image_size in (None, c.image_size)), None)

    @property
    def foretold(self) -> Predicted | None:
        """The speed predicted for what ships: in the precision that it ships in, where that is another than it was
        chosen in, by a prediction or by a measurement on the device.
        """
        return self.artifact.predicted or (self.chosen.predicted if self.chosen else None)

    def state_of(self, candidate: Candidate) -> str:
        """``winner``, ``finalist``, ``kept`` or ``rejected``."""
        chosen = self.chosen
        if chosen is not None and (candidate.name, candidate.image_size) == (chosen.name, chosen.image_size):
            return "winner"
        if candidate.finalist:
            return "finalist"
        return "kept" if self.keeps(candidate) else "rejected"

    def keeps(self, candidate: Candidate) -> bool:
        """Whether a candidate keeps the speed asked for; where nothing does, not even a finalist."""
        kept, speed, asked = candidate.kept, candidate.images_per_s, self.constraint.min_throughput
        if kept is None:
            kept = speed is not None and (asked is None or speed >= asked)
        return kept

    def label_of(self, candidate: Candidate) -> str:
        """Its name, with the image size where the network is there at several."""
        several = len({c.image_size for c in self.candidates if c.name == candidate.name}) > 1
        return f"{candidate.name} @{candidate.image_size}" if several else candidate.name

    def sure_of(self, early: Brief | Probed) -> str:
        """The 95 % interval of what was known of a candidate before its full training, in words; empty where it is not
        known, as for several labels.
        """
        n = early.validation if isinstance(early, Probed) else self.data.validation
        if early.top1 is None or not n or self.evaluation.mean_average_precision is not None:
            return ""
        return words.interval(wilson(round(early.top1 * n), n))

    def fastest_first(self) -> list[Candidate]:
        """All candidates; those that were not timed last."""
        return sorted(self.candidates, key=lambda c: -(c.images_per_s or 0))

    def class_names(self) -> list[str]:
        """Names by index; made up where the record has fewer than its matrix."""
        names = list(self.data.classes)
        n = max(len(self.evaluation.confusion), len(self.evaluation.per_class), len(names))
        return [*names, *(f"class {i}" for i in range(len(names), n))]

    def to_json(self) -> dict[str, object]:
        """As plain JSON values; parts that the run has not come to are left out."""
        value = to_json(self)
        assert isinstance(value, dict)
        empty = FitRecord()
        unset = {f.name for f in dataclasses.fields(self) if getattr(self, f.name) == getattr(empty, f.name)}
        return {key: item for key, item in value.items() if key not in unset or key == "schema"}

    def save(self, folder: Path) -> None:
        """Write ``fit.json``, whole or not at all."""
        write_json(folder / FILE, self.to_json())


def fit_record(value: object, where: str = FILE) -> FitRecord:
    """A record from JSON values.

    Raises:
        UserError: not an object, a newer schema, or a part of the wrong kind.
    """
    if not isinstance(value, dict):
        raise UserError(f"{where} holds no object; run the fit again")
    schema = value.get("schema", 1)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise UserError(
            f"{where} has schema {schema!r}, this version of convscale reads up to {SCHEMA}; update convscale"
        )
    return from_json(FitRecord, value, where)


def read_fit(run_dir: str | os.PathLike[str]) -> FitRecord:
    """The ``fit.json`` of a run.

    Raises:
        UserError: the folder has none, it is damaged, or its schema is newer than this version reads.
    """
    path = Path(run_dir) / FILE
    if not path.is_file():
        raise UserError(f"{run_dir} holds no fit.json; name the output folder of a fit")
    return fit_record(read_json(path, "record", OWN), str(path))
