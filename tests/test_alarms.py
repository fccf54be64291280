"""When an alarm rises, what it says, and what it never does."""

from typing import Any

import pytest

from stability_search.alarms.alarm import AlarmLevel
from stability_search.alarms.epochs import EpochSummary, epoch_line
from stability_search.alarms.watch import AlarmWatch
from stability_search.records.step import StepLabel
from stability_search.settings.alarms import AlarmSettings, OnAlarm
from tests.watching import (
    BAD,
    FP16,
    OVERFLOW,
    Change,
    Risen,
    overflow_after,
    risen,
    seen,
    steps,
    watch,
)

# -- the gradient norm ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "step", "expected"),
    [
        (50.0, 3, []),
        (50.1, 3, [("grad_norm", 3, 1)]),
        (100.0, 3, [("grad_norm", 3, 1)]),
        (100.1, 3, [("grad_norm_advise", 3, 1)]),
        (20.1, 50, []),  # the last step of epoch 5
        (20.1, 51, [("grad_norm_late", 51, 6)]),
        (20.0, 51, []),
        (50.1, 51, [("grad_norm", 51, 6)]),
        (None, 51, []),
    ],
)
def test_the_gradient_norm_warns_above_50_and_above_20_after_epoch_5(
    norm: float | None, step: int, expected: Risen
) -> None:
    changes: list[Change] = [{"grad_norm": 15.0}] * (step - 1) + [{"grad_norm": norm}]
    assert risen(watch(), steps(*changes)) == expected


def test_a_norm_ten_times_that_of_the_step_before_is_a_jump() -> None:
    jump: list[Change] = [{"grad_norm": 0.5}, {"grad_norm": 5.1}]
    assert risen(watch(), steps(*jump)) == [("grad_norm_jump", 2, 1)]
    assert risen(watch(), steps({"grad_norm": 0.5}, {"grad_norm": 5.0})) == []
    assert risen(watch(), steps({"grad_norm": 5.1})) == []
    assert risen(watch(), steps({"grad_norm": 0.0}, {"grad_norm": 5.0})) == []
    assert risen(watch(grad_norm_jump=20.0), steps(*jump)) == []


def test_a_step_without_a_norm_is_passed_over_when_norms_are_compared() -> None:
    changes: list[Change] = [{"grad_norm": 0.5}, {"grad_norm": None}, {"grad_norm": 5.1}]
    assert risen(watch(), steps(*changes)) == [("grad_norm_jump", 3, 1)]


def test_an_alarm_rises_once_an_epoch_and_nothing_milder_follows_it() -> None:
    norms = [60.0, 70.0, 150.0, 200.0, 60.0, 60.0]
    changes = [{"grad_norm": norm} for norm in norms] + [{"grad_norm": 60.0}] * 5
    assert risen(watch(), steps(*changes)) == [
        ("grad_norm", 1, 1),
        ("grad_norm_advise", 3, 1),
        ("grad_norm", 11, 2),
    ]
    worst_first: list[Change] = [{"grad_norm": 150.0}, {"grad_norm": 60.0}]
    assert risen(watch(), steps(*worst_first)) == [("grad_norm_advise", 1, 1)]


# -- attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logit", "name", "level"),
    [
        (100.1, "attention_max", AlarmLevel.WARNING),
        (1000.1, "attention_max_degraded", AlarmLevel.WARNING),
        (10000.1, "attention_max_diverging", AlarmLevel.CRITICAL),
    ],
)
def test_attention_logits_are_watched_degraded_or_diverging(
    logit: float, name: str, level: AlarmLevel
) -> None:
    [alarm] = seen(watch(), steps({}, {"attention_max": logit}))
    assert (alarm.name, alarm.level, alarm.step) == (name, level, 2)
    assert seen(watch(), steps({"attention_max": 100.0}, {"attention_max": None})) == []


# -- shares over an epoch ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "beyond", "within"),
    [
        ("clamp_frac", 0.011, 0.01),
        ("cap_frac", 0.011, 0.01),
        ("update_ratio", 0.011, 0.01),
        ("grad_rms_over_eps", 9.9, 10.0),
    ],
)
def test_a_share_is_judged_at_the_end_of_its_epoch(
    name: str, beyond: float, within: float
) -> None:
    by = watch(epoch_steps=20)
    assert risen(by, steps(*[{name: beyond}] * 40)) == [(name, 20, 1), (name, 40, 2)]
    assert risen(watch(epoch_steps=20), steps(*[{name: within}] * 40)) == []
    assert risen(watch(epoch_steps=20), steps(*[{name: None}] * 40)) == []


def test_short_epochs_are_joined_until_a_share_has_twenty_values() -> None:
    changes: list[Change] = [{"clamp_frac": 0.5}] * 48
    assert risen(watch(epoch_steps=8), steps(*changes)) == [
        ("clamp_frac", 24, 3),
        ("clamp_frac", 48, 6),
    ]


