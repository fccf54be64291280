"""What confirm proves: looks, choice, budgets, warnings; and that order changes nothing."""
# ruff: noqa: S311 - dice for tests, not for secrets

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stability_search.records.trial import Outcome, Stage
from stability_search.records.verdict import ChoiceReason, Verdict, VerdictKind
from stability_search.search.confirm import (
    Confirmation,
    ConfirmTrial,
    Need,
    describe_cost,
    next_need,
)
from stability_search.search.verdicts import CUT_SHORT
from stability_search.space import Space
from tests.search.confirm_plays import CLIPS, RATE, by_clip, fixed_rungs, name, one_look, two
from tests.search.confirm_world import (
    CONFIRM_STEPS,
    Truth,
    config,
    executed,
    finish,
    key_of,
    make_space,
    row_of,
    searched,
    summary,
)

# ------------------------------------------------------------------------------------ looks


def test_at_a_single_look_five_agreeing_seeds_win() -> None:
    space = fixed_rungs(top=2)
    truth = by_clip(lambda clip, _: 0.95 if clip == 1.0 else 0.85)
    verdict, rows = finish(space, two(space), truth, can_afford=one_look)
    assert set(executed(rows).values()) == {2, 5}
    assert (verdict.kind, verdict.exit_code) == (VerdictKind.STABLE, 0)
    assert (verdict.choice, verdict.choice_reason) == (name(space, 1.0), ChoiceReason.WINNER)
    assert verdict.confirmed == (name(space, 1.0), name(space, 2.0))
    assert verdict.tied == ()


def test_with_budget_for_two_looks_the_second_names_the_winner() -> None:
    space = fixed_rungs(top=2)
    truth = by_clip(lambda clip, _: 0.95 if clip == 1.0 else 0.85)
    verdict, rows = finish(space, two(space), truth)
    assert executed(rows)[RATE / 2, 1.0] == executed(rows)[RATE / 2, 2.0] == 10
    assert verdict.choice_reason is ChoiceReason.WINNER


def test_the_second_look_is_left_out_where_the_two_best_are_close() -> None:
    space = fixed_rungs(top=2)
    truth = by_clip(lambda clip, _: 0.95 if clip == 1.0 else 0.94)
    verdict, rows = finish(space, two(space), truth)
    assert max(executed(rows).values()) == 5
    assert verdict.choice_reason is ChoiceReason.TIED
    assert verdict.tied == (name(space, 1.0), name(space, 2.0))


def test_the_second_look_is_asked_for_together_and_for_all() -> None:
    space = fixed_rungs(top=2)
    truth = by_clip(lambda clip, _: 0.95 if clip == 1.0 else 0.85)
    _, rows = finish(space, two(space), truth)
    first = [row for row in rows if row.seed_index < 5]
    need = next_need(first, space, can_afford=lambda count: count <= 10)
    assert isinstance(need, Need)
    assert [(t.settings["clip_norm"], t.seed_index) for t in need.trials] == [
        (clip, seed) for clip in (1.0, 2.0) for seed in range(5, 10)
    ]


def test_a_base_that_misses_the_bar_on_new_seeds_drops_out() -> None:
    space = fixed_rungs(top=2)
    truth = by_clip(lambda clip, seed: 0.85 if clip == 2.0 else 0.1 if seed == 7 else 0.95)
    verdict, _ = finish(space, two(space), truth)
    assert (verdict.choice, verdict.choice_reason) == (name(space, 2.0), ChoiceReason.ONLY)
    verdict, _ = finish(
        space, two(space), by_clip(lambda clip, seed: 0.1 if seed == 7 else 0.8 + (clip or 0) / 20)
    )
    assert (verdict.kind, verdict.exit_code) == (VerdictKind.NONE, 3)
    assert verdict.missed == ("9 of 10 seeds reached q >= 1/2",)


