"""Shares with their intervals: of trials, and of trials that are left at a step."""

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import betaincinv

_LEVEL = 0.95  # of every two-sided interval of the page
_Z = 1.959963984540054  # its normal quantile


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """An estimated share and its 95 % interval, all in [0, 1].

    Attributes:
        value: The estimate.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Survival:
    """The share of trials that nothing has happened to, as a falling staircase.

    Attributes:
        num_trials: Trials it is estimated from.
        num_events: Trials that something happened to.
        steps: Steps at which something happened, rising.
        shares: Share left after each of them.
        num_at_risk: Trials under observation just before each of them.
        ends: Step at which each trial left, whatever the reason, rising.
    """

    num_trials: int
    num_events: int
    steps: tuple[int, ...]
    shares: tuple[Share, ...]
    num_at_risk: tuple[int, ...]
    ends: tuple[int, ...]

    def at(self, step: int) -> Share:
        """Return the share left after a step."""
        before = [share for at, share in zip(self.steps, self.shares, strict=True) if at <= step]
        return before[-1] if before else clopper_pearson(self.num_trials, self.num_trials)

    def at_risk(self, step: int) -> int:
        """Return how many trials were still under observation after a step."""
        return len(self.ends) - bisect_right(self.ends, step)


def clopper_pearson(num_hits: float, num_trials: int) -> Share:
    """Return a share with its exact 95 % interval; without a trial, anything is possible.

    Args:
        num_hits: In [0, num_trials]; part of a hit counts in part.
        num_trials: >= 0.

    Source:
        Clopper and Pearson, The use of confidence or fiducial limits, 1934.

    Example:
        >>> round(clopper_pearson(0, 10).high, 3)
        0.308
    """
    if num_trials == 0:
        return Share(value=0.5, low=0.0, high=1.0)
    tail, rest = (1 - _LEVEL) / 2, num_trials - num_hits
    return Share(
        value=num_hits / num_trials,
        low=float(betaincinv(num_hits, rest + 1, tail)) if num_hits else 0.0,
        high=float(betaincinv(num_hits + 1, rest, 1 - tail)) if rest else 1.0,
    )


def kaplan_meier(ends: Sequence[int], has_event: Sequence[bool]) -> Survival:
    """Estimate the share of trials that nothing has happened to, step by step.

    Args:
        ends: Step at which the event happened, or at which the trial was last seen without it.
        has_event: True where it happened; else the trial is censored.

    Returns:
        The estimate with pointwise log-log intervals; where nothing or everything has happened,
        which these cannot judge, the exact interval of the trials then under observation.

    Source:
        Kaplan and Meier, Nonparametric estimation from incomplete observations, 1958; Greenwood,
        The natural duration of cancer, 1926.

    Example:
        >>> survival = kaplan_meier([1, 2, 3, 4], [True, False, True, False])
        >>> [share.value for share in survival.shares]
        [0.75, 0.375]
    """
    ordered = sorted(ends)
    events = Counter(end for end, is_event in zip(ends, has_event, strict=True) if is_event)
    share, variance = 1.0, 0.0
    steps, shares, at_risk = [], [], []
    for step, num_events in sorted(events.items()):
        num_left = len(ordered) - bisect_left(ordered, step)
        share *= 1 - num_events / num_left
        if num_left > num_events:
            variance += num_events / (num_left * (num_left - num_events))
        steps.append(step)
        shares.append(_interval(share, variance, num_left))
        at_risk.append(num_left)
    return Survival(
        num_trials=len(ordered),
        num_events=events.total(),
        steps=tuple(steps),
        shares=tuple(shares),
        num_at_risk=tuple(at_risk),
        ends=tuple(ordered),
    )


def _interval(share: float, variance: float, num_left: int) -> Share:
    """Return the log-log interval of a survival estimate."""
    if share <= 0:
        return Share(value=0.0, low=0.0, high=clopper_pearson(0, num_left).high)
    if share >= 1:
        return Share(value=1.0, low=clopper_pearson(num_left, num_left).low, high=1.0)
    width = _Z * math.sqrt(variance) / -math.log(share)
    return Share(value=share, low=share ** math.exp(width), high=share ** math.exp(-width))
