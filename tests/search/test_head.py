"""A head that does not answer is told of, and at last ends the study."""

import threading

import pytest

from stability_search.search.head import GONE_S, HUNG_S, TOLD_S, HeadWatch
from stability_search.search.joining import Reach


class World:
    """A head that answers or not, and a clock that is set."""

    def __init__(self) -> None:
        self.now, self.reached = 0.0, Reach.ANSWERS
        self.said: list[str] = []
        self.given_up: list[str] = []
        self.watch = HeadWatch(
            "head:1",
            say=self.said.append,
            give_up=self.given_up.append,
            reach=lambda _address: self.reached,
            clock=lambda: self.now,
        )

    def look(self, after_s: float) -> list[str]:
        """Let it look, and return what is said."""
        self.now += after_s
        self.said.clear()
        self.watch.look()
        return self.said


def test_silence_is_told_once_and_so_is_its_end() -> None:
    world = World()
    assert world.look(1000.0) == []
    told = [f"the cluster's head, head:1, has not answered for {TOLD_S:.0f} s"]
    for _ in range(9):
        world.reached = Reach.GONE
        assert world.look(GONE_S) == []
        assert world.look(TOLD_S - 1) == []
        assert world.look(1) == told
        assert world.look(GONE_S - TOLD_S - 1) == []
        world.reached = Reach.ANSWERS
        assert world.look(1) == ["the cluster's head answers again"]
        assert world.look(1) == []
    assert world.given_up == []  # many a short silence makes no long one


def test_a_head_that_is_silent_for_long_is_given_up_once() -> None:
    world = World()
    world.reached = Reach.GONE
    world.look(0)
    world.look(GONE_S - 1)
    assert world.given_up == []
    for _ in range(9):
        world.look(1)
    assert world.given_up == ["the cluster's head, head:1, has not answered for 40 s"]


def test_nothing_is_given_up_once_the_cluster_was_left() -> None:
    world = World()
    world.reached = Reach.GONE
    world.look(0)
    world.watch.__exit__()
    assert world.look(GONE_S) == []
    assert world.given_up == []


def test_a_head_that_hangs_is_told_of_as_soon_and_given_up_late() -> None:
    world = World()
    world.reached = Reach.HANGS
    world.look(0)
    assert world.look(TOLD_S) == ["the cluster's head, head:1, has not answered for 15 s"]
    world.look(HUNG_S - TOLD_S - 1)
    assert world.given_up == []
    world.look(1)
    assert world.given_up == ["the cluster's head, head:1, has not answered for 600 s"]


def test_the_watch_looks_by_itself_until_it_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stability_search.search.head.CHECK_S", 0.001)
    world, has_looked = World(), threading.Event()
    watch = HeadWatch(
        "head:1",
        say=world.said.append,
        give_up=world.given_up.append,
        reach=lambda _address: has_looked.set() or Reach.GONE,
    )
    with watch:
        assert has_looked.wait(60)
    watch._thread.join(60)  # noqa: SLF001 - who looks
    assert not watch._thread.is_alive()  # noqa: SLF001 - as above
