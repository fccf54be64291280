"""When a trial is stopped early: the kill rule on bad steps and the loss stop. Pure Python.

`KillTest` is a sequential test with a guarantee: under a true rate of bad steps of at most r0 it
kills with probability at most delta, however often one looks. `LossStop` ends a trial whose loss
stays far above where it began. Both are explained in `stability_search/README.md`.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Self

from stability_search.settings.trial import KillRule

# Alternatives to r0, as shares of the way from r0 to 1: .15, .40 and .80 at r0 = .05. Fixed
# rates would lie below a larger r0 and then kill trials without a single bad step.
ALTERNATIVES: tuple[float, ...] = (2 / 19, 7 / 19, 15 / 19)

LOSS_STOP_FIRST_STEP = 51  # a large learning rate may climb first and settle later
LOSS_STOP_WINDOW = 10  # finite losses under the median
LOSS_STOP_PATIENCE = 20  # steps running; the earliest stop is therefore step 70

_LARGEST_LOG = 709.0  # exp of it is finite


def _log_add(first: float, second: float) -> float:
    """Return ln(exp(first) + exp(second)); -inf stands for ln 0."""
    high, low = max(first, second), min(first, second)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def _log_mean(logs: Sequence[float]) -> float:
    high = max(logs)
    if high == -math.inf:
        return high
    return high + math.log(sum(math.exp(log - high) for log in logs) / len(logs))


def _json_log(log: float) -> float | None:
    return None if log == -math.inf else log


def _from_json_log(log: float | None) -> float:
    return -math.inf if log is None else float(log)


class KillTest:
    """Decides after every judged step whether a trial's bad steps are still chance.

    An e-process: evidence E_t starts at 1 and mixes over three rates above r0 and over the step
    at which the trouble may have begun. As long as the rate of bad steps, given the past, stays
    at r0 or below, E_t rarely grows: the chance that it ever reaches 1/delta is at most delta,
    with dependent steps too. Three bad steps in a row at the start kill, on purpose.

    Args:
        rule: r0 and delta. Raise `bad_rate` to tolerate more, lower `false_kill` to be surer.
        num_planned_steps: Steps over which the test spreads its attention, >= 1. Later steps
            are still judged, but a trouble that begins there has no weight of its own: a longer
            run starts a fresh test every so many steps.

    Raises:
        ValueError: `num_planned_steps` is below 1.

    Source:
        Kill rule, stability_search/README.md; Ville's inequality for nonnegative
        supermartingales.

    Example:
        >>> test = KillTest(KillRule(), 200)
        >>> [test.update(is_bad=True) for _ in range(3)]
        [False, False, True]
        >>> round(test.evidence, 2)
        773.29
    """

    def __init__(self, rule: KillRule, num_planned_steps: int) -> None:
        """Start with evidence 1."""
        if num_planned_steps < 1:
            raise ValueError(
                f"num_planned_steps: value >= 1 must hold, but got {num_planned_steps}."
            )
        self.rule = rule
        self.num_planned_steps = num_planned_steps
        self.num_judged_steps = 0
        self.has_killed = False
        r0 = rule.bad_rate
        # (1 - r1) / (1 - r0) is exactly 1 - share, which stays right where r1 rounds to 1.
        self._log_factor_ok = tuple(math.log1p(-share) for share in ALTERNATIVES)
        self._log_factor_bad = tuple(
            math.log(r0 + (1 - r0) * share) - math.log(r0) for share in ALTERNATIVES
        )
        self._log_r = [-math.inf] * len(ALTERNATIVES)
        self._remaining = 1.0
        self._log_evidence = 0.0

    @property
    def evidence(self) -> float:
        """E_t after the last judged step: 1 at the start, a kill from 1/delta on; finite.

        After a kill it stays at the value that killed.
        """
        return math.exp(min(self._log_evidence, _LARGEST_LOG))

    @property
    def threshold(self) -> float:
        """1/delta, the evidence that kills."""
        return math.exp(min(-math.log(self.rule.false_kill), _LARGEST_LOG))

    def update(self, is_bad: bool) -> bool:
        """Judge one more step; only `ok` and `bad` steps may be handed in.

        Args:
            is_bad: True for a `bad` step, False for an `ok` one.

        Returns:
            True from the step on that killed the trial; what comes later changes nothing.
        """
        if self.has_killed:
            return True
        self.num_judged_steps += 1
        weight = self._weight(self.num_judged_steps)
        log_weight = math.log(weight) if weight > 0 else -math.inf
        factors = self._log_factor_bad if is_bad else self._log_factor_ok
        self._log_r = [
            _log_add(log_r, log_weight) + factor
            for log_r, factor in zip(self._log_r, factors, strict=True)
        ]
        self._remaining = max(0.0, self._remaining - weight)
        log_remaining = math.log(self._remaining) if self._remaining > 0 else -math.inf
        self._log_evidence = _log_add(_log_mean(self._log_r), log_remaining)
        self.has_killed = self._log_evidence >= -math.log(self.rule.false_kill)
        return self.has_killed

    def _weight(self, step: int) -> float:
        if self.num_planned_steps == 1:
            return 1.0 if step == 1 else 0.0
        if step == 1:
            return 0.5
        return 0.5 / (self.num_planned_steps - 1) if step <= self.num_planned_steps else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return everything the test knows, as a dict that `json.dumps` accepts."""
        return {
            "bad_rate": self.rule.bad_rate,
            "false_kill": self.rule.false_kill,
            "num_planned_steps": self.num_planned_steps,
            "num_judged_steps": self.num_judged_steps,
            "has_killed": self.has_killed,
            "log_r": [_json_log(log) for log in self._log_r],
            "remaining": self._remaining,
            "log_evidence": _json_log(self._log_evidence),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Build the test again from what `state_dict` returned; it goes on bit for bit.

        Raises:
            KeyError: A key is missing.
            ValueError: The state belongs to another version of the rule.
        """
        if len(state["log_r"]) != len(ALTERNATIVES):
            raise ValueError(
                f"log_r: {len(ALTERNATIVES)} values must be given, but got {state['log_r']!r}."
            )
        rule = KillRule(bad_rate=state["bad_rate"], false_kill=state["false_kill"])
        test = cls(rule, state["num_planned_steps"])
        test.num_judged_steps = state["num_judged_steps"]
        test.has_killed = state["has_killed"]
        test._log_r = [_from_json_log(log) for log in state["log_r"]]
        test._remaining = state["remaining"]
        test._log_evidence = _from_json_log(state["log_evidence"])
        return test


class LossStop:
    """Ends a trial whose loss stays far above its start: outcome `diverged`.

    It stops once the median of the last 10 finite losses has been at least `l0 + delta/2` at 20
    attempted steps running, of which the first may be step 51: at step 70 at the earliest. It
    never stops sooner, because a large learning rate may climb first and then settle.

    Args:
        l0: Largest finite of E_0, the trial's own first probe loss and the loss of its first
            step; finite. A training loss may hold terms that the probe lacks.
        delta: Yardstick of progress, finite and > 0; where no pilot ran, abs(l0).

    Raises:
        ValueError: `l0` is not finite, or `delta` is not finite and positive.

    Source:
        Companion stops, stability_search/README.md.
    """

    def __init__(self, l0: float, delta: float) -> None:
        """Start without a loss seen."""
        if not math.isfinite(l0):
            raise ValueError(f"l0: a finite number must be given, but got {l0!r}.")
        if not (math.isfinite(delta) and delta > 0):
            raise ValueError(f"delta: a finite number > 0 must be given, but got {delta!r}.")
        self.l0 = l0
        self.delta = delta
        self._losses: deque[float] = deque(maxlen=LOSS_STOP_WINDOW)
        self._num_steps_above = 0

    def update(self, step: int, loss: float | None) -> bool:
        """Hear of one attempted step, whatever its label; call it once a step, in order.

        Args:
            step: Attempted step, from 1.
            loss: Its training loss; None or NaN where it was not finite. Such a step leaves the
                last 10 finite losses as they are, and so counts as the step before it did.

        Returns:
            True if the trial is to end here as `diverged`.
        """
        if loss is not None and math.isfinite(loss):
            self._losses.append(loss)
        is_above = (
            step >= LOSS_STOP_FIRST_STEP
            and len(self._losses) == LOSS_STOP_WINDOW
            and median(self._losses) >= self.l0 + self.delta / 2
        )
        self._num_steps_above = self._num_steps_above + 1 if is_above else 0
        return self._num_steps_above >= LOSS_STOP_PATIENCE

    def state_dict(self) -> dict[str, Any]:
        """Return everything the stop knows, as a dict that `json.dumps` accepts."""
        return {
            "l0": self.l0,
            "delta": self.delta,
            "losses": list(self._losses),
            "num_steps_above": self._num_steps_above,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Build the stop again from what `state_dict` returned.

        Raises:
            KeyError: A key is missing.
        """
        stop = cls(state["l0"], state["delta"])
        stop._losses.extend(state["losses"])
        stop._num_steps_above = state["num_steps_above"]
        return stop
