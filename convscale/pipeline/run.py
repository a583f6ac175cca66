"""The whole way: images, a device and a speed become a chosen, trained, exported, checked and explained network."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from torch import nn

from convscale.artifact.artifact import Artifact
from convscale.choice.basis import Asked, check_device
from convscale.conditions import Conditions, Constraint
from convscale.errors import UserError
from convscale.files import new_output_dir
from convscale.images.sources import open_dataset
from convscale.images.splits import DataSplits
from convscale.learn.progress import Progress
from convscale.locks import OutputLock
from convscale.machine import Environment, code_commit
from convscale.networks.offered import Filter
from convscale.networks.weight_files import WeightFiles
from convscale.pipeline.older import as_version_0_1
from convscale.pipeline.place import checked_output
from convscale.pipeline.record import RunRecord, describe
from convscale.pipeline.request import FitRequest, Given, Start, Training
from convscale.pipeline.searched import with_baseline
from convscale.pipeline.ship import Shipping
from convscale.pipeline.steps import Fit
from convscale.pipeline.tracked import tell_result, tracked
from convscale.predictor.devices import at_hand
from convscale.predictor.fitted import predicted_runtimes
from convscale.ship.export import wants_qat
from convscale.show.fit_record import FitRecord
from convscale.show.report import write_fit_report
from convscale.words import listed

_BYTES_NEEDED = 500_000_000


@dataclass(frozen=True, kw_only=True, eq=False)
class FitRun:
    """What ``fit`` made."""

    output: Path
    """The folder: ``report.html``, ``fit.json``, ``artifact/``, ``train/`` with the checkpoints."""
    net: nn.Module
    """The trained network, in eval mode."""
    artifact: Artifact
    """What is shipped, opened."""
    result: FitRecord
    """What ``fit.json`` holds."""

    @property
    def record(self) -> dict[str, object]:
        """``fit.json`` as plain JSON values."""
        return self.result.to_json()

    @property
    def missed(self) -> str:
        """By how much the constraint is missed, in words; empty where it is kept."""
        return self.result.missed or ""

    @property
    def report(self) -> Path:
        """The report for people."""
        return self.output / "report.html"


def fit(
    data_dir: str | os.PathLike[str] | DataSplits,
    *,
    output: str | os.PathLike[str],
    min_throughput: float | None = None,
    max_latency_ms: float | None = None,
    max_memory_gb: float | None = None,
    max_params_m: float | None = None,
    confidence: float = 0.8,
    device: str = "cpu",
    batch_size: int | None = None,
    precision: str | None = None,
    runtime: str | None = None,
    int8: bool | str = False,
    max_drop: float = 0.5,
    bf16: bool = False,
    threads: int | None = None,
    image_size: int | None = None,
    candidates: Given | None = None,
    search: float | None = None,
    space: str | os.PathLike[str] | None = None,
    zoo: str = "all",
    licences: Sequence[str] | None = None,
    commercial: bool = False,
    extra_data: bool = True,
    attention: bool = False,
    scratch: bool = False,
    weights_dir: str | os.PathLike[str] | None = None,
    init: str | os.PathLike[str] | None = None,
    recipe: str | None = None,
    epochs: int | None = None,
    brief_epochs: int | None = None,
    max_minutes: float | None = None,
    seed: int = 0,
    measured: str | os.PathLike[str] | None = None,
    max_bad_rate: float = 0.01,
    strict: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    track: str | None = None,
    overrides: Mapping[str, object] | None = None,
) -> FitRun:
    """Choose, train, export, verify and report the most accurate network that keeps a speed on a device.

    Candidates are released weights, chosen among as ``choose`` does, in the form in which they would ship: by
    measurement where the device is this machine's, else by prediction. A linear head on their features ranks them on
    the data; at most three are trained briefly where the validation set can tell them apart, the best in full. Small
    images (up to 64 px a side; of files some headers say so) are learned from scratch: of each scalable family the
    largest member that keeps the speed is found by bisection. Beside released weights that keep the speed scaled
    members do not compete, unless they are named: they have no features to be ranked by, finding them takes minutes,
    and from scratch on few images they are far behind. Where no released weights keep it they take over, which is
    noted. What is shipped is the fastest form that passed its gate, in the settings in which it is fastest.

    Where nothing keeps the constraint the fastest network is trained, weights at images of 96 px or a scaled member,
    and the run says by how much it misses (``FitRun.missed``). A predicted speed keeps it with the probability
    ``confidence``: where nothing does, what is at least as likely as not to keep it is trained, and that is a miss too.

    Args:
        data_dir: what ``open_dataset`` takes: class folders, idx files, a manifest.
        output: the folder to make.
        min_throughput: images/s that the exported network must reach at ``batch_size``, model only. Without any limit
            on speed the device's front is found and its knee taken.
        max_latency_ms: milliseconds that a call of the whole batch may take.
        max_memory_gb: 2**30 bytes that may be alive at once in a call, as counted.
        max_params_m: millions of parameters.
        confidence: probability with which a predicted speed must keep the limits, 0.5 to 0.99.
        device: where it will run: ``cpu``, ``cuda``, or a named GPU or processor (``l4``, ``i9-10940x``), for which
            speeds are predicted.
        batch_size: images per call of the shipped network; None: 8 on this machine, 256 on a named GPU, 1 on a named
            processor and where a latency alone is limited.
        precision: of the shipped network; None: ``amp`` on a named GPU, ``fp32`` on a processor.
        runtime: here ``onnxruntime`` or ``openvino``, on ``cuda`` ``onnxruntime`` or ``tensorrt``, None: the fastest
            installed one; on a named device what its speed
            is predicted for, None: ``compiled``.
        int8: ship INT8 where it is faster and keeps its accuracy; the validation set chooses the layers that stay in
            float. ``"qat"``: fine-tune for it where it loses too much. On a named GPU networks are predicted in INT8,
            with runtime ``tensorrt`` or ``onnxruntime``; where its gate withholds it, float ships, and by its
            prediction is said what is missed.
        max_drop: accuracy points that INT8 may lose on validation; goes with ``int8``.
        bf16: ship what computes in bfloat16 where it is faster and agrees; on this machine's processor, in OpenVINO.
        threads: of the runtime, on a named processor with ``measured`` alone; None: one per core.
        image_size: side in pixels; None: the candidates' own, or from scratch the data's up to 64 px, else 224.
        candidates: names, patterns, tags, specs or modules to choose from; None: all released weights that the options
            below let through. Names that nobody released weights of need ``scratch`` or ``init``.
        search: minutes in which a network of your own is searched for first, under the same limits on speed and
            parameters (see ``search``); its study stands beside ``output``, in a folder whose name ends in ``-search``.
        space: what is searched; None: by the images' size.
        zoo, licences, commercial, extra_data, attention: which released weights; as for ``choose``.
        scratch: scaled members of TResNet, EfficientNet and ResNet-D, from scratch, whatever the data are; else that
            is for small images alone, unless ``image_size`` or named weights enlarge them above 64 px, or ``init`` asks
            for released weights.
        weights_dir: folder with released weights: files named by tag, or as in the hub's cache; files of weights with
            other names are refused.
        init: ``pretrained``: released weights even for small images (of a network that has none it is refused); or a
            file of weights of the one candidate.
        recipe: how to train; None: ``finetune`` from released weights, else ``small`` or ``pictures``.
        epochs: of the full training; None: the recipe's.
        brief_epochs: of the comparison of finalists; None: 1, and none where the validation set is too small to tell
            pretrained finalists apart better than their features do.
        max_minutes: the full training ends by then at the latest, its schedule with it.
        seed: of everything drawn.
        measured: JSON lines measured on the named device before training, as the script of a kit writes them
            (``write_kit``): networks with a row go by it, the others are predicted and set by the rows.
        max_bad_rate: share of the images (but at least one) that may be unreadable; they are left out.
        strict: raise where nothing keeps the constraint, instead of training the fastest. What ships and comes out too
            slow all the same stands in ``FitRun.missed``.
        resume: go on in ``output``.
        overwrite: replace ``output``.
        progress: called with events; see ``learn.progress``.
        track: ``mlflow``, ``wandb`` or ``trackio``: one run of this tracker for the whole fit, named as ``output``: the
            winner's epochs, its result on the test set, the speed of what is shipped.
        overrides: recipe keys.

    Raises:
        UserError: bad input, an artefact that does not agree, or with ``strict`` a constraint that nothing keeps.
    """
    if space is not None and search is None:
        raise UserError(f"space {str(space)!r} is what a search looks through; give search, its minutes, too")
    if scratch and init == "pretrained":
        raise UserError("scratch and init 'pretrained' exclude each other; leave one out")
    given = None if init in (None, "pretrained") else Path(init)  # pyright: ignore[reportArgumentType]
    elsewhere = not at_hand(check_device(device))
    asked = FitRequest(
        data=data_dir,
        output=output,  # pyright: ignore[reportArgumentType]
        constraint=Constraint(
            min_throughput=min_throughput,
            max_latency_ms=max_latency_ms,
            max_memory_gb=max_memory_gb,
            max_params_m=max_params_m,
            confidence=confidence,
        ),
        where=Asked(
            device=device,
            batch_size=batch_size,
            precision=precision,
            runtime=runtime if elsewhere else None,
            threads=threads,
            latency=max_latency_ms is not None and min_throughput is None,
        ),
        shipping=Shipping(
            runtime=None if elsewhere else runtime,
            int8=bool(int8),
            max_drop=max_drop,
            qat=wants_qat(int8),
            bf16=bf16,
        ),
        training=Training(
            recipe=recipe,
            init="pretrained" if init == "pretrained" else None,
            epochs=epochs,
            brief_epochs=brief_epochs,
            max_minutes=max_minutes,
            seed=seed,
            overrides={} if overrides is None else overrides,
        ),
        start=Start(
            scratch=scratch,
            weights_dir=None if weights_dir is None else Path(weights_dir),
            file=given,
        ),
        candidates=candidates,
        image_size=image_size,
        offer=Filter(
            zoo=zoo,
            licences=licences,
            commercial=commercial,
            extra_data=extra_data,
            attention=attention,
        ),
        measured=None if measured is None else Path(measured),
        max_bad_rate=max_bad_rate,
        strict=strict,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
        track=track,
    )
    if max_drop != 0.5 and not int8 and not resume:  # which earlier versions took
        raise UserError(f"max_drop {max_drop:g} is what 8 bits may lose; give int8 (--int8) with it, or leave it out")
    return fit_request(asked if search is None else with_baseline(asked, search, space))


def fit_request(asked: FitRequest) -> FitRun:
    """``fit`` by one value."""
    splits = (
        asked.data
        if isinstance(asked.data, DataSplits)
        else open_dataset(asked.data, max_bad_rate=asked.max_bad_rate, compare=False)
    )
    files = None if asked.from_scratch(splits) else asked.start.files(asked.named)
    asked.check_networks(splits)
    asked.shipping.check_images(len(splits.train))
    _ = asked.rows  # what they are wrong in is told before anything is written
    request = asked.to_json(splits)
    with OutputLock() as lock:
        lock.take(checked_output(asked, splits))
        folder = new_output_dir(asked.output, overwrite=asked.overwrite, resume=asked.resume, need_bytes=_BYTES_NEEDED)
        lock.take(folder)
        return _fit(asked, splits, files, folder, request, lock.note)


def _fit(
    asked: FitRequest,
    splits: DataSplits,
    files: WeightFiles | None,
    folder: Path,
    request: dict[str, object],
    unlocked: str,
) -> FitRun:
    """``fit`` in a folder that is made, and locked where ``unlocked`` does not say why not."""
    run = Fit(
        asked=asked,
        record=RunRecord(folder, request, resume=asked.resume, older=as_version_0_1(asked, splits)),
        splits=splits,
        folder=folder,
        basis=asked.basis(),
        files=files,
    )
    if unlocked:
        run.note(unlocked)
    run.record.check_data(splits)
    run.record.put(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=_command(),
        commit=code_commit(),
        environment=asdict(Environment.here(asked.training_device)),
        data=describe(splits, str(request["data"]), asked.size_for(splits)),
    )
    if not asked.here and asked.where.runtime is None:
        run.note(_usual_runtime(run.basis.conditions))
    run.check()
    run.find()
    run.compare()
    run.check_input()
    with tracked(asked.track, folder, run.facts() if asked.track else {}, run.tell) as told:
        trained = run.train_winner(told)
        artifact = run.finish().ship(trained)
        tell_result(told, run.record.now)
    spent = {key: seconds for key, seconds in run.record.now.timings.items() if key != "total_s"}
    run.record.put(timings={**spent, "total_s": sum(spent.values())})
    write_fit_report(folder)
    run.note(f"report: {folder / 'report.html'}")
    return FitRun(output=folder, net=trained.net, artifact=artifact, result=run.record.now)


def _usual_runtime(c: Conditions) -> str:
    """That a runtime was taken since none was named, and which others can be predicted on the device."""
    others = [name for name in reversed(predicted_runtimes(c.device)) if name != c.runtime]
    return (
        f"speeds are predicted for {c.device} in runtime {c.runtime}, since none was named; --runtime "
        f"{listed(others, 'or')} predicts for another"
    )


def _command() -> str:
    """How this was called, for whoever wants to repeat it."""
    called = sys.argv and Path(sys.argv[0]).name == "convscale"
    return shlex.join(["convscale", *sys.argv[1:]]) if called else "convscale.fit(...)"
