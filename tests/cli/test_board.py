import math

import pytest

from stability_search.cli.board import Board
from stability_search.cli.lines import stage_words
from stability_search.events import Event, EventName
from stability_search.records.values import Json

TIME = "2026-03-01T12:00:00+00:00"
KEYS = (
    *("run_directory", "device", "trials", "slots", "space", "stage", "planned", "trial_id"),
    *("settings", "step", "q", "reason", "num_planned_steps", "num_bad_steps", "scale"),
    *("grad_norm", "loss", "outcome", "num_steps", "wall_s", "text", "level"),
)


def event(name: str, **fields: Json) -> Event:
    return Event(name=name, time=TIME, fields=fields)


def started(trial_id: str, **settings: Json) -> Event:
    return event("trial_started", trial_id=trial_id, stage="search", settings=settings)


def finished(trial_id: str, outcome: str = "completed", **fields: Json) -> Event:
    return event(
        "trial_finished", **{"trial_id": trial_id, "stage": "search", "outcome": outcome, **fields}
    )


def board_after(*events: Event, at_s: float = 0.0) -> Board:
    board = Board()
    for one in events:
        board.apply(one, at_s)
    return board


def test_a_name_nobody_listens_to_is_refused() -> None:
    with pytest.raises(ValueError, match=r"name: one of message, .* but got 'trial_begun'"):
        event("trial_begun")


def test_non_finite_numbers_become_null_at_any_depth() -> None:
    one = event("trial_finished", q=math.nan, settings={"a": math.inf, "b": [1.5, -math.inf]})

    assert one.to_json() == {
        "schema": "stability-search/events/1",
        "event": "trial_finished",
        "time": TIME,
        "q": None,
        "settings": {"a": None, "b": [1.5, None]},
    }
    assert one.number("q") is None


@pytest.mark.parametrize("value", ["3", True, None, [3], math.nan, math.inf])
def test_what_is_no_finite_number_reads_as_none(value: Json) -> None:
    assert event("message", step=value).number("step") is None


def test_a_story_of_two_trials() -> None:
    board = board_after(
        event("study_started", run_directory="reports/x", device="cpu", slots=2, trials=8),
        event("stage_started", stage="search", planned=8),
        started("t0", learning_rate=0.1),
        started("t1", learning_rate=0.2),
    )
    board.apply(
        event(
            "trial_progress",
            trial_id="t0",
            step=50,
            num_planned_steps=200,
            num_bad_steps=1,
            scale=1024,
            grad_norm=0.5,
        ),
        10.0,
    )

    assert (board.run_directory, board.device, board.num_slots) == ("reports/x", "cpu", 2)
    trial = board.running["t0"]
    assert (trial.step, trial.num_bad_steps, trial.scale, trial.last_word_s) == (50, 1, 1024, 10.0)
    # A quarter of one trial in 10 s: 8 trials are 31 more quarters away.
    assert board.time_left_s(10.0) == pytest.approx(310.0)

    board.apply(finished("t0", q=0.8, settings={"learning_rate": 0.1}), 40.0)

    assert list(board.running) == ["t1"]
    assert board.outcomes == {"completed": 1}
    assert board.time_left_s(40.0) == pytest.approx(280.0)
    assert board.best is not None
    assert (board.best.q, board.best.num_seeds) == (0.8, 1)


@pytest.mark.parametrize("planned", [None, "many"])
def test_without_a_plan_the_time_left_is_unknown(planned: Json) -> None:
    board = board_after(event("stage_started", stage="confirm", planned=planned), finished("t0"))

    assert board.time_left_s(5.0) is None


def test_where_results_decide_the_number_of_trials_time_left_is_a_bound() -> None:
    board = board_after(
        event("stage_started", stage="confirm", planned=None, planned_at_most=10),
        finished("t0"),
        finished("t1"),
    )

    assert board.is_bound
    assert board.time_left_s(10.0) == 40.0
    assert stage_words(board, 10.0) == (
        "confirm: 2 of at most 10 trials done, at most 40 s left in this stage"
    )


