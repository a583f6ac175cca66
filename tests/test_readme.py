"""Figures that stand typed in a page, since no lookup runs there, agree with the records that they come from.

README.md is read on its own, so its figures can not be looked up as those of ``docs/`` are. Each function below gives
the texts with the figures of one record that must stand in README.md, with lookups in braces: those of
``docs/_ext/records.py``, or ``{=...}`` around what was made of several rows. Where a record was made anew the failure
prints the text to put there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import pytest

from convscale import words
from convscale.artifact.answers import Answer
from tests.test_docs import RECORDS, blocks

ROOT = Path(__file__).parents[1]
LITE = "model=tf_efficientnet_lite0"
FIT_MINUTES: float | None = 1.5
"""How long README.md's `fit` was told to train at most; None: as long as its recipe is."""


def filled(text: str) -> str:
    """A text with what its lookups give."""
    return re.sub(r"\{([^{}]*)\}", lambda b: b[1][1:] if b[1][0] == "=" else RECORDS.evaluate(b[1]), text)


def standing(text: str, page: str) -> str:
    """What a page says in the place of a text: the same words around any figures."""
    kept = [re.escape(part) for part in re.split(r"\{[^{}]*\}", text)]
    gaps = [r"[^|]{0,40}?" if before and behind else r"\S+" for before, behind in pairwise(kept)]
    found = re.search("".join(f"{gap}{part}" for gap, part in zip(["", *gaps], kept, strict=True)), page)
    return found[0] if found else "no such sentence: its words differ too"


def mismatch(text: str, page: Path) -> str:
    """The text that is right, and what stands there, where a page does not have it; else nothing."""
    said, right = (" ".join(each.split()) for each in (page.read_text(encoding="utf-8"), filled(text)))
    return "" if right in said else f"{page.name} should say\n    {right}\nand says\n    {standing(text, said)}"


def rows(file: str, inside: str = "", **fields: object) -> list[dict[str, Any]]:
    """The records of a file, or of a list inside its one record, that have these fields."""
    found = RECORDS.records_of(file)
    if inside:
        found = RECORDS.field(found[0], inside)
    fitting = [row for row in found if all(row.get(key) == value for key, value in fields.items())]
    if not fitting:
        raise ValueError(f"no record of results/{file} has {fields}")
    return fitting


def values(found: Iterable[dict[str, Any]], path: str) -> list[float]:
    """One number of every row."""
    return [RECORDS.number(RECORDS.field(row, path)) for row in found]


def figure(value: float, form: str) -> str:
    """A number for a text."""
    return f"{{={value:{form}}}}"


def from_to(numbers: list[float], form: str, unit: str = "") -> str:
    """The least and the greatest."""
    return f"{figure(min(numbers), form)}{unit} to {figure(max(numbers), form)}{unit}"


def machine(where: str) -> str:
    """That of a row of `serve`, ``AMD EPYC, 2 cores``, as people say it."""
    name, _, cores = RECORDS.evaluate(f"serve[{where}].machine").rpartition(", ")
    return f"{{={cores}}} of an {{={words.device(name)}}}"


def demo() -> Iterator[str]:
    yield "`make demo` on 2 cores of an {demo.environment.device_name}, {demo.timings.total_s / 60 : .1f minutes}"
    yield (
        "{demo.constraint.min_throughput : ,.0f images/s} (batch {demo.constraint.conditions.batch_size}, "
        "{demo.constraint.conditions.image_size} px, {demo.artifact.runtime.threads} threads; model only), timed "
        f"{figure(len(rows('demo', 'candidates')), 'd')} scaled"
    )
    yield (
        "trained `{demo.winner.name}` for the {demo.timings.train_s / 60 : .0f minutes} that it takes: "
        "**{demo.evaluation.top1 / 0.01 : .2f %} of the {demo.evaluation.n : ,d} test images right** "
        "({demo.evaluation.top1_interval.0 / 0.01 : .2f} to {demo.evaluation.top1_interval.1 / 0.01 : .2f %}), "
        "shipped at {demo.artifact.measurement.images_per_s : ,.0f images/s}"
    )
    yield "trained network on {demo.verification.top1_agreement / 0.01 : .2f %} of them"


