"""An architecture as a value: frozen, validated, equal by value, with a JSON and YAML round trip.

A ``NetSpec`` says everything that the builder needs and nothing that it can derive. Families are tables of such values
(``families/``), scaling maps one to another (``multipliers.py``), and a user's own works wherever a named one does.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from typing import Literal

from convscale.arch.block import StageSpec
from convscale.arch.bounds import check_fits
from convscale.arch.codec import from_plain, require, to_plain
from convscale.arch.parts import HeadSpec, InputSpec, NormSpec, Part, ScalingRules, StemSpec
from convscale.errors import MOST_WHOLE, UserError, check_path
from convscale.files import write_text
from convscale.read import json_of, read_text, yaml_of

_INPUT, _HEAD, _NORM, _RULES = InputSpec(), HeadSpec(), NormSpec(), ScalingRules()


@dataclass(frozen=True, kw_only=True)
class Lineage(Part):
    """Where a scaled spec comes from, so that scaling again starts from the unrounded baseline."""

    base: NetSpec
    """The unrounded baseline."""
    depth: float = 1.0
    """Multiplier of blocks per stage."""
    width: float = 1.0
    """Multiplier of channels."""
    resolution: float = 1.0
    """Multiplier of the image's side."""

    def validate(self) -> None:
        for name in ("depth", "width", "resolution"):
            value = getattr(self, name)
            require(math.isfinite(value) and value > 0, f"Lineage.{name}", value, "a finite number above 0")


