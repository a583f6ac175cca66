"""Tables of measured throughput, their networks traced, for ``benchmarks.predictor``."""

from __future__ import annotations

import csv
import json
import pickle
import zlib
from collections.abc import Callable, Iterator, Sequence
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
from convscale.networks.foreign import Foreign
from convscale.networks.offered import offered
from convscale.predictor.devices import Device, get_device
from convscale.predictor.fitted import set_name
from convscale.predictor.traced import store

TRACING = tuple(f"cost/{name}.py" for name in ("trace", "tracing", "recorder", "subject", "operators", "autocast"))
"""What decides a trace: those of other code are not read."""
SPLIT = json.loads((Path(__file__).parent / "predictor_split.json").read_text(encoding="utf-8"))
_DEVICES = {
    "rtx3090": "rtx-3090",
    "rtx4090": "rtx-4090",
    "4090": "rtx-4090",
    "rtx5090": "rtx-5090",
    "5090": "rtx-5090",
    "i7_12700h": "i7-12700h",
    "i9_10940x": "i9-10940x",
}
_NEWEST = {"gpu": "pt291", "cpu": "pt240"}
"""The framework that predictions are of: its tables have no factor of their own."""
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
    def era(self) -> str:
        """The generation of PyTorch, as ``fitting.Part`` has it; empty for the newest."""
        return "" if self.torch == _NEWEST[self.device.kind] else self.torch

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
    kernels: Sequence[tuple[Kernel, int]]
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


def _dropped(model: str, family: str, table: TableFile, fused: bool) -> bool:
    if (
        model.startswith(("test_", "ecaresnext50t"))
        or "_cc_" in model
        or family not in {*SPLIT["final"], *SPLIT["tuning"]}
    ):
        return True
    if (table.torch == "pt291") != fused and model.startswith(_REPARAMETERISED):
        return True  # the newest tables hold them in their fused form
    return table.torch == "pt112" and family == "tresnet"


def csv_rows(table: TableFile, fused: bool = False) -> Iterator[tuple[str, str, dict[str, str]]]:
    """(model, family, row) of the rows that are kept, as far as names tell; ``fused``: whether re-parameterised
    networks are looked at in their fused form.
    """
    from timm.models import _registry as registry

    with open(table.path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            model = row["model"].split(".")[0]
            family = registry._model_to_module.get(model)
            if family is not None and not _dropped(model, family, table, fused):
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


def rows_traced_before(table: TableFile) -> list[Row]:
    """The rows of a table of a GPU whose networks' workloads travel with the package: released weights' networks at
    their published sizes, re-parameterised ones in their fused form.
    """
    held = store("compiled" if table.compiled else "eager")
    assert held is not None
    networks = {weights.arch: weights.network for weights in offered()}
    found = []
    for model, family, row in csv_rows(table, fused=True):
        job, _ = job_of(table, row)
        size, batch = job.image_size, job.batch_size
        network = networks.get(model)
        if network is None or not isinstance(size, int):
            continue
        # timm's own network first: where a table's norms were fast, ours are not
        at = held.find(Foreign(model, "timm"), size, batch) or held.find(network, size, batch)
        if at is None or held.failed(at):
            continue
        work = held.workload(at, batch)
        macs = sum(kernel.macs * times for kernel, times in work.kernels) / batch
        stated, params = float(row["infer_gmacs"]), float(row["param_count"])
        if (
            work.attention
            or abs(macs / 1e9 - stated) > max(0.09 * stated, 0.02)
            or abs(work.params / 1e6 - params) > 0.02 + 0.01 * params
        ):
            continue  # another network by the same name, or one that multiplies maps with each other
        found.append(
            Row(
                model=model,
                family=family,
                size=size,
                batch=batch,
                images_per_s=float(row["infer_samples_per_sec"]),
                params=work.params,
                macs=macs,
                activations=1e6 * float(row["infer_macts"]),
                kernels=work.kernels,
            )
        )
    return found


def is_traced(table: TableFile) -> bool:
    """Whether the networks of a table were traced beforehand: in inference on a GPU, in NCHW under AMP."""
    return (table.mode, table.layout, table.precision) == ("infer", "nchw", "amp")


def sampled(models: Sequence[tuple[str, str]], every: int) -> set[str]:
    """Of models with their families every so many of each family, by name, the first always."""
    by_family: dict[str, list[str]] = {}
    for model, family in sorted(set(models)):
        by_family.setdefault(family, []).append(model)
    return {model for some in by_family.values() for model in some[::every]}


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
    stated = row.get("infer_gmacs")  # the oldest tables do not say
    if table.mode == "infer" and stated and abs(macs / 1e9 - float(stated)) > max(0.09 * float(stated), 0.02):
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
    folder: Path,
    cache: Path,
    log: Any,
    wanted_tables: Callable[[TableFile], bool] = lambda table: True,
    every: int = 1,
) -> dict[TableFile, list[Row]]:
    """Tables with the kernels of their networks, those that are wanted; traces are kept in ``cache``, so that a second
    run is quick.

    Args:
        every: of the networks of each family, only every so many are traced; those traced beforehand all come.
    """
    code = digest_of(Path(convscale.__file__).parent, *TRACING)
    cache = cache / f"{code}-timm-{version('timm')}"  # traces of other code are never read
    cache.mkdir(parents=True, exist_ok=True)
    found = [table for table in find_tables(folder) if wanted_tables(table)]
    before = {table: rows_traced_before(table) for table in found if is_traced(table)}
    tables = {table.name: table for table in found if table not in before}
    some = sampled([(m, f) for table in tables.values() for m, f, _ in csv_rows(table)], every)
    wanted: dict[str, list[tuple[TableFile, str, dict[str, str]]]] = {}
    for table in tables.values():
        for model, family, row in csv_rows(table):
            if model not in some:
                continue
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
    return before | {tables[name]: rows for name, rows in result.items()}
