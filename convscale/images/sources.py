"""Where labelled images come from: folders, idx files, a manifest, torchvision's data sets.

``open_dataset`` looks at what it is given and decides. Class names belong to the train set; no other split ever
re-makes the indices.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from convscale.errors import UserError, check_number
from convscale.images.decode import MAX_PIXELS, ImageError, check_image, largest_value, preload
from convscale.images.digest import Carved, is_digest_of, same_digests
from convscale.images.duplicates import IN_TWO_SPLITS, WITH_TWO_LABELS, equal_files
from convscale.images.folders import open_folders, open_for_evaluation, read_tree
from convscale.images.idx import find_idx, open_idx
from convscale.images.labelled import LABELLED, find_labelled, open_labelled
from convscale.images.manifest import open_manifest
from convscale.images.splits import SPLITS, DataSplits, FileSplit, Split, complete
from convscale.images.threads import in_threads
from convscale.images.torchvision_sets import find_torchvision, open_torchvision
from convscale.images.walk import Tally

_CARVED = 0.1
"""Share of train that is carved for a set that is missing, where nothing else is asked for."""
_LOOKED_AT = 8
"""Files of 16 bits that are decoded for the largest value in them."""


def open_dataset(
    data_dir: str | os.PathLike[str],
    *,
    dataset: str | None = None,
    channels: int | None = None,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    validation_fraction: float = _CARVED,
    test_fraction: float = _CARVED,
    max_bad_rate: float = 0.01,
    max_pixels: int = MAX_PIXELS,
    compare: bool = True,
    listing: bool = False,
) -> DataSplits:
    """Labelled images as train, validation and test set.

    Args:
        data_dir: a folder with ``train/`` and, beside it, ``val/`` and ``test/`` (or synonyms, in any case), each with
            one folder per class; a folder of class folders; a folder with idx files; a manifest (``.csv``, ``.jsonl``,
            ``.json``); or the root of one of torchvision's data sets.
        dataset: torchvision's name of the set in ``data_dir`` (``cifar10``), or ``coco``, ``voc``, ``nus-wide`` or
            ``open-images`` for a set with several labels per image as its makers pack it; None: recognised by its
            files.
        channels: 1 (gray) or 3 (RGB); None: 1 for idx files, else 3.
        classes: a manifest's class list; None: what its train set has.
        seed: of what is carved from train.
        validation_fraction: share of train that is carved when there is no validation set.
        test_fraction: share of train that is carved when there is no test set.
        max_bad_rate: share of a split's files (but at least one file) that may have an unreadable header; these are
            left out and counted in the notes.
        max_pixels: larger pictures count as unreadable.
        compare: look for files with equal contents in two splits or with two labels, and say so in the notes (at most
            20,000 files of equal size are read).
        listing: open for a look alone: any number of files may be unreadable, even all of a class or a split, and what
            then can not be carved is empty.

    Raises:
        UserError: one line: a missing or empty folder, one class, class folders that differ between splits, too many
            unreadable images ...
    """
    place = Path(data_dir)
    check_number("max_bad_rate", max_bad_rate, "a share from 0 to 1", 0, 1)
    if channels not in (None, 1, 3):
        raise UserError(f"channels must be 1 (gray) or 3 (RGB), got {channels!r}")
    if not place.exists():
        raise UserError(f"data folder {place} does not exist")
    notes, tally = list[str](), Tally()
    layout = dataset if dataset in LABELLED else None
    if dataset is None and place.is_dir():
        layout = find_labelled(place)
    name = dataset or (find_torchvision(place) if place.is_dir() else None)
    if layout is not None and place.is_dir():
        train, validation, test = open_labelled(
            layout, place, channels=channels or 3, max_pixels=max_pixels, notes=notes
        )
    elif place.is_file():
        if place.suffix.lower() not in (".csv", ".jsonl", ".json"):
            raise UserError(f"{place} is a file; name a folder, or a manifest ending in .csv, .jsonl or .json")
        train, validation, test = open_manifest(
            place, channels=channels or 3, max_pixels=max_pixels, classes=classes, tally=tally, notes=notes
        )
    elif name is not None:
        train, validation, test = open_torchvision(name, place, channels=channels or 3, max_pixels=max_pixels)
    elif (idx_folder := find_idx(place)) is not None:
        (train, test), validation = open_idx(idx_folder, channels=channels), None
    else:
        train, validation, test = open_folders(place, channels=channels or 3, max_pixels=max_pixels, tally=tally)
    if classes is not None and not place.is_file():
        raise UserError(
            f"classes are for a manifest; {place} has its own: "
            f"{', '.join(train.classes[:5])}{' ...' if len(train.classes) > 5 else ''}"
        )
    if len(train.classes) < 2:
        only = f" ({train.classes[0]!r})" if train.classes else ""
        raise UserError(
            f"{place}: only {len(train.classes)} class{only}; a classifier needs at least 2, one folder each"
        )
    preflight = tally.report()
    notes += preflight.notes()
    unreadable = list[str]()
    most = None if listing else max_bad_rate
    checked = [_drop_unreadable(split, most, notes, unreadable) for split in (train, validation, test)]
    whole = checked[0]
    assert whole is not None
    if listing and unreadable and not _can_be_carved(whole, checked.count(None)):
        checked = [
            whole.subset([], name) if split is None else split for split, name in zip(checked, SPLITS, strict=True)
        ]
    made = complete(
        whole,
        checked[1],
        checked[2],
        seed=seed,
        validation_fraction=validation_fraction,
        test_fraction=test_fraction,
        notes=notes,
        preflight=preflight,
    )
    copies = _copies(made) if compare else []
    return replace(
        made,
        notes=(*made.notes, *copies),
        unreadable=tuple(unreadable),
        max_bad_rate=max_bad_rate,
        origin=place,
    )


@dataclass(frozen=True, kw_only=True)
class ToEvaluate:
    """Pictures to evaluate a network on."""

    split: Split
    """With the network's classes."""
    train_labels: torch.Tensor | None
    """The train set's, for the most frequent class; None where the data has none."""
    notes: tuple[str, ...]
    """What a user should know."""


