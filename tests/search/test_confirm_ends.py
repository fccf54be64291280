"""How confirm ends: without a signal, out of budget, and with what warnings."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stability_search.records.trial import Outcome
from stability_search.records.verdict import ChoiceReason, Verdict, VerdictKind
from stability_search.search.confirm import (
    describe_cost,
    next_need,
)
from stability_search.search.verdicts import ALONE
from tests.search.confirm_plays import RATE, by_clip, fixed_rungs, name, two
from tests.search.confirm_world import (
    CONFIRM_STEPS,
    config,
    executed,
    finish,
    make_space,
    pilot,
    searched,
    summary,
)

# ------------------------------------------------------------------------- studies that end


def test_a_search_without_signal_ends_without_confirm() -> None:
    space = make_space()
    rows = pilot(space, reached=0.0) + searched(space, (0.0, config(RATE)))[4:]
    verdict = next_need(rows, space, can_afford=lambda _: True)
    assert isinstance(verdict, Verdict)
    assert (verdict.kind, verdict.exit_code, verdict.closest) == (VerdictKind.NONE, 3, None)
    assert verdict.reason.startswith("No signal over 20 steps: no sound trial ended below")
    assert verdict.reason.endswith("Train longer or widen the range of learning rates.")


def test_a_probe_without_a_finite_loss_asks_to_look_at_its_data_not_to_train_longer() -> None:
    space = make_space()
    rows = [
        replace(row, summary=replace(row.summary, probe_losses=(None,) * 3, baseline=None))
        for row in pilot(space, reached=0.0) + searched(space, (0.0, config(RATE)))[4:]
    ]
    verdict = next_need(rows, space, can_afford=lambda _: True)
    assert isinstance(verdict, Verdict)
    assert verdict.reason == (
        "No signal over 20 steps: no finite probe loss says where learning starts. Look at the "
        "data of the probe and at the task's loss."
    )


def test_a_search_whose_every_trial_was_stopped_says_to_lower_the_rates() -> None:
    space = make_space()
    rows = [
        replace(row, summary=summary(Outcome.PRUNED, row.summary.num_planned_steps))
        for row in searched(space, (0.9, config(RATE)), (0.8, config(0.5)))
    ]
    verdict = next_need(rows, space, can_afford=lambda _: True)
    assert isinstance(verdict, Verdict)
    assert verdict.exit_code == 3
    assert verdict.reason.endswith("all 6 trials were stopped. Lower the learning rates.")


@pytest.mark.parametrize(
    ("outcome", "exit_code", "said"),
    [
        (Outcome.USER_ERROR, 5, "2 ended with an error of the task"),
        (Outcome.INFRASTRUCTURE, 4, "2 attempts lost their worker"),
    ],
)
def test_a_search_without_a_single_result_judges_no_configuration(
    outcome: Outcome, exit_code: int, said: str
) -> None:
    """Such ends never count against a configuration, so none may be called unstable."""
    space = make_space()
    rows = searched(space, (outcome, config(RATE)), (outcome, config(0.5)))
    verdict = next_need(rows, space, can_afford=lambda _: True)
    assert isinstance(verdict, Verdict)
    assert (verdict.kind, verdict.exit_code) == (VerdictKind.INCOMPLETE, exit_code)
    assert said in verdict.reason


def test_confirm_without_signal_refuses_to_rank() -> None:
    """The spread over probe batches is wider than all progress."""
    space = make_space(top=1)
    noisy = ((0.0, 1.0, 2.0, 5.0),) * 11
    verdict, _ = finish(
        space, searched(space, (0.9, config(RATE))), lambda *_: 2.0, probe_batch_losses=noisy
    )
    assert (verdict.kind, verdict.exit_code) == (VerdictKind.NONE, 3)
    assert verdict.reason.startswith("No signal over 40 steps: the best sound trial ended 1.8")
    assert verdict.confirmed
    assert (verdict.choice, verdict.closest) == (None, None)


def test_no_candidate_ends_without_confirm_and_names_the_highest_value_told() -> None:
    space = make_space()
    rows = searched(
        space, (Outcome.DIVERGED, config(0.5)), (Outcome.PRUNED, config(0.9)), (0.0, config(0.1))
    )
    rows[-2] = replace(
        rows[-2],
        told_value=0.001,
        summary=summary(Outcome.PRUNED, 20, num_steps=9, reason="rate of bad steps"),
    )
    verdict = next_need(rows, space, can_afford=lambda _: True)
    assert isinstance(verdict, Verdict)
    assert (verdict.kind, verdict.exit_code) == (VerdictKind.NONE, 3)
    assert verdict.closest == name(space, 1.0, 0.9)  # as told as the first, but two steps later
    assert verdict.missed == ("pruned after 9 of 20 steps (rate of bad steps)",)
    assert verdict.confirmed == ()


def test_todays_configuration_is_confirmed_even_if_nothing_else_is() -> None:
    space = make_space(start_with=(config(RATE),))
    verdict, rows = finish(
        space, searched(space, (Outcome.PRUNED, config(RATE))), lambda *_: Outcome.PRUNED
    )
    assert verdict.exit_code == 3
    assert max(executed(rows).values()) == 5
    assert verdict.closest in verdict.confirmed
    assert verdict.missed[0] == "0 of 5 seeds completed (5 pruned)"


def test_a_file_without_space_is_a_gate() -> None:
    space = make_space(low=RATE, high=RATE)
    verdict, _ = finish(space, pilot(space), lambda *_: 0.9)
    assert (verdict.exit_code, verdict.choice_reason) == (0, ChoiceReason.ONLY)
    verdict, _ = finish(
        space, pilot(space), lambda _settings, seed, _attempt: 0.9 - 0.5 * (seed == 4)
    )
    assert (verdict.exit_code, verdict.missed) == (3, ("4 of 5 seeds reached q >= 1/2",))


# ---------------------------------------------------------------------------------- budgets


def test_out_of_budget_before_the_first_candidate_is_incomplete() -> None:
    space = fixed_rungs(top=2)
    verdict, rows = finish(
        space, two(space), lambda *_: 0.9, can_afford=lambda spent, more: spent + more <= 9
    )
    assert (verdict.kind, verdict.exit_code) == (VerdictKind.INCOMPLETE, 6)
    assert verdict.unfinished == (name(space, 1.0, RATE), name(space, 2.0, RATE))
    assert len(rows) - len(two(space)) <= 9


def test_candidates_are_finished_in_order_and_the_others_are_named() -> None:
    space = fixed_rungs(top=2)
    verdict, rows = finish(
        space,
        two(space),
        lambda *_: 0.9,
        can_afford=lambda spent, more: spent + more <= 20,
        pick=lambda trials: trials,
    )
    assert (verdict.kind, verdict.choice_reason) == (VerdictKind.STABLE, ChoiceReason.ONLY)
    assert verdict.choice == name(space, 1.0)
    left = name(space, 2.0, RATE)
    assert verdict.unfinished == (left,)
    assert f"The budget ended before 1 candidate could be confirmed: {left}." in verdict.warnings
    assert (
        "The budget ended the search after 2 of 48 trials: half of it is kept for confirm."
        in verdict.warnings
    )
    assert len(rows) - len(two(space)) <= 20


@given(budget=st.integers(0, 60), width=st.integers(1, 6))
@settings(deadline=None, max_examples=15)
def test_a_step_budget_is_never_overspent_and_more_never_finishes_less(
    budget: int, width: int
) -> None:
    space = fixed_rungs(top=3)
    found = [(0.9 - k / 10, config(RATE, clip)) for k, clip in enumerate((1.0, 2.0, 3.0))]
    rows = searched(space, *found)

    def unfinished(limit: int) -> int:
        verdict, after = finish(
            space,
            rows,
            by_clip(lambda clip, _: 0.95 - (clip or 0) / 50),
            can_afford=lambda spent, more: spent + more <= limit,
            pick=lambda trials: trials[:width],
        )
        assert len(after) - len(rows) <= limit
        return len(verdict.unfinished)

    assert unfinished(budget + 5) <= unfinished(budget)


def test_the_cost_is_told_before_and_bounds_what_is_run() -> None:
    space = make_space(start_with=(config(RATE),))
    cost = describe_cost(space)
    assert (cost.num_ladders, cost.min_trials, cost.steps) == (4, 5, CONFIRM_STEPS)
    # A ladder: 10 rungs of 2 seeds, 3 more for the base, 5 for the one below; 5 at a second look.
    assert cost.max_trials == 4 * (20 + 3 + 5) + 4 * 5
    fixed = describe_cost(make_space(low=RATE, high=RATE))
    assert (fixed.num_ladders, fixed.min_trials, fixed.max_trials) == (1, 5, 5 + 3 * 2)


# -------------------------------------------------------------------------------- warnings


def test_warnings_name_what_weakens_the_verdict() -> None:
    space = make_space(low=RATE, high=RATE, seeds=3)
    verdict, _ = finish(
        space, pilot(space), lambda *_: 0.9, warnings=("Attention: not fully observed.",)
    )
    assert verdict.warnings[0] == "3 seeds: not enough seeds to name a winner."
    assert "9 trials not fully observed." in verdict.warnings


def test_a_study_with_nothing_to_warn_of_says_nothing() -> None:
    space = make_space(low=RATE, high=RATE)
    space = replace(space, fixed={**space.fixed, "precision": "fp16", "growth_interval": 20})
    verdict, _ = finish(space, pilot(space), lambda *_: 0.9, device="NVIDIA H100")
    assert verdict.warnings == ()


def test_a_tied_set_of_one_says_why_it_did_not_win() -> None:
    space = fixed_rungs(top=2, seeds=3)
    truth = by_clip(lambda clip, _: 0.97 if clip == 1.0 else 0.6)
    verdict, _ = finish(
        space, two(space), truth, can_afford=lambda spent, more: spent + more <= 25
    )
    assert (verdict.choice_reason, verdict.tied) == (ChoiceReason.TIED, (name(space, 1.0),))
    assert ALONE in verdict.warnings
