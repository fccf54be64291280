"""Lasting jumps of a training loss."""

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from statistics import median

from stability_search.scoring.constants import S_V1, ScoreConstants

MAD_TO_SIGMA = 1.4826  # of a normal distribution
_LARGEST_LOG = 709.0  # exp of it is finite


class _SpikeWindow:
    """The last finite losses before a step, and the test of a loss against them."""

    def __init__(self, delta: float, constants: ScoreConstants) -> None:
        self._delta = delta
        self._constants = constants
        # An exact tie is decided by rounding; the slack makes a loss at z = 6 exceed.
        self._z = constants.spike_z - 1e-9
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._recent)

    def push(self, loss: float) -> None:
        self._recent.append(loss)
        insort(self._sorted, loss)
        if len(self._recent) > self._constants.spike_window:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]

    def restart(self, losses: Sequence[float]) -> None:
        self._recent.clear()
        self._sorted.clear()
        for loss in losses:
            self.push(loss)

    def exceeds(self, loss: float | None) -> bool:
        """Say whether a loss stands out; a non-finite one (None) does."""
        if loss is None:
            return True
        size = len(self._sorted)
        low, high = self._sorted[(size - 1) // 2], self._sorted[size // 2]
        jump = self._constants.spike_jump_frac * self._delta
        if loss <= 0 or self._sorted[0] <= 0:  # no logarithm: judged on the scale of Delta
            middle = low / 2 + high / 2
            if loss - middle < jump:
                return False
            spread = MAD_TO_SIGMA * median(abs(v - middle) for v in self._sorted)
            floor = self._constants.spike_floor * self._delta
            return loss - middle >= self._z * max(spread, floor)
        middle = (math.log(low) + math.log(high)) / 2
        if loss - math.exp(min(middle, _LARGEST_LOG)) < jump:
            return False  # the usual case, decided without the cost of the spread
        spread = MAD_TO_SIGMA * median(abs(math.log(v) - middle) for v in self._sorted)
        return math.log(loss) - middle >= self._z * max(spread, self._constants.spike_floor)


def count_spikes(
    losses: Sequence[float | None], delta: float | None, *, constants: ScoreConstants = S_V1
) -> int:
    """Count the steps at which the training loss jumped and stayed up.

    A step exceeds if its loss stands out from the last 32 finite losses before it, in the
    logarithm and by a tenth of Delta. It counts if at least 2 of the 3 steps from it on exceed,
    so that a single hard batch does not, and an excursion of L steps counts min(L - 1, 3): what
    exceeds stays out of the window, and three in a row become the new level.

    Args:
        losses: Training loss of the `ok` and `bad` steps in order; None or NaN where non-finite.
        delta: Delta, the yardstick of progress; without one that is finite and > 0 no step
            exceeds.
        constants: Constants of the score.

    Returns:
        n_spike, 0 <= n_spike <= len(losses).

    Example:
        >>> count_spikes([1.0] * 20 + [3.0, 3.0, 3.0, 3.0] + [1.0] * 5, 1.0)
        3
    """
    if delta is None or not math.isfinite(delta) or delta <= 0:
        return 0
    values = [v if v is not None and math.isfinite(v) else None for v in losses]
    window = _SpikeWindow(delta, constants)
    count = 0
    run: list[float] = []
    for position, loss in enumerate(values):
        if loss is None:  # never a spike itself; breaks a run
            run.clear()
        elif len(window) < constants.spike_min_losses:
            window.push(loss)
        elif window.exceeds(loss):
            following = values[position + 1 : position + constants.spike_run]
            count += 1 + sum(map(window.exceeds, following)) >= constants.spike_lasting
            run.append(loss)
            if len(run) == constants.spike_run:
                window.restart(run)
                run.clear()
        else:
            run.clear()
            window.push(loss)
    return count