def open_evaluation(
    data_dir: str | os.PathLike[str],
    *,
    classes: Sequence[str],
    split: str | None = None,
    dataset: str | None = None,
    channels: int = 3,
    max_bad_rate: float = 0.01,
    max_pixels: int = MAX_PIXELS,
    trained_on: Mapping[str, object] | None = None,
) -> ToEvaluate:
    """The pictures of one split, or all: as ``open_dataset`` has them, and from folders that no training could use.

    A folder of splits needs only the one that is asked for. A folder of classes whose own name is ``test`` is a test
    set. Any other folder of classes is what a network may have been trained on, so its test set is what training carves
    from it; where nothing can be carved, or classes are missing, it was not trained on, and all its images are taken.
    What ``trained_on`` says goes before a name: a folder called ``test`` that was trained on is carved, too.

    Args:
        data_dir: as for ``open_dataset``.
        classes: those of the network, in its order.
        split: ``train``, ``validation``, ``test`` or ``all``; None: the test set, or the one split there is.
        dataset: torchvision's name of the set in ``data_dir``.
        channels: 1 (gray) or 3 (RGB).
        max_bad_rate: share of the files (but at least one) that may have an unreadable header.
        max_pixels: larger pictures count as unreadable.
        trained_on: what the network was trained on, as ``DataSplits.digests`` said; None: not known.

    Raises:
        UserError: one line.
    """
    place, tally, notes = Path(data_dir), Tally(), list[str]()
    check_number("max_bad_rate", max_bad_rate, "a share from 0 to 1", 0, 1)
    known = find_torchvision(place) or find_idx(place) or find_labelled(place) if place.is_dir() else None
    if place.is_dir() and dataset is None and known is None:
        look = partial(
            open_for_evaluation, place, classes=classes, channels=channels, max_pixels=max_pixels, tally=tally
        )
        found, flat = look(split), not read_tree(place).folders
        by_name = found is not None and flat and split != "all"
        if found is None and flat:
            everything = look("all")
            counts = [0] if everything is None else everything[0].class_counts().tolist()
            if min(counts) == 0 or max(counts) < 3:
                found = everything
                notes.append(
                    "all images are taken: with classes missing, or images too few to be split, it is not what the "
                    "network was trained on"
                )
        if found is not None:
            notes += tally.report().notes()
            chosen = _drop_unreadable(found[0], max_bad_rate, notes, [])
            assert chosen is not None
            if by_name:
                advice = "if the network was trained on some of them, give the folder another name"
                notes.append(f"all images are taken: {place} is a {chosen.split} set by its name; {advice}")
            if not by_name or not _was_carved(chosen, trained_on):
                return ToEvaluate(split=chosen, train_labels=found[1], notes=tuple(notes))
    splits = open_dataset(
        data_dir, dataset=dataset, channels=channels, max_bad_rate=max_bad_rate, max_pixels=max_pixels, compare=False
    )
    if splits.classes != tuple(classes):
        raise UserError(
            f"the data's classes {list(splits.classes)} are not the checkpoint's {list(classes)}, in this order"
        )
    chosen = splits.whole() if split == "all" else getattr(splits, split or "test")
    notes = [*splits.notes, *not_as_trained(splits, trained_on, split or "test")]
    return ToEvaluate(split=chosen, train_labels=splits.train.labels, notes=tuple(notes))


