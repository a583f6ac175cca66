"""The last step of ``fit``: the trained network is judged on the test set, exported, checked and timed once more."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from convscale import words
from convscale._version import __version__
from convscale.artifact.artifact import Artifact, load_artifact
from convscale.artifact.facts import write_promise
from convscale.artifact.promise import Promise
from convscale.choice.basis import Basis
from convscale.choice.facts import SizedSpec
from convscale.choice.rows import set_in_another
from convscale.choice.speeds import Say, predicted
from convscale.conditions import Conditions
from convscale.errors import UserError
from convscale.images.preprocess import Preprocessing
from convscale.images.splits import DataSplits, Split
from convscale.learn.doubtful import doubtful_labels, sample_probabilities
from convscale.learn.evaluate import Evaluation, evaluate
from convscale.learn.loader import readable
from convscale.machine import BUSY, busy_now
from convscale.networks.resolve import Named
from convscale.pipeline.record import RunRecord, evaluation_record, mistakes
from convscale.pipeline.request import FitRequest
from convscale.pipeline.ship import Elsewhere, ship_elsewhere, ship_fastest, shipped_speed
from convscale.ship.confirm import promise_of
from convscale.ship.forms import Fastest
from convscale.ship.tune import state_speed
from convscale.ship.verify import Verification
from convscale.show.fit_parts import Candidate, Doubtful, Int8, Predicted, Search, Shipped, Timed
from convscale.show.fit_parts import Verification as WrittenVerification
from convscale.show.json_values import from_json
from convscale.show.predictions import FILE as PREDICTIONS
from convscale.show.predictions import predictions_of
from convscale.speed.timing import Measurement
from convscale.stats import chance_above
from convscale.words import odds

SECOND_LOOK_S = 4.0
"""A shipped network that came out too slow is timed again for this long: the machine may have been busy."""

_BY_ROWS = "networks that were measured on the device"
_HALF = ("fp16", "amp")
"""What a file computes in where autocast was predicted: ONNX Runtime has none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """A network with what it needs to be shipped."""

    net: nn.Module
    """In eval mode."""
    preprocessing: Preprocessing
    """How images become its inputs."""
    thresholds: tuple[float, ...] | None = None
    """For several labels per image."""
    temperatures: tuple[float, ...] | None = None
    """For several labels per image."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Finish:
    """Ships a trained network, and writes down how it went."""

    asked: FitRequest
    record: RunRecord
    splits: DataSplits
    folder: Path
    basis: Basis
    min_throughput: float
    """Images/s to keep."""
    say: Say
    network: Named | None = None
    """What was chosen, by which its speed in another precision is predicted."""

    def ship(self, trained: Trained) -> Artifact:
        """Judge on the test set, which is read here alone; export and check; time what is shipped, or say what was
        predicted for it.
        """
        with self.record.clocked("export_s"):
            held, ev = self._judge(trained)
            card = {
                "data": self.record.now.data.path or "",
                "recipe": str(self.record.now.recipe.get("name", "")),
                "accuracy": _accuracy(ev),
                **_origin(self.record.now.chosen, own=self.asked.start.file is not None),
            }
            if self.basis.predicted:
                return self._for_elsewhere(trained, held, card)
            artifact, found, checked = ship_fastest(
                trained.net,
                self.folder / "artifact",
                self.splits,
                held,
                trained.preprocessing,
                self.basis,
                self.asked.shipping,
                card=card,
                thresholds=trained.thresholds,
                temperatures=trained.temperatures,
                say=self.say,
            )
            measured = self._time(artifact)
        self._tell(checked)
        self.say(f"artefact: {found.winner}, {found.gain:.2f} times as fast as the float network in its usual settings")
        self._keep(artifact, checked, measured, found)
        return artifact

    def _judge(self, trained: Trained) -> tuple[Split, Evaluation]:
        held, bad = readable(self.splits.test, trained.preprocessing, max_bad_rate=self.splits.max_bad_rate)
        for problem in bad:
            self.say(f"left out of the test set: {problem}")
        ev = evaluate(
            trained.net,
            held,
            trained.preprocessing,
            device=self.asked.training_device,
            train_labels=self.splits.train.labels,
        )
        several = self.splits.multilabel
        self.record.put(
            winner=replace(self.record.now.winner, test_top1=ev.mean_average_precision if several else ev.top1),
            evaluation=evaluation_record(ev),
            wrong=() if several else mistakes(ev, held, self.splits.test, trained.net, trained.preprocessing),
            left_out=tuple(bad),
            doubtful=self._doubtful(trained),
        )
        if not several:
            predictions_of(ev, held, self.splits.test).save(self.folder / PREDICTIONS)
        self.say(f"test: {ev.describe()}")
        return held, ev

    def _doubtful(self, trained: Trained) -> tuple[Doubtful, ...]:
        """Train images that are most likely mislabelled."""
        seen = sample_probabilities(
            trained.net, self.splits.train, trained.preprocessing, device=self.asked.training_device
        )
        found = doubtful_labels(seen.values, seen.labels, self.splits.classes, seen.names)
        if found:
            self.say(f"{words.plural(len(found), 'train image')} may be mislabelled; first: {found[0].describe()}")
        return tuple(
            Doubtful(
                name=one.name,
                given=one.given,
                suggested=one.suggested,
                confidence=one.confidence,
                suggested_confidence=one.suggested_confidence,
            )
            for one in found
        )

    def _time(self, artifact: Artifact) -> Measurement:
        """What is shipped, timed; again, and longer, where it came out too slow, with a note where others keep this
        machine busy then.
        """
        measured = shipped_speed(artifact, self.basis.conditions)
        if measured.images_per_s >= self.min_throughput:
            return measured
        loaded = busy_now()
        again = shipped_speed(artifact, self.basis.conditions, SECOND_LOOK_S)
        first = f"timed twice: {measured.images_per_s:,.0f} images/s at first, too slow for what was asked"
        return replace(again, notes=(*again.notes, first, *([loaded] if loaded else [])))

    def _for_elsewhere(self, trained: Trained, held: Split, card: dict[str, str]) -> Artifact:
        """An ONNX file for a device that is not here, with the speed that it is to have there."""
        made = ship_elsewhere(
            trained.net,
            self.folder / "artifact",
            self.splits,
            held,
            trained.preprocessing,
            self.basis,
            self.asked.shipping,
            card=card,
            thresholds=trained.thresholds,
            temperatures=trained.temperatures,
        )
        artifact, promise, instead = made.artifact, self._promise(made), None
        if made.precision != self.basis.conditions.precision and self.network is not None and promise is not None:
            instead, promise = self._in_another(made.precision, self.network, promise)
            self._say_instead(made, promise)
        elif promise is not None:
            self._say_unsure(promise)
        if promise is not None:
            write_promise(artifact.folder, promise)
            artifact = load_artifact(artifact.folder)
            self.say(f"artefact: {promise}")
        self._tell(made.checked)
        self._keep(artifact, made.checked, None, None, instead)
        return artifact

    def _in_another(self, precision: str, network: Named, before: Promise) -> tuple[Predicted, Promise]:
        """What is predicted of the network in another precision than it was chosen in, and a promise of that."""
        size, c = before.image_size, replace(self.basis.conditions, precision=precision)
        assert isinstance(size, int), "candidates are square"
        told, rows = predicted(SizedSpec(network, size), replace(self.basis, conditions=c)), self.asked.rows
        if rows is not None:
            told = set_in_another(told, rows, self.basis)
        promise = replace(promise_of(told, before.min_throughput, _BY_ROWS if rows else ""), versions=before.versions)
        part = Predicted(
            images_per_s=told.images_per_s,
            low=told.low,
            high=told.high,
            bound_by=told.bound_by or None,
            doubts=told.doubts,
            precision=c.precision,
        )
        return part, promise

    def _say_instead(self, made: Elsewhere, promise: Promise) -> None:
        """That what was asked for is not what ships, and whether that keeps the speed."""
        eight = f"8 bits do not pass their gate ({made.why_float})" if made.why_float else ""
        for why, what in ((eight, "float"), (made.why_single, "float32")):
            if why:
                note = f"{why}: what is shipped and promised is in {what}"
                self.record.add_note(note)
                self.say(note)
        wanted, speed, sure = promise.min_throughput, promise.images_per_s, promise.confidence
        if wanted is None or sure is None or sure >= self.asked.constraint.confidence:
            return
        gap = f"{1 - speed / wanted:.0%} below" if speed < wanted else f"no more than {odds(sure)} likely to keep"
        why = "half precision does not ship" if made.why_single else "8 bits do not pass their gate"
        missed = f"{why}, and float{'32' if made.why_single else ''} is predicted at {speed:,.0f} images/s, {gap}"
        self.record.put(missed=f"{missed} the {wanted:,.0f} asked for")

    def _say_unsure(self, promise: Promise) -> None:
        """Where nothing keeps what was asked for surely enough, how likely that is of what ships: until now it was said
        of the likeliest.
        """
        wanted, sure, asked = promise.min_throughput, promise.confidence, self.asked.constraint.confidence
        if self.record.now.missed and wanted and sure is not None and promise.images_per_s >= wanted and sure < asked:
            self.record.put(
                missed=f"what is shipped is no more than {odds(sure)} likely to keep the {wanted:,.0f} images/s asked "
                f"for, and {odds(asked)} are wanted"
            )

    def _promise(self, made: Elsewhere) -> Promise | None:
        """What was predicted for the winner, or measured there before it was trained."""
        row, c = self.record.now.chosen, self.basis.conditions
        if row is None or row.image_size is None:
            return None
        told, rests, measured = row.predicted, "" if self.asked.rows is None else _BY_ROWS, False
        if told is not None and told.images_per_s is not None:
            middle, low, high = told.images_per_s, told.low or told.images_per_s, told.high or told.images_per_s
            doubts = (*told.doubts, *_of_8_bits(made.artifact), *_of_another(made, c))
        elif row.measurement is not None and row.measurement.speed is not None:
            middle, doubts = row.measurement.speed, (*_of_8_bits(made.artifact), *_of_another(made, c))
            rests, measured = "a measurement on the device, untrained", True
            low, high = row.measurement.quartiles or (middle, middle)
        else:
            return None
        asked, sure = self.min_throughput or None, None
        if asked and not measured and low < middle < high:
            sure = chance_above(asked, middle, low, high)
        return Promise(
            device=c.device,
            runtime=c.runtime,
            precision=c.precision,
            layout=c.layout,
            batch_size=c.batch_size,
            image_size=row.image_size,
            threads=c.threads,
            images_per_s=middle,
            low=min(low, middle),
            high=max(high, middle),
            min_throughput=asked,
            confidence=sure,
            doubts=doubts,
            calibration=rests,
            versions={"convscale": __version__},
            measured=measured,
        )

    def _tell(self, checked: Verification) -> None:
        self.say(
            f"artefact: agrees with the trained network on {checked.top1_agreement:.2%} of {checked.n:,} test images"
        )

    def _keep(
        self,
        artifact: Artifact,
        checked: Verification,
        measured: Measurement | None,
        found: Fastest | None,
        instead: Predicted | None = None,
    ) -> None:
        """Write down what was shipped, and whether it keeps what was asked.

        Args:
            instead: the speed predicted for it, where it ships in another precision than it was chosen in.
        """
        missed = self.record.now.missed
        keeps = None if missed is None else False
        if measured is not None:
            keeps = measured.images_per_s >= self.min_throughput
            missed = None if keeps else self._shortfall(measured)
            try:
                state_speed(artifact, measured)
            except UserError as error:  # the artefact is there, and so is what it took; a line of its card is not all
                self.say(f"note: its card keeps the speed found before: {error}")
            self.say(
                f"artefact: {measured.images_per_s:,.0f} images/s, {'keeps' if keeps else 'does not keep'} the "
                f"{self.min_throughput:,.0f} asked for"
            )
        eight, for_card = artifact.manifest.get("int8"), artifact.manifest.computes == "fp16"
        self.record.put(
            missed=missed,
            verification=from_json(WrittenVerification, checked.to_dict(), "verification"),
            artifact=Shipped(
                path=artifact.folder.name,
                format=artifact.format,
                precision=artifact.precision if for_card else artifact.computed_in(artifact.runtime),
                opset=artifact.manifest.get("opset"),
                bytes=sum(f.stat().st_size for f in artifact.folder.iterdir() if f.is_file()),
                measurement=None if measured is None else Timed.of(measured),
                runtime=artifact.manifest.get("runtime") or {},
                search=None if found is None else from_json(Search, found.to_dict(), "search"),
                int8=None if eight is None else from_json(Int8, eight, "int8"),
                keeps_constraint=keeps,
                predicted=instead,
            ),
        )

    def _shortfall(self, measured: Measurement) -> str:
        speed, loaded = measured.images_per_s, [note for note in measured.notes if note.startswith(BUSY)]
        return (
            f"what is shipped runs at {speed:,.0f} images/s, {1 - speed / self.min_throughput:.0%} below the "
            f"{self.min_throughput:,.0f} asked for{''.join(f'; {note}' for note in loaded)}"
        )


def _origin(chosen: Candidate | None, *, own: bool = False) -> dict[str, str]:
    """For the model card: what the training started from, and what is known of those who may use that."""
    if chosen is None or chosen.weights is None:
        return {} if chosen is None else {"starting weights": "none, trained from scratch"}
    if own or not chosen.licence:  # a file of the user's own, whose name may be that of released weights
        return {"starting weights": Path(chosen.weights).name}
    extra = "none beside ImageNet-1k" if chosen.extra_data == "" else chosen.extra_data
    return {
        "starting weights": chosen.name,
        "licence of the starting weights": chosen.licence,
        **({} if extra is None else {"extra data": extra}),
    }


def _of_8_bits(artifact: Artifact) -> tuple[str, ...]:
    """Doubts about a prediction that takes every layer to be in 8 bits, and about a gate that was held elsewhere."""
    about = artifact.manifest.get("int8") or {}
    if not (steps := about.get("steps")) or not (kept := steps[-1]["float_layers"]):
        return artifact.gate_elsewhere
    return (f"{len(kept)} of {about['layers']} layers stay in float, for the accuracy", *artifact.gate_elsewhere)


def _of_another(made: Elsewhere, promised: Conditions) -> tuple[str, ...]:
    """A doubt about a promise in another precision than the file computes in."""
    computes = made.artifact.manifest.computes
    if made.artifact.precision == "int8" or computes == promised.precision or (computes, promised.precision) == _HALF:
        return ()
    return (f"it is of {promised.runtime} in {promised.precision}; the file that ships computes in {computes}",)


def _accuracy(ev: Evaluation) -> str:
    """For the model card."""
    if ev.mean_average_precision == ev.mean_average_precision:
        return f"{ev.mean_average_precision:.2%} mean average precision on {ev.n:,} test images"
    return f"{ev.top1:.2%} top-1 on {ev.n:,} test images"
