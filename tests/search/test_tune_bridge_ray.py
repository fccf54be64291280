"""What the bridge makes of Tune's hooks when a worker dies, without a cluster: Tune is played."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from stability_search.interruption import Signals
from stability_search.records.trial import Outcome, Stage, TrialSummary
from stability_search.search import keep_workers, tune_bridge
from stability_search.search.desk import DRIVER_GRACE_S, Desk, RunningTrial
from stability_search.search.idleness import Idleness
from stability_search.search.request import Order
from stability_search.search.trainable import WARM
from stability_search.search.tune_bridge import Bridge
from stability_search.search.worker import ReportKind
from tests.search.test_lost_starts import Hearing

pytestmark = pytest.mark.ray

DIED = "The actor died\n\tactor_id: " + "ab" * 16


class Tune:
    """Calls the bridge's hooks as Tune does, for one slot whose nodes are all `there`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.source = Hearing()
        self.held: list[str] = []
        self.now_s = 0.0
        self.desk = Desk(self.source, Signals())
        quarantine: Any = SimpleNamespace(
            hold=self.held.append,
            hold_more=lambda: None,
            has_usable_node=True,
            is_held=lambda _node_id: False,
        )
        waiting: Any = None
        self.bridge = Bridge(
            self.desk, Signals(), num_slots=1, num_ahead=1, early=None, quarantine=quarantine,
            inspector=None, waiting=waiting, idleness=Idleness(60.0, lambda: self.now_s),
        )  # fmt: skip
        self._num_trials = 0

    def give_slots(self, count: int) -> None:
        """Be a study of so many slots, with a worker that starts ahead for each."""
        self.bridge._num_slots = self.bridge._num_ahead = count  # noqa: SLF001 - not said twice

    def trial(self, actor: Any) -> Any:  # noqa: ANN401 - Tune's
        """Ask for an order, as for a trial that an actor will get."""
        self._num_trials += 1
        name = f"trial {self._num_trials}"
        self.order = self.bridge.next_order(name)
        return SimpleNamespace(
            trial_id=name, temporary_state=SimpleNamespace(ray_actor=actor), node_ip="1.2.3.4"
        )

    def warm_up(self, actor: Any) -> Any:  # noqa: ANN401 - Tune's
        trial = self.trial(actor)
        self.report(trial, WARM)
        return trial

    def start(self, actor: str) -> Any:  # noqa: ANN401 - Tune's
        trial = self.trial(actor)
        self.bridge.on_trial_start(trial=trial)
        return trial

    def report(self, trial: Any, kind: str, payload: object = None) -> None:  # noqa: ANN401 - Tune's
        result = {"kind": kind, "hostname": "host", "pid": 0, "payload": payload}
        if kind == WARM and self.bridge.note_warm(
            trial.trial_id
        ):  # asked first, as schedulers are
            result["done"] = True
        self.bridge.on_trial_result(trial=trial, result=result)

    def lose(self, trial: Any, error: str = DIED) -> None:  # noqa: ANN401 - Tune's
        file = self._folder / trial.trial_id
        file.write_text(f"Failure # 1 (occurred at some time)\n{error}\n")
        trial.error_file = str(file)
        self.bridge.on_trial_error(trial=trial)

    @property
    def given_next(self) -> tuple[str, int]:
        running = self.desk.next_trial()
        assert running is not None
        return running.request.trial_id, len(self.source.ends)


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Tune:
    context = SimpleNamespace(get_node_id=lambda: "here")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(tune_bridge, "_addresses", lambda: {"here": "1", "there": "2"})
    monkeypatch.setattr(tune_bridge, "node_of", lambda _actor: "there")
    monkeypatch.setattr(tune_bridge, "node_of_id", {"ab" * 16: "there"}.__getitem__)
    monkeypatch.setattr(tune_bridge, "host_of", lambda _node_id: "host")
    return Tune(tmp_path)


def test_a_trial_is_given_again_if_its_worker_dies_while_it_is_made(tune: Tune) -> None:
    tune.warm_up("a")
    for _ in range(4):
        tune.lose(tune.trial("b"))
        tune.desk.note_start("there")  # other workers start
    assert tune.given_next == ("search-0001", 0)


def test_a_process_has_begun_its_first_trial_once_it_says_so(tune: Tune) -> None:
    tune.warm_up("a")
    tune.lose(tune.start("a"))
    assert tune.source.ends == []
    trial = tune.start("b")
    assert not tune.bridge._running[trial.trial_id].started  # noqa: SLF001 - nobody tells
    tune.report(trial, ReportKind.STARTED)
    assert tune.bridge._running[trial.trial_id].started  # noqa: SLF001 - as above
    tune.lose(trial)
    assert [outcome for outcome, _, _ in tune.source.ends] == [Outcome.INFRASTRUCTURE]
    assert tune.given_next == ("search-0002", 1)


