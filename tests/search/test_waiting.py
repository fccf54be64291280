"""When waiting for busy resources is told, and in which words."""

from dataclasses import replace

from stability_search.search.machine import Machine, Node
from stability_search.search.waiting import EVERY_S, PARTLY_S, PATIENCE_S, Waiting

MACHINE = Machine(device="cuda", num_slots=4, cpu_per_trial=1.0, gpu_per_trial=1.0)
NODES = (
    Node(node_id="a", resources={"CPU": 8.0, "GPU": 3.0}),
    Node(node_id="b", resources={"CPU": 8.0, "GPU": 1.0}),
    Node(node_id="c", resources={"CPU": 64.0}),  # no trial fits onto it
)
BUSY = {"a": {"CPU": 8.0}, "b": {"CPU": 7.0}, "c": {"CPU": 64.0}}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_it_is_told_after_a_moment_and_then_every_half_minute() -> None:
    clock = Clock()
    waiting = Waiting(MACHINE, clock)
    told = []
    for _ in range(100):
        waiting.note(num_placed=0, num_unplaced=4)
        if waiting.is_due:
            told.append(waiting.message(NODES, BUSY))
        clock.now += 1.0
    assert told == [f"waiting for 1 GPU: 0 of 4 free, {s} s" for s in (5, 35, 65, 95)]
    assert (PATIENCE_S, EVERY_S) == (5, 30)


def test_a_place_that_is_found_ends_it() -> None:
    clock = Clock()
    waiting = Waiting(MACHINE, clock)
    waiting.note(num_placed=0, num_unplaced=1)
    clock.now += 60
    assert waiting.is_due
    waiting.note(num_placed=1, num_unplaced=0)
    assert not waiting.is_due
    waiting.note(num_placed=0, num_unplaced=1)
    clock.now += PATIENCE_S - 1
    assert not waiting.is_due


def test_where_some_trials_run_it_is_told_later_and_once_in_a_while() -> None:
    clock = Clock()
    waiting = Waiting(MACHINE, clock)
    waiting.note(num_placed=3, num_unplaced=1)
    clock.now += EVERY_S - 1
    assert not waiting.is_due
    clock.now += 1
    assert waiting.is_due
    text = waiting.message(NODES, BUSY)
    assert text == "waiting for 1 GPU: 0 of 4 free, 30 s; 3 workers go on"
    clock.now += PARTLY_S - EVERY_S
    assert not waiting.is_due
    clock.now += EVERY_S
    assert waiting.is_due


def test_what_is_free_on_two_nodes_is_not_free_on_one() -> None:
    scattered = {"a": {"CPU": 0.0, "GPU": 1.0}, "b": {"CPU": 8.0}}
    waiting = Waiting(MACHINE, Clock())
    waiting.note(num_placed=0, num_unplaced=1)
    text = waiting.message(NODES, scattered)
    assert text == "waiting for 1 CPU and 1 GPU on one node, 0 s"


def test_where_no_node_will_do_that_is_said_and_what_may_be_given_up() -> None:
    waiting = Waiting(replace(MACHINE, labels={"pool": ("spot", "big")}), Clock())
    waiting.note(num_placed=0, num_unplaced=1)
    assert waiting.message(NODES, {}) == (
        "waiting for a node with 1 CPU, 1 GPU, pool: spot or big: there is none, 0 s; "
        "or stop, and `resume` with other search.resources.labels"
    )
    waiting = Waiting(replace(MACHINE, custom={"disk": 2.0}), Clock())
    assert waiting.message(NODES, {}).endswith("resume` with other search.resources.custom")
    text = Waiting(MACHINE, Clock()).message(NODES[2:], {})
    assert text == "waiting for a node with 1 CPU, 1 GPU: there is none, 0 s"
