"""The state of a study as a watcher sees it, folded from its events."""

import json
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from stability_search.events import Event, EventName
from stability_search.records.trial import Outcome, Stage
from stability_search.records.values import Json

NUM_RECENT_EVENTS = 5

# What an early stop spared is only claimed for stops on evidence, not for time-outs or errors.
_STOPPED_EARLY = frozenset(str(outcome) for outcome in Outcome if outcome.is_unstable)


@dataclass(kw_only=True, slots=True)
class RunningTrial:
    """A trial that has started and not ended.

    Attributes:
        trial_id: Its name.
        settings: Its configuration.
        last_word_s: When it was last heard of, on the watcher's clock.
        step: Attempted steps so far.
        num_planned_steps: Its horizon; None where nobody said.
        num_bad_steps: `bad` steps so far.
        scale: Loss scale; None without loss scaling or before the first step.
        grad_norm: Last gradient norm; None where non-finite or not measured.
    """

    trial_id: str
    settings: Mapping[str, Json]
    last_word_s: float
    step: int = 0
    num_planned_steps: int | None = None
    num_bad_steps: int = 0
    scale: float | None = None
    grad_norm: float | None = None

    @property
    def done_frac(self) -> float:
        """Share of the planned steps taken, in [0, 1]."""
        return min(1.0, self.step / self.num_planned_steps) if self.num_planned_steps else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    """The configuration with the highest mean run score of a stage.

    Attributes:
        stage: Where its trials ran.
        q: Mean run score of its trials, in [0, 1].
        num_seeds: Trials it had in that stage.
        settings: The configuration.
    """

    stage: str
    q: float
    num_seeds: int
    settings: Mapping[str, Json]


@dataclass(slots=True)
class _Contender:
    settings: Mapping[str, Json]
    scores: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return sum(self.scores) / len(self.scores)


class Board:
    """Counts, running trials and the best so far.

    Every event goes through `apply` once, in order. Nothing here reads a clock: the time of
    arrival comes in as seconds of any clock that does not run backwards.
    """

    def __init__(self) -> None:
        self.run_directory = ""
        self.device = ""
        self.num_slots: int | None = None
        self.stage = ""
        self.num_planned: int | None = None
        self.is_bound = False  # of `num_planned`: results decide, and it is the most there can be
        self.num_finished = 0
        self.outcomes: Counter[str] = Counter()
        self.running: dict[str, RunningTrial] = {}
        self.recent: deque[Event] = deque(maxlen=NUM_RECENT_EVENTS)
        self.saved_s = 0.0
        self._stage_started_s = 0.0
        self._num_before = 0  # trials of the stage that an earlier run had finished
        self._contenders: dict[str, dict[str, _Contender]] = {}

    def apply(self, event: Event, now_s: float) -> None:
        """Fold one event in.

        Args:
            event: What happened.
            now_s: When it arrived.
        """
        if event.name == EventName.TRIAL_PROGRESS:
            self._progress(event, now_s)
            return
        if event.name != EventName.TRIAL_STARTED:  # it stands among the running ones
            self.recent.append(event)
        match event.name:
            case EventName.STUDY_STARTED:
                self.run_directory = event.text("run_directory")
                self.device = event.text("device")
                self.num_slots = _count(event, "slots")
                self.outcomes.update(_counts(event, "outcomes"))
            case EventName.STAGE_STARTED:
                self.stage = event.text("stage")
                planned = _count(event, "planned")
                self.is_bound = planned is None
                self.num_planned = _count(event, "planned_at_most") if self.is_bound else planned
                self.num_finished = self._num_before = _count(event, "finished") or 0
                self._stage_started_s = now_s
            case EventName.TRIAL_STARTED:
                trial_id = event.text("trial_id")
                self.running[trial_id] = RunningTrial(
                    trial_id=trial_id,
                    settings=event.settings(),
                    last_word_s=now_s,
                    num_planned_steps=_count(event, "num_planned_steps"),
                )
            case EventName.TRIAL_FINISHED:
                self._finish(event)
            case EventName.TRIAL_RETRIED:
                self.running.pop(event.text("trial_id"), None)  # its next attempt starts anew
            case EventName.STUDY_FINISHED:
                self.running.clear()

    def time_left_s(self, now_s: float) -> float | None:
        """Estimate the seconds until the stage ends from the trials it has done so far.

        Returns:
            Seconds >= 0, at most so many where `is_bound`; None where the number of trials is
            unknown or none has got anywhere.
        """
        if self.num_planned is None:
            return None
        done = self.num_finished + sum(trial.done_frac for trial in self.running.values())
        done_now = done - self._num_before
        elapsed_s = now_s - self._stage_started_s
        if done_now <= 0 or elapsed_s <= 0:
            return None
        return max(0.0, elapsed_s * (self.num_planned - done) / done_now)

    @property
    def best(self) -> Best | None:
        """The best of the latest stage that has a score; the pilot is no contest."""
        for stage in (Stage.CONFIRM, Stage.SEARCH):
            contenders = self._contenders.get(stage, {}).values()
            if contenders:
                leader = max(contenders, key=lambda one: (one.mean, len(one.scores)))
                return Best(
                    stage=stage,
                    q=leader.mean,
                    num_seeds=len(leader.scores),
                    settings=leader.settings,
                )
        return None

    def _progress(self, event: Event, now_s: float) -> None:
        trial = self.running.get(event.text("trial_id"))
        if trial is None:  # a late word of a trial that has ended
            return
        trial.last_word_s = now_s
        trial.step = _count(event, "step") or 0
        trial.num_planned_steps = _count(event, "num_planned_steps")
        trial.num_bad_steps = _count(event, "num_bad_steps") or 0
        trial.scale = event.number("scale")
        trial.grad_norm = event.number("grad_norm")

    def _finish(self, event: Event) -> None:
        self.running.pop(event.text("trial_id"), None)
        outcome = event.text("outcome")
        self.outcomes[outcome] += 1
        self.num_finished += 1
        self.saved_s += _saved_s(event) if outcome in _STOPPED_EARLY else 0.0
        q = event.number("q")
        if q is not None:
            key = json.dumps(dict(event.settings()), sort_keys=True, default=str)
            stage = self._contenders.setdefault(event.text("stage"), {})
            stage.setdefault(key, _Contender(event.settings())).scores.append(q)


def _count(event: Event, key: str) -> int | None:
    value = event.number(key)
    return None if value is None else int(value)


def _counts(event: Event, key: str) -> dict[str, int]:
    value = event.fields.get(key)
    if not isinstance(value, Mapping):
        return {}
    return {str(name): number for name, number in value.items() if isinstance(number, int)}


def _saved_s(event: Event) -> float:
    """Seconds the steps not taken would have cost at the pace of those taken."""
    steps, planned = event.number("num_steps"), event.number("num_planned_steps")
    wall_s = event.number("wall_s")
    if not steps or planned is None or wall_s is None:
        return 0.0
    return max(0.0, wall_s * (planned - steps) / steps)
