"""Children of a trained network: the same outputs in float64, or a line that says what does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import convscale as cs
from convscale.arch.parts import SILU, ActSpec, HeadSpec, InputSpec, NormSpec, StemSpec
from convscale.errors import UserError
from convscale.images.splits import DataSplits
from convscale.nas.choices import StageChoices
from convscale.nas.engines import local
from convscale.nas.inherit import grown, misfit
from convscale.nas.records import TrialRecord
from convscale.nas.result import read_study
from convscale.nas.space import SearchSpace
from convscale.nas.trial import Job, Result, run_job
from convscale.nn.net import ConvNet
from tests.nas.test_study import QUICK, by_name, job, simple

__all__ = ["simple"]

LEAKY = ActSpec(kind="leaky_relu", slope=1e-2)


def space(kind: str, **given: Any) -> SearchSpace:
    options = {"widths": (8, 20), "depths": (1, 3), "kernels": (3, 5), "expansions": (2.0, 3.0), **given}
    return SearchSpace(
        name=kind,
        stages=(StageChoices(kinds=(kind,), **options), StageChoices(kinds=(kind,), stride=2, **options)),
        stems=(StemSpec(widths=(8,), stride=2), StemSpec(widths=(20,), stride=2)),
        heads=(HeadSpec(width=16), HeadSpec(width=24)),
        image_sizes=(16,),
        input=InputSpec(size=16),
        norm=NormSpec(kind="inplace") if given.get("activations") == (LEAKY,) else NormSpec(),
    )


def trained(spec: cs.NetSpec) -> ConvNet:
    """With weights and statistics as a training leaves them: none at its start value."""
    torch.manual_seed(1)
    net = cs.create_model(spec, num_classes=5).double()
    assert isinstance(net, ConvNet)
    for name, value in [*net.named_parameters(), *net.named_buffers()]:
        if value.is_floating_point() and value.ndim == 1:
            value.data = torch.rand_like(value) + 0.5 if "var" in name or "weight" in name else torch.randn_like(value)
    return net.eval()


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("conv", {}),
        ("basic", {"se": (0.25,)}),
        ("basic", {"activations": (LEAKY,), "se": (0.25,), "downsamples": ("blur",), "shortcut": "avgpool"}),
        ("bottleneck", {"se": (0.5,)}),
        ("bottleneck", {"se": (0.5,), "se_where": ("output",), "bottleneck": 2.0}),
        ("inverted_residual", {"se": (0.25,), "activations": (SILU,)}),
        ("fused_inverted_residual", {"se": (0.25,), "activations": (SILU,)}),
        ("depthwise_separable", {"se": (0.25,), "downsamples": ("maxpool",)}),
    ],
)
def test_a_wider_deeper_child_computes_the_same(kind: str, given: dict[str, Any]) -> None:
    found = space(kind, **given)
    small, large = (
        found.spec_of([0 if end == "small" else len(v.options) - 1 for v in found.variables])
        for end in ("small", "large")
    )
    assert large.depths == (3, 3)
    assert large.stem.widths == (20,)
    parent = trained(small)
    child = grown(parent, large, seed=3)
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    expected, got = parent(images), child(images)
    assert expected.std() > 0.01  # not a network that has died
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert sum(p.numel() for p in child.parameters()) > 2 * sum(p.numel() for p in parent.parameters())


def test_it_learns_on() -> None:
    """The zero of an added block is a start, not an end: its weights get gradients."""
    found = space("inverted_residual", activations=(SILU,))
    parent = trained(found.spec_of([0] * len(found.variables)))
    child = grown(parent, replace(found.spec_of([len(v.options) - 1 for v in found.variables])))
    child.train()(torch.randn(8, 3, 16, 16, dtype=torch.float64)).square().mean().backward()
    last = child.stages[1][2].last_unit().norm.weight  # pyright: ignore
    assert last.abs().max() == 0
    assert last.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kinds": ("basic",)}, r"stage 0 has kind 'basic', not 'conv'"),
        ({"widths": (4, 6)}, r"stage 0 has 4 channels, fewer outside or inside than its parent's 8"),
        ({"activations": (SILU,)}, r"stage 0 has activation ActSpec\(silu\), not ActSpec\(relu\)"),
    ],
)
def test_what_does_not_fit_is_told(change: dict[str, Any], message: str) -> None:
    parent = space("conv").sample(0)
    parent = space("conv").spec_of([0] * len(space("conv").variables))
    kind = change.pop("kinds", ("conv",))[0]
    other = space(kind, **change)
    child = other.spec_of([0] * len(other.variables))
    with pytest.raises(UserError, match=rf"the weights of .* do not fit .*: {message}"):
        grown(trained(parent), child)


def test_a_block_that_would_change_it_is_no_child() -> None:
    """A SiLU behind the add is no identity: x x sigmoid(x) a second time is another number."""
    found = space("basic", activations=(SILU,))
    genes = [0] * len(found.variables)
    deeper = [1 if v.field == "depth" else 0 for v in found.variables]
    assert "a block added there would change" in misfit(found.spec_of(genes), found.spec_of(deeper))
    wider = [1 if v.field in ("width", "stem") else 0 for v in found.variables]
    assert misfit(found.spec_of(genes), found.spec_of(wider)) == ""


def test_weights_that_a_full_disk_does_not_take_fail_their_trial(
    colours: DataSplits, tiny: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors' own error ended the search with a traceback."""

    def save_file(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", save_file)
    result = run_job(replace(job(0, None, tiny), save=str(tmp_path / "weights" / "0.safetensors")), colours)
    why = f"no space left on the disk of {tmp_path}/weights while writing 0.safetensors; free some and run again"
    assert result.failed == why
    assert not list((tmp_path / "weights").iterdir())


def test_a_trial_whose_parent_does_not_fit_starts_from_fresh_weights(
    colours: DataSplits, tiny: SearchSpace, tmp_path: Path
) -> None:
    """With a note, and as one without a parent; so does one whose parent's file is damaged."""
    small, large = (tiny.spec_of(genes) for genes in ([0] * len(tiny.variables), [s - 1 for s in tiny.sizes]))
    path, fresh = tmp_path / "0.safetensors", replace(job(1, None, tiny), spec=small.to_dict())
    assert not run_job(replace(fresh, spec=large.to_dict(), save=str(path)), colours).failed
    alone = run_job(fresh, colours)
    child = replace(fresh, parent=large.to_dict(), parent_weights=str(path))
    result = run_job(child, colours)
    assert result.note.startswith(
        f"from fresh weights: the weights of {large.name} do not fit {small.name}: stage 0 has"
    )
    assert (result.failed, result.curve, alone.note) == ("", alone.curve, "")
    path.write_bytes(b"damaged")
    assert f"{path}" in run_job(child, colours).note
    record = TrialRecord(number=1, genes=(), spec=small, state="trained", result=result)
    assert record.describe().endswith(f" % ({result.note})")
    assert record.to_dict()["note"] == result.note


def test_a_trial_that_started_from_fresh_weights_has_no_parent(
    colours: DataSplits, tiny: SearchSpace, tmp_path: Path, simple: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    why = "from fresh weights: they are gone"

    def run(given: Job, splits: DataSplits | None = None) -> Result:
        assert given.save is not None
        Path(given.save).parent.mkdir(exist_ok=True)
        Path(given.save).touch()
        return replace(by_name(given), note=why if given.parent else "")

    monkeypatch.setattr(local, "run_job", run)
    ask = {**QUICK, "space": tiny, "epochs": 1, "inherit": True, "trials": 16}
    found = cs.search(colours, output=tmp_path / "a", **ask)
    assert {trial.note for trial in found.trials} == {"", why}
    assert {trial.parent for trial in found.trials} == {None}
    assert read_study(tmp_path / "a").trials == found.trials
