"""Which of the networks that keep a speed are worth training: a linear head on their features says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch

from convscale.arch.spec import NetSpec
from convscale.choice.speeds import Say
from convscale.errors import UserError
from convscale.images.splits import DataSplits
from convscale.learn.prepare import build_net, choose_preprocessing
from convscale.learn.probe import probe
from convscale.learn.recipe import Recipe
from convscale.pipeline.contender import Contender
from convscale.pipeline.heads import OWN, with_head
from convscale.pipeline.ranking import by_promise
from convscale.pipeline.record import RunRecord
from convscale.pipeline.request import FitRequest
from convscale.show.fit_parts import Candidate as Row
from convscale.show.fit_parts import Probed
from convscale.show.json_values import from_json

FINALISTS = 3
"""Networks that are trained briefly."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prober:
    """Tries the features of networks on the data, and writes down what they are worth."""

    asked: FitRequest
    splits: DataSplits
    record: RunRecord
    say: Say

    def probed(self, contenders: Sequence[Contender], recipe: Recipe) -> list[Contender]:
        """The few pretrained contenders whose features suit the data best: a linear head is solved on each. One whose
        weights can not be loaded is left out, with the reason. Those without weights have no features to go by; they
        take the places that are left. A lone one of a recipe that solves no head is taken as it is.

        Raises:
            UserError: the weights of none can be loaded.
        """
        if len(contenders) == 1 and not recipe.solve_head:
            return list(contenders)  # nothing to compare it with, and its head need not be one that can be solved
        unweighted = [contender for contender in contenders if contender.weights is None]
        contenders = [contender for contender in contenders if contender.weights is not None]
        scores: dict[tuple[str, int], float] = {}
        left_out: list[UserError] = []
        for number, contender in enumerate(contenders, start=1):
            row = self._row(contender)
            if row.probe is None:
                self.say(f"probing {number} of {len(contenders)}: {contender.name} @{contender.image_size}")
                try:
                    row = replace(row, probe=self._probe(contender, recipe))
                except UserError as error:
                    left_out.append(error)
                    self.say(f"left out: {contender.name}: {error}")
                    self.record.put_row(replace(row, kept=False, reason=f"left out: {error}"))
                    continue
                self.record.put_row(row)
            assert row.probe is not None
            scores[contender.name, contender.image_size] = row.probe.top1 or 0.0
        if left_out and not scores and not unweighted:
            raise left_out[0]
        contenders = [contender for contender in contenders if (contender.name, contender.image_size) in scores]
        best = max(scores.values(), default=0.0)
        ranked = by_promise(contenders, [self._row(c) for c in contenders], self.splits.multilabel)
        last = ranked[:FINALISTS]
        for contender in ranked[FINALISTS:]:
            row = self._row(contender)
            behind = 100 * (best - scores[contender.name, contender.image_size])
            keeps = "" if self.record.now.missed else "keeps it; "
            reason = f"{keeps}its features are {behind:.1f} points behind on this data"
            self.record.put_row(replace(row, reason=reason))
        return [*last, *unweighted]

    def _probe(self, contender: Contender, recipe: Recipe) -> Probed:
        where = torch.device(self.asked.training_device)
        network = contender.network
        if isinstance(network, NetSpec) and self.asked.training.head != OWN:
            network = with_head(network, "gap")  # it is features that are judged
        net = build_net(network, self.splits, recipe, contender.init).to(where)
        preprocessing = choose_preprocessing(net, self.splits, recipe.override({"image_size": contender.image_size}))
        made = probe(net, self.splits.train, self.splits.validation, preprocessing, device=where)
        on = "validation images" if made.folds is None else f"images in {made.folds} folds"
        self.say(f"{contender.name}: {made.top1:.2%} on {made.validation} {on}, {made.seconds:.0f} s")
        return from_json(Probed, asdict(made), "probe")

    def _row(self, contender: Contender) -> Row:
        row = self.record.row(contender.name, contender.image_size)
        assert row is not None, "every contender has a row"
        return row