def test_a_second_look_cut_short_names_no_winner_and_never_goes_back_to_one_look() -> None:
    """Five seeds that agree would win at one look, but two had been decided on."""
    space = fixed_rungs(top=2)
    truth = by_clip(lambda clip, _: 0.95 if clip == 1.0 else 0.85)
    _, rows = finish(space, two(space), truth)
    started = [row for row in rows if row.seed_index < 7]
    verdict = next_need(started, space, can_afford=lambda _: False)  # type: ignore[assignment]
    assert verdict.choice_reason is ChoiceReason.TIED
    assert CUT_SHORT in verdict.warnings
    broken = [
        replace(row, summary=summary(Outcome.PRUNED, CONFIRM_STEPS))
        if row.seed_index == 6 and row.config_id == name(space, 1.0)
        else row
        for row in started
    ]
    verdict = next_need(broken, space, can_afford=lambda _: False)  # type: ignore[assignment]
    assert (verdict.choice, verdict.choice_reason) == (name(space, 2.0), ChoiceReason.ONLY)


def test_the_first_look_does_not_change_with_the_trials_of_the_second() -> None:
    """A later trial may move E*; what was decided before it stays decided."""
    space = fixed_rungs(top=2, seeds=6)
    truth = by_clip(
        lambda clip, seed: 2.2 if seed == 9 else (0.95 if clip == 1.0 or seed == 2 else 0.85)
    )
    verdict, rows = finish(space, two(space), truth)
    assert executed(rows)[RATE / 2, 1.0] == 12
    assert verdict.kind is VerdictKind.NONE  # Delta is 1.98 now, and .95 no longer 1/2
    assert verdict.missed[0] == "1 of 12 seeds reached q >= 1/2"


def test_a_seed_missing_anywhere_is_dropped_from_every_paired_test() -> None:
    space = make_space(low=RATE / 2, top=3, octaves=1)
    found = [(0.9 - k / 10, config(RATE, clip)) for k, clip in enumerate((1.0, 2.0, 3.0))]

    def truth(values: Mapping[str, Any], seed: int, _attempt: int) -> float | Outcome:
        if values["clip_norm"] == 3.0 and seed == 4:
            return Outcome.USER_ERROR
        return {1.0: 0.95, 2.0: 0.85, 3.0: 0.9}[values["clip_norm"]]

    def afford(spent: int, more: int) -> bool:
        return spent + more <= 36

    verdict, _ = finish(space, searched(space, *found), truth, can_afford=afford)
    assert verdict.choice_reason is ChoiceReason.TIED  # 4 seeds: 1/16
    assert name(space, 3.0) not in verdict.tied
    assert "4 seeds: not enough seeds to name a winner." in verdict.warnings


def test_the_fastest_has_the_lowest_last_probe_of_those_that_meet_the_bar() -> None:
    space = fixed_rungs(top=3)
    found = [(0.9 - k / 10, config(RATE, clip)) for k, clip in enumerate((1.0, 2.0, 3.0))]

    def truth(values: Mapping[str, Any], _seed: int, _attempt: int) -> float | Outcome:
        is_base = values["learning_rate"] < RATE
        if values["clip_norm"] == 2.0:  # learns most, without margin beyond one doubling
            return 1.1 if values["learning_rate"] <= RATE else Outcome.DIVERGED
        if values["clip_norm"] == 3.0:
            return 1.2 if is_base else 0.0  # learns more still, but misses the bar
        return 0.97 if is_base else 0.95

    verdict, _ = finish(space, searched(space, *found), truth)
    assert verdict.choice == name(space, 1.0)
    assert verdict.fastest == name(space, 2.0)


def test_a_rung_that_ends_clearly_lower_than_every_base_gets_all_seeds_and_does_not_compete() -> (
    None
):
    space = make_space(top=1)
    found = searched(space, (0.9, config(RATE)))

    def truth(values: Mapping[str, Any], seed: int, _attempt: int) -> float | Outcome:
        rate = values["learning_rate"]
        if rate > 4 * RATE:
            return Outcome.DIVERGED
        if rate == 2 * RATE:  # learns most, and has a margin of one doubling
            return 0.1 if seed == bad_seed else 1.08
        return {0.5: 0.96, 0.25: 0.8}.get(rate / RATE, 0.95)

    bad_seed = 9
    verdict, rows = finish(space, found, truth)
    counts = {rate / RATE: count for (rate, _), count in executed(rows).items()}
    assert counts == {0.25: 2, 0.5: 5, 1.0: 2, 2.0: 5, 4.0: 2, 8.0: 2}
    assert (verdict.choice, verdict.choice_reason) == (name(space, 1.0), ChoiceReason.ONLY)
    assert verdict.fastest == name(space, 1.0, 2 * RATE)
    assert verdict.confirmed == (name(space, 1.0), name(space, 1.0, 2 * RATE))
    bad_seed = 4
    verdict, _ = finish(space, found, truth)
    assert verdict.fastest == verdict.choice == name(space, 1.0)


