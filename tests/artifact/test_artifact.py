"""What a folder that is not quite an artefact gets told."""

from __future__ import annotations

import json
import os
import shutil
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from convscale.artifact.artifact import Artifact, load_artifact
from convscale.artifact.folder import seal, staged_folder
from convscale.artifact.manifest import SCHEMA
from convscale.errors import UserError
from convscale.ship.export import export


@pytest.fixture
def folder(onnx_art: Artifact, tmp_path: Path) -> Path:
    """A copy of an artefact, to break."""
    return Path(shutil.copytree(onnx_art.folder, tmp_path / "copy"))


def edit(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / "artifact.json").read_text())
    (folder / "artifact.json").write_text(json.dumps({**manifest, **changes}))


def reseal(folder: Path) -> None:
    """Put the checksums right again, as someone with bad intent would."""
    manifest = json.loads((folder / "artifact.json").read_text())
    seal(folder, {k: v for k, v in manifest.items() if k != "files"})


def test_a_flipped_bit(folder: Path) -> None:
    data = bytearray((folder / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.onnx").write_bytes(data)
    with pytest.raises(UserError, match=r"is damaged: the checksum of model\.onnx is wrong"):
        load_artifact(folder)


def test_changed_classes(folder: Path) -> None:
    (folder / "classes.json").write_text('["a", "b", "c", "d", "z"]')
    with pytest.raises(UserError, match=r"checksum of classes\.json"):
        load_artifact(folder)


def test_a_missing_file(folder: Path) -> None:
    (folder / "preprocessing.json").unlink()
    with pytest.raises(UserError, match=r"lacks its file preprocessing\.json"):
        load_artifact(folder)


def test_newer_schema(folder: Path) -> None:
    edit(folder, schema=99)
    with pytest.raises(UserError, match="has schema 99, this version of convscale reads up to 2; update convscale"):
        load_artifact(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": "x"}', '{"schema": 1}'])
def test_damaged_manifest(folder: Path, text: str) -> None:
    (folder / "artifact.json").write_text(text)
    with pytest.raises(UserError, match=r"damaged artifact\.json"):
        load_artifact(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": ["onnx"]}, r"unknown format \['onnx'\]"),
        ({"baked": "false"}, "baked true or false"),
        ({"num_classes": -1}, "num_classes is -1; it must be a whole number"),
        ({"thresholds": 5}, "thresholds is 5; it must be a list of numbers"),
        ({"runtime": {"name": 3}}, r"runtime\.name is 3; it must be text"),
        (
            {"runtime": {"name": "onnxruntime", "threads": 10**6}},
            r"runtime\.threads is 1000000; it must be at most 1024",
        ),
        (
            {"runtime": {"name": "onnxruntime", "batch_size": "8"}},
            r"runtime\.batch_size is '8'; it must be a whole number",
        ),
    ],
)
def test_a_part_of_a_record_that_can_not_be_used(folder: Path, change: dict[str, object], said: str) -> None:
    edit(folder, **change)
    with pytest.raises(UserError, match=said):
        load_artifact(folder)


@pytest.mark.parametrize("name", ["classes.json", "preprocessing.json"])
@pytest.mark.parametrize("text", ["null", "5", '[["a"]]', "{}"])
def test_a_part_that_is_no_such_thing_with_its_checksum_right(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    reseal(folder)
    with pytest.raises(UserError, match=rf"damaged {name}"):
        load_artifact(folder)


def test_unknown_format(folder: Path) -> None:
    edit(folder, format="tflite")
    with pytest.raises(UserError, match="unknown format 'tflite'; known: onnx, openvino, torch"):
        load_artifact(folder)


def test_of_a_fit_what_it_ships_is_opened(folder: Path, tmp_path: Path) -> None:
    """``convscale tune runs/photos`` called the folder that ``fit`` had made no artefact."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "fit.json").write_text("{}")
    with pytest.raises(UserError, match=r"run/artifact does not exist"):
        load_artifact(run)
    folder.rename(run / "artifact")
    assert load_artifact(run).folder == run / "artifact"


@pytest.mark.parametrize("device", ["cuda:0,1", "cuda:", "cuda:x", "cuda:-1", "cuda0", "gpu", "l4", "cpu:0", "", 7])
def test_a_device_that_no_machine_calls_so(folder: Path, device: Any) -> None:
    """``classify --device cuda:0,1`` ended in a traceback, by an output file with its header alone."""
    with pytest.raises(
        UserError, match=rf"^device {device!r} is none of this machine's; cpu, cuda or cuda:N would be right$"
    ):
        load_artifact(folder, device=device)


def test_no_artefact(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        load_artifact(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"is no artefact: it has no artifact\.json"):
        load_artifact(tmp_path)
    torch.save({"w": torch.zeros(1)}, tmp_path / "net.pth")
    with pytest.raises(UserError, match="is a file; an artefact is a folder"):
        load_artifact(tmp_path / "net.pth")


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/file"])
def test_files_outside_the_folder(folder: Path, name: str) -> None:
    manifest = json.loads((folder / "artifact.json").read_text())
    edit(folder, files={**manifest["files"], name: {"sha256": "0"}})
    with pytest.raises(UserError, match="outside its folder; refused"):
        load_artifact(folder)


def test_a_link_instead_of_a_file(folder: Path, tmp_path: Path) -> None:
    (folder / "model.onnx").rename(tmp_path / "elsewhere.onnx")
    (folder / "model.onnx").symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(UserError, match=r"lacks its file model\.onnx"):
        load_artifact(folder)


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/passwd", "", "a/../../weights.bin"])
def test_external_data_outside_the_folder(folder: Path, location: str) -> None:
    model = onnx.load(folder / "model.onnx")
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    reseal(folder)
    with pytest.raises(UserError, match=r"wants data from .*, outside its own folder; refused"):
        load_artifact(folder)


def test_external_data_hidden_in_an_attribute(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    tensor = onnx.TensorProto(data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../weights.bin")
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["hidden"], value=tensor))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    reseal(folder)
    with pytest.raises(UserError, match="outside its own folder"):
        load_artifact(folder)


def test_no_onnx_inside(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"\xff" * 100)
    reseal(folder)
    with pytest.raises(UserError, match=r"model\.onnx is no ONNX file"):
        load_artifact(folder)


def test_missing_runtime_says_how_to_install_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convscale.runtimes.base.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"runtime openvino is not installed; pip install openvino"):
        load_artifact(folder, runtime="openvino")


def test_a_runtime_for_another_format(folder: Path) -> None:
    with pytest.raises(UserError, match="format onnx runs in onnxruntime or openvino, not in eager"):
        load_artifact(folder, runtime="eager")


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (np.zeros((2, 32, 32, 3), np.float32), r"got float32 \(2, 32, 32, 3\)"),
        (np.zeros((2, 3, 32, 32), np.uint8), r"got uint8 \(2, 3, 32, 32\)"),
        (np.zeros((32, 32, 3), np.uint8), r"got uint8 \(32, 32, 3\)"),
        ([[1]], "got list"),
    ],
)
def test_wrong_images(onnx_art: Artifact, wrong: np.ndarray, text: str) -> None:
    with pytest.raises(UserError, match=r"images must be a uint8 array \(N, 32, 32, 3\), " + text):
        onnx_art(wrong)


@pytest.fixture(scope="module")
def archive_folder(tiny: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tiny, tmp_path_factory.mktemp("pt2") / "a", format="torch").folder


def rewrite(archive_folder: Path, tmp_path: Path, change: dict[str, bytes]) -> Path:
    """A copy whose entries (by the end of their name) are replaced, or added."""
    folder = Path(shutil.copytree(archive_folder, tmp_path / "copy"))
    with zipfile.ZipFile(archive_folder / "model.pt2") as old, zipfile.ZipFile(folder / "model.pt2", "w") as new:
        names = old.namelist()
        for name in names:
            value = next((v for k, v in change.items() if name.endswith(k)), old.read(name))
            new.writestr(name, value)
        for key, value in change.items():
            if not any(name.endswith(key) for name in names):
                new.writestr(f"{names[0].split('/')[0]}/{key}", value)
    reseal(folder)
    return folder


def test_torch_archive_unchanged_it_loads(
    archive_folder: Path, tmp_path: Path, images: np.ndarray, tiny: nn.Module
) -> None:
    art = load_artifact(rewrite(archive_folder, tmp_path, {}))
    assert art(images).argmax(1).tolist() == load_artifact(archive_folder)(images).argmax(1).tolist()


def test_torch_archive_a_pickle_is_refused(archive_folder: Path, tmp_path: Path) -> None:
    witness = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {witness}",)

    import pickle

    for entry in ("data/sample_inputs/model.pt", "data/constants/opaque_obj_0"):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        folder = rewrite(archive_folder, tmp_path, {entry: pickle.dumps(Evil())})
        with pytest.raises(UserError, match="foreign archives are not loaded"):
            load_artifact(folder)(np.zeros((1, 32, 32, 3), np.uint8))
    assert not witness.exists()


def test_torch_archive_code_in_an_expression_is_refused(archive_folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(archive_folder / "model.pt2") as archive:
        name = next(n for n in archive.namelist() if n.endswith("models/model.json"))
        text = archive.read(name).decode()
    assert "Symbol('s" in text
    evil = text.replace("Symbol('s", "__import__('os').system('true') or Symbol('s", 1)
    with pytest.raises(UserError, match="holds the expression"):
        load_artifact(rewrite(archive_folder, tmp_path, {"models/model.json": evil.encode()})).runner  # noqa: B018


@pytest.mark.parametrize("slow", ["9**9**9**9", "9" * 5000, "(" * 30 + "1" + ")" * 30, "1*" * 2000 + "1"])
def test_torch_archive_an_expression_that_takes_for_ever_is_refused(
    archive_folder: Path, tmp_path: Path, slow: str
) -> None:
    with zipfile.ZipFile(archive_folder / "model.pt2") as archive:
        name = next(n for n in archive.namelist() if n.endswith("models/model.json"))
        text = archive.read(name).decode()
    evil = text.replace("Symbol('s", f"{slow} + Symbol('s", 1)
    with pytest.raises(UserError, match="holds the expression") as caught:
        load_artifact(rewrite(archive_folder, tmp_path, {"models/model.json": evil.encode()})).runner  # noqa: B018
    assert len(str(caught.value)) < 400


def test_torch_archive_an_unknown_operator_is_refused(archive_folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(archive_folder / "model.pt2") as archive:
        name = next(n for n in archive.namelist() if n.endswith("models/model.json"))
        text = archive.read(name).decode()
    evil = text.replace("torch.ops.aten.linear.default", "torch.hub.load", 1).encode()
    with pytest.raises(UserError, match=r"holds the operator 'torch\.hub\.load'"):
        load_artifact(rewrite(archive_folder, tmp_path, {"models/model.json": evil})).runner  # noqa: B018


def write_half(folder: Path, **keywords: bool) -> None:
    with staged_folder(folder, **keywords) as staging:
        (staging / "half.txt").write_text("half")
        raise RuntimeError("power cut")


def test_staged_folder_is_all_or_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="power cut"):
        write_half(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_overwriting_keeps_the_old_one_until_the_new_is_whole(folder: Path) -> None:
    before = (folder / "artifact.json").read_text()
    with pytest.raises(RuntimeError, match="power cut"):
        write_half(folder, overwrite=True)
    assert (folder / "artifact.json").read_text() == before
    load_artifact(folder)


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no space left on the disk"), staged_folder(tmp_path / "out"):
        raise OSError(28, "No space left on device")


def test_output_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="is a file; name a folder"), staged_folder(tmp_path / "out"):
        pass


def test_schema_is_stated(onnx_art: Artifact) -> None:
    assert onnx_art.manifest["schema"] == SCHEMA == 1


def test_a_hard_link_is_refused(folder: Path, tmp_path: Path) -> None:
    """By its other name the file can change after its checksum was taken."""
    os.link(folder / "model.onnx", tmp_path / "other")
    with pytest.raises(UserError, match=r"model\.onnx has a second name somewhere \(a hard link\)"):
        load_artifact(folder)
    (tmp_path / "other").unlink()
    load_artifact(folder)


def test_a_file_that_changes_between_its_checksum_and_its_opening_is_refused(folder: Path, tmp_path: Path) -> None:
    artifact = load_artifact(folder)
    other = shutil.copy(folder / "model.onnx", tmp_path / "other")
    os.replace(other, folder / "model.onnx")  # the same bytes, but who knows
    with pytest.raises(UserError, match=r"model\.onnx changed while it was opened"):
        artifact.runner  # noqa: B018
    load_artifact(folder).runner  # noqa: B018


def test_a_closed_artefact_answers_no_more(onnx_art: Artifact, images: np.ndarray) -> None:
    with load_artifact(onnx_art.folder) as art:
        expected = art(images[:2])
        again = weakref.ref(art.runner)
    assert again() is None, "the runtime is let go"
    with pytest.raises(UserError, match="was closed; load it again"):
        art(images[:2])
    assert np.array_equal(load_artifact(onnx_art.folder)(images[:2]), expected)


def test_calls_under_way_end_though_the_artefact_is_closed(
    onnx_art: Artifact, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    four = images[:4]
    calls: list[Callable[[Artifact], list[object]]] = [
        lambda art: art(four, batch_size=1).tolist(),
        lambda art: art.logits(four, batch_size=1).tolist(),
        lambda art: list(art.classify(list(four), batch_size=1)),
    ]
    for call in calls:
        art = load_artifact(onnx_art.folder)
        runner = weakref.ref(art.runner)

        def closing(batch: np.ndarray, art: Artifact = art) -> np.ndarray:
            art.close()
            return onnx_art.input_batch(batch)

        monkeypatch.setattr(art, "input_batch", closing)
        assert call(art) == call(onnx_art)
        assert runner() is None, "the runtime is let go with the last call"
        with pytest.raises(UserError, match="was closed; load it again"):
            call(art)
