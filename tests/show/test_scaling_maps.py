"""A network scaled in each way, looking at one picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import convscale as cs
from convscale.errors import UserError
from convscale.images.preprocess import Preprocessing
from convscale.learn.checkpoint import save_checkpoint
from convscale.show.scaling_maps import write_scaling_maps

COLUMNS = 120
BASE = cs.scale(cs.get_spec("resnet18"), width=0.25, depth=0.3, image_size=32)
WAYS = {
    "compound": {"depth": 2.0, "width": 1.5, "resolution": 1.5},
    "deeper": {"depth": 2.0},
    "wider": {"width": 2.0},
    "finer": {"resolution": 2.0},
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of a baseline that is a spec of its own, and of what is scaled from it."""
    folder = tmp_path_factory.mktemp("scaled")
    plain = cs.NetSpec.from_dict({**BASE.to_dict(), "name": "own_base", "lineage": None})
    cs.save_spec(plain, folder / "base.yaml")
    found = {"spec": folder / "base.yaml"}
    for name, factors in {"base": {}, **WAYS}.items():
        torch.manual_seed(0)
        spec = cs.scale(plain, **factors) if factors else plain
        how = Preprocessing(image_size=spec.input.size, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)
        net = cs.create_model(spec, num_classes=2)
        found[name] = save_checkpoint(folder / name, net, classes=("cat", "dog"), preprocessing=how)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / "p.png")
    found["picture"] = folder / "p.png"
    return found


def test_page(places: dict[str, Path], call: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """As in the figure: the baseline first, the compound last, a map for each."""
    page = tmp_path / "scaling.html"
    arguments = [part for name in ("base", *WAYS) for part in ("--checkpoint", places[name])]
    code, _, err = call(
        "report", "--scaling", places["spec"], *arguments, "--picture", places["picture"], "--output", page
    )
    assert code == 0, err
    text = page.read_text(encoding="utf-8")
    order = [text.index(title) for title in ("baseline (", "deeper (", "wider (", "higher resolution (", "compound (")]
    assert order == sorted(order)
    assert text.count("data:image/png;base64,") == 5
    assert "d 2, w 1, r 1" in text
    assert "64 px" in text


def test_a_training_state_has_no_accuracy(places: dict[str, Path], tmp_path: Path) -> None:
    """What its run's best weights reached is not what it reached."""
    spec, found = cs.load_spec(places["spec"]), {}
    for name in ("best-00000010", "step-00000020"):
        how = Preprocessing(image_size=spec.input.size, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)
        meta: dict[str, object] = {"metrics": {"best": {"metric": 0.875, "epoch": 1}}}
        net = cs.create_model(spec, num_classes=2)
        place = save_checkpoint(tmp_path / name, net, classes=("cat", "dog"), preprocessing=how, meta=meta)
        page = write_scaling_maps(spec, [place], [places["picture"]], tmp_path / "x.html")
        found[name] = "87.5" in page.read_text(encoding="utf-8")
    assert found == {"best-00000010": True, "step-00000020": False}


def test_what_it_refuses(places: dict[str, Path], call: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    page, base = tmp_path / "x.html", cs.load_spec(places["spec"])
    with pytest.raises(UserError, match="not from resnet18"):
        write_scaling_maps(cs.get_spec("resnet18"), [places["wider"]], [places["picture"]], page)
    with pytest.raises(UserError, match="there is no --picture"):
        write_scaling_maps(base, [places["wider"]], [], page)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"broken\.png"):
        write_scaling_maps(base, [places["wider"]], [broken], page)
    code, _, err = call("report", "--checkpoint", places["base"])
    assert code == 2
    assert "go with --scaling" in err
    assert not page.exists()
