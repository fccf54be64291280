"""Score S-v1 in exact numbers: recorded vectors, worked examples, edges."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from stability_search.scoring.chance import bad_rate_bound, sign_flip_p
from stability_search.scoring.configuration import mean_lower_bound, stability_score
from stability_search.scoring.constants import S_V1, ScoreConstants
from stability_search.scoring.run import ZERO_RUN, calm_factor, probe_levels, score_run
from stability_search.scoring.spikes import count_spikes

VECTORS = json.loads(Path(__file__).with_name("vectors.json").read_text())
PROBES = [3, 2.6, 2.2, 1.9, 1.7, 1.5, 1.4, 1.3, 1.25, 1.2, 1.2]
CALM = [1.0, 1.01, 0.99, 1.0, 1.02, 0.98] * 6  # 36 losses of a healthy run


def near(value: float) -> object:
    return pytest.approx(value, rel=1e-9, abs=0)


def test_all_recorded_vectors_are_here() -> None:
    assert {name: len(cases) for name, cases in VECTORS.items()} == {
        "kill": 19,
        "spikes": 18,
        "run_score": 15,
        "score": 12,
    }


@pytest.mark.parametrize("case", VECTORS["spikes"])
def test_spikes_equal_the_recorded_vectors(case: dict[str, Any]) -> None:
    assert count_spikes(case["losses"], case["delta"]) == case["num_spikes"]


@pytest.mark.parametrize("case", VECTORS["run_score"])
def test_run_scores_equal_the_recorded_vectors(case: dict[str, Any]) -> None:
    names = ("num_ok", "num_bad", "num_spikes", "probes", "e0", "delta")
    run = score_run(**{name: case[name] for name in names})
    for name in ("calm", "smooth", "kept", "progress", "q"):
        assert getattr(run, name) == near(case[name]), name


@pytest.mark.parametrize("case", VECTORS["score"])
def test_stability_scores_equal_the_recorded_vectors(case: dict[str, Any]) -> None:
    score = stability_score(case["seed_q"], case["rungs"], case["octaves"])
    assert score.score == near(case["score"])
    assert score.q_lower == near(case["q_lower"])
    assert score.mean_margin == near(case["M"])
    assert score.margin_octaves == case["margin_octaves"]


# --------------------------------------------------------------------------------- one run


@pytest.mark.parametrize(
    ("num_bad", "calm"), [(0, 1.0), (1, 0.8409), (2, 0.7071), (4, 0.5), (10, 0.1768)]
)
def test_bad_steps_of_200_cost_what_they_should(num_bad: int, calm: float) -> None:
    assert calm_factor(num_bad, 200) == pytest.approx(calm, abs=5e-5)


def test_calm_is_exactly_a_half_at_two_percent_of_any_length() -> None:
    assert {calm_factor(n, 50 * n) for n in range(1, 400)} == {0.5}


def test_calm_counts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="0 <= num_bad <= num_judged must hold, but got 3 and 2"):
        calm_factor(3, 2)


def test_the_worked_run_gives_its_q() -> None:
    run = score_run(
        num_ok=199, num_bad=1, num_spikes=1, probes=[3, *[1.1] * 7, 1.2, 1.2, 1.2], e0=3, delta=2
    )
    assert run.q == pytest.approx(0.5649, abs=5e-5)
    assert (run.kept, run.progress) == (near(0.95), 1.0)


def test_a_level_is_the_median_of_three_readings_and_non_finite_ones_are_worst() -> None:
    levels = probe_levels([5, None, 4, math.nan, 3, 2, math.inf, 1, 9, 0, 2])
    assert levels == (5, math.inf, 4, 3, 3, 2, 9, 1, 2)


def test_missing_readings_at_the_end_count_as_non_finite() -> None:
    assert probe_levels([1, 1, 1]) == (1, 1, *[math.inf] * 7)
    assert probe_levels([]) == (math.inf,) * 9


def test_more_readings_than_eleven_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 11 readings, but got 12"):
        probe_levels([1.0] * 12)


def test_a_loss_of_what_was_gained_lowers_kept_alone() -> None:
    run = score_run(
        num_ok=200, num_bad=0, num_spikes=0, probes=[3, *[1] * 7, 2, 2, 2], e0=3, delta=2
    )
    assert (run.calm, run.smooth, run.kept, run.progress) == (1, 1, 0.5, near(0.5 / 0.9))


@pytest.mark.parametrize(
    "change",
    [{"probes": [*PROBES[:-1], None]}, {"are_parameters_finite": False}, {"probes": PROBES[:-1]}],
)
def test_a_run_that_ends_non_finite_kept_nothing(change: dict[str, Any]) -> None:
    sound: dict[str, Any] = {
        "num_ok": 200, "num_bad": 0, "num_spikes": 0, "probes": PROBES, "e0": 3.0, "delta": 1.8,
    }  # fmt: skip
    assert score_run(**sound).q == 1
    run = score_run(**{**sound, **change})
    assert (run.kept, run.q) == (0, 0)
    assert run.progress > 0.9


@pytest.mark.parametrize("delta", [None, math.nan, math.inf, 0.0, -1.0])
def test_without_a_delta_every_factor_is_zero_and_no_step_exceeds(delta: float | None) -> None:
    run = score_run(num_ok=200, num_bad=0, num_spikes=0, probes=PROBES, e0=3, delta=delta)
    assert run == ZERO_RUN
    assert count_spikes([*CALM, 99.0, 99.0, 99.0], delta) == 0
    assert count_spikes([*CALM, 99.0, 99.0, 99.0], 1.0) == 2


@pytest.mark.parametrize("e0", [None, math.nan, math.inf])
def test_without_an_e0_every_factor_is_zero(e0: float | None) -> None:
    run = score_run(num_ok=200, num_bad=0, num_spikes=0, probes=PROBES, e0=e0, delta=1)
    assert run == ZERO_RUN


def test_negative_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="num_bad: value >= 0 must hold, but got -1"):
        score_run(num_ok=1, num_bad=-1, num_spikes=0, probes=PROBES, e0=3, delta=1)


# ---------------------------------------------------------------------------------- spikes


@pytest.mark.parametrize(("length", "spikes"), [(1, 0), (2, 1), (3, 2), (4, 3), (5, 3), (20, 3)])
def test_an_excursion_counts_one_less_than_its_length_and_at_most_three(
    length: int, spikes: int
) -> None:
    assert count_spikes([*CALM, *[2.0] * length, *CALM], 1.0) == spikes


def test_the_first_eight_losses_are_not_judged() -> None:
    assert count_spikes([1.0] * 7 + [9.0] * 2 + [1.0] * 20, 1.0) == 0
    assert count_spikes([1.0] * 8 + [9.0] * 2 + [1.0] * 20, 1.0) == 1


def test_a_jump_below_a_tenth_of_delta_is_no_spike() -> None:
    losses = [*CALM, 1.3, 1.3, *CALM]
    assert count_spikes(losses, 2.9) == 1
    assert count_spikes(losses, 3.1) == 0


def test_a_jump_inside_the_noise_is_no_spike() -> None:
    noisy = [1.0, 2.0, 0.5, 1.5, 0.7, 1.1] * 6
    assert count_spikes([*noisy, 2.5, 2.5, *noisy], 1.0) == 0


def test_the_floor_of_the_spread_decides_on_a_flat_loss() -> None:
    flat = [1.0] * 40
    assert count_spikes([*flat, 1.063, 1.063, *flat], 0.5) == 1  # ln 1.063 = .0611 >= 6 * .01
    assert count_spikes([*flat, 1.061, 1.061, *flat], 0.5) == 0  # ln 1.061 = .0592


def test_a_non_finite_step_makes_its_neighbour_last_but_is_no_spike_itself() -> None:
    assert count_spikes([*CALM, 2.0, None, *CALM], 1.0) == 1
    assert count_spikes([*CALM, None, None, None, *CALM], 1.0) == 0
    assert count_spikes([*CALM, math.nan, math.inf, 2.0], 1.0) == 0


def test_past_the_end_nothing_exceeds() -> None:
    assert count_spikes([*CALM, 2.0], 1.0) == 0
    assert count_spikes([*CALM, 2.0, 2.0], 1.0) == 1


def test_what_exceeds_stays_out_of_the_window() -> None:
    """Pairs of spikes for ever: if they entered the window, they would become the normal."""
    losses = [*CALM, *([1.0, 1.0, 2.0, 2.0] * 20)]
    assert count_spikes(losses, 1.0) == 20


def test_after_three_in_a_row_the_window_restarts_with_them() -> None:
    raised = [*CALM, *[5.0] * 8]
    assert count_spikes(raised, 1.0) == 3
    assert count_spikes([*raised, 9.0, 9.0, 5.0, 5.0], 1.0) == 4  # judged against 5, not 1
    broken = [*CALM, 5.0, 5.0, None, 5.0, 5.0, None]
    assert count_spikes(broken, 1.0) == 4  # never three in a row: still judged against 1


def test_losses_that_are_not_positive_are_judged_on_the_scale_of_delta() -> None:
    around_zero = [0.0, 0.01, -0.01, 0.0, 0.02, -0.02] * 6
    assert count_spikes([*around_zero, 1.0, 1.0, *around_zero], 1.0) == 1
    assert count_spikes([*around_zero, 0.09, 0.09, *around_zero], 1.0) == 0
    assert count_spikes([*around_zero, 1.0, 1.0, *around_zero], 20.0) == 0


def test_extreme_losses_are_counted_without_overflow() -> None:
    huge = [1.7e308, -1.7e308, 1.7e308, 5e-324, 0.0, 1.7e308, 1.7e308, 1.7e308] * 8
    assert 0 <= count_spikes(huge, 5e-324) <= len(huge)
    assert 0 <= count_spikes([1.7e308] * 40, 1e308) <= 40


# ------------------------------------------------------------------- seeds and learning rates


@pytest.mark.parametrize(
    ("n", "q_lower"), [(1, 0.351), (2, 0.552), (3, 0.661), (5, 0.773), (8, 0.849), (10, 0.876)]
)
def test_perfect_seeds_give_the_published_bounds(n: int, q_lower: float) -> None:
    assert mean_lower_bound([1.0] * n) == pytest.approx(q_lower, abs=5e-4)


@pytest.mark.parametrize(("qs", "q_lower"), [([1, 1, 1, 1, 0], 0.3614), ([0.9] * 5, 0.6310)])
def test_the_lower_bound_of_worked_seeds(qs: list[float], q_lower: float) -> None:
    assert mean_lower_bound(qs) == pytest.approx(q_lower, abs=5e-5)


def test_the_bound_is_at_the_mean_of_the_worse_of_two_draws() -> None:
    qs = [0.2, 0.9, 0.5, 0.7]
    worse = [min(pair) for pair in itertools.product(qs, qs)]
    c = sum(worse) / len(worse)
    assert mean_lower_bound(qs) == near(mean_lower_bound([c] * 4))


@pytest.mark.parametrize(
    ("rungs", "score"),
    [
        ([[1, 1], [1, 1], [1, 1]], 77.33),
        ([[1, 1], [0.5, 0.5], [0, 0]], 58.00),
        ([[0, 0], [1, 1], [1, 1]], 38.66),
    ],
)
def test_five_perfect_seeds_score_by_their_rungs(rungs: list[list[float]], score: float) -> None:
    assert stability_score([1] * 5, rungs, 3).score == pytest.approx(score, abs=0.01)


def test_a_rung_counts_towards_the_margin_only_if_every_seed_lives() -> None:
    score = stability_score([1] * 5, [[1, 0.5], [1, 0.49], [1, 1]], 3)
    assert (score.margin_octaves, score.margin_is_capped) == (1, False)


def test_a_margin_at_the_end_of_what_was_tried_is_capped() -> None:
    assert stability_score([1] * 5, [[1], [1]], 2).margin_is_capped
    assert not stability_score([1] * 5, [[1], [1]], 3).margin_is_capped
    assert not stability_score([1] * 5, [], 0).margin_is_capped


def test_a_dead_rung_counts_zero() -> None:
    alive = stability_score([1] * 5, [[0.01], [1]], 2)
    dead = stability_score([1] * 5, [[0.0099], [1]], 2)
    assert (alive.mean_margin, dead.mean_margin) == (near(0.01), 0)


def test_rungs_that_were_not_run_count_zero_and_end_the_margin() -> None:
    for rungs in ([[1], None, [1]], [[1], [], [1]], [[1]]):
        score = stability_score([1] * 5, rungs, 3)
        assert (score.mean_margin, score.margin_octaves) == (near(1 / 3), 1)


def test_rungs_beyond_those_asked_for_are_left_out() -> None:
    assert stability_score([1], [[1], [0]], 1) == stability_score([1], [[1]], 1)


def test_the_ceiling_is_the_score_of_perfection() -> None:
    assert stability_score([0.3] * 5, [[1]] * 3, 3).ceiling == pytest.approx(77.3, abs=0.05)
    assert stability_score([0.3] * 5, [], 0).ceiling == pytest.approx(38.7, abs=0.05)
    assert stability_score([], [], 3).ceiling == 0


def test_negative_octaves_are_refused() -> None:
    with pytest.raises(ValueError, match="octaves: value >= 0 must hold, but got -1"):
        stability_score([1], [], -1)


def test_constants_of_s_v1_cannot_change_under_its_name() -> None:
    with pytest.raises(ValueError, match=r"calm_half_rate: 0.02 must hold in S-v1, but got 0.05"):
        ScoreConstants(calm_half_rate=0.05)
    lenient = ScoreConstants(name="lenient", calm_half_rate=0.04)
    sound: dict[str, Any] = {
        "num_ok": 196, "num_bad": 4, "num_spikes": 0, "probes": PROBES, "e0": 3.0, "delta": 1.8,
    }  # fmt: skip
    assert score_run(**sound).q == 0.5
    assert score_run(**sound, constants=lenient).q == near(math.sqrt(0.5))
    assert ScoreConstants() == S_V1


# ------------------------------------------------------------------------------ comparisons


def brute_force_p(leader: list[float], other: list[float]) -> float:
    differences = [a - b for a, b in zip(leader, other, strict=True)]
    signs = itertools.product((-1, 1), repeat=len(differences))
    sums = [sum(s * d for s, d in zip(pattern, differences, strict=True)) for pattern in signs]
    return sum(value >= sum(differences) - 1e-12 for value in sums) / len(sums)


def test_sign_flip_p_of_seeds_that_all_agree_is_one_over_two_to_the_n() -> None:
    assert sign_flip_p([0.9] * 3, [0.1, 0.2, 0.3]) == 1 / 8
    assert sign_flip_p([0.9] * 5, [0.1, 0.2, 0.3, 0.4, 0.5]) == 1 / 32
    assert sign_flip_p([0.5] * 10, [0.4] * 10) == 1 / 1024


def test_sign_flip_p_equals_counting_all_patterns() -> None:
    rng = np.random.default_rng(5)
    for n in range(1, 9):
        leader, other = rng.random(n).round(1).tolist(), rng.random(n).round(1).tolist()
        assert sign_flip_p(leader, other) == brute_force_p(leader, other)


def test_seeds_that_tie_say_nothing() -> None:
    assert sign_flip_p([], []) == 1
    assert sign_flip_p([0.5, 0.5], [0.5, 0.5]) == 1
    assert sign_flip_p([0.5, 0.9], [0.5, 0.1]) == 0.5


def test_many_seeds_stay_exact() -> None:
    """Equal differences make the statistic binomial, on both sides of the change of method."""
    for n in (40, 41, 60):
        num_won = n // 2 + 6
        leader = [0.75] * num_won + [0.25] * (n - num_won)
        other = [0.25] * num_won + [0.75] * (n - num_won)
        assert sign_flip_p(leader, other) == near(binom.sf(num_won - 1, n, 0.5))


def test_unpaired_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        sign_flip_p([0.5, 0.5], [0.5])


def test_no_bad_step_gives_the_rule_of_three() -> None:
    assert bad_rate_bound(0, 2000) == 0.0015
    assert bad_rate_bound(0, 1000) == 0.003
    assert bad_rate_bound(0, 2) == 1
    assert bad_rate_bound(0, 0) == 1


@pytest.mark.parametrize(("num_bad", "num_judged"), [(1, 10), (3, 2000), (1999, 2000)])
def test_the_bound_is_where_so_few_bad_steps_become_a_5_percent_chance(
    num_bad: int, num_judged: int
) -> None:
    bound = bad_rate_bound(num_bad, num_judged)
    assert binom.cdf(num_bad, num_judged, bound) == pytest.approx(0.05, rel=1e-6)


def test_all_bad_steps_bound_nothing() -> None:
    assert bad_rate_bound(7, 7) == 1


def test_other_confidences_are_exact_or_logarithmic() -> None:
    assert bad_rate_bound(0, 1000, confidence=0.9) == near(-math.log(0.1) / 1000)
    assert bad_rate_bound(1, 1000, confidence=0.9) < bad_rate_bound(1, 1000)


def test_bad_rate_counts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="0 <= num_bad <= num_judged must hold, but got 3 and 2"):
        bad_rate_bound(3, 2)
