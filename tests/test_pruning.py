"""The kill rule and the loss stop: exact numbers, simulated streams, and what they promise."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stability_search.pruning import ALTERNATIVES, KillTest, LossStop
from stability_search.settings.trial import KillRule

KILL_VECTORS = json.loads(Path(__file__).with_name("vectors.json").read_text())["kill"]
SHARES = np.array(ALTERNATIVES)


def first_kill(steps: Iterable[bool], *, rule: KillRule, num_planned_steps: int) -> int | None:
    test = KillTest(rule, num_planned_steps)
    return next((t for t, is_bad in enumerate(steps, start=1) if test.update(is_bad)), None)


def simulate_kills(
    streams: np.ndarray[Any, Any], *, r0: float = 0.05, delta: float = 0.01
) -> np.ndarray[Any, Any]:
    """Return the kill step of every row of `streams` (0: never), by the formula of section 3.

    Written independently of `KillTest`, in linear space and over all streams at once.
    """
    num_streams, num_steps = streams.shape
    r1 = r0 + (1 - r0) * SHARES
    r = np.zeros((num_streams, len(SHARES)))
    remaining = 1.0
    killed_at = np.zeros(num_streams, dtype=int)
    for t in range(1, num_steps + 1):
        weight = 0.5 if t == 1 else 0.5 / (num_steps - 1)
        factor = np.where(streams[:, t - 1, None], r1 / r0, (1 - r1) / (1 - r0))
        r = (r + weight) * factor
        remaining = max(0.0, remaining - weight)
        evidence = r.mean(axis=1) + remaining
        killed_at[(killed_at == 0) & (evidence >= 1 / delta)] = t
        r[killed_at > 0] = 0.0  # evidence grows without bound after a kill
    return killed_at


def bernoulli(rate: float, *, num_streams: int, num_steps: int, seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).random((num_streams, num_steps)) < rate


@pytest.mark.parametrize("case", KILL_VECTORS)
def test_evidence_equals_the_recorded_vectors(case: dict[str, Any]) -> None:
    rule = KillRule(bad_rate=case["bad_rate"], false_kill=case["false_kill"])
    test = KillTest(rule, case["planned_steps"])
    killed_at = None
    for t, step in enumerate(case["bad"], start=1):
        if test.update(step == "1") and killed_at is None:
            killed_at = t
    assert killed_at == case["killed_at"]
    assert test.evidence == pytest.approx(case["evidence"], rel=1e-9)


def test_three_bad_steps_at_the_start_kill_with_the_recorded_evidence() -> None:
    test = KillTest(KillRule(), 200)
    evidence = []
    for expected_kill in (False, False, True):
        assert test.update(is_bad=True) is expected_kill
        evidence.append(test.evidence)
    assert evidence == pytest.approx([5.0, 55.353, 773.29], rel=1e-5)


@pytest.mark.parametrize(("num_ok", "kills_at"), [(0, 3), (9, 5), (20, 5), (100, 5)])
def test_bad_steps_in_a_row_kill_after_ok_ones(num_ok: int, kills_at: int) -> None:
    steps = [False] * num_ok + [True] * 10
    killed_at = first_kill(steps, rule=KillRule(), num_planned_steps=200)
    assert killed_at == num_ok + kills_at


def test_one_bad_step_in_nine_never_kills_and_one_in_eight_does() -> None:
    def every(period: int, phase: int) -> list[bool]:
        return [t % period == phase for t in range(200)]

    rule = KillRule()
    assert all(
        first_kill(every(9, phase), rule=rule, num_planned_steps=200) is None for phase in range(9)
    )
    kills = [first_kill(every(8, phase), rule=rule, num_planned_steps=200) for phase in range(8)]
    assert kills == [137, 138, 139, 148, 149, 150, 159, 160]


@given(
    bad_rate=st.floats(min_value=0, max_value=1, exclude_min=True, exclude_max=True),
    false_kill=st.floats(min_value=0, max_value=1, exclude_min=True, exclude_max=True),
    num_planned_steps=st.integers(1, 120),
)
def test_no_rate_ever_kills_a_stream_without_bad_steps(
    bad_rate: float, false_kill: float, num_planned_steps: int
) -> None:
    rule = KillRule(bad_rate=bad_rate, false_kill=false_kill)
    test = KillTest(rule, num_planned_steps)
    for _ in range(num_planned_steps + 20):
        assert not test.update(is_bad=False)
        assert 0 <= test.evidence <= 1


def test_fixed_alternatives_would_kill_flawless_runs() -> None:
    """The twin: why the alternatives move with r0. .15 lies below r0 = .2."""
    r0, r1 = 0.2, np.array([0.15, 0.40, 0.80])
    r, remaining, killed_at = np.zeros(3), 1.0, None
    for t in range(1, 201):
        weight = 0.5 if t == 1 else 0.5 / 199
        r = (r + weight) * (1 - r1) / (1 - r0)
        remaining = max(0.0, remaining - weight)
        if killed_at is None and r.mean() + remaining >= 100:
            killed_at = t
    assert killed_at == 105
    assert first_kill([False] * 400, rule=KillRule(bad_rate=r0), num_planned_steps=200) is None


@given(
    steps=st.lists(st.booleans(), max_size=80),
    bad_rate=st.floats(min_value=1e-300, max_value=1 - 1e-16, exclude_max=True),
    false_kill=st.floats(min_value=5e-324, max_value=1, exclude_max=True),
    num_planned_steps=st.integers(1, 60),
)
def test_evidence_is_finite_and_survives_json_for_any_rule(
    steps: list[bool], bad_rate: float, false_kill: float, num_planned_steps: int
) -> None:
    test = KillTest(KillRule(bad_rate=bad_rate, false_kill=false_kill), num_planned_steps)
    for is_bad in steps:
        copy = KillTest.from_state(json.loads(json.dumps(test.state_dict(), allow_nan=False)))
        assert test.update(is_bad) == copy.update(is_bad)
        assert test.evidence == copy.evidence
        assert math.isfinite(test.evidence)
        assert test.evidence >= 0
        assert test.has_killed == copy.has_killed


def test_a_trial_that_is_let_run_on_keeps_its_kill() -> None:
    test = KillTest(KillRule(), 200)
    assert [test.update(is_bad=True) for _ in range(3)][-1]
    evidence = test.evidence
    assert all(test.update(is_bad) for is_bad in [False, True] * 500)
    assert test.evidence == evidence
    assert test.num_judged_steps == 3


def test_thousands_of_steps_beyond_the_plan_stay_finite() -> None:
    test = KillTest(KillRule(), 50)
    assert not any(test.update(is_bad=False) for _ in range(20_000))
    assert 0 <= test.evidence < 1e-9


def test_a_planned_length_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="num_planned_steps: value >= 1 must hold, but got 0"):
        KillTest(KillRule(), 0)


def test_a_state_of_another_rule_is_refused() -> None:
    state = KillTest(KillRule(), 20).state_dict()
    with pytest.raises(ValueError, match="log_r: 3 values must be given"):
        KillTest.from_state({**state, "log_r": [0.0]})


def test_log_space_kills_exactly_where_the_plain_formula_does() -> None:
    streams = np.concatenate(
        [bernoulli(rate, num_streams=60, num_steps=150, seed=7) for rate in (0.05, 0.15, 0.4)]
    )
    simulated = simulate_kills(streams)
    assert 0 < np.count_nonzero(simulated) < len(simulated)
    for stream, killed_at in zip(streams, simulated, strict=True):
        found = first_kill(map(bool, stream), rule=KillRule(), num_planned_steps=150)
        assert (found or 0) == killed_at


def share_within(killed: int, num_streams: int, share: float, *, sigmas: float = 4.5) -> bool:
    """Say whether a simulated share agrees with a published one.

    Both are samples: the published from 4,000 streams, so both variances count.
    """
    spread = math.sqrt(share * (1 - share) * (1 / num_streams + 1 / 4000))
    return abs(killed / num_streams - share) <= sigmas * spread + 0.5 / num_streams + 0.005


RATE_TABLE = [  # true bad rate, share killed, median step, T = 300
    (0.01, 0.000, None),
    (0.05, 0.004, None),
    (0.10, 0.53, 150),
    (0.15, 0.99, 79),
    (0.20, 1.00, 41),
    (0.30, 1.00, 18),
    (1.00, 1.00, 3),
]


def check_rate_table(num_streams: int, *, median_slack: float) -> None:
    for rate, share, median_step in RATE_TABLE:
        streams = bernoulli(rate, num_streams=num_streams, num_steps=300, seed=round(rate * 100))
        killed_at = simulate_kills(streams)
        killed = killed_at[killed_at > 0]
        assert share_within(len(killed), num_streams, share), (rate, len(killed) / num_streams)
        if median_step is not None:
            assert np.median(killed) == pytest.approx(median_step, rel=median_slack, abs=2), rate


def test_a_sample_of_streams_is_killed_as_often_as_the_table_says() -> None:
    check_rate_table(800, median_slack=0.25)


@pytest.mark.slow
def test_4000_streams_are_killed_as_often_as_the_table_says() -> None:
    check_rate_table(4000, median_slack=0.08)


def check_false_kills(num_streams: int, rates: Iterable[float]) -> None:
    """At r0 the share killed stays at or below delta, by more than chance would have it."""
    for r0 in rates:
        streams = bernoulli(r0, num_streams=num_streams, num_steps=300, seed=3)
        num_killed = np.count_nonzero(simulate_kills(streams, r0=r0, delta=0.05))
        limit = 0.05 * num_streams + 3 * math.sqrt(0.05 * 0.95 * num_streams)
        assert num_killed <= limit, (r0, num_killed)


def test_false_kills_stay_below_delta() -> None:
    check_false_kills(800, (0.02, 0.05, 0.3))


@pytest.mark.slow
def test_false_kills_stay_below_delta_in_20000_streams() -> None:
    check_false_kills(20_000, (0.005, 0.02, 0.05, 0.1, 0.3, 0.6, 0.9))


def test_the_limit_on_false_kills_can_be_broken() -> None:
    """The twin: streams above r0 go over the limit."""
    streams = bernoulli(0.12, num_streams=800, num_steps=300, seed=3)
    num_killed = np.count_nonzero(simulate_kills(streams, r0=0.05, delta=0.05))
    assert num_killed > 0.05 * 800 + 3 * math.sqrt(0.05 * 0.95 * 800)


def test_a_rate_that_rises_at_step_150_is_caught_within_a_few_dozen_steps() -> None:
    calm = bernoulli(0.0, num_streams=600, num_steps=150, seed=0)
    rising = np.concatenate([calm, bernoulli(0.3, num_streams=600, num_steps=150, seed=1)], axis=1)
    killed_at = simulate_kills(rising)
    assert np.all(killed_at > 150)
    assert np.median(killed_at) - 150 == pytest.approx(27, abs=4)


# ------------------------------------------------------------------------------- loss stop


def first_stop(
    losses: Iterable[float | None], *, l0: float = 3.0, delta: float = 2.0
) -> int | None:
    stop = LossStop(l0, delta)
    return next((t for t, loss in enumerate(losses, start=1) if stop.update(t, loss)), None)


def test_the_earliest_loss_stop_is_step_70() -> None:
    assert first_stop([100.0] * 200) == 70


def test_a_loss_exactly_at_the_limit_stops_and_just_below_does_not() -> None:
    assert first_stop([4.0] * 200) == 70
    assert first_stop([math.nextafter(4.0, 0)] * 200) is None


def test_a_catapult_that_settles_is_never_stopped() -> None:
    assert first_stop([1e6] * 60 + [1.0] * 140) is None
    assert first_stop([1e6] * 64 + [1.0] * 140) is None


def test_a_catapult_that_settles_too_late_is_stopped() -> None:
    """The twin: the median of ten turns five losses later, at step 70 from step 65 on."""
    assert first_stop([1e6] * 65 + [1.0] * 140) == 70


def test_twenty_steps_must_run_without_a_break() -> None:
    # Five of ten high losses lift the median: n from step 61 on lift it at steps 65 to 65 + n.
    assert first_stop([1.0] * 60 + [100.0] * 19 + [1.0] * 100) == 84
    assert first_stop([1.0] * 60 + [100.0] * 18 + [1.0] * 100) is None


def test_ten_finite_losses_must_exist() -> None:
    assert first_stop([None] * 300) is None
    assert first_stop([100.0] * 9 + [None] * 300) is None
    assert first_stop([100.0] * 10 + [math.nan] * 300) == 70


def test_non_finite_losses_leave_the_last_ten_as_they_are() -> None:
    losses: list[float | None] = [100.0, None, math.inf] * 100
    assert first_stop(losses) == 70


@pytest.mark.parametrize(
    ("l0", "delta", "message"),
    [
        (math.nan, 1.0, "l0: a finite number must be given, but got nan"),
        (1.0, 0.0, "delta: a finite number > 0 must be given, but got 0.0"),
        (1.0, math.inf, "delta: a finite number > 0 must be given, but got inf"),
    ],
)
def test_a_loss_stop_without_a_yardstick_is_refused(l0: float, delta: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossStop(l0, delta)


@given(st.lists(st.none() | st.floats(-1e3, 1e3), min_size=80, max_size=120), st.integers(0, 80))
def test_a_loss_stop_goes_on_from_its_stored_state(losses: list[float | None], split: int) -> None:
    first = LossStop(0.0, 1.0)
    for t, loss in enumerate(losses[:split], start=1):
        first.update(t, loss)
    copy = LossStop.from_state(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    for t, loss in enumerate(losses[split:], start=split + 1):
        assert first.update(t, loss) == copy.update(t, loss)
