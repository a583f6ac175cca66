"""What there is to choose from: the own zoo's released weights and timm's, filtered by what a user may and will take.

No torch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache

from convscale.arch.tags import PublishedAccuracy, WeightsTag, all_tags
from convscale.arch.zoo import ARCHITECTURES
from convscale.errors import UserError, check_flag, nearest
from convscale.networks.foreign import need_timm, timm_is_installed, timm_name
from convscale.networks.released import buildable, extra_data, released
from convscale.networks.resolve import Named

ZOOS = ("own", "timm", "all")
NOT_COMMERCIAL = ("cc-by-nc-4.0", "fair-noncommercial-research-license", "seer-license", "unknown")
"""Licences that forbid commercial use (SEER's is for research), and what nobody states a licence for."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Released weights that can be chosen, whoever builds their network."""

    name: str
    """``arch.tag``."""
    arch: str
    """The architecture's name."""
    network: Named
    """The own spec, or timm's network."""
    zoo: str
    """``own`` or ``timm``: whose code builds it."""
    image_size: int
    """Side of the images that they were last trained at or are meant for, pixels."""
    num_classes: int
    """Outputs of the classifier; 0: none."""
    results: tuple[PublishedAccuracy, ...]
    """Published figures; of timm's at least one."""
    licence: str
    """As timm's model card states it; ``unknown`` where it does not."""
    extra_data: str
    """Images beside ImageNet-1k's that they were trained on; empty: none."""
    attention: bool
    """Whether it is no ConvNet."""

    @property
    def recipe(self) -> str:
        """The part of the name after the dot."""
        return self.name.partition(".")[2]

    @property
    def may_be_sold(self) -> bool:
        """Whether a licence is known that does not forbid commercial use."""
        return self.licence not in NOT_COMMERCIAL and "-nc" not in self.licence


@dataclass(frozen=True, kw_only=True)
class Filter:
    """What a user may and will take; the default is every ConvNet."""

    zoo: str = "all"
    """``own``, ``timm``, or ``all``: both, an architecture that both have once, as the own code builds it."""
    licences: Sequence[str] | None = None
    """Only weights under one of these, or under this one; None: any."""
    commercial: bool = False
    """Leave out weights whose licence forbids commercial use or is not known."""
    extra_data: bool = True
    """Take weights that saw more than ImageNet-1k, too."""
    attention: bool = False
    """Take networks with attention, too; the predictor was fitted on ConvNets."""

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: an unknown zoo or licence, a flag that is none, or timm's zoo without timm.
        """
        if isinstance(self.licences, str):
            object.__setattr__(self, "licences", (self.licences,))
        elif self.licences is not None:
            object.__setattr__(self, "licences", tuple(self.licences) or None)
        if self.zoo not in ZOOS:
            raise UserError(f"zoo {self.zoo!r} is unknown (known: {', '.join(ZOOS)})")
        for name in ("commercial", "extra_data", "attention"):
            check_flag(name, getattr(self, name))
        for licence in self.licences or ():
            if licence not in known_licences():
                raise UserError(f"licence {licence!r} is unknown (known: {', '.join(known_licences())})")
        if self.zoo == "timm":
            need_timm("zoo timm")

    def lets_through(self, weights: Weights, *, named: bool = False) -> bool:
        """Whether a user would take these weights.

        Args:
            weights: what is looked at.
            named: they were asked for by their very name, so that attention needs no option of its own.
        """
        return (
            (self.zoo in ("all", weights.zoo))
            and (self.licences is None or weights.licence in self.licences)
            and (not self.commercial or weights.may_be_sold)
            and (self.extra_data or not weights.extra_data)
            and (self.attention or named or not weights.attention)
        )

    def in_words(self) -> str:
        """The options that leave something out; empty: none."""
        said = [
            f"--zoo {self.zoo}" if self.zoo != "all" else "",
            *(f"--licence {licence}" for licence in self.licences or ()),
            "--commercial" if self.commercial else "",
            "" if self.extra_data else "--no-extra-data",
        ]
        return " ".join(word for word in said if word)


@cache
def known_licences() -> tuple[str, ...]:
    """Every licence that some weights are under."""
    own = (tag.license for tag in all_tags().values())
    return tuple(sorted({*own, *(each.licence for each in released().values())}))


@cache
def _own() -> dict[str, Weights]:
    return {name: _of_tag(tag) for name, tag in all_tags().items()}


def _of_tag(tag: WeightsTag) -> Weights:
    return Weights(
        name=tag.name,
        arch=tag.arch,
        network=ARCHITECTURES[tag.arch],
        zoo="own",
        image_size=tag.image_size,
        num_classes=tag.num_classes,
        results=tag.results,
        licence=tag.license,
        extra_data=extra_data(tag.name),
        attention=False,
    )


@cache
def _timms() -> dict[str, Weights]:
    """Those of the table that the installed timm builds."""
    return {
        each.name: Weights(
            name=each.name,
            arch=each.arch,
            network=each.network,
            zoo="timm",
            image_size=each.image_size,
            num_classes=1000,
            results=each.results,
            licence=each.licence,
            extra_data=each.extra_data,
            attention=each.attention,
        )
        for each in released().values()
        if each.arch in buildable()
    }


def in_zoo(zoo: str) -> dict[str, Weights]:
    """All weights of a zoo by their name; of ``all`` an architecture that both have comes from the own code."""
    if zoo == "own":
        return _own()
    if zoo == "timm":
        return _timms()
    return {**_own(), **{name: each for name, each in _timms().items() if each.arch not in ARCHITECTURES}}


def offered(wanted: Filter | None = None, patterns: Collection[str] = ("*",)) -> list[Weights]:
    """Released weights that a filter lets through, own ones first, then timm's by their best figure.

    Args:
        wanted: what a user may and will take; None: every ConvNet.
        patterns: shell patterns or names of weights or architectures; ``timm/`` before one means timm's own code.

    Raises:
        UserError: a pattern matches nothing (the nearest are named), or nothing that the filter lets through.
    """
    wanted = wanted or Filter()
    found: dict[tuple[str, str], Weights] = {}
    for pattern in patterns:
        for each in matching(pattern, wanted):
            found.setdefault((each.zoo, each.name), each)
    return list(found.values())


def matching(pattern: str, wanted: Filter) -> list[Weights]:
    """Weights that one pattern or name means, of those that the filter lets through; empty: no weights have such a
    name.

    Raises:
        UserError: some have, but the filter lets none of them through; or timm, which builds them, is not installed.
    """
    forced = timm_name(pattern)
    if forced is not None:
        need_timm(pattern)
    text = pattern if forced is None else forced
    among = in_zoo(wanted.zoo if forced is None else "timm")
    matched = [
        each for name, each in among.items() if name == text or fnmatchcase(name, text) or fnmatchcase(each.arch, text)
    ]
    kept = [each for each in matched if wanted.lets_through(each, named=text in (each.name, each.arch))]
    if matched and not kept:
        attention = all(each.attention for each in matched)
        why = (
            "have attention: --attention takes them"
            if attention and not wanted.in_words()
            else f"are left out by {wanted.in_words() or 'the filter'}"
        )
        raise UserError(f"{len(matched)} weights match {pattern!r}, but all {why}")
    if not matched and not timm_is_installed():
        _need_timm_for(text)
    return kept


def _need_timm_for(pattern: str) -> None:
    """
    Raises:
        UserError: the pattern matches weights of timm's, which is not installed.
    """
    names = [each.name for each in released().values()]
    if any(fnmatchcase(name, pattern) or fnmatchcase(name.partition(".")[0], pattern) for name in names):
        need_timm(pattern)


def weights_in(zoo: str, pattern: str) -> list[Weights]:
    """All weights of a zoo whose name or architecture a shell pattern matches, by their names.

    Raises:
        UserError: an unknown zoo, or timm's without timm.
    """
    among = in_zoo(Filter(zoo=zoo).zoo)
    return sorted(
        (each for each in among.values() if fnmatchcase(each.name, pattern) or fnmatchcase(each.arch, pattern)),
        key=lambda each: each.name,
    )


def architectures_in(zoo: str, pattern: str) -> list[str]:
    """Architectures of a zoo that a shell pattern matches, by their names: own ones, and timm's that have released
    weights.

    Raises:
        UserError: an unknown zoo, or timm's without timm.
    """
    names = {each.arch for each in in_zoo(Filter(zoo=zoo).zoo).values()}
    names |= set(ARCHITECTURES) if zoo != "timm" else set()
    return sorted(name for name in names if fnmatchcase(name, pattern))


def nearest_of(name: str) -> str:
    """The end of a message on an unknown name: the nearest that are known."""
    return nearest(name, [*ARCHITECTURES, *_own(), *{each.arch for each in released().values()}, *released()])