# ------------------------------------------------------------------- which ladders are climbed


def test_candidates_that_could_not_beat_the_first_are_spared_and_named() -> None:
    space = fixed_rungs(top=3)
    found = [(0.9 - k / 10, config(RATE, clip)) for k, clip in enumerate((1.0, 2.0, 3.0))]
    rows = searched(space, *found)
    verdict, after = finish(space, rows, lambda *_: 1.0)
    assert (verdict.choice, verdict.choice_reason) == (name(space, 1.0, RATE), ChoiceReason.ONLY)
    assert verdict.spared == (name(space, 2.0, RATE), name(space, 3.0, RATE))
    assert verdict.unfinished == ()
    assert {clip for _, clip in executed(after)} == {1.0}
    assert len(after) - len(rows) == 2 * 4 + 3
    verdict, after = finish(space, rows, lambda *_: 0.97)  # 5 % below the ceiling, rungs included
    assert verdict.spared == ()
    assert {clip for _, clip in executed(after)} == {1.0, 2.0, 3.0}


def test_todays_configuration_is_always_tried_and_climbed_first_only_if_it_lives() -> None:
    space = make_space(low=RATE / 2, top=1, start_with=(config(RATE, 2.0),))
    rows = searched(space, (0.5, config(RATE, 2.0)), (0.9, config(RATE, 1.0)))
    verdict, after = finish(space, rows, by_clip(lambda clip, _: 1.02 if clip == 1.0 else 0.3))
    assert executed(after)[RATE, 2.0] == 2
    assert {rate for rate, clip in executed(after) if clip == 2.0} == {RATE}
    assert verdict.spared == (name(space, 2.0, RATE),)
    verdict, after = finish(space, rows, by_clip(lambda clip, _: 1.02 if clip == 1.0 else 0.9))
    assert max(count for (_, clip), count in executed(after).items() if clip == 2.0) >= 5
    assert verdict.spared == ()
    # Where the first can be beaten, what lies below today's rate may be what beats it.
    verdict, after = finish(space, rows, by_clip(lambda clip, _: 0.8 if clip == 1.0 else 0.3))
    assert executed(after)[RATE / 2, 2.0] == 2
    assert verdict.spared == (name(space, 2.0, RATE),)  # it misses the bar whatever more shows
    verdict, after = finish(space, rows, lambda *_: 0.3)
    assert verdict.spared == ()  # nothing meets the bar: what came closest is worth knowing
    assert len(verdict.confirmed) == 4  # of both ladders the base and the rung below it


def by_octave_and_clip(truth: Callable[[int, float | None, int], float | Outcome]) -> Truth:
    """Let the truth depend on the octave above RATE, the clip norm and the seed."""

    def of_settings(values: Mapping[str, Any], seed: int, _attempt: int) -> float | Outcome:
        octave = round(math.log2(values["learning_rate"] / RATE))
        return truth(octave, values["clip_norm"], seed)

    return of_settings


def test_a_ladder_whose_fallback_may_meet_the_bar_is_not_hopeless() -> None:
    """Both bases miss the bar; the rungs below, which nobody has tried, meet it."""
    space = make_space(top=2, octaves=1)
    truth = by_octave_and_clip(
        lambda octave, clip, _: {0: 0.3, -1: 0.4, -2: 0.6}.get(
            octave, 0.0 if octave > 0 else 0.9 + (clip or 0) / 40
        )
    )
    orders: tuple[Callable[[tuple[ConfirmTrial, ...]], Sequence[ConfirmTrial]], ...] = (
        lambda trials: trials[:1],
        lambda trials: trials[-1:],
        lambda trials: trials,
    )
    for pick in orders:
        verdict, rows = finish(space, two(space), truth, pick=pick)
        assert verdict.choice == name(space, 2.0, RATE / 8)
        assert verdict.spared == ()
        assert sum(executed(rows).values()) == 42


