"""From JPEG files to classes: `convscale classify` with a tuned artefact against timm's usual loop in PyTorch.

    python -m benchmarks.ship_classify [--models resnet50 efficientnet_b0] [--images 400] [--rounds 3] [--threads N]
    [--work runs/ship] [--json]
                                       [--output results/ship_classify.jsonl]

Pictures are seeded crops of scikit-image's photographs, enlarged to 500 x 375 px and saved as JPEG. The peer is timm as
its documentation shows: `create_transform`, pictures opened by Pillow in a DataLoader with one worker per core, batches
of 32, eager or compiled. Ours decodes every JPEG in full too. Both are run in turns; the first run of each (opening,
compiling) is left out. Weights are random: speed does not depend on them. The artefacts are those of `python -m
benchmarks.ship --prepare`.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.records import replace_record, write_record
from benchmarks.ship import conditions_of, prepare
from benchmarks.ship_gate import photographs
from convscale.artifact.artifact import Artifact, load_artifact
from convscale.machine import Environment, available_cores
from convscale.ship.forms import fastest_of
from convscale.ship.stream import classify, image_paths


class Files(Dataset[torch.Tensor]):
    """Pictures by Pillow and timm's transform."""

    def __init__(self, paths: list[Path], transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(Image.open(self.paths[index]).convert("RGB"))


def write_pictures(folder: Path, count: int) -> list[Path]:
    """``count`` JPEG files of 500 x 375 px from crops of real photographs."""
    folder.mkdir()
    paths = []
    for i, crop in enumerate(photographs(count, 300)):
        path = folder / f"{i:05}.jpg"
        Image.fromarray(crop).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
        paths.append(path)
    return paths


def timm_loop(name: str, paths: list[Path], *, compiled: bool) -> Callable[[], int]:
    """timm's network and transform in a plain loop. Returns the number of predictions."""
    from timm.data import create_transform, resolve_data_config

    net = timm.create_model(name).eval()
    transform: Any = create_transform(**resolve_data_config(model=net))
    step: Callable[[torch.Tensor], torch.Tensor] = torch.compile(net) if compiled else net

    def run() -> int:
        loader = DataLoader(Files(paths, transform), batch_size=32, num_workers=available_cores())
        with torch.no_grad():
            return sum(len(step(batch).softmax(1).topk(1).indices) for batch in loader)

    return run


def ours(artifact: Artifact, folder: Path) -> Callable[[], int]:
    """`convscale classify` into memory."""
    return lambda: classify(image_paths([str(folder)]), artifact, io.StringIO()).images


def compare(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """All contenders of one network, in turns."""
    base = conditions_of(name, argparse.Namespace(img_size=None, batch_size=32, threads=args.threads))
    forms = prepare(name, base, args.work / name)
    found = fastest_of(forms, batch_sizes=(16,), threads=args.threads)
    winner = forms[found.winner]
    assert isinstance(winner, Artifact), "a winner was not withheld"
    artifact = load_artifact(winner.folder)
    with tempfile.TemporaryDirectory() as place:
        paths = write_pictures(Path(place) / "jpeg", args.images)
        runs = {
            "timm eager": timm_loop(name, paths, compiled=False),
            "timm compiled": timm_loop(name, paths, compiled=True),
            "ours": ours(artifact, Path(place) / "jpeg"),
        }
        seconds: dict[str, list[float]] = {label: [] for label in runs}
        for turn in range(args.rounds + 1):
            for label, run in runs.items():
                start = time.perf_counter()
                done = run()
                assert done == args.images, f"{label} classified {done} of {args.images}"
                if turn:
                    seconds[label].append(round(time.perf_counter() - start, 4))
    speed = {label: args.images / float(np.median(taken)) for label, taken in seconds.items()}
    return {
        "schema": 1,
        "model": name,
        "images": args.images,
        "images_per_s": {label: round(value, 2) for label, value in speed.items()},
        "seconds": seconds,
        "ours_over_eager": speed["ours"] / speed["timm eager"],
        "ours_over_compiled": speed["ours"] / speed["timm compiled"],
        "runtime": artifact.manifest["runtime"],
        "precision": artifact.precision,
        "environment": dataclasses.asdict(Environment.here()),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """All records as Markdown."""
    first = rows[0]["environment"]
    versions = ", ".join(f"{name} {value}" for name, value in first["versions"].items())
    lines = [
        "# From JPEG files to classes",
        "",
        "Made by `python -m benchmarks.ship_classify`; records: [ship_classify.jsonl](ship_classify.jsonl).",
        f"{first['device_name']}, {first['cores']} cores, CPU only; {versions}.",
        "JPEG files of 500 x 375 px; all contenders in turns in one process, medians (slowest to fastest run). Owed: "
        "1.5 times eager timm.",
        "",
        "| network | files | timm + torch, eager | timm + torch.compile | `convscale classify` | form | over eager | "
        "over compiled |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = []
        for label in ("timm eager", "timm compiled", "ours"):
            low, high = (row["images"] / f(row["seconds"][label]) for f in (max, min))
            cells.append(f"{row['images_per_s'][label]:.1f} ({low:.1f} to {high:.1f})")
        form = f"{row['precision']} in {row['runtime']['name']}"
        lines.append(
            f"| {row['model']} | {row['images']} | {' | '.join(cells)} | {form} | {row['ours_over_eager']:.2f} | "
            f"{row['ours_over_compiled']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50", "efficientnet_b0"])
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/ship"), help="exported files are kept here and used again"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--output", type=Path, default=Path("results/ship_classify.jsonl"), help="the table goes beside it"
    )
    args = parser.parse_args()
    for name in args.models:
        row = compare(name, args)
        replace_record(args.output, row, ("model",))
        write_record(
            args.output.with_suffix(".md"), table([json.loads(text) for text in args.output.read_text().splitlines()])
        )
        if args.json:
            print(json.dumps(row))
            continue
        for label, value in row["images_per_s"].items():
            print(f"{name:20s} {label:16s} {value:7.1f} images/s, file to class")
        ratios = (
            f"ours / timm eager {row['ours_over_eager']:.2f}   ours / timm compiled {row['ours_over_compiled']:.2f}"
        )
        print(f"{ratios}   ({row['precision']}, {row['runtime']})", flush=True)


if __name__ == "__main__":
    main()
