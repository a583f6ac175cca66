"""Which networks of a space are likely the fastest, to see at once whether any keeps a speed."""

from __future__ import annotations

from convscale.nas.space import Genes, SearchSpace


def smallest_of(space: SearchSpace) -> list[Genes]:
    """The networks that are likely the fastest: everything at its least, with the kinds of blocks stage by stage that
    need the fewest multiply-accumulates, and with each kind wherever the space offers it.
    """
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