def test_a_lost_seed_of_the_fastest_weakens_no_test_between_the_bases() -> None:
    space = make_space(top=2)

    def truth(octave: int, clip: float | None, seed: int) -> float | Outcome:
        if clip == 2.0:
            return 0.8 if octave <= 3 else 0.0
        if octave == 1:
            return Outcome.USER_ERROR if seed == 3 else 1.1
        return 0.95 if octave <= 0 else {2: 0.7, 3: 0.6}.get(octave, 0.0)

    verdict, rows = finish(
        space, two(space), by_octave_and_clip(truth), can_afford=lambda _, more: more < 10
    )
    assert executed(rows)[2 * RATE, 1.0] == 5
    assert verdict.choice_reason is ChoiceReason.WINNER


def test_where_no_base_meets_the_bar_any_more_the_fastest_may_be_the_choice() -> None:
    """It learns more than anything before, so that the base is less than half of it."""
    space = make_space(top=1)
    rates = {1: 2.3, 2: 2.0, 3: 1.5}
    verdict, _ = finish(
        space,
        searched(space, (1.0, config(RATE))),
        by_octave_and_clip(lambda octave, _clip, _: rates.get(octave, 0.0 if octave > 3 else 1.0)),
    )
    assert (verdict.choice, verdict.choice_reason) == (
        name(space, 1.0, 2 * RATE), ChoiceReason.ONLY,
    )  # fmt: skip


@pytest.mark.parametrize(("limit", "exit_code"), [(13, 6), (14, 3), (30, 3), (31, 0)])
def test_a_hopeless_first_candidate_is_finished_before_others_spend_what_it_needs(
    limit: int, exit_code: int
) -> None:
    space = make_space(top=2, octaves=1, low=RATE / 4.5, start_with=(config(RATE, 3.0),))
    found = [(0.5, config(RATE, 3.0)), (0.95, config(RATE, 1.0)), (0.9, config(RATE, 2.0))]
    verdict, _ = finish(
        space,
        searched(space, *found),
        by_octave_and_clip(lambda _octave, clip, _: 0.8 if clip == 3.0 else 0.3),
        can_afford=lambda spent, more: spent + more <= limit,
    )
    assert verdict.exit_code == exit_code


# ---------------------------------------------------------------------- order is no matter


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Space, list[Any], Truth]:
    """Draw a space, a search, and a truth with cliffs, dull rates, bad seeds and lost ones."""
    space = make_space(
        low=RATE / draw(st.sampled_from([1, 3, 40])),
        high=RATE * 5,
        top=draw(st.integers(1, 3)),
        seeds=draw(st.sampled_from([1, 2, 3, 5])),
        octaves=draw(st.integers(1, 3)),
        trial_steps=draw(st.sampled_from([20, CONFIRM_STEPS])),
        start_with=draw(st.sampled_from([(), (config(RATE),)])),
    )
    points = st.tuples(
        st.floats(0, 1), st.sampled_from([RATE, RATE * 2, RATE * 3]), st.sampled_from(CLIPS)
    )
    found = [(q, config(rate, clip)) for q, rate, clip in draw(st.lists(points, max_size=4))]
    rows = searched(space, (Outcome.PRUNED, config(RATE)), *found)
    cliffs = {clip: RATE * 2.0 ** draw(st.integers(-3, 4)) for clip in CLIPS}
    slack = draw(st.floats(0, 0.2))
    odd = draw(st.sets(st.integers(0, 9), max_size=2))
    seed = draw(st.integers(0, 99))

    def truth(values: Mapping[str, Any], seed_index: int, attempt: int) -> float | Outcome:
        noise = random.Random(repr((seed, sorted(values.items(), key=str), seed_index)))
        if seed_index in odd and noise.random() < 0.3:
            return Outcome.INFRASTRUCTURE if attempt < 1 + noise.randrange(4) else 0.7
        if values["learning_rate"] > cliffs[values["clip_norm"]]:
            return noise.choice([Outcome.DIVERGED, Outcome.OUT_OF_MEMORY, 0.0])
        if noise.random() < 0.1:
            return noise.choice([Outcome.USER_ERROR, Outcome.PRUNED, 0.3, 1.6])
        return 1.0 - slack * noise.random()

    return space, rows, truth


