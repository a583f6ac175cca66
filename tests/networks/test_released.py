"""The table of released networks against figures copied by hand from timm's results table and model cards."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from fnmatch import fnmatchcase

import pytest

import convscale as cs
from convscale.arch.zoo import ARCHITECTURES
from convscale.networks import foreign, offered, released
from convscale.networks.offered import Filter, Weights, in_zoo, known_licences
from convscale.networks.released import extra_data


@pytest.mark.parametrize(
    ("name", "size", "crop_pct", "top1", "top5", "params_m"),
    [
        ("convnext_tiny.in12k_ft_in1k", 288, 1.0, 84.448, 97.328, 28.59),
        ("convnext_tiny.in12k_ft_in1k", 224, 0.95, 84.192, 97.132, 28.59),
        ("tf_efficientnetv2_s.in21k_ft_in1k", 384, 1.0, 84.332, 97.274, 21.46),
        ("tf_efficientnetv2_s.in21k_ft_in1k", 300, 1.0, 83.348, 96.710, 21.46),
        ("vit_base_patch16_224.augreg_in21k_ft_in1k", 224, 0.9, 84.534, 97.300, 86.57),
        ("regnety_160.deit_in1k", 288, 1.0, 83.704, 96.790, 83.59),
        ("dm_nfnet_f0.dm_in1k", 256, 0.9, 83.468, 96.570, 71.49),
        ("resnet50.a1_in1k", 288, 1.0, 81.240, 95.112, 25.56),
        ("mobilevitv2_100.cvnets_in1k", 256, 0.888, 78.088, 94.170, 4.90),
        ("densenet121.ra_in1k", 224, 0.875, 75.574, 92.648, 7.98),
        ("repvgg_b0.rvgg_in1k", 224, 0.875, 75.158, 92.410, 15.82),
        ("vgg16.tv_in1k", 224, 0.875, 71.594, 90.398, 138.36),
    ],
)
def test_figures_are_those_of_timms_table(
    name: str, size: int, crop_pct: float, top1: float, top5: float, params_m: float
) -> None:
    """Rows of results-imagenet.csv; each figure at its own size and crop."""
    found = released.released()[name]
    (figure,) = (result for result in found.results if result.image_size == size)
    assert (figure.crop_pct, figure.top1, figure.top5) == (crop_pct, top1, top5)
    assert found.params / 1e6 == pytest.approx(params_m, abs=0.006)
    assert "results-imagenet.csv" in figure.source


@pytest.mark.parametrize(
    ("name", "licence", "data"),
    [
        ("convnext_tiny.in12k_ft_in1k", "apache-2.0", "ImageNet-12k"),
        ("convnextv2_nano.fcmae_ft_in22k_in1k", "cc-by-nc-4.0", "ImageNet-22k"),
        ("resnext101_32x8d.fb_swsl_ig1b_ft_in1k", "cc-by-nc-4.0", "Instagram-1B"),
        ("tf_efficientnetv2_s.in21k_ft_in1k", "apache-2.0", "ImageNet-21k"),
        ("tf_efficientnet_l2.ns_jft_in1k", "apache-2.0", "JFT-300M"),
        ("repvgg_b0.rvgg_in1k", "mit", ""),
        ("vgg16.tv_in1k", "bsd-3-clause", ""),
        ("res2net50d.in1k", "unknown", ""),
        ("fastvit_t8.apple_in1k", "fastvit-license", ""),
    ],
)
def test_licences_and_data_are_those_of_the_cards(name: str, licence: str, data: str) -> None:
    """Licences by timm's model cards; data by the papers that the tags stand for."""
    found = released.released()[name]
    assert (found.licence, found.extra_data) == (licence, data)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("vit_base_patch16_clip_224.laion2b_ft_in12k_in1k", "LAION-2B, ImageNet-12k"),
        ("vit_base_patch16_clip_224.openai_ft_in1k", "OpenAI's 400M pairs of image and text"),
        ("regnety_160.swag_ft_in1k", "Instagram-3.6B"),
        ("hgnetv2_b0.ssld_stage1_in22k_in1k", "ImageNet-22k, unlabelled ImageNet-22k"),
        ("eva_giant_patch14_224.clip_ft_in1k", "Merged-30M, LAION-400M"),
        ("resnet50.fb_ssl_yfcc100m_ft_in1k", "YFCC-100M"),
        ("deit_base_distilled_patch16_224.fb_in1k", ""),
        ("vit_base_patch16_224.mae_in1k_ft_in1k", ""),
        ("resnet50", ""),
    ],
)
def test_tags_say_what_was_seen(name: str, data: str) -> None:
    assert extra_data(name) == data


def test_what_is_a_convnet_is_by_its_paper() -> None:
    table = released.released().values()
    families = {each.family: each.attention for each in table}
    for family in ("convnext", "vgg", "densenet", "repghost", "nfnet", "regnet", "dla", "convmixer", "inception_next"):
        assert not families[family], family
    for family in (
        "vision_transformer",
        "swin_transformer",
        "mlp_mixer",
        "sequencer",
        "swiftformer",
        "xcit",
        "maxxvit",
    ):
        assert families[family], family
    by_name = {each.arch: each.attention for each in table}
    assert by_name["caformer_s18"]
    assert not by_name["convformer_s18"]
    assert by_name["mobilenetv4_hybrid_medium"]
    assert not by_name["mobilenetv4_conv_small"]
    assert by_name["mobilevitv2_100"]  # attention without a product of maps


