"""Synthetic studies as the report sees them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from stability_search.report import Report
from stability_search.table import build_tables, study_yardsticks
from tests.report.study_steps import reader_of
from tests.study_rows import SPACE_SETTINGS, SPACE_TEXT, VARYING, StudyCase


def report_of(case: StudyCase, **changed: Any) -> Report:  # noqa: ANN401 - any field of a report
    """Return the report of a study."""
    yardsticks = study_yardsticks(case.rows, case.study)
    tables = build_tables(
        case.rows,
        space_settings=SPACE_SETTINGS,
        study=case.study,
        yardsticks=yardsticks,
        verdict=case.verdict,
    )
    report = Report(
        tables=tables,
        verdict=case.verdict,
        study=case.study,
        yardsticks=yardsticks,
        space_text=SPACE_TEXT,
        task_name="teacher",
        device="cpu",
        environment={"python": "3.11.9", "packages": {"torch": "2.13.0", "ray": "2.60.0"}},
        start_config_ids=case.start_config_ids,
        setting_names=SPACE_SETTINGS,
        varying=VARYING,
        command="stability-search run --space teacher.yaml",
        run_directory="/home/someone/reports/teacher-20260301-0900",
        home="/home/someone",
    )
    return replace(report, **changed)


def report_with_steps(case: StudyCase, **changed: Any) -> Report:  # noqa: ANN401 - see report_of
    """Return the report of a study whose step files are at hand."""
    return report_of(case, **{"read_steps": reader_of(case), **changed})


HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    "<a href='javascript:alert(3)'>x</a>",
    '"><svg onload=alert(4)>',
    "$\\sum_{i}$ %{x} {{7*7}} {% raw %}",
    "=cmd|' /C calc'!A0",
    "[/red] \x1b[31m\u202e ![x](http://evil.example/x.png) @someone\n# heading",
    "@stable \ud800 \u2028 `code` |pipe|",
)


def hostile_case(case: StudyCase, text: str) -> StudyCase:
    """Put a hostile string wherever a study holds one."""

    def spoil(row: Any) -> Any:  # noqa: ANN401 - a TrialRow
        summary = replace(
            row.summary,
            reason=text,
            first_nonfinite_module=text,
            first_nonfinite_phase=text,
            warnings=(text,),
            error_type=text,
            error_place=text,
            error_text=text,
            device=text,
            metrics_first={text: 1.0},
            metrics_last={text: 0.5},
        )
        settings = {**row.settings, "clip_norm": text}
        return replace(
            row, summary=summary, settings=settings, node=text, trial_id=f"{row.trial_id}{text}"
        )

    verdict = replace(case.verdict, reason=text, missed=(text,), warnings=(text,))
    study = replace(case.study, name=text, targets={text: 0.1})
    return replace(case, rows=tuple(map(spoil, case.rows)), verdict=verdict, study=study)


def hostile_report(make: Callable[[], StudyCase], text: str) -> Report:
    """Return a report with a hostile string in every place that takes text."""
    case = hostile_case(make(), text)
    return report_of(
        case,
        read_steps=reader_of(case, text=text),
        space_text=text,
        task_name=text,
        device=text,
        environment={text: text},
        command=text,
        run_directory=text,
    )
