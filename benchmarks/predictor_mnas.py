"""The predictor on networks of the MnasNet space that others measured: somebody else's A100 and RTX 3090.

    python -m benchmarks.predictor_mnas --tables DIR [--networks 200] [--json] [--output results/predictor_mnas.json]

DIR's ``nas-mnasnet-imagenet.csv`` (Accel-NASBench) has 3,425 networks with images/s under AMP in channels-last, eager
PyTorch, 224 px; the batch is not stated and taken as 512. No coefficient has seen a row of it. A random sample is
predicted; *scaled* leaves one factor a card free, the middle of the ratios.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.predictor_rivals import figures
from benchmarks.records import seal
from convscale.conditions import Conditions
from convscale.files import write_json
from convscale.predictor.loading import workload_for
from convscale.predictor.predict import Prediction, predict_workload

WIDTHS, STRIDES = (16, 24, 40, 80, 112, 192, 320), (1, 2, 2, 2, 1, 2, 1)
STEM, HEAD, BATCH, SIDE, SEED = 32, 1280, 512, 224, 0
CARDS = {"a100-40gb": "a100_images_per_s", "rtx-3090": "rtx3090_images_per_s"}


class Squeeze(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.pool, self.act, self.gate = nn.AdaptiveAvgPool2d(1), nn.ReLU(inplace=True), nn.Sigmoid()
        self.down, self.up = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate(self.up(self.act(self.down(self.pool(x)))))


def _conv(inner: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inner, out, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(out)]


class Block(nn.Module):
    """An inverted residual."""

    def __init__(self, inner: int, out: int, expansion: int, kernel: int, stride: int, se: bool) -> None:
        super().__init__()
        wide = inner * expansion
        layers = [*_conv(inner, wide, 1), nn.ReLU(inplace=True)] if expansion > 1 else []
        layers += [*_conv(wide, wide, kernel, stride, wide), nn.ReLU(inplace=True)]
        layers += [Squeeze(wide, inner // 4)] if se else []
        self.body, self.skip = nn.Sequential(*layers, *_conv(wide, out, 1)), stride == 1 and inner == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.skip else self.body(x)


def network(expansions: str, kernels: str, layers: str, se: str) -> nn.Module:
    """A network by its digits, one a stage."""
    body: list[nn.Module] = [*_conv(3, STEM, 3, 2), nn.ReLU(inplace=True)]
    inner = STEM
    for e, k, n, s, out, stride in zip(expansions, kernels, layers, se, WIDTHS, STRIDES, strict=True):
        for i in range(int(n)):
            body.append(Block(inner, out, int(e), int(k), stride if i == 0 else 1, s == "1"))
            inner = out
    body += [*_conv(inner, HEAD, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(HEAD, 1000))


def rows(folder: Path, count: int) -> list[dict[str, str]]:
    """A random sample of the table."""
    with open(folder / "nas-mnasnet-imagenet.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    order = np.random.default_rng(SEED).permutation(len(table))[:count]
    return [table[i] for i in sorted(order)]


def predicted(sample: Sequence[dict[str, str]]) -> dict[str, list[Prediction]]:
    """Each card's predictions."""
    found: dict[str, list[Prediction]] = {card: [] for card in CARDS}
    for row in sample:
        with torch.device("meta"):
            net = network(row["expansion"], row["kernel"], row["layers"], row["se"])
        params = sum(p.numel() for p in net.parameters())
        assert abs(params / 1e6 - float(row["params_m"])) < 1e-6, row
        asked = Conditions(device="rtx-3090", precision="amp", layout="nhwc", batch_size=BATCH, image_size=SIDE)
        work = workload_for(net, asked)
        for card in CARDS:
            on = Conditions(device=card, precision="amp", layout="nhwc", batch_size=BATCH, image_size=SIDE)
            found[card].append(predict_workload(work, on))
    return found


def pairs_right(truth: np.ndarray, guess: np.ndarray) -> float:
    """Share of the pairs whose true speeds differ by 1.1 to 1.25 times that are ordered right, in %."""
    first, second = np.triu_indices(len(truth), 1)
    gap, told = np.log(truth[first] / truth[second]), np.log(guess[first] / guess[second])
    hard = (np.abs(gap) > np.log(1.1)) & (np.abs(gap) < np.log(1.25))
    return round(float(100 * np.mean(np.sign(told[hard]) == np.sign(gap[hard]))), 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tables", type=Path, required=True, help="folder with the measurements")
    parser.add_argument("--networks", type=int, default=200)
    parser.add_argument("--json", action="store_true", help="print records as JSON")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args(arguments)
    sample = rows(options.tables, options.networks)
    records: list[dict[str, Any]] = []
    for card, made in predicted(sample).items():
        truth = np.array([float(row[CARDS[card]]) for row in sample])
        guess = np.array([p.images_per_s for p in made])
        errors = np.log(truth / guess)  # of the time: predicted over measured
        inside = np.mean([p.low <= t <= p.high for p, t in zip(made, truth, strict=True)])
        scaled = figures(errors - np.median(errors))
        records.append(
            {
                "card": card,
                **figures(errors),
                "scaled_median_pct": scaled["median_pct"],
                "scaled_p90_pct": scaled["p90_pct"],
                "pairs_right_pct": pairs_right(truth, guess),
                "inside_80_pct": round(100 * float(inside), 1),
            }
        )
    if options.output:
        write_json(options.output, {"command": "python -m benchmarks.predictor_mnas", "records": records})
        seal(options.output)
    print(json.dumps(records) if options.json else "\n".join(map(str, records)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
