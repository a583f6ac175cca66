"""Names, tags and their published figures."""

import pytest

import convscale as cs
from convscale.arch.zoo import get_tag


def test_every_name_of_the_issue_is_there():
    names = set(cs.list_models())
    wanted = {
        "tresnet_m",
        "tresnet_l",
        "tresnet_xl",
        "tresnet_v2_l",
        "resnext50_32x4d",
        "resnext101_32x8d",
        "seresnext50_32x4d",
        "wide_resnet50_2",
    }
    wanted |= {f"{tf}efficientnet_b{i}" for tf in ("", "tf_") for i in range(8)} | {
        f"{tf}efficientnet_lite{i}" for tf in ("", "tf_") for i in range(5)
    }
    wanted |= {f"resnet{d}" for d in (18, 34, 50, 101, 152, 200)} | {f"resnet{d}d" for d in (50, 101, 152)}
    wanted |= {
        "mobilenetv1_100",
        "mobilenetv2_050",
        "mobilenetv2_100",
        "mobilenetv2_140",
        "mnasnet_100",
        "mixnet_s",
        "mixnet_m",
        "mixnet_l",
    }
    wanted |= {
        f"convnext{v2}_{size}"
        for v2 in ("", "v2")
        for size in ("atto", "femto", "pico", "nano", "tiny", "small", "base", "large")
    }
    wanted |= {
        f"mobilenetv4_conv_{size}"
        for size in ("small", "small_050", "medium", "large", "aa_medium", "aa_large", "blur_medium")
    }
    wanted |= {f"hgnetv2_b{i}" for i in range(7)}
    assert wanted <= names


def test_list_models_filters():
    assert cs.list_models("tresnet_?") == ["tresnet_l", "tresnet_m"]
    assert cs.list_models("tresnet_m", pretrained=True) == [
        "tresnet_m.miil_in1k",
        "tresnet_m.miil_in1k_448",
        "tresnet_m.miil_in21k",
        "tresnet_m.miil_in21k_ft_in1k",
    ]
    assert cs.list_models("nothing*") == []


def test_unknown_names_name_the_nearest():
    with pytest.raises(ValueError, match=r"unknown model 'tresnet_n' \(nearest: .*tresnet_m"):
        cs.get_spec("tresnet_n")
    with pytest.raises(
        ValueError, match=r"unknown weights 'tresnet_l\.miil' \(known for tresnet_l: tresnet_l\.miil_in1k"
    ):
        cs.get_spec("tresnet_l.miil")
    with pytest.raises(ValueError, match="no released weights are known for resnet200"):
        get_tag("resnet200")


def test_tag_sets_the_input():
    spec = cs.get_spec("tresnet_m.miil_in1k_448")
    assert (spec.input.size, spec.input.mean, spec.input.std, spec.input.crop_pct) == (
        448,
        (0.0, 0.0, 0.0),
        (1.0, 1.0, 1.0),
        0.875,
    )
    assert spec.name == "tresnet_m.miil_in1k_448"
    assert cs.get_spec("efficientnet_b1.ra4_e3600_r240_in1k").input.mean == (0.5, 0.5, 0.5)


# the papers' and their authors' figures (PAPERS.md), which the table of another author must be near
@pytest.mark.parametrize(
    ("tag", "image_size", "top1"),
    [
        ("tresnet_m.miil_in1k", 224, 80.8),
        ("tresnet_l.miil_in1k", 224, 81.5),
        ("tresnet_xl.miil_in1k", 224, 82.0),
        ("tresnet_m.miil_in21k_ft_in1k", 224, 83.1),
    ],
)
def test_published_accuracy(tag, image_size, top1):
    results = {r.image_size: r for r in get_tag(tag).results}
    assert results[image_size].top1 == pytest.approx(top1, abs=0.1)
    assert "timm" in results[image_size].source


def test_tags_agree_with_timm():
    timm = pytest.importorskip("timm")
    for name in cs.list_models(pretrained=True):
        cfg = timm.models.get_pretrained_cfg(name)
        pixels = cs.get_spec(name).input
        assert (pixels.size, pixels.mean, pixels.std, pixels.crop_pct) == (
            cfg.input_size[-1],
            cfg.mean,
            cfg.std,
            cfg.crop_pct,
        ), name
        assert get_tag(name).num_classes == cfg.num_classes
    assert get_tag("resnet50").name == f"resnet50.{timm.models.get_pretrained_cfg('resnet50').tag}"
