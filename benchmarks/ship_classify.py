"""From JPEG files to classes: `convscale classify` with a tuned artefact against timm's usual loop in PyTorch.

    python -m benchmarks.ship_classify [--model resnet50] [--images 400] [--rounds 3] [--threads N] [--no-int8] [--json]
                                       [--output results/ship_classify.jsonl]

Pictures are seeded crops of scikit-image's photographs, enlarged to 500 x 375 px and saved as JPEG. The peer is timm as its documentation shows:
`create_transform`, pictures opened by Pillow in a DataLoader with one worker per core, batches of 32, eager or compiled. Ours decodes every JPEG in
full too. Both are run in turns; the first run of each (opening, compiling) is left out. Weights are random: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import convscale as cs
from benchmarks.ship_gate import photographs
from convscale.files import write_text
from convscale.ship.artifact import Artifact
from convscale.ship.classify import classify, image_paths
from convscale.ship.nets import preprocessing_of
from convscale.ship.tune import export_fastest
from convscale.speed.timing import Environment, available_cores


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
    net = timm.create_model(name).eval()
    transform: Any = timm.data.create_transform(**timm.data.resolve_data_config(model=net))  # pyright: ignore[reportAttributeAccessIssue]
    step: Callable[[torch.Tensor], torch.Tensor] = torch.compile(net) if compiled else net

    def run() -> int:
        loader = DataLoader(Files(paths, transform), batch_size=32, num_workers=available_cores())
        with torch.no_grad():
            return sum(len(step(batch).softmax(1).topk(1).indices) for batch in loader)

    return run


def ours(artifact: Artifact, folder: Path) -> Callable[[], int]:
    """`convscale classify` into memory."""
    return lambda: classify(image_paths([str(folder)]), artifact, io.StringIO()).images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--no-int8", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("results/ship_classify.jsonl"))
    args = parser.parse_args()
    net = cs.create_model(args.model)
    pre = preprocessing_of(net)
    with tempfile.TemporaryDirectory() as place:
        paths = write_pictures(Path(place) / "jpeg", args.images)
        calibration = np.stack([pre.resize(np.asarray(Image.open(path).convert("RGB"))) for path in paths[:32]])
        artifact, _ = export_fastest(
            net, Path(place) / "art", batch_sizes=(8, 16, 32), threads=args.threads, int8=not args.no_int8,
            preprocessing=pre, calibration_images=calibration, max_drop=100.0,
        )  # fmt: skip
        runs = {
            "timm eager": timm_loop(args.model, paths, compiled=False),
            "timm compiled": timm_loop(args.model, paths, compiled=True),
            "ours": ours(artifact, Path(place) / "jpeg"),
        }
        seconds: dict[str, list[float]] = {label: [] for label in runs}
        for turn in range(args.rounds + 1):
            for label, run in runs.items():
                start = time.perf_counter()
                done = run()
                assert done == args.images, f"{label} classified {done} of {args.images}"
                if turn:
                    seconds[label].append(time.perf_counter() - start)
    speed = {label: args.images / float(np.median(taken)) for label, taken in seconds.items()}
    row = {
        "schema": 1,
        "model": args.model,
        "images": args.images,
        "images_per_s": speed,
        "seconds": seconds,
        "ours_over_eager": speed["ours"] / speed["timm eager"],
        "ours_over_compiled": speed["ours"] / speed["timm compiled"],
        "runtime": artifact.manifest["runtime"],
        "precision": artifact.precision,
        "device": Environment.here().device_name,
        "cores": available_cores(),
    }
    before = args.output.read_text() if args.output.is_file() else ""
    write_text(args.output, before + json.dumps(row) + "\n")
    if args.json:
        print(json.dumps(row))
    else:
        for label, value in speed.items():
            print(f"{label:16s} {value:7.1f} images/s, file to class")
        print(f"ours / timm eager {row['ours_over_eager']:.2f}   ours / timm compiled {row['ours_over_compiled']:.2f}   ({artifact!r})")


if __name__ == "__main__":
    main()
