"""Checkpoints as others write them: timm's trainer, torchvision's, Lightning's, torch's wrappers, EfficientNet-PyTorch.

The networks and the files are the peers' own wherever these are installed; outputs are compared with the peer's.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import os
import pathlib
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import convscale as cs
from convscale.errors import UserError
from convscale.nn import keymaps
from convscale.nn.state_dicts import class_names, read_state_dict
from convscale.nn.weights import LoadedWeights, class_count

NAME = "mobilenetv2_050"
CLASSES = 5


@pytest.fixture(scope="module")
def peer() -> nn.Module:
    """timm's network, with values of its own."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(1)
    return timm.create_model(NAME, num_classes=CLASSES).eval()


@pytest.fixture
def net() -> nn.Module:
    return cs.create_model(NAME, num_classes=CLASSES).eval()


def is_peer(net: nn.Module, peer: nn.Module, factor: float = 1.0) -> bool:
    """Whether the stem is ``factor`` times the peer's, and, for 1, the outputs are the same."""
    stem = torch.equal(net.stem[0].conv.weight, factor * peer.conv_stem.weight)  # pyright: ignore
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return stem and (factor != 1 or torch.allclose(net(x), peer(x), atol=1e-5))


def changed(peer: nn.Module) -> dict[str, torch.Tensor]:
    """The peer's weights with another stem: an average, or another network of the same kind."""
    state = {key: value.clone() for key, value in peer.state_dict().items()}
    state["conv_stem.weight"] *= 3
    return state


# ---------------------------------------------------------------- trainers


def test_timms_own_trainer(tmp_path: Path, peer: nn.Module, net: nn.Module) -> None:
    from timm.utils.checkpoint_saver import CheckpointSaver
    from timm.utils.model_ema import ModelEmaV3

    average = ModelEmaV3(peer)
    average.module.load_state_dict(changed(peer))
    args = argparse.Namespace(
        model=NAME, opt_betas=(0.9, 0.999), output=tmp_path, device=torch.device("cpu"), seed=np.int64(3), local=None
    )
    optimizer = torch.optim.AdamW(peer.parameters())
    saver = CheckpointSaver(peer, optimizer, args=args, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=np.float64(71.5))  # pyright: ignore[reportArgumentType]
    loaded = cs.load_weights(net, tmp_path / "model_best.pth.tar")
    assert (loaded.layout, loaded.ignored, loaded.notes()) == ("timm", (), [])
    assert is_peer(net, peer)
    assert read_state_dict(tmp_path / "model_best.pth.tar").model == NAME
    saver = CheckpointSaver(peer, optimizer, args=args, model_ema=average, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(1)
    cs.load_weights(net, tmp_path / "last.pth.tar")
    assert is_peer(net, peer, 3)  # averaged weights before the others, as timm's own loader takes them


def test_torchvisions_own_trainer(tmp_path: Path, net: nn.Module) -> None:
    """What references/classification/train.py saves."""
    import torchvision

    model = torchvision.models.mobilenet_v2(num_classes=CLASSES, width_mult=0.5)
    other = cs.create_model(NAME, num_classes=CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedules = [torch.optim.lr_scheduler.LinearLR(optimizer), torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)]
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    with torch.no_grad():
        average.module.features[0][0].weight.mul_(3)  # pyright: ignore
    checkpoint: dict[str, Any] = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": torch.optim.lr_scheduler.SequentialLR(optimizer, schedules, milestones=[5]).state_dict(),
        "epoch": 3,
        "args": argparse.Namespace(model="mobilenet_v2", data_path="/data", norm_weight_decay=None, gpu=0),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
    }
    torch.save(checkpoint, tmp_path / "model_3.pth")
    assert cs.load_weights(net, tmp_path / "model_3.pth").layout == "torchvision"
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(net(x), model.eval()(x), atol=1e-5)
    torch.save(checkpoint | {"model_ema": average.state_dict()}, tmp_path / "checkpoint.pth")
    loaded = cs.load_weights(other, tmp_path / "checkpoint.pth")
    assert loaded.ignored == ()  # n_averaged is no part of any network, and nothing to speak of
    assert torch.equal(other.stem[0].conv.weight, 3 * model.features[0][0].weight)  # pyright: ignore


