"""A kit to carry to a card that is not here: untrained networks as ONNX files, and a script that measures them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from convscale._version import __version__
from convscale.arch.spec import NetSpec
from convscale.conditions import Conditions, Size
from convscale.errors import UserError
from convscale.files import whole_folder, write_json, write_text
from convscale.networks.resolve import Network, as_module
from convscale.predictor.devices import get_device, is_processor

SCHEMA = 1
"""Of ``kit.json``."""
KIT, SCRIPT = "kit.json", "measure.py"
MOST = 8
"""Networks that a kit holds at most."""
RUNTIMES = ("onnxruntime", "tensorrt")
"""What the script measures in."""
HALF = ("amp", "fp16")
"""Precisions whose networks are written in half precision."""


@dataclass(frozen=True, kw_only=True)
class KitNetwork:
    """A network to measure, and why."""

    network: Network
    """What is exported, untrained: speed does not depend on values."""
    model: str
    """Its name."""
    label: str
    """Name and size, for people."""
    image_size: Size
    """In pixels."""
    why: str = ""
    """Why it is in the kit."""
    params: int | None = None
    """Parameters."""
    macs: int | None = None
    """Multiply-accumulates per image."""
    fused: bool = False
    """Whether it is written in its re-parameterised form for inference, as it would ship."""
    predicted: Mapping[str, float] = field(default_factory=dict)
    """``images_per_s``, ``low``, ``high`` and ``chance``, where they are predicted."""


@dataclass(frozen=True, kw_only=True)
class Kit:
    """A kit that was written."""

    folder: Path
    """Where it lies."""
    files: tuple[str, ...]
    """The networks' files."""
    labels: tuple[str, ...]
    """The networks, in the same order."""
    total_bytes: int
    """Of all files."""

    def __str__(self) -> str:
        return (
            f"{self.folder}: {len(self.files)} networks, {self.total_bytes / 1e6:.1f} MB; there: python "
            f"{SCRIPT} (numpy and onnxruntime are enough), then take rows.jsonl back"
        )

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        return {
            "folder": str(self.folder),
            "files": list(self.files),
            "networks": list(self.labels),
            "total_bytes": self.total_bytes,
        }


def write_kit_folder(
    networks: Sequence[KitNetwork],
    folder: str | os.PathLike[str],
    conditions: Conditions,
    *,
    min_throughput: float | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Kit:
    """Write networks, ``kit.json`` and ``measure.py`` into a folder, which appears whole or not at all.

    Args:
        networks: at least one, at most ``MOST``.
        folder: to make.
        conditions: device (a named one, or ``cpu``), precision, batch and threads to measure under; their runtime is
            the script's default. With ``amp`` and ``fp16`` the networks are in half precision, all of them: ONNX
            Runtime has no autocast.
        min_throughput: images/s that were asked for.
        overwrite: replace a kit of that name.
        say: told a line for each network.

    Raises:
        UserError: too many networks or none, conditions that the script can not measure under, or a folder that holds
            something else.
    """
    if not 1 <= len(networks) <= MOST:
        raise UserError(f"a kit holds 1 to {MOST} networks, got {len(networks)}; name those that could win")
    target = Path(folder)
    check_kit(conditions, target, overwrite=overwrite)
    device = get_device(conditions.device)
    half = conditions.precision in HALF
    with whole_folder(target, check=lambda: _check_target(target, overwrite)) as staging:
        entries: list[dict[str, object]] = []
        for number, item in enumerate(networks, start=1):
            say(f"writing {number} of {len(networks)}: {item.label}")
            name = f"{number}{'.half' if half else ''}.onnx"
            spec = _export(item, staging / name, half)
            entries.append(
                {
                    "file": name,
                    "model": item.model,
                    "label": item.label,
                    "image_size": item.image_size,
                    "why": item.why,
                    "params": item.params,
                    "macs": item.macs,
                    "predicted": dict(item.predicted),
                    "notes": [_HALF_NOTE] if conditions.precision == "amp" else [],
                    "spec": spec,
                    "bytes": (staging / name).stat().st_size,
                }
            )
        script = (files("convscale.ship") / "kit_measure.py.txt").read_text(encoding="utf-8")
        write_text(staging / SCRIPT, script)
        kit = {
            "schema": SCHEMA,
            "convscale": __version__,
            "device": device.name,
            "title": device.title,
            "driver": device.driver,
            "processor": device.kind == "cpu",
            "conditions": {key: value for key, value in conditions.to_dict().items() if key not in _OF_A_ROW},
            "min_throughput": min_throughput,
            "networks": entries,
        }
        write_json(staging / KIT, kit)
        total = sum(path.stat().st_size for path in staging.iterdir())
    return Kit(
        folder=target,
        files=tuple(str(entry["file"]) for entry in entries),
        labels=tuple(item.label for item in networks),
        total_bytes=total,
    )


_HALF_NOTE = "asked in amp: the whole network is in half precision, since ONNX Runtime has no autocast"
_OF_A_ROW = ("device", "image_size")  # the script fills these in


def check_kit(conditions: Conditions, folder: Path, *, overwrite: bool = False) -> None:
    """Refuse what :func:`write_kit_folder` would refuse, before anything is predicted or exported.

    Raises:
        UserError: conditions that the script can not measure under, or a folder that holds something else.
    """
    _check_target(folder, overwrite)
    if conditions.runtime not in RUNTIMES:
        raise UserError(
            f"a kit is measured in {' or '.join(RUNTIMES)}, not in {conditions.runtime}; choose with that runtime"
        )
    if conditions.runtime == "tensorrt" and is_processor(conditions.device):
        raise UserError(
            f"runtime tensorrt runs on GPUs, got device {conditions.device}; choose with runtime onnxruntime"
        )
    if conditions.precision in HALF and is_processor(conditions.device):
        raise UserError(
            f"a processor computes half precision in float32, got precision {conditions.precision!r} for device "
            f"{conditions.device}; choose with precision fp32"
        )
    if conditions.mode != "infer":
        raise UserError(f"a kit is measured in mode infer, got {conditions.mode!r}")
    if conditions.precision not in (*HALF, "fp32"):
        raise UserError(f"a kit is written in {', '.join(HALF)} or fp32, got precision {conditions.precision!r}")
    if conditions.layout != "nchw":
        raise UserError(f"ONNX Runtime lays out memory itself, got layout {conditions.layout!r}; leave layout out")


def _check_target(target: Path, overwrite: bool) -> None:
    """
    Raises:
        UserError: the folder is a file, or holds something that may not be replaced.
    """
    if target.exists() and not target.is_dir():
        raise UserError(f"kit {target} is a file; name a folder")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise UserError(f"kit folder {target} exists and is not empty; use --overwrite or another name")
        if not (target / KIT).is_file():
            raise UserError(f"kit folder {target} holds something other than a kit; it is not overwritten")


def _export(item: KitNetwork, path: Path, half: bool) -> dict[str, object] | None:
    """Write the network as ONNX; its spec as JSON values where it has one."""
    from convscale.formats.fold import fold  # loads torch, which a choice can do without
    from convscale.formats.onnx import compute_half, write_onnx
    from convscale.networks.inputs import example_input

    module, _ = as_module(item.network, fused=item.fused)
    module = module.cpu().float()
    example = example_input(module, item.image_size)
    write_onnx(fold(module, example), example, path)
    if half:
        compute_half(path)
    spec = item.network if isinstance(item.network, NetSpec) else getattr(module, "spec", None)
    return spec.to_dict() if isinstance(spec, NetSpec) else None
