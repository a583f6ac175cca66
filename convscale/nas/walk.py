"""A search at work: rounds of candidates that are asked for, timed, trained and told."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from convscale._version import __version__
from convscale.arch.spec import NetSpec, save_spec
from convscale.errors import DoesNotFit, UserError
from convscale.files import json_numbers, write_json
from convscale.machine import code_commit
from convscale.nas.engines.base import Engine
from convscale.nas.engines.start import engine_for, threads_of
from convscale.nas.inherit import misfit
from convscale.nas.pace import Counted, Pace
from convscale.nas.records import TrialRecord, front_of
from convscale.nas.request import HALVING, Request
from convscale.nas.result import RECORD, SCHEMA, Study, begun
from convscale.nas.sampling import Tried, UsedUp, propose, several
from convscale.nas.smallest import need_one_that_keeps
from convscale.nas.space import Genes
from convscale.nas.store import Store, asked_values, too_large
from convscale.nas.trial import Job

ROUND = 4
"""Trials that are asked for together, whatever the number of workers: so the same seed gives the same trials."""
JUDGES = 6
"""Trials that a rung has seen before it gives one up."""
_OVER = ("trained", "pruned", "failed")
"""States of trials that count."""
_IN_VAIN = 60
"""Candidates in a row that are too slow, after which the search ends."""
_LOOKED_AT = 4
"""Of the best networks in the form that ships."""
_DRAWN = 6
"""Networks scored for each of the first trials."""
_FILTERED = 3
"""Proposals scored for each later trial, the worst of which is left out."""
_APART = 4 * 1_000_003
"""Between the numbers that further proposals are drawn by; a sampler's turns go by fours."""


@dataclass(frozen=True, kw_only=True)
class _Round:
    """What trials that are asked for together share."""

    done: int
    """Trials that were over when the first of them was asked for."""
    rungs: dict[str, float]
    """The least value at each rung, by these trials."""


