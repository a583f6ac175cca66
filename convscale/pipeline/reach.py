"""Of which candidates the weights can be had."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from convscale.choice.candidates import Candidate
from convscale.networks.weight_files import WeightFiles

NAMED = 5
"""Networks that a note names at most."""


@dataclass(frozen=True, kw_only=True)
class Reached:
    """Candidates by whether their weights can be had."""

    found: tuple[tuple[Candidate, Path | str | None], ...]
    """Those that there are to choose from, with where their weights are; None: nobody released any."""
    unreached: tuple[Candidate, ...]
    """Those whose weights somebody released and that can not be had here."""

    @property
    def left_out(self) -> str:
        """A line on networks that were named and whose weights can not be had."""
        names = list(dict.fromkeys(candidate.name for candidate in self.unreached))
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        return f"left out, since their weights can not be had: {', '.join(names[:NAMED])}{more}"


def reach(pool: Sequence[Candidate], files: WeightFiles, *, named: bool) -> Reached:
    """Look for the weights of candidates.

    Args:
        pool: candidates.
        files: where weights are looked for.
        named: a user named them: what nobody released weights of is among them, and weights that nobody published a
            figure for.
    """
    found: list[tuple[Candidate, Path | str | None]] = []
    unreached: list[Candidate] = []
    for candidate in pool:
        if not candidate.licence:  # nobody released it: a spec, a module, a function, a bare architecture
            if named:
                found.append((candidate, None))
            continue
        if not (candidate.published or named) or (files.given and candidate.name not in files.given):
            continue
        if (place := files.reach(candidate.name)) is not None:
            found.append((candidate, place))
        else:
            unreached.append(candidate)
    return Reached(found=tuple(found), unreached=tuple(unreached))
