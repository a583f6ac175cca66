"""What to carry to a device that is not here: the candidates that could win there; and what an option is promised."""

from __future__ import annotations

import os
from collections.abc import Sequence

from convscale._version import __version__
from convscale.artifact.promise import Promise
from convscale.choice.basis import Asked, Basis, basis_of
from convscale.choice.candidates import candidates_of
from convscale.choice.decide import Choice, Option, beats, front_of
from convscale.choice.facts import SizedSpec
from convscale.choice.rows import measured_key
from convscale.choice.speeds import Say, facts_of
from convscale.conditions import Conditions
from convscale.errors import UserError
from convscale.networks.foreign import Foreign
from convscale.networks.resolve import Network
from convscale.predictor.devices import at_hand
from convscale.ship.kit import MOST, Kit, KitNetwork, write_kit_folder

LEAST_CHANCE, MOST_CHANCE = 0.05, 0.99
"""A candidate is worth measuring where its predicted chance of keeping the speed lies between these: below it will not
win, above there is nothing to find out."""


def could_win(choice: Choice, most: int = MOST) -> list[Option]:
    """The options of a predicted choice that measuring could make, or unmake, the best: at most ``most``, one for each
    network and size.

    First the best; then, of those that nobody knows to be less accurate and whose chance lies between ``LEAST_CHANCE``
    and ``MOST_CHANCE``, the front of accuracy and speed (thinned evenly where it is long), the rest of them, the most
    accurate first, and, where the best is not sure itself, what would take its place.
    """
    floor = choice.floor
    best = choice.best

    def open_question(o: Option) -> bool:
        chance = o.chance(floor) if floor else None
        return chance is not None and LEAST_CHANCE <= chance <= MOST_CHANCE and not o.candidate.why_not

    rivals = [o for o in choice.options if _not(o, best) and beats(o, best) is not False and open_question(o)]
    rivals.sort(key=lambda o: (-(o.top1 or 0.0), -(o.chance(floor) or 0.0)))
    rivals = _one_each([best, *rivals])[1:]
    leaders = list(front_of(rivals))
    if len(leaders) > most - 1 > 0:
        leaders = [leaders[i * (len(leaders) - 1) // max(1, most - 2)] for i in range(most - 1)]
    chance = best.chance(floor) if floor else None
    stand_ins: list[Option] = []
    if chance is not None and chance < MOST_CHANCE:
        keepers = [o for o in choice.options if _not(o, best) and o.verdict in ("yes", "maybe") and beats(best, o)]
        stand_ins = sorted(keepers, key=lambda o: (-(o.top1 or 0.0), -(o.facts.macs)))
    return _one_each([best, *leaders, *rivals, *stand_ins])[:most]


def _one_each(options: Sequence[Option]) -> list[Option]:
    """The first option of each network and size."""
    found: dict[tuple[str, int], Option] = {}
    for option in options:
        found.setdefault((measured_key(option.spec), option.image_size), option)
    return list(found.values())


def _not(o: Option, best: Option) -> bool:
    return (o.candidate.name, o.image_size) != (best.candidate.name, best.image_size)


def write_kit(
    networks: Choice | Sequence[Network] | Network,
    folder: str | os.PathLike[str],
    *,
    device: str | None = None,
    batch_size: int | None = None,
    precision: str | None = None,
    runtime: str | None = None,
    image_sizes: Sequence[int] | None = None,
    min_throughput: float | None = None,
    most: int = MOST,
    overwrite: bool = False,
    progress: Say | None = None,
) -> Kit:
    """Write a folder that measures candidates on a device that is not here: ONNX files of untrained networks, and a
    script that needs numpy and ONNX Runtime alone.

    Args:
        networks: a choice that was predicted (of it, those that could win: see :func:`could_win`), or at most eight
            names, patterns, specs or modules.
        folder: to make.
        device: a named GPU or processor, or ``cpu``; of a choice its own.
        batch_size, precision, runtime: conditions; of a choice its own. Runtime ``onnxruntime`` (when left out) or
            ``tensorrt``.
        image_sizes: sides in pixels, for names; None: each one's own.
        min_throughput: images/s to keep, for names; of a choice its own.
        most: networks to write at most, up to 8.
        overwrite: replace a kit of that name.
        progress: told a line now and then.

    Raises:
        UserError: a choice that was not predicted, conditions that the script can not measure under, too many networks,
            or a folder that holds something else.
    """
    say = progress or (lambda text: None)
    if isinstance(most, bool) or not isinstance(most, int) or not 1 <= most <= MOST:
        raise UserError(f"most is {most!r}; a kit holds 1 to {MOST} networks")
    stated = {"device": device, "batch_size": batch_size, "precision": precision, "runtime": runtime}
    if isinstance(networks, Choice):
        if given := [name for name, value in stated.items() if value is not None]:
            raise UserError(f"a choice has its own conditions; give write_kit no {given[0]}")
        if "predicted" not in networks.kind:
            raise UserError("the choice was measured here; a kit is for a device that speeds were predicted for")
        items = [_from_option(o, networks.floor) for o in could_win(networks, most)]
        floor, conditions = networks.floor or None, networks.conditions
    else:
        if device is None:
            raise UserError("a kit of networks needs their device: a named one such as 'l4', or 'cpu'")
        items, conditions = _named(networks, stated, image_sizes, min_throughput, say)
        floor = min_throughput
    return write_kit_folder(items, folder, conditions, min_throughput=floor, overwrite=overwrite, say=say)


def _named(
    networks: Sequence[Network] | Network,
    stated: dict[str, object],
    image_sizes: Sequence[int] | None,
    floor: float | None,
    say: Say,
) -> tuple[list[KitNetwork], Conditions]:
    """Networks by their names, predicted where their device is a named one."""
    asked = Asked(**{**stated, "runtime": stated["runtime"] or "onnxruntime"})  # pyright: ignore[reportArgumentType]
    if at_hand(asked.device) and asked.device != "cpu":
        raise UserError(f"a kit is for a device that is not here, got {asked.device!r}; name the GPU, such as 'l4'")
    basis: Basis = basis_of(asked)
    pool = candidates_of(networks, image_sizes)
    if refused := [c for c in pool if c.why_not]:
        raise UserError(f"{refused[0].label} can not be measured: {refused[0].why_not}")
    facts = facts_of([SizedSpec(c.spec, c.image_size) for c in pool], basis, say)
    options = {
        (measured_key(c.spec), c.image_size): Option(
            candidate=c, facts=facts[SizedSpec(c.spec, c.image_size)], batch_size=basis.conditions.batch_size
        )
        for c in reversed(pool)
    }
    return [_from_option(o, floor or 0.0, "named") for o in reversed(options.values())], basis.conditions


def _from_option(option: Option, floor: float, why: str = "") -> KitNetwork:
    speed = option.speed
    predicted: dict[str, float] = {}
    if speed is not None and speed.kind == "predicted":
        predicted = {"images_per_s": speed.images_per_s, "low": speed.low, "high": speed.high}
        if floor and (chance := option.chance(floor)) is not None:
            predicted["chance"] = chance
    return KitNetwork(
        network=option.spec,
        model=option.spec.arch if isinstance(option.spec, Foreign) else option.spec.name,
        fused=option.facts.fused,
        label=option.label,
        image_size=option.image_size,
        why=why or option.reason,
        params=option.facts.params,
        macs=option.facts.macs,
        predicted=predicted,
    )


def promise_of_option(choice: Choice, option: Option | None = None, calibration: str = "") -> Promise:
    """What an artefact of a predicted option is to be held to; None: the best.

    Args:
        choice: the choice.
        option: of it.
        calibration: what the prediction went by beside the tables, in words.

    Raises:
        UserError: the option's speed was not predicted.
    """
    chosen = option or choice.best
    speed = chosen.speed
    if speed is None or speed.kind != "predicted":
        raise UserError(f"{chosen.label} has no predicted speed to promise")
    c = choice.conditions
    return Promise(
        device=c.device,
        runtime=c.runtime,
        precision=c.precision,
        layout=c.layout,
        batch_size=c.batch_size,
        image_size=chosen.image_size,
        threads=c.threads,
        images_per_s=speed.images_per_s,
        low=speed.low,
        high=speed.high,
        min_throughput=choice.floor or None,
        confidence=chosen.chance(choice.floor) if choice.floor else None,
        doubts=speed.doubts,
        calibration=calibration,
        versions={"convscale": __version__},
    )
