"""A training recipe as a value: named, printed, saved as YAML, overridden by ``key=value``."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from convscale.conditions import Size, as_size
from convscale.errors import UserError, nearest
from convscale.files import write_text
from convscale.words import listed

_CHOICES = {
    "optimizer": ("sgd", "adamw", "rmsprop", "lamb", "muon", "schedule-free"),
    "schedule": ("onecycle", "cosine", "step", "multistep", "exponential", "constant", "wsd"),
    "loss": ("cross-entropy", "bce", "asymmetric", "focal", "two-way", "zlpr"),
    "partial": ("ignore", "negative"),
    "head": ("own", "gap", "ml_decoder"),
    "precision": ("auto", "amp", "fp32", "bf16", "fp16"),
    "layout": ("auto", "nchw", "nhwc"),
    "augment": ("none", "shift-crop", "resized-crop", "scale-jitter"),
    "policy": ("none", "randaugment", "autoaugment", "trivialaugment"),
}
MOST_PIXELS = 10_000
"""Of a side of the input."""
# what each number may be: (lowest, highest), both included
_RANGES: dict[str, tuple[float, float]] = {
    "epochs": (1, 100_000),
    "batch_size": (1, 1_000_000),
    "accumulate": (1, 10_000),
    "lr": (1e-9, 100.0),
    "momentum": (0, 0.9999),
    "beta2": (0, 0.99999),
    "epsilon": (0, 1),
    "weight_decay": (0, 10.0),
    "warmup_epochs": (0, 100_000),
    "start_factor": (0, 1),
    "final_factor": (0, 1),
    "decay_rate": (1e-6, 1),
    "decay_epochs": (1e-6, 100_000),
    "decay_share": (0, 1),
    "label_smoothing": (0, 0.99),
    "asymmetric_negative": (0, 20),
    "asymmetric_positive": (0, 20),
    "asymmetric_margin": (0, 0.9),
    "focal_gamma": (0, 20),
    "focal_alpha": (0, 1),
    "threshold_beta": (0.1, 10),
    "schedule_epochs": (0, 100_000),
    "ema_decay": (0, 0.999999),
    "ema_width": (0, 0.28),
    "ema_every": (1, 1_000),
    "clip_norm": (0, 1e6),
    "flip": (0, 1),
    "scaled_share": (0.125, 1),
    "shift": (0, 0.5),
    "cutout": (0, 1),
    "crop_scale": (0.001, 1),
    "scale_low": (0.05, 4),
    "scale_high": (0.05, 4),
    "shrink": (0, 16),
    "policy_magnitude": (0, 30),
    "policy_ops": (1, 10),
    "erase": (0, 1),
    "mixup": (0, 10),
    "cutmix": (0, 10),
    "drop_rate": (0, 0.99),
    "drop_path_rate": (0, 0.99),
    "others_lr": (1e-6, 1e3),
    "layer_decay": (0.01, 1),
    "freeze_epochs": (0, 100_000),
    "early_stop": (0, 100_000),
    "progressive": (0.1, 1),
    "distill_weight": (0, 1),
    "distill_temperature": (0.1, 100),
    "distill_kl": (0, 1_000),
    "distill_features": (0, 1_000_000),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides how a network is trained, data and architecture apart.

    Raises:
        UserError: a field has an impossible value; the message names the field, the value and what would be right.
    """

    name: str
    """What it is called."""
    source: str = ""
    """Where it comes from, with hardware, hours and result where these are known."""

    epochs: int = 10
    """Passes over the train set."""
    batch_size: int = 128
    """Images per optimiser step and process, accumulation apart."""
    accumulate: int = 1
    """Batches whose gradients are summed before a step."""
    image_size: Size | None = None
    """Of the training input in pixels: the side of a square, or (height, width), as text ``192x160``; None: the data's
    or the network's own."""
    progressive: float = 1.0
    """Share of the image size that the first epoch trains at, growing to 1 at three quarters of the run (progressive
    resizing)."""

    optimizer: str = "sgd"
    """``sgd`` (Nesterov momentum), ``adamw``, ``rmsprop`` (TensorFlow's form), ``lamb``, ``muon`` (for
    kernels of convolutions, with AdamW for the rest), or ``schedule-free`` (AdamW of the extra of that name; schedule
    constant, and no other average)."""
    lr: float = 0.1
    """Peak learning rate."""
    momentum: float = 0.9
    """Momentum of SGD, RMSProp and Muon, beta 1 of AdamW and LAMB; Muon's AdamW has 0.9."""
    beta2: float = 0.999
    """Decay of the mean square of AdamW (Muon's too), LAMB and RMSProp."""
    epsilon: float = 1e-8
    """Added to the root of AdamW and LAMB, below the root of RMSProp."""
    weight_decay: float = 5e-4
    """Decoupled: a step shrinks weights by lr x weight_decay; norms and biases are left out."""
    others_lr: float = 0.2
    """Learning rate of what Muon leaves to AdamW, over ``lr``."""
    layer_decay: float = 1.0
    """Each layer below the head has its learning rate multiplied by this once more."""
    solve_head: bool = False
    """Before the first epoch, put the best linear classifier on the network's present features into its head."""
    join_start: bool = False
    """At the end, try weights between those before the first epoch and the last ones on validation (WiSE-FT: Wortsman
    et al. 2022, arXiv 2109.01903)."""
    keep_statistics: bool = False
    """Batch norms use the statistics that they came with and keep them, so that features stay those that the head was
    solved on."""
    freeze_epochs: int = 0
    """Epochs in which only the head is trained."""

    schedule: str = "onecycle"
    """``onecycle`` and ``cosine`` (half a cosine), ``step`` and ``exponential`` (decay_rate per decay_epochs),
    ``multistep`` (decay_rate at each of decay_at), ``constant``, ``wsd`` (warm-up, the peak, and over the last
    ``decay_share`` of the run a decay: Hu et al. 2024, arXiv 2404.06395)."""
    warmup_epochs: float = 0.0
    """Epochs of linear rise from ``start_factor`` x lr to lr; of a one-cycle when 0: a quarter of the run."""
    start_factor: float = 0.04
    """First learning rate over the peak."""
    final_factor: float = 0.001
    """Last learning rate over the peak, for one-cycle, cosine and wsd."""
    decay_rate: float = 0.97
    """What step, multistep and exponential multiply by."""
    decay_epochs: float = 2.4
    """Per how many epochs."""
    schedule_epochs: int = 0
    """The schedule is drawn for so many epochs, of which ``epochs`` are run; 0: for these."""
    decay_at: str = ""
    """Epochs after which multistep multiplies, as text: ``8,11``."""
    decay_share: float = 0.2
    """Share of the run in which wsd decays, at its end; 0: it stays at the peak, for others to branch from."""

    loss: str = "cross-entropy"
    """``cross-entropy``, ``bce`` (binary cross-entropy per class), ``asymmetric`` (for one label per image in the form
    with a softmax), or for several labels ``focal``, ``two-way`` or ``zlpr``."""
    partial: str = "ignore"
    """What labels that are not known are: ``ignore`` leaves them out of the loss, ``negative`` takes them as absent."""
    label_smoothing: float = 0.1
    """Share of the target spread over all classes."""
    asymmetric_negative: float = 4.0
    """Focusing exponent of absent classes in the asymmetric loss."""
    asymmetric_positive: float = 0.0
    """Focusing exponent of present classes."""
    asymmetric_margin: float = 0.05
    """What is taken off an absent class's probability, down to 0 (of several labels per image)."""
    asymmetric_detach: bool = False
    """No gradient through the focusing weights, as in the authors' script."""
    focal_gamma: float = 2.0
    """Focusing exponent of the focal loss."""
    focal_alpha: float = 0.25
    """Weight of present classes in it."""
    threshold_beta: float = 1.0
    """For several labels: each class's threshold is where F-beta is highest on validation; above 1 finding more counts
    more than being right."""
    class_weights: bool = False
    """Weigh classes by the inverse of their frequency."""
    balanced: bool = False
    """Draw classes equally often."""
    distill_weight: float = 0.0
    """Share of the loss that comes from the teacher."""
    distill_temperature: float = 2.0
    """Softens teacher and student alike."""
    distill_kl: float = 0.0
    """So many times the teacher's divergence is added to the whole loss, in the place of ``distill_weight``'s share."""
    distill_features: float = 0.0
    """So many times the difference of what student and teacher find alike is added: of the similarities of a batch's
    images by the features that the classifiers see (Tung and Mori 2019, arXiv 1907.09682)."""

    augment: str = "resized-crop"
    """``shift-crop`` (small images: pad and crop), ``resized-crop`` (random area and shape) or ``none``; for detection
    ``scale-jitter`` (the whole picture at a random scale, then a crop) or ``none``."""
    flip: float = 0.5
    """Chance of a horizontal flip."""
    shift: float = 0.07
    """Padding of shift-crop, as a share of the side."""
    cutout: float = 0.0
    """Side of the square that is blanked, as a share of the image's."""
    crop_scale: float = 0.08
    """Smallest area of resized-crop, as a share of the image's."""
    scale_low: float = 0.5
    """Smallest scale of scale-jitter, over that at which the picture fits."""
    scale_high: float = 1.5
    """Largest scale of scale-jitter."""
    scaled_decode: bool = False
    """Let JPEGs be decoded at a half, a quarter or an eighth where the crop keeps enough pixels: faster, slightly
    different pixels."""
    scaled_share: float = 0.75
    """With scaled_decode: how many of the pixels per side that a crop is resized to it must keep at least; 0.5 is
    faster and blurs more."""
    shrink: float = 0.0
    """Read files from smaller copies, kept in the user's cache folder, whose shorter side is this many times the image
    size (1.15 keeps what random crops of half the picture need); 0: from the files themselves."""
    policy: str = "none"
    """``randaugment``, ``autoaugment``, ``trivialaugment`` or ``none``."""
    policy_ops: int = 2
    """Operations per image of RandAugment."""
    policy_magnitude: int = 9
    """Strength of RandAugment, 0 to 30."""
    erase: float = 0.0
    """Chance of random erasing."""
    mixup: float = 0.0
    """Alpha of mixup; 0: none."""
    cutmix: float = 0.0
    """Alpha of cutmix; 0: none. With mixup, each batch takes one of the two."""
    drop_rate: float = 0.0
    """Dropout before the classifier, where the network is built here."""
    drop_path_rate: float = 0.0
    """Stochastic depth at the last block, where the network is built here."""
    head: str = "own"
    """``gap`` or ``ml_decoder``, where the network is built here from an own spec; ``own``: as the spec says."""

    ema_decay: float = 0.0
    """Decay of the moving average of the weights per step; 0: none. It warms up as min(decay, (1 + t) / (10 + t))."""
    ema_width: float = 0.0
    """Above 0 the average is a power function of the step instead, so wide relative to the run: 0.05 and 0.1 are usual
    (Karras et al. 2024, arXiv 2312.02696)."""
    ema_every: int = 1
    """Steps between updates of the average."""
    clip_norm: float = 0.0
    """Largest gradient norm; 0: no clipping."""
    early_stop: int = 0
    """Epochs without a better validation result after which training ends; 0: never."""

    precision: str = "auto"
    """``fp32``; ``bf16``, ``fp16`` (autocast); ``amp``, the half precision that is native to the device; or ``auto``,
    the fastest of what is native as measured on the spot."""
    layout: str = "auto"
    """``nchw``, ``nhwc`` (channels last) or ``auto``: the faster as measured."""
    compile: bool | Literal["auto", "graphs"] = False
    """Train through ``torch.compile``; ``graphs``: on a GPU as CUDA graphs, for small networks and images; ``auto``
    tries it (on a GPU both) where the time left could pay for it, and keeps it where it does (not of several
    processes)."""
    grad_checkpointing: bool = False
    """Recompute blocks in backward to save memory."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        object.__setattr__(self, "image_size", _convert_size(self.image_size))
        for field in dataclasses.fields(self):
            if field.name == "image_size":
                continue
            object.__setattr__(self, field.name, _convert(field.name, getattr(self, field.name), hints[field.name]))
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise UserError(
                    f"recipe {self.name}: {name} {getattr(self, name)!r} is "
                    f"unknown{nearest(str(getattr(self, name)), known)}"
                )
        if self.policy != "none" and self.augment != "resized-crop":
            raise UserError(
                f"recipe {self.name}: policy {self.policy} goes with augment resized-crop only, got {self.augment}; "
                "use policy none"
            )
        if self.scale_low > self.scale_high:
            raise UserError(
                f"recipe {self.name}: scale_low {self.scale_low:g} is above scale_high {self.scale_high:g}; it must "
                "not be"
            )
        if self.schedule == "multistep" or self.decay_at:
            self.decay_epochs_at()
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"recipe {self.name}: {name} must lie between {low:g} and {high:g}, got {value!r}")

        if self.schedule_epochs and self.schedule_epochs < self.epochs:
            raise UserError(
                f"recipe {self.name}: schedule_epochs is {self.schedule_epochs}; it must be 0, or at least the "
                f"{self.epochs} epochs"
            )
        if self.optimizer == "schedule-free":
            self._check_schedule_free()
        if self.loss in ("two-way", "zlpr") and (self.mixup or self.cutmix):
            raise UserError(
                f"recipe {self.name}: loss {self.loss} ranks present classes above absent ones, so it takes no mixed "
                "labels; set mixup and cutmix to 0"
            )
        if self.distill_kl and self.distill_weight:
            raise UserError(
                f"recipe {self.name}: distill_kl is {self.distill_kl:g} and distill_weight {self.distill_weight:g}; "
                "give one of them"
            )

    def _check_schedule_free(self) -> None:
        right = {"schedule": "constant", "ema_decay": 0, "ema_width": 0}
        for name, value in right.items():
            if getattr(self, name) != value:
                raise UserError(
                    f"recipe {self.name}: {name} is {getattr(self, name)}; optimizer schedule-free averages in the "
                    f"place of a schedule, so it must be {value}"
                )
        if not self.momentum:
            raise UserError(f"recipe {self.name}: momentum is 0; optimizer schedule-free needs one above 0")

    def decay_epochs_at(self) -> tuple[float, ...]:
        """The epochs of ``decay_at``, ascending.

        Raises:
            UserError: they are no ascending numbers, or there are none.
        """
        try:
            epochs = tuple(float(text) for text in self.decay_at.split(","))
        except ValueError:
            epochs = ()
        if not epochs or list(epochs) != sorted(epochs) or not all(0 < epoch <= 100_000 for epoch in epochs):
            raise UserError(
                f"recipe {self.name}: decay_at must be ascending epochs such as 8,11, got {self.decay_at[:60]!r}"
            )
        return epochs

    def override(self, settings: dict[str, Any] | Iterable[str]) -> Recipe:
        """With other values: a dictionary, or ``key=value`` texts as ``--set`` gives them.

        Raises:
            UserError: an unknown key (with the nearest), a value of the wrong type, an impossible value.
        """
        if not isinstance(settings, dict):
            pairs = {}
            for text in settings:
                key, separator, value = str(text).partition("=")
                if not separator:
                    raise UserError(f"--set {text!r}: write key=value")
                pairs[key.strip().replace("-", "_")] = value.strip()
            settings = pairs
        known = [field.name for field in dataclasses.fields(self)]
        for key in settings:
            if key not in known:
                raise UserError(f"recipe {self.name} has no key {key!r}{nearest(key, known)}")
        return dataclasses.replace(self, **settings)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """From what ``to_dict`` gave; missing keys take their defaults.

        Raises:
            UserError: an unknown key, or an impossible value.
        """
        if not isinstance(values, dict):
            raise UserError(f"a recipe must be a table of key: value, got {type(values).__name__}")
        return cls(name=str(values.get("name", "custom"))).override(values)

    def to_yaml(self) -> str:
        """As YAML, in the order of the fields."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as YAML."""
        write_text(path, self.to_yaml())


