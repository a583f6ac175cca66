"""Which networks of a space are likely the fastest, to see at once whether any keeps a speed."""

from __future__ import annotations

from convscale.arch.spec import NetSpec
from convscale.choice.decide import describe_speed
from convscale.errors import UserError, first_line
from convscale.nas.pace import Counted, Pace
from convscale.nas.records import Reward
from convscale.nas.request import Say
from convscale.nas.space import Genes, SearchSpace


def need_one_that_keeps(space: SearchSpace, reward: Reward, pace: Pace, say: Say) -> None:
    """
    Raises:
        UserError: none of the networks that are likely the fastest keeps the target, and which comes nearest.
    """
    found: list[tuple[float, NetSpec, Counted]] = []
    for genes in smallest_of(space):
        spec = space.spec_of(genes)
        try:
            counted = pace(spec)
        except UserError as error:
            pace.check_calibration()  # else that would be left out, network by network
            say(f"left out: {spec.name}: {first_line(error)}")
            continue
        ratio = reward.ratio(pace.sure(counted.speed), counted.macs)
        if ratio <= 1:
            return
        found.append((ratio, spec, counted))
    if not found:
        raise UserError(f"no network of the space {space.name} could be timed")
    _, spec, counted = min(found, key=lambda one: one[0])
    has = f"{counted.macs / 1e6:,.1f} M MACs" if reward.by == "macs" else describe_speed(counted.speed)
    raise UserError(
        f"no network of the space {space.name} is found that keeps {reward}; the nearest of the {len(found)} smallest, "
        f"of each kind and activation, {spec!r}, has {has}; ask for less, or search a space of smaller networks"
    )


def smallest_of(space: SearchSpace) -> list[Genes]:
    """The networks that are likely the fastest: everything at its least, with the kinds of blocks stage by stage that
    need the fewest multiply-accumulates, and with each kind wherever the space offers it; then the same with each
    activation and without shortcuts wherever it offers these.
    """
    found = _of_each_kind(space)
    acts = list(dict.fromkeys(act for v in space.variables if v.field == "activation" for act in v.options))
    for act in acts or [None]:
        for shortcuts in (True, False):
            changed = [_with(space, genes, act, shortcuts) for genes in found[:]]
            found += [genes for genes in dict.fromkeys(changed) if genes not in found]
    return found


def _with(space: SearchSpace, genes: Genes, activation: object, shortcuts: bool) -> Genes:
    """The genes with an activation, and without shortcuts, wherever the space offers them."""
    made = list(genes)
    for at, variable in enumerate(space.variables):
        if variable.field == "activation" and activation in variable.options:
            made[at] = variable.options.index(activation)
        elif variable.field == "skip" and not shortcuts and False in variable.options:
            made[at] = variable.options.index(False)
    return space.canonical(made)


def _of_each_kind(space: SearchSpace) -> list[Genes]:
    """Everything at its least, by kinds of blocks, with the first activation."""
    kinds = {option for v in space.variables if v.field == "kind" for option in v.options}
    found: list[Genes] = []
    for kind in (None, *sorted(map(str, kinds))):
        for gentle in (False, True):
            genes = []
            for variable in space.variables:
                at = 0
                if variable.field == "kind" and kind in variable.options:
                    at = variable.options.index(kind)
                elif variable.ordered:
                    at = min(range(len(variable.options)), key=lambda i: float(str(variable.options[i])))
                elif variable.field == "stem":
                    at = _smallest_stem(space)
                elif variable.field == "head":
                    at = min(range(len(space.heads)), key=lambda i: space.heads[i].width)
                elif variable.field == "downsample" and gentle:
                    at = len(variable.options) - 1
                genes.append(at)
            made = space.canonical(genes)
            if made not in found:
                found.append(made)
    least = _least_macs(space, found[0])
    return [least, *(genes for genes in found if genes != least)]


def _least_macs(space: SearchSpace, genes: Genes) -> Genes:
    """The genes with every stage's kind of block changed to the one with the fewest multiply-accumulates."""
    from convscale.nas.tally import tally

    for at, variable in enumerate(space.variables):
        if variable.field == "kind":
            options = [
                space.canonical([*genes[:at], option, *genes[at + 1 :]]) for option in range(len(variable.options))
            ]
            genes = min(options, key=lambda made: tally(space.spec_of(made)).macs)
    return genes


def _smallest_stem(space: SearchSpace) -> int:
    """The stem whose maps are the smallest."""
    stems = space.stems
    return min(range(len(stems)), key=lambda i: (-stems[i].reduction, stems[i].widths[-1]))
