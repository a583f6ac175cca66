"""The last step of ``fit``: the trained network becomes the fastest artefact that passed its gate, and its speed is
checked again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from convscale.artifact.artifact import Artifact, load_artifact
from convscale.choice.basis import Basis
from convscale.conditions import Conditions
from convscale.errors import UserError, check_flag, check_number
from convscale.images.preprocess import Preprocessing
from convscale.images.splits import DataSplits, Split
from convscale.learn.loader import EvalImages, readable
from convscale.predictor.devices import is_processor
from convscale.runtimes.base import file_runtimes, need_bf16, runtime_of
from convscale.ship.export import export_as
from convscale.ship.forms import Fastest, Search, export_winner, form_names, forms_in
from convscale.ship.kit import HALF, RUNTIMES
from convscale.ship.qat import MOST_IMAGES, check_tunable
from convscale.ship.quantize import CALIBRATION, check_calibration, routes_for, spread
from convscale.ship.request import ExportRequest
from convscale.ship.tune import Tuning
from convscale.ship.verify import Verification, Withheld, verify
from convscale.speed.measuring import measure, whole_batch
from convscale.speed.timing import Measurement
from convscale.words import listed


@dataclass(frozen=True, kw_only=True)
class Shipping:
    """How the trained network is to be shipped."""

    runtime: str | None
    """Run it in this one; None: in the fastest."""
    int8: bool
    """INT8 may win too."""
    max_drop: float
    """Accuracy points INT8 may lose on validation."""
    qat: bool = False
    """Where it loses more, weights learn to be rounded first."""
    bf16: bool = False
    """Forms that compute in bfloat16 may win too."""

    def __post_init__(self) -> None:
        known = dict.fromkeys((*file_runtimes("cpu"), *file_runtimes("cuda")))
        if self.runtime is not None and self.runtime not in known:
            raise UserError(f"fit ships for runtime {listed(known, 'or')}, got {self.runtime!r}")
        check_flag("int8", self.int8)
        if check_flag("bf16", self.bf16):
            self._check_bf16()
        check_number("max_drop", self.max_drop, "a number of accuracy points from 0 to 100", 0, 100)
        if self.int8:
            check_calibration(np.zeros(CALIBRATION))  # nncf is there: an hour of training comes first

    def _check_bf16(self) -> None:
        """
        Raises:
            UserError: it can not be computed here, or not in the runtime asked for.
        """
        if self.runtime is not None and "bf16" not in runtime_of(self.runtime).precisions:
            able = " or ".join(name for name in file_runtimes() if "bf16" in runtime_of(name).precisions)
            raise UserError(f"bf16 is computed in runtime {able}, not in {self.runtime}; leave one of them out")
        need_bf16()

    def check_images(self, training: int) -> None:
        """
        Raises:
            UserError: so few training images are too few to quantise by.
        """
        if self.int8:
            check_calibration(np.zeros(training))
        if self.int8 and self.qat:
            check_tunable(np.zeros(training))

    def to_json(self) -> dict[str, object]:
        """What a run is known by: what came later stands there where it was asked for, so that older runs are known."""
        return {key: value for key, value in asdict(self).items() if key not in ("qat", "bf16") or value}


def ship_fastest(
    net: nn.Module,
    place: Path,
    splits: DataSplits,
    test: Split,
    preprocessing: Preprocessing,
    basis: Basis,
    how: Shipping,
    *,
    card: Mapping[str, str],
    thresholds: Sequence[float] | None = None,
    temperatures: Sequence[float] | None = None,
    say: Callable[[str], object],
) -> tuple[Artifact, Fastest, Verification]:
    """Export in every form worth trying, tune each at the batch and threads of ``cond``, keep the fastest that passed.

    Float forms are compared with the network on the test set. INT8's layers are chosen, and its gate is held, on
    validation, so that the test set
    is read once: for the form that is shipped.

    Args:
        test: the test set, whose images can all be decoded (``learn.loader.readable``).
        card: facts for the model card.
        thresholds: for several labels per image: above which probability each counts.
        temperatures: for several labels per image: what their logits are divided by.
    """
    cond = basis.conditions
    images, labels = EvalImages(test, preprocessing), test.labels.numpy()
    keywords: dict[str, Any] = {"verify_images": images, "verify_labels": labels}
    if how.int8:
        keywords = _for_int8(splits, preprocessing, how)
    size, device = preprocessing.image_size, cond.device
    names = forms_in(how.runtime, form_names(net, int8=how.int8, bf16=how.bf16, image_size=size, device=device))

    def tell(name: str, result: Tuning | UserError) -> None:
        say(
            f"{name}: {result.best.images_per_s:,.0f} images/s"
            if isinstance(result, Tuning)
            else f"{name}: {_why(result)}"
        )

    search = Search(
        batch_sizes=(cond.batch_size,),
        threads=cond.threads,
        device=cond.device,
        runtimes=None if how.runtime is None else (how.runtime,),
    )
    keywords |= {"classes": splits.classes, "preprocessing": preprocessing, "card": card, "thresholds": thresholds}
    keywords |= {"temperatures": temperatures}
    found = export_winner(net, place, names, search, overwrite=True, on_form=tell, **keywords)
    artifact = load_artifact(place, device=cond.device)
    if how.int8:
        checked = on_test(net, artifact, images, labels, how.max_drop)
    else:
        checked = Verification.from_dict(artifact.verification or {})
    return artifact, found, checked


def on_test(
    net: nn.Module, artifact: Artifact, images: EvalImages, labels: np.ndarray | None, max_drop: float
) -> Verification:
    """How what is shipped compares with the network on the test set. Its gate was held on validation, and that verdict
    stands: the test set decides nothing, and what it shows is said in the reason.

    Args:
        max_drop: accuracy points that INT8 was allowed to lose on validation.
    """
    found = verify(net, artifact, images, labels, max_drop=max_drop, find_drift=False)
    if not (artifact.verification or {}).get("passed"):
        return found
    return replace(found, passed=True, reason=f"the gate was passed on validation; on the test set: {found.reason}")


def _for_int8(splits: DataSplits, preprocessing: Preprocessing, how: Shipping) -> dict[str, Any]:
    """What an export in 8 bits is made and judged by: train images calibrate, validation decides."""
    held, _ = readable(splits.validation, preprocessing, max_bad_rate=splits.max_bad_rate)
    most = MOST_IMAGES if how.qat else CALIBRATION
    chosen = splits.train.subset(spread(len(splits.train), most).tolist())
    some, _ = readable(chosen, preprocessing, max_bad_rate=splits.max_bad_rate)
    return {
        "verify_images": EvalImages(held, preprocessing),
        "verify_labels": held.labels.numpy(),
        "calibration_images": np.concatenate(list(EvalImages(some, preprocessing))),
        "max_drop": how.max_drop,
        "qat": how.qat,
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class Elsewhere:
    """What ships for a device that is not here."""

    artifact: Artifact
    """An ONNX file."""
    checked: Verification
    """How it compares with the network on the test set."""
    precision: str
    """What it computes in there, as a prediction calls it."""
    why_float: str = ""
    """Why it is in float where 8 bits were asked for; else empty."""
    why_single: str = ""
    """Why it is in float32 where less was asked for; else empty."""


def ship_elsewhere(
    net: nn.Module,
    place: Path,
    splits: DataSplits,
    test: Split,
    preprocessing: Preprocessing,
    basis: Basis,
    how: Shipping,
    *,
    card: Mapping[str, str],
    thresholds: Sequence[float] | None = None,
    temperatures: Sequence[float] | None = None,
) -> Elsewhere:
    """An ONNX file for a device that is not here: in 8 bits where they are asked for and pass their gate on validation;
    in half precision where speeds are of that, for a GPU, and it passes its gate on the test set, as a kit's files are;
    else in float32. Which is faster is not asked: it would be told of this machine.

    Args:
        test: as for :func:`ship_fastest`.
        card: facts for the model card.
        thresholds: as for :func:`ship_fastest`.
        temperatures: as for :func:`ship_fastest`.
    """
    asked = basis.conditions
    common: dict[str, Any] = {"classes": splits.classes, "preprocessing": preprocessing, "card": card}
    common |= {"thresholds": thresholds, "temperatures": temperatures}
    images, labels = EvalImages(test, preprocessing), test.labels.numpy()
    reasons: list[str] = []
    if how.int8:
        shown = _for_int8(splits, preprocessing, how)
        for route in routes_for(asked.runtime):
            request = ExportRequest(format="onnx", int8=True, int8_route=route, **common, **shown)
            try:
                artifact = export_as(net, place, request, overwrite=True)
            except UserError as reason:
                reasons.append(_reason(reason))
                continue
            checked = on_test(net, artifact, images, labels, how.max_drop)
            return Elsewhere(artifact=artifact, checked=checked, precision="int8")
    common |= {"verify_images": images, "verify_labels": labels}
    return _float_elsewhere(net, place, asked, "; ".join(reasons), common)


def _float_elsewhere(
    net: nn.Module, place: Path, asked: Conditions, why_float: str, common: Mapping[str, Any]
) -> Elsewhere:
    """The file where 8 bits were not asked for, or are withheld."""
    precision, why, opens = asked.precision, "", asked.runtime in RUNTIMES  # PyTorch, if promised, opens no file
    if precision in HALF and is_processor(asked.device):
        precision, why = "fp32", "a processor computes half precision in float32"
    elif precision == "fp16" or (opens and precision in (*HALF, "int8")):
        request = ExportRequest(format="onnx", computes_half=opens, half=not opens, **common)
        try:
            artifact = export_as(net, place, request, overwrite=True)
            precision = "amp" if precision == "int8" else precision
            checked = Verification.from_dict(artifact.verification or {})
            return Elsewhere(artifact=artifact, checked=checked, precision=precision, why_float=why_float)
        except UserError as reason:
            precision, why = "fp32", f"half precision does not pass its gate ({_reason(reason)})"
    elif opens and precision != "fp32":
        precision, why = "fp32", f"no file computes in {precision} there"
    artifact = export_as(net, place, ExportRequest(format="onnx", **common), overwrite=True)
    checked = Verification.from_dict(artifact.verification or {})
    return Elsewhere(artifact=artifact, checked=checked, precision=precision, why_float=why_float, why_single=why)


def shipped_speed(artifact: Artifact, cond: Conditions, min_seconds: float = 2.0) -> Measurement:
    """What is shipped, timed once more as it will run: in its tuned runtime, threads and streams.

    Raises:
        DoesNotFit: memory does not hold it at the batch asked for.
    """
    made = measure(artifact, min_seconds=min_seconds, batch_size=cond.batch_size, device=cond.device)
    return whole_batch(made, cond.batch_size)


def _reason(error: UserError) -> str:
    """Why there is no such form, without the folder's name."""
    return error.verification.reason if isinstance(error, Withheld) else str(error)


def _why(error: UserError) -> str:
    """The same, with whether it was made."""
    return f"withheld: {_reason(error)}" if isinstance(error, Withheld) else str(error)
