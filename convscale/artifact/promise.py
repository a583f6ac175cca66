"""The speed that an artefact was promised for a device that was not there, kept in its record until it is confirmed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from convscale.errors import UserError
from convscale.words import exact

KEY = "promise"
"""Of an artefact's record."""


@dataclass(frozen=True, kw_only=True)
class Promise:
    """A predicted speed under stated conditions."""

    device: str
    """A named device (``l4``)."""
    title: str
    """The maker's name of it."""
    runtime: str
    """What the prediction is for: ``compiled``, ``eager`` ..."""
    precision: str
    """Of the computation."""
    batch_size: int
    """Images per call."""
    image_size: int
    """Side in pixels."""
    images_per_s: float
    """The middle of the prediction."""
    low: float
    """Lower end of its 80 % interval."""
    high: float
    """Upper end."""
    asked: float | None = None
    """Images/s that had to be kept; None: none were asked for."""
    confidence: float | None = None
    """Probability with which the prediction keeps them."""
    doubts: tuple[str, ...] = ()
    """Reasons to trust it less."""

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.images_per_s <= self.high:
            raise UserError(
                f"a promise of {self.images_per_s!r} images/s from {self.low!r} to {self.high!r} is none; the middle "
                "must lie between the ends, all above 0"
            )

    def __str__(self) -> str:
        """In words, for a model card."""
        doubts = f"; doubts: {'; '.join(self.doubts)}" if self.doubts else ""
        asked = f", asked for {exact(self.asked)}" if self.asked else ""
        return (
            f"{exact(self.images_per_s)} images/s predicted (80 %: {exact(self.low)} to {exact(self.high)}) on "
            f"{self.title}, {self.runtime}, {self.precision}, batch {self.batch_size}, {self.image_size} px{asked}; "
            f"not measured there: `convscale measure FOLDER --promised` does so on the card{doubts}"
        )

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        return {**asdict(self), "doubts": list(self.doubts)}

    @classmethod
    def from_dict(cls, values: object, where: str) -> Promise:
        """The inverse of ``to_dict``.

        Raises:
            UserError: something is missing or of another kind; ``where`` says whose it is.
        """
        if not isinstance(values, Mapping):
            raise UserError(f"{where} has a damaged promise; export it again")
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        try:
            return cls(**{**known, "doubts": tuple(known.get("doubts", ()))})
        except TypeError as error:
            raise UserError(f"{where} has a damaged promise; export it again") from error
