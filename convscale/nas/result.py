"""What a search found: as a value, and read back from its folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from convscale.arch.spec import NetSpec
from convscale.choice.basis import Basis
from convscale.choice.decide import describe_speed
from convscale.choice.facts import Speed
from convscale.conditions import Conditions
from convscale.errors import UserError, first_line
from convscale.files import json_numbers
from convscale.nas.records import STATES, Reward, TrialRecord, conditions_from, difference, front_of, speed_from
from convscale.nas.sampling import Linear, features
from convscale.nas.space import SearchSpace
from convscale.nas.trial import Result
from convscale.read import OWN, read_json
from convscale.words import exact

SCHEMA = 1
"""Of ``study.json``; a reader refuses newer ones."""
RECORD = "study.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """What a search found: as a value, and read back from its folder."""

    output: Path
    """Its folder: ``best.yaml``, ``study.json``, ``journal.log``, ``speeds.jsonl``."""
    space: SearchSpace
    """What was searched."""
    reward: Reward
    """What makes one network better than another."""
    basis: Basis
    """Under what conditions speeds hold."""
    trials: tuple[TrialRecord, ...]
    """All candidates in the order of asking."""
    shipped: Speed | None = None
    """The best network's speed in the fastest form it can ship in; None: nothing was tuned."""
    chosen: int | None = None
    """The number of the best trial that keeps the speed in that form too; None: the one with the highest value."""
    times: dict[str, float] = field(default_factory=dict)
    """Seconds in training, in finding speeds, in waiting for images, and in all, over every call."""

    @property
    def best(self) -> TrialRecord:
        """The trial with the highest value, the fastest of them.

        Raises:
            UserError: none was trained to its end.
        """
        trained = [trial for trial in self.trials if trial.value is not None]
        if not trained:
            raise UserError(f"no trial of {self.output} was trained to its end; give it more minutes with resume")
        chosen = next((trial for trial in trained if trial.number == self.chosen), None)
        return chosen or max(trained, key=lambda trial: (trial.value or 0.0, trial.images_per_s or 0.0, -trial.number))

    @property
    def missed(self) -> str:
        """That none of the best networks keeps the speed in the form in which it would ship, in a sentence; empty where
        the best one does, or nothing was tuned.
        """
        if self.shipped is None or self.shipped.images_per_s >= self.reward.floor:
            return ""
        return (
            f"{self.best.spec.name} does not keep {exact(self.reward.floor)} images/s as it would ship "
            f"({describe_speed(self.shipped)}); of the best that were trained none does"
        )

    @property
    def front(self) -> tuple[TrialRecord, ...]:
        """Trained networks that no other beats in both accuracy and speed."""
        return front_of(self.trials)

    @property
    def importance(self) -> dict[str, float]:
        """How much of what a linear model says of the trained networks' values each choice decides, by the variable's
        name, the largest first; of all together 1. Empty for fewer than eight networks.
        """
        trained = [trial for trial in self.trials if trial.value is not None]
        if len(trained) < 8 or not self.space.variables:
            return {}
        sizes = self.space.sizes
        inputs = features(np.array([trial.genes for trial in trained]), sizes)
        weights = Linear.fitted(inputs, np.array([trial.value for trial in trained], dtype=float)).mean
        shares, start = {}, 0
        for variable, size in zip(self.space.variables, sizes, strict=True):
            columns = slice(start, start + size)
            shares[variable.name] = float((inputs[:, columns] @ weights[columns]).var())
            start += size
        total = sum(shares.values()) or 1.0
        return {name: share / total for name, share in sorted(shares.items(), key=lambda one: -one[1])}

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        return {
            "output": str(self.output),
            "space": self.space.name,
            "reward": {"text": str(self.reward), **vars(self.reward)},
            "conditions": self.basis.conditions.to_dict(),
            "best": self.best.to_dict(),
            "shipped": None if self.shipped is None else self.shipped.to_dict(),
            "missed": self.missed or None,
            "importance": self.importance,
            "front": [trial.number for trial in self.front],
            "trials": [trial.to_dict() for trial in self.trials],
            "chosen": self.chosen,
            "times": self.times,
        }

    def __str__(self) -> str:
        best = self.best
        counts: dict[str, int] = {}
        for trial in self.trials:
            counts[trial.state] = counts.get(trial.state, 0) + 1
        assert best.accuracy is not None
        states = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        lines = [
            f"{best.spec.name}: {100 * best.accuracy:.2f} % on validation after a brief training, "
            f"{describe_speed(best.speed)}",
            f"{len(self.trials)} candidates of the space {self.space.name}: {states}; wanted was {self.reward}",
        ]
        if self.shipped is not None:
            lines.insert(1, f"as it would ship: {describe_speed(self.shipped)}, {self.shipped.how}")
        return "\n".join([*lines, self.missed] if self.missed else lines)


