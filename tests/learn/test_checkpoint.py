"""Checkpoints: whole or not there, verified, and no pickles."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from convscale.cli.ship import _card
from convscale.errors import UserError
from convscale.files import whole_folder
from convscale.images.preprocess import Preprocessing
from convscale.learn import checkpoint as module
from convscale.learn.checkpoint import list_checkpoints, load_checkpoint, load_state, prune, save_checkpoint, weights_of
from convscale.learn.record import reached
from convscale.learn.tree import from_plain, to_plain
from convscale.nn.net import create_model
from convscale.nn.state_dicts import _folder_classes
from tests.detect.sets import small_spec
from tests.learn.nets import CLASSES, small_net

PREPROCESSING = Preprocessing(image_size=12, channels=1, mean=(0.5,), std=(0.25,), crop_pct=1.0)


def _save(run: Path, step: int, fill: float, *, kind: str = "step") -> Path:
    net = small_net()
    with torch.no_grad():
        net[9].bias.fill_(fill)
    state = {"numbers": {"step": step}, "pairs": {0: torch.tensor([fill])}} if kind == "step" else None
    return save_checkpoint(
        run / "checkpoints" / f"{kind}-{step:08d}",
        net,
        classes=CLASSES,
        preprocessing=PREPROCESSING,
        meta={"seed": 0},
        state=state,
    )


def test_round_trip(tmp_path: Path) -> None:
    place = _save(tmp_path, 7, 2.5)
    assert set(load_file(place / "model.safetensors")) == set(
        small_net().state_dict()
    )  # plain safetensors, as others read them
    loaded = load_checkpoint(place, net=small_net())
    assert loaded.classes == CLASSES
    assert loaded.preprocessing == PREPROCESSING
    assert loaded.net[9].bias.tolist() == [2.5] * 3
    assert not loaded.net.training
    assert loaded.meta["versions"]["torch"] == torch.__version__
    _, about, state, notes = load_state(tmp_path)
    assert about["seed"] == 0
    assert state["numbers"]["step"] == 7
    assert state["pairs"][0].item() == 2.5
    assert notes == []
    assert not list(tmp_path.rglob("*.tmp"))


def test_what_names_any_file_is_read_again(tmp_path: Path) -> None:
    """A cut JPEG stands in the state by its name, whose bytes need not be UTF-8; a loss may be infinite."""
    said = "caf\udce9.jpg: JPEG image is truncated"
    place = save_checkpoint(
        tmp_path / "checkpoints" / "step-00000001",
        create_model(small_spec(), num_classes=3, in_chans=1),
        classes=CLASSES,
        preprocessing=PREPROCESSING,
        meta={"notes": [said], "metrics": {"val_loss": float("inf")}},
        state={"bad": {"messages": [said]}, "loss": float("nan")},
    )
    _, about, state, _ = load_state(tmp_path)
    assert (about["notes"], state["bad"]) == ([said], {"messages": [said]})
    assert load_checkpoint(place).meta["notes"] == [said]
    assert _folder_classes(place) == CLASSES


@pytest.mark.parametrize("pool", ["avg", "max", "catavgmax"])
def test_a_network_is_built_with_its_own_pool(tmp_path: Path, pool: str) -> None:
    net = create_model(small_spec(), num_classes=3, in_chans=1, global_pool=pool).eval()
    place = save_checkpoint(tmp_path / "step-1", net, classes=CLASSES, preprocessing=PREPROCESSING)
    told = json.loads((place / "checkpoint.json").read_text())
    assert told.get("global_pool") == (None if pool == "avg" else pool)
    x = torch.rand(2, 1, 64, 64)
    assert torch.equal(load_checkpoint(place).net(x), net(x))


def test_best_is_preferred_and_old_ones_are_pruned(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        _save(tmp_path, step, step)
    assert load_checkpoint(tmp_path, net=small_net()).path.name == "step-00000003"
    _save(tmp_path, 2, 9.0, kind="best")
    assert load_checkpoint(tmp_path, net=small_net()).net[9].bias[0] == 9.0
    assert load_state(tmp_path)[0].name == "step-00000003"
    (tmp_path / "checkpoints" / ".step-00000004.abcdefgh.tmp").mkdir()
    prune(tmp_path, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path, ("step", "best"))] == [
        "step-00000003",
        "step-00000002",
        "best-00000002",
    ]
    assert not list(tmp_path.rglob("*.tmp"))


def test_what_another_run_is_writing_is_never_removed(tmp_path: Path) -> None:
    _save(tmp_path, 1, 1.0)
    with whole_folder(tmp_path / "checkpoints" / "step-00000002") as others:
        (others / "model.safetensors").write_bytes(b"x")
        prune(tmp_path, keep=1)
        assert (others / "model.safetensors").read_bytes() == b"x"
    assert (tmp_path / "checkpoints" / "step-00000002").is_dir()


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "sums", "json"])
def test_a_damaged_newest_state_is_passed_over_by_a_resumed_training_alone(tmp_path: Path, damage: str) -> None:
    _save(tmp_path, 1, 1.0)
    newest = _save(tmp_path, 2, 2.0)
    weights = newest / "model.safetensors"
    if damage == "flip":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "missing":
        (newest / "state.json").unlink()
    elif damage == "sums":
        (newest / "SHA256SUMS").write_text("")
    else:
        (newest / "checkpoint.json").write_text("{}")
    _, _, state, notes = load_state(tmp_path)
    assert state["numbers"]["step"] == 1
    assert "step-00000002 is damaged" in notes[0]
    for path in (newest, tmp_path):
        with pytest.raises(UserError, match="step-00000002 is damaged"):
            load_checkpoint(path, net=small_net())


def test_a_damaged_best_is_never_replaced_in_silence(tmp_path: Path) -> None:
    """Guards wrong answer 13 of issue E: with one bit flipped, another state was taken and nothing said."""
    last = _save(tmp_path, 2, 2.0)
    best = _save(tmp_path, 1, 1.0, kind="best")
    assert load_checkpoint(tmp_path, net=small_net()).path == best
    weights = best / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError) as caught:
        load_checkpoint(tmp_path, net=small_net())
    assert f"checkpoint {best} is damaged" in str(caught.value)
    assert str(caught.value).endswith(f"to use another state, name it: {last}")
    assert load_checkpoint(last, net=small_net()).net[9].bias[0] == 2.0
    (last / "SHA256SUMS").unlink()  # no state is whole: none is named
    with pytest.raises(UserError, match=r"checksum it was written with\)$"):
        load_checkpoint(tmp_path, net=small_net())


def test_a_full_disk_leaves_the_old_one_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path, 1, 1.0)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(UserError, match=r"no space left .* step-00000002 was not written, older ones are intact"):
        _save(tmp_path, 2, 2.0)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert load_checkpoint(tmp_path, net=small_net()).net[9].bias[0] == 1.0


def test_of_a_fit_its_training_is_read(tmp_path: Path) -> None:
    """``convscale export runs/photos`` found no checkpoint in the folder that ``fit`` had made."""
    _save(tmp_path / "train", 1, 1.0)
    best = _save(tmp_path / "train", 1, 2.0, kind="best")
    (tmp_path / "fit.json").write_text("{}")
    loaded = load_checkpoint(tmp_path, net=small_net())
    assert (loaded.path, loaded.net[9].bias[0]) == (best, 2.0)
    assert weights_of(tmp_path)[0]["9.bias"][0] == 2.0
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(UserError, match="train does not exist"):
        load_checkpoint(tmp_path, net=small_net())


def test_bad_input(tmp_path: Path) -> None:
    place = _save(tmp_path, 1, 1.0)
    with pytest.raises(UserError, match="exists already"):
        _save(tmp_path, 1, 1.0)
    with pytest.raises(UserError, match=r"another architecture: it 9\.weight is \(3, 32\), the network's \(5, 32\)"):
        load_checkpoint(place, net=small_net(classes=5))
    with pytest.raises(UserError, match=r"another architecture: it lacks bias and 1 more"):
        load_checkpoint(place, net=torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="has no spec"):
        load_checkpoint(place)
    with pytest.raises(UserError, match="does not exist"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no checkpoint found"):
        load_checkpoint(tmp_path / "checkpoints")
    torch.save({"a": 1}, tmp_path / "foreign.pth")
    with pytest.raises(UserError, match=r"foreign\.pth is a pickle or foreign file"):
        load_checkpoint(tmp_path / "foreign.pth")
    best = _save(tmp_path, 1, 1.0, kind="best")
    with pytest.raises(UserError, match="has no training state"):
        load_state(best)


def test_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FORMAT_VERSION", 99)
    place = _save(tmp_path, 1, 1.0)
    monkeypatch.undo()
    with pytest.raises(UserError, match="has format 99, this convscale reads up to 1"):
        load_checkpoint(place, net=small_net())


def test_a_spec_rebuilds_the_network(tmp_path: Path) -> None:
    from convscale.nn.net import create_model

    torch.manual_seed(0)
    net = create_model("mobilenetv2_050", num_classes=3, in_chans=1).eval()
    place = save_checkpoint(tmp_path / "c", net, classes=CLASSES, preprocessing=PREPROCESSING)
    loaded = load_checkpoint(place)
    x = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded.net(x), net(x))


def test_trees_round_trip_through_json() -> None:
    tree = {"a": [1, 2.5, None, (True, "x")], "state": {0: {"m": torch.arange(3)}, 1: {}}, "inf": float("inf")}
    tensors: dict[str, torch.Tensor] = {}
    back = from_plain(json.loads(json.dumps(to_plain(tree, tensors))), tensors)
    assert back["a"] == tree["a"]
    assert back["state"][1] == {}
    assert torch.equal(back["state"][0]["m"], torch.arange(3))
    assert back["inf"] == float("inf")
    with pytest.raises(TypeError, match="a: set can not be kept"):
        to_plain({"a": set()}, {})


def _forge(place: Path, name: str, value: object) -> None:
    """Put something else into a checkpoint, with checksums that are right: a file as an attacker would make it."""
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    (place / name).write_bytes(data)
    files = sorted(path for path in place.iterdir() if path.name != "SHA256SUMS")
    sums = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)
    (place / "SHA256SUMS").write_text(sums)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"classes": None}, "classes is None; it must be a list"),
        ({"classes": []}, "classes must be names, each once, and at least one"),
        ({"classes": ["a", "a", "b"]}, "classes must be names, each once"),
        ({"classes": ["a", 2, "b"]}, "classes must be names"),
        ({"classes": [["a"], "c", "b"]}, "classes must be names"),
        ({"preprocessing": []}, r"preprocessing is \[\]; it must be an object"),
        ({"preprocessing": {}}, "preprocessing: preprocessing lacks image_size, mean, std"),
        ({"preprocessing": {"image_size": "x", "mean": [0], "std": [1]}}, "preprocessing: "),
        ({"format_version": "1"}, "format_version is '1'; it must be a whole number"),
        ({"format_version": 99}, "has format 99, this convscale reads up to 1"),
        ({"in_chans": -1}, "in_chans is -1; it must be a whole number of at least 1"),
        ({"metrics": [1]}, r"metrics is \[1\]; it must be an object"),
        ({"metrics": {"best": 3}}, "metrics.best is 3; it must be an object"),
        ({"metrics": {"best": {"thresholds": [0.5]}}}, "thresholds must be a finite number for each class"),
        ({"foreign": {"name": 1}}, "foreign must have name and origin, texts both"),
    ],
)
def test_a_forged_checkpoint_is_one_line_that_names_file_and_key(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    place = _save(tmp_path, 1, 1.0)
    about = json.loads((place / "checkpoint.json").read_text())
    _forge(place, "checkpoint.json", about | change)
    with pytest.raises(UserError, match=said) as caught:
        load_checkpoint(place, net=small_net())
    assert str(place) in str(caught.value)
    assert "\n" not in str(caught.value)
    del about["classes"]
    _forge(place, "checkpoint.json", about)
    with pytest.raises(UserError, match=r"checkpoint\.json lacks classes"):
        load_checkpoint(place, net=small_net())


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("checkpoint.json", b"[" * 9999, r"checkpoint\.json is nested more than 64 deep"),
        ("checkpoint.json", b"\xff", r"checkpoint\.json is no text in UTF-8"),
        ("checkpoint.json", [], r"checkpoint\.json holds a list, not an object"),
        ("model.safetensors", b"\xff" * 8 + b"{}", r"model\.safetensors is no safetensors file"),
        ("model.safetensors", b"", r"model\.safetensors is no safetensors file"),
    ],
)
def test_a_forged_file_of_a_checkpoint_is_one_line(tmp_path: Path, name: str, value: object, said: str) -> None:
    place = _save(tmp_path, 1, 1.0)
    _forge(place, name, value)
    with pytest.raises(UserError, match=said):
        load_checkpoint(place, net=small_net())


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], r"state\.json holds a list, not an object"),
        ({"a": {"__tensor__": "none"}}, r"state\.json is damaged, or of another version \(it lacks 'none'\)"),
        ({"a": {"__pairs__": [1]}}, r"state\.json is damaged, or of another version"),
        ({"a": {"__pairs__": [[[1], 2]]}}, r"state\.json is damaged, or of another version"),
        ({"a": {"__tuple__": 3}}, r"state\.json is damaged, or of another version"),
    ],
)
def test_a_forged_training_state_is_one_line(tmp_path: Path, value: object, said: str) -> None:
    place = _save(tmp_path, 1, 1.0)
    _forge(place, "state.json", value)
    with pytest.raises(UserError, match=said):
        load_state(tmp_path)


def test_only_the_best_weights_are_said_to_have_reached_its_result(tmp_path: Path) -> None:
    """A training state tells what the best of its run reached, and -1 before the first validation."""

    def found(name: str, metric: float) -> tuple[float, int | None] | None:
        meta: dict[str, object] = {"metrics": {"epoch": 7, "best": {"metric": metric, "epoch": 3}}}
        place = tmp_path / "checkpoints" / name
        save_checkpoint(place, small_net(), classes=CLASSES, preprocessing=PREPROCESSING, meta=meta)
        loaded = load_checkpoint(place, net=small_net())
        card = _card(loaded, None, None)
        told = reached(loaded.meta, place.name)
        said = None if told is None else f"{metric:.2%} on validation, in epoch 3"
        assert card.get("accuracy") == said
        return told

    assert found("best-00000030", 0.75) == (0.75, 3)
    assert found("step-00000070", 0.75) is None
    assert found("best-00000001", -1.0) is None
    assert found("copied", 0.75) is None
