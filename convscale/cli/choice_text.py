"""What ``choose`` chose, and the conditions that a speed holds under, as text for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from convscale import words
from convscale.cli.options import say, terminal_width
from convscale.cli.tables import Column, number_column, print_table
from convscale.conditions import Conditions, precision_text

if TYPE_CHECKING:
    from convscale.choice.decide import Choice, Option

_WIDE = 90
"""Characters from which on a table has room for licences."""
_BESIDE = 3
"""Rows that are shown of the faster, of the slower and of the doubtful, unless all are asked for."""


def in_words(c: Conditions, chosen_from: str = "") -> str:
    """Conditions in a line; ``chosen_from``: what the runtime and its settings were chosen from."""
    mode = "training" if c.mode == "train" else "inference"
    threads = f", {c.threads} threads" if c.threads else ""
    plainly = f"{c.runtime}, {precision_text(c.precision)}, {c.layout}"
    return f"{mode}, {chosen_from or plainly}, batch {c.batch_size}{threads}"


def print_choice(choice: Choice, show_all: bool) -> None:
    """A choice for people."""
    from convscale.choice.candidates import describe_accuracy, describe_weights
    from convscale.choice.decide import describe_speed

    best = choice.best
    say(f"{best.label}: {best.reason}" + (f"; {choice.trade}" if choice.trade else ""))
    source = f"; {best.candidate.source}" if best.candidate.source else ""
    say(f"{describe_accuracy(best.candidate)}{source}", 2)
    if weights := describe_weights(best.candidate):
        say(weights, 2)
    chance = best.chance(choice.floor) if choice.floor else None
    say(
        describe_speed(best.speed)
        + (f", {words.odds(chance)} likely to keep {words.exact(choice.floor)}" if chance is not None else ""),
        2,
    )
    say(
        f"{words.large(best.facts.params)} parameters, {words.gigabytes(best.facts.memory_bytes)} at batch "
        f"{best.batch_size} as counted"
        + (", all of it in the re-parameterised form for inference" if best.facts.fused else ""),
        2,
    )
    for doubt in best.speed.doubts if best.speed else ():
        say(f"doubt: {doubt}", 2)
    say(f"{choice.kind} on {choice.device}: {in_words(choice.conditions, choice.chosen_from)}", 2)
    _print_options(choice.front if show_all else near(choice), best, " and " in choice.kind)
    if show_all:
        _reasons("may be better, but not sure to keep it", choice.maybe)
        _reasons("keep it, accuracy not known", choice.alternatives)
        _reasons("rejected", sorted(choice.rejected, key=lambda o: -(o.top1 or 0)))
    else:
        say(_left_out(choice))
    labels = {o.label for o in near(choice)}
    if relatives := [one for one in choice.aligned if show_all or one.of.label in labels]:
        say("hardware-aligned relatives:")
        for one in relatives:
            say(str(one), 2)
    for note in choice.notes:
        say(f"note: {note}")


def near(choice: Choice) -> list[Option]:
    """At most ten options around the constraint, fastest first: the choice, on the front three faster and three slower
    but better, and those that may be better.
    """
    front, best = list(choice.front), choice.best
    speed = best.images_per_s or 0.0
    faster = [o for o in front if (o.images_per_s or 0.0) > speed and o is not best]
    slower = [o for o in front if (o.images_per_s or 0.0) <= speed and o is not best]
    shown = [*faster[-_BESIDE:], best, *slower[:_BESIDE]]
    labels = {o.label for o in shown}
    shown += [o for o in choice.maybe if o.label not in labels and o.images_per_s is not None][:_BESIDE]
    return sorted(shown, key=lambda o: -(o.images_per_s or 0.0))


def _left_out(choice: Choice) -> str:
    """How many others there are."""
    counts = ((len(choice.maybe), "may be better"), (len(choice.alternatives), "keep it without a known accuracy"))
    said = [f"{n:,} {what}" for n, what in (*counts, (len(choice.rejected), "were rejected")) if n]
    return f"of the others {', '.join(said)}; --all gives each with its reason" if said else "there were no others"


def _print_options(options: Sequence[Option], best: Option, mixed: bool) -> None:
    say("around the constraint, fastest first (* chosen, ? maybe, - too slow):")
    columns = [Column(""), number_column("top-1"), number_column("images/s")]
    columns += [*([Column("speed is")] if mixed else []), Column("network")]
    wide = terminal_width() >= _WIDE
    columns += [Column("licence"), Column("extra data")] if wide else []
    rows = []
    for o in options:
        mark = "*" if o.label == best.label else {"maybe": "?", "no": "-"}.get(o.verdict, "")
        about = [o.candidate.licence or words.UNKNOWN, o.candidate.extra_data or words.UNKNOWN]
        kind = [o.speed.kind if o.speed else ""] if mixed else []
        cells = [mark, words.accuracy(o.top1), words.exact(o.images_per_s or 0), *kind, o.label]
        rows.append(cells + (about if wide else []))
    print_table(columns, rows)


def _reasons(title: str, options: Sequence[Option]) -> None:
    if not options:
        return
    say(f"{title}:")
    for o in options:
        say(f"{o.label}{'' if o.top1 is None else f' ({words.accuracy(o.top1)})'}: {o.reason}", 2)
