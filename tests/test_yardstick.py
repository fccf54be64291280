"""E_0, E*, Delta, sigma and signal: every branch in exact numbers."""

import dataclasses
import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stability_search import yardstick as yardsticks
from stability_search.records.trial import Outcome, Stage, TrialRow, TrialSummary
from stability_search.yardstick import (
    GrowingYardstick,
    Yardstick,
    is_finite_run,
    pilot_yardstick,
    probe_steps,
    readings,
    refused,
    score_completed,
    yardstick,
)

T = 40
START = 4.0
BATCHES = (-0.2, -0.1, 0.1, 0.2)  # spread of a reading over four probe batches


def trial(  # noqa: PLR0913 - a row in one line per test
    name: str,
    stage: Stage,
    last: float | None,
    *,
    horizon: int = T,
    first: float | None = START,
    batches: tuple[float, ...] = BATCHES,
    num_bad: int = 0,
    **changes: object,
) -> TrialRow:
    """Return a trial whose probe reads `first` before the first step and `last` ever after."""
    steps = probe_steps(horizon)
    probes = (first, *[last] * (len(steps) - 1))
    fields: dict[str, Any] = {
        "outcome": Outcome.COMPLETED,
        "num_planned_steps": horizon,
        "num_steps": horizon,
        "num_judged_steps": horizon,
        "num_bad_steps": num_bad,
        "judged_losses": (2.0,) * horizon,
        "judged_steps": tuple(range(1, horizon + 1)),
        "bad_steps": tuple(range(1, num_bad + 1)),
        "probe_steps": steps,
        "probe_losses": probes,
        "probe_batch_losses": tuple(
            tuple(None if p is None else p + b for b in batches) for p in probes
        ),
        **changes,
    }
    return TrialRow(
        trial_id=name,
        stage=stage,
        index=0,
        config_id=name,
        seed=0,
        settings={"learning_rate": 0.1},
        summary=TrialSummary(**fields),
    )


def pilot(last: float | None, name: str = "p0", **changes: object) -> TrialRow:
    return trial(name, Stage.PILOT, last, **changes)


def search(last: float | None, name: str = "s0", **changes: object) -> TrialRow:
    return trial(name, Stage.SEARCH, last, **changes)


# ------------------------------------------------------------------------------- readings


def test_the_probe_is_read_at_every_tenth_rounded_up() -> None:
    assert probe_steps(200) == (0, 20, 40, 60, 80, 100, 120, 140, 160, 180, 200)
    assert probe_steps(25) == (0, 3, 5, 8, 10, 13, 15, 18, 20, 23, 25)
    assert probe_steps(20, 40) == (0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 24, 28, 32, 36, 40)
    assert probe_steps(0) == (0,)


def two_horizons(**changes: object) -> TrialSummary:
    """Return a pilot trial of 40 steps, read at the tenths of 20 and 40; a reading is its step."""
    steps = probe_steps(20, 40)
    fields: dict[str, Any] = {
        "outcome": Outcome.COMPLETED,
        "num_planned_steps": 40,
        "num_steps": 40,
        "probe_steps": steps,
        "probe_losses": tuple(float(step) for step in steps),
        **changes,
    }
    return TrialSummary(**fields)


def test_readings_are_those_of_the_horizon_asked_for() -> None:
    assert readings(two_horizons(), 20) == tuple(float(step) for step in range(0, 21, 2))
    assert readings(two_horizons(), 40) == tuple(float(step) for step in range(0, 41, 4))


def test_readings_that_were_not_taken_are_none() -> None:
    ended_early = two_horizons(probe_losses=(1.0, 2.0, None))
    assert readings(ended_early, 20) == (1.0, 2.0, *[None] * 9)
    assert readings(two_horizons(), 400)[1:] == (40.0, *[None] * 9)
    assert readings(TrialSummary(outcome=Outcome.USER_ERROR, num_planned_steps=20), 20) == (
        (None,) * 11
    )


@pytest.mark.parametrize(
    ("changes", "is_finite"),
    [
        ({}, True),
        ({"outcome": Outcome.PRUNED}, False),
        ({"probe_losses": (1.0,) * 15}, False),
        ({"probe_losses": (*[1.0] * 15, None)}, False),
        ({"probe_steps": (), "probe_losses": ()}, False),
    ],
)
def test_a_finite_run_completed_with_every_probe_finite(
    changes: dict[str, Any], is_finite: bool
) -> None:
    assert is_finite_run(two_horizons(**changes)) is is_finite


