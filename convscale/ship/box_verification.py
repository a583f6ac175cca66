"""How a detector's artefact compares with the detector that it was made from, as a record."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from convscale.artifact.boxes import INSIDE
from convscale.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BoxVerification:
    """How a detector's artefact compares with the detector it was made from."""

    n: int
    """Pictures compared."""
    images: str
    """What they were: ``given`` or ``noise``."""
    batch_sizes: tuple[int, ...]
    """Batch sizes the artefact was run at."""
    boxes: int
    """Boxes of the trained detector above ``sure``."""
    sure: float
    """Score above which boxes are compared."""
    least_iou: float
    """IoU from which two boxes of a class are the same."""
    found_again: float
    """Share of the trained detector's boxes that the artefact gives too."""
    made_up: float
    """Share of the artefact's boxes that the trained detector does not give."""
    max_score: float
    """Largest difference between the best scores of a picture."""
    map_before: float | None = None
    """mAP of the trained detector in [0, 1]; None without truth."""
    map_after: float | None = None
    """Of the artefact."""
    ap50_before: float | None = None
    """AP at IoU 0.5 of the trained detector."""
    ap50_after: float | None = None
    """Of the artefact."""
    precision: str = "fp32"
    """The artefact's, which chooses the gate."""
    nms: str = INSIDE
    """Where non-maximum suppression is done."""
    max_drop: float | None = None
    """Points of mAP an INT8 artefact may lose."""
    passed: bool = False
    """Whether the gate lets it through."""
    reason: str = ""
    """Why, in one line."""

    @property
    def drop_points(self) -> float | None:
        """mAP lost, in points."""
        if self.map_before is None or self.map_after is None:
            return None
        return 100 * (self.map_before - self.map_after)

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


class BoxesWithheld(UserError):
    """A detector's artefact did not pass the gate and was not put under its final name."""

    def __init__(self, message: str, verification: BoxVerification) -> None:
        super().__init__(message)
        self.verification = verification
