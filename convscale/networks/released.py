"""Networks that somebody released with a published ImageNet-1k figure, and what is known of each: a table, no torch.

``released.json`` is written by ``python -m benchmarks.released`` from timm's results table and the model cards of the
installed timm; each entry's ``source`` names both.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files

from convscale.arch.tags import PublishedAccuracy
from convscale.networks.foreign import Foreign


@dataclass(frozen=True, kw_only=True)
class Released:
    """Released weights with their published figures and what must be known to take them."""

    name: str
    """``arch.tag``; the tag names the training recipe."""
    arch: str
    """The architecture's name."""
    family: str
    """The module of timm's that it stands in."""
    image_size: int
    """Side of the images that they were last trained at, pixels."""
    params: int
    """Parameters as trained."""
    licence: str
    """Of the weights, as timm's model card states it; ``unknown`` where it does not."""
    extra_data: str
    """Images beside ImageNet-1k's that they were trained on; empty: none."""
    attention: bool
    """Whether it mixes positions by anything but convolutions and pools: attention, mixer layers, recurrence."""
    fused: bool
    """Whether it has a re-parameterised form for inference, in which it is counted and timed."""
    results: tuple[PublishedAccuracy, ...]
    """Published figures, each at its own size and crop; at least one."""

    @property
    def recipe(self) -> str:
        """The part of the name after the dot."""
        return self.name.partition(".")[2]

    @property
    def network(self) -> Foreign:
        """Its architecture as timm builds it: speed does not depend on the weights."""
        return Foreign(self.arch, "timm", family=self.family)


@cache
def _table() -> dict[str, object]:
    table = json.loads(files("convscale.networks").joinpath("released.json").read_text(encoding="utf-8"))
    assert isinstance(table, dict)
    return table


@cache
def released() -> dict[str, Released]:
    """Every one by its name, in the order of their best figure, the most accurate first."""
    table = _table()
    source, architectures_, rows = str(table["source"]), table["architectures"], table["weights"]
    assert isinstance(architectures_, dict)
    assert isinstance(rows, dict)
    found = {}
    for name, row in rows.items():
        arch = name.partition(".")[0]
        results = [
            PublishedAccuracy(image_size=size, crop_pct=crop, interpolation=how, top1=top1, top5=top5, source=source)
            for size, crop, how, top1, top5 in row["results"]
        ]
        found[name] = Released(
            name=name,
            arch=arch,
            image_size=row["image_size"],
            licence=row["licence"],
            extra_data=extra_data(name),
            results=tuple(results),
            **architectures_[arch],
        )
    return found


@cache
def architectures() -> dict[str, Foreign]:
    """Architectures of released weights, as timm builds them."""
    return {each.arch: each.network for each in released().values()}


@cache
def fused_architectures() -> dict[str, bool]:
    """Whether each architecture has a re-parameterised form."""
    return {each.arch: each.fused for each in released().values()}


def timm_of_the_table() -> str:
    """The version of timm that the table was made with."""
    return str(_table()["timm"])


@cache
def buildable() -> frozenset[str]:
    """Architectures of the table that the installed timm builds; empty where it is not installed.

    Of the version that the table was made with it is all of them, and timm need not be imported to know it.
    """
    try:
        installed = version("timm")
    except PackageNotFoundError:
        return frozenset()
    if installed == timm_of_the_table():
        return frozenset(architectures())
    import timm

    return frozenset(arch for arch in architectures() if timm.is_model(arch))


# ---------------------------------------------------------------- extra data, by what the names of weights say

_DATA = {
    "in12k": "ImageNet-12k",  # the 11,821 classes of ImageNet-22k with the most images (timm, Wightman)
    "in21k": "ImageNet-21k",
    "in22k": "ImageNet-22k",
    "inw21k": "ImageNet-21k (winter 2021)",  # MViTv2, arXiv 2112.01526
    "jft": "JFT-300M",  # noisy student, arXiv 1911.04252
    "ig1b": "Instagram-1B",  # weak and semi-weak supervision, arXiv 1805.00932, 1905.00546
    "yfcc100m": "YFCC-100M",  # semi-supervision, arXiv 1905.00546
    "swag": "Instagram-3.6B",  # SWAG, arXiv 2201.08371
    "seer": "unlabelled Instagram-1B",  # SEER, arXiv 2202.08360
    "laion2b": "LAION-2B",  # OpenCLIP
    "laiona": "LAION-Aesthetic",  # OpenCLIP
    "openai": "OpenAI's 400M pairs of image and text",  # CLIP, arXiv 2103.00020
    "webli": "WebLI",  # SigLIP, arXiv 2303.15343
    "m30m": "Merged-30M",  # EVA, arXiv 2211.07636
    "m38m": "Merged-38M",  # EVA-02, arXiv 2303.11331
    "dinov2": "LVD-142M",  # arXiv 2304.07193
    "lvd142m": "LVD-142M",
    "lvd1689m": "LVD-1689M",  # DINOv3, arXiv 2508.10104
    "metaclip": "MetaCLIP-400M",  # arXiv 2309.16671
    "dfn5b": "DFN-5B",  # arXiv 2309.17425
    "datacomp1b": "DataComp-1B",  # arXiv 2304.14108
}
"""Words in the names of weights (parted by ``_``) that name data, with the source of what they stand for."""
_PREFIXES = ("datacomp", "laion400m", "metaclip", "dfn", "ig", "lvd", "yfcc")
"""Beginnings of words that name data of which ``_DATA`` does not hold every size: told as they stand."""
_SSLD = "unlabelled ImageNet-22k"
"""Semi-supervised distillation mines 4 million images of ImageNet-22k (PaddleClas, arXiv 2103.05959), Next-ViT's 6
million (arXiv 2207.05501)."""
_SPECIAL = {
    "eva_giant_patch14_224.clip_ft_in1k": "Merged-30M, LAION-400M",  # EVA-CLIP, arXiv 2211.07636
    "eva_giant_patch14_336.clip_ft_in1k": "Merged-30M, LAION-400M",
    "beit3_base_patch16_224.indomain_in22k_ft_in1k": "ImageNet-22k, pairs of image and text",  # arXiv 2208.10442
    "beit3_large_patch16_224.indomain_in22k_ft_in1k": "ImageNet-22k, pairs of image and text",
    "beit3_base_patch16_224.in22k_ft_in1k": "ImageNet-22k, pairs of image and text",
    "beit3_large_patch16_224.in22k_ft_in1k": "ImageNet-22k, pairs of image and text",
}
"""Weights whose name says less than their paper."""


def extra_data(name: str) -> str:
    """What weights were trained on beside ImageNet-1k, by the conventions of timm's names; empty: nothing.

    A teacher that weights were distilled from is not counted: it gave labels, not images. ``ns_jft`` and the like are
    counted, since the student saw the images.

    Args:
        name: ``arch.tag``; an architecture alone has no weights and so no data.
    """
    if name in _SPECIAL:
        return _SPECIAL[name]
    words = name.partition(".")[2].split("_")
    found = [_DATA.get(word) or (word if word.startswith(_PREFIXES) else "") for word in words]
    if "ssld" in words:
        found.append(_SSLD)
    return ", ".join(dict.fromkeys(data for data in found if data))