def test_a_longer_trial_is_scored_by_the_steps_of_the_shorter_horizon() -> None:
    # 20 attempted steps are 18 judged ones; the only bad step up to there is step 7.
    judged = tuple(step for step in range(1, 41) if step not in {3, 4})
    losses = tuple(2.0 if step < 20 else 50.0 for step in judged)
    summary = two_horizons(
        probe_losses=(9.0, *[1.0] * 15),
        num_judged_steps=38,
        num_bad_steps=3,
        judged_steps=judged,
        judged_losses=losses,
        bad_steps=(7, 21, 22),
    )
    short = score_completed(summary, horizon=20, e0=9.0, delta=8.0)
    assert short.calm == 2.0 ** (-(1 / 18) / 0.02)
    assert short.num_spikes == 0  # the jump at step 20 has nothing after it within the horizon
    long = score_completed(summary, horizon=40, e0=9.0, delta=8.0)
    assert long.calm == 2.0 ** (-(3 / 38) / 0.02)
    assert long.num_spikes == 3


def test_bad_steps_of_unknown_place_all_count() -> None:
    judged = tuple(range(1, 41))
    summary = two_horizons(
        probe_losses=(9.0, *[1.0] * 15),
        num_judged_steps=40,
        num_bad_steps=2,
        judged_steps=judged,
        judged_losses=(2.0,) * 40,
    )
    score = score_completed(summary, horizon=20, e0=9.0, delta=8.0)
    assert score.calm == 2.0 ** (-(2 / 20) / 0.02)


def test_without_step_numbers_the_first_judged_steps_stand_in() -> None:
    summary = two_horizons(
        probe_losses=(9.0, *[1.0] * 15),
        num_judged_steps=40,
        num_bad_steps=1,
        judged_losses=(2.0,) * 20 + (50.0,) * 20,
    )
    score = score_completed(summary, horizon=20, e0=9.0, delta=8.0)
    assert (score.calm, score.num_spikes) == (2.0 ** (-(1 / 20) / 0.02), 0)


# ------------------------------------------------------------------------------------ E_0


@pytest.mark.parametrize(
    ("measured", "e0", "source"),
    [
        ({}, 4.0, "start"),
        ({"baseline": 3.0}, 3.0, "baseline"),
        ({"baseline": 5.0}, 4.0, "start"),
        ({"blind_loss": 3.5}, 3.5, "blind"),
        ({"blind_loss": 4.5}, 4.0, "start"),
        ({"baseline": 3.9, "blind_loss": 3.0}, 3.9, "baseline"),  # no blind run beside a baseline
        ({"first": None, "blind_loss": 3.0}, 3.0, "blind"),
        ({"first": None}, None, ""),
    ],
)
def test_e0_is_the_smallest_finite_of_its_sources(
    measured: dict[str, Any], e0: float | None, source: str
) -> None:
    measure = yardstick([pilot(1.0, **measured)], T)
    assert (measure.e0, measure.e0_source) == (e0, source)


def test_the_baseline_measured_in_one_pilot_trial_holds_for_all() -> None:
    rows = [pilot(1.0, "p0"), pilot(2.0, "p1", baseline=3.0), pilot(None, "p2")]
    assert yardstick(rows, T).e0 == 3.0


def test_trials_of_other_stages_say_nothing_about_e0() -> None:
    rows = [pilot(1.0), search(2.0, first=0.1, baseline=0.2, blind_loss=0.3)]
    assert yardstick(rows, T).e0 == START


@pytest.mark.parametrize(
    ("measured", "asks"),
    [({"blind_loss": 3.5}, True), ({"blind_loss": 3.7}, False), ({"baseline": 3.5}, False)],
)
def test_a_start_that_ignoring_the_input_beats_asks_for_a_baseline(
    measured: dict[str, Any], asks: bool
) -> None:
    row = pilot(1.0, blind_batch_losses=(3.0, 3.0, 4.0, 4.0), **measured)
    warnings = yardstick([row], T).warnings
    assert [("give the task a `baseline()`" in one) for one in warnings] == [True] * asks


def test_a_blind_run_that_gave_nothing_is_warned_of() -> None:
    (warning,) = yardstick([pilot(1.0, has_measured_blind_run=True)], T).warnings
    assert "ignores its input gave no finite probe loss" in warning