class Lit(nn.Module):
    """Modules as a LightningModule holds them: the network, a loss with weights, a metric's state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.criterion = nn.CrossEntropyLoss(weight=torch.ones(CLASSES))
        self.register_buffer("seen", torch.zeros(()))


def test_lightnings_trainer(tmp_path: Path, peer: nn.Module, net: nn.Module) -> None:
    names = list("abcde")
    checkpoint = {
        "epoch": 2,
        "global_step": 10,
        "pytorch-lightning_version": "2.5.1",
        "state_dict": Lit(peer).state_dict(),
        "loops": {"fit_loop": {"state_dict": collections.defaultdict(dict, {"a": {"ready": 1}})}},
        "callbacks": {"ModelCheckpoint{'monitor': 'val'}": {"best_model_score": torch.tensor(0.5), "dirpath": "x"}},
        "optimizer_states": [],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 1e-3, "class_names": names, "root": tmp_path, "at": datetime.datetime(2026, 1, 2)},
    }
    torch.save(checkpoint, tmp_path / "last.ckpt")
    loaded = cs.load_weights(net, tmp_path / "last.ckpt")
    assert (loaded.layout, loaded.prefix, loaded.classes) == ("timm", "model.", tuple(names))
    assert loaded.ignored == ("seen", "criterion.weight")
    assert loaded.notes() == ["weights: left out as no part of the network: seen, criterion.weight"]
    assert is_peer(net, peer)


@pytest.mark.parametrize(
    "wrap",
    [
        torch.optim.swa_utils.AveragedModel,
        nn.DataParallel,
        torch.compile,
        lambda net: nn.DataParallel(torch.compile(net)),  # pyright: ignore
        lambda net: torch.compile(nn.DataParallel(net)),
        lambda net: nn.DataParallel(nn.DataParallel(net)),
        lambda net: torch.optim.swa_utils.AveragedModel(nn.DataParallel(net)),
        lambda net: Lit(nn.DataParallel(net)),
        lambda net: nn.ModuleDict({"net": nn.ModuleDict({"backbone": net})}),
    ],
)
def test_wrappers_of_torch(peer: nn.Module, net: nn.Module, wrap: Any) -> None:
    state = wrap(peer).state_dict()
    assert not set(state) & set(peer.state_dict())
    cs.load_weights(net, {"model": state})
    assert is_peer(net, peer)


def test_wrappers_of_layers(peer: nn.Module, net: nn.Module) -> None:
    """As torch.compile of a part, and checkpointed blocks, name them."""
    state = {
        key.replace("blocks.1.", "blocks._orig_mod.1._checkpoint_wrapped_module."): value
        for key, value in peer.state_dict().items()
    }
    assert state.keys() != peer.state_dict().keys()
    cs.load_weights(net, state)
    assert is_peer(net, peer)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "net", "params", "module", "weights", "network"])
def test_wrapper_keys(peer: nn.Module, net: nn.Module, key: str) -> None:
    cs.load_weights(net, {"epoch": 3, "outer": 1, "model": {key: peer.state_dict()}})
    assert is_peer(net, peer)


def test_several_networks_in_one_file(peer: nn.Module, net: nn.Module) -> None:
    one, other = peer.state_dict(), changed(peer)

    def both(first: str, second: str, *, equal: bool = False) -> dict[str, torch.Tensor]:
        rows = ((first, one), (second, one if equal else other))
        return {f"{prefix}{key}": value for prefix, state in rows for key, value in state.items()}

    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(UserError, match=rf"hold {NAME} several times, under 'student\.', 'teacher\.'; give a state"):
        cs.load_weights(net, both("student.", "teacher."))
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert cs.load_weights(net, both("student.", "teacher.", equal=True)).prefix in ("student.", "teacher.")
    loaded = cs.load_weights(net, both("model.", "model_ema.module."))
    assert loaded.prefix == "model_ema.module."
    assert is_peer(net, peer, 3)


# ---------------------------------------------------------------- what else is in the file


def test_foreign_keys_are_named_and_others_refused(peer: nn.Module, net: nn.Module) -> None:
    state = peer.state_dict() | {
        "aux_head.weight": torch.zeros(3, 4),
        "blocks.1.0.total_ops": torch.zeros(1),
        "loss.centers": torch.zeros(2),
    }
    loaded = cs.load_weights(net, state | {"epoch": 3})  # pyright: ignore[reportOperatorIssue]
    assert set(loaded.ignored) == {"aux_head.weight", "blocks.1.0.total_ops", "loss.centers", "epoch"}
    assert "aux_head.weight" in loaded.notes()[0]
    incomplete = {key: value for key, value in state.items() if key != "conv_head.weight"}
    with pytest.raises(UserError, match=r"missing head\.conv\.weight; unexpected aux_head\.weight"):
        cs.load_weights(net, incomplete)
    with pytest.raises(UserError, match=r"unexpected blocks\.1\.9\.conv_pw\.weight"):
        cs.load_weights(net, state | {"blocks.1.9.conv_pw.weight": torch.zeros(1)})


def test_a_deeper_network_of_the_same_kind_is_refused() -> None:
    """All of ResNet-18's keys and shapes are in ResNet-34's too."""
    deeper = cs.export_weights(cs.create_model("resnet34", num_classes=2))
    with pytest.raises(UserError, match=r"unexpected layer1\.2\.conv1\.weight"):
        cs.load_weights(cs.create_model("resnet18", num_classes=2), deeper)


def test_a_module_of_others_takes_its_keys_behind_a_prefix() -> None:
    source, net = (nn.ModuleDict({"body": nn.Linear(4, 3), "fc": nn.Linear(3, 2)}) for _ in range(2))
    state = {f"net.{key}": value for key, value in source.state_dict().items()}
    loaded = cs.load_weights(net, {"state_dict": state | {"metric.total": torch.zeros(1)}})
    assert (loaded.prefix, loaded.ignored) == ("net.", ("metric.total",))
    assert torch.equal(net["body"].weight, source["body"].weight)  # pyright: ignore
    with pytest.raises(UserError, match=r"unexpected fc\.scale"):
        cs.load_weights(net, source.state_dict() | {"fc.scale": torch.zeros(1)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda value: value.to(torch.int32), r"is of torch\.int32, the network's of torch\.float32"),
        (lambda value: value.to(torch.complex64), r"is of torch\.complex64"),
        (lambda value: value.to_sparse(), "conv_stem.weight is quantised, sparse, nested or empty"),
        (lambda value: value.to("meta"), "conv_stem.weight is quantised, sparse, nested or empty"),
        (lambda value: torch.zeros(16, 0, 3, 3), r"stem\.0\.conv\.weight is \(16, 0, 3, 3\)"),
    ],
)
def test_tensors_that_can_not_be_weights(peer: nn.Module, net: nn.Module, change: Any, said: str) -> None:
    state = peer.state_dict()
    state["conv_stem.weight"] = change(state["conv_stem.weight"])
    with pytest.raises(UserError, match=said):
        cs.load_weights(net, state)


# ---------------------------------------------------------------- classes


@pytest.mark.parametrize(
    "about",
    [
        {"classes": ["b", "a"]},
        {"args": argparse.Namespace(class_names=("b", "a"))},
        {"hyper_parameters": {"class_to_idx": {"a": 1, "b": 0}}},
        {"config": {"id2label": {"0": "b", "1": "a"}}},
        {"meta": {"CLASSES": ("b", "a")}},
        {"idx_to_class": {1: "a", 0: "b"}},
    ],
)
def test_class_names_are_found(tmp_path: Path, about: dict[str, object]) -> None:
    torch.save({"state_dict": {"w": torch.zeros(1)}, **about}, tmp_path / "x.pth")
    assert read_state_dict(tmp_path / "x.pth").classes == ("b", "a")


@pytest.mark.parametrize("value", [["a", "a"], ["a", 1], "ab", {"a": 0, "b": 2}, {"a": 0, "b": 0}, {0: 1}, {}, None])
def test_what_is_no_list_of_names_is_none(value: object) -> None:
    assert class_names({"classes": value}) == ()


def test_a_head_for_other_classes_of_the_same_number_is_said() -> None:
    loaded = LoadedWeights(layout="timm", classes=("cat", "dog"))
    assert loaded.notes(("cat", "dog")) == []
    assert loaded.notes(("cat", "dog", "cow")) == []
    assert loaded.notes() == []
    assert loaded.notes(("cow", "pig")) == ["weights: their classifier, taken over, is for other classes: cat, dog"]
    assert loaded.notes(("dog", "cat"))[0].endswith("is for the same classes in another order: cat, dog")
    assert loaded.notes(("cow", "pig"), source_classes=("cow", "pig")) == []
    fresh = LoadedWeights(layout="timm", classes=("cat", "dog"), fresh=("classifier.weight",))
    assert fresh.notes(("cow", "pig")) == []


def test_the_number_of_classes_of_weights(peer: nn.Module) -> None:
    assert class_count(cs.create_model(NAME), read_state_dict(peer.state_dict())) == CLASSES
    assert class_count(peer, read_state_dict({f"net.{k}": v for k, v in peer.state_dict().items()})) == CLASSES
    headless = {key: value for key, value in peer.state_dict().items() if not key.startswith("classifier")}
    assert class_count(cs.create_model(NAME), read_state_dict(headless)) is None


# ---------------------------------------------------------------- pickles

HARMLESS: list[object] = [
    argparse.Namespace(a=1, b=argparse.Namespace(c=2)),
    types.SimpleNamespace(a=1),
    np.float32(1.5),
    np.int64(3),
    np.arange(4),
    np.dtype("float32"),
    pathlib.PurePosixPath("/a/b"),
    pathlib.PureWindowsPath("c:/a"),
    Path("x"),
    datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    datetime.timedelta(seconds=3),
    collections.defaultdict(list, {"a": [1]}),
    collections.defaultdict(dict, {"a": {"b": 1}}),
    collections.OrderedDict(a=1),
    collections.Counter("aab"),
    collections.deque([1, 2], maxlen=3),
    torch.__version__,
    torch.device("cpu"),
    torch.float16,
]


@pytest.mark.parametrize("value", HARMLESS, ids=lambda value: type(value).__name__)
def test_what_trainers_store_beside_weights_does_no_harm(tmp_path: Path, value: object) -> None:
    before = set(torch.serialization.get_safe_globals())  # a list without an order
    torch.save({"state_dict": {"w": torch.arange(3.0)}, "beside": {"value": [value]}}, tmp_path / "x.pth")
    assert read_state_dict(tmp_path / "x.pth").tensors["w"].tolist() == [0, 1, 2]
    assert set(torch.serialization.get_safe_globals()) == before


def test_lightnings_and_hydras_dictionaries_are_stood_in_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is installed: classes of their names, which only the writing knows."""
    for module, name, bases in (
        ("lightning.fabric.utilities.data", "AttributeDict", (dict,)),
        ("omegaconf.dictconfig", "DictConfig", (object,)),
    ):
        made = types.ModuleType(module)
        kind = type(name, bases, {"__module__": module})
        setattr(made, name, kind)
        value = kind()
        if isinstance(value, dict):
            value["a"] = 1
        else:
            vars(value)["_content"] = {"a": 1}
        with monkeypatch.context() as patch:
            parts = module.split(".")
            for end in range(1, len(parts)):
                parent = ".".join(parts[:end])
                patch.setitem(sys.modules, parent, types.ModuleType(parent))
            patch.setitem(sys.modules, module, made)
            torch.save({"hyper_parameters": value, "state_dict": {"w": torch.zeros(1)}}, tmp_path / "x.ckpt")
        assert read_state_dict(tmp_path / "x.ckpt").tensors.keys() == {"w"}


