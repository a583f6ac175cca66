"""What is put into an artefact that is finished: into its record and its model card, in the place of what stood
there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from convscale.artifact.artifact import Artifact, load_artifact
from convscale.artifact.folder import CARD
from convscale.artifact.manifest import Manifest, read_manifest
from convscale.artifact.promise import Promise, with_promise
from convscale.conditions import size_text
from convscale.errors import UserError
from convscale.files import inside_fit, sha256, write_text
from convscale.locks import OutputLock


@contextmanager
def alone_with(folder: Path) -> Iterator[None]:
    """While open, no other run puts anything into an artefact or in its place.

    Raises:
        UserError: one does.
    """
    with OutputLock() as lock:
        lock.take_name(os.path.realpath(folder), "artefact")
        yield


def state_fact(artifact: Artifact, name: str, text: str, **values: object) -> None:
    """Put values into an artefact's record, and state a fact in its model card."""
    line = f"- **{name.capitalize()}**: "

    def stated(card: str) -> str:
        return "\n".join(line + text if old.startswith(line) else old for old in card.split("\n"))

    _change(artifact, stated, **values)


def write_promise(folder: str | os.PathLike[str], promise: Promise) -> Artifact:
    """Put a promise into a finished artefact: its record and its model card, in the place of an earlier promise. The
    artefact is whole whenever this stops.

    Raises:
        UserError: it is no artefact, damaged, takes images of another size than was promised for, or is being written
            by another run.
    """
    place = inside_fit(Path(folder), "artifact")
    with alone_with(place):
        artifact = load_artifact(place)
        if promise.image_size != artifact.image_size:
            raise UserError(
                f"the promise is of {size_text(promise.image_size)} px, artefact {folder} takes "
                f"{size_text(artifact.image_size)} px"
            )
        _change(artifact, lambda card: with_promise(card, promise), promise=promise.to_dict())
    return artifact


def _change(artifact: Artifact, change: Callable[[str], str], **values: object) -> None:
    """The card's checksum leaves the record, in which the values stand from then on, before the card changes, and comes
    back after it: so the artefact is whole whenever this stops.

    Raises:
        UserError: it is another artefact than the one that was opened.
    """
    path, others = artifact.folder / CARD, _without_card(artifact.manifest)
    now = read_manifest(artifact.folder)
    if _without_card(now) != others:
        raise UserError(f"artefact {artifact.folder} was replaced since it was opened; nothing is put in, run it again")
    artifact.manifest = now  # with what others put in meanwhile
    artifact.keep(**values, files=others)
    if path.is_file():
        write_text(path, change(path.read_text(encoding="utf-8")))
        artifact.keep(files=others | {CARD: {"sha256": sha256(path), "bytes": path.stat().st_size}})


def _without_card(manifest: Manifest) -> dict[str, Mapping[str, object]]:
    """Its files with their checksums, but for the model card, which changes with what is put in."""
    return {file: entry for file, entry in manifest.files.items() if file != CARD}