def parity() -> Iterator[str]:
    worst = max(values(rows("parity", keys_come_back=True), "gradient"))
    yield f"differs by at most {figure(worst, '.1e')}"


def memory() -> Iterator[str]:
    kept = "{memory[name=%s, norm=inplace].%s / 1e6 : .1f MB}"
    yield (
        f"TResNet-M {kept % ('tresnet_m', 'saved_bytes')}, timm's {kept % ('tresnet_m', 'timm_saved_bytes')}; "
        f'EfficientNet-B0 with `norm="inplace"` {kept % ("efficientnet_b0", "saved_bytes")}, timm\'s '
        f"{kept % ('efficientnet_b0', 'timm_saved_bytes')}"
    )


def fit_peers() -> Iterator[str]:
    told = [row for row in rows("fit_peers") if row["conditions"]["minutes"] == FIT_MINUTES]

    def right(method: str) -> str:
        sets = ([row for row in told if row["set"] == name] for name in ("stamps", "icons"))
        return " and ".join(figure(100 * mean(values(each, f"methods.{method}.top1")), ".1f") for each in sets)

    yield (
        f"{right('fit')} % right; timm's parts, tuned within the time, {right('timm')}; linear probe {right('probe')}; "
        f"**the published best fine-tuned for all of that time {right('published')}**"
    )


def ship_peers() -> Iterator[str]:
    lines = (ROOT / "results" / "ship_peers.md").read_text(encoding="utf-8").splitlines()

    def ratios(model: str) -> list[str]:
        line = next(line for line in lines if line.startswith(f"| {model} |"))
        return [f"{{={ratio}}}" for ratio in re.findall(r"[\d.]+x \([\d.-]+\)", line)]

    b0, v2 = ratios("efficientnet_b0"), ratios("mobilenetv2_100")
    yield f"EfficientNet-B0: fp32 {b0[0]}, bf16 {b0[1]}, INT8 {b0[2]}; MobileNetV2: fp32 {v2[0]}, INT8 {v2[1]}"


def ship() -> Iterator[str]:
    row = "ship[model=%s, contender=%s].images_per_s"
    resnet50, tresnet_m, tresnet_l, b0 = (
        f"{{{row % (model, 'ours fastest')} / {row % (model, 'timm compiled')} : .1fx}}"
        for model in ("resnet50", "tresnet_m", "tresnet_l", "efficientnet_b0")
    )
    yield f"ResNet-50 {resnet50}, TResNet-M {tresnet_m}, TResNet-L {tresnet_l} with a wide spread"
    yield f"EfficientNet-B0 {b0}"

    def over_peers(contender: str) -> list[float]:
        speeds = {(row["model"], row["contender"]): row["images_per_s"] for row in rows("ship")}
        best: dict[str, float] = {}
        for (model, who), speed in speeds.items():
            if who.startswith("timm "):
                best[model] = max(speed, best.get(model, 0.0))
        return [speeds[model, contender] / speed for model, speed in best.items()]

    yield (
        f"{from_to(over_peers('ours fastest'), '.1f', 'x')}; float32 alone "
        f"{from_to(over_peers('ours fp32'), '.2f', 'x')}"
    )


def ship_classify() -> Iterator[str]:
    eager = "{ship_classify[model=%s].ours_over_eager : .1fx}"
    compiled = "{ship_classify[model=%s].ours_over_compiled : .1fx}"
    yield (
        f"ResNet-50 {eager % 'resnet50'} eager, {compiled % 'resnet50'} compiled; EfficientNet-B0 "
        f"{eager % 'efficientnet_b0'} and {compiled % 'efficientnet_b0'}"
    )


