"""The report of a fit: what it says, that it survives any record, and that a browser draws it."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plotly.offline import get_plotlyjs

from convscale.errors import UserError
from convscale.show import plots
from convscale.show.fit_candidates import ratio_text
from convscale.show.fit_parts import Timed
from convscale.show.fit_record import fit_record as typed
from convscale.show.fit_sections import confused, problems, story, verdict
from convscale.show.plots import hover, save_fit_png
from convscale.show.report import fit_page, write_fit_report
from convscale.show.stated import Conditions
from tests.show.browser import Elements, dump_dom
from tests.show.example import CANDIDATES, fit_record, measurement, write_run

WINNER = "tresnet_m depth 0.33 width 0.25"
HOSTILE = "<img src=x onerror=\"document.documentElement.dataset.owned='yes'\"></script><b>'&"


def visible(html: str) -> str:
    """The page without its scripts, figures' data and styles."""
    return re.sub(r"<(script|style)\b.*?</\1>", "", html, flags=re.DOTALL)


def test_what_ships_in_float_states_its_own_speed_where_rows_in_8_bits_chose() -> None:
    """The winner has a row in 8 bits and no prediction; its gate withheld them."""
    record = fit_record()
    record["constraint"]["conditions"] = record["constraint"]["conditions"] | {"device": "l4", "precision": "int8"}
    told = {"images_per_s": 4321.0, "low": 3210.0, "high": 5432.0, "precision": "amp"}
    record["artifact"] |= {"measurement": None, "predicted": told}
    fit = typed(record)
    assert fit.chosen is not None
    assert (fit.chosen.predicted, fit.chosen.timed is None) == (None, False)
    assert f"{WINNER} is predicted to run at 4,321 images/s on l4 (onnxruntime) and is right" in verdict(fit)
    html = visible(fit_page(fit, Path("runs/example")))
    tile = html[html.index("Predicted speed") :][:400]
    for text in ("4,321", "80 %: 3,210 to 5,432", "amp"):
        assert text in tile
    assert "Speed of the artefact" not in html


def _for_l4(rows: int = 0) -> dict[str, Any]:
    """A fit for a device that is not here: all speeds predicted, but for so many of the slowest, which have a row."""
    record = fit_record()
    asked = record["constraint"]
    asked |= {"conditions": asked["conditions"] | {"device": "l4"}, "confidence": 0.8}
    record["artifact"] |= {"measurement": None, "search": None}
    timed = sorted((row for row in record["candidates"] if row["measurement"]), key=lambda row: -_speed(row))
    for row in timed[: len(timed) - rows]:
        speed = _speed(row)
        row |= {"measurement": None, "predicted": {"images_per_s": speed, "low": 0.75 * speed, "high": 1.25 * speed}}
    return record


def _speed(row: dict[str, Any]) -> float:
    return 64 / sorted(row["measurement"]["times_s"])[2]


def test_predictions_are_not_called_timings() -> None:
    html = visible(fit_page(typed(_for_l4()), Path("runs/example")))
    assert "Of 8 candidates, predicted for l4, 5 kept the 4,000 images/s asked for. 1 more was not predicted." in html
    assert (
        "Below: the speed predicted for every candidate, with its 80 % interval. All predicted for: onnxruntime, fp32, "
        "nchw, batch 64, 2 threads, l4." in html
    )
    assert "Fastest first. Speed is predicted, not measured; accuracy is on the validation images." in html
    assert "6,840 to 11,400" in html  # 9,120 times 0.75 and 1.25
    for text in ("IQR", "interquartile", "not recorded", "timed"):
        assert text not in html, text
    lines = hover(typed(_for_l4()), typed(_for_l4()).fastest_first()[0], "finalist").split("<br>")
    assert lines[1] == "9,120 images/s, predicted, 80 %: 6,840 to 11,400"
    assert lines[-1] == "onnxruntime, fp32, nchw, batch 64, 28 px, 2 threads, l4"


def test_what_was_measured_on_the_device_stands_beside_predictions() -> None:
    html = visible(fit_page(typed(_for_l4(rows=2)), Path("runs/example")))
    assert "Of 8 candidates, measured on l4 or predicted for it, 5 kept the 4,000 images/s asked for." in html
    assert "measured on the device, with its interquartile range, or predicted for it, with its 80 % interval" in html
    assert "not recorded" not in html
    assert story(typed(_for_l4(rows=8))).startswith("Of 8 candidates, measured on l4, 5 kept")


