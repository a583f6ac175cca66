"""The plain install, without any extra: what runs there, and the one line that everything else says.

Extras' libraries are blocked in a fresh process, as they are missing there.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import convscale
from convscale.artifact.artifact import Artifact
from convscale.errors import EXTRAS, MissingExtra, UserError, naming_extras
from convscale.ship.export import export
from tests.ship.conftest import Tiny, randomise

ROOT = Path(convscale.__file__).parent.parent
LIBRARIES = sorted({name for names in EXTRAS.values() for name in names})
BLOCK = """
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise {error}

sys.meta_path.insert(0, Missing())
"""
ABSENT = 'ModuleNotFoundError(f"No module named {name!r}", name=name)'


def fresh(code: str, *arguments: object, blocked: list[str] = LIBRARIES, error: str = ABSENT) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of Python code where these libraries are missing."""
    command = [sys.executable, "-W", "error", "-c", BLOCK.format(blocked=blocked, error=error) + code]
    command += [str(argument) for argument in arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr


def command_line(*arguments: object, error: str = ABSENT) -> tuple[int, str, str]:
    """``convscale ARGUMENTS`` there."""
    return fresh("from convscale.cli.app import main\nmain()", *arguments, error=error)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JPEG, a see-through PNG and a damaged file."""
    folder = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 60, 4), dtype=np.uint8)
    Image.fromarray(pixels[..., :3]).save(folder / "a.jpg")
    Image.fromarray(pixels).save(folder / "b.png")
    (folder / "c.png").write_bytes((folder / "b.png").read_bytes()[:70])
    return folder


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export(randomise(Tiny()), tmp_path_factory.mktemp("light") / "onnx", format="onnx")


CLASSIFY = """
import json, pathlib
import numpy as np, convscale as cs
from PIL import Image
artifact, path = cs.load_artifact(sys.argv[1]), sys.argv[2] + "/a.jpg"
with Image.open(path) as image:
    image.load()
given = [path, pathlib.Path(path).read_bytes(), image, np.asarray(image), sys.argv[2]]
answers = [[(a.labels, a.probabilities, a.error) for a in artifact.classify(one, top=2)] for one in given]
answers.append(len(artifact.classify(given)))
answers.append(artifact(np.zeros((2, 32, 32, 3), np.uint8)).sum(1).round(5).tolist())
print(json.dumps([answers, sorted(set(sys.modules) & set(json.loads(sys.argv[3])))]))
"""


def check_classifying(art: Artifact, pictures: Path, blocked: list[str]) -> None:
    """Every kind of picture, in a process without these libraries, has the answers that it has here."""
    code, out, err = fresh(CLASSIFY, art.folder, pictures, json.dumps(blocked), blocked=blocked)
    assert (code, err) == (0, "")
    answers, loaded = json.loads(out)
    assert loaded == []
    here = [
        [list(a.labels), pytest.approx(list(a.probabilities), abs=1e-6), a.error]
        for a in art.classify(str(pictures), top=2)
    ]
    assert answers[:4] == [[here[0]]] * 4
    assert answers[4] == here
    assert "truncated" in here[2][2]
    assert answers[5:] == [7, [1.0, 1.0]]


def test_an_artefact_opens_and_classifies_without_torch(artifact: Artifact, pictures: Path) -> None:
    check_classifying(artifact, pictures, LIBRARIES)


@pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
def test_an_openvino_artefact_does_where_openvino_is(pictures: Path, tmp_path: Path) -> None:
    art = export(randomise(Tiny()), tmp_path / "openvino", format="openvino")
    check_classifying(art, pictures, [name for name in LIBRARIES if name != "openvino"])


def test_the_command_line_classifies(artifact: Artifact, pictures: Path, tmp_path: Path) -> None:
    table = tmp_path / "rows.jsonl"
    code, out, err = command_line("classify", pictures, "--model", artifact.folder, "--output", table, "--top", 2)
    assert (code, out) == (0, "")
    assert err.startswith("3 images, 1 bad")
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    expected = artifact.classify(str(pictures), top=2)
    assert [[c["class"] for c in row.get("classes", [])] for row in rows] == [list(a.labels) for a in expected]
    assert [row.get("error", "") for row in rows] == [a.error for a in expected]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--help",), "classify"),
        (("classify", "--help"), "Files, folders, patterns"),
        (("list", "tresnet_m"), "tresnet_m"),
        (("list", "--pretrained", "--zoo", "own", "resnet50d*"), "apache-2.0"),
        (("list", "--devices"), "rtx-4090"),
        (("show", "resnet18"), "basic"),
        (("scale", "resnet18", "--phi", "1"), "258px"),
        (("predict", "resnet50", "--device", "l4"), "resnet50 @224"),
        (("choose", "--device", "l4", "--min-throughput", "3000", "--zoo", "own"), "around the constraint"),
        (("recipes",), "finetune"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_else_works(arguments: tuple[str, ...], said: str) -> None:
    code, out, err = command_line(*arguments)
    assert (code, said in out) == (0, True), out + err


@pytest.mark.parametrize(
    "arguments",
    [
        ("fit", "--data-dir", "photos", "--output", "out"),
        ("train", "--model", "resnet18", "--data-dir", "photos", "--output", "out"),
        ("export", "resnet18", "--output", "out"),
        ("count", "resnet18"),
        ("measure", "resnet18"),
        ("report", "runs"),
        ("choose", "--min-throughput", "100", "--model", "resnet18", "--json"),
        ("demo",),
    ],
    ids=lambda value: value[0],
)
def test_what_needs_torch_says_so_in_one_line(arguments: tuple[str, ...]) -> None:
    code, out, err = command_line(*arguments)
    last = err.splitlines()[-1]
    assert (code, out) == (2, "")
    assert re.fullmatch(
        r'convscale: this command needs (torch|jinja2), which is not installed; pip install "convscale\[train\]"', last
    )
    assert "Traceback" not in err


@pytest.mark.parametrize("error", ['ImportError("no torch here")', 'ImportError("cut off", name="torch")'])
def test_a_broken_torch_is_told_apart(error: str) -> None:
    code, _, err = command_line("fit", "--data-dir", "photos", "--output", "out", error=error)
    assert code == 2
    assert re.fullmatch(
        r"convscale: this command needs torch, which can not be imported \((no torch here|cut off)\); pip install "
        r'"convscale\[train\]"\n',
        err,
    )


def test_public_names_say_what_they_need() -> None:
    code = (
        "import convscale as cs\n"
        "for name in cs.__all__:\n"
        "    try: getattr(cs, name)\n"
        "    except cs.UserError as error: print(name, isinstance(error, ImportError), error.name, error, sep='|')\n"
    )
    _, out, err = fresh(code)
    assert err == ""
    lines = [line.split("|") for line in out.splitlines()]
    told = {name: line for name, *line in lines}
    needs = {"create_model", "fit", "train", "evaluate", "export", "measure", "count", "verify", "convert_norm"}
    works = {"load_artifact", "Answer", "classify", "tune", "choose", "predict", "get_spec", "scale", "list_models"}
    assert needs <= set(told)
    assert not works & set(told)
    for name, line in told.items():
        message = f'convscale.{name} needs torch, which is not installed; pip install "convscale[train]"'
        assert line == ["True", "torch", message]


def test_a_function_that_needs_torch_for_this_answer_says_so() -> None:
    code = (
        "import convscale as cs\n"
        "try: cs.predict('resnet18', device='l4', mode='train')\n"
        "except cs.UserError as error: print(error)"
    )
    assert fresh(code)[1] == 'convscale.predict needs torch, which is not installed; pip install "convscale[train]"\n'


def test_other_missing_modules_keep_their_error() -> None:
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_module'") as caught, naming_extras("this"):
        import no_such_module  # noqa: F401  # pyright: ignore[reportMissingImports]
    assert not isinstance(caught.value, UserError)
    with (
        pytest.raises(MissingExtra, match=r'^x needs nncf, .*; pip install "convscale\[openvino\]"$'),
        naming_extras("x"),
    ):
        raise ModuleNotFoundError("No module named 'nncf'", name="nncf")


def test_the_table_of_extras_is_that_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[^\w-]", text, maxsplit=1)[0].replace("-", "_") for text in requirements}

    for extra, libraries in EXTRAS.items():
        assert names(project["optional-dependencies"][extra]) == set(libraries)
    assert not names(project["dependencies"]) & set(LIBRARIES)
