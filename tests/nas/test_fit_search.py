"""``fit`` with a search in front."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import convscale as cs
from convscale.arch.small import for_image_size
from convscale.errors import UserError
from convscale.images.sources import open_dataset
from convscale.images.splits import DataSplits
from convscale.nas import coefficients
from convscale.nas.engines import local
from convscale.nas.pace import Pace
from convscale.nas.records import difference
from convscale.nas.request import Request
from convscale.nas.space import SearchSpace
from convscale.nas.walk import Walk
from convscale.pipeline import run as run_module
from convscale.pipeline import searched
from convscale.pipeline.request import FitRequest
from convscale.speed.records import append_record
from tests.choice.test_processors import row
from tests.nas.test_study import by_macs, by_name


class _Found:
    """A study whose best network is known."""

    def __init__(self, spec: cs.NetSpec, output: Path) -> None:
        self.output, self.best, self.spec = output, self, spec


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tiny: SearchSpace) -> dict[str, Any]:
    """What the search and the fit behind it were asked; neither runs."""
    seen: dict[str, Any] = {}

    def search(data: object, **given: Any) -> _Found:
        seen.update(data=data, search=given)
        return _Found(tiny.sample(3), given["output"])

    monkeypatch.setattr(searched, "search", search)
    monkeypatch.setattr(searched, "write_search_report", lambda folder: None)
    monkeypatch.setattr(run_module, "fit_request", lambda request: seen.__setitem__("fit", request))
    return seen


def test_what_is_searched_for_is_fitted(
    asked: dict[str, Any], colour_folder: Path, tmp_path: Path, tiny: SearchSpace
) -> None:
    options: dict[str, Any] = {"search": 5, "space": "small", "seed": 4, "scratch": False}
    cs.fit(colour_folder, output=tmp_path / "a", device="l4", min_throughput=2000, **options)
    given, request = asked["search"], asked["fit"]
    assert isinstance(request, FitRequest)
    assert request.candidates == [tiny.sample(3)]
    kept = {key: given[key] for key in ("device", "min_throughput", "minutes", "space", "seed", "runtime", "precision")}
    assert kept == {
        "device": "l4",
        "min_throughput": 2000,
        "minutes": 5,
        "space": "small",
        "seed": 4,
        "runtime": "compiled",  # as fit predicts for a named GPU
        "precision": "amp",
    }
    assert given["output"] == tmp_path / "a-search"


@pytest.mark.parametrize(("runtime", "expected"), [(None, "onnxruntime"), ("tensorrt", "tensorrt")])
def test_a_search_on_this_machine_s_gpu_times_the_file(
    runtime: str | None, expected: str, asked: dict[str, Any], colour_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("convscale.choice.basis.need_cuda", lambda *_: None)
    for name in ("usable_device", "need_runtime"):
        monkeypatch.setattr(f"convscale.pipeline.request.{name}", lambda device: device)
    options: dict[str, Any] = {"device": "cuda", "runtime": runtime, "space": "small"}
    cs.fit(colour_folder, output=tmp_path / "a", min_throughput=10, search=5, **options)
    assert (asked["search"]["runtime"], asked["search"]["precision"]) == (expected, "fp32")


def test_a_search_goes_without_the_threads_of_rows(asked: dict[str, Any], colour_folder: Path, tmp_path: Path) -> None:
    """A search does not see the rows, so threads of a processor that is not here would be refused there."""
    append_record(tmp_path / "rows.jsonl", row(4))
    options: dict[str, Any] = {"device": "i9-10940x", "measured": tmp_path / "rows.jsonl", "space": "small"}
    cs.fit(colour_folder, output=tmp_path / "a", min_throughput=10, search=5, **options)
    assert asked["fit"].basis().conditions.threads == 4
    assert (asked["search"]["threads"], asked["search"]["runtime"]) == (None, "onnxruntime")


@pytest.mark.parametrize(("limit", "expected"), [(None, "small"), (0.5, 0.5)])
def test_what_the_fit_is_asked_for_the_search_is_too(
    limit: float | None, expected: Any, asked: dict[str, Any], colour_folder: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"threads": 1, "runtime": "openvino", "max_bad_rate": 0.2, "max_params_m": limit}
    cs.fit(colour_folder, output=tmp_path / "a", min_throughput=10, search=5, space="small", image_size=12, **options)
    given = asked["search"]
    assert (given["threads"], given["runtime"], given["precision"]) == (1, "openvino", None)
    assert isinstance(asked["data"], DataSplits)
    assert asked["data"].max_bad_rate == 0.2
    assert given["source"] == colour_folder
    space = given["space"]
    assert (space.max_params_m if isinstance(space, SearchSpace) else space) == expected
    assert asked["fit"].data == colour_folder  # a run is known by where its data lie


def test_a_space_of_smaller_networks_keeps_its_limit(
    asked: dict[str, Any], colour_folder: Path, tmp_path: Path, tiny: SearchSpace
) -> None:
    for number, (own, limit, expected) in enumerate([(0.1, 0.5, 0.1), (0.5, 0.1, 0.1)]):
        options: dict[str, Any] = {"space": replace(tiny, max_params_m=own), "max_params_m": limit}
        cs.fit(colour_folder, output=tmp_path / f"{number}", min_throughput=10, search=5, **options)
        assert asked["search"]["space"].max_params_m == expected


def test_the_study_of_a_fit_says_where_its_data_lie(
    colours: DataSplits, tmp_path: Path, tiny: SearchSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that was begun before it did is gone on with: the images and labels are the same."""
    seen: list[Request] = []

    def walk(request: Request, folder: Path) -> Any:
        seen.append(request)
        return SimpleNamespace(run=lambda: None)

    monkeypatch.setattr("convscale.nas.study.Walk", walk)
    for number, source in enumerate((tmp_path / "photos", None)):
        cs.search(colours, source=source, space=tiny, trials=2, output=tmp_path / f"{number}")
    now, before = (request.written() for request in seen)
    assert (now["data"], before["data"]) == (str(tmp_path / "photos"), None)
    assert difference(now, before) == ""
    assert difference(now, {**before, "data_digest": "other"}).startswith("other data: ")
    unknown = {key: value for key, value in before.items() if key != "data_digest"}
    assert difference(now, unknown) == f"data None, not {now['data']!r}"
    recipe = now["recipe"]
    assert isinstance(recipe, dict)
    older = {key: value for key, value in recipe.items() if key != "compile"}  # as before it was a setting
    assert difference(now, {**before, "recipe": older}) == ""
    longer = {**before, "recipe": {**older, "epochs": 7}}
    assert difference(now, longer) == f"recipe with epochs 7, not {recipe['epochs']}"


