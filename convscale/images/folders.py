"""Pictures in folders, one for each class, with or without folders for the splits above them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from convscale import words
from convscale.errors import UserError
from convscale.images.decode import EXTENSIONS
from convscale.images.splits import SPLITS, FileSplit, split_of
from convscale.images.walk import LOOSE, NO_SPLIT, Folder, Listed, Tally, identity, list_folder, pictures_below


@dataclass(frozen=True, kw_only=True)
class Tree:
    """A folder of labelled pictures, by the names of what stands in it; no picture was looked at."""

    place: Path
    """The folder."""
    folders: Mapping[str, str]
    """``train``, ``validation`` or ``test`` -> its folder's name as it is written; empty where the classes stand on
    top."""
    others: tuple[str, ...]
    """Folders beside those of the splits."""

    def path(self, split: str) -> Path:
        """Of a split's folder."""
        return self.place / self.folders[split]

    def scan(self, split: str | None, tally: Tally) -> dict[str, list[str]]:
        """Class name -> pictures of a split; None: of a folder without splits."""
        if split is None:
            return scan_classes(self.place, tally)
        apart = [self.place, *(self.path(each) for each in self.folders)]
        return scan_classes(self.path(split), tally, apart)


def read_tree(place: Path) -> Tree:
    """Which splits a folder has, by the names of its folders in any case and by their synonyms (``Training``, ``dev``,
    ``eval`` ...).

    A class may be called ``train``, too: where other folders stand beside it and none of those named like splits holds
    folders, all of them are classes.

    Raises:
        UserError: two folders are the same split.
    """
    names = list_folder(str(place), Tally()).folders
    found: dict[str, str] = {}
    others = [name for name in names if split_of(name) is None]
    named = [name for name in names if split_of(name) is not None]
    if others and not any(list_folder(str(place / name), Tally()).folders for name in named):
        named = []
    for name in named:
        split = split_of(name)
        assert split is not None
        if split in found:
            raise UserError(f"{place}: both {found[split]}/ and {name}/ are there; keep one")
        found[split] = name
    return Tree(place=place, folders=found, others=tuple(others) if found else ())


def open_folders(
    place: Path, *, channels: int, max_pixels: int, tally: Tally
) -> tuple[FileSplit, FileSplit | None, FileSplit | None]:
    """Train, validation and test set of a folder; the last two None where there is no folder of theirs.

    Raises:
        UserError: splits without ``train``, classes that differ between them, an empty class ...
    """
    tree = read_tree(place)
    if not tree.folders:
        found = tree.scan(None, tally)
        return file_split("train", found, tuple(sorted(found)), channels, max_pixels, place), None, None
    if "train" not in tree.folders:
        raise UserError(f"{place}: there is {next(iter(tree.folders.values()))}/ but no train/ beside it")
    for name in tree.others:
        tally.add(NO_SPLIT, str(place / name))
    train = tree.scan("train", tally)
    classes = tuple(sorted(train))
    made = {"train": file_split("train", train, classes, channels, max_pixels, tree.path("train"))}
    for split in ("validation", "test"):
        if split in tree.folders:
            found = tree.scan(split, tally)
            _check_same(tree, split, train, found)
            made[split] = file_split(split, found, classes, channels, max_pixels, tree.path(split))
    return made["train"], made.get("validation"), made.get("test")


def open_for_evaluation(
    place: Path, split: str | None, *, classes: Sequence[str], channels: int, max_pixels: int, tally: Tally
) -> tuple[FileSplit, torch.Tensor | None] | None:
    """The pictures that a folder has for an evaluation without carving: a split's own folder, or all there are.

    Args:
        place: a folder of class folders, with or without splits.
        split: ``train``, ``validation``, ``test`` or ``all``; None: the test set, or the one split there is.
        classes: those of the network; the folder may lack some.
        channels: 3 or 1.
        max_pixels: cap on a picture's size.
        tally: counts what is left out.

    Returns:
        The pictures, and the train set's labels where there is a train set; None where what is asked for has no folder
        of its own.

    Raises:
        UserError: a class folder that the network does not know.
    """
    tree = read_tree(place)
    wanted = split or "test"
    if split is None and "test" not in tree.folders and len(tree.folders) == 1 and "train" not in tree.folders:
        (wanted,) = tree.folders

    def made(name: str | None) -> FileSplit:
        found = tree.scan(name, tally)
        where = place if name is None else tree.path(name)
        if unknown := sorted(set(found) - set(classes)):
            raise UserError(
                f"{where}: class folder(s) {_some(unknown)} are not among the checkpoint's {len(classes)} classes: "
                f"{_some(classes)}"
            )
        return file_split(name or wanted, found, tuple(classes), channels, max_pixels, where, may_lack=True)

    if not tree.folders:
        if wanted != "all" and not _is_one_split(place, wanted):
            return None
        return made(None), None
    if wanted != "all" and wanted not in tree.folders:
        return None
    for name in tree.others:
        tally.add(NO_SPLIT, str(place / name))
    parts = {name: made(name) for name in SPLITS if name in tree.folders and wanted in ("all", name)}
    if "train" in tree.folders and "train" not in parts:
        train_labels = made("train").labels
    else:
        train_labels = parts["train"].labels if "train" in parts else None
    whole = FileSplit(
        split=wanted,
        classes=tuple(classes),
        labels=torch.cat([part.labels for part in parts.values()]),
        channels=channels,
        paths=tuple(path for part in parts.values() for path in part.paths),
        max_pixels=max_pixels,
    )
    return whole, train_labels


