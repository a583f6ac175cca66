"""The whole way: images, a device and a speed become a chosen, trained, exported, checked and explained network."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convscale import words
from convscale.arch.spec import NetSpec
from convscale.artifact.artifact import Artifact
from convscale.choice.finalists import Timed as TimedSpec
from convscale.choice.finalists import finalists
from convscale.conditions import Conditions, Constraint
from convscale.cost.counting import count
from convscale.errors import Stopped, UserError
from convscale.files import json_numbers, new_output_dir
from convscale.images.preprocess import Preprocessing
from convscale.images.sources import open_dataset
from convscale.images.splits import DataSplits
from convscale.learn.checkpoint import load_checkpoint
from convscale.learn.evaluate import evaluate
from convscale.learn.loader import readable
from convscale.learn.progress import Event, Progress
from convscale.learn.train import train
from convscale.machine import Environment
from convscale.nn.net import create_model
from convscale.pipeline.record import describe, evaluation_record, mistakes
from convscale.pipeline.request import FitRequest, Given, Training
from convscale.pipeline.ship import Shipping, ship_fastest, shipped_speed
from convscale.runtimes.base import file_runtimes
from convscale.show.fit_record import (
    FILE,
    Brief,
    Candidate,
    Epoch,
    FitRecord,
    Int8,
    Search,
    Shipped,
    Timed,
    Verification,
    Winner,
    read_fit,
)
from convscale.show.fit_record import Constraint as WrittenConstraint
from convscale.show.json_values import from_json
from convscale.show.report import write_fit_report
from convscale.show.stated import Conditions as WrittenConditions
from convscale.speed.measuring import measure

SCHEMA = 1
CLEARLY_TOO_SLOW = 0.8
"""A family's larger members are not measured once one runs at less than this share of the constraint."""
BRIEF_SECONDS = 60
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
    def report(self) -> Path:
        """The report for people."""
        return self.output / "report.html"


class _Record:
    """``fit.json`` as it grows: written after every step, so that a resumed run goes on where the last one stopped."""

    def __init__(self, folder: Path, request: dict[str, object], *, resume: bool) -> None:
        self.folder = folder
        digest = hashlib.sha256(json.dumps(request, sort_keys=True, default=str).encode()).hexdigest()
        self.now = FitRecord(request=request, request_digest=digest)
        if resume and (folder / FILE).is_file():
            old = read_fit(folder)
            if old.request_digest != digest:
                raise UserError(
                    f"{folder} was made by another request ({old.command or 'unknown'}); repeat it, or use --overwrite"
                )
            self.now = old

    def put(self, **values: object) -> None:
        """Set parts of the record, and save it."""
        self.now = replace(self.now, **values)  # pyright: ignore[reportArgumentType]
        self.now.save(self.folder)

    def put_candidate(self, candidate: Candidate) -> None:
        """Set one candidate by its name, and save."""
        rest = self.now.candidates
        known = any(c.name == candidate.name for c in rest)
        rows = [candidate if c.name == candidate.name else c for c in rest]
        self.put(candidates=tuple(rows if known else [*rows, candidate]))