def ship_gate() -> Iterator[str]:
    lines = (ROOT / "results" / "ship_gate.md").read_text(encoding="utf-8").splitlines()

    def lost(model: str, form: str) -> str:
        line = next(line for line in lines if line.startswith(f"| {model} | Fashion-MNIST | {form} int8 |"))
        return f"{{={line.split(' | ')[-2]}}}"

    yield f"ResNet-50 {lost('resnet50', 'onnx')} points (ONNX) and {lost('resnet50', 'openvino')} (OpenVINO)"
    yield f"TResNet-M {lost('tresnet_m', 'onnx')} and {lost('tresnet_m', 'openvino')}; at the worst"
    eight = [row for row in rows("ship_gate", precision="int8") if row["part"] != "withheld"]

    def points(row: dict[str, Any]) -> float:
        return 100 * (row["accuracy_before"] - row["accuracy_after"])

    judged = [row for row in eight if row.get("test")]
    worst = max(judged, key=lambda row: points(row["test"]))
    assert (worst["model"], worst["format"]) == ("tf_efficientnet_lite0", "onnx"), "README.md names the worst"
    yield f"at the worst {figure(points(worst['test']), '.2f')} (EfficientNet-Lite0, ONNX). Withheld:"
    refused = {(row["part"], row["model"], row["format"]): row for row in eight if row.get("withheld")}
    b0, *lites = (
        refused[("fashion", "efficientnet_b0", "openvino")],
        *(refused[("lite0", "tf_efficientnet_lite0", format)] for format in ("onnx", "openvino")),
    )
    assert len(refused) == 3, "README.md names all that were withheld"
    disagreement = max(100 * (1 - row["top1_agreement"]) for row in lites)
    yield (
        f"Withheld: EfficientNet-B0 in OpenVINO ({figure(points(b0), '.2f')} points on the validation set, "
        f"{figure(b0['max_drop'], '.1f')} allowed), and Lite0 with ImageNet weights in both formats (another class on "
        f"{figure(disagreement, '.1f')} % of crops of photographs, {figure(lites[0]['max_drop'], '.0f')} allowed)"
    )


def predictor() -> Iterator[str]:
    def both(found: list[dict[str, Any]]) -> str:
        return ", ".join(f"{from_to(values(found, key), '.1f')} %" for key in ("median_pct", "p90_pct"))

    sheets = rows("predictor", "records", method="card left out, data sheet")
    eager = [row for row in sheets if row["set"] == "eager-nchw"]
    new = [row for row in eager if row["table"].endswith("5090")]
    (rtx5090,) = new
    yield f"eager: RTX 3090 and 4090 {both([row for row in eager if row not in new])}"
    yield f"RTX 5090 {figure(rtx5090['median_pct'], '.1f')} %, {figure(rtx5090['p90_pct'], '.1f')} % (too fast)"
    yield f"compiled: {both([row for row in sheets if row['set'] == 'compiled'])}"
    yield (
        "Of the TResNet paper's V100 figures {predictor_v100.inside_80.infer} of "
        f"{figure(len(rows('predictor_v100', 'records')), 'd')} lie in the 80 % interval"
    )


def predictor_families() -> Iterator[str]:
    def of(table: str) -> str:
        (row,) = rows("predictor", "records", method="every family left out", table=f"infer-amp-nchw-{table}")
        return f"{figure(row['median_pct'], '.1f')} %, {figure(row['p90_pct'], '.1f')} %"

    yield (
        f"eager: RTX 3090 {of('pt240-cu124-rtx3090')}; RTX 4090 {of('pt291-cu128-4090')}; compiled "
        f"{of('pt291-cu128-4090-dynamo')}"
    )


def nas_tables() -> Iterator[str]:
    row = "nas_tables[table=mnasnet, reward=a100, method=%s].regret_%s"

    def behind(method: str) -> str:
        return f"{{{row % (method, 100)} : .2f}} and {{{row % (method, 300)} : .2f}}"

    yield (
        f"ours {{{row % ('guided', 100)} : .3f}} and {{{row % ('guided', 300)} : .0f}}; REINFORCE "
        f"{behind('reinforce')}, evolution {behind('evolution')}, random {behind('random')}"
    )