def test_a_process_that_has_begun_a_trial_begins_the_next_as_soon_as_it_has_it(
    tune: Tune,
) -> None:
    tune.warm_up("a")
    first = tune.start("a")
    tune.report(first, ReportKind.STARTED)
    tune.bridge.on_trial_complete(trial=first)
    tune.lose(tune.start("a"))
    assert len(tune.source.ends) == 1


def test_a_trial_is_given_again_if_an_idle_process_was_dead_when_it_got_it(tune: Tune) -> None:
    tune.warm_up("a")
    first = tune.start("a")
    tune.report(first, ReportKind.STARTED)
    tune.bridge.on_trial_complete(trial=first)
    tune.lose(tune.trial("a"))  # Tune never says that it has started
    assert tune.given_next == ("search-0002", 0)


FINE = TrialSummary(
    outcome=Outcome.COMPLETED, num_planned_steps=5, num_steps=5, wall_s=1.0, device="cpu"
)


class Actor:
    """Takes offers as a worker does."""

    def __init__(self) -> None:
        self.offered: list[str] = []
        self.offer = SimpleNamespace(remote=self._take)

    def _take(self, text: str) -> None:
        self.offered.append(text)


def test_a_worker_that_is_ready_before_others_takes_trials_until_all_are(tune: Tune) -> None:
    tune.give_slots(2)  # the second worker takes its time
    actor, ended = Actor(), (json.dumps(FINE.to_json()), b"")
    first, second = tune.trial(actor), tune.trial("slow")
    assert tune.order == ""
    for number in range(3):
        tune.report(first, WARM)
        assert len(actor.offered) == number + 1
        assert tune.bridge._running[first.trial_id].started == 0 or number  # noqa: SLF001 - nobody tells
        if number == 0:
            tune.report(first, ReportKind.STARTED)
        tune.report(first, ReportKind.ENDED, ended)
        assert first.trial_id not in tune.bridge._running  # noqa: SLF001 - as above
    assert all(Order.from_text(text).config.task.module == "m" for text in actor.offered)
    assert [end for end, _, _ in tune.source.ends] == [Outcome.COMPLETED] * 3

    tune.report(second, WARM)
    tune.report(first, WARM)  # by which its trial of Tune's ends
    assert len(actor.offered) == 3
    assert tune.given_next == ("search-0004", 3)


def test_a_trial_that_was_offered_is_lost_with_its_worker_or_given_again(tune: Tune) -> None:
    tune.give_slots(3)  # the third worker takes its time
    begun, unbegun = tune.trial(Actor()), tune.trial(Actor())
    for trial in (begun, unbegun):
        tune.report(trial, WARM)
    tune.report(begun, ReportKind.STARTED)
    tune.lose(begun)
    tune.lose(unbegun)
    assert [end for end, _, _ in tune.source.ends] == [Outcome.INFRASTRUCTURE]
    assert tune.given_next == ("search-0002", 1)


def test_one_that_replaces_a_lost_worker_waits_behind_nobody(tune: Tune) -> None:
    tune.give_slots(3)  # for the third worker no node has room
    busy, loading = tune.trial(Actor()), tune.trial("b")
    tune.trial("c")
    assert tune.order == ""
    tune.report(busy, WARM)
    tune.report(busy, ReportKind.STARTED)
    for lost in (busy, loading):
        tune.lose(lost)
        replaced = tune.trial(Actor())
        assert tune.order == ""  # nobody's, or it would be bound to a worker of its own
    tune.report(replaced, WARM)
    assert len(replaced.temporary_state.ray_actor.offered) == 1


