"""What is served: artefacts by name, each behind its queue; a new version takes over only once it was checked."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convscale.artifact.artifact import Artifact, load_artifact
from convscale.artifact.manifest import MANIFEST
from convscale.artifact.naming import check_model_name, name_of
from convscale.artifact.reference import check_reference
from convscale.conditions import sides
from convscale.errors import UserError
from convscale.files import inside_fit
from convscale.serve.batching import Batcher, Watcher
from convscale.serve.counted import counted
from convscale.serve.protocol import Takes


@dataclass(frozen=True, kw_only=True)
class How:
    """How artefacts are opened and queued."""

    runtime: str | None = None
    """None: each artefact's own."""
    threads: int | None = None
    """Compute threads of each; None: its own, else one per core."""
    batch_size: int | None = None
    """Images of a batch; None: each artefact's own."""
    max_delay_s: float = 0.005
    """How long less than a batch waits for a request that is on its way."""
    queue_batches: int = 16
    """Batches that may wait."""
    most_images: int = 256
    """Of one request."""


@dataclass(frozen=True)
class Named:
    """An artefact's folder, and the name that it is served by."""

    name: str
    """As it stands in addresses."""
    folder: Path
    """An artefact, or a folder of numbered ones."""


def named(arguments: Iterable[str]) -> tuple[Named, ...]:
    """What ``FOLDER`` and ``NAME=FOLDER`` on the command line mean; a folder's own name is its model's.

    Raises:
        UserError: nothing is named, a name can not stand in an address, or two are the same.
    """
    found: dict[str, Named] = {}
    for argument in arguments:
        name, sign, rest = argument.partition("=")
        folder = Path(rest if sign and not Path(argument).is_dir() else argument)
        name = check_model_name(name) if sign and not Path(argument).is_dir() else name_of(folder)
        if name in found:
            raise UserError(f"two artefacts have the name {name!r}; give one of them another as NAME=FOLDER")
        found[name] = Named(name, folder)
    if not found:
        raise UserError("no artefact is named; give a folder that convscale export made, or NAME=FOLDER")
    return tuple(found.values())


def versions(folder: Path) -> list[tuple[int, Path]]:
    """Number and folder of each version that could be served, the one to serve first: of a folder of numbered artefacts
    from the highest down; an artefact itself is number 0.
    """
    if (folder / MANIFEST).is_file() or not folder.is_dir():
        return [(0, folder)]
    numbered = [each for each in folder.iterdir() if each.name.isascii() and each.name.isdecimal()]
    whole = [each for each in numbered if len(each.name) < 10 and (each / MANIFEST).is_file()]
    found = [(int(each.name), each) for each in sorted(whole, key=lambda each: int(each.name), reverse=True)]
    return found or [(0, inside_fit(folder, "artifact"))]


def newest(folder: Path) -> tuple[int, Path]:
    """Number and folder of the version to serve."""
    return versions(folder)[0]


def _identity(folder: Path) -> tuple[object, ...]:
    """Changes whenever another artefact takes a folder's place, or any file of it comes or changes: a folder may be
    seen while it is still being copied.
    """
    found: list[tuple[object, ...]] = []
    try:
        with os.scandir(folder) as files:
            for each in files:
                about = each.stat(follow_symlinks=False)
                found.append((each.name, about.st_ino, about.st_size, about.st_mtime_ns))
    except OSError:  # it goes, or a file of it does, at this moment
        found.append(("",))
    return folder, *sorted(found, key=str)


@dataclass(frozen=True, kw_only=True, eq=False)
class Version:
    """An artefact that answers."""

    number: int
    """As its folder is called, or counted up: by a process alone at each change, by several workers together."""
    artifact: Artifact
    """Called by the batcher's threads alone."""
    batcher: Batcher
    """Its queue."""
    takes: Takes
    """What it takes and gives."""
    checked: str
    """How it was checked, in words."""