def front() -> Iterator[str]:
    def of(field: str, form: str, kit: int, *cards: str) -> str:
        found = [row for row in rows("front", "summary", confidence=0.8, kit=kit) if row["card"].startswith(cards)]
        return figure(mean(values(found, field)), form)

    yield (
        f"{of('lost_mean', '.2f', 0, 'all')} points lost in the mean (GPUs {of('lost_mean', '.1f', 0, 'RTX')}, CPU "
        f"{of('lost_mean', '.1f', 0, 'i9')}), the speed kept in {of('kept_pct', '.0f', 0, 'all')} % at confidence 0.8; "
        f"with four networks measured there first (`--kit`) {of('lost_mean', '.1f', 4, 'all')} points and "
        f"{of('kept_pct', '.0f', 4, 'all')} %"
    )


def choose() -> Iterator[str]:
    (row,) = rows("choose")
    yield "{choose.candidates : ,d} candidates for a named GPU: {choose.weights} released weights of {choose.networks}"
    yield f"{from_to(row['cold_s'], '.1f')} s from an empty cache"


def loader() -> Iterator[str]:
    yield (
        "{loader[conditions.width=500].speedup.ours : .2fx} with the same pixels; "
        "{loader[conditions.width=500].speedup.ours, scaled decoding to 0.5 : .2fx} with `scaled_decode` to a half"
    )


def train_speed() -> Iterator[str]:
    yield (
        "the same speed ({train_speed[model=tresnet_m].speed_ratio : .2fx}) with "
        "{train_speed[model=tresnet_m].memory_ratio : .2fx} the peak memory; with plain batch norm "
        "{train_speed[model=tresnet_m:batchnorm].speed_ratio : .2fx} the speed"
    )


def fashion() -> Iterator[str]:
    minutes, short = (rows("fashion", side="ours", epochs=epochs) for epochs in (8, 2))
    yield (
        f"{figure(100 * mean(values(minutes, 'test_top1')), '.1f')} % after "
        f"{figure(mean(values(minutes, 'seconds')) / 60, '.1f')} minutes, "
        f"{figure(100 * mean(values(short, 'test_top1')), '.1f')} % after "
        f"{figure(mean(values(short, 'seconds')), '.0f')} seconds (two cores of an AMD EPYC, three seeds; 94.0 and "
        "92.5 were asked for); timm's ResNet-18 and ResNet-10-T with SGD, "
        "cosine and EMA ended at {fashion[side=timm, model=resnet18].test_top1 / 0.01 : .1f} and "
        "{fashion[side=timm, model=resnet10t].test_top1 / 0.01 : .1f %} after "
        "{fashion[side=timm, model=resnet18].seconds / 60 : .1f} and "
        "{fashion[side=timm, model=resnet10t].seconds / 60 : .1f}"
    )


def transfer() -> Iterator[str]:
    def right(method: str) -> str:
        return f"{figure(100 * mean(values(rows('transfer', method=method), 'top1')), '.1f')} %"

    yield (
        f"{right('finetune')} right; timm's parts with the same weights {right('timm')}; a linear probe of their "
        f"features {right('probe')}"
    )


def light() -> Iterator[str]:
    yield (
        "{light.installed_mb : .0f MB}; {light.time_ratio : .2f} times its time ({light.classify_ratio : .2f} with a "
        "JPEG read from its file too), {light.peak_mb.classify : .0f MB} of memory"
    )


def served(part: str, *fields: str, form: str = ".0f") -> str:
    """Lookups into `serve`, joined by commas."""
    return ", ".join(f"{{serve[part={part}, {LITE}].{field} : {form}}}" for field in fields)


def busy(model: str) -> str:
    """Whether the runs of a model's speeds say that their machine had other work."""
    speeds = [row for part in ("throughput", "latency", "load") for row in rows("serve", model=model, part=part)]
    return "{=, on a busy machine}" if any(row["busy"] for row in speeds) else "{=}"


