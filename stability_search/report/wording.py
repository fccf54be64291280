"""Honest words: how a number of the study is said, the same on every page and in the terminal."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from stability_search.errors import UserCodeError
from stability_search.inert import plain
from stability_search.next_command import next_command
from stability_search.records.trial import Outcome
from stability_search.records.verdict import ChoiceReason, VerdictKind
from stability_search.report.context import Row, View
from stability_search.spending import EndedTrial, spent_by

MIN_SEEDS_FOR_WINNER = 5
_NOTHING_LEARNED = 0.5  # a score below this is printed as such
_LARGE = 1e6  # from here on, and below a thousandth of a thousandth, numbers have an exponent
_THOUSAND = 1000
_EXACT = 1e15  # whole settings below it are written out in full
_LONGEST_REASON = 80  # characters; the table of trials has the whole of it

OUTCOME_WORDS: dict[str, str] = {
    Outcome.COMPLETED: "completed",
    Outcome.PRUNED: "killed for bad steps",
    Outcome.DIVERGED: "diverged",
    Outcome.SCALE_COLLAPSE: "loss scale collapsed",
    Outcome.NONFINITE_PARAMETERS: "parameters became non-finite",
    Outcome.OUT_OF_MEMORY: "out of memory",
    Outcome.TIMED_OUT: "timed out",
    Outcome.USER_ERROR: "error in the task",
    Outcome.INFRASTRUCTURE: "lost to a machine",
}


def number(value: float | None) -> str:
    """Return a number to three digits; a dash for None."""
    if value is None:
        return "\u2013"
    if isinstance(value, int) or (value == int(value) and 1 <= abs(value) < _LARGE):
        return f"{int(value):,}"
    if _THOUSAND <= abs(value) < _LARGE:
        return f"{float(f'{value:.3g}'):,.0f}"
    mantissa, _, exponent = f"{value:.3g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def setting_value(value: Any) -> str:  # noqa: ANN401 - any JSON scalar
    """Return the value of a setting as a reader writes it; null is off or inactive."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT:
        return str(int(value))
    return number(value) if isinstance(value, float) else plain(str(value))


def half_by(steps: Sequence[int]) -> str:
    """Return by when half of some events had happened; of a single one, when."""
    when = f"step {statistics.median_high(steps):,}"
    return f"at {when}" if len(steps) == 1 else f"half of them by {when}"


def count(n: int, singular: str, plural: str = "") -> str:
    """Return a number with its noun."""
    return f"{n:,} {singular if n == 1 else plural or singular + 's'}"


def percent_at_most(share: float) -> str:
    """Return an upper bound in per cent to two digits, never rounded down."""
    if share >= 1:
        return "100 %"
    value = 100 * share
    if value <= 0:
        return "0 %"
    digits = max(0, 1 - math.floor(math.log10(value)))
    step = 10.0**digits
    return f"{math.ceil(round(value * step, 6)) / step:.{digits}f} %"


def part(share: float) -> str:
    """Return a share that was counted, in per cent; all and none are words, never 100 and 0 %."""
    value = 100 * share
    if share <= 0 or share >= 1:
        return "all" if share >= 1 else "none"
    if value < 0.1:  # noqa: PLR2004 - one digit is shown
        return "less than 0.1 %"
    if value >= 99.5:  # noqa: PLR2004 - would be rounded to all
        return "more than 99 %"
    return f"{value:.0f} %" if value >= 10 else f"{value:.2g} %"  # noqa: PLR2004 - two digits


def score_text(score: float | None) -> str:
    """Return a stability score; below one half nothing was learned."""
    if score is None:
        return "\u2013"
    return f"{score:.1f}" if score >= _NOTHING_LEARNED else "< 0.5"


def margin_text(row: Row, octaves: int) -> str:
    """Return how many doublings of the learning rate a configuration survives."""
    margin = row.get("margin_octaves")
    if octaves == 0 or margin is None:
        return "not measured"
    if margin == 0 and not row["margin_is_capped"]:
        return "no doubling"
    return (
        f"at least {count(margin, 'doubling')}"
        if row["margin_is_capped"]
        else (count(margin, "doubling"))
    )


def seeds_text(row: Row) -> str:
    """Return on how many of its seeds a configuration is stable."""
    return f"{row.get('num_stable_seeds') or 0} of {count(row.get('num_seeds') or 0, 'seed')}"


