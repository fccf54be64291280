"""The grid, which says what could be reached, and the evaluation of what the methods chose."""

import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean

from scipy.stats import beta

from stability_search.records.trial import Outcome, Stage, TrialRow, TrialSummary
from stability_search.records.values import Json
from stability_search.scoring.run import probe_levels
from stability_search.seeding import derive_seed
from stability_search.settings.trial import TrialConstants
from stability_search.space import Space
from stability_search.yardstick import probe_steps, readings, yardstick
from tests.benchmarks.race.store import Store, Training
from tests.benchmarks.race.tracks import Track

EVALUATION_SEEDS = 10  # of each study seed; no study ever uses them
GRID_SEEDS = 2
_REPORT_S = 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class GridPoint:
    """One configuration of the grid.

    Attributes:
        settings: Its settings.
        losses: Last probe level E_T of every seed; None where the training did not complete.
    """

    settings: Mapping[str, Json]
    losses: tuple[float | None, ...]

    @property
    def mean(self) -> float:
        """Mean level; infinite where a seed did not complete."""
        finite = [loss for loss in self.losses if loss is not None]
        return fmean(finite) if len(finite) == len(self.losses) else math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class Yard:
    """What survival is judged by at the horizon of the evaluation.

    Attributes:
        e0: Probe loss that counts as no progress.
        delta: Progress of the best configuration of the grid whose every seed completed.
        points: The grid, best first.
    """

    e0: float
    delta: float
    points: tuple[GridPoint, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """A configuration trained again on fresh seeds.

    Attributes:
        losses: Last probe level of every seed that survived.
        num_seeds: Seeds it was trained with.
    """

    losses: tuple[float, ...]
    num_seeds: int

    @property
    def survived(self) -> int:
        """Seeds that completed with at least half the progress."""
        return len(self.losses)

    @property
    def mean(self) -> float | None:
        """Mean level over the seeds that survived; None if none did."""
        return fmean(self.losses) if self.losses else None

    def __add__(self, other: "Evaluated") -> "Evaluated":
        """Pool two evaluations."""
        return Evaluated(
            losses=self.losses + other.losses, num_seeds=self.num_seeds + other.num_seeds
        )


def last_level(summary: TrialSummary) -> float | None:
    """Return E_T of a training; None unless it completed with a finite one."""
    if summary.outcome is not Outcome.COMPLETED:
        return None
    level = probe_levels(readings(summary, summary.num_planned_steps))[-1]
    return level if math.isfinite(level) else None


def survival_interval(survived: int, num_seeds: int) -> tuple[float, float]:
    """Return the 95 % interval of Clopper and Pearson for a share.

    Example:
        >>> low, high = survival_interval(10, 10)
        >>> round(low, 3), high
        (0.692, 1.0)
    """
    low = 0.0 if survived == 0 else beta.ppf(0.025, survived, num_seeds - survived + 1)
    high = 1.0
    if survived < num_seeds:
        high = beta.ppf(0.975, survived + 1, num_seeds - survived)
    return float(low), float(high)


class Judge:
    """Trains the grid and the choices of one track.

    Args:
        track: The track.
        store: Where trainings are kept.
        jobs: Processes to train in.
    """

    def __init__(self, track: Track, store: Store, *, jobs: int) -> None:
        self._track = track
        self._store = store
        self._jobs = jobs
        self._space = track.space(0, store.folder / "spaces")
        self._yard: Yard | None = None

    def yard(self) -> Yard:
        """Train the grid, with the kill rule but without the loss stop, which needs a Delta."""
        if self._yard is not None:
            return self._yard
        steps = self._track.evaluation_steps
        grid = list(self._track.grid_settings(self._space))
        constants = TrialConstants(probe_steps=probe_steps(steps))
        trainings = [
            self._training(settings, derive_seed(0, "race grid", seed), constants)
            for settings in grid
            for seed in range(GRID_SEEDS)
        ]
        summaries = self._train_all([self._origin(), *trainings], what="grid")
        ended = iter(summaries[1:])
        points = [
            GridPoint(
                settings=settings,
                losses=tuple(last_level(next(ended)) for _ in range(GRID_SEEDS)),
            )
            for settings in grid
        ]
        points.sort(key=lambda point: point.mean)
        e0 = _measured_e0(summaries[0], self._space)
        if not points[0].mean < e0:
            raise AssertionError(f"{self._track.name}: nothing in the grid learns")
        self._yard = Yard(e0=e0, delta=e0 - points[0].mean, points=tuple(points))
        return self._yard

    def evaluate(self, wanted: Iterable[tuple[Mapping[str, Json], int]]) -> list[Evaluated]:
        """Train configurations on the evaluation seeds of a study seed each, rules in force."""
        wanted = list(wanted)
        yard, steps = self.yard(), self._track.evaluation_steps
        constants = TrialConstants(e0=yard.e0, delta=yard.delta, probe_steps=probe_steps(steps))
        trainings = [
            self._training(settings, derive_seed(seed, "race", i), constants)
            for settings, seed in wanted
            for i in range(EVALUATION_SEEDS)
        ]
        ended = iter(self._train_all(trainings, what="evaluation"))
        return [_judged((next(ended) for _ in range(EVALUATION_SEEDS)), yard) for _ in wanted]

    def best_surviving(self, seed: int) -> tuple[GridPoint, Evaluated] | None:
        """Return the best of the grid that survives on every evaluation seed of a study seed."""
        for point in self.yard().points:
            if math.isinf(point.mean):
                return None
            (again,) = self.evaluate([(point.settings, seed)])
            if again.survived == again.num_seeds:
                return point, again
        return None

    def _training(
        self, settings: Mapping[str, Json], seed: int, constants: TrialConstants
    ) -> Training:
        steps = self._track.evaluation_steps
        config = self._space.trial_config(settings, seed=seed, steps=steps, device="cpu")
        return Training(config=config, constants=constants)

    def _origin(self) -> Training:
        """Return a training of one step that measures E_0 as a pilot does."""
        config = self._space.trial_config(
            self._space.pilot_settings(), seed=derive_seed(0, "search"), steps=1, device="cpu"
        )
        return Training(
            config=config, constants=TrialConstants(probe_steps=(0,), measures_blind_run=True)
        )

    def _train_all(self, trainings: Sequence[Training], *, what: str) -> list[TrialSummary]:
        """Train what is not known yet, in several processes, and return how all ended."""
        began = said = time.monotonic()
        if self._jobs == 1:
            summaries: Iterator[TrialSummary] = map(self._store.run, trainings)
            pool = None
        else:
            pool = ProcessPoolExecutor(self._jobs, mp_context=get_context("spawn"))
            work = ((str(self._store.folder), training) for training in trainings)
            summaries = pool.map(_train_one, work)
        ended = []
        for summary in summaries:
            ended.append(summary)
            now = time.monotonic()
            if now - said > _REPORT_S:
                said = now
                left = (now - began) / len(ended) * (len(trainings) - len(ended))
                print(
                    f"{self._track.name}: {what} {len(ended)}/{len(trainings)}, "
                    f"about {left / 60:.0f} min left",
                    file=sys.stderr,
                    flush=True,
                )
        if pool is not None:
            pool.shutdown()
        return ended


def _train_one(work: tuple[str, Training]) -> TrialSummary:
    import torch

    torch.set_num_threads(1)
    folder, training = work
    return Store(Path(folder)).run(training)


def _measured_e0(summary: TrialSummary, space: Space) -> float:
    row = TrialRow(
        trial_id="pilot-00",
        stage=Stage.PILOT,
        index=0,
        config_id="origin",
        seed=0,
        settings=space.pilot_settings(),
        summary=summary,
    )
    e0 = yardstick([row], 1).e0
    if e0 is None:
        raise AssertionError("E_0 of a race's task is finite")
    return e0


def _judged(summaries: Iterable[TrialSummary], yard: Yard) -> Evaluated:
    levels = [last_level(summary) for summary in summaries]
    limit = yard.e0 - yard.delta / 2
    return Evaluated(
        losses=tuple(level for level in levels if level is not None and level <= limit),
        num_seeds=len(levels),
    )