def serve() -> Iterator[str]:
    where = machine(f"part=throughput, {LITE}")
    yield f"(EfficientNet-Lite0, {where} for the clients too{busy('tf_efficientnet_lite0')})"
    peers = ("fastapi", "litserve", "ort")
    yield (
        f"{served('throughput', 'images_per_s.ours')} images/s; "
        f"{served('throughput', *(f'images_per_s.{peer}' for peer in peers))} "
        f"({served('throughput', 'of_best_peer', form='.2fx')} the best: the network takes the time). "
        f"One client waits {served('latency', 'p50_ms.ours', form='.1f ms')}; "
        f"{served('latency', *(f'p50_ms.{peer}' for peer in peers), form='.1f')}. "
        f"{served('answers', 'answers', form=',d')} answers under load: none wrong; "
        f"{served('stops', 'stops', form='d')} SIGTERMs: none lost"
    )


def kill_loop() -> Iterator[str]:
    found = rows("kill_loop")
    while_saving, kills = (figure(sum(values(found, key)), ".0f") for key in ("kills_within_a_save", "kills"))
    yield f"{while_saving} of the {kills} while they saved"


README = (
    demo,
    parity,
    memory,
    fit_peers,
    ship_peers,
    ship,
    ship_classify,
    ship_gate,
    predictor,
    predictor_families,
    nas_tables,
    front,
    choose,
    loader,
    train_speed,
    fashion,
    transfer,
    light,
    serve,
    kill_loop,
)


def check(texts: Iterable[str], page: Path) -> None:
    """Fail with all that is to be put right."""
    wrong = [told for text in texts if (told := mismatch(text, page))]
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)


@pytest.mark.parametrize("texts", README, ids=lambda texts: texts.__name__)
def test_figures_in_the_readme_are_those_of_the_records(texts: Callable[[], Iterator[str]]) -> None:
    check(texts(), ROOT / "README.md")


def test_the_conditions_that_the_servers_how_to_states_are_those_of_the_record() -> None:
    runs = {(row["model"], row["part"]) for row in rows("serve")}
    machines = " or ".join(sorted({machine(f"model={model}, part={part}") for model, part in runs}))
    load = max((busy(model) for model, _ in runs), key=len)
    check([f"{machines} for the server, the clients and all{load}."], ROOT / "docs" / "how-to" / "serve.md")


@pytest.mark.parametrize("part", ["answers", "stops"])
def test_nothing_was_wrong_or_lost_under_load(part: str) -> None:
    """As README.md and the how-to say in words."""
    assert {(row["wrong"], row["lost"]) for row in rows("serve", part=part)} == {(0, 0)}


def test_kills_lost_nothing() -> None:
    """As README.md says in words."""
    assert {(row["same_weights"], row["same_losses"]) for row in rows("kill_loop")} == {(True, True)}


def test_the_snippet_says_what_is_wrong_with_a_picture(capsys: pytest.CaptureFixture[str]) -> None:
    """One broken picture ended it in an IndexError; so would one of which no label is above its threshold."""
    (body,) = [each for each in blocks(ROOT / "README.md", "python") if "artifact.classify(" in each]
    loop = "\n".join(line for line in body.splitlines() if line.startswith(("for answer in", "    ")))
    answers = (Answer(name="a.png", error="it is no picture"), Answer(name="b.png"))
    answers = (*answers, Answer(name="c.png", labels=("cat", "dog"), probabilities=(0.75, 0.25)))
    exec(loop, {"artifact": SimpleNamespace(classify=lambda place: answers)})
    said = capsys.readouterr().out.splitlines()
    assert said == ["a.png it is no picture ()", "b.png () ()", "c.png ('cat',) (0.75,)"]


@pytest.mark.parametrize("text", ["{=87} of the {=200} while they saved", "each; {=87} of the {=200}"])
def test_a_figure_that_differs_from_its_record_is_told(text: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Killed 50 times\neach; 93 of the 200 while they saved | next", encoding="utf-8")
    right = text.replace("{=", "").replace("}", "")
    said = f"page.md should say\n    {right}\nand says\n    {right.replace('87', '93')}"
    assert mismatch(text, page) == said
    page.write_text("each; 87 of\nthe 200 while they saved", encoding="utf-8")
    assert mismatch(text, page) == ""