def test_a_blind_run_that_was_never_made_is_not_said_to_have_failed() -> None:
    (warning,) = yardstick([pilot(1.0)], T).warnings
    assert "Neither `baseline()` nor the blind run was measured" in warning


# ------------------------------------------------------------------------------------- E*


def test_the_pilot_gives_its_lowest_finite_level() -> None:
    rows = [
        pilot(2.0, "p0"),
        pilot(1.0, "p1"),
        pilot(0.1, "p2", outcome=Outcome.PRUNED),
        pilot(None, "p3"),
    ]
    measure = yardstick(rows, T)
    assert (measure.e_star, measure.delta, measure.has_signal) == (1.0, 3.0, True)


@pytest.mark.parametrize(("last", "e_star"), [(0.71, 1.0), (0.7, 1.0), (0.69, 0.69), (2.0, 1.0)])
def test_a_trial_moves_e_star_only_by_more_than_a_tenth_of_the_pilots_progress(
    last: float, e_star: float
) -> None:
    assert yardstick([pilot(1.0), search(last)], T).e_star == e_star


def test_the_lowest_of_the_trials_that_qualify_is_taken() -> None:
    rows = [pilot(1.0), search(0.5, "a"), search(0.3, "b"), search(0.1, "c", num_bad=2)]
    assert yardstick(rows, T).e_star == 0.3


@pytest.mark.parametrize(
    ("changes", "qualifies"),
    [
        ({}, True),
        ({"horizon": 80}, False),
        ({"outcome": Outcome.TIMED_OUT}, False),
        ({"num_bad": 1}, False),  # A = 2^-(1/40/.02) = .42
        ({"num_judged_steps": 50, "num_bad": 1}, True),  # A = .5
        ({"are_parameters_finite": False}, False),  # C = 0
        ({"judged_losses": (*[2.0] * 30, 9.0, 9.0, *[2.0] * 8)}, False),  # B = 2^-2.5
        ({"judged_losses": (*[2.0] * 30, 9.0, *[2.0] * 9)}, True),  # a single jump is no spike
        ({"probe_losses": (4.0, *[0.1] * 5, None, *[0.1] * 4)}, False),
        ({"probe_losses": (4.0, *[-9.0] * 6, *[0.1] * 4)}, False),  # C = 0: lost what it gained
    ],
)
def test_what_a_trial_must_do_to_qualify(changes: dict[str, Any], qualifies: bool) -> None:
    rows = [pilot(1.0), search(0.1, **changes)]
    assert yardstick(rows, T).e_star == (0.1 if qualifies else 1.0)


def test_without_a_finite_pilot_run_the_trials_alone_give_e_star() -> None:
    rows = [pilot(None), search(2.0, "a"), search(1.5, "b", num_bad=1)]
    measure = yardstick(rows, T)
    assert (measure.e0, measure.e_star, measure.delta) == (START, 2.0, 2.0)
    # B and C need a Delta, which there is none of yet: spikes do not disqualify here.
    spiky = search(1.0, "c", judged_losses=(*[2.0] * 30, 9.0, 9.0, *[2.0] * 8))
    assert yardstick([*rows, spiky], T).e_star == 1.0


def test_a_pilot_that_learned_nothing_gives_way_to_any_lower_trial() -> None:
    rows = [pilot(4.5), search(4.4)]
    assert yardstick(rows, T).e_star == 4.4
    assert yardstick(rows, T).delta is None
    assert yardstick([pilot(4.5), search(1.0)], T).delta == 3.0


def test_confirm_trials_of_the_horizon_count_and_others_do_not() -> None:
    rows = [pilot(1.0, horizon=80), trial("c0", Stage.CONFIRM, 0.2, horizon=80), search(0.1)]
    assert yardstick(rows, 80).e_star == 0.2
    assert pilot_yardstick(rows, 80).e_star == 1.0


def test_one_pilot_serves_both_horizons() -> None:
    row = pilot(1.0)
    summary = two_horizons(probe_losses=tuple(4.0 - 0.05 * s for s in probe_steps(20, 40)))
    rows = [dataclasses.replace(row, summary=summary)]
    assert yardstick(rows, 20).e_star == pytest.approx(4.0 - 0.05 * 18)
    assert yardstick(rows, 40).e_star == pytest.approx(4.0 - 0.05 * 36)


def test_no_rows_give_no_yardstick() -> None:
    assert yardstick([], T) == Yardstick(
        horizon=T, e0=None, e0_source="", e_star=None, delta=None, sigma=0.0, has_signal=False
    )


