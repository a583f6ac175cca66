"""Public functions of building, naming, scaling and loading, given what they do not take: one clear line each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convscale as cs

NAN, HUGE = float("nan"), 10**400
cs_any: Any = cs  # these calls are wrong by type too, on purpose

NOT_WHOLE = ["3", True, 2.5, NAN, None, [3], 2**31]
NOT_RATE = ["0.1", True, NAN, -0.1, 1.0, 1, float("inf"), HUGE, None, [0.1]]
NOT_FACTOR = ["2", True, NAN, float("inf"), 0, -1.0, HUGE, [2]]
NOT_TEXT = [5, True, NAN, None, ["avg"], b"avg"]
NOT_FLAG = ["false", 1, 0, None, NAN]
NOT_SIZE = [0, -1, True, "224", 224.0, NAN, 2**31, (224, 224)]


def made(option: str, values: list[Any], *names: str) -> list[Any]:
    """A case for every value of an option, and what the message must name."""
    return [pytest.param(option, value, names or (option,), id=f"{option}={value!r}"[:40]) for value in values]


def refused(call: Callable[[], object], *names: str) -> None:
    """One line that names what was wrong."""
    with pytest.raises(cs.UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert all(name in message for name in names), message


@pytest.mark.parametrize(
    ("option", "value", "names"),
    [
        *made("num_classes", [value for value in NOT_WHOLE if value is not None] + [-1]),
        *made("in_chans", [*NOT_WHOLE, 0, -3]),
        *made("drop_rate", NOT_RATE),
        *made("drop_path_rate", NOT_RATE),
        *made("global_pool", [*NOT_TEXT, "avrage"]),
        *made("norm", [5, True, "batch_norm", ["inplace"]]),
        *made("pretrained", NOT_FLAG),
        *made("features_only", NOT_FLAG),
        *made("checkpoint_path", [5, True, b"x", ["x"]]),
    ],
)
def test_create_model(option: str, value: object, names: tuple[str, ...]) -> None:
    refused(lambda: cs_any.create_model("resnet18", **{option: value}), *names)


@pytest.mark.parametrize("value", [5, None, True, NAN, ["resnet18"], b"resnet18"])
def test_names(value: object) -> None:
    refused(lambda: cs_any.create_model(value), repr(value))
    refused(lambda: cs_any.get_spec(value), repr(value))
    refused(lambda: cs_any.scale(value, phi=1), repr(value))
    refused(lambda: cs_any.list_models(value), "pattern", repr(value))


@pytest.mark.parametrize("value", NOT_FLAG)
def test_list_models_pretrained(value: object) -> None:
    refused(lambda: cs_any.list_models(pretrained=value), "pretrained", repr(value))


@pytest.mark.parametrize("value", [["a", "b"], [0.5], True, "12", 1.5, {0}, NAN])
def test_out_indices(value: object) -> None:
    refused(lambda: cs_any.create_model("resnet18", features_only=True, out_indices=value), "out_indices")
    net = cs_any.create_model("resnet18")
    refused(lambda: net.forward_intermediates(torch.zeros(1, 3, 32, 32), indices=value), "indices")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"features_only": True, "num_classes": 10}, "num_classes is 10"),
        ({"features_only": True, "drop_rate": 0.2}, "drop_rate is 0.2"),
        ({"features_only": True, "global_pool": "max"}, "global_pool is 'max'"),
        ({"out_indices": (0, 1)}, "features_only=True"),
    ],
)
def test_options_that_would_be_ignored(options: dict[str, Any], name: str) -> None:
    refused(lambda: cs_any.create_model("resnet18", **options), name)


def test_what_features_only_uses() -> None:
    net = cs.create_model("resnet18", features_only=True, num_classes=0, in_chans=1, drop_path_rate=0.1, out_indices=2)
    maps = net(torch.zeros(2, 1, 64, 64))
    assert [tuple(m.shape) for m in maps] == [(2, 256, 4, 4), (2, 512, 2, 2)]
    assert net.stages[3][1].drop_path.rate == pytest.approx(0.1)  # type: ignore[index, union-attr]


@pytest.mark.parametrize(
    ("option", "value", "names"),
    [
        *(case for name in ("depth", "width", "resolution") for case in made(name, NOT_FACTOR)),
        *made("image_size", NOT_SIZE, "image size"),
        *made("divisor", ["8", True, 0, -8, 2.5, NAN, [8], 2**31]),
        *made("phi", ["1", True, NAN, 21, -21, HUGE, [1]]),
    ],
)
def test_scale(option: str, value: object, names: tuple[str, ...]) -> None:
    refused(lambda: cs_any.scale("resnet18", **{option: value}), *names, repr(value)[:190])


@pytest.mark.parametrize(
    ("option", "value", "names"),
    [
        *(case for name in ("alpha", "beta", "gamma") for case in made(name, ["1.2", True, NAN, 0.5, None])),
        *made("rule", [5, None, True, ["fast"], "fats"], "scaling rule"),
        *made("name", [5, True, ["x"]]),
    ],
)
def test_scale_by_phi(option: str, value: object, names: tuple[str, ...]) -> None:
    refused(lambda: cs_any.scale("resnet18", phi=1, **{option: value}), *names)


@pytest.mark.parametrize("value", ["0.8", True, NAN, -0.1, 1.1, None])
def test_width_share(value: object) -> None:
    refused(lambda: cs_any.scale("resnet18", phi=1, rule="fast", width_share=value), "width_share", repr(value))


@pytest.mark.parametrize("value", [5, True, None, ["a.json"], b"a.json"])
def test_spec_files(value: object) -> None:
    refused(lambda: cs_any.load_spec(value), "spec file", repr(value))
    refused(lambda: cs_any.save_spec(cs.get_spec("resnet18"), value), "spec file", repr(value))
    refused(lambda: cs_any.save_spec(value, "a.json"), "NetSpec", repr(value))


@pytest.mark.parametrize("value", [-1, "10", True, 2.5, NAN, None, [10]])
def test_reset_classifier_leaves_the_network_as_it_was(value: Any) -> None:
    net = cs.create_model("resnet18", num_classes=7)
    classifier = net.classifier
    refused(lambda: net.reset_classifier(value), "num_classes", repr(value))
    refused(lambda: net.reset_classifier(3, global_pool=5), "global_pool", "5")  # type: ignore[arg-type]
    refused(lambda: net.reset_classifier(3, global_pool=""), "global_pool")
    assert net.classifier is classifier
    assert (net.num_classes, net.pretrained_cfg["num_classes"], net.global_pool.kind) == (7, 7, "avg")


@pytest.mark.parametrize("value", NOT_FLAG)
def test_flags_of_a_network(value: Any) -> None:
    net, x = cs.create_model("resnet18"), torch.zeros(1, 3, 32, 32)
    refused(lambda: net.set_grad_checkpointing(value), "enable", repr(value))
    refused(lambda: net.group_matcher(value), "coarse", repr(value))
    for option in ("norm", "stop_early", "intermediates_only"):
        refused(lambda option=option: net.forward_intermediates(x, **{option: value}), option, repr(value))
    refused(lambda: net.forward_intermediates(x, output_fmt=value), "output_fmt", repr(value))


@pytest.mark.parametrize("value", [5, True, b"x", ["x"], None])
def test_weights_of_the_wrong_kind(value: Any) -> None:
    net = cs.create_model("resnet18", num_classes=3)
    refused(lambda: cs.load_weights(net, value), "weights", repr(value))
    refused(lambda: cs.load_weights(value, {"a": torch.zeros(1)}), "load_weights takes a network")
    refused(lambda: cs.export_weights(value), "export_weights takes a network")
    refused(lambda: cs.convert_norm(value), "convert_norm takes a network")
    refused(lambda: cs.export_weights(net, layout=value), "layout", repr(value))
    refused(lambda: cs.convert_norm(net, to=value), "to must be", repr(value))
    if value is not None:
        refused(lambda: cs.load_weights(net, net.state_dict(), layout=value), "layout", repr(value))


@pytest.mark.parametrize("value", NOT_FLAG)
def test_allow_head_mismatch(value: Any) -> None:
    net = cs.create_model("resnet18", num_classes=3)
    refused(lambda: cs.load_weights(net, net.state_dict(), allow_head_mismatch=value), "allow_head_mismatch")


# ------------------------------------------------------------------ weights of modules that are not ours


class Plain(nn.Module):
    """A user's own network."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.hidden = nn.Linear(4, 5)
        self.last = nn.Linear(5, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(self.body(x)))


