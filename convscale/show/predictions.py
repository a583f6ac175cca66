"""What a trained network says of each test image, kept beside a run: so two runs can be compared image by image."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from convscale.errors import UserError
from convscale.files import write_text
from convscale.learn.record import PREDICTIONS
from convscale.read import OWN, json_of, object_of, read_text

if TYPE_CHECKING:
    from convscale.images.splits import Split
    from convscale.learn.evaluate import Evaluation

FILE = PREDICTIONS
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Of a test set with one label per image."""

    digest: str
    """Of the test set's names and labels: only equal ones can be compared."""
    classes: tuple[str, ...]
    """Names."""
    labels: tuple[int, ...]
    """True classes."""
    predicted: tuple[int, ...]
    """The network's."""

    @property
    def right(self) -> tuple[bool, ...]:
        """Image by image."""
        return tuple(label == said for label, said in zip(self.labels, self.predicted, strict=True))

    def save(self, path: Path) -> None:
        """Write them."""
        value = {
            "schema": SCHEMA,
            "digest": self.digest,
            "classes": self.classes,
            "labels": self.labels,
            "predicted": self.predicted,
        }
        write_text(path, json.dumps(value) + "\n")


def predictions_of(ev: Evaluation, read: Split, test: Split) -> Predictions:
    """From an evaluation on ``read``, what of ``test`` could be decoded; one label per image."""
    from convscale.images.digest import data_digest

    labels = read.labels.tolist()
    said = list(labels)
    for wrong in ev.wrong:
        said[wrong.index] = wrong.predicted
    return Predictions(
        digest=data_digest((test,)), classes=tuple(read.classes), labels=tuple(labels), predicted=tuple(said)
    )


def read_predictions(path: Path) -> Predictions:
    """
    Raises:
        UserError: the file is missing, damaged or of a newer version.
    """
    value = object_of(json_of(read_text(path, "predictions"), f"predictions {path}", OWN), f"predictions {path}")
    if not isinstance(value.get("schema"), int) or value["schema"] > SCHEMA:
        raise UserError(f"predictions {path} are of a newer version; update convscale")
    classes, digest = value.get("classes"), value.get("digest")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes) or type(digest) is not str:
        raise UserError(f"predictions {path} are damaged: digest must be text, classes a list of it")
    rows: list[tuple[int, ...]] = []
    for name in ("labels", "predicted"):
        found = value.get(name)
        if not isinstance(found, list) or not all(type(each) is int and 0 <= each < len(classes) for each in found):
            raise UserError(f"predictions {path} are damaged: {name} must be a list of classes by number")
        rows.append(tuple(found))
    if len(rows[0]) != len(rows[1]):
        raise UserError(f"predictions {path} are damaged: {len(rows[0])} labels, {len(rows[1])} predictions")
    return Predictions(digest=digest, classes=tuple(classes), labels=rows[0], predicted=rows[1])
