"""The whole way: images, a device and a speed become a chosen, trained, exported, checked and explained network."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

from convscale import words
from convscale.artifact.artifact import Artifact
from convscale.choice.basis import Asked, Basis, at_hand, check_device
from convscale.conditions import Constraint
from convscale.errors import Stopped, UserError
from convscale.files import json_numbers, new_output_dir
from convscale.images.check import check_data
from convscale.images.sources import open_dataset
from convscale.images.splits import DataSplits
from convscale.learn.checkpoint import load_checkpoint
from convscale.learn.progress import Event, Progress
from convscale.learn.recipes import get_recipe
from convscale.learn.train import train
from convscale.machine import Environment, busy
from convscale.networks.offered import Filter
from convscale.networks.weight_files import WeightFiles
from convscale.pipeline.contender import Contender
from convscale.pipeline.finding import FINALISTS, REFERENCE, REFERENCE_SHARE, Finder, Kept
from convscale.pipeline.finish import Finish, Trained
from convscale.pipeline.record import RunRecord, describe, written
from convscale.pipeline.request import FitRequest, Given, Start, Training
from convscale.pipeline.ship import Shipping
from convscale.show.fit_record import Brief, Candidate, Epoch, FitRecord, FrontRow, Winner
from convscale.show.fit_record import Constraint as WrittenConstraint
from convscale.show.json_values import from_json
from convscale.show.report import write_fit_report

BRIEF_SECONDS = 40
"""An epoch of the comparison takes no longer than this; its schedule ends by then."""
_BYTES_NEEDED = 500_000_000


@dataclass(frozen=True, kw_only=True, eq=False)
class FitRun:
    """What ``fit`` made."""

    output: Path
    """The folder: ``report.html``, ``fit.json``, ``artifact/``, ``train/`` with the checkpoints."""
    net: nn.Module
    """The trained network, in eval mode."""
    artifact: Artifact
    """What is shipped, opened."""
    result: FitRecord
    """What ``fit.json`` holds."""

    @property
    def record(self) -> dict[str, object]:
        """``fit.json`` as plain JSON values."""
        return self.result.to_json()

    @property
    def missed(self) -> str:
        """By how much the constraint is missed, in words; empty where it is kept."""
        return self.result.missed or ""

    @property
    def report(self) -> Path:
        """The report for people."""
        return self.output / "report.html"


def fit(
    data_dir: str | os.PathLike[str] | DataSplits,
    *,
    output: str | os.PathLike[str],
    min_throughput: float | None = None,
    max_latency_ms: float | None = None,
    max_memory_gb: float | None = None,
    max_params_m: float | None = None,
    confidence: float = 0.8,
    device: str = "cpu",
    batch_size: int | None = None,
    precision: str | None = None,
    runtime: str | None = None,
    int8: bool = False,
    max_drop: float = 0.5,
    threads: int | None = None,
    image_size: int | None = None,
    candidates: Given | None = None,
    zoo: str = "all",
    licences: Sequence[str] | None = None,
    commercial: bool = False,
    extra_data: bool = True,
    attention: bool = False,
    scratch: bool | None = None,
    weights_dir: str | os.PathLike[str] | None = None,
    init: str | os.PathLike[str] | None = None,
    recipe: str | None = None,
    epochs: int | None = None,
    brief_epochs: int = 1,
    max_minutes: float | None = None,
    seed: int = 0,
    strict: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    overrides: Mapping[str, object] | None = None,
) -> FitRun:
    """Choose, train, export, verify and report the most accurate network that keeps a speed on a device.

    Candidates are released weights, chosen among as ``choose`` does, in the form in which they would ship: by
    measurement where the device is this machine's, else by prediction. A linear head on their features ranks them on
    the data; at most three are trained briefly, the best in full. Small images (up to 64 px a side) are learned from
    scratch: of each scalable family the largest member that keeps the speed is found by bisection. What is shipped is
    the fastest form that passed its gate, in the settings in which it is fastest.

    Where nothing keeps the constraint the fastest network is trained, and the run says by how much it misses
    (``FitRun.missed``).

    Args:
        data_dir: what ``open_dataset`` takes: class folders, idx files, a manifest.
        output: the folder to make.
        min_throughput: images/s that the exported network must reach at ``batch_size``, model only. Without any limit
            on speed the device's front is found and its knee taken.
        max_latency_ms: milliseconds that a call of the whole batch may take.
        max_memory_gb: 2**30 bytes that may be alive at once in a call, as counted.
        max_params_m: millions of parameters.
        confidence: probability with which a predicted speed must keep the limits, 0.5 to 0.99.
        device: where it will run: ``cpu``, ``cuda`` or a named GPU (``l4``), for which speeds are predicted.
        batch_size: images per call of the shipped network; None: 8 on this machine, 256 on a named GPU, 1 where a
            latency alone is limited.
        precision: of the shipped network.
        runtime: here ``onnxruntime`` or ``openvino``, None: the fastest installed one; on a named GPU what its speed is
            predicted for, None: ``compiled``.
        int8: ship INT8 where it is faster and keeps its accuracy; the validation set chooses the layers that stay in
            float.
        max_drop: accuracy points that INT8 may lose on validation.
        threads: of the runtime; None: one per core.
        image_size: side in pixels; None: the candidates' own, or from scratch the data's up to 64 px, else 224.
        candidates: names, patterns, tags, specs or modules to choose from; None: all released weights that the options
            below let through.
        zoo, licences, commercial, extra_data, attention: which released weights; as for ``choose``.
        scratch: True: scaled members of TResNet, EfficientNet and ResNet-D, from scratch; False: released weights;
            None: from scratch for small images.
        weights_dir: folder with released weights: files named by tag, or as in the hub's cache.
        init: ``pretrained``: released weights even for small images; or a file of weights of the one candidate.
        recipe: how to train; None: ``finetune`` from released weights, else ``small`` or ``pictures``.
        epochs: of the full training; None: the recipe's.
        brief_epochs: of the comparison.
        max_minutes: the full training ends by then at the latest, its schedule with it.
        seed: of everything drawn.
        strict: raise where nothing keeps the constraint, instead of training the fastest.
        resume: go on in ``output``.
        overwrite: replace ``output``.
        progress: called with events; see ``learn.progress``.
        overrides: recipe keys.

    Raises:
        UserError: bad input, an artefact that does not agree, or with ``strict`` a constraint that nothing keeps.
    """
    given = None if init in (None, "pretrained") else Path(init)  # pyright: ignore[reportArgumentType]
    named_gpu = not at_hand(check_device(device))
    asked = FitRequest(
        data=data_dir,
        output=output,  # pyright: ignore[reportArgumentType]
        constraint=Constraint(
            min_throughput=min_throughput,
            max_latency_ms=max_latency_ms,
            max_memory_gb=max_memory_gb,
            max_params_m=max_params_m,
            confidence=confidence,
        ),
        where=Asked(
            device=device,
            batch_size=batch_size,
            precision=precision,
            runtime=runtime if named_gpu else None,
            threads=threads,
            latency=max_latency_ms is not None and min_throughput is None,
        ),
        shipping=Shipping(runtime=None if named_gpu else runtime, int8=int8, max_drop=max_drop),
        training=Training(
            recipe=recipe,
            init="pretrained" if init == "pretrained" else None,
            epochs=epochs,
            brief_epochs=brief_epochs,
            max_minutes=max_minutes,
            seed=seed,
            overrides={} if overrides is None else overrides,
        ),
        start=Start(
            scratch=scratch,
            weights_dir=None if weights_dir is None else Path(weights_dir),
            file=given,
        ),
        candidates=candidates,
        image_size=image_size,
        offer=Filter(
            zoo=zoo,
            licences=None if licences is None else tuple([licences] if isinstance(licences, str) else licences),
            commercial=commercial,
            extra_data=extra_data,
            attention=attention,
        ),
        strict=strict,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
    )
    return fit_request(asked)


def fit_request(asked: FitRequest) -> FitRun:
    """``fit`` by one value."""
    splits = asked.data if isinstance(asked.data, DataSplits) else open_dataset(asked.data)
    files = None if asked.from_scratch(splits) else asked.start.files(asked.named)
    request = asked.to_json(splits)
    folder = new_output_dir(asked.output, overwrite=asked.overwrite, resume=asked.resume, need_bytes=_BYTES_NEEDED)
    run = _Fit(
        asked=asked,
        record=RunRecord(folder, request, resume=asked.resume),
        splits=splits,
        folder=folder,
        basis=asked.basis(),
        files=files,
    )
    run.record.put(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=_command(),
        environment=asdict(Environment.here(asked.training_device)),
        data=describe(splits, str(request["data"]), asked.size_for(splits)),
    )
    run.check()
    run.find()
    run.compare()
    trained = run.train_winner()
    artifact = run.finish().ship(trained)
    spent = {key: seconds for key, seconds in run.record.now.timings.items() if key != "total_s"}
    run.record.put(timings={**spent, "total_s": sum(spent.values())})
    write_fit_report(folder)
    run.note(f"report: {folder / 'report.html'}")
    return FitRun(output=folder, net=trained.net, artifact=artifact, result=run.record.now)


def _command() -> str:
    """How this was called, for whoever wants to repeat it."""
    called = sys.argv and Path(sys.argv[0]).name == "convscale"
    return shlex.join(["convscale", *sys.argv[1:]]) if called else "convscale.fit(...)"


@dataclass(frozen=True, kw_only=True, eq=False)
class _Fit:
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

    def recipe(self, contender: Contender) -> str:
        """The name of a contender's recipe."""
        return self.asked.recipe_for(self.splits, pretrained=contender.weights is not None)

    def contenders(self) -> list[Contender]:
        """The finalists that the record names."""
        return [Contender.of(row) for row in self.record.now.candidates if row.finalist]

    def check(self) -> None:
        """What is odd about the data, before an hour is spent on them."""
        if self.record.now.data_warnings is not None:
            return
        with self.record.clocked("check_s"):
            found = check_data(self.splits, self.asked.size_for(self.splits)).warnings
        self.record.put(data_warnings=found)
        for line in found:
            self.note(f"data: {line}")

    # ------------------------------------------------------------ which networks

    def find(self) -> None:
        """Find what keeps the speed, and mark the few that are worth training."""
        if any(row.finalist for row in self.record.now.candidates):
            return
        if (warning := busy()) and not self.basis.predicted:
            self.remark(warning)
        with self.record.clocked("measure_s"):
            if not self.min_throughput:
                self._settle()
            self._write_constraint()
            kept, finder = self._kept()
        if kept.missed and self.asked.strict:
            raise UserError(kept.missed)
        if kept.missed:
            self.record.put(missed=kept.missed)
            self.note(f"{kept.missed}; it is trained all the same")
        contenders = list(kept.contenders)
        with self.record.clocked("probe_s"):
            if contenders[0].weights is not None:
                recipe = get_recipe(self.recipe(contenders[0])).override(dict(self.asked.training.overrides))
                contenders = finder.probed(contenders, recipe)
        chosen = {(c.name, c.image_size) for c in contenders[:FINALISTS]}
        rows = (replace(row, finalist=(row.name, row.image_size) in chosen) for row in self.record.now.candidates)
        self.record.put(candidates=tuple(rows))

    def _finder(self) -> Finder:
        return Finder(
            asked=self.asked,
            splits=self.splits,
            basis=self.basis,
            constraint=self.constraint,
            record=self.record,
            folder=self.folder,
            say=self.note,
        )

    def _kept(self) -> tuple[Kept, Finder]:
        """Released weights that keep the constraint, or scaled members where there are none or none were wanted."""
        finder = self._finder()
        if self.files is None:
            return finder.scaled(), finder
        kept = finder.released(self.files)
        if kept is not None:
            return kept, finder
        self.remark(
            "no released weights can be had (none in the hub's cache, and the hub does not answer): networks start "
            "from scratch, which on few images costs much accuracy; --weights-dir DIR gives files"
            if self.files.folder is None
            else f"no candidate has weights in {self.files.folder}: networks start from scratch"
        )
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
            target = float(f"{0.95 * (front.knee.images_per_s or 0.0):.2g}")
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
        """Train the finalists briefly and name the winner."""
        if self.record.now.winner.name:
            return
        last = self.contenders()
        with self.record.clocked("brief_s"):
            for contender in last if len(last) > 1 else ():
                row = self.record.row(contender.name, contender.image_size)
                assert row is not None
                if row.brief is None:
                    self.record.put_row(replace(row, brief=self._train_briefly(contender)))
        self._name_winner([c for c in self.record.now.candidates if c.finalist])

    def _train_briefly(self, contender: Contender) -> Brief:
        epochs = self.asked.training.brief_epochs
        self.note(f"comparing: {contender.name}, {words.plural(epochs, 'epoch')}")
        options = {"epochs": epochs, "max_seconds": BRIEF_SECONDS * epochs}
        run = train(contender.network, self.splits, progress=self._steps_only, **options, **self.training(contender))
        self.note(f"comparing: {contender.name} reached {run.best_metric:.2%} on validation in {run.seconds:.0f} s")
        return Brief(epochs=epochs, top1=run.best_metric, seconds=run.seconds)

    def _steps_only(self, event: Event) -> None:
        if event["kind"] == "step":
            self.tell(event)

    def _name_winner(self, rows: list[Candidate]) -> None:
        fast = "though it misses the speed" if self.record.now.missed else "and fast enough"
        if len(rows) == 1:
            winner = rows[0]
            alone = "the fastest there is" if self.record.now.missed else "the only candidate worth training"
            reason = alone if self.record.now.missed else f"{alone} {fast}"
            reasons = {winner.name: reason}
        else:
            winner = max(rows, key=lambda c: c.brief_top1 or 0.0)
            best, epochs = winner.brief_top1 or 0.0, words.plural(self.asked.training.brief_epochs, "epoch")
            reason = f"the most accurate of {len(rows)} finalists on validation after {epochs}, {fast}"
            reasons = {
                c.name: f"{100 * (best - (c.brief_top1 or 0.0)):.1f} points behind {winner.name} after {epochs}"
                for c in rows
            }
            reasons[winner.name] = f"most accurate on validation after {epochs}"
        everyone = (
            replace(c, reason=reasons.get(c.name, c.reason)) if c.finalist else c for c in self.record.now.candidates
        )
        named = Winner(name=winner.name, reason=reason, weights=winner.weights)
        self.record.put(candidates=tuple(everyone), winner=named)
        self.note(f"chosen: {winner.name}, {reason}")

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
        )

    def train_winner(self) -> Trained:
        """The full training; a run that was interrupted goes on at its last state."""
        place = self.folder / "train"
        if self.record.now.history and place.is_dir():
            done = load_checkpoint(place)
            return Trained(net=done.net.eval(), preprocessing=done.preprocessing, thresholds=done.thresholds)
        contender = next(c for c in self.contenders() if c.name == self.record.now.winner.name)
        minutes = self.asked.training.max_minutes
        with self.record.clocked("train_s"):
            run = train(
                contender.network,
                self.splits,
                epochs=self.asked.training.checked_epochs(self.recipe(contender)),
                output=place,
                max_seconds=None if minutes is None else 60 * minutes,
                resume=self.asked.resume,
                overwrite=True,
                progress=self.tell,
                **self.training(contender),
            )
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
        return Trained(net=run.net, preprocessing=run.preprocessing, thresholds=run.thresholds)
