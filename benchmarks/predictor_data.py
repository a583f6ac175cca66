"""Tables of measured throughput, their networks traced, for ``benchmarks.predictor``."""

from __future__ import annotations

import csv
import json
import pickle
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import convscale
from convscale.cache import digest_of
from convscale.conditions import Conditions
from convscale.cost.fusion import kernels_of
from convscale.cost.kernels import Kernel
from convscale.cost.trace import Trace
from convscale.cost.tracing import trace
from convscale.errors import UserError
from convscale.predictor.devices import Device, get_device
from convscale.predictor.fitted import set_name

TRACING = tuple(f"cost/{name}.py" for name in ("trace", "tracing", "recorder", "subject", "operators", "autocast"))
"""What decides a trace: those of other code are not read."""
SPLIT = json.loads((Path(__file__).parent / "predictor_split.json").read_text(encoding="utf-8"))
_DEVICES = {
    "rtx3090": "rtx-3090",
    "rtx4090": "rtx-4090",
    "4090": "rtx-4090",
    "rtx5090": "rtx-5090",
    "5090": "rtx-5090",
    "cpu": "cpu",
}
_REPARAMETERISED = ("repvgg", "mobileone", "repvit", "repghost", "ghostnetv3", "fastvit", "mobileclip")


@dataclass(frozen=True, kw_only=True)
class TableFile:
    """One table, its conditions read from its file name
    (``benchmark-{mode}-{precision}-{layout}-pt{torch}-{cuda}-{device}[-dynamo].csv``).
    """

    path: Path
    """The CSV."""
    mode: str
    """``infer`` or ``train``."""
    precision: str
    """``amp`` or ``fp32``."""
    layout: str
    """``nchw`` or ``nhwc``."""
    torch: str
    """``pt240`` and the like."""
    device: Device
    """What it was measured on."""
    compiled: bool
    """Whether behind torch.compile."""

    @property
    def name(self) -> str:
        """The file's name without ``benchmark-`` and ``.csv``."""
        return self.path.stem.removeprefix("benchmark-")

    @property
    def set_name(self) -> str:
        """The fitted set it belongs to."""
        conditions = Conditions(
            device=self.device.name,
            mode=self.mode,
            layout=self.layout,
            runtime="compiled" if self.compiled else "eager",
        )
        return set_name(conditions, self.device)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured network with its kernels."""

    model: str
    """timm's name."""
    family: str
    """timm's module file."""
    size: int
    """Image side in pixels."""
    batch: int
    """Images a call."""
    images_per_s: float
    """Measured."""
    params: int
    """Counted."""
    macs: float
    """Counted per image, forward."""
    activations: float
    """Counted per image, forward."""
    kernels: list[tuple[Kernel, int]]
    """Kernels of a call."""


def find_tables(folder: Path) -> list[TableFile]:
    """The tables in a folder.

    Raises:
        UserError: there is none.
    """
    found = []
    for path in sorted(folder.glob("benchmark-*.csv")):
        mode, precision, layout, version, *rest = path.stem.removeprefix("benchmark-").split("-")
        device = next((_DEVICES[part] for part in rest if part in _DEVICES), None)
        if device is not None:
            found.append(
                TableFile(
                    path=path,
                    mode=mode,
                    precision=precision,
                    layout=layout,
                    torch=version,
                    device=get_device(device),
                    compiled="dynamo" in rest,
                )
            )
    if not found:
        raise UserError(f"no benchmark-*.csv in {folder}; timm's results folder holds such tables")
    return found


def _dropped(model: str, family: str, table: TableFile) -> bool:
    if (
        model.startswith(("test_", "ecaresnext50t"))
        or "_cc_" in model
        or family not in {*SPLIT["final"], *SPLIT["tuning"]}
    ):
        return True
    if table.torch == "pt291" and model.startswith(_REPARAMETERISED):
        return True
    return table.torch == "pt112" and family == "tresnet"