def bad_steps_text(row: Row) -> str:
    """Return the bad steps of a configuration and the bound on their rate."""
    judged = row.get("num_judged_steps") or 0
    if judged == 0:
        return "no step was judged"
    text = f"{row['num_bad_steps']:,} of {count(judged, 'step')} bad"
    bound = row.get("bad_rate_bound")
    return (
        text if bound is None else f"{text}; at most {percent_at_most(bound)} at 95 % confidence"
    )


def headline(view: View) -> str:
    """Return the verdict in a few words; the horizon is part of it."""
    match view.verdict.kind:
        case VerdictKind.STABLE:
            row = view.by_id.get(view.verdict.choice or "", {})
            steps = row.get("num_planned_steps") or view.study.confirm.steps
            return f"Stable over {count(steps, 'step')}"
        case VerdictKind.NONE:
            return "No stable configuration"
        case VerdictKind.INCOMPLETE:
            state = "Still running" if view.verdict.is_running else "Not finished"
            return f"{state}: {progress_text(view)}"


def progress_text(view: View) -> str:
    """Return how far an unfinished study came, in trials that count for something."""
    confirmed = sum(row["stage"] == "confirm" for row in view.results)
    confirm = f"{count(confirmed, 'trial')} of confirm"
    if not view.report.varying:  # nothing to search for
        return confirm
    done = len({row["index"] for row in view.results if row["stage"] == "search"})
    text = f"{done:,} of {count(view.study.search.trials, 'trial')}"
    return f"{text}, {confirm}" if confirmed else text


def choice_text(view: View) -> str:
    """Return why the choice is the choice, or why there is none, in a sentence or two."""
    verdict = view.verdict
    if verdict.choice_reason is None:
        return plain(view.private(verdict.reason))
    match verdict.choice_reason:
        case ChoiceReason.WINNER:
            return (
                "It scored higher than every other configuration that competed, each time in an "
                "exact paired test over the seeds."
            )
        case ChoiceReason.TIED:
            return _tied_text(view)
        case ChoiceReason.ONLY:
            which = "that competed" if _num_beside(view) else "confirmed on every seed"
            return f"Of the configurations {which}, only this one met the bar."


def choice_details(view: View) -> str:
    """Say what else met the bar, and which candidates did not get all seeds; may be empty."""
    parts = []
    if view.verdict.choice_reason is ChoiceReason.ONLY and (beside := _num_beside(view)):
        was = "was" if beside == 1 else "were"
        parts.append(
            f"{count(beside, 'other')} met it too, but {was} confirmed only as possibly the "
            "fastest."
        )
    begun = {c for c in view.verdict.spared if c in view.by_id and view.ladder(c)}
    if num_begun := len(begun):
        its, it = ("its", "it") if num_begun == 1 else ("their", "they")
        parts.append(
            f"{count(num_begun, 'other candidate')} did not get all seeds: with {its} first ones "
            f"{it} missed the bar, or could not have scored 2 % more."
        )
    if num_untried := len(set(view.verdict.spared) - begun):
        was = "was" if num_untried == 1 else "were"
        parts.append(
            f"{count(num_untried, 'other candidate')} {was} not tried in confirm: no "
            "configuration could have scored 2 % more than the choice."
        )
    return " ".join(parts)


def _num_beside(view: View) -> int:
    """Return how many configurations met the bar that are neither the choice nor tied with it."""
    confirmed = set(view.verdict.confirmed) - {view.verdict.choice, *view.verdict.tied}
    return sum(bool(view.by_id.get(c, {}).get("meets_bar")) for c in confirmed)


def _tied_text(view: View) -> str:
    """Say with how many others the choice is tied, and what decided among them."""
    row = view.by_id.get(view.verdict.choice or "", {})
    others = max(0, len(view.verdict.tied) - 1)
    few = (row.get("num_seeds") or 0) < MIN_SEEDS_FOR_WINNER
    why = "not enough seeds to name a winner" if few else "no paired test tells them apart"
    if not others:
        return (
            "No winner: it has the highest score and no other reached 80 % of it, but "
            f"{'there are ' if few else ''}{why}."
        )
    rule = "the choice has the larger margin, then the higher score, then the lower rate"
    return f"Tied with {count(others, 'other')}: {why}; {rule}."