def test_a_plain_module_keeps_its_own_classifier_where_that_is_allowed() -> None:
    source, net = Plain(9), Plain(3)
    own = net.last.weight.detach().clone()
    refused(lambda: cs.load_weights(net, source.state_dict()), "last.weight is (9, 5)", "allow_head_mismatch=True")
    loaded = cs.load_weights(net, source.state_dict(), allow_head_mismatch=True)
    assert (loaded.layout, loaded.fresh) == ("own", ("last.weight", "last.bias"))
    assert torch.equal(net.last.weight, own)
    assert torch.equal(net.hidden.weight, source.hidden.weight)
    assert torch.equal(net.body[0].weight, source.body[0].weight)  # type: ignore[arg-type]


def test_only_the_classifier_may_differ() -> None:
    source, net = Plain(3).state_dict(), Plain(3)
    source["hidden.weight"] = torch.zeros(6, 4)
    refused(lambda: cs.load_weights(net, source, allow_head_mismatch=True), "hidden.weight is (6, 4)")


def test_a_classifier_is_what_the_config_names() -> None:
    timm = pytest.importorskip("timm")
    source, net = timm.create_model("resnet18", num_classes=9), timm.create_model("resnet18", num_classes=3)
    loaded = cs.load_weights(net, source.state_dict(), allow_head_mismatch=True)
    assert loaded.fresh == ("fc.weight", "fc.bias")
    assert torch.equal(net.conv1.weight, source.conv1.weight)
    distilled = [timm.create_model("deit_tiny_distilled_patch16_224", num_classes=n) for n in (9, 3)]
    loaded = cs.load_weights(distilled[1], distilled[0].state_dict(), allow_head_mismatch=True)
    assert loaded.fresh == ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")