def _is_one_split(place: Path, wanted: str) -> bool:
    """Whether a folder of class folders is, by its own name, one split: ``test``, or ``val`` beside other splits.

    One called ``train`` is not taken so: a network may have been trained on it, and its test set carved from it.

    Raises:
        UserError: it is another one than what is wanted.
    """
    whole = place.resolve()
    own = split_of(whole.name)
    beside = {split_of(name) for name in list_folder(str(whole.parent), Tally()).folders} - {None, own}
    if own is None or own == "train" or (own == "validation" and not beside):
        return False
    if own != wanted:
        raise UserError(f"{place} is a {own} set by its name; use --split {own}, or --split all for all its images")
    return True


def scan_classes(folder: Path, tally: Tally, apart: Iterable[Path] = ()) -> dict[str, list[str]]:
    """Class name -> image files below its folder, at any depth; what is left out is counted. What a folder's name has
    that is no character, or would not stay on a line, is written out in the class's.

    Args:
        folder: holds one folder per class.
        tally: counts what is left out.
        apart: folders that links below a class must not lead into, beside ``folder`` and the other classes'.

    Raises:
        UserError: there is no image, two classes are one folder, or the folders are no classes.
    """
    before = tally.report()
    listed = list_folder(str(folder), tally)
    for name in listed.pictures:
        tally.add(LOOSE, str(folder / name))
    known: dict[Folder, str] = {}
    for name in listed.folders:
        which = identity(str(folder / name))
        if which is not None and (other := known.setdefault(which, name)) != name:
            raise UserError(f"{folder}: the class folders {other} and {name} are one folder, by a link; remove one")
    _refuse_classes_in_classes(folder, listed)
    seen = {*known, *(which for place in (folder, *apart) if (which := identity(str(place))) is not None)}
    found = {
        words.safe(name): list(pictures_below(str(folder / name), tally, seen=seen, files_first=True))
        for name in listed.folders
    }
    if len(found) < len(listed.folders):
        raise UserError(f"{folder}: two class folders have names that can not be told apart in print; rename one")
    if not any(found.values()):
        known_endings = ", ".join(EXTENSIONS)
        others = "".join(f"; {each.describe()}" for each in tally.report().since(before).left_out)
        raise UserError(
            f"{folder}: no images found{others}; one folder per class with files ending in {known_endings} would be "
            "right"
        )
    return found


def _refuse_classes_in_classes(folder: Path, listed: Listed) -> None:
    """Refuse what looks like splits under other names: two folders that hold the same two or more folders, and no
    picture of their own.
    """
    seen: dict[tuple[str, ...], str] = {}
    for name in listed.folders:
        inside = list_folder(str(folder / name), Tally())
        if inside.pictures or len(inside.folders) < 2:
            continue
        if (other := seen.setdefault(inside.folders, name)) != name:
            raise UserError(
                f"{folder}: {other}/ and {name}/ hold the same folders ({_some(inside.folders)}), so they seem to be "
                "no classes; name them train/, val/ and test/, or write a manifest (path,label)"
            )


def file_split(
    split: str,
    found: Mapping[str, Sequence[str]],
    classes: tuple[str, ...],
    channels: int,
    max_pixels: int,
    place: Path,
    *,
    may_lack: bool = False,
) -> FileSplit:
    """A split of the pictures that were found; every class of a train set must have some, unless it ``may_lack``
    them.
    """
    empty = [name for name in classes if not found.get(name)]
    if empty and split == "train" and not may_lack:
        raise UserError(f"{place}: class folder(s) without an image: {_some(empty)}")
    paths = [path for name in classes for path in found.get(name, ())]
    labels = [label for label, name in enumerate(classes) for _ in found.get(name, ())]
    return FileSplit(
        split=split,
        classes=classes,
        labels=torch.tensor(labels, dtype=torch.long),
        channels=channels,
        paths=tuple(paths),
        max_pixels=max_pixels,
    )


def _check_same(tree: Tree, split: str, train: Collection[str], found: Collection[str]) -> None:
    """Refuse classes that only one of the two splits has."""
    names = (tree.folders["train"], tree.folders[split])
    only = (sorted(set(train) - set(found)), sorted(set(found) - set(train)))
    sides = [f"only in {name}/: {_some(each)}" for name, each in zip(names, only, strict=True) if each]
    if sides:
        raise UserError(
            f"{tree.place}: class folders differ between {names[0]}/ and {names[1]}/; {'; '.join(sides)}; make them "
            "the same"
        )


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
