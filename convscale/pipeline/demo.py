"""`fit` on an embedded default: Fashion-MNIST under a speed that the machine at hand sets."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from convscale.cache import cache_dir
from convscale.errors import UserError
from convscale.learn.progress import Progress
from convscale.pipeline.run import FitRun, fit

DEMO_FOLDERS = (Path("/usr/share/datasets/fashion-mnist"),)
"""Where Debian's package dataset-fashion-mnist puts the idx files."""


def demo(
    *,
    output: str | os.PathLike[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    max_minutes: float = 6.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> FitRun:
    """``fit`` on Fashion-MNIST. No speed is asked for, so this machine sets it: that of a ResNet-18 on images of 28 px.
    Every run makes a new folder under ``runs/``.

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

    place = Path(data_dir) if data_dir is not None else fashion_mnist(say)
    folder = Path(output) if output is not None else _new_demo_folder()
    return fit(place, output=folder, max_minutes=max_minutes, seed=seed, progress=progress)


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
