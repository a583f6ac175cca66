"""Scaling: a spec or a name and multipliers become another spec, always computed from the unrounded baseline."""

from __future__ import annotations

from convscale.arch.multipliers import multipliers, scale_to
from convscale.arch.rules import ScalingRule, as_rule
from convscale.arch.spec import NetSpec
from convscale.arch.zoo import as_spec
from convscale.errors import UserError, check_text


def scale(
    spec: NetSpec | str,
    *,
    phi: float | None = None,
    rule: str | ScalingRule = "compound",
    alpha: float = 1.2,
    beta: float = 1.1,
    gamma: float = 1.15,
    width_share: float = 0.8,
    depth: float | None = None,
    width: float | None = None,
    resolution: float | None = None,
    image_size: int | None = None,
    divisor: int | None = None,
    name: str | None = None,
) -> NetSpec:
    """Scale a network.

    Either by ``phi`` and a rule, or by multipliers. What a spec was scaled by before is kept and multiplied: the result
    is computed from its unrounded baseline, so scaling in two steps equals scaling in one.

    Args:
        spec: a spec or the name of one.
        phi: the compound coefficient; negative values scale down.
        rule: ``compound``: depth alpha^phi, width beta^phi, resolution gamma^phi (EfficientNet, eq. 3);
            ``fast``: the total cost factor s = 2^phi is shared as d : w : r = 1 : 8 : 1, that is depth s^0.1, width
            s^(0.8/2), resolution s^(0.1/2) (fast compound scaling, Dollar et al. 2021, arXiv 2103.06877, section 5);
            ``depth``, ``width``, ``resolution``: all of 2^phi on one dimension; a ``ScalingRule``, or the .yaml or
            .json file of one: the compound rule with its coefficients, as ``find_scaling`` found them.
        alpha, beta, gamma: the compound rule's bases, each at least 1; the defaults were found for B0 (EfficientNet,
            section 3.3).
        width_share: width's share of the cost in the fast rule; depth and resolution have equal halves of the rest.
        depth: multiplier of blocks per stage; rounded up.
        width: multiplier of channels; rounded to ``divisor``, never more than 10 % below.
        resolution: multiplier of the image's side.
        image_size: side in pixels instead of ``resolution``.
        divisor: widths become multiples of this; None: the spec's own (8 in all named families).
        name: of the result; None: made from the baseline's name and the multipliers.

    Raises:
        UserError: an unknown rule, both phi and multipliers, none of them, a value that is not finite or not above 0,
            or a result that the network can not take.
    """
    spec = as_spec(spec)
    given = [v for v in (depth, width, resolution, image_size) if v is not None]
    known = as_rule(rule)
    if name is not None:
        check_text("name", name, what="mine")
    if phi is not None:
        if given:
            raise UserError("scale takes either phi or depth, width, resolution and image_size, not both")
        if isinstance(known, ScalingRule):
            depth, width, resolution = multipliers(phi, alpha=known.alpha, beta=known.beta, gamma=known.gamma)
        else:
            depth, width, resolution = multipliers(
                phi, rule=known, alpha=alpha, beta=beta, gamma=gamma, width_share=width_share
            )
    elif not given and divisor is None:
        raise UserError("scale needs phi, or at least one of depth, width, resolution, image_size and divisor")
    return scale_to(
        spec,
        depth=_default(depth),
        width=_default(width),
        resolution=_default(resolution),
        image_size=image_size,
        divisor=divisor,
        name=name,
    )


def _default(value: float | None) -> float:
    return 1.0 if value is None else value