def csv_rows(table: TableFile) -> Iterator[tuple[str, str, dict[str, str]]]:
    """(model, family, row) of the rows that are kept, as far as names tell."""
    from timm.models import _registry as registry

    with open(table.path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            model = row["model"].split(".")[0]
            family = registry._model_to_module.get(model)
            if family is not None and not _dropped(model, family, table):
                yield model, family, row


Job = tuple[Conditions, bool]
"""What a row was measured under, and whether norms are fast."""


def job_of(table: TableFile, row: dict[str, str]) -> Job:
    """How a row was measured. timm's fast norm is younger than PyTorch 1.12: those tables ran layer and group norm in
    single precision.
    """
    size, batch = (int(float(row[f"{table.mode}_{key}"])) for key in ("img_size", "batch_size"))
    conditions = Conditions(
        mode=table.mode, precision=table.precision, layout=table.layout, image_size=size, batch_size=batch
    )
    return conditions, table.torch != "pt112"


def _traces(model: str, jobs: set[Job], cache: Path) -> dict[Job, Trace]:
    """Traces of a model, kept in one file a model."""
    import timm

    path = cache / f"{model}.pkl.z"
    kept: dict[Job, Trace] = pickle.loads(zlib.decompress(path.read_bytes())) if path.exists() else {}
    missing = sorted(jobs - set(kept), key=str)
    if missing:
        try:
            with torch.device("meta"):
                net = timm.create_model(model)
        except (RuntimeError, NotImplementedError):
            net = timm.create_model(model)
        for job in missing:
            conditions, fast_norm = job
            try:
                kept[job] = trace(net, conditions, fast_norm=fast_norm)
            except UserError:
                continue
        path.write_bytes(zlib.compress(pickle.dumps(kept, protocol=5), 1))
    return kept


def _row(model: str, family: str, row: dict[str, str], traced: Trace, table: TableFile) -> Row | None:
    """The row with its kernels, or None where the traced network is not the table's."""
    forward = [op for op in traced.operators if op.phase == "forward"]
    if any(op.name in ("bmm", "baddbmm") for op in forward):
        return None
    macs = sum(op.macs for op in forward) / traced.batch_size
    params = float(row["param_count"])
    if abs(traced.params / 1e6 - params) > 0.02 + 0.002 * params:
        return None
    if table.mode == "infer" and abs(macs / 1e9 - float(row["infer_gmacs"])) > max(
        0.09 * float(row["infer_gmacs"]), 0.02
    ):
        return None
    outputs = (op.outputs[0] for op in forward if op.kind in ("conv", "linear"))
    return Row(
        model=model,
        family=family,
        size=traced.image_size[0],
        batch=traced.batch_size,
        images_per_s=float(row[f"{table.mode}_samples_per_sec"]),
        params=traced.params,
        macs=macs,
        activations=sum(use.nbytes // use.itemsize for use in outputs) / traced.batch_size,
        kernels=kernels_of(traced, compiled=table.compiled),
    )


def load_tables(
    folder: Path, cache: Path, log: Any, wanted_tables: Callable[[TableFile], bool] = lambda table: True
) -> dict[TableFile, list[Row]]:
    """Tables with the kernels of their networks, those that are wanted; traces are kept in ``cache``, so that a second
    run is quick.
    """
    code = digest_of(Path(convscale.__file__).parent, *TRACING)
    cache = cache / f"{code}-timm-{version('timm')}"  # traces of other code are never read
    cache.mkdir(parents=True, exist_ok=True)
    tables = {table.name: table for table in find_tables(folder) if wanted_tables(table)}
    wanted: dict[str, list[tuple[TableFile, str, dict[str, str]]]] = {}
    for table in tables.values():
        for model, family, row in csv_rows(table):
            wanted.setdefault(model, []).append((table, family, row))
    result: dict[str, list[Row]] = {name: [] for name in tables}
    for index, (model, entries) in enumerate(sorted(wanted.items())):
        if index % 50 == 0:
            log(f"traced {index} of {len(wanted)} networks")
        keys = [job_of(table, row) for table, _, row in entries]
        traces = _traces(model, set(keys), cache)
        for key, (table, family, row) in zip(keys, entries, strict=True):
            if key in traces and (made := _row(model, family, row, traces[key], table)) is not None:
                result[table.name].append(made)
    return {tables[name]: rows for name, rows in result.items()}
