"""Write convscale/networks/released.json: every weight of timm's that has a published ImageNet-1k figure.

    python -m benchmarks.released --results results-imagenet.csv

Figures are from the results table that timm publishes in its results folder (Apache-2.0), which travels with the
package as data, its source beside it. Licences and training sizes are from the model cards of the installed timm,
parameters from its networks on the meta device. Whether a network is a ConvNet is settled by a trace (does it multiply
maps with each other?) and, where no trace can tell, by the list of families here. Takes about 4 minutes.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

from convscale.conditions import Conditions
from convscale.cost.tracing import trace
from convscale.errors import UserError
from convscale.files import write_text
from convscale.networks.foreign import Foreign, build_foreign, is_reparameterizable
from convscale.predictor.workload import workload_of

SOURCE = "timm results/results-imagenet.csv (huggingface/pytorch-image-models, Apache-2.0)"
NO_CONVNETS = {
    "mobilevit": "separable self-attention weighs positions without a product of maps (MobileViTv2)",
    "swiftformer": "additive attention",
    "sequencer": "recurrence over rows and columns",
    "mlp_mixer": "linear layers over positions",
    "edgenext": "attention over channels",
    "xcit": "attention over channels",
}
"""Families that are no ConvNets by their papers whatever a trace of a member shows."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="timm's results-imagenet.csv")
    parser.add_argument("--output", type=Path, default=Path("convscale/networks/released.json"))
    args = parser.parse_args()
    import timm
    from timm.models import get_pretrained_cfg

    figures: dict[str, list[tuple[int, float, str, float, float]]] = {}
    with open(args.results, newline="") as file:
        for row in csv.DictReader(file):
            crop = float(row["crop_pct"]), row["interpolation"]
            figure = (int(row["img_size"]), *crop, float(row["top1"]), float(row["top5"]))
            figures.setdefault(row["model"], []).append(figure)
    known = set(timm.list_pretrained())
    if unknown := sorted(set(figures) - known):
        print(f"left out, timm {timm.__version__} has them no more: {', '.join(unknown)}")
    weights = {}
    for name in sorted(set(figures) & known, key=lambda name: (-max(f[3] for f in figures[name]), name)):
        config = get_pretrained_cfg(name)
        assert config is not None
        weights[name] = {
            "image_size": config.input_size[-1],
            "licence": config.license or "unknown",
            "results": sorted(figures[name], key=lambda figure: (figure[0], figure[1])),
        }
    sizes = {name.partition(".")[0]: row["results"][0][0] for name, row in weights.items()}
    architectures = {arch: facts_of(arch, size) for arch, size in sorted(sizes.items())}
    table = {
        "source": f"{SOURCE}; licences and sizes: model cards of timm {timm.__version__}",
        "timm": timm.__version__,
        "architectures": architectures,
        "weights": weights,
    }
    write_text(args.output, in_lines(table))
    convnets = sum(not row["attention"] for row in architectures.values())
    print(f"{len(weights)} weights of {len(architectures)} architectures, {convnets} of them ConvNets -> {args.output}")


def facts_of(arch: str, size: int) -> dict[str, object]:
    """What is known of an architecture."""
    from timm.models._registry import _model_to_module

    net = build_foreign(Foreign(arch, "timm"), meta=True)
    conditions = Conditions(device="rtx-4090", precision="amp", batch_size=2, image_size=size)
    family = _model_to_module[arch]
    try:
        attention = workload_of(trace(net, conditions), compiled=False).attention
    except UserError:  # Sequencer's recurrence can not be traced under autocast
        if family not in NO_CONVNETS:
            raise
        attention = True
    return {
        "family": family,
        "params": sum(p.numel() for p in net.parameters()),
        "attention": attention or family in NO_CONVNETS,
        "fused": is_reparameterizable(net),
    }


def in_lines(table: dict[str, object]) -> str:
    """JSON with a line for each entry, so that changes can be read."""
    parts = []
    for key, value in table.items():
        if isinstance(value, dict):
            rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in value.items())
            parts.append(f" {json.dumps(key)}: {{\n{rows}\n }}")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    main()
