"""What there is to choose from: released weights with their published accuracy, whoever wrote their network, specs and
their scaled members, at image sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from convscale.arch.scaling import scale
from convscale.arch.small import for_image_size
from convscale.arch.spec import NetSpec
from convscale.arch.zoo import ARCHITECTURES, list_models
from convscale.errors import UserError, check_whole, nearest
from convscale.networks.foreign import Foreign
from convscale.networks.offered import Filter, Weights, matching, nearest_of
from convscale.networks.resolve import Named, Network, find, is_module, name_of

SMALL_IMAGE = 64
"""Up to this side in pixels, members are scaled in width and depth alone, at the images' own size."""
ACCURACIES = ("imagenet", "none")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A network at an image size, with the accuracy that is claimed for it, if any."""

    name: str
    """``arch.tag`` of released weights, or a spec's name."""
    spec: Named
    """What is built and timed. Weights of one architecture share it: speed does not depend on values."""
    image_size: int
    """Side of the square input in pixels."""
    group: str
    """Within it candidates are ranked by size where no accuracy is known: the weights' name, or the baseline that a
    spec was scaled from."""
    top1: float | None = None
    """Accuracy in percent; None: none is claimed."""
    recipe: str = ""
    """How the weights were trained, as the part of their name after the dot."""
    source: str = ""
    """Who published the accuracy."""
    licence: str = ""
    """Of the weights, ``unknown`` where nobody states it; empty where there are no weights."""
    extra_data: str = ""
    """Images beside ImageNet-1k's that the weights were trained on; empty: none."""
    published: tuple[tuple[int, float], ...] = ()
    """(size, percent) of all figures published for these weights: a hint where ``image_size`` has none, never a claim.
    """
    why_not: str = ""
    """Why it can not be a choice at all (a size that it does not take); empty for all others."""
    notes: tuple[str, ...] = ()
    """What a reader must know to take its figures right."""

    @property
    def label(self) -> str:
        """Name and size."""
        return f"{self.name} @{self.image_size}"


def sized(spec: NetSpec, image_size: int | None) -> NetSpec:
    """A named candidate at the size asked for; None: its own."""
    return spec if image_size is None else replace(for_image_size(spec, image_size), name=spec.name)


def candidates_of(
    wanted: Iterable[Network] | Network | None,
    image_sizes: Sequence[int] | None = None,
    accuracy: str | Mapping[str, float] = "imagenet",
    offer: Filter | None = None,
) -> list[Candidate]:
    """Candidates from names, shell patterns, tags, specs and networks of other code; None: all that ``offer`` lets
    through.

    A name or pattern means the released weights of the architectures that it matches, or the bare architecture where it
    has none.

    Args:
        wanted: as above.
        image_sizes: sides in pixels, each of which every candidate is tried at; None: the sizes a figure was published
            at, and a spec's own.
        accuracy: ``imagenet``: as published for the weights at that size, recipe and source beside it; ``none``: none
            is claimed; or a mapping from a candidate's name, or its name, a space, @ and the size (``resnet50.a1_in1k
            @288``), to percent of the user's own measuring.
        offer: which released weights a user may and will take; None: those of every ConvNet. What has no weights (a
            spec, a network of the user's own) is not asked for a licence.

    Raises:
        UserError: nothing matches a name (the nearest are named), a size is not a whole number of at least 1, the
            accuracy is unknown or given for what is no candidate, or two different networks have one name.
    """
    if isinstance(accuracy, str) and accuracy not in ACCURACIES:
        raise UserError(
            f"accuracy {accuracy!r} is unknown{nearest(accuracy, ACCURACIES)}; or give a mapping from names to percent"
        )
    for size in image_sizes or ():
        check_whole("image size", size)
    one = isinstance(wanted, str | NetSpec | Foreign) or is_module(wanted)
    items: list[object] = ["*"] if wanted is None else [wanted] if one else list(wanted)  # pyright: ignore[reportArgumentType]
    if not items:
        raise UserError("candidates is empty; name at least one network")
    found: dict[str, Candidate] = {}
    for item in items:
        for candidate in _expanded(item, image_sizes, offer or Filter()):
            if (before := found.setdefault(candidate.label, _judged(candidate, accuracy))).spec != candidate.spec:
                raise UserError(f"two candidates that differ are named {before.label}; give one of them another name")
    if not isinstance(accuracy, str):
        names = {name for candidate in found.values() for name in (candidate.label, candidate.name)}
        if unknown := [name for name in accuracy if name not in names]:
            raise UserError(
                f"accuracy is given for {unknown[0]!r}, which is no candidate{nearest(str(unknown[0]), names)}"
            )
    return list(found.values())


def _expanded(item: object, image_sizes: Sequence[int] | None, offer: Filter) -> list[Candidate]:
    if isinstance(item, NetSpec):
        return _of_spec(item, image_sizes)
    if isinstance(item, Foreign):
        return _of_foreign(item, image_sizes)
    if is_module(item):
        return _of_foreign(Foreign(name_of(item), "module", item), image_sizes)
    if not isinstance(item, str):
        raise UserError(f"a candidate is a name, a pattern or a NetSpec, got {item!r}")
    if weights := matching(item, offer):
        return [candidate for each in weights for candidate in _of_weights(each, image_sizes)]
    if bare := list_models(item):
        return [candidate for name in bare for candidate in _of_spec(ARCHITECTURES[name], image_sizes)]
    try:
        named = find(item)
    except UserError as error:
        if str(error).startswith("unknown model"):
            raise UserError(f"no model matches {item!r}{nearest_of(item)}") from error
        raise
    return _of_foreign(named, image_sizes) if isinstance(named, Foreign) else _of_spec(named, image_sizes)


