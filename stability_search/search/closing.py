"""What a study leaves behind when it ends or stops: verdict, tables, report and `best.yaml`.

All of it comes from the rows of the ledger and can be made again at any time.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stability_search import space as spaces
from stability_search.errors import LockedError, UserCodeError
from stability_search.files import write_whole
from stability_search.records.step import StepRecord
from stability_search.records.trial import Stage, TrialRow
from stability_search.records.values import Json
from stability_search.records.verdict import Verdict, VerdictKind
from stability_search.search import run_directory
from stability_search.search.ledger import Ledger, newer_version
from stability_search.search.plan import StudyPlan
from stability_search.search.run_directory import RunDirectory
from stability_search.space import Space
from stability_search.space_directory import name_of_copy

if TYPE_CHECKING:
    from stability_search.run_tables import Run

EXIT_INTERRUPTED = 130
_END = "end"  # fact of the ledger: how the study ended, and after how many rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """A study that has ended, or stopped early.

    Attributes:
        directory: Its run directory.
        verdict: How it ended.
        lines: The verdict as plain text for a terminal.
    """

    directory: Path
    verdict: Verdict
    lines: tuple[str, ...]

    def tables(self) -> "Run":
        """Return its trials, configurations and steps as pandas tables."""
        from stability_search.run_tables import read_run

        return read_run(self.directory)


def render_run(path: Path) -> Study:
    """Write tables and report of a run again, from its ledger alone.

    A run that still goes on is reported on as far as it has come.

    Raises:
        UsageError: No run directory, or its ledger is damaged.
    """
    directory = run_directory.open_run(path)
    try:
        with run_directory.lock(directory):
            return _render(directory, Ledger(directory.ledger), is_running=False)
    except LockedError:
        return _render_running(directory)


def _render_running(directory: RunDirectory) -> Study:
    """Write a report beside the process that still works on the run.

    That process keeps its verdict first and writes its own report then, which must not be
    replaced by one of earlier: where a verdict has come meanwhile, all is written once more.
    """
    while True:
        ledger = Ledger(directory.ledger)
        study = _render(directory, ledger, is_running=True)
        if known_verdict(Ledger(directory.ledger)) == known_verdict(ledger):
            return study


def _render(directory: RunDirectory, ledger: Ledger, *, is_running: bool) -> Study:
    space = run_directory.space_of(directory, ledger.facts())
    rows = ledger.rows()
    verdict = known_verdict(ledger) or unfinished(
        space, rows, directory.path, exit_code=EXIT_INTERRUPTED, is_running=is_running
    )
    command = f"stability-search report {shlex.quote(str(directory.path))}"
    return write_all(space, directory, rows, verdict, command)


def keep_verdict(ledger: Ledger, verdict: Verdict) -> None:
    """Write the verdict into the ledger: budgets that ended a study cannot be replayed."""
    known: dict[str, Any] = {"verdict": verdict.to_json(), "num_rows": len(ledger.rows())}
    ledger.put_facts({**ledger.facts(), _END: known})


def forget_verdict(ledger: Ledger, facts: Mapping[str, Json]) -> None:
    """Put facts that a verdict was not reached under."""
    ledger.put_facts({key: value for key, value in facts.items() if key != _END})


def known_verdict(ledger: Ledger) -> Verdict | None:
    """Return the verdict a study ended with; None if it was killed or has gone on since.

    Raises:
        UsageError: A newer version of the program wrote one that cannot be read here.
    """
    end = ledger.facts().get(_END)
    if not isinstance(end, dict) or end["num_rows"] != len(ledger.rows()):
        return None
    verdict: Any = end["verdict"]
    try:
        return Verdict.from_json(verdict)
    except (ValueError, TypeError, KeyError) as error:
        raise newer_version(ledger.path, "its verdict cannot be read here") from error


def unfinished(  # noqa: PLR0913 - what is known of a study that has no end
    space: Space,
    rows: Sequence[TrialRow],
    path: Path,
    *,
    exit_code: int,
    reason: str = "It has not ended.",
    is_running: bool = False,
) -> Verdict:
    """Return the verdict of a study that stopped early or runs, with the command to use next.

    Args:
        space: The study's space.
        rows: Every finished trial.
        path: The run directory.
        exit_code: Exit code of the command that stopped.
        reason: Why it stopped, a sentence.
        is_running: True if it has not stopped at all.
    """
    if exit_code == UserCodeError.exit_code:
        how = "Mend the task and start a new study with `run`"
        return Verdict(kind=VerdictKind.INCOMPLETE, exit_code=exit_code, reason=f"{reason} {how}.")
    plan = StudyPlan(space, device="cpu", rows=rows)
    done = sum(row.stage is Stage.SEARCH and row.summary.outcome.is_result for row in rows)
    run = shlex.quote(str(path))
    status = f"`stability-search status {run}`"
    where = f"the {plan.stage.value} stage"
    if space.has_space:
        where += f" with results of {done} of {plan.num_planned(Stage.SEARCH)} search trials"
    return Verdict(
        kind=VerdictKind.INCOMPLETE,
        exit_code=exit_code,
        is_running=is_running,
        reason=f"It still runs and has reached {where}; {status} tells more."
        if is_running
        else f"{reason} It had reached {where}; go on with `stability-search resume {run}`.",
    )


def write_all(
    space: Space,
    directory: RunDirectory,
    rows: Sequence[TrialRow],
    verdict: Verdict,
    command: str,
) -> Study:
    """Write tables, report and `best.yaml`, each whole or not at all.

    Args:
        space: The study's space.
        directory: Where to.
        rows: Every finished trial.
        verdict: How the study ended or stopped.
        command: The command line, for the record.
    """
    from stability_search.report import Report, verdict_lines, write_report
    from stability_search.step_files import read_steps
    from stability_search.table import build_tables, study_yardsticks, write_tables

    yardsticks = study_yardsticks(rows, space.study)
    names = _setting_names(space)
    tables = build_tables(
        rows, space_settings=names, study=space.study, yardsticks=yardsticks, verdict=verdict
    )
    step_files = {row.trial_id: directory.step_file(row.trial_id, row.attempt) for row in rows}

    def read(trial_id: str) -> Sequence[StepRecord]:
        return read_steps(step_files[trial_id])

    report = Report(
        tables=tables,
        verdict=verdict,
        study=space.study,
        yardsticks=yardsticks,
        space_text=space.text,
        task_name=space.task_name,
        device=_device_of(rows),
        environment=_written_environment(directory),
        start_config_ids=_start_config_ids(space, rows),
        setting_names=names,
        varying=space.varying,
        command=command,
        run_directory=str(directory.path),
        read_steps=read,
    )
    write_tables(tables, directory.path)
    write_report(report, directory.path)
    lines = tuple(verdict_lines(report))
    _write_best(space, directory, rows, verdict, lines)
    return Study(directory=directory.path, verdict=verdict, lines=lines)


def _write_best(
    space: Space,
    directory: RunDirectory,
    rows: Sequence[TrialRow],
    verdict: Verdict,
    lines: Sequence[str],
) -> None:
    if verdict.choice is None:
        directory.best.unlink(missing_ok=True)
        return
    settings = next(row.settings for row in rows if row.config_id == verdict.choice)
    named = replace(space, task_name=name_of_copy(space))
    text = spaces.best_yaml(named, settings, "\n".join(lines))
    write_whole(directory.best, text)


def _setting_names(space: Space) -> tuple[str, ...]:
    return (*space.fixed, *(name for name in space.varying if name not in space.fixed))


def _start_config_ids(space: Space, rows: Sequence[TrialRow]) -> tuple[str, ...]:
    first = {
        row.index: row.config_id
        for row in rows
        if row.stage is Stage.SEARCH and row.index < len(space.start_with)
    }
    return tuple(first[index] for index in sorted(first))


def _device_of(rows: Sequence[TrialRow]) -> str:
    trained = (row.summary for row in reversed(rows) if row.summary.num_steps > 0)
    return next((s.device for s in trained if s.outcome.is_result), "cpu")


def _written_environment(directory: RunDirectory) -> Mapping[str, Json]:
    try:
        read: dict[str, Json] = json.loads(directory.environment.read_text())
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in read.items() if key != "study"}
