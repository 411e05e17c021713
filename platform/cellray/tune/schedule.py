"""Ray Tune's schedulers and searchers over the ledger of a sweep."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining
from ray.tune.search import Searcher

from cellray.tune.inside import trial_number
from cellray.tune.ledger import ENDED, Ledger, trial_name
from cellray.tune.propose import Seen, propose
from cellray.tune.space import Axis, Choice, Space

if TYPE_CHECKING:
    from cellray.runs import TuneRun

__all__ = ["Proposals", "scheduler_of"]

_NO_END = 10**9  # rungs beyond the last report are never reached
_TIME = "report"


class _Asha(ASHAScheduler):  # type: ignore[misc]
    """ASHA (Li et al. 2020, arXiv:1810.05934) that knows what trials reported before a restart.

    A trial is never stopped at its last report, where nothing is left to save, and always at a
    metric that is no number.
    """

    def __init__(self, run: TuneRun, ledger: Ledger, every: int) -> None:
        super().__init__(
            time_attr=_TIME,
            max_t=_NO_END,
            grace_period=run.grace_reports,
            reduction_factor=run.reduction_factor,
        )
        self._ledger, self._every, self._name = ledger, every, run.metric
        self._replayed = False

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Take a trial in, with the reports it and the ended ones have made."""
        if not self._replayed:
            self._replayed = True
            for number in self._ledger.known():
                if self._ledger.state(number) in ENDED:
                    ended = SimpleNamespace(trial_id=trial_name(number))
                    super().on_trial_add(tune_controller, ended)
                    self._replay(tune_controller, ended, number)
        super().on_trial_add(tune_controller, trial)
        self._replay(tune_controller, trial, trial_number(trial.custom_trial_name))

    def _replay(self, tune_controller: Any, trial: Any, number: int) -> None:
        for row in self._ledger.reports(number, self._every):
            told = {_TIME: math.ceil(row.step / self._every), self._name: row.metrics[self._name]}
            if math.isfinite(told[self._name]):
                super().on_trial_result(tune_controller, trial, told)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Continue or stop."""
        if not math.isfinite(result.get(self._name, 0.0)):
            decision = self.STOP
        else:
            decision = super().on_trial_result(tune_controller, trial, result)
        if result.get("last") and decision == self.STOP:
            return str(self.CONTINUE)
        if decision == self.STOP:
            self._ledger.stop(trial_number(trial.custom_trial_name), int(result["step"]))
        return str(decision)


class _Pbt(PopulationBasedTraining):  # type: ignore[misc]
    """Population based training (Jaderberg et al. 2017, arXiv:1711.09846); all train at a time."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Continue, or take over another trial's weights."""
        if result.get("last"):  # it will not train again
            return str(self.CONTINUE)
        decision = super().on_trial_result(tune_controller, trial, result)
        return str(self.CONTINUE if decision == self.PAUSE else decision)


def _mutation(axis: Axis) -> list[Any] | Callable[[], Any]:
    if isinstance(axis, Choice):
        return list(axis.values)
    return lambda: axis.at(random.random())


def _within(space: Space) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Puts values that were multiplied back between their bounds."""

    def explore(config: dict[str, Any]) -> dict[str, Any]:
        for key, axis in space.items():
            config["point"][key] = axis.nearest(config["point"][key])
        return config

    return explore


def scheduler_of(run: TuneRun, space: Space, ledger: Ledger, every: int) -> Any:
    """The scheduler a sweep names.

    Args:
        run: the sweep.
        space: what it searches.
        ledger: of its trials.
        every: ``train.eval_every_steps``, the steps between two reports.
    """
    if run.scheduler == "none":
        return FIFOScheduler()
    if run.scheduler == "asha":
        return _Asha(run, ledger, every)
    return _Pbt(
        time_attr=_TIME,
        perturbation_interval=run.exploit_reports,
        quantile_fraction=run.exploit_fraction,
        hyperparam_mutations={"point": {key: _mutation(axis) for key, axis in space.items()}},
        custom_explore_fn=_within(space),
        log_config=False,
    )


class Proposals(Searcher):  # type: ignore[misc]
    """Optuna's proposals, one a trial, from what the trials before have reported.

    Args:
        run: the sweep.
        space: what it searches.
        ledger: of its trials.
        pending: numbers to propose for, in this order; those that are known keep their values.
        every: steps between two reports.
    """

    def __init__(
        self, run: TuneRun, space: Space, ledger: Ledger, pending: Sequence[int], every: int
    ) -> None:
        super().__init__(metric=run.metric, mode=run.mode)
        self._run, self._space, self._ledger = run, space, ledger
        self._pending, self._every = list(pending), every

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The next trial's values; noted before it starts."""
        if not self._pending:
            return None
        trial = self._pending.pop(0)
        point = self._ledger.point(trial) or propose(
            self._space, trial, self._seen(trial), seed=self._run.seed, mode=self._run.mode
        )
        self._ledger.note(trial, point=point)
        return {"point": {"trial": trial, **point}}

    def _seen(self, before: int) -> list[Seen]:
        seen = []
        for trial in self._ledger.known():
            if trial < before and self._ledger.point(trial):
                value = self._ledger.value(
                    trial, self._run.metric, self._run.mode, every=self._every, last=False
                )
                ended = self._ledger.state(trial) in (*ENDED, "failed")
                seen.append(
                    Seen(self._ledger.point(trial), None if math.isnan(value) else value, ended)
                )
        return seen

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing to do: the ledger has it."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the ledger has it."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: the ledger has it."""
