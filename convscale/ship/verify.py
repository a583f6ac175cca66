"""Does the artefact say what the trained network says? Compared on images, judged by a gate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from convscale.artifact.artifact import Artifact
from convscale.errors import UserError
from convscale.nn.modes import forward_logits
from convscale.runtimes.base import installed_runtimes, runtimes_of
from convscale.stats import average_precisions, mean_of_known, wilson

MIN_AGREEMENT = {"fp32": 0.999, "fp16": 0.999, "bf16": 0.99}
"""Top-1 agreement that a float artefact must reach, by its precision: bfloat16 has 8 bits for a number, and what was
nearly a tie may end the other way."""
MAX_RELATIVE = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 3e-2}
"""Largest difference of logits over the largest logit, by the artefact's precision."""
MAX_BATCH_RELATIVE = 0.1
"""Largest difference of an INT8 artefact's logits between batch sizes over the largest logit: a rounded activation may
flip, no more."""
CHUNK = 32
"""Images that go through the reference network at once."""


class Withheld(UserError):
    """An artefact did not pass the gate and was not put under its final name."""

    def __init__(self, message: str, verification: Verification) -> None:
        super().__init__(message)
        self.verification = verification


@dataclass(frozen=True, kw_only=True)
class Verification:
    """How an artefact compares with the network it was made from."""

    n: int
    """Images compared."""
    images: str
    """What they were: ``given`` or ``noise``."""
    batch_sizes: tuple[int, ...]
    """Batch sizes the artefact was run at."""
    top1_agreement: float
    """Share of images whose largest logit is the same class's."""
    max_abs: float
    """Largest difference of a logit; of a float artefact at the extra batch sizes too."""
    max_rel: float
    """``max|a - b| / max|b|`` over all logits, b the trained network's."""
    mean_abs: float
    """Mean absolute difference of a logit."""
    batch_rel: float = 0.0
    """Largest difference of the artefact's own logits between the extra batch sizes and its usual one, over the largest
    logit."""
    accuracy_before: float | None = None
    """Top-1 accuracy of the trained network, for several labels its mean average precision, in [0, 1]; None without
    labels."""
    accuracy_before_interval: tuple[float, float] | None = None
    """Its 95 % Wilson interval; None for several labels."""
    accuracy_after: float | None = None
    """The same of the artefact."""
    accuracy_after_interval: tuple[float, float] | None = None
    """Its 95 % Wilson interval; None for several labels."""
    precision: str = "fp32"
    """The artefact's precision, which chooses the gate."""
    max_drop: float | None = None
    """Accuracy points an INT8 artefact may lose."""
    drift_layer: str | None = None
    """The layer where the difference starts; looked for only where the gate fails."""
    passed: bool = False
    """Whether the gate lets it through."""
    reason: str = ""
    """Why, in one line."""

    @property
    def drop_points(self) -> float | None:
        """Accuracy lost, in points."""
        if self.accuracy_before is None or self.accuracy_after is None:
            return None
        return 100 * (self.accuracy_before - self.accuracy_after)

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Verification:
        """From what :meth:`to_dict` gave."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
        return cls(**fields)


def verify(
    net: nn.Module,
    artifact: Artifact,
    images: np.ndarray | Iterable[np.ndarray],
    labels: Sequence[int] | np.ndarray | None = None,
    *,
    batch_sizes: Sequence[int] = (1, 2, 7),
    max_drop: float = 0.5,
    source: str = "given",
    reference: np.ndarray | None = None,
    find_drift: bool = True,
) -> Verification:
    """Run both on the same images and judge.

    The first images go through the artefact once at every size of ``batch_sizes``, all images at its usual batch.

    Args:
        net: the trained network.
        artifact: what was made from it.
        images: uint8 (N, H, W, C), or batches of that, resized by the artefact's ``preprocessing.resize``.
        labels: the true class of each image (N,), for accuracies; for several labels (N, classes) of zeros and ones.
        max_drop: accuracy points an INT8 artefact may lose; without labels, the points of disagreement allowed, which
            bound the loss.
        source: what the images are, for the record.
        reference: the network's logits of all images, where they are known already.
        find_drift: look for the layer where the difference starts, where the gate fails.

    Raises:
        UserError: no images, of a wrong shape, or another number of labels.
    """
    if getattr(net, "detector_spec", None) is not None:
        raise UserError("this is a detector; convscale.ship.detectors.verify_boxes compares boxes")
    reference, candidate, max_abs, batch_abs = _both(net, artifact, images, batch_sizes, reference)
    n = len(reference)
    if labels is not None and len(labels) != n:
        raise UserError(f"verify got {n} images and {len(labels)} labels; give one label per image")
    difference = np.abs(candidate - reference)
    max_abs = max(max_abs, float(difference.max()))
    largest = float(np.abs(reference).max())
    same = reference.argmax(1) == candidate.argmax(1)
    finite = bool(
        np.isfinite(reference).all()
        and np.isfinite(candidate).all()
        and math.isfinite(max_abs)
        and math.isfinite(batch_abs)
    )
    found: dict[str, Any] = {
        "n": n,
        "images": source,
        "batch_sizes": tuple(batch_sizes),
        "top1_agreement": float(same.mean()),
        "max_abs": max_abs if finite else math.inf,
        "max_rel": 0.0 if max_abs == 0 else max_abs / largest if finite and largest else math.inf,
        "mean_abs": float(difference.mean()) if finite else math.inf,
        "batch_rel": batch_abs / largest if finite and largest else 0.0,
        "precision": artifact.precision,
    }
    if labels is not None:
        truth = np.asarray(labels)
        if truth.ndim == 2 and truth.shape != reference.shape:
            raise UserError(f"labels of shape {truth.shape} do not go with logits of shape {reference.shape}")
        for name, logits in (("before", reference), ("after", candidate)):
            if truth.ndim == 2:
                found[f"accuracy_{name}"] = _mean_average_precision(logits, truth)
                continue
            right = int((logits.argmax(1) == truth).sum())
            found |= {f"accuracy_{name}": right / n, f"accuracy_{name}_interval": wilson(right, n)}
    if artifact.precision == "int8":
        found["max_drop"] = max_drop
    passed, reason = _judge(Verification(**found))
    if not passed and finite and find_drift:
        from convscale.ship.drift import first_drift

        found["drift_layer"] = first_drift(net, artifact, _first(images))
    return Verification(**found, passed=passed, reason=reason)


def passed_in(artifact: Artifact, passes: Callable[[Artifact], bool]) -> list[str]:
    """The runtimes here in which an INT8 artefact passes its gate, its own, in which it did, first. Each has 8-bit
    kernels of its own, so it may ship in these alone.

    Args:
        passes: whether it does, opened in another runtime.
    """
    found = [artifact.runtime]
    for name in runtimes_of(artifact.format):
        if name == artifact.runtime or name not in installed_runtimes():
            continue
        try:
            if passes(Artifact(artifact.folder, artifact.manifest, runtime=name)):
                found.append(name)
        except Exception:  # a runtime may refuse what a quantiser made, as it likes; then it does not ship in that one
            continue
    return found


def _mean_average_precision(logits: np.ndarray, truth: np.ndarray) -> float | None:
    """Over the classes that are present; None where none is."""
    mean = mean_of_known(average_precisions(logits, truth))
    return None if math.isnan(mean) else mean


def reference_logits(net: nn.Module, artifact: Artifact, images: np.ndarray) -> np.ndarray:
    """The network's own logits of uint8 images (N, H, W, C), preprocessed as the artefact says.

    Returns:
        float32 (N, classes).
    """
    pixels = torch.from_numpy(np.require(images, requirements=["C", "W"]))
    parts = [forward_logits(net, artifact.preprocessing.normalize(part)) for part in pixels.split(CHUNK)]
    return torch.cat(parts).numpy()


def _both(
    net: nn.Module,
    artifact: Artifact,
    images: np.ndarray | Iterable[np.ndarray],
    batch_sizes: Sequence[int],
    known: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Logits of the network and of the artefact, (N, classes) each; then the largest differences at the extra batch
    sizes, NaN where one is none: from the network's logits (0 for INT8, which differs by its nature), and from the
    artefact's own at its usual batch."""
    reference: list[np.ndarray] = []
    candidate: list[np.ndarray] = []
    worst = unsteady = 0.0
    done = 0
    for chunk in _chunks(images):
        expected = reference_logits(net, artifact, chunk) if known is None else known[done : done + len(chunk)]
        usual = artifact.logits(chunk)
        if not reference:
            for size in batch_sizes:
                # Twice the size and one more, so that a second full batch and a rest go through too.
                few = slice(0, min(len(chunk), 2 * size + 1))
                there = artifact.logits(chunk[few], batch_size=size)
                unsteady = float(np.maximum(unsteady, np.abs(there - usual[few]).max()))  # unlike max(), it keeps NaN
                if artifact.precision != "int8":
                    worst = float(np.maximum(worst, np.abs(there - expected[few]).max()))
        reference.append(expected)
        candidate.append(usual)
        done += len(chunk)
    if not reference:
        raise UserError("verify got no images; give at least one")
    return np.concatenate(reference), np.concatenate(candidate), worst, unsteady


