"""What an indicator beyond its threshold says beside the verdict."""

from dataclasses import replace

import pytest

from stability_search.report.alarms import alarm_sentences
from stability_search.report.context import View
from stability_search.settings import AlarmSettings
from tests.report.study_reports import report_of
from tests.study_rows import StudyCase, interrupted_study, stable_study

QUIET = AlarmSettings(
    attention_max=1e9, clip_frac=1.0, clamp_frac=1.0, cap_frac=1.0, grad_norm=1e9
)


def said(alarms: AlarmSettings, **measured: float | None) -> list[str]:
    case: StudyCase = stable_study()
    rows = tuple(
        replace(row, summary=replace(row.summary, **measured))
        if row.config_id == case.verdict.choice
        else row
        for row in case.rows
    )
    study = replace(case.study, alarms=alarms)
    return alarm_sentences(View(report_of(replace(case, rows=rows, study=study))))


@pytest.mark.parametrize(
    ("name", "value", "limit", "words"),
    [
        ("clip_frac", 0.93, 0.5, "93% of its updates were clipped (alarm at 50%)"),
        ("clamp_frac", 0.02, 0.01, "2.0% of its attention outputs lay beyond the clamp: masked"),
        ("cap_frac", 0.02, 0.01, "2.0% of its attention logits lay beyond the cap: training"),
        (
            "attention_max",
            500.0,
            100.0,
            "reached 500 (alarm at 100): only the cap keeps",
        ),
        ("grad_norm_max", 80.0, 50.0, "reached 80 before clipping (alarm at 50)"),
    ],
)
def test_an_indicator_beyond_its_threshold_is_told_and_one_below_is_not(
    name: str, value: float, limit: float, words: str
) -> None:
    threshold = "grad_norm" if name == "grad_norm_max" else name
    measured = {
        "clip_frac": 0.0,
        "clamp_frac": 0.0,
        "cap_frac": 0.0,
        "attention_max": 1.0,
        "grad_norm_max": 1.0,
    } | {name: value}
    sentences = said(replace(QUIET, **{threshold: limit}), **measured)
    assert len(sentences) == 1
    assert words in sentences[0]
    assert said(QUIET, **measured) == []


@pytest.mark.parametrize(("logit", "words"), [(500.0, "to be watched"), (5e5, "diverging")])
def test_large_logits_without_a_cap_say_how_bad_it_is(logit: float, words: str) -> None:
    measured = {"attention_max": logit, "cap_frac": None}
    [sentence] = said(replace(QUIET, attention_max=100.0), **measured)
    assert sentence.endswith(f"{words}.")


def test_a_study_without_a_headline_raises_no_alarm() -> None:
    assert alarm_sentences(View(report_of(interrupted_study()))) == []
