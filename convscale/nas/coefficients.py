"""How to scale a baseline on the user's data and device: ``find_scaling``."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convscale.arch.multipliers import scale_to
from convscale.arch.rules import ScalingRule, save_rule
from convscale.arch.scaling import scale
from convscale.arch.small import for_image_size
from convscale.arch.spec import NetSpec
from convscale.arch.zoo import as_spec
from convscale.choice.basis import Asked, basis_of
from convscale.errors import (
    DoesNotFit,
    UserError,
    check_flag,
    check_number,
    check_path,
    check_text,
    check_whole,
    first_line,
)
from convscale.files import check_output_dir, file_or_none, json_numbers, new_output_dir, write_json
from convscale.images.digest import data_digest
from convscale.images.sources import open_dataset
from convscale.images.splits import DataSplits
from convscale.learn.recipe import Recipe
from convscale.learn.recipes import get_recipe
from convscale.learn.request import checked_seed
from convscale.locks import OutputLock
from convscale.machine import code_commit
from convscale.nas.directions import MOST, STEPS, at_cost, directions, in_groups, reach, spread, unit
from convscale.nas.engines.base import Engine, Place
from convscale.nas.engines.start import engine_for, place_for, threads_of
from convscale.nas.pace import Pace
from convscale.nas.points import PUBLISHED, Point, notes_on
from convscale.nas.records import difference
from convscale.nas.request import Say, fixed_form, native_size, recipe_for
from convscale.nas.trial import Job
from convscale.read import OWN, read_json

COSTS = ("time", "macs")
METHODS = ("grid", "bayes")
RECORD, RULE = "scaling.json", "rule.yaml"
FINALISTS, FINAL_SEEDS = 3, 3
"""So many of the best are trained with so many seeds in all."""
_IN_VAIN = 4
"""Ways that can not be trained, before any can, after which it is not the ways that are to blame."""


def find_scaling(
    model: NetSpec | str,
    data: DataSplits | str | os.PathLike[str],
    *,
    device: str = "cpu",
    budget: float = 2.0,
    cost: str = "time",
    minutes: float | None = None,
    trials: int | None = None,
    batch_size: int | None = 64,
    compiled: bool = False,
    output: str | os.PathLike[str],
    engine: str = "local",
    workers: int = 1,
    address: str | None = None,
    threads_per_trial: int | None = None,
    method: str = "grid",
    precision: str | None = None,
    runtime: str | None = None,
    calibration: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    training_device: str | None = None,
    recipe: Recipe | str | os.PathLike[str] | None = None,
    epochs: int = 3,
    most_images: int = 20_000,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    say: Say | None = None,
) -> ScalingRule:
    """Find how much deeper, wider and larger in pixels a baseline should become, on the user's data.

    Ways to share a budget between the three are laid out on a grid, each as large as makes the network ``budget`` times
    as costly, trained briefly, and the best few once more with other seeds. By MACs, alpha * beta^2 * gamma^2 is the
    budget (EfficientNet, section 3.3); by time, the time of a call on the device is, as EfficientNet-X has it (Li et
    al., arXiv 2102.05610, section 4). EfficientNet's own direction is among them, so the gain over it is known.

    Args:
        model: the baseline: a spec, or an own architecture's name.
        data: splits, or a folder or manifest for ``open_dataset``.
        device: whose time counts: measured on ``cpu`` and ``cuda``, predicted for a named device.
        budget: how many times as costly phi = 1 is.
        cost: ``time`` or ``macs``.
        minutes: of this call; None: until all is trained.
        trials: ways to try; None: 15 and EfficientNet's. Fewer are spread out.
        batch_size: images per call.
        compiled, precision, runtime, calibration: as for ``choose``.
        output: folder to make: ``rule.yaml``, which ``scale`` takes, and ``scaling.json``, with all that was tried.
        engine, workers, address, threads_per_trial: as for ``search``. Networks that Optuna's estimator proposes are
            trained one after the other, since each proposal knows all before it.
        method: ``grid``, or ``bayes``: Optuna's estimator goes on from a few of the grid's.
        image_size: the baseline's side in pixels; None: its own, or that of small images.
        training_device: where is trained, as for ``search``; None: ``device`` where it is here, else ``cpu``.
        recipe, epochs, most_images: of the brief trainings; as for ``search``.
        seed: of everything drawn.
        resume: go on in ``output``.
        overwrite: replace an output folder that exists.
        say: told a line now and then.

    Returns:
        The rule; its notes say how far it lies from EfficientNet's and what it gains.

    Raises:
        UserError: bad input, in one line.
    """
    check_text("cost", cost, COSTS)
    check_text("method", method, METHODS)
    check_number("budget", budget, "a number above 1, at most 16", 1.01, MOST)
    if minutes is not None:
        check_number("minutes", minutes, "a number above 0", 1e-6)
    if trials is not None and check_whole("trials", trials) < 2:
        raise UserError(f"trials is {trials}; ways to scale are compared, so at least 2 would be right")
    for name, flag in (("resume", resume), ("overwrite", overwrite)):
        check_flag(name, flag)
    checked_seed(seed)
    asked = Asked(device=device, batch_size=batch_size, precision=precision, runtime=runtime, compiled=compiled)
    basis = basis_of(asked, calibration)
    here = device if device.partition(":")[0] == "cuda" and not basis.predicted else "cpu"
    own = isinstance(data, DataSplits)
    place = place_for(
        engine=engine,
        workers=workers,
        address=address,
        threads=threads_per_trial,
        training=training_device or here,
        own=own,
    )
    inputs = [("data", data), ("calibration", calibration)]
    inputs += [("model", file_or_none(model)), ("recipe", file_or_none(recipe))]
    folder = check_output_dir(check_path("output", output), overwrite=overwrite, resume=resume, inputs=inputs)
    chosen = None if recipe is None else get_recipe(recipe)
    check_whole("epochs", epochs)
    check_whole("most_images", most_images)
    named = as_spec(model)
    splits = data if isinstance(data, DataSplits) else open_dataset(check_path("data", data), compare=False)
    base = _sized(named, splits, image_size)
    brief = fixed_form(recipe_for(chosen, splits, base.input.size).override({"epochs": epochs}), place.device).to_dict()
    with OutputLock() as lock:
        lock.take(folder)
        new_output_dir(folder, overwrite=overwrite, resume=resume, inputs=splits.places())
        lock.take(folder)
        asks = _Asked(
            base=base,
            budget=budget,
            cost=cost,
            trials=trials,
            method=method,
            recipe=brief,
            place=place,
            data=None if own else str(Path(data).absolute()),
            most_images=most_images,
            seed=seed,
            data_digest=data_digest((splits.train, splits.validation)),
            calibration=basis.calibration_digest if cost == "time" else None,
            deadline=None if minutes is None else time.monotonic() + 60 * minutes,
            say=say or (lambda text: None),
        )
        pace = Pace(
            basis,
            classes=len(splits.classes),
            channels=splits.channels,
            confidence=0.8,
            records=folder / "speeds.jsonl",
            calibration=asks.calibration,
        )
        if lock.note:
            asks.say(lock.note)
        return _Scaling(asks, pace, splits, folder).run()


def _sized(spec: NetSpec, splits: DataSplits, image_size: int | None) -> NetSpec:
    """The baseline at the size of the data, or the one asked for."""
    native = native_size(splits)
    small = native is not None and spec.input.size > 2 * native
    size = image_size if image_size is not None else native if small else None
    return spec if size is None else for_image_size(spec, size)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What is looked for, checked."""

    base: NetSpec
    budget: float
    cost: str
    trials: int | None
    method: str
    recipe: Mapping[str, Any]
    place: Place
    data: str | None
    """Where other processes read it from; None: nowhere."""
    most_images: int
    seed: int
    data_digest: str
    calibration: str | None
    """Digest of what times are predicted by."""
    deadline: float | None
    say: Say = field(compare=False)

    def written(self) -> dict[str, object]:
        """What must be the same to go on."""
        names = ("budget", "cost", "method", "most_images", "seed", "data_digest", "calibration")
        return {
            "base": self.base.to_dict(),
            "recipe": dict(self.recipe),
            **{name: getattr(self, name) for name in names},
        }


