"""No stream of steps and no setting breaks the alarms; a resumed watch goes on as it was."""

import dataclasses
import json
import math
import re
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stability_search.alarms.alarm import ALARM_NAMES
from stability_search.alarms.watch import AlarmWatch
from stability_search.records.step import StepLabel, StepRecord
from stability_search.settings.alarms import AlarmSettings, OnAlarm
from tests.watching import overflow_after, risen, seen, steps, watch

# -- any stream ----------------------------------------------------------------------------------

NUMBERS = st.one_of(st.none(), st.floats(), st.floats(min_value=0, max_value=1e5))
RECORDS = st.builds(
    StepRecord,
    step=st.integers(min_value=1, max_value=10**9),
    label=st.sampled_from(StepLabel),
    loss=NUMBERS,
    is_loss_finite=st.booleans(),
    grad_norm=NUMBERS,
    is_grad_finite=st.booleans(),
    clipped=st.booleans(),
    is_applied=st.booleans(),
    learning_rate=st.floats(),
    scale=NUMBERS,
    attention_max=NUMBERS,
    clamp_frac=NUMBERS,
    cap_frac=NUMBERS,
    update_ratio=NUMBERS,
    zero_grad_frac=NUMBERS,
    grad_rms_over_eps=NUMBERS,
)
POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
SETTINGS = st.builds(
    AlarmSettings,
    epoch_steps=st.one_of(st.none(), st.integers(min_value=1, max_value=30)),
    on_alarm=st.sampled_from(OnAlarm),
    grad_norm=POSITIVE,
    grad_norm_late=POSITIVE,
    late_epoch=st.integers(min_value=1, max_value=3),
    grad_norm_jump=POSITIVE,
    attention_max=POSITIVE,
    clamp_frac=st.floats(min_value=0, max_value=1, exclude_min=True),
    update_ratio=POSITIVE,
    bad_steps=st.integers(min_value=1, max_value=9),
)


def streams(length: int) -> st.SearchStrategy[list[StepRecord]]:
    """Return streams in which a few records repeat, so that shares are judged too."""
    few = st.lists(RECORDS, min_size=1, max_size=4)
    return few.flatmap(lambda some: st.lists(st.sampled_from(some), max_size=length))


@given(settings=SETTINGS, records=streams(120), baseline=st.sampled_from([None, 0.0, 1.0]))
def test_no_stream_raises_or_gives_a_number_that_is_not_finite(
    settings: AlarmSettings, records: list[StepRecord], baseline: float | None
) -> None:
    by = AlarmWatch(settings, num_planned_steps=200, fp32_zero_grad_frac=baseline)
    for record in records:
        alarms = by.see(record)
        names = [alarm.name for alarm in alarms]
        assert len(set(names)) == len(names)
        for alarm in alarms:
            assert math.isfinite(alarm.value)
            assert math.isfinite(alarm.threshold)
            assert not re.search(r"\b(nan|inf)\b", alarm.message)  # a printed float
            assert alarm.name in ALARM_NAMES
        if by.finished_epoch is not None:
            numbers = dataclasses.astuple(by.finished_epoch)
            assert all(one is None or math.isfinite(one) for one in numbers)
    json.dumps(by.state_dict(), allow_nan=False)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name",
    ["loss", "grad_norm", "attention_max", "clamp_frac", "update_ratio", "grad_rms_over_eps"],
)
def test_a_number_that_is_not_finite_is_as_one_that_is_missing(name: str, value: float) -> None:
    odd, missing = (watch(epoch_steps=20, stale_epochs=99) for _ in range(2))
    for number, by in ((value, odd), (None, missing)):
        assert risen(by, steps(*[{name: number}] * 40)) == []
    assert odd.state_dict() == missing.state_dict()


def test_the_largest_losses_there_are_have_a_finite_mean() -> None:
    by = watch(epoch_steps=100)
    seen(by, steps(*[{"loss": sys.float_info.max}] * 100))
    assert by.finished_epoch is not None
    assert by.finished_epoch.loss == pytest.approx(sys.float_info.max)


def test_overflows_before_a_stop_count_after_it() -> None:
    records = steps(*overflow_after(20, 50))
    quiet: dict[str, Any] = {"epoch_steps": 10_000, "bad_steps_advise": 9}
    first, second = watch(**quiet), watch(**quiet)
    assert seen(first, records[:40]) == []
    second.load_state_dict(first.state_dict())
    assert risen(second, records[40:]) == [("overflow_rate", 72, 1)]


