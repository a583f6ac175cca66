"""A study's storage: Optuna's journal file, which is locked and flushed, and what stands in it for each trial."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convscale.arch.spec import NetSpec
from convscale.errors import UserError, first_line, naming_extras
from convscale.nas.pace import Counted
from convscale.nas.records import TrialRecord, conditions_from, speed_from
from convscale.nas.space import Genes, SearchSpace
from convscale.nas.trial import Result

if TYPE_CHECKING:
    import optuna

JOURNAL = "journal.log"
_NAME = "convscale"
_NO_SPEED = 2.0
"""Cost over target of a network that memory does not hold: above 1 is all that is known of it."""


class Store:
    """The trials of one study, one after the other in Optuna's numbering.

    Raises:
        UserError: the journal can not be read.
    """

    def __init__(self, folder: Path, space: SearchSpace) -> None:
        with naming_extras("a search"):
            import optuna
            from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
        self.optuna, self.space = optuna, space
        self._over: dict[int, TrialRecord] = {}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path = folder / JOURNAL
        _mend(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the journal is new, and which sampler draws what
            try:
                backend = JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path)))
                self.study = optuna.create_study(
                    storage=optuna.storages.JournalStorage(backend),
                    study_name=_NAME,
                    direction="maximize",
                    load_if_exists=True,
                )
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"the study's journal {path} can not be read ({first_line(error)}); start anew in another folder"
                ) from error
        self.distributions: dict[str, Any] = {
            variable.name: optuna.distributions.IntDistribution(0, len(variable.options) - 1)
            if variable.ordered
            else optuna.distributions.CategoricalDistribution(tuple(range(len(variable.options))))
            for variable in space.variables
        }

    # ------------------------------------------------------------ asking

    @property
    def count(self) -> int:
        """Trials that were asked for, those that are under way too."""
        return len(self._trials())

    @property
    def waits(self) -> bool:
        """Whether a run was killed between choosing a trial and beginning it."""
        return any(trial.state.name == "WAITING" for trial in self._trials())

    def ask(self, genes: Genes) -> tuple[int, Genes]:
        """Begin a trial of these genes; its number and genes."""
        params = {variable.name: gene for variable, gene in zip(self.space.variables, genes, strict=True)}
        self.study.enqueue_trial(params)
        return self.begin()

    def begin(self) -> tuple[int, Genes]:
        """Begin the trial that waits, or one by the study's sampler."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a sampler draws some variables alone
            trial = self.study.ask(self.distributions)
        return trial.number, self.space.canonical([int(trial.params[v.name]) for v in self.space.variables])

    def ask_tpe(self, seed: int) -> tuple[int, Genes]:
        """Begin a trial of what Optuna's tree-structured Parzen estimator proposes; its number and genes."""
        self._use_tpe(seed)
        return self.begin()

    def _use_tpe(self, seed: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # multivariate is called experimental
            self.study.sampler = self.optuna.samplers.TPESampler(multivariate=True, constant_liar=True, seed=seed)

    def go_on_asking(self, number: int, seed: int) -> Genes:
        """Give a trial that a run was killed while beginning the parameters that it lacks, those that it would have
        had: what was enqueued, else what the estimator draws by the same seed; its genes.
        """
        self._use_tpe(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial, begun = self._trial(number), self._trials()[number]
            fixed = begun.system_attrs.get("fixed_params", {})
            for name, distribution in self.distributions.items():
                drawn = name in begun.params and name not in fixed and not distribution.single()
                if drawn and name not in trial.relative_params:  # drawn once more, so that the next ones are the same
                    self.study.sampler.sample_independent(self.study, begun, name, distribution)
                trial._suggest(name, distribution)
        return self.space.canonical([int(trial.params[v.name]) for v in self.space.variables])

    def note(self, number: int, asked: Mapping[str, object]) -> None:
        """Write down what is known of a trial before it is trained, in one line of the journal."""
        self._trial(number).set_user_attr("asked", dict(asked))

    def tell_unfit(self, number: int, ratio: float) -> None:
        """End a trial that is too slow: it breaks the constraint and reports nothing, so that no pruner sees it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a run that was killed had said so already
            self._trial(number).set_constraint("cost", ratio - 1)
        self.study.tell(number, 0.0)

    def tell(self, number: int, result: Result, ratio: float, factor: float) -> None:
        """End a trial with its curve; a failed one stays without a value. What was trained breaks no constraint: where
        the target is to be kept it keeps it, and else going past it is paid for in the value.
        """
        trial = self._trial(number)
        trial.set_user_attr("result", result.to_dict())
        if result.failed:
            self.study.tell(number, state=self.optuna.trial.TrialState.FAIL)
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a run that was killed had said so already
            trial.set_constraint("cost", min(0.0, ratio - 1))
            for epoch, accuracy in enumerate(result.curve, start=1):
                trial.report(accuracy * factor, epoch)
        if result.pruned:
            self.study.tell(number, state=self.optuna.trial.TrialState.PRUNED)
        else:
            self.study.tell(number, result.accuracy * factor)

    # ------------------------------------------------------------ reading

    def records(self) -> list[TrialRecord]:
        """All trials in order."""
        return [self._kept(trial) for trial in self._trials()]

    def _kept(self, trial: optuna.trial.FrozenTrial) -> TrialRecord:
        """A trial's record; of one that is over it is made once."""
        if trial.number not in self._over:
            record = self._record(trial)
            if not trial.state.is_finished():
                return record
            self._over[trial.number] = record
        return self._over[trial.number]

    def asked(self, number: int) -> dict[str, Any]:
        """What was noted of a trial; empty where a run was killed before."""
        return self.all_asked()[number]

    def all_asked(self) -> list[dict[str, Any]]:
        """What was noted of each trial."""
        return [dict(trial.user_attrs.get("asked", {})) for trial in self._trials()]

    def _record(self, trial: optuna.trial.FrozenTrial) -> TrialRecord:
        asked, attrs = trial.user_attrs.get("asked", {}), trial.user_attrs
        result = Result.from_dict(attrs["result"]) if "result" in attrs else None
        # A trial that waits, or that was killed while it began, may not have all of its parameters yet.
        begun = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        genes = asked.get("genes") or [int(begun.get(v.name, 0)) for v in self.space.variables]
        genes = self.space.canonical([int(gene) for gene in genes])
        kept, unfit = trial.state.name, bool(asked.get("unfit"))
        state = {"COMPLETE": "trained", "PRUNED": "pruned", "FAIL": "failed"}.get(kept, "running")
        reason = str(asked.get("reason", ""))
        if unfit:
            state = {"COMPLETE": "too slow", "FAIL": "failed"}.get(kept, "running")
        elif result is not None and result.failed:
            reason = result.failed
        elif result is not None and result.pruned:
            reason = f"given up after epoch {result.pruned}: behind the better half"
        return TrialRecord(
            number=trial.number,
            genes=genes,
            spec=NetSpec.from_dict(asked["spec"]) if "spec" in asked else self.space.spec_of(genes),
            state=state,
            speed=speed_from(asked.get("speed")),
            conditions=conditions_from(asked.get("conditions")),
            params=int(asked.get("params", 0)),
            macs=int(asked.get("macs", 0)),
            factor=float(asked.get("factor", 1.0)),
            seed=int(asked.get("seed", 0)),
            parent=None if result is not None and result.note else asked.get("parent"),
            result=result,
            reason=reason,
        )

    def _trials(self) -> Sequence[optuna.trial.FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _trial(self, number: int) -> optuna.trial.Trial:
        """Optuna's handle of a trial that is under way, of this run or of one before."""
        return self.optuna.trial.Trial(self.study, self._trials()[number]._trial_id)


def asked_values(
    *, genes: Genes, spec: NetSpec, counted: Counted, factor: float, ratio: float, seed: int, parent: int | None
) -> dict[str, object]:
    """What is noted of a trial."""
    return {
        "genes": list(genes),
        "spec": {**spec.to_dict(), "name": spec.name},
        "speed": counted.speed.to_dict(),
        "conditions": None if counted.conditions is None else counted.conditions.to_dict(),
        "params": counted.params,
        "macs": counted.macs,
        "factor": factor,
        "ratio": ratio,
        "seed": seed,
        "parent": parent,
    }


def too_large(*, genes: Genes, spec: NetSpec, reason: str) -> dict[str, object]:
    """What is noted of a trial whose network memory does not hold: it has no speed, so it keeps none."""
    named = {**spec.to_dict(), "name": spec.name}
    return {"genes": list(genes), "spec": named, "unfit": True, "ratio": _NO_SPEED, "reason": reason}


def _mend(path: Path) -> None:
    """Take away what a run that was killed left: the lock of the journal, and half a line at its end, which would spoil
    the next one. The folder's own lock says that nobody else is at work.
    """
    for lock in path.parent.glob(f"{path.name}.lock*"):
        lock.unlink(missing_ok=True)
    if not path.is_file():
        return
    with open(path, "rb+") as file:
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)
