"""The command `status`: how a run is doing, read from its directory."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from stability_search.cli.cluster_commands import (
    InsecureOption,
    OfClusterOption,
    remote_status,
)
from stability_search.cli.formats import Format, FormatOption, print_formatted
from stability_search.cli.lines import duration, setting_words
from stability_search.cli.next_step import next_step
from stability_search.cli.options import RunArgument, Work
from stability_search.errors import UsageError
from stability_search.records.trial import Outcome, Stage
from stability_search.records.values import Json
from stability_search.records.verdict import Verdict

if TYPE_CHECKING:
    from stability_search.search.status import BestSoFar, RunStatus, StageStatus

_MIB = 1024**2
_WAIT = "wait; `stability-search status` says more later, and Ctrl-C where it runs stops it"
_COPY = "a copy, as of its last fetch: the study itself is on a cluster, and may run there"


def status(
    *,
    run: RunArgument,
    chosen: FormatOption = Format.TABLE,
    address: OfClusterOption = None,
    insecure: InsecureOption = False,
) -> Work:
    """Say how a run is doing: finished, running, interrupted or damaged.

    Reads the run directory and disturbs nothing. A trial counts once it has ended. With --address
    RUN is the name of a study that was submitted there.
    Exit: 0, or 2 where there is no run or its ledger is damaged.
    """

    def work() -> int:
        if address is not None:
            return remote_status(str(run), address, chosen, insecure=insecure)
        from stability_search.cluster.copies import unfinished_study
        from stability_search.search.status import RunState, read_status

        found = read_status(run, now=datetime.now(UTC))
        following = _WAIT if found.state is RunState.RUNNING else next_step(run, found.verdict)
        if found.state is RunState.INTERRUPTED and unfinished_study(run, found.verdict):
            found = replace(found, problem=_COPY)
        print_formatted(
            chosen,
            lines=_lines(found, following),
            rows=[_row(found, following)],
            document={**found.to_json(), "next": following},
        )
        return UsageError.exit_code if found.state is RunState.DAMAGED else 0

    return work


def _lines(found: "RunStatus", following: str) -> list[str]:
    lines = [f"{found.run_directory}: {found.state}"]
    if found.stage is not None:
        lines[0] += f", {_where(found)}"
    if found.problem:
        lines.append(f"problem: {found.problem}")
    verdict = found.verdict
    if verdict is not None:
        reason = f": {verdict.reason}" if verdict.reason else ""
        lines.append(f"verdict: {verdict.kind}, exit {verdict.exit_code}{reason}")
    if found.stages:
        lines.append(f"trials: {', '.join(map(_stage_words, found.stages))}")
    if found.outcomes:
        lines.append(f"outcomes: {', '.join(map(_outcome_words, found.outcomes.items()))}")
    if found.best is not None:
        lines.append(f"{_role(found.best, verdict)}: {_best_words(found.best)}")
    disk = f"disk: {found.disk_bytes / _MIB:.1f} MiB"
    return [*lines, *_times(found), disk, f"next: {following}"]


def _role(best: "BestSoFar", verdict: Verdict | None) -> str:
    if verdict is not None and best.config_id == verdict.choice:
        return "choice"
    if verdict is not None and best.config_id == verdict.closest:
        return "closest"
    return "best so far"


def _where(found: "RunStatus") -> str:
    return f"stage {found.stage}" if found.verdict is None else f"reached stage {found.stage}"


def _stage_words(one: "StageStatus") -> str:
    at_most = "at most " if one.stage == "confirm" else ""
    return f"{one.stage} {one.num_finished} of {at_most}{one.num_planned}"


def _outcome_words(counted: tuple[str, int]) -> str:
    """Count an outcome; what is no result ended all the same, but no verdict counts it."""
    name, number = counted
    return f"{number} {name}" if Outcome(name).is_result else f"{number} {name} (no result)"


def _best_words(best: "BestSoFar") -> str:
    seeds = "1 seed" if best.num_seeds == 1 else f"{best.num_seeds} seeds"
    where = f"{best.config_id}, q {best.q:.3f} ({best.stage}, {seeds})"
    return f"{where}: {setting_words(best.settings)}"


def _times(found: "RunStatus") -> list[str]:
    word = f"last word: {duration(found.last_word_age_s)} ago, {found.last_word_at}"
    if found.last_finished_age_s is None:
        return [word]
    age = duration(found.last_finished_age_s)
    return [
        f"since: {found.started_at}",
        f"last finished trial: {age} ago, {found.last_finished_at}",
        word,
    ]


def _row(found: "RunStatus", following: str) -> dict[str, Json]:
    """Return all of it as one flat row: a column per stage and per outcome."""
    whole = found.to_json()
    nested = ("schema", "stages", "outcomes", "best", "verdict")
    row = {name: value for name, value in whole.items() if name not in nested}
    done = {str(one.stage): one for one in found.stages}
    for stage in Stage:
        one = done.get(stage)
        row[f"{stage}_finished"] = None if one is None else one.num_finished
        row[f"{stage}_planned"] = None if one is None else one.num_planned
    row |= {f"num_{outcome}": found.outcomes.get(outcome, 0) for outcome in Outcome}
    for prefix, part, names in (
        ("best_", whole["best"], ("config_id", "q", "num_seeds")),
        ("verdict_", whole["verdict"], ("kind", "exit_code", "choice")),
    ):
        values = part if isinstance(part, dict) else {}
        row |= {f"{prefix}{name}": values.get(name) for name in names}
    return {**row, "next": following}