def begun(folder: Path, asked: Mapping[str, object]) -> dict[str, Any]:
    """The record of an earlier call in a search's folder; empty where there is none.

    Args:
        folder: the search's.
        asked: what is asked now (``Request.written``).

    Raises:
        UserError: the record is damaged, or something else was asked for.
    """
    path = folder / RECORD
    if not path.is_file():
        return {}
    kept = read_json(path, "study", OWN)
    if not isinstance(kept, dict) or not isinstance(kept.get("asked"), dict):
        raise UserError(f"study {path} is damaged: it does not say what was asked for")
    if kept.get("schema") != SCHEMA:
        raise UserError(f"study {path} has schema {kept.get('schema')!r}, this convscale reads {SCHEMA}")
    if differs := difference(json_numbers(asked), kept["asked"]):
        raise UserError(f"the study in {folder} was begun with {differs}; ask for the same, or name another")
    return kept


def read_study(folder: str | os.PathLike[str]) -> Study:
    """The result of a search's folder.

    Raises:
        UserError: no search's folder, one that has no result yet, or a damaged one.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        raise UserError(f"{folder} is no search's folder: it has no {RECORD}")
    value = read_json(path, "study", OWN)
    try:
        if value["schema"] != SCHEMA:
            raise UserError(f"it has schema {value['schema']!r}, this convscale reads {SCHEMA}")
        if value["result"] is None:
            raise UserError("the search has no result yet; --resume goes on")
        result, space = value["result"], SearchSpace.from_dict(value["space"])
        reward = {key: item for key, item in result["reward"].items() if key != "text"}
        return Study(
            output=Path(folder),
            space=space,
            reward=Reward(**reward),
            basis=Basis(conditions=Conditions(**result["conditions"])),
            trials=tuple(_trial(row, space) for row in result["trials"]),
            shipped=speed_from(result["shipped"]),
            chosen=result["chosen"],
            times={str(name): float(seconds) for name, seconds in result["times"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, IndexError) as error:
        raise UserError(f"study {path} can not be read: {first_line(error)}") from error


def _trial(row: Mapping[str, Any], space: SearchSpace) -> TrialRecord:
    """The inverse of ``TrialRecord.to_dict``."""
    spec = NetSpec.from_dict({**row["spec"], "name": row["name"]})
    if row["state"] not in STATES:
        raise UserError(f"a trial's state is {row['state']!r}; it must be one of {', '.join(STATES)}")
    result = None
    if row["curve"] or row["seconds"] is not None:
        result = Result(
            number=int(row["number"]),
            curve=tuple(map(float, row["curve"])),
            pruned=len(row["curve"]) if row["state"] == "pruned" else 0,
            failed=str(row["reason"]) if row["state"] == "failed" else "",
            seconds=float(row["seconds"] or 0.0),
            wait_seconds=float(row["wait_seconds"] or 0.0),
            note=str(row.get("note", "")),  # earlier versions had none
        )
    return TrialRecord(
        number=int(row["number"]),
        genes=space.genes_of(spec),
        spec=spec,
        state=row["state"],
        speed=speed_from(row["speed"]),
        conditions=conditions_from(row.get("conditions")),
        params=int(row["params"]),
        macs=int(row["macs"]),
        factor=float(row["factor"]),
        seed=int(row["seed"]),
        parent=row["parent"],
        result=result,
        reason=str(row["reason"]),
    )
