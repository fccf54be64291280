"""What confirm runs next, and what it proves: a pure function of the finished trials.

  candidates   the best of the search, and what the user trains with today
  ladders      each at learning rates a doubling apart: `ladder`; as many as it takes: `climb`
  first look   the bases that meet the bar, compared seed by seed: `choice`
  second look  once, with as many new seeds, if that could still name a winner
  verdict      the choice; or what came closest, and what it missed

Everything is worked out again from the rows whenever it is asked. So a resumed study goes on
where it was, and the order in which trials finish changes nothing.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from stability_search.records.trial import Stage, TrialRow
from stability_search.records.values import Json
from stability_search.records.verdict import ChoiceReason, Verdict
from stability_search.scoring.run import probe_levels
from stability_search.search import caveats, verdicts
from stability_search.search.candidates import (
    Candidate,
    Grid,
    Rung,
    find_candidates,
    todays_candidate,
)
from stability_search.search.choice import ALPHA_ONE_LOOK, ALPHA_TWO_LOOKS, Choice
from stability_search.search.climb import Climb, Ladders
from stability_search.search.ladder import (
    Results,
    TrialKey,
    finished_trials,
    ladder_seeds,
    most_trials,
)
from stability_search.search.look import Look, rows_of_look, take_look
from stability_search.space import Space
from stability_search.standing import score_trial
from stability_search.yardstick import Yardstick, readings, yardstick


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfirmTrial:
    """One trial that confirm needs.

    Attributes:
        settings: Every named setting, the learning rate of its rung included.
        config_id: Hash of the active ones.
        candidate_id: `config_id` of the candidate whose ladder it belongs to, of two the better.
        octave: Octave of the learning rate from that candidate's, negative below.
        seed_index: Position among the seeds of the stage, >= 0; trials of equal position share
            their seed.
    """

    settings: Mapping[str, Json]
    config_id: str
    candidate_id: str
    octave: int
    seed_index: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """All trials that are needed now, most urgent first.

    Attributes:
        trials: Not empty; none of them has ended for good, some may be running. A trial whose
            attempt ended `infrastructure` is needed again, up to three attempts.
    """

    trials: tuple[ConfirmTrial, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfirmCost:
    """What confirm may cost, for those who want to know before.

    Attributes:
        num_ladders: Most candidates there can be.
        min_trials: Fewest trials, if there is a candidate at all.
        max_trials: Most trials, the second look included and repeated attempts left out.
        steps: Optimizer steps of each.
    """

    num_ladders: int
    min_trials: int
    max_trials: int
    steps: int


def describe_cost(space: Space) -> ConfirmCost:
    """Bound what confirm costs from the space alone.

    Args:
        space: The study's space.
    """
    confirm = space.study.confirm
    num_ladders = confirm.top + bool(space.start_with) if space.has_space else 1
    low, high = space.learning_rate_range()
    octaves = 0
    while low * 2.0 ** (octaves + 1) <= high:
        octaves += 1
    each = most_trials(min(2 * confirm.octaves, octaves), confirm, can_fall_back=octaves > 0)
    second_look = num_ladders * confirm.seeds if num_ladders > 1 else 0
    return ConfirmCost(
        num_ladders=num_ladders,
        min_trials=confirm.seeds,
        max_trials=num_ladders * each + second_look,
        steps=confirm.steps,
    )


def next_need(
    rows: Sequence[TrialRow], space: Space, *, can_afford: Callable[[int], bool]
) -> Need | Verdict:
    """Say which trials confirm needs now, or how the study ends.

    Args:
        rows: Every finished trial of every stage and attempt, in any order. The search must be
            over.
        space: The study's space.
        can_afford: Says whether the budget allows so many more confirm trials, those that are
            running counted among them. Candidates are finished in order: a later one starts
            trials only where the earlier ones can still be finished.

    Returns:
        The needed trials; or the verdict, once no further trial could change it or none can be
        afforded.
    """
    return Confirmation(space).next_need(rows, can_afford=can_afford)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Start:
    """What was known when confirm began; decides candidates, ladders and bases."""

    of_search: Yardstick
    of_confirm: Yardstick
    candidates: tuple[Candidate, ...]
    grids: tuple[Grid, ...]
    today: int | None
    places: Mapping[str, tuple[str, int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _SecondLook:
    """As many seeds again, for every base that met the bar at the first look."""

    rungs: tuple[Rung, ...]
    num_seeds: int
    wanted: tuple[tuple[Rung, int], ...]

    @classmethod
    def after(cls, first: Look, ladders: Ladders, results: Results, num_seeds: int) -> Self:
        """Work out which of its trials have not ended."""
        rungs = tuple(rung for rung in ladders.bases if rung.config_id in first.met_ids)
        seeds = range(num_seeds, 2 * num_seeds)
        wanted = (
            (rung, seed) for rung in rungs for seed in results.unfinished(rung.config_id, seeds)
        )
        return cls(rungs=rungs, num_seeds=num_seeds, wanted=tuple(wanted))

    @property
    def has_begun(self) -> bool:
        """True once one of its seeds has ended.

        Then there are two looks, whatever is left of the budget: going back to the alpha of a
        single one would be a third look.
        """
        return len(self.wanted) < len(self.rungs) * self.num_seeds

    def seeds_of(self) -> dict[str, Sequence[int]]:
        """Return the seeds of both looks that have ended, for each of its configurations."""
        wanted = {(rung.config_id, seed) for rung, seed in self.wanted}
        return {
            rung.config_id: tuple(
                seed for seed in range(2 * self.num_seeds) if (rung.config_id, seed) not in wanted
            )
            for rung in self.rungs
        }


class Confirmation:
    """Answers `next_need` again and again, remembering scores it has already worked out.

    Its answers depend on the rows alone; it only spares the time.

    Args:
        space: The study's space.
    """

    def __init__(self, space: Space) -> None:
        self._space = space
        self._study = space.study
        self._confirm = space.study.confirm
        self._scores: dict[tuple[str, int, Yardstick], float | None] = {}
        self._starts: dict[frozenset[tuple[str, int]], _Start] = {}
        self._refits: dict[frozenset[tuple[str, int]], Yardstick] = {}

    def next_need(
        self, rows: Sequence[TrialRow], *, can_afford: Callable[[int], bool]
    ) -> Need | Verdict:
        """See `stability_search.search.confirm.next_need`."""
        answer = self._answer(rows, can_afford)
        return answer if isinstance(answer, Need) else self._with_caveats(answer, rows)

    def _with_caveats(self, verdict: Verdict, rows: Sequence[TrialRow]) -> Verdict:
        more = (
            caveats.left_out(self._space, rows, unfinished=verdict.unfinished),
            caveats.loss_may_differ(self._space, rows),
        )
        return replace(verdict, warnings=caveats.joined((verdict.warnings, *more)))

    def _end_before_confirm(self, rows: Sequence[TrialRow], start: _Start) -> Verdict | None:
        searched = [row.summary.outcome for row in rows if row.stage is Stage.SEARCH]
        if searched and not any(outcome.is_result for outcome in searched):
            return verdicts.not_judged(rows, start.of_search)
        if self._space.has_space and not start.of_search.has_signal:
            return verdicts.no_signal(rows, start.of_search)
        if not start.candidates:
            return verdicts.no_candidate(rows, start.of_search)
        if start.of_confirm.e0 is None:  # no trial of confirm can give one
            return verdicts.no_signal(rows, start.of_confirm)
        return None

    def _answer(
        self, rows: Sequence[TrialRow], can_afford: Callable[[int], bool]
    ) -> Need | Verdict:
        start = self._start(rows)
        end = self._end_before_confirm(rows, start)
        if end is not None:
            return end
        finished = finished_trials(rows)
        results = self._results(finished, start.of_confirm)

        def refit(ids: frozenset[str]) -> tuple[Results, float | None]:
            measure = self._refitted(rows, ids)
            return self._results(finished, measure), measure.delta

        wanted, ladders = Climb(
            start.grids,
            today=start.today,
            confirm=self._confirm,
            results=results,
            refit=refit,
            can_afford=can_afford,
        ).climb()
        if wanted:
            return Need(trials=_trials(wanted, start))
        if not ladders.is_first_known:
            return verdicts.incomplete(
                rows,
                start.of_confirm,
                confirmed=ladders.confirmed_ids,
                unfinished=ladders.unfinished,
            )
        return self._judge(rows, start, ladders, results, can_afford)

    # ------------------------------------------------------------------------ the start

    def _start(self, rows: Sequence[TrialRow]) -> _Start:
        before = [row for row in rows if row.stage is not Stage.CONFIRM]
        key = frozenset((row.trial_id, row.attempt) for row in before)
        if key not in self._starts:
            self._starts[key] = self._begin(before)
        return self._starts[key]

    def _begin(self, before: Sequence[TrialRow]) -> _Start:
        of_search = yardstick(before, self._study.trial_steps)
        candidates = find_candidates(before, self._space, lambda row: self._q(row, of_search))
        grids = tuple(Grid(candidate, self._space) for candidate in candidates)
        today = todays_candidate(before) if self._space.start_with else None
        ids = [candidate.config_id for candidate in candidates]
        return _Start(
            of_search=of_search,
            of_confirm=yardstick(before, self._confirm.steps),
            candidates=candidates,
            grids=grids,
            today=None if today is None else ids.index(today.config_id) or None,
            places=_places(grids),
        )

    def _results(self, finished: Mapping[TrialKey, TrialRow], measure: Yardstick) -> Results:
        return Results(finished, lambda row: self._q(row, measure), self._last_level)

    def _refitted(self, rows: Sequence[TrialRow], ids: frozenset[str]) -> Yardstick:
        """Return the yardstick after the ladder trials of some configurations, no others."""
        pair = ladder_seeds(self._confirm)
        kept = [
            row
            for row in rows
            if row.stage is not Stage.CONFIRM or (row.config_id in ids and row.seed_index in pair)
        ]
        key = frozenset((row.trial_id, row.attempt) for row in kept)
        if key not in self._refits:
            self._refits[key] = yardstick(kept, self._confirm.steps)
        return self._refits[key]

    def _last_level(self, row: TrialRow) -> float:
        return probe_levels(readings(row.summary, self._confirm.steps))[-1]

    def _q(self, row: TrialRow, measure: Yardstick) -> float | None:
        key = (row.trial_id, row.attempt, measure)
        if key not in self._scores:
            run = score_trial(row, measure)
            self._scores[key] = None if run is None else run.q
        return self._scores[key]

    # -------------------------------------------------------------------------- the looks

    def _judge(
        self,
        rows: Sequence[TrialRow],
        start: _Start,
        ladders: Ladders,
        results: Results,
        can_afford: Callable[[int], bool],
    ) -> Need | Verdict:
        """Take the first look, and the second where one is due."""
        first = self._first_look(rows, ladders, results)
        end = self._end_of_look(rows, first, ladders)
        if end is not None:
            return end
        more = _SecondLook.after(first, ladders, results, self._confirm.seeds)
        can_go_on = not more.wanted or can_afford(len(more.wanted))
        alpha = ALPHA_TWO_LOOKS if more.has_begun or can_go_on else ALPHA_ONE_LOOK
        choice = first.choose(alpha)
        is_settled = choice.reason is not ChoiceReason.TIED or choice.is_close
        if is_settled or alpha == ALPHA_ONE_LOOK:
            return self._stable(rows, first, choice, ladders)
        if more.wanted and can_go_on:
            return Need(trials=_trials(more.wanted, start))
        return self._look_again(rows, ladders, results, first, more)

    def _first_look(self, rows: Sequence[TrialRow], ladders: Ladders, results: Results) -> Look:
        """Compare the bases; the fastest too where none of them meets the bar any more."""

        def look(competing: Sequence[Rung]) -> Look:
            return take_look(
                rows_of_look(rows, self._confirm.seeds),
                self._study,
                results,
                rungs=ladders.confirmed,
                seeds_of=self._first_seeds(ladders),
                competing=[rung.config_id for rung in competing],
            )

        first = look(ladders.bases)
        # By the final yardstick a base may miss the bar that a rung which learned more meets.
        return first if first.met or ladders.fastest is None else look(ladders.confirmed)

    def _look_again(
        self,
        rows: Sequence[TrialRow],
        ladders: Ladders,
        results: Results,
        first: Look,
        more: _SecondLook,
    ) -> Verdict:
        """Take the second look, or what the budget left of it."""
        last = take_look(
            rows,
            self._study,
            results,
            rungs=ladders.confirmed,
            seeds_of=self._first_seeds(ladders) | more.seeds_of(),
            competing=first.met_ids,
        )
        end = self._end_of_look(rows, last, ladders)
        if end is not None:
            return end
        if more.wanted:
            return self._cut_short(rows, first, last, ladders)
        return self._stable(rows, last, last.choose(ALPHA_TWO_LOOKS), ladders)

    def _first_seeds(self, ladders: Ladders) -> dict[str, Sequence[int]]:
        return dict.fromkeys(ladders.confirmed_ids, range(self._confirm.seeds))

    def _end_of_look(
        self, rows: Sequence[TrialRow], look: Look, ladders: Ladders
    ) -> Verdict | None:
        """Return the verdict of a look that leaves nothing to choose from."""
        unfinished = ladders.unfinished
        if not look.measure.has_signal:
            return verdicts.no_signal(
                rows,
                look.measure,
                confirmed=ladders.confirmed_ids,
                unfinished=unfinished,
            )
        if not look.met:
            return verdicts.none_met_the_bar(rows, self._space, look, unfinished=unfinished)
        return None

    def _stable(
        self, rows: Sequence[TrialRow], look: Look, choice: Choice, ladders: Ladders
    ) -> Verdict:
        return verdicts.stable(rows, look, choice, ladders=ladders)

    def _cut_short(
        self, rows: Sequence[TrialRow], first: Look, last: Look, ladders: Ladders
    ) -> Verdict:
        """Keep what the first look showed, without those that new seeds have ruled out."""
        still = tuple(one for one in first.met if one.config_id in last.met_ids)
        look = replace(first, met=still)
        return verdicts.stable(
            rows,
            look,
            look.choose(ALPHA_TWO_LOOKS),
            ladders=ladders,
            more=(verdicts.CUT_SHORT,),
        )


def _trials(wanted: Iterable[tuple[Rung, int]], start: _Start) -> tuple[ConfirmTrial, ...]:
    return tuple(_trial(rung, seed, start.places) for rung, seed in wanted)


def _trial(rung: Rung, seed_index: int, places: Mapping[str, tuple[str, int]]) -> ConfirmTrial:
    candidate_id, octave = places[rung.config_id]
    return ConfirmTrial(
        settings=rung.settings,
        config_id=rung.config_id,
        candidate_id=candidate_id,
        octave=octave,
        seed_index=seed_index,
    )


def _places(grids: Sequence[Grid]) -> dict[str, tuple[str, int]]:
    """Say to which candidate's ladder, and where on it, each configuration belongs."""
    places: dict[str, tuple[str, int]] = {}
    for grid in grids:  # the better candidate first
        for octave in range(grid.lowest - 1, grid.octaves + 1):
            place = (grid.candidate.config_id, octave)
            places.setdefault(grid.rung(octave).config_id, place)
    return places
