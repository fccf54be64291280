"""How one trial ended: what counts as a failure, and what does not."""

from collections.abc import Generator, Mapping
from dataclasses import replace

import pytest

import stability_search.diagnose.ends as ends_module
from stability_search.diagnose.ends import (
    TrialEnd,
    first_step,
    no_progress_loss,
    watch_trial,
)
from stability_search.diagnose.verdict import Cause
from stability_search.records.step import StepLabel, StepRecord
from stability_search.records.trial import Outcome, TrialSummary
from stability_search.trial import Progress
from tests.diagnose.cases import HEALTHY, small

STEPS = 100
OK = StepRecord(
    step=1, label=StepLabel.OK, loss=1.0, is_loss_finite=True, grad_norm=1.0, is_grad_finite=True,
    clipped=False, is_applied=True, learning_rate=0.1, scale=1024.0,
)  # fmt: skip
OVERFLOW = replace(OK, label=StepLabel.BAD, reason="gradient is Inf", is_grad_finite=False)
FORWARD = replace(
    OK,
    label=StepLabel.BAD,
    reason="model output is NaN",
    is_loss_finite=False,
    loss=None,
    first_nonfinite_module="fusion",
    first_nonfinite_phase="forward",
    last_finite_max=7e4,
)
DATA = replace(OK, label=StepLabel.DATA, reason="NaN in batch", batch_index=12)
CALIBRATION = replace(OVERFLOW, label=StepLabel.CALIBRATION)


def play(
    monkeypatch: pytest.MonkeyPatch,
    odd: Mapping[int, StepRecord],
    outcome: Outcome = Outcome.COMPLETED,
    *,
    num_steps: int = STEPS,
    cuts_short: bool = False,
) -> TrialEnd:
    """Watch a trial whose steps are `ok` but for those given."""

    def run_trial(*_: object, **__: object) -> Generator[Progress, None, TrialSummary]:
        for step in range(1, num_steps + 1):
            record = replace(odd.get(step, OK), step=step)
            yield Progress(record=record, num_planned_steps=STEPS, num_bad_steps=0)
        return TrialSummary(
            outcome=outcome,
            num_planned_steps=STEPS,
            num_steps=num_steps,
            probe_losses=(5.0, 4.0, 3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.0, 9.0, 1.5),
        )

    monkeypatch.setattr(ends_module, "run_trial", run_trial)
    config = HEALTHY["calibration"].recipe.config(3)
    return watch_trial(config, delta=1.0, check=lambda: None, cuts_short=cuts_short)


def test_a_trial_without_a_bad_step_has_not_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    end = play(monkeypatch, dict.fromkeys(range(1, 15), CALIBRATION))
    assert not end.has_failed
    assert (end.failed_at, end.num_steps, end.first_probe) == (None, STEPS, 5.0)
    assert end.last_level == 1.5  # the median of the last three readings


def test_one_nonfinite_forward_pass_is_a_failure_with_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    end = play(monkeypatch, {40: FORWARD, 50: FORWARD})
    assert (end.failure, end.failed_at) == ("model output is NaN", 40)
    assert (end.module, end.phase, end.last_finite_max) == ("fusion", "forward", 7e4)
    assert end.num_steps == STEPS


def test_a_trial_cut_short_ends_at_its_first_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    end = play(monkeypatch, {40: FORWARD}, cuts_short=True)
    assert (end.failed_at, end.num_steps, end.outcome) == (40, 40, None)


@pytest.mark.parametrize(("count", "has_failed"), [(1, False), (2, False), (3, True)])
def test_overflows_of_the_scaled_gradient_are_a_failure_above_two_in_a_hundred(
    monkeypatch: pytest.MonkeyPatch, count: int, *, has_failed: bool
) -> None:
    end = play(monkeypatch, dict.fromkeys(range(30, 30 + count), OVERFLOW), cuts_short=True)
    assert end.has_failed is has_failed
    assert end.failed_at == (30 if has_failed else None)


