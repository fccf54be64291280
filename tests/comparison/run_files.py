"""Run directories of synthetic studies: what `compare` reads of them, and no more."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stability_search.records.trial import Stage, TrialRow
from stability_search.report import render_json
from stability_search.step_files import step_file_name, write_steps
from stability_search.table import write_tables
from tests.report.study_reports import report_of
from tests.study_rows import SPACE_TEXT, StudyCase

VERSIONS = {"stability-search": "0.1.0", "torch": "2.13.0"}


def write_run(folder: Path, case: StudyCase, *, with_steps: bool = True) -> Path:
    """Write a run directory and return it; step files are those of the verdict's trials."""
    folder.mkdir(parents=True)
    report = report_of(case)
    write_tables(report.tables, folder)
    write_json(folder / "report.json", render_json(report))
    write_json(folder / "environment.json", {"study": {"task_sha256": "", "versions": VERSIONS}})
    (folder / "space.yaml").write_text(SPACE_TEXT)
    (folder / "steps").mkdir()
    chosen = case.verdict.choice or case.verdict.closest
    for row in case.rows if with_steps else ():
        if row.config_id == chosen and row.stage is Stage.CONFIRM:
            write_steps(step_path(folder, row), b"", row)
    return folder


def step_path(folder: Path, row: TrialRow) -> Path:
    return folder / "steps" / step_file_name(row.trial_id, row.attempt)


def write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document))


def edit_json(path: Path, changes: Mapping[str, Any]) -> None:
    """Set values by their dotted keys; `...` removes one."""
    document = json.loads(path.read_text())
    for key, value in changes.items():
        *parents, last = key.split(".")
        inner = document
        for parent in parents:
            inner = inner[parent]
        if value is ...:
            del inner[last]
        else:
            inner[last] = value
    write_json(path, document)


def edit_table(run: Path, name: str, column: str, change: Callable[[Any], Any]) -> None:
    """Change every cell of a column of a stored table."""
    path = run / f"{name}.parquet"
    table = pq.read_table(path)
    place, field = table.schema.names.index(column), table.schema.field(column)
    cells = [change(cell) for cell in table.column(column).to_pylist()]
    pq.write_table(table.set_column(place, field, pa.array(cells, type=field.type)), path)


def edit_space(run: Path, old: str, new: str) -> None:
    text = (run / "space.yaml").read_text()
    assert old in text
    (run / "space.yaml").write_text(text.replace(old, new))


def chosen_rows(case: StudyCase) -> list[TrialRow]:
    """Return the confirm trials of the choice, by seed."""
    return [
        row
        for row in case.rows
        if row.stage is Stage.CONFIRM and row.config_id == case.verdict.choice
    ]


def with_row(case: StudyCase, old: TrialRow, new: TrialRow) -> StudyCase:
    return replace(case, rows=tuple(new if row is old else row for row in case.rows))


def with_lower_floor(case: StudyCase) -> StudyCase:
    """Let one trial of another configuration get much further: the study's E* falls."""
    row = next(
        row
        for row in case.rows
        if row.stage is Stage.CONFIRM
        and row.config_id != case.verdict.choice
        and row.summary.outcome == "completed"
    )
    return with_row(case, row, scaled(row, 1 / 4))


def with_other_probes(case: StudyCase, factors: Mapping[int, float]) -> StudyCase:
    """Scale the later probe losses of the choice's trials, by the position of their seed."""
    for row in chosen_rows(case):
        case = with_row(case, row, scaled(row, factors.get(row.seed_index, 1.0)))
    return case


def scaled(row: TrialRow, factor: float) -> TrialRow:
    """Scale every probe loss of a trial but the first."""
    first, *others = row.summary.probe_losses
    losses = (first, *((loss or 0) * factor for loss in others))
    return replace(row, summary=replace(row.summary, probe_losses=losses))
