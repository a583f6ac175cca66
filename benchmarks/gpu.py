"""One command, one card, five minutes: what the claims about GPUs come to.

    python -m benchmarks.gpu [--budget 300] [--only STAGE ...] [--device cuda] [--tiny] [--output FILE]
    python -m benchmarks.gpu --predict           # before: predictions into benchmarks/gpu_predictions.json

Every stage is a process with a deadline of its own, and prints a line of JSON after each row: what a stage had found
when it was stopped is kept. Stages that no time was left for are named. In this order: ceilings (copy, matrix product);
correctness of every kernel in three types and both layouts against float64; the kernels' speeds beside cuDNN's batch
norm; eager inference; eager training in both norms; memory; compiled; training steps against the CPU's; waits per step;
a run that is killed and goes on; a process of DDP; training at 28 px, eager, compiled and as CUDA graphs.
Speeds stand beside what was predicted for the card that is found; the predictions are made beforehand and committed.

``--device cpu --tiny`` runs the same code on a processor, small: to see that it works, not to measure. Nothing in this
repository was measured on a GPU yet.
"""

# Calls are timed where they are made, before a loop's variables change.
# ruff: noqa: B023

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.gpu_runs import child, ddp, resume, waits

Row = dict[str, Any]
PREDICTIONS = Path(__file__).with_name("gpu_predictions.json")
CARDS = {"H100": "h100-sxm", "H200": "h200"}
"""By a word of the driver's name the device that predictions are of."""
STAGES = {
    "ceilings": 12,
    "correct": 40,
    "kernels": 25,
    "infer": 45,
    "train": 60,
    "memory": 40,
    "compiled": 60,
    "steps": 40,
    "waits": 15,
    "resume": 25,
    "ddp": 25,
    "graphs": 60,
}
"""Seconds that each may take at most, in the order in which they run."""
INFER = (
    *("tresnet_m", "tresnet_l", "resnet50", "efficientnet_b0", "mobilenetv2_100", "convnext_tiny", "regnety_032"),
    *("tresnet_xl", "resnet50d", "resnext50_32x4d", "seresnext50_32x4d", "efficientnet_b1", "mixnet_l", "resnet18"),
    *("resnet101", "wide_resnet50_2", "efficientnet_b3", "efficientnet_lite0", "mobilenetv3_large_100", "regnetx_032"),
    *("mobilenetv4_conv_medium", "convnextv2_tiny", "hgnetv2_b4", "efficientnetv2_s"),
)
TRAIN = (
    *("tresnet_m", "tresnet_m:batchnorm", "tresnet_l", "tresnet_xl", "resnet50", "tresnet_l:batchnorm"),
    *("resnet50d", "efficientnet_b1", "mixnet_l", "seresnext50_32x4d"),
)
"""The first are the most telling: a deadline cuts off the end."""
LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
MAPS = ((64, 56), (128, 28), (1024, 14), (2048, 7), (48, 112))
"""Channels and side of five maps of TResNet-M."""


class Card:
    """The device, and how things are timed on it."""

    def __init__(self, device: str, tiny: bool) -> None:
        self.device = torch.device(device)
        self.tiny = tiny
        self.batch = 4 if tiny else 256
        self.side = 64 if tiny else 224

    @property
    def cuda(self) -> bool:
        """Whether it is one."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """For all that was started."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object], least: float = 0.4) -> float:
        """Of a call, the median of several, after a warm-up."""
        for _ in range(1 if self.tiny else 5):
            call()
        self.wait()
        times: list[float] = []
        began = time.perf_counter()
        while not times or (time.perf_counter() - began < (0.05 if self.tiny else least) and len(times) < 200):
            start = time.perf_counter()
            call()
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def amp(self) -> Any:
        """Mixed precision as a training here has it."""
        return torch.autocast(self.device.type, torch.bfloat16)

    def net(self, name: str, **options: Any) -> nn.Module:
        """A network of ours on the device, channels-last; ``NAME:batchnorm`` with plain norms."""
        import convscale as cs

        name, _, norm = name.partition(":")
        made: Any = cs.create_model(name, **({"norm": norm} if norm else {}), **options)
        return made.to(self.device).to(memory_format=torch.channels_last)

    def images(self, batch: int | None = None) -> torch.Tensor:
        """A batch of noise."""
        made = torch.randn(batch or self.batch, 3, self.side, self.side, device=self.device)
        return made.contiguous(memory_format=torch.channels_last)

    def name(self) -> str:
        """As the driver calls it."""
        return torch.cuda.get_device_name(self.device) if self.cuda else "cpu"


