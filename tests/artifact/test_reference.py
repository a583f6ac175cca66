"""A few images that travel with an artefact: kept at export, checked where it arrives, refused when damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from convscale.artifact.artifact import Artifact, load_artifact
from convscale.artifact.folder import seal
from convscale.artifact.reference import ANSWERS, IMAGES, check_reference, read_reference, write_reference
from convscale.errors import UserError

OLD = Path(__file__).parent.parent / "old_files" / "v0_1" / "artefacts"


def sealed(folder: Path) -> Artifact:
    """With checksums of what lies there now."""
    values = load_record(folder)
    seal(folder, {key: value for key, value in values.items() if key not in ("schema", "files")})
    return load_artifact(folder)


def load_record(folder: Path) -> dict:
    return json.loads((folder / "artifact.json").read_text())


@pytest.fixture
def art(tmp_path: Path) -> Artifact:
    folder = shutil.copytree(OLD / "onnx_fp32", tmp_path / "art")
    images = np.random.default_rng(0).integers(0, 256, (10, 28, 28, 1), dtype=np.uint8)
    write_reference(folder, load_artifact(folder), images)
    return sealed(folder)


def test_what_is_kept_is_what_it_said(art: Artifact) -> None:
    found = read_reference(art)
    assert found is not None
    images = np.random.default_rng(0).integers(0, 256, (10, 28, 28, 1), dtype=np.uint8)
    assert np.array_equal(found.images, images[[0, 3, 6, 9]])  # four, spread over the batch
    assert np.array_equal(np.load(art.folder / IMAGES), found.images)  # numpy's own reader agrees
    assert found.probabilities == pytest.approx(art(found.images), abs=1e-6)
    assert check_reference(art).startswith("4 reference images, probabilities differ by at most")


def test_one_without_is_asked_about_noise() -> None:
    art = load_artifact(OLD / "onnx_fp32")
    assert read_reference(art) is None
    assert check_reference(art) == "no reference images; its answers to noise are probabilities"


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: b"",
        lambda data: b"\x93NUMPY\x01\x00" + b"\xff\xff" + b"{" * 100,
        lambda data: data.replace(b"(4, 28, 28, 1)", b"(4, 28, 1, 28)"),
        lambda data: data.replace(b"'|u1'", b"'|i1'"),
        lambda data: data.replace(b"'|u1'", b"'|O' "),
        lambda data: data.replace(b"(4, 28, 28, 1)", b"(9**9**9,    )"),
    ],
)
def test_damaged_images_are_told(art: Artifact, damage) -> None:
    path = art.folder / IMAGES
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="damaged reference images or answers"):
        check_reference(sealed(art.folder))


@pytest.mark.parametrize("value", [{}, {"probabilities": [[1.0]]}, {"probabilities": "x"}, {"probabilities": [["a"]]}])
def test_damaged_answers_are_told(art: Artifact, value: object) -> None:
    (art.folder / ANSWERS).write_text(json.dumps(value))
    with pytest.raises(UserError, match="damaged reference images or answers"):
        check_reference(sealed(art.folder))


def test_another_answer_is_told(art: Artifact) -> None:
    said = json.loads((art.folder / ANSWERS).read_text())
    said["probabilities"][2][0] += 0.01
    (art.folder / ANSWERS).write_text(json.dumps(said))
    with pytest.raises(UserError, match=r"probabilities differ by 0\.01, 0\.001 is allowed"):
        check_reference(sealed(art.folder))
