"""What a user asks of ``fit``, as one value, checked before anything is read or written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TypeAlias, cast

import torch

from convscale.arch.spec import NetSpec
from convscale.arch.tags import all_tags, find_tag
from convscale.arch.zoo import ARCHITECTURES, list_models
from convscale.choice.basis import Asked, Basis, basis_of, check_device
from convscale.choice.candidates import Candidate, candidates_of, sized
from convscale.choice.facts import SizedSpec
from convscale.choice.rows import Rows, read_rows, rows_of
from convscale.conditions import BEST, Constraint
from convscale.errors import UserError, check_flag, check_path, check_text, check_whole
from convscale.files import sha256
from convscale.images.splits import DataSplits
from convscale.learn.graphs import check_compile
from convscale.learn.progress import Progress
from convscale.learn.settings import usable_device
from convscale.learn.trackers import need_tracker
from convscale.learn.usual import is_small, usual_recipe
from convscale.networks.foreign import Foreign
from convscale.networks.names import size_of
from convscale.networks.offered import Filter, matching
from convscale.networks.released import released
from convscale.networks.resolve import Network, find, is_module, name_of
from convscale.networks.weight_files import WeightFiles
from convscale.nn.state_dicts import read_state_dict
from convscale.pipeline.data_head import check_own
from convscale.pipeline.heads import candidates_with_head, named_with_head
from convscale.pipeline.ship import Shipping
from convscale.pipeline.size import default_size
from convscale.pipeline.training import Training
from convscale.predictor.devices import at_hand
from convscale.predictor.fitted import EIGHT_BITS, check_on_processor
from convscale.runtimes.base import need_runtime, runtime_of

BRIEF_EPOCHS = 1
"""Of the comparison of finalists, where a number was not asked for."""

Given: TypeAlias = "Network | Sequence[Network]"
"""Candidates as a user names them: one, or several."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """What networks start from.

    Raises:
        UserError: the weights folder or the file does not exist, or what is asked for excludes itself.
    """

    scratch: bool = False
    """Scaled members, trained from scratch, whatever the data are; else by the data, see ``from_scratch``."""
    weights_dir: Path | None = None
    """Folder whose files are named by tag or lie as in the hub's cache."""
    file: Path | None = None
    """Weights of the one candidate, whatever network it is."""

    def __post_init__(self) -> None:
        check_flag("scratch", self.scratch)
        if self.scratch and (self.weights_dir is not None or self.file is not None):
            raise UserError("scratch and weights exclude each other; leave one out")
        if self.file is not None:
            file = check_path("init", self.file)
            if not file.exists():
                raise UserError(f"init is {str(self.file)!r}; it must be 'pretrained' or a file of weights")
            object.__setattr__(self, "file", file)
        WeightFiles(folder=self.weights_dir)

    def files(self, named: Sequence[Network] | None) -> WeightFiles:
        """Where weights are looked for.

        Raises:
            UserError: a file of weights without the one candidate that it is of; a folder with files of weights
                that are named by no tag, or with none that are.
        """
        if self.file is None:
            files = WeightFiles(folder=self.weights_dir)
            files.check_folder((*all_tags(), *released()))
            return files
        if named is None or len(named) != 1:
            raise UserError(f"init is the file {self.file}; name the one network that it is of (--model)")
        return WeightFiles(folder=self.weights_dir, given={_weights_of(named[0]): self.file})


