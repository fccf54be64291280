"""How a study can end, in the words of the report: one function for each end."""

from collections.abc import Sequence

from stability_search.records.trial import Outcome, Stage, TrialRow
from stability_search.records.verdict import ChoiceReason, Verdict, VerdictKind
from stability_search.search import caveats
from stability_search.search.choice import Choice, by_closeness, by_score
from stability_search.search.climb import Ladders
from stability_search.search.look import Look
from stability_search.space import Space
from stability_search.standing import ConfigurationStanding
from stability_search.yardstick import Yardstick

EXIT_STABLE = 0
EXIT_NONE = 3
EXIT_INFRASTRUCTURE = 4
EXIT_USER_CODE = 5
EXIT_INCOMPLETE = 6

CUT_SHORT = (
    "The budget ended within the second look: its seeds decided only which configurations still "
    "meet the bar."
)
ALONE = (
    "No other configuration reached 80 % of the leader's score, but the paired test could not "
    "separate it from all of them."
)


def _warnings(
    rows: Sequence[TrialRow], measure: Yardstick, *more: Sequence[str]
) -> tuple[str, ...]:
    """Collect what must be said beside a verdict."""
    return caveats.joined((*more, measure.warnings, caveats.unobserved(rows)))


def _ids(standings: Sequence[ConfigurationStanding]) -> tuple[str, ...]:
    return tuple(standing.config_id for standing in standings)


def _best_first(look: Look) -> tuple[str, ...]:
    rest = [s for s in look.confirmed if s.config_id not in look.met_ids]
    return _ids((*by_score(look.met), *by_closeness(rest)))


def _fastest(met: Sequence[ConfigurationStanding]) -> ConfigurationStanding:
    """Return the lowest last probe level; of equals the best score."""
    infinite = float("inf")
    return min(
        by_score(met), key=lambda one: infinite if one.probe_last is None else one.probe_last
    )


def stable(
    rows: Sequence[TrialRow],
    look: Look,
    choice: Choice,
    *,
    ladders: Ladders,
    more: tuple[str, ...] = (),
) -> Verdict:
    """End with a choice.

    Args:
        rows: Every finished trial.
        look: The last look.
        choice: What it showed.
        ladders: What was climbed for it, and which candidates were left out.
        more: Warnings of the caller's.
    """
    fastest = _fastest([standing for standing in look.confirmed if standing.meets_bar])
    is_alone = choice.reason is ChoiceReason.TIED and len(choice.tied) == 1
    return Verdict(
        kind=VerdictKind.STABLE,
        exit_code=EXIT_STABLE,
        choice=choice.chosen.config_id,
        choice_reason=choice.reason,
        fastest=fastest.config_id,
        tied=_ids(choice.tied),
        confirmed=_best_first(look),
        unfinished=ladders.unfinished,
        spared=ladders.spared,
        warnings=_warnings(
            rows,
            look.measure,
            caveats.few_seeds(choice.num_seeds),
            (ALONE,) if is_alone else (),
            more,
        ),
    )


def none_met_the_bar(
    rows: Sequence[TrialRow], space: Space, look: Look, *, unfinished: tuple[str, ...]
) -> Verdict:
    """End without a choice: what was confirmed missed the bar.

    Args:
        rows: Every finished trial.
        space: The study's space.
        look: The last look; at least one configuration was confirmed.
        unfinished: Candidates whose confirmation did not end.
    """
    # The fastest may meet the bar on fewer seeds than those that were looked at again.
    closest = by_closeness([s for s in look.confirmed if not s.meets_bar])[0]
    confirm = space.study.confirm
    bar = "every seed completed with q >= 1/2"
    if confirm.octaves:
        bar += f" and a margin of at least {confirm.min_margin} in octaves of the learning rate"
    return Verdict(
        kind=VerdictKind.NONE,
        exit_code=EXIT_NONE,
        closest=closest.config_id,
        confirmed=_best_first(look),
        unfinished=unfinished,
        missed=closest.missed,
        reason=f"None of {len(look.confirmed)} confirmed configurations met the bar: {bar}.",
        warnings=_warnings(rows, look.measure, caveats.few_seeds(confirm.seeds)),
    )


