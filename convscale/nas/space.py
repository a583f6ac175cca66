"""A search space as a value: which networks there are, counted, drawn, changed and written down."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Literal, overload

import numpy as np

from convscale.arch.bounds import side_after_stem
from convscale.arch.codec import from_plain, require, to_plain
from convscale.arch.parts import HeadSpec, InputSpec, NormSpec, Part, ScalingRules, StemSpec
from convscale.arch.spec import NetSpec
from convscale.errors import UserError, check_path, check_whole
from convscale.files import write_text
from convscale.nas.choices import FIELDS, ORDERED, StageChoices
from convscale.read import json_of, read_text, yaml_of

_TRIES = 1_000
"""Draws after which a limit is taken to leave nothing."""
_INPUT, _NORM, _RULES = InputSpec(), NormSpec(), ScalingRules()
Genes = tuple[int, ...]
"""One number for each variable of a space: which of its options. Those without an effect are 0."""


@dataclass(frozen=True, kw_only=True)
class Variable:
    """One thing to choose."""

    name: str
    """``stem``, ``head``, ``image_size``, or a stage's: ``2.kernel``."""
    options: tuple[object, ...]
    """At least two."""
    stage: int | None
    """Its stage, counted from 0; None: of the whole network."""
    field: str
    """Its name in the stage."""
    ordered: bool
    """Whether the options lie on a line."""


