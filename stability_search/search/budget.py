"""What a study may still spend: seconds and optimizer steps, all stages together."""

from collections.abc import Callable, Sequence

from stability_search.records import TrialRow
from stability_search.settings import StudySettings

Clock = Callable[[], float]


class Budget:
    """Counts seconds by the clock and steps by the rows.

    Args:
        study: Its `search.time_budget_s` and `search.step_budget` are used.
        num_slots: Trials at once; how long future trials take is estimated with it.
        clock: Seconds from a fixed start.
        rows: Trials of earlier runs of a resumed study; their time counts.
    """

    def __init__(
        self, study: StudySettings, *, num_slots: int, clock: Clock, rows: Sequence[TrialRow]
    ) -> None:
        self._study = study
        self._num_slots = num_slots
        self._clock = clock
        self._started = clock()
        self._spent_before_s = sum(row.summary.wall_s for row in rows) / num_slots

    def is_half_spent(self, rows: Sequence[TrialRow], *, num_planned_steps: int) -> bool:
        """Return True once the search must leave the rest to confirm.

        Args:
            rows: Every finished trial.
            num_planned_steps: Steps of the trials that are running.
        """
        search = self._study.search
        steps = num_planned_steps + _num_steps(rows)
        if search.step_budget is not None and steps * 2 >= search.step_budget:
            return True
        return search.time_budget_s is not None and self._spent_s() * 2 >= search.time_budget_s

    def can_afford(self, num_trials: int, rows: Sequence[TrialRow]) -> bool:
        """Say whether so many more confirm trials fit, those that are running among them."""
        search = self._study.search
        spent, wanted = _num_steps(rows), num_trials * self._study.confirm.steps
        if search.step_budget is not None and spent + wanted > search.step_budget:
            return False
        if search.time_budget_s is None:
            return True
        per_step_s = sum(row.summary.wall_s for row in rows) / spent if spent else 0.0
        return self._spent_s() + wanted * per_step_s / self._num_slots <= search.time_budget_s

    def _spent_s(self) -> float:
        return self._spent_before_s + self._clock() - self._started


def _num_steps(rows: Sequence[TrialRow]) -> int:
    return sum(row.summary.num_steps for row in rows)