def no_signal(
    rows: Sequence[TrialRow],
    measure: Yardstick,
    *,
    confirmed: tuple[str, ...] = (),
    unfinished: tuple[str, ...] = (),
) -> Verdict:
    """Refuse to rank: no trial learned more than the probe's noise.

    Args:
        rows: Every finished trial.
        measure: Constants of the horizon without signal.
        confirmed: Configurations that had all seeds, not ranked.
        unfinished: Candidates whose confirmation did not end.
    """
    ended = [row for row in rows if row.summary.outcome.is_result]
    is_all_broken = bool(ended) and not any(
        row.summary.outcome is Outcome.COMPLETED for row in ended
    )
    advice = "Train longer or widen the range of learning rates."
    if is_all_broken:
        why, advice = f"all {len(ended)} trials were stopped", "Lower the learning rates."
    elif measure.e0 is None:
        why = "no finite probe loss says where learning starts"
        advice = "Look at the data of the probe and at the task's loss."
    elif measure.delta is None:
        why = f"no sound trial ended below a probe loss of {measure.e0:.4g}, which is no progress"
    else:
        why = (
            f"the best sound trial ended {measure.delta:.3g} below a probe loss of "
            f"{measure.e0:.4g}, within the noise"
        )
    return Verdict(
        kind=VerdictKind.NONE,
        exit_code=EXIT_NONE,
        confirmed=confirmed,
        unfinished=unfinished,
        reason=f"No signal over {measure.horizon} steps: {why}. {advice}",
        warnings=_warnings(rows, measure),
    )


def not_judged(rows: Sequence[TrialRow], measure: Yardstick) -> Verdict:
    """End without a verdict: no trial of the search says anything about a configuration.

    Args:
        rows: Every finished trial.
        measure: Constants of the search's horizon.
    """
    searched = [row.summary for row in rows if row.stage is Stage.SEARCH]
    errors = [one for one in searched if one.outcome is Outcome.USER_ERROR]
    reason = "No trial of the search gave a result, so nothing is known of any configuration: "
    if errors:
        last = errors[-1]
        reason += f"{len(errors)} ended with an error of the task, the last {last.reason}"
        reason += f" at {last.error_place}" if last.error_place else ""
    else:
        reason += f"{len(searched)} attempts lost their worker, the last: {searched[-1].reason}"
    return Verdict(
        kind=VerdictKind.INCOMPLETE,
        exit_code=EXIT_USER_CODE if errors else EXIT_INFRASTRUCTURE,
        reason=f"{reason}.",
        warnings=_warnings(rows, measure),
    )


def no_candidate(rows: Sequence[TrialRow], measure: Yardstick) -> Verdict:
    """End without confirm: nothing in the search was worth it.

    The closest is the highest value told to the sampler, then the most steps.

    Args:
        rows: Every finished trial.
        measure: Constants of the search's horizon.
    """
    told = [
        (-row.told_value, -row.summary.num_steps, row.index, row)
        for row in rows
        if row.stage is Stage.SEARCH and row.told_value is not None
    ]
    best = min(told, key=lambda one: one[:3])[3] if told else None
    return Verdict(
        kind=VerdictKind.NONE,
        exit_code=EXIT_NONE,
        closest=None if best is None else best.config_id,
        missed=() if best is None else (_end_in_words(best),),
        reason="No trial of the search completed with q > 0, so there was nothing to confirm.",
        warnings=_warnings(rows, measure),
    )


def _end_in_words(row: TrialRow) -> str:
    summary = row.summary
    if summary.outcome is Outcome.COMPLETED:
        return "completed, but with q = 0: it learned nothing or was not calm"
    name = summary.outcome.replace("_", " ")
    because = f" ({summary.reason})" if summary.reason else ""
    return f"{name} after {summary.num_steps} of {summary.num_planned_steps} steps{because}"


def incomplete(
    rows: Sequence[TrialRow],
    measure: Yardstick,
    *,
    confirmed: tuple[str, ...],
    unfinished: tuple[str, ...],
) -> Verdict:
    """End without a verdict: the budget ended before the first candidate was confirmed.

    Args:
        rows: Every finished trial.
        measure: Constants of the confirm horizon.
        confirmed: Configurations that had all seeds.
        unfinished: Candidates whose confirmation did not end.
    """
    return Verdict(
        kind=VerdictKind.INCOMPLETE,
        exit_code=EXIT_INCOMPLETE,
        confirmed=confirmed,
        unfinished=unfinished,
        reason="The budget ended before the first candidate was confirmed.",
        warnings=_warnings(rows, measure),
    )
