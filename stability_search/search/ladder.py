"""How far one candidate's ladder has come: what it needs next, and its base.

  up      2 seeds at LR, 2*LR, 4*LR, ... up to K doublings, until one is dead
  down    2 seeds at LR/2, LR/4, ... until a rung meets the bar and S no longer rises, or could
          not: the rungs above bound S of the next one down
  base    of the rungs in range, the highest S that meets the bar (if none, the highest S), by the
          yardstick as the ladders have refitted it: the one that began was set by the pilot, and
          a rung that learned more than it makes the lower ones look poor
  seeds   the base gets all; if it then misses the bar, the next rung down does; once

Every function here is one of the finished trials alone, and a trial that is asked for once is
asked for in whatever order the others finish: so neither resuming nor parallel running changes
what is run.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from stability_search.records.trial import Outcome, Stage, TrialRow
from stability_search.scoring.configuration import StabilityScore, stability_score
from stability_search.scoring.constants import S_V1
from stability_search.search.candidates import Grid, Rung
from stability_search.search.request import MAX_ATTEMPTS
from stability_search.settings.study import ConfirmSettings
from stability_search.standing import LADDER_SEEDS

UNBEATABLE = 0.98  # judgement: of the ceiling of S, from which more would make no difference
LEAST_RISE = 0.01  # judgement: a rung that cannot raise S by this share is not worth its trials

TrialKey = tuple[str, int]  # config_id, seed_index


def finished_trials(rows: Iterable[TrialRow]) -> dict[TrialKey, TrialRow]:
    """Return the row that counts for every confirm trial that will not be tried again.

    Args:
        rows: Finished trials of every stage and attempt, in any order.

    Returns:
        One row for each configuration and seed: its result, or else the last attempt, if that
        was a `user_error` or the last one allowed.
    """
    last: dict[TrialKey, TrialRow] = {}
    for row in sorted(rows, key=lambda row: (row.summary.outcome.is_result, row.attempt)):
        if row.stage is Stage.CONFIRM:
            last[row.config_id, row.seed_index] = row
    return {
        key: row
        for key, row in last.items()
        if row.summary.outcome is not Outcome.INFRASTRUCTURE or row.attempt >= MAX_ATTEMPTS
    }


def ladder_seeds(confirm: ConfirmSettings) -> tuple[int, ...]:
    """Return the seeds every rung gets: the first two, or the only one."""
    return tuple(range(min(LADDER_SEEDS, confirm.seeds)))


class Results:
    """Finished confirm trials by configuration and seed, as scored by one yardstick.

    Args:
        finished: What `finished_trials` returned.
        score: q of a trial; None if its end says nothing about the configuration.
        last_level: E_T of a trial; infinite where the probe was not finite or not read.
    """

    def __init__(
        self,
        finished: Mapping[TrialKey, TrialRow],
        score: Callable[[TrialRow], float | None],
        last_level: Callable[[TrialRow], float],
    ) -> None:
        self._finished = finished
        self._score = score
        self._last_level = last_level

    def unfinished(self, config_id: str, seeds: Sequence[int]) -> tuple[int, ...]:
        """Return those of the seeds that have not ended for good."""
        return tuple(seed for seed in seeds if (config_id, seed) not in self._finished)

    def num_finished(self, config_id: str, seeds: Sequence[int]) -> int:
        """Count those of the seeds that have ended for good."""
        return len(seeds) - len(self.unfinished(config_id, seeds))

    def missing(self, config_id: str, seeds: Sequence[int]) -> frozenset[int]:
        """Return the seeds that ended for good without a result."""
        return frozenset(
            seed
            for seed in seeds
            if (row := self._finished.get((config_id, seed))) is not None
            and not row.summary.outcome.is_result
        )

    def qs(self, config_id: str, seeds: Sequence[int]) -> tuple[float, ...]:
        """Return q of those of the seeds that have one."""
        rows = (self._finished.get((config_id, seed)) for seed in seeds)
        scores = (self._score(row) for row in rows if row is not None)
        return tuple(q for q in scores if q is not None)

    def mean_last_level(self, config_id: str, seeds: Sequence[int]) -> float:
        """Return the mean E_T of the seeds, all of which have ended."""
        return fmean(self._last_level(self._finished[config_id, seed]) for seed in seeds)

    def all_alive(self, config_id: str, seeds: Sequence[int]) -> bool:
        """Say whether every one of the seeds completed with q >= 1/2; a missing one did not."""
        qs = self.qs(config_id, seeds)  # q of a trial that did not complete is 0
        return len(qs) == len(seeds) and all(q >= S_V1.alive_q for q in qs)


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """Seeds of one rung that are needed now and have not ended; asked for together.

    Attributes:
        rung: The configuration.
        seeds: Their positions among the stage's seeds, rising, not empty.
    """

    rung: Rung
    seeds: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a ladder has come.

    Attributes:
        wanted: What it needs now; empty once it has ended.
        base: Its base with all seeds; None until then.
        outgrown: An earlier base that missed the bar with all seeds; None if there was none.
        is_hopeless: True if no rung that could become the base meets the bar with the ladder's
            seeds, so that what is wanted shows no more than by how much it is missed.
    """

    wanted: tuple[Wanted, ...] = ()
    base: Rung | None = None
    outgrown: Rung | None = None
    is_hopeless: bool = False