# ------------------------------------------------------------------------- sigma and signal


def test_sigma_of_a_bare_number_is_that_of_the_best_run_alone() -> None:
    measure = yardstick([pilot(1.0, baseline=3.0)], T)
    spread = math.sqrt(sum(b * b for b in BATCHES) / 3)
    assert measure.sigma == pytest.approx(spread / 2, rel=1e-12)


def test_sigma_of_the_start_is_that_of_the_paired_difference() -> None:
    assert yardstick([pilot(1.0)], T).sigma == pytest.approx(0.0, abs=1e-12)  # same spread twice
    row = pilot(1.0)
    start = tuple(START + b for b in (0.4, -0.4, 0.4, -0.4))
    batches = (start, *row.summary.probe_batch_losses[1:])
    row = dataclasses.replace(
        row, summary=dataclasses.replace(row.summary, probe_batch_losses=batches)
    )
    differences = [s - 1.0 - b for s, b in zip(start, BATCHES, strict=True)]
    mean = sum(differences) / 4
    spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / 3)
    assert yardstick([row], T).sigma == pytest.approx(spread / 2, rel=1e-12)


def test_sigma_of_the_blind_run_uses_its_own_batches() -> None:
    blind = (3.1, 2.9, 3.0, 3.0)
    measure = yardstick([pilot(1.0, blind_loss=3.0, blind_batch_losses=blind)], T)
    differences = [e0 - 1.0 - b for e0, b in zip(blind, BATCHES, strict=True)]
    spread = math.sqrt(sum((d - 2.0) ** 2 for d in differences) / 3)
    assert measure.sigma == pytest.approx(spread / 2, rel=1e-12)


def test_sigma_reads_the_batches_of_the_reading_that_is_the_level() -> None:
    """Readings 8, 9, 10 are 1.2, 1.0, 1.1: the level is the last, and only its batches count."""
    row = pilot(1.0, baseline=3.0)
    probes = (*row.summary.probe_losses[:8], 1.2, 1.0, 1.1)
    batches = (*[(1.0,) * 4] * 8, (9.0, 0.0, 0.0, 0.0), (0.0, 9.0, 0.0, 0.0), (1.0, 1.0, 1.2, 1.2))
    summary = dataclasses.replace(row.summary, probe_losses=probes, probe_batch_losses=batches)
    measure = yardstick([dataclasses.replace(row, summary=summary)], T)
    assert measure.e_star == 1.1
    assert measure.sigma == pytest.approx(math.sqrt(4 * 0.01 / 3) / 2, rel=1e-12)


def test_fewer_than_four_probe_batches_give_no_sigma_and_a_warning() -> None:
    measure = yardstick([pilot(1.0, baseline=3.0, batches=(-0.1, 0.0, 0.1))], T)
    assert measure.sigma == 0
    (warning,) = measure.warnings
    assert warning.startswith("The probe gave 3 batches to compare; with fewer than 4 its noise")


@pytest.mark.parametrize(
    ("last", "batches", "has_signal"),
    [
        (3.99, (0.0,) * 4, True),
        (3.9959, (0.0,) * 4, True),
        (3.9961, (0.0,) * 4, False),  # Delta = .0039 < 1e-3 * 4
        (4.0, (0.0,) * 4, False),
        (4.1, (0.0,) * 4, False),
        (3.0, (-0.5, -0.5, 0.5, 0.5), True),  # sigma = .289, three of it .866
        (3.2, (-0.5, -0.5, 0.5, 0.5), False),
    ],
)
def test_a_signal_stands_out_from_rounding_and_from_the_probes_noise(
    last: float, batches: tuple[float, ...], has_signal: bool
) -> None:
    measure = yardstick([pilot(last, baseline=4.0, first=5.0, batches=batches)], T)
    assert measure.has_signal is has_signal


def test_a_refused_yardstick_has_no_delta() -> None:
    measure = yardstick([pilot(1.0)], T)
    assert measure.delta == 3.0
    assert (refused(measure).delta, refused(measure).has_signal) == (None, False)
    assert refused(measure).e_star == measure.e_star


# ------------------------------------------------------------------------------ properties