@dataclass(frozen=True, kw_only=True)
class SearchSpace(Part):
    """All networks that can be put together from options: one of each stage's, one stem, one head, one image size.

    Every choice is a valid ``NetSpec``: what could not be built is refused when the space is made.

    Raises:
        UserError: an option is impossible; the message names it.
    """

    name: str = "custom"
    """What it is called; its networks' names begin with it."""
    source: str = ""
    """Where it comes from."""
    stages: tuple[StageChoices, ...]
    """In their order."""
    stems: tuple[StemSpec, ...]
    """From the image to the first stage."""
    heads: tuple[HeadSpec, ...] = (HeadSpec(),)
    """From the last stage to the logits."""
    image_sizes: tuple[int, ...] = (224,)
    """Sides of the square input in pixels."""
    input: InputSpec = _INPUT
    """Of every network, but for the size."""
    norm: NormSpec = _NORM
    """Of every network."""
    padding: Literal["symmetric", "same"] = "symmetric"
    init: Literal["resnet", "tresnet", "efficientnet", "convnext", "kaiming"] = "resnet"
    scaling: ScalingRules = _RULES
    """How its networks are scaled later."""
    max_macs_m: float = 0.0
    """Millions of multiply-accumulates that a network may have at most; 0: any number."""
    max_params_m: float = 0.0
    """Millions of parameters."""

    def validate(self) -> None:
        require(bool(self.name), "SearchSpace.name", self.name, "not empty")
        for field in ("stages", "stems", "heads", "image_sizes"):
            options = getattr(self, field)
            require(len(options) >= 1, f"SearchSpace.{field}", options, "at least one")
            if field != "stages":
                require(len(set(options)) == len(options), f"SearchSpace.{field}", options, "options that differ")
        for field in ("max_macs_m", "max_params_m"):
            require(getattr(self, field) >= 0, f"SearchSpace.{field}", getattr(self, field), "0 or more")
        self._check_corners()

    def _check_corners(self) -> None:
        """Every stem at every size, with every kind of block and way to shrink a map: sides follow from these alone.
        Widths and depths at their largest, which bounds what a network may cost. An option that no network can have is
        refused.
        """
        first = {variable.name: 0 for variable in self.variables}
        largest = {v.name: _largest(v.options) for v in self.variables if v.field in ("width", "depth")}
        ways: list[dict[str, int]] = [{}]
        for at in range(len(self.stages)):
            shrinking = [v for v in self.variables if v.stage == at and v.field in ("kind", "downsample")]
            for index in product(*(range(len(v.options)) for v in shrinking)):
                ways.append({v.name: i for v, i in zip(shrinking, index, strict=True)})
        unused: dict[tuple[str, int], Genes] = {}
        used: set[tuple[str, int]] = set()
        for (stem, _), (at, size) in product(enumerate(self.stems), enumerate(self.image_sizes)):
            for extra in ways:
                whole = {**first, **largest, "stem": stem, "image_size": at, **extra}
                genes = tuple(whole[v.name] for v in self.variables)
                made = self.canonical(genes)
                self._built(made).check_size(size)
                for variable, asked, kept in zip(self.variables, genes, made, strict=True):
                    if asked == kept:
                        used.add((variable.name, asked))
                    elif variable.field == "downsample":
                        unused[variable.name, asked] = genes
        for option, genes in unused.items():
            if option not in used:
                self._built(genes)  # which says why

    # ------------------------------------------------------------ what there is

    @cached_property
    def variables(self) -> tuple[Variable, ...]:
        """Everything that has more than one option, in order."""
        found = [
            Variable(name=name, options=options, stage=None, field=name, ordered=name == "image_size")
            for name, options in (("stem", self.stems), ("head", self.heads), ("image_size", self.image_sizes))
        ]
        for at, stage in enumerate(self.stages):
            found += [
                Variable(name=f"{at}.{f}", options=stage.options(f), stage=at, field=f, ordered=f in ORDERED)
                for f in FIELDS
            ]
        return tuple(variable for variable in found if len(variable.options) > 1)

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many options each variable has."""
        return tuple(len(variable.options) for variable in self.variables)

    @property
    def size(self) -> int:
        """How many different networks there are, limits on MACs and parameters left out of account."""
        total = 0
        for stem, size in product(self.stems, self.image_sizes):
            ways = {side_after_stem(stem, size): 1}
            for stage in self.stages:
                found: Counter[int] = Counter()
                for side, count in ways.items():
                    for after, more in stage.counts(side).items():
                        found[after] += count * more
                ways = found
            total += sum(ways.values())
        return len(self.heads) * total

    def __len__(self) -> int:
        if self.size > sys.maxsize:
            raise UserError(f"the space {self.name} has {self.size:.1e} networks, more than len() can say; .size can")
        return self.size

    def __bool__(self) -> bool:
        return True

    def __contains__(self, spec: object) -> bool:
        return isinstance(spec, NetSpec) and self._genes(spec) is not None

    # ------------------------------------------------------------ genes

    def canonical(self, genes: Sequence[int]) -> Genes:
        """The genes with every choice that has no effect at its first option, and every way to shrink a map that its
        block does not have at that side at the first one that it has.
        """
        made = []
        chosen = self._chosen(genes)
        side = side_after_stem(*self._start(genes))
        for stage, about in zip(self.stages, chosen, strict=True):
            ways = stage.fitting(about["kind"], side) if stage.stride == 2 else ()
            if ways and about["downsample"] not in ways:
                about["downsample"] = ways[0]
            side = stage.side_after(about, side)
        for gene, variable in zip(genes, self.variables, strict=True):
            if variable.stage is None:
                made.append(int(gene))
                continue
            about = chosen[variable.stage]
            kept = self.stages[variable.stage].active(variable.field, about)
            made.append(variable.options.index(about[variable.field]) if kept else 0)
        return tuple(made)

    def _start(self, genes: Sequence[int]) -> tuple[StemSpec, int]:
        """The stem and the image size."""
        whole = {v.name: v.options[gene] for gene, v in zip(genes, self.variables, strict=True) if v.stage is None}
        stem, size = whole.get("stem", self.stems[0]), whole.get("image_size", self.image_sizes[0])
        assert isinstance(stem, StemSpec)
        assert isinstance(size, int)
        return stem, size

    def _chosen(self, genes: Sequence[int]) -> list[dict[str, object]]:
        """Each stage's options by name."""
        chosen: list[dict[str, object]] = [{f: stage.options(f)[0] for f in FIELDS} for stage in self.stages]
        for gene, variable in zip(genes, self.variables, strict=True):
            if variable.stage is not None:
                chosen[variable.stage][variable.field] = variable.options[gene]
        return chosen

    def spec_of(self, genes: Sequence[int]) -> NetSpec:
        """The network of these genes."""
        return self._built(self.canonical(genes))

    def _built(self, genes: Genes) -> NetSpec:
        whole = {v.name: v.options[gene] for gene, v in zip(genes, self.variables, strict=True) if v.stage is None}
        (stem, size), head = self._start(genes), whole.get("head", self.heads[0])
        assert isinstance(head, HeadSpec)
        last = [at + 1 == len(self.stages) or self.stages[at + 1].stride == 2 for at in range(len(self.stages))]
        stages = [
            stage.stage(chosen, tap=tap)
            for stage, chosen, tap in zip(self.stages, self._chosen(genes), last, strict=True)
        ]
        digest = hashlib.sha256(json.dumps([self.digest, genes]).encode()).hexdigest()[:8]
        return NetSpec(
            name=f"{self.name}-{digest}",
            input=replace(self.input, size=size),
            stem=stem,
            stages=tuple(stages),
            head=head,
            norm=self.norm,
            padding=self.padding,
            init=self.init,
            scaling=self.scaling,
        )

    def genes_of(self, spec: NetSpec) -> Genes:
        """The genes of a network.

        Raises:
            UserError: it is not in this space.
        """
        found = self._genes(spec)
        if found is None:
            raise UserError(f"{spec.name} is not in the space {self.name}: {self._why_not(spec)}")
        return found

    def _genes(self, spec: NetSpec) -> Genes | None:
        if len(spec.stages) != len(self.stages):
            return None
        chosen = [stage.chosen_in(made) for stage, made in zip(self.stages, spec.stages, strict=True)]
        whole = {"stem": spec.stem, "head": spec.head, "image_size": spec.input.size}
        genes = []
        for variable in self.variables:
            found = whole if variable.stage is None else chosen[variable.stage]
            if found is None or found[variable.field] not in variable.options:
                return None
            genes.append(variable.options.index(found[variable.field]))
        made = tuple(genes)
        return made if None not in chosen and self._built(made) == spec else None

    def _why_not(self, spec: NetSpec) -> str:
        if len(spec.stages) != len(self.stages):
            return f"it has {len(spec.stages)} stages, the space {len(self.stages)}"
        for at, (stage, made) in enumerate(zip(self.stages, spec.stages, strict=True)):
            if stage.chosen_in(made) is None:
                block = made.runs[0].block
                return f"its stage {at}, {made.depth} x {block.kind} of {block.width} channels, is no option there"
        return "its stem, head, input, norm or image size is no option"

    # ------------------------------------------------------------ vectors

    def encode(self, spec: NetSpec) -> np.ndarray:
        """A network as numbers in [0, 1], one for each variable: the place among its options. float64 (variables,).

        Raises:
            UserError: it is not in this space.
        """
        return self.vector_of(self.genes_of(spec))

    def vector_of(self, genes: Sequence[int]) -> np.ndarray:
        """Genes as numbers in [0, 1]."""
        most = np.array([len(variable.options) - 1 for variable in self.variables], dtype=float)
        return np.asarray(genes, dtype=float) / np.maximum(most, 1.0)

    def decode(self, vector: Sequence[float] | np.ndarray) -> NetSpec:
        """The network nearest to a vector, which may be any finite one of that length.

        Raises:
            UserError: another length, or a value that is not finite.
        """
        values = np.asarray(vector, dtype=float)
        if values.shape != (len(self.variables),) or not np.isfinite(values).all():
            raise UserError(
                f"vector has shape {values.shape}; it must be {len(self.variables)} finite numbers, one for each "
                f"variable of the space {self.name}"
            )
        most = [len(variable.options) - 1 for variable in self.variables]
        return self.spec_of([min(top, max(0, round(value * top))) for value, top in zip(values, most, strict=True)])

    # ------------------------------------------------------------ drawing

    @overload
    def sample(self, seed: int = 0, *, count: None = None) -> NetSpec: ...

    @overload
    def sample(self, seed: int = 0, *, count: int) -> list[NetSpec]: ...

    def sample(self, seed: int = 0, *, count: int | None = None) -> NetSpec | list[NetSpec]:
        """A network drawn from all of them alike; the same seed draws the same one.

        Args:
            seed: of the draw.
            count: so many instead of one, as a list; the same may come twice.

        Raises:
            UserError: the limits on MACs and parameters leave nothing that is found.
        """
        rng = np.random.default_rng(check_whole("seed", seed, 0))
        if count is None:
            return self.spec_of(self.draw(rng))
        return [self.spec_of(self.draw(rng)) for _ in range(check_whole("count", count))]

    def draw(self, rng: np.random.Generator) -> Genes:
        """Genes drawn from all different ones alike. Raises as ``sample``."""
        for _ in range(_TRIES):
            genes = [0] * len(self.variables)
            for members in self._groups:
                # Drawn again until nothing without an effect was changed: else networks that can be written in many
                # ways would come too often.
                while True:
                    for at in members:
                        genes[at] = int(rng.integers(len(self.variables[at].options)))
                    made = self.canonical(genes)
                    if all(made[at] == genes[at] for at in members):
                        break
            if self.fits(made := tuple(genes)):
                return made
        raise UserError(f"of {_TRIES} networks drawn from the space {self.name} none keeps its limits; raise them")

    @cached_property
    def _groups(self) -> list[list[int]]:
        """Positions of variables by stage."""
        stages = [None, *range(len(self.stages))]
        groups = [[at for at, v in enumerate(self.variables) if v.stage == stage] for stage in stages]
        return [group for group in groups if group]

    def mutate(self, spec: NetSpec, seed: int = 0) -> NetSpec:
        """The network with one choice changed.

        Raises:
            UserError: it is not in this space, or the space or its limits leave nothing else.
        """
        rng = np.random.default_rng(check_whole("seed", seed, 0))
        return self.spec_of(self.changed(self.genes_of(spec), rng))

    def changed(self, genes: Genes, rng: np.random.Generator) -> Genes:
        """Genes with one choice changed. Raises as ``mutate``."""
        for _ in range(_TRIES if self.variables else 0):
            at = int(rng.integers(len(self.variables)))
            others = [option for option in range(len(self.variables[at].options)) if option != genes[at]]
            made = self.canonical([*genes[:at], others[int(rng.integers(len(others)))], *genes[at + 1 :]])
            if made != genes and self.fits(made):
                return made
        raise UserError(f"the space {self.name} has no other network beside this one that keeps its limits")

    def neighbours(self, spec: NetSpec) -> list[NetSpec]:
        """All networks that differ from it in one choice, in the order of the variables.

        Raises:
            UserError: it is not in this space.
        """
        return [self.spec_of(genes) for genes in self.beside(self.genes_of(spec))]

    def beside(self, genes: Genes) -> Iterator[Genes]:
        """Genes that differ in one choice, each once."""
        seen = {genes}
        for at, variable in enumerate(self.variables):
            for option in range(len(variable.options)):
                made = self.canonical([*genes[:at], option, *genes[at + 1 :]])
                if made not in seen and self.fits(made):
                    seen.add(made)
                    yield made

    def fits(self, genes: Genes) -> bool:
        """Whether a network keeps the limits on MACs and parameters."""
        if not self.max_macs_m and not self.max_params_m:
            return True
        from convscale.nas.tally import tally

        cost = tally(self._built(genes))
        small = not self.max_macs_m or cost.macs <= 1e6 * self.max_macs_m
        return small and (not self.max_params_m or cost.params <= 1e6 * self.max_params_m)

    def at_size(self, image_size: int) -> SearchSpace:
        """The space for images of one size in pixels.

        Raises:
            UserError: its networks do not take that size.
        """
        return replace(self, image_sizes=(check_whole("image_size", image_size),))

    # ------------------------------------------------------------ files

    @cached_property
    def digest(self) -> str:
        """Hex digest of what it holds; names and sources do not count."""
        plain = {key: value for key, value in self.to_dict().items() if key not in ("name", "source")}
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values, fields at their default left out."""
        return to_plain(self)

    def to_json(self) -> str:
        """As indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_yaml(self) -> str:
        """As YAML."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False, width=120)

    @staticmethod
    def from_dict(values: Mapping[str, object]) -> SearchSpace:
        """The inverse of ``to_dict``.

        Raises:
            UserError: an unknown key (the nearest is named), a missing one, or a value that does not fit.
        """
        space = from_plain(SearchSpace, values, "space")
        assert isinstance(space, SearchSpace)
        return space

    @staticmethod
    def from_json(text: str) -> SearchSpace:
        """The inverse of ``to_json``; UserError on text that is no space."""
        return SearchSpace.from_dict(json_of(text, "space"))

    @staticmethod
    def from_yaml(text: str) -> SearchSpace:
        """The inverse of ``to_yaml``; UserError on text that is no space."""
        return SearchSpace.from_dict(yaml_of(text, "space"))

    def __repr__(self) -> str:
        return f"<SearchSpace {self.name}: {len(self.stages)} stages, {self.size_text} networks>"

    @property
    def size_text(self) -> str:
        """How many networks, in words."""
        total = self.size
        return f"{total:,}" if total < 10**6 else f"{total:.1e}"


def _largest(options: Sequence[object]) -> int:
    """Which of some numbers is the largest."""
    return max(range(len(options)), key=lambda at: float(str(options[at])))


def load_space(path: str | os.PathLike[str]) -> SearchSpace:
    """Read a space from a ``.json``, ``.yaml`` or ``.yml`` file.

    Raises:
        UserError: no such file, another suffix, or content that is no space; the message names the file.
    """
    path = check_path("space file", path)
    readers = {".json": SearchSpace.from_json, ".yaml": SearchSpace.from_yaml, ".yml": SearchSpace.from_yaml}
    if path.suffix not in readers:
        raise UserError(f"space file {path} ends in {path.suffix!r}; it must end in .json, .yaml or .yml")
    text = read_text(path, "space file")
    try:
        return readers[path.suffix](text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def save_space(space: SearchSpace, path: str | os.PathLike[str]) -> None:
    """Write a space as JSON or YAML, by the suffix of ``path``, atomically.

    Raises:
        UserError: another suffix.
    """
    path = check_path("space file", path)
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise UserError(f"space file {path} ends in {path.suffix!r}; it must end in .json, .yaml or .yml")
    write_text(path, space.to_json() + "\n" if path.suffix == ".json" else space.to_yaml())
