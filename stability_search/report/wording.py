"""Honest words: how a number of the study is said, the same on every page and in the terminal."""

import math
import re
import shlex
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from stability_search.errors import UserCodeError
from stability_search.records import ChoiceReason, Outcome, VerdictKind
from stability_search.report.context import Row, View

MIN_SEEDS_FOR_WINNER = 5
_NOTHING_LEARNED = 0.5  # a score below this is printed as such
_LARGE = 10_000
_EXACT = 1e15  # whole settings below it are written out in full
_CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff]+"
)

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


def plain(text: str) -> str:
    """Return text on one line without control or direction characters."""
    return " ".join(_CONTROL.sub(" ", text).split())


def number(value: float | None) -> str:
    """Return a number to three digits; a dash for None."""
    if value is None:
        return "\u2013"
    if isinstance(value, int) or (value == int(value) and 1 <= abs(value) < _LARGE):
        return f"{int(value):,}"
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
            return f"Not finished: {progress_text(view)}"


def progress_text(view: View) -> str:
    """Return how far an unfinished study came."""
    done = len({row["index"] for row in view.in_stage("search")})
    confirmed = len(view.in_stage("confirm"))
    text = f"{done:,} of {count(view.study.search.trials, 'trial')}"
    return f"{text}, {count(confirmed, 'confirmation')}" if confirmed else text


def choice_text(view: View) -> str:
    """Return why the choice is the choice, or why there is none, in a sentence or two."""
    verdict = view.verdict
    if verdict.choice_reason is None:
        return plain(view.private(verdict.reason))
    row = view.by_id.get(verdict.choice or "", {})
    few = (row.get("num_seeds") or 0) < MIN_SEEDS_FOR_WINNER
    match verdict.choice_reason:
        case ChoiceReason.WINNER:
            return "It beats every other configuration that met the bar in an exact paired test."
        case ChoiceReason.TIED:
            others = max(0, len(verdict.tied) - 1)
            why = "not enough seeds to name a winner" if few else "no paired test tells them apart"
            rule = "the choice has the larger margin, then the higher score, then the lower rate"
            return f"Tied with {count(others, 'other')}: {why}; {rule}."
        case ChoiceReason.ONLY:
            if verdict.spared:
                spared = count(len(verdict.spared), "other candidate")
                return (
                    "Of the candidates confirmed on every seed, only this one met the bar; "
                    f"{spared} were left out: by what was known when confirm began none could "
                    "have scored 2 % more, or met the bar."
                )
            return "Of the candidates confirmed on every seed, only this one met the bar."


def outcome_counts(rows: Iterable[Row]) -> list[tuple[str, int]]:
    """Return how many trials ended each way, in the order of the outcomes."""
    counts = Counter(row["outcome"] for row in rows)
    return [(outcome, counts[outcome]) for outcome in OUTCOME_WORDS if counts[outcome]]


def outcomes_text(rows: Iterable[Row]) -> str:
    """Return the outcomes of some trials as one phrase."""
    parts = [f"{n:,} {OUTCOME_WORDS[outcome]}" for outcome, n in outcome_counts(rows)]
    return ", ".join(parts) if parts else "no trial ended"


def next_command(view: View) -> str:
    """Return the command that goes on from this verdict: a choice can be checked again."""
    run = view.private(view.report.run_directory).rstrip("/")

    match view.verdict.kind:
        case VerdictKind.STABLE:
            return f"stability-search run --space {_quoted(run + '/best.yaml')}"
        case VerdictKind.NONE:
            return f"stability-search run --space {_quoted(run + '/space.yaml')}"
        case VerdictKind.INCOMPLETE if view.verdict.exit_code == UserCodeError.exit_code:
            return f"stability-search run --space {_quoted(run + '/space.yaml')}"
        case VerdictKind.INCOMPLETE:
            return f"stability-search resume {_quoted(run)}{_more_budget(view)}"


def _more_budget(view: View) -> str:
    """Return the option that raises the budget which ended a study, if one did."""
    search = view.study.search
    if "budget" not in view.verdict.reason:
        return ""
    if search.step_budget is not None:
        return f" --set search.step_budget={2 * search.step_budget}"
    return f" --set search.time_budget_s={2 * (search.time_budget_s or 0):g}"


def _quoted(path: str) -> str:
    """Quote a path for a shell, leaving a leading `~/` to be expanded."""
    text = plain(path)
    return f"~/{shlex.quote(text[2:])}" if text.startswith("~/") else shlex.quote(text)