def _convert_size(value: object) -> Size | None:
    """None, one side in pixels, or (height, width), which a text writes ``192x160``."""
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
        return None
    parts = value.lower().split("x") if isinstance(value, str) else value
    parts = list(parts) if isinstance(parts, list | tuple) else [parts]
    try:
        numbers = [_convert("image_size", part, int) for part in parts]
    except UserError:
        numbers = []
    if len(numbers) not in (1, 2) or not all(1 <= number <= MOST_PIXELS for number in numbers):
        raise UserError(
            f"recipe key image_size must be a whole number of pixels from 1 to {MOST_PIXELS}, or height x width such "
            f"as 192x160, got {value!r}"
        )
    return as_size(numbers[0], numbers[-1])


def _convert(name: str, value: Any, annotation: Any) -> Any:
    """``value`` as the field's type; texts (from ``--set`` or YAML, where 1e-3 is a text) are parsed."""
    options = [option for option in (get_args(annotation) or (annotation,)) if option is not type(None)]
    target, optional = options[0], len(get_args(annotation)) > len(options)
    if optional and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
        return None
    named = [name for option in options if get_origin(option) is Literal for name in get_args(option)]
    if isinstance(value, str) and value.lower() in named:
        return value.lower()
    try:
        if target is bool:
            if isinstance(value, str):
                return {
                    "true": True,
                    "yes": True,
                    "on": True,
                    "1": True,
                    "false": False,
                    "no": False,
                    "off": False,
                    "0": False,
                }[value.lower()]
            if isinstance(value, bool):
                return value
            raise TypeError
        if target is str:
            if not isinstance(value, str):
                raise TypeError
            return value
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
        if not math.isfinite(number) or (target is int and number != int(number)):
            raise ValueError
        return target(number)
    except (KeyError, OverflowError, TypeError, ValueError):
        right = {bool: "true or false", str: "a text", int: "a whole number", float: "a number"}[target]
        right = listed(["true", "false", *named], "or") if named else right
        raise UserError(f"recipe key {name} must be {right}, got {value!r}") from None