def test_a_share_of_a_long_epoch_is_that_of_its_last_two_hundred_steps() -> None:
    changes: list[Change] = [{"clamp_frac": 1.0}] * 100 + [{"clamp_frac": 0.0}] * 200
    assert risen(watch(epoch_steps=300), steps(*changes)) == []
    fewer = changes[:-3]  # 3 of the last 200 lie beyond: 1.5 %
    assert risen(watch(epoch_steps=297), steps(*fewer)) == [("clamp_frac", 297, 1)]


def test_one_wild_step_does_not_make_a_typical_update() -> None:
    changes: list[Change] = [{"update_ratio": 1e6}] + [{"update_ratio": 1e-3}] * 19
    assert risen(watch(epoch_steps=20), steps(*changes)) == []
    half: list[Change] = [{"update_ratio": 0.02}] * 11 + [{"update_ratio": 1e-3}] * 9
    assert risen(watch(epoch_steps=20), steps(*half)) == [("update_ratio", 20, 1)]


def test_more_than_half_of_the_updates_clipped_is_a_hidden_cut() -> None:
    clipped: list[Change] = [{"clipped": True}] * 11 + [{}] * 9
    assert risen(watch(epoch_steps=20), steps(*clipped)) == [("clip_frac", 20, 1)]
    assert risen(watch(epoch_steps=20), steps(*clipped[1:], {})) == []
    # A step that was not applied is no update.
    lost: Change = {"is_applied": False, "label": StepLabel.CALIBRATION}
    joined: list[Change] = [{"clipped": True}] * 11 + [{}] * 9 + [lost] * 9
    assert risen(watch(epoch_steps=29), steps(*joined)) == [("clip_frac", 29, 1)]


def test_zero_gradients_are_compared_with_fp32_where_that_is_known() -> None:
    settings = AlarmSettings(epoch_steps=20)

    def rise(share: float, fp32: float | None) -> Risen:
        by = AlarmWatch(settings, num_planned_steps=100, fp32_zero_grad_frac=fp32)
        return risen(by, steps(*[{"zero_grad_frac": share}] * 20))

    assert rise(0.46, 0.25) == [("zero_grad_frac", 20, 1)]
    assert rise(0.44, 0.25) == []
    assert rise(0.99, None) == []


# -- overflows -----------------------------------------------------------------------------------


def test_more_than_one_overflow_in_200_steps_after_the_scale_was_found_is_told() -> None:
    quiet: dict[str, Any] = {"epoch_steps": 10_000, "bad_steps_advise": 9}
    assert risen(watch(**quiet), steps(*overflow_after(20))) == []
    assert risen(watch(**quiet), steps(*overflow_after(20, 198))) == [("overflow_rate", 220, 1)]
    assert risen(watch(**quiet), steps(*overflow_after(20, 199))) == []


def test_overflows_of_the_search_for_a_scale_and_of_bad_data_do_not_count() -> None:
    quiet: dict[str, Any] = {"epoch_steps": 10_000, "bad_steps_advise": 99}
    assert risen(watch(**quiet), steps(*overflow_after(5, 5, 5, 5))) == []  # 20 ok steps, not yet
    data: Change = {**FP16, **OVERFLOW, "label": StepLabel.DATA}
    assert risen(watch(**quiet), steps(*[FP16] * 20, data, data, data)) == []
    assert risen(watch(**quiet), steps(*[FP16] * 20, *[{**FP16, **OVERFLOW}] * 3)) != []


# -- lost steps, and what a loop must do ---------------------------------------------------------


def test_two_bad_steps_in_an_epoch_advise_and_eleven_are_critical() -> None:
    found = seen(watch(epoch_steps=30), steps(*[BAD] * 11, *[{}] * 19, BAD))
    shown = [(alarm.name, alarm.level, alarm.step) for alarm in found]
    assert shown == [
        ("bad_steps_advise", "WARNING", 2),
        ("bad_steps", "CRITICAL", 11),
    ]


def test_an_epoch_is_critical_once_more_than_half_of_it_was_skipped() -> None:
    lost: Change = {**BAD, "label": StepLabel.DATA}
    assert risen(watch(), steps(*[lost] * 5, *[{}] * 5)) == []
    assert risen(watch(), steps(*[lost] * 6, *[{}] * 4)) == [("skipped_frac", 6, 1)]
    # The search for a loss scale is no loss, and one step is no epoch.
    found = {**OVERFLOW, "label": StepLabel.CALIBRATION}
    assert risen(watch(), steps(*[found] * 10)) == []
    assert risen(watch(epoch_steps=1), steps(lost)) == []


