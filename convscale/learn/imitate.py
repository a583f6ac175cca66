"""Learning from a teacher: what it adds to the loss, and its outputs kept on the disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from convscale.errors import UserError, first_line
from convscale.files import atomic_path, check_above, write_json
from convscale.images.splits import FileSplit, Split
from convscale.learn.loss import distillation_loss, similarity_loss
from convscale.learn.recipe import Recipe
from convscale.learn.teacher import check_teacher
from convscale.read import NO_NPY

if TYPE_CHECKING:
    from convscale.images.preprocess import Preprocessing

Ask = Callable[[torch.Tensor], torch.Tensor]
"""The teacher's outputs of a batch of inputs."""
_ABOUT = "about.json"
"""What a cache's rows depend on, beside them."""
_SEEN = (
    *("augment", "flip", "shift", "cutout", "crop_scale", "scaled_decode", "scaled_share", "shrink", "policy"),
    *("policy_ops", "policy_magnitude", "erase", "progressive", "image_size", "epochs"),
)
"""Keys of a recipe that decide what a teacher sees of an image."""


@dataclass(frozen=True, kw_only=True)
class Where:
    """A batch's place in a run."""

    epoch: int
    """From 0."""
    indices: torch.Tensor
    """int64 (N,), of the train set."""


class Imitation:
    """What a teacher adds to a student's loss.

    Args:
        net: the student, as it is before processes share it.
        teacher: without gradients, in evaluation mode.
        recipe: how much of what.
        multilabel: several labels per image.
        autocast: gives the context that the teacher is asked in.
        cache: the teacher's outputs on the disk; None: it is asked each time.
    """

    def __init__(
        self,
        net: nn.Module,
        teacher: nn.Module,
        recipe: Recipe,
        *,
        multilabel: bool,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        cache: TeacherCache | None = None,
    ) -> None:
        self.teacher, self.recipe, self.multilabel, self.cache = teacher, recipe, multilabel, cache
        self._autocast = autocast
        self._ours = self._theirs = None
        if recipe.distill_features:
            heads = _head_of(net, "the student"), _head_of(teacher, "the teacher")  # one may have none
            self._ours, self._theirs = (_Features(head) for head in heads)

    def check(self, classes: int, student: Preprocessing, device: torch.device) -> None:
        """See that the teacher can be asked as it will be; UserError if not."""
        with self._autocast():
            check_teacher(self.teacher, classes, student, device)

    def added(self, loss: torch.Tensor, outputs: torch.Tensor, inputs: torch.Tensor, where: Where) -> torch.Tensor:
        """The loss with the teacher's say.

        Args:
            loss: of the labels.
            outputs: the student's, float32 (N, classes), from a forward that has just been.
            inputs: what it saw.
            where: the batch.
        """
        recipe = self.recipe

        def ask(some: torch.Tensor) -> torch.Tensor:
            with torch.no_grad(), self._autocast():
                return self.teacher(some).float()

        taught = ask(inputs) if self.cache is None else self.cache.outputs(ask, inputs, where)
        said = distillation_loss(outputs, taught, temperature=recipe.distill_temperature, multilabel=self.multilabel)
        if recipe.distill_kl:
            loss = loss + recipe.distill_kl * said
        else:
            loss = (1 - recipe.distill_weight) * loss + recipe.distill_weight * said
        if self._ours is not None and self._theirs is not None:
            loss = loss + recipe.distill_features * similarity_loss(self._ours.last(), self._theirs.last().detach())
        return loss

    def close(self) -> None:
        """Leave the networks as they were."""
        for watched in (self._ours, self._theirs):
            if watched is not None:
                watched.handle.remove()


