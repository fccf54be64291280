"""What can be said of a run by looking at its directory, while it goes on or after it has ended.

Nothing is written and the writer's lock is never held: it is only asked for, shared and without
waiting, and given back at once. The ledger is opened as any reader of SQLite may, between two
commits of the driver. No trial that runs is known here: only finished ones are on the disk.
"""

import fcntl
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import partial
from pathlib import Path

from stability_search import space as spaces
from stability_search.errors import UsageError
from stability_search.records.trial import Outcome, Stage, TrialRow
from stability_search.records.values import Json
from stability_search.records.verdict import Verdict, VerdictKind
from stability_search.search import run_directory
from stability_search.search.closing import known_verdict
from stability_search.search.confirm import describe_cost
from stability_search.search.history import must_repeat
from stability_search.search.ledger import DamagedLedgerError, Ledger
from stability_search.search.reported import ReportedYardsticks
from stability_search.search.run_directory import RunDirectory
from stability_search.space import Space
from stability_search.standing import score_trial
from stability_search.yardstick import Yardstick

SCHEMA = "stability-search/status/1"
_PATIENCE_S = 2.0  # a commit takes 10 ms; a driver that hangs in one is news in itself


class RunState(StrEnum):
    """What goes on in a run directory."""

    RUNNING = "running"  # a process holds its lock
    FINISHED = "finished"  # there is a verdict, good or bad
    INTERRUPTED = "interrupted"  # nobody works on it, and it is not done
    DAMAGED = "damaged"  # its ledger cannot be believed


@dataclass(frozen=True, kw_only=True, slots=True)
class StageStatus:
    """How far one stage is.

    Attributes:
        stage: `pilot`, `search` or `confirm`.
        num_finished: Trials that will not be attempted again.
        num_planned: Trials to come to; of confirm the most there can be.
    """

    stage: Stage
    num_finished: int
    num_planned: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BestSoFar:
    """The configuration that leads, by the latest stage that has any run score.

    Attributes:
        config_id: Its name.
        stage: Where its trials ran.
        q: Their mean run score, in [0, 1].
        num_seeds: How many they are.
        settings: The settings that vary; all where none does.
    """

    config_id: str
    stage: Stage
    q: float
    num_seeds: int
    settings: Mapping[str, Json]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """What is known of a run at one moment.

    Attributes:
        run_directory: Its path, as given.
        state: What goes on there.
        problem: What is wrong, or why not all is known; empty where nothing is.
        stage: Stage of the next trial, or of the last one of a finished run.
        stages: How far each stage is; empty where the ledger could not be read.
        outcomes: Attempts by outcome, those of earlier attempts included.
        best: The choice of a finished run, or what came closest; before, the best so far. None
            before a search or confirm trial has a run score.
        started_at: When the first trial started, UTC, ISO 8601; None before the first has ended.
        last_finished_at: When the last finished trial ended; None likewise.
        last_finished_age_s: Seconds since then.
        last_word_at: When a file of the run last changed: ledger, steps or log.
        last_word_age_s: Seconds since then.
        verdict: How it ended or was stopped; None if it runs or was killed.
        disk_bytes: Bytes of all its files.
    """

    run_directory: str
    state: RunState
    problem: str = ""
    stage: Stage | None = None
    stages: tuple[StageStatus, ...] = ()
    outcomes: Mapping[str, int]
    best: BestSoFar | None = None
    started_at: str | None = None
    last_finished_at: str | None = None
    last_finished_age_s: float | None = None
    last_word_at: str
    last_word_age_s: float
    verdict: Verdict | None = None
    disk_bytes: int

    def to_json(self) -> dict[str, Json]:
        """Return it as a dict that `json.dumps(..., allow_nan=False)` accepts."""
        return {"schema": SCHEMA, **asdict(self)}


def read_status(path: Path, *, now: datetime) -> RunStatus:
    """Say how a run is doing; it may be running.

    Args:
        path: The run directory.
        now: The time, in UTC; ages are counted from it.

    Raises:
        UsageError: There is no run directory, or its space file or ledger cannot be read.
    """
    directory = run_directory.open_run(path)
    if not (directory.ledger.exists() or directory.environment.exists()):
        raise UsageError(  # a long training has a space.yaml, too
            f"{path}: no run directory of a study: it must hold {directory.ledger.name}.",
            hint="Give the directory that `run` printed; a training tells in its train.log.",
        )
    is_locked = _is_locked(path)
    word, num_bytes = _traces(directory)
    seen = partial(
        RunStatus,
        run_directory=str(path),
        last_word_at=_iso(word),
        last_word_age_s=_age_s(word, now),
        disk_bytes=num_bytes,
    )
    try:
        ledger = Ledger(directory.ledger, patience_s=_PATIENCE_S)
    except DamagedLedgerError as error:
        is_starting = is_locked and not directory.ledger.exists()
        state = RunState.RUNNING if is_starting else RunState.DAMAGED
        problem = "It is starting: there is no ledger yet." if is_starting else str(error)
        return seen(state=state, problem=problem, outcomes={})
    except UsageError as error:
        if not is_locked:
            raise
        return seen(state=RunState.RUNNING, problem=error.message, outcomes={})
    space = spaces.load(directory.space, folder=Path(str(ledger.facts()["original_folder"])))
    verdict = known_verdict(ledger)
    has_ended = verdict is not None and verdict.kind is not VerdictKind.INCOMPLETE
    idle = RunState.FINISHED if has_ended else RunState.INTERRUPTED
    state = RunState.RUNNING if is_locked and not has_ended else idle
    rows = ledger.rows()
    stages = _stages(space, rows)
    ended = max((_ended_at(row) for row in rows if row.started_at), default=None)
    return seen(
        state=state,
        stage=_stage(stages, rows, has_ended=has_ended),
        stages=stages,
        outcomes=dict(Counter(row.summary.outcome.value for row in rows).most_common()),
        best=_best(space, rows, verdict),
        started_at=min((row.started_at for row in rows if row.started_at), default=None),
        last_finished_at=None if ended is None else _iso(ended),
        last_finished_age_s=None if ended is None else _age_s(ended, now),
        verdict=None if state is RunState.RUNNING else verdict,
    )