class Model:
    """A name, and the version that answers to it."""

    def __init__(self, what: Named, how: How, watcher: Watcher) -> None:
        """Of numbered artefacts the highest that can be served: a worker that starts again must come up beside a newer
        one that the others refused.

        Raises:
            UserError: there is no artefact, it is damaged, of a newer version, or says something else here.
        """
        self.name, self.folder = what.name, what.folder
        self._how, self._watcher = how, watcher
        self._refreshing = threading.Lock()
        found = versions(self.folder)
        self._seen = _identity(found[0][1])
        self.current, self.passed_over = self._first(found)  # for the log: what was refused before, and why
        self._refused = bool(self.passed_over)

    def _first(self, found: list[tuple[int, Path]]) -> tuple[Version, tuple[tuple[int, str], ...]]:
        """The first that can be served; numbers of those before it, and why each was refused.

        Raises:
            UserError: none can; what is wrong with the first.
        """
        refused: list[tuple[int, Exception]] = []
        for number, folder in found:
            try:
                opened = self._open(number, folder, 1)
            except Exception as error:
                refused.append((number, error))
            else:
                return opened, tuple((number, str(error) or type(error).__name__) for number, error in refused)
        raise refused[0][1]

    def refresh(self, *, again: bool = False) -> Version | None:
        """Take up what lies in the folder, where that changed: opened, checked, warmed, then swapped. The old version
        answers until then, and all that it took. Blocks; not for an event loop.

        Args:
            again: what was refused before is tried once more.

        Returns:
            The new version; None where nothing changed.

        Raises:
            UserError: it can not be used; the old one stays. Said once for each.
        """
        with self._refreshing:
            number, folder = newest(self.folder)
            found = _identity(folder)
            if found == self._seen and not (again and self._refused):
                return None
            self._seen, self._refused = found, True
            old = self.current
            self.current = self._open(number, folder, old.number + 1)
            self._refused = False
        old.batcher.close()
        return self.current

    def _open(self, number: int, folder: Path, following: int) -> Version:
        """An artefact, checked and warm.

        Args:
            number: its folder's; 0: it has none.
            folder: where it is.
            following: its number where it has none and no other process counts too.
        """
        how = self._how
        artifact = load_artifact(folder, runtime=how.runtime, threads=how.threads)
        if artifact.is_detector:
            raise UserError(f"artefact {folder} is a detector's; serve takes classifiers")
        batch_size = how.batch_size or artifact.batch_size
        # Each stream takes batches of its own from the queue: where a batch is cut into parts that run side by side, it
        # waits for the slowest of them.
        batch_size = max(1, batch_size // artifact.streams)
        artifact.batch_size, artifact.divided = batch_size, False
        checked = check_reference(artifact)
        alone = self._opened_alone(artifact) if artifact.streams > 1 else None
        height, width = sides(artifact.image_size)
        image = (height, width, artifact.preprocessing.channels)
        for count in artifact.runner.sizes(batch_size):  # else clients would wait for seconds at the first of each
            artifact(np.zeros((count, *image), np.uint8))
        number = number or counted(self.name, artifact.manifest) or following  # what was refused is not counted
        takes = Takes(
            name=self.name,
            version=str(number),
            platform=f"{artifact.format}_{artifact.runtime}",
            image=image,
            classes=artifact.classes,
            most_images=how.most_images,
        )
        batcher = Batcher(
            artifact,
            name=self.name,
            alone=alone,
            streams=artifact.streams,
            batch_size=batch_size,
            max_delay_s=how.max_delay_s,
            most_waiting=how.queue_batches * artifact.streams * batch_size,
            watcher=self._watcher,
        )
        return Version(number=number, artifact=artifact, batcher=batcher, takes=takes, checked=checked)

    def _opened_alone(self, artifact: Artifact) -> Artifact:
        """The same artefact again, in one stream that has all threads, for one image.

        Raises:
            UserError: another has taken its place meanwhile, or it says something else.
        """
        alone = load_artifact(artifact.folder, runtime=self._how.runtime, threads=self._how.threads)
        if alone.manifest.files != artifact.manifest.files:
            raise UserError(f"artefact {artifact.folder} changed while it was opened; open it again")
        alone.streams = alone.batch_size = 1
        alone.divided = False
        check_reference(alone, at_once=1)
        return alone


class Models:
    """All models by their names."""

    def __init__(self, models: Iterable[Named], how: How, watcher_of: Callable[[str], Watcher]) -> None:
        """Open all.

        Raises:
            UserError: one of them can not be served.
        """
        self.all: Mapping[str, Model] = {each.name: Model(each, how, watcher_of(each.name)) for each in models}

    def close(self) -> None:
        """Answer what waits, and end."""
        for model in self.all.values():
            model.current.batcher.close()