class _Scaling:
    """One call of ``find_scaling`` at work."""

    def __init__(self, asked: _Asked, pace: Pace, splits: DataSplits, folder: Path) -> None:
        self.asked, self.pace, self.splits, self.folder = asked, pace, splits, folder
        self.points: list[Point] = []
        self.rule: dict[str, object] | None = None
        path = folder / RECORD
        if path.is_file():
            kept = read_json(path, "study of scaling", OWN)
            before = kept.get("asked") if isinstance(kept, dict) else None
            if not isinstance(before, dict):
                raise UserError(f"study of scaling {path} is damaged: it does not say what was asked for")
            now = asked.written()
            if asked.cost == "time" and isinstance(held := kept.get("conditions"), dict):  # what a cost was timed under
                now, before = {**now, "conditions": pace.basis.conditions.to_dict()}, {**before, "conditions": held}
            if differs := difference(json_numbers(now), before):
                raise UserError(f"the study in {folder} was begun with {differs}; ask for the same, or name another")
            self.points = [Point.from_dict(point) for point in kept["points"]]
            if not self._trained():  # what stood in the way of them all may be gone
                self.points = [point for point in self.points if not point.failed]
            self.rule = kept.get("rule")  # an earlier end's, until this call has its own
            pace.runtime = str(kept.get("runtime", ""))

    def run(self) -> ScalingRule:
        """Lay out, train, train the best again."""
        asked = self.asked
        asked.say(f"scaling {asked.base!r} to {asked.budget:g} times its {asked.cost}")
        if asked.cost == "time":
            self.pace(asked.base)  # it can fail: not once a way is laid out
        published = self._published()
        engine = engine_for(asked.place, self.splits)
        try:
            for group in self._directions():
                if not self._more() and self._trained():
                    break
                for shares in group:
                    if self._at(shares) is None:
                        self._put(self._laid_out(shares))
                self._train(engine, [at for at in map(self._at, group) if at is not None and not self._seeds(at)])
            for seeds in range(1, FINAL_SEEDS):  # where one fails, the next best takes its place
                while self._more() and (behind := [at for at in self._finalists() if self._seeds(at) <= seeds]):
                    self._train(engine, behind)
        finally:
            engine.close()
        return self._rule(published)

    def _finalists(self) -> list[int]:
        """The best by the first seed, the one that all have, and EfficientNet's direction; none that failed."""
        ready = [at for at, point in enumerate(self.points) if point.accuracies and not point.failed]
        order = sorted(ready, key=lambda at: -self.points[at].over(1))
        own = [at for at in ready if self.points[at].shares == PUBLISHED.shares]
        return list(dict.fromkeys([*order[:FINALISTS], *own]))

    def _directions(self) -> Iterator[Sequence[tuple[float, float, float]]]:
        """EfficientNet's, then the grid's, then those that Optuna's estimator proposes, an earlier call's first. Those
        that come together are trained side by side: as many as there are workers, or one that was proposed.
        """
        asked, side_by_side = self.asked, self.asked.place.workers
        grid = [PUBLISHED.shares, *directions()]
        count = len(grid) if asked.trials is None else asked.trials
        first = count if asked.method == "grid" else min(count, 6)
        yield from in_groups(spread(grid, first), side_by_side)
        if asked.method == "bayes":
            laid_out = [point.shares for point in self.points if not point.accuracies and not point.failed]
            yield from in_groups(laid_out[: max(0, count - len(self.points) + len(laid_out))], 1)
            for _ in range(count - len(self.points)):
                yield (self._proposed(),)
        elif count > len(grid):  # a finer grid, without those that were there
            finer = [point for point in directions(2 * STEPS) if point not in grid]
            yield from in_groups(spread(finer, count - len(grid)), side_by_side)

    def _proposed(self) -> tuple[float, float, float]:
        """By a tree-structured Parzen estimator over what was trained, by the first seed."""
        import warnings

        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sampler = optuna.samplers.TPESampler(
                multivariate=True, n_startup_trials=1, seed=self.asked.seed + len(self.points)
            )
            study = optuna.create_study(direction="maximize", sampler=sampler)
            ranges: dict[str, Any] = {
                name: optuna.distributions.FloatDistribution(0.0, 1.0) for name in ("depth", "rest")
            }
            for point in self.points:
                if point.accuracies:
                    study.add_trial(
                        optuna.trial.create_trial(params=unit(point.shares), distributions=ranges, value=point.over(1))
                    )
            params = study.ask(ranges).params
        width = (1 - params["depth"]) * params["rest"]
        return params["depth"], width, 1 - params["depth"] - width

    def _laid_out(self, shares: tuple[float, float, float]) -> Point:
        """As large in this direction as the budget allows; where memory does not hold that, a way that failed."""
        asked, nominal, found, failed = self.asked, self.asked.budget, 0.0, ""
        try:
            if asked.cost == "macs":
                found = self._cost(self._spec(nominal, shares))
            else:
                nominal, found = reach(lambda at: self._cost(self._spec(at, shares)), asked.budget)
        except DoesNotFit as error:
            failed = first_line(error)
        alpha, beta, gamma = at_cost(nominal, shares)
        point = Point(shares=shares, alpha=alpha, beta=beta, gamma=gamma, cost=found, failed=failed)
        if failed:
            self._say_failed(point)
        return point

    def _published(self) -> float | None:
        """The cost of EfficientNet's own coefficients, times the baseline's; None: memory does not hold it."""
        try:
            return self._cost(scale(self.asked.base, phi=math.log(self.asked.budget, 2)))
        except DoesNotFit:
            return None

    def _spec(self, nominal: float, shares: tuple[float, float, float]) -> NetSpec:
        depth, width, resolution = at_cost(nominal, shares)
        return scale_to(self.asked.base, depth=depth, width=width, resolution=resolution)

    def _cost(self, spec: NetSpec) -> float:
        """Times the baseline's."""
        if self.asked.cost == "macs":
            return self._macs(spec) / self._macs(self.asked.base)
        return self.pace(self.asked.base).speed.images_per_s / self.pace(spec).speed.images_per_s

    def _macs(self, spec: NetSpec) -> int:
        """Multiply-accumulates per image."""
        from convscale.cost.counting import count

        return count(spec, image_size=spec.input.size).macs

    # ------------------------------------------------------------ training

    def _at(self, shares: tuple[float, float, float]) -> int | None:
        same = (at for at, point in enumerate(self.points) if math.dist(point.shares, shares) < 1e-9)
        return next(same, None)

    def _seeds(self, at: int) -> int:
        """How often a way was trained."""
        return len(self.points[at].accuracies)

    def _trained(self) -> list[Point]:
        return [point for point in self.points if point.accuracies and not point.failed]

    def _more(self) -> bool:
        return self.asked.deadline is None or time.monotonic() < self.asked.deadline

    def _train(self, engine: Engine, ats: Sequence[int]) -> None:
        """Train networks briefly, each with its next seed, and keep one accuracy more of each; one that can not be
        trained is kept as failed.

        Raises:
            UserError: several can not be, and none could before.
        """
        asked = self.asked
        jobs = [self._job(at, asked.seed + self._seeds(at)) for at in ats if not self.points[at].failed]
        for result in engine.run(jobs, self._more):
            at, point = result.number, self.points[result.number]
            if result.failed:
                self.points[at] = dataclasses.replace(point, failed=result.failed)
                self._write()
                self._say_failed(self.points[at])
                continue
            self.points[at] = dataclasses.replace(
                point, accuracies=(*point.accuracies, result.accuracy), seconds=point.seconds + result.seconds
            )
            self._write()
            asked.say(
                f"depth x {point.alpha:.3g}, width x {point.beta:.3g}, resolution x {point.gamma:.3g}: cost x "
                f"{point.cost:.2f}, {100 * result.accuracy:.2f} %"
            )

        failed = [point for point in self.points if point.failed]
        if len(failed) >= _IN_VAIN and not self._trained():
            raise UserError(f"none of {len(failed)} ways to scale can be trained; the first: {failed[0].failed}")

    def _say_failed(self, point: Point) -> None:
        self.asked.say(f"left out: {self._scaled(point).name} can not be trained: {point.failed}")

    def _job(self, at: int, seed: int) -> Job:
        asked, spec = self.asked, self._scaled(self.points[at])
        return Job(
            number=at,
            spec={**spec.to_dict(), "name": spec.name},
            data=asked.data,
            recipe=asked.recipe,
            seed=seed,
            device=asked.place.device,
            most_images=asked.most_images,
            threads=threads_of(asked.place),
        )

    def _scaled(self, point: Point) -> NetSpec:
        return scale_to(self.asked.base, depth=point.alpha, width=point.beta, resolution=point.gamma)

    def _put(self, point: Point) -> None:
        self.points.append(point)
        self._write()

    def _write(self) -> None:
        about = {"schema": 1, "commit": code_commit(), "asked": self.asked.written(), "runtime": self.pace.runtime}
        value = {
            **about,
            "conditions": self.pace.basis.conditions.to_dict(),
            "points": [point.to_dict() for point in self.points],
            "rule": self.rule,
        }
        write_json(self.folder / RECORD, json_numbers(value))

    # ------------------------------------------------------------ the end

    def _rule(self, published: float | None) -> ScalingRule:
        """The best finalist by the seeds that all of them have, as a rule, with what there is to say of it.

        Args:
            published: the cost of EfficientNet's own coefficients, times the baseline's; None: memory does not hold it.

        Raises:
            UserError: no way to scale could be trained.
        """
        asked, last = self.asked, [self.points[at] for at in self._finalists()]
        if not last:
            raise UserError(
                f"none of {len(self.points)} ways to scale can be trained; the first: {self.points[0].failed}"
            )
        seeds = min(len(point.accuracies) for point in last)
        best = max(last, key=lambda point: point.over(seeds))
        conditions = "multiply-accumulates per image" if asked.cost == "macs" else self._stated()
        rule = ScalingRule(
            alpha=max(1.0, best.alpha),
            beta=max(1.0, best.beta),
            gamma=max(1.0, best.gamma),
            name=f"{asked.base.name}-{asked.cost}",
            cost="time" if asked.cost == "time" else "macs",
            budget=asked.budget,
            baseline=asked.base.name,
            conditions=conditions,
            notes=tuple(self._notes(best, published)),
        )
        save_rule(rule, self.folder / RULE)
        self.rule = rule.to_dict()
        self._write()
        return rule

    def _stated(self) -> str:
        c = self.pace.basis.conditions
        how = "predicted" if self.pace.basis.predicted else "measured"
        runtime = self.pace.runtime or c.runtime
        return f"time of a call {how}, {c.device}, {runtime}, {c.precision}, batch {c.batch_size}"

    def _notes(self, best: Point, published: float | None) -> list[str]:
        """How it was found, and beside EfficientNet's direction."""
        asked, own = self.asked, self._at(PUBLISHED.shares)
        failed = sum(bool(point.failed) for point in self.points)
        macs = self._macs(self._scaled(best)) / self._macs(asked.base) if asked.cost == "time" else None
        theirs = None if own is None or not self._seeds(own) or self.points[own].failed else self.points[own]
        cost = "does not fit in memory" if published is None else f"costs {published:.2f} times as much in {asked.cost}"
        return [
            f"{len(self._trained())} ways to scale, each trained for {asked.recipe['epochs']} epochs on at most "
            f"{asked.most_images:,} images{f'; {failed} more can not be trained' if failed else ''}; this one "
            f"{100 * best.accuracy:.2f} % on validation over {len(best.accuracies)} seeds, at {best.cost:.2f} times "
            "the cost",
            *notes_on(best, theirs, budget=asked.budget, cost=asked.cost, macs=macs),
            f"scaled by EfficientNet's published coefficients the baseline {cost}",
        ]