def ceilings(card: Card) -> Iterator[Row]:
    """Copy in bytes moved per second, and matrix products."""
    count = 2**20 if card.tiny else 2**30
    source = torch.empty(count, dtype=torch.int8, device=card.device)
    target = torch.empty_like(source)
    yield {"what": "copy", "gb_per_s": 2 * count / card.seconds(lambda: target.copy_(source)) / 1e9}
    side = 256 if card.tiny else 8192
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(side, side, device=card.device, dtype=dtype) for _ in range(2))
        yield {
            "what": f"matmul {dtype}".replace("torch.", ""),
            "tflops": 2 * side**3 / card.seconds(lambda a=a, b=b: a @ b) / 1e12,
        }


def correct(card: Card) -> Iterator[Row]:
    """Kernels against PyTorch's batch norm in float64, three types, both layouts, five shapes."""
    from convscale.nn.kernels import norm

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for layout in (torch.channels_last, torch.contiguous_format):
            worst = dict.fromkeys(("y", "dx", "dweight", "dbias"), 0.0)
            for n, c, h, w in ((3, 5, 7, 3), (2, 48, 14, 14), (1, 130, 9, 9), (5, 16, 1, 1), (2, 3, 33, 65)):
                generator = torch.Generator().manual_seed(0)
                x = (torch.randn(n, c, h, w, generator=generator, dtype=torch.float64) * 2 + 3).to(dtype)
                dy = torch.randn(n, c, h, w, generator=generator, dtype=torch.float64).to(dtype)
                weight = torch.linspace(-1, 1, c).where(torch.linspace(-1, 1, c).abs() > 0.2, torch.tensor(0.5))
                bias = torch.linspace(-0.5, 0.5, c)
                wide = [value.double().requires_grad_() for value in (x, weight, bias)]
                y = F.leaky_relu(F.batch_norm(wide[0], None, None, wide[1], wide[2], True, 0.0, 1e-5), 1e-2)
                right = (y.detach(), *torch.autograd.grad(y, wide, dy.double()))
                moved = [value.to(card.device) for value in (x, dy, weight, bias)]
                x, dy, weight, bias = moved
                x, dy = (value.contiguous(memory_format=layout) for value in (x, dy))
                mine, _, var = norm.norm_act(x, weight, bias, None, None, 1e-5, 1e-2)
                exact = right[0].to(dtype).to(card.device).contiguous(memory_format=layout)
                back = norm.norm_act_backward(exact, dy, weight, bias, var, 1e-5, 1e-2, True)
                for key, found, expected in zip(worst, (mine, *back), right, strict=True):
                    off = (found.double().cpu() - expected).abs().max() / expected.abs().max()
                    worst[key] = max(worst[key], float(off))
            yield {"dtype": str(dtype)[6:], "layout": str(layout)[6:], "relative_error": worst}


