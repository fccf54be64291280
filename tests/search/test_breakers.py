"""What is no result stops a study; what is one never does."""

import time
from collections.abc import Mapping
from typing import Any

import pytest

from stability_search.errors import InfrastructureError, UsageError, UserCodeError
from stability_search.interruption import Signals
from stability_search.records.trial import Outcome, Stage, TrialRow, TrialSummary
from stability_search.search.breakers import Breakers, NodeWatch, refuse_settings
from stability_search.search.desk import Desk
from stability_search.search.request import TrialRequest
from stability_search.search.source import Place
from stability_search.settings.engine import EngineSettings
from stability_search.settings.trial import TaskReference, TrialConfig, TrialConstants

LOST = Outcome.INFRASTRUCTURE
ERROR = Outcome.USER_ERROR
FINE = Outcome.COMPLETED


def row(  # noqa: PLR0913 - what the tests vary
    outcome: Outcome,
    *,
    number: int = 0,
    place: str = "task.py:3",
    attempt: int = 1,
    reason: str = "its worker died",
    node: str = "here",
) -> TrialRow:
    is_error = outcome is ERROR
    return TrialRow(
        trial_id=f"search-{number:04d}",
        stage=Stage.SEARCH,
        index=number,
        config_id="c",
        seed=0,
        settings={},
        summary=TrialSummary(
            outcome=outcome,
            reason=reason if outcome is LOST else "",
            num_planned_steps=1,
            error_type="KeyError" if is_error else "",
            error_place=place if is_error else "",
            error_text="Traceback\nKeyError: 3\n" if is_error else "",
        ),
        attempt=attempt,
        started_at="",
        node=node,
    )


def feed(breakers: Breakers, *rows: TrialRow) -> None:
    for one in rows:
        breakers.take(one)


def test_five_trials_that_fail_alike_before_any_other_end_are_the_user_s_code() -> None:
    breakers = Breakers()
    feed(breakers, *[row(ERROR)] * 4)
    with pytest.raises(UserCodeError, match=r"first 5 trials .* KeyError at task.py:3\.\nTrace"):
        breakers.take(row(ERROR))


@pytest.mark.parametrize(
    "other", [row(FINE), row(Outcome.DIVERGED), row(ERROR, place="x:1"), row(LOST, attempt=3)]
)
@pytest.mark.parametrize("position", [0, 2, 4])
def test_one_other_end_among_the_first_five_shows_that_they_are_not_alike(
    other: TrialRow, position: int
) -> None:
    rows = [row(ERROR)] * 20
    rows.insert(position, other)
    feed(Breakers(), *rows)


def test_an_attempt_that_will_be_made_again_ends_no_trial() -> None:
    with pytest.raises(UserCodeError, match="first 5 trials"):
        feed(Breakers(), row(LOST, attempt=1), row(LOST, attempt=2), *[row(ERROR)] * 5)


def test_a_resumed_study_remembers_errors_and_forgets_lost_workers() -> None:
    breakers = Breakers([row(ERROR)] * 5)
    with pytest.raises(UserCodeError, match="first 6 trials"):
        breakers.take(row(ERROR))
    breakers = Breakers([row(ERROR)] * 5)
    feed(breakers, row(FINE), row(ERROR))
    breakers = Breakers([row(LOST)] * 100)
    feed(breakers, *[row(LOST)] * 5)
    with pytest.raises(InfrastructureError, match="6 of 6 attempts lost their worker"):
        breakers.take(row(LOST))


def test_a_resumed_study_knows_an_error_again_in_the_copy_of_its_task() -> None:
    breakers = Breakers([row(ERROR, place="/home/me/task.py:3")] * 5)
    with pytest.raises(UserCodeError, match=r"first 6 trials .* at /runs/a/task\.py:3\."):
        breakers.take(row(ERROR, place="/runs/a/task.py:3"))
    breakers = Breakers([row(ERROR, place="/home/me/task.py:3")] * 5)
    breakers.take(row(ERROR, place="/runs/a/task.py:4"))  # another line is another error


def test_nothing_that_is_a_result_trips_a_breaker() -> None:
    for outcome in Outcome:
        if outcome.is_result:
            feed(Breakers(), *[row(outcome)] * 48)