def _of_weights(weights: Weights, image_sizes: Sequence[int] | None) -> list[Candidate]:
    """At each size asked for; else at those with a figure, own ones at their own size too."""
    published = {}
    for result in sorted(weights.results, key=lambda result: result.top1):  # of two crops at a size the better
        published[result.image_size] = result
    own = () if published and weights.zoo == "timm" else (weights.image_size,)
    head = f"weights of {weights.num_classes} classes" if weights.num_classes else "weights without a classifier"
    notes = () if weights.num_classes == 1000 else (f"{head}; the speed is of a 1000-class head",)
    made = []
    for size in image_sizes or sorted({*own, *published}):
        result = published.get(size)
        made.append(
            Candidate(
                name=weights.name,
                spec=weights.network,
                image_size=size,
                group=weights.name,
                top1=result.top1 if result else None,
                recipe=weights.recipe,
                source=result.source if result else "",
                licence=weights.licence,
                extra_data=weights.extra_data,
                published=tuple((r.image_size, r.top1) for r in sorted(weights.results, key=lambda r: r.image_size)),
                why_not=_refused(weights.network, size),
                notes=notes,
            )
        )
    return made


def _of_foreign(network: Foreign, image_sizes: Sequence[int] | None) -> list[Candidate]:
    """A network of other code without weights that are known, at the sizes asked for or its own."""
    if not image_sizes:
        from convscale.networks.inputs import input_facts

        facts = input_facts(network)
        try:
            height, width = facts.sides()
        except UserError as error:
            raise UserError(f"{network.name} does not say its image size; give --img-size in pixels") from error
        if height != width:
            raise UserError(f"{network.name} takes {height}x{width} px; give --img-size, candidates are square")
        image_sizes = (height,)
    return [Candidate(name=network.name, spec=network, image_size=size, group=network.name) for size in image_sizes]


def _of_spec(spec: NetSpec, image_sizes: Sequence[int] | None) -> list[Candidate]:
    group = spec.lineage.base.name if spec.lineage else spec.name
    return [
        Candidate(name=spec.name, spec=spec, image_size=size, group=group, why_not=_refused(spec, size))
        for size in image_sizes or (spec.input.size,)
    ]


def _refused(spec: Named, size: int) -> str:
    if isinstance(spec, Foreign):
        return ""  # its own code says so, when it is traced
    try:
        spec.check_size(size)
    except UserError as error:
        return str(error)
    return ""


def _judged(candidate: Candidate, accuracy: str | Mapping[str, float]) -> Candidate:
    """The candidate with the accuracy that the caller wants to go by."""
    if accuracy == "imagenet":
        return candidate
    if isinstance(accuracy, str):
        return replace(candidate, top1=None, source="", published=())
    own = accuracy.get(candidate.label, accuracy.get(candidate.name))
    if own is not None and not (isinstance(own, int | float) and 0 <= own <= 100):
        raise UserError(f"accuracy of {candidate.label} is {own!r}; it must be in percent, 0 to 100")
    return replace(candidate, top1=own, source="" if own is None else "given by the caller", published=())


def aligned_variants(spec: NetSpec, multiple: int = 8) -> list[NetSpec]:
    """Specs near ``spec`` whose channels are multiples of ``multiple``, as tensor cores want them; empty where they are
    already.

    First the one with each width rounded by itself, the closest; then those whose first width is the multiple below or
    above and whose other widths follow (the base widths 72 and 80 for TResNet-L's 76, 80 and 88 for TResNet-XL's 83).
    They are other networks: no released weights fit.
    """
    first = spec.stem.widths[-1]
    if all(width % multiple == 0 for width in _widths(spec)):
        return []
    made = [scale(spec, divisor=multiple, name=f"{spec.name}-x{multiple}")]
    for base in (first // multiple * multiple, -(-first // multiple) * multiple):
        if base and base != first:
            made.append(scale(spec, width=base / first, divisor=multiple, name=f"{spec.name}-base{base}"))
    unique: list[NetSpec] = []
    for variant in made:
        if variant not in unique and all(width % multiple == 0 for width in _widths(variant)):
            unique.append(variant)
    return unique


def _widths(spec: NetSpec) -> list[int]:
    runs = [run.block for stage in spec.stages for run in stage.runs]
    return [*spec.stem.widths, *(block.width for block in runs)]


def describe_accuracy(candidate: Candidate) -> str:
    """``83.09 % (miil_in21k_ft_in1k)``, or that none is claimed."""
    if candidate.top1 is None:
        return "no accuracy claimed"
    return f"{candidate.top1:.2f} %" + (f" ({candidate.recipe})" if candidate.recipe else "")


def describe_weights(candidate: Candidate) -> str:
    """``licence apache-2.0, trained on ImageNet-12k too``; empty where there are no weights."""
    if not candidate.licence:
        return ""
    data = f"trained on {candidate.extra_data} too" if candidate.extra_data else "trained on ImageNet-1k alone"
    return f"licence {candidate.licence}, {data}"


def plain(candidate: Candidate) -> dict[str, object]:
    """As plain JSON values."""
    fields = ("name", "image_size", "group", "top1", "recipe", "source", "licence", "extra_data")
    return {**{key: getattr(candidate, key) for key in fields}, "notes": list(candidate.notes)}