def test_a_resumed_stage_counts_what_was_done_before_and_times_only_what_is_new() -> None:
    board = board_after(
        event("study_started", outcomes={"completed": 3, "pruned": 1}),
        event("stage_started", stage="search", planned=8, planned_at_most=8, finished=4),
        finished("t4"),
    )

    assert (board.num_finished, board.outcomes["completed"]) == (5, 4)
    assert board.time_left_s(10.0) == 30.0


def test_of_equals_the_one_with_more_seeds_leads() -> None:
    board = board_after(
        finished("t0", q=0.5, settings={"a": 1}),
        finished("t1", q=0.5, settings={"a": 2}),
        finished("t2", q=0.5, settings={"a": 2}),
    )

    assert board.best is not None
    assert (board.best.settings, board.best.num_seeds) == ({"a": 2}, 2)


def test_before_anything_is_done_the_time_left_is_unknown() -> None:
    board = board_after(event("stage_started", stage="search", planned=4), started("t0"))

    assert board.time_left_s(5.0) is None


def test_more_trials_than_planned_leave_no_negative_time() -> None:
    board = board_after(
        event("stage_started", stage="search", planned=1), finished("t0"), finished("t1")
    )

    assert board.time_left_s(5.0) == 0.0


def test_a_new_stage_counts_its_own_trials_and_keeps_the_outcomes() -> None:
    board = board_after(
        event("stage_started", stage="pilot", planned=7),
        finished("p0", "diverged"),
        event("stage_started", stage="search", planned=8),
    )

    assert (board.stage, board.num_finished, board.num_planned) == ("search", 0, 8)
    assert board.outcomes == {"diverged": 1}


def test_the_best_is_a_mean_over_seeds_and_confirm_outranks_search() -> None:
    a, b = {"learning_rate": 0.1}, {"learning_rate": 0.2}
    board = board_after(
        finished("p", stage="pilot", q=1.0, settings=a),
        finished("s", q=0.95, settings=b),
    )
    assert board.best is not None
    assert (board.best.stage, board.best.settings) == ("search", b)

    for trial, q, settings in (("c0", 0.6, a), ("c1", 0.8, a), ("c2", 0.5, b)):
        board.apply(finished(trial, stage="confirm", q=q, settings=settings), 0.0)

    assert board.best is not None
    assert (board.best.stage, board.best.settings, board.best.num_seeds) == ("confirm", a, 2)
    assert board.best.q == pytest.approx(0.7)


def test_only_stops_on_evidence_count_as_time_saved() -> None:
    halfway = {"num_steps": 100, "num_planned_steps": 200, "wall_s": 30.0}

    assert board_after(finished("t0", "pruned", **halfway)).saved_s == 30.0
    assert board_after(finished("t0", "timed_out", **halfway)).saved_s == 0.0
    assert board_after(finished("t0", "completed", **halfway)).saved_s == 0.0
    assert board_after(finished("t0", "pruned", num_steps=0)).saved_s == 0.0


def test_a_retried_trial_is_no_longer_running_and_no_longer_heard() -> None:
    board = board_after(started("t0"), event("trial_retried", trial_id="t0", attempt=2))
    board.apply(event("trial_progress", trial_id="t0", step=5), 1.0)

    assert board.running == {}


def test_progress_is_no_recent_event_and_five_are_kept() -> None:
    board = board_after(started("t0"))
    for index in range(6):
        board.apply(event("trial_progress", trial_id="t0", step=index), 0.0)
        board.apply(event("message", level="info", text=str(index)), 0.0)

    assert [one.text("text") for one in board.recent] == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("name", list(EventName))
@pytest.mark.parametrize("value", [None, math.nan, -math.inf, 1e308, "\x1b[31m", True, [], {}])
def test_no_field_breaks_the_board(name: str, value: Json) -> None:
    board = board_after(started("t0"), event(name, **dict.fromkeys(KEYS, value)), event(name))

    assert board.time_left_s(1.0) is None or board.time_left_s(1.0) >= 0