def test_more_than_a_fifth_of_the_attempts_and_more_than_five_may_not_be_lost() -> None:
    breakers = Breakers()
    feed(breakers, *([row(FINE)] * 4 + [row(LOST)]) * 20)  # a fifth
    feed(breakers, *[row(FINE)] * 4)
    feed(breakers, row(LOST))  # 21 of 105
    with pytest.raises(InfrastructureError, match=r"22 of 106 .*last: its worker died"):
        breakers.take(row(LOST))


def test_a_machine_that_dies_with_eight_trials_is_one_loss_each_time_it_dies() -> None:
    breakers = Breakers()
    dead = [row(LOST, number=i, node="far", reason="its node died") for i in range(8)]
    for _ in range(5):
        feed(breakers, *dead, row(FINE, node="far"))
    with pytest.raises(InfrastructureError, match=r"6 of 11 attempts lost .*last: its node died"):
        feed(breakers, *dead)


def test_a_task_that_cannot_be_built_stops_the_study_in_its_pilot_and_after_a_resume() -> None:
    def refused(stage: Stage, reason: str, text: str = "") -> TrialRow:
        summary = TrialSummary(
            outcome=ERROR,
            reason=reason,
            num_planned_steps=1,
            error_type="UsageError",
            error_text=text,
        )
        return TrialRow(
            trial_id="t", stage=stage, index=0, config_id="c", seed=0, settings={},
            summary=summary, started_at="", node="",
        )  # fmt: skip

    refuse_settings(refused(Stage.SEARCH, "UsageError: clip_norm: no."))
    refuse_settings(refused(Stage.SEARCH, "UsageError: clip_norm: no."), is_first=True)
    refuse_settings(refused(Stage.SEARCH, "UsageError: task: it is gone."))
    with pytest.raises(UsageError, match=r"^task: it is gone\. .*put back .*then resume\."):
        refuse_settings(refused(Stage.CONFIRM, "UsageError: task: it is gone."), is_first=True)
    with pytest.raises(UsageError, match=r"^clip_norm: no\. .*give the setting a `when`"):
        refuse_settings(refused(Stage.PILOT, "UsageError: clip_norm: no."))
    with pytest.raises(UsageError, match=r"^task: it has no probe\.$"):
        refuse_settings(refused(Stage.PILOT, "UsageError: task: it has no probe."))
    text = (
        "Traceback:\n  at\nstability_search.errors.UsageError: data_dir: 2 problems:\n  a\n  b\n"
    )
    with pytest.raises(UsageError, match=r"^data_dir: 2 problems:\n  a\n  b$"):
        refuse_settings(refused(Stage.PILOT, "UsageError: data_dir: 2 problems:", text))


def test_three_losses_in_a_row_on_one_node_of_two_trials_make_it_sick() -> None:
    watch = NodeWatch()
    assert [watch.take("a", trial, LOST) for trial in ("1", "2", "1")] == [False, False, True]
    assert not watch.take("a", "3", LOST)  # it is sick already
    assert not watch.take("b", "3", LOST)


def test_losses_with_any_other_end_between_them_are_not_in_a_row() -> None:
    watch = NodeWatch()
    for outcome in (FINE, ERROR, Outcome.TIMED_OUT):
        found = [watch.take("a", str(i), LOST) for i in range(2)]
        assert [*found, watch.take("a", "9", outcome)] == [False, False, False]


def test_losses_are_counted_by_node() -> None:
    watch = NodeWatch()
    assert not any(watch.take(node, node + "1", LOST) for node in "abcdef" for _ in range(1))
    assert not any(watch.take("", str(i), LOST) for i in range(9))  # nobody knows where


def test_a_trial_that_kills_its_worker_three_times_blames_no_node() -> None:
    watch = NodeWatch()
    assert [watch.take("a", "1", LOST) for _ in range(3)] == [False] * 3
    assert watch.take("a", "2", LOST)


