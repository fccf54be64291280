"""The rules that stop a long training: the kill rule afresh every T steps, and the loss stop."""

import json
import random

import pytest

from stability_search.pruning import KillTest
from stability_search.records.step import StepLabel, StepRecord
from stability_search.records.trial import Outcome
from stability_search.settings.trial import KillRule
from stability_search.training.stops import Stops, false_kill_of

RULE = KillRule()


def step(number: int, label: StepLabel = StepLabel.OK, loss: float | None = 1.0) -> StepRecord:
    return StepRecord(
        step=number,
        label=label,
        loss=loss,
        is_loss_finite=loss is not None,
        grad_norm=1.0,
        is_grad_finite=True,
        clipped=False,
        is_applied=label is StepLabel.OK,
        learning_rate=0.1,
        scale=None,
    )


def stops(horizon: int = 50, start_probe: float | None = 1.0) -> Stops:
    return Stops(RULE, horizon, start_probe=start_probe)


def first_stop(by: Stops, labels: list[StepLabel]) -> tuple[int, Outcome] | None:
    for number, label in enumerate(labels, start=1):
        found = by.see(step(number, label))
        if found is not None:
            return number, found[0]
    return None


def test_all_tests_of_a_run_together_spend_the_false_kill_it_was_given() -> None:
    spent = sum(false_kill_of(number, RULE) for number in range(1, 10_000))
    assert 0.999 * RULE.false_kill < spent < RULE.false_kill


def test_a_trouble_that_begins_late_is_caught_by_a_fresh_test_and_not_by_one_alone() -> None:
    calm, bad = [StepLabel.OK] * 5_000, [StepLabel.BAD] * 12
    found = first_stop(stops(), [*calm, *bad])
    assert found is not None
    assert found[0] - 5_000 <= 8
    assert found[1] is Outcome.PRUNED

    alone = KillTest(RULE, 50)  # what a test that is never begun afresh does with the same steps
    killed = [alone.update(is_bad=label is StepLabel.BAD) for label in [*calm, *bad]]
    assert not any(killed)


def test_only_judged_steps_count_for_the_horizon() -> None:
    by = stops(horizon=3)
    for number, label in enumerate([StepLabel.DATA, StepLabel.CALIBRATION] * 10, start=1):
        by.see(step(number, label))
    assert by.num_tests == 1
    for number in range(1, 5):
        by.see(step(number))
    assert by.num_tests == 2


def test_a_rate_below_r0_is_let_be_however_long_the_run() -> None:
    drawn = random.Random(0)  # noqa: S311 - a simulation
    labels = [StepLabel.BAD if drawn.random() < 0.01 else StepLabel.OK for _ in range(6_000)]
    assert first_stop(stops(horizon=200), labels) is None


@pytest.mark.parametrize(("start", "level", "stopped"), [(2.0, 3.1, 70), (2.0, 2.9, None)])
def test_the_loss_stop_takes_its_start_for_the_yardstick(
    start: float, level: float, stopped: int | None
) -> None:
    by, found = stops(start_probe=start), None
    for number in range(1, 101):
        if by.see(step(number, loss=1.0 if number == 1 else level)) and found is None:
            found = number
    assert found == stopped


def test_without_a_finite_start_nothing_is_far_above_it() -> None:
    by = stops(start_probe=None)
    assert by.see(step(1, loss=None)) is None
    for number in range(2, 100):
        assert by.see(step(number, loss=5.0)) is None, "the first finite loss is the start"
    zero = stops(start_probe=0.0)
    for number in range(1, 100):
        assert zero.see(step(number, loss=0.0)) is None


@pytest.mark.parametrize("cut", [3, 49, 50, 51, 60])
def test_resumed_anywhere_it_decides_the_same(cut: int) -> None:
    labels = [StepLabel.BAD if number % 7 == 0 else StepLabel.OK for number in range(1, 200)]
    losses = [1.0 if number == 1 else 9.0 for number in range(1, 200)]
    records = [step(n, label, loss) for n, (label, loss) in enumerate(zip(labels, losses), 1)]  # noqa: B905 - equal by construction
    whole, parts = stops(), stops()
    expected = [(whole.see(record), whole.evidence) for record in records]
    seen = [(parts.see(record), parts.evidence) for record in records[:cut]]
    state = json.loads(json.dumps(parts.state_dict()))
    other = stops(start_probe=None)
    other.load_state_dict(state, with_fresh_test=False)
    seen += [(other.see(record), other.evidence) for record in records[cut:]]
    assert seen == expected


def test_changed_settings_start_a_fresh_test_with_less_to_spend() -> None:
    by = stops()
    for number in range(1, 4):
        by.see(step(number, StepLabel.BAD if number > 1 else StepLabel.OK))
    state, other = by.state_dict(), stops()
    other.load_state_dict(state, with_fresh_test=True)
    assert (other.num_tests, other.evidence) == (2, 1.0)


def test_a_fresh_test_comes_behind_those_of_a_stretch_given_up() -> None:
    state, other = stops().state_dict(), stops()
    other.load_state_dict(state, with_fresh_test=True, num_tests=7)
    assert other.num_tests == 8
    other.load_state_dict(state, with_fresh_test=False, num_tests=7)
    assert other.num_tests == 1, "as it was, it goes on as if it had not been interrupted"