def fit(
    data_dir: str | os.PathLike[str] | DataSplits,
    *,
    min_throughput: float,
    output: str | os.PathLike[str],
    device: str = "cpu",
    batch_size: int = 8,
    precision: str = "fp32",
    runtime: str | None = None,
    int8: bool = False,
    max_drop: float = 0.5,
    threads: int | None = None,
    image_size: int | None = None,
    candidates: Given | None = None,
    recipe: str | None = None,
    init: str | None = None,
    epochs: int | None = None,
    brief_epochs: int = 1,
    max_minutes: float | None = None,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    overrides: Mapping[str, object] | None = None,
) -> FitRun:
    """Choose, train, export, verify and report the most accurate network that keeps a speed on this device.

    Candidates are exported untrained and timed in the runtime; at most three that keep the speed are trained briefly
    and compared on validation; the best is trained in full, exported, compared with the trained network on the whole
    test set, tuned, and explained. What is shipped is the fastest form that passed its gate, in the settings in which
    it is fastest.

    Args:
        data_dir: what ``open_dataset`` takes: class folders, idx files, a manifest.
        min_throughput: images/s that the exported network must reach at ``batch_size``, model only.
        output: the folder to make.
        device: where it will run and is trained: ``cpu`` or ``cuda``.
        batch_size: images per call of the shipped network.
        precision: of the shipped network.
        runtime: ``onnxruntime`` or ``openvino``; None: candidates are timed in ONNX Runtime, and what is shipped runs
            in the fastest installed one.
        int8: ship INT8 where it is faster and keeps its accuracy; the validation set chooses the layers that stay in
            float.
        max_drop: accuracy points that INT8 may lose on validation.
        threads: of the runtime; None: one per core.
        image_size: side in pixels; None: the data's own up to 64 px, else 224.
        candidates: names or specs to choose from as they are, or a single one; None: scaled members of TResNet,
            EfficientNet and ResNet-D.
        recipe: how to train; None: ``small`` for small images in memory, ``finetune`` with ``init``, else ``pictures``.
        init: ``pretrained`` starts candidates that are names from their released weights; None: from scratch.
        epochs: of the full training; None: the recipe's.
        brief_epochs: of the comparison.
        max_minutes: the full training ends by then at the latest, its schedule with it.
        seed: of everything drawn.
        resume: go on in ``output``.
        overwrite: replace ``output``.
        progress: called with events; see ``learn.progress``.
        overrides: recipe keys.

    Raises:
        UserError: bad input, a constraint that nothing meets (the fastest and its speed are named), or an artefact that
            does not agree.
    """
    shipping = Shipping(runtime=runtime, int8=int8, max_drop=max_drop)
    return fit_request(
        FitRequest(
            data=data_dir,
            output=output,  # pyright: ignore[reportArgumentType]
            constraint=Constraint(min_throughput=min_throughput),
            conditions=Conditions(
                device=device,
                precision=precision,
                batch_size=batch_size,
                runtime=runtime or file_runtimes()[0],
                threads=threads,
            ),
            shipping=shipping,
            training=Training(
                recipe=recipe,
                init=init,
                epochs=epochs,
                brief_epochs=brief_epochs,
                max_minutes=max_minutes,
                seed=seed,
                overrides={} if overrides is None else overrides,
            ),
            candidates=candidates,
            image_size=image_size,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
        )
    )


def fit_request(asked: FitRequest) -> FitRun:
    """``fit`` by one value."""
    splits = asked.data if isinstance(asked.data, DataSplits) else open_dataset(asked.data)
    if splits.multilabel:
        raise UserError("fit takes one label per image; train, evaluate and export take several")
    request = asked.to_json(splits)
    folder = new_output_dir(asked.output, overwrite=asked.overwrite, resume=asked.resume, need_bytes=_BYTES_NEEDED)
    run = _Fit(asked=asked, record=_Record(folder, request, resume=asked.resume), splits=splits, folder=folder)
    size = asked.size_for(splits)
    run.record.put(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=_command(),
        constraint=WrittenConstraint(
            min_throughput=run.min_throughput, conditions=_written(replace(asked.conditions, image_size=size))
        ),
        environment=asdict(Environment.here(asked.conditions.device)),
        data=describe(splits, str(request["data"]), size),
    )
    run.time_candidates()
    run.compare()
    net, preprocessing = run.train_winner()
    artifact = run.ship(net, preprocessing)
    spent = {key: seconds for key, seconds in run.record.now.timings.items() if key != "total_s"}
    run.record.put(timings={**spent, "total_s": sum(spent.values())})
    write_fit_report(folder)
    run.note(f"report: {folder / 'report.html'}")
    return FitRun(output=folder, net=net, artifact=artifact, result=run.record.now)


def _command() -> str:
    """How this was called, for whoever wants to repeat it."""
    called = sys.argv and Path(sys.argv[0]).name == "convscale"
    return shlex.join(["convscale", *sys.argv[1:]]) if called else "convscale.fit(...)"


