"""The finished trials of a study, and what is asked of them again and again.

Every answer depends on the set of rows alone and costs the same at the first trial and at the
ten thousandth.
"""

from collections import Counter
from collections.abc import Collection, Iterable

from stability_search.records.trial import Outcome, Stage, TrialRow
from stability_search.search.request import MAX_ATTEMPTS
from stability_search.spending import busy_seconds, ended_trial


class History:
    """Finished trials in the order of finishing.

    Args:
        rows: Those of earlier runs.

    Attributes:
        rows: Every finished attempt. Read it; only `add` and `replace_last` change it.
        num_steps: Steps that all of them executed.
    """

    def __init__(self, rows: Iterable[TrialRow] = ()) -> None:
        """Take in the rows of earlier runs."""
        self.rows: list[TrialRow] = []
        self.num_steps = 0
        self._last: dict[str, TrialRow] = {}
        self._count: Counter[Stage] = Counter()
        self._next_index: Counter[Stage] = Counter()
        self._to_repeat: set[int] = set()
        self._beyond: set[int] = set()  # indices of search trials above the first free one
        self._first_free = 0
        for row in rows:
            self.add(row)

    def add(self, row: TrialRow) -> None:
        """Take in one more finished attempt."""
        self.rows.append(row)
        if row.attempt >= self.num_attempts(row.trial_id):
            self._last[row.trial_id] = row
        self._count[row.stage] += 1
        self._next_index[row.stage] = max(self._next_index[row.stage], row.index + 1)
        self.num_steps += row.summary.num_executed_steps
        if row.stage is Stage.SEARCH:
            self._note_index(row)

    def replace_last(self, row: TrialRow) -> None:
        """Put another row of the same attempt in place of the last, once more is known of it."""
        self.rows[-1] = self._last[row.trial_id] = row

    def busy_s(self) -> float:
        """Return for how many seconds any trial ran; one of unknown start ran alone."""
        return busy_seconds(map(ended_trial, self.rows))

    def num_of(self, stage: Stage) -> int:
        """Return how many attempts of a stage have finished."""
        return self._count[stage]

    def next_index(self, stage: Stage) -> int:
        """Return the index after the highest of a stage."""
        return self._next_index[stage]

    def num_attempts(self, trial_id: str) -> int:
        """Return the number of the last attempt of a trial; 0 if none has finished."""
        row = self._last.get(trial_id)
        return 0 if row is None else row.attempt

    def last(self, trial_id: str) -> TrialRow | None:
        """Return the last attempt of a trial."""
        return self._last.get(trial_id)

    def final(self, trial_id: str) -> TrialRow | None:
        """Return the attempt of a trial that will not be repeated."""
        row = self._last.get(trial_id)
        return None if row is None or must_repeat(row) else row

    def search_index_to_repeat(self, in_flight: Collection[int]) -> int | None:
        """Return the lowest index of a search trial to attempt again, those in flight aside."""
        return min(self._to_repeat.difference(in_flight), default=None)

    def free_search_index(self, in_flight: Collection[int]) -> int:
        """Return the lowest index that no search trial has, finished or in flight."""
        index = self._first_free
        while index in self._beyond or index in in_flight:
            index += 1
        return index

    def _note_index(self, row: TrialRow) -> None:
        if self.final(row.trial_id) is None:
            self._to_repeat.add(row.index)
        else:
            self._to_repeat.discard(row.index)
        if row.index >= self._first_free:
            self._beyond.add(row.index)
        while self._first_free in self._beyond:
            self._beyond.discard(self._first_free)
            self._first_free += 1


def must_repeat(row: TrialRow) -> bool:
    """Return True if another attempt follows: the worker was lost, and not too often."""
    return row.summary.outcome is Outcome.INFRASTRUCTURE and row.attempt < MAX_ATTEMPTS
