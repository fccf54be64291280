"""What stops a study because it is no result: errors of the task, lost workers, sick nodes.

None of it trips on instability: where every trial diverges, the study is finished. Each breaker
costs the same at the first trial and at the ten thousandth.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import PurePath

from stability_search.errors import InfrastructureError, UsageError, UserCodeError
from stability_search.records.trial import Outcome, Stage, TrialRow
from stability_search.search.deaths import NODE_GONE
from stability_search.search.request import MAX_ATTEMPTS
from stability_search.settings.trial import SETTING_NAMES

EARLY_TRIALS = 5  # so many that fail in the same way are the user's code, not bad luck
MIN_LOST_ATTEMPTS = 5
MAX_LOST_SHARE = 0.2
MAX_LOST_IN_A_ROW = 3  # on one node
LOSS_HINT = (
    "If these trials share a setting, the task may crash Python with it; else look into the run's "
    "log: `stability-search doctor` checks the machine."
)
START_HINT = (
    "No trial had begun, so none of them is the cause: look into the run's log, and at the nodes "
    "by `ray status`; `stability-search doctor` checks a machine."
)
_NO_TRIAL = "before a trial began"
_NUM_NAMED = 5
_TASK_GONE_HINT = (
    "It could be built when the study began, and no trial was lost: put back what it needs (what "
    "its file imports lies beside that in the run directory, or must be importable from here), "
    "then resume."
)


def refuse_settings(row: TrialRow, *, is_first: bool = False) -> None:
    """Stop the study where the first trials show that it cannot be run at all.

    Args:
        row: A trial that ended; not in the ledger yet.
        is_first: True while no trial that this command started has shown that the task can be
            built: on another machine, or from another folder, it may not be any more.

    Raises:
        UsageError: The task cannot be built, or its model cannot honour a setting.
    """
    is_pilot = row.stage is Stage.PILOT
    if row.summary.error_type != UsageError.__name__ or not (is_pilot or is_first):
        return
    # The reason is one line of at most 500 characters; a folder may have twenty faults.
    whole = row.summary.error_text.rstrip().rpartition(f"{UsageError.__name__}: ")[2]
    message = whole or row.summary.reason.removeprefix("UsageError: ")
    if message.partition(":")[0] not in SETTING_NAMES:
        raise UsageError(message, hint="" if is_pilot else _TASK_GONE_HINT)
    if is_pilot:
        hint = "Where only some configurations can, give the setting a `when`."
        raise UsageError(message, hint=hint)


class Breakers:
    """Stops a study where what failed is not a configuration.

    Args:
        earlier: Trials that ended before a resume. Their errors count, since a task that still
            fails is the same task; their lost workers do not, since the machine may have been
            mended.
    """

    def __init__(self, earlier: Iterable[TrialRow] = ()) -> None:
        self._kind: tuple[str, str] | None = None
        self._num_alike = 0
        self._has_other_end = False
        self._num_attempts = 0
        self._lost: Counter[str] = Counter()  # attempts, by trial
        self._dead_nodes: set[str] = set()
        for row in earlier:
            self._note_error(row)

    def take(self, row: TrialRow) -> None:
        """Take in how an attempt ended.

        Args:
            row: The attempt; in the ledger already.

        Raises:
            UserCodeError: The first trials to end all failed in the same way.
            InfrastructureError: Too many attempts were lost.
        """
        self._note_error(row)
        if row.summary.outcome is Outcome.USER_ERROR:
            self._refuse_identical_errors(row)
        is_lost = row.summary.outcome is Outcome.INFRASTRUCTURE
        if not is_lost:
            self._dead_nodes.discard(row.node)
        elif row.summary.reason == NODE_GONE:
            if row.node in self._dead_nodes:
                return  # eight trials that were lost with one machine are one loss
            self._dead_nodes.add(row.node)
        self._num_attempts += 1
        if is_lost:
            self._lost[row.trial_id] += 1
            self._refuse_losses(row)

    def _note_error(self, row: TrialRow) -> None:
        summary = row.summary
        if summary.outcome is Outcome.USER_ERROR:
            # Resumed, the task is its copy in the run directory: the same line elsewhere.
            kind = (summary.error_type, PurePath(summary.error_place).name)
            self._kind = self._kind or kind
            self._has_other_end |= kind != self._kind
            self._num_alike += 1
        elif summary.outcome is not Outcome.INFRASTRUCTURE or row.attempt >= MAX_ATTEMPTS:
            self._has_other_end = True  # an attempt that will be made again ends no trial

    def _refuse_identical_errors(self, row: TrialRow) -> None:
        if self._has_other_end or self._num_alike < EARLY_TRIALS:
            return
        last = row.summary
        raise UserCodeError(
            f"the first {self._num_alike} trials all failed with {last.error_type} at "
            f"{last.error_place}.\n{last.error_text.rstrip()}",
            hint="\nMend the task; configurations have nothing to do with it.",
        )

    def _refuse_losses(self, row: TrialRow) -> None:
        lost, attempts = self._lost.total(), self._num_attempts
        if lost > max(MIN_LOST_ATTEMPTS, MAX_LOST_SHARE * attempts):
            raise InfrastructureError(
                f"{lost} of {attempts} attempts lost their worker ({named(self._lost)}; last: "
                f"{row.summary.reason}).",
                hint=LOSS_HINT,
            )


def named(lost: Mapping[str, int]) -> str:
    """Name trials with their lost attempts, those that lost most first.

    Args:
        lost: Attempts, by trial.

    Example:
        >>> named({"search-0002": 1, "search-0007": 3})
        'search-0007 3 times, search-0002 once'
    """
    most = Counter(lost).most_common(_NUM_NAMED)
    words = ["once" if count == 1 else f"{count} times" for _, count in most]
    parts = [f"{name} {word}" for (name, _), word in zip(most, words, strict=True)]
    return ", ".join(parts) + (", ..." if len(lost) > _NUM_NAMED else "")


class NodeWatch:
    """Says which node is sick: the last attempts there all lost their worker.

    They must be of two trials at least. A trial that kills its worker is tried again at once,
    often on the same node: three losses of one trial say as much about the trial as about the
    node, and on a machine alone they would end a study that has one bad configuration. Workers
    that were gone before a trial had begun are no trial's: three of them are enough.
    """

    def __init__(self) -> None:
        self._lost: dict[str, list[str]] = {}  # trials of the losses in a row, by node
        self._sick: set[str] = set()

    def take(self, node: str, trial_id: str, outcome: Outcome) -> bool:
        """Take in how an attempt ended on a node.

        Args:
            node: Where; empty where the worker died before anybody knew.
            trial_id: Whose attempt it was.
            outcome: How it ended. Any end but a lost worker shows that the node works.

        Returns:
            True if the node is sick, and was not before.
        """
        if not node or self.is_sick(node):
            return False
        if outcome is not Outcome.INFRASTRUCTURE:
            self._lost.pop(node, None)
            return False
        return self._note(node, trial_id)

    def take_lost_start(self, node: str) -> bool:
        """Take in that a worker on a node was gone before a trial had begun; return as `take`."""
        return bool(node) and not self.is_sick(node) and self._note(node, _NO_TRIAL)

    def take_start(self, node: str) -> None:
        """Take in that a worker has started on a node: those that had not are no row any more."""
        if node in self._lost and not self.is_sick(node):
            self._lost[node] = [name for name in self._lost[node] if name != _NO_TRIAL]

    def _note(self, node: str, name: str) -> bool:
        lost = self._lost.setdefault(node, [])
        lost.append(name)
        if len(lost) < MAX_LOST_IN_A_ROW or set(lost) == {name} != {_NO_TRIAL}:
            return False
        self._sick.add(node)
        return True

    def is_sick(self, node: str) -> bool:
        """Return True for a node that `take` or `take_lost_start` has called sick."""
        return node in self._sick

    def losses(self, node: str) -> Mapping[str, int]:
        """Return the attempts that a node lost in a row, by trial."""
        return Counter(self._lost.get(node, ()))


class StartWatch:
    """Stops a study whose workers do not live to begin a trial, wherever they are started.

    Such a worker costs its trial no attempt, so that without this a study might start workers
    for ever. `NodeWatch` comes first where it is known which nodes they were on.
    """

    def __init__(self) -> None:
        self._num_lost = 0

    def take_start(self) -> None:
        """Take in that a worker has started, or a trial has begun on one that had."""
        self._num_lost = 0

    def take_lost_start(self, reason: str, *, num_slots: int) -> None:
        """Take in that a worker was gone before a trial had begun.

        Args:
            reason: What became of it.
            num_slots: Trials at once: so many workers may be lost together, with their nodes.

        Raises:
            InfrastructureError: More than these, and more than five, were lost in a row.
        """
        self._num_lost += 1
        if self._num_lost > max(MIN_LOST_ATTEMPTS, num_slots):
            raise InfrastructureError(
                f"{self._num_lost} workers in a row were gone before a trial had begun (last: "
                f"{reason}).",
                hint=START_HINT,
            )
