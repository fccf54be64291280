"""One case of the field, measured: plain loops, the engine, and the choice of a study."""

import multiprocessing
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import stability_search
from stability_search import space as spaces
from stability_search.records.trial import Outcome, TrialRow, TrialSummary
from stability_search.records.values import Json
from stability_search.records.verdict import VerdictKind
from stability_search.search.closing import Study, render_run
from stability_search.search.ledger import Ledger
from stability_search.seeding import derive_seed
from stability_search.settings.trial import TrialConstants
from stability_search.space import Space
from stability_search.yardstick import probe_steps, yardstick
from tests.benchmarks.race.judging import last_level
from tests.benchmarks.race.store import Store, Training
from tests.field.case import FieldCase, PlainEnd, PlainLoop

PLAIN_SEEDS = 5
BEFORE_SEEDS = 5
FRESH_SEEDS = 10
LONGER = 5  # times the horizon of confirm


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """How one loop fared over its seeds.

    Attributes:
        name: As the table shows it.
        num_steps: Steps it was to take.
        num_seeds: Seeds it was run with.
        survived: Seeds that came to the end.
        learned: Of them, those that gained half of Delta; None where that is not judged.
        failed_at: Step at which each of the others ended, rising.
        failures: How these ended, each once.
        lost: Share of all steps that were bad, met bad data, or, in a plain loop, changed nothing.
        probe_loss: Mean over the seeds that survived; None without one.
        metrics: The same of the task's metrics.
    """

    name: str
    num_steps: int
    num_seeds: int
    survived: int
    learned: int | None = None
    failed_at: tuple[int, ...]
    failures: tuple[str, ...]
    lost: float
    probe_loss: float | None
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A case and all its rows.

    Attributes:
        case: The case.
        rows: In the order of the table.
        e0: Probe loss of no progress, at the horizon of confirm.
        settings: What varies of the choice; None where the study chose nothing.
        verdict: The study's verdict in its own words, one line.
        margin: Doublings of the rate that the choice survived, as the report prints it.
        study_s: Seconds of the study; None where an earlier call ran it.
    """

    case: FieldCase
    rows: tuple[Row, ...]
    e0: float
    settings: Mapping[str, Json] | None
    verdict: str
    margin: str
    study_s: float | None


def measure(case: FieldCase, folder: Path, *, jobs: int) -> Measured:
    """Run every row of a case that the folder does not hold yet.

    Args:
        case: The case.
        folder: Where its study and its trainings are kept.
        jobs: Processes for loops and trainings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    space = spaces.load(case.space)
    rows = [
        _plain(name, loop, case.num_steps, jobs)
        for name, loop in (
            ("no guards", case.unguarded),
            ("fix as written", case.fix_as_written),
            ("fix as meant", case.fix_as_meant),
        )
    ]
    study, study_s = _study(case, folder / "run")
    trials = _rows_of(study)
    yard = yardstick(trials, space.study.confirm.steps)
    if yard.e0 is None:
        raise AssertionError(f"{case.space}: E_0 is known after a study")
    trainer = _Trainer(space, Store(folder / "trainings"), jobs, yard.e0, yard.delta)
    horizon = space.study.trial_steps
    longer = LONGER * space.study.confirm.steps
    before, after = space.today_settings(), space.settings(space.start_with[1])
    rows.append(trainer.row("engine, before", before, horizon, BEFORE_SEEDS))
    rows.append(trainer.row("engine, after", after, longer, FRESH_SEEDS))
    choice = _choice(study, trials)
    if choice is not None:
        rows.append(trainer.row("choice of the search", choice, longer, FRESH_SEEDS))
    return Measured(
        case=case,
        rows=tuple(rows),
        e0=yard.e0,
        settings=None if choice is None else {name: choice[name] for name in space.varying},
        verdict=study.lines[0],
        margin=_margin(study),
        study_s=study_s,
    )


# -- plain loops -------------------------------------------------------------------------------


