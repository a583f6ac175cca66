"""Of which candidates the weights can be had, and what it costs that those of others can not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from convscale.choice.basis import Basis
from convscale.choice.candidates import Candidate
from convscale.choice.decide import Option, judge
from convscale.choice.facts import SizedSpec
from convscale.choice.measured import guess, sized_spec_of
from convscale.choice.rows import Rows, as_it_is, by_rows
from convscale.choice.speeds import facts_of, traced_before
from convscale.conditions import Constraint
from convscale.networks.weight_files import WeightFiles

NAMED = 5
"""Networks that a note names at most."""
AT_ONCE = 64
"""Networks that are looked at together for whether one of them should keep a speed."""


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

    def lost(self, better: Candidate | None, mine: float | None, *, looked: bool) -> str:
        """A line on what it costs that so many can not be had.

        Args:
            better: the best of them that should keep the speed, where it is better than what was found.
            mine: published accuracy of the best that was found, percent; None: there is none.
            looked: whether anything is known of the speed of some that are better.
        """
        out = {candidate.name for candidate in self.unreached}
        whole = len(out | {candidate.name for candidate, _ in self.found})
        cost = "none of them is known to keep the speed and to be more accurate"
        if not looked:
            cost = "whether one of them keeps the speed and is more accurate is not known"
        if better is not None:
            gain = (
                f"is published with {better.top1:.1f} %" if mine is None else f"has {_gain(better, mine)} points more"
            )
            cost = f"the best of them that should keep the speed, {better.label}, {gain}"
        return (
            f"the weights of {len(out):,} of {whole:,} released networks can not be had here (the hub does not answer; "
            f"--weights-dir DIR gives files): {cost}"
        )


def _gain(better: Candidate, mine: float) -> str:
    return f"{(better.top1 or 0.0) - mine:.1f}"


def best_out_of_reach(
    unreached: Sequence[Candidate],
    least: float,
    options: Sequence[Option],
    basis: Basis,
    constraint: Constraint,
    rows: Rows | None,
    seen: Callable[[Option], Option] = as_it_is,
) -> tuple[Candidate | None, bool]:
    """Of candidates whose weights can not be had, the most accurate above ``least`` percent that should keep a
    constraint: by its prediction, or by its counts and what was measured. Nothing is traced or timed for it, so it is
    of those whose workload travels with the package.

    Args:
        unreached: the candidates.
        least: published accuracy, percent.
        options: what could be had, measured or predicted.
        basis, constraint, rows, seen: as for ``choose_from``.

    Returns:
        It, or None where there is none; and whether the speed of any that is accurate enough could be told: True where
        none is.
    """
    speeds = {sized_spec_of(o): o.speed for o in options if o.speed is not None}
    known = {sized_spec_of(o): o.facts for o in options}
    floor = constraint.floor(basis.conditions.batch_size)

    def keeps(o: Option) -> bool | None:
        verdict = judge(seen(o), constraint)[0]
        if verdict != "unknown":
            return verdict == "yes"
        guessed = None
        if not basis.predicted:
            guessed = guess(sized_spec_of(o), {**known, sized_spec_of(o): o.facts}, speeds)
        return None if guessed is None else guessed[0] >= floor

    better = [candidate for candidate in unreached if (candidate.top1 or 0.0) > least]
    better.sort(key=lambda candidate: -(candidate.top1 or 0.0))
    looked = not better
    for start in range(0, len(better), AT_ONCE):
        some = [(candidate, SizedSpec(candidate.spec, candidate.image_size)) for candidate in better[start:][:AT_ONCE]]
        facts = traced_before([one for _, one in some], basis)
        facts = by_rows({**facts, **facts_of(rows.measured, basis)}, rows) if rows else facts
        for candidate, one in some:
            if one not in facts:
                continue
            kept = keeps(Option(candidate=candidate, facts=facts[one], batch_size=basis.conditions.batch_size))
            if kept:
                return candidate, True
            looked = looked or kept is not None
    return None, looked


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
                found.append((candidate, files.given.get(candidate.name)))
            continue
        if not (candidate.published or named) or (files.given and candidate.name not in files.given):
            continue
        if (place := files.reach(candidate.name)) is not None:
            found.append((candidate, place))
        else:
            unreached.append(candidate)
    return Reached(found=tuple(found), unreached=tuple(unreached))