class Ladder:
    """The rungs of one candidate that have been climbed so far.

    Args:
        grid: The learning rates around the candidate.
        confirm: Seeds, octaves and the margin asked for.
        results: Finished trials; more of them only move the ladder on.
    """

    def __init__(self, grid: Grid, confirm: ConfirmSettings, results: Results) -> None:
        self._grid = grid
        self._confirm = confirm
        self._results = results
        self._pair = ladder_seeds(confirm)
        self._all = tuple(range(confirm.seeds))
        self._climbed: set[int] = set()

    def walk(self) -> tuple[Wanted, ...]:
        """Say what the way up and down needs now; empty once it has ended."""
        if not self._grid.has_one_base:
            return self._climb_up() or self._climb_down()
        # Nothing else can become the base: it has all its seeds beside the way up.
        base = self._grid.rung(0)
        missing = self._results.unfinished(base.config_id, self._all)
        seeds = (Wanted(rung=base, seeds=missing),) if missing else ()
        return (*seeds, *(wanted for wanted in self._climb_up() if wanted.rung is not base))

    def glance(self) -> tuple[Wanted, ...]:
        """Say what the ladder needs until it is known whether its candidate lives at all."""
        return self._want(0, self._pair) or (self.walk() if self.is_alive else ())

    @property
    def is_alive(self) -> bool:
        """True once the candidate itself has lived on the ladder's seeds."""
        return self._results.all_alive(self._grid.rung(0).config_id, self._pair)

    @property
    def climbed_ids(self) -> frozenset[str]:
        """`config_id` of the rungs walked so far."""
        return frozenset(self._grid.rung(octave).config_id for octave in self._climbed)

    def judged_by(self, results: Results) -> "Ladder":
        """Return the same rungs as scored by another yardstick."""
        ladder = Ladder(self._grid, self._confirm, results)
        ladder._climbed = set(self._climbed)
        return ladder

    def progress(self) -> Progress:
        """Say what the base needs, once the way up and down has ended."""
        if self._grid.has_one_base:
            return self._fill(self._grid.rung(0))
        base = self._choose_base()
        return replace(self._fill(base), is_hopeless=self._is_hopeless(base))

    def _want(self, octave: int, seeds: Sequence[int]) -> tuple[Wanted, ...]:
        rung = self._grid.rung(octave)
        missing = self._results.unfinished(rung.config_id, seeds)
        return (Wanted(rung=rung, seeds=missing),) if missing else ()

    def _climb_up(self) -> tuple[Wanted, ...]:
        """Walk up to the first rung that is not finished; none once the way up has ended."""
        for octave in range(self._grid.octaves + 1):
            wanted = self._want(octave, self._pair)
            if wanted:
                return wanted
            self._climbed.add(octave)
            if self._is_dead(octave):
                break
        return ()

    def _climb_down(self) -> tuple[Wanted, ...]:
        """Walk down likewise, once the way up has ended, as far as S could still rise."""
        for octave in range(-1, self._grid.lowest - 1, -1):
            if self._is_settled_above(octave):
                break
            wanted = self._want(octave, self._pair)
            if wanted:
                return wanted
            self._climbed.add(octave)
            if self._is_settled(octave):
                break
        return ()

    def _is_dead(self, octave: int) -> bool:
        qs = self._results.qs(self._grid.rung(octave).config_id, self._pair)
        return not qs or fmean(qs) < S_V1.dead_q

    def _is_settled(self, octave: int) -> bool:
        """Say whether the bar is met somewhere and S did not rise on the last rung down."""
        rises = self._score(octave).score > self._score(octave + 1).score
        return not rises and any(self._meets_bar(rung, self._pair) for rung in self._options())

    def _is_settled_above(self, octave: int) -> bool:
        """Say whether the bar is met above a rung that could not raise S, whatever it showed."""
        best = self._score_with([1.0] * len(self._pair), octave).score
        is_worth_it = best > (1 + LEAST_RISE) * self._score(octave + 1).score
        return not is_worth_it and self._meets_bar(self._grid.rung(octave + 1), self._pair)

    def _options(self) -> list[Rung]:
        """Return the climbed rungs that may become the base."""
        rungs = (self._grid.rung(octave) for octave in sorted(self._climbed))
        return [rung for rung in rungs if rung.is_in_range]

    def _score(self, octave: int, seeds: Sequence[int] | None = None) -> StabilityScore:
        """Score a rung by its seeds (the ladder's two by default) and the two of those above."""
        own = self._results.qs(self._grid.rung(octave).config_id, seeds or self._pair)
        return self._score_with(own, octave)

    def _score_with(self, own: Sequence[float], octave: int) -> StabilityScore:
        above = range(octave + 1, octave + self._grid.octaves + 1)
        rungs = [
            self._results.qs(self._grid.rung(o).config_id, self._pair) or None
            if o in self._climbed
            else None
            for o in above
        ]
        return stability_score(own, rungs, self._grid.octaves)

    def _meets_bar(self, rung: Rung, seeds: Sequence[int]) -> bool:
        if not self._results.all_alive(rung.config_id, seeds):
            return False
        if self._grid.octaves == 0:
            return True
        return self._score(rung.octave, seeds).margin_octaves >= self._confirm.min_margin

    def _choose_base(self) -> Rung:
        """Return the highest S that meets the bar, at a tie the lowest rate; if none, S alone."""
        options = self._options()
        met = [rung for rung in options if self._meets_bar(rung, self._pair)]
        if met:
            return max(met, key=lambda rung: (self._score(rung.octave).score, -rung.octave))
        return max(
            options,
            key=lambda rung: (self._score(rung.octave).score, -abs(rung.octave), -rung.octave),
        )

    def _is_hopeless(self, base: Rung) -> bool:
        below = self._grid.rung(base.octave - 1)
        is_known = below.octave in self._climbed or not below.is_in_range
        return is_known and not self.sound_rungs()

    def _fill(self, base: Rung) -> Progress:
        """Give the base all seeds, and if it then misses the bar the next rung down; once."""
        wanted = self._want(base.octave, self._all)
        if wanted:
            return Progress(wanted=wanted)
        below = self._grid.rung(base.octave - 1)
        if self._meets_bar(base, self._all) or not below.is_in_range:
            return Progress(base=base)
        wanted = self._want(below.octave, self._all)
        if wanted:
            return Progress(wanted=wanted, outgrown=base)
        return Progress(base=below, outgrown=base)

    @property
    def looks_unbeatable(self) -> bool:
        """True if the base scores what any could on the ladder's seeds, but for 2 %."""
        base = self._grid.rung(0) if self._grid.has_one_base else self._choose_base()
        return self._is_unbeatable(base, self._pair)

    def is_unbeatable(self, base: Rung) -> bool:
        """Say whether a base with all seeds scores what any configuration could, but for 2 %."""
        return self._is_unbeatable(base, self._all)

    def _is_unbeatable(self, base: Rung, seeds: Sequence[int]) -> bool:
        score = self._score(base.octave, seeds)
        return self._meets_bar(base, seeds) and score.score >= UNBEATABLE * score.ceiling

    def meets_bar(self, base: Rung) -> bool:
        """Say whether a base meets the bar with all seeds."""
        return self._meets_bar(base, self._all)

    def sound_rungs(self) -> tuple[Rung, ...]:
        """Return the climbed rungs in range that meet the bar with the ladder's seeds."""
        return tuple(rung for rung in self._options() if self._meets_bar(rung, self._pair))

    def last_level(self, rung: Rung) -> float:
        """Return the mean E_T of a climbed rung over the ladder's seeds."""
        return self._results.mean_last_level(rung.config_id, self._pair)

    def wanted_for(self, rung: Rung) -> tuple[Wanted, ...]:
        """Return what a rung needs to have all seeds."""
        return self._want(rung.octave, self._all)

    def most_to_fill(self) -> int:
        """Bound from above how many trials base and fallback need, once the walk has ended."""
        base = self._grid.rung(0) if self._grid.has_one_base else self._choose_base()
        below = self._grid.rung(base.octave - 1)
        rungs = (base, below) if below.is_in_range else (base,)
        return sum(len(self._results.unfinished(r.config_id, self._all)) for r in rungs)

    def most_trials_left(self) -> int:
        """Bound from above how many more trials the ladder needs to end, >= 0."""
        octaves = range(self._grid.lowest - 1, self._grid.octaves + 1)
        finished = sum(
            self._results.num_finished(self._grid.rung(octave).config_id, self._all)
            for octave in octaves
        )
        can_fall_back = not self._grid.has_one_base or self._grid.rung(-1).is_in_range
        most = most_trials(-self._grid.lowest, self._confirm, can_fall_back=can_fall_back)
        return max(0, most - finished)


def most_trials(below: int, confirm: ConfirmSettings, *, can_fall_back: bool) -> int:
    """Bound the trials of one ladder from above.

    Args:
        below: Rungs below the candidate, >= 0.
        confirm: Seeds and octaves.
        can_fall_back: False if no lower learning rate can become the base.

    Returns:
        Trials, >= 1, if no rung is dead, none is shared and the fallback is needed.
    """
    pair = len(ladder_seeds(confirm))
    rungs = pair * (1 + below + confirm.octaves)
    fill = confirm.seeds - pair
    return rungs + fill + (confirm.seeds if can_fall_back else 0)