def test_what_has_a_form_for_inference() -> None:
    fused = released.fused_architectures()
    for arch in ("repvgg_b0", "mobileone_s1", "repvit_m1", "fastvit_t8", "repghostnet_100"):
        assert fused[arch], arch
    assert not fused["convnext_tiny"]
    assert not fused["resnet50"]


# ---------------------------------------------------------------- filters


def names(found: list[Weights]) -> set[str]:
    return {each.name for each in found}


def test_own_architectures_count_once() -> None:
    everything, own, timms = (in_zoo(zoo) for zoo in ("all", "own", "timm"))
    assert everything["resnet50.a1_in1k"].zoo == "own"
    assert timms["resnet50.a1_in1k"].zoo == "timm"
    assert everything["convnext_tiny.fb_in1k"].zoo == "own"
    assert set(own) <= set(everything)
    assert {each.arch for each in everything.values() if each.zoo == "timm"} & set(ARCHITECTURES) == set()


def test_the_default_is_every_convnet() -> None:
    found = offered.offered()
    assert not any(each.attention for each in found)
    assert {"convnext_tiny.in12k_ft_in1k", "resnet50.a1_in1k", "tresnet_m.miil_in1k"} <= names(found)
    more = names(offered.offered(Filter(attention=True)))
    assert names(found) < more
    assert "vit_base_patch16_224.augreg_in21k_ft_in1k" in more - names(found)


def test_licences_and_data_are_filtered() -> None:
    assert {each.licence for each in offered.offered(Filter(licences=("mit", "bsd-3-clause")))} == {
        "mit",
        "bsd-3-clause",
    }
    sold = offered.offered(Filter(commercial=True))
    assert not {"unknown", "cc-by-nc-4.0"} & {each.licence for each in sold}
    assert {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0"} & {each.licence for each in sold}
    assert "convnextv2_nano.fcmae_ft_in22k_in1k" not in names(sold)
    plain = offered.offered(Filter(extra_data=False))
    assert {each.extra_data for each in plain} == {""}
    assert "convnext_tiny.fb_in1k" in names(plain)
    assert "convnext_tiny.in12k_ft_in1k" not in names(plain)


def test_patterns_select_and_names_need_no_option_for_attention() -> None:
    found = offered.offered(patterns=["repvgg_*", "resnet50"])
    assert all(fnmatchcase(each.name, "repvgg_*") or each.arch == "resnet50" for each in found)
    assert {each.zoo for each in found if each.arch == "resnet50"} == {"own"}
    assert {each.zoo for each in offered.offered(patterns=["timm/resnet50"])} == {"timm"}
    named = "vit_base_patch16_224.augreg_in21k_ft_in1k"
    assert names(offered.offered(patterns=[named])) == {named}
    with pytest.raises(cs.UserError, match=r"match 'vit_base\*', but all have attention: --attention takes them"):
        offered.offered(patterns=["vit_base*"])
    with pytest.raises(cs.UserError, match="are left out by --licence mit --commercial"):
        offered.offered(Filter(licences=("mit",), commercial=True), patterns=["convnext_tiny.fb_in1k"])


def test_an_unknown_word_is_told_with_the_known_ones() -> None:
    with pytest.raises(cs.UserError, match=r"licence 'gpl' is unknown \(known: apache-2.0, bsd-3-clause, .*unknown\)"):
        Filter(licences=("gpl",))
    with pytest.raises(cs.UserError, match=r"zoo 'hub' is unknown \(known: own, timm, all\)"):
        Filter(zoo="hub")
    assert "\n" not in " ".join(known_licences())


@pytest.fixture
def no_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where timm is not installed."""

    def gone(name: str) -> str:
        if name == "timm":
            raise importlib.metadata.PackageNotFoundError(name)
        return importlib.metadata.version(name)

    monkeypatch.setattr(foreign, "find_spec", lambda name: None)
    monkeypatch.setattr(released, "version", gone)
    for cached in (released.buildable, offered._timms):
        cached.cache_clear()
    monkeypatch.setitem(sys.modules, "timm", None)
    yield
    for cached in (released.buildable, offered._timms):
        cached.cache_clear()


def test_without_timm_the_own_zoo_is_left(no_timm: None) -> None:
    assert {each.zoo for each in offered.offered()} == {"own"}
    for ask in (lambda: Filter(zoo="timm"), lambda: offered.offered(patterns=["timm/resnet50"])):
        with pytest.raises(cs.UserError, match=r"timm is not installed; pip install 'convscale\[timm\]'"):
            ask()


def test_without_timm_its_networks_are_refused_in_one_line(no_timm: None) -> None:
    assert "densenet121" not in ARCHITECTURES
    for ask in (lambda: cs.count("densenet121.tv_in1k"), lambda: cs.choose(candidates="densenet*", max_params_m=9)):
        with pytest.raises(cs.UserError, match=r"timm is not installed; pip install 'convscale\[timm\]'") as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_another_timm_is_asked_what_it_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    monkeypatch.setattr(released, "version", lambda name: "0.0.1")
    monkeypatch.setattr(timm, "is_model", lambda arch: arch == "convnext_tiny")
    released.buildable.cache_clear()
    try:
        assert released.buildable() == {"convnext_tiny"}
    finally:
        released.buildable.cache_clear()


def test_asking_for_offers_loads_neither_torch_nor_timm() -> None:
    script = (
        "import sys\n"
        "from convscale.networks.offered import offered\n"
        "from convscale.networks.resolve import find\n"
        "assert len(offered()) > 500\n"
        "find('regnety_160.deit_in1k')\n"
        "sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
