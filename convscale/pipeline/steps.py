"""The steps of ``fit`` in order: each skips what its record says is done, so that a resumed run goes on."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from convscale import words
from convscale.arch.spec import NetSpec
from convscale.choice.basis import Basis
from convscale.choice.choose import notes_on
from convscale.conditions import Constraint
from convscale.errors import Stopped, UserError
from convscale.files import json_numbers
from convscale.images.check import check_data, sizes_of
from convscale.images.splits import DataSplits, split_indices
from convscale.learn.checkpoint import load_checkpoint
from convscale.learn.progress import Event, Progress
from convscale.learn.recipe import Recipe
from convscale.learn.recipes import get_recipe
from convscale.learn.train import train
from convscale.learn.usual import can_finetune
from convscale.machine import busy
from convscale.networks.foreign import Foreign
from convscale.networks.resolve import Named, is_module, name_of
from convscale.networks.weight_files import WeightFiles
from convscale.pipeline.contender import Contender, Kept, build
from convscale.pipeline.finding import Finder
from convscale.pipeline.finish import Finish, Trained
from convscale.pipeline.heads import OWN
from convscale.pipeline.probing import FINALISTS
from convscale.pipeline.ranking import by_promise, no_worse
from convscale.pipeline.record import RunRecord, written
from convscale.pipeline.request import BRIEF_EPOCHS, FitRequest
from convscale.pipeline.timing import REFERENCE, REFERENCE_SHARE
from convscale.show.fit_parts import Brief, Candidate, Epoch, FrontRow, Winner
from convscale.show.fit_parts import Constraint as WrittenConstraint
from convscale.show.json_values import from_json
from convscale.stats import standard_error

BRIEF_SECONDS = 40
"""An epoch of the comparison takes no longer than this; its schedule ends by then."""
BRIEF_IMAGES = 20_000
"""An epoch of the comparison takes at most so many images, of each class its share: networks that all see the same are
ranked by what they learn, not by where the clock stops them."""
COARSE = 0.02
"""Where the share of right validation images is known no better than this, by its standard error, an epoch of training
tells pretrained finalists apart no better than their features do, and the time is better spent on the winner."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Fit:
    """One run of ``fit``: what was asked for, and its steps in order. Each step skips what its record says is done."""

    asked: FitRequest
    record: RunRecord
    splits: DataSplits
    folder: Path
    basis: Basis
    """On what basis candidates are compared."""
    files: WeightFiles | None
    """Where released weights are looked for; None: trained from scratch."""

    def tell(self, event: Event) -> None:
        """Pass an event on."""
        if self.asked.progress is not None:
            self.asked.progress(event)

    def note(self, text: str) -> None:
        """A line for people."""
        self.tell({"kind": "note", "text": text})

    def remark(self, text: str) -> None:
        """A line for people that the record keeps."""
        self.note(text)
        self.record.add_note(text)

    @property
    def min_throughput(self) -> float:
        """Images/s to keep: what all limits on speed come to."""
        return self.constraint.floor(self.basis.conditions.batch_size)

    @property
    def constraint(self) -> Constraint:
        """What was asked for, or what the run settled on where no speed was."""
        asked, settled = self.asked.constraint, self.record.now.constraint.min_throughput
        if asked.floor(self.basis.conditions.batch_size) or settled is None:
            return asked
        return replace(asked, min_throughput=settled)

    def training(self, contender: Contender) -> dict[str, Any]:
        """Options of ``train`` for every training of a contender."""
        asked = self.asked.training
        return {
            "recipe": self.recipe(contender),
            "init": contender.init,
            "seed": asked.seed,
            "device": self.asked.training_device,
            "image_size": contender.image_size,  # what was timed is what is trained
            **asked.overrides,
        }

    @property
    def brief_epochs(self) -> int:
        """Of the comparison of finalists, where there is one."""
        return self.asked.training.brief_epochs or BRIEF_EPOCHS

    def recipe(self, contender: Contender) -> str:
        """The name of a contender's recipe."""
        asked, pretrained = self.asked.training, contender.weights is not None
        if pretrained and asked.recipe is None:  # as train decides
            pretrained = can_finetune(contender.network, self.splits, asked.overrides)
        return self.asked.recipe_for(self.splits, pretrained=pretrained, image_size=contender.image_size)

    def contenders(self) -> list[Contender]:
        """The finalists that the record names."""
        named: dict[str, Named] = {}
        for item in self.asked.named or ():
            one = Foreign(name_of(item), "module", item) if is_module(item) else item
            if isinstance(one, NetSpec | Foreign):
                named[one.name] = one
        return [Contender.of(row, named) for row in self.record.now.candidates if row.finalist]

    def check(self) -> None:
        """What is odd about the data, before an hour is spent on them."""
        if self.record.now.data_warnings is not None:
            return
        with self.record.clocked("check_s"):
            found = check_data(self.splits, self.asked.size_for(self.splits)).warnings
        self.record.put(data_warnings=found)
        for line in (*self.splits.notes, *found):
            self.note(f"data: {line}")

    def check_input(self) -> None:
        """Whether images are smaller than the input of the network that was chosen, which nobody knew before."""
        size, warnings = self.record.now.winner.image_size, self.record.now.data_warnings
        supposed = self.asked.size_for(self.splits)
        if size is None or warnings is None or size == supposed:
            return
        before, line = (sizes_of(self.splits.train, side).warning for side in (supposed, size))
        told = tuple(text for text in warnings if text not in (before, line))
        self.record.put(data_warnings=(*told, *([line] if line else [])))
        if line and line not in warnings:
            self.note(f"data: {line}")

    # ------------------------------------------------------------ which networks

    def find(self) -> None:
        """Find what keeps the speed, and mark the few that are worth training."""
        if any(row.finalist for row in self.record.now.candidates):
            return
        if warning := "" if self.basis.predicted else busy():
            self.remark(warning)
        with self.record.clocked("measure_s"):
            if not self.min_throughput:
                self._settle()
            self._write_constraint()
            kept, finder = self._kept(bool(warning))
        if kept.missed and self.asked.strict:
            raise UserError(kept.missed)
        if kept.missed:
            self.record.put(missed=kept.missed)
            self.note(f"{kept.missed}; training goes on all the same")
        contenders = list(kept.contenders)
        with self.record.clocked("probe_s"):
            if pretrained := [one for one in contenders if one.weights is not None]:
                recipe = get_recipe(self.recipe(pretrained[0]))
                # it is features that are judged
                recipe = recipe.override({**self.asked.training.overrides, "head": OWN})
                contenders = finder.probed(contenders, recipe)
        chosen = {(c.name, c.image_size) for c in contenders[:FINALISTS]}
        rows = (replace(row, finalist=(row.name, row.image_size) in chosen) for row in self.record.now.candidates)
        self.record.put(candidates=tuple(rows))

    def _finder(self, loaded: bool = False) -> Finder:
        return Finder(
            asked=self.asked,
            splits=self.splits,
            basis=self.basis,
            constraint=self.constraint,
            record=self.record,
            folder=self.folder,
            say=self.note,
            loaded=loaded,
        )

    def _kept(self, loaded: bool = False) -> tuple[Kept, Finder]:
        """Released weights that keep the constraint, or scaled members where there are none or none were wanted.

        Args:
            loaded: other work keeps this machine busy.
        """
        finder = self._finder(loaded)
        if self.files is None:
            return finder.scaled(), finder
        for note in notes_on(self.asked.offer, self.asked.named):
            self.remark(note)
        kept = finder.released(self.files)
        if kept is not None:
            return kept, finder
        if not self.asked.may_have_weights:
            why = "nobody released weights of what was named: networks start from scratch"
        elif self.files.folder is None:
            why = (
                "no released weights can be had (none in the hub's cache, and the hub does not answer): networks start "
                "from scratch, which on few images costs much accuracy; --weights-dir DIR gives files"
            )
        else:
            why = f"no candidate has weights in {self.files.folder}: networks start from scratch"
        self.remark(why)
        return finder.scaled(), finder

    def _settle(self) -> None:
        """No speed was asked for: take the knee of what the device can do, or from scratch a share of a reference's."""
        finder = self._finder()
        front = None if self.files is None else finder.front(self.files)
        if front is None:
            target = finder.reference_speed()
            self.remark(
                f"no speed was asked for: {REFERENCE_SHARE:.0%} of {REFERENCE}'s speed on this device is taken, "
                f"{target:,.0f} images/s"
            )
        else:
            target = float(f"{0.95 * finder.sure_of(front.knee):.2g}")  # the knee itself has to keep it
            rows = tuple(
                FrontRow(name=o.name, image_size=o.image_size, top1=o.top1, images_per_s=o.images_per_s)
                for o in front.rows
            )
            self.record.put(front=rows)
            for row in rows:
                self.note(f"  {row.images_per_s or 0:>10,.0f} images/s  {row.top1:.2f} %  {row.name} @{row.image_size}")
            self.remark(
                f"no speed was asked for: of what this device can do the knee is taken, {front.knee.label} with "
                f"{front.knee.images_per_s:,.0f} images/s; networks of at least {target:,.0f} images/s are compared"
            )
        self.record.put(constraint=WrittenConstraint(min_throughput=target))

    def _write_constraint(self) -> None:
        limits = self.constraint
        self.record.put(
            constraint=WrittenConstraint(
                min_throughput=self.min_throughput,
                conditions=written(replace(self.basis.conditions, image_size=self.asked.size_for(self.splits))),
                max_latency_ms=limits.max_latency_ms,
                max_memory_gb=limits.max_memory_gb,
                max_params_m=limits.max_params_m,
                confidence=limits.confidence if self.basis.predicted else None,
            )
        )

    def compare(self) -> None:
        """Train the finalists briefly, where that tells more of them than their features did, and name the winner."""
        if self.record.now.winner.name:
            return
        last = self.contenders()
        rows = [row for row in self.record.now.candidates if row.finalist]
        if (doubt := self._too_coarse(rows)) is not None:
            self._name_by_features(rows, doubt)
            return
        with self.record.clocked("brief_s"):
            for contender in last if len(last) > 1 else ():
                row = self.record.row(contender.name, contender.image_size)
                assert row is not None
                if row.brief is None:
                    self.record.put_row(replace(row, brief=self._train_briefly(contender)))
        self._name_winner([c for c in self.record.now.candidates if c.finalist])

    def _too_coarse(self, rows: Sequence[Candidate]) -> float | None:
        """The standard error of the best probe on the validation set, where it is so large that a brief training would
        tell no more than the probes did; None where it is worth its time, was asked for, or a finalist has no probe.
        """
        probes = [row.probe.top1 for row in rows if row.probe is not None and row.probe.top1 is not None]
        if len(rows) < 2 or len(probes) < len(rows) or self.asked.training.brief_epochs or self.splits.multilabel:
            return None
        if any(row.brief is not None for row in rows):  # by a version that compared whatever there was
            return None
        doubt = standard_error(max(probes), len(self.splits.validation))
        return doubt if doubt > COARSE else None

    def _name_by_features(self, rows: Sequence[Candidate], doubt: float) -> None:
        """The winner of those that no brief training would tell apart."""
        first, *others = by_promise(rows, rows, self.splits.multilabel)
        self.remark(
            f"the finalists were not trained briefly: {words.plural(len(self.splits.validation), 'validation image')} "
            f"tell no networks apart that are within {100 * doubt:.1f} points; a new run with --brief-epochs 1 does it "
            "all the same"
        )
        best, worth = max(_probed(row) for row in rows), no_worse(rows, self.splits.multilabel)
        published = first.published_top1 is not None
        keeps = "" if self.record.now.missed else "keeps it; "
        by = f"{self.label(first)} comes first by "
        by += "its published accuracy" if published else "them all the same: nobody published any for these image sizes"
        reasons = {
            key_of(row): f"{keeps}its features are {100 * (best - _probed(row)):.1f} points behind on this data"
            if best - _probed(row) >= worth
            else f"{keeps}its features are as good within {100 * worth:.1f} points, {by}"
            for row in others
        }
        of = f"features{' and published accuracy' * published}"
        reason = f"by {of} the most promising of {len(rows)} finalists"
        reasons[key_of(first)] = f"of {len(rows)} finalists the most promising by {of}"
        fast = "though it misses the speed" if self.record.now.missed else "and fast enough"
        self._put_winner(first, f"{reason}, {fast}", reasons)

    def _train_briefly(self, contender: Contender) -> Brief:
        epochs = self.brief_epochs
        self.note(f"comparing: {contender.name}, {words.plural(epochs, 'epoch')}")
        options = {**self.training(contender), "epochs": epochs, "max_seconds": BRIEF_SECONDS * epochs}
        recipe = get_recipe(self.recipe(contender)).override(dict(self.asked.training.overrides))
        options |= _whole_schedule(recipe, epochs)
        network = contender.network
        if (
            isinstance(network, Foreign) and network.module is not None
        ):  # it would be trained itself, and the full training go on from there
            network = replace(network, module=copy.deepcopy(network.module))
        run = train(network, self._few(), progress=self._steps_only, **options)
        self.note(f"comparing: {contender.name} reached {run.best_metric:.2%} on validation in {run.seconds:.0f} s")
        return Brief(epochs=epochs, top1=run.best_metric, seconds=run.seconds)

    def _few(self) -> DataSplits:
        """The data with a train set of ``BRIEF_IMAGES`` at most."""
        labels = self.splits.train.labels
        if len(labels) <= BRIEF_IMAGES:
            return self.splits
        share = BRIEF_IMAGES / len(labels)
        _, few = split_indices(labels, share, seed=self.asked.training.seed, classes=self.splits.classes)
        return replace(self.splits, train=self.splits.train.subset(few))

    def _steps_only(self, event: Event) -> None:
        if event["kind"] == "step":
            self.tell(event)

    def _name_winner(self, rows: list[Candidate]) -> None:
        fast = "though it misses the speed" if self.record.now.missed else "and fast enough"
        if len(rows) == 1:
            winner = rows[0]
            alone = "the fastest there is" if self.record.now.missed else "the only candidate worth training"
            reason = alone if self.record.now.missed else f"{alone} {fast}"
            reasons = {key_of(winner): reason}
        else:
            winner = max(rows, key=lambda c: c.brief_top1 or 0.0)
            label, best, epochs = self.label(winner), winner.brief_top1 or 0.0, words.plural(self.brief_epochs, "epoch")
            reason = f"the most accurate of {len(rows)} finalists on validation after {epochs}, {fast}"
            reasons = {
                key_of(c): f"{100 * (best - (c.brief_top1 or 0.0)):.1f} points behind {label} after {epochs}"
                for c in rows
            }
            reasons[key_of(winner)] = f"most accurate on validation after {epochs}"
        self._put_winner(winner, reason, reasons)

    def _put_winner(self, winner: Candidate, reason: str, reasons: Mapping[Key, str]) -> None:
        """The winner, and of each finalist what became of it."""
        everyone = (
            replace(c, reason=reasons.get(key_of(c), c.reason)) if c.finalist else c for c in self.record.now.candidates
        )
        named = Winner(
            name=winner.name,
            image_size=winner.image_size,
            reason=reason,
            weights=winner.weights,
            licence=winner.licence or None,
            extra_data=winner.extra_data,
        )
        self.record.put(candidates=tuple(everyone), winner=named)
        self.note(f"chosen: {self.label(winner)}, {reason}")

    def label(self, row: Candidate) -> str:
        """A candidate's name, with its image size where that is needed to tell it."""
        return self.record.now.label_of(row)

    # ------------------------------------------------------------ the one that was chosen

    def finish(self) -> Finish:
        """The last step."""
        return Finish(
            asked=self.asked,
            record=self.record,
            splits=self.splits,
            folder=self.folder,
            basis=self.basis,
            min_throughput=self.min_throughput,
            say=self.note,
            network=self._winner().spec,
        )

    def _winner(self) -> Contender:
        chosen = self.record.now.chosen
        assert chosen is not None, "there is a winner"
        return next(c for c in self.contenders() if (c.name, c.image_size) == (chosen.name, chosen.image_size))

    def facts(self) -> dict[str, object]:
        """What an experiment tracker is told of the run: the winner's recipe, the data, what was asked for."""
        asked, winner, now = self.asked.training, self._winner(), self.record.now
        epochs = {} if asked.epochs is None else {"epochs": asked.epochs}
        recipe = get_recipe(self.recipe(winner)).override({**asked.overrides, **epochs})
        return {
            **recipe.to_dict(),
            "model": winner.name,
            "image_size": winner.image_size,
            "seed": asked.seed,
            "device": self.basis.conditions.device,
            "min_throughput": self.min_throughput,
            "data_digest": now.data.digest,
            "commit": now.commit,
        }

    def train_winner(self, tell: Progress) -> Trained:
        """The full training, told to ``tell``; a run that was interrupted goes on at its last state."""
        place = self.folder / "train"
        if self.record.now.history and place.is_dir():
            spec = self._winner().spec
            own = isinstance(spec, Foreign) and spec.origin != "timm"  # nobody but the user can build it
            done = load_checkpoint(place, net=build(spec, self.splits) if own else None)
            return Trained(
                net=done.net.eval(),
                preprocessing=done.preprocessing,
                thresholds=done.thresholds,
                temperatures=done.temperatures,
            )
        contender = self._winner()
        minutes = self.asked.training.max_minutes
        options = self.training(contender)
        if self.asked.resume and (place / "recipe.yaml").is_file():
            options["recipe"] = None  # it goes on by the one that it began with: a name may mean another one today
        with self.record.clocked("train_s"):
            try:
                run = train(
                    contender.network,
                    self.splits,
                    epochs=self.asked.training.checked_epochs(self.recipe(contender)),
                    output=place,
                    max_seconds=None if minutes is None else 60 * minutes,
                    resume=self.asked.resume,
                    overwrite=True,
                    progress=tell,
                    **options,
                )
            except Stopped as error:  # its advice is for a training alone
                raise Stopped(f"told to stop before training began; go on with --resume in {self.folder}") from error
        if not run.finished:
            raise Stopped(f"training was told to stop; its state is in {place}, go on with --resume")
        self.record.put(
            winner=replace(self.record.now.winner, validation_top1=run.best_metric),
            history=tuple(from_json(Epoch, json_numbers(row), "history") for row in run.history),
            recipe=asdict(run.recipe),
            training_notes=tuple(run.notes),
            cost=run.describe(),
        )
        self.note(run.describe())
        return Trained(
            net=run.net, preprocessing=run.preprocessing, thresholds=run.thresholds, temperatures=run.temperatures
        )


def _whole_schedule(recipe: Recipe, epochs: int) -> dict[str, object]:
    """Recipe keys by which so few epochs go through all of a schedule that is drawn for many, not its first part."""
    if not recipe.schedule_epochs:
        return {}
    return {"schedule_epochs": 0, "warmup_epochs": recipe.warmup_epochs * epochs / recipe.schedule_epochs}


Key = tuple[str, int | None]


def key_of(row: Candidate) -> Key:
    """What tells a candidate from all others: its name and image size."""
    return row.name, row.image_size


def _probed(row: Candidate) -> float:
    """The share of validation images that the head on its features gets right."""
    return (row.probe.top1 if row.probe else None) or 0.0
