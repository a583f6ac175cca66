"""What annotations get wrong: counted, named, and bounded."""

from __future__ import annotations

from collections import Counter

from convscale.errors import UserError

PICTURES = {
    "missing": "pictures are not there",
    "unreadable": "pictures can not be read",
    "other size": "pictures have another size than their annotations say",
    "twice": "picture ids stand there twice; the first counts",
}
BOXES = {
    "no area": "boxes have no area (x2 <= x1 or y2 <= y1)",
    "outside": "boxes lie wholly outside their picture",
    "unknown class": "boxes are of a class that is not listed",
    "id twice": "boxes have an id that stood there before; the first counts",
    "no picture": "boxes are of a picture that is not listed",
    "no number": "boxes are not four finite numbers",
}
REPAIRED = {
    "cut": "boxes reached outside their picture and were cut",
    "turned": "pictures are turned by EXIF and their boxes were drawn before that; the boxes were turned too",
    "unsaid turn": "pictures are turned by EXIF and nothing says whether their boxes were drawn before that; they are "
    "taken as drawn on the upright picture",
    "crowd": "boxes are crowds or marked difficult; they are neither learnt nor counted as missed",
}
MOST_BAD_BOXES = 0.05
"""Share of boxes that may be left out."""


class Faults:
    """Counts what is wrong, with the first place of each kind."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, kind: str, where: str) -> None:
        """One more of a kind."""
        self.counts[kind] += 1
        self.first.setdefault(kind, where)

    def tell(self, line: str) -> None:
        """What is to be known of the set's files."""
        self.told.append(line)

    def count(self, kinds: dict[str, str]) -> int:
        """How many there are of several kinds."""
        return sum(self.counts[kind] for kind in kinds)

    def notes(self) -> tuple[str, ...]:
        """What was told, and a line for each kind."""
        lines = [*self.told]
        for kinds, done in ((PICTURES, "left out: "), (BOXES, "left out: "), (REPAIRED, "")):
            for kind, words in kinds.items():
                if count := self.counts[kind]:
                    lines.append(f"{done}{count:,} {words} (first: {self.first[kind]})")
        return tuple(lines)

    def check(self, where: str, pictures: int, boxes: int, max_bad_rate: float) -> None:
        """
        Raises:
            UserError: more pictures than ``max_bad_rate`` of them, or more than 5 % of the boxes, were left out (one of
                each always may be).
        """
        for kinds, total, share, what in (
            (PICTURES, pictures, max_bad_rate, "pictures"),
            (BOXES, boxes, MOST_BAD_BOXES, "boxes"),
        ):
            bad = self.count(kinds)
            if bad <= max(1, share * total):
                continue
            kind = max(kinds, key=lambda each: self.counts[each])
            raise UserError(
                f"{where}: {bad:,} of {total:,} {what} can not be used, at most {share:.1%} may be; most: "
                f"{self.counts[kind]:,} {kinds[kind]} (first: {self.first[kind]})"
            )
