"""Was killing right? What killed trials became that were let run on."""

from dataclasses import dataclass

from scipy.special import betaincinv

from stability_search.records.trial import Outcome
from stability_search.report.context import View
from stability_search.report.wording import count, percent_at_most
from stability_search.scoring.constants import S_V1

_CONFIDENCE = 0.95
OWN_LIMIT = "max_bad_steps"
"""Reason of a trial that the user's own limit of bad steps ended: no kill."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Control:
    """The search's killed trials, and how those ended that were let run on.

    Attributes:
        num_killed: Search trials that the kill rule killed.
        num_run_on: Of these, trials that were let run on.
        num_results: Of these, trials whose later end says something about stability.
        num_sound: Of these, trials that would have completed with q >= 1/2: killed wrongly.
        bound: The share of sound ones among the killed is at most this at 95 % confidence, in
            [0, 1]; 1 where there was no result.
    """

    num_killed: int
    num_run_on: int
    num_results: int
    num_sound: int
    bound: float


def control_of(view: View) -> Control | None:
    """Count what became of killed trials; None where the study has no control.

    Source:
        Clopper and Pearson, The use of confidence or fiducial limits, 1934; one-sided.
    """
    if view.study.control == 0:
        return None
    killed = [
        row
        for row in view.in_stage("search")
        if row["outcome"] == Outcome.PRUNED and row["reason"] != OWN_LIMIT
    ]
    run_on = [row for row in killed if row["is_control"]]
    results = [row for row in run_on if row["control_q"] is not None]
    num_sound = sum(
        row["control_outcome"] == Outcome.COMPLETED and row["control_q"] >= S_V1.alive_q
        for row in results
    )
    num_others = len(results) - num_sound
    return Control(
        num_killed=len(killed),
        num_run_on=len(run_on),
        num_results=len(results),
        num_sound=num_sound,
        bound=float(betaincinv(num_sound + 1, num_others, _CONFIDENCE)) if num_others else 1.0,
    )


def control_text(view: View) -> str:
    """Say in a sentence or two what the control found; empty where the study has none."""
    found = control_of(view)
    if found is None:
        return ""
    if not found.num_killed:
        return "Control: the kill rule killed no trial of the search."
    was = "was" if found.num_run_on == 1 else "were"
    text = (
        f"Control: {found.num_run_on:,} of {count(found.num_killed, 'killed trial')} {was} let "
        "run on"
    )
    if not found.num_results:
        return f"{text}, and none gave a result." if found.num_run_on else f"{text}."
    among = "them" if found.num_results == found.num_run_on else f"{found.num_results:,} results"
    return (
        f"{text}; {found.num_sound:,} of {among} would have completed with q of at least 1/2: at "
        f"most {percent_at_most(found.bound)} of kills at 95 % confidence."
    )