@given(settings=SETTINGS, records=streams(120), cut=st.integers(min_value=0, max_value=120))
def test_a_resumed_watch_says_what_the_uninterrupted_one_does(
    settings: AlarmSettings, records: list[StepRecord], cut: int
) -> None:
    whole = AlarmWatch(settings, num_planned_steps=200, fp32_zero_grad_frac=0.1)
    first = AlarmWatch(settings, num_planned_steps=200, fp32_zero_grad_frac=0.1)
    second = AlarmWatch(settings, num_planned_steps=200, fp32_zero_grad_frac=0.1)
    expected = [whole.see(record) for record in records]
    before = [first.see(record) for record in records[:cut]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    after = [second.see(record) for record in records[cut:]]
    assert before + after == expected
    assert second.state_dict() == whole.state_dict()


def test_a_saved_state_does_not_move_with_the_watch() -> None:
    by = watch()
    seen(by, steps(*[{"clamp_frac": 0.5}] * 3, {"grad_norm": 60.0}))
    saved = by.state_dict()
    before = json.dumps(saved)
    other = watch()
    other.load_state_dict(saved)
    for one in (by, other):
        seen(one, steps(*[{"clamp_frac": 0.5}] * 30, first=5))
    assert json.dumps(saved) == before


def test_a_watch_that_forgot_its_counters_would_be_found_out() -> None:
    """The twin of the round trip: without the state the resumed run says something else."""
    records = steps({"grad_norm": 60.0}, {"grad_norm": 60.0})
    by, fresh = watch(), watch()
    seen(by, records[:1])
    assert risen(by, records[1:]) == []
    assert risen(fresh, records[1:]) == [("grad_norm", 2, 1)]


# -- settings ------------------------------------------------------------------------------------


def test_the_defaults_are_the_documented_ones() -> None:
    assert dataclasses.asdict(AlarmSettings()) == {
        "epoch_steps": None,
        "on_alarm": "warn",
        "attention_max": 100.0,
        "attention_max_degraded": 1e3,
        "attention_max_diverging": 1e4,
        "clip_frac": 0.5,
        "overflow_rate": 1 / 200,
        "clamp_frac": 0.01,
        "cap_frac": 0.01,
        "zero_grad_frac": 0.2,
        "update_ratio": 1e-2,
        "grad_rms_over_eps": 10.0,
        "grad_norm": 50.0,
        "grad_norm_late": 20.0,
        "late_epoch": 5,
        "grad_norm_jump": 10.0,
        "grad_norm_advise": 100.0,
        "bad_steps_advise": 1,
        "stale_epochs": 3,
        "bad_steps": 10,
        "skipped_frac": 0.5,
    }


def test_every_threshold_is_an_alarm_of_the_same_name() -> None:
    names = {spec.name for spec in dataclasses.fields(AlarmSettings)}
    assert names - {"epoch_steps", "on_alarm", "late_epoch"} == set(ALARM_NAMES)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("epoch_steps", 0, "an integer >= 1 must hold, but got 0"),
        ("epoch_steps", 2.5, "an integer >= 1 must hold, but got 2.5"),
        ("late_epoch", None, "an integer >= 1 must hold, but got None"),
        ("bad_steps", 0, "an integer >= 1 must hold, but got 0"),
        ("grad_norm", 0.0, "a finite number > 0 must hold, but got 0.0"),
        ("grad_norm", math.nan, "a finite number > 0 must hold, but got nan"),
        ("grad_norm_jump", math.inf, "a finite number > 0 must hold, but got inf"),
        ("attention_max", -1.0, "a finite number > 0 must hold, but got -1.0"),
        ("grad_rms_over_eps", None, "a finite number > 0 must hold, but got None"),
        ("clip_frac", 50, "0 < value <= 1 must hold, but got 50"),
        ("skipped_frac", 0.0, "0 < value <= 1 must hold, but got 0.0"),
        ("zero_grad_frac", math.nan, "0 < value <= 1 must hold, but got nan"),
        ("grad_norm", True, "a finite number > 0 must hold, but got True"),
        ("epoch_steps", True, "an integer >= 1 must hold, but got True"),
        ("late_epoch", True, "an integer >= 1 must hold, but got True"),
        ("clip_frac", True, "0 < value <= 1 must hold, but got True"),
        ("on_alarm", "panic", "one of warn, end_epoch, end_run must hold, but got 'panic'"),
    ],
)
def test_a_threshold_outside_its_range_is_refused(name: str, value: object, rule: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{name}: {rule}.")):
        AlarmSettings(**{name: value})  # type: ignore[arg-type]


def test_a_watch_refuses_what_it_cannot_count_with() -> None:
    with pytest.raises(ValueError, match=r"num_planned_steps: value >= 1 must hold, but got 0\."):
        AlarmWatch(AlarmSettings(), num_planned_steps=0)
    with pytest.raises(ValueError, match=r"fp32_zero_grad_frac: 0 <= value <= 1 .* got nan\."):
        AlarmWatch(AlarmSettings(), num_planned_steps=9, fp32_zero_grad_frac=math.nan)
