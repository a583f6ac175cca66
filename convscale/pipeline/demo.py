"""`fit` on an embedded default: Fashion-MNIST under a speed that the machine at hand sets."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from statistics import median

from convscale.arch.small import for_image_size
from convscale.arch.zoo import get_spec
from convscale.cache import cache_dir
from convscale.errors import UserError
from convscale.files import check_output_dir
from convscale.images.sources import open_dataset
from convscale.learn.progress import Progress
from convscale.pipeline.contender import build
from convscale.pipeline.run import FitRun, fit
from convscale.pipeline.size import default_size
from convscale.speed.measuring import measure

DEMO_FOLDERS = (Path("/usr/share/datasets/fashion-mnist"),)
"""Where Debian's package dataset-fashion-mnist puts the idx files."""


REFERENCE, SHARE = "resnet18", 6.0
"""The demo asks for this many times this network's speed on the machine at hand: networks that learn in minutes."""
ROUNDS = 3
"""Times that it measures that speed: a machine that just woke up, or is busy for a moment, would set the constraint too
low."""


def demo(
    *,
    output: str | os.PathLike[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    max_minutes: float = 4.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> FitRun:
    """``fit`` on Fashion-MNIST under a speed that this machine sets: six times that of a ResNet-18 at 28 px in ONNX
    Runtime. It names no winner: ResNet-18 is no candidate. Every run makes a new folder under ``runs/``.

    Args:
        output: the folder to make instead.
        data_dir: Fashion-MNIST's idx files; None: Debian's package where it is installed, else torchvision's download.
        max_minutes: the full training ends by then.
        seed: of everything drawn.
        progress: called with events.
    """

    def say(text: str) -> None:
        if progress is not None:
            progress({"kind": "note", "text": text})

    if output is not None:
        check_output_dir(output, ways=())  # before anything is measured
    place = Path(data_dir) if data_dir is not None else fashion_mnist(say)
    splits = open_dataset(place)
    size = default_size(splits)
    net = build(for_image_size(get_spec(REFERENCE), size), splits)
    speed = median(measure(net, runtime="onnxruntime", image_size=size).images_per_s for _ in range(ROUNDS))
    target = float(f"{SHARE * speed:.2g}")
    say(f"this machine runs {REFERENCE} at {speed:,.0f} images/s; the demo asks for {target:,.0f} images/s")
    folder = Path(output) if output is not None else _new_demo_folder()
    return fit(place, min_throughput=target, output=folder, max_minutes=max_minutes, seed=seed, progress=progress)


def fashion_mnist(say: Callable[[str], None]) -> Path:
    """The folder of Fashion-MNIST's idx files, downloaded when no package has it.

    Raises:
        UserError: it is nowhere and can not be downloaded.
    """
    for folder in DEMO_FOLDERS:
        if folder.is_dir():
            return folder
    from torchvision.datasets import FashionMNIST

    cache = cache_dir()
    say("downloading Fashion-MNIST")
    try:
        FashionMNIST(str(cache), download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"Fashion-MNIST is not here and can not be downloaded ({error}); on Debian `apt-get install "
            "dataset-fashion-mnist`, else --data-dir"
        ) from error
    return cache / "FashionMNIST" / "raw"


def _new_demo_folder() -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder, number = Path("runs") / f"demo-{stamp}", 1
    while folder.exists():
        number += 1
        folder = Path("runs") / f"demo-{stamp}-{number}"
    return folder