@pytest.mark.parametrize("on_alarm", list(OnAlarm))
def test_on_alarm_says_what_a_loop_must_do(on_alarm: OnAlarm) -> None:
    by = watch(epoch_steps=30, on_alarm=on_alarm)
    must = []
    for record in steps(*[BAD] * 11, {}, {}):
        by.see(record)
        must.append(by.must_end)
    acts = None if on_alarm is OnAlarm.WARN else on_alarm
    assert must == [None] * 10 + [acts, None, None]


def test_the_word_of_a_setting_does_as_its_enum_does() -> None:
    by = watch(on_alarm="end_run")
    seen(by, steps(*[BAD] * 6))
    assert by.must_end is OnAlarm.END_RUN


def test_only_lost_steps_end_anything() -> None:
    wild: Change = {"grad_norm": 1e9, "attention_max": 1e9}
    by = watch(on_alarm=OnAlarm.END_RUN)
    for record in steps(*[wild] * 40):
        by.see(record)
        assert by.must_end is None


def test_an_epoch_that_was_ended_is_over_for_the_counters_too() -> None:
    by = watch(epoch_steps=30, on_alarm=OnAlarm.END_EPOCH)
    seen(by, steps(*[BAD] * 11))
    assert by.finished_epoch == EpochSummary(
        epoch=1, num_steps=11, loss=None, grad_norm=None, num_skipped=11
    )
    assert risen(by, steps(*[BAD] * 2, first=12)) == [("bad_steps_advise", 13, 2)]


def test_no_new_lowest_loss_for_three_epochs_advises_and_says_so_again_later() -> None:
    flat = steps(*[{}] * 80, falling=False)
    assert risen(watch(), flat) == [("stale_epochs", 40, 4), ("stale_epochs", 70, 7)]
    assert risen(watch(), steps(*[{}] * 80)) == []
    assert risen(watch(stale_epochs=9), flat) == []
    # Epochs of 4 steps need 20 steps to say anything; NaN is no new lowest loss.
    assert risen(watch(epoch_steps=4), flat[:28]) == [("stale_epochs", 24, 6)]
    assert risen(watch(), steps(*[{"loss": None}] * 40)) == [("stale_epochs", 30, 3)]


# -- epochs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "planned", "expected"), [(None, 49, 1), (None, 200, 4), (None, 449, 8), (7, 200, 7)]
)
def test_an_epoch_is_a_50th_of_the_run_at_least_1_step_unless_it_is_given(
    given: int | None, planned: int, expected: int
) -> None:
    assert watch(given, planned=planned).epoch_steps == expected


def test_a_loop_may_end_an_epoch_with_its_data() -> None:
    by = watch(epoch_steps=1000)
    assert by.end_epoch() == ()
    assert by.finished_epoch is None
    seen(by, steps(*[{"clamp_frac": 0.5, "loss": 3.0, "grad_norm": 2.0}] * 24, BAD))
    [alarm] = by.end_epoch()
    assert (alarm.name, alarm.step, alarm.epoch) == ("clamp_frac", 25, 1)
    assert by.finished_epoch is not None
    assert epoch_line(by.finished_epoch) == "epoch 1: loss 3, grad_norm 2, 1 of 25 steps skipped"
    [later] = seen(by, steps({"grad_norm": 60.0}, first=26))[:1]
    assert later.epoch == 2
    assert by.finished_epoch is None


def test_an_epoch_without_a_finite_loss_says_so_in_its_line() -> None:
    by = watch(epoch_steps=2)
    seen(by, steps(BAD, BAD))
    assert by.finished_epoch is not None
    assert epoch_line(by.finished_epoch) == (
        "epoch 1: loss NaN or Inf, grad_norm NaN or Inf, 2 of 2 steps skipped"
    )


# -- words ---------------------------------------------------------------------------------------


def test_a_message_has_level_step_epoch_value_threshold_and_advice_in_greppable_words() -> None:
    [alarm] = seen(watch(), steps({}, {"grad_norm": 9.5}, {"grad_norm": 63.25}))
    assert str(alarm) == alarm.message
    assert alarm.message == (
        "WARNING step 3 epoch 1: gradient norm (grad_norm) 63.25 is above 50 (alarms.grad_norm). "
        "Clip it (clip_norm), or lower learning_rate if it stays there."
    )
    assert (alarm.value, alarm.threshold) == (63.25, 50.0)
    assert alarm.message.endswith(alarm.advice)


@pytest.mark.parametrize("name", ["grad_norm_advise", "bad_steps_advise", "stale_epochs"])
def test_a_tenth_of_the_learning_rate_is_advised_and_never_set(name: str) -> None:
    cause: Change = {"grad_norm": 101.0} if name == "grad_norm_advise" else BAD
    records = steps(*[{} if name == "stale_epochs" else cause] * 40, falling=False)
    by = watch(epoch_steps=10, bad_steps=99)
    first = next(alarm for alarm in seen(by, records) if alarm.name == name)
    assert "a tenth of the learning rate" in first.advice
    assert {record.learning_rate for record in records} == {0.1}
