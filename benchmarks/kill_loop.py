"""Kill a training run at random moments, saves included; it must always resume and end with the weights of an
undisturbed one.

    python -m benchmarks.kill_loop [--kills 50] [--seed 0] [--workers 0] [--layout nhwc] [--json] [--output
    results/kill_loop.jsonl]

A child process trains a small network with batch norm, dropout, averaged weights and AdamW on pictures (written here),
saving after every step. The parent kills it with SIGKILL at a random moment, starts it again with resume, and so on
until enough kills are done; then lets it finish. Only the process that trains is killed: its loader's workers must
notice by themselves. The final weights, optimiser state and averages, and every loss that any of the children reported,
are compared, bit for bit, with those of a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.records import machine, replace_record

STEPS_PER_EPOCH, BATCH, EPOCHS = 12, 8, 60


def write_pictures(folder: Path) -> None:
    """Two classes of small JPEGs: dark and bright noise."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for split, count in (("train", STEPS_PER_EPOCH * BATCH // 2), ("val", 8), ("test", 2)):
        for name, base in (("dark", 20), ("bright", 60)):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(base, base + 150, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.jpg")


def child(data: Path, output: Path, losses: Path, workers: int, layout: str) -> None:
    """Train (or go on training), appending ``position loss`` to ``losses`` after every step."""
    from convscale.images.sources import open_dataset
    from convscale.learn.progress import Event
    from convscale.learn.recipe import Recipe
    from convscale.learn.train import train

    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(32, 2),
    )
    recipe = Recipe(
        name="kill", epochs=EPOCHS, batch_size=BATCH, optimizer="adamw", lr=0.01, augment="resized-crop",
        erase=0.3, mixup=0.2, ema_decay=0.95,
        precision="fp32", layout=layout, image_size=16,
    )  # fmt: skip
    with open(losses, "a", encoding="utf-8", buffering=1) as file:

        def progress(event: Event) -> None:
            if event["kind"] == "step":
                file.write(f"{event['epoch']}.{event['step']} {event['loss']!r}\n")

        train(
            net,
            open_dataset(data),
            recipe=recipe,
            output=output,
            resume=True,
            workers=workers,
            checkpoint_seconds=0,
            progress=progress,
        )


def start(data: Path, output: Path, losses: Path, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """A child process; what it has to say goes into a file, which no worker that outlives it keeps from being read."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.kill_loop",
        "--child",
        str(data),
        str(output),
        str(losses),
        "--workers",
        str(options.workers),
    ]
    command += ["--layout", options.layout]
    with open(losses.with_suffix(".err"), "wb") as errors:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)


def finish(process: subprocess.Popen[bytes], losses: Path) -> None:
    """Wait for a child that must end well."""
    if process.wait() != 0:
        raise SystemExit(
            "the run failed after a kill (exit "
            f"{process.returncode}):\n{losses.with_suffix('.err').read_text()[-2000:]}"
        )


def wait_for_steps(process: subprocess.Popen[bytes], losses: Path, count: int) -> None:
    """Until the child has added ``count`` losses, or ended."""
    before = _lines(losses)
    while process.poll() is None and _lines(losses) < before + count:
        time.sleep(0.002)


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def read_losses(path: Path) -> dict[str, str]:
    """Position -> loss as text; a position that was taken twice must have had the same loss."""
    out: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        position, _, loss = line.partition(" ")
        if not loss:
            continue  # cut by the kill
        if out.setdefault(position, loss) != loss:
            raise SystemExit(f"step {position} had loss {out[position]} and, after a resume, {loss}")
    return out


def weights_of(output: Path) -> dict[str, torch.Tensor]:
    """The last state's weights and the best ones."""
    from safetensors.torch import load_file

    from convscale.learn.checkpoint import list_checkpoints

    last, best = list_checkpoints(output)[0], list_checkpoints(output, ("best",))[0]
    merged = {f"last.{name}": value for name, value in load_file(last / "state.safetensors").items()}
    return merged | {f"best.{name}": value for name, value in load_file(best / "model.safetensors").items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--layout", choices=("nchw", "nhwc"), default="nhwc")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("results/kill_loop.jsonl"))
    parser.add_argument("--child", nargs=3, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        data, output, losses = arguments.child
        child(data, output, losses, arguments.workers, arguments.layout)
        return
    random.seed(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder / "data")
        data, losses = folder / "data", folder / "killed.txt"
        process = start(data, folder / "whole", folder / "whole.txt", arguments)
        wait_for_steps(process, folder / "whole.txt", 1)
        began = time.perf_counter()
        finish(process, folder / "whole.txt")
        step_s = min(0.5, (time.perf_counter() - began) / (STEPS_PER_EPOCH * EPOCHS))
        kills = in_save = 0
        reached: list[int] = []
        while kills < arguments.kills:
            process = start(data, folder / "killed", losses, arguments)
            left = STEPS_PER_EPOCH * EPOCHS - (reached[-1] if reached else 0)
            most = max(
                1, round(2 * left / (arguments.kills - kills + 1)) - 4
            )  # so that the kills are spread over the run
            wait_for_steps(
                process, losses, random.randint(1, most)
            )  # at least one: a run that never takes one would never end
            time.sleep(random.uniform(0, 2 * step_s))
            if process.poll() is not None:
                finish(process, losses)
                break
            process.kill()
            process.wait()
            kills += 1
            in_save += bool(list((folder / "killed" / "checkpoints").glob(".*.tmp")))
            reached.append(len(read_losses(losses)))
            if not arguments.json:
                print(f"kill {kills}: {reached[-1]} of {STEPS_PER_EPOCH * EPOCHS} steps done", flush=True)
        finish(start(data, folder / "killed", losses, arguments), losses)
        whole, killed = weights_of(folder / "whole"), weights_of(folder / "killed")
        same_weights = whole.keys() == killed.keys() and all(torch.equal(whole[name], killed[name]) for name in whole)
        same_losses = read_losses(folder / "whole.txt").items() <= read_losses(losses).items()
    record = {
        "benchmark": "kill_loop", "kills": kills, "kills_within_a_save": in_save, "workers": arguments.workers,
        "layout": arguments.layout,
        "steps": STEPS_PER_EPOCH * EPOCHS,
        "steps_done_at_kills": reached, "same_weights": same_weights, "same_losses": same_losses,
        "torch": torch.__version__, "machine": machine(),
    }  # fmt: skip
    if arguments.output:
        replace_record(arguments.output, record, ("benchmark", "workers", "layout"))
    summary = f"{kills} kills ({in_save} within a save): same weights {same_weights}, same losses {same_losses}"
    print(json.dumps(record) if arguments.json else summary)
    if not (same_weights and same_losses):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
