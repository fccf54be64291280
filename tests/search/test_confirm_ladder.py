"""Which rungs of a ladder are run, on how many seeds, and which becomes the base."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from stability_search.records.trial import Outcome, TrialRow
from stability_search.records.verdict import Verdict, VerdictKind
from stability_search.search.confirm import ConfirmTrial, Need, next_need
from stability_search.space import Space
from stability_search.standing import ConfigurationStanding, configuration_standing
from stability_search.yardstick import yardstick
from tests.search.confirm_world import (
    Truth,
    config,
    executed,
    finish,
    make_space,
    searched,
)

RATE = 2.0**-6


def by_octave(truth: Callable[[int, int], float | Outcome]) -> Truth:
    """Let the truth depend on the octave above RATE and the seed."""

    def of_settings(settings: Mapping[str, Any], seed: int, _attempt: int) -> float | Outcome:
        return truth(round(math.log2(settings["learning_rate"] / RATE)), seed)

    return of_settings


def climb(
    space: Space, truth: Callable[[int, int], float | Outcome]
) -> tuple[Verdict, dict[int, int], list[TrialRow]]:
    """Confirm one candidate at RATE; return the verdict and the seeds run at each octave."""
    verdict, rows = finish(space, searched(space, (0.9, config(RATE))), by_octave(truth))
    counts = {round(math.log2(rate / RATE)): n for (rate, _), n in executed(rows).items()}
    return verdict, dict(sorted(counts.items())), rows


def octave_of(space: Space, config_id: str | None) -> int:
    """Return where a configuration lies above RATE."""
    octaves = {space.config_id(space.settings(config(RATE * 2.0**k))): k for k in range(-9, 9)}
    assert config_id is not None
    return octaves[config_id]


def standing_of(space: Space, rows: list[TrialRow], verdict: Verdict) -> ConfigurationStanding:
    """Score the choice as the report does."""
    settings = next(row.settings for row in rows if row.config_id == verdict.choice)
    return configuration_standing(
        rows,
        settings,
        study=space.study,
        yardstick=yardstick(rows, space.study.confirm.steps),
        seed_indices=range(space.study.confirm.seeds),
    )


def test_up_stops_at_the_first_dead_rung_and_down_once_s_no_longer_rises() -> None:
    """The run score falls slowly below the candidate and breaks two octaves above it."""
    space = make_space(top=1)
    q = {-3: 0.3, -2: 0.5, -1: 0.93, 0: 0.95, 1: 0.9}
    verdict, counts, _ = climb(space, lambda octave, _: q.get(octave, 0.0))
    # S with two seeds: octave 0 has the margin 1, octave -1 the margin 2.
    assert counts == {-2: 2, -1: 5, 0: 2, 1: 2, 2: 2}
    assert octave_of(space, verdict.choice) == -1


def test_a_candidate_at_the_edge_moves_down_until_the_margin_is_met() -> None:
    space = make_space(top=1)
    verdict, counts, rows = climb(
        space, lambda octave, _: 0.97 + 0.01 * octave if octave < 1 else 0
    )
    # Octave 0 has no margin, -1 has 1, -2 has 2, -3 has 3; at -4 nothing is gained but q is lost.
    assert counts == {-4: 2, -3: 5, -2: 2, -1: 2, 0: 2, 1: 2}
    assert octave_of(space, verdict.choice) == -3
    score = standing_of(space, rows, verdict).score
    assert (score.margin_octaves, score.margin_is_capped) == (3, False)  # it breaks at octave 1


def better_below(octave: int, _seed: int) -> float:
    """Be a little better below the candidate, and no better further down."""
    return 1.0 if octave < 0 else 0.95


def test_a_rung_below_that_could_not_raise_s_is_not_run() -> None:
    space = make_space(top=1)
    verdict, counts, _ = climb(space, lambda _octave, _seed: 1.0)
    assert counts == {0: 5, 1: 2, 2: 2, 3: 2}
    assert octave_of(space, verdict.choice) == 0
    verdict, counts, _ = climb(space, better_below)
    assert counts == {-1: 5, 0: 2, 1: 2, 2: 2, 3: 2}  # at -2 S could rise by .9 %
    assert octave_of(space, verdict.choice) == -1
    verdict, counts, _ = climb(space, lambda octave, _: 1.0 if octave < 0 else 0.9)
    assert counts == {-4: 5, -3: 2, -2: 2, -1: 2, 0: 2, 1: 2, 2: 2, 3: 2}  # by 1.8 %, and does


def test_where_two_rungs_score_alike_the_lower_rate_becomes_the_base() -> None:
    """Below the candidate S could rise, but does not."""
    space = make_space(top=1)
    verdict, counts, _ = climb(space, lambda _octave, _seed: 0.95)
    assert counts == {-1: 5, 0: 2, 1: 2, 2: 2, 3: 2}
    assert octave_of(space, verdict.choice) == -1


def test_a_rung_above_the_candidate_may_become_the_base_while_it_is_in_range() -> None:
    def truth(octave: int, _seed: int) -> float:
        return {-1: 0.3, 0: 0.6}.get(octave, 1.0 if octave <= 3 else 0.0)

    verdict, counts, _ = climb(make_space(top=1), truth)
    assert octave_of(make_space(), verdict.choice) == 1
    assert counts == {-1: 2, 0: 2, 1: 5, 2: 2, 3: 2}
    verdict, counts, _ = climb(make_space(top=1, high=1.5 * RATE), truth)
    assert octave_of(make_space(), verdict.choice) == 0
    assert counts == {-1: 2, 0: 5, 1: 2, 2: 2, 3: 2}


def test_down_ends_at_the_range_and_at_two_k() -> None:
    in_range = make_space(top=1, low=RATE / 5)
    _, counts, _ = climb(in_range, lambda _octave, _seed: 0.1)
    assert min(counts) == -2
    deep = make_space(top=1, octaves=1, low=1e-9)
    _, counts, _ = climb(deep, lambda octave, _: 0.1 if octave > -9 else 1.0)
    assert min(counts) == -2  # at most 2K


def test_nothing_is_run_above_a_dead_candidate() -> None:
    space = make_space(top=1)
    verdict, counts, _ = climb(space, lambda octave, _: 1.0 if octave <= -3 else 0.0)
    assert max(counts) == 0
    assert verdict.kind is VerdictKind.STABLE
    assert octave_of(space, verdict.choice) == -6


def test_with_one_seed_every_rung_has_one() -> None:
    space = make_space(top=1, seeds=1)
    _, counts, _ = climb(space, better_below)
    assert counts == {-1: 1, 0: 1, 1: 1, 2: 1, 3: 1}


def test_without_octaves_the_candidate_is_run_on_all_seeds_at_once() -> None:
    space = make_space(top=1, octaves=0, min_margin=0)
    rows = searched(space, (0.9, config(RATE)))
    need = next_need(rows, space, can_afford=lambda _: True)
    assert isinstance(need, Need)
    assert [trial.seed_index for trial in need.trials] == [0, 1, 2, 3, 4]
    verdict, counts, _ = climb(space, lambda _octave, _seed: 1.0)
    assert (verdict.kind, counts) == (VerdictKind.STABLE, {0: 5})
    verdict, counts, _ = climb(space, lambda octave, seed: 0.1 if octave == 0 == seed else 1.0)
    assert counts == {-1: 5, 0: 5}
    assert octave_of(space, verdict.choice) == -1


def test_a_base_that_misses_the_bar_with_all_seeds_moves_one_rung_down_once() -> None:
    space = make_space(top=1)

    def truth(octave: int, seed: int) -> float:
        return 0.2 if octave == -1 and seed == 3 else better_below(octave, seed)

    verdict, counts, rows = climb(space, truth)
    assert counts == {-2: 5, -1: 5, 0: 2, 1: 2, 2: 2, 3: 2}
    assert octave_of(space, verdict.choice) == -2
    assert len(verdict.confirmed) == 2
    pair = [row for row in rows if row.seed_index < 2 or row.config_id == verdict.choice]
    assert standing_of(space, pair, verdict).score.margin_octaves == 3

    verdict, counts, _ = climb(space, lambda octave, seed: 0.2 if seed == 3 else 1.0 - octave / 99)
    assert verdict.kind is VerdictKind.NONE
    assert sum(count == 5 for count in counts.values()) == 2  # once, not further down


def test_there_is_no_rung_to_fall_back_to_at_the_lower_end_of_the_range() -> None:
    space = make_space(top=1, low=RATE / 2)
    verdict, counts, _ = climb(
        space,
        lambda octave, seed: 0.0 if (octave, seed) == (-1, 4) else better_below(octave, seed),
    )
    assert counts == {-1: 5, 0: 2, 1: 2, 2: 2, 3: 2}
    assert (verdict.kind, verdict.exit_code) == (VerdictKind.NONE, 3)
    assert verdict.missed == ("4 of 5 seeds reached q >= 1/2",)


def test_a_fixed_learning_rate_has_no_rungs_below_and_is_its_own_base() -> None:
    space = make_space(low=RATE, high=RATE)
    rows = searched(space)
    need = next_need(rows, space, can_afford=lambda _: True)
    assert isinstance(need, Need)
    assert [(trial.octave, trial.seed_index) for trial in need.trials] == [
        (0, k) for k in range(5)
    ]
    verdict, rows = finish(space, rows, by_octave(lambda octave, _: 1.0 if octave < 2 else 0.0))
    assert list(executed(rows).values()) == [5, 2, 2]
    assert verdict.choice == space.config_id(space.settings({}))
    verdict, rows = finish(
        space, searched(space), by_octave(lambda octave, _: 1.0 if octave < 1 else 0.0)
    )
    assert verdict.exit_code == 3
    assert verdict.missed == ("survived 0 doublings of the learning rate, 1 asked for",)


@pytest.mark.parametrize("times", [1.3, 3.1, 5.7, 11.9, 97.3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_on_a_quadratic_the_margin_is_the_one_of_theory(times: float, momentum: float) -> None:
    """Gradient descent on w^2/2 is stable iff the rate is below 2*(1 + momentum)."""
    limit = 2 * (1 + momentum)
    rate = limit / times
    space = make_space(low=rate, high=rate, octaves=8, min_margin=0)
    verdict, rows = finish(
        space,
        searched(space),
        lambda settings, _seed, _attempt: (
            1.0 if settings["learning_rate"] < limit else Outcome.DIVERGED
        ),
    )
    score = standing_of(space, rows, verdict).score
    assert score.margin_octaves == math.ceil(math.log2(limit / rate)) - 1
    assert not score.margin_is_capped


def test_where_two_ladders_meet_a_rung_is_run_once_for_both() -> None:
    space = make_space(top=2)
    better, other = config(RATE * 4), config(RATE)
    rows = searched(space, (0.9, better), (0.7, other))
    verdict, rows = finish(space, rows, by_octave(lambda octave, _: 0.99 if octave < 4 else 0.0))
    confirm = [row for row in rows if row.candidate_id is not None]
    keys = [(row.config_id, row.seed_index) for row in confirm]
    assert len(keys) == len(set(keys))
    # Every rung within the better one's reach is its own, even those that only the other needs.
    assert {row.candidate_id for row in confirm} == {space.config_id(space.settings(better))}
    octaves = {round(math.log2(row.settings["learning_rate"] / RATE)) for row in confirm}  # type: ignore[operator]
    assert octaves == {-1, 0, 1, 2, 3, 4}
    assert all(
        row.octave == round(math.log2(row.settings["learning_rate"] / RATE)) - 2  # type: ignore[operator]
        for row in confirm
    )
    assert verdict.kind is VerdictKind.STABLE


def test_a_rungs_seeds_and_several_ladders_are_asked_for_together() -> None:
    space = make_space(top=3, start_with=(config(RATE, 3.0),))
    found = [(0.9, config(RATE)), (0.7, config(RATE, None)), (0.6, config(RATE, 2.0))]
    rows = searched(space, (0.1, config(RATE, 3.0)), *found)

    def asked(rows: list[TrialRow]) -> list[tuple[float | None, int, int]]:
        need = next_need(rows, space, can_afford=lambda _: True)
        assert isinstance(need, Need)
        trials: tuple[ConfirmTrial, ...] = need.trials
        return [(t.settings["clip_norm"], t.octave, t.seed_index) for t in trials]  # type: ignore[misc]

    assert asked(rows) == [(clip, 0, seed) for clip in (1.0, 3.0) for seed in (0, 1)]
    _, after = finish(space, rows, lambda *_: 0.9)
    first = [r for r in after if r.candidate_id is None or r.settings["clip_norm"] in (1.0, 3.0)]
    assert asked(first) == [(clip, 0, seed) for clip in (None, 2.0) for seed in (0, 1)]


def test_a_seed_without_a_result_misses_the_bar_and_is_tried_three_times() -> None:
    space = make_space(top=1)

    def truth(settings: Mapping[str, Any], seed: int, attempt: int) -> float | Outcome:
        if settings["learning_rate"] != RATE / 2 or seed != 4:
            return 1.0 if settings["learning_rate"] < RATE else 0.95
        return Outcome.INFRASTRUCTURE if attempt < lost else 0.9

    lost = 3
    verdict, rows = finish(space, searched(space, (0.9, config(RATE))), truth)
    assert octave_of(space, verdict.choice) == -1  # the third attempt counts
    assert sum(row.attempt > 1 for row in rows) == 2
    lost = 4
    verdict, rows = finish(space, searched(space, (0.9, config(RATE))), truth)
    assert octave_of(space, verdict.choice) == -2  # the next rung down
    assert sum(row.attempt > 1 for row in rows) == 2


def test_a_user_error_is_not_tried_again() -> None:
    space = make_space(top=1)
    verdict, counts, rows = climb(
        space,
        lambda octave, seed: (
            Outcome.USER_ERROR if (octave, seed) == (-1, 2) else better_below(octave, seed)
        ),
    )
    assert all(row.attempt == 1 for row in rows)
    assert octave_of(space, verdict.choice) == -2
    assert counts[-1] == 5


def test_a_base_is_chosen_by_the_yardstick_that_the_ladders_give() -> None:
    """A rung that learns more than any trial before makes the candidate's own rate look poor."""
    space = make_space(top=1)
    truth = {-1: 0.88, 0: 0.9, 1: 2.9, 2: 3.0, 3: 2.8, 4: 2.7}  # 3.0: E* falls from 1 to -.7
    verdict, counts, _ = climb(space, lambda octave, _: truth.get(octave, 0.2))
    # Walked by the yardstick with which confirm began, which would make octave -1 the base.
    assert counts == {-1: 2, 0: 2, 1: 5, 2: 5, 3: 2}
    assert verdict.kind is VerdictKind.STABLE
    assert octave_of(space, verdict.choice) == 1
    assert octave_of(space, verdict.fastest) == 2