class _Features:
    """What a network's classifier saw last."""

    def __init__(self, head: nn.Module) -> None:
        self._seen: torch.Tensor | None = None
        self.handle: RemovableHandle = head.register_forward_pre_hook(self._look)

    def _look(self, _: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        self._seen = given[0]

    def last(self) -> torch.Tensor:
        """Float32 (N, C)."""
        assert self._seen is not None, "the network has run"
        seen, self._seen = self._seen, None
        return (seen.mean((2, 3)) if seen.ndim == 4 else seen.flatten(1)).float()


def _head_of(net: nn.Module, who: str) -> nn.Module:
    """A network's classifier; UserError if it has none."""
    inner = getattr(net, "net", net)  # a teacher stands behind its own preprocessing
    named = getattr(inner, "get_classifier", None)
    head = named() if callable(named) else None
    if not isinstance(head, nn.Module):
        layers = [module for module in inner.modules() if isinstance(module, nn.Linear)]
        head = layers[-1] if layers else None
    if head is None:
        raise UserError(
            f"distill_features needs a network with a linear classifier; {who}, {type(inner).__name__}, has none"
        )
    return head


_CHUNK = 2**20
"""Numbers that are written at once."""


class TeacherCache:
    """A teacher's outputs on the disk, one row for each image and epoch: its crop is drawn by these and the seed alone,
    so another student with the same teacher, data, augmentation and seed finds them there.

    Args:
        folder: of all caches; this one gets a folder by its key.
        key: what the rows depend on.
        rows: images of the train set.
    """

    def __init__(self, folder: Path, key: dict[str, object], rows: int) -> None:
        text = json.dumps(key, sort_keys=True)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:24]
        self.rows, self.found, self.asked = rows, 0, 0
        self._key = key
        self._open: tuple[int, np.memmap] | None = None

    def check(self) -> None:
        """See that it can be made, and touch nothing: the first batch makes it.

        Raises:
            UserError: it can not be written.
        """
        check_above(self.folder / _ABOUT, "teacher_cache")

    def _make(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / _ABOUT).is_file():
                write_json(self.folder / _ABOUT, self._key)
        except OSError as error:
            where = self.folder.parent
            raise UserError(f"teacher_cache {where} can not be written: {error.strerror}; name another") from error

    def outputs(self, ask: Ask, inputs: torch.Tensor, where: Where) -> torch.Tensor:
        """The teacher's outputs of a batch, from the disk where all are there; else asked, and put there."""
        rows = where.indices.cpu().numpy()
        kept = self._read(where.epoch)
        if kept is not None:
            known = np.array(kept[rows])
            if np.isfinite(known).all():  # a row that was cut short in writing is not
                self.found += len(rows)
                return torch.from_numpy(known).to(inputs.device)
        taught = ask(inputs)
        self.asked += len(rows)
        table = self._new_table(where.epoch, taught.shape[1]) if kept is None else kept
        table[rows] = taught.cpu().numpy()
        return taught

    def _path(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch + 1:05}.npy"

    def _read(self, epoch: int) -> np.memmap | None:
        if self._open is not None and self._open[0] == epoch:
            return self._open[1]
        if not self._path(epoch).is_file():
            return None
        try:
            table = np.load(self._path(epoch), mmap_mode="r+", allow_pickle=False)
        except NO_NPY as error:
            raise UserError(f"teacher_cache {self._path(epoch)} is damaged: {first_line(error)}; remove it") from error
        if not isinstance(table, np.memmap) or table.ndim != 2 or len(table) != self.rows or table.dtype != np.float32:
            raise UserError(
                f"teacher_cache {self._path(epoch)} is damaged: it is no table of {self.rows} rows; remove it"
            )
        self._open = (epoch, table)
        return table

    def _new_table(self, epoch: int, classes: int) -> np.memmap:
        """The table of an epoch, with no row in it. It is written before it is mapped: a disk that is full is an error
        of a write, and ends the process by a signal where a page without a place on it is touched.
        """
        self._make()
        empty = np.full((max(1, _CHUNK // classes), classes), np.nan, np.float32)
        header = {**np.lib.format.header_data_from_array_1_0(empty), "shape": (self.rows, classes)}
        with atomic_path(self._path(epoch)) as place, open(place, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for begin in range(0, self.rows, len(empty)):
                file.write(empty[: self.rows - begin].tobytes())
        made = self._read(epoch)
        assert made is not None, "it has just been written"
        return made


def cache_key(
    teacher: nn.Module, split: Split, preprocessing: Preprocessing, recipe: Recipe, seed: int
) -> dict[str, object]:
    """What a teacher's outputs of augmented images depend on.

    Raises:
        UserError: images are mixed with others, so that no image has outputs of its own.
    """
    if recipe.mixup or recipe.cutmix:
        raise UserError("teacher_cache keeps outputs image by image; set mixup and cutmix to 0, or leave it out")
    weights = hashlib.sha256()
    for name, value in teacher.state_dict().items():
        weights.update(name.encode())
        weights.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {
        "teacher": weights.hexdigest(),
        "data": _fingerprint(split),
        "preprocessing": preprocessing.to_dict(),
        "recipe": {name: recipe.to_dict()[name] for name in _SEEN},
        "seed": seed,
    }


def _fingerprint(split: Split) -> str:
    """Of a split's images and their order."""
    digest = hashlib.sha256()
    if split.images is not None:
        digest.update(split.images.contiguous().numpy().tobytes())
    elif isinstance(split, FileSplit):
        for path in split.paths:
            about = Path(path).stat()
            digest.update(f"{path}\0{about.st_size}\0{about.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