def test_a_breaker_costs_the_same_at_the_first_trial_and_the_ten_thousandth() -> None:
    breakers, ended = Breakers(), row(FINE)

    def seconds(count: int) -> float:
        began = time.process_time()
        feed(breakers, *[ended] * count)
        return time.process_time() - began

    first = min(seconds(1000) for _ in range(3))
    feed(breakers, *[ended] * 10_000)
    last = min(seconds(1000) for _ in range(3))
    print(f"{1e3 * first:.2f} us a trial at the start, {1e3 * last:.2f} us after 13,000")
    assert last < 3 * first + 1e-3


class Listener:
    """A source of as many trials as one likes, which remembers what it hears."""

    is_over = False

    def __init__(self) -> None:
        self.config = TrialConfig(
            task=TaskReference(module="m", class_name="C"),
            engine=EngineSettings(learning_rate=0.1, num_planned_steps=1),
            num_planned_steps=1,
        )
        self.quarantined: list[str] = []
        self.ends: list[tuple[Outcome, str, str]] = []
        self.num_given = 0

    def next_trial(self) -> TrialRequest | None:
        self.num_given += 1
        return TrialRequest(
            trial_id=f"search-{self.num_given:04d}", stage=Stage.SEARCH, index=self.num_given,
            config_id="c", settings={}, config=self.config,
            constants=TrialConstants(probe_steps=(1,)),
        )  # fmt: skip

    def trial_started(self, request: TrialRequest, node: str) -> None: ...

    def trial_progressed(self, request: TrialRequest, progress: Mapping[str, Any]) -> None: ...

    def trial_ended(
        self,
        request: TrialRequest,  # noqa: ARG002 - the protocol's
        summary: TrialSummary,
        steps: bytes | None,  # noqa: ARG002 - the protocol's
        place: Place,
    ) -> None:
        self.ends.append((summary.outcome, summary.reason, place.host))

    def noticed(self, text: str) -> None: ...

    def node_quarantined(self, node: str, reason: str) -> None:
        self.quarantined.append(f"{node}: {reason}")

    def settle(self) -> None: ...


def lose_three(desk: Desk) -> None:
    for _ in range(3):
        running = desk.next_trial()
        assert running is not None
        running.node_id = "id of a"
        desk.begin(running, node="a", pid=0)
        desk.lose(running, "its worker died")


def test_a_sick_node_is_held_and_told_of_and_the_study_goes_on_elsewhere() -> None:
    listener, held = Listener(), list[str]()
    desk = Desk(listener, Signals())
    desk.hold_node = lambda node_id: bool(held.append(node_id) or True)
    lose_three(desk)
    desk.raise_problem()
    assert held == ["id of a"]
    assert listener.quarantined == ["a: 3 workers in a row, or more, were lost there"]
    assert desk.next_trial() is not None


def test_where_no_other_node_is_left_the_study_ends() -> None:
    listener = Listener()
    desk = Desk(listener, Signals())
    lose_three(desk)
    assert len(listener.quarantined) == 1
    assert desk.next_trial() is None
    with pytest.raises(InfrastructureError, match=r"no usable node is left: a lost 3 .*died"):
        desk.raise_problem()


def refused(desk: Desk) -> None:
    running = desk.next_trial()
    assert running is not None
    running.node_id, running.node = "id of b", "b"
    desk.refuse_node(running, "torch 2.0 there, 2.13 here")
    desk.lose_start(running, "its worker died", node="b", node_id="id of b")


def test_a_node_that_differs_runs_no_trial_and_costs_none_an_attempt() -> None:
    listener, held = Listener(), list[str]()
    desk = Desk(listener, Signals())
    desk.hold_node = lambda node_id: bool(held.append(node_id) or True)
    for _ in range(9):  # more workers there
        refused(desk)
    desk.raise_problem()
    reason = "its node is not like the others: torch 2.0 there, 2.13 here"
    assert (held, listener.quarantined) == (["id of b"], [f"b: {reason}"])
    assert listener.ends == []
    again = desk.next_trial()
    assert again is not None
    assert (again.request.trial_id, listener.num_given) == ("search-0001", 1)


def test_where_only_nodes_that_differ_are_left_the_study_ends() -> None:
    desk = Desk(Listener(), Signals())
    refused(desk)
    rule = r"no usable node is left: b is not like the others: torch 2\.0 there, 2\.13 here\. Make"
    with pytest.raises(InfrastructureError, match=rule):
        desk.raise_problem()