@pytest.mark.parametrize("rows", [0, 2])
def test_predicted_candidates_have_a_picture(rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest of them has no timing."""
    captions: list[str] = []
    monkeypatch.setattr("convscale.show.plots.save_png", lambda *_, caption, **__: captions.append(caption))
    save_fit_png(write_run(tmp_path / "run", _for_l4(rows)), tmp_path / "fit.png")
    machine = "Made-up CPU @ 2.60GHz (2 cores), the others predicted" if rows else "predicted"
    size, device = (32, "cpu") if rows else (28, "l4")
    assert captions == [f"onnxruntime, fp32, nchw, batch 64, {size} px, 2 threads, {device}; {machine}"]


def test_where_the_speed_is_missed_the_finalist_is_not_said_to_keep_it() -> None:
    record = fit_record()
    record["missed"] = "nothing keeps at least 4,000 images/s"
    record["candidates"] = [row | {"kept": False} for row in record["candidates"]]
    assert ", 0 kept the 4,000 images/s asked for." in story(typed(record))


def test_says_what_was_chosen_and_why() -> None:
    html = visible(fit_page(typed(fit_record()), Path("runs/example")))
    assert f"<h1>{WINNER}</h1>" in html
    assert (
        "Of 8 candidates, exported untrained and timed as they would be shipped, 5 kept the 4,000 images/s asked for."
        in html
    )
    assert "3 of them were trained briefly and compared on 6,000 validation images." in html
    assert "it is right on 92.1 % of 10,000 test images" in html
    for text in (
        "5,190",
        "asked: 4,000 or more",
        "IQR 2.0 %",
        "onnxruntime, fp32, nchw, batch 64, 32 px, 2 threads, cpu",
        "92.08 %",
        "91.5 % to 92.6 %",
    ):
        assert text in html
    assert html.count("data:image/png;base64,") == 24
    assert "12 epochs in 7 min 12 s" in html
    assert "1 more were not timed" not in html
    assert "1 more was not timed: smaller members of its family were too slow already." in html
    assert "efficientnet_b0 depth 0.5 width 0.35: wide spread: the interquartile range is 12% of the median" in html
    assert "cs.load_artifact(&#39;runs/example/artifact&#39;)" in html
    assert "2026-01-02 03:04 UTC" in html


def test_the_page_loads_nothing_from_outside() -> None:
    html = visible(fit_page(typed(fit_record()), Path("runs/example")))
    sources = re.findall(r"""\b(?:src|href)=["']?([^"'\s>]+)""", html)
    assert sources
    assert all(source.startswith(("data:", "#")) for source in sources)


def test_story_of_no_winner() -> None:
    record = fit_record()
    del record["winner"], record["evaluation"]
    assert story(typed(record)).startswith("Of 8 candidates")
    assert "chosen" not in story(typed(record))


def test_problems_are_named() -> None:
    record = fit_record()
    assert problems(typed(record)) == []
    record["artifact"]["measurement"] = measurement(3900.0, 0.02, 32)
    record["verification"] |= {"passed": False, "reason": "top-1 agrees on 97 % only"}
    record["left_out"] = ["a.jpg: truncated", "b.jpg: truncated", "c.jpg: truncated"]
    slow, withheld, skipped = problems(typed(record))
    assert "3,900 images/s" in slow
    assert "4,000 asked for" in slow
    assert withheld == "The artefact was withheld: top-1 agrees on 97 % only."
    assert skipped == "3 test images could not be read and stayed out."


def test_a_withheld_artefact_is_not_offered() -> None:
    record = fit_record()
    assert "load_artifact" in visible(fit_page(typed(record), Path("runs/example")))
    record["verification"]["passed"] = False
    assert "load_artifact" not in visible(fit_page(typed(record), Path("runs/example")))


def test_states_of_candidates() -> None:
    states = {c.name: typed(fit_record()).state_of(c) for c in typed(fit_record()).candidates}
    assert states[WINNER] == "winner"
    assert sorted(states.values()) == ["finalist"] * 2 + ["kept"] * 2 + ["rejected"] * 4 + ["winner"]
    speeds = [c.images_per_s for c in typed(fit_record()).fastest_first()]
    assert speeds.pop() is None, "what was not timed comes last"
    assert speeds == pytest.approx(sorted((c[5] for c in CANDIDATES), reverse=True))


def test_the_picture_holds_every_candidate_and_the_constraint() -> None:
    figure = plots.speed_accuracy(typed(fit_record())).to_dict()
    bars = {
        name: x
        for trace in figure["data"]
        if trace["type"] == "bar"
        for name, x in zip(trace["y"], trace["x"], strict=True)
    }
    assert bars == pytest.approx({c[0]: c[5] for c in CANDIDATES})
    points = {
        (round(x, 6), round(y, 6))
        for trace in figure["data"]
        if trace["type"] == "scatter"
        for x, y in zip(trace["x"], trace["y"], strict=True)
    }
    assert points == {(c[5], round(100 * c[7], 6)) for c in CANDIDATES if c[7] is not None} | {(5230.0, 92.4)}
    lines = [shape for shape in figure["layout"]["shapes"] if shape["type"] == "line"]
    assert [(line["x0"], line["x1"]) for line in lines] == [(4000, 4000)]


def test_confused_pairs_are_sorted() -> None:
    assert confused([[5, 1, 0], [3, 9, 2], [0, 0, 7]]) == [(1, 0, 3), (1, 2, 2), (0, 1, 1)]


def test_confusion_matrix_states_shares_of_the_row() -> None:
    figure = plots.confusion([[3, 1], [0, 4]], ["cat", "dog"]).to_dict()
    assert figure["data"][0]["hovertext"][0][1] == "<b>cat</b> taken for <b>dog</b>: 1 of 4 (25.0 %)"
    assert figure["data"][0]["z"] == [[0.75**0.5, 0.5], [0.0, 1.0]]


def test_per_class_is_worst_first() -> None:
    figure = plots.per_class([0.9, None, 0.5], ["a", "never seen", "c"], None).to_dict()
    assert figure["data"][0]["x"] == [50.0, 90.0]


@pytest.mark.parametrize("missing", [*fit_record()])
@pytest.mark.parametrize("how", ["absent", "null"])
def test_any_part_may_be_missing(missing: str, how: str) -> None:
    record = fit_record()
    if how == "absent":
        del record[missing]
    elif missing != "schema":
        record[missing] = None
    html = fit_page(typed(record), Path("runs/example"))
    assert "</html>" in html
    assert ">None<" not in html
    assert "nan" not in visible(html).lower().split()


def test_any_inner_value_may_be_null() -> None:
    record = fit_record()
    for part in ("constraint", "data", "winner", "evaluation", "verification", "artifact", "timings", "environment"):
        record[part] = dict.fromkeys(record[part])
    record["candidates"] = [dict.fromkeys(record["candidates"][0]) | {"name": "lone"}]
    record["history"] = [dict.fromkeys(record["history"][0]) | {"epoch": 1}]
    assert ">None<" not in fit_page(typed(record), Path("runs/example"))


def test_an_empty_record_still_makes_a_page() -> None:
    assert "No network was chosen" in fit_page(typed({"schema": 1}), Path("runs/example"))


def test_many_classes_stay_readable() -> None:
    record = fit_record()
    n = 120
    record["data"]["classes"] = [f"class number {i}" for i in range(n)]
    record["evaluation"] |= {"confusion": [[int(i == j) for j in range(n)] for i in range(n)], "per_class": [1.0] * n}
    assert "(the worst 20)" in fit_page(typed(record), Path("runs/example"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no fit.json; name the output folder of a fit"),
        ("{", "is not JSON"),
        ("[]", "holds no object"),
        ('{"schema": 2}', "has schema 2, this version of convscale reads up to 1; update convscale"),
    ],
)
def test_a_bad_run_folder_is_one_clear_line(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "fit.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(message)):
        write_fit_report(tmp_path)


def test_png_is_a_picture(tmp_path: Path) -> None:
    from PIL import Image

    path = save_fit_png(write_run(tmp_path / "run"), tmp_path / "fit.png", title="made up")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width == 1500
        # The winner's green, the rejected ones' tint and the constraint's red are all there.
        colours = set(map(tuple, np.asarray(image.convert("RGB")).reshape(-1, 3).tolist()))
    assert (0, 158, 115) in colours
    assert any(r > 200 and 80 < g < 110 and b < 20 for r, g, b in colours)


def test_png_needs_a_candidate_with_a_speed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no candidate with a speed to draw"):
        save_fit_png(write_run(tmp_path, {"schema": 1}), tmp_path / "fit.png")


def test_a_browser_draws_every_point(tmp_path: Path, chromium: Path) -> None:
    page = Elements(dump_dom(chromium, write_fit_report(write_run(tmp_path / "run")), tmp_path / "profile"))
    assert page.root["data-drawn"] == "5"
    # Three finalists, the winner after full training, and one bar a candidate.
    assert page.classes["picture", "point"] == 3 + 1 + len(CANDIDATES)
    assert WINNER in page.said("")
    assert WINNER in page.said("picture")
    assert "asked for: 4,000 images/s or more" in page.said("picture")
    assert page.classes["training", "point"] == 3 * 12
    assert "too slow" in page.said("candidates")
    assert "113" in page.said("mistakes")


def test_the_verdict_comes_first(tmp_path: Path) -> None:
    assert verdict(typed(fit_record())) == (
        f"{WINNER} keeps the 4,000 images/s asked for: its artefact runs at 5,190 images/s and is right on 92.1 % of "
        "the test images (95 % interval 91.5 % to 92.6 %)."
    )
    record = fit_record()
    record["constraint"]["min_throughput"] = 6000
    assert f"{WINNER} misses the 6,000 images/s asked for: its artefact runs at 5,190" in verdict(typed(record))
    html = visible(fit_page(typed(fit_record()), Path("runs/example")))
    assert html.index("keeps the 4,000 images/s asked for") < html.index("Of 8 candidates")


def test_the_speeds_of_the_chosen_one_are_reconciled() -> None:
    """By hand: calls of 0.8 to 1.2 s of 8 images have quartiles at 0.9 and 1.1 s; against steady 2 s the ratio is 2, of
    8 / 1.1 = 7.27 to 8 / 0.9 = 8.89 images/s over 4."""
    steady = Timed(conditions=Conditions(batch_size=8), times_s=(2.0,) * 5)
    wide = Timed(conditions=Conditions(batch_size=8), times_s=(0.8, 0.9, 1.0, 1.1, 1.2))
    assert ratio_text(wide, steady) == "2.00 (1.82 to 2.22)"
    record = fit_record()
    (row,) = [row for row in record["candidates"] if row["name"] == WINNER]
    row["measurement"] |= {"times_s": [64 / 6000] * 5}
    row["tuned"] = measurement(6500.0, 0.0, 32)
    record["artifact"]["measurement"] |= {"times_s": [64 / 5000] * 5}
    text = visible(fit_page(typed(record), Path("runs/example")))
    section = text[text.index('id="speeds"') :].partition("</section>")[0]
    for said in ("1.20 (1.20 to 1.20)", "1.30 (1.30 to 1.30)", "promised", "4,000 images/s or more"):
        assert said in section
    del record["artifact"]["measurement"], row["tuned"]
    assert 'id="speeds"' not in visible(fit_page(typed(record), Path("runs/example")))


def test_accuracies_have_their_interval_in_the_plot() -> None:
    """By hand: of 6,000 images 90.5 % are 5,430; Wilson's interval is 89.73 to 91.22 %."""
    figure = plots.speed_accuracy(typed(fit_record()))
    (star,) = [trace for trace in figure.data if trace.type == "scatter" and trace.marker.symbol == "star"]
    assert star.error_y.array[0] == pytest.approx(91.217 - 90.5, abs=2e-3)
    assert star.error_y.arrayminus[0] == pytest.approx(90.5 - 89.733, abs=2e-3)


def test_the_page_is_light_and_holds_the_library_whole(tmp_path: Path) -> None:
    html = write_fit_report(write_run(tmp_path / "run")).read_text(encoding="utf-8")
    assert len(html.encode()) < 2_500_000
    packed = re.findall(r'<script type="text/plain" id="plotly">(.*?)</script>', html, flags=re.DOTALL)
    assert len(packed) == 1
    assert gzip.decompress(base64.b64decode(packed[0])).decode() == get_plotlyjs()


def test_figures_keep_their_box_when_the_window_changes(tmp_path: Path, chromium: Path) -> None:
    """After a resize within a width class, and beyond, figures are as wide as their place and end above the caption."""
    page = write_fit_report(write_run(tmp_path / "run"))
    probe = """<script>
    const root = document.documentElement, seen = [];
    const look = () => document.querySelectorAll("figure:has(.plot)").forEach((figure) => {
      const plot = figure.querySelector(".plot");
      const drawn = plot.querySelector(".svg-container").getBoundingClientRect();
      const under = (figure.querySelector("figcaption") || plot).getBoundingClientRect();
      const below = plot.getBoundingClientRect().bottom - drawn.bottom;
      seen.push([plot.clientWidth, drawn.width, below, under.top - drawn.bottom, !!figure.querySelector("figcaption")]);
    });
    const wait = (then) => setTimeout(then, 400);
    const at = (width, then) => {
      document.body.style.width = width + "px"; dispatchEvent(new Event("resize")); wait(then);
    };
    const start = () => at(1000, () => { look(); at(760, () => { look(); at(420, () => {
      look(); root.dataset.seen = JSON.stringify(seen); }); }); });
    const once = () => root.dataset.drawn && !root.dataset.begun && (root.dataset.begun = 1, start());
    new MutationObserver(once).observe(root, {attributes: true});
    once();
    </script></body>"""
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", probe), encoding="utf-8")
    seen = json.loads(Elements(dump_dom(chromium, page, tmp_path / "profile")).root["data-seen"] or "[]")
    assert len(seen) == 15
    assert len({width for width, *_ in seen}) >= 3
    for width, drawn, below, above_caption, captioned in seen:
        assert drawn == pytest.approx(width, abs=1.5)
        assert below >= -1.5
        assert above_caption >= -1.5 or not captioned


def test_a_browser_takes_names_as_text(tmp_path: Path, chromium: Path) -> None:
    record = fit_record()
    record["data"]["classes"] = [HOSTILE, "<b>", *record["data"]["classes"][2:]]
    record["data"] |= {"name": HOSTILE, "path": HOSTILE, "notes": [HOSTILE]}
    record["command"] = record["created"] = HOSTILE
    for candidate in record["candidates"]:
        if candidate["name"] == WINNER:
            candidate |= {"name": HOSTILE, "reason": HOSTILE, "family": HOSTILE}
    record["winner"] |= {"name": HOSTILE, "reason": HOSTILE}
    record["verification"]["reason"] = HOSTILE
    record["artifact"]["path"] = HOSTILE
    for wrong in record["wrong"]:
        wrong |= {"true": HOSTILE, "image": wrong["image"] + '"onerror="document.documentElement.dataset.owned=1'}
    page = Elements(dump_dom(chromium, write_fit_report(write_run(tmp_path / "run", record)), tmp_path / "profile"))
    assert "data-owned" not in page.root
    assert page.root["data-drawn"] == "5"
    assert page.tags["img"] == 24
    assert "b" not in page.tags
    assert HOSTILE in page.said("")
    assert "<b>" in page.said("mistakes")


def test_written_records_are_json() -> None:
    """What a browser reads as a figure is valid JSON however names are spelt."""
    record = fit_record()
    record["data"]["classes"][0] = "\u2028</script>"
    html = fit_page(typed(record), Path("runs/example"))
    blocks = re.findall(r'<script type="application/json" id="[^"]*">(.*?)</script>', html, flags=re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        assert json.loads(block)["data"]


def test_what_is_shipped_is_told_form_by_form() -> None:
    record = fit_record()
    text = visible(fit_page(typed(record), Path("runs/example")))
    assert "What is shipped runs 2.48 times as fast as the float network in its usual settings" in text
    assert "openvino, 2 threads, 1 stream, batch 8" in text
    assert "INT8 loses 1.20 points of accuracy on 5000 images, 0.5 are allowed" in text
    assert "8 bits cost 0.25 points on validation (allowed: 0.5) with 1 layer of 53 left in float: stem.conv." in text
    del record["artifact"]["search"]
    assert "What is shipped" not in visible(fit_page(typed(record), Path("runs/example")))


def test_a_part_of_the_wrong_kind_is_one_clear_line(tmp_path: Path) -> None:
    record = fit_record()
    record["candidates"][2]["params"] = "many"
    with pytest.raises(UserError, match=r"fit.json.candidates\[2\].params is 'many'; it must be a whole number"):
        write_fit_report(write_run(tmp_path, record))


def test_a_record_keeps_what_it_does_not_know() -> None:
    """A resumed run writes its record again: keys of another version must not be lost."""
    record = fit_record() | {"later": {"a": [1, 2]}}
    record["winner"]["score"] = 3
    written = typed(record).to_json()
    assert written["later"] == {"a": [1, 2]}
    assert written["winner"] == record["winner"]
    assert written["wrong"] == record["wrong"]
    assert written["candidates"][0]["measurement"]["times_s"] == record["candidates"][0]["measurement"]["times_s"]  # type: ignore[index]


def test_the_confusion_plot_has_the_truth_on_its_left_and_the_first_class_on_top() -> None:
    """Three cats of four taken for dogs: row 0, column 1, written at x = 1, y = 0."""
    figure = plots.confusion([[1, 3], [0, 4]], ["cat", "dog"]).to_dict()
    across, down = figure["layout"]["xaxis"], figure["layout"]["yaxis"]
    assert (across["title"]["text"], down["title"]["text"]) == ("said", "true")
    assert "autorange" not in across
    assert down["autorange"] == "reversed"
    assert (across["ticktext"], down["ticktext"]) == (["cat", "dog"], ["cat", "dog"])
    assert {(note["x"], note["y"], note["text"]) for note in figure["layout"]["annotations"]} == {
        (0, 0, "1"),
        (1, 0, "3"),
        (1, 1, "4"),
    }
    assert list(map(list, figure["data"][0]["z"])) == [[0.5, 0.75**0.5], [0.0, 1.0]]


def _at_two_sizes() -> dict[str, object]:
    """A fit in which two networks were too slow at their own size and were compared at smaller ones, by features."""
    record = fit_record()
    rows = record["candidates"][:1] * 4
    table = [("a", 128, 0.70, True), ("b", 96, 0.60, True), ("a", 224, None, False), ("b", 240, None, False)]
    record["candidates"] = [
        {
            **{key: value for key, value in row.items() if key != "brief"},
            "name": name,
            "image_size": size,
            "measurement": measurement(5_000.0 if kept else 1_000.0 + size, 0.02, size),
            "kept": kept,
            "finalist": kept,
            "reason": None,
            "probe": None if share is None else {"top1": share, "train": 80, "validation": 100, "folds": 5},
        }
        for row, (name, size, share, kept) in zip(rows, table, strict=True)
    ]
    record["winner"] = {**record["winner"], "name": "a", "image_size": 128}
    return record


def test_one_network_at_two_sizes_is_two_candidates() -> None:
    fit = typed(_at_two_sizes())
    assert [fit.state_of(c) for c in fit.candidates] == ["winner", "finalist", "rejected", "rejected"]
    assert fit.chosen is fit.candidates[0]
    assert [fit.label_of(c) for c in fit.candidates] == ["a @128", "b @96", "a @224", "b @240"]
    html = visible(fit_page(fit, Path("runs/example")))
    rows = re.findall(r'<tr class="([^"]*)">', html[html.index('id="candidates"') : html.index('id="mistakes"')])
    assert rows == ["winner", "", "dim", "dim"]
    assert "brief training</th>" not in html
    assert "linear head on their features" in html


def test_without_brief_trainings_finalists_stand_where_their_features_do() -> None:
    """70 of 100: Wilson's interval is 60.4 to 78.1 %."""
    figure = plots.speed_accuracy(typed(_at_two_sizes()))
    points = {tuple(trace.text): trace for trace in figure.data if trace.type == "scatter" and trace.text}
    assert {labels: list(trace.y) for labels, trace in points.items()} == {("a @128",): [70.0], ("b @96",): [60.0]}
    bars = points["a @128",].error_y
    assert (70 - bars.arrayminus[0], 70 + bars.array[0]) == pytest.approx((60.4, 78.1), abs=0.05)
