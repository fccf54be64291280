"""What a study may still spend: seconds and optimizer steps, all stages together."""

from collections.abc import Callable

from stability_search.search.history import History
from stability_search.settings.study import StudySettings

Clock = Callable[[], float]


class Budget:
    """Counts seconds by the clock and steps by the finished trials.

    Args:
        study: Its `search.time_budget_s` and `search.step_budget` are used.
        clock: Seconds from a fixed start.
        history: Finished trials. The time during which those of earlier runs ran counts.
    """

    def __init__(self, study: StudySettings, *, clock: Clock, history: History) -> None:
        self._study = study
        self._clock = clock
        self._started = clock()
        self._history = history
        is_timed = study.search.time_budget_s is not None
        self._spent_before_s = history.busy_s() if is_timed else 0.0

    def is_half_spent(self, *, num_planned_steps: int) -> bool:
        """Return True once the search must leave the rest to confirm.

        Args:
            num_planned_steps: Steps of the trials that are running.
        """
        search = self._study.search
        steps = num_planned_steps + self._history.num_steps
        if search.step_budget is not None and steps * 2 >= search.step_budget:
            return True
        return search.time_budget_s is not None and self._spent_s() * 2 >= search.time_budget_s

    def can_afford(self, num_trials: int) -> bool:
        """Say whether so many more confirm trials fit, those that are running among them."""
        search = self._study.search
        spent, wanted = self._history.num_steps, num_trials * self._study.confirm.steps
        if search.step_budget is not None and spent + wanted > search.step_budget:
            return False
        if search.time_budget_s is None:
            return True
        # As many at once as there were so far: a cluster may have grown meanwhile, or shrunk.
        per_step_s = self._spent_s() / spent if spent else 0.0
        return self._spent_s() + wanted * per_step_s <= search.time_budget_s

    def _spent_s(self) -> float:
        return self._spent_before_s + self._clock() - self._started