def test_a_trial_that_was_refused_is_given_again_although_all_are_ready_by_then(
    tune: Tune, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune.give_slots(2)  # the second worker takes its time
    inspector: Any = SimpleNamespace(problem_of=lambda _node_id, _look: "torch 2.0 there")
    tune.bridge._inspector = inspector  # noqa: SLF001 - a node that joined later
    monkeypatch.setattr(ray, "kill", lambda _actor: None)
    refused, other = tune.trial(Actor()), tune.trial("b")
    tune.report(refused, WARM)
    assert tune.bridge.note_warm(other.trial_id)
    assert not tune.bridge.note_warm(refused.trial_id)  # it was on its way, and ends nothing
    tune.lose(refused)
    assert tune.given_next == ("search-0001", 0)


def test_a_worker_on_a_sick_node_is_offered_nothing(tune: Tune) -> None:
    tune.give_slots(2)  # the second worker takes its time
    quarantine: Any = tune.bridge._quarantine  # noqa: SLF001 - as the fixture made it
    quarantine.is_held = {"there": True}.__getitem__
    actor = Actor()
    tune.warm_up(actor)
    assert actor.offered == []


def test_a_worker_that_came_by_a_place_on_a_sick_node_gets_no_trial(
    tune: Tune, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune.warm_up("a")
    quarantine: Any = tune.bridge._quarantine  # noqa: SLF001 - as the fixture made it
    quarantine.is_held = {"there": True}.__getitem__
    killed = list[object]()
    monkeypatch.setattr(ray, "kill", killed.append)
    trial = tune.start("b")
    tune.report(trial, ReportKind.STARTED)  # it was on its way
    tune.lose(trial)
    assert killed == ["b"]
    assert tune.given_next == ("search-0001", 0)


def test_a_worker_on_a_node_that_differs_is_offered_nothing(
    tune: Tune, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune.give_slots(2)  # the second worker takes its time
    inspector: Any = SimpleNamespace(problem_of=lambda _node_id, _look: "torch 2.0 there")
    tune.bridge._inspector = inspector  # noqa: SLF001 - a node that joined later
    actor, killed = Actor(), list[object]()
    monkeypatch.setattr(ray, "kill", killed.append)
    trial = tune.warm_up(actor)
    tune.lose(trial)
    assert (actor.offered, killed) == ([], [actor])
    assert tune.given_next == ("search-0001", 0)


def test_once_a_worker_is_idle_for_long_nobody_waits_for_those_that_start(tune: Tune) -> None:
    tune.give_slots(3)  # for the other workers no node has room
    idle, waits = tune.trial("a"), tune.trial("b")
    tune.source.is_dry = True
    for now_s, is_over in [(0, False), (60, False), (61, True)]:
        tune.now_s = now_s
        tune.report(idle, WARM)
        assert tune.bridge.is_of_no_use(waits.trial_id) is is_over
    assert not tune.bridge.is_of_no_use(idle.trial_id)
    assert tune.bridge.note_warm(idle.trial_id)  # it ends, and its worker with it
    tune.bridge.on_trial_complete(trial=waits)
    assert not tune.bridge.is_of_no_use(waits.trial_id)
    tune.source.is_dry = False
    assert Order.from_text(tune.trial("c") and tune.order).config.task.module == "m"


def test_no_more_workers_start_ahead_than_there_can_be_trials(tune: Tune) -> None:
    tune.give_slots(2)
    tune.bridge._num_slots = 500  # noqa: SLF001 - search.max_concurrent
    ahead = [tune.warm_up(Actor()) for _ in range(2)]
    assert all(tune.bridge.note_warm(trial.trial_id) for trial in ahead[1:])
    for _ in range(3):  # real trials, each with a worker of its own
        tune.trial("b")
        assert Order.from_text(tune.order or "").config.task.module == "m"


def test_an_idle_worker_stays_if_a_trial_has_just_come_for_it(tune: Tune) -> None:
    tune.warm_up("a")
    assert not tune.bridge.may_go("a")
    tune.now_s = 61.0
    tune.bridge.note_work("a")
    assert not tune.bridge.may_go("a")
    tune.now_s = 122.0
    assert tune.bridge.may_go("a")


def test_an_idle_worker_may_go_and_is_told_of_once(tune: Tune) -> None:
    tune.warm_up("a")
    assert [tune.bridge.may_go(actor) for actor in "ab"] == [False, False]
    tune.now_s = 61.0
    tune.bridge.on_trial_complete(trial=tune.start("a"))  # it had work
    assert [tune.bridge.may_go(actor) for actor in "ab"] == [False, True]
    for _ in range(2):
        tune.bridge.tell_of_the_gone()
    assert tune.source.notices == ["1 worker had nothing to do for 60 s: the place is free"]


def test_no_worker_goes_before_the_pilot_is_over_or_while_no_slot_is_free(tune: Tune) -> None:
    tune.warm_up("a")
    trial = tune.start("b")
    running = tune.bridge._running[trial.trial_id]  # noqa: SLF001 - nobody tells
    for stage, slots in [(Stage.PILOT, 2), (Stage.SEARCH, 1)]:
        tune.give_slots(slots)  # one or none is free
        running.request = replace(running.request, stage=stage)
        assert not tune.bridge.may_go("a")
        tune.now_s += 61
        assert not tune.bridge.may_go("a")
    tune.give_slots(2)  # as above
    assert not tune.bridge.may_go("a")
    tune.now_s += 61
    assert tune.bridge.may_go("a")


def test_workers_that_die_before_they_are_warm_count_against_their_node(tune: Tune) -> None:
    for _ in range(3):
        tune.bridge._num_warmed = 0  # noqa: SLF001 - as with three slots
        tune.lose(tune.trial("a"))
        assert tune.order == ""
    assert tune.held == ["there"]
    assert tune.source.quarantined == ["host: 3 workers in a row, or more, were lost there"]


def test_a_trial_on_a_node_that_differs_is_given_again(tune: Tune) -> None:
    tune.warm_up("a")
    inspector: Any = SimpleNamespace(problem_of=lambda _node_id, _look: "torch 2.0 there")
    tune.bridge._inspector = inspector  # noqa: SLF001 - a node that joined later
    killed = list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "kill", killed.append)
        trial = tune.start("b")
    tune.report(trial, ReportKind.STARTED)  # it was on its way
    tune.lose(trial)
    assert killed == ["b"]
    assert tune.given_next == ("search-0001", 0)
    assert tune.source.quarantined == ["host: its node is not like the others: torch 2.0 there"]
    assert tune.source.notices == []  # the lost worker is nobody's


def test_a_node_that_does_not_answer_is_asked_again_until_it_counts_as_sick(tune: Tune) -> None:
    tune.warm_up("a")
    asked = list[str]()

    def problem_of(node_id: str, _look: object) -> str:
        asked.append(node_id)
        raise TimeoutError("its node said nothing")

    inspector: Any = SimpleNamespace(problem_of=problem_of)
    tune.bridge._inspector = inspector  # noqa: SLF001 - a node that joined later
    killed = list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "kill", killed.append)
        for actor in "bcd":
            assert tune.held == []
            trial = tune.start(actor)
            tune.report(trial, ReportKind.STARTED)  # it was on its way
            tune.lose(trial)
    assert (asked, killed) == (["there"] * 3, ["b", "c", "d"])
    assert tune.held == ["there"]
    assert tune.source.notices[0].endswith("search-0001 had begun there: its node said nothing")
    assert tune.given_next == ("search-0001", 0)


def test_a_trial_that_is_overdue_is_killed_while_another_node_is_asked(
    tune: Tune, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune.warm_up("a")
    hung = tune.start("a")
    tune.report(hung, ReportKind.STARTED)
    running = tune.bridge._running[hung.trial_id]  # noqa: SLF001 - nobody tells
    running.started -= running.limit_s + DRIVER_GRACE_S + 1
    killed = list[tuple[RunningTrial, str]]()
    monkeypatch.setattr(tune_bridge, "kill_there", lambda *words: killed.append(words))

    def problem_of(_node_id: str, look: Callable[[], None]) -> str:
        assert killed == []
        look()
        assert killed == [(running, "a")]
        return ""

    inspector: Any = SimpleNamespace(problem_of=problem_of)
    tune.bridge._inspector = inspector  # noqa: SLF001 - a node that joined later
    tune.give_slots(2)  # the hung trial has one
    tune.bridge._num_warmed = 2  # noqa: SLF001 - as above
    tune.start("b")
    assert killed == [(running, "a")]


def test_what_ray_says_of_the_worker_becomes_the_reason(tune: Tune) -> None:
    tune.warm_up("a")
    words = ["died\nThe actor died because its node has died.", "the node running low on memory"]
    for text in words:
        trial = tune.start("b")
        tune.report(trial, ReportKind.STARTED)
        tune.lose(trial, text)
    assert [end[:2] for end in tune.source.ends] == [
        (Outcome.INFRASTRUCTURE, "its node died"),
        (Outcome.OUT_OF_MEMORY, "ended by Ray's memory monitor"),
    ]


def test_where_tune_wrote_no_error_the_worker_died(tmp_path: Path) -> None:
    trial: Any = SimpleNamespace(error_file=None)
    assert tune_bridge._death_of(trial).reason == "its worker died"  # noqa: SLF001 - no file
    trial.error_file = str(tmp_path / "gone")
    assert tune_bridge._death_of(trial).reason == "its worker died"  # noqa: SLF001 - as above


def test_tune_takes_any_error_of_rays_for_the_death_of_a_worker() -> None:
    heard = list[Exception]()
    manager: Any = SimpleNamespace(_actor_task_failed=lambda _task, error: heard.append(error))
    keep_workers.hear_of_every_death(manager)
    take = manager._actor_task_failed  # noqa: SLF001 - as Ray calls it
    died = ray.exceptions.ActorDiedError()
    take(tracked_actor_task=None, exception=died)
    monitor = ray.exceptions.OutOfMemoryError("the node running low on memory")
    take(tracked_actor_task=None, exception=monitor)
    assert heard[0] is died
    assert isinstance(heard[1], ray.exceptions.RayActorError)
    assert str(heard[1]) == "the node running low on memory"
