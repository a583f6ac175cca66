"""What the docs say can be done: commands parse, snippets use public names, links lead somewhere, figures are right."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from typer.core import TyperCommand

import convscale as cs

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>[\w{}-]*)[^\n]*\n(?P<body>.*?)^(?P=indent)```", re.S | re.M)
PLACEHOLDERS = {"COMMAND", "NAME", "ARTIFACT"}


def extension(name: str) -> ModuleType:
    """A local extension of Sphinx's."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / "_ext" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


COMMANDS = extension("cli_reference")
RECORDS = extension("records")


def name_of(page: Path) -> str:
    """As people write it."""
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> Iterator[str]:
    """The bodies of a page's fenced blocks in these languages, without their indent."""
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        if block["language"] in languages:
            yield re.sub(rf"^{block['indent']}", "", block["body"], flags=re.M)


def commands_in(text: str) -> list[list[str]]:
    """The arguments of every ``convscale ...`` in a shell's lines: behind a prompt or a pipe, or by torchrun, too."""
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        line = re.sub(r"\s[#>].*", "", line.removeprefix("$ "))
        match = re.match(r"(?:.*\|\s*|.*-m |\.venv/bin/)?convscale(?:\.cli)? (.+)", line)
        if match:
            commands.append(shlex.split(match[1]))
    return commands


def shell_commands() -> list[tuple[str, list[str]]]:
    """Every command line of the docs that stands in a block."""
    return [(name_of(page), words) for page in PAGES for body in blocks(page, "sh", "") for words in commands_in(body)]


def named_commands() -> list[tuple[str, list[str]]]:
    """Every ``convscale ...`` in the middle of a sentence."""
    found = []
    for page in PAGES:
        prose = BLOCK.sub("", page.read_text(encoding="utf-8"))
        found += [(name_of(page), match[1].split()) for match in re.finditer(r"`convscale ([^`]+)`", prose)]
    return found


def command_named(name: str) -> TyperCommand:
    """The command, as the parser knows it."""
    commands = COMMANDS.command_tree()
    assert name in commands, f"there is no command {name!r}"
    return commands[name]


def parse(words: list[str]) -> None:
    """Parse a whole command line, without running it."""
    command_named(words[0]).make_context(words[0], list(words[1:]))


def identifiers(cases: list[tuple[str, list[str]]]) -> list[str]:
    """For pytest."""
    return [f"{page}: {' '.join(words)[:60]}" for page, words in cases]


@pytest.mark.parametrize(("page", "words"), shell_commands(), ids=identifiers(shell_commands()))
def test_a_command_line_parses(page: str, words: list[str]) -> None:
    parse(words)


@pytest.mark.parametrize(("page", "words"), named_commands(), ids=identifiers(named_commands()))
def test_a_command_in_a_sentence_exists_with_its_options(page: str, words: list[str]) -> None:
    if words[0] in PLACEHOLDERS:
        return
    known = {option for parameter in command_named(words[0]).params for option in parameter.opts} | {"--help"}
    assert {word for word in words if word.startswith("-") and word != "-"} <= known


