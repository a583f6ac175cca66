"""Our networks against timm's, weight for weight.

    python -m benchmarks.parity [NAMES ...] [--json] [--output results/parity.jsonl]

For each name: timm's random weights with randomised norms, whose statistics one train-mode pass has calibrated, are
loaded into ours; logits and every feature map, in eval and train mode, the input gradient and the running statistics
are compared in float64 at two sizes, and the logits in fp32 against timm's own fp32-float64 difference. Differences are
max|a - b| / max|b|. Names that are given are put into the record, in the place of their earlier rows; each row carries
its versions.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import convscale
from convscale.arch.zoo import ARCHITECTURES

LIMIT = 1e-6
FP32_FACTOR = 10
NOT_IN_TIMM = frozenset({"tresnet_v2_l_official", "poolnet"})
"""The networks of the zoo without a peer of their name: weights of the authors' own layout, and a family of ours."""
NAMES = tuple(name for name in ARCHITECTURES if name not in NOT_IN_TIMM)


def relative(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|b|."""
    return float((a.detach().double() - b.detach().double()).abs().max() / b.detach().double().abs().max())


def set_mode(training: bool, *nets: nn.Module) -> None:
    """Train or eval mode for several networks."""
    for net in nets:
        net.train(training)


def sizes(name: str) -> tuple[int, int]:
    """Two image sizes in pixels; the second leaves odd maps."""
    return (64, 100) if name.startswith("tresnet") else (96, 129)


def calibrated_peer(name: str, size: int, seed: int = 0) -> nn.Module:
    """timm's network in float64 with random norms and statistics that fit its activations at ``size`` px."""
    import timm

    torch.manual_seed(seed)
    peer = timm.create_model(name).double().train()
    norms = [m for m in peer.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0.0, 0.2)
    _randomise_factors(peer)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        peer(torch.randn(4, 3, size, size, dtype=torch.float64))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return peer


def _randomise_factors(peer: nn.Module) -> None:
    """Layer norms, factors per channel, response normalisations and affine blocks away from where they start, at which
    a lost one would not show.
    """
    for name, parameter in peer.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if isinstance(peer.get_submodule(owner), nn.LayerNorm) or leaf == "gamma" or owner.endswith((".grn", ".lab")):
            if leaf == "bias":
                nn.init.normal_(parameter, 0.0, 0.2)
            else:
                nn.init.uniform_(parameter, 0.5, 1.5)


def compare(name: str, *, both_sizes: bool = True, sides: tuple[int, int] | None = None) -> dict[str, Any]:
    """The worst differences of one network over its sizes, or over those of ``sides``; keys as in the record."""
    small, large = sides or sizes(name)
    peer = calibrated_peer(name, large)
    state = {key: value.clone() for key, value in peer.state_dict().items()}
    net = convscale.create_model(name).double()
    convscale.load_weights(net, state)
    back = convscale.export_weights(net)
    backbone = convscale.create_model(name, features_only=True).double()
    convscale.load_weights(backbone, state)
    worst = {"eval": 0.0, "features": 0.0, "train": 0.0, "gradient": 0.0, "statistics": 0.0}

    def note(key: str, value: float) -> None:
        worst[key] = max(worst[key], value)

    images = [
        torch.randn(2, 3, size, size, dtype=torch.float64) for size in ((small, large) if both_sizes else (large,))
    ]
    set_mode(False, peer, net, backbone)
    with torch.no_grad():
        for x in images:
            note("eval", relative(net(x), peer(x)))
            maps = peer.forward_intermediates(x, intermediates_only=True)  # type: ignore[operator]
            ours = backbone(x)
            for a, b in zip(ours, maps[-len(ours) :], strict=True):
                note("features", relative(a, b))
    set_mode(True, peer, net)
    for x in images:
        xa, xb = x.clone().requires_grad_(), x.clone().requires_grad_()
        a, b = net(xa), peer(xb)
        note("train", relative(a, b))
        weights = torch.randn_like(b)
        (a * weights).sum().backward()
        (b * weights).sum().backward()
        assert xa.grad is not None
        assert xb.grad is not None
        note("gradient", relative(xa.grad, xb.grad))
    after, theirs = convscale.export_weights(net), peer.state_dict()
    for key, value in theirs.items():
        if "running" in key:
            note("statistics", relative(after[key], value))
    fp32, own = _fp32(net, peer, state, large)
    return {
        "name": name,
        "params": sum(p.numel() for p in net.parameters()),
        "peer_params": sum(p.numel() for p in peer.parameters()),
        "keys_come_back": back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state),
        **worst,
        "fp32": fp32,
        "peer_fp32": own,
        "sizes": [small, large],
    }


def _fp32(net: nn.Module, peer: nn.Module, state: dict[str, Tensor], size: int) -> tuple[float, float]:
    """Ours and the peer's fp32 logits against the peer's float64 ones, in eval mode."""
    peer.load_state_dict(state)
    convscale.load_weights(net, state)
    set_mode(False, peer, net)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        exact = peer(x)
        return relative(net.float()(x.float()), exact), relative(peer.float()(x.float()), exact)


def passes(row: dict[str, Any]) -> bool:
    """Whether a row keeps every limit."""
    return (
        row["params"] == row["peer_params"]
        and row["keys_come_back"]
        and all(row[key] <= LIMIT for key in ("eval", "features", "train", "gradient", "statistics"))
        and row["fp32"] <= FP32_FACTOR * row["peer_fp32"]
    )


def keep(path: Path, row: dict[str, Any]) -> None:
    """Put a row into the record."""
    import timm

    from benchmarks.records import replace_record

    made = {"what": "parity with timm", "timm": timm.__version__, "torch": torch.__version__}
    replace_record(path, {**made, **row}, ("name",))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--json", action="store_true", help="print rows as JSON lines")
    parser.add_argument("--output", type=Path, default=Path("results/parity.jsonl"))
    args = parser.parse_args()
    rows = []
    for name in args.names:
        row = compare(name)
        rows.append(row)
        shown = " ".join(
            f"{key} {row[key]:.1e}"
            for key in ("eval", "features", "train", "gradient", "statistics", "fp32", "peer_fp32")
        )
        print(
            json.dumps(row)
            if args.json
            else f"{name:22} {'ok  ' if passes(row) else 'FAIL'} params {row['params']:>11,} {shown}",
            flush=True,
        )
        keep(args.output, row)
    sys.exit(not all(passes(row) for row in rows))


if __name__ == "__main__":
    main()