@pytest.mark.parametrize(
    ("layout", "names"),
    [("tim", ("layout 'tim' is unknown", "timm")), ("timm", ("layout is 'timm'", "Plain", "its own keys only"))],
)
def test_a_plain_module_has_no_other_layout(layout: str, names: tuple[str, ...]) -> None:
    net = Plain(3)
    refused(lambda: cs.load_weights(net, net.state_dict(), layout=layout), *names)


def test_a_plain_modules_counters_may_be_missing() -> None:
    """Checkpoints from before PyTorch 0.4.1 have none; ours load without them too."""
    source, net = Plain(3).state_dict(), Plain(3)
    del source["body.1.num_batches_tracked"]
    cs.load_weights(net, source)
    assert torch.equal(net.hidden.bias, source["hidden.bias"])


# ------------------------------------------------------------------ modes


def test_conversions_keep_every_modules_mode() -> None:
    """A submodule that was frozen in evaluation mode stays so."""
    net = cs.create_model("tresnet_m", num_classes=3)
    net.stem.eval()
    net.stages[1].eval()
    net.classifier.eval()

    def modes(network: nn.Module) -> dict[str, bool]:
        names = ("stem.0.norm", "stages.0.0.conv1.norm", "stages.1.0.conv1.norm", "stages.3.0.conv2.norm", "classifier")
        return {name: network.get_submodule(name).training for name in names}

    before = modes(net)
    assert list(before.values()) == [False, True, False, True, False]
    plain = cs.convert_norm(net, to="batchnorm")
    assert modes(plain) == before
    assert modes(cs.convert_norm(plain, to="inplace")) == before
    assert modes(net) == before
    net.reset_classifier(5)
    assert modes(net) == before