def not_as_trained(
    splits: Carved, trained_on: Mapping[str, object] | None, split: str, digest: object = None
) -> list[str]:
    """A note where a split was carved from other images than a network was trained on, and so may hold some of those.

    Args:
        splits: as they are carved now.
        trained_on: what ``digests`` said at the training; None: not known.
        split: the one that is looked at.
        digest: where that is not known, the one of the train and validation sets together; None: that is not, either.
    """
    if not splits.carved or split not in (*splits.carved, "train"):
        return []
    if trained_on:
        if trained_on.get("carved") != list(splits.carved):
            return []
        same = same_digests(trained_on, splits, ("train", *splits.carved))
    else:
        same = digest is None or is_digest_of(digest, (splits.train, splits.validation))
    if same:
        return []
    return [
        "this is not the data that the network was trained on: images or labels have come, gone or changed, so another "
        f"{split} set is carved, and the network may have been trained on some of it; give the data as it was, or "
        "images of their own (a folder test/)"
    ]


def _was_carved(whole: Split, trained_on: Mapping[str, object] | None) -> bool:
    """Whether a network was trained on a part of just these images, and the rest carved from them."""
    if not trained_on or trained_on.get("carved") != ["validation", "test"] or not isinstance(whole, FileSplit):
        return False
    try:
        train = replace(whole, split="train")
        made = complete(train, None, None, seed=0, validation_fraction=_CARVED, test_fraction=_CARVED)
    except UserError:  # too few: it was not
        return False
    return made.digests() == trained_on


def _copies(made: DataSplits) -> list[str]:
    """Notes on files with equal contents in two splits or with two labels."""
    splits = (made.train, made.validation, made.test)
    if not all(isinstance(split, FileSplit) for split in splits):
        return []
    across, labels = equal_files(splits)
    lines = (across.describe(IN_TWO_SPLITS), labels.describe(WITH_TWO_LABELS, labels=True))
    return [line for line in lines if line]


def _can_be_carved(train: Split, missing: int) -> bool:
    """Whether a train set has enough images for the splits that are missing."""
    counts = [len(train)] if train.multilabel else train.class_counts().tolist()
    return max(counts, default=0) > missing


def _drop_unreadable(
    split: Split | None, max_bad_rate: float | None, notes: list[str], unreadable: list[str]
) -> Split | None:
    """Leave out files whose header is unreadable, as long as they are few (None: however many); what is wrong goes to
    ``unreadable``.
    """
    if not isinstance(split, FileSplit):
        return split

    deep = list[str]()

    def problem(path: str) -> str | None:
        try:
            if check_image(path, max_pixels=split.max_pixels).depth > 8:
                deep.append(path)
        except ImageError as error:
            return str(error)
        return None

    preload()
    problems = list(in_threads(problem, split.paths))
    notes += _shallow(sorted(deep))
    bad = [text for text in problems if text is not None]
    unreadable += bad
    if not bad:
        return split
    if max_bad_rate is not None and len(bad) > max(1, max_bad_rate * len(split)):
        share = f"{len(bad)} of {len(split)} {split.split} images ({len(bad) / len(split):.1%})"
        raise UserError(f"{share} are unreadable, at most {max_bad_rate:.1%} (or one) are skipped; first: {bad[0]}")
    notes.append(f"{len(bad)} of {len(split)} {split.split} images are unreadable and left out; first: {bad[0]}")
    kept = split.subset([index for index, text in enumerate(problems) if text is None])
    gone = [
        name
        for name, before, after in zip(split.classes, split.class_counts(), kept.class_counts(), strict=True)
        if before > 0 and after == 0
    ]
    if gone and split.split == "train" and max_bad_rate is not None:
        raise UserError(f"no readable image is left of class(es) {_some(gone)}; first problem: {bad[0]}")
    if not len(kept) and max_bad_rate is not None:
        raise UserError(f"no readable image is left of the {split.split} set; first: {bad[0]}")
    return kept


def _shallow(paths: Sequence[str]) -> list[str]:
    """A note where files of 16 bits use 12 of them at most, by a few of them."""
    looked = [paths[at * len(paths) // min(len(paths), _LOOKED_AT)] for at in range(min(len(paths), _LOOKED_AT))]
    values = [value for path in looked if (value := largest_value(path)) is not None]
    if not values or max(values) >= 4096:
        return []
    return [
        f"{len(paths):,} images have 16 bits, of which those looked at use 12 at most (largest value {max(values)} of "
        f"65535; first: {looked[0]}): they are read as nearly black; scale them to the whole range first"
    ]


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