def test_the_pages_have_commands() -> None:
    assert len(shell_commands()) > 50
    assert {words[0] for _, words in shell_commands()} >= {
        "fit",
        "choose",
        "measure",
        "train",
        "export",
        "classify",
        "report",
        "predict",
        "tune",
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("convscale fitt --data-dir photos/", "there is no command 'fitt'"),
        ("convscale show resnet50 --no-such-option", "--no-such-option"),
        ("$ convscale fit --output runs/a", "data_dir"),
        ("find . | convscale measure a -b many", "integer"),
    ],
)
def test_a_wrong_command_line_is_found(line: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        parse(commands_in(line)[0])


PYTHON = [
    (name_of(page), number, body) for page in PAGES for number, body in enumerate(blocks(page, "python"), start=1)
]


@pytest.mark.parametrize(("page", "number", "body"), PYTHON, ids=[f"{page}#{number}" for page, number, _ in PYTHON])
def test_a_python_snippet_compiles_and_uses_public_names(page: str, number: int, body: str) -> None:
    tree = ast.parse(body)
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    used = {node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id == "cs"}
    assert used <= set(cs.__all__)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("convscale."):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


def benchmark_source(name: str) -> Path:
    """What ``python -m benchmarks.NAME`` runs."""
    place = ROOT / "benchmarks" / name
    return place / "__main__.py" if place.is_dir() else place.with_suffix(".py")


def benchmark_options(name: str) -> set[str]:
    """The options of a benchmark, by its source: nothing is imported."""
    tree = ast.parse(benchmark_source(name).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    words = [argument for call in calls if call.func.attr == "add_argument" for argument in call.args]  # type: ignore[attr-defined]
    return {str(word.value) for word in words if isinstance(word, ast.Constant) and str(word.value).startswith("-")}


def benchmarks_named(text: str) -> list[tuple[str, set[str]]]:
    """Every ``python -m benchmarks.NAME ...`` of a text with its options: in a sentence, where one may go over the end
    of a line, and in blocks.
    """
    lines = [line for block in BLOCK.finditer(text) for line in block["body"].replace("\\\n", " ").splitlines()]
    spans = re.findall(r"`([^`]+)`", BLOCK.sub("", text))
    named = [re.search(r"python -m benchmarks\.(\w+)(.*)", part, re.S) for part in (*spans, *lines)]
    return [(each[1], set(re.findall(r"(?<=\s)--?[a-z][\w-]*", each[2]))) for each in named if each]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_benchmarks_and_tests_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name, options in benchmarks_named(text):
        assert benchmark_source(name).is_file(), f"there is no benchmarks.{name}"
        assert options <= benchmark_options(name) | {"--help"}, f"benchmarks.{name} has no {options}"
    code = re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))
    paths = [word.partition("::")[0] for word in code if re.match(r"(tests|benchmarks|tools)/[\w./-]+(::\w+)?$", word)]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    dotted = [word.split(".")[1] for word in code if re.match(r"benchmarks\.\w+$", word)]
    assert [name for name in dotted if not benchmark_source(name).is_file()] == []


def test_options_of_benchmarks_are_found() -> None:
    block = "```sh\npython -m benchmarks.light --help\n.venv/bin/python -m benchmarks.count\nls --all\n```\n"
    text = f"As `python -m benchmarks.fit_peers --threads\n1 --spits 3` says `--here`:\n{block}"
    fit_peers = ("fit_peers", {"--threads", "--spits"})
    assert benchmarks_named(text) == [fit_peers, ("light", {"--help"}), ("count", set())]
    assert {"--threads", "--splits", "--minutes"} <= benchmark_options("fit_peers")
    assert "--spits" not in benchmark_options("fit_peers")
    assert {"--only", "--again"} <= benchmark_options("accidents")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page: Path) -> None:
    # A page that only includes another one is checked as that other one.
    prose = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} is no file"
        if anchor:
            assert anchor in {slug(title) for title in re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M)}


