"""Events, states and settings as lines of plain, inert text."""

from collections.abc import Callable, Mapping

from stability_search.cli.board import Best, Board
from stability_search.events import Event, EventName
from stability_search.inert import inert
from stability_search.records.values import Json

_MINUTE_S, _HOUR_MIN = 60, 60


def counted(number: int, noun: str) -> str:
    """Return `1 trial` or `3 trials`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(seconds: float) -> str:
    """Return seconds as a reader says them: `45 s`, `3 min`, `2 h 05 min`.

    Example:
        >>> [duration(s) for s in (4.16, 45, 200, 7500)]
        ['4.2 s', '45 s', '3 min', '2 h 05 min']
    """
    if round(seconds, 1) < 10:  # noqa: PLR2004 - below ten seconds a tenth is worth showing
        return f"{seconds:.1f} s"
    if round(seconds) < 2 * _MINUTE_S:
        return f"{seconds:.0f} s"
    minutes = round(seconds / _MINUTE_S)
    if minutes < _HOUR_MIN:
        return f"{minutes} min"
    return f"{minutes // _HOUR_MIN} h {minutes % _HOUR_MIN:02d} min"


def setting_words(settings: Mapping[str, Json]) -> str:
    """Return settings as `name=value` words, values as in YAML."""
    return " ".join(f"{inert(name)}={_value(value)}" for name, value in settings.items())


def event_line(event: Event) -> str:
    """Return the line of an event, without its time; empty for progress of a trial."""
    words = _LINES.get(event.name)
    return "" if words is None else words(event)


def outcome_words(board: Board) -> str:
    """Return the counts by outcome, most frequent first."""
    counts = sorted(board.outcomes.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{number} {inert(outcome)}" for outcome, number in counts)


def stage_words(board: Board, now_s: float) -> str:
    """Return how far the stage is and how long it may still take."""
    if not board.stage:
        return "starting"
    about, most = ("at most ", "at most ") if board.is_bound else ("about ", "")
    planned = "" if board.num_planned is None else f" of {most}{board.num_planned}"
    left_s = board.time_left_s(now_s)
    left = (
        "time left unknown" if left_s is None else f"{about}{duration(left_s)} left in this stage"
    )
    return f"{inert(board.stage)}: {board.num_finished}{planned} trials done, {left}"


def best_words(best: Best) -> str:
    """Return the best so far: its run score and where it was measured."""
    return f"q {best.q:.3f} ({best.stage}, {counted(best.num_seeds, 'seed')})"


def heartbeat(board: Board, now_s: float) -> str:
    """Return the line that says the study is alive when nothing else does."""
    parts = [stage_words(board, now_s)]
    if board.outcomes:
        parts.append(f"so far {outcome_words(board)}")
    if board.running:
        quietest_s = max(now_s - trial.last_word_s for trial in board.running.values())
        silence = f"longest silence {duration(quietest_s)}"
        parts.append(f"{counted(len(board.running), 'trial')} running, {silence}")
    return "; ".join(parts)


def _value(value: Json) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.4g}"
    return inert(str(value))


def _study_started(event: Event) -> str:
    trials, slots = event.number("trials"), event.number("slots")
    parts = ["study started"]
    if trials is not None:
        parts.append(counted(int(trials), "search trial"))
    if slots is not None:
        parts.append(f"{slots:.0f} at a time")
    if event.text("device"):
        parts.append(f"on {inert(event.text('device'))}")
    return f"{', '.join(parts)}; files in {inert(event.text('run_directory'))}"


def _trial_finished(event: Event) -> str:
    words = [f"{inert(event.text('trial_id'))} {inert(event.text('outcome'))}"]
    if event.text("reason"):
        words.append(f" ({inert(event.text('reason'))})")
    q, wall_s = event.number("q"), event.number("wall_s")
    steps, planned = event.number("num_steps"), event.number("num_planned_steps")
    if q is not None:
        words.append(f", q {q:.3f}")
    if steps is not None and planned is not None:
        words.append(f", {steps:.0f} of {planned:.0f} steps")
    if wall_s is not None:
        words.append(f" in {duration(wall_s)}")
    return "".join(words)


def _stage_started(event: Event) -> str:
    planned, most = event.number("planned"), event.number("planned_at_most")
    number = most if planned is None else planned
    at_most = "at most " if planned is None else ""
    trials = "" if number is None else f", {at_most}{counted(int(number), 'trial')}"
    return f"stage {inert(event.text('stage'))}{trials}"


def _trial_started(event: Event) -> str:
    return f"{inert(event.text('trial_id'))} started: {setting_words(event.settings())}"


def _trial_retried(event: Event) -> str:
    reason = inert(event.text("reason")) or "its worker was lost"
    return f"{inert(event.text('trial_id'))} is tried again: {reason}"


def _node_quarantined(event: Event) -> str:
    return f"node {inert(event.text('node'))} is left out: {inert(event.text('reason'))}"


def _message(event: Event) -> str:
    # A traceback stays readable; set in, its lines cannot be taken for events.
    level = event.text("level")
    text = inert(event.text("text"), keeps="\n").replace("\n", "\n    ")
    return text if level in {"", "info"} else f"{inert(level)}: {text}"


def _study_finished(event: Event) -> str:
    exit_code = event.number("exit_code")
    code = "" if exit_code is None else f", exit {exit_code:.0f}"
    return f"study finished: {inert(event.text('verdict'))}{code}"


_LINES: Mapping[str, Callable[[Event], str]] = {
    EventName.STUDY_STARTED: _study_started,
    EventName.STAGE_STARTED: _stage_started,
    EventName.TRIAL_STARTED: _trial_started,
    EventName.TRIAL_FINISHED: _trial_finished,
    EventName.TRIAL_RETRIED: _trial_retried,
    EventName.NODE_QUARANTINED: _node_quarantined,
    EventName.MESSAGE: _message,
    EventName.STUDY_FINISHED: _study_finished,
}
