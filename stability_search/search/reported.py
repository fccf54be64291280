"""The yardsticks that a report made at this moment would measure by, kept while trials come in.

What is told while a study runs must be what its report says: a trial of confirm may be the first
of its horizon that learns, and the pilot alone then knows no progress to measure it by. What the
sampler hears and what confirm decides with are fitted elsewhere, to fewer trials.
"""

from collections.abc import Iterable

from stability_search.records.trial import Stage, TrialRow
from stability_search.settings.study import StudySettings
from stability_search.yardstick import GrowingYardstick, Yardstick, refused


class ReportedYardsticks:
    """Both horizons' constants, at a cost that does not grow with the number of trials.

    After any rows, in any order, they equal `table.study_yardsticks` of them.

    Args:
        study: The study's blocks; gives the two horizons.
        rows: Trials that finished before.
    """

    def __init__(self, study: StudySettings, rows: Iterable[TrialRow] = ()) -> None:
        self._study = study
        horizons = {study.trial_steps, study.confirm.steps}
        self._growing = {horizon: GrowingYardstick(horizon) for horizon in horizons}
        for row in rows:
            self.add(row)

    def add(self, row: TrialRow) -> None:
        """Take in one more row of any stage."""
        for growing in self._growing.values():
            growing.add(row)

    def of_stage(self, stage: Stage) -> Yardstick:
        """Return what trials of a stage are measured by, as of now.

        Without signal it has no Delta, so that every q is 0.
        """
        is_confirm = stage is Stage.CONFIRM
        horizon = self._study.confirm.steps if is_confirm else self._study.trial_steps
        found = self._growing[horizon].now
        return found if found.has_signal else refused(found)
