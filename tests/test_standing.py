"""Rows become q, S and the bar: stops, seeds, rungs, attempts, and what is missed in words."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import pytest

from stability_search.records.trial import Outcome, Stage, TrialRow, TrialSummary
from stability_search.scoring.configuration import stability_score
from stability_search.scoring.run import ZERO_RUN
from stability_search.settings.study import ConfirmSettings, StudySettings
from stability_search.settings.trial import config_id
from stability_search.standing import (
    ConfigurationStanding,
    configuration_standing,
    configuration_standings,
    score_trial,
)
from stability_search.yardstick import Yardstick, probe_steps, refused

T = 40
BASE = 0.003
MEASURE = Yardstick(
    horizon=T, e0=4.0, e0_source="baseline", e_star=1.0, delta=3.0, sigma=0.0, has_signal=True
)
STUDY = StudySettings(name="s", confirm=ConfirmSettings(seeds=5, steps=T, octaves=2, min_margin=1))


def settings_at(learning_rate: float, **others: object) -> dict[str, Any]:
    return {"learning_rate": learning_rate, "clip_norm": None, "modules": ["a", "b"], **others}


def row(
    seed_index: int,
    last: float = 1.0,
    *,
    settings: dict[str, Any] | None = None,
    stage: Stage = Stage.CONFIRM,
    attempt: int = 1,
    **changes: object,
) -> TrialRow:
    """Return a trial that reads 4 before the first step and `last` ever after."""
    settings = settings or settings_at(BASE)
    steps = probe_steps(T)
    fields: dict[str, Any] = {
        "outcome": Outcome.COMPLETED,
        "num_planned_steps": T,
        "num_judged_steps": T,
        "judged_losses": (2.0,) * T,
        "probe_steps": steps,
        "probe_losses": (4.0, *[last] * 10),
        **changes,
    }
    identity = config_id(settings)
    return TrialRow(
        trial_id=f"{stage}-{identity}-{seed_index}",
        stage=stage,
        index=seed_index,
        config_id=identity,
        seed=100 + seed_index,
        seed_index=seed_index,
        settings=settings,
        summary=TrialSummary(**fields),
        attempt=attempt,
    )


def rung(octave: int, lasts: Sequence[float]) -> list[TrialRow]:
    settings = settings_at(BASE * 2**octave)
    return [row(i, last, settings=settings) for i, last in enumerate(lasts)]


def stand(
    rows: list[TrialRow], *, seeds: Sequence[int] = range(5), study: StudySettings = STUDY
) -> ConfigurationStanding:
    return configuration_standing(
        rows, settings_at(BASE), study=study, yardstick=MEASURE, seed_indices=seeds
    )


GOOD = [*[row(i) for i in range(5)], *rung(1, [1.0, 1.0]), *rung(2, [1.0, 1.0])]


# ------------------------------------------------------------------------------ one trial


@pytest.mark.parametrize("outcome", list(Outcome))
def test_only_a_completed_trial_has_a_score_and_no_fault_of_machines_or_code_does(
    outcome: Outcome,
) -> None:
    run = score_trial(row(0, outcome=outcome), MEASURE)
    if outcome is Outcome.COMPLETED:
        assert run is not None
        assert run.q == 1
    elif outcome in {Outcome.USER_ERROR, Outcome.INFRASTRUCTURE}:
        assert run is None
    else:
        assert run == ZERO_RUN


def test_a_trial_without_a_delta_scores_zero() -> None:
    assert score_trial(row(0), refused(MEASURE)) == ZERO_RUN


@pytest.mark.parametrize(
    ("stage", "planned"), [(Stage.SEARCH, 80), (Stage.CONFIRM, 20), (Stage.PILOT, 20)]
)
def test_a_trial_of_another_horizon_is_refused(stage: Stage, planned: int) -> None:
    with pytest.raises(ValueError, match="Scores of different horizons are never compared"):
        score_trial(row(0, stage=stage, num_planned_steps=planned), MEASURE)


def test_a_longer_pilot_trial_is_scored_at_the_shorter_horizon() -> None:
    steps = probe_steps(T, 2 * T)
    losses = tuple(4.0 if step == 0 else 1.0 if step <= T else 99.0 for step in steps)
    long = row(
        0, stage=Stage.PILOT, num_planned_steps=2 * T, probe_steps=steps, probe_losses=losses
    )
    run = score_trial(long, MEASURE)
    assert run is not None
    assert run.q == 1


# ------------------------------------------------------------------------------ one base


def test_a_perfect_configuration_meets_the_bar() -> None:
    standing = stand(GOOD)
    assert standing.score == stability_score([1.0] * 5, [[1.0] * 2] * 2, 2)
    assert standing.score.score == standing.score.ceiling
    assert (standing.score.margin_octaves, standing.score.margin_is_capped) == (2, True)
    assert (standing.meets_bar, standing.missed) == (True, ())
    assert standing.config_id == config_id(settings_at(BASE))
    assert standing.q == (1.0,) * 5
    assert standing.seed_indices == (0, 1, 2, 3, 4)
    assert (standing.num_completed, standing.num_planned_steps) == (5, T)
    assert (standing.num_bad_steps, standing.num_judged_steps) == (0, 5 * T)
    assert standing.bad_rate_bound == 3 / (5 * T)
    assert standing.probe_last == 1.0


def test_factors_are_means_and_counts_are_sums_over_the_seeds() -> None:
    rows = [row(0, 1.0), row(1, 2.65, num_bad_steps=1)]
    standing = stand(rows, seeds=(0, 1))
    calm = 2.0 ** (-(1 / 40) / 0.02)
    assert standing.calm == pytest.approx((1 + calm) / 2)
    assert (standing.smooth, standing.kept) == (1, 1)
    assert standing.progress == pytest.approx((1 + 0.5) / 2)
    assert standing.q == pytest.approx((1, calm / 2))
    assert (standing.num_bad_steps, standing.num_judged_steps) == (1, 80)
    assert standing.probe_last == pytest.approx((1.0 + 2.65) / 2)


def test_a_level_that_is_not_finite_leaves_no_last_probe() -> None:
    rows = [row(0), row(1, probe_losses=(4.0, *[None] * 10))]
    assert stand(rows, seeds=(0, 1)).probe_last is None
    assert stand([]).probe_last is None


def test_seeds_that_were_not_asked_for_are_left_out() -> None:
    rows = [row(0), row(1, 3.9), row(2)]
    standing = stand(rows, seeds=(2, 0))
    assert (standing.q, standing.seed_indices) == ((1.0, 1.0), (0, 2))


def test_other_stages_horizons_and_settings_are_left_out() -> None:
    others = [
        row(1, stage=Stage.SEARCH),
        row(2, num_planned_steps=80),
        row(3, settings=settings_at(BASE, clip_norm=1.0)),
        row(4, settings=settings_at(BASE, modules=["a"])),
    ]
    assert stand([row(0), *others]).seed_indices == (0,)


def test_the_last_attempt_that_gave_a_result_counts() -> None:
    lost = row(0, outcome=Outcome.INFRASTRUCTURE)
    again = row(0, attempt=2)
    lost_later = row(0, attempt=3, outcome=Outcome.INFRASTRUCTURE)
    for rows in ([lost, again], [again, lost], [again, lost_later], [lost_later, again]):
        assert stand(rows, seeds=(0,)).q == (1.0,)
    assert stand([lost], seeds=(0,)).q == ()
    worse, better = row(0, 3.9), row(0, 1.0, attempt=2)
    assert stand([worse, better]).q == stand([better, worse]).q == (1.0,)


def test_rungs_are_found_at_exact_doublings_of_the_rate() -> None:
    standing = stand([*GOOD[:5], *rung(1, [1.0, 2.65]), *rung(2, [3.9])])
    assert standing.rungs == (pytest.approx((1.0, 0.5)), pytest.approx((0.1 / 3 / 0.9,)))
    near_miss = settings_at(BASE * 2 * (1 + 1e-15))
    assert near_miss["learning_rate"] != BASE * 2
    assert stand([*GOOD[:5], row(0, settings=near_miss)]).rungs == (None, None)


def test_a_rung_that_was_not_run_is_none() -> None:
    standing = stand([*GOOD[:5], *rung(2, [1.0])])
    assert standing.rungs == (None, (1.0,))
    assert standing.score.margin_octaves == 0


def test_rungs_are_read_at_the_first_two_seeds_though_they_may_have_more() -> None:
    rows = [*GOOD[:5], *rung(1, [1.0, 1.0, 3.9])]  # rung 1 was a base and failed its third seed
    assert stand(rows, seeds=(0,)).rungs[0] == (1.0,)
    assert stand(rows).rungs[0] == (1.0, 1.0)
    assert stand(rows).meets_bar


# --------------------------------------------------------------------------------- the bar


NO_MARGIN = "survived 0 doublings of the learning rate, 1 asked for"


def without(rows: list[TrialRow], position: int, replacement: TrialRow | None) -> list[TrialRow]:
    middle = [] if replacement is None else [replacement]
    return [*rows[:position], *middle, *rows[position + 1 :]]


@pytest.mark.parametrize(
    ("rows", "missed"),
    [
        ([], ("0 of 5 seeds gave a result", NO_MARGIN)),
        (without(GOOD, 3, None), ("4 of 5 seeds gave a result",)),
        (without(GOOD, 3, row(3, outcome=Outcome.USER_ERROR)), ("4 of 5 seeds gave a result",)),
        (
            without(GOOD, 3, row(3, outcome=Outcome.PRUNED)),
            ("4 of 5 seeds completed (1 pruned)", "4 of 5 seeds reached q >= 1/2"),
        ),
        (without(GOOD, 3, row(3, 3.9)), ("4 of 5 seeds reached q >= 1/2",)),
        (GOOD[:5], (NO_MARGIN,)),
        (
            [*GOOD[:5], *rung(1, [1.0, 3.0])],
            (NO_MARGIN,),
        ),
        ([*GOOD[:5], *rung(1, [1.0, 1.0])], ()),
    ],
)  # fmt: skip
def test_what_is_missed_of_the_bar_is_said_in_words(
    rows: list[TrialRow], missed: tuple[str, ...]
) -> None:
    standing = stand(rows)
    assert standing.missed == missed
    assert standing.meets_bar is (not missed)


def test_without_octaves_no_margin_is_asked_for() -> None:
    study = dataclasses.replace(
        STUDY, confirm=dataclasses.replace(STUDY.confirm, octaves=0, min_margin=0)
    )
    standing = stand(GOOD, study=study)
    assert (standing.meets_bar, standing.rungs, standing.score.mean_margin) == (True, (), 0)


def test_a_wider_margin_can_be_asked_for() -> None:
    rows = [*GOOD[:5], *rung(1, [1.0, 1.0])]
    study = dataclasses.replace(STUDY, confirm=dataclasses.replace(STUDY.confirm, min_margin=2))
    assert stand(rows, study=study).missed == (
        "survived 1 doubling of the learning rate, 2 asked for",
    )


def test_no_seed_asked_for_meets_no_bar() -> None:
    assert not stand(GOOD, seeds=()).meets_bar


# --------------------------------------------------------------------------------- a study


def test_every_confirmed_configuration_stands_once_and_the_best_first() -> None:
    standings = configuration_standings(GOOD, study=STUDY, yardstick=MEASURE)
    assert [one.settings["learning_rate"] for one in standings] == [BASE, 2 * BASE, 4 * BASE]
    assert standings[0] == stand(GOOD)
    assert standings[1].missed == ("2 of 5 seeds gave a result",)
    assert standings[1].rungs == ((1.0, 1.0), None)
    assert configuration_standings(GOOD[::-1], study=STUDY, yardstick=MEASURE) == standings


def test_a_configuration_in_the_second_look_is_asked_for_twice_the_seeds() -> None:
    rows = [*GOOD, *[row(i) for i in range(5, 10)], *rung(1, [1.0])]
    first = configuration_standings(rows, study=STUDY, yardstick=MEASURE)[0]
    assert (first.score.num_seeds, first.meets_bar) == (10, True)
    short = configuration_standings(rows[:-2], study=STUDY, yardstick=MEASURE)[0]
    assert short.missed == ("9 of 10 seeds gave a result",)


def test_a_configuration_whose_trials_gave_no_result_stands_at_zero() -> None:
    lost = row(0, outcome=Outcome.INFRASTRUCTURE)
    (standing,) = configuration_standings([lost], study=STUDY, yardstick=MEASURE)
    assert (standing.config_id, standing.score.score, standing.q) == (lost.config_id, 0, ())
    assert standing.bad_rate_bound == 1


def big_study(num_configurations: int) -> list[TrialRow]:
    rows = []
    for i in range(num_configurations):
        settings = settings_at(BASE * 2 ** (i % 3), number=i // 3)
        rows += [row(seed, settings=settings) for seed in range(5)]
    return rows


def test_ten_times_the_rows_take_about_ten_times_as_long() -> None:
    """Not a hundred times: CPU seconds, the best of three, and room for a busy machine."""

    def seconds(rows: list[TrialRow]) -> float:
        taken = []
        for _ in range(3):
            start = time.process_time()
            configuration_standings(rows, study=STUDY, yardstick=MEASURE)
            taken.append(time.process_time() - start)
        return min(taken)

    assert seconds(big_study(300)) < 35 * seconds(big_study(30))


def test_a_margin_is_not_called_at_least_where_a_higher_rung_broke() -> None:
    rungs = [r for k in (1, 2) for r in rung(k, [1.0, 1.0])]
    assert stand([*GOOD[:5], *rungs]).score.margin_is_capped
    broken = stand([*GOOD[:5], *rungs, *rung(3, [3.9, 3.9])])
    assert (broken.score.margin_octaves, broken.score.margin_is_capped) == (2, False)