def slug(title: str) -> str:
    """A heading's anchor, as MyST and the usual hosts make it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_every_public_name_is_in_the_reference_once() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "reference").glob("*.md")))
    documented = re.findall(r"^\.\. auto(?:function|class):: convscale\.(\w+)$", text, re.M)
    assert sorted(documented) == sorted(set(cs.__all__) - {"__version__"})


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The extension that looks figures up, over two small records."""
    measured = {"conditions": {"batch_size": 8}, "times_s": [1.0, 2.0, 3.0, 4.0, 5.0]}
    rows = [
        {"name": "a", "x": 3, "ok": True, "by": {"0.5": 7}},
        {"name": "b", "x": 4.0, "list": [1, 2], "measurement": measured},
        {"name": "c, as shipped", "x": 5},
    ]
    (tmp_path / "made.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    module = extension("records")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("made[name=a].x", "3"),
        ("made[name=a].x / made[name=b].x : .1%", "75.0%"),
        ("made[name=b].x : .2f images/s", "4.00 images/s"),
        ("made[name=a].by.0.5", "7"),
        ("made[name=b].list.1", "2"),
        ("made[name=b].x / 1e1 : .1f MB", "0.4 MB"),
        ("made[name=a].x / made[name=b].x : .2fx", "0.75x"),
        ("made[name=a].ok", "yes"),
        ("made[name=c, as shipped].x", "5"),
        ("made[name=c, as shipped, x=5].x", "5"),
        ("made[name=b].measurement.images_per_s : .3f", "2.667"),  # 8 images in the median of 3 s
        ("made[name=b].measurement.iqr_rel : .3f", "0.667"),  # quartiles 2 and 4 s over 3 s
    ],
)
def test_a_figure_is_looked_up(records: ModuleType, expression: str, expected: str) -> None:
    assert records.evaluate(expression) == expected


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("none[name=a].x", "there is no results/none.jsonl"),
        ("made[name=c].x", "0 records"),
        ("made[name=c, as shipped, x=4].x", "0 records"),
        ("made.x", "3 records"),
        ("made[name=a].y", "no field 'y'"),
        ("made[name=a].x / made[name=a].name", "not a number"),
    ],
)
def test_a_figure_that_is_not_there_is_an_error(records: ModuleType, expression: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        records.evaluate(expression)


LOOKED_UP = [page for page in PAGES if "{record" in page.read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", LOOKED_UP, ids=name_of)
def test_every_lookup_of_a_page_finds_its_record(page: Path) -> None:
    """What ends the build of the site otherwise."""
    text, wrong = page.read_text(encoding="utf-8"), []
    for lookup in re.findall(r"\{record\}`([^`]+)`", text):
        try:
            RECORDS.evaluate(" ".join(lookup.split()))
        except (ValueError, TypeError) as error:
            wrong.append(f"{lookup}: {error}")
    for argument, body in re.findall(r"^```\{record-table\} (.+?)\n(.*?)^```", text, re.S | re.M):
        try:
            RECORDS.table_of(argument, body.splitlines())
        except (ValueError, TypeError) as error:
            wrong.append(f"{argument}: {error}")
    assert wrong == []


def test_pages_have_lookups() -> None:
    assert {name_of(page) for page in LOOKED_UP} >= {"docs/figures.md", "docs/how-to/serve.md", "docs/training.md"}


def test_a_table_of_records_by_hand(records: ModuleType) -> None:
    made = records.table_of("made[name=a]", ["what = {name}, whole", "", "of four = x / 4 : .2f"])
    assert made.splitlines() == ["| what | of four |", "| --- | --- |", "| a, whole | 0.75 |"]
    for argument, column, message in (
        ("made[name=none]", "what = name", "no record of results/made has name=none"),
        ("made[name=a]", "what", "lines of heading = expression"),
        ("made[name=a]", "what = nothing", "no field 'nothing'"),
    ):
        with pytest.raises(ValueError, match=message):
            records.table_of(argument, [column])


def test_a_cell_may_hold_words_and_other_records(records: ModuleType) -> None:
    row = {"name": "a", "low": 1.25}
    parts = records.parts_of("{low : .1f} to {made[name=$name].x}")
    assert "".join(records.part_of(part, row) for part in parts) == "1.2 to 3"


@pytest.mark.parametrize("name", ["ship", "ship_classify", "ship_gate"])
def test_tables_beside_records_are_made_from_them(name: str) -> None:
    """Pages include these tables, so they must be what the benchmark makes of its records today."""
    module = importlib.import_module(f"benchmarks.{name}")
    rows = [json.loads(line) for line in (ROOT / "results" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert module.table(rows) == (ROOT / "results" / f"{name}.md").read_text(encoding="utf-8")