class Machine:
    """Runs several trials at once, and lets them end in any order."""

    def __init__(self, slots: int, seed: int) -> None:
        self._random = random.Random(seed)
        self._slots = slots
        self._running: dict[tuple[str, int], ConfirmTrial] = {}

    def pick(self, trials: tuple[ConfirmTrial, ...]) -> Sequence[ConfirmTrial]:
        """Start what fits, and end one of the running trials."""
        wanted = {key_of(trial) for trial in trials}
        assert set(self._running) <= wanted, "a running trial is no longer needed"
        for trial in trials:
            if len(self._running) < self._slots:
                self._running.setdefault(key_of(trial), trial)
        key = self._random.choice(sorted(self._running))
        return (self._running.pop(key),)


@given(world=worlds(), slots=st.integers(1, 7), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
def test_running_in_parallel_runs_the_same_trials_to_the_same_verdict(
    world: tuple[Space, list[Any], Truth], slots: int, seed: int
) -> None:
    space, rows, truth = world
    verdict, after = finish(space, rows, truth)
    other, others = finish(space, rows, truth, pick=Machine(slots, seed).pick)
    assert other == verdict
    assert {(r.trial_id, r.attempt) for r in others} == {(r.trial_id, r.attempt) for r in after}
    assert {(r.trial_id, r.candidate_id, r.octave) for r in others} == {
        (r.trial_id, r.candidate_id, r.octave) for r in after
    }
    assert len(after) - len(rows) <= 3 * describe_cost(space).max_trials


@given(world=worlds(), cut=st.floats(0, 1), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
def test_any_prefix_in_any_order_resumes_to_the_same_verdict(
    world: tuple[Space, list[Any], Truth], cut: float, seed: int
) -> None:
    space, rows, truth = world
    verdict, after = finish(space, rows, truth)
    num_kept = len(rows) + int(cut * (len(after) - len(rows)))
    kept = after[:num_kept]
    random.Random(seed).shuffle(kept)
    confirmation = Confirmation(space)
    while not isinstance(
        answer := confirmation.next_need(kept, can_afford=lambda _: True), Verdict
    ):
        trial = answer.trials[-1]
        attempt = 1 + sum(
            (r.config_id, r.seed_index) == key_of(trial) for r in kept if r.stage is Stage.CONFIRM
        )
        end = truth(trial.settings, trial.seed_index, attempt)
        kept.append(row_of(trial, end, CONFIRM_STEPS, attempt))
    assert answer == verdict
    random.Random(seed).shuffle(after)
    assert next_need(after, space, can_afford=lambda _: True) == verdict


@given(world=worlds())
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
def test_what_is_called_stable_meets_the_bar(world: tuple[Space, list[Any], Truth]) -> None:
    space, rows, truth = world
    verdict, after = finish(space, rows, truth)
    assert Verdict.from_json(verdict.to_json()) == verdict
    if verdict.kind is VerdictKind.STABLE:
        own = [r for r in after if r.stage is Stage.CONFIRM and r.config_id == verdict.choice]
        assert {r.seed_index for r in own} >= set(range(space.study.confirm.seeds))
        last = [r for r in own if r.summary.outcome is not Outcome.INFRASTRUCTURE]
        assert {r.summary.outcome for r in last} == {Outcome.COMPLETED}
        low, high = space.learning_rate_range()
        assert low <= float(own[0].settings["learning_rate"]) <= high  # type: ignore[arg-type]
    else:
        assert (verdict.exit_code, verdict.choice) == (3, None)
        assert verdict.reason