def test_a_search_takes_the_threads(
    colours: DataSplits, tmp_path: Path, tiny: SearchSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int | None] = []

    def walk(request: Request, folder: Path) -> Any:
        seen.append(request.basis.conditions.threads)
        return SimpleNamespace(run=lambda: None)

    monkeypatch.setattr("convscale.nas.study.Walk", walk)
    for number, threads in enumerate((1, None)):
        cs.search(colours, space=tiny, trials=2, output=tmp_path / f"{number}", threads=threads)
    assert seen == [1, None]


def _folder(place: Path, side: int) -> Path:
    """Class folders of square pictures."""
    for part in ("train", "val", "test"):
        for name, grey in (("dark", 20), ("light", 220)):
            (place / part / name).mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (side, side), (grey + number,) * 3).save(place / part / name / f"{number}.png")
    return place


@pytest.mark.parametrize(
    ("side", "asked_size", "space", "sizes", "recipe"),
    [
        (32, None, "small", (32,), "small"),
        (49, None, "small", (52,), "small"),  # files are resized anyway: to what every family takes
        (32, 128, "small", (128,), "pictures"),
        (65, None, "mobile", cs.get_space("mobile").image_sizes, "pictures"),
    ],
)
def test_small_pictures_in_files_are_small_to_the_search_and_to_the_fit(
    side: int, asked_size: int | None, space: str, sizes: tuple[int, ...], recipe: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen: list[Any] = []

    def walk(request: Request, folder: Path) -> Any:
        seen.append(request)
        best = SimpleNamespace(spec=request.space.sample(1))
        return SimpleNamespace(run=lambda: SimpleNamespace(best=best, output=folder))

    monkeypatch.setattr("convscale.nas.study.Walk", walk)
    monkeypatch.setattr(searched, "write_search_report", lambda folder: None)
    monkeypatch.setattr(run_module, "fit_request", seen.append)
    data = _folder(tmp_path / "photos", side)
    cs.fit(data, output=tmp_path / "a", min_throughput=10, search=5, image_size=asked_size)
    request, fit = seen
    assert (request.space.name, request.space.image_sizes, request.recipe.name) == (space, sizes, recipe)
    assert fit.candidates[0].input.size in sizes
    splits = open_dataset(data)
    assert fit.from_scratch(splits)
    assert fit.recipe_for(splits, pretrained=False, image_size=fit.candidates[0].input.size) == recipe


@pytest.mark.parametrize(
    ("pictures", "made_for", "asked", "side"),
    # a baseline keeps its own size up to twice theirs
    [(32, 224, None, 32), (32, 64, None, 64), (49, 96, None, 96), (32, 224, 96, 96)],
)
def test_a_baseline_is_scaled_at_the_size_of_small_pictures_in_files(
    pictures: int, made_for: int, asked: int | None, side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def scaling(asks: Any, *_: object) -> Any:
        seen.append(asks)
        return SimpleNamespace(run=lambda: None)

    monkeypatch.setattr(coefficients, "_Scaling", scaling)
    base = for_image_size(cs.get_spec("mobilenetv2_050"), made_for)
    cs.find_scaling(base, _folder(tmp_path / "photos", pictures), output=tmp_path / "a", image_size=asked)
    assert (seen[0].base.input.size, seen[0].recipe["name"]) == (side, "small" if side <= 64 else "pictures")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"candidates": "resnet18"}, "leave out candidates, weights and init"),
        ({"min_throughput": None}, "search needs a limit on speed"),
        ({"init": __file__}, "leave out candidates, weights and init"),
        ({"max_memory_gb": 2.0}, "max_memory_gb is 2; a search keeps no limit on memory, leave it out or give max_par"),
        ({"search": 0.0}, "search is 0.0; it must be a number of minutes above 0"),
    ],
)
def test_bad_input_is_one_line(
    given: dict[str, Any], message: str, asked: dict[str, Any], colour_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        cs.fit(colour_folder, output=tmp_path / "a", **{"search": 5.0, "min_throughput": 100.0, **given})
    assert "search" not in asked


def test_a_resumed_fit_takes_the_result_of_the_same_search_alone(
    colours: DataSplits, tmp_path: Path, tiny: SearchSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[FitRequest] = []
    said: list[str] = []
    monkeypatch.setattr(Pace, "__call__", by_macs)
    monkeypatch.setattr(local, "run_job", by_name)
    monkeypatch.setattr(run_module, "fit_request", fits.append)

    def fit(**options: Any) -> None:
        given = {"device": "l4", "min_throughput": 10.0, "space": tiny, "search": 0.02, **options}
        cs.fit(colours, output=tmp_path / "a", progress=lambda event: said.append(str(event.get("text"))), **given)

    fit()
    (tmp_path / "a").mkdir(exist_ok=True)
    monkeypatch.setattr(Walk, "run", lambda self: pytest.fail("it was searched already"))
    said.clear()
    fit(resume=True, search=5)  # the minutes are of a call
    first, again = (request.candidates for request in fits)
    assert again == first
    folder = tmp_path / "a-search"
    assert isinstance(first, list)
    assert said == [f"search: {folder} has a result of an earlier call, which is taken: {first[0].name}"]
    for options, differs in (
        ({"seed": 1}, "seed 0, not 1"),
        ({"min_throughput": 20.0}, "reward '.*10.*', not '.*20.*'"),
    ):
        with pytest.raises(UserError, match=f"the study in {folder} was begun with {differs}; ask for the same, or"):
            fit(resume=True, **options)
