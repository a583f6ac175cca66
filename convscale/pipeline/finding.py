"""The first half of ``fit``: which networks keep the speed, and of those the few that are worth training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from convscale.arch.spec import NetSpec
from convscale.choice.candidates import Candidate, candidates_of
from convscale.choice.choose import choose_from
from convscale.choice.decide import NothingKeeps, Option, judge, trade_of
from convscale.choice.facts import SizedSpec
from convscale.choice.knee import Front, survey
from convscale.choice.largest import Effort
from convscale.choice.measured import Bench, sized_spec_of
from convscale.choice.members import Found, families_for, largest_member, members
from convscale.conditions import Constraint
from convscale.cost.counting import count
from convscale.errors import DoesNotFit, UserError
from convscale.learn.recipe import Recipe
from convscale.networks.resolve import Named
from convscale.networks.weight_files import WeightFiles
from convscale.pipeline.again import NARROW, larger_again, timed_again
from convscale.pipeline.candidate_rows import (
    Verdicts,
    judged_row,
    options_near,
    row_of_option,
)
from convscale.pipeline.contender import Contender, Kept, at_own_size, build, name_to_find
from convscale.pipeline.data_head import as_on_data, judged_on_data, params_on
from convscale.pipeline.heads import candidates_with_head, with_head
from convscale.pipeline.probing import Prober
from convscale.pipeline.reach import NAMED, Reached, best_out_of_reach, reach
from convscale.pipeline.request import Given
from convscale.pipeline.smaller import LEAST_SIZE, least_sizes, smaller_sizes
from convscale.pipeline.timing import Timer
from convscale.words import odds, plural

BUDGET = 12
"""Networks that are measured at most, where this machine is the device."""
ROWS = 40
"""Candidates in the record, where there are hundreds."""
PROBED = 10
"""Networks whose features are tried on the data."""
MOST_GAIN = 16.0
"""A network that would have to be so many times as fast is not tuned: 10.2 times is the most that the form that ships
brought (results/ship.jsonl: ResNet-50 in 8 bits, with AMX, over ONNX Runtime)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Finder(Timer):
    """Looks for networks that keep a constraint, and writes down what it tried."""

    # ------------------------------------------------------------ released weights

    def released(self, files: WeightFiles) -> Kept | None:
        """Released weights that keep the constraint, at smaller images than published where none does as published, and
        specs that were named beside them; where nothing keeps it, scaled members that do, else what is as likely as not
        to, which counts as missed; None where no weights can be had.
        """
        reached = self._reached(files)
        pool = reached.found
        if not any(place is not None for _, place in pool):
            return None
        options = self._judged_options([candidate for candidate, _ in pool])
        if self.loaded:
            options = self._again(options)
        places = {candidate.name: place for candidate, place in pool}
        kept = self._keeping(options)
        if not kept and self.asked.image_size is None:
            options, kept = self._on_smaller_images(options)
        if self.asked.named is not None:
            self._say_left_out(options)
        timed = [o for o in options if o.images_per_s is not None and not o.candidate.why_not]
        if not timed:
            return self._small_enough(reached, options)
        timed = [o for o in timed if judge(o, self._sizes_alone)[0] != "no"] or timed
        fastest = max(timed, key=lambda o: o.images_per_s or 0.0)
        likely = kept or self._likely(options)
        best_first = sorted(likely, key=lambda o: (-o.accuracy, -(o.images_per_s or 0.0)))[:PROBED] or [fastest]
        self._write_options(options, best_first, places)
        self._say_out_of_reach(reached, best_first[0].top1 if kept else None, options)
        if not kept and self.asked.named is None:
            rival = math.inf if likely else self._rival(fastest)
            if (instead := self._members_instead(rival)) is not None:
                self._say_trade(None, options)
                return instead
        if kept:
            self._say_trade(best_first[0].top1, options)
        return Kept(
            contenders=tuple(self._contender(o, places[o.name]) for o in best_first),
            missed="" if kept else self._missed(likely, fastest),
        )

    @property
    def _sizes_alone(self) -> Constraint:
        """The limits on parameters and memory."""
        return replace(self.constraint, min_throughput=None, max_latency_ms=None)

    def _rival(self, fastest: Option) -> float:
        """The speed of the fastest weights that a scaled member has to beat; 0 where they are too large."""
        return 0.0 if judge(fastest, self._sizes_alone)[0] == "no" else self.sure_of(fastest)

    def _on_smaller_images(self, options: tuple[Option, ...]) -> tuple[tuple[Option, ...], list[Option]]:
        """All options with those on smaller images, and which of these keep the constraint: at the largest images at
        which they should; where none should, not even as likely as not, the fastest weights at the smallest.
        """
        if pool := self._smaller(options):
            self.say("nothing keeps the speed at its published image size: smaller images are tried")
            options, kept = self._with_more(options, pool)
            if kept:
                return options, kept
        if not self._likely(options) and (pool := self._smallest(options)):
            self.say(f"nothing should keep the speed: the fastest are tried at the smallest images, {LEAST_SIZE} px")
            try:
                return self._with_more(options, pool)
            except UserError as error:  # what does not run so small stays at its own size
                self.say(f"left out: {error}")
        return options, []

    def _with_more(
        self, options: tuple[Option, ...], pool: Sequence[Candidate]
    ) -> tuple[tuple[Option, ...], list[Option]]:
        """Options with those of a pool on smaller images, judged; and which of these keep the constraint."""
        fewer = self._judged_options(pool)
        if self.loaded:
            fewer = self._again(fewer)
        if kept := self._keeping(fewer):
            self.record.add_note(
                f"no released network keeps {self.wanted} at the image size of its published accuracy: those "
                "compared take smaller images, at which nobody published one"
            )
        return (*options, *fewer), kept

    def _say_left_out(self, options: Sequence[Option]) -> None:
        """Why networks that were named are none of those that are compared: they can not be traced or timed, do not
        take the size, or are above a limit on theirs.
        """
        judged = {o.label: judge(o, self._sizes_alone) for o in options}
        reasons = {label: why for label, (verdict, why) in judged.items() if verdict == "no"}
        for label, why in list(reasons.items())[:NAMED]:
            self._remark(f"left out: {label}: {why}")
        if len(reasons) > NAMED:
            self._remark(f"left out for such reasons: {len(reasons) - NAMED} more of those that were named")

    def _small_enough(self, reached: Reached, options: Sequence[Option]) -> Kept:
        """Scaled members in the place of released weights none of which keeps the limits on size, so that none was
        timed.

        Raises:
            UserError: there are no such limits, or networks were named: then none of them can be used.
        """
        limits, first = self.constraint, options[0]
        why = f"{first.label}: {first.reason}"
        if self.asked.named is not None or (limits.max_params_m is None and limits.max_memory_gb is None):
            raise UserError(f"no candidate can be used; {why}")
        self._say_out_of_reach(reached, None, options)
        self._remark(f"no released network can be used ({why}): scaled networks are tried, which start from scratch")
        return self.scaled()

    def _say_out_of_reach(self, reached: Reached, mine: float | None, options: Sequence[Option]) -> None:
        """What it costs that the weights of some can not be had; ``mine``: as for ``Reached.lost``."""
        if self.asked.named is None and reached.unreached:
            rows = self.asked.rows
            found = best_out_of_reach(
                reached.unreached, mine or 0.0, options, self.basis, self.constraint, rows, self._on_data
            )
            self._remark(reached.lost(found[0], mine, looked=found[1]))

    def _judged_options(self, pool: Sequence[Candidate]) -> tuple[Option, ...]:
        """Candidates, measured or predicted and judged."""
        effort = Effort(records=self.folder / "speeds.jsonl", seconds=0.5, say=self.say)
        rows = self.asked.rows
        try:
            return choose_from(
                pool,
                self.basis,
                self.constraint,
                effort,
                budget=BUDGET,
                aligned=False,
                rows=rows,
                seen=self._on_data,
            ).options
        except NothingKeeps as nothing:
            return nothing.options

    def _again(self, options: Sequence[Option]) -> tuple[Option, ...]:
        """Those that were narrowly too slow on a busy machine with the better of two speeds."""
        facts, records = {sized_spec_of(o): o.facts for o in options}, self.folder / "speeds.jsonl"
        bench = Bench(self.basis, facts, records=records, seconds=0.5, reuse=False)
        made = timed_again(options, bench, self.constraint, self.say)
        if bench.timed:
            now = [o for o, old in zip(made, options, strict=True) if o.verdict == "yes" != old.verdict]
            best = max(now, key=lambda o: o.accuracy, default=None)
            more = f" and {plural(len(now) - 1, 'more', 'more')}" if len(now) > 1 else ""
            self._remark(
                f"{plural(bench.timed, 'network')} that came out narrowly too slow on the busy machine "
                f"{'was' if bench.timed == 1 else 'were'} timed again; now the speed is kept by "
                f"{'none' if best is None else best.label + more}"
            )
        return made

    def _keeping(self, options: Sequence[Option]) -> list[Option]:
        """Those that keep the constraint: predicted with the probability asked for; or measured, where none surely does
        by their middle.
        """
        kept = [o for o in options if o.verdict == "yes"]
        return kept or [o for o in self._likely(options) if o.chance(self.floor) is None]

    def _likely(self, options: Sequence[Option]) -> list[Option]:
        """Those that are as likely as not to keep it."""
        return [o for o in options if o.verdict == "maybe" and (o.images_per_s or 0.0) >= self.floor]

    def _say_trade(self, mine: float | None, options: Sequence[Option]) -> None:
        """What a lower confidence would buy, if it buys anything."""
        if trade := trade_of(mine, options, self.floor):
            self._remark(f"a lower confidence buys {trade}")

    def _missed(self, likely: Sequence[Option], fastest: Option) -> str:
        """Why nothing keeps the constraint: what is nearest to it."""
        chances = {o.label: o.chance(self.floor) or 0.0 for o in likely}
        if not chances:
            return self.shortfall(fastest.label, fastest.images_per_s or 0.0)
        nearest = max(chances, key=lambda label: chances[label])
        return f"nothing keeps {self.wanted}: the likeliest is {nearest} with {odds(chances[nearest])}"

    def _on_data(self, o: Option) -> Option:
        """As it is judged: with the parameters that it has with the data's classes, near a limit on them."""
        return judged_on_data(o, self.splits, self.constraint.max_params_m)

    def _smaller(self, options: Sequence[Option]) -> list[Candidate]:
        """The most accurate weights at images at which they should keep the speed."""
        measured = not self.basis.predicted
        sizes = smaller_sizes(options, self.sure_of, self.floor, self.constraint.max_params_m, measured=measured)
        hints = {o.name: o.accuracy for o in options}
        names = sorted(sizes, key=lambda name: -hints[name])[:BUDGET]
        return self._at_sizes({name: sizes[name] for name in names}, options)

    def _smallest(self, options: Sequence[Option]) -> list[Candidate]:
        """The fastest weights at the smallest images that they are tried at."""
        return self._at_sizes(least_sizes(options, self.sure_of, self.constraint.max_params_m), options)

    def _at_sizes(self, sizes: Mapping[str, int], options: Sequence[Option]) -> list[Candidate]:
        """Candidates of the options' names at other images."""
        # what nobody released is not in the zoo by its name, where another may have it
        given = {o.name: name_to_find(o.name, o.spec) if o.candidate.licence else o.spec for o in options}
        found = [c for name, size in sizes.items() for c in self._candidates([given[name]], (size,))]
        return [candidate for candidate in found if not candidate.why_not]

    def _members_instead(self, rival: float) -> Kept | None:
        """Scaled members that keep a speed which no released weights keep, or, where none does, the one that is faster
        than the fastest weights; None: there is neither.

        Args:
            rival: images/s of the fastest weights.
        """
        first = []
        side = self.asked.size_for(self.splits)
        for base in families_for(side):  # three timings say whether looking for the largest is worth minutes
            if rising := self._allowed(members(base, side)):
                first.append((at_own_size(rising[0]), base))
        smallest = self._timed(first, tuned=self.basis.tuned, rival=rival)
        if not smallest:
            return None
        fastest = max(speed for *_, speed in smallest)
        if fastest >= self.floor and not (found := self.scaled()).missed:
            self.record.add_note(
                f"no released network keeps {self.wanted}, not even on smaller images: scaled networks do, which start "
                "from scratch"
            )
            return found
        found = self._judged(smallest)
        if fastest <= rival:
            return None
        slower = "is as fast as the fastest small scaled one" if rival else "that the limits on size allow was timed"
        self._remark(f"no released network {slower}; the scaled one starts from scratch")
        return found

    def _candidates(self, wanted: Given | None, sizes: Sequence[int] | None) -> list[Candidate]:
        """What is offered, with the head that it would be trained with."""
        return candidates_with_head(candidates_of(wanted, sizes, offer=self.asked.offer), self.asked.training.head)

    def _reached(self, files: WeightFiles) -> Reached:
        """Candidates by whether their weights can be had; specs that were named have none."""
        wanted = self.asked.named
        sizes = None if self.asked.image_size is None else (self.asked.image_size,)
        reached = reach(self._candidates(wanted, sizes), files, named=wanted is not None)
        if wanted is not None and reached.unreached and reached.found:
            self.record.add_note(reached.left_out)
        return reached

    def _contender(self, option: Option, weights: Path | str | None) -> Contender:
        return Contender(
            name=option.name,
            spec=option.spec,
            image_size=option.image_size,
            family=option.spec.family,
            weights=weights,
            published=option.top1,
            licence=option.candidate.licence,
        )

    def _write_options(
        self, options: Sequence[Option], contenders: Sequence[Option], weights: dict[str, Path | str | None]
    ) -> None:
        """What was timed or predicted and why it was kept or lost: the contenders, and those nearest to the speed."""
        shown = options_near(options, contenders, self.floor, ROWS)
        told = [as_on_data(o, self.splits, self.constraint) for o in shown]
        rows = [row_of_option(o, weights[o.name], self.basis, self.asked.rows) for o in told]
        before = [self.record.row(o.name, o.image_size) for o in shown]  # of a run that was stopped while it probed
        kept = [replace(row, probe=old.probe) if old else row for row, old in zip(rows, before, strict=True)]
        self.record.put(candidates=tuple(kept))

    def front(self, files: WeightFiles) -> Front | None:
        """What the device can do with the released weights that can be had; None: there are none with a figure, or that
        are small enough.
        """
        pool = [candidate for candidate, place in self._reached(files).found if place is not None]
        if not any(candidate.top1 is not None for candidate in pool):
            return None
        effort = Effort(records=self.folder / "speeds.jsonl", seconds=0.5, say=self.say)
        return survey(pool, self.basis, effort, self.asked.rows, self.constraint, self._on_data)

    # ------------------------------------------------------------ scaled members and named specs

    def scaled(self) -> Kept:
        """Of each family the largest member that keeps the constraint, without weights; or named networks as they are.

        Raises:
            UserError: no member is small enough for a limit on parameters or memory, or for this machine's memory.
        """
        if self.asked.named is not None:
            within = [one for one in self.asked.networks if self._within(one.spec, one.image_size)]
            if not within:
                raise UserError(
                    f"no network that was named keeps {self.constraint}; raise a limit or name a smaller one"
                )
            for one in self.asked.networks:
                if one not in within:
                    self._remark(f"left out: {one.spec.name}: larger than {self._sizes_alone}")
            if not (timed := self._timed([(one, one.spec.name) for one in within], tuned=self.basis.tuned)):
                batch = self.basis.conditions.batch_size
                raise DoesNotFit(f"no network that was named fits in memory at batch {batch}; take a smaller batch")
            return self._judged(timed)
        found, too_large = [], None
        side = self.asked.size_for(self.splits)
        bases = families_for(side)
        for base in bases:
            rising = self._allowed(members(base, side))
            if not rising:
                self.say(f"no member of {base} keeps {self.constraint}")
                continue
            try:
                one = self._largest(rising, base)
            except DoesNotFit as error:
                too_large = error
                self.say(f"left out: {base}: {error}")
                continue
            found.append((at_own_size(one.spec), base, one.images_per_s))
        if not found:
            raise too_large or UserError(f"no member of {', '.join(bases)} keeps {self.constraint}; raise a limit")
        return self._judged(found)

    def _largest(self, rising: Sequence[NetSpec], base: str) -> Found:
        """The largest member of a family that keeps the speed; what a busy machine made too slow is timed anew."""

        def plain(spec: NetSpec, anew: bool = False) -> float:
            return self._speed(at_own_size(spec), base, anew=anew)

        def tuned(spec: NetSpec, anew: bool = False) -> float:
            return self._tuned(at_own_size(spec), base, anew=anew)

        one = largest_member(rising, self.floor, plain, tuned if self.basis.tuned else None)
        if not self.loaded:
            return one
        shipped = partial(tuned, anew=True) if self.basis.tuned else None
        made = larger_again(rising, one, self.floor, partial(plain, anew=True), shipped, self.say)
        if (made.spec, made.keeps) != (one.spec, one.keeps):
            self._remark(f"the busy machine made {base} too slow: timed again, {made.spec.name} keeps the speed")
        return made

    def _timed(
        self, pool: Sequence[tuple[SizedSpec, str]], *, tuned: bool = False, rival: float = math.inf
    ) -> list[tuple[SizedSpec, str, float]]:
        """Networks and their families with their speeds, as they would ship (``tuned``) where they are too slow as they
        come and that may bring them to the speed asked for, or beyond ``rival``, that of another network; what memory
        does not hold is left out, which is noted.
        """
        found, worth = [], min(self.floor, rival)
        for one, family in pool:
            try:
                speed = self._speed(one, family)
                if tuned and speed < self.floor and worth <= MOST_GAIN * speed:  # the form that ships is faster
                    speed = self._tuned(one, family)
                if self.loaded and speed < self.floor <= NARROW * speed:
                    speed = (self._tuned if tuned else self._speed)(one, family, anew=True)
                found.append((one, family, speed))
            except DoesNotFit as error:
                self.record.add_note(f"left out: {error}")
                self.say(f"left out: {error}")
        return found

    def _judged(self, found: Sequence[tuple[SizedSpec, str, float]]) -> Kept:
        """Those that keep the speed, and what became of each in the record."""
        kept = {one.spec.name for one, _, speed in found if speed >= self.floor}
        fastest = max(found, key=lambda entry: entry[2])
        chosen = [entry for entry in found if entry[0].spec.name in kept] or [fastest]
        chosen.sort(key=lambda entry: -(self._row(entry[0].spec.name, entry[0].image_size).macs or 0))
        keepers = {f: self._row(one.spec.name, one.image_size) for one, f, _ in reversed(chosen)} if kept else {}
        speeds = {one.spec.name: speed for one, _, speed in found}
        verdicts = Verdicts(floor=self.floor, speeds=speeds, keepers=keepers, sure=self._sure, tuned=self.basis.tuned)
        self.record.put(candidates=tuple(judged_row(row, verdicts) for row in self.record.now.candidates))
        contenders = tuple(
            Contender(name=one.spec.name, spec=one.spec, image_size=one.image_size, family=family)
            for one, family, _ in chosen
        )
        return Kept(contenders=contenders, missed="" if kept else self.shortfall(fastest[0].spec.name, fastest[2]))

    def _allowed(self, rising: Sequence[NetSpec]) -> list[NetSpec]:
        """Members within the limits on parameters and memory, with the head that they would be trained with."""
        headed = [with_head(spec, self.asked.training.head) for spec in rising]
        return [spec for spec in headed if self._within(spec, spec.input.size)]

    def _within(self, spec: Named, image_size: int) -> bool:
        """Whether a network keeps the limits on parameters and memory."""
        limits = self.constraint
        if limits.max_params_m is None and limits.max_memory_gb is None:
            return True
        if limits.max_params_m is not None and params_on(self.splits, spec) > limits.max_params_m * 1e6:
            return False
        if limits.max_memory_gb is None:
            return True
        network = spec if isinstance(spec, NetSpec) else build(spec, self.splits)
        cost = count(network, image_size=image_size, batch_size=self.basis.conditions.batch_size)
        return cost.peak_bytes <= limits.max_memory_gb * 2**30

    def probed(self, contenders: Sequence[Contender], recipe: Recipe) -> list[Contender]:
        """The few that are worth training; as ``Prober``."""
        prober = Prober(asked=self.asked, splits=self.splits, record=self.record, say=self.say)
        return prober.probed(contenders, recipe)
