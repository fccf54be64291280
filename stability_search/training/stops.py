"""When a long training is stopped: the kill rule, afresh every T steps, and the loss stop."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from stability_search.pruning import KillTest, LossStop
from stability_search.records.step import StepLabel as Label
from stability_search.records.step import StepRecord
from stability_search.records.trial import Outcome
from stability_search.records.values import finite_or_none
from stability_search.settings.trial import KillRule


def false_kill_of(test: int, rule: KillRule) -> float:
    """Return the share of `false_kill` that the n-th test of a training may spend.

    Test n of a run gets delta/(n*(n+1)); together, however long the run is, they spend delta.

    Args:
        test: Its number, from 1.
        rule: Its `false_kill` is delta.

    Example:
        >>> [false_kill_of(n, KillRule(false_kill=0.06)) for n in (1, 2, 3)]
        [0.03, 0.01, 0.005]
    """
    return rule.false_kill / (test * (test + 1))


class Stops:
    """Judge every step of a long training; see `pruning` for the two rules.

    Args:
        rule: r0, and delta for the whole training.
        horizon: T, the judged steps after which a fresh test begins, >= 1: the kill rule has no
            weight left for a trouble that begins later.
        start_probe: Mean probe loss of the untrained model; None where not finite.
    """

    def __init__(self, rule: KillRule, horizon: int, *, start_probe: float | None) -> None:
        self._rule = rule
        self._horizon = horizon
        self._start_probe = start_probe
        self._number = 0
        self._test = self._fresh_test()
        self._loss_stop: LossStop | None = None

    def _fresh_test(self) -> KillTest:
        self._number += 1
        spent = replace(self._rule, false_kill=false_kill_of(self._number, self._rule))
        return KillTest(spent, self._horizon)

    @property
    def evidence(self) -> float:
        """E_t of the present test."""
        return self._test.evidence

    @property
    def num_tests(self) -> int:
        """Tests begun so far."""
        return self._number

    def see(self, record: StepRecord) -> tuple[Outcome, str] | None:
        """Judge one step, in order.

        Returns:
            Why the training must stop here; None where it may go on.
        """
        if self._test.num_judged_steps >= self._horizon:
            self._test = self._fresh_test()
        if record.label.is_judged and self._test.update(is_bad=record.label is Label.BAD):
            evidence = f"evidence {self._test.evidence:.4g} >= {self._test.threshold:.4g}"
            return Outcome.PRUNED, f"too many bad steps (NaN or Inf): {evidence}"
        if self._has_diverged(record):
            return Outcome.DIVERGED, "the loss stays far above where it began"
        return None

    def _has_diverged(self, record: StepRecord) -> bool:
        if self._loss_stop is None:
            known = (self._start_probe, finite_or_none(record.loss))
            finite = [value for value in known if value is not None]
            if not finite or max(finite) == 0:  # no yardstick: nothing is far above 0
                return False
            l0 = max(finite)
            self._loss_stop = LossStop(l0, abs(l0))
        return self._loss_stop.update(record.step, record.loss)

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for `load_state_dict`."""
        stop = self._loss_stop
        return {
            "number": self._number,
            "test": self._test.state_dict(),
            "loss_stop": None if stop is None else stop.state_dict(),
            "start_probe": self._start_probe,
        }

    def load_state_dict(
        self, state: Mapping[str, Any], *, with_fresh_test: bool, num_tests: int = 0
    ) -> None:
        """Go on from what `state_dict` returned.

        Args:
            state: It.
            with_fresh_test: True where settings changed: what was counted under the old ones
                says nothing about the new ones.
            num_tests: Tests that the whole training has begun, >= 0. A fresh one comes behind
                them: those of a stretch given up have spent their share, too.
        """
        self._number = max(state["number"], num_tests) if with_fresh_test else state["number"]
        self._start_probe = state["start_probe"]
        stop = state["loss_stop"]
        self._loss_stop = None if stop is None else LossStop.from_state(stop)
        self._test = self._fresh_test() if with_fresh_test else KillTest.from_state(state["test"])
