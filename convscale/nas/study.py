"""The search for a baseline: ``search``."""

from __future__ import annotations

import os
from pathlib import Path

from convscale.choice.basis import Asked, basis_of
from convscale.errors import UserError, check_flag, check_number, check_path
from convscale.files import check_output_dir, file_or_none, new_output_dir
from convscale.images.sources import open_dataset
from convscale.images.splits import DataSplits
from convscale.learn.recipe import Recipe
from convscale.learn.recipes import get_recipe
from convscale.locks import OutputLock
from convscale.nas.engines.start import place_for
from convscale.nas.records import Reward
from convscale.nas.request import Effort, Request, Say, fixed_form, recipe_for, space_for
from convscale.nas.result import Study, begun, read_study
from convscale.nas.space import SearchSpace
from convscale.nas.walk import Walk


def search(
    data: DataSplits | str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    space: SearchSpace | str | os.PathLike[str] | None = None,
    device: str = "cpu",
    min_throughput: float | None = None,
    trials: int | None = None,
    minutes: float | None = None,
    output: str | os.PathLike[str],
    engine: str = "local",
    workers: int = 1,
    address: str | None = None,
    threads_per_trial: int | None = None,
    reward: str = "hard",
    reward_by: str = "throughput",
    reward_weight: float = -0.07,
    target_macs_m: float | None = None,
    batch_size: int | None = None,
    precision: str | None = None,
    runtime: str | None = None,
    compiled: bool = False,
    threads: int | None = None,
    confidence: float = 0.8,
    calibration: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    training_device: str | None = None,
    recipe: Recipe | str | os.PathLike[str] | None = None,
    epochs: int = 3,
    most_images: int = 20_000,
    sampler: str = "guided",
    zero_cost: str | None = "size",
    inherit: bool = False,
    seed: int = 0,
    resume: bool = False,
    reuse: bool = False,
    overwrite: bool = False,
    say: Say | None = None,
) -> Study:
    """Search a space for the network that is most accurate on the user's data and keeps a speed.

    Candidates are timed, or their speed is predicted, before anything is trained; one that can not keep the speed is
    never trained. The others are trained briefly, and given up early where they are behind the better half. Every trial
    stands in the folder's journal as soon as it is there: a run that is killed loses at most the trials under way, and
    ``resume`` goes on with the same ones.

    Args:
        data: splits, or a folder or manifest for ``open_dataset``; other processes read it from there.
        source: where splits that are given were read from, for the record.
        space: what is searched, by value, name or file; None: ``small`` for images of up to 64 px, else ``mobile``.
        device: where the network is to run: ``cpu``, ``cuda``, or a device that is not here, for which it is predicted.
        min_throughput: images/s to keep, or the target of a softer reward; None: no limit.
        trials: how many are trained, earlier calls included; None: as many as the time allows.
        minutes: of this call; trials under way at its end are finished.
        output: folder to make.
        engine: ``local``, or ``ray``.
        workers: trials at a time.
        address: of a Ray cluster; None: one of this machine.
        threads_per_trial: compute threads, which are a trial's cores on a cluster; None: the cores over ``workers``.
        reward: ``hard`` (keep the target), ``soft`` (accuracy x (cost / target)^w) or ``hard-like`` (w = 0 below the
            target and -1 above); MnasNet, section 3.
        reward_by: the cost: ``throughput``, or ``macs`` as in the papers, with ``target_macs_m``.
        reward_weight: w of the soft reward.
        target_macs_m: millions of multiply-accumulates per image.
        batch_size: images per call; None: 8 here, 256 on a named GPU, 1 on a named processor.
        precision, runtime, compiled, threads, calibration: as for ``choose``.
        confidence: with what probability a predicted speed must hold.
        image_size: side in pixels; None: the space's, or that of small images.
        training_device: where trials are trained; None: ``device`` where it is here, else ``cpu``. With engine ``ray``
            each trial gets a card of the cluster with ``cuda``; this machine need not have one.
        recipe: of the brief trainings, whose epochs are replaced; None: ``small`` for small images, else ``pictures``.
        epochs: of a trial.
        most_images: of the train set in a trial; validation is whole.
        sampler: ``guided`` (a linear model of the trials), ``tpe`` (Optuna's), ``evolution`` or ``random``.
        zero_cost: the score by which the first trials are chosen, and later proposals filtered, ``tpe``'s aside: of
            three the worst is left out. ``size``, ``naswot``, ``zico`` or ``zen``; None: neither.
        inherit: begin a candidate with the weights of the nearest trained network that it can grow from, what that
            computes preserved (Net2Net, Chen et al., arXiv 1511.05641). Later trials have then trained longer than
            earlier ones, so accuracies compare less well.
        seed: of everything drawn; with the same seed and threads the same trials.
        resume: go on in ``output`` where there is a study.
        reuse: with ``resume``: take the result that ``output`` has already, where the same was asked for.
        overwrite: replace an output folder that exists.
        say: told a line now and then.

    Raises:
        UserError: bad input, in one line; among it a space none of whose networks keeps the speed (the fastest is named
            before anything is trained) and a study of another space.
    """
    effort = Effort(
        trials=trials,
        minutes=minutes,
        epochs=epochs,
        most_images=most_images,
        sampler=sampler,
        zero_cost=zero_cost,
        seed=seed,
        inherit=inherit,
    )
    wanted = Reward(
        form=reward,
        by=reward_by,
        target=min_throughput if reward_by == "throughput" else target_macs_m,
        exponent=reward_weight,
    )
    for name, value, by in (("min_throughput", min_throughput, "throughput"), ("target_macs_m", target_macs_m, "macs")):
        if value is not None and reward_by != by:
            raise UserError(f"{name} goes with reward_by {by}, got {name} {value!r} and reward_by {reward_by}")
    for name, flag in (("resume", resume), ("reuse", reuse), ("overwrite", overwrite)):
        check_flag(name, flag)
    if reuse and not resume:
        raise UserError("reuse takes the result of an earlier call, which resume goes on with; give resume too")
    check_number("confidence", confidence, "a probability from 0.5 to 0.99", 0.5, 0.99)
    asked = Asked(
        device=device, batch_size=batch_size, precision=precision, runtime=runtime, compiled=compiled, threads=threads
    )
    basis = basis_of(asked, calibration)
    here = device if device.partition(":")[0] == "cuda" and not basis.predicted else "cpu"
    own = isinstance(data, DataSplits)
    where = source if own else data
    inputs = [("data", where), ("calibration", calibration)]
    inputs += [("space", file_or_none(space)), ("recipe", file_or_none(recipe))]
    folder = check_output_dir(check_path("output", output), overwrite=overwrite, resume=resume, inputs=inputs)
    named = None if recipe is None else get_recipe(recipe)
    place = place_for(
        engine=engine,
        workers=workers,
        address=address,
        threads=threads_per_trial,
        training=training_device or here,
        own=own,
    )
    splits = data if isinstance(data, DataSplits) else open_dataset(check_path("data", data), compare=False)
    searched = space_for(space, splits, image_size)
    request = Request(
        splits=splits,
        data=None if where is None else str(Path(where).absolute()),
        space=searched,
        basis=basis,
        reward=wanted,
        effort=effort,
        recipe=fixed_form(recipe_for(named, splits, image_size).override({"epochs": epochs}), place.device),
        place=place,
        confidence=confidence,
        say=say or (lambda text: None),
    )
    with OutputLock() as lock:
        lock.take(folder)
        new_output_dir(folder, overwrite=overwrite, resume=resume, inputs=splits.places())
        lock.take(folder)
        if lock.note:
            request.say(lock.note)
        if resume and reuse and begun(folder, request.written()).get("result") is not None:
            study = read_study(folder)
            request.say(f"{folder} has a result of an earlier call, which is taken: {study.best.spec.name}")
            return study
        return Walk(request, folder).run()