def _plain(name: str, loop: PlainLoop, num_steps: int, jobs: int) -> Row:
    _say(f"{name}: {num_steps} steps, {PLAIN_SEEDS} seeds")
    ends = _in_processes(loop, [(seed, num_steps) for seed in range(PLAIN_SEEDS)], jobs)
    lived = [end for end in ends if end.failed_at is None]
    losses = [end.probe_loss for end in lived if end.probe_loss is not None]
    return Row(
        name=name,
        num_steps=num_steps,
        num_seeds=PLAIN_SEEDS,
        survived=len(lived),
        failed_at=tuple(sorted(end.failed_at for end in ends if end.failed_at is not None)),
        failures=tuple(dict.fromkeys(end.failure for end in ends if end.failure)),
        lost=sum(end.num_skipped for end in ends) / max(1, sum(end.num_steps for end in ends)),
        probe_loss=fmean(losses) if losses and len(losses) == len(lived) else None,
        metrics={},
    )


def _in_processes(loop: PlainLoop, work: Sequence[tuple[int, int]], jobs: int) -> list[PlainEnd]:
    with ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_use_one_thread
    ) as pool:
        return list(pool.map(loop, *zip(*work, strict=True)))


def _use_one_thread() -> None:
    import torch

    torch.set_num_threads(1)


# -- the study ---------------------------------------------------------------------------------


def _study(case: FieldCase, directory: Path) -> tuple[Study, float | None]:
    if (directory / "report.json").is_file():
        return render_run(directory), None
    _say(f"study of {case.space}")
    began = time.monotonic()
    study = stability_search.run(case.space, output=directory)
    return study, time.monotonic() - began


def _rows_of(study: Study) -> tuple[TrialRow, ...]:
    ledger = Ledger(study.directory / "study.db")
    try:
        return ledger.rows()
    finally:
        ledger.close()


def _choice(study: Study, trials: Sequence[TrialRow]) -> Mapping[str, Json] | None:
    if study.verdict.kind is not VerdictKind.STABLE:
        return None
    return next(row.settings for row in trials if row.config_id == study.verdict.choice)


def _margin(study: Study) -> str:
    if study.verdict.choice is None:
        return ""
    table = study.tables().configurations
    row = table[table["config_id"] == study.verdict.choice].iloc[0]
    capped = "at least " if row["margin_is_capped"] else ""
    return f"{capped}{int(row['margin_octaves'])} doublings"


# -- the engine --------------------------------------------------------------------------------


class _Trainer:
    """Trains configurations on fresh seeds, kill rule and loss stop in force."""

    def __init__(
        self, space: Space, store: Store, jobs: int, e0: float, delta: float | None
    ) -> None:
        self._space = space
        self._store = store
        self._jobs = jobs
        self._e0 = e0
        self._delta = delta

    def row(self, name: str, settings: Mapping[str, Json], steps: int, num_seeds: int) -> Row:
        """Train one configuration on some seeds."""
        _say(f"{name}: {steps} steps, {num_seeds} seeds")
        constants = TrialConstants(e0=self._e0, delta=self._delta, probe_steps=probe_steps(steps))
        trainings = [
            Training(
                config=self._space.trial_config(
                    settings, seed=derive_seed(seed, "field"), steps=steps, device="cpu"
                ),
                constants=constants,
            )
            for seed in range(num_seeds)
        ]
        with ProcessPoolExecutor(
            self._jobs,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_use_one_thread,
        ) as pool:
            summaries = list(pool.map(self._store.run, trainings))
        return self._judged(name, steps, summaries)

    def _judged(self, name: str, steps: int, summaries: Sequence[TrialSummary]) -> Row:
        lived = [one for one in summaries if one.outcome is Outcome.COMPLETED]
        levels = [level for one in lived if (level := last_level(one)) is not None]
        limit = None if self._delta is None else self._e0 - self._delta / 2
        num_lost = sum(one.num_bad_steps + one.num_data_steps for one in summaries)
        return Row(
            name=name,
            num_steps=steps,
            num_seeds=len(summaries),
            survived=len(lived),
            learned=None if limit is None else sum(level <= limit for level in levels),
            failed_at=tuple(
                sorted(one.num_steps for one in summaries if one.outcome is not Outcome.COMPLETED)
            ),
            failures=tuple(
                dict.fromkeys(
                    one.outcome.value for one in summaries if one.outcome is not Outcome.COMPLETED
                )
            ),
            lost=num_lost / max(1, sum(one.num_steps for one in summaries)),
            probe_loss=fmean(levels) if levels and len(levels) == len(lived) else None,
            metrics=_means([one.metrics_last for one in lived]),
        )


def _means(rows: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: [row.get(name) for row in rows] for name in names}
    return {
        name: fmean(one for one in column if one is not None)
        for name, column in values.items()
        if all(one is not None for one in column)
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
