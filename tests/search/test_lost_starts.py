"""A worker that is gone before its trial has begun costs the trial nothing, and not for ever."""

import pytest

from stability_search.errors import InfrastructureError
from stability_search.interruption import Signals
from stability_search.records.trial import Outcome
from stability_search.search.breakers import NodeWatch, StartWatch
from stability_search.search.desk import Desk, RunningTrial
from stability_search.search.request import TrialRequest
from tests.search.test_breakers import FINE, LOST, Listener


class Hearing(Listener):
    """Remembers what it is told beside the ends."""

    def __init__(self) -> None:
        super().__init__()
        self.notices: list[str] = []
        self.is_dry = False

    def next_trial(self) -> TrialRequest | None:
        return None if self.is_dry else super().next_trial()

    def noticed(self, text: str) -> None:
        self.notices.append(text)


def desk_of(source: Listener, *, num_slots: int = 1) -> Desk:
    """Return a desk with other nodes than any that gets held."""
    desk = Desk(source, Signals())
    desk.this_node_id, desk.num_slots = "id of the driver's", num_slots
    desk.hold_node = lambda _node_id: True
    return desk


def given(desk: Desk) -> RunningTrial:
    running = desk.next_trial()
    assert running is not None
    return running


def lose_start(desk: Desk, *, node_id: str = "", node: str = "") -> None:
    desk.lose_start(given(desk), "it was killed", node=node, node_id=node_id)


# -- which node -------------------------------------------------------------------------------


def test_three_workers_in_a_row_that_did_not_start_on_a_node_make_it_sick() -> None:
    watch = NodeWatch()
    assert [watch.take_lost_start("a") for _ in range(3)] == [False, False, True]
    assert watch.is_sick("a")
    assert not watch.take_lost_start("a")  # it is sick already
    assert not any(watch.take_lost_start("") for _ in range(9))  # nobody knows where
    assert watch.losses("a") == {"before a trial began": 3}


def test_lost_starts_and_lost_attempts_of_a_node_make_one_row() -> None:
    watch = NodeWatch()
    found = [watch.take("a", "1", LOST), watch.take_lost_start("a"), watch.take("a", "1", LOST)]
    assert found == [False, False, True]


def test_a_worker_that_starts_ends_the_row_of_those_that_did_not_but_not_of_attempts() -> None:
    watch = NodeWatch()
    for _ in range(9):
        assert [watch.take_lost_start("a") for _ in range(2)] == [False, False]
        watch.take_start("a")
    assert [watch.take("a", str(trial), LOST) for trial in range(2)] == [False, False]
    watch.take_start("a")
    watch.take_start("b")  # of which nothing is known
    assert watch.take("a", "2", LOST)


def test_an_attempt_that_ends_otherwise_ends_the_row_of_lost_starts() -> None:
    watch = NodeWatch()
    for _ in range(9):
        assert [watch.take_lost_start("a") for _ in range(2)] == [False, False]
        watch.take("a", "1", FINE)


# -- whether to go on -------------------------------------------------------------------------


@pytest.mark.parametrize(("num_slots", "most"), [(1, 5), (5, 5), (64, 64)])
def test_more_workers_in_a_row_than_slots_and_than_five_may_not_be_gone(
    num_slots: int, most: int
) -> None:
    watch = StartWatch()
    for _ in range(3):
        for _ in range(most):
            watch.take_lost_start("it was killed", num_slots=num_slots)
        watch.take_start()
    for _ in range(most):
        watch.take_lost_start("it was killed", num_slots=num_slots)
    rule = rf"^{most + 1} workers in a row .* before a trial had begun \(last: it was killed\)\."
    with pytest.raises(InfrastructureError, match=rule):
        watch.take_lost_start("it was killed", num_slots=num_slots)


# -- the desk ---------------------------------------------------------------------------------


def test_a_trial_that_had_not_begun_is_given_out_again_as_the_same_attempt() -> None:
    source = Hearing()
    desk = desk_of(source)
    for _ in range(5):
        lose_start(desk, node="host")
    again = given(desk)
    assert (again.request.trial_id, again.request.attempt) == ("search-0001", 1)
    assert source.num_given == 1
    assert source.ends == []
    assert (
        source.notices
        == ["a worker on host was gone before search-0001 had begun there: it was killed"] * 5
    )
    assert not desk.must_leave


def test_a_trial_that_has_begun_loses_an_attempt_with_its_worker() -> None:
    source = Hearing()
    desk = desk_of(source)
    running = given(desk)
    desk.begin(running, node="host", pid=1)
    desk.lose(running, "it was killed")
    assert source.ends == [(Outcome.INFRASTRUCTURE, "it was killed", "host")]


def test_where_no_worker_ever_starts_the_study_ends_and_says_so() -> None:
    desk = desk_of(Hearing())
    for _ in range(6):
        assert not desk.must_leave
        lose_start(desk)
    assert desk.next_trial() is None
    with pytest.raises(InfrastructureError, match=r"^6 workers in a row .*No trial had"):
        desk.raise_problem()


def test_a_trial_that_begins_anywhere_shows_that_workers_can_start() -> None:
    desk = desk_of(Hearing())
    for _ in range(9):
        running = given(desk)
        for _ in range(5):
            lose_start(desk)
        desk.begin(running, node="host", pid=1)
    desk.raise_problem()


def test_a_worker_that_is_ready_without_a_trial_shows_it_as_well() -> None:
    desk = desk_of(Hearing())
    for _ in range(9):
        for _ in range(5):
            lose_start(desk, node_id="a")
            desk.note_start("a")
    desk.raise_problem()


def test_a_node_where_no_worker_starts_is_held_and_what_it_still_loses_stops_nothing() -> None:
    source, held = Hearing(), list[str]()
    desk = desk_of(source)
    desk.hold_node = lambda node_id: bool(held.append(node_id) or True)
    for _ in range(20):  # it has many slots, whose workers end together
        desk.lose_start(None, "it was killed", node="sick", node_id="id of sick")
    desk.raise_problem()
    assert held == ["id of sick"]
    assert source.quarantined == ["sick: 3 workers in a row, or more, were lost there"]
    assert len(source.notices) == 3


def test_where_no_other_node_is_left_a_study_whose_workers_do_not_start_ends() -> None:
    desk = desk_of(Hearing())
    desk.hold_node = lambda _node_id: False
    for _ in range(3):
        lose_start(desk, node="host", node_id="id of host")
    rule = r"^no usable node is left: host lost 3 .*\(before a trial began 3 times; last: it was"
    with pytest.raises(InfrastructureError, match=rule):
        desk.raise_problem()


def test_the_drivers_node_is_not_blamed_for_what_died_on_a_node_nobody_knows() -> None:
    source, held = Hearing(), list[str]()
    desk = desk_of(source, num_slots=64)
    desk.hold_node = lambda node_id: bool(held.append(node_id) or True)
    for _ in range(9):
        lose_start(desk)
        running = given(desk)
        running.is_elsewhere = True  # as of every worker whose node has no known address
        desk.begin(running, node="", pid=0)
        desk.lose(running, "it was killed")
    assert held == []
    for _ in range(3):  # the twin: an early worker is here
        running = given(desk)
        desk.begin(running, node="host", pid=1)
        desk.lose(running, "it was killed")
    assert held == ["id of the driver's"]
