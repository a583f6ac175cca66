"""Write convscale/arch/tags.json: released weights, their preprocessing, and their published accuracy.

    python -m benchmarks.tags --results results-imagenet.csv

The preprocessing and repositories come from the installed timm's model cards, the accuracy from the results table that
timm publishes in its results folder. Only figures are taken, for the names in this project's zoo. CLIP's weights are
left out where nobody fine-tuned them to classify.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from convscale.arch.zoo import ARCHITECTURES
from convscale.files import write_json

SOURCE = "timm results/results-imagenet.csv (huggingface/pytorch-image-models)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="timm's results-imagenet.csv")
    parser.add_argument("--output", type=Path, default=Path("convscale/arch/tags.json"))
    args = parser.parse_args()
    import timm
    from timm.models import get_pretrained_cfg

    accuracy: dict[str, list[dict]] = {}
    with open(args.results, newline="") as file:
        for row in csv.DictReader(file):
            accuracy.setdefault(row["model"], []).append(
                {
                    "image_size": int(row["img_size"]),
                    "crop_pct": float(row["crop_pct"]),
                    "interpolation": row["interpolation"],
                    "top1": float(row["top1"]),
                    "top5": float(row["top5"]),
                }
            )
    tags = {}
    for arch in ARCHITECTURES:
        for full in timm.list_models(f"{arch}.*", pretrained=True):
            cfg = get_pretrained_cfg(full)
            assert cfg is not None
            if ".clip_" in full and "_ft_" not in full:
                continue  # it gives embeddings of pictures, not classes
            tags[full] = {
                "default": get_pretrained_cfg(arch).tag == cfg.tag,  # type: ignore[union-attr]
                "hf_hub_id": f"timm/{full}",
                "image_size": cfg.input_size[-1],
                "mean": list(cfg.mean),
                "std": list(cfg.std),
                "interpolation": cfg.interpolation,
                "crop_pct": cfg.crop_pct,
                **({} if cfg.crop_mode == "center" else {"crop_mode": cfg.crop_mode}),
                "num_classes": cfg.num_classes,
                "license": cfg.license,
                "origin": cfg.origin_url,
                "results": sorted(accuracy.get(full, []), key=lambda r: r["image_size"]),
            }
    write_json(args.output, {"source": f"{SOURCE}; timm {timm.__version__}", "tags": tags})
    print(
        f"{len(tags)} tags, {sum(bool(t['results']) for t in tags.values())} with a published ImageNet-1k accuracy -> "
        f"{args.output}"
    )


if __name__ == "__main__":
    main()