def outcome_counts(rows: Iterable[Row]) -> list[tuple[str, int]]:
    """Return how many trials ended each way, in the order of the outcomes."""
    counts = Counter(row["outcome"] for row in rows)
    return [(outcome, counts[outcome]) for outcome in OUTCOME_WORDS if counts[outcome]]


def outcomes_text(view: View, rows: Sequence[Row]) -> str:
    """Return the outcomes of some trials as one phrase, and what the task raised.

    Args:
        view: The study; its other trials show whether a value of a setting is what they share.
        rows: Trials of it.
    """
    parts = [
        f"{n:,} {OUTCOME_WORDS[outcome]}"
        if outcome != Outcome.USER_ERROR
        else _errors_text(view, [row for row in rows if row["outcome"] == outcome])
        for outcome, n in outcome_counts(rows)
    ]
    return ", ".join(parts) if parts else "no trial ended"


def _errors_text(view: View, failed: Sequence[Row]) -> str:
    """Count errors of the task, with the most frequent reason and what they have in common."""
    said = count(len(failed), "error in the task", "errors in the task")
    reasons = Counter(row["reason"] or row["error_type"] or "" for row in failed)
    reason, times = min(reasons.items(), key=lambda item: (-item[1], item[0]))
    whose = "" if times == len(failed) else f"{times:,} of them "
    notes = [f"{whose}{_shortened(reason)}" if reason else "", _shared_value(view)]
    found = "; ".join(note for note in notes if note)
    return f"{said} ({found})" if found else said


def _shared_value(view: View) -> str:
    """Name the one value of a setting with which every trial failed in the task, and no other.

    Trials that a machine lost never came so far. One configuration shares all its values, so it
    takes two; and where two settings tell the failures apart, nobody knows which one it was.
    """
    failed = [row for row in view.trials if row["outcome"] == Outcome.USER_ERROR]
    if len({row["config_id"] for row in failed}) < 2:  # noqa: PLR2004 - see above
        return ""
    sound = [row for row in view.trials if Outcome(row["outcome"]).is_result]
    found = []
    for name in view.report.varying:
        value = failed[0].get(name)
        is_shared = all(row.get(name) == value for row in failed)
        if is_shared and sound and all(row.get(name) != value for row in sound):
            found.append((name, value))
    # A setting that is null because of another one tells nothing that this other does not.
    if len(found) > 1:
        found = [(name, value) for name, value in found if value is not None]
    if len(found) != 1:
        return ""
    name, value = found[0]
    return f"each with {plain(name)}={_shortened(setting_value(value))}"


def _shortened(text: str) -> str:
    shown = plain(text)
    return shown if len(shown) <= _LONGEST_REASON else f"{shown[: _LONGEST_REASON - 3]}..."


def next_step(view: View) -> str:
    """Return the command that goes on from this verdict."""
    known = view.report.environment.get("command") or view.report.command
    return next_command(
        view.verdict,
        plain(view.private(view.report.run_directory)),
        study=view.study,
        spent=spent_by(map(_ended, view.trials), has_search=bool(view.report.varying)),
        made_by=plain(view.private(str(known))),
    )


def _ended(row: Row) -> EndedTrial:
    steps = row["control_num_steps"] if row["is_control"] else row["num_steps"]
    return EndedTrial(
        stage=row["stage"],
        num_steps=steps or 0,
        started_at=row["started_at"] or "",
        wall_s=row["wall_s"] or 0.0,
    )


def next_hint(view: View) -> str:
    """Say in a sentence what that command does, and what to do before it."""
    match view.verdict.kind:
        case VerdictKind.STABLE:
            return (
                "Trains with the choice under the same guards. To confirm it again, with other "
                "seeds or for longer, run best.yaml."
            )
        case VerdictKind.NONE:
            return "Change the space file as said above, then run it again."
        case VerdictKind.INCOMPLETE if view.verdict.exit_code == UserCodeError.exit_code:
            return (
                "Mend the task, then run it again. The run directory holds a copy of the task as "
                "it was, so start from your own files."
            )
        case VerdictKind.INCOMPLETE if view.verdict.is_running:
            return (
                "Says how far it has come; `stability-search report` draws this page again, with "
                "what has ended since."
            )
        case VerdictKind.INCOMPLETE:
            return "Goes on where the study stopped; trials that ended are kept."