@pytest.mark.parametrize(("count", "has_failed"), [(1, False), (2, True)])
def test_a_single_overflow_in_a_short_trial_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, count: int, *, has_failed: bool
) -> None:
    """Of 30 steps two in a hundred are less than one."""
    end = play(monkeypatch, dict.fromkeys(range(9, 9 + count), OVERFLOW), num_steps=30)
    assert end.has_failed is has_failed


def test_an_overflow_without_loss_scaling_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    assert play(monkeypatch, {30: replace(OVERFLOW, scale=None)}).failed_at == 30


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        (Outcome.DIVERGED, "diverged"),
        (Outcome.SCALE_COLLAPSE, "loss scale"),
        (Outcome.NONFINITE_PARAMETERS, "parameters"),
        (Outcome.OUT_OF_MEMORY, "out of memory"),
        (Outcome.PRUNED, "overflow in 0 of 70"),
    ],
)
def test_what_a_rule_ended_has_failed_where_it_ended(
    monkeypatch: pytest.MonkeyPatch, outcome: Outcome, words: str
) -> None:
    end = play(monkeypatch, {}, outcome, num_steps=70)
    assert words in end.failure
    assert end.failed_at == 70


def test_steps_left_out_for_finite_batches_are_counted_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = replace(
        DATA,
        reason="the initial fp32 model gives a non-finite loss on it too",
        first_nonfinite_module="head",
        first_nonfinite_phase="forward",
    )
    end = play(monkeypatch, {8: DATA, 9: found, 10: found})
    assert (end.num_data_steps, end.num_reference_steps) == (3, 2)
    assert end.reference_place == ("head", "forward")


def test_broken_batches_are_counted_and_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    end = play(monkeypatch, {8: DATA, 9: DATA})
    assert not end.has_failed
    assert (end.num_data_steps, end.data_batches) == (2, (12, 12))
    assert end.data_reason == "NaN in batch"


@pytest.mark.parametrize("outcome", [Outcome.USER_ERROR, Outcome.TIMED_OUT])
def test_what_broke_off_is_neither_failed_nor_stuck(
    monkeypatch: pytest.MonkeyPatch, outcome: Outcome
) -> None:
    end = play(monkeypatch, {}, outcome)
    assert not end.has_failed
    assert not end.is_stuck(0.0) or not (end.error or end.has_timed_out)
    assert end.has_timed_out is (outcome is Outcome.TIMED_OUT)


def test_stuck_is_what_holds_and_ends_no_lower_than_without_progress() -> None:
    end = TrialEnd(seed=0, num_planned_steps=STEPS, num_steps=STEPS, last_level=2.0)
    assert end.is_stuck(2.0)
    assert not end.is_stuck(2.1)
    assert not end.is_stuck(None)
    assert replace(end, last_level=None).is_stuck(2.0)
    assert not replace(end, failure="x").is_stuck(2.0)
    assert not replace(end, has_timed_out=True).is_stuck(2.0)


def test_a_check_that_raises_ends_a_trial() -> None:
    def check() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch_trial(HEALTHY["calibration"].recipe.config(0), delta=None, check=check)


@pytest.mark.fault
def test_the_first_step_gives_l0_and_says_what_cannot_be_honoured() -> None:
    case = small("", Cause.HEALTHY, "Sines", {"learning_rate": 0.01})
    start = first_step(case.recipe.config(0))
    assert (start.refusal, start.error) == ("", "")
    assert start.delta is not None
    assert 2 < start.delta < 5
    refused = first_step(case.recipe.config(0, norm="group"))
    assert refused.refusal.startswith("norm: `group` replaces BatchNorm")
    crowd = small("", Cause.HEALTHY, "Crowd", {"learning_rate": 0.01}, batch_size=1)
    assert "Expected more than 1 value per channel" in first_step(crowd.recipe.config(0)).error


def test_the_lowest_finite_loss_counts_as_no_progress() -> None:
    assert no_progress_loss(3.0, None, 2.0, float("nan")) == 2.0
    assert no_progress_loss(None) is None