@dataclass(frozen=True, kw_only=True)
class NetSpec(Part):
    """A whole network. Specs compare by all but their names, families and lineages."""

    name: str = field(default="custom", compare=False)
    family: str = field(default="custom", compare=False)
    """``tresnet``, ``efficientnet``, ``resnet``, ``mobilenet`` ...: whose weight layouts it may use."""
    input: InputSpec = _INPUT
    stem: StemSpec
    stages: tuple[StageSpec, ...]
    head: HeadSpec = _HEAD
    norm: NormSpec = _NORM
    padding: Literal["symmetric", "same"] = "symmetric"
    """``same``: TensorFlow's, asymmetric for stride 2 and dependent on the image size."""
    init: Literal["resnet", "tresnet", "efficientnet", "convnext", "kaiming"] = "resnet"
    """Initial weights: kaiming normal fan-out for relu or leaky relu, or fan-out over groups; the residual ones zero
    each block's last norm, ``kaiming`` does not. ``convnext``: a truncated normal of 0.02, as its authors' code."""
    scaling: ScalingRules = _RULES
    lineage: Lineage | None = field(default=None, compare=False)

    def validate(self) -> None:
        require(bool(self.name), "NetSpec.name", self.name, "not empty")
        require(len(self.stages) >= 1, "NetSpec.stages", self.stages, "at least one stage")
        if self.stem.kind == "space_to_depth":
            require(
                self.input.multiple % self.stem.stride == 0,
                "InputSpec.multiple",
                self.input.multiple,
                f"a multiple of {self.stem.stride}, the space-to-depth stem's block",
            )
        elif self.stem.kind not in ("patch", "branched"):
            require(self.stem.stride < 4, "StemSpec.stride", self.stem.stride, f"1 or 2 for a {self.stem.kind} stem")
        check_fits(self)

    @property
    def num_features(self) -> int:
        """Channels that the classifier takes (average pooling)."""
        if self.head.kind == "ml_decoder":
            return self.head.decoder_width
        return self.head.pooled_width or self.map_width

    @property
    def map_width(self) -> int:
        """Channels of the last map, before the pool."""
        return self.head.width or self.stages[-1].width

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks per stage."""
        return tuple(stage.depth for stage in self.stages)

    @property
    def widths(self) -> tuple[int, ...]:
        """Output channels per stage."""
        return tuple(stage.width for stage in self.stages)

    @property
    def reduction(self) -> int:
        """Pixels of the image per pixel of the last map, along one side."""
        return self.stem.reduction * math.prod(stage.stride for stage in self.stages)

    def check_size(self, image_size: int) -> int:
        """Return ``image_size`` if the network takes square images of that side in pixels.

        Raises:
            UserError: it is no whole number of at least ``input.min_size``, or no multiple of ``input.multiple``.
        """
        if not isinstance(image_size, int) or isinstance(image_size, bool) or not 1 <= image_size <= MOST_WHOLE:
            raise UserError(
                f"image size is {image_size!r}; it must be a whole number of pixels, at least {self.input.min_size}"
            )
        if image_size < self.input.min_size or image_size % self.input.multiple:
            of = f"a multiple of {self.input.multiple} and " if self.input.multiple > 1 else ""
            raise UserError(f"image size is {image_size} px; {self.name} takes {of}at least {self.input.min_size} px")
        return image_size

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values. Fields at their default are left out: a file shows what is special about a net."""
        return to_plain(self)

    def to_json(self) -> str:
        """As indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_yaml(self) -> str:
        """As YAML."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False, width=120)

    @staticmethod
    def from_dict(values: dict[str, object]) -> NetSpec:
        """The inverse of ``to_dict``.

        Raises:
            UserError: an unknown key (the nearest is named), a missing one, or a value that does not fit.
        """
        spec = from_plain(NetSpec, values, "spec")
        assert isinstance(spec, NetSpec)
        return spec

    @staticmethod
    def from_json(text: str) -> NetSpec:
        """The inverse of ``to_json``; UserError on text that is no spec."""
        return NetSpec.from_dict(json_of(text, "spec"))

    @staticmethod
    def from_yaml(text: str) -> NetSpec:
        """The inverse of ``to_yaml``; UserError on text that is no spec."""
        return NetSpec.from_dict(yaml_of(text, "spec"))

    def __repr__(self) -> str:
        stages = " ".join(
            "+".join(f"{run.repeat}x{run.block.kind}-{run.block.width}" for run in stage.runs)
            + (f"/{stage.stride}" if stage.stride > 1 else "")
            for stage in self.stages
        )
        stem = f"{self.stem.kind}-{'-'.join(map(str, self.stem.widths))}/{self.stem.reduction}"
        head = f" head-{self.head.width}" if self.head.width else ""
        head += f" pooled-{self.head.pooled_width}" if self.head.pooled_width else ""
        head += " ml_decoder" if self.head.kind == "ml_decoder" else ""
        return f"<NetSpec {self.name}: {self.input.size} px, {stem}, {stages}{head}, {self.norm.kind}>"


def load_spec(path: str | os.PathLike[str]) -> NetSpec:
    """Read a spec from a ``.json``, ``.yaml`` or ``.yml`` file.

    Raises:
        UserError: no such file, another suffix, or content that is no spec; the message names the file.
    """
    path = check_path("spec file", path)
    readers = {".json": NetSpec.from_json, ".yaml": NetSpec.from_yaml, ".yml": NetSpec.from_yaml}
    if path.suffix not in readers:
        raise UserError(f"spec file {path} ends in {path.suffix!r}; it must end in .json, .yaml or .yml")
    text = read_text(path, "spec file")
    try:
        return readers[path.suffix](text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def save_spec(spec: NetSpec, path: str | os.PathLike[str]) -> None:
    """Write a spec as JSON or YAML, by the suffix of ``path``, atomically.

    Raises:
        UserError: another suffix, or no spec.
    """
    path = check_path("spec file", path)
    if not isinstance(spec, NetSpec):
        raise UserError(f"spec is {spec!r}; it must be a NetSpec")
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise UserError(f"spec file {path} ends in {path.suffix!r}; it must end in .json, .yaml or .yml")
    write_text(path, spec.to_json() + "\n" if path.suffix == ".json" else spec.to_yaml())