def _is_locked(path: Path) -> bool:
    """Say whether a process holds the writer's lock, which is exclusive."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}.") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _traces(directory: RunDirectory) -> tuple[datetime, int]:
    """Return when the run last wrote what only a running one writes, and the bytes it takes."""
    telling = {directory.ledger, directory.log, directory.space}
    newest, num_bytes = 0.0, 0
    for folder, _, names in os.walk(directory.path):
        for name in names:
            file = Path(folder) / name
            try:
                entry = file.lstat()
            except OSError:  # written, renamed or removed this very moment
                continue
            num_bytes += entry.st_size
            if file in telling or file.parent == directory.steps:
                newest = max(newest, entry.st_mtime)
    return datetime.fromtimestamp(newest, UTC), num_bytes


def _stages(space: Space, rows: Sequence[TrialRow]) -> tuple[StageStatus, ...]:
    final = {row.trial_id: row.stage for row in rows if not must_repeat(row)}
    done = Counter(final.values())
    planned = {Stage.PILOT: len(space.pilot_learning_rates())}
    if space.has_space:
        planned[Stage.SEARCH] = space.study.search.trials
    planned[Stage.CONFIRM] = describe_cost(space).max_trials
    return tuple(
        StageStatus(stage=stage, num_finished=done[stage], num_planned=max(count, done[stage]))
        for stage, count in planned.items()
    )


def _stage(stages: Sequence[StageStatus], rows: Sequence[TrialRow], *, has_ended: bool) -> Stage:
    """Return the stage of the last trial; the next one where all of its trials have finished."""
    if not rows:
        return Stage.PILOT
    reached = {row.stage for row in rows}
    index = max(number for number, one in enumerate(stages) if one.stage in reached)
    last = stages[index]
    is_full = last.stage is not Stage.CONFIRM and last.num_finished == last.num_planned
    if has_ended or not is_full:
        return last.stage
    return stages[index + 1].stage


def _best(space: Space, rows: Sequence[TrialRow], verdict: Verdict | None) -> BestSoFar | None:
    named = None if verdict is None else verdict.choice or verdict.closest
    yardsticks = ReportedYardsticks(space.study, rows)
    for stage in (Stage.CONFIRM, Stage.SEARCH):
        scores = _scores(rows, stage, yardsticks.of_stage(stage))
        if not scores:
            continue
        leader = named if named in scores else max(scores, key=lambda id_: _rank(scores[id_]))
        settings = next(row.settings for row in rows if row.config_id == leader)
        names = space.varying or tuple(settings)
        return BestSoFar(
            config_id=leader,
            stage=stage,
            q=sum(scores[leader]) / len(scores[leader]),
            num_seeds=len(scores[leader]),
            settings={name: settings[name] for name in names},
        )
    return None


def _scores(rows: Sequence[TrialRow], stage: Stage, measure: Yardstick) -> dict[str, list[float]]:
    """Return the run scores of every configuration that has any in a stage."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        q = _q(row, measure) if row.stage is stage else None
        if q is not None:
            scores.setdefault(row.config_id, []).append(q)
    return scores


def _q(row: TrialRow, measure: Yardstick) -> float | None:
    """Return a run score; what the sampler was told of a trial is it, unless E* has moved."""
    is_measured = row.summary.outcome is Outcome.COMPLETED and measure.delta is not None
    if is_measured and row.told_e_star is not None and row.told_e_star == measure.e_star:
        return row.told_value  # counting the spikes of thousands of trials takes seconds
    score = score_trial(row, measure)
    return None if score is None else score.q


def _rank(scores: Sequence[float]) -> tuple[float, int]:
    return sum(scores) / len(scores), len(scores)


def _ended_at(row: TrialRow) -> datetime:
    return datetime.fromisoformat(row.started_at) + timedelta(seconds=row.summary.wall_s)


def _iso(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _age_s(time: datetime, now: datetime) -> float:
    return max(0.0, (now - time).total_seconds())