class Walk:
    """One call of ``search`` at work."""

    def __init__(self, request: Request, folder: Path) -> None:
        self.request, self.folder = request, folder
        self.began = time.monotonic()
        self.now = {"training": 0.0, "waiting": 0.0}  # seconds of this call
        self.told = 0  # trials of this call
        before = begun(folder, request.written())
        self.result: dict[str, object] | None = before.get("result")  # an earlier end's, until this call has its own
        self.times: dict[str, float] = dict(before.get("times") or {})
        splits = request.splits
        self.pace = Pace(
            request.basis,
            classes=len(splits.classes),
            channels=splits.channels,
            confidence=request.confidence,
            records=folder / "speeds.jsonl",
            runtime=str(before.get("runtime", "")),
            factor=before.get("factor"),
            calibration=request.calibration,
        )
        self.store = Store(folder, request.space)

    # ------------------------------------------------------------ its record

    def _write(self) -> None:
        """Write down what was asked, and the result where there is one."""
        value = {
            "schema": SCHEMA,
            "version": __version__,
            "commit": code_commit(),
            "asked": self.request.written(),
            "judged": self.request.judged,
            "space": self.request.space.to_dict(),
            "runtime": self.pace.runtime,
            "factor": self.pace.factor,
            "times": self.times,
            "result": self.result,
        }
        write_json(self.folder / RECORD, json_numbers(value))

    # ------------------------------------------------------------ the walk

    def run(self) -> Study:
        """Ask, train and tell in rounds until the trials or the minutes are over."""
        request, say = self.request, self.request.say
        say(f"{request.space!r}: {request.reward}; {request.splits.describe()}")
        self._write()
        timed = request.reward.target is not None and request.reward.by == "throughput"
        # An older version began some searches without the factor: all of their trials go without it.
        if self.pace.tuned and self.pace.factor is None and timed and not self.store.count:
            say("timing two networks in every form that they can ship in")
            gain = self.pace.find_factor(request.space.sample(request.effort.seed, count=2))
            say(f"what ships is {gain:.2f} times as fast as an ONNX file in {self.pace.runtime} as it comes")
        if not self._pending() and not self._trained():
            self._need_one_that_keeps()
            self._write()
        engine = engine_for(self.request.place, self.request.splits)
        try:
            while self._round(engine):
                self._write()
        finally:
            engine.close()
            self._count_time()
        return self._finish()

    def _round(self, engine: Engine) -> bool:
        """One round; whether another may follow."""
        for number in self._fill():
            self.request.say(f"{number} goes on from an earlier call")
        jobs = [self._job(number) for number in self._pending()]
        if not jobs:
            return False
        for result in engine.run(jobs, self._more):
            asked = self.store.asked(result.number)
            self.store.tell(result.number, result, float(asked["ratio"]), float(asked["factor"]))
            self._add("training", result.seconds)
            self._add("waiting", result.wait_seconds)
            self.told += 1
            self._report(result.number)
        self._check_failures()
        return self._more() and not self._pending()

    def _more(self) -> bool:
        """Whether a trial may be begun now."""
        minutes = self.request.effort.minutes
        return minutes is None or time.monotonic() - self.began < 60 * minutes

    def _trained(self) -> list[TrialRecord]:
        return [trial for trial in self.store.records() if trial.state in ("trained", "pruned")]

    def _pending(self) -> list[int]:
        """Trials that were asked for and are to be trained."""
        running = [trial.number for trial in self.store.records() if trial.state == "running"]
        return [number for number in running if self.store.asked(number)]

    def _fill(self) -> list[int]:
        """Ask until a whole round waits to be trained; the numbers that waited already. Of a round that was cut off the
        rest is trained first: none of its trials may know more than the first of them did.
        """
        for number in self._pending():  # noted by a run that was killed before it told them
            self._end_untrained(number)
        cut = self._pending()
        now = self._half_asked()
        if now is None:
            done = [trial for trial in self.store.records() if trial.state in _OVER]
            now = _Round(done=len(done), rungs=self._rungs())
        else:
            cut = []
        if self.store.waits:
            self._settle(*self.store.begin(), now)
        for trial in self.store.records():  # asked for by a run that was killed before it knew the speed
            if trial.state == "running" and not self.store.asked(trial.number):
                self._settle(trial.number, self.store.go_on_asking(trial.number, self._tpe_seed(trial.number)), now)
        waited = self._pending()
        if cut:
            return waited
        trials = self.request.effort.trials
        wanted = ROUND if trials is None else min(ROUND, trials - now.done)
        before, vain = self._vain(now), 0
        while len(self._pending()) < wanted and before + vain < _IN_VAIN and (vain < ROUND or self._more()):
            try:
                asked = self._next()
            except UsedUp as error:
                if not (pending := self._pending()) and not self._trained():
                    raise
                if not pending:  # else they are trained first, and the next round comes here again
                    self.request.say(f"the search ends: {error}")
                break
            if self._settle(*asked, now):
                before = vain = 0
            else:
                vain += 1
        return waited

    def _half_asked(self) -> _Round | None:
        """The newest round where none of its trials was trained yet: an earlier call may have been killed while it
        asked.
        """
        records, asked = self.store.records(), self.store.all_asked()
        last = next((one for one in reversed(asked) if one), {})
        if "round" not in last:  # there is none, or an older version asked
            return None
        for trial, one in zip(records, asked, strict=True):
            if one.get("round") == last["round"] and "same" not in one and trial.state in _OVER:
                return None
        return _Round(done=int(last["round"]), rungs=dict(last["rungs"]))

    def _vain(self, now: _Round) -> int:
        """Candidates in a row, the newest ones of a round, that are not to be trained."""
        both = zip(self.store.records(), self.store.all_asked(), strict=True)
        own = [trial for trial, asked in both if asked.get("round") == now.done]
        waits = [at for at, trial in enumerate(own) if trial.state == "running"]
        # A search that ended in vain, and that is gone on with, may look as long again.
        return len(own) - 1 - waits[-1] if waits else len(own) % _IN_VAIN

    def _next(self) -> tuple[int, Genes]:
        """A new trial: its number and genes."""
        effort, number = self.request.effort, self.store.count
        tried = self._tried()
        trained = [one for one in tried if one.value is not None]
        if effort.zero_cost is not None and len(trained) < ROUND:
            genes = self._scored(tried, number)
        elif effort.sampler == "tpe":
            return self.store.ask_tpe(self._tpe_seed(number))
        else:
            genes = self._proposed(tried, number)
        return self.store.ask(genes)

    def _proposed(self, tried: Sequence[Tried], number: int) -> Genes:
        """What the sampler proposes; where a score is asked for, the first of several that is not the worst by it."""
        request, drawn = self.request, list[Genes]()
        effort = request.effort
        for extra in range(1 if effort.zero_cost is None else _FILTERED):
            try:
                genes = propose(
                    request.space,
                    [*tried, *(Tried(genes=genes) for genes in drawn)],
                    sampler=effort.sampler,
                    seed=effort.seed,
                    number=number + extra * _APART,
                    floor=request.reward.floor,
                )
            except UsedUp:
                if not drawn:
                    raise
                break
            drawn.append(genes)
        worst = min(drawn, key=self._score) if len(drawn) > 1 else None
        return next(genes for genes in drawn if genes != worst)

    def _tpe_seed(self, number: int) -> int:
        return (self.request.effort.seed * 1_000_003 + number) % 2**32

    def _scored(self, tried: Sequence[Tried], number: int) -> Genes:
        """Of some networks drawn the one with the highest score that keeps the speed; else the fastest of them."""
        space, effort = self.request.space, self.request.effort
        drawn = several(space, tried, count=_DRAWN, seed=effort.seed, number=number)
        ranked = sorted(drawn, key=lambda genes: -self._score(genes))
        best: tuple[float, Genes] | None = None
        for genes in ranked:
            try:
                ratio = self._ratio(self.pace(space.spec_of(genes)))
            except DoesNotFit:
                continue
            if self.request.reward.keeps(ratio):
                return genes
            best = min(best or (ratio, genes), (ratio, genes))
        return best[1] if best else ranked[-1]

    def _score(self, genes: Genes) -> float:
        from convscale.nas.zero_cost import zero_cost

        splits, name = self.request.splits, self.request.effort.zero_cost
        assert name is not None
        spec = self.request.space.spec_of(genes)
        return zero_cost(name, spec, num_classes=len(splits.classes), in_chans=splits.channels)

    def _settle(self, number: int, genes: Genes, now: _Round) -> bool:
        """Find a trial's speed and write it down; whether it is to be trained."""
        request, space = self.request, self.request.space
        spec = space.spec_of(genes)
        done = [trial for trial in self._trained() if trial.number != number and trial.result is not None]
        same = next((trial for trial in done if trial.genes == genes), None)
        try:
            counted = self.pace(spec)
        except DoesNotFit as error:
            unfit = too_large(genes=genes, spec=spec, reason=str(error))
            self.store.note(number, {**unfit, "round": now.done, "rungs": now.rungs})
            return not self._end_untrained(number)
        ratio = self._ratio(counted)
        seed = (request.effort.seed * 1_000_003 + number) % 2**31
        values = asked_values(
            genes=genes,
            spec=spec,
            counted=counted,
            factor=request.reward.factor(ratio),
            ratio=ratio,
            seed=seed,
            parent=self._parent(number, genes, spec) if request.effort.inherit else None,
        )
        values |= {"round": now.done, "rungs": now.rungs}
        if not request.reward.keeps(ratio):
            values |= {"unfit": True, "reason": self._too_much(counted)}
        elif same is not None:  # an estimator may ask for what was trained already
            values |= {"same": same.number}
        self.store.note(number, values)
        return not self._end_untrained(number)

    def _end_untrained(self, number: int) -> bool:
        """End a trial that is not to be trained: it is too slow, or it was trained already; whether it is one."""
        asked = self.store.asked(number)
        if asked.get("unfit"):
            self.store.tell_unfit(number, float(asked["ratio"]))
            return True
        same = None if "same" not in asked else self.store.records()[int(asked["same"])].result
        if same is None:
            return False
        self.store.tell(number, replace(same, number=number), float(asked["ratio"]), float(asked["factor"]))
        return True

    def _parent(self, number: int, genes: Genes, spec: NetSpec) -> int | None:
        """The trained network whose weights the candidate can grow from with the fewest choices apart; of several the
        best.
        """
        known = [t for t in self.store.records() if t.value is not None and self._weights(t.number).is_file()]
        fit = [t for t in known if t.number < number and not misfit(t.spec, spec)]

        def apart(trial: TrialRecord) -> tuple[int, float]:
            return sum(a != b for a, b in zip(trial.genes, genes, strict=True)), -(trial.value or 0.0)

        return min(fit, key=apart).number if fit else None

    def _weights(self, number: int) -> Path:
        """The file of a trial's weights."""
        return self.folder.absolute() / "weights" / f"{number}.safetensors"

    def _too_much(self, counted: Counted) -> str:
        reward = self.request.reward
        if reward.by == "macs":
            return f"too large: {counted.macs / 1e6:,.1f} M MACs, at most {reward.target:,.4g}"
        sure = self.pace.sure(counted.speed)
        chance = f", {sure:,.0f} of them with the confidence asked for"
        if counted.speed.kind == "measured":
            chance = f", about {sure:,.0f} as it would ship" if self.pace.factor else ""
        return f"too slow: {counted.speed.images_per_s:,.0f} images/s{chance}, needed {reward.target:,.4g}"

    def _ratio(self, counted: Counted) -> float:
        return self.request.reward.ratio(self.pace.sure(counted.speed), counted.macs)

    def _tried(self) -> list[Tried]:
        """What samplers know. One that was given up counts by its last rung, moved as those that went on moved."""
        records = self.store.records()
        whole = [trial.result for trial in records if trial.state == "trained" and trial.result is not None]
        found = []
        for trial in records:
            value = trial.value
            if trial.state == "pruned" and trial.result is not None:
                at = trial.result.pruned
                gains = [result.accuracy - max(result.curve[:at]) for result in whole if len(result.curve) >= at]
                gain = sum(gains) / len(gains) if gains else 0.0
                value = (trial.result.accuracy + gain) * trial.factor
            speed = None if trial.speed is None else self.pace.sure(trial.speed)
            found.append(Tried(genes=trial.genes, value=value, speed=speed))
        return found

    def _job(self, number: int) -> Job:
        request, asked = self.request, self.store.asked(number)
        parent = asked.get("parent")
        return Job(
            number=number,
            spec=asked["spec"],
            data=request.data,
            recipe=request.recipe.to_dict(),
            seed=int(asked["seed"]),
            device=request.place.device,
            most_images=request.effort.most_images,
            threads=threads_of(request.place),
            factor=float(asked["factor"]),
            rungs=asked["rungs"] if "rungs" in asked else self._rungs(),  # an older version did not note them
            save=str(self._weights(number)) if request.effort.inherit else None,
            parent=None if parent is None else self.store.asked(parent)["spec"],
            parent_weights=None if parent is None else str(self._weights(parent)),
        )

    def _rungs(self) -> dict[str, float]:
        """The least value at each rung, by the trials of earlier rounds: the better half of them goes on."""
        done = [trial for trial in self._trained() if trial.result is not None]
        least = {}
        for rung in self.request.effort.rungs:
            seen = [max(t.result.curve[:rung]) * t.factor for t in done if t.result and len(t.result.curve) >= rung]
            if len(seen) >= JUDGES:
                least[str(rung)] = sorted(seen, reverse=True)[len(seen) // HALVING]
        return least

    # ------------------------------------------------------------ feasibility

    def _need_one_that_keeps(self) -> None:
        """
        Raises:
            UserError: not even the fastest network found keeps the target, and which that is.
        """
        request = self.request
        if request.reward.target is not None and request.reward.form == "hard":
            need_one_that_keeps(request.space, request.reward, self.pace, request.say)

    # ------------------------------------------------------------ the end

    def _check_failures(self) -> None:
        """
        Raises:
            UserError: the first round failed as a whole: it is not the networks that are to blame.
        """
        records = self.store.records()
        failed = [trial for trial in records if trial.state == "failed"]
        if len(failed) >= ROUND and not any(trial.state in ("trained", "pruned") for trial in records):
            raise UserError(f"none of the first {len(failed)} trials could be trained; the first: {failed[0].reason}")

    def _add(self, what: str, seconds: float) -> None:
        self.times[what] = self.times.get(what, 0.0) + seconds
        if what in self.now:
            self.now[what] += seconds

    def _count_time(self) -> None:
        self._add("speeds", self.pace.seconds)
        self._add("all", time.monotonic() - self.began)

    def _report(self, number: int) -> None:
        """A line on a trial, and where the search stands."""
        records = self.store.records()
        trained = [trial for trial in records if trial.value is not None]
        best = max(trained, key=lambda trial: trial.value or 0.0, default=None)
        elapsed = time.monotonic() - self.began
        best_text = "none yet" if best is None or best.accuracy is None else f"{100 * best.accuracy:.2f} %"
        spent = {**self.now, "speeds": self.pace.seconds}
        shares = [f"{name} {100 * seconds / max(elapsed, 1e-9):.0f} %" for name, seconds in spent.items()]
        front = len(front_of(records))
        state = f"best {best_text}, front of {front}, {', '.join(shares)}{self._left(records, elapsed)}"
        self.request.say(f"{records[number].describe()} | {state}")

    def _left(self, records: Sequence[TrialRecord], elapsed: float) -> str:
        """The time left: of the minutes, or for the trials that are to come, by what one took in this call; whichever
        ends first.
        """
        effort, minutes = self.request.effort, list[float]()
        if effort.minutes is not None:
            minutes.append(effort.minutes - elapsed / 60)
        if effort.trials is not None:
            to_come = effort.trials - sum(trial.state in _OVER for trial in records)
            minutes.append(to_come * elapsed / 60 / self.told)
        return f", {max(0.0, min(minutes)):.1f} min left"

    def _finish(self) -> Study:
        """The result, written down."""
        trials = tuple(self.store.records())
        request = self.request
        study = Study(
            output=self.folder,
            space=request.space,
            reward=request.reward,
            basis=request.basis,
            trials=trials,
            times=dict(self.times),
        )
        if self.pace.tuned and request.reward.target is not None and request.reward.by == "throughput":
            study = self._shipping(study)
        best = study.best
        save_spec(best.spec, self.folder / "best.yaml")
        self.result = study.to_dict()
        self._write()
        return study

    def _shipping(self, study: Study) -> Study:
        """With the best network that keeps the speed in the form in which it would ship: few are looked at, and where
        none of them keeps it, the best one stays.
        """
        trained = sorted((t for t in study.trials if t.value is not None), key=lambda t: -(t.value or 0.0))
        first: Study | None = None
        for trial in trained[:_LOOKED_AT]:
            self.request.say(f"timing {trial.spec.name} in every form that it can ship in")
            shipped = self.pace.shipped(trial.spec)
            made = replace(study, shipped=shipped, chosen=trial.number)
            if self.request.reward.form != "hard" or shipped.images_per_s >= self.request.reward.floor:
                return made
            first = first or made
        return first or study