def _judge(v: Verification) -> tuple[bool, str]:
    """The gate. Returns whether it passes, and why in one line."""
    if not math.isfinite(v.max_abs):
        return False, "the logits are not finite numbers"
    if v.precision == "int8":
        assert v.max_drop is not None, "an INT8 verification states its max_drop"
        if v.batch_rel > MAX_BATCH_RELATIVE:
            return (
                False,
                f"the logits differ by {v.batch_rel:.1e} relative between batch sizes, {MAX_BATCH_RELATIVE:g} is "
                "allowed",
            )
        if v.drop_points is not None:
            passed, what = (
                v.drop_points <= v.max_drop + 1e-9,
                "accuracy" if v.accuracy_before_interval else "mean average precision",
            )
            return (
                passed,
                f"INT8 loses {v.drop_points:.2f} points of {what} on {v.n} images, {v.max_drop:g} are allowed",
            )
        lost = 100 * (1 - v.top1_agreement)
        return (
            lost <= v.max_drop + 1e-9,
            f"INT8 disagrees on {lost:.2f} % of {v.n} images (no labels), {v.max_drop:g} are allowed",
        )
    limit = MAX_RELATIVE[v.precision]
    if v.max_rel > limit:
        return False, f"the logits differ by {v.max_rel:.1e} relative, {limit:g} is allowed"
    least = MIN_AGREEMENT[v.precision]
    if v.top1_agreement < least:
        return (
            False,
            f"top-1 agrees on {100 * v.top1_agreement:.2f} % of {v.n} images, {100 * least:g} % are needed",
        )
    return (
        True,
        f"top-1 agrees on {100 * v.top1_agreement:.2f} % of {v.n} images, the logits differ by at most {v.max_rel:.1e} "
        "relative",
    )


def _chunks(images: np.ndarray | Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for batch in [images] if isinstance(images, np.ndarray) else images:
        for start in range(0, len(batch), CHUNK):
            yield batch[start : start + CHUNK]


def _first(images: np.ndarray | Iterable[np.ndarray]) -> np.ndarray | None:
    """A few images to look for the drift with; None where they came from an iterator that is used up."""
    if isinstance(images, np.ndarray):
        return images[:4]
    if isinstance(images, Sequence) and len(images):
        return images[0][:4]
    return None