@given(
    st.lists(
        st.tuples(
            st.sampled_from([Stage.PILOT, Stage.SEARCH]),
            st.none() | st.floats(-1.7e308, 1.7e308),
            st.none() | st.floats(-1.7e308, 1.7e308),
            st.integers(0, 3),
        ),
        max_size=6,
    ),
    st.randoms(use_true_random=False),
)
def test_any_rows_in_any_order_give_one_finite_yardstick(
    specs: list[tuple[Stage, float | None, float | None, int]], order: random.Random
) -> None:
    rows = [
        trial(f"t{i}", stage, last, first=first, num_bad=num_bad, batches=(0.0, 1.0, 2.0, 3.0))
        for i, (stage, last, first, num_bad) in enumerate(specs)
    ]
    measure = yardstick(rows, T)
    for value in (measure.e0, measure.e_star, measure.delta, measure.sigma):
        assert value is None or math.isfinite(value)
    assert measure.delta is None or measure.delta > 0
    order.shuffle(rows)
    assert yardstick(rows, T) == measure


@given(st.lists(st.floats(0.5, 3.9), min_size=1, max_size=6))
def test_more_trials_never_raise_e_star(levels: list[float]) -> None:
    rows = [pilot(2.0), *[search(level, f"s{i}") for i, level in enumerate(levels)]]
    stars = [yardstick(rows[: n + 1], T).e_star for n in range(len(rows))]
    assert all(star is not None for star in stars)
    assert stars == sorted(stars, reverse=True)  # type: ignore[type-var]


# ------------------------------------------------------------------------------- growing

LEVELS = (None, 0.5, 1.0, 1.0, 1.2, 2.0, 3.5, START, 5.0)


@st.composite
def any_trial(draw: st.DrawFn) -> TrialRow:
    """Draw a row of any stage and horizon, sound or not; levels tie often."""
    stage = draw(st.sampled_from([Stage.PILOT, Stage.SEARCH, Stage.SEARCH, Stage.CONFIRM]))
    row = trial(
        "",
        stage,
        draw(st.sampled_from(LEVELS)),
        horizon=draw(st.sampled_from([T, T, T, 2 * T, T // 2])),
        first=draw(st.sampled_from([None, START, 3.0])),
        batches=draw(st.sampled_from([BATCHES, (-0.4, 0.0, 0.1, 0.3)])),
        num_bad=draw(st.sampled_from([0, 0, 0, 2, T // 2])),
        outcome=draw(st.sampled_from([Outcome.COMPLETED] * 4 + [Outcome.PRUNED])),
        baseline=draw(st.sampled_from([None, None, 3.8])),
        blind_loss=draw(st.sampled_from([None, 3.6])),
        has_measured_blind_run=draw(st.booleans()),
    )
    if not draw(st.booleans()):
        return row
    spikes = (2.0,) * 20 + (9.0, 9.0) * 3  # lasts: not smooth enough to set E*
    losses = (spikes + (2.0,) * T)[: len(row.summary.judged_losses)]
    return dataclasses.replace(row, summary=dataclasses.replace(row.summary, judged_losses=losses))


def named(rows: list[TrialRow]) -> list[TrialRow]:
    return [
        dataclasses.replace(row, trial_id=f"{row.stage}-{number}")
        for number, row in enumerate(rows)
    ]


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(any_trial(), max_size=8).map(named), order=st.randoms(use_true_random=False))
def test_a_growing_yardstick_is_that_of_the_rows_so_far_at_every_moment(
    rows: list[TrialRow], order: random.Random
) -> None:
    order.shuffle(rows)
    growing = {horizon: GrowingYardstick(horizon) for horizon in (T, 2 * T)}
    for count in range(len(rows) + 1):
        for horizon, one in growing.items():
            assert one.now == yardstick(rows[:count], horizon)
            if count < len(rows):
                one.add(rows[count])


def test_a_trial_that_is_no_new_best_is_not_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the cost of a trial does not grow with the number of those before it."""
    growing = GrowingYardstick(T)
    for row in (pilot(2.0), search(1.0)):
        growing.add(row)
    scored: list[TrialSummary] = []
    score = yardsticks.score_completed

    def count(summary: TrialSummary, **constants: Any) -> object:  # noqa: ANN401 - handed on
        scored.append(summary)
        return score(summary, **constants)

    monkeypatch.setattr(yardsticks, "score_completed", count)
    rows = [search(1.0 + number / 100, f"s{number}") for number in range(1, 50)]
    for row in rows:
        growing.add(row)
    assert scored == []
    growing.add(search(0.5, "better"))
    assert len(scored) == 1
    assert growing.now.e_star == 0.5