class Calls:
    """Is unpickled by calling something."""

    def __init__(self, call: Any, *args: object) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[Any, tuple[object, ...]]:
        return self.call, self.args


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Calls(os.system, "touch ran"), r": it names (posix|nt)\.system"),
        (Calls(eval, "open('ran', 'w')"), ": it names eval"),
        (Calls(getattr, argparse.Namespace(a=1), "__class__"), ": it names getattr"),
        (Calls(pickle.loads, b"x"), r": it names pickle\.loads"),
        (argparse.Namespace(model=Calls(exec, "open('ran', 'w')")), ": it names exec"),
        ({"args": {"x": [Calls(os.system, "touch ran")]}}, r": it names (posix|nt)\.system"),
        (nn.Linear(1, 1), r": it names torch\.nn\.modules\.linear\.Linear"),
    ],
)
def test_what_would_call_or_import_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: object, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"w": torch.zeros(1)}, "args": value}, "x.pth")
    with pytest.raises(UserError, match=rf"\(a foreign pickle\), so it is not loaded{named}; save a state") as caught:
        read_state_dict("x.pth")
    assert "\n" not in str(caught.value)
    assert not Path("ran").exists()


def test_a_dictionary_in_itself_ends(tmp_path: Path) -> None:
    endless: dict[str, object] = {"epoch": 1}
    endless["model"] = endless
    torch.save(endless, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"holds no state dict; .* \(it holds epoch, model\)"):
        read_state_dict(tmp_path / "x.pth")


