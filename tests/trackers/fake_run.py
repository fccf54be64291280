"""A small finished study for the tests of the trackers: its run directory, and what it told."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from stability_search.events import Event, EventName
from stability_search.records.trial import Outcome, Stage, TrialRow
from stability_search.records.values import Json
from stability_search.search.run_directory import RunDirectory
from stability_search.step_files import encode_steps, write_steps
from tests.report.study_steps import steps_of
from tests.study_rows import CANDIDATES, SPACE_TEXT, ladder_rows, pilot_rows, search_rows

BEST = {
    "config_id": "c0ffee",
    "settings": {"learning_rate": 0.004, "precision": "bf16", "clip_norm": None},
    "score": 71.5,
    "q_lower": 0.6,
    "margin_octaves": 2.0,
    "margin_is_capped": False,
    "ceiling": 90.0,
    "calm": 1.0,
    "smooth": 0.9,
    "kept": 1.0,
    "progress": 0.8,
    "num_seeds": 5,
    "bad_rate_bound": None,
}


def rows() -> tuple[TrialRow, ...]:
    """Return trials of every stage, of short curves: some good, some killed, one lost once."""
    searched = search_rows(12)
    chosen = [searched[index] for index in (0, 1, 2, 3, 7, 9)]  # 7: killed; 9: no memory
    lost = dataclasses.replace(
        searched[5],
        summary=dataclasses.replace(
            searched[5].summary,
            outcome=Outcome.INFRASTRUCTURE,
            reason=f"{searched[5].node} went away with {Path.home()}/data",
        ),
    )
    again = dataclasses.replace(searched[5], attempt=2)
    ladder = ladder_rows(CANDIDATES[0], 100, octaves=(0,), base=0, seeds=1)
    return (*pilot_rows()[:1], *chosen, lost, again, *ladder)


def file_name(row: TrialRow) -> str:
    """Return the name of a trial's step file."""
    return RunDirectory(path=Path()).step_file(row.trial_id, row.attempt).stem


NAMES = tuple(file_name(row) for row in rows())


def write_run(directory: Path) -> RunDirectory:
    """Write the space of a study that has begun."""
    run = RunDirectory(path=directory)
    run.steps.mkdir(parents=True)
    run.space.write_text(SPACE_TEXT)
    return run


def write_trial(run: RunDirectory, row: TrialRow) -> None:
    """Write what a trial leaves when it ends."""
    path = run.step_file(row.trial_id, row.attempt)
    write_steps(path, encode_steps(steps_of(row)), row)


def write_end(run: RunDirectory) -> None:
    """Write what a study leaves when it ends."""
    document = {"verdict": "stable", "reason": "", "best": BEST}
    run.report_json.write_text(json.dumps(document))
    run.report_html.write_text("<p>report</p>")
    run.best.write_text("name: teacher\n")


def event(name: EventName, **fields: Json) -> Event:
    """Return an event of a study."""
    return Event(name=name, time="2026-03-01T10:00:00.000Z", fields=fields)


def started(run: RunDirectory) -> Event:
    """Return the event that opens a study."""
    return event(EventName.STUDY_STARTED, run_directory=str(run.path), device="cpu")


def finished(run: RunDirectory) -> Event:
    """Return the event that closes a study."""
    return event(
        EventName.STUDY_FINISHED, verdict="stable", exit_code=0, report=str(run.report_html)
    )


def q_of(row: TrialRow) -> float | None:
    """Return some run score of a trial that is a result."""
    return 0.75 if row.summary.outcome.is_result else None


def trial_event(row: TrialRow) -> Event:
    """Return the event of a trial's end."""
    return event(
        EventName.TRIAL_FINISHED,
        trial_id=row.trial_id,
        stage=row.stage.value,
        outcome=row.summary.outcome.value,
        q=q_of(row),
    )


def played(run: RunDirectory, trials: Sequence[TrialRow] | None = None) -> Iterator[Event]:
    """Yield the events of a study from its start, each once its files are there."""
    yield started(run)
    for row in rows() if trials is None else trials:
        write_trial(run, row)
        yield trial_event(row)
    write_end(run)
    yield finished(run)


SEARCHED = tuple(file_name(row) for row in rows() if row.stage is Stage.SEARCH)