@dataclass(frozen=True, kw_only=True, eq=False)
class FitRequest:
    """``fit``'s arguments as one value.

    Raises:
        UserError: an argument is impossible; the message names it, the value and what would be right.
    """

    data: str | os.PathLike[str] | DataSplits
    """Splits, or where they are read from."""
    output: Path
    """The folder to make."""
    constraint: Constraint
    """What the shipped network must keep."""
    where: Asked
    """Under which conditions it must keep it."""
    shipping: Shipping
    """In which forms it may be shipped."""
    training: Training
    """How it is trained."""
    start: Start
    """What from."""
    candidates: Given | None = None
    """What to choose from; None: released weights, or scaled members of ``families_for`` from scratch."""
    image_size: int | None = None
    """Side in pixels; None: the candidates' own, or the data's from scratch, see ``size_for``."""
    offer: Filter = field(default_factory=Filter)
    """Which released weights a user may and will take."""
    measured: Path | None = None
    """Rows that were measured on the device, which is not here, as the script of a kit writes them."""
    max_bad_rate: float = 0.01
    """Share of the images that may be unreadable."""
    strict: bool = False
    """Where nothing keeps the constraint, refuse instead of training the fastest."""
    resume: bool = False
    """Go on in ``output``."""
    overwrite: bool = False
    """Replace ``output``."""
    progress: Progress | None = None
    """Called with every event."""
    track: str | None = None
    """The experiment tracker that is told of the run; None: none."""

    def __post_init__(self) -> None:
        if not isinstance(self.data, DataSplits):
            check_path("data_dir", self.data)
        object.__setattr__(self, "output", check_path("output", self.output))
        for name in ("strict", "resume", "overwrite"):
            check_flag(name, getattr(self, name))
        if self.progress is not None and not callable(self.progress):
            raise UserError(f"progress is {self.progress!r}; it must be a function that takes events")
        if self.track is not None:
            need_tracker(self.track)
        if self.image_size is not None:
            check_whole("image_size", self.image_size)
        if self.where.precision == "int8" and not self.shipping.int8:  # forms in 8 bits would choose, and none ship
            raise UserError("precision 'int8' is what int8=True (--int8) lets fit ship")
        if self.shipping.bf16 or self.where.precision == "bf16":
            self._check_bf16()
        if self.shipping.int8 and not self.here:
            if self.where.precision not in (None, "int8"):
                raise UserError(f"precision {self.where.precision!r} and int8 exclude each other; give one of them")
            object.__setattr__(self, "where", replace(self.where, precision="int8"))
        if self.measured is not None:
            self._take_rows(check_path("measured", self.measured))
        if self.here:
            self._check_runtime()
            usable_device(self.where.device)
        elif self.shipping.int8:
            self._check_int8_elsewhere()
        check_compile(self.training.asked_recipe, torch.device(self.training_device))

    def _check_bf16(self) -> None:
        """
        Raises:
            UserError: forms in bfloat16 would choose, and none ship; or they are of a processor that is not here.
        """
        device = self.where.device
        if not self.shipping.bf16 and device == "cpu":
            raise UserError("precision 'bf16' is what bf16=True (--bf16) lets fit ship")
        if self.shipping.bf16 and device != "cpu":
            raise UserError(
                f"bf16=True (--bf16) lets forms ship that this machine's processor computes in bfloat16, got device "
                f"{device!r}; leave it out"
            )

    def _check_int8_elsewhere(self) -> None:
        """
        Raises:
            UserError: 8 bits are not predicted on the device, or not in the runtime asked for.
        """
        check_on_processor("", "int8", check_device(self.where.device))
        runtime = self.where.runtime or "compiled"
        if runtime not in EIGHT_BITS:
            raise UserError(
                f"int8 on {self.where.device} is predicted in runtime {' or '.join(EIGHT_BITS)}, not in {runtime}; "
                "name one of them (--runtime), or leave int8 out"
            )

    def _check_runtime(self) -> None:
        """
        Raises:
            UserError: the runtime asked for does not run on the device, or is not installed, which is known before
                anything is trained.
        """
        name, device = self.shipping.runtime, self.where.device
        if name is None:
            return
        if not runtime_of(name).runs_on(device):
            known = " or ".join(runtime_of(name).devices)
            raise UserError(f"runtime {name} runs on device {known} here, got {device!r}; leave runtime out")
        need_runtime(name)

    def _take_rows(self, path: Path) -> None:
        """Their runtime is that of the choice where none was named.

        Raises:
            UserError: the file is missing or damaged, or the device is here.
        """
        if self.here:
            raise UserError(
                f"measured is of a device that is not here, got device {self.where.device!r}; fit measures here itself"
            )
        object.__setattr__(self, "measured", path)
        object.__setattr__(self, "where", read_rows(path, self.where)[1])

    @cached_property
    def rows(self) -> Rows | None:
        """What was measured on the device; None: nothing was.

        Raises:
            UserError: a row is of another device or other conditions.
        """
        if self.measured is None:
            return None
        return rows_of(read_rows(self.measured, self.where)[0], self.basis(), self.measured, self.named)

    @cached_property
    def named(self) -> tuple[Network, ...] | None:
        """The candidates that were named; None: none were.

        Raises:
            UserError: they are of another kind, none, or one name twice.
        """
        given = self.candidates
        if given is None:
            return None
        if isinstance(given, str | NetSpec | Foreign) or is_module(given):
            given = [given]
        if not isinstance(given, Iterable):
            raise UserError(f"candidates is {given!r}; it must be a network's name or spec, or a list of them")
        wanted = tuple(given)
        if not wanted:
            raise UserError("candidates is empty; name at least one network")
        names = [item if isinstance(item, str) else getattr(item, "name", str(id(item))) for item in wanted]
        if len(set(names)) < len(names):
            raise UserError(f"candidates repeat a name: {', '.join(map(str, names))}")
        return wanted

    @property
    def may_have_weights(self) -> bool:
        """Whether weights were released of anything that there is to choose from."""
        return self.named is None or any(isinstance(item, str) and matching(item, self.offer) for item in self.named)

    @property
    def here(self) -> bool:
        """Whether the device is this machine's own."""
        return at_hand(check_device(self.where.device))

    @property
    def training_device(self) -> str:
        """Where networks are trained: on the device, or on the best that is here."""
        if self.here:
            return self.where.device
        return "cuda" if torch.cuda.is_available() else "cpu"

    def basis(self) -> Basis:
        """On what basis candidates are compared.

        Raises:
            UserError: conditions that can be neither measured here nor predicted.
        """
        where = self.where
        if self.here:
            ship = self.shipping
            precision = "int8" if ship.int8 else "bf16" if ship.bf16 else where.precision or "fp32"
            basis = basis_of(replace(where, runtime=BEST, precision=precision))
            return replace(basis, within=ship.runtime, bf16=ship.bf16)
        return basis_of(replace(where, runtime=where.runtime or "compiled"))

    def from_scratch(self, splits: DataSplits) -> bool:
        """Whether all networks are trained from scratch: asked for, or the images are small, or specs alone are named;
        beside names with weights, a spec starts from scratch and the others do not. Small images that are enlarged, to
        a size asked for or that of weights that are named, are as others.
        """
        if self.start.scratch:
            return True
        if self.training.init is not None or self.start.file is not None or self.start.weights_dir is not None:
            return False
        if self.named is not None and all(not isinstance(item, str) for item in self.named):
            return True
        weights = self.named is not None and self.image_size is None and self.may_have_weights
        return not weights and is_small(splits, self.image_size)

    def check_networks(self, splits: DataSplits) -> None:
        """Find every network that was named, trace the user's own, and read the file of weights, before anything is
        written.

        Raises:
            UserError: an unknown name, a function that can not be found, an own network that can not be traced, a file
                that holds no weights, or no name has weights that somebody released.
        """
        if self.start.file is not None:
            read_state_dict(self.start.file)
        if self.named is None:
            return
        if not self.from_scratch(splits):
            sizes = None if self.image_size is None else (self.image_size,)
            found = candidates_with_head(candidates_of(self.named, sizes, offer=self.offer), self.training.head)
            if not any(each.licence for each in found):
                self._check_unreleased(found)
            networks = [SizedSpec(each.spec, each.image_size) for each in found if _is_own(each)]
        else:
            networks = self.networks
        for network in networks:
            check_own(network)

    def _check_unreleased(self, found: Sequence[Candidate]) -> None:
        """
        Raises:
            UserError: nobody released weights of any network that was named, and they were asked for; or by their names
                alone, which stand for released weights, with no word on what else to start from.
        """
        names = ", ".join(dict.fromkeys(each.name for each in found))
        some = "or name a network that has some (convscale list --pretrained)"
        if start := self._weights_asked_for:
            raise UserError(
                f"nobody released weights of {names}, and {start} asks for some; leave that out to start from scratch, "
                f"{some}"
            )
        told = self.start.file is not None or self.resume  # earlier versions took it
        if not told and all(isinstance(item, str) for item in self.named or ()) and not any(map(_is_own, found)):
            raise UserError(
                f"nobody released weights of {names}; scratch=True (--scratch) trains from scratch, init=FILE (--init "
                f"FILE) starts from a file of weights, {some}"
            )

    @property
    def _weights_asked_for(self) -> str:
        """By what released weights were asked for, the file of one candidate aside; empty: they are the default."""
        if self.start.weights_dir is not None:
            return f"weights_dir {self.start.weights_dir}"
        return "init 'pretrained'" if self.training.init else ""

    @cached_property
    def networks(self) -> tuple[SizedSpec, ...]:
        """The networks that were named, patterns spelt out, at the size asked for or their own.

        Raises:
            UserError: an unknown name, one that two networks have, or a size that a network does not take.
        """
        found: dict[str, SizedSpec] = {}
        for item in self.named or ():
            for one in self._spelt_out(item):
                if is_module(one):
                    network = Foreign(name_of(one), "module", one)
                else:  # what is no text is told there
                    network = one if isinstance(one, NetSpec | Foreign) else find(cast(str, one))
                if isinstance(network, NetSpec):
                    network = sized(network, self.image_size)
                network = named_with_head(network, self.training.head)
                made = SizedSpec(network, self.image_size or size_of(network))
                if found.setdefault(network.name, made) != made:
                    raise UserError(f"two networks that differ are named {network.name}; give one of them another name")
        return tuple(found.values())

    def _spelt_out(self, item: Network) -> Sequence[Network]:
        """What a pattern means: own architectures, else those that released weights which it matches are of."""
        if not isinstance(item, str) or find_tag(item):
            return [item]
        if own := list_models(item):
            return own
        patterned = any(sign in item for sign in "*?[")
        return list(dict.fromkeys(each.network for each in matching(item, self.offer) if patterned)) or [item]

    def size_for(self, splits: DataSplits) -> int:
        """The side in pixels that members are scaled for."""
        return self.image_size or default_size(splits)

    def recipe_for(self, splits: DataSplits, *, pretrained: bool, image_size: int | None = None) -> str:
        """The recipe's name: ``finetune`` from released weights, else ``small`` for small images at a small size (None:
        the one asked for), else ``pictures``.
        """
        if self.training.recipe is not None:
            return self.training.recipe
        return usual_recipe(splits, image_size or self.image_size, weights=pretrained)

    def to_json(self, splits: DataSplits) -> dict[str, object]:
        """What a run is known by: only an equal one is resumed."""
        training = self.training
        scratch = self.from_scratch(splits)
        named = None if self.named is None else [_plain(item) for item in self.named]
        return {
            "data": str(self.data) if not isinstance(self.data, DataSplits) else "given splits",
            "constraint": vars(self.constraint),
            "conditions": self.basis().conditions.to_dict(),
            "shipping": self.shipping.to_json(),
            "candidates": named,
            "image_size": self.image_size,
            "offer": self.offer.in_words(),
            "start": {
                "scratch": scratch,
                "weights_dir": None if self.start.weights_dir is None else str(self.start.weights_dir),
                "file": None if self.start.file is None else str(self.start.file),
            },
            "recipe": self.recipe_for(splits, pretrained=not scratch),
            "overrides": training.overrides,
            "epochs": training.checked_epochs(self.recipe_for(splits, pretrained=not scratch)),
            "brief_epochs": training.brief_epochs or BRIEF_EPOCHS,
            "seed": training.seed,
            "strict": self.strict,
            **({} if self.measured is None else {"measured": sha256(self.measured)}),
        }


def _weights_of(network: Network) -> str:
    """The name that a candidate has with the released weights that its name means, an architecture's first; a network
    that nobody released any of goes by its own.
    """
    if is_module(network):
        return name_of(network)
    if isinstance(network, NetSpec | Foreign):
        return network.name
    name = check_text("candidate", network)
    found = matching(name, Filter(attention=True))
    return found[0].name if found else find(name).name


def _is_own(candidate: Candidate) -> bool:
    """Whether a candidate is the user's own network, not one that the zoo or timm has by its name."""
    spec = candidate.spec
    return spec.origin != "timm" if isinstance(spec, Foreign) else spec.name not in ARCHITECTURES


def _plain(item: Network) -> object:
    """A candidate in JSON values."""
    return item.to_dict() if isinstance(item, NetSpec) else item if isinstance(item, str) else repr(item)
