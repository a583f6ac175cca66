"""``fit.json`` as it grows, and what a run writes down of its data and of what its network gets wrong."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from torch import nn

from convscale.conditions import Conditions
from convscale.errors import UserError
from convscale.images.digest import data_digest, is_digest_of
from convscale.images.preprocess import Preprocessing
from convscale.images.splits import ArraySplit, DataSplits, Split
from convscale.learn.evaluate import Evaluation, Wrong
from convscale.maps.draw import overlaid
from convscale.maps.explain import explain
from convscale.show.fit_parts import Candidate, Data, Mistake
from convscale.show.fit_parts import Evaluation as EvaluationRecord
from convscale.show.fit_record import FILE, FitRecord, read_fit
from convscale.show.json_values import from_json
from convscale.show.stated import Conditions as WrittenConditions

SHOWN_MISTAKES = 24
"""Wrong examples that the report shows as pictures."""
COVERED, COVERED_GRID = 8, 7
"""Of a network without exact maps: wrong examples whose places are covered one by one, and places along one side. All
in all as many passes as an evaluation of four hundred images.
"""


class RunRecord:
    """``fit.json`` as it grows: written after every step, so that a resumed run goes on where the last one stopped."""

    def __init__(
        self, folder: Path, request: dict[str, object], *, resume: bool, older: dict[str, object] | None = None
    ) -> None:
        """
        Args:
            folder: the run's.
            request: what is asked for, as plain values.
            resume: go on where an equal request stopped.
            older: the same request as an earlier version wrote it; None: that knew no such request.

        Raises:
            UserError: the folder was made by another request.
        """
        self.folder = folder
        digest = digest_of(request)
        self.now = FitRecord(request=request, request_digest=digest)
        if resume and (folder / FILE).is_file():
            old = read_fit(folder)
            if old.request_digest not in (digest, digest_of(older)):
                raise UserError(
                    f"{folder} was made by another request ({old.command or 'unknown'}); repeat it, or use --overwrite"
                )
            self.now = old

    def check_data(self, splits: DataSplits) -> None:
        """
        Raises:
            UserError: the run was begun on other images or labels, of which now some would be tested that were trained
                on.
        """
        told = self.now.data.digest
        if told is not None and not is_digest_of(told, (splits.train, splits.validation, splits.test)):
            raise UserError(
                f"{self.folder} was begun on other data: images or labels have come, gone or changed; a resumed run "
                "keeps its data: give it as it was, or begin another run"
            )

    def put(self, **values: object) -> None:
        """Set parts of the record, and save it."""
        self.now = replace(self.now, **values)  # pyright: ignore[reportArgumentType]
        self.now.save(self.folder)

    def put_row(self, row: Candidate) -> None:
        """Set one candidate by its name and size, and save."""
        rest = self.now.candidates
        known = any(is_same(c, row) for c in rest)
        rows = [row if is_same(c, row) else c for c in rest]
        self.put(candidates=tuple(rows if known else [*rows, row]))

    def row(self, name: str, image_size: int) -> Candidate | None:
        """The candidate of that name and size."""
        return next((c for c in self.now.candidates if (c.name, c.image_size) == (name, image_size)), None)

    def add_note(self, text: str) -> None:
        """Write down how candidates were found, each line once."""
        if text not in self.now.choice_notes:
            self.put(choice_notes=(*self.now.choice_notes, text))

    @contextmanager
    def clocked(self, key: str) -> Iterator[None]:
        """Add the time of a step to the record."""
        start = time.monotonic()
        yield
        spent = self.now.timings
        self.put(timings={**spent, key: spent.get(key, 0.0) + time.monotonic() - start})


def digest_of(request: dict[str, object] | None) -> str:
    """Of a request; None has one that no request has."""
    return (
        "" if request is None else hashlib.sha256(json.dumps(request, sort_keys=True, default=str).encode()).hexdigest()
    )


def is_same(a: Candidate, b: Candidate) -> bool:
    """Whether two rows are of one network at one size."""
    return (a.name, a.image_size) == (b.name, b.image_size)


def written(cond: Conditions) -> WrittenConditions:
    """Conditions as a record holds them."""
    return from_json(WrittenConditions, cond.to_dict(), "conditions")


def describe(splits: DataSplits, path: str, size: int) -> Data:
    """A data set as a run writes it down, and the side in pixels that candidates are built for."""
    return Data(
        name=Path(path).name,
        path=path,
        classes=tuple(splits.classes),
        channels=splits.channels,
        image_size=size,
        train=len(splits.train),
        validation=len(splits.validation),
        test=len(splits.test),
        digest=data_digest((splits.train, splits.validation, splits.test)),
        test_digest=data_digest((splits.test,)),
        notes=tuple(splits.notes),
    )


def evaluation_record(ev: Evaluation) -> EvaluationRecord:
    """An evaluation as a run writes it down."""
    return EvaluationRecord(
        n=ev.n,
        top1=ev.top1,
        top1_interval=(ev.top1_low, ev.top1_high),
        top5=ev.top5,
        confusion=tuple(tuple(row) for row in ev.confusion.tolist()),
        per_class=tuple(None if math.isnan(share) else share for share in ev.per_class),  # no test image of the class
        calibration_error=None if math.isnan(ev.calibration_error) else ev.calibration_error,
        baseline=ev.baseline,
        mean_average_precision=None if math.isnan(ev.mean_average_precision) else ev.mean_average_precision,
    )


def mistakes(
    ev: Evaluation, read: Split, test: Split, net: nn.Module | None = None, how: Preprocessing | None = None
) -> tuple[Mistake, ...]:
    """The most confident mistakes, with their pictures as PNG data: as in the test set, of which ``read`` is what could
    be decoded; of ``net``, which takes images by ``how``, with the maps of what it said: all where they are exact, else
    the first few by occlusion.
    """
    worst = sorted(ev.wrong, key=lambda wrong: -wrong.confidence)[:SHOWN_MISTAKES]
    maps, method = ([], None) if net is None or how is None else _maps(worst, read, net, how)
    shown = []
    for wrong, drawn in zip_longest(worst, maps):
        name, pixels = _original(read, test, wrong.index)
        shown.append(
            Mistake(
                name=name,
                true=read.classes[wrong.true],
                predicted=read.classes[wrong.predicted],
                confidence=wrong.confidence,
                image=_picture(pixels),
                map=drawn,
                map_method=None if drawn is None else method,
            )
        )
    return tuple(shown)


def _maps(
    worst: Sequence[Wrong], read: Split, net: nn.Module, how: Preprocessing
) -> tuple[list[str | None], str | None]:
    """Mistakes under the maps of what was said, as data URIs, and the method: exact where the network has such maps,
    else, of the first ``COVERED``, by covering places, which asks a network for nothing but its outputs.
    """
    for method, count in (("cam", len(worst)), ("occlusion", COVERED)):
        some = worst[:count]
        if not some:
            break
        pixels = [read.read(wrong.index).numpy() for wrong in some]
        seen = np.stack([each if each.shape[:2] == (how.height, how.width) else how.resize(each) for each in pixels])
        said, inputs = [wrong.predicted for wrong in some], how.normalize(torch.from_numpy(seen))
        with suppress(UserError):  # layers stand between the pool and the classifier
            maps = explain(net, inputs, method, said, grid=COVERED_GRID)
            drawn = zip(seen, maps.values, strict=True)
            return [_picture(torch.from_numpy(overlaid(one, values))) for one, values in drawn], method
    return [], None


def _original(held: Split, test: Split, index: int) -> tuple[str, torch.Tensor]:
    """Name and pixels of an image of ``held`` as it stands in the test set that was read."""
    source, number = held, index
    if isinstance(held, ArraySplit) and not isinstance(test, ArraySplit) and held.numbers is not None:
        source, number = (
            test,
            int(held.numbers[index]),
        )  # held at the network's size, and without what could not be decoded
    return Path(source.name(number)).name, source.read(number)


def _picture(image: torch.Tensor, side: int = 160) -> str:
    """A uint8 (H, W, C) image as a data URI, at most ``side`` px: small ones as PNG, whose pixels are shown one by one,
    photographs as JPEG, a tenth as large.
    """
    from PIL import Image

    pixels = image.numpy()
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    picture.thumbnail((side, side))
    file, small = io.BytesIO(), max(picture.size) <= 64
    picture.save(file, **({"format": "PNG"} if small else {"format": "JPEG", "quality": 82}))
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"