def build(spec: NetSpec, splits: DataSplits) -> nn.Module:
    """An untrained network for the data's classes and channels; torch's global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        return create_model(spec, num_classes=len(splits.classes), in_chans=splits.channels)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Fit:
    """One run of ``fit``: what was asked for, and its steps in order. Each step skips what its record says is done."""

    asked: FitRequest
    record: _Record
    splits: DataSplits
    folder: Path

    @cached_property
    def pool(self) -> list[tuple[NetSpec, str]]:
        """(spec, family) of every candidate."""
        return self.asked.pool(self.splits)

    @property
    def min_throughput(self) -> float:
        """Images/s to keep."""
        assert self.asked.constraint.min_throughput is not None
        return self.asked.constraint.min_throughput

    @property
    def training(self) -> dict[str, Any]:
        """Options of ``train`` for every training."""
        asked = self.asked.training
        return {
            "recipe": self.asked.recipe_for(self.splits),
            "init": asked.init,
            "seed": asked.seed,
            "device": self.asked.conditions.device,
            **asked.overrides,
        }

    def tell(self, event: Event) -> None:
        """Pass an event on."""
        if self.asked.progress is not None:
            self.asked.progress(event)

    def note(self, text: str) -> None:
        """A line for people."""
        self.tell({"kind": "note", "text": text})

    @contextmanager
    def clocked(self, key: str) -> Iterator[None]:
        """Add the time of a step to the record."""
        start = time.monotonic()
        yield
        spent = self.record.now.timings
        self.record.put(timings={**spent, key: spent.get(key, 0.0) + time.monotonic() - start})

    def time_candidates(self) -> None:
        """Export every candidate untrained and time it in the runtime, a family's from small to large until one is
        clearly too slow.
        """
        timed = {c.name: c for c in self.record.now.candidates}
        too_slow: dict[str, str] = {}
        with self.clocked("measure_s"):
            for number, (spec, family) in enumerate(self.pool, start=1):
                if spec.name not in timed:
                    timed[spec.name] = self._time(spec, family, too_slow.get(family))
                    self.record.put_candidate(timed[spec.name])
                speed = timed[spec.name].images_per_s
                if speed is not None:
                    self.note(
                        f"timed {number}/{len(self.pool)}: {spec.name} {speed:,.0f} images/s (needed "
                        f"{self.min_throughput:,.0f})"
                    )
                    if speed < CLEARLY_TOO_SLOW * self.min_throughput:
                        too_slow.setdefault(family, spec.name)

    def _time(self, spec: NetSpec, family: str, slower: str | None) -> Candidate:
        net = build(spec, self.splits)
        size = spec.input.size
        cost = count(net, image_size=size)
        lineage = spec.lineage
        candidate = Candidate(
            name=spec.name,
            family=family,
            image_size=size,
            params=cost.params,
            macs=cost.macs,
            scaling=None
            if lineage is None
            else {"depth": lineage.depth, "width": lineage.width, "resolution": lineage.resolution},
        )
        if slower:
            return replace(candidate, reason=f"not measured: larger than {slower}, which is too slow already")
        made = measure(net, replace(self.asked.conditions, image_size=size), min_seconds=1.0, max_seconds=10.0)
        return replace(candidate, measurement=Timed.of(made))

    def compare(self) -> None:
        """Train the finalists briefly and name the winner."""
        if self.record.now.winner.name:
            return
        specs = {spec.name: spec for spec, _ in self.pool}
        timed = [
            TimedSpec(spec=specs[c.name], family=c.family or "", macs=c.macs or 0, images_per_s=c.images_per_s)
            for c in self.record.now.candidates
            if c.images_per_s is not None
        ]
        chosen = {candidate.spec.name for candidate in finalists(timed, self.min_throughput)}
        self.record.put(candidates=tuple(self._judged(c, chosen) for c in self.record.now.candidates))
        last = [c for c in self.record.now.candidates if c.finalist]
        with self.clocked("brief_s"):
            for c in last:
                if c.brief is None and len(last) > 1:
                    self.record.put_candidate(replace(c, brief=self._train_briefly(specs[c.name])))
        self._name_winner([c for c in self.record.now.candidates if c.finalist])

    def _judged(self, c: Candidate, chosen: set[str]) -> Candidate:
        """The candidate with whether it is fast enough and goes on, and why not."""
        speed = c.images_per_s
        kept = speed is not None and speed >= self.min_throughput
        reason = c.reason
        if speed is not None and not kept:
            reason = f"too slow: {speed:,.0f} of {self.min_throughput:,.0f} images/s"
        elif kept and c.name not in chosen:
            reason = "fast enough, but so is a larger member of its family"
        return replace(c, kept=kept, finalist=c.name in chosen, reason=reason)

    def _train_briefly(self, spec: NetSpec) -> Brief:
        epochs = self.asked.training.brief_epochs
        self.note(f"comparing: {spec.name}, {words.plural(epochs, 'epoch')}")
        options = {"epochs": epochs, "max_seconds": BRIEF_SECONDS * epochs, "image_size": spec.input.size}
        run = train(spec, self.splits, progress=self._steps_only, **options, **self.training)
        self.note(f"comparing: {spec.name} reached {run.best_metric:.2%} on validation in {run.seconds:.0f} s")
        return Brief(epochs=epochs, top1=run.best_metric, seconds=run.seconds)

    def _steps_only(self, event: Event) -> None:
        if event["kind"] == "step":
            self.tell(event)

    def _name_winner(self, rows: list[Candidate]) -> None:
        if len(rows) == 1:
            winner, reason = rows[0], "the only candidate that is fast enough"
            reasons = {winner.name: reason}
        else:
            winner = max(rows, key=lambda c: c.brief_top1 or 0.0)
            best, epochs = winner.brief_top1 or 0.0, words.plural(self.asked.training.brief_epochs, "epoch")
            reason = f"the most accurate of {len(rows)} finalists on validation after {epochs}, and fast enough"
            reasons = {
                c.name: f"{100 * (best - (c.brief_top1 or 0.0)):.1f} points behind {winner.name} after {epochs}"
                for c in rows
            }
            reasons[winner.name] = f"most accurate on validation after {epochs}"
        everyone = tuple(replace(c, reason=reasons.get(c.name, c.reason)) for c in self.record.now.candidates)
        self.record.put(candidates=everyone, winner=Winner(name=winner.name, reason=reason))
        self.note(f"chosen: {winner.name}, {reason}")

    def train_winner(self) -> tuple[nn.Module, Preprocessing]:
        """The full training; a run that was interrupted goes on at its last state."""
        place = self.folder / "train"
        if self.record.now.history and place.is_dir():
            done = load_checkpoint(place)
            return done.net.eval(), done.preprocessing
        spec = next(spec for spec, _ in self.pool if spec.name == self.record.now.winner.name)
        with self.clocked("train_s"):
            run = train(
                spec,
                self.splits,
                epochs=self.asked.training.checked_epochs(self.asked.recipe_for(self.splits)),
                image_size=spec.input.size,  # what was timed is what is trained
                output=place,
                max_seconds=None if self.asked.training.max_minutes is None else 60 * self.asked.training.max_minutes,
                resume=self.asked.resume,
                overwrite=True,
                progress=self.tell,
                **self.training,
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
        return run.net, run.preprocessing

    def ship(self, net: nn.Module, preprocessing: Preprocessing) -> Artifact:
        """Export, compare with the trained network on the whole test set, and measure what is shipped."""
        with self.clocked("export_s"):
            held, bad = readable(self.splits.test, preprocessing)
            for problem in bad:
                self.note(f"left out of the test set: {problem}")
            ev = evaluate(net, held, preprocessing, device=self.asked.conditions.device)
            self.record.put(
                winner=replace(self.record.now.winner, test_top1=ev.top1),
                evaluation=evaluation_record(ev),
                wrong=mistakes(ev, held, self.splits.test),
                left_out=tuple(bad),
            )
            self.note(f"test: {ev.top1:.2%} of {ev.n:,} images right ({ev.top1_low:.2%} to {ev.top1_high:.2%})")
            card = {
                "data": self.record.now.data.path or "",
                "recipe": str(self.record.now.recipe.get("name", "")),
                "accuracy": f"{ev.top1:.2%} top-1 on {ev.n:,} test images",
            }
            place = self.folder / "artifact"
            artifact, found, checked = ship_fastest(
                net,
                place,
                self.splits,
                held,
                preprocessing,
                self.asked.conditions,
                self.asked.shipping,
                card=card,
                say=self.note,
            )
            measured = shipped_speed(artifact, self.asked.conditions)
        keeps = measured.images_per_s >= self.min_throughput
        self.note(
            f"artefact: {found.winner}, {found.gain:.2f} times as fast as the float network in its usual settings"
        )
        self.note(
            f"artefact: agrees with the trained network on {checked.top1_agreement:.2%} of {checked.n:,} test images"
        )
        self.note(
            f"artefact: {measured.images_per_s:,.0f} images/s, {'keeps' if keeps else 'does not keep'} the "
            f"{self.min_throughput:,.0f} asked for"
        )
        self.record.put(
            verification=from_json(Verification, checked.to_dict(), "verification"),
            artifact=Shipped(
                path=artifact.folder.name,
                format=artifact.format,
                precision=artifact.precision,
                opset=artifact.manifest.get("opset"),
                bytes=sum(f.stat().st_size for f in artifact.folder.iterdir() if f.is_file()),
                measurement=Timed.of(measured),
                runtime=artifact.manifest["runtime"],
                search=from_json(Search, found.to_dict(), "search"),
                int8=None
                if artifact.manifest.get("int8") is None
                else from_json(Int8, artifact.manifest["int8"], "int8"),
                keeps_constraint=keeps,
            ),
        )
        return artifact


def _written(cond: Conditions) -> WrittenConditions:
    """Conditions as a record holds them."""
    return from_json(WrittenConditions, cond.to_dict(), "conditions")