def test_a_checkpoint_folder_says_its_classes(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert read_state_dict(tmp_path).classes == ()
    (tmp_path / "checkpoint.json").write_text('{"classes": ["a", "b"]}')
    assert read_state_dict(tmp_path).classes == ("a", "b")


# ---------------------------------------------------------------- EfficientNet-PyTorch

B0 = (  # blocks, kernel, channels out, expansion: table 1 of the paper
    *((1, 3, 16, 1), (2, 3, 24, 6), (2, 5, 40, 6), (3, 3, 80, 6), (3, 5, 112, 6), (4, 5, 192, 6), (1, 3, 320, 6)),
)


def efficientnet_keys() -> dict[str, tuple[int, ...]]:
    """Keys and shapes of EfficientNet-PyTorch's B0 in its order, by hand."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, *shape: int, bias: bool = False) -> None:
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    def norm(name: str, width: int) -> None:
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{leaf}"] = (width,)
        shapes[f"{name}.num_batches_tracked"] = ()

    conv("_conv_stem", 32, 3, 3, 3)
    norm("_bn0", 32)
    width, number = 32, 0
    for blocks, kernel, out, expansion in B0:
        for _ in range(blocks):
            at, inner = f"_blocks.{number}", width * expansion
            if expansion > 1:
                conv(f"{at}._expand_conv", inner, width, 1, 1)
                norm(f"{at}._bn0", inner)
            conv(f"{at}._depthwise_conv", inner, 1, kernel, kernel)
            norm(f"{at}._bn1", inner)
            conv(f"{at}._se_reduce", width // 4, inner, 1, 1, bias=True)
            conv(f"{at}._se_expand", inner, width // 4, 1, 1, bias=True)
            conv(f"{at}._project_conv", out, inner, 1, 1)
            norm(f"{at}._bn2", out)
            width, number = out, number + 1
    conv("_conv_head", 1280, 320, 1, 1)
    norm("_bn1", 1280)
    conv("_fc", 1000, 1280, bias=True)
    return shapes


def test_efficientnet_pytorch_keys_run_as_tensorflows_network() -> None:
    """timm's tf_efficientnet_b0 has its layers in the same order: SAME padding, an epsilon of 1e-3."""
    timm = pytest.importorskip("timm")
    peer = timm.create_model("tf_efficientnet_b0").double().eval()
    generator = torch.Generator().manual_seed(3)
    state = peer.state_dict()
    for key, value in state.items():
        if key.endswith(("running_mean", "bias")):
            value.normal_(0, 0.2, generator=generator)
        elif key.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
    keys = efficientnet_keys()
    assert [tuple(value.shape) for value in state.values()] == list(keys.values())
    net = cs.create_model("efficientnet_b0").double().eval()
    weights = dict(zip(keys, state.values(), strict=True))
    loaded = cs.load_weights(net, weights)
    assert (loaded.layout, loaded.changed) == ("efficientnet_pytorch", "SAME padding and a norm epsilon of 0.001")
    assert loaded.notes() == [
        "weights: the network took over SAME padding and a norm epsilon of 0.001, which they were trained with"
    ]
    assert (net.spec.padding, net.spec.norm.eps) == ("same", 1e-3)
    x = torch.rand(1, 3, 65, 65, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        assert float((net(x) - peer(x)).abs().max() / peer(x).abs().max()) < 1e-10
    back = cs.export_weights(net, "efficientnet_pytorch")
    assert back.keys() == keys.keys()
    assert cs.load_weights(cs.create_model("tf_efficientnet_b0"), weights).changed == ""  # as it is


@pytest.mark.parametrize(("i", "blocks"), list(enumerate((16, 23, 23, 26, 32, 39, 45, 55))))
def test_efficientnet_pytorch_has_a_key_for_every_block(i: int, blocks: int) -> None:
    """The numbers of blocks of B0 to B7 as the paper's code builds them."""
    table = keymaps.layouts(cs.get_spec(f"efficientnet_b{i}"))["efficientnet_pytorch"](
        cs.get_spec(f"efficientnet_b{i}")
    )
    numbers = {int(key.split(".")[1]) for key in table.values() if key.startswith("_blocks.")}
    assert numbers == set(range(blocks))