def kernels(card: Card) -> Iterator[Row]:
    """The norm's forward and backward at five maps of TResNet-M, beside batch norm with leaky ReLU."""
    from convscale.nn.kernels import norm

    for channels, side in MAPS:
        shape = (card.batch, channels, side, side)
        x = torch.randn(shape, device=card.device, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        dy, y = torch.randn_like(x), torch.randn_like(x)
        weight, bias = torch.rand(channels, device=card.device) + 0.5, torch.rand(channels, device=card.device)
        invstd = torch.ones_like(weight)
        running = torch.zeros_like(weight), torch.ones_like(weight)
        forward = card.seconds(lambda: norm.norm_act(x, weight, bias, None, None, 1e-5, 1e-3), 0.2)
        back = card.seconds(lambda: norm.backward(y, dy, weight, bias, invstd, 1e-3, True), 0.2)

        def plain(x: torch.Tensor = x, weight: torch.Tensor = weight, bias: torch.Tensor = bias) -> torch.Tensor:
            return F.leaky_relu(F.batch_norm(x, *running, weight, bias, True, 0.1), 1e-3)

        grown = x.detach().requires_grad_()
        cudnn = card.seconds(lambda: plain(), 0.2)
        both = card.seconds(lambda: torch.autograd.grad(plain(grown), grown, dy), 0.2)
        yield {
            "map": list(shape),
            "forward_gb_per_s": 6 * x.numel() / forward / 1e9,
            "backward_gb_per_s": 10 * x.numel() / back / 1e9,
            "forward_over_batchnorm": cudnn / forward,
            "backward_over_batchnorm": (both - cudnn) / back,
        }


def infer(card: Card) -> Iterator[Row]:
    """Eager inference in mixed precision, first in channels-last."""
    for layout, form in LAYOUTS.items():
        for name in INFER[:2] if card.tiny else INFER:
            net, images = card.net(name).eval().to(memory_format=form), card.images().contiguous(memory_format=form)
            with torch.inference_mode(), card.amp():
                taken = card.seconds(lambda net=net, images=images: net(images), least=0.25)
            yield {"model": name, "layout": layout, "batch": card.batch, "images_per_s": card.batch / taken}


def _step(card: Card, net: nn.Module, batch: int) -> Callable[[], None]:
    images, labels = card.images(batch), torch.randint(0, 1000, (batch,), device=card.device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, foreach=True)

    def step() -> None:
        with card.amp():
            outputs = net(images)
        F.cross_entropy(outputs.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def train(card: Card) -> Iterator[Row]:
    """Eager training, in-place norms by kernels and in plain PyTorch, and batch norm."""
    for name in TRAIN[:2] if card.tiny else TRAIN:
        batch = card.batch if name != "tresnet_xl" else card.batch // 2
        for switch in ("1", "0") if ":" not in name and name.startswith("tresnet") else ("0",):
            os.environ["CONVSCALE_KERNELS"] = switch
            step = _step(card, card.net(name).train(), batch)
            yield {"model": name, "kernels": switch == "1", "batch": batch, "images_per_s": batch / card.seconds(step)}


def memory(card: Card) -> Iterator[Row]:
    """Peaks at two batches, and one try at 95 % of the predicted largest."""
    from convscale.cost.memory import saved_bytes

    for name in ("tresnet_m", "tresnet_m:batchnorm"):
        net = card.net(name).train()
        kept = saved_bytes(net.cpu(), image_size=card.side, batch_size=2)
        net = net.to(card.device)
        for batch in (card.batch // 2, card.batch):
            if card.cuda:
                torch.cuda.reset_peak_memory_stats(card.device)
            step = _step(card, net, batch)
            step()
            step()
            card.wait()
            peak = torch.cuda.max_memory_allocated(card.device) if card.cuda else None
            yield {"model": name, "batch": batch, "peak_bytes": peak, "saved_bytes_fp32_per_image": kept}
    told = json.loads(PREDICTIONS.read_text(encoding="utf-8")) if PREDICTIONS.is_file() else {}
    most = told.get(predicted_as(card) or "", {}).get("largest_batch", {}).get("tresnet_m")
    if card.cuda and most:
        batch = int(0.95 * most)
        try:
            step = _step(card, card.net("tresnet_m").train(), batch)
            step()
            step()
            card.wait()
            yield {"model": "tresnet_m", "predicted_largest": most, "batch": batch, "fits": True}
        except torch.OutOfMemoryError:
            yield {"model": "tresnet_m", "predicted_largest": most, "batch": batch, "fits": False}


def compiled(card: Card) -> Iterator[Row]:
    """Behind torch.compile: three networks, inference and training."""
    os.environ["CONVSCALE_KERNELS"] = "1"
    for name in ("tresnet_m", "resnet50", "efficientnet_b0")[: 1 if card.tiny else 3]:
        net, images = card.net(name).eval(), card.images()
        fast: Any = torch.compile(net)
        with torch.inference_mode(), card.amp():
            taken = card.seconds(lambda fast=fast, images=images: fast(images))
        yield {"model": name, "mode": "infer", "batch": card.batch, "images_per_s": card.batch / taken}
        fast = torch.compile(card.net(name).train())
        step = _step(card, fast, card.batch)
        taken = card.seconds(step)
        yield {"model": name, "mode": "train", "batch": card.batch, "images_per_s": card.batch / taken}
    if card.cuda:  # last: it compiles for minutes
        torch._dynamo.reset()
        net, images = card.net("tresnet_m").eval(), card.images()
        fast = torch.compile(net, mode="max-autotune", dynamic=False)
        with torch.inference_mode(), card.amp():
            taken = card.seconds(lambda: fast(images))
        speed = card.batch / taken
        yield {"model": "tresnet_m", "mode": "infer, max-autotune", "batch": card.batch, "images_per_s": speed}


def graphs(card: Card) -> Iterator[Row]:
    """Training at 28 px, where a step is mostly launches: eager, compiled, and as CUDA graphs."""
    from convscale.learn.compiling import MODES
    from convscale.learn.compiling import compiled as behind

    card.side, batch = 28, min(card.batch, 64)
    for mode in ("eager", *MODES):
        net = card.net("resnet18").train()
        step = _step(card, net if mode == "eager" else behind(net, mode), batch)
        yield {
            "model": "resnet18",
            "image_size": 28,
            "mode": mode,
            "batch": batch,
            "images_per_s": batch / card.seconds(step),
        }


def steps(card: Card) -> Iterator[Row]:
    """Losses of training steps in float32: the device's, kernels and none, beside the processor's."""
    import convscale as cs

    spec = cs.scale("tresnet_m", width=0.25, depth=0.3, image_size=32)
    torch.manual_seed(0)
    start = cs.create_model(spec, num_classes=10).state_dict()
    images, labels = torch.randn(60, 16, 3, 32, 32), torch.randint(0, 10, (60, 16))
    count = 3 if card.tiny else 60

    def losses(device: torch.device, switch: str, norm: Any) -> list[float]:
        os.environ["CONVSCALE_KERNELS"] = switch
        net: Any = cs.create_model(spec, num_classes=10, norm=norm).train().to(device)
        net.load_state_dict(start)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
        found = []
        for x, y in zip(images[:count], labels[:count], strict=True):
            loss = F.cross_entropy(net(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
        return found

    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    right = losses(torch.device("cpu"), "0", None)
    for label, switch, norm in (("kernels", "1", None), ("plain", "0", None), ("batchnorm", "0", "batchnorm")):
        mine = losses(card.device, switch, norm)
        off = [abs(a - b) / abs(b) for a, b in zip(mine, right, strict=True)]
        yield {"norm": label, "steps": count, "largest_difference": max(off), "first_ten": max(off[:10])}
    torch.backends.cudnn.allow_tf32 = before


def predicted_as(card: Card) -> str | None:
    """The device that predictions are of, by the driver's name."""
    return next((device for word, device in CARDS.items() if word in card.name()), None)


def key_of(model: str, layout: str) -> str:
    """A prediction's name; channels-last is not said."""
    return model if layout == "nhwc" else f"{model}, {layout}"


def predict() -> None:
    """Write down beforehand what is expected of the cards."""
    import convscale as cs
    from convscale.files import write_json
    from convscale.predictor.largest_batch import predict_largest_batch

    found: dict[str, Any] = {}
    for device in CARDS.values():
        rows: dict[str, Any] = {"infer": {}, "compiled": {}, "train": {}, "largest_batch": {}}
        for name, layout in itertools.product(INFER, ("nhwc", "nchw")):
            for key, fast in (("infer", False), ("compiled", True)):
                told = cs.predict(
                    name,
                    device=device,
                    precision="amp_bf16",
                    layout=layout,
                    compiled=fast,
                    batch_size=256,
                    image_size=224,
                )
                rows[key][key_of(name, layout)] = [round(told.low), round(told.images_per_s), round(told.high)]
        for name in TRAIN:
            plain, _, norm = name.partition(":")
            kind: Any = norm
            net: Any = cs.create_model(plain, norm=kind) if norm else plain
            told = cs.predict(
                net,
                device=device,
                mode="train",
                precision="amp_bf16",
                layout="nhwc",
                batch_size=128 if plain == "tresnet_xl" else 256,
                image_size=224,
            )
            rows["train"][name] = [round(told.low), round(told.images_per_s), round(told.high)]
        rows["largest_batch"]["tresnet_m"] = predict_largest_batch(
            "tresnet_m", device, precision="amp", layout="nhwc"
        ).batch_size
        found[device] = rows
    write_json(PREDICTIONS, found)


def run_stage(name: str, card: Card) -> None:
    """One stage in this process: a line of JSON after every row."""
    runs = {"waits": waits, "resume": resume, "ddp": ddp}
    for row in (runs.get(name) or globals()[name])(card):
        print(json.dumps({"stage": name, **row}), flush=True)


def gather(name: str, options: argparse.Namespace, seconds: float) -> tuple[list[Row], str]:
    """A stage in a process of its own; what it printed before its deadline counts, and how it ended is said."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--stage", name, "--device", options.device]
    process = subprocess.Popen(
        [*command, *(["--tiny"] if options.tiny else [])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={"CONVSCALE_KERNELS": "1", **os.environ},
    )
    try:
        out, err = process.communicate(timeout=seconds)
        ended = "done" if process.returncode == 0 else f"failed: {(err.strip().splitlines() or ['?'])[-1][:200]}"
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        out, _ = process.communicate()
        ended = f"stopped after {seconds:.0f} s"
    rows = []
    for line in out.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows, ended


def beside(rows: list[Row], told: dict[str, Any]) -> None:
    """Put predictions beside speeds."""
    for row in rows:
        key = row["stage"] if row["stage"] != "compiled" else "compiled" if row.get("mode") == "infer" else ""
        if (
            expected := told.get(key, {}).get(key_of(row.get("model", ""), row.get("layout", "nhwc")))
        ) and "images_per_s" in row:
            row["predicted"] = expected
            row["measured_over_predicted"] = row["images_per_s"] / expected[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=300.0, help="seconds in all")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small, to see that it runs")
    parser.add_argument("--predict", action="store_true", help="write benchmarks/gpu_predictions.json and end")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="default: results/gpu-CARD.jsonl")
    options = parser.parse_args()
    if options.predict:
        predict()
        return
    card = Card(options.device, options.tiny)
    if card.cuda and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA GPU here; --device cpu --tiny runs the code without one")
    if options.child:
        child(options.child[0], Path(options.child[1]), card)
        return
    if options.stage:
        run_stage(options.stage, card)
        return
    from benchmarks.records import replace_record

    began, told = time.perf_counter(), {}
    if (name := predicted_as(card)) and PREDICTIONS.is_file():
        told = json.loads(PREDICTIONS.read_text(encoding="utf-8")).get(name, {})
    output = options.output or Path("results") / f"gpu-{(name or card.name()).lower().replace(' ', '-')}.jsonl"
    about = {"card": card.name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    skipped = []
    for stage in options.only:
        left = options.budget - (time.perf_counter() - began)
        if left < 5:
            skipped.append(stage)
            continue
        rows, ended = gather(stage, options, min(left, STAGES[stage] * (10 if options.tiny else 1)))
        beside(rows, told)
        for number, row in enumerate(rows):
            replace_record(output, {**about, "number": number, **row}, ("card", "stage", "number"))
        print(f"== {stage}: {len(rows)} rows, {ended}", flush=True)
        for row in rows[:6]:
            shown = {key: round(v, 3) if isinstance(v, float) else v for key, v in row.items() if key != "stage"}
            print("  ", json.dumps(shown)[:180], flush=True)
    if skipped:
        print(f"no time was left for: {', '.join(skipped)}")


if __name__ == "__main__":
    main()
