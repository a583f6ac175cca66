"""What the docs show as printed by the predictor is what it prints today.

A failure prints today's text: put it into the page, and read the sentences around it again.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from convscale.cli.app import app
from convscale.show.studies import ABLATION, tresnet_ablation
from tests.test_docs import DOCS, blocks, commands_in

SHOWN = {
    "predict tresnet_m resnet50 --device rtx-4090": ["tutorials/card.md"],
    "choose --device rtx-4090 --min-throughput 4000 --output choice.html": ["tutorials/card.md", "speed.md"],
    "count tresnet_m resnet50 --mode train --precision amp -b 64 --device v100": ["speed.md"],
}
"""Pages by the command that they show."""


def shown(page: str, line: str) -> str:
    """The block behind the one with a command."""
    bodies = list(blocks(DOCS / page, "sh", "", "text"))
    return bodies[next(i for i, body in enumerate(bodies) if commands_in(body) == [line.split()]) + 1]


@pytest.mark.parametrize("line", SHOWN, ids=[line.split()[0] for line in SHOWN])
def test_printed_output_is_todays(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    done = CliRunner().invoke(app, line.split(), catch_exceptions=False)
    wrong = [page for page in SHOWN[line] if shown(page, line) != done.output]
    if wrong:
        pytest.fail(f"{' and '.join(wrong)} should show\n{done.output}", pytrace=False)


def test_ingredients_are_predicted_as_today() -> None:
    ablation = tresnet_ablation()
    page = (DOCS / "speed.md").read_text(encoding="utf-8")
    of = {(point.name, point.conditions.device): point.images_per_s for point in ablation.points}
    wrong = []
    for name, spec in ABLATION.items():
        if name == ablation.baseline:
            continue
        cells = [f"{of[name, card] / of[ablation.baseline, card]:.2f}" for card in ("v100", "rtx-4090")]
        row = f"`{spec.name}` | {' | '.join(cells)} |"
        if row not in page:
            wrong.append(f"speed.md should say {row}, says {re.findall(f'`{spec.name}`.*', page)}")
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)
